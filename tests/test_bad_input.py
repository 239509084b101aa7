"""
Bad input gets an error that names the option, the value, the rule and the cure, or is dropped and counted; before any
training step.
"""

import dataclasses
import logging

import pytest
import torch
from accelerate import ParallelismConfig, cpu_offload
from accelerate.utils import TorchDynamoPlugin
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_families import make_scaled
from test_trainers import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_diffusion import DiffusionSFTConfig, DiffusionVRPOConfig, DiffusionVRPOTrainer, ELBOKTOConfig
from trl_diffusion.checks.inputs import check_same_vocabulary
from trl_diffusion.checks.options import REFUSED


def with_row(**row):
    """Usable rows and a bad one."""
    bad = {"prompt": "what is one ", "chosen": "two", "rejected": "three", **row}
    return Dataset.from_list([*make_pairs(3).to_list(), bad])


DROPPED = [
    ({"chosen": ""}, {}, "no token besides the end of the turn"),
    ({"rejected": "<|eot_id|>"}, {}, "no token besides the end of the turn"),
    ({"rejected": "one " * 40}, {}, "prompt and completion exceed `max_length`"),
    ({"prompt": "one " * 40}, {}, "the prompt alone fills `max_length`"),
    ({"chosen": "one <|mdm_mask|> two"}, {}, "contains the mask token"),
    ({"prompt": "what is <|mdm_mask|> "}, {}, "contains the mask token"),
    ({"prompt": ""}, {}, "starts at position 0"),
]


@pytest.mark.parametrize("row, options, reason", DROPPED)
def test_rows_that_cannot_be_scored_are_dropped_and_counted(tmp_path, caplog, row, options, reason):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=with_row(**row), max_length=32, **options)
    assert len(trainer.train_dataset) == 3
    (message,) = [record.getMessage() for record in caplog.records if "Dropped" in record.getMessage()]
    assert "Dropped 1 of 4 rows of the train dataset: 1 because" in message and reason in message


def test_rows_of_a_stream_are_dropped_with_a_warning(tmp_path, caplog):
    rows = with_row(chosen="")
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=stream, max_steps=1)
        assert len(list(trainer.train_dataset)) == 3
    assert any("no token besides" in record.getMessage() for record in caplog.records)


def test_a_dataset_with_no_usable_row(tmp_path):
    with pytest.raises(ValueError, match="No row of the train dataset can be used: 6 because .*raise it"):
        make_trainer(tmp_path, max_length=3)


def test_an_evaluation_set_called_train_does_not_stand_for_the_training_set(tmp_path):
    with pytest.raises(ValueError, match="The train dataset has columns .'chosen', 'prompt'.. It needs"):
        make_trainer(tmp_path, dataset=make_pairs().remove_columns("rejected"), eval_dataset={"train": make_pairs()})


def test_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        make_trainer(tmp_path, dataset=make_pairs(1).select([]))


def test_reference_columns_of_another_run(tmp_path):
    dataset = make_pairs().add_column("ref_chosen_logps", [0.0] * 6)
    with pytest.raises(ValueError, match=r"columns \['ref_chosen_logps'\].*precompute_ref_log_probs=True"):
        make_trainer(tmp_path, dataset=dataset)


