"""What the processes of `test_distributed.py` do. Every function runs on all of them, and raises where they differ from one process.

A file for each subject; here are the names that the tests use.
"""

from support.distributed_checks.context_parallel import flex_is_equal, length_scaled_is_equal, model_in_slices_is_equal, operator_is_equal
from support.distributed_checks.exchanges import bytes_sent, most_messages_held, one_ends, order_of_events
from support.distributed_checks.models import LlamaForCausalLM, save_tiny_model, tiny
from support.distributed_checks.parallelism import (
    accelerate_is_equal,
    data_parallel_is_equal,
    new_weights_after_sharding_are_refused,
    sharded_in_slices_is_equal,
    sharded_is_equal,
    tensor_parallel_is_equal,
    tensor_parallel_with_convolutions_is_refused,
)
from support.distributed_checks.refusals import bad_input_is_refused

import moba_flex

__all__ = [
    "LlamaForCausalLM",
    "accelerate_is_equal",
    "bad_input_is_refused",
    "bytes_sent",
    "data_parallel_is_equal",
    "flex_is_equal",
    "length_scaled_is_equal",
    "moba_flex",
    "model_in_slices_is_equal",
    "most_messages_held",
    "new_weights_after_sharding_are_refused",
    "one_ends",
    "operator_is_equal",
    "order_of_events",
    "save_tiny_model",
    "sharded_in_slices_is_equal",
    "sharded_is_equal",
    "tensor_parallel_is_equal",
    "tensor_parallel_with_convolutions_is_refused",
    "tiny",
]
