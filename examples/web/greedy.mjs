// Greedy decoding of a pastkey bundle by plain onnxruntime-web: token ids in, token ids out. Text is the application's.

/**
 * Opens the all-logits graph of a bundle.
 * `ort`: onnxruntime-web. `read(name)`: the bytes of a file of the bundle. `providers`: which to choose from.
 */
export async function open(ort, read, providers = ["wasm"]) {
  const manifest = JSON.parse(new TextDecoder().decode(await read("pastkey.json")));
  // onnxruntime-web 1.30 on WebGPU reads too few keys in the fused graph's attention, and the text is another one.
  const provider = providers.find((name) => name === "wasm" || manifest.graph === "standard");
  const names = Object.keys(manifest.files);
  const graph = names.find((name) => /^onnx\/model.*\.onnx$/.test(name));
  const weights = names.filter((name) => name === `${graph}_data`); // none of a model so small that it holds its own
  const externalData = [];
  for (const name of weights) externalData.push({ path: name.replace("onnx/", ""), data: await read(name) });
  const options = { executionProviders: [provider], externalData };
  if (provider === "webgpu") {
    // The cache stays on the device; logits come back.
    options.preferredOutputLocation = { logits: "cpu" };
    for (const name of Object.keys(cacheSizes(manifest))) options.preferredOutputLocation[present(name)] = "gpu-buffer";
  }
  const session = await ort.InferenceSession.create(await read(graph), options);
  return { ort, session, manifest, provider };
}

/** The new ids, one after another, until one of the model's ends or `newTokens` of them. */
export async function* greedy({ ort, session, manifest }, prompt, newTokens) {
  if (!prompt.length || !prompt.every((id) => Number.isInteger(id) && 0 <= id && id < manifest.vocab_size))
    throw new RangeError(`the prompt is ${prompt}: give one token id or more, each from 0 to ${manifest.vocab_size - 1}`);
  if (prompt.length > manifest.context_length)
    throw new RangeError(`the prompt has ${prompt.length} tokens, and the model's context ${manifest.context_length}`);
  const ids = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const [type, Numbers] = manifest.precision === "fp16" ? ["float16", Uint16Array] : ["float32", Float32Array];
  const empty = ([name, sizes]) => [name, new ort.Tensor(type, new Numbers(0), sizes)];
  let cache = Object.fromEntries(Object.entries(cacheSizes(manifest)).map(empty));
  let [tokens, length] = [prompt, 0];
  const room = Math.min(newTokens, manifest.context_length - prompt.length + 1);
  try {
    for (let count = 0; count < room; count++) {
      const end = length + tokens.length;
      const result = await session.run({
        input_ids: ids(tokens),
        attention_mask: ids(Array(end).fill(1)),
        position_ids: ids(tokens.map((_, i) => length + i)),
        ...cache,
      });
      for (const tensor of Object.values(cache)) tensor.dispose();
      cache = Object.fromEntries(Object.keys(cache).map((name) => [name, result[present(name)]]));
      length = end;
      const last = result.logits.data.subarray(-manifest.vocab_size);
      const token = last.indexOf(last.reduce((a, b) => Math.max(a, b)));
      if (manifest.eos_token_ids.includes(token)) return;
      yield token;
      tokens = [token];
    }
  } finally {
    for (const tensor of Object.values(cache)) tensor.dispose();
  }
}

/** The cache of no token: name of a past input -> its sizes. */
function cacheSizes({ layers, states }) {
  const sizes = {};
  layers.forEach(({ kv_heads, key_head_size, value_head_size }, i) => {
    sizes[`past_key_values.${i}.key`] = [1, kv_heads, 0, key_head_size];
    sizes[`past_key_values.${i}.value`] = [1, kv_heads, 0, value_head_size];
  });
  states.forEach(({ size }, i) => (sizes[`past_conv.${i}`] = [1, 0, size]));
  return sizes;
}

/** past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0 */
const present = (name) => name.replace("past_key_values.", "present.").replace("past_", "present_");
