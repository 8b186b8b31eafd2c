"""Where models come from: a folder in hub format, here or in a bucket, an original checkpoint file, or a hub id at a
revision."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from datapipe.backends.hub import HubModel
from datapipe.backends.hub_format import (
    deciding_files,
    digest_of,
    folder_digest,
    folder_problem,
    model_type,
    names_problem,
)
from subject_diffusion.errors import BackendError, one_line
from subject_diffusion.loading_bars import no_loading_bars
from subject_diffusion.node_copy import node_copy, node_local
from subject_diffusion.settings import EXECUTION_ONLY, Settings

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
Loaded = TypeVar("Loaded")
Pinned = TypeVar("Pinned", bound="ModelSettings")

_PROJECT = Path(__file__).parents[2]
UNTRIED_BATCH = 8
"""Images at once where nobody has tried what the device can do."""


class ModelSettings(Settings):
    """What all stages with a model have in common. Subclasses give `model` its default."""

    key: ClassVar[str] = "model"
    """The recipe's key of `model`, which errors name."""

    model: str
    """Hub id, or folder in hub format (relative to the working directory or to this project, or a bucket's URL; from a
    bucket or a network file system each node copies it once), or checkpoint file."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; default: main. A run records the commit that it stood for."""
    dtype: Dtype = "float32"
    """Precision of weights and activations on a GPU; a CPU computes in float32."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION_ONLY] = "auto"
    """auto: a GPU where there is one."""
    micro_batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], EXECUTION_ONLY] = "auto"
    """Images that go through the model at once. auto: on a GPU, a run tries before it begins how many its memory holds
    and how many are worth it; on a CPU, and outside of runs, 8."""

    @property
    def computes_here(self) -> bool:
        """Whether the model runs in the run's own processes, so that its batch can be tried."""
        return True

    @property
    def images_at_once(self) -> int:
        """The micro-batch that holds where nothing was tried."""
        return UNTRIED_BATCH if self.micro_batch == "auto" else self.micro_batch


class CompilableSettings(ModelSettings):
    """A model in which the part that does most of the arithmetic sees images of one size only."""

    compile: Annotated[bool | Literal["auto"], EXECUTION_ONLY] = "auto"
    """Whether torch.compile makes that part faster. auto: on a GPU, a run tries before it begins whether that ends
    it earlier, the time to compile included; on a CPU, and outside of runs, false."""


class TextEncoderSettings(ModelSettings):
    """The BERT of groundingdino-py: its configuration and tokenizer. The checkpoint has its weights."""

    key: ClassVar[str] = "ground.text_encoder"


