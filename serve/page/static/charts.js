// Lines over time, drawn by uPlot. Their captions say the newest values, or those under the pointer, in words.

import { el } from "./dom.js";

const SHOWN = 300; // seconds
const NARROW = 420; // pixels
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const PLACES = ["first", "second", "third"];
const COLOURS = ["accent", "second", "strong-line"];

export class Chart {
  // `lines`: name, values(history) and say(value) of each; `say` also writes the axis. Infinity is drawn at top(history).
  constructor(parent, { title, lines, most, wide, cap = Infinity }) {
    this.lines = lines;
    this.most = most;
    this.cap = cap;
    const id = `chart-${parent.childElementCount}`;
    this.words = lines.map((_, i) => el("span", { className: `key ${PLACES[i]}` }));
    this.when = el("span", { className: "key-time" });
    this.plot = el("div", { className: "plot", role: "img", "aria-labelledby": id });
    parent.append(el("figure", { className: wide ? "wide" : "" }, el("figcaption", { id }, el("strong", {}, title), ...this.words, this.when), this.plot));
    this.said = lines.map(() => []);
    this.data = [[], ...this.said];
    this.#draw();
    this.resized = new ResizeObserver(() => this.drawn.setSize(this.#size()));
    this.resized.observe(this.plot);
    this.recoloured = () => this.#draw();
    dark.addEventListener("change", this.recoloured);
  }

  // It follows the window and the colour scheme until then.
  stop() {
    this.resized.disconnect();
    dark.removeEventListener("change", this.recoloured);
    this.drawn.destroy();
  }

  show(history) {
    this.said = this.lines.map((line) => line.values(history));
    this.data = [history.times, ...this.said.map((values, i) => values.map((x) => (x === Infinity ? this.lines[i].top(history) : x)))];
    this.drawn.setData(this.data);
    const idx = this.drawn.cursor.idx;
    this.#say(this.drawn.cursor.left >= 0 && idx !== null ? idx : this.data[0].length - 1);
  }

  #say(i) {
    this.words.forEach((word, k) => { word.textContent = `${this.lines[k].name} ${this.lines[k].say(this.said[k][i] ?? null)}`; });
    const newest = i === this.data[0].length - 1;
    this.when.textContent = newest || i < 0 ? "" : `at ${new Date(1000 * this.data[0][i]).toLocaleTimeString()}`;
  }

  #size() { return { width: Math.max(100, this.plot.clientWidth), height: this.plot.clientHeight || 176 }; }

  #draw() {
    this.drawn?.destroy();
    const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const say = this.lines[0].say;
    this.drawn = new uPlot(
      {
        ...this.#size(),
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
        scales: {
          x: { range: (_, low, high) => (high === null ? [0, SHOWN] : [high - SHOWN, high]) },
          y: { range: (_, low, high) => [0, this.most ?? Math.min(this.cap, (high || 1) * 1.15)] },
        },
        axes: [
          { ...axis, size: 26, values: (_, ticks) => ticks.map((t) => ago(this.data[0].at(-1) - t)), splits: (drawn, _, low, high) => (drawn.width < NARROW ? [4, 2, 0] : [4, 3, 2, 1, 0]).map((minutes) => high - 60 * minutes) },
          { ...axis, size: 64, values: (_, ticks) => ticks.map(say) },
        ],
        series: [{}, ...this.lines.map((_, i) => ({ stroke: colour(COLOURS[i]), width: 2, dash: i === 2 ? [6, 4] : undefined, points: { show: false }, spanGaps: false }))],
        hooks: { setCursor: [(drawn) => { if (this.drawn) this.#say(drawn.cursor.left >= 0 && drawn.cursor.idx !== null ? drawn.cursor.idx : this.data[0].length - 1); }] },
      },
      this.data,
      this.plot,
    );
  }
}

function ago(seconds) { return seconds < 30 ? "now" : `−${Math.round(seconds / 60)} min`; }
