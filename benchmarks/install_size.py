"""How much disk each extra takes: `python benchmarks/install_size.py`, where all of them are installed.

For the base installation and each extra, it follows the requirements of what is installed here, and adds up the files
that each distribution records. An extra's requirements that are missing here are named, and not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

PROJECT = "subject-diffusion"
MB = 1_000_000
LARGEST = 3
CUDA = ("cuda-", "nvidia-", "triton")
"""How the names begin of what PyTorch brings for GPUs, beside its own files."""


def main() -> None:
    sizes: dict[str, int] = {}
    base, _ = requirements()
    table = Table("extra", "MB", "beyond the base", "of these CUDA", "largest", "not installed")
    for extra in (None, *sorted(distribution(PROJECT).metadata.get_all("Provides-Extra") or ())):
        found, missing = requirements(extra)
        for name in found - sizes.keys():
            sizes[name] = size_of(distribution(name))
        added = found - base if extra else found
        largest = sorted(added, key=lambda name: -sizes[name])[:LARGEST]
        table.add_row(
            extra or "none",
            megabytes(sizes[name] for name in found),
            megabytes(sizes[name] for name in added),
            megabytes(sizes[name] for name in added if name.startswith(CUDA)),
            ", ".join(f"{name} {sizes[name] / MB:.0f}" for name in largest),
            ", ".join(sorted(missing)),
        )
    Console().print(table)


def requirements(extra: str | None = None) -> tuple[set[str], set[str]]:
    """Names of the distributions that the base installation with this extra brings: those that are installed, and
    those that are not. The project's own files are left out."""
    found, missing = set[str](), set[str]()
    waiting = [(PROJECT, frozenset(filter(None, [extra])))]
    followed = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            asked = distribution(name).requires or ()
        except PackageNotFoundError:
            missing.add(name)
            continue
        found.add(name)
        for requirement in map(Requirement, asked):
            if wanted(requirement, extras):
                step = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if step not in followed:
                    followed.add(step)
                    waiting.append(step)
    return found - {PROJECT}, missing


def wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Whether this machine, and one of the extras or none, asks for it."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def size_of(found: Distribution) -> int:
    """Bytes of the files that a distribution records and that are there, compiled ones among them."""
    paths = (Path(str(found.locate_file(file))) for file in found.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / MB:,.0f}"


if __name__ == "__main__":
    main()
