"""The kernel library is used where it is installed, fits, and has a graph; elsewhere onnxruntime's kernels run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable

import pytest

from pastkey.errors import FallbackWarning, ProviderError
from pastkey.runtime.providers.native import NativeKernels, kernels_for, native_kernels
from pastkey.runtime.providers.placement import CPU

PACKAGE = "pastkey_kernels"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of the name, of this source, in the place of any other."""

    def install(source: str) -> None:
        folder = tmp_path / PACKAGE
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    monkeypatch.delenv("PASTKEY_NATIVE", raising=False)
    installed = {name: module for name, module in sys.modules.items() if name == PACKAGE}
    sys.modules.pop(PACKAGE, None)
    native_kernels.cache_clear()
    yield install
    native_kernels.cache_clear()
    sys.modules.pop(PACKAGE, None)
    sys.modules.update(installed)


@pytest.fixture
def found(monkeypatch):
    """found(KERNELS): as if this library were installed."""
    for name in ("PASTKEY_NATIVE", "PASTKEY_KERNELS"):
        monkeypatch.delenv(name, raising=False)

    def here(kernels: NativeKernels | None) -> NativeKernels | None:
        monkeypatch.setattr("pastkey.runtime.providers.native.native_kernels", lambda: kernels)
        return kernels

    return here


def package(library: str) -> str:
    return f"__version__ = '0.1.0'\ndef library_path():\n    return __file__.replace('__init__.py', {library!r})\n"


@pytest.fixture
def bundle(fused_bundle, tmp_path):
    manifest = dataclasses.replace(fused_bundle.manifest, native=1)
    return dataclasses.replace(fused_bundle, path=tmp_path, manifest=manifest)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (package("library.so"), "it cannot be loaded: "),
        ("raise ImportError('no module of its own')", "it cannot be loaded: no module of its own"),
        ("", "it cannot be loaded: module 'pastkey_kernels' has no attribute '__version__'"),
    ],
    ids=["no library", "no import", "another package"],
)
def test_a_library_that_cannot_be_loaded_says_why(source, words, install, bundle):
    install(source)
    found = native_kernels()
    assert found is not None
    assert found.refused.startswith(words)
    with pytest.warns(FallbackWarning, match=r"cannot be used, so onnxruntime's run .*: it cannot be loaded"):
        assert kernels_for(bundle, CPU, None) is None
    with pytest.raises(ProviderError, match="True, and the native kernels cannot be used: it cannot be loaded"):
        kernels_for(bundle, CPU, True)


def test_a_library_runs_graphs_of_its_version_and_of_earlier_ones(bundle, found):
    here = found(NativeKernels("0.2.0", 2, "avx2", "/library.so"))
    for version in (1, 2, 3):
        of_version = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, native=version))
        warns = pytest.warns(FallbackWarning, match="needs 3") if version == 3 else contextlib.nullcontext()
        with warns:
            assert kernels_for(of_version, CPU, None) is (here if version <= 2 else None)
    with pytest.raises(
        ProviderError, match="has version 2 of the operators, and the bundle needs 3: install the libra"
    ):
        kernels_for(of_version, CPU, True)


def test_they_may_be_switched_off_and_are_for_the_cpu(bundle, found, monkeypatch):
    here = found(NativeKernels("0.1.0", 1, "avx2", "/library.so"))
    assert kernels_for(bundle, CPU, None) is here
    assert kernels_for(bundle, CPU, False) is None
    monkeypatch.setenv("PASTKEY_NATIVE", "0")
    assert kernels_for(bundle, CPU, None) is None
    assert kernels_for(bundle, CPU, True) is here
    for value in ("off", "1"):
        monkeypatch.setenv("PASTKEY_NATIVE", value)
        with pytest.raises(ProviderError, match=f"PASTKEY_NATIVE is '{value}'; 0 was expected, .* native=True.* req"):
            kernels_for(bundle, CPU, None)
    plain = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, native=None))
    with pytest.raises(ProviderError, match=r"has no native graph"):
        kernels_for(plain, CPU, True)
    portable = found(NativeKernels("0.1.0", 1, "portable", "/library.so"))
    monkeypatch.delenv("PASTKEY_NATIVE")
    assert [kernels_for(bundle, CPU, asked) for asked in (None, True)] == [None, portable]
    monkeypatch.setenv("PASTKEY_KERNELS", "portable")
    assert kernels_for(bundle, CPU, None) is portable
    found(None)
    assert kernels_for(bundle, CPU, None) is None
    with pytest.raises(ProviderError, match=r"the kernel library is not installed"):
        kernels_for(bundle, CPU, True)
