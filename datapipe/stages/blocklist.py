"""Images that must not be in a dataset, by their hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from subject_diffusion.errors import RecipeError
from subject_diffusion.storage import file_system, named_errors

_HASH = re.compile(r"(?P<sha256>[0-9a-fA-F]{64})|(?P<phash>[0-9a-fA-F]{16})")


@dataclass(frozen=True)
class Blocklist:
    """`sha256`: digests of files; `phashes`: (N,) uint64, perceptual hashes of pictures; `digest`: of the lists."""

    sha256: frozenset[bytes]
    phashes: NDArray[np.uint64]
    digest: str

    def objection(self, sha256: str, phash: int, most_bits: int) -> str | None:
        """What names an image, if something does. `most_bits`: how many may differ between perceptual hashes."""
        if bytes.fromhex(sha256) in self.sha256:
            return f"SHA-256 {sha256}"
        bits = np.bitwise_count(self.phashes ^ np.uint64(phash))
        return f"perceptual hash {phash:016x}" if len(bits) and bits.min() <= most_bits else None


def read_blocklist(paths: Sequence[str]) -> Blocklist:
    """Lists of one hash a line: the first word of it, as `sha256sum` writes. Raises RecipeError."""
    sha256: set[bytes] = set()
    phashes: set[int] = set()
    digest = hashlib.sha256()
    for path in paths:
        fs, inner = file_system(path, RecipeError, f"screen.hash_blocklist {path}")
        with named_errors(f"screen.hash_blocklist {path}", RecipeError), fs.open(inner, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                words = line.decode("ascii", "replace").split()
                if not words or words[0].startswith("#"):
                    continue
                found = _HASH.fullmatch(words[0])
                if found is None:
                    raise RecipeError(
                        f"screen.hash_blocklist {path}, line {number}: no SHA-256 (64 hexadecimal digits) and no "
                        "perceptual hash (16); mend or remove it"
                    )
                if found["sha256"]:
                    sha256.add(bytes.fromhex(words[0]))
                else:
                    phashes.add(int(words[0], 16))
    return Blocklist(frozenset(sha256), np.array(sorted(phashes), np.uint64), digest.hexdigest())
