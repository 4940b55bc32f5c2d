"""--weights FILE -> an existing module: finds the state dict, matches its names, loads it.

1. A .safetensors file is a state dict, of which quantized matrices are dequantized (`packed/`). Any other file is a
   pickle, read by torch.load(weights_only=True): tensors and plain values. Other classes, such as the dataclass of a
   configuration, become empty stand-ins, so that no code in the file is run.
2. The state dict is the mapping in the file, at any depth, whose names fit the module best.
3. `_orig_mod.` and `module.`, which torch.compile and DistributedDataParallel put into names, are removed everywhere.
   A prefix of all names is removed or added if more names fit then.
4. Every parameter must be found, in its shape; a tied one may be missing if the other is there. A buffer may be missing
   and keeps the module's value.
5. A tensor that the module has no place for must be outside the prefix, or a table that code computes (a mask,
   frequencies or angles of rotary positions, whole or complex numbers). It is skipped.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pastkey.errors import InputError, MissingFileError, first_line
from pastkey.files.memory import require_memory_for
from pastkey.files.reading import reading
from pastkey.files.safetensors_header import read_header

from ..graph.stored import read
from .packed.folder import dequantized_forms, in_file

State = Mapping[str, Tensor]

_WRAPPERS = ("_orig_mod", "module")
_DEEPEST = 4  # levels of nested mappings: {"checkpoint": {"model": {...}}}


def load_weights(module: nn.Module, file: Path, say: Callable[[str], None]) -> tuple[str, ...]:
    """Loads the file's weights into the module. Returns the sentence about how their names were matched.

    `say` is called before a pickle is read. Raises MissingFileError, or InputError with the first name that does not
    fit.
    """
    fit = _best_fit(module, file, _read(file, say))
    _refuse_unlike(module, file, fit)
    try:
        module.load_state_dict(fit.state, strict=False)
    except Exception as error:  # from a hook of the module: names and shapes fit
        raise InputError(f"the weights of {file} do not fit the module: {first_line(error)}") from error
    told = f"{_count(len(fit.state), 'weight')} of {file} were loaded{fit.told}"
    if fit.extra:
        told += f"; {len(fit.extra)} that the module has no place for were left out ({next(iter(fit.extra))})"
    if fit.buffers:
        told += f"; {_count(len(fit.buffers), 'buffer')} stayed as the module makes them ({fit.buffers[0]})"
    return (told,)


# Errors of torch.load for a file that is cut short, or not torch's.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError, OSError,
)  # fmt: skip


# --- the file -----------------------------------------------------------------------------------------------------
def _read(file: Path, say: Callable[[str], None]) -> Any:
    if file.is_dir():
        raise InputError(f"{file} is a folder; a file of weights was expected, .safetensors or of torch.save")
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}; expected the weights of a module, .safetensors or of torch.save")
    if file.suffix == ".safetensors":
        with reading(file, "safetensors"):
            read_header(file)
            found = in_file(file)
            require_memory_for(file, 2 * file.stat().st_size + 4 * found.more)
            if not found.made:
                return load_file(file)
            with safe_open(file, framework="pt") as opened:
                state = {name: opened.get_tensor(name) for name in opened.keys() if name not in found.parts}  # noqa: SIM118
            if told := dequantized_forms([found]):
                say(f"weights of {file} are {told}: they are read as float32, and not kept as they are")
            return state | {name: read(stored) for name, stored in found.made.items()}
    say(f"{file} is a pickle, read by torch.load(weights_only=True), which runs no code of it")
    try:
        with torch.serialization.safe_globals(_stand_ins(file)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise InputError(
            f"torch.load(weights_only=True) cannot read {file} ({_reason(error)}): where it was trained, save "
            "only model.state_dict(), by safetensors.torch.save_file or torch.save"
        ) from None


def _reason(error: Exception) -> str:
    """Returns torch.load's reason without its advice to read the file unsafely."""
    if isinstance(error, RuntimeError):
        return first_line(error)
    lines = [line.strip() for line in str(error).splitlines()]
    return next(
        (line for line in lines if line.startswith(("Trying", "Unsupported"))), "it is damaged, or not a file of torch"
    )


def _stand_ins(file: Path) -> list[Any]:
    """Returns an empty stand-in, under its name, for each class in the file that is not of a tensor and not plain."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # a file of the old format, or not torch's: torch.load reports it better
        return []
    return [(type("StandIn", (_StandIn,), {}), name) for name in found]


class _StandIn:
    """Replaces an object whose class is not torch's."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Accepts any arguments and stores nothing."""

    def __setstate__(self, state: object) -> None:
        """Accepts any state and stores nothing."""


