"""The arithmetic of the benchmark on natural language, on a BERT of random weights: it needs no packages."""

import random

import natural_language as natural
import natural_tables
import natural_text
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from trl_diffusion import ControlVariate, MaskDraws, draw_masks, elbo

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


def test_the_derivative_of_every_token_is_that_of_autograd():
    """Its sum over hidden tokens against the gradient of that sum, times the direction."""
    models = dict.fromkeys(("base", "near", "far"), tiny_bert(0))
    (table, _) = natural.score_pair(models, (PROMPT, *RESPONSES), number=5, with_gradient=True)
    masked, derivative = table.masked.flatten(0, 2), table.values["gradient"].flatten(0, 2)
    model = models["near"]
    direction = [b - a for a, b in zip(model.parameters(), natural.moved(model, 5, 1.0).parameters(), strict=True)]
    assert sum(bool(part.any()) for part in direction) == 6  # the matrices of one layer
    for row in (0, len(masked) // 2, len(masked) - 1):
        ids = torch.tensor([PROMPT + RESPONSES[0]])
        whole = torch.cat([torch.zeros(2).bool(), masked[row]]).unsqueeze(0)
        log_probs = model(ids.masked_fill(whole, 1)).logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        gradient = torch.autograd.grad(log_probs[whole].sum(), list(model.parameters()), allow_unused=True)
        expected = sum((g * v).sum().item() for g, v in zip(gradient, direction, strict=True) if g is not None)
        # A rounding of 1e-6 of a log-probability over a step of 1e-3, and the third derivative times its square
        assert derivative[row].sum().item() == pytest.approx(expected, abs=5e-3 + 1e-3 * abs(expected))


def test_variances_of_a_table_are_those_of_draws(monkeypatch):
    """Means over tables that are drawn anew, against the spread of estimates that `draw_masks` makes one by one."""
    law = 0.5
    monkeypatch.setattr(natural_tables, "UNITS", 6)
    models, size = {"base": tiny_bert(0), "near": tiny_bert(1)}, 1000
    responses = [RESPONSES[0], [5, 4, 7, 8, 2]]
    control, count = ControlVariate(), 4
    found = []
    for number in range(16):
        tables = natural.score_pair(models, (PROMPT, *responses), number, with_gradient=False)
        mass = natural_tables.masses(tables[0].edges, 5, law)
        picked = natural_tables.pick(tables[0], mass, count, 50, torch.Generator().manual_seed(number))
        parts = [natural_tables.estimates(table, mass, picked, control)["near"] for table in tables]
        coupled = natural_tables.moments(parts[0] - parts[1])
        own = sum(natural_tables.variance(natural_tables.moments(part), 1.0) for part in parts)
        paper = sum(natural_tables.paper_variance(table, "near") for table in tables)
        elbo_of_first = natural_tables.elbo(tables[0], "near")
        found.append([coupled[0], natural_tables.variance(coupled, 1.0), own, paper, elbo_of_first])
    found = torch.tensor(found).double()
    scores = {}
    for name, options in {
        "plain": {"scheme": "mirror", "stratify": True, "level_concentration": law},
        "control": {"scheme": "mirror", "stratify": True, "level_concentration": law, "control_variate": control},
        "paper": {"scheme": "fixed_count"},
    }.items():
        parts = []
        for response in responses:
            ids = torch.tensor([PROMPT + response]).expand(size, -1)
            rows = torch.cat([torch.arange(size).unsqueeze(1), ids], 1)
            maskable = torch.arange(8).expand(size, -1) >= 3
            number = 1 if name == "paper" else count
            draws = draw_masks(maskable, number, rows=rows, couple_pairs=name != "paper", **options)
            draws = MaskDraws(draws.masked[..., 1:], draws.weight[..., 1:])
            with torch.no_grad():
                values = [elbo(models[n], ids, maskable[:, 1:], draws=draws).value.double() for n in ("near", "base")]
            parts.append(values[0] - values[1])
        scores[name] = torch.stack(parts)

    def squares(x):
        return (x - x.mean()).square()

    expected = [
        squares(scores["plain"][0] - scores["plain"][1]),
        squares(scores["control"][0] - scores["control"][1]),
        squares(scores["control"][0]) + squares(scores["control"][1]),
        squares(scores["paper"][0]) + squares(scores["paper"][1]),
        scores["control"][0],
    ]
    for values, direct in zip(found.T, expected, strict=True):
        error = (values.var() / len(values) + direct.var() / size).sqrt()
        assert abs(values.mean() - direct.mean()) < 4.5 * error


def test_a_pair_is_read_off_under_every_law(monkeypatch):
    """Every cell is there; at K = 2 a control variate has no witnesses, and changes nothing."""
    monkeypatch.setattr(natural, "GRID", natural.GRID[4:5])  # the control variate of long responses
    monkeypatch.setattr(natural_tables, "UNITS", 12)  # of three bins, which is what five tokens have
    models = {"base": tiny_bert(0), "near": tiny_bert(1), "far": tiny_bert(2)}
    found = natural.measure_pair(models, (PROMPT, *RESPONSES), 0, with_gradient=True)
    laws = ("a=1", "by length", "a=0.75", "a=0.5")
    names = [f"{law}{control}{coupled}" for law in laws for control in ("", ", control")
             for coupled in ("", ", coupled")]  # fmt: skip
    cells = found["cells"]
    assert {f"{name}|{k}" for name in (*names, "fixed counts") for k in natural.COUNTS} <= set(cells)
    assert all(set(cell) == {"near", "far", "gradient"} for cell in cells.values())
    # Unbiased, and of four tokens: that of fixed counts may come out below zero
    assert all(min(cell.values()) > 0 for name, cell in cells.items() if not name.startswith("fixed counts"))
    assert all(cells[f"{name}|2"] == cells[f"{name.replace(', control', '')}|2"] for name in names)
    row = {"set": "5", "pair": 0, "lengths": [5, 4], "overlap": 0.5, "seconds": 0.0} | found
    assert "## Gradient, K = 8" in natural.tables([row, row])


def test_a_learnt_kappa_is_that_of_the_other_pairs_scores():
    """Var(b - kappa h) of pairs whose best kappa is 1.5, and 0.5; the gradient has the kappa of the score."""

    def row(best, noise, number):
        cells = {"fixed counts|8": {"near": 1.0, "gradient": 1.0}}
        for kappa in natural.KAPPAS:
            cell = {"near": noise + (kappa - best) ** 2, "gradient": 2 + kappa**2}
            cells |= {f"{natural.OF_KAPPA}{kappa:g}{x}|{k}": cell for x in ("", ", coupled") for k in (4, 8)}
        return {"set": "60", "pair": number, "cells": cells}

    rows = [row(1.5, 1.0, 0), row(0.5, 2.0, 1), row(0.5, 3.0, 2)]
    natural.learn_kappa(rows)
    for r, kappa, best, noise in zip(rows, (0.5, 1.0, 1.0), (1.5, 0.5, 0.5), (1.0, 2.0, 3.0), strict=True):
        found = r["cells"][f"{natural.LEARNT}, coupled|8"]
        assert found["near"] == pytest.approx(noise + (kappa - best) ** 2)
        assert found["gradient"] == pytest.approx(2 + kappa**2)


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
