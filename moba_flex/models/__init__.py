"""Adapters for transformers models. Importing this registers "moba" and "moba_naive" as attention implementations, and lets continuous
batching serve models that use them.

| file | what it holds |
|---|---|
| `patch.py` | switching a model's attention to MoBA and back |
| `loading.py` | loading and patching in one call |
| `adapters.py` | the settings beside PEFT's adapters |
| `sizes.py` | which settings suit a length, and a warning where those of a model do nothing |
| `attention_function.py` | the function that each layer calls |
| `layer_operation.py` | what all paths of a layer's call share |
| `decision.py` | what a layer's call does, and why |
| `layers.py` | which modules are attention layers, and what each of them uses |
| `masks.py` | what a forward pass says about who may see whom |
| `call_hooks.py` | what attention functions get to know beyond what transformers tells them |
| `recomputation.py` | layers that gradient checkpoints compute again |
| `by_name.py` | models that were loaded by name and not patched |
| `by_identity.py` | what is known of configurations |
| `block_means.py` | the means of key blocks, beside a cache's keys |
| `continuous_batching.py` | serving many requests at once |
| `paged_cache.py` | keys and block means of many requests in pages |
| `paged_batch.py` | which tokens of one forward pass read what |
| `paged_attention.py` | a layer's call for many requests |
| `key_conv.py` | the convolution of keys |
| `state.py` | what is kept on a model's layers and on a cache's |
| `schedule.py` | MoBA and full attention in one training run |
| `upstream.py` | private API of transformers |
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention_function import ATTENTION_FUNCTIONS
from .continuous_batching import MobaBatchingManager
from .loading import AutoModelForCausalLM
from .masks import moba_mask
from .patch import full_attention, patch, set_attention, unpatch
from .upstream import use_manager

for _name, _function in ATTENTION_FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, moba_mask)
use_manager(MobaBatchingManager)

__all__ = ["AutoModelForCausalLM", "full_attention", "patch", "set_attention", "unpatch"]
