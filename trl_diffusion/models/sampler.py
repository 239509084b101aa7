"""
The sampler of masked diffusion language models, behind `model.generate`.

A response starts as `max_new_tokens` mask tokens after the prompt. Each step predicts every masked position of the
current block at once and keeps some of the predictions; the others stay masked ("remasking", LLaDA section 2.4,
arXiv 2502.09992). Blocks are filled left to right, semi-autoregressively. Block diffusion models do so by nature, and
have a sampler of their own (`block_sampler.py`).

The sampler asks a model for logits, its family for where they stand, and a tokenizer for nothing. Of the logits of a
block there is one copy; what is computed of them is computed of some positions at a time.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ..estimators.hashing import hash_rows
from .block_sampler import generate_blocks
from .canvas_logits import CanvasLogits
from .families import family_of
from .predictions import is_end, predict, reveal_counts, surest
from .sampler_arguments import SamplerArguments, Tokens, read_arguments
from .trying import evaluating

LOGITS_TILE = 2**24  # logits that are looked at together

if TYPE_CHECKING:  # what the mixin is put in front of
    _Module = torch.nn.Module
else:
    _Module = object


class DiffusionGenerationMixin(_Module):
    """Replaces autoregressive `generate` by [`generate`], so that whatever calls `model.generate` works."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Generate responses by iterative denoising, see [`~sampler.generate`]."""
        return generate(self, inputs, generation_config, attention_mask, **kwargs)


@torch.no_grad()
def generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """
    Generate responses by iterative denoising, with any masked diffusion model.

    Args:
        model: of a family that predicts all masked tokens of a sequence at once.
        inputs: `(B, P)` prompts; `input_ids` is accepted too. Prompts of different length are padded on the left.
        generation_config: as in transformers, with the arguments of [`SamplerArguments`] as attributes.
        attention_mask: `(B, P)`, one at real tokens. Needed when prompts are padded.
        **kwargs: [`SamplerArguments`], `eos_token_id`, `pad_token_id` and `mask_token_id`; `token_type_ids` of zeros.

    Returns:
        `(B * num_return_sequences, P + max_new_tokens)` prompts and responses. What follows the first end of text is
        padding.

    Raises:
        ValueError: an argument that this sampler does not have (beams, top-k, ...), or values that do not fit.
    """
    prompts = kwargs.pop("input_ids", None) if inputs is None else inputs
    _check_segments(kwargs.pop("token_type_ids", None))
    attention_mask = _check_shapes(prompts, attention_mask)
    configs = (getattr(model, "generation_config", None), generation_config)
    arguments, tokens = read_arguments(model.config, configs, kwargs, prompts.shape[1])
    prompts = prompts.repeat_interleave(arguments.num_return_sequences, dim=0)
    attention_mask = attention_mask.repeat_interleave(arguments.num_return_sequences, dim=0)
    _check_prompts(prompts, attention_mask, tokens)
    family = family_of(model.config)
    if prompts.shape[1] < family.logit_shift and family.first_token == "nothing":
        raise ValueError(
            f"The prompt is empty, and {family.name} has no logits for the first token: give it one token."
        )
    with evaluating(model):
        run = _one_by_one if family.in_blocks else _denoise
        sequences = run(model, prompts, attention_mask, arguments, tokens)
    return GenerateDecoderOnlyOutput(sequences=sequences) if arguments.return_dict_in_generate else sequences


def _check_segments(token_type_ids: torch.Tensor | None) -> None:
    """Tokenizers of encoders give them unasked; a response is of the first segment, as in training."""
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise ValueError(
            "`token_type_ids` has a second segment, and prompt and response are one: give the prompt to the tokenizer "
            "as one text, not as a pair."
        )


def _check_shapes(prompts: Any, attention_mask: Any) -> torch.Tensor:
    """The attention mask, which is all ones if there is none."""
    if prompts is None:
        raise ValueError("`generate` needs prompts: pass `input_ids`.")
    if not isinstance(prompts, torch.Tensor) or prompts.dim() != 2 or prompts.is_floating_point():
        what = f"a {prompts.dtype} tensor of shape {tuple(prompts.shape)}" if hasattr(prompts, "dtype") else prompts
        raise ValueError(
            f"`input_ids` must be a tensor of token ids of shape (prompts, tokens), got {what}. The tokenizer makes "
            'one of a list of texts with `padding=True, return_tensors="pt"`.'
        )
    if attention_mask is None:
        return torch.ones_like(prompts)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != prompts.shape:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else attention_mask
        raise ValueError(f"`attention_mask` must have the shape of `input_ids`, {tuple(prompts.shape)}, got {shape}.")
    return attention_mask


