"""Random linear-Gaussian models as Pyro programs: the input of the dense-normal law (G5).

A seed draws latents and observed sites in topological order. The location of each is a random affine map of earlier
latents that it can read, with a loading `w` and an offset `b` that are parameters and may be shared by several sites;
sites are Normal, Normal vectors by `.to_event` or multivariate normals. Three designs:

    nested    latents of no plate, of groups, and of rows nested in groups; data at either level
    long      latents of groups, of other groups crossed with these, and of no plate, gathered by the rows of a
              sibling plate; data of the groups too
    mixed     latents of a plate, with a discrete latent that moves locations and scales of its own element
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

DESIGNS = ("nested", "long", "mixed")
GROUPS, OTHERS, ROWS, LONG = 3, 2, 2, 7


@dataclass(frozen=True)
class Node:
    """`size` entries of an event, 0 for a scalar; `loading` names the maps that the parameter w multiplies."""

    name: str
    plate: str  # "" for none
    size: int
    kind: str  # "normal" or "mvn"
    maps: dict[str, Tensor]  # by parent, (size, size of the parent), a scalar counting 1
    loading: frozenset[str]
    offset: Tensor  # (size or 1,)
    with_b: bool
    spread: Tensor  # scales (size or 1,), or a Cholesky factor
    with_s: bool
    shifts: Tensor | None  # (2, size or 1): added in the states of the discrete latent
    data: Tensor | None = None

    @property
    def width(self) -> int:
        return max(self.size, 1)


@dataclass(frozen=True)
class Graph:
    seed: int
    design: str
    nodes: tuple[Node, ...]
    index: dict[str, Tensor]  # of the long rows, by plate
    start: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.design}-{self.seed}"

    @property
    def roles(self) -> dict[str, str]:
        """All latents as latents, those without a plate of the data's too."""
        return {node.name: "latent" for node in self.nodes if node.data is None}

    @property
    def num_latents(self) -> int:
        return len(self.roles)

    @property
    def doubtful(self) -> bool:
        """Some latent shares no plate with data, and has no parameter or latent in its prior."""
        places = {node.plate for node in self.nodes if node.data is not None}
        return any(
            not node.plate or node.plate not in places for node in self.nodes if node.data is None and not node.maps
        )

    @property
    def model(self) -> Callable[[], None]:
        return lambda: _run(self)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


SIZES = {"": (), "groups": (GROUPS,), "others": (OTHERS,), "long": (LONG,), "rows": (GROUPS, ROWS)}
READS = {  # plates whose latents a site of a plate can read
    "nested": {"": ("",), "groups": ("", "groups"), "rows": ("", "groups", "rows")},
    "long": {"": ("",), "groups": ("", "groups"), "others": ("others",), "long": ("", "groups", "others")},
    "mixed": {"groups": ("groups",)},
}
PLACES = {
    "nested": (("", "groups", "rows"), ("groups", "rows")),  # of latents, of data
    "long": (("", "groups", "others"), ("groups", "long")),
    "mixed": (("groups",), ("groups",)),
}


def linear_graph(design: str, seed: int) -> Graph:
    """The graph of a seed."""
    rng = np.random.default_rng([seed, DESIGNS.index(design)])
    of_latents, of_data = PLACES[design]
    nodes: list[Node] = []
    places = [str(rng.choice(of_latents)) for _ in range(rng.integers(1, 5))]
    places.sort(key=list(SIZES).index)
    for i, plate in enumerate(places):
        nodes.append(_node(rng, f"z{i}", plate, nodes, design))
    latents = list(nodes)
    for i in range(rng.integers(1, 4)):
        readable = [p for p in of_data if any(z.plate in READS[design][p] for z in latents)]
        plate = str(rng.choice(readable)) if readable else of_data[-1]
        node = _node(rng, f"x{i}", plate, latents, design)
        shape = [(GROUPS, ROWS) if plate == "rows" else (GROUPS, 1) if design == "nested" else SIZES[plate]][0]
        event = (node.size,) if node.size else ()
        nodes.append(Node(**{**vars(node), "data": _t(rng.normal(size=(*shape, *event)) * 1.5)}))
    index = {p: torch.as_tensor(rng.integers(0, SIZES[p][0], LONG)) for p in ("groups", "others")}
    start = {"w": _t(rng.normal()), "b": _t(rng.normal()), "s": _t(rng.uniform(0.5, 1.5))}
    if design == "mixed":
        start["p"] = _t(rng.dirichlet([3.0, 3.0]))
    used = {"w": any(n.loading for n in nodes), "b": any(n.with_b for n in nodes), "s": any(n.with_s for n in nodes)}
    return Graph(seed, design, tuple(nodes), index, {n: v for n, v in start.items() if used.get(n, True)})


