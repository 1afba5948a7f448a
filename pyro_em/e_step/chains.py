"""Components whose latents form a chain, many of them at once: from factors to potentials and back.

A component is a chain if every factor touches at most two latents, the touching pairs are the neighbours of
the latents' program order, and all latents live in the component's root plates with equally many states. One
latent alone (a mixture, a latent class model) is a chain of one step. Chains of the same length, number of
states and root plates are smoothed together by `evidence/chain.py`, whether they are elements of a plate or
components of their own (a Python loop over sequences). A copy of a group of sites belongs to one step, so the
factors of a group are added to the potentials, and its posterior weights are taken from them, at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from pyro_em.e_step.groups import Group
from pyro_em.evidence.chain import ChainPosterior, smooth
from pyro_em.model.graph import Component, FactorGraph
from pyro_em.model.packing import align


@dataclass(frozen=True)
class Chain:
    """Symbols of a component's latents in the order of the chain, and of its root plates."""

    latents: tuple[str, ...]
    root: tuple[str, ...]
    kind: tuple[int, ...]  # steps, states, sizes of the root plates: chains alike in these go together

    def step_of(self, latents: str) -> int:
        """Step of a unary factor's latent, or of the later latent of a pairwise factor."""
        return self._steps[latents[-1]]

    @cached_property
    def _steps(self) -> dict[str, int]:
        return {symbol: step for step, symbol in enumerate(self.latents)}


def find_chain(
    graph: FactorGraph, component: Component, sizes: Mapping[str, int], order: Mapping[str, int]
) -> Chain | None:
    """The component as a chain, or None.

    :param sizes: of every plate and enumeration symbol; symbols of size 1 are no dims of any factor.
    :param order: position in the program of the site of every enumeration symbol.
    """
    if component.nests:
        return None
    latents = sorted(component.symbols, key=order.__getitem__)
    pairs = set()
    for name in component.factors:
        own = sorted(set(graph.factors[name].dims) & component.symbols, key=order.__getitem__)
        if len(own) > 2:
            return None
        if len(own) == 2:
            pairs.add((own[0], own[1]))
        info = graph.factors[name]
        if info.enumerated and any(sizes[d] > 1 for d in info.plates - component.root):
            return None
    if pairs != set(pairwise(latents)) or len({sizes[d] for d in latents}) > 1:
        return None
    root = tuple(d for d in graph.plate_names if d in component.root and sizes[d] > 1)
    return Chain(tuple(latents), root, (len(latents), sizes[latents[0]], *(sizes[d] for d in root)))


@dataclass(frozen=True)
class _Member:
    """A group's place in a bundle: `rows` of the stacked potentials that its copies add to, None for all."""

    group: Group
    rows: Tensor | None


