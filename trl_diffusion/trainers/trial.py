"""What a trainer's model is tried for when both it and its data are there."""

from typing import Any

from ..models.alignment import check_shift
from ..models.denoiser import resolve_mask_token_id
from ..scoring.gradients import SHARDED


def try_shift(trainer: Any) -> None:
    """Refuse logits that stand elsewhere than the family says, see [`check_shift`]; not tried on sharded weights."""
    if trainer._obstacle_to_immediate() == SHARDED or trainer.train_dataset is None:
        return
    model, column = trainer.accelerator.unwrap_model(trainer.model), trainer._completion_columns[0]
    rows = ((row["prompt_ids"], row[column]) for row in trainer.train_dataset)
    check_shift(model, rows, resolve_mask_token_id(model.config, trainer._tokenizer))


def refuse_router_loss(trainer: Any) -> None:
    """Refuse a loss of a router of experts, which no score returns."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"`router_aux_loss_coef={trainer.router_aux_loss_coef}` adds a loss of the router, which a score does not "
            "return. Set `router_aux_loss_coef=0.0`."
        )
