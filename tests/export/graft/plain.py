"""The plain decoder of the contract, with the changes of a test; and steps of a module of the contract."""

import itertools

import torch

from pastkey.export.graft.probe.observe import run_on, run_uncached

from ..decoders import Plain


def plain(methods=None, **arguments):
    """Plain with other methods, in eval mode."""
    return type("Decoder", (Plain,), methods or {})(**arguments).eval()


def steps(module, ids, *ends):
    """Its logits of a text in chunks that end there, and then token by token, each with the cache of those before."""
    past = run_uncached(module, ids[:, : ends[0]])
    logits = [past.logits]
    for start, end in itertools.pairwise((*ends, *range(ends[-1] + 1, ids.shape[1] + 1))):
        past = run_on(module, past, ids[:, start:end])
        logits.append(past.logits)
    return torch.cat(logits, 1)
