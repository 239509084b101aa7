"""
Draws pair.png: a preference pair, the masks of four draws, and how they become a score. The masks are real draws.

    python docs/images/pair.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from trl_diffusion import draw_masks

PROMPT = "Ben has 14 coins . He borrows 5 . How many now ?"
RESPONSES = {"chosen": "14 + 5 = 19 ; so 19", "rejected": "14 - 5 = 9 ; so 9"}
NUM_DRAWS = 4
SHOWN, HIDDEN, EDGE = {"chosen": "#d6e8d4", "rejected": "#f6d9d5"}, "#33373d", "#9aa0a6"


def draws_of_both() -> dict[str, torch.Tensor]:
    """`(K, T)` masks of each response, coupled as the two of a pair are."""
    words = {word: i for i, word in enumerate(dict.fromkeys(" ".join([PROMPT, *RESPONSES.values()]).split()))}
    prompt = [words[word] for word in PROMPT.split()]
    masks = {}
    for name, text in RESPONSES.items():
        ids = torch.tensor([prompt + [words[word] for word in text.split()]])
        maskable = (torch.arange(ids.shape[1]) >= len(prompt)).unsqueeze(0)
        draws = draw_masks(maskable, NUM_DRAWS, "mirror", stratify=True, seed=5, rows=ids, couple_pairs=True)
        masks[name] = draws.masked[:, 0, len(prompt) :]
    return masks


def main() -> None:
    figure, axis = plt.subplots(figsize=(11, 3.9))
    axis.axis("off")
    axis.text(0, 6.05, PROMPT, fontsize=12, family="monospace")
    for column, (name, masks) in enumerate(draws_of_both().items()):
        left = 10.4 * column
        axis.text(left, 5.25, name, fontsize=12, fontweight="bold")
        for row in range(NUM_DRAWS + 1):
            y = 4.3 - row - (0.15 if row else 0)
            for i, word in enumerate(RESPONSES[name].split()):
                hidden = row > 0 and bool(masks[row - 1, i])
                box = FancyBboxPatch(
                    (left + i, y), 0.84, 0.66, boxstyle="round,pad=0.02", ec=EDGE, fc=HIDDEN if hidden else SHOWN[name]
                )
                axis.add_patch(box)
                if not hidden:
                    axis.text(left + i + 0.42, y + 0.33, word, ha="center", va="center", fontsize=11)
            if row and column == 1:
                axis.text(left + 8.4, y + 0.33, f"draw {row}", va="center", fontsize=11, color="#5f6368")
    lines = [
        "log p(hidden | shown),",
        "weighed, summed over draws:",
        "an estimate of each ELBO",
        "",
        "score = beta x",
        "   (policy - reference) of chosen",
        " - (policy - reference) of rejected",
    ]
    axis.text(21.2, 4.9, "\n".join(lines), va="top", fontsize=11.5, linespacing=1.5)
    axis.set(xlim=(-0.2, 29.6), ylim=(-0.6, 6.7))
    figure.savefig(Path(__file__).with_name("pair.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
