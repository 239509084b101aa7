"""
What a run was, stored with each of its checkpoints and compared when one is resumed.

transformers restores weights, optimiser and data order, and takes everything else from the new command line: a resumed
run with another dataset, objective or estimator goes on without a word. The record is one dict of names and values that
JSON can hold, and one table says what a difference of each means.
"""

import json
from collections.abc import Mapping, Sequence, Sized
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.logging import get_logger

from ..estimators.draws import DRAW_VERSION
from ..models.denoiser import resolve_mask_token_id
from ..scoring.key import adapter_scaling

logger = get_logger(__name__)


class Difference(NamedTuple):
    """What it means that a run is resumed with another value: refused, as it would be two halves, or warned of."""

    is_refused: bool
    why: str


_SEEN = "some rows of this epoch would be seen twice and others never"
OBJECTIVE = Difference(True, "the objective is another one")
ORDER = Difference(True, f"it orders the rows, and {_SEEN}")
NOISE = Difference(False, "the noise of every estimate changes, and with it the loss")
SILENT = None  # changes neither what is estimated nor its noise, or is seen in the data

# Options of the configuration, and facts of the run below them. A method adds its own.
DIFFERENCES: dict[str, Difference | None] = {
    **dict.fromkeys(
        ("trainer", "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type"), OBJECTIVE
    ),
    **dict.fromkeys(("f_alpha_divergence_coef", "discopop_tau", "sync_ref_model"), OBJECTIVE),
    **dict.fromkeys(("num_mc_samples", "mask_scheme", "stratify", "control_variate", "couple_pairs"), NOISE),
    **dict.fromkeys(("level_concentration", "share_draws", "num_reference_draw_sets"), NOISE),
    **dict.fromkeys(("draws_per_forward", "elbo_gradient", "append_eos", "displacement_warning"), SILENT),
    "adapter_dtype": Difference(False, "updates are rounded in another way"),
    "precompute_ref_log_probs": Difference(
        False, "masks are the same in every epoch with a precomputed reference, and new at every step without"
    ),
    "draw_seed": Difference(False, "masks are drawn from another seed"),
    "draw_version": Difference(False, "the same seed gives other masks than before"),
    "processes": Difference(
        False, "their random states are not restored; masks and the order of the rows do not depend on them"
    ),
    "data": Difference(True, "the rows that were seen and those to come are not of one dataset"),
    "seed": ORDER,
    "rows_per_step": Difference(
        True, f"batch size x processes x accumulation; the place in an epoch is counted in steps, and {_SEEN}"
    ),
    "mask_token_id": Difference(True, "the model's input is another one"),
    "adapter": Difference(True, "the adapter's weights would be scaled in another way"),
    "reference": Difference(
        True, "its weights, a sample of which is compared, are of another model or in another precision"
    ),
    "weights": Difference(
        True, "the stored weights are not those that are trained now; use the same model and `peft_config`"
    ),
}
_SAMPLED = 64  # numbers of each weight of the reference that are compared


def make_record(trainer: Any) -> dict[str, Any]:
    """The record of a trainer that has been constructed."""
    args, dataset = trainer.args, trainer.train_dataset
    shuffled = isinstance(dataset, Sized) and args.train_sampling_strategy != "sequential"
    options = {n: getattr(args, n) for n, found in args.differences.items() if found is not SILENT and hasattr(args, n)}
    facts = {
        "trainer": type(trainer)._name,
        "data": hash_of_rows(dataset, ("prompt_ids", *trainer._completion_columns, "KL_completion_ids", "label")),
        "seed": (args.seed if args.data_seed is None else args.data_seed) if shuffled else None,
        "rows_per_step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "mask_token_id": resolve_mask_token_id(trainer._model_config, trainer._tokenizer),
        "weights": _hash_of_trained_weights(trainer.model),
        "adapter": adapter_scaling(trainer.model),
        # With FSDP a process may have a shard, or nothing
        "reference": None if trainer.is_fsdp_enabled else _hash_of_reference(trainer.model, trainer.ref_model),
        "sync_ref_model": getattr(args, "sync_ref_model", False)
        and {"every": args.ref_model_sync_steps, "alpha": args.ref_model_mixup_alpha},
        "draw_version": DRAW_VERSION,
        "draw_seed": args.mask_sampler().seed,
        "processes": args.world_size,
    }
    # As it will be when it comes back from JSON
    return json.loads(json.dumps(options | facts, default=lambda other: getattr(other, "value", str(other))))


