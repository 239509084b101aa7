"""What the demos print and draw: answers before and after, rewards, examples, a picture, and what came out of it."""

import math
from pathlib import Path

import word_problems as task

EXAMPLES_SHOWN = 4
_ROWS = {
    "every step right": "right",
    "final number right": "final number",
    'problems without "borrows" or "lends"': "plain",
    'problems with "borrows" or "lends"': "tricky",
}


def interval(outcomes: list[bool]) -> tuple[float, float, float]:
    """Share of right outcomes in percent, and its 95% Wilson interval."""
    n, p, z = len(outcomes), task.share(outcomes), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * p, *(100 * (centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))


def verdict(before: dict, after: dict) -> str:
    """In words, what came out, good or bad."""
    gain, plain = (100 * (task.share(after[key]) - task.share(before[key])) for key in ("right", "plain"))
    lines = []
    if gain >= 25:
        lines.append(f"The habit is (nearly) gone: {gain:+.1f} points of held-out problems.")
    elif gain > 5:
        lines.append(f"The habit became weaker: {gain:+.1f} points of held-out problems.")
    elif gain >= -5:
        lines.append(f"Nothing was gained: {gain:+.1f} points of held-out problems.")
    else:
        lines.append(
            f"The answers got worse: {gain:+.1f} points of held-out problems, whatever the rewards say. The policy was "
            "pushed away from its own answers, right ones too; a lower `learning_rate` holds it."
        )
    if plain <= -5:
        lines.append(f"It forgot some sums: {plain:+.1f} points of the problems that it could do before.")
    lines.append(
        "The base model was made on this machine: another CPU or `--seed` makes another one, and gains more or less."
    )
    return "\n".join(lines)


def print_row(row: dict, columns: tuple[str, ...]) -> None:
    """What a method is given of one example."""
    for key in columns:
        print(f"     {key:<11} {str(row[key]).strip()}")


def print_answers(before: dict, after: dict) -> None:
    print(f"\n{'answers to held-out test problems':<40}{'before':>22}{'after':>22}")
    for label, key in _ROWS.items():
        cells = ["{:.1f}% [{:.1f}, {:.1f}]".format(*interval(result[key])) for result in (before, after)]
        print(f"  {label:<38}{cells[0]:>22}{cells[1]:>22}")


def print_rewards(history: list[dict], beta: float) -> None:
    """Of held-out answers after the last step: how their ELBOs have changed, and of pairs, how many are in order."""
    last = [entry for entry in history if "eval_loss" in entry][-1]
    rewards = {
        "change of a right answer's ELBO": f"{last['eval_rewards/chosen'] / beta:+.2f} nats",
        "change of a wrong answer's ELBO": f"{last['eval_rewards/rejected'] / beta:+.2f} nats",
    }
    if "eval_rewards/accuracies" in last:
        rewards["pairs in which it rose more"] = f"{100 * last['eval_rewards/accuracies']:.1f}%"
    print("the base model's own answers to held-out problems (ELBO: a bound of their log-probability)")
    for label, value in rewards.items():
        print(f"  {label:<38}{'':>22}{value:>22}")


def print_examples(problems, before: dict, after: dict) -> None:
    """The first problems whose answer became right, and the first whose answer became wrong."""
    changes = {"corrected": (False, True), "spoilt": (True, False)}
    for name, change in changes.items():
        rows = [i for i, pair in enumerate(zip(before["right"], after["right"], strict=True)) if pair == change]
        print(f"\n{name}: {len(rows)} of {len(problems)} problems")
        for i in rows[: EXAMPLES_SHOWN if name == "corrected" else 1]:
            print(f"  {problems[i].prompt}")
            print(f"    before  {before['answers'][i]}\n    after   {after['answers'][i]}")


def plot(history: list[dict], before: dict, after: dict, how: str, path: Path) -> None:
    """What the trainer logged, as far as it did, and, in the last panel, the accuracy of the answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "loss": "loss",
        "rewards/margins": "reward margin (nats x beta)",
        "rewards/accuracies": "share of pairs with a positive margin",
    }
    logged = {key: title for key, title in titles.items() if any(key in entry for entry in history)}
    figure, axes = plt.subplots(1, len(logged) + 1, figsize=(4 * len(logged) + 4.5, 3.8), layout="constrained")
    for axis, (key, title) in zip(axes, logged.items(), strict=False):
        for prefix, label, style in (("", "training", "-"), ("eval_", "held out", "o--")):
            points = [(entry["step"], entry[prefix + key]) for entry in history if prefix + key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    _bars(axes[-1], before, after)
    figure.suptitle(f"Word problems: a model that learned to mix up two verbs, aligned by {how}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis, before: dict, after: dict) -> None:
    keys = {"all": "right", "without the\ntwo verbs": "plain", "with them": "tricky"}
    for offset, (label, result) in enumerate({"before": before, "after": after}.items()):
        intervals = [interval(result[key]) for key in keys.values()]
        heights = [height for height, _, _ in intervals]
        errors = [[h - low for h, low, _ in intervals], [high - h for h, _, high in intervals]]
        places = [i + 0.4 * offset - 0.2 for i in range(len(keys))]
        axis.bar(places, heights, 0.38, yerr=errors, capsize=3, label=label)
    axis.set_title("WHAT COUNTS: held-out problems\nwith every step right (%)", fontweight="bold")
    axis.set(ylim=(0, 119), yticks=range(0, 101, 20))
    axis.set_xticks(range(len(keys)), keys)
    axis.legend(loc="upper center", ncols=2)
