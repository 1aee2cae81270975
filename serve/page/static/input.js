// From what a person has (a picture, a sound, an array, numbers) to a tensor of the network's input, as it is sent.

const MOST_BYTES = 64 * 2 ** 20;
const ARRAYS = { UINT8: Uint8Array, INT32: Int32Array, FP32: Float32Array };
const NUMPY = { "|u1": Uint8Array, "|i1": Int8Array, "<i2": Int16Array, "<u2": Uint16Array, "<i4": Int32Array, "<u4": Uint32Array, "<i8": BigInt64Array, "<f4": Float32Array, "<f8": Float64Array, "|b1": Uint8Array };

const size = (shape) => shape.reduce((product, n) => product * n, 1);
export const isPicture = ({ input_shape: shape, datatypes }) => shape.length === 3 && (shape[2] === 1 || shape[2] === 3) && datatypes.includes("UINT8");
export const isSignal = ({ input_shape: shape, datatypes }) => datatypes.includes("FP32") && size(shape) === Math.max(...shape);

export function expects(facts) {
  const kinds = [...(isPicture(facts) ? ["a picture"] : []), ...(isSignal(facts) ? ["a sound (.wav)"] : []), "an array of NumPy (.npy)"];
  const values = facts.datatypes.includes("UINT8") ? `whole numbers from 0 to ${facts.levels}` : facts.datatypes[0] === "FP32" ? "numbers as the network takes them" : "whole numbers";
  return `The network takes ${facts.input_shape.join(" × ")}: ${values}. Give it ${kinds.join(", ")}, or numbers.`;
}

// A tensor: its datatype, shape (without the number of inputs), values; `note` says what was done to the file.
export async function fromFile(file, facts, options) {
  if (file.size > MOST_BYTES) throw new Error(`file: expected at most ${MOST_BYTES} bytes, got ${file.size}`);
  if (/\.npy$/i.test(file.name)) return fromNumpy(await file.arrayBuffer(), facts);
  if (/\.wav$/i.test(file.name)) return fromSound(await file.arrayBuffer(), facts);
  if (isPicture(facts) && file.type.startsWith("image/")) return fromPicture(file, facts, options);
  throw new Error(`file: ${expects(facts)} Got ${file.name}`);
}

export function fromNumbers(text, facts) {
  const values = text.split(/[\s,;[\]]+/).filter(Boolean).map(Number);
  if (!values.length || values.some(Number.isNaN)) throw new Error("numbers: expected numbers divided by spaces or commas");
  return shaped(values, null, facts);
}

export function random(facts) {
  const whole = facts.datatypes[0] !== "FP32";
  const most = facts.datatypes[0] === "UINT8" ? facts.levels : 1;
  const values = Array.from({ length: size(facts.input_shape) }, () => (whole ? Math.floor(Math.random() * (most + 1)) : 2 * Math.random() - 1));
  return { ...shaped(values, null, facts), note: "random numbers" };
}

// The body of a request, and its headers.
export function body({ datatype, shape, values }, facts) {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const input = { name: facts.input_name, datatype, shape: [1, ...shape], parameters: { binary_data_size: bytes.length } };
  const head = new TextEncoder().encode(JSON.stringify({ inputs: [input] }));
  return { body: new Blob([head, bytes]), headers: { "inference-header-content-length": String(head.length), "content-type": "application/octet-stream" } };
}

// As the network's shape where the numbers are as many; else as they are, which the server refuses with its own words.
function shaped(values, shape, facts) {
  const whole = values.every(Number.isInteger);
  const datatype = facts.datatypes.find((kind) => kind === "FP32" || whole) ?? facts.datatypes[0];
  const fits = values.length === size(facts.input_shape);
  if (datatype === "UINT8" && values.some((value) => value < 0 || value > 255)) throw new Error("numbers: expected 0 to 255, got others");
  return { datatype, shape: fits ? facts.input_shape : shape ?? [values.length], values: ARRAYS[datatype].from(values) };
}

