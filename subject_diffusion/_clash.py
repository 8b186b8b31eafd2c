"""`model` and `train` are names that other projects use too: says so, before a wrong one is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("datapipe", "model", "sdd", "toyworld", "train")


def refuse_foreign_packages() -> None:
    """Raises ImportError when one of this project's packages would be imported from elsewhere than beside this one."""
    here = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
        for place in map(Path, places):
            if not place.resolve().is_relative_to(here / name):
                raise ImportError(
                    f"the package {name!r} that Python finds is {place}, not subject-diffusion's own in {here}; rename "
                    "or uninstall the other one, or install subject-diffusion into an environment of its own"
                )
