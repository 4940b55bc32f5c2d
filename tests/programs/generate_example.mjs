// Generations by examples/generate/ in Node: PACKAGE GRAPH [[prompt, settings, chunk]...] -> a line of JSON for each
// call: {"ids": [...]} or {"error": "..."}. With a chunk they are streamed.
import { readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { readdirSync } from "node:fs";
import { generate, stream } from "./generate.mjs";

const [name, graph, calls] = process.argv.slice(2);
const ort = await import(name);
const session = name === "onnxruntime-web" ? await opened(graph) : await ort.InferenceSession.create(graph);
for (const [prompt, settings, chunk] of JSON.parse(calls)) {
  try {
    let ids = [];
    if (chunk) for await (const id of stream(ort, session, prompt, settings, chunk)) ids.push(id);
    else ids = await generate(ort, session, prompt, settings);
    console.log(JSON.stringify({ ids }));
  } catch (error) {
    console.log(JSON.stringify({ error: error.message }));
  }
}
process.exit(); // its worker threads would keep the process alive

async function opened(graph) {
  const externalData = [];
  for (const path of readdirSync(dirname(graph)).filter((path) => path.endsWith("_data")))
    externalData.push({ path, data: await readFile(join(dirname(graph), path)) });
  return ort.InferenceSession.create(await readFile(graph), { executionProviders: ["wasm"], externalData });
}
