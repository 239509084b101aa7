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
    Block diffusion: a token sees its own block, noised, and the blocks before it, which are clean. The likelihood is

        log p(y | x)  >=  sum over blocks b of  ELBO_b(y_b | x, y_<b clean)        (BD3-LM, arXiv 2503.09573)

    and what predicts a token is as in decoding. Where logits are shifted, those of the first token of a block stand at
    the last token of the block before, which is clean by then. (In training it may be noised, as in Fast-dLLM v2; what
    is hidden there says nothing about text that is generated block by block, and would tie the draws of two blocks.)

    Args:
        size: tokens of a block.
        size_name: field of the configuration that has the size, where there is one; it precedes `size`.
        origin: where blocks are counted from: the first token of the `"sequence"`, or of the `"response"`. In the first
            case the end of the prompt and the beginning of the response may share a block.
        part: tokens of a block that are generated together, one part after the other; by default all.
    """

    size: int
    size_name: str = ""
    origin: Literal["sequence", "response"] = "sequence"
    part: int | None = None

    def size_in(self, config: PreTrainedConfig) -> int:
        """
        Tokens of a block of a model with this configuration.

        Raises:
            ValueError: a size that is none.
        """
        size = getattr(config, self.size_name, self.size) if self.size_name else self.size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"`{self.size_name}` of the model's configuration must be a whole number of at least 1, the tokens of "
                f"a block, got {size!r}. Give the number that the model was trained with, which its config.json has."
            )
        return size

    def numbers(self, config: PreTrainedConfig, maskable: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """
        The number of each token's block, in order: `(B, L)` int64. What it says of padding means nothing.

        Args:
            config: of the model.
            maskable: `(B, L)` bool, the tokens of the response.
            real: `(B, L)` bool, the tokens that are not padding.
        """
        place = real.long().cumsum(-1) - 1
        if self.origin == "response":
            place = place - place.gather(-1, maskable.int().argmax(-1, keepdim=True))
        return place.div(self.size_in(config), rounding_mode="floor")


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
        auto_class: name of the class that loads it: an auto class of transformers, or one of `trl_diffusion.models`
            where those would find another. By default the class that the configuration names itself.
        mask_tokens: names that a mask token has in the vocabulary of a tokenizer that does not say which it is.
        mask_token_id: the mask token, where neither the configuration nor the tokenizer has one.
        logit_shift: the logits that predict token i stand at position i minus this: 0, or 1 as in a model that was made
            from an autoregressive one.
        first_token: with a shift, what predicts the first token: the `"first"` logits, which predict the second one
            too, or `"nothing"`.
        attention: who attends to whom: all to all (`"full"`), or [`Blocks`].
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
        unscored: why the family is known only to be refused, after "cannot be scored here: "; empty if it is not.
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
    unscored: str = ""

    @property
    def in_blocks(self) -> bool:
        """Whether it is block diffusion."""
        return isinstance(self.attention, Blocks)

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
