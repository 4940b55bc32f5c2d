"""Every story that is told is accepted, and what the grammar would not tell is not."""

from __future__ import annotations

import itertools
import json
import sys

import pytest

from pastkey.errors import InputError
from pastkey.train.stories import acceptance, check_story, stories
from pastkey.train.stories.__main__ import main, read_stories

TOLD = list(itertools.islice(stories(11), 100))
LOST = (
    "There once was a fox named Sam who lived by the sea. Sam loved the yellow scarf that his uncle had made. One day "
    'he took it to the beach and lost it. Then Lucy, a duck, came by. "Do not worry, Sam," said Lucy. Lucy found the '
    'scarf beside the old boat. "Thank you, Lucy!" said Sam. Sam and Lucy stayed good friends ever after.'
)


def test_every_story_told_is_accepted_and_the_same_seed_tells_the_same():
    assert [verdict.reason for text in [*TOLD, f"\n  {LOST}\n"] if not (verdict := check_story(text)).ok] == []
    assert acceptance(TOLD) == 1.0
    assert list(itertools.islice(stories(11), 20)) == TOLD[:20]
    assert list(itertools.islice(stories(12), 20)) != TOLD[:20]
    # Among n of N equally likely stories n²/2N pairs are expected to be the same: none of 4,000 says N is beyond 10⁶.
    assert len({*itertools.islice(stories(5), 4_000)}) == 4_000


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("said Lucy. Lucy", "said Clara. Lucy"),  # the friend's name changes
        ("found the scarf", "found the ball"),  # another thing is found
        ("One day he", "One day she"),  # another pronoun
        ("beside the old boat", "under a log"),  # a hiding place of the forest, at the beach
        ("Then Lucy", "Then Mia"),  # a name of heroes
        (" ever after.", " ever after"),
        ("Lucy found", "Lucy  found"),
        (LOST, f"{LOST} {LOST}"),
    ],
)
def test_what_does_not_agree_is_refused(right, wrong):
    assert LOST.count(right) == 1
    verdict = check_story(LOST.replace(right, wrong))
    assert not verdict.ok
    assert verdict.reason


def test_a_story_cut_short_is_refused_and_the_reason_says_where_it_left_the_grammar():
    words = LOST.split(" ")
    assert not any(check_story(" ".join(words[:end])).ok for end in range(len(words)))
    assert "ball beside" in check_story(LOST.replace("found the scarf", "found the ball")).reason
    with pytest.raises(InputError, match="no story"):
        acceptance([])


def test_stories_are_read_from_paragraphs_and_from_json_lines(tmp_path):
    paragraphs, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    paragraphs.write_text(f"{LOST}\n\n{TOLD[0]}<|endoftext|>\n{TOLD[1]}\n", encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in (LOST, *TOLD[:2])), encoding="utf-8")
    assert read_stories(paragraphs) == read_stories(lines) == [LOST, *TOLD[:2]]


def test_the_command_tells_stories_and_prints_the_share(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mixed.txt"
    file.write_text(f"{LOST}\n\nThis is no story.\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}')
    for arguments, status, told in (
        (["--check", str(file), "--json"], 0, '{"stories": 2, "accepted_share": 0.5}'),
        (["--check", str(file)], 0, "50.0% of 2 stories\n  after '' the"),
        (["--seed", "11", "--count", "2"], 0, f"{TOLD[0]}\n\n{TOLD[1]}\n\n"),
        (["--check", str(tmp_path / "none.txt")], 2, "no such file"),
        (["--check", str(tmp_path / "bad.jsonl")], 2, "does not hold one JSON object with a text per line"),
    ):
        monkeypatch.setattr(sys, "argv", ["stories", *arguments])
        assert main() == status
        assert told in capsys.readouterr()[status // 2]
