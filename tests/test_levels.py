"""The laws of the number of hidden tokens: against their closed form, and against counts that are drawn."""

from math import comb, exp, lgamma

import pytest
import torch

from trl_diffusion import DiffusionSFTConfig, DiffusionVRPOConfig, ELBOKTOConfig, MaskSampler, draw_masks
from trl_diffusion.estimators import levels
from trl_diffusion.estimators.levels import concentration, draw_counts, importance
from trl_diffusion.estimators.schemes import SCHEMES

ROWS = 20_000
LARGEST_Z = 5.0


def law(total, a):
    """Beta-binomial of l - 1 in L' - 1, by its formula: C(L' - 1, l - 1) B(l - 1 + a, L' - l + a) / B(a, a)."""

    def log_beta(x, y):
        return lgamma(x) + lgamma(y) - lgamma(x + y)

    n = total - 1
    logs = [-log_beta(k + 1, n - k + 1) + log_beta(k + a, n - k + a) - log_beta(a, a) for k in range(total)]
    return torch.tensor(logs, dtype=torch.float64).exp() / total  # C(n, k) = 1 / ((n + 1) B(k + 1, n - k + 1))


@pytest.mark.parametrize("a", [0.1, 0.5, 0.75, 1 - 1e-9])
@pytest.mark.parametrize("total", [1, 2, 7, 300, 4000])
def test_counts_and_their_importance_are_those_of_the_beta_binomial_law(total, a):
    """Every count is drawn for a part of [0, 1) that is as long as it is likely, and weighed by one over that."""
    expected = law(total, a)
    ends = expected.cumsum(0)
    for place in (1e-3, 0.5, 1 - 1e-3):  # of each count's part
        inside = (ends - place * expected).unsqueeze(1)
        counts, importance = draw_counts(inside, torch.tensor([total]), a)
        assert torch.equal(counts.flatten(), torch.arange(1, total + 1))
    # lgamma of thousands is rounded at 1e-12; the recursion is not
    torch.testing.assert_close(importance.flatten(), 1 / (total * expected), rtol=1e-10, atol=0)


def test_one_is_uniform_to_the_last_bit():
    """And what is next to it is next to uniform."""
    share = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.tensor([1, 2, 7, 4000])
    counts, importance = draw_counts(share.expand(-1, 4), total, 1.0)
    assert torch.equal(counts, (share * total).long() + 1) and torch.equal(importance, torch.ones_like(importance))
    near, near_importance = draw_counts(share.expand(-1, 4), total, 1 - 1e-12)
    assert (near == counts).double().mean() > 0.999
    torch.testing.assert_close(near_importance, importance, rtol=1e-9, atol=0)


