// Elements from calls: el("p", {class: "note"}, "text", child, …). Text is text, never markup.

export function el(name, attributes = {}, ...children) {
  const svg = SVG.has(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const SVG = new Set(["svg", "path", "line", "text", "circle", "rect", "g", "polyline", "title"]);

export const $ = (id) => document.getElementById(id);

let speaking;
export function say(text) {
  // For screen readers: what changed.
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("said").textContent = text; }, 50);
}

export function size(bytes) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 1000 || unit === "GB") return unit === "B" ? `${bytes} B` : `${Number(bytes.toPrecision(3))} ${unit}`;
    bytes /= 1000;
  }
}

export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function figure(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return (Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(digits)))).replace("-", "−");
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`);

// A metric's value in words, as the report's own page says it: shares in percent, their differences in points.
const isShare = (metric) => /^(accuracy|agreement)$|_(accuracy|agreement|rate|right)$/.test(metric || "");
export const measured = (value, metric, digits = 4) => (isShare(metric) && Number.isFinite(value) ? `${figure(100 * value, 3)}%` : figure(value, digits));
export const lost = (value, metric) => (isShare(metric) && Number.isFinite(value) ? `${figure(100 * value, 3)} points` : figure(value, 3));

const FORMAT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
export function when(iso) {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return FORMAT.format(new Date(iso));
}

export const METRICS = {
  bits_per_token: "bits per token", accuracy: "accuracy", mse: "mean squared error", cosine: "cosine to the teacher",
  agreement: "agreement with the teacher", sequence_accuracy: "whole sequences right",
};
export const STATES = { queued: "waiting", running: "running", done: "done", failed: "failed", cancelled: "cancelled" };
export const chip = (job) => el("span", { class: `chip ${job.state}` }, job.cancelling ? "stopping" : STATES[job.state]);
