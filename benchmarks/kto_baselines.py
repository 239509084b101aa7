"""
The baselines of ELBO-KTO next to each other: how noisy the gradient is, and what the answers gain, over fresh seeds.

    python benchmarks/kto_baselines.py --seeds 0 1 2 3 4
    python benchmarks/kto_baselines.py --report

Each cell (baseline, seed) is one training run on the base model and the marked answers of that seed, with the settings
of `examples/demo_kto.py`. Finished cells are kept in `runs/kto_baselines/results.jsonl` and not run again.

Gradient noise is measured at one policy per seed, the same for all baselines: that of a `batch_mean` run that was
stopped early, where there is still something to learn. It is the trace of the covariance of the gradient over global
micro-batches (rows and draws), over the squared norm of its mean: the inverse of a signal-to-noise ratio. The loss of
another baseline is another loss, so its noise alone says little. Running means stand at their true values there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import alignment
import demo_kto

from trl_diffusion import ELBOKTOConfig, ELBOKTOTrainer
from trl_diffusion.trainers.elbo_kto.baselines import BASELINES, DESIRABLE, UNDESIRABLE

NAMES = [*BASELINES, "kl"]
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
    output, made = folder / baseline, demo_kto.prepare(folder, seed)
    history = demo_kto.align(folder, output, seed=seed, eval_strategy="no", **options_of(baseline))
    aligned = PeftModel.from_pretrained(made["model"], output).eval()
    runtime = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {"baseline": baseline, "seed": seed, "seconds": runtime, **alignment.scores(aligned, made)}


def noise_trainer(root: Path, baseline: str, seed: int) -> ELBOKTOTrainer:
    """A trainer that stands where the short `batch_mean` run ended."""
    folder = root / f"seed-{seed}"
    made = demo_kto.prepare(folder, seed)
    if not (folder / "early" / "adapter_config.json").exists():
        demo_kto.align(folder, folder / "early", seed=seed, eval_strategy="no", max_steps=NOISE_STEPS, **FIXED_COUNTS)
    settings = demo_kto.ALIGNMENT | options_of(baseline)
    kept = ("num_mc_samples", "beta", "per_device_train_batch_size", "baseline", "batch_composition", *FIXED_COUNTS)
    kept = {name: settings[name] for name in (*kept, "train_sampling_strategy") if name in settings}
    policy = PeftModel.from_pretrained(made["model"], folder / "early", is_trainable=True)
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
    seeds = sorted({seed for name, seed in done if name == "base"})
    print("\nheld-out problems with every step right, in percent; gains in points with 95% t-intervals")
    print(
        "| baseline | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | gain | noise / signal | noise, x batch_mean | s |"
    )
    print("|---|" + "---|" * (len(seeds) + 4))
    for name in ["base", *NAMES]:
        rows = {seed: done[name, seed] for seed in seeds if (name, seed) in done}
        if not rows:
            continue
        cells = [f"{rows[seed]['right']:.1f}" if seed in rows else "" for seed in seeds]
        if name == "base":
            print(f"| base | {' | '.join(cells)} | | | | |")
            continue
        gains = [row["right"] - done["base", seed]["right"] for seed, row in rows.items()]
        noise = sum(row["variance"] for row in rows.values()) / sum(row["signal"] for row in rows.values())
        ratio = statistics.geometric_mean(
            [row["variance"] / done["batch_mean", seed]["variance"] for seed, row in rows.items()]
        )
        seconds = statistics.mean(row["seconds"] for row in rows.values())
        gain = alignment.mean_and_half_width(gains)
        print(f"| {name} | {' | '.join(cells)} | {gain} | {noise:.2f} | {ratio:.2f} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--baselines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kto_baselines"))
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = arguments.output_dir
    root.mkdir(parents=True, exist_ok=True)
    done = alignment.read(root, "baseline")
    for seed in () if arguments.report else arguments.seeds:
        made = demo_kto.prepare(root / f"seed-{seed}", seed)
        if ("base", seed) not in done:
            done["base", seed] = alignment.keep(
                root, {"baseline": "base", "seed": seed, **alignment.scores(made["model"], made)}
            )
        for name in sorted(arguments.baselines, key=NAMES.index):
            done = alignment.read(root, "baseline")  # another process may be at work on it too
            if (name, seed) not in done:
                row = run_cell(root, name, seed)
                done[name, seed] = alignment.keep(root, row | measure_noise(root, name, seed))
                print(json.dumps(done[name, seed]), flush=True)
    report(alignment.read(root, "baseline"))


if __name__ == "__main__":
    main()
