// A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
//
//     pastkey export checkpoint --out bundle --generate
//     npm install onnxruntime-node
//
//     import * as ort from "onnxruntime-node"; // in a browser onnxruntime-web
//     import { generate } from "./generate.mjs";
//     const session = await ort.InferenceSession.create("bundle/onnx/generate.onnx"); // its weights lie beside it
//     const ids = await generate(ort, session, [1, 2, 3], { temperature: 0.8, seed: 7 });
//
// onnxruntime-web takes files as bytes: (await read("generate.onnx"), { externalData: [{ path, data }] }) with the name
// and the bytes of the weights, as in ../web/greedy.mjs.

/** The new ids behind those of `prompt`. A seed is a number, or a BigInt of up to 2n ** 63n - 1n. */
export async function generate(ort, session, prompt, settings = {}) {
  const { ids } = await session.run(inputs(ort, prompt, settings));
  return Array.from(ids.data, Number);
}

/**
 * The same ids, as they come: `chunk` of them a call of generate_step.onnx, which gives the next call its cache.
 * The settings have the context_length of pastkey.json in them, too: a text ends there.
 */
export async function* stream(ort, session, prompt, settings, chunk = 1) {
  const { maxNewTokens = 64, endIds = [], contextLength } = settings;
  if (!(prompt.length <= contextLength))
    throw new RangeError(`the prompt has ${prompt.length} tokens, and contextLength is ${contextLength}`);
  const sizes = session.inputMetadata.find(({ name }) => name === "cache").shape.map((size) => Number(size) || 0);
  let held = { cache: new ort.Tensor("float32", [], sizes), history: integers(ort, []) };
  let left = Math.min(maxNewTokens, contextLength + 1 - prompt.length);
  for (let last; left > 0 && !endIds.map(BigInt).includes(last); left -= chunk) {
    const call = inputs(ort, prompt, { ...settings, maxNewTokens: Math.min(chunk, left) });
    const { ids, cache_out: cache, history_out: history } = await session.run({ ...call, ...held });
    yield* Array.from(ids.data, Number);
    last = ids.data.at(-1);
    [held, prompt] = [{ cache, history }, [last]];
  }
}

/** The inputs of a call: a graph requires them all. As they are given here, settings change nothing. */
function inputs(ort, prompt, settings) {
  const { maxNewTokens = 64, endIds = [], temperature = 0, topK = 0, topP = 1, minP = 0 } = settings;
  const number = (value) => new ort.Tensor("float32", [value], [1]);
  return {
    input_ids: integers(ort, prompt, [1, prompt.length]),
    max_new_tokens: integers(ort, [maxNewTokens]),
    end_ids: integers(ort, endIds),
    temperature: number(temperature),
    top_k: integers(ort, [topK]),
    top_p: number(topP),
    min_p: number(minP),
    repetition_penalty: number(settings.repetitionPenalty ?? 1),
    seed: integers(ort, [settings.seed ?? 0]),
  };
}

const integers = (ort, values, sizes = [values.length]) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), sizes);
