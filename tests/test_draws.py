"""
The law of a masking scheme: for every non-empty subset m of a row's L' maskable tokens and every i in m,
E[ sum_k weight[k, i] 1{masked[k] = m} ] = 1 / (|m| C(L', |m|)). Then the ELBO estimate is unbiased for any model.

And: a row's draws are a function of the row alone.
"""

from math import comb, exp, lgamma

import pytest
import torch
from oracles import subsets

from trl_diffusion import ControlVariate, MaskDraws, MaskSampler, draw_masks
from trl_diffusion.estimators import control_variate, levels
from trl_diffusion.estimators.draws import DRAW_VERSION, SCHEMES

ROWS = 20_000
# Largest |z| over ten thousand comparisons: P(any beyond 5) < 1e-2, and the seed is fixed
LARGEST_Z = 5.0
ROUNDING = 1e-7  # of weights, which are float32
CONTROLS = {"plain": None, "control": "leave_one_out", "few witnesses": ControlVariate(bandwidth=0.1, ridge=0.05)}
# (L', K): one draw, units that are cut short, fewer and more draws than tokens
SIZES = [(1, 3), (2, 5), (3, 2), (4, 8), (5, 1), (6, 3)]
# A scheme, its law of levels, and sizes
LAWS = [(scheme, 1.0, *size) for scheme in SCHEMES for size in SIZES]
LAWS += [
    (scheme, a, *size)
    for scheme in ("fixed_count", "mirror")
    for a, size in zip((0.5, 0.75), SIZES[3::2], strict=False)
]
CAP = 50.0


