"""
What the sampler's settings cost and change, counted in forwards and tokens, see docs/generation.md.

    python benchmarks/sampling.py

Two models. That of the demo (`examples/word_problems.py`), which is pre-trained first and kept, answers held-out
problems: how many answers are those of one token a step, and how many are right. The other has LLaDA's layers and the
proportions of its use, a prompt of 128 tokens and a canvas of 256 in blocks of 32, but random weights: its counts are
those of the settings that do not look at probabilities or ends.
"""

import argparse
import sys
from pathlib import Path

import torch
from counters import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import word_problems as task

from trl_diffusion import LLaDAConfig, LLaDAModelLM, compare_sampling

SEED = 0
SIZE = {"d_model": 96, "n_layers": 2, "mlp_hidden_size": 256, "steps": 600, "goal": 0.95}  # as in the demo
ONE = "one token a step"


def settings(canvas: int, block: int) -> dict[str, dict]:
    """By name; what they are compared with is the first."""
    in_blocks = {"block_length": block}
    return {
        ONE: in_blocks,
        "`steps`: two tokens a step": {**in_blocks, "steps": canvas // 2},
        "`confidence_threshold=0.9`": {**in_blocks, "confidence_threshold": 0.9},
        "`logits_eos_inf`": {**in_blocks, "logits_eos_inf": True},
        "`confidence_eos_eot_inf`": {**in_blocks, "confidence_eos_eot_inf": True},
        '`block_cache="prefix"`': {**in_blocks, "block_cache": "prefix"},
        '`block_cache="dual"`': {**in_blocks, "block_cache": "dual"},
        '`"dual"`, `cache_refresh=2`': {**in_blocks, "block_cache": "dual", "cache_refresh": 2},
        '`"dual"` and the threshold': {**in_blocks, "block_cache": "dual", "confidence_threshold": 0.9},
        f'`remasking="ancestral"`, {canvas} steps': {"remasking": "ancestral", "steps": canvas},
        f'`remasking="ancestral"`, {4 * canvas} steps': {"remasking": "ancestral", "steps": 4 * canvas},
    }


def demo_model(folder: Path, splits, tokenizer):
    """Pre-trained as in the demo, the first time."""
    if not (folder / "config.json").exists():
        task.pretrain(tokenizer, splits, SEED, **SIZE).save_pretrained(folder)
    return LLaDAModelLM.from_pretrained(folder).eval()


def on_the_demo(folder: Path, problems: int, blocks: tuple[int, ...]) -> None:
    splits, tokenizer = task.make_splits(SEED, pairs=2000), task.make_tokenizer()  # as in the demo
    model = demo_model(folder, splits, tokenizer)
    asked = splits["test"][:problems]
    for block in blocks:
        tried = settings(task.MAX_NEW_TOKENS, block)
        options = {"batch_size": 64, "max_new_tokens": task.MAX_NEW_TOKENS}
        found = compare_sampling(model, tokenizer, [problem.prompt for problem in asked], tried, **options)
        print(f"\nThe demo's model, a canvas of {task.MAX_NEW_TOKENS} in blocks of {block}, {len(asked)} problems\n")
        head, line, *rows = str(found).splitlines()
        print(f"{head} right |\n{line}---|")
        for row, answers in zip(rows, found.answers.values(), strict=True):
            print(f"{row} {100 * task.share(map(task.is_right, asked, answers)):.1f}% |")


def on_llada(prompts: int) -> None:
    tokenizer = task.make_word_tokenizer([f"w{i}" for i in range(996)])
    config = LLaDAConfig(
        **{"d_model": 64, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 192, "vocab_size": len(tokenizer)},
        **{"mask_token_id": tokenizer.mask_token_id, "pad_token_id": 0, "eos_token_id": None, "init_std": 0.2},
    )  # without an end: no answer ends before its canvas
    torch.manual_seed(SEED)
    model = LLaDAModelLM(config).eval()
    texts = [" ".join(f"w{i}" for i in torch.randint(996, (128,)).tolist()) for _ in range(prompts)]
    without = ("threshold", "eos", "eot")  # which look at probabilities, or at ends
    tried = {name: value for name, value in settings(256, 32).items() if not any(word in name for word in without)}
    found = compare_sampling(model, tokenizer, texts, tried, batch_size=prompts, max_new_tokens=256)
    print(f"\nLLaDA's layers, random weights, a prompt of 128, a canvas of 256 in blocks of 32, {prompts} prompts\n")
    print("| setting | forwards | tokens run |\n|---|---|---|")
    for name, forwards in found.forwards.items():
        print(f"| {name} | {forwards:.1f} | {found.tokens_run[name]:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sampling"), help="where the model is kept")
    parser.add_argument("--problems", type=int, default=200, help="for the demo's model")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--prompts", type=int, default=4, help="for the model with random weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.problems:
        on_the_demo(arguments.output_dir, arguments.problems, tuple(arguments.blocks))
    if arguments.prompts:
        on_llada(arguments.prompts)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
