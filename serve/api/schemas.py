"""The bodies of requests. A null is the same as an absent field; an unknown field is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, from_json

from pastkey.runtime.options import OPTIONS

from ..errors import RequestError

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Schema = dict[str, Any]


def _with_nulls(schema: dict[str, Any]) -> None:
    """Describes that a field with a default may be null: `parsed` leaves nulls out."""
    for name, field in schema["properties"].items():
        if field.get("default") is not None:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(BaseModel):
    """Any request."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_with_nulls
    )


class RequestPart(BaseModel):
    """A part of a request. A field that is not here may be of a later version of OpenAI's API."""

    model_config = ConfigDict(strict=True)


B = TypeVar("B", bound=Body)


# Fields of other servers that change nothing here: they are accepted and not read, as /props says.
UNREAD = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "cache_prompt", "id_slot", "timings_per_token", "return_progress", "prediction",
)  # fmt: skip
_unread: Any = dict.fromkeys(UNREAD, (Any, None))
_Unread: Any = create_model("_Unread", __base__=Body, **_unread)


class ModelBody(_Unread):  # type: ignore[misc]
    """A request to the model."""

    model: str | None = None


class StreamOptions(RequestPart):
    """The fields of a stream in addition to the text."""

    include_usage: bool = False
    include_obfuscation: Any = None


class JsonSchema(RequestPart):
    """The schema of a response_format."""

    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")


# The fields that are options of the runtime unchanged: name, type and help are its table's.
SAME = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "typical_p", "top_n_sigma",
    "xtc_probability", "xtc_threshold", "repetition_penalty", "penalty_last_n", "no_repeat_ngram_size",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "min_new_tokens", "stop_token_ids", "prompt_lookup", "regex", "grammar",
)  # fmt: skip
_fields: Any = {name: (OPTIONS[name].kind | None, Field(None, description=OPTIONS[name].help)) for name in SAME}
_Options: Any = create_model("_Options", __base__=ModelBody, **_fields)


class Sampling(_Options):  # type: ignore[misc]
    """A generation."""

    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=-1)
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    json_schema: Schema | None = None


class Message(RequestPart):
    """A message. A chat template may read further fields."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class Function(RequestPart):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Text
    description: str | None = None
    parameters: Schema | None = None


class ToolSpec(RequestPart):
    """A tool."""

    type: Literal["function"]
    function: Function


class ConversationBody(ModelBody):
    """Messages for a chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolSpec | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(Sampling, ConversationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=-1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


class FlatTool(RequestPart):
    """A function, in the form of Responses. `type` is first, so that a tool of another type is told by it."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    name: Text
    description: str | None = None
    parameters: Schema | None = None


class TextFormat(Body):
    """The form of the text, in the form of Responses."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponsesBody(ModelBody):
    """POST /v1/responses. Nothing is stored: each request has the whole conversation."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatTool | None = None
    text: TextConfig | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: bool | None = None
    reasoning: Any = None


class EmbeddingBody(ModelBody):
    """POST /v1/embeddings."""

    input: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeBody(Body):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]


def parsed(kind: type[B], body: bytes) -> B:
    """A body as its model. Raises RequestError."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError("the body is not a JSON object")
    return checked(kind, {name: value for name, value in found.items() if value is not None})


def checked(kind: type[B], content: dict[str, Any], called: Mapping[str, str] | None = None) -> B:
    """JSON as a model. Raises RequestError with the field's name; `called` has other names for some."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    # Of a union's branches, the one that fits the furthest: a value of another type fits the least.
    wrong = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    said = wrong["msg"].partition(" or instance of ")[0]  # pydantic names its classes
    code = "invalid_type" if wrong["type"].endswith("_type") else None
    if wrong["type"] == "extra_forbidden":
        said, code = "is not known, or not supported by this server", "unknown_parameter"
    param = ".".join(map(str, _place(content, wrong)))
    param = (called or {}).get(param.partition(".")[0], param)
    raise RequestError(f"{param}: {said}", param=param, code=code)


def _place(content: Any, error: ErrorDetails) -> Iterator[str | int]:
    """The place of an error in the body, without pydantic's names of a union's branches."""
    for key in error["loc"]:
        if isinstance(key, int) if isinstance(content, list) else isinstance(content, dict) and key in content:
            yield key
            content = content[key]
    if error["type"] == "missing":
        yield error["loc"][-1]
