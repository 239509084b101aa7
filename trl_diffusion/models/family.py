"""
A model family as one record: everything that the rest of the package asks of a model and cannot see in it.

A family is one literal of [`Family`]. The literals stand in the table of `families.py`; those with classes of their own
beside these. docs/adding-a-model.md says how to write one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Blocks:
    """
    Block-causal attention: a token sees its own block and the blocks before it, which are clean.

    Args:
        size: tokens of a block.
        size_name: field of the configuration that has the size, where there is one; it precedes `size`.
        origin: where blocks are counted from: the first token of the `"sequence"`, or of the `"response"`.
    """

    size: int
    size_name: str = ""
    origin: Literal["sequence", "response"] = "sequence"

    def size_in(self, config: PreTrainedConfig) -> int:
        """Tokens of a block of a model with this configuration."""
        return getattr(config, self.size_name, self.size) if self.size_name else self.size


@dataclass(frozen=True)
class Head:
    """
    What lies between the last hidden state of the backbone and the logits, besides the output embedding.

    Whether the output embedding is a plain matrix is not a fact of the family, and is seen where it is used.

    Args:
        transform: what hidden states pass first, in order: paths of modules, from the model, and names of activations
            of transformers (`ACT2FN`) that are no modules, such as RoBERTa's "gelu".
        scale: field of the configuration that logits are multiplied with.
        soft_cap: field of the configuration with c in  logits -> c * tanh(logits / c),  which comes after the scale.
    """

    transform: tuple[str, ...] = ()
    scale: str = ""
    soft_cap: str = ""

    def numbers(self, config: PreTrainedConfig) -> tuple[float, float | None]:
        """Scale and soft cap of a model with this configuration: 1 and None where it has none."""
        scale, soft_cap = (getattr(config, name) if name else None for name in (self.scale, self.soft_cap))
        return 1.0 if scale is None else scale, soft_cap


@dataclass(frozen=True)
class Family:
    """
    Facts of a model family. The defaults are those of any transformers model that sees both sides of a token.

    Args:
        name: for messages.
        model_types: values of `config.model_type` that checkpoints of the family have.
        only_if: what their configuration has besides; several families may share a `model_type`.
        auto_class: name of the transformers auto class that loads it. By default the class that the configuration names
            itself.
        mask_tokens: names that a mask token has in the vocabulary of a tokenizer that does not say which it is.
        mask_token_id: the mask token, where neither the configuration nor the tokenizer has one.
        logit_shift: the logits that predict token i stand at position i minus this: 0, or 1 as in a model that was made
            from an autoregressive one.
        first_token: with a shift, what predicts the first token: the `"first"` logits, which predict the second one
            too, or `"nothing"`.
        attention: who attends to whom: `"full"`, or [`Blocks`]. Only full attention can be scored.
        noise: what takes the place of a hidden token: the mask token (`"absorbing"`), or any (`"uniform"`); or texts of
            other lengths do (`"edits"`). Only absorbing noise can be scored.
        head: how hidden states become logits.
        end_of_turn: tokens that end an assistant turn in the chat template.
        append_eos: whether the end of text follows the end of an assistant turn.
        training_chat_template: template to use in training if the tokenizer's own ignores `add_generation_prompt`.
        chat_template: template for a tokenizer that has none.
        lora_target_modules: `target_modules` of a LoRA adapter that names none; the output head must not match.
        unquantized: names of modules that stay as they are when the rest is quantised.
        sampling: arguments of `generate` that are not the sampler's own defaults, as pairs.
    """

    name: str = "bidirectional transformers model"
    model_types: tuple[str, ...] = ()
    only_if: Callable[[PreTrainedConfig], bool] | None = field(default=None, compare=False, repr=False)
    auto_class: str = ""
    mask_tokens: tuple[str, ...] = ("<|mask|>", "<|MASK|>")
    mask_token_id: int | None = None
    logit_shift: int = 0
    first_token: Literal["first", "nothing"] = "first"
    attention: Literal["full"] | Blocks = "full"
    noise: Literal["absorbing", "uniform", "edits"] = "absorbing"
    head: Head = Head()
    end_of_turn: tuple[str, ...] = ()
    append_eos: bool = True
    training_chat_template: str | None = None
    chat_template: str | None = None
    lora_target_modules: str = "all-linear"
    unquantized: tuple[str, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether a checkpoint with this configuration is one of the family."""
        return config.model_type in self.model_types and (self.only_if is None or self.only_if(config))

    def predicting(self, places: torch.Tensor) -> torch.Tensor:
        """Positions of the logits that predict the tokens at `places`."""
        return (places - self.logit_shift).clamp(min=0)

    def in_place(self, logits: torch.Tensor) -> torch.Tensor:
        """`(B, L, V)` logits of a model, moved to the positions of the tokens that they predict."""
        if self.logit_shift == 0:
            return logits
        return logits[:, self.predicting(torch.arange(logits.shape[1], device=logits.device))]

    def key(self) -> str:
        """All facts as one text that is the same in every process: part of the key of whatever is stored of a model."""
        facts = {name: value for name, value in asdict(self).items() if name != "only_if"}
        return json.dumps(facts, sort_keys=True)
