"""What samplers share: a token for each hidden place, how sure it is, and how many are kept at each step."""

import math

import torch

from .sampler_arguments import SamplerArguments, Tokens

_LAST = 1e4  # nats below every log-probability of a token that is predicted


def reveal_counts(size: int, steps: int, remasking: str, generator: torch.Generator | None) -> list[int]:
    """
    Tokens to reveal at each step of a block: as even as possible, the larger counts first. In ancestral sampling each
    token has a time of its own, which is uniform over the steps where the level of masking falls evenly: many steps
    reveal nothing, and cost nothing, since the prediction does not depend on the time (RADD, arXiv 2406.03736).
    """
    if remasking == "ancestral":
        times = torch.randint(steps, (size,), generator=generator, device=generator.device if generator else None)
        return times.bincount(minlength=steps).tolist()
    base, extra = divmod(size, steps)
    return [base + (step < extra) for step in range(steps)]


def predict(
    logits: torch.Tensor,
    places: torch.Tensor,
    generator: torch.Generator | None,
    arguments: SamplerArguments,
    tokens: Tokens,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each of some places `(n, V)`, and how sure it is at temperature 1: by default its log-probability."""
    logits = logits[places].float()
    if arguments.logits_eos_inf and tokens.ends:
        logits[:, tokens.ends[0]] = -torch.inf
    logits[:, tokens.mask] = -torch.inf  # a prediction that is the mask token would never be revealed
    logits[:, tokens.size :] = -torch.inf  # rows of the output head that are no tokens
    choices = logits
    if arguments.temperature > 0:
        choices = _gumbel(logits.shape, generator, logits.device).mul_(arguments.temperature).add_(logits)
    predicted = choices.argmax(-1)
    del choices
    confidence = _confidence(logits, predicted, arguments.remasking)
    if arguments.confidence_eos_eot_inf:  # after all others, and in their own order
        confidence = torch.where(is_end(predicted, tokens), confidence - _LAST, confidence)
    return predicted, confidence


def _confidence(logits: torch.Tensor, predicted: torch.Tensor, remasking: str) -> torch.Tensor:
    if remasking == "entropy":
        log_probs = logits.log_softmax(-1)
        return (log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    if remasking == "topk_margin":
        first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second
    return logits.gather(-1, predicted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def surest(confidence: torch.Tensor, counts: list[int], threshold: float | None) -> torch.Tensor:
    """`(B, n)` bool: the surest of each row's places, as many as it counts, and those of at least a probability."""
    most = min(max(counts), confidence.shape[-1])
    numbers = torch.tensor(counts, device=confidence.device).unsqueeze(-1)
    is_counted = torch.arange(most, device=confidence.device) < numbers
    kept = torch.zeros_like(confidence, dtype=torch.bool).scatter(-1, confidence.topk(most).indices, is_counted)
    return kept if threshold is None else kept | (confidence >= math.log(threshold))


def is_end(response: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Where a response has a token that ends it."""
    return torch.isin(response, torch.tensor(tokens.ends, device=response.device, dtype=response.dtype))


def _gumbel(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """In double precision: rounded Gumbel noise cuts the tail, as if at a lower temperature (arXiv 2409.02908)."""
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    return uniform.clamp_(min=torch.finfo(torch.float64).tiny).log_().neg_().log_().neg_()
