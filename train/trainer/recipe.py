"""A training recipe: one YAML file that defines a training run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from model.reference_background import ReferenceBackground
from model.settings import SubjectSettings
from subject_diffusion.settings import Settings, leaves
from train.stream.buckets import Buckets
from train.stream.source import Source


class LrFactors(Settings):
    """Learning rates of the parts of the subject net, as shares of `optimizer.lr`. A part of 0 stays as the base has
    it, without gradients, moments or an average."""

    text_encoder: float = Field(1.0, ge=0)
    """The text encoder: 340 of the 582 million parameters on Stable Diffusion 2. Both of Stable Diffusion XL: 818 of
    1,382 million. See `text_encoder_rank`."""
    cross_attention: float = Field(1.0, ge=0)
    """The UNet's keys and values of the text."""
    adapters: float = Field(1.0, ge=0)
    """The gated adapters."""
    subject_tokens: float = Field(1.0, ge=0)
    """The MLP from patches and boxes to the adapters' tokens."""
    image_to_word: float = Field(1.0, ge=0)
    """The MLP from the class embedding to the placeholder's word, one for each text encoder."""
    conv_in: float = Field(1.0, ge=0)
    """The UNet's first convolution, with the location mask."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> LrFactors:
        if not any(factor for _, factor in self):
            raise ValueError("every part is 0, so that nothing would be trained; leave one above it")
        return self


class OptimizerSettings(Settings):
    """AdamW over what the subject model trains."""

    steps: int = Field(ge=1)
    """Updates of the weights, in all."""
    batch_size: int = Field(256, ge=1)
    """Images of one update, of all ranks together. Released code: 96 to 256."""
    lr: float = Field(3e-5, gt=0)
    """Released code: 3e-5."""
    lr_factors: LrFactors = LrFactors()
    text_encoder_rank: int = Field(0, ge=0)
    """Rank of a LoRA in the text encoders' attentions, which is trained in place of its weights and added to them at
    the end; 0: the weights. Stays to a run's end."""
    warmup_steps: int = Field(1000, ge=0)
    """Updates over which the learning rate rises from 0. Released code: 1,000."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the last step. Released code: constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled. Released code: none."""
    moments: Literal["float32", "bfloat16", "float8"] = "float32"
    """How the means of gradient and squared gradient are held. bfloat16: half as large, float8: a quarter, with a scale
    for each row; rounded at random so that small changes add up. A run that goes on may change between float32 and
    bfloat16."""
    clip_norm: float = Field(1.0, gt=0)
    """Norm to which a longer gradient is shortened."""
    ema: float = Field(0.9999, ge=0, lt=1)
    """Decay of the weights' moving average, which is what is saved for sampling; 0: no average. In the first n steps it
    is at most (1 + n) / (10 + n)."""
    min_snr: float = Field(0.0, ge=0)
    """γ of min-SNR weighting (Hang et al. 2023; 5 is usual); 0: every timestep weighs the same."""
    offset_noise: float = Field(0.0, ge=0)
    """Share of a noise that is constant over each channel."""
    exploding: float = Field(20.0, gt=1)
    """A step whose loss is so many times the running mean is skipped, as one with NaN is."""
    most_skipped: int = Field(10, ge=1)
    """Steps skipped in a row after which the run stops."""

    @model_validator(mode="after")
    def _low_rank_is_trained(self) -> OptimizerSettings:
        if self.text_encoder_rank and not self.lr_factors.text_encoder:
            raise ValueError(
                "text_encoder_rank: with lr_factors.text_encoder=0 nothing of it is trained; leave one out"
            )
        return self


