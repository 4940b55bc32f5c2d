"""The settings of a server, with their defaults. Standard library only, so that `--help` is fast."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from pastkey.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """How a server listens, whom it answers, and its limits.

    Attributes:
        host: The address that it listens on: a loopback one, unless there is a key.
        port: 0 chooses a free one.
        keys: A request has one of these; empty for no key.
        key_salt: If it is not empty, `keys` are `salted` hashes with it.
        insecure: Allows another address than a loopback one without a key.
        names: Model ids that requests may use; /v1/models lists the first.
        adapters: The names of LoRA adapters. A request with one as its model is answered with it.
        max_concurrency: The number of requests that are decoded together.
        max_queue: The number of requests that wait for one of these places. One more gets the status 429.
        timeout: Longest decoding time in seconds; the text then ends with "length". Also how long a stalled client is
            kept.
        body_bytes: The size of a request.
        receive_seconds: Seconds for a request's headers, and for its body.
        ping_seconds: Seconds without an event after which a stream gets a comment.
        drain_seconds: Seconds that running requests get after SIGTERM.
        allow_hosts: Further names in the Host header.
        allow_origins: Origins of web pages that may ask.
        access_log: Prints a line for each request.
        defaults: The options of a request that does not set them, instead of the bundle's own.
        untrusted: Whether the bundle is not trusted: there is no page then, and /health tells more.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = field(default=(), repr=False)
    key_salt: str = ""
    insecure: bool = False
    names: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    max_concurrency: int = 16
    max_queue: int = 256
    timeout: float = 600.0
    body_bytes: int = 2_000_000
    receive_seconds: float = 60.0
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    access_log: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    untrusted: bool = False

    def __post_init__(self) -> None:
        if both := {*self.names} & {*self.adapters}:
            raise InputError(f"{min(both)!r} names both the model and an adapter: give another --adapter NAME=FOLDER")
        if not self.keys and not self.insecure and not is_loopback(self.host):
            raise InputError(
                f"--host {self.host} lets other machines ask, and no key is set: add --api-key-file FILE, set the "
                "environment variable PASTKEY_API_KEY, or use --insecure"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK
