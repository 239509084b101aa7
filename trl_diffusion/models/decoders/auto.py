"""The auto classes of transformers, told of the decoders: by path they need no remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from .block_diffusion import DreamReasonerForCausalLM, Fast_dLLM_QwenForCausalLM, SDARForCausalLM
from .configuration import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    DreamReasonerConfig,
    FastDLLMQwenConfig,
    ILLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
)
from .configuration_llada2 import LLaDA2MoeConfig
from .experts import LLaDAMoEModelLM
from .modeling import (
    A2DLlamaLMHeadModel,
    A2DQwen2LMHeadModel,
    A2DQwen3LMHeadModel,
    DreamModel,
    DreamTokenizer,
    ILLaDAForCausalLM,
)
from .modeling_llada2 import LLaDA2MoeModelLM
from .nemotron import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel

CLASSES = {
    ILLaDAConfig: ILLaDAForCausalLM,
    DreamConfig: DreamModel,
    A2DQwen2Config: A2DQwen2LMHeadModel,
    A2DQwen3Config: A2DQwen3LMHeadModel,
    A2DLlamaConfig: A2DLlamaLMHeadModel,
    LLaDAMoEConfig: LLaDAMoEModelLM,
    LLaDA2MoeConfig: LLaDA2MoeModelLM,
    NemotronLabsDiffusionConfig: NemotronLabsDiffusionModel,
    SDARConfig: SDARForCausalLM,
    DreamReasonerConfig: DreamReasonerForCausalLM,
    FastDLLMQwenConfig: Fast_dLLM_QwenForCausalLM,
}


def register() -> None:
    """Let the auto classes know them. Their published `AutoModel` is the model with its head, and so it is here."""
    for config, model in CLASSES.items():
        if config not in (LLaDAMoEConfig, DreamReasonerConfig):  # found by those of dense LLaDA and of Dream
            AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
            auto.register(config, model, exist_ok=True)
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
