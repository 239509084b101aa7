"""
How noisy the preference score is on the user's own model and data, and which estimator and K to take.

The protocol is that of VRPO (arXiv 2505.19223, section 4.3): repeated estimates of the scores of some pairs. Here every
pair is scored once, on many stratified mirror pairs, and the repeats of all estimators are read off these scores
(`estimators/variance.py`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..estimators.control_variate import ControlVariate
from ..estimators.draws import MaskSampler
from ..estimators.hashing import hash_rows
from ..estimators.kappa import kappa_of_others, moments_of_kappa
from ..estimators.variance import (
    Scored,
    fixed_count_repeats,
    fixed_count_samples,
    paper_variance,
    repeats,
    variance_between,
    variance_of_repeats,
    variance_parts,
)
from ..scoring.head import FIXED_NONCE
from ..trainers.vrpo.config import DiffusionVRPOConfig
from .report import DRAW_COUNTS, ESTIMATORS, VarianceReport
from .scorer import Scorer, prepare

_NONCES = (FIXED_NONCE, FIXED_NONCE + 1)  # one for each independent set of draws
_KAPPAS = {"default": (0.0, 1.0, 2.0)}  # at which the variance is measured where kappa is learnt


def diagnose_variance(
    model: Any,
    ref_model: Any = None,
    dataset: Any = None,
    args: DiffusionVRPOConfig | None = None,
    *,
    processing_class: Any = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    num_pairs: int = 16,
    num_draws: int = 64,
    target_standard_error: float = 0.5,
) -> VarianceReport:
    """
    Measure the noise of the preference score on a model and a preference dataset, and recommend an estimator.

    Costs `num_pairs * 2 * num_draws` forwards of the policy and of the reference, no backward. Finished pairs are kept
    in `variance.jsonl` in `args.output_dir`, under the weights, the tokens and the draws, and not scored again. No
    trainer is made, and the models are left as they came.

    Args:
        model: as in [`DiffusionVRPOTrainer`]. The reference of a model with an adapter is the model without it. A model
            that has neither an adapter nor a `ref_model` is its own reference.
        ref_model: as in [`DiffusionVRPOTrainer`].
        dataset: preference dataset; the first `num_pairs` rows are used.
        args: configuration; of its options of the estimator only `level_concentration` is used, that of mirror pairs;
            those of the data and the memory are.
        processing_class: as in [`DiffusionVRPOTrainer`].
        peft_config: of an adapter that would be trained. It does nothing yet, so none is made.
        quantization_config: as in [`DiffusionVRPOTrainer`].
        num_pairs: pairs to score.
        num_draws: draws of each response, a multiple of 32 and at least 32.
        target_standard_error: of the score. At 0.5 the noise biases the loss by less than 0.5^2 / 8 = 0.03. Noise that
            is smaller than the spread between pairs is small enough too, see [`VarianceReport`].

    Returns:
        [`VarianceReport`].

    Raises:
        ValueError: no dataset, fewer than two pairs, a number of draws that cannot be dealt out, or an adapter that is
            not a policy beside its base model.
    """
    _check(dataset, num_pairs, num_draws)
    args = args or DiffusionVRPOConfig("variance")
    scorer, pairs = prepare(
        model, ref_model, _first_rows(dataset, num_pairs), args, processing_class, peft_config, quantization_config
    )
    # The draws of all estimators can be picked from stratified mirror pairs that chosen and rejected share
    sampler = replace(
        args.mask_sampler(),
        num_mc_samples=num_draws // len(_NONCES),
        scheme="mirror",
        stratify=True,
        control_variate=None,
        couple_pairs=True,
        level_concentration=args.level_concentration_of("mirror"),
    )
    with scorer.left_as_it_came():
        rows = _score_pairs(scorer, pairs, sampler, Path(args.output_dir) / "variance.jsonl")
    return _report(rows, num_draws, args.beta, target_standard_error, sampler.level_concentration)


def _check(dataset: Any, num_pairs: int, num_draws: int) -> None:
    if num_pairs < 2:
        raise ValueError(f"`num_pairs` must be at least 2, for a spread over pairs, got {num_pairs}.")
    if num_draws < 32 or num_draws % 32:
        raise ValueError(f"`num_draws` must be a multiple of 32, got {num_draws}. The default is 64.")
    if dataset is None:
        raise ValueError("`dataset` is missing: give a preference dataset, of which a few pairs are scored.")


def _first_rows(dataset: Any, number: int) -> Any:
    """As a dataset; what is not one is refused by the trainer."""
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(number)))
    return dataset.select(range(min(number, len(dataset)))) if isinstance(dataset, Dataset) else dataset


def _score_pairs(
    scorer: Scorer, pairs: list[dict[str, torch.Tensor]], sampler: MaskSampler, path: Path
) -> list[dict[str, Any]]:
    """One row of numbers for each pair, from the file where it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {row["key"]: row for row in map(_parse, lines) if row}
    of_models = scorer.key()
    rows = []
    for inputs in tqdm(pairs, desc="scoring pairs"):
        content = hash_rows(inputs["input_ids"] * 2 + inputs["maskable"], inputs["attention_mask"])
        key = str((content.tolist(), of_models, sampler.key, _NONCES, _KAPPAS))
        if key not in done:
            done[key] = {"key": key, **_measure(*_score_pair(scorer, inputs, sampler))}
            with open(path, "a") as file:
                file.write(json.dumps(done[key]) + "\n")
        rows.append(done[key])
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off while it was written: that pair is scored again


