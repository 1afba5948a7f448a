"""Names of the latents of a loop over time: the sites of all steps are one sequence, named without the step.

A loop that is run together has the sites z_0 and z_1:1000; a user asks for `z`, the whole sequence with time as
the first dim, or for `z_17`, one step of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.model.chained import ChainedLoop
from pyro_em.model.graph import FactorGraph


@dataclass(frozen=True)
class Sequence:
    """One latent of a loop: its sites in the order of time (`heads` of one step each, `rest` of all others)."""

    name: str
    heads: tuple[str, ...]
    rest: str
    loop: ChainedLoop

    def joined(self, of: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the sites as one, time first."""
        return self.stacked([of[head] for head in self.heads], of[self.rest], 0)

    def stacked(self, heads: list[Tensor], rest: Tensor, lead: int) -> Tensor:
        """The same with `lead` dims before time; plates that the loop has, but these sites not, are dims of size 1."""
        front, back = heads[0].shape[:lead], heads[0].shape[lead:]
        rest = rest.reshape(*front, self.loop.loop.steps - len(heads), *back)
        return torch.cat([*(head.unsqueeze(lead) for head in heads), rest], lead)

    def step(self, site: str) -> int | None:
        """Step of a site's name, None if it is none of this sequence."""
        template = self.loop.rest[self.rest]
        before, after = template.text.split("{}")
        middle = site[len(before) : len(site) - len(after)] if site.startswith(before) and site.endswith(after) else ""
        if not middle.isdecimal():
            return None
        loop = self.loop.loop
        step = int(middle) - template.first + loop.history
        return step if 0 <= step < loop.steps and template.number(step, loop) == middle else None


def sequences(graph: FactorGraph) -> dict[str, Sequence]:
    """The latent sequences of a model by name; two of the same stem keep their full template as name."""
    found: dict[str, Sequence] = {}
    for loop in graph.loops:
        for rest, template in loop.rest.items():
            if rest in graph.latents:
                name = template.stem
                if name in graph.factors or name in found:
                    name = template.text
                heads = tuple(template.name(t, loop.loop) for t in range(loop.loop.history))
                found[name] = Sequence(name, heads, rest, loop)
    return found


class BySequence(dict[str, Tensor]):
    """Values by site, those of a loop by the name of their sequence, time first; `values["z_17"]` is one step.

    `lead` dims (draws) stand before time.
    """

    def __init__(self, values: Mapping[str, Tensor], known: Mapping[str, Sequence], lead: int = 0) -> None:
        self._known, self._lead = known, lead
        inside = {site: s for s in known.values() for site in (*s.heads, s.rest)}
        super().__init__()
        for site, value in values.items():
            sequence = inside.get(site)
            if sequence is None:
                self[site] = value
            elif sequence.name not in self:
                self[sequence.name] = self._joined(sequence, values)

    def joined_with(self, others: Iterable[BySequence]) -> BySequence:
        """The values of several in one."""
        for other in others:
            self.update(other)
            self._known = {**self._known, **other._known}
        return self

    def _joined(self, sequence: Sequence, values: Mapping[str, Tensor]) -> Tensor:
        return sequence.stacked([values[head] for head in sequence.heads], values[sequence.rest], self._lead)

    def __missing__(self, site: str) -> Any:
        for sequence in self._known.values():
            step = sequence.step(site)
            if step is not None:
                return self[sequence.name].select(self._lead, step)
        raise KeyError(site)
