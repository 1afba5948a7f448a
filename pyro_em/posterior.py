"""The exact posterior of the latents at given parameters.

All readings of discrete latents come from one contraction (evidence/): marginals from the gradient of log Z, the
joint mode from the gradient of the max-plus evidence, draws from a sampled back-trace. Continuous latents have the
posterior of their route, given the states of the discrete ones (mixed.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.all_atoms import has_few_atoms, with_all_atoms
from pyro_em.chain_posterior import ChainPosterior, chain_posteriors
from pyro_em.device import on_own_device
from pyro_em.errors import InputError
from pyro_em.evidence.discrete import Evidence
from pyro_em.evidence.elimination import SetPosterior, atoms_of
from pyro_em.evidence.integrated import integrates
from pyro_em.evidence.mixed import Mixed
from pyro_em.evidence.ring import Elimination
from pyro_em.latents import integral
from pyro_em.mixed_states import MixedStates
from pyro_em.model.compat import base_distribution, dims_of, pack, unpack, with_dims
from pyro_em.model.packing import align
from pyro_em.model.sequences import BySequence, Sequence, sequences
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.picks import joint_states, over_plates, pick, plates_of
from pyro_em.problem import Problem
from pyro_em.sequence_posterior import SequencePosterior
from pyro_em.state_posterior import StatePosterior
from pyro_em.statistics import with_integrated
from pyro_em.terms import pointwise
from pyro_em.types import Params
from pyro_em.unrolled_posterior import UnrolledSequence, unrolled_sequence

CHUNK_CELLS = 2**23  # cells of factor tables held at once while drawing


@on_own_device("params")
class Posterior:
    """p(z | x, θ), exact; made by `FitResult.posterior(*args)`.

    A latent in plates (N, ...) with K states has responsibilities (N, ..., K). The steps of a `pyro_em.markov` loop are
    one latent, named without the step, with time as its first plate: `z` for f"z_{t}", responsibilities (T, N, ..., K);
    `z_17` is one step of it.

        >>> posterior = pyro_em.fit(model, x).posterior(x)
        >>> posterior.marginal("z").probs.shape, posterior.sample(100)["z"].shape  # (N, K), joint draws
        (torch.Size([6, 2]), torch.Size([100, 6]))
        >>> posterior.mode()["z"].tolist()  # (N,), the joint mode: of a chain the Viterbi path
        [0, 0, 0, 1, 1, 1]
    """

    def __init__(self, problem: Problem, params: Params) -> None:
        self.problem, self.params = problem, params

    def __reduce__(self) -> tuple[type, tuple[Problem, Params]]:
        return Posterior, (self.problem, self.params)  # the rest is found again when it is asked for

    @cached_property
    def _e_step(self) -> tuple[Evidence, Run]:
        return self.problem.evidence(self.params)

    @cached_property
    def _sequences(self) -> dict[str, Sequence]:
        return sequences(self.problem.graph)

    @cached_property
    def chains(self) -> tuple[ChainPosterior, ...]:
        return chain_posteriors(self.problem.model, self.states)

    def _chain(self, latent: str) -> ChainPosterior | None:
        return next((chain for chain in self.chains if chain.has(latent)), None)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latents, in program order; those of a loop over time as one."""
        inside = {site: s.name for s in self._sequences.values() for site in (*s.heads, s.rest)}
        chained = (name for chain in self.chains for name in chain.latents)
        return (*dict.fromkeys(inside.get(site, site) for site in self._order), *chained)

    @property
    def _order(self) -> list[str]:
        """Sites of the latents in program order."""
        graph, continuous = self.problem.graph, self.problem.continuous
        if continuous is None:
            return list(graph.latents)
        return [name for name in self.problem.capture.sites if name in graph.latents or name in continuous.names]

    def is_continuous(self, latent: str) -> bool:
        """Whether a latent takes real values, which have a mean and a variance and no states."""
        return (self._mixed(latent) or self._chain(latent)) is not None

    def _mixed(self, site: str) -> Mixed | None:
        """The posterior of a continuous latent, None for a discrete one."""
        continuous = self.problem.continuous
        number = None if continuous is None else continuous.set_of(site)
        if continuous is None or number is None:
            return None
        evidence, run = self._e_step
        return Mixed(self.problem.graph, continuous, number, evidence, run)

    @property
    def log_evidence(self) -> float:
        """log p(x|θ), with weights and scales."""
        return float(self._e_step[0].log_likelihood)

    def site(self, latent: str) -> str:
        """Name of a latent's own site; of a loop over time, or of one of its steps, that of the later steps."""
        if latent in self.problem.graph.latents:
            return latent
        for sequence in self._sequences.values():
            if latent == sequence.name or sequence.step(latent) is not None:
                return sequence.rest
        if self.is_continuous(latent):
            raise InputError(f"Latent '{latent}' is continuous and has no states; ask for its mean or marginal.")
        some = self.latents[:10]
        known = ", ".join((*some, f"and {len(self.latents) - 10} more") if self.latents[10:] else some) or "none"
        raise InputError(f"The model has no latent '{latent}'. Its latents: {known}.")

    def _site(self, latent: str) -> SiteRecord:
        return self._e_step[1].sites[self.site(latent)]

    def responsibilities(self, site: str) -> Tensor:
        """Posterior probability of each state, shape plates + (K,)."""
        if site in self._sequences:
            sequence = self._sequences[site]
            return sequence.joined({s: self.responsibilities(s) for s in (*sequence.heads, sequence.rest)})
        for sequence in () if site in self.problem.graph.latents else self._sequences.values():
            step = sequence.step(site)
            if step is not None:
                return self.responsibilities(sequence.rest)[step - len(sequence.heads)]
        record = self._site(site)
        weights = self._e_step[0].weights.get(site)
        if weights is None:  # a latent of one state connects no factors
            return torch.ones((*plates_of(record), 1), dtype=torch.float64)
        symbol, dims = record.symbol, dims_of(weights)
        assert symbol is not None
        kept = [d for d in dims if d in record.plate_dims or d == symbol]
        gone = [i for i, d in enumerate(dims) if d not in kept]
        own = with_dims(weights.sum(gone) if gone else weights, "".join(kept))
        return over_plates(own, record, symbol)

    def sequence(self, latent: str) -> SequencePosterior | UnrolledSequence:
        """States of a loop over time, by their name without the step: filtered, smoothed, forecast (see
        sequence_posterior.py, and unrolled_posterior.py for `pyro.markov`)."""
        factors = self.problem.factors(self._e_step[1])
        if latent in self._sequences:
            return SequencePosterior(self.problem.graph, factors, self._sequences[latent])
        if (chain := self._chain(latent)) is not None:
            raise InputError(
                f"'{latent}' is no sequence of discrete states: its states are normal; "
                f"posterior.states('{chain.fold.site}') has them filtered, forecast, one by one."
            )
        return unrolled_sequence(self.problem, self.params, factors, latent, self.responsibilities)

    def marginal(self, site: str) -> dist.Distribution:
        """Marginal posterior of one latent, with the plates as batch shape.

        Bernoulli, Categorical and OneHotCategorical latents keep their family; any other finite latent gives a
        Categorical over its states. A continuous latent keeps the family of its route (Normal, Gamma, ...), or a
        mixture of these over the states of the discrete latents it depends on.
        """
        if (mixed := self._mixed(site) or self._chain(site)) is not None:
            return mixed.marginal(site)
        probs = self.responsibilities(site)
        family = type(base_distribution(self._site(site).fn))
        if family is dist.Bernoulli:
            return dist.Bernoulli(probs[..., 1].clamp(0, 1), validate_args=False)
        if family is dist.OneHotCategorical:
            return dist.OneHotCategorical(probs, validate_args=False)
        return dist.Categorical(probs, validate_args=False)

    def _support(self, site: str) -> Tensor:
        """Values of the states, shape (K,) + event."""
        return self._values(site).to(torch.get_default_dtype())

    def _values(self, site: str) -> Tensor:
        fn = self._site(site).fn
        return fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)

    def mean(self, site: str) -> Tensor:
        """Posterior mean of the latent's value, shape plates + event."""
        if (mixed := self._mixed(site) or self._chain(site)) is not None:
            return mixed.mean(site)
        return torch.tensordot(self.responsibilities(site), self._support(site), dims=1)

    def variance(self, site: str) -> Tensor:
        """Posterior variance of the latent's value, shape plates + event."""
        if (mixed := self._mixed(site) or self._chain(site)) is not None:
            return mixed.variance(site)
        support, probs = self._support(site), self.responsibilities(site)
        second = torch.tensordot(probs, support**2, dims=1)
        return (second - torch.tensordot(probs, support, dims=1) ** 2).clamp(min=0)

    def mode(self) -> dict[str, Tensor]:
        """Most probable joint configuration of all latents (values, by site)."""
        picked = self._pick("max", None)
        found = BySequence(self._in_order(picked, lambda q: q.mode(), draws=False), self._sequences)
        return found.joined_with([chain.mode(self._picks(picked)) for chain in self.chains])

    def sample(self, num: int) -> dict[str, Tensor]:
        """`num` independent joint draws of all latents, shape (num,) + plates + event, by site."""
        if num < 1:
            raise InputError(f"sample: num must be at least 1, not {num}.")
        factors = self._factors("sample")
        cells = sum(factors[n].numel() for c in self.problem.reduced_graph.components for n in c.factors)
        chunk = max(1, CHUNK_CELLS // max(1, cells))
        sizes = [min(chunk, num - done) for done in range(0, num, chunk)]
        parts = [self._pick("sample", size) for size in sizes]
        picked = {s: torch.cat([part[s] for part in parts]) for s in self.problem.graph.latents}
        drawn = self._in_order(picked, lambda q: q.sample(num), draws=True)
        chained = [chain.sample(num, self._picks(picked)) for chain in self.chains]
        return BySequence(drawn, self._sequences, lead=1).joined_with(chained)

    def states(self, site: str) -> StatePosterior | MixedStates:
        """Posterior of the states inside of an observed state-space site (`GaussianHMM`, `LinearHMM`, a folded loop).

        Where discrete latents choose its arguments, that of the mixture over their states.
        :raises InputError: if the site is none.
        """
        evidence, run = self._e_step
        if site not in run.sites:
            raise InputError(f"The model has no sample site '{site}'. Its sites: {', '.join(run.sites)}.")
        record, weights = run.sites[site], evidence.weights.get(site)
        if weights is None or not integrates(record):
            return StatePosterior(record)
        return MixedStates(
            record, unpack(weights, record.symbols), lambda num: self._picks(self._pick("sample", num))(site)
        )

    def _picks(self, picked: dict[str, Tensor]) -> Callable[[str], Tensor]:
        """Joint states of the latents that choose a site's arguments, by site."""
        run, graph = self._e_step[1], self.problem.graph
        return lambda site: joint_states(run.sites[site], run, graph, picked)

    def entropy(self) -> float:
        """Entropy of the posterior in nats, weighted like the log-likelihood; latents without data left out.

        (Differential entropy, which may be negative, where latents are continuous.)
        """
        problem = with_all_atoms(dataclasses.replace(self.problem, with_prior=False))
        evidence, run = problem.evidence(self.params) if has_few_atoms(self.problem) else self._e_step
        problem = problem.at_atoms(atoms_of(evidence.parts))
        q, _ = problem.expected_log_joint(self.params, with_integrated(run, problem.graph, evidence.weights))
        entropy = float(evidence.log_likelihood) - float(q.detach())
        return entropy if evidence.parts else max(0.0, entropy)

    def pointwise(self) -> Tensor:
        """log p(x_n|θ) for every element of the data plates, unweighted; shape of the data plates."""
        return pointwise(self.problem, *self._e_step)

    def _in_order(
        self, picked: dict[str, Tensor], read: Callable[[SetPosterior], dict[str, Tensor]], *, draws: bool
    ) -> dict[str, Tensor]:
        """Values of all latents in program order, the continuous ones given the picked states of the others."""
        found = {site: self._values(site)[index] for site, index in picked.items()}
        for part in self._e_step[0].parts:
            for site, value in read(part.posterior).items():
                mixed = self._mixed(site)
                assert mixed is not None
                found[site] = mixed.given(site, value, picked, draws=draws)
        return {site: found[site] for site in self._order}

    def _factors(self, elimination: Elimination) -> dict[str, Tensor]:
        """Log-factors of the discrete latents; continuous ones are integrated out, or at their best for "max"."""
        evidence, run = self._e_step
        factors, continuous = self.problem.factors(run), self.problem.continuous
        for chain in self.chains if elimination == "max" else ():
            if isinstance(chain.states, MixedStates):
                record = run.sites[chain.fold.site]
                factors[chain.fold.site] = pack(chain.states.given.log_peak(), record.symbols)
        if continuous is None:
            return factors
        for latents, part in zip(continuous.sets, evidence.parts, strict=True):
            factor = part.log_evidence
            if elimination == "max":
                peak = part.log_peak
                dims = "".join(dict.fromkeys(dims_of(factor) + dims_of(peak)))
                factor = with_dims(align(factor, dims) + align(peak, dims), dims)
            factors[integral(latents)] = factor
        return factors

    def _pick(self, elimination: Elimination, num: int | None) -> dict[str, Tensor]:
        """State numbers of one joint configuration (of `num` draws), shape (num,) + plates, by site."""
        graph = self.problem.reduced_graph
        if not graph.latents:
            return {}
        return pick(graph, self._factors(elimination), self._e_step[1], elimination, num)
