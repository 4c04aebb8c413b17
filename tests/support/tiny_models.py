"""Small random models of every class that transformers' auto classes know, as far as a configuration can be shrunk by its names alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, LAYERS, MAX_PARAMETERS = 64, 2, 20_000_000
KINDS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "multimodal": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
}
_WIDTH = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "intermediate_size",
    "ffn_dim",
    "moe_intermediate_size",
    "d_ff",
    "n_inner",
)
_WIDTH += ("encoder_ffn_dim", "decoder_ffn_dim", "embedding_size", "shared_expert_intermediate_size", "projection_dim", "out_hidden_size")
_WIDTH += ("ffn_hidden_size", "word_embed_proj_dim", "lru_width", "mlp_hidden_size", "output_hidden_size", "decoder_hidden_size")
_WIDTH += ("dense_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "num_decoder_layers")
_DEPTH += ("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_HEADS += ("encoder_num_attention_heads", "decoder_num_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads")
SMALL = {
    **dict.fromkeys(_WIDTH, 32),
    **dict.fromkeys(_DEPTH, LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_KEY_HEADS, 4),
    **{"vocab_size": VOCABULARY, "head_dim": 8, "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4},
    **{"qk_nope_head_dim": 4, "v_head_dim": 8, "qk_head_dim": 8, "initializer_range": 0.3, "init_std": 0.3, "max_position_embeddings": 256},
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"num_experts_per_token": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8},
    **{"ssm_state_size": 8, "state_size": 8, "image_size": 32, "patch_size": 16, "max_source_positions": 64, "max_target_positions": 256},
    **{"attention_dropout": 0.0, "dropout": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    **{"embd_pdrop": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "layerdrop": 0.0, "decoder_layerdrop": 0.0},
    **{"encoder_layerdrop": 0.0, "num_mel_bins": 16, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    **{"num_kv_shared_layers": 0, "global_head_dim": 8, "num_global_key_value_heads": 4, "max_seq_len": 256},
    **{"num_channels": 3, "scale_embedding": False},
}


@dataclass(frozen=True)
class TinyModel:
    kind: str
    name: str  # transformers' model type

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    def build(self) -> PreTrainedModel:
        """Raises whatever keeps the class from being built small."""
        auto = getattr(transformers, KINDS[self.kind][0])
        config = small(CONFIG_MAPPING[self.name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise MemoryError(f"{self} has {size:,} parameters, however small")
            torch.manual_seed(0)
            model = auto.from_config(small(CONFIG_MAPPING[self.name]))
        for parameter in model.parameters():  # what is drawn narrow: attention would be all but uniform, whatever its mask
            if parameter.dim() > 1 and parameter.std() < 0.2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.float().eval()


@lru_cache
def every_model() -> tuple[TinyModel, ...]:
    """All classes of the auto mappings, each once."""
    found, seen = [], set()
    for kind, (_, mapping) in KINDS.items():
        for name, cls in getattr(modeling_auto, mapping).items():
            if name in CONFIG_MAPPING and str(cls) not in seen:
                seen.add(str(cls))
                found.append(TinyModel(kind, name))
    return tuple(found)


def small(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of few and narrow layers."""
    default = config_class()
    known = {**vars(default), **{name: None for name in default.attribute_map}}
    changes = {name: value for name, value in SMALL.items() if name in known and vars(default).get(name, value) is not None}
    if "qk_rope_head_dim" in changes:
        changes["head_dim"] = changes["qk_rope_head_dim"]
    if "sliding_window" in known:  # all layers have it, or those whose type says so
        changes["sliding_window"] = 8 if "sliding_attention" in (getattr(default, "layer_types", None) or ()) else None
        try:
            config_class(sliding_window=changes["sliding_window"])
        except Exception:  # it must be a number
            changes["sliding_window"] = 8
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = small(type(value))
        elif name.endswith("token_id") and isinstance(value, int):
            changes[name] = min(value, 2)
        elif name == "layer_types" and isinstance(value, (list, tuple)) and value:
            kinds = sorted(set(value), key=lambda kind: kind != "full_attention")
            changes[name] = [kinds[-1], kinds[0]] if "num_hidden_layers" in changes else list(value)
        elif name in ("mlp_layer_types", "layers_block_type") and isinstance(value, (list, tuple)):
            changes[name] = list(value)[:LAYERS]
    config = config_class(
        **{name: value for name, value in changes.items() if name not in ("layer_types", "mlp_layer_types")}
        | {name: changes[name] for name in ("layer_types", "mlp_layer_types") if name in changes}
    )
    config.eos_token_id, config.pad_token_id = None, 0
    if isinstance(rope := getattr(config, "rope_parameters", None), dict) and "rope_type" in rope:  # of images' positions
        pairs = int(8 * (rope.get("partial_rotary_factor") or 1)) // 2
        rope["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return config


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What to call a model with, such that its decoder reads `ids`."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "input_features":
        mels = getattr(model.config, "num_mel_bins", 16)
        features = {
            "input_features": torch.randn(len(ids), mels, 2 * getattr(model.config, "max_source_positions", 64), generator=generator)
        }
    elif model.main_input_name == "input_values":
        features = {"input_values": torch.randn(len(ids), 4000, generator=generator)}
    else:
        features = {"input_ids": torch.randint(3, VOCABULARY, (len(ids), 20), generator=generator)}
    return {**features, "decoder_input_ids": ids}
