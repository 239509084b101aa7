"""
What block diffusion costs, and how exact it is: the figures of docs/memory-and-speed.md, in some minutes on a CPU.

    python benchmarks/blocks.py            # all
    python benchmarks/blocks.py --memory   # only the memory of published sizes, by `estimate_memory`: none is run

Everything is counted. A response is half of its row. Tokens that a backbone runs, of a small SDAR; products of
SDAR-8B's layer, on tensors without values; live bytes of a step with immediate gradients; the largest difference of
scores and gradients from the definition, one forward for each block of each draw (`tests/block_reference.py`).
"""

import argparse
import sys
from pathlib import Path

import torch
from counters import HidesEverything, LiveBytes, machine
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from what_fits import NF4

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from block_reference import block_numbers, block_terms, of_model

from trl_diffusion import MaskSampler, estimate_memory
from trl_diffusion.models import FastDLLMQwenConfig, LLaDA2MoeConfig, SDARConfig
from trl_diffusion.models.blocks import denoise, read
from trl_diffusion.planning.skeleton import without_memory
from trl_diffusion.scoring.head import ELBOHead

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 30, "mask_token_id": 2, "initializer_range": 0.2}
SMALL |= {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
HEADS = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SDAR_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, **HEADS}
PUBLISHED = {
    "SDAR-1.7B": SDARConfig(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, **HEADS
    ),
    "SDAR-4B": SDARConfig(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **HEADS
    ),
    "SDAR-8B": SDARConfig(**SDAR_8B),
    "Fast-dLLM v2 7B": FastDLLMQwenConfig(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    ),
    "LLaDA2.0-mini": LLaDA2MoeConfig(),
}  # fmt: skip
LENGTHS = (1024, 4096)
DRAWS = 8


def small_model(block: int):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SDARConfig(**SMALL, block_size=block)).eval()


def row(length: int, prompt: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 30, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(length) < prompt, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def score(model, batch, sampler, **options):
    return ELBOHead(sampler, 2, **options)(model, batch["input_ids"], batch["labels"], batch["attention_mask"], 1)


def tokens_run(length: int, draws: int, block: int, sharded: bool = False) -> int:
    model, count = small_model(block), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: count.append(args[0].numel()))
    with torch.no_grad():
        score(model, row(length, length // 2), HidesEverything(draws), sharded=sharded)
    return sum(count)


def tokens_table(length: int, draws: int) -> None:
    print(f"\n## Tokens of {draws} draws, {length} tokens of which half are the response's\n")
    print(
        "| block | run | over K N + C | weights sharded | [clean ; noised] for each draw | a forward for each block |"
    )
    print("|---|---|---|---|---|---|")
    for block in (4, 32):
        clean, noised = length - block, length // 2
        by_block = sum(range(length // 2 + block, length + 1, block))
        run, apart = tokens_run(length, draws, block), tokens_run(length, draws, block, sharded=True)
        cells = [block, run, f"{run / (draws * noised + clean):.2f}", apart, 2 * draws * length, draws * by_block]
        print(f"| {' | '.join(map(str, cells))} |")


def products(length: int, block: int) -> tuple[float, float]:
    """Of one draw in SDAR-8B's layers: attention in all products, and what part of that the mask hides."""
    model = without_memory(SDARConfig(**SDAR_8B | {"num_hidden_layers": 1}, block_size=block), "bfloat16")
    numbers, first = torch.arange(length) // block, length // 2
    clean = length - block
    ids, places = torch.empty(length, dtype=torch.long, device="meta"), numbers.to("meta")
    with torch.no_grad():
        _, history = read(model, ids[:clean], places[:clean])
        with FlopCounterMode(display=False) as counter:
            denoise(model, ids[None, first:], places[first:], first, history)
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if ("mm" in str(op) and "bmm" in str(op)) or "attention" in str(op))
    noised = numbers[first:].unsqueeze(1)
    seen = (noised > numbers[:clean]).sum() + (noised == numbers[first:]).sum()
    hidden = 1 - seen.item() / (len(noised) * (clean + len(noised)))
    return attention / sum(found.values()), hidden


def products_table() -> None:
    print("\n## Attention of a draw in SDAR-8B, the output head left out\n")
    print(
        "| tokens | block | attention's part of the products | of it hidden by the mask | saved if that were skipped |"
    )
    print("|---|---|---|---|---|")
    for length in LENGTHS:
        for block in (4, 32):
            part, hidden = products(length, block)
            print(f"| {length} | {block} | {part:.1%} | {hidden:.0%} | {part * hidden:.1%} |")


def bytes_table() -> None:
    ways = {
        "clean text once, immediate gradients": {"elbo_gradient": "immediate", "draws_per_forward": 1},
        "[clean ; noised] for each draw, one graph": {"elbo_gradient": "graph", "sharded": True},
    }
    print("\n## Live bytes of a step above weights and gradients, a small SDAR\n")
    print("| block | | K = 2 | K = 32 |\n|---|---|---|---|")
    for block in (4, 32):
        for name, options in ways.items():
            peaks = []
            for draws in (2, 32):
                model, batch = small_model(block).train(), row(256, 128)
                with LiveBytes() as memory:
                    score(model, batch, HidesEverything(draws), **options).log_probs.sum().backward()
                peaks.append(f"{memory.peak:,}")
            print(f"| {block} | {name} | {' | '.join(peaks)} |")


def exactness_table() -> None:
    print("\n## Largest difference from the definition, float32, over the largest number\n")
    print("| block | score | gradient: immediate | checkpoint | graph |\n|---|---|---|---|---|")
    for block in (1, 4, 32):
        model, batch = small_model(block), row(48, 18)
        numbers, maskable = block_numbers(batch, block), batch["labels"] != -100
        draws = MaskSampler(4)(maskable, batch["input_ids"], batch["attention_mask"].bool(), 1, blocks=numbers)
        terms = block_terms(of_model(model), batch, draws, numbers)
        expected = torch.autograd.grad(terms.sum(), list(model.parameters()))
        cells = []
        for mode in ("immediate", "checkpoint", "graph"):
            found = score(model, batch, MaskSampler(4), elbo_gradient=mode).log_probs
            gradients = torch.autograd.grad(found.sum(), list(model.parameters()))
            scale = max(g.abs().max() for g in expected)
            off = max((a - b).abs().max() for a, b in zip(gradients, expected, strict=True))
            cells.append(f"{(off / scale).item():.0e}")
        off = (found - terms[:, 1:]).abs().max() / terms.abs().max()
        print(f"| {block} | {off.item():.0e} | {' | '.join(cells)} |")


def memory_table() -> None:
    print("\n## 4 bits, LoRA r = 16, layer checkpointing, one pair, without the driver's gigabyte: computed, not run\n")
    print(f"| | {' | '.join(f'{length} tokens' for length in LENGTHS)} |\n|---|{'---|' * len(LENGTHS)}")
    for name, config in PUBLISHED.items():
        sizes = [bytes_of_a_step(config, length) for length in LENGTHS]
        print(f"| {name} | {' | '.join(f'{size / 1e9:.1f} GB' for size in sizes)} |", flush=True)


def bytes_of_a_step(config, length: int) -> int:
    options = {"max_length": length, "response_length": length // 2, "gradient_accumulation_steps": 2}
    return estimate_memory(config, peft_config=LoraConfig(r=16), quantization_config=NF4, **options).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="only the memory of published sizes")
    if not parser.parse_args().memory:
        tokens_table(1024, DRAWS)
        products_table()
        bytes_table()
        exactness_table()
    memory_table()
    print(f"\n({machine()})")


if __name__ == "__main__":
    main()
