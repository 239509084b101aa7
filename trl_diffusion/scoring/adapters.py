"""LoRA on a masked diffusion model: target modules that fit it, and adapter weights that keep their precision."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..models.families import family_of


def fitting_get_peft_model(get_peft_model: Callable[..., PeftModel]) -> Callable[..., PeftModel]:
    """Wrap `peft.get_peft_model` so that target modules default to the family's, and are checked."""

    def get_fitting_peft_model(model: PreTrainedModel, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> PeftModel:
        return get_peft_model(model, with_fitting_targets(model, peft_config), *args, **kwargs)

    return get_fitting_peft_model


# Initialisations that change the base model's weights
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What scales an adapter beside its weights
_SCALING = ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def check_reference_of_adapters(model: Any, ref_model: Any, peft_config: Any) -> None:
    """
    Refuse adapters that leave no reference behind: without a `ref_model` it is the model without the adapter that
    `peft_config` makes, or a copy of the adapter that `model` came with.
    """
    if ref_model is not None:
        return
    configs = {"peft_config": peft_config} if peft_config is not None else getattr(model, "peft_config", {})
    for name, config in configs.items():
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"`bias={config.bias!r}` of {name!r} trains biases of the base model, which the reference has too: it "
                "would move. Set `bias='none'`, or pass a `ref_model`."
            )
    refuse_changed_base(
        peft_config,
        "Make the adapter with `peft.get_peft_model` and pass that as `model`, whose adapter is then copied, or pass "
        "a `ref_model`.",
    )
    if isinstance(model, PeftModel):
        _check_adapters(model)


def refuse_changed_base(peft_config: Any, cure: str) -> None:
    """Refuse an adapter without which its base model is not what it was."""
    init = getattr(peft_config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGING_THE_BASE):
        raise ValueError(
            f"`init_lora_weights={init!r}` changes the weights of the base model, so that without its adapter it is "
            f"another model than the one training starts from. {cure}"
        )


def _check_adapters(model: PeftModel) -> None:
    """TRL trains what is active, and copies "default"."""
    if "ref" in model.peft_config:
        raise ValueError(
            "The model has an adapter 'ref', the name of the copy that is made here for the reference; a trainer that "
            "was made from it before leaves one. Remove it with `model.delete_adapter('ref')`, or pass a `ref_model`."
        )
    if list(model.active_adapters) != ["default"]:
        raise ValueError(
            f"The active adapters are {list(model.active_adapters)}, and the reference would be a copy of 'default'. "
            "Load the one to train with `adapter_name='default'` (which is what PEFT does without a name), or pass a "
            "`ref_model`."
        )


def adapter_scaling(model: Any) -> dict[str, dict[str, Any]]:
    """By name of the adapter, the settings that its weights are scaled by; empty without one."""
    configs = getattr(model, "peft_config", {})
    return {name: {key: getattr(c, key) for key in _SCALING if hasattr(c, key)} for name, c in configs.items()}


def with_fitting_targets(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """
    The adapter's configuration with `target_modules` filled in from the family if there are none.

    Warns of every requested name that matches no layer, or only some of the blocks.

    Raises:
        ValueError: the output head would be wrapped, or the method prepends virtual tokens.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"`{type(peft_config).__name__}` puts virtual tokens before the prompt, and responses are scored as rows "
            "of their own tokens. Use an adapter on the layers, such as LoRA."
        )
    if not hasattr(peft_config, "target_modules"):
        return peft_config
    if peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None):
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = family_of(model.config).lora_target_modules
    targets = peft_config.target_modules
    if targets is None or targets == "all-linear":
        return peft_config
    names = [name for name, _ in model.named_modules() if name]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    matched = _matches(names, targets)
    wrapping_head = [target for target, found in matched.items() if head in found]
    if wrapping_head:
        raise ValueError(
            f"`target_modules` {wrapping_head} also match the output head `{head}`, and TRL's trainers do not take an "
            "adapter on it. Leave `target_modules` unset, or use a pattern such as "
            f"{family_of(model.config).lora_target_modules!r}."
        )
    _warn_of_partial_matches(matched, num_blocks=getattr(model.config, "num_hidden_layers", 1))
    return peft_config


def _matches(names: list[str], targets: Any) -> dict[str, list[str]]:
    """Names of layers by requested target, by PEFT's rule: a string is a pattern, the items of a list are suffixes."""
    if isinstance(targets, str):
        try:
            return {targets: [name for name in names if re.fullmatch(targets, name)]}
        except re.error as error:
            raise ValueError(
                f"`target_modules={targets!r}` is not a valid pattern: {error}. A text is a regular expression for the "
                "whole name of a layer; give a list for the ends of names."
            ) from error
    return {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in sorted(targets)}


def _warn_of_partial_matches(matched: dict[str, list[str]], num_blocks: int) -> None:
    for target, found in matched.items():
        if not found:
            problem = "matches no layer of this model"
        elif len(found) < num_blocks:
            problem = f"matches {len(found)} of {num_blocks} blocks only"
        else:
            continue
        warnings.warn(
            f"LoRA target module {target!r} {problem}, so less is trained than was asked for. Leave `target_modules` "
            "unset to adapt every linear layer of the blocks.",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def adapter_precision(model: Any, dtype: str) -> Iterator[None]:
    """
    Undo TRL's rounding of a quantised model's adapters to bfloat16 inside the block, for adapters that came with it.

    Its "ref" adapter is copied before the rounding: without this the policy would differ from its reference at once.
    """
    trained = {}
    if isinstance(model, PeftModel) and dtype == "float32":
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    if trained:
        for name, parameter in model.named_parameters():
            if name in trained and parameter.dtype != trained[name].dtype:
                parameter.data = trained[name].to(parameter.device)


def cast_adapters(model: torch.nn.Module, dtype: str) -> None:
    """Cast the trainable weights of a quantised model to `dtype`. Others are left alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not (getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)):
        return
    for name, parameter in model.named_parameters():
        # As TRL does: the magnitudes of DoRA move in steps that bfloat16 cannot hold
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def keep_differentiable(model: torch.nn.Module) -> None:
    """
    Stop bitsandbytes from repacking 4-bit weights on the CPU for inference.

    It does so at the first evaluation or precomputed score, for good, and the kernel for the packed format has no
    backward: training would go on with gradients that end at the last 4-bit layer, without an error.

    Raises:
        ValueError: that has already happened to this model.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weight of `{name}` was repacked for inference on the CPU, which has no gradient: the model "
                "was run in evaluation mode before training. Load it again and give it to the trainer first."
            )


def reference_copy(model: Any, args: Any, peft_config: Any) -> Any:
    """A reference for full fine-tuning of a model in memory; TRL would load it from where the model came from."""
    if peft_config is not None or isinstance(model, PeftModel) or args.precompute_ref_log_probs:
        return None
    return copy.deepcopy(model)
