"""Random discrete graphical models as Pyro programs: the input of the brute-force law (G5).

A `Graph` draws, from a seed, at most six nodes in topological order. A node lives in no plate, in the outer
plate or in the inner plate nested in it; its parents are earlier nodes of the same or an enclosing plate; it
is a Categorical, Bernoulli, OneHotCategorical or Binomial whose table is a parameter indexed by its parents.
Tables of equal shape may be tied, and entries may be structural zeros. Observations are drawn from the
model, so they are never impossible. Designs with more than `MAX_ASSIGNMENTS` assignments are drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.oracles import Enumeration

MAX_ASSIGNMENTS = 400
BINOMIAL_TOTAL = 2
KINDS = ("categorical", "bernoulli", "one_hot", "binomial")


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    states: int
    level: int  # 0 no plate, 1 the outer plate, 2 the inner plate
    parents: tuple[int, ...]
    table: str  # tied nodes name the same table
    observed: bool

    @property
    def per_row(self) -> bool:
        """Whether the last axis of the table is a simplex; otherwise it holds success probabilities."""
        return self.kind in ("categorical", "one_hot")


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    tables: dict[str, Tensor]
    outer: int
    inner: int

    def size(self, level: int) -> int:
        return (1, self.outer, self.outer * self.inner)[level]

    @property
    def barren(self) -> set[str]:
        """Latents without an observed descendant: the data say nothing about them, given the others."""
        informed: set[int] = set()
        for i in reversed(range(len(self.nodes))):
            if self.nodes[i].observed or i in informed:
                informed |= {i, *self.nodes[i].parents}
        return {node.name for i, node in enumerate(self.nodes) if i not in informed}

    @property
    def assignments(self) -> int:
        return int(np.prod([float(n.states) ** self.size(n.level) for n in self.nodes if not n.observed]))

    def model(self, data: dict[str, Tensor]) -> None:
        """The Pyro program; `data` holds the values of the observed nodes."""
        tables = {name: self._param(name, table) for name, table in self.tables.items()}
        indices: list[Tensor] = []
        outer_plate = pyro.plate("outer", self.outer, dim=-1)
        inner_plate = pyro.plate("inner", self.inner, dim=-2)
        for node in self.nodes:
            fn = self._distribution(node, tables[node.table], [indices[p] for p in node.parents])
            obs = data.get(node.name)
            if node.level == 0:
                value = pyro.sample(node.name, fn, obs=obs)
            elif node.level == 1:
                with outer_plate:
                    value = pyro.sample(node.name, fn, obs=obs)
            else:
                with outer_plate, inner_plate:
                    value = pyro.sample(node.name, fn, obs=obs)
            indices.append(value.argmax(-1) if node.kind == "one_hot" else value.long())

    def _param(self, name: str, table: Tensor) -> Tensor:
        per_row = any(n.table == name and n.per_row for n in self.nodes)
        interior = torch.full_like(table, 1.0 / table.shape[-1] if per_row else 0.5)
        return pyro.param(name, interior, constraint=constraints.simplex if per_row else constraints.unit_interval)

    def _distribution(self, node: Node, table: Tensor, parents: list[Tensor]) -> dist.Distribution:
        probs = Vindex(table)[tuple(parents)] if parents else table
        if node.kind == "categorical":
            return dist.Categorical(probs)
        if node.kind == "one_hot":
            return dist.OneHotCategorical(probs)
        if node.kind == "bernoulli":
            return dist.Bernoulli(probs)
        return dist.Binomial(BINOMIAL_TOTAL, probs)

    def simulate(self) -> dict[str, Tensor]:
        """Values of the observed nodes, drawn at the tables with torch's global generator."""
        with pyro.get_param_store().scope():
            for name, table in self.tables.items():
                pyro.param(name, table.clone())  # unconstrained on purpose: structural zeros pass through exactly
            nodes = poutine.trace(self.model).get_trace({}).nodes
        return {n.name: nodes[n.name]["value"] for n in self.nodes if n.observed}

    def updated_tables(self, data: dict[str, Tensor], posterior: Enumeration) -> dict[str, Tensor]:
        """The tables after one EM update, from expected counts; rows never visited stay.

        Barren latents are summed out beforehand (their factors sum to one), so they add no counts.
        """
        counts = {name: np.zeros((*self._rows(name), self._width(name))) for name in self.tables}
        shapes = ((), (self.outer,), (self.inner, self.outer))
        for weight, assignment in zip(posterior.responsibilities[:, 0, 0], posterior.outer, strict=True):
            values = {n.name: _index(n, {**data, **assignment}[n.name]) for n in self.nodes}
            for node in (n for n in self.nodes if n.name not in self.barren):
                cells = [values[self.nodes[p].name] for p in node.parents] + [values[node.name]]
                cells = [np.broadcast_to(c, shapes[node.level]) for c in cells]
                if node.per_row:
                    np.add.at(counts[node.table], tuple(cells), float(weight))
                else:
                    total = BINOMIAL_TOTAL if node.kind == "binomial" else 1
                    for column, amount in enumerate((total - cells[-1], cells[-1])):
                        rows = (*cells[:-1], np.full(amount.shape, column))
                        np.add.at(counts[node.table], rows, float(weight) * amount)
        updated = {}
        for name, table in self.tables.items():
            row_total = counts[name].sum(-1, keepdims=True)
            shares = torch.tensor(counts[name] / np.where(row_total > 0, row_total, 1.0))
            per_row = table.dim() == len(self._rows(name)) + 1
            shares = shares if per_row else shares[..., 1]
            visited = torch.tensor(row_total > 0) if per_row else torch.tensor(row_total[..., 0] > 0)
            updated[name] = torch.where(visited, shares, table)
        return updated

    def _rows(self, name: str) -> tuple[int, ...]:
        node = next(n for n in self.nodes if n.table == name)
        return tuple(self.nodes[p].states for p in node.parents)

    def _width(self, name: str) -> int:
        node = next(n for n in self.nodes if n.table == name)
        return node.states if node.per_row else 2


