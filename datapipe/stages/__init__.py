"""The stages, in flow order, each a plain object; and how to make one from a recipe."""
