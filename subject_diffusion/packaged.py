"""What is bundled with the code, found from any working directory: recipes by name, and the toy world's weights."""

from __future__ import annotations

from pathlib import Path

_HOME = Path(__file__).resolve().parents[1]
RECIPES = _HOME / "manifests/recipes"


def recipe_names() -> tuple[str, ...]:
    """The bundled recipes."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def recipe_path(recipe: str | Path) -> Path:
    """A recipe's file, there or not. recipe: the name of a bundled one (`toy`), or a path."""
    path = Path(recipe)
    return path if path.suffix or len(path.parts) != 1 else RECIPES / f"{path}.yaml"


def local_path(path: str | Path) -> Path:
    """A relative path as it is seen from the working directory, or else from where this project lies."""
    path = Path(path)
    return path if path.exists() or not (_HOME / path).exists() else _HOME / path
