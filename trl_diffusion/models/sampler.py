"""
The samplers of masked diffusion language models, behind `model.generate`.

A response starts as `max_new_tokens` mask tokens after the prompt. Each step predicts every masked position of the
current block at once and keeps some of the predictions; the others stay masked ("remasking", LLaDA section 2.4,
arXiv 2502.09992). Blocks are filled left to right, semi-autoregressively.

The sampler knows nothing of transformers beyond the calling convention of `generate`: it asks a model for hidden states
and an output head, and a tokenizer for nothing.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..estimators.hashing import hash_rows

_REMASKING = ("low_confidence", "random")
_DEFAULT_MAX_NEW_TOKENS = 128
# Arguments of autoregressive decoding that change nothing here: with any value, and with the value that is off
_HARMLESS = {"use_cache", "cache_implementation", "max_length", "transformers_version"}
_OFF = GenerationConfig._get_default_generation_params() | {"top_k": 0}
_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "decoder_start_token_id"}


if TYPE_CHECKING:  # what the mixin is put in front of
    _Module = torch.nn.Module
else:
    _Module = object


@dataclass(frozen=True)
class SamplerArguments:
    """
    Arguments of `generate` that a diffusion sampler has. All of them can be given to `generate` or be attributes of
    the `GenerationConfig`.

    Args:
        max_new_tokens: length of the response canvas, in tokens.
        steps: denoising steps in all. Defaults to `max_new_tokens`, one token a step.
        block_length: length of the blocks that are filled left to right. Defaults to `max_new_tokens`, one block.
        remasking: `"low_confidence"` keeps the predictions with the highest probability, `"random"` any.
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

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.block_size < 1 or self.max_new_tokens % self.block_size:
            raise ValueError(
                f"`block_length` ({self.block_size}) must divide `max_new_tokens` ({self.max_new_tokens})."
            )
        num_blocks = self.max_new_tokens // self.block_size
        if self.num_steps % num_blocks or not num_blocks <= self.num_steps <= self.max_new_tokens:
            raise ValueError(
                f"`steps` must be a multiple of the number of blocks ({num_blocks}) and at most `max_new_tokens` "
                f"({self.max_new_tokens}), got {self.num_steps}."
            )
        if self.remasking not in _REMASKING:
            raise ValueError(f"`remasking` must be one of {_REMASKING}, got {self.remasking!r}.")
        for name in ("temperature", "cfg_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.num_return_sequences < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, got {self.num_return_sequences}.")


