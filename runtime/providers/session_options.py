"""What a user sets of onnxruntime's session options, beside what pastkey sets itself.

A name with a dot is a configuration entry, "session.use_env_allocators", and any other one an attribute of
onnxruntime.SessionOptions, "enable_cpu_mem_arena". Values are what onnxruntime takes, or texts of them, as the command
line has them.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping
from typing import Any

from pastkey.errors import InputError, first_line
from pastkey.values import is_int, shown

from .ort import onnxruntime

WHOLE = "session.disable_cpu_ep_fallback"
RECORD = "session.record_ep_graph_assignment_info"  # from onnxruntime 1.24 on, which ignores what it does not know
# What pastkey sets, and what to do instead.
_OURS = {
    WHOLE: "let the CPU run what a provider leaves with allow_fallback=True, or --allow-fallback",
    RECORD: "what a provider leaves is told by it",
    "intra_op_num_threads": "give threads=N, or --threads N",
    "session.model_external_initializers_file_folder_path": "weights stand beside their graph",
}
_PROFILE = dict.fromkeys(("enable_profiling", "profile_file_prefix"), "the run is profiled already")
_TEXTS = {"1": True, "true": True, "0": False, "false": False}


def require_free(given: Mapping[str, Any], *, profiled: bool = False) -> None:
    """Raises InputError for a session option that pastkey sets itself; `profiled`: for a session that is profiled."""
    ours = _OURS | _PROFILE if profiled else _OURS
    for name in given:
        if name in ours:
            raise InputError(f"the session option {name} is set by pastkey: leave it out; {ours[name]}")


def set_options(options: Any, given: Mapping[str, Any]) -> None:
    """Sets the options of an onnxruntime.SessionOptions. Raises InputError for one that is none, or another value."""
    for name, value in given.items():
        if "." not in name:
            setattr(options, name, _value(name, value, _attribute(options, name)))
            continue
        if not isinstance(value, str):
            raise _wrong(name, value, 'a text, such as "1",')
        try:
            options.add_session_config_entry(name, value)
        except RuntimeError as error:
            raise InputError(f"onnxruntime does not take the session option {name:.60}: {first_line(error)}") from None


def _attribute(options: Any, name: str) -> Any:
    """Its value now."""
    kind = type(options)
    known = [one for one in dir(kind) if isinstance(getattr(kind, one), property)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} has no session option {name:.60}; "
            + (f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}, and entries with a dot in the name")
        )
    return getattr(options, name)


def _value(name: str, value: Any, now: Any) -> Any:
    """`value` as the type of `now`. Raises InputError where it is none."""
    if isinstance(now, bool):
        found = _TEXTS.get(value.lower()) if isinstance(value, str) else value
        if isinstance(found, bool):
            return found
        raise _wrong(name, value, "True or False, or 1 or 0 as a text,")
    if isinstance(now, int):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = int(value)
        if is_int(value, -(2**31), 2**31 - 1):
            return value
        raise _wrong(name, value, "a whole number")
    if isinstance(now, str):
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
        raise _wrong(name, value, "a text")
    if isinstance(value, type(now)):
        return value
    members: Mapping[str, Any] = type(now).__members__
    if isinstance(value, str) and value in members:
        return members[value]
    raise _wrong(name, value, f"one of {', '.join(members)}")


def _wrong(name: str, value: object, expected: str) -> InputError:
    return InputError(f"the session option {name:.60} is {shown(value)}; {expected} was expected")
