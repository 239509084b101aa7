"""
The law: an encoder of transformers is scored, trained, sampled and saved as what its own class computes on one row at a
time, by its path alone and under the trainers' defaults.

The oracle is the class of transformers itself, given rows without padding one by one.
"""

import json
from pathlib import Path

import pytest
import test_sft
import torch
from conftest import make_pairs
from datasets import Dataset
from encoders import VOCABULARY, make_encoder, make_encoder_tokenizer, write_encoder
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_head import make_batch, scored
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from trl.trainer.utils import disable_dropout_in_model

from trl_diffusion import (
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    DiffusionVRPOConfig,
    DiffusionVRPOTrainer,
    ELBOKTOConfig,
    ELBOKTOTrainer,
    MaskSampler,
    estimate_memory,
)
from trl_diffusion.models.denoiser import check_denoiser, resolve_mask_token_id
from trl_diffusion.models.dropout import turn_off_dropout
from trl_diffusion.models.encoders import ENCODERS
from trl_diffusion.models.end_of_text import use_end_of_text
from trl_diffusion.models.families import class_to_load, family_of
from trl_diffusion.models.sampler import generate
from trl_diffusion.scoring.precision import keep_differentiable
from trl_diffusion.trainers.loading import find_model, load_model

TRIED = ["bert", "roberta", "distilbert", "modernbert", "electra"]
# Sharing one layer and one embedding, ALBERT has no layer checkpointing in transformers
MODEL_TYPES = [model_type for family in ENCODERS for model_type in family.model_types]
LN2 = torch.tensor(2.0).log().item()


@pytest.fixture(params=TRIED)
def name(request):
    return request.param


@pytest.fixture
def path(name, tmp_path):
    return write_encoder(tmp_path / "published", name)


# ------------------------------------------------------------------------------------------------------------- function


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_lies_before_the_logits_is_in_the_record(model_type, tmp_path):
    """Of every model type that a record names, by the numbers; and it loads by its path."""
    model = make_encoder(model_type)
    check_denoiser(model, 2)
    assert family_of(model.config).auto_class == "AutoModelForMaskedLM"
    model.save_pretrained(tmp_path)
    loaded = class_to_load(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    spared = family_of(model.config).unquantized
    assert all(
        any(part == found or found.startswith(f"{part}.") for found, _ in model.named_modules()) for part in spared
    )


@pytest.mark.parametrize("length", [7, 29])  # ModernBERT here sees two tokens to each side in every other layer
def test_a_score_is_made_of_what_the_class_answers_to_each_row_alone(name, length):
    """
    Rows of different lengths, none of which is padded for the oracle: `sum_k weight * log p` by hand.

    Positions of RoBERTa begin after its padding row, BERT's segments are the first.
    """
    model = make_encoder(name)
    batch = make_batch(lengths=(length, length + 9, 5))
    maskable, real = batch["labels"] != -100, batch["attention_mask"]
    draws = MaskSampler(4)(maskable, batch["input_ids"], real, 1)
    expected = torch.zeros(3)
    for row in range(3):
        size = int(real[row].sum())
        for masked, weight in zip(draws.masked[:, row], draws.weight[:, row], strict=True):
            ids = batch["input_ids"][row].masked_fill(masked, 2)[:size]
            with torch.no_grad():
                log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            of_tokens = log_probs.gather(-1, batch["input_ids"][row, :size, None]).squeeze(-1)
            expected[row] += (weight[:size] * of_tokens * masked[:size]).sum()
    with torch.no_grad():
        value = scored(model, batch, MaskSampler(4)).elbo.value
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_different_length_are_sampled_as_each_is_alone(name):
    """Learnt positions count from the left, where the padding of prompts is."""
    model = make_encoder(name, mask_token_id=2)
    prompts = [[5, 11, 7, 9], [12], [13, 14], [8, 6]]
    ids, real = torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 4 - len(prompt) :], real[row, 4 - len(prompt) :] = torch.tensor(prompt), 1
    arguments = {"max_new_tokens": 6, "steps": 3, "eos_token_id": 3, "cfg_scale": 0.5}
    together = generate(model, ids, attention_mask=real, token_type_ids=torch.zeros_like(ids), **arguments)
    for row, prompt in enumerate(prompts):
        alone = generate(model, torch.tensor([prompt]), **arguments)
        assert together[row, 4:].tolist() == alone[0, len(prompt) :].tolist()


