// The page: what it says and asks. The model is in worker.js.
import { describe, environment } from "./pastkey.js";

const $ = (id) => document.getElementById(id);
const button = (id) => /** @type {HTMLButtonElement} */ ($(id));
/** @type {(selector: string) => HTMLInputElement} */
const input = (selector) => document.querySelector(selector);
const [log, error, status] = ["log", "error", "status"].map($);
const form = /** @type {HTMLFormElement} */ ($("form"));
const typed = /** @type {HTMLTextAreaElement} */ ($("prompt"));
const progress = /** @type {HTMLProgressElement} */ ($("progress"));
/** A field of the form, by its name. */
const field = (name) => /** @type {HTMLInputElement} */ (form.elements.namedItem(name));
const MB = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

const ENDS = {
  stop: "The text ends",
  length: "As many tokens as asked for",
  context: "The context is full",
  cancelled: "Stopped",
};

/** @type {import("./pastkey.js").Index} */
let index; // of the bundle
let model; // what the worker says of it
let messages = []; // the conversation
let answer; // the element that is written to
let unfinished = false; // whether the text can be continued

// --- the worker ---------------------------------------------------------------------------------------------------
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();

function call(name, argument, onReport) {
  const id = crypto.getRandomValues(new Uint32Array(1))[0];
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, onReport });
    worker.postMessage({ id, call: name, argument });
  });
}

worker.onmessage = ({ data: { id, report, value, error } }) => {
  const { resolve, reject, onReport } = waiting.get(id);
  if (report) return onReport?.(report);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(value);
};
worker.onerror = ({ message = "the worker of the page does not start" }) =>
  waiting.forEach(({ reject }) => reject(new Error(message)));

// --- loading ------------------------------------------------------------------------------------------------------
function fact(name, text, warning = false) {
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  [term.textContent, value.textContent] = [name, text];
  value.classList.toggle("warning", warning);
  $("list").append(term, value);
}

async function start() {
  index = await describe("./");
  const here = await environment(index);
  const { source, precision, bytes, missing, context_length: context } = index;
  document.title = $("name").textContent = source;
  fact("Model", `${source}, ${precision}, ${context.toLocaleString("en")} tokens of context`);
  fact("Size", missing === bytes ? MB(bytes) : `${MB(bytes)}, of which ${MB(bytes - missing)} are in this browser`);
  if (!here.secure) fact("Offline", "no: without HTTPS, files are neither kept nor checked by sha256", true);
  input("[value=webgpu]").disabled = !here.gpu;
  $("no-gpu").textContent = here.gpu ? "" : `: ${here.whyNoGpu}`;
  $("load").textContent = missing ? `Load (${MB(missing)} to download)` : "Load";
  button("load").disabled = false;
  status.textContent = "The model is not loaded yet";
}

async function load() {
  const provider = input("[name=provider]:checked").value;
  button("load").disabled = true;
  progress.hidden = false;
  status.textContent = "Loading";
  model = await call("load", provider, ({ done, total, checking }) => {
    if (checking) status.textContent = "Comparing with the golden logits";
    else progress.value = done / total;
  });
  const { threads, fallback, oneByOne, hasChat, hasTokenizer } = model;
  const { whyOneThread } = await environment(index);
  const why = whyOneThread && `, since ${whyOneThread}: see docs/web.md`;
  const cpu = threads > 1 ? `${threads} threads` : `one thread${why}`;
  if (fallback) fact("GPU", `not used: ${fallback}`, true);
  const gpu = `GPU (WebGPU)${oneByOne ? ", prompts token by token: a prefill computes other logits there" : ""}`;
  fact("Runs on", model.provider === "wasm" ? `CPU (WebAssembly), ${cpu}` : gpu);
  const { ok, difference, limit, rows, of } = model.golden;
  const [off, most] = [difference, limit].map((number) => number.toExponential(1));
  const golden = `off by ${off} of the largest logit, limit ${most}; ${rows} of ${of} texts`;
  fact("Golden logits", `${ok ? "agree" : "DIFFER"}: ${golden}`, !ok);
  if (!ok) error.textContent = "This browser computes other logits than the export did: the text may be wrong.";
  $("start").hidden = true;
  form.hidden = false;
  log.ariaLabel = hasChat ? "Conversation" : "Text";
  $("system-label").hidden = !hasChat;
  $("send").textContent = hasChat ? "Send" : "Write";
  $("prompt-label").textContent = hasChat ? "Message" : hasTokenizer ? "Text to continue" : "Prompt, as token ids";
  typed.placeholder = hasChat ? "What is the capital of France?" : hasTokenizer ? "Once upon a time" : "1, 2, 3";
  for (const [name, value] of Object.entries(index.sampling)) field(name).value = `${value}`;
  if (hasChat) field("maxNewTokens").value = "512";
  status.textContent = "Ready";
  typed.focus();
}

