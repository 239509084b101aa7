"""The ELBO-KTO trainer: TRL's KTO trainer with the loss of ELBO-KTO, whose baseline is free."""

import textwrap
from typing import Any

import torch
from accelerate.logging import get_logger

from ...scoring.door import KTOTrainer
from ...scoring.head import on_draws
from ..base import ELBOTrainerMixin
from . import objective
from .baselines import BASELINES, NEED_A_BATCH, RunningMeans, Totals
from .composition import ComposedSampler
from .config import ELBOKTOConfig
from .mismatched import EVALUATED_TOGETHER, with_mismatched_pairs
from .objective import Rows
from .running import RunningMeansCallback

logger = get_logger(__name__)


class ELBOKTOTrainer(ELBOTrainerMixin, KTOTrainer):
    """
    Trainer for ELBO-KTO: alignment of masked diffusion language models from unpaired feedback.

    The method was introduced in [Aligning Diffusion Language Models via Unpaired Preference
    Optimization](https://huggingface.co/papers/2510.23658): KTO in which log π(y|x) is a
    Monte Carlo estimate of the ELBO of y given x, on masks that the policy and the reference share, and in which the
    reference point is the mean log-ratio of the global micro-batch. With r = B_θ - B_ref, s = β (r - z) and v = σ(s)
    for a desirable response, σ(-s) for an undesirable one, the loss is the mean of λ_y (1 - v). With respect to
    [`~trl.KTOTrainer`] only the log-probability and the baseline z change; its arguments are the parent's.

    Example:
    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import ELBOKTOConfig, ELBOKTOTrainer

    trainer = ELBOKTOTrainer(
        model="GSAI-ML/LLaDA-8B-Instruct",
        args=ELBOKTOConfig("LLaDA-8B-KTO", model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A masked diffusion model, or the path of one.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. If not given, the model without its adapter, its "ref" adapter, or a copy of it.
        args ([`ELBOKTOConfig`], *optional*):
            Configuration for this trainer. If not given, one with the defaults.
        **kwargs:
            `train_dataset`, `eval_dataset`, `processing_class`, `data_collator`, `callbacks`, `optimizers`,
            `quantization_config` and `peft_config`, as in [`~trl.KTOTrainer`]. Paired datasets are unpaired.

    Raises:
        ValueError: the model is not a masked diffusion model, or an option has no meaning for one.
    """

    _tag_names = ["trl", "trl_diffusion", "elbo-kto", "masked-diffusion"]
    _name = "ELBO-KTO"
    _paper = {
        "title": "Aligning Diffusion Language Models via Unpaired Preference Optimization",
        "id": "2510.23658",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{jindal2025aligning,
                title        = {{Aligning Diffusion Language Models via Unpaired Preference Optimization}},
                author       = {Vaibhav Jindal and Hejian Sang and Chun-Mao Lai and Yanning Chen and Zhipeng Wang},
                year         = 2025,
                eprint       = {arXiv:2510.23658},
            }"""),
    }
    _trl_module = "trl.trainer.kto_trainer"
    _config_class = ELBOKTOConfig
    _row_forms = (("prompt", "completion", "label"), ("chosen", "rejected"))
    _reference_columns = ("ref_logps", "ref_KL_logps")
    _completion_columns = ("completion_ids",)
    _responses_per_row = 1

    _evaluated: list[Rows] | None = None  # the rows of the evaluation that is going on
    _warned_of_one_class = False

    # Construction and data

    def _before_trl(self, model: Any, ref_model: Any, args: Any, *others: Any) -> Any:
        self._pairs_mismatched, self._is_next_trained_on = args.baseline == "kl", True
        return super()._before_trl(model, ref_model, args, *others)

    @property
    def calculate_KL(self) -> bool:
        """Whether there are mismatched pairs, which TRL asks: the baseline says so, where TRL goes by the loss type."""
        return self._pairs_mismatched

    @calculate_KL.setter
    def calculate_KL(self, _: bool) -> None:
        """TRL's constructor sets it."""

    def _after_trl(self) -> None:
        if self.args.baseline in ("ema", "ema_per_class"):
            self.add_callback(RunningMeansCallback(decay=self.args.ema_decay))
        super()._after_trl()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._pairs_mismatched:
            return dataset
        # TRL prepares the training set first, and an evaluation set may be called "train"
        together = args.per_device_train_batch_size if self._is_next_trained_on else EVALUATED_TOGETHER
        self._is_next_trained_on = False
        return with_mismatched_pairs(dataset, dataset_name, together)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_composition == "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ComposedSampler(dataset["label"], self.args.batch_composition, seed)

    # The loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """The mean of lambda_y (1 - v) over the rows of this process, see `objective.py`."""
        mode, stored = "train" if self.model.training else "eval", self.precompute_ref_logps
        policy_nonce, reference_nonce = self._draw_nonces(mode)
        with self._diagnostics.collecting() as outputs, self._with_reference(inputs, reference_nonce) as inputs:
            rows = self._score(on_draws(model, policy_nonce), inputs)
        # The reference comes first and the policy last; what is between them are mismatched pairs
        matched = outputs[-1:] if stored else [outputs[0], outputs[-1]]
        self._learn_kappa(matched, pairs=False)
        rows |= self._diagnostics.of_rows(matched)
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        everywhere = gather({name: values.detach() for name, values in rows.items()})
        loss = self._losses(rows, everywhere).mean()
        if mode == "eval" and self._evaluated is not None:
            self._evaluated.append(everywhere)
        else:
            self._log_rows(mode, everywhere)
        if mode == "train" and self._running_means:
            self._running_means.means.update(_totals(everywhere))
        if return_outputs:
            with torch.no_grad():
                return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return loss

    def _score(self, policy: Any, inputs: Any) -> Rows:
        """The policy's ELBOs, and what they are above the reference's, which are among the inputs."""

        def elbos(prefix: str) -> torch.Tensor:
            ids, real = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
            labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
            return policy(input_ids=ids, attention_mask=real, labels=labels, fused_lm_head=True).log_probs.sum(1)

        rows = {"desirable": inputs["label"].bool(), "num_tokens": inputs["attention_mask"].sum(1)}
        rows["response_tokens"] = inputs["completion_mask"].sum(1)
        if self._pairs_mismatched:
            with torch.no_grad():
                rows["mismatched"] = elbos("KL_") - inputs["ref_KL_logps"]
        rows["elbo"] = elbos("")
        return {**rows, "log_ratio": rows["elbo"] - inputs["ref_logps"]}

    def _losses(self, rows: Rows, everywhere: Rows) -> torch.Tensor:
        """`(B,)` losses of `rows`, which are compared with all rows `everywhere`."""
        weights = (self.desirable_weight, self.undesirable_weight)
        return objective.losses(rows, self._baseline(rows, everywhere), self.beta, weights)

    def _baseline(self, rows: Rows, everywhere: Rows) -> torch.Tensor:
        """`(B,)` the baseline z of `rows`, from totals over all rows `everywhere`."""
        running = self._running_means.means if self._running_means else RunningMeans(self.args.ema_decay)
        baseline = BASELINES[self.args.baseline]
        return baseline(rows["log_ratio"].detach(), rows["desirable"], _totals(everywhere), running)

    @property
    def _running_means(self) -> RunningMeansCallback | None:
        return self._callback(RunningMeansCallback)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """
        Evaluate, see [`~transformers.Trainer.evaluation_loop`].

        The whole set takes the place of the global micro-batch: loss and metrics do not depend on how it was cut.
        """
        parts: list[Rows] = []
        self._evaluated = parts
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluated = None
        if parts:
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            output.metrics[f"{metric_key_prefix}_loss"] = self._losses(rows, rows).double().mean().item()
            self._metrics["eval"].clear()
            self._log_rows("eval", rows)
        return output

    # Metrics

    def _log_rows(self, mode: str, rows: Rows) -> None:
        """Log the metrics of a global micro-batch, or of a whole evaluation set."""
        if self.args.baseline in NEED_A_BATCH:
            self._warn_of_one_class(mode, rows["desirable"])
        logged = objective.metrics(rows, self._baseline(rows, rows), self.beta)
        if self._pairs_mismatched:
            logged["kl"] = logged["kto/baseline"]  # TRL's name for it
        for name, value in logged.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(rows["num_tokens"].sum()) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _warn_of_one_class(self, mode: str, desirable: torch.Tensor) -> None:
        number, total = int(desirable.sum()), len(desirable)
        if self._warned_of_one_class or 0 < number < total:
            return
        self._warned_of_one_class = True
        cure = (
            "Larger batches, `batch_composition='balanced'` or `baseline='ema'` avoid it."
            if mode == "train"
            else "Give a set with rows of both, or set `baseline='ema'`."
        )
        logger.warning(
            "%s holds %d desirable and %d undesirable rows, so `baseline=%r` compares rows of one class with each "
            "other%s. %s This warning is shown once; `kto/num_desirable` and `kto/num_undesirable` are logged.",
            "A global micro-batch" if mode == "train" else "An evaluation set",
            number,
            total - number,
            self.args.baseline,
            ", and a row alone with zero" if total == 1 else "",
            cure,
        )


def _totals(rows: Rows) -> Totals:
    return Totals.of(rows["log_ratio"], rows["desirable"], rows.get("mismatched"))
