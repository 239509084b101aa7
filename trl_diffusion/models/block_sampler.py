"""
Generation block by block: what block diffusion models are made for.

A finished block is read once more, as the text that it has become, and its keys and values are kept: they are what they
would be if the whole text were read again, so that nothing is lost by it. A step runs the present block alone.

Blocks are counted where the model counts them, so that the end of the prompt may share a block with the beginning of
the response. Rows of different prompts have blocks of their own and run one by one.
"""

from typing import Any

import torch

from .blocks import History, denoise, read
from .families import blocks_of, family_of
from .family import Blocks
from .logits import logits_of
from .predictions import is_end, predict, reveal_counts, surest
from .sampler_arguments import SamplerArguments, Tokens


def generate_blocks(
    model: Any, prompt: torch.Tensor, arguments: SamplerArguments, tokens: Tokens, generator: torch.Generator | None
) -> torch.Tensor:
    """
    A response to one prompt.

    Args:
        model: of a block diffusion family.
        prompt: `(P,)` tokens, without padding.
        arguments: of the sampler.
        tokens: what they mean.
        generator: of the noise; none without it.

    Returns:
        `(max_new_tokens,)` tokens. Blocks after the one in which the response ended are left masked.
    """
    text = torch.cat([prompt, prompt.new_full((arguments.max_new_tokens,), tokens.mask)])
    is_response = (torch.arange(len(text), device=text.device) >= len(prompt)).unsqueeze(0)
    blocks = blocks_of(model.config, is_response, torch.ones_like(is_response))
    assert blocks is not None
    filling = _Filling(model, text, blocks[0], arguments, tokens, generator)
    done = int((blocks[0] < blocks[0, len(prompt)]).sum()) if len(prompt) else 0
    filling.read(0, done)
    for size in blocks[0, done:].unique_consecutive(return_counts=True)[1].tolist():
        filling.fill(done, done + size)
        done += size
        if bool(is_end(text[len(prompt) : done], tokens).any()) or done == len(text):
            break
        filling.read(done - size, done)
    return text[len(prompt) :]


class _Filling:
    """A text that is being filled, and what of it was read."""

    def __init__(
        self,
        model: Any,
        text: torch.Tensor,
        numbers: torch.Tensor,
        arguments: SamplerArguments,
        tokens: Tokens,
        generator: torch.Generator | None,
    ):
        self.model, self.text, self.numbers = model, text, numbers
        self.arguments, self.tokens, self.generator = arguments, tokens, generator
        self.history, self.last = History(numbers[:0]), torch.empty(0)
        family = family_of(model.config)
        assert isinstance(family.attention, Blocks)
        self.shift, size = family.logit_shift, family.attention.size_in(model.config)
        self.part = min(size, family.attention.part or size)

    def read(self, first: int, last: int) -> None:
        """Read a stretch of text that will not change, which begins where reading has stopped."""
        if last > first:
            hidden, self.history = read(self.model, self.text[first:last], self.numbers[first:last], self.history)
            self.last = hidden[-1:]

    def fill(self, first: int, last: int) -> None:
        """Fill what is masked of one block: its parts from left to right, each in steps."""
        if self.shift and self.text[first] == self.tokens.mask and first:
            self._keep(first, first + 1, 1)  # predicted from clean text alone, so that no step can change it
        arguments, part = self.arguments, self.part
        steps = max(1, part * arguments.num_steps // arguments.max_new_tokens)
        for start in range(first, last, part):
            end = min(start + part, last)
            gaps = int((self.text[start:end] == self.tokens.mask).sum())
            drawn = gaps if arguments.remasking == "ancestral" else part
            for count in reveal_counts(drawn, steps, arguments.remasking, self.generator):
                if count and bool((self.text[start:end] == self.tokens.mask).any()):
                    self._keep(start, end, count)

    def _keep(self, start: int, end: int, count: int) -> None:
        """Predict what is masked between two places of the present block, and keep the surest."""
        places = start + (self.text[start:end] == self.tokens.mask).nonzero().squeeze(1)
        logits = self._logits(places)
        everywhere = torch.arange(len(places), device=places.device)
        predicted, confidence = predict(logits, everywhere, self.generator, self.arguments, self.tokens)
        if self.arguments.is_ordered_by_chance:
            confidence = torch.rand(len(places), generator=self.generator, device=places.device)
        threshold = self.arguments.confidence_threshold
        # 1 turns that of the family off
        kept = surest(confidence.unsqueeze(0), [count], None if threshold == 1 else threshold)[0]
        self.text[places[kept]] = predicted[kept]

    def _logits(self, places: torch.Tensor) -> torch.Tensor:
        """`(n, V)` logits for the tokens at `places` of one block."""
        inside = self.numbers == self.numbers[places[0]]
        first = len(self.history.numbers)
        before = family_of(self.model.config).predicting(places)
        if bool((before < first).all()):
            return logits_of(self.model, self.last)
        hidden = denoise(self.model, self.text[inside].unsqueeze(0), self.numbers[inside], first, self.history)[0]
        if first:
            hidden = torch.cat([self.last, hidden])
        return logits_of(self.model, hidden[before - first + (first > 0)])
