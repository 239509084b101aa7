"""From a user's rows to what is scored: plain texts, or messages of text, which TRL is given to tokenise."""

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.logging import get_logger
from datasets import IterableDataset, Value
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checks.datasets import check_eval_dataset, form_of, unformatted
from ..checks.findings import Judge, judge_row, judge_rows
from ..checks.inputs import check_tokenizer
from ..checks.rows import RowForm, RowForms
from ..checks.template import Writing, refuse_open_turns
from ..models.chat_template import give_chat_template, use_training_template
from ..models.denoiser import resolve_mask_token_id
from ..models.end_of_text import use_end_of_text
from ..models.families import family_of
from ..models.family import Family
from .tokens import NUMBER, TokenRules, scorable

if TYPE_CHECKING:  # what the mixin is put in front of
    from ..scoring.door import DPOTrainer as _TRLTrainer
else:
    _TRLTrainer = object

logger = get_logger(__name__)


class DataMixin(_TRLTrainer):
    """
    Put in front of a TRL trainer: its datasets are read and judged, before and after TRL tokenises them.

    Attributes:
        _row_forms: columns that a row must have, in one of these ways.
        _completion_columns: columns of completion ids that TRL's tokenisation makes.
        _reference_columns: names under which TRL reads reference values from a batch.
    """

    _row_forms: ClassVar[RowForms]
    _completion_columns: ClassVar[tuple[str, ...]]
    _reference_columns: tuple[str, ...]
    _model_config: Any
    _tokenizer: Any
    _max_positions: int | None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any) -> Any:
        tokenizer, family = self._tokenizer, family_of(self._model_config)
        mask_token_id = prepare_tokenizer(tokenizer, self._model_config)
        where: dict[str, Any] = {"name": others[-1], "num_proc": args.dataset_num_proc}
        meaning: dict[str, Any] = {"family": family, "mask_token_id": mask_token_id}
        dataset, form = readable(dataset, tokenizer, self._row_forms, **meaning, **where)
        dataset = super()._prepare_dataset(dataset, processing_class, without_length_filter(args), *others)
        rules = TokenRules(
            tokenizer,
            form.conversational,
            mask_token_id=mask_token_id,
            vocab_size=self._model_config.vocab_size,
            end_of_turn=family.end_of_turn,
            append_eos=args.append_eos and family.append_eos,
            max_length=args.max_length,
            max_positions=self._max_positions,
        )
        return scorable(dataset, self._completion_columns, rules, **where)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, see [`~trl.DPOTrainer.evaluate`]; the trainer's own evaluation sets are prepared already."""
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        own = [name for name, dataset in named.items() if dataset is eval_dataset]
        if eval_dataset is self.eval_dataset:
            eval_dataset = None
        elif own:
            eval_dataset = own[0]
        else:
            check_eval_dataset(eval_dataset, self._row_forms, self._reference_columns, self.args.dataset_num_proc)
        return super().evaluate(eval_dataset, *args, **kwargs)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """
    Have a tokenizer end texts and write conversations as the family of the model does. Returns the mask token.

    Raises:
        ValueError: the mask token is unclear, or the tokenizer has no end of text.
    """
    use_end_of_text(tokenizer)
    check_tokenizer(tokenizer, config)
    if use_training_template(tokenizer, family_of(config)):
        logger.warning_once(
            "The tokenizer's chat template opens an assistant turn after every conversation. It was replaced by "
            "one that does so only with `add_generation_prompt=True`; the tokens are the same."
        )
    return resolve_mask_token_id(config, tokenizer)


def readable(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    forms: RowForms,
    *,
    family: Family,
    mask_token_id: int,
    name: str,
    num_proc: int | None = None,
) -> tuple[Any, RowForm]:
    """
    The dataset as TRL is to read it, plain texts or messages of text with a prompt, and the form that it had.

    Args:
        dataset: rows as the user gave them.
        tokenizer: whose chat template will write conversations.
        forms: columns that a row must have, in one of these ways.
        family: of the model.
        mask_token_id: the mask token.
        name: of the dataset, for messages.
        num_proc: number of processes.

    Raises:
        ValueError: a row cannot be read, or the chat template cannot write it or leaves out a part of it. Rows of a
            stream are looked at as they are read.
    """
    dataset = unformatted(dataset, name)
    form = form_of(dataset, name, forms)
    if form.conversational and give_chat_template(tokenizer, family):
        logger.warning_once(
            f"The tokenizer has no chat template, and was given one for {family.name}: {tokenizer.chat_template!r}. "
            "It is saved with the tokenizer. Set `tokenizer.chat_template` for another."
        )
    if form.conversational and tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset is conversational, and the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or give plain texts."
        )
    if form.conversational:
        refuse_open_turns(tokenizer)
    judges = [Writing.of(tokenizer, form, mask_token_id)] if form.conversational else []
    if isinstance(dataset, IterableDataset):
        options = {"form": form, "judges": [form.judge, *judges], "name": name}
        return dataset.map(_read_of_stream, with_indices=True, fn_kwargs=options), form
    for judge in judges:
        judge_rows(dataset, judge, name, num_proc)
    if "chosen" in form.columns and any("label" in columns for columns in forms):  # TRL will make two rows of one
        dataset = dataset.add_column(NUMBER, list(range(len(dataset))))
    if not form.prompted or (form.conversational and not _texts_only(dataset.features, form)):
        dataset = dataset.map(form.read, num_proc=num_proc, desc=f"Reading {name} dataset")
    return dataset, form


def _read_of_stream(row: dict[str, Any], number: int, form: RowForm, judges: list[Judge], name: str) -> dict[str, Any]:
    for judge in judges:
        judge_row(row, judge, number, name)
    return form.read(row)


def _texts_only(features: Any, form: RowForm) -> bool:
    """Whether the type of a column says that the content of each message is a text."""
    types = [getattr(features[column], "feature", None) for column in form.columns]
    return all(isinstance(turn, dict) and turn.get("content", Value("string")) == Value("string") for turn in types)


def without_length_filter(args: Any) -> Any:
    """TRL drops prompts that fill `max_length` without a word; ours are counted."""
    args = copy.copy(args)
    args.max_length = None
    return args
