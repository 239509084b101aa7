"""
The law: the native LLaDA is the published architecture, in and out of the published checkpoints.

Its logits and gradients are compared with an independent transcription (llada_reference.py); everything else that a
model of transformers can do (load, save, resize, checkpoint, adapt, copy) must leave the function it computes alone.
"""

import copy
import json
import pickle
import re

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import make_model
from llada_reference import inverse_frequencies, llada_hidden_states, llada_logits, rotary_angles, rotate, split_heads
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_forked
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from trl_diffusion import LLaDAConfig, LLaDAModelLM
from trl_diffusion.models import LLaDAModel
from trl_diffusion.models.llada.configuration_llada import _ONLY_IMPLEMENTED
from trl_diffusion.models.llada.family import LLADA
from trl_diffusion.models.llada.modeling_llada import rotation

VARIANTS = {
    "default": {},
    "grouped_query": {"n_kv_heads": 2},
    "one_kv_head": {"n_kv_heads": 1},
    "tied": {"weight_tying": True},
    "tied_grouped_query": {"weight_tying": True, "n_kv_heads": 2},
    "deep": {"n_layers": 6},
    "spare_embeddings": {"embedding_size": 37},
    "other_theta_and_eps": {"rope_theta": 1e4, "rms_norm_eps": 1e-2},
}
BLOCK_LINEARS = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
# config.json of LLaDA-8B-Instruct
PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
TINY = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 64, "vocab_size": 30}
TINY |= {"embedding_size": 30, "mask_token_id": 2, "pad_token_id": 0, "eos_token_id": 0}


def make_varied(**overrides):
    """A tiny LLaDA whose norms have weights of their own: all ones would hide which norm stands where."""
    model = make_model(**overrides)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "ln_f.weight")):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


def random_ids(rows, length, seed=0, vocab_size=30):
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad_mask(lengths, width, side):
    place = torch.arange(width)
    place = place if side == "right" else width - 1 - place
    return (place < torch.tensor(lengths)[:, None]).long()


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def rms(x):
    return x.square().mean().sqrt()


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def assert_same_function(model, other, ids=None):
    """The two models are one function, to the last bit."""
    ids = random_ids(2, 9) if ids is None else ids
    assert torch.equal(logits_of(model, ids), logits_of(other, ids))


def reload(model, path, cls=LLaDAModelLM, **kwargs):
    model.save_pretrained(path)
    loaded, info = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return loaded