def test_a_second_segment_is_refused():
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="`token_type_ids` has a second segment"):
        generate(make_encoder("bert", mask_token_id=2), ids, token_type_ids=torch.tensor([[0, 1]]), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------------- training


CONFIGURATIONS = {
    DiffusionVRPOTrainer: DiffusionVRPOConfig,
    ELBOKTOTrainer: ELBOKTOConfig,
    DiffusionSFTTrainer: DiffusionSFTConfig,
}


def trained(kind, path, out, peft_config=None, dataset=None, **options):
    """By path alone, with the trainers' defaults: bfloat16 by autocast, layer checkpointing, the folder's tokenizer."""
    config = CONFIGURATIONS[kind]
    options = {"num_mc_samples": 2, "max_steps": 1, "use_cpu": True, "report_to": [], "logging_steps": 1, **options}
    arguments = config(str(out), learning_rate=1e-2, disable_tqdm=True, **options)
    assert arguments.bf16 and arguments.gradient_checkpointing
    rows = make_pairs(4) if dataset is None else dataset
    model = str(path) if isinstance(path, Path) else path
    trainer = kind(model, args=arguments, train_dataset=rows, peft_config=peft_config)
    trainer.train()
    return trainer


def test_trained_by_path_with_an_adapter_that_others_can_use(name, path, tmp_path):
    """
    Names and numbers: the adapter on the class of transformers, without this package, is what was trained. Its task is
    that of most examples, which PEFT has no place for in an encoder.
    """
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM")
    trainer = trained(DiffusionVRPOTrainer, path, tmp_path / "out", adapter, max_steps=2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    trainer.save_model(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stock = dict(make_encoder(name).named_modules())
    targets = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert targets <= set(stock) and any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
    again = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(path), tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 9, 2, 11, 3]])
    with torch.no_grad():
        unwrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        expected = unwrapped.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        merged = again.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_in_memory_is_given_the_tokenizer_where_it_came_from(tmp_path, adapted):
    """Which alone names the mask."""
    model = AutoModelForMaskedLM.from_pretrained(write_encoder(tmp_path / "published", "bert"))
    model = get_peft_model(model, LoraConfig(r=2)) if adapted else model
    trainer = trained(DiffusionVRPOTrainer, model, tmp_path / "out")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert trainer.model.config.mask_token_id == trainer.processing_class.mask_token_id == 2


class Towers(PreTrainedModel):
    """A backbone of torch's own layers, which asks for tokens only and has a number for the dropout of attention."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.5, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return BaseModelOutput(self.layers(self.embed(input_ids)))


class TowersForMaskedLM(PreTrainedModel):
    config_class = PreTrainedConfig
    base_model_prefix = "towers"

    def __init__(self, config):
        super().__init__(config)
        self.towers, self.head = Towers(config), torch.nn.Linear(32, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """As torch made them."""

    def get_input_embeddings(self):
        return self.towers.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        return MaskedLMOutput(logits=self.head(self.towers(input_ids).last_hidden_state))


def train_towers(folder, **options):
    torch.manual_seed(0)
    model = TowersForMaskedLM(PreTrainedConfig(vocab_size=len(VOCABULARY), mask_token_id=2))
    peft_config = options.pop("peft_config", None)
    options = {"use_cpu": True, "report_to": [], "max_steps": 1, "logging_steps": 1, "num_mc_samples": 2, **options}
    arguments = DiffusionVRPOConfig(str(folder), **options)
    rows, tokenizer = make_pairs(4), make_encoder_tokenizer()
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft_config}
    trainer = DiffusionVRPOTrainer(model, args=arguments, **given)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["linear1"])], ids=["all", "adapter"])
def test_an_encoder_of_ones_own(tmp_path, adapter):
    """Of whose classes nothing is known: dropout is off, and training starts at its reference to the last bit."""
    assert train_towers(tmp_path, peft_config=adapter, gradient_checkpointing=False) == LN2


def test_layers_that_have_no_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="nothing that `TowersForMaskedLM` can do.*`gradient_checkpointing=False`"):
        train_towers(tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dropout_that_is_no_module_is_turned_off(model_type):
    """That of attention in stock classes: after TRL's step, which is for modules, and this one nothing is random."""
    model = make_encoder(model_type, attention_dropout=0.5, attention_probs_dropout_prob=0.5).train()
    assert_silenced(model)


