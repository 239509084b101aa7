"""
How noisy the preference score and its gradient are on natural English, under each estimator and law of levels.

    python benchmarks/natural_language.py            # about twelve minutes of one core, with the models
    python benchmarks/natural_language.py --report   # only print what is finished
    python benchmarks/natural_language.py --regimes "B32 near" "B64 far"    # besides, these settings of `variance.py`

A real, small model of English and two policies (`natural_model.py`), on text of package registries (`natural_text.py`,
which fetches it). Finished pairs are kept in `runs/natural/results.jsonl` and not measured again.

- Sets of pairs, none of which was trained on: answers against answers with three words and a letter changed ("edited"),
  against the answer to another question of the subject ("other"), the same without the opening that all answers share
  ("plain"); and passages against other passages, of 30, 60, 140, 300 and 450 tokens.
- Score: log-ratio of the chosen less that of the rejected response, in nats. Every pair is scored once, on mirror pairs
  of every level, from which all estimators are made again many times (`natural_tables.py`). The baseline are
  independent fixed counts (VRPO's eq. 14).
- Gradient: that of the difference of the two ELBOs under the near policy, with respect to the matrices of both layers,
  along a random direction v of each pair, of independent normal numbers. E (v . g)^2 is the square of the norm of g, so
  that the variance along v is on average the trace of the gradient's covariance; and along v every token's
  log-probability has a derivative, a number that is kept as its log-ratio is.
- Ratios are of means over pairs. Intervals: 95%, bootstrap over pairs.
"""

import argparse
import copy
import json
import random
import re
import time
from itertools import product
from pathlib import Path

import natural_model
import natural_tables
import natural_text
import torch
import variance_regimes
import variance_report as report
from counters import machine
from tqdm.auto import tqdm

from trl_diffusion import ControlVariate
from trl_diffusion.estimators.kappa import kappa_of_others, moments_of_kappa
from trl_diffusion.estimators.levels import concentration
from trl_diffusion.models.logits import hidden_states, logits_of

ROOT = Path("runs/natural")
LAWS = (1.0, None, 0.75, 0.5)  # None: by length, as by default
COUNTS = (2, 4, 8)
# Pairs of each set, and of how many the gradient is measured
ANSWERS = {"edited": (12, 0), "other": (12, 0), "plain": (12, 6)}
PASSAGES = {30: (24, 12), 60: (24, 12), 140: (24, 12), 300: (24, 12), 450: (4, 0)}
PROMPT = 24  # tokens before a passage
TWINS = 160
STEP = 1e-3  # along the direction of the gradient
LAYERS = re.compile(r"\.encoder\.|\.blocks\.")  # names of their parameters, of BERT and of LLaDA
TOKENS_PER_FORWARD = 2048
# Laws and control variates beside the default one: bandwidth and ridge; those of short responses under uniform levels
GRID = [(None, ControlVariate(1.0, *settings)) for settings in product((0.25, 0.5, 1.0), (0.1, 0.3, 1.0))]
GRID.append((1.0, ControlVariate(1.0, 0.25, 1.0)))
KAPPAS = (0.75, 1.0, 1.25)
# The default of long responses: at each of KAPPAS, and with the one that is learnt
OF_KAPPA, LEARNT = "by length, bandwidth=0.5, ridge=0.3, kappa=", "by length, control, kappa learnt"


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


