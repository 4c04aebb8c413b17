"""The whole-model comparison of `benchmark.py`: prefill of one prompt, patched with MoBA against `attn_implementation="sdpa"`."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import moba_flex

from .measure import Call
from .results import OURS

# Shapes of published models; the weights are random.
MODELS = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


class ModelPrefill:
    """Prefill of one prompt of random tokens: the logits of its last token, and no cache."""

    SYSTEMS = (OURS, "sdpa")
    passes = ("prefill",)
    scale = 1

    def __init__(
        self, name: str, block_size: int, top_k: int, dtype: str, repeats: int, systems: list[str] | None, device: torch.device
    ) -> None:
        self.name, self.repeats, self.device, self.dtype = name, repeats, device, dtype
        self.systems = list(systems or self.SYSTEMS)
        self.blocks = {"block_size": block_size, "top_k": top_k}
        self.model = moba_flex.patch(build(name, getattr(torch, dtype), device), **self.blocks)

    def title(self) -> str:
        return f"{self.name} in shape, prefill of one prompt, block {self.blocks['block_size']}, top-{self.blocks['top_k']}, {self.dtype}"

    def settings(self) -> dict:
        return {"workload": "prefill", "model": self.name, **self.blocks, "dtype": self.dtype, "repeats": self.repeats}

    def growth(self, system: str) -> int:
        return 2 if system == "sdpa" else 1

    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call:
        generator = torch.Generator(self.device).manual_seed(sample)
        prompt = torch.randint(self.model.config.vocab_size, (1, tokens), generator=generator, device=self.device)
        moba_flex.set_attention(self.model, "moba" if system == OURS else "full")

        @torch.inference_mode()
        def prefill() -> None:
            self.model(prompt, use_cache=False, logits_to_keep=1)

        return prefill


def build(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with random weights, made in `dtype` on the device: there is never a copy of them elsewhere."""
    config = LlamaConfig(**MODELS[name], max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
