"""What calibration does to int8, measured on a text: KL divergence from float32 and top-1 agreement, with and without.

    python -m benchmarks.calibration BUNDLE --text FILE [--windows 4] [--length 256]

BUNDLE is a float32 bundle with a tokenizer. The windows follow one another from the middle of the text on.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export.measure.metrics import kl_divergence, top1_agreement
from pastkey.export.quantize.calibrate import calibration
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS
from pastkey.runtime.text.codec import TextCodec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        # A copy: graphs that are tried stand beside the weights meanwhile.
        bundle = open_bundle(shutil.copytree(arguments.bundle, Path(temporary) / "bundle"))
        if bundle.manifest.precision != "fp32" or bundle.tokenizer is None:
            raise InputError(f"{arguments.bundle} is no float32 bundle with a tokenizer")
        ids = TextCodec.from_file(bundle.tokenizer).encode(arguments.text.read_text(encoding="utf-8"))
        middle, length = len(ids) // 2, arguments.length
        windows = [ids[start : start + length] for start in range(middle, middle + arguments.windows * length, length)]
        text = calibration.calibration_text(bundle, None, PRECISIONS["int8"].calibration_windows)
        calibrated = calibration.calibrated(bundle, text.calibration_set)
        folder, plain = bundle.all_logits_graph.parent, ir.load(bundle.all_logits_graph)
        expected = [logits(plain, folder, window) for window in windows]
        for name, model in (("plain", plain), ("calibrated", calibrated)):
            quantize(model)
            found = [logits(model, folder, window) for window in windows]
            pairs = list(zip(expected, found, strict=True))
            divergence = np.mean([kl_divergence(a, b) for a, b in pairs])
            agreement = np.mean([top1_agreement(a, b) for a, b in pairs])
            print(f"{name:<11} KL divergence {divergence:.2g} nats, top-1 agreement {agreement:.1%}")


def logits(model: ir.Model, folder: Path, ids: list[int]) -> np.ndarray:
    """(T, V), of every position."""
    with probing(model, folder, [names.LOGITS]) as probe:
        return probe(np.array(ids))[names.LOGITS]


if __name__ == "__main__":
    main()
