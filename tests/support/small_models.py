"""Small random models of the classes that transformers has for text: which there are, a configuration of each, and what to call them with.

A configuration is that of its class with every known size set to a small one, and its parts (text, vision, audio) likewise. Where a class
wants sizes that go together otherwise, a few variants are tried.

Weights are drawn wide: attention of weights as small as the default is all but uniform, whatever its mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, TOKENS = 64, 40
MOST_WEIGHTS = 20_000_000
MAPPINGS = {  # transformers' lists of classes; one class may be in several
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "multimodal": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}

LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth"),
    *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "n_enc_layers", "num_encoder_layers"),
)
WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "embedding_size", "word_embed_proj_dim", "out_hidden_size", "d_embed"),
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "inner_dim"),
    *("mlp_hidden_size", "dense_intermediate_size", "shared_intermediate_size", "lru_width", "intermediate_size_mlp", "block_ff_dim"),
    *("block_dim", "mamba_d_ssm", "projection_dim", "attention_hidden_size"),
)
HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads", "mamba_n_heads", "mamba_num_heads"),
)
KEY_HEADS = ("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads", "num_kv_heads", "n_kv_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "activation_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "dropout_rate"),
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(KEY_HEADS, 2),
    **dict.fromkeys(EXPERTS, 4),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "kv_channels": 8,
    "attention_head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_target_positions": 256,
    "max_source_positions": 64,
    "original_max_position_embeddings": 256,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "num_mel_bins": 8,
    "patch_size": 4,
    "image_size": 16,
    "num_nextn_predict_layers": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 8,
    "attention_window_size": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "query_pre_attn_scalar": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    dict.fromkeys(KEY_HEADS, 4),
    {"plain_rope": True},
    {"sliding_window": 8},
    {"head_dim": 4, **dict.fromkeys(KEY_HEADS, 4)},
    {**dict.fromkeys(KEY_HEADS, 4), "head_dim": 8, "rotary_dim": 4},
    {**dict.fromkeys(WIDTHS, 64), **dict.fromkeys(KEY_HEADS, 4), "head_dim": 16, "num_experts_per_tok": 1},
)
_HEAD_DIM = {"head_dim": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
OWN: dict[str, dict[str, Any]] = {  # what configurations want by themselves, by their class
    **dict.fromkeys(("HunYuanDenseV1Config", "HunYuanMoEV1Config", "MinistralConfig", "HunYuanVLTextConfig"), _HEAD_DIM),
    **dict.fromkeys(("Qwen2VLTextConfig", "Qwen2_5_VLTextConfig", "Qwen2_5OmniTextConfig", "PaddleOCRTextConfig"), _MROPE),
    **dict.fromkeys(("Glm4vTextConfig", "Glm4vMoeTextConfig", "GlmOcrTextConfig"), _MROPE),
    "NemotronConfig": {"num_key_value_heads": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 4},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "GPTNeoConfig": {"num_layers": 2, "attention_types": [[["local", "global"], 1]]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "BambaConfig": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MptConfig": {"attn_pdrop": 0},
}
_FULL = ("full_attention", "attention", "hybrid")


class NotBuilt(Exception):
    """No variant gives a small model that runs."""


def names(kinds: tuple[str, ...] = tuple(MAPPINGS)) -> dict[str, tuple[str, str]]:
    """Of every model class its kind and the type of its models, by name within its kind. Loads none of them, which takes ten seconds."""
    found: dict[str, tuple[str, str]] = {}
    for kind in kinds:
        mapping = getattr(modeling_auto, f"{MAPPINGS[kind]}_NAMES", {})
        listed = [(name, of_type) for of_type, x in mapping.items() for name in ([x] if isinstance(x, str) else x)]
        for name, of_type in sorted(listed, key=lambda pair: pair[0]):
            found.setdefault(name, (kind, of_type))
    return found


def loaded(name: str, kind: str, of_type: str) -> tuple[str, type[PreTrainedModel], type[PreTrainedConfig]]:
    """Kind, class and configuration class."""
    model_class = getattr(transformers, name)
    return kind, model_class, getattr(model_class, "config_class", None) or CONFIG_MAPPING[of_type]


def classes() -> Iterator[tuple[str, type[PreTrainedModel], type[PreTrainedConfig]]]:
    """Every model class, loaded."""
    for name, listed in names().items():
        yield loaded(name, *listed)


def small_config(config_class: type[PreTrainedConfig], n_layers: int = 2, **other: Any) -> PreTrainedConfig:
    """A small configuration, with `other` values where the class knows their names. Raises what the class raises."""
    default = config_class()
    known = {*vars(default), *inspect.signature(config_class.__init__).parameters, *getattr(config_class, "attribute_map", {})}
    known -= {name for name, x in inspect.getmembers(config_class) if isinstance(x, property)}
    sizes = {**SIZES, **dict.fromkeys(LAYERS, n_layers), **dict.fromkeys(DROPOUTS, 0.0), **other}
    chosen = {name: value for name, value in sizes.items() if name in known and _value(default, name) is not None}
    chosen |= {name: SIZES[name] for name in ("pad_token_id", "vocab_size") if name in known}
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(part := _value(default, name), PreTrainedConfig):
            chosen[name] = small_config(type(part), n_layers, **other)
    types = _value(default, "layer_types")
    computed = isinstance(getattr(config_class, getattr(config_class, "attribute_map", {}).get("layer_types", ""), None), property)
    if types and "layer_types" in known and not computed:
        chosen["layer_types"] = _layer_types(list(types), n_layers)
    windows = "sliding_window" in other or "sliding_attention" in (types or ())
    if "sliding_window" in chosen and not windows and _allows(config_class, sliding_window=None):
        chosen["sliding_window"] = None  # else all layers have it
    rope = _value(default, "rope_parameters") or {}
    if "mrope_section" in rope:
        chosen["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    elif "rope_type" in rope and other.get("plain_rope"):
        chosen["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return config_class(**chosen | OWN.get(config_class.__name__, {}))


def _allows(config_class: type[PreTrainedConfig], **values: Any) -> bool:
    try:
        config_class(**values)
    except Exception:
        return False
    return True


def _value(config: PreTrainedConfig, name: str) -> Any:
    """None too for what a configuration says of each layer only."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _layer_types(types: list[str], n_layers: int) -> list[str]:
    """As many kinds of layers as fit, one with full attention last."""
    kinds = list(dict.fromkeys(types))
    full = [kind for kind in kinds if kind in _FULL]
    return (([kind for kind in kinds if kind not in full] + full) * n_layers)[-n_layers:]


