// Keeps the page for offline use; pastkey.js keeps the model. The network comes first, so that new versions show.
const CACHE = "pastkey-page";
const PAGE = ["./", "style.css", "app.js", "worker.js", "pastkey.js", "pastkey.json"];
const ORT = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]; // for the CPU
const FILES = [...PAGE, ...[...ORT, "tokenizers.min.mjs", "jinja.js"].map((name) => `lib/${name}`)];
const worker = /** @type {ServiceWorkerGlobalScope} */ (/** @type {unknown} */ (self));
const home = new URL("./", worker.location.href).href;

worker.addEventListener("install", (event) =>
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES))
      .then(() => worker.skipWaiting()),
  ),
);
worker.addEventListener("activate", (event) => event.waitUntil(worker.clients.claim()));
worker.addEventListener("fetch", (event) => {
  const name = event.request.url.replace(home, "").replace(/[?#].*/, "") || "./";
  if (event.request.method !== "GET" || !(FILES.includes(name) || name.startsWith("lib/"))) return;
  event.respondWith(fromNetwork(event.request));
});

async function fromNetwork(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}
