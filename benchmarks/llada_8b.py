"""
Memory and speed of VRPO with QLoRA at the size of LLaDA-8B, on one GPU, without downloading anything.

    python benchmarks/llada_8b.py [--checkpoint DIR] [--steps 5] [--draws 8]

Makes a model of LLaDA-8B's exact shape with random weights, saves it under the published names (16 GB on disk), loads
it back in nf4 or bfloat16 and trains a LoRA (r = 16, all linear layers of the blocks) on one pair of 256 + 768 tokens a
step, as `examples/vrpo_lora.py` does. Random weights cost what trained ones do. Prints peak memory, what
`estimate_memory` says of it, seconds per step, tokens per second and the share of the machine's measured bf16 matrix
rate. `--tiny` runs the same path with a small model on the CPU, where live bytes are counted, to check this script.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from counters import LiveBytes, machine
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, LLaDAConfig, LLaDAModelLM
from trl_diffusion.planning.fit import estimate_run

PROMPT_TOKENS, RESPONSE_TOKENS = 256, 768
PUBLISHED = {"mlp_hidden_size": 12288}  # all else are the defaults of LLaDAConfig
TINY = {"d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 128}
# Options of the trainer; `load_in_4bit` is of the model, and `num_mc_samples` is `--draws` where a variant has none
VARIANTS: dict[str, dict] = {
    "nf4, layer checkpointing": {"gradient_checkpointing": True},
    "nf4": {"gradient_checkpointing": False},
    "nf4, precomputed reference": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "nf4, 32 draws": {"gradient_checkpointing": False, "num_mc_samples": 32},
    "bfloat16, layer checkpointing": {"gradient_checkpointing": True, "load_in_4bit": False},
    "bfloat16": {"gradient_checkpointing": False, "load_in_4bit": False},
}


def make_tokenizer(config) -> PreTrainedTokenizerFast:
    """One token per word `w123`: texts of a known number of tokens."""
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end, mask = f"w{config.eos_token_id}", f"w{config.mask_token_id}"
    special = {"eos_token": end, "pad_token": end, "unk_token": "w0", "mask_token": mask}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_checkpoint(folder: Path, tiny: bool) -> None:
    if (folder / "config.json").exists():
        return
    config = LLaDAConfig(**(TINY if tiny else PUBLISHED))
    print(f"Making a checkpoint with random weights in {folder} ...")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LLaDAModelLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    make_tokenizer(config).save_pretrained(folder)


def make_pairs(rows: int) -> Dataset:
    """Prompts and responses of a fixed number of tokens; the end of text is the last one of a response."""
    generator = torch.Generator().manual_seed(0)

    def text(tokens):
        return " ".join(f"w{i}" for i in torch.randint(1, 100_000, (tokens,), generator=generator).tolist())

    row = {"prompt": PROMPT_TOKENS, "chosen": RESPONSE_TOKENS, "rejected": RESPONSE_TOKENS}
    return Dataset.from_list(
        [{name: f" {text(n - (name != 'prompt'))} " for name, n in row.items()} for _ in tqdm(range(rows), "pairs")]
    )


class Stopwatch(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        synchronise()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronise()
        self.seconds.append(time.perf_counter() - self.start)


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate() -> float:
    """FLOP/s of a large bf16 matrix product on this device."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    synchronise()
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    synchronise()
    return 20 * 2 * 8192**3 / (time.perf_counter() - start)


def needed_flops(config, num_mc_samples: int, precomputed: bool) -> float:
    """Matrix products of one pair: policy forward, gradient of its activations, reference forward; attention too."""
    tokens = 2 * num_mc_samples * (PROMPT_TOKENS + RESPONSE_TOKENS)
    head_dim = config.d_model // config.n_heads
    linears = (
        config.n_layers
        * config.d_model
        * (2 * config.d_model + 2 * config.n_kv_heads * head_dim + 3 * config.mlp_hidden_size)
    )
    attention = 2 * config.n_layers * config.d_model * (PROMPT_TOKENS + RESPONSE_TOKENS)
    head = config.d_model * config.vocab_size * RESPONSE_TOKENS / (2 * (PROMPT_TOKENS + RESPONSE_TOKENS))
    return 2 * tokens * (linears + attention + head) * (2 if precomputed else 3)


def measure(checkpoint: Path, options: dict, args) -> dict:
    """Train a few steps in this process."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    options = {"num_mc_samples": args.draws, "load_in_4bit": True} | options
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    weights = {"quantization_config": in_4_bits} if options.pop("load_in_4bit") else {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch()
    trainer = DiffusionVRPOTrainer(
        str(checkpoint),
        args=DiffusionVRPOConfig(
            str(checkpoint.parent / "out"),
            per_device_train_batch_size=1,
            max_steps=args.steps,
            draws_per_forward=args.draws_per_forward,
            max_length=PROMPT_TOKENS + RESPONSE_TOKENS,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            model_init_kwargs={"dtype": "bfloat16"},
            **options,
        ),
        train_dataset=make_pairs(args.steps),
        callbacks=[watch],
        **weights,
        peft_config=LoraConfig(r=16, lora_alpha=32),
    )
    estimate = estimate_run(trainer)
    counter = contextlib.nullcontext() if torch.cuda.is_available() else LiveBytes()
    with counter:
        trainer.train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:  # what was there before is not counted
        peak = counter.peak + estimate.weights + estimate.adapters
    seconds = watch.seconds[1:] or watch.seconds  # the first step warms up
    return {
        "peak": peak,
        "estimate": estimate.total,
        "seconds": statistics.median(seconds),
        "spread": (min(seconds), max(seconds)),
        "config": trainer.model.get_base_model().config,
        "draws": options["num_mc_samples"],
    }


def report(name: str, result: dict, options: dict) -> None:
    tokens = 2 * result["draws"] * (PROMPT_TOKENS + RESPONSE_TOKENS)
    flops = needed_flops(result["config"], result["draws"], "precompute_ref_log_probs" in options)
    share = f"{flops / result['seconds'] / matmul_rate():.0%}" if torch.cuda.is_available() else "-"
    low, high = result["spread"]
    memory = f"{result['peak'] / 1e9:.2f} | {result['estimate'] / 1e9:.2f}"
    print(
        f"| {name} | {memory} | {result['seconds']:.2f} ({low:.2f}-{high:.2f}) | {tokens / result['seconds']:.0f} | "
        f"{share} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="by default under runs/llada_8b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--draws", type=int, default=8, help="num_mc_samples")
    parser.add_argument("--draws_per_forward", type=int, default=None)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU too")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one here; by default each in its own process")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or Path("runs/llada_8b") / ("tiny" if args.tiny else "checkpoint")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this needs a GPU; `--tiny` checks the script without one")
    if args.variant:
        report(args.variant, measure(args.checkpoint, VARIANTS[args.variant], args), VARIANTS[args.variant])
        return
    make_checkpoint(args.checkpoint, args.tiny)
    columns = ("", "peak GB", "estimated GB", "s / step (range)", "tokens/s", "share of bf16 matmul rate")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in VARIANTS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--variant", name], check=True)
    print(f"\n{machine()}. K={args.draws}, {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens, one pair a step.")


if __name__ == "__main__":
    main()
