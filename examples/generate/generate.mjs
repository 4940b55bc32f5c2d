// A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
//
//     pastkey export checkpoint --out bundle --generate
//     npm install onnxruntime-node
//
//     import * as ort from "onnxruntime-node"; // in a browser onnxruntime-web
//     import { generate } from "./generate.mjs";
//     const session = await ort.InferenceSession.create("bundle/onnx/generate.onnx"); // its weights are next to it
//     const ids = await generate(ort, session, [1, 2, 3], { temperature: 0.8, seed: 7 });
//
// onnxruntime-web takes files as bytes: (await read("generate.onnx"), { externalData: [{ path, data }] }) with the name
// and the bytes of the weights, as in tests/programs/generate_example.mjs.

/** The new ids behind those of `prompt`. A seed is a number, or a BigInt of up to 2n ** 63n - 1n. */
export async function generate(ort, session, prompt, settings = {}) {
  const { ids } = await session.run(inputs(ort, prompt, settings));
  return Array.from(ids.data, Number);
}

/** The same ids, as they come: `chunk` of them a call of generate_step.onnx, which gives the next call its cache. */
export async function* stream(ort, session, prompt, settings = {}, chunk = 1) {
  if (!(chunk >= 1)) throw new RangeError(`chunk is ${chunk}; a whole number from 1 was expected`);
  const { maxNewTokens = 64, endIds = [] } = settings;
  const { type, shape } = session.inputMetadata.find(({ name }) => name === "cache"); // float16 of such a bundle
  const empty = new ort.Tensor(
    type,
    type === "float16" ? new Uint16Array() : [],
    shape.map((size) => Number(size) || 0),
  );
  let held = { cache: empty, history: integers(ort, []) };
  let last = null;
  for (let left = maxNewTokens; left > 0 && !endIds.map(BigInt).includes(last); left -= chunk) {
    const call = inputs(ort, prompt, { ...settings, maxNewTokens: Math.min(chunk, left) });
    const { ids, cache_out: cache, history_out: history } = await session.run({ ...call, ...held });
    yield* Array.from(ids.data, Number);
    if (!ids.data.length) return; // the context is full
    last = ids.data.at(-1);
    [held, prompt] = [{ cache, history }, [last]];
  }
}

const DEFAULTS = {
  maxNewTokens: 64,
  endIds: [],
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  seed: 0,
};

/** The inputs of a call: a graph requires them all. As they are given here, settings change nothing. */
function inputs(ort, prompt, settings) {
  for (const name of Object.keys(settings))
    if (!(name in DEFAULTS)) throw new RangeError(`no setting ${name}; there are ${Object.keys(DEFAULTS).join(", ")}`);
  const given = { ...DEFAULTS, ...settings };
  const number = (value) => new ort.Tensor("float32", [value], [1]);
  return {
    input_ids: integers(ort, prompt, [1, prompt.length]),
    max_new_tokens: integers(ort, [given.maxNewTokens]),
    end_ids: integers(ort, given.endIds),
    temperature: number(given.temperature),
    top_k: integers(ort, [given.topK]),
    top_p: number(given.topP),
    min_p: number(given.minP),
    repetition_penalty: number(given.repetitionPenalty),
    seed: integers(ort, [given.seed]),
  };
}

/** Whole numbers; a BigInt64Array would take the lower 64 bits of larger ones. */
function integers(ort, values, sizes = [values.length]) {
  const whole = Array.from(values, (value) => BigInt(value));
  const wrong = whole.find((value) => BigInt.asIntN(64, value) !== value);
  if (wrong !== undefined) throw new RangeError(`${wrong} is no whole number of 64 bits`);
  return new ort.Tensor("int64", BigInt64Array.from(whole), sizes);
}
