"""The configuration of VRPO: TRL's DPO arguments, plus those of the estimator, minus what has no meaning."""

from dataclasses import dataclass, field

from ...checks.options import DPO_LOSS_TYPES, check_loss_types
from ...scoring.door import DPOConfig
from ..arguments import ELBOArguments


@dataclass
class DiffusionVRPOConfig(ELBOArguments, DPOConfig):
    r"""
    Configuration class for the [`DiffusionVRPOTrainer`].

    This class includes only the parameters that are specific to this trainer. All those of [`~trl.DPOConfig`] and
    [`~transformers.TrainingArguments`] are there too.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the estimator

        num_mc_samples (`int`, *optional*, defaults to `8`):
            Number of mask draws per response in one estimate of its ELBO. Cost grows linearly with it.
        mask_scheme (`str`, *optional*, defaults to `"mirror"`):
            How a response is masked: `"mirror"` makes pairs of draws, the second of which masks what the first shows;
            `"fixed_count"` masks a uniformly drawn number of tokens (VRPO eq. 14); `"bernoulli"` masks each token with
            a uniformly drawn probability (eq. 12). All are unbiased, in the order of their variance.
        stratify (`bool`, *optional*, defaults to `True`):
            Whether the mask levels of a response's draws are spread evenly over their range instead of drawn
            independently. Unbiased, as a rule with less variance, no cost.
        control_variate (`str`, *optional*, defaults to `"leave_one_out"`):
            What is done about the noise from which tokens happen to be masked. `"leave_one_out"`: what the other draws
            predict of the masked tokens is subtracted, and the mean of that prediction added back; unbiased, no cost.
            `"adaptive"`: the same, and how much is subtracted is learnt from past steps. `"none"`: nothing.
        couple_pairs (`bool`, *optional*, defaults to `True`):
            Whether responses to one prompt have the same mask levels, and the same tokens masked where they have the
            same token at the same place, so that common noise cancels in the score. Unbiased, no cost. Turn it off
            where a batch holds many pairs of one prompt, whose noise would then add up.
        share_draws (`bool`, *optional*, defaults to `True`):
            Whether the policy and the reference are scored on the same masks (the "antithetic sampling" of VRPO).
            Turning it off is for ablations.
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
    > These parameters have default values different from [`~trl.DPOConfig`]:
    > - `beta`: Defaults to `0.2`, the value of the VRPO paper, instead of `0.1`.
    """

    beta: float = field(
        default=0.2,
        metadata={
            "help": "Parameter controlling the deviation from the reference model. Higher β means less deviation from "
            "the reference model."
        },
    )

    couple_pairs: bool = field(
        default=True,
        metadata={
            "help": "Whether responses to one prompt have the same mask levels, and the same tokens masked where they "
            "have the same token at the same place, so that common noise cancels in the score. Unbiased, no cost. Turn "
            "it off where a batch holds many pairs of one prompt, whose noise would then add up."
        },
    )

    def __post_init__(self) -> None:
        self.check_elbo_arguments()
        check_loss_types(self, DPO_LOSS_TYPES)
        _refuse_token_level_options(self)
        super().__post_init__()


def _refuse_token_level_options(args: DPOConfig) -> None:
    """An ELBO is a number per response: options that weigh its tokens by their log-probability have no meaning."""
    refused = {
        "use_weighting": (False, "WPO weighs a pair by the probability of each token in its left context"),
        "ld_alpha": (None, "LD-DPO discounts the log-probabilities of late tokens"),
        "padding_free": (False, "responses already run at their exact length, without padding"),
        "truncation_mode": ("keep_start", "examples longer than `max_length` are dropped, never truncated"),
        "activation_offloading": (False, "activations are recomputed, not kept, between the forward and the backward"),
    }
    for name, (default, reason) in refused.items():
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"`{name}={value!r}` has no meaning for a masked diffusion model: {reason}. Leave `{name}` at its "
                f"default, {default!r}."
            )
