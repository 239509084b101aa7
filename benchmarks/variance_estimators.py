"""
The estimators that the benchmark compares, and repeats of each on one pair.

`ESTIMATORS` is a plain table of arguments for `trl_diffusion.MaskSampler`. The independent ones (`INDEPENDENT`) are not
repeated: their variance is that of one draw over K, from [`variance_levels`]. So are the allocations of the paper,
n_t levels with n_yt masks each.
"""

from dataclasses import dataclass, replace

import torch
from variance_levels import EPSILON, Levels, hats
from variance_tables import Table

from trl_diffusion import ControlVariate, MaskDraws, MaskSampler

BETA = 0.2
BASELINES = ("Bernoulli", "fixed counts")
# Spelled out: what is measured is the same whatever the defaults are
CONTROL = ControlVariate(kappa=1.0, bandwidth=0.25, ridge=1.0)
ESTIMATORS = {
    "Bernoulli": {"scheme": "bernoulli"},
    "Bernoulli, stratified": {"scheme": "bernoulli", "stratify": True},
    "fixed counts": {"scheme": "fixed_count"},
    "fixed counts, stratified": {"scheme": "fixed_count", "stratify": True},
    "fixed counts, stratified, coupled": {"scheme": "fixed_count", "stratify": True, "couple_pairs": True},
    "mirror, stratified": {"scheme": "mirror", "stratify": True},
    "mirror, stratified, control 0.5": {
        "scheme": "mirror", "stratify": True, "control_variate": replace(CONTROL, kappa=0.5),
    },
    "mirror, stratified, control": {"scheme": "mirror", "stratify": True, "control_variate": CONTROL},
    "mirror, stratified, coupled": {"scheme": "mirror", "stratify": True, "couple_pairs": True},
    "mirror, stratified, control, coupled": {
        "scheme": "mirror", "stratify": True, "couple_pairs": True, "control_variate": CONTROL,
    },
}  # fmt: skip
INDEPENDENT = ("Bernoulli", "fixed counts")
# Also at other numbers of draws than DRAWS
MAIN = ("mirror, stratified", "mirror, stratified, control", "mirror, stratified, control, coupled")
DRAWS, OTHER_DRAWS = 8, (2, 4, 16)
ALLOCATIONS = ((1, 1), (4, 1), (8, 1), (1, 4), (2, 2))


@dataclass
class Repeats:
    """
    R repeats of the estimate of one pair.

    Args:
        score: `(R,)` nats, the score over beta.
        gradient: `(R, D)`, sketched gradient of the policy's margin of ELBOs.
    """

    score: torch.Tensor
    gradient: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """`(R,)`: -log sigmoid(beta * score)."""
        return -torch.nn.functional.logsigmoid(BETA * self.score)

    @property
    def loss_gradient(self) -> torch.Tensor:
        """`(R, D)`: -sigmoid(-s) beta times the gradient of the margin."""
        return -BETA * torch.sigmoid(-BETA * self.score).unsqueeze(1) * self.gradient

    def variances(self) -> dict[str, float]:
        """Of the score (nats^2), the loss, and the gradient of the loss (trace of the covariance)."""
        of_gradient = self.loss_gradient.double().var(0).sum()
        return {"score": self.score.var().item(), "loss": self.loss.var().item(), "gradient": of_gradient.item()}


