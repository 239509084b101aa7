"""
The ELBO estimate against the truth by enumeration, and the variance theorems of VRPO (arXiv 2505.19223) as a table.
"""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from oracles import MASK, VOCAB, TableDenoiser, all_masks, exact_elbo, exact_fixed_count_variances, masked_sums

from trl_diffusion import ControlVariate, MaskDraws, draw_masks, elbo
from trl_diffusion.estimators.draws import SCHEMES
from trl_diffusion.estimators.elbo import variance_of_mean

LENGTH = 4
IDS = torch.tensor([1, 3, 0, 2])
REPEATS = 4000


@pytest.fixture(scope="module")
def table():
    return TableDenoiser(LENGTH)


@pytest.fixture(scope="module")
def near(table):
    return TableDenoiser(LENGTH, seed=9, near=table)


def estimate(model, num_mc_samples, scheme="fixed_count", stratify=False, seed=0, repeats=REPEATS, **options):
    """`repeats` independent estimates of the same row."""
    ids, maskable = IDS.expand(repeats, LENGTH), torch.ones(repeats, LENGTH, dtype=torch.bool)
    draws = draw_masks(maskable, num_mc_samples, scheme, stratify, seed, **options)
    return elbo(model, ids, maskable, draws=draws, mask_token_id=MASK)


def variance_with_error(values):
    """Sample variance and its standard error, from the fourth moment."""
    values = values.double()
    squared = (values - values.mean()) ** 2
    return squared.mean().item(), (squared.std() / len(values) ** 0.5).item()


