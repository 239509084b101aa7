"""Supervised fine-tuning against a hand-written loss, what of a row is learnt, and what is refused."""

import math

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_trainers import assert_same_gradients, gradients
from torch import nn

from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, elbo

EOS = 0


def make_completions(n=6):
    """Completions of different lengths."""
    return make_pairs(n).remove_columns("rejected").rename_column("chosen", "completion")


def make_trainer(
    folder, model=None, *, dataset=None, eval_dataset=None, peft_config=None, quantization_config=None, **options
):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "eos_padding": 4,
        **options,
    }
    return DiffusionSFTTrainer(
        model or make_model(),
        DiffusionSFTConfig(**options),
        train_dataset=make_completions() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        quantization_config=quantization_config,
    )


def batch_of(trainer, rows=range(3)):
    wanted = ("input_ids", "labels")
    return trainer.data_collator([{name: trainer.train_dataset[i][name] for name in wanted} for i in rows])


def by_hand(model, trainer, inputs, nonce, average):
    """The definition: minus the ELBO on the draws of `nonce`, over tokens, or over each row's tokens and then rows."""
    maskable = inputs["labels"] != -100
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], nonce)
    value = elbo(model, inputs["input_ids"], maskable, inputs["attention_mask"], draws=draws).value
    tokens = maskable.sum(1)
    return -value.sum() / tokens.sum() if average == "tokens" else -(value / tokens).mean()


@pytest.mark.parametrize("average", ["tokens", "examples"])
@pytest.mark.parametrize("mode", ["immediate", "checkpoint"])
def test_loss_and_gradient_equal_the_hand_written_ones(tmp_path, mode, average):
    model = make_model()
    trainer = make_trainer(tmp_path, model, elbo_gradient=mode, loss_average=average, num_mc_samples=3)
    inputs = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    ours = gradients(model, loss)
    expected = by_hand(model, trainer, inputs, 1, average)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(ours, gradients(model, expected))


@pytest.mark.parametrize("scheme, share", [("bernoulli", "level"), ("fixed_count", "counts")])
def test_the_loss_is_that_of_llada(tmp_path, scheme, share):
    """Cross entropies of masked tokens over t, or times L'/l, over the length of the answer, mean over examples."""
    trainer = make_trainer(tmp_path, loss_average="examples", mask_scheme=scheme, control_variate="none")
    inputs = batch_of(trainer)
    maskable = inputs["labels"] != -100
    draws = trainer._sampler(maskable, inputs["input_ids"], inputs["attention_mask"], 1)
    (masked,), length = draws.masked, maskable.sum(1)
    # Of the first row of the table the level t is not kept: the weight of its tokens is 1/t
    t = masked.sum(1) / length if share == "counts" else 1 / draws.weight[0].max(1).values
    logits = trainer.model(inputs["input_ids"].masked_fill(masked, 2), inputs["attention_mask"]).logits
    losses = nn.functional.cross_entropy(logits[masked], inputs["input_ids"][masked], reduction="none")
    expected = (losses / (t * length).unsqueeze(1).expand_as(masked)[masked]).sum() / len(length)
    trainer.model.train()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("average", ["tokens", "examples"])
def test_accumulation_does_not_change_a_step(tmp_path, average):
    """Rows of different lengths, one at a time or all at once: the mean is over the step."""
    outcomes = []
    for size, parts in ((4, 1), (1, 4), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 2}
        options |= {
            "optim": "sgd",
            "learning_rate": 1.0,
            "loss_average": average,
            "train_sampling_strategy": "sequential",
        }
        trainer = make_trainer(tmp_path, dataset=make_completions(8), **options)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        outcomes.append((logged, [p.detach().clone() for p in trainer.model.parameters()]))
    (losses, weights), *others = outcomes
    for other_losses, other in others:
        assert other_losses == pytest.approx(losses, rel=1e-6)
        for ours, theirs in zip(weights, other, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-6)


def test_a_step_meets_new_masks_and_evaluation_the_same(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_completions(), max_steps=2, learning_rate=0.0)
    first, again = trainer.evaluate()["eval_loss"], trainer.evaluate(make_completions())["eval_loss"]
    trainer.train()
    assert first == again == trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] != losses[1]
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(loss, by_hand(trainer.model, trainer, batch_of(trainer), 0, "tokens"), rtol=1e-5, atol=0)


# Rows


def ids(text):
    return make_tokenizer()(text)["input_ids"]


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


ASKED = "<|startoftext|><|start_header_id|>user<|end_header_id|>say hi<|eot_id|>"
OPEN = "<|start_header_id|>assistant<|end_header_id|>"
ROWS = {
    "texts": ({"prompt": "what is one ", "completion": "two"}, "what is one", "two"),
    "conversation": (
        {"prompt": turns("say hi"), "completion": turns("", "hi you")[1:]},
        ASKED + OPEN,
        "hi you<|eot_id|>",
    ),
    "messages": ({"messages": turns("say hi", "hi you")}, ASKED + OPEN, "hi you<|eot_id|>"),
    "many turns": (
        {"messages": turns("say hi", "hi", "say bye", "bye you")},
        f"{ASKED}{OPEN}hi<|eot_id|><|start_header_id|>user<|end_header_id|>say bye<|eot_id|>{OPEN}",
        "bye you<|eot_id|>",
    ),
    "plain text": ({"text": "one two three"}, "one", "two three"),
    "other columns": ({"prompt": "unused", "text": "one two", "input_ids": [7], "labels": [7]}, "one", "two"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_of_a_row_is_learnt(tmp_path, name):
    """The completion or the last turn, with one end of text; of a text all but its first token."""
    row, shown, learnt = ROWS[name]
    found = make_trainer(tmp_path, dataset=Dataset.from_list([row] * 3), eos_padding=0).train_dataset[0]
    expected = [*ids(learnt), EOS]
    assert found["input_ids"] == ids(shown) + expected
    assert found["labels"] == [-100] * len(ids(shown)) + expected


def test_the_text_column_can_have_another_name(tmp_path):
    trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"body": ["one two"] * 3}), dataset_text_field="body")
    assert trainer.train_dataset[0]["labels"] == [-100, *ids("two"), EOS]


