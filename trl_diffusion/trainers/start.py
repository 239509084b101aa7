"""
Training starts at its reference: tried on one row before the first step, in the precision of the run.

Whatever way the reference came about (the adapter switched off, a copy of it, a copy of the model, stored values), the
policy has to score a response as its reference does, or the first loss is not ln 2 and every reward is measured from
elsewhere. Names and types cannot tell: numbers can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback

from ..checks.numbers import naming_the_example
from ..models.alignment import check_shift
from ..models.denoiser import resolve_mask_token_id
from ..models.trying import evaluating
from ..scoring.adapters import base_of, refuse_half_of_a_tie
from ..scoring.head import FIXED_NONCE, on_draws
from ..scoring.precision import warn_of_lost_updates
from ..scoring.ready_adapter import tensors_of
from .displacement import DisplacementWatch

logger = get_logger(__name__)

# Shares of an ELBO by which rounding may move it, by the coarsest numbers of a step. Most adapters that do nothing
# leave it as it is to the last bit. Those that do nothing up to rounding moved that of five tokens through eight layers
# by at most 8e-7 (HRA) in float32 and 9e-3 (HRA, DoRA) in bfloat16; sums over more tokens move by less.
_ROUNDING = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


class StartCheck(TrainerCallback):
    """Checks a trainer, through what wraps its model, whose weights are put in place when training begins."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a resumed policy has left its reference
            check_start(self.trainer, self.trainer.model_wrapped)


def check_before_training(trainer: Any) -> None:
    """
    Check that a constructed trainer scores what its family says, starts at its reference, which stays where it is, and
    that its steps are not lost.

    Where weights are put in place later (FSDP, DeepSpeed), the scores are compared when training begins.
    """
    refuse_layers_that_are_kept(trainer)
    refuse_half_of_a_tie(trainer.model)
    refuse_router_loss(trainer)
    try_shift(trainer)
    if trainer.is_fsdp_enabled:
        refuse_what_fsdp_cannot_share(trainer.accelerator.unwrap_model(trainer.model))
    placed_later = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not placed_later or (trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision == "no"):
        # DeepSpeed trains a copy in float32, and so does FSDP in mixed precision
        warn_of_lost_updates(trainer.model, trainer.args.learning_rate, logger.warning)
    if trainer._has_reference and trainer.args.displacement_warning is not None:
        pairs = trainer._responses_per_row == 2
        trainer.add_callback(DisplacementWatch(trainer.args.displacement_warning, pairs))
    if trainer._reference_is_given or not trainer._has_reference:
        return
    if not trainer.precompute_ref_logps:
        refuse_shared_weights(trainer.model)
    if placed_later:
        trainer.add_callback(StartCheck(trainer))
    else:
        check_start(trainer, trainer.model)


def try_shift(trainer: Any) -> None:
    """
    Refuse logits that stand elsewhere than the family says, see [`check_shift`]; not tried on sharded weights.

    Warns of a model for which the data are worse than noise.
    """
    if trainer._shards_weights() or trainer.train_dataset is None:
        return
    model, column = trainer.accelerator.unwrap_model(trainer.model), trainer._completion_columns[0]
    rows = ((row["prompt_ids"], row[column]) for row in trainer.train_dataset)
    found = check_shift(model, rows, resolve_mask_token_id(model.config, trainer._tokenizer))
    if found is not None and found.is_worse_than_guessing:
        logger.warning(
            "Hidden tokens of the training data cost this model %.2f nats each, more than a guess among its %d tokens. "
            "Either the tokenizer is another model's, or the weights are random.",
            found.ours.mean(),
            found.vocab_size,
        )


