"""Tables and a plot of what `variance.py` measured."""

import json
from pathlib import Path

import torch
from variance_estimators import ALLOCATIONS, BASELINES, DRAWS, ESTIMATORS, MAIN, OTHER_DRAWS
from variance_regimes import REGIMES

from trl_diffusion.estimators.kappa import kappa_of_others

QUANTITIES = {"score": "the score", "loss": "the loss", "gradient": "the gradient of the loss"}
BOOTSTRAP = 2000
SHAPES = [f"{n_t}/{n_yt}{shared}" for shared in ("", ", not shared") for n_t, n_yt in ALLOCATIONS]


def read(path: Path) -> list[dict]:
    """One row per pair."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_regime(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each regime that was measured, in the order of `REGIMES`."""
    grouped = {name: [row for row in rows if row["regime"] == name] for name in REGIMES}
    return {name: group for name, group in grouped.items() if group}


def ratio(group: list[dict], cell: str, baseline: str, quantity: str, kind: str | None = None) -> torch.Tensor:
    """`(1 + BOOTSTRAP,)`: mean over pairs over that of the baseline, and the same for pairs drawn again."""
    rows = [row["cells"] for row in group if kind is None or row["kind"] == kind]
    values = torch.tensor([[row[name][quantity] for name in (cell, baseline)] for row in rows], dtype=torch.float64)
    again = torch.randint(len(rows), (BOOTSTRAP, len(rows)), generator=torch.Generator().manual_seed(0))
    means = torch.cat([values.mean(0, keepdim=True), values[again].mean(1)])
    return means[:, 0] / means[:, 1]


def geometric_mean(ratios: list[torch.Tensor]) -> torch.Tensor:
    """Over regimes, whose pairs are drawn again independently."""
    shuffled = []
    for i, r in enumerate(ratios):
        order = torch.randperm(BOOTSTRAP, generator=torch.Generator().manual_seed(i))
        shuffled.append(torch.cat([r[:1], r[1:][order]]))
    return torch.stack(shuffled).log().mean(0).exp()


def bounds(values: torch.Tensor) -> list[float]:
    """Of the 95% interval, from the pairs that were drawn again."""
    return values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def interval(values: torch.Tensor, digits: int = 2) -> str:
    low, high = bounds(values)
    return f"{number(values[0].item(), digits)} [{number(low, digits)}, {number(high, digits)}]"


def number(value: float, digits: int = 2) -> str:
    """Two decimals, or three digits of a large number."""
    if abs(value) < 10:
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def ratio_table(groups: dict, names: dict[str, str], baseline: str, quantity: str) -> str:
    """Estimators by regimes, with the geometric mean over regimes. `names`: label to cell."""
    lines = []
    for label, cell in names.items():
        ratios = [ratio(group, cell, baseline, quantity) for group in groups.values()]
        lines.append([label, *map(interval, ratios), f"**{interval(geometric_mean(ratios))}**"])
    return table(["estimator", *groups, "geometric mean"], lines)


def summary_table(groups: dict, names: dict[str, str]) -> str:
    """Geometric mean over regimes with its interval, and the range over regimes, against both baselines."""
    lines = []
    for label, cell in names.items():
        line = [label]
        for quantity in QUANTITIES:
            for baseline in BASELINES:
                ratios = [ratio(group, cell, f"{baseline}|{DRAWS}", quantity) for group in groups.values()]
                points = [r[0].item() for r in ratios]
                spread = f"; {number(min(points))} to {number(max(points))}" if len(points) > 1 else ""
                line.append(interval(geometric_mean(ratios)) + spread)
        lines.append(line)
    head = [f"{quantity}, over {baseline}" for quantity in QUANTITIES for baseline in BASELINES]
    return table(["estimator", *head], lines)


def regime_table(groups: dict) -> str:
    """What the regimes are, and where the variance of one draw comes from."""
    head = ["regime", "pairs", "overlap", "log-ratio, chosen", "rejected", "margin rms", "sd at K=8", "level", "tokens"]
    lines = []
    for name, group in groups.items():
        ratios = torch.tensor([row["log_ratios"] for row in group], dtype=torch.float64)
        parts = torch.tensor([list(row["anova"].values()) for row in group]).double().mean(0)
        sd = torch.tensor([row["cells"][f"fixed counts|{DRAWS}"]["score"] for row in group]).mean().sqrt().item()
        overlaps = [row["overlap"] for row in group]
        cells = [f"{mean:+.1f} ± {spread:.1f}" for mean, spread in zip(ratios.mean(0), ratios.std(0), strict=True)]
        rms = (ratios[:, 0] - ratios[:, 1]).square().mean().sqrt().item()
        shares = [f"{share:.2f}" for share in (parts / parts.sum()).tolist()]
        lines.append([name, str(len(group)), f"{min(overlaps):.2f} to {max(overlaps):.2f}", *cells, f"{rms:.2f}",
                      f"{sd:.2f}", *shares])  # fmt: skip
    return table([*head, "context"], lines)


