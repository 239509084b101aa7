"""Training arguments of the estimator, which every trainer of this package adds to its TRL parent's."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..checks.launch import check_launch
from ..checks.options import check_device, check_options
from ..estimators.control_variate import ControlVariate
from ..estimators.draws import MaskSampler
from ..estimators.schemes import SCHEMES, check_levels
from ..resuming.record import DIFFERENCES, Difference
from ..scoring.gradients import GRADIENT_MODES

CONTROL_VARIATES = ("none", "leave_one_out", "adaptive")


@dataclass
class ELBOArguments:
    """Arguments that every trainer of this package adds to its TRL parent's."""

    # What a difference of an option means to a run that is resumed
    differences: ClassVar[dict[str, Difference | None]] = DIFFERENCES
    # The first option of each group, and what the group controls
    groups: ClassVar[dict[str, str]] = {
        "num_mc_samples": "the estimator",
        "draws_per_forward": "the memory",
        "append_eos": "the data",
    }

    num_mc_samples: int = field(
        default=4,
        metadata={
            "help": "Number of mask draws per response in one estimate of its ELBO (K). Cost grows linearly with it, "
            "memory does not."
        },
    )
    mask_scheme: str = field(
        default="mirror",
        metadata={
            "help": "How a response is masked: `'mirror'` makes pairs of draws, the second of which masks what the "
            "first shows; `'fixed_count'` masks a uniformly drawn number of tokens (VRPO eq. 14); `'bernoulli'` masks "
            "each token with a uniformly drawn probability (eq. 12). All are unbiased, in the order of their variance.",
            "choices": sorted(SCHEMES),
        },
    )
    stratify: bool = field(
        default=True,
        metadata={
            "help": "Whether the mask levels of a response's draws are spread evenly over their range instead of drawn "
            "independently. Unbiased, as a rule with less variance, no cost."
        },
    )
    level_concentration: float | None = field(
        default=None,
        metadata={
            "help": "Mask levels are drawn from the law Beta(a, a) with this a, and weighed for it. 1 is uniform. "
            "Below it, draws that mask few tokens or nearly all come more often and weigh less, so that the noise does "
            "not grow with the length of a response; 0.5 is the arcsine law. Unbiased, no cost. By default uniform "
            "for SFT and with the papers' schemes; with mirror pairs, where responses are compared, by the length of a "
            "response: uniform below 30 tokens, 0.9 at 30, 0.85 at 60, 0.8 at 120, and 0.75 from 240 on."
        },
    )
    control_variate: str | None = field(
        default=None,
        metadata={
            "help": "What is done about the noise from which tokens happen to be masked. `'leave_one_out'`: what the "
            "other draws predict of the masked tokens is subtracted, and the mean of that prediction added back; "
            "unbiased, no cost. `'adaptive'`: the same, and how much is subtracted is learnt from past steps. "
            "`'none'`: nothing. By default `'leave_one_out'`, and for responses of 30 tokens and more `'adaptive'` "
            "where it can be: not for SFT, nor with `precompute_ref_log_probs=True` or `share_draws=False`.",
            "choices": list(CONTROL_VARIATES),
        },
    )
    draw_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the mask draws. Defaults to `seed`."},
    )

    draws_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Number of draws of one response that run through the model together. More is faster until the "
            "device is busy; memory grows with it, but not with `num_mc_samples`. By default as many as fit in 1024 "
            "tokens."
        },
    )
    elbo_gradient: str = field(
        default="auto",
        metadata={
            "help": "How the gradient of an ELBO is computed. `'immediate'`: forward and backward of each draw at "
            "once, one gradient in float32 kept for each response of the micro-batch, nothing computed twice; not for "
            "sharded weights. `'checkpoint'`: nothing kept, each forward run again. `'graph'`: plain autograd, whose "
            "memory grows with `num_mc_samples`. `'auto'` is `'immediate'` where these gradients take at most a "
            "quarter of the bytes of the weights, or at most a gigabyte, and else `'checkpoint'`. All give the same "
            "gradient.",
            "choices": list(GRADIENT_MODES),
        },
    )
    adapter_dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision of the trainable adapter weights on a quantised model. In `'bfloat16'` (TRL's choice) "
            "updates smaller than 1/256 of a weight are lost, which small learning rates run into.",
            "choices": ["float32", "bfloat16"],
        },
    )

    append_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether the end-of-text token is appended to conversational completions, after the end of turn "
            "that the chat template writes, unless that is the end of text already. It is then part of the response "
            "that is scored. Completions of standard (non-conversational) datasets always end in it."
        },
    )

    def check_before(self, loss_types: tuple[str, ...], *owners: type) -> None:
        """Refuse values that make no estimator, or no run; before TRL's own `__post_init__` acts on them."""
        check_options(self, loss_types, ELBOArguments, *owners)
        check_levels(self.mask_scheme, self.level_concentration_of(self.mask_scheme))
        if self.elbo_gradient == "immediate":
            self._check_immediate()

    def check_after(self) -> None:
        """Refuse what is known when `__post_init__` of transformers has run: the device, and how it is launched."""
        check_launch(self)
        check_device(self.device.type)  # type: ignore[attr-defined]

    def _check_immediate(self) -> None:
        """What of the obstacles can be seen already."""
        if getattr(self, "fp16", False):
            raise ValueError(
                "`elbo_gradient='immediate'` cannot be used with `fp16=True`: its inner backward runs before the loss "
                "is scaled. Set `bf16=True`, or `elbo_gradient='checkpoint'`."
            )
        kwargs = getattr(self, "gradient_checkpointing_kwargs", None)
        if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
            raise ValueError(
                "`elbo_gradient='immediate'` cannot be used with `gradient_checkpointing_kwargs={'use_reentrant': "
                "True}`, which an inner backward cannot go through. Set `use_reentrant` to `False`, or "
                "`elbo_gradient='checkpoint'`."
            )

    def level_concentration_of(self, scheme: str) -> float | None:
        """What was set, or uniform levels: an importance of levels would multiply an ELBO that is far from zero."""
        return 1.0 if self.level_concentration is None else self.level_concentration

    @property
    def learns_kappa(self) -> bool:
        """Whether how much the control variate subtracts, of some responses at least, is learnt from past steps."""
        return self.control_variate == "adaptive"

    def _control_variate(self) -> ControlVariate:
        initial = ControlVariate()
        return replace(initial, long_kappa=initial.kappa) if self._by_length() else initial

    def _by_length(self) -> bool:
        return self.control_variate is None and self.learns_kappa

    def mask_sampler(self) -> MaskSampler:
        """The sampler that these arguments describe."""
        seed = self.seed if self.draw_seed is None else self.draw_seed  # type: ignore[attr-defined]
        return MaskSampler(
            num_mc_samples=self.num_mc_samples,
            scheme=self.mask_scheme,
            stratify=self.stratify,
            seed=seed,
            control_variate=None if self.control_variate == "none" else self._control_variate(),
            couple_pairs=getattr(self, "couple_pairs", False),
            level_concentration=self.level_concentration_of(self.mask_scheme),
        )

    def describe_estimator(self) -> str:
        """One line for the model card."""
        a = self.level_concentration_of(self.mask_scheme)
        levels = "uniform levels" if a == 1 else "levels by length" if a is None else f"levels from Beta({a}, {a})"
        control = "by length" if self._by_length() else f"`{self.control_variate or 'leave_one_out'}`"
        return (
            f"{self.num_mc_samples} draws per response, scheme `{self.mask_scheme}`"
            f"{', stratified' if self.stratify else ''}, {levels}, control variate {control}"
        )


