# %% [markdown]
"""
# What is not there

Cells that nobody measured, values beyond the end of a scale: EM was made for data like these (Dempster, Laird and Rubin
1977). This tutorial fits with missing cells and fills them in, and then turns to latents that no formula integrates:
a variational autoencoder, where the word is `svi`.
"""

# %%
import csv
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository

# %% [markdown]
# ## Missing cells
#
# Oxygen intake, run time and pulse of 31 runners; ten of them lack a cell or two. The model is that of complete data.
# `missing="nan"` says that a NaN is a cell that was not seen, for reasons that have nothing to do with its value.

# %%
with open(DATA / "fitness1.csv", newline="") as file:
    columns, *rows = csv.reader(file)
runners = torch.tensor([[float(cell) if cell else math.nan for cell in row] for row in rows])
gone = runners.isnan()
print(f"{len(runners)} runners, {int(gone.any(1).sum())} of them incomplete; columns {', '.join(columns)}")


def normal(x):
    loc = pyro.param("loc", x.nanmean(0))
    cov = pyro.param("cov", torch.diag(torch.tensor([30.0, 2.0, 100.0])), constraint=constraints.positive_definite)
    with pyro.plate("runners", len(x)):
        pyro.sample("x", dist.MultivariateNormal(loc, cov), obs=x)


fit = pyro_em.fit(normal, runners, missing="nan", tol=1e-8)
complete = pyro_em.fit(normal, runners[~gone.any(1)])
error = fit.standard_errors()["loc"]
for i, name in enumerate(columns):
    all_rows, some, mean = fit.params["loc"][i], complete.params["loc"][i], runners.nanmean(0)[i]
    print(
        f"{name:12} {all_rows:8.3f} ± {error[i]:.3f}   complete rows only {some:8.3f}   mean of the cells {mean:8.3f}"
    )

# %% [markdown]
# The missing cells have a posterior, with mean and standard deviation. Those who ran long are filled in with a low
# intake, and draws (`filled.sample`) are multiple imputations.

# %%
filled = fit.impute()["x"]
time, oxygen = 1, 0
plt.figure(figsize=(5, 3.5))
seen = ~gone[:, oxygen] & ~gone[:, time]
plt.plot(runners[seen, time], runners[seen, oxygen], "o", color="0.6", markersize=4, label="seen")
plt.errorbar(
    filled.mean[~seen, time],
    filled.mean[~seen, oxygen],
    xerr=filled.sd[~seen, time],
    yerr=filled.sd[~seen, oxygen],
    fmt="o",
    markersize=4,
    label="filled in",
)
plt.xlabel("run time (min)")
plt.ylabel("oxygen intake (ml/kg/min)")
plt.legend()
plt.show()

# %% [markdown]
# ## Latents without a formula
#
# Pictures of a bar three rows thick, eight by eight pixels, some of these flipped. A decoder network turns two numbers
# `z` into the 64 probabilities. The posterior of `z` has no formula, and the exact algorithms say so:

# %%
generator = torch.Generator().manual_seed(0)
top = torch.randint(6, (200, 1), generator=generator)
bar = ((torch.arange(8) >= top) & (torch.arange(8) < top + 3)).unsqueeze(-1).expand(200, 8, 8)
pictures = (bar ^ (torch.rand(200, 8, 8, generator=generator) < 0.05)).double().flatten(1)

with torch.random.fork_rng():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 64))
    encoder = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("pictures", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


try:
    pyro_em.plan(model, pictures)
except pyro_em.Refusal as refusal:
    refused = refusal
    print(refused)

# %% [markdown]
# So the word is `svi`, which takes a *guide*: here a second network, which reads a picture and proposes where its `z`
# lies. Both networks climb one bound, the ELBO.


# %%
def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("pictures", len(x)):
        loc, scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


adam = pyro.optim.Adam({"lr": 0.02})
vae = pyro_em.fit(model, pictures, algorithm="svi", guide=guide, optim=adam, max_iter=600, seed=0)
history = torch.tensor(vae.history["objective"])
print(f"ELBO of the first 20 steps {history[:20].mean():.0f}, of the last {history[-20:].mean():.0f}")
print(f"exact: {vae.exact}; log-likelihood: {vae.log_likelihood}; {vae.outcome}")

# %% [markdown]
# The log-likelihood is `None`: a bound is all there is. What was learnt can be seen: along a line in `z` the decoder
# moves the bar.

# %%
with torch.no_grad():
    loc = encoder(pictures).chunk(2, -1)[0]
    middle, spread = loc.mean(0), torch.linalg.eigh(loc.T.cov()).eigenvectors[:, -1]
    along = (loc - middle) @ spread
    steps = torch.linspace(float(along.min()), float(along.max()), 8)
    shown = torch.sigmoid(decoder(middle + steps[:, None] * spread)).reshape(8, 8, 8).numpy()
fig, axes = plt.subplots(1, 8, figsize=(8, 1.2))
for ax, picture in zip(axes, shown, strict=True):
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert fit.converged and fit.plan.exact
assert torch.equal(filled.mean[~gone], runners[~gone]) and bool((filled.sd[gone] > 0).all())
slope = fit.params["cov"][oxygen, time] / fit.params["cov"][time, time]
assert slope < 0
assert torch.allclose(fit.log_prob(runners).sum(), torch.tensor(fit.log_likelihood))
assert refused.site == "x"
assert not vae.exact and vae.log_likelihood is None
assert history[-20:].mean() > history[:20].mean() + 2000
