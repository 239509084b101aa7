"""The configuration of ELBO-KTO: TRL's KTO arguments, plus those of the estimator and the baseline."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...checks.options import KTO_LOSS_TYPES
from ...resuming.record import DIFFERENCES, OBJECTIVE, ORDER, SILENT, Difference
from ...scoring.door import KTOConfig
from ..arguments import ComparisonArguments
from ..describe import described
from .baselines import BASELINES, NEED_A_BATCH
from .composition import COMPOSITIONS


@described
@dataclass
class ELBOKTOConfig(ComparisonArguments, KTOConfig):
    r"""
    Configuration class for the [`ELBOKTOTrainer`].

    This class includes only the parameters that are specific to this trainer. All those of [`~trl.KTOConfig`] and
    [`~transformers.TrainingArguments`] are there too.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """

    differences: ClassVar[dict[str, Difference | None]] = {
        **DIFFERENCES,
        **dict.fromkeys(("baseline", "desirable_weight", "undesirable_weight"), OBJECTIVE),
        "batch_composition": ORDER,
        "ema_decay": SILENT,  # compared where the running means are restored
        "rows_per_baseline": Difference(False, "a batch baseline is a mean over another number of rows"),
    }

    groups: ClassVar[dict[str, str]] = {
        **ComparisonArguments.groups,
        "baseline": "the baseline and the order of the rows",
    }

    baseline: str | None = field(
        default=None,
        metadata={
            "help": "What a response's log-ratio is compared with, and what it needs. `'batch_mean'`, the default and "
            "the paper's: the mean over the global micro-batch, which must have more than one row. "
            "`'leave_one_out'`: the mean over the other rows of it. `'ema'`: a running mean over past batches, for "
            "batches of any size. `'ema_per_class'`: the same for each class. `'kl'`: KTO's own, the mean over "
            "mismatched pairs clamped at zero; one more forward of the policy and of the reference, "
            "`train_sampling_strategy='sequential'`, and more than one row per device. `'none'`: zero, the default "
            "and only one of `loss_type='apo_zero_unpaired'`.",
            "choices": list(BASELINES),
        },
    )
    ema_decay: float = field(
        default=0.99,
        metadata={"help": "Weight of the past in the running means of `baseline='ema'` and `'ema_per_class'`."},
    )
    batch_composition: str = field(
        default="random",
        metadata={
            "help": "Order of the classes. `'random'`: none. `'balanced'`: every stretch of rows holds its share of "
            "both. `'alternating'`: desirable and undesirable in turn, until one class is used up.",
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
        self.check_before(KTO_LOSS_TYPES, ELBOKTOConfig)
        if self.baseline is None:
            self.baseline = "none" if self.loss_type == "apo_zero_unpaired" else "batch_mean"
        self._check_baseline()
        super().__post_init__()
        self.check_after()
        self._check_batch()

    @property
    def rows_per_baseline(self) -> int | None:
        """Rows of the global micro-batch, where a baseline is a mean over them."""
        return self.per_device_train_batch_size * self.world_size if self.baseline in NEED_A_BATCH else None

    def _check_baseline(self) -> None:
        if self.loss_type == "apo_zero_unpaired" and self.baseline != "none":
            raise ValueError(
                f"`loss_type='apo_zero_unpaired'` compares with zero: `baseline={self.baseline!r}` would be ignored. "
                "Leave `baseline` unset."
            )
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
        if self.baseline == "kl" and self.per_device_train_batch_size < 2:
            raise ValueError(
                "`baseline='kl'` exchanges the completions of a batch, and `per_device_train_batch_size="
                f"{self.per_device_train_batch_size}` leaves nothing to exchange. Raise it to at least 2, or set "
                "`baseline='ema'`."
            )
        rows = self.per_device_train_batch_size * self.world_size
        if self.baseline in NEED_A_BATCH and rows < 2:
            raise ValueError(
                f"`baseline={self.baseline!r}` compares a row with its global micro-batch, which has one row "
                "(`per_device_train_batch_size=1` on one process): every score would be zero. Raise "
                "`per_device_train_batch_size`, or set `baseline='ema'`. Gradient accumulation does not enlarge it."
            )
