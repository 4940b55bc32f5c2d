// Greedy continuations by transformers.js in Node: BUNDLE NEW_TOKENS PROMPT... -> a line of JSON for each prompt.
import { basename, dirname } from "node:path";
// @ts-ignore: beside the copy of this file that runs
import * as transformers from "@huggingface/transformers";
import { greedy } from "./greedy.mjs";

const [bundle, newTokens, ...prompts] = process.argv.slice(2);
const answers = await greedy(transformers, dirname(bundle), basename(bundle), Number(newTokens), prompts);
for (const answer of answers) console.log(JSON.stringify(answer));
