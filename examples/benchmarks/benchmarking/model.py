"""The whole-model comparisons of `benchmark.py`: prefill of one prompt and a training step, patched with MoBA against "sdpa"."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import moba_flex

from .measure import Call
from .results import LEFT_OUT, OURS, PACKED, TRAINING, TRITON

SEQUENCES = 8  # of a packed row

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
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
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
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


class _OfModel:
    """The base of both comparisons: a model that is patched for each system, and as it was made for "sdpa", and random tokens."""

    WORKLOAD: ClassVar[str]
    SYSTEMS: ClassVar[tuple[str, ...]]
    MORE: ClassVar[tuple[str, ...]] = ()  # measured only if named
    passes: ClassVar[tuple[str, ...]]
    scale = 1

    def __init__(
        self, name: str, block_size: int, top_k: int, dtype: str, repeats: int, systems: list[str] | None, device: torch.device
    ) -> None:
        self.name, self.repeats, self.device, self.dtype = name, repeats, device, dtype
        self.systems = list(systems or self.SYSTEMS)
        self.blocks = {"block_size": block_size, "top_k": top_k}
        self.model = build(name, getattr(torch, dtype), device)
        self.in_use: str | None = "sdpa"

    def settings(self) -> dict:
        return {"workload": self.WORKLOAD, "model": self.name, **self.blocks, "dtype": self.dtype, "repeats": self.repeats}

    def growth(self, system: str) -> int:
        return 2 if system == "sdpa" else 1

    def prompt(self, tokens: int, sample: int) -> Tensor:
        """`[1, N]` random tokens."""
        generator = torch.Generator(self.device).manual_seed(sample)
        return torch.randint(self.model.config.vocab_size, (1, tokens), generator=generator, device=self.device)

    def use(self, system: str) -> None:
        """Give the model the attention of `system`. It keeps what it has learnt of its calls if it has that attention already."""
        if system == self.in_use:
            return
        self.in_use = None  # if one of the following raises
        moba_flex.unpatch(self.model)
        self.model.set_attn_implementation(LEFT_OUT if system == LEFT_OUT else "sdpa")
        if system not in (LEFT_OUT, "sdpa"):
            moba_flex.patch(self.model, **self.blocks, implementation="triton" if system == TRITON else "auto")
        self.in_use = system


class ModelPrefill(_OfModel):
    """Prefill of one prompt of random tokens: the logits of its last token, without a cache."""

    WORKLOAD = "prefill"
    SYSTEMS = (OURS, "sdpa")
    MORE = (TRITON,)
    passes = ("prefill",)

    def title(self) -> str:
        return f"{self.name} in shape, prefill of one prompt, block {self.blocks['block_size']}, top-{self.blocks['top_k']}, {self.dtype}"

    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call:
        prompt = self.prompt(tokens, sample)
        self.use(system)

        @torch.inference_mode()
        def prefill() -> None:
            self.model(prompt, use_cache=False, logits_to_keep=1)

        return prefill


class ModelTraining(_OfModel):
    """A training step on one row of random tokens: AdamW, with activation checkpointing in each layer.

    The loss is the mean square of the last hidden states: a loss over the vocabulary costs the same with every attention. "no-attention" is
    the step without attention, a lower bound for any attention.
    """

    WORKLOAD = TRAINING
    SYSTEMS = (OURS, PACKED, "sdpa")
    MORE = (TRITON, LEFT_OUT)
    passes = ("training step",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.model.train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.model.parameters(), lr=1e-6, fused=self.device.type == "cuda")

    def title(self) -> str:
        return (
            f"{self.name} in shape, a training step with activation checkpointing and AdamW, without the loss over the vocabulary, "
            f"block {self.blocks['block_size']}, top-{self.blocks['top_k']}, {self.dtype}"
        )

    def call(self, system: str, pass_: str, tokens: int, sample: int) -> Call:
        prompt = self.prompt(tokens, sample)
        self.use(system)
        position = torch.arange(tokens, device=self.device)[None]
        if system == PACKED:
            position = position % -(-tokens // SEQUENCES)

        def step() -> None:
            self.optimizer.zero_grad()
            hidden = self.model.model(prompt, position_ids=position, use_cache=False).last_hidden_state
            hidden.float().square().mean().backward()
            self.optimizer.step()

        return step


def _left_out(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Replaces attention. Uses query, key and value, so that their projections get gradients."""
    return (query + (key + value).repeat_interleave(query.shape[1] // key.shape[1], 1)).transpose(1, 2), None


AttentionInterface.register(LEFT_OUT, _left_out)


def build(name: str, dtype: torch.dtype, device: torch.device, positions: int = 1 << 20) -> PreTrainedModel:
    """The model with random weights, created in `dtype` on the device without a copy elsewhere."""
    config = LlamaConfig(**MODELS[name], max_position_embeddings=positions, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
