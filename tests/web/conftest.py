"""The bundles of the runtime's tests, as pages."""

from ..runtime import conftest as decoder

tiny, letters, make_bundle, talking = decoder.tiny, decoder.letters, decoder.make_bundle, decoder.talking
