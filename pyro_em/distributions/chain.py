"""The observations of a linear-Gaussian chain as one value: what a loop over time with Gaussian states amounts to.

    x_t = A_1 x_{t-1} + ... + A_h x_{t-h} + b_t + N(0, Q_t),    y_t = C_t (x_t, ..., x_{t-h}) + d_t + N(0, R_t)

Only shapes are kept here: T steps of P cells. The arguments are tensors of the model's run (model/folding.py attaches
them), the density is that of the family (families/chain.py). Nobody draws from it: a model is drawn from as written.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution


class GaussianChain(TorchDistribution):
    """T steps of P observed cells, NaN where a cell is not seen."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(self, num_steps: int, num_cells: int, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        super().__init__(batch_shape, torch.Size((num_steps, num_cells)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return GaussianChain(self.event_shape[0], self.event_shape[1], torch.Size(batch_shape))
