"""
The law: however a head comes by its logits, the score is made of what it answers when it is called.

Quantised, adapted, wrapped and offloaded heads look like a matrix, and are none. Expected values are those of
[`elbo`] on the logits of the whole model.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import make_model
from counters import LiveBytes
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from test_families import assert_same_gradients, make_llama
from test_head import gradients, make_batch, scored
from test_trainers import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_diffusion import LLaDAModelLM, MaskSampler, elbo
from trl_diffusion.models.denoiser import check_denoiser
from trl_diffusion.models.families import spare_in_quantization
from trl_diffusion.scoring import output_head
from trl_diffusion.scoring.output_head import token_log_probs
from trl_diffusion.scoring.precision import keep_differentiable

QUANTIZED = {
    # A list that a user gives takes the place of the one that spares the head
    "8 bits": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["wte"]),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["wte"]),
}
ADAPTED = {
    "LoRA on the head": LoraConfig(r=2, target_modules=["q_proj", "ff_out"], init_lora_weights=False),
    "head saved whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["transformer.ff_out"]),
    "tokens of the head": TrainableTokensConfig(target_modules=["transformer.ff_out"], token_indices=[7, 9]),
    "tokens beside LoRA": LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"wte": [7], "transformer.ff_out": [7]}
    ),
}


def plain(model, batch, sampler=None):
    maskable = batch["labels"] != -100
    draws = (sampler or MaskSampler(5))(maskable, batch["input_ids"], batch["attention_mask"], 1)
    return elbo(model, batch["input_ids"], maskable, batch["attention_mask"], draws=draws)


def load(path, quantization):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32)
    keep_differentiable(model)  # as the trainers do
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(d_model=64, mlp_hidden_size=128).save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_quantised_head_is_called(checkpoint, bits):
    """
    On equal rows it is what the head answers. Whole rows run through quantised layers too, which round their input
    with what else is in the batch: there the two ways agree to a hundredth.
    """
    model = load(checkpoint, QUANTIZED[bits])
    head = model.get_output_embeddings()
    assert not head.weight.is_floating_point()
    hidden, targets = torch.randn(9, 64), torch.arange(9) + 6
    with torch.no_grad():
        expected = head(hidden).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        log_probs = token_log_probs(model, hidden, torch.arange(9), targets)
    torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-6)
    check_denoiser(model, 2)
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = scored(model, batch).elbo.value, plain(model, batch).value
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", QUANTIZED)
def test_a_family_spares_its_head_whatever_list_is_given(checkpoint, bits):
    given = QUANTIZED[bits]
    spared = spare_in_quantization(given, make_model().config)
    model = load(checkpoint, spared)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    quantised = {name for name, module in model.named_modules() if "bit" in type(module).__name__}
    assert len(quantised) == 14  # every linear layer of the blocks, `ff_out` among them
    assert given.llm_int8_skip_modules == ["wte"]  # the user's own is as it was
    assert spare_in_quantization(given, make_llama().config) is given


@pytest.mark.parametrize("adapter", ADAPTED)
@pytest.mark.parametrize("mode", ["graph", "checkpoint", "immediate"])
def test_an_adapted_head_is_scored_and_trained(adapter, mode):
    adapted = get_peft_model(make_model(), ADAPTED[adapter])
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # as after some steps
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    base, batch = adapted.get_base_model().eval(), make_batch()
    check_denoiser(base, 2)
    output, expected = scored(base, batch, elbo_gradient=mode), plain(base, batch)
    torch.testing.assert_close(output.log_probs, expected.terms[:, 1:], rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(base, output.log_probs.sum()), gradients(base, expected.value.sum())
    assert_same_gradients(ours, theirs)
    assert any("ff_out" in name and "blocks" not in name and gradient.any() for name, gradient in ours.items())
    with adapted.disable_adapter(), torch.no_grad():
        reference = scored(base, batch).log_probs
    torch.testing.assert_close(reference, scored(make_model(), batch).log_probs, rtol=1e-5, atol=1e-5)


def test_tokens_of_the_head_are_trained_by_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=ADAPTED["tokens beside LoRA"], max_steps=2, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == torch.tensor(2.0).log().item()
    after = dict(trainer.model.named_parameters())
    moved = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert any("transformer.ff_out.token_adapter" in name for name in moved)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_head_is_scored(tmp_path, offload):
    """Its weight is on the meta device, and is there only while the layer runs."""
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        expected = scored(model, batch).log_probs
        if offload == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        assert model.get_output_embeddings().weight.is_meta
        check_denoiser(model, 2)
        torch.testing.assert_close(scored(model, batch).log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_the_kernel_runs_where_the_head_is():
    """Triton launches on the current device, which is the first; the model is on the last, and need not be the same."""
    model, batch = make_model(), make_batch()
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.no_grad():
        expected = scored(model, batch).log_probs
        there = scored(model.to(device), {name: value.to(device) for name, value in batch.items()}).log_probs
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(there.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_elsewhere_are_not_tried():
    with torch.device("meta"):
        check_denoiser(LLaDAModelLM(make_model().config), 2)
    emptied = make_model()
    emptied.get_output_embeddings().weight.data = torch.empty(0)  # what ZeRO-3 leaves of a weight
    check_denoiser(emptied, 2)


def test_something_hooked_to_a_plain_head_is_refused():
    for change in (lambda logits: 2 * logits, lambda logits: logits.roll(1, -1)):
        model = make_model()
        model.get_output_embeddings().register_forward_hook(lambda _, args, logits, change=change: change(logits))
        with pytest.raises(ValueError, match="does not answer with its input times its weight.*Remove the hook"):
            check_denoiser(model, 2)
    harmless = make_model()
    harmless.get_output_embeddings().register_forward_hook(lambda _, args, logits: logits + 0.0)
    check_denoiser(harmless, 2)


def test_a_forward_of_its_own_is_called():
    model, batch = make_model(), make_batch()
    head = model.get_output_embeddings()
    head.forward = lambda hidden: 2 * torch.nn.functional.linear(hidden, head.weight)
    check_denoiser(model, 2)
    torch.testing.assert_close(scored(model, batch).log_probs, plain(model, batch).terms[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_backbone_that_hides_its_hidden_states_is_refused():
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda **kwargs: {"logits": forward(**kwargs).last_hidden_state}
    model.forward = lambda input_ids: type("Output", (), {"logits": torch.randn(1, 8, 30)})
    with pytest.raises(ValueError, match="`LLaDAModel`, does not return a `last_hidden_state` but a `dict`"):
        check_denoiser(model, 2)


def test_modes_of_modules_are_left_as_they_were():
    model = make_model().train()
    model.model.transformer["blocks"][0].eval()
    modes = [module.training for module in model.modules()]
    check_denoiser(model, 2)
    model.generate(torch.tensor([[5, 7]]), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_calling_the_head_holds_a_tile_of_logits(monkeypatch):
    """With 64 masked tokens at once, forward and backward; a tile is 4 of them."""
    vocab, tokens = 5000, 64
    monkeypatch.setattr(output_head, "LOGITS_TILE", 4 * vocab)
    model = make_model(vocab_size=vocab)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(False)  # its gradient would be a tensor of the weight's size
    hidden = torch.randn(tokens, 32, requires_grad=True)
    targets = torch.randint(6, vocab, (tokens,))
    head.forward = lambda rows: torch.nn.functional.linear(rows, head.weight)
    with LiveBytes() as memory:
        token_log_probs(model, hidden, torch.arange(tokens), targets).sum().backward()
    tile = 4 * vocab * 4
    # In a backward: the logits, their gradient, and what log-sum-exp and its gradient make of them
    assert memory.largest == tile and memory.peak < 6 * tile < tokens * vocab * 4
