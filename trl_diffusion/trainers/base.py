"""
What the trainers of this package share: TRL's trainer, with a Monte Carlo ELBO in the place of the log-probability.

What is overridden, in the order in which a run meets it: how the model gets its scoring head (constructor), which rows
reach it (`data.py`), which draws the policy and the reference meet (`running.py`, `reference.py`). Losses, references,
adapters, checkpoints and the loop are TRL's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..checks.datasets import check_datasets
from ..checks.inputs import check_arguments, check_models, check_placed, check_same_vocabulary, require_trainable
from ..checks.numbers import FiniteGradients, naming_the_example
from ..models.denoiser import check_denoiser, resolve_mask_token_id
from ..models.dropout import turn_off_dropout
from ..models.positions import position_limit
from ..planning.fit import warn_of_memory
from ..resuming.record import make_record
from ..resuming.run import checkpoint_to_resume, finish_checkpoint, load_best_adapter, saving_a_checkpoint
from ..scoring.adapters import base_of, check_reference_of_adapters, fitting_get_peft_model, reference_copy
from ..scoring.door import check_asked_for, seam, seam_function
from ..scoring.gradients import SCALED, SHARDED, refuse_immediate
from ..scoring.head import ELBOHead, add_elbo_head
from ..scoring.precision import cast_adapters, keep_differentiable
from ..scoring.ready_adapter import ReadyAdapter, take_over
from .coupling import CouplingWatch
from .data import DataMixin
from .loading import (
    check_new_adapter,
    completed,
    find_model,
    load_model,
    load_tokenizer,
    loading_options,
    tokenizer_of,
)
from .metrics import ScoreDiagnostics
from .model_card import write_model_card
from .processes import ProcessesMixin
from .reference import ReferenceMixin
from .running import RunningKappaCallback, RunningMixin
from .start import check_before_training

logger = get_logger(__name__)


class ELBOTrainerMixin(DataMixin, RunningMixin, ReferenceMixin, ProcessesMixin):
    """
    Put in front of a TRL trainer, makes its log-probabilities ELBOs. The subclasses are final.

    Attributes:
        _trl_module: module of the TRL trainer, where the seam is.
        _config_class: configuration of the trainer.
        _responses_per_row: responses of a row that are trained on.
        _has_reference: whether the loss compares the policy with a reference.
        _paper: title, id and citation of the method.
    """

    _trl_module: ClassVar[str]
    _config_class: ClassVar[type]
    _responses_per_row: ClassVar[int]
    _has_reference: ClassVar[bool] = True
    _paper: ClassVar[dict[str, str]]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        args = args or self._default_arguments(model)
        check_arguments(args, self._config_class, compute_metrics)
        check_models(model, ref_model, processing_class)
        if self._has_reference:
            check_reference_of_adapters(model, ref_model, peft_config)
        check_datasets(args, train_dataset, eval_dataset, self._row_forms, self._reference_columns)
        ref_model, processing_class = self._before_trl(model, ref_model, args, processing_class, peft_config)
        with self._or_undone():
            with self._inside_trl():
                super().__init__(
                    *(model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class),
                    callbacks=callbacks,
                    optimizers=optimizers,
                    quantization_config=quantization_config,
                    peft_config=peft_config,
                )
            self._after_trl()

    def _default_arguments(self, model: Any) -> Any:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return self._config_class(f"{Path(name).name}-{self._name}")

    # Construction: before, inside and after TRL's constructor

    def _before_trl(self, model: Any, ref_model: Any, args: Any, tokenizer: Any, peft_config: Any) -> tuple[Any, Any]:
        """What TRL's constructor will meet: draws, diagnostics, the reference of a model in memory, a tokenizer."""
        self._sampler = args.mask_sampler()
        self._diagnostics = ScoreDiagnostics(getattr(args, "beta", 1.0))
        self._coupling = CouplingWatch(self._sampler.couple_pairs)
        self._headed: list[torch.nn.Module] = []
        self._adapter_dtype = args.adapter_dtype
        self._ready_adapter: ReadyAdapter | None = None
        self._revision: str | None = None
        self._reference_is_given = ref_model is not None
        if ref_model is not None:
            check_placed(ref_model, "ref_model")
        if isinstance(model, str):  # checked when it is loaded
            options = loading_options(args)
            source = find_model(model, options)
            check_new_adapter(source, peft_config, args.output_dir)
            self._revision = None if source.is_adapter else options.get("revision")
            return ref_model, tokenizer or load_tokenizer(source, options)
        check_placed(model, "model")
        base = self._go_by(model)
        tokenizer = tokenizer or tokenizer_of(base.config, loading_options(args))
        check_denoiser(base, resolve_mask_token_id(base.config, tokenizer))
        self._ready_adapter = take_over(model, args.adapter_dtype)
        needed = ref_model is None and self._has_reference
        return (reference_copy(model, args, peft_config) if needed else ref_model), tokenizer

    @contextmanager
    def _inside_trl(self) -> Iterator[None]:
        """Steps of TRL's constructor that are ours: the model from its path, its adapter and a copy of it, its head."""
        replacements: dict[str, Any] = {
            "create_model_from_path": self._load_model,
            "get_peft_model": fitting_get_peft_model(seam_function(self._trl_module, "get_peft_model"), self._revision),
            "add_fused_lm_head": self._add_head,
        }
        try:
            with seam(self._trl_module, **replacements):
                yield
        finally:
            if self._ready_adapter:
                self._ready_adapter.release()

    @contextmanager
    def _or_undone(self) -> Iterator[None]:
        """A trainer that is not completed leaves no reference in the user's model, which the next would refuse."""
        try:
            yield
        except BaseException:
            if self._ready_adapter:
                self._ready_adapter.undo()
            raise

    def _after_trl(self) -> None:
        """A trainer that is complete: checked, and with the callbacks that watch its run."""
        for model in filter(None, (self.model, self.ref_model)):
            check_asked_for(model, self._headed)
        cast_adapters(self.model, self.args.adapter_dtype)
        self._let_gradients_come_once()
        if self.args.learns_kappa:
            self.add_callback(RunningKappaCallback(self._sampler.control_variate.learnt_kappa))
        check_before_training(self)
        self._record = make_record(self)
        self.add_callback(FiniteGradients())

    # Called by TRL's constructor

    def _load_model(self, path: str, **kwargs: Any) -> Any:
        model = load_model(find_model(path, kwargs), kwargs)
        check_placed(model, "model")
        self._go_by(model)  # tried when it gets its head: its tokenizer, which may name the mask, is not there yet
        self._ready_adapter = take_over(model, self._adapter_dtype)
        return model

    def _go_by(self, model: Any) -> Any:
        """Remember the configuration that draws and data go by; the model below its adapters."""
        base = completed(base_of(model))
        self._model_config, self._max_positions = base.config, position_limit(base)
        keep_differentiable(base)
        return base

    def _add_head(self, model: Any, **_: Any) -> None:
        """The head of the policy or of its reference, which may have come from elsewhere."""
        model = base_of(model)  # a `ref_model` may have an adapter
        mask_token_id = resolve_mask_token_id(self._model_config, self._tokenizer)
        check_same_vocabulary(self._model_config, model.config, self._tokenizer)
        keep_differentiable(model)  # the reference too: kernels for inference round otherwise than the policy's
        check_denoiser(model, mask_token_id)
        if getattr(self.args, "disable_dropout", False):
            turn_off_dropout(model)
        model.config.mask_token_id = mask_token_id  # also where only the tokenizer had it: the checkpoint says it
        obstacle = self._obstacle_to_immediate()
        if self.args.elbo_gradient == "immediate":
            refuse_immediate(obstacle)
        head = ELBOHead(
            sampler=self._draw,
            mask_token_id=mask_token_id,
            draws_per_forward=self.args.draws_per_forward,
            elbo_gradient=self.args.elbo_gradient,
            obstacle=obstacle,
            sharded=self._shards_weights(),
            announce=logger.info,
            observer=self._diagnostics.observe,
        )
        add_elbo_head(model, head)
        self._headed.append(model)

    def _obstacle_to_immediate(self) -> str:
        """Mixed precision and sharding may be asked for outside the arguments, by `accelerate launch`."""
        if self.accelerator.scaler is not None:
            return SCALED
        return SHARDED if self._shards_weights() else ""

    def _shards_weights(self) -> bool:
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, see [`~transformers.Trainer.train`]; warns first if it is not expected to fit on the device.

        `resume_from_checkpoint=True` picks the last whole checkpoint. A broken one is refused, and so is one of a run
        with other data, another objective or another order of the rows; other draws are warned of.
        """
        require_trainable(self.model)
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint, self._record)
        warn_of_memory(self)
        return super().train(checkpoint, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch, see [`~transformers.Trainer.compute_loss`]."""
        if self.model.training:
            self._coupling.look(inputs)
        with naming_the_example(inputs, self._tokenizer):
            return super().compute_loss(model, inputs, *args, **kwargs)

    # Saving, see resuming/

    def _load_best_model(self) -> None:
        if not load_best_adapter(self):
            super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving_a_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that each process saves; `trainer_state.json` follows."""
        super()._save_rng_state(output_dir)
        finish_checkpoint(self, output_dir, self._record)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, see [`~trl.DPOTrainer.create_model_card`]."""
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name, tags)
