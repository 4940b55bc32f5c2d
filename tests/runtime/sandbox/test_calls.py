"""Each call gives what the model gives that is opened here, and a process that was taken over is not believed."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

import pastkey
from pastkey.errors import InputError, IntegrityError, MissingFileError, OptionError, UntrustedBundleError
from pastkey.runtime.sandbox import calls

from .conftest import EASY

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 1, "logprobs": 3, "prompt_logprobs": True},
    {"logit_bias": {3: 50.0}, "stop": ["c", "zz"], "bad_words": ["d"], "suppress_tokens": [1, 2]},
]
TOOL = {"type": "function", "function": {"name": "wet", "parameters": {"type": "object", "properties": {}}}}


def asked(name: str, bundle: Any, **arguments: Any) -> Any:
    return pastkey.sandbox.call(name, bundle, arguments, EASY, threads=1)


@pytest.fixture(scope="module")
def trusted(talking_bundle):
    with pastkey.load(talking_bundle.path, threads=1) as model:
        yield model


def told(completion: Any) -> dict[str, Any]:
    """All of a completion that does not depend on the clock, as JSON has it."""
    fields = completion if isinstance(completion, dict) else dataclasses.asdict(completion)
    fields = {name: value for name, value in fields.items() if not name.endswith("_seconds")}
    found: dict[str, Any] = json.loads(json.dumps(fields), parse_constant=lambda _: None)
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_generate(talking_bundle, trusted, options):
    given = {"prompt": "hello world.", "max_new_tokens": 12, **options}
    assert told(asked("generate", talking_bundle.path, **given)) == told(trusted.generate(**given))


def test_chat_score_and_inspect(talking_bundle, trusted):
    messages = [{"role": "user", "content": "a<b>c"}]
    given = {"messages": messages, "max_new_tokens": 6, "special_tokens_as_text": True}
    assert told(asked("chat", talking_bundle.path, **given)) == told(trusted.generate_chat(**given))
    assert asked("score", talking_bundle.path, text="hello") == told(trusted.score("hello"))
    assert asked("inspect", talking_bundle.path)["manifest"]["vocab_size"] == trusted.manifest.vocab_size


def test_a_call_that_is_asked_for_has_the_same_ids(tiny, make_bundle):
    """Also where the mark of a call is a special token."""
    pytest.importorskip("llguidance")
    letters, mark = 'abcdefghilmnorstuwxy <>/_{}":,.1[]\nZ', "[TOOL_CALLS]"
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {mark: 36}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([mark])
    template = (
        f"{{# {mark} #}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{{{{ tools[0].function.name }}}}"
    )
    config = {"chat_template": template}
    bundle = make_bundle(tiny, "fused", tokenizer=tokenizer, tokenizer_config=config, eos_token_ids=(35,))
    messages: Any = [{"role": "user", "content": "hi"}]
    given: Any = {"tools": [TOOL], "tool_choice": "wet", "max_new_tokens": 60}
    with pastkey.load(bundle.path, threads=1) as model:
        here = model.generate_chat(messages, **given)
    assert here.ids[0] == 36
    assert asked("chat", bundle.path, messages=messages, **given)["ids"] == here.ids


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "words"),
    [
        ("generate", {"prompt": ""}, InputError, "the prompt is empty"),
        ("generate", {"prompt": [99]}, InputError, "99"),
        ("generate", {"prompt": "\ud800"}, InputError, "is not valid UTF-8"),
        ("generate", {"prompt": "a", "temprature": 1}, OptionError, "did you mean 'temperature'"),
        ("generate", {"prompt": {1, 2}}, InputError, "cannot be sent to the process"),
        ("fly", {}, InputError, "name is 'fly'; it must be 'generate', 'chat', 'score', 'inspect'"),
    ],
)
def test_errors_are_those_of_the_model(talking_bundle, name, arguments, kind, words):
    with pytest.raises(kind) as found:
        asked(name, talking_bundle.path, **arguments)
    assert words in str(found.value)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(MissingFileError, match="no such bundle: "):
        asked("inspect", tmp_path / "nowhere")
    with pytest.raises(UntrustedBundleError, match="the bytes are not a zip file of a bundle folder"):
        asked("inspect", b"")


def test_zip_files_are_unpacked_there(talking_bundle, tmp_path):
    file = tmp_path / "b.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for part in talking_bundle.path.rglob("*"):
            archive.write(part, f"b/{part.relative_to(talking_bundle.path)}")
    assert asked("generate", file.read_bytes(), prompt="ab", max_new_tokens=2)["new_tokens"] == 2
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pastkey.json", "{}")
        archive.writestr("onnx/x", bytes(20_000_000))
    with pytest.raises(UntrustedBundleError, match=r"b\.zip .*would be unpacked to more than 20 times"):
        asked("inspect", file)


TAKEN_OVER = {
    "print('no json')": "gave no result (the result is not valid JSON",
    "print('[1]')": "gave no result (",
    "print(json.dumps({'error': 5}))": "gave no result (",
    "print('x' * 17_000_000)": "gave a result of more than 16,000,000 bytes, and was ended",
    "frame(b'p') or time.sleep(9)": "gave no answer within 2 s",
}


@pytest.mark.parametrize("program", TAKEN_OVER)
def test_a_process_that_was_taken_over(talking_bundle, acting, program):
    acting(program)
    with pytest.raises(UntrustedBundleError) as found:
        pastkey.sandbox.call("score", talking_bundle.path, {"text": "a"}, pastkey.runtime.Limits(seconds=2.0))
    assert TAKEN_OVER[program] in str(found.value)


def test_progress_gives_no_more_time_than_tokens_were_asked_for(talking_bundle, acting):
    acting("while True: frame(b'p'); time.sleep(0.3)")
    with pytest.raises(UntrustedBundleError, match="gave no answer within 1 s"):
        calls.call("generate", talking_bundle.path, {"max_new_tokens": 3}, pastkey.runtime.Limits(seconds=1.0))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("InputError", InputError), ("IntegrityError", IntegrityError), ("ContextLengthError", UntrustedBundleError),
     ("SystemExit", UntrustedBundleError), ("errors", UntrustedBundleError)],
)  # fmt: skip
def test_errors_are_sentences_of_known_classes(talking_bundle, acting, name, kind):
    acting(f"print(json.dumps({{'error': [{name!r}, 'odd\\x1b[31m text' + 'x' * 10_000]}}))")
    with pytest.raises(kind) as found:
        asked("score", talking_bundle.path)
    assert type(found.value) is kind
    assert str(found.value).startswith("odd\N{REPLACEMENT CHARACTER}[31m text")
    assert len(str(found.value)) <= 4000
