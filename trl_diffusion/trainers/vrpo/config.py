"""The configuration of VRPO: TRL's DPO arguments, plus those of the estimator, minus what has no meaning."""

from dataclasses import dataclass, field

from ...checks.options import DPO_LOSS_TYPES
from ...scoring.door import DPOConfig
from ..arguments import ComparisonArguments
from ..describe import described


@described
@dataclass
class DiffusionVRPOConfig(ComparisonArguments, DPOConfig):
    r"""
    Configuration class for the [`DiffusionVRPOTrainer`].

    This class includes only the parameters that are specific to this trainer. All those of [`~trl.DPOConfig`] and
    [`~transformers.TrainingArguments`] are there too.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """

    beta: float = field(
        default=0.2,
        metadata={
            "help": "Parameter controlling the deviation from the reference model. Higher β means less deviation from "
            "the reference model. The default is the value of the VRPO paper."
        },
    )

    # On by default here, where a batch holds both responses of each pair
    couple_pairs: bool = field(
        default=True, metadata=dict(ComparisonArguments.__dataclass_fields__["couple_pairs"].metadata)
    )

    def __post_init__(self) -> None:
        self.check_before(DPO_LOSS_TYPES)
        super().__post_init__()
        self.check_after()
