/*
 * pastkey.js runs a pastkey bundle in a browser, on onnxruntime-web: docs/web.md documents it.
 *
 *   const model = await Model.load("bundle/", { onProgress: ({ done, total }) => ... });
 *   for await (const { text } of model.generate("Once upon a time", { maxNewTokens: 64 })) show(text);
 *
 * index -> files, each checked -> session -> prompt -> ids -> logits -> token -> text
 *
 * B is 1: one sequence. T new tokens, P cached tokens, S = P + T, K key/value heads, D head size, V vocabulary.
 */

const LIBRARIES = new URL("./lib/", import.meta.url); // onnxruntime-web, the tokenizer and Jinja
const CACHE = "pastkey-bundle";
const MOST_LOGITS = 2 ** 22; // numbers of a prefill's output: the graph returns the logits of every position
const MOST_CHUNK = 128; // tokens of a run
const MOST_THREADS = 8;
// On WebGPU, GroupQueryAttention may leave out keys where it takes several tokens, and single tokens are right. The
// smallest error that was seen; a limit above it cannot tell.
const MISSED_KEYS = 2e-2;

/**
 * What `pastkey web` writes into pastkey.json, and the two numbers that `describe` adds.
 *
 * @typedef {object} Index
 * @property {string} kind
 * @property {number} format_version
 * @property {string} source
 * @property {string} precision
 * @property {string} graph
 * @property {number} vocab_size
 * @property {number} context_length
 * @property {{ kv_heads: number, key_head_size: number, value_head_size: number }[]} layers
 * @property {{ size: number }[]} rows
 * @property {number[]} eos_token_ids
 * @property {Record<string, number>} sampling
 * @property {string | null} chat_template
 * @property {Record<string, string>} special_tokens
 * @property {{ ids: number[], ends: number[], limit: number }} golden
 * @property {string} graph_file
 * @property {string[]} weights
 * @property {string | null} tokenizer
 * @property {Record<string, IndexedFile>} files
 * @property {number} bytes to download in all
 * @property {number} missing of these, not yet in this browser
 */
/** @typedef {{ size: number, sha256: string }} IndexedFile */
/** @typedef {(progress: { done: number, total: number }) => void} OnProgress bytes */
/** @typedef {{ provider?: string, threads?: number, onProgress?: OnProgress, signal?: AbortSignal }} LoadOptions */

/**
 * @typedef {object} SamplingOptions
 * @property {number} [temperature]
 * @property {number} [topK]
 * @property {number} [topP]
 * @property {number} [minP]
 * @property {number} [repetitionPenalty]
 * @property {number | bigint} [seed]
 */
/** @typedef {{ maxNewTokens?: number, stop?: string[], endIds?: number[], signal?: AbortSignal }} EndOptions */
/** @typedef {SamplingOptions & EndOptions} GenerateOptions */
/** @typedef {"stop" | "length" | "context" | "cancelled"} FinishReason */

/**
 * What is used of onnxruntime-web, whose module is imported by its address.
 *
 * @typedef {{ type: string, data: any, dims: number[], dispose(): void }} Tensor
 * @typedef {{ run(inputs: Record<string, Tensor>): Promise<Record<string, Tensor>>, release(): Promise<void> }} Session
 */

/** The bundle, or what was asked of it, is not as expected. The message is one sentence for the user. */
export class BundleError extends Error {
  name = "BundleError";
}

// --- files --------------------------------------------------------------------------------------------------------

/**
 * Reads the index that `pastkey web` writes: `pastkey.json` in the folder `base`.
 * Returns it with `bytes` (to download in all) and `missing` (of these, not yet in this browser).
 *
 * @param {string | URL} base
 * @returns {Promise<Index>}
 */
export async function describe(base) {
  const response = await request(new URL("pastkey.json", folder(base)), { cache: "no-cache" });
  const index = await response.json().catch(() => null);
  if (index?.kind !== "web" || index.format_version !== 1)
    throw new BundleError(`${response.url} is of another version of pastkey.js: write it again with pastkey web`);
  const cache = await openCache();
  let [bytes, missing] = [0, 0];
  for (const [name, file] of Object.entries(index.files)) {
    bytes += file.size;
    if (!(await cache?.match(keyOf(base, name, file)))) missing += file.size;
  }
  return { ...index, bytes, missing };
}

