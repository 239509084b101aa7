"""
The law: LFM2.5-Encoder-Diffusion is LFM2 whose attention and convolutions see both sides, under its published names, by
its path and without its remote code.

What every family is asked of scores and samples stands in tests/test_families.py.
"""

import json

import pytest
import torch
from conftest import make_tokenizer
from decoder_reference import HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH
from lfm2_reference import LAYERS, REACH, THETA, logits_of, published_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_decoders import NF4, trained
from transformers import AutoConfig, Lfm2Config

from trl_diffusion import estimate_memory
from trl_diffusion.models import Lfm2BidirectionalForMaskedLM
from trl_diffusion.models.denoiser import resolve_mask_token_id
from trl_diffusion.models.families import class_to_load, family_of

IDS = torch.tensor([[5, 2, 9, 11, 2, 2, 7, 3], [1, 0, 2, 4, 8, 2, 13, 29]])


FIELDS = {
    "model_type": "lfm2",
    "architectures": ["Lfm2BidirectionalForMaskedLM"],
    "auto_map": {"AutoModelForMaskedLM": "modeling_lfm2_bidirectional.M"},
    "block_auto_adjust_ff_dim": False,
    "bos_token_id": 1,
    "conv_L_cache": REACH,
    "conv_bias": False,
    "eos_token_id": 0,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "layer_types": list(LAYERS),
    "norm_eps": 1e-5,
    "num_attention_heads": HEADS,
    "num_hidden_layers": len(LAYERS),
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rope_theta": THETA,
    "tie_word_embeddings": True,
    "use_cache": False,
    "vocab_size": VOCABULARY,
}


def write(path, **entries):
    """A folder as it is published: its config.json has no mask token, and its tensors no head."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**FIELDS, **entries}))
    save_file(published_tensors(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_lfm2():
    """In memory, with 2 for its mask token."""
    model = Lfm2BidirectionalForMaskedLM(Lfm2Config.from_dict({**FIELDS, "mask_token_id": 2}))
    model.load_state_dict(published_tensors(), strict=False)
    return model.eval()


def load(path, **options):
    return Lfm2BidirectionalForMaskedLM.from_pretrained(path, **options).eval()


def assert_parity(model, tensors):
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits_of(tensors, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_architecture_in_plain_torch(attention, tmp_path):
    path = write(tmp_path)
    config = AutoConfig.from_pretrained(path)
    assert class_to_load(config) is Lfm2BidirectionalForMaskedLM and resolve_mask_token_id(config) == 16
    assert_parity(load(path, attn_implementation=attention), published_tensors())


@torch.no_grad()
def test_padding_on_either_side_is_nothing_to_a_convolution():
    model, alone = make_lfm2(), logits_of(published_tensors(), IDS[:1])
    for left, right in ((3, 0), (0, 2)):
        ids = torch.nn.functional.pad(IDS[:1], (left, right), value=9)
        real = torch.nn.functional.pad(torch.ones_like(IDS[:1]), (left, right))
        found = model(input_ids=ids, attention_mask=real).logits[:, left : left + 8]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_names_are_the_published_ones_through_shards_and_a_merge(tmp_path):
    path, tensors = write(tmp_path / "published"), published_tensors()
    load(path).save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    shards = [load_file(shard) for shard in sorted((tmp_path / "saved").glob("*.safetensors"))]
    saved = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) > 2 and saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert family_of(AutoConfig.from_pretrained(tmp_path / "saved")).name == "LFM2.5-Encoder-Diffusion"
    targets = family_of(AutoConfig.from_pretrained(path)).lora_target_modules
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(load(path), lora).save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        tensors[f"{target}.weight"] += 2 * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]  # alpha / r
    assert len(adapter) == 2 * (2 * 2 + 4 + 3 * len(LAYERS))  # two of a convolution, four of an attention
    merged = PeftModel.from_pretrained(load(tmp_path / "saved"), tmp_path / "adapter").merge_and_unload()
    assert_parity(merged, tensors)


@pytest.mark.slow
def test_in_4_bits_head_and_embeddings_are_spared_and_it_reloads(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised = load(write(tmp_path / "published"), quantization_config=NF4, dtype=torch.float32)
    linears = [name for name, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 2 * 2 + 4 + 3 * len(LAYERS) and "lm_head" not in linears
    assert quantised.get_output_embeddings().weight.dtype == torch.float32
    quantised.save_pretrained(tmp_path / "saved")
    # In training mode: for inference bitsandbytes' CPU kernels want wider layers
    assert torch.equal(load(tmp_path / "saved").train()(input_ids=IDS).logits, quantised.train()(input_ids=IDS).logits)


def test_it_is_trained_by_path(tmp_path):
    """Under TRL's defaults: bfloat16, layer checkpointing, its own tokenizer; the folder says its class afterwards."""
    path = write(tmp_path / "published", mask_token_id=2)
    make_tokenizer(with_mask=True).save_pretrained(path)
    trainer = trained(path, tmp_path / "out", LoraConfig(r=2), max_steps=2, bf16=True)
    assert type(trainer.model.get_base_model()) is Lfm2BidirectionalForMaskedLM
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6) and second != first
    trainer.create_model_card(model_name="mine")
    assert "from trl_diffusion.models import Lfm2BidirectionalForMaskedLM" in (tmp_path / "out/README.md").read_text()


def test_layers_that_are_checkpointed_have_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = make_lfm2().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_memory_is_estimated_from_the_configuration(tmp_path):
    model = load(write(tmp_path))
    estimate = estimate_memory(model.config, max_length=16, dtype="float32", bf16=False)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert estimate.weights == sum(held.values())
