"""
The reference of a trainer: on which draws it is scored, at each step or once before training.

Scored once (`precompute_ref_log_probs`), its values are valid for the draws they were computed on, so the policy has to
meet these draws again: those of a set, one set per epoch, in turn. TRL's own loop computes and stores the values; here
it is given a part of the rows at a time, so that a run that was interrupted goes on with the part it was at.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from ..models.denoiser import resolve_mask_token_id
from ..scoring.adapters import adapter_scaling
from ..scoring.head import FIXED_NONCE, on_draws
from ..scoring.sharding import gradients_stay_wanted

if TYPE_CHECKING:  # what the mixin is put in front of
    from ..scoring.door import DPOTrainer as _TRLTrainer
else:
    _TRLTrainer = object

logger = get_logger(__name__)

# Added to the step for the policy's own draws when draws are not shared with the reference
_UNSHARED = 1 << 40
# Parts of a model's configuration that change nothing of what it computes
_NOT_OF_THE_FUNCTION = (
    *("_name_or_path", "transformers_version", "use_cache", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
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
    _draw_set: int | None = None  # the one whose values are being stored

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
        number = self.args.num_reference_draw_sets if name == "train" else 1
        sets = []
        for draw_set in range(number):
            label = name if number == 1 else f"{name} (draws {draw_set + 1} of {number})"
            sets.append(self._score_set(dataset, label, batch_size, draw_set))
        columns = {column: np.stack([values[column] for values in sets], axis=1) for column in sets[0]}
        if number == 1:
            columns = {column: values[:, 0] for column, values in columns.items()}
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _score_set(self, dataset: Dataset, label: str, batch_size: int, draw_set: int) -> dict[str, np.ndarray]:
        """Reference values of all rows on one set of draws, by column, in parts that TRL stores."""
        # TRL keys what it stores by the rows and the model's weights
        trl_hash = self._precompute_model_hash
        settings = self._scoring_settings(self.ref_model or self.model)
        key = Hasher.hash((trl_hash, settings, self._sampler.key, self.args.max_length, draw_set))
        self._precompute_model_hash, self._draw_set = key, draw_set
        parts = []
        try:
            for start in range(0, len(dataset), _ROWS_PER_PART):
                rows = range(start, min(start + _ROWS_PER_PART, len(dataset)))
                place = "" if len(rows) == len(dataset) else f" (rows {start} to {rows[-1]} of {len(dataset)})"
                part = dataset.select(rows)
                self._remove_unreadable(part, label + place)
                scored = super()._precompute_ref_logps(part, label + place, batch_size)
                columns = [column for column in self._reference_columns if column in scored.column_names]
                parts.append(scored.select_columns(columns).with_format("numpy")[:])
        finally:
            self._precompute_model_hash, self._draw_set = trl_hash, None
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}

    def _scoring_settings(self, model: Any) -> str:
        """What the scores of a model depend on besides its weights, rows and draws."""
        model = self.accelerator.unwrap_model(model)
        settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_OF_THE_FUNCTION}
        mask = resolve_mask_token_id(self._model_config, self._tokenizer)
        parts = (settings, adapter_scaling(model), mask, self.accelerator.mixed_precision)
        return json.dumps(parts, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Score the reference, see [`~trl.DPOTrainer.compute_ref_log_probs`]; on the set that is being stored."""
        if self._draw_set is not None:
            model = on_draws(model, FIXED_NONCE + self._draw_set)
        with gradients_stay_wanted(self.model) as restore:
            return super().compute_ref_log_probs(_after(restore, model), inputs)

    def _remove_unreadable(self, part: Dataset, label: str) -> None:
        """Remove stored values that are damaged, so that they are computed again."""
        if self.accelerator.is_main_process and part.cache_files:
            rows_and_model = (part._fingerprint, self._precompute_model_hash)
            is_kto = hasattr(self, "calculate_KL")
            fingerprint = Hasher.hash((*rows_and_model, self.calculate_KL) if is_kto else rows_and_model)
            path = part._get_cache_file_path(fingerprint)
            if os.path.exists(path) and not _is_whole(path, len(part)):
                logger.warning("Stored reference values of the %s dataset are damaged and computed again.", label)
                os.remove(path)
        self.accelerator.wait_for_everyone()


def _after(prepare: Callable[[], None], model: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        prepare()
        return model(*args, **kwargs)

    return call


def _is_whole(path: str, rows: int) -> bool:
    try:
        columns = Dataset.from_file(path).with_format("numpy")[:]
    except (OSError, ValueError, pa.ArrowException):
        return False
    return all(len(values) == rows and np.isfinite(values).all() for values in columns.values())
