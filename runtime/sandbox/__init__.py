"""Runs an untrusted bundle in a child process with limits; the parent validates every reply.

- `limits`: what is asked for and what is in force; `landlock`, `rlimits`: how the child puts limits on itself.
- `frames`, `protocol`: the messages between the two, and their types.
- `child`, `server`: the process, and what it answers; `process`, `connection`: how it is started, asked and ended.
- `model`, `stream`, `chat_format`: what an application holds.
"""
