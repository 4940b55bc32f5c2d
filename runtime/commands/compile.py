"""`pastkey compile`: a static bundle whose graphs an execution provider has compiled already.

Compiling for an NPU is most of a load. onnxruntime writes its result, a context binary, next to a graph of one
EPContext node, which loads instead of the original graph.
https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from pastkey.command import Command, add_placement, say
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, Compiled, open_bundle, read_bundle
from pastkey.contract.provider_options import in_manifest, not_kept
from pastkey.errors import InputError, ProviderError, first_line
from pastkey.files.durable import whole_folder, write_json
from pastkey.files.folder import file_records, parse_records

from .flags import BUNDLE


def compile_bundle(
    path: str | Path,
    out: str | Path,
    provider: str | None = None,
    provider_options: Mapping[str, str] | None = None,
    session_options: Mapping[str, str] | None = None,
    *,
    threads: int = 0,
    allow_fallback: bool = False,
    force: bool = False,
) -> Bundle:
    """Writes a bundle whose static graphs are compiled for one device, and proves it there.

    Nothing is left behind on failure.

    Args:
        path: A bundle of static graphs.
        out: The folder to write.
        provider: A short name; None for the provider that the bundle was made for.
        provider_options: Of the provider: the chip, say.
        session_options: Further options of onnxruntime's session, as {"ep.share_ep_contexts": "1"}.
        threads: Threads within an operator; 0 leaves their number to onnxruntime.
        allow_fallback: Whether the CPU may run operators that the provider does not support.
        force: Replaces an existing bundle.

    Returns:
        The new bundle.

    Raises:
        MissingFileError, ExistingFolderError, IntegrityError: A folder that is not as it should be.
        InputError: The bundle has no static graphs, or was compiled already.
        ProviderError: The provider is not here, does not run all of a graph, writes no context binary, or computes
            something else by it.
    """
    from ..engine.engine import Engine
    from ..engine.golden import require_golden
    from ..providers import placement as ep
    from ..providers.open import open_session
    from ..providers.ort import onnxruntime

    bundle, out = open_bundle(path), Path(out)
    provider = provider or ep.provider_of(bundle.manifest.target)
    _require_static(bundle, provider)
    if "ep.context_embed_mode" in (session_options or {}):
        raise InputError("a bundle keeps its context binaries next to the graphs: leave out ep.context_embed_mode")
    if out.resolve() == bundle.path.resolve():
        raise InputError(f"{out} is the bundle to compile, and would be replaced: choose another --out")
    placement = ep.for_bundle(bundle.manifest, (provider, dict(provider_options or {})))
    name, given = placement.providers[0]
    provider = ep.short_name(name)
    options = {key: str(value) for key, value in given.items()}
    if sentence := not_kept(provider, options):
        say(sentence)
    with whole_folder(out, force=force) as folder:
        _copy(bundle, folder)
        for graph in bundle.static_graphs:
            target = folder / graph.relative_to(bundle.path)
            entries = {
                "ep.context_enable": "1",
                "ep.context_file_path": str(target.absolute()),
                "ep.context_embed_mode": "0",
                **(session_options or {}),
            }
            open_session(
                graph,
                bundle.manifest,
                providers=(name, options),
                threads=threads,
                allow_fallback=allow_fallback,
                session_options=entries,
            )
            if not target.is_file():
                raise ProviderError(
                    f"the execution provider {provider!r} writes no context binary: use the bundle as it is"
                )
        compiled = Compiled(provider, in_manifest(provider, options), onnxruntime.__version__)
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        records = parse_records(folder, file_records(folder, files))
        manifest = dataclasses.replace(bundle.manifest, compiled=compiled, files=records)
        write_json(folder / names.MANIFEST, manifest.to_json())
        made = open_bundle(folder, verify=False)
        # The proof runs with the options that the manifest may not set as well.
        proved = dataclasses.replace(manifest, compiled=dataclasses.replace(compiled, options=options))
        loaded = dataclasses.replace(made, manifest=proved)
        try:
            engine = Engine(loaded, allow_fallback=allow_fallback, session_options=session_options)
        except ProviderError as error:  # onnxruntime-openvino on a CPU
            raise ProviderError(
                f"the execution provider {provider!r} cannot load its compiled graph "
                f"({first_line(error.__cause__ or error)}): use the bundle as it is"
            ) from None
        require_golden(engine, made)
        del engine
    return read_bundle(out)


def _require_static(bundle: Bundle, provider: str) -> None:
    from ..providers.placement import row_of

    manifest = bundle.manifest
    if manifest.compiled is not None:
        raise InputError(
            f"{bundle.path} is compiled already, for {manifest.compiled}: compile the bundle that it was made from"
        )
    if manifest.static is None:
        target = provider if row_of(provider).npu else "qnn"
        raise InputError(
            f"{bundle.path} has a {manifest.graph} graph, whose sizes change: export the model with --target {target}, "
            "and compile that"
        )
    if provider == "cpu":
        raise InputError("the CPU compiles nothing: name an execution provider with --provider, such as qnn")


def _copy(bundle: Bundle, folder: Path) -> None:
    """All files but the manifest and the graphs that are compiled."""
    compiled = {graph.relative_to(bundle.path).as_posix() for graph in bundle.static_graphs}
    for name in bundle.manifest.files:
        if name not in compiled:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)


# --- the command --------------------------------------------------------------------------------------------------
def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    parser.add_argument("--out", required=True, metavar="BUNDLE2", help="the folder to write")
    add_placement(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")


def _run(arguments: argparse.Namespace) -> int:
    made = compile_bundle(
        arguments.bundle,
        arguments.out,
        arguments.provider,
        dict(arguments.provider_options or ()),
        dict(arguments.session_options or ()),
        threads=arguments.threads or 0,
        allow_fallback=arguments.allow_fallback,
        force=arguments.force,
    )
    say(f"{made.path}: compiled for {made.manifest.compiled}")
    return 0


compile_command = Command(_add_arguments, _run)
