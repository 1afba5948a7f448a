"""Families that consist of linear-Gaussian sites: what the M-step asks of an argument is asked of its site.

    v_g | s_g ~ N(M_g s_g + o_g, Σ_g),    g the sites of a chain (its first state, its transition, its observation)

Every argument is the matrix M, the offset ("loc") o or the noise of one site. Their moments stand one after the other,
each as `pack` wrote them (linear_gaussian.py). M and o of a site are quadratic jointly, given the noise.

Not handled: arguments that several sites share (statistics of ties are added by the caller).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pyro_em.families.base import Arguments, Family, Moments
from pyro_em.families.linear_gaussian import NOISE, PACKED, LinearSite, unpack
from pyro_em.kernels import Kernel, PowerKernel

MATRIX, OFFSET = "matrix", "loc"


class LinearSites(Family):
    """See the module docstring."""

    transposed: ClassVar[bool]
    """Matrices as Pyro writes them: the new state is s M."""
    first_state: ClassVar[str]
    """The site whose noise is where a chain begins."""

    @abstractmethod
    def belongs(self, argument: str) -> tuple[str, str]:
        """The site of an argument, and what it is there: `MATRIX`, `OFFSET` or one of `NOISE`."""

    @abstractmethod
    def sites(self, args: Arguments) -> Sequence[str]:
        """In the order of their moments."""

    @abstractmethod
    def affine(self, site: str, args: Arguments) -> tuple[Tensor, Tensor]:
        """M and o in column convention; a site without parents has an M without columns."""

    def site(self, name: str, args: Arguments, moments: Moments) -> LinearSite:
        """A site with its moments and current arguments."""
        place = self.sites(args).index(name) * PACKED
        noise = {n: args[f"{name}.{n}"].double() for n in NOISE if f"{name}.{n}" in args}
        return unpack(moments[place : place + PACKED], *self.affine(name, args), noise)

    def is_noise(self, argument: str) -> bool:
        return self.belongs(argument)[0] != self.first_state

    def expected_log_density(self, args: Arguments, moments: Moments) -> Tensor:
        total = [self.site(name, args, moments).expected_log_density().sum() for name in self.sites(args)]
        return torch.stack(total).sum()

    def kernel(self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None) -> Kernel | None:
        name, part = self.belongs(argument)
        site = self.site(name, args, moments)
        if part == MATRIX:
            return site.matrix_kernel(self.transposed)
        return site.offset_kernel() if part == OFFSET else site.noise_kernel(part)

    def couples(self, one: str, other: str) -> bool:
        (site, part), (site_2, part_2) = self.belongs(one), self.belongs(other)
        return site == site_2 and {part, part_2} <= {MATRIX, OFFSET}

    def cross_precision(self, one: str, other: str, moments: Moments, args: Arguments) -> Tensor:
        name, part = self.belongs(one)
        site = self.site(name, args, moments)
        if one == other:
            kernel = site.offset_kernel() if part == OFFSET else site.matrix_kernel(self.transposed)
            return kernel.precision
        cross = site.cross_precision(self.transposed)
        return cross.mT if part == OFFSET else cross

    def diagonal_kernel(
        self, argument: str, moments: Moments, args: Arguments, center: Tensor | None = None
    ) -> PowerKernel | None:
        name, part = self.belongs(argument)
        return self.site(name, args, moments).diagonal_noise_kernel(part) if part in NOISE else None

    def block_kernel(self, argument: str, block: Tensor, moments: Moments, args: Arguments) -> Kernel | None:
        name, part = self.belongs(argument)
        return self.site(name, args, moments).noise_kernel(part, block) if part in NOISE else None
