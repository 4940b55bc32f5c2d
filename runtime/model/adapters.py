"""The LoRA adapters of a loaded model: they are loaded and unloaded while it runs."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from pastkey.errors import InputError
from pastkey.values import shown

from ..engine.decoder_graph import DecoderGraph
from ..engine.engine import Engine
from ..engine.lora import read_adapter
from ..settings import PlacementOptions, require_valid
from .parts import ModelParts


class Adapters:
    """The adapters of one model, by name, in `parts.adapters`.

    The first one opens the adapter graph, a second session over the bundle's weights. It closes after the last one.
    """

    def __init__(self, parts: ModelParts, placement: PlacementOptions) -> None:
        """`placement`: where the model runs."""
        self._parts, self._placement = parts, placement
        self._graph: DecoderGraph | None = None
        self._lock = threading.Lock()

    def load(self, name: str, folder: Path) -> None:
        """See `LanguageModel.load_adapter`."""
        require_valid({"adapter": name})
        bundle = self._parts.bundle
        with self._lock:
            self._parts.require_open()
            if name in self._parts.adapters:
                raise InputError(f"an adapter {shown(name)} is loaded already: unload it first, or take another name")
            if bundle.adapter_graph is None:
                raise InputError(
                    f"{bundle.path} has no graph that takes adapters: export it again with  pastkey export SOURCE "
                    "--out BUNDLE --adapters"
                )
            graph = self._graph or Engine(bundle, graph="adapters", **self._placement).graph
            adapter = read_adapter(folder, graph.onnx, bundle.path)
            engine = Engine.over(graph.adapted(adapter))
            self._graph = graph
            self._parts.adapters[name] = dataclasses.replace(self._parts, engine=engine)

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
