"""examples/android and examples/ios, which nothing here can compile: what they name is what a bundle has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest, StateGeometry

ROOT = Path(__file__).parent.parent
SOURCES = {"android": "android/MainActivity.kt", "ios": "ios/GreedyDecoder.swift"}
LENGTHS = {names.SEQLENS_K, names.TOTAL_SEQUENCE_LENGTH}
INPUTS = LENGTHS | {names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS, names.LOGITS_START}
# A quoted word of these forms is the name of a tensor, or of its beginning.
TENSOR = re.compile(r'"((?:past_|present|input_|attention_|position_|logits|seqlens_|total_)[\w.]*)"')


def source(system: str) -> str:
    return (ROOT / "examples" / SOURCES[system]).read_text(encoding="utf-8")


@pytest.mark.parametrize("system", SOURCES)
def test_it_feeds_what_the_graphs_have(system: str) -> None:
    named = set(TENSOR.findall(re.sub(r"\\\(i\)", "0", source(system))))
    beginnings = {names.PAST_PREFIX, names.PRESENT_PREFIX, "past_", "present_"}
    caches = {names.past_key(0), names.past_value(0), names.past_conv(0)}
    assert named >= INPUTS | {names.LOGITS, names.PAST_PREFIX, names.PRESENT_PREFIX}
    assert named <= INPUTS | {names.LOGITS} | beginnings | caches


def test_the_renaming_of_the_cache_is_that_of_the_names() -> None:
    """What both sources do to a past input's name, in Python."""
    for past, present in (
        (names.past_key(3), names.present_key(3)),
        (names.past_value(0), names.present_value(0)),
        (names.past_conv(2), names.present_conv(2)),
    ):
        attention = past.startswith(names.PAST_PREFIX)
        renamed = (names.PAST_PREFIX, names.PRESENT_PREFIX) if attention else ("past_", "present_")
        assert past.replace(*renamed) == present
        for system in SOURCES:
            assert all(f'"{word}"' in source(system) for word in renamed)


@pytest.mark.parametrize("system", SOURCES)
def test_it_reads_fields_that_the_manifest_has(system: str) -> None:
    read = re.findall(r'get\w+\("(\w+)"\)', source("android")) if system == "android" else []
    if system == "ios":
        for line in re.findall(
            r"^\s+(?:struct \w+: Decodable \{ )?let ((?:\w+, )*\w+): (?:Int|\[)", source("ios"), re.M
        ):
            read += line.split(", ")
    fields = {field.name for kind in (Manifest, KVGeometry, StateGeometry) for field in dataclasses.fields(kind)}
    assert len(read) >= 3
    assert set(read) <= fields


def test_the_page_pins_what_the_sources_pin() -> None:
    page = (ROOT / "docs" / "mobile.md").read_text(encoding="utf-8")
    table = page[: page.index("## Which file")]
    pins = re.findall(
        r"onnxruntime-android:([\d.]+)|exact: \"([\d.]+)\"|-objc', '([\d.]+)'", "".join(map(source, SOURCES))
    )
    found = {version for groups in pins for version in groups if version}
    assert len(found) == 3
    assert all(version in table for version in found)
