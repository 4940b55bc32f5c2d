"""A download cache of the Hub, whose files are links to a store next to them."""

import os
import shutil


def linked_to_blobs(source, folder):
    """The files of `source`, each a link to a blob, as in such caches. Returns it."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot
