// Asking for a conversion: network, data, recipe.
import { clock, el, say, size } from "./dom.js";
import { Knobs } from "./knobs.js";
import { Problem, service, upload } from "./service.js";

const ROLES = { all: "split by the recipe", train: "to train on", valid: "to choose by", test: "held out for the report", vocabulary: "names of tokens, one a line", labels: "names of classes, one a line" };
const NAMES = ["vocabulary", "labels"];
const OWN = "your-own";
const USED = ["anneal", "sparse", "strict", "gumbel", "slope", "smoke"]; // the most useful first
const byUse = (a, b) => (USED.indexOf(a.name) + 99) % 99 - (USED.indexOf(b.name) + 99) % 99;

export async function convertView() {
  const { items, knobs } = await service.recipes();
  const state = { recipe: "anneal", text: null, ready: true };
  const changed = () => { describe(); validate(); };
  const form = new Knobs(knobs, changed);
  const network = new Files("network", { many: false, accept: "", changed });
  const data = new Files("data", { many: true, accept: "", changed });

  const own = el("textarea", { id: "own", spellcheck: "false", "aria-describedby": "own-why", oninput: changed }, "version: 1\n\ntrain:\n  steps: 4000\n");
  const ownWhy = el("div", { class: "why", id: "own-why", role: "status" });
  const ownBox = el("div", { class: "stack", hidden: true }, el("label", { for: "own" }, "Your recipe, in YAML"), own, ownWhy);
  const about = el("select", { id: "about", onchange: changed }, el("option", { value: "" }, "nothing: the file says enough"), items.filter((one) => one.one_network).map((one) => el("option", { value: one.name }, one.name)));
  const picks = el("fieldset", { class: "recipes" }, el("legend", { class: "unseen" }, "Recipe"),
    el("div", { class: "picks" }, [...items.filter((one) => !one.one_network).sort(byUse), { name: OWN, summary: "YAML of your own, checked as you type." }].map(pick)),
    el("details", {}, el("summary", {}, "Written for one public network"), el("div", { class: "picks" }, items.filter((one) => one.one_network).map(pick))));
  const named = el("input", { id: "name", maxlength: 200, placeholder: "as the network's file", oninput: changed });
  const facts = el("dl", {});
  const errors = el("div", { role: "alert" });
  const button = el("button", { type: "submit", class: "main" }, "Convert");
  const hint = el("p", { class: "note" });

  const view = el("form", { novalidate: true, onsubmit: send },
    el("h1", {}, "Convert a network to binary gates"),
    el("p", { class: "lead" }, "Upload a pretrained LSTM or GRU. It is distilled into a network whose every gate is exactly 0 or 1, packed, measured against the original, and yours to download. No code in your file is run."),
    el("div", { class: "convert" },
      el("div", { class: "stack" },
        step(1, "Network", "PyTorch, TorchScript, safetensors, NumPy, ONNX, Keras, TensorFlow 1", network.node),
        step(2, "Data", "optional for language models; one file, or train, valid and test", data.node,
          el("p", { class: "note" }, el("code", {}, ".npz"), ", ", el("code", {}, ".safetensors"), " or ", el("code", {}, ".pt"), " with ", el("code", {}, "inputs"), " and, where there are any, ", el("code", {}, "lengths"), " and ", el("code", {}, "targets"), "; or ", el("code", {}, ".txt"), ".")),
        step(3, "Recipe", "how to train; every knob may be changed", picks, ownBox, form.node,
          el("details", {}, el("summary", {}, "What the file does not say"),
            el("div", { class: "knob" }, el("label", { for: "about" }, "source"),
              el("p", { class: "help" }, "Files of bare tensors do not say how these are joined. Take that from a bundled recipe written for the same network."),
              el("div", { class: "field" }, about))))),
      el("aside", { class: "ask card sum", "aria-label": "Summary" },
        el("h2", {}, "This conversion"), facts, el("div", { class: "named" }, el("label", { for: "name" }, "Name in the list"), named), errors, button, hint)));

  function pick(one) {
    return el("label", { class: "pick" },
      el("input", { type: "radio", name: "recipe", value: one.name, checked: one.name === state.recipe, onchange: () => choose(one.name) }),
      el("b", {}, one.name === OWN ? "Your own" : one.name), el("span", { title: one.summary }, one.summary));
  }

  async function choose(name) {
    state.recipe = name;
    ownBox.hidden = name !== OWN;
    form.forget();
    if (name !== OWN) {
      const { values } = await service.recipe(name);
      if (state.recipe !== name) return; // another was chosen meanwhile
      form.base(values);
    } else form.base(Object.fromEntries(knobs.map((knob) => [knob.knob, knob.default])));
    changed();
  }

  function body() {
    const mine = state.recipe === OWN;
    return { recipe: mine ? "anneal" : state.recipe, ...(mine && { recipe_text: own.value }), ...(about.value && { source: about.value }), set: form.set };
  }

  let timer, asked = 0;
  function validate() {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const mine = ++asked;
      try {
        const found = await service.validate(body());
        if (mine !== asked) return;
        form.told(found.knobs);
        state.ready = found.valid;
        const loose = found.reasons.filter((reason) => !reason.startsWith("--set"));
        ownWhy.replaceChildren(...(state.recipe === OWN ? loose.map((reason) => el("p", {}, reason)) : []));
        own.toggleAttribute("aria-invalid", false);
        if (state.recipe === OWN && loose.length) own.setAttribute("aria-invalid", "true");
        describe();
      } catch { /* it is said again when it is sent */ }
    }, 250);
  }

  function describe() {
    const count = Object.keys(form.set).length, steps = form.rows.get("train.steps")?.value;
    const rows = [["network", network.summary || "none yet"], ["data", data.summary || "none"], ["recipe", state.recipe === OWN ? "your own" : state.recipe], ["steps", state.recipe === OWN ? null : steps], ["knobs changed", count || null]];
    facts.replaceChildren(...rows.filter(([, value]) => value !== null).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
    const missing = !network.ready.length ? (network.busy ? "The network is still on its way." : "Choose a network first.") : data.busy ? "The data are still on their way." : data.twice ? `Two files are given as ${data.twice}: say what each is for.` : form.wrong.length || !state.ready ? "A knob has a value that it cannot have." : "";
    button.disabled = Boolean(missing);
    hint.textContent = missing;
  }

  let key = crypto.randomUUID(), last = "";
  async function send(event) {
    event.preventDefault();
    if (button.disabled) return;
    const parts = Object.fromEntries(data.ready.map((one) => [one.role, one.sent.id]));
    const given = data.ready.length ? parts : null;
    const request = { ...body(), model: network.ready[0].sent.id, data: given, name: named.value.trim() };
    if (JSON.stringify(request) !== last) [key, last] = [crypto.randomUUID(), JSON.stringify(request)];
    button.disabled = true;
    errors.replaceChildren();
    try {
      const job = await service.convert(request, key); // sent twice, it is one job
      say("The conversion is waiting for its turn");
      location.hash = `#/jobs/${job.id}`;
    } catch (problem) {
      errors.replaceChildren(alert(problem));
      button.disabled = false;
    }
  }

  await choose(state.recipe);
  return { node: view, title: "Convert" };
}

