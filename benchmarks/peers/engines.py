"""The engines that are compared, a row each, and a client for their workers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from benchmarks.measure import BenchmarkError

WORKERS = Path(__file__).parent / "workers"


class Files(NamedTuple):
    """The weights in one program's format and precision."""

    runtime: str  # a key of convert.ENVIRONMENTS; workers/{runtime}_worker.py speaks for it
    precision: str  # as its own converter calls it
    how: str  # the conversion, for a reader


FILES = {
    "pastkey-int8": Files("pastkey", "int8", "pastkey export --precision int8"),
    "pastkey-int4": Files("pastkey", "int4", "pastkey export --precision int4"),
    "pastkey-fp32": Files("pastkey", "fp32", "pastkey export --precision fp32"),
    "genai-int8": Files("genai", "int8", "its model builder, -p int8 -e cpu"),
    "genai-int4": Files("genai", "int4", "its model builder, -p int4 -e cpu"),
    "llama-q8_0": Files("llama", "Q8_0", "llama_model_quantize to Q8_0"),
    "llama-q4_0": Files("llama", "Q4_0", "llama_model_quantize to Q4_0"),
    "llama-q4_k_m": Files("llama", "Q4_K_M", "llama_model_quantize to Q4_K_M"),
    "optimum-fp32": Files("optimum", "fp32", "ORTModelForCausalLM with export=True"),
    "optimum-int8": Files("optimum", "int8", "ORTQuantizer, dynamic, per channel, avx512_vnni or else avx2"),
    "openvino-int8": Files("openvino", "int8", "optimum-cli export openvino --weight-format int8"),
    "mistralrs-q8_0": Files("mistralrs", "Q8_0", "llama_model_quantize to Q8_0"),
    "transformers-fp32": Files("transformers", "fp32", "torch, attn_implementation='eager'"),
}


class Engine(NamedTuple):
    """One program over one of FILES."""

    name: str  # on the command line
    title: str  # in tables and charts
    files: str  # a key of FILES
    way: str = "tokens"  # of its worker: a key of what the worker serves
    how: str = ""  # how it serves, for a reader
    full: bool = False  # measured with --full only
    rival: bool = False  # an int8 peer that answers as the model does: engines are compared with the fastest
    drafts: bool = False  # looks ahead by prompt lookup: engines that do not are not compared with it
    tells_logits: bool = True  # of each position of a prompt: its error can be measured

    @property
    def runtime(self) -> str:
        return FILES[self.files].runtime