def test_exact_when_all_masks_are_enumerated(table):
    draws = all_masks(LENGTH, 1)
    out = elbo(table, IDS.unsqueeze(0), torch.ones(1, LENGTH), draws=draws, mask_token_id=MASK)
    assert out.value.item() == pytest.approx(exact_elbo(table, IDS), rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("num_mc_samples", [1, 3, 8])
@pytest.mark.parametrize("control_variate", [None, ControlVariate()], ids=["plain", "control"])
def test_unbiased(table, scheme, stratify, num_mc_samples, control_variate):
    value = estimate(table, num_mc_samples, scheme, stratify, control_variate=control_variate).value
    standard_error = value.std() / REPEATS**0.5
    assert abs(value.mean() - exact_elbo(table, IDS)) < 4 * standard_error


def test_outputs_agree_with_each_other(table):
    out = estimate(table, 5, repeats=7)
    assert out.terms.shape == (7, LENGTH) and out.samples.shape == (5, 7)
    torch.testing.assert_close(out.value, out.terms.sum(-1))
    torch.testing.assert_close(out.value, out.samples.mean(0))
    torch.testing.assert_close(out.standard_error, out.samples.std(0) / 5**0.5)


@pytest.mark.parametrize("scheme, num_mc_samples", [("fixed_count", 16), ("mirror", 5), ("mirror", 8)])
def test_standard_error_is_the_spread_of_the_estimate(table, scheme, num_mc_samples):
    out = estimate(table, num_mc_samples, scheme)
    mean_square, its_error = (out.standard_error**2).mean(), (out.standard_error**2).std() / REPEATS**0.5
    spread, spread_error = variance_with_error(out.value)
    assert abs(mean_square - spread) < 4 * (its_error**2 + spread_error**2) ** 0.5
    single_unit = estimate(table, SCHEMES[scheme].draws_per_unit, scheme, repeats=2)
    assert single_unit.standard_error.isnan().all()


# The two draws of a unit, all outcomes equally likely, of mean zero: they answer each other, are alike, or independent
UNITS = {
    "opposed": [(1.0, -2.0), (-2.0, 1.0), (1.0, 1.0)],
    "alike": [(1.0, 1.0), (-2.0, -2.0), (1.0, 1.0)],
    "independent": list(product((1.0, -2.0, 1.0), repeat=2)),
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("num_draws, draws_per_unit", [(4, 2), (5, 2), (7, 2), (2, 1), (3, 1), (3, 2)])
def test_variance_of_a_mean_by_enumeration(units, num_draws, draws_per_unit):
    """Its mean over everything that can come is the variance of the mean over draws, odd numbers of draws included."""
    whole, rest = divmod(num_draws, draws_per_unit)
    alone = [(x,) for x, _ in UNITS[units]]
    kinds = [UNITS[units] if draws_per_unit == 2 else alone] * whole + [alone] * rest
    samples = torch.tensor([sum(drawn, ()) for drawn in product(*kinds)], dtype=torch.float64).T
    exact = samples.mean(0).var(correction=0)
    found = variance_of_mean(samples, draws_per_unit)
    assert (found >= 0).all()
    if (num_draws, draws_per_unit) != (3, 2):
        assert found.mean().item() == pytest.approx(exact.item(), rel=1e-12)
    else:  # a pair and a draw: exact if the draws of a pair are independent
        of_pair, of_draw = (torch.tensor(kind).double().sum(1).var(correction=0).item() for kind in kinds)
        assert found.mean().item() == pytest.approx((4 * of_draw + of_pair) / 18, rel=1e-12)
        assert units != "independent" or found.mean().item() == pytest.approx(exact.item(), rel=1e-12)


def test_one_token_has_no_variance():
    model = TableDenoiser(1)
    ids, maskable = torch.tensor([[3]] * 50), torch.ones(50, 1, dtype=torch.bool)
    out = elbo(model, ids, maskable, draws=draw_masks(maskable, 2), mask_token_id=MASK)
    assert out.value.std().item() == 0.0
    assert out.value[0].item() == pytest.approx(masked_sums(model, ids[0])[(0,)], rel=1e-6)


# The variance theorems


@pytest.mark.parametrize("num_mc_samples", [1, 2, 4, 8, 16])
def test_proposition_1_variance_is_inverse_in_the_budget(table, num_mc_samples):
    """V B = (V_t + V_yt) / n with every draw at a level of its own (n_t = n, n_yt = 1)."""
    level, within = exact_fixed_count_variances(table, IDS)
    spread, error = variance_with_error(estimate(table, num_mc_samples, seed=num_mc_samples).value)
    assert abs(spread - (level + within) / num_mc_samples) < 4 * error


def test_proposition_1_levels_beat_repeats(table):
    """Lemma 5: n masks at one level have variance V_t + V_yt / n, more than n levels with a mask each."""
    level, within = exact_fixed_count_variances(table, IDS)
    n, generator = 4, torch.Generator().manual_seed(3)
    count = torch.randint(1, LENGTH + 1, (REPEATS,), generator=generator)
    order = torch.rand(n, REPEATS, LENGTH, generator=generator).argsort(-1).argsort(-1)
    masked = order < count.view(1, -1, 1)
    draws = MaskDraws(masked, (LENGTH / count / n).view(1, -1, 1) * masked)
    maskable = torch.ones(REPEATS, LENGTH, dtype=torch.bool)
    out = elbo(table, IDS.expand(REPEATS, LENGTH), maskable, draws=draws, mask_token_id=MASK)
    spread, error = variance_with_error(out.value)
    assert abs(spread - (level + within / n)) < 4 * error
    assert level + within / n > (level + within) / n


@pytest.mark.parametrize("num_mc_samples", [1, 4])
def test_proposition_2_sharing_draws(table, near, num_mc_samples):
    """The log-ratio has the variance of the difference on one mask if draws are shared, else the sum of both."""
    shared = estimate(near, num_mc_samples, seed=1).value - estimate(table, num_mc_samples, seed=1).value
    apart = estimate(near, num_mc_samples, seed=1).value - estimate(table, num_mc_samples, seed=2).value
    of_shared = sum(exact_fixed_count_variances(near, IDS, table)) / num_mc_samples
    of_apart = sum(sum(exact_fixed_count_variances(m, IDS)) for m in (near, table)) / num_mc_samples
    for values, exact in ((shared, of_shared), (apart, of_apart)):
        spread, error = variance_with_error(values)
        assert abs(spread - exact) < 4 * error
    assert of_shared < of_apart / 10


@pytest.mark.parametrize("num_mc_samples", [1, 2, 8])
def test_fixed_count_is_quieter_than_bernoulli(table, num_mc_samples):
    """It is the Bernoulli estimate averaged over the level given the count (Rao-Blackwell)."""
    fixed, fixed_error = variance_with_error(estimate(table, num_mc_samples, "fixed_count").value)
    bernoulli, bernoulli_error = variance_with_error(estimate(table, num_mc_samples, "bernoulli").value)
    assert bernoulli - fixed > 2 * (fixed_error**2 + bernoulli_error**2) ** 0.5


@pytest.mark.parametrize("num_mc_samples", [2, 4, 8])
def test_stratified_levels_remove_level_variance(table, num_mc_samples):
    """With K a multiple of L every level is met equally often, which leaves V_yt / K; else it never adds variance."""
    level, within = exact_fixed_count_variances(table, IDS)
    spread, error = variance_with_error(estimate(table, num_mc_samples, stratify=True, seed=5).value)
    assert spread < (level + within) / num_mc_samples + 4 * error
    if num_mc_samples % LENGTH == 0:
        assert abs(spread - within / num_mc_samples) < 4 * error


@pytest.mark.parametrize("num_mc_samples", [1, 2, 4, 8])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_theorem_1_bias_and_variance_of_the_loss(table, near, num_mc_samples, beta):
    """|E loss_hat - loss| <= sqrt(V s_hat) and V loss_hat <= 4 V s_hat, for loss = -log sigma(s)."""
    score = beta * (estimate(near, num_mc_samples).value - estimate(table, num_mc_samples).value)
    exact = beta * (exact_elbo(near, IDS) - exact_elbo(table, IDS))
    loss = -torch.nn.functional.logsigmoid(score)
    bias = loss.mean() + torch.nn.functional.logsigmoid(torch.tensor(exact))
    assert abs(bias) <= score.std() + 4 * loss.std() / REPEATS**0.5
    assert loss.var() <= 4 * score.var()


@pytest.mark.parametrize("num_mc_samples", [4, 16, 64])
@pytest.mark.parametrize("beta", [0.02, 0.05])
def test_theorems_2_and_3_the_bounds_are_tight(table, near, num_mc_samples, beta):
    """For small V s_hat: V loss_hat = f'^2 V s_hat, E|loss_hat - loss| >= 0.286 f' sqrt(V s_hat); f' = sigma(-s)."""
    score = beta * (estimate(near, num_mc_samples).value - estimate(table, num_mc_samples).value).double()
    exact = torch.tensor(beta * (exact_elbo(near, IDS) - exact_elbo(table, IDS)))
    slope = torch.sigmoid(-exact).item()
    loss = -torch.nn.functional.logsigmoid(score)
    spread, error = variance_with_error(loss)
    of_score, error_of_score = variance_with_error(score)
    curvature = 0.25 * of_score**0.5  # second order: the slope changes by at most a quarter of the score's change
    assert abs(spread - slope**2 * of_score) < 4 * (error + error_of_score) + 4 * curvature * of_score
    missed = (loss + torch.nn.functional.logsigmoid(exact)).abs()
    assert missed.mean() + 4 * missed.std() / REPEATS**0.5 >= 0.286 * slope * of_score**0.5


class Tilted:
    """A denoiser with parameters phi of each row's own, so that one backward gives the gradient of every row."""

    def __init__(self, base, num_rows, directions=4):
        self.base = base
        self.directions = [TableDenoiser(LENGTH, seed=20 + i) for i in range(directions)]
        self.phi = torch.zeros(num_rows, directions, dtype=torch.float64, requires_grad=True)

    def __call__(self, input_ids, attention_mask=None):
        tilt = torch.stack([direction(input_ids) for direction in self.directions], dim=1)
        return self.base(input_ids) + torch.einsum("rp,rplv->rlv", self.phi, tilt)


def gradients_of_rows(base, draws):
    """Score gradients `(rows, phi)` and values of a policy on given draws of the same row."""
    num_rows = draws.masked.shape[1]
    model = Tilted(base, num_rows)
    ids, maskable = IDS.expand(num_rows, LENGTH), torch.ones(num_rows, LENGTH, dtype=torch.bool)
    value = elbo(model, ids, maskable, draws=draws, mask_token_id=MASK).value
    (gradient,) = torch.autograd.grad(value.sum(), model.phi)
    return gradient, value.detach()


@pytest.mark.parametrize("num_mc_samples", [1, 4, 16])
def test_theorem_4_and_proposition_5_the_gradient(table, near, num_mc_samples):
    """
    With |grad s| <= C: E|grad loss_hat - grad loss| <= C/4 sqrt(V s_hat) + sqrt(tr V grad s_hat) and tr V grad loss_hat
    <= C^2/8 V s_hat + tr V grad s_hat (Theorem 4). And tr V grad B = Theta(1/n), like V B (Proposition 5).
    """
    beta, rows = 0.5, 2000
    draws = draw_masks(torch.ones(rows, LENGTH, dtype=torch.bool), num_mc_samples, seed=7)
    ids = IDS.expand(rows, LENGTH)
    reference = elbo(table, ids, torch.ones(rows, LENGTH), draws=draws, mask_token_id=MASK).value
    gradient, value = gradients_of_rows(near, draws)
    score, score_gradient = beta * (value - reference), beta * gradient
    loss_gradient = -torch.sigmoid(-score).unsqueeze(1) * score_gradient

    exact_gradient, exact_value = gradients_of_rows(near, all_masks(LENGTH, 1))
    exact_score = beta * (exact_value - exact_elbo(table, IDS))
    exact = -torch.sigmoid(-exact_score).unsqueeze(1) * beta * exact_gradient
    bound = max(score_gradient.norm(dim=1).max(), beta * exact_gradient.norm())
    spread_of_gradient = score_gradient.var(0).sum()
    missed = (loss_gradient - exact).norm(dim=1)
    assert missed.mean() <= bound / 4 * score.std() + spread_of_gradient**0.5
    assert loss_gradient.var(0).sum() <= bound**2 / 8 * score.var() + spread_of_gradient

    single = draw_masks(torch.ones(rows, LENGTH, dtype=torch.bool), 1, seed=8)
    one, _ = gradients_of_rows(near, single)
    squared = [((g - exact_gradient) ** 2).sum(1) for g in (gradient, one)]
    error = (
        sum((s.std() / rows**0.5 * scale) ** 2 for s, scale in zip(squared, (num_mc_samples, 1), strict=True)) ** 0.5
    )
    assert abs(num_mc_samples * squared[0].mean() - squared[1].mean()) < 4 * error


# Beyond the paper


@pytest.mark.parametrize("scheme, control_variate", [("mirror", None), ("mirror", ControlVariate())], ids=str)
def test_the_gradient_is_unbiased(table, near, scheme, control_variate):
    """Weights do not depend on log-probabilities, so what holds for the estimate holds for its gradient."""
    rows = 4000
    draws = draw_masks(
        torch.ones(rows, LENGTH, dtype=torch.bool), 4, scheme, True, seed=9, control_variate=control_variate
    )
    gradient, _ = gradients_of_rows(near, draws)
    exact, _ = gradients_of_rows(near, all_masks(LENGTH, 1))
    z = (gradient.mean(0) - exact[0]) / (gradient.std(0) / rows**0.5)
    assert z.abs().max() < 4


@pytest.mark.parametrize("num_mc_samples", [4, 7, 8])
def test_without_context_the_control_variate_leaves_no_noise(num_mc_samples):
    """
    If a token's log-probability does not depend on what else is hidden, the other draws tell all of it: every mirror
    pair hides every token, so that c_ki is exact as the ridge goes to zero, and so is the estimate.
    """
    logits = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(2)).double()
    exact = logits.log_softmax(-1)[torch.arange(LENGTH), IDS].sum()

    def model(input_ids, attention_mask=None):
        return logits.expand(len(input_ids), -1, -1)

    settings = ControlVariate(kappa=1.0, bandwidth=100.0, ridge=1e-9)
    value = estimate(model, num_mc_samples, "mirror", control_variate=settings, repeats=200).value
    torch.testing.assert_close(value, exact.expand(200), rtol=1e-5, atol=1e-5)  # weights are float32
    assert estimate(model, num_mc_samples, "mirror", repeats=200).value.std() > 0.1


def test_what_coupled_responses_share_leaves_their_difference(table, near):
    """Responses that differ in one token: the score is quieter than on separate masks."""
    rows = 3000
    prompt = torch.arange(rows).unsqueeze(1)
    other = IDS.clone()
    other[1] = 0
    variances = {}
    for couple_pairs in (False, True):
        ids = torch.cat([torch.cat([prompt, y.expand(rows, -1)], 1) for y in (IDS, other)])
        maskable = (torch.arange(1 + LENGTH) > 0).expand(2 * rows, -1)
        draws = draw_masks(maskable, 4, "fixed_count", True, rows=ids, couple_pairs=couple_pairs)
        draws = MaskDraws(draws.masked[..., 1:], draws.weight[..., 1:])
        policy, reference = (
            elbo(model, ids[:, 1:], maskable[:, 1:], draws=draws, mask_token_id=MASK).value for model in (near, table)
        )
        chosen, rejected = (policy - reference).chunk(2)
        variances[couple_pairs] = variance_with_error(chosen - rejected)
    (apart, apart_error), (coupled, coupled_error) = variances[False], variances[True]
    assert coupled + 4 * coupled_error < apart - 4 * apart_error


# Input that has no ELBO


def test_non_finite_log_probability_is_named(table):
    def broken(input_ids, attention_mask=None):
        logits = table(input_ids)
        logits[1, 2] = torch.nan
        return logits

    draws = all_masks(LENGTH, 2)
    with pytest.raises(ValueError, match=r"is nan \(row 1 of the batch, position 2, draw 2"):
        elbo(broken, IDS.expand(2, LENGTH), torch.ones(2, LENGTH), draws=draws, mask_token_id=MASK)


ONES = torch.ones(1, LENGTH, dtype=torch.bool)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"maskable": torch.arange(LENGTH).unsqueeze(0) > 0}, "made for other rows"),
        ({"draws": all_masks(LENGTH - 1, 1)}, r"`draws` are for \(B, L\) = \(1, 3\) and `maskable` is \(1, 4\)"),
        ({"draws": all_masks(LENGTH, 2)}, r"`draws` are for \(B, L\) = \(2, 4\) and `maskable` is \(1, 4\)"),
        ({"input_ids": IDS.expand(2, -1)}, r"`input_ids` is \(2, 4\) and `maskable` \(1, 4\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"`attention_mask` is \(1, 3\) and `maskable` \(1, 4\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "`maskable` has positions that are padding"),
        (
            {"input_ids": torch.tensor([[1, MASK, 0, 2]])},
            rf"Rows \[0\] of `input_ids` contain the mask token \({MASK}\)",
        ),
    ],
    ids=str,
)
def test_what_would_be_scored_as_something_else_is_refused(table, changes, message):
    arguments = {"input_ids": IDS.unsqueeze(0), "maskable": ONES, "draws": all_masks(LENGTH, 1), **changes}
    with pytest.raises(ValueError, match=message):
        elbo(table, mask_token_id=MASK, **arguments)


