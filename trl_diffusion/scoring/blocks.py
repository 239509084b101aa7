"""
The draws of one response under a block diffusion model: clean text is read once for all of them.

By definition there is one forward for each block of each draw, the noised block behind clean text. A token sees no
noised block but its own, so that one forward of all noised blocks is the same.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from ..estimators.elbo import noise_inputs
from ..models.blocks import History, denoise, doubled, read
from ..models.families import family_of
from .gradients import Score
from .output_head import token_log_probs
from .responses import Chunk, Stretch
from .sharding import Backbone, is_sharded


def block_score(
    model: PreTrainedModel, backbone: Backbone, ids: torch.Tensor, stretch: Stretch, mask_token_id: int, sharded: bool
) -> Score:
    """
    How the draws of a response are scored.

    Args:
        model: a denoiser of a block diffusion family.
        backbone: how hidden states are had, where weights are sharded.
        ids: `(T,)` prompt and response.
        stretch: what is run of them.
        mask_token_id: the mask token.
        sharded: whether the run shards weights. Policy and reference go one way, whichever of them is whole at present:
            in bfloat16 the two ways round otherwise.
    """
    text = _Text(model, ids, stretch, mask_token_id)
    if sharded or is_sharded(model):
        return Score(partial(text.score_apart, backbone))
    return Score(text.score, text.read if stretch.clean else None)


@dataclass(frozen=True)
class _Text:
    """A response with its prompt; what a chunk of draws is scored with."""

    model: PreTrainedModel
    ids: torch.Tensor
    stretch: Stretch
    mask_token_id: int

    def read(self) -> tuple[torch.Tensor, ...]:
        """The clean text's last hidden states, where they predict anything, and those of its layers."""
        clean = self.stretch.clean
        hidden, history = read(self.model, self.ids[:clean], self.stretch.numbers[:clean])
        return hidden if family_of(self.model.config).logit_shift else hidden[:0], *history.states

    def score(self, chunk: Chunk, *clean: torch.Tensor) -> torch.Tensor:
        """`(k, T)`, with what was read."""
        stretch, noised = self.stretch, self._noised(chunk)
        history = History(stretch.numbers[: stretch.clean], clean[1:])
        numbers = stretch.numbers[stretch.first : stretch.last]
        hidden = denoise(self.model, noised, numbers, stretch.first, history).flatten(0, 1)
        row, number = chunk.positions // len(self.ids), len(hidden)
        if clean and len(clean[0]):
            hidden = torch.cat([hidden, clean[0]])
        return self._log_probs(chunk, hidden, row * noised.shape[1] - stretch.first, number)

    def score_apart(self, backbone: Backbone, chunk: Chunk) -> torch.Tensor:
        """`(k, T)`, each draw behind clean text of its own."""
        stretch, noised = self.stretch, self._noised(chunk)
        rows = torch.cat([self.ids[: stretch.clean].expand(len(noised), -1), noised], dim=1)
        inputs = doubled(self.model, stretch.numbers, stretch.first, stretch.last, stretch.clean)
        hidden = backbone(self.model, rows, **inputs).flatten(0, 1)
        in_clean = chunk.positions // len(self.ids) * rows.shape[1]
        return self._log_probs(chunk, hidden, in_clean + stretch.clean - stretch.first, in_clean)

    def _noised(self, chunk: Chunk) -> torch.Tensor:
        run = slice(self.stretch.first, self.stretch.last)
        return noise_inputs(self.ids[run], chunk.masked[:, run], self.mask_token_id)

    def _log_probs(
        self, chunk: Chunk, hidden: torch.Tensor, in_noised: torch.Tensor, in_clean: torch.Tensor | int
    ) -> torch.Tensor:
        """From hidden states `(n, H)`: where the noised and the clean row of position 0 stand, or would stand."""
        place, numbers = chunk.positions % len(self.ids), self.stretch.numbers
        before = family_of(self.model.config).predicting(place)
        predicting = before + torch.where(numbers[before] == numbers[place], in_noised, in_clean)
        log_probs = token_log_probs(self.model, hidden, predicting, self.ids[place])
        scores = log_probs.new_zeros(chunk.masked.numel())
        return scores.index_copy(0, chunk.positions, log_probs).view(chunk.masked.shape)
