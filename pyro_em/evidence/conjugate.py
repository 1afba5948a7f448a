"""Exact integration of conjugate latents: Gamma, InverseGamma, Beta and Dirichlet posteriors, read off from gradients.

Given the parameters the log joint of an element z is linear in the few statistics of its kind (conjugate_kinds.py).
The gradient at as many points determines the coefficients; at one more, random in every element, it must be what
they predict, which certifies the form and that elements are independent. With q the posterior so found,

    log Z = log joint(z₀) − log q(z₀)       at any z₀; here the middle of q, where nothing cancels.

Rows of the latent's plate, or of a sibling plate that indexes it, are added up per element (assembly.py); entries
of an event are elements of their own. The E-step is done twice, first at 1 and then at the middle of the posterior,
so that its precision does not depend on the units of z. Source: Diaconis and Ylvisaker (1979), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.device import seeded_normal
from pyro_em.errors import NonFiniteError, Refusal
from pyro_em.evidence.assembly import Geometry, Reading, Rows, to_elements
from pyro_em.evidence.columns import direction, push, readings_of
from pyro_em.evidence.conjugate_kinds import Kind
from pyro_em.evidence.conjugate_posterior import ConjugatePosterior
from pyro_em.evidence.conjugate_rows import kinds
from pyro_em.evidence.elimination import Atoms, Candidate, Eliminated, LatentSet, NotMine, RunAt
from pyro_em.evidence.gaussian_recognition import one_family, plate_symbols
from pyro_em.model.compat import pack, with_dims
from pyro_em.model.density import log_density
from pyro_em.model.trace import Run

NEGLIGIBLE = 1e-8  # of the largest term at the point of expansion: a coefficient that rounding explains
AGREEMENT = 1e-7  # relative deviation from the predicted gradient that rounding explains


@dataclass(frozen=True)
class ConjugateRoute:
    """The route of one latent site, made by `recognise_conjugate`."""

    latents: LatentSet
    kind: Kind
    geometry: Geometry
    readings: tuple[Reading, ...]
    symbols: Mapping[int, str]
    plates: frozenset[str]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "conjugate"

    @property
    def reason(self) -> str:
        return f"its log joint is that of a {self.kind.name} in every element, by gradients"

    @property
    def cost(self) -> str:
        return f"{2 * self.kind.num_probes + 1} runs"

    def eliminate(self, run_at: RunAt, *, differentiable: bool = False) -> Eliminated:
        """See the module docstring.

        :raises Refusal: if the log joint is of another form at the values at hand.
        :raises NonFiniteError: if the posterior cannot be normalised.
        """
        start = self.kind.start(self.geometry.layout, len(self.geometry.columns_a))
        rough, _ = self._coefficients(run_at, start, graph=False)
        self._check(rough, start)
        center = self.kind.center(rough).detach()
        lead = tuple(range(center.dim() - start.dim()))
        at = self.kind.common(center, lead)  # one point for all states of discrete latents
        coefficients, log_joint = self._coefficients(run_at, at, graph=differentiable)
        self._check(coefficients, at)
        self._certify(run_at, coefficients.detach(), at)
        energy = log_joint - self.kind.log_density(coefficients, at)
        posterior = ConjugatePosterior(self.latents, self.geometry, self.kind, coefficients.detach())
        size = self.kind.magnitude(coefficients.detach()).sum(-1)
        return Eliminated(
            self._packed(energy), posterior, lambda: self._atoms(posterior), lambda: self._peak(posterior),
            magnitude=self._packed(size),
        )  # fmt: skip

    def _atoms(self, posterior: ConjugatePosterior) -> Atoms:
        low, high = self.kind.atoms(posterior.coefficients)
        atoms = torch.cat([low, high], low.dim() - 1 - len(self.geometry.layout))
        weights = with_dims(torch.full((2,), 0.5, dtype=torch.float64), self.latents.symbol)
        return Atoms({self.latents.names[0]: posterior.placed(atoms).to(self.dtype)}, weights)

    def _peak(self, posterior: ConjugatePosterior) -> Tensor:
        return self._packed(self.kind.log_density(posterior.coefficients, self.kind.mode(posterior.coefficients)))

    def certify(self, run_at: RunAt) -> None:
        """Refuse if the log joint is of another form at these parameters."""
        self.eliminate(run_at)

    def _coefficients(self, run_at: RunAt, center: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        """Coefficients, layout + (k, J), and the log joint at the center, over the layout."""
        points, targets, log_joint = self.kind.probes(center), [], None
        for z in points:
            gradient, value = self._gradient(run_at, z, graph=graph)
            log_joint = value if log_joint is None else log_joint
            targets.append(self.kind.scaled(z, gradient))
        assert log_joint is not None
        return self.kind.solve(points, torch.broadcast_tensors(*targets)), log_joint

    def _gradient(self, run_at: RunAt, z: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        """∂ log joint/∂z of every element, (states) layout + (k,), and the log joint, (states) layout."""
        (name,) = self.latents.names
        shape = self.latents.shapes[name]
        k, m = len(self.geometry.columns_a), len(self.geometry.layout)
        with torch.enable_grad():
            leaf = z.reshape([*shape[0], *shape[1]]).to(self.dtype).clone().requires_grad_(True)
            run = run_at({name: leaf})
            densities = [_padded(log_density(run.sites[r.site]).double(), m) for r in self.readings]
            ones = torch.ones(shape[0].numel(), dtype=torch.float64)
            ways = [direction(c, shape, ones) for c in self.geometry.columns_a]
            pushed = push(densities, leaf, ways, graph=graph)
        total: Tensor | None = None
        value = torch.zeros((1,) * m, dtype=torch.float64)
        for i, reading in enumerate(self.readings):
            slopes = torch.stack([pushed[c][i] for c in range(k)], -1)
            own = densities[i] if graph else densities[i].detach()
            sizes = tuple(int(n) for n in own.shape[own.dim() - m :])
            at = Rows(reading, own, own, own, sizes)
            summed = to_elements(slopes, 1, at, self.geometry)
            total = summed if total is None else total + summed
            value = value + to_elements(own, 0, at, self.geometry)
        assert total is not None
        return total, value

    def _certify(self, run_at: RunAt, coefficients: Tensor, center: Tensor) -> None:
        generator = torch.Generator().manual_seed(3)
        noise = seeded_normal(center.shape, generator)
        z = self.kind.near(center, noise)
        gradient, _ = self._gradient(run_at, z, graph=False)
        terms = coefficients * self.kind.design(z)
        found, predicted = self.kind.scaled(z, gradient), terms.sum(-1)
        bound = (1e-3 if self.dtype == torch.float32 else AGREEMENT) * (1 + terms.abs().amax(-1))
        if not bool(((found - predicted).abs() <= bound).all()):
            raise _refusal(self.latents, f"the gradient of its log joint is not that of a {self.kind.name}")

    def _check(self, coefficients: Tensor, z: Tensor) -> None:
        (name,) = self.latents.names
        if not bool(coefficients.isfinite().all()):
            raise NonFiniteError(
                name, f"Site '{name}': the gradient of the log joint in this latent is not finite. Check the data."
            )
        if not self.kind.proper(coefficients.detach(), z, 1e-4 if self.dtype == torch.float32 else NEGLIGIBLE):
            raise _refusal(self.latents, f"its log joint has stopped to be that of a {self.kind.name}")

    def _packed(self, per_element: Tensor) -> Tensor:
        m = len(self.geometry.layout)
        full = per_element.expand(*per_element.shape[: per_element.dim() - m], *self.geometry.layout)
        return pack(full if self.plates else full.sum(tuple(range(-m, 0)), keepdim=True), self.symbols)


def recognise_conjugate(candidate: Candidate) -> ConjugateRoute:
    """The route of a latent on (0, ∞), (0, 1) or a simplex.

    :raises NotMine: if a latent has another support.
    :raises Refusal: if its posterior is in none of the known families.
    """
    supports = {name: _support(candidate.first, name) for name in candidate.latents.names}
    if not all(supports.values()):
        name = next(n for n, s in supports.items() if not s)
        raise NotMine(f"'{name}' lies neither in (0, ∞) nor in (0, 1) nor on a simplex")
    if len(supports) > 1:
        first, second, *_ = supports
        raise Refusal(
            second,
            f"its factors also read the latent '{first}', and two such latents have no conjugate joint posterior.",
            "make one of them a parameter by roles=, or use algorithm='svi' with a guide for them.",
        )
    (name,) = supports
    columns, reads, _ = readings_of(candidate, _densities)
    geometry, made = one_family(candidate, columns, reads)
    symbols, plates = plate_symbols(candidate, geometry, columns, made)
    dtype = candidate.leaves[0][name].dtype
    refusal: Refusal | None = None
    size = (candidate.latents.shapes[name][1] or torch.Size([1]))[-1]
    for kind in kinds(supports[name], size):
        route = ConjugateRoute(candidate.latents, kind, geometry, made, symbols, plates, dtype)
        try:
            for run_at in candidate.run_at:
                route.certify(run_at)
        except Refusal as error:
            refusal = error
            continue
        return route
    assert refusal is not None
    names = " or ".join(kind.name for kind in kinds(supports[name], size))
    raise _refusal(candidate.latents, f"the gradient of its log joint is not that of a {names}") from refusal


def _densities(run: Run, names: tuple[str, ...]) -> list[Tensor]:
    return [log_density(run.sites[name]).double().unsqueeze(-1) for name in names]


def _refusal(latents: LatentSet, reason: str) -> Refusal:
    (name,) = latents.names
    return Refusal(
        name,
        f"{reason}, so its posterior is in no family that is integrated exactly.",
        "use a conjugate prior, or algorithm='svi' with a guide for it.",
    )


def _support(run: Run, name: str) -> str:
    support = run.sites[name].fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.unit_interval:
        return "unit"
    if support is constraints.simplex:
        return "simplex"
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if not _everywhere(low, 0.0):
        return ""
    return "positive" if high is None else "unit" if _everywhere(high, 1.0) else ""


def _everywhere(bound: Any, value: float) -> bool:
    return bound is not None and bool((torch.as_tensor(bound) == value).all())


def _padded(x: Tensor, m: int) -> Tensor:
    return x.reshape((1,) * (m - x.dim()) + tuple(x.shape)) if x.dim() < m else x