def _score_pair(scorer: Scorer, inputs: dict[str, torch.Tensor], sampler: MaskSampler) -> tuple[Any, ...]:
    """Chosen and rejected, scored; their tokens; and whether the policy differs from its reference."""
    sets = [scorer.score(sampler, inputs, nonce) for nonce in _NONCES]
    masked = torch.stack([draws.masked for draws, _, _ in sets])  # (S, M, 2, L)
    policy, reference = (torch.stack(values) for values in list(zip(*sets, strict=True))[1:])
    differs = not torch.equal(policy, reference)
    values = policy - reference if differs else _about_zero(policy, masked)
    places, blocks, law = inputs["maskable"], scorer.blocks(inputs), sampler.level_concentration
    scored = []
    for b in (0, 1):
        numbers = torch.zeros(0) if blocks is None else blocks[b, places[b]]
        sizes = tuple(numbers.unique_consecutive(return_counts=True)[1].tolist())
        scored.append(Scored(masked[:, :, b, places[b]], values[:, :, b, places[b]], law, sizes))
    return *scored, [inputs["input_ids"][b][places[b]].tolist() for b in (0, 1)], differs


def _about_zero(log_probs: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities `(S, M, 2, L)` less the mean of each response's: log-ratios, for which they stand in, are about
    zero. Under uniform levels the same number for every token is no noise; under others it would be.
    """
    of_draw = log_probs.double().sum(-1) / masked.sum(-1)
    return (log_probs - of_draw.mean((0, 1)).unsqueeze(-1)).to(log_probs.dtype) * masked


def _measure(chosen: Scored, rejected: Scored, tokens: list[list[int]], differs: bool) -> dict[str, Any]:
    """What is kept of a pair: plain numbers, in nats."""
    same = sum(a == b for a, b in zip(*tokens, strict=False))
    parts = [variance_parts(scored) for scored in (chosen, rejected)]
    margins = fixed_count_samples(chosen).mean(1) - fixed_count_samples(rejected).mean(1)
    variance = {
        f"{name}|{count}": [_variance(name, count, chosen, rejected, kappa) for kappa in _KAPPAS.get(name, (1.0,))]
        for name in ESTIMATORS
        for count in DRAW_COUNTS
        if chosen.masked.shape[1] % (2 * count) == 0
    }
    return {
        "differs": differs,
        "overlap": same / max(map(len, tokens)),
        "margins": margins.tolist(),
        "parts": {part: sum(each[part] for each in parts) for part in parts[0]},
        "variance": variance,
    }


def _variance(name: str, count: int, chosen: Scored, rejected: Scored, kappa: float = 1.0) -> float:
    """
    Of the difference of the two estimates, with this kappa for long responses.

    Coupled: on the same draws; else on draws that are far apart.
    """
    pair = (chosen, rejected)
    if name == "VRPO paper":
        return sum(map(paper_variance, pair)) / count
    if name == "fixed counts":
        values = [fixed_count_repeats(scored, count) for scored in pair]
    else:
        control = None if ESTIMATORS[name]["control_variate"] == "none" else ControlVariate(long_kappa=kappa)
        values = [repeats(scored, count, control) for scored in pair]
    if not ESTIMATORS[name]["couple_pairs"]:
        return sum(map(variance_of_repeats, values))
    return variance_of_repeats(values[0] - values[1])


def with_learnt_kappa(variances: torch.Tensor) -> torch.Tensor:
    """
    `(P,)` variances with the kappa that is best for the other pairs together, as one that is learnt from past steps is.

    Args:
        variances: `(P, 3)` of estimates b - kappa h of P pairs at the kappas 0, 1 and 2, which say what it is at any.
            Where kappa changes nothing, as for short responses, they are all the same.
    """
    plain, covariance, square = moments_of_kappa(variances, _KAPPAS["default"])
    kappa = kappa_of_others(covariance, square).nan_to_num(1.0)
    return plain - 2 * kappa * covariance + kappa.square() * square


def _report(
    rows: list[dict[str, Any]], num_draws: int, beta: float, target: float, level_concentration: float | None
) -> VarianceReport:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} pairs are left of the dataset, and a spread over pairs needs two. Give more.")
    cells = {tuple(cell.split("|")): [row["variance"][cell] for row in rows] for cell in rows[0]["variance"]}
    variance, error = {}, {}
    for (name, count), values in cells.items():
        of_pairs = torch.tensor(values, dtype=torch.float64)  # (pairs, kappas)
        of_pairs = beta**2 * (with_learnt_kappa(of_pairs) if name in _KAPPAS else of_pairs.squeeze(1))
        variance[name, int(count)] = of_pairs.mean().item()
        error[name, int(count)] = of_pairs.std().item() / len(rows) ** 0.5
    parts = {part: sum(row["parts"][part] for row in rows) for part in rows[0]["parts"]}
    by_set = beta * torch.tensor([row["margins"] for row in rows], dtype=torch.float64)
    margins = by_set.mean(1)
    return VarianceReport(
        num_pairs=len(rows),
        num_draws=num_draws,
        beta=beta,
        compares_with_reference=any(row["differs"] for row in rows),
        overlap=sum(row["overlap"] for row in rows) / len(rows),
        margin=margins.mean().item(),
        margin_spread=margins.std().item(),
        parts={part: value / sum(parts.values()) for part, value in parts.items()},
        variance=variance,
        error=error,
        target_standard_error=target,
        between_pairs=max(variance_between(by_set), 0.0),
        level_concentration=level_concentration,
    )
