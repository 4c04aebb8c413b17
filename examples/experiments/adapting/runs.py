"""The runs of `adapt.py`: the attention of each, and the trained parameters."""

from __future__ import annotations

import argparse
import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from shared.command_line import UserError, config_of_flags, one_line
from shared.models import context_of, extend_context
from torch import Tensor
from transformers import PreTrainedModel

import moba_flex

RUNS = ("full", "moba", "hybrid")
BLOCKS = ("block_size", "top_k", "sink_blocks")
LONGER = ": give --rope-theta, a base of its rotary embedding that is larger than its own, to train it for more"


def fit_context(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Let the model read sequences of `--sequence-length` tokens."""
    context = context_of(model)
    if args.rope_theta is not None:
        with one_line("--rope-theta cannot be used"):
            extend_context(model, args.rope_theta, max(context, args.sequence_length))
    elif args.sequence_length > context:
        raise UserError(f"--sequence-length is {args.sequence_length:,}, but the model's context is {context:,} tokens{LONGER}")


def attend(model, name: str, args: argparse.Namespace):
    """The model with the attention of that run."""
    if name == "full":
        return model
    return moba_flex.patch(model, moba_config(name, args))


def moba_config(name: str, args: argparse.Namespace) -> moba_flex.MobaConfig:
    blocks = {setting: getattr(args, setting) for setting in BLOCKS}
    return config_of_flags({**blocks, "full_attention_layers": args.full_layers if name == "hybrid" else ()})


def new_adapter(base: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """A copy of the model whose linear layers have low-rank updates, initialised to zero. Only these have gradients."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config)


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights(model) -> dict[str, Tensor]:
    """The adapter's weights."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)
