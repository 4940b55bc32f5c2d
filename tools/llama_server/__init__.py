"""llama.cpp's own tests of its server, run against `pastkey serve`: `python -m tools.llama_server`.

`__main__` unpacks them from the source distribution of llama-cpp-python and runs them with pytest in an environment of
their own. They start `shim` in place of llama-server, and `plugin` leaves out what `left_out` names. Nothing of
llama.cpp is stored in the repository.
"""
