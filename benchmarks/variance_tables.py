"""
Every mask of a response scored once, and every estimator read off as a weighted sum.

A masking scheme is a linear design: its estimate is  sum_k sum_i weight[k, i] * log p(y_i | masks[k]),  and the weights
depend on the masks only. So a [`Table`] holds, for each distinct mask of a response and each hidden token i, what the
policy and the reference give it, and a sketch of the gradient of log p_theta(y_i) with respect to the output head W:

    d log p(y_i) / dW  =  (onehot(y_i) - softmax) outer hidden,     sketched as  S_v (onehot - softmax) kron S_h hidden

with fixed random S_v (8, V) and S_h (8, d) whose entries have mean 0 and variance 1/8, so that the squared norm of the
64 numbers is, on average, that of the gradient. Estimators that use the same masks share their forwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trl_diffusion import MaskDraws

SKETCH = 8  # by SKETCH
TOKENS_PER_FORWARD = 4096
TERMS_AT_ONCE = 2**22  # numbers gathered at once when tables are read


class Sketch:
    """The random projections of one model's head gradient."""

    def __init__(self, vocabulary: int, width: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(vocabulary, SKETCH, generator=generator) / SKETCH**0.5
        self.hidden = torch.randn(width, SKETCH, generator=generator) / SKETCH**0.5

    def __call__(self, log_probs: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`(N, V)` log-probabilities, `(N,)` targets and `(N, d)` hidden states to `(N, SKETCH**2)`."""
        error = self.tokens[targets] - log_probs.exp() @ self.tokens
        return torch.einsum("na,nb->nab", error, hidden @ self.hidden).flatten(1)


@dataclass
class Table:
    """
    What the tokens of one response of length L get under N distinct masks.

    Args:
        masks: `(N, L)` bool.
        policy, reference: `(N, L)` nats, log-probabilities of hidden tokens; zero elsewhere.
        sketch: `(N, L, SKETCH**2)`, of the policy's gradient; zero where nothing is hidden.
        place: row of each mask, by [`mask_key`].
    """

    masks: torch.Tensor
    policy: torch.Tensor
    reference: torch.Tensor
    sketch: torch.Tensor
    place: dict[bytes, int]

    def find(self, masks: torch.Tensor) -> torch.Tensor:
        """Rows of masks `(..., L)`."""
        rows = [self.place[key] for key in map(mask_key, masks.flatten(0, -2).numpy())]
        return torch.tensor(rows).view(masks.shape[:-1])

    def read(self, draws: MaskDraws) -> dict[str, torch.Tensor]:
        """
        Estimates of R repeats.

        Args:
            draws: masks and weights `(K, R, L)`, one repeat in the place of a row.

        Returns:
            `policy` and `reference`, `(R,)` nats, and `gradient` `(R, SKETCH**2)`, of the policy's ELBO.
        """
        rows, weight = self.find(draws.masked), draws.weight
        size = max(1, TERMS_AT_ONCE // (weight.shape[0] * weight.shape[2] * SKETCH**2))
        parts = zip(rows.split(size, dim=1), weight.split(size, dim=1), strict=True)
        gradient = torch.cat([torch.einsum("krl,krld->rd", w, self.sketch[r]) for r, w in parts])
        weight = weight.double()
        values = {name: (weight * getattr(self, name)[rows]).sum((0, 2)) for name in ("policy", "reference")}
        return {**values, "gradient": gradient}


def mask_key(mask) -> bytes:
    """A mask `(L,)` as something to look up."""
    return mask.tobytes()


def distinct(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The distinct masks among tensors `(..., L)`. The empty one is among them: Bernoulli masks can be empty."""
    flat = torch.cat([part.flatten(0, -2) for part in masks])
    flat = torch.cat([flat, torch.zeros_like(flat[:1])])
    return torch.unique(flat, dim=0)


@torch.no_grad()
def score(policy, reference, prompt: list[int], response: list[int], masks: torch.Tensor, sketch: Sketch) -> Table:
    """Run both models once on each of the masks `(N, L)`; only hidden positions go through the head."""
    ids = torch.tensor(prompt + response)
    hidden_part = torch.zeros(len(masks), len(ids), dtype=torch.bool)
    hidden_part[:, len(prompt) :] = masks
    scored = {"policy": [], "reference": [], "sketch": []}
    for part in hidden_part.split(max(1, TOKENS_PER_FORWARD // len(ids))):
        targets = ids.expand(part.shape)[part]
        log_probs, hidden = _log_probs(policy, ids, part)
        scored["policy"].append(log_probs.gather(1, targets.unsqueeze(1)).squeeze(1))
        scored["sketch"].append(sketch(log_probs, targets, hidden))
        log_probs, _ = _log_probs(reference, ids, part)
        scored["reference"].append(log_probs.gather(1, targets.unsqueeze(1)).squeeze(1))
    flat = {name: torch.cat(parts) for name, parts in scored.items()}
    placed = {name: value.new_zeros(*masks.shape, *value.shape[1:]) for name, value in flat.items()}
    for name, value in flat.items():
        placed[name][masks] = value
    return Table(masks, **placed, place={mask_key(mask): row for row, mask in enumerate(masks.numpy())})


def _log_probs(model, ids, masked):
    """`(number of hidden tokens, V)` log-probabilities at the hidden positions, and their hidden states."""
    noised = ids.expand(masked.shape).masked_fill(masked, model.config.mask_token_id)
    hidden = model.base_model(input_ids=noised).last_hidden_state[masked]
    return model.get_output_embeddings()(hidden).log_softmax(-1), hidden
