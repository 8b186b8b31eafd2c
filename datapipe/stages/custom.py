"""A stage of the user's own, named in the recipe by its import path."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import Field, field_validator

from datapipe.schema import StageName
from datapipe.stages.stage import Stage, StageSettings
from subject_diffusion.errors import RecipeError
from subject_diffusion.settings import validated


class CustomSettings(StageSettings):
    """One further stage, which need not be part of this project. Its verdicts say stage `custom` and reason `custom`;
    their detail says the rest."""

    use: str = Field(pattern=r"^[\w.]+:\w+$")
    """Import path of the stage's settings, a `StageSettings`: my_package.sharpness:SharpnessSettings. The module must
    be importable on every node. Running the recipe runs this code."""
    after: StageName
    """The stage that it follows, in the same actors; any but select, where every row has its last verdict, and nsfw,
    watermark and describe, which not every recipe has."""
    settings: dict[str, Any] = Field({})
    """Its own settings."""

    @field_validator("after")
    @classmethod
    def _before_the_last_verdict(cls, after: StageName) -> StageName:
        if after in (StageName.NSFW, StageName.WATERMARK, StageName.SELECT, StageName.DESCRIBE, StageName.CUSTOM):
            raise ValueError(f"no stage can follow {after.value}")
        return after

    def load(self) -> StageSettings:
        """The stage's own settings, imported and validated. Raises RecipeError."""
        module, _, name = self.use.partition(":")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"custom.use {self.use}: {error}; its folder must be on PYTHONPATH") from None
        if not (isinstance(kind, type) and issubclass(kind, StageSettings)):
            raise RecipeError(f"custom.use {self.use}: is no StageSettings")
        return validated(kind, dict(self.settings), (), "custom.settings")

    def identity(self) -> dict[str, Any]:
        own = {f"settings.{key}": value for key, value in self.load().identity().items()}
        return {"use": self.use, "after": self.after.value, **own}

    def check(self) -> None:
        self.load().check()

    def model_used(self) -> str | None:
        return self.load().model_used()

    def build(self) -> Stage:
        stage = self.load().build()
        if stage.name is not StageName.CUSTOM:
            raise RecipeError(f"custom.use {self.use}: the stage's name must be StageName.CUSTOM")
        return stage
