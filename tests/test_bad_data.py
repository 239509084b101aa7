"""
Datasets, models, tokenizers and folders that cannot be trained with: one error each, before anything is loaded or run,
that says what is wrong with what and what to do. Options are in test_bad_input.py and test_kto.py.
"""

import logging

import pytest
import test_kto
import test_trainers
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, get_peft_model
from test_kto import make_feedback
from transformers import ProcessorMixin

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, ELBOKTOConfig

USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "say hi"), ("assistant", "six")))


def pairs(**columns):
    """Usable pairs with other values in some columns; None leaves a column out."""
    columns = {**make_pairs(4).to_dict(), **columns}
    return Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


def feedback(**columns):
    columns = {**make_feedback(4).to_dict(), **columns}
    return Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


def conversation(**columns):
    row = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "bye"}], **columns}
    return Dataset.from_list([row] * 2)


PAIRS = {
    "a list": (
        lambda: make_pairs(3).to_list(),
        r"must be a `Dataset` or `IterableDataset`, got `list`. Pass `Dataset.from",
    ),
    "a dict": (lambda: make_pairs(3).to_dict(), "must be a `Dataset` or `IterableDataset`, got `dict`"),
    "None": (lambda: None, "`train_dataset` is required.*Pass a `datasets.Dataset` with `chosen` and `rejected`"),
    "splits": (lambda: DatasetDict(train=make_pairs(3)), r"got `DatasetDict`. Pass one of its splits, \['train'\]"),
    "no rows": (lambda: make_pairs(3).select([]), "`train_dataset` has no rows"),
    "empty stream": (lambda: IterableDataset.from_generator(lambda: iter([])), "`train_dataset` has no rows"),
    "no rejected": (lambda: pairs(rejected=None), r"columns \['chosen', 'prompt'\]. It needs `chosen` and `rejected`"),
    "no chosen": (lambda: pairs(chosen=None), r"columns \['prompt', 'rejected'\]. It needs `chosen` and `rejected`"),
    "texts only": (
        lambda: Dataset.from_dict({"text": ["a"]}),
        r"columns \['text'\]. It needs `chosen` and `rejected`: rename",
    ),
    "feedback": (lambda: make_feedback(4), "needs `chosen` and `rejected`.*with a `label`.*for ELBO-KTO"),
    "ids": (
        lambda: Dataset.from_dict({"prompt_ids": [[7]], "chosen_ids": [[8]], "rejected_ids": [[9]]}),
        "'chosen_ids'.*It needs",
    ),
    "prompt None": (
        lambda: pairs(prompt=["a", None, "b", None]),
        r"In 2 of 4 rows of the train dataset \(1, 3\) there is no `prompt` \(None\). Drop such rows",
    ),
    "chosen None": (
        lambda: pairs(chosen=["a", "b", "c", None]),
        r"1 of 4 rows of the train dataset \(3\) there is no `chosen` .None.*dataset.filter",
    ),
    "all None": (
        lambda: pairs(chosen=[None] * 4),
        r"4 of 4 rows of the train dataset \(0, 1, 2, 3\) there is no `chosen`",
    ),
    "prompt numbers": (
        lambda: pairs(prompt=[1, 2, 3, 4]),
        r"`prompt` is neither a text nor a list of messages.*'1' \(int\)",
    ),
    "chosen numbers": (lambda: pairs(chosen=[1.5] * 4), r"`chosen` is neither a text nor.*'1.5' \(float\)"),
    "chosen words": (
        lambda: pairs(chosen=[["one"]] * 4),
        r"`chosen` is neither a text nor.*\"\['one'\]\" \(list\)",
    ),
    "chosen a turn": (
        lambda: pairs(chosen=[ASSISTANT] * 4),
        r"`chosen` is neither a text nor.*\(dict\)",
    ),
    "nothing in common": (
        lambda: pairs(prompt=None),
        r"4 of 4 rows.*`chosen` and `rejected` do not begin alike.*Give the dataset a column `prompt`",
    ),
    "empty prompts": (
        lambda: pairs(prompt=[""] * 4),
        "No row .*: 4 because a prompt has no token.*give every example a prompt",
    ),
    "images": (lambda: pairs(image=[0] * 4), "appears to be vision-related"),
    "scores": (
        lambda: pairs(ref_chosen_logps=[0.0] * 4),
        r"columns \['ref_chosen_logps'\]. Reference scores are valid only",
    ),
    "only masks": (lambda: pairs(chosen=["<|mdm_mask|>"] * 4), "4 because the text contains the mask token"),
    "turns without content": (
        lambda: conversation(prompt=[{"role": "user"}]),
        r"message of `prompt` has no `role`, or neither `content` nor `tool_calls`: it has \['role'\]",
    ),
    "from and value": (lambda: conversation(chosen=[{"from": "gpt", "value": "x"}]), "`trl.maybe_convert_to_chatml`"),
    "content None": (
        lambda: conversation(chosen=[{"role": "assistant", "content": None}]),
        r"message of `chosen` has no `content` \(None\): it has \['role'\]",
    ),
    "no turn": (lambda: conversation(prompt=[]), "`prompt` has no message"),
    "no answer": (lambda: conversation(rejected=[]), "`rejected` has no message"),
    "turns and text": (
        lambda: conversation(chosen="x", rejected="y"),
        "`chosen` holds a text and other columns or rows hold messages",
    ),
    "text and turns": (
        lambda: conversation(prompt="x"),
        r"`prompt` holds a text and other columns or rows hold messages.*`dataset.remove_columns\(\"prompt\"\)`",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path, name):
    make, message = PAIRS[name]
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises((ValueError, TypeError), match=message):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make(), processing_class=make_tokenizer())


FEEDBACK = {
    "no label": (
        lambda: feedback(label=None),
        r"columns \['completion', 'prompt'\]. It needs `prompt` and `completion` and `la",
    ),
    "no completion": (
        lambda: feedback(completion=None),
        "needs `prompt` and `completion` and `label`, or `chosen` and",
    ),
    "no prompt": (lambda: feedback(prompt=None), r"columns \['completion', 'label'\]. It needs `prompt`"),
    "label None": (
        lambda: feedback(label=[True, None, False, True]),
        r"1 of 4 rows of the train dataset \(1\) `label` is not True.*got None",
    ),
    "label text": (lambda: feedback(label=["good"] * 4), "4 of 4 rows.*`label` is not True.*got 'good'"),
    "label score": (
        lambda: feedback(label=[0.0, 1.0, 0.5, 1.0]),
        "4 of 4 rows.*`label` is not True for a desirable.*got 0.0. Map it",
    ),
    "label of signs": (
        lambda: feedback(label=[1, -1, 1, -1]),
        r"2 of 4 rows.*\(1, 3\) `label` is not True for a desirable.*got -1.*row\[\"label\"\] > 0",
    ),
    "completion None": (
        lambda: feedback(completion=[None] * 4),
        r"4 of 4 rows of the train dataset .* there is no `completion`",
    ),
    "scores": (lambda: feedback(ref_logps=[0.0] * 4), r"columns \['ref_logps'\]. Reference scores are valid only"),
}


@pytest.mark.parametrize("name", FEEDBACK)
def test_feedback(tmp_path, name):
    make, message = FEEDBACK[name]
    with pytest.raises(ValueError, match=message):
        test_kto.make_trainer(tmp_path, dataset=make())


def test_labels_of_one_and_zero_are_true_and_false(tmp_path):
    trainer = test_kto.make_trainer(tmp_path, dataset=feedback(label=[1, 0, 1, 1]), max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert (logged["kto/num_desirable"], logged["kto/num_undesirable"]) == (3, 1)


@pytest.mark.parametrize("make, message", [PAIRS["no rejected"], PAIRS["no rows"], PAIRS["chosen None"]])
def test_evaluation_sets_are_checked_too(tmp_path, make, message):
    message = message.replace("train", "eval")
    with pytest.raises(ValueError, match=message):
        test_trainers.make_trainer(tmp_path, eval_dataset=make())
    with pytest.raises(ValueError, match=message.replace("eval", "one")):
        test_trainers.make_trainer(tmp_path, eval_dataset={"one": make()})
    trainer = test_trainers.make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(make())


def test_pairs_of_equal_responses_are_counted(tmp_path, caplog):
    same = pairs(chosen=["one", "two", "one two", "six"], rejected=["two", "two", "one two", "seven"])
    with caplog.at_level(logging.WARNING):
        trainer = test_trainers.make_trainer(tmp_path, dataset=same)
    assert any(
        "In 2 of 4 rows of the train dataset (1, 2) the chosen and the rejected response are the same" in r.getMessage()
        for r in caplog.records
    )
    assert len(trainer.train_dataset) == 4


def test_several_reasons_are_counted_apart(tmp_path):
    rows = pairs(prompt=[None, "a", None, "b"], rejected=["x", None, "y", "z"])
    with pytest.raises(ValueError, match=r"2 of 4 .* \(0, 2\) there is no `prompt` .*1 of 4 .* \(1\) there is no `rej"):
        test_trainers.make_trainer(tmp_path, dataset=rows)


def test_what_evaluate_is_given_is_checked(tmp_path):
    trainer = test_trainers.make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"The one dataset has columns \['chosen', 'prompt'\]. It needs"):
        trainer.evaluate({"one": pairs(rejected=None)})
    with pytest.raises(TypeError, match="The eval dataset must be a `Dataset` or `IterableDataset`, got `list`"):
        trainer.evaluate(make_pairs(3).to_list())
    logged = trainer.evaluate({"one": make_pairs(3), "two": make_pairs(2)})
    assert {"eval_one_loss", "eval_two_loss"} <= set(logged)


# Streams: the first row when the trainer is made, every row when it is read

LATER = {
    "chosen None": ({"chosen": None}, "In row 1 of the train dataset there is no `chosen`"),
    "a column less": ({"rejected": ...}, "In row 1 of the train dataset there is no `rejected`"),
    "messages": ({"chosen": [ASSISTANT]}, "In row 1 .* `chosen` holds messages and other columns or rows hold a text"),
    "label None": ({"label": None}, "In row 1 .* `label` is not True .*got None"),
    "no label": ({"label": ...}, "In row 1 .* `label` is not True .*got None"),
    "label rating": ({"label": 3}, "In row 1 .* `label` is not True .*got 3"),
    "label sign": ({"label": -1}, "In row 1 .* `label` is not True .*got -1"),
    "label number": ({"label": 1.0}, "In row 1 .* `label` is not True .*got 1.0"),
}


@pytest.mark.parametrize("name", LATER)
def test_later_rows_of_a_stream(tmp_path, name):
    change, message = LATER[name]
    kto = "label" in change
    good = (make_feedback if kto else make_pairs)(1)[0]
    bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
    stream = IterableDataset.from_generator(lambda: iter([good, bad, good]))
    make_trainer = (test_kto if kto else test_trainers).make_trainer
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dataset=stream, max_steps=2, per_device_train_batch_size=2).train()


# Formats


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_changes_nothing(tmp_path, form):
    """Its columns stay the ones that were chosen with it."""
    plain = test_trainers.make_trainer(tmp_path).train_dataset.to_list()
    hidden = make_pairs(6).add_column("ref_chosen_logps", [0.0] * 6)
    given = hidden.with_format(form, columns=["prompt", "chosen", "rejected"])
    assert test_trainers.make_trainer(tmp_path, dataset=given).train_dataset.to_list() == plain
    labelled = test_kto.make_trainer(tmp_path, dataset=make_feedback(4).with_format(form)).train_dataset
    assert labelled.to_list() == test_kto.make_trainer(tmp_path, dataset=make_feedback(4)).train_dataset.to_list()


