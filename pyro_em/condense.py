"""Many normal rows as few: a model whose rows enter through their mean and covariance only is bound to pseudo-rows.

If all sites of a plate are normal, with locations affine in Gaussian latents of the same plate and nothing else that
differs from row to row, then log p(x|θ) is a function of the rows' number, mean and covariance. So are the EM map and
its score. Q + 1 rows of equal weight N / (Q + 1) at the corners of a simplex,

    x_s = mean + F u_s / √N,     F Fᵀ = Σ_n (x_n - mean)(x_n - mean)ᵀ,     Σ_s u_s u_sᵀ = (Q + 1) I,

have the same three: binding, updates and checks then cost the same for any N.

That rows are alike is seen from one run of the untouched model in which each latent of the plate has one value for all
rows: an argument that still differs from row to row is a covariate, and the model is bound to its rows, as it is if
anything else is not as said. What a user asks afterwards (posteriors, predictions, standard errors) is asked of
all rows.

Letters: N rows, Q cells of a row in all observed sites together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_em.device import checked_indices, tensors_in
from pyro_em.evidence.pseudo_rows import pseudo_rows
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import NormalFamily
from pyro_em.model.trace import Run, SiteRecord, quiet_store, run_model
from pyro_em.problem import Problem
from pyro_em.types import Model

MIN_CELLS = 2**16  # of all rows: fewer are not worth the run that this takes
MIN_ROWS, MIN_SAVED = 1024, 8  # rows, and rows for each pseudo-row


class _NotAlike(Exception):
    """The model is not of this kind, or not large; the run ends here, before it has cost anything."""


class _Thin(Messenger):
    """One value for all elements of the plate that a continuous latent is in; parameters' first values are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.parameters: dict[str, Tensor] = {}
        self.latent = False

    def _pyro_sample(self, msg: Any) -> None:
        fn, frames = msg["fn"], msg["cond_indep_stack"]
        if poutine.util.site_is_subsample(msg):
            if msg["value"] is not None or fn.size < MIN_ROWS:
                raise _NotAlike
            return
        if len(frames) > 1 or (msg["is_observed"] and not (frames and self.latent)):
            raise _NotAlike
        if msg["done"] or msg["is_observed"] or not frames:
            return
        if getattr(fn, "has_enumerate_support", False) or not _is_real(fn.support):
            raise _NotAlike
        self.latent = True
        msg["value"] = torch.randn(fn.event_shape, generator=self.generator, dtype=torch.float64)
        msg["done"] = True

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters.setdefault(msg["name"], msg["value"].detach().clone())


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


