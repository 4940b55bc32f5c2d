"""The table of transformers' causal language models: exports a small random model of each type, and notes the result.

    python -m tools.families                   # adds the types that the table lacks
    python -m tools.families bert gemma3n_text # these, again
    python -m tools.families --docs            # writes them into docs/export.md

Each type has a separate process with a time limit, and one line of JSON in tests/export/families.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .commands import put

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "export" / "families.jsonl"
DOCS = ROOT / "docs" / "export.md"
VERIFIED, REFUSED, NO_DECODER, FAILED = "verified", "refused", "no decoder", "failed"
_CALL = "model(ids)"
_LIMIT_S = 900  # of one type


def rows() -> dict[str, dict[str, Any]]:
    """Returns the table's rows, by type. Of several lines of one type, the last counts."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.is_file() else []
    return {row["type"]: row for row in map(json.loads, lines)}


def types() -> dict[str, str]:
    """Returns the class of each type that transformers knows as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table() -> list[dict[str, Any]]:
    """Returns a row for each type, in order. A type of the tests that was not run again is theirs."""
    from tests.export.families import FAMILIES
    from tests.export.families import REFUSED as OF_TESTS

    known, found = rows(), []
    for kind, name in sorted(types().items()):
        row = {"type": kind, "class": name, "result": "", "detail": ""} | known.get(kind, {})
        if kind in FAMILIES and not row["result"]:
            row |= {"result": VERIFIED, "detail": "by the tests"}
        if kind in OF_TESTS and not row["result"]:
            row |= {"result": REFUSED, "detail": OF_TESTS[kind][1]}
        found.append(row)
    return found


# --- the page -----------------------------------------------------------------------------------------------------
def section() -> str:
    """Returns the families of docs/export.md."""
    found = table()
    by = {result: [row for row in found if row["result"] == result] for result in (VERIFIED, REFUSED, NO_DECODER)}
    version = max(row["transformers"] for row in found if "transformers" in row)
    of_text = [row["type"] for row in by[VERIFIED] if "text alone" in row["detail"]]
    graphs: dict[str, list[list[str]]] = {}
    for row in by[VERIFIED]:
        graph, *measured = row["detail"].split("; ")
        graphs.setdefault(graph, []).append([row["type"], *measured])
    lines = []
    for graph, found_rows in sorted(graphs.items()):
        worst = max(float(one[1]) if one[1:] else 1e-5 for one in found_rows)
        lines.append(f"| {graph} | {worst:.0e} | {', '.join(one[0] for one in found_rows)} |")
    tested = "\n".join(lines)
    return f"""\
transformers {version} has {len(found)} types of causal language models (`model_type` in config.json). For each one,
`python -m tools.families` exports a small random model in float32, and compares it with transformers' own uncached run:
prefill, decode, chunks, a batch and a greedy text. It runs no published weights. Encoders such as BERT are decoders if
`config.json` has `is_decoder`.

**Verified: {len(by[VERIFIED])}**, each in the graph that the export chose. The figure is the largest difference, as a
share of the largest logit; the limit is 1e-05. Those `by the tests`, and some others, are cases of `make matrix`:

| graph | difference | types |
|---|---|---|
{tested}

With their text only, without images and sounds: {_wrapped(of_text)}

**Not supported: {len(by[REFUSED])}.**

{_by_cause(by[REFUSED])}

**No decoder: {len(by[NO_DECODER])}.**

{_by_cause(by[NO_DECODER])}
"""


def _wrapped(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 120, break_on_hyphens=False, break_long_words=False)


def _by_cause(found: Iterable[dict[str, Any]]) -> str:
    """Returns a table with a row for each cause."""
    causes: dict[str, list[str]] = {}
    for row in found:
        causes.setdefault(_cause(row), []).append(row["type"])
    return "\n".join(["| types | cause |", "|---|---|", *(f"| {', '.join(n)} | {why} |" for why, n in causes.items())])


def _cause(row: dict[str, Any]) -> str:
    """Returns the cause without the names and lines that belong to one type only."""
    told = re.sub(r"some layers of \S+ \(\w+(?:: ([^)]*))?\)", r"some layers (\1)", row["detail"]).replace(" ()", "")
    told = re.sub(r"\w+\.py:\d+(-\d+)? ?", "its code ", told).replace(row["class"], "it").replace("|", "\\|")
    told = re.sub(r"^it cannot be given a cache(, for \d+ reasons)?: +", "", " ".join(told.split()))
    return told.replace("its code : ", "its code: ").split(": export a decoder")[0].split("; forward must")[0]


# --- one type -----------------------------------------------------------------------------------------------------
def judge(kind: str) -> tuple[str, str]:
    """Returns a type's result and its cause, or how it was verified."""
    from pastkey.errors import PastkeyError
    from pastkey.export.source.pretrained import check_config
    from tests.export.families import NO_DECODERS, build, configured

    if kind in NO_DECODERS:
        return NO_DECODER, NO_DECODERS[kind]
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        known = transformers.AutoConfig.for_model(kind)
        if known.is_encoder_decoder:
            return NO_DECODER, "the decoder of an encoder-decoder"
        text = known.get_text_config()
        if text is not known and rows().get(text.model_type, {}).get("result") == REFUSED:
            return REFUSED, f"as its text part, {text.model_type}"
        config = configured(kind)
        config.save_pretrained(folder)
        try:
            check_config(Path(folder), kind, trust_remote_code=False)
            result, detail = _exported(build(kind), Path(folder) / "bundle")
            return result, detail if text is known else f"{detail}; of text alone, as {text.model_type}"
        except PastkeyError as error:
            return REFUSED, str(error)
        except ImportError as error:  # of transformers, about a package that a part for images needs
            return REFUSED, str(error).strip().split(". ")[0]


def _exported(model: Any, out: Path, call: str | None = None) -> tuple[str, str]:
    from pastkey.errors import InputError
    from pastkey.export import export
    from tests.export.families import CONTEXT, greedy

    try:
        manifest = export(model, out, "fp32", context_length=CONTEXT, call=call).manifest
    except InputError as error:
        if call is None and f"--call '{_CALL}'" in str(error):  # its own positions do not begin at 0
            return _exported(model, out, _CALL)
        raise
    checks = manifest.parity["fp32"]["checks"].values()
    worst = max(check["value"] for check in checks if check["measure"] == "max_relative_difference")
    return VERIFIED, f"{manifest.graph}; {worst:.1e}; {len({*greedy(model)})} tokens"


def _child(kind: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    try:
        sender.send(judge(kind))
    except BaseException as error:
        sender.send((FAILED, f"{type(error).__name__}: {error}"[:500] + traceback.format_exc()[-700:]))


def run(kind: str) -> tuple[str, str]:
    """Judges a type in a separate process."""
    context = multiprocessing.get_context("fork")  # the imports are made once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(_LIMIT_S):
            return receiver.recv()  # type: ignore[no-any-return]
        return FAILED, f"took more than {_LIMIT_S} s"
    except EOFError:
        return FAILED, "its process died"
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    if asked.docs:
        DOCS.write_text(put(DOCS, "families", section()), encoding="utf-8")
        return 0
    import torch
    import transformers

    from pastkey.export import pipeline  # noqa: F401  # imported once, before the forks

    torch.set_num_threads(1)
    known, classes = rows(), types()
    for kind in asked.types or [kind for kind in classes if kind not in known]:
        began = time.monotonic()
        result, detail = run(kind)
        row = {"type": kind, "class": classes[kind], "result": result, "detail": detail}
        row["transformers"] = transformers.__version__
        with TABLE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - began:.0f} s", kind, result, detail, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