def test_dropout_of_adapters_is_turned_off():
    config = LoHaConfig(r=2, rank_dropout=0.5, module_dropout=0.5, init_weights=False, target_modules=["query"])
    assert_silenced(get_peft_model(make_encoder("bert", hidden_dropout_prob=0.0), config).train())


def assert_silenced(model):
    ids = torch.arange(9, 25).unsqueeze(0)

    def logits():
        return model(input_ids=ids).logits

    with torch.no_grad():
        assert not torch.equal(logits(), logits())
        disable_dropout_in_model(model)
        turn_off_dropout(model)
        assert torch.equal(logits(), logits())


def test_trained_whole_and_saved_as_what_transformers_loads(name, path, tmp_path):
    trainer = trained(ELBOKTOTrainer, path, tmp_path / "out", dataset=unpaired(), per_device_train_batch_size=4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    trainer.save_model(tmp_path / "saved")
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import AutoModelForMaskedLM" in card and "apply_chat_template" not in card
    assert 'tokenizer("[CLS] Why is the sky blue?", add_special_tokens=False, ' in card  # without a [SEP] after it
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in trainer.model.state_dict().items())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # tied, as it was
    assert loaded.config.mask_token_id == 2 and loaded.config.eos_token_id == 3  # what `generate` asks for
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "[SEP]"


def test_answers_are_imitated(tmp_path):
    """The first loss is minus the ELBO of a token by the definition in float32, to bfloat16's one part in 2^8."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path = write_encoder(tmp_path / "published", "roberta", **no_dropout)
    options = {"dataset": test_sft.make_completions(4), "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = trained(DiffusionSFTTrainer, path, tmp_path / "out", **options)
    inputs = test_sft.batch_of(trainer, range(4))
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    model.config.mask_token_id = 2
    expected = test_sft.by_hand(model, trainer, inputs, 1, "tokens")
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(expected.item(), rel=2**-8) and second != first
    assert [row["labels"][-1] for row in trainer.train_dataset] == [3] * 4  # [SEP]
    trainer.save_model(tmp_path / "saved")
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")) is type(trainer.model)


def unpaired():
    return Dataset.from_dict(
        {
            "prompt": ["what is one", "what is two", "say", "what is red"],
            "completion": ["two", "three four", "hi", "blue"],
            "label": [True, False, True, False],
        }
    )


def test_a_text_ends_where_the_tokenizer_ends_it():
    """BERT's names no end of text; a tokenizer that names one keeps it."""
    tokenizer = make_encoder_tokenizer()
    use_end_of_text(tokenizer)
    assert tokenizer.eos_token == "[SEP]"
    named = make_encoder_tokenizer(eos_token="[UNK]")
    use_end_of_text(named)
    assert named.eos_token == "[UNK]"


def test_rows_begin_and_end_once(tmp_path):
    path = write_encoder(tmp_path / "published", "bert")
    trainer = trained(DiffusionVRPOTrainer, path, tmp_path / "out")
    tokenizer = trainer.processing_class
    for row in trainer.train_dataset:
        words = tokenizer.convert_ids_to_tokens(row["prompt_ids"] + row["chosen_ids"])
        assert words[0] == "[CLS]" and words[-1] == "[SEP]" and len({*words} & {"[CLS]", "[SEP]"}) == 2
        assert words.count("[CLS]") == words.count("[SEP]") == 1
    assert tokenizer.chat_template is None  # texts need none


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_conversations_are_written_with_a_template_that_is_given(model_type, tmp_path):
    """Through TRL's tokenisation; it is saved with the tokenizer."""
    path = write_encoder(tmp_path / "published", model_type)
    prompt = [{"role": "system", "content": "say hi"}, {"role": "user", "content": " what is two "}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("two", "three"))
    rows = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}] * 2)
    trainer = trained(DiffusionVRPOTrainer, path, tmp_path / "out", dataset=rows)
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert tokenizer.decode(row["prompt_ids"]) == "[CLS] system : say hi [SEP] user : what is two [SEP] assistant :"
    assert tokenizer.decode(row["chosen_ids"]) == "two [SEP]" and tokenizer.decode(row["rejected_ids"]) == "three [SEP]"
    trainer.save_model(tmp_path / "saved")
    trainer.create_model_card()
    assert "apply_chat_template" in (tmp_path / "out" / "README.md").read_text()
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    marked = saved.apply_chat_template([*prompt, *chosen], return_assistant_tokens_mask=True, return_dict=True)
    answer = [id for id, chosen in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if chosen]
    assert saved.decode(answer) == "two [SEP]"


