"""Before training: will it fit? Compares the estimate of `memory.py` with the device, and warns."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset

from .memory import MemoryEstimate, estimate_memory, shortage

if TYPE_CHECKING:  # what the mixin is put in front of
    from ..scoring.door import DPOTrainer as _TRLTrainer
else:
    _TRLTrainer = object

logger = get_logger(__name__)


class MemoryCheckMixin(_TRLTrainer):
    """
    Put in front of a TRL trainer.

    Attributes:
        _completion_columns: columns of completion ids that TRL's tokenisation makes.
        _responses_per_row: responses of a row that are trained on.
    """

    _completion_columns: tuple[str, ...]
    _responses_per_row: int

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, see [`~transformers.Trainer.train`]; warns first if it is not expected to fit on the device."""
        self._warn_of_memory()
        return super().train(*args, **kwargs)

    def _device_memory(self) -> int | None:
        """Bytes of the GPU; None where there is none, or where it holds a part of the weights only."""
        if self.accelerator.device.type != "cuda" or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return torch.cuda.mem_get_info(self.accelerator.device)[1]

    def _warn_of_memory(self) -> None:
        available = self._device_memory()
        if available is None:
            return
        try:
            estimate = self._estimate_memory()
        except ValueError as error:
            logger.info("Whether training will fit is not known. %s", error)
            return
        args = self.args
        useful = {
            "gradient_checkpointing=True": not args.gradient_checkpointing,
            "draws_per_forward=1": args.draws_per_forward != 1,
            "a smaller per_device_train_batch_size": args.per_device_train_batch_size > 1,
            "a smaller max_length": True,
            "load_in_4bit (a quantization_config) with LoRA": not getattr(self.model, "is_quantized", False),
        }
        message = shortage(estimate, available, [option for option, helps in useful.items() if helps])
        if message:
            logger.warning_once(message)

    def _estimate_memory(self) -> MemoryEstimate:
        """Of a step of this run on its longest example; `max_length` where rows are streamed."""
        args = self.args
        longest = longest_example(self.train_dataset, self._completion_columns) or (args.max_length, args.max_length)
        if longest[0] is None:
            raise ValueError("The dataset is streamed and `max_length` is not set: its longest example is not known.")
        return estimate_memory(
            self.accelerator.unwrap_model(self.model),
            max_length=longest[0],
            response_length=longest[1],
            num_responses=args.per_device_train_batch_size * self._responses_per_row,
            num_mc_samples=args.num_mc_samples,
            draws_per_forward=args.draws_per_forward,
            bf16=args.bf16 or args.fp16,
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            elbo_gradient="checkpoint" if args.fp16 else args.elbo_gradient,
            separate_reference=self.ref_model is not None,
            optimizer_bytes=_optimizer_bytes(str(args.optim)),
            device=self.accelerator.device.type,
        )


def _optimizer_bytes(name: str) -> int:
    """State per trained weight, by the name of the optimiser: two numbers, unless it says otherwise."""
    if "8bit" in name:
        return 2
    return 0 if name in ("sgd", "adafactor") else 8


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