/**
 * All files of the index, by name. Each has the size and sha256 of the index, or is refused.
 *
 * @param {string | URL} base
 * @param {Index} index
 * @param {OnProgress} [onProgress]
 * @param {AbortSignal} [signal]
 */
async function download(base, index, onProgress, signal) {
  const cache = await openCache();
  const wanted = new Set(Object.entries(index.files).map(([name, file]) => keyOf(base, name, file)));
  for (const { url } of (await cache?.keys()) ?? [])
    if (url.startsWith(folder(base)) && !wanted.has(url)) await cache.delete(url); // of an earlier bundle
  /** @type {Record<string, Uint8Array>} */
  const found = {};
  let done = 0;
  for (const [name, file] of Object.entries(index.files)) {
    const key = keyOf(base, name, file);
    const kept = await cache?.match(key);
    const response = kept ?? (await request(new URL(name, folder(base)), { cache: "no-cache", signal }));
    const bytes = await read(response, file.size, (more) => onProgress?.({ done: (done += more), total: index.bytes }));
    await verify(name, bytes, file).catch(async (error) => {
      await cache?.delete(key);
      throw error;
    });
    // A full disk costs the offline use and no more.
    if (cache && !kept) await cache.put(key, new Response(bytes)).catch(() => {});
    found[name] = bytes;
  }
  return found;
}

async function request(url, options) {
  const response = await fetch(url, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new BundleError(`${url} cannot be fetched (${error.message}): check the connection and the server`);
  });
  if (!response.ok) throw new BundleError(`${url} is not there (${response.status}): write it again with pastkey web`);
  return response;
}

async function read(response, size, onBytes) {
  const bytes = new Uint8Array(size);
  let length = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return length === size ? bytes : bytes.subarray(0, length);
    if (length + value.length <= size) bytes.set(value, length);
    length += value.length;
    if (length > size) return new Uint8Array(length); // longer than the index says, which `verify` refuses
    onBytes(value.length);
  }
}

async function verify(name, bytes, { size, sha256 }) {
  if (bytes.length !== size)
    throw new BundleError(`${name} is damaged: it has ${bytes.length} bytes, and ${size} were expected; copy it again`);
  if (!globalThis.crypto?.subtle) return; // there only with HTTPS or on localhost: see `environment`
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const [is, expected] = [found, sha256].map((digits) => `${digits.slice(0, 12)}…`);
  if (found !== sha256)
    throw new BundleError(`${name} is damaged: its sha256 is ${is}, and ${expected} was expected; copy it again`);
}

const folder = (base) => new URL(`${base}`.replace(/\/?$/, "/"), globalThis.document?.baseURI ?? import.meta.url).href;
const keyOf = (base, name, { sha256 }) => `${new URL(name, folder(base))}?${sha256}`;
const openCache = async () => globalThis.caches?.open(CACHE).catch(() => undefined);

// --- the browser --------------------------------------------------------------------------------------------------

/**
 * What this browser offers a bundle: `threads` on the CPU and `whyOneThread`, `gpu` (whether WebGPU can be tried) and
 * `whyNoGpu`, `secure` (whether files are checked by sha256, and kept for offline use).
 */
export async function environment(index) {
  const isolated = globalThis.crossOriginIsolated === true;
  const cores = globalThis.navigator?.hardwareConcurrency ?? 1;
  const whyNoGpu = await withoutGpu(index);
  return {
    threads: isolated ? Math.min(cores, MOST_THREADS) : 1,
    whyOneThread: isolated ? "" : "the page is not cross-origin isolated",
    gpu: !whyNoGpu,
    whyNoGpu,
    secure: Boolean(globalThis.isSecureContext && globalThis.crypto?.subtle),
  };
}

async function withoutGpu(index) {
  /** @type {{ requestAdapter(): Promise<{ features: Set<string> } | null> } | undefined} */
  const gpu = globalThis.navigator?.["gpu"];
  if (!gpu) return "this browser has no WebGPU";
  const adapter = await gpu.requestAdapter().catch(() => null);
  if (!adapter) return "WebGPU finds no graphics adapter";
  const float16 = index.precision !== "fp16" || adapter.features.has("shader-f16");
  return float16 ? "" : "the graphics adapter has no float16 (shader-f16)";
}

