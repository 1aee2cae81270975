// What is known of disagreement with the whole network, and the bundle with its plans.

import { count, cut, el, number, percent, row, share } from "./dom.js";

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

const FEWEST = 30; // compared hits before an estimate says anything
export const estimated = (one) => (one && one.shadows >= FEWEST ? Math.min(1, one.estimate) : null);

// What holds of the answers: the promise, and what live traffic has shown of it. `broken` is where it has shown otherwise,
// which takes an alarm: an estimate from few comparisons is above the bound by chance.
export function promise(facts, now) {
  const plan = facts.plans.find(({ name }) => name === facts.default);
  const one = now.adaptation;
  if (!plan) return { text: "The server compiles its programs; requests are answered once it is ready." };
  if (one && ["safe", "failed"].includes(one.state)) return { text: `${STATES[one.state][1]}.${alarms(one)}`, broken: true };
  if (plan.epsilon === null) return { text: `Plan ${cut(plan.name)} answers; nothing is promised of it.` };
  if (!plan.epsilon) return { text: "The whole network answers every request." };
  const bundle = `Certified on the bundle’s data (plan ${cut(plan.name)}): at most ${percent(plan.epsilon)} of answers differ from the whole network’s, with ${percent(1 - plan.delta)} confidence.`;
  if (!one) return { text: `${bundle} It holds for traffic like that data, and live traffic is not compared.` };
  if (one.state !== "open") return { text: `${bundle}${alarms(one)} ${STATES[one.state]?.[1] ?? one.state}.`, broken: Boolean(one.events.alarm) };
  const certified = `${bundle}${alarms(one)}${since(one)}`;
  const seen = estimated(one);
  if (seen === null) return { text: `${certified} Of live traffic, only ${count(one.shadows)} answers of caches have been compared so far.` };
  return { text: `${certified} On live traffic it is ${share(seen)}, estimated from ${count(one.shadows)} compared answers of caches, and at most ${share(one.upper)}.` };
}

function since({ events, version }) {
  if (events.swap) return ` What is served now (version ${count(version)}) was certified anew on later traffic.`;
  return events.alarm ? " What the alarm named is closed." : "";
}

const alarms = ({ events: { alarm } }) => (alarm ? ` Live traffic disagreed with it more often than promised: ${count(alarm)} alarm${alarm > 1 ? "s" : ""} since the start.` : "");

export function showDrift(now, facts) {
  const one = now.adaptation;
  if (!one) {
    return [el("p", { className: "explain" }, "Live traffic is not compared with the whole network: the server runs without --adapt. What is promised was certified on the bundle’s own data, and holds for traffic like that data. If the shares of exits change, the traffic has changed.")];
  }
  const { epsilon = null, delta = null } = facts.plans.find(({ name }) => name === facts.default) ?? {};
  const events = [...one.latest].reverse();
  return [
    facts_([
      ["State", adaptationState(now)[1]],
      ["Requests that disagree, estimated", estimated(one) === null ? `– (fewer than ${FEWEST} hits compared)` : share(estimated(one))],
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
      ? el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "What adaptation did" }, table(["Request", "What", ""], events.map(([n, kind, text]) => row(count(n), el("td", { className: "word" }, kind), text))))
      : el("p", { className: "explain" }, "Nothing has changed since the server started."),
  ];
}

export function showBundle(now, facts) {
  const adapted = now.adaptation ? [["Version that adaptation serves", String(now.adaptation.version)]] : [];
  const plans = facts.plans.map((plan) =>
    row(
      plan.name === facts.default ? `${cut(plan.name)}, where none is asked for` : cut(plan.name),
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
