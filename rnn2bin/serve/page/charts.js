// Small line charts: two lines at most, drawn again when there is news, or another width: one unit of a drawing is one pixel, so that its
// letters are as large as those around it.
import { el, figure } from "./dom.js";

const LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 26;

export function chart(place, points, options) {
  place.replaceChildren(drawn(points, { ...options, width: Math.max(240, place.clientWidth) }));
}

function drawn(points, { a, b, names, width, height = 220, wait = "Nothing measured yet", steps }) {
  // points: [{x, …}]; a, b: which of their values are drawn.
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const seen = points.filter((p) => Number.isFinite(p[a]));
  svg.append(el("title", {}, described(seen, a, b, names)));
  if (!seen.length) {
    svg.append(el("text", { class: "wait", x: width / 2, y: height / 2, "text-anchor": "middle" }, wait));
    return svg;
  }
  const values = seen.flatMap((p) => [p[a], p[b]]).filter(Number.isFinite);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || Math.abs(high) || 1) * 0.1;
  low -= room; high += room;
  const last = Math.max(steps || 1, ...seen.map((p) => p.x));
  const x = (v) => LEFT + ((width - LEFT - RIGHT) * v) / last;
  const y = (v) => TOP + ((height - TOP - BOTTOM) * (high - v)) / (high - low);
  for (const tick of ticks(low, high, 4)) {
    svg.append(el("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(el("text", { class: "tick", x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, figure(tick, 4)));
  }
  for (const tick of ticks(0, last, width < 420 ? 3 : 6)) {
    svg.append(el("text", { class: "tick", x: x(tick), y: height - 6, "text-anchor": tick === 0 ? "start" : "middle" }, tick === 0 ? "step 0" : figure(tick)));
  }
  for (const [value, line, dot] of [[b, "lineB", "dotB"], [a, "lineA", "dotA"]]) {
    const known = seen.filter((p) => Number.isFinite(p[value]));
    if (!value || !known.length) continue;
    svg.append(el("polyline", { class: line, points: known.map((p) => `${x(p.x).toFixed(1)},${y(p[value]).toFixed(1)}`).join(" ") }));
    const end = known.at(-1);
    svg.append(el("circle", { class: dot, cx: x(end.x), cy: y(end[value]), r: 3.5 }));
  }
  return svg;
}

function described(seen, a, b, names) {
  if (!seen.length) return `${names[0]}: not measured yet`;
  const [first, last] = [seen[0], seen.at(-1)];
  const line = (value, name) => `${name} from ${figure(first[value])} to ${figure(last[value])}`;
  return `${line(a, names[0])}${b ? `; ${line(b, names[1])}` : ""}, at step ${last.x}`;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(10)));
  return found;
}
