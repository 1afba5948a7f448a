"""Binding of continuous latents: which belong together, which route each set takes, how runs get their values.

Two latents belong to one set if some log-density depends on both, directly or through others. What depends on what
is read from the autograd graph of one run with the latents as leaves, so a model's own arithmetic decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.errors import Refusal
from pyro_em.evidence.discrete import Evidence, evaluate, weighted_sum
from pyro_em.evidence.elimination import Candidate, Continuous, Eliminated, LatentSet, Route, atoms_of
from pyro_em.evidence.finite import check_finite
from pyro_em.evidence.routes import check_rules, check_support, choose_route, first_atoms
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.atoms import AtomRuns
from pyro_em.model.capture import Capture
from pyro_em.model.compat import dims_of
from pyro_em.model.density import log_density
from pyro_em.model.first_values import first_runs
from pyro_em.model.graph import FactorGraph, FactorInfo
from pyro_em.model.nests import at_rows
from pyro_em.model.packing import multiply, onto
from pyro_em.model.switching import refuse_switching
from pyro_em.model.trace import Run
from pyro_em.shapes import broadcast_shapes
from pyro_em.types import Params

SYMBOLS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"  # of the atoms of each set; Pyro's own symbols are letters
Values = dict[str, Tensor]


def check_kinds(capture: Capture, names: tuple[str, ...], rules: Mapping[str, Quadrature]) -> None:
    """Refuse latents that are neither enumerable nor continuous, and rules of anything but continuous ones."""
    check_rules(names, rules)
    for name in names:
        if capture.sites[name].discrete:
            raise Refusal(
                name,
                f"an unobserved {type(capture.sites[name].fn).__name__} has infinitely many states, which exact "
                "enumeration cannot sum.",
                "truncate it (a Categorical over 0..M), or use algorithm='svi' with a guide for it.",
            )
        check_support(name, capture.sites[name].fn)
    refuse_switching(capture, names)


def bind_continuous(
    capture: Capture,
    names: tuple[str, ...],
    runs: AtomRuns,
    params: tuple[Params, Params],
    rules: Mapping[str, Quadrature],
    maps: Mapping[str, Mapping[str, Tensor]],
    begun: tuple[Values, Run, Run],
) -> tuple[Continuous, Run, tuple[Values, tuple[Run, Run]]]:
    """Sets and routes of the continuous latents `names`; the run at the start, with these at atoms; other values of
    them, with the runs there at both `params`.

    :param params: the start and another feasible point: what holds at both is taken to hold.
    :param rules: of latents that are to be integrated by quadrature; `maps`: see `Candidate`.
    :param begun: values (`draw` with seed 1), and runs there at both `params`, the first with gradients to them if they
        have some.
    :raises Refusal: if a set is not exactly tractable, naming site, reason and remedy.
    """
    leaves, (first, second) = first_runs(runs, capture, names, params, begun[:2])
    sets = _sets(first, second, leaves, names, runs)
    symbols: dict[str, Mapping[int, str]] = {}
    enumeration = [_enumeration_symbols(first, latents, runs.dim) for latents in sets]
    for latents, reach in zip(sets, enumeration, strict=True):
        symbols.update({name: {**reach, runs.dim: latents.symbol} for name in latents.factors})
    plain = tuple({n: v.detach() for n, v in own.items()} for own in leaves)
    with torch.no_grad():
        crossed = runs.one(params[0], plain[1])
        again = runs.indexed is not None or any(leaf.dtype != begun[0][n].dtype for n, leaf in plain[0].items())
        drawn = plain[0], runs.one(params[1], plain[0]) if again else begun[2]
    runs, shown = dataclasses.replace(runs, symbols=symbols).certified(params[0], plain, (first, crossed))
    shown = None if runs.options["enumerated"] else shown  # atoms are others in other states
    routes: list[Route] = []
    values_at_start: Values = {}
    for latents, reach in zip(sets, enumeration, strict=True):
        rest = {n: v for n, v in plain[0].items() if n not in latents.names}
        own, own2 = ({n: leaf for n, leaf in point.items() if n in latents.names} for point in leaves)
        at, at2 = (_run_at(runs, p, rest) for p in params)
        others, where = ((plain[1], crossed), drawn), (runs.dim, reach, maps, shown[0] if shown else None)
        candidate = Candidate(latents, first, second, (own, own2), others, (at, at2), *where)
        route = _checked(choose_route(candidate, rules), latents, runs, first)
        routes.append(route)
        # Of the shape that every E-step will give: the run there shows what the M-step will see.
        values_at_start |= first_atoms(route, candidate)
    taken = [values_at_start[n] is x for n, x in shown[0].items()] if shown else []
    if shown is None or not all(taken):
        with torch.no_grad():
            shown = values_at_start, runs.several(params[0], values_at_start)
    continuous = Continuous(sets, tuple(routes), runs, values_at_start, crossed, any(taken))
    return continuous, shown[1], (plain[1], (crossed, second))


def _run_at(runs: AtomRuns, params: Params, rest: Values) -> Callable[[Mapping[str, Tensor]], Run]:
    return lambda own: runs.one(params, {**rest, **own})


def _checked(route: Route, latents: LatentSet, runs: AtomRuns, run: Run) -> Route:
    known = {d for latent in (runs.indexed.latents if runs.indexed else ()) for d in (latent.dim,)}
    states = [n for n in latents.factors if any(d < runs.dim and d not in known for d in run.sites[n].symbols)]
    if runs.looped and states:
        raise Refusal(
            states[0],
            f"the latent '{latents.names[0]}' is indexed by position in a model whose discrete latents it meets, so "
            "that its values cannot depend on their states.",
            "index the last dim of the latent, whatever stands left of it (b[..., subject]).",
        )
    return route


def _sets(
    first: Run, second: Run, leaves: tuple[Values, ...], names: tuple[str, ...], runs: AtomRuns
) -> tuple[LatentSet, ...]:
    reads: dict[str, set[str]] = {}
    for run, own in ((first, leaves[0]), (second, leaves[1])):
        for name, site in run.sites.items():
            made_of = [log_density(site)] if site.arguments is None else [site.value, *site.arguments.values()]
            found = pulled_back(made_of, list(own.values()), [torch.ones_like(x) for x in made_of])
            reached = {n for n, g in zip(own, found, strict=True) if g is not None}
            reads.setdefault(name, set()).update(reached)
    groups: list[tuple[set[str], list[str]]] = []
    for name in first.sites:
        latents = set(reads.get(name, ()))
        if name in names:
            latents.add(name)
        if not latents:
            continue
        members = [name]
        rest = []
        for group in groups:
            if group[0] & latents:
                latents |= group[0]
                members = group[1] + members
            else:
                rest.append(group)
        groups = [*rest, (latents, members)]
    if len(groups) > len(SYMBOLS):
        raise Refusal(
            sorted(groups[-1][0])[0],
            f"the model has {len(groups)} independent sets of continuous latents, more than {len(SYMBOLS)}.",
            "write independent repetitions as a pyro.plate instead of a Python loop; in a loop over time, give the "
            "observations the density in which the latent is integrated out (a wider Normal, GammaPoisson).",
        )
    order = {name: i for i, name in enumerate(first.sites)}
    sets = []
    groups.sort(key=lambda group: min(order[name] for name in group[1]))
    for symbol, (latents, members) in zip(SYMBOLS, groups, strict=False):
        inside = tuple(sorted(latents, key=order.__getitem__))
        factors = tuple(sorted(set(members), key=order.__getitem__))
        sets.append(LatentSet(inside, factors, symbol, {n: runs.shapes[n] for n in inside}))
    return tuple(sets)


def _enumeration_symbols(run: Run, latents: LatentSet, dim: int) -> dict[int, str]:
    """Enumeration dims of a set's sites by symbol.

    :raises Refusal: if `pyro.markov` uses one of them twice: the set meets the states of more steps than it keeps.
    """
    found: dict[int, str] = {}
    for name in latents.factors:
        site = run.sites[name]
        own = site.value.shape[: site.value.dim() - site.fn.event_dim]
        shape = broadcast_shapes(own, site.batch_shape)
        for d, symbol in site.symbols.items():
            here = d < dim and -d <= len(shape) and shape[d] > 1
            if here and found.setdefault(d, symbol) != symbol:
                raise Refusal(
                    latents.names[0],
                    "a continuous latent that is read at several steps of a loop over time, beside discrete latents of "
                    "these steps: its posterior is a mixture with as many components as they have paths.",
                    f"make it a point estimate by roles={{'{latents.names[0]}': 'parameter'}}, or use algorithm='svi' "
                    "with a guide for it; a loop of few steps can be written for t in range(T).",
                )
    return found


def integral(latents: LatentSet) -> str:
    """Name of the factor that takes the place of a set which is integrated out."""
    return f"∫{latents.names[0]}"


def reduced_graph(graph: FactorGraph, continuous: Continuous) -> FactorGraph:
    """The graph of the discrete latents that remain, each set in place of its factors."""
    factors, components = dict(graph.factors), []
    for latents, route in zip(continuous.sets, continuous.routes, strict=True):
        name = integral(latents)
        factors[name] = FactorInfo(name, "", route.plates, False, None, None)
    for component in graph.components:
        inside = [s for s in continuous.sets if s.symbol in component.symbols]
        gone = {name for latents in inside for name in latents.factors}
        kept = tuple(name for name in component.factors if name not in gone)
        symbols = component.symbols - {latents.symbol for latents in inside}
        names = (*(integral(latents) for latents in inside), *kept)
        components.append(dataclasses.replace(component, factors=names, symbols=symbols))
    return dataclasses.replace(graph, factors=factors, components=tuple(components))


def reduced_factors(
    continuous: Continuous, factors: Mapping[str, Tensor], parts: Sequence[Eliminated]
) -> dict[str, Tensor]:
    """Factors of `reduced_graph`: the evidence of each set, and the factors that no continuous latent reaches."""
    gone = {name for latents in continuous.sets for name in latents.factors}
    own = {name: factor for name, factor in factors.items() if name not in gone}
    integrals = {integral(s): part.log_evidence for s, part in zip(continuous.sets, parts, strict=True)}
    return {**integrals, **own}


def integrate(
    continuous: Continuous,
    graph: FactorGraph,
    reduced: FactorGraph,
    factors_of: Callable[[Run], dict[str, Tensor]],
    params: Params,
    with_prior: bool,
) -> tuple[Evidence, Run]:
    """Exact E-step: continuous latents by their routes, discrete ones by contraction, and the run at the atoms."""
    with torch.no_grad():
        parts = continuous.eliminate(params)
        values = atoms_of(parts)
        run = continuous.runs.several(params, values)
        factors = factors_of(run)
        rest = reduced_factors(continuous, factors, parts)
    evidence = check_finite(reduced, evaluate(reduced, rest), rest, run.sites, with_prior)
    weights = dict(evidence.weights)
    states = tuple(weights.pop(integral(latents)) for latents in continuous.sets)
    for latents, part, own in zip(continuous.sets, parts, states, strict=True):
        mixed = bool(set(dims_of(own)) & graph.symbol_sites.keys())
        nests = next(c.nests for c in graph.components if latents.symbol in c.symbols)
        for name in latents.factors:
            inside = part.atoms.by_factor.get(name, part.atoms.weights)
            here = at_rows(own, graph.factors[name].plates, nests, graph.plate_sizes) if nests else own
            joint = multiply(onto(here, dims_of(factors[name])), inside) if mixed else inside
            assert joint is not None
            weights[name] = joint
    size = evidence.magnitude + cancelled(continuous, reduced, parts, states)
    return dataclasses.replace(evidence, weights=weights, parts=parts, states=states, magnitude=size), run


def cancelled(
    continuous: Continuous, reduced: FactorGraph, parts: Sequence[Eliminated], states: Sequence[Tensor | None]
) -> Tensor:
    """Expected size of the terms that cancel in the evidence of the sets, rows counted as in the log-likelihood."""
    total = torch.zeros((), dtype=torch.float64)
    for latents, part, own in zip(continuous.sets, parts, states, strict=True):
        if part.magnitude is None:
            continue
        component = next(c for c in reduced.components if integral(latents) in c.factors)
        expected = multiply(part.magnitude, own)
        assert expected is not None
        total = total + weighted_sum(expected, component.weight)
    return total
