"""Where training starts: at its reference, whatever is trained, whatever the reference is, in the run's precision."""

import logging
import re

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from starts import (
    ADAPTERS,
    CHANGING_AT_ONCE,
    METHODS,
    POLICIES,
    PRECISIONS,
    REFERENCES,
    TARGETS,
    adapter_on_disk,
    first_loss,
    on_disk,
    ready_made,
    refusal,
    start,
)
from test_trainers import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer
from trl_diffusion.scoring.precision import share_of_lost_updates
from trl_diffusion.trainers import start as starting
from trl_diffusion.trainers.loading import find_model, load_model, put_adapter

# The table


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "method, precision",
    [("VRPO", "bf16, layer checkpointing"), ("VRPO", "float32"), ("ELBO-KTO", "bf16, layer checkpointing")],
)
def test_a_run_starts_at_its_reference(tmp_path, method, policy, reference, precision):
    if refusal(policy, reference):
        with pytest.raises(NotImplementedError, match=refusal(policy, reference)):
            start(tmp_path, method, policy, reference, precision)
        return
    assert first_loss(start(tmp_path, method, policy, reference, precision)) == METHODS[method][2]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of every layer norm that is not torch's
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_trained_adapter_is_its_own_reference(tmp_path, adapter):
    model = ready_made(adapter)
    before = logits(model)
    trainer = make_trainer(tmp_path, model, max_steps=1, **PRECISIONS["bf16, layer checkpointing"])
    assert torch.equal(logits(model), before)  # of the policy: making the reference has changed nothing of it
    assert first_loss(trainer) == METHODS["VRPO"][2]
    with model.disable_adapter():
        assert not torch.allclose(logits(model), before, atol=0.1)  # the reference is not the base model


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_adapter_that_is_made_here(tmp_path, adapter, precision):
    """Without an effect it starts at the base model, but for rounding (HRA); with one it is refused."""
    options = {"peft_config": ADAPTERS[adapter](), **PRECISIONS[precision]}
    if adapter in CHANGING_AT_ONCE and not (adapter == "VB-LoRA" and options["bf16"]):  # of the size of rounding there
        with pytest.raises(ValueError, match="start at its reference|changes the weights of the base model"):
            make_trainer(tmp_path, **options)
        return
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    assert first_loss(trainer) == pytest.approx(METHODS["VRPO"][2], abs=1e-6 if precision == "float32" else 0.02)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 2, 9, 11, 2, 10, 7]])).logits


# What the check finds, and names


def test_an_adapter_that_does_something_at_once(tmp_path):
    config = LoraConfig(r=4, target_modules=["blocks.1.v_proj", "blocks.1.up_proj"], init_lora_weights=False)
    named = r"changes the output of `model.transformer.blocks.1.v_proj`.*for LoRA `init_lora_weights=True`"
    with pytest.warns(UserWarning, match="1 of 2 blocks"), pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, peft_config=config)
    # Its cures
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    assert first_loss(make_trainer(tmp_path, get_peft_model(make_model(), config), max_steps=1)) == METHODS["VRPO"][2]
    config.init_lora_weights = True
    assert first_loss(make_trainer(tmp_path, peft_config=config, max_steps=1)) == METHODS["VRPO"][2]


@pytest.mark.parametrize("precompute", [False, True])
def test_a_reference_that_is_another_model(tmp_path, monkeypatch, precompute):
    """As a fault of ours or of a library would make it."""
    score = starting._score

    def moved(trainer, model, inputs):
        trainer.model.get_submodule("model.transformer.blocks.1.ff_out").weight.data += 0.01
        return score(trainer, model, inputs)

    monkeypatch.setattr(starting, "_score", moved)
    message = (
        "remove the files" if precompute else r"differs is `model.transformer.blocks.1.ff_out`.*Pass a `ref_model`"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, precompute_ref_log_probs=precompute)


