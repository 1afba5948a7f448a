"""One use of a parameter by one argument of one site, as recognise.py finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.families.base import Link
from pyro_em.model.predictor import Predictor

VALUE = "value"  # the slot of a prior: the parameter is the value of the site, not an argument


@dataclass(frozen=True)
class Use:
    """One use of a parameter by one argument of one site.

    `index` (shape of the raw argument) numbers the entry of the flattened parameter, -1 for fixed parts; the argument
    is `coefficient` * θ[index] ** `power` (or coefficient * exp(power * θ[index]) if `exponential`), or with a `link`
    what that makes of θ[index]: log w, logit p, the Cholesky factor of S. None for `index` means opaque, with the
    `reason`, unless the argument has a `predictor` (one object, shared by the uses of all of its parameters).
    """

    parameter: str
    site: str
    slot: str
    index: Tensor | None
    coefficient: Tensor | None = None
    power: float = 1.0
    exponential: bool = False
    reason: str = ""
    predictor: Predictor | None = None
    link: Link | None = None  # of the argument, whose canonical coordinate takes the entries
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # the M-step's, by shape

    @property
    def known(self) -> bool:
        """The argument is known as a function of the parameters, so that the model need not run for it."""
        return self.index is not None or (self.predictor is not None and self.predictor.offset is not None)

    @cached_property
    def whole(self) -> bool:
        """Every entry of the argument is an entry of the parameter (no fixed parts)."""
        return self.index is not None and bool((self.index >= 0).all())

    @cached_property
    def in_order(self) -> bool:
        """The argument takes the entries as they come: no gather is needed."""
        assert self.index is not None
        return torch.equal(self.index.reshape(-1), torch.arange(self.index.numel(), device=self.index.device))

    def argument(self, theta: Tensor, old: Tensor) -> Tensor:
        """The argument at `theta`; fixed parts keep their `old` value."""
        assert self.index is not None
        in_order = self.in_order and theta.numel() == self.index.numel()
        entries = theta.reshape(self.index.shape) if in_order else theta.reshape(-1)[self.index.clamp(min=0)]
        if self.exponential:
            entries = torch.exp(self.power * entries)
        elif self.power != 1:
            entries = entries**self.power
        if self.coefficient is not None:
            entries = self.coefficient.to(entries) * entries
        if self.link is not None:
            entries = self.link.from_canonical(entries)
        if self.whole and entries.shape == old.shape:
            return entries
        return torch.where(self.index >= 0, entries, old)

    @property
    def gather(self) -> bool:
        """The argument is an entry of the parameter, unchanged."""
        plain = self.coefficient is None and self.power == 1 and not self.exponential and self.link is None
        return self.index is not None and plain


def by_place(uses: Mapping[str, tuple[Use, ...]]) -> dict[tuple[str, str], dict[str, Use]]:
    """Uses of every parameter as those of every argument, by (site, slot) and parameter."""
    found: dict[tuple[str, str], dict[str, Use]] = {}
    for name, own in uses.items():
        for use in own:
            found.setdefault((use.site, use.slot), {})[name] = use
    return found