def _node(rng: np.random.Generator, name: str, plate: str, latents: list[Node], design: str) -> Node:
    size = int(rng.choice([0, 0, 2, 3]))
    width, kind = max(size, 1), "mvn" if size and rng.random() < 0.5 else "normal"
    allowed = [z for z in latents if z.plate in READS[design][plate]]
    data = name.startswith("x")
    chosen = [z for z in allowed if rng.random() < (0.7 if data else 0.4)]
    if data and allowed and not chosen:
        chosen = [allowed[-1]]
    maps = {z.name: _t(rng.normal(size=(width, z.width))) for z in chosen}
    loading = frozenset(n for n in maps if rng.random() < 0.4)
    scales = rng.uniform(0.5, 1.5, width)
    root = np.tril(rng.normal(size=(width, width)) * 0.4, -1) + np.diag(scales)
    shifts = _t(rng.normal(size=(2, width)) * 1.5) if design == "mixed" and (data or rng.random() < 0.5) else None
    spread = _t(root if kind == "mvn" else scales)
    return Node(
        name, plate, size, kind, maps, loading, _t(rng.normal(size=width)), bool(rng.random() < 0.5), spread,
        bool(rng.random() < 0.4), shifts,
    )  # fmt: skip


def _run(graph: Graph) -> None:
    params = {
        name: pyro.param(name, value.clone(), constraint=_constraint(name)) for name, value in graph.start.items()
    }
    values: dict[str, Tensor] = {}
    nested = graph.design == "nested"
    names = ("groups", "rows") if nested else ("groups", "others", "long")
    plates = {p: pyro.plate(p, SIZES[p][-1], dim=-2 if nested and p == "groups" else -1) for p in names}
    of = {p: [n for n in graph.nodes if n.plate == p] for p in SIZES}
    for node in of[""]:
        values[node.name] = _site(graph, node, values, params)
    with plates["groups"]:
        if graph.design == "mixed":
            values["k"] = pyro.sample("k", dist.Categorical(params["p"]))
        for node in of["groups"]:
            values[node.name] = _site(graph, node, values, params)
        if nested:
            with plates["rows"]:
                for node in of["rows"]:
                    values[node.name] = _site(graph, node, values, params)
    for plate in ("others", "long"):
        if of[plate]:
            with plates[plate]:
                for node in of[plate]:
                    values[node.name] = _site(graph, node, values, params)


def _site(graph: Graph, node: Node, values: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
    plate_of = {n.name: n for n in graph.nodes}
    loc = node.offset + (params["b"] if node.with_b else 0.0)
    for parent, matrix in node.maps.items():
        own = plate_of[parent]
        value = values[parent] if own.size else values[parent].unsqueeze(-1)
        if node.plate == "long" and own.plate:
            value = Vindex(value)[..., graph.index[own.plate], :]
        part = value @ matrix.T
        loc = loc + (params["w"] * part if parent in node.loading else part)
    if node.shifts is not None:
        loc = loc + Vindex(node.shifts)[values["k"]]
    spread = node.spread * params["s"] if node.with_s else node.spread
    fn: Any
    if node.kind == "mvn":
        fn = dist.MultivariateNormal(loc, scale_tril=spread)
    elif node.size:
        fn = dist.Normal(loc, spread).to_event(1)
    else:
        fn = dist.Normal(loc.squeeze(-1), spread.squeeze(-1))
    drawn: Tensor = pyro.sample(node.name, fn, obs=node.data)
    return drawn


def _constraint(name: str) -> Any:
    return {"s": constraints.positive, "p": constraints.simplex}.get(name, constraints.real)
