"""Models that take the place of SAM and Grounding DINO: small ones of each architecture, with random weights, answer as
transformers' own classes and post-processing do, in a batch and alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    EdgeTamConfig,
    EdgeTamModel,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam3ImageProcessor,
    Sam3LiteTextModel,
    Sam3Model,
    SamHQConfig,
    SamHQModel,
    SamImageProcessor,
    SwinConfig,
)

from datapipe.backends.grounding_dino import Asking, TransformersGroundingDino
from datapipe.backends.loading import ModelSettings
from datapipe.backends.sam import TransformersSam
from datapipe.backends.sam3 import Sam3
from datapipe.probe import probe_sample
from datapipe.recipe import Recipe
from datapipe.stages.ground import GroundSettings
from datapipe.stages.segment import SegmentSettings
from subject_diffusion.errors import RunError
from tests.backends.test_parity import SCENES, TOLERANCE, shake
from toyworld.pretrain.vocabulary import build_tokenizer
from train.sampling.cutting import Cutter

SIDE = 128
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
PROMPT = {"hidden_size": 32, "image_size": SIDE}


def sam_2() -> Any:
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [SIDE, SIDE]}
    backbone |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128]}
    backbone |= {"num_attention_heads_per_stage": [1, 1, 2, 4], "window_size_per_stage": [4, 4, 4, 4]}
    backbone |= {"global_attention_blocks": [3]}
    vision = {"backbone_config": backbone, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    return Sam2Model(Sam2Config(vision_config=vision, mask_decoder_config=DECODER, prompt_encoder_config=PROMPT))


def edge_tam() -> Any:
    arguments = {"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]}
    backbone = {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_classes": 2, "model_args": arguments}
    vision = {"backbone_config": backbone, "backbone_channel_list": [512, 256, 128, 64], "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    return EdgeTamModel(EdgeTamConfig(vision_config=vision, mask_decoder_config=DECODER, prompt_encoder_config=PROMPT))


def sam_hq() -> Any:
    vision: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE}
    vision |= {"patch_size": 16, "window_size": 4, "global_attn_indexes": [1, 3], "output_channels": 32}
    vision |= {"mlp_dim": 64, "num_pos_feats": 16}
    return SamHQModel(
        SamHQConfig(
            vision_config=vision,
            prompt_encoder_config=PROMPT | {"patch_size": 16},
            mask_decoder_config=DECODER | {"vit_dim": 32},
        )
    )


@pytest.mark.parametrize(
    ("build", "processor"),
    [(sam_2, Sam2ImageProcessor), (edge_tam, Sam2ImageProcessor), (sam_hq, SamImageProcessor)],
    ids=["sam 2", "edge tam", "sam-hq"],
)
def test_a_segmenter_takes_the_place_of_sam(tmp_path: Path, build: Callable[[], Any], processor: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for _ in range(20):
        shake(model)
    model.save_pretrained(tmp_path)
    SegmentSettings(model=str(tmp_path)).check()
    segment = TransformersSam(ModelSettings(model=str(tmp_path)))
    images, boxes = [s.image for s in SCENES], [[p.box for p in s.subjects] for s in SCENES]
    together = segment(images, boxes)
    for scene, prompts, found in zip(SCENES, boxes, together, strict=True):
        assert [s.mask.size for s in found] == [scene.image.shape[:2]] * len(prompts)
        assert len({s.predicted_iou for s in found}) > 1
        (alone,) = segment([scene.image], [prompts])
        assert [s.predicted_iou for s in alone] == pytest.approx([s.predicted_iou for s in found], abs=2 * TOLERANCE)

    height, width = SCENES[0].image.shape[:2]
    shown_height, shown_width = segment._resized(SCENES[0].image)
    squares = torch.tensor(boxes[0]) * torch.tensor([shown_width / width, shown_height / height] * 2)
    with torch.inference_mode():
        pixels = segment._pixels([SCENES[0].image])
        direct = model(pixel_values=pixels, input_boxes=squares[None].float(), multimask_output=False)
    assert [s.predicted_iou for s in together[0]] == pytest.approx(direct.iou_scores[0, :, 0].tolist(), abs=TOLERANCE)
    options: dict[str, Any] = {}
    if processor is SamImageProcessor:
        options["reshaped_input_sizes"] = [[shown_height, shown_width]]
        options["pad_size"] = {"height": SIDE, "width": SIDE}
    (masks,) = processor().post_process_masks(direct.pred_masks, [[height, width]], **options)
    for ours, theirs in zip(together[0], masks[:, 0].numpy(), strict=True):
        assert (ours.mask.array() != theirs).mean() < 1e-4


@pytest.fixture
def mm_grounding_dino(tmp_path: Path) -> Path:
    """The architecture of MM-Grounding-DINO, which LLMDet shares, with a tokenizer of whole words."""
    torch.manual_seed(0)
    bert = {"vocab_size": 1100, "hidden_size": 32, "intermediate_size": 64}
    bert |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    swin = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4, "image_size": SIDE}
    model = MMGroundingDinoForObjectDetection(
        MMGroundingDinoConfig(
            backbone_config=SwinConfig(out_indices=[1, 2, 3], drop_path_rate=0.0, **swin),
            text_config=bert,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_feature_levels=4,
            num_queries=30,
            disable_custom_kernels=True,
        )
    )
    for _ in range(5):
        shake(model)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_mm_grounding_dino_takes_the_place_of_grounding_dino(mm_grounding_dino: Path) -> None:
    GroundSettings(model=str(mm_grounding_dino)).check()
    asking = Asking(SIDE, 256, pad_multiple=1, separator="period", floor=0.0, most=30)
    detect = TransformersGroundingDino(ModelSettings(model=str(mm_grounding_dino)), asking)
    images, phrases = [SCENES[1].image] * 2, [["mug", "fish"], ["dragon"]]
    together = detect(images, phrases)
    for image, words, found in zip(images, phrases, together, strict=True):
        (alone,) = detect([image], [words])
        assert [d.score for d in alone.detections] == pytest.approx([d.score for d in found.detections], abs=TOLERANCE)

    model = MMGroundingDinoForObjectDetection.from_pretrained(mm_grounding_dino).eval()
    whole = GroundingDinoProcessor(
        GroundingDinoImageProcessor(size={"shortest_edge": SIDE, "longest_edge": 256}, do_pad=False),
        AutoTokenizer.from_pretrained(mm_grounding_dino),
    )
    inputs = whole(images=images[0], text="mug . fish .", return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    (theirs,) = whole.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[images[0].shape[:2]]
    )
    # The processor's score may be that of a separator, ours never is.
    is_word = ~torch.isin(inputs.input_ids[0], torch.tensor([101, 102, 1012, 1029]))
    scores = outputs.logits[0].sigmoid()[:, : len(is_word)][:, is_word].amax(dim=1)
    assert (scores <= theirs["scores"]).all()
    ours = together[0].detections
    assert [d.score for d in ours] == pytest.approx(sorted(scores.tolist(), reverse=True)[: len(ours)], abs=TOLERANCE)
    boxes = theirs["boxes"].clamp(min=0, max=SIDE)
    for one in ours:
        of_this_score = boxes[(scores - one.score).abs() < TOLERANCE]
        assert (of_this_score - torch.tensor(one.box)).abs().amax(dim=1).min() < 0.02


@pytest.fixture(params=[Sam3Model, Sam3LiteTextModel], ids=["sam 3", "lite text"])
def sam_3(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """SAM 3, or its variant with MobileCLIP's text encoder."""
    torch.manual_seed(0)
    vit: dict[str, Any] = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vit |= {"image_size": 112, "patch_size": 14, "window_size": 4, "pretrain_image_size": 56}
    vision = {"backbone_config": vit | {"global_attn_indexes": [1]}, "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    part = {"hidden_size": 32, "num_attention_heads": 2}
    layers = part | {"num_layers": 1, "intermediate_size": 64}
    text = {"vocab_size": 1100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "projection_dim": 32, "max_position_embeddings": 32}
    model = request.param(
        request.param.config_class(
            vision_config=vision,
            text_config=text,
            geometry_encoder_config=layers,
            detr_encoder_config=layers,
            detr_decoder_config=layers | {"num_queries": 10},
            mask_decoder_config=part,
        )
    )
    for _ in range(20):
        shake(model)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_sam_3_gives_boxes_and_masks_in_one(sam_3: Path) -> None:
    GroundSettings(backend="sam3", model=str(sam_3)).check()
    find = Sam3(ModelSettings(model=str(sam_3)), floor=0.0, most=100)
    image = SCENES[0].image
    phrases = [["mug", "fish"], ["dragon"], []]
    together = find([image] * 3, phrases)
    assert together[2].detections == ()
    for words, found in zip(phrases, together, strict=True):
        (alone,) = find([image], [words])
        assert [d.score for d in alone.detections] == pytest.approx([d.score for d in found.detections], abs=TOLERANCE)

    model = type(find._model).from_pretrained(sam_3).eval()
    processor = Sam3ImageProcessor(size={"height": 112, "width": 112})
    tokenizer = AutoTokenizer.from_pretrained(sam_3)
    pixels = find._pixels([image])
    # Torchvision's bilinear filter and Pillow's differ by a level here and there.
    assert pixels.numpy() == pytest.approx(processor(images=image, return_tensors="pt").pixel_values.numpy(), abs=0.02)
    for i, word in enumerate(phrases[0]):
        text = tokenizer(word, padding="max_length", max_length=32, return_tensors="pt")
        with torch.inference_mode():
            out = model(pixel_values=pixels, input_ids=text.input_ids, attention_mask=text.attention_mask)
        (theirs,) = processor.post_process_instance_segmentation(out, 0.0, 0.5, [image.shape[:2]])
        ours = [d for d in together[0].detections if d.phrase == i]
        assert len(ours) == len(theirs["scores"]) == 10
        order = theirs["scores"].argsort(descending=True).tolist()
        assert [d.score for d in ours] == pytest.approx([float(theirs["scores"][j]) for j in order], abs=TOLERANCE)
        boxes = theirs["boxes"].clamp(min=0)
        for one in ours:
            like = (theirs["scores"] - one.score).abs() < TOLERANCE
            assert (boxes[like] - torch.tensor(one.box)).abs().amax(dim=1).min() < 0.02
            assert one.segment is not None
            differ = theirs["masks"][like].bool().numpy() != one.segment.mask.array()
            assert differ.mean(axis=(1, 2)).min() < 1e-3


def test_a_phrase_too_long_for_sam_3_is_left_out_alone(sam_3: Path) -> None:
    find = Sam3(ModelSettings(model=str(sam_3)), floor=0.0, most=100)
    (found,) = find([SCENES[0].image], [["mug", "mug " * 40, "fish"]])
    assert found.left_out == (1,)
    assert {d.phrase for d in found.detections} == {0, 2}


def test_sam_3_takes_the_place_of_both_stages(sam_3: Path) -> None:
    blocks = {"ground": {"backend": "sam3", "model": str(sam_3), "floor": 0.0}, "segment": {"backend": "grounded"}}
    recipe = Recipe.model_validate(blocks)
    sample = probe_sample()
    for stage in (recipe.ground.build(), recipe.segment.build()):
        (sample,) = stage([sample])
    assert sample.candidates
    for candidate in sample.candidates:
        assert candidate.mask is not None and candidate.mask.size == (sample.height, sample.width)
        assert candidate.predicted_iou is None and candidate.stability is not None
    with pytest.raises(RunError, match="needs a segmenter of its own"):
        Cutter(recipe)(Image.new("RGB", (64, 64)), "cat", (0.1, 0.1, 0.9, 0.9))
    with pytest.raises(ValueError, match=r"takes the masks of ground\.backend=sam3"):
        Recipe.model_validate({"segment": {"backend": "grounded"}})
