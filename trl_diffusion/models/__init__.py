"""
What a masked diffusion model is: its family, native classes, chat templates, and the sampler behind `generate`.

Knows transformers; importing it makes the auto classes know the native models. Does not know draws, scores or TRL.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .._after_import import after_import
from .decoders.auto import register
from .decoders.configuration import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    ILLaDAConfig,
    LLaDAMoEConfig,
)
from .decoders.family import DECODERS
from .decoders.nemotron import NemotronLabsDiffusionConfig
from .llada.configuration_llada import LLaDAConfig
from .llada.family import LLADA
from .llada.modeling_llada import LLaDAModel, LLaDAModelLM

LLaDAConfig.with_experts = LLaDAMoEConfig
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModel, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
register()


def _tell_peft(constants: Any) -> None:
    """Default targets of LoRA, where PEFT has those of the model types that it knows; the trainers need no telling."""
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for family in (family for family in (LLADA, *DECODERS) if family.auto_class):  # those with classes here
        for name in family.model_types:
            before, own = targets.get(name, ""), family.lora_target_modules
            targets[name] = f"{before}|{own}" if ".*" in before else own  # two families of one `model_type`: patterns


after_import("peft.utils.constants", _tell_peft)

__all__ = [
    "A2DLlamaConfig",
    "A2DQwen2Config",
    "A2DQwen3Config",
    "DreamConfig",
    "ILLaDAConfig",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "NemotronLabsDiffusionConfig",
]
