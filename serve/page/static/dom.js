// Elements and numbers as text. Nothing is ever parsed as HTML.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list" && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function row(header, ...cells) {
  const made = el("tr", {}, el("th", { scope: "row" }, header));
  for (const cell of cells) made.append(cell instanceof HTMLTableCellElement ? cell : el("td", {}, cell));
  return made;
}

export const number = (text) => el("td", { className: "number" }, text);

// Names are a bundle's or a user's, of any length.
export const cut = (text, most = 80) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export const count = (n) => n.toLocaleString("en");

export function share(x) {
  if (x === null || Number.isNaN(x)) return "–";
  const hundred = 100 * x;
  if (x > 0 && hundred < 0.01) return "< 0.01 %";
  if (x < 1 && hundred >= 99.95) return "> 99.9 %";
  return `${hundred < 10 ? Number(hundred.toPrecision(2)) : Number(hundred.toFixed(1))} %`;
}

// A promise, as it was chosen: 0.05 is 5 %.
export const percent = (x) => `${Number((100 * x).toPrecision(3))} %`;

export function milliseconds(seconds) {
  if (seconds === null) return "–";
  if (seconds >= 1) return `${Number(seconds.toPrecision(3))} s`;
  const ms = 1000 * seconds;
  return `${ms >= 100 ? ms.toFixed(0) : Number(ms.toPrecision(2))} ms`;
}

export const rate = (x) => (x === null ? "–" : x >= 100 ? count(Math.round(x)) : Number(x.toFixed(x >= 10 ? 1 : 2)));
