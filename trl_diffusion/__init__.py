"""
Preference optimisation of masked diffusion language models, as a TRL plug-in.

Names are imported when they are first used, so that importing the package costs nothing. transformers learns all the
same that there are more model types than it has itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._after_import import after_import, register_configurations, register_with_harness
from ._version import __version__

if TYPE_CHECKING:
    from .checks.family import FamilyReport, check_family
    from .diagnosis.diagnose import diagnose_variance
    from .diagnosis.report import VarianceReport
    from .estimators.control_variate import ControlVariate
    from .estimators.draws import MaskDraws, MaskSampler, draw_masks
    from .estimators.elbo import ELBO, elbo
    from .evaluation.callback import WinRateCallback
    from .evaluation.comparing import SamplingComparison, compare_sampling
    from .evaluation.likelihood import likelihood
    from .evaluation.pairs import sample_pairs
    from .evaluation.perplexity import Likelihood
    from .models import LLaDAConfig, LLaDAModelLM
    from .planning.memory import MemoryEstimate, estimate_memory
    from .trainers.elbo_kto.config import ELBOKTOConfig
    from .trainers.elbo_kto.trainer import ELBOKTOTrainer
    from .trainers.sft.config import DiffusionSFTConfig
    from .trainers.sft.trainer import DiffusionSFTTrainer
    from .trainers.vrpo.config import DiffusionVRPOConfig
    from .trainers.vrpo.trainer import DiffusionVRPOTrainer

_HOMES = {
    "ControlVariate": "estimators.control_variate",
    "DiffusionSFTConfig": "trainers.sft.config",
    "DiffusionSFTTrainer": "trainers.sft.trainer",
    "DiffusionVRPOConfig": "trainers.vrpo.config",
    "DiffusionVRPOTrainer": "trainers.vrpo.trainer",
    "ELBO": "estimators.elbo",
    "ELBOKTOConfig": "trainers.elbo_kto.config",
    "ELBOKTOTrainer": "trainers.elbo_kto.trainer",
    "FamilyReport": "checks.family",
    "LLaDAConfig": "models",
    "LLaDAModelLM": "models",
    "Likelihood": "evaluation.perplexity",
    "MaskDraws": "estimators.draws",
    "MaskSampler": "estimators.draws",
    "MemoryEstimate": "planning.memory",
    "SamplingComparison": "evaluation.comparing",
    "VarianceReport": "diagnosis.report",
    "WinRateCallback": "evaluation.callback",
    "check_family": "checks.family",
    "compare_sampling": "evaluation.comparing",
    "diagnose_variance": "diagnosis.diagnose",
    "draw_masks": "estimators.draws",
    "elbo": "estimators.elbo",
    "estimate_memory": "planning.memory",
    "likelihood": "evaluation.likelihood",
    "sample_pairs": "evaluation.pairs",
}

__all__ = [
    "ELBO",
    "ControlVariate",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "DiffusionVRPOConfig",
    "DiffusionVRPOTrainer",
    "ELBOKTOConfig",
    "ELBOKTOTrainer",
    "FamilyReport",
    "LLaDAConfig",
    "LLaDAModelLM",
    "Likelihood",
    "MaskDraws",
    "MaskSampler",
    "MemoryEstimate",
    "SamplingComparison",
    "VarianceReport",
    "WinRateCallback",
    "__version__",
    "check_family",
    "compare_sampling",
    "diagnose_variance",
    "draw_masks",
    "elbo",
    "estimate_memory",
    "likelihood",
    "sample_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


after_import("transformers.models.auto.configuration_auto", register_configurations)
after_import("lm_eval.models", register_with_harness)
