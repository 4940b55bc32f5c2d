"""The kernel library is used where it is installed, fits, and has a graph; elsewhere onnxruntime's kernels run."""

import dataclasses
import struct
import sys

import pytest

from pastkey.errors import FallbackWarning, ProviderError
from pastkey.runtime.providers.native import NativeKernels, kernels_for, native_kernels
from pastkey.runtime.providers.placement import CPU

from ...onnx_text import encode_model

PACKAGE = "pastkey_kernels"
SOURCE = "__version__ = '0.1.0'\ndef library_path():\n    return __file__.replace('__init__.py', 'library.so')\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of the name, of this source, in the place of any other. Returns its folder."""

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


def write_graph(bundle, version=1, attributes=""):
    text = (
        f'<ir_version: 10, opset_import: ["": 20, "pastkey": {version}]>\n'
        f"g (float[1] x) => (float[1] y) {{\nz = Relu<other = 1>(x)\ny = pastkey.MatMulInt8{attributes}(x)\n}}"
    )
    bundle.native_graph.parent.mkdir(exist_ok=True)
    bundle.native_graph.write_bytes(encode_model(text, {})[0])


@pytest.fixture
def bundle(fused_bundle, tmp_path):
    made = with_manifest(dataclasses.replace(fused_bundle, path=tmp_path), native=1)
    write_graph(made, attributes="<terms = 2>")
    return made


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


@pytest.mark.parametrize("ends", [(1000,), (64, 1000, 100)])
def test_a_library_that_is_cut_short_says_so(ends, install):
    """The loader would end the process by SIGBUS, with a wheel's record beside it or without."""
    library = install(SOURCE) / "library.so"
    elf = b"\x7fELF\x02\x01" + struct.pack("<26xQ16xH6x", 64, len(ends))
    elf += b"".join(struct.pack("<8xQ16xQ16x", 60, end - 60) for end in ends)
    library.write_bytes(elf.ljust(300, b"\0"))
    assert native_kernels().refused == f"{library} was cut short by 700 bytes: install it again"
    library.write_bytes(elf[:60])  # not even a header
    native_kernels.cache_clear()
    assert native_kernels().refused.startswith("it cannot be loaded: ")


def test_a_library_runs_graphs_of_its_version_and_of_earlier_ones(bundle, found):
    here = found(2, "avx2")
    for version in (1, 2):
        assert kernels_for(with_manifest(bundle, native=version), CPU, None) is here
    refused(with_manifest(bundle, native=3), "has version 2 of the operators, and the bundle needs 3: install the")


UNKNOWN = [
    (3, "", "imports version 3 of the operators, and the installed library has 2"),
    (2, "<rotate = 1>", "has the attribute 'rotate', which the operators do not have"),
    (2, "<gate = 0, caps = [1.0, 2.0]>", "has the attribute 'caps'"),
]


@pytest.mark.parametrize(("version", "attributes", "words"), UNKNOWN)
def test_a_graph_that_the_operators_do_not_know_is_not_run(version, attributes, words, bundle, found):
    """onnxruntime would run it without what it asks for."""
    assert found(2, "avx2") is kernels_for(bundle, CPU, None)
    write_graph(bundle, version, attributes)
    refused(bundle, words)


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
