"""Adapters for transformers models. Importing this registers "moba" and "moba_naive" as attention implementations.

`layers` which modules take part, `mask` what a forward pass says about visibility, `interface` the function that each
layer calls, `patch` switching models to MoBA and back, `auto` loading them.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .auto import AutoModelForCausalLM
from .interface import moba_attention_forward
from .layers import MOBA
from .mask import moba_mask
from .patch import full_attention, patch, set_attention, unpatch

for _name in MOBA:
    AttentionInterface.register(_name, moba_attention_forward)
    AttentionMaskInterface.register(_name, moba_mask)

__all__ = ["AutoModelForCausalLM", "full_attention", "patch", "set_attention", "unpatch"]
