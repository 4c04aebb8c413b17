"""Mixture of Block Attention (arXiv 2502.13189) through PyTorch's FlexAttention, for transformers models."""

from .functional import moba_attention, moba_attention_varlen, set_working_memory
from .selection import Selection, select_blocks

__all__ = ["Selection", "moba_attention", "moba_attention_varlen", "select_blocks", "set_working_memory"]
__version__ = "0.1.0"
