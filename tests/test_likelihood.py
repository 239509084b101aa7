"""The likelihood of texts against enumeration and loops written by hand; windows, bytes, and what is kept."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from block_reference import block_log_probs, numbers_of, of_model
from conftest import make_model, make_tokenizer
from datasets import Dataset
from oracles import subsets
from peft import LoraConfig, get_peft_model
from processes import run_forked
from test_decoders import FOLDERS
from test_tokens import ADDED, adding

from trl_diffusion import Likelihood, likelihood
from trl_diffusion.evaluation import likelihood as module
from trl_diffusion.evaluation.windows import windows_of

MASK = 2
TEXTS = ["what is one plus", "say hi", "red green blue you say"]


def score(texts=TEXTS, *, model=None, tokenizer=None, **options):
    tokenizer = adding(ADDED[tokenizer][0]) if tokenizer else make_tokenizer()
    return likelihood(model or make_model(), tokenizer, texts, **options)


def log_probs(model, ids, hidden):
    """Of the tokens at `hidden`, with these hidden."""
    noised = torch.tensor([[MASK if i in hidden else token for i, token in enumerate(ids)]])
    found = model(noised).logits[0].double().log_softmax(-1)
    return {i: found[i, ids[i]].item() for i in hidden}


def by_chain_rule(model, ids, order):
    return sum(log_probs(model, ids, order[j:])[order[j]] for j in range(len(order)))


def exact_elbo(model, ids):
    """Over every mask."""
    number = len(ids)
    weights = {m: 1 / (len(m) * math.comb(number, len(m))) for m in subsets(number)}
    return sum(weight * sum(log_probs(model, ids, m).values()) for m, weight in weights.items())


@torch.no_grad()
def test_the_elbo_is_the_mean_of_the_chain_rule_over_all_orders():
    """RADD's equivalence, by enumeration of both; the estimate is within its errors of it."""
    model, ids = make_model(), make_tokenizer()(TEXTS[0])["input_ids"]
    orders = [by_chain_rule(model, ids, order) for order in itertools.permutations(range(4))]
    exact = sum(orders) / len(orders)
    assert exact_elbo(model, ids) == pytest.approx(exact, rel=1e-6)
    found = [score([TEXTS[0]], model=model, num_mc_samples=14, seed=seed) for seed in range(32)]
    mean = sum(each.nats for each in found) / 32
    error = math.sqrt(sum(each.standard_error**2 for each in found)) / 32
    assert 0 < error < 0.2 and abs(mean - exact) < 4 * error


@torch.no_grad()
def test_a_text_with_no_more_masks_than_draws_is_scored_exactly():
    """Under every mask once; an answer of one token by one forward."""
    model, rows = make_model(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: rows.append(len(output)))
    for text, tokens in ((TEXTS[0], 4), ("hi", 1)):
        ids = make_tokenizer()(text)["input_ids"]
        exact = exact_elbo(make_model(), ids)
        score([text], model=model, num_mc_samples=1)  # and what it takes to try a model
        tried = len(rows) - 1
        rows.clear()
        found = score([text], model=model, num_mc_samples=15)
        assert found.nats == pytest.approx(exact, rel=1e-6) and found.standard_error == 0
        assert sum(rows[tried:]) == 2**tokens - 1
        rows.clear()


@torch.no_grad()
@pytest.mark.parametrize("method", ["t_dce", "lambda_dce", "k_dce"])
def test_the_losses_of_radd_are_one_in_expectation(method):
    """t-DCE, lambda-DCE and k-DCE against the ELBO over every mask."""
    model, ids = make_model(), make_tokenizer()(TEXTS[0])["input_ids"]
    found = score([TEXTS[0]], model=model, method=method, num_mc_samples=512)
    assert 0 < found.standard_error < 1 and abs(found.nats - exact_elbo(model, ids)) < 4 * found.standard_error


