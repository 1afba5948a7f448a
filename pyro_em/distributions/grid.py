"""A normal latent on a grid of fixed values: the trapezoid rule as a distribution that can be enumerated.

    ∫ g(x) N(x; μ, σ) dx ≈ h Σ_q g(x_q) N(x_q; μ, σ),      x_q equally spaced by h

For analytic g the error falls like exp(−2πc/h), with c the width of the strip in which the integrand is analytic,
and like exp(−2π²s²/h²) for one close to a Gaussian of standard deviation s (Trefethen & Weideman 2014). All elements
of a plate share the values, as they share the states of a discrete latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all


class GridNormal(TorchDistribution):
    """Normal(loc, scale) restricted to `nodes` (Q,), equally spaced; its probabilities add up to one but for the error
    of the rule.

    >>> normal = GridNormal(torch.tensor(0.0), torch.tensor(1.0), torch.linspace(-8, 8, 61))
    >>> normal.log_prob(normal.enumerate_support()).exp().sum()
    tensor(1.0000)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_enumerate_support = True

    def __init__(self, loc: Any, scale: Any, nodes: Sequence[float], validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.nodes = tuple(float(x) for x in nodes)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(GridNormal, _instance)
        batch = torch.Size(batch_shape)
        new.loc, new.scale, new.nodes = self.loc.expand(batch), self.scale.expand(batch), self.nodes
        super(GridNormal, new).__init__(batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        density: Tensor = torch.distributions.Normal(self.loc, self.scale, validate_args=False).log_prob(value)
        return density + math.log(self.nodes[1] - self.nodes[0])

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.loc.new_tensor(self.nodes).reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            logits = self.log_prob(self.enumerate_support()).movedim(0, -1)
            index = torch.distributions.Categorical(logits=logits).sample(sample_shape)
            return self.loc.new_tensor(self.nodes)[index]
