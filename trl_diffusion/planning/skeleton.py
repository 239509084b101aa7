"""
Models without memory: from a configuration on torch's meta device, and a copy of any model on fake tensors.

Fake tensors lie on the CPU whatever device they stand for, since fake CUDA tensors can be indexed in a CUDA build only.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from ..models.families import class_to_load
from ..scoring.adapters import fitted

# bitsandbytes' 4-bit format: weights per scale, scales per scale of scales, entries of the codes of both
_BLOCK, _NESTED_BLOCK, _CODE, _NESTED_CODE = 64, 256, 16, 256
_NAMES_OF_A_PLACE = ("layer_idx", "layer_id")  # attributes by which equal blocks differ


def without_memory(
    config: PreTrainedConfig, dtype: str, peft_config: Any = None, quantization_config: Any = None
) -> torch.nn.Module:
    """The model on the meta device, quantised and with its adapter as when it is loaded."""
    with torch.device("meta"):
        architecture = class_to_load(config)
        build = getattr(architecture, "from_config", None) or architecture._from_config
        model = build(copy.deepcopy(config), dtype=dtype)
        if quantization_config is not None:
            unquantised = model.dtype
            quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
            quantizer.preprocess_model(model=model, device_map=None)
            for module in model.modules():
                _pack(module, unquantised)
            quantizer.postprocess_model(model)
        if peft_config is None:
            return model
        # A copy: PEFT writes the model's name into it
        return get_peft_model(model, fitted(model, copy.deepcopy(peft_config)))


def _pack(module: Any, dtype: torch.dtype) -> None:
    """Give a quantised layer of bitsandbytes that holds no values the weight that loading would make."""
    kind = type(getattr(module, "weight", None)).__name__
    if kind == "Params4bit":
        _pack_4bit(module, dtype)
    elif kind == "Int8Params":
        rows = torch.empty(module.out_features, dtype=torch.float32)
        packed = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
        module.weight = type(module.weight)(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=rows)


def _pack_4bit(module: Any, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import QuantState

    weight, shape = module.weight, torch.Size((module.out_features, module.in_features))
    scales = -(-shape.numel() // _BLOCK)
    nested = None
    if weight.compress_statistics:
        absmax, code = torch.empty(-(-scales // _NESTED_BLOCK)), torch.empty(_NESTED_CODE)
        nested = QuantState(absmax=absmax, code=code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=shape,
        code=torch.empty(_CODE),
        blocksize=_BLOCK,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
    packed = torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8)
    module.weight = type(weight)(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        bnb_quantized=True,
    )


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All that a module holds: parameters, buffers, and what quantised layers keep beside their weights."""
    for part in module.modules():
        weight: Any = getattr(part, "weight", None)
        state: Any = getattr(weight, "quant_state", None)  # of 4 bits; nested, its scales have one too
        holders = [part, weight, state, getattr(state, "state2", None)]
        if type(getattr(part, "state", None)).__name__ == "MatmulLtState":  # of 8 bits
            holders.append(part.state)
        held = [*part._parameters.values(), *part._buffers.values()]
        held += [value for holder in holders if hasattr(holder, "__dict__") for value in vars(holder).values()]
        yield from (value for value in held if isinstance(value, torch.Tensor))


def equal_blocks(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list of the model's layers, the largest that it has, if all behind the first are made alike; or none."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)
    return layers if layers is not None and len({*map(_make, list(layers)[1:])}) <= 1 else None


def _make(block: torch.nn.Module) -> tuple[Any, ...]:
    """Kinds and plain attributes of a block's modules, and shapes of their weights."""
    made: list[Any] = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)}
        made += [name, type(module), *((k, v) for k, v in sorted(plain.items()) if k not in _NAMES_OF_A_PLACE)]
    made += [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]
    return tuple(made)


def fake_copy(
    model: torch.nn.Module, mode: FakeTensorMode, blocks: torch.nn.ModuleList | None = None, number: int | None = None
) -> Any:
    """
    A copy of a model whose tensors are fake, on the CPU.

    Args:
        model: on any device, the meta device too. It is not touched.
        mode: that the tensors belong to.
        blocks: a list of its modules that is cut short.
        number: of them that the copy has.
    """
    left_out = set() if blocks is None else {id(t) for block in blocks[number:] for t in tensors_of(block)}
    wanted = {id(tensor): tensor for tensor in tensors_of(model) if id(tensor) not in left_out}
    with mode:
        fakes = _fakes(wanted)
    memo: dict[int, Any] = dict(fakes)
    if blocks is not None:
        memo[id(blocks)] = torch.nn.ModuleList(copy.deepcopy(list(blocks[:number]), memo))
    copied = copy.deepcopy(model, memo)
    for key, fake in fakes.items():  # what a quantised weight knows
        vars(fake).update(copy.deepcopy(vars(wanted[key]), memo))
    return copied


def _fakes(tensors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """A fake tensor for each; those that are the same numbers share theirs."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    fakes: dict[int, torch.Tensor] = {}
    for key, tensor in tensors.items():
        place = (tensor.untyped_storage()._cdata, tensor.dtype, tensor.shape)
        if place not in made:
            made[place] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        fakes[key] = made[place].detach()
        if isinstance(tensor, torch.nn.Parameter):
            fakes[key] = torch.nn.Parameter(fakes[key], requires_grad=tensor.requires_grad)
    return fakes