def test_rows_that_are_transformed_when_they_are_read(tmp_path):
    given = make_pairs(6).with_transform(lambda rows: {**rows, "prompt": ["say "] * len(rows["prompt"])})
    with pytest.raises(ValueError, match="train dataset transforms rows when they are read .*dataset.map"):
        test_trainers.make_trainer(tmp_path, dataset=given)


def test_rows_are_looked_at_once_before_and_once_after_they_are_tokenised(tmp_path, monkeypatch):
    """Conversations are written once more, to see what the template leaves out. TRL has 2 maps of texts, 1 of these."""
    maps, of_dataset = [], Dataset.map

    def counted(self, *args, **kwargs):
        maps.append(kwargs.get("desc"))
        return of_dataset(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", counted)
    test_trainers.make_trainer(tmp_path)
    assert len(maps) == 2 + 2, maps
    maps.clear()
    test_trainers.make_trainer(tmp_path, dataset=conversation())
    assert len(maps) == 3 + 1, maps


def test_several_processes_find_what_one_does(tmp_path):
    rows = pairs(chosen=["one", "", "two", "<|mdm_mask|>"])
    one, two = (test_trainers.make_trainer(tmp_path, dataset=rows, dataset_num_proc=n).train_dataset for n in (None, 2))
    assert one.to_list() == two.to_list() and len(one) == 2
    with pytest.raises(ValueError, match=r"2 of 4 rows .* \(1, 3\) there is no `prompt`"):
        test_trainers.make_trainer(tmp_path, dataset=pairs(prompt=["a", None, "b", None]), dataset_num_proc=2)


# Templates

TEMPLATES = {
    "none": (None, "is conversational, and the tokenizer has no chat template"),
    "without answers": (
        "{{ bos_token }}{{ messages[0].content }}",
        r"2 of 2 rows .*\(0, 1\).*leaves out what the assistant says in `prompt` and `chosen`: 'six' is missing from",
    ),
    "only beginnings": (
        "{% for m in messages %}{{ m.content[:1] }} {% endfor %}",
        "leaves out what the assistant says",
    ),
    "that opens a turn": (
        "{% for m in messages %}<|start_header_id|> {{ m.role }} <|end_header_id|> {{ m.content }} <|eot_id|> "
        "{% endfor %}<|start_header_id|> assistant <|end_header_id|> ",
        "opens an assistant turn after every conversation.*only with `add_generation_prompt=True`",
    ),
    "that raises": (
        "{{ raise_exception('no system role') }}",
        "cannot write the conversation: TemplateError: no system",
    ),
    "of bad syntax": ("{% for %}", "cannot write the conversation: TemplateSyntaxError"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(tmp_path, name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, message = TEMPLATES[name]
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=conversation(), processing_class=tokenizer)


# Models and tokenizers


def with_token(**tokens):
    tokenizer = make_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def frozen(model):
    model.requires_grad_(False)
    return model


def adapter():
    return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))


class Processor(ProcessorMixin):
    """Of texts and images."""

    def __init__(self):
        self.tokenizer = make_tokenizer()


def with_base():
    """A model with an adapter, and what it was put into."""
    base = make_model()
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])), base


def merged():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    return model


