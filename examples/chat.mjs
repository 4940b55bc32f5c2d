// A chat in Node with a bundle, by transformers.js: each line of standard input is a question.
//   npm install @huggingface/transformers && node chat.mjs bundle
import { basename, dirname, resolve } from "node:path";
import { createInterface } from "node:readline";
import { env, pipeline, TextStreamer } from "@huggingface/transformers";

const [bundle, max_new_tokens] = [resolve(process.argv[2]), Number(process.argv[3] ?? 256)];
Object.assign(env, { allowRemoteModels: false, localModelPath: dirname(bundle) });
const generate = await pipeline("text-generation", basename(bundle));
const streamer = new TextStreamer(generate.tokenizer, { skip_prompt: true, skip_special_tokens: true });
let messages = [];
for await (const content of createInterface({ input: process.stdin })) {
  const asked = [...messages, { role: "user", content }];
  [{ generated_text: messages }] = await generate(asked, { max_new_tokens, streamer });
}
