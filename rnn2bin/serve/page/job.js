// One job: live while it runs, its report and files when it is done.
import { chart } from "./charts.js";
import { chip, clock, el, figure, lost, measured as shown, METRICS, percent, say, size, when } from "./dom.js";
import { alert } from "./convert.js";
import { Problem, service } from "./service.js";

const STAGES = ["load", "calibrate", "distill", "pack", "verify"];
const ENDED = ["done", "failed", "cancelled"];
const SAID = { queued: "waiting for a worker", started: "a worker has it", isolated: "shut off from the network", cancelling: "asked to stop", done: "done", failed: "failed", cancelled: "cancelled" };

export async function jobView(id) {
  let job = await service.get(id);
  const points = new Map(), curve = new Map();
  let now = job.progress, source, closed = false, drawn = 0, pending, said;

  const title = el("div", { class: "row" }), asked = el("p", { class: "note" }), head = el("div", {}, title, asked);
  const stages = el("ol", { class: "stages", "aria-label": "Stages" }), problem = el("div", {}), figures = el("div", { class: "figures" });
  const metric = el("div", {}), anneal = el("div", {}), gates = el("dl", { class: "gates" }), end = el("div", { class: "stack" });
  const log = el("ol", { class: "log", tabindex: 0, "aria-label": "What happened" });
  const trained = el("h2", { hidden: true }, "How it was trained");
  const live = el("div", { class: "stack" }, trained, figures,
    el("div", { class: "charts" },
      el("section", { class: "card chart", "aria-label": "Metric" }, el("header", {}, el("h2", {}, "Metric on validation data"), legend("hard gates", "soft gates")), metric),
      el("section", { class: "card chart", "aria-label": "Open rate" }, el("h2", {}, "Open rate of each gate"), el("p", { class: "note" }, "Share of decisions that are 1; for z, of units that are updated."), gates)),
    el("section", { class: "card chart", "aria-label": "Anneal" }, el("header", {}, el("h2", {}, "Anneal"), legend("temperature", "slope")), anneal));
  const node = el("div", { class: "stack" }, el("a", { class: "back-link", href: "#/jobs" }, "← All jobs"), head, el("section", { class: "card" }, stages), problem, end, live,
    el("details", { class: "card" }, el("summary", {}, "What happened"), log));

  function draw() {
    drawn = performance.now();
    pending = undefined;
    drawHead();
    drawStages();
    drawLive();
  }
  const soon = () => { pending ??= setTimeout(draw, Math.max(0, 250 - (performance.now() - drawn))); };

  function drawHead() {
    asked.textContent = [`${job.model.name} (${size(job.model.bytes)})`, Object.keys(job.data).length ? Object.values(job.data).map((one) => one.name).join(", ") : "no data", `recipe ${job.recipe.name || "of its own"}`, ...Object.entries(job.recipe.set || {}).map(([knob, value]) => `${knob}=${JSON.stringify(value)}`), `asked ${when(job.created)}`].join("  ·  ");
    // Buttons stay as long as they say the same: one that is made anew under the reader's hands has lost the focus, and "Really delete?".
    const says = JSON.stringify([job.name, job.state, job.cancelling, job.links]);
    if (says === said) return;
    said = says;
    const active = !ENDED.includes(job.state);
    const act = (name, title, what, kind = "") => el("button", { type: "button", class: kind, onclick: (event) => run(event.currentTarget, name, what) }, title);
    title.replaceChildren(el("h1", {}, job.name), chip(job), el("div", { class: "row push" },
      job.links.archive ? el("a", { class: "button", href: job.links.archive, download: true }, "Download .tar") : null,
      active && !job.cancelling ? act("cancel", "Cancel", "Stopping") : null,
      ["failed", "cancelled"].includes(job.state) ? act("retry", "Retry", "Begun again") : null,
      active ? null : act("remove", "Delete", "Deleted", "danger")));
  }

  async function run(button, name, what) {
    if (name === "remove" && button.dataset.sure === undefined) {
      button.dataset.sure = ""; // asked once more, without a dialog
      button.textContent = "Really delete?";
      return;
    }
    button.disabled = true;
    if (name === "remove") { closed = true; source?.close(); } // what is deleted is not asked for any more
    try {
      await service[name](id);
      say(what);
      if (name === "remove") { location.hash = "#/jobs"; return; }
      job = await service.get(id);
      if (name === "retry") { end.replaceChildren(); problem.replaceChildren(); follow(); }
      button.disabled = false;
      draw();
    } catch (error) {
      problem.replaceChildren(alert(error));
      button.disabled = false;
      if (name === "remove") { closed = false; follow(); }
    }
  }

  function drawStages() {
    const at = STAGES.indexOf(job.stage), broken = ["failed", "cancelled"].includes(job.state);
    stages.replaceChildren(...STAGES.map((stage, k) => {
      const past = job.state === "done" || k < at, here = k === at && job.state !== "done";
      return el("li", { class: past ? "past" : here ? (broken ? "broken" : "now") : "", "aria-current": here ? "step" : undefined }, stage, el("span", { class: "unseen" }, past ? " (done)" : here ? " (now)" : ""));
    }));
    if (!problem.childElementCount && job.error) problem.replaceChildren(alert(new Problem(job.error.status, job.error)));
  }

  function drawLive() {
    live.hidden = !now && ENDED.includes(job.state);
    figures.hidden = job.state === "done"; // the report says more
    trained.hidden = job.state !== "done";
    const name = METRICS[now?.metric] || now?.metric || "metric";
    const left = job.state === "running" ? (job.stage === "distill" ? clock(now?.seconds_left) : job.stage && now ? "soon done" : "–") : "–";
    const tile = (value, title, note) => el("div", { class: "figure" }, el("span", {}, title), el("b", {}, value), el("small", {}, note || " "));
    figures.replaceChildren(
      tile(shown(now?.hard, now?.metric), "Hard gates", name), tile(shown(now?.soft, now?.metric), "Soft gates", name),
      tile(figure(now?.temperature, 3), "Temperature", "falls to bits"), tile(figure(now?.slope, 3), "Slope", "rises to a step"),
      tile(now ? `${now.step} / ${now.steps}` : "–", "Steps", now?.trying_rate ? `short run, rate ${now.trying_rate}` : now?.training > 1 ? `training ${now.training}` : ""), tile(left, "Time left", "of training"));
    const measured = [...points.values()], all = [...curve.values()];
    chart(metric, measured, { a: "hard", b: "soft", names: ["with hard gates", "with soft gates"], steps: now?.steps, wait: job.state === "running" ? "The first measurement comes soon" : "Nothing measured yet" });
    chart(anneal, all, { a: "temperature", b: "slope", names: ["temperature", "slope"], height: 180, steps: now?.steps, wait: "Not begun" });
    const open = Object.entries(now?.open || {});
    gates.replaceChildren(...(open.length ? open.map(([gate, share]) => {
      const bar = el("i", {});
      bar.style.width = `${100 * share}%`;
      return el("div", {}, el("dt", {}, gate.replace(/^main\.layers\./, "layer ").replace(/\.layers\./, " layer ").replace(/\.fwd\./, " ").replace(/\.bwd\./, " ← ")), el("dd", { class: "meter", "aria-hidden": "true" }, bar), el("dd", { class: "num" }, percent(share)));
    }) : [el("p", { class: "note" }, "Counted with every measurement.")]));
  }

  function drawEnd() {
    if (job.state !== "done") return;
    const { result: r } = job, name = METRICS[r.metric.name] || r.metric.name;
    const tile = (value, title, note) => el("div", { class: "figure" }, el("span", {}, title), el("b", {}, value), el("small", {}, note || " "));
    end.replaceChildren(
      el("div", { class: "figures", role: "group", "aria-label": "Result" },
        tile(lost(r.drop.value, r.metric.name), "Lost", `95%: ${lost(r.drop.ci95[0], r.metric.name)} to ${lost(r.drop.ci95[1], r.metric.name)}`), tile(shown(r.teacher, r.metric.name), "Float network", name), tile(shown(r.binary, r.metric.name), "Binary", name),
        tile(percent(r.touched ?? r.read), "Weights read", r.touched === undefined ? "of the layers, a step" : `a step; for the budget ${percent(r.read)}`), tile(size(r.size.packed_bytes), "Packed", `from ${size(r.size.source_bytes)}`), tile(clock(r.seconds), "Took", `${r.steps} steps`)),
      el("section", { class: "card report", "aria-label": "Report" }, el("header", {}, el("h2", {}, "Report"), el("a", { class: "push", href: job.links.report, target: "_blank", rel: "noopener" }, "Open alone"), el("a", { href: `${job.links.report}?download=1`, download: true }, "Download")),
        el("iframe", { src: job.links.report, sandbox: "", title: `Report of ${job.name}`, loading: "lazy" })),
      el("details", { class: "card" }, el("summary", {}, `${job.artifacts.length} files`), el("div", { class: "table" }, el("table", { class: "downloads" }, el("caption", { class: "unseen" }, "Files of the packed directory"),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "File"), el("th", { scope: "col", class: "num" }, "Size"), el("th", { scope: "col", class: "hide-narrow" }, "sha256"))),
        el("tbody", {}, job.artifacts.map((one) => el("tr", {}, el("td", {}, el("a", { href: one.href, download: true }, one.name)), el("td", { class: "num" }, size(one.bytes)), el("td", { class: "sha hide-narrow" }, `${one.sha256.slice(0, 16)}…`))))))));
  }

  async function learnEnd() { // progress is told now and then; the report has every measurement, the last one too
    if (job.state !== "done" || closed) return;
    try {
      const { training } = await service.report(job.links.report.replace(/html$/, "json"));
      if (!training?.length) return;
      points.clear(); curve.clear();
      for (const p of training) { points.set(p.step, { x: p.step, hard: p.hard, soft: p.soft }); curve.set(p.step, { x: p.step, temperature: p.temperature, slope: p.slope }); }
      soon();
    } catch { /* what was heard stays */ }
  }

  function note(at, text) {
    log.append(el("li", {}, el("time", {}, new Date(1000 * at).toLocaleTimeString()), el("span", {}, text)));
  }

  function heard(kind, event) {
    const data = JSON.parse(event.data);
    if (kind === "progress") {
      now = { ...data };
      // A short run that looks for the rate is no point of the training's curves.
      if (!data.trying_rate) curve.set(`${data.training || 1}.${data.step}`, { x: data.step, temperature: data.temperature, slope: data.slope });
      if (!data.trying_rate && data.measured !== null) points.set(`${data.training || 1}.${data.measured}`, { x: data.measured, hard: data.hard, soft: data.soft });
    } else {
      if (kind === "stage") { job = { ...job, state: "running", stage: data.stage }; say(`Stage: ${data.stage}`); }
      if (kind === "started") job = { ...job, state: "running" };
      if (kind === "queued") { points.clear(); curve.clear(); }
      note(data.at, kind === "stage" ? data.stage : kind === "started" && data.start > 1 ? `a worker goes on with it (start ${data.start})` : SAID[kind] || kind);
      if (ENDED.includes(kind)) ended();
    }
    soon();
  }

  async function ended() {
    if (closed) return;
    job = await service.get(id);
    if (!ENDED.includes(job.state)) return; // an earlier run's end, told again
    source?.close();
    say(`The conversion is ${job.state}`);
    window.dispatchEvent(new Event("rnn2bin-jobs"));
    draw(); // at once: a report below a chip that says "running" would be two stories
    drawEnd();
    learnEnd();
  }

  function follow() {
    source?.close();
    if (closed) return;
    points.clear(); curve.clear(); log.replaceChildren();
    source = new EventSource(`${job.links.events}`);
    for (const kind of ["queued", "started", "isolated", "stage", "progress", "cancelling", ...ENDED]) source.addEventListener(kind, (event) => heard(kind, event));
    source.onerror = () => { if (source.readyState === EventSource.CLOSED && !ENDED.includes(job.state) && !closed) setTimeout(follow, 3000); };
  }

  const wide = new ResizeObserver(soon); // fires once when the page shows it
  wide.observe(metric);
  draw();
  drawEnd();
  follow();
  return { node, title: job.name, leave: () => { closed = true; source?.close(); wide.disconnect(); } };
}

function legend(a, b) {
  return el("span", { class: "legend", "aria-hidden": "true" }, el("span", { class: "a" }, el("i", {}), a), el("span", { class: "b" }, el("i", {}), b));
}
