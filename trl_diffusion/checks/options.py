"""
Values of options that make no run, refused when the configuration is made, before anything is loaded.

Of what stands here TRL and transformers refuse nothing as early. A NaN `beta` trains on NaN gradients, a `padding_free`
is ignored, and an unknown `loss_type` is noticed at the first step, when the model is loaded and the reference scored.
"""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

# Every loss type of TRL's trainers; tests/test_trl_contract.py holds these lists to TRL's own
DPO_LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
SFT_LOSS_TYPES = ("nll",)  # DFT weighs a token by its probability given those before it, which is not estimated
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # what reads `label_smoothing`
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_COMPILED = "every response runs at its own length, so that nearly every forward would be compiled anew"

_KINDS = {int: (Integral, "an integer"), float: (Real, "a number"), bool: (bool, "True or False"), str: (str, "a text")}


class Rule(NamedTuple):
    """Whether a value means something, and in words which do."""

    holds: Callable[[Any], bool]
    words: str


def _at_least(low: float) -> Rule:
    return Rule(lambda v: _is_a(v, Real) and v >= low, f"a finite number of at least {low}")


def _count(low: int, end: int | None = None, words: str = "") -> Rule:
    holds = lambda v: _is_a(v, Integral) and v >= low and (end is None or v < end)  # noqa: E731
    return Rule(holds, words or f"an integer of at least {low}")


def _optional(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.holds(v), f"None or {rule.words}")


# What an option may be, where a configuration has it
RULES: dict[str, Rule] = {
    **dict.fromkeys(("num_mc_samples", "num_reference_draw_sets"), _count(1)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _count(1)),
    "gradient_accumulation_steps": _count(1),
    "draws_per_forward": _optional(_count(1)),
    "level_concentration": _optional(
        Rule(lambda v: _is_a(v, Real) and 0 < v <= 1, "a number in (0, 1]: 1 is uniform, 0.5 the arcsine law")
    ),
    "max_length": _optional(_count(2, words="an integer of at least 2, for prompt and completion")),
    "pad_to_multiple_of": Rule(lambda v: not isinstance(v, int) or v >= 1, "None or an integer of at least 1"),
    "beta": Rule(lambda v: _is_a(v, Real) and v > 0, "a finite number above 0"),
    **dict.fromkeys(("learning_rate", "desirable_weight", "undesirable_weight"), _at_least(0)),
    "max_grad_norm": _optional(_at_least(0)),
    "label_smoothing": Rule(
        lambda v: _is_a(v, Real) and 0 <= v < 0.5, "in [0, 0.5), above which it turns preferences round"
    ),
    "eos_padding": _count(0),
    "displacement_warning": _optional(Rule(lambda v: _is_a(v, Real) and v > 0, "a finite number above 0")),
    "completion_only_loss": Rule(lambda v: v in (None, True), "None or True: what was given is shown, never learnt"),
    "chat_template_path": Rule(
        lambda v: v is None or str(v).endswith((".jinja", ".j2")),
        "None or a file that ends in .jinja or .j2: the template of another tokenizer brings tokens that this model "
        "has never met",
    ),
    "ema_decay": Rule(lambda v: _is_a(v, Real) and 0 <= v < 1, "in [0, 1)"),
    "f_divergence_type": Rule(lambda v: getattr(v, "value", v) in _DIVERGENCES, f"one of {list(_DIVERGENCES)}"),
    "train_sampling_strategy": Rule(
        lambda v: v in ("random", "sequential"),
        "'random' or 'sequential' (grouping by length saves padding, of which there is none)",
    ),
    "seed": _count(0, 2**32, "an integer in [0, 2**32), as numpy's generator has it"),
    "draw_seed": _optional(_count(-(2**63), 2**63, "an integer of 64 bits")),
}

