"""A bundle of a stranger in a child process with limits: the parent opens nothing of it, and believes nothing it says.

- `limits`: what is asked for, what is in force; `landlock`, `rlimits`: how the child puts them on itself.
- `protocol`: what the two say to each other, and in which types.
- `child`: the process; `model`: what an application holds; `connection`: the way between them, and its end.
- `rerun`: a whole command in such a process.
"""
