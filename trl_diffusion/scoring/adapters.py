"""LoRA on a masked diffusion model: target modules that fit it, and adapters that leave a reference behind."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel

from ..models.families import family_of
from .sharding import fsdp_is_asked_for


def base_of(model: Any) -> Any:
    """The model that is inside an adapter; one without an adapter itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def fitting_get_peft_model(
    get_peft_model: Callable[..., PeftModel], revision: str | None = None
) -> Callable[..., PeftModel]:
    """
    Wrap `peft.get_peft_model` so that an adapter's configuration is [`fitted`] to the model, and that the adapter says
    of which `revision` its base model is, which is loaded with it later.
    """

    def get_fitting_peft_model(model: PreTrainedModel, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> PeftModel:
        kwargs |= {"revision": revision} if revision else {}
        return get_peft_model(model, fitted(model, peft_config), *args, **kwargs)

    return get_fitting_peft_model


# Initialisations that change the base model's weights
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


def refuse_half_of_a_tie(model: Any) -> None:
    """
    Refuse an adapter on the embedding alone where the output head is the embedding.

    Raises:
        ValueError: names it.
    """
    if not isinstance(model, PeftModel):
        return
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(embedding, ModulesToSaveWrapper):
        weight = embedding.original_module.weight
    elif isinstance(embedding, BaseTunerLayer):
        weight = embedding.get_base_layer().weight
    else:
        return
    if weight is getattr(head, "weight", None):
        name = next(name for name, module in base.named_modules() if module is embedding)
        raise ValueError(
            f"The adapter is on the embedding `{name}`, whose weight is the output head's too: the head would stay as "
            "it was, and merging the adapter would change both, which is another model than was trained. Leave the "
            "embedding out of `target_modules` and `modules_to_save`."
        )


def _check_adapters(model: PeftModel) -> None:
    """One adapter is trained, and TRL makes its copy under the name "ref" from what it calls "default"."""
    if "ref" in model.peft_config:
        raise ValueError(
            "The model has an adapter 'ref', the name of the copy that is made here for the reference; a trainer that "
            "was made from it before leaves one. Remove it with `model.delete_adapter('ref')`, or pass a `ref_model`."
        )
    active = list(model.active_adapters)
    if len(active) > 1:
        raise ValueError(
            f"The active adapters are {active}, and one is trained. Choose it with `model.set_adapter({active[0]!r})`, "
            "or pass a `ref_model`."
        )
    if "default" in model.peft_config and active != ["default"]:
        raise ValueError(
            f"The active adapter is {active[0]!r}, and there is one named 'default', of which the reference would be a "
            f"copy. Remove that with `model.delete_adapter('default')`, train it with `model.set_adapter('default')`, "
            "or pass a `ref_model`."
        )


def _needs(peft_config: PeftConfig) -> str:
    """Which layers a kind of adapter is made for, as its targets in a Llama tell: "" for none, "linear", "other"."""
    if hasattr(peft_config, "feedforward_modules"):  # IA3, which treats two sorts of linear layers differently
        return "other"
    table = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type), "target_module_mapping", {})
    targets = table.get("llama") or ()
    if not targets:
        return ""
    return "linear" if all(name.endswith("_proj") for name in targets) else "other"


def _refuse_missing_targets(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Name the layers that there are, where neither PEFT nor the family has targets for a kind of adapter."""
    kind, ends = type(peft_config).__name__, {1: set[str](), 2: set[str]()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if re.search(r"\.\d+\.", name) and isinstance(weight, torch.Tensor) and weight.dim() in ends:
            ends[weight.dim()].add(name.rsplit(".", 1)[-1])
    two = hasattr(peft_config, "feedforward_modules")
    raise ValueError(
        f"`{kind}` has no `target_modules`, and there are none by default for a `{type(model).__name__}`. Set them to "
        f"ends of the names of layers{', and `feedforward_modules` to those that feed forward' if two else ''}. The "
        f"linear layers of a block are {sorted(ends[2])}, its norms are {sorted(ends[1])}."
    )


def fitted(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """An adapter's configuration for a model: with a task that its class has, and its family's target modules."""
    generates = peft_config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # as in most examples of LoRA
    if generates and not hasattr(model, "prepare_inputs_for_generation"):  # of which PEFT would make a part of its own
        peft_config = copy.copy(peft_config)
        peft_config.task_type = None
    return _with_fitting_targets(model, peft_config)


def _with_fitting_targets(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """
    The adapter's configuration with `target_modules` filled in from the family if there are none and it needs linear
    layers.

    Warns of every requested name that matches no layer, or only some of the blocks.

    Raises:
        ValueError: the output head would be wrapped, the method prepends virtual tokens, or it has no targets and needs
            other layers.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"`{type(peft_config).__name__}` puts virtual tokens before the prompt, and responses are scored as rows "
            "of their own tokens. Use an adapter on the layers, such as LoRA."
        )
    if not hasattr(peft_config, "target_modules"):
        return peft_config
    unset = peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None)
    needs = _needs(peft_config)
    if unset and needs == "other":
        _refuse_missing_targets(model, peft_config)
    if unset and needs == "linear":
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
        in_blocks = [name for name in found if re.search(r"\.\d+\.", name)]  # others are there once, like the embedding
        if not found:
            problem = "matches no layer of this model"
        elif in_blocks and len(found) < num_blocks:
            problem = f"matches {len(found)} of {num_blocks} blocks only"
        else:
            continue
        warnings.warn(
            f"LoRA target module {target!r} {problem}, so less is trained than was asked for. Leave `target_modules` "
            "unset to adapt every linear layer of the blocks.",
            UserWarning,
            stacklevel=2,
        )


def reference_copy(model: Any, args: Any, peft_config: Any) -> Any:
    """
    A reference for full fine-tuning of a model in memory; TRL would load it from where the model came from.

    Not if it is scored before training, but under FSDP, where TRL scores a copy that is sharded, and lets go of it.
    """
    scored_before = args.precompute_ref_log_probs and not fsdp_is_asked_for(args)
    if peft_config is not None or isinstance(model, PeftModel) or scored_before:
        return None
    return copy.deepcopy(model)
