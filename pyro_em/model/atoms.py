"""Runs of a model with given values for its continuous latents: one value each, or several along one more dim.

Several values (*atoms*) stand in one more leftmost plate dim, `dim`, which enumeration dims leave free. Most models
take them in one run, as they take enumerated states. A model that indexes a latent by position (`b[subject]`) would
index the atoms instead; it is run once per atom and the runs are stacked, which is always right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.device import checked_indices
from pyro_em.errors import Refusal
from pyro_em.model.compat import detached, dims_of
from pyro_em.model.density import packed_log_density
from pyro_em.model.indexed import Indexed, run_enumerated
from pyro_em.model.packing import align
from pyro_em.model.stacking import stack
from pyro_em.model.trace import Run, SiteRecord, quiet_store
from pyro_em.types import Model, Params

Shapes = Mapping[str, tuple[torch.Size, torch.Size]]


@dataclass(frozen=True)
class AtomRuns:
    """How to run a model at values of its continuous latents.

    `shapes` are the latents' own (batch, event) shapes; `symbols[site][dim]` names dims that Pyro does not know of
    (that of the atoms, and enumeration dims that only reach the site through a latent's value); `options` are those of
    `run_model`.
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dim: int
    shapes: Shapes
    options: Mapping[str, Any]
    symbols: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    looped: bool = False
    indexed: Indexed | None = None

    def one(self, params: Params, values: Mapping[str, Tensor]) -> Run:
        """The run at one value of each latent, in the latents' own shapes."""
        return self._run(params, values, {})

    def several(self, params: Params, values: Mapping[str, Tensor]) -> Run:
        """The run at atoms: values of shape (states..., S, plates...) + event, with m dims before the event."""
        if not self.looped:
            return self._run(params, values, self.symbols)
        counts: dict[str, int] = {}  # of atoms, which differ from set to set
        for name, value in values.items():
            symbol = self.symbols[name][self.dim]
            counts[symbol] = max(counts.get(symbol, 1), value.shape[self.axis(name, value)])
        runs = [self._run(params, self._kept(values, s), {}) for s in range(max(counts.values()))]
        return stack(runs, self.dim, self.symbols, counts)

    def _run(self, params: Params, values: Mapping[str, Tensor], symbols: Mapping[str, Mapping[int, str]]) -> Run:
        with quiet_store(), pyro.validation_enabled(False):
            return run_enumerated(
                self.indexed,
                self.model,
                self.args,
                self.kwargs,
                params,
                lambda states: self._in_states(values, states),
                apart=self._apart(values),
                integrated=frozenset(self.shapes),
                symbols=symbols,
                **self.options,
            )

    def _kept(self, values: Mapping[str, Tensor], s: int) -> dict[str, Tensor]:
        """Atom number s of each latent in the states of the indexed latents that it depends on; see `atom`."""
        if self.indexed is None:
            return self.atom(values, s)
        axes = {name: self.axis(name, value) for name, value in values.items()}
        return {n: v.narrow(axes[n], min(s, v.shape[axes[n]] - 1), 1) for n, v in values.items()}

    def _apart(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the values are others in other states of an indexed latent."""
        dims = () if self.indexed is None else (latent.dim for latent in self.indexed.latents)
        places = [(v, v.dim() - len(self.shapes[n][1]) + d) for d in dims for n, v in values.items()]
        return any(place >= 0 and v.shape[place] > 1 for v, place in places)

    def _in_states(self, values: Mapping[str, Tensor], states: Mapping[int, int]) -> dict[str, Tensor]:
        """Values of the latents where indexed discrete latents are in the given states, by their dims."""
        found = {}
        for name, value in values.items():
            (batch, event), own = self.shapes[name], value
            for dim, k in states.items():
                axis = own.dim() - len(event) + dim
                if axis >= 0 and own.shape[axis] > 1:
                    own = own.narrow(axis, k, 1)
            lead = own.dim() - len(batch) - len(event)
            found[name] = own.reshape([*batch, *event]) if states and own.shape[:lead].numel() == 1 else own
        return found

    def axis(self, name: str, value: Tensor) -> int:
        """Where a latent's atoms have their dim."""
        return value.dim() - len(self.shapes[name][1]) + self.dim

    def atom(self, values: Mapping[str, Tensor], s: int) -> dict[str, Tensor]:
        """Atom number s of each latent (of the first states, if it depends on any), in the latents' own shapes."""
        found = {}
        for name, value in values.items():
            axis = self.axis(name, value)
            own = value.select(axis, min(s, value.shape[axis] - 1))
            batch, event = self.shapes[name]
            own = own.reshape([-1, *batch, *event])
            found[name] = own[0]
        return found

    def as_atoms(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Values in the latents' own shapes, one behind the other along the atoms' dim."""
        found = {}
        for name, (batch, event) in self.shapes.items():
            padded = [v[name].reshape((1,) * (-self.dim - len(batch)) + (*batch, *event)) for v in values]
            found[name] = torch.cat(padded)
        return found

    def certified(
        self, params: Params, values: Sequence[Mapping[str, Tensor]], runs: Sequence[Run]
    ) -> tuple[AtomRuns, tuple[dict[str, Tensor], Run] | None]:
        """Self, and the atoms and one run at all of them, if that says what single runs say; else self as `looped`.

        :param runs: at each of the values.
        """
        with torch.no_grad():
            stacked, atoms = stack(runs, self.dim, self.symbols), self.as_atoms(values)
            try:
                with checked_indices():
                    together = self.several(params, atoms)
                same = together.sites.keys() == stacked.sites.keys() and all(
                    _equal(together.sites[n], stacked.sites[n]) for n in stacked.sites
                )
            except (RuntimeError, IndexError, ValueError, TypeError, Refusal):  # whatever indexing a wrong dim leads to
                same = False
        return (self, (atoms, together)) if same else (dataclasses.replace(self, looped=True), None)


def _equal(a: SiteRecord, b: SiteRecord) -> bool:
    x, y = detached(packed_log_density(a)), detached(packed_log_density(b))
    dims = "".join(dict.fromkeys(dims_of(x) + dims_of(y)))
    x, y = align(x, dims), align(y, dims)
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)