def small_model(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], attention: str | None = None) -> PreTrainedModel:
    """A model in evaluation mode, of which it is known that it reads 40 tokens. Raises NotBuilt, with the first reason.

    `attention` is the name of its implementation; None: transformers' choice.
    """
    reason = None
    for variant in VARIANTS:
        try:
            config = small_config(config_class, **variant)
            with torch.device("meta"):
                size = sum(x.numel() for x in model_class._from_config(config).parameters())
            if size > MOST_WEIGHTS:
                raise NotBuilt(f"it has {size:,} weights")
            torch.manual_seed(0)
            model = model_class._from_config(config, attn_implementation=attention).eval()
            with torch.no_grad():
                logits = model(**inputs_of(model, tokens())).logits
            if logits.shape[1] != TOKENS or not logits.isfinite().all():
                raise NotBuilt(f"its logits have shape {tuple(logits.shape)}, or are not finite")
            return model
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    raise NotBuilt(" ".join(str(reason).split())[:200])


def tokens(rows: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """What to call a model with, so that `ids [B, N]` is what its decoder reads; `mask [B, N]` is 0 at padding."""
    decoder = model.config.is_encoder_decoder
    prefix = "decoder_" if decoder else ""
    inputs = {f"{prefix}input_ids": ids} | ({} if mask is None else {f"{prefix}attention_mask": mask})
    if mask is not None and not decoder and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if not decoder:
        return inputs
    generator = torch.Generator().manual_seed(2)
    row = {
        "input_features": (getattr(model.config, "num_mel_bins", 8), 2 * getattr(model.config, "max_source_positions", 64)),
        "input_values": (4000,),
    }.get(model.main_input_name)
    if row is None:
        return {"input_ids": tokens(1, 20, seed=3).expand(len(ids), -1), **inputs}
    return {model.main_input_name: torch.randn(1, *row, generator=generator).expand(len(ids), *row), **inputs}