def _states(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """Yields every mapping that holds tensors by name, with the keys that lead to it, in the order of the file."""
    if not isinstance(content, Mapping) or len(path) > _DEEPEST:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        yield from _states(value, (*path, str(key)))


# --- names --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Fit:
    """A state dict under the module's names."""

    state: State  # weights that the module has a place for
    missing: tuple[str, ...]  # parameters that the file lacks
    buffers: tuple[str, ...]  # buffers that the file lacks
    extra: State  # tensors without a place in the module, under the file's names without wrappers
    prefix: str  # prefix removed from the names
    told: str  # where it was found, and how its names were changed


def _best_fit(module: nn.Module, file: Path, content: Any) -> _Fit:
    places = _places(module)
    fits = [(_fit(places, state, path), path) for path, state in _states(content)]
    if not fits:
        raise InputError(
            f"{file} holds no state dict, which is tensors by name: where it was trained, save model.state_dict()"
        )
    best, where = max(fits, key=lambda found: len(found[0].state))  # the first of several
    if not best.state:
        raise InputError(
            f"no weight of {file} has a name of the module's: it has {next(iter(best.extra))} and the module "
            f"{next((name for name, _ in module.named_parameters()), 'none')}, so that they belong to another module"
        )
    others = [".".join(path) for fit, path in fits if len(fit.state) == len(best.state) and path != where]
    told = f" ({others[0]!r} would also fit)" if others else ""
    return _Fit(best.state, best.missing, best.buffers, best.extra, best.prefix, best.told + told)


def _places(module: nn.Module) -> State:
    """Returns the module's own parameters and buffers by name, a tied one under each of its names."""
    found = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _fit(places: Mapping[str, Tensor], state: State, path: tuple[str, ...]) -> _Fit:
    named = {_unwrapped(name, places): tensor for name, tensor in state.items()}
    unwrapped = sorted({part for name in state for part in name.split(".") if part in _WRAPPERS} - _parts(places))
    prefixes = list(dict.fromkeys([*_prefixes(named), *_prefixes(places)]))
    cuts = [(prefix, "") for prefix in prefixes] + [("", prefix) for prefix in prefixes]
    cut, put = max(cuts, key=lambda pair: sum(_moved(name, *pair) in places for name in named))  # the first of several
    fitting, extra = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in named.items():
        place = _moved(name, cut, put)
        own = None if place is None else places.get(place)
        if place is None or own is None:
            extra[name] = tensor
        elif isinstance(own, nn.Parameter) or own.shape == tensor.shape or not _is_made(tensor):
            fitting[place] = tensor  # a mask for another context is the module's own
    there = {id(places[name]) for name in fitting}  # a tied parameter is one object under two names
    lacking = [name for name in places if name not in fitting and id(places[name]) not in there]
    told = f", under {'.'.join(path)!r}" if path else ""
    removed = [f"{part}." for part in unwrapped] + ([cut] if cut else [])
    told += f", without {' and '.join(map(repr, removed))} in their names" if removed else ""
    told += f", with {put!r} in front of their names" if put else ""
    parameters = tuple(name for name in lacking if isinstance(places[name], nn.Parameter))
    return _Fit(fitting, parameters, tuple(name for name in lacking if name not in parameters), extra, cut, told)


def _unwrapped(name: str, places: Mapping[str, Tensor]) -> str:
    """Removes the wrappers' parts from a name, except those that the module's own names have."""
    own = _parts(places)
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS or part in own)


def _parts(places: Mapping[str, Tensor]) -> set[str]:
    return {part for name in places for part in name.split(".")}


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """Returns "" and the beginnings of the names, up to each of their first three dots."""
    parts = [name.split(".")[:-1][:3] for name in names]
    return ["", *(".".join(found[: i + 1]) + "." for found in parts for i in range(len(found)))]


def _moved(name: str, cut: str, put: str) -> str | None:
    """Replaces a prefix of the name by another; None if the name lacks it."""
    return put + name[len(cut) :] if name.startswith(cut) else None


# --- checks ---------------------------------------------------------------------------------------------------------
def _refuse_unlike(module: nn.Module, file: Path, fit: _Fit) -> None:
    """Raises InputError for a weight of another shape, or one that the file or the module lacks."""
    places = _places(module)
    total = len(fit.state) + len(fit.extra)
    advice = "make the module as it was when these weights were saved"
    for name, tensor in fit.state.items():
        if tensor.shape != places[name].shape:
            raise InputError(
                f"{name} is of shape {tuple(tensor.shape)} in {file} and of shape {tuple(places[name].shape)} in the "
                f"module: {advice}"
            )
    if fit.missing:
        raise InputError(
            f"{file} lacks {fit.missing[0]}: {len(fit.state)} of its {total} weights fit, and the module has "
            f"{len(fit.missing)} more; {advice}"
        )
    by_parameter: dict[int, str] = {}
    for name, tensor in fit.state.items():
        other = by_parameter.setdefault(id(places[name]), name)
        if not torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(fit.state[other])):
            raise InputError(
                f"{other} and {name} differ in {file}, and the module has one weight for both: make it without tying "
                "them, as it was when these weights were saved"
            )
    unsaved = {name for name, _ in module.named_buffers()}
    trained = [
        name
        for name, tensor in fit.extra.items()
        if name.startswith(fit.prefix) and name[len(fit.prefix) :] not in unsaved and not _is_made(tensor)
    ]
    if trained:
        raise InputError(
            f"{file} has {trained[0]}, for which the module has no place: {len(fit.state)} of its {total} weights fit, "
            f"and {len(trained)} would be lost; {advice}"
        )


def _is_made(tensor: Tensor) -> bool:
    """Whether it is a table that code computes: it is not trained, and a module without it computes it in another way.

    Such a table holds whole, truth or complex numbers; is a mask of at most two numbers, or the number that it fills
    with; frequencies in a geometric sequence; or angles, a row for each position.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.detach().double().squeeze()
    if values.ndim == 0:
        return float(values) <= -1e4
    if values.ndim == 1:
        ratios = values[1:] / values[:-1]
        return (
            values.numel() > 2
            and bool((values > 0).all())
            and bool((ratios - ratios[0]).abs().max() < 1e-4)
            and abs(float(ratios[0]) - 1) > 1e-3
        )
    return values.unique().numel() <= 2 or (len(values) > 2 and _are_angles(values.flatten(1)))


def _are_angles(rows: Tensor) -> bool:
    """Whether each column holds cosines or sines of 0, of an angle, of twice the angle."""
    zero, once, twice = rows[:3]
    cosines = (zero == 1) & ((twice - (2 * once**2 - 1)).abs() < 1e-3)
    sines = (zero == 0) & ((twice**2 - 4 * once**2 * (1 - once**2)).abs() < 1e-3)
    return bool((cosines | sines).all())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
