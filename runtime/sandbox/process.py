"""Starting the process of an untrusted bundle: by the same Python, without its environment, its paths, its terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pastkey
from pastkey.errors import UntrustedBundleError

if sys.platform != "win32":
    import fcntl

# -I and -S leave out the current folder, and those of a user or a site: imports come from where `libraries` says.
BOOT: Final = (
    "import json, sys; sys.path += json.loads(sys.argv[1]); "
    "from pastkey.runtime.sandbox.child import main; main(int(sys.argv[2]))"
)
# The process imports these. It may read their folders in addition to Python itself and the bundle.
_PACKAGES: Final = (
    "numpy", "onnxruntime", "tokenizers", "jinja2", "markupsafe", "llguidance", "cryptography", "cffi",
    "starlette", "uvicorn", "h11", "pydantic", "pydantic_core", "prometheus_client", "anyio", "click",
)  # fmt: skip
# Of the environment it gets only these: no key, no address, no home.
_KEPT: Final = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT", "PASTKEY_TRACEBACK")
_KEPT_PREFIXES: Final = ("OMP_", "OPENBLAS_", "MKL_", "TOKENIZERS_", "RAYON_")


def started(name: str, descriptors: Sequence[int] = ()) -> tuple[subprocess.Popen[bytes], int | None]:
    """The process, and a descriptor whose other end it holds: it ends with this one's last breath.

    It inherits `descriptors`. Raises UntrustedBundleError, which calls the bundle `name`, or OSError.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise UntrustedBundleError(
            f"the untrusted bundle {name} needs a separate process, and this program has no Python to start one "
            "with: load it from a program that Python runs"
        )
    own, lifeline = (None, None) if sys.platform == "win32" else _lifeline()
    environment = {name: value for name, value in os.environ.items() if _is_kept(name)}
    flags = ["-I", "-S", "-B", "-X", "utf8"]
    try:
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", BOOT, json.dumps(libraries()[0]), str(own or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if "PASTKEY_TRACEBACK" in environment else subprocess.DEVNULL,
            cwd=os.sep,
            env={**environment, "ORT_DISABLE_TELEMETRY": "1", "PASTKEY_NATIVE": "0"},
            pass_fds=(*descriptors, *(() if own is None else (own,))),
            start_new_session=True,  # no terminal, and Ctrl-C only from the parent
        )
    except OSError:
        if lifeline is not None:
            os.close(lifeline)
        raise
    finally:
        if own is not None:
            os.close(own)
    return process, lifeline


def _lifeline() -> tuple[int, int]:
    """A pipe whose first end the process inherits: not as its standard input or output, where this one has none."""
    own, lifeline = os.pipe()
    if own <= 2:
        low, own = own, fcntl.fcntl(own, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    return own, lifeline


def _is_kept(name: str) -> bool:
    return name in _KEPT or name.startswith(_KEPT_PREFIXES)


def libraries() -> tuple[list[str], list[list[str]]]:
    """The folders to import from, and the parts that may be read.

    Returns:
        Folders for `sys.path`, first that of this pastkey; and pairs of a path and "read" or "list".
    """
    runtime = Path(__file__).resolve().parent.parent
    packages = [Path(pastkey.__file__).resolve().parent, runtime, runtime.with_name("serve")]
    roots = [str(packages[0].parent)]
    rights = [[str(package), "read"] for package in packages]
    for name in _PACKAGES:
        found = importlib.util.find_spec(name)
        for place in (found.submodule_search_locations if found is not None else None) or ():
            root = Path(place).parent
            if str(root) not in roots:
                roots.append(str(root))
            # Next to a package are its libraries (numpy.libs). A user's own folder may have anything else.
            site = root.name in ("site-packages", "dist-packages")
            rights += (
                [[str(root), "read"]] if site else [[str(root), "list"], [place, "read"], [f"{place}.libs", "read"]]
            )
    return roots, rights
