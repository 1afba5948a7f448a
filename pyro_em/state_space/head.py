"""The first steps of a chain whose start is open (start.py): flat (diffuse, density 1), or normal and wide.

The steps 0..τ are filtered *given* ψ, the directions in which the start is open (de Jong 1991):

    x_t | y_0..t, ψ ~ N(a_t + Φ_t ψ, P_t),     log p(y_0..t | ψ) = c + ηᵀψ - ½ ψᵀJψ

until J says where ψ is. With ψ = (flat φ, wide δ ~ N(m, W)) and B = diag(1, W), E = diag(0, 1)

    ψ | y_0..τ ~ N(ψ̂, V),    (E + B J) ψ̂ = E m + B η,    V = (E + B J)⁻¹ B

    log p(y_0..τ) = c + ηᵀψ̂ - ½ ψ̂ᵀJψ̂ - ½ (ψ̂ - m)ᵀW⁻¹(ψ̂ - m) - ½ log|E + B J| + (F/2) log 2π

where nothing large is subtracted, and x_τ is an ordinary start for the steps that follow. A flat direction counts as
∫ · dφ: the likelihood of Durbin and Koopman (2012, section 7.2.2) and of statsmodels is this one less (F/2) log 2π.
Backwards, (x_t, ψ) is carried along as (x_t | x_{t+1}, ψ) says.

Shapes: S sequences, D state dims, F flat and K open directions. Not handled: observations without noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.state_space.centred import centred
from pyro_em.state_space.linear_gaussian import Chain, Smoothed, outer, symmetric
from pyro_em.state_space.start import Undetermined, filled, is_open, is_wide
from pyro_em.state_space.steps import LOG_2PI, SingularInnovation, Steps, gain, predict, prepared, rts, update

CLEAR = 1e-4  # least eigenvalue of the correlations of J where nothing is gained by a further step
SINGULAR = 1e-12  # and where J is singular
CANCELS = 1e2  # what may be subtracted from a log-evidence
LONGER = 8  # steps more than directions, after which a wide start stays one


def _least(J: Tensor) -> Tensor:
    """The least eigenvalue of the correlations of J, of all sequences."""
    with torch.no_grad():
        size = J.diagonal(dim1=-2, dim2=-1)
        unseen = size <= 0
        scale = torch.where(unseen, torch.ones_like(size), size).sqrt()
        least = torch.linalg.eigvalsh(symmetric(J / outer(scale, scale))).amin()
        return torch.where(unseen.any(), torch.zeros_like(least), least)


@dataclass(frozen=True)
class _Given:
    """x_t given ψ, N(a + Φ ψ, P), before and after its data."""

    forecast: tuple[Tensor, Tensor, Tensor]
    a: Tensor
    Phi: Tensor
    P: Tensor


@dataclass
class Head:
    """The steps 0..τ of a chain whose start is open; made by `Head.of`. Covariances are (1, ...) where all share them.

    `known` are ψ̂ and V after every step, None as long as they are not determined; `densities` what every step adds to
    the log-evidence, nothing up to then.
    """

    chain: Chain
    steps: Steps
    flat: int
    m: Tensor  # (S, K), 0 for flat directions
    spread: Tensor  # B
    J: Tensor
    eta: Tensor
    c: Tensor
    path: Tensor | float = 0.0  # (S, τ + 1, D): what the states are counted from
    given: list[_Given] = field(default_factory=list)
    densities: list[Tensor] = field(default_factory=list)
    known: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @staticmethod
    def of(chain: Chain) -> Head:
        """:raises Undetermined: if the data say nothing of a flat direction.

        :raises SingularInnovation: where an observation has no density even given ψ.
        """
        wide = is_wide(chain)
        few = (0 if chain.flat is None else chain.flat.shape[-1]) + chain.mean.shape[-1] + LONGER + 2
        try:
            own = Head._of(chain.first_steps(min(few, chain.num_steps)), wide)
        except Undetermined:
            own = Head._of(chain, wide)
        if own._cancels():
            path = own.back(*own._after(-1)).mean.detach()
            own = Head._of(centred(chain.first_steps(own.last + 1), path), wide)
            own.path = path
        own.chain = chain
        return own

    def _cancels(self) -> bool:
        """Whether ηᵀψ̂ is so large that digits of the log-evidence go with it: the states are far from where ψ = 0."""
        known = self.known[-1]
        assert known is not None
        return bool((self.eta * known[0]).sum(-1).abs().max() > CANCELS)

    @staticmethod
    def _of(chain: Chain, wide: bool) -> Head:
        (S, T, _), D = chain.y.shape, chain.mean.shape[-1]
        opening, F = (0, 0) if chain.flat is None else (chain.flat.shape[1], chain.flat.shape[-1])
        a, P = chain.mean.expand(S, D), chain.covariance
        Phi, m, spread = P.new_zeros(1, D, F), P.new_zeros(S, F), torch.eye(F, dtype=P.dtype, device=P.device)[None]
        if chain.flat is not None:
            a = _at_base(a, chain.flat[:, 0])
        if wide:
            Phi = torch.cat([Phi, torch.eye(D, dtype=P.dtype, device=P.device)[None]], -1)
            spread = torch.nn.functional.pad(P, (F, 0, F, 0)) + torch.nn.functional.pad(spread, (0, D, 0, D))
            m, a, P = torch.cat([m, a], -1), torch.zeros_like(a), torch.zeros_like(P)
        K = m.shape[-1]
        own = Head(chain, prepared(chain), F, m, spread, P.new_zeros(1, K, K), P.new_zeros(S, K), P.new_zeros(S))
        for t in range(T):
            s = own._step(t)
            if t:
                (a, P), Phi = predict(s, a, P), s.A @ Phi
            if t < opening:
                assert chain.flat is not None
                a = _at_base(a, chain.flat[:, t])
                Phi = Phi + torch.nn.functional.pad(chain.flat[:, t], (0, K - F))
            a, Phi, P = own._take(s, a, Phi, P, t)
            if t + 1 >= opening and own._ends(t + 1 == T or t > K + LONGER):
                return own
        raise Undetermined

    def _step(self, t: int) -> Steps:
        s = self.steps.step(t)
        return Steps(*(x.squeeze(1) for x in vars(s).values()))

    def _take(self, s: Steps, a: Tensor, Phi: Tensor, P: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        forecast = a, Phi, P
        e = s.y - s.d - (s.C @ a.unsqueeze(-1)).squeeze(-1)
        a, P, density, keep, factor = update(s, a, P, t)
        seen = torch.linalg.solve_triangular(factor, s.C @ Phi, upper=False)
        z = torch.linalg.solve_triangular(factor, e.unsqueeze(-1), upper=False)
        self.J = self.J + seen.mT @ seen
        self.eta = self.eta + (seen.mT @ z).squeeze(-1)
        self.c = self.c + density
        self.given.append(_Given(forecast, a, keep @ Phi, P))
        self._look()
        return a, keep @ Phi, P

    def _ends(self, last: bool) -> bool:
        """Whether J says enough of ψ in all sequences, or (`last`) what it must."""
        return self.known[-1] is not None and (last or bool(_least(self.J) > CLEAR))

    def _look(self) -> None:
        """What the steps so far say of ψ."""
        F = self.flat
        if F and bool(_least(self.J[:, :F, :F]) < SINGULAR):
            self.known.append(None)
            self.densities.append(torch.zeros_like(self.c))
            return
        E = torch.diag(torch.cat([self.m.new_zeros(F), self.m.new_ones(self.m.shape[-1] - F)]))
        system = E + self.spread @ self.J
        psi = torch.linalg.solve(system, (self.m + _times(self.spread, self.eta)).unsqueeze(-1)).squeeze(-1)
        V = symmetric(torch.linalg.solve(system, self.spread.expand_as(system)))
        evidence = self.c + (self.eta * psi).sum(-1) - 0.5 * (psi * _times(self.J, psi)).sum(-1)
        evidence = evidence - 0.5 * torch.linalg.slogdet(system)[1] + 0.5 * F * LOG_2PI
        if self.m.shape[-1] > F:
            root = torch.linalg.cholesky(filled(self.spread[:, F:, F:]))
            away = torch.linalg.solve_triangular(root, (psi - self.m)[:, F:, None], upper=False)
            evidence = evidence - 0.5 * (away * away).sum((-2, -1))
        self.densities.append(evidence - sum(self.densities, torch.zeros_like(self.c)))
        self.known.append((psi, V))

    def log_evidence(self) -> Tensor:
        """log p(y_0..τ), (S,)."""
        return torch.stack(self.densities).sum(0)

    def _after(self, t: int) -> tuple[Tensor, Tensor]:
        """x_t given y_0..t: mean (S, D) and covariance; infinite if nothing is determined yet."""
        own, known = self.given[t], self.known[t]
        if known is None:
            wide = torch.diag_embed(torch.full_like(own.a[:1], torch.inf))
            return torch.zeros_like(own.a), wide
        psi, V = known
        return own.a + _times(own.Phi, psi), symmetric(own.P + own.Phi @ V @ own.Phi.mT)

    @property
    def last(self) -> int:
        """τ."""
        return len(self.given) - 1

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_τ given y_0..τ: mean (S, D) as what is to be added to a second one (S|1, D), covariance."""
        mean, covariance = self._after(-1)
        base = self.path[:, -1] if isinstance(self.path, Tensor) else torch.zeros_like(mean[:1])
        return mean, base, covariance

    def rest(self, y: Tensor | None = None) -> Chain:
        """The steps τ..T-1, of which the first has no data left; `y` are their data, if somebody has them already."""
        first, chain = self.last, self.chain
        moves = {n: x[:, first:] for n in "AbQ" if (x := getattr(chain, n)).shape[1] > 1}
        seen_by = {n: x[:, first:] for n in "CdR" if (x := getattr(chain, n)).shape[1] > 1}
        seen = torch.ones_like(chain.y[:1], dtype=torch.bool) if chain.seen is None else chain.seen
        seen = seen.expand(len(seen), chain.num_steps, -1)[:, first:].clone()
        seen[:, 0] = False
        mean, base, covariance = self.end()
        return dataclasses.replace(
            chain,
            mean=mean + base,
            covariance=covariance,
            y=chain.y[:, first:] if y is None else y,
            seen=seen,
            flat=None,
            **moves,
            **seen_by,
        )

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Errors of `self.rest()` name the steps of the whole chain."""
        try:
            yield
        except SingularInnovation as error:
            raise SingularInnovation(error.step + self.last) from error

    def joined(self, rest: Smoothed) -> Smoothed:
        """The smoothed states of all steps, from those of `self.rest()`."""
        own = self.back(rest.mean[:, 0], rest.covariance[:, 0])

        def both(name: str, begin: int = 1) -> Tensor:
            one, other = getattr(own, name), getattr(rest, name)[:, begin:]
            size = max(len(one), len(other))
            return torch.cat([one.expand(size, *one.shape[1:]), other.expand(size, *other.shape[1:])], 1)

        density = both("step_log_evidence")
        return Smoothed(
            density.sum(1), both("mean"), both("covariance"), both("lag", 0), both("filtered_mean"),
            both("filtered_covariance"), density,
        )  # fmt: skip

    def back(self, mean: Tensor, covariance: Tensor) -> Smoothed:
        """The smoothed states of the steps 0..τ, from that of the step τ given all data."""
        last, known = self.given[-1], self.known[-1]
        assert known is not None
        if isinstance(self.path, Tensor):
            mean = mean - self.path[:, -1]
        psi, spread, crossed = rts(*known, last.Phi, *self._after(-1), last.P, mean, covariance)
        means, covariances, lags = [mean], [covariance], []
        for t in reversed(range(len(self.given) - 1)):
            own, s = self.given[t], self._step(t + 1)
            a, Phi, P = self.given[t + 1].forecast
            G = gain(own.P, s.A, P)
            keep, moved = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - G @ s.A, own.Phi - G @ Phi
            mean = own.a + _times(own.Phi, psi) + _times(G, mean - a - _times(Phi, psi))
            lags.append(covariance @ G.mT + crossed @ moved.mT)
            half = G @ crossed @ moved.mT
            covariance = G @ covariance @ G.mT + half + half.mT + moved @ spread @ moved.mT
            covariance = symmetric(covariance + keep @ own.P @ keep.mT + G @ s.Q @ G.mT)
            crossed = G @ crossed + moved @ spread
            means.append(mean)
            covariances.append(covariance)
        filtered = [self._after(t) for t in range(len(self.given))]
        none = covariance.new_zeros(len(covariance), 0, *covariance.shape[1:])
        return Smoothed(
            self.log_evidence(),
            torch.stack(means[::-1], 1) + self.path,
            _stacked(covariances[::-1]),
            _stacked(lags[::-1]) if lags else none,
            torch.stack([m for m, _ in filtered], 1) + self.path,
            _stacked([P for _, P in filtered]),
            torch.stack(self.densities, 1),
        )


def with_head(chain: Chain, smooth: Callable[[Chain], Smoothed]) -> Smoothed:
    """`smooth`, where the start is open only of what follows its head."""
    if not is_open(chain):
        return smooth(chain)
    head = Head.of(chain)
    with head.counted():
        rest = with_head(head.rest(), smooth)
    return head.joined(rest)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _at_base(a: Tensor, flat: Tensor) -> Tensor:
    """Where along flat directions the states are counted from is free: 0."""
    along = torch.linalg.pinv(flat.detach()) @ a.detach().unsqueeze(-1)
    return a - (flat @ along).squeeze(-1)


def _stacked(parts: list[Tensor]) -> Tensor:
    size = max(map(len, parts))
    return torch.stack([x.expand(size, *x.shape[1:]) for x in parts], 1)
