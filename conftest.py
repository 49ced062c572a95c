"""The tiny SDXL of test_sample.py, for every test that needs a model on disk."""

from test_sample import folder, single

__all__ = ["folder", "single"]