class TrainRunSettings(Settings):
    """How the work is placed, and what is kept of it. Nothing here changes what is learned, but for rounding."""

    workers: int = Field(1, ge=1)
    """Processes that train together, one per GPU, placed by Ray Train; 1: in this process, without Ray."""
    max_failures: int = Field(10, ge=0)
    """How often the run goes on from its last checkpoint by itself when one of several workers, or its node, dies."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one; a cluster that has none is refused."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; default: PyTorch's choice, one per core. Where other processes want
    the same cores, small models are up to ten times faster with 1."""
    micro_batch: int = Field(8, ge=1)
    """Images that a process takes at once; batch_size is reached by accumulating gradients."""
    ema_on_cpu: bool = False
    """Keep the weights' moving average in main memory; each step then copies the weights there."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast, and the base's UNet, VAE and CLIP in bfloat16. The subject net stays float32, with parts of
    it that are not trained, since the pipeline at the end holds them as they are here."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share: each has everything; or FSDP2, where weights, gradients, optimizer and averages are
    split, gradients after the last micro-batch of a step: until then, where it has several, each process has whole
    ones."""
    compile: bool = False
    """torch.compile of the whole step's model, and of the frozen encoders."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them."""
    cached_latents: bool = False
    """Read the latents that `sdd cache` has computed of all `examples.crops`, in place of encoding images."""
    cached_references: bool = False
    """Read what `sdd cache` has computed of all `examples.reference.draws`, in place of encoding references."""
    loader_workers: int = Field(2, ge=0)
    """Processes that read and decode, for each process that trains."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of the log."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept; older ones are removed."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases too; TensorBoard always."""

    @model_validator(mode="after")
    def _average_is_split_or_on_the_cpu(self) -> TrainRunSettings:
        if self.ema_on_cpu and self.strategy == "fsdp":
            raise ValueError(
                "ema_on_cpu: with strategy=fsdp the average is split among the GPUs; leave one of them out"
            )
        return self


class GuidanceSettings(Settings):
    """How the base's scheduler and guidance are used in sampling."""

    num_inference_steps: int = Field(30, ge=1)
    """Steps of the base's scheduler."""
    guidance_scale: float = Field(5.0, ge=1)
    """Text guidance. Paper: 7.5 or 5."""
    subject_guidance_scale: float = Field(2.5, ge=1)
    """Subject guidance. Paper: 1.5 or 2.5."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share by which guidance's contrast is brought back to the unguided one's (Lin et al. 2024: 0.7), for bases whose
    schedule ends in pure noise."""

    def sampling(self) -> dict[str, Any]:
        """Arguments of SubjectDiffusionPipeline; the base's pipeline knows no `subject_guidance_scale`."""
        return self.model_dump(include=set(GuidanceSettings.model_fields))


class ValidationSettings(GuidanceSettings):
    """A grid of pictures, reference | boxes | sample, drawn with the averaged weights."""

    path: str | None = None
    """Dataset whose first images give references, boxes and prompts; default: the first source."""
    every: int = Field(1000, ge=1)
    """Steps between two grids; the last step has one, too."""
    images: int = Field(8, ge=1)
    """Rows of the grid."""


class ReferenceSettings(Settings):
    """How a reference is made of its subject. Where subject and reference come from one image, a plain copy would be
    rewarded; what is drawn here counters it. Defaults: released code, but for the background."""

    background: ReferenceBackground = "white"
    """What is behind the subject. Released code: photo in training and white in sampling, a mismatch."""
    photos: str | None = None
    """Folder of pictures for `background: photo`."""
    scale: tuple[float, float] = (0.6, 1.0)
    """Least and greatest share of the canvas that the subject's longer side takes."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirror image."""
    rotation_degrees: float = Field(10.0, ge=0, le=180)
    """Turned by up to so much, either way."""
    perspective: float = Field(0.1, ge=0, lt=0.5)
    """Corners move inwards by up to this share of the side."""
    draws: int | None = Field(None, ge=1)
    """How many references each subject has, drawn once for all runs and cut from the whole stored image; `sdd cache`
    can encode these beforehand. Default: anew each time that it comes, cut from what is learned."""
    cross_image: float = Field(1.0, ge=0, le=1)
    """Probability that the reference is cut from another image of the same subject, where the dataset's
    `identities.parquet` (key, entity, identity) tells of one; the paper's data has none."""


