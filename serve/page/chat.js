// A conversation with the server that gave this page.
import { markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const button = (id) => /** @type {HTMLButtonElement} */ ($(id));
const form = (id) => /** @type {HTMLFormElement} */ ($(id));
const field = (id) => /** @type {HTMLInputElement} */ ($(id));
const [log, error] = ["log", "error"].map($);
const ENDS = { length: ", as many as allowed", stopped: ", stopped" };

let key = ""; // kept here alone
let chats; // whether the model has a chat template; otherwise it continues texts
let model; // its name
let messages = []; // the conversation, without the system prompt
let edited = -1; // the message that the next one replaces, with all after it
let running; // the AbortController of the answer that is being written

// --- the server ---------------------------------------------------------------------------------------------------
async function request(path, body) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const how = body && { method: "POST", body: JSON.stringify(body), signal: running.signal };
  const response = await fetch(path, { headers, ...how }).catch((reason) => {
    throw reason.name === "AbortError" ? reason : new Error("The server does not answer");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw Object.assign(new Error(said.error?.message ?? response.statusText), { status: response.status });
}

/** The events of an answer, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- the page -----------------------------------------------------------------------------------------------------
async function open() {
  const found = await (await request("props")).json();
  model = found.model;
  chats = found.chat_template !== null;
  document.title = $("name").textContent = model;
  $("about").textContent = `${found.context_length.toLocaleString("en")} tokens of context, on this server`;
  $("what").textContent = chats ? "Message" : "Text to continue";
  $("of-system").hidden = !chats;
  field("temperature").value = `${found.defaults.temperature ?? 0}`;
  $("unlock").hidden = true;
  $("ask").hidden = $("new").hidden = false;
  field("text").focus();
}

function show(message, place) {
  const entry = document.createElement("article");
  const [name, content, tools] = ["h2", "div", "div"].map((tag) => document.createElement(tag));
  entry.className = message.role;
  name.textContent = message.role === "user" ? "You" : "Model";
  content.className = "content";
  tools.className = "row";
  if (message.role === "user") {
    content.textContent = message.content;
    tools.append(tool("Edit", () => edit(place)));
  } else {
    content.append(...markdown(message.content));
    // Browsers have no clipboard on an address without HTTPS that is not this machine.
    if (navigator.clipboard) tools.append(tool("Copy", () => navigator.clipboard.writeText(message.content)));
    if (place === messages.length - 1) tools.append(tool("Try again", again));
  }
  entry.append(name, content, tools);
  return entry;
}

function tool(name, action) {
  const made = document.createElement("button");
  Object.assign(made, { type: "button", textContent: name, className: "tool", onclick: told(action) });
  return made;
}

function draw() {
  log.replaceChildren(...messages.map(show));
  log.hidden = !messages.length;
  for (const [place, entry] of [...log.children].entries()) {
    entry.classList.toggle("replaced", edited >= 0 && place >= edited);
  }
  for (const each of log.querySelectorAll("button")) each.disabled = running !== undefined;
  button("stop").disabled = !running;
  button("send").disabled = button("new").disabled = running !== undefined;
  $("leave").hidden = edited < 0;
  log.ariaBusy = `${running !== undefined}`; // a screen reader reads the answer once it is whole
  window.scrollTo(0, document.body.scrollHeight);
}

function edit(place) {
  edited = place;
  field("text").value = messages[place].content;
  draw();
  field("text").focus();
}

function leave() {
  if (edited < 0) return;
  edited = -1;
  field("text").value = "";
  draw();
}

async function again() {
  messages.pop();
  await answer();
}

async function send() {
  const text = field("text").value;
  if (!text.trim() || running) return;
  if (edited >= 0) messages.length = edited;
  if (!chats) messages = [];
  messages.push({ role: "user", content: text });
  edited = -1;
  field("text").value = "";
  await answer();
}

/** Asks for the answer to the last message, and writes it as it comes. */
async function answer() {
  const asked = messages.at(-1);
  const said = { role: "assistant", content: "" };
  running = new AbortController();
  messages.push(said);
  draw();
  $("speed").textContent = "Reading";
  const content = log.lastElementChild.querySelector(".content");
  let [tokens, first, drawn, end] = [0, 0, true, "stop"];
  const redraw = () => {
    const below = document.body.scrollHeight - window.innerHeight - window.scrollY < 40;
    content.replaceChildren(...markdown(said.content));
    if (below) window.scrollTo(0, document.body.scrollHeight);
    drawn = true;
  };
  try {
    const system = chats && field("system").value.trim();
    const head = system ? [{ role: "system", content: system }] : [];
    const body = {
      model,
      stream: true,
      stream_options: { include_usage: true },
      temperature: field("temperature").valueAsNumber,
      ...(field("most").value && { max_tokens: field("most").valueAsNumber }),
      ...(chats ? { messages: [...head, ...messages.slice(0, -1)] } : { prompt: asked.content }),
    };
    for await (const { choices, usage } of events(
      await request(chats ? "v1/chat/completions" : "v1/completions", body),
    )) {
      const [choice] = choices;
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) {
        said.content += piece;
        tokens += 1;
        first ||= performance.now();
        if (drawn) requestAnimationFrame(redraw);
        drawn = false;
      }
      end = choice?.finish_reason ?? end;
      tokens = usage?.completion_tokens ?? tokens;
      $("speed").textContent = speed(tokens, first);
    }
  } catch (reason) {
    if (reason.name !== "AbortError") {
      if (!said.content) messages.splice(-2, 2); // nothing of the question is lost: it is in its field again
      if (!said.content && !field("text").value) field("text").value = asked.content;
      throw reason;
    }
    end = "stopped";
    if (!said.content) messages.pop();
  } finally {
    running = undefined;
    $("speed").textContent = tokens ? `${speed(tokens, first)}${ENDS[end] ?? ""}` : "";
    draw();
  }
}

function speed(tokens, first) {
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0.2 ? `, ${((tokens - 1) / seconds).toFixed(1)} per second` : "";
  return tokens ? `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}` : "Reading";
}

// --- the controls -------------------------------------------------------------------------------------------------
const told = (action) => async (event) => {
  event?.preventDefault();
  error.textContent = "";
  try {
    await action();
  } catch (reason) {
    error.textContent = reason.status === 401 ? key && "The server does not know this key" : reason.message;
    if (reason.status !== 401) return;
    [key, $("unlock").hidden, $("about").textContent] = ["", false, "A key is needed"];
    field("key").focus();
  }
};

form("unlock").onsubmit = told(async () => {
  key = field("key").value;
  field("key").value = "";
  await open();
});
form("ask").onsubmit = told(send);
$("stop").onclick = () => running?.abort();
$("leave").onclick = leave;
$("new").onclick = () => {
  [messages, edited, error.textContent, $("speed").textContent] = [[], -1, "", ""];
  draw();
  field("text").focus();
};
document.addEventListener("keydown", ({ key: pressed }) => {
  if (pressed !== "Escape") return;
  if (running) running.abort();
  else leave();
});
field("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form("ask").requestSubmit();
};
told(open)();
