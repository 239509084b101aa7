"""The guard against displacement: what is logged against numbers by hand, when it warns; answers during training."""

import logging

import pytest
import test_kto
import test_sft
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainers import batch_of, elbos_by_hand, make_trainer
from transformers import GenerationConfig
from trl import LogCompletionsCallback

from trl_diffusion import WinRateCallback
from trl_diffusion.trainers.displacement import CHOSEN, REJECTED, DisplacementWatch


def logged_of(trainer):
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("precomputed", [False, True])
@torch.no_grad()
def test_the_change_per_token_is_that_by_hand(tmp_path, precomputed):
    policy, reference = make_model(seed=1), make_model(seed=2)
    trainer = make_trainer(tmp_path, policy, ref_model=reference, precompute_ref_log_probs=precomputed)
    inputs = batch_of(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs)
    nonce = 0 if precomputed else 1
    sides, lengths = elbos_by_hand(policy, trainer, inputs, nonce)
    references, _ = elbos_by_hand(reference, trainer, inputs, nonce)
    for name, ours, theirs, length in zip((CHOSEN, REJECTED), sides, references, lengths, strict=True):
        assert logged_of(trainer)[name] == pytest.approx(((ours - theirs) / length).mean().item(), rel=1e-4)


@torch.no_grad()
def test_of_single_rows_by_class(tmp_path):
    trainer = test_kto.make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2))
    trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, inputs)
    logged, rewards = logged_of(trainer), {}
    lengths, desirable = inputs["completion_mask"].sum(1), torch.as_tensor(inputs["label"]).bool()
    for row in range(4):  # a class at a time: one row of it, whose reward is beta times the change of its sum
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        trainer.compute_loss(trainer.model, one)
        name = "rewards/chosen" if desirable[row] else "rewards/rejected"
        rewards[row] = logged_of(trainer)[name] / trainer.beta / lengths[row].item()
    for name, of_class in ((CHOSEN, desirable), (REJECTED, ~desirable)):
        expected = [rewards[row] for row in range(4) if of_class[row]]
        assert logged[name] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize(
    "change, margin, warns", [(-0.11, 0.5, True), (-0.09, 0.5, False), (-0.5, -0.1, False), (0.3, 0.5, False)]
)
def test_when_it_warns(caplog, change, margin, warns):
    watch, state = DisplacementWatch(0.1), type("State", (), {"global_step": 7})
    logs = {CHOSEN: change, "rewards/margins": margin}
    with caplog.at_level(logging.WARNING):
        watch.on_log(None, state, None, logs={"loss": 0.7})
        for _ in range(2):
            watch.on_log(None, state, None, logs=logs)
    found = [r.getMessage() for r in caplog.records if "Likelihood displacement" in r.getMessage()]
    assert len(found) == warns
    assert not warns or "at step 7 the chosen responses have lost 0.110 nats per token" in found[0]


@pytest.mark.parametrize("make, cure", [(make_trainer, "`loss_weights`"), (test_kto.make_trainer, "desirable rows")])
def test_the_cure_is_one_that_the_method_has(tmp_path, caplog, make, cure):
    trainer = make(tmp_path, make_model())
    (watch,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, DisplacementWatch)]
    with caplog.at_level(logging.WARNING):
        watch.on_log(trainer.args, trainer.state, None, logs={CHOSEN: -0.2, "rewards/margins": 0.1})
    (found,) = [r.getMessage() for r in caplog.records if "Likelihood displacement" in r.getMessage()]
    assert cure in found


def test_a_run_that_displaces_is_warned_of(tmp_path, caplog):
    """Pushed hard, both responses sink."""
    options = {"max_steps": 8, "loss_type": ["apo_down"], "learning_rate": 0.03, "displacement_warning": 0.01}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=make_pairs(3), **options)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if CHOSEN in entry]
    sunk = [entry["step"] for entry in logged if entry[CHOSEN] < -0.01 and entry["rewards/margins"] > 0]
    found = [r.getMessage() for r in caplog.records if "Likelihood displacement" in r.getMessage()]
    assert sunk and len(found) == 1 and f"at step {sunk[0]} " in found[0]
    quiet = make_trainer(tmp_path, dataset=make_pairs(3), **options | {"displacement_warning": None})
    assert not any(isinstance(each, DisplacementWatch) for each in quiet.callback_handler.callbacks)


# Answers during training

PROMPTS = ["what is one", "say hi", "what is two plus three"]


def letters(completions, **kwargs):
    return [len(text) for text in completions]