export function alert(problem) {
  const reasons = problem instanceof Problem ? problem.reasons : [String(problem.message || problem)];
  return el("div", { class: "alert" }, el("h2", {}, problem.title || "That did not work"), el("ul", {}, reasons.map((reason) => el("li", {}, reason))));
}

function step(number, title, note, ...content) {
  return el("section", { class: "card step", "aria-label": title }, el("header", {}, el("span", { class: "number", "aria-hidden": "true" }, String(number)), el("h2", {}, title), el("span", { class: "note" }, note)), content);
}

class Files {
  constructor(what, { many, changed }) {
    Object.assign(this, { what, many, changed, list: [] });
    this.input = el("input", { type: "file", multiple: many, id: `file-${what}`, onchange: () => { this.add(this.input.files); this.input.value = ""; } });
    this.zone = el("label", { class: "drop", for: `file-${what}` },
      el("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, el("path", { d: "M12 16V4m0 0 4.5 4.5M12 4 7.5 8.5M4 15v3a2 2 0 0 0 2 2h12a2 2 0 0 0 2-2v-3" })),
      el("span", {}, el("strong", {}, `Drop the ${what} here`), " or ", el("u", {}, many ? "choose files" : "choose a file")), this.input);
    for (const name of ["dragover", "dragenter"]) this.zone.addEventListener(name, (event) => { event.preventDefault(); this.zone.classList.add("over"); });
    for (const name of ["dragleave", "drop"]) this.zone.addEventListener(name, (event) => { event.preventDefault(); this.zone.classList.remove("over"); });
    this.zone.addEventListener("drop", (event) => this.add(event.dataTransfer.files));
    this.items = el("ul", { class: "files", "aria-label": `Files: ${what}`, hidden: true });
    this.node = el("div", { class: "stack" }, this.items, this.zone);
  }

  get ready() { return this.list.filter((one) => one.sent); }
  get busy() { return this.list.some((one) => !one.sent && !one.failed); }
  get twice() { return this.list.map((one) => one.role).find((role, k, all) => all.indexOf(role) < k); }
  get summary() { return this.list.map((one) => one.file.name).join(", "); }

  add(files) {
    const chosen = [...files];
    if (!chosen.length) return;
    if (!this.many) for (const one of [...this.list]) this.drop(one);
    for (const file of this.many ? chosen : chosen.slice(0, 1)) this.send(file);
    const parts = this.list.filter((one) => !NAMES.includes(one.role));
    if (parts.length > 1 && this.many) for (const one of parts) if (one.role === "all") one.roles.value = one.role = "train";
    this.draw();
  }

  send(file) {
    const one = { file, role: this.many ? guess(file.name, this.list.filter((other) => !NAMES.includes(other.role)).length) : "model" };
    one.bar = el("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
    one.why = el("p", { class: "why", role: "alert" });
    one.roles = this.many ? el("select", { "aria-label": `What ${file.name} is for`, onchange: () => { one.role = one.roles.value; this.changed(); } }, Object.entries(ROLES).map(([role, meaning]) => el("option", { value: role, selected: role === one.role }, role === "all" ? meaning : `${role}: ${meaning}`))) : el("span", {});
    one.node = el("li", {}, el("span", { class: "name" }, file.name, el("span", {}, size(file.size))), one.roles,
      el("button", { type: "button", class: "quiet", "aria-label": `Remove ${file.name}`, onclick: () => { this.drop(one); this.draw(); } }, "Remove"), one.bar, one.why);
    this.list.push(one);
    const began = performance.now(), sending = upload(file, (share) => { one.bar.value = share; one.bar.title = clock(((performance.now() - began) / 1000 / share) * (1 - share)); });
    one.stop = sending.stop;
    sending.done.then((sent) => { one.sent = sent; one.bar.hidden = true; say(`${file.name} is uploaded`); this.changed(); })
      .catch((problem) => { one.failed = true; one.bar.hidden = true; one.why.textContent = problem.reasons?.[0] || String(problem); this.changed(); });
  }

  drop(one) {
    this.list = this.list.filter((other) => other !== one);
    one.stop?.();
    if (one.sent) service.forgetUpload(one.sent.id).catch(() => {}); // in use, or gone
  }

  draw() {
    this.items.replaceChildren(...this.list.map((one) => one.node));
    this.items.hidden = !this.list.length;
    this.zone.classList.toggle("small", this.list.length > 0);
    this.changed();
  }
}

function guess(name, count) {
  if (/vocab|tokens/i.test(name)) return "vocabulary";
  if (/labels|classes/i.test(name)) return "labels";
  const found = name.toLowerCase().match(/(^|[^a-z])(train|valid|val|dev|test)([^a-z]|$)/);
  if (found) return { val: "valid", dev: "valid" }[found[2]] || found[2];
  return count ? "test" : "all";
}
