"""Private and undocumented API of PyTorch, with the reason for each use.

No other file of the package uses such API. `tests/core/test_upstream.py` fails with a message that names the entry when PyTorch
changes it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import (
    BackendCompilerFailed,  # a compilation that failed, as one does while a CUDA graph is captured
    FailOnRecompileLimitHit,  # the only way to tell a refused recompilation from a failed call
)
from torch._higher_order_ops.flex_attention import flex_attention_backward  # gradients for any log-sum-exp, which autograd does not offer
from torch._subclasses.fake_tensor import FakeTensor  # has no values to check

from .compiling import constant_in_graphs, outside_graphs

__all__ = [
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",
    "FakeTensor",
    "any_number_of_compilations",
    "assert_in_graph",
    "connection_to_store",
    "copy_all",
    "flex_attention_backward",
    "forward_mode_is_on",
    "functorch_transform",
    "has_storage",
    "has_tangent",
    "in_backward_pass",
    "is_under_dispatch_mode",
    "is_vmapped",
    "mark_dynamic",
    "mark_static_address",
    "modules_being_called",
    "release_broken_pool",
    "version_of",
]


def assert_in_graph(condition: Tensor, message: str) -> None:
    """A check of data within a traced graph: RuntimeError on a CPU, a device-side assertion without synchronization on a GPU."""
    torch._assert_async(condition, message)


def any_number_of_compilations() -> AbstractContextManager[None]:
    """Lifts the recompilation limit within the context: the limit is one number for the whole process."""
    return torch._dynamo.config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30)


def in_backward_pass() -> bool:
    """Whether this thread runs a backward pass. Activation checkpointing recomputes forward passes there without marking them."""
    return torch._C._current_graph_task_id() != -1


def modules_being_called() -> list[nn.Module]:
    """The modules whose calls this thread is in, the innermost first. A hook cannot know it: some calls end without their hooks."""
    found = list[nn.Module]()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


@constant_in_graphs  # torch.compile enters transforms while it traces, and traces anew under others
def functorch_transform() -> str | None:
    """The active torch.func transform, for example "Grad" or "Vmap", or None. A custom operator would not see it."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key().name


def is_vmapped(x: Tensor) -> bool:
    """Whether torch.func.vmap hides the values of `x`, at any nesting level: reading them would raise an internal error of PyTorch.

    A traced graph sees the innermost transform only, since torch.compile cannot trace the unwrapping of tensors.
    """
    while not torch._C._functorch.is_batchedtensor(x):
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def has_storage(x: Tensor) -> bool:
    """Whether `x` has memory of its own. A batch of gradients (`is_grads_batched=True`) has none, and is a Tensor like any other."""
    return torch._C._has_storage(x)


def forward_mode_is_on() -> bool:
    """Whether tensors may have forward-mode tangents. torch.compile traces a function anew when this changes."""
    return torch.autograd.forward_ad._current_level >= 0


@outside_graphs  # torch.compile does not see the tangents of a graph's inputs
def has_tangent(*tensors: Tensor) -> bool:
    """Whether any tensor has a forward-mode tangent, which a custom operator would silently drop. Needs `forward_mode_is_on`."""
    return any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_under_dispatch_mode() -> bool:
    """Whether a dispatch mode is active, for example FakeTensorMode: tensors created now belong to it."""
    return bool(torch._C._len_torch_dispatch_stack())


def version_of(x: Tensor) -> int:
    """Autograd's count of in-place writes to `x` or its base. Inference tensors have none and raise."""
    return x._version


def mark_dynamic(x: Tensor, dims: int | list[int]) -> None:
    """Tell torch.compile that these dimensions vary. The public `mark_dynamic` raises if a dimension turns out to be constant."""
    torch._dynamo.maybe_mark_dynamic(x, dims)


def mark_static_address(x: Tensor) -> None:
    """Tell torch.compile's CUDA graphs that the address of `x` does not change, as transformers does for static caches."""
    torch._dynamo.mark_static_address(x)


def copy_all(into: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each of `sources` to its counterpart in `into`, in one launch."""
    torch._foreach_copy_(into, sources)


def connection_to_store() -> dist.Store:
    """A new connection to the rendezvous store of the default process group, whose own connection may be blocked in a wait.

    `init_process_group` creates or receives the store, and no public API returns it; `clone` is undocumented.
    """
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def release_broken_pool(device: int, handle: tuple[int, int]) -> None:
    """Detach an allocator's pool from a capture that CUDA has invalidated: PyTorch raises before it does so itself."""
    torch._C._cuda_endAllocateToPool(device, handle)
    torch._C._cuda_releasePool(device, handle)