# The reference of quality.
REFERENCE = Engine("pastkey-fp32", "pastkey fp32", "pastkey-fp32")
STEPS = "pastkey int8, without prompt lookup"
WITHOUT = "generate(prompt_lookup=False)"
ORT = f"load(native=False), {WITHOUT}"
OPENVINO = "INFERENCE_NUM_THREADS=--threads, KV_CACHE_PRECISION=f16, max_num_batched_tokens=4096"
ENGINES = (
    Engine("pastkey-int8", "pastkey int8", "pastkey-int8", drafts=True),
    Engine("pastkey-int8-steps", STEPS, "pastkey-int8", "steps", WITHOUT),
    Engine("pastkey-int8-ort", "pastkey int8, onnxruntime's kernels", "pastkey-int8", "ort", ORT),
    REFERENCE,
    Engine("genai-int8", "onnxruntime-genai int8", "genai-int8", rival=True),
    Engine("llama-q8_0", "llama.cpp Q8_0", "llama-q8_0", rival=True),
    Engine("openvino-int8", "openvino-genai int8", "openvino-int8", how=OPENVINO, rival=True),
    Engine(
        "openvino-int8-lookup",
        "openvino-genai int8, prompt lookup",
        "openvino-int8",
        "lookup",
        f"{OPENVINO}, prompt_lookup=True",
        rival=True,
        drafts=True,
    ),
    Engine(
        "mistralrs-q8_0",
        "mistral.rs Q8_0",
        "mistralrs-q8_0",
        how="RAYON_NUM_THREADS and CANDLE_NUM_THREADS=--threads",
        rival=True,
        tells_logits=False,
    ),
    Engine("pastkey-int4", "pastkey int4", "pastkey-int4", full=True, drafts=True),
    Engine("pastkey-int4-steps", "pastkey int4, without prompt lookup", "pastkey-int4", "steps", WITHOUT, full=True),
    Engine("pastkey-int4-ort", "pastkey int4, onnxruntime's kernels", "pastkey-int4", "ort", ORT, full=True),
    Engine("genai-int4", "onnxruntime-genai int4", "genai-int4", full=True),
    Engine("llama-q4_0", "llama.cpp Q4_0", "llama-q4_0", full=True),
    Engine("llama-q4_k_m", "llama.cpp Q4_K_M", "llama-q4_k_m", full=True),
    Engine("optimum-fp32", "optimum-onnx fp32", "optimum-fp32", full=True),
    Engine("optimum-int8", "optimum-onnx int8 dynamic", "optimum-int8", full=True),  # no rival: it is another model
    Engine("transformers-fp32", "transformers eager fp32", "transformers-fp32", full=True),
)
# Each as an application embeds it; pastkey first, which the others are compared with.
EACH = (
    "a Generator for each stream over one Model, in a thread each; a step holds Python's lock, so that they take turns"
)
BATCH = "one Generator for all: they begin and end together, and nobody joins"
LOCK = (
    "one Llama and a lock: it holds one text, so that streams wait for one another. (llama.cpp itself decodes several "
    "sequences in one batch; of llama-cpp-python's classes none does)"
)
STREAM_ENGINES = (
    Engine("pastkey-streams", "pastkey int8", "pastkey-int8", "streams", "a thread for each stream over one model"),
    Engine("pastkey-step-streams", STEPS, "pastkey-int8", "step-streams", "the same with prompt_lookup=False"),
    Engine("genai-streams", "onnxruntime-genai int8, a Generator each", "genai-int8", "streams", EACH),
    Engine("genai-batch", "onnxruntime-genai int8, one batch", "genai-int8", "batch", BATCH),
    Engine("llama-streams", "llama-cpp-python Q8_0", "llama-q8_0", "streams", LOCK),
)


@dataclass(frozen=True)
class Prepared:
    """An engine with all that its worker needs."""

    engine: Engine
    python: Path  # of its environment
    model: Path  # what it loads: a file or a folder
    size: int  # bytes of all files in it
    versions: dict[str, str]  # package -> version
    identity: str  # a digest of model, versions and settings: part of the key of what is measured on it


class Worker:
    """An engine in a separate process, which starts at the first request."""

    def __init__(self, prepared: Prepared, *, threads: int, context: int, logs: Path) -> None:
        """`context` is the most tokens that any request will need. What the engine prints goes to a file in `logs`."""
        self.engine = prepared.engine
        self._log = logs / f"run-{prepared.engine.name}.log"
        self._command = [
            str(prepared.python),
            str(WORKERS / f"{prepared.engine.runtime}_worker.py"),
            str(prepared.model),
            f"--way={prepared.engine.way}",
            f"--threads={threads}",
            f"--context={context}",
        ]
        self._process: subprocess.Popen[str] | None = None
        self.spawned = 0.0  # time.perf_counter() just before its process began
        self.load_seconds = 0.0  # from its imports' end to a loaded model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self) -> None:
        """Loads the model, unless that has been done."""
        if self._process is None:
            environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
            with self._log.open("a") as log:
                self.spawned = time.perf_counter()
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            self.load_seconds = self._reply()["load_seconds"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The reply of the worker to one request of workers/protocol.py. Raises BenchmarkError when it dies of it."""
        self.start()
        assert self._process is not None
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        try:
            print(json.dumps({"do": do, **request}), file=stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self) -> BenchmarkError:
        assert self._process is not None
        status = self._process.wait()
        return BenchmarkError(
            f"{self.engine.title} ended with exit status {status}: see {self._log.name} in the work folder"
        )
