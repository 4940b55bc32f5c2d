"""How a long export reports stages, progress and warnings, and which stages there are. `Progress` reports nothing."""

from __future__ import annotations

from collections.abc import Mapping

from pastkey.contract.bundle import Bundle

from .settings import ExportConfig

UNKNOWN = 10**8  # weights of a source that is not open yet


def form_of(bundle: Bundle) -> str:
    """The precision that a stage works on: int8, or static int8."""
    static = "static " if bundle.manifest.static is not None else ""
    return f"{static}{bundle.manifest.precision}"


def planned(config: ExportConfig, weights: int, *, fetched: bool = False) -> dict[str, float]:
    """Returns the phases of an export in their order: how a stage's name begins, and the phase's seconds.

    Measured on two cores of an EPYC with AVX512-VNNI, for a small model and for each further million of weights. On
    other machines their ratios differ little. `fetched`: the weights come from the Hub now.
    """
    precision, millions = config.row, weights / 1e6
    made, quantized, static = precision.name != "fp32", precision.quantized, config.static
    calibrated = precision.calibrated and not config.quick
    first = precision.name == "int4" or config.sensitivity is not None  # otherwise only if the budget is missed
    phases = (
        ("open", 0.8, 0.02, True),
        ("fetch the weights", 0.0, 0.2, fetched),
        ("observe", 0.3, 0.2, True),
        ("trace", 6.0, 0.12, True),
        ("make the", 0.1, 0.0, True),  # of an ONNX graph, which is not traced
        ("write fp32", 0.05, 0.01, True),
        ("verify fp32", 0.2, 0.08, True),
        ("calibrate", 0.3, 0.09, calibrated),
        ("round", 0.5, 0.3, quantized and (not calibrated or precision.name == "int4")),
        ("smooth", 0.4, 0.12, calibrated and precision.name == "int8"),
        ("measure what", 2.0, 0.4, config.measures_each_matrix and first),
        (f"write {precision.name}", 0.05, 0.01, made),
        (f"measure the error of {precision.name}", 0.1, 0.04, quantized),
        ("measure what", 2.0, 0.4, config.measures_each_matrix and not first),
        (f"verify {precision.name}", 0.2, 0.06, made),
        ("write the static", 2.0, 0.04, static),
        ("verify static fp32", 0.2, 0.08, static),
        ("quantize the static", 0.5, 0.05, static and made),
        ("measure the error of static", 0.1, 0.04, static and made),
        ("verify static int8", 0.2, 0.06, static and made),
        ("write the ORT", 1.0, 0.01, config.format == "ort"),
        ("write the whole", 5.0, 0.05, config.generate),
        ("verify the whole", 5.0, 0.05, config.generate),
        ("prove", 0.1, 0.001, True),
    )
    return {begins: fixed + each * millions for begins, fixed, each, has in phases if has}


class Progress:
    """A listener. Override the methods to show something."""

    def plan(self, phases: Mapping[str, float]) -> None:
        """The phases to come, as `planned` returns them. A stage belongs to the one whose text its name begins with."""

    def stage(self, name: str) -> None:
        """The next stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` parts of the current stage are complete."""

    def say(self, sentence: str) -> None:
        """Tells the user."""

    def warn(self, sentence: str) -> None:
        """Warns the user. The export continues."""


SILENT = Progress()


class Recorder(Progress):
    """Forwards everything to another listener and records the warnings."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self.warnings: list[str] = []

    def plan(self, phases: Mapping[str, float]) -> None:
        self._listener.plan(phases)

    def stage(self, name: str) -> None:
        self._listener.stage(name)

    def advance(self, done: int, total: int) -> None:
        self._listener.advance(done, total)

    def say(self, sentence: str) -> None:
        self._listener.say(sentence)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        self._listener.warn(sentence)
