# %% [markdown]
"""
# Latents that are numbers

A latent need not be a label. Effects of subjects, the level of a river, the ability of a person are continuous, and
often their posterior has a closed form too: `pyro_em` finds out from the program, integrates them out exactly, and
says so in the plan. Where there is no closed form it refuses, or integrates numerically if it is told to.
"""

# %%
import csv
from pathlib import Path

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

# %% [markdown]
# ## Subjects: random intercepts and slopes
#
# Eighteen people went short of sleep, and took longer to react, day by day. Everybody has a line of their own; the
# lines come from a common distribution. In lme4 this is `Reaction ~ Days + (Days | Subject)`, in Pyro a vector per
# subject, read by the rows as `b[subject]`.

# %%
with open(DATA / "sleepstudy.csv", newline="") as file:
    rows = list(csv.DictReader(file))
names = sorted({row["Subject"] for row in rows})
subject = torch.tensor([names.index(row["Subject"]) for row in rows])
days = torch.tensor([float(row["Days"]) for row in rows])
reaction = torch.tensor([float(row["Reaction"]) for row in rows])


def lines(days, subject, reaction):
    beta = pyro.param("beta", torch.tensor([250.0, 10.0]))
    spread = pyro.param("spread", torch.diag(torch.tensor([500.0, 50.0])), constraint=constraints.positive_definite)
    noise = pyro.param("noise", torch.tensor(30.0), constraint=constraints.positive)
    with pyro.plate("subjects", 18):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), spread))
    line = beta + b[subject]
    with pyro.plate("rows", len(reaction)):
        pyro.sample("reaction", dist.Normal(line[:, 0] + line[:, 1] * days, noise), obs=reaction)


fit = pyro_em.fit(lines, days, subject, reaction, accelerate="anderson")
print(fit.plan)
print()
print(fit)

# %% [markdown]
# Estimates and standard errors are those of lme4 by maximum likelihood (251.41 and 10.47, errors 6.63 and 1.50). No
# row is read again after the first look: what the fit needs of a subject are a few moments.
#
# The effects themselves have a posterior, mean and covariance. Its mean shrinks everybody towards the common line,
# those with little to say the most.

# %%
posterior = fit.posterior()
own = fit.params["beta"] + posterior.mean("b")
fig, ax = plt.subplots(figsize=(6.0, 4.0))
for i in range(18):
    here = subject == i
    alone = np.polyfit(days[here].numpy(), reaction[here].numpy(), 1)
    ax.annotate("", own[i].numpy(), (alone[1], alone[0]), arrowprops={"arrowstyle": "->", "color": "0.6"})
    ax.plot(alone[1], alone[0], "o", color="0.6", markersize=4)
ax.plot(*own.T.numpy(), "o", markersize=4)
ax.plot(*fit.params["beta"].numpy(), "+", color="black", markersize=12)
ax.set_xlabel("intercept (ms)")
ax.set_ylabel("slope (ms a day)")
ax.set_title("From each subject alone (grey) to the posterior mean")
plt.show()

# %% [markdown]
# ## A river: states in time, and years without a measurement
#
# The level of the Nile wanders; what is measured is the level with noise. The steps are written as a loop over
# `pyro_em.markov(T)`: its body is traced once, however long the series, and the loop is recognised as a
# linear-Gaussian chain, which a Kalman filter integrates out. We leave out twenty years; `obs_mask` says so.

# %%
nile = torch.from_numpy(np.loadtxt(DATA / "nile.csv", delimiter=",", skiprows=1, usecols=1))
known = torch.ones(100, dtype=torch.bool)
known[30:50] = False


def local_level(flow, known):
    level_sd = pyro.param("level_sd", torch.tensor(50.0), constraint=constraints.positive)
    noise_sd = pyro.param("noise_sd", torch.tensor(100.0), constraint=constraints.positive)
    level = None
    for t in pyro_em.markov(len(flow)):
        start = dist.Normal(1000.0, 300.0)
        level = pyro.sample(f"level_{t}", start if level is None else dist.Normal(level, level_sd))
        pyro.sample(f"flow_{t}", dist.Normal(level, noise_sd), obs=flow[t], obs_mask=known[t])


river = pyro_em.fit(local_level, nile, known, accelerate="squarem")
print(river.plan)
print()
print(river)

# %% [markdown]
# The posterior of the states is the Kalman smoother's. Where nothing was measured it knows less, and says how much.

# %%
states = river.posterior()
level, sd = states.mean("level"), states.variance("level").sqrt()
year = np.arange(1871, 1971)
fig, ax = plt.subplots(figsize=(7.0, 3.5))
ax.plot(year, torch.where(known, nile, torch.nan), "o", markersize=3, label="measured")
ax.plot(year, torch.where(known, torch.nan, nile), "o", markersize=3, color="0.7", label="left out")
ax.plot(year, level, color="C1", label="level")
ax.fill_between(year, level - 2 * sd, level + 2 * sd, color="C1", alpha=0.2, linewidth=0)
ax.set_ylabel("annual flow (10⁸ m³)")
ax.legend()
plt.show()

# %% [markdown]
# ## Seeds: a posterior without a formula
#
# How many seeds germinate depends on their type, on the extract they lie in, and on the plate. A normal effect of the
# plate in a logistic regression has no posterior in closed form, and the fit says so:

# %%
with open(DATA / "seeds.csv", newline="") as file:
    table = torch.tensor([[float(cell) for cell in row] for row in list(csv.reader(file))[1:]])
germinated, sown, kind, extract = table.unbind(-1)
covariates = torch.stack([torch.ones(21), kind, extract, kind * extract], -1)


def seeds(germinated, sown, covariates):
    coef = pyro.param("coef", torch.zeros(4))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("plates", len(germinated)):
        b = pyro.sample("b", dist.Normal(0.0, scale))
        pyro.sample("germinated", dist.Binomial(sown, logits=covariates @ coef + b), obs=germinated)


try:
    pyro_em.fit(seeds, germinated, sown, covariates)
except pyro_em.Refusal as refusal:
    refused = refusal
    print(refused)

# %% [markdown]
# The effect of a plate is one number, and one-dimensional integrals are easy. Asked to, the fit takes them by adaptive
# Gauss-Hermite quadrature, centred and scaled at the posterior of every plate, and adds what doubling the nodes would
# change.

# %%
nodes = {"b": pyro_em.Quadrature(num_nodes=21)}
germination = pyro_em.fit(seeds, germinated, sown, covariates, e_step=nodes, accelerate="squarem")
print(germination)
print()
print(germination.plan.notes[0])

# %% [markdown]
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert fit.converged and abs(fit.log_likelihood + 875.9697) < 1e-4  # lme4
torch.testing.assert_close(fit.params["beta"], torch.tensor([251.405, 10.467]), rtol=0, atol=1e-3)
torch.testing.assert_close(fit.standard_errors()["beta"], torch.tensor([6.632, 1.502]), rtol=0, atol=1e-3)
assert fit.plan.route("b") == "Gaussian"
assert river.converged and states.mean("level").shape == (100,)
assert float(sd[~known].min()) > float(sd[known].max())
assert refused.site == "germinated"
assert germination.converged and abs(germination.log_likelihood + 53.7574) < 1e-4