def test_nothing_is_asked_of_a_reference_that_was_given(tmp_path):
    trainer = make_trainer(tmp_path, make_model(seed=1), ref_model=make_model(seed=2), max_steps=1)
    assert first_loss(trainer) != METHODS["VRPO"][2]


def test_weights_that_are_placed_later_are_checked_when_training_begins(tmp_path):
    trainer = make_trainer(tmp_path)
    check = starting.StartCheck(trainer)
    check.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.model.model.transformer["ln_f"].weight.data += 0.1
    with pytest.raises(ValueError, match=r"differs is `model.transformer.ln_f`"):
        check.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.state.global_step = 1  # resumed: the policy has left its reference
    check.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_the_check_leaves_the_trainer_as_it_was(tmp_path):
    model = make_model()
    model.model.transformer["blocks"][1].train()
    modes = [module.training for module in model.modules()]
    trainer = make_trainer(tmp_path, model)
    modes_after = [module.training for module in model.modules()]
    starting.check_start(trainer, trainer.model)
    assert modes_after == [module.training for module in model.modules()]
    assert True in modes and False in modes
    assert not any(trainer._metrics["train"].values()) and not any(trainer._metrics["eval"].values())


def test_weights_that_the_reference_shares_are_not_trained(tmp_path):
    model = ready_made("LoRA")
    norm = model.get_base_model().model.transformer["ln_f"]
    norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 trained weights are not the adapter's.*transformer.ln_f.weight` first"):
        make_trainer(tmp_path, model)
    # Its cures
    norm.weight.requires_grad_(False)
    assert first_loss(make_trainer(tmp_path, model, max_steps=1)) == METHODS["VRPO"][2]
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["ln_f"])
    assert first_loss(make_trainer(tmp_path, peft_config=config, max_steps=1)) == METHODS["VRPO"][2]
    model, reference = ready_made("LoRA"), ready_made("LoRA")
    model.get_base_model().model.transformer["ln_f"].weight.requires_grad_(True)
    assert first_loss(make_trainer(tmp_path, model, ref_model=reference, max_steps=1)) == METHODS["VRPO"][2]


def test_the_cures_of_a_reference_that_would_move_or_be_another(tmp_path):
    for change, cure in (({"bias": "all"}, {"bias": "none"}), ({"init_lora_weights": "pissa"}, {})):
        config = LoraConfig(r=4, target_modules=TARGETS, **change)
        with pytest.raises(ValueError, match="pass a `ref_model`"):
            make_trainer(tmp_path, peft_config=config)
        trainer = make_trainer(tmp_path, peft_config=config, ref_model=make_model(), max_steps=1)
        assert first_loss(trainer) == pytest.approx(METHODS["VRPO"][2], abs=1e-5)  # PiSSA is the model up to rounding
        config = LoraConfig(r=4, target_modules=TARGETS, **cure)
        assert first_loss(make_trainer(tmp_path, peft_config=config, max_steps=1)) == METHODS["VRPO"][2]


def test_a_frozen_model_is_freed_by_the_cure(tmp_path):
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match=re.escape("Call `model.requires_grad_(True)` before")):
        make_trainer(tmp_path, model).train()
    assert first_loss(make_trainer(tmp_path, model.requires_grad_(True), max_steps=1)) == METHODS["VRPO"][2]


# Names of adapters


def test_an_adapter_of_another_name(tmp_path):
    model = get_peft_model(make_model(), ADAPTERS["LoRA on the embedding"](), adapter_name="sft")
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    trainer = make_trainer(tmp_path, model, max_steps=1)
    assert first_loss(trainer) == METHODS["VRPO"][2]
    assert list(model.peft_config) == ["sft", "ref"] and list(model.active_adapters) == ["sft"]
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(make_model(), tmp_path / "saved" / "sft")
    assert torch.equal(logits(again), logits(model))


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    """transformers looks for the one called "default"."""
    model = get_peft_model(make_model(), ADAPTERS["LoRA"](), adapter_name="sft")
    saved = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
    trainer = make_trainer(tmp_path, model, max_steps=2, eval_dataset=make_pairs(4), **saved, **best)
    trainer.train()
    first, second = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == first != second


