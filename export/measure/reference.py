"""Opens the reference of a bundle: another bundle, or a source that runs in torch without a cache.

Only opening a source imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from pastkey.contract.bundle import Bundle, Manifest, is_bundle, open_bundle
from pastkey.errors import ContextLengthError, InputError, first_line
from pastkey.files.tokenizer_file import open_tokenizer

from .predictors import BundlePredictor, ModulePredictor, Predictor

if TYPE_CHECKING:
    from torch import nn

    from ..graft.probe.observe import CacheLayer, Observation
    from ..source.source import Source

Say = Callable[[str], None]


# --- for eval -----------------------------------------------------------------------------------------------------
def open_reference(
    path: str,
    bundle: Bundle,
    ids: Sequence[int],
    length: int,
    *,
    threads: int | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> Predictor:
    """Opens a bundle folder, or a source of `open_source`, that will run on windows of `length` of the bundle's `ids`.

    `threads` are the runtime's; torch keeps its own. `weights` are those of a module.

    Raises:
        MissingFileError: The reference does not exist.
        InputError: It is neither, it has another vocabulary, or its context is shorter than a window.
        PastkeyError: Any other error of opening it.
    """
    if is_bundle(path):
        other = open_bundle(path)
        if length > other.manifest.context_length:
            raise _too_short(path, other.manifest.context_length, length)
        _require_same_size(bundle, path, other.manifest.vocab_size)
        tokenizer = None if other.tokenizer is None else other.tokenizer.read_bytes()
        _require_same_tokens(bundle, path, tokenizer, ids)
        return BundlePredictor(other, threads=threads)
    try:
        source, module, _ = _open_module(path, length, None, bundle, weights, trust_remote_code, say)
    except ContextLengthError as error:
        raise _too_short(path, error.longest, length) from None
    found = ModulePredictor(module, path)
    _require_same_size(bundle, path, found.logits(np.zeros(2, np.int64)).shape[-1])
    _require_same_tokens(bundle, path, source.tokenizer, ids)
    return found


# --- for verify ---------------------------------------------------------------------------------------------------
def open_exported(
    path: str,
    bundle: Bundle,
    *,
    weights: str | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> tuple[nn.Module, tuple[CacheLayer, ...]]:
    """Opens the source that the bundle was exported from: its module, and its attention calls as messages name them.

    Raises:
        InputError: It has another vocabulary or another cache.
        PastkeyError: Any other error of opening it.
    """
    length, call = bundle.manifest.context_length, bundle.manifest.call or None
    if call is not None:
        _require_plain(call, bundle)
    source, module, observation = _open_module(path, length, call, bundle, weights, trust_remote_code, say)
    if observation.geometry != bundle.manifest.layers:  # it may hold the keys and values that a latent row replaces
        opened = _open_module(path, length, call, bundle, weights, trust_remote_code, say, latents=False)
        source, module, observation = opened
    _require_same_shape(bundle, source.name, observation)
    return module, observation.layers


def _require_plain(call: str, bundle: Bundle) -> None:
    """Refuses a call that does more than call the module: manifests may be untrusted, and their calls run as Python."""
    from ..graft.probe.call import is_plain

    if not is_plain(call):
        raise InputError(
            f"{bundle.path} was exported with --call {call!r}, which does more than call the module, and a manifest's "
            "Python is not run: verify the bundle without its source"
        )


def _require_same_shape(bundle: Bundle, source: str, observation: Observation) -> None:
    manifest = bundle.manifest
    if (manifest.vocab_size, manifest.layers, manifest.states) != (
        observation.vocab_size,
        observation.geometry,
        observation.states,
    ):
        raise InputError(
            f"{bundle.path} has {manifest.vocab_size} tokens and the cache {_shown(manifest)}, {source} has "
            f"{observation.vocab_size} and {_shown(observation)}: name the source that it was exported from"
        )


def _shown(kept: Manifest | Observation) -> str:
    layers = kept.layers if isinstance(kept, Manifest) else kept.geometry
    heads = f", {layers[0].kv_heads} heads of size {layers[0].key_head_size}" if layers else ""
    states = f", and {len(kept.states)} states" if kept.states else ""
    return f"of {len(layers)} layers{heads}{states}"


# --- sources ------------------------------------------------------------------------------------------------------
def _open_module(
    path: str,
    context_length: int,
    call: str | None,
    bundle: Bundle,
    weights: str | None,
    trust_remote_code: bool,
    say: Say,
    *,
    latents: bool = True,
) -> tuple[Source, nn.Module, Observation]:
    """Returns the source, its module as it is run, and the observation of a run.

    The source of `bundle` on the Hub is opened at the commit that was exported.
    """
    from ..graft.probe.contract import in_contract
    from ..source.open import open_source
    from ..source.source import Opening

    revision = bundle.manifest.revision if path == bundle.manifest.source else ""
    opening = Opening(
        context_length=context_length, weights=weights, trust_remote_code=trust_remote_code, revision=revision, say=say
    )
    source = open_source(path, opening)
    try:
        found = in_contract(source.module, source.context_length, call, say, latents=latents, brief=True)
    except InputError as error:
        raise InputError(
            f"{path} does not run as {call or 'a decoder'} on {source.context_length} tokens "
            f"({first_line(error.__cause__ or error)}): name the source that the bundle was exported from, "
            "or export that again"
        ) from error
    return source, found.module, found.observation


def _too_short(path: str, longest: int, length: int) -> InputError:
    return InputError(
        f"windows of {length} tokens are longer than the context of the reference {path}, {longest} tokens: give "
        f"--length {longest} or less"
    )


def _require_same_size(bundle: Bundle, path: str, vocab_size: int) -> None:
    if vocab_size != bundle.manifest.vocab_size:
        raise InputError(
            f"the reference {path} has a vocabulary of {vocab_size} tokens and {bundle.path} one of "
            f"{bundle.manifest.vocab_size}: predictions can be compared only over the same one"
        )


def _require_same_tokens(bundle: Bundle, path: str, tokenizer: bytes | None, ids: Sequence[int]) -> None:
    """Raises InputError if one of the text's ids is another token in the reference's own tokenizer."""
    if tokenizer is None or bundle.tokenizer is None:
        return
    ours = open_tokenizer(Tokenizer, bundle.tokenizer.read_bytes(), bundle.tokenizer)
    theirs = open_tokenizer(Tokenizer, tokenizer, f"the tokenizer of {path}")
    for token in sorted(set(ids)):
        if ours.id_to_token(token) != theirs.id_to_token(token):
            raise InputError(
                f"token {token} is {theirs.id_to_token(token)!r} in the reference {path} and "
                f"{ours.id_to_token(token)!r} in {bundle.path}: predictions can be compared only over the same "
                "vocabulary"
            )
