"""What `pastkey eval` measures by default: standard library only, so that `--help` can show it at once."""

from __future__ import annotations

EVAL_LENGTH = 512  # tokens of a window, where the context has room for them
EVAL_WINDOWS = 24  # at most, from the beginning of the text
GREEDY_PROMPTS = 16  # windows whose beginning is continued, at most
GREEDY_PROMPT_TOKENS = 32  # of a window's beginning, and no more than half of it
GREEDY_TOKENS = 32  # of a continuation, where prompt and continuation fit into a window's length
