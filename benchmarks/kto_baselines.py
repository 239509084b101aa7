"""
The baselines of ELBO-KTO next to each other: how noisy the gradient is, and what the answers gain, over fresh seeds.

    python benchmarks/kto_baselines.py --seeds 2000 2001
    python benchmarks/kto_baselines.py --report

Each cell (baseline, seed) is one training run on the base model and the marked answers of a start of `demo_starts.py`,
with the settings of `examples/demo_kto.py`. Finished cells are kept in `runs/demo_starts/kto_baselines.jsonl` and not
run again.

Gradient noise is measured at one policy per seed, the same for all baselines: that of a `batch_mean` run that was
stopped early, where there is still something to learn. It is the trace of the covariance of the gradient over global
micro-batches (rows and draws), over the squared norm of its mean: the inverse of a signal-to-noise ratio. The loss of
another baseline is another loss, so its noise alone says little. Running means stand at their true values there.
"""

import statistics
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo
from cells import before_and_after, run_cells
from demo_kto import ELBO_KTO
from demo_starts import mean_and_half_width

from trl_diffusion import ELBOKTOConfig, ELBOKTOTrainer
from trl_diffusion.trainers.elbo_kto.baselines import BASELINES, DESIRABLE, UNDESIRABLE

NAMES = list(BASELINES)
NOISE_BATCHES = 32
NOISE_STEPS = 20  # of the run at whose end the noise is measured


FIXED_COUNTS = {"mask_scheme": "fixed_count", "control_variate": "none"}  # the estimator of all cells


def options_of(baseline: str) -> dict:
    """TRL's own baseline needs its own order of the rows."""
    if baseline == "kl":
        return FIXED_COUNTS | {"baseline": "kl", "batch_composition": "random", "train_sampling_strategy": "sequential"}
    return FIXED_COUNTS | {"baseline": baseline}


def run_cell(root: Path, baseline: str, seed: int) -> dict:
    folder = root / f"seed-{seed}"
    output, made = folder / f"kto-{baseline}", demo.prepare(folder, seed)
    history = demo.align(folder, output, ELBO_KTO, seed=seed, eval_strategy="no", **options_of(baseline))
    before, after = before_and_after(made, output, made["splits"]["test"])
    runtime = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {"baseline": baseline, "seed": seed, "seconds": runtime, "before": before, "after": after}


def noise_trainer(root: Path, baseline: str, seed: int) -> ELBOKTOTrainer:
    """A trainer that stands where the short `batch_mean` run ended."""
    folder = root / f"seed-{seed}"
    made = demo.prepare(folder, seed)
    early = folder / "kto-early"
    demo.align(folder, early, ELBO_KTO, seed=seed, eval_strategy="no", max_steps=NOISE_STEPS, **FIXED_COUNTS)
    settings = ELBO_KTO.settings | options_of(baseline)
    kept = ("num_mc_samples", "beta", "per_device_train_batch_size", "baseline", "batch_composition", *FIXED_COUNTS)
    kept = {name: settings[name] for name in (*kept, "train_sampling_strategy") if name in settings}
    policy = PeftModel.from_pretrained(made["model"], early, is_trainable=True)
    return ELBOKTOTrainer(
        policy,
        args=ELBOKTOConfig(str(folder / "noise"), use_cpu=True, bf16=False, report_to="none", seed=seed, **kept),
        train_dataset=load_dataset("json", data_files=str(folder / "thumbs" / "train.jsonl"), split="train"),
        processing_class=made["tokenizer"],
    )


def measure_noise(root: Path, baseline: str, seed: int) -> dict:
    """Gradients of the loss over many micro-batches, each with new rows and new draws."""
    trainer = noise_trainer(root, baseline, seed)
    # The reference of the run is the model without its adapter, not a copy of the trained one
    trainer.model.delete_adapter("ref")
    trainer.model.train()
    if trainer._running_means:
        settle_running_means(trainer)
    gradients = []
    batches = iter(trainer.get_train_dataloader())
    for step in range(NOISE_BATCHES):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(trainer.get_train_dataloader())
            batch = next(batches)
        trainer.state.global_step = step
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    stacked = torch.stack(gradients).double()
    mean, variance = stacked.mean(0), stacked.var(0).sum()
    signal = mean.square().sum() - variance / NOISE_BATCHES  # the mean of n has a part of the noise in it
    return {"variance": variance.item(), "signal": signal.item()}


def settle_running_means(trainer) -> None:
    """The true mean log-ratios at this policy."""
    decay, trainer._running_means.means.decay = trainer._running_means.means.decay, 0.0
    totals = torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            outputs = trainer.compute_ref_log_probs(trainer.model, batch)[0]
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            arguments = {key: batch[key] for key in ("input_ids", "attention_mask")}
            policy = trainer.model(**arguments, labels=labels, fused_lm_head=True).log_probs.sum(1)
            for label, wanted in ((DESIRABLE, True), (UNDESIRABLE, False)):
                rows = batch["label"] == wanted
                totals[label] += torch.tensor([(policy - outputs)[rows].sum(), rows.sum()], dtype=torch.float64)
    means = trainer._running_means.means
    means.overall = (totals[:, 0].sum() / totals[:, 1].sum()).item()
    means.by_class = (totals[:, 0] / totals[:, 1]).tolist()
    means.decay = decay


def report(done: dict) -> None:
    """Gains and noise, with 95% t-intervals."""
    print("\n| baseline | starts | every step right | gain | worst | noise / signal | noise, x batch_mean |")
    print("|---|---|---|---|---|---|---|")
    for name in NAMES:
        rows = {seed: row for (baseline, seed), row in done.items() if baseline == name}
        if not rows:
            continue
        gains = [row["after"]["right"] - row["before"]["right"] for row in rows.values()]
        ends = [statistics.mean(row[when]["right"] for row in rows.values()) for when in ("before", "after")]
        noise = sum(row["variance"] for row in rows.values()) / sum(row["signal"] for row in rows.values())
        ratios = [
            row["variance"] / done["batch_mean", seed]["variance"]
            for seed, row in rows.items()
            if ("batch_mean", seed) in done
        ]
        cells = [f"`{name}`", len(rows), "{:.1f} -> {:.1f}".format(*ends), mean_and_half_width(gains)]
        cells += [f"{min(gains):+.1f}", f"{noise:.2f}", f"{statistics.geometric_mean(ratios):.2f}" if ratios else ""]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    run_cells(
        *(__doc__, NAMES, range(2000, 2008), "kto_baselines.jsonl"),
        lambda root, name, seed: run_cell(root, name, seed) | measure_noise(root, name, seed),
        *(report, "baseline"),
    )
