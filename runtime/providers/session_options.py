"""The user's onnxruntime session options.

A name with a dot, "session.use_env_allocators", is a configuration entry. Any other name, "enable_cpu_mem_arena", is an
attribute of onnxruntime.SessionOptions. Values are onnxruntime's, or texts of them from the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pastkey.errors import InputError, first_line
from pastkey.values import shown

from .ort import onnxruntime

WHOLE = "session.disable_cpu_ep_fallback"
RECORD = "session.record_ep_graph_assignment_info"
# Options that pastkey sets, and the alternative.
_OURS = {
    WHOLE: "let the CPU run the other operators with allow_fallback=True, or --allow-fallback",
    RECORD: "pastkey reads there which operators run on the CPU",
    "intra_op_num_threads": "give threads=N, or --threads N",
    "session.model_external_initializers_file_folder_path": "weights are next to their graph",
}
_TEXTS = {"1": True, "true": True, "0": False, "false": False}


def require_free(given: Mapping[str, Any]) -> None:
    """Raises InputError for a session option that pastkey sets itself."""
    for name in given:
        if name in _OURS:
            raise InputError(f"the session option {name} is set by pastkey: leave it out; {_OURS[name]}")


def set_options(options: Any, given: Mapping[str, Any]) -> None:
    """Sets the options of an onnxruntime.SessionOptions. Raises InputError for an unknown name or a wrong value."""
    for name, value in given.items():
        try:
            if "." in name:
                options.add_session_config_entry(name, value)
            else:
                setattr(options, name, _value(value, getattr(options, name)))
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            default = f"; the default is {getattr(options, name)}" if hasattr(options, name) else ""
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} does not accept the session option {name:.60} with the value "
                f"{shown(value)} ({first_line(error)}){default}"
            ) from None


def _value(value: Any, now: Any) -> Any:
    """Converts a text, as the command line has it, to the type of the value `now`."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str) or isinstance(now, str):
        return value
    if isinstance(now, bool):
        return _TEXTS[value.lower()]
    return int(value) if isinstance(now, int) else getattr(type(now), value)
