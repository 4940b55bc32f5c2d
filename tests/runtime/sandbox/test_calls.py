"""Each call gives the results of the model opened here, and a hijacked process is not believed."""

import dataclasses
import json
import zipfile

import pytest
from tokenizers import Tokenizer, decoders, models

import pastkey
from pastkey.errors import InputError, IntegrityError, MissingFileError, OptionError, UntrustedBundleError
from pastkey.runtime.sandbox.calls import call
from pastkey.runtime.sandbox.limits import Limits

from .conftest import EASY

DRAWN = {"prompt": "hello world.", "temperature": 0.8, "seed": 1, "logprobs": 3, "prompt_logprobs": True}
BANNED = {"logit_bias": {3: 50.0}, "stop": ["c", "zz"], "bad_words": ["d"], "suppress_tokens": [1, 2]}
MESSAGES = [{"role": "user", "content": "a<b>c"}]
CALLS = [
    ("generate", "generate", {**DRAWN, "max_new_tokens": 12}),
    ("generate", "generate", {"prompt": "hello world.", "max_new_tokens": 12, **BANNED}),
    ("chat", "generate_chat", {"messages": MESSAGES, "max_new_tokens": 6, "special_tokens_as_text": True}),
    ("score", "score", {"text": "hello"}),
]


def asked(name, bundle, limits=EASY, **arguments):
    return call(name, bundle, arguments, limits, threads=1)


@pytest.fixture(scope="module")
def trusted(talking_bundle):
    with pastkey.load(talking_bundle.path, threads=1) as model:
        yield model


def told(completion):
    """All of a completion that does not depend on the clock, as JSON has it."""
    fields = completion if isinstance(completion, dict) else dataclasses.asdict(completion)
    fields = {name: value for name, value in fields.items() if not name.endswith("_seconds")}
    return json.loads(json.dumps(fields), parse_constant=lambda _: None)


@pytest.mark.parametrize(("name", "method", "arguments"), CALLS)
def test_a_call_gives_what_the_model_gives(talking_bundle, trusted, name, method, arguments):
    assert told(asked(name, talking_bundle.path, **arguments)) == told(getattr(trusted, method)(**arguments))


REFUSED = [
    ("generate", {"prompt": ""}, InputError, "the prompt is empty"),
    ("generate", {"prompt": [99]}, InputError, "99"),
    ("generate", {"prompt": "\ud800"}, InputError, "is not valid UTF-8"),
    ("generate", {"prompt": "a", "temprature": 1}, OptionError, "did you mean 'temperature'"),
    ("generate", {"prompt": {1, 2}}, TypeError, "not JSON serializable"),
    ("generate", {"promt": "a"}, InputError, "'prompt' was expected among them"),
    ("score", {"txt": "a"}, InputError, "'text' was expected among them"),
    ("generate", {"prompt": "a", "logit_bias": {"a": 1}}, InputError, "logit_bias"),
    ("inspect", {"prompt": "a"}, InputError, "None for inspect"),
    ("fly", {}, InputError, "name is 'fly'; it must be 'generate', 'chat', 'score', 'inspect'"),
]


@pytest.mark.parametrize(("name", "arguments", "kind", "words"), REFUSED)
def test_errors_are_those_of_the_model(talking_bundle, name, arguments, kind, words):
    with pytest.raises(kind, match=words):
        asked(name, talking_bundle.path, **arguments)


def test_a_call_that_is_asked_for_has_the_same_ids(tiny, make_bundle):
    """Its beginning is text of the template, and its mark a special token."""
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
    tool = {"type": "function", "function": {"name": "wet", "parameters": {"type": "object", "properties": {}}}}
    given = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "tool_choice": "wet"}
    with pastkey.load(bundle.path, threads=1) as model:
        here = model.generate_chat(**given, max_new_tokens=60)
    assert here.ids[0] == 36
    assert asked("chat", bundle.path, **given, max_new_tokens=60)["ids"] == here.ids


def test_zip_files_are_unpacked_there(talking_bundle, trusted, tmp_path):
    file = tmp_path / "b.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for part in talking_bundle.path.rglob("*"):
            archive.write(part, f"b/{part.relative_to(talking_bundle.path)}")
    assert asked("inspect", file.read_bytes())["manifest"]["vocab_size"] == trusted.manifest.vocab_size
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pastkey.json", "{}")
        archive.writestr("onnx/x", bytes(20_000_000))
    with pytest.raises(UntrustedBundleError, match=r"b\.zip .*would be unpacked to more than 20 times"):
        asked("inspect", file)
    with pytest.raises(UntrustedBundleError, match="the bytes are not a zip file of a bundle folder"):
        asked("inspect", b"")
    with pytest.raises(MissingFileError, match="no such bundle: "):
        asked("inspect", tmp_path / "nowhere")


TAKEN_OVER = {
    "print('no json')": "gave no result (the result is not valid JSON",
    "print('[1]')": "gave no result (",
    "print(json.dumps({'error': 5}))": "gave no result (",
    "print('x' * 17_000_000)": "gave a result of more than 16,000,000 bytes, and was ended",
    "frame(b'p') or time.sleep(9)": "gave no answer within 1 s",
    "while True: frame(b'p'); time.sleep(0.3)": "gave no answer within 1 s",  # for more tokens than were asked for
}


@pytest.mark.parametrize("program", TAKEN_OVER)
def test_a_process_that_was_taken_over(talking_bundle, acting, program):
    acting(program)
    with pytest.raises(UntrustedBundleError) as found:
        asked("generate", talking_bundle.path, Limits(seconds=1.0 if "sleep" in program else 20.0), max_new_tokens=3)
    assert TAKEN_OVER[program] in str(found.value)


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
