"""The options of a request, and where those that it leaves out come from."""

import pytest

from ..conftest import CHAT, COMPLETIONS, HI, running, write_tiny

GREEDY = {"temperature": 0.0}
DRAWING = {"do_sample": True, "top_k": 3}
NOT_DRAWING = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.9}
CASES = {  # the authors' own, the flags' -> the fields of requests, and the options that they get
    "no file": (None, {"temperature": 0.5}, [({}, {"temperature": 0.5})]),
    "an empty file": ({}, {}, [({}, GREEDY)]),
    "authors who do not draw": (NOT_DRAWING, {}, [
        ({}, {**GREEDY, "repetition_penalty": 1.9}),
        ({"temperature": 1.5}, {"temperature": 1.5, "repetition_penalty": 1.9}),
    ]),
    "authors who draw": (DRAWING, {}, [({}, {"temperature": 1.0, "top_k": 3}), ({"temperature": 0}, GREEDY)]),
    "flags": (DRAWING, {"temperature": 0.5, "top_k": 2}, [
        ({}, {"temperature": 0.5, "top_k": 2}),
        ({"temperature": 2}, {"temperature": 2, "top_k": 2}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize(("authors", "flags", "requests"), CASES.values(), ids=CASES)
def test_a_request_comes_before_the_flags_and_these_before_the_models_own(tmp_path, authors, flags, requests):
    bundle = write_tiny(tmp_path / "tiny", **({} if authors is None else {"generation_config": authors}))
    with running(bundle, defaults=flags) as served:
        for asked, expected in requests:
            asked, expected = {"max_tokens": 12, "seed": 3, **asked}, {"max_new_tokens": 12, "seed": 3, **expected}
            text = served.choices(COMPLETIONS, prompt="abc", **asked)[0]["text"]
            assert text == served.model.generate("abc", **expected).text
            answer = served.choices(CHAT, messages=HI, **asked)[0]["message"]["content"]
            assert answer == served.model.generate_chat(HI, **expected).text
        assert served.ask("/props")[1]["defaults"].items() >= flags.items()
