"""The errors of users. Each is one sentence: found, expected, and the remedy.

Every class is also the builtin a caller would catch. The command line prints the sentence and exits with status 2.
"""

from __future__ import annotations

import importlib.util
import sys


class PastkeyError(Exception):
    """A mistake that the user can correct."""

    def __str__(self) -> str:
        # FileNotFoundError and KeyError would format their arguments in their own way.
        return str(self.args[0]) if self.args else ""


class InputError(PastkeyError, ValueError):
    """An invalid value, text or file content. `option`: the name of the argument that has it, where it is one."""

    def __init__(self, sentence: str, *, option: str | None = None) -> None:
        super().__init__(sentence)
        self.option = option


class OptionError(PastkeyError, TypeError):
    """An unknown keyword of a call."""


class ContextLengthError(InputError):
    """A context longer than the `longest` tokens that a model was made for."""

    def __init__(self, sentence: str, longest: int) -> None:
        super().__init__(sentence)
        self.longest = longest


class MissingFileError(PastkeyError, FileNotFoundError):
    """A missing file or folder."""


class ExistingFolderError(PastkeyError, FileExistsError):
    """An output that already exists."""


class InUseError(PastkeyError, BlockingIOError):
    """A checkpoint or an output that another process writes."""


class IntegrityError(PastkeyError, ValueError):
    """A checkpoint or bundle with a missing, truncated, altered or newer-version file."""


class ContractError(PastkeyError, ValueError):
    """A module that the cache cannot be grafted onto."""


class ParityError(PastkeyError, ValueError):
    """A bundle whose results differ from its source's."""


class QualityError(PastkeyError, ValueError):
    """An int8 or int4 bundle whose KL divergence from float32 is above the user's bound."""


class NumericsError(PastkeyError, ArithmeticError):
    """NaN or infinity where a number was expected."""


class LostProcessError(PastkeyError, ConnectionError):
    """A process of a training in several processes ended, and the others cannot continue."""


class ResourceError(PastkeyError, OSError):
    """Not enough memory or disk for the work."""


class QueueFullError(PastkeyError, RuntimeError):
    """More requests than a model's queue holds: ask again later."""


class ProviderError(PastkeyError, ValueError):
    """An execution provider that is not available, or that refused the model."""


class StartError(ProviderError):
    """An installed execution provider whose driver or library is missing."""


class MissingExtraError(PastkeyError, ImportError):
    """A package that an optional part of pastkey needs."""


class UntrustedBundleError(PastkeyError, RuntimeError):
    """The child process of an untrusted bundle broke a limit, crashed, or sent no valid reply."""


class FallbackWarning(RuntimeWarning):
    """Operators run elsewhere than was chosen: on the CPU, or by onnxruntime instead of the native kernels."""


class TemplateWarning(UserWarning):
    """A chat template leaves out one of its inputs."""


class LimitWarning(RuntimeWarning):
    """The child process of an untrusted bundle runs without a limit that this system does not support."""


def first_line(error: BaseException, longest: int = 300) -> str:
    """Returns the first line of a library's error, or its class if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:longest]


# The extras of pyproject.toml and the modules that they install. If one is missing, others may be missing as well.
EXTRAS = {
    "cpu": ("onnxruntime",),
    "chat": ("jinja2",),
    "constrained": ("llguidance",),
    "sign": ("cryptography",),
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "tqdm"),
    "huggingface": ("transformers", "huggingface_hub", "gguf", "accelerate"),
    "train": ("torch", "safetensors", "matplotlib", "tqdm", "transformers", "peft", "pyarrow"),
    "serve": ("starlette", "uvicorn", "h11", "pydantic", "prometheus_client"),
    "see": ("onnx", "onnx_ir"),
}


def missing_extra(error: ModuleNotFoundError, *needed_by: str) -> ModuleNotFoundError | MissingExtraError:
    """Returns the error for a missing optional package, or `error` itself if the package is none of ours.

    `needed_by` are extras: the sentence names those that lack something, otherwise the one that installs the package.
    """
    package = (error.name or "").partition(".")[0]
    bringing = [extra for extra, modules in EXTRAS.items() if package in modules]
    if not bringing:
        return error
    lacking = [extra for extra in needed_by if any(_is_missing(module) for module in EXTRAS.get(extra, ()))]
    extras = ",".join(lacking if set(lacking) & set(bringing) else bringing[:1])
    from importlib.metadata import version  # 20 ms that only an error needs

    wheel = f"pastkey-{version('pastkey')}-py3-none-any.whl"
    return MissingExtraError(
        f"the package {package!r} is not installed, which pastkey's extras [{extras}] install: type  pip install "
        f"'.[{extras}]'  in pastkey's checkout, or  pip install '{wheel}[{extras}]'  with its wheel, and try again"
    )


def _is_missing(module: str) -> bool:
    return sys.modules.get(module, module) is None or importlib.util.find_spec(module) is None
