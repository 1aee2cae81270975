// An input's way: how far it went, the scores on the way, and what the whole network says.

import { count, cut, el, milliseconds, number, row, share } from "./dom.js";
import { blocksRun, nameOf } from "./exits.js";

const label = ([index, name], most) => (name === String(index) ? `class ${index}` : `${cut(name, most)} (class ${index})`);
const IN_TABLE = 40; // letters of a name
const score = (value) => (value === null ? "closed" : Math.abs(value) >= 1e4 ? value.toExponential(1) : value.toFixed(3));

export function showAnswer(found, tensor, facts, sound) {
  const run = blocksRun(found.answer.exit);
  const early = found.answer.exit !== facts.depth;
  const verdict = el(
    "p",
    { className: "verdict" },
    el("strong", {}, label(found.answer.top[0])),
    how(found, run, facts),
  );
  const agreement = early
    ? el("p", {}, "The whole network says: ", el("strong", {}, label(found.base.top[0])), ", ", el("span", { className: found.agrees ? "same" : "other" }, found.agrees ? "the same." : "another answer."))
    : null;
  const preview = tensor.canvas ?? null;
  if (preview) {
    preview.className = "preview";
    preview.setAttribute("role", "img");
    preview.setAttribute("aria-label", "The input as the network sees it");
  }
  return [
    preview,
    sound ? el("audio", { controls: true, src: sound, "aria-label": "The sound that was sent" }) : null,
    verdict,
    agreement,
    track(found, run, facts),
    found.lookups.length ? lookups(found, facts) : null,
    el("div", { className: "two" }, classes(early ? nameOf(found.answer.exit, facts) : "Whole network", found.answer), early ? classes("Whole network", found.base) : null),
    el("p", { className: "explain" }, `${tensor.note ? `Sent: ${tensor.note}. ` : ""}Plan ${cut(found.plan)}${notes(found)}; ${milliseconds(found.milliseconds / 1000)} for both answers.`),
  ].filter((part) => part !== null);
}

function how(found, run, facts) {
  if (found.answer.exit < facts.depth) return `, left early: ${run} of ${facts.depth} blocks were run.`;
  return found.lookups.length ? ", by the whole network: no cache was certain enough." : ", by the whole network alone.";
}

const notes = ({ notes: given }) => Object.entries(given).map(([name, value]) => `, ${name} ${value}`).join("");

function track(found, run, facts) {
  const words = `${run} of ${count(facts.depth)} blocks were run`;
  const made = el("div", { className: "network track", role: "img", "aria-label": words });
  const passed = new Set(found.lookups.map((one) => one.exit));
  for (let block = 0; block < facts.depth; block += 1) {
    if (passed.has(block)) made.append(el("span", { className: "site" }));
    made.append(el("i", { className: block < run ? "run" : "" }));
  }
  return made;
}

function lookups(found, facts) {
  const head = el("thead", {}, el("tr", {}, ...["Cache", "Score", "Leaves from"].map((text, i) => el("th", { scope: "col", className: i ? "number" : "" }, text)), el("th", { scope: "col" }, "Then")));
  const body = el("tbody", {}, ...found.lookups.map((one) => row(nameOf(one.exit, facts), number(score(one.score)), number(score(one.threshold)), one.left ? "left" : "went on")));
  return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Scores on the way" }, el("table", {}, head, body));
}

function classes(title, answer) {
  const heading = el("h3", {}, title);
  const bar = (one) => el("td", { className: "bar" }, el("meter", { min: 0, max: 1, value: one[2], "aria-label": label(one) }));
  const lines = answer.top.map((one) => row(label(one, IN_TABLE), bar(one), number(share(one[2]))));
  return el("div", {}, heading, el("table", {}, el("tbody", {}, ...lines)));
}
