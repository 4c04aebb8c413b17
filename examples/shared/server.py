"""transformers' server for one model that is already loaded and patched.

It adds three things to `transformers serve`. Requests that are malformed, or longer than the model's context or the cache, are refused
before they can stop the serving loop. Ctrl-C ends running requests. Each request's speed is printed.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, CBGenerateManager, GenerationState
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.utils import drain_queue

import moba_flex
from moba_flex.analysis.explain import share_of_keys
from moba_flex.core.messages import shown
from moba_flex.models.layers import MOBA

SECONDS_TO_LEAVE = 1  # that clients get after Ctrl-C
SIZES = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
NUMBERS = {"temperature": (0, math.inf), "top_p": (0, 1), "frequency_penalty": (-0.99, 2)}  # smallest and largest
# Errors of malformed requests that transformers does not check for, and of chat templates. LookupError: something is missing.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, ImportError, TemplateError)


def serve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, listening: socket.socket, batching: dict[str, int | None]
) -> None:
    """Serve until Ctrl-C."""
    state = State(ContinuousBatchingConfig(**batching), model)
    models = OneModel(name, model, tokenizer, state)
    chat, completion = Chat(models, state), Completions(models, state)
    others = {
        "response_handler": Responses(models, state),
        "transcription_handler": NoTranscription(models, state),
        "systemone_handler": SystemOneHandler(models, state),
    }
    app = build_server(models, chat, completion_handler=completion, generation_state=state, **others)

    for kind in (HTTPException, RequestValidationError, RuntimeError, *MALFORMED):
        app.add_exception_handler(kind, refused)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_LEAVE)
    Server(config, name, state).run([listening])


async def refused(_: Request, error: Exception) -> JSONResponse:
    """The response to an invalid request, in the form that OpenAI's client shows."""
    if isinstance(error, HTTPException) and isinstance(error.__cause__, (ValueError, RecursionError)):
        status, said = 422, f"the body of the request is not a JSON object: {error.__cause__}"
    elif isinstance(error, HTTPException):
        status, said = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, said = 422, f"the body of the request is not a JSON object: {error.errors()[0]['msg']}"
    elif isinstance(error, RuntimeError):
        status, said = 503, f"the request was not finished: {error}"
    else:
        missing = isinstance(error, KeyError)
        status, said = 422, f"the request lacks {error}" if missing else f"the request cannot be understood: {error}"
    return JSONResponse({"error": {"message": said, "type": "invalid_request_error", "code": status}}, status)


class Checked(BaseHandler):
    """Refuses a request with a number that generation cannot use, before transformers reads it."""

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        try:
            generation = json.loads(body.get("generation_config") or "{}")
        except (TypeError, ValueError):
            generation = None
        if not isinstance(generation, dict):
            raise HTTPException(422, f"generation_config must be a JSON object in a string, but is {shown(body['generation_config'])}")
        for name, value in [*generation.items(), *body.items()]:
            if (must := fault(name, value)) is not None:
                raise HTTPException(422, f"{name} must be {must}, but is {shown(value)}")
        if body.get("messages") == []:
            raise HTTPException(422, "messages must have at least one message, but is []")


