"""Chains of discrete states: log Z, the best path's log-density, or a drawn path, differentiable.

`chain_evidence` of log-potentials u_0, u_t and a_t (chain.py) is log Z; its gradient with respect to these is
the posterior of states and of pairs of neighbours. Eliminating by "max" or "sample" the gradient indicates the
best path, or one drawn from the posterior. Paths are traced back through maps: given the state at t+1,

    z_t = argmax_i δ_t(i) + a_{t+1}(i, z_{t+1})    or    z_t ~ α_t(i) exp a_{t+1}(i, z_{t+1}),

for every possible z_{t+1} and all t at once, δ_t being the best score of a path to it (two_level.py); only following
the maps is sequential.

log Z can be differentiated twice: the second time it is contracted as a tree of pairwise products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.evidence.chain import CELLS, ChainPosterior, smooth, steps_of_cells
from pyro_em.evidence.ring import Elimination, logsumexp
from pyro_em.evidence.two_level import MAX, Messages


def chain_evidence(start: Tensor, unary: Tensor, pair: Tensor, elimination: Elimination) -> Tensor:
    """Eliminate all states of B chains of N + 1 steps.

    :param start: log-potential of the first state, (B, S).
    :param unary: of the states after it, (N, B, S).
    :param pair: of neighbours, (N or 1, B or 1, S, S), from rows to columns.
    :returns: (B,), log Z for "sum" and "sample", the largest log-density for "max".
    """
    result: Tensor = _Eliminate.apply(start, unary, pair, elimination)
    return result


class _Eliminate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, unary: Tensor, pair: Tensor, elimination: Elimination) -> Tensor:
        ctx.elimination = elimination
        ctx.save_for_backward(start, unary, pair)
        states = torch.cat([start.unsqueeze(0), unary])
        if elimination == "max":
            ctx.path, value = best_path(states, pair)
            return value
        ctx.posterior = smooth(states, pair)
        return ctx.posterior.log_evidence.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        start, unary, pair = ctx.saved_tensors
        if ctx.elimination == "sum":
            if torch.is_grad_enabled():  # the gradient will be differentiated
                inputs = [x for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if needed]
                # Not `pulled_back`: the cotangent may depend on the inputs itself, through what the loop is part of.
                found = iter(torch.autograd.grad(_tree(start, unary, pair), inputs, gradient, create_graph=True))
                return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
            posterior: ChainPosterior = ctx.posterior
            states = posterior.unary * gradient.unsqueeze(-1)
            pairs = _weighted_pairs(posterior, gradient, pair)
        else:
            path = ctx.path if ctx.elimination == "max" else drawn_path(ctx.posterior)
            states = torch.nn.functional.one_hot(path, start.shape[-1]).to(gradient) * gradient.unsqueeze(-1)
            pairs = (states[:-1].unsqueeze(-1) * (states[1:] != 0).unsqueeze(-2)).sum_to_size(pair.shape)
        return states[0], states[1:], pairs, None


def _weighted_pairs(found: ChainPosterior, gradient: Tensor, pair: Tensor) -> Tensor:
    if pair.shape[:2] == (1, 1):
        return found.total_pairs(gradient.expand(len(found.left), -1)).reshape(pair.shape)
    return (found.pairs() * gradient[:, None, None]).sum_to_size(pair.shape)


def _tree(start: Tensor, unary: Tensor, pair: Tensor) -> Tensor:
    """log Z as a tree of products of neighbouring pairs, differentiable any number of times."""
    links = pair + unary.unsqueeze(-2)
    while len(links) > 1:
        odd = links[len(links) // 2 * 2 :]
        left, right = links[0 : len(links) - len(odd) : 2], links[1::2]
        links = torch.cat([logsumexp(left.unsqueeze(-2) + right.mT.unsqueeze(-3)), odd])
    last = links[0] + start.unsqueeze(-1)
    return logsumexp(last.flatten(-2))


def best_path(unary: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Most probable paths (T, B), as state numbers, and their log-densities (B,) (Viterbi 1967).

    :param unary: log-potentials of the states, (T, B, S).
    :param pair: of neighbours, (T-1 or 1, B or 1, S, S).
    """
    T, B, S = unary.shape
    if T == 1:
        value, path = unary.max(-1)
        return path, value[0]
    scores, _ = Messages(MAX, unary[0], unary[1:], pair).forward_and_backward(backward=False)
    maps = torch.empty(T - 1, B, S, dtype=torch.int32)
    chunk = max(1, CELLS // (B * S * S))
    for begin in range(0, T - 1, chunk):
        end = min(begin + chunk, T - 1)
        step = pair if len(pair) == 1 else pair[begin:end]
        maps[begin:end] = (scores[begin:end].unsqueeze(-2) + step.mT).argmax(-1).to(torch.int32)
    path = followed(maps, scores[-1].argmax(-1))
    chains, times = torch.arange(B), torch.arange(T).unsqueeze(-1)
    value = unary[times, chains, path].sum(0)
    links = pair[0 if len(pair) == 1 else times[:-1], 0 if pair.shape[1] == 1 else chains, path[:-1], path[1:]]
    return path, value + links.sum(0)


def drawn_path(posterior: ChainPosterior) -> Tensor:
    """One path (T, B) of every chain, drawn from its posterior."""
    last = _draw(posterior.unary[-1])
    maps = torch.empty_like(posterior.left, dtype=torch.int32)
    for begin, end in steps_of_cells(posterior.left, posterior.table):
        maps[begin:end] = _draw(posterior.before(begin, end)).to(torch.int32)
    return followed(maps, last)


def _draw(weights: Tensor) -> Tensor:
    """Index along the last dim, with probability proportional to the weights (0 where all are zero)."""
    cumulative = weights.cumsum(-1)
    level = torch.rand(weights.shape[:-1], dtype=weights.dtype) * cumulative[..., -1]
    # Strictly above: an entry of weight zero is never drawn.
    return (cumulative <= level.unsqueeze(-1)).sum(-1).clamp(max=weights.shape[-1] - 1)


def followed(maps: Tensor, last: Tensor) -> Tensor:
    """Paths (T, B) from the last state (B,) and the maps (T-1, B, S) from a state to the one before it."""
    table = maps.cpu().numpy()
    chains = np.arange(table.shape[1])
    path = np.empty((len(table) + 1, table.shape[1]), dtype=np.int64)
    path[-1] = last.cpu().numpy()
    if table.shape[1] == 1:
        state = int(last[0])
        for t, row in zip(range(len(table) - 1, -1, -1), reversed(table[:, 0].tolist()), strict=True):
            state = path[t, 0] = row[state]
    else:
        for t in range(len(table) - 1, -1, -1):
            path[t] = table[t, chains, path[t + 1]]
    return torch.as_tensor(path, device=last.device)
