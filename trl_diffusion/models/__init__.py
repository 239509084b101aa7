"""
What a masked diffusion model is: its family, native classes, chat templates, and the sampler behind `generate`.

Knows transformers; importing it makes the auto classes know the native models. Does not know draws, scores or TRL.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .llada.configuration_llada import LLaDAConfig
from .llada.modeling_llada import LLaDAModel, LLaDAModelLM

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModel, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)

__all__ = ["LLaDAConfig", "LLaDAModel", "LLaDAModelLM"]
