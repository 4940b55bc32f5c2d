"""`pastkey sign`: signs a bundle, or makes a key for it."""

from __future__ import annotations

import argparse

from pastkey.command import Command, say
from pastkey.errors import InputError

from .flags import BUNDLE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help=BUNDLE)
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", metavar="PRIVATE.pem", help="the private ed25519 key to sign with")
    keys.add_argument("--new-key", metavar="PRIVATE.pem", help="make a key: private in this file, public next to it")


def _run(arguments: argparse.Namespace) -> int:
    from ..model.signature import new_key, sign_bundle

    if arguments.bundle is None and arguments.key is not None:
        raise InputError("--key signs a bundle: name its folder")
    if arguments.new_key is not None:
        public = new_key(arguments.new_key)
        say(f"{arguments.new_key}: keep it private; {public} is for those who verify your bundles")
    if arguments.bundle is not None:
        say(f"{sign_bundle(arguments.bundle, arguments.new_key if arguments.key is None else arguments.key)}: signed")
    return 0


sign_command = Command(_add_arguments, _run)
