"""The base of every settings class: typed, frozen, unknown keys refused; each field's docstring is its
documentation. A recipe is such settings in a YAML file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from datapipe.errors import RecipeError


class Settings(BaseModel):
    """A block of a recipe. Fields carry their unit in the name or docstring, and the source of their default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


Recipe = TypeVar("Recipe", bound=Settings)


def load_settings(kind: type[Recipe], path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key.sub=value` overrides (values in YAML). Raises RecipeError in one line."""
    try:
        tree = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file; the ones that come along are in manifests/recipes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected keys and values at the top, found {type(tree).__name__}")
    return validated(kind, tree, overrides, f"recipe {path}")


def validated(kind: type[Recipe], tree: dict[str, Any], overrides: Sequence[str], name: str) -> Recipe:
    """Settings of a tree of keys, changed by the overrides. name: what an error calls it. Raises RecipeError."""
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error, kind)}") from None


def describe(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting, in the order of the class."""
    for name, field in kind.model_fields.items():
        key = prefix + name
        block = _block_class(field.annotation)
        if block is not None:
            yield from describe(block, f"{key}.")
            continue
        if get_origin(field.annotation) is Literal:
            type_name = " | ".join(str(value) for value in get_args(field.annotation))
        else:
            type_name = str(getattr(field.annotation, "__name__", field.annotation)).replace("typing.", "")
        default = "required" if field.is_required() else json.dumps(_plain(field.get_default()))
        yield key, type_name, default, " ".join((field.description or "").split())


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _block_class(annotation: Any) -> type[Settings] | None:
    """The settings that a key holds, itself or as an alternative to none; a tuple of them is a value."""
    if get_origin(annotation) is tuple:
        return None
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, for instance select.min_score=0.4")
    *path, last = key.strip().split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: {part} is a value and has no keys of its own")
    tree[last] = yaml.safe_load(value)


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [k for k, *_ in describe(kind)]
        siblings = sorted({k.split(".")[0] for k in known} | set(known))
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "`sdd recipe` lists every key"
        return f"unknown key {key}; {hint}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
