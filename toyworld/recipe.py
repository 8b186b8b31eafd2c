"""A recipe whose input may be a toy web, which is rendered and served for it."""

from __future__ import annotations

from datapipe.recipe import Recipe
from toyworld.server import ToyWebSettings


class ToyRecipe(Recipe):
    """Everything about a run: the input, a block per stage, and how the work is placed."""

    toyworld: ToyWebSettings | None = None
    """If no input is named, render this toy web of images, serve it on loopback, and read it."""
