"""The configuration of supervised fine-tuning: TRL's SFT arguments, plus those of the estimator."""

from dataclasses import dataclass, field
from typing import ClassVar

from ...checks.options import SFT_LOSS_TYPES
from ...resuming.record import DIFFERENCES, OBJECTIVE, SILENT, Difference
from ...scoring.door import SFTConfig
from ..arguments import ELBOArguments
from ..describe import described

AVERAGES = ("tokens", "examples")


@described
@dataclass
class DiffusionSFTConfig(ELBOArguments, SFTConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    This class includes only the parameters that are specific to this trainer. All those of [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`] are there too.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """

    differences: ClassVar[dict[str, Difference | None]] = {
        **DIFFERENCES,
        "loss_average": OBJECTIVE,
        "eos_padding": SILENT,  # seen in the data
    }

    groups: ClassVar[dict[str, str]] = {**ELBOArguments.groups, "loss_average": "supervised fine-tuning"}

    # One draw here, as LLaDA's own fine-tuning has
    num_mc_samples: int = field(default=1, metadata=dict(ELBOArguments.__dataclass_fields__["num_mc_samples"].metadata))

    loss_average: str = field(
        default="tokens",
        metadata={
            "help": "What the loss is a mean of, over all micro-batches and devices of a step: `'tokens'`, as in TRL's "
            "SFT, or `'examples'`, in which each example counts the same however long it is, as in LLaDA's.",
            "choices": list(AVERAGES),
        },
    )
    eos_padding: int = field(
        default=128,
        metadata={
            "help": "The most end-of-text tokens that follow the one that ends a completion; how many is drawn for "
            "each row, uniformly from 0 to this number, as far as `max_length` allows. They are masked and learnt like "
            "the rest. `generate` fills a canvas of fixed length, and from them a model learns to end an answer before "
            "the end of its canvas: give about as many tokens as the canvas will be longer than the answers. Plain "
            "texts get none."
        },
    )

    def __post_init__(self) -> None:
        self.check_before(SFT_LOSS_TYPES, DiffusionSFTConfig)
        if self.control_variate == "adaptive":
            raise ValueError(
                "`control_variate='adaptive'` is learnt from differences between the policy and a reference, which "
                "supervised fine-tuning has not. Set `control_variate='leave_one_out'`."
            )
        super().__post_init__()
        self.check_after()
