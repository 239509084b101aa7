"""
The two passes that block diffusion is made of: clean text is read once, and noised blocks are run on top of it.

A noised block sees itself and the clean blocks before it; a clean block sees itself and those before it. So what all
that comes after sees of clean text are the keys and values of its layers: they are kept, as in decoding, and any number
of noised copies is run with them. K copies of N tokens after a text of C cost C + K N tokens, where the doubled row
[clean ; noised] costs K (C + N), and the mask is N x (C + N). Positions of the copies are those of the text.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .families import blocks_of
from .logits import hidden_states


@dataclass(frozen=True)
class History:
    """
    Clean text that has been read.

    Args:
        numbers: `(C,)` int64, the block of each of its tokens.
        states: of each layer keys, then values, one layer after the other: `(1, heads, C, D)` each.
    """

    numbers: torch.Tensor
    states: tuple[torch.Tensor, ...] = ()


class Layers(Cache):
    """What layers of transformers ask for: theirs come after those of the history, and are kept when text is read."""

    def __init__(self, history: History, keeps: bool):
        super().__init__(layers=[])
        self.history, self.keeps = history, keeps
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = key_states, value_states
        if self.history.states:
            before = self.history.states[2 * layer_idx : 2 * layer_idx + 2]
            keys, values = (
                torch.cat([old.to(new.dtype).expand(len(new), -1, -1, -1), new], dim=2)
                for old, new in zip(before, (keys, values), strict=True)
            )
        if self.keeps:  # the first time: a checkpointed layer is run again
            self.kept[layer_idx] = keys, values
        return keys, values


def read(
    model: PreTrainedModel, ids: torch.Tensor, numbers: torch.Tensor, history: History | None = None
) -> tuple[torch.Tensor, History]:
    """
    Read clean text, after what was read before.

    Args:
        model: a denoiser of a block diffusion family.
        ids: `(C,)` tokens.
        numbers: `(C,)` the block of each.
        history: of the text before it, whose last block is not the first of this one.

    Returns:
        `(C, H)` last hidden states, and the history of both texts.
    """
    before = history or History(numbers[:0])
    layers = Layers(before, keeps=True)
    mask = torch.cat([_seen(numbers, before.numbers), numbers.unsqueeze(1) >= numbers], dim=1)
    hidden = _run(model, ids.unsqueeze(0), mask, len(before.numbers), layers)[0]
    if not layers.kept:
        raise ValueError(
            f"The backbone of `{type(model).__name__}` does not take `past_key_values`, so a block cannot be run on "
            "clean text that was read before. Use a causal class of transformers, see docs/adding-a-model.md."
        )
    states = tuple(state for index in sorted(layers.kept) for state in layers.kept[index])
    # A checkpointed layer holds on to it until it is run again, and so would what it holds to its layers: a cycle
    layers.keeps, layers.kept = False, {}
    return hidden, History(torch.cat([before.numbers, numbers]), states)


def denoise(
    model: PreTrainedModel, noised: torch.Tensor, numbers: torch.Tensor, first: int, history: History
) -> torch.Tensor:
    """
    Run noised copies of blocks, each on the clean blocks before it.

    Args:
        model: a denoiser of a block diffusion family.
        noised: `(k, N)` tokens, copies of one stretch of text in which some are hidden.
        numbers: `(N,)` the block of each.
        first: position of the first of them in the text.
        history: of clean text: all blocks before the last of these, at least.

    Returns:
        `(k, N, H)` last hidden states.
    """
    mask = torch.cat([_seen(numbers, history.numbers), numbers.unsqueeze(1) == numbers], dim=1)
    return _run(model, noised, mask, first, Layers(history, keeps=False))


def doubled(
    model: PreTrainedModel, numbers: torch.Tensor, first: int, last: int, clean: int
) -> dict[str, torch.Tensor]:
    """
    Both passes as one: what the backbone is given beside rows `(k, C + N)` of clean text and a noised copy of a stretch
    of it. No text is shared; but nothing leaves a layer besides its output, as sharded weights need it.

    Args:
        model: a denoiser of a block diffusion family.
        numbers: `(T,)` the block of each token of the text.
        first, last: the noised stretch, `last` not included.
        clean: C.
    """
    text, noised = numbers[:clean], numbers[first:last]
    sees_clean = torch.cat([text.unsqueeze(1) >= text, _seen(noised, text)])
    nothing = torch.zeros(clean, len(noised), dtype=torch.bool, device=numbers.device)
    sees_noised = torch.cat([nothing, noised.unsqueeze(1) == noised])
    places = torch.arange(len(numbers), device=numbers.device)
    positions = torch.cat([places[:clean], places[first:last]]).unsqueeze(0)
    return {
        "attention_mask": _as_asked(torch.cat([sees_clean, sees_noised], dim=1), model),
        "position_ids": positions,
    }


def as_they_are(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float32 and last hidden states of one row `(1, L)`, nothing of which is noise to the model."""
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    blocks = blocks_of(model.config, everywhere, everywhere)
    if blocks is None:
        return _answer(model, ids), hidden_states(model, ids)
    logits = _answer(model, ids, attention_mask=block_causal(model, blocks, everywhere))
    return logits, read(model, ids[0], blocks[0])[0].unsqueeze(0)


