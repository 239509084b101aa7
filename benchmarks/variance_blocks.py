"""
Which estimators pay inside blocks: variance over that of fixed counts at equal forwards, for blocks of 4 and 32 tokens.

    python benchmarks/block_word_problems.py --seeds 0   # makes a model of the sums, and pairs
    python benchmarks/variance_blocks.py                 # makes the others; some ten minutes of a core in all
    python benchmarks/variance_blocks.py --report        # only print what is finished

Sums: the task of `block_word_problems.py`, and pairs of its model's own answers. Stories: of 96 words
(`grammar_text.py`). Policies are the reference after some steps of VRPO with all weights trained, as in
`variance_regimes.py`, and the pairs were not trained on. Blocks are drawn for independently, so that a variance is the
sum of those of blocks. One forward scores a mask of every block. A block of four has fifteen: they are all scored, and
repeats are look-ups; of larger blocks the masks that were drawn are scored.

Score: the difference of log-ratios of a pair, in nats. Gradient: that of the difference of the two ELBOs with respect
to the output head, sketched (`variance_tables.py`), the trace of its covariance. Ratios are of means over pairs, with
95% intervals, bootstrap over pairs.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import block_word_problems
import torch
import variance_report
from block_models import pretrain_on_stories
from counters import machine
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from variance_estimators import as_batch
from variance_regimes import POLICIES, SEED, story_pair, train_policy
from variance_tables import Sketch, Table, distinct, mask_key

from trl_diffusion import ControlVariate, MaskDraws, MaskSampler
from trl_diffusion.estimators.cells import find_cells
from trl_diffusion.models import blocks as passes
from trl_diffusion.models.families import blocks_of

ROOT = Path("runs/variance_blocks")
# By task and tokens of a block: pairs and repeats
CELLS = {("sums", 4): (24, 100), ("stories", 4): (12, 60), ("stories", 32): (12, 16)}
STORY = 96  # words
MIRROR = {"scheme": "mirror", "stratify": True}
COUPLED = {**MIRROR, "couple_pairs": True}
# Spelled out: what is measured is the same whatever the defaults are
NARROW = {"control_variate": ControlVariate(bandwidth=0.25, ridge=1.0)}
WIDE = {"control_variate": ControlVariate(bandwidth=0.5, ridge=0.3)}
PAPER = "fixed counts (the VRPO paper)"
DEFAULT = "the default"  # goes by the tokens of a block
ESTIMATORS = {
    DEFAULT: {**COUPLED, "control_variate": ControlVariate(), "level_concentration": None},
    "fixed counts, stratified": {"scheme": "fixed_count", "stratify": True},
    "mirror": {"scheme": "mirror"},
    "mirror, stratified": MIRROR,
    "mirror, stratified, narrow control": {**MIRROR, **NARROW},
    "mirror, stratified, wide control": {**MIRROR, **WIDE},
    "mirror, stratified, coupled": COUPLED,
    "coupled, narrow control": {**COUPLED, **NARROW},
    "coupled, wide control": {**COUPLED, **WIDE},
    "coupled, narrow control, a = 0.75": {**COUPLED, **NARROW, "level_concentration": 0.75},
    "coupled, wide control, a = 0.75": {**COUPLED, **WIDE, "level_concentration": 0.75},
    "coupled, wide control, a = 0.5": {**COUPLED, **WIDE, "level_concentration": 0.5},
}
DRAWS = (2, 4, 8)
WHOLE = ", whole blocks"
ROWS_AT_ONCE = 64


# --- models and pairs ------------------------------------------------------------------------------------------------


def build(task: str, block: int, root: Path, sums: Path) -> Path:
    """Reference, policies and held-out pairs of a task, made unless they are there."""
    folder, number = root / f"{task}-{block}", CELLS[task, block][0]
    if not (folder / "reference" / "config.json").exists():
        tokenizer, model = _model_of_sums(sums) if task == "sums" else pretrain_on_stories(block, SEED)
        tokenizer.save_pretrained(folder / "reference")
        model.save_pretrained(folder / "reference")
    if not (folder / "heldout.jsonl").exists():
        training, heldout = _pairs_of_sums(sums, number) if task == "sums" else _pairs_of_stories(number)
        training.to_json(folder / "training.jsonl")
        heldout.to_json(folder / "heldout.jsonl")
    for name, (steps, learning_rate) in POLICIES[task].items():
        if not (folder / name / "config.json").exists():
            train_policy(folder, name, steps, learning_rate)
    return folder


def _model_of_sums(sums: Path) -> tuple:
    made = block_word_problems.prepare(sums / f"seed-{SEED}", SEED)
    return made["tokenizer"], made["model"]


def _pairs_of_sums(sums: Path, number: int) -> tuple[Dataset, Dataset]:
    pairs = block_word_problems.prepare(sums / f"seed-{SEED}", SEED)["pairs"]
    return pairs.select(range(number, len(pairs))), pairs.select(range(number))


def _pairs_of_stories(number: int) -> tuple[Dataset, Dataset]:
    rng, kinds = random.Random(SEED + 1), ("edit", "other")
    training = [story_pair(rng, rng.choice((24, 32, 48, 64)), kinds[i % 2]) for i in range(192)]
    heldout = [story_pair(rng, STORY, kinds[i % 2]) for i in range(number)]
    columns = ["prompt", "chosen", "rejected"]
    return Dataset.from_list(training).select_columns(columns), Dataset.from_list(heldout).select_columns(columns)


# --- one pair --------------------------------------------------------------------------------------------------------


class Pair:
    """A prompt and two responses as rows, and their blocks."""

    def __init__(self, config, prompt: list[int], responses: list[list[int]]):
        self.ids, self.real, self.maskable = as_batch(prompt, responses)
        self.blocks = blocks_of(config, self.maskable, self.real)
        self.cells = find_cells(self.maskable, self.blocks)
        self.sizes = self.cells.maskable.sum(1).tolist()

    def draw(self, sampler: MaskSampler, repeats: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Masks and weights `(K, R, W)` of each block of both responses."""
        draws = [sampler(self.maskable, self.ids, self.real, nonce, blocks=self.blocks) for nonce in range(repeats)]
        masked, weight = (
            self.cells.gather(torch.stack([getattr(d, name) for d in draws], dim=1)) for name in ("masked", "weight")
        )
        return [(masked[:, :, cell, :size], weight[:, :, cell, :size]) for cell, size in enumerate(self.sizes)]

    @torch.no_grad()
    def score(self, policies: dict, reference, masks: list[torch.Tensor], sketch: Sketch) -> dict[str, list[Table]]:
        """Tables of each policy, of blocks under their masks `(N, W)`; the n-th masks of all blocks are run at once."""
        most = max(map(len, masks))
        cells = torch.zeros(most, *self.cells.maskable.shape, dtype=torch.bool)
        for cell, of_block in enumerate(masks):
            cells[: len(of_block), cell, : of_block.shape[1]] = of_block
        masked = self.cells.scatter(cells)
        of_reference, _ = self._run(reference, masked, None)
        found = {}
        for name, policy in policies.items():
            of_policy, sketched = self._run(policy, masked, sketch)
            found[name] = [
                Table(
                    of_block,
                    *(part[: len(of_block), cell, : of_block.shape[1]] for part in (of_policy, of_reference, sketched)),
                    place={mask_key(mask): row for row, mask in enumerate(of_block.numpy())},
                )
                for cell, of_block in enumerate(masks)
            ]
        return found

    def _run(self, model, masked: torch.Tensor, sketch: Sketch | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N, C, W)` nats of hidden tokens, and the sketches of their gradients."""
        values = torch.zeros(masked.shape)
        sketched = torch.zeros(*masked.shape, 64 if sketch else 0)
        for row, (ids, real, numbers) in enumerate(zip(self.ids, self.real, self.blocks, strict=True)):
            ids, numbers = ids[real], numbers[real]
            first = int((numbers < numbers[self.maskable[row].nonzero()[0]]).sum())
            clean = int((numbers < numbers[-1]).sum())
            _, history = passes.read(model, ids[:clean], numbers[:clean])
            for start in range(0, len(masked), ROWS_AT_ONCE):
                hide = masked[start : start + ROWS_AT_ONCE, row, first : len(ids)]
                noised = ids[first:].masked_fill(hide, model.config.mask_token_id)
                hidden = passes.denoise(model, noised, numbers[first:], first, history)[hide]
                log_probs = model.get_output_embeddings()(hidden).log_softmax(-1)
                targets = ids[first:].expand(hide.shape)[hide]
                here = (slice(start, start + ROWS_AT_ONCE), row, slice(first, len(ids)))
                values[here][hide] = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
                if sketch:
                    sketched[here][hide] = sketch(log_probs, targets, hidden)
        return self.cells.gather(values), self.cells.gather(sketched.movedim(-1, 0)).movedim(0, -1)

    def read(self, tables: list[Table], drawn: list) -> dict[int, "OfBlock"]:
        """By number of the block what it adds to the estimates of the pair."""
        blocks: dict[int, OfBlock] = {}
        for table, parts, row, number in zip(
            tables, drawn, self.cells.row.tolist(), self.cells.number.tolist(), strict=True
        ):
            values, sign = table.read(MaskDraws(*parts)), 1 - 2 * row
            ratio, size = values["policy"] - values["reference"], table.masks.shape[1]
            here = OfBlock(sign * ratio, sign * values["gradient"], size)
            blocks[number] = here + blocks[number] if number in blocks else here
        return blocks


@dataclass(frozen=True)
class OfBlock:
    """
    R repeats of one block's part.

    Args:
        score: `(R,)` nats, log-ratio of the chosen less that of the rejected response.
        gradient: `(R, D)`, sketched, of the policy's.
        size: tokens of the smaller one.
    """

    score: torch.Tensor
    gradient: torch.Tensor
    size: int

    def __add__(self, other: "OfBlock") -> "OfBlock":
        return OfBlock(self.score + other.score, self.gradient + other.gradient, min(self.size, other.size))


def variances(blocks: list[OfBlock]) -> dict[str, float]:
    """Of score and gradient: sums over blocks, which are drawn for independently."""
    of_gradient = sum(block.gradient.double().var(0).sum().item() for block in blocks)
    return {"score": sum(block.score.var().item() for block in blocks), "gradient": of_gradient}


def measure(task: str, block: int, folder: Path, path: Path) -> None:
    """All pairs that are not in `path` yet, under both policies."""
    _, repeats = CELLS[task, block]
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("reference", *POLICIES[task])
    }
    reference = models.pop("reference")
    sketch = Sketch(reference.config.vocab_size, reference.config.hidden_size)
    done = {(row["regime"], row["pair"]) for row in variance_report.read(path)}
    for number, texts in enumerate(map(json.loads, (folder / "heldout.jsonl").read_text().splitlines())):
        names = {name: f"{task}, {block}, {name}" for name in models}
        if all((regime, number) in done for regime in names.values()):
            continue
        start, end = time.monotonic(), [tokenizer.eos_token_id]
        prompt, *responses = (tokenizer(texts[key])["input_ids"] for key in ("prompt", "chosen", "rejected"))
        pair = Pair(reference.config, prompt, [response + end for response in responses])
        drawn = {
            (name, draws): pair.draw(MaskSampler(draws, **options), repeats)
            for name, options in ESTIMATORS.items()
            for draws in DRAWS
        }
        # Independent draws: what K of them have is what one has over K
        drawn[PAPER, 1] = pair.draw(MaskSampler(1, "fixed_count"), max(DRAWS) * repeats)
        masks = [distinct(parts[cell][0] for parts in drawn.values()) for cell in range(len(pair.sizes))]
        for name, tables in pair.score(models, reference, masks, sketch).items():
            read = {key: list(pair.read(tables, parts).values()) for key, parts in drawn.items()}
            for which, least in (("", 0), (WHOLE, block)):
                cells = {
                    f"{key}|{draws}": variances([part for part in blocks if part.size >= least])
                    for (key, draws), blocks in read.items()
                }
                single = cells.pop(f"{PAPER}|1")
                cells |= {f"{PAPER}|{k}": {what: value / k for what, value in single.items()} for k in DRAWS}
                row = {"regime": names[name] + which, "pair": number, "cells": cells}
                with open(path, "a") as file:
                    print(json.dumps(row | {"seconds": time.monotonic() - start}), file=file)


def tables(rows: list[dict]) -> str:
    regimes = [f"{task}, {block}, {policy}" for task, block in CELLS for policy in POLICIES[task]]
    regimes += [regime + WHOLE for regime in regimes if ", 32, " in regime]
    groups = {regime: [row for row in rows if row["regime"] == regime] for regime in regimes}
    groups = {name: group for name, group in groups.items() if group}
    parts = []
    for quantity in ("score", "gradient"):
        for draws in DRAWS:
            names = {name: f"{name}|{draws}" for name in (PAPER, *ESTIMATORS)}
            parts += [f"\n## {quantity}, K = {draws}\n"]
            parts += [variance_report.ratio_table(groups, names, f"{PAPER}|{draws}", quantity)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=[f"{task}-{block}" for task, block in CELLS])
    parser.add_argument("--output_dir", type=Path, default=ROOT)
    parser.add_argument("--sums", type=Path, default=block_word_problems.ROOT, help="where the model of the sums is")
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "results.jsonl"
    for task, block in () if arguments.report else CELLS:
        if f"{task}-{block}" in arguments.blocks:
            measure(task, block, build(task, block, arguments.output_dir, arguments.sums), path)
    print(tables(variance_report.read(path)))
    print(f"\n({machine()})")


if __name__ == "__main__":
    main()
