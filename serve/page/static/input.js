// From what a person has (a picture, a sound, an array, numbers) to a tensor of the network's input, as it is sent.
//
// Of the datatypes that the network takes, its first one alone is made here: where that is pixels, numbers that are
// prepared already (FP32) look much like pixels that were saved as floats, and one of the two would be answered wrongly.

import { count, cut } from "./dom.js";

const MOST_BYTES = 64 * 2 ** 20; // of a picture or a sound, of which less is sent
const MOST_HEADER = 2 ** 16; // bytes of a .npy's, and its numbers have at most 8 each
const ARRAYS = { UINT8: Uint8Array, INT32: Int32Array, FP32: Float32Array };
const NUMPY = { "|u1": Uint8Array, "|i1": Int8Array, "<i2": Int16Array, "<u2": Uint16Array, "<i4": Int32Array, "<u4": Uint32Array, "<i8": BigInt64Array, "<u8": BigUint64Array, "<f4": Float32Array, "<f8": Float64Array, "|b1": Uint8Array };

const size = (shape) => shape.reduce((product, n) => product * n, 1);
const written = (shape) => shape.join(" × ") || "one number";
export const isPicture = ({ input_shape: shape, datatypes }) => datatypes[0] === "UINT8" && shape.length === 3 && (shape[2] === 1 || shape[2] === 3);
export const isSignal = ({ input_shape: shape, datatypes }) => datatypes[0] === "FP32" && size(shape) === Math.max(...shape);

const files = (facts) => [...(isPicture(facts) ? ["a picture"] : []), ...(isSignal(facts) ? ["a sound (.wav)"] : []), "an array of NumPy (.npy)"];
const numbers = (facts) => ({ UINT8: `whole numbers from 0 to ${facts.levels}`, INT32: "whole numbers of 32 bits" })[facts.datatypes[0]] ?? "finite numbers of 32 bits";

export const expects = (facts) => `The network takes ${written(facts.input_shape)}: ${numbers(facts)}. Give it ${files(facts).join(", ")}, or numbers.`;

// A tensor: its datatype, shape (without the number of inputs), values; `note` says what was done to the file.
export async function fromFile(file, facts, options) {
  try {
    if (/\.npy$/i.test(file.name)) return fromNumpy(await file.slice(0, MOST_HEADER + 8 * size(facts.input_shape)).arrayBuffer(), facts);
    const known = isPicture(facts) && file.type.startsWith("image/") ? fromPicture : isSignal(facts) && /\.wav$/i.test(file.name) ? fromSound : null;
    if (!known) throw new Error(`${cut(file.name)} cannot be read. ${expects(facts)}`);
    if (file.size > MOST_BYTES) throw new Error(`${cut(file.name)} is too large: expected at most ${MOST_BYTES / 2 ** 20} MiB, got ${count(Math.ceil(file.size / 2 ** 20))}.`);
    return await known(file, facts, options);
  } catch (error) {
    if (error instanceof RangeError) throw new Error(`${cut(file.name)} is damaged: it ends too early.`);
    throw error;
  }
}

export function fromNumbers(text, facts) {
  const words = text.split(/[\s,;[\]]+/).filter(Boolean);
  const wrong = words.find((word) => Number.isNaN(Number(word)));
  if (wrong !== undefined || !words.length) throw new Error(`Expected numbers divided by spaces or commas, got ${wrong === undefined ? "none" : cut(wrong)}.`);
  return shaped(words.map(Number), [words.length], facts);
}

export function random(facts) {
  const pixels = () => Math.floor(Math.random() * (facts.levels + 1));
  const draw = { UINT8: pixels, INT32: () => Math.floor(Math.random() * 2) }[facts.datatypes[0]] ?? (() => 2 * Math.random() - 1);
  return { ...shaped(Array.from({ length: size(facts.input_shape) }, draw), facts.input_shape, facts), note: "random numbers" };
}

// The body of a request, and its headers.
export function body({ datatype, shape, values }, facts) {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const input = { name: facts.input_name, datatype, shape: [1, ...shape], parameters: { binary_data_size: bytes.length } };
  const head = new TextEncoder().encode(JSON.stringify({ inputs: [input] }));
  if (head.length + bytes.length > facts.most_bytes) throw new Error(`The input is too large for the server: it takes ${count(facts.most_bytes)} bytes, and this is ${count(head.length + bytes.length)} (--max-body).`);
  return { body: new Blob([head, bytes]), headers: { "inference-header-content-length": String(head.length), "content-type": "application/octet-stream" } };
}

function isRight(value, facts) {
  if (facts.datatypes[0] === "FP32") return Number.isFinite(Math.fround(value));
  const [least, most] = facts.datatypes[0] === "UINT8" ? [0, facts.levels] : [-(2 ** 31), 2 ** 31 - 1];
  return Number.isInteger(value) && value >= least && value <= most;
}

// In one row, or in the network's shape, where sides of 1 may be left out; never in another order, which no number shows.
function checkShape(shape, facts) {
  const sides = (of) => of.filter((n) => n !== 1).join();
  const wanted = size(facts.input_shape);
  if (size(shape) !== wanted || (shape.length !== 1 && sides(shape) !== sides(facts.input_shape))) throw new Error(`The network takes ${written(facts.input_shape)} (${count(wanted)} numbers), and this is ${written(shape)}.`);
}

