"""Mini pyro_em: exact expectation-maximisation of an untouched Pyro model, the whole idea on one page.

A model is a sum of log factors, one per sample site, of data x, discrete latents z and parameters theta:

    log p(x, z | theta) = sum_f l_f(x, z, theta)       log Z = log p(x | theta) = log sum_z exp sum_f l_f
    E-step   w_f = d log Z / d l_f       the posterior probability of every configuration of factor f
    M-step   theta <- argmax Q,  Q(theta) = sum_f <w_f, l_f(theta)>  (+ log prior of theta for "map-em")

There is no forward-backward pass to derive: sum z out, call backward, and the posterior is there. The full
engine does it for more kinds of latents, and faster; `tests/test_mini.py` holds both to the same numbers.

Not here: continuous latents, guides, subsampled plates, `poutine.scale`, neural networks, long chains (every
step runs the Python model), exact zeros in `probs` (torch clamps them; `logits` may be -inf).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.ops import packed, rings
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import transform_to

Values = dict[str, Tensor]  # a tensor per parameter
Packed = Any  # a tensor that carries a letter for each dim, in `_pyro_dims`


class Result(NamedTuple):
    """What `fit` found. `params` are constrained; both log densities are those of these very `params`."""

    params: Values  # pyro.param sites, and sample sites that play parameters
    log_likelihood: float  # log p(x | params)
    log_posterior: float | None  # plus the log prior (constrained space, no Jacobian); only for "map-em"
    num_iterations: int  # updates performed
    history: dict[str, list[float]]  # a list per figure of `e_step`: at the start, then after every update
    converged: bool  # the score fell below tol


class Program:
    """1. The model as log factors of its parameters. One plain run settles which site plays which role."""

    def __init__(self, run: Callable[[], Any], with_prior: bool) -> None:
        with pyro.get_param_store().scope():  # an empty one: the caller's is neither read nor written
            nodes: dict[str, Any] = prune_subsample_sites(poutine.trace(run).get_trace()).nodes
        sites = [site for site in nodes.values() if site["type"] == "sample"]
        data = [site for site in sites if site["is_observed"]]
        priors = [site for site in sites if not (site["is_observed"] or site["fn"].has_enumerate_support)]
        supports = {n: site["kwargs"]["constraint"] for n, site in nodes.items() if site["type"] == "param"}
        supports |= {site["name"]: site["fn"].support for site in priors}
        self.run, self.with_prior, self.priors = run, with_prior, {site["name"] for site in priors}
        self.start: Values = {name: nodes[name]["value"].detach().clone() for name in supports}
        self.maps = {name: transform_to(support) for name, support in supports.items()}  # theta = map(free)
        self.data_plates = {frame.name for site in data for frame in site["cond_indep_stack"]}
        self.size = max(site["fn"].batch_shape.numel() for site in data)  # N, the unit of the score
        self.nesting = max(len(site["fn"].batch_shape) for site in sites)  # enumerated dims lie left of these

    def unconstrained(self, values: Values) -> Values:
        return {name: self.maps[name].inv(value).detach().requires_grad_() for name, value in values.items()}

    def constrained(self, free: Values) -> Values:
        return {name: self.maps[name](u) for name, u in free.items()}

    def factors(self, values: Values) -> tuple[Any, dict[str, Packed], Tensor]:
        """Trace, log factors and log prior at `values`; every latent is spread over a dim of its own."""
        # Values are fixed outside of enumeration: inside, `pyro.markov` would lose sight of fixed sites.
        model = poutine.enum(pyro.infer.config_enumerate(self.run), first_available_dim=-1 - self.nesting)
        model = poutine.substitute(model, data={n: v for n, v in values.items() if n not in self.priors})
        model = poutine.condition(model, data={n: values[n] for n in self.priors})
        trace: Any = prune_subsample_sites(poutine.trace(model).get_trace())
        trace.compute_log_prob()
        trace.pack_tensors()  # a letter per dim, and a new letter where `pyro.markov` recycles a dim
        factors, log_prior = {}, torch.zeros((), dtype=torch.float64)
        for name, site in [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample"]:
            factor, fn = site["packed"]["unscaled_log_prob"], site["fn"]
            if name in self.priors:
                child = fn.log_prob(site["value"].detach()).requires_grad or "_markov_depth" in site["infer"]
                local = self.data_plates & {frame.name for frame in site["cond_indep_stack"]}
                refused = child or local or fn.support.is_discrete
                log_prior = log_prior + self.with_prior * factor.double().sum()
            else:
                refused = not (site["is_observed"] or "_enumerate_symbol" in site["infer"])
                factors[name] = factor if factor.requires_grad else factor.detach().requires_grad_()
                factors[name]._pyro_dims = factor._pyro_dims
            if refused or site["scale"] != 1:
                rule = "wants enumerable latents, no scale, and fixed priors outside of the data plates"
                raise ValueError(f"Site '{name}' is beyond mini, which {rule}. Try pyro_em.fit.")
        return trace, factors, log_prior


class StableLogRing(rings.LogRing):
    """2. Sums latents out, with exact gradients. Pyro's own ring clamps inside its log, which falsifies them once
    a product is below eps; torch.logsumexp has NaN ones where a slice is all -inf, as at impossible states.
    """

    def sumproduct(self, terms: list[Packed], dims: set[str]) -> Packed:
        for _ in range(len(dims := set(dims))):  # next goes the latent with the smallest table
            tables = {dim: [t for t in terms if dim in t._pyro_dims] for dim in sorted(dims)}
            dim = min(tables, key=lambda d: len(set("".join(t._pyro_dims for t in tables[d]))))
            joint = self.add(tables[dim])
            axis = joint._pyro_dims.index(dim)
            peak = joint.detach().amax(axis, keepdim=True)
            peak = torch.where(peak.isfinite(), peak, 0.0)
            mass = (joint - peak).exp().sum(axis)
            log_mass = torch.where(mass > 0, mass, 1.0).log() + peak.squeeze(axis)
            message: Packed = torch.where(mass > 0, log_mass, -torch.inf)
            message._pyro_dims = joint._pyro_dims.replace(dim, "")
            terms = [t for t in terms if dim not in t._pyro_dims] + [message]
            dims.remove(dim)
        return self.add(terms)

    def add(self, terms: list[Packed]) -> Packed:
        aligned: Packed = packed.broadcast_all(*terms)
        total: Packed = torch.stack(aligned).sum(0)
        total._pyro_dims = aligned[0]._pyro_dims
        return total


def e_step(program: Program, values: Values) -> tuple[Any, dict[str, Packed], dict[str, float]]:
    """3. One backward pass: trace, the posterior weight of every factor, and figures for the history."""
    free = program.unconstrained(values)
    trace, factors, log_prior = program.factors(program.constrained(free))
    tree, latents = OrderedDict[frozenset[str], list[Packed]](), set[str]()
    for name, factor in factors.items():
        site = trace.nodes[name]
        latents |= set() if site["is_observed"] else {site["infer"]["_enumerate_symbol"]}
        plates = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        mask = site["packed"]["mask"] if site["is_observed"] else None  # as in Pyro, which masks no latent
        tree.setdefault(plates, []).append(packed.scale_and_mask(factor, mask=mask))
    contracted = contract_tensor_tree(tree, latents, ring=StableLogRing())
    terms = torch.cat([term.double().reshape(-1) for part in contracted.values() for term in part])
    # At the factors this gradient is the posterior; further down, at theta, the score (Fisher's identity).
    inputs, objective = [*factors.values(), *free.values()], terms.sum() + log_prior
    gradients = torch.autograd.grad(objective, inputs, materialize_grads=True, retain_graph=True)
    weights: dict[str, Packed] = dict(zip(factors, gradients, strict=False))
    for name, factor in factors.items():
        weights[name]._pyro_dims = factor._pyro_dims
    slopes = [slope.abs().max().item() / program.size for slope in gradients[len(factors) :]]
    figures = {
        "objective": objective.item(),
        "log_likelihood": terms.sum().item(),
        "score": max(slopes, default=0.0),  # max |d objective / d unconstrained theta| / N
        "rounding": 16 * max(torch.finfo(t.dtype).eps for t in inputs) * terms.abs().sum().item(),
    }
    return trace, weights, figures


# 4. The M-step has a closed form where the arguments of a family are entries of theta, as in `mu[z]`. An entry
# is link(sum of w * top / sum of w * bottom); a row has top and bottom for data x and arguments a, and link.
CLOSED: dict[tuple[Any, str], tuple[Callable[[Tensor, Values], tuple[Any, Any]], Any]] = {
    (dist.Bernoulli, "probs"): (lambda x, a: (x, 1.0), torch.clone),
    (dist.Categorical, "probs"): (lambda x, a: (torch.eye(a["probs"].shape[-1])[x.long()], 1.0), torch.clone),
    (dist.Poisson, "rate"): (lambda x, a: (x, 1.0), torch.clone),
    (dist.Exponential, "rate"): (lambda x, a: (1.0, x), torch.clone),
    (dist.Normal, "loc"): (lambda x, a: (x / a["scale"] ** 2, 1 / a["scale"] ** 2), torch.clone),
    (dist.Normal, "scale"): (lambda x, a: ((x - a["loc"]) ** 2, 1.0), torch.sqrt),  # last: after new means
}


def record(cls: Any, args: Any, kwargs: Any) -> Any:
    """Let a distribution keep its arguments as written; Categorical, for one, normalises its own."""

    def keep(fn: Any, arguments: dict[str, Any]) -> Any:
        fn.arguments, expand = arguments, type(fn).expand
        fn.expand = lambda shape, new=None: keep(expand(fn, shape, new), arguments)  # called by plates
        return fn

    if all(cls is not family for family, _ in CLOSED):
        return None
    return keep(type.__call__(cls, *args, **kwargs), cls.__signature__.bind(*args, **kwargs).arguments)


def closed_form(program: Program, trace: Any, weights: dict[str, Packed], values: Values) -> Values:
    """Propose values for the parameters that the program only gathers from. The Jacobian of such an argument
    selects: it sends the tangent 1, 2, 3, ... to integers, which spell the index out, and a random tangent to
    its entries there. (Two backward passes push a tangent forward.)
    """
    fns = {name: trace.nodes[name]["fn"] for name in weights}
    bases = {name: fn.base_dist if isinstance(fn, dist.Independent) else fn for name, fn in fns.items()}
    written = [((n, a), v) for n, fn in bases.items() for a, v in getattr(fn, "arguments", {}).items()]
    current = {key: torch.as_tensor(argument).detach() for key, argument in written}
    reads = {key: argument for key, argument in written if getattr(argument, "requires_grad", False)}
    dummies = [torch.zeros_like(argument, requires_grad=True) for argument in reads.values()]
    uses: dict[str, dict[tuple[str, str], Tensor | None]] = {name: {} for name in values}
    for name in values if reads else ():
        theta, grad = trace.nodes[name]["value"], torch.autograd.grad
        tangents = [torch.arange(1, theta.numel() + 1).view_as(theta).to(theta), torch.rand_like(theta)]
        (back,) = grad([*reads.values()], theta, dummies, create_graph=True, materialize_grads=True)
        push = [grad(back, dummies, t, materialize_grads=True, retain_graph=True) for t in tangents]
        for key, code, noise in zip(reads, *push, strict=True):
            index = code.round().long().clamp(1, theta.numel()) - 1
            pairs = zip([theta, *tangents], [reads[key], code, noise], strict=True)
            if noise.any():
                uses[name][key] = index if all(torch.equal(t.reshape(-1)[index], p) for t, p in pairs) else None
    new = dict(values)
    for (family, argument), (statistic, link) in CLOSED.items():
        for name, found in uses.items():
            if any(i is None or type(bases[s]) is not family or a != argument for (s, a), i in found.items()):
                continue
            sums = torch.zeros(2, values[name].numel()).to(values[name])
            for (site, _), index in found.items():
                w = packed.unpack(weights[site], trace.symbol_to_dim)
                w = w[(...,) + (None,) * (fns[site].event_dim + (family is dist.Categorical))]
                arguments = {a: v for (s, a), v in current.items() if s == site}
                pair = map(torch.as_tensor, statistic(trace.nodes[site]["value"], arguments))
                cells, w, top, bottom = torch.broadcast_tensors(index, w, *pair)
                sums.index_add_(1, cells.reshape(-1), torch.stack([w * top, w * bottom]).reshape(2, -1))
            best = torch.where(sums[1] > 0, link(sums[0] / sums[1]), new[name].reshape(-1)).view_as(new[name])
            if program.maps[name].codomain.check(best).all():  # an entry without data keeps its value
                new[name] = best
                current |= {key: best.reshape(-1)[index] for key, index in found.items()}
    return new


def climb(program: Program, old: Values, new: Values, weights: Any, slack: float, steps: int) -> Values:
    """5. Raise Q by L-BFGS, unconstrained, from the proposal `new`, or from `old` if that is better. It returns
    at once where the closed form left no slope (one of sqrt(eps) is worth eps in Q), so that nothing rests on
    the proof above: a parameter with a prior, or with a use unseen by the proof, still has a slope.
    """

    def q(free: Values) -> Tensor:
        with pyro.validation_enabled(False):  # a line search may try what validation forbids; Q turns it down
            _, factors, total = program.factors(program.constrained(free))
        for name, w in weights.items():  # an impossible configuration has weight 0, and 0 * -inf is 0 here
            total = total + (w * torch.where(w > 0, factors[name], 0.0)).double().sum()
        return total / program.size

    def loss() -> float:
        optimiser.zero_grad()
        (value := -q(free)).backward()
        return value.item()

    free, back = program.unconstrained(new), program.unconstrained(old)
    if (gain := q(free) - q(back)).isnan():
        raise ArithmeticError(f"Q is undefined at {new}: has a component collapsed? A prior would prevent it.")
    free = free if gain >= -slack / program.size else back
    start, floor = {name: u.detach().clone() for name, u in free.items()}, q(free).item()
    eps = max(torch.finfo(u.dtype).eps for u in free.values())
    optimiser = torch.optim.LBFGS([*free.values()], 1.0, steps, None, eps**0.5, eps, 100, "strong_wolfe")
    optimiser.step(loss)
    for _ in range(30):  # a line search can go astray: come back, halfway each time
        if q(free) >= floor:
            break
        free = {name: (u.detach() + start[name]) / 2 for name, u in free.items()}
    else:
        free = start
    return {name: value.detach() for name, value in program.constrained(free).items()}


def fit(
    model: Callable[..., Any],
    *args: Any,
    algorithm: str = "em",
    init: Values | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    **kwargs: Any,
) -> Result:
    """6. Alternate E and M from `init` (or the model's start) until the score per observation is below tol.

    "em" maximises the likelihood, "map-em" the posterior, "gem" the likelihood by a few L-BFGS steps a time, as
    in `fit(model, data, algorithm="em").params["mu"]`. Param store and random state stay as they are. Raises
    ValueError for what mini cannot do, ArithmeticError for an objective that falls or is not finite.
    """
    if algorithm not in ("em", "map-em", "gem") or not (tol >= 0 and max_iter >= 0):
        raise ValueError(f"{algorithm=} must be 'em', 'map-em' or 'gem'; {tol=} and {max_iter=} at least 0.")
    random_state = pyro.util.get_rng_state()
    COERCIONS.append(record)
    try:
        pyro.set_rng_seed(0)
        program = Program(lambda: model(*args, **kwargs), algorithm == "map-em")
        values, history = program.start, dict[str, list[float]]()
        for name, value in (init or {}).items():
            same = name in values and value.shape == values[name].shape
            if not (same and program.maps[name].codomain.check(value).all()):
                raise ValueError(f"init['{name}'] is not a value of a parameter; these are {[*values]}.")
            values[name] = value.detach().clone()
        for iteration in range(max_iter + 1):  # ends on an E-step: its figures belong to the returned values
            trace, weights, figures = e_step(program, values)
            for key, figure in figures.items():
                history.setdefault(key, []).append(figure)
            previous, objective = history["objective"][-2:][0], figures["objective"]
            if not previous - figures["rounding"] <= objective < torch.inf:
                raise ArithmeticError(f"Update {iteration} took the objective from {previous} to {objective}.")
            if (converged := figures["score"] < tol) or iteration == max_iter:
                break
            exact = algorithm != "gem"
            proposal = closed_form(program, trace, weights, values) if exact else values
            values = climb(program, values, proposal, weights, figures["rounding"], 100 if exact else 5)
    finally:
        COERCIONS.remove(record)
        pyro.util.set_rng_state(random_state)
    posterior = figures["objective"] if algorithm == "map-em" else None
    return Result(values, figures["log_likelihood"], posterior, iteration, history, converged)
