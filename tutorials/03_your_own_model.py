# %% [markdown]
"""
# Your own model

Nobody can write rules for every model. This tutorial fits a mixture of a distribution that we write ourselves, for
which there are none, and a mixture of experts, in which a small module decides and Newton's method helps. Then it uses
them: standard errors, predictions for new data, and a file to keep.
"""

# %%
import math
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions.utils import broadcast_all

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository
duration, wait = torch.from_numpy(np.loadtxt(DATA / "faithful.csv", delimiter=",", skiprows=1)).T.contiguous()

# %% [markdown]
# ## A distribution of your own
#
# The waits for Old Faithful are a mixture of two humps, and the humps may lean. A skew normal can:
#
# $$\log p(x) = \log 2 - \log s + \log \varphi(u) + \log \Phi(a u), \qquad u = (x - m) / s,$$
#
# with location $m$, scale $s$ and slant $a$; at $a = 0$ it is a normal. Pyro has no such distribution. What a fit needs
# is what Pyro needs: shapes, constraints, and a `log_prob` that torch can differentiate.


# %%
class SkewNormal(TorchDistribution):
    """Azzalini's skew normal; all arguments broadcast to the batch shape."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "slant": constraints.real}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc, scale, slant, validate_args=None):
        self.loc, self.scale, self.slant = broadcast_all(loc, scale, slant)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return SkewNormal(*(p.expand(batch_shape) for p in (self.loc, self.scale, self.slant)), validate_args=False)

    def log_prob(self, value):
        u = (value - self.loc) / self.scale
        return (
            math.log(2) - self.scale.log() - (u**2 + math.log(2 * math.pi)) / 2 + torch.special.log_ndtr(self.slant * u)
        )

    def sample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        delta = self.slant / (1 + self.slant**2).sqrt()
        half, other = torch.randn(2, *shape).unbind()
        return self.loc + self.scale * (delta * half.abs() + (1 - delta**2).sqrt() * other)


def mixture(x, skew):
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([55.0, 80.0]))
    scale = pyro.param("scale", torch.tensor([6.0, 6.0]), constraint=constraints.positive)
    slant = pyro.param("slant", torch.ones(2)) if skew else None  # not 0, see below
    with pyro.plate("eruptions", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        hump = SkewNormal(loc[z], scale[z], slant[z]) if skew else dist.Normal(loc[z], scale[z])
        pyro.sample("x", hump, obs=x)


for row in pyro_em.plan(mixture, wait, skew=True).m_step:
    print(f"{row.name:8} {row.route:8} {row.reason}")

# %% [markdown]
# The E-step is exact as ever: enumeration asks for densities, not for names. `weights` keeps its formula, since it
# belongs to a Categorical. The others have none and are `numeric`: each M-step maximises the expected complete-data
# log-likelihood over them, and never lowers it. That is still EM; it is only dearer.

# %%
normal = pyro_em.fit(mixture, wait, skew=False)
skewed = pyro_em.fit(mixture, wait, skew=True, init=normal.params, accelerate="squarem")
for name, fit in (("normal", normal), ("skew", skewed)):
    print(f"{name:7} log-likelihood {fit.log_likelihood:.4f}, {fit.num_parameters} parameters, BIC {fit.bic:.2f}")
print()
print(skewed)

# %% [markdown]
# The normal mixture is a special case of the skew one, so the log-likelihood had to rise. Whether it rose *enough* is
# another question. Of two BICs the smaller is better, and the intervals of the slants say how little these waits know
# about them.
#
# Why do the slants not start at 0? Because a trap waits there. At slant 0 the slope of a skew normal with respect to
# its slant is a multiple of the one with respect to its location, so the normal fit is a stationary point, and a fit
# that starts there ends there, with the score below `tol`. No algorithm that follows slopes can know better; a look at
# the standard errors can:

# %%
trapped = pyro_em.fit(mixture, wait, skew=True, init={**normal.params, "slant": torch.zeros(2)})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pyro_em.EMWarning)
    trapped.standard_errors()
print(f"{trapped.outcome.name} after {trapped.num_iterations} updates at {trapped.log_likelihood:.4f}")
for warning in caught:
    print(warning.message)

# %% [markdown]
# ## A model that learns: a mixture of experts
#
# Next, the wait is to be predicted from the duration before it. Two experts each draw a line; a gate, which sees the
# duration, says which expert to trust. As a `PyroModule`:


# %%
class Experts(PyroModule):
    """wait | z = k ~ Normal(intercept_k + slope_k · duration, scale_k),  z ~ Categorical(softmax(gate(duration)))."""

    def __init__(self):
        super().__init__()
        self.gate = PyroModule[nn.Linear](1, 2)
        self.gate.weight = nn.Parameter(torch.tensor([[-1.0], [1.0]]))
        self.gate.bias = nn.Parameter(torch.zeros(2))
        self.intercept = PyroParam(torch.tensor([55.0, 80.0]))
        self.slope = PyroParam(torch.zeros(2))
        self.scale = PyroParam(torch.tensor([6.0, 6.0]), constraints.positive)

    def forward(self, duration, wait):
        from_mean = duration - 3.5
        with pyro.plate("eruptions", len(duration)):
            z = pyro.sample("z", dist.Categorical(logits=self.gate(from_mean[:, None])))
            line = self.intercept[z] + self.slope[z] * from_mean
            pyro.sample("wait", dist.Normal(line, self.scale[z]), obs=wait)


experts = Experts()
for row in pyro_em.plan(experts, duration, wait).m_step:
    print(f"{row.name:12} {row.role:8} {row.route:8} {row.reason}")

# %% [markdown]
# The gate's softmax has no formula, but its logits are linear in `gate.weight` and `gate.bias`: Newton's method finds
# their maximum (`newton`). The lines are one weighted least squares problem, solved at once; `scale` is picked by the
# class alone and keeps its formula. We fit on the first part of the record and keep the rest.

# %%
train, test = slice(0, 200), slice(200, None)
fit = pyro_em.fit(experts, duration[train], wait[train], accelerate="squarem")
print(f"{fit.outcome.name} after {fit.num_iterations} updates: log-likelihood {fit.log_likelihood:.4f}")

# %% [markdown]
# The fitted values are now in the module as well, as they would be after SVI. `standard_errors` has the names of
# `params`. Look at the gate first: adding one number to both of its outputs changes nothing, so its four numbers
# cannot all be known, and the package says so instead of inventing an answer.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pyro_em.EMWarning)
    errors = fit.standard_errors()
print(f"Warned: {caught[0].message}\n")
for name in ("intercept", "slope", "scale"):
    for k in range(2):
        print(f"{name}[{k}]  {fit.params[name][k]:8.3f}  standard error {errors[name][k]:.3f}")

# %% [markdown]
# ## New data
#
# Every question can be asked of other data by giving them: `log_prob` for how well they are predicted, `posterior` for
# the latents, `predictive` for draws of everything. The comparison below is on eruptions that the fit has not seen:
# against one straight line with normal errors, by the same score.

# %%
held_out = fit.log_prob(duration[test], wait[test])
design = torch.stack([torch.ones_like(duration), duration], -1)
line = torch.linalg.lstsq(design[train], wait[train]).solution
spread = (wait - design @ line)[train].square().mean().sqrt()
baseline = dist.Normal(design[test] @ line, spread).log_prob(wait[test])
print(f"{len(held_out)} new eruptions, mean log score: experts {held_out.mean():.4f}, one line {baseline.mean():.4f}")

# %%
grid = torch.linspace(1.6, 5.1, 60)
draws = fit.predictive(grid, torch.zeros_like(grid), num_samples=300, seed=0)["wait"]  # the waits given are not used
low, high = torch.quantile(draws, torch.tensor([0.05, 0.95]), dim=0)
drawn = fit.predictive(duration[test], wait[test], num_samples=300, seed=0)["wait"]
inside = ((drawn <= wait[test]).double().mean(0) - 0.5).abs() < 0.45
print(f"of the new waits, {inside.double().mean():.0%} lie in their 90 % predictive interval")

plt.figure(figsize=(5, 3.5))
plt.fill_between(grid, low, high, alpha=0.2, label="90 % predictive interval")
plt.scatter(duration[test], wait[test], s=8, color="0.4", label="new eruptions")
plt.xlabel("duration (min)")
plt.ylabel("wait for the next (min)")
plt.legend()
plt.show()

# %% [markdown]
# ## Keep it
#
# `save` writes parameters, history and plan to one file, without pickle. The model is a program and is not in it:
# `load` alone gives the numbers, `load` with the model and its data gives everything.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "experts.em"
    fit.save(path)
    numbers = pyro_em.load(path)
    again = pyro_em.load(path, model=Experts(), args=(duration[train], wait[train]))
print(f"from the file: {numbers.outcome.name}, log-likelihood {numbers.log_likelihood:.4f}")
print(f"with its model, for the new eruptions: {again.log_prob(duration[test], wait[test]).mean():.4f}")

# %% [markdown]
# ## What must hold
#
# The claims above, as assertions. The test suite runs them.

# %%
assert [skewed.plan.route(name) for name in ("weights", "loc", "scale", "slant")] == ["closed", *["numeric"] * 3]
assert skewed.converged
assert skewed.log_likelihood > normal.log_likelihood + 1
assert skewed.bic > normal.bic
assert trapped.converged
assert abs(trapped.log_likelihood - normal.log_likelihood) < 1e-6
slant = skewed.params["slant"].clone().requires_grad_()  # the mixture by hand, and its slope at the estimate
parts = SkewNormal(skewed.params["loc"], skewed.params["scale"], slant).log_prob(wait[:, None])
by_hand = torch.logsumexp(skewed.params["weights"].log() + parts, -1).sum()
assert abs(by_hand.item() - skewed.log_likelihood) < 1e-8
assert torch.autograd.grad(by_hand, slant)[0].abs().max() / len(wait) < 1e-5
assert torch.tensor(fit.history["objective"]).diff().min() > -1e-8
assert torch.equal(experts.slope.detach(), fit.params["slope"])
assert held_out.mean() > baseline.mean()
assert torch.equal(again.log_prob(duration[test], wait[test]), held_out)
assert all(torch.equal(numbers.params[name], fit.params[name]) for name in fit.params)
