"""
What holds for every batch, tried on batches that nobody chose: rows do not know of each other, of padding or of their
order; weights keep the law of their scheme; the parts of an ELBO sum to it; text goes through the tokenizer as it is.
"""

import random

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainers import make_trainer

from trl_diffusion import draw_masks, elbo
from trl_diffusion.checks.options import DPO_LOSS_TYPES, check_options
from trl_diffusion.estimators.draws import MaskSampler
from trl_diffusion.estimators.schemes import SCHEMES
from trl_diffusion.scoring.head import ELBOHead

# The same examples in every run, and no database beside the tests
settings.register_profile("suite", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("suite")

MASK, PAD = 2, 0
MODEL = make_model()
estimators = st.tuples(st.sampled_from(sorted(SCHEMES)), st.booleans(), st.integers(1, 16), st.integers(0, 2**31))


@st.composite
def rows(draw, max_rows=5, max_length=512):
    """Token ids and the length of the prompt of each row; some rows may be the same."""
    made = []
    for _ in range(draw(st.integers(1, max_rows))):
        length = draw(st.one_of(st.integers(2, 12), st.integers(2, max_length)))
        ids = random.Random(draw(st.integers(0, 2**20))).choices(range(3, 30), k=length)
        made.append((tuple(ids), draw(st.integers(1, length - 1))))
    if draw(st.booleans()):
        made.append(made[0])
    return made


def padded(made, side="right", extra=0):
    """`input_ids`, `maskable` and `attention_mask`, padded on a side and by more than is needed."""
    width = max(len(ids) for ids, _ in made) + extra
    batch = torch.full((len(made), width), PAD)
    maskable, real = torch.zeros(2, len(made), width, dtype=torch.bool)
    for i, (ids, prompt) in enumerate(made):
        start = 0 if side == "right" else width - len(ids)
        batch[i, start : start + len(ids)] = torch.tensor(ids)
        real[i, start : start + len(ids)] = True
        maskable[i, start + prompt : start + len(ids)] = True
    return batch, maskable, real


def draws_of(made, estimator, nonce=0, **padding):
    scheme, stratify, num_mc_samples, seed = estimator
    ids, maskable, real = padded(made, **padding)
    draws = MaskSampler(num_mc_samples, scheme, stratify, seed)(maskable, ids, real, nonce)
    return [(draws.masked[:, i][:, real[i]], draws.weight[:, i][:, real[i]]) for i in range(len(made))], draws, maskable


@given(rows(), estimators, st.integers(0, 2**40), st.sampled_from(["left", "right"]), st.integers(0, 9), st.randoms())
@settings(max_examples=60)
def test_draws_of_a_row_do_not_depend_on_the_batch(made, estimator, nonce, side, extra, shuffler):
    alone = [draws_of([row], estimator, nonce)[0][0] for row in made]
    order = list(range(len(made)))
    shuffler.shuffle(order)
    together, *_ = draws_of([made[i] for i in order], estimator, nonce, side=side, extra=extra)
    for i, (masked, weight) in zip(order, together, strict=True):
        assert torch.equal(masked, alone[i][0]) and torch.equal(weight, alone[i][1])


@given(rows(), estimators)
@settings(max_examples=60)
def test_weights_keep_the_invariants_of_their_scheme(made, estimator):
    """Nothing but responses is hidden, a weight is one number for a draw, and counts or levels are what they say."""
    scheme, stratify, num_mc_samples, _ = estimator
    _, draws, maskable = draws_of(made, estimator)
    assert not (draws.masked & ~maskable).any()
    assert torch.equal(draws.weight > 0, draws.masked) and torch.isfinite(draws.weight).all()
    for i, row in enumerate(maskable):
        length = int(row.sum())
        hidden, weight = draws.masked[:, i].sum(-1), draws.weight[:, i].amax(-1)
        assert torch.equal(draws.weight[:, i][draws.masked[:, i]], weight.repeat_interleave(hidden))
        weight = weight * num_mc_samples
        if scheme == "bernoulli":
            assert (weight[hidden > 0] > 1 - 1e-6).all()  # 1/t with t at most one
            continue
        torch.testing.assert_close(weight * hidden, torch.full_like(weight, length), rtol=1e-6, atol=0)
        units = hidden
        if scheme == "mirror":  # the second of a pair hides what the first shows, and one token more
            units, pairs = hidden[::2], num_mc_samples // 2
            assert torch.equal(hidden[1::2], length + 1 - units[:pairs])
        if stratify:  # evenly spaced
            gaps = units.sort().values.diff()
            assert ((gaps - length / len(units)).abs() < 1).all()


@given(rows(max_rows=3, max_length=24), estimators)
@settings(max_examples=25)
def test_the_parts_of_an_elbo_sum_to_it_and_a_row_is_scored_alone(made, estimator):
    """The plain definition and the head, any batch and the row alone: one number, to float32 rounding."""
    scheme, stratify, num_mc_samples, seed = estimator
    ids, maskable, real = padded(made)
    sampler = MaskSampler(num_mc_samples, scheme, stratify, seed)
    draws = sampler(maskable, ids, real)
    with torch.no_grad():
        out = elbo(MODEL, ids, maskable, real.long(), draws=draws)
        labels = ids.masked_fill(~maskable, -100)
        heads = ELBOHead(sampler, MASK)(MODEL, ids, labels, real.long())
        alone = [
            ELBOHead(sampler, MASK)(MODEL, *(x[i : i + 1][:, real[i]] for x in (ids, labels))) for i in range(len(made))
        ]
    scale = out.terms.abs().sum().item() + 1
    torch.testing.assert_close(out.terms.sum(-1), out.value, rtol=0, atol=0)
    torch.testing.assert_close(out.samples.mean(0), out.value, rtol=1e-5, atol=1e-6 * scale)
    assert (out.terms[~maskable] == 0).all() and (out.terms <= 0).all()
    torch.testing.assert_close(heads.log_probs.sum(-1), out.value, rtol=1e-5, atol=1e-6 * scale)
    alone = torch.cat([each.log_probs.sum(-1) for each in alone])
    torch.testing.assert_close(
        heads.log_probs.sum(-1), alone, rtol=1e-6, atol=1e-6
    )  # draws are summed in another order


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=12)
def test_any_text_goes_through_the_data_path(folder, texts):
    """Every row is in the training set with the ids of its own text; the one with a mask in it is dropped."""
    tokenizer, mask = make_tokenizer(), "<|mdm_mask|>"
    usable = [{"prompt": "say " + p + " ", "chosen": "one " + c, "rejected": "two " + r} for p, c, r in texts]
    dataset = Dataset.from_list([*usable, {"prompt": "x ", "chosen": f"one {mask}", "rejected": "two"}])
    trainer = make_trainer(folder, dataset=dataset)
    assert len(trainer.train_dataset) == len(usable)
    for row, prepared in zip(usable, trainer.train_dataset, strict=True):
        for name in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[name] + tokenizer.eos_token)["input_ids"]
            assert prepared["prompt_ids"] + prepared[f"{name}_ids"] == ids
            assert prepared[f"{name}_ids"][-1] == tokenizer.eos_token_id


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.floats(), max_size=2)
)