def _answer(model: PreTrainedModel, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    answer = model(input_ids=ids, **inputs)
    if getattr(answer, "logits", None) is None:
        raise ValueError(
            f"`{type(model).__name__}` answers with a `{type(answer).__name__}`, which has no `logits`. Use a class "
            "whose one head is that of the vocabulary, as `AutoModelForMaskedLM` loads it."
        )
    return answer.logits.float()


def block_causal(model: PreTrainedModel, numbers: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """
    The attention mask of whole rows in which each token sees its own block and those before it, as they are.

    Args:
        model: a denoiser of a block diffusion family.
        numbers: `(B, L)` the block of each token.
        real: `(B, L)` bool, the tokens that are not padding.
    """
    sees = (numbers.unsqueeze(2) >= numbers.unsqueeze(1)) & real.unsqueeze(1)
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)  # padding sees something, too
    return _as_asked(sees | itself, model)


def _seen(numbers: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return numbers.unsqueeze(1) > clean


def _run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, first: int, layers: Layers) -> torch.Tensor:
    positions = torch.arange(first, first + ids.shape[1], device=ids.device).unsqueeze(0)
    return run_on(layers, model, ids, mask, positions)


def run_on(
    layers: Layers, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """
    `(B, N, H)` last hidden states of tokens behind keys and values that were kept before, and are kept now if `layers`
    says so.

    Args:
        layers: what was kept.
        model: whose backbone takes it.
        ids: `(B, N)` tokens.
        mask: `(N, C + N)` or `(B, N, C + N)` bool, which of all each sees; N may be 1 for all that see the same.
        positions: `(1, N)` or `(B, N)`.

    Raises:
        ValueError: the attention takes no mask.
    """
    inputs = {"attention_mask": _as_asked(mask, model), "position_ids": positions}
    inputs[name_of_cache(model.base_model.__class__)] = layers
    with _layers_take_a_history(model):
        return hidden_states(model, ids, **inputs)


@lru_cache
def name_of_cache(backbone: Any) -> str:
    """The argument of a class of backbones that takes a history; transformers called it otherwise before 5.24."""
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


def _as_asked(mask: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """A mask `(..., Q, S)` as `(B, 1, Q, S)`, in the form that the attention takes."""
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ValueError(
            f"`attn_implementation={kind!r}` cannot be told what a block sees. Load the model with "
            "`attn_implementation='sdpa'`."
        )
    if kind == "eager":  # which adds
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    return mask.unsqueeze(-3) if mask.dim() == 3 else mask[None, None]


@contextmanager
def _layers_take_a_history(model: torch.nn.Module) -> Iterator[None]:
    """
    Checkpointed layers of transformers drop what is cached, since writing it twice would be wrong. Here it is read, and
    what is kept of a layer that is run again is that of the first time.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        vars(layer)["_can_checkpoint_with_cache"] = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_can_checkpoint_with_cache", None)
