"""
The objective of ELBO-KTO (arXiv 2510.23658) and what is logged of it, as functions of single rows.

With r = B_policy - B_reference, s = beta (r - z), and v = sigma(s) for a desirable row, sigma(-s) for an undesirable
one, a row's loss is lambda_y (1 - v). `loss_type="apo_zero_unpaired"` is the same with z = 0.
"""

import torch

from ..metrics import saturation

# By name: (B,) each. `elbo` and `log_ratio` in nats, `desirable` bool, `response_tokens` their number, `mismatched` the
# log-ratios of mismatched pairs where the baseline needs them, and the diagnostics, whose names begin with `elbo/`
Rows = dict[str, torch.Tensor]


def losses(rows: Rows, baseline: torch.Tensor, beta: float, weights: tuple[float, float]) -> torch.Tensor:
    """`(B,)` lambda_y (1 - v), with `weights` of a desirable and of an undesirable row, and z = `baseline` `(B,)`."""
    score = beta * (rows["log_ratio"] - baseline)
    away = torch.sigmoid(torch.where(rows["desirable"], -score, score))  # 1 - v
    return torch.where(rows["desirable"], *weights) * away


def metrics(rows: Rows, baseline: torch.Tensor, beta: float) -> dict[str, float]:
    """
    What is logged of a set of rows: a micro-batch of all processes, or a whole evaluation set.

    `rewards/...` are beta r, without the baseline, as in TRL; a class without rows is left out.
    """
    log_ratio, desirable = rows["log_ratio"], rows["desirable"].bool()
    score = beta * (log_ratio - baseline)
    logged = {"kto/baseline": baseline, "kto/saturation": saturation(score)}
    logged |= {name: value for name, value in rows.items() if name.startswith("elbo/")}
    sides = (("chosen", "desirable", desirable, score), ("rejected", "undesirable", ~desirable, -score))
    for trl_name, name, of_class, margin in sides:
        logged[f"kto/num_{name}"] = of_class.sum()
        if bool(of_class.any()):
            logged[f"rewards/{trl_name}"] = beta * log_ratio[of_class]
            logged[f"logps/{trl_name}"] = rows["elbo"][of_class]
            logged[f"kto/margins_{name}"] = margin[of_class]
            logged[f"elbo/change_{trl_name}"] = (log_ratio / rows["response_tokens"])[of_class]
    means = {name: value.double().mean().item() for name, value in logged.items()}
    if bool(desirable.any()) and not bool(desirable.all()):
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