// --- writing ------------------------------------------------------------------------------------------------------
function options() {
  const given = {};
  for (const name of ["temperature", "topK", "topP", "minP", "repetitionPenalty", "maxNewTokens"])
    given[name] = field(name).valueAsNumber;
  if (field("seed").value) given.seed = BigInt(field("seed").value);
  given.stop = field("stopTexts").value.split("\n").filter(Boolean);
  return given;
}

function show(role, text) {
  const [entry, content] = [document.createElement("div"), document.createElement("p")];
  entry.className = role;
  content.textContent = text;
  if (model.hasChat) {
    const name = document.createElement("h2");
    name.textContent = role === "user" ? "You" : "Model";
    entry.append(name);
  }
  entry.append(content);
  log.append(entry);
  log.hidden = false;
  return content;
}

/** The prompt of a new text or message, shown in the log. */
function newPrompt(text) {
  if (!model.hasChat) {
    log.replaceChildren();
    const entry = show("text", text);
    answer = entry.appendChild(document.createElement("span"));
    const numbers = text.split(/[\s,]+/).filter(Boolean);
    return model.hasTokenizer ? text : numbers.map(Number);
  }
  const system = field("system").value.trim();
  if (!messages.length && system) messages.push({ role: "system", content: system });
  messages.push({ role: "user", content: text });
  show("user", text);
  answer = show("assistant", "");
  return messages;
}

async function write(prompt) {
  busy(true);
  status.textContent = "Reading the prompt";
  const start = performance.now();
  let count = 0;
  try {
    const { ids, finishReason, perSecond } = await call("generate", { prompt, options: options() }, ({ id, text }) => {
      if (!count++) status.textContent = "Writing";
      answer.append(model.hasTokenizer ? text : ` ${id ?? ""}`);
      $("speed").textContent = `${((count * 1000) / (performance.now() - start)).toFixed(1)} tokens/s`;
      log.scrollTop = log.scrollHeight;
    });
    $("speed").textContent = ids.length > 1 ? `${perSecond.toFixed(1)} tokens/s` : "";
    status.textContent = `${ENDS[finishReason]}: ${ids.length} ${ids.length === 1 ? "token" : "tokens"}`;
    unfinished = finishReason === "length" || finishReason === "cancelled";
    if (messages.at(-1)?.role === "assistant") messages.pop(); // it was continued
    if (model.hasChat) messages.push({ role: "assistant", content: answer.textContent });
  } catch (reason) {
    if (prompt) messages.pop();
    throw reason;
  } finally {
    busy(false);
  }
}

function busy(yes) {
  log.ariaBusy = `${yes}`; // a screen reader reads the answer once it is whole
  button("stop").disabled = !yes;
  for (const id of ["send", "clear"]) button(id).disabled = yes;
  button("continue").disabled = yes || !unfinished;
}

// --- the controls -------------------------------------------------------------------------------------------------
const told = (action) => async (event) => {
  event?.preventDefault();
  error.textContent = "";
  try {
    await action();
  } catch (reason) {
    error.textContent = reason.message;
    status.textContent = "";
    button("load").disabled = false;
  }
};

$("load").onclick = told(load);
form.onsubmit = told(async () => {
  const text = typed.value;
  if (!text.trim() || button("send").disabled) return;
  typed.value = "";
  await write(newPrompt(text));
});
$("continue").onclick = told(() => write(null));
$("stop").onclick = told(() => call("stop"));
$("clear").onclick = told(async () => {
  log.replaceChildren();
  [messages, unfinished, log.hidden, $("speed").textContent] = [[], false, true, ""];
  busy(false);
  typed.focus();
});
// Not `onkeydown`: a handler there that returns false cancels the key.
document.addEventListener("keydown", ({ key }) => key === "Escape" && $("stop").click());
typed.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
};

navigator.serviceWorker?.register("./sw.js").catch(() => {}); // without it the page needs its server
told(start)();
