"""
The law: LLaDA-MoE is the function of transformers' Qwen3Moe, and its experts are reached by whatever reaches a linear
layer: 4 bits, adapters, processes that share their work.

What every family is asked stands in tests/test_decoders.py and tests/test_families.py; the answers of this one too.
"""

import copy
import json

import pytest
import torch
from conftest import make_tokenizer
from decoder_reference import EXPERTS_PER_TOKEN, LAYERS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_decoders import EXPERTS, FOLDERS, IDS, LN2, NF4, REAL, logits, trained
from test_head import gradients, make_batch, scored
from test_memory import LENGTH, RESPONSE, RESPONSES, peak_of_step
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from trl_diffusion import LLaDAModelLM, estimate_memory
from trl_diffusion.models.decoders.configuration import LLaDAMoEConfig
from trl_diffusion.models.decoders.experts import LLaDAMoEModelLM, SparseMLP
from trl_diffusion.planning.live_bytes import nbytes
from trl_diffusion.planning.skeleton import tensors_of

FOLDER = FOLDERS["LLaDA-MoE"]
EVERYWHERE = r".*\.(self_attn|experts\.\d+)\.\w+_proj"
AS_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 64,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "is_causal": False,
}


@pytest.fixture
def path(tmp_path):
    return FOLDER.write(tmp_path / "published")


def as_qwen3_moe(path, **options):
    """What transformers makes of the same folder under the name of its own class, whose experts are two tensors."""
    entries = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(entries | AS_QWEN3_MOE))
    return Qwen3MoeForCausalLM.from_pretrained(path, **options).eval()


# --------------------------------------------------------------------------------------------------------- architecture


def test_the_function_of_qwen3_moe(path):
    """With padding and without; gradients too, of the router's weights for instance."""
    ours = AutoModelForCausalLM.from_pretrained(path)
    ours.save_pretrained(path)  # tensors under names that transformers reads
    theirs = as_qwen3_moe(path)
    assert theirs.model.layers[0].mlp.experts.gate_up_proj.shape == (EXPERTS, 2 * 64, 32)
    for real in (None, REAL):
        there = torch.ones_like(IDS).bool() if real is None else real.bool()
        torch.testing.assert_close(logits(ours, real)[there], logits(theirs, real)[there], rtol=1e-5, atol=1e-5)
    theirs.model.embed_tokens.padding_idx = None  # which ours lets learn
    mine, other = (gradients(model, model(input_ids=IDS).logits.square().sum()) for model in (ours, theirs))
    shared = mine.keys() & other.keys()
    assert len(shared) == len(other) - 2 * LAYERS and f"model.layers.{LAYERS - 1}.mlp.gate.weight" in shared
    for name in shared:
        scale = other[name].abs().max().item()
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5 * scale)


def test_probabilities_of_experts_are_not_made_to_sum_to_one(path):
    """OLMoE, or a Qwen3Moe with `norm_topk_prob`, would be another model."""
    expected = logits(AutoModelForCausalLM.from_pretrained(path))
    assert not torch.allclose(logits(as_qwen3_moe(path, norm_topk_prob=True)), expected, rtol=0.01)


def test_what_a_token_is_answered_does_not_depend_on_the_others():
    layer = FOLDER.model().model.layers[0].mlp
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    together = layer(hidden)
    for row in range(2):
        for place in range(5):
            alone = layer(hidden[row, place].view(1, 1, 32))[0, 0]
            torch.testing.assert_close(together[row, place], alone, rtol=1e-5, atol=1e-6)


def test_experts_without_a_token_have_a_gradient_of_zero():
    """Processes wait for the gradient of every weight, and one token reaches few experts."""
    layer = SparseMLP(FOLDER.model().config)
    layer(torch.randn(1, 1, 32)).sum().backward()
    reached = [bool(expert.down_proj.weight.grad.any()) for expert in layer.experts]
    assert sum(reached) == EXPERTS_PER_TOKEN


@pytest.mark.parametrize("draws_per_forward", [1, 2, 5])
def test_draws_that_run_together_are_those_that_run_alone(draws_per_forward):
    model, batch = FOLDER.model(), make_batch()
    together, apart = scored(model, batch), scored(model, batch, draws_per_forward=draws_per_forward)
    torch.testing.assert_close(apart.elbo.samples, together.elbo.samples, rtol=1e-5, atol=1e-5)


