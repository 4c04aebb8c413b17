"""Adapters for transformers models. Importing this registers "moba" and "moba_naive" as attention implementations.

| file | what it holds |
|---|---|
| `patch.py` | switching a model's attention to MoBA and back |
| `loading.py` | loading and patching in one call |
| `adapters.py` | the settings beside PEFT's adapters |
| `sizes.py` | which settings suit a length, and a warning where those of a model do nothing |
| `attention_function.py` | the function that each layer calls |
| `decision.py` | what a layer's call does, and why |
| `layers.py` | which modules are attention layers, and what each of them uses |
| `masks.py` | what a forward pass says about who may see whom |
| `call_hooks.py` | what attention functions get to know beyond what transformers tells them |
| `recomputation.py` | layers that gradient checkpoints compute again |
| `by_name.py` | models that were loaded by name and not patched |
| `by_identity.py` | what is known of configurations |
| `block_means.py` | the means of key blocks, beside a cache's keys |
| `key_conv.py` | the convolution of keys |
| `state.py` | what is kept on a model's layers and on a cache's |
| `schedule.py` | MoBA and full attention in one training run |
| `upstream.py` | private API of transformers |
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention_function import ATTENTION_FUNCTIONS
from .loading import AutoModelForCausalLM
from .masks import moba_mask
from .patch import full_attention, patch, set_attention, unpatch

for _name, _function in ATTENTION_FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, moba_mask)

__all__ = ["AutoModelForCausalLM", "full_attention", "patch", "set_attention", "unpatch"]
