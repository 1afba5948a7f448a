"""Parameter values handed to a run of the model, those of torch modules included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.model import compat


class Substitute(Messenger):
    """Hand out the given parameter values; must sit outside of the enumeration handler.

    Parameters of torch modules cannot be replaced by a handler (`PyroModule.__getattr__` ignores
    what the handler returns), so their data are overwritten in place and restored on exit. Backward passes come
    later: what they need of such a parameter is kept as a copy.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.leaves: dict[str, Tensor] = {}
        self._saved: list[tuple[torch.nn.Parameter, Tensor]] = []
        self._memory: set[int] = set()
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values:
            return
        if name not in self.leaves:
            own = compat.module_parameter(msg)
            if own is not None:
                self._saved.append((own, own.data.clone()))
                self._memory.add(own.untyped_storage().data_ptr())
                if self._hooks is None:
                    self._hooks = torch.autograd.graph.saved_tensors_hooks(self._kept, lambda kept: kept)
                    self._hooks.__enter__()
                own.data.copy_(self.values[name].detach())
                self.leaves[name] = own
            else:
                self.leaves[name] = self.values[name]
        msg["value"], msg["done"] = self.leaves[name], True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            self.leaves[msg["name"]] = self.values[msg["name"]]
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _kept(self, saved: Tensor) -> Tensor:
        return saved.detach().clone() if saved.untyped_storage().data_ptr() in self._memory else saved

    def __exit__(self, *args: Any) -> Any:
        if self._hooks is not None:
            self._hooks.__exit__(*args)
            self._hooks = None
        for parameter, data in self._saved:
            parameter.data.copy_(data)
        self._saved.clear()
        return super().__exit__(*args)
