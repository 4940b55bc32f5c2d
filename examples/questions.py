"""A pool of threads over a file of questions: an application's own loop, with progress, and resume after Ctrl-C.

python examples/questions.py BUNDLE questions.jsonl answers.jsonl

A line of questions.jsonl is {"question": ...}, and a line of answers.jsonl has its number, from 0, and its answer, too.
`pastkey batch` does more (rows decoded together, an error per row); here each answer is a call, between which a program
may do what it likes.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pastkey

bundle, questions, answers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def answered() -> set[int]:
    """The numbers of the lines that are whole."""
    whole = answers.read_bytes().rpartition(b"\n")[0] if answers.exists() else b""
    with answers.open("ab") as out:
        out.truncate(len(whole and whole + b"\n"))  # without a line that was cut
    return {json.loads(line)["number"] for line in whole.splitlines()}


def answer(lm: pastkey.LanguageModel, number: int, question: str) -> str:
    """By the chat template where there is one."""
    options = {"max_new_tokens": 40, "temperature": 0.7, "seed": number}
    try:
        found = lm.chat("Answer in one sentence.").ask(question, **options)
    except pastkey.errors.InputError:
        found = lm.generate(question, **options)
    return " ".join(found.text.split())


done = answered()
lines = questions.read_text(encoding="utf-8").split("\n")
rows = {number: json.loads(line) for number, line in enumerate(lines) if line.strip()}
waiting = rows.keys() - done
with pastkey.load(bundle) as lm, ThreadPoolExecutor(8) as pool, answers.open("a", encoding="utf-8") as out:
    jobs = {pool.submit(answer, lm, number, rows[number]["question"]): number for number in sorted(waiting)}
    try:
        for count, job in enumerate(as_completed(jobs), 1):
            row = {"number": jobs[job], **rows[jobs[job]], "answer": job.result()}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            print(f"{count + len(done)} of {len(waiting) + len(done)}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)  # those that have not begun, where something went wrong
