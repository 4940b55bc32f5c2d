"""How a long export reports stages, progress and warnings, and which stages there are. `Progress` reports nothing."""

from __future__ import annotations

from collections.abc import Mapping

from pastkey.precisions import PRECISIONS

from .settings import ExportConfig

UNKNOWN = 10**8  # weights of a source that is not open yet


def planned(config: ExportConfig, weights: int) -> dict[str, float]:
    """Returns the phases of an export in their order: how a stage's name begins, and the phase's seconds.

    Measured on two cores of an EPYC with AVX512-VNNI, for a small model and for each further million of weights. On
    other machines their ratios differ little.
    """
    precision, millions = PRECISIONS[config.precision], weights / 1e6
    made = precision.name != "fp32"
    phases = (
        ("open", 0.3, 0.01, True),
        ("fetch the weights", 0.0, 0.2, True),
        ("observe", 0.5, 0.1, True),
        ("trace", 5.0, 0.1, True),
        ("write fp32", 0.3, 0.02, True),
        ("verify fp32", 1.0, 0.2, True),
        ("calibrate", 2.0, 0.3, precision.quantized and not config.quick),
        ("round", 1.0, 0.7, precision.name == "int4" or (config.quick and precision.quantized)),
        ("smooth", 0.5, 0.2, precision.name == "int8" and not config.quick),
        ("measure what", 2.0, 1.0, config.measures_each_matrix),
        (f"write {precision.name}", 0.3, 0.02, made),
        ("measure the error", 1.0, 0.3, precision.quantized),
        (f"verify {precision.name}", 1.0, 0.2, made),
        ("make the static", 2.0, 0.1, config.static),
        ("write the ORT", 1.0, 0.02, config.format == "ort"),
        ("write the whole", 5.0, 0.1, config.generate),
        ("prove", 0.2, 0.01, True),
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
