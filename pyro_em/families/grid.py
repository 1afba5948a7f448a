"""A normal latent on a grid (distributions/grid.py): the statistics and kernels of the normal."""

from __future__ import annotations

import math

from torch import Tensor

from pyro_em.distributions.grid import GridNormal
from pyro_em.families.base import Arguments
from pyro_em.families.normal import NormalFamily

NORMAL = NormalFamily()


class GridNormalFamily(NormalFamily):
    """Values are the nodes."""

    distribution = GridNormal  # type: ignore[assignment]

    def log_prob(self, args: Arguments, value: Tensor) -> Tensor:
        nodes = args["nodes"]
        return NORMAL.log_prob(args, value) + math.log(nodes[1] - nodes[0])
