from __future__ import annotations

import shutil

import pytest
from torch import nn

from pastkey.errors import InputError, ResourceError
from pastkey.export import resources
from pastkey.export.settings import ExportConfig


def test_a_weight_that_is_shared_counts_once():
    module = nn.Module()
    module.one = nn.Linear(3, 5, bias=False)
    module.other = nn.Linear(3, 5, bias=False)
    module.other.weight = module.one.weight
    module.norm = nn.BatchNorm1d(5)  # 10 parameters, and three buffers of 11 numbers
    assert resources.parameters(module) == 15 + 10 + 11


@pytest.mark.parametrize(
    ("config", "bytes_per_weight"),
    [
        (ExportConfig("fp32"), 4),
        (ExportConfig("fp32", format="ort"), 8),
        (ExportConfig("int8", format="ort"), 10),
        (ExportConfig("int8", max_kl=0.1), 15),
    ],
)
def test_a_disk_without_room_is_refused_with_both_sizes(config, bytes_per_weight, tmp_path, monkeypatch):
    out, weights = tmp_path / "not" / "there" / "yet", 10**9
    needed = resources.needs(weights, config, resident_bytes=0)
    assert needed.disk == bytes_per_weight * weights
    monkeypatch.setattr(resources, "available_memory", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed.disk))
    resources.require_room(out, needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed.disk - 1))
    with pytest.raises(ResourceError, match=rf"about {bytes_per_weight}\.0 GB of disk and .* are free"):
        resources.require_room(out, needed)


def test_memory_that_is_allocated_is_not_asked_for_again(tmp_path, monkeypatch):
    weights = 10**3
    needed = resources.needs(weights, ExportConfig("int8"), resident_bytes=4 * weights)
    assert needed.memory - resources.needs(weights, ExportConfig("int8"), resident_bytes=0).memory == 8 * weights
    assert str(needed) == "1,000 weights need about 0 MB of disk and 944 MB of memory"
    monkeypatch.setattr(resources, "available_memory", lambda: needed.memory - 4 * weights)
    resources.require_room(tmp_path, needed, allocated=4 * weights)
    with pytest.raises(ResourceError, match="of memory and"):
        resources.require_room(tmp_path, needed)


def test_memory_that_is_too_little_is_refused_and_unknown_memory_is_not(tmp_path, monkeypatch):
    needed = resources.needs(10**9, ExportConfig("int8"), resident_bytes=0)
    for free in (needed.memory, None):
        monkeypatch.setattr(resources, "available_memory", lambda free=free: free)
        resources.require_room(tmp_path, needed)
    monkeypatch.setattr(resources, "available_memory", lambda: needed.memory - 1)
    with pytest.raises(ResourceError, match=r"1,000,000,000 weights needs about [\d.]+ GB of memory"):
        resources.require_room(tmp_path, needed)
    with_file = resources.needs(10**9, ExportConfig("int8"), resident_bytes=0, temporary_bytes=4 * 10**9)
    assert with_file.disk - needed.disk == 4 * 10**9


def test_a_weight_that_no_shard_takes_and_an_ort_file_above_2_gb_are_refused():
    resources.require_below(2_000_001, 2_000_000)
    with pytest.raises(InputError, match=r"a weight has 2 MB, .* smaller than 2 MB: a weight is never split"):
        resources.require_below(2_000_000, 2_000_000)
    resources.require_ort_size(resources.MAX_ORT_BYTES - 1, "fp32")
    with pytest.raises(InputError, match=r"holds its weights and ends at 2 GB, and these have .* in fp32: leave out"):
        resources.require_ort_size(resources.MAX_ORT_BYTES, "fp32")
