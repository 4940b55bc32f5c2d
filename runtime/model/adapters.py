"""The LoRA adapters of a loaded model: they are loaded and unloaded while it runs."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

from pastkey.contract import names
from pastkey.errors import InputError
from pastkey.files.folder import read_json
from pastkey.values import as_path, shown

from ..engine.decoder_graph import DecoderGraph
from ..engine.engine import Engine
from ..options import PlacementOptions, require_valid
from ..text.chat_template import special_tokens
from .parts import ModelParts


class Adapters:
    """The adapters of one model, by name, in `parts.adapters`.

    The first one opens the adapter graph, a second session over the bundle's weights. It closes after the last one.
    """

    def __init__(self, parts: ModelParts, placement: PlacementOptions, folders: Mapping[str, str | Path]) -> None:
        """`placement`: where the model runs. `folders`: those to load at first, by name."""
        self._parts, self._placement = parts, placement
        self._graph: DecoderGraph | None = None
        self._lock = threading.Lock()
        self.load_all(folders)

    def __repr__(self) -> str:
        return f"<Adapters {', '.join(map(shown, self._parts.adapters)) or 'none'}>"

    def load_all(self, folders: Mapping[str, str | Path]) -> None:
        """See `LanguageModel.load_adapter`."""
        for name, folder in folders.items():
            self._load(name, as_path(folder, "folder", "the path of a folder that peft saved"))

    def _load(self, name: str, folder: Path) -> None:
        from ..engine.lora import read_adapter  # imported here: a model without adapters does not need it

        require_valid({"adapter": name})
        bundle = self._parts.bundle
        with self._lock:
            self._parts.require_open()
            if name in self._parts.adapters:
                raise InputError(f"an adapter {shown(name)} is loaded already: unload it first, or choose another name")
            if bundle.adapter_graph is None:
                raise InputError(
                    f"{bundle.path} has no graph for adapters: export it again with  pastkey export SOURCE "
                    "--out BUNDLE --adapters"
                )
            graph = self._graph or Engine(bundle, graph="adapters", **self._placement).graph
            adapter = read_adapter(folder, graph.onnx, bundle.path)
            adapted = copy.copy(graph)  # the same session, whose caches are of this adapter only
            adapted.onnx, adapted.adapter = graph.onnx.with_constants(adapter.inputs), adapter
            self._graph = graph
            self._parts.adapters[name] = dataclasses.replace(
                self._parts, engine=Engine.over(adapted), adapter_ends=self._ends(folder)
            )

    def _ends(self, folder: Path) -> tuple[int, ...]:
        """The EOS token of the tokenizer next to an adapter: of a base model that it taught to answer, a new one."""
        file, codec = folder / names.TOKENIZER_CONFIG, self._parts.tokenizer
        if codec is None or not file.is_file():
            return ()
        token = special_tokens(read_json(file)).get("eos_token")
        ends = codec.vocabulary().get(token or "")
        return () if ends is None else (ends,)

    def unload(self, name: str) -> None:
        """See `LanguageModel.unload_adapter`."""
        with self._lock:
            graph = self._parts.adapted(name).engine.graph
            del self._parts.adapters[name]
            graph.unloaded = True
            if not self._parts.adapters:
                self._graph = None
        self._parts.scheduler.exclusively(lambda: self._parts.scheduler.store.clear(graph))

    def folders(self) -> dict[str, Path]:
        """Name -> the folder that it was read from."""
        graphs = {name: parts.engine.graph for name, parts in self._parts.adapters.items()}
        return {name: graph.adapter.folder for name, graph in graphs.items() if graph.adapter is not None}

    def close(self) -> None:
        """Lets go of all adapters, and of the graph."""
        with self._lock:
            self._parts.adapters.clear()
            self._graph = None


class AdapterCalls:
    """The calls of a model that load and unload adapters."""

    adapters: Adapters

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a LoRA adapter, which calls then name: `generate(prompt, adapter=name)`. Others may run meanwhile.

        The first adapter opens a further graph over the bundle's weights: docs/train.md has its memory.

        Args:
            name: The name for it. Requests of one name are decoded in one batch.
            folder: A folder that peft saved: adapter_config.json and adapter_model.safetensors.

        Raises:
            InputError: The name is in use; the bundle was exported without `--adapters`; the adapter is of another
                model or does more than LoRA on projections; or the model is closed.
            MissingFileError: There is no such folder, or a file is missing.
            IntegrityError: A file is damaged.
        """
        self.adapters.load_all({name: folder})

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter. Running requests and sessions keep it to their end.

        Raises InputError if there is none of this name.
        """
        self.adapters.unload(name)