def bias_table(groups: dict) -> str:
    """Mean error against the exact score over pairs, its standard error and z; mean error of the loss."""
    groups = {name: group for name, group in groups.items() if "bias" in group[0]["cells"][f"{MAIN[0]}|{DRAWS}"]}
    lines = []
    for name in ESTIMATORS if groups else ():
        line = [name]
        for group in groups.values():
            cells = [row["cells"][f"{name}|{DRAWS}"] for row in group]
            bias = sum(cell["bias"] for cell in cells) / len(cells)
            error = sum(cell["bias_error"] ** 2 for cell in cells) ** 0.5 / len(cells)
            loss = sum(cell["loss_bias"] for cell in cells) / len(cells)
            line += [f"{bias:+.4f} ± {error:.4f} (z {bias / error:+.1f})", f"{loss:+.5f}"]
        lines.append(line)
    return table(["estimator", *(f"{name}: {what}" for name in groups for what in ("score, nats", "loss"))], lines)


def kappa_table(groups: dict) -> str:
    """Score variance with kappa 1, and with the best kappa of the other pairs of the regime, over that without."""
    lines = []
    for tail in ("", ", coupled"):
        for kind in ("kappa 1", "fitted kappa"):
            cells = []
            for group in groups.values():
                plain = torch.tensor([row["cells"][f"mirror, stratified{tail}|{DRAWS}"]["score"] for row in group])
                moments = [[row["kappa"][tail][key] for key in ("covariance", "variance")] for row in group]
                product, square = torch.tensor(moments).T
                best = kappa_of_others(product, square)
                kappa = best if kind == "fitted kappa" else torch.ones_like(plain)
                left = (plain - 2 * kappa * product + kappa**2 * square).sum() / plain.sum()
                cells.append(number(left.item()) + (f" ({best.mean():.1f})" if kind == "fitted kappa" else ""))
            lines.append([f"mirror, stratified{tail}, {kind}", *cells])
    return table(["estimator (mean of kappa)", *groups], lines)


def with_varied_draws(groups: dict) -> dict:
    """The regimes in which other K than DRAWS were measured for every pair."""
    cells = {f"{name}|{k}" for name in MAIN for k in OTHER_DRAWS}
    return {name: group for name, group in groups.items() if all(cells <= row["cells"].keys() for row in group)}


def draws_table(groups: dict) -> str:
    """Variance of the score at each K, over that of fixed counts at K = 8: geometric mean over regimes."""
    sizes = sorted({DRAWS, *OTHER_DRAWS})
    lines = []
    for name in (*BASELINES, *MAIN):
        cells = []
        for k in sizes:
            ratios = [ratio(g, f"{name}|{k}", f"fixed counts|{DRAWS}", "score") for g in groups.values()]
            cells.append(interval(geometric_mean(ratios)))
        lines.append([name, *cells])
    return table(["estimator", *(f"K = {k}" for k in sizes)], lines)


def equal_draws(groups: dict, name: str, baseline: str) -> list[str]:
    """K at which an estimator has the score variance of the baseline at K = 8: on a line in log K and log variance."""
    sizes, found = sorted({DRAWS, *OTHER_DRAWS}), []
    for group in groups.values():
        logs = [ratio(group, f"{name}|{k}", f"{baseline}|{DRAWS}", "score")[0].log2().item() for k in sizes]
        if logs[0] < 0:
            found.append(f"< {sizes[0]}")
            continue
        steps = [j for j in range(len(sizes) - 1) if logs[j] >= 0 > logs[j + 1]]
        j = steps[0] if steps else len(sizes) - 2
        found.append(f"{sizes[j] * 2 ** (logs[j] / (logs[j] - logs[j + 1])):.1f}" if steps else f"> {sizes[-1]}")
    return found


