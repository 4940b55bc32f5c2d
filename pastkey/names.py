"""Every name that a graph, a folder or another program relies on, once.

Shape letters used throughout: B batch, T new tokens, P past tokens, S = P + T, H query heads, K key/value heads,
D head size, V vocabulary.
"""

from typing import Final

# --- graph inputs and outputs -------------------------------------------------------------------------------------
INPUT_IDS: Final = "input_ids"  # (B, T) int64
ATTENTION_MASK: Final = "attention_mask"  # (B, S) int64, 1 for a real token, 0 for padding
POSITION_IDS: Final = "position_ids"  # (B, T) int64
LOGITS: Final = "logits"  # (B, T, V) float32
LOGITS_TO_KEEP: Final = "logits_to_keep"  # (1,) int64, an input of pastkey's own graphs: how many last positions

# An input of pastkey's own graphs, where they have it: (B, T, blocks, block_size) uint8, the quantized embedding's rows
# of INPUT_IDS. The graph's metadata says under this name where in the weights file they stand.
EMBEDDING_ROWS: Final = "embedding_rows"

# --- axes ---------------------------------------------------------------------------------------------------------
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"  # T
PAST: Final = "past_sequence_length"  # P, or the capacity of a shared buffer
TOTAL: Final = "total_sequence_length"  # S


def past_key(layer: int) -> str:
    """Input (B, K, P, D): the cached keys of one attention call."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Input (B, K, P, D): the cached values of one attention call."""
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    """Output (B, K, S, D): the keys with the new tokens' appended."""
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    """Output (B, K, S, D): the values with the new tokens' appended."""
    return f"present.{layer}.value"


# --- files of a folder --------------------------------------------------------------------------------------------
MANIFEST: Final = "pastkey.json"
CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
GENAI_CONFIG: Final = "genai_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
TOKENIZER_CLASS: Final = "PreTrainedTokenizerFast"  # the one that transformers 4 and 5 both load; 5's own breaks 4
CHAT_TEMPLATE: Final = "chat_template.jinja"
WEIGHTS: Final = "model.safetensors"

# The graph that every loader finds by its precision's usual name: logits of all positions.
COMMON_GRAPH: Final = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_quantized.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int4": "onnx/model_q4.onnx",
}
# What transformers.js calls a precision, and finds the common graph by.
TRANSFORMERS_JS_DTYPE: Final = {"fp32": "fp32", "int8": "q8", "fp16": "fp16", "int4": "q4"}
# pastkey's own graph over the same weights: logits of the last LOGITS_TO_KEEP positions only.
LAST_GRAPH: Final = "onnx/pastkey.onnx"
# The same with an int8 cache, a quarter of the bytes that decoding after a long text reads. Some bundles have it.
LONG_GRAPH: Final = "onnx/pastkey_int8_cache.onnx"
DATA_SUFFIX: Final = "_data"  # weights stand beside the common graph: onnx/model_quantized.onnx_data

PRECISIONS: Final = ("int8", "int4", "fp32")
TARGETS: Final = ("cpu", "cuda", "webgpu", "portable")
GRAPHS: Final = ("fused", "standard")
