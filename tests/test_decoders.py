"""
The law: iLLaDA, Dream, LLaDA-MoE and converted decoders are the published architectures, from their own folders, with
no remote code; what is not is refused by name.

Folders are written as they are published: a config.json with the published fields, and tensors under published names.
"""

import json
from dataclasses import dataclass, field

import llada2_reference
import pytest
import torch
import vrpo_lora
from block_reference import block_numbers, block_terms, of_model
from conftest import make_model, make_pairs, make_tokenizer
from datasets import Dataset
from decoder_reference import HEAD_DIM, LAYERS, decoder_logits, frequencies, published_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_head import make_batch, scored
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, MaskSampler, elbo, estimate_memory
from trl_diffusion.checks.inputs import check_tokenizer
from trl_diffusion.estimators.elbo import token_logits
from trl_diffusion.models.decoders.auto import CLASSES
from trl_diffusion.models.decoders.configuration import DreamConfig
from trl_diffusion.models.decoders.modeling import DreamModel, DreamTokenizer
from trl_diffusion.models.denoiser import check_denoiser, resolve_mask_token_id
from trl_diffusion.models.families import class_to_load, family_of
from trl_diffusion.models.sampler import generate

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = 4
# So that what is otherwise met beyond thousands of tokens is met in eight
YARN = {
    "factor": 16.0,
    "beta_fast": 0.5,
    "beta_slow": 0.01,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.1,
}
QWEN = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "rope_scaling": None}


@dataclass(frozen=True)
class Folder:
    """
    A published folder.

    Args:
        fields: of its config.json, besides sizes.
        tensors: what they are like, see [`published_tensors`].
        theta, eps: of the rotary embedding and the norms.
        shift: where the logits of a token stand before it.
        yarn: what stretches the rotary embedding.
        block: of a block diffusion model, tokens of a block.
        turned: numbers of a head that are turned by position.
    """

    fields: dict
    tensors: dict = field(default_factory=dict)
    theta: float = 10000.0
    eps: float = 1e-6
    shift: int = 0
    yarn: dict | None = None
    block: int | None = None
    turned: int = HEAD_DIM

    def write(self, path, **changes):
        config = {**SIZES, **self.numbers, **self.fields, **changes}
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(self.published, path / "model.safetensors", metadata={"format": "pt"})
        return path

    def model(self):
        """In memory, with 2 for its mask token."""
        fields = {**SIZES, **self.numbers, **self.fields, "mask_token_id": 2}
        config = CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
        model = CLASSES[type(config)](config)
        model.load_state_dict(self.published, strict=not config.tie_word_embeddings)
        return model.eval()

    def blocks(self, batch):
        """What its draws are told of a batch."""
        return {"blocks": block_numbers(batch, self.block)} if self.block else {}

    @property
    def numbers(self):
        return {"rms_norm_eps": self.eps} | ({} if self.yarn else {"rope_theta": self.theta})

    @property
    def published(self):
        return published_tensors(**self.tensors)

    @property
    def linears(self):
        """Linear layers of its blocks, the router left out."""
        return LAYERS * (4 + 3 * self.tensors.get("experts", 1))

    @property
    def adapted(self):
        """Those that get an adapter if none are named."""
        return LAYERS * 4 if "experts" in self.tensors else self.linears

    def logits(self, tensors, input_ids, real=None):
        sees = None
        if self.block:
            there = torch.ones_like(input_ids) if real is None else real
            number = (there.cumsum(1) - 1) // self.block
            sees = (number.unsqueeze(2) >= number.unsqueeze(1)) & there.bool().unsqueeze(1) | torch.eye(8).bool()
        return self.answer(tensors, input_ids, sees, real)

    def answer(self, tensors, input_ids, sees, real=None):
        """Logits of tokens that are told who sees whom."""
        numbers = {"theta": self.theta, "eps": self.eps, "yarn": self.yarn}
        return decoder_logits(tensors, input_ids, real, **numbers, renamed=self.tensors.get("renamed", ()), sees=sees)


class GroupedFolder(Folder):
    """Of LLaDA2, which has names and layers of its own."""

    published = property(lambda self: llada2_reference.published_tensors())
    linears = LAYERS * 2 + 3 * (1 + llada2_reference.EXPERTS + 1)
    adapted = LAYERS * 2

    def answer(self, tensors, input_ids, sees, real=None):
        return llada2_reference.decoder_logits(tensors, input_ids, theta=self.theta, eps=self.eps, sees=sees)


FOLDERS = {
    "iLLaDA": Folder(  # no mask token in its config.json
        {
            "model_type": "illada",
            "architectures": ["ILLaDAForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_illada.C", "AutoModelForCausalLM": "modeling_illada.M"},
            "tie_word_embeddings": True,
            "layer_norm_eps": None,
            "resid_pdrop": 0.0,
        },
        {"tied": True},
        theta=500000.0,
    ),
    "Dream": Folder(
        {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "auto_map": {"AutoConfig": "configuration_dream.C", "AutoModel": "modeling_dream.M"},
            "mask_token_id": 2,
            "use_cache": True,
            "use_mrope": False,
            "tie_word_embeddings": False,
            **QWEN,
        },
        {"biases": True},
        theta=1000000.0,
        shift=1,
    ),
    "A2D-Qwen2": Folder({"model_type": "a2d-qwen2", "tie_word_embeddings": False, **QWEN}, {"biases": True}),
    "A2D-Qwen3": Folder(
        {"model_type": "a2d-qwen3", "tie_word_embeddings": True, "head_dim": 8, "attention_bias": False, **QWEN},
        {"head_norms": True, "tied": True},
        theta=1000000.0,
    ),
    "SDAR": Folder(
        {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_sdar.C", "AutoModelForCausalLM": "modeling_sdar.M"},
            "tie_word_embeddings": False,
            "head_dim": 8,
            "attention_bias": False,
            "mask_token_id": 2,
            "block_size": 4,
            "attn_implementation": "flex_attention",
            "fuse_cross_entropy": True,
            **QWEN,
        },
        {"head_norms": True},
        theta=1000000.0,
        block=4,
    ),
    "Fast-dLLM v2": Folder(  # no mask token in its config.json
        {
            "model_type": "Fast_dLLM_Qwen",
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "auto_map": {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"},
            "bd_size": 4,
            "conplemenrary_mask": True,
            "layer_types": ["full_attention"] * 2,
            "use_cache": True,
            "tie_word_embeddings": True,
            **QWEN,
        },
        {"biases": True, "tied": True},
        theta=1000000.0,
        shift=1,
        block=4,
    ),
    "DreamReasoner": Folder(
        {
            "model_type": "Dream",
            "auto_map": {"AutoConfig": "configuration_dream.C", "AutoModelForCausalLM": "modeling_dream.M"},
            "tie_word_embeddings": False,
            "head_dim": 8,
            "mask_token_id": 2,
            "block_size": 3,
            **QWEN,
        },
        {"head_norms": True},
        theta=1000000.0,
        block=3,
    ),
    "A2D-Llama": Folder({"model_type": "a2d-llama", "tie_word_embeddings": False}, eps=1e-5),
    "LLaDA-MoE": Folder(  # no mask token in its config.json
        {
            "model_type": "llada",
            "architectures": ["LLaDAMoEModelLM"],
            "auto_map": {"AutoConfig": "configuration_lladamoe.C", "AutoModelForCausalLM": "modeling_lladamoe.M"},
            "tie_word_embeddings": False,
            "head_dim": 8,
            "expert_intermediate_size": 64,
            "dense_intermediate_size": 96,
            "shared_expert_intermediate_size": None,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [1, 1],
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            "norm_topk_prob": None,
            "output_router_logits": False,
            "partial_rotary_factor": 1,
            "qk_layernorm": True,
            "router_aux_loss_coef": 0.01,
            "routed_scaling_factor": 1,
        },
        {"head_norms": True, "experts": EXPERTS},
        theta=50000.0,
        eps=1e-5,
    ),
    "LLaDA2": GroupedFolder(  # no mask token in its config.json; 32 tokens of a block are what its code has
        {
            "model_type": "llada2_moe",
            "architectures": ["LLaDA2MoeModelLM"],
            "auto_map": {"AutoConfig": "configuration_llada2_moe.C", "AutoModelForCausalLM": "modeling_llada2_moe.M"},
            "block_size": 4,
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "max_window_layers": 28,
            "moe_intermediate_size": llada2_reference.EXPERT_INNER,
            "moe_router_enable_expert_bias": True,
            "n_group": llada2_reference.GROUPS,
            "norm_topk_prob": True,
            "num_experts": llada2_reference.EXPERTS,
            "num_experts_per_tok": llada2_reference.CHOSEN,
            "num_shared_experts": 1,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
            "rotary_dim": llada2_reference.TURNED,
            "routed_scaling_factor": llada2_reference.FACTOR,
            "router_dtype": "fp32",
            "score_function": "sigmoid",
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "topk_group": llada2_reference.KEPT_GROUPS,
            "use_cache": False,
            "use_qk_norm": True,
            "use_qkv_bias": False,
            "use_sliding_window": False,
        },
        theta=600000.0,
        block=4,
        turned=llada2_reference.TURNED,
    ),
    "Nemotron": Folder(
        {
            "model_type": "nemotron_labs_diffusion",
            "architectures": ["NemotronLabsDiffusionModel"],
            "auto_map": {"AutoConfig": "configuration_nemotron.C", "AutoModel": "modeling_nemotron.M"},
            "ar_loss_weight": 1.0,
            "attention_bias": False,
            "attn_implementation": "sdpa",
            "block_size": 32,
            "dlm_loss_weight": None,
            "dlm_paradigm": "bidirectional",
            "dp_varying_mask_ratio": False,
            "head_dim": 8,
            "mask_token_id": 2,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "mscale": 1.0, "mscale_all_dim": 1.0, **YARN},
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        {"renamed": (("model.", "encoder."), ("lm_head", "diffusion_head"))},
        theta=100.0,
        eps=1e-5,
        yarn=YARN,
    ),
}
IDS = torch.tensor([[5, 2, 9, 11, 2, 2, 7, 3], [1, 0, 2, 4, 8, 2, 13, 29]])
REAL = torch.tensor([[1] * 8, [0, 0, 0] + [1] * 5])
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=FOLDERS)
def folder(request):
    return FOLDERS[request.param]


