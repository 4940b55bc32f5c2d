"""`pastkey serve`: opens the port, loads the bundle, and answers until it is told to end."""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pastkey.command import Command, byte_count, finite_float, key_value, natural_int, placement_of, positive_int, say
from pastkey.errors import InputError, PastkeyError
from pastkey.files.folder import read_text
from pastkey.runtime.commands.flags import add_bundle, add_device, add_draft, limits_of

from .settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from pastkey.runtime import LanguageModel

KEY = "PASTKEY_API_KEY"
_DEFAULT = ServerSettings()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add = parser.add_argument_group("address and access").add_argument
    add("--host", metavar="ADDRESS", default=_DEFAULT.host, help="address to listen on")
    add("--port", metavar="N", type=natural_int, default=_DEFAULT.port, help="port, 0 for a free one")
    add("--api-key-file", metavar="FILE", help=f"keys that requests must have, one a line (or in ${KEY})")
    add("--insecure", action="store_true", help="let other machines ask without a key")
    add("--allow-host", metavar="NAME", action="append", default=[], help="a further name in the Host header")
    meaning = "an origin of web pages that may ask"
    add("--allow-origin", metavar="ORIGIN", type=str.lower, action="append", default=[], help=meaning)
    add("--access-log", action="store_true", help="print a line for each request")

    add = parser.add_argument_group("requests").add_argument
    for flag, setting, metavar, kind, what in (
        ("--max-concurrency", "max_concurrency", "N", positive_int, "requests decoded together"),
        ("--max-queue", "max_queue", "N", natural_int, "requests that wait; more get 429"),
        ("--timeout", "timeout", "SECONDS", finite_float, "longest time of a request"),
        ("--drain", "drain_seconds", "SECONDS", finite_float, "time to end after SIGTERM"),
    ):
        add(flag, dest=setting, metavar=metavar, type=kind, default=getattr(_DEFAULT, setting), help=what)
    add("--max-memory", metavar="BYTES", type=byte_count, help="limit of all KV caches (default: none)")
    meaning = "option of requests that do not set it, instead of the model's own: temperature=0.7, max_new_tokens=512"
    add("--default", metavar="NAME=JSON", dest="defaults", type=key_value, action="append", default=[], help=meaning)

    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--alias", metavar="NAME", action="append", help="name of the model; may be repeated (default: the folder's)")
    add_draft(models)
    meaning = "LoRA adapter, for requests with this model name; may be repeated"
    repeated: dict[str, Any] = {"type": key_value, "action": "append", "default": []}
    add("--adapter", metavar="NAME=FOLDER", dest="adapters", **repeated, help=meaning)
    add_device(parser)


def settings_of(arguments: argparse.Namespace, **further: Any) -> ServerSettings:
    """The settings that the flags make, and further ones. Raises InputError."""
    same = ("host", "port", "insecure", "access_log", "max_concurrency", "max_queue", "timeout", "drain_seconds")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in same} | {"keys": _keys(arguments.api_key_file)}
    return ServerSettings(
        **given | further,
        names=tuple(arguments.alias or [Path(arguments.bundle).resolve().name]),
        adapters=tuple(name for name, _ in arguments.adapters),
        allow_hosts=tuple(arguments.allow_host),
        allow_origins=tuple(arguments.allow_origin),
        defaults=_defaults(arguments.defaults),
    )


def _keys(file: str | None) -> tuple[str, ...]:
    text = os.environ.get(KEY, "") if file is None else read_text(Path(file))
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise InputError(f"{file} has no key: write one in a line")
    return keys


def _defaults(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    from pastkey.runtime import ChatOptions
    from pastkey.runtime.options import require_valid

    found: dict[str, Any] = {}
    for name, text in pairs:
        if name not in ChatOptions.__optional_keys__:
            raise InputError(f"--default {name}={text} was given; docs/output.md lists the names of options")
        try:
            found[name] = json.loads(text)
        except ValueError:
            raise InputError(f"--default {name}={text} was given; a JSON value was expected") from None
    require_valid(found)
    return found


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises InputError for a port in use, or an address that is not this machine's."""
    if port > 65535:  # getaddrinfo would use the rest of a division
        raise InputError(f"cannot listen on {host} port {port}: a port is at most 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        why = "another program listens there" if error.errno == errno.EADDRINUSE else error
        raise InputError(
            f"cannot listen on {host} port {port} ({why}): choose another one with --port or --host"
        ) from None


def _template_fault(model: LanguageModel) -> str:
    """Compiles the bundle's chat templates. Returns their error: "" also for a bundle without one."""
    try:
        for tools in (False, True):
            model.chat_format(tools=tools)
    except PastkeyError as error:
        return str(error) if str(error).startswith("the chat template") else ""
    return ""


def serve_bundle(arguments: argparse.Namespace, settings: ServerSettings, listening: socket.socket) -> None:
    """Loads the bundle and answers until the command is told to end."""
    from pastkey.runtime import load

    from .server import run

    placement = placement_of(arguments)

    def opened() -> LanguageModel:
        model: LanguageModel = load(
            arguments.bundle,
            draft=arguments.draft_bundle,
            adapters=dict(arguments.adapters),
            max_memory=arguments.max_memory,
            max_batch=settings.max_concurrency,
            max_queue=settings.max_queue,
            **placement,
        )
        own = ", ".join(f"{name} {value}" for name, value in model.sampling_defaults.items())
        fault = _template_fault(model)  # before a client can ask: templates are programs
        say(f"pastkey serve: {settings.names[0]} at {address}/v1")
        if own:
            say(f"pastkey serve: defaults of the model's generation_config.json: {own}")
        if fault:
            say(f"pastkey serve: conversations will be rejected: {fault}")
        return model

    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    if not settings.keys and not is_loopback(settings.host):
        say("pastkey serve: every machine that reaches this address may ask (--insecure)")
    run(settings, listening, opened)


def _serve_limited(arguments: argparse.Namespace) -> int:
    """In the process of an untrusted bundle: serves on the socket that the parent opened."""
    settings = settings_of(arguments, keys=tuple(arguments.keys), key_salt=arguments.salt, untrusted=True)
    with socket.socket(fileno=arguments.socket) as listening:
        serve_bundle(arguments, settings, listening)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    limits, settings = limits_of(arguments), settings_of(arguments)
    with listen(settings.host, settings.port) as listening:
        if limits is not None:
            from .untrusted import supervise

            return supervise(_serve_limited, arguments, settings, listening, limits)
        serve_bundle(arguments, settings, listening)
    return 0


serve_command = Command(_add_arguments, _run)
