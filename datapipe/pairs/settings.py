"""What decides which entities are the same subject. A key that begins with `decide.` needs no model to be changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from datapipe.backends.loading import ModelSettings
from datapipe.pairs.files import FOLDER, SETTINGS_FILE, read_json
from datapipe.shards import Store
from subject_diffusion.settings import EXECUTION_ONLY, Settings, validated


class EmbedSettings(ModelSettings):
    """What subjects are compared by: the features of the patches inside their masks."""

    key: ClassVar[str] = "embed.model"
    model: str = "toyworld/weights/identity"
    """Folder in hub format or hub id of a DINOv2 or SigLIP 2, such as facebook/dinov2-base. The default is the toy
    world's own, which knows drawn subjects and nothing else."""
    grid: int = Field(4, ge=1, le=16)
    """Patch features are kept as means over the cells of a square grid of so many cells a side: of a subject at most
    16 × 2 × 768 bytes by facebook/dinov2-base."""


class SearchSettings(Settings):
    """How neighbors are looked for."""

    neighbors: int = Field(10, ge=1, le=100)
    """Nearest entities that are looked at for each entity."""
    floor: float = Field(0.5, ge=-1, le=1)
    """Cosine of embeddings below which neighbors are forgotten. Thresholds can be changed later down to it."""
    lists: int | None = Field(None, ge=1)
    """Inverted lists of the index (faiss's IVF, of float16). Default: 4 · √N of a part's entities, and below
    10,000 one, which is exact."""
    probes: int = Field(32, ge=1)
    """Lists that are searched for each entity. More find more, in proportionally more time."""
    part_entities: int = Field(2_000_000, ge=1)
    """Entities of one part of the index: what a worker holds in memory, 2 bytes a dimension each."""


class DecideSettings(Settings):
    """Which candidates are pairs."""

    min_similarity: float = Field(0.9, ge=-1, le=1)
    """Cosine of the embeddings."""
    min_patch_similarity: float = Field(0.8, ge=-1, le=1)
    """Mean over the patches of either subject of the cosine with the other's most alike patch."""
    min_margin: float = Field(0.1, ge=0, le=1)
    """By which share the pair's distance, 1 − cosine, is smaller than that to the nearest entity of another subject:
    what tells two red mugs apart."""
    same_noun: bool = True
    """The tags end in the same word: of "red mug" its noun. Off for languages in which the noun comes first, and where
    one subject goes by several nouns ("dog", "puppy"), or by singular and plural."""
    max_aligned: float = Field(0.995, ge=-1, le=1)
    """Mean cosine of patches at the same place of both subjects above which they are one photograph of it."""
    min_copy_bits: int = Field(10, ge=0, le=64)
    """Bits in which the perceptual hashes of two images that are not copies differ, at least."""
    min_seconds: float = Field(1.0, ge=0)
    """Time between two frames of a clip, at least."""
    max_images: int = Field(20, ge=2)
    """Images in which one identity comes, at most: what is in more of them is rather a logo, or a stock photo."""


class PairSettings(Settings):
    """The settings of `sdd pairs`."""

    embed: EmbedSettings = EmbedSettings()
    search: SearchSettings = SearchSettings()
    decide: DecideSettings = DecideSettings()
    workers: Annotated[int | None, Field(ge=1), EXECUTION_ONLY] = None
    """Processes that work at a time; default: one for each GPU or, without any, for each CPU core."""


def settings_of(store: Store, overrides: Sequence[str]) -> PairSettings:
    """Those of the last search in this folder, or the defaults, changed by the overrides. Raises SddError."""
    name = f"{FOLDER}/{SETTINGS_FILE}"
    where = f"{store.root}/{name}"
    kept = read_json(store, name, dict[str, Any], "--set") if store.exists(name) else {}
    last = validated(PairSettings, kept, (), where)
    settings = validated(PairSettings, kept, overrides, where if kept else "sdd pairs")
    embed = settings.embed
    if embed.model != last.embed.model and embed.revision == last.embed.revision:
        embed = embed.model_copy(update={"revision": None})  # it is a commit of the last model
    return settings.model_copy(update={"embed": embed})
