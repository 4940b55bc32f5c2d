"""`pastkey devices`: the execution providers, with the wheels and devices of those that are here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
from dataclasses import dataclass

from pastkey.command import Command, print_json, print_table, say
from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS, Provider


@dataclass(frozen=True)
class DeviceLine:
    """One line of `pastkey devices`."""

    short_name: str
    name: str  # onnxruntime's name
    hardware: str
    available: bool
    note: str  # how to install it if absent, or why it cannot be used, else ""
    package: str = ""  # the installed wheel and its version, whether or not it can be used
    devices: tuple[str, ...] = ()  # those that it found, where it tells


def devices() -> list[DeviceLine]:
    """The execution providers that are known, and those that this onnxruntime has beyond them.

    Returns:
        One line for each; available ones first.
    """
    from ..providers import ort
    from ..providers import placement as ep

    def here(short: str, known: Provider) -> DeviceLine:
        package, version = ort.wheels()[0], ort.onnxruntime.__version__
        if ep.is_plugin(known.name):
            package = known.plugin.replace("_", "-")
            version = importlib.metadata.version(package)
        try:
            found, note = _devices(known.name), ""
        except ProviderError as error:  # a plugin whose library does not load, or finds no hardware
            found, note = (), str(error)
        return DeviceLine(short, known.name, known.hardware, not note, note, f"{package} {version}", found)

    names = ep.available()
    rows = [
        here(short, known)
        if known.name in names
        else DeviceLine(short, known.name, known.hardware, False, ep.what_brings(known))
        for short, known in PROVIDERS.items()
    ]
    further = [name for name in names if name not in {known.name for known in PROVIDERS.values()}]
    rows += [here(ep.short_name(name), Provider(name)) for name in further]
    return sorted(rows, key=lambda device: not device.available)


def _devices(name: str) -> tuple[str, ...]:
    """As in ("CPU of Intel",): onnxruntime's words for its devices; "" for most built-in ones."""
    from ..providers import ort
    from ..providers import placement as ep

    if ep.is_plugin(name):
        with ort.standard_output_to_error():
            found = ep.plugin_devices(name)
    else:
        found = [device for device in ort.onnxruntime.get_ep_devices() if device.ep_name == name]
    if not found and name == PROVIDERS["openvino"].name:
        return ort.openvino_devices()
    shown = (f"{device.device.type.name} of {device.device.vendor or 'an unnamed vendor'}" for device in found)
    return tuple(dict.fromkeys(shown))


# --- the command --------------------------------------------------------------------------------------------------
def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _told(row: DeviceLine) -> str:
    found = [f"devices {', '.join(row.devices)}"] if row.devices else []
    told = [row.package, *found] if row.available else [row.note if row.package else f"comes with {row.note}"]
    return "; ".join([row.hardware, *told])


def _run(arguments: argparse.Namespace) -> int:
    from ..providers.native import native_kernels
    from ..providers.ort import onnxruntime
    from ..providers.placement import overlapping

    rows, native = devices(), native_kernels()
    if arguments.json:
        print_json(
            {
                "onnxruntime": onnxruntime.__version__,
                "devices": [dataclasses.asdict(row) for row in rows],
                "native_kernels": None if native is None else dataclasses.asdict(native),
            }
        )
        return 0
    print(f"onnxruntime {onnxruntime.__version__}")
    print_table(
        ("provider", "", "hardware"),
        *((row.short_name, "available" if row.available else "absent", _told(row)) for row in rows),
    )
    if native is not None:
        slow = ": by default onnxruntime's run, which read prompts faster" if native.slow else ""
        print(f"native kernels: {native.refused or f'{native.version}, {native.level}{slow}'}")
    if sentence := overlapping():
        say(f"note: {sentence}")
    return 0


devices_command = Command(_add_arguments, _run)