def as_batch(prompt: list[int], responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, real tokens and maskable tokens of a pair, padded on the right."""
    size = len(prompt) + max(map(len, responses))
    ids = torch.tensor([prompt + y + [0] * (size - len(prompt) - len(y)) for y in responses])
    real = torch.arange(size) < torch.tensor([[len(prompt) + len(y)] for y in responses])
    return ids, real, real & (torch.arange(size) >= len(prompt))


def draw_pair(
    sampler: MaskSampler, prompt: list[int], responses: list[list[int]], repeats: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks and weights `(K, R, L)` of each response, from `repeats` calls on the pair as one batch."""
    ids, real, maskable = as_batch(prompt, responses)
    draws = [sampler(maskable, ids, attention_mask=real, nonce=repeat) for repeat in range(repeats)]
    masked = torch.stack([d.masked[:, :, len(prompt) :] for d in draws], dim=1)  # (K, R, 2, L)
    weight = torch.stack([d.weight[:, :, len(prompt) :] for d in draws], dim=1)
    return [(masked[:, :, row, : len(y)], weight[:, :, row, : len(y)]) for row, y in enumerate(responses)]


def read_pair(tables: list[Table], drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> Repeats:
    """Repeats of the score and the margin's gradient, policy and reference on the same masks."""
    chosen, rejected = (table.read(MaskDraws(*parts)) for table, parts in zip(tables, drawn, strict=True))
    score = (chosen["policy"] - chosen["reference"]) - (rejected["policy"] - rejected["reference"])
    return Repeats(score, chosen["gradient"] - rejected["gradient"])


# --- independent draws, again from the masks of the levels -----------------------------------------------------------


@dataclass
class Pool:
    """
    The masks of the levels of one response, each summed over its tokens.

    Args:
        levels: the masks.
        policy, reference: `(N,)` nats, S(m) of all masks, level after level; `gradient` `(N, D)`.
        start: `(J,)`, where each level begins.
    """

    levels: Levels
    policy: torch.Tensor
    reference: torch.Tensor
    gradient: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, levels: Levels, table: Table) -> "Pool":
        rows = table.find(torch.cat(levels.masks))
        sizes = torch.tensor([len(masks) for masks in levels.masks])
        sums = [table.policy[rows].double().sum(1), table.reference[rows].double().sum(1), table.sketch[rows].sum(1)]
        return cls(levels, *sums, start=sizes.cumsum(0) - sizes)

    def by_level(self, what: str = "ratio") -> list[torch.Tensor]:
        """S(m) of each level's masks: of the policy, the reference, or their difference ("ratio")."""
        sums = self.policy - self.reference if what == "ratio" else getattr(self, what)
        return list(sums.split([len(masks) for masks in self.levels.masks]))

    def fixed_count_draws(self, n_t: int, n_yt: int, repeats: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights `(n_t * n_yt, R)`: n_t random levels, n_yt random masks of each; different ones, if few."""
        j = torch.multinomial(self.levels.share.float(), n_t * repeats, replacement=True, generator=generator)
        sizes = torch.tensor([len(masks) for masks in self.levels.masks])
        whole = torch.tensor(self.levels.whole)[j]
        rows = torch.empty(n_yt, n_t * repeats, dtype=torch.long)
        for level in range(len(sizes)):
            here = (j == level).nonzero().flatten()
            if whole[here].any():  # all masks of the level: what is drawn from is the population
                rows[:, here] = torch.randint(int(sizes[level]), (n_yt, len(here)), generator=generator)
            else:
                order = torch.rand(len(here), int(sizes[level]), generator=generator).argsort(1)
                rows[:, here] = order[:, :n_yt].T
        weight = self.levels.length / torch.tensor(self.levels.levels)[j].double() / (n_t * n_yt)
        rows = (rows + self.start[j]).view(n_yt * n_t, repeats)
        return rows, weight.view(1, n_t, repeats).expand(n_yt, n_t, repeats).reshape(n_yt * n_t, repeats)

    def bernoulli_draws(self, draws: int, repeats: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for Bernoulli masks with t in (EPSILON, 1); a level that is not there is answered by a neighbour."""
        t = EPSILON + (1 - EPSILON) * torch.rand(draws * repeats, dtype=torch.float64, generator=generator)
        level = torch.binomial(torch.full_like(t, self.levels.length), t, generator=generator).long()
        weights = hats(self.levels.length, self.levels.levels)[:, level.clamp(min=1) - 1].T  # (draws * R, J)
        j = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        sizes = torch.tensor([len(masks) for masks in self.levels.masks])
        mask = (torch.rand(len(j), dtype=torch.float64, generator=generator) * sizes[j]).long()
        weight = level / (t * torch.tensor(self.levels.levels)[j] * draws)  # z = S / l is what is interpolated
        return (mask + self.start[j]).view(draws, repeats), weight.view(draws, repeats)

    def read(self, rows: torch.Tensor, weight: torch.Tensor, reference_on=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios `(R,)` and gradients `(R, D)`; `reference_on` are rows and weights of the reference's own."""
        other_rows, other_weight = reference_on or (rows, weight)
        ratio = (weight * self.policy[rows]).sum(0) - (other_weight * self.reference[other_rows]).sum(0)
        return ratio, torch.einsum("nr,nrd->rd", weight.float(), self.gradient[rows])


def resample_pair(pools: list[Pool], draw, shared: bool, generator) -> Repeats:
    """Repeats from the pools of a pair; `draw(pool, generator)` gives rows and weights."""
    parts = []
    for pool in pools:
        drawn = draw(pool, generator)
        parts.append(pool.read(*drawn, None if shared else draw(pool, generator)))
    (chosen, up), (rejected, down) = parts
    return Repeats(chosen - rejected, up - down)
