"""The preference losses written out by hand, as functions of ELBOs: what TRL's code must amount to here."""

import math

import torch
from torch.nn.functional import logsigmoid

# TRL's option values used with each loss; `exo_pair` and `robust` need a label smoothing
OPTIONS = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.05}
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}


def options_of(loss_types):
    """`label_smoothing` is refused where no loss reads it."""
    return {name: v for name, v in OPTIONS.items() if name != "label_smoothing" or SMOOTHED & set(loss_types)}


def losses(w, l, ref_w, ref_l, len_w, len_l, beta=0.3, label_smoothing=0.1, discopop_tau=0.05):
    """Per-pair losses by TRL's name, from the ELBOs `(pairs,)` and lengths of the chosen and rejected responses."""
    ratio_w, ratio_l = w - ref_w, l - ref_l
    margin = ratio_w - ratio_l
    normed = ratio_w / len_w - ratio_l / len_l
    s = beta * margin
    eps = label_smoothing
    p = torch.sigmoid(s / discopop_tau)

    def smoothed(delta):
        return -(1 - eps) * logsigmoid(beta * delta) - eps * logsigmoid(-beta * delta)

    return {
        "sigmoid": -logsigmoid(s),
        "hinge": torch.relu(1 - s),
        "ipo": (normed - 1 / (2 * beta)) ** 2,
        "exo_pair": torch.sigmoid(s) * (logsigmoid(s) - math.log(1 - eps))
        + torch.sigmoid(-s) * (logsigmoid(-s) - math.log(eps)),
        "nca_pair": -logsigmoid(beta * ratio_w) - 0.5 * (logsigmoid(-beta * ratio_w) + logsigmoid(-beta * ratio_l)),
        "robust": (-(1 - eps) * logsigmoid(s) + eps * logsigmoid(-s)) / (1 - 2 * eps),
        "bco_pair": -logsigmoid(beta * ratio_w) - logsigmoid(-beta * ratio_l),
        "sppo_hard": (ratio_w - 0.5 / beta) ** 2 + (ratio_l + 0.5 / beta) ** 2,
        "aot": smoothed((w - l).sort().values - (ref_w - ref_l).sort().values),
        "aot_unpaired": smoothed(ratio_w.sort().values - ratio_l.sort().values),
        "apo_zero": 1 - torch.sigmoid(beta * ratio_w) + torch.sigmoid(beta * ratio_l),
        "apo_down": torch.sigmoid(beta * ratio_w) + 1 - torch.sigmoid(s),
        "discopop": -logsigmoid(s) * (1 - p) + torch.exp(-s) * p,
        "sft": (-w.sum() / len_w.sum()).expand(len(w)),
        "sigmoid_norm": -logsigmoid(beta * normed),
    }
