"""A route that streams a text as server-sent events. Who goes away ends the generation within one step.

pip install '.[cpu]' fastapi uvicorn
python examples/fastapi_stream.py demo/int8      # and open http://127.0.0.1:8000 in a browser, or
curl -N "http://127.0.0.1:8000/stream?prompt=Once+upon+a+time"
"""

import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import HTMLResponse, StreamingResponse

import pastkey
from pastkey.errors import PastkeyError
from pastkey.runtime import AsyncStream, LanguageModel

PAGE = """<!doctype html><form><input name=prompt size=60 autofocus><button>Go on</button></form><pre></pre><script>
const form = document.forms[0], shown = document.querySelector("pre"); let source
form.onsubmit = event => {
  event.preventDefault(); source?.close(); shown.textContent = form.prompt.value // a text that still comes ends here
  source = new EventSource("stream?" + new URLSearchParams({prompt: form.prompt.value}))
  source.onmessage = message => shown.append(JSON.parse(message.data).text)
  source.onerror = () => source.close(); source.addEventListener("end", source.onerror)
}</script>"""


def application(lm: LanguageModel) -> FastAPI:
    """One loaded model serves all clients, which are decoded together."""
    app = FastAPI()

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @app.get("/stream")
    async def stream(prompt: str, max_new_tokens: int = Query(200, ge=1, le=1000)) -> StreamingResponse:
        try:
            chunks = lm.astream(prompt, max_new_tokens=max_new_tokens)
        except PastkeyError as error:  # before the first byte, so that the client gets a status
            raise HTTPException(400, str(error)) from None
        return StreamingResponse(events(chunks), media_type="text/event-stream")

    return app


async def events(chunks: AsyncStream) -> AsyncIterator[str]:
    """An event for each piece of text. Where the client has gone the server cancels this, which leaves the stream."""
    async with chunks:
        async for chunk in chunks:
            yield f"data: {json.dumps({'text': chunk.text})}\n\n"
        ended = chunks.completion.finish_reason if chunks.completion else None
        yield f"event: end\ndata: {json.dumps({'finish_reason': ended})}\n\n"


if __name__ == "__main__":
    uvicorn.run(application(pastkey.load(sys.argv[1])), host="127.0.0.1", port=8000)
