"""Links of linear predictors: argument = link(η), elementwise, or on the last dim as a whole for softmax.

softmax ignores what all entries share, so that its inverse takes the first category as the reference. It stands before
the sigmoid, so that (1 - sigmoid(η), sigmoid(η)), the gate of two states, is a softmax of (0, η).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INNER = 0.5  # lies in the range of every elementwise link


@dataclass(frozen=True)
class PredictorLink:
    """argument = forward(η); `slope` turns a tangent of the argument at the argument into one of η."""

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    inside: Callable[[Tensor], Tensor]
    vector: bool = False  # it acts on the last dim as a whole

    def reaches(self, value: Tensor, event_dim: int) -> bool:
        """Whether all of an argument lies in the link's range."""
        return self.vector <= (event_dim > 0) and bool(self.inside(value).all())


def _positive(value: Tensor) -> Tensor:
    return (value > 0) & value.isfinite()


def _relative(value: Tensor, tangent: Tensor) -> Tensor:
    ratio = tangent / value
    return ratio - ratio[..., :1]


LINKS: tuple[PredictorLink, ...] = (
    PredictorLink("identity", lambda e: e, lambda v: v, lambda v, t: t, lambda v: v.isfinite()),
    PredictorLink("exp", torch.exp, torch.log, lambda v, t: t / v, _positive),
    PredictorLink(
        "softmax",
        lambda e: torch.softmax(e, -1),
        lambda v: v.log() - v[..., :1].log(),
        _relative,
        lambda v: _positive(v).all(-1) & ((v.sum(-1) - 1).abs() < 1e-6),
        vector=True,
    ),
    PredictorLink("sigmoid", torch.sigmoid, torch.logit, lambda v, t: t / (v * (1 - v)), lambda v: (v > 0) & (v < 1)),
    PredictorLink(
        "softplus",
        torch.nn.functional.softplus,
        lambda v: v + torch.log(-torch.expm1(-v)),
        lambda v, t: t / -torch.expm1(-v),
        _positive,
    ),
)