# -------------------------------------------------------------------------------------------------------------- loading


def test_a_checkpoint_of_old_loads_whole(tmp_path):
    """As BERT was published: LayerNorm with gamma and beta, and the heads of its other objectives."""
    model = make_encoder("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("cls.predictions.decoder.")
    }
    old |= {"bert.pooler.dense.weight": torch.randn(32, 32), "cls.seq_relationship.weight": torch.randn(2, 32)}
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in old.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    loaded = load_model(find_model(str(tmp_path), {}), {"device_map": None}).eval()
    ids = torch.tensor([[1, 9, 2, 11, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_encoder_without_its_head_is_refused(tmp_path):
    """transformers would make one up, and only warn."""
    make_encoder("bert").bert.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [BertModel.__name__]
    with pytest.raises(
        ValueError, match=r"model_type='bert' lacks \d tensors, `cls.predictions.bias`.*`BertForMaskedLM`"
    ):
        load_model(find_model(str(tmp_path), {}), {"device_map": None})


class OwnConfig(BertConfig):
    model_type = "of-ones-own"


class OwnForMaskedLM(BertForMaskedLM):
    config_class = OwnConfig


def test_a_class_of_ones_own_loads_from_its_folder(tmp_path):
    """Once it is registered, under whichever auto class; it needs no record here for that."""
    AutoConfig.register("of-ones-own", OwnConfig, exist_ok=True)
    AutoModelForMaskedLM.register(OwnConfig, OwnForMaskedLM, exist_ok=True)
    OwnForMaskedLM(OwnConfig(**make_encoder("bert").config.to_diff_dict() | {"model_type": "x"})).save_pretrained(
        tmp_path
    )
    source = find_model(str(tmp_path), {})
    assert class_to_load(source.config) is AutoModelForMaskedLM
    assert type(load_model(source, {"device_map": None})) is OwnForMaskedLM


def test_the_mask_token_of_the_tokenizer_counts(path):
    config = AutoConfig.from_pretrained(path)
    assert getattr(config, "mask_token_id", None) is None
    assert resolve_mask_token_id(config, AutoTokenizer.from_pretrained(path)) == VOCABULARY.index("[MASK]")


@pytest.mark.slow
def test_in_4_bits_head_and_embeddings_are_spared_and_it_reloads(path, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": nf4, "dtype": "float32", "device_map": None}
    quantised = load_model(find_model(str(path), {}), options).eval()
    keep_differentiable(quantised)  # as the trainers do
    linears = [name for name, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    blocks = [name for name, m in make_encoder(path_type(path)).named_modules() if type(m) is torch.nn.Linear]
    head = family_of(quantised.config).unquantized
    assert linears == [name for name in blocks if not name.startswith(head)] and linears
    for layer in (quantised.get_input_embeddings(), quantised.get_output_embeddings()):
        assert layer.weight.dtype == torch.float32
    check_denoiser(quantised, 2)
    quantised.save_pretrained(tmp_path / "saved")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    keep_differentiable(again)
    ids = torch.tensor([[1, 9, 2, 11, 3]])
    assert torch.equal(again(input_ids=ids).logits, quantised(input_ids=ids).logits)


def path_type(path):
    return json.loads((path / "config.json").read_text())["model_type"]


def test_memory_is_estimated_from_the_configuration(path):
    model = AutoModelForMaskedLM.from_pretrained(path)
    estimate = estimate_memory(model.config, max_length=16, dtype="float32", bf16=False)
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert estimate.weights == sum(held.values())


def test_adapters_reach_every_layer_and_not_the_head(name):
    model = make_encoder(name)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=family_of(model.config).lora_target_modules))
    found = [key for key, module in adapted.named_modules() if hasattr(module, "lora_A")]
    head = model.get_output_embeddings()
    assert not hasattr(head, "lora_A") and len(found) >= 2 * 4
