"""Checks a bundle on a new device against golden logits that the export stored.

Providers have silent bugs: on some devices, GroupQueryAttention of WebGPU leaves out keys in a prefill. So the check
runs a prefill, chunks and single tokens once and compares their logits with those of the CPU. A device that computes
only a prefill wrong then runs one token at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import FallbackWarning, IntegrityError, NumericsError, ProviderError
from pastkey.files.folder import Remembered
from pastkey.files.reading import reading

from ..providers import placement as ep
from ..providers.ort import onnxruntime
from ..settings import MAX_DRAFT_TOKENS
from .engine import Engine, Ids, Logits

TOKENS = 256  # length of the sequence, if the context has room
# Divisors of the prefix lengths with golden logits: the whole sequence, its eighth, then half, quarter and sixteenth as
# room allows. The error of the bug changes from position to position.
ENDS, LEAST_ROWS = (1, 8, 2, 4, 16), 2
SEQUENCES = 4  # at most, of which the golden one is chosen
ROUNDINGS = 2  # right kernels were 0.4 to 1.1 of the distance apart
STEPS = MAX_DRAFT_TOKENS + 1  # tokens decoded after a prefill, one by one and then at once, as drafts are

SMALLEST_BUG = 2e-2  # smallest observed error of the bug

_BANNED = 1e3  # below the largest of its row, a logit that is never drawn
_DRIVERS = ("/proc/driver/nvidia/version", "/usr/share/vulkan/icd.d/*.json", "/etc/vulkan/icd.d/*.json")
_DRIVERS_BY_NAME = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES")
_CARDS = "/sys/class/drm/card[0-9]*/device/uevent"  # of Linux


@dataclass(frozen=True)
class Golden:
    """A token sequence and the logits after some of its prefixes."""

    ids: Ids  # (T,)
    ends: Ids  # (N,), lengths of the prefixes, ascending; the last is T
    logits: Logits  # (N, V), after the last token of each prefix
    limit: float  # tolerance: max |difference| over max |logit|

    def save(self, path: Path) -> None:
        """Writes a .npz file."""
        np.savez(path, ids=self.ids, ends=self.ends, logits=self.logits, limit=self.limit)

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Reads the golden logits of a bundle. Raises IntegrityError."""
        path = bundle.path / names.GOLDEN
        if names.GOLDEN not in bundle.manifest.files:
            raise IntegrityError(f"{bundle.path / names.MANIFEST} does not list {names.GOLDEN}: export it again")
        try:
            with reading(path, "golden logits", but=(ValueError, LookupError)), np.load(path) as content:
                golden = cls(content["ids"], content["ends"], content["logits"], float(content["limit"]))
            rows, vocab_size = golden.logits.shape
            if not rows or rows != len(golden.ends) or golden.ends[-1] != len(golden.ids):
                raise ValueError("its arrays do not fit together")
            if vocab_size != bundle.manifest.vocab_size:
                raise ValueError(f"it has logits of {vocab_size} tokens")
            if golden.ids.min() < 0 or golden.ids.max() >= vocab_size:
                raise ValueError("its ids are outside the model's vocabulary")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}): export the bundle again") from None
        return golden

    @classmethod
    def computed(cls, engine: Engine, rows: int, limit: float, exact: Engine | None = None) -> Golden:
        """Computes golden logits by an engine, after `rows` prefixes, at least LEAST_ROWS.

        Products of activations that are rounded to int8 amplify the last bits of the layers before. So two right
        kernels are about as far apart as either is from exact products: .01 to .04, more in a wide model. The limit
        is ROUNDINGS of that distance, if this is more than `limit`. At a few places of a text rounding decides the
        logits, up to their largest. So of a few sequences it uses the first that does not end at one, or the best, and
        leaves out prefixes that end at one.

        Args:
            engine: Computes the logits.
            rows: Number of prefixes.
            limit: The least tolerance.
            exact: The same model with exact products, where those of `engine` round their input.
        """
        manifest = engine.manifest
        length = min(TOKENS, manifest.context_length)
        ends = sorted({max(1, length // part) for part in ENDS[: max(LEAST_ROWS, rows)]})
        found: list[tuple[float, Ids, Logits]] = []
        while not found or (found[-1][0] > limit / ROUNDINGS and len(found) < SEQUENCES):
            ids = np.random.default_rng(len(found)).integers(0, manifest.vocab_size, length)
            whole = next(_after(engine, ids, [length]))
            off = 0.0 if exact is None else _apart(next(_after(exact, ids, [length])), whole)
            found.append((off, ids, whole))
        off, ids, whole = min(found, key=lambda one: one[0])
        *beginnings, _ = ends
        logits = list(_after(engine, ids, beginnings))
        offs = [0.0] * len(logits) if exact is None else list(map(_apart, _after(exact, ids, beginnings), logits))
        off = max(off, min(offs, default=0.0))  # one prefix is kept at least
        kept = [i for i, one in enumerate(offs) if one <= max(off, limit / ROUNDINGS)]
        ends, logits = [*(beginnings[i] for i in kept), length], [*(logits[i] for i in kept), whole]
        return cls(ids, np.array(ends), np.stack(logits), max(limit, ROUNDINGS * off))


def require_golden(engine: Engine, bundle: Bundle) -> None:
    """Checks a bundle once on the engine's device, unless that is the CPU with onnxruntime's own kernels.

    A file in the user's cache keeps the result.

    If only a prefill is wrong, the engine falls back to one token at a time, with a FallbackWarning. If the native
    kernels are wrong, it falls back to onnxruntime's, with a FallbackWarning, unless they were asked for. Raises
    ProviderError if these, or the device, compute other logits.
    """
    if engine.graph.native is not None:
        if why := native_refusal(engine, bundle):
            engine.leave_native(why)
        engine.reset()
    elif engine.providers[0] != ep.CPU:
        _require_device(engine, bundle)
        engine.reset()


def native_refusal(engine: Engine, bundle: Bundle) -> str:
    """Says by how much the logits of an engine's native kernels are off; "" if they are right."""
    memory = _Memory(engine, bundle)
    if not isinstance(memory.found, str):
        golden = Golden.of(bundle)
        off = max(differences(engine, golden))
        memory.keep(
            f"the native kernels ({engine.graph.kernels}) compute other logits on this CPU: off by {off:.1e} of the "
            f"largest (limit {golden.limit:.1e})"
            if off > golden.limit
            else ""
        )
    return str(memory.found)


def _require_device(engine: Engine, bundle: Bundle) -> None:
    memory = _Memory(engine, bundle)
    if not isinstance(memory.found, bool):
        memory.keep(_takes_one_by_one(engine, Golden.of(bundle)))
    if memory.found:
        engine.graph.one_by_one = True
        name = ep.short_name(engine.providers[0])
        warnings.warn(
            f"the execution provider {name!r} computes a prefill wrong on this device, or too inexactly to tell, and "
            "single tokens right: the prompt is read token by token, which is slow; "
            f"{ep.other_graph(name, engine.manifest)}",
            FallbackWarning,
            stacklevel=3,
        )


def _takes_one_by_one(engine: Engine, golden: Golden) -> bool:
    """Whether the device computes only single tokens right. Raises ProviderError if those are wrong as well."""
    limit = golden.limit
    # int8 activations may amplify rounding beyond the provider's bug, which then cannot be detected: assume it.
    unseen = limit > SMALLEST_BUG and engine.manifest.graph == "fused" and engine.graph.provider.misses_keys
    if not unseen and all(off <= limit for off in differences(engine, golden)):
        return False
    engine.graph.one_by_one = True
    off = max(_apart(_prefilled(engine, golden.ids[:end], end), row) for end, row in _beginnings(golden))
    engine.graph.one_by_one = False
    if off <= limit:
        return True
    name = ep.short_name(engine.providers[0])
    if engine.manifest.precision == "fp16" and not np.isfinite(off):
        raise ProviderError(
            f"the logits of this bundle are not finite on the execution provider {name!r}: its numbers overflow in "
            "float16, which the CPU computes in float32; export the model with --precision fp32, or int8"
        )
    raise ProviderError(
        f"the execution provider {name!r} computes other logits on this device than the CPU: off by {off:.1e} of "
        f"the largest (limit {limit:.0e}): use the provider 'cpu', or {ep.other_graph(name, engine.manifest)}"
    )


def differences(engine: Engine, golden: Golden) -> Iterator[float]:
    """Errors of a prefill, of one in chunks, and of tokens after one: decoded singly, and at once as drafts are."""
    for end, row in _beginnings(golden):
        yield _apart(_prefilled(engine, golden.ids[:end], end), row)
    length, row = len(golden.ids), golden.logits[-1]
    yield _apart(_prefilled(engine, golden.ids, max(2, length // 4)), row)
    first = max(1, length - STEPS)
    logits = _prefilled(engine, golden.ids[:first], first)
    with contextlib.suppress(NumericsError):
        for token in golden.ids[first:]:
            logits = engine.decode(int(token))
        yield _apart(logits, row)
        engine.reset()
        engine.prefill(golden.ids[:first])
        yield _apart(engine.prefill(golden.ids[first:], STEPS), row)
        return
    yield np.inf


def _after(engine: Engine, ids: Ids, ends: Sequence[int]) -> Iterator[Logits]:
    """The logits (V,) after each prefix of `ids`."""
    for end in ends:
        engine.reset()
        yield engine.prefill(ids[:end], end)


def _beginnings(golden: Golden) -> Iterator[tuple[int, Logits]]:
    return zip(golden.ends.tolist(), golden.logits, strict=True)


def _prefilled(engine: Engine, ids: Ids, chunk_size: int) -> Logits:
    """The logits (V,) after a text, not finite where the device gives such."""
    engine.reset()
    try:
        return engine.prefill(ids, chunk_size)
    except NumericsError:
        return np.full(engine.manifest.vocab_size, np.nan, np.float32)


def _apart(found: Logits, expected: Logits) -> float:
    """max |difference| over max |logit|, of those that may be drawn; infinite if either is not finite."""
    drawn = drawn_of(expected)
    off = float(np.abs(found - expected)[drawn].max() / max(float(np.abs(expected[drawn]).max()), 1e-12))
    return off if np.isfinite(off) else np.inf


def drawn_of(logits: Logits) -> npt.NDArray[np.bool_]:
    """Which logits (..., V) may be drawn: not those of tokens that a model bans by -1e9, say."""
    return np.asarray(~(logits < logits.max(-1, keepdims=True) - _BANNED))  # NaN may


class _Memory:
    """The stored result for one bundle, device and driver."""

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
        known = json.dumps([files, _surroundings(engine)], default=str)
        self._file = Remembered(hashlib.sha256(known.encode()).hexdigest()[:24] + ".proof")

    @property
    def found(self) -> Any:
        """Whether tokens are run one by one, or why the native kernels are not used; None if nothing is stored."""
        return self._file.content.get("found")

    def keep(self, found: bool | str) -> None:
        self._file.content["found"] = found
        self._file.save()


def _surroundings(engine: Engine) -> list[Any]:
    """The key of a stored result: providers and their options, onnxruntime, the system, devices and drivers."""
    hardware = [
        [d.ep_name, dict(d.ep_metadata), d.device.vendor, d.device.vendor_id, d.device.device_id]
        for d in onnxruntime.get_ep_devices()
    ]
    named = [Path(part) for key in _DRIVERS_BY_NAME for part in os.environ.get(key, "").split(os.pathsep) if part]
    found = [path for pattern in _DRIVERS for path in Path(os.sep).glob(pattern.lstrip("/"))]
    drivers = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in [*found, *named] if path.is_file()]
    cards = [path.read_text(errors="replace") for path in sorted(Path(os.sep).glob(_CARDS.lstrip("/")))]
    chosen = {name: value for name, value in os.environ.items() if name.startswith(("VK_", "CUDA_", "MESA_"))}
    options = [engine.onnx.get_provider_options(), *engine.graph.asked]
    kernels, uname = engine.graph.kernels, platform.uname()  # whose processor is another program's answer
    system = [uname.system, uname.release, uname.machine, hardware, cards, drivers, chosen]
    return [onnxruntime.__version__, onnxruntime.get_available_providers(), engine.providers, options, system, kernels]
