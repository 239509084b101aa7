"""The VRPO trainer: TRL's DPO trainer, whose log-probabilities are ELBOs on draws that policy and reference share."""

import textwrap
from typing import Any

import torch

from ...scoring.door import DPOTrainer
from ...scoring.head import ELBOHeadOutput, on_draws
from ..base import ELBOTrainerMixin
from ..displacement import CHOSEN, REJECTED, change_per_token
from ..metrics import MEANINGLESS_METRICS
from .config import DiffusionVRPOConfig


class DiffusionVRPOTrainer(ELBOTrainerMixin, DPOTrainer):
    """
    Trainer for Variance-Reduced Preference Optimization (VRPO) of masked diffusion language models.

    The method was introduced in [LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion
    Models](https://huggingface.co/papers/2505.19223): DPO in which each log π(y|x) is a Monte Carlo estimate of the
    ELBO of y given x, the policy and the reference being scored on the same masks (eqs. 7-8). The only change with
    respect to [`~trl.DPOTrainer`] is what a log-probability of a completion is; its arguments are the parent's.

    Example:
    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer

    trainer = DiffusionVRPOTrainer(
        model="GSAI-ML/LLaDA-8B-Instruct",
        args=DiffusionVRPOConfig("LLaDA-8B-VRPO", model_init_kwargs={"dtype": "bfloat16"}),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A masked diffusion model, or the path of one.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. If not given, the model without its adapter, its "ref" adapter, or a copy of it.
        args ([`DiffusionVRPOConfig`], *optional*):
            Configuration for this trainer. If not given, one with the defaults.
        **kwargs:
            `train_dataset`, `eval_dataset`, `processing_class`, `data_collator`, `callbacks`, `optimizers`,
            `quantization_config` and `peft_config`, as in [`~trl.DPOTrainer`].

    Raises:
        ValueError: the model is not a masked diffusion model, or an option has no meaning for one.
    """

    _tag_names = ["trl", "trl_diffusion", "vrpo", "masked-diffusion"]
    _name = "VRPO"
    _paper = {
        "title": "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models",
        "id": "2505.19223",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhu2025llada15,
                title        = {{LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models}},
                author       = {Fengqi Zhu and Rongzhen Wang and Shen Nie and Xiaolu Zhang and Chunwei Wu and Jun Hu and Jun Zhou and Jianfei Chen and Yankai Lin and Ji-Rong Wen and Chongxuan Li},
                year         = 2025,
                eprint       = {arXiv:2505.19223},
            }"""),  # noqa: E501 - a citation is not wrapped
    }
    _trl_module = "trl.trainer.dpo_trainer"
    _config_class = DiffusionVRPOConfig
    _row_forms = (("chosen", "rejected"),)
    _completion_columns = ("chosen_ids", "rejected_ids")
    _responses_per_row = 2
    _reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """
        VRPO eqs. 7-8, with B the ELBO estimates (eqs. 5-6) of the chosen response w and the rejected l:

            s_hat = beta * [B(w) - B_ref(w)] - beta * [B(l) - B_ref(l)],    loss = -log sigmoid(s_hat)

        B is what TRL asks `on_draws` for, in place of log-probabilities, and B_ref what `_with_reference` puts where it
        reads those of a reference. The rest is TRL's DPO loss; other values of `loss_type` replace the second equation.
        Policy and reference meet the draws of a nonce each, which are one where draws are shared.
        """
        mode = "train" if self.model.training else "eval"
        policy_nonce, reference_nonce = self._draw_nonces(mode)
        with self._diagnostics.collecting() as outputs, self._with_reference(inputs, reference_nonce) as inputs:
            result = super()._compute_loss(on_draws(model, policy_nonce), inputs, return_outputs)
            change = change_per_token(outputs[-1], torch.cat([inputs[name] for name in self._reference_columns]))
        self._learn_kappa(outputs, pairs=True)
        self._log_pairs(mode, outputs, change)
        return result

    def _log_pairs(self, mode: str, outputs: list[ELBOHeadOutput], change: torch.Tensor) -> None:
        """Beside TRL's metrics those of the score's noise; all of them means over all processes."""
        metrics = self._metrics[mode]
        for name in MEANINGLESS_METRICS:
            metrics.pop(name, None)
        changes = dict(zip((CHOSEN, REJECTED), change.chunk(2), strict=True))
        for name, of_pairs in (self._diagnostics.of_pairs(outputs) | changes).items():
            metrics[name].append(self.accelerator.gather(of_pairs).mean().item())
        if mode == "eval":  # TRL averages over batches: one of n pairs counts n times, so that the last may be smaller
            pairs = len(outputs[-1].log_probs) // 2
            for values in metrics.values():
                values.extend(values[-1:] * (pairs - 1))
