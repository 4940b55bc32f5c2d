"""The commands of the runtime, one module each: its flags and its body. `pastkey/__main__.py` has their table."""
