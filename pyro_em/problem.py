"""A model bound to data: the reference (interpreted) path from parameters to evidence.

`Problem` holds what does not change during a fit (capture, roles, factor graph, parameter uses) and answers two
questions by running the model: the log-factors at θ, and Q(θ) for given weights. Faster paths are tested against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em import latents
from pyro_em.errors import Refusal
from pyro_em.evidence.discrete import Evidence, evaluate, weighted_sum
from pyro_em.evidence.elimination import Continuous
from pyro_em.evidence.finite import check_finite
from pyro_em.evidence.grids import on_grids
from pyro_em.evidence.integrated import Integrated
from pyro_em.evidence.roots import rerooted
from pyro_em.evidence.rule import Quadrature
from pyro_em.families import Family
from pyro_em.latent_uses import without_latents
from pyro_em.model.atoms import AtomRuns
from pyro_em.model.below_zero import check_below_zero
from pyro_em.model.bind_rows import bound_by_rows
from pyro_em.model.by_mean import bound_so, may_be_marked, to_be_marked
from pyro_em.model.capture import Capture, ParameterRecord, parameter_records
from pyro_em.model.certify import certify_factors, refuse_minibatches
from pyro_em.model.certify_loops import certify_loops
from pyro_em.model.compat import dims_of
from pyro_em.model.data import as_data
from pyro_em.model.density import packed_log_density
from pyro_em.model.first_values import draw, leaves_of
from pyro_em.model.folding import unfolded
from pyro_em.model.graph import FactorGraph, build_graph
from pyro_em.model.indexed import Indexed, run_enumerated
from pyro_em.model.packing import multiply, onto
from pyro_em.model.reached import certified_uses
from pyro_em.model.recognise import VALUE, Use, second_point
from pyro_em.model.repeatable import repeatable
from pyro_em.model.resources import check_states, check_tables
from pyro_em.model.roles import RoleOf
from pyro_em.model.row_maps import bind_indexed
from pyro_em.model.scope import shapes_in
from pyro_em.model.trace import Run, SiteRecord, quiet_store, without_gradients
from pyro_em.model.unusable import checked_run
from pyro_em.model.whole import seen_with
from pyro_em.types import Model, Params


@dataclass(frozen=True)
class Problem:
    """A model with its data, ready for inference. Made by `bind`."""

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capture: Capture
    roles: dict[str, RoleOf]
    graph: FactorGraph
    parameters: dict[str, ParameterRecord]
    uses: dict[str, tuple[Use, ...]]
    with_prior: bool
    continuous: Continuous | None = None
    rules: Mapping[str, Quadrature] = dataclasses.field(default_factory=dict)
    indexed: Indexed | None = None

    @property
    def start(self) -> Params:
        """The model's own initial values."""
        return {name: record.value for name, record in self.parameters.items()}

    def run(self, params: Mapping[str, Tensor]) -> Run:
        """The model at `params`; continuous latents stand at their current atoms."""
        if self.continuous is not None:
            return self.continuous.runs.several(dict(params), self.continuous.values)
        with quiet_store(), pyro.validation_enabled(False):
            own = self.model, self.args, self.kwargs, params
            return run_enumerated(self.indexed, *own, **self.capture.options)

    def at_atoms(self, values: Mapping[str, Tensor]) -> Problem:
        """The same problem with its continuous latents at other atoms."""
        if self.continuous is None:
            return self
        return dataclasses.replace(self, continuous=dataclasses.replace(self.continuous, values=values))

    @cached_property
    def reduced_graph(self) -> FactorGraph:
        """The factor graph with the continuous latents integrated out."""
        return self.graph if self.continuous is None else latents.reduced_graph(self.graph, self.continuous)

    @cached_property
    def recognised(self) -> bool:
        """Every argument is known as a function of the parameters, so that the model need not run again."""
        return all(use.known for uses in self.uses.values() for use in uses)

    def family(self, site: str) -> Family | None:
        """Family of a site, None where it is unknown."""
        record = self.first.sites.get(site)
        return None if record is None else record.family

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """Sites of `first`."""
        return tuple(self.first.sites.values())

    @cached_property
    def first(self) -> Run:
        """The run at the start, without gradients."""
        with torch.no_grad():
            return self.run(self.start)

    def replayed(self, params: Mapping[str, Tensor]) -> Run:
        """The run at `params` from the recognised uses (see recognise.py), differentiable in them."""
        arguments = {name: dict(site.arguments or {}) for name, site in self.first.sites.items()}
        values: dict[str, Tensor] = {}
        for name, uses in self.uses.items():
            for use in uses:
                if use.slot == VALUE:
                    values[use.site] = params[name]
                elif use.predictor is not None:
                    arguments[use.site][use.slot] = use.predictor.argument(params)
                else:
                    old = arguments[use.site][use.slot]
                    arguments[use.site][use.slot] = use.argument(params[name], old)
        sites = {
            name: dataclasses.replace(
                site,
                value=values.get(name, site.value),
                arguments=None if site.arguments is None else arguments[name],
            )
            for name, site in self.first.sites.items()
        }
        return Run(sites, dict(params), self.first.plate_symbols)

    def modules(self) -> dict[str, Tensor]:
        """The torch modules' own parameters behind the parameters of that kind, by name."""
        names = [name for name, record in self.parameters.items() if record.kind == "module"]
        if not names:
            return {}
        with torch.no_grad():
            leaves = self.run(self.start).leaves
        return {name: leaves[name] for name in names if name in leaves}

    @cached_property
    def tables_fit(self) -> bool:
        """Whether the reference's tables fit into memory; raises `ResourceError` if not."""
        return check_tables(self.capture)

    def factors(self, run: Run, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Packed log-density of every site of a run (but of those `without`), laid out as in the graph.

        :raises ResourceError: before any of these tables is made, if one is too large.
        """
        _ = self.tables_fit
        found = {name: packed_log_density(site) for name, site in run.sites.items() if name not in without}
        if run.sites.keys() != self.graph.factors.keys():
            changed = sorted(run.sites.keys() ^ self.graph.factors.keys())
            raise Refusal(
                changed[0],
                "the model's sites changed between two runs, so its structure depends on the parameters or on "
                "random numbers.",
                "write control flow with tensors (torch.where, indexing) instead of Python branches.",
            )
        return found

    def evidence(self, params: Mapping[str, Tensor]) -> tuple[Evidence, Run]:
        """Exact E-step at `params`.

        :raises NonFiniteError: if a log-density is NaN, or an observation has density zero.
        """
        if self.continuous is not None:
            graphs = self.graph, self.reduced_graph
            return latents.integrate(self.continuous, *graphs, self.factors, dict(params), self.with_prior)
        with torch.no_grad():
            run = self.run(params)
            factors = self.factors(run)
        return check_finite(self.graph, evaluate(self.graph, factors), factors, run.sites, self.with_prior), run

    def integrated_factors(self, params: Params) -> tuple[dict[str, Tensor], Run]:
        """Factors of `reduced_graph`, differentiable in `params`, and a run of the model."""
        run = self.run(params)
        factors = self.factors(run)
        if self.continuous is None:
            return factors, run
        parts = self.continuous.eliminate(dict(params), differentiable=True)
        return latents.reduced_factors(self.continuous, factors, parts), run

    def expected_log_joint(
        self, params: Mapping[str, Tensor], weights: Mapping[str, Tensor | Integrated]
    ) -> tuple[Tensor, Run]:
        """Q(θ) = E_q[log p(x,z|θ)] (+ log p(θ) if priors count), differentiable in `params`.

        :param weights: posterior weights of every factor with latents, as in `Evidence.weights`, or the posterior
            of the latents inside of a site.
        """
        with torch.enable_grad():
            run = self.replayed(params) if self.recognised else self.run(params)
            inside = {name: own for name, own in weights.items() if isinstance(own, Integrated)}
            factors = self.factors(run, without=inside)
            total = torch.zeros((), dtype=torch.float64)
            for name, factor in factors.items():
                if name in self.graph.priors and not self.with_prior:
                    continue
                posterior = weights.get(name)
                assert not isinstance(posterior, Integrated)
                weight = multiply(posterior, self.graph.factors[name].weight)
                total = total + weighted_sum(factor, onto(weight, dims_of(factor)))
            for name, own in inside.items():
                total = total + own.expected_log_density(run.sites[name])
        return total, run

    def objective(self, evidence: Evidence) -> float:
        """What the algorithm climbs: log p(x|θ), plus log p(θ) if priors count."""
        total = evidence.log_likelihood + (evidence.log_prior if self.with_prior else 0.0)
        return float(total)


def bind(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_prior: bool,
    roles: Mapping[str, str] | None = None, deltas: tuple[str, ...] = (), weights: Mapping[str, Tensor] | None = None,
    params: Mapping[str, Tensor] | None = None, rules: Mapping[str, Quadrature] | None = None,
) -> Problem:  # fmt: skip
    """Capture, assign roles, enumerate, certify and recognise: a `Problem` or a refusal.

    :param params: values at which to do so instead of the model's own; `rules` are those of quadrature, by latent.
    :raises Refusal, InputError, ResourceError: see the modules in `pyro_em.model`.
    """
    rules = rules or {}
    args, kwargs = as_data(args), as_data(kwargs)
    adaptive = {name: rule.adaptive for name, rule in rules.items()}
    model, seen, assigned = seen_with(on_grids(unfolded(model), rules), args, kwargs, roles, deltas, adaptive)
    refuse_minibatches(seen)
    latent = tuple(n for n, role in assigned.items() if role.role == "latent" and not seen.sites[n].enumerable)
    latents.check_kinds(seen, latent, rules)
    if latent:  # their atoms take one more dim left of the plates
        seen = dataclasses.replace(seen, max_plate_nesting=seen.max_plate_nesting + 1, loops=())
    check_states(seen)
    priors = frozenset(name for name, role in assigned.items() if role.role == "parameter")
    records = parameter_records(seen, [n for n in assigned if n in priors], params or {})
    generator = torch.Generator().manual_seed(0)
    leaves = {n: r.value.detach().clone().requires_grad_() for n, r in records.items()}
    others = {n: second_point(r, generator).detach().clone().requires_grad_() for n, r in records.items()}
    points, drawn = (leaves, others), draw(seen, latent, 1)
    atoms_dim, elsewhere = -seen.max_plate_nesting, {n: v.detach() for n, v in others.items()}
    unknown = [n for n in assigned if n not in priors]
    seen, indexed, maps = bind_indexed(seen, unknown, latent, (model, args, kwargs, {**elsewhere, **drawn}))

    inner = leaves_of(drawn) if indexed is None else drawn  # the first run serves their binding too

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], at: int | Mapping[str, Tensor], graph: bool = True) -> Run:
        values = {**(inner if at == 0 and graph else drawn), **(points[at] if isinstance(at, int) else at)}
        own = indexed, model, args, kwargs, values

        def once() -> Run:
            with torch.set_grad_enabled(graph), quiet_store():
                return run_enumerated(*own, integrated=latent, **seen.options)

        return checked_run(once, validated=at == 0)

    if indexed is not None:
        indexed = indexed.with_constants(run(args, kwargs, 1, False))
    check_below_zero(seen.below_zero, partial(run, args, kwargs), {**others, **drawn})
    with repeatable(partial(run, args, kwargs, 0, False)):
        by_rows = None if latent or indexed else bound_by_rows(seen, args, kwargs, run, points, records, priors)
        first = by_rows[0] if by_rows else run(args, kwargs, 0)
    start = {n: r.value for n, r in records.items()}
    continuous, seen_at, second = None, first, None
    if latent:
        second, batches = run(args, kwargs, 1), {n: seen.sites[n].shapes for n in latent}
        runs = AtomRuns(model, args, kwargs, atoms_dim, batches, seen.options, indexed=indexed)
        seen_before = rules, maps, (inner, first, second)
        continuous, seen_at, other = latents.bind_continuous(seen, latent, runs, (start, elsewhere), *seen_before)
    atoms = {} if continuous is None else {s.symbol: s.names[0] for s in continuous.sets}
    graph = build_graph(seen_at, shapes_in(seen_at, seen), priors, weights or {}, atoms, maps)
    if continuous is not None:
        graph = rerooted(graph, continuous, seen_at)
    certify_factors(seen, first, graph, model, args, kwargs, {**start, **drawn})
    certify_loops(first, graph, model, args, kwargs, start, seen.max_plate_nesting)
    uses = by_rows[1] if by_rows else certified_uses(first, partial(run, args, kwargs), points, records, priors, second)
    if continuous is not None:
        uses = without_latents(uses, continuous.runs, (start, elsewhere), *other)
    if may_be_marked(uses, first):
        there = None if continuous is None else continuous.runs.one(elsewhere, other[0])
        marks = to_be_marked(uses, run(args, kwargs, 1, False), there, atoms_dim)
        bound = partial(bind, args=args, kwargs=kwargs, with_prior=with_prior, roles=roles, deltas=deltas,
                        weights=weights, params=params, rules=rules)  # fmt: skip
        if (again := bound_so(bound, unfolded(model), marks)) is not None:
            return again
    problem = Problem(model, args, kwargs, seen, assigned, graph, records, uses, with_prior, continuous, rules, indexed)
    if (known := without_gradients(seen_at)) is not None:
        vars(problem)["first"] = known
    return problem