@pytest.mark.parametrize("scheme, concentration, length, num_mc_samples", LAWS)
@pytest.mark.parametrize("couple_pairs", [False, True], ids=["", "coupled"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("stratify", [False, True], ids=["", "stratified"])
def test_law(scheme, concentration, length, num_mc_samples, stratify, control, couple_pairs):
    """
    Every scheme with every refinement and law of levels; each of two coupled responses keeps the law.

    With levels t in (0, 1] a weight of 1/t has no variance: rows with a level below 1/CAP are left out of both sides.
    """
    ids = response_pairs(length) if couple_pairs else torch.arange(ROWS).repeat_interleave(1 + length).view(ROWS, -1)
    maskable = (torch.arange(1 + length) > 0).expand(len(ids), -1)
    arguments = (maskable, num_mc_samples, scheme, stratify, 1, ids)
    options = {"couple_pairs": couple_pairs, "level_concentration": concentration}
    draws = draw_masks(*arguments, control_variate=CONTROLS[control], **options)
    level = draw_masks(*arguments, control_variate="leave_one_out", **options).control.inclusion
    keep, law = torch.ones(len(ids), dtype=torch.bool), [1 / (n * comb(length, n)) for n in range(1, length + 1)]
    if scheme == "bernoulli":
        keep, law = (level >= 1 / CAP).all(0), capped_law(length, num_mc_samples, stratify)
    for part in torch.arange(len(ids)).chunk(1 + couple_pairs):
        mean, standard_error = mean_weight_by_mask(draws.masked[:, part, 1:], draws.weight[:, part, 1:], keep[part])
        for m in subsets(length):
            row, places = sum(1 << i for i in m), list(m)
            z = (mean[row, places] - law[len(m) - 1]) / standard_error[row, places]
            assert z.abs().max() < LARGEST_Z, m


def response_pairs(length):
    """Two responses to each prompt, which differ in one token."""
    prompts = torch.arange(ROWS // 2).repeat(2).unsqueeze(1)
    first, second = torch.tensor([[7, 8, 9, 7, 5, 6]]), torch.tensor([[7, 8, 3, 7, 5, 6]])
    return torch.cat([prompts, torch.cat([first, second])[:, :length].repeat_interleave(ROWS // 2, 0)], 1)


def mean_weight_by_mask(masked, weight, keep):
    """`(2^L, L)`: the mean over rows of sum_k weight[k, i] 1{masked[k] = m}, by the code of m; its standard error."""
    num_rows, length = masked.shape[1:]
    code = (masked.long() << torch.arange(length)).sum(-1)  # (K, B)
    per_row = torch.zeros(num_rows, 2**length, length, dtype=torch.float64)
    for of_draw, weight_of_draw in zip(code, weight.double() * keep.unsqueeze(-1), strict=True):
        per_row[torch.arange(num_rows), of_draw] += weight_of_draw
    return per_row.mean(0), per_row.std(0) / num_rows**0.5 + ROUNDING


def capped_law(length, num_mc_samples, stratify):
    """By |m|: E[ 1/K sum_k 1/t_k P(m | t_k); all levels are 1/CAP or more ], by the midpoint rule."""
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    t = 1 - (u.unsqueeze(1) + torch.arange(num_mc_samples if stratify else 1) / num_mc_samples).frac()
    keep = (t >= 1 / CAP).all(1, keepdim=True)
    others = 1.0 if stratify else (1 - 1 / CAP) ** (num_mc_samples - 1)
    return [(t ** (n - 1) * (1 - t) ** (length - n) * keep).mean().item() * others for n in range(1, length + 1)]


def test_truncated_bernoulli_law_tends_to_the_law():
    """What the cap of the test above leaves out is less than 1/cap: the integrand is at most 1."""
    t = torch.linspace(1e-6, 1, 2_000_001, dtype=torch.float64)
    for size, length in [(1, 1), (1, 6), (3, 6), (6, 6)]:
        integral = torch.trapezoid(t ** (size - 1) * (1 - t) ** (length - size), t).item()
        assert integral == pytest.approx(1 / (size * comb(length, size)), abs=1e-5)


@pytest.mark.parametrize("length, num_mc_samples", [(5, 8), (8, 8), (12, 8), (52, 8), (3, 16)])
def test_stratified_counts_are_spread_and_uniform(length, num_mc_samples):
    maskable = torch.ones(ROWS, length, dtype=torch.bool)
    counts = draw_masks(maskable, num_mc_samples, stratify=True, seed=3).masked.sum(-1).sort(0).values  # (K, B)
    lowest = torch.arange(num_mc_samples) * length // num_mc_samples + 1
    highest = -(-(torch.arange(num_mc_samples) + 1) * length // num_mc_samples)
    assert bool((counts >= lowest.unsqueeze(1)).all() and (counts <= highest.unsqueeze(1)).all())
    frequency = torch.bincount(counts.flatten(), minlength=length + 1)[1:].double() / counts.numel()
    # The counts of one row are dependent, so the standard error is that of rows
    per_row = torch.stack([(counts == level).double().mean(0) for level in range(1, length + 1)])
    standard_error = per_row.std(1) / ROWS**0.5 + ROUNDING
    assert bool(((frequency - 1 / length).abs() < LARGEST_Z * standard_error).all())


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("num_mc_samples", [4, 5])
def test_mirror_pairs(length, num_mc_samples):
    """Two masks of a pair share one token and hide all of them together; an odd draw stands alone."""
    maskable = torch.ones(500, length, dtype=torch.bool)
    masked = draw_masks(maskable, num_mc_samples, "mirror", seed=6).masked
    assert masked.shape[0] == num_mc_samples
    for first, second in zip(masked[:-1:2], masked[1::2], strict=False):
        assert bool((first | second).all())
        assert bool(((first & second).sum(-1) == 1).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_mc_samples", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "settings",
    [ControlVariate(0.7, 0.3, 0.4), ControlVariate(0.7), ControlVariate(0.7, long_kappa=1.3)],
    ids=["", "by length", "a kappa of long ones"],
)
def test_control_variate_is_the_formula(monkeypatch, scheme, num_mc_samples, settings):
    """Collected weights give what the formula gives as it is written, and so do the estimates of single draws."""
    monkeypatch.setattr(levels, "LONG", 5)
    monkeypatch.setattr(control_variate, "TINY", 3)
    lengths = (2, 4, 7)
    kappas = {7: settings.long_kappa or 0.7}
    of_length = [
        ControlVariate(kappas.get(length, 0.7), *((0.25, 1.0) if length == 4 else (0.5, 0.3))) for length in lengths
    ]
    maskable = torch.stack([torch.arange(7) < length for length in lengths])
    draws = draw_masks(maskable, num_mc_samples, scheme, seed=8, control_variate=settings)
    f = torch.randn(draws.masked.shape, generator=torch.Generator().manual_seed(0)).double() * draws.masked
    samples, control = draws.samples(f)
    zero = draw_masks(maskable, num_mc_samples, scheme, seed=8, control_variate=settings.with_learnt_kappa(0.0))
    torch.testing.assert_close(zero.samples(f)[0], samples + settings.learnt_kappa * control)
    for b, length in enumerate(lengths):
        expected = [
            control_variate_by_hand(
                draws, f, settings if settings.ridge else of_length[b], SCHEMES[scheme].draws_per_unit, b, k, length
            )
            for k in range(num_mc_samples)
        ]
        torch.testing.assert_close(samples[:, b], torch.stack(expected))
    torch.testing.assert_close((draws.weight * f).sum((0, 2)), samples.mean(0), rtol=1e-5, atol=1e-5)
    plain = draw_masks(maskable, num_mc_samples, scheme, seed=8)
    assert torch.equal(plain.masked, draws.masked)
    if num_mc_samples <= SCHEMES[scheme].draws_per_unit:  # no other unit to learn from
        torch.testing.assert_close(draws.weight, plain.weight)


def control_variate_by_hand(draws, f, settings, draws_per_unit, b, k, length):
    """One draw's estimate, token by token."""
    inclusion = draws.control.inclusion[:, b]
    others = [j for j in range(len(inclusion)) if j // draws_per_unit != k // draws_per_unit]
    near = {j: torch.exp(-((inclusion[k] - inclusion[j]) ** 2) / (2 * settings.bandwidth**2)) for j in others}
    seen = [(near[j], f[j, b, i]) for j in others for i in range(length) if draws.masked[j, b, i]]
    mean = sum(g * x for g, x in seen) / sum(g for g, _ in seen) if seen else torch.tensor(0.0).double()
    estimate = f[k, b].sum()
    for i in range(length):
        witnesses = [(near[j], f[j, b, i]) for j in others if draws.masked[j, b, i]]
        guess = sum(g * x for g, x in witnesses) + settings.ridge * mean
        guess = guess / (sum(g for g, _ in witnesses) + settings.ridge)
        estimate = estimate - settings.kappa * (draws.masked[k, b, i].double() - inclusion[k]) * guess
    return estimate / inclusion[k]


def test_coupled_responses_share_levels_and_the_fate_of_equal_tokens():
    prompt = torch.arange(300).unsqueeze(1)
    chosen = torch.cat([prompt, torch.tensor([[5, 6, 7, 8, 9, 5]]).expand(300, -1)], 1)
    rejected = chosen.clone()
    rejected[:, 3] = 4
    ids, maskable = torch.cat([chosen, rejected]), (torch.arange(7) > 0).expand(600, -1)
    draws = draw_masks(maskable, 4, "bernoulli", rows=ids, couple_pairs=True)
    first, second = draws.masked.chunk(2, dim=1)
    same = torch.arange(7) != 3
    assert torch.equal(first[..., same], second[..., same])
    differ = (first[..., 3] != second[..., 3]).double().mean()
    assert abs(differ - 1 / 3) < 5 * 0.5 / 300**0.5  # E[2 t (1 - t)]
    apart = draw_masks(maskable, 4, "bernoulli", rows=ids)
    first, second = apart.masked.chunk(2, dim=1)
    assert abs((first[..., 1] != second[..., 1]).double().mean() - 1 / 2) < 5 * 0.5 / 300**0.5
    with pytest.raises(ValueError, match=r"`couple_pairs=True` compares the content of rows: pass `rows`"):
        draw_masks(maskable, couple_pairs=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 2.5},
        {"kappa": -0.1},
        {"long_kappa": 2.5},
        {"bandwidth": 0.0},
        {"ridge": 0.0},
        {"ridge": float("nan")},
        {"ridge": float("inf")},
    ],
    ids=str,
)
def test_control_variate_refuses(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"`{name}` must be .*, got {value}"):
        ControlVariate(**settings)


@pytest.mark.parametrize("bandwidth", [0.1, 0.02, 0.01, 0.005])
def test_witnesses_that_are_too_far_away_are_none(bandwidth):
    """Their weight underflows, and one over it is infinite."""
    settings = ControlVariate(bandwidth=bandwidth)
    draws = draw_masks(torch.ones(4000, 200, dtype=torch.bool), 2, control_variate=settings)
    assert torch.isfinite(draws.weight).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("more", [{}, {"control_variate": ControlVariate()}, {"couple_pairs": True}], ids=str)
def test_draws_are_a_function_of_the_row(scheme, stratify, more):
    """Neither padding on either side nor batch mates nor their order change a row's draws."""
    sampler = MaskSampler(4, scheme, stratify, seed=7, **more)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 50, (n,), generator=generator) for n in (3, 7, 12, 7)]
    alone = []
    for row in rows:
        maskable = torch.arange(len(row)) >= 2
        alone.append(sampler(maskable.unsqueeze(0), row.unsqueeze(0), torch.ones(1, len(row)), nonce=5))
    for left in (False, True):
        length = 15
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        real, maskable = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[b, place], real[b, place], maskable[b, place] = row, True, torch.arange(len(row)) >= 2
        order = torch.tensor([2, 0, 3, 1])
        batch = sampler(maskable[order], ids[order], real[order], nonce=5)
        for b, original in enumerate(order.tolist()):
            assert torch.equal(batch.masked[:, b, real[original]], alone[original].masked[:, 0])
            assert torch.equal(batch.weight[:, b, real[original]], alone[original].weight[:, 0])
        assert not bool(batch.masked[:, ~real[order] | ~maskable[order]].any())


@pytest.mark.parametrize("change", ["seed", "nonce", "token", "prompt", "maskable"])
def test_anything_else_changes_the_draws(change):
    """Two draws agree no more often than two independent ones do."""
    ids = torch.arange(400 * 12).view(400, 12)
    maskable = (torch.arange(12) >= 4).expand(400, 12).clone()
    first = MaskSampler(seed=1)(maskable, ids, nonce=1)
    sampler, nonce = MaskSampler(seed=2 if change == "seed" else 1), 2 if change == "nonce" else 1
    if change in ("token", "prompt"):
        ids = ids.clone()
        ids[:, 6 if change == "token" else 0] += 1
    if change == "maskable":
        maskable[:, 4] = False
    second = sampler(maskable, ids, nonce=nonce)
    same = (first.masked == second.masked)[..., 5:].double().mean()
    hidden = 4.5 / 8  # mean share hidden of the 8 tokens; two independent masks agree where both hide or neither does
    independent = hidden**2 + (1 - hidden) ** 2
    assert abs(same - independent) < 5 * 0.5 / (400 * 8) ** 0.5  # positions of a row are dependent, draws are 8


def test_chosen_and_rejected_draws_are_uncorrelated():
    ids = torch.arange(4000 * 12).view(4000, 12)
    draws = MaskSampler(2, stratify=False)(torch.ones_like(ids).bool(), ids)
    counts = draws.masked.sum(-1).double()
    between_rows = torch.corrcoef(torch.stack([counts[0, ::2], counts[0, 1::2]]))[0, 1]
    between_draws = torch.corrcoef(counts)[0, 1]
    assert abs(between_rows) < 4 / 2000**0.5
    assert abs(between_draws) < 4 / 4000**0.5


def test_draws_of_version_5():
    """
    These very masks belong to DRAW_VERSION 5. Stored reference values are keyed by the version: if this test fails,
    raise the version and write the new masks here.
    """
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    maskable = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    draws = draw_masks(maskable, 4, "fixed_count", True, seed=42, rows=ids, nonce=3)
    packed = (draws.masked[:, 0].long() << torch.arange(8)).sum(-1).tolist()
    assert (DRAW_VERSION, packed) == (5, PACKED_VERSION_5)


PACKED_VERSION_5 = [64, 104, 172, 252]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_mc_samples": 0}, r"`num_mc_samples` must be at least 1, got 0"),
        ({"scheme": "gaussian"}, r"`scheme` must be one of .*fixed_count.*, got 'gaussian'"),
        ({"maskable": torch.tensor([[True], [False]])}, r"Rows \[1\] have no maskable token"),
        ({"maskable": torch.ones(3)}, r"`maskable` must be \(B, L\), rows by positions, got \(3,\)"),
        ({"rows": torch.zeros(2, 3)}, r"`rows` is \(2, 3\) and `maskable` \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"`attention_mask` is \(1, 4\) and `maskable` \(1, 3\)"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(**{"maskable": torch.ones(1, 3, dtype=torch.bool), **kwargs})


@pytest.mark.parametrize("make", [draw_masks, MaskSampler], ids=lambda make: make.__name__)
def test_the_control_variate_has_the_names_of_the_configuration(make):
    """A name is the setting that a trainer makes of it; that of a trainer's only says so."""

    def weight(value):
        maskable = torch.ones(3, 5, dtype=torch.bool)
        if make is draw_masks:
            return draw_masks(maskable, 4, control_variate=value).weight
        return MaskSampler(4, control_variate=value)(maskable).weight

    assert torch.equal(weight("none"), weight(None))
    assert torch.equal(weight("leave_one_out"), weight(ControlVariate()))
    assert not torch.equal(weight("leave_one_out"), weight("none"))
    with pytest.raises(ValueError, match=r"`control_variate='adaptive'` learns .* `ControlVariate\(kappa=\.\.\.\)`"):
        weight("adaptive")
    with pytest.raises(ValueError, match=r"`control_variate` must be 'none', 'leave_one_out' or .*, got True"):
        weight(True)


def test_draws_are_printed_by_their_sizes():
    draws = draw_masks(torch.ones(20, 300, dtype=torch.bool), 4, "mirror", control_variate=ControlVariate(kappa=0.5))
    assert repr(draws) == (
        "MaskDraws(4 draws of 20 rows of 300 tokens, 2 per unit, "
        "ControlVariate(kappa=0.5, bandwidth=None, ridge=None, long_kappa=None))"
    )


def test_mask_draws_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(K, B, L\) bool"):
        MaskDraws(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))


# --------------------------------------------------------------------------------------------------------------- blocks

# One prompt token and six of the response in absolute blocks of three: two of the first block, a whole one, one token
BLOCKS, PARTS = torch.tensor([0, 0, 0, 1, 1, 1, 2]), (slice(1, 3), slice(3, 6), slice(6, 7))


@pytest.mark.parametrize("couple_pairs", [False, True], ids=["", "coupled"])
@pytest.mark.parametrize("control", ["plain", "control"])
@pytest.mark.parametrize("stratify", [False, True], ids=["", "stratified"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_law_of_each_block(scheme, stratify, control, couple_pairs):
    """A block that the response begins in, a whole one, and a single token: each keeps the law as a row does."""
    number = 3
    ids = response_pairs(6) if couple_pairs else torch.arange(ROWS).repeat_interleave(7).view(ROWS, -1)
    maskable, blocks = (torch.arange(7) > 0).expand(len(ids), -1), BLOCKS.expand(len(ids), -1)
    arguments = (maskable, number, scheme, stratify, 1, ids)
    options = {"couple_pairs": couple_pairs, "blocks": blocks}
    draws = draw_masks(*arguments, control_variate=CONTROLS[control], **options)
    level = draw_masks(*arguments, control_variate="leave_one_out", **options).control.inclusion
    level = level.unflatten(1, (len(ids), len(PARTS)))  # (K, B, blocks)
    for block, part in enumerate(PARTS):
        length = part.stop - part.start
        law, keep = [1 / (n * comb(length, n)) for n in range(1, length + 1)], torch.ones(len(ids), dtype=torch.bool)
        if scheme == "bernoulli":
            keep, law = (level[..., block] >= 1 / CAP).all(0), capped_law(length, number, stratify)
        for half in torch.arange(len(ids)).chunk(1 + couple_pairs):
            masked, weight = draws.masked[:, half, part], draws.weight[:, half, part]
            mean, standard_error = mean_weight_by_mask(masked, weight, keep[half])
            for m in subsets(length):
                row, places = sum(1 << i for i in m), list(m)
                z = (mean[row, places] - law[len(m) - 1]) / standard_error[row, places]
                assert z.abs().max() < LARGEST_Z, (block, m)


@pytest.mark.parametrize("scheme", ["fixed_count", "mirror"])
@pytest.mark.parametrize("a", [0.5, 0.75])
def test_levels_of_each_block_have_the_law_that_is_asked_for(a, scheme):
    """P(l) = C(L' - 1, l - 1) B(l - 1 + a, L' - l + a) / B(a, a) of the block's own L', and the weight 1 / (l P(l))."""
    ids = torch.arange(ROWS).repeat_interleave(7).view(ROWS, -1)
    maskable, blocks = (torch.arange(7) > 0).expand(ROWS, -1), BLOCKS.expand(ROWS, -1)
    draws = draw_masks(maskable, 2, scheme, rows=ids, blocks=blocks, level_concentration=a)
    for part in PARTS:
        length, masked = part.stop - part.start, draws.masked[..., part]
        for count in range(1, length + 1):
            logs = [lgamma(x) for x in (count - 1 + a, length - count + a, 2 * a)]
            logs += [-lgamma(x) for x in (length - 1 + 2 * a, a, a)]
            probability = comb(length - 1, count - 1) * exp(sum(logs))
            there = masked.sum(-1) == count  # (K, B)
            error = (probability * abs(1 - probability) / ROWS) ** 0.5 + 1e-12  # a block of one token has no choice
            assert (there.double().mean(1) - probability).abs().max() <= LARGEST_Z * error
            weight = draws.weight[..., part][there.unsqueeze(-1) & masked] * 2
            torch.testing.assert_close(weight, torch.full_like(weight, 1 / (count * probability)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("stratify", [False, True], ids=["", "stratified"])
def test_blocks_are_drawn_for_independently(scheme, stratify):
    """One draw hides something of every block, and how much of one says nothing of another."""
    ids = torch.arange(4000 * 8).view(4000, 8)
    blocks = torch.arange(8).div(4, rounding_mode="floor").expand(4000, -1)
    draws = draw_masks(torch.ones_like(ids).bool(), 2, scheme, stratify, rows=ids, blocks=blocks)
    counts = draws.masked.unflatten(-1, (2, 4)).sum(-1).double()  # (K, B, blocks)
    assert scheme == "bernoulli" or bool((counts > 0).all())
    for first in range(2):
        for second in range(2):
            assert abs(torch.corrcoef(torch.stack([counts[first, :, 0], counts[second, :, 1]]))[0, 1]) < 4 / 4000**0.5


@pytest.mark.parametrize("more", [{}, {"control_variate": ControlVariate()}, {"couple_pairs": True}], ids=str)
def test_blocks_of_a_row_depend_on_the_row_alone(more):
    """Padding on either side and rows with other blocks change nothing; of coupled responses equal blocks are equal."""
    sampler = MaskSampler(4, "mirror", True, seed=7, **more)
    row, others = torch.arange(20, 31), torch.randint(5, 50, (2, 15), generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(11) - 1).div(4, rounding_mode="floor")
    maskable = torch.arange(11) >= 3
    alone = sampler(maskable[None], row[None], torch.ones(1, 11), 5, blocks=numbers[None])
    for start in (0, 4):
        ids, real = others.clone(), torch.ones(2, 15)
        blocks, there = torch.arange(15).div(5, rounding_mode="floor").repeat(2, 1), torch.arange(15).repeat(2, 1) >= 6
        place = slice(start, start + 11)
        ids[0], real[0], blocks[0], there[0] = 0, 0, 0, False
        ids[0, place], real[0, place], blocks[0, place], there[0, place] = row, 1, numbers, maskable
        batch = sampler(there, ids, real, 5, blocks=blocks)
        assert torch.equal(batch.masked[:, 0, place], alone.masked[:, 0])
        assert torch.equal(batch.weight[:, 0, place], alone.weight[:, 0])
        assert batch.masked.sum() == (batch.masked & there).sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_control_variate_of_blocks_is_that_of_rows(scheme):
    """Weights give what the samples of single draws give on average, and a block is controlled by itself."""
    maskable, blocks = (torch.arange(7) > 0).expand(5, -1), BLOCKS.expand(5, -1)
    draws = draw_masks(maskable, 6, scheme, seed=8, control_variate="leave_one_out", blocks=blocks)
    f = torch.randn(draws.masked.shape, generator=torch.Generator().manual_seed(0)).double() * draws.masked
    samples, control = draws.samples(f)
    assert samples.shape == control.shape == (6, 5)
    torch.testing.assert_close((draws.weight * f).sum((0, 2)), samples.mean(0), rtol=1e-5, atol=1e-5)
    of_blocks = 0
    for part in PARTS:
        inside = torch.zeros_like(f)
        inside[..., part] = f[..., part]
        of_blocks = of_blocks + draws.samples(inside)[0]
    torch.testing.assert_close(of_blocks, samples)


def test_blocks_that_go_down_are_refused():
    maskable = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="`blocks` must number the blocks of a row from left to right"):
        draw_masks(maskable, blocks=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match=r"`blocks` is \(1, 3\) and `maskable` \(1, 4\)"):
        draw_masks(maskable, blocks=torch.zeros(1, 3))
