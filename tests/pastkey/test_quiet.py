from __future__ import annotations

import logging
import sys
import warnings

import pytest

from pastkey.quiet import quiet


def test_what_a_library_says_is_held_back(capsys, caplog):
    with quiet():
        print("progress")
        print("remark", file=sys.stderr)
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("library").error("remark")
        logging.getLogger("library").critical("the machine is on fire")
    assert capsys.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["the machine is on fire"]


def test_afterwards_everything_speaks_again(capsys):
    with pytest.raises(ValueError, match="passes"), quiet():
        raise ValueError("an error passes")
    print("said")
    assert capsys.readouterr().out == "said\n"
    assert logging.getLogger("library").isEnabledFor(logging.ERROR)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
