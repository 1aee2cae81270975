// What is known of disagreement with the whole network, and the bundle with its plans.

import { count, el, number, percent, row, share } from "./dom.js";

const STATES = {
  open: ["good", "All caches are open"],
  part: ["", "Some caches are closed or paused"],
  safe: ["bad", "Safe mode: the whole network answers"],
  failed: ["bad", "Adaptation has failed: the whole network answers"],
};

export const adaptationState = (now) => (now.adaptation ? STATES[now.adaptation.state] ?? ["", now.adaptation.state] : null);

const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
const facts_ = (pairs) => el("dl", { className: "facts" }, ...pairs.map((pair) => fact(...pair)));
const promised = ({ epsilon, delta }) => (epsilon === null ? "nothing" : epsilon === 0 ? "the network itself" : `at most ${percent(epsilon)}, with ${percent(1 - delta)} confidence`);

export function promise(facts) {
  const plan = facts.plans.find(({ name }) => name === facts.default);
  if (!plan) return "The server compiles its programs; requests are answered once it is ready.";
  if (plan.epsilon === null) return `Plan ${plan.name} answers; nothing is promised of it.`;
  if (!plan.epsilon) return "The whole network answers every request.";
  return `At most ${percent(plan.epsilon)} of answers differ from the whole network’s, with ${percent(1 - plan.delta)} confidence (plan ${plan.name}).`;
}

export function showDrift(now, facts) {
  const one = now.adaptation;
  if (!one) {
    return [el("p", { className: "explain" }, "Live traffic is not compared with the whole network: the server runs without --adapt. What is promised was certified on the bundle’s own data, and holds while traffic is like it; if the shares of exits move, it is not.")];
  }
  const { epsilon = null, delta = null } = facts.plans.find(({ name }) => name === facts.default) ?? {};
  const events = [...one.latest].reverse();
  return [
    facts_([
      ["State", adaptationState(now)[1]],
      ["Requests that disagree, estimated", share(one.estimate)],
      [delta === null ? "At most" : `At most, with ${percent(1 - delta)} confidence`, share(one.upper)],
      ["Promised", epsilon === null ? "nothing" : percent(epsilon)],
      ["Hits compared", `${count(one.shadows)}, of which ${count(one.disagreements)} disagreed${one.lost ? ` (${count(one.lost)} lost)` : ""}`],
      ["Compared now", `${share(one.q)} of hits`],
      ["Requests watched", count(one.watched)],
      ["Alarms", count(one.events.alarm ?? 0)],
      ["Trials", `${count(one.events.trial ?? 0)}, inconclusive ${count(one.events.inconclusive ?? 0)}`],
      ["Stored answers", Object.entries(one.input_cache).map(([layer, n]) => `${layer} ${count(n)}`).join(", ")],
      ["State on disk", one.unsaved ? "cannot be written: trials pause" : "saved"],
    ]),
    el("h3", {}, "History"),
    events.length
      ? el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "What adaptation did" }, table(["Request", "What", ""], events.map(([n, kind, text]) => row(count(n), kind, text))))
      : el("p", { className: "explain" }, "Nothing has changed since the server started."),
  ];
}

export function showBundle(now, facts) {
  const adapted = now.adaptation ? [["Version that adaptation serves", String(now.adaptation.version)]] : [];
  const plans = facts.plans.map((plan) =>
    row(
      plan.name === facts.default ? `${plan.name}, where none is asked for` : plan.name,
      promised(plan),
      plan.sites.length ? plan.sites.join(", ") : "none",
      number(count(now.by_plan[plan.name] ?? 0)),
    ),
  );
  return [
    facts_([["Version (digest of its manifest)", facts.version], ...adapted, ["Arithmetic", facts.numerics], ["Classes", count(facts.classes)], ["Blocks", count(facts.depth)], ["gati-jax", facts.release]]),
    el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Plans" }, table(["Plan", "Disagreement with the whole network", "Caches after blocks", "Answered"], plans, 3)),
  ];
}

function table(names, rows, numbers = names.length) {
  const head = names.map((name, i) => (name ? el("th", { scope: "col", className: i < numbers ? "" : "number" }, name) : el("td", {})));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}
