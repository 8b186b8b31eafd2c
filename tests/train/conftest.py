"""The tiny bases that the model's tests write, for the trainer's."""

from tests.model.conftest import clip, sd1, sd2, sdxl

__all__ = ["clip", "sd1", "sd2", "sdxl"]