def test_a_second_adapter_named_default(tmp_path):
    model = ready_made("LoRA")
    model.add_adapter("other", ADAPTERS["LoRA"]())
    model.set_adapter("other")
    with pytest.raises(ValueError, match="active adapter is 'other', and there is one named 'default'"):
        make_trainer(tmp_path, model)
    model.set_adapter("default")
    assert first_loss(make_trainer(tmp_path, model, max_steps=1)) == METHODS["VRPO"][2]
    model.delete_adapter("ref")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert first_loss(make_trainer(tmp_path, model, max_steps=1)) == METHODS["VRPO"][2]


def test_several_active_adapters(tmp_path):
    model = ready_made("LoRA")
    model.add_adapter("other", ADAPTERS["LoRA"]())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\], and one is trained"):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize("adapter", ["LoRA, head saved", "LoRA, tokens", "IA3"])
def test_a_trainer_that_failed_leaves_no_copy(tmp_path, adapter):
    model = ready_made(adapter)
    before = logits(model)
    with pytest.raises(ValueError, match="No row of the train dataset can be used"):
        make_trainer(tmp_path, model, max_length=3)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)
    make_trainer(tmp_path, model)


def test_the_copy_of_a_trainer_before_is_named(tmp_path):
    model = ready_made("LoRA")
    make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=re.escape("model.delete_adapter('ref')")):
        make_trainer(tmp_path, model)
    model.delete_adapter("ref")
    assert first_loss(make_trainer(tmp_path, model, max_steps=1)) == METHODS["VRPO"][2]


def test_a_constructor_that_fails_leaves_the_model_its_own(tmp_path):
    model = ready_made("LoRA")
    with pytest.raises(NotImplementedError):
        make_trainer(tmp_path, model, sync_ref_model=True)
    assert "add_adapter" not in vars(model)


# Targets


def test_only_adapters_of_linear_layers_get_the_familys(tmp_path):
    for kind, layers in ((LNTuningConfig, r"its norms are \['attn_norm', 'ff_norm'\]"), (IA3Config, "feed forward")):
        with pytest.raises(ValueError, match=f"`{kind.__name__}` has no `target_modules`.*{layers}"):
            make_trainer(tmp_path, peft_config=kind())
    trained = {name for name, p in make_trainer(tmp_path, peft_config=VeraConfig(r=4)).model.named_parameters()}
    assert sum(".vera_lambda_b" in name for name in trained) == 14


def test_adapters_that_are_made_before_the_trainer_have_the_same_targets(tmp_path):
    """PEFT's own tables know the family."""
    before = get_peft_model(make_model(), LoraConfig(r=4))
    inside = make_trainer(tmp_path, peft_config=LoraConfig(r=4)).model
    assert [n for n, _ in before.named_parameters()] == [n for n, _ in inside.named_parameters()]


def test_layers_that_are_there_once_are_not_warned_of(tmp_path):
    make_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=[*TARGETS, "wte"]))  # warnings are errors


@pytest.mark.parametrize("where", [{"target_modules": [*TARGETS, "wte"]}, {"modules_to_save": ["wte"]}], ids=str)
def test_an_adapter_on_the_embedding_alone_of_a_tied_head(where, tmp_path):
    """Merged, it would be another model. With a head of its own, and where the adapter is elsewhere, it is none."""
    lora = {"r": 4, "target_modules": TARGETS, **where}
    for model, config in [
        (make_model(weight_tying=True), LoraConfig(**lora)),
        (get_peft_model(make_model(weight_tying=True), LoraConfig(**lora)), None),
    ]:
        with pytest.raises(ValueError, match="on the embedding `.*wte`, whose weight is the output head's too"):
            make_trainer(tmp_path, model=model, peft_config=config)
    make_trainer(tmp_path, model=make_model(weight_tying=True), peft_config=LoraConfig(r=4, target_modules=TARGETS))


