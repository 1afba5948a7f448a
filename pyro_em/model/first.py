"""A handler that cuts a plate: a run of a model on the first elements of its data."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor


class FirstElements(Messenger):
    """Cut a plate to its first elements, with the data and masks in it: for models that do not write rows in full.

    Whatever else has the size of the plate (covariates in an argument) then does not fit, and the run fails.
    """

    def __init__(self, plate: str, count: int) -> None:
        super().__init__()
        self.plate, self.count = plate, count

    def _pyro_sample(self, msg: Any) -> None:
        if poutine.util.site_is_subsample(msg):
            if msg["name"] == self.plate and msg["value"] is None:
                msg["value"] = torch.arange(self.count)
            return
        frame = next((f for f in msg["cond_indep_stack"] if f.name == self.plate and f.vectorized), None)
        if frame is None:
            return
        if msg["is_observed"]:
            msg["value"] = self._cut(msg["value"], frame.dim - msg["fn"].event_dim)
        if isinstance(msg["mask"], Tensor):
            msg["mask"] = self._cut(msg["mask"], frame.dim)

    def _cut(self, x: Tensor, dim: int) -> Tensor:
        return x if x.dim() < -dim or x.shape[dim] <= self.count else x.narrow(dim, 0, self.count)
