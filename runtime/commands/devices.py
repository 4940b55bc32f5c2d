"""What `pastkey devices` lists: the execution providers, with the wheels and devices of those that are here."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS, Provider

from ..providers.ort import onnxruntime, openvino_devices, standard_output_to_error, wheels
from ..providers.placement import available, is_plugin, plugin_devices, short_name, what_brings


@dataclass(frozen=True)
class Device:
    """One line of `pastkey devices`."""

    short_name: str
    name: str  # onnxruntime's name
    hardware: str
    available: bool
    note: str  # what brings it when it is absent, or why it cannot be used, else ""
    package: str = ""  # the wheel that brought it and its version, whether or not it can be used
    devices: tuple[str, ...] = ()  # those that it found, where it tells


def devices() -> list[Device]:
    """The execution providers that are known, and those that this onnxruntime has beyond them.

    Returns:
        One Device for each; available ones first.
    """
    here = available()
    rows = [
        _here(short, known)
        if known.name in here
        else Device(short, known.name, known.hardware, False, what_brings(known))
        for short, known in PROVIDERS.items()
    ]
    known_names = {known.name for known in PROVIDERS.values()}
    rows += [_here(short_name(name), Provider(name)) for name in here if name not in known_names]
    return sorted(rows, key=lambda device: not device.available)


def _here(short: str, known: Provider) -> Device:
    try:
        found, note = _devices(known.name), ""
    except ProviderError as error:  # a plugin whose library does not load, or finds no hardware
        found, note = (), str(error)
    return Device(short, known.name, known.hardware, not note, note, _package(known), found)


def _devices(name: str) -> tuple[str, ...]:
    """As in ("CPU of Intel",): what onnxruntime 1.23 and later says of its devices; nothing of most built-in ones."""
    if is_plugin(name):
        with standard_output_to_error():
            found = plugin_devices(name)
    else:
        list_them = getattr(onnxruntime, "get_ep_devices", list)
        found = [device for device in list_them() if device.ep_name == name]
    if not found and name == PROVIDERS["openvino"].name:
        return openvino_devices()
    shown = (f"{device.device.type.name} of {device.device.vendor or 'an unnamed vendor'}" for device in found)
    return tuple(dict.fromkeys(shown))


def _package(known: Provider) -> str:
    if is_plugin(known.name):
        package = known.plugin.replace("_", "-")
        return f"{package} {importlib.metadata.version(package)}"
    return f"{wheels()[0]} {onnxruntime.__version__}"
