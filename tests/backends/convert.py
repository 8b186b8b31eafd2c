"""Weights of transformers' ports under the names of the original implementations, at any size of model."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from datapipe.backends.grounding_dino import SWIN_T_OGC, build_original, import_original

import_original()
from groundingdino.models.GroundingDINO.backbone import backbone as original_backbone  # noqa: E402
from groundingdino.models.GroundingDINO.backbone.swin_transformer import SwinTransformer  # noqa: E402


def _stage_norm(stage: re.Match[str]) -> str:
    return f"backbone.0.norm{int(stage[1]) - 1}"


GROUNDING_DINO_NAMES = (
    (r"^model\.backbone\.conv_encoder\.model\.swin\.", "backbone.0."),
    (r"^model\.backbone\.conv_encoder\.model\.hidden_states_norms\.stage(\d)", _stage_norm),
    (r"^backbone\.0\.embeddings\.patch_embeddings\.projection", "backbone.0.patch_embed.proj"),
    (r"^backbone\.0\.embeddings\.norm", "backbone.0.patch_embed.norm"),
    (r"^backbone\.0\.encoder\.layers", "backbone.0.layers"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.relative_position_bias\.relative_position_bias_table", "attn.relative_position_bias_table"),
    (r"(backbone.*)\.attention\.(q|k|v)_proj\.", r"\1.attn.qkv.\2."),
    (r"(backbone.*)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"^model\.text_backbone\.", "bert."),
    (r"^model\.text_projection", "feat_map"),
    (r"^model\.input_proj_vision", "input_proj"),
    (r"^model\.level_embed", "transformer.level_embed"),
    (r"^model\.query_position_embeddings", "transformer.tgt_embed"),
    (r"^model\.(enc_output|enc_output_norm)\.", r"transformer.\1."),
    (r"^model\.encoder_output_bbox_embed", "transformer.enc_out_bbox_embed"),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.self_attn_layer_norm", r"transformer.encoder.layers.\1.norm1"),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.final_layer_norm", r"transformer.encoder.layers.\1.norm2"),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.fc(\d)", r"transformer.encoder.layers.\1.linear\2"),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.", r"transformer.encoder.layers.\1."),
    (r"text_enhancer_layer\.layer_norm_before", "text_enhancer_layer.norm1"),
    (r"text_enhancer_layer\.layer_norm_after", "text_enhancer_layer.norm2"),
    (r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer\.fc(\d)", r"transformer.encoder.text_layers.\1.linear\2"),
    (r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer\.", r"transformer.encoder.text_layers.\1."),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.vision_param", r"transformer.encoder.fusion_layers.\1.gamma_v"),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.text_param", r"transformer.encoder.fusion_layers.\1.gamma_l"),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.", r"transformer.encoder.fusion_layers.\1."),
    (r"(fusion_layers.*)vision", r"\1v"),
    (r"(fusion_layers.*)text", r"\1l"),
    (r"^model\.decoder\.layer_norm", "transformer.decoder.norm"),
    (r"^model\.decoder\.reference_points_head", "transformer.decoder.ref_point_head"),
    (r"^model\.decoder\.bbox_embed", "transformer.decoder.bbox_embed"),
    (r"^model\.decoder\.layers\.(\d+)\.self_attn_layer_norm", r"transformer.decoder.layers.\1.norm2"),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn_text_layer_norm", r"transformer.decoder.layers.\1.catext_norm"),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm", r"transformer.decoder.layers.\1.norm1"),
    (r"^model\.decoder\.layers\.(\d+)\.final_layer_norm", r"transformer.decoder.layers.\1.norm3"),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn_text\.", r"transformer.decoder.layers.\1.ca_text."),
    (r"^model\.decoder\.layers\.(\d+)\.encoder_attn\.", r"transformer.decoder.layers.\1.cross_attn."),
    (r"^model\.decoder\.layers\.(\d+)\.fc(\d)", r"transformer.decoder.layers.\1.linear\2"),
    (r"^model\.decoder\.layers\.(\d+)\.", r"transformer.decoder.layers.\1."),
    (r"\.(self_attn|ca_text)\.(query|key|value)\.(weight|bias)$", r".\1.in_proj_\3.\2"),
)


def grounding_dino_state(port: Any) -> dict[str, torch.Tensor]:
    """State of a `GroundingDinoForObjectDetection` for groundingdino-py's model."""
    state: dict[str, torch.Tensor] = {}
    stacked: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in port.state_dict().items():
        for pattern, replacement in GROUNDING_DINO_NAMES:
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*\.qkv)\.([qkv])\.(weight|bias)", name):
            stacked.setdefault(f"{match[1]}.{match[3]}", {})["qkv".index(match[2])] = tensor
        elif match := re.fullmatch(r"(.*\.in_proj_(?:weight|bias))\.(query|key|value)", name):
            stacked.setdefault(match[1], {})[("query", "key", "value").index(match[2])] = tensor
        else:
            state[name] = tensor
    return state | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in stacked.items()}


