"""
Preference optimisation of masked diffusion language models, as a TRL plug-in.

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .configs import DiffusionVRPOConfig, ELBOKTOConfig
    from .control_variate import ControlVariate
    from .diagnose import diagnose_variance
    from .draws import MaskDraws, MaskSampler, draw_masks
    from .estimators import ELBO, elbo
    from .memory import MemoryEstimate, estimate_memory
    from .models import LLaDAConfig, LLaDAModelLM
    from .trainers import DiffusionVRPOTrainer, ELBOKTOTrainer
    from .variance_report import VarianceReport

_HOMES = {
    "ControlVariate": "control_variate",
    "DiffusionVRPOConfig": "configs",
    "DiffusionVRPOTrainer": "trainers",
    "ELBO": "estimators",
    "ELBOKTOConfig": "configs",
    "ELBOKTOTrainer": "trainers",
    "LLaDAConfig": "models",
    "LLaDAModelLM": "models",
    "MaskDraws": "draws",
    "MaskSampler": "draws",
    "MemoryEstimate": "memory",
    "VarianceReport": "variance_report",
    "diagnose_variance": "diagnose",
    "draw_masks": "draws",
    "elbo": "estimators",
    "estimate_memory": "memory",
}

__all__ = [
    "ELBO",
    "ControlVariate",
    "DiffusionVRPOConfig",
    "DiffusionVRPOTrainer",
    "ELBOKTOConfig",
    "ELBOKTOTrainer",
    "LLaDAConfig",
    "LLaDAModelLM",
    "MaskDraws",
    "MaskSampler",
    "MemoryEstimate",
    "VarianceReport",
    "__version__",
    "diagnose_variance",
    "draw_masks",
    "elbo",
    "estimate_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
