"""
The ELBO head: makes a denoiser's forward answer TRL's request for log-probabilities with ELBO terms.

It is to masked diffusion models what `trl.trainer.utils.add_fused_lm_head` is to causal ones. Called with
`fused_lm_head=True`, the forward scores every response on the draws named by `draw_nonce`:

- each response runs at its exact length, its draws being the batch: no padding, no attention mask;
- only masked positions go through the output head, and the logits of a batch are never built;
- memory does not grow with the number of draws (`gradients.py`).

All K forwards happen inside one call of the wrapped model, so DDP and FSDP see one forward per micro-batch.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..estimators.draws import MaskDraws
from ..estimators.elbo import ELBO, noise_inputs, weigh
from ..models.families import blocks_of, family_of
from ..models.logits import hidden_states
from .blocks import block_score
from .door import FusedCausalLMOutput
from .gradients import (
    Score,
    carry_gradients,
    choose_gradient_mode,
    score_with_gradient,
    score_with_graph,
    trainable_parameters,
)
from .output_head import token_log_probs
from .responses import Chunk, Response, cut, place
from .sharding import Backbone, is_partitioned, recomputed_hidden_states

# The draws of precomputed reference values and of evaluation. Training steps count from one.
FIXED_NONCE = 0


@dataclass
class ELBOHeadOutput(FusedCausalLMOutput):
    """
    What TRL reads (`log_probs`: `(B, L - 1)` ELBO terms, the first column dropped) and what the diagnostics read.

    Args:
        elbo: the estimate, detached.
        mask_ratio: `(B,)` share of a row's maskable tokens that were masked, mean over draws.
    """

    elbo: ELBO | None = None
    mask_ratio: torch.Tensor | None = None


def draws_at_hand(*args: Any, **kwargs: Any) -> MaskDraws:
    """The sampler of a head that is only ever given draws, and makes none."""
    raise NotImplementedError("This head scores the draws that it is given: call `score`.")


@dataclass(frozen=True)
class ELBOHead:
    """
    Scores responses by their ELBO.

    Args:
        sampler: where the draws come from: a [`MaskSampler`], or what is called like one.
        mask_token_id: the mask token.
        draws_per_forward: draws of one response that run together as the rows of one forward. By default as many as
            fit in a budget of tokens.
        elbo_gradient: how gradients are computed, one of [`GRADIENT_MODES`].
        obstacle: what is known against an immediate gradient, beyond what the model shows.
        sharded: whether the run shards weights, be they whole where this model is scored.
        announce: told once what `elbo_gradient="auto"` has picked, and why.
        observer: called with the output of every request, for diagnostics.
    """

    sampler: Callable[..., MaskDraws]
    mask_token_id: int
    draws_per_forward: int | None = None
    elbo_gradient: str = "auto"
    obstacle: str = ""
    sharded: bool = False
    announce: Callable[[str], None] | None = None
    observer: Callable[[ELBOHeadOutput], None] | None = None
    _chosen: WeakKeyDictionary[torch.nn.Module, str] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        draw_nonce: int = FIXED_NONCE,
    ) -> ELBOHeadOutput:
        """
        Args:
            model: a denoiser with a backbone and an output head.
            input_ids: `(B, L)` prompts and responses.
            labels: `(B, L)`, -100 outside the responses.
            attention_mask: `(B, L)`, one at real tokens.
            draw_nonce: names the draws.

        Returns:
            [`ELBOHeadOutput`].

        Raises:
            ValueError: a response starts at position 0, where TRL does not look, or holds padding; or a log-probability
                is not finite.
        """
        maskable = labels != -100
        real = torch.ones_like(maskable) if attention_mask is None else attention_mask.bool()
        _refuse_misplaced(maskable, real)
        blocks = blocks_of(model.config, maskable, real)
        draws = self.sampler(maskable, input_ids, real, draw_nonce, blocks=blocks)
        elbo = self.score(model, cut(input_ids, real, draws, self.draws_per_forward, blocks), maskable, draws)
        output = _to_trl(elbo, maskable, draws.masked.sum((0, 2)) / (maskable.sum(1) * draws.num_mc_samples))
        if self.observer is not None:
            self.observer(output)
        return output

    def score(
        self, model: PreTrainedModel, responses: Sequence[Response], maskable: torch.Tensor, draws: MaskDraws
    ) -> ELBO:
        """
        Score responses that were cut already. Nothing here asks the device for a value but whether all are finite.

        Args:
            model: a denoiser with a backbone and an output head.
            responses: of a batch.
            maskable: `(B, L)` bool, the tokens of each response.
            draws: what the responses were cut with.
        """
        mode, length = self._gradient_mode(model, len(responses)), maskable.shape[1]
        backbone = hidden_states
        if mode == "checkpoint" and is_partitioned(model.get_output_embeddings()):
            backbone, mode = recomputed_hidden_states, "graph"
        scores = [self._of(model, backbone, response) for response in responses]
        chunks = [response.chunks for response in responses]
        if mode != "immediate":
            scored = [score_with_graph(*each, mode) for each in zip(scores, chunks, strict=True)]
            return weigh(place(scored, responses, length), draws)
        parameters = trainable_parameters(model)  # of this step: a callback may have frozen or freed some
        known = [score_with_gradient(*each, parameters) for each in zip(scores, chunks, strict=True)]
        elbo = weigh(place([log_probs for log_probs, _ in known], responses, length), draws)
        gradients = [gradient for _, gradient in known]
        return replace(elbo, terms=carry_gradients(elbo.terms, maskable, gradients, parameters))

    def _of(self, model, backbone, response) -> Score:
        if response.stretch is not None:
            return block_score(model, backbone, response.ids, response.stretch, self.mask_token_id, self.sharded)
        return Score(partial(_score_draws, model, backbone, response.ids, self.mask_token_id))

    def _gradient_mode(self, model, num_responses) -> str:
        """How to differentiate: settled at the first forward with a gradient, when the weights are in place."""
        if not torch.is_grad_enabled():
            return "graph"
        if model not in self._chosen:
            mode, reason = choose_gradient_mode(self.elbo_gradient, model, self.obstacle, num_responses)
            self._chosen[model] = mode
            if self.elbo_gradient == "auto" and self.announce is not None:
                self.announce(f"`elbo_gradient='auto'` is {mode!r} here: {reason}.")
        return self._chosen[model]


def add_elbo_head(model: PreTrainedModel, head: ELBOHead) -> None:
    """
    Patch `model.forward` so that `model(..., labels=labels, fused_lm_head=True)` returns an [`ELBOHeadOutput`].

    Without `fused_lm_head` the forward is the original one. Add the head before accelerate wraps the model. A second
    head takes the place of the first.
    """
    bound = model.forward
    # A function of the model, not a bound method: a copy of the model has to run its own weights. The exception is a
    # forward that hooks have closed over, accelerate's for instance.
    plain = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))
    plain = getattr(plain, "without_elbo_head", plain)  # or the first head would keep its trainer in memory

    # Keeps the model's own signature, which `generate` and the Trainer read
    @wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, draw_nonce=FIXED_NONCE, **kwargs):
        if not fused_lm_head:
            return plain(self, *args, **kwargs)
        return head(self, kwargs["input_ids"], kwargs["labels"], kwargs.get("attention_mask"), draw_nonce)

    forward.without_elbo_head = plain  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def on_draws(model: Callable[..., Any], nonce: int) -> Callable[..., Any]:
    """
    What TRL is given in the place of a model: asks it, through whatever wraps it, for its score on named draws.

    Every answer is looked at, whichever way it took: an ELBO in full precision, or an error.

    Args:
        model: a model with an ELBO head, wrapped or not.
        nonce: names the draws.

    Returns:
        What is called like the model, and raises `RuntimeError` if the answer comes from elsewhere than an ELBO head,
        or if a wrapper has rounded it.
    """

    def ask(*args: Any, **kwargs: Any) -> Any:
        answer = model(*args, draw_nonce=nonce, **kwargs)
        if kwargs.get("fused_lm_head"):
            _check_answer(answer, type(model).__name__)
        return answer

    return ask


def _check_answer(answer: Any, name: str) -> None:
    if not isinstance(answer, ELBOHeadOutput):
        raise RuntimeError(
            f"`{name}` answered a request for an ELBO with a `{type(answer).__name__}`: its ELBO head was not asked, "
            "and it would be scored as a causal model. Its `forward` was replaced after the trainer was made; leave it "
            "as it is, or make the trainer last."
        )
    if torch.finfo(answer.log_probs.dtype).bits < 32:
        raise RuntimeError(
            f"The ELBO head of `{name}` answers in float32, and {answer.log_probs.dtype} arrived: what wraps the model "
            "rounds its outputs, and sums of a thousand nats would be off by several. Let it return float32 (for "
            "FSDP2, `MixedPrecisionPolicy(output_dtype=torch.float32)`)."
        )


def _score_draws(
    model: PreTrainedModel, backbone: Backbone, ids: torch.Tensor, mask_token_id: int, chunk: Chunk
) -> torch.Tensor:
    """One forward of `k` corrupted copies of one sequence: `(k, T)` log-probabilities of masked tokens, 0 elsewhere."""
    noised = noise_inputs(ids, chunk.masked, mask_token_id)
    hidden = backbone(model, noised)
    places = chunk.positions % len(ids)
    predicting = chunk.positions - places + family_of(model.config).predicting(places)  # in the same row
    log_probs = token_log_probs(model, hidden.flatten(0, 1), predicting, ids[places])
    return log_probs.new_zeros(noised.numel()).index_copy(0, chunk.positions, log_probs).view(noised.shape)


def _refuse_misplaced(maskable: torch.Tensor, real: torch.Tensor) -> None:
    """Refuse responses that a data collator has marked where there are none."""
    at_first, in_padding = torch.stack([maskable[:, 0].any(), (maskable & ~real).any()]).tolist()
    if at_first:
        raise ValueError("A response starts at position 0: give every example a prompt of at least one token.")
    if in_padding:
        raise ValueError(
            "The data collator marks padding as part of a response, so that it would be scored: `completion_mask` (for "
            "SFT `labels`) is set where `attention_mask` is 0. Correct the collator, or leave `data_collator` out."
        )


def _to_trl(elbo: ELBO, maskable: torch.Tensor, mask_ratio: torch.Tensor) -> ELBOHeadOutput:
    terms = elbo.terms[:, 1:].clone()  # FSDP2 hooks into what the forward returns, which must not be a view
    unused = torch.zeros_like(terms, requires_grad=False)  # TRL logs statistics of logits that are never built
    return ELBOHeadOutput(
        loss=-terms.sum(),
        log_probs=terms,
        entropy=unused,
        mean_logits=unused,
        is_top1=unused.bool(),
        label_mask=maskable[:, 1:].clone(),
        elbo=replace(elbo, terms=elbo.terms.detach()),
        mask_ratio=mask_ratio,
    )
