"""
What a run was, stored with each of its checkpoints and compared when one is resumed.

transformers restores weights, optimiser and data order, and takes everything else from the new command line: a resumed
run with another dataset, objective or estimator goes on without a word. The record travels in `trainer_state.json`.
Data, objective and order have to be the same; what changes the noise of the estimator only is warned of. docs/trust.md
has the table.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..estimators.draws import DRAW_VERSION
from ..models.denoiser import resolve_mask_token_id
from ..resuming.checkpoints import read_state, record_in
from ..scoring.adapters import adapter_scaling
from .arguments import ELBOArguments
from .elbo_kto.baselines import NEED_A_BATCH

logger = get_logger(__name__)

_OF_THE_OBJECTIVE = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"),
    *("discopop_tau", "baseline", "desirable_weight", "undesirable_weight", "sync_ref_model"),
)
_OBJECTIVE = "the objective is another one"
_ORDER = "some rows of this epoch would be seen twice and others never"
_NOISE = "the noise of every estimate changes, and with it the loss"
# What a difference means. A run that went on with one of these would be two halves that are not one run.
REFUSED = {
    **dict.fromkeys(("trainer", *_OF_THE_OBJECTIVE), _OBJECTIVE),
    "data": "the rows that were seen and those to come are not of one dataset",
    "seed": f"it orders the rows, and {_ORDER}",
    "batch_composition": f"it orders the rows, and {_ORDER}",
    "rows_per_step": f"batch size x processes x accumulation; the place in an epoch is counted in steps, and {_ORDER}",
    "mask_token_id": "the model's input is another one",
    "adapter": "the adapter's weights would be scaled in another way",
    "reference": "its weights, a sample of which is compared, are of another model or in another precision",
    "weights": "the stored weights are not those that are trained now; use the same model and `peft_config`",
}
# Any other option of the estimator is warned of as noise
WARNED = {
    "draw_version": "the same seed gives other masks than before",
    "draw_seed": "masks are drawn from another seed",
    "adapter_dtype": "updates are rounded in another way",
    "precomputed": "masks are the same in every epoch with a precomputed reference, and new at every step without",
    "rows_per_micro_batch": "a batch baseline is a mean over another number of rows",
    "processes": "their random states are not restored; masks and the order of the rows do not depend on them",
}
# Options of the estimator that change neither what is estimated nor its noise; what `append_eos` does is in the data
_WITHOUT_EFFECT = ("draws_per_forward", "elbo_gradient", "append_eos")
_OPTIONS = (*_OF_THE_OBJECTIVE, "batch_composition")
_SAMPLED = 64  # numbers of each weight of the reference that are compared


class RunRecord(TrainerCallback, ExportableState):
    """
    Saves the record with the trainer's state.

    Args:
        record: names to values that JSON can hold.
    """

    def __init__(self, record: dict[str, Any]):
        self.record = record

    def state(self) -> dict[str, Any]:
        return {"args": {"record": self.record}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of the run that is now, also where the checkpoint had that of another or none
        state.stateful_callbacks[type(self).__name__] = self.state()


def make_record(trainer: Any) -> dict[str, Any]:
    """The record of a trainer that has been constructed."""
    args, dataset = trainer.args, trainer.train_dataset
    estimator = [field.name for field in fields(ELBOArguments) if field.name not in _WITHOUT_EFFECT]
    micro_batch = args.per_device_train_batch_size * args.world_size
    shuffled = isinstance(dataset, Dataset) and args.train_sampling_strategy != "sequential"
    return {
        **{name: _plain(getattr(args, name)) for name in (*estimator, *_OPTIONS) if hasattr(args, name)},
        "trainer": type(trainer)._name,
        "data": fingerprint(dataset, ("prompt_ids", *trainer._completion_columns, "KL_completion_ids", "label")),
        "seed": (args.seed if args.data_seed is None else args.data_seed) if shuffled else None,
        "rows_per_step": micro_batch * args.gradient_accumulation_steps,
        "mask_token_id": resolve_mask_token_id(trainer._model_config, trainer._tokenizer),
        "weights": _fingerprint_of_weights(trainer.model),
        "adapter": _plain(adapter_scaling(trainer.model)),
        "reference": _fingerprint_of_reference(trainer),
        "draw_version": DRAW_VERSION,
        "draw_seed": args.mask_sampler().seed,
        "precomputed": args.precompute_ref_log_probs,
        "rows_per_micro_batch": micro_batch if getattr(args, "baseline", None) in NEED_A_BATCH else None,
        "processes": args.world_size,
    }


def compare_with(checkpoint: str, now: dict[str, Any]) -> None:
    """
    Hold the record in a checkpoint against that of the run that resumes it.

    Raises:
        ValueError: a difference that would make it another run.
    """
    stored = record_in(read_state(checkpoint))
    if stored is None:
        logger.warning(
            "%s has no record of its run (it was saved by another version or program), so it cannot be checked that "
            "data, objective and estimator are the same.",
            checkpoint,
        )
        return
    names = sorted({*stored, *now})
    if None in (stored.get("reference"), now.get("reference")):
        names.remove("reference")
    changed = {name: (stored.get(name), now.get(name)) for name in names if stored.get(name) != now.get(name)}
    refused = [f"`{n}` was {a!r} and is {b!r} ({REFUSED[n]})" for n, (a, b) in changed.items() if n in REFUSED]
    if refused:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(refused)}. Resume with what it was trained with, or start a "
            "new run from its weights, without `resume_from_checkpoint`."
        )
    for name, (before, after) in changed.items():
        logger.warning(
            "Resuming %s: `%s` was %r and is %r; %s. The losses will not be those of the uninterrupted run.",
            *(checkpoint, name, before, after, WARNED.get(name, _NOISE)),
        )
    if now.get("data") is None:
        logger.warning("The training data are a stream: it cannot be checked that they are those of %s.", checkpoint)


def fingerprint(dataset: Any, columns: Sequence[str]) -> str | None:
    """A hash of the rows in their order, and of nothing but `columns`; None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    digest = blake2b(digest_size=16)
    chosen = [column for column in columns if column in dataset.column_names]
    for batch in dataset.select_columns(chosen).with_format("arrow").iter(batch_size=1000):
        for column in chosen:
            values = batch[column].combine_chunks()
            digest.update(f"{column} {len(values)} ".encode())
            if hasattr(values, "value_lengths"):  # lists of ids: their lengths, then all of them in a row
                digest.update(np.asarray(values.value_lengths(), dtype="<i8").tobytes())
                values = values.flatten()
            digest.update(np.asarray(values.to_numpy(zero_copy_only=False), dtype="<i8").tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As it will be when it comes back from JSON."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))


def _fingerprint_of_reference(trainer: Any) -> str | None:
    """
    A hash of a sample of the reference's weights; None where they are not in one piece.

    It is a model of its own; or with an adapter what is frozen; or, scored in advance, the model as it is before
    training.
    """
    if trainer.is_fsdp_enabled:  # a process may have a shard, or nothing
        return None
    parameters = list((trainer.ref_model or trainer.model).named_parameters())
    frozen = [] if trainer.ref_model else [(name, p) for name, p in parameters if not p.requires_grad]
    digest = blake2b(digest_size=16)
    for name, parameter in frozen or parameters:
        if parameter.is_meta or hasattr(parameter, "ds_id"):
            return None
        sample = parameter.data.flatten()[:: max(1, parameter.numel() // _SAMPLED)].contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint_of_weights(model: Any) -> str:
    """A hash of the names and shapes of the trained weights, whole even where they are sharded (ZeRO-3)."""
    shapes = [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in model.named_parameters() if p.requires_grad]
    return blake2b(repr(sorted(shapes)).encode(), digest_size=16).hexdigest()
