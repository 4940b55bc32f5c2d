"""The fifty slowest tests of the last run, and the sum of each folder: `make slowest`.

Reads the JUnit files that pytest wrote into .environments/times/, one for each environment. A test's time is that of
its fixtures and its call.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

TIMES = Path(__file__).parent.parent / ".environments" / "times"
MOST = 50


def folder(classname: str) -> str:
    """tests.export.graft.probe.test_call -> tests/export/graft."""
    parts = [part for part in classname.split(".")[:3] if not part.startswith(("test_", "Test"))]
    return "/".join(parts)


def report(path: Path) -> list[str]:
    """The lines for one environment."""
    cases = [*ElementTree.parse(path).iter("testcase")]
    seconds = {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}
    sums, counts = defaultdict[str, float](float), Counter[str]()
    for name, took in seconds.items():
        sums[folder(name.partition("::")[0])] += took
        counts[folder(name.partition("::")[0])] += 1
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:MOST]
    return [
        f"{path.stem}: the {len(slowest)} slowest of {len(seconds)} tests, seconds",
        *(f"{seconds[name]:8.2f}  {name}" for name in slowest),
        f"{path.stem}: seconds and tests of each folder",
        *(f"{took:8.1f} {counts[name]:6}  {name}" for name, took in sorted(sums.items(), key=lambda one: -one[1])),
        f"{sum(seconds.values()):8.1f} {len(seconds):6}  together",
    ]


def main() -> None:
    """Prints the report of each environment that has run."""
    for path in sorted(TIMES.glob("*.xml"), key=lambda path: path.stat().st_mtime):
        print("\n".join(report(path)))


if __name__ == "__main__":
    main()