def test_rows_do_not_change_each_other():
    """Alone or beside others, to the last bit."""
    share = torch.rand(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.tensor([1, 300, 17, 300, 5, 1000])
    together = draw_counts(share, total, 0.5)
    for row in range(6):
        alone = draw_counts(share[:, [row]], total[[row]], 0.5)
        assert all(torch.equal(a.flatten(), b[:, row]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "total, a", [(1, 1), (29, 1), (30, 0.9), (60, 0.85), (120, 0.8), (239, 0.7503), (240, 0.75), (4000, 0.75)]
)
def test_the_law_goes_by_the_length(total, a):
    """Uniform below thirty tokens; 0.9 there, 0.05 less for each doubling, and 0.75 at last."""
    assert concentration(total) == pytest.approx(a, abs=1e-4)


@pytest.mark.parametrize("scheme", ["fixed_count", "mirror"])
@pytest.mark.parametrize("control_variate", ["none", "leave_one_out"])
@pytest.mark.parametrize("lengths", [(7, 29, 30, 300), (3, 8), (40, 200)], ids=["both", "uniform", "others"])
def test_by_length_each_row_has_its_own_law_to_the_last_bit(scheme, control_variate, lengths):
    """Rows of unequal length in one batch against each alone, with the law of its length spelled out."""
    rows = torch.randint(5, 1000, (len(lengths), 300), generator=torch.Generator().manual_seed(0))
    maskable = torch.arange(300) < torch.tensor(lengths).unsqueeze(1)
    options = {"scheme": scheme, "stratify": True, "seed": 3, "control_variate": control_variate}
    together = draw_masks(maskable, 8, rows=rows, level_concentration=None, **options)
    for row, length in enumerate(lengths):
        a = concentration(length)
        alone = draw_masks(maskable[[row]], 8, rows=rows[[row]], level_concentration=a, **options)
        assert torch.equal(together.masked[:, [row]], alone.masked)
        assert torch.equal(together.weight[:, [row]], alone.weight)


@pytest.mark.parametrize("control_variate", ["none", "leave_one_out"])
def test_two_laws_in_one_batch_keep_the_law(monkeypatch, control_variate):
    """Coupled responses of three and five tokens, the second of which is a long one here: all subsets enumerated."""
    monkeypatch.setattr(levels, "LONG", 4)
    lengths = torch.tensor([3, 5]).repeat_interleave(ROWS)
    rows = torch.cat(
        [torch.arange(ROWS).repeat(2).unsqueeze(1), torch.tensor([[7, 8, 9, 5, 6]]).expand(2 * ROWS, -1)], 1
    )
    maskable = (torch.arange(6) > 0) & (torch.arange(6) <= lengths.unsqueeze(1))
    draws = draw_masks(
        maskable, 4, "mirror", True, 1, rows, attention_mask=maskable | (torch.arange(6) == 0), couple_pairs=True,
        control_variate=control_variate, level_concentration=None,
    )  # fmt: skip
    code = (draws.masked[..., 1:].long() << torch.arange(5)).sum(-1)
    for length in (3, 5):
        own = lengths == length
        for subset in range(1, 2**length):
            inside = [i for i in range(length) if subset >> i & 1]
            weight = (draws.weight[:, own][..., 1:] * (code[:, own] == subset).unsqueeze(-1)).sum(0)[:, inside].double()
            expected = 1 / (len(inside) * comb(length, len(inside)))
            z = (weight.mean(0) - expected) / (weight.std(0) / ROWS**0.5)
            assert z.abs().max() < LARGEST_Z, subset


@pytest.mark.parametrize("scheme", ["fixed_count", "mirror"])
@pytest.mark.parametrize("stratify", [False, True], ids=["", "stratified"])
@pytest.mark.parametrize("a", [0.5, 0.75])
def test_counts_come_as_often_as_their_weight_says(scheme, stratify, a):
    length = 5
    maskable = torch.ones(ROWS, length, dtype=torch.bool)
    draws = draw_masks(maskable, 4, scheme, stratify, seed=2, level_concentration=a)
    counts, expected = draws.masked.sum(-1), law(length, a)
    per_row = torch.stack([(counts == count).double().mean(0) for count in range(1, length + 1)], 1)
    z = (per_row.mean(0) - expected) / (per_row.std(0) / ROWS**0.5)
    assert z.abs().max() < LARGEST_Z
    # A hidden token's weight is 1 / (K l P(l)): VRPO's L'/l, over L' P(l)
    weight = 1 / (4 * counts * expected[counts - 1])
    torch.testing.assert_close(draws.weight.amax(-1), weight.float())


def test_the_noise_of_a_long_response_stays_bounded():
    """
    Tokens worth +1 or -1 nat in turn. The noise of one draw that comes from which tokens are hidden is, by the formula
    of sampling without replacement,  sum over l of  (1/L')^2 / P(l) * (L'/l)^2 l (L'-l)/(L'-1).  Over L' that is ln L'
    and a constant for a = 1, and below its limit  pi * integral of (1 - u)^1.5 u^-0.5  =  3 pi^2 / 8  for a = 1/2.
    """
    found = {}
    for a in (1.0, 0.5):
        for length in (50, 400):
            p, count = law(length, a), torch.arange(1, length + 1).double()
            of_sum = count * (length - count) / (length - 1)  # variance of the sum of `count` of the values
            exact = ((length / count) ** 2 * of_sum / (length * p) / length).sum() / length
            values = torch.ones(length)
            values[::2] = -1
            maskable = torch.ones(2000, length, dtype=torch.bool)
            draws = draw_masks(maskable, 1, seed=1, level_concentration=a)
            squares = (draws.weight * values).sum((0, 2)).double().square() / length
            assert abs(squares.mean() - exact) < LARGEST_Z * squares.std() / 2000**0.5
            found[a, length] = exact.item()
    assert found[1.0, 400] - found[1.0, 50] == pytest.approx(torch.tensor(8.0).log().item(), rel=0.05)
    assert found[0.5, 50] < found[0.5, 400] < 3 * torch.pi**2 / 8


@pytest.mark.parametrize("a, mean, largest", [(0.75, 1.0472, 1.1982), (0.5, 1.2338, 1.5708)])
def test_what_a_law_can_cost(a, mean, largest):
    """
    Noise of sd s(u) at level u has the variance E[s^2 importance] in place of E[s^2], u uniform. With the same s at
    every level that is the mean of the importance, B(a, a) B(2 - a, 2 - a) for long responses; and never more than its
    largest value, B(a, a) / 4^(1 - a), at the middle level.
    """

    def beta(x):
        return exp(2 * lgamma(x) - lgamma(2 * x))

    assert (mean, largest) == pytest.approx((beta(a) * beta(2 - a), beta(a) / 4 ** (1 - a)), abs=1e-4)
    found = [importance(torch.arange(1, total + 1), total, a) for total in (1, 2, 3, 7, 50, 1000)]
    assert all(weights.mean() <= mean and weights.max() <= largest for weights in found)
    assert found[-1].mean().item() == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("config", [DiffusionVRPOConfig, ELBOKTOConfig])
def test_the_papers_schemes_have_the_papers_levels(config):
    """Mirror pairs have their own default; what is set counts for every scheme, and is said in the model card."""

    def of(**options):
        return config("x", use_cpu=True, bf16=False, **options)

    found = {scheme: of(mask_scheme=scheme).mask_sampler().level_concentration for scheme in SCHEMES}
    assert found == {"bernoulli": 1.0, "fixed_count": 1.0, "mirror": None}
    assert "levels by length" in of(mask_scheme="mirror").describe_estimator()
    for scheme in ("fixed_count", "mirror"):
        set_to = of(mask_scheme=scheme, level_concentration=0.5)
        assert set_to.mask_sampler().level_concentration == 0.5
        assert "levels from Beta(0.5, 0.5)" in set_to.describe_estimator()
    assert "uniform levels" in of(mask_scheme="bernoulli").describe_estimator()


def test_fine_tuning_has_uniform_levels():
    """Its loss is an ELBO, hundreds of nats, which an importance of levels would multiply by what it has for a draw."""
    assert DiffusionSFTConfig("x", use_cpu=True, bf16=False).mask_sampler().level_concentration == 1.0


def test_another_law_has_another_key():
    """What is stored of one law is not found under another."""
    assert MaskSampler().key == MaskSampler(level_concentration=1.0).key != MaskSampler(level_concentration=0.5).key


@pytest.mark.parametrize("a", [0, 1.5, float("nan"), "arcsine", True])
def test_other_laws_are_refused(a):
    with pytest.raises(ValueError, match=r"`level_concentration` must be None or a number in \(0, 1\], got "):
        draw_masks(torch.ones(1, 3, dtype=torch.bool), level_concentration=a)


@pytest.mark.parametrize("a", [0.5, None])
def test_a_law_of_counts_is_refused_where_there_is_no_count(a):
    with pytest.raises(ValueError, match=f"`level_concentration={a}` .* 'bernoulli' does not draw: take 'mirror'"):
        draw_masks(torch.ones(1, 3, dtype=torch.bool), scheme="bernoulli", level_concentration=a)
