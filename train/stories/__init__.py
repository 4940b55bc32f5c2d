"""The built-in corpus: little stories of a grammar, and a parser that checks whether a text is one of them.

`plots` has the words and the plots, `grammar` tells and checks. `python -m pastkey.train.stories` does both.
"""

from .grammar import Verdict, acceptance, check_story, stories

__all__ = ["Verdict", "acceptance", "check_story", "stories"]
