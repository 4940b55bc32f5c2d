"""Selects execution providers, onnxruntime's hardware back ends, by short names and without silent fallback."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pastkey.contract.bundle import Compiled, Manifest
from pastkey.errors import ProviderError, StartError, first_line
from pastkey.providers import PROVIDERS, TARGETS, Provider, short_name
from pastkey.values import shown

from ..options import Choice
from .ort import onnxruntime, wheels

CPU = PROVIDERS["cpu"].name

# It calls a remote service with graphs made for it. A decoder would run on the CPU silently.
_NOT_HARDWARE = {"AzureExecutionProvider"}


@dataclass(frozen=True)
class Placement:
    """Where a session runs."""

    providers: tuple[tuple[str, dict[str, Any]], ...]  # onnxruntime's names and their options, in order of preference
    whole: bool = False  # the CPU may not run any operator

    @property
    def tells(self) -> bool:
        """Whether to report operators left to the CPU."""
        return self.providers[0][0] != CPU and not self.whole


def resolve(
    choice: Choice | Sequence[Choice] | None,
    target: str = "cpu",
    graph: str = "standard",
    *,
    allow_fallback: bool = False,
    options_of_target: Mapping[str, str] | None = None,
) -> Placement:
    """Selects the providers of a session.

    Args:
        choice: A short name ("cuda"), onnxruntime's name, a pair of a name and its options, a sequence of these, or
            None for the bundle's target. A sequence with "cpu" lets the CPU run the remaining operators.
        target: The bundle's target.
        graph: The bundle's graph.
        allow_fallback: Whether the CPU may run operators that the provider does not run.
        options_of_target: The bundle's options for the provider of its target.

    Raises:
        ProviderError: A provider is not available, has no such option value, or does not support the fused graph.
    """
    if choice is None:
        choice = provider_of(target)
        reason = f"the bundle was made for {target}; "
    else:
        reason = ""
    # mypy does not narrow by `_is_pair`.
    choices: Sequence[Choice] = [choice] if isinstance(choice, str) or _is_pair(choice) else choice  # type: ignore[list-item, assignment]
    here = available()
    chosen: dict[str, dict[str, Any]] = {}
    for entry in choices:
        asked, options = (entry, {}) if isinstance(entry, str) else entry
        name = full_name(asked)
        if name not in here:
            known = PROVIDERS.get(short_name(name)) if name else None
            what = f"the execution provider {shown(asked)} " + ("is not on this machine" if known else "is unknown")
            remedy = f"; it comes with {what_brings(known)}" if known else f"; known are {', '.join(PROVIDERS)}"
            raise ProviderError(f"{reason}{what}; here: {', '.join(map(short_name, here))}{remedy}")
        row = row_of(name)
        if graph == "fused" and graph not in row.graphs:
            remedy = f", or {row.remedy}" if row.remedy else ""
            raise ProviderError(
                f"{reason}this bundle has the fused graph, which is not known to run on the execution provider "
                f"{asked!r}: use the provider 'cpu'{remedy}"
            )
        own = options_of_target or {} if row.short == provider_of(target) else {}
        chosen[name] = {**row.options, **own, **options}
        require_values(row, chosen[name])
    first = next(iter(chosen), CPU)
    graphs = row_of(first).whole
    # A graph that was made for this provider may run in part on the CPU.
    foreign = bool(graphs) and short_name(first) != provider_of(target)
    whole = first != CPU and CPU not in chosen and not allow_fallback and (graph in graphs or foreign)
    if not whole:
        chosen.setdefault(CPU, {})
    return Placement(tuple(chosen.items()), whole)


def for_bundle(
    manifest: Manifest, choice: Choice | Sequence[Choice] | None, *, allow_fallback: bool = False
) -> Placement:
    """As `resolve`, for a bundle: None means the provider that it is compiled for, or its target. Raises as both."""
    if manifest.compiled is not None:
        choice = for_compiled(choice, manifest.compiled)
    options, target, graph = manifest.provider_options, manifest.target, manifest.graph
    return resolve(choice, target, graph, allow_fallback=allow_fallback, options_of_target=options)


def require_values(row: Provider, options: Mapping[str, Any]) -> None:
    """Raises ProviderError for an option value that the provider does not have."""
    for option, values in row.values.items():
        if str(found := options.get(option, values[0])) not in values:
            raise ProviderError(
                f"the execution provider {row.short!r} has no {option} {found}; it must be one of {', '.join(values)}"
            )


def for_compiled(choice: Choice | Sequence[Choice] | None, compiled: Compiled) -> Choice:
    """The provider and options that context binaries were compiled for. Raises ProviderError if `choice` differs."""
    choices = [choice] if choice is None or isinstance(choice, str) or _is_pair(choice) else [*choice]
    first = choices[0] if choices else None
    asked, options = first if isinstance(first, tuple) else (first or compiled.provider, {})
    again = "load the bundle that it was made from, or compile that again"
    if full_name(asked) != full_name(compiled.provider):
        raise ProviderError(f"this bundle was compiled for {compiled}, and {asked!r} was asked for: {again}")
    for key, value in options.items():
        if key in compiled.options and str(value) != compiled.options[key]:
            raise ProviderError(f"this bundle was compiled for {compiled}, and {key}={value} was asked for: {again}")
    return compiled.provider, {**compiled.options, **options}


def _is_pair(choice: object) -> bool:
    return isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], dict)


def overlapping() -> str:
    """The message about several installed wheels of onnxruntime; "" for one."""
    found = wheels()
    if len(found) == 1:
        return ""
    return (
        f"the packages {', '.join(found)} overwrite one another, and the first one is imported: type  "
        f"pip uninstall {' '.join(found)}  and then  pip install  with the one that you want"
    )


def what_brings(known: Provider) -> str:
    """The command that installs a provider. It first removes the wheels whose files its wheel would overwrite."""
    named = re.findall(r"onnxruntime[\w-]*", known.source) if known.source.startswith("pip install ") else []
    wanted = {package for package in named if package != known.plugin.replace("_", "-")}  # a plugin overwrites none
    others = bool(wanted) and not wanted.issuperset(wheels())
    return f"pip uninstall {' '.join(wheels())}  and then  {known.source}" if others else known.source


def provider_of(target: str) -> str:
    """The short name of the default provider of a bundle made for `target`."""
    return TARGETS.get(target, PROVIDERS["cpu"]).short


def other_graph(name: str, manifest: Manifest) -> str:
    """The export to make instead for a provider that computes a bundle's graph wrong, in the same precision."""
    if manifest.graph != "fused":
        return "report the device to https://github.com/microsoft/onnxruntime/issues"
    other = "static" if "static" in row_of(name).whole and manifest.precision == "fp32" else "standard"
    target = provider_of(name)
    return f"export the model again with --target {target} --graph {other} --precision {manifest.precision}"