# Paths


def by_path(folder, model, peft_config=None, with_tokenizer=True, dataset=None, **options):
    settings = {
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return DiffusionVRPOTrainer(
        str(model),
        args=DiffusionVRPOConfig(str(folder / "out"), **{**settings, "disable_tqdm": True, **options}),
        train_dataset=make_pairs(3) if dataset is None else dataset,
        peft_config=peft_config,
    )


def test_an_adapter_folder_is_trained_on(tmp_path):
    folder = adapter_on_disk(tmp_path)
    trainer = by_path(tmp_path, folder, learning_rate=0.1, max_steps=2)
    model, reference = trainer.model, ready_made("LoRA on the embedding")
    assert torch.equal(logits(model), logits(reference))
    assert trainer._tokenizer.get_vocab() == make_tokenizer().get_vocab()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == METHODS["VRPO"][2] > trainer.state.log_history[1]["loss"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("default" in name for name in trained)
    # And what it has written is trained on
    trainer.save_model()
    again = by_path(tmp_path, tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model)) and not torch.equal(logits(model), logits(reference))
    assert first_loss(again) == METHODS["VRPO"][2]


def test_the_output_of_full_training_is_trained_on(tmp_path):
    trainer = by_path(tmp_path, on_disk(make_model(), tmp_path / "model"), learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    again = by_path(tmp_path, tmp_path / "out")
    assert torch.equal(logits(again.model), logits(trainer.model))
    assert first_loss(again) == METHODS["VRPO"][2]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4)])
def test_a_model_in_a_subfolder(tmp_path, peft_config):
    on_disk(make_model(seed=3), tmp_path / "model" / "inner")
    trainer = by_path(tmp_path, tmp_path / "model", peft_config, model_init_kwargs={"subfolder": "inner"})
    assert torch.equal(logits(trainer.model), logits(make_model(seed=3)))
    assert first_loss(trainer) == METHODS["VRPO"][2]


def test_an_adapter_says_of_which_revision_its_base_is(tmp_path):
    """With which the base is loaded, wherever the adapter is used."""
    path = on_disk(make_model(), tmp_path / "model")
    trainer = by_path(tmp_path, path, LoraConfig(r=4), model_init_kwargs={"revision": "of-may"})
    trainer.save_model()
    source = find_model(str(tmp_path / "out"), {})
    assert (source.base, source.base_finding) == (path, {"revision": "of-may"})


def test_a_model_of_transformers_in_a_subfolder(tmp_path):
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    config.mask_token_id, config.is_causal = 2, False
    on_disk(LlamaForCausalLM(config), tmp_path / "model" / "inner")
    trainer = by_path(tmp_path, tmp_path / "model", model_init_kwargs={"subfolder": "inner"})
    assert type(trainer.model) is LlamaForCausalLM and first_loss(trainer) == METHODS["VRPO"][2]


def test_an_adapter_whose_base_cannot_be_found(tmp_path):
    model = ready_made("LoRA")
    on_disk(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"does not say what its base model is.*is_trainable=True"):
        by_path(tmp_path, tmp_path / "none")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "moved")
    with pytest.warns(UserWarning, match="Could not find a config file"):
        on_disk(model, tmp_path / "lost")
    with pytest.raises(OSError, match=r"is an adapter, and its base model '.*moved' could not be loaded"):
        by_path(tmp_path, tmp_path / "lost")
    # The cure of both
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "none"), is_trainable=True)
    assert first_loss(make_trainer(tmp_path, loaded, max_steps=1)) == METHODS["VRPO"][2]


