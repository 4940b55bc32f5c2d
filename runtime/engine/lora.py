"""LoRA adapters as peft saves them, and their matrices as the inputs of a bundle's adapter graph.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. It has two matrices for each projection
that it adapts: A (r, K) and B (N, r), and adds scale * B A to the projection's weight (N, K).
https://huggingface.co/docs/peft, https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.files.reading import MOST_JSON, parse_json, read_bytes, reading
from pastkey.files.safetensors_header import HeaderError, StoredTensor, read_header
from pastkey.values import is_number, shown

from ..providers.ort import onnxruntime
from .channels import changed

Matrix = npt.NDArray[np.float32]

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Settings without an effect on a trained adapter's results, or whose effect its tensors show.
_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config", "target_parameters", "trainable_token_indices"),
    *("bias", "ensure_weight_tying"),
}
# A key of alpha_pattern that `re` matches in little time: nothing is repeated but digits before a dot.
_NAME = r"(?:[\w/:-]|\\?\.|(?:\\d|\[0-9\])(?:\+\\\.)?)*"
_PLAIN = re.compile(rf"(?=.{{1,500}}$)\^?{_NAME}(?:\((?:\?:)?\w+(?:\|\w+)*\){_NAME}){{0,2}}\$?")
_MOST_MATCHES = 2_000_000  # of a pattern with a module; 900 patterns of 900 modules are 810,000
# Other initial weights change the base model as well.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter for one bundle.

    Attributes:
        folder: The folder that it was read from.
        digest: The hash of its files.
        inputs: Input of the adapter graph -> onnxruntime.OrtValue.
        nbytes: Bytes of these.
    """

    folder: Path
    digest: str
    inputs: Mapping[str, Any]
    nbytes: int


def read_adapter(folder: Path, session: Any, bundle: Path) -> Adapter:
    """Reads an adapter for the adapter graph of a bundle.

    Args:
        folder: The folder that peft saved.
        session: The onnxruntime.InferenceSession of the adapter graph.
        bundle: The bundle's folder, for errors.

    Raises:
        MissingFileError: There is no such folder, or a file is missing in it.
        IntegrityError: A file is damaged.
        InputError: It is not a LoRA adapter, does more than to add to projections, or is of another model.
    """
    config = _read_config(folder)
    matrices = _read_matrices(folder, config)
    with reading(bundle / names.ADAPTER_GRAPH, "an adapter graph"):
        metadata = session.get_modelmeta().custom_metadata_map
        pairs = json.loads(metadata[names.ADAPTED])
        shapes = {value.name: value.shape for value in session.get_inputs()}
        placed = _placed(folder, matrices, [module for pair in pairs for module, _, _ in pair if module], bundle)
        arrays: dict[str, Matrix] = {}
        for number, pair in enumerate(pairs):
            columns = shapes[names.lora_a(number)][0]
            found = [(placed.get(module), weight, rows) for module, weight, rows in pair]
            arrays[names.lora_a(number)], arrays[names.lora_b(number)] = _joined(found, columns, metadata, folder)
    digest = hashlib.sha256()
    for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
        digest.update((folder / name).read_bytes())
    inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    return Adapter(folder, digest.hexdigest(), inputs, sum(array.nbytes for array in arrays.values()))


