"""From a source to its decoder, the float32 graph: observe, trace, fuse and clean."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from pastkey.contract.bundle import CacheShift
from pastkey.errors import ContractError
from pastkey.files.memory import keeping_memory

from .bundle_writer import ExportedDecoder
from .graft.probe.call import CONTRACT
from .graft.probe.contract import in_contract
from .graft.probe.observe import Observation, Opaque
from .graft.probe.positions import find_shift
from .graft.trace import GraphChoice, choose_graph, trace
from .graph.clean import clean
from .graph.fuse import fuse, where_rotated
from .graph.write.output_head import hidden_size, output_head
from .progress import Progress
from .settings import ExportConfig
from .source.source import Source, check_tokenizer


@keeping_memory()
def observed(source: Source, config: ExportConfig, progress: Progress) -> tuple[Source, Observation, GraphChoice]:
    """Returns the source with a module of the contract, the facts that its runs showed, and the graph to make."""
    progress.stage(f"observe the attention calls of {source.name}")
    latents = config.graph != "fused"
    contracted = in_contract(source.module, source.context_length, config.call, progress.warn, latents=latents)
    source = dataclasses.replace(source, module=contracted.module, call=contracted.call, proved=contracted.proved)
    if source.proved:
        compared = f"{source.proved} of {source.context_length} tokens"
        progress.say(
            f"decoding with a cache gives the logits of {source.call or CONTRACT} on texts of up to {compared}"
        )
    observation = contracted.observation
    check_tokenizer(source, observation.vocab_size, source.eos_token_ids if config.eos_tokens else ())
    return source, observation, choose_graph(config.graph, config.target, observation)


def decoder_of(
    source: Source,
    observation: Observation,
    choice: GraphChoice,
    model: ir.Model,
    hidden_size: int | None,
    shift: CacheShift,
) -> ExportedDecoder:
    """Returns the decoder of a float32 graph that was made before."""
    if isinstance(source.module, Opaque):
        _, observation = source.module.graph(choice.graph, observation)
    if choice.graph == "fused":
        choice = dataclasses.replace(choice, reason=f"{choice.reason}; {where_rotated(model)}")
    return ExportedDecoder(source, model, observation, choice, shift, observation.padding, hidden_size)


def grafted(source: Source, observation: Observation, choice: GraphChoice, progress: Progress) -> ExportedDecoder:
    """Returns the cleaned float32 graph of a source."""
    made = f"the {choice.graph} graph of {len(observation.layers)} layers of"
    if isinstance(source.module, Opaque):
        progress.stage(f"make {made} {source.name} ({choice.reason})")
        model, observation = source.module.graph(choice.graph, observation)
    else:
        progress.stage(f"trace {made} {source.call or CONTRACT} ({choice.reason})")
        model = trace(source.module, observation, choice.graph, source.context_length, progress.warn)
    shift = find_shift(source.module, observation, source.context_length)
    if choice.graph == "fused":
        fuse(model, source.context_length)
    clean(model, source.module, observation.geometry, observation.vocab_size, observation.rows, observation.states)
    head = output_head(model)
    width = None if head is None else hidden_size(head)
    return decoder_of(source, observation, choice, model, width, shift)


def require_head(decoder: ExportedDecoder, config: ExportConfig) -> None:
    """Raises ContractError if the last hidden states are requested and the graph has no output head."""
    if config.hidden_states and isinstance(decoder.source.module, Opaque):
        raise ContractError(
            f"{decoder.source.name} is an ONNX graph, whose last hidden states cannot be compared: export without "
            "--hidden-states, or the model from its safetensors"
        )
    if config.hidden_states and decoder.hidden_size is None:
        raise ContractError(
            f"{decoder.source.name} cannot give its last hidden states, since no one multiplication by a weight makes "
            "its logits: export without --hidden-states"
        )


def require_masks(decoder: ExportedDecoder, config: ExportConfig) -> None:
    """Raises ContractError if a mask cannot tell static graphs which columns of the past are holes."""
    if config.static and not decoder.padding:
        what = "its positions count every column of the cache"
        if decoder.observation.rows or decoder.observation.states:
            what = "it keeps more than the keys and values of attention"
        raise ContractError(
            f"{decoder.source.name} cannot have the static graph, whose past has holes, since {what}: export with "
            "--graph standard, and for a target that supports it, such as cpu"
        )