def require_active(wanted: Placement, active: Sequence[str]) -> None:
    """Raises StartError if onnxruntime opened a session without a requested provider."""
    for name, _ in wanted.providers:
        if name not in active:
            raise not_started(name, active)


def not_started(name: str, active: Sequence[str]) -> StartError:
    """The error for a provider that did not start; `active`: those that did."""
    return StartError(
        f"onnxruntime could not start the execution provider {short_name(name)!r}, because a driver or a library is "
        f"missing (its own message says which); ask for one that starts: {', '.join(map(short_name, active))}"
    )


def remedy(name: str, target: str) -> str:
    """The advice if a provider (short name) does not run a bundle made for `target`; "" if unknown."""
    again = "export the model again if an older pastkey wrote this bundle"
    return again if provider_of(target) == name else row_of(name).remedy


def counted(operators: Mapping[str, int]) -> str:
    """Formats "3 operators (Shape 2, Squeeze)"."""
    most = Counter(operators).most_common()
    shown = ", ".join(f"{name} {count}" if count > 1 else name for name, count in most[:6])
    number = sum(operators.values())
    return f"{number} operator{'s' * (number != 1)} ({shown}{', ...' * (len(most) > 6)})"


def available() -> list[str]:
    """onnxruntime's names of its providers and of installed plugins."""
    own = [name for name in onnxruntime.get_available_providers() if name not in _NOT_HARDWARE]
    # onnxruntime also lists a plugin once it is registered.
    plugins = [known.name for known in PROVIDERS.values() if known.name not in own and is_plugin(known.name)]
    return [*plugins, *own]


def is_plugin(name: str) -> bool:
    """Whether a provider is a plugin whose package is installed."""
    module = row_of(name).plugin
    return bool(module) and _installed(module)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def plugin_devices(name: str) -> list[Any]:
    """The devices of a plugin, as onnxruntime's OrtEpDevice. Raises ProviderError if it has none."""
    _register(name)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise ProviderError(f"the execution provider {short_name(name)!r} finds none of its devices on this machine")
    return devices


@functools.cache
def _register(name: str) -> None:
    """Registers a plugin with onnxruntime, once per process."""
    if any(device.ep_name == name for device in onnxruntime.get_ep_devices()):  # an application registered it already
        return
    module = row_of(name).plugin
    try:
        library = importlib.import_module(module).get_library_path()
        onnxruntime.register_execution_provider_library(name, library)
    except Exception as error:  # its package or library may raise anything
        raise ProviderError(
            f"the execution provider {short_name(name)!r} of the package {module!r} could not be loaded "
            f"({first_line(error)}): install a release that goes with onnxruntime {onnxruntime.__version__}"
        ) from error


def row_of(name: str) -> Provider:
    """The row of a provider by either of its names; an empty row if it is not in the table."""
    return PROVIDERS.get(short_name(name)) or Provider(name)


def full_name(name: str) -> str:
    """onnxruntime's name of a provider, or "" if unknown. Case-insensitive."""
    wanted = name.lower().removesuffix("executionprovider")
    by_name = {short_name(full): full for full in available()}
    return PROVIDERS[wanted].name if wanted in PROVIDERS else by_name.get(wanted, "")
