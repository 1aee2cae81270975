// Where requests leave: the network drawn block by block, and a table.

import { $, count, el, number, row, share } from "./dom.js";
import { exits, leftOf } from "./history.js";

const MINUTE = 60;

export function nameOf(exit, facts) {
  if (exit === -1) return "Stored answer (the same input)";
  if (exit === -2) return "Stored answer (a similar input)";
  if (exit === 0) return "Cache at the input";
  return exit === facts.depth ? "Whole network" : `Cache after block ${exit}`;
}

// Blocks that are run for an input that leaves there: a cache at site k reads what block k gives, at 0 the input.
export const blocksRun = (exit) => Math.max(0, exit);

export function showExits(history, facts) {
  const now = history.latest;
  const recent = history.between(exits, MINUTE) ?? { left: {}, total: 0 };
  const all = exits(null, now);
  const known = Object.entries(leftOf(now)).filter(([exit, n]) => exit >= 0 || n).map(([exit]) => Number(exit)).sort((a, b) => a - b);
  const part = (of, exit) => (of.total ? (of.left[exit] ?? 0) / of.total : null);
  $("exits").tBodies[0].replaceChildren(
    ...known.map((exit) => {
      const meter = el("meter", { min: 0, max: 1, value: part(recent, exit) ?? 0, "aria-label": `${nameOf(exit, facts)}, last minute` });
      return row(
        nameOf(exit, facts),
        el("td", { className: "number run" }, `${blocksRun(exit)} of ${facts.depth}`),
        el("td", { className: "bar" }, meter),
        number(share(part(recent, exit))),
        number(`${count(leftOf(now)[exit])} (${share(part(all, exit))})`),
      );
    }),
  );
  draw(recent.total ? recent : all, facts);
}

function draw(of, facts) {
  const sites = new Set(facts.plans.flatMap((plan) => plan.sites));
  let still = of.total ? 1 - ((of.left[-1] ?? 0) + (of.left[-2] ?? 0)) / of.total : 0;
  const parts = [];
  for (let block = 0; block < facts.depth; block += 1) {
    if (sites.has(block)) parts.push(el("span", { className: "site" }));
    if (of.total) still -= (of.left[block] ?? 0) / of.total;
    const bar = el("b");
    bar.style.height = `${100 * still}%`;
    parts.push(el("i", {}, bar));
  }
  $("network").replaceChildren(...parts);
}
