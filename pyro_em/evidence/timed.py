"""Log-evidence of a loop over time whose steps were run together, as one packed factor.

The factors of the steps t >= h, with dims (τ, previous states, states now, inner latents), are contracted over
the latents that no later step reads, which leaves

    u_t(s_t)            terms in states now,
    a_t(s_{t-1}, s_t)   terms that look back,

s_t being the joint state of everything that the next step reads: the latents now, and those of the steps before
as far as the loop looks back (they are shifted, and disagreeing pairs are impossible). The factors of the first
h steps give u(s_{h-1}). `chain_evidence` sums, maximises or draws over the paths, and its gradient is the
posterior of pairs, so that the gradient of log Z is every factor's posterior weight, as in discrete.py.

The chains are B in number: one for each element of the plates that all carried latents share, and for each
state of latents outside of the loop. Refused: carried latents in different plates.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyro_em.errors import Refusal, ResourceError
from pyro_em.evidence.paths import chain_evidence
from pyro_em.evidence.ring import LogDensityRing
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.compat import dims_of, with_dims
from pyro_em.model.graph import FactorGraph

Terms = list[tuple[str, Tensor]]  # packed dims and tensor


@dataclass(frozen=True)
class Potentials:
    """Log-potentials of B chains of joint states S: `start` (B, S), `unary` (N, B, S), `pair` (N or 1, B or 1, S, S).

    `batch` are the packed dims of the chains in order, `shape` their sizes; `states` the sizes of the carried
    latents in S, in the order of the loop's; `plates` the plates among the dims.
    """

    start: Tensor
    unary: Tensor
    pair: Tensor
    batch: str
    shape: tuple[int, ...]
    states: tuple[int, ...]
    plates: frozenset[str]


def loop_factor(
    graph: FactorGraph, loop: ChainedLoop, factors: Mapping[str, Tensor], ring: LogDensityRing, symbols: frozenset[str]
) -> tuple[frozenset[str], Tensor]:
    """The loop's log-evidence, packed over its chains, and the plates among those dims.

    :param factors: packed log-densities of the component.
    :param symbols: enumeration symbols of the component.
    """
    own = potentials(graph, loop, factors, ring, symbols)
    result = chain_evidence(own.start, own.unary, own.pair, ring.elimination)
    kept = "".join(d for d, n in zip(own.batch, own.shape, strict=True) if n > 1)
    return own.plates, with_dims(result.reshape([n for n in own.shape if n > 1]), kept)


def potentials(
    graph: FactorGraph, loop: ChainedLoop, factors: Mapping[str, Tensor], ring: LogDensityRing, symbols: frozenset[str]
) -> Potentials:
    """The loop as chains of joint states, everything else contracted; arguments as in `loop_factor`."""
    own = {name: factors[name] for name in (*loop.heads, *loop.rest) if name in factors}
    inside = {d for name in own for d in (graph.factors[name].symbol,) if d is not None} & symbols
    plates = _chain_plates(graph, loop)
    seen = frozenset(c.previous for c in loop.carried)
    heads = _terms(graph, own, loop.heads, inside - seen, ring)
    rest = _terms(graph, own, loop.rest, inside - seen - {c.current for c in loop.carried}, ring)
    used = set().union(*(dims for dims, _ in (*heads, *rest)))
    outer = "".join(sorted((used & symbols) - inside))  # latents outside of the loop: one chain for each state
    batch = "".join(d for d in graph.plate_names if d in plates) + outer
    size: dict[str, int] = {}
    for dims, term in (*heads, *rest):
        size.update(zip(dims, term.shape, strict=True))
    size = {**{c.current: size.get(c.previous, 1) for c in loop.carried}, **size}
    size = {**{c.previous: size[c.current] for c in loop.carried}, **size}
    states = math.prod(size[c.previous] for c in loop.carried)
    steps = loop.loop.steps - loop.loop.history
    needed = 8 * steps * states**2
    if needed > ring.max_bytes:
        raise ResourceError(
            f"The loop over '{next(iter(loop.rest))}' has {states} joint states, whose pairs over {steps} steps need "
            f"{needed / 2**20:.0f} MiB, more than the limit of {ring.max_bytes / 2**20:.0f} MiB. Carry fewer latents "
            "from step to step, or raise pyro_em.settings.max_table_bytes."
        )
    back = [c.previous for c in loop.carried]
    start = _total(heads, batch + "".join(back), size).reshape(math.prod(size.get(d, 1) for d in batch), states)
    unary, pair = _split(rest, loop, batch, size)
    sizes = tuple(size[d] for d in back)
    return Potentials(start, unary, pair, batch, tuple(size.get(d, 1) for d in batch), sizes, plates)


def head_potential(
    graph: FactorGraph, loop: ChainedLoop, factors: Mapping[str, Tensor], last: int, kept: str, own: Potentials
) -> Tensor:
    """log p(z, x_0..x_last | c) of states with the symbols `kept` in the first steps, (B, their sizes).

    What the model says of steps after `last` is left out: 0 <= last < history.
    """
    chosen = {n: factors[n] for n in factors if n in loop.heads and loop.loop.head_steps[n] <= last}
    inside = {d for n in chosen for d in (graph.factors[n].symbol,) if d is not None} - set(kept) - set(own.batch)
    size = dict(zip(own.batch, own.shape, strict=True))
    terms = _terms(graph, chosen, chosen, inside, LogDensityRing("sum", names=graph.symbol_sites))
    for dims, term in terms:
        size.update({d: n for d, n in zip(dims, term.shape, strict=True) if d in kept})
    return _total(terms, own.batch + kept, size).reshape(-1, *(size.get(d, 1) for d in kept))


def outer_evidence(
    graph: FactorGraph, factors: Mapping[str, Tensor], names: Collection[str], dims: Mapping[str, int], inner: set[str]
) -> Tensor:
    """log p(c, what is observed outside of the loop) over `dims` (plates of c and its symbols, with their sizes).

    :param inner: symbols of the latents that are summed out.
    """
    chosen = {name: factors[name] for name in factors if name in names}
    ring = LogDensityRing("sum", names=graph.symbol_sites)
    return _total(_terms(graph, chosen, chosen, inner, ring) if chosen else [], "".join(dims), dims)


def _chain_plates(graph: FactorGraph, loop: ChainedLoop) -> frozenset[str]:
    symbols = {c.previous for c in loop.carried}
    sites = [name for name in graph.factors if graph.factors[name].symbol in symbols]
    plates = {graph.factors[name].plates for name in sites}
    if len(plates) > 1:
        raise Refusal(
            sites[0],
            f"the latents that its pyro_em.markov loop carries from step to step ({', '.join(map(repr, sites))}) lie "
            "in different plates, so that the chains are coupled; exact elimination would be exponential in the size "
            "of a plate.",
            "write the smaller plate as a Python loop, or use algorithm='svi'.",
        )
    return next(iter(plates))


def _terms(
    graph: FactorGraph, factors: Mapping[str, Tensor], names: Collection[str], inner: set[str], ring: LogDensityRing
) -> Terms:
    """Factors of some sites with the latents `inner` contracted."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in factors:
        if name in names:
            tree.setdefault(graph.factors[name].plates, []).append(factors[name])
    contracted = contract_tensor_tree(tree, set(inner), ring=ring)
    return [(dims_of(term), term) for terms in contracted.values() for term in terms]


