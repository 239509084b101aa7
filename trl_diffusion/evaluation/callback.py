"""What a model answers while it is trained, marked by reward functions and compared with what it answered before."""

from contextlib import nullcontext
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..scoring.door import use_adapter
from .answers import Answerer, check_at_least_one
from .prompts import read_prompts
from .rewards import Rewards
from .sampling import completion_of

logger = get_logger(__name__)


class WinRateCallback(TrainerCallback):
    """
    Logs the mean reward of answers to held-out prompts, and how often they beat those of the model before training.

    At each evaluation, or every `freq` steps, `eval_reward` and `eval_win_rate` are logged: the mean over prompts and
    the share of prompts whose answer has a higher reward than the base's, a tie being half a win. `eval_reward_base` is
    the base's own. The base is the trainer's reference: the model without the adapter that is trained, with a copy of
    the adapter that it came with, or a model of its own. Without a reference, as in `DiffusionSFTTrainer`, it is the
    model without a new adapter, or else as it is when training begins, which a resumed run is warned of.

    Args:
        trainer: one of this package's, to which the callback is then added with `trainer.add_callback`.
        prompts: as in [`sample_pairs`].
        reward_funcs: as in [`sample_pairs`].
        freq: steps between two looks; by default at each evaluation.
        reward_weights: of the functions.
        batch_size: prompts that are answered together.
        seed: of the sampler.
        **generation: arguments of `generate`; greedy by default.

    Raises:
        ValueError: weights are sharded (FSDP, ZeRO-3), and cannot be sampled from; prompts or arguments do not fit.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Any,
        reward_funcs: Any,
        *,
        freq: int | None = None,
        reward_weights: Any = None,
        batch_size: int = 8,
        seed: int = 0,
        **generation: Any,
    ):
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "The weights are sharded (FSDP, ZeRO-3), and cannot be sampled from while they are trained: sample "
                "from a checkpoint, with `sample_pairs` or `trl-diffusion generate`."
            )
        check_at_least_one(freq=freq, batch_size=batch_size)
        self._trainer, self._freq, self._size, self._last = trainer, freq, batch_size, 0
        self._rewards = Rewards(reward_funcs, reward_weights, "Correct it, and go on from the last checkpoint.")
        self._prompts = read_prompts(prompts, trainer._tokenizer, trainer._model_config)
        self._rewards.check_columns(self._prompts.columns)
        self._options = (trainer._tokenizer, self._prompts, 1, seed, generation)
        self._base: list[float | None] = []
        Answerer(trainer.accelerator.unwrap_model(trainer.model), *self._options)  # refuses what does not fit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if self._freq is None and args.eval_strategy == "no":
            logger.warning(
                "`WinRateCallback` looks at each evaluation, and there is none: set `freq`, or `eval_strategy`."
            )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.ref_model is not None:
            self._base = self._marks(trainer.accelerator.unwrap_model(trainer.ref_model))
            return
        is_new = isinstance(policy, PeftModel) and trainer._ready_adapter is None
        has_copy = isinstance(policy, PeftModel) and "ref" in policy.peft_config
        if state.global_step and not (is_new or has_copy):
            logger.warning("`eval_win_rate` is against the model that was resumed: the one before it is not there.")
        with use_adapter(policy, "ref" if has_copy else None) if is_new or has_copy else nullcontext():
            self._base = self._marks(policy)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._freq is not None and state.global_step % self._freq == 0:
            self._log()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_first = state.global_step != self._last  # of several evaluation sets
        if self._freq is None and self._base and is_first:  # not before training
            self._last = state.global_step
            self._log()

    def _log(self) -> None:
        now = self._marks(self._trainer.accelerator.unwrap_model(self._trainer.model))
        pairs = [(a, b) for a, b in zip(now, self._base, strict=True) if a is not None and b is not None]
        if not pairs:
            return
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
        columns = {
            "eval_reward": [a for a, _ in pairs],
            "eval_reward_base": [b for _, b in pairs],
            "eval_win_rate": wins,
        }
        # TRL's would add the training metrics since the last log, and forget them
        Trainer.log(self._trainer, {name: sum(values) / len(pairs) for name, values in columns.items()})

    def _marks(self, model: Any) -> list[float | None]:
        """The reward of the answer to each prompt, from all processes."""
        accelerator, answerer = self._trainer.accelerator, Answerer(model, *self._options)
        total = len(self._prompts.rows)
        mine = list(range(accelerator.process_index, total, accelerator.num_processes))
        marks: list[tuple[int, float | None]] = []
        for numbers in answerer.batches(mine, self._size):
            with accelerator.autocast():
                answers = [ids for (ids,) in answerer(numbers)]
            given = [self._prompts.rows[number] for number in numbers]
            texts = [answerer.text(number, ids) for number, ids in zip(numbers, answers, strict=True)]
            found = self._rewards(
                [row["prompt"] for row in given],
                [completion_of(text, self._prompts.conversational) for text in texts],
                answers,
                {name: [row[name] for row in given] for name in self._prompts.columns},
            )
            marks += zip(numbers, map(self._rewards.total, zip(*found, strict=True)), strict=True)
        return [mark for _, mark in sorted(gather_object(marks))]
