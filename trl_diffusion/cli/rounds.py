"""The command that aligns in rounds: sample answers, score them, train on pairs of them, and begin again."""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from ..evaluation.ledger import Ledger
from ..evaluation.pairs import NoRowsError, sample_pairs
from ..evaluation.sampling import mean_reward
from ..resuming.checkpoints import problem_of
from ..resuming.record import SILENT
from ..scoring.door import DatasetMixtureConfig, ScriptArguments
from ..trainers.vrpo.config import DiffusionVRPOConfig
from ..trainers.vrpo.trainer import DiffusionVRPOTrainer
from .answering import RewardedArguments, reward_function
from .arguments import IGNORED, TrainedModelConfig, load_named, load_to_use, split_of
from .command import Command
from .training import train

# What finished rounds are compared by, besides what a trainer compares when it is resumed
_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
_TRAINING = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "seed")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_OPTIMISER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16")
_MODEL = {each.name for each in fields(TrainedModelConfig)} - {"trust_remote_code", "attn_implementation"}


@dataclass
class RoundsArguments(RewardedArguments):
    """What a round is."""

    num_rounds: int = field(default=3, metadata={"help": "Rounds in all; finished ones are not run again."})
    prompts_per_round: int | None = field(
        default=None,
        metadata={"help": "Prompts of a round, each round taking the next ones. By default all, in each round."},
    )
    held_out_prompts: int = field(
        default=100,
        metadata={
            "help": "Prompts whose greedy answers are scored after each round: the first of `--dataset_test_split`, "
            "or, of a dataset without it, the last of `--dataset_train_split`, which are then not trained on."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_rounds", "prompts_per_round", "held_out_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")


class Rounds:
    """
    A run of several rounds. The policy of a round is where it starts and its reference.

    Args:
        script_args, training_args, model_args: as in `trl-diffusion vrpo`; the dataset has prompts.
        arguments: of the rounds.

    Attributes:
        finished: by number, the reward of held-out prompts and the number of pairs; 0 is the model that was given.
    """

    def __init__(self, script_args: Any, training_args: Any, model_args: Any, arguments: RoundsArguments):
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.arguments, self.folder = arguments, Path(training_args.output_dir)
        self.functions = [reward_function(name) for name in arguments.reward_funcs]
        self.prompts, self.held_out = prompts_of(script_args, arguments.held_out_prompts)
        self.state = PartialState(cpu=training_args.use_cpu)
        self.finished = Ledger(self.folder, "rounds", self._key(), self.state.process_index)

    def _key(self) -> dict[str, str]:
        """What finished rounds were made with: more of them may follow, in other batches of answers."""
        compared = [name for name, found in self.training_args.differences.items() if found is not SILENT]
        parts = (
            (self.script_args, _DATA),
            (self.training_args, (*compared, *_TRAINING, *_OPTIMISER, *_BATCH)),
            (self.model_args, sorted(_MODEL)),
            (self.arguments, sorted(vars(self.arguments).keys() - {"num_rounds", "batch_size"})),
        )
        return {name: str(getattr(part, name)) for part, names in parts for name in names if hasattr(part, name)}

    def run(self) -> None:
        """Run the rounds that are not finished, each from where it was interrupted."""
        if 0 not in self.finished.rows:
            self._say("== The model before the first round")
            self._finish(0)
        for number in range(1, self.arguments.num_rounds + 1):
            if number in self.finished.rows:
                continue
            self._say(f"\n== Round {number} of {self.arguments.num_rounds}")
            prompts = self._next_prompts(number)
            try:
                pairs = self._sample(number, prompts)
            except NoRowsError as error:
                if number == 1:
                    raise
                self._say(f"The rounds end here, as there is nothing left to compare. {error}")
                return
            self._train(number)
            self._finish(number, pairs=pairs, prompts=len(prompts))

    def report(self) -> None:
        """Print a line for each finished round."""
        rows = dict(sorted(self.finished.rows.items()))
        self._say(f"\n{'round':<8}{'pairs kept':>16}{f'reward of {len(self.held_out)} held-out prompts':>36}")
        for number, row in rows.items():
            pairs = f"{row['pairs']} of {row['prompts']}" if number else ""
            self._say(f"{number or 'before':<8}{pairs:>16}{row['reward']:>36.4f}")
        self._say(f"\nThe model is in {self._path(max(rows)) if max(rows) else self.model_args.model_name_or_path}.")

    def _next_prompts(self, number: int) -> Dataset:
        """Those of a round; after the last comes the first."""
        total = len(self.prompts)
        size = min(self.arguments.prompts_per_round or total, total)
        return self.prompts.select([((number - 1) * size + i) % total for i in range(size)])

    def _sample(self, number: int, prompts: Dataset) -> int:
        """Make pairs of answers of the policy so far; returns their number."""
        given = self.arguments
        options = {"num_samples": given.num_samples, "margin": given.margin, **given.sampler()}
        seed = self.training_args.seed + number - 1
        return len(self._ask(sample_pairs, number - 1, prompts, self._path(number) / "pairs", seed=seed, **options))

    def _train(self, number: int) -> None:
        """Align the policy so far with its pairs, unless that is done; from a checkpoint, if there is a whole one."""
        folder = self._path(number)
        if (folder / "trainer_state.json").exists():
            return
        script_args, args = copy.copy(self.script_args), copy.copy(self.training_args)
        script_args.dataset_name, script_args.dataset_config = str(folder / "pairs"), None
        script_args.dataset_train_split, script_args.dataset_streaming = "train", False
        args.output_dir, args.seed = str(folder), self.training_args.seed + number - 1
        args.resume_from_checkpoint = any(not problem_of(path) for path in folder.glob("checkpoint-*"))
        args.push_to_hub = args.push_to_hub and number == self.arguments.num_rounds
        args.hub_model_id = args.hub_model_id or self.folder.name
        train(DiffusionVRPOTrainer, script_args, args, self._policy(number - 1), DatasetMixtureConfig())
        _forget_models()

    def _finish(self, number: int, **counts: int) -> None:
        """Score held-out prompts, and keep that the round is finished."""
        options = {**self.arguments.sampler(), "temperature": 0.0}
        folder, seed = self._path(number) / "held-out", self.training_args.seed
        reward = self._ask(mean_reward, number, self.held_out, folder, seed=seed, **options)
        self.finished.add(number, reward=reward, **counts)

    def _ask(self, function: Callable[..., Any], number: int, prompts: Dataset, folder: Path, **options: Any) -> Any:
        """What a function that samples makes of the policy after a round."""
        model, tokenizer = load_to_use(self._policy(number), self.training_args.use_cpu)
        options |= {"reward_weights": self.arguments.reward_weights, "batch_size": self.arguments.batch_size}
        made = function(model, tokenizer, prompts, self.functions, output_dir=str(folder), **options)
        del model
        _forget_models()
        return made

    def _policy(self, number: int) -> Any:
        """Model arguments of the policy after a round: its folder, whose adapter is loaded, and trained on."""
        model_args = copy.copy(self.model_args)
        model_args.trust_remote_code = self.training_args.trust_remote_code
        if number:
            model_args.model_name_or_path, model_args.model_revision = str(self._path(number)), None
            model_args.use_peft = False  # which would put a second one on it
        return model_args

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


def prompts_of(script_args: Any, held_out: int) -> tuple[Dataset, Dataset]:
    """
    Prompts to train on, and held-out ones.

    Raises:
        ValueError: no dataset is named, or there are too few prompts to hold any out.
    """
    dataset = load_named(script_args)
    prompts = split_of(dataset, "dataset_train_split", script_args)
    if script_args.dataset_test_split in dataset:
        test = dataset[script_args.dataset_test_split]
        return prompts, test.select(range(min(held_out, len(test))))
    rest = len(prompts) - held_out
    if rest < 1:
        raise ValueError(
            f"`--held_out_prompts {held_out}` of the {len(prompts)} prompts leaves none to train on, as there is no "
            f"split {script_args.dataset_test_split!r} to take them from. Lower it, or add that split."
        )
    return prompts.select(range(rest)), prompts.select(range(rest, len(prompts)))


def _forget_models() -> None:
    """A trainer and its model refer to each other; the next one is loaded into the room that they had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_rounds(script_args: Any, training_args: Any, model_args: Any, arguments: RoundsArguments) -> None:
    """Run all rounds, and print what they reached."""
    for name, unset in {"eval_strategy": "no", "resume_from_checkpoint": None}.items():
        value = getattr(training_args, name)
        if value != unset:
            raise ValueError(
                f"`--{name} {getattr(value, 'value', value)}` is not for rounds, which are judged by held-out prompts "
                "and go on by themselves where they were interrupted. Leave it out."
            )
    rounds = Rounds(script_args, training_args, model_args, arguments)
    rounds.run()
    rounds.report()


ITERATIVE_VRPO = Command(
    "iterative-vrpo",
    "Aligns a model in rounds: it answers prompts, reward functions score the answers, VRPO trains on pairs of them,\n"
    "and the aligned model answers the next. Goes on where it was interrupted.",
    """--model_name_or_path GSAI-ML/LLaDA-8B-Instruct --load_in_4bit --use_peft --lora_r 16 --lora_alpha 32 \\
        --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward --max_new_tokens 256 --block_length 32 \\
        --prompts_per_round 1000 --learning_rate 5e-6 --output_dir LLaDA-8B-rounds""",
    (ScriptArguments, DiffusionVRPOConfig, TrainedModelConfig, RoundsArguments),
    run_rounds,
    (*IGNORED, "dataset_streaming"),
)