@torch.no_grad()
@pytest.mark.parametrize("method", ["elbo", "chain_rule"])
def test_guidance_by_the_prompt(method):
    """With logits added by hand, over every mask and in order; without strength nothing changes."""
    model, rows = make_model(), Dataset.from_dict({"prompt": ["what is "], "completion": ["one plus two"]})
    ids, weight = make_tokenizer()("what is one plus two")["input_ids"], 0.7

    class Guided:
        def __call__(self, noised):
            alone = noised.clone()
            alone[:, :2] = MASK
            return SimpleNamespace(logits=(1 + weight) * model(noised).logits - weight * model(alone).logits)

    hidden = [tuple(2 + i for i in m) for m in subsets(3)]
    exact = sum(sum(log_probs(Guided(), ids, m).values()) / (len(m) * math.comb(3, len(m))) for m in hidden)
    exact = by_chain_rule(Guided(), ids, [2, 3, 4]) if method == "chain_rule" else exact
    found = score(rows, model=model, method=method, num_mc_samples=256, cfg_scale=weight)
    plain = score(rows, model=model, method=method, num_mc_samples=256)
    assert abs(found.nats - exact) <= 4 * found.standard_error + 1e-4 and abs(found.nats - plain.nats) > 0.1
    assert score(rows, model=model, method=method, num_mc_samples=256, cfg_scale=0).nats == plain.nats