function fromNumpy(buffer, facts) {
  const start = new Uint8Array(buffer, 0, Math.min(12, buffer.byteLength));
  if (String.fromCharCode(...start.slice(1, 6)) !== "NUMPY") throw new Error("file: expected an array of NumPy, got other bytes");
  const view = new DataView(buffer);
  const [length, begin] = start[6] === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, begin, length));
  const kind = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").map((part) => part.trim()).filter(Boolean).map(Number);
  if (!(kind in NUMPY)) throw new Error(`file: expected numbers of ${Object.keys(NUMPY).join(", ")}, got ${kind}`);
  if (/'fortran_order':\s*True/.test(header)) throw new Error("file: expected row-major order, got Fortran's (numpy.ascontiguousarray)");
  const values = Array.from(new NUMPY[kind](buffer.slice(begin + length, begin + length + size(shape) * NUMPY[kind].BYTES_PER_ELEMENT)), Number);
  const own = shape.length === facts.input_shape.length + 1 && shape[0] === 1 ? shape.slice(1) : shape;
  if (kind.includes("f") && facts.datatypes.includes("FP32")) return { datatype: "FP32", shape: own, values: Float32Array.from(values) };
  return shaped(values, own, facts);
}

// PCM of 8 to 32 bits or floats, the mean of all channels, from the beginning; silence behind it where it is too short.
function fromSound(buffer, facts) {
  const view = new DataView(buffer);
  const tag = (at) => String.fromCharCode(...new Uint8Array(buffer, at, 4));
  if (buffer.byteLength < 12 || tag(0) !== "RIFF" || tag(8) !== "WAVE") throw new Error("file: expected a sound in WAV form, got other bytes");
  let format = null;
  for (let at = 12; at + 8 <= buffer.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (tag(at) === "fmt ") format = { kind: view.getUint16(at + 8, true), channels: view.getUint16(at + 10, true), rate: view.getUint32(at + 12, true), bits: view.getUint16(at + 22, true) };
    if (tag(at) === "data" && format) {
      const bytes = format.bits / 8;
      const frames = Math.floor(Math.min(length, buffer.byteLength - at - 8) / bytes / format.channels);
      const wanted = size(facts.input_shape);
      const values = new Float32Array(wanted);
      for (let frame = 0; frame < Math.min(frames, wanted); frame += 1) {
        let total = 0;
        for (let channel = 0; channel < format.channels; channel += 1) total += sample(view, at + 8 + (frame * format.channels + channel) * bytes, format);
        values[frame] = total / format.channels;
      }
      const note = `the first ${Math.min(frames, wanted)} of ${frames} samples, at ${format.rate} a second as they are`;
      return { datatype: "FP32", shape: facts.input_shape, values, note, sound: true };
    }
    at += 8 + length + (length % 2);
  }
  throw new Error("file: expected a sound in WAV form, got no samples");
}

function sample(view, at, { kind, bits }) {
  if (kind === 3 && bits === 32) return view.getFloat32(at, true);
  if (bits === 8) return (view.getUint8(at) - 128) / 128;
  if (bits === 16) return view.getInt16(at, true) / 2 ** 15;
  if (bits === 24) return ((view.getUint8(at) | (view.getUint8(at + 1) << 8) | (view.getInt8(at + 2) << 16)) / 2 ** 23);
  if (bits === 32) return view.getInt32(at, true) / 2 ** 31;
  throw new Error(`file: expected samples of 8, 16, 24 or 32 bits, got ${bits}`);
}

async function fromPicture(file, facts, { invert }) {
  const [height, width, channels] = facts.input_shape;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`file: expected a picture that this browser can show, got ${file.name}`);
  }
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / picture.width, height / picture.height); // the middle, as much as fits
  context.fillStyle = "#fff"; // behind what is transparent
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
