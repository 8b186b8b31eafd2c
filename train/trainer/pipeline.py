"""What a run leaves, a diffusers pipeline with the averaged weights; and a trained model from wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from datapipe.shards.store import Store
from model import SubjectDiffusion, SubjectDiffusionPipeline, SubjectNet
from model.base import first_line, load_base, load_image_encoder, load_subject_net
from model.base_layers import base_layers, of_another_base
from subject_diffusion.errors import RunError
from subject_diffusion.storage import whole_folder
from train.trainer.checkpoint import load_checkpoint, read_record
from train.trainer.low_rank import merged
from train.trainer.model_folder import model_folder
from train.trainer.recipe import TrainRecipe
from train.trainer.run_folder import NET, RECIPE, is_checkpoint, is_net, trained_model


def net_with(weights: Mapping[str, Tensor], like: SubjectNet) -> SubjectNet:
    """A net of the same settings as `like`, for sampling with these weights, a LoRA of the text encoder added to its
    own. Raises RunError where one is missing."""
    net: SubjectNet = SubjectNet.from_config(like.config)
    found = merged(weights)
    for missing in sorted(dict(net.named_parameters()).keys() - found.keys()):
        raise RunError(f"the trained weights have no {missing}; go on with the release that wrote them")
    net.load_state_dict(found, strict=False)
    net.eval().requires_grad_(False)
    return net


def write_pipeline(recipe: TrainRecipe, net: SubjectNet, folder: Path) -> None:
    """Writes `save_pretrained`'s folder, and the recipe into it."""
    _write(_on_base(recipe, net), recipe, folder)


def export(checkpoint: Path, folder: Path) -> None:
    """Writes the pipeline of a checkpoint. Raises SddError."""
    _write(open_pipeline(checkpoint), _recipe_of_checkpoint(checkpoint), folder)


def open_pipeline(path: Path) -> SubjectDiffusionPipeline:
    """The pipeline of whatever `trained_model` finds: a run, a checkpoint, a subject net, a pipeline's folder, or one
    on the hub. Of a checkpoint and a net, base and image encoder lie where its run had them. Raises SddError."""
    found = trained_model(path)
    if is_net(found):
        return _on_base(read_recipe(found), load_subject_net(found / NET))
    if not is_checkpoint(found):
        return SubjectDiffusionPipeline.from_pretrained(found)
    recipe = _recipe_of_checkpoint(found)
    base = load_base(model_folder("base", recipe.base))
    clip, processor = load_image_encoder(model_folder("image_encoder", recipe.image_encoder))
    net = base.untrained_net(clip, recipe.model.model_dump(mode="json"))
    return SubjectDiffusionPipeline(
        **vars(base),
        image_encoder=clip,
        feature_extractor=processor,
        subject_net=net_with(trained_weights(found), net),
        reference_background=recipe.examples.reference.background,
    )


def trained_weights(path: Path) -> dict[str, Tensor]:
    """What `trained_model` finds has learned, averaged where it has an average; by the subject net's names. Raises
    SddError."""
    found = trained_model(path)
    if not is_checkpoint(found):
        return {name: p.detach() for name, p in load_subject_net(found / NET).named_parameters()}
    tensors, _ = load_checkpoint(found, only=("weights", "average"))
    return merged(tensors["weights"] | tensors["average"])


def check_same_base(path: Path, model: SubjectDiffusion, frozen: str) -> None:
    """Whether what `trained_model` finds belongs to the base of `model`, as whole layers in place of its own do.
    frozen: the model's `frozen_fingerprint`, which checkpoints hold. Raises SddError."""
    found = trained_model(path)
    if is_checkpoint(found):
        another = read_record(found)["frozen"] != frozen
    else:
        trained_on = SubjectNet.load_config(found / NET).get("base_weights") or {}
        another = of_another_base(base_layers(model.unet, None), trained_on)
    if another:
        raise RunError(
            f"init_from {path}: it was trained on another base or image encoder, whose weights differ; name the same "
            "ones, or a run that was trained on these"
        )


def recipe_of(path: Path) -> TrainRecipe | None:
    """What a model was trained by; None for a pipeline that does not say. path: as for `open_pipeline`. Raises
    SddError."""
    found = trained_model(path)
    if is_checkpoint(found):
        return _recipe_of_checkpoint(found)
    fetched = found if found.is_dir() else model_folder("--run", str(found))
    folder = next((folder for folder in (fetched, path) if (folder / RECIPE).is_file()), None)
    return None if folder is None else read_recipe(folder)


def read_recipe(out: Path) -> TrainRecipe:
    """The recipe in a run's or a pipeline's folder. Raises RunError."""
    return parsed_recipe(str(out), Store(str(out), create=False).read(RECIPE))


def parsed_recipe(out: str, content: bytes) -> TrainRecipe:
    """The recipe that a run's folder holds. Raises RunError."""
    try:
        return TrainRecipe.model_validate_json(content)
    except ValidationError as error:
        raise RunError(f"{out}: no training run of `sdd train` ({first_line(error)})") from None


def _on_base(recipe: TrainRecipe, net: SubjectNet) -> SubjectDiffusionPipeline:
    """With the base and the image encoder that the recipe names."""
    base, clip = model_folder("base", recipe.base), model_folder("image_encoder", recipe.image_encoder)
    return SubjectDiffusionPipeline.from_base(base, clip, net, recipe.examples.reference.background)


def _recipe_of_checkpoint(path: Path) -> TrainRecipe:
    try:
        return TrainRecipe.model_validate(read_record(path)["recipe"])
    except ValidationError as error:
        raise RunError(f"checkpoint {path}: its recipe cannot be read ({first_line(error)})") from None


def _write(pipeline: SubjectDiffusionPipeline, recipe: TrainRecipe, folder: Path) -> None:
    with whole_folder(folder) as partial:
        pipeline.save_pretrained(partial)
        (partial / RECIPE).write_text(recipe.model_dump_json(indent=1))
