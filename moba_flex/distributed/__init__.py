"""Sequences longer than one process holds: context parallelism for the operation and for models.

`attention` the operation on slices, `collectives` how slices travel, `context_parallel` what a transformers model needs for it. For
generation, `placement` says which process holds which token, `cache` holds them, `decoding` attends to them, and `generation` is what calls
of the model go through. `watch` says which process is missing.
"""

from .attention import moba_attention_cp
from .context_parallel import ContextParallel, context_parallel
from .watch import Watch, watch_processes

__all__ = ["ContextParallel", "Watch", "context_parallel", "moba_attention_cp", "watch_processes"]
