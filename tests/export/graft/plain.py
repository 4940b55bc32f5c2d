"""The plain decoder of the contract, with what a test changes of it."""

from ..decoders import Plain


def plain(methods=None, **arguments):
    """Plain with other methods, in eval mode."""
    made = type("Decoder", (Plain,), methods or {})(**arguments)
    return made.eval()
