// Greedy continuations by transformers.js, which Node and a page import each in its own way and hand over.

/** `place`: the folder, or the address, that holds the folder `bundle`. */
export async function greedy({ env, pipeline, TextStreamer }, place, bundle, newTokens, prompts) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true; // a browser's default is false
  env.localModelPath = place;
  const generate = await pipeline("text-generation", bundle);
  const answers = [];
  for (const prompt of prompts) {
    const steps = []; // the prompt's ids, then those of each step
    const streamer = new TextStreamer(generate.tokenizer, {
      callback_function: () => {},
      token_callback_function: (ids) => steps.push(ids.map(Number)),
    });
    const settings = { max_new_tokens: newTokens, do_sample: false, return_full_text: false, streamer };
    const [{ generated_text: text }] = await generate(prompt, settings);
    const [prompt_ids, ...ids] = steps;
    answers.push({ prompt_ids, ids: ids.flat(), text });
  }
  return answers;
}
