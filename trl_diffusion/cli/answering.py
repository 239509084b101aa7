"""Commands that sample: answers to prompts, and pairs of them to train on."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..evaluation.answers import Answerer
from ..evaluation.pairs import STRATEGIES, refuse_greedy, sample_pairs
from ..evaluation.prompts import read_prompts
from ..models.sampler_arguments import BLOCK_CACHES, REMASKING
from ..scoring.door import ScriptArguments
from .arguments import OF_TRAINING_ALONE, UsedModelConfig, load_rows, load_to_use, say
from .command import Command


@dataclass
class SamplerOptions:
    """Arguments of the diffusion sampler."""

    max_new_tokens: int = field(default=128, metadata={"help": "Length of the canvas of an answer, in tokens."})
    steps: int | None = field(
        default=None, metadata={"help": "Denoising steps in all. By default one for each token of the canvas."}
    )
    block_length: int | None = field(
        default=None, metadata={"help": "Length of the blocks that are filled left to right. By default one block."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Of the noise on the logits; 0 is greedy."})
    remasking: str = field(
        default="low_confidence",
        metadata={"help": "By what it is decided which predictions a step keeps.", "choices": list(REMASKING)},
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata={"help": "Keep all predictions of at least this probability instead of a fixed number in each step."},
    )
    block_cache: str | None = field(
        default=None,
        metadata={
            "help": "Keep keys and values of what is before a block, or outside of it, while it is filled: an "
            "approximation.",
            "choices": list(BLOCK_CACHES),
        },
    )
    cache_refresh: int | None = field(
        default=None, metadata={"help": "Steps of a block after which these are computed anew."}
    )
    logits_eos_inf: bool = field(default=False, metadata={"help": "Never predict the end of text."})
    confidence_eos_eot_inf: bool = field(default=False, metadata={"help": "Keep ends of text and of turns last."})
    cfg_scale: float = field(default=0.0, metadata={"help": "Strength of classifier-free guidance; 0 is off."})

    def sampler(self) -> dict[str, Any]:
        """Arguments of `generate`, but the seed."""
        given = {name: getattr(self, name) for name in SamplerOptions.__dataclass_fields__}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class SamplingArguments(SamplerOptions):
    """Those of the sampler, its seed and its device, where no trainer's arguments are beside them."""

    seed: int = field(default=0, metadata={"help": "Of the sampler's noise."})
    use_cpu: bool = field(default=False, metadata={"help": "Whether to run on the CPU where there is a GPU."})


@dataclass
class GenerateArguments(SamplingArguments):
    """What is answered."""

    prompts: list[str] = field(default_factory=list, metadata={"help": "Texts to answer, one or several."})
    plain: bool = field(
        default=False, metadata={"help": "Whether prompts are continued as they stand, without the chat template."}
    )

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("`--prompts` is missing: give the texts to answer, in quotes.")


@dataclass
class RewardedArguments(SamplerOptions):
    """Answers of which pairs are made."""

    temperature: float = field(default=1.0, metadata={"help": "Of the noise on the logits."})
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, by the names that `trl.rewards` has, `accuracy_reward` for instance, or by "
            "their import path, `my_lib.rewards.my_reward`."
        },
    )
    num_samples: int = field(default=4, metadata={"help": "Answers to each prompt."})
    margin: float = field(default=0.0, metadata={"help": "By how much the rewards of a pair must differ at least."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Of the reward functions."})
    batch_size: int = field(default=8, metadata={"help": "Prompts that are answered together."})

    def __post_init__(self) -> None:
        if not self.reward_funcs:
            raise ValueError(
                "`--reward_funcs` is missing: give names of `trl.rewards`, or import paths of your own functions."
            )
        refuse_greedy(self.num_samples, self.temperature, self.remasking)


@dataclass
class PairsArguments(RewardedArguments, SamplingArguments):
    """What pairs are made of."""

    output_dir: str = field(default="pairs", metadata={"help": "Folder of the rows, and of what an interruption left."})
    strategy: str = field(
        default="best_worst", metadata={"help": "Which answers make rows.", "choices": list(STRATEGIES)}
    )
    threshold: float | None = field(default=None, metadata={"help": "Of the rewards, for `--strategy threshold`."})


def generate(model_args: Any, arguments: GenerateArguments) -> None:
    """Print an answer to each prompt."""
    model, tokenizer = load_to_use(model_args, arguments.use_cpu)
    is_chat = tokenizer.chat_template is not None and not arguments.plain
    asked = [[{"role": "user", "content": text}] if is_chat else text for text in arguments.prompts]
    prompts = read_prompts(asked, tokenizer, model.config)
    answerer = Answerer(model, tokenizer, prompts, 1, arguments.seed, arguments.sampler())
    for number, text in enumerate(arguments.prompts):
        ((ids,),) = answerer([number])
        say(f"> {text}\n{answerer.text(number, ids).strip()}\n")


def make_pairs(script_args: Any, model_args: Any, arguments: PairsArguments) -> None:
    """Write pairs into the output folder."""
    functions = [reward_function(name) for name in arguments.reward_funcs]
    prompts = load_rows(script_args, "dataset_train_split")
    model, tokenizer = load_to_use(model_args, arguments.use_cpu)
    names = ("num_samples", "output_dir", "strategy", "threshold", "margin", "reward_weights", "batch_size", "seed")
    options = {name: getattr(arguments, name) for name in names}
    rows = sample_pairs(model, tokenizer, prompts, functions, **options, **arguments.sampler())
    say(f"{len(rows)} rows of {len(prompts)} prompts in {arguments.output_dir}.")


def reward_function(name: str) -> Any:
    """Of `trl.rewards`, or by its import path."""
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module or "trl.rewards"), function)
        if callable(found):
            return found
        raise AttributeError(f"{name} is no function")
    except (ImportError, AttributeError, TypeError) as error:
        known = [known for known in dir(import_module("trl.rewards")) if known.endswith("_reward")]
        raise ValueError(
            f"`--reward_funcs {name}` is not found ({error}). Give one of {known}, or an import path such as "
            "`my_lib.rewards.my_reward`, which Python has to find: set PYTHONPATH."
        ) from error


GENERATE = Command(
    "generate",
    "Answers prompts with the diffusion sampler.",
    '--model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --prompts "Why is the sky blue?"',
    (UsedModelConfig, GenerateArguments),
    generate,
    OF_TRAINING_ALONE,
)
SAMPLE_PAIRS = Command(
    "sample-pairs",
    "Makes training data from the model itself: answers to the prompts of a dataset, scored by reward functions and\n"
    "written as pairs for `vrpo`, or as marked rows for `elbo-kto`. Goes on where it was interrupted.",
    """--model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 \\
        --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward --max_new_tokens 256 --block_length 32""",
    (ScriptArguments, UsedModelConfig, PairsArguments),
    make_pairs,
    (*OF_TRAINING_ALONE, "dataset_test_split"),
)
