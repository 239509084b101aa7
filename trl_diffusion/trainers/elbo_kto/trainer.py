"""The ELBO-KTO trainer: TRL's KTO trainer, whose log-probabilities are ELBOs and whose baseline is free."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger

from ...scoring.door import KTOTrainer
from ...scoring.head import on_draws
from ..base import ELBOTrainerMixin
from ..metrics import MEANINGLESS_METRICS, saturation
from ..running import RunningMeansCallback
from .baselines import BASELINES, NEED_A_BATCH, RunningMeans, Totals
from .composition import ComposedSampler
from .config import ELBOKTOConfig

logger = get_logger(__name__)

_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


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
            `train_dataset`, `eval_dataset`, `processing_class`, `data_collator`, `compute_metrics`, `callbacks`,
            `optimizers`, `quantization_config` and `peft_config`, as in [`~trl.KTOTrainer`]. Paired datasets are
            unpaired.

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

    def _before_trl(self, model: Any, ref_model: Any, args: Any, *others: Any) -> Any:
        self._pairs_mismatched = args.baseline == "kl"
        self._warned_of_batch = False
        return super()._before_trl(model, ref_model, args, *others)

    @property
    def calculate_KL(self) -> bool:
        """Whether TRL makes and scores mismatched pairs: as the baseline says, where TRL goes by the loss type."""
        return self._pairs_mismatched

    @calculate_KL.setter
    def calculate_KL(self, _: bool) -> None:
        """TRL's constructor sets it."""

    def _after_trl(self) -> None:
        if self.args.baseline in ("ema", "ema_per_class"):
            self.add_callback(RunningMeansCallback(decay=self.args.ema_decay))
        super()._after_trl()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_composition == "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ComposedSampler(dataset["label"], self.args.batch_composition, seed)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """
        TRL's KTO loss of r - z, the policy's and the reference's ELBO being on the same draws.

        TRL subtracts the reference and, without a KL term, nothing else: z is handed to it as part of the reference.
        """
        mode = "train" if self.model.training else "eval"
        policy_nonce, reference_nonce = self._draw_nonces(mode)
        policy = on_draws(model, policy_nonce)
        with self._diagnostics.collecting() as outputs, self._with_reference(inputs, reference_nonce) as inputs:
            if self.args.baseline == "kl":
                result = super()._compute_loss(policy, inputs, return_outputs)
            else:
                labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
                arguments = {key: inputs[key] for key in ("input_ids", "attention_mask")}
                scored = policy(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
                log_ratios = scored.log_probs.detach().sum(1) - inputs["ref_logps"]
                baseline, totals = self._baseline(log_ratios, inputs["label"].bool())
                inputs = {**inputs, "ref_logps": inputs["ref_logps"] + baseline}
                with self._without_metrics(mode, _REWARDS):
                    result = super()._compute_loss(_AlreadyScored(scored, policy), inputs, return_outputs)
                self._log_baseline(mode, log_ratios, baseline, inputs["label"].bool(), totals)
                if mode == "train":
                    self._update_running_means(totals)
        for key in (*MEANINGLESS_METRICS, *(() if self.args.baseline == "kl" else ("kl",))):
            self._metrics[mode].pop(key, None)
        self._learn_kappa(self._of_matched_pairs(outputs), pairs=False)
        self._log_metrics(mode, self._diagnostics.of_rows(self._of_matched_pairs(outputs)))
        return result

    @contextmanager
    def _without_metrics(self, mode: str, names: tuple[str, ...]) -> Iterator[None]:
        """Drop what is logged under these names inside the block."""
        metrics = self._metrics[mode]
        before = {name: list(metrics[name]) for name in names if name in metrics}
        yield
        for name in names:
            metrics.pop(name, None)
        metrics.update(before)

    def _of_matched_pairs(self, outputs: list[Any]) -> list[Any]:
        """Without the scores of mismatched pairs: TRL asks for the reference, the two mismatched, and the policy."""
        if not self.calculate_KL:
            return outputs
        return [outputs[0], outputs[-1]] if len(outputs) == 4 else outputs[-1:]

    # Baseline

    def _baseline(self, log_ratios: torch.Tensor, desirable: torch.Tensor) -> tuple[torch.Tensor, Totals]:
        """The baseline z of this process's rows, from the totals over all processes."""
        local = Totals.of(log_ratios, desirable)
        total, count = self.accelerator.reduce(torch.stack([local.total, local.count]), reduction="sum")
        totals = Totals(total, count)
        name = self.args.baseline
        if name in NEED_A_BATCH:
            self._warn_of_batch(totals)
            if totals.count.sum() == 1:
                name = "none"
        running = self._running_means.means if self._running_means else RunningMeans(self.args.ema_decay)
        return BASELINES[name](log_ratios, desirable, totals, running), totals

    def _warn_of_batch(self, totals: Totals) -> None:
        desirable, undesirable = totals.count.long().tolist()
        if self._warned_of_batch or (desirable and undesirable):
            return
        self._warned_of_batch = True
        logger.warning(
            "A global micro-batch holds %d desirable and %d undesirable rows, so `baseline=%r` compares rows of one "
            "class with each other%s. Larger batches, `batch_composition='balanced'` or `baseline='ema'` avoid it. "
            "This warning is shown once; `kto/num_desirable` and `kto/num_undesirable` are logged.",
            desirable,
            undesirable,
            self.args.baseline,
            ", and a row alone with zero" if desirable + undesirable == 1 else "",
        )

    @property
    def _running_means(self) -> RunningMeansCallback | None:
        return self._callback(RunningMeansCallback)

    def _update_running_means(self, totals: Totals) -> None:
        if self._running_means:
            self._running_means.means.update(totals)

    def _log_baseline(self, mode, log_ratios, baseline, desirable, totals):
        """The rewards, of r and not of TRL's r - z, and the `kto/...` metrics."""
        metrics, beta = self._metrics[mode], self.beta
        score = beta * (log_ratios - baseline)
        sums = torch.stack([score[desirable].double().sum(), -score[~desirable].double().sum()])
        margins = self.accelerator.reduce(sums, reduction="sum") / totals.count
        names = [("chosen", "desirable"), ("rejected", "undesirable")]
        for (trl_name, name), total, count, margin in zip(names, totals.total, totals.count, margins, strict=True):
            metrics[f"kto/num_{name}"].append(count.item())
            if count:
                metrics[f"rewards/{trl_name}"].append(beta * (total / count).item())
                metrics[f"kto/margins_{name}"].append(margin.item())
        if bool(totals.count.all()):
            metrics["rewards/margins"].append(metrics["rewards/chosen"][-1] - metrics["rewards/rejected"][-1])
        self._log_metrics(mode, {"kto/baseline": baseline, "kto/saturation": saturation(score)})


class _AlreadyScored:
    """Stands for a model whose score is known: TRL asks for it once more, and the forward is not run again."""

    def __init__(self, scored: Any, model: Any):
        self.scored, self.model = scored, model

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return self.scored if fused_lm_head else self.model(*args, **kwargs)