# --- the folder ---------------------------------------------------------------------------------------------------
def _read_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json. Raises InputError for an adapter that is not plain LoRA."""
    if not folder.is_dir():
        files = f"{names.ADAPTER_CONFIG} and {names.ADAPTER_WEIGHTS}"
        raise MissingFileError(f"no such folder: {folder}; expected one that peft saved, with {files}")
    if not (folder / names.ADAPTER_WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder} has adapter_model.bin, a pickle, which is not read: save the adapter again with "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    config = parse_json(read_bytes(folder / names.ADAPTER_CONFIG, MOST_JSON), folder / names.ADAPTER_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{folder} is an adapter of the type {shown(found)}; LORA was expected: merge it, then export")
    further = next((name for name, value in config.items() if value and name not in _HARMLESS), None)
    if further is None and config.get("init_lora_weights") not in _INITIAL:
        further = "init_lora_weights"
    if further is not None:
        raise InputError(
            f"{folder} is a LoRA adapter with {further} = {shown(config[further])}, which is more than two matrices "
            "per projection: merge it into the model (merge_and_unload), then export"
        )
    return config


def _read_matrices(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[Matrix, Matrix]]:
    """Returns module -> A (r, K), and B (N, r) times the scale. Raises InputError for other tensors."""
    file = folder / names.ADAPTER_WEIGHTS
    with reading(file, "a safetensors file"):
        try:
            header = read_header(file)
        except HeaderError as error:
            raise IntegrityError(f"{file} is damaged: {error}; copy it again") from None
        content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found: dict[str, dict[str, Matrix]] = {}
    for name, tensor in header.items():
        matched = _TENSOR.fullmatch(name)
        if matched is None or len(tensor.shape) != 2 or tensor.dtype not in _DTYPES:
            raise InputError(
                f"{folder} has the tensor {shown(name)}, {tensor.dtype} of {list(tensor.shape)}; only lora_A and "
                "lora_B of linear projections were expected, in F32, F16 or BF16: merge the adapter "
                "(merge_and_unload), then export"
            )
        found.setdefault(matched[1], {})[matched[2]] = _array(tensor, content, start, file)
    with reading(folder / names.ADAPTER_CONFIG, "the configuration of an adapter"):
        alphas = _alphas(dict(config.get("alpha_pattern") or {}), len(found), folder)
    matrices = {}
    for module, pair in found.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            shapes = {f"lora_{side}": list(matrix.shape) for side, matrix in pair.items()}
            raise InputError(f"{folder} has {shapes} of {module}; lora_A (r, K) and lora_B (N, r) were expected")
        matrices[module] = pair["A"], pair["B"] * np.float32(_scale(config, module, len(pair["A"]), alphas, folder))
    if not matrices:
        raise InputError(f"{file} has no tensors: it adapts nothing")
    return matrices


def _array(tensor: StoredTensor, content: bytes, start: int, file: Path) -> Matrix:
    """Returns one tensor as float32. Raises InputError for NaN and infinity."""
    dtype = np.dtype(_DTYPES[tensor.dtype])
    stored = np.frombuffer(content, dtype, tensor.elements, start + tensor.start).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(stored).all():
        raise InputError(f"{file} holds NaN or infinity: its training went wrong")
    return np.ascontiguousarray(stored, np.float32)


def _alphas(given: Mapping[str, Any], modules: int, folder: Path) -> dict[re.Pattern[str], Any]:
    """Returns the alphas of `alpha_pattern`. Raises InputError for a pattern that is not a name."""
    for pattern in given:
        if not _PLAIN.fullmatch(pattern) or len(given) * modules > _MOST_MATCHES:
            raise InputError(
                f"{folder / names.ADAPTER_CONFIG} has the alpha_pattern {shown(pattern)}; names were expected, "
                r"with ^, $, \d, \d+\. or two groups as (k|v): merge the adapter (merge_and_unload), then export"
            )
    return {re.compile(rf"(?:.*\.)?(?:{pattern})$"): alpha for pattern, alpha in given.items()}  # as peft


def _scale(
    config: Mapping[str, Any], module: str, rank: int, alphas: Mapping[re.Pattern[str], Any], folder: Path
) -> float:
    """Returns alpha / r, or alpha / sqrt(r) of rsLoRA. `alphas`: of single modules, of which the first counts."""
    own = (alpha for pattern, alpha in alphas.items() if pattern.match(module))
    alpha = next(own, config.get("lora_alpha", 8))
    if not is_number(alpha):
        raise InputError(f"{folder / names.ADAPTER_CONFIG} has lora_alpha = {shown(alpha)}; a number was expected")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0


# --- the graph ----------------------------------------------------------------------------------------------------
def _placed(
    folder: Path, matrices: dict[str, tuple[Matrix, Matrix]], modules: Sequence[str], bundle: Path
) -> dict[str, tuple[Matrix, Matrix]]:
    """The matrices by the names of the bundle's `modules`. One name may end in the other: wrappers add prefixes.

    Raises InputError if the bundle lacks a module.
    """
    placed = {}
    for module, pair in matrices.items():
        fitting = {m for m in modules if m == module} or {
            m for m in modules if m.endswith(f".{module}") or module.endswith(f".{m}")
        }
        if len(fitting) != 1:
            known = ", ".join(sorted({m.rpartition(".")[2] for m in modules}))
            raise InputError(
                f"{folder} adapts {module!r}, and {bundle} has {len(fitting) or 'no'} projections of that name "
                f"(its projections are {known}): use an adapter of the model that the bundle was made from"
            )
        placed[fitting.pop()] = pair
    return placed


def _joined(
    parts: Sequence[tuple[tuple[Matrix, Matrix] | None, str, int]],
    columns: int,
    metadata: Mapping[str, str],
    folder: Path,
) -> tuple[Matrix, Matrix]:
    """A (K, R) and B (R, N) of a matrix that one or more projections were merged into; R is the sum of their ranks.

    `parts`: A and B, or None, the weight, and N of each projection.
    """
    # A matrix that is not adapted has rank 1 and zeros: older releases of onnxruntime compute nothing of rank 0.
    rank = max(1, sum(len(pair[0]) for pair, _, _ in parts if pair is not None))
    a, b = np.zeros((columns, rank), np.float32), np.zeros((rank, sum(rows for _, _, rows in parts)), np.float32)
    low = first = 0
    for pair, weight, rows in parts:
        if pair is not None:
            found = (pair[0].shape[1], pair[1].shape[0])
            if found != (columns, rows):
                raise InputError(
                    f"{folder} adapts {weight} as a matrix of {found[1]} x {found[0]}; it has {rows} x {columns}: use "
                    "an adapter of the model that the bundle was made from"
                )
            sides = _follow(pair, weight, metadata)
            a[:, low : low + len(sides[0])] = sides[0].T
            b[low : low + len(sides[0]), first : first + rows] = sides[1].T
            low += len(sides[0])
        first += rows
    return a, b


def _follow(pair: tuple[Matrix, Matrix], weight: str, metadata: Mapping[str, str]) -> tuple[Matrix, Matrix]:
    """Applies the changes that calibration made to the channels of a weight."""
    a, b = pair
    for side, kind, key in json.loads(metadata.get(f"{names.CHANGES_PREFIX}{weight}", "[]")):
        content = base64.b64decode(metadata[f"{names.CHANNELS_PREFIX}{key}"])
        numbers = np.frombuffer(content, "<f4" if kind == "scaled" else "<i4")
        if side == "input":
            a = changed(a, 1, kind, numbers)
        else:
            b = changed(b, 0, kind, numbers)
    return a, b