class _Few(Messenger):
    """The model on pseudo-rows: one plate cut, its data replaced; first values of parameters as they were seen."""

    def __init__(self, plate: str, data: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plate, self.data, self.parameters = plate, data, parameters
        self.count = len(next(iter(data.values())))

    def _pyro_sample(self, msg: Any) -> None:
        if poutine.util.site_is_subsample(msg):
            if msg["name"] == self.plate and msg["value"] is None:
                msg["value"] = torch.arange(self.count)
            return
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = 1.0  # a plate cut short scales its sites; the weights of the fit say it instead
            if msg["is_observed"]:
                msg["value"] = self.data[msg["name"]]

    def _pyro_param(self, msg: Any) -> None:
        if len(msg["args"]) > 1 and callable(msg["args"][1]) and msg["name"] in self.parameters:
            msg["args"] = (msg["args"][0], self.parameters[msg["name"]].clone, *msg["args"][2:])  # if it is asked for


@dataclass(frozen=True)
class Condensed:
    """`model` runs on pseudo-rows, which count as `weights` say."""

    model: Model
    weights: dict[str, Tensor]
    plate: str
    rows: int
    count: int

    def restored(self, problem: Problem) -> Problem | None:
        """A problem bound to the pseudo-rows, as plans describe it; None if they do not say all about the rows."""
        graph = problem.graph
        symbol = next((s for s, name in graph.plate_names.items() if name == self.plate), None)
        factors = [f for name, f in graph.factors.items() if name not in graph.priors]
        if graph.symbol_sites or symbol is None or any(f.plates != {symbol} for f in factors):
            return None
        if any(symbol not in component.root for component in graph.components):
            return None
        sites = {
            name: dataclasses.replace(site, plates=tuple(dataclasses.replace(p, size=self.rows) for p in site.plates))
            for name, site in problem.capture.sites.items()
        }
        found = dataclasses.replace(problem, capture=dataclasses.replace(problem.capture, sites=sites))
        vars(found)["first"] = problem.first
        return found

    @property
    def note(self) -> str:
        """What the plan says of it."""
        return (
            f"rows enter through their number, mean and covariance only: {self.count} pseudo-rows of equal weight "
            f"stand for the {self.rows:,} elements of plate '{self.plate}'."
        )


@dataclass(frozen=True)
class _Rows:
    """Observed sites of the plate, and where their cells stand among all Q."""

    plate: str
    count: int
    sites: tuple[SiteRecord, ...] = field(default=())

    @property
    def cells(self) -> list[int]:
        return [torch.Size(site.fn.event_shape).numel() for site in self.sites]


def condense(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> Condensed | None:
    """The model on pseudo-rows; None if its rows are few or not alike (which `bind` then looks at).

    :param weights: of the rows, by plate: their moments are weighted, and pseudo-rows share the total.
    """
    given = [x.numel() for x in tensors_in((args, kwargs))]
    if given and sum(given) < MIN_CELLS:
        return None
    thin = _Thin()
    try:
        with torch.no_grad(), quiet_store(), pyro.validation_enabled(False), checked_indices():
            run = run_model(model, args, kwargs, {}, max_plate_nesting=1, enumerated=False, first=thin)
    except Exception:  # a model that indexes its latents, or is wrong: not for here to say
        return None
    rows = _alike(run)
    if rows is None:
        return None
    joint = [_values(site, rows.count) for site in rows.sites]
    counted = _counted(weights, rows)
    pseudo = None if counted is None and weights else pseudo_rows(joint, counted)
    if pseudo is None:
        return None
    total = float(rows.count) if counted is None else float(counted.sum())
    parts = pseudo.split(rows.cells, -1)
    data = {s.name: p.reshape(-1, *s.fn.event_shape) for s, p in zip(rows.sites, parts, strict=True)}
    shared = {rows.plate: torch.full((len(pseudo),), total / len(pseudo), dtype=torch.float64)}
    few = _Few(rows.plate, data, thin.parameters)
    return Condensed(_handled(few, model), shared, rows.plate, rows.count, len(pseudo))


def _counted(weights: Mapping[str, Tensor] | None, rows: _Rows) -> Tensor | None:
    """How often each row counts; None if nothing is said of it, or nothing that can be used."""
    own = (weights or {}).get(rows.plate)
    if own is None or len(weights or {}) > 1 or own.shape != (rows.count,):
        return None
    own = own.detach().double()
    return own if bool((own.isfinite() & (own >= 0)).all()) and bool(own.any()) else None


def _handled(handler: Messenger, model: Model) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return model(*args, **kwargs)

    return run


def _alike(run: Run) -> _Rows | None:
    """The one plate of all sites, if nothing differs from row to row in it."""
    plates = {plate.name: plate.size for site in run.sites.values() for plate in site.plates}
    inside = [site for site in run.sites.values() if site.plates]
    observed = [site for site in inside if site.observed]
    if len(plates) != 1 or run.loops or not observed or len(observed) == len(inside):
        return None
    ((name, size),) = plates.items()
    if any(not site.plates and site.observed for site in run.sites.values()):
        return None
    if not all(_plain(site, size) for site in inside):
        return None
    found = _Rows(name, size, tuple(observed))
    width = sum(found.cells)
    return found if size * width >= MIN_CELLS and size >= MIN_SAVED * (width + 1) else None


def _plain(site: SiteRecord, size: int) -> bool:
    """A normal site without masks, whose arguments are the same in all rows."""
    if not isinstance(site.family, NormalFamily | MultivariateNormalFamily) or site.arguments is None:
        return False
    if site.family.latent_response:  # vectors with missing cells: moments of their rows are no statistics
        return False
    if site.mask is not None or site.element_mask is not None or float(torch.as_tensor(site.scale).sum()) != 1.0:
        return False
    if site.plates[0].dim != -1 or site.plates[0].size != size or site.value.dtype != torch.float64:
        return False
    for argument, value in site.arguments.items():
        position = value.dim() - site.family.arguments[argument] - site.element_dims - 1
        if position >= 0 and value.shape[position] > 1:
            return False
    return True


def _values(site: SiteRecord, count: int) -> Tensor:
    """(N, cells)."""
    return site.value.detach().expand(count, *site.fn.event_shape).reshape(count, -1)
