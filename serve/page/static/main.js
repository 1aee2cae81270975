// The page: follows the server, and sends it inputs.

import { showAnswer } from "./answer.js";
import { Chart } from "./charts.js";
import { $, count, el, milliseconds, rate, share } from "./dom.js";
import { adaptationState, promise, showBundle, showDrift } from "./drift.js";
import { showExits } from "./exits.js";
import { answered, depthOf, earlyOf, History, per, percentile, refusals, refused, waiting } from "./history.js";
import { body, expects, fromFile, fromNumbers, isPicture, random } from "./input.js";
import { address, follow, token, whyNot } from "./stream.js";

const SHORT = 5; // seconds that a rate is of
const WINDOW = 10; // seconds that a percentile is of
const MINUTE = 60;
let facts = null;
let history = new History();
let charts = [];
let sound = null;

function makeCharts() {
  $("charts").replaceChildren();
  const line = (name, get, span, say) => ({ name, values: (seen) => seen.line(get, span), say });
  const now = (name, get, say) => ({ name, values: (seen) => seen.values(get), say });
  const whole = (x) => (x === null ? "–" : Number.isInteger(x) ? count(x) : ""); // no marks between
  charts = [
    { title: "Throughput, a second", lines: [line("answered", per(answered), SHORT, rate), line("refused", per(refused), SHORT, rate)] },
    { title: "Latency, from arrival to answer", lines: [line("median", percentile(0.5), WINDOW, milliseconds), line("99 %", percentile(0.99), WINDOW, milliseconds)] },
    { title: "Depth: the share of the network that is run", most: 1, lines: [line("mean", depthOf(facts), WINDOW, share)] },
    { title: "Queue", lines: [now("images that wait", waiting, whole)] },
  ].map((chart) => new Chart($("charts"), chart));
}

function addDisagreement() {
  const promised = facts.plans.find(({ name }) => name === facts.default)?.epsilon ?? null;
  const of = (name, get) => ({ name, values: (seen) => seen.values(get), say: share });
  const lines = [of("estimated", (now) => Math.min(1, now.adaptation?.estimate ?? 0)), of("at most", (now) => now.adaptation?.upper ?? null)];
  if (promised !== null) lines.push(of("promised", () => promised));
  charts.push(Object.assign(new Chart($("charts"), { title: "Disagreement with the whole network", lines, wide: true, cap: 1 }), { isDrift: true }));
}

function tile(name, value, more) {
  return el("div", {}, el("dt", {}, name), el("dd", { className: "value" }, value), el("dd", { className: "more" }, more));
}

function showTiles(now) {
  const total = refused(now);
  $("tiles").replaceChildren(
    tile("Answered a second", rate(history.between(per(answered), SHORT)), `${count(answered(now))} since the start`),
    tile("Median latency", milliseconds(history.between(percentile(0.5), WINDOW)), `99 %: ${milliseconds(history.between(percentile(0.99), WINDOW))}`),
    tile("Left at a cache", share(history.between(earlyOf(facts), MINUTE)), "last minute"),
    tile("Network run", share(history.between(depthOf(facts), MINUTE)), "mean depth, last minute"),
    tile("Waiting", count(waiting(now)), now.queue_age_seconds ? `since ${milliseconds(now.queue_age_seconds)}` : `${count(now.used)} of ${count(now.admitted)} places taken`),
    tile("Refused", count(total), total ? Object.entries(refusals(now)).map(([why, n]) => `${why} ${count(n)}`).join(", ") : "since the start"),
    tile("Failed steps", count(now.failed_steps), `of ${count(now.steps)}`),
    ...(now.adaptation ? [tile("Alarms", count(now.adaptation.events.alarm ?? 0), `${count(now.adaptation.events.trial ?? 0)} trials, version ${count(now.adaptation.version)}`)] : []),
  );
}

function setState(kind, text) {
  if ($("state").textContent === text) return; // said once
  $("state").dataset.state = kind;
  $("state").textContent = text;
}

