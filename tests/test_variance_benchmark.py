"""The variance benchmark's own arithmetic: by brute force over every mask, and against the package's `elbo`."""

import random
from math import comb

import grammar_text
import pytest
import torch
import variance_blocks
import variance_estimators as estimators
import variance_levels as lev
import variance_report as report
import variance_tables as tables
import word_problems
from block_models import block_loss, make_sdar
from oracles import TableDenoiser, exact_elbo, exact_fixed_count_variances, masked_sums

from trl_diffusion import ControlVariate, LLaDAConfig, LLaDAModelLM, MaskSampler, draw_masks, elbo

LENGTH = 5
LARGEST_Z = 4.0


def every_level(length=LENGTH):
    """All masks by level, and S(m) of a random denoiser's log-ratio to a near one, with both models and the row."""
    ids = torch.arange(length) % 4
    policy = TableDenoiser(length, seed=1)
    reference = TableDenoiser(length, near=policy, seed=2)
    levels = lev.make_levels(length, everything=True)
    sums = [masked_sums(model, ids) for model in (policy, reference)]
    ratios = [
        torch.tensor([sums[0][m] - sums[1][m] for m in map(hidden_in, masks)], dtype=torch.float64)
        for masks in levels.masks
    ]
    return levels, ratios, policy, reference, ids


def hidden_in(mask) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def test_bernoulli_variance_by_brute_force_over_masks_and_levels():
    levels, ratios, *_ = every_level()
    steps, epsilon = 200_000, 0.05
    t = epsilon + (1 - epsilon) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    first, second = torch.zeros(()).double(), torch.zeros(()).double()
    for masks, values in zip(levels.masks, ratios, strict=True):
        for mask, value in zip(masks, values, strict=True):
            chance = t ** mask.sum() * (1 - t) ** (~mask).sum()
            first += (chance * value / t).mean()
            second += (chance * (value / t) ** 2).mean()
    brute = (second - first**2).item()
    # Midpoint rules with 20 000 and 200 000 nodes of smooth functions: errors far below 1e-6
    assert lev.bernoulli_variance(levels, ratios, epsilon) == pytest.approx(brute, rel=1e-6)


def test_fixed_count_variance_and_mean_are_the_oracles():
    levels, ratios, policy, reference, ids = every_level()
    parts = lev.fixed_count_parts(levels, ratios)
    assert (parts["level"], parts["within"]) == pytest.approx(exact_fixed_count_variances(policy, ids, reference))
    difference = exact_elbo(policy, ids) - exact_elbo(reference, ids)
    assert lev.mean_over_levels(levels, ratios) == pytest.approx(difference)