def device_of(settings: ModelSettings) -> torch.device:
    """Raises BackendError when a GPU is asked for where there is none."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"{_named(settings)}: device cuda is asked for and no GPU is visible; use auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """The dtype of the settings on a GPU, else float32."""
    import torch

    # Many CPU kernels lack half precision.
    return getattr(torch, settings.dtype) if device_of(settings).type == "cuda" else torch.float32


def locate(settings: ModelSettings) -> str:
    """The model's local path if it has one, else its hub id. Of a folder in a bucket or on a network file system this
    machine gets a copy, unless it has one. Raises BackendError."""
    if "://" in settings.model:
        return str(node_copy(settings.model, deciding_files, BackendError, _named(settings)))
    for path in (Path(settings.model), _PROJECT / settings.model):
        if (path / "config.json").is_file():
            return str(node_local(path, deciding_files, BackendError, _named(settings)))
        if path.exists():  # an original checkpoint, or no model, which is told before anything is copied
            return str(path)
    return settings.model


def pinned(settings: Pinned) -> Pinned:
    """The settings with a hub id's revision replaced by the commit that it stands for now, so that all workers, and
    later runs, load the same model. Raises BackendError."""
    hub = model_on_hub(settings)
    return settings if hub is None else settings.model_copy(update={"revision": hub.commit()})


def model_identity(settings: ModelSettings) -> str:
    """How a run records a model: "id@revision", or for local files "path@" and the first digits of their SHA-256: of a
    checkpoint, or of all files of a folder that decide what the model answers."""
    place = Path(locate(settings))
    if not place.exists():
        return f"{settings.model}@{settings.revision or 'main'}"
    return f"{settings.model}@{digest_of(place, [place]) if place.is_file() else folder_digest(place)}"


def check_model(
    settings: ModelSettings, kinds: Sequence[str] = (), processor: bool = False, tokenizer: bool = False
) -> None:
    """Makes sure, without loading a tensor, that a model in hub format is there, whole, or can be fetched. Raises
    BackendError.

    `kinds`: values of `model_type` that the stage can use; empty: those that its loader knows. `processor`,
    `tokenizer`: whether the model needs them beside its weights.
    """
    if settings.device == "cuda":
        device_of(settings)
    place = Path(locate(settings))
    if place.is_file():
        raise BackendError(
            f"{_named(settings)}: a file, where a folder in hub format is wanted; for an original checkpoint set "
            f"{settings.key.partition('.')[0]}.backend"
        )
    if place.is_dir():
        problem = folder_problem(place, processor, tokenizer)
        config = place / "config.json"
    elif (hub := model_on_hub(settings)) is not None:
        names = hub.file_names()
        config = hub.file("config.json", cached=names is None)
        problem = names_problem(names, processor, tokenizer) if names is not None else None
    else:
        problem = "no such folder or file; download the weights there, or give a hub id"
    if problem is None and kinds and (kind := model_type(config)) not in kinds:
        problem = f"a model of type {kind}, where {' or '.join(kinds)} is wanted"
    if problem is not None:
        raise BackendError(f"{_named(settings)}: {problem}")


def check_checkpoint(settings: ModelSettings) -> None:
    """Makes sure, cheaply, that a checkpoint file for an original implementation is there. Raises BackendError."""
    if settings.device == "cuda":
        device_of(settings)
    if not settings.model.endswith((".pth", ".pt")) or not Path(locate(settings)).is_file():
        raise BackendError(
            f"{_named(settings)}: no such .pth file, and this backend wants an original checkpoint; "
            f"download it there, or set {settings.key.partition('.')[0]}.backend=transformers"
        )


@no_loading_bars()
def load(settings: ModelSettings, loader: Callable[..., Loaded], **options: Any) -> Loaded:
    """Calls `loader`, a `from_pretrained`, on the model. Never runs code that comes with a model. Raises
    BackendError."""
    try:
        return loader(locate(settings), revision=settings.revision, trust_remote_code=False, **options)
    except Exception as error:  # for broken files and missing packages, transformers raises almost any class
        hub = model_on_hub(settings)
        advice = hub.advice(error) if hub is not None else None
        raise BackendError(f"{_named(settings)}: {advice or f'cannot be loaded: {one_line(error)}'}") from error


def load_model(settings: ModelSettings, auto_class: Any) -> Any:
    """A transformers model in evaluation mode, on its device in its dtype, from safetensors only. Raises BackendError,
    also when a tensor is missing, of another shape, or not one of the model's.

    `auto_class`: of transformers, such as AutoModelForMaskGeneration, or the model's own.
    """
    from transformers import AutoConfig

    config = load(settings, AutoConfig.from_pretrained)
    if hasattr(auto_class, "_model_mapping") and type(config) not in auto_class._model_mapping:
        wanted = auto_class.__name__.removeprefix("AutoModelFor")
        raise BackendError(f"{_named(settings)}: a {config.model_type} model, where one for {wanted} is wanted")
    model, report = load(
        settings,
        auto_class.from_pretrained,
        use_safetensors=True,
        dtype=dtype_of(settings),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # They are refused below, where the message can name them.
    )
    # transformers gives tensors that are missing random values, and only logs it.
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    refuse_partly_loaded(settings, report["missing_keys"], mismatched, report["unexpected_keys"])
    return model.to(device_of(settings)).eval()


def load_tokenizer(settings: ModelSettings) -> Any:
    """A fast tokenizer that knows words. Raises BackendError."""
    from transformers import AutoTokenizer

    tokenizer = load(settings, AutoTokenizer.from_pretrained)
    check_tokenizer(settings, tokenizer)
    if not tokenizer.is_fast:
        raise BackendError(f"{_named(settings)}: its tokenizer has no fast version, which tells where a token stands")
    return tokenizer


def check_tokenizer(settings: ModelSettings, tokenizer: Any, ids: dict[str, int] | None = None) -> None:
    """Raises BackendError for a tokenizer that knows no words, as transformers makes one silently where its files are
    missing, and for one without the tokens that the model needs.

    `ids`: those tokens and the numbers that they must have.
    """
    unknown = tokenizer.unk_token_id
    if not set(tokenizer("a photo of a cat", add_special_tokens=False)["input_ids"]) - {unknown}:
        raise BackendError(
            f"{_named(settings)}: its tokenizer knows no words; download tokenizer.json (or vocab.txt) with the model"
        )
    for token, wanted in (ids or {}).items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != wanted:
            raise BackendError(
                f"{_named(settings)}: its tokenizer has {token} as number {found}, where the model has {wanted} built "
                "in; take the tokenizer that was published with it"
            )


def load_original_checkpoint(
    settings: ModelSettings, model: torch.nn.Module, may_miss: str = "$^", may_hold: str = "$^"
) -> None:
    """Loads a checkpoint of an original implementation into a model. Runs no code from the file. Raises BackendError.

    `may_miss`: pattern of the tensors that the checkpoint need not hold; `may_hold`: of those that it may hold and the
    model does not have.
    """
    import torch

    try:
        tree = torch.load(locate(settings), map_location="cpu", weights_only=True)
    except Exception as error:  # for bytes that are no checkpoint, torch raises almost any class
        raise BackendError(
            f"{_named(settings)}: not a readable checkpoint that holds only tensors: {one_line(error)}"
        ) from error
    state = tree.get("model", tree) if isinstance(tree, dict) else {}
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise BackendError(
            f"{_named(settings)}: a checkpoint of a model of another size; check its settings: {one_line(error)}"
        ) from error
    missing = [name for name in missing if not re.search(may_miss, name)]
    refuse_partly_loaded(settings, missing, (), [name for name in unexpected if not re.search(may_hold, name)])


def refuse_partly_loaded(
    settings: ModelSettings, missing: Sequence[str], mismatched: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Raises BackendError unless weights and model have the same tensors. All arguments: names of tensors."""
    problems = [
        f"{what}: {len(names)} (such as {min(names)})"
        for what, names in (("missing", missing), ("of another shape", mismatched), ("not the model's", unexpected))
        if names
    ]
    if problems:
        raise BackendError(
            f"{_named(settings)}: its tensors are not those of the model; {', '.join(problems)}; download it again, or "
            "check which model it is"
        )


def model_on_hub(settings: ModelSettings) -> HubModel | None:
    """The model's place on the hub; None for a local path, whether it is there or not."""
    local = Path(locate(settings)).exists() or settings.model.startswith((".", "/", "~"))
    if local or settings.model.count("/") > 1 or ("/" not in settings.model and settings.model not in _WITHOUT_OWNER):
        return None
    return HubModel(settings.key, settings.model, settings.revision)


_WITHOUT_OWNER = ("bert-base-uncased",)
"""Hub ids from before owners; any other single word is rather a mistyped folder."""


def _named(settings: ModelSettings) -> str:
    return f"{settings.key} {settings.model}"
