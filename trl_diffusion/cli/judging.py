"""Commands that measure: the likelihood of texts, and the noise of a preference score."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..diagnosis.diagnose import diagnose_variance
from ..evaluation.likelihood import METHODS, ORDERS, likelihood
from ..scoring.door import DatasetMixtureConfig, ScriptArguments, get_quantization_config
from ..trainers.loading import find_model, load_model, load_tokenizer, loading_options, put_adapter
from ..trainers.vrpo.config import DiffusionVRPOConfig
from .arguments import (
    IGNORED,
    OF_TRAINING_ALONE,
    DiffusionModelConfig,
    UsedModelConfig,
    load_datasets,
    load_rows,
    load_to_use,
    say,
    with_model_init_kwargs,
)
from .command import Command


@dataclass
class ScoreArguments:
    """What is scored, and how."""

    text_files: list[str] = field(
        default_factory=list, metadata={"help": "Files whose whole text is scored, instead of a dataset."}
    )
    method: str = field(
        default="elbo",
        metadata={"help": "The ELBO, the chain rule in one order, or one of RADD's losses.", "choices": list(METHODS)},
    )
    order: str = field(default="left_to_right", metadata={"help": "Of the chain rule.", "choices": list(ORDERS)})
    num_mc_samples: int = field(default=128, metadata={"help": "Mask draws for each text."})
    cfg_scale: float = field(
        default=0.0, metadata={"help": "Strength of classifier-free guidance by the prompt; 0 is off."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens that are scored together; longer texts are cut into windows."}
    )
    seed: int = field(default=0, metadata={"help": "Of the masks."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where finished rows are kept, to go on from there."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to run on the CPU where there is a GPU."})


@dataclass
class DiagnosisArguments:
    """What is measured."""

    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter of the policy, whose reference is the model without it."}
    )
    num_pairs: int = field(default=16, metadata={"help": "Pairs that are scored."})
    num_draws: int = field(default=64, metadata={"help": "Draws of each response, a multiple of 32."})
    target_standard_error: float = field(default=0.5, metadata={"help": "What the recommended K has to reach."})


def score(script_args: Any, model_args: Any, arguments: ScoreArguments) -> None:
    """Print the likelihood of texts."""
    if arguments.text_files and script_args.dataset_name:
        raise ValueError("Both `--text_files` and `--dataset_name` are given. Keep one of them.")
    state = PartialState(cpu=arguments.use_cpu)
    if state.num_processes > 1 and arguments.output_dir is None:
        raise ValueError(
            f"`--output_dir` is missing, through which the {state.num_processes} processes share what they have scored."
        )
    if arguments.text_files:
        texts: Any = [_read(name) for name in arguments.text_files]
    else:
        texts = load_rows(script_args, "dataset_test_split")
    model, tokenizer = load_to_use(model_args, arguments.use_cpu)
    options = ("method", "order", "num_mc_samples", "cfg_scale", "max_length", "seed", "output_dir")
    found = likelihood(model, tokenizer, texts, **{name: getattr(arguments, name) for name in options})
    say(str(found))


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--text_files {name}` is not a text in UTF-8 ({error}). Convert it.") from error


def diagnose(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, diagnosis: Any) -> None:
    """Print how noisy the score is, and which estimator to take."""
    training_args = with_model_init_kwargs(training_args, model_args)
    model: Any = model_args.model_name_or_path
    adapter, quantization_config, tokenizer = diagnosis.adapter_name_or_path, get_quantization_config(model_args), None
    if adapter and model:  # on the base model that was asked for, whatever the adapter says of its own
        options = loading_options(training_args) | {"quantization_config": quantization_config}
        source = find_model(model, options)
        tokenizer, quantization_config = load_tokenizer(source, options), None
        model = put_adapter(load_model(source, options), adapter)
    report = diagnose_variance(
        model or adapter,
        dataset=load_datasets(script_args, training_args, dataset_args)["train_dataset"],
        args=training_args,
        processing_class=tokenizer,
        quantization_config=quantization_config,
        num_pairs=diagnosis.num_pairs,
        num_draws=diagnosis.num_draws,
        target_standard_error=diagnosis.target_standard_error,
    )
    say(str(report))


SCORE = Command(
    "score",
    "Estimates the likelihood of texts, with its error: nats, and perplexity per token and per byte.",
    """--model_name_or_path GSAI-ML/LLaDA-8B-Base --dtype bfloat16 \\
        --text_files book.txt --max_length 1024 --output_dir scores""",
    (ScriptArguments, UsedModelConfig, ScoreArguments),
    score,
    (*OF_TRAINING_ALONE, "dataset_train_split"),
)
DIAGNOSE = Command(
    "diagnose",
    "Says how noisy the preference score is on your model and data, and which estimator to take: before training.",
    """--model_name_or_path GSAI-ML/LLaDA-8B-Instruct --load_in_4bit \\
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir diagnosis""",
    (ScriptArguments, DiffusionVRPOConfig, DiffusionModelConfig, DatasetMixtureConfig, DiagnosisArguments),
    diagnose,
    IGNORED,
)