OPTIONS = [
    ({"num_mc_samples": 0}, "`num_mc_samples` must be an integer of at least 1, got 0"),
    ({"mask_scheme": "gaussian"}, "`mask_scheme` must be one of .*'fixed_count'.*, got 'gaussian'"),
    ({"draws_per_forward": 0}, "`draws_per_forward` must be None or an integer of at least 1, got 0"),
    ({"adapter_dtype": "int8"}, "`adapter_dtype` must be one of .*'bfloat16'.*, got 'int8'"),
    ({"use_weighting": True}, "`use_weighting=True` is not supported.*WPO.*Leave `use_weighting` at its default"),
    ({"ld_alpha": 0.5}, "`ld_alpha=0.5` is not supported.*LD-DPO"),
    ({"padding_free": True}, "`padding_free=True` is not supported.*exact length"),
    ({"truncation_mode": "keep_end"}, "`truncation_mode='keep_end'` is not supported.*never truncated"),
    ({"activation_offloading": True}, "`activation_offloading=True` is not supported"),
    # Of another type
    ({"num_mc_samples": 2.5}, r"`num_mc_samples` must be an integer, got 2.5 \(float\)"),
    ({"num_mc_samples": "8"}, r"`num_mc_samples` must be an integer, got '8' \(str\)"),
    ({"num_mc_samples": True}, r"`num_mc_samples` must be an integer, got True \(bool\)"),
    ({"draws_per_forward": 1.5}, "`draws_per_forward` must be an integer or None, got 1.5"),
    ({"stratify": "no"}, r"`stratify` must be True or False, got 'no' \(str\)"),
    ({"share_draws": "False"}, "`share_draws` must be True or False, got 'False'"),
    ({"append_eos": 1}, "`append_eos` must be True or False, got 1"),
    ({"draw_seed": 1.5}, "`draw_seed` must be an integer or None, got 1.5"),
    ({"draw_seed": "1"}, "`draw_seed` must be an integer or None, got '1'"),
    ({"mask_scheme": None}, "`mask_scheme` must be a text, got None"),
    ({"level_concentration": "arcsine"}, "`level_concentration` must be a number or None, got 'arcsine'"),
    ({"level_concentration": 0}, r"`level_concentration` must be None or a number in \(0, 1\].*, got 0"),
    ({"level_concentration": 1.5}, r"`level_concentration` must be None or a number in \(0, 1\].*, got 1.5"),
    (
        {"level_concentration": 0.5, "mask_scheme": "bernoulli"},
        "`level_concentration=0.5` is a law of the number .* or leave `level_concentration` out",
    ),
    ({"beta": "0.1"}, "`beta` must be a finite number above 0, got '0.1'"),
    # Out of range
    ({"num_mc_samples": -1}, "`num_mc_samples` must be an integer of at least 1, got -1"),
    ({"draws_per_forward": -3}, "`draws_per_forward` must be None or an integer of at least 1, got -3"),
    ({"draw_seed": 2**70}, "`draw_seed` must be None or an integer of 64 bits, got"),
    ({"seed": -1}, r"`seed` must be an integer in \[0, 2\*\*32\)"),
    ({"beta": 0.0}, "`beta` must be a finite number above 0, got 0.0"),
    ({"beta": -0.1}, "`beta` must be a finite number above 0, got -0.1"),
    ({"beta": float("nan")}, "`beta` must be a finite number above 0, got nan"),
    ({"learning_rate": float("inf")}, "`learning_rate` must be a finite number, got inf"),
    ({"learning_rate": -1.0}, "`learning_rate` must be a finite number of at least 0, got -1.0"),
    ({"max_grad_norm": float("nan")}, "`max_grad_norm` must be None or a finite number"),
    ({"max_length": 1}, "`max_length` must be None or an integer of at least 2, .*got 1"),
    ({"max_length": -4}, "`max_length` must be None or an integer of at least 2, .*got -4"),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be an integer of at least 1, got 0"),
    ({"per_device_eval_batch_size": -8}, "`per_device_eval_batch_size` must be an integer of at least 1, got -8"),
    ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be an integer of at least 1, got 0"),
    ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be None or an integer of at least 1, got 0"),
    ({"label_smoothing": 0.6}, r"`label_smoothing` must be in \[0, 0.5\), .*got 0.6"),
    # Not among what there is
    ({"loss_type": "sgmoid"}, r"`loss_type` must be among \['sigmoid', .*got 'sgmoid'"),
    ({"loss_type": []}, r"`loss_type` must be among .*got \[\]"),
    ({"loss_type": ["sigmoid", "kto"]}, r"`loss_type` must be among .*got \['sigmoid', 'kto'\]"),
    (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "`loss_weights` must have the same length",
    ),
    ({"loss_weights": [float("nan")]}, "`loss_weights` must be finite numbers and not all 0"),
    ({"loss_weights": [0.0]}, "`loss_weights` must be finite numbers and not all 0"),
    ({"f_divergence_type": "forward"}, "`f_divergence_type` must be one of .*'forward_kl'.*got 'forward'"),
    ({"elbo_gradient": "exact"}, "`elbo_gradient` must be one of .*got 'exact'"),
    # That do not go together
    ({"label_smoothing": 0.1}, r"`label_smoothing=0.1` is read by .*'robust'.*`loss_type=\['sigmoid'\]`.*leave"),
    (
        {"label_smoothing_factor": 0.1},
        "`label_smoothing_factor=0.1` is not supported.*would be ignored",
    ),
    ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha=5.0` is not supported.*noise of its own, and so would"),
    ({"fp16": True, "elbo_gradient": "immediate"}, "`elbo_gradient='immediate'` cannot be used with `fp16=True`"),
    (
        {"train_sampling_strategy": "group_by_length"},
        "must be 'random' or 'sequential' .grouping by length",
    ),
    ({"train_sampling_strategy": "shuffled"}, "`train_sampling_strategy` must be 'random' or 'sequential'"),
    ({"torch_compile": True}, "`torch_compile=True` is not supported.*every response runs at its own length"),
    ({"torch_compile_backend": "inductor"}, "`torch_compile_backend='inductor'` is not supported"),
    # Any other number
    ({"weight_decay": float("nan")}, "`weight_decay` must be a finite number, got nan"),
    ({"ref_model_mixup_alpha": float("inf")}, "`ref_model_mixup_alpha` must be a finite number, got inf"),
]


@pytest.mark.parametrize(
    "options, message",
    OPTIONS,
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options_without_meaning(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize("config", [DiffusionVRPOConfig, ELBOKTOConfig])
def test_a_launcher_that_compiles_the_model(tmp_path, monkeypatch, config):
    """`accelerate launch --dynamo_backend inductor` sets this, and nothing in the arguments."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert TorchDynamoPlugin().backend.value == "INDUCTOR"  # where accelerate looks
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND='INDUCTOR' has the model compiled.*Leave"):
        config(str(tmp_path), bf16=False, use_cpu=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as without the option
    config(str(tmp_path), bf16=False, use_cpu=True)


LAUNCHES = [
    ({"ACCELERATE_USE_FSDP": "true"}, {}, "`fsdp_version: 2` in the `fsdp_config` of `accelerate launch`"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1 hands out views"),
    ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1 hands out views"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "`distributed_type: MEGATRON_LM`"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "`cp_size=2` is not supp"),
    ({}, {"parallelism_config": ParallelismConfig(tp_size=2)}, "`tp_size=2` is not supported: the layers are cut up"),
    ({}, {"parallelism_config": ParallelismConfig(sp_size=2)}, "`sp_size=2` is not supported: a row is cut up"),
]


@pytest.mark.filterwarnings("ignore:.*FSDP1")
@pytest.mark.parametrize("variables, options, message", LAUNCHES)
def test_ways_to_launch_that_split_what_a_score_needs(tmp_path, monkeypatch, variables, options, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it, for good
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize(
    "variables, options",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {}),
    ],
)
def test_ways_to_launch_that_are_let_through(tmp_path, monkeypatch, variables, options):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize("config", [DiffusionVRPOConfig, ELBOKTOConfig])
def test_a_device_without_float64(tmp_path, monkeypatch, config):
    monkeypatch.setattr(config, "device", torch.device("mps"))
    with pytest.raises(ValueError, match="float64, which Apple's GPUs .MPS. do not have. Set `use_cpu=True, bf16=Fals"):
        config(str(tmp_path), bf16=False)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_compiled_model(tmp_path, name):
    compiled = make_model()
    compiled._compiled_call_impl = compiled._call_impl  # as `compile()` sets it; it takes seconds
    with pytest.raises(ValueError, match=f"`{name}` was compiled"):
        make_trainer(tmp_path, **{"model": make_model(), name: compiled})


def offloaded():
    cpu_offload(model := make_model(), torch.device("cpu"))
    return model


def never_loaded():
    with torch.device("meta"):
        return make_model()


@pytest.mark.parametrize("make", [offloaded, never_loaded])
@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_weights_that_are_elsewhere(tmp_path, make, name):
    with pytest.raises(ValueError, match=f"`{name}` has 21 weights on the meta device, `model.transformer.wte.weight"):
        make_trainer(tmp_path, **{"model": make_model(), name: make()})


def test_weights_that_a_device_map_has_left_to_the_disk(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    parts = ("wte", "blocks.0", "blocks.1", "ln_f", "ff_out")
    where = {f"model.transformer.{part}": "disk" if part == "blocks.1" else "cpu" for part in parts}
    with pytest.raises(ValueError, match="`model` has 9 weights on the meta device, `model.transformer.blocks.1"):
        make_trainer(
            tmp_path,
            str(tmp_path / "model"),
            model_init_kwargs={"device_map": where, "offload_folder": str(tmp_path / "rest")},
            peft_config=LoraConfig(r=4),
        )


OF_SFT = {"packing", "eval_packing", "packing_strategy", "assistant_only_loss", "dataset_kwargs"}


@pytest.mark.parametrize(
    "config, absent",
    [
        (DiffusionVRPOConfig, OF_SFT),
        (ELBOKTOConfig, {"use_weighting", "ld_alpha", "padding_free", "truncation_mode", *OF_SFT}),
        (DiffusionSFTConfig, {"use_weighting", "ld_alpha"}),
    ],
)
def test_what_is_refused_is_an_option_of_trl(config, absent):
    """A row of the table that names no option would refuse nothing."""
    assert {*REFUSED} - {field.name for field in dataclasses.fields(config)} == absent


def test_another_configuration_class(tmp_path):
    from trl import DPOConfig

    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(TypeError, match="`args` must be a `DiffusionVRPOConfig`, got `DPOConfig`"):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make_pairs(), processing_class=make_tokenizer())


def llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes, **config))


