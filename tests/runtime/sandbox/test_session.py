from __future__ import annotations

from pathlib import Path

import pytest

from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, Session
from pastkey.runtime.sandbox.model import UntrustedModel

from .conftest import told


def test_a_session_is_that_of_the_model(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    outcomes = []
    for model in (untrusted, trusted):
        with model.session() as session:
            session.append("hello")
            session.append([1, 2])
            first = session.generate(" and", max_new_tokens=5)
            fork = session.fork()
            chunks = list(session.stream(max_new_tokens=4))
            other = fork.generate("x", max_new_tokens=3, temperature=1.0, seed=3)
            kept = session.keep("hello abc")
            session.trim(3)
            size = session.nbytes
            outcomes.append([told(first), chunks, told(other), kept, session.ids, session.text, len(session), size > 0])
            fork.close()
    assert outcomes[0] == outcomes[1]


def test_what_it_refuses(untrusted: UntrustedModel, tmp_path: Path) -> None:
    session = untrusted.session()
    assert isinstance(session, Session)
    with pytest.raises(InputError, match="the session is empty"):
        session.generate()
    session.append("hello")
    with pytest.raises(InputError, match="the session holds 5 tokens and cannot be trimmed to 9"):
        session.trim(9)
    with pytest.raises(InputError, match="length is 'all'"):
        session.trim("all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="writes no file"):
        session.save(tmp_path / "s")
    stream = session.stream(max_new_tokens=100)
    next(stream)
    with pytest.raises(InputError, match="has a stream that is not at its end"):
        session.append("x")
    session.cancel()
    assert len(list(stream)) < 50
    session.append("x")
    assert "tokens" in repr(session)
    session.close()
    session.close()
    assert (session.nbytes, repr(session)) == (0, "<UntrustedSession, closed>")
    for call in (
        lambda: session.ids,
        lambda: session.append("a"),
        session.generate,
        session.fork,
        lambda: session.trim(0),
    ):
        with pytest.raises(InputError, match="this session is closed"):
            call()