@pytest.fixture
def path(folder, tmp_path):
    return folder.write(tmp_path / "published")


def logits(model, real=None):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=real).logits


def assert_parity(model, folder, tensors=None):
    """On rows with and without padding; at padded positions there is nothing to compare."""
    for real in (None, REAL):
        expected = folder.logits(folder.published if tensors is None else tensors, IDS, real)
        there = torch.ones_like(IDS).bool() if real is None else real.bool()
        torch.testing.assert_close(logits(model, real)[there], expected[there], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_published_folder_is_the_architecture_in_plain_torch(folder, path, attention):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention)
    assert type(model) is CLASSES[type(model.config)]
    assert model.config.is_causal is False and model.config.use_cache is False
    assert_parity(model, folder)


def test_by_every_auto_class_it_is_the_same_model(folder, path):
    """The published code has it under `AutoModel` too, with its head."""
    expected = logits(AutoModelForCausalLM.from_pretrained(path))
    for auto in (AutoModel, class_to_load(AutoConfig.from_pretrained(path))):
        assert torch.equal(logits(auto.from_pretrained(path)), expected)


def test_tensors_keep_their_published_names_through_shards(folder, path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert saved.keys() == folder.published.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in folder.published.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == folder.fields["model_type"]
    # Where weights lie in memory, which is another place then, may move a rounding
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_after_a_load_are_those_of_theta(folder, path, dtype):
    """transformers builds a model without memory first, and fills what no checkpoint holds."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    found = model.base_model.rotary_emb.inv_freq
    torch.testing.assert_close(found, frequencies(folder.theta, folder.yarn, folder.turned), rtol=1e-6, atol=0)


def test_an_adapter_is_exchanged_by_published_names_and_merges(folder, path, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(r=2, lora_alpha=4, target_modules=family_of(AutoConfig.from_pretrained(path)).lora_target_modules),
    )
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    tensors, merged = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), folder.published
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        merged[f"{target}.weight"] += 2 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]  # alpha / r
    assert len(tensors) == 2 * folder.adapted  # A and B of layers of the blocks, and none on the head
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
    whole = again.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    assert_parity(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), folder, merged)


def test_an_embedding_of_padding_learns(path):
    """It is the end of text in most."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model(input_ids=torch.tensor([[0, 5, 0, 7]])).logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[0].any()


def test_labels_are_of_the_tokens_that_the_logits_predict(folder, path):
    model, labels = AutoModelForCausalLM.from_pretrained(path).eval(), IDS.clone()
    labels[:, :3] = -100
    log_probs = logits(model)[:, 3 - folder.shift : 8 - folder.shift].log_softmax(-1)
    expected = -log_probs.gather(-1, labels[:, 3:, None]).mean()
    torch.testing.assert_close(model(input_ids=IDS, labels=labels).loss.detach(), expected)


def test_layers_to_wrap_are_classes_of_the_model(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    layers = {type(layer).__name__ for layer in model.base_model.layers}
    assert layers == set(model._no_split_modules) and model.supports_gradient_checkpointing


def test_layer_checkpointing_changes_no_gradient(path):
    grads = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(path).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS).logits.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.slow
def test_in_4_bits_head_and_embeddings_are_spared_and_it_reloads(folder, path, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4, dtype=torch.float32)
    linears = [name for name, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == folder.linears and not any("lm_head" in name for name in linears)
    for layer in (quantised.get_input_embeddings(), quantised.get_output_embeddings()):
        assert layer.weight.dtype == torch.float32
    quantised.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.train()(input_ids=IDS).logits, quantised.train()(input_ids=IDS).logits)


def test_memory_is_estimated_from_the_configuration(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    estimate = estimate_memory(model.config, max_length=16, dtype="float32", bf16=False)
    assert estimate.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


# -------------------------------------------------------------------------------------------------------------- shift


def moved(model, shift):
    """The model as a function whose logits stand at the token that they predict, written by hand."""

    def denoise(input_ids, attention_mask=None):
        found = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return torch.stack([found[:, max(i - shift, 0)] for i in range(found.shape[1])], dim=1)

    return denoise


def test_on_every_route_logits_are_moved_once(folder, path):
    """The plain definition, the head of the trainers, and wrappers of the model, against logits moved by hand."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    batch = make_batch()
    maskable = batch["labels"] != -100
    draws = MaskSampler(5)(maskable, batch["input_ids"], batch["attention_mask"], 1, **folder.blocks(batch))
    rows = (batch["input_ids"], maskable, batch["attention_mask"])
    expected = elbo(moved(model, folder.shift), *rows, draws=draws, mask_token_id=2).value
    if folder.block:
        with torch.no_grad():
            numbers = block_numbers(batch, folder.block)
            expected = block_terms(of_model(model), batch, draws, numbers, folder.shift).sum(1)
    targets = family_of(model.config).lora_target_modules
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))  # in place
    for each in (model, wrapped, torch.nn.DataParallel(model), torch.nn.DataParallel(wrapped)):
        value = elbo(each, *rows, draws=draws, mask_token_id=2).value
        torch.testing.assert_close(value, expected, rtol=1e-6 if folder.block else 0, atol=0)
    torch.testing.assert_close(scored(model, batch).elbo.value, expected, rtol=1e-5, atol=1e-5)
    if folder.shift and not folder.block:
        assert not torch.allclose(elbo(moved(model, 0), *rows, draws=draws, mask_token_id=2).value, expected, rtol=0.01)


def test_a_module_of_ones_own_is_asked_for_logits_in_place():
    class Own(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return torch.arange(5.0).view(1, 5, 1).expand(1, 5, 3)

    assert token_logits(Own(), IDS, None, IDS, IDS != 2)[0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_generate_takes_the_first_token_from_the_logits_before_it(folder, path):
    model, prompt = AutoModelForCausalLM.from_pretrained(path).eval(), torch.tensor([[5, 9, 11, 7]])
    arguments = {"max_new_tokens": 1, "mask_token_id": 2, "eos_token_id": [28]}
    answer = model.generate(prompt, **arguments)
    found = model(input_ids=torch.tensor([[5, 9, 11, 7, 2]])).logits[0, 4 - folder.shift].detach()
    found[2] = -torch.inf
    assert answer[0, 4] == found.argmax()
    assert torch.equal(generate(model, prompt, **arguments), answer)


# ------------------------------------------------------------------------------------------------------------ trainers


def trained(path, out, peft_config=None, quantization_config=None, **options):
    """By path, as the scripts do: model, tokenizer and reference are those of the folder."""
    options = {"num_mc_samples": 2, "bf16": False, "use_cpu": True, "report_to": [], "logging_steps": 1, **options}
    arguments = DiffusionVRPOConfig(str(out), learning_rate=1e-2, disable_tqdm=True, save_strategy="no", **options)
    adapting = {"peft_config": peft_config, "quantization_config": quantization_config}
    trainer = DiffusionVRPOTrainer(str(path), args=arguments, train_dataset=make_pairs(4), **adapting)
    trainer.train()
    return trainer


LN2 = torch.tensor(2.0).log().item()


def test_trained_by_path_with_an_adapter(folder, tmp_path):
    """With layer checkpointing, TRL's default. Where config.json has no mask token it is the tokenizer's."""
    by_default = folder.fields["model_type"] in (
        "illada",
        "llada",
        "llada2_moe",
        "Fast_dLLM_Qwen",
    )  # another token of this tokenizer
    mask = {"mask_token_id": 2} if by_default else {}
    path = folder.write(tmp_path / "published", **mask)
    make_tokenizer(with_mask=True).save_pretrained(path)
    trainer = trained(path, tmp_path / "out", LoraConfig(r=2), max_steps=2)
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == LN2 and first["rewards/margins"] == 0.0 and second["loss"] != LN2
    assert trainer.model.config.mask_token_id == 2
    trainer.create_model_card(model_name="mine")
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["iLLaDA", "Dream", "LLaDA-MoE", "Nemotron"])
def test_trained_by_path_with_a_reference_by_path(name, tmp_path):
    path = FOLDERS[name].write(tmp_path / "published", mask_token_id=2)
    make_tokenizer().save_pretrained(path)
    trainer = trained(path, tmp_path / "out", max_steps=1)
    assert type(trainer.ref_model) is type(trainer.model) is CLASSES[type(trainer.model.config)]
    assert trainer.state.log_history[0]["loss"] == LN2


def test_trained_by_the_script(tmp_path):
    path = FOLDERS["iLLaDA"].write(tmp_path / "published", mask_token_id=2)
    make_tokenizer().save_pretrained(path)
    make_pairs(4).to_json(tmp_path / "data" / "train.jsonl")
    arguments = ["--model_name_or_path", str(path), "--dataset_name", str(tmp_path / "data"), "--use_peft"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--num_mc_samples", "2"]
    arguments += ["--bf16", "False", "--use_cpu", "--report_to", "none"]
    vrpo_lora.main(*vrpo_lora.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True))
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter and len(adapter) == 28


# The form of Qwen2.5's template: a system turn where there is none, a turn opened on request
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|> system you are helpful <|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


# LLaDA-MoE's form: no space between turns, and roles that are words
ROLE_TEMPLATE = (
    "{% for m in messages %}<role> {{ 'HUMAN' if m['role'] == 'user' else 'ASSISTANT' }} </role> {{ m['content'] }} "
    "<|role_end|> {% endfor %}{% if add_generation_prompt %}<role> ASSISTANT </role> {% endif %}"
)


@pytest.mark.parametrize(
    ("name", "template", "eos", "expected"),
    [
        ("Dream", QWEN_TEMPLATE, "<|endoftext|>", "two <|im_end|> <|endoftext|>"),  # Dream-v0: the end of text follows
        ("A2D-Qwen3", QWEN_TEMPLATE, "<|im_end|>", "two <|im_end|>"),  # Qwen's instruct models: the turn's end is it
        ("Nemotron", QWEN_TEMPLATE, "<|im_end|>", "two <|im_end|>"),
        ("LLaDA-MoE", ROLE_TEMPLATE, "<|endoftext|>", "two <|role_end|> <|endoftext|>"),
    ],
)
def test_a_conversation_ends_as_the_family_was_taught(name, template, eos, expected, tmp_path):
    """Through TRL's tokenisation; an answer made of its end alone is dropped."""
    special = ["<|endoftext|>", "<|im_start|>", "<|mask|>", "<|im_end|>", "<|role_end|>", "<role>", "</role>"]
    words = [*special, "<unk>", "user", "assistant", "system", "HUMAN", "ASSISTANT", "what", "is", "two", "three"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    model.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, pad_token="<|endoftext|>", unk_token="<unk>", mask_token="<|mask|>"
    )
    tokenizer.chat_template = template
    prompt = [{"role": "user", "content": "what is two"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("two", "three", "")]
    rows = [{"prompt": prompt, "chosen": answers[0], "rejected": answer} for answer in answers[1:]]
    trainer = DiffusionVRPOTrainer(
        FOLDERS[name].model(),
        args=DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (row,) = trainer.train_dataset
    assert tokenizer.decode(row["chosen_ids"]) == expected
    opened = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row["prompt_ids"] == opened and tokenizer.decode(opened).endswith(("> assistant", "ASSISTANT </role>"))


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_of_dream_needs_no_remote_code(tmp_path):
    """A folder as it is published: vocabulary and merges, and the name of a class that is remote code."""
    FOLDERS["Dream"].write(tmp_path)
    letters = [*bytes_to_unicode().values(), "hi", "<|endoftext|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n")
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    settings = {"tokenizer_class": "DreamTokenizer", **special}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is DreamTokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi<|mask|>").input_ids) == ["hi", "<|mask|>"]
    assert tokenizer.mask_token_id == letters.index("<|mask|>")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["<|mask|>", "<|MASK|>"])
def test_a_mask_token_that_is_not_registered_is_found_in_the_vocabulary(name):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([name])
    config = config_of("a2d-qwen3", vocab_size=40)
    assert tokenizer.mask_token_id is None
    assert resolve_mask_token_id(config, tokenizer) == tokenizer.convert_tokens_to_ids(name)
    with pytest.raises(ValueError, match="Neither the model .* nor the tokenizer"):
        resolve_mask_token_id(config, make_tokenizer())


def test_a_mask_token_beside_the_one_in_the_vocabulary():
    """Another special token of the same tokenizer, which is no word."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|mask|>"])
    with pytest.raises(ValueError, match="model's mask token is 5 and the tokenizer's is 30"):
        resolve_mask_token_id(config_of("a2d-qwen3", vocab_size=40, mask_token_id=5), tokenizer)


def config_of(model_type, **fields):
    return AutoConfig.for_model(model_type, **{**SIZES, **fields})


def test_illada_has_its_mask_token():
    assert resolve_mask_token_id(config_of("illada")) == 5


def test_a_word_is_no_mask_token():
    """Of a tokenizer of another family, or from a wrong entry."""
    with pytest.raises(ValueError, match="mask token is 12, which is 'three'.*ordinary.*tokenizer that belongs"):
        resolve_mask_token_id(config_of("illada", mask_token_id=12), make_tokenizer())


def test_a_mask_token_that_the_tokenizer_does_not_have():
    size = len(make_tokenizer())
    with pytest.raises(ValueError, match=f"mask token is {size}, and the tokenizer has {size} tokens"):
        resolve_mask_token_id(config_of("Dream", mask_token_id=size, vocab_size=size + 1), make_tokenizer())


def test_the_unknown_token_is_no_mask_token():
    """What a guess by its name gives for iLLaDA."""
    config = config_of("illada", mask_token_id=make_tokenizer().unk_token_id)
    with pytest.raises(ValueError, match="mask token is 6, which is '<unk>' .*the tokenizer has '<|mdm_mask|>'"):
        check_tokenizer(make_tokenizer(), config)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("iLLaDA", {"layer_norm_eps": 1e-5}, "`layer_norm_eps=1e-05` is not implemented for model_type='illada'"),
        ("iLLaDA", {"resid_pdrop": 0.1}, "`resid_pdrop=0.1` is not implemented"),
        ("iLLaDA", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_scaling=.*plain"),
        ("iLLaDA", {"is_causal": True}, "`is_causal=True` contradicts model_type='illada'"),
        ("Dream", {"use_mrope": True}, "`use_mrope=True` is not implemented"),
        ("Dream", {"use_sliding_window": True}, "`use_sliding_window=True` is not implemented"),
        ("A2D-Llama", {"num_experts": 4}, "`num_experts=4` is not implemented"),
        ("A2D-Qwen3", {"final_logit_softcapping": 30.0}, "`final_logit_softcapping=30.0` is not implemented"),
        ("A2D-Qwen2", {"is_causal": True}, "`is_causal=True` contradicts"),
        ("LLaDA-MoE", {"is_causal": True}, "`is_causal=True` contradicts model_type='llada'"),
        ("Nemotron", {"is_causal": True}, "`is_causal=True` contradicts"),
        ("Nemotron", {"dlm_paradigm": "autoregressive"}, "`dlm_paradigm='autoregressive'` .* causal model.* no ELBO"),
        ("Nemotron", {"attention_bias": True}, "`attention_bias=True` is not implemented"),
        ("Nemotron", {"mlp_bias": True}, "`mlp_bias=True` is not implemented"),
        ("Nemotron", {"sliding_window": 8}, "`sliding_window=8` is not implemented"),
        ("LLaDA-MoE", {"d_model": 32}, "configuration of LLaDA-MoE .*num_experts=4.* not `d_model`"),
        ("LLaDA-MoE", {"architectures": ["LLaDAVModelLM"], "num_experts": None}, "is neither LLaDA .* nor LLaDA-MoE"),
        (
            "LLaDA-MoE",
            {"num_experts_per_tok": 5},
            r"`num_experts_per_tok` \(5\) must be .* at most .* \(4\)",
        ),
        ("LLaDA-MoE", {"moe_layer_freq": [0, 1]}, r"`moe_layer_freq=\[0, 1\]` is not implemented"),
        ("LLaDA-MoE", {"moe_router_enable_expert_bias": True}, "`moe_router_enable_expert_bias=True` is not impl"),
        ("LLaDA-MoE", {"moe_router_score_function": "sigmoid"}, "`moe_router_score_function='sigmoid'` is not impl"),
        ("LLaDA-MoE", {"norm_topk_prob": True}, "`norm_topk_prob=True` is not implemented"),
        ("LLaDA-MoE", {"output_router_logits": True}, "`output_router_logits=True` is not implemented"),
        ("LLaDA-MoE", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor=0.5` is not implemented"),
        ("LLaDA-MoE", {"qk_layernorm": False}, "`qk_layernorm=False` is not implemented"),
        ("LLaDA-MoE", {"routed_scaling_factor": 2.5}, "`routed_scaling_factor=2.5` is not implemented"),
        ("LLaDA-MoE", {"router_num_group": 8}, "`router_num_group=8` is not implemented"),
        ("LLaDA-MoE", {"router_topk_group": 4}, "`router_topk_group=4` is not implemented"),
        ("LLaDA-MoE", {"shared_expert_intermediate_size": 64}, "`shared_expert_intermediate_size=64` is not impl"),
    ],
)
def test_a_configuration_of_another_architecture(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(FOLDERS[name].write(tmp_path, **changes))


def test_a_choice_of_kernels_is_not_taken_from_a_published_configuration(tmp_path):
    path = FOLDERS["A2D-Qwen3"].write(tmp_path, attn_implementation="flex_attention")
    assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "sdpa"


def test_dream_reasoner_is_not_dream(tmp_path):
    path = FOLDERS["Dream"].write(tmp_path, block_size=32, head_dim=8)
    assert family_of(AutoConfig.from_pretrained(path)).name == "DreamReasoner"
    with pytest.raises(ValueError, match="model_type='Dream' lacks .*another architecture"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match=r"`block_size=32` is an entry of DreamReasoner.*`AutoConfig.from_pretrained`"):
        DreamConfig(block_size=32)


def test_nemotron_in_blocks_is_another_model(tmp_path):
    path = FOLDERS["Nemotron"].write(tmp_path, dlm_paradigm="block_diff")
    with pytest.raises(ValueError, match="Nemotron.*dlm_paradigm='block_diff'.*clean text is seen token by token"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "model_type", "message"),
    [
        ("A2D-Qwen3", "a2d-llama", "has, which this architecture has not, 4 tensors.*q_norm|k_norm"),
        ("A2D-Llama", "Dream", "lacks 6 tensors, `model.layers.0.self_attn.k_proj.bias`.*another architecture"),
        ("Dream", "illada", "has, which this architecture has not, 6 tensors"),
    ],
)
def test_tensors_of_another_architecture(name, model_type, message, tmp_path):
    path = FOLDERS[name].write(tmp_path, model_type=model_type, tie_word_embeddings="iLL" in name or "wen3" in name)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("whole", [False, True])
def test_half_of_a_llada_is_none(whole, tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.transformer.blocks.1.q_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if whole or name != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if whole:
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        return
    with pytest.raises(ValueError, match=f"model_type='llada' lacks 1 tensors, `{lost}`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_a_decoder_of_transformers_is_what_its_configuration_says(model_type, tmp_path):
    """Its attention is tried: by default it is that of an autoregressive model. The entry is saved with the model."""
    fields = {**SIZES, "head_dim": 8, "initializer_range": 0.2, "mask_token_id": 2}
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match="attends causally.*`model.config.is_causal = False`"):
        check_denoiser(AutoModelForCausalLM.from_config(config), 2)
    config.is_causal = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_denoiser(class_to_load(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path), 2)


def test_dream_is_found_by_its_configuration_only():
    assert family_of(config_of("Dream")).logit_shift == 1 and family_of(config_of("illada")).logit_shift == 0
    assert CLASSES[type(config_of("Dream"))] is DreamModel
