"""Procedural subjects with known truth, and tiny models pretrained on them."""
