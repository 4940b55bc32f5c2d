"""Opens a bundle: a folder, a zip file, bytes, or a resource of a package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.values import or_default

from .decoding.batching.prefix_cache import PREFIX_BYTES
from .decoding.batching.scheduler import MAX_ROWS
from .model.draft_model import DraftModel
from .model.language_model import LanguageModel
from .model.signature import require_signature
from .model.unpack import given_as, tell_as_given, unpacked
from .options import Choice, PlacementOptions, SessionSettings, require_valid


class LoadSettings(TypedDict, total=False):
    """The arguments of `load` except `path`."""

    providers: Choice | Sequence[Choice] | None
    threads: int | None
    verify: bool | None
    key: str | Path | None
    allow_fallback: bool | None
    session_options: SessionSettings | None
    native: bool | None
    max_memory: int | None
    prefix_bytes: int | None
    max_batch: int | None
    max_queue: int | None
    draft: str | Path | bytes | LanguageModel | None
    adapters: Mapping[str, str | Path] | None


def load(
    path: str | Path | bytes,
    providers: Choice | Sequence[Choice] | None = None,
    threads: int | None = None,
    verify: bool | None = None,
    *,
    key: str | Path | None = None,
    allow_fallback: bool | None = False,
    session_options: SessionSettings | None = None,
    native: bool | None = None,
    max_memory: int | None = None,
    prefix_bytes: int | None = PREFIX_BYTES,
    max_batch: int | None = MAX_ROWS,
    max_queue: int | None = None,
    draft: str | Path | bytes | LanguageModel | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> LanguageModel:
    """Opens a bundle. None is "not set" for every argument but `path`.

    Args:
        path: The folder that `pastkey export` wrote, a zip file of it, the bytes of one, or a folder or zip file of
            `importlib.resources`. A zip file is unpacked to a temporary folder, so that the weights can be
            memory-mapped. The folder is removed when the model is closed or garbage-collected.
        providers: Execution providers in order of preference, by short names ("cuda") or onnxruntime's, each alone or
            as a pair with its options. None selects the bundle's target. A provider that is not on this machine is an
            error.
        threads: Number of threads within an operator. None means the physical cores.
        verify: True hashes every file again, False none, None the files that changed since the last hash.
        key: A PEM file with a public ed25519 key. The bundle must have a signature by its private half: `pastkey sign`.
            The signature is checked before any other file of the bundle is read, then the hashes.
        allow_fallback: Whether the CPU may run the operators that the provider does not run. If False, a provider that
            is known to run whole graphs must run this one whole; otherwise an error names the operators. For other
            providers a FallbackWarning names them.
        session_options: Settings of onnxruntime.SessionOptions: attributes by their names, {"enable_cpu_mem_arena":
            False, "graph_optimization_level": "ORT_ENABLE_BASIC"}, and entries by their names with a dot,
            {"session.use_env_allocators": "1"}. Settings that pastkey controls, such as threads, are an error.
        native: Whether pastkey's kernel library runs the bundle: docs/devices.md. None uses it where it is installed
            and the bundle has a graph for it, unless the environment variable PASTKEY_NATIVE is 0. True raises a
            ProviderError where it cannot be used. False uses onnxruntime's.
        max_memory: Limit in bytes for all caches of the model. A call that might need more raises ResourceError before
            it begins. `lm.memory.estimate(tokens)` returns the size of a cache. None for no limit.
        prefix_bytes: Limit in bytes for cached prefixes of `reuse_prefix` and conversations. The least recently used
            prefix is evicted first.
        max_batch: The largest number of requests that are decoded in one step. With 1 they alternate.
        max_queue: The largest number of requests that wait for a place in `max_batch`. One more raises QueueFullError
            at once. A request is a call, or a stream until its end. Of a batch call each prompt counts, and only its
            first one may be rejected. None for no limit.
        draft: A smaller bundle with the same vocabulary, given like `path`, or a loaded model. It drafts tokens that
            this model accepts or rejects, where that is faster: docs/python.md. A path is loaded with the same
            providers, threads, session options and key, and closed with this model.
        adapters: LoRA adapters to load: name -> folder, as for `LanguageModel.load_adapter`.

    Raises:
        MissingFileError: There is no bundle at `path`.
        IntegrityError: A file is missing, truncated or altered, or onnxruntime cannot load it, or the signature is not
            that of `key`.
        ProviderError: A provider is unknown, not on this machine, does not start, or does not run the whole graph.
        MissingExtraError: onnxruntime is not installed or older than the bundle needs, or `key` is given and
            cryptography is not installed.
        InputError: An argument is out of range, a session option is unknown or controlled by pastkey, or `draft` has
            another vocabulary or does not fit this bundle.
    """
    placement: PlacementOptions = {
        "providers": providers,
        "threads": threads,
        "allow_fallback": or_default(allow_fallback, False),
        "session_options": session_options,
        "native": native,
    }
    sizes = {"max_memory": max_memory, "prefix_bytes": prefix_bytes, "max_batch": max_batch, "max_queue": max_queue}
    require_valid({**placement, **sizes, "verify": verify, "adapters": adapters})
    prefix_bytes, max_batch = or_default(prefix_bytes, PREFIX_BYTES), or_default(max_batch, MAX_ROWS)
    if key is not None and verify is False:
        raise InputError("verify=False checks no hashes, and without them a signature (key=...) proves nothing")
    given = given_as(path)
    folder, temporary = unpacked(given)
    drafts = None
    try:
        if key is not None:
            require_signature(folder, key)
        bundle = open_bundle(folder, verify=verify)
        if isinstance(draft, LanguageModel):
            draft.require_open()
            drafts = DraftModel(draft, opened=False)
        elif draft is not None:
            drafts = DraftModel(load(draft, verify=verify, key=key, **placement), opened=True)
        return LanguageModel(
            bundle,
            max_memory=max_memory,
            prefix_bytes=prefix_bytes,
            max_batch=max_batch,
            max_queue=max_queue,
            draft=drafts,
            adapters=adapters,
            temporary=temporary,
            **placement,
        )
    except BaseException as error:
        if drafts is not None:
            drafts.close()
        if temporary is not None:
            temporary.remove()
            tell_as_given(error, folder, given.name)
        raise
