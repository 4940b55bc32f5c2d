"""Sessions: texts that stay, each with its own cache over the one model, and are read back from their file."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError, NumericsError, OptionError, ResourceError
from pastkey.runtime import load
from pastkey.runtime.engine import decoder_graph

from ..conftest import DRAWN, metaspace


def test_a_text_goes_on_from_where_it_stands_and_a_fork_beside_it(model):
    session = model.session()
    session.append("once upon")
    first = session.generate(**DRAWN)
    assert first.ids == model.generate("once upon", **DRAWN).ids
    assert first.cached_tokens == 9 - 2
    so_far = [*model.prompt_ids("once upon"), *first.ids]
    assert (session.ids, session.text, len(session)) == (so_far, "once upon" + first.text, 21)
    fork = session.fork()
    for one, text in ((session, " a time"), (fork, " b")):
        found, whole = one.generate(text, **DRAWN), [*so_far, *model.prompt_ids(text)]
        assert found.ids == model.generate(whole, **DRAWN).ids
        assert (found.prompt_tokens, found.cached_tokens) == (len(whole), 20)  # the first's last token was not fed
        assert one.ids == [*whole, *found.ids]


def test_what_was_yielded_stands_in_the_session(model):
    session, prompt = model.session(), model.prompt_ids("abc")
    stream = session.stream("abc", **DRAWN)
    expected = model.generate("abc", **DRAWN).ids
    assert session.ids == []
    for count in (1, 2, 3):
        next(stream)
        assert session.ids == [*prompt, *expected[:count]]
    for call in (session.generate, session.fork, lambda: session.trim(0), lambda: session.append("x")):
        with pytest.raises(InputError, match="this session has an unfinished stream"):
            call()
    stream.close()
    assert session.ids == [*prompt, *expected[:3]]
    assert session.generate(**DRAWN | {"max_new_tokens": 9}).ids == expected[3:]


def test_a_stream_of_an_earlier_state_is_refused(lm):
    session = lm.session()
    made = session.stream("abc", **DRAWN)
    session.append("x")
    with pytest.raises(InputError, match="the session continued since this stream was made"):
        next(made)
    assert session.text == "x"


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tiny, make_bundle):
    with load(make_bundle(tiny, tokenizer=metaspace()).path, threads=1) as lm:
        session = lm.session()
        for piece in ("a cab", " fed", ""):
            session.append(piece)
        assert session.ids == lm.prompt_ids("a cab fed")
        fork = session.fork()
        fork.append("i")
        assert (fork.ids, fork.text) == (lm.prompt_ids("a cab fedi"), "a cab fedi")
        assert session.generate(" a", max_new_tokens=4).ids == lm.generate("a cab fed a", max_new_tokens=4).ids


def test_trim_and_keep_go_back(model):
    session = model.session()
    session.append("once upon a time")
    session.trim(9)
    assert session.text == "once upon"
    assert session.generate(**DRAWN).ids == model.generate("once upon", **DRAWN).ids
    assert session.keep("once again") == 5
    assert session.text == "once "
    completion = session.generate("again", **DRAWN)
    assert completion.ids == model.generate("once again", **DRAWN).ids
    assert completion.cached_tokens == 5
    for length in (-1, 100):
        with pytest.raises(InputError, match="cannot be trimmed to"):
            session.trim(length)


def test_what_a_session_cannot_do_is_refused(lm):
    session = lm.session()
    with pytest.raises(InputError, match="the session is empty: append a text first"):
        session.generate()
    wrong: Any
    for wrong in ("", [], [99], "a" * 601, {1: 2}):
        for begin in (session.append, session.generate):
            with pytest.raises(InputError):
                begin(wrong)
        assert session.ids == []
    with pytest.raises(OptionError, match=r"session\.generate\(\) has no option 'reuse_prefix'"):
        session.generate("a", reuse_prefix=True)
    with session:
        session.append("abc")
    assert repr(session) == "<Session, closed>"
    for call in (session.generate, session.fork, lambda: session.append("x"), lambda: session.save("x")):
        with pytest.raises(InputError, match=r"this session is closed: open another with model\.session\(\)"):
            call()


def test_closing_a_session_ends_its_stream_which_cannot_be_copied(lm):
    session = lm.session()
    stream = session.stream("abc", **DRAWN)
    next(stream)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="a stream can be neither copied nor pickled: give the model"):
            copied(stream)
    session.close()
    assert list(stream) == []
    assert lm.scheduler.live == 0


def test_cancel_from_another_thread_keeps_what_was_generated(lm):
    expected = lm.generate("abc", max_new_tokens=30).ids
    session = lm.session()

    def cancelling(ids: Any, logits: Any) -> Any:
        thread = threading.Thread(target=session.cancel)
        thread.start()
        thread.join()
        return logits

    completion = session.generate("abc", max_new_tokens=500, logits_processor=cancelling)
    assert completion.finish_reason == "cancelled"
    assert completion.new_tokens < 3
    assert session.ids == [*lm.prompt_ids("abc"), *completion.ids]
    rest = session.generate(max_new_tokens=20)
    assert [*completion.ids, *rest.ids] == expected[: completion.new_tokens + 20]


def test_memory_has_a_limit_that_is_looked_at_before(speaking_bundle, lm):
    per_token = lm.memory.estimate(1)
    assert per_token == 4 * 2 * (8 + 8 + 16 + 16)
    model = load(speaking_bundle.path, threads=1, max_memory=100 * per_token)
    assert model.generate("abc", max_new_tokens=90).new_tokens == 90
    with pytest.raises(ResourceError, match=r"the cache of 103 tokens needs .* MiB.*; max_memory is"):
        model.generate("abc", max_new_tokens=100)
    with model.session() as session:
        session.append("a" * 60)
        with pytest.raises(ResourceError, match=r"the cache of 110 tokens needs"):
            session.append("a" * 50)
        assert len(session) == 60
        with pytest.raises(ResourceError, match="others use"):
            model.generate("abc", max_new_tokens=50)
    assert model.generate("abc", max_new_tokens=50).new_tokens == 50


def test_what_fails_leaves_a_session_as_it_was(tiny, letters, make_bundle, monkeypatch, tmp_path):
    """Beyond 20 tokens the decoder gives NaN."""
    model = load(make_bundle(tiny.spoilt(slice(20, None)), tokenizer=letters).path, threads=1)
    monkeypatch.setattr(decoder_graph, "PREFILL_CHUNK", 8)  # so that the first of several runs end well
    session = model.session()
    session.append("once")
    for failing in (session.append, session.generate):
        with pytest.raises(NumericsError):
            failing("a text that is far longer than those that it takes")
        assert session.text == "once"
    session.save(tmp_path / "saved")
    for one in (session, model.load_session(tmp_path / "saved")):
        assert one.generate(" upon", max_new_tokens=5).ids == model.generate("once upon", max_new_tokens=5).ids
    yielded: list[list[int]] = []  # which stays, as in a stream that is closed
    with pytest.raises(NumericsError):
        yielded.extend(session.ids for _ in session.stream(max_new_tokens=30))
    assert session.ids == yielded[-1]
    assert len(yielded) > 4


# --- in a file: read back by the bundle that wrote it, and by no other, whole or not at all -------------------------
def begun(model: Any) -> Any:
    """A session of a text and its result."""
    session = model.session()
    session.generate("once upon", **DRAWN)
    return session


def test_it_goes_on_as_if_it_had_never_left(model, tmp_path):
    session = begun(model)
    session.save(tmp_path / "s")
    again = load(model.bundle.path, threads=1).load_session(tmp_path / "s")
    assert again.ids == session.ids
    expected, found = session.generate(" a", **DRAWN), again.generate(" a", **DRAWN)
    assert found.ids == expected.ids
    assert found.cached_tokens == expected.cached_tokens == 20
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_empty_one_is_one_too(lm, tmp_path):
    lm.session().save(tmp_path / "s")
    assert lm.load_session(tmp_path / "s").generate("ab", **DRAWN).ids == lm.generate("ab", **DRAWN).ids


# --- what is no session of this bundle ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    """The bytes of a file, and the ids in it."""
    session, file = begun(lm), tmp_path_factory.mktemp("saved") / "s"
    session.save(file)
    return file.read_bytes(), session.ids


def test_cut_or_altered_anywhere_it_is_refused(lm, saved, tmp_path):
    (content, ids), refused = saved, 0
    for length in [*range(0, len(content), len(content) // 20), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="cannot be read as a saved session"):
            lm.load_session(tmp_path / "cut")
    for place in range(0, len(content), len(content) // 100):
        altered = bytearray(content)
        altered[place] ^= 1
        (tmp_path / "altered").write_bytes(altered)
        try:
            assert lm.load_session(tmp_path / "altered").ids == ids  # a date in the zip file
        except IntegrityError:
            refused += 1
    assert refused > 90


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": [99]}, {"ids": [-1]}, {"ids": "abc"}, {"ids": [1.5]}, {"ids": [[1]]}, {"ids": [1] * 700},
        {"lengths": [22, 0]}, {"lengths": [-1, 0]}, {"lengths": [20, 21]}, {"lengths": [19, 0]}, {"lengths": [20, -1]},
        {"lengths": [20, 0, 0]}, {"lengths": [20.0, 0]}, {"arr_0": [1.0]}, {"arr_4": [1.0]},
        {"arr_0": np.zeros((1, 2, 20, 8))}, {"arr_0": np.zeros((1, 2, 5, 8), np.float32)}, {"bundle": 3},
    ],
)  # fmt: skip
def test_content_that_does_not_go_with_the_bundle_is_refused(lm, saved, tmp_path, fields):
    (tmp_path / "s").write_bytes(saved[0])
    with np.load(tmp_path / "s") as found:
        content: dict[str, Any] = {**found, **fields}
    with (tmp_path / "made").open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(IntegrityError):
        lm.load_session(tmp_path / "made")


def test_another_bundle_is_refused(saved, tmp_path, tiny, make_bundle):
    (tmp_path / "s").write_bytes(saved[0])
    other = load(make_bundle(type(tiny).random([(8, 8), (16, 16)], 600, seed=1)).path, threads=1)
    with pytest.raises(IntegrityError, match="was saved by another bundle than"):
        other.load_session(tmp_path / "s")


def test_where_there_is_none(lm, tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        lm.load_session(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        lm.load_session(tmp_path)
    with pytest.raises(IsADirectoryError):
        lm.session().save(tmp_path)


@pytest.mark.parametrize("place", [(os, "fsync"), (np, "savez")])
def test_a_full_disk_leaves_what_stood_there(lm, saved, tmp_path, monkeypatch, place):
    (tmp_path / "s").write_bytes(saved[0])
    session = lm.load_session(tmp_path / "s")
    session.generate(**DRAWN)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == saved[0]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    session.save(tmp_path / "s")
    assert len(lm.load_session(tmp_path / "s").ids) == 33
