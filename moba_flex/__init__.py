"""Mixture of Block Attention (arXiv 2502.13189) through PyTorch's FlexAttention, for transformers models."""

from . import compat
from .config import MobaConfig
from .figures import visualize
from .functional import moba_attention, moba_attention_varlen, set_working_memory
from .models import AutoModelForCausalLM, full_attention, patch, set_attention, unpatch
from .selection import Selection, select_blocks
from .tracing import Trace, trace

__all__ = [
    "AutoModelForCausalLM",
    "MobaConfig",
    "Selection",
    "Trace",
    "compat",
    "full_attention",
    "moba_attention",
    "moba_attention_varlen",
    "patch",
    "select_blocks",
    "set_attention",
    "set_working_memory",
    "trace",
    "unpatch",
    "visualize",
]
__version__ = "0.1.0"
