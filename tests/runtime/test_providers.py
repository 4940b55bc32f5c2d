from __future__ import annotations

import pytest

from pastkey.errors import ProviderError
from pastkey.runtime import providers

CPU = [("CPUExecutionProvider", {})]


@pytest.mark.parametrize("choice", [None, "cpu", "CPU", "CPUExecutionProvider", ["cpu"], ("cpu", {}), []])
def test_the_cpu_by_every_name(choice: providers.Choice | None) -> None:
    assert providers.resolve(choice) == CPU


def test_a_portable_bundle_runs_on_the_cpu() -> None:
    assert providers.resolve(None, target="portable") == CPU


def test_options_are_kept() -> None:
    assert providers.resolve([("cpu", {"use_arena": "0"})]) == [("CPUExecutionProvider", {"use_arena": "0"})]


def test_the_cpu_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "available", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    names = [name for name, _ in providers.resolve("cuda")]
    assert names == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert [name for name, _ in providers.resolve(None, target="cuda")] == names


def test_an_absent_provider_is_refused_with_what_is_here_and_what_brings_it() -> None:
    with pytest.raises(ProviderError, match=r"'coreml' is not on this machine; here: .*cpu.*macOS"):
        providers.resolve("coreml")


@pytest.mark.parametrize("name", ["gpu9", "", "azure"])
def test_an_unknown_provider_is_refused(name: str) -> None:
    with pytest.raises(ProviderError, match="is unknown; here: "):
        providers.resolve(name)


def test_a_bundle_made_for_absent_hardware_says_so() -> None:
    with pytest.raises(ProviderError, match="the bundle was made for webgpu"):
        providers.resolve(None, target="webgpu")


def test_a_provider_that_did_not_start_is_not_passed_over_in_silence() -> None:
    wanted = [("CUDAExecutionProvider", {}), *CPU]
    providers.require_active(wanted, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="could not start the execution provider 'cuda'"):
        providers.require_active(wanted, ["CPUExecutionProvider"])


def test_devices_lists_every_known_provider_once_with_available_ones_first() -> None:
    rows = providers.devices()
    assert rows[0].short_name == "cpu"
    assert rows[0].available
    assert sorted(row.short_name for row in rows if row.short_name in providers.KNOWN) == sorted(providers.KNOWN)
    assert all(row.note for row in rows if not row.available)