GIVEN = {
    "a number": ({"model": 3}, "`model` must be a path or a model of transformers or PEFT, got `int`"),
    "a layer": ({"model": torch.nn.Linear(2, 2)}, "`model` must be a path or a model.*got `Linear`"),
    "reference by name": ({"ref_model": "some/model"}, "`ref_model` must be None or a model.*got `str`"),
    "reference of another vocabulary": (
        {"ref_model": make_model(vocab_size=20)},
        "vocabulary has 30 tokens and its reference's has 20",
    ),
    "small vocabulary": (
        {"model": make_model(vocab_size=20)},
        "tokenizer makes the token 2., and the model's vocabulary has 20",
    ),
    "no tokenizer": ({"processing_class": None}, "`processing_class` is required with a model that was made in memory"),
    "tokenizer by name": (
        {"processing_class": "some/model"},
        "`processing_class` must be a tokenizer.*got `str`",
    ),
    "processor": ({"processing_class": Processor()}, "got `Processor`.*a processor has it as `processor.tokenizer`"),
    "merged adapter": ({"model": merged(), "ref_model": make_model()}, r"is merged .*`model.unmerge_adapter\(\)`"),
    "reference of shared weights": (
        dict(zip(("model", "ref_model"), with_base(), strict=True)),
        "`ref_model` holds the weight `.*lora_A.*`, which is trained: it would move .* or load the model once more",
    ),
    "mask as end": (
        {"processing_class": with_token(eos_token="<|mdm_mask|>")},
        "`tokenizer.eos_token` is the mask token .2.",
    ),
    "mask as begin": (
        {"processing_class": with_token(bos_token="<|mdm_mask|>")},
        "`tokenizer.bos_token` is the mask token .2.",
    ),
    "adapter as dict": ({"peft_config": {"r": 4}}, "`peft_config` must be a `peft.PeftConfig` instance"),
    "two adapters": (
        {"model": adapter(), "peft_config": LoraConfig()},
        "You passed a `PeftModel` instance together with a `peft",
    ),
    "bad pattern": (
        {"peft_config": LoraConfig(target_modules="((q_proj")},
        r"`target_modules='\(\(q_proj'` is not a valid pattern",
    ),
    "no folder": ({"model": "no/such/folder/here"}, "`model='no/such/folder/here'` could not be loaded.*Give a folder"),
    "no network": (
        {"model": "some-team/some-model"},
        "`model='some-team/some-model'` could not be loaded.*`hf download some-team",
    ),
    "other arguments": ({"args": {"beta": 1}}, "`args` must be a `DiffusionVRPOConfig`, got `dict`"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_models_and_tokenizers(tmp_path, name):
    given, message = GIVEN[name]
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    arguments = {
        "model": make_model(),
        "args": args,
        "train_dataset": make_pairs(3),
        "processing_class": make_tokenizer(),
    }
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        DiffusionVRPOTrainer(**{**arguments, **given})


def test_nothing_to_train(tmp_path):
    """It can be evaluated."""
    trainer = test_trainers.make_trainer(tmp_path, frozen(make_model()), eval_dataset=make_pairs(3))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    with pytest.raises(
        ValueError, match="No weight of the `LLaDAModelLM` requires a grad.*`model.requires_grad_.True.`"
    ):
        trainer.train()


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        OSError, match="could not be loaded: Unrecognized model.*Give a folder that `save_pretrained` wrote"
    ):
        test_trainers.make_trainer(tmp_path / "out", str(tmp_path))


# Folders


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(OSError, match="`output_dir=.*out'` cannot be written to: .*Give a folder that can"):
        test_trainers.make_trainer(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "not a folder"


def test_an_output_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trl_diffusion.checks.inputs.NamedTemporaryFile", refuse)
    with pytest.raises(OSError, match="`output_dir=.*` cannot be written to: .*Permission denied"):
        test_trainers.make_trainer(tmp_path)


def test_a_step_that_cannot_be_saved(tmp_path, monkeypatch):
    """The weights go through safetensors, whose error is its own."""
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = test_trainers.make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="checkpoint-1 could not be written.*No space left.*resume_from_checkpoint=True"):
        trainer.train()


def test_streams_need_a_length(tmp_path):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        test_trainers.make_trainer(tmp_path, dataset=make_pairs(3).to_iterable_dataset())
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` is not supported with IterableDataset"):
        options = {"max_steps": 1, "precompute_ref_log_probs": True}
        test_trainers.make_trainer(tmp_path, dataset=make_pairs(3).to_iterable_dataset(), **options)


def test_the_configuration_of_the_other_trainer(tmp_path):
    args = ELBOKTOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(TypeError, match="`args` must be a `DiffusionVRPOConfig`, got `ELBOKTOConfig`"):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make_pairs(), processing_class=make_tokenizer())
