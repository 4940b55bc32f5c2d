"""examples/android and examples/ios, which tests/programs compiles: what they name is what a bundle has."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest, StateGeometry
from pastkey.files.folder import FileRecord

from .shared import ROOT

SOURCES = {"android": ("kt", "kts"), "ios": ("swift",)}  # the suffixes of their sources
LENGTHS = {names.SEQLENS_K, names.TOTAL_SEQUENCE_LENGTH}
INPUTS = LENGTHS | {names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS, names.LOGITS_START}
# A quoted word of these forms is the name of a tensor, or of its beginning.
TENSOR = re.compile(r'"((?:past_|present|input_|attention_|position_|logits|seqlens_|total_)[\w.]*)"')


def source(system: str, name: str = "") -> str:
    """The text of all sources, or of one."""
    if name:
        (file,) = (ROOT / "examples" / system).rglob(name)
        return file.read_text(encoding="utf-8")
    files = [file for end in SOURCES[system] for file in sorted((ROOT / "examples" / system).rglob(f"*.{end}"))]
    assert len(files) > 5
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("system", SOURCES)
def test_it_feeds_what_the_graphs_have(system):
    named = set(TENSOR.findall(re.sub(r"\\\(i\)", "0", source(system))))
    beginnings = {names.PAST_PREFIX, names.PRESENT_PREFIX, "past_", "present_"}
    caches = {names.past_key(0), names.past_value(0), names.past_conv(0)}
    assert named >= INPUTS | {names.LOGITS, names.PAST_PREFIX, names.PRESENT_PREFIX}
    assert named <= INPUTS | {names.LOGITS} | beginnings | caches


def test_they_read_fields_that_the_manifest_has():
    read = {
        "android": re.findall(r'get\w+\("(\w+)"\)', source("android", "Manifest.kt")),
        "ios": ", ".join(re.findall(r"let ((?:\w+, )*\w+): (?:Int|String|\[)", source("ios", "Manifest.swift"))).split(
            ", "
        ),
    }
    kinds = (Manifest, KVGeometry, StateGeometry, FileRecord)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for found in read.values():
        assert {"vocab_size", "context_length", "eos_token_ids", "precision", "size", "sha256", "files"} <= {*found}
        assert {*found} <= fields


def test_the_page_pins_what_the_projects_pin():
    page = (ROOT / "docs" / "mobile.md").read_text(encoding="utf-8")
    table = page[: page.index("## What was tested")]
    pins = re.findall(r'"([\w.-]+):([\w.-]+):([\d.]+)"|exact: "([\d.]+)"', "".join(map(source, SOURCES)))
    assert len(pins) == 5
    for group, name, version, exact in pins:
        assert (f"`{group}:{name}:{version}`" if name else f" {exact}") in table
    wrapper = (ROOT / "examples/android/gradle/wrapper/gradle-wrapper.properties").read_text(encoding="utf-8")
    (release,) = re.findall(r"gradle-([\d.]+)-bin\.zip", wrapper)
    assert f"Gradle {release}" in table


def test_djl_is_told_not_to_report_its_use():
    before, _, _ = source("android", "Writer.kt").partition("HuggingFaceTokenizer.newInstance")
    assert 'System.setProperty("OPT_OUT_TRACKING", "true")' in before