@dataclass
class ComparisonArguments(ELBOArguments):
    """Arguments of the trainers that compare: the policy with its reference, and responses with each other."""

    groups: ClassVar[dict[str, str]] = {**ELBOArguments.groups, "couple_pairs": "what is compared"}

    couple_pairs: bool = field(
        default=False,
        metadata={
            "help": "Whether responses to one prompt have the same mask levels, and the same tokens masked where they "
            "have the same token at the same place, so that common noise cancels in the score. Unbiased, no cost. Of "
            "use where a batch holds both responses of a pair; turn it off where it holds many responses to one "
            "prompt, whose noise would then add up."
        },
    )
    share_draws: bool = field(
        default=True,
        metadata={
            "help": "Whether the policy and the reference are scored on the same masks (what VRPO calls "
            "antithetic sampling). Turning it off is for ablations."
        },
    )
    num_reference_draw_sets: int = field(
        default=1,
        metadata={
            "help": "Number of sets of draws that `precompute_ref_log_probs=True` scores the reference on. Epochs take "
            "the sets in turn. With one set every epoch has the same draws."
        },
    )

    displacement_warning: float | None = field(
        default=0.1,
        metadata={
            "help": "Nats per token: warn once when the ELBO of chosen (desirable) responses has fallen by more than "
            "this since the start while margins rose, which is called likelihood displacement. None is off; "
            "`elbo/change_chosen` and `elbo/change_rejected` are logged all the same."
        },
    )

    def check_before(self, loss_types: tuple[str, ...], *owners: type) -> None:
        """Refuse values that make no estimator, or no run; before TRL's own `__post_init__` acts on them."""
        super().check_before(loss_types, ComparisonArguments, *owners)
        self._check_control_variate()
        self._check_reference_draw_sets()

    def level_concentration_of(self, scheme: str) -> float | None:
        """
        What was set, or the default of a scheme.

        By length for mirror pairs, since what is compared is a difference about zero; uniform for the papers' schemes.
        """
        return self.level_concentration if scheme == "mirror" else super().level_concentration_of(scheme)

    def _check_reference_draw_sets(self) -> None:
        sets = self.num_reference_draw_sets
        if sets > 1 and not getattr(self, "precompute_ref_log_probs", False):
            raise ValueError(
                f"`num_reference_draw_sets={sets}` is for `precompute_ref_log_probs=True`; a reference that is scored "
                "at every step meets new draws at every step. Leave it at its default, 1."
            )
        epochs = getattr(self, "num_train_epochs", sets)
        if sets > 1 and sets > math.ceil(epochs) and getattr(self, "max_steps", -1) <= 0:
            raise ValueError(
                f"`num_reference_draw_sets={sets}` is more than `num_train_epochs={epochs}`: each epoch takes one "
                "set, and the others would be computed for nothing. Lower the first or raise the second."
            )

    @property
    def learns_kappa(self) -> bool:
        """
        Whether how much the control variate subtracts, of some responses at least, is learnt from past steps.

        It needs the policy and the reference on the same masks in each step.
        """
        together = self.share_draws and not getattr(self, "precompute_ref_log_probs", False)
        return super().learns_kappa or (self.control_variate is None and together)

    def _check_control_variate(self) -> None:
        if self.control_variate != "adaptive":
            return
        if getattr(self, "precompute_ref_log_probs", False):
            raise ValueError(
                "`control_variate='adaptive'` changes the weights of draws from step to step, and what "
                "`precompute_ref_log_probs=True` stores is valid for one set of weights. Set "
                "`control_variate='leave_one_out'`, or leave the reference to be scored in each step."
            )
        if not self.share_draws:
            raise ValueError(
                "`control_variate='adaptive'` compares the policy with the reference draw by draw, which "
                "`share_draws=False` does not allow. Set `control_variate='leave_one_out'`."
            )

    def describe_estimator(self) -> str:
        """One line for the model card."""
        return (
            f"{super().describe_estimator()}{', pairs coupled' if self.couple_pairs else ''}, "
            f"{'shared' if self.share_draws else 'not shared'} between the policy and the reference"
        )