def rewards_of(model):
    """Of greedy answers, counted here."""
    lengths = []
    for prompt in PROMPTS:
        ids = make_tokenizer()([prompt], return_tensors="pt").input_ids
        answer = model.generate(input_ids=ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(answer) if token in (0, 5)), 6)
        text = make_tokenizer().decode(answer[:end], skip_special_tokens=True)
        lengths.append(len(f" {text}") if text else 0)
    return lengths


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4)])
def test_rewards_and_wins_against_the_base(tmp_path, adapter):
    """Rewards are those of the answers, counted here; the base is the model as it was."""
    trainer = make_trainer(tmp_path, peft_config=adapter, max_steps=4, learning_rate=0.1, loss_type=["sft"])
    trainer.add_callback(WinRateCallback(trainer, PROMPTS, letters, freq=4, max_new_tokens=6, batch_size=2))

    base = rewards_of(make_model())
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_win_rate" in entry]
    now = rewards_of(trainer.model)
    assert now != base
    assert entry["eval_reward"] == pytest.approx(sum(now) / 3) and entry["eval_reward_base"] == pytest.approx(
        sum(base) / 3
    )
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(now, base, strict=True)]
    assert entry["eval_win_rate"] == pytest.approx(sum(wins) / 3) and entry["step"] == 4
    losses = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(losses) == 4  # metrics of training are not taken away from its own log


def test_the_base_of_an_adapter_that_came_with_the_model(tmp_path, caplog):
    """Is the adapter as it came, which is the reference, also when training is resumed, and not the model below it."""
    torch.manual_seed(0)
    adapted = get_peft_model(make_model(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    bare, options = rewards_of(make_model()), {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "steps"}
    expected = rewards_of(PeftModel.from_pretrained(make_model(), tmp_path / "adapter"))
    assert expected != bare
    for is_resumed in (False, True):
        model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
        trainer = make_trainer(tmp_path / "run", model, **options | {"save_steps": 1})
        trainer.add_callback(WinRateCallback(trainer, PROMPTS, letters, freq=2, max_new_tokens=6))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1") if is_resumed else None)
        (entry,) = [entry for entry in trainer.state.log_history[-2:] if "eval_win_rate" in entry]
        assert entry["eval_reward_base"] == pytest.approx(sum(expected) / 3)
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert trained and not any(".ref." in name for name in trained)


def test_the_base_of_imitation_from_an_adapter(tmp_path, caplog):
    """Is the model as it came, of which a resumed run has no copy, and says so."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for start in (None, str(tmp_path / "checkpoint-1")):
        torch.manual_seed(0)
        adapted = get_peft_model(make_model(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
        expected = rewards_of(adapted)
        trainer = test_sft.make_trainer(tmp_path, adapted, **options)
        trainer.add_callback(WinRateCallback(trainer, PROMPTS, letters, freq=2, max_new_tokens=6))
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=start)
        if start is None:
            (entry,) = [entry for entry in trainer.state.log_history if "eval_win_rate" in entry]
            assert entry["eval_reward_base"] == pytest.approx(sum(expected) / 3)
        assert ("is against the model that was resumed" in caplog.text) == (start is not None)


def test_it_looks_at_each_evaluation(tmp_path, caplog):
    """Once, where there are several sets; where there is none it says so."""
    sets = {"one": make_pairs(3), "two": make_pairs(2)}
    for options, steps in (({"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": sets}, [1, 2]), ({}, [])):
        trainer = make_trainer(tmp_path, max_steps=2, **options)
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        trainer.add_callback(WinRateCallback(trainer, prompts, letters, max_new_tokens=4))
        if steps:
            trainer.evaluate()
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "eval_win_rate" in entry] == steps
        assert ("looks at each evaluation, and there is none" in caplog.text) == (not steps)


def test_prompts_that_do_not_fit_are_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, make_model(max_sequence_length=32))
    with pytest.raises(ValueError, match="do not fit"):
        WinRateCallback(trainer, ["one " * 30], letters, max_new_tokens=8)
    for wrong in ({"freq": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be at least 1, got 0"):
            WinRateCallback(trainer, PROMPTS, letters, **wrong)

    def fails(completions, **kwargs):
        raise KeyError("key")

    trainer.add_callback(WinRateCallback(trainer, PROMPTS, fails, freq=1, max_new_tokens=4))
    with pytest.raises(RuntimeError, match="`fails` raised KeyError.*go on from the last checkpoint"):
        trainer.train()


def test_trl_logs_completions_by_the_samplers_arguments(tmp_path):
    """An adapter on checkpointed layers, as by default: the answers are the sampler's, and training is as without."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = make_pairs(3).map(lambda row: {name: [{"role": role, "content": row[name]}] for name, role in roles.items()})
    options = {"max_steps": 2, "gradient_checkpointing": True, "peft_config": LoraConfig(r=4)}
    sampler, runs = {"max_new_tokens": 6, "block_length": 3, "remasking": "entropy"}, []
    for is_watched in (False, True):
        trainer = make_trainer(tmp_path, dataset=rows, eval_dataset=rows.select(range(2)), **options)
        if is_watched:
            callback = LogCompletionsCallback(trainer, GenerationConfig(**sampler), freq=1)
            trainer.add_callback(callback)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == runs[1]
    assert [step for step, _, _ in callback.table] == ["1", "1", "2", "2"]
    for _, prompt, answer in callback.table[2:]:
        ids = make_tokenizer()([prompt], return_tensors="pt").input_ids
        expected = trainer.model.generate(input_ids=ids, **sampler)[0, ids.shape[1] :]
        assert answer == make_tokenizer().decode(expected, skip_special_tokens=True)
