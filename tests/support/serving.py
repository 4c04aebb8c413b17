"""Continuous batching step by step, in the thread of the test: what happens when is up to the test alone."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

_empty = torch.empty
SMALL = {"page_size": 16, "num_blocks": 48, "max_batch_tokens": 40, "safety_margin": 0.0}


def generation(new: int, answers: int = 1) -> GenerationConfig:
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
    greedy.num_return_sequences = answers  # which its constructor refuses of greedy decoding
    return greedy


def alone(model: nn.Module, prompt: list[int], new: int = 8) -> list[int]:
    """The tokens that `generate` gives a prompt for itself."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


class Serving:
    """The manager of a model's continuous batching, which works when it is told to."""

    def __init__(self, model: nn.Module, new: int = 8, answers: int = 1, **config) -> None:
        self.manager = model.init_continuous_batching(generation(new, answers), ContinuousBatchingConfig(**{**SMALL, **config}))
        with mock.patch("torch.empty", _unpinned):
            self.processor = self.manager.batch_processor = self.manager._create_batch_processor()
        self.cache = self.processor.cache
        self.manager.current_batch = 0
        self.tokens: dict[str, list[int]] = {}

    def add(self, prompt: list[int], name: str | None = None, **kwargs) -> str:
        return self.manager.add_request(prompt, request_id=name, **kwargs)

    def cancel(self, name: str) -> None:
        self.manager.cancel_request(name)

    @torch.no_grad()
    def step(self, steps: int = 1) -> None:
        """As many forward passes."""
        for _ in range(steps):
            self.manager._wake_up_loop.set()  # it never waits
            self.manager._generation_loop_body(self.processor, bootstrapping=False)
            while not self.manager.output_router.output_queue.empty():
                output = self.manager.output_router.output_queue.get()
                assert output.error is None, output.error
                self.tokens[output.request_id] = output.generated_tokens

    def finish(self) -> dict[str, list[int]]:
        """The tokens of all requests that were not cancelled."""
        for _ in range(2000):
            self.step()
            waiting = not self.manager.input_queue.empty() or not self.manager.cancel_queue.empty()
            if not waiting and not self.processor.has_pending_requests():
                return self.tokens
        raise AssertionError(f"requests are left after 2000 forward passes: {self.processor.scheduler.active_requests}")


def _unpinned(*args, **kwargs) -> torch.Tensor:
    """`torch.empty` where no memory can be pinned."""
    return _empty(*args, **{**kwargs, "pin_memory": False})
