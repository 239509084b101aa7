"""The configuration of ELBO-KTO: TRL's KTO arguments, plus those of the estimator and the baseline."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...checks.options import KTO_LOSS_TYPES, check_loss_types, check_types
from ...resuming.record import DIFFERENCES, OBJECTIVE, ORDER, SILENT, Difference
from ...scoring.door import KTOConfig
from ..arguments import ELBOArguments
from .baselines import BASELINES, NEED_A_BATCH
from .composition import COMPOSITIONS


@dataclass
class ELBOKTOConfig(ELBOArguments, KTOConfig):
    r"""
    Configuration class for the [`ELBOKTOTrainer`].

    This class includes only the parameters that are specific to this trainer. All those of [`~trl.KTOConfig`] and
    [`~transformers.TrainingArguments`] are there too.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the baseline

        baseline (`str`, *optional*):
            What a response's log-ratio is compared with, and what it needs. `"batch_mean"`, the default and the
            paper's: the mean over the global micro-batch, which must have more than one row. `"leave_one_out"`: the
            mean over the other rows of it. `"ema"`: a running mean over past batches, for batches of any size.
            `"ema_per_class"`: the same for each class. `"kl"`: KTO's own, the mean over mismatched pairs clamped at
            zero; one more forward of the policy and of the reference, sequential sampling, and more than one row per
            device. `"none"`: zero, the only one that `loss_type="apo_zero_unpaired"` has.
        ema_decay (`float`, *optional*, defaults to `0.99`):
            Weight of the past in the running means of `baseline="ema"` and `"ema_per_class"`.
        batch_composition (`str`, *optional*, defaults to `"random"`):
            Order of the classes. `"random"`: none. `"balanced"`: every stretch of rows holds its share of both.
            `"alternating"`: desirable and undesirable in turn, until one class is used up.

        > Parameters that control the estimator

        num_mc_samples (`int`, *optional*, defaults to `8`):
            Number of mask draws per response in one estimate of its ELBO. Cost grows linearly with it.
        mask_scheme (`str`, *optional*, defaults to `"mirror"`):
            How a response is masked: `"mirror"` makes pairs of draws, the second of which masks what the first shows;
            `"fixed_count"` masks a uniformly drawn number of tokens; `"bernoulli"` masks each token with a
            uniformly drawn probability. All are unbiased, in the order of their variance.
        stratify (`bool`, *optional*, defaults to `True`):
            Whether the mask levels of a response's draws are spread evenly over their range instead of drawn
            independently. Unbiased, as a rule with less variance, no cost.
        control_variate (`str`, *optional*, defaults to `"leave_one_out"`):
            What is done about the noise from which tokens happen to be masked. `"leave_one_out"`: what the other draws
            predict of the masked tokens is subtracted, and the mean of that prediction added back; unbiased, no cost.
            `"adaptive"`: the same, and how much is subtracted is learnt from past steps. `"none"`: nothing.
        couple_pairs (`bool`, *optional*, defaults to `False`):
            Whether responses to one prompt have the same mask levels, and the same tokens masked where they have the
            same token at the same place, so that common noise cancels in the score. Unbiased, no cost. Only of use
            where a batch holds both responses of a pair.
        share_draws (`bool`, *optional*, defaults to `True`):
            Whether the policy and the reference are scored on the same masks. Turning it off is for ablations.
        draw_seed (`int`, *optional*):
            Seed of the mask draws. Defaults to `seed`.

        > Parameters that control the reference

        num_reference_draw_sets (`int`, *optional*, defaults to `1`):
            Number of sets of draws that `precompute_ref_log_probs=True` scores the reference on. Epochs take the sets
            in turn. With one set every epoch has the same draws.

        > Parameters that control the memory

        draws_per_forward (`int`, *optional*):
            Number of draws of one response that run through the model together. More is faster until the device is
            busy; memory grows with it, but not with `num_mc_samples`. By default as many as fit in 1024 tokens.
        elbo_gradient (`str`, *optional*, defaults to `"auto"`):
            How the gradient of an ELBO is computed. `"immediate"`: forward and backward of each draw at once, one
            adapter-sized buffer per response, nothing computed twice; for adapters on one device or under DDP.
            `"checkpoint"`: nothing kept, each forward run again; for full training and sharded weights. `"graph"`:
            plain autograd, whose memory grows with `num_mc_samples`. `"auto"` picks one of the first two. All give the
            same gradient.
        adapter_dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the trainable adapter weights on a quantised model. In `"bfloat16"` (TRL's choice) updates
            smaller than 1/256 of a weight are lost, which small learning rates run into.

        > Parameters that control the data

        append_eos (`bool`, *optional*, defaults to `True`):
            Whether the end-of-text token is appended to conversational completions, after the end of turn that the
            chat template writes. It is then part of the response that is scored. Completions of standard
            (non-conversational) datasets always end in it.

    > [!NOTE]
    > These parameters have default values different from [`~trl.KTOConfig`]:
    > - `train_sampling_strategy`: Defaults to `"random"` instead of `"sequential"`, which only `baseline="kl"` needs.
    """

    differences: ClassVar[dict[str, Difference | None]] = {
        **DIFFERENCES,
        **dict.fromkeys(("baseline", "desirable_weight", "undesirable_weight"), OBJECTIVE),
        "batch_composition": ORDER,
        "ema_decay": SILENT,  # compared where the running means are restored
        "rows_per_baseline": Difference(False, "a batch baseline is a mean over another number of rows"),
    }

    baseline: str | None = field(
        default=None,
        metadata={
            "help": "What a response's log-ratio is compared with: `'batch_mean'` (the default), `'leave_one_out'`, "
            "`'ema'`, `'ema_per_class'`, `'kl'` (needs mismatched pairs: more forwards and sequential sampling) or "
            "`'none'` (the only one for `loss_type='apo_zero_unpaired'`).",
            "choices": [*BASELINES, "kl"],
        },
    )
    ema_decay: float = field(
        default=0.99,
        metadata={"help": "Weight of the past in the running means of `baseline='ema'` and `'ema_per_class'`."},
    )
    batch_composition: str = field(
        default="random",
        metadata={
            "help": "Order of the classes: `'random'`, `'balanced'` (every stretch of rows holds its share of both) or "
            "`'alternating'` (desirable and undesirable in turn).",
            "choices": list(COMPOSITIONS),
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Sampler of the training rows. `baseline='kl'` needs `'sequential'`.",
            "choices": ["random", "sequential"],
        },
    )

    def __post_init__(self) -> None:
        self.check_elbo_arguments()
        check_types(self, ELBOKTOConfig)
        check_loss_types(self, KTO_LOSS_TYPES)
        _refuse_activation_offloading(self)
        if self.baseline is None:
            self.baseline = "none" if self.loss_type == "apo_zero_unpaired" else "batch_mean"
        self._check_baseline()
        super().__post_init__()
        self._check_batch()

    @property
    def rows_per_baseline(self) -> int | None:
        """Rows of the global micro-batch, where a baseline is a mean over them."""
        return self.per_device_train_batch_size * self.world_size if self.baseline in NEED_A_BATCH else None

    def _check_baseline(self) -> None:
        if self.baseline not in (*BASELINES, "kl"):
            raise ValueError(f"`baseline` must be one of {[*BASELINES, 'kl']}, got {self.baseline!r}.")
        if self.loss_type == "apo_zero_unpaired" and self.baseline != "none":
            raise ValueError(
                f"`loss_type='apo_zero_unpaired'` compares with zero: `baseline={self.baseline!r}` would be ignored. "
                "Leave `baseline` unset."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")
        if self.batch_composition not in COMPOSITIONS:
            raise ValueError(f"`batch_composition` must be one of {COMPOSITIONS}, got {self.batch_composition!r}.")
        if self.baseline == "kl" and self.train_sampling_strategy != "sequential":
            raise ValueError(
                "`baseline='kl'` pairs each prompt with its neighbour's completion, so it needs "
                f"`train_sampling_strategy='sequential'`, got {self.train_sampling_strategy!r}."
            )
        if self.batch_composition != "random" and self.train_sampling_strategy != "random":
            raise ValueError(
                f"`batch_composition={self.batch_composition!r}` and `train_sampling_strategy="
                f"{self.train_sampling_strategy!r}` both order the rows. Keep one of them."
            )

    def _check_batch(self) -> None:
        rows = self.per_device_train_batch_size * self.world_size
        if self.baseline in NEED_A_BATCH and rows < 2:
            raise ValueError(
                f"`baseline={self.baseline!r}` compares a row with its global micro-batch, which has one row "
                "(`per_device_train_batch_size=1` on one process): every score would be zero. Raise "
                "`per_device_train_batch_size`, or set `baseline='ema'`. Gradient accumulation does not enlarge it."
            )


def _refuse_activation_offloading(args: KTOConfig) -> None:
    if args.activation_offloading:
        raise ValueError(
            "`activation_offloading=True` has no meaning for a masked diffusion model: activations are recomputed, not "
            "kept, between the forward and the backward. Leave `activation_offloading` at its default, False."
        )