function shaped(values, shape, facts) {
  checkShape(shape, facts);
  const wrong = values.find((value) => !isRight(value, facts));
  if (wrong !== undefined) {
    const prepared = facts.datatypes.includes("FP32") && !Number.isInteger(wrong) ? " Numbers that are normalised already can be sent as FP32 by a program." : "";
    throw new Error(`The network takes ${numbers(facts)}, and this has ${wrong}.${prepared}`);
  }
  const [datatype] = facts.datatypes;
  const [least, most] = values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const note = datatype === "UINT8" ? `whole numbers from ${least} to ${most}, where white is ${facts.levels}` : `numbers from ${least} to ${most}`;
  return { datatype, shape: facts.input_shape, values: ARRAYS[datatype].from(values), note };
}

function fromNumpy(buffer, facts) {
  const view = new DataView(buffer);
  const magic = new Uint8Array(buffer).slice(0, 6);
  if (String.fromCharCode(...magic.slice(1)) !== "NUMPY") throw new Error("This is no array of NumPy, whatever its name says.");
  const [length, begin] = view.getUint8(6) === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, begin, length));
  const kind = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").map((part) => part.trim()).filter(Boolean).map(Number);
  if (!Object.hasOwn(NUMPY, kind ?? "")) throw new Error(`The array has numbers of the kind ${cut(kind ?? "?")}; this page reads ${Object.keys(NUMPY).join(", ")}.`);
  if (/'fortran_order':\s*True/.test(header)) throw new Error("The array is in Fortran’s order; numpy.ascontiguousarray gives the one that this page reads.");
  checkShape(shape, facts);
  const values = new NUMPY[kind](buffer.slice(begin + length, begin + length + size(shape) * NUMPY[kind].BYTES_PER_ELEMENT));
  if (values.length !== size(shape)) throw new RangeError();
  return shaped(Array.from(values, Number), shape, facts);
}

// PCM of 8 to 32 bits or floats, the mean of all channels, from the beginning; silence after it where it is too short.
async function fromSound(file, facts) {
  const view = new DataView(await file.arrayBuffer());
  const tag = (at) => String.fromCharCode(...new Uint8Array(view.buffer, at, 4));
  if (view.byteLength < 12 || tag(0) !== "RIFF" || tag(8) !== "WAVE") throw new Error("This is no sound in WAV form, whatever its name says.");
  let format = null;
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (tag(at) === "fmt ") format = { kind: view.getUint16(at + 8, true), channels: view.getUint16(at + 10, true), rate: view.getUint32(at + 12, true), bits: view.getUint16(at + 22, true) };
    if (tag(at) === "data" && format) return samples(view, at + 8, Math.min(length, view.byteLength - at - 8), format, facts);
    at += 8 + length + (length % 2);
  }
  throw new Error("The sound has no samples.");
}

function samples(view, begin, length, format, facts) {
  const wanted = size(facts.input_shape);
  const bytes = format.bits / 8;
  if (!format.channels || !(format.kind === 3 ? [32] : [8, 16, 24, 32]).includes(format.bits)) throw new Error(`The sound has ${format.channels} channels of ${format.bits} bits; this page reads 8, 16, 24 or 32 bits, and floats of 32.`);
  const frames = Math.floor(length / bytes / format.channels);
  const values = new Array(wanted).fill(0);
  for (let frame = 0; frame < Math.min(frames, wanted); frame += 1) {
    for (let channel = 0; channel < format.channels; channel += 1) values[frame] += sample(view, begin + (frame * format.channels + channel) * bytes, format) / format.channels;
  }
  const note = `the first ${Math.min(frames, wanted)} of ${frames} samples, at ${format.rate} a second as they are`;
  return { ...shaped(values, facts.input_shape, facts), note, sound: true };
}

function sample(view, at, { kind, bits }) {
  if (kind === 3) return view.getFloat32(at, true);
  if (bits === 8) return (view.getUint8(at) - 128) / 128;
  if (bits === 16) return view.getInt16(at, true) / 2 ** 15;
  if (bits === 24) return (view.getUint8(at) | (view.getUint8(at + 1) << 8) | (view.getInt8(at + 2) << 16)) / 2 ** 23;
  return view.getInt32(at, true) / 2 ** 31;
}

async function fromPicture(file, facts, { invert }) {
  const [height, width, channels] = facts.input_shape;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`This browser cannot show ${cut(file.name)} as a picture.`);
  }
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / picture.width, height / picture.height); // the middle, as much as fits
  context.fillStyle = "#fff"; // under what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, (width - scale * picture.width) / 2, (height - scale * picture.height) / 2, scale * picture.width, scale * picture.height);
  const seen = context.getImageData(0, 0, width, height);
  const values = new Uint8Array(height * width * channels);
  for (let i = 0; i < height * width; i += 1) {
    let [red, green, blue] = seen.data.slice(4 * i, 4 * i + 3);
    if (channels === 1) red = green = blue = 0.299 * red + 0.587 * green + 0.114 * blue;
    const pixel = [red, green, blue].map((value) => (invert ? 255 - value : value));
    pixel.forEach((value, channel) => { seen.data[4 * i + channel] = value; });
    for (let channel = 0; channel < channels; channel += 1) values[i * channels + channel] = Math.round((pixel[channel] * facts.levels) / 255);
  }
  context.putImageData(seen, 0, 0);
  const resized = picture.width === width && picture.height === height ? "" : ` of ${picture.width} × ${picture.height}, its middle scaled`;
  return { datatype: "UINT8", shape: facts.input_shape, values, canvas, note: `a picture${resized} to ${width} × ${height}` };
}
