"""A pool of threads over a file of questions: an application's own loop, with progress, and resume after Ctrl-C.

python examples/questions.py BUNDLE questions.txt answers.tsv

A line of questions.txt is a question, and a line of answers.tsv its number, a tab and its answer. `pastkey batch` does
more (a kill at any moment, errors, Parquet); here each answer is a call, between which a program may do what it likes.
"""

import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pastkey

bundle, questions, answers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def answered() -> set[int]:
    """The numbers of the lines that are whole."""
    whole = answers.read_text(encoding="utf-8").rpartition("\n")[0] if answers.exists() else ""
    answers.write_text(whole and whole + "\n", encoding="utf-8")  # without a line that was cut
    return {int(line.partition("\t")[0]) for line in whole.splitlines()}


def answer(lm: pastkey.LanguageModel, number: int, question: str) -> str:
    """By the chat template where there is one."""
    options = {"max_new_tokens": 40, "temperature": 0.7, "seed": number}
    try:
        found = lm.chat("Answer in one sentence.").ask(question, **options)
    except pastkey.errors.InputError:
        found = lm.generate(question, **options)
    return " ".join(found.text.split())


done = answered()
waiting = [
    (number, line)
    for number, line in enumerate(questions.read_text(encoding="utf-8").splitlines())
    if line and number not in done
]
with pastkey.load(bundle) as lm, ThreadPoolExecutor(8) as pool, answers.open("a", encoding="utf-8") as out:
    jobs = {pool.submit(answer, lm, number, question): number for number, question in waiting}
    try:
        for count, job in enumerate(as_completed(jobs), 1):
            out.write(f"{jobs[job]}\t{job.result()}\n")
            out.flush()
            print(f"{count + len(done)} of {len(waiting) + len(done)}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)  # those that have not begun, where something went wrong