MODELS = [
    (llama, "Neither the model .model_type='llama'. nor the tokenizer has a mask token"),
    (lambda: llama(mask_token_id=2), "attends causally.*is_causal = False"),
    (lambda: llama(mask_token_id=99), "outside the model's vocabulary of 30"),
    (make_scaled, "not its output head applied to the last hidden state"),
]


@pytest.mark.parametrize("make, message", MODELS)
def test_models_that_are_not_masked_diffusion_models(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make())


def test_such_a_model_is_refused_from_a_folder_too(tmp_path):
    llama(mask_token_id=2).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="attends causally"):
        make_trainer(tmp_path, str(tmp_path / "model"))


def test_a_bidirectional_llama_is_accepted(tmp_path):
    trainer = make_trainer(tmp_path, llama(mask_token_id=2, is_causal=False), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_padding_that_is_the_mask(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|mdm_mask|>"
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"padding token and the mask token are the same \(2\)"):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make_pairs(), processing_class=tokenizer)


def test_tokenizer_of_another_model(tmp_path):
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    tokenizer = make_tokenizer(with_mask=True)
    with pytest.raises(ValueError, match="The model's mask token is 5 and the tokenizer's is 2"):
        DiffusionVRPOTrainer(
            make_model(mask_token_id=5), args=args, train_dataset=make_pairs(), processing_class=tokenizer
        )


