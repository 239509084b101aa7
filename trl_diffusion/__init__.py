"""
Preference optimisation of masked diffusion language models, as a TRL plug-in.

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

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

# The minor versions of TRL that the seam was tested on; the same range as in pyproject.toml
_TESTED_TRL = ((1, 16), (1, 17))


def _check_trl() -> None:
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ImportError("trl_diffusion needs trl>=1.16,<1.17: `pip install 'trl>=1.16,<1.17'`.") from None
    minor = Version(installed).release[:2]
    if not _TESTED_TRL[0] <= minor < _TESTED_TRL[1]:
        raise ImportError(
            f"trl_diffusion {__version__} was tested with trl>=1.16,<1.17 and found trl {installed}. It changes one "
            "thing inside TRL and cannot vouch for a version where that may have moved: `pip install "
            "'trl>=1.16,<1.17'`."
        )


_check_trl()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
