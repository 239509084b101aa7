"""
The only door to TRL's internals.

TRL 1.16 touches log-probabilities in one expression, `model(..., labels=labels, fused_lm_head=True).log_probs`, and
gives a model that forward with `add_fused_lm_head`, which the trainers look up by name while they are constructed. The
seam is that name, and two more that are looked up beside it: [`seam`] puts ours in their place for the time of the
constructor. tests/test_trl_contract.py holds TRL to what is said here.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from .._version import __version__

# The minor versions of TRL that the seam was tested on; the same range as in pyproject.toml
_TESTED_TRL = ((1, 16), (1, 17))


def _check_trl() -> None:
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ImportError("The trainers need trl>=1.16,<1.17: `pip install 'trl>=1.16,<1.17'`.") from None
    minor = Version(installed).release[:2]
    if not _TESTED_TRL[0] <= minor < _TESTED_TRL[1]:
        raise ImportError(
            f"trl_diffusion {__version__} was tested with trl>=1.16,<1.17 and found trl {installed}. It changes one "
            "thing inside TRL and cannot vouch for a version where that may have moved: `pip install "
            "'trl>=1.16,<1.17'`."
        )


_check_trl()  # before anything is looked for in it

from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import FusedCausalLMOutput, hash_module, maybe_gather_lm_head_ctx, use_adapter

# Names that a TRL trainer module looks up in its constructor, in this order
SEAM_NAMES = ("create_model_from_path", "get_peft_model", "add_fused_lm_head")

__all__ = [
    "SEAM_NAMES",
    "ChunkedLogProbFunction",
    "DPOConfig",
    "DPOTrainer",
    "DatasetMixtureConfig",
    "FusedCausalLMOutput",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "TrlParser",
    "check_asked_for",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "hash_module",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "replaced",
    "seam",
    "seam_function",
    "tiles_in_place",
    "use_adapter",
]


def seam_function(trainer_module: str, name: str) -> Callable:
    """What TRL itself uses under one of the [`SEAM_NAMES`]."""
    return getattr(importlib.import_module(trainer_module), name)


@contextmanager
def seam(trainer_module: str, **replacements: Any) -> Iterator[None]:
    """
    Replace names in the namespace of a TRL trainer module for the duration of the block.

    The trainers' constructors load the model, wrap it with PEFT, give it its scoring head, and only then prepare the
    reference and score the dataset with it. Ours have to stand at exactly these places.

    Raises:
        AttributeError: that is not a name of the seam, or TRL no longer has it there.
    """
    unknown = set(replacements) - set(SEAM_NAMES)
    if unknown:
        raise AttributeError(f"Not a name of the seam: {sorted(unknown)}.")
    with replaced(trainer_module, replacements):
        yield


@contextmanager
def replaced(module_name: str, replacements: dict[str, Any]) -> Iterator[None]:
    """Replace names of a module for the duration of the block; `AttributeError` if it has not got them."""
    module = importlib.import_module(module_name)
    originals = {name: getattr(module, name) for name in replacements}
    try:
        vars(module).update(replacements)
        yield
    finally:
        vars(module).update(originals)


@contextmanager
def tiles_in_place() -> Iterator[None]:
    """
    Let TRL's kernel of the output head allocate on the CPU what it does on a GPU, where Triton works on a tile of
    logits in place and products add up without copies. Its numbers mean nothing: for counting bytes.
    """
    work = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    with replaced("trl.kernels.chunked_logprob", dict.fromkeys(work, lambda *args, **kwargs: None)):
        yield


def check_asked_for(model: Any, asked_for: Sequence[Any]) -> None:
    """
    Refuse a model for whose head TRL has not asked through the seam, and which it would score as a causal one.

    Args:
        model: as it stands in the trainer, whatever wraps it.
        asked_for: what `add_fused_lm_head` was called with.

    Raises:
        RuntimeError: none of these is the model or a part of it.
    """
    parts = set(map(id, model.modules()))
    if not any(id(module) in parts for module in asked_for):
        raise RuntimeError(
            f"trl {version('trl')} has not asked for the ELBO head of the `{type(model).__name__}`, and would score it "
            "as a causal model. The seam described in trl_diffusion/scoring/door.py has moved: install a supported "
            "version, `pip install 'trl>=1.16,<1.17'`."
        )
