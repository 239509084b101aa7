"""
What a trainer is given, checked before TRL sees it: models, tokenizers and the columns of datasets.

TRL finds the same faults later, as a `KeyError` in the middle of a map or an index error inside torch, or trains on.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.denoiser import resolve_mask_token_id

_BATCH = 1000  # rows looked at together
_TEXTS = ("prompt", "chosen", "rejected", "completion")


def check_arguments(args: Any, config_class: Any, compute_metrics: Any) -> None:
    """Refuse the configuration of another trainer, metrics of logits, and a folder that cannot be written to."""
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`.")
    if compute_metrics is not None:
        raise ValueError(
            "`compute_metrics` would be given the logits of the text without masks, which mean nothing for a masked "
            "diffusion model. Leave it out; rewards and ELBOs are logged."
        )
    if args.should_save:
        check_writable(args.output_dir)


def check_writable(output_dir: str) -> None:
    """
    Refuse a folder in which nothing can be saved, before there is anything to save.

    Raises:
        OSError: the folder cannot be made, or no file in it.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=output_dir) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(
            f"`output_dir={output_dir!r}` cannot be written to: {error}. Give a folder that can, with room for the "
            "checkpoints."
        ) from error


def check_models(model: Any, ref_model: Any, tokenizer: Any) -> None:
    """Refuse what is not a model, and a model in memory whose tokenizer cannot be found."""
    for name, value, other, ways in (
        ("model", model, isinstance(model, str), "a path or a model"),
        ("ref_model", ref_model, ref_model is None, "None or a model"),
    ):
        if not (other or isinstance(value, PreTrainedModel | PeftModel)):
            raise TypeError(f"`{name}` must be {ways} of transformers or PEFT, got `{type(value).__name__}`.")
    if tokenizer is None and not isinstance(model, str) and not getattr(model.config, "_name_or_path", ""):
        raise ValueError(
            "`processing_class` is required with a model that was made in memory, whose tokenizer cannot be found: "
            "pass the tokenizer that its token ids come from."
        )


def load_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """
    The configuration of a model that was given by its path.

    Raises:
        OSError: there is none, or it cannot be had without a network.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise OSError(
            f"`model={path!r}` could not be loaded: {str(error).splitlines()[0]} Give a folder that `save_pretrained` "
            "wrote, or the name of a repository on the hub; without a network it has to be in the cache, where "
            f"`hf download {path}` puts it."
        ) from error


def check_same_vocabulary(config: Any, other: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference, of the configuration `other`, that cannot be scored on the policy's input."""
    cure = "The two have to be scored on the same input: use a reference of the same family and vocabulary."
    masks = [resolve_mask_token_id(each, tokenizer) for each in (config, other)]
    if masks[0] != masks[1]:
        raise ValueError(f"The mask token of the model is {masks[0]}, and its reference has {masks[1]}. {cure}")
    if other.vocab_size != config.vocab_size:
        raise ValueError(
            f"The model's vocabulary has {config.vocab_size} tokens and its reference's has {other.vocab_size}. {cure}"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer without an end of text, or whose special tokens are the mask."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end of text, which every completion ends in: set `tokenizer.eos_token`.")
    mask = resolve_mask_token_id(config, tokenizer)
    for name in ("eos_token", "bos_token"):
        if getattr(tokenizer, f"{name}_id") == mask:
            raise ValueError(
                f"`tokenizer.{name}` is the mask token ({mask}), so it would be taken for noise wherever it stands. "
                f"Set `tokenizer.{name}` to the token that the model was trained with."
            )


