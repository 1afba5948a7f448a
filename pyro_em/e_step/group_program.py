"""What one run of a model tells the grouped engine (grouped.py): its sites in groups, its components as chains.

Read off at some parameters; of what the groups' factors are made follows from the parameters' recognised uses alone,
so that the model is not run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

from pyro_em.e_step.chains import Bundle, Chain, find_chain
from pyro_em.e_step.groups import Group, make_groups
from pyro_em.e_step.predicted import Reader
from pyro_em.model.compat import dims_of
from pyro_em.model.graph import FactorGraph
from pyro_em.model.trace import SiteRecord
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.sufficient import Arguments, raw_arguments
from pyro_em.types import Params


@dataclass(frozen=True)
class GroupProgram:
    """What one run of the model told: its sites in groups, and where each group's posterior comes from.

    `bundles` of chains; `rest`, the graph of the other components, with their groups in `general`;
    `constant`, the groups that no latent reaches; `priors`, the sites of parameters, which stay single.
    `uses` are all uses of a parameter, `counted` those that enter Q; `readers` make the arguments behind predictors.
    """

    groups: Mapping[str, Group]
    bundles: tuple[Bundle, ...]
    rest: FactorGraph
    general: tuple[Group, ...]
    constant: tuple[Group, ...]
    priors: Mapping[str, SiteRecord]
    sites: Mapping[str, SiteRecord]
    uses: Mapping[str, tuple[Use, ...]]
    counted: Mapping[str, tuple[Use, ...]]
    arguments: Arguments
    readers: Mapping[tuple[str, str], Reader]

    def arguments_at(self, params: Params) -> Arguments:
        """Raw arguments of every group at `params`."""
        arguments = {name: dict(own) for name, own in self.arguments.items()}
        for name, theta in params.items():
            for use in self.uses[name]:
                if use.slot != VALUE and use.index is not None:
                    old = arguments[use.site][use.slot]
                    arguments[use.site][use.slot] = use.argument(theta.detach().double(), old)
        for (site, slot), reader in self.readers.items():
            arguments[site][slot] = reader.argument(reader.eta(params))
        return arguments


def group_program(problem: Problem, params: Params) -> GroupProgram:
    """The program of a problem with discrete latents, from a run at `params`.

    :raises NotCompiled: if some site cannot be laid out (groups.py).
    """
    graph = problem.graph
    with torch.no_grad():
        run = problem.run(params)
        factors = problem.factors(run)
    sizes = dict.fromkeys((*graph.plate_names, *graph.symbol_sites), 1)
    sizes.update((d, n) for x in factors.values() for d, n in zip(dims_of(x), x.shape, strict=True))
    program = {name: i for i, name in enumerate(run.sites)}
    order = {d: program[name] for d, name in graph.symbol_sites.items()}
    chains = [find_chain(graph, component, sizes, order) for component in graph.components]
    owner = {name: i for i, component in enumerate(graph.components) for name in component.factors}
    priors = {name: run.sites[name] for name in graph.priors}
    by_site: dict[str, list[Use]] = {name: [] for name in run.sites}
    for uses in problem.uses.values():
        for use in uses:
            by_site[use.site].append(use)

    def place(name: str) -> Hashable:
        if name not in owner:
            return "constant"
        chain = chains[owner[name]]
        return "general" if chain is None else chain.kind

    sites = {name: site for name, site in run.sites.items() if name not in priors}
    roots = {name: graph.components[i].root for name, i in owner.items()}
    orders = {name: _layout_order(graph, name, roots.get(name, frozenset()), order) for name in sites}
    groups = make_groups(sites, factors, graph.factors, by_site, orders, {name: place(name) for name in sites})
    known = [use for group in groups for use in group.uses]
    known += [use for name in priors for use in by_site[name]]
    places = {group.name: place(group.name) for group in groups}
    uses_of = {name: tuple(u for u in known if u.parameter == name) for name in problem.uses}
    records = {**{group.name: group.record for group in groups}, **priors}
    readers: dict[tuple[str, str], Reader] = {}
    for use in (use for group in groups for use in group.uses if use.predictor is not None):
        record = records[use.site]
        assert record.family is not None and record.arguments is not None and use.predictor is not None
        vector = record.family.arguments[use.slot] == 1
        shape = record.arguments[use.slot].shape
        readers[use.site, use.slot] = Reader(use.predictor, problem.start, shape, vector)
    rest = tuple(c for c, chain in zip(graph.components, chains, strict=True) if chain is None)
    return GroupProgram(
        groups={group.name: group for group in groups},
        bundles=_bundles([g for g in groups if places[g.name] not in ("constant", "general")], chains, owner),
        rest=dataclasses.replace(graph, components=rest, constants=(), priors=()),
        general=tuple(g for g in groups if places[g.name] == "general"),
        constant=tuple(g for g in groups if places[g.name] == "constant"),
        priors=priors,
        sites=records,
        uses=uses_of,
        counted={
            name: tuple(use for use in uses if problem.with_prior or use.site not in priors)
            for name, uses in uses_of.items()
        },
        arguments=raw_arguments(records),
        readers=readers,
    )


def _layout_order(graph: FactorGraph, name: str, root: frozenset[str], order: Mapping[str, int]) -> tuple[str, int]:
    """Packed dims of a site: root plates, other plates, enumeration dims; and how many are of the last kind."""
    dims = graph.factors[name].dims
    plates = [d for d in graph.plate_names if d in dims]
    latents = sorted((d for d in dims if d in graph.symbol_sites), key=order.__getitem__)
    plates.sort(key=lambda d: d not in root)
    return "".join([*plates, *latents]), len(latents)


def _bundles(groups: list[Group], chains: list[Chain | None], owner: Mapping[str, int]) -> tuple[Bundle, ...]:
    found: dict[Hashable, Bundle] = {}
    for chain in chains:
        if chain is not None and chain.kind not in found:
            members = [i for i, other in enumerate(chains) if other is not None and other.kind == chain.kind]
            found[chain.kind] = Bundle(chain.kind, members)
    for group in groups:
        components = [owner[name] for name in group.sites]
        steps, kind = [], None
        for component, dims in zip(components, group.dims, strict=True):
            chain = chains[component]
            assert chain is not None
            kind = chain.kind
            steps.append(chain.step_of(dims[len(dims) - group.num_enumerated :]))
        found[kind].add(group, steps, components)
    return tuple(found.values())