class Bundle:
    """Chains of one kind. C components, T steps, root plates, K states.

    Rows of stacked unary potentials are steps x components, of pairwise ones the steps after the first.
    """

    def __init__(self, kind: tuple[int, ...], components: Sequence[int]) -> None:
        self.steps, self.states, *root = kind
        self.root, self.components = tuple(root), tuple(components)
        self.members: tuple[list[_Member], list[_Member]] = ([], [])
        self._place: dict[str, tuple[bool, Tensor | None]] = {}

    @property
    def groups(self) -> list[Group]:
        return [member.group for members in self.members for member in members]

    def add(self, group: Group, steps: Sequence[int], components: Sequence[int]) -> None:
        """Give a group its place: the step and the component of every copy."""
        linked = group.num_enumerated == 2
        number = {c: i for i, c in enumerate(self.components)}
        width = len(self.components)
        rows = [(t - linked) * width + number[c] for t, c in zip(steps, components, strict=True)]
        everything = rows == list(range((self.steps - linked) * width))
        where = None if everything else torch.tensor(rows)
        self.members[linked].append(_Member(group, where))
        self._place[group.name] = (linked, where)

    def smooth(self, factors: Mapping[str, Tensor]) -> ChainPosterior:
        """Posterior of all chains; chain b is component b // R and element b % R of its root plates."""
        unary = self._potential(self.members[0], factors, 1, self.steps)
        unary = unary.expand(self.steps * len(self.components), *self.root, self.states)
        pair = self._potential(self.members[1], factors, 2, self.steps - 1)
        return smooth(unary.reshape(self.steps, -1, self.states), self._as_chains(pair))

    def _potential(
        self, members: Sequence[_Member], factors: Mapping[str, Tensor], num_latents: int, steps: int
    ) -> Tensor:
        """Sum of the factors of the groups, (rows or 1, root or 1, states)."""
        total = torch.zeros(1, *(1 for _ in self.root), *(self.states,) * num_latents, dtype=torch.float64)
        for member in members:
            factor = self._over_root(factors[member.group.name], member.group)
            if member.rows is not None:
                copies = factor.expand(len(member.rows), *factor.shape[1:])
                rows = steps * len(self.components)
                factor = factor.new_zeros(rows, *factor.shape[1:]).index_add_(0, member.rows, copies)
            total = total + factor
        return total

    def _over_root(self, factor: Tensor, group: Group) -> Tensor:
        """A factor summed over the plates inside of the root: (copies or 1, root or 1, states)."""
        inner = range(1 + len(self.root), factor.dim() - group.num_enumerated)
        if not inner:
            return factor
        sizes = [group.shape[i] if i in inner else n for i, n in enumerate(factor.shape)]
        return factor.expand(sizes).sum(list(inner))

    def _as_chains(self, pair: Tensor) -> Tensor:
        """(rows or 1, root or 1, K, K) to (T-1 or 1, B or 1, K, K)."""
        matrix = (self.states, self.states)
        same = all(n == 1 for n in pair.shape[1:-2])
        if same and (len(pair) == 1 or len(self.components) == 1):
            return pair.reshape(-1, 1, *matrix)
        if len(pair) == 1 and len(self.components) == 1:
            return pair.expand(1, *self.root, *matrix).reshape(1, -1, *matrix)
        rows = (self.steps - 1) * len(self.components)
        return pair.expand(rows, *self.root, *matrix).reshape(self.steps - 1, -1, *matrix)

    def weight(self, group: Group, posterior: ChainPosterior) -> Tensor:
        """Expected multiplicity of a group's copies (`Group.expected_weight`)."""
        linked, rows = self._place[group.name]
        inner = len(group.shape) - 1 - len(self.root) - group.num_enumerated
        if not linked:
            found = posterior.unary.reshape(-1, *self.root, *(1,) * inner, self.states)
            return group.expected_weight(found if rows is None else found[rows])
        matrix = (self.states, self.states)
        if rows is None and inner == 0 and all(n == 1 for n in group.own_shape[:-2]):
            weight = group.weight
            if weight is not None:
                weight = weight[..., 0, 0].expand(group.shape[:-2]).reshape(self.steps - 1, -1)
            total = posterior.total_pairs(weight)
            return total.reshape(*(1 for _ in group.own_shape[:-2]), *matrix, *(1,) * group.record.element_dims)
        found = posterior.pairs().reshape(-1, *self.root, *(1,) * inner, *matrix)
        return group.expected_weight(found if rows is None else found[rows])

    def terms(self, posterior: ChainPosterior, graph: FactorGraph) -> tuple[Tensor, Tensor | None]:
        """log Z of the components over their root plates, (C, root), and the weights they count with."""
        terms = posterior.log_evidence.reshape(len(self.components), *self.root)
        weights = [graph.components[c].weight for c in self.components]
        if all(weight is None for weight in weights):
            return terms, None
        one = torch.ones(self.root, dtype=terms.dtype)
        own = [
            one if weight is None else align(weight, dims).double().expand(self.root)
            for weight, dims in zip(weights, self._root_dims(graph), strict=True)
        ]
        return terms, torch.stack(own)

    def _root_dims(self, graph: FactorGraph) -> list[str]:
        return [
            "".join(d for d in graph.plate_names if d in graph.components[c].root and graph.plate_sizes[d] > 1)
            for c in self.components
        ]