def random_terms(length: int) -> torch.Tensor:
    """f_i(m) for every mask (by its binary code): token effects, and noise that depends on the whole mask."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(length, generator=generator) + torch.randn(2**length, length, generator=generator)


def terms_of(levels: lev.Levels, table: torch.Tensor) -> list[torch.Tensor]:
    place = 2 ** torch.arange(levels.length)
    return [table[(masks * place).sum(1)] * masks for masks in levels.masks]


def test_token_part_is_its_definition():
    levels = lev.make_levels(LENGTH, everything=True)
    terms = terms_of(levels, random_terms(LENGTH))
    total = 0.0
    for level, masks, f in zip(levels.levels, levels.masks, terms, strict=True):
        means = f.double().sum(0) / masks.sum(0)
        sums = (masks * means).sum(1) * LENGTH / level
        total += sums.var(correction=0).item() / LENGTH
    assert lev.token_variance(levels, terms) == pytest.approx(total)


def test_parts_from_few_masks_are_unbiased():
    """At twelve tokens every level is looked at and no share is interpolated: the mean over samples is the truth."""
    length, samples = 12, 200
    table = random_terms(length)

    def parts(levels):
        terms = terms_of(levels, table)
        both = lev.fixed_count_parts(levels, [f.sum(1) for f in terms])
        return [both["level"], both["within"], lev.token_variance(levels, terms)]

    truth = torch.tensor(parts(lev.make_levels(length, everything=True)))
    found = torch.tensor([parts(lev.make_levels(length, everything=False, seed=seed)) for seed in range(samples)])
    assert not all(lev.make_levels(length, everything=False).whole)
    z = (found.mean(0) - truth) / (found.std(0) / samples**0.5)
    assert z.abs().max() < LARGEST_Z


def test_levels_between_knots_are_interpolated_in_the_logarithm():
    weights = lev.hats(8, [1, 4, 8])
    logs = torch.arange(1, 9).double().log()
    assert torch.allclose(weights.sum(0), torch.ones(8).double())
    assert torch.allclose(weights.T @ torch.tensor([1, 4, 8]).double().log(), logs)


def tiny_model(seed: int) -> LLaDAModelLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 32, "vocab_size": 20}
    return LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=1, pad_token_id=0, eos_token_id=0, init_std=0.3)).eval()


PROMPT, RESPONSES = [3, 4], [[5, 6, 7, 8, 9], [5, 6, 9]]


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "bernoulli"},
        {"scheme": "fixed_count", "stratify": True},
        {"scheme": "mirror", "stratify": True, "control_variate": ControlVariate(), "couple_pairs": True},
    ],
)
def test_look_ups_are_the_elbo_and_its_gradient(options):
    policy, reference = tiny_model(0), tiny_model(1)
    sampler, repeats = MaskSampler(4, **options), 3
    drawn = estimators.draw_pair(sampler, PROMPT, RESPONSES, repeats)
    sketch = tables.Sketch(20, 32)
    scored = [
        tables.score(policy, reference, PROMPT, y, tables.distinct([masks]), sketch)
        for y, (masks, _) in zip(RESPONSES, drawn, strict=True)
    ]
    found = estimators.read_pair(scored, drawn)

    ids = torch.tensor([PROMPT + RESPONSES[0], PROMPT + RESPONSES[1] + [0, 0]])
    real = torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool()
    maskable = real & (torch.arange(7) >= 2)
    for repeat in range(repeats):
        draws = sampler(maskable, ids, real, nonce=repeat)
        values = [elbo(model, ids, maskable, real, draws=draws).value for model in (policy, reference)]
        margin = values[0][0] - values[0][1]
        score = margin - (values[1][0] - values[1][1])
        assert found.score[repeat].item() == pytest.approx(score.item(), rel=1e-4, abs=1e-4)
        head = policy.get_output_embeddings().weight
        (gradient,) = torch.autograd.grad(margin, head)
        sketched = (sketch.tokens.T @ gradient @ sketch.hidden).flatten()
        torch.testing.assert_close(found.gradient[repeat], sketched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [4, 32])
def test_look_ups_of_blocks_add_up_to_the_elbo_and_its_gradient(size):
    """Of responses that begin inside a block, with a last block that is cut, and one that has a block less."""
    torch.manual_seed(0)
    tokenizer = word_problems.make_word_tokenizer(["a", "b"])
    policy, reference = (make_sdar(tokenizer, size, 32, 1, 64).eval() for _ in range(2))
    pair = variance_blocks.Pair(policy.config, [1, 3, 3] * 13, [[3, 1, 4, 3, 1, 5, 0], [3, 3, 1, 0]])
    sampler, repeats = MaskSampler(4, **variance_blocks.ESTIMATORS["coupled, wide control, a = 0.75"]), 3
    drawn, sketch = pair.draw(sampler, repeats), tables.Sketch(len(tokenizer), 32)
    masks = [tables.distinct([masked]) for masked, _ in drawn]
    scored = pair.score({"policy": policy}, reference, masks, sketch)["policy"]
    blocks = pair.read(scored, drawn).values()
    assert len(blocks) == (3 if size == 4 else 1)
    for repeat in range(repeats):
        draws = sampler(pair.maskable, pair.ids, pair.real, repeat, blocks=pair.blocks)
        of_policy, of_reference = (
            elbo(model, pair.ids, pair.maskable, pair.real, draws=draws).value for model in (policy, reference)
        )
        ratio, margin = of_policy - of_reference, of_policy[0] - of_policy[1]
        score = sum(block.score[repeat] for block in blocks)
        assert score.item() == pytest.approx((ratio[0] - ratio[1]).item(), rel=1e-4, abs=1e-4)
        (gradient,) = torch.autograd.grad(margin, policy.get_output_embeddings().weight)
        sketched = (sketch.tokens.T @ gradient @ sketch.hidden).flatten()
        found = sum(block.gradient[repeat] for block in blocks)
        torch.testing.assert_close(found, sketched, rtol=1e-4, atol=1e-4)


def test_block_models_are_trained_on_their_elbo():
    torch.manual_seed(0)
    model = make_sdar(word_problems.make_word_tokenizer(["a", "b"]), 4, 32, 1, 64)
    ids, maskable = torch.randint(0, 4, (5, 13)), (torch.arange(13) >= 3).expand(5, 13)
    ids[ids == model.config.mask_token_id] = 3
    blocks = torch.arange(13).expand(5, 13) // 4
    draws = draw_masks(maskable, 1, seed=7, rows=ids, blocks=blocks)
    loss = block_loss(model, ids, 3, 7)
    expected = -elbo(model, ids, maskable, draws=draws).value.sum() / maskable.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_independent_draws_have_the_variance_of_the_levels():
    """Draws made again from all masks: their variance is the analytic one, within its own standard error."""
    levels, ratios, *_ = every_level()
    flat = torch.cat(ratios)
    sizes = torch.tensor([comb(LENGTH, level) for level in levels.levels])
    pool = estimators.Pool(levels, flat, torch.zeros_like(flat), torch.zeros(len(flat), 1), sizes.cumsum(0) - sizes)
    generator, repeats = torch.Generator().manual_seed(0), 40_000
    parts, single = lev.fixed_count_parts(levels, ratios), lev.bernoulli_variance(levels, ratios)
    for (n_t, n_yt), expected in {
        (2, 3): parts["level"] / 2 + parts["within"] / 6,
        (1, 1): parts["level"] + parts["within"],
    }.items():
        assert_variance(pool.read(*pool.fixed_count_draws(n_t, n_yt, repeats, generator))[0], expected)
    assert_variance(pool.read(*pool.bernoulli_draws(4, repeats, generator))[0], single / 4)


def assert_variance(values: torch.Tensor, expected: float):
    squares = (values - values.mean()).square()
    assert abs(squares.mean().item() - expected) < LARGEST_Z * squares.std().item() / len(values) ** 0.5


@pytest.mark.parametrize("length", [18, 32, 101])
def test_stories_have_the_length_that_was_asked_for_and_close_their_brackets(length):
    rng, tokenizer = random.Random(length), grammar_text.make_tokenizer()
    for _ in range(30):
        opening, story = grammar_text.tell(rng, length)
        words = grammar_text.spoil(story, 0, rng)
        assert len(words) == length and words[-1] == grammar_text.EOS
        assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(opening + words)
        open_brackets = []
        for word in words:
            if word in "([":
                open_brackets.append({"(": ")", "[": "]"}[word])
            elif word in ")]":
                assert word == open_brackets.pop()
        assert not open_brackets
        spoilt = grammar_text.spoil(story, 0.3, rng)
        changed = [slot for slot, word in zip(story, spoilt, strict=True) if slot.word != word]
        assert len(changed) == max(1, round(0.3 * sum(bool(slot.wrong) for slot in story)))


def test_the_number_of_draws_that_is_needed_is_read_off_the_variances():
    """Variances c / K: half the baseline's at every K needs half of its draws."""
    sizes = (estimators.DRAWS, *estimators.OTHER_DRAWS)
    factors = {"fixed counts": 1.0, "halved": 0.5, "worse": 1.5, "tiny": 0.1}
    rows = [
        {"cells": {f"{name}|{k}": {"score": scale * factor / k} for name, factor in factors.items() for k in sizes}}
        for scale in (1.0, 7.0)
    ]
    needed = {name: report.equal_draws({"regime": rows}, name, "fixed counts") for name in factors}
    assert needed == {"fixed counts": ["8.0"], "halved": ["4.0"], "worse": ["12.0"], "tiny": ["< 2"]}
    ratios = report.ratio(rows, "halved|8", "fixed counts|8", "score")
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.5))
    torch.testing.assert_close(report.geometric_mean([ratios, ratios / 4]), torch.full_like(ratios, 0.25))
