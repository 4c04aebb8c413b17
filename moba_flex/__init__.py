"""Mixture of Block Attention (arXiv 2502.13189) through PyTorch's FlexAttention, for transformers models."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from .core.startup import is_command, prepare_command

if is_command():
    prepare_command()  # before PyTorch is imported

from . import compat
from .analysis.calibration.calibrate import calibrate
from .analysis.calibration.report import Calibration, Candidate
from .analysis.describe import Description, LayerDescription, describe
from .analysis.explain import Explanation, explain
from .analysis.figures import visualize
from .analysis.trace import Trace, trace
from .backends.flash import set_flex_backend
from .config import MobaConfig
from .cuda_graphs.cache import set_cuda_graphs
from .functional import moba_attention, moba_attention_varlen, set_working_memory
from .models import AutoModelForCausalLM, full_attention, patch, set_attention, unpatch
from .selection import Selection, select_blocks

if TYPE_CHECKING:
    from . import distributed
    from .models.schedule import MobaSchedule

__all__ = [
    "AutoModelForCausalLM",
    "Calibration",
    "Candidate",
    "Description",
    "Explanation",
    "LayerDescription",
    "MobaConfig",
    "MobaSchedule",
    "Selection",
    "Trace",
    "calibrate",
    "compat",
    "describe",
    "distributed",
    "explain",
    "full_attention",
    "moba_attention",
    "moba_attention_varlen",
    "patch",
    "select_blocks",
    "set_attention",
    "set_cuda_graphs",
    "set_flex_backend",
    "set_working_memory",
    "trace",
    "unpatch",
    "visualize",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "MobaSchedule":  # imported lazily: it needs transformers' training code, which imports PEFT if installed
        from .models.schedule import MobaSchedule

        return MobaSchedule
    if name == "distributed":
        return importlib.import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


class _Package(ModuleType):
    """Keeps `moba_flex.calibrate` bound to the function after the module of that name, the command line, is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "calibrate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