def test_a_reference_that_is_not_a_masked_diffusion_model(tmp_path):
    with pytest.raises(ValueError, match="attends causally"):
        make_trainer(tmp_path, llama(mask_token_id=2, is_causal=False), ref_model=llama(mask_token_id=2))


def test_a_reference_with_another_mask_token(tmp_path):
    """Its tokenizer, which has another that is called mask, finds it first."""
    with pytest.raises(ValueError, match="mask token is 5, which is .*eot_id.* the tokenizer has .*mdm_mask"):
        make_trainer(tmp_path, make_model(), ref_model=make_model(mask_token_id=5))
    with pytest.raises(ValueError, match="mask token of the model is 2, and its reference has 5"):
        check_same_vocabulary(make_model().config, make_model(mask_token_id=5).config, None)


def test_a_tokenizer_without_end_of_text(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="has no end of text.*`tokenizer.eos_token`"):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make_pairs(), processing_class=tokenizer)


def test_compute_metrics(tmp_path):
    args = DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="`compute_metrics` would be given the logits of the text without masks"):
        DiffusionVRPOTrainer(make_model(), args=args, train_dataset=make_pairs(), compute_metrics=lambda _: {})


# Adapters


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(tmp_path, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=f"`{kind.__name__}` puts virtual tokens before the prompt"):
        make_trainer(tmp_path, peft_config=config)


