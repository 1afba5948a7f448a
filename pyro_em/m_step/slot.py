"""One argument of a site behind a linear predictor η = A θ + offset: what a move of the block does to it.

    change   A δ                pull   Aᵀ s                gram   Aᵀ diag(c) B

Of a vector argument (vector_design.py) c is a matrix for every cell. Shapes as in design.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.design import Design
from pyro_em.model.use import Use
from pyro_em.vector_design import Curvature, VectorDesign


@dataclass(frozen=True, eq=False)
class Slot:
    """One argument of a site behind η."""

    name: str
    use: Use
    design: Design | VectorDesign
    whole: bool  # the block holds all parameters of the predictor
    by_log: bool = False  # the block holds the logarithm of the parameter that the argument takes entries of

    @property
    def vector(self) -> bool:
        """The argument is a vector for each cell."""
        return isinstance(self.design, VectorDesign)

    @property
    def moving(self) -> bool:
        """The design depends on continuous latents, and is that of one E-step."""
        return self.use.predictor is not None and self.use.predictor.moving

    @property
    def link(self) -> str:
        """Name of the predictor's link; "" for a power or the like of one entry."""
        if self.use.predictor is not None:
            return self.use.predictor.link.name
        return ("exp" if self.by_log else "identity") if self.use.gather else ""

    def free(self) -> Tensor | None:
        """Where a parameter reaches the argument, None for everywhere."""
        if self.use.predictor is not None:
            return None if self.use.predictor.fixed is None else self.use.predictor.fixed.isnan()
        assert self.use.index is not None
        return None if self.use.whole else self.use.index >= 0

    def forward(self, old: Tensor) -> Callable[[Tensor], Tensor]:
        """Argument as a function of η; fixed parts keep their `old` value."""
        use, free = self.use, self.free()

        def forward(eta: Tensor) -> Tensor:
            if use.predictor is not None:
                found = use.predictor.link.forward(eta)
            else:
                eta = eta.exp() if self.by_log else eta
                found = torch.exp(use.power * eta) if use.exponential else eta if use.power == 1 else eta**use.power
                found = found if use.link is None else use.link.from_canonical(found)
                found = found if use.coefficient is None else use.coefficient.to(found) * found
            return found if free is None else torch.where(free, found, old)

        return forward

    def eta(self, argument: Tensor, theta: Tensor) -> Tensor:
        """η at the block's current place, where the argument is `argument`; that of 1 in fixed parts."""
        predictor = self.use.predictor
        if predictor is not None and (predictor.offset is None or not self.whole):
            return predictor.inverse(argument)
        if predictor is not None and predictor.offset is not None:
            eta = self.change(theta)  # all of it is linear in the block: a product is cheaper than the inverse link
            offset = predictor.offset
            return eta if offset.numel() == 1 and float(offset) == 0 else eta + offset
        eta = self.change(theta)
        free = self.free()
        return eta if free is None else torch.where(free, eta, 0.0 if self.by_log else 1.0)

    def change(self, delta: Tensor) -> Tensor:
        """Change of η when the block moves by δ."""
        change = self.design.predict(delta)
        free = self.free()
        return change if free is None else torch.where(free, change, 0.0)

    def pull(self, slope: Tensor) -> Tensor:
        """Aᵀ slope."""
        return self.design.pull(slope if self.vector else self._reached(slope))

    def gram(self, curvature: Curvature, other: Slot) -> Tensor:
        """Aᵀ diag(c) B, B the design of `other`."""
        first, second = self.design, other.design
        if isinstance(first, VectorDesign) or isinstance(second, VectorDesign):
            assert isinstance(first, VectorDesign) and first is second  # a vector is the only argument of its site
            return first.gram_matrix(curvature)
        assert isinstance(curvature, Tensor)
        curvature = other._reached(self._reached(curvature))
        return first.gram_matrix(curvature, None if other is self else second)

    def _reached(self, x: Tensor) -> Tensor:
        free = self.free()
        return x if free is None else torch.where(free, x, 0.0)
