// The knobs of a recipe as a form: what is typed is checked here by its bounds at once, and by the service a moment later.
import { el } from "./dom.js";

const FIRST = ["train.steps", "budget.density", "gates.levels", "gates.copies", "pack.weights", "report.max_drop", "seed"];
const SECTIONS = {
  general: "In general", data: "Data", gates: "Gates and their anneal", budget: "Density: what a step reads", loss: "Loss", train: "Training", pack: "Packing", report: "Report and limits",
};

export class Knobs {
  constructor(knobs, changed) {
    this.changed = changed;
    this.rows = new Map(knobs.map((knob) => [knob.knob, new Row(knob, () => this.changed())]));
    const first = FIRST.map((name) => this.rows.get(name)).filter(Boolean);
    const rest = [...this.rows.values()].filter((row) => !first.includes(row));
    const search = el("input", { type: "search", placeholder: "Find a knob…", "aria-label": "Find a knob", oninput: () => this.find(search.value) });
    this.groups = Object.entries(SECTIONS).map(([section, title]) => {
      const rows = rest.filter((row) => row.knob.section === section);
      return { rows, node: el("section", { class: "group" }, el("h3", {}, title), el("div", { class: "knobs" }, rows.map((row) => row.node))) };
    }).filter((group) => group.rows.length);
    this.node = el("div", {},
      el("div", { class: "knobs" }, first.map((row) => row.node)),
      el("details", { class: "more" }, el("summary", {}, `All ${this.rows.size} knobs`), search, this.groups.map((group) => group.node)));
  }

  find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const group of this.groups) {
      for (const row of group.rows) row.node.hidden = !words.every((word) => row.words.includes(word));
      group.node.hidden = group.rows.every((row) => row.node.hidden);
    }
  }

  forget() { // another recipe was chosen: what was typed for the one before goes, at once
    for (const row of this.rows.values()) row.rebase(row.base);
  }

  base(values) { // its values are here: what unchanged knobs show; what was typed since stays
    for (const row of this.rows.values()) row.touched ? row.compare(values[row.knob.knob]) : row.rebase(values[row.knob.knob]);
  }

  get set() { // knob -> value, of those that differ from the recipe
    return Object.fromEntries([...this.rows.values()].filter((row) => row.isChanged).map((row) => [row.knob.knob, row.value]));
  }

  get wrong() { return [...this.rows.values()].filter((row) => row.why); }

  told(reasons) { // by the service: knob -> why not
    for (const row of this.rows.values()) row.told(reasons[row.knob.knob]);
  }
}

class Row {
  constructor(knob, changed) {
    this.knob = knob;
    this.base = knob.default;
    this.touched = false;
    const id = `knob-${knob.knob.replaceAll(".", "-")}`;
    this.words = `${knob.knob} ${knob.help}`.toLowerCase();
    this.input = field(knob, id);
    this.input.setAttribute("aria-describedby", `${id}-help ${id}-why`);
    this.input.addEventListener("input", () => { this.touched = true; this.check(); changed(); });
    this.reason = el("p", { class: "why", id: `${id}-why` });
    this.back = el("button", { type: "button", class: "back", hidden: true, onclick: () => { this.rebase(this.base); this.input.focus(); changed(); } }, "as in the recipe");
    this.back.setAttribute("aria-label", `${knob.knob} as in the recipe`);
    this.node = el("div", { class: "knob" },
      el("label", { for: id }, knob.knob),
      el("p", { class: "help", id: `${id}-help` }, meaning(knob)),
      el("div", { class: "field" }, this.input, this.back),
      this.reason);
    this.show(this.base);
  }

  rebase(value) {
    this.base = value;
    this.touched = false;
    this.show(value);
    this.check();
  }

  compare(value) {
    this.base = value;
    this.check();
  }

  show(value) {
    if (this.knob.kind === "switch") this.input.checked = value;
    else if (this.knob.kind === "list") this.input.value = value.join(", ");
    else if (this.knob.kind === "map") this.input.value = Object.entries(value).map(([name, n]) => `${name}: ${n}`).join(", ");
    else this.input.value = value ?? "";
  }

  get value() {
    const text = this.input.value.trim(), { kind, choices } = this.knob;
    if (kind === "switch") return this.input.checked;
    if (kind === "list") return text.split(",").map((one) => one.trim()).filter(Boolean);
    if (kind === "map") return Object.fromEntries(text.split(",").filter((one) => one.trim()).map((one) => {
      const [name, n] = one.split(":").map((part) => part.trim());
      return [name, n === "" || Number.isNaN(Number(n)) ? n ?? "" : Number(n)];
    }));
    if (text === "" && this.knob.optional) return null;
    if (choices.includes(text) || kind === "choice" || kind === "text") return text;
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  }

  get isChanged() { return this.touched && JSON.stringify(this.value) !== JSON.stringify(this.base); }

  check() {
    this.tell(this.isChanged ? wrong(this.knob, this.value) : "");
    this.node.classList.toggle("changed", this.isChanged);
    this.back.hidden = !this.isChanged;
  }

  told(reason) { if (this.isChanged && !wrong(this.knob, this.value)) this.tell(reason || ""); }

  tell(reason) {
    this.why = reason;
    this.reason.textContent = reason;
    reason ? this.input.setAttribute("aria-invalid", "true") : this.input.removeAttribute("aria-invalid");
  }
}

function field(knob, id) {
  if (knob.kind === "choice") return el("select", { id }, knob.choices.map((choice) => el("option", { value: choice }, choice)));
  if (knob.kind === "switch") return el("input", { id, type: "checkbox" });
  const numeric = ["count", "number"].includes(knob.kind);
  return el("input", { id, type: "text", inputmode: numeric && !knob.choices.length ? "decimal" : "text", autocomplete: "off", spellcheck: "false", placeholder: knob.optional ? "none" : knob.kind === "map" ? "i: 0.15, o: 0.1" : "" });
}

function meaning(knob) {
  const text = /^[\w.-]+:/.test(knob.help) ? knob.help : knob.help.slice(0, 1).toUpperCase() + knob.help.slice(1);
  const range = bounds(knob);
  return [text, range && (text ? `${/[.:]$/.test(text) ? " " : ". "}${range}` : range)].filter(Boolean).join("");
}

function bounds({ kind, choices, low, above, high, below, optional }) {
  if (!["count", "number"].includes(kind)) return "";
  const from = low !== null ? `at least ${low}` : above !== null ? `above ${above}` : "";
  const to = high !== null ? `at most ${high}` : below !== null ? `below ${below}` : "";
  const range = [from, to].filter(Boolean).join(", ");
  const what = kind === "count" ? "A whole number" : "A number";
  return `${what}${range ? `, ${range}` : ""}${choices.length ? `, or ${choices.join(" or ")}` : ""}${optional ? ", or nothing" : ""}.`;
}

function wrong(knob, value) {
  if (value === null || knob.choices.includes(value) || !["count", "number"].includes(knob.kind)) return "";
  const whole = knob.kind === "count" && !Number.isInteger(value);
  const outside = (knob.low !== null && value < knob.low) || (knob.above !== null && value <= knob.above) || (knob.high !== null && value > knob.high) || (knob.below !== null && value >= knob.below);
  return typeof value !== "number" || !Number.isFinite(value) || whole || outside ? `Must be: ${bounds(knob).replace(/^A /, "a ").replace(/\.$/, "")}` : "";
}
