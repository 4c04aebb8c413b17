"""Small random models of every family that the README lists, and what the tests of models share.

Weights are drawn wide: attention of weights as small as the default is all but uniform, whatever its mask.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

VOCABULARY, TOKENS = 64, 53
HEADLESS_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SIZES = {**HEADLESS_SIZES, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
LATENT_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mixtral": lambda: MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen2": lambda: Qwen2Config(**HEADLESS_SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=16),
    "gemma2": lambda: Gemma2Config(**SIZES, **ALTERNATING, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **ALTERNATING, query_pre_attn_scalar=8),
    "phi3": lambda: Phi3Config(**HEADLESS_SIZES),
    "olmo2": lambda: Olmo2Config(**HEADLESS_SIZES),
    "granite": lambda: GraniteConfig(**HEADLESS_SIZES, attention_multiplier=0.5),
    "cohere2": lambda: Cohere2Config(**SIZES, **ALTERNATING, logit_scale=1.0),
    "smollm3": lambda: SmolLM3Config(**HEADLESS_SIZES, no_rope_layers=[1, 0, 1, 0]),
    "stablelm": lambda: StableLmConfig(**HEADLESS_SIZES),  # its decoder layers pass no extra keyword arguments on
    "starcoder2": lambda: Starcoder2Config(**HEADLESS_SIZES),
    "glm4": lambda: Glm4Config(**SIZES),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **ALTERNATING, **EXPERTS, num_local_experts=4, rope_parameters=YARN),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**HEADLESS_SIZES, "num_key_value_heads": 4}, **EXPERTS, **LATENT, **LATENT_EXPERTS, moe_intermediate_size=16
    ),
}
if hasattr(transformers, "Gemma4TextConfig"):  # its last two layers read the keys of others, and cut the mask to the last queries
    SHARED = {"num_kv_shared_layers": 2, "num_global_key_value_heads": 2, "global_head_dim": 8}
    PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    FAMILIES["gemma4"] = lambda: transformers.Gemma4TextConfig(**SIZES, **ALTERNATING, **SHARED, **PER_LAYER)
HYBRID = ("gemma2", "gemma3", "cohere2", "gpt_oss", "gemma4")  # layers 0 and 2 have sliding windows
_EAGER = ("gemma2", "gpt_oss")  # transformers 5.17 let sdpa leave Gemma 2's soft-capping out; GPT-OSS has no sdpa
SPARSE = {"block_size": 8, "top_k": 2}
ALL_BLOCKS = {"block_size": 8, "top_k": 100, "implementation": "eager"}  # "auto" would call the attention that the model had

each_family = pytest.mark.parametrize("family", FAMILIES)
each_of_four = pytest.mark.parametrize("family", ("llama", "qwen3", "gemma2", "gpt_oss"))  # where all would take too long
hrm_works = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="this version's HRM takes one name of attention alone"
)
each_side = pytest.mark.parametrize("side", ["none", "left", "right"])
each_decode = pytest.mark.parametrize("decode", ["full", "sparse"])


def build(family: str = "llama", attention: str | None = "dense", **settings) -> PreTrainedModel:
    """`attention` "dense": sdpa where it computes what eager does; None: transformers' default. `settings`: of the configuration."""
    torch.manual_seed(0)
    if attention == "dense":
        attention = "eager" if family in _EAGER else "sdpa"
    config = FAMILIES[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tokens(rows: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def padded(side: str, lengths: tuple[int, ...] = (TOKENS, 30)) -> dict[str, Tensor]:
    """Inputs of a batch whose rows have `lengths` real tokens."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = side == "left"
        mask[row, :length] = mask[row, :length] | (side == "right")
    if side == "none":
        return {"input_ids": ids}
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": position_ids}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor] | Tensor, **kwargs) -> Tensor:
    """The logits at real tokens."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    out = model(**inputs, **kwargs).logits
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a training step, of those parameters that get one."""
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


def snapshot(model: PreTrainedModel) -> tuple:
    """Everything that patching may touch."""
    return (
        model.config.to_dict(),
        model.config._attn_implementation,
        [sorted(module.__dict__) for module in model.modules()],
    )


def assert_close(actual: Tensor, expected: Tensor, case: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4, msg=lambda m: f"{case}: {m}")
