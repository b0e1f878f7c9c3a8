// Which view is shown, the theme, and the key.
import { alert, convertView } from "./convert.js";
import { $, el } from "./dom.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { service } from "./service.js";

let current, turn = 0;

async function show() {
  const mine = ++turn, [, place, id] = location.hash.split("/");
  current?.leave?.();
  for (const link of document.querySelectorAll("[data-nav]")) {
    link.dataset.nav === (place || "convert") ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  let view;
  try {
    const session = await service.session();
    $("leave").hidden = !(session.needs_key && session.owner);
    view = session.owner === null ? loginView() : place === "jobs" ? await (id ? jobView(id) : jobsView()) : await convertView();
  } catch (problem) {
    view = { node: el("div", { class: "stack" }, alert(problem), el("div", { class: "row" }, el("button", { type: "button", onclick: show }, "Try again"), el("a", { class: "button", href: "#/jobs" }, "All jobs"))), title: "Problem" };
  }
  if (mine !== turn) return view.leave?.();
  current = view;
  document.title = `${view.title} · rnn2bin`;
  $("main").replaceChildren(view.node);
  if (mine > 1) $("main").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function loginView() {
  const key = el("input", { id: "key", type: "password", autocomplete: "current-password", required: true, "aria-describedby": "key-why" });
  const why = el("p", { class: "why", id: "key-why", role: "alert" });
  const node = el("form", { class: "card login", onsubmit: async (event) => {
    event.preventDefault();
    try { await service.login(key.value.trim()); show(); } catch (problem) { why.textContent = problem.reasons[0]; key.setAttribute("aria-invalid", "true"); key.focus(); }
  } }, el("h1", {}, "Your key"), el("p", { class: "note" }, "This service is used with a key. Whoever runs it makes one with ", el("code", {}, "rnn2bin serve keys add NAME"), "."),
    el("label", { for: "key" }, "Key"), key, why, el("button", { class: "main", type: "submit" }, "Sign in"));
  return { node, title: "Sign in" };
}

const THEMES = [undefined, "light", "dark"], NAMES = { undefined: "as the system", light: "light", dark: "dark" };
function theme(next) {
  const root = document.documentElement;
  if (next) {
    const chosen = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % 3];
    chosen ? (root.dataset.theme = chosen) : delete root.dataset.theme;
    chosen ? localStorage.setItem("rnn2bin-theme", chosen) : localStorage.removeItem("rnn2bin-theme");
  }
  $("theme").setAttribute("aria-label", `Theme: ${NAMES[root.dataset.theme]}`);
  $("theme").title = `Theme: ${NAMES[root.dataset.theme]}`;
}

async function busy() {
  if (document.hidden) return;
  try {
    const { jobs } = await service.session();
    $("busy").hidden = !jobs;
    $("busy").textContent = jobs || "";
    $("busy").setAttribute("aria-label", `${jobs} waiting or running`);
  } catch { /* it comes back */ }
}

$("theme").addEventListener("click", () => theme(true));
$("leave").addEventListener("click", async () => { await service.logout(); show(); });
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault()); // beside its place a file would replace the page
window.addEventListener("hashchange", show);
window.addEventListener("rnn2bin-key", show);
theme(false);
show();
busy();
setInterval(busy, 5000);
window.addEventListener("rnn2bin-jobs", busy);
window.addEventListener("hashchange", busy);
