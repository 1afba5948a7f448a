# %% [markdown]
"""
# Swap the algorithm

One Pyro model, four algorithms, and one word that chooses between them:

| `algorithm=` | how it treats what is unseen | how it moves the parameters | what it climbs |
|---|---|---|---|
| `"em"` | the exact posterior | closed form where there is one | the likelihood |
| `"map-em"` | the exact posterior | the same, with priors | the posterior density |
| `"gem"` | the exact posterior | a gradient step | the likelihood |
| `"svi"` | a guide, or exact sums | stochastic gradient steps | the ELBO |

We fit the eruptions of Old Faithful with each, ask beforehand what would be done, start from several places, hand
the result to ArviZ, and end with the question behind all four: when is the ELBO only a bound?
"""

# %%
import warnings
from pathlib import Path

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository
eruptions = torch.from_numpy(np.loadtxt(DATA / "faithful.csv", delimiter=",", skiprows=1))
duration, wait = eruptions.mean(0)
print(f"{len(eruptions)} eruptions; mean duration {duration:.2f} and mean wait {wait:.2f} minutes")

# %%
plt.figure(figsize=(5, 3.5))
plt.scatter(*eruptions.T, s=8, color="0.4")
plt.xlabel("duration (min)")
plt.ylabel("wait for the next (min)")
plt.show()

# %% [markdown]
# ## One model
#
# There are short eruptions and long ones, so: a mixture of two Gaussians. This is ordinary Pyro. The class `z` of an
# eruption is a latent; nobody marks it for enumeration. The weights, means and variances have weak priors, and
# whether these count is the algorithm's business, not the model's.


# %%
def model(x):
    mean, sd = x.mean(0), x.std(0)
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 2.0)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(mean, 3 * sd).to_event(1))
        variance = pyro.sample("variance", dist.InverseGamma(torch.full((2,), 2.0), sd**2).to_event(1))
    with pyro.plate("eruptions", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], variance[z].sqrt()).to_event(1), obs=x)


# %% [markdown]
# ## Ask first
#
# `plan` takes the arguments of `fit` and runs nothing. It says which role each site has and why, how the E-step and
# the M-step will be done, and which priors count.

# %%
print(pyro_em.plan(model, eruptions, algorithm="em"))

# %% [markdown]
# Every parameter is marked `closed`: given the posterior of `z`, its best value is a formula. So `em` needs no
# learning rate and no optimiser, only a place to start.

# %%
start = {
    "weights": torch.tensor([0.5, 0.5]),
    "loc": torch.tensor([[2.5, 60.0], [4.0, 75.0]]),
    "variance": torch.tensor([[0.5, 60.0], [0.5, 60.0]]),
}
em = pyro_em.fit(model, eruptions, algorithm="em", init=start)
print(em)

# %% [markdown]
# "Converged" is a claim about the gradient: the score of the *exact* log-likelihood, per eruption, is below `tol`.
# The standard errors come from the Hessian of that same function.
#
# ## Swap
#
# Now the word is changed and nothing else. (The two gradient methods also get a budget, and `svi` a Pyro optimiser.)

# %%
options = {
    "em": {},
    "map-em": {},
    "gem": {"max_iter": 5},
    "svi": {"max_iter": 100, "optim": pyro.optim.Adam({"lr": 0.1})},
}
fits = {name: pyro_em.fit(model, eruptions, algorithm=name, init=start, seed=0, **o) for name, o in options.items()}

print(f"{'':8}{'climbs':>26}{'reached':>13}{'log-likelihood':>16}{'updates':>9}  ended")
for name, fit in fits.items():
    reached, updates = fit.history["objective"][-1], fit.num_iterations
    climbs, ended = fit.plan.objective, fit.outcome.name
    print(f"{name:8}{climbs:>26}{reached:13.4f}{fit.log_likelihood:16.4f}{updates:9}  {ended}")

# %% [markdown]
# Compare within pairs, because `em` and `gem` climb one function and `map-em` and `svi` another. Within a pair the
# summit is the same; what differs is the way up. `em` takes few, large steps and knows when it has arrived. `gem` is
# for models without formulas; here it is the slower way to the same place, and its budget ends before it gets there.
# `svi` never says that it has converged, because it does not test it.

# %%
plt.figure(figsize=(5, 3.5))
top = fits["em"].log_likelihood
for name in ("em", "gem"):
    below = top - torch.tensor(fits[name].history["objective"])
    plt.semilogy(below.clamp(min=1e-12), marker=".", label=name)
plt.xlabel("update")
plt.ylabel("log-likelihood still to gain")
plt.legend()
plt.show()

# %% [markdown]
# The exact posterior of the class is one call away, for the data of the fit or for new ones. A duration between the
# two groups leaves real doubt:

# %%
new = torch.tensor([[2.0, 55.0], [2.9, 66.0], [4.5, 80.0]])
long = int(em.params["loc"][:, 0].argmax())  # labels are arbitrary: find the class of the long eruptions
for row, probability in zip(new, em.posterior(new).marginal("z").probs[:, long], strict=True):
    print(f"duration {row[0]:.1f}, wait {row[1]:.0f}: long with probability {probability:.4f}")

