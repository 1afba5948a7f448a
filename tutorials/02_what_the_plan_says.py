# %% [markdown]
"""
# What the plan says

`pyro_em.fit` takes any Pyro model, runs it a few times, and works out what kind of thing each site is, whether the
posterior is exact, and which parameters have a formula. `pyro_em.plan` prints what it found. This tutorial reads
plans: of a latent class model and of blood groups; and then of models that are refused.
"""

# %%
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository


def table(name, column=None):
    return torch.from_numpy(np.loadtxt(DATA / name, delimiter=",", skiprows=1, usecols=column))


# %% [markdown]
# ## Roles
#
# Each site has one of three roles, and the plan prints the rule that gave it:
#
# - **data**: it is observed;
# - **parameter**: a `pyro.param`, a parameter of a module, or a continuous `pyro.sample` with fixed hyperparameters
#   outside of the data's plates (a prior);
# - **latent**: everything discrete, and a continuous `pyro.sample` in a plate with data, inside of `pyro.markov`, or
#   with a prior that depends on a parameter or a latent.
#
# Where the rules mislead, `roles={"site": "parameter"}` or `roles={"site": "latent"}` has the last word.
#
# ## Latent classes: closed forms
#
# Patients are of an unseen class; given the class, symptoms are independent.

# %%
symptoms = table("alzheimer.csv")
num_patients, num_symptoms = symptoms.shape
print(f"{num_patients} patients, {num_symptoms} symptoms")


