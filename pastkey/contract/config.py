"""The decoder's configuration: one flat frozen dataclass, under Hugging Face's names, validated here.

`to_json` writes a config.json that transformers can read if one of its architectures computes the same:
Llama, Qwen2 (bias on q, k, v) and Qwen3 (normalised queries and keys).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import InputError
from ..typed import Between, Size, TokenId, parse
from ..values import is_int, is_number, require

PositionEncoding = Literal["rope", "learned", "sinusoidal"]
Norm = Literal["rmsnorm", "layernorm", "none"]
Mlp = Literal["swiglu", "gelu", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder-only transformer. Sizes count elements, never bytes."""

    vocab_size: Size  # V
    max_position_embeddings: Size = 256  # the context length, in tokens
    hidden_size: Size = 192
    intermediate_size: Annotated[int, Between(0)] = 512  # width of the MLP; 0 without one
    num_hidden_layers: Annotated[int, Between(1, 1000)] = 4
    num_attention_heads: Size = 6  # H
    num_key_value_heads: Size = 3  # K, divides H; K < H is grouped-query attention
    head_dim: Size = 32  # D
    position_encoding: PositionEncoding = "rope"
    rope_theta: Annotated[float, Between(1e-30, 1e30)] = 10000.0  # base of the rotary frequencies
    norm: Norm = "rmsnorm"
    norm_eps: Annotated[float, Between(1e-30, 1e30)] = 1e-5
    mlp: Mlp = "swiglu"
    qkv_bias: bool = False  # bias on the query, key and value projections
    bias: bool = False  # bias on every other projection
    qk_norm: bool = False  # RMSNorm over each query and key head, before the rotation
    tie_word_embeddings: bool = True  # the output head is the token embedding
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "num_key_value_heads", "head_dim"):
            require(is_int(getattr(self, name), 1), name, getattr(self, name), "a whole number from 1")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        require(
            self.position_encoding in ("rope", "learned", "sinusoidal"),
            "position_encoding",
            self.position_encoding,
            "rope, learned or sinusoidal",
        )
        require(self.norm in ("rmsnorm", "layernorm", "none"), "norm", self.norm, "rmsnorm, layernorm or none")
        require(self.mlp in ("swiglu", "gelu", "none"), "mlp", self.mlp, "swiglu, gelu or none")
        require(
            is_int(self.intermediate_size) and (self.intermediate_size >= 1) == (self.mlp != "none"),
            "intermediate_size",
            self.intermediate_size,
            "0 without an MLP and at least 1 with one",
        )
        if self.position_encoding == "rope":
            require(
                self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, since rotary positions rotate pairs"
            )
            require(
                is_number(self.rope_theta) and self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number"
            )
        require(is_number(self.norm_eps) and self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(value is None or (is_int(value, 0) and value < self.vocab_size), name, value, "a token id or null")

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture that computes the same, or "pastkey" if there is none."""
        llama_like = (
            self.position_encoding == "rope" and self.norm == "rmsnorm" and self.mlp == "swiglu" and not self.bias
        )
        if not llama_like or (self.qkv_bias and self.qk_norm):
            return "pastkey"
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    @property
    def weights(self) -> int:
        """The number of weights of a decoder of this configuration, without creating one."""
        width, query = self.hidden_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        norm = {"rmsnorm": width, "layernorm": 2 * width, "none": 0}[self.norm]
        attention = width * (2 * query + 2 * kv) + self.qkv_bias * (query + 2 * kv) + self.bias * width
        attention += self.qk_norm * 2 * self.head_dim
        inner, inputs = self.intermediate_size, {"swiglu": 2, "gelu": 1, "none": 0}[self.mlp]
        mlp = 0 if self.mlp == "none" else inner * width * (inputs + 1) + self.bias * (inputs * inner + width) + norm
        tables = self.vocab_size * (2 - self.tie_word_embeddings)
        tables += self.max_position_embeddings * (self.position_encoding == "learned")
        return tables * width + self.num_hidden_layers * (norm + attention + mlp) + norm

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        own = dataclasses.asdict(self)
        return own | _derived(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_json` wrote. Raises InputError on unknown, missing or invalid keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        own = {key: value for key, value in content.items() if key in fields}
        missing = [
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in content
        ]
        if missing:
            raise InputError(
                f"config.json has no {missing[0]!r}: it was not written by pastkey train, or was cut short"
            )
        config = parse(cls, own, "config.json")
        unknown = sorted(set(content) - set(fields) - set(_derived(config)))
        if unknown:
            raise InputError(
                f"config.json has the key {unknown[0]!r}, which this version of pastkey does not know: "
                "export with the version that wrote the checkpoint"
            )
        return config

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _derived(config: ModelConfig) -> dict[str, Any]:
    """Returns further keys that transformers reads, derived from the configuration."""
    architectures = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "pastkey": "Decoder",
    }
    derived: dict[str, Any] = {
        "architectures": [architectures[config.model_type]],
        "model_type": config.model_type,
        "torch_dtype": "float32",
    }
    if config.model_type != "pastkey":
        derived |= {
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "attention_bias": False,  # transformers' qwen2 has its bias built in
            "mlp_bias": False,
            # transformers 5 reads this; 4.57 silently ignores it and reads the field rope_theta
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }
    return derived
