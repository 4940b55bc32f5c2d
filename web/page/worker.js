// The model, in its own thread, so that the page can paint and stop it: { id, call, argument } -> { id, value | error }.
import { Model } from "./pastkey.js";

/** @type {Model} */
let model;
let sequence = []; // the tokens of the prompt and the answer so far
/** @type {AbortController} */
let running;

const calls = {
  async load(provider, report) {
    model = await Model.load("./", { provider, onProgress: throttled(report) });
    report({ checking: true });
    const { provider: used, threads, fallback, oneByOne, hasTokenizer, hasChat } = model;
    return { provider: used, threads, fallback, oneByOne, hasTokenizer, hasChat, golden: await model.check() };
  },

  /** `prompt`: a text, token ids, or the messages of a conversation; null continues the sequence. */
  async generate({ prompt, options }, report) {
    running = new AbortController();
    if (typeof prompt === "string") sequence = model.encode(prompt);
    else if (prompt?.length && typeof prompt[0] === "object") sequence = model.encodeChat(prompt);
    else if (prompt) sequence = prompt;
    const text = model.generate(sequence, { ...options, signal: running.signal });
    let first; // when the first token came: the prompt's time is not that of decoding
    for (;;) {
      const { done, value } = await text.next();
      first ??= performance.now();
      if (done) {
        sequence = [...sequence, ...value.ids];
        return { ...value, perSecond: ((value.ids.length - 1) * 1000) / (performance.now() - first) };
      }
      report(value);
    }
  },

  async stop() {
    running?.abort();
  },
};

onmessage = async ({ data: { id, call, argument } }) => {
  try {
    postMessage({ id, value: await calls[call](argument, (report) => postMessage({ id, report })) });
  } catch (error) {
    postMessage({ id, error: error.name === "BundleError" ? error.message : `${error}` });
  }
};

function throttled(report) {
  let last = 0;
  return (progress) => {
    if (progress.done < progress.total && performance.now() - last < 50) return;
    last = performance.now();
    report(progress);
  };
}
