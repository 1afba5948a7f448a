"""Distributions changed below their wrappers keep these and their arguments."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from pyro_em.model import compat, wrappers


def test_mask_elements_masks_within_the_event() -> None:
    """Each element counts or not; the event stays one."""
    fn = dist.Normal(torch.zeros(4, 3), 1.0).to_event(1)
    keep = torch.tensor([True, False, True])
    masked = wrappers.mask_elements(fn, keep)
    value = torch.randn(4, 3)
    expected = torch.where(keep, dist.Normal(0.0, 1.0).log_prob(value), 0.0).sum(-1)
    assert masked.event_shape == fn.event_shape
    assert torch.equal(masked.log_prob(value), expected)


def test_replace_base_keeps_the_wrappers_and_the_arguments() -> None:
    fn = dist.Normal(torch.zeros(4, 3), 2.0).to_event(1).mask(torch.tensor([True, False, True, True]))
    changed = wrappers.replace_base(fn, dist.Cauchy)
    value = torch.randn(4, 3)
    expected = dist.Cauchy(torch.zeros(4, 3), 2.0).to_event(1).log_prob(value)
    assert isinstance(compat.base_distribution(changed), dist.Cauchy)
    assert torch.equal(changed.log_prob(value)[[0, 2, 3]], expected[[0, 2, 3]])
    assert float(changed.log_prob(value)[1]) == 0.0
