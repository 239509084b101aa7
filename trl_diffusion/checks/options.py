"""
Values of options that make no run, refused when the configuration is made.

TRL and transformers meet most of them too, but late, under another name, or not at all: a NaN `beta` trains on NaN
gradients, and an unknown `loss_type` is noticed at the first step, when the model is loaded and the reference scored.
"""

import dataclasses
import math
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_type_hints

# Every loss type of TRL's trainers; tests/test_trl_contract.py holds these lists to TRL's own
DPO_LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # what reads `label_smoothing`
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

_KINDS = {int: (Integral, "an integer"), float: (Real, "a number"), bool: (bool, "True or False"), str: (str, "a text")}

# Option: test of its value, and the rule in words. An option that a configuration lacks is not tested.
_RULES = {
    "beta": (lambda v: _finite(v) and v > 0, "a finite number above 0"),
    "learning_rate": (lambda v: _finite(v) and v >= 0, "a finite number of at least 0"),
    "max_grad_norm": (lambda v: v is None or (_finite(v) and v >= 0), "a finite number of at least 0"),
    "per_device_train_batch_size": (lambda v: _integer(v, 1), "an integer of at least 1"),
    "per_device_eval_batch_size": (lambda v: _integer(v, 1), "an integer of at least 1"),
    "gradient_accumulation_steps": (lambda v: _integer(v, 1), "an integer of at least 1"),
    "max_length": (
        lambda v: v is None or _integer(v, 2),
        "None or an integer of at least 2, for prompt and completion",
    ),
    "pad_to_multiple_of": (lambda v: not isinstance(v, int) or v >= 1, "None or an integer of at least 1"),
    "label_smoothing": (lambda v: _finite(v) and 0 <= v < 0.5, "in [0, 0.5), above which it turns preferences round"),
    "desirable_weight": (lambda v: _finite(v) and v >= 0, "a finite number of at least 0"),
    "undesirable_weight": (lambda v: _finite(v) and v >= 0, "a finite number of at least 0"),
    "label_smoothing_factor": (
        lambda v: v == 0,
        "0, as it is for cross entropies and would be ignored (`label_smoothing` is for wrong preferences)",
    ),
    "neftune_noise_alpha": (
        lambda v: v is None,
        "None, as the policy and its reference share the embeddings and would each get noise of its own",
    ),
    "f_divergence_type": (lambda v: getattr(v, "value", v) in _DIVERGENCES, f"one of {list(_DIVERGENCES)}"),
    "seed": (lambda v: _integer(v, 0, 2**32), "an integer in [0, 2**32), as numpy's generator has it"),
    "draw_seed": (lambda v: v is None or _integer(v, -(2**63), 2**63), "None or an integer of 64 bits"),
}


def check_types(args: Any, owner: type) -> None:
    """
    Refuse values of another type than the one that `owner`, a dataclass among the bases of `args`, gives its options.

    `"False"` would be true, and 2.5 draws fail in the middle of the first forward.
    """
    own = vars(owner).get("__annotations__", {})
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        if field.name not in own:
            continue
        value, wanted = getattr(args, field.name), get_args(hints[field.name]) or (hints[field.name],)
        if value is None and NoneType in wanted:
            continue
        kinds = [_KINDS[kind] for kind in wanted if kind in _KINDS]
        if kinds and not any(_is_a(value, kind) for kind, _ in kinds):
            rule = " or ".join([*(words for _, words in kinds), *(["None"] if NoneType in wanted else [])])
            raise ValueError(f"`{field.name}` must be {rule}, got {value!r} ({type(value).__name__}).")


def check_values(args: Any) -> None:
    """Refuse values outside the range in which an option means something."""
    for name, (holds, rule) in _RULES.items():
        if hasattr(args, name) and not holds(getattr(args, name)):
            raise ValueError(f"`{name}` must be {rule}, got {getattr(args, name)!r}.")
    if getattr(args, "desirable_weight", 1) == 0 and args.undesirable_weight == 0:
        raise ValueError("`desirable_weight` and `undesirable_weight` are both 0, so nothing is learnt. Raise one.")
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`train_sampling_strategy='group_by_length'` saves padding, and responses run at their exact length, "
            "without padding. Leave it at 'random'."
        )
    if args.torch_compile or args.torch_compile_backend or args.torch_compile_mode:
        raise ValueError(
            f"`torch_compile={args.torch_compile}` (or its backend or mode) is not supported: every response runs at "
            "its own length, so that nearly every forward would be compiled anew. Leave it out."
        )


def check_loss_types(args: Any, known: tuple[str, ...]) -> None:
    """Refuse unknown loss types, weights that cannot weigh them, and smoothing that none of them does."""
    given = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type or ())
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ValueError(f"`loss_type` must be among {list(known)}, got {args.loss_type!r}.")
    smoothing = getattr(args, "label_smoothing", 0)
    if smoothing and not set(given) & set(_SMOOTHED):
        raise ValueError(
            f"`label_smoothing={smoothing}` is read by the loss types {list(_SMOOTHED)} only, got "
            f"`loss_type={args.loss_type!r}`. For preferences that may be wrong take `loss_type='robust'`, or leave "
            "`label_smoothing` at 0."
        )
    weights = getattr(args, "loss_weights", None)
    if weights is None:
        return
    if len(weights) != len(given):
        raise ValueError(
            f"`loss_weights` must have one number for each of the {len(given)} loss types, got {list(weights)!r}."
        )
    if not all(_finite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"`loss_weights` must be finite numbers and not all 0, got {list(weights)!r}.")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _finite(value: Any) -> bool:
    return _is_a(value, Real) and math.isfinite(value)


def _integer(value: Any, low: int, end: int | None = None) -> bool:
    return _is_a(value, Integral) and value >= low and (end is None or value < end)