function showState(now) {
  const state = adaptationState(now);
  if (now.stopping) setState("bad", "Stopping");
  else if (!now.ready) setState("", "Warming up");
  else if (state && state[0] === "bad") setState("bad", state[1]);
  else setState("good", state && now.adaptation.state !== "open" ? `Ready. ${state[1]}` : "Ready");
}

function onAbout(told) {
  if (JSON.stringify(told) === JSON.stringify(facts)) return; // connected again
  facts = told;
  history = new History();
  document.title = `${facts.model} – GATI-JAX server`;
  $("model").textContent = facts.model;
  $("models").hidden = facts.models.length < 2;
  $("models").replaceChildren(...facts.models.map((name) => {
    const link = el("a", { href: `?model=${encodeURIComponent(name)}` }, name);
    if (name === facts.model) link.setAttribute("aria-current", "page");
    return link;
  }));
  $("promise").textContent = promise(facts);
  $("expects").textContent = expects(facts);
  $("invert-row").hidden = !(isPicture(facts) && facts.input_shape[2] === 1);
  $("file").accept = [".npy", ".wav", ...(isPicture(facts) ? ["image/*"] : [])].join();
  $("content").hidden = false;
  makeCharts();
}

function onNow(now) {
  showState(now);
  if (!facts) return; // the model is being loaded
  history.add(now);
  showTiles(now);
  showExits(history, facts);
  if (now.adaptation && !charts.some((chart) => chart.isDrift)) addDisagreement();
  charts.forEach((chart) => chart.show(history));
  // What says the same stays, and so does what has the focus: it would be lost with a table that is replaced.
  for (const [id, show] of [["drift", showDrift], ["bundle", showBundle]]) {
    const made = el("div", {}, ...show(now, facts));
    if (made.textContent !== $(id).textContent && !$(id).contains(document.activeElement)) $(id).replaceChildren(...made.childNodes);
  }
}

function askToken(error = "") {
  $("ask-token").hidden = false;
  $("content").hidden = true;
  $("token-error").textContent = error;
  setState("", "Token needed");
  $("token").focus();
}

async function start() {
  await follow({ about: onAbout, now: onNow, lost: (why) => setState("bad", `Connection lost: ${why}`), unauthorized: () => undefined });
  const wrong = token.known;
  token.forget();
  askToken(wrong ? "This is not the server’s token." : "");
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set($("token").value);
  $("token").value = "";
  $("ask-token").hidden = true;
  setState("", "Connecting");
  start();
});

// Inputs

async function send(make) {
  const answer = $("answer");
  answer.setAttribute("aria-busy", "true");
  try {
    const tensor = await make();
    const { body: content, headers } = body(tensor, facts);
    const response = await fetch(address("page/compare"), { method: "POST", body: content, headers: { ...headers, ...token.headers() } });
    if (!response.ok) throw new Error(await whyNot(response));
    answer.replaceChildren(...showAnswer(await response.json(), tensor, facts, tensor.sound ? sound : null));
  } catch (error) {
    answer.replaceChildren(el("p", { className: "error" }, error.name === "TypeError" ? "The server does not answer." : error.message));
  } finally {
    answer.removeAttribute("aria-busy");
  }
}

let chosen = null; // the last file: to be sent again when the box is ticked

function sendFile(file) {
  chosen = file;
  if (sound) URL.revokeObjectURL(sound);
  sound = URL.createObjectURL(file);
  return send(() => fromFile(file, facts, { invert: $("invert").checked && !$("invert-row").hidden }));
}

$("file").addEventListener("change", () => { if ($("file").files.length) sendFile($("file").files[0]); });
$("invert").addEventListener("change", () => { if (chosen) sendFile(chosen); });
$("random").addEventListener("click", () => send(() => random(facts)));
$("numbers-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send(() => fromNumbers($("numbers").value, facts));
});
for (const kind of ["dragover", "drop", "dragleave"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) sendFile(event.dataTransfer.files[0]);
  });
}

start();
