"""How calibration changed the channels of a float32 graph's matrices, in the metadata of the graph.

Adapters follow these changes. Graphs of a bundle have the metadata only if they support adapters.
"""

from __future__ import annotations

import base64
import hashlib
import json

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.runtime.engine.channels import Kind

SCALED = ".scaled_"  # behind the name of a matrix that is changed for one of its readers; a number follows
INPUT, OUTPUT = "input", "output"  # sides of a matrix (N, K): K and N

Change = tuple[str, Kind, np.ndarray]  # the side, and the arguments of `channels.changed`


def changes_of(model: ir.Model, name: str) -> str:
    """Returns the entry of a matrix, "[]" if it was not changed."""
    return str(model.metadata_props.get(f"{names.CHANGES_PREFIX}{name}", "[]"))


def record_change(model: ir.Model, name: str, before: str, change: Change) -> None:
    """Adds a change of a matrix to those that it has had `before`. Equal numbers are stored once."""
    side, kind, numbers = change
    content = numbers.astype("<f4" if kind == "scaled" else "<i4").tobytes()
    key = hashlib.sha256(content).hexdigest()[:16]
    model.metadata_props[f"{names.CHANNELS_PREFIX}{key}"] = base64.b64encode(content).decode()
    model.metadata_props[f"{names.CHANGES_PREFIX}{name}"] = json.dumps([*json.loads(before), [side, kind, key]])


def take_changes(model: ir.Model) -> dict[str, str]:
    """Removes all changes from a graph's metadata and returns them."""
    found = [key for key in model.metadata_props if key.startswith((names.CHANGES_PREFIX, names.CHANNELS_PREFIX))]
    return {key: model.metadata_props.pop(key) for key in found}