def refuse_layers_that_are_kept(trainer: Any) -> None:
    """Refuse layer checkpointing, TRL's default, of a model whose class has none."""
    base = base_of(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.args.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise ValueError(
            f"`gradient_checkpointing=True`, the default, is nothing that `{type(base).__name__}` can do "
            "(`supports_gradient_checkpointing`). Set `gradient_checkpointing=False`: activations of "
            "`draws_per_forward` draws are kept, not those of all."
        )


def refuse_router_loss(trainer: Any) -> None:
    """Refuse a loss of a router of experts, which no score returns."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"`router_aux_loss_coef={trainer.router_aux_loss_coef}` adds a loss of the router, which a score does not "
            "return. Set `router_aux_loss_coef=0.0`."
        )


def refuse_what_fsdp_cannot_share(model: Any) -> None:
    """
    Refuse weights that are in two modules, other than those of the embeddings and the head, which FSDP keeps together.

    Raises:
        ValueError: names one: BERT's and RoBERTa's head has its bias twice.
    """
    names: dict[int, str] = {id(weight): "" for weight in model.get_input_embeddings().parameters()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(weight), name) not in ("", name):
            raise ValueError(
                f"`{name}` and `{names[id(weight)]}` of `{type(model).__name__}` are one weight, which FSDP2 cannot "
                "shard. Train this model with DDP: `accelerate launch --multi_gpu`."
            )


def refuse_shared_weights(model: Any) -> None:
    """
    Refuse to train weights that the reference has too: with an adapter, those of the base model.

    Raises:
        ValueError: names one.
    """
    if not isinstance(model, PeftModel):
        return
    own = {id(tensor) for name in model.peft_config for tensor in tensors_of(model, name).values()}
    shared = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if shared:
        raise ValueError(
            f"{len(shared)} trained weights are not the adapter's but the base model's, `{shared[0]}` first, and the "
            "reference is that base model: it would move. Freeze them with `requires_grad_(False)`, name their layers "
            "in `modules_to_save`, which makes a copy, or pass a `ref_model`."
        )


def check_start(trainer: Any, model: Any) -> None:
    """
    Refuse a policy that does not score as its reference does, on the first row and in evaluation mode.

    Args:
        trainer: that has been constructed, without a `ref_model` of the user's.
        model: its policy, as it will be trained.

    Raises:
        ValueError: names the first layer whose outputs differ.
        NonFiniteError: a score is not a number.
    """
    row = next(iter(trainer.train_dataset))
    inputs = trainer._prepare_inputs(trainer.data_collator([row]))
    with naming_the_example(inputs, trainer._tokenizer), evaluating(trainer.model), torch.no_grad():
        policy = _score(trainer, model, inputs)
        with trainer._with_reference(inputs, FIXED_NONCE) as scored:
            reference = torch.cat([scored[name] for name in trainer._reference_columns if name in scored])
    reference = reference[: len(policy)]  # those of mismatched pairs come last
    if bool(((policy - reference).abs() <= _rounding(trainer) * reference.abs()).all()):
        return
    shown = [", ".join(f"{value:.4f}" for value in values.tolist()) for values in (policy, reference)]
    raise ValueError(
        f"Training would not start at its reference: on the first row the policy's ELBO is {shown[0]} and the "
        f"reference's {shown[1]} nats. {_cause(trainer, model, inputs)}"
    )


def _score(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """`(B,)` ELBOs."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    with trainer.accelerator.autocast():
        return on_draws(model, FIXED_NONCE)(**arguments, use_cache=False, fused_lm_head=True).log_probs.sum(1)


def _rounding(trainer: Any) -> float:
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision, torch.float32)
    dtypes = {named, *(p.dtype for p in trainer.model.parameters() if p.is_floating_point())}
    return max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes)


def _cause(trainer: Any, model: Any, inputs: dict[str, Any]) -> str:
    """What differs, and what to do about it."""
    if trainer.precompute_ref_logps:
        return (
            "The reference's values were computed or stored before: remove the files whose name begins with "
            "`reference-values-` beside the dataset, and start again."
        )
    layer = _first_different_layer(trainer, model, inputs)
    if isinstance(trainer.model, PeftModel) and "ref" not in trainer.model.peft_config:
        kind = next(iter(trainer.model.peft_config.values())).peft_type.value
        return (
            f"The adapter ({kind}) changes the output of `{layer}` before it has learnt anything, and the reference is "
            "the model without it. Initialise it so that it does nothing (for LoRA `init_lora_weights=True`); or make "
            "the model with `peft.get_peft_model` and pass that as `model`, whose adapter is then copied."
        )
    return f"The first layer whose output differs is `{layer}`. Pass a `ref_model`: the same model, loaded once more."


def _first_different_layer(trainer: Any, model: Any, inputs: dict[str, Any]) -> str:
    """In the order in which a forward finishes them; layers that only one of the two has are left out."""
    with evaluating(trainer.model), torch.no_grad():
        with _sums_of_outputs(trainer.accelerator.unwrap_model(trainer.model)) as policy:
            _score(trainer, model, inputs)
        with _sums_of_outputs(trainer.accelerator.unwrap_model(trainer.ref_model or trainer.model)) as reference:
            trainer.compute_ref_log_probs(on_draws(trainer.ref_model or trainer.model, FIXED_NONCE), inputs)
    return next((name for name, value in policy.items() if reference.get(name, value) != value), "?")


@contextmanager
def _sums_of_outputs(model: torch.nn.Module) -> Iterator[dict[str, float]]:
    """By name of the module, the sum of what it put out when it was first called inside the block."""
    sums: dict[str, float] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                sums.setdefault(name, output.double().sum().item())

        return hook

    base = base_of(model)
    handles = [module.register_forward_hook(remember(name)) for name, module in base.named_modules()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
