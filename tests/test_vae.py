"""The VAE of models/vae.py through `algorithm="svi"`: an amortised guide, torch modules, real digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyro_em
from models import vae

STEPS = 150


@pytest.fixture
def digits() -> Tensor:
    return vae.load()[:200]


def test_the_bound_rises_and_the_networks_learn(digits: Tensor) -> None:
    network = vae.VAE(seed=0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    result = pyro_em.fit(
        network.model, digits, algorithm="svi", guide=network.guide, max_iter=STEPS, seed=0, optim=torch.optim.Adam
    )
    objective = torch.tensor(result.history["objective"])
    assert bool(objective.isfinite().all())
    assert objective.shape == (STEPS + 1,)
    # Better than pixels that are independent of each other, each with its own frequency: the networks have learnt.
    frequency = digits.mean(0).clamp(0.01, 0.99)
    independent = float(torch.distributions.Bernoulli(frequency).log_prob(digits).sum())
    assert objective[0] < independent - 1000
    assert result.elbo > independent + 300
    after = dict(network.named_parameters())
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    for name, value in after.items():
        assert torch.equal(value, result.params[name])


def test_what_is_known_of_it(digits: Tensor) -> None:
    network = vae.VAE(seed=0)
    result = pyro_em.fit(network.model, digits, algorithm="svi", guide=network.guide, max_iter=2, seed=0)
    assert result.plan.route("z") == "guide"
    assert result.plan.route("decoder.logits.weight") == "gradient"
    assert result.log_likelihood is None
    assert result.gap is None
    assert math.isfinite(result.elbo)
    assert result.num_observations == 200
    decoder = sum(value.numel() for value in network.decoder.parameters())
    assert result.num_parameters == decoder, "the encoder belongs to the guide"


def test_same_network_same_bits(digits: Tensor) -> None:
    results = []
    for _ in range(2):
        network = vae.VAE(seed=3)
        results.append(pyro_em.fit(network.model, digits, algorithm="svi", guide=network.guide, max_iter=3, seed=1))
    first, second = results
    assert first.elbo == second.elbo
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
