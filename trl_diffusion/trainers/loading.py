"""
A model that was given by its path or its name on the hub: where its parts are, and loading them.

The path may be that of an adapter, whose configuration says where its base model is: both are loaded, and the adapter
is trained on.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from ..models.families import class_to_load, refuse_unscored, spare_in_quantization
from ..models.whole import Whole
from ..scoring.door import seam_function

# Options of `from_pretrained` that say where a file is and how to get it
_FINDING = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
_OF_THE_PLACE = ("revision", "subfolder")  # those of an adapter are not those of its base


@dataclass(frozen=True)
class Source:
    """
    Where a model is.

    Args:
        path: what was given.
        finding: options that lead to its files.
        base: where the base model of an adapter is; `path` if it is no adapter.
        base_finding: options that lead to the files of the base model.
        config: of the base model.
    """

    path: str
    finding: dict[str, Any]
    base: str
    base_finding: dict[str, Any]
    config: PreTrainedConfig

    @property
    def is_adapter(self) -> bool:
        return self.base != self.path


def find_model(path: str, options: dict[str, Any]) -> Source:
    """
    Find the parts of a model, and read its configuration.

    Args:
        path: a folder, or the name of a repository on the hub.
        options: those of `from_pretrained`.

    Raises:
        OSError: there is no model there, or it cannot be had without a network.
        ValueError: an adapter that does not say what its base model is, or a family with another ELBO.
    """
    finding = _finding(options)
    trust = {"trust_remote_code": options.get("trust_remote_code", False)}
    adapter = find_adapter(path, finding)
    base, base_finding = path, finding
    if adapter is not None:
        base = adapter.base_model_name_or_path
        base_finding = {name: value for name, value in finding.items() if name not in _OF_THE_PLACE}
        base_finding |= {"revision": adapter.revision} if adapter.revision else {}
        if not base:
            raise ValueError(f"`model={path!r}` is an adapter that does not say what its base model is. {_own(path)}")
    refuse_unscored(_as_written(base, base_finding))  # before remote code is asked for, or run
    try:
        config = AutoConfig.from_pretrained(base, **base_finding, **trust)
    except (OSError, ValueError) as error:
        raise OSError(_why_not(path, base, error)) from error
    return Source(path, finding, base, base_finding, config)


def _finding(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _FINDING if options.get(name) is not None}


def _as_written(base: str, finding: dict[str, Any]) -> Any:
    """The entries of a config.json as attributes; those of none where there is none, which is said when it is read."""
    try:
        entries, _ = PreTrainedConfig.get_config_dict(base, **finding)
    except (OSError, ValueError):
        entries = {}
    return SimpleNamespace(**{"model_type": "", "architectures": None, **entries})


def loading_options(args: Any) -> dict[str, Any]:
    """Options of `from_pretrained` that the trainer's arguments give for a model by its path."""
    return {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}


def load_model(source: Source, options: dict[str, Any]) -> Any:
    """
    Load a model, and its adapter if it is one, to be trained.

    Args:
        source: where it is.
        options: those of `from_pretrained`.
    """
    refuse_unscored(source.config)
    options = {name: value for name, value in options.items() if name not in _FINDING} | source.base_finding
    if options.get("quantization_config") is not None:
        options.setdefault("dtype", "bfloat16")  # TRL's float32 would hold embeddings and head in four bytes
        options["quantization_config"] = spare_in_quantization(options["quantization_config"], source.config)
    create = seam_function("trl.trainer.utils", "create_model_from_path")
    # TRL would look for the class without the options that lead to the configuration
    model = create(source.base, architecture=Whole(class_to_load(source.config)), **options)
    if source.is_adapter:
        return put_adapter(model, source.path, is_trainable=True, **source.finding)
    return model


