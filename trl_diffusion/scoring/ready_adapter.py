"""
An adapter that came with the model: training goes on from it, and the reference is a copy of it.

TRL adds a second adapter, "ref", of the same configuration, and copies by name what has `.default.` in its name. What
PEFT keeps under the bare name of the adapter (LoRA on an embedding, IA3, LoHa, VeRA, ...) would stay as it was
initialised, and an initialisation that changes the base model (PiSSA) would change it once more. So the copy is made
here, of everything that is kept by the adapter's name, when TRL asks for it.
"""

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from .precision import cast_adapters, is_quantised


class ReadyAdapter:
    """
    Takes care of the adapter of a model while TRL's constructor has it: `add_adapter`, which that calls, makes a true
    copy, and the rounding of a quantised model's adapter to bfloat16, which comes later, is undone.

    Args:
        model: with its adapter.
        dtype: precision of the adapter, if the model is quantised.
    """

    def __init__(self, model: PeftModel, dtype: str):
        cast_adapters(model, dtype)  # before it is copied, or the policy would not start at its reference
        self.model = model
        self._values = {}
        if is_quantised(model):
            self._values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._name, self._copies = model.active_adapters[0], list[str]()
        model.peft_config.setdefault("default", model.peft_config[self._name])  # where TRL looks
        model.add_adapter = self._add_copy

    def _add_copy(self, name: str, config: PeftConfig) -> None:
        self._remove_alias()
        add_copy(self.model, config, name, self._name)
        self._copies.append(name)

    def _remove_alias(self) -> None:
        if self._name != "default":
            self.model.peft_config.pop("default", None)

    def release(self) -> None:
        """The model is its own again; its adapter has the values that it came with."""
        self.model.__dict__.pop("add_adapter", None)
        self._remove_alias()
        for name, parameter in self.model.named_parameters():
            if name in self._values:
                parameter.data = self._values[name].to(parameter.device)
        self._values = {}

    def undo(self) -> None:
        """Take the copy away again."""
        while self._copies:
            self.model.delete_adapter(self._copies.pop())


def take_over(model: Any, dtype: str) -> ReadyAdapter | None:
    """Take care of the adapter of a model, if it has one."""
    return ReadyAdapter(model, dtype) if isinstance(model, PeftModel) else None


def add_copy(model: PeftModel, config: PeftConfig, name: str, original: str = "default") -> None:
    """
    Add an adapter that is a copy of another, frozen.

    Args:
        model: that has the original.
        config: of the original.
        name: of the copy.
        original: name of the adapter to copy.

    Raises:
        RuntimeError: PEFT keeps something of this adapter where it was not found.
    """
    config = copy.copy(config)
    config.inference_mode = True
    if isinstance(getattr(config, "init_lora_weights", True), str):
        config.init_lora_weights = True  # it has been initialised; some initialisations change the base model
    PeftModel.add_adapter(model, name, config)
    for kept in kept_by_name(model, original, name):
        _copy_entry(kept, original, name)
    mine, theirs = tensors_of(model, original), tensors_of(model, name)
    different = [key for key in mine if key not in theirs or not torch.equal(mine[key], theirs[key])]
    if different or not mine:
        raise RuntimeError(
            f"The reference would not be a copy of the adapter {original!r} ({config.peft_type}): "
            f"{', '.join(different[:3]) or 'nothing of it was found'} differs. Pass a `ref_model`: the same model "
            "with the same adapter, loaded once more."
        )


def tensors_of(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Everything that an adapter consists of, by its name in the model without that of the adapter."""
    tensors: dict[str, torch.Tensor] = {}
    for place, mapping in _mappings(model):
        if adapter not in mapping:
            continue
        value = mapping[adapter]
        if isinstance(value, torch.nn.Module):
            tensors |= {f"{place}.{name}": tensor for name, tensor in _parts(value)}
        elif isinstance(value, torch.Tensor):
            tensors[place] = value
    return tensors


def kept_by_name(model: torch.nn.Module, *adapters: str) -> Iterator[MutableMapping[str, Any]]:
    """The mappings of a model that have entries under all of these names of adapters."""
    return (mapping for _, mapping in _mappings(model) if all(name in mapping for name in adapters))


def _mappings(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Where PEFT keeps things by the name of the adapter: modules that are mappings, and plain ones in its layers."""
    for name, module in model.named_modules():
        if hasattr(module, "keys"):
            yield name, module
        elif hasattr(module, "active_adapters"):
            for attribute, value in vars(module).items():
                if isinstance(value, dict) and attribute != "peft_config":
                    yield f"{name}.{attribute}", value


def _copy_entry(mapping: Any, original: str, name: str) -> None:
    value = mapping[original]
    if isinstance(value, torch.nn.Module):
        for (_, mine), (_, copied) in zip(_parts(value), _parts(mapping[name]), strict=True):
            copied.data = mine.detach().clone()
    elif isinstance(value, torch.Tensor):
        mapping[name].data = value.detach().clone()
    elif isinstance(value, int | float):  # scales
        mapping[name] = value


def _parts(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
