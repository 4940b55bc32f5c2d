"""The kernel library is used where it is installed, fits, and has a graph; elsewhere onnxruntime's kernels run."""

import dataclasses
import sys

import pytest

from pastkey.errors import FallbackWarning, ProviderError
from pastkey.runtime.providers.native import NativeKernels, kernels_for, native_kernels
from pastkey.runtime.providers.placement import CPU

PACKAGE = "pastkey_kernels"
SOURCE = "__version__ = '0.1.0'\ndef library_path():\n    return __file__.replace('__init__.py', 'library.so')\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of the name, of this source, instead of any other. Returns its folder."""

    def install(source):
        (tmp_path / PACKAGE).mkdir()
        (tmp_path / PACKAGE / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path / PACKAGE

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
    """found(*KERNELS): as if a library of these were installed."""
    for name in ("PASTKEY_NATIVE", "PASTKEY_KERNELS"):
        monkeypatch.delenv(name, raising=False)

    def here(version, level):
        kernels = NativeKernels("0.2.0", version, level, "/library.so") if version else None
        monkeypatch.setattr("pastkey.runtime.providers.native.native_kernels", lambda: kernels)
        return kernels

    return here


def with_manifest(bundle, **fields):
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **fields))


@pytest.fixture
def bundle(fused_bundle, tmp_path):
    manifest = dataclasses.replace(fused_bundle.manifest, native=1)
    return dataclasses.replace(fused_bundle, path=tmp_path, manifest=manifest)


def refused(bundle, words):
    """They are not used, and one who asks for them is told why."""
    with pytest.warns(FallbackWarning, match=rf"cannot be used, so onnxruntime's run .*: .*{words}"):
        assert kernels_for(bundle, CPU, None) is None
    with pytest.raises(ProviderError, match=f"True, and the native kernels cannot be used: .*{words}"):
        kernels_for(bundle, CPU, True)


NOT_LOADED = [
    (SOURCE, "it cannot be loaded: "),  # no library
    ("raise ImportError('no module of its own')", "it cannot be loaded: no module of its own"),
    ("", "it cannot be loaded: module 'pastkey_kernels' has no attribute '__version__'"),
]


@pytest.mark.parametrize(("source", "words"), NOT_LOADED)
def test_a_library_that_cannot_be_loaded_says_why(source, words, install, bundle):
    install(source)
    assert native_kernels().refused.startswith(words)
    refused(bundle, words)


def test_a_library_runs_graphs_of_its_version_and_of_earlier_ones(bundle, found):
    here = found(2, "avx2")
    for version in (1, 2):
        assert kernels_for(with_manifest(bundle, native=version), CPU, None) is here
    refused(with_manifest(bundle, native=3), "has version 2 of the operators, and the bundle needs 3: install the")


def test_they_may_be_switched_off_and_are_for_the_cpu(bundle, found, monkeypatch):
    here = found(1, "avx2")
    assert [kernels_for(bundle, CPU, asked) for asked in (None, False)] == [here, None]
    monkeypatch.setenv("PASTKEY_NATIVE", "0")
    assert [kernels_for(bundle, CPU, asked) for asked in (None, True)] == [None, here]
    for value in ("off", "1"):
        monkeypatch.setenv("PASTKEY_NATIVE", value)
        with pytest.raises(ProviderError, match=f"PASTKEY_NATIVE is '{value}'; 0 was expected, .* native=True.* req"):
            kernels_for(bundle, CPU, None)
    with pytest.raises(ProviderError, match=r"has no native graph"):
        kernels_for(with_manifest(bundle, native=None), CPU, True)
    monkeypatch.delenv("PASTKEY_NATIVE")
    portable = found(1, "portable")
    assert [kernels_for(bundle, CPU, asked) for asked in (None, True)] == [None, portable]
    monkeypatch.setenv("PASTKEY_KERNELS", "portable")
    assert kernels_for(bundle, CPU, None) is portable
    found(0, "")
    assert kernels_for(bundle, CPU, None) is None
    with pytest.raises(ProviderError, match=r"the kernel library is not installed"):
        kernels_for(bundle, CPU, True)
