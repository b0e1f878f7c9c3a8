// The list of jobs, and what was uploaded for them.
import { chip, clock, el, lost, METRICS, percent, say, size, when } from "./dom.js";
import { service } from "./service.js";
import { alert } from "./convert.js";

const TABS = [["", "All"], ["queued", "Waiting"], ["running", "Running"], ["done", "Done"], ["failed", "Failed"], ["cancelled", "Cancelled"]];

export async function jobsView() {
  let state = "", shown = "", timer, older = [];
  const body = el("div", {});
  const tabs = el("div", { class: "tabs", role: "group", "aria-label": "Which jobs" }, TABS.map(([value, title]) => el("button", { type: "button", "data-state": value, "aria-pressed": String(value === state), onclick: () => pick(value) }, title)));
  const more = el("button", { type: "button", hidden: true, onclick: () => load(true) }, "Older ones");
  const node = el("div", { class: "stack" }, el("div", { class: "row" }, el("h1", {}, "Jobs"), el("a", { class: "button push", href: "#/" }, "New conversion")), tabs, body, el("div", { class: "row" }, more), uploads());
  let next = null;

  function pick(value) {
    [state, older, shown] = [value, [], ""];
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.dataset.state === value));
    load();
  }

  async function load(further = false) {
    try {
      const found = await service.list(state, further ? next : undefined);
      if (further) older = [...older, ...found.items];
      if (further || !older.length) next = found.next;
      const jobs = further ? [...current, ...older] : [...(current = found.items), ...older];
      const drawn = JSON.stringify(jobs.map((job) => [job.id, job.state, job.stage, job.cancelling, job.progress?.step]));
      if (drawn !== shown) {
        const at = body.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
        body.replaceChildren(jobs.length ? table(jobs) : empty(state));
        if (at) body.querySelector(`[href="${at}"]`)?.focus(); // the keyboard stays where it was
      }
      shown = drawn;
      more.hidden = !next;
    } catch (problem) {
      if (!shown) body.replaceChildren(alert(problem));
    }
  }
  let current = [];

  await load();
  timer = setInterval(() => document.hidden || load(), 2000);
  return { node, title: "Jobs", leave: () => clearInterval(timer) };
}

function uploads() {
  const body = el("div", { class: "stack" });
  async function show() {
    try {
      const [{ items }, session] = await Promise.all([service.uploads(), service.session()]);
      const quota = session.max_bytes ? ` Results and uploads take ${size(session.bytes)} of the ${size(session.max_bytes)} that your key allows.` : "";
      body.replaceChildren(el("p", { class: "note" }, `${items.length ? "They stay until they are deleted; a job that waits or runs needs its own." : "None."}${quota}`), ...(items.length ? [listed(items)] : []));
    } catch (problem) {
      body.replaceChildren(alert(problem));
    }
  }
  const listed = (items) => el("div", { class: "table" }, el("table", { class: "downloads" }, el("caption", { class: "unseen" }, "Uploads, newest first"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "File"), el("th", { scope: "col", class: "num" }, "Size"), el("th", { scope: "col", class: "num hide-narrow" }, "Sent"), el("th", { scope: "col" }, el("span", { class: "unseen" }, "Delete")))),
    el("tbody", {}, items.map((one) => el("tr", {}, el("td", {}, one.name), el("td", { class: "num" }, size(one.bytes)), el("td", { class: "num hide-narrow" }, when(one.created)), el("td", { class: "num" }, el("button", { type: "button", class: "quiet", "aria-label": `Delete ${one.name}`, onclick: () => forget(one) }, "Delete")))))));
  async function forget(one) {
    try {
      await service.forgetUpload(one.id);
      say(`${one.name} is deleted`);
      show();
    } catch (problem) {
      body.prepend(alert(problem));
    }
  }
  return el("details", { class: "card", id: "uploads", ontoggle: (event) => event.target.open && show() }, el("summary", {}, "Uploads"), body);
}

function empty(state) {
  return el("div", { class: "card empty" }, el("h2", {}, state ? "None of these" : "No conversions yet"), el("p", {}, state ? "Nothing is in this state." : "Upload a network to see how it does with binary gates."), state ? null : el("a", { class: "button", href: "#/" }, "Convert a network"));
}

function table(jobs) {
  return el("div", { class: "card table" }, el("table", {}, el("caption", { class: "unseen" }, "Conversions, newest first"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Name"), el("th", { scope: "col" }, "State"), el("th", { scope: "col", class: "num" }, "Lost"), el("th", { scope: "col", class: "num hide-narrow" }, "Weights read"), el("th", { scope: "col", class: "num hide-narrow" }, "Asked"))),
    el("tbody", {}, jobs.map(row))));
}

function row(job) {
  const { result, progress } = job;
  const going = job.state === "running" && progress && job.stage === "distill";
  const state = el("td", {}, chip(job), job.state === "running" ? el("small", {}, going ? `${percent(Math.min(1, progress.step / progress.steps))} of training, ${clock(progress.seconds_left)} left` : job.stage || "starting") : job.error ? el("small", {}, job.error.code) : null);
  return el("tr", {},
    el("td", { class: "name" }, el("a", { href: `#/jobs/${job.id}` }, job.name), el("small", {}, job.recipe.name || "own recipe")),
    state,
    el("td", { class: "num" }, result ? lost(result.drop.value, result.metric.name) : "", result ? el("small", {}, METRICS[result.metric.name] || result.metric.name) : null),
    el("td", { class: "num hide-narrow" }, result ? percent(result.touched ?? result.read) : ""),
    el("td", { class: "num hide-narrow" }, el("time", { datetime: job.created }, when(job.created))));
}