# Options of TRL and transformers that have no meaning here: any value but the default is refused, and why
REFUSED = {
    "use_weighting": "WPO weighs a pair by the probability of each token in its left context, of which there is none",
    "ld_alpha": "LD-DPO discounts the log-probabilities of late tokens; an ELBO is one number for a response, and its "
    "terms are not conditionals from left to right",
    **dict.fromkeys(
        ("packing", "eval_packing", "packing_strategy"),
        "every token of a row sees every other, so that examples in one row would see each other; they run alone, at "
        "their exact length",
    ),
    "assistant_only_loss": "one completion of a row is learnt, given all that stands before it: of a conversation its "
    "last turn. To learn every turn, make a row of each",
    "dataset_kwargs": "rows are always tokenised and checked here",
    "padding_free": "responses already run at their exact length, without padding",
    "truncation_mode": "examples longer than `max_length` are dropped and counted, never truncated",
    "activation_offloading": "activations are recomputed, not kept, between the forward and the backward",
    "neftune_noise_alpha": "each of the forwards that make a score would get noise of its own, and so would the policy "
    "and its reference, which share the embeddings",
    "label_smoothing_factor": "it is for cross entropies, and would be ignored; `label_smoothing` is for preferences "
    "that may be wrong",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
}


def check_options(args: Any, loss_types: tuple[str, ...], *owners: type) -> None:
    """
    Refuse what makes no run, or another one than was asked for.

    Args:
        args: the configuration, before TRL has seen it.
        loss_types: those of its trainer.
        owners: dataclasses among its bases, of whose own options types and choices are checked too. `"False"` would
            be true, and 2.5 draws fail in the middle of the first forward.
    """
    for owner in owners:
        _check_types(args, owner)
    _check_values(args)
    _check_losses(args, loss_types)
    # As accelerate reads it; `accelerate launch --dynamo_backend` and `dynamo_config` in a file set it
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend!r} has the model compiled, and {_COMPILED}. Leave `--dynamo_backend` "
            "out of `accelerate launch` and `dynamo_config` out of its file, or unset the variable."
        )


def check_device(kind: str) -> None:
    """Refuse a device without float64, in which masks are drawn and their weights computed."""
    if kind == "mps":
        raise ValueError(
            "Masks are drawn in float64, which Apple's GPUs (MPS) do not have. Set `use_cpu=True, bf16=False`."
        )


def _check_types(args: Any, owner: type) -> None:
    own, hints = vars(owner).get("__annotations__", {}), get_type_hints(owner)
    for field in fields(owner):
        if field.name not in own:
            continue
        value, wanted = getattr(args, field.name), get_args(hints[field.name]) or (hints[field.name],)
        if value is None and NoneType in wanted:
            continue
        kinds = [_KINDS[kind] for kind in wanted if kind in _KINDS]
        if not any(_is_a(value, kind) for kind, _ in kinds):
            rule = " or ".join([*(words for _, words in kinds), *(["None"] if NoneType in wanted else [])])
            raise ValueError(f"`{field.name}` must be {rule}, got {value!r} ({type(value).__name__}).")
        choices = field.metadata.get("choices", [value])
        if value not in choices:
            raise ValueError(f"`{field.name}` must be one of {choices}, got {value!r}.")


def _check_values(args: Any) -> None:
    for field in fields(args):
        name, value = field.name, getattr(args, field.name)
        if name in RULES and not RULES[name].holds(value):
            raise ValueError(f"`{name}` must be {RULES[name].words}, got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if name in REFUSED and value not in (field.default, None):
            raise ValueError(
                f"`{name}={value!r}` is not supported for masked diffusion models: {REFUSED[name]}. Leave `{name}` at "
                f"its default, {field.default!r}."
            )
    if getattr(args, "desirable_weight", 1) == 0 and args.undesirable_weight == 0:
        raise ValueError("`desirable_weight` and `undesirable_weight` are both 0, so nothing is learnt. Raise one.")


def _check_losses(args: Any, known: tuple[str, ...]) -> None:
    """Unknown loss types, weights that cannot weigh them, and smoothing that none of them does."""
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
    weights = getattr(args, "loss_weights", None)  # how many there are is TRL's to check
    if weights is not None and not (all(map(_is_finite, weights)) and any(weights)):
        raise ValueError(f"`loss_weights` must be finite numbers and not all 0, got {list(weights)!r}.")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_finite(value: Any) -> bool:
    return _is_a(value, Real) and math.isfinite(value)
