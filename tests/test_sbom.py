"""The list of what an extra brings is that of pip, package by package, with the hash of each."""

from __future__ import annotations

import json

import pytest

from tools.sbom import write_sbom


@pytest.mark.matrix  # it asks the package index
def test_the_document_has_each_package_and_its_hash(tmp_path):
    content = json.loads(write_sbom("sign", tmp_path).read_text(encoding="utf-8"))
    assert (content["bomFormat"], content["metadata"]["component"]["name"]) == ("CycloneDX", "pastkey")
    found = {component["name"]: component for component in content["components"]}
    assert {"numpy", "tokenizers", "cryptography", "cffi", "huggingface-hub"} <= set(found)
    pinned = (tmp_path / "pastkey-sign.txt").read_text(encoding="utf-8").splitlines()
    assert len(pinned) == len(found)
    for name, component in found.items():
        assert component["purl"] == f"pkg:pypi/{name}@{component['version']}"
        (reference,) = (each for each in component["externalReferences"] if each.get("hashes"))
        assert any(line.endswith(reference["hashes"][0]["content"]) for line in pinned)
