"""The models and runs of `pretrain.py`: randomly initialised Llamas, and the attention of each run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from shared.command_line import UserError
from transformers import LlamaConfig, LlamaForCausalLM

import moba_flex

# Parameter counts with a vocabulary of 8,192 and tied embeddings; heads have 64 channels.
SIZES = {
    "toy": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2},
    "25M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 14, "num_attention_heads": 6, "num_key_value_heads": 2},
    "50M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 4},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15, "num_attention_heads": 12, "num_key_value_heads": 4},
    "150M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 23, "num_attention_heads": 12, "num_key_value_heads": 4},
}
SPARSITY = 4  # a sweep of block sizes reads one block in this many (report, figure 4)


@dataclass(frozen=True)
class Run:
    """The attention of a run: MoBA for the fraction `switch_at` of the steps, then full attention."""

    name: str
    switch_at: float = 1.0
    settings: dict = field(default_factory=dict)  # for MobaConfig

    @property
    def full(self) -> bool:
        return self.switch_at == 0


def named(name: str, block_size: int, top_k: int) -> Run:
    """One of `NAMES`, with these blocks."""
    blocks = {"block_size": block_size, "top_k": top_k}
    return {
        "full": Run("full", switch_at=0.0, settings=blocks),
        "moba": Run("moba", settings=blocks),
        "moba-then-full": Run("moba-then-full", switch_at=0.9, settings=blocks),
        "moba-last-3-full": Run("moba-last-3-full", settings={**blocks, "full_attention_layers": (-3, -2, -1)}),
        "moba-conv-3": Run("moba-conv-3", settings={**blocks, "key_conv": 3}),
        "moba-conv-5": Run("moba-conv-5", settings={**blocks, "key_conv": 5}),
        # Controls for the convolution: keys that contain their neighbours may help a model to copy with any attention.
        "full-conv-3": Run("full-conv-3", switch_at=0.0, settings={**blocks, "key_conv": 3}),
        "full-conv-5": Run("full-conv-5", switch_at=0.0, settings={**blocks, "key_conv": 5}),
    }[name]


NAMES = ("full", "moba", "moba-then-full", "moba-last-3-full", "moba-conv-3", "moba-conv-5", "full-conv-3", "full-conv-5")


def complete(settings: dict) -> dict:
    """The settings of a log, with missing newer settings set to the values that they had then, and without settings that have no effect.

    Without windows with facts, the settings of facts and questions have no effect. Newer settings come last.
    """
    later = {"needle_facts": 8, "needle_questions": "end", "needle_share": 0.0, "optimizer": "adamw"}
    whole = {name: x for name, x in settings.items() if name not in later} | {name: settings.get(name, x) for name, x in later.items()}
    if not whole["needle_share"]:
        del whole["needle_facts"], whole["needle_questions"]
    return whole


def of_blocks(n_blocks: int, context: int) -> Run:
    """MoBA with the context cut into `n_blocks` blocks. A query reads the same share of them for any number."""
    if context % n_blocks or n_blocks % SPARSITY:
        raise UserError(f"--blocks must be multiples of {SPARSITY} that divide the context, {context}, but {n_blocks} is not")
    return Run(f"moba-{n_blocks}-blocks", settings={"block_size": context // n_blocks, "top_k": n_blocks // SPARSITY})


def new_model(size: str, vocabulary: int, context: int, run: Run, seed: int, device: torch.device) -> LlamaForCausalLM:
    """A new patched model. Runs of one seed start with equal weights: key convolutions are initialised to zero without random numbers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES[size],
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    return moba_flex.patch(LlamaForCausalLM(config).to(device), **run.settings)
