// Server-sent events by fetch: an EventSource cannot send the token's header, and a token does not belong in an address.

const KEY = "gati-token";
const PAUSES = [1000, 2000, 5000, 10000]; // milliseconds before it is tried again
const SILENT = 10000; // milliseconds without an event after which the connection counts as lost

// A server's token has visible letters of ASCII alone, and fetch throws on a header with others.
export const isToken = (value) => /^[!-~]+$/.test(value);

export const token = {
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
  get known() { return sessionStorage.getItem(KEY) !== null; },
  headers() {
    const value = sessionStorage.getItem(KEY);
    return value === null ? {} : { authorization: `Bearer ${value}` };
  },
};

// An address of the server, about the model that this page is of.
export const address = (path) => path + location.search;

export async function whyNot(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Follow the server until it asks for a token, and then return: calls on[event](data), and on.lost(why, status), where
// the status is HTTP's, or 0 without an answer.
export async function follow(on) {
  for (let failures = 0; ; failures += 1) {
    let why = "it does not answer";
    let status = 0;
    const silence = new AbortController();
    let timer = setTimeout(() => silence.abort(), SILENT);
    try {
      const response = await fetch(address("page/stream"), { headers: token.headers(), signal: silence.signal, cache: "no-store" });
      if (response.status === 401) return;
      if (!response.ok) {
        status = response.status;
        throw new Error(await whyNot(response));
      }
      for await (const [event, data] of events(response.body)) {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENT);
        failures = 0;
        on[event]?.(JSON.parse(data));
      }
      why = "it has ended";
    } catch (error) {
      if (error.name !== "AbortError" && error.name !== "TypeError") why = error.message;
    } finally {
      clearTimeout(timer);
    }
    on.lost(why, status);
    await new Promise((resume) => setTimeout(resume, PAUSES[Math.min(failures, PAUSES.length - 1)]));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const field = (name) => lines.filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
      yield [field("event"), field("data")];
    }
  }
}