# --- scores and derivatives ------------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model, prompt: list[int], response: list[int], masked: torch.Tensor) -> torch.Tensor:
    """`(N, T)` nats of the hidden tokens of a response under masks `(N, T)`, zero elsewhere."""
    found = torch.zeros(masked.shape)
    size = max(1, TOKENS_PER_FORWARD // (len(prompt) + len(response)))
    for part, values in zip(masked.split(size), found.split(size), strict=True):
        whole = torch.cat([torch.zeros(len(part), len(prompt), dtype=torch.bool), part], 1)
        ids = torch.tensor(prompt + response).expand(whole.shape)
        hidden = hidden_states(model, ids.masked_fill(whole, model.config.mask_token_id))[whole]
        values[part] = -torch.nn.functional.cross_entropy(logits_of(model, hidden), ids[whole], reduction="none")
    return found


def moved(model, direction: int, step: float):
    """A copy whose matrices of the layers are `step` further along the direction of this number."""
    generator, other = torch.Generator().manual_seed(direction), copy.deepcopy(model)
    for name, p in other.named_parameters():
        if LAYERS.search(name) and p.dim() == 2:
            p.data += step * torch.randn(p.shape, generator=generator)
    return other


def score_pair(models: dict, pair, number: int, with_gradient: bool) -> list[natural_tables.Table]:
    """Log-ratios of every model to "base", and the derivative along direction `number` under the first policy."""
    prompt, *responses = pair
    policy = next(model for name, model in models.items() if name != "base")
    ahead, behind = (moved(policy, number, s) if with_gradient else None for s in (STEP, -STEP))

    def score(response, masked):
        values = {name: log_probs(model, prompt, response, masked) for name, model in models.items()}
        found = {name: value - values["base"] for name, value in values.items() if name != "base"}
        if with_gradient:
            change = [log_probs(model, prompt, response, masked) for model in (ahead, behind)]
            found["gradient"] = (change[0] - change[1]) / (2 * STEP)
        return found

    return natural_tables.score_pair(responses, score, torch.Generator().manual_seed(number))


# --- estimators ------------------------------------------------------------------------------------------------------


def read_off(tables: list[natural_tables.Table]) -> dict[str, dict[str, float]]:
    """By "estimator|K": variances of the score under each policy, and along the direction of the gradient."""
    names, length = list(tables[0].values), max(x.masked.shape[-1] for x in tables)
    single = {name: sum(natural_tables.paper_variance(x, name) for x in tables) for name in names}
    cells = {f"fixed counts|{count}": {name: single[name] / count for name in names} for count in COUNTS}

    def add(law: float | None, count: int, control: ControlVariate, labels: dict[str, float]) -> None:
        mass = natural_tables.masses(tables[0].edges, length, law)
        picked = natural_tables.pick(tables[0], mass, count, TWINS, torch.Generator().manual_seed(0))
        parts = [natural_tables.estimates(x, mass, picked, control) for x in tables]
        for name in names:
            apart = [natural_tables.moments(part[name]) for part in parts]
            coupled = natural_tables.moments(parts[0][name] - parts[1][name])
            for label, kappa in labels.items():
                own = sum(natural_tables.variance(found, kappa) for found in apart)
                cells.setdefault(f"{label}|{count}", {})[name] = own
                cells.setdefault(f"{label}, coupled|{count}", {})[name] = natural_tables.variance(coupled, kappa)

    for law, count in product(LAWS, COUNTS):
        add(law, count, ControlVariate(), {_law(law): 0.0, f"{_law(law)}, control": ControlVariate().kappa})
    for (law, control), count in product(GRID, COUNTS[1:]):
        label = f"{_law(law)}, bandwidth={control.bandwidth:g}, ridge={control.ridge:g}"
        add(law, count, control, {f"{label}, kappa={kappa:g}": kappa for kappa in KAPPAS})
    return cells


def _law(a: float | None) -> str:
    return "by length" if a is None else f"a={a:g}"


def measure_pair(models: dict, pair, number: int, with_gradient: bool = False) -> dict:
    """Cells of [`read_off`] of one pair, and the log-ratio of both responses under each policy."""
    tables = score_pair(models, pair, number, with_gradient)
    elbos = {name: [natural_tables.elbo(x, name) for x in tables] for name in models if name != "base"}
    return {"cells": read_off(tables), "log_ratios": elbos}


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(root: Path, path: Path) -> None:
    """Everything on natural language that is not in `path` yet; some of every set first."""
    natural_text.fetch(root)
    natural_model.build(root)
    models = {name: natural_model.load(root, name) for name in ("base", *natural_model.POLICIES)}
    pairs, sizes = make_pairs(root), {**ANSWERS, **{str(length): size for length, size in PASSAGES.items()}}
    jobs = [(i / len(group), kind, i) for kind, group in pairs.items() for i in range(len(group))]
    for _, kind, i in tqdm(sorted(jobs), desc="measuring"):
        _measure_once(path, models, kind, i, pairs[kind][i], i < sizes[kind][1])


def measure_regime(name: str, path: Path) -> None:
    """Pairs of a setting of `variance.py` that are not in `path` yet."""
    regime = variance_regimes.load_regime(name, num_pairs=12)
    models = {"base": regime.reference, name.split()[1]: regime.policy}
    for i, pair in enumerate(tqdm(regime.pairs, desc=name)):
        _measure_once(path, models, name, i, pair, with_gradient=True)


def _measure_once(path: Path, models: dict, kind: str, number: int, pair, with_gradient: bool) -> None:
    if (kind, number) in {(row["set"], row["pair"]) for row in report.read(path)}:
        return
    start, (_, chosen, rejected) = time.process_time(), pair
    same = sum(map(int.__eq__, chosen, rejected)) / max(len(chosen), len(rejected))
    row = {"set": kind, "pair": number, "lengths": [len(chosen), len(rejected)], "overlap": same}
    row |= measure_pair(models, pair, number, with_gradient)
    with open(path, "a") as file:
        print(json.dumps(row | {"seconds": time.process_time() - start}), file=file)


# --- what came out ---------------------------------------------------------------------------------------------------


def learn_kappa(rows: list[dict]) -> None:
    """
    Put cells "... kappa learnt" into rows: the kappa that is best for the scores of the other pairs of a set together.

    That is what a trainer learns from past steps. A gradient has the kappa of its policy's scores.
    """
    for kind, count, coupled in product({row["set"] for row in rows}, COUNTS[1:], ("", ", coupled")):
        group = [row["cells"] for row in rows if row["set"] == kind]
        names = [f"{OF_KAPPA}{kappa:g}{coupled}|{count}" for kappa in KAPPAS]
        quantities = list(group[0][names[0]])
        parts = {
            quantity: moments_of_kappa(
                torch.tensor([[cells[n].get(quantity, 0.0) for n in names] for cells in group], dtype=torch.float64),
                KAPPAS,
            )
            for quantity in quantities
        }
        for quantity, (plain, covariance, square) in parts.items():
            _, *of_score = parts[quantity if quantity in natural_model.POLICIES else quantities[0]]
            kappa = kappa_of_others(*of_score)
            for cells, value in zip(group, plain - 2 * kappa * covariance + kappa.square() * square, strict=True):
                if quantity in cells[names[0]]:
                    cells.setdefault(f"{LEARNT}{coupled}|{count}", {})[quantity] = value.item()


def tables(rows: list[dict]) -> str:
    """What was measured, and variances over those of fixed counts at equal K, by set and for all sets together."""
    learn_kappa(rows)
    lines = [_what_was_measured(rows)]
    for quantity, words in (("near", "Score, near policy"), ("far", "Score, far policy"), ("gradient", "Gradient")):
        groups: dict[str, list[dict]] = {}
        for row in rows:
            if quantity in row["cells"]["fixed counts|8"]:
                groups.setdefault(row["set"], []).append(row)
        for count in COUNTS if groups else ():
            cells = [name for name in next(iter(groups.values()))[0]["cells"] if name.endswith(f"|{count}")]
            for title, of_grid in (("", False), (", other settings of the control variate", True)):
                chosen = [name for name in cells if ("bandwidth" in name) == of_grid]
                if chosen:
                    lines.append(f"\n## {words}, K = {count}{title}\n")
                    lines.append(_ratios(groups, chosen, f"fixed counts|{count}", quantity))
    return "\n".join(lines)


def _ratios(groups: dict[str, list[dict]], names: list[str], baseline: str, quantity: str) -> str:
    body = []
    for name in names:
        ratios = [report.ratio(group, name, baseline, quantity) for group in groups.values()]
        mean = report.interval(report.geometric_mean(ratios))
        body.append([name.partition("|")[0], *map(report.interval, ratios), mean])
    return report.table(["estimator", *groups, "geometric mean"], body)


def _what_was_measured(rows: list[dict]) -> str:
    body = []
    for kind in dict.fromkeys(row["set"] for row in rows):
        group = [row for row in rows if row["set"] == kind]
        lengths = [length for row in group for length in row["lengths"]]
        overlap = sum(row["overlap"] for row in group) / len(group)
        with_gradient = sum("gradient" in row["cells"]["fixed counts|8"] for row in group)
        line = [kind, str(len(group)), str(with_gradient), f"{min(lengths)} to {max(lengths)}", f"{overlap:.2f}"]
        line.append(f"{concentration(max(lengths)):.2f} to {concentration(min(lengths)):.2f}")
        for policy in natural_model.POLICIES:
            ratios = [row["log_ratios"][policy] for row in group if policy in row["log_ratios"]]
            line += [f"{sum(x) / len(ratios):+.1f}" for x in zip(*ratios, strict=True)] or ["", ""]
        body.append(line)
    head = ["set", "pairs", "with gradient", "tokens", "overlap", "a by default"]
    head += [
        f"{policy}: log-ratio, {response}" for policy in natural_model.POLICIES for response in ("chosen", "rejected")
    ]
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
