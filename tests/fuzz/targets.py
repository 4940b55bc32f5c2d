"""All readers by name. In each, every other file is valid, and every hash is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from .bundles import BUNDLES
from .checkpoints import CHECKPOINTS
from .reader import Target
from .sources import SOURCES
from .texts import TEXTS

TARGETS: Mapping[str, Target] = {**BUNDLES, **CHECKPOINTS, **SOURCES, **TEXTS}

warnings.filterwarnings("ignore")  # of libraries, about odd values
