"""Embeddings, as numbers and as base64."""

from __future__ import annotations

import base64

import numpy as np

from ..conftest import ids_of

PATH = "/v1/embeddings"


def test_embeddings_are_the_runtimes_in_both_forms(served):
    expected = served.model.embed(["abc", "so"])
    for given in (["abc", "so"], [ids_of("abc"), ids_of("so")]):
        reply = served.ask(PATH, {"model": "tiny", "input": given})[1]
        assert reply["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        assert [one["index"] for one in reply["data"]] == [0, 1]
        np.testing.assert_allclose([one["embedding"] for one in reply["data"]], expected, rtol=1e-6)
    reply = served.ask(PATH, {"input": "abc", "encoding_format": "base64"})[1]
    found = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)