def test_padding_may_be_anything(table):
    """Masks are refused in the text, not beside it."""
    ids, real = torch.tensor([[1, 3, 0, MASK]]), torch.arange(LENGTH).unsqueeze(0) < 3
    draws = draw_masks(real, 2, rows=ids, attention_mask=real)
    out = elbo(table, ids, real, real, draws=draws, mask_token_id=MASK)
    assert repr(out).startswith("ELBO(value=tensor([-") and repr(out).endswith("draws=2)")


def test_the_example_of_the_readme_prints_its_numbers_and_nothing_else():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = [
        block for block in re.findall(r"<!-- tested -->\n```python\n(.*?)```", text, re.DOTALL) if "elbo(" in block
    ]
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    values = r"tensor\(\[[\d., ]+\]\)\n"
    assert re.fullmatch(rf"tensor\(\[-[\d., -]+\]\) {values}{values}", result.stdout) and not result.stderr


def test_mask_token_is_needed(table):
    with pytest.raises(ValueError, match="pass `mask_token_id`"):
        elbo(table, IDS.unsqueeze(0), torch.ones(1, LENGTH), draws=all_masks(LENGTH, 1))


def test_terms_are_in_float32_for_a_bfloat16_model(model):
    ids = torch.randint(6, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    maskable = (torch.arange(9) > 3).expand(2, 9)
    out = elbo(model.to(torch.bfloat16), ids, maskable, draws=draw_masks(maskable, 2, rows=ids))
    assert out.terms.dtype == torch.float32
