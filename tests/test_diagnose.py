"""The diagnosis of variance: its arithmetic against enumeration and against estimates made one by one; its course."""

import json
from dataclasses import replace
from itertools import product
from math import comb

import diagnose_variance as script
import pytest
import torch
from conftest import make_model, make_pairs, make_tokenizer
from datasets import DatasetDict, IterableDataset
from oracles import MASK, TableDenoiser, exact_fixed_count_variances, subsets
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from trl_diffusion import (
    ControlVariate,
    DiffusionVRPOConfig,
    LLaDAModelLM,
    VarianceReport,
    diagnose_variance,
    draw_masks,
    elbo,
)
from trl_diffusion.diagnosis.diagnose import _about_zero, _variance, with_learnt_kappa
from trl_diffusion.diagnosis.report import ENOUGH_DRAWS, ESTIMATORS
from trl_diffusion.estimators.variance import (
    Scored,
    fixed_count_repeats,
    fixed_count_samples,
    repeats,
    variance_between,
    variance_of_repeats,
    variance_parts,
)
from trl_diffusion.models import families
from trl_diffusion.models.llada.family import LLADA
from trl_diffusion.scoring import head

LENGTH = 8
IDS = torch.randint(0, MASK, (LENGTH,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def log_ratios():
    """Every token's log-ratio under every mask: `(2^L, L)`, by the mask's code."""
    policy = TableDenoiser(LENGTH, seed=1)
    reference = TableDenoiser(LENGTH, seed=2, near=policy, distance=0.3)
    table = torch.zeros(2**LENGTH, LENGTH, dtype=torch.float64)
    for m in subsets(LENGTH):
        noised = IDS.clone()
        noised[list(m)] = MASK
        for model, sign in ((policy, 1), (reference, -1)):
            found = model(noised.unsqueeze(0))[0].log_softmax(-1)
            for i in m:
                table[sum(1 << j for j in m), i] += sign * found[i, IDS[i]]
    return policy, reference, table


def scored(table, num_draws, seed):
    """In two sets."""
    masked = draw_masks(torch.ones(2, LENGTH, dtype=torch.bool), num_draws // 2, "mirror", True, seed=seed).masked
    masked = masked.transpose(0, 1)
    return Scored(masked, table[(masked.long() << torch.arange(LENGTH)).sum(-1)])


def test_variance_of_repeats_by_enumeration():
    """Sets whose repeats depend on each other in any way: the mean over all that can come is the variance of one."""
    outcomes = torch.tensor([[1.0, -1.0, 4.0], [3.0, -2.0, 0.0], [-1.0, 4.0, 1.0]]).double()  # of a set, equally likely
    every = [torch.stack(sets) for sets in product(outcomes, repeat=3)]
    assert outcomes.mean(0).sum() == 3 * outcomes.mean(0)[0]  # repeats have one distribution's mean
    exact = outcomes.flatten().var(correction=0).item()
    assert sum(map(variance_of_repeats, every)) / len(every) == pytest.approx(exact, rel=1e-12)
    alone = torch.tensor([[1.0], [2.0], [4.0]]).double()
    assert variance_of_repeats(alone) == pytest.approx(alone.var().item(), rel=1e-12)


@pytest.mark.parametrize("scheme, count", [("mirror", 4), ("mirror", 16), ("fixed_count", 4), ("fixed_count", 16)])
def test_noise_of_levels_alone_is_not_overstated(scheme, count):
    """Every token is worth -(2 + 4 t^2) nats at level t: repeats of a set lie evenly between each other's levels."""

    size, length = 20_000, 37

    def worth(masked):
        return -(2 + 4 * (masked.sum(-1, keepdim=True) / length).double().square()) * masked

    draws = draw_masks(torch.ones(size, length, dtype=torch.bool), count, scheme, True, seed=2)
    squared = (worth(draws.masked) * draws.weight).sum((0, 2))
    squared = (squared - squared.mean()).square()
    masked = draw_masks(torch.ones(2 * 500, length, dtype=torch.bool), 32, "mirror", True, seed=1).masked
    found = torch.tensor(
        [
            variance_of_repeats(
                (repeats if scheme == "mirror" else fixed_count_repeats)(Scored(sets, worth(sets)), count)
            )
            for sets in masked.transpose(0, 1).split(2)
        ]
    )
    error = (squared.var() / size + found.var() / len(found)).sqrt()
    assert abs(found.mean() - squared.mean()) < 4 * error


def test_variance_parts_of_as_many_draws_as_are_reported(log_ratios):
    """To the tenth that is read off a report."""
    table = log_ratios[-1]
    found = torch.tensor([list(variance_parts(scored(table, ENOUGH_DRAWS, seed)).values()) for seed in range(200)])
    many = torch.tensor([list(variance_parts(scored(table, 1024, seed)).values()) for seed in range(40)])
    shares, exact = (mean / mean.sum() for mean in (found.mean(0), many.mean(0)))
    assert (shares - exact).abs().max() < 0.1 + 4 * (found.std(0) / 200**0.5 / found.mean(0).sum()).max()


def pair_with_tables():
    """Two responses to one prompt, of eight and seven tokens, two of which differ; and all their log-probabilities."""
    second = IDS[:7].clone()
    second[[2, 5]] = (second[[2, 5]] + 1) % MASK
    model, pair = TableDenoiser(LENGTH, seed=1), []
    for ids in (IDS, second):
        table = torch.zeros(2 ** len(ids), len(ids), dtype=torch.float64)
        for m in subsets(len(ids)):
            noised = ids.clone()
            noised[list(m)] = MASK
            log_probs = model(torch.nn.functional.pad(noised, (0, LENGTH - len(ids))).unsqueeze(0))[0].log_softmax(-1)
            for i in m:
                table[sum(1 << j for j in m), i] = log_probs[i, ids[i]]
        pair.append((ids, table))
    return pair


def draw_pairs(pair, prompts, num_draws, scheme, stratify, seed, control_variate, couple_pairs, level_concentration):
    """Draws of the pair behind each of `prompts`, and the log-probabilities they meet, of chosen and rejected."""
    size = len(prompts)
    rows = torch.zeros(2 * size, 1 + LENGTH, dtype=torch.long)
    rows[:, 0] = prompts.repeat(2)
    real = torch.ones_like(rows, dtype=torch.bool)
    for i, (ids, _) in enumerate(pair):
        rows[i * size : (i + 1) * size, 1 : 1 + len(ids)] = ids
        real[i * size : (i + 1) * size, 1 + len(ids) :] = False
    maskable = real.clone()
    maskable[:, 0] = False
    options = {"attention_mask": real, "control_variate": control_variate, "couple_pairs": couple_pairs}
    options["level_concentration"] = level_concentration
    draws = draw_masks(maskable, num_draws, scheme, stratify, seed, rows, **options)
    for i, (ids, table) in enumerate(pair):
        own = (slice(None), slice(i * size, (i + 1) * size), slice(1, 1 + len(ids)))
        masked = draws.masked[own]
        yield masked, table[(masked.long() << torch.arange(len(ids))).sum(-1)], draws.weight[own]


@pytest.mark.parametrize("law", [1.0, 0.5], ids=["uniform", "arcsine"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_variance_of_a_pair_is_that_of_scores_made_one_by_one(name, law):
    """Every estimator of the report at K = 4, of scores whose two responses are drawn as a trainer draws them."""
    pair, size = pair_with_tables(), 4000
    options = ESTIMATORS[name]
    control = None if options["control_variate"] == "none" else ControlVariate()
    made = draw_pairs(
        pair, 100 + torch.arange(size), 4, options["mask_scheme"], options["stratify"], 7, control,
        options["couple_pairs"], 1.0 if name == "VRPO paper" else law,
    )  # fmt: skip
    chosen, rejected = ((values * weight).sum((0, 2)) for _, values, weight in made)
    squared = ((chosen - rejected) - (chosen - rejected).mean()).square()
    drawn = [
        [part.transpose(0, 1).unflatten(0, (200, 2)) for part in (masked, values)]
        for masked, values, _ in draw_pairs(pair, 10**6 + torch.arange(400), 32, "mirror", True, 5, None, True, law)
    ]
    found = torch.tensor(
        [_variance(name, 4, *(Scored(masked[r], values[r], law) for masked, values in drawn)) for r in range(200)]
    )
    error = (squared.var() / size + found.var() / len(found)).sqrt()
    assert abs(found.mean() - squared.mean()) < 4 * error + 0.03 * squared.mean()


def test_the_default_has_the_kappa_that_the_other_pairs_would_teach():
    """Of pairs in which b is 1.5 h and noise, and one in which it is 0.5 h; and of pairs that kappa does not touch."""
    slope, square, noise = torch.tensor([[1.5, 1.5, 0.5], [4.0, 1.0, 1.0], [3.0, 1.0, 2.0]]).double()

    def at(kappa):
        return noise + (slope - kappa).square() * square

    taught = torch.tensor([(1.5 + 0.5) / 2, (4 * 1.5 + 0.5) / 5, 1.5]).double()
    torch.testing.assert_close(with_learnt_kappa(torch.stack([at(0), at(1), at(2)], 1)), at(taught))
    alike = torch.tensor([[3.0, 3.0, 3.0], [0.1, 0.1, 0.1]]).double()
    torch.testing.assert_close(with_learnt_kappa(alike), alike[:, 0])


def test_variance_parts_against_enumeration(log_ratios):
    policy, reference, table = log_ratios
    level, within = exact_fixed_count_variances(policy, IDS, reference)
    tokens = 0.0
    for size in range(1, LENGTH + 1):
        masks = [m for m in subsets(LENGTH) if len(m) == size]
        values = torch.stack([table[sum(1 << j for j in m)] for m in masks])
        mu = values.sum(0) / comb(LENGTH - 1, size - 1)
        of_means = torch.tensor([mu[list(m)].sum() * LENGTH / size for m in masks])
        tokens += of_means.var(correction=0).item() / LENGTH
    found = [variance_parts(scored(table, 256, seed)) for seed in range(200)]
    for part, exact in {"level": level, "tokens": tokens, "context": within - tokens}.items():
        values = torch.tensor([each[part] for each in found])
        assert abs(values.mean() - exact) < 4 * values.std() / 200**0.5, part


@pytest.mark.parametrize("num_draws", [4, 8])
@pytest.mark.parametrize(
    "scheme, control_variate", [("fixed_count", None), ("mirror", None), ("mirror", ControlVariate())], ids=str
)
def test_repeats_have_the_variance_of_estimates_made_one_by_one(log_ratios, scheme, control_variate, num_draws):
    policy, reference, table = log_ratios
    size = 4000
    maskable = torch.ones(size, LENGTH, dtype=torch.bool)
    draws = draw_masks(maskable, num_draws, scheme, True, seed=11, control_variate=control_variate)
    first, second = (
        elbo(model, IDS.expand(size, LENGTH), maskable, draws=draws, mask_token_id=MASK).value.double()
        for model in (policy, reference)
    )
    squared = ((first - second) - (first - second).mean()).square()
    found = []
    for seed in range(150):
        one = scored(table, 64, seed)
        values = (
            fixed_count_repeats(one, num_draws) if scheme == "fixed_count" else repeats(one, num_draws, control_variate)
        )
        assert values.shape == (2, 32 // num_draws // (2 if scheme == "fixed_count" else 1))
        found.append(variance_of_repeats(values))
    found = torch.tensor(found)
    error = (squared.var() / size + found.var() / len(found)).sqrt()
    assert abs(found.mean() - squared.mean()) < 4 * error
    whole = scored(table, 64, 0)
    assert (repeats(whole, 32).squeeze(1) - fixed_count_samples(whole).mean(1)).abs().max() < 1e-9


def diagnose(tmp_path, model=None, ref_model=None, dataset=None, **options):
    options = {"num_pairs": 4, "num_draws": 32, "processing_class": make_tokenizer(), **options}
    args = DiffusionVRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], seed=5)
    return diagnose_variance(
        model if model is not None else make_model(seed=1), ref_model, make_pairs() if dataset is None else dataset,
        args, **options,
    )  # fmt: skip


def count_forwards(monkeypatch):
    calls, plain = [], head._score_draws
    monkeypatch.setattr(head, "_score_draws", lambda *a, **k: calls.append(1) or plain(*a, **k))
    return calls


def test_report_of_a_policy_and_a_reference(tmp_path):
    report = diagnose(tmp_path, make_model(seed=1), make_model(seed=2))
    assert report.compares_with_reference and report.num_pairs == 4
    assert sum(report.parts.values()) == pytest.approx(1)
    assert set(report.variance) == {(name, count) for name in ESTIMATORS for count in (2, 4, 8)}
    text = str(report)
    assert "| default |" in text and "Recommended: num_mc_samples=" in text
    DiffusionVRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **report.options)

    rows = [json.loads(line) for line in (tmp_path / "variance.jsonl").read_text().splitlines()]
    mean = sum(row["variance"]["VRPO paper|8"][0] for row in rows) / 4
    assert report.variance["VRPO paper", 8] == pytest.approx(0.2**2 * mean)
    assert report.variance["VRPO paper", 2] == pytest.approx(4 * report.variance["VRPO paper", 8])


def test_an_interrupted_diagnosis_goes_on_and_other_weights_start_anew(tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    report = diagnose(tmp_path, make_model(seed=1), make_model(seed=2))
    whole, path = len(calls), tmp_path / "variance.jsonl"
    text = path.read_text()
    assert diagnose(tmp_path, make_model(seed=1), make_model(seed=2)) == report and len(calls) == whole
    path.write_text(text[: -len(text) // 8])  # the last of four lines is cut in half
    assert diagnose(tmp_path, make_model(seed=1), make_model(seed=2)) == report
    assert 0 < len(calls) - whole <= whole // 2
    before = len(calls)
    assert diagnose(tmp_path, make_model(seed=3), make_model(seed=2)) != report
    assert len(calls) == before + whole
    assert diagnose(tmp_path, make_model(seed=1, rms_norm_eps=0.1), make_model(seed=2)) != report
    assert len(calls) == before + 2 * whole
    assert diagnose(tmp_path, make_model(seed=1), make_model(seed=2, rms_norm_eps=0.1)) != report
    assert len(calls) == before + 3 * whole


def test_a_policy_that_is_its_reference_is_said_to_be(tmp_path):
    model = make_model(seed=1)
    report = diagnose(tmp_path / "out", model)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    by_path = diagnose(tmp_path / "by path", str(tmp_path / "model"), processing_class=None)
    assert by_path.variance == report.variance
    assert not report.compares_with_reference and "stand in for log-ratios" in str(report)
    # How many draws are enough is a statement about the score, which is zero
    assert "num_mc_samples" not in report.options and "num_mc_samples" not in str(report)
    assert "Score: " not in str(report) and "train for some steps" in str(report)
    assert all(v > 0 for v in report.variance.values())
    # An adapter that is still to be made does nothing yet
    assert diagnose(tmp_path / "with adapter", model, peft_config=LoraConfig(r=2)).variance == report.variance


def test_log_probabilities_stand_in_about_zero():
    """The same number of nats for every token: no noise under uniform levels, and none that an importance makes."""
    masked = draw_masks(torch.ones(4, 40, dtype=torch.bool), 16, "mirror", True, level_concentration=0.75).masked
    masked = masked.view(16, 2, 2, 40).permute(1, 0, 2, 3)  # two sets of two responses
    per_token = torch.tensor([-3.0, -5.0]).view(2, 1)
    noise = torch.randn(masked.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _about_zero((per_token + noise).double() * masked, masked)
    alike = _about_zero((per_token * masked).double(), masked)
    assert alike.abs().max() < 1e-12
    for b in (0, 1):
        whole, moved = (Scored(masked[:, :, b], x[:, :, b]) for x in ((per_token + noise) * masked, found))
        for law in (whole, moved):
            assert variance_of_repeats(repeats(law, 4)) > 0
        assert variance_of_repeats(repeats(moved, 4)) == pytest.approx(variance_of_repeats(repeats(whole, 4)), rel=1e-9)
        other_law = [variance_of_repeats(repeats(replace(x, level_concentration=0.75), 4)) for x in (whole, moved)]
        assert other_law[1] < other_law[0]


def trained_adapter(base, **options):
    torch.manual_seed(0)
    options = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"], "lora_dropout": 0.5, **options}
    return get_peft_model(base, LoraConfig(**options))


def partly_frozen():
    model = make_model(seed=1)
    model.get_input_embeddings().requires_grad_(False)
    return model


def adapter_and_its_copy():
    """As a trainer leaves it, in training mode, with a frozen half of an adapter."""
    model = trained_adapter(make_model(seed=1), modules_to_save=["ff_norm"])
    model.add_adapter("ref", model.peft_config["default"])
    model.train()
    next(p for name, p in model.named_parameters() if "lora_A.default" in name).requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [make_model, partly_frozen, adapter_and_its_copy], ids=lambda make: make.__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_models_are_left_as_they_came(tmp_path, make, fails, monkeypatch):
    """Weights to the last bit, names, what is trained, modes, configuration and forward; also after an error."""
    models = make(), make_model(seed=2)

    def state(model):
        return (
            {name: (value.clone(), value.dtype) for name, value in model.state_dict().items()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
            {name: sorted(vars(module)) for name, module in model.named_modules()},
            (
                model.config.to_dict(),
                repr(getattr(model, "peft_config", None)),
                getattr(model, "active_adapters", None),
            ),
        )

    before = list(map(state, models))
    if fails:
        monkeypatch.setattr(head, "_score_draws", lambda *arguments: torch.full(arguments[-1].masked.shape, torch.nan))
        with pytest.raises(ValueError, match="The example is"):
            diagnose(tmp_path, *models)
    else:
        diagnose(tmp_path / "with a reference", *models)
        diagnose(tmp_path / "without", models[0])
    for old, new in zip(before, map(state, models), strict=True):
        assert old[1:] == new[1:] and old[0].keys() == new[0].keys()
        assert all(torch.equal(old[0][name][0], new[0][name][0]) for name in old[0])
        assert all(old[0][name][1] == new[0][name][1] for name in old[0])


@pytest.mark.parametrize(
    "model, options, message",
    [
        (trained_adapter(make_model()), {"peft_config": LoraConfig()}, "has an adapter, and `peft_config` would make"),
        (make_model(), {"peft_config": LoraConfig(init_lora_weights=False)}, "makes an adapter of random weights"),
        (make_model(), {"peft_config": PromptTuningConfig()}, "Virtual tokens before the prompt cannot be scored"),
        (make_model(), {"quantization_config": object()}, "`quantization_config` is for a model that is given by its"),
        ("merged", {}, r"is merged into the base model: .* Call `model\.unmerge_adapter\(\)`"),
    ],
)
def test_what_is_no_policy_beside_its_reference_is_refused(tmp_path, model, options, message):
    if model == "merged":
        model = trained_adapter(make_model())
        model.merge_adapter()
    with pytest.raises(ValueError, match=message):
        diagnose(tmp_path, model, **options)


def test_another_fact_of_the_family_is_another_diagnosis(tmp_path, monkeypatch):
    """Stored pairs are found under everything that their scores depend on."""
    calls = count_forwards(monkeypatch)
    report = diagnose(tmp_path)
    whole = len(calls)
    monkeypatch.setattr(families, "FAMILIES", [replace(LLADA, logit_shift=1)])
    assert diagnose(tmp_path) != report and len(calls) == 2 * whole


def test_an_adapter_that_has_changed_its_base_model(tmp_path):
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` changes .* Pass that one as `ref_model`"):
        diagnose(tmp_path, get_peft_model(make_model(), config))


def test_the_path_of_an_adapter_is_checked_as_the_adapter_is(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    policy = trained_adapter(LLaDAModelLM.from_pretrained(tmp_path / "base"))
    policy.save_pretrained(tmp_path / "adapter")
    report = diagnose(tmp_path / "a", policy)
    by_path = diagnose(tmp_path / "b", str(tmp_path / "adapter"), processing_class=None)
    assert by_path.compares_with_reference and by_path == report
    with pytest.raises(ValueError, match="has an adapter, and `peft_config` would make another"):
        diagnose(tmp_path / "c", str(tmp_path / "adapter"), peft_config=LoraConfig())


def test_a_stream_and_what_is_no_dataset(tmp_path):
    rows = make_pairs()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert diagnose(tmp_path / "a", dataset=stream).variance == diagnose(tmp_path / "b", dataset=rows).variance
    for wrong in (DatasetDict(train=rows), rows.to_list()):
        with pytest.raises(TypeError, match="The train dataset must be a `Dataset` or `IterableDataset`"):
            diagnose(tmp_path, dataset=wrong)


def test_an_adapter_is_compared_with_the_model_without_it(tmp_path):
    policy, merged = trained_adapter(make_model(seed=1)), trained_adapter(make_model(seed=1))
    with_adapter = diagnose(tmp_path / "a", policy)
    explicit = diagnose(tmp_path / "b", merged.merge_and_unload(), make_model(seed=1))
    assert with_adapter.compares_with_reference
    for cell, variance in explicit.variance.items():
        assert with_adapter.variance[cell] == pytest.approx(variance, rel=1e-2)
    assert with_adapter.margin == pytest.approx(explicit.margin, rel=1e-3)


REPORT = VarianceReport(
    num_pairs=9, num_draws=64, beta=0.2, compares_with_reference=True, overlap=0.5, margin=1.0, margin_spread=1.0,
    parts={"level": 0.2, "tokens": 0.5, "context": 0.3},
    variance={(name, k): 4.0 / k for name in ESTIMATORS for k in (2, 4, 8, 16)},
    error={(name, k): 0.1 / k for name in ESTIMATORS for k in (2, 4, 8, 16)},
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, target, expected",
    [
        ({}, 0.5, ("default", 16)),
        ({}, 0.8, ("default", 8)),
        ({}, 0.1, ("default", 16)),  # not reached: the most there is
        ({("mirror", 16): 0.245}, 0.5, ("default", 16)),  # within the noise of the measurement
        ({("mirror", 16): 0.1, ("mirror", 8): 0.2}, 0.5, ("mirror", 8)),
        ({("VRPO paper", 16): 0.1}, 0.5, ("VRPO paper", 16)),
    ],
)
def test_recommendation(changes, target, expected):
    report = replace(REPORT, variance=REPORT.variance | changes, target_standard_error=target, level_concentration=0.75)
    assert report.recommended == expected
    law = {"level_concentration": 1.0 if expected[0] == "VRPO paper" else 0.75}
    assert report.options == {"num_mc_samples": expected[1], **ESTIMATORS[expected[0]], **law}
    assert DiffusionVRPOConfig("x", use_cpu=True, bf16=False, **report.options).mask_sampler().scheme
    reached = report.variance[expected] ** 0.5 <= target
    assert (" is small enough " in str(report)) == reached


@pytest.mark.parametrize("between, expected", [(0.0, 16), (0.3, 16), (0.5, 8), (1.1, 4), (2.0, 2), (50.0, 2)])
def test_noise_that_is_small_beside_the_spread_between_pairs_is_small_enough(between, expected):
    """V(K) = 4 / K: the fewest draws with which all others could not halve the variance of a mean over pairs."""
    report = replace(REPORT, between_pairs=between)
    of_mean = {k: between + 4.0 / k for k in (2, 4, 8, 16)}  # times the number of pairs
    fewest = [k for k, variance in of_mean.items() if between >= variance / 2 or 4.0 / k <= 0.5**2]
    assert report.recommended == ("default", expected) and (fewest or [16])[0] == expected


def test_the_spread_between_pairs_is_without_the_noise_by_enumeration():
    """Three pairs, each measured twice with independent noise: the mean over all outcomes is the truth's variance."""
    truth, noise = torch.tensor([1.0, -2.0, 4.0]).double(), torch.tensor([0.5, 3.0, 1.0]).double()
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=6))).double().view(-1, 3, 2)
    found = [variance_between(truth.unsqueeze(1) + noise.unsqueeze(1) * sign) for sign in signs]
    assert sum(found) / len(found) == pytest.approx(truth.var().item(), rel=1e-12)


def test_shares_that_were_not_measured_are_not_printed():
    """Each part is a difference of estimates; with few draws of few pairs one can come out far below zero."""
    assert "level 20%, tokens 50%, context 30%." in str(REPORT)
    assert "tokens 0%, context 99%" in str(replace(REPORT, parts={"level": 0.02, "tokens": -0.01, "context": 0.99}))
    for change in ({"parts": {"level": 0.08, "tokens": -2.78, "context": 3.7}}, {"num_draws": 32}):
        assert "single draw: too few pairs or draws to tell where it comes from." in str(replace(REPORT, **change))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pairs": 1}, "`num_pairs` must be at least 2, for a spread over pairs, got 1"),
        ({"num_draws": 40}, "`num_draws` must be a multiple of 32, got 40. The default is 64"),
        ({"dataset": make_pairs(1)}, "1 pairs are left of the dataset"),
    ],
    ids=str,
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(tmp_path, **options)
    with pytest.raises(ValueError, match="`dataset` is missing"):
        diagnose_variance(make_model())


@pytest.mark.slow
def test_the_example(tmp_path, capsys):
    model, tokenizer = make_model(seed=1), make_tokenizer(with_mask=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    make_pairs().to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "model_name_or_path": tmp_path / "model", "adapter_name_or_path": tmp_path / "adapter",
        "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out", "num_pairs": 3, "num_draws": 32,
        "use_cpu": True, "bf16": False, "report_to": "none",
    }  # fmt: skip
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    script.main(*script.make_parser().parse_args_and_config(flags, fail_with_unknown_args=True))
    printed = capsys.readouterr().out
    assert "3 pairs, 32 draws" in printed and "Recommended: " in printed
    assert "stand in for" not in printed
