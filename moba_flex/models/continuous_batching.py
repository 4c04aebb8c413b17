"""Continuous batching of transformers (`generate_batch`, `init_continuous_batching`) for models with MoBA.

transformers' manager accepts only the attention names "sdpa", "paged|eager" and those that contain "flash"; nothing else depends on the
name. Models with MoBA keep the name "moba". The manager here accepts it, and turns the model's paged cache into one that
`paged_attention.py` can read. For all other models nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedModel

from ..config import MobaConfig
from .by_name import settings_to_come
from .layers import MOBA, attention_layers, attention_of
from .paged_cache import MobaPagedCache, adopt
from .state import choice_of, context_of
from .upstream import BATCHES_CONTINUOUSLY, ContinuousBatchingManager, RequestState, implementation_of, unsuited_options

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from .upstream import AttentionLayer

InUse = tuple[tuple[str, MobaConfig], ...]


def attention_in_use(layers: list[AttentionLayer]) -> InUse:
    """The attention and settings of each attention layer of a model; empty if none uses MoBA."""
    if not any(implementation_of(layer.config) in MOBA for layer in layers):
        return ()
    settings = [MobaConfig.of(x.config) if choice_of(x) is not None else settings_to_come(x.config, MOBA) for x in layers]
    return tuple((attention_of(layer, of_layer), of_layer) for layer, of_layer in zip(layers, settings))


class MobaBatchingManager(ContinuousBatchingManager):
    """transformers' manager, extended to models with MoBA.

    Raises ValueError for what continuous batching with MoBA does not support, before any request is accepted.
    """

    _in_use: InUse | None = None
    _layers: list[AttentionLayer]

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, generation_config, continuous_batching_config, *args, **kwargs)
        # transformers resolves a copy of the given options: it adds to them, and drops CUDA graphs without CUDA.
        configs = (continuous_batching_config, self.continuous_batching_config) if self._in_use else ()
        if unsuited := dict.fromkeys(option for config in configs for option in unsuited_options(config)):
            raise ValueError(
                f"continuous batching was asked for {', '.join(unsuited)}, by which batches are padded or prepared ahead, and MoBA follows "
                "neither: leave that at its default in the ContinuousBatchingConfig"
            )

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        self._layers = attention_layers(model)
        now = attention_in_use(self._layers)
        if self._in_use is not None and now != self._in_use:
            raise ValueError(
                f"the attention of {type(model).__name__} was switched since its continuous batching began: "
                "call model.destroy_cached_continuous_batching_manager() before it is used again"
            )
        if now:
            _check(model, now)
        else:
            super().switch_to_cb_friendly_attn(model, *args, **kwargs)
        self._in_use = now

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if self._in_use and not isinstance(processor.cache, MobaPagedCache):
            scheduler = processor.scheduler

            def find(name: str) -> RequestState:
                return scheduler.active_requests.get(name) or scheduler.waiting_requests[name]

            settings = next((of_layer for attention, of_layer in self._in_use if attention != "full"), self._in_use[0][1])
            adopt(processor.cache, settings, find, self._check_not_switched)
        return processor

    def _check_not_switched(self) -> None:
        if attention_in_use(self._layers) != self._in_use:
            raise ValueError(
                f"the attention of {type(self.model).__name__} was switched while continuous batching runs, where requests share keys: "
                "stop it, switch, and start again"
            )


def _check(model: PreTrainedModel, in_use: InUse) -> None:
    if not BATCHES_CONTINUOUSLY:
        raise ValueError(
            f"continuous batching with MoBA needs transformers 5.24 or newer, but this is {transformers.__version__}: upgrade, call "
            'model.generate, or use set_attention(model, "full")'
        )
    if any(settings.key_conv for _, settings in in_use):
        raise ValueError(
            f"{type(model).__name__} has a key_conv, which needs the keys before the new ones, and continuous batching does not give them: "
            "call model.generate"
        )
    if any(context_of(layer) is not None for layer in attention_layers(model)):
        raise ValueError(f"{type(model).__name__} is context-parallel, which works without a cache: call ContextParallel.remove() first")
