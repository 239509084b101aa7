"""The SFT trainer: TRL's SFT trainer, whose log-probabilities are ELBOs."""

import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from ...estimators.elbo import variance_of_mean
from ...scoring.head import FIXED_NONCE, ELBOHeadOutput, on_draws
from ..base import ELBOTrainerMixin
from ..metrics import MEANINGLESS_METRICS
from .config import DiffusionSFTConfig
from .parts import PartsTrainer, mapped, together


class DiffusionSFTTrainer(ELBOTrainerMixin, PartsTrainer):
    """
    Trainer for supervised fine-tuning (SFT) of masked diffusion language models.

    The method was introduced in [Large Language Diffusion Models](https://huggingface.co/papers/2502.09992): the prompt
    is shown, the response is masked, and the loss is minus a Monte Carlo estimate of the ELBO of the response given the
    prompt. The only change with respect to [`~trl.SFTTrainer`] is what a log-probability of a token is; it is also the
    way to adapt a model that was converted from an autoregressive one.

    Rows have a `prompt` and a `completion`, texts or messages; or `messages`, of which the last turn is learnt given
    those before it; or a `text`, of which all but the first token is learnt.

    Example:
    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer

    trainer = DiffusionSFTTrainer(
        model="GSAI-ML/LLaDA-8B-Base",
        args=DiffusionSFTConfig("LLaDA-8B-SFT", model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A masked diffusion model, or the path of one.
        args ([`DiffusionSFTConfig`], *optional*):
            Configuration for this trainer. If not given, one with the defaults.
        **kwargs:
            `data_collator`, `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, `optimizers`,
            `quantization_config` and `peft_config`, as in [`~trl.SFTTrainer`].

    Raises:
        ValueError: the model is not a masked diffusion model, or an option has no meaning for one.
        TypeError: an argument of [`~trl.SFTTrainer`] that has no meaning here, or an unknown one.
    """

    _tag_names = ["trl", "trl_diffusion", "sft", "masked-diffusion"]
    _name = "SFT"
    _paper = {
        "title": "Large Language Diffusion Models",
        "id": "2502.09992",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{nie2025large,
                title        = {{Large Language Diffusion Models}},
                author       = {Shen Nie and Fengqi Zhu and Zebin You and Xiaolu Zhang and Jingyang Ou and Jun Hu and Jun Zhou and Yankai Lin and Ji-Rong Wen and Chongxuan Li},
                year         = 2025,
                eprint       = {arXiv:2502.09992},
            }"""),  # noqa: E501 - a citation is not wrapped
    }
    _trl_module = "trl.trainer.sft_trainer"
    _config_class = DiffusionSFTConfig
    _has_reference = False
    _row_forms = (("prompt", "completion"), ("messages",), ("text",))
    _reference_columns = ()
    _completion_columns = ("completion_ids",)
    _responses_per_row = 1

    def __init__(self, model: Any, args: Any = None, **kwargs: Any):
        refused = {
            "formatting_func": "write the text into the rows with `dataset.map`",
            "compute_loss_func": "subclass `DiffusionSFTTrainer` and override `compute_loss`",
            "preprocess_logits_for_metrics": "there are no logits of a text",
            "optimizer_cls_and_kwargs": "pass `optimizers`, or set `optim` in the configuration",
        }
        for name in refused.keys() & kwargs.keys():
            raise TypeError(f"`{name}` is not taken by `DiffusionSFTTrainer`: {refused[name]}.")
        if getattr(args, "dataset_text_field", "text") != "text":
            self._row_forms = (*self._row_forms[:-1], (args.dataset_text_field,))  # type: ignore[misc]
        super().__init__(model, None, args, **kwargs)

    def _after_trl(self) -> None:
        self.model_accepts_loss_kwargs = True  # the loss is over all micro-batches of a step, whatever the model takes
        super()._after_trl()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, *others)
        limits = [limit for limit in (args.max_length, self._max_positions) if limit is not None]
        return mapped(
            *(dataset, together, f"Completing {others[-1]} dataset", args.dataset_num_proc),
            eos=self._tokenizer.eos_token_id,
            padding=args.eos_padding,
            longest=min(limits, default=None),
            seed=args.mask_sampler().seed,
        )

    # The loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        LLaDA eq. 5, with B the ELBO estimate of a response of n tokens:

            loss = sum over responses of -B / sum of n    or    mean over responses of -B / n,

        as `loss_average` says, over all responses of a step. That is TRL's loss of what it asks `on_draws` for.
        """
        mode = "train" if self.model.training else "eval"
        asked = on_draws(model, FIXED_NONCE if mode == "eval" else self.state.global_step + 1)
        if self.args.loss_average == "examples":
            asked = per_example(asked)
        with self._diagnostics.collecting() as outputs:
            result = super().compute_loss(asked, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        self._log_rows(mode, outputs[-1])
        return result

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """What the loss of a step is divided by: Trainer counts tokens, of which each example gets one."""
        if self.args.loss_average == "examples":
            batch_samples = [
                {"labels": batch["labels"], "shift_labels": torch.zeros(len(batch["labels"]))}
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _log_rows(self, mode: str, output: ELBOHeadOutput) -> None:
        """Beside TRL's metrics those of the estimate's noise; means over the rows of all processes."""
        metrics, elbo = self._metrics[mode], output.elbo
        assert elbo is not None and output.mask_ratio is not None and output.label_mask is not None
        for name in MEANINGLESS_METRICS:
            metrics.pop(name, None)
        of_rows = {"elbo/mask_ratio": output.mask_ratio}
        if len(elbo.samples) > elbo.draws_per_unit:
            error = variance_of_mean(elbo.samples, elbo.draws_per_unit).sqrt()
            of_rows["elbo/standard_error"] = error / output.label_mask.sum(1)
        for name, values in of_rows.items():
            metrics[name].append(self.accelerator.gather_for_metrics(values).mean().item())


def per_example(model: Callable[..., Any]) -> Callable[..., Any]:
    """The answers of a model with an ELBO head, each row divided by its number of tokens, as if it had one."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        answer = model(*args, **kwargs)
        if not kwargs.get("fused_lm_head"):
            return answer
        first = answer.label_mask & (answer.label_mask.cumsum(1) == 1)
        parts = {field.name: getattr(answer, field.name) for field in fields(answer)}
        log_probs = answer.log_probs / answer.label_mask.sum(1, keepdim=True)
        return type(answer)(**{**parts, "log_probs": log_probs, "label_mask": first})

    return ask
