"""Context parallelism, for the operation and for models: sequences that are too long for one process.

| file | contents |
|---|---|
| `attention.py` | the operation on slices of a sequence |
| `collectives.py` | the exchange of slices between processes |
| `context_parallel.py` | context parallelism for a transformers model |
| `generation.py` | calls with a cache, as `generate` makes them |
| `placement.py` | which process holds which cached token |
| `cache.py` | a process's part of the key cache |
| `decoding.py` | attention to a distributed key cache |
| `watch.py` | which process is missing |
"""

from .attention import moba_attention_cp
from .context_parallel import ContextParallel, context_parallel
from .watch import Watch, watch_processes

__all__ = ["ContextParallel", "Watch", "context_parallel", "moba_attention_cp", "watch_processes"]