class DiffusionGenerationMixin(_Module):
    """Replaces autoregressive `generate` by the family's sampler, so that whatever calls `generate` works."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """
        Generate responses by iterative denoising.

        Args:
            inputs: `(B, P)` prompts; `input_ids` is accepted too. Prompts of different length are padded on the left.
            generation_config: as in transformers, with the arguments of [`SamplerArguments`] as attributes.
            attention_mask: `(B, P)`, one at real tokens. Needed when prompts are padded.
            **kwargs: [`SamplerArguments`], `eos_token_id`, `pad_token_id` and `mask_token_id`.

        Returns:
            `(B * num_return_sequences, P + max_new_tokens)` prompts and responses. What follows the first end of text
            is padding.

        Raises:
            ValueError: an argument that this sampler does not have (beams, top-k, ...), or values that do not fit.
        """
        prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompts is None:
            raise ValueError("`generate` needs prompts: pass `input_ids`.")
        arguments, tokens = _read_arguments(self, prompts.shape[1], generation_config, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(prompts)
        prompts = prompts.repeat_interleave(arguments.num_return_sequences, dim=0)
        attention_mask = attention_mask.repeat_interleave(arguments.num_return_sequences, dim=0)
        _check_prompts(prompts, attention_mask, tokens)
        was_training = self.training
        self.eval()
        try:
            sequences = _denoise(self, prompts, attention_mask, arguments, tokens)
        finally:
            self.train(was_training)
        return GenerateDecoderOnlyOutput(sequences=sequences) if arguments.return_dict_in_generate else sequences


@dataclass(frozen=True)
class _Tokens:
    mask: int
    pad: int
    ends: tuple[int, ...]


def _read_arguments(model, prompt_length, generation_config, kwargs):
    given = {}
    for config in (model.generation_config, generation_config):
        if config is not None:
            given.update({k: v for k, v in config.to_dict().items() if v is not None})
    given.update({k: v for k, v in kwargs.items() if v is not None})
    if "max_length" in given and "max_new_tokens" not in given:
        given["max_new_tokens"] = given["max_length"] - prompt_length
    do_sample = given.pop("do_sample", None)
    if do_sample is False:
        given["temperature"] = 0.0
    elif do_sample:
        given.setdefault("temperature", 1.0)
    known = {field.name for field in fields(SamplerArguments)}
    _refuse_unknown(given, known)
    arguments = SamplerArguments(**{name: given[name] for name in known if name in given})

    mask = given.get("mask_token_id", getattr(model.config, "mask_token_id", None))
    if mask is None:
        raise ValueError("The model has no `mask_token_id`: set `model.config.mask_token_id` or pass it.")
    ends = given.get("eos_token_id", model.config.eos_token_id)
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    pad = given.get("pad_token_id", model.config.pad_token_id)
    return arguments, _Tokens(mask, pad if pad is not None else (ends[0] if ends else 0), ends)


def _refuse_unknown(given, known):
    for name, value in given.items():
        if name in known | _TOKEN_IDS | _HARMLESS or name.startswith("_"):
            continue
        if value is False or value == _OFF.get(name):
            continue
        raise ValueError(
            f"`{name}={value!r}` has no meaning for a diffusion sampler. Leave it out; the sampler's arguments are "
            f"{sorted(known)}."
        )


def _check_prompts(prompts, attention_mask, tokens):
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("Prompts must be padded on the left: set `tokenizer.padding_side = 'left'`.")
    if bool(((prompts == tokens.mask) & attention_mask.bool()).any()):
        raise ValueError(f"A prompt contains the mask token ({tokens.mask}), which would be taken for a gap to fill.")


def _denoise(model, prompts, attention_mask, arguments, tokens):
    prompt_length, size = prompts.shape[1], arguments.block_size
    canvas = prompts.new_full((prompts.shape[0], arguments.max_new_tokens), tokens.mask)
    sequences = torch.cat([prompts, canvas], dim=1)
    attention_mask = torch.cat([attention_mask, torch.ones_like(canvas)], dim=1)
    generators = _row_generators(prompts, attention_mask[:, :prompt_length], arguments)
    num_blocks = arguments.max_new_tokens // size
    reveal_counts = _reveal_counts(size, arguments.num_steps // num_blocks)
    running = torch.arange(prompts.shape[0], device=prompts.device)
    for block in range(num_blocks):
        start = prompt_length + block * size
        for count in reveal_counts:
            if len(running) == 0:
                break
            rows = sequences[running]
            block_span = (start, start + size)
            logits = _block_logits(model, rows, attention_mask[running], prompt_length, block_span, arguments, tokens)
            noise_sources = [generators[i] for i in running.tolist()]
            sequences[running] = _reveal(rows, logits, start, count, noise_sources, arguments, tokens)
            running = running[~_finished(sequences[running], prompt_length, tokens)]
    return _pad_after_end(sequences, prompt_length, tokens)


def _reveal_counts(block_size: int, steps: int) -> list[int]:
    """Tokens to reveal at each step of a block: as even as possible, the larger counts first."""
    base, extra = divmod(block_size, steps)
    return [base + (step < extra) for step in range(steps)]


def _block_logits(model, rows, attention_mask, prompt_length, block, arguments, tokens):
    """`(B, block, V)` logits, guided by the prompt if `cfg_scale` is set."""
    keep = torch.arange(*block, device=rows.device)
    conditional = model(input_ids=rows, attention_mask=attention_mask, logits_to_keep=keep).logits.float()
    if arguments.cfg_scale == 0:
        return conditional
    prompt_masked = rows.clone()
    prompt_masked[:, :prompt_length] = tokens.mask
    unconditional = model(input_ids=prompt_masked, attention_mask=attention_mask, logits_to_keep=keep).logits.float()
    return unconditional + (arguments.cfg_scale + 1) * (conditional - unconditional)


def _reveal(rows, logits, start, count, generators, arguments, tokens):
    """Fill `count` masked positions of the block in every row."""
    block = rows[:, start : start + logits.shape[1]]
    masked = block == tokens.mask
    logits[..., tokens.mask] = -torch.inf  # a prediction that is the mask token would never be revealed
    rows_of_noise = range(len(generators))
    choices = logits
    if arguments.temperature > 0:
        # In double precision: rounded Gumbel noise cuts the tail, and samples as if at a lower temperature
        # (arXiv 2409.02908).
        noise = torch.stack([_gumbel(logits[i], generators[i]) for i in rows_of_noise])
        choices = logits.double() + arguments.temperature * noise
    predicted = choices.argmax(-1)
    if arguments.remasking == "random":
        confidence = torch.stack([_uniform(masked[i], generators[i]) for i in rows_of_noise])
    else:
        confidence = logits.log_softmax(-1).gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    confidence = confidence.masked_fill(~masked, -torch.inf)
    chosen = torch.zeros_like(masked).scatter(1, confidence.topk(count, dim=1).indices, True) & masked
    rows[:, start : start + logits.shape[1]] = torch.where(chosen, predicted, block)
    return rows


def _finished(rows, prompt_length, tokens):
    """Whether an end of text stands in the response with nothing masked before it: no later step can change it."""
    response = rows[:, prompt_length:]
    before_mask = ((response == tokens.mask).long().cumsum(1) == 0) & _is_end(response, tokens)
    return before_mask.any(1) | ~(response == tokens.mask).any(1)


def _is_end(response, tokens):
    return torch.isin(response, torch.tensor(tokens.ends, device=response.device, dtype=response.dtype))


def _pad_after_end(sequences, prompt_length, tokens):
    response = sequences[:, prompt_length:]
    ended = _is_end(response, tokens).long().cumsum(1) - _is_end(response, tokens).long() > 0
    sequences[:, prompt_length:] = response.masked_fill(ended, tokens.pad)
    return sequences


def _row_generators(prompts, attention_mask, arguments):
    """One generator a row, seeded by the seed, the row's own prompt and how often that prompt came before it."""
    if arguments.temperature == 0 and arguments.remasking != "random":
        return [None] * len(prompts)  # no noise: leave torch's global generator alone
    seed = arguments.seed if arguments.seed is not None else int(torch.randint(2**62, ()))
    seen: dict[int, int] = {}
    generators = []
    for content in hash_rows(prompts, attention_mask.bool()).tolist():
        seen[content] = seen.get(content, 0) + 1
        row_seed = hash_rows(torch.tensor([[content, seen[content]]]), torch.ones(1, 2, dtype=torch.bool), salt=seed)
        generator = torch.Generator(device=prompts.device)
        generators.append(generator.manual_seed(int(row_seed) % 2**63))
    return generators


def _gumbel(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()


def _uniform(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)
