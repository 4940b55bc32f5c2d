"""`pastkey upgrade`: adds to a bundle the graph for pastkey's kernel library, without a new export."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from pastkey.command import Command, say
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle, read_bundle
from pastkey.errors import InputError, ProviderError
from pastkey.files.durable import whole_folder, write_json
from pastkey.files.folder import file_records, parse_records
from pastkey.precisions import PRECISIONS
from pastkey.runtime.commands.flags import BUNDLE


def upgrade(path: str | Path, out: str | Path, *, force: bool = False) -> Bundle:
    """Copies a bundle to a new folder and adds the native graph: docs/native.md.

    Args:
        path: An int8 or int4 bundle for the CPU.
        out: The folder to write.
        force: Replaces an existing bundle.

    Returns:
        The new bundle. It has no signature.

    Raises:
        MissingFileError, ExistingFolderError, IntegrityError: A folder that is not as it should be.
        InputError: No operator of the bundle has a kernel, or `out` is the bundle itself.
        ProviderError: The installed kernels compute other logits.
    """
    from pastkey.runtime import Engine
    from pastkey.runtime.engine.golden import Golden, native_refusal
    from pastkey.runtime.providers.native import kernels_for
    from pastkey.runtime.providers.placement import CPU

    from .quantize.exact import exact_engine

    bundle, out = open_bundle(path), Path(out)
    if out.resolve() == bundle.path.resolve():
        raise InputError(f"{out} is what is to be upgraded, and would be replaced: choose another --out")
    with whole_folder(out, force=force) as folder:
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        made = add_native_graph(dataclasses.replace(bundle, path=folder))
        if made.manifest.native is None:
            raise InputError(
                f"no operator of {bundle.path} has a native kernel: it has {bundle.manifest.precision} weights, the "
                f"{bundle.manifest.graph} graph and the target {bundle.manifest.target}, and kernels are for int8 and "
                "int4 weights with columns in multiples of 32, the fused graph and the target cpu; onnxruntime's "
                "kernels run it as it is"
            )
        if names.GOLDEN in bundle.manifest.files:  # an older pastkey may have taken a place where rounding decides
            rows, limit = len(Golden.of(bundle).ends), PRECISIONS[bundle.manifest.precision].golden_limit
            with exact_engine(dataclasses.replace(bundle, path=folder)) as exact:
                again = Golden.computed(Engine(bundle, providers="cpu", native=False), rows, limit, exact)
            again.save(folder / names.GOLDEN)
        files = [*bundle.manifest.files, names.NATIVE_GRAPH]
        records = parse_records(folder, file_records(folder, sorted(set(files))))
        made = dataclasses.replace(made, manifest=dataclasses.replace(made.manifest, files=records))
        write_json(folder / names.MANIFEST, made.manifest.to_json())
        if kernels_for(made, CPU, None) is not None and (why := native_refusal(Engine(made, providers="cpu"), made)):
            raise ProviderError(
                f"{why}, so {bundle.path} gets no graph for them: onnxruntime's kernels run it as it is"
            )
    return read_bundle(out)


def add_native_graph(bundle: Bundle) -> Bundle:
    """Writes the native graph of a quantized bundle with the fused graph, if an operator has a kernel.

    Returns the bundle with the operators' version in its manifest.
    """
    from .graph.write.native import write_native_graph

    manifest = bundle.manifest
    able = manifest.graph == "fused" and PRECISIONS[manifest.precision].quantized and manifest.target == "cpu"
    found = able and write_native_graph(bundle.last_logits_graph, bundle.path / names.NATIVE_GRAPH)
    native = names.NATIVE_OPERATORS if found else None
    return dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, native=native, native_left_out=""))


# --- the command --------------------------------------------------------------------------------------------------
def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    parser.add_argument("--out", required=True, metavar="BUNDLE2", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")


def _run(arguments: argparse.Namespace) -> int:
    signed = (Path(arguments.bundle) / names.SIGNATURE).is_file()
    made = upgrade(arguments.bundle, arguments.out, force=arguments.force)
    say(f"{made.path}: has a graph for the native kernels, version {made.manifest.native}")
    if signed:
        say(f"note: its signature was that of {arguments.bundle}: sign it again with  pastkey sign {made.path}")
    return 0


upgrade_command = Command(_add_arguments, _run)
