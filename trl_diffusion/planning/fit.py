"""Before training: will it fit? Compares the estimate of `memory.py` with the device, and warns."""

from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset

from .memory import MemoryEstimate, estimate_memory, shortage

logger = get_logger(__name__)


def warn_of_memory(trainer: Any) -> None:
    """Warn of a run that is not expected to fit on its device; `trainer` is one of this package's, and complete."""
    available = device_memory(trainer)
    if available is None:
        return
    try:
        estimate = estimate_run(trainer)
    except ValueError as error:
        logger.info("Whether training will fit is not known. %s", error)
        return
    args = trainer.args
    useful = {
        "gradient_checkpointing=True": not args.gradient_checkpointing,
        "draws_per_forward=1": args.draws_per_forward != 1,
        "a smaller per_device_train_batch_size": args.per_device_train_batch_size > 1,
        "a smaller max_length": True,
        "load_in_4bit (a quantization_config) with LoRA": not getattr(trainer.model, "is_quantized", False),
    }
    message = shortage(estimate, available, [option for option, helps in useful.items() if helps])
    if message:
        logger.warning_once(message)


def device_memory(trainer: Any) -> int | None:
    """Bytes of the GPU; None where there is none, or where it holds a part of the weights only."""
    device = trainer.accelerator.device
    is_spread = len(set(getattr(trainer.model, "hf_device_map", {}).values())) > 1  # by a `device_map`
    if device.type != "cuda" or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_spread:
        return None
    return torch.cuda.mem_get_info(device)[1]


def estimate_run(trainer: Any) -> MemoryEstimate:
    """Of a step of this run on its longest example; `max_length` where rows are streamed."""
    args = trainer.args
    longest = longest_example(trainer.train_dataset, trainer._completion_columns) or (args.max_length, args.max_length)
    if longest[0] is None:
        raise ValueError("The dataset is streamed and `max_length` is not set: its longest example is not known.")
    return estimate_memory(
        trainer.accelerator.unwrap_model(trainer.model),
        max_length=longest[0],
        response_length=longest[1],
        num_responses=args.per_device_train_batch_size * trainer._responses_per_row,
        num_mc_samples=args.num_mc_samples,
        draws_per_forward=args.draws_per_forward,
        bf16=args.bf16 or args.fp16,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        elbo_gradient="checkpoint" if args.fp16 else args.elbo_gradient,
        separate_reference=trainer.ref_model is not None,
        optimizer_bytes=_optimizer_bytes(args.optim.value),
        device=trainer.accelerator.device.type,
    )


def _optimizer_bytes(name: str) -> int | None:
    """State per trained weight, by the name of the optimiser; none for two numbers in the weight's precision."""
    if "8bit" in name:
        return 2
    return 0 if name in ("sgd", "adafactor") else None


def longest_example(dataset: Any, completion_columns: tuple[str, ...]) -> tuple[int, int] | None:
    """Tokens of the longest prompt with its completion, and of the longest completion; None if rows are streamed."""
    if not isinstance(dataset, Dataset):
        return None
    whole, completion = 0, 0
    rows = dataset.select_columns(["prompt_ids", *completion_columns]).with_format("numpy")
    for batch in rows.iter(1000):
        prompts = [len(ids) for ids in batch["prompt_ids"]]
        for column in completion_columns:
            lengths = [len(ids) for ids in batch[column]]
            completion = max(completion, *lengths)
            whole = max(whole, *(a + b for a, b in zip(prompts, lengths, strict=True)))
    return whole, completion
