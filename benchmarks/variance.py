"""
How noisy the preference score, its loss and the gradient are under each estimator, at equal forwards.

    python benchmarks/variance.py            # about 45 minutes on one core, once the regimes are made
    python benchmarks/variance.py --quick    # about three minutes; wide intervals
    python benchmarks/variance.py --report   # only print and draw what is finished

The regimes (`variance_regimes.py`) are two tasks, small models trained from scratch, policies near to and far from
their reference, and held-out pairs of 9 to 256 tokens. K = 8 forwards of policy and reference per response, if nothing
else is said. Finished pairs are kept in `runs/variance/results.jsonl` and not measured again.

- Score: s / beta = [B_w - B_w,ref] - [B_l - B_l,ref], in nats. Loss: -log sigmoid(s), beta = 0.2. Gradient: that of the
  loss with respect to the output head, sketched to 64 numbers (`variance_tables.py`), the trace of its covariance.
- Repeats of an estimator are calls of `MaskSampler` with nonces 0, 1, 2, ...; responses of up to ten tokens are scored
  on every mask, so that repeats are look-ups, and the bias is measured against the exact ELBO.
- Independent draws (`Bernoulli`, `fixed counts`, the allocations n_t / n_yt of the VRPO paper) have the variance of one
  draw over K. It is summed over levels (`variance_levels.py`); for their loss and gradient, draws are made again from
  the masks of the levels. The score variance of a Bernoulli draw is infinite; here t is in (1e-3, 1).
- Ratios are of means over pairs. Intervals: 95%, bootstrap over pairs; the noise of a pair's repeats is in its number.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import variance_report
from counters import machine
from tqdm.auto import tqdm
from variance_estimators import (
    ALLOCATIONS,
    BETA,
    DRAWS,
    ESTIMATORS,
    INDEPENDENT,
    MAIN,
    OTHER_DRAWS,
    Pool,
    Repeats,
    draw_pair,
    read_pair,
    resample_pair,
)
from variance_levels import bernoulli_variance, fixed_count_parts, make_levels, mean_over_levels, token_variance
from variance_regimes import REGIMES, ROOT, load_regime
from variance_tables import Sketch, distinct, score

from trl_diffusion import MaskSampler

ENUMERATED = 10  # responses of up to so many tokens
VARIED_DRAWS = 32  # K is varied for responses of up to so many tokens
RESAMPLES = 2000
# Pairs and repeats of each regime
FULL = {
    "A9 near": (12, 200), "A9 far": (12, 200), "A15 far": (10, 24), "B32 near": (12, 20), "B32 far": (10, 16),
    "B64 far": (8, 20), "B128 near": (8, 160), "B256 far": (6, 8),
}  # fmt: skip
QUICK = {
    "A9 near": (3, 100), "A9 far": (3, 100), "A15 far": (4, 12), "B32 near": (2, 8), "B32 far": (2, 8),
    "B64 far": (2, 8), "B128 near": (2, 4), "B256 far": (2, 4),
}  # fmt: skip


def cells_to_draw(repeats: int, length: int) -> dict[tuple[str, int], int]:
    """Estimator and K, to the number of repeats. Other K than DRAWS where the response is short."""
    cells = {(name, DRAWS): repeats for name in ESTIMATORS}
    if length > VARIED_DRAWS:
        return cells
    return cells | {(name, k): repeats if k < DRAWS else repeats // 2 for name in MAIN for k in OTHER_DRAWS}


def measure_pair(regime, pair, repeats: int, sketch: Sketch) -> dict:
    """Everything about one pair."""
    prompt, *responses = pair
    exact = max(map(len, responses)) <= ENUMERATED
    levels = [make_levels(len(y), everything=exact, seed=i) for i, y in enumerate(responses)]
    cells = cells_to_draw(repeats, max(map(len, responses)))
    if not exact:  # their variance is known from the levels, and there is no bias to measure
        cells = {cell: count for cell, count in cells.items() if cell[0] not in INDEPENDENT}
    drawn = {
        (name, draws): draw_pair(MaskSampler(draws, **ESTIMATORS[name]), prompt, responses, count)
        for (name, draws), count in cells.items()
    }
    tables = [
        score(
            regime.policy, regime.reference, prompt, y,
            distinct([*levels[i].masks, *(masks for masks, _ in (parts[i] for parts in drawn.values()))]), sketch,
        )
        for i, y in enumerate(responses)
    ]  # fmt: skip
    pools = [Pool.of(level, table) for level, table in zip(levels, tables, strict=True)]
    chosen, rejected = (mean_over_levels(pool.levels, pool.by_level()) for pool in pools)
    truth = chosen - rejected
    samples = {cell: read_pair(tables, parts) for cell, parts in drawn.items()}
    results = {cell: s.variances() | (_bias(s, truth) if exact else {}) for cell, s in samples.items()}
    for cell, values in independent_cells(pools).items():
        results.setdefault(cell, {}).update(values)
    return {
        "lengths": [len(y) for y in responses],
        "overlap": sum(map(int.__eq__, *responses)) / max(map(len, responses)),
        "log_ratios": [chosen, rejected],
        "anova": anova(pools, tables),
        "kappa": {tail: _moments(samples, tail) for tail in ("", ", coupled")},
        "cells": {f"{name}|{draws}": values for (name, draws), values in results.items()},
    }


def _bias(sample: Repeats, truth: float) -> dict[str, float]:
    """Against the exact score and its loss."""
    loss = torch.nn.functional.softplus(torch.tensor(-BETA * truth, dtype=torch.float64))
    error = sample.score.std().item() / len(sample.score) ** 0.5
    bias = {"bias": sample.score.mean().item() - truth, "bias_error": error}
    return bias | {"loss_bias": (sample.loss.mean() - loss).item()}


def _moments(samples: dict[tuple[str, int], Repeats], tail: str) -> dict[str, float]:
    """Of scores b - kappa * h: the best kappa of the control variate is Cov(b, h) / Var(h)."""
    plain, controlled = (samples[f"mirror, stratified{name}{tail}", DRAWS].score for name in ("", ", control"))
    covariance = torch.cov(torch.stack([plain, plain - controlled]))
    return {"covariance": covariance[0, 1].item(), "variance": covariance[1, 1].item()}


def independent_cells(pools: list[Pool]) -> dict[tuple[str, int], dict[str, float]]:
    """Allocations n_t/n_yt, shared with the reference and not, and the two baselines at all K."""
    generator = torch.Generator().manual_seed(0)
    parts = {w: [fixed_count_parts(p.levels, p.by_level(w)) for p in pools] for w in ("ratio", "policy", "reference")}

    def of_score(n_t, n_yt, shared=True):
        used = parts["ratio"] if shared else parts["policy"] + parts["reference"]
        return sum(part["level"] / n_t + part["within"] / (n_t * n_yt) for part in used)

    def resampled(draw, shared=True):
        return resample_pair(pools, draw, shared, generator).variances()

    cells = {}
    for n_t, n_yt in ALLOCATIONS:
        for shared in (True, False):
            name = f"{n_t}/{n_yt}{'' if shared else ', not shared'}"
            sample = resampled(lambda pool, g, a=n_t, b=n_yt: pool.fixed_count_draws(a, b, RESAMPLES, g), shared)
            cells[name, n_t * n_yt] = sample | {"score": of_score(n_t, n_yt, shared)}
    single = sum(bernoulli_variance(p.levels, p.by_level()) for p in pools)
    for draws in (DRAWS, *OTHER_DRAWS):
        sample = resampled(lambda pool, g, n=draws: pool.fixed_count_draws(n, 1, RESAMPLES, g))
        cells["fixed counts", draws] = sample | {"score": of_score(draws, 1)}
        sample = resampled(lambda pool, g, n=draws: pool.bernoulli_draws(n, RESAMPLES, g))
        cells["Bernoulli", draws] = sample | {"score": single / draws}
    return cells


def anova(pools, tables) -> dict[str, float]:
    """Parts of the variance of one fixed-count draw of the pair's score: see `variance_levels.py`."""
    level, within, tokens = 0.0, 0.0, 0.0
    for pool, table in zip(pools, tables, strict=True):
        part = fixed_count_parts(pool.levels, pool.by_level())
        terms = [(table.policy - table.reference)[table.find(masks)] for masks in pool.levels.masks]
        level, within = level + part["level"], within + part["within"]
        tokens += token_variance(pool.levels, terms)
    return {"level": level, "tokens": tokens, "context": within - tokens}


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(name: str, sizes: tuple[int, int], path: Path, root: Path) -> None:
    """All pairs of a regime that are not in `path` yet."""
    num_pairs, repeats = sizes
    done = {(row["regime"], row["pair"]) for row in variance_report.read(path)}
    if all((name, i) in done for i in range(num_pairs)):
        return
    regime = load_regime(name, root, num_pairs)
    sketch = Sketch(regime.policy.config.vocab_size, regime.policy.config.d_model)
    for i, pair in enumerate(tqdm(regime.pairs, desc=f"{name}: pairs")):
        if (name, i) in done:
            continue
        start = time.monotonic()
        row = {"regime": name, "pair": i, "kind": regime.kinds[i], "repeats": repeats}
        row |= measure_pair(regime, pair, repeats, sketch)
        with open(path, "a") as file:
            print(json.dumps(row | {"seconds": time.monotonic() - start}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--quick", action="store_true", help="few pairs and repeats")
    parser.add_argument("--report", action="store_true", help="only print and draw what is finished")
    parser.add_argument("--output_dir", type=Path, default=ROOT)
    parser.add_argument("--plot", type=Path, help="where to draw; by default in the output folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.output_dir
    root.mkdir(parents=True, exist_ok=True)
    path = root / ("results-quick.jsonl" if arguments.quick else "results.jsonl")
    for name in () if arguments.report else arguments.regimes:
        measure(name, (QUICK if arguments.quick else FULL)[name], path, root)
    rows = variance_report.read(path)
    print(variance_report.tables(rows))
    print(f"\n({machine()}; {sum(row['seconds'] for row in rows):.0f} s)")
    variance_report.plot(rows, arguments.plot or path.with_suffix(".png"))


if __name__ == "__main__":
    main()