def compare(stored: dict[str, Any], now: dict[str, Any], meaning: Mapping[str, Difference | None], where: str) -> None:
    """
    Hold the record of a checkpoint against that of the run that resumes it.

    Args:
        stored: record of the checkpoint.
        now: record of the run.
        meaning: what a difference means, by name.
        where: the checkpoint, for messages.

    Raises:
        ValueError: a difference that would make it another run.
    """
    changed = {n: (stored.get(n), now.get(n)) for n in sorted({*stored, *now}) if stored.get(n) != now.get(n)}
    if None in changed.get("reference", ()):  # not in one piece, then or now
        del changed["reference"]
    found = {name: meaning.get(name) or NOISE for name in changed}
    refused = [f"`{n}` was {a!r} and is {b!r} ({found[n].why})" for n, (a, b) in changed.items() if found[n].is_refused]
    if refused:
        raise ValueError(
            f"{where} is of another run: {'; '.join(refused)}. Resume with what it was trained with, or start a "
            "new run from its weights, without `resume_from_checkpoint`."
        )
    for name, (before, after) in changed.items():
        logger.warning(
            "Resuming %s: `%s` was %r and is %r; %s. The losses will not be those of the uninterrupted run.",
            *(where, name, before, after, found[name].why),
        )
    if now.get("data") is None:
        logger.warning("The training data are a stream: it cannot be checked that they are those of %s.", where)


def hash_of_rows(dataset: Any, columns: Sequence[str]) -> str | None:
    """A hash of the rows in their order, and of nothing but `columns`; None for a stream."""
    if not isinstance(dataset, Sized):
        return None
    digest = blake2b(digest_size=16)
    chosen = [column for column in columns if column in dataset.column_names]  # type: ignore[attr-defined]
    for batch in dataset.select_columns(chosen).with_format("arrow").iter(batch_size=1000):  # type: ignore[attr-defined]
        for column in chosen:
            values = batch[column].combine_chunks()
            digest.update(f"{column} {len(values)} ".encode())
            if hasattr(values, "value_lengths"):  # lists of ids: their lengths, then all of them in a row
                digest.update(np.asarray(values.value_lengths(), dtype="<i8").tobytes())
                values = values.flatten()
            digest.update(np.asarray(values.to_numpy(zero_copy_only=False), dtype="<i8").tobytes())
    return digest.hexdigest()


def _hash_of_reference(model: Any, ref_model: Any) -> str | None:
    """
    A hash of a sample of the reference's weights; None where they are not in one piece.

    It is a model of its own; or with an adapter what is frozen; or, scored in advance, the model as it is before
    training.
    """
    parameters = list((ref_model or model).named_parameters())
    frozen = [] if ref_model else [(name, p) for name, p in parameters if not p.requires_grad]
    digest = blake2b(digest_size=16)
    for name, parameter in frozen or parameters:
        if parameter.is_meta or hasattr(parameter, "ds_id"):
            return None
        sample = parameter.data.flatten()[:: max(1, parameter.numel() // _SAMPLED)].contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _hash_of_trained_weights(model: Any) -> str:
    """A hash of the names and shapes of the trained weights, whole even where they are sharded (ZeRO-3)."""
    shapes = [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in model.named_parameters() if p.requires_grad]
    return blake2b(repr(sorted(shapes)).encode(), digest_size=16).hexdigest()