def test_code_of_others_is_not_run_without_being_asked_for(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "unheard_of", "auto_map": {"AutoConfig": "theirs.TheirConfig"}, "architectures": ["Theirs"]}'
    )
    (folder / "theirs.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass TheirConfig(PreTrainedConfig):\n"
        '    model_type = "unheard_of"\n    mask_token_id = 2\n    vocab_size = 40\n'
    )
    with pytest.raises(OSError, match="set `trust_remote_code=True` in the trainer's arguments"):
        by_path(tmp_path, folder)
    # The cure: its code is run, and gets as far as there is anything
    with pytest.raises(OSError, match="has no tokenizer"):
        by_path(tmp_path, folder, trust_remote_code=True)


def test_an_adapter_and_another_one(tmp_path):
    with pytest.raises(ValueError, match=r"`peft_config` \(`--use_peft`\) is for a new one.*`trl-diffusion merge`"):
        by_path(tmp_path, adapter_on_disk(tmp_path), LoraConfig(r=4))


def test_an_adapter_is_not_saved_into_its_base_model(tmp_path):
    base = on_disk(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="is the folder of the model that the adapter is for"):
        by_path(tmp_path, base, LoraConfig(r=4))


def test_an_adapter_of_another_model(tmp_path):
    """PEFT warns of what it lacks, and leaves the model without it."""
    folder, other = adapter_on_disk(tmp_path), on_disk(make_model(n_layers=3), tmp_path / "three")
    for model, path, message in (
        (find_model(str(other), {}), str(folder), "is not of this model, a `LLaDAModelLM`: Found missing adapter keys"),
        (find_model(str(folder), {}), str(folder), "is to be put on a model that is an adapter itself"),
    ):
        with pytest.raises(ValueError, match=message):
            put_adapter(load_model(model, {"dtype": "float32"}), path)


# Half precision


def trained_in(dtype, kind):
    model = make_model(init_std=0.02)
    if kind == "modules to save":
        model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["wte"]))
    elif kind == "adapter":
        model = get_peft_model(model.to(dtype), LoraConfig(r=4), autocast_adapter_dtype=False)
    return model.to(dtype) if kind == "all weights" else model


@pytest.mark.parametrize("kind", ["all weights", "modules to save", "adapter"])
def test_steps_that_half_precision_loses_are_warned_of(tmp_path, caplog, kind):
    """The share is what a step of that size leaves in its place; the cure is tried."""
    model = trained_in(torch.bfloat16, kind)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        trainer = make_trainer(tmp_path, model, learning_rate=5e-6, bf16=True)
    (told,) = re.findall(r"`learning_rate=5e-06` is lost on (\d+)% of the trained weights", caplog.text)
    moved = [torch.stack([b + 5e-6 == b, b - 5e-6 == b]).all(0) for b in before]
    lost = sum(m.sum().item() for m in moved) / sum(m.numel() for m in moved)
    assert float(told) == pytest.approx(100 * lost, abs=0.51)
    assert lost > 0.5 or kind != "all weights"
    assert "`model.float()`" in caplog.text and "bfloat16" in caplog.text
    caplog.clear()
    if isinstance(model, PeftModel):
        model.delete_adapter("ref")
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        trainer = make_trainer(tmp_path, model.float(), learning_rate=5e-6, bf16=True)
    assert "is lost on" not in caplog.text
    assert share_of_lost_updates(trainer.model, 5e-6) == (0.0, "")


def test_the_readmes_adapter_on_bfloat16_weights_is_held_in_float32(tmp_path, caplog):
    path = on_disk(make_model(), tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        trainer = by_path(
            tmp_path, path, LoraConfig(r=16, lora_alpha=32), learning_rate=5e-6, model_init_kwargs={"dtype": "bfloat16"}
        )
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert "is lost on" not in caplog.text


def test_the_readmes_full_training_is_in_float32(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        trainer = by_path(tmp_path, on_disk(make_model().bfloat16(), tmp_path / "model"), learning_rate=5e-6)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "is lost on" not in caplog.text


def test_steps_that_are_large_enough_are_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_diffusion"):
        make_trainer(tmp_path, make_model(init_std=0.02).bfloat16(), learning_rate=0.1, bf16=True)
    assert "is lost on" not in caplog.text