def test_a_string_is_a_pattern_for_the_whole_name(tmp_path):
    """PEFT's rule; it then finds no layer, and says so after our warning."""
    with pytest.warns(UserWarning, match="'q_proj' matches no layer"), pytest.raises(ValueError, match="not found"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules="q_proj"))


@pytest.mark.parametrize("targets", [["q_proj", "ff_out"], ["ff_out"], r".*(q_proj|ff_out)"])
def test_adapter_on_the_output_head(tmp_path, targets):
    with pytest.raises(ValueError, match="also match the output head `model.transformer.ff_out`.*unset"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=targets))


def test_adapter_on_the_output_head_of_a_wrapped_model(tmp_path):
    """TRL's own refusal, for which the name of the head is that of Llama."""
    wrapped = get_peft_model(make_model(), LoraConfig(target_modules=["ff_out"]))
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_trainer(tmp_path, wrapped)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "PiSSA", "olora"])
def test_an_adapter_that_changes_its_base_model_leaves_no_reference(tmp_path, init):
    with pytest.raises(ValueError, match=f"`init_lora_weights='{init}'` changes the weights of the base model.*ref_mo"):
        make_trainer(tmp_path, peft_config=LoraConfig(init_lora_weights=init))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_such_an_adapter_made_beforehand_has_a_reference(tmp_path, init):
    wrapped = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    trainer = make_trainer(tmp_path, wrapped, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == torch.tensor(2.0).log().item()


def test_biases_that_the_reference_has_too(tmp_path):
    with pytest.raises(ValueError, match="`bias='all'` of 'peft_config' trains biases of the base model"):
        make_trainer(tmp_path, peft_config=LoraConfig(bias="all"))
    wrapped = get_peft_model(make_model(), LoraConfig(bias="all", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`bias='all'` of 'default'"):
        make_trainer(tmp_path, wrapped)


def test_a_model_with_the_reference_of_another_trainer(tmp_path):
    wrapped = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    make_trainer(tmp_path, wrapped)
    with pytest.raises(ValueError, match=r"has an adapter 'ref'.*`model.delete_adapter\('ref'\)`"):
        make_trainer(tmp_path, wrapped)
    wrapped.delete_adapter("ref")
    make_trainer(tmp_path, wrapped)


def test_an_adapter_that_was_loaded_for_inference(tmp_path):
    """And the cure that the error names."""
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="No weight of the `PeftModel.*requires a gradient.*`is_trainable=True`"):
        make_trainer(tmp_path, PeftModel.from_pretrained(make_model(), tmp_path / "adapter")).train()
    injected = make_model()
    injected.load_adapter(str(tmp_path / "adapter"))  # transformers' own way
    with pytest.raises(
        ValueError, match=r"transformers put into its layers .*from_pretrained\(base_model, path, is_tr"
    ):
        make_trainer(tmp_path, injected)
    cured = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(tmp_path, cured, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["loss"] != trainer.state.log_history[0]["loss"]


def test_names_that_match_nothing_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="'gate_proj' matches no layer of this model"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj", "gate_proj"]))


def test_names_that_match_some_blocks_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="'blocks.0.q_proj' matches 1 of 2 blocks only"):
        make_trainer(tmp_path, peft_config=LoraConfig(target_modules=["blocks.0.q_proj"]))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_targets_are_all_block_linears_and_not_the_head(tmp_path, targets):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(target_modules=targets))
    adapted = {name.split(".lora_A")[0] for name, _ in trainer.model.named_parameters() if "lora_A" in name}
    linears = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert adapted == {
        f"base_model.model.model.transformer.blocks.{block}.{name}" for block in range(2) for name in linears
    }


# Numbers


def test_logits_that_are_not_finite(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[9] = torch.nan
    with pytest.raises(ValueError, match=r"log-probability of a masked token is nan \(row .*position .*draw "):
        make_trainer(tmp_path, model)
