"""
What the trainers of this package share: TRL's trainer, with a Monte Carlo ELBO in the place of the log-probability.

What is overridden, in the order in which a run meets it: how the model gets its scoring head (constructor), which rows
reach it (`_prepare_dataset`), which draws the policy and the reference meet (`reference.py`). Losses, references,
adapters, checkpoints and the loop are TRL's own.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ._trl import is_conversational, seam, seam_function
from .adapters import adapter_precision, cast_adapters, fitting_get_peft_model, keep_differentiable
from .data import append_eos, drop_unusable_rows, ending_token_ids, refuse_columns
from .diagnostics import ScoreDiagnostics
from .draws import MaskDraws
from .gradients import SCALED, SHARDED, refuse_immediate
from .head import FIXED_NONCE, ELBOHead, ELBOHeadOutput, add_elbo_head, has_elbo_head
from .memory_check import MemoryCheckMixin
from .model_card import write_model_card
from .models.families import FAMILIES, check_denoiser, family_of, resolve_mask_token_id, use_training_template
from .reference import ReferenceMixin
from .running_means import RunningKappaCallback

logger = get_logger(__name__)
Callback = TypeVar("Callback")


class ELBOTrainerMixin(ReferenceMixin, MemoryCheckMixin):
    """
    Put in front of a TRL trainer, makes its log-probabilities ELBOs. The subclasses are final.

    Attributes:
        _trl_module: module of the TRL trainer, where the seam is.
        _config_class: configuration of the trainer.
    """

    _trl_module: ClassVar[str]
    _config_class: ClassVar[type]

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
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = self._config_class(f"{Path(name).name}-{self._name}")
        self._check_arguments(args, train_dataset, compute_metrics)
        if not isinstance(model, str):
            self._check_model(model, processing_class)
            ref_model = ref_model if ref_model is not None else _reference_copy(model, args, peft_config)
        self._sampler = args.mask_sampler()
        self._diagnostics = ScoreDiagnostics(args.beta)
        with adapter_precision(model, args.adapter_dtype), self._seam(), self._constructing(args):
            super().__init__(
                model,
                ref_model,
                args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        cast_adapters(self.model, args.adapter_dtype)
        if args.control_variate == "adaptive":
            self.add_callback(RunningKappaCallback(self._sampler.control_variate.kappa))
        for scored in (self.model, self.ref_model):
            if scored is not None:
                _require_elbo_head(self.accelerator.unwrap_model(scored))

    def _check_arguments(self, args: Any, train_dataset: Any, compute_metrics: Any) -> None:
        if not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a `{self._config_class.__name__}`, got `{type(args).__name__}`.")
        if hasattr(train_dataset, "__len__") and len(train_dataset) == 0:
            raise ValueError("`train_dataset` has no rows. Give a dataset with at least one.")
        if compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` would be given the logits of the text without masks, which mean nothing for a "
                "masked diffusion model. Leave it out; rewards and ELBOs are logged."
            )

    def _constructing(self, args: Any) -> AbstractContextManager[None]:
        """What a subclass has to arrange while TRL's constructor runs."""
        return nullcontext()

    # Constructor: called by TRL through the seam

    def _seam(self) -> Any:
        return seam(
            self._trl_module,
            create_model_from_path=self._load_model,
            get_peft_model=fitting_get_peft_model(seam_function(self._trl_module, "get_peft_model")),
            add_fused_lm_head=self._add_head,
        )

    def _load_model(self, path: str, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config") is not None:
            kwargs.setdefault("dtype", "bfloat16")  # TRL's float32 would hold embeddings and head in four bytes
        config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs.get("trust_remote_code", False))
        if config.model_type in FAMILIES:  # TRL looks for the architecture's name in transformers
            kwargs["architecture"] = AutoModelForCausalLM
        model = seam_function("trl.trainer.utils", "create_model_from_path")(path, **kwargs)
        self._check_model(model, None)
        return model

    def _check_model(self, model: Any, tokenizer: Any) -> None:
        base = model.get_base_model() if is_peft_model(model) else model
        self._model_config = base.config
        keep_differentiable(base)
        check_denoiser(base, resolve_mask_token_id(base.config, tokenizer))

    def _add_head(self, model: Any, **_: Any) -> None:
        mask_token_id = resolve_mask_token_id(self._model_config, self._tokenizer)
        if resolve_mask_token_id(model.config, self._tokenizer) != mask_token_id:
            raise ValueError(
                f"The mask token of the model is {mask_token_id}, and its reference has {model.config.mask_token_id}. "
                "The two have to be scored on the same input: use a reference of the same family and vocabulary."
            )
        check_denoiser(model, mask_token_id)  # the reference may have come from elsewhere
        obstacle = self._obstacle_to_immediate()
        if self.args.elbo_gradient == "immediate":
            refuse_immediate(obstacle)
        head = ELBOHead(
            sampler=self._draw,
            mask_token_id=mask_token_id,
            draws_per_forward=self.args.draws_per_forward,
            elbo_gradient=self.args.elbo_gradient,
            obstacle=obstacle,
            announce=logger.info,
            observer=self._diagnostics.observe,
        )
        add_elbo_head(model, head)

    def _obstacle_to_immediate(self) -> str:
        """Mixed precision and sharding may be asked for outside the arguments, by `accelerate launch`."""
        if self.accelerator.scaler is not None:
            return SCALED
        return SHARDED if self.is_fsdp_enabled or is_deepspeed_zero3_enabled() else ""

    # Data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        refuse_columns(dataset, self._reference_columns, dataset_name)
        tokenizer = self._tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no end of text, which every completion ends in: set `tokenizer.eos_token`."
            )
        family = family_of(self._model_config)
        if use_training_template(tokenizer, family):
            logger.warning_once(
                "The tokenizer's chat template opens an assistant turn after every conversation. It was replaced by "
                "one that does so only with `add_generation_prompt=True`; the tokens are the same."
            )
        conversational = is_conversational(next(iter(dataset)))
        dataset = super()._prepare_dataset(dataset, processing_class, self._without_length_filter(args), dataset_name)
        if conversational and args.append_eos:
            dataset = append_eos(dataset, self._completion_columns, tokenizer.eos_token_id, dataset_name)
        return drop_unusable_rows(
            dataset,
            self._completion_columns,
            mask_token_id=resolve_mask_token_id(self._model_config, tokenizer),
            ending_ids=ending_token_ids(tokenizer, family.end_of_turn),
            max_length=args.max_length,
            name=dataset_name,
        )

    @staticmethod
    def _without_length_filter(args: Any) -> Any:
        """TRL drops prompts that fill `max_length` without a word; ours are counted."""
        args = copy.copy(args)
        args.max_length = None
        return args

    # Scoring

    def _draw(self, maskable: Any, rows: Any, attention_mask: Any, nonce: int) -> MaskDraws:
        """The sampler, with the kappa that was learnt so far; evaluation keeps the one of the start."""
        callback = self._callback(RunningKappaCallback)
        kappa = callback.kappa.value if callback and nonce != FIXED_NONCE else None
        return self._sampler(maskable, rows, attention_mask, nonce, kappa)

    def _learn_kappa(self, outputs: list[ELBOHeadOutput], pairs: bool) -> None:
        callback = self._callback(RunningKappaCallback)
        if callback and self.model.training:
            moments = self.accelerator.reduce(self._diagnostics.kappa_moments(outputs, pairs), reduction="sum")
            callback.kappa.observe(*moments.tolist())

    def _callback(self, kind: type[Callback]) -> Callback | None:
        """The callback of a kind that keeps a running state; a resumed run has made a new one."""
        found = [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]
        return found[0] if found else None

    def _log_metrics(self, mode: str, metrics: dict[str, torch.Tensor]) -> None:
        """Log means over all processes, of a number for each row or of one for the whole batch."""
        for key, value in metrics.items():
            self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """Evaluate, see [`~trl.DPOTrainer.evaluate`]; the trainer's own evaluation set is prepared already."""
        return super().evaluate(None if eval_dataset is self.eval_dataset else eval_dataset, **kwargs)

    # Saving

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, see [`~trl.DPOTrainer.create_model_card`]."""
        if not self.is_world_process_zero():
            return
        base_model = getattr(self.model.config, "_name_or_path", "")
        write_model_card(
            Path(self.args.output_dir) / "README.md",
            model_name=model_name or Path(self.args.output_dir).name,
            hub_model_id=self.hub_model_id,
            base_model=base_model if base_model and not Path(base_model).is_dir() else None,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            estimator=self.args.describe_estimator(),
            trainer_name=self._name,
            paper=self._paper,
        )


def _reference_copy(model: Any, args: Any, peft_config: Any) -> Any:
    """A reference for full fine-tuning of a model in memory; TRL would load it from where the model came from."""
    if peft_config is not None or is_peft_model(model) or args.precompute_ref_log_probs:
        return None
    return copy.deepcopy(model)


def _require_elbo_head(model: Any) -> None:
    base = model.get_base_model() if is_peft_model(model) else model
    if not has_elbo_head(base):
        raise RuntimeError(
            f"`{type(base).__name__}` was not given its ELBO head by trl {version('trl')}, and would be scored as a "
            "causal model. The seam described in trl_diffusion/_trl.py has moved: install a supported version of trl."
        )
