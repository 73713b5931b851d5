"""Closed-form rounding: codes and scales that minimise a layer's output error, given the second moments of its inputs.

The error of quantized weights Q in place of W, summed over inputs x, is `sum_rows (w - q) H (w - q)^T` with `H = sum x x^T`
(here every x is weighted by its chunk). All functions take columns in permuted order and work on all rows at once.

GPTQ (arXiv 2210.17323) rounds column after column and lets the columns to come make up for the error; coordinate descent
(QuantEase, arXiv 2309.01885) then revisits every code, and the scales are refitted by least squares in between.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..quantization import affine as P
from .grid import WeightGrid

BLOCK = 128  # columns whose updates to later columns are gathered into one product
DAMPING = 0.01  # share of H's mean diagonal added to it


def damped(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """H plus a share of its mean diagonal: a channel that was always zero, or a copy of another, is no singularity."""
    mean = moments.diagonal().mean()
    ridge = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    return moments + ridge * torch.eye(len(moments), device=moments.device, dtype=moments.dtype)


def output_error(weight: Tensor, values: Tensor, moments: Tensor) -> Tensor:
    """Weighted squared output error per row, `[N]`."""
    error = weight - values
    return ((error @ moments) * error).sum(1)


def compensated_codes(weight: Tensor, moments: Tensor, grid: WeightGrid) -> Tensor:
    """GPTQ, columns of large moments first.

    Args:
        weight: float32 `[N, K]`.
        moments: float32 `[K, K]`, positive definite (`damped`).
        grid: scales and zero-points.

    Returns:
        Codes `[N, K]`, as floats.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    ordered = moments[order][:, order].to(torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    scale, zero_point = (grid.columns(each, weight.shape[1])[:, order] for each in (grid.scale, grid.zero_point))
    rest, codes = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for j in range(block.start, block.stop):
            s, z = scale[:, j], zero_point[:, j]
            codes[:, j] = P.quantize(rest[:, j], s, z, grid.bits)
            error = (rest[:, j] - P.dequantize(codes[:, j], s, z)) / factor[j, j]
            rest[:, j : block.stop] -= error[:, None] * factor[j, j : block.stop]
            errors[:, j - start] = error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes[:, order.argsort()]


def descended_codes(codes: Tensor, weight: Tensor, moments: Tensor, grid: WeightGrid) -> Tensor:
    """One sweep of coordinate descent: every code in turn takes its best value given all others.

    Args:
        codes: `[N, K]`, as floats, to start from.
        weight, moments, grid: see `compensated_codes`.

    Returns:
        Codes `[N, K]` whose error is not larger.
    """
    scale, zero_point = (grid.columns(each, weight.shape[1]) for each in (grid.scale, grid.zero_point))
    codes, values = codes.clone(), P.dequantize(codes, scale, zero_point)
    slope = (weight - values) @ moments
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        before, near = values[:, block].clone(), slope[:, block].clone()
        for j in range(block.start, block.stop):
            best = values[:, j] + near[:, j - start] / moments[j, j]
            codes[:, j] = P.quantize(best, scale[:, j], zero_point[:, j], grid.bits)
            value = P.dequantize(codes[:, j], scale[:, j], zero_point[:, j])
            near -= (value - values[:, j])[:, None] * moments[j, block]
            values[:, j] = value
        slope -= (values[:, block] - before) @ moments[block]
    return codes


def refitted_grid(codes: Tensor, weight: Tensor, moments: Tensor, grid: WeightGrid) -> WeightGrid:
    """The scales that suit given codes best: per row a least-squares problem in the scales of its groups.

    A scale that would not be positive stays as it is.
    """
    steps = codes - grid.columns(grid.zero_point, codes.shape[1])
    parts = torch.zeros(2, *steps.shape, device=steps.device)
    for g, (part, source) in enumerate(zip(parts, grid.split(steps), strict=True)):
        columns = slice(0, grid.num_outliers) if g == 0 else slice(grid.num_outliers, None)
        part[:, columns] = source
    products = parts @ moments  # [2, N, K]
    gram = torch.einsum("gnk,hnk->ngh", products, parts)
    # An empty or all-zero group leaves a zero on the diagonal: a tiny ridge keeps the system solvable.
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    gram = gram + ridge[:, None, None] * torch.eye(2, device=gram.device)
    target = torch.einsum("gnk,nk->ng", products, weight) + ridge[:, None] * grid.scale
    scale = torch.linalg.solve(gram, target)
    usable = scale.isfinite() & (scale > 0.25 * grid.scale) & (scale < 4 * grid.scale)
    return dataclasses.replace(grid, scale=torch.where(usable, scale, grid.scale))


def compensate(weight: Tensor, moments: Tensor, grid: WeightGrid, rounds: int = 3) -> tuple[Tensor, WeightGrid]:
    """GPTQ, then `rounds` times: refit the scales, one sweep of coordinate descent.

    Args:
        weight: float32 `[N, K]`.
        moments: float32 `[K, K]`, positive semi-definite.
        grid: scales and zero-points to start from.
        rounds: 0 is GPTQ alone.

    Returns:
        Codes uint8 `[N, K]` and the grid they belong to.
    """
    moments = damped(moments)
    codes = compensated_codes(weight, moments, grid)
    for _ in range(rounds):
        grid = refitted_grid(codes, weight, moments, grid)
        codes = descended_codes(codes, weight, moments, grid)
    return codes.to(torch.uint8), grid
