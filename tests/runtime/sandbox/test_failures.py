from __future__ import annotations

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.sandbox.failures import failure_of


def test_errors_by_their_kind() -> None:
    assert failure_of(InputError("odd \ud800")) == {"kind": "InputError", "sentence": "odd ?"}
    assert failure_of(InputError("no token covers 'out of memory'"))["kind"] == "InputError"
    assert failure_of(MemoryError()) == {"kind": "memory", "sentence": "MemoryError"}
    assert failure_of(IntegrityError("cannot load: std::bad_alloc"))["kind"] == "memory"
    assert failure_of(RuntimeError("can't start new thread"))["kind"] == "memory"
    assert failure_of(KeyError("x")) == {"kind": "fault", "sentence": "KeyError: 'x'"}
