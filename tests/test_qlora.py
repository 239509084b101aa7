"""QLoRA through the trainer, on the CPU: what is quantised, what is not, and in which precision the rest is held."""

import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from peft import LoraConfig, get_peft_model
from test_trainers import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.slow

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
LN2 = torch.tensor(2.0).log().item()


@pytest.fixture
def checkpoint(tmp_path):
    model = make_model(d_model=64, mlp_hidden_size=128)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_precisions(tmp_path, checkpoint, adapter_dtype):
    trainer = make_trainer(
        tmp_path,
        checkpoint,
        quantization_config=NF4,
        peft_config=LoraConfig(r=4),
        dataset=make_pairs(3),  # the same rows in both steps
        adapter_dtype=adapter_dtype,
        max_steps=2,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        bf16=True,
    )
    base = trainer.model.get_base_model()
    weights = [type(m.weight).__name__ for name, m in base.named_modules() if name.endswith("base_layer")]
    assert weights == ["Params4bit"] * 7 * 2
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    assert base.get_output_embeddings().weight.dtype == torch.bfloat16
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {getattr(torch, adapter_dtype)}

    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == LN2 and first["rewards/margins"] == 0.0
    assert second["loss"] < LN2 and second["rewards/margins"] > 0


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precompute", [False, True])
def test_adapters_that_come_with_the_model_keep_their_values(tmp_path, checkpoint, adapter_dtype, precompute):
    """TRL rounds them to bfloat16, but not the reference made of them: the policy would differ from it at once."""
    wrapped = trained_adapter_on(checkpoint)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    trainer = make_trainer(
        tmp_path,
        wrapped,
        adapter_dtype=adapter_dtype,
        precompute_ref_log_probs=precompute,
        max_steps=1,
        learning_rate=0.0,
        bf16=True,
    )
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name].to(getattr(torch, adapter_dtype)))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == LN2


def test_an_adapter_folder_on_a_quantised_base_is_trained_on(tmp_path, checkpoint):
    wrapped = trained_adapter_on(checkpoint)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(tmp_path, str(tmp_path / "adapter"), quantization_config=NF4, max_steps=1, bf16=True)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in trained.items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == LN2


def trained_adapter_on(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NF4, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) / 7
    return wrapped


@pytest.mark.parametrize("before", ["evaluation", "precomputation"])
def test_scoring_before_training_leaves_the_gradient_whole(tmp_path, checkpoint, before):
    """On some CPUs bitsandbytes repacks 4-bit weights when a model is evaluated, and gradients would end there."""

    def gradients(precompute, evaluate):
        trainer = make_trainer(
            tmp_path,
            checkpoint,
            quantization_config=NF4,
            peft_config=LoraConfig(r=4),
            precompute_ref_log_probs=precompute,
            eval_dataset=make_pairs(2) if evaluate else None,
            bf16=True,
        )
        if evaluate:
            trainer.evaluate()
        trainer.model.train()
        trainer.state.global_step = -1  # the draws of the precomputed reference
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    plain = gradients(False, False)
    after = gradients(before == "precomputation", before == "evaluation")
    assert plain.keys() == after.keys() and all(g.abs().sum() > 0 for n, g in plain.items() if "lora_B" in n)
    for name in plain:  # bfloat16 has 8 bits, and autocast sums the draws' gradients in it or not as it caches weights
        torch.testing.assert_close(after[name], plain[name], rtol=0, atol=2**-6 * plain[name].abs().max().item())


def test_a_repacked_model_is_refused(tmp_path, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NF4, dtype=torch.bfloat16)
    weight = model.model.transformer["blocks"][1].up_proj.weight
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"blocks.1.up_proj` was repacked.*Load it again"):
        make_trainer(tmp_path, model, peft_config=LoraConfig(r=4))
