"""Variational autoencoder: a nonlinear continuous latent with an amortised guide, so no exact E-step exists.

    z_n ~ N(0, I_L),   x_n | z_n ~ Bernoulli(decoder(z_n))          x (N, D) binary, D = 64 pixels
    guide: z_n | x_n ~ N(loc(x_n), diag(scale(x_n)²)), both outputs of the encoder

Fit it by `svi`: the ELBO stays below log p(x) by the gap between guide and posterior (Kingma and Welling
2014). `model` and `guide` belong to one pair of networks made on import, and keep what they have learnt, as
modules do; for a fresh start use the methods of a new `VAE(seed=...)`.

Data: the 8x8 handwritten digits that scikit-learn carries (`load` imports it), binarised at half intensity.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import softplus


def load() -> Tensor:
    """1797 digits of 8x8 pixels, 1 where the intensity (0 to 16) is 8 or more. (1797, 64)."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data >= 8).double()


def simulate(num_rows: int = 200, *, seed: int = 0) -> Tensor:
    """8x8 images of one horizontal bar, three rows thick, one pixel in twenty flipped. (N, 64)."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(6, (num_rows, 1), generator=generator)
    row = torch.arange(8)
    bar = ((row >= top) & (row < top + 3)).unsqueeze(-1).expand(num_rows, 8, 8)
    flipped = torch.rand(num_rows, 8, 8, generator=generator) < 0.05
    return (bar ^ flipped).double().flatten(1)


def _linear(num_inputs: int, num_outputs: int) -> nn.Module:
    return PyroModule[nn.Linear](num_inputs, num_outputs, dtype=torch.float64)


class Decoder(PyroModule):
    """Latent (N, L) to the logits of the pixels (N, D)."""

    def __init__(self, num_pixels: int, num_latents: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = _linear(num_latents, num_hidden)
        self.logits = _linear(num_hidden, num_pixels)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(self.hidden(z).tanh())


class Encoder(PyroModule):
    """Pixels (N, D) to location and scale of the latent, (N, L) each."""

    def __init__(self, num_pixels: int, num_latents: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = _linear(num_pixels, num_hidden)
        self.loc = _linear(num_hidden, num_latents)
        self.scale = _linear(num_hidden, num_latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x).tanh()
        return self.loc(hidden), softplus(self.scale(hidden))


class VAE(PyroModule):
    """The two networks, with `model(data)` and `guide(data)` as methods; parameters are named after them."""

    def __init__(self, num_pixels: int = 64, num_latents: int = 4, num_hidden: int = 32, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # torch.nn draws its initial weights from the global generator
            torch.manual_seed(seed)
            self.decoder = Decoder(num_pixels, num_latents, num_hidden)
            self.encoder = Encoder(num_pixels, num_latents, num_hidden)
        self.num_latents = num_latents

    def model(self, data: Tensor) -> None:
        origin = data.new_zeros(self.num_latents, dtype=torch.float64)
        with pyro.plate("rows", len(data)):
            z = pyro.sample("z", dist.Normal(origin, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=data)

    def guide(self, data: Tensor) -> None:
        with pyro.plate("rows", len(data)):
            loc, scale = self.encoder(data.double())
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


_network = VAE()
model = _network.model
guide = _network.guide
