"""The installed version."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("pastkey")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+uninstalled"
