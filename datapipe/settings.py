"""The base of every settings class: typed, frozen, unknown keys refused; each field's docstring is its
documentation."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A block of a recipe. Fields carry their unit in the name or docstring, and the source of their default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )
