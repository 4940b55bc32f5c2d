"""Runs graphs of one node each on one execution provider only.

python single_nodes.py PROVIDER FOLDER: of each NAME.onnx with its inputs NAME.in.npz in the folder, writes NAME.out.npz
with the outputs in their order, or nothing where the provider does not support the node.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

from pastkey.providers import PROVIDERS
from pastkey.runtime.providers import placement as ep


def main(provider: str, folder: Path) -> None:
    full = PROVIDERS[provider].name
    for path in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with np.load(path.with_suffix(".in.npz")) as inputs:
            feeds = dict(inputs)
        try:
            if ep.is_plugin(full):
                options.add_provider_for_devices(ep.plugin_devices(full), dict(PROVIDERS[provider].options))
                session = onnxruntime.InferenceSession(path, options, enable_fallback=0)
            else:
                session = onnxruntime.InferenceSession(path, options, providers=[full], enable_fallback=0)
            np.savez(path.with_suffix(".out.npz"), *session.run(None, feeds))
        except Exception as error:  # each release raises others
            print(f"{path.stem}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
