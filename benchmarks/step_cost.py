"""
What one VRPO step costs: this package's head against what a direct implementation does.

    python benchmarks/step_cost.py [--draws 2 8 32] [--rounds 3] [--lengths 150 110 130 160]

Both score the same responses on the same draws with the same LoRA model and give the same gradient (checked). "naive"
is the loop that is written first: each draw of the padded batch with full logits, every graph kept until the backward;
"naive, layer checkpointing" is what of it fits a large model. Counted are matrix-product FLOPs, attention excluded,
over those that are needed, and the peak of live bytes, weights and gradients not among them. Each mode is counted in a
process of its own, on draws that hide every token: the head's memory grows with what one draw hides, and which is the
heaviest of K draws is chance. Seconds are CPU seconds, as a ratio to "naive, layer checkpointing": the median over
interleaved rounds, and the range.

Needed per draw: a forward of the policy and of the reference over the response's own tokens, the gradient with respect
to activations through every layer (frozen weights need none of their own) and the adapters' own products. With a
precomputed reference less is needed; the count is over the same number.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time

import torch
from counters import HidesEverything, LiveBytes, machine, matmul_flops
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid

from trl_diffusion import LLaDAConfig, LLaDAModelLM, MaskSampler, elbo
from trl_diffusion.models.llada.family import LLADA
from trl_diffusion.scoring.head import ELBOHead

# LLaDA-8B's proportions: the feed-forward layer three times the width, the head 7% of the layers' products
SIZES = {"d_model": 256, "n_heads": 4, "n_layers": 6, "mlp_hidden_size": 768, "vocab_size": 1500}
# Prompt and response of the chosen, then of the rejected: two pairs, as different as rows of a batch are
LENGTHS = ((120, 183), (70, 111), (120, 237), (70, 147))
# Gradient mode of the head (none: the direct implementation), layer checkpointing, precomputed reference, draws that
# run together (none: the package's default)
MODES = {
    "naive": (None, False, False, 1),
    "naive, layer checkpointing": (None, True, False, 1),
    "checkpoint per draw": ("checkpoint", False, False, 1),
    "immediate gradient, one draw per forward": ("immediate", False, False, 1),
    "immediate gradient": ("immediate", False, False, None),
    "immediate, layer checkpointing": ("immediate", True, False, None),
    "immediate, precomputed reference": ("immediate", False, True, None),
}
BASE = "naive, layer checkpointing"


def make_model():
    torch.manual_seed(0)
    config = LLaDAConfig(**SIZES, mask_token_id=1, pad_token_id=0, eos_token_id=0)
    lora = LoraConfig(r=16, target_modules=LLADA.lora_target_modules)
    return get_peft_model(LLaDAModelLM(config), lora).train()


def make_batch(lengths):
    longest = max(map(sum, lengths))
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    real, maskable = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(lengths):
        ids[row, : prompt + response] = torch.randint(2, SIZES["vocab_size"], (prompt + response,))
        real[row, : prompt + response] = 1
        maskable[row, prompt : prompt + response] = True
    return ids, real, maskable


def margin(elbos):
    chosen, rejected = elbos.chunk(2)
    return chosen - rejected


def step(model, batch, mode, sampler):
    """Loss and backward of a batch of pairs, the reference being the model without its adapter."""
    ids, real, maskable = batch
    gradient, layers, precomputed, draws_per_forward = MODES[mode]
    base = model.get_base_model()
    if layers:
        base.activation_checkpointing_enable()
    else:
        base.activation_checkpointing_disable()

    def score():
        if gradient is None:
            return elbo(base, ids, maskable, real, draws=sampler(maskable, ids, real)).value
        head = ELBOHead(sampler, mask_token_id=1, draws_per_forward=draws_per_forward, elbo_gradient=gradient)
        return head(base, ids, torch.where(maskable, ids, -100), real).log_probs.sum(1)

    reference = torch.zeros(len(ids))  # its value changes nothing in the cost
    if not precomputed:
        with torch.no_grad(), model.disable_adapter():
            reference = score()
    loss = -logsigmoid(0.2 * (margin(score()) - margin(reference))).mean()
    loss.backward()


def needed_flops(model, num_mc_samples, batch):
    ids, real, maskable = batch
    masked = int(MaskSampler(num_mc_samples)(maskable, ids, real).masked.sum())
    tokens = num_mc_samples * int(real.sum())
    frozen = sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    head = model.get_output_embeddings().weight.numel()
    # policy forward, reference forward, gradient of activations; adapters have a weight gradient too, and no reference
    return 2 * (3 * frozen * tokens + 3 * head * masked + 3 * adapters * tokens)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_same_gradient(model, batch):
    found = []
    for mode, (_, _, precomputed, _) in MODES.items():
        if precomputed:
            continue
        model.zero_grad(set_to_none=True)
        step(model, batch, mode, MaskSampler(3))
        found.append(gradient(model).clone())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5 * found[0].abs().max().item())


def count(mode, draws, lengths):
    """FLOPs of a step of eight draws over those that are needed, and peak bytes by number of draws."""
    model, batch = make_model(), make_batch(lengths)
    step(model, batch, mode, MaskSampler(1))  # gradients are there before bytes are counted
    flops = matmul_flops(lambda: step(model, batch, mode, MaskSampler(8))) / needed_flops(model, 8, batch)
    peaks = []
    for number in draws:
        gc.collect()
        with LiveBytes() as memory:
            step(model, batch, mode, HidesEverything(number))
        peaks.append(memory.peak)
    return {"flops": flops, "peaks": peaks}


def timings(rounds, lengths):
    """CPU seconds by mode, the modes taking turns."""
    model, batch = make_model(), make_batch(lengths)
    check_same_gradient(model, batch)
    seconds = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            start = time.process_time()
            step(model, batch, mode, MaskSampler(8))
            seconds[mode].append(time.process_time() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draws", type=int, nargs="+", default=[2, 8, 32], help="K at which memory is counted")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; 0 counts only")
    parser.add_argument("--mode", choices=MODES, help="count this one here; by default each in its own process")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt and response of each chosen, then each rejected")
    args = parser.parse_args()
    lengths = LENGTHS if args.lengths is None else tuple(zip(args.lengths[::2], args.lengths[1::2], strict=True))
    torch.set_num_threads(1)
    if args.mode:
        print(json.dumps(count(args.mode, args.draws, lengths)))
        return
    seconds = timings(args.rounds, lengths)
    base = statistics.median(seconds[BASE]) if args.rounds else 0
    draws = " | ".join(f"peak MiB, K={k}" for k in args.draws)
    print(f"| | FLOPs / needed | {draws} | CPU time, K=8 (range) |\n|---|---|{'---|' * len(args.draws)}---|")
    for mode in MODES:
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peaks = " | ".join(f"{peak / 2**20:.0f}" for peak in counted["peaks"])
        times = [t / base for t in seconds[mode]] if args.rounds else []
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})" if times else "-"
        print(f"| {mode} | {counted['flops']:.2f} | {peaks} | {spread} |", flush=True)
    print(f"\n{machine()}. Model {SIZES}, (prompt, response) lengths {lengths}.")


if __name__ == "__main__":
    main()