# %% [markdown]
# ## Where it starts matters
#
# EM climbs to the nearest summit, or to a saddle. The purest case: give both components the same values, and no
# update can ever tell them apart. The fit says so. With `restarts` the first start is yours and the others are drawn
# (here by k-means++); the best is returned and all are reported.

# %%
equal = {
    "weights": torch.tensor([0.5, 0.5]),
    "loc": eruptions.mean(0).repeat(2, 1),
    "variance": eruptions.var(0).repeat(2, 1),
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pyro_em.EMWarning)
    stuck = pyro_em.fit(model, eruptions, init=equal)
    several = pyro_em.fit(model, eruptions, init=equal, restarts=4, seed=0)
print(f"Warned: {caught[0].message}\n")
print(f"one start: {stuck.log_likelihood:.4f} ({stuck.outcome.name})")
for number, (objective, outcome) in enumerate(several.restarts):
    print(f"start {number}:   {objective:.4f} ({outcome})")

# %% [markdown]
# Note that the saddle counts as converged: the gradient vanishes there too. Only other starts can tell.
#
# ## To ArviZ
#
# `to_inference_data` draws from the normal approximation at the estimate, and adds the data, the latent posterior and
# the pointwise log-likelihood. These are not MCMC draws, so chain diagnostics would mean nothing, and we ask for
# `kind="stats"`. Under `map-em` the approximation includes the priors.

# %%
tree = fits["map-em"].to_inference_data(num_draws=400, seed=0)
print(az.summary(tree, var_names=["weights", "loc"], kind="stats", round_to=3))

# %% [markdown]
# ## When the ELBO is a bound
#
# For any distribution q over the latents,
#
# $$\log p(x \mid \theta) = \underbrace{E_q[\log p(x, z \mid \theta) - \log q(z)]}_{\text{ELBO}}
#   + \underbrace{KL[q(z) \,\|\, p(z \mid x, \theta)]}_{\text{gap}}.$$
#
# The exact algorithms set q to the posterior, and the gap is zero. In the table above `svi` had no gap either: it was
# given no guide for `z`, so `z` was summed out.

# %%
for name, fit in fits.items():
    print(f"{name:8} gap {abs(fit.gap):.1e}")

# %% [markdown]
# The gap opens when a guide has to describe `z` and cannot. To see it alone, hold the parameters at their EM values,
# so that the log-likelihood is one fixed number, and train only guides, each freer than the one before:
#
# - **constant**: one probability for all eruptions;
# - **duration**: a logistic function of the duration alone;
# - **quadratic**: a logistic function of both measures, their squares and their product.
#
# For two Gaussians the true log-odds *are* quadratic, so the last family contains the posterior.

# %%
standard = (eruptions - eruptions.mean(0)) / eruptions.std(0)
one, (duration, wait) = torch.ones(len(eruptions)), standard.T
features = {
    "constant": torch.stack([one], -1),
    "duration": torch.stack([one, duration], -1),
    "quadratic": torch.stack([one, duration, wait, duration**2, wait**2, duration * wait], -1),
}


def fixed(x):
    with pyro.plate("eruptions", len(x)):
        z = pyro.sample("z", dist.Categorical(em.params["weights"]))
        scale = em.params["variance"][z].sqrt()
        pyro.sample("x", dist.Normal(em.params["loc"][z], scale).to_event(1), obs=x)


def guide_for(name):
    def guide(x):
        coef = pyro.param(f"coef_{name}", torch.zeros(features[name].shape[-1]))
        logits = torch.stack([torch.zeros(len(x)), features[name] @ coef], -1)
        with pyro.plate("eruptions", len(x)):
            # Enumerated in the guide, E_q is an exact sum: the ELBO has no Monte Carlo noise.
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return guide


gaps = {}
for name in features:
    adam = pyro.optim.Adam({"lr": 0.5})
    fit = pyro_em.fit(fixed, eruptions, algorithm="svi", guide=guide_for(name), max_iter=100, optim=adam, seed=0)
    gaps[name] = fit.gap
    print(f"{name:10} ELBO {fit.elbo:12.4f}   log-likelihood {fit.log_likelihood:12.4f}   gap {fit.gap:9.4f}")

# %% [markdown]
# The log-likelihood is the same in every row, and the gap closes as the guide learns to say what the posterior says.
# What is left in the last row is not the family's fault but the optimiser's: it has not arrived yet. That is the
# whole difference between EM and SVI: EM writes the posterior down, SVI approaches it from below.
#
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert em.converged
assert torch.tensor(em.history["objective"]).diff().min() > -1e-9, "no EM step may lose"
assert torch.tensor(fits["gem"].history["objective"]).diff().min() > 0, "no GEM step may lose"
assert fits["gem"].log_likelihood < top
assert fits["map-em"].log_posterior - 0.1 < fits["svi"].log_posterior < fits["map-em"].log_posterior
assert stuck.converged
assert stuck.log_likelihood < top - 100
assert abs(several.log_likelihood - top) < 1e-6
assert max(abs(fit.gap) for fit in fits.values()) < 1e-9
assert gaps["constant"] > gaps["duration"] > gaps["quadratic"] > 0