def original_grounding_dino(port: Any, text_encoder: str, monkeypatch: Any) -> Any:
    """groundingdino-py's model with the sizes and weights of a transformers one. `text_encoder`: folder of its BERT."""
    config, swin = port.config, port.config.backbone_config

    def build_swin(_: str, pretrain_img_size: int, **options: Any) -> Any:
        return SwinTransformer(
            pretrain_img_size=pretrain_img_size,
            patch_size=swin.patch_size,
            embed_dim=swin.embed_dim,
            depths=list(swin.depths),
            num_heads=list(swin.num_heads),
            window_size=swin.window_size,
            mlp_ratio=swin.mlp_ratio,
            **options,
        )

    monkeypatch.setattr(original_backbone, "build_swin_transformer", build_swin)
    model = build_original(
        SWIN_T_OGC
        | {
            "text_encoder_type": text_encoder,
            "enc_layers": config.encoder_layers,
            "dec_layers": config.decoder_layers,
            "dim_feedforward": config.encoder_ffn_dim,
            "hidden_dim": config.d_model,
            "nheads": config.encoder_attention_heads,
            "num_queries": config.num_queries,
            "num_feature_levels": config.num_feature_levels,
            "enc_n_points": config.encoder_n_points,
            "dec_n_points": config.decoder_n_points,
        }
    )
    missing, unexpected = model.load_state_dict(grounding_dino_state(port), strict=False)
    # Computed, unused by both, or named by the port alone for an output that it does not use either.
    assert [name for name in missing if not re.search(r"relative_position_index|bert\.pooler", name)] == []
    assert [name for name in unexpected if not name.startswith("backbone.0.layernorm")] == []
    return model.eval()


SAM_NAMES = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"(image_encoder\.)layers", r"\1blocks"),
    (r"(blocks\.\d+\.)layer_norm(\d)", r"\1norm\2"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"prompt_encoder\.shared_embedding\..*", ""),
    (r"prompt_encoder\.mask_embed\.conv1", "prompt_encoder.mask_downscaling.0"),
    (r"prompt_encoder\.mask_embed\.layer_norm1", "prompt_encoder.mask_downscaling.1"),
    (r"prompt_encoder\.mask_embed\.conv2", "prompt_encoder.mask_downscaling.3"),
    (r"prompt_encoder\.mask_embed\.layer_norm2", "prompt_encoder.mask_downscaling.4"),
    (r"prompt_encoder\.mask_embed\.conv3", "prompt_encoder.mask_downscaling.6"),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(transformer\.layers\.\d+\.)layer_norm(\d)", r"\1norm\2"),
    (r"transformer\.layer_norm_final_attn", "transformer.norm_final_attn"),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_in", r"\1.layers.0"),
    (r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.proj_out", r"\1.layers.2"),
)


def sam_state(port: Any) -> dict[str, torch.Tensor]:
    """State of a `SamModel` for segment_anything's model."""
    state = {}
    for name, tensor in port.state_dict().items():
        middle = re.sub(r"(hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.layers.1.", name)
        for pattern, replacement in SAM_NAMES:
            middle = re.sub(pattern, replacement, middle)
        if middle:
            state[middle] = tensor
    return state


def original_sam(port: Any) -> Sam:
    """segment_anything's model with the sizes and weights of a transformers one."""
    vision, decoder = port.config.vision_config, port.config.mask_decoder_config
    prompt = port.config.prompt_encoder_config
    grid = vision.image_size // vision.patch_size
    model = Sam(
        image_encoder=ImageEncoderViT(
            depth=vision.num_hidden_layers,
            embed_dim=vision.hidden_size,
            img_size=vision.image_size,
            mlp_ratio=vision.mlp_dim / vision.hidden_size,
            norm_layer=partial(torch.nn.LayerNorm, eps=vision.layer_norm_eps),
            num_heads=vision.num_attention_heads,
            patch_size=vision.patch_size,
            qkv_bias=vision.qkv_bias,
            use_rel_pos=vision.use_rel_pos,
            global_attn_indexes=tuple(vision.global_attn_indexes),
            window_size=vision.window_size,
            out_chans=vision.output_channels,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=prompt.hidden_size,
            image_embedding_size=(grid, grid),
            input_image_size=(vision.image_size, vision.image_size),
            mask_in_chans=prompt.mask_input_channels,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=decoder.num_multimask_outputs,
            transformer=TwoWayTransformer(
                depth=decoder.num_hidden_layers,
                embedding_dim=decoder.hidden_size,
                mlp_dim=decoder.mlp_dim,
                num_heads=decoder.num_attention_heads,
            ),
            transformer_dim=decoder.hidden_size,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    )
    model.load_state_dict(sam_state(port))
    return model.eval()
