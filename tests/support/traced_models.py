"""A small model to trace, and batches for it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # attention of weights as small as the default is all but uniform, whatever it reads
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SPARSE = {"block_size": 4, "top_k": 3, "sink_blocks": 1}
TOKENS = 37


def build(config: type = LlamaConfig, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **changes}), attn_implementation="eager").eval()


def batch(side: str = "none", lengths: tuple[int, ...] = (TOKENS, 22, 1)) -> dict[str, Tensor]:
    """Rows of tokens with `lengths` real ones."""
    ids = torch.randint(2, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    if side == "none":
        return {"input_ids": ids}
    place = torch.arange(max(lengths))
    place = place.flip(0) if side == "left" else place
    mask = (place < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
