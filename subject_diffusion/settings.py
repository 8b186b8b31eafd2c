"""The base of every settings class: typed, frozen, unknown keys refused; each field's docstring is its
documentation. A recipe is a YAML file of such settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from subject_diffusion.errors import RecipeError, one_line
from subject_diffusion.packaged import RECIPES, recipe_names, recipe_path

EXECUTION_ONLY = "execution only"
"""Marks a field that changes how a run works and not what it writes: `threads: Annotated[int, EXECUTION_ONLY] = 8`."""

ADDED_LATER = "added later"
"""Marks a field that is newer than folders which a run may go on with: at its default, which is what they were filled
with, it is no part of what a recipe is."""

StringSet = Annotated[frozenset[str], PlainSerializer(sorted, when_used="json")]
"""Written in alphabetical order, so that equal recipes give equal files."""

FEW = 12
"""Keys that fit into an error's line; no recipe has as few."""


@dataclass(frozen=True)
class AlsoCalled:
    """Marks a field with the name that it has in another tool, so that who types that is told the name here."""

    name: str


class Settings(BaseModel):
    """A block of a recipe. Fields carry their unit in the name or docstring, and the source of their default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written, dotted key to value as in JSON: all but the fields that are marked
        `EXECUTION_ONLY`, and those `ADDED_LATER` that are at their default."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if EXECUTION_ONLY in field.metadata or (ADDED_LATER in field.metadata and value == field.default):
                continue
            if isinstance(value, Settings):
                found |= {f"{name}.{key}": inner for key, inner in value.identity().items()}
            else:
                found |= leaves(self.model_dump(mode="json", include={name}))
        return found


Recipe = TypeVar("Recipe", bound=Settings)


def load_settings(kind: type[Recipe], path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key.sub=value` overrides (values in YAML). Raises RecipeError in one line.

    path: of a YAML file, or the name of a bundled recipe: `toy`.
    """
    try:
        tree = yaml.safe_load(recipe_path(path).read_text("utf-8")) or {}
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file; {_names(kind, path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected keys and values at the top, found {type(tree).__name__}")
    if recipe_path(path).parent == RECIPES and not _fits(tree, kind):
        raise RecipeError(f"recipe {path}: it is for another command; {_names(kind, path)}")
    return validated(kind, tree, overrides, f"recipe {path}")


def _fits(tree: dict[str, Any], kind: type[Settings]) -> bool:
    """Whether the blocks of a recipe are those of this kind."""
    return tree.keys() <= kind.model_fields.keys()


def _names(kind: type[Settings], asked: str | Path) -> str:
    """Which recipes of this kind are bundled, the one nearest to what was asked for in front."""
    known = [name for name in recipe_names() if _fits(yaml.safe_load(recipe_path(name).read_text("utf-8")), kind)]
    near = difflib.get_close_matches(Path(asked).stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}bundled are {', '.join(known)}; give any other by the path of its YAML file"


def validated(kind: type[Recipe], tree: dict[str, Any], overrides: Sequence[str], name: str) -> Recipe:
    """The settings that a tree of keys holds, changed by the overrides. `name`: what an error calls the tree. Raises
    RecipeError."""
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error, kind)}") from None


Described = tuple[str, str, str, str]
"""A setting's dotted key, type, default and meaning."""


def describe(kind: type[BaseModel], prefix: str = "") -> Iterator[Described]:
    """Every setting, in the order of the class."""
    for name, field in kind.model_fields.items():
        key = prefix + name
        block = _block_class(field.annotation)
        if block is not None:
            yield from describe(block, f"{key}.")
            continue
        default = "required" if field.is_required() else json.dumps(_plain(field.get_default()))
        yield key, _type_name(field.annotation), default, " ".join((field.description or "").split())


def also_called(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name in another tool, dotted key) of every setting that has one."""
    for name, field in kind.model_fields.items():
        yield from ((mark.name, prefix + name) for mark in field.metadata if isinstance(mark, AlsoCalled))
        block = _block_class(field.annotation)
        if block is not None:
            yield from also_called(block, f"{prefix}{name}.")


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries as (dotted key, value)."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _block_class(annotation: Any) -> type[Settings] | None:
    """The settings class that a key holds, alone or as an alternative to None; a tuple of settings is a value."""
    if get_origin(annotation) is tuple:
        return None
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


def _type_name(annotation: Any) -> str:
    """A type as it is written, choices as their values."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return " | ".join(str(value) for value in arguments)
    if kind is Annotated:
        return _type_name(arguments[0])
    if kind in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if annotation in (NoneType, Ellipsis):
        return "None" if annotation is NoneType else "..."
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_name, arguments))}]" if arguments else name


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
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: not a value in YAML: {one_line(error)}") from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    errors = error.errors()
    first = errors[0]
    known = [k for k, *_ in describe(kind)]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        siblings = sorted({k.split(".")[0] for k in known} | set(known))
        same = dict(also_called(kind)).get(str(first["loc"][-1]))
        near = [same] if same else difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        every = f"the keys are {', '.join(known)}" if len(known) <= FEW else "`sdd recipe` lists every key"
        hint = f"did you mean {near[0]}?" if near else every
        return f"unknown key {key}; {hint}"
    if first["type"] == "value_error":
        return ": ".join(filter(None, (key, str(first["ctx"]["error"]))))
    # A key that takes several types has an error for each, with the type's name after the key.
    *parts, last = first["loc"]
    holder = ".".join(str(part) for part in parts)
    if isinstance(last, str) and holder in known:
        key, alike = holder, [e for e in errors if e["loc"][:-1] == first["loc"][:-1]]
    else:
        alike = [first]
    return f"{key} = {first['input']!r}: {', or '.join(e['msg'][0].lower() + e['msg'][1:] for e in alike)}"
