"""The tiny SDXL for every test that needs a model on disk."""

from tests.oracles import folder, single

__all__ = ["folder", "single"]
