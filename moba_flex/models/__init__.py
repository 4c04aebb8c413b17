"""Adapters for transformers models. Importing this registers "moba" and "moba_naive" as attention implementations.

`layers` which modules take part, `mask` what a forward pass says about visibility, `interface` the function that each
layer calls, `patch` switching models to MoBA and back, `auto` loading them.
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
