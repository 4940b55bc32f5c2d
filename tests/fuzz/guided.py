"""Coverage-guided inputs by atheris, for the readers in Python. `pip install atheris` brings it, where pip has it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_INSTRUMENTED = ["pastkey"]


def run_guided(names: Sequence[str], minutes: float) -> int:
    """Each target in a process of its own, since atheris ends it. Returns 1 where one had a finding."""
    from .targets import TARGETS

    own = [name for name in names if not TARGETS[name].native]
    failed = False
    for name in own:
        with tempfile.TemporaryDirectory(prefix="pastkey-corpus-") as corpus:
            (Path(corpus) / "valid").write_bytes(TARGETS[name].valid())
            for file in (ROOT / "tests" / "fuzz" / "regressions" / name).glob("*"):
                (Path(corpus) / file.name).write_bytes(file.read_bytes())
            seconds = max(1, int(60 * minutes / len(own)))
            command = [sys.executable, "-m", "tests.fuzz.guided", name, corpus, f"-max_total_time={seconds}"]
            place = ROOT / "build" / "fuzz"
            place.mkdir(parents=True, exist_ok=True)
            command += ["-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={place}/{name}-"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            told = [line for line in done.stderr.splitlines() if line.startswith(("Done", "SUMMARY", "Finding"))]
            print(f"{name}: {'; '.join(told) or done.stderr[-500:]}", flush=True)
            if done.returncode:
                print(done.stdout[-3000:], flush=True)
                failed = True
    return int(failed)


def main() -> None:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from .check import outcome
        from .targets import TARGETS

    target = TARGETS[sys.argv[1]]
    target.read(target.valid())  # everything is imported and written before

    def one_input(content: bytes) -> None:
        found = outcome(target, content)
        if found.kind == "traceback":
            print(found.told, flush=True)
            raise AssertionError("neither a value nor a sentence")

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
