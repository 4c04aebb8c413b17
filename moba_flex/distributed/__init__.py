"""Sequences longer than one process holds: context parallelism for the operation and for models.

`attention` the operation on slices, `collectives` how slices travel, `context_parallel` what a transformers model needs for it.
"""

from .attention import moba_attention_cp
from .context_parallel import ContextParallel, context_parallel

__all__ = ["ContextParallel", "context_parallel", "moba_attention_cp"]
