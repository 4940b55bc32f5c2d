"""`pastkey.sandbox.call`: one call of an untrusted bundle, in a separate process. Arguments and result are JSON."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from pastkey import errors
from pastkey.command import print_json, progressed, without_control
from pastkey.errors import InputError, IntegrityError, PastkeyError, UntrustedBundleError
from pastkey.files.reading import parse_json
from pastkey.values import require, shown

from ..options import MAX_NEW_TOKENS, require_valid
from ..settings import CHAT_NEW_TOKENS
from .child import function_of, is_out_of_memory
from .frames import END, ERROR, OUT, PROGRESS
from .limits import Limits
from .parent import LimitedProcess

MOST_JSON: Final = 16_000_000  # bytes of a result
_MOST_TOLD: Final = 4000  # characters of an error
_INSPECT: Final = "pastkey.runtime.commands.inspection:inspect"  # a floor above, found by its name


def call(
    name: str,
    bundle: object,
    arguments: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    *,
    threads: int | None = None,
) -> Any:
    """Opens a bundle in a child process with limits, makes one call, and ends the process.

    Args:
        name: "generate", "chat", "score" or "inspect".
        bundle: As for `load`.
        arguments: Those of `LanguageModel.generate` for one prompt, `generate_chat` or `score`, of JSON's types:
            {"prompt": "Once", "max_new_tokens": 8}, {"messages": [...]}, {"text": "Once"}. None for inspect.
        limits: The limits of memory and time: for the load and for each new token; for a score or an inspection as a
            whole.
        threads: As in `load`.

    Returns:
        The fields of the Completion, the Score, or of `pastkey inspect --json`, of JSON's types. A number that
        is infinite is None. The process made it: it may be wrong in any way but its size, which is at most 16 MB.

    Raises:
        UntrustedBundleError: The process broke a limit, crashed, or gave no result.
        PastkeyError: As the call does.
    """
    require(isinstance(name, str) and name in _CALLS, "name", name, ", ".join(map(shown, _CALLS)))
    require(isinstance(arguments, Mapping | None), "arguments", arguments, "a mapping")
    require(name != "inspect" or not arguments, "arguments", arguments, "None for inspect")
    require(isinstance(limits, Limits | None), "limits", limits, "a Limits")
    require_valid({"threads": threads})
    wanted = dict(arguments or {})
    tokens = _most_tokens(name, wanted)
    given = {"name": name, "arguments": wanted, "threads": None if threads is None else int(threads)}
    written = {OUT: bytearray(), ERROR: bytearray()}
    with LimitedProcess(answer, given, bundle, limits or Limits()) as process:
        while (found := process.next())[0] != END:
            kind, content = found
            if kind == PROGRESS and tokens:
                tokens -= 1
                process.allow(process.seconds)
            if kind in written:
                written[kind] += content
                if len(written[kind]) > MOST_JSON:
                    process.fail(f"gave a result of more than {MOST_JSON:,} bytes, and was ended")
        if process.status() == 2:
            raise UntrustedBundleError(_told(written[ERROR].decode(errors="replace").removeprefix("pastkey: ")))
        try:
            reply = parse_json(bytes(written[OUT]), "the result")
            if "error" not in reply:
                return reply["result"]
            kind_of_error, sentence = reply["error"]
        except (InputError, IntegrityError, TypeError, KeyError, ValueError) as error:
            process.fail(f"gave no result ({_told(str(error))})")
    raise _error_of(str(kind_of_error))(_told(str(sentence)))


def _most_tokens(name: str, arguments: Mapping[str, Any]) -> int:
    """How often the process may tell of progress: for each token, and the load."""
    if name not in ("generate", "chat"):
        return 1
    given = arguments.get("max_new_tokens")
    usual = MAX_NEW_TOKENS if name == "generate" else CHAT_NEW_TOKENS
    return 1 + (max(0, given) if isinstance(given, int) else usual)


def _told(text: str) -> str:
    return " ".join(without_control(text).split())[:_MOST_TOLD]


def _error_of(name: str) -> Callable[[str], PastkeyError]:
    """The class of errors of this name, of those whose only argument is a sentence."""
    kind = vars(errors).get(name)
    if not isinstance(kind, type) or not issubclass(kind, PastkeyError) or kind is errors.ContextLengthError:
        return UntrustedBundleError
    return kind


# --- in the process -----------------------------------------------------------------------------------------------
def answer(arguments: argparse.Namespace) -> int:
    """Makes the call, and writes its result, or the class and the sentence of its error."""
    try:
        reply: dict[str, Any] = {"result": _CALLS[arguments.name](arguments)}
    except PastkeyError as error:
        if is_out_of_memory(error):
            raise
        reply = {"error": [type(error).__name__, str(error)]}
    print_json(json.loads(json.dumps(reply), parse_constant=lambda _: None))
    return 0


def _loaded(arguments: argparse.Namespace) -> Any:
    from ..loading import load  # which imports onnxruntime: the parent does not need it

    model = load(arguments.bundle, "cpu", arguments.threads)
    progressed()
    return model


def _completed(stream: Any) -> dict[str, Any]:
    for _ in stream:
        progressed()
    assert stream.completion is not None
    return dataclasses.asdict(stream.completion)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = dict(arguments.arguments)
    if isinstance(options.get("logit_bias"), dict):  # JSON's keys are texts
        bias = options["logit_bias"].items()
        options["logit_bias"] = {int(token) if token.isdecimal() else token: number for token, number in bias}
    return options


def _called(method: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    needed = [name for name, one in inspect.signature(method).parameters.items() if one.default is one.empty]
    if missing := [name for name in needed if name not in options]:
        raise InputError(f"the arguments are {shown(sorted(options))}; {missing[0]!r} was expected among them")
    return method(**options)


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    return _completed(_called(_loaded(arguments).stream, _options(arguments)))


def _chat(arguments: argparse.Namespace) -> dict[str, Any]:
    return _completed(_called(_loaded(arguments).stream_chat, _options(arguments)))


def _score(arguments: argparse.Namespace) -> dict[str, Any]:
    return dataclasses.asdict(_called(_loaded(arguments).score, arguments.arguments))


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = function_of(_INSPECT)(
        arguments.bundle, providers="cpu", threads=arguments.threads
    ).to_json()
    return found


_CALLS: Final = {"generate": _generate, "chat": _chat, "score": _score, "inspect": _inspect}
