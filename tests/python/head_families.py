"""Tiny classifiers of `transformers`, built by hand with random weights, and where their source has the head.

The paths say what "the last, innermost module with parameters that makes the logits" is. Two heads that are
averaged (``...WithTeacher``, SwiftFormer): the one that runs last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BATCH, CLASSES, TOKENS = 3, 5, 8

_TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_SPECIAL, "num_key_value_heads": 1}
_GPT: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    **_SPECIAL,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    **_SPECIAL,
    "decoder_start_token_id": 2,
}
_LATENTS: dict[str, Any] = {
    "num_latents": 4,
    "d_latents": 16,
    "d_model": 16,
    "num_blocks": 1,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
}
_WINDOWS: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
}
_STAGES: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [8, 16]}
_PATCHED: dict[str, Any] = {
    **_STAGES,
    "num_encoder_blocks": 2,
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
_LEVIT: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [8, 16, 16],
    "num_attention_heads": [1, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
}
_SPEECH: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "feat_extract_norm": "layer",
}
_PAIR: dict[str, Any] = {
    "vision_config": _IMAGE,
    "text_config": {**_TEXT, "vocab_size": 10},
}


@dataclass(frozen=True)
class Family:
    """One configuration.

    Attributes:
        name: Class of the model in `transformers`.
        head: Path of its head.
        sample_shape: Shape of the features of one sample.
        options: Of its configuration.
        takes: Name of its input.
        size: Shape of one sample of its input; integers for names with ``ids``.
    """

    name: str
    head: str
    sample_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    takes: str = "input_ids"
    size: tuple[int, ...] = (TOKENS,)

    def build(self) -> torch.nn.Module:
        """The model, in train mode."""
        import transformers

        made = getattr(transformers, self.name)
        model: torch.nn.Module = made(made.config_class(num_labels=CLASSES, **self.options))
        return model.train()

    def batch(self) -> dict[str, torch.Tensor]:
        """Its keyword arguments for one call."""
        if "ids" in self.takes or self.size == (TOKENS,):
            ids = torch.randint(3, 19, (BATCH, *self.size))
            ids[:, -1] = _SPECIAL["eos_token_id"]
            return {self.takes: ids}
        return {self.takes: torch.randn(BATCH, *self.size)}


def _text(name: str, head: str, options: dict[str, Any] | None = None, **more: Any) -> Family:
    """A head that sees one vector of 16 a sample."""
    return Family(f"{name}ForSequenceClassification", head, (16,), {**(options or _TEXT), **more})


def _tokens(name: str, options: dict[str, Any] | None = None, head: str = "score", **more: Any) -> Family:
    """A head that sees every token; its logits are picked or pooled afterwards."""
    shape = (TOKENS, 16)
    return Family(f"{name}ForSequenceClassification", head, shape, {**(options or _DECODER), **more})


def _image(
    name: str,
    options: dict[str, Any],
    head: str = "classifier",
    size: int = 16,
    features: int = 16,
    **more: Any,
) -> Family:
    full = name if "Image" in name else f"{name}ForImageClassification"
    return Family(full, head, (features,), {**options, **more}, "pixel_values", (3, size, size))


def _speech(name: str, **more: Any) -> Family:
    full = f"{name}ForSequenceClassification"
    return Family(full, "classifier", (8,), {**_SPEECH, **more}, "input_values", (400,))


FAMILIES = [
    _text("Bert", "classifier"),
    _text("Roberta", "classifier.out_proj"),
    _text("XLMRoberta", "classifier.out_proj"),
    _text("Camembert", "classifier.out_proj"),
    _text(
        "DistilBert",
        "classifier",
        {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 20},
        max_position_embeddings=40,
    ),
    _text("Albert", "classifier", embedding_size=8, num_hidden_layers=3),
    _text("Electra", "classifier.out_proj", embedding_size=8),
    _text("Deberta", "classifier", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _text("DebertaV2", "classifier", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _text("MPNet", "classifier.out_proj"),
    _text("ConvBert", "classifier.out_proj", embedding_size=8, conv_kernel_size=3, head_ratio=1),
    _text(
        "SqueezeBert",
        "classifier",
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
    ),
    _text("MobileBert", "classifier", embedding_size=8, intra_bottleneck_size=8, num_feedforward_networks=2),
    _text(
        "Nystromformer", "classifier.out_proj", num_landmarks=4, segment_means_seq_len=8, conv_kernel_size=3
    ),
    _text("FNet", "classifier"),
    _text(
        "Funnel",
        "classifier.linear_out",
        {"vocab_size": 40, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 20},
    ),
    _text("Longformer", "classifier.out_proj", attention_window=4),
    _text("BigBird", "classifier.out_proj", attention_type="original_full"),
    _text(
        "Reformer",
        "classifier.out_proj",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "attention_head_size": 8,
            "num_attention_heads": 2,
            "attn_layers": ["local", "local"],
            "axial_pos_shape": [4, 2],
            "axial_pos_embds_dim": [8, 8],
            "feed_forward_size": 20,
            "local_attn_chunk_length": 4,
        },
    ),
    _text("ModernBert", "classifier", **_SPECIAL, cls_token_id=1, sep_token_id=2),
    _tokens(
        "EuroBert", head="classifier", mask_token_id=3, classifier_pooling="late", head_dim=8
    ),  # makes logits of every token, then their mean
    _text(
        "XLNet", "logits_proj", {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 20}
    ),
    _text("XLM", "sequence_summary.summary", {"vocab_size": 40, "emb_dim": 16, "n_layers": 1, "n_heads": 2}),
    _text(
        "T5",
        "classification_head.out_proj",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2},
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
    _text("Bart", "classification_head.out_proj", _SEQ2SEQ, max_position_embeddings=40),
    _tokens("GPT2", _GPT),
    _tokens("OpenAIGPT", {**_GPT, "bos_token_id": None, "eos_token_id": None}),
    _tokens(
        "GPTNeo",
        {"vocab_size": 40, "hidden_size": 16, "num_layers": 1, "num_heads": 2, **_SPECIAL},
        attention_types=[[["global"], 1]],
        max_position_embeddings=40,
    ),
    _tokens("GPTNeoX"),
    _tokens("GPTJ", _GPT, rotary_dim=4),
    _tokens("OPT", ffn_dim=20, word_embed_proj_dim=16),
    _tokens("Bloom", {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2, **_SPECIAL}),
    _tokens(
        "Falcon",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **_SPECIAL},
    ),
    _tokens("Mpt", {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, **_SPECIAL}),
    _tokens("BioGpt"),
    _tokens("CTRL", _GPT, "classifier", dff=20),
    _tokens("Llama"),
    _tokens("Mistral", head_dim=8),
    _tokens("Mixtral", head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    _tokens("Qwen2"),
    _tokens("Qwen3", head_dim=8),
    _tokens("Gemma", head_dim=8),
    _tokens("Gemma2", head_dim=8),
    _tokens("Phi"),
    _tokens("Phi3"),
    _tokens("StableLm"),
    Family(
        "PerceiverForSequenceClassification",
        "perceiver.decoder.decoder.final_layer",
        (1, 16),
        {**_LATENTS, "vocab_size": 40, "max_position_embeddings": 40},
        "inputs",
    ),
    Family(
        "PerceiverForImageClassificationLearned",
        "perceiver.decoder.decoder.final_layer",
        (1, 16),
        {**_LATENTS, "image_size": 8},
        "inputs",
        (3, 8, 8),
    ),
    Family(
        "ImageGPTForImageClassification",
        "score",
        (16,),
        {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    ),
    _image("ViT", _IMAGE),
    _image("DeiT", _IMAGE),
    _image("DeiTForImageClassificationWithTeacher", _IMAGE, "distillation_classifier"),
    _image("Beit", _IMAGE),
    _image("Dinov2", _IMAGE, features=32),
    _image("Dinov2WithRegisters", _IMAGE, features=32),
    _image("ViTMSN", _IMAGE),
    _image("IJepa", _IMAGE),
    _image(
        "Hiera",
        {"image_size": [32, 32], "patch_size": [4, 4], "patch_stride": [4, 4], "patch_padding": [1, 1]},
        size=32,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        masked_unit_size=[4, 4],
        num_query_pool=1,
    ),
    _image("Swin", _WINDOWS),
    _image("Swinv2", _WINDOWS),
    _image(
        "FocalNet", _STAGES, size=32, image_size=32, embed_dim=8, focal_levels=[1, 1], focal_windows=[3, 3]
    ),
    _image("ConvNext", _STAGES, size=32, num_stages=2),
    _image("ConvNextV2", _STAGES, size=32, num_stages=2),
    _image("ResNet", _STAGES, "classifier.1", 32, embedding_size=8, layer_type="basic"),
    _image("RegNet", _STAGES, "classifier.1", 32, embedding_size=8, groups_width=8),
    _image("Bit", _STAGES, "classifier.1", 32, embedding_size=8, num_groups=1),
    _image(
        "MobileNetV1", {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32}, size=32, features=256
    ),
    _image(
        "MobileNetV2", {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32}, size=32, features=1280
    ),
    _image(
        "MobileViT",
        {"hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16], "image_size": 32},
        size=32,
        num_attention_heads=2,
        mlp_ratio=1.0,
    ),
    _image(
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "image_size": 32},
        size=32,
        features=320,
        kernel_sizes=[3],
        in_channels=[32],
        out_channels=[16],
        depthwise_padding=[],
        strides=[1],
        num_block_repeats=[1],
        expand_ratios=[1],
    ),
    _image("PoolFormer", _PATCHED, size=32, padding=[2, 1]),
    _image("Segformer", _PATCHED, size=32, sr_ratios=[2, 1], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _image("PvtV2", _PATCHED, size=32, sr_ratios=[2, 1], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _image(
        "Pvt",
        {**_PATCHED, "patch_sizes": [4, 2]},
        size=32,
        image_size=32,
        sequence_reduction_ratios=[2, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    _image("Cvt", {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, size=64),
    _image("Levit", _LEVIT, "classifier.linear", 64),
    _image("LevitForImageClassificationWithTeacher", _LEVIT, "classifier_distill.linear", 64),
    _image("SwiftFormer", {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}, "dist_head", 64),
    _image("Siglip", _PAIR),
    _image("CLIP", _PAIR, projection_dim=8),
    _image(
        "HGNetV2",
        {**_STAGES, "embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8]},
        "fc",
        32,
        stage_mid_channels=[8, 8],
        stage_out_channels=[8, 16],
        stage_num_blocks=[1, 1],
        stage_downsample=[False, True],
        stage_light_block=[False, False],
        stage_kernel_size=[3, 3],
        stage_numb_of_layers=[1, 1],
    ),
    _speech("Wav2Vec2"),
    _speech("Hubert"),
    _speech("WavLM"),
    _speech("UniSpeechSat"),
    _speech("SEW", squeeze_factor=2),
    _speech("Wav2Vec2Conformer"),
    _speech("Data2VecAudio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    Family(
        "ASTForAudioClassification",
        "classifier.dense",
        (16,),
        {**_IMAGE, "num_mel_bins": 16, "max_length": 16, "patch_size": 4}
        | {"frequency_stride": 4, "time_stride": 4},
        "input_values",
        (16, 16),
    ),
    Family(
        "WhisperForAudioClassification",
        "classifier",
        (8,),
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "classifier_proj_size": 8},
        "input_features",
        (8, 24),
    ),
]
