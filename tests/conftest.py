"""Shared by tests of several stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pastkey.__main__ import main

# Kernels that happen to be installed change no test: those of the kernels ask for them.
os.environ.setdefault("PASTKEY_NATIVE", "0")
# Some tests import onnxruntime by itself, before pastkey can turn its telemetry off.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def processors() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def pytest_configure(config: pytest.Config) -> None:
    """Gives each of the side-by-side processes that run the tests separate processors.

    Threads that wait for one another are slow where another process uses their core. torch and onnxruntime start as
    many as there are processors for them, and so do the commands that tests run.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    if own := processors()[number::workers]:
        os.sched_setaffinity(0, own)


# Folders, and files, whose tests neither train nor export nor run many sessions: `make quick`.
QUICK = (
    "pastkey", "export/generation/test_nodes.py", "export/graft/time_axis/operators", "export/graph/test_edit.py",
    "runtime/decoding/batching/test_scheduler.py", "runtime/engine/caches", "runtime/providers", "runtime/sampling",
    "runtime/text", "test_architecture.py", "test_floors.py", "test_layout.py", "test_troubleshooting.py",
    "train/test_settings.py", "web/test_site.py",
)  # fmt: skip
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by their place, and those of only `make matrix` as slow."""
    for item in items:
        if item.get_closest_marker("matrix"):
            item.add_marker("slow")
        place = item.path.relative_to(TESTS)
        parents = {parent.as_posix() for parent in (place, *place.parents)}
        if parents & {*QUICK} and not item.get_closest_marker("slow"):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Keeps what a load remembers out of the home folder. Exports keep nothing: a test must not depend on another."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "pastkey").mkdir()
    (cache / "pastkey" / "exports").touch()  # a file instead of their folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def pastkey_command():
    """Runs the `pastkey` command in a separate process, as a user would."""

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pastkey", *map(str, arguments)]
        threads = os.environ | {"OMP_NUM_THREADS": str(min(2, len(processors())))}
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=threads)

    return run


@pytest.fixture
def command(capsys):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends this way
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def base_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes that run the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(NAME, make): the folder NAME as make(FOLDER) filled it, once for all processes that run the tests."""
    from filelock import FileLock  # the runtime's tests run where it is not installed, and need nothing of this

    base = base_of_all(tmp_path_factory)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = base / f"once-{name}", base / f"once-{name}.whole"
        with FileLock(f"{folder}.lock"):
            if not whole.is_file():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed in the middle
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def classic(pastkey_command, made_once):
    """A folder with the classic lesson as checkpoint/ and as an int8 bundle/, made by the commands."""

    def make(folder: Path) -> None:
        for arguments in (
            ("train", "--preset", "classic", "--out", folder / "checkpoint"),
            ("export", folder / "checkpoint", "--out", folder / "bundle"),
        ):
            done = pastkey_command(*arguments)
            assert done.returncode == 0, done.stderr

    return made_once("classic", make)


# A skip whose reason begins so lacks the thing that it names. PASTKEY_REQUIRE=kernels,node makes it a failure.
WANTING = {
    "kernels": ("the native kernels", "no C++ compiler"),
    "node": ("node", "npm"),
    "chromium": ("chromium", "playwright"),
}


def pytest_sessionfinish(session):
    """Fails a run that skipped a test because a thing that PASTKEY_REQUIRE names is missing."""
    if (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is None:
        return  # one of the processes whose reports come together elsewhere
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    for name in filter(None, os.environ.get("PASTKEY_REQUIRE", "").split(",")):
        for reason in sorted(reason for reason in reasons if reason.startswith(WANTING[name])):
            reporter.write_line(f"\nPASTKEY_REQUIRE names {name}, and tests were skipped: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def short_exports(tmp_path_factory):
    """Exports in this process are short. Folders whose tests export use it in each test."""
    from . import short_exports as module  # which imports torch

    folder = base_of_all(tmp_path_factory) / "traced"
    folder.mkdir(exist_ok=True)
    with module.short_exports(folder):
        yield


@pytest.fixture
def record_family(record_property):
    """record_family(FAMILY, its worst figure), which the JUnit file of the run has."""
    return lambda family, figure: record_property("family", (family, figure))