def put_adapter(model: Any, path: str, **options: Any) -> PeftModel:
    """
    A model with an adapter by its path on it.

    Raises:
        ValueError: the model has one, or the adapter is that of another model: PEFT would warn, and leave it without.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The adapter {path!r} is to be put on a model that is an adapter itself. Name the base model and one "
            "adapter: one that was trained on from another holds both."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, path, **options)
        except UserWarning as error:
            raise ValueError(
                f"The adapter {path!r} is not of this model, a `{type(model).__name__}`: {str(error)[:200]}... Name "
                "the model that it was trained on."
            ) from error


def check_new_adapter(source: Source, peft_config: Any, output_dir: str) -> None:
    """Refuse, before anything is loaded, an adapter on an adapter, and one that would be saved into its base model."""
    if source.is_adapter and peft_config is not None:
        refuse_second_adapter(source.path)
    is_trained = source.is_adapter or peft_config is not None
    if is_trained and Path(source.base).is_dir() and Path(source.base).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"`output_dir={output_dir!r}` is the folder of the model that the adapter is for: whoever loads that model "
            "would get the adapter with it. Give another folder."
        )


def refuse_second_adapter(path: str) -> NoReturn:
    """Refuse to make a new adapter where the model is one."""
    raise ValueError(
        f"`model={path!r}` (`--model_name_or_path`) is an adapter, which is trained on, and `peft_config` "
        "(`--use_peft`) is for a new one. Leave it out; or merge the adapter first, with `trl-diffusion merge`, and "
        "train the merged model."
    )


def completed(model: Any) -> Any:
    """
    The model as TRL and accelerate count on it; encoders lack both.

    It has a generation configuration, which TRL writes the padding token into. And what it says is not to be split,
    which FSDP wraps, does not hold the embeddings of tokens, whose weight may be the head's.
    """
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    embeddings = model.get_input_embeddings()
    around = {type(module).__name__ for module in model.modules() if embeddings in module.children()}
    model._no_split_modules = set(model._no_split_modules or ()) - around
    return model


def load_tokenizer(source: Source, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """
    The tokenizer beside a model; beside the base model if there is none beside the adapter.

    Raises:
        OSError: there is none.
    """
    places = [(source.path, source.finding)] + [(source.base, source.base_finding)] * source.is_adapter
    for place, finding in places:
        try:
            trust = options.get("trust_remote_code", False)
            return AutoTokenizer.from_pretrained(place, config=source.config, trust_remote_code=trust, **finding)
        except (OSError, ValueError, KeyError) as error:
            problem = error
    raise OSError(
        f"`model={source.path!r}` has no tokenizer that could be loaded: {_in_one_line(problem)} Pass the one that its "
        "token ids come from as `processing_class`."
    ) from problem


def tokenizer_of(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer where a model in memory came from, as its `config` has it; see [`load_tokenizer`]."""
    path, finding = config._name_or_path, _finding(options)
    return load_tokenizer(Source(path, finding, path, finding, config), options)


def find_adapter(path: str, finding: dict[str, Any]) -> PeftConfig | None:
    """The configuration of an adapter that is there; None if it is none, or nothing can be had."""
    arguments = {name: value for name, value in finding.items() if name != "subfolder"}
    try:
        found = find_adapter_config_file(path, subfolder=finding.get("subfolder", ""), **arguments)
    except OSError:  # no such repository, or no network: said when its configuration is looked for
        return None
    return PeftConfig.from_pretrained(path, **finding) if found else None


def _why_not(path: str, base: str, error: Exception) -> str:
    problem = f"`model={path!r}` could not be loaded: {_in_one_line(error)}"
    if base != path:
        return f"`model={path!r}` is an adapter, and its base model {base!r} could not be loaded: " + (
            f"{_in_one_line(error)} {_own(path)}"
        )
    if "trust_remote_code" in str(error):
        return f"{problem} If you have read and trust it, set `trust_remote_code=True` in the trainer's arguments."
    if Path(path).is_dir():
        return f"{problem} Give a folder that `save_pretrained` wrote."
    return (
        f"{problem} Give a folder that `save_pretrained` wrote, or the name of a repository on the hub; without a "
        f"network it has to be in the cache, where `hf download {path}` puts it."
    )


def _own(path: str) -> str:
    return (
        f"Load the two yourself, and pass `PeftModel.from_pretrained(base_model, {path!r}, is_trainable=True)` as "
        "`model`."
    )


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
