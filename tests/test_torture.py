"""Whatever is ended in the middle leaves the old or the new, whole, at its name: by kills, and by disks that fail.

PASTKEY_KILLS=1000 runs the long form: so many kills, and every call that changes the disk.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tools.torture.__main__ import ERRORS, Fault, Nursery, Outcome, build_faults
from tools.torture.scenes import SCENES, Scene

from .shared import divided

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forks")]

KILLS = int(os.environ.get("PASTKEY_KILLS", "0"))  # 0: the short form
SEED = int(os.environ.get("PASTKEY_SEED", "1"))
IMPORTS = ("pastkey.runtime.commands.batch", "pastkey.runtime.model.session_file", "tools.torture.__main__")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tmp_path_factory.mktemp("given")


@pytest.fixture(scope="module")
def library(given):
    return build_faults(given)


@pytest.fixture(scope="module")
def nursery(given, library):
    with Nursery(given, IMPORTS, library=library) as found:
        yield found


def whole(scene: Scene, nursery: Nursery, library: Path | None) -> Outcome:
    """How it goes when nothing happens: its seconds, and its calls."""
    scene.prepare(nursery)
    scene.reset()
    outcome = scene.run(nursery, fault=Fault(str(scene.below), 0) if library else None)
    assert outcome.status == 0, outcome.said
    scene.ended()
    return outcome


# CI has a file and a folder; `make matrix` also has a job.
NAMES = divided(SCENES, ci=("session", "bundle"))


@pytest.mark.parametrize("name", NAMES)
def test_a_kill_at_any_moment_loses_nothing(name, given, tmp_path, nursery, library):
    kind, share, few = SCENES[name]
    scene, rng = kind(given, tmp_path / "work"), random.Random(f"{SEED} {name}")
    usual = whole(scene, nursery, library)
    scene.reset()
    kills = 0
    while kills < (max(1, round(KILLS * share)) if KILLS else few):
        # Half of them at any time, half at a call that changes the disk: most of the time a command computes.
        if library and rng.random() < 0.5:
            how: dict[str, Any] = {"fault": Fault(str(scene.below), rng.randint(1, max(1, usual.calls)))}
        else:
            how = {"kill_after": rng.uniform(0, 1.02 * usual.seconds)}
        outcome = scene.run(nursery, **how)
        scene.check()
        if outcome.killed:
            kills += 1  # the next one runs over what it left
        else:
            assert_ended(scene, outcome)
            scene.reset()
    assert_ended(scene, scene.run(nursery))


def assert_ended(scene: Scene, outcome: Outcome) -> None:
    """That a command which nothing ended in the middle came to its end, and removed what others had left."""
    assert outcome.status == 0, outcome.said
    scene.ended()


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fails_at_any_call_loses_nothing(name, error, once, given, tmp_path, nursery, library):
    if library is None:
        pytest.skip("faults are injected by a library that gcc builds on Linux")
    kind, _, _ = SCENES[name]
    scene, rng = kind(given, tmp_path / "work"), random.Random(f"{SEED} {name} {error} {once}")
    usual = whole(scene, nursery, library)
    every = range(1, usual.calls + 1)
    for call in every if KILLS else sorted(rng.sample(every, min(3, len(every)))):
        scene.reset()
        fault = Fault(str(scene.below), call, ERRORS[error], once)
        outcome = scene.run(nursery, fault=fault)
        try:
            assert "Traceback" not in outcome.said
            assert outcome.status in (0, 2)
            scene.check()
            assert_ended(scene, scene.run(nursery))
        except BaseException as problem:
            problem.add_note(f"{fault}: {outcome}")
            raise
