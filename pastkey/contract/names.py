"""Every name that a graph, a folder or another program relies on, defined once.

Shape letters used throughout: B batch, T new tokens, P past tokens, S = P + T, H query heads, K key/value heads,
D head size, V vocabulary.
"""

import re
from collections.abc import Sequence
from typing import Final

from ..files.durable import MANIFEST as MANIFEST

# --- graph inputs and outputs -------------------------------------------------------------------------------------
INPUT_IDS: Final = "input_ids"  # (B, T) int64
ATTENTION_MASK: Final = "attention_mask"  # (B, S) int64, 1 for a real token, 0 for padding
POSITION_IDS: Final = "position_ids"  # (B, T) int64
LOGITS: Final = "logits"  # (B, T, V) float32
LOGITS_START: Final = "logits_start"  # (1,) int64, an input of pastkey's own graphs: -N, for the N last positions

# An output of some of pastkey's own graphs: (B, T, H) float32, the input of the output head. transformers, optimum and
# transformers.js use the same name.
LAST_HIDDEN_STATE: Final = "last_hidden_state"

# Inputs of pastkey's own fused graphs that replace the mask, as in GroupQueryAttention.
SEQLENS_K: Final = "seqlens_k"  # (B,) int32, real tokens per row, minus one
TOTAL_SEQUENCE_LENGTH: Final = "total_sequence_length"  # () int32, S

# An input of pastkey's own fused graphs with sliding windows: (B,) int32, the first tokens of a row that are no longer
# in the caches of attention calls with a window.
EVICTED: Final = "evicted"

# An input of some of pastkey's own graphs: (B, T, blocks, block_size) uint8, the quantized embedding's rows of
# INPUT_IDS. The graph's metadata holds under this name their place in the weights file.
EMBEDDING_ROWS: Final = "embedding_rows"

# Metadata of the graph for LoRA adapters: the projections of each pair of A and B, as JSON (module, weight, N);
# under CHANGES_PREFIX and a weight the changes of its channels, and under CHANNELS_PREFIX their numbers.
ADAPTED: Final = "adapted"
CHANGES_PREFIX: Final = "changes."
CHANNELS_PREFIX: Final = "channels."
LORA_PREFIX: Final = "lora_"


def lora_a(number: int) -> str:
    """Input (K, R) float32: A of one matrix, transposed."""
    return f"{LORA_PREFIX}A.{number}"


def lora_b(number: int) -> str:
    """Input (R, N) float32: B of one matrix, transposed, times the adapter's scale."""
    return f"{LORA_PREFIX}B.{number}"


# Metadata of a static graph: its inputs whose rows the runtime reads from a file, by token or position.
TABLES: Final = "tables"

# --- axes ---------------------------------------------------------------------------------------------------------
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"  # T
PAST: Final = "past_sequence_length"  # P, or the capacity of a shared buffer
TOTAL: Final = "total_sequence_length"  # S
IN_WINDOW: Final = "in_window"  # as PAST, of attention calls whose rows are evicted
PAST_ROWS: Final = "past_rows"  # rows of a short convolution's cache: as many as it needs, or fewer
PRESENT_ROWS: Final = "present_rows"
KEPT: Final = "logits_to_keep"  # N


PAST_PREFIX: Final = "past_key_values."
PRESENT_PREFIX: Final = "present."


def past_key(layer: int | str) -> str:
    """Input (B, K, P, D): the cached keys of one attention call."""
    return f"{PAST_PREFIX}{layer}.key"


def past_value(layer: int | str) -> str:
    """Input (B, K, P, D): the cached values of one attention call."""
    return f"{PAST_PREFIX}{layer}.value"


def present_key(layer: int | str) -> str:
    """Output (B, K, S, D): the keys with the new tokens' appended."""
    return f"{PRESENT_PREFIX}{layer}.key"


def present_value(layer: int | str) -> str:
    """Output (B, K, S, D): the values with the new tokens' appended."""
    return f"{PRESENT_PREFIX}{layer}.value"


def past_conv(rows: int | str) -> str:
    """Input (B, up to k, F): the last rows of the input of a short causal convolution or a shift."""
    return f"past_conv.{rows}"


def present_conv(rows: int | str) -> str:
    """Output (B, up to k, F): the same after the new tokens."""
    return f"present_conv.{rows}"


# The kinds of states, by onnxruntime-genai's names.
CONV_STATE: Final = "conv_state"  # (B, C, K - 1): the last columns of a convolution's input
RECURRENT_STATE: Final = "recurrent_state"  # (B, H, D, Dv): of a linear recurrence
FLAT_STATE: Final = "flat_state"  # (B, N): of any other recurrence


def is_state(tensor: str) -> bool:
    """Whether an input or output is a state."""
    return tensor.endswith((f".{CONV_STATE}", f".{RECURRENT_STATE}", f".{FLAT_STATE}"))