def test_a_stream(tmp_path):
    stream = make_completions().to_iterable_dataset()
    trainer, whole = make_trainer(tmp_path, dataset=stream, max_steps=1), make_trainer(tmp_path)
    assert next(iter(trainer.train_dataset))["labels"] == whole.train_dataset[0]["labels"]
    trainer.train()


def test_ends_of_text_that_follow(tmp_path):
    """Each number from 0 to `eos_padding` about as often, the same whenever it is made, within `max_length`."""
    rows = Dataset.from_dict({"prompt": [f"{word} is " for word in ids_to_words()] * 25, "completion": two_words(600)})
    numbers = [len(row["completion_ids"]) - 3 for row in make_trainer(tmp_path, dataset=rows).train_dataset]
    again = [
        len(row["completion_ids"]) - 3 for row in make_trainer(tmp_path, dataset=rows.select(range(9))).train_dataset
    ]
    assert again == numbers[:9]
    distinct = len({*zip(rows["prompt"], rows["completion"], strict=True)})
    for number in range(5):  # four standard deviations of a share of one fifth
        assert abs(numbers.count(number) / len(numbers) - 0.2) < 4 * math.sqrt(0.16 / distinct)
    short = make_trainer(tmp_path, dataset=rows, max_length=6).train_dataset
    assert {len(row["input_ids"]) for row in short} == {5, 6}


def ids_to_words():
    return [make_tokenizer().decode([token]) for token in range(6, 30)]


def two_words(n):
    words = ids_to_words()
    return [f"{words[(7 * i) % 24]} {words[(i // 24) % 24]}" for i in range(n)]


# Refusals

OPTIONS = {
    "packing": (True, "would see each other"),
    "eval_packing": (True, "would see each other"),
    "padding_free": (True, "responses already run at their exact length"),
    "completion_only_loss": (False, "what was given is shown, never learnt"),
    "assistant_only_loss": (True, "make a row of each"),
    "loss_type": ("dft", r"must be among \['nll'\]"),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, "always tokenised and checked"),
    "chat_template_path": ("some/tokenizer", "ends in .jinja"),
    "truncation_mode": ("keep_end", "never truncated"),
    "control_variate": ("adaptive", "leave_one_out"),
    "loss_average": ("words", r"must be one of \['tokens', 'examples'\]"),
    "eos_padding": (-1, "an integer of at least 0"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_diffusion_cannot_do_are_refused_by_name(tmp_path, option):
    value, why = OPTIONS[option]
    with pytest.raises(ValueError, match=rf"`{option}.*{why}"):
        DiffusionSFTConfig(str(tmp_path), bf16=False, use_cpu=True, **{option: value})


@pytest.mark.parametrize("name", ["formatting_func", "compute_loss_func", "optimizer_cls_and_kwargs"])
def test_arguments_without_meaning_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"`{name}` is not taken by `DiffusionSFTTrainer`"):
        DiffusionSFTTrainer(make_model(), train_dataset=make_completions(), **{name: len})


BAD_ROWS = {
    "pairs": ([{"chosen": "one", "rejected": "two"}], "needs `prompt` and `completion`, or `messages`, or `text`"),
    "one turn": ([{"messages": turns("say hi")}] * 2, "the conversation has one turn only"),
    "no answer": ([{"messages": turns("say hi", "hi", "bye")}] * 2, "`messages` ends in a turn of the role 'user'"),
    "empty": ([{"prompt": "what is ", "completion": ""}] * 2, "a completion has no token"),
    "mask": ([{"prompt": "what is ", "completion": "<|mdm_mask|> one"}] * 2, "contains the mask token"),
    "none": ([{"text": None}] * 2, "there is no `text`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_learnt_are_named(tmp_path, name):
    rows, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dataset=Dataset.from_list(rows))


def test_one_row_is_a_dataset(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_completions(1), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# The run


def test_an_adapter_that_leaves_no_reference_behind_is_no_fault_here(tmp_path):
    """PiSSA changes the base model, which nothing is compared with."""
    config = LoraConfig(r=2, init_lora_weights="pissa")
    trainer = make_trainer(tmp_path, peft_config=config, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_the_loss_falls_and_metrics_are_those_that_mean_something(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=30, num_mc_samples=4, eval_dataset=make_completions())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 1
    logged = set(trainer.state.log_history[1])
    assert {"loss", "grad_norm", "num_tokens", "elbo/mask_ratio", "elbo/standard_error"} <= logged
    assert not {"entropy", "mean_token_accuracy"} & logged
    assert {"eval_elbo/mask_ratio", "eval_elbo/standard_error"} <= set(after)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    other = make_trainer(tmp_path, **options, loss_average="examples")
    with pytest.raises(ValueError, match="`loss_average` was 'tokens' and is 'examples'"):
        other.train(resume_from_checkpoint=True)


def test_the_model_card_names_the_method(tmp_path):
    make_trainer(tmp_path).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "trained with SFT" in text and "2502.09992" in text and "between the policy" not in text
