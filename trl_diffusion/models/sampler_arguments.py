"""
What `generate` is asked for: the arguments of a diffusion sampler, read from where transformers lets them stand.

Nothing is ignored in silence: an argument of autoregressive decoding that would change the result is refused by name.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from .families import family_of
from .family import Blocks, Family

ORDERED_BY_CHANCE = ("random", "ancestral")
REMASKING = ("low_confidence", "topk_margin", "entropy", *ORDERED_BY_CHANCE)
BLOCK_CACHES = ("prefix", "dual")
_DEFAULT_MAX_NEW_TOKENS = 128
# Arguments of autoregressive decoding that change nothing here: with any value, and with the value that is off
_HARMLESS = {"use_cache", "cache_implementation", "max_length", "transformers_version"}
_OFF = GenerationConfig._get_default_generation_params() | {"top_k": 0}
_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "decoder_start_token_id"}


@dataclass(frozen=True)
class SamplerArguments:
    """
    Arguments of `generate` that a diffusion sampler has. All of them can be given to `generate` or be attributes of
    the `GenerationConfig`.

    Args:
        max_new_tokens: length of the response canvas, in tokens.
        steps: denoising steps in all. Defaults to `max_new_tokens`, one token a step, and may be more only where
            `remasking="ancestral"`.
        block_length: length of the blocks that are filled left to right. Defaults to `max_new_tokens`, one block. Block
            diffusion models have blocks of their own.
        remasking: which predictions a step keeps: `"low_confidence"` those with the highest probability,
            `"topk_margin"` with the largest distance from the second most probable token, `"entropy"` with the least
            entropy (both as in Dream, arXiv 2508.15487), `"random"` any. `"ancestral"` draws how many as well: each
            token has a step of its own, and one that reveals nothing costs no forward (RADD, arXiv 2406.03736).
        confidence_threshold: keep every prediction of the block with at least this probability, and always the most
            probable, instead of a fixed number in each step (Fast-dLLM, arXiv 2505.22618): as many steps as it takes.
            None is off. A block diffusion model keeps them besides those that `steps` asks for, and has a threshold of
            its own, which 1 turns off.
        block_cache: an approximation (Fast-dLLM): keys and values of what is outside of the block are computed when the
            block begins, and the other steps run the block and what follows it (`"prefix"`), or the block alone
            (`"dual"`). None is off. The cache of block diffusion models is exact, and always there.
        cache_refresh: steps of a block after which what `block_cache` keeps is computed anew; 1 is every step, which is
            exact. By default only when a block begins.
        logits_eos_inf: never predict the end of text, the first of `eos_token_id`, as LLaDA does for code.
        confidence_eos_eot_inf: keep predictions of a token of `eos_token_id` only where no other is left in the block,
            as LLaDA does for long answers. Give the end of turn too: `eos_token_id=[126081, 126348]` for LLaDA.
        temperature: of the Gumbel noise on the logits; 0 is greedy.
        cfg_scale: strength w of unsupervised classifier-free guidance (SMDM, arXiv 2410.18514): logits are
            `(1 + w) * conditional - w * unconditional`, where the unconditional ones have the prompt masked. 0 is off,
            otherwise each step costs two forwards.
        seed: of the noise. A row's noise depends on the seed and on its own prompt only. By default drawn from torch's
            global generator.
        num_return_sequences: responses for each prompt.
        return_dict_in_generate: whether to return a `GenerateDecoderOnlyOutput`.
    """

    max_new_tokens: int = _DEFAULT_MAX_NEW_TOKENS
    steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"
    confidence_threshold: float | None = None
    block_cache: str | None = None
    cache_refresh: int | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int | None = None
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False

    @property
    def num_steps(self) -> int:
        return self.max_new_tokens if self.steps is None else self.steps

    @property
    def block_size(self) -> int:
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def is_ordered_by_chance(self) -> bool:
        return self.remasking in ORDERED_BY_CHANCE

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "steps", "block_length", "cache_refresh", "seed", "num_return_sequences"):
            if not isinstance(getattr(self, name), int | None):
                raise ValueError(f"`{name}` must be a whole number, got {getattr(self, name)!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.block_size < 1 or self.max_new_tokens % self.block_size:
            raise ValueError(
                f"`block_length` ({self.block_size}) must divide `max_new_tokens` ({self.max_new_tokens})."
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"`seed` must fit in 64 bits, got {self.seed}.")
        if self.remasking not in REMASKING:
            raise ValueError(f"`remasking` must be one of {REMASKING}, got {self.remasking!r}.")
        self._check_steps()
        self._check_switches()
        self._check_cache()
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number that is not negative, got {value!r}.")
        if self.num_return_sequences < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, got {self.num_return_sequences}.")

    def _check_steps(self) -> None:
        num_blocks = self.max_new_tokens // self.block_size
        is_too_many = self.num_steps > self.max_new_tokens and self.remasking != "ancestral"
        if self.num_steps % num_blocks or self.num_steps < num_blocks or is_too_many:
            raise ValueError(
                f"`steps` must be a multiple of the number of blocks ({num_blocks}) and at most `max_new_tokens` "
                f"({self.max_new_tokens}), but for `remasking='ancestral'`, got {self.num_steps}."
            )

    def _check_cache(self) -> None:
        if self.block_cache is not None and self.block_cache not in BLOCK_CACHES:
            raise ValueError(f"`block_cache` must be None or one of {BLOCK_CACHES}, got {self.block_cache!r}.")
        if self.cache_refresh is None:
            return
        if self.block_cache is None:
            raise ValueError(
                f"`cache_refresh={self.cache_refresh}` is for `block_cache`, which is off: set it to one of "
                f"{BLOCK_CACHES}, or leave `cache_refresh` out."
            )
        if self.cache_refresh < 1:
            raise ValueError(f"`cache_refresh` must be at least 1 step, got {self.cache_refresh}.")

    def _check_switches(self) -> None:
        """Those of single papers, which do not all go together."""
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.confidence_eos_eot_inf and self.is_ordered_by_chance:
            raise ValueError(
                f"`confidence_eos_eot_inf=True` orders by confidence, and `remasking={self.remasking!r}` does not."
            )
        threshold = self.confidence_threshold
        if threshold is not None and (not isinstance(threshold, int | float) or not 0 < threshold <= 1):
            raise ValueError(f"`confidence_threshold` must be None or above 0 and at most 1, got {threshold!r}.")


@dataclass(frozen=True)
class Tokens:
    """
    Tokens that mean something to the sampler.

    Args:
        mask: stands for a position that is still to be filled.
        pad: what follows the end.
        ends: tokens that end a response.
        size: of the vocabulary; an output head may be larger.
    """

    mask: int
    pad: int
    ends: tuple[int, ...]
    size: int


def read_arguments(
    config: PreTrainedConfig,
    generation_configs: tuple[GenerationConfig | None, ...],
    kwargs: dict[str, Any],
    prompt_length: int,
) -> tuple[SamplerArguments, Tokens]:
    """
    Arguments of the sampler, the last word first: `kwargs`, the generation configurations from the last, the family's.

    Raises:
        ValueError: an argument that the sampler does not have, values that do not fit, or no mask token.
    """
    family = family_of(config)
    given = dict(family.sampling)
    for values in (*(each.to_dict() for each in generation_configs if each is not None), kwargs):
        given.update({name: value for name, value in values.items() if value is not None})
    if "max_length" in given and "max_new_tokens" not in given:
        given["max_new_tokens"] = given["max_length"] - prompt_length
        if given["max_new_tokens"] < 1:
            raise ValueError(
                f"`max_length={given['max_length']}` counts the prompt too, which has {prompt_length} tokens. Give "
                "`max_new_tokens`."
            )
    do_sample = given.pop("do_sample", None)
    if do_sample is False:
        given["temperature"] = 0.0
    elif do_sample:
        given.setdefault("temperature", 1.0)
    known = {field.name for field in fields(SamplerArguments)}
    _refuse_unknown(given, known)
    arguments = SamplerArguments(**{name: given[name] for name in known if name in given})
    _check_family(arguments, family, config)
    tokens = _tokens(given, config, family.mask_token_id)
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        if getattr(arguments, name) and not tokens.ends:
            raise ValueError(f"`{name}=True` goes by `eos_token_id`, and there is none: pass it.")
    return arguments, tokens


def _check_family(arguments: SamplerArguments, family: Family, config: PreTrainedConfig) -> None:
    """Refuse what the family's sampler does not have."""
    threshold, by_confidence = arguments.confidence_threshold, arguments.remasking == "low_confidence"
    if not isinstance(family.attention, Blocks):
        if threshold is not None and (arguments.steps is not None or not by_confidence):
            raise ValueError(
                f"`confidence_threshold={threshold}` decides by the probability how many tokens a step reveals: leave "
                f"`steps` out and `remasking` at 'low_confidence', got steps={arguments.steps} and "
                f"{arguments.remasking!r}."
            )
        return
    size = family.attention.size_in(config)
    if arguments.cfg_scale > 0:
        raise ValueError(
            f"`cfg_scale={arguments.cfg_scale}` is not there for block diffusion models such as {family.name}. Leave "
            "it out."
        )
    if arguments.block_cache is not None:
        raise ValueError(
            f"`block_cache={arguments.block_cache!r}` is an approximation for models that see the whole canvas. Leave "
            f"it out: {family.name} is a block diffusion model, whose cache is exact and always there."
        )
    if arguments.block_length not in (None, size):
        raise ValueError(
            f"`block_length={arguments.block_length}` is not that of the model: {family.name} was made for blocks of "
            f"{size} tokens. Leave it out."
        )
    if not by_confidence and threshold not in (None, 1):
        raise ValueError(
            f"`confidence_threshold={threshold}` is for `remasking='low_confidence'`, and "
            f"`remasking={arguments.remasking!r}` does not look at the probability. Set `confidence_threshold=1`."
        )


def _tokens(given: dict[str, Any], config: PreTrainedConfig, mask_of_family: int | None) -> Tokens:
    masks = (given.get("mask_token_id"), getattr(config, "mask_token_id", None), mask_of_family)
    mask = next((token for token in masks if token is not None), None)
    if mask is None:
        raise ValueError("The model has no `mask_token_id`: set `model.config.mask_token_id` or pass it.")
    ends = given.get("eos_token_id", config.eos_token_id)
    ends = ends.tolist() if isinstance(ends, torch.Tensor) else ends
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    pad = given.get("pad_token_id", config.pad_token_id)
    return Tokens(mask, pad if pad is not None else (ends[0] if ends else 0), ends, config.vocab_size)


def _refuse_unknown(given: dict[str, Any], known: set[str]) -> None:
    for name, value in given.items():
        if name in known | _TOKEN_IDS | _HARMLESS or name.startswith("_"):
            continue
        if value is False or value == _OFF.get(name):
            continue
        raise ValueError(
            f"`{name}={value!r}` has no meaning for a diffusion sampler. Leave it out; the sampler's arguments are "
            f"{sorted(known)}."
        )