// --- the model ----------------------------------------------------------------------------------------------------

const library = (name) => import(new URL(name, LIBRARIES).href);

/** A bundle with its tokenizer, its session and the KV cache of one sequence. One call at a time. */
export class Model {
  /**
   * Loads a bundle. Throws BundleError for a file that is missing or damaged, and for a bundle that does not run here.
   *
   * `base`: the address of the folder with `pastkey.json`. `provider`: "wasm" or "webgpu". `threads`: of the CPU; by
   * default as `environment` says. `onProgress({ done, total })`: bytes. `signal`: an AbortSignal for the download.
   *
   * On "webgpu" the model computes the golden logits first. If only a prefill is wrong there, prompts are read token by
   * token (`model.oneByOne`). If more is, or the session fails, the model runs on "wasm": `model.fallback` says why.
   *
   * @param {string | URL} base
   * @param {LoadOptions} options
   */
  static async load(base, { provider = "wasm", threads, onProgress, signal } = {}) {
    const index = await describe(base);
    const here = await environment(index);
    const files = await download(base, index, onProgress, signal);
    let fallback = provider === "webgpu" ? here.whyNoGpu : "";
    if (provider === "webgpu" && !fallback) {
      try {
        const model = await Model.#open(index, files, "webgpu", here.threads);
        const fused = index.graph === "fused";
        model.oneByOne = fused && index.golden.limit > MISSED_KEYS;
        let result = await model.check();
        if (!result.ok && fused && !model.oneByOne) {
          model.oneByOne = true;
          result = await model.check();
        }
        const { ok, difference, limit } = result;
        if (ok) return model;
        const off = `off by ${difference.toExponential(1)} of the largest, limit ${limit}`;
        fallback = `its logits are wrong on this graphics adapter (${off})`;
        await model.dispose();
      } catch (error) {
        fallback = `the session fails there: ${error.message ?? error}`;
      }
    }
    const model = await Model.#open(index, files, "wasm", threads ?? here.threads);
    model.fallback = fallback;
    return model;
  }

