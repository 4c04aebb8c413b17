"""Adapters for transformers models.

Importing this registers "moba" and "moba_naive" as attention implementations, and enables continuous batching for models that use them.

| file | contents |
|---|---|
| `patch.py` | switching a model's attention to MoBA and back |
| `full_blocks.py` | layers within `full_attention` blocks |
| `loading.py` | loading and patching in one call |
| `adapters.py` | saving and loading the settings with PEFT adapters |
| `sizes.py` | suggested settings per prompt length, and a warning where a model's settings have no effect |
| `attention_function.py` | the function that each layer calls |
| `layer_operation.py` | code shared by all paths of a layer's call |
| `decision.py` | which path a layer's call takes, and why |
| `repeated_call.py` | calls that repeat an earlier layer's decision |
| `layers.py` | which modules are attention layers, and which attention each of them uses |
| `masks.py` | the attention mask of a forward pass, in the form that each layer needs |
| `visible.py` | what queries see, read from a mask request |
| `current_call.py` | what the call of a model says about its tokens, for its masks |
| `call_hooks.py` | hooks that pass extra information to attention functions |
| `recomputation.py` | layers recomputed by gradient checkpointing |
| `by_name.py` | models that were loaded by name and not patched |
| `by_identity.py` | a mapping keyed by configuration objects |
| `block_means.py` | block means stored beside a cache's keys |
| `continuous_batching.py` | continuous batching |
| `paged_cache.py` | the paged cache: keys and block means |
| `paged_batch.py` | the requests of one forward pass, and which tokens read which keys |
| `paged_attention.py` | a layer's call in continuous batching |
| `key_conv.py` | the convolution over keys |
| `state.py` | the state stored on layers and cache layers |
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
