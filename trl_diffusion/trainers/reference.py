"""
The reference of a trainer: on which draws it is scored, at each step or once before training.

Scored once (`precompute_ref_log_probs`), its values are valid for the draws they were computed on, so the policy has to
meet these draws again: those of a set, one set per epoch, in turn. The rows are scored a part at a time, and each part
is stored, so that a run that was interrupted goes on with the part it was at.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..checks.numbers import naming_the_example
from ..models.denoiser import resolve_mask_token_id
from ..models.trying import evaluating
from ..resuming.record import hash_of_rows
from ..scoring.door import prepare_deepspeed
from ..scoring.head import FIXED_NONCE, on_draws
from ..scoring.key import scoring_key
from ..scoring.sharding import gradients_stay_wanted
from .stored import Values, place_for, read, write

if TYPE_CHECKING:  # what the mixin is put in front of
    from ..scoring.door import DPOTrainer as _TRLTrainer
else:
    _TRLTrainer = object

# Added to the step for the policy's own draws when draws are not shared with the reference
_UNSHARED = 1 << 40
# Rows whose values are stored together: what an interruption can cost
_ROWS_PER_PART = 256


class ReferenceMixin(_TRLTrainer):
    """
    Put in front of a TRL trainer whose model has an ELBO head.

    Attributes:
        _reference_columns: names under which TRL reads reference values from a batch.
        _precompute_model_hash: TRL's key of the reference model.
        precompute_ref_logps: whether TRL reads reference values from the batch.
    """

    _reference_columns: tuple[str, ...]
    _precompute_model_hash: str
    precompute_ref_logps: bool
    _sampler: Any
    _model_config: Any
    _tokenizer: Any
    _completion_columns: ClassVar[tuple[str, ...]]
    _reference_engine: Any = None  # DeepSpeed's, while reference values are computed before training

    # In a step

    def _draw_nonces(self, mode: str) -> tuple[int, int]:
        """
        Draws of the policy and of the reference: the same for both, new for every step.

        Evaluation has one set of draws, so that two checkpoints meet the same noise. Training against a precomputed
        reference has the sets that were stored, one for each epoch in turn. Sets count from [`FIXED_NONCE`].
        """
        step = FIXED_NONCE if mode == "eval" else self.state.global_step + 1
        reference = step
        if self.precompute_ref_logps:
            epoch = 0 if mode == "eval" else int(self.state.epoch or 0)
            reference = FIXED_NONCE + epoch % self.args.num_reference_draw_sets
        return (reference if self.args.share_draws else step + _UNSHARED), reference

    @contextmanager
    def _with_reference(self, inputs: dict[str, Any], nonce: int) -> Iterator[dict[str, Any]]:
        """Score the reference on the draws of `nonce`, and let TRL read the result as if it had been precomputed."""
        if self.precompute_ref_logps:
            yield {**inputs, **self._stored_on(inputs, nonce - FIXED_NONCE)}
            return
        reference = self.compute_ref_log_probs(on_draws(self.ref_model or self.model, nonce), inputs)
        scored = {
            name: value for name, value in zip(self._reference_columns, reference, strict=True) if value is not None
        }
        self.precompute_ref_logps = True
        try:
            yield {**inputs, **scored}
        finally:
            self.precompute_ref_logps = False

    def _stored_on(self, inputs: dict[str, Any], draw_set: int) -> dict[str, Any]:
        """The reference values of a set, where a batch has those of several, `(B, sets)`."""
        stored = {name: inputs[name] for name in self._reference_columns if name in inputs}
        return {name: values if values.dim() == 1 else values[:, draw_set] for name, values in stored.items()}

    # Before training

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add the reference values of every set of draws to the rows; a list per row if there are several sets."""
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # TRL refuses it
        number = self.args.num_reference_draw_sets if dataset is self.train_dataset else 1
        sets = []
        for draw_set in range(number):
            label = name if number == 1 else f"{name} (draws {draw_set + 1} of {number})"
            sets.append(self._score_set(dataset, label, batch_size, draw_set))
        columns = {column: np.stack([values[column] for values in sets], axis=1) for column in sets[0]}
        if number == 1:
            columns = {column: values[:, 0] for column, values in columns.items()}
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _score_set(self, dataset: Dataset, label: str, batch_size: int, draw_set: int) -> Values:
        """Reference values of all rows on one set of draws, by column; in parts that are stored."""
        parts = []
        starts = range(0, len(dataset), _ROWS_PER_PART)
        for start in tqdm(starts, f"Scoring the reference on the {label} dataset", disable=self._is_silent):
            rows = range(start, min(start + _ROWS_PER_PART, len(dataset)))
            place = "" if len(rows) == len(dataset) else f" (rows {start} to {rows[-1]} of {len(dataset)})"
            part = dataset.select(rows)
            path, key = None, ""
            found: list[Values | None] = [None]
            if self.accelerator.is_main_process:  # what the others find may be another file
                key = self._key_of(part, draw_set)
                path = place_for(part, key) if key else None
                found = [read(path, key, len(part), label + place)]
            values = broadcast_object_list(found)[0]
            if values is None:
                values = self._score_part(part, batch_size, draw_set)
                if self.accelerator.is_main_process:
                    write(path, key, values, label + place)
            parts.append(values)
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}

    def _score_part(self, part: Dataset, batch_size: int, draw_set: int) -> Values:
        """Reference values of some rows, by column. Every process scores each N-th row, and has all values."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        # As many for each, since sharded weights are gathered by all processes together
        mine = [row % len(part) for row in range(rank, -(-len(part) // processes) * processes, processes)]
        model = on_draws(self._reference_for_scoring(), FIXED_NONCE + draw_set)
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        scored = []
        for rows in batches:
            inputs = self._prepare_inputs(self.data_collator([part[row] for row in rows]))
            with self._weights_as_in_training():
                scored.append([values for values in self.compute_ref_log_probs(model, inputs) if values is not None])
        columns = [torch.cat(column) for column in zip(*scored, strict=True)]
        whole = [self.accelerator.gather(column).view(processes, -1).T.flatten()[: len(part)] for column in columns]
        return {name: values.cpu().numpy() for name, values in zip(self._reference_columns, whole, strict=False)}

    def _reference_for_scoring(self) -> Any:
        """The reference before training; DeepSpeed places its weights when it is given a model, which is later."""
        if self.ref_model is None and self.is_deepspeed_enabled:
            if self._reference_engine is None:
                self._reference_engine = prepare_deepspeed(self.model, self.accelerator)
            return self._reference_engine
        return self.ref_model or self.model

    def _key_of(self, part: Dataset, draw_set: int) -> str:
        """What the values of some rows depend on; empty where it cannot be told, the weights being spread (ZeRO-3)."""
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return ""
        rows = hash_of_rows(part, ("prompt_ids", *self._completion_columns, "KL_completion_ids"))
        return json.dumps(
            [rows, self._precompute_model_hash, self._scoring_key(model), self._sampler.key, draw_set], default=str
        )

    def _scoring_key(self, model: Any) -> str:
        mask_token_id = resolve_mask_token_id(self._model_config, self._tokenizer)
        return scoring_key(self.accelerator.unwrap_model(model), mask_token_id, self.accelerator.mixed_precision)

    @property
    def _is_silent(self) -> bool:
        return self.args.disable_tqdm or not self.accelerator.is_main_process

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """
        Score the reference, see [`~trl.DPOTrainer.compute_ref_log_probs`].

        It has no dropout, which `disable_dropout=False` leaves to the policy.
        """
        settled = nullcontext() if self.args.disable_dropout else evaluating(self.ref_model or self.model)
        with naming_the_example(inputs, self._tokenizer), settled, gradients_stay_wanted(self.model) as restore:
            return super().compute_ref_log_probs(_after(restore, model), inputs)


def _after(prepare: Callable[[], None], model: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        prepare()
        return model(*args, **kwargs)

    return call
