"""Power laws `loss = A * C^-b`, and the compute advantage of one over another, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

PFLOP_S_DAY = 1e15 * 24 * 3600  # floating-point operations

# The paper's Table 2: active parameters, tokens, then validation losses.
PAPER_PARAMETERS = (194e6, 241e6, 296e6, 436e6, 528e6)
PAPER_TOKENS = (38.7e9, 45.4e9, 62.1e9, 87.9e9, 119.0e9)
PAPER_LOSSES = {
    "baseline": (1.931, 1.895, 1.829, 1.766, 1.719),
    "Block": (1.909, 1.875, 1.809, 1.746, 1.693),
    "Full": (1.899, 1.874, 1.804, 1.737, 1.692),
    "mHC-lite": (1.906, 1.869, 1.807, 1.747, 1.694),
}
PAPER_SLOPES = {"baseline": 0.057, "Block": 0.058, "Full": 0.057}  # as published, beside its fitted laws
PAPER_COMPUTE, PAPER_ADVANTAGE = 5.6, 1.25  # at this compute (PFLOP/s-days), Block against the baseline


def compute(parameters: Sequence[float], tokens: Sequence[float]) -> np.ndarray:
    """Compute of trainings in PFLOP/s-days, C = 6 N D."""
    return 6 * np.asarray(parameters, float) * np.asarray(tokens, float) / PFLOP_S_DAY


@dataclass(frozen=True)
class PowerLaw:
    """A law `loss = A * C^-b`, fitted by least squares between the logarithms.

    Attributes:
        scale: A, the loss at a compute of 1.
        slope: b.
        center: the mean of log C of the points, at which the errors of level and slope are independent.
        level_error, slope_error: standard errors of log loss at the center, and of b.
        num_points: n. The errors have n - 2 degrees of freedom.
    """

    scale: float
    slope: float
    center: float
    level_error: float
    slope_error: float
    num_points: int

    @classmethod
    def fit(cls, compute: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> PowerLaw:
        """The law of these points.

        Args:
            compute: C of each point, above zero, of at least three different values.
            losses: the loss of each, above zero.
        """
        x, y = np.log(np.asarray(compute, float)), np.log(np.asarray(losses, float))
        if len(x) < 3 or np.ptp(x) == 0:
            raise ValueError(f"a power law with errors needs three points or more of different compute, not {len(x)}")
        center = x.mean()
        spread = ((x - center) ** 2).sum()
        slope = -((x - center) * y).sum() / spread
        residuals = y - y.mean() + slope * (x - center)
        variance = (residuals**2).sum() / (len(x) - 2)
        scale = float(np.exp(y.mean() + slope * center))
        errors = float(np.sqrt(variance / len(x))), float(np.sqrt(variance / spread))
        return cls(scale, float(slope), float(center), *errors, len(x))

    def loss(self, compute: float) -> float:
        """The loss at a compute."""
        return self.scale * compute**-self.slope

    def compute_for(self, loss: float) -> float:
        """The compute at which the law reaches a loss."""
        return (self.scale / loss) ** (1 / self.slope)

    def slope_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the slope, by Student's t."""
        half = self.slope_error * stats.t.ppf(0.5 + level / 2, self.num_points - 2)
        return self.slope - half, self.slope + half


@dataclass(frozen=True)
class Advantage:
    """How many times as much compute a baseline needs for the same loss.

    Attributes:
        factor: by the two laws.
        low, high: 95 % interval.
    """

    factor: float
    low: float
    high: float


def advantage(baseline: PowerLaw, other: PowerLaw, compute: float, draws: int = 20_000, seed: int = 0) -> Advantage:
    """The compute advantage of a law over a baseline, at a compute of that law.

    The interval comes from draws of level and slope of both laws from Student's t. The two fits are taken as
    independent, which makes it wider than it need be where both met the same data.

    Args:
        baseline, other ([`PowerLaw`]): the laws.
        compute (`float`): of `other`, in the unit of the fits.
        draws, seed (`int`): of the simulation.
    """
    generator = np.random.default_rng(seed)

    def drawn(law: PowerLaw) -> tuple[np.ndarray, np.ndarray]:
        level, slope = generator.standard_t(law.num_points - 2, (2, draws))
        at_center = np.log(law.scale) - law.slope * law.center + law.level_error * level
        return at_center, law.slope + law.slope_error * slope

    (level, slope), (base_level, base_slope) = drawn(other), drawn(baseline)
    reached = level - slope * (np.log(compute) - other.center)
    needed = baseline.center + (base_level - reached) / base_slope
    low, high = np.exp(np.percentile(needed - np.log(compute), (2.5, 97.5)))
    return Advantage(baseline.compute_for(other.loss(compute)) / compute, float(low), float(high))
