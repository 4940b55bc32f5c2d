"""Models, health, metrics, props, the OpenAPI description; tokens and embeddings; the page's files."""

import base64
import json
import re

import numpy as np

from pastkey.serve.app import TABLE
from pastkey.serve.routes.page import FILES

from ..conftest import TEMPLATE, ids_of, running


def test_the_model_is_listed_with_and_without_v1(served):
    for prefix in ("", "/v1"):
        (model,) = served.ask(prefix + "/models")[1]["data"]
        assert (model["id"], model["object"], model["meta"]["n_ctx_train"]) == ("tiny", "model", 600)
        assert served.ask(prefix + "/models/tiny") == (200, model)
        assert served.ask(prefix + "/models/gpt-9")[1]["error"]["code"] == "model_not_found"


def test_the_metrics_count_what_was_done(served):
    def metrics():
        with served.response("/metrics") as response:
            assert response.headers["content-type"].startswith("text/plain; version=")
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = metrics()
    served.ask("/v1/completions", {"prompt": "abc", "max_tokens": 5})
    after = metrics()
    for name, more in (("new_tokens_total", 5), ("prompt_tokens_total", 3), ("requests_total", 1)):
        assert after[f"pastkey_{name}"] - before[f"pastkey_{name}"] == more
    assert after["pastkey_running"] == after["pastkey_waiting"] == 0
    assert after['pastkey_http_requests_total{route="/completions",status="200"}'] >= 1


def test_the_props_have_the_template_and_no_path(served):
    props = served.ask("/props")[1]
    assert (props["chat_template"], props["context_length"]) == (TEMPLATE, 600)
    assert str(served.model.bundle.path) not in str(props)


def test_an_unknown_route_and_method_are_errors_in_json(served):
    assert served.ask("/v1/nothing")[0] == 404
    assert served.ask("/v1/nothing", {})[0] == 404
    for path in ("/v1/chat/completions", "/tokenize"):
        with served.response(path) as response:
            assert (response.status, response.headers["allow"]) == (405, "POST")
    assert served.ask("/health", {})[0] == 405


def test_text_becomes_tokens_and_text_again(served):
    assert served.ask("/tokenize", {"content": "so {a}"}) == (200, {"tokens": ids_of("so {a}")})
    assert served.ask("/tokenize", {"content": ""})[1] == {"tokens": []}
    pieces = served.ask("/v1/tokenize", {"content": "so", "with_pieces": True})[1]["tokens"]
    assert [one["piece"] for one in pieces] == ["s", "o"]
    assert served.ask("/detokenize", {"tokens": ids_of("so {a}")}) == (200, {"content": "so {a}"})


def test_the_template_is_applied(served):
    messages = [{"role": "developer", "content": "so"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    status, reply = served.ask("/apply-template", {"messages": messages})
    assert (status, reply) == (200, {"prompt": "<system>so.<user>hi.<assistant>"})


def test_embeddings_are_the_runtimes_in_both_forms(served):
    expected = served.model.embed(["abc", "so"])
    for given in (["abc", "so"], [ids_of("abc"), ids_of("so")]):
        reply = served.ask("/v1/embeddings", {"model": "tiny", "input": given})[1]
        assert reply["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        assert [one["index"] for one in reply["data"]] == [0, 1]
        np.testing.assert_allclose([one["embedding"] for one in reply["data"]], expected, rtol=1e-6)
    reply = served.ask("/v1/embeddings", {"input": "abc", "encoding_format": "base64"})[1]
    found = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)


# --- the description and the page -----------------------------------------------------------------------------------
def test_each_route_is_described_by_its_model(served):
    status, found = served.ask("/openapi.json")
    assert (status, found["openapi"]) == (200, "3.1.0")
    assert found["paths"].keys() == {re.sub(r":\w+}", "}", entry.path) for entry in TABLE}
    for entry in TABLE:
        operation = found["paths"][re.sub(r":\w+}", "}", entry.path)][entry.method.lower()]
        assert operation["summary"].endswith(".") or ": " in operation["summary"]
        assert ("text/event-stream" in operation["responses"]["200"]["content"]) == entry.streams
        if entry.body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            names = {field.alias or name for name, field in entry.body.model_fields.items()}
            assert (schema["properties"].keys(), schema["additionalProperties"]) == (names, False)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found)))
    assert set() < references <= found["components"]["schemas"].keys()


def test_the_files_of_the_page_are_given_with_or_without_a_key_and_no_others(served, bundle):
    with running(bundle, keys=("QZ",)) as locked:
        for server in (served, locked):
            for name, kind in FILES.items():
                with server.response(f"/{name}") as response:
                    assert (response.status, response.headers["content-type"].split(";")[0]) == (200, kind)
                    policy = response.headers["content-security-policy"]
                    assert policy.startswith("default-src 'none'; script-src 'self'; ")
                    named = re.findall(r'(?:src|href)="([\w.]+)"|from "\./([\w.]+)"', response.read().decode())
                    assert all((one or other) in FILES for one, other in named)
            for path in ("/../conftest.py", "/page/chat.js", "/pastkey.json", "/index.html", "//etc/passwd"):
                assert server.ask(path)[0] == 404