def _index(node: Node, value: Tensor) -> npt.NDArray[np.int64]:
    return np.asarray(value.argmax(-1) if node.kind == "one_hot" else value.long())


def random_graph(seed: int) -> Graph:
    """A graph that is a function of its seed alone; at least one observed node has a latent parent."""
    rng = np.random.default_rng(seed)
    while True:
        graph = _draw(rng)
        latents = {i for i, n in enumerate(graph.nodes) if not n.observed}
        matters = any(latents & set(n.parents) for n in graph.nodes if n.observed)
        if matters and graph.assignments <= MAX_ASSIGNMENTS:
            return graph


def _draw(rng: np.random.Generator) -> Graph:
    outer, inner = int(rng.integers(2, 4)), 2
    nodes: list[Node] = []
    tables: dict[str, Tensor] = {}
    count = int(rng.integers(3, 7))
    for i in range(count):
        kind = str(rng.choice(KINDS))
        states = {"bernoulli": 2, "binomial": BINOMIAL_TOTAL + 1}.get(kind, int(rng.integers(2, 4)))
        level = int(rng.integers(0, 3))
        candidates = [j for j, n in enumerate(nodes) if n.level <= level]
        parents = tuple(sorted(rng.permutation(candidates)[: rng.choice(3, p=[0.15, 0.5, 0.35])].tolist()))
        shape = tuple(nodes[p].states for p in parents)
        per_row = kind in ("categorical", "one_hot")
        shape = (*shape, states) if per_row else shape
        tied = [n.table for n in nodes if tables[n.table].shape == shape and n.per_row == per_row]
        table = tied[0] if tied and rng.random() < 0.5 else f"table_{i}"
        if table not in tables:
            tables[table] = _table(rng, shape, per_row)
        observed = bool(rng.random() < 0.4) or i == count - 1
        nodes.append(Node(f"node_{i}", kind, states, level, parents, table, observed))
    return Graph(tuple(nodes), tables, outer, inner)


def _table(rng: np.random.Generator, shape: tuple[int, ...], per_row: bool) -> Tensor:
    if not per_row:
        table = rng.uniform(0.1, 0.9, shape)
        return torch.tensor(np.where(rng.random(shape) < 0.15, 0.0, table))
    table = rng.dirichlet(np.ones(shape[-1]), shape[:-1]) + 0.05
    zero = rng.random(shape) < 0.15
    zero[..., 0] = False  # every row keeps one state
    table = np.where(zero, 0.0, table)
    return torch.tensor(table / table.sum(-1, keepdims=True))