  static async #open(index, files, provider, threads) {
    const [ort, { Tokenizer }, { Template }] = await Promise.all([
      library(provider === "wasm" ? "ort.wasm.min.mjs" : "ort.webgpu.min.mjs"),
      library("tokenizers.min.mjs"),
      library("jinja.js"),
    ]);
    ort.env.wasm.wasmPaths = LIBRARIES.href;
    ort.env.wasm.numThreads = threads;
    const model = new Model();
    Object.assign(model, { index, provider, threads });
    const externalData = index.weights.map((name) => ({ path: name.replace(/^.*\//, ""), data: files[name] }));
    const options = { executionProviders: [provider], externalData };
    // WebAssembly's MatMulNBits dequantizes its weights in every run. This dequantizes those of --target portable once.
    if (provider === "wasm") options.extra = { session: { disable_quant_qdq: "1" } };
    if (provider === "webgpu") {
      // The cache stays on the device; logits come back.
      const places = Object.keys(cacheSizes(index)).map((past) => [presentOf(past), "gpu-buffer"]);
      options.preferredOutputLocation = Object.fromEntries([["logits", "cpu"], ...places]);
    }
    model.#ort = ort;
    model.#session = await ort.InferenceSession.create(files[index.graph_file], options);
    const json = (name) => JSON.parse(new TextDecoder().decode(files[name]));
    model.#tokenizer = index.tokenizer ? new Tokenizer(json(index.tokenizer), {}) : null;
    model.#template = index.chat_template ? new Template(index.chat_template) : null;
    model.#golden = files["golden.f32"];
    model.reset();
    return model;
  }

  /** @type {Index} */
  index;
  /** @type {"wasm" | "webgpu"} */
  provider;
  /** @type {number} */
  threads;
  fallback = ""; // why it is not the provider that was asked for
  oneByOne = false; // whether prompts are read token by token

  #ort;
  /** @type {Session} */
  #session;
  #tokenizer;
  #template;
  #golden; // logits (N, V) float32, after each length of index.golden.ends
  /** @type {Record<string, Tensor>} */
  #cache = {}; // by the name of a past input
  /** @type {number[]} */
  #ids = []; // the tokens that the cache holds

  get hasTokenizer() {
    return this.#tokenizer !== null;
  }

  get hasChat() {
    return this.#template !== null;
  }

  /** The token ids of a text, with the BOS token where the tokenizer adds one. */
  encode(text, { addSpecialTokens = true } = {}) {
    if (!this.#tokenizer) throw new BundleError("the bundle has no tokenizer: give a list of token ids");
    return this.#tokenizer.encode(text, { add_special_tokens: addSpecialTokens }).ids;
  }

  /** The text of token ids, without special tokens. */
  decode(ids) {
    const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
    return ids.length ? this.#tokenizer.decode(ids, options) : "";
  }

  /** The token ids of a conversation, `[{ role, content }, ...]`, up to the start of the next answer. */
  encodeChat(messages, variables = {}) {
    if (!this.#template) throw new BundleError("the bundle has no chat template: give a text to continue");
    const values = { add_generation_prompt: true, ...this.index.special_tokens, ...variables, messages };
    let text;
    try {
      text = this.#template.render(values);
    } catch (error) {
      throw new BundleError(`the chat template does not accept this conversation: ${error.message}`);
    }
    return this.encode(text, { addSpecialTokens: false });
  }

  /**
   * Continues a prompt: a text, or a list of token ids. Yields `{ id, text }` for each new token; `text` is whole
   * characters, and "" until there is one. The generator's return value is `{ ids, finishReason }`: the new ids and
   * "stop", "length", "context" or "cancelled".
   *
   * A prompt that begins with the tokens of the last call reuses their keys and values.
   *
   * Options, as well as those of Sampler: `maxNewTokens` (64), `stop` (a list of texts, before which the text ends),
   * `endIds` (the bundle's), `signal` (an AbortSignal, heeded after each run).
   *
   * @param {string | number[]} prompt
   * @param {GenerateOptions} options
   * @returns {AsyncGenerator<{ id: number | null, text: string }, { ids: number[], finishReason: FinishReason }>}
   */
  async *generate(prompt, { maxNewTokens = 64, stop = [], endIds, signal, ...sampling } = {}) {
    const ends = endIds ?? this.index.eos_token_ids;
    const ids = typeof prompt === "string" ? this.encode(prompt) : [...prompt];
    this.#requireIds(ids);
    const sampler = new Sampler(sampling);
    const text = new TextStream((some) => (this.#tokenizer ? this.decode(some) : ""), ids, stop);
    /** @type {{ ids: number[], finishReason: FinishReason }} */
    const result = { ids: [], finishReason: "length" };
    while (result.ids.length < maxNewTokens) {
      if (ids.length > this.index.context_length) result.finishReason = "context";
      const logits = result.finishReason === "context" ? null : await this.logits(ids, signal);
      if (signal?.aborted) result.finishReason = "cancelled";
      if (!logits || signal?.aborted) break;
      const id = sampler.sample(logits, ids);
      if (ends.includes(id)) {
        result.finishReason = "stop";
        break;
      }
      ids.push(id);
      result.ids.push(id);
      yield { id, text: text.push(id) };
      if (text.stopped) {
        result.finishReason = "stop";
        break;
      }
    }
    const rest = text.flush();
    if (rest) yield { id: null, text: rest };
    return result;
  }

  /**
   * The logits (V,) after token ids, Float32Array: prefill of what the cache lacks, in chunks. Null where `signal`
   * aborted before the last chunk.
   *
   * @param {number[]} ids
   * @param {AbortSignal} [signal]
   * @returns {Promise<Float32Array | null>}
   */
  async logits(ids, signal) {
    this.#requireIds(ids);
    let common = 0;
    while (common < Math.min(this.#ids.length, ids.length - 1) && ids[common] === this.#ids[common]) common++;
    if (common < this.#ids.length) this.#trim(common);
    let last = null;
    const most = this.oneByOne ? 1 : MOST_CHUNK;
    const chunk = Math.max(1, Math.min(most, Math.floor(MOST_LOGITS / this.index.vocab_size)));
    while (this.#ids.length < ids.length) {
      if (signal?.aborted) return null;
      last = await this.#run(ids.slice(this.#ids.length, this.#ids.length + chunk));
      await eventLoop(); // so that a message, such as stop, arrives
    }
    return last;
  }

  /** Runs new tokens (T) behind the cache, and returns the last one's logits (V,). */
  async #run(tokens) {
    const [ort, past, end] = [this.#ort, this.#ids.length, this.#ids.length + tokens.length];
    const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const result = await this.#session.run({
      input_ids: int64(tokens),
      attention_mask: int64(Array(end).fill(1)),
      position_ids: int64(tokens.map((_, i) => past + i)),
      ...this.#cache,
    });
    for (const name of Object.keys(this.#cache)) {
      this.#cache[name].dispose();
      this.#cache[name] = result[presentOf(name)];
    }
    this.#ids.push(...tokens);
    const logits = result.logits.data.slice(-this.index.vocab_size);
    result.logits.dispose();
    return logits;
  }

  /** Empties the KV cache. */
  reset() {
    const [type, Numbers] = this.index.precision === "fp16" ? ["float16", Uint16Array] : ["float32", Float32Array];
    for (const [name, sizes] of Object.entries(cacheSizes(this.index))) {
      this.#cache[name]?.dispose();
      this.#cache[name] = new this.#ort.Tensor(type, new Numbers(0), sizes);
    }
    this.#ids = [];
  }

  /** Keeps the first `length` tokens of the cache, where it is in CPU memory; else none. */
  #trim(length) {
    if (!length || this.provider !== "wasm" || this.index.rows.length) return this.reset();
    for (const [name, tensor] of Object.entries(this.#cache)) {
      const [, heads, rows, size] = tensor.dims; // (1, K, P, D)
      const kept = new tensor.data.constructor(heads * length * size);
      for (let head = 0; head < heads; head++)
        kept.set(tensor.data.subarray(head * rows * size, (head * rows + length) * size), head * length * size);
      this.#cache[name] = new this.#ort.Tensor(tensor.type, kept, [1, heads, length, size]);
    }
    this.#ids.length = length;
  }

  /**
   * Compares the logits with the golden ones, of the export. Returns `{ ok, difference, limit, rows, of }`: max
   * |difference| over max |logit|, over `rows` of its `of` texts. On the CPU, and token by token, no text begins after
   * `seconds`.
   */
  async check({ seconds = 2 } = {}) {
    const { ids, ends, limit } = this.index.golden;
    const golden = new Float32Array(this.#golden.buffer, this.#golden.byteOffset, this.#golden.length / 4);
    const [size, start] = [this.index.vocab_size, performance.now()];
    const single = this.provider === "wasm" || this.oneByOne; // no bug of a prefill is looked for
    let [difference, rows] = [0, 0];
    for (const [row, end] of ends.entries()) {
      if (rows && single && performance.now() - start > seconds * 1000) break;
      const expected = golden.subarray(row * size, (row + 1) * size);
      this.reset();
      let found; // by a prefill, then single tokens: a device may compute either wrong
      for (let length = Math.max(1, end - 4); length <= end; length++) found = await this.logits(ids.slice(0, length));
      const off = apart(found, expected);
      difference = off <= difference ? difference : off; // NaN as well
      rows++;
    }
    this.reset();
    return { ok: difference <= limit, difference, limit, rows, of: ends.length };
  }

  /** Frees the session and the cache. */
  async dispose() {
    for (const tensor of Object.values(this.#cache)) tensor.dispose();
    await this.#session.release();
  }

  #requireIds(ids) {
    const [size, longest] = [this.index.vocab_size, this.index.context_length];
    const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= size);
    if (wrong !== undefined)
      throw new BundleError(`the prompt has the token id ${wrong}: ids are whole numbers from 0 to ${size - 1}`);
    if (!ids.length) throw new BundleError("the prompt is empty: give at least one word");
    if (ids.length > longest)
      throw new BundleError(`the prompt has ${ids.length} tokens, and the model's context ${longest}: shorten it`);
  }
}

const eventLoop = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel(); // setTimeout would wait for 4 ms
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });

/** The cache of no token: name of a past input -> its sizes. */
function cacheSizes({ layers, rows }) {
  const sizes = {};
  layers.forEach(({ kv_heads, key_head_size, value_head_size }, i) => {
    sizes[`past_key_values.${i}.key`] = [1, kv_heads, 0, key_head_size];
    sizes[`past_key_values.${i}.value`] = [1, kv_heads, 0, value_head_size];
  });
  rows.forEach(({ size }, i) => (sizes[`past_conv.${i}`] = [1, 0, size]));
  return sizes;
}

/** past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0 */
const presentOf = (past) => past.replace("past_key_values.", "present.").replace("past_", "present_");

function apart(found, expected) {
  let [off, most] = [0, 1e-12];
  for (let i = 0; i < expected.length; i++) {
    const distance = Math.abs(found[i] - expected[i]);
    if (!(distance <= off)) off = distance; // NaN stays
    most = Math.max(most, Math.abs(expected[i]));
  }
  return off / most;
}

// --- text ---------------------------------------------------------------------------------------------------------

/** The text of tokens as they come: whole characters, up to the first stop string. */
class TextStream {
  #decode;
  #ids; // the last tokens of which text was given, for the spaces between words, then those without text yet
  #given; // how many of #ids have been given
  #stops;
  #held = ""; // may be the beginning of a stop string
  stopped = false;

  constructor(decode, prompt, stops) {
    this.#decode = decode;
    this.#ids = prompt.slice(-8);
    this.#given = this.#ids.length;
    this.#stops = stops.filter(Boolean);
  }

  push(id) {
    this.#ids.push(id);
    const before = this.#decode(this.#ids.slice(0, this.#given)).replace(/\ufffd+$/, "");
    const text = this.#decode(this.#ids);
    if (text.endsWith("\ufffd") || text.length <= before.length) return ""; // a character in several tokens
    this.#ids = this.#ids.slice(this.#given);
    this.#given = this.#ids.length;
    return this.#cut(text.slice(before.length));
  }

  #cut(text) {
    const all = this.#held + text;
    const places = this.#stops.map((stop) => all.indexOf(stop)).filter((place) => place >= 0);
    this.stopped = places.length > 0;
    let end = this.stopped ? Math.min(...places) : all.length;
    if (!this.stopped)
      for (const stop of this.#stops)
        for (let length = Math.min(stop.length - 1, all.length); length > 0; length--)
          if (all.endsWith(stop.slice(0, length))) {
            end = Math.min(end, all.length - length);
            break;
          }
    this.#held = all.slice(end);
    return all.slice(0, end);
  }

  /** What was held back, at the end. */
  flush() {
    return this.stopped ? "" : this.#held;
  }
}

// --- sampling -----------------------------------------------------------------------------------------------------

/**
 * Samples tokens as pastkey's runtime does: the same logits, seed and place give the same token. docs/bundle-format.md
 * specifies the stages and the random stream, docs/output.md the settings.
 *
 * Options, with the defaults of greedy decoding: `temperature` (0), `topK` (0, all), `topP` (1), `minP` (0),
 * `repetitionPenalty` (1), `seed` (a new one): a whole number or a BigInt, 0 to 2**63 - 1.
 */
export class Sampler {
  /** @type {number} */
  temperature;
  /** @type {number} */
  topK;
  /** @type {number} */
  topP;
  /** @type {number} */
  minP;
  /** @type {number} */
  repetitionPenalty;
  /** @type {bigint} */
  seed;

  /** @param {SamplingOptions} options */
  constructor({ temperature = 0, topK = 0, topP = 1, minP = 0, repetitionPenalty = 1, seed, ...others } = {}) {
    const [unknown] = Object.keys(others);
    if (unknown) throw new BundleError(`there is no option ${unknown}`);
    require("temperature", temperature, temperature >= 0 && temperature < 2 ** 127, "a number from 0");
    require("topK", topK, Number.isInteger(topK) && topK >= 0, "a whole number from 0");
    require("topP", topP, topP > 0 && topP <= 1, "above 0 and at most 1");
    require("minP", minP, minP >= 0 && minP <= 1, "from 0 to 1");
    require("repetitionPenalty", repetitionPenalty, repetitionPenalty > 0 && repetitionPenalty < 2 ** 127, "above 0");
    const given = seed ?? freshSeed();
    this.seed = typeof given === "bigint" || Number.isSafeInteger(given) ? BigInt(given) : -1n;
    const whole = "a whole number from 0 to 2**63 - 1, above 2**53 as a BigInt,";
    require("seed", seed, this.seed >= 0n && this.seed < 2n ** 63n, whole);
    const [t, p, m, r] = [temperature, topP, minP, repetitionPenalty].map(Math.fround); // as the runtime and the graphs
    Object.assign(this, { temperature: t, topK, topP: p, minP: m, repetitionPenalty: r });
  }

  /** The next token's id: `logits` (V,) stay unchanged, `ids` are all tokens so far, prompt included. */
  sample(logits, ids) {
    const scores = Float64Array.from(logits);
    const penalty = this.repetitionPenalty;
    if (penalty !== 1)
      for (const id of new Set(ids)) scores[id] = scores[id] > 0 ? scores[id] / penalty : scores[id] * penalty;
    let best = 0;
    for (let i = 1; i < scores.length; i++) if (scores[i] > scores[best]) best = i;
    if (!this.temperature) return best;
    const most = scores[best];
    for (let i = 0; i < scores.length; i++) scores[i] = (scores[i] - most) / this.temperature;
    if (this.topK && this.topK < scores.length) dropBelow(scores, scores.slice().sort().at(-this.topK));
    if (this.topP < 1) keepTopP(scores, this.topP);
    if (this.minP) dropBelow(scores, Math.log(this.minP));
    return draw(scores, uniform(this.seed, ids.length));
  }
}

function require(name, value, valid, expected) {
  if (!valid) throw new BundleError(`${name} is ${value}: ${expected} is expected`);
}

function dropBelow(scores, least) {
  for (let i = 0; i < scores.length; i++) if (scores[i] < least) scores[i] = -Infinity;
}

/** Keeps the fewest most likely tokens that reach probability `p` together; of equal ones the first ids. */
function keepTopP(scores, p) {
  const weights = scores.map(Math.exp);
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const ascending = scores.slice().sort();
  let [sum, kept] = [0, 0];
  while (kept < scores.length && sum < p) sum += Math.exp(ascending.at(-++kept)) / total;
  const least = ascending.at(-kept);
  let equal = kept; // how many of those equal to the least stay
  for (const score of scores) if (score > least) equal--;
  for (let i = 0; i < scores.length; i++)
    if (scores[i] < least || (scores[i] === least && equal-- <= 0)) scores[i] = -Infinity;
}

/** The id that `u`, a number in [0, 1), draws from the probabilities of `scores` (V,), whose largest is 0. */
function draw(scores, u) {
  const sums = scores.map(Math.exp);
  for (let i = 1; i < sums.length; i++) sums[i] += sums[i - 1];
  const total = sums.at(-1);
  return sums.findIndex((sum) => sum / total > u);
}

/** The number in [0, 1), of 53 bits, for the token with `place` tokens before it: Threefry2x32, 20 rounds. */
export function uniform(seed, place) {
  const key = [Number(BigInt(seed) & 0xffffffffn), Number(BigInt(seed) >> 32n)];
  key.push((key[0] ^ key[1] ^ 0x1bd11bda) >>> 0);
  let [x, y] = [(place + key[0]) >>> 0, key[1]];
  for (let group = 0; group < 5; group++) {
    for (const turn of group % 2 ? [17, 29, 16, 24] : [13, 15, 26, 6]) {
      x = (x + y) >>> 0;
      y = (((y << turn) | (y >>> (32 - turn))) ^ x) >>> 0;
    }
    x = (x + key[(group + 1) % 3]) >>> 0;
    y = (y + key[(group + 2) % 3] + group + 1) >>> 0;
  }
  return ((x >>> 5) * 2 ** 26 + (y >>> 6)) * 2 ** -53;
}

const freshSeed = () => crypto.getRandomValues(new BigUint64Array(1))[0] >> 1n;
