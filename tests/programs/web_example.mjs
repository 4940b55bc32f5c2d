// Greedy continuations by examples/web/ in Node: BUNDLE NEW_TOKENS [[ids]...] -> a line of JSON for each prompt.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";
import { greedy, open } from "./greedy.mjs";

const [bundle, newTokens, prompts] = process.argv.slice(2);
const decoder = await open(ort, (name) => readFile(join(bundle, name)));
for (const prompt of JSON.parse(prompts)) {
  const ids = [];
  for await (const id of greedy(decoder, prompt, Number(newTokens))) ids.push(id);
  console.log(JSON.stringify({ prompt_ids: prompt, ids }));
}
process.exit(); // its worker threads would keep the process alive
