"""Random choice without holding what is chosen from: those with the smallest ranks are chosen. A rank depends only on
key and seed, so the choice is the same in whatever order, and however cut into shards, the keys come by."""

from __future__ import annotations

import hashlib


def rank(key: str, seed: int) -> str:
    """A random number for a key, as 32 hex digits; equal to `rank_in_sql`."""
    return hashlib.md5(f"{seed}:{key}".encode(), usedforsecurity=False).hexdigest()


def rank_in_sql(seed: int) -> str:
    """An expression over the views of `sidecars`."""
    return f"md5(concat({seed}, ':', key))"