@torch.no_grad()
@pytest.mark.parametrize("order", ["left_to_right", "right_to_left"])
def test_the_chain_rule_in_a_given_order(order):
    model, tokenizer = make_model(), make_tokenizer()
    found = score(model=model, method="chain_rule", order=order)
    for row, text in zip(found.rows, TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        places = list(range(len(ids)))[:: 1 if order == "left_to_right" else -1]
        assert row["nats"] == pytest.approx(by_chain_rule(model, ids, places), rel=1e-5)
        assert row["standard_error"] == 0 and row["tokens"] == len(ids) and row["bytes"] == len(text)


@torch.no_grad()
def test_a_random_order_is_one_and_another_seed_another():
    model, ids = make_model(), make_tokenizer()(TEXTS[0])["input_ids"]
    all_orders = [by_chain_rule(model, ids, order) for order in itertools.permutations(range(4))]
    found = [score([TEXTS[0]], model=model, method="chain_rule", order="random", seed=s).nats for s in range(4)]
    assert all(min(abs(value - other) for other in all_orders) < 1e-4 for value in found) and len({*found}) > 1
    assert found[1] == score([TEXTS[0]], model=model, method="chain_rule", order="random", seed=1).nats


@torch.no_grad()
def test_a_completion_given_its_prompt():
    model, tokenizer = make_model(), make_tokenizer()
    rows = Dataset.from_dict({"prompt": ["what is "], "completion": ["one plus two"]})
    found = score(rows, model=model, method="chain_rule")
    ids = tokenizer("what is one plus two")["input_ids"]
    assert found.nats == pytest.approx(by_chain_rule(model, ids, [2, 3, 4]), rel=1e-5)
    assert (found.tokens, found.bytes) == (3, len("one plus two"))


def test_perplexities_and_their_errors():
    rows = [{"nats": -6.0, "standard_error": 0.3, "tokens": 2, "bytes": 8}]
    rows += [{"nats": -2.0, "standard_error": 0.4, "tokens": 2, "bytes": 12}]
    found = Likelihood.of(rows)
    assert (found.nats, found.tokens, found.bytes) == (-8.0, 4, 20) and found.standard_error == pytest.approx(0.5)
    for unit, number in (("tokens", 4), ("bytes", 20)):
        value, error = found.perplexity(unit)
        assert value == pytest.approx(math.exp(8 / number))
        low, high = math.exp((8 - 1e-3) / number), math.exp((8 + 1e-3) / number)  # a derivative by differences
        assert error == pytest.approx(0.5 * (high - low) / 2e-3, rel=1e-5)
    assert found.bits_per_byte == (pytest.approx(8 / 20 / math.log(2)), pytest.approx(0.5 / 20 / math.log(2)))
    assert f"perplexity per token  {math.exp(2):>14.4f}" in str(found)


# Windows


def test_windows_hold_every_token_and_byte_once():
    tokenizer = make_tokenizer()
    text = "one two three four five six seven"
    for longest in (1, 2, 3, 7, None):
        windows = windows_of([{"text": text}, {"text": "say hi"}], tokenizer, MASK, longest)
        assert [w.number for w in windows] == list(range(len(windows)))
        scored = [token for w in windows for token in w.ids[w.begin :]]
        assert scored == tokenizer(text + " say hi")["input_ids"]
        assert sum(w.bytes for w in windows) == len(text) + len("say hi")
        assert all(len(w.ids) <= (longest or 7) for w in windows)


def test_a_text_that_is_too_long_is_scored_in_windows():
    whole = score(["one two three", "four five"], method="chain_rule", max_length=None)
    cut = score(["one two three four five"], method="chain_rule", max_length=3)
    assert cut.nats == pytest.approx(whole.nats, rel=1e-6) and len(cut.rows) == 2


HI = {"role": "user", "content": "hi"}


def test_equal_texts_have_masks_of_their_own():
    """So that their errors are independent; the first has those that it has alone."""
    rows = score([TEXTS[2]] * 3, num_mc_samples=4).rows
    assert rows[0] == score([TEXTS[2]], num_mc_samples=4).rows[0] and len({row["nats"] for row in rows}) == 3


@pytest.mark.parametrize(
    "texts, options, error, message",
    [
        ([], {}, ValueError, "`texts` is empty"),
        (["say hi", ""], {}, ValueError, "Text 1 has no token to score"),
        (["say <|mdm_mask|>"], {}, ValueError, "Text 0 contains the mask token"),
        ("say hi", {}, TypeError, "must be a `Dataset` or a list of texts, got `str`"),
        (Dataset.from_dict({"body": ["hi"]}), {}, ValueError, r"has the columns \['body'\], and needs `text`"),
        (["say hi"], {"method": "k_dce", "mask_scheme": "bernoulli"}, ValueError, "'k_dce'` says itself how masks are"),
        (["say hi"], {"cfg_scale": 0.5}, ValueError, "`cfg_scale=0.5` guides by the prompt, and a text has none"),
        (["say hi"], {"cfg_scale": -1}, ValueError, "`cfg_scale` must be a finite number that is not negative"),
        (["say hi"], {"method": "exact"}, ValueError, "`method` must be one of"),
        (["say hi"], {"order": "best"}, ValueError, "`order` one of"),
        (["say hi"], {"order": "random"}, ValueError, "`order='random'` is for `method='chain_rule'`"),
        (["say hi"], {"method": "chain_rule", "stratify": False}, ValueError, "'chain_rule'` says itself how masks"),
        (["say hi"], {"max_length": 0}, ValueError, "`max_length` must be None or a whole number of at least 1, got 0"),
        (["say hi"], {"num_mc_samples": "many"}, ValueError, "`num_mc_samples` must be a whole number, got 'many'"),
        (["say hi"], {"seed": None}, ValueError, "`seed` must be a whole number, got None"),
        (["say hi"], {"draws_per_forward": 0}, ValueError, "`draws_per_forward` must be None or a whole number"),
        (["say hi"], {"max_length": 1, "tokenizer": "a beginning"}, ValueError, "Text 0 has 1 tokens before the first"),
        (["say hi", None], {}, ValueError, "`text` of text 1 is no text but 'None'"),
        ([{"text": "say hi"}], {}, ValueError, r"`text` of text 0 is no text but .*Dataset.from_list\(rows\)"),
        (
            Dataset.from_dict({"prompt": [[HI]], "completion": [[HI]]}),
            {},
            ValueError,
            "`prompt` of text 0 is no text .* written as one by `tokenizer.apply_chat_template",
        ),
        (Dataset.from_dict({"text": ["hi"]}).to_iterable_dataset(), {}, TypeError, "got `IterableDataset`"),
        (["say hi"], {"num_mc_samples": 0}, ValueError, "`num_mc_samples` must be at least 1"),
        (["say hi"], {"mask_scheme": "half"}, ValueError, "`scheme` must be one of"),
        (
            Dataset.from_dict({"prompt": ["what is "], "completion": ["one two"]}),
            {"max_length": 3},
            ValueError,
            "Row 0 has 4 tokens, prompt and completion, and 3 fit",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named(texts, options, error, message):
    with pytest.raises(error, match=message):
        score(texts, **options)


# Block by block


def in_blocks(name):
    """A model with blocks of four, and six tokens: a whole block, and a part of one."""
    ids = make_tokenizer()("red green blue you say hi")["input_ids"]
    return FOLDERS[name].model(), ids, numbers_of(6, 4), FOLDERS[name].shift


def block_sum(found, hidden):
    """Of the log-probabilities `found(masked)` of tokens that are `hidden` in one of the two blocks alone."""
    masked = torch.zeros(1, 6, dtype=torch.bool)
    masked[0, list(hidden)] = True
    return found(masked)[0].double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["SDAR", "Fast-dLLM v2"])
def test_a_likelihood_in_blocks_is_the_sum_of_theirs(name):
    """By enumeration of every mask of every block, and of an order, each block behind clean ones."""
    model, ids, numbers, shift = in_blocks(name)

    def found(masked):
        return block_log_probs(of_model(model), torch.tensor(ids), masked, numbers, shift)

    exact, orders = 0.0, {"left_to_right": 0.0, "right_to_left": 0.0}
    for block in ([0, 1, 2, 3], [4, 5]):
        for m in subsets(len(block)):
            weight = 1 / (len(m) * math.comb(len(block), len(m)))
            exact += weight * block_sum(found, [block[i] for i in m]).sum().item()
        for order in orders:
            places = block if order == "left_to_right" else block[::-1]
            for j, place in enumerate(places):
                orders[order] += block_sum(found, places[j:])[place].item()
    text = ["red green blue you say hi"]
    for order, expected in orders.items():
        assert score(text, model=model, method="chain_rule", order=order).nats == pytest.approx(expected, rel=1e-5)
    estimate = score(text, model=model, num_mc_samples=512)
    assert 0 < estimate.standard_error < 0.2 and abs(estimate.nats - exact) < 4 * estimate.standard_error


# What is kept


def score_in_a_process(folder):
    score(num_mc_samples=4, output_dir=str(folder / "kept"))


def test_two_processes_score_the_rows_of_one(tmp_path):
    assert run_forked(score_in_a_process, tmp_path, processes=2, folder=tmp_path) == [0, 0], [
        path.read_text()[-2000:] for path in tmp_path.glob("rank*.log")
    ]
    lines = [path.read_text().splitlines()[1:] for path in (tmp_path / "kept").glob("likelihood-*")]
    assert sorted(map(len, lines)) == [1, 2]
    kept, alone = score(num_mc_samples=4, output_dir=str(tmp_path / "kept")), score(num_mc_samples=4)
    assert (kept.nats, kept.standard_error, kept.bytes) == (alone.nats, alone.standard_error, alone.bytes)


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    whole = score(num_mc_samples=4)
    calls = []
    plain = module.Scorer.__call__

    def counted(scorer, window):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(window.number)
        return plain(scorer, window)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Scorer, "__call__", counted)
        score(num_mc_samples=4, output_dir=str(tmp_path))
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(module.Scorer, "__call__", counted)
        found = score(num_mc_samples=4, output_dir=str(tmp_path))
    assert calls == [2] and found.nats == whole.nats and found.standard_error == whole.standard_error
    with pytest.raises(ValueError, match="is of another run: `num_mc_samples` was 4 and is 8"):
        score(num_mc_samples=8, output_dir=str(tmp_path))


def test_an_adapter_is_part_of_the_model_and_modes_are_left_alone():
    torch.manual_seed(0)
    adapted = get_peft_model(make_model(), LoraConfig(r=4, init_lora_weights=False)).train()
    assert score(model=adapted, method="chain_rule").nats != score(method="chain_rule").nats
    assert all(module.training for module in adapted.modules())
