"""Labeling images in this process: the stages of a recipe as plain calls, without Ray, shards or a run folder."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ExifTags, Image

from datapipe.color import to_srgb
from datapipe.image_file import ImageRefusedError, orientation_of
from datapipe.recipe import Recipe, build_stage, check_stages
from datapipe.schema import Sample, StageName
from datapipe.stages import ANNOTATE_STAGES
from datapipe.stages.stage import Stage, is_due
from subject_diffusion._extras import require
from subject_diffusion.errors import SourceError
from subject_diffusion.settings import load_settings
from toyworld.recipe import ToyRecipe

Picture = Image.Image | str | Path | bytes
"""A PIL image, the path of an image file, or the file's bytes."""


class Labeler:
    """Loads a recipe's models once and labels any number of images with them.

        labeler = Labeler("sdd", ["caption.device=cuda"])
        samples = labeler(["a.jpg", "b.jpg"])

    Captions, tags, boxes, masks and the selection of entities are those of `sdd dataset` with the same recipe. The
    recipe's screening is left out: it decides which images of the web are worth labeling, and these were chosen.
    """

    def __init__(self, recipe: str | Path | Recipe = "toy", overrides: Sequence[str] = ()) -> None:
        """Args:
            recipe: The name of a recipe that comes with the project ("toy", "sdd"), the path of a YAML file, or a
                loaded recipe.
            overrides: Settings to change, as for `--set`: `["select.min_score=0.4"]`. A loaded recipe takes none.

        Raises:
            RecipeError: The recipe cannot be read, or a setting is unknown or out of range.
            BackendError: A model's weights are missing, damaged or another model's, or the hub does not give them.
            ModuleNotFoundError: The extra `label` is not installed.
        """
        require("label")
        settings = recipe if isinstance(recipe, Recipe) else load_settings(ToyRecipe, recipe, overrides)
        self.recipe = settings.pinned()
        check_stages(self.recipe)
        self._stages = [build_stage(name, self.recipe) for name in self.recipe.with_optional(ANNOTATE_STAGES)]

    def __call__(self, images: Sequence[Picture]) -> list[Sample]:
        """Labels images together, in micro-batches of the recipe's sizes.

        Args:
            images: PIL images of any mode, paths, or encoded bytes. Each becomes an upright RGB or gray JPEG; one that
                is such a JPEG already, given as a path or as bytes, is kept as it is.

        Returns:
            One sample per image, in order. `sample.entities` are the accepted subjects, best score first; of each,
            `box` is (x1, y1, x2, y2) in pixels of `sample.width` x `sample.height`, `span` the characters of
            `sample.caption` that name it, and `mask.array()` an (H, W) bool array. `sample.verdict` says whether the
            recipe would keep the image, and if not, at which stage and for what reason. An image that cannot be
            decoded, or has more than `screen.max_pixels`, is dropped at `screen`, as in a run.

        Raises:
            SourceError: There is no file at a path, or something is no image.
        """
        samples = [self._sample(row, image) for row, image in enumerate(images)]
        for stage in self._stages:
            for batch in _batches(stage, samples):
                for done in stage(batch):
                    samples[done.row] = done
        return samples

    def _sample(self, row: int, image: Picture) -> Sample:
        data, url = _encoded(image)
        sample = Sample(row=row, url=url, sha256=hashlib.sha256(data).hexdigest())
        try:
            normal = self.recipe.screen.normalize(data)
        except ImageRefusedError as refused:
            return sample.dropped(StageName.SCREEN, refused.reason, refused.detail)
        return sample.replace(
            image=normal.data,
            width=normal.width,
            height=normal.height,
            original_width=normal.original_width,
            original_height=normal.original_height,
        )


def label(image: Picture, recipe: str | Path = "toy", overrides: Sequence[str] = ()) -> Sample:
    """Labels one image: caption, and for every entity a tag, a box and a mask.

        sample = label(Image.open("photo.jpg"), recipe="sdd")
        for entity in sample.entities:
            print(entity.tag, entity.box, entity.mask.array().shape)

    The models of the last recipe stay in memory, so that a second call with it loads nothing. For many images, a
    `Labeler` runs them in batches.

    Args:
        image: A PIL image, a path, or encoded bytes.
        recipe: "toy" (tiny models that come with the project and know the toy world's 32 nouns only), "sdd" (the
            paper's models, downloaded from the hub), or the path of a YAML file.
        overrides: Settings to change, as for `--set`.

    Returns:
        The sample, as described at `Labeler.__call__`.

    Raises:
        RecipeError: The recipe cannot be read, or a setting is unknown or out of range.
        BackendError: A model's weights or packages are missing.
        SourceError: The image cannot be read or decoded.
    """
    (sample,) = _labeler(str(recipe), tuple(overrides))([image])
    if sample.image is None and sample.verdict is not None and sample.verdict.reason is not None:
        name = sample.url or "the image"
        raise SourceError(f"{name}: {sample.verdict.reason.value}: {sample.verdict.detail}")
    return sample


@functools.lru_cache(maxsize=1)
def _labeler(recipe: str, overrides: tuple[str, ...]) -> Labeler:
    return Labeler(recipe, overrides)


def _encoded(image: Picture) -> tuple[bytes, str]:
    """An image's file bytes, and its path or ""."""
    if isinstance(image, bytes):
        return image, ""
    if isinstance(image, Image.Image):
        sink = io.BytesIO()
        upright = Image.Exif()  # the rest of the image's own may be broken, and is not needed
        image.load()
        upright[ExifTags.Base.Orientation] = orientation_of(image)
        if image.mode in _PNG_MODES:
            image.save(sink, "PNG", compress_level=1, exif=upright)
        else:
            converted = to_srgb(image, image.info.get("icc_profile") or b"").convert("RGB")
            converted.save(sink, "PNG", compress_level=1, exif=upright, icc_profile=None)
        return sink.getvalue(), ""
    if not isinstance(image, str | Path):
        raise SourceError(f"{type(image).__name__} is no image; give a PIL image, a path, or an image file's bytes")
    try:
        return Path(image).read_bytes(), str(image)
    except OSError as error:
        raise SourceError(f"{image}: {error.strerror}; give the path of an image file") from None


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def _batches(stage: Stage, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The samples that are due, in micro-batches of which each comes from one of the stage's buckets."""
    buckets: dict[object, list[Sample]] = {}
    for sample in samples:
        if is_due(stage, sample):
            buckets.setdefault(stage.bucket(sample), []).append(sample)
    for members in buckets.values():
        yield from (members[i : i + stage.micro_batch] for i in range(0, len(members), stage.micro_batch))