class ExampleSettings(Settings):
    """What is cut from a sample."""

    size_px: int = Field(512, ge=8)
    """Side of the square that is learned; with `buckets`, of validation alone."""
    buckets: Buckets | None = None
    """Shapes to cut images to in place of the square, so that less is cut off; each step learns from images of one
    shape."""
    crops: int | None = Field(None, ge=1)
    """In how many ways each image is cut, drawn once for all runs; `sdd cache` can encode these beforehand. Default:
    anew each time that it comes."""
    min_visible: float = Field(0.5, gt=0, le=1)
    """Share of a subject's box that must lie in what is cut out."""
    drop_subjects: float = Field(0.0, ge=0, le=1)
    """How often only some of an image's subjects get a reference, any number from one on. The caption names the others
    all the same, so that the model goes on drawing what has none. With `crops`, drawn once for each of these, too."""
    reference: ReferenceSettings = ReferenceSettings()


class TrainRecipe(Settings):
    """Everything about a training run. What is left out has the default given here."""

    sources: tuple[Source, ...] = ()
    """Datasets to learn from: path, and weight or epochs, and keep, a filter. `--data` stands in for their paths, with
    the first one's filter."""
    window: int = Field(8, ge=1)
    """Shards within which samples are shuffled."""
    base: str
    """A Stable Diffusion 1.x, 2.x or XL: a folder, a bucket (s3://, gs://), or a model of the hub, which each node
    fetches once."""
    image_encoder: str
    """The CLIP that sees the references; likewise."""
    init_from: str | None = None
    """Start from what another run has learned, with a fresh optimizer: its folder, one of its checkpoints, or a
    pipeline's folder."""
    seed: int = Field(0, ge=0)
    """Seed of the order, of every random draw, and of what is initialized."""
    model: SubjectSettings = SubjectSettings()
    examples: ExampleSettings = ExampleSettings()
    optimizer: OptimizerSettings
    run: TrainRunSettings = TrainRunSettings()
    validation: ValidationSettings = ValidationSettings()

    @model_validator(mode="after")
    def _batch_is_whole(self) -> TrainRecipe:
        share = self.run.workers * self.run.micro_batch
        if self.optimizer.batch_size % share:
            raise ValueError(
                f"optimizer.batch_size {self.optimizer.batch_size} is no multiple of run.workers × run.micro_batch "
                f"= {share}"
            )
        return self

    @model_validator(mode="after")
    def _what_is_cached_is_drawn_once(self) -> TrainRecipe:
        if self.run.cached_latents and self.examples.crops is None:
            raise ValueError("run.cached_latents: say with examples.crops in how many ways each image is cut, 4 say")
        if self.run.cached_references and self.examples.reference.draws is None:
            raise ValueError(
                "run.cached_references: say with examples.reference.draws how many references each subject has, 4 say"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that a run keeps to its end, dotted key to value. Data, base and image encoder stay as well, but
        may lie elsewhere: they are known by what they hold."""
        photos = {"reference": {"photos": True}}
        kept = self.model_dump(
            mode="json",
            include={"window", "seed", "model", "examples"},
            exclude={"examples": photos},
        )
        return dict(leaves(kept)) | {
            "optimizer.ema": "an average" if self.optimizer.ema else "none",
            "optimizer.moments": "float8" if self.optimizer.moments == "float8" else "float32 or bfloat16",
            "optimizer.text_encoder_rank": self.optimizer.text_encoder_rank,
        }

    def learned(self) -> dict[str, Any]:
        """The settings that decide what is learned, dotted key to value as in JSON."""
        tree = self.model_dump(mode="json", exclude={"run", "validation"})
        return dict(leaves(tree)) | {"sources": [_with_share(source) for source in self.sources]}


def _with_share(source: Source) -> str:
    """The path, and weight or epochs where they are said."""
    if source.weight is not None:
        return f"{source.path} (weight {source.weight:g})"
    return source.path if source.epochs == 1 else f"{source.path} ({source.epochs:g} epochs)"
