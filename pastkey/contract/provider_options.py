"""The options of execution providers that a bundle's manifest may set, and their values.

An option reaches the provider's own code, and some of them load a library, write files, or use an address of this
process (`backend_path` and `op_packages` of QNN, `cache_dir` of OpenVINO, `gpu_external_alloc` of CUDA). A manifest may
be untrusted, so it may set only `manifest_options` of the provider's row in `pastkey/providers.py`: numbers and fixed
words. Options that the user gives to `load` or with --provider-option are not restricted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import IntegrityError
from ..providers import PROVIDERS
from ..values import shown


def in_manifest(provider: str, options: Mapping[str, str]) -> dict[str, str]:
    """Returns the `options` that a manifest may set for a provider, given by its short name."""
    return {name: value for name, value in options.items() if _may_set(provider, name, value)}


def not_kept(provider: str, options: Mapping[str, str]) -> str:
    """Returns a sentence that names the `options` that a manifest may not set; "" if there are none."""
    kept = in_manifest(provider, options)
    left = ", ".join(name for name in options if name not in kept)
    return left and (
        f"the bundle does not keep the provider options {left}, which no bundle may set: give them with "
        "--provider-option wherever it runs"
    )


def require_in_manifest(provider: str, options: Mapping[str, str], where: object) -> None:
    """Raises IntegrityError for an option in the manifest at `where` that a manifest may not set."""
    for name, value in options.items():
        if not _may_set(provider, name, value):
            raise IntegrityError(
                f"{where} sets {shown(name)} to {shown(value)} for the execution provider {shown(provider)}, and a "
                "bundle may not, since such options can load code or write files: export the model again if the bundle "
                "is yours, and do not use it otherwise"
            )


def _may_set(provider: str, name: str, value: str) -> bool:
    values = PROVIDERS[provider].manifest_options.get(name, ()) if provider in PROVIDERS else ()
    if isinstance(values, range):
        return re.fullmatch("[0-9]{1,19}", value) is not None and int(value) in values
    if isinstance(values, re.Pattern):
        return values.fullmatch(value) is not None
    return value in values
