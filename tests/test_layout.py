"""A module's tests stand in the file of its name: export/graph/fuse.py in tests/export/graph/test_fuse.py."""

from __future__ import annotations

from pathlib import Path

from .shared import divided

ROOT = Path(__file__).parent.parent
FOLDERS = ("pastkey", "train", "export", "runtime", "serve", "web", "see")

# module -> the file that tests it, and why that is another one.
ELSEWHERE = {
    "export/compat/bundle_view.py": ("export/compat/test_check.py", "is what the rules read"),
    "export/compat/hub_rules.py": ("export/compat/test_check.py", "each rule is one case of the table there"),
    "export/compat/rules.py": ("export/compat/test_check.py", "each rule is one case of the table there"),
    "export/graft/time_axis/operators/alone.py": ("export/graft/probe/test_causes.py", "is told by the causes there"),
    "export/graft/time_axis/program/python_branches.py": (
        "export/graft/probe/test_causes.py",
        "is told by the causes there",
    ),
    "export/graft/time_axis/program/dependence.py": (
        "export/graft/probe/test_causes.py",
        "is told by the causes there",
    ),
    "export/graft/time_axis/step/row.py": (
        "export/graft/time_axis/step/test_latent.py",
        "attends over the rows that are found there",
    ),
    "export/graft/time_axis/program/nodes.py": (
        "export/graft/time_axis/program/test_program.py",
        "is what a program is made of",
    ),
    "export/graft/time_axis/program/traced.py": ("export/graft/probe/test_causes.py", "is told by the causes there"),
    "export/graft/probe/hints.py": ("export/graft/probe/test_proof.py", "is what is compared there"),
    "export/graft/probe/logits.py": ("export/graft/probe/test_call.py", "is what the calls there return"),
    "export/graft/probe/watched.py": ("export/graft/probe/test_causes.py", "is told by the causes there"),
    "export/grafting.py": ("export/test_pipeline.py", "is the first half of the pipeline"),
    "export/graft/huggingface.py": ("export/graft/test_families.py", "is told by what the families compute"),
    "export/source/gguf_tensors.py": ("export/source/test_gguf.py", "is how the weights there are read"),
    "export/source/open.py": ("export/source/test_source.py", "is the dispatch to the sources there"),
    "export/source/stored_weights.py": ("export/source/test_pretrained_refused.py", "is what is refused there"),
    "export/quantize/changes.py": ("export/quantize/test_adapters.py", "is what adapters follow there"),
    "export/upgrade.py": ("kernels/test_bundle.py", "needs the native kernels there"),
    "runtime/providers/cache_form.py": ("kernels/test_bundle.py", "is the form of the caches there"),
    "runtime/sampling/native.py": ("kernels/test_draw.py", "calls the kernel library there"),
    "pastkey/version.py": ("runtime/test_init.py", "one constant"),
    "runtime/commands/sign.py": ("runtime/model/test_signature.py", "is two flags of what is tested there"),
    "runtime/commands/rerun.py": ("runtime/sandbox/test_rerun.py", "needs the hostile bundles there"),
    "runtime/commands/untrusted_rows.py": ("runtime/sandbox/test_batch.py", "needs the bundles there"),
    "runtime/text/chat_format.py": ("runtime/model/chat/test_chat.py", "is what a conversation asks of its model"),
    "runtime/model/chat/answer_stream.py": ("runtime/model/chat/test_chat.py", "is what Chat.stream returns"),
    "runtime/model/chat/chat_model.py": ("runtime/model/chat/test_chat.py", "is what a conversation asks of its model"),
    "runtime/model/unpack.py": ("runtime/test_loading.py", "is how load takes zip files and resources"),
    "runtime/model/parts.py": ("runtime/model/test_language_model.py", "is what a model is made of"),
    "runtime/model/chat/calls.py": ("runtime/model/chat/test_prompt.py", "is the methods of what is tested there"),
    "runtime/model/chat/chat_stream.py": ("runtime/model/chat/test_prompt.py", "is what stream_chat returns"),
    "train/data/token_files.py": ("train/data/test_tokenizing.py", "is what is written there"),
    "serve/app.py": ("serve/routes/test_status.py", "is the table of the routes there"),
    "serve/errors.py": ("serve/routes/test_chat.py", "is what is refused there"),
    "serve/events.py": ("serve/test_service.py", "is how streams are sent there"),
    "serve/metrics.py": ("serve/routes/test_status.py", "is the page there"),
    "serve/api/replies.py": ("serve/routes/test_chat.py", "is the shape of the replies there"),
    "serve/settings.py": ("serve/test_command.py", "is what the flags make"),
    "serve/table.py": ("serve/test_description.py", "is a row of what is described there"),
    "train/loss.py": ("train/test_loop.py", "is what its steps lower"),
    "train/hardware/launch.py": ("train/hardware/test_ranks.py", "starts the processes there"),
    "runtime/decoding/request.py": ("runtime/decoding/test_generation.py", "is what a Generation takes"),
    "runtime/decoding/completion.py": ("runtime/model/test_language_model.py", "is what generate returns"),
}


def modules() -> list[str]:
    found = [file.relative_to(ROOT).as_posix() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(found) > 70
    return sorted(name for name in found if not name.endswith("__init__.py"))


def own_test(module: str) -> Path:
    return ROOT / "tests" / Path(module).with_name(f"test_{Path(module).name}")


def test_every_module_has_a_test_file_of_its_name_or_a_reason():
    missing = {module for module in modules() if not own_test(module).is_file()}
    assert missing - ELSEWHERE.keys() == set(), "without a test file, and without a reason in ELSEWHERE"
    assert ELSEWHERE.keys() - missing == set(), "have a test file of their own, or are gone"


def test_what_is_tested_elsewhere_is_tested_there():
    for module, (file, reason) in ELSEWHERE.items():
        assert (ROOT / "tests" / file).is_file(), f"{module}: no tests/{file} ({reason})"


def test_the_rooms_of_the_tests_are_those_of_the_package():
    rooms = {init.parent.relative_to(ROOT) for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")}
    tested = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    assert tested - rooms <= {Path(), Path("programs"), Path("fuzz"), Path("kernels")}, (
        "a folder of tests without a room"
    )
    assert rooms <= tested


def test_what_only_make_matrix_runs_is_slow_too(request):
    """Whichever tests were chosen: `make test` would run one that is not, and so fail here."""
    items = request.session.items
    assert all(item.get_closest_marker("slow") for item in items if item.get_closest_marker("matrix"))
    chosen = divided("abc", quick="a", ci="b")
    assert [[mark.name for mark in case.marks] for case in chosen] == [[], ["slow"], ["matrix"]]
