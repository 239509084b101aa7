"""
A check of the gradient's variance on another path: true back-propagation through the last block and the output head.

    python benchmarks/variance_backprop.py --regimes "A15 far" "B32 far" "B64 far" --pairs 4 --repeats 20

Nothing is sketched, looked up or taken from sums over levels: each repeat draws masks, runs the package's `elbo` on the
pair, and takes the gradient of the loss. Independent draws are drawn too, Bernoulli ones as they come (t down to 0).
Printed are the trace of the gradient's covariance and the variance of the score, over fixed counts, with intervals over
pairs.
"""

import argparse
import json
from pathlib import Path

import torch
import variance_report
from counters import machine
from tqdm.auto import tqdm
from variance_estimators import BETA, DRAWS, ESTIMATORS, as_batch
from variance_regimes import REGIMES, ROOT, load_regime

from trl_diffusion import MaskSampler, elbo

COMPARED = (
    "Bernoulli",
    "fixed counts",
    "fixed counts, stratified",
    "mirror, stratified",
    "mirror, stratified, control",
)


def trained_part(model) -> list[torch.nn.Parameter]:
    """The last block, the final norm and the output head; everything else is frozen."""
    model.requires_grad_(False)
    parts = [model.model.transformer["blocks"][-1], model.model.transformer["ln_f"], model.get_output_embeddings()]
    for part in parts:
        part.requires_grad_(True)
    return [parameter for part in parts for parameter in part.parameters()]


def one_repeat(regime, parameters, batch, sampler, nonce) -> tuple[float, torch.Tensor]:
    """Score over beta, and gradient of the loss."""
    ids, real, maskable = batch
    draws = sampler(maskable, ids, real, nonce=nonce)
    with torch.no_grad():
        reference = elbo(regime.reference, ids, maskable, real, draws=draws).value
    chosen, rejected = elbo(regime.policy, ids, maskable, real, draws=draws).value - reference
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return (chosen - rejected).item(), gradient


def measure(name: str, num_pairs: int, repeats: int, path: Path, root: Path) -> None:
    regime = load_regime(name, root, num_pairs)
    done = {(row["regime"], row["pair"]) for row in variance_report.read(path)}
    parameters = trained_part(regime.policy)
    for i, (prompt, *responses) in enumerate(tqdm(regime.pairs, desc=f"{name}: pairs")):
        if (name, i) in done:
            continue
        batch, cells = as_batch(prompt, responses), {}
        for estimator in COMPARED:
            sampler = MaskSampler(DRAWS, **ESTIMATORS[estimator])
            scores, gradients = zip(
                *(one_repeat(regime, parameters, batch, sampler, nonce) for nonce in range(repeats)), strict=True
            )
            trace = torch.stack(gradients).double().var(0).sum().item()
            cells[estimator] = {"score": torch.tensor(scores).var().item(), "gradient": trace}
        row = {"regime": name, "pair": i, "kind": regime.kinds[i], "repeats": repeats, "cells": cells}
        with open(path, "a") as file:
            print(json.dumps(row), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", default=["A15 far", "B32 far", "B64 far"], choices=list(REGIMES))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=ROOT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output_dir / "backprop.jsonl"
    for name in arguments.regimes:
        measure(name, arguments.pairs, arguments.repeats, path, arguments.output_dir)
    groups = variance_report.by_regime(variance_report.read(path))
    names = {name: name for name in COMPARED}
    for quantity in ("gradient", "score"):
        print(f"\n## Variance of {variance_report.QUANTITIES[quantity]}, over fixed counts, by back-propagation\n")
        print(variance_report.ratio_table(groups, names, "fixed counts", quantity))
    print(f"\n({machine()})")


if __name__ == "__main__":
    main()
