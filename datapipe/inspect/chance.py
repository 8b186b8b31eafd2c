"""Choosing at random without holding what is chosen from: the smallest of a rank that depends on key and seed alone,
so that the choice is the same in whatever order, and however cut into shards, the keys come by."""

from __future__ import annotations

import hashlib


def rank(key: str, seed: int) -> str:
    """The same as `rank_in_sql`."""
    return hashlib.md5(f"{seed}:{key}".encode(), usedforsecurity=False).hexdigest()


def rank_in_sql(seed: int) -> str:
    """An expression over the views of `sidecars`."""
    return f"md5(concat({seed}, ':', key))"