def fault(name: str, value: object) -> str | None:
    """What the value of that name must be, if it is something else; None has no effect."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    least, most = NUMBERS.get(name, (0, math.inf))
    if value is None:
        return None
    if name in SIZES and not (is_int and value >= 1):
        return "an int of at least 1"
    if name == "seed" and not (is_int and 0 <= value < 1 << 63):
        return "an int from 0 to 2**63 - 1"
    if name in NUMBERS and not ((is_int or isinstance(value, float)) and least <= value <= most and value < math.inf):
        return f"a number from {least:g} to {most:g}" if most < math.inf else f"a finite number of at least {least:g}"
    return None


class Chat(Checked, ChatCompletionHandler):
    """/v1/chat/completions."""


class Completions(Checked, CompletionHandler):
    """/v1/completions."""


class Responses(Checked, ResponseHandler):
    """/v1/responses."""


class NoTranscription(TranscriptionHandler):
    """/v1/audio/transcriptions, for which a language model is of no use."""

    async def handle_request(self, request: Request) -> JSONResponse:
        raise HTTPException(400, "this server has a language model, which transcribes no audio")


class Server(uvicorn.Server):
    """Prints its address once it listens. At shutdown it ends running requests before it waits for clients to disconnect."""

    def __init__(self, config: uvicorn.Config, name: str, state: State) -> None:
        super().__init__(config)
        self._name, self._state = name, state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        print(f"Serving {self._name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1. Ctrl-C ends it.", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._state.shutdown)
        await super().shutdown(sockets)


class OneModel(ModelManager):
    """A model manager with only one model."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State) -> None:
        self._model, self._tokenizer, self._state = model, tokenizer, state
        super().__init__(force_model=name)

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self._model

    def _load_processor(self, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def shutdown(self) -> None:
        self._state.shutdown()
        super().shutdown()


class State(GenerationState):
    """Continuous batching with `Requests`."""

    def __init__(self, config: ContinuousBatchingConfig, model: PreTrainedModel) -> None:
        super().__init__(continuous_batching=True, cb_config=config)
        self._read = KeysRead(model)

    def get_manager(self, model_id: str, use_cb: bool = False) -> CBGenerateManager:
        if self._cb_manager is None:
            self._cb_manager, self._cb_model_id = Requests(self._cb_config, self._read), model_id
        return self._cb_manager


class Requests(CBGenerateManager):
    """Refuses requests that are too long, and prints a line about each of the others when it is done."""

    def __init__(self, config: ContinuousBatchingConfig, read: KeysRead) -> None:
        super().__init__(config)
        self._read, self._most = read, 0

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Start continuous batching with the first request. Its sampling settings apply to all requests, as in transformers."""
        if self._cb is None:
            manager = model.init_continuous_batching(generation_config=gen_config, continuous_batching_config=self._cb_config)
            manager.warmup()  # creates the cache
            self._most = infer_max_single_request_tokens(manager.batch_processor.cache)
            manager.start()
            self._cb = manager

    def generate_streaming(
        self,
        model: PreTrainedModel,
        processor: Any,
        inputs: dict,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[Any, Any]:
        told, handlers = self._begin(model, inputs, gen_config, request_id), self._cb.output_router.result_handlers
        # transformers adds a request before it registers its listener. Output that arrives in between waits here until this function
        # returns.
        self._cb.register_result_handler(request_id, lambda output: listener(output))
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        listener = handlers[request_id][0]
        end, cancel = streamer.end, streamer.cancel

        def ended() -> None:
            told(streamer.total_tokens, "")
            end()

        def cancelled() -> None:
            told(streamer.total_tokens, ", then the client went away")
            cancel()
            handlers.pop(request_id, None)

        streamer.end, streamer.cancel = ended, cancelled
        return queue, streamer

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        told = self._begin(model, inputs, gen_config, request_id)
        text, length, tokens = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        told(len(tokens), "")
        return text, length, tokens

    def _begin(self, model: PreTrainedModel, inputs: dict, gen_config: GenerationConfig, request_id: str) -> Callable[[int, str], None]:
        """Check a request, and return the function that reports its end. Raises HTTPException if it is empty or too long."""
        prompt, limits = len(inputs["input_ids"]), {"the cache's pages have": self._most}
        if (context := getattr(model.config.get_text_config(), "max_position_embeddings", None)) is not None:
            limits["the model's context has"] = context
        what, most = min(limits.items(), key=lambda item: item[1])
        if not 0 < prompt < most:
            said = f"the prompt has {prompt:,} tokens" if prompt else "the prompt is empty"
            raise HTTPException(400, f"{said}, but must have from 1 to {most - 1:,}: {what} room for {most:,} with the answer")
        room = most - prompt
        gen_config.max_new_tokens = room if gen_config.max_new_tokens is None else min(gen_config.max_new_tokens, room)
        drain_queue(self._cb.output_router.output_queue)  # results for clients that have disconnected, which nobody will fetch
        began = time.perf_counter()

        def told(new: int, end: str) -> None:
            seconds = time.perf_counter() - began
            speed = f"{new:,} new in {seconds:.2f} s, {new / max(seconds, 1e-9):.1f} tokens/s"
            share = f"{self._read.share(prompt, new):.1%} of the keys read in layers with MoBA"
            print(f"{request_id}: {prompt:,} prompt tokens, {speed}, {share}{end}", flush=True)

        return told

    def stop(self) -> None:
        if self._cb is not None:
            self._cb.stop(block=True, hard_stop=True)


class KeysRead:
    """The share of the keys that requests read, in layers that use MoBA."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._settings = next((layer for layer in moba_flex.describe(model).layers if layer.attention in MOBA), None)

    def share(self, prompt: int, new: int) -> float:
        """The keys that the tokens of a request read, divided by all keys up to each of them; 1 if no layer uses MoBA."""
        if self._settings is None:
            return 1.0
        n, used = prompt + max(0, new - 1), self._settings
        of_prompt, of_all = (share_of_keys(n_query, n_query, used.block_size, used.top_k) for n_query in (prompt, n))
        seen, seen_by_prompt = n * (n + 1), prompt * (prompt + 1)
        return of_all if used.decode == "sparse" else (of_prompt * seen_by_prompt + seen - seen_by_prompt) / seen
