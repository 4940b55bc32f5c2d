"""What pyproject.toml allows is what is run: tests/constraints-oldest.txt names its lower bounds, and no other."""

from __future__ import annotations

import re
import tomllib

from .shared import ROOT

# Wheels for hardware that CI has not got; each installs the module that `cpu` installs.
OTHER_WHEELS = {"gpu", "openvino", "webgpu", "qnn"}


def floors() -> set[str]:
    """ "numpy==1.26" for each package that pyproject.toml declares with `>=`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        declared += requirements if extra not in OTHER_WHEELS else []
    others = [requirement for requirement in declared if not requirement.startswith("pastkey[")]
    found = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in others]
    assert all(found), f"without a lower bound: {declared}"
    return {f"{match[1]}=={match[2]}" for match in found if match}


def test_the_oldest_environment_has_every_lower_bound_that_is_declared():
    lines = (ROOT / "tests" / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == floors()
    assert len({floor.partition("==")[0] for floor in floors()}) == len(floors()), "two floors of one package"
