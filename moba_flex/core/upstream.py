"""Private and undocumented API of PyTorch, each entry with the reason why it is used.

No other file of the package reaches for it. `tests/core/test_upstream.py` fails with a sentence that names the entry when PyTorch
changes it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit  # all that tells a call that was refused from one that failed
from torch._higher_order_ops.flex_attention import flex_attention_backward  # gradients for any log-sum-exp, which autograd cannot ask for
from torch._subclasses.fake_tensor import FakeTensor  # has no values that could be checked

__all__ = [
    "FailOnRecompileLimitHit",
    "FakeTensor",
    "any_number_of_compilations",
    "assert_in_graph",
    "computes_gradients",
    "connection_to_store",
    "copy_all",
    "flex_attention_backward",
    "functorch_transform",
    "has_tangent",
    "is_under_dispatch_mode",
    "is_vmapped",
    "mark_dynamic",
    "mark_static_address",
    "release_broken_pool",
    "version_of",
]


def assert_in_graph(condition: Tensor, message: str) -> None:
    """A check that a traced graph makes of its data, RuntimeError on a CPU; on a GPU the device stops, and nothing is read back."""
    torch._assert_async(condition, message)


def any_number_of_compilations() -> AbstractContextManager[None]:
    """Within it a function is compiled as often as it must be: the limit is one number for a whole process."""
    return torch._dynamo.config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30)


def computes_gradients() -> bool:
    """Whether this thread is within a backward pass, where checkpoints compute forward passes again: they do not say so."""
    return torch._C._current_graph_task_id() != -1


def functorch_transform() -> str | None:
    """The transform of torch.func that is at work, "Grad" or "Vmap" say: a custom operator would be told nothing of it."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key().name


def is_vmapped(x: Tensor) -> bool:
    """Whether torch.func.vmap hides the values of `x`, at any depth: reading them would raise PyTorch's internal errors."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation is at work on a tensor: a custom operator silently drops tangents."""
    if torch.autograd.forward_ad._current_level < 0:  # asked first, since unpacking costs every call time
        return False
    return any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_under_dispatch_mode() -> bool:
    """Whether a dispatch mode is at work, that of fake tensors say: tensors that are made now are for it alone."""
    return bool(torch._C._len_torch_dispatch_stack())


def version_of(x: Tensor) -> int:
    """How often `x`, or what it is a view of, was written to, as autograd counts. Tensors of inference mode have none and raise."""
    return x._version


def mark_dynamic(x: Tensor, dims: int | list[int]) -> None:
    """Tell torch.compile that these dimensions vary. The public `mark_dynamic` raises where a dimension turns out to be constant."""
    torch._dynamo.maybe_mark_dynamic(x, dims)


def mark_static_address(x: Tensor) -> None:
    """Tell CUDA graphs of torch.compile that `x` stays where it is, as transformers does for static caches."""
    torch._dynamo.mark_static_address(x)


def copy_all(into: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each of `sources` into its place, in one launch."""
    torch._foreach_copy_(into, sources)


def connection_to_store() -> dist.Store:
    """To where the processes of a job found each other, apart from the group's own, which may wait for something.

    `init_process_group` made the store, or was given it, and nothing public gives it back; `clone` is documented nowhere.
    """
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def release_broken_pool(device: int, handle: tuple[int, int]) -> None:
    """Take an allocator's pool out of a capture that CUDA has ended: PyTorch stops before it does so itself."""
    torch._C._cuda_endAllocateToPool(device, handle)
    torch._C._cuda_releasePool(device, handle)
