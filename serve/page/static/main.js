// The page: follows the server, and sends it inputs.

import { showAnswer } from "./answer.js";
import { Chart } from "./charts.js";
import { $, count, cut, el, milliseconds, rate, share } from "./dom.js";
import { adaptationState, estimated, promise, showBundle, showDrift } from "./drift.js";
import { showExits } from "./exits.js";
import { answered, depthOf, earlyOf, History, longest, per, percentile, refusals, refused, storedOf, waiting } from "./history.js";
import { body, expects, fromFile, fromNumbers, isPicture, isSignal, random } from "./input.js";
import { address, follow, isToken, token, whyNot } from "./stream.js";

const SHORT = 5; // seconds that a rate is of
const WINDOW = 10; // seconds that a percentile is of
const MINUTE = 60;
const UNAVAILABLE = "UNAVAILABLE";
let facts = null;
let history = new History();
let charts = [];
let sound = null;

function makeCharts() {
  charts.forEach((chart) => chart.stop());
  $("charts").replaceChildren();
  const line = (name, get, span, say) => ({ name, values: (seen) => seen.line(get, span), say, top: (seen) => longest(seen.latest) });
  const now = (name, get, say) => ({ name, values: (seen) => seen.values(get), say });
  const whole = (x) => (x === null ? "–" : Number.isInteger(x) ? count(x) : ""); // no marks between
  charts = [
    { title: "Throughput, a second", lines: [line("answered", per(answered), SHORT, rate), line("refused", per(refused), SHORT, rate)] },
    { title: "Latency, from arrival to answer", lines: [line("median", percentile(0.5), WINDOW, latency), line("99 %", percentile(0.99), WINDOW, latency)] },
    { title: "Depth: the share of the network that is run", most: 1, lines: [line("mean", depthOf(facts), WINDOW, share)] },
    { title: "Queue", lines: [now("images that wait", waiting, whole)] },
  ].map((chart) => new Chart($("charts"), chart));
}

function addDisagreement() {
  const promised = facts.plans.find(({ name }) => name === facts.default)?.epsilon ?? null;
  const of = (name, get) => ({ name, values: (seen) => seen.values(get), say: share });
  const lines = [of("estimated", (now) => estimated(now.adaptation)), of("at most", (now) => now.adaptation?.upper ?? null)];
  if (promised !== null) lines.push(of("promised", () => promised));
  charts.push(Object.assign(new Chart($("charts"), { title: "Disagreement with the whole network", lines, wide: true, cap: 1 }), { isDrift: true }));
}

// Above the histogram's largest bound, no more is known.
const latency = (seconds) => (seconds === Infinity ? `over ${milliseconds(longest(history.latest))}` : milliseconds(seconds));

function tile(name, value, more) {
  return el("div", {}, el("dt", {}, name), el("dd", { className: "value" }, value), el("dd", { className: "more" }, more));
}

function showTiles(now) {
  const total = refused(now);
  $("tiles").replaceChildren(
    tile("Answered a second", rate(history.between(per(answered), SHORT)), `${count(answered(now))} since the start`),
    tile("Median latency", latency(history.between(percentile(0.5), WINDOW)), `99 %: ${latency(history.between(percentile(0.99), WINDOW))}`),
    tile("Left at a cache", share(history.between(earlyOf(facts), MINUTE)), now.adaptation ? `last minute; stored answers: ${share(history.between(storedOf, MINUTE))}` : "last minute"),
    tile("Network run", share(history.between(depthOf(facts), MINUTE)), "mean depth, last minute"),
    tile("Waiting", count(waiting(now)), now.queue_age_seconds ? `since ${milliseconds(now.queue_age_seconds)}` : `${count(now.used)} of ${count(now.admitted)} places taken`),
    tile(Object.keys(now.models).length > 1 ? "Refused, of all models" : "Refused", count(total), total ? Object.entries(refusals(now)).map(([why, n]) => `${why} ${count(n)}`).join(", ") : "since the start"),
    tile("Failed steps", count(now.failed_steps), `of ${count(now.steps)}`),
    ...(now.adaptation ? [tile("Alarms", count(now.adaptation.events.alarm ?? 0), `${count(now.adaptation.events.trial ?? 0)} trials, version ${count(now.adaptation.version)}`)] : []),
  );
}

// One sentence on why the page does not show all; nothing where it does.
function setTrouble(...said) {
  const made = el("p", {}, ...said);
  if ($("trouble").textContent !== made.textContent) $("trouble").replaceChildren(...made.childNodes);
  $("trouble").hidden = !made.textContent;
}

