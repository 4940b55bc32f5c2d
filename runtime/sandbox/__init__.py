"""Runs an untrusted bundle in a child process with limits.

    import pastkey
    pastkey.sandbox.call("generate", "bundle", {"prompt": "Once upon a time", "max_new_tokens": 8})["text"]

- `limits`: the limits asked for and those in force; `landlock`, `rlimits`: how the child puts limits on itself.
- `child`: the process, which runs one function; `process`, `parent`: how it is started, read and ended.
- `frames`: its output. The parent makes text of it (`relay`), or JSON (`calls`), and believes none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from .calls import call as call
    from .limits import Limits as Limits
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__, {".calls": ["call"], ".limits": ["Limits"]})
