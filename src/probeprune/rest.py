"""A refitted block of which a part follows the batch: a core that always stays, and a rest chosen anew.

With the core `C` fixed, the refit for any choice `S` among the candidates `P` needs no more than the Schur
complement of their moments: the best weight of `S` solves a system of |S| unknowns, and the core's makes up
for it. Some tokens of the batch then move the weight towards what it takes for them: a system of as many
unknowns as there are tokens. Tensors in, tensors out. Knows nothing of models or text.
"""

from dataclasses import dataclass, fields, replace

import torch

_ALWAYS, _NEVER = 1e38, -1.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens of a batch.

    Attributes:
        z: all channels of their coupled activation (m, n), float32.
        target: the whole block's output (m, d), float32.
        real: BoolTensor (m,), which of them are no padding; None for all.
        prior: how many tokens the calibration text counts as beside them, above 0.
    """

    z: torch.Tensor
    target: torch.Tensor
    real: torch.Tensor | None
    prior: float


@dataclass(frozen=True, eq=False)
class Rest:
    """What choosing and refitting a part of a block's units takes. Ids are those of the block's units, each
    of which owns one channel.

    Attributes:
        units: how many the block has.
        core: LongTensor (c,), units that always stay, ascending.
        candidates: LongTensor (p,), units of which a batch chooses, ascending.
        value: (p,), what a candidate is worth: the damage of its loss, or of its absence, all else refitted.
        energy: (p,), mean of `z_j^2` a calibration token.
        schur: (p, p), second moment of the candidates that the core does not explain, damped.
        cross: (d, p), what of it the target has.
        explained: (p, c), the candidates as the core tells them.
        core_weight: (d, c), the refit to the core alone.
        core_inverse: (c, c), inverse of the core's second moment, damped.
        mean, target_mean: (n,) and (d,), where there is a bias to refit; else None.
    """

    units: int
    core: torch.Tensor
    candidates: torch.Tensor
    value: torch.Tensor
    energy: torch.Tensor
    schur: torch.Tensor
    cross: torch.Tensor
    explained: torch.Tensor
    core_weight: torch.Tensor
    core_inverse: torch.Tensor
    mean: torch.Tensor | None = None
    target_mean: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Rest":
        """The same on a device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def scores(self, energy: torch.Tensor, tokens: int) -> torch.Tensor:
        """Scores (units,) for a batch: the core always stays, what is no candidate never does.

        A candidate counts its value times the fourth root of how much more, or less, energy it has than on
        the calibration text (docs/best.md).

        Args:
            energy: `e_j` (units,), summed over positions of the probe.
            tokens: how many.
        """
        scores = energy.new_full((len(energy),), _NEVER).index_fill_(0, self.core, _ALWAYS)
        mean = energy[self.candidates] / tokens
        gain = (mean / self.energy.clamp_min(torch.finfo(mean.dtype).tiny)).clamp_(1e-2, 1e2).pow_(0.25)
        return scores.index_copy_(0, self.candidates, self.value * gain)

    def consumer(
        self, units: torch.Tensor, sample: Sample | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight (d, k) and bias refitted to these units, columns in their order, float32.

        Costs |S|^3 / 3 + d |S|^2 + d |S| c multiplications for |S| units of the rest, and with a sample of m
        tokens m (c^2 + 2 c |S| + |S|^2) + m k (m + 2 d) + m^3 / 3 + d m^2 more.

        Args:
            units: LongTensor (k,) of ids: the whole core and some candidates, in any order.
            sample: tokens that the refit is made to beside the calibration text; None: to that text alone.
        """
        core, candidates = len(self.core), len(self.candidates)
        count = len(units) - core  # sizes are known without a look at the device
        place = torch.full((self.units,), candidates, device=units.device)
        place[self.candidates] = _range(candidates, units)
        chosen = place[units].sort().values[:count]
        # index_select, for brackets are five times as slow at columns.
        schur = self.schur.index_select(0, chosen).index_select(1, chosen)
        factor, _ = torch.linalg.cholesky_ex(schur)
        explained = self.explained.index_select(0, chosen)
        rest = torch.cholesky_solve(self.cross.index_select(1, chosen).T, factor).T
        weight = torch.cat([self.core_weight - rest @ explained, rest], dim=1)
        own = torch.cat([self.core, self.candidates[chosen]])
        if sample is not None:
            weight += self._towards(sample, weight, own, factor, explained)
        column = torch.empty(self.units, dtype=torch.long, device=units.device)
        column[own] = _range(len(units), units)
        weight = weight.index_select(1, column[units])
        if self.mean is None or self.target_mean is None:
            return weight, None
        return weight, self.target_mean - weight @ self.mean[units]

    def _towards(
        self,
        sample: Sample,
        weight: torch.Tensor,
        units: torch.Tensor,
        factor: torch.Tensor,
        explained: torch.Tensor,
    ) -> torch.Tensor:
        """What brings `weight` (d, k), best for the calibration text, to the best for that and the sample.

        `D` minimises `sum_i |e_i - D z_i|^2 + prior tr D M D'` over the sample's errors `e` under `weight`,
        with `M` the calibration text's moment, damped: `D = E' (H Z' + prior)^-1 H` with `H = Z M^-1`.
        """
        z, error = sample.z.index_select(1, units), sample.target
        if self.mean is not None and self.target_mean is not None:
            z, error = z - self.mean[units], error - self.target_mean
        error = error - z @ weight.T
        if sample.real is not None:
            z = z.masked_fill(~sample.real[:, None], 0)
            error = error.masked_fill(~sample.real[:, None], 0)
        z_core, z_rest = z.split([len(self.core), len(units) - len(self.core)], dim=1)
        h_rest = torch.cholesky_solve((z_rest - z_core @ explained.T).T, factor).T
        h = torch.cat([z_core @ self.core_inverse - h_rest @ explained, h_rest], dim=1)
        among = h @ z.T
        among.diagonal().add_(sample.prior)
        inner, _ = torch.linalg.cholesky_ex(among)
        return torch.cholesky_solve(error, inner).T @ h


@torch.no_grad()
def split(
    moment: torch.Tensor,
    target: torch.Tensor,
    kept: torch.Tensor,
    core_share: float,
    energy: torch.Tensor,
    *,
    metric: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    target_mean: torch.Tensor | None = None,
) -> Rest:
    """A core of the kept units that are worth most; as candidates the others, and as many that are not kept.

    What a unit is worth is what its loss costs if it is kept, and what its return would save if not, the
    kept ones refitted either way. Float64, and about as large and as long as `eliminate`.

    Args:
        moment: second moment of `z` a token (n, n), damped.
        target: product of target and `z` a token (d, n), with the damping's share.
        kept: LongTensor (k,), ids, ascending.
        core_share: of the kept units.
        energy: mean of `z_j^2` a token (n,), neither centred nor damped.
        metric: what an error of the output counts (d, d); None for the identity.
        mean, target_mean: of `z` (n,) and the target (d,), where moments are centred and a bias is fitted.
    """
    moment, target = moment.double(), target.double()
    n, k = len(moment), len(kept)
    others = torch.ones(n, dtype=torch.bool, device=moment.device).index_fill_(0, kept, False)
    others = others.nonzero().flatten()
    value = _values(moment, target, kept, others, metric)
    count = max(round(core_share * k), 1)
    ranked = kept[value[kept].argsort(descending=True, stable=True)]
    core, rest = ranked[:count].sort().values, ranked[count:]
    returning = others[value[others].argsort(descending=True, stable=True)[: len(rest)]]
    candidates = torch.cat([rest, returning]).sort().values
    factor = torch.linalg.cholesky(moment[core][:, core])
    explained = torch.cholesky_solve(moment[core][:, candidates], factor).T
    core_weight = torch.cholesky_solve(target[:, core].T, factor).T
    return Rest(
        units=n,
        core=core,
        candidates=candidates,
        value=value[candidates].float(),
        energy=energy[candidates].float(),
        schur=(moment[candidates][:, candidates] - explained @ moment[core][:, candidates]).float(),
        cross=(target[:, candidates] - core_weight @ moment[core][:, candidates]).float(),
        explained=explained.float(),
        core_weight=core_weight.float(),
        core_inverse=torch.cholesky_inverse(factor).float(),
        mean=None if mean is None else mean.float(),
        target_mean=None if target_mean is None else target_mean.float(),
    )


def _values(
    moment: torch.Tensor,
    target: torch.Tensor,
    kept: torch.Tensor,
    others: torch.Tensor,
    metric: torch.Tensor | None,
) -> torch.Tensor:
    """What each unit is worth: (n,), float64."""
    factor = torch.linalg.cholesky(moment[kept][:, kept])
    weight = torch.cholesky_solve(target[:, kept].T, factor).T
    explained = torch.cholesky_solve(moment[kept][:, others], factor)
    lacks = target[:, others] - weight @ moment[kept][:, others]
    left = moment.diagonal()[others] - (moment[kept][:, others] * explained).sum(0)
    value = torch.empty(len(moment), dtype=torch.float64, device=moment.device)
    value[kept] = _weighed(weight, metric) / torch.cholesky_inverse(factor).diagonal()
    value[others] = _weighed(lacks, metric) / left
    return value


def _weighed(columns: torch.Tensor, metric: torch.Tensor | None) -> torch.Tensor:
    """`w' M w` of every column."""
    return ((columns if metric is None else metric.double() @ columns) * columns).sum(0)


def _range(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, device=like.device)