function setState(kind, text) {
  if ($("state").textContent === text) return; // said once
  $("state").dataset.state = kind;
  $("state").textContent = text;
}

function showState(now) {
  const state = adaptationState(now);
  const lost = now.models[now.model] === UNAVAILABLE;
  if (now.reason === "unloaded") setTrouble(`Model ${cut(now.model)} was unloaded.`);
  else if (now.reason) setTrouble(lost ? `Model ${cut(now.model)} could not be loaded: ` : `A later bundle of model ${cut(now.model)} could not be loaded, and the one before it answers: `, now.reason);
  else setTrouble();
  if (now.stopping) setState("bad", "Stopping");
  else if (lost) setState("bad", "Not loaded");
  else if (!now.ready) setState("", "Warming up");
  else if (state && state[0] === "bad") setState("bad", state[1]);
  else setState("good", state && now.adaptation.state !== "open" ? `Ready. ${state[1]}` : "Ready");
}

function showModels({ model, models }) {
  if ($("model").textContent !== model) $("model").textContent = model;
  const names = Object.entries(models);
  $("models").hidden = names.length < 2;
  const links = names.map(([name, state]) => {
    const link = el("a", { href: `?model=${encodeURIComponent(name)}` }, state === UNAVAILABLE ? `${name} (not loaded)` : name);
    if (name === model) link.setAttribute("aria-current", "page");
    return link;
  });
  const same = links.map((link) => link.textContent).join() === [...$("models").children].map((link) => link.textContent).join();
  if (!same) $("models").replaceChildren(...links); // else the focus would be lost
}

function onAbout(told) {
  if (JSON.stringify(told) === JSON.stringify(facts)) return; // connected again
  facts = told;
  history = new History();
  document.title = `${facts.model} – GATI-JAX server`;
  $("expects").textContent = expects(facts);
  $("invert-row").hidden = !(isPicture(facts) && facts.input_shape[2] === 1);
  $("file").accept = [".npy", ...(isSignal(facts) ? [".wav"] : []), ...(isPicture(facts) ? ["image/*"] : [])].join();
  $("content").hidden = false;
  makeCharts();
}

function onNow(now) {
  showModels(now);
  showState(now);
  if (!facts) return; // the model is being loaded, or could not be
  history.add(now);
  const { text, broken } = promise(facts, now);
  if ($("promise").textContent !== text) $("promise").textContent = text;
  $("promise").classList.toggle("error", Boolean(broken));
  showTiles(now);
  showExits(history, facts);
  if (now.adaptation && !charts.some((chart) => chart.isDrift)) addDisagreement();
  charts.forEach((chart) => chart.show(history));
  // What says the same stays.
  for (const [id, show] of [["drift", showDrift], ["bundle", showBundle]]) {
    const made = el("div", {}, ...show(now, facts));
    if (made.textContent !== $(id).textContent) replace($(id), made);
  }
}

// A table that has the focus keeps it: its region stays, with new rows.
function replace(place, made) {
  const held = place.contains(document.activeElement) ? document.activeElement : null;
  const next = held && [...made.children].find((one) => one.ariaLabel && one.ariaLabel === held.ariaLabel);
  if (!next) return place.replaceChildren(...made.childNodes);
  const all = [...made.childNodes];
  if (held.textContent !== next.textContent) held.replaceChildren(...next.childNodes);
  [...place.childNodes].filter((one) => one !== held).forEach((one) => one.remove());
  held.before(...all.slice(0, all.indexOf(next)));
  held.after(...all.slice(all.indexOf(next) + 1));
}

function askToken(error = "") {
  $("ask-token").hidden = false;
  $("content").hidden = true;
  $("token-error").textContent = error;
  setState("", "Token needed");
  $("token").focus();
}

function onLost(why, status) {
  if (status === 429) {
    setState("", "Waiting for a place");
    setTrouble("As many people look at this server as may at once. The page goes on by itself as soon as one of them leaves.");
  } else if (status === 404) {
    setState("bad", "No such model");
    setTrouble("The server has no model of this name. ", el("a", { href: "./" }, "Show its first one"));
  } else setState("bad", `Connection lost: ${why}`);
}

async function start() {
  if (token.known) document.querySelectorAll("footer a").forEach((link) => link.replaceWith(`${link.textContent} (with the token)`)); // a link sends none
  await follow({ about: onAbout, now: onNow, lost: onLost });
  const wrong = token.known;
  token.forget();
  askToken(wrong ? "This is not the server’s token." : "");
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("token").value;
  $("token").value = "";
  if (!isToken(given)) return askToken("A token has letters of ASCII alone, without spaces: this is none.");
  token.set(given);
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