def require_trainable(model: Any) -> None:
    """Refuse to train a model of which no weight would change."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        adapter = isinstance(model, PeftModel)
        cure = "Load its adapter with `is_trainable=True`" if adapter else "Call `model.requires_grad_(True)`"
        raise ValueError(
            f"No weight of the `{type(model).__name__}` requires a gradient, so nothing would be trained. {cure} "
            "before it is given to the trainer."
        )


# Datasets

RowForms = tuple[tuple[str, ...], ...]


def check_datasets(args: Any, train_dataset: Any, eval_dataset: Any, forms: RowForms, refused: tuple[str, ...]) -> None:
    """Check what a constructor was given, see [`check_dataset`]; there may be several sets to evaluate on, or none."""
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    given = [("train", train_dataset), *((name, dataset) for name, dataset in evaluated.items() if dataset is not None)]
    for name, dataset in given:
        check_dataset(dataset, name, forms, refused)
        if args.precompute_ref_log_probs and args.world_size > 1 and not getattr(dataset, "cache_files", [None]):
            raise ValueError(
                f"The {name} dataset is in memory, and `precompute_ref_log_probs=True` hands its values from one of "
                f"the {args.world_size} processes to the others in a file beside the data. Put it on disk: "
                "`dataset.save_to_disk(folder)`, and give `datasets.load_from_disk(folder)`."
            )


def check_dataset(dataset: Any, name: str, forms: RowForms, refused: tuple[str, ...]) -> None:
    """
    Refuse a dataset whose rows do not have the form that the trainer needs.

    Args:
        dataset: what the trainer was given.
        name: of the dataset, for messages.
        forms: the columns of which each row must have all, in one of these ways.
        refused: columns that it must not have.

    Raises:
        TypeError: it is not a dataset.
        ValueError: it has no rows, lacks a column, or has missing or mixed values, or a value of another type.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        cure = "Pass `Dataset.from_list(rows)`" if isinstance(dataset, list) else "Pass a `datasets.Dataset`"
        if isinstance(dataset, dict):
            cure = f"Pass one of its splits, {list(dataset)}" if hasattr(dataset, "map") else cure
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. {cure}."
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}_dataset` has no rows. Give a dataset with at least one.")
    form = _form_of(sorted(first), name, forms, refused)
    if "label" in form:
        _check_labels(dataset, name)
    columns = [column for column in _TEXTS if column in first and column in (*form, "prompt")]
    if isinstance(dataset, Dataset):
        _refuse_missing(dataset, columns, name)
    check_row(first, columns=columns, name=name)
    if isinstance(dataset, Dataset) and not isinstance(first[columns[0]], str):
        _check_messages(dataset, columns, name)


def check_template(dataset: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """
    Refuse a chat template that does not write what the assistant says, tried on the first row.

    Its completions would be empty, or parts of themselves.
    """
    row = next(iter(dataset))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset is conversational, and the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or give plain texts."
        )
    for column in (column for column in _TEXTS[1:] if column in row):
        turns = [*row.get("prompt", []), *row[column]]
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        arguments = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        try:
            written = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
        except Exception as error:  # whatever a template of another's raises
            raise ValueError(
                f"The tokenizer's chat template cannot write the first row of the {name} dataset "
                f"(`{column}`): {type(error).__name__}: {error}. Correct the template or the row."
            ) from error
        said = [turn["content"] for turn in row[column] if turn["role"] == "assistant"]
        lost = [text for text in said if isinstance(text, str) and text.strip() not in written]
        if lost:
            raise ValueError(
                f"The tokenizer's chat template leaves out what the assistant says in `{column}` of the {name} "
                f"dataset: {lost[0][:60]!r} is not in {written[-120:]!r}. Set "
                "`tokenizer.chat_template` to one that writes it."
            )


def _form_of(columns: list[str], name: str, forms: RowForms, refused: tuple[str, ...]) -> tuple[str, ...]:
    """The first form of which no column is missing."""
    found = [column for column in refused if column in columns]
    if found:
        raise ValueError(
            f"The {name} dataset has columns {found}. Reference scores are valid only for the draws they were "
            "computed on: remove the columns, or give the rows as they were before a trainer prepared them. "
            "`precompute_ref_log_probs=True` has them computed here."
        )
    for form in forms:
        if set(form) <= set(columns):
            return form
    needed = ", or ".join(" and ".join(f"`{column}`" for column in form) for form in forms)
    raise ValueError(
        f"The {name} dataset has columns {columns}. It needs {needed}: rename what holds them with "
        "`dataset.rename_column`. Pairs are for VRPO; single completions, with a `label` that is True for a desirable "
        "one, for ELBO-KTO."
    )


def _check_labels(dataset: Any, name: str) -> None:
    """Labels are true or false; 1 and 0 are. Of a stream the first is looked at."""
    labels = dataset["label"] if isinstance(dataset, Dataset) else [next(iter(dataset))["label"]]
    bad = {repr(label) for label in labels if not isinstance(label, int) or label not in (0, 1)}
    if bad:
        raise ValueError(
            f"The column `label` of the {name} dataset must hold True for a desirable completion and False for an "
            f"undesirable one, got {', '.join(sorted(bad)[:3])}. Map them, for instance with "
            '`dataset.map(lambda row: {"label": row["label"] > 0})`.'
        )


def _refuse_missing(dataset: Dataset, columns: Iterable[str], name: str) -> None:
    for column in columns:
        batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH)
        missing = [batch[column].null_count for batch in batches]
        if any(missing):
            row = next(i for i, value in enumerate(dataset[column]) if value is None)
            raise ValueError(
                f"{sum(missing)} of {len(dataset)} rows of the {name} dataset have no `{column}` (None), the first of "
                f'them row {row}. Drop them with `dataset.filter(lambda row: row["{column}"] is not None)`.'
            )


def _check_messages(dataset: Dataset, columns: list[str], name: str) -> None:
    for number, batch in enumerate(dataset.select_columns(columns).iter(batch_size=_BATCH)):
        for column in columns:
            for place, turns in enumerate(batch[column]):
                _check_turns(turns, f"`{column}` of row {_BATCH * number + place} of the {name} dataset")


def check_row(row: dict[str, Any], *, columns: list[str], name: str) -> None:
    """Refuse a row that is not all texts or all messages."""
    for column in columns:
        value, where = row[column], f"`{column}` of the {name} dataset"
        messages = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
        if not isinstance(value, str) and not messages:
            raise ValueError(
                f"{where} must be a text, or a list of messages with `role` and `content`, got {str(value)[:80]!r} "
                f"({type(value).__name__})."
            )
        if messages:
            _check_turns(value, where)
    if len({isinstance(row[column], str) for column in columns}) > 1:
        kinds = {column: "text" if isinstance(row[column], str) else "messages" for column in columns}
        raise ValueError(f"The columns of the {name} dataset mix texts and messages: {kinds}. Use one of them for all.")


def _check_turns(turns: list[dict[str, Any]], where: str) -> None:
    if not turns:
        raise ValueError(f"{where} has no message. Give it at least one, or drop the row.")
    for turn in turns:
        if "role" not in turn or "content" not in turn:
            cure = "; `trl.maybe_convert_to_chatml` turns `from` and `value` into them" if "from" in turn else ""
            raise ValueError(f"A message in {where} has the keys {sorted(turn)}. It needs `role` and `content`{cure}.")
        if turn["role"] is None or (turn["content"] is None and not turn.get("tool_calls")):
            raise ValueError(f"A message in {where} has no `role` or no `content` (None). Fill it in or drop the row.")
