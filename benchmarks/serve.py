"""Clients that ask a server at the same time, by HTTP: `pastkey serve` compared with llama.cpp's llama-server."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.environments import llama_server
from benchmarks.measure import WORK, Answer, BenchmarkError, Table, TextFile, interleaved
from benchmarks.peers.convert import described, of_bundle, open_source, prepare, prepare_all
from benchmarks.peers.engines import FILES, Engine, Prepared
from benchmarks.store import Store, digest
from benchmarks.texts import codec_of, open_text
from pastkey.contract.bundle import open_bundle

PLACES = 16  # requests that a server decodes together; others wait
SERVERS = (
    Engine("pastkey-serve", "pastkey serve, int8", "pastkey-int8"),
    Engine("llama-server", "llama-server, Q8_0", "llama-q8_0"),
)


class Reply(NamedTuple):
    """The result of one request, in seconds from its beginning."""

    status: int  # 0 where the connection failed
    tokens: int  # as the server counts them; 0 unless the stream came to its end
    first: float
    last: float


@dataclass(frozen=True)
class Served:
    """The results of the requests of one round."""

    replies: Sequence[Reply]
    seconds: float  # from the first request to the last reply

    @property
    def whole(self) -> list[Reply]:
        """Those that came to their end."""
        return [reply for reply in self.replies if reply.tokens]

    @property
    def rejected(self) -> int:
        """Those that the server refused for want of a place."""
        return sum(reply.status in (429, 503) for reply in self.replies)

    @property
    def lost(self) -> int:
        """Those that were neither answered nor rejected."""
        return len(self.replies) - len(self.whole) - self.rejected

    @property
    def figures(self) -> dict[str, float]:
        """For a table, and as JSON."""
        waits = sorted(reply.first for reply in self.whole) or [float("nan")]
        ends = sorted(reply.last for reply in self.whole) or [float("nan")]
        return {
            "throughput": sum(reply.tokens for reply in self.whole) / self.seconds,
            "first": statistics.median(waits),
            "first99": percentile(waits, 0.99),
            "last99": percentile(ends, 0.99),
            "rejected": self.rejected,
            "lost": self.lost,
        }


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def serve(
    bundle: Path | None = None,
    *,
    clients: Sequence[int] = (1, 4, 16, 64),
    requests: int = 2,
    prompt_tokens: int = 120,
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int = 2,
    text: TextFile | None = None,
    only: Sequence[str] | None = None,
    work: Path = WORK,
) -> Answer:
    """Arms: a server each, in a separate process. Metric: tokens per second, waits, requests rejected and lost.

    Without a bundle it is the int8 export of SmolLM2-135M-Instruct, whose weights llama-server gets in any case. Each
    client sends its requests one after another, on one connection.
    """
    counts, store = sorted(set(clients)), Store(work)

    def make(engine: Engine) -> Prepared:
        if FILES[engine.files].runtime == "llama":
            _built()
        if bundle is not None and FILES[engine.files].runtime == "pastkey":
            return of_bundle(engine, bundle)
        return prepare(engine, open_source(None), store)

    wanted = [one for one in SERVERS if only is None or one.name in only or one is SERVERS[0]]
    prepared, skipped = prepare_all(wanted, make)
    opened = open_bundle(prepared[0].model)
    codec_of(opened)
    most = sum(counts) * requests * rounds  # no prompt comes twice: a server keeps those that it has read
    text_once = partial(store.once, key=[prepared[0].identity, most])
    passages = open_text(text, opened, threads, text_once, own=most, most=most)
    prompts = [passages.prompt(prompt_tokens, first=number) for number in range(most)]
    key = [[one.identity for one in prepared], digest(prompts), new_tokens, threads, requests]
    with ExitStack() as stack:
        ports = {
            one.engine.title: stack.enter_context(_running(one, threads, prompt_tokens + new_tokens, store.logs))
            for one in prepared
        }

        def ask(port: int, count: int, number: int) -> dict[str, float]:
            first = (sum(one for one in counts if one < count) * rounds + count * number) * requests
            own = prompts[first : first + count * requests]
            return load(port, [own[place::count] for place in range(count)], new_tokens).figures

        measured = {
            count: interleaved(
                {title: partial(ask, port, count) for title, port in ports.items()},
                rounds,
                f"serve {count}",
                once=partial(store.once, key=key),
            )
            for count in counts
        }
    yield (
        f"Each client sends {requests} prompts of {prompt_tokens} tokens of {passages.name}, one after another, and "
        f"reads {new_tokens} greedy tokens of each as a stream. A server decodes {PLACES} requests together. Medians "
        f"of {rounds} interleaved rounds; every server with --threads {threads}."
    )
    for sentence, figure, form in (
        ("Tokens per second of all clients, prompts included:", "throughput", ".3g"),
        ("Seconds to the first token, median:", "first", ".2g"),
        ("Seconds to the first token, 99th percentile:", "first99", ".2g"),
        ("Seconds to the last token, 99th percentile:", "last99", ".2g"),
    ):
        rows = [
            [title, *(f"{statistics.median(one[title][figure] for one in measured[n]):{form}}" for n in counts)]
            for title in ports
        ]
        yield Table(sentence, ["clients", *map(str, counts)], rows)

    def summed(title: str, count: int, what: str) -> str:
        return str(int(sum(one[title][what] for one in measured[count])))

    rows = [
        [title, *(", ".join(summed(title, n, what) for what in ("rejected", "lost")) for n in counts)]
        for title in ports
    ]
    yield Table("Requests of all rounds that were rejected, and lost:", ["clients", *map(str, counts)], rows)
    yield from skipped
    yield described(prepared, threads)


def load(port: int, prompts: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> Served:
    """A thread for each client, which sends its prompts one after another. All begin at the same moment."""
    together, replies = threading.Barrier(len(prompts) + 1), list[Reply]()

    def client(own: Sequence[Sequence[int]]) -> None:
        together.wait()
        for ids in own:
            replies.append(request(port, ids, new_tokens))

    workers = [threading.Thread(target=client, args=(own,)) for own in prompts]
    for worker in workers:
        worker.start()
    together.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return Served(replies, time.perf_counter() - began)


def request(port: int, ids: Sequence[int], new_tokens: int) -> Reply:
    """Streams one completion."""
    body = {
        "prompt": list(ids), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, tokens, done = time.perf_counter(), 0.0, 0, False
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            return Reply(reply.status, 0, 0.0, 0.0)
        for line in reply:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if event.get("choices") and not first and event["choices"][0].get("text"):
                    first = time.perf_counter() - began
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException, ValueError):
        return Reply(0, 0, 0.0, 0.0)
    finally:
        connection.close()
    last = time.perf_counter() - began
    return Reply(200, tokens if done else 0, first or last, last)


@contextmanager
def _running(one: Prepared, threads: int, context: int, logs: Path) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags: list[str | Path]
    if one.engine.runtime == "pastkey":
        command: list[str | Path] = [sys.executable, "-m", "pastkey", "serve", one.model, "--port", str(port)]
        flags = ["--threads", str(threads), "--max-concurrency", str(PLACES)]
    else:
        command = [_built(), "--model", one.model, "--port", str(port), "--no-ui"]
        # A place more than asked for: it splits the context evenly, and rounds it up.
        flags = ["--threads", str(threads), "--parallel", str(PLACES), "--ctx-size", str(PLACES * (context + 64))]
    log = logs / f"run-{one.engine.name}.log"
    with log.open("w") as file:
        environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        process = subprocess.Popen(
            [str(word) for word in (*command, *flags)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait(one, port, process, log)
            yield port
        finally:
            process.terminate()
            process.wait()


def _wait(one: Prepared, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2400):
        time.sleep(0.05)
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            continue
        finally:
            connection.close()
    raise BenchmarkError(f"{one.engine.title} did not begin to answer: see {log.name} in the work folder")


def _built() -> Path:
    """llama-server. Raises BenchmarkError where it cannot be built."""
    try:
        return llama_server()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(f"llama-server could not be built ({error}): it needs cmake and a C++ compiler") from None
