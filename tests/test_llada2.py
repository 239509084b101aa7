"""
The law: the experts of LLaDA2 are reached by whatever reaches a linear layer, its router by nothing but training, and
what its configuration says otherwise is refused.

What every family is asked stands in tests/test_decoders.py, tests/test_families.py and tests/test_blocks.py.
"""

import pytest
import torch
from conftest import make_tokenizer
from llada2_reference import EXPERTS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_decoders import FOLDERS, LN2, assert_parity, trained
from test_memory import peak_of_step
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion import estimate_memory
from trl_diffusion.models import LLaDA2MoeConfig
from trl_diffusion.models.decoders.modeling_llada2 import LLaDA2MoeModelLM
from trl_diffusion.planning.skeleton import equal_blocks

FOLDER = FOLDERS["LLaDA2"]
EVERYWHERE = r".*\.(query_key_value|dense|experts\.\d+\.\w+_proj)"
BIAS = "model.layers.1.mlp.gate.expert_bias"


def test_in_half_precision_the_bias_of_the_router_stays_as_it_is(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(FOLDER.write(tmp_path), dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.expert_bias.dtype == torch.float32
    assert torch.equal(gate.expert_bias, FOLDER.published[BIAS])


def test_an_adapter_on_experts_is_exchanged_by_published_names_and_merges(tmp_path):
    path = FOLDER.write(tmp_path / "published")
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=EVERYWHERE, init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora).save_pretrained(tmp_path / "adapter")
    tensors, merged = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), FOLDER.published
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        merged[f"{target}.weight"] += 2 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]  # alpha / r
    assert len(tensors) == 2 * (2 * 2 + 3 * EXPERTS)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    assert_parity(again.merge_and_unload(), FOLDER, merged)


def test_a_policy_starts_as_its_reference_with_adapters_on_experts(tmp_path):
    """Bit for bit, in mixed precision and with layer checkpointing. The published entries ask for no router loss."""
    path = FOLDER.write(tmp_path / "published", mask_token_id=2, output_router_logits=False, router_aux_loss_coef=0.001)
    make_tokenizer().save_pretrained(path)
    trainer = trained(path, tmp_path / "out", LoraConfig(r=2, target_modules=EVERYWHERE), max_steps=2, bf16=True)
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == LN2 and first["rewards/margins"] == 0.0 and second["loss"] != LN2


def test_a_step_needs_what_is_estimated():
    """Within 2%, though the first layer is another: four with experts follow from two."""
    sizes = {"hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 96, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5, "vocab_size": 300}
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    tokens = {"mask_token_id": 2, "pad_token_id": 0, "eos_token_id": 0, "block_size": 8}
    torch.manual_seed(0)
    model = LLaDA2MoeModelLM(LLaDA2MoeConfig(**sizes, **routed, **tokens))
    assert len(equal_blocks(model)) == 5
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["query_key_value"]))
    options = {"num_responses": 2, "num_mc_samples": 2, "draws_per_forward": 1, "elbo_gradient": "auto", "bf16": False}
    asked = {"max_length": 48, "response_length": 24, "gradient_checkpointing": True, "device": "cpu"}
    estimate = estimate_memory(model, **asked, gradient_accumulation_steps=2, **options)
    measured = peak_of_step(model, **options, layers=True, length=48, response=24)
    assert estimate.kept + estimate.working == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"score_function": "softmax"}, "`score_function='softmax'` is not implemented for model_type='llada2_moe'"),
        ({"use_qkv_bias": True}, "`use_qkv_bias=True` is not implemented"),
        ({"norm_topk_prob": False}, "`norm_topk_prob=False` is not implemented"),
        ({"moe_router_enable_expert_bias": False}, "`moe_router_enable_expert_bias=False` is not implemented"),
        ({"router_dtype": "bf16"}, "`router_dtype='bf16'` is not implemented"),
        ({"use_sliding_window": True}, "`use_sliding_window=True` is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_scaling=.* is not implemented: .* the plain one"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings=True` is not implemented"),
        ({"output_router_logits": True}, "`output_router_logits=True` is not implemented"),
        ({"is_causal": True}, "`is_causal=True` contradicts model_type='llada2_moe'"),
        ({"rotary_dim": 8}, r"`rotary_dim` \(8\) must be `head_dim` \(8\) times `partial_rotary_factor` \(0.5\)"),
        ({"n_group": 5}, rf"`n_group` \(5\) must divide `num_experts` \({EXPERTS}\)"),
        ({"n_group": EXPERTS}, "into groups of two at least"),
        ({"topk_group": 5}, r"`topk_group` \(5\) be at most as large"),
        ({"num_experts_per_tok": 9}, r"`num_experts_per_tok` \(9\) must be .* in `topk_group` \(2\) groups, 8"),
    ],
)
def test_another_architecture_is_refused(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(FOLDER.write(tmp_path, **entries))