# ---------------------------------------------------------------------------------------------- the published function


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_published_architectures(variant, attention, side):
    model = make_varied(**VARIANTS[variant], attn_implementation=attention)
    ids, mask = random_ids(3, 12), None
    real = torch.ones_like(ids)
    if side is not None:
        mask = real = pad_mask([12, 7, 1], 12, side)
    expected = llada_logits(model.state_dict(), model.config, ids, mask)
    assert model.config._attn_implementation == attention
    assert_close(logits_of(model, ids, attention_mask=mask)[real.bool()], expected[real.bool()], 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_published_architectures(variant):
    model = make_varied(**VARIANTS[variant])
    ids, mask = random_ids(3, 12), pad_mask([12, 7, 9], 12, "right")
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    direction = torch.randn(3, 12, model.config.embedding_size, generator=torch.Generator().manual_seed(2)) / 100
    direction *= mask[..., None]
    (model(input_ids=ids, attention_mask=mask).logits * direction).sum().backward()
    (llada_logits(state, model.config, ids, mask) * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, state[name].grad, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_as_accurate_as_the_published_architecture_in_bfloat16(variant):
    """Measured against the fp32 function of the same rounded weights."""
    model = make_varied(**VARIANTS[variant]).to(torch.bfloat16)
    ids = random_ids(4, 40)
    state = model.state_dict()
    truth = llada_logits({name: weight.float() for name, weight in state.items()}, model.config, ids)
    own, published = (
        rms(logits.float() - truth) for logits in (logits_of(model, ids), llada_logits(state, model.config, ids))
    )
    assert own <= 1.25 * published


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_keys_are_turned_in_fp32(monkeypatch, dtype):
    """Against the same projections turned by the transcription: rounded once, to the model's dtype, and no more."""
    model, ids, seen = make_varied(n_layers=1).to(dtype), random_ids(2, 300), {}

    def watch(module, query, key, value, *args, **kwargs):
        seen.update(query=query, key=key)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watch)
    logits_of(model, ids)
    layer, cos_sin = model.model.transformer["blocks"][0], rotary_angles(model.config, torch.arange(300).unsqueeze(0))
    normed = layer.attn_norm(model.get_input_embeddings()(ids))
    for name, projection in [("query", layer.q_proj), ("key", layer.k_proj)]:
        truth = rotate(split_heads(projection(normed), 4).float(), *cos_sin)
        own, rounding = (rms(turned.float() - truth) for turned in (seen[name], truth.to(dtype)))
        assert seen[name].dtype == dtype
        assert own <= 1.02 * rounding + 1e-6


@pytest.mark.parametrize("model_class", [LLaDAModelLM, LLaDAModel])
def test_hidden_states_are_the_published_architectures(model_class):
    model = make_varied(n_layers=3)
    ids = random_ids(2, 9)
    expected = llada_hidden_states(model.state_dict(), model.config, ids)
    module = model if model_class is LLaDAModelLM else model.model
    with torch.no_grad():
        hidden_states = module(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == len(expected) == 4
    for own, published in zip(hidden_states, expected, strict=True):
        assert_close(own, published, 1e-5)
    assert module(input_ids=ids).hidden_states is None


def test_loss_is_the_mean_negative_log_probability_in_place():
    model, ids = make_varied(), random_ids(2, 9)
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, ids, -100)
    log_probs = llada_logits(model.state_dict(), model.config, ids).log_softmax(-1)
    terms = [-log_probs[b, i, ids[b, i]] for b, i in (labels != -100).nonzero()]
    for num_items, expected in [(None, sum(terms) / len(terms)), (40, sum(terms) / 40)]:
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
        assert_close(loss, expected, 1e-5)


def test_every_position_sees_every_other():
    model, ids = make_varied(), random_ids(1, 8)
    base = logits_of(model, ids)[0]
    for changed in range(8):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 30
        moved = (logits_of(model, other)[0] - base).abs().amax(-1)
        assert (moved > 1e-4).all(), changed


# ------------------------------------------------------------------------------------------ rows, padding and packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_a_row_knows_neither_its_padding_nor_its_batch_mates(side, attention, mask_dtype):
    model = make_varied(attn_implementation=attention)
    lengths, width = [9, 4, 1, 6], 11
    mask = pad_mask(lengths, width, side)
    ids = random_ids(4, width)
    batched = logits_of(model, ids, attention_mask=mask.to(mask_dtype))
    assert batched.isfinite().all()
    for row in range(4):
        alone = logits_of(model, ids[row][mask[row].bool()].unsqueeze(0))[0]
        assert_close(batched[row][mask[row].bool()], alone, 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(attention):
    model = make_varied(attn_implementation=attention)
    lengths = [5, 1, 4]
    pieces = [random_ids(1, n, seed=n) for n in lengths]
    packed = torch.cat(pieces, 1)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    block_diagonal = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()[None, None]
    separate = torch.cat([logits_of(model, piece) for piece in pieces], 1)
    additive = torch.zeros(block_diagonal.shape).masked_fill(~block_diagonal, torch.finfo(torch.float32).min)
    for mask in (block_diagonal, additive):
        assert_close(logits_of(model, packed, position_ids=positions, attention_mask=mask), separate, 1e-5)
    for mask in (None, torch.ones_like(packed)):
        with pytest.raises(ValueError, match=r"packing.*block-diagonal 4D `attention_mask`"):
            model(input_ids=packed, position_ids=positions, attention_mask=mask)


def flash_like(module, query, key, value, attention_mask, scaling, position_ids=None, **kwargs):
    """What flash attention makes of packed positions: a batch of one row is cut where they start over."""
    sequence = (position_ids.diff(dim=-1, prepend=position_ids[:, :1]) < 0).cumsum(-1)
    same = (sequence[:, :, None] == sequence[:, None, :]).unsqueeze(1) if len(query) == 1 else None
    return sdpa_attention_forward(module, query, key, value, same, scaling=scaling)


def test_flash_attention_is_told_where_packed_sequences_end(monkeypatch):
    model, plain = make_varied(), make_varied()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_like)
    model.config._attn_implementation = "flash_attention_2"
    pieces = [random_ids(1, n, seed=n) for n in (5, 2, 4)]
    packed = torch.cat(pieces, 1)
    positions = torch.cat([torch.arange(n) for n in (5, 2, 4)]).unsqueeze(0)
    separate = torch.cat([logits_of(plain, piece) for piece in pieces], 1)
    for mask in (None, torch.ones_like(packed)):
        assert_close(logits_of(model, packed, position_ids=positions, attention_mask=mask), separate, 1e-5)
    with pytest.raises(ValueError, match="packing"):  # several rows are not cut
        model(input_ids=packed.expand(2, -1), position_ids=positions)
    with pytest.raises(ValueError, match="packing"):  # nor is a row with padding
        model(input_ids=packed, position_ids=positions, attention_mask=pad_mask([10], 11, "right"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("filler", [0, 1])
def test_positions_given_for_a_padded_batch_are_not_taken_for_packing(side, filler):
    model, mask, ids = make_varied(), pad_mask([9, 4, 6], 9, side), random_ids(3, 9)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)  # as transformers and TRL compute them
    given = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(given[mask.bool()], logits_of(model, ids, attention_mask=mask)[mask.bool()])


def test_only_distances_between_positions_matter():
    model, ids = make_varied(), random_ids(2, 9)
    moved = logits_of(model, ids, position_ids=torch.arange(9).unsqueeze(0) + 100)
    assert_close(moved, logits_of(model, ids), 1e-4)  # fp32 angles at 100 are rounded to 4e-6


# --------------------------------------------------------------------------------------------- ways to call the model


def test_embeddings_can_stand_in_for_tokens():
    model, ids, mask = make_varied(), random_ids(2, 9), pad_mask([9, 5], 9, "left")
    embeds = model.get_input_embeddings()(ids)
    expected = logits_of(model, ids, attention_mask=mask)
    assert torch.equal(logits_of(model, None, inputs_embeds=embeds, attention_mask=mask), expected)
    for both_or_none in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds`"):
            model(**both_or_none)


@pytest.mark.parametrize(
    ("keep", "places"),
    [(0, range(9)), (1, [8]), (4, [5, 6, 7, 8]), (torch.tensor([2, 7]), [2, 7])],
    ids=["all", "last", "last_four", "chosen"],
)
def test_logits_are_computed_where_they_are_wanted(keep, places):
    model, ids = make_varied(), random_ids(2, 9)
    assert_close(logits_of(model, ids, logits_to_keep=keep), logits_of(model, ids)[:, list(places)], 1e-6)


def test_return_dict_false_gives_the_same_tensors():
    model, ids = make_varied(), random_ids(2, 9)
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], model(input_ids=ids).logits)
    assert torch.equal(model.model(input_ids=ids, return_dict=False)[0], model.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "use_reentrant", "activation_checkpointing"])
def test_checkpointing_leaves_gradients_alone(switch):
    plain, checkpointed = make_varied().train(), make_varied().train()
    if switch == "activation_checkpointing":
        checkpointed.activation_checkpointing_enable()
    else:
        checkpointed.gradient_checkpointing_enable({"use_reentrant": switch == "use_reentrant"})
        checkpointed.enable_input_require_grads()
    assert checkpointed.is_gradient_checkpointing
    calls = []
    for model in (plain, checkpointed):
        model.model.transformer["blocks"][0].attn_norm.register_forward_hook(
            lambda *_, model=model: calls.append(model)
        )
        model(input_ids=random_ids(2, 9), labels=random_ids(2, 9, seed=1)).loss.backward()
    assert [calls.count(model) for model in (plain, checkpointed)] == [1, 2]  # the second one did recompute
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_padding_tokens_embedding_keeps_learning():
    model = make_varied()
    ids = torch.full((1, 4), model.config.pad_token_id)
    model(input_ids=ids).logits.square().sum().backward()
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    llada_logits(state, model.config, ids).square().sum().backward()
    own, published = (
        grad[model.config.pad_token_id]
        for grad in (model.get_input_embeddings().weight.grad, state["model.transformer.wte.weight"].grad)
    )
    assert published.abs().max() > 1e-3
    assert_close(own, published, 1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_same_function_and_independent(copied):
    model = make_varied(weight_tying=True)
    twin = copied(model)
    assert_same_function(twin, model)
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    twin.get_input_embeddings().weight.data.zero_()
    assert_same_function(model, make_varied(weight_tying=True))


# ------------------------------------------------------------------------------------------------- checkpoints on disk


def published_keys(n_layers, tied=False):
    block = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    top = ["wte", "ln_f"] if tied else ["wte", "ln_f", "ff_out"]
    inner = [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in block]
    return {f"model.transformer.{name}.weight" for name in top + inner}


@pytest.mark.parametrize("model_class", [LLaDAModelLM, AutoModelForCausalLM, AutoModelForMaskedLM])
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_with_the_published_names(tmp_path, variant, model_class):
    model = make_varied(**VARIANTS[variant])
    loaded = reload(model, tmp_path, model_class)
    stored = load_file(tmp_path / "model.safetensors")
    assert type(loaded) is LLaDAModelLM
    assert set(stored) == published_keys(model.config.n_layers, model.config.weight_tying)
    assert all(torch.equal(stored[name], model.state_dict()[name]) for name in stored)
    assert loaded.config.to_dict() == model.config.to_dict() | {
        "architectures": ["LLaDAModelLM"],
        "dtype": "float32",
        "_name_or_path": str(tmp_path),
    } | {"transformers_version": loaded.config.transformers_version}
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == model.config.weight_tying
    assert_same_function(loaded, model)


@pytest.mark.parametrize("variant", ["default", "tied"])
def test_the_backbone_loads_alone(tmp_path, variant):
    model = make_varied(**VARIANTS[variant])
    backbone = reload(model, tmp_path, AutoModel)
    assert type(backbone) is LLaDAModel
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(backbone(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("variant", ["default", "tied"])
def test_shards(tmp_path, variant):
    model = make_varied(**VARIANTS[variant])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set().union(*map(load_file, shards)) == published_keys(2, model.config.weight_tying)
    loaded, info = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_function(loaded, model)


@pytest.mark.parametrize("theta", [500000.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_turns_by_the_published_angles(tmp_path, dtype, theta):
    """Models are built on the meta device before they are loaded: nothing that was computed there may be used."""
    loaded = reload(make_varied(rope_theta=theta), tmp_path, dtype=dtype)
    positions = torch.arange(400).unsqueeze(0)
    turns = rotation(loaded.config, positions)
    angles = positions.double().unsqueeze(-1) * inverse_frequencies(loaded.config).double().repeat(2)
    assert turns.cos.dtype == turns.sin.dtype == torch.float32
    # Angles up to 399 are rounded to 400 * 2^-24 in float32, and so are the frequencies that they are multiples of
    torch.testing.assert_close(turns.cos.double(), angles.cos(), rtol=0, atol=400 * 2**-22)
    torch.testing.assert_close(turns.sin.double(), angles.sin(), rtol=0, atol=400 * 2**-22)


def test_a_cast_there_and_back_rounds_the_weights_and_nothing_else():
    model, rounded = make_varied(), make_varied()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    assert_same_function(model.to(torch.bfloat16).to(torch.float32), rounded, random_ids(1, 400))


def run_under_fsdp_in_bfloat16(folder):
    """Layers sharded each on its own, as accelerate does, with TRL's default precision; what turns queries is kept."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model, seen = make_varied(), []
    for layer in model.model.transformer["blocks"]:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["rotation"]), with_kwargs=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.model.transformer["blocks"], model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    cast = []
    for layer in model.model.transformer["blocks"]:
        layer.register_forward_pre_hook(lambda _, args, kwargs: cast.append((args, kwargs)), with_kwargs=True)
    model(input_ids=random_ids(1, 40))
    assert cast[0][0][0].dtype == torch.bfloat16  # FSDP has cast what it finds
    expected = rotation(model.config, torch.arange(40).unsqueeze(0))
    for turns in (*seen, *(kwargs["rotation"] for _, kwargs in cast)):
        assert torch.equal(turns.cos, expected.cos) and torch.equal(turns.sin, expected.sin)
        assert turns.cos.dtype == torch.float32
    assert len(seen) == len(cast) == 2
    (folder / "done").touch()


def test_angles_reach_the_layers_in_float32_whatever_wraps_them(tmp_path):
    codes = run_forked(run_under_fsdp_in_bfloat16, tmp_path, folder=tmp_path, environment={"RANK": 0, "WORLD_SIZE": 1})
    assert codes == [0], (tmp_path / "rank0.log").read_text()
    assert (tmp_path / "done").exists()
    turns = rotation(make_varied().config, torch.arange(9).unsqueeze(0))
    there = send_to_device({"rotation": turns}, torch.device("meta"))["rotation"]  # accelerate's, between two devices
    assert there.cos.device.type == there.sin.device.type == "meta"


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_is_loading_it_in_that_dtype(tmp_path, cast):
    """Rotary angles stay in fp32 in both: rounded frequencies would be far off at the last of these positions."""
    model = cast(make_varied())
    loaded = reload(make_varied(), tmp_path, dtype=model.dtype)
    assert loaded.dtype == model.dtype != torch.float32
    assert_same_function(model, loaded, random_ids(1, 300))
    assert_same_function(copy.deepcopy(model).float(), loaded.float(), random_ids(1, 300))


def test_device_map(tmp_path):
    model = make_varied()
    assert_same_function(reload(model, tmp_path, device_map={"": "cpu"}), model)


@pytest.mark.parametrize("variant", ["default", "tied", "spare_embeddings"])
@pytest.mark.parametrize("size", [27, 41])
def test_resized_models_reload(tmp_path, variant, size):
    model = make_varied(**VARIANTS[variant])
    ids = random_ids(2, 9, vocab_size=27)
    before = logits_of(model, ids)
    model.resize_token_embeddings(size, mean_resizing=False)
    shared = min(size, before.shape[-1])
    assert model.config.vocab_size == model.config.embedding_size == size
    assert_close(logits_of(model, ids)[..., :shared], before[..., :shared], 1e-6)
    assert_same_function(reload(model, tmp_path), model, ids)


def test_resizing_to_a_multiple_reloads(tmp_path):
    model = make_varied()
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == model.config.embedding_size == 64
    assert_same_function(reload(model, tmp_path), model)


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_published_sizes_give_the_published_number_of_bytes():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**{k: v for k, v in PUBLISHED.items() if k != "auto_map"}))
        of_defaults = LLaDAModelLM(LLaDAConfig(mlp_hidden_size=12288))
    assert set(model.state_dict()) == published_keys(32)
    assert len(published_keys(32)) == 291
    assert 2 * sum(p.numel() for p in model.parameters()) == 16_031_162_368  # total_size of its index, in bfloat16
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in of_defaults.state_dict().items()
    }


@pytest.mark.parametrize("repository", ["", "GSAI-ML/LLaDA-8B-Instruct--"])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_a_published_config_json_gives_the_native_classes(tmp_path, trust, repository):
    model = make_varied()
    model.save_pretrained(tmp_path)
    auto_map = {name: repository + cls for name, cls in PUBLISHED["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | TINY | {"auto_map": auto_map}))
    assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is LLaDAConfig
    for auto, cls in [
        (AutoModel, LLaDAModel),
        (AutoModelForCausalLM, LLaDAModelLM),
        (AutoModelForMaskedLM, LLaDAModelLM),
    ]:
        loaded = auto.from_pretrained(tmp_path, **trust)
        assert type(loaded) is cls
    assert_same_function(loaded, model)
    again = reload(loaded, tmp_path / "again")
    assert_same_function(again, model)
    assert again.config.flash_attention is False and again.config.init_fn == "mitchell"  # carried along


OTHERWISE = {
    "block_type": "sequential",
    "block_group_size": 2,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "rope": False,
    "rope_full_precision": False,
    "alibi": True,
    "attention_layer_norm": True,
    "multi_query_attention": True,
    "scale_logits": True,
    "input_emb_norm": True,
    "include_bias": True,
    "include_qkv_bias": True,
    "bias_for_layer_norm": True,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
}


def test_every_switch_has_its_refusal():
    assert set(OTHERWISE) == set(_ONLY_IMPLEMENTED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({name: value}, re.escape(f"`{name}={value!r}` is not implemented")) for name, value in OTHERWISE.items()]
    + [
        ({"num_experts": 64}, "LLaDA-MoE"),
        ({"architectures": ["LLaDAMoEModelLM"]}, "LLaDA-MoE"),
        ({"is_causal": True}, "`is_causal`"),
        ({"use_cache": True}, "`use_cache`"),
        ({"d_model": 34}, "`d_model`"),
        ({"d_model": 28}, "`d_model`"),  # heads of odd width cannot be rotated
        ({"n_kv_heads": 3}, "`n_kv_heads`"),
        ({"n_heads": 0}, "`n_heads`"),
        ({"n_kv_heads": 0}, "`n_kv_heads`"),
        ({"embedding_size": 29}, "`embedding_size`"),
        ({"activation_type": "swiglu"}, "`activation_type`"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}}, "`rope_parameters="),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "`rope_parameters="),
    ],
)
def test_another_architecture_is_refused_by_name(tmp_path, fields, message):
    values = PUBLISHED | TINY | fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**values)


@pytest.mark.parametrize("changed", [{"is_causal": True}, {"rope_theta": 1e4}, {"n_kv_heads": 3}])
def test_a_configuration_changed_after_it_was_read_is_refused(tmp_path, changed):
    make_varied().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_parameters" if "rope_theta" in changed else next(iter(changed))):
        LLaDAModelLM.from_pretrained(tmp_path, **changed)


def test_other_names_of_a_field_are_the_field():
    config = LLaDAConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.d_model, config.n_heads, config.n_kv_heads, config.n_layers) == (48, 6, 6, 3)
    assert config.weight_tying and config.mlp_hidden_size == config.intermediate_size == 4 * 48
    assert config.num_key_value_heads == 6 and config.max_position_embeddings == 4096


# --------------------------------------------------------------------------------------------------------------- LoRA


def make_adapted(**overrides):
    """An adapter on the family's default modules, with weights that matter."""
    targets = LLADA.lora_target_modules
    peft_model = get_peft_model(make_varied(**overrides), LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return peft_model.eval()


@pytest.mark.parametrize("variant", ["default", "tied_grouped_query", "deep"])
def test_lora_adapts_every_block_linear_and_not_the_head(variant):
    adapted = make_adapted(**VARIANTS[variant])
    n_layers = adapted.config.n_layers
    wrapped = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {f"model.transformer.blocks.{i}.{name}" for i in range(n_layers) for name in BLOCK_LINEARS}
    assert len(wrapped) == 7 * n_layers


def test_adapters_are_stored_under_the_published_names_and_reload(tmp_path):
    adapted = make_adapted()
    adapted.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.transformer.blocks.{i}.{name}.lora_{side}.weight"
        for i in range(2)
        for name in BLOCK_LINEARS
        for side in "AB"
    }
    assert_same_function(PeftModel.from_pretrained(make_varied(), tmp_path), adapted)


@pytest.mark.parametrize("variant", ["default", "tied"])
def test_merging_an_adapter(tmp_path, variant):
    adapted, ids = make_adapted(**VARIANTS[variant]), random_ids(2, 9)
    expected = logits_of(adapted, ids)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, ids), logits_of(make_varied(**VARIANTS[variant]), ids))
    merged = adapted.merge_and_unload()
    assert_close(logits_of(merged, ids), expected, 2e-5)
    assert_same_function(reload(merged, tmp_path), merged)


def test_loading_is_silent(tmp_path, caplog):
    """transformers logs what it re-initialised or could not place."""
    make_varied().save_pretrained(tmp_path)
    logging.get_logger().addHandler(caplog.handler)
    try:
        LLaDAModelLM.from_pretrained(tmp_path)
    finally:
        logging.get_logger().removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
