"""The OpenAPI description, and that it tells of what the server does."""

from __future__ import annotations

import json
import re

from pastkey.serve.app import TABLE


def test_each_route_is_described_by_its_model(served):
    status, found = served.ask("/openapi.json")
    assert (status, found["openapi"]) == (200, "3.1.0")
    assert found["paths"].keys() == {re.sub(r":\w+}", "}", entry.path) for entry in TABLE}
    for entry in TABLE:
        operation = found["paths"][re.sub(r":\w+}", "}", entry.path)][entry.method.lower()]
        assert operation["summary"].endswith(".") or ": " in operation["summary"]
        if entry.body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            names = {field.alias or name for name, field in entry.body.model_fields.items()}
            assert schema["properties"].keys() == names
            assert schema["additionalProperties"] is False


def test_every_reference_leads_to_a_schema(served):
    found = served.ask("/openapi.json")[1]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found)))
    assert references
    assert references <= found["components"]["schemas"].keys()