def test_a_new_model_gives_tokens_to_different_experts():
    """The weights of a router are drawn too."""
    model = LLaDAMoEModelLM(FOLDER.model().config)
    assert all(layer.mlp.gate.weight.std() > 0.01 for layer in model.model.layers)


def test_dense_llada_does_not_take_its_weights(path):
    with pytest.raises(ValueError, match="LLaDA-MoE.*AutoModelForCausalLM"):
        LLaDAModelLM.from_pretrained(path)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_starts_as_its_reference_with_adapters_on_experts(bf16, tmp_path):
    """Bit for bit, in mixed precision too. The published entries have no loss of the router computed."""
    path = FOLDER.write(tmp_path / "published", mask_token_id=2)
    make_tokenizer().save_pretrained(path)
    lora = LoraConfig(r=2, target_modules=EVERYWHERE)
    trainer = trained(path, tmp_path / "out", lora, max_steps=2, bf16=bf16)
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == LN2 and first["rewards/margins"] == 0.0 and second["loss"] != LN2
    assert not trainer.aux_loss_enabled and trainer.model.config.router_aux_loss_coef == 0.01
    trainer.save_model(tmp_path / "adapter")
    names = {name.split("base_model.model.")[1] for name in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    targets = {name.removesuffix(".weight") for name in FOLDER.published if "_proj" in name}
    assert names == {f"{target}.lora_{side}.weight" for target in targets for side in "AB"}


def test_a_loss_of_the_router_is_refused(tmp_path):
    path = FOLDER.write(tmp_path / "published", mask_token_id=2)
    make_tokenizer().save_pretrained(path)
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is set to 0.01"):
        trained(path, tmp_path / "out", LoraConfig(r=2), router_aux_loss_coef=0.01)


def test_peft_alone_adapts_attention():
    """It finds targets by `model_type`, which is that of dense LLaDA."""
    adapted = get_peft_model(FOLDER.model(), LoraConfig(r=2))
    names = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


# ------------------------------------------------------------------------------------------------------------ in 4 bits


@pytest.mark.slow
def test_only_experts_that_are_layers_are_quantised(path):
    """Bytes of the experts of both layouts, after `load_in_4bit`."""
    pytest.importorskip("bitsandbytes")
    ours = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4, dtype=torch.bfloat16)
    theirs = as_qwen3_moe(path, quantization_config=copy.deepcopy(NF4), dtype=torch.bfloat16)
    numbers = EXPERTS * 3 * 32 * 64
    in_4_bits = numbers // 2 + numbers // 64 * 4  # and a scale of four bytes for 64 of them
    codes = EXPERTS * 3 * 16 * 4
    for layer in range(LAYERS):
        assert nbytes(tensors_of(ours.model.layers[layer].mlp.experts)) == in_4_bits + codes
        assert nbytes(tensors_of(theirs.model.layers[layer].mlp.experts)) == numbers * 2
        assert ours.model.layers[layer].mlp.gate.weight.dtype == torch.bfloat16  # the router


def test_the_router_is_no_linear_layer_to_adapt():
    adapted = get_peft_model(FOLDER.model(), LoraConfig(r=2, target_modules="all-linear"))
    names = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(names) == FOLDER.linears and not any(name.endswith("mlp.gate") for name in names)


@pytest.mark.parametrize(
    ("targets", "layers"), [(["q_proj"], False), (EVERYWHERE, True)], ids=["attention", "experts, layers"]
)
def test_a_step_needs_what_is_estimated(targets, layers):
    """
    Within 2%. On tensors without numbers all tokens are given to one expert, which at a time holds what the experts of
    a real step hold one after the other.
    """
    sizes = {"hidden_size": 128, "expert_intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    model = LLaDAMoEModelLM(LLaDAMoEConfig(vocab_size=300, mask_token_id=2, pad_token_id=0, **sizes, **heads))
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    options = {"num_mc_samples": 2, "draws_per_forward": 1, "bf16": False}
    estimate = estimate_memory(
        model,
        max_length=LENGTH,
        response_length=RESPONSE,
        gradient_checkpointing=layers,
        gradient_accumulation_steps=2,
        device="cpu",
        **options,
    )
    measured = peak_of_step(model, RESPONSES, elbo_gradient="auto", layers=layers, **options)
    assert estimate.kept + estimate.working == pytest.approx(measured, rel=0.02)
