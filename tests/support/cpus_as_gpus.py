"""accelerate offers FSDP2 and `ParallelismConfig` on GPUs only. PyTorch has both on CPUs too: for tests, CPUs pass as GPUs."""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def let_cpus_pass_as_gpus() -> None:
    """For the rest of this process."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