def classes(x, num_classes=2):
    rows, items = x.shape
    low_to_high = torch.linspace(0.3, 0.7, num_classes)  # unequal, or the classes could never part
    weights = pyro.param("weights", torch.ones(num_classes) / num_classes, constraint=constraints.simplex)
    probs = pyro.param("probs", low_to_high[:, None].repeat(1, items), constraint=constraints.unit_interval)
    item = torch.arange(items)
    with pyro.plate("patients", rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("symptoms", items, dim=-1):
            pyro.sample("x", dist.Bernoulli(Vindex(probs)[z, item]), obs=x)


print(pyro_em.plan(classes, symptoms))

# %% [markdown]
# The reason beside `closed` names the formula. How is it known? The package asks which entries of `probs` each cell
# of `x` uses, by differentiating the model with respect to `probs`. Here a cell picks exactly one entry, and the
# distribution is one whose maximum likelihood estimate is an average: so the M-step is a weighted average. Neither
# names nor spelling are looked at, only what the program does. Wrap the same probability in a function of your own and
# the formula is gone, but not the model:


# %%
def through_a_link(x, num_classes=2):
    rows, items = x.shape
    weights = pyro.param("weights", torch.ones(num_classes) / num_classes, constraint=constraints.simplex)
    effort = pyro.param("effort", torch.linspace(-0.5, 0.5, num_classes)[:, None].repeat(1, items))
    probs = torch.sigmoid(effort.sinh())
    item = torch.arange(items)
    with pyro.plate("patients", rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("symptoms", items, dim=-1):
            pyro.sample("x", dist.Bernoulli(Vindex(probs)[z, item]), obs=x)


plan = pyro_em.plan(through_a_link, symptoms)
for row in plan.m_step:
    print(f"{row.name:8} {row.route:8} {row.reason}")

plain = pyro_em.fit(classes, symptoms)
linked = pyro_em.fit(through_a_link, symptoms, accelerate="anderson")
print(f"log-likelihood {plain.log_likelihood:.6f} with formulas, {linked.log_likelihood:.6f} without")

# %% [markdown]
# ## Priors: a note for each
#
# Write the parameters as `pyro.sample` sites with fixed hyperparameters, outside of the data's plates, and they are
# still parameters, now with priors. The last lines of the plan say whether these count.


# %%
def classes_with_priors(x, num_classes=2):
    rows, items = x.shape
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((num_classes,), 2.0)))
    with pyro.plate("classes", num_classes):
        probs = pyro.sample("probs", dist.Beta(2.0, 2.0).expand([items]).to_event(1))
    item = torch.arange(items)
    with pyro.plate("patients", rows, dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("symptoms", items, dim=-1):
            pyro.sample("x", dist.Bernoulli(Vindex(probs)[z, item]), obs=x)


start = {"weights": plain.params["weights"], "probs": plain.params["probs"]}
fits = {name: pyro_em.fit(classes_with_priors, symptoms, algorithm=name, init=start) for name in ("em", "map-em")}
for name, fit in fits.items():
    print(f"{name}: log-likelihood {fit.log_likelihood:.6f}; smallest probability {fit.params['probs'].min():.4f}")
    print("   ", fit.plan.notes[-1])

# %% [markdown]
# Under `em` the priors are ignored and the answer is the one that we had. Under `map-em` a Beta prior adds to the
# counts, so the formula stays a formula and no probability can end at zero.
#
# A parameter need not be estimated at all: `m_step={"name": "fixed"}` holds it at its start. It is then known and has
# no standard error.

# %%
held = pyro_em.fit(classes, symptoms, m_step={"weights": "fixed"})
print(f"classes of equal size: log-likelihood {held.log_likelihood:.6f}")
for row in held.plan.m_step:
    print(f"{row.name:8} {row.route:8} {row.reason}")

# %% [markdown]
# ## Blood groups: ties, weights and latents that meet
#
# A person has two alleles, and only the group that they make is seen. Both alleles are drawn from the *same*
# `frequency`: a tie. And 4 groups stand for many people: their counts are `weights` on the plate.

# %%
groups, counts = torch.arange(4), table("abo_mclachlan.csv", column=1)  # O, A, B, AB
print("people by group (O, A, B, AB):", counts.tolist())
group_of = torch.tensor([[1, 3, 1], [3, 2, 2], [1, 2, 0]])  # by the two alleles, each A, B or O
certain = torch.nn.functional.one_hot(group_of).double().log()  # an impossible group has log-probability -inf


def blood(x):
    frequency = pyro.param("frequency", torch.ones(3) / 3, constraint=constraints.simplex)
    with pyro.plate("people", len(x)):
        first = pyro.sample("first", dist.Categorical(frequency))
        second = pyro.sample("second", dist.Categorical(frequency))
        pyro.sample("group", dist.Categorical(logits=Vindex(certain)[first, second]), obs=x)


print(pyro_em.plan(blood, groups, weights={"people": counts}))

# %% [markdown]
# One closed form gathers the expected alleles of both sites. The note says that the two latents are summed out
# jointly: given the group they are not independent. Weights are not an approximation, they are repetition; writing
# every person out gives the same fit.

# %%
weighted = pyro_em.fit(blood, groups, weights={"people": counts}, tol=1e-10)
spelled_out = pyro_em.fit(blood, groups.repeat_interleave(counts.long()), tol=1e-10)
for name, fit in (("weighted", weighted), ("spelled out", spelled_out)):
    frequency = ", ".join(f"{f:.6f}" for f in fit.params["frequency"])
    print(f"{name:12} frequency of A, B, O: {frequency}   log-likelihood {fit.log_likelihood:.6f}")

# %% [markdown]
# ## Refusals
#
# The exact algorithms never approximate in silence. Where a posterior cannot be summed exactly, `plan` and `fit` stop
# with the site, the reason and a remedy. Continuous latents are integrated exactly where their posterior is known to
# be Gaussian, Gamma, InverseGamma, Beta or Dirichlet; that of a log-intensity is none of these:


# %%
def overdispersed(x):
    mean = pyro.param("mean", x.mean().log())
    spread = pyro.param("spread", torch.tensor(0.3), constraint=constraints.positive)
    with pyro.plate("years", len(x)):
        intensity = pyro.sample("intensity", dist.Normal(mean, spread))
        pyro.sample("x", dist.Poisson(intensity.exp()), obs=x)


def refusal(model, *args, **options):
    try:
        pyro_em.plan(model, *args, **options)
    except pyro_em.PyroEMError as error:
        print(f"{type(error).__name__}: {error}\n")
        return error
    raise AssertionError("this model was accepted")


quakes = table("earthquakes.csv", column=1)  # large earthquakes in the world, by year
continuous = refusal(overdispersed, quakes)

# %% [markdown]
# The first remedy integrates the latent numerically, at nodes that follow each year's posterior:

# %%
integrated = pyro_em.fit(
    overdispersed, quakes, e_step={"intensity": pyro_em.Quadrature(num_nodes=21)}, accelerate="squarem", tol=1e-5
)
print(f"quadrature: log-likelihood {integrated.log_likelihood:.5f}, spread {integrated.params['spread']:.5f}")

# %% [markdown]
# The other is the swap of one word. The plan then says what becomes of the latent. Mind its first line: the result is
# a bound, and here nothing tells how far it is below the likelihood (`result.gap` is None).

# %%
print(pyro_em.plan(overdispersed, quakes, algorithm="svi"))

# %% [markdown]
# A table can be too large, which is found before it is allocated. All these latents meet in one observation:


# %%
def everything_meets(x, number):
    weights = pyro.param("weights", torch.ones(12) / 12, constraint=constraints.simplex)
    total = torch.zeros(())
    for i in range(number):
        total = total + pyro.sample(f"z_{i}", dist.Categorical(weights))
    pyro.sample("x", dist.Normal(total, 1.0), obs=x)


too_large = refusal(everything_meets, quakes.mean(), 10)

# %% [markdown]
# Finally, you can insist. `m_step="closed"` turns a numeric M-step into a refusal, which is useful when you believe
# that a model has formulas and want to be told if it has not.

# %%
insisted = refusal(through_a_link, symptoms, m_step="closed")

# %% [markdown]
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert [plain.plan.route(name) for name in ("z", "x", "weights", "probs")] == [
    "enumerate", "observed", "closed", "closed",
]  # fmt: skip
assert linked.plan.route("effort") == "numeric"
assert linked.plan.route("weights") == "closed"
assert abs(plain.log_likelihood - linked.log_likelihood) < 1e-5
assert abs(plain.log_likelihood - fits["em"].log_likelihood) < 1e-5
assert fits["map-em"].params["probs"].min() > fits["em"].params["probs"].min()
assert weighted.plan.route("frequency") == "closed"
torch.testing.assert_close(weighted.params, spelled_out.params, rtol=0, atol=1e-8)
assert abs(weighted.log_likelihood - spelled_out.log_likelihood) < 1e-8
assert held.params["weights"].tolist() == [0.5, 0.5] and not held.standard_errors()["weights"].any()
assert held.log_likelihood < plain.log_likelihood
nodes, of_node = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))  # another quadrature
rates = (integrated.params["mean"] + integrated.params["spread"] * nodes).exp()
by_hand = dist.Poisson(rates).log_prob(quakes[:, None])
assert abs(torch.logsumexp(by_hand + (of_node / of_node.sum()).log(), -1).sum() - integrated.log_likelihood) < 1e-3
assert "intensity" in continuous.reason
assert isinstance(too_large, pyro_em.ResourceError)
assert "effort" in insisted.reason