def _check_prompts(prompts: torch.Tensor, attention_mask: torch.Tensor, tokens: Tokens) -> None:
    if not bool(attention_mask[:, -1:].all()):
        raise ValueError("Prompts must be padded on the left: set `tokenizer.padding_side = 'left'`.")
    if bool(((prompts == tokens.mask) & attention_mask.bool()).any()):
        raise ValueError(f"A prompt contains the mask token ({tokens.mask}), which would be taken for a gap to fill.")


def _one_by_one(
    model: Any, prompts: torch.Tensor, attention_mask: torch.Tensor, arguments: SamplerArguments, tokens: Tokens
) -> torch.Tensor:
    """Rows of a block diffusion model, whose blocks lie elsewhere in each."""
    generators = _row_generators(prompts, attention_mask, arguments)
    responses = [
        generate_blocks(model, prompt[real], arguments, tokens, generator)
        for prompt, real, generator in zip(prompts, attention_mask.bool(), generators, strict=True)
    ]
    return _pad_after_end(torch.cat([prompts, torch.stack(responses)], dim=1), prompts.shape[1], tokens)


def _denoise(model, prompts, attention_mask, arguments, tokens):
    prompt_length, size = prompts.shape[1], arguments.block_size
    canvas = prompts.new_full((prompts.shape[0], arguments.max_new_tokens), tokens.mask)
    sequences = torch.cat([prompts, canvas], dim=1)
    attention_mask = torch.cat([attention_mask, torch.ones_like(canvas)], dim=1)
    generators = _row_generators(prompts, attention_mask[:, :prompt_length], arguments)
    ask = CanvasLogits(model, attention_mask, prompt_length, arguments, tokens)
    num_blocks = arguments.max_new_tokens // size
    steps = arguments.num_steps // num_blocks
    running = list(range(len(prompts)))
    for start in range(prompt_length, sequences.shape[1], size):
        counts = {row: reveal_counts(size, steps, arguments.remasking, generators[row]) for row in running}
        for step in range(steps):
            # With a threshold a row may be ahead of others, and where times are drawn it may reveal nothing now
            has_gaps = (sequences[:, start : start + size] == tokens.mask).any(1).tolist()
            active = [row for row in running if has_gaps[row] and counts[row][step]]
            if not active:
                continue
            rows = sequences[active]
            logits = ask(rows, active, (start, start + size))
            now, sources = [counts[row][step] for row in active], [generators[row] for row in active]
            sequences[active] = _reveal(rows, logits, start, now, sources, arguments, tokens)
            del logits  # not there during the next forward
            finished = _finished(sequences, prompt_length, tokens).tolist()
            running = [row for row in running if not finished[row]]
    return _pad_after_end(sequences, prompt_length, tokens)


def _reveal(rows, logits, start, counts, generators, arguments, tokens):
    """Fill as many masked positions of the block in every row as its count says."""
    block = rows[:, start : start + logits.shape[1]]
    masked = block == tokens.mask
    predicted, confidence = block.clone(), torch.full(block.shape, -torch.inf, device=rows.device)
    for row, generator in enumerate(generators):
        places = masked[row].nonzero().squeeze(1)
        for some in places.split(max(1, LOGITS_TILE // logits.shape[-1])):
            predicted[row, some], confidence[row, some] = predict(logits[row], some, generator, arguments, tokens)
        if arguments.is_ordered_by_chance:
            confidence[row, places] = torch.rand(len(places), generator=generator, device=rows.device)
    chosen = surest(confidence, counts, arguments.confidence_threshold) & masked
    rows[:, start : start + logits.shape[1]] = torch.where(chosen, predicted, block)
    return rows


def _finished(rows, prompt_length, tokens):
    """Whether an end of text stands in the response with nothing masked before it: no later step can change it."""
    response = rows[:, prompt_length:]
    before_mask = ((response == tokens.mask).long().cumsum(1) == 0) & is_end(response, tokens)
    return before_mask.any(1) | ~(response == tokens.mask).any(1)


def _pad_after_end(sequences, prompt_length, tokens):
    response = sequences[:, prompt_length:]
    ended = is_end(response, tokens).long().cumsum(1) - is_end(response, tokens).long() > 0
    sequences[:, prompt_length:] = response.masked_fill(ended, tokens.pad)
    return sequences


def _row_generators(prompts, attention_mask, arguments):
    """One generator a row, seeded by the seed, the row's own prompt and how often that prompt came before it."""
    if arguments.temperature == 0 and not arguments.is_ordered_by_chance:
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