NUMBERS = ["beta", "max_length", "draw_seed", "per_device_train_batch_size", "label_smoothing", "num_mc_samples"]


@given(st.sampled_from(NUMBERS), VALUES)
@settings(max_examples=200)
def test_option_checks_refuse_or_accept_and_never_break(folder, name, value):
    from trl_diffusion import DiffusionVRPOConfig
    from trl_diffusion.trainers.arguments import ELBOArguments

    args = DiffusionVRPOConfig(str(folder), bf16=False, use_cpu=True, loss_type="robust")
    setattr(args, name, value)
    try:
        check_options(args, DPO_LOSS_TYPES, ELBOArguments)
    except ValueError as error:
        assert f"`{name}`" in str(error) and repr(value) in str(error)
    else:
        assert not isinstance(value, str | list | bool)


@given(rows(max_rows=2, max_length=16), st.integers(1, 16), st.integers(0, 2**31))
@settings(max_examples=20)
def test_another_nonce_is_another_draw_and_the_same_is_the_same(made, num_mc_samples, seed):
    ids, maskable, real = padded(made)

    def masks(nonce):
        return draw_masks(maskable, num_mc_samples, "bernoulli", seed=seed, rows=ids, attention_mask=real, nonce=nonce)

    assert torch.equal(masks(3).masked, masks(3).masked) and torch.equal(masks(3).weight, masks(3).weight)
    differ = [not torch.equal(masks(3).weight, masks(nonce).weight) for nonce in (0, 1, 2, 4, 2**40 + 3)]
    # A draw in which nothing is hidden has no weight to tell it from another of that kind
    assert any(differ) or not masks(3).masked.any()