def equivalence_table(groups: dict) -> str:
    lines = [
        [f"{name} for {baseline} at {DRAWS}", *equal_draws(groups, name, baseline)]
        for baseline in BASELINES
        for name in (*BASELINES, *MAIN)
        if name != baseline
    ]
    return table(["K needed of", *groups], lines)


def kind_table(groups: dict, quantity: str) -> str:
    """Coupling by kind of pair: it lives on equal tokens at equal places."""
    names = [name for name in ESTIMATORS if "coupled" in name]
    names = [name for coupled in names for name in (coupled.removesuffix(", coupled"), coupled)]
    columns = [(name, kind) for name, group in groups.items() for kind in sorted({row["kind"] for row in group})]
    lines = []
    for name in dict.fromkeys(names):
        ratios = [ratio(groups[g], f"{name}|{DRAWS}", f"fixed counts|{DRAWS}", quantity, kind) for g, kind in columns]
        lines.append([name, *(number(r[0].item(), 3) for r in ratios)])
    overlap = [[row["overlap"] for row in groups[g] if row["kind"] == kind] for g, kind in columns]
    head = [f"{g}, {kind} ({sum(o) / len(o):.2f})" for (g, kind), o in zip(columns, overlap, strict=True)]
    return table(["estimator", *head], lines)


def tables(rows: list[dict]) -> str:
    """All of it, as markdown."""
    groups, parts = by_regime(rows), []
    if not groups:
        return "nothing is finished"
    parts += ["## Regimes, and the parts of the variance of one draw", regime_table(groups)]
    names = {name: f"{name}|{DRAWS}" for name in ESTIMATORS}
    parts += ["## Variances, geometric mean over regimes and range", summary_table(groups, names)]
    for baseline in BASELINES:
        for quantity, words in QUANTITIES.items():
            parts += [f"## Variance of {words}, over {baseline}, K = {DRAWS}"]
            parts += [ratio_table(groups, names, f"{baseline}|{DRAWS}", quantity)]
    shapes = {name: f"{name}|{_cost(name)}" for name in SHAPES}
    for quantity, words in QUANTITIES.items():
        parts += [f"## Levels / masks of each, variance of {words}, over 8/1 shared"]
        parts += [ratio_table(groups, shapes, f"8/1|{DRAWS}", quantity)]
    parts += ["## Bias, where the truth is exact", bias_table(groups)]
    parts += ["## Coupled pairs, by kind (mean overlap): score over fixed counts", kind_table(groups, "score")]
    parts += ["## Coupled pairs, by kind (mean overlap): gradient over fixed counts", kind_table(groups, "gradient")]
    parts += ["## Control variate: score variance over that without", kappa_table(groups)]
    varied = with_varied_draws(groups)
    if varied:
        words = f"geometric mean over {', '.join(varied)}"
        parts += [f"## Score variance by K, over fixed counts at K = {DRAWS}: {words}", draws_table(varied)]
        parts += ["## Draws that are needed", equivalence_table(varied)]
    return "\n\n".join(parts)


def _cost(shape: str) -> int:
    n_t, n_yt = map(int, shape.split(",")[0].split("/"))
    return n_t * n_yt


def plot(rows: list[dict], path: Path) -> None:
    """Score and gradient variance of each estimator over the baseline, by regime, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = by_regime(rows)
    if not groups:
        return
    names = [name for name in ESTIMATORS if name != "fixed counts"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.46 * len(names) + 1.6), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(groups)).numpy())
    for axis, quantity in zip(axes, ("score", "gradient"), strict=True):
        for place, name in enumerate(names):
            ratios = [ratio(g, f"{name}|{DRAWS}", f"fixed counts|{DRAWS}", quantity) for g in groups.values()]
            for i, (regime, values, colour) in enumerate(zip(groups, ratios, colours, strict=True)):
                low, high = bounds(values)
                y = place + 0.6 * ((i + 0.5) / len(groups) - 0.5)
                axis.plot([low, high], [y, y], color=colour, lw=1.2)
                axis.plot(values[0], y, "o", color=colour, ms=4, label=regime if place == 0 else None)
            mean = geometric_mean(ratios)[0]
            axis.plot([mean, mean], [place - 0.4, place + 0.4], color="black", lw=1.5)
        axis.axvline(1, color="grey", lw=0.8)
        axis.set(xscale="log", title=f"variance of {QUANTITIES[quantity]}", xlabel="over fixed counts (VRPO), K = 8")
        axis.set_yticks(range(len(names)), [name.replace("control", "control variate") for name in names])
        ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xlim(0.03, 10)
        axis.minorticks_off()
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
