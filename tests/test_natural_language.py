"""The arithmetic of the benchmark on natural language, on a BERT of random weights: it needs no packages."""

import random

import natural_language as natural
import natural_text
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from trl_diffusion import MaskSampler, draw_masks, elbo

PROMPT, RESPONSES = [3, 4], [[5, 6, 7, 8, 9], [5, 6, 9, 2]]


def tiny_bert(seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, initializer_range=0.5, mask_token_id=1)
    return BertForMaskedLM(config).eval()


def test_the_score_of_masks_is_the_elbo():
    """Hidden positions alone through the head, against full logits of every position."""
    model = tiny_bert(0)
    ids = torch.tensor([PROMPT + RESPONSES[0]])
    maskable = torch.arange(7).unsqueeze(0) >= 2
    draws = draw_masks(maskable, 6, seed=1)
    found = natural.log_probs(model, PROMPT, RESPONSES[0], draws.masked[:, 0, 2:])
    expected = elbo(model, ids, maskable, draws=draws).value.item()
    assert (found * draws.weight[:, 0, 2:]).sum().item() == pytest.approx(expected, rel=1e-5)


def test_the_trace_of_the_gradient_by_enumeration():
    """Fixed counts of two tokens: {0} and {1} with weight 2 and chance 1/4 each, both with weight 1 and chance 1/2."""
    model, response, number = tiny_bert(0), [5, 6], 200
    matrices = [p for name, p in model.named_parameters() if "encoder" in name and p.dim() == 2]
    outcomes = []
    for masked, weight in (([1, 0], 2.0), ([0, 1], 2.0), ([1, 1], 1.0), ([1, 1], 1.0)):  # equally likely
        value = weight * natural._hidden_log_probs(model, PROMPT, response, torch.tensor([masked]).bool()).sum()
        outcomes.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, matrices)]).double())
    distances = (torch.stack(outcomes) - torch.stack(outcomes).mean(0)).square().sum(1)
    found = natural.trace_of_gradient(model, PROMPT, response, MaskSampler(1, "fixed_count"), number)
    standard_error = distances.std(correction=0).item() / number**0.5
    assert abs(found - distances.mean().item()) < 4 * standard_error


def test_a_pair_is_read_off_under_every_law(monkeypatch):
    """Every cell is there; the laws agree on the baseline and on the log-ratio, which they estimate without bias."""
    monkeypatch.setattr(natural, "GRID", [])
    models = {"base": tiny_bert(0), "near": tiny_bert(1), "far": tiny_bert(2)}
    found = natural.measure_pair(models, (PROMPT, *RESPONSES), num_sets=30)["near"]
    names = {f"a={law:g}{control}{coupled}" for law in natural.LAWS for control in ("", ", control")
             for coupled in ("", ", coupled")}  # fmt: skip
    assert set(found["cells"]) == {f"{name}|{k}" for name in (*names, "fixed counts") for k in natural.COUNTS}
    assert all(cell["score"] > 0 for cell in found["cells"].values())

    exact = []
    for response in RESPONSES:
        ids = torch.tensor([PROMPT + response]).expand(4000, -1)
        maskable = torch.arange(ids.shape[1]).expand(4000, -1) >= 2
        draws = draw_masks(maskable, 1, seed=3)
        ratio = [elbo(models[name], ids, maskable, draws=draws).value.double() for name in ("near", "base")]
        exact.append(ratio[0] - ratio[1])
    variance = sum(x.var().item() for x in exact)
    assert found["cells"]["fixed counts|8"]["score"] == pytest.approx(variance / 8, rel=0.2)
    for value, samples in zip(found["log_ratios"], exact, strict=True):
        assert abs(value - samples.mean().item()) < 5 * samples.std().item() * (1 / 4000 + 1 / 480) ** 0.5


def test_pairs_of_answers():
    opening = "We refer to Wikipedia articles on law for help. "
    rows = [
        {"subject": "law", "question": "?", "answer": f"{opening}Number {i} speaks plainly about contracts. (A)."}
        for i in range(3)
    ]
    rng = random.Random(0)
    for pair, row in zip(natural_text.answer_pairs(rows, "edited", rng), rows, strict=True):
        assert pair["chosen"] == row["answer"]
        changed = [a != b for a, b in zip(pair["chosen"].split(), pair["rejected"].split(), strict=True)]
        assert 2 <= sum(changed) <= 4 and changed[-1]
    answers = {row["answer"] for row in rows}
    for pair, row in zip(natural_text.answer_pairs(rows, "other", rng), rows, strict=True):
        assert pair["rejected"] in answers - {row["answer"]}
    for pair in natural_text.answer_pairs(rows, "plain", rng):
        assert pair["chosen"].startswith("Number") and pair["rejected"].startswith("Number")
