# %% [markdown]
"""
# Sequences

A hidden Markov model of the world's earthquakes: how to write a loop over time, what its posterior can be asked (the
state of each year, the whole path, the years to come), and how ArviZ checks the fit.
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
from pyro.distributions import constraints

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository
quakes = torch.from_numpy(np.loadtxt(DATA / "earthquakes.csv", delimiter=",", skiprows=1, usecols=1))
years = np.arange(1900, 1900 + len(quakes))

# %% [markdown]
# ## The loop
#
# Each year is quiet or busy; a year tends to be like the one before. `for t in pyro_em.markov(T)` is Pyro's
# `pyro.markov(range(T))`, except that the body is run once for all later years together: a million steps need no
# million traces. Write the step into the names, and index with `t` whatever varies in time.


# %%
def earthquakes(x):
    initial = pyro.param("initial", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    transition = pyro.param("transition", torch.tensor([[0.8, 0.2], [0.2, 0.8]]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([10.0, 30.0]), constraint=constraints.positive)
    z = None
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])


fit = pyro_em.fit(earthquakes, quakes, m_step={"initial": "fixed"}, accelerate="squarem")
print(fit.plan)
print()
print(fit)

# %% [markdown]
# `x_1:107` are the later years. Only one year is drawn from `initial`, so the data cannot tell it: it is held fixed.
#
# ## The states
#
# In the posterior the loop is one latent, called without the step. `marginal` and `responsibilities` look at each year
# by itself, `mode` at the path as a whole (Viterbi).

# %%
posterior = fit.posterior()
busy = int(fit.params["rate"].argmax())
probability = posterior.responsibilities("z")[:, busy]
path = posterior.mode()["z"]
plt.figure(figsize=(7, 3.5))
plt.plot(years, quakes, ".", color="0.5", label="earthquakes")
plt.step(years, fit.params["rate"][path], where="mid", label="rate on the most probable path")
plt.fill_between(years, 0, 10 * probability, step="mid", alpha=0.2, label="10 × probability of a busy year")
plt.ylim(0, 60)
plt.legend()
plt.show()

# %% [markdown]
# `sequence` has what a series is asked as it comes in: each state given the years before it only (`filter`), and the
# years to come (`forecast`), whose states forget the present and tend to the chain's stationary distribution.

# %%
sequence = posterior.sequence("z")
print(f"busy in 2006, given all years: {sequence.filter()[-1, busy]:.3f}")
for ahead, states in zip((1, 2, 5, 20), sequence.forecast(20)[[0, 1, 4, 19]], strict=True):
    print(f"busy {ahead:2} years on: {states[busy]:.3f}, expected earthquakes {states @ fit.params['rate']:.1f}")

# %% [markdown]
# ## Is it a good model?
#
# `to_inference_data` draws parameters from the normal approximation at the estimate, and with `predictive=` a data set
# at each. The steps are one variable with the dim `time`, so ArviZ's plots work as they stand.

# %%
data = fit.to_inference_data(num_draws=50, predictive=50, seed=0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ, about its next version
    az.plot_ppc(data, kind="cumulative", figsize=(5, 3.5))
plt.show()

# %% [markdown]
# One Poisson for all years could not be spread so far: its variance would be its mean. How many states there are, the
# information criteria say (smaller is better); of two of them they do not say that it is enough.


# %%
def one_state(x):
    rate = pyro.param("rate", torch.tensor(20.0), constraint=constraints.positive)
    with pyro.plate("years", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def three_states(x):
    initial = torch.ones(3) / 3
    transition = pyro.param("transition3", 0.1 + 0.7 * torch.eye(3), constraint=constraints.simplex)
    rate = pyro.param("rate3", torch.tensor([10.0, 20.0, 30.0]), constraint=constraints.positive)
    z = None
    for t in pyro_em.markov(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate[z]), obs=x[t])


one = pyro_em.fit(one_state, quakes)
three = pyro_em.fit(three_states, quakes, accelerate="squarem")
for number, each in enumerate((one, fit, three), 1):
    print(f"{number} states: log-likelihood {each.log_likelihood:.3f}, AIC {each.aic:.2f}, BIC {each.bic:.2f}")

# %% [markdown]
# States that are numbers (a level, a trend) are written in the same loop; the notebook on numeric latents has one.
#
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert fit.converged and three.converged
assert three.log_likelihood > fit.log_likelihood + 10 > one.log_likelihood + 50
assert three.aic < fit.aic < one.aic and three.bic < fit.bic < one.bic
assert abs(one.log_likelihood - float(dist.Poisson(quakes.mean()).log_prob(quakes).sum())) < 1e-8
assert torch.allclose(sequence.filter()[-1], posterior.responsibilities("z")[-1])
assert torch.allclose(sequence.one_step().sum(), torch.tensor(fit.log_likelihood))
stationary = torch.linalg.matrix_power(fit.params["transition"], 1000)[0]
assert torch.allclose(sequence.forecast(500)[-1], stationary, atol=1e-6)
assert data.observed_data["x"].dims == data.posterior_predictive["x"].dims[2:] == ("time",)