def _total(terms: Terms, dims: str, size: Mapping[str, int]) -> Tensor:
    """Sum of terms over `dims`, in full shape; what they have besides (inner plates) is summed over."""
    shape = [size.get(d, 1) for d in dims]
    total = torch.zeros((1,) * len(dims), dtype=torch.float64)
    for own, term in terms:
        gone = [i for i, d in enumerate(own) if d not in dims]
        term = term.sum(gone) if gone else term
        own = "".join(d for d in own if d in dims)
        order = [own.index(d) for d in dims if d in own]
        total = total + term.permute(order).reshape([size[d] if d in own else 1 for d in dims])
    return total.expand(shape)


def _split(rest: Terms, loop: ChainedLoop, batch: str, size: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """u (N, B, S) and a (N or 1, B or 1, S, S) of the steps that were run together."""
    back = [c.previous for c in loop.carried]
    now = [c.current for c in loop.carried if c.lag == 1]
    size = {**size, loop.plate: loop.loop.steps - loop.loop.history}
    lead = loop.plate + batch
    looks_back = [_constant_dims_dropped(dims, term, lead) for dims, term in rest if set(dims) & set(back)]
    here = [(dims, term) for dims, term in rest if not set(dims) & set(back)]
    unary = _total(here, lead + "".join(now), size)
    # States of longer lags are shifted states of before: what happens now does not depend on them.
    unary = unary.reshape(*unary.shape[: len(lead)], *(size[c.previous] if c.lag == 1 else 1 for c in loop.carried))
    unary = unary.expand(*unary.shape[: len(lead)], *(size[d] for d in back)).flatten(len(lead))
    along = set("".join(dims for dims, _ in looks_back))
    own = {**size, **{d: 1 for d in lead[:1] if d not in along}}
    if not along & set(batch):
        own.update(dict.fromkeys(batch, 1))
    pair = _total(looks_back, lead + "".join(back) + "".join(now), own)
    pair = pair.reshape(len(pair), math.prod(pair.shape[1 : len(lead)]), *pair.shape[len(lead) :])
    return unary.reshape(len(unary), -1, unary.shape[-1]), _shift(pair, loop, size)


def _constant_dims_dropped(dims: str, term: Tensor, lead: str) -> tuple[str, Tensor]:
    """Without those of the dims `lead` along which the term is only expanded: one table serves all steps."""
    for d in lead:
        if d in dims and term.stride(dims.index(d)) == 0:
            term, dims = term.select(dims.index(d), 0), dims.replace(d, "")
    return dims, term


def _shift(pair: Tensor, loop: ChainedLoop, size: Mapping[str, int]) -> Tensor:
    """(N, B, states back, states now) to (N, B, S, S): the state of lag ℓ + 1 was that of lag ℓ a step before."""
    lead, count = pair.shape[:2], len(loop.carried)
    sizes = [size[c.previous] for c in loop.carried]
    pair = pair.reshape(*lead, *sizes, *(n if c.lag == 1 else 1 for n, c in zip(sizes, loop.carried, strict=True)))
    for i, carried in enumerate(loop.carried):
        if carried.lag > 1:  # its predecessor stands before it
            shape = [1] * (2 + 2 * count)
            shape[2 + i - 1] = shape[2 + count + i] = sizes[i]
            pair = pair + torch.eye(sizes[i], dtype=torch.float64).log().reshape(shape)
    states = math.prod(sizes)
    return pair.expand(*lead, *sizes, *sizes).reshape(*lead, states, states)
