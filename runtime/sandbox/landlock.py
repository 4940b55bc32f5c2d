"""Landlock: a Linux process gives up rights to files and networks, by three system calls, for good.

Everything is denied that no rule allows. Rights to a file are decided when it is opened: descriptors stay as they are.
See the manual page landlock(7), and Documentation/userspace-api/landlock.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# The same numbers on every architecture that Python has wheels for.
CREATE_RULESET: Final = 444
ADD_RULE: Final = 445
RESTRICT_SELF: Final = 446
_VERSION: Final = 1  # a flag of CREATE_RULESET: tell the ABI
_PATH_BENEATH: Final = 1  # a kind of rule
_NO_NEW_PRIVS: Final = 38  # of prctl

# Rights to files, by their bits.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14
READ: Final = READ_FILE | READ_DIR
WRITE: Final = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE
_OF_A_FILE: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights in a rule of a file
_TCP: Final = 0b11  # to bind, to connect
_SCOPES: Final = 0b11  # no abstract socket, and no signal, to a process outside
_NO_TCP_BEFORE, _NO_SCOPE_BEFORE = 4, 6  # ABI


def abi() -> int:
    """The version of landlock that this kernel has, 0 where there is none, or a container denies it."""
    if sys.platform != "linux":
        return 0
    return max(0, _syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))


def handled(version: int) -> tuple[int, int, int]:
    """The rights that a ruleset of this ABI can deny: rights to files, rights to networks, scopes."""
    files = 13 + (version >= 2) + (version >= 3) + (version >= 5)  # REFER, TRUNCATE, IOCTL_DEV came one by one
    return (
        (1 << files) - 1,
        _TCP if version >= _NO_TCP_BEFORE else 0,
        _SCOPES if version >= _NO_SCOPE_BEFORE else 0,
    )


def denies_tcp(version: int) -> bool:
    """Whether this ABI denies TCP."""
    return version >= _NO_TCP_BEFORE


def restrict(rights: Iterable[tuple[Path, int]]) -> int:
    """Denies this thread, and those that it starts from now on, all files but these.

    Args:
        rights: Paths, and the rights at each and below it. A path that does not exist is skipped.

    Returns:
        The ABI, or 0 where nothing was denied since there is no landlock.

    Raises:
        OSError: The kernel has landlock and rejects a rule.
    """
    version = abi()
    if not version:
        return 0
    files, network, scopes = handled(version)
    # struct landlock_ruleset_attr; an older kernel reads a shorter one, or zeros behind it.
    attributes = struct.pack("=QQQ", files, network, scopes)
    ruleset = _checked(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for path, allowed in rights:
            _allow(ruleset, path, allowed & files)
        no_new_privileges()
        _checked(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version


def no_new_privileges() -> None:
    """From now on no program that this thread starts has more rights than it, whoever owns the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise _last_error()


def _allow(ruleset: int, path: Path, allowed: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not path.is_dir():
            allowed &= _OF_A_FILE
        # struct landlock_path_beneath_attr, packed
        rule = struct.pack("=Qi", allowed, place)
        _checked(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return int(libc.syscall(ctypes.c_long(number), *arguments))


def _checked(number: int, *arguments: object) -> int:
    found = _syscall(number, *arguments)
    if found < 0:
        raise _last_error()
    return found


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"landlock: {os.strerror(code)}")
