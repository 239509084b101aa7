"""What training scripts share: model arguments that fit a diffusion model, and datasets from the command line."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError

from ..evaluation.ready import load_ready
from ..scoring.door import ModelConfig, get_dataset, get_quantization_config
from ..trainers.loading import find_adapter, refuse_second_adapter

# Options of TRL's configurations that nothing here goes by, and those that do nothing where nothing is trained
IGNORED = ("ignore_bias_buffers",)
OF_TRAINING_ALONE = (
    *IGNORED,
    "dataset_streaming",
    "use_peft",
    *(f"lora_{of}" for of in ("r", "alpha", "dropout", "target_modules", "target_parameters", "modules_to_save")),
    *("lora_task_type", "use_rslora", "use_dora"),
)


@dataclass
class DiffusionModelConfig(ModelConfig):
    """
    TRL's model arguments, with a `dtype` that follows the quantisation where none is given.

    Parameters:
        dtype (`str`, *optional*):
            Precision to load the model in. Defaults to `"bfloat16"` for a quantised model, else `"float32"`.

    Raises:
        ValueError: no model is named.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision to load the model in. Defaults to `'bfloat16'` for a quantised model, else `'float32'`.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None:
            raise ValueError(
                "`--model_name_or_path` is missing: give a folder that `save_pretrained` wrote, or the name of a "
                "repository on the hub."
            )
        if self.dtype is None:
            self.dtype = "bfloat16" if self.load_in_4bit or self.load_in_8bit else "float32"


@dataclass
class UsedModelConfig(DiffusionModelConfig):
    """
    [`DiffusionModelConfig`] of a model that is not trained, and has no trainer's arguments beside it.

    Parameters:
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})


@dataclass
class TrainedModelConfig(DiffusionModelConfig):
    """
    [`DiffusionModelConfig`] of a model that is trained.

    Raises:
        ValueError: its weights are quantised, and there is no adapter to train; or a new one, and the model is one.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self._is_an_adapter():
            refuse_second_adapter(self.model_name_or_path)
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_peft and not self._is_an_adapter():
                raise ValueError(
                    f"`--{name}` makes weights that cannot be trained. Add `--use_peft`, which trains an adapter, or "
                    f"leave `--{name}` out."
                )

    def _is_an_adapter(self) -> bool:
        """Whether the path is that of one, which is then trained on."""
        finding = {"revision": self.model_revision} if self.model_revision else {}
        return find_adapter(self.model_name_or_path, finding) is not None


def with_model_init_kwargs(training_args: Any, model_args: Any) -> Any:
    """The training arguments, with what the model arguments say of loading the model; their own keep precedence."""
    chosen = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    training_args.model_init_kwargs = chosen | (training_args.model_init_kwargs or {})
    return training_args


def load_datasets(script_args: Any, training_args: Any, dataset_args: Any) -> dict[str, Any]:
    """
    The `train_dataset` and, if there is an evaluation strategy, the `eval_dataset` that the arguments name.

    Raises:
        ValueError: no dataset is named, or two in different ways, or it has no such split.
    """
    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("Both `datasets` and `--dataset_name` are given. Keep one of them.")
    for name in ("streaming", "test_split_size"):
        if getattr(dataset_args, name) and not dataset_args.datasets:
            raise ValueError(f"`--{name}` is for `datasets` in a YAML file, which are not given. Leave it out.")
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    elif script_args.dataset_name:
        dataset = load_named(script_args)
    else:
        raise ValueError("Give a dataset: `--dataset_name`, or `datasets` in a YAML file.")
    names = {"train_dataset": "dataset_train_split", "eval_dataset": "dataset_test_split"}
    if training_args.eval_strategy == "no":
        del names["eval_dataset"]
    found = {key: split_of(dataset, name, script_args, training_args) for key, name in names.items()}
    return {"eval_dataset": None} | found


def split_of(dataset: Any, option: str, script_args: Any, training_args: Any = None) -> Any:
    """The split that an option names."""
    split = getattr(script_args, option)
    if split in dataset:
        return dataset[split]
    nearest = get_close_matches(split, dataset, n=1)
    hint = f"Did you mean `--{option} {nearest[0]}`?" if nearest else f"Name one of them with `--{option}`."
    if option == "dataset_test_split" and getattr(training_args, "eval_strategy", "no") != "no":
        hint += " Without `--eval_strategy` none is needed."
    raise ValueError(f"The dataset has no split {split!r} (`--{option}`), it has {list(dataset)}. {hint}")


def load_to_use(model_args: Any, use_cpu: bool) -> tuple[Any, Any]:
    """The model, with its adapter if the path is that of one, on its device and ready to be asked; its tokenizer."""
    device = PartialState(cpu=use_cpu).device
    options = {
        "trust_remote_code": model_args.trust_remote_code,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        "device_map": None if device.type == "cpu" else {"": device},
    }
    options = {name: value for name, value in options.items() if value is not None or name == "device_map"}
    return load_ready(model_args.model_name_or_path, options)


def load_rows(script_args: Any, split: str) -> Any:
    """The split of the dataset that `--dataset_name` names."""
    return split_of(load_named(script_args), split, script_args)


def load_named(script_args: Any) -> Any:
    """All splits of the dataset that `--dataset_name` names."""
    if not script_args.dataset_name:
        raise ValueError("`--dataset_name` is missing: give a folder, or the name of a dataset on the hub.")
    place = Path(script_args.dataset_name)
    if place.is_file():
        raise ValueError(
            f"`--dataset_name {place}` is a file: give its folder, {str(place.parent)!r}, where a file is named after "
            "its split, such as `train.jsonl`."
        )
    if any((place / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"`--dataset_name {place}` was written by `save_to_disk`, for `load_from_disk` in Python. Write it with "
            "`dataset.to_parquet('FOLDER/train.parquet')`, and give that folder."
        )
    try:
        options = {"name": script_args.dataset_config, "streaming": script_args.dataset_streaming}
        return load_dataset(script_args.dataset_name, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"`--dataset_name {place}` cannot be read: {error.__cause__ or error}") from error


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if PartialState().is_main_process:
        print(text, flush=True)
