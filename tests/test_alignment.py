"""
The law: logits that stand elsewhere than the family says are found on a trainer's own data; no other model is refused.

The model knows one thing: a number is followed by the next. It is given as one that puts what it knows at the token,
and as one that puts it one place before, as models made from autoregressive ones do.
"""

import pytest
import torch
from conftest import make_pairs, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_families import make_llama
from test_trainers import make_trainer

from trl_diffusion.models import families
from trl_diffusion.models.alignment import check_shift
from trl_diffusion.models.families import FAMILIES
from trl_diffusion.models.family import Family

SHIFTED = Family(name="shifted", model_types=("llama",), logit_shift=1)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_counter(shift):
    """A Llama whose layers add next to nothing: logits are of the token there, or of the one before."""
    model = make_llama(tie_word_embeddings=False)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 1e-3
    embedding, head = torch.eye(30, 32), torch.zeros(30, 32)
    head[1:, :29] = 2 * torch.eye(29)  # after token i comes i + 1
    model.get_input_embeddings().weight.data, model.lm_head.weight.data = embedding, head
    if shift == 0:
        model.model.norm.register_forward_hook(lambda module, args, hidden: hidden.roll(1, dims=1))
    return model.eval()


def rows(n=4, start=9, length=16):
    return [(list(range(start, start + 3)), list(range(start + 3, start + length))) for _ in range(n)]


def use(family, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [family, *FAMILIES])


@pytest.mark.parametrize("shift", [0, 1])
def test_a_wrong_shift_is_found_and_a_right_one_accepted(shift, monkeypatch):
    model = make_counter(shift)
    with pytest.MonkeyPatch.context() as patch:
        use(Family(name="mine", model_types=("llama",), logit_shift=1 - shift), patch)
        with pytest.raises(ValueError, match=rf"\(mine, `logit_shift={1 - shift}`\).* with `logit_shift={shift}`"):
            check_shift(model, rows(), 2)
        with pytest.raises(ValueError, match="autoregressive"):
            check_shift(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), rows(), 2)
    use(Family(name="mine", model_types=("llama",), logit_shift=shift), monkeypatch)
    check_shift(model, rows(), 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_model_that_has_learnt_nothing_is_not_refused(seed, monkeypatch):
    """Whatever its weights happen to prefer."""
    torch.manual_seed(seed)
    model = make_llama(tie_word_embeddings=bool(seed % 2))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for family in (Family(), SHIFTED):
        with pytest.MonkeyPatch.context() as patch:
            use(family, patch)
            check_shift(model, rows(), 2)


def test_a_model_that_copies_what_it_sees_is_not_refused():
    """At a token that repeats the one before it, logits of the token before are right without predicting anything."""
    model = make_counter(1)
    model.lm_head.weight.data = 2 * torch.eye(30, 32)  # says what stands there; of a hidden token, nothing
    check_shift(model, [([9], [10, *[11] * 40])] * 4, 2)


@pytest.mark.parametrize("some", [[], [([5], [6])]], ids=["none", "one token"])
def test_too_little_text_has_no_verdict(some):
    check_shift(make_counter(1), some, 2)


def test_a_trainer_finds_it(tmp_path):
    text = {"prompt": ["zero "] * 4, "chosen": [" ".join(NUMBERS[1:])] * 4, "rejected": ["red"] * 4}
    with pytest.raises(ValueError, match="`logit_shift=0`.*`model_type='llama'` is not its family"):
        make_trainer(tmp_path, make_counter(1), dataset=Dataset.from_dict(text))
    make_trainer(tmp_path, make_counter(0), dataset=Dataset.from_dict(text))
    assert len(make_tokenizer()) == 30 and len(make_pairs())  # the vocabulary of the counter
