"""
What a masked diffusion model is: its family, native classes, chat templates, and the sampler behind `generate`.

Knows transformers; importing it makes the auto classes know the native models. Does not know draws, scores or TRL.
"""

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .._after_import import after_import
from . import full_logits as full_logits  # lets `elbo` ask models for logits
from .decoders.auto import register
from .decoders.block_diffusion import StableDiffcoderForCausalLM
from .decoders.configuration import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    FastDLLMQwenConfig,
    ILLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
)
from .decoders.configuration_llada2 import LLaDA2MoeConfig
from .decoders.family import DECODERS
from .decoders.lfm2 import Lfm2BidirectionalForMaskedLM
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
    # Those with classes here, but none that goes by a `model_type` of transformers
    for family in (family for family in (LLADA, *DECODERS) if hasattr(transformers, family.auto_class)):
        for name in family.model_types:
            before, own = targets.get(name, ""), family.lora_target_modules
            targets[name] = f"{before}|{own}" if ".*" in before else own  # two families of one `model_type`: patterns


after_import("peft.utils.constants", _tell_peft)

__all__ = [
    "A2DLlamaConfig",
    "A2DQwen2Config",
    "A2DQwen3Config",
    "DreamConfig",
    "FastDLLMQwenConfig",
    "ILLaDAConfig",
    "LLaDA2MoeConfig",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "Lfm2BidirectionalForMaskedLM",
    "NemotronLabsDiffusionConfig",
    "SDARConfig",
    "StableDiffcoderForCausalLM",
]
