"""
The families that are known. The first that matches a configuration counts; what matches none has the defaults.

Some are known only to be refused: their checkpoints would load, with remote code, and be scored as what they are not.
"""

import copy
from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from .decoders.family import DECODERS
from .encoders import ENCODERS
from .family import Blocks, Family
from .llada.family import LLADA

FAMILIES: list[Family] = [
    LLADA,
    Family(
        name="LLaDA2.2",
        model_types=("llada2_moe",),
        only_if=lambda config: (
            any(hasattr(config, f"{edit}_token_id") for edit in ("delete", "split"))
            or getattr(config, "max_position_embeddings", 0) > 32768
        ),
        attention=Blocks(32),
        unscored="it deletes and inserts tokens, of which this likelihood knows nothing, and a block's tokens choose "
        "their experts together",
    ),
    Family(
        name="LLaDA2.1 under another name",
        model_types=("llada21_moe",),
        attention=Blocks(32),
        unscored="its published `model_type` is 'llada2_moe', and with that in its config.json it can be",
    ),
    Family(
        name="SDAR-MoE",
        model_types=("sdar_moe",),
        attention=Blocks(4, "block_size"),
        unscored="there is no class for its layers, which have experts",
    ),
    Family(
        name="Nemotron-Labs-Diffusion with dlm_paradigm='block_diff'",
        model_types=("nemotron_labs_diffusion",),
        only_if=lambda config: getattr(config, "dlm_paradigm", "") == "block_diff",
        attention=Blocks(32, "block_size", origin="response"),
        unscored="clean text is seen token by token in it, and the first token of a block comes from an autoregressive "
        "step, so that its bound is another one",
    ),
    Family(
        name="BD3-LM",
        model_types=("bd3lm",),
        attention=Blocks(16, "block_size"),
        unscored="there is no class for its layers",
    ),
    Family(name="DiffusionGemma", model_types=("diffusion_gemma", "diffusion_gemma_text"), noise="uniform"),
    Family(name="UDLM", model_types=("udlm",), noise="uniform"),
    Family(name="Duo", model_types=("DUO",), noise="uniform"),
    Family(
        name="Edit Flows",
        model_types=("editflow", *(f"editflow-{base}" for base in ("dream", "llada", "modernbert", "qwen3"))),
        noise="edits",
    ),
    *DECODERS,
    *ENCODERS,
]
_DEFAULT = Family()
_OTHER_NOISE = {
    "uniform": "whose noise replaces tokens by other tokens: any of them may be wrong, and its ELBO asks about all",
    "edits": "whose noise inserts, deletes and replaces tokens: its bound is on rates of edits and not on tokens at "
    "their places",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The facts of the family that a model with this configuration belongs to."""
    return next((family for family in FAMILIES if family.matches(config)), _DEFAULT)


def blocks_of(config: PreTrainedConfig, maskable: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    """`(B, L)` int64, the number of each token's block under a block diffusion model; none under another."""
    attention = family_of(config).attention
    return attention.numbers(config, maskable, real) if isinstance(attention, Blocks) else None


# Where a class of one's own is looked for
_AUTO_CLASSES: tuple[Any, ...] = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModel,
)


def class_to_load(config: PreTrainedConfig) -> Any:
    """
    The class whose `from_pretrained` loads a checkpoint: the family's, the one of transformers that the configuration
    names, or the auto class that knows the configuration, best by the name that this has.
    """
    names, own = config.architectures or (), family_of(config).auto_class
    by_name = [getattr(transformers, name, None) for name in (own, *names)]
    if own and by_name[0] is None:  # where the auto classes would find another
        return getattr(import_module("trl_diffusion.models"), own)
    knowing = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
    by_type = sorted(knowing, key=lambda auto: auto._model_mapping[type(config)].__name__ not in names)
    return next(filter(None, (*by_name, *by_type)), transformers.AutoModelForCausalLM)


def refuse_unscored(config: PreTrainedConfig) -> None:
    """
    Refuse a family whose ELBO is another one than that which is computed here.

    Raises:
        ValueError: it is known only to be refused, or its noise is not absorbing.
    """
    family = family_of(config)
    if family.unscored:
        raise ValueError(
            f"This is {family.name} (model_type={config.model_type!r}), which cannot be scored here: "
            f"{family.unscored}. Use a model of another family, LLaDA or SDAR for instance."
        )
    if family.noise != "absorbing":
        raise ValueError(
            f"This is {family.name} (model_type={config.model_type!r}), {_OTHER_NOISE[family.noise]}. The ELBO here is "
            "that of models in which a hidden token is a mask token and all others are right, such as LLaDA."
        )


def spare_in_quantization(quantization_config: Any, config: PreTrainedConfig) -> Any:
    """
    The configuration of a quantisation, with the modules that the family leaves as they are among those to skip.

    A list that is given to bitsandbytes takes the place of transformers' own, which spares the output head.
    """
    names = family_of(config).unquantized
    if not names or not hasattr(quantization_config, "llm_int8_skip_modules"):
        return quantization_config
    spared = copy.copy(quantization_config)
    spared.llm_int8_skip_modules = [*(quantization_config.llm_int8_skip_modules or ()), *names]
    return spared