def past_states(kinds: Sequence[str]) -> list[str]:
    """The inputs of the states of these kinds, in order. Those of each kind are numbered from 0."""
    return [f"{PAST_PREFIX}{kinds[:place].count(kind)}.{kind}" for place, kind in enumerate(kinds)]


# Inputs and outputs of the generation graphs, in addition to INPUT_IDS, (1, T) int64. Each setting is (1,).
GENERATED_IDS: Final = "ids"  # output (n,) int64
GENERATE_INTEGERS: Final = ("max_new_tokens", "top_k", "seed", "end_ids")  # int64; end_ids is (E,)
GENERATE_NUMBERS: Final = ("temperature", "top_p", "min_p", "repetition_penalty")  # float32
TEXT: Final = "text"  # input (1,) string that replaces INPUT_IDS if the graph contains the tokenizer
COMPLETION: Final = "completion"  # output (1,) string of that graph
HELD_CACHE: Final = "cache"  # input (2L, 1, K, P, D): keys and values of the L attention calls in turn
HELD_IDS: Final = "history"  # input (P,) int64: the ids in the cache
NEW_CACHE: Final = "cache_out"  # output, the next call's `cache`
NEW_IDS: Final = "history_out"  # output, the next call's `history`


def present_of(past: str) -> str:
    """Returns the output that becomes the next run's input `past`."""
    if past.startswith(PAST_PREFIX):
        return PRESENT_PREFIX + past.removeprefix(PAST_PREFIX)
    return past.replace("past_", "present_", 1)


def static_mask(window: int) -> str:
    """Input (1, 1, T, P + T) float32 of a static graph, added to scores; window in tokens, 0 for all earlier ones."""
    return f"mask_window_{window}" if window else "mask"


# --- files of a folder --------------------------------------------------------------------------------------------
SIGNATURE: Final = "pastkey.json.sig"  # of the manifest, in a signed bundle
CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
GENAI_CONFIG: Final = "genai_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
TOKENIZER_CLASS: Final = "PreTrainedTokenizerFast"  # transformers 4 and 5 both load it; 5's own classes break 4
CHAT_TEMPLATE: Final = "chat_template.jinja"
WEIGHTS: Final = "model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"  # of peft; base_model_name_or_path in it names the base
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
GOLDEN: Final = "golden_logits.npz"  # logits that a device must reproduce before it generates text

# pastkey's own graph, over the weights of the all-logits graph (named in `precisions`): logits of the last positions
# only, from LOGITS_START on.
LAST_LOGITS_GRAPH: Final = "onnx/pastkey.onnx"
# The same by the operators of pastkey's kernel library, over the same weights. Optional.
NATIVE_GRAPH: Final = "onnx/pastkey_native.onnx"
PORTABLE_LEVEL = "portable"  # of the native kernels: the reference, and slow
NATIVE_DOMAIN: Final = "pastkey"  # of these operators
NATIVE_OPERATORS: Final = 4  # their version
# pastkey's own graph with the matrices of LoRA adapters as inputs. Optional.
ADAPTER_GRAPH: Final = "onnx/pastkey_adapters.onnx"
# pastkey's own graph with its weights in the ORT format, and the list of its operators. Optional.
ORT_GRAPH: Final = "onnx/pastkey.ort"
ORT_OPERATORS: Final = "onnx/pastkey.required_operators.config"
# A whole generation in one graph, and some tokens of one, with the cache as input and output. Optional.
GENERATE_GRAPH: Final = "onnx/generate.onnx"
GENERATE_STEP_GRAPH: Final = "onnx/generate_step.onnx"
# GENERATE_GRAPH with the tokenizer before and after it: text in, text out.
TEXT_GRAPH: Final = "onnx/text.onnx"
# The static graphs, of one new token and of a chunk, which replace LAST_LOGITS_GRAPH.
STATIC_DECODE_GRAPH: Final = "onnx/pastkey_decode.onnx"
STATIC_PREFILL_GRAPH: Final = "onnx/pastkey_prefill.onnx"
STATIC_DATA: Final = "onnx/pastkey_static.onnx_data"  # their data; the weights are those of the all-logits graph


MAX_SHARDS: Final = 100  # weights files of a graph that transformers.js reads


def weights_file(graph: str, shard: int = 0) -> str:
    """Returns a graph's weights file by the name that transformers.js expects: model.onnx_data, model.onnx_data_1."""
    return shard_of(f"{graph}_data", shard)


def shard_of(first: str, shard: int) -> str:
    """Returns the name of a further weights file (1, 2, ...) next to the first one."""
    return f"{first}_{shard}" if shard else first


def is_weights_file(name: str, graph: str | None = None) -> bool:
    """Whether a file of this name holds weights, of any graph or of the given one."""
    return re.fullmatch(f"{'.+' if graph is None else re.escape(graph)}_data(_[0-9]+)?", name) is not None


FORMATS: Final = ("onnx", "ort")
GRAPHS: Final = ("fused", "standard", "static")
