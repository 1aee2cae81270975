// What was seen since the page was opened: counters become rates, a cumulative histogram becomes percentiles.

const KEPT = 301; // snapshots, one a second
const GAP = 10; // seconds between two of them after which nothing is known
const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);

const STORED = { exact: -1, nearest: -2 }; // exits of adaptation's input cache, as the protocol has them

// Images by exit, stored answers included.
export function leftOf({ left, adaptation }) {
  const stored = Object.entries(adaptation?.input_cache ?? {}).map(([layer, n]) => [STORED[layer], n]);
  return { ...left, ...Object.fromEntries(stored) };
}

// Refusals by reason, without those of health checks.
export const refusals = ({ refused: { not_ready: _, ...reasons } }) => reasons;

export const answered = (now) => sum(leftOf(now));
export const refused = (now) => sum(refusals(now));
export const longest = (now) => now.latency.le.at(-2); // the largest bound in seconds of the histogram
export const waiting = (now) => sum(now.queue_depth);

export class History {
  #kept = [];

  add(now, at = now.at) {
    const last = this.#kept.at(-1);
    // Counters that begin at 0: those of another process, or of a model that was loaded again.
    // After a gap, as of a tab that slept, "last minute" would be of longer.
    if (last && (now.started !== last.now.started || answered(now) < answered(last.now) || at - last.at > GAP)) this.#kept = [];
    this.#kept.push({ at, now });
    if (this.#kept.length > KEPT) this.#kept.shift();
  }

  get times() { return this.#kept.map(({ at }) => at); }

  get latest() { return this.#kept.at(-1).now; }

  // Apply `get(before, after, seconds)` to the snapshots `span` apart that end at index i; null where there is none.
  between(get, span, i = this.#kept.length - 1) {
    const after = this.#kept[i];
    const before = this.#kept[Math.max(0, i - span)];
    return after === undefined || before === after ? null : get(before.now, after.now, after.at - before.at);
  }

  line(get, span) { return this.#kept.map((_, i) => this.between(get, span, i)); }

  values(get) { return this.#kept.map(({ now }) => get(now)); }
}

export const per = (counter) => (before, after, seconds) => (counter(after) - counter(before)) / seconds;

// Images by exit between two snapshots, and how many there were.
export function exits(before, after) {
  const earlier = before ? leftOf(before) : {};
  const left = Object.fromEntries(Object.entries(leftOf(after)).map(([exit, n]) => [exit, n - (earlier[exit] ?? 0)]));
  return { left, total: sum(left) };
}

// The mean share of the network's blocks that was run.
export function depthOf(facts) {
  return (before, after) => {
    const { left, total } = exits(before, after);
    if (!total || !facts.depth) return null;
    return Object.entries(left).reduce((ran, [exit, n]) => ran + n * Math.max(0, Number(exit)), 0) / total / facts.depth;
  };
}

// The share that left at a cache of the network; stored answers did not come so far.
export function earlyOf(facts) {
  return shareOf((exit) => exit >= 0 && exit < facts.depth);
}

export const storedOf = shareOf((exit) => exit < 0);

function shareOf(counts) {
  return (before, after) => {
    const { left, total } = exits(before, after);
    return total ? sum(Object.entries(left).map(([exit, n]) => (counts(Number(exit)) ? n : 0))) / total : null;
  };
}

// A percentile in seconds, from the images that were answered between two snapshots; linear within a bucket, and infinite
// where it is above the largest bound.
export function percentile(q) {
  return (before, after) => {
    const { le, counts } = after.latency;
    const seen = counts.map((n, i) => n - (before.latency.counts[i] ?? 0));
    const rank = q * (seen.at(-1) ?? 0);
    if (!rank) return null;
    const i = seen.findIndex((n) => n >= rank);
    if (le[i] === null) return Infinity;
    const low = i ? le[i - 1] : 0;
    const below = i ? seen[i - 1] : 0;
    return low + ((le[i] - low) * (rank - below)) / (seen[i] - below);
  };
}
