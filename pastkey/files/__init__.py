"""Files and folders: bounded reads, atomic writes, locks, hashes."""
