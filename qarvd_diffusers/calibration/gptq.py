"""Round in closed form: choose codes and scales that minimise a layer's output error, given the Hessian of its inputs.

The error of quantized weights Q in place of W, summed over inputs x, is `sum_rows (w - q) H (w - q)^T` with `H = sum x
x^T` (here every x is weighted by its chunk). All functions take columns in permuted order and process all rows at
once.

GPTQ (arXiv 2210.17323) rounds column after column and compensates each error in the columns that are left; coordinate
descent (QuantEase, arXiv 2309.01885) then revisits every code, and the scales are refitted by least squares in
between.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .grid import WeightGrid

BLOCK = 128  # columns whose updates of later columns are one product
DAMPING = 0.01  # share of H's mean diagonal added to it


def dampen_hessian(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Add a share of its mean diagonal to H, which keeps H invertible for channels that are zero or equal."""
    mean = hessian.diagonal().mean()
    ridge = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    return hessian + ridge * torch.eye(len(hessian), device=hessian.device, dtype=hessian.dtype)


def gptq_codes(weight: Tensor, hessian: Tensor, grid: WeightGrid) -> Tensor:
    """Round by GPTQ, columns with a large diagonal of H first.

    Args:
        weight: float32 `[N, K]`.
        hessian: float32 `[K, K]`, positive definite (`dampen_hessian`).
        grid: scales and zero-points.

    Returns:
        Codes `[N, K]`, as floats.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    ordered = hessian[order][:, order].to(torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
    columns = grid.columns(weight.shape[1]).take(order)
    rest, codes = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for j in range(block.start, block.stop):
            column = columns.take(j)
            codes[:, j] = column.quantize(rest[:, j])
            error = (rest[:, j] - column.dequantize(codes[:, j])) / factor[j, j]
            rest[:, j : block.stop] -= error[:, None] * factor[j, j : block.stop]
            errors[:, j - start] = error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes[:, order.argsort()]


def descended_codes(codes: Tensor, weight: Tensor, hessian: Tensor, grid: WeightGrid) -> Tensor:
    """Sweep once by coordinate descent: every code in turn takes its best value given all others.

    Args:
        codes: `[N, K]`, as floats, to start from.
        weight, hessian, grid: see `gptq_codes`.

    Returns:
        Codes `[N, K]` whose error is not larger.
    """
    columns = grid.columns(weight.shape[1])
    codes, values = codes.clone(), columns.dequantize(codes)
    slope = (weight - values) @ hessian
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        before, near = values[:, block].clone(), slope[:, block].clone()
        for j in range(block.start, block.stop):
            best = values[:, j] + near[:, j - start] / hessian[j, j]
            column = columns.take(j)
            codes[:, j] = column.quantize(best)
            value = column.dequantize(codes[:, j])
            near -= (value - values[:, j])[:, None] * hessian[j, block]
            values[:, j] = value
        slope -= (values[:, block] - before) @ hessian[block]
    return codes


def refitted_grid(codes: Tensor, weight: Tensor, hessian: Tensor, grid: WeightGrid) -> WeightGrid:
    """Fit the scales to codes: per row a least-squares problem in the scales of its groups.

    A scale that would change by more than a factor of 4 stays as it is.
    """
    steps = grid.steps(codes)
    parts = torch.zeros(2, *steps.shape, device=steps.device)
    for g, (part, source) in enumerate(zip(parts, steps.tensor_split([grid.num_outliers], dim=-1), strict=True)):
        columns = slice(0, grid.num_outliers) if g == 0 else slice(grid.num_outliers, None)
        part[:, columns] = source
    products = parts @ hessian  # [2, N, K]
    gram = torch.einsum("gnk,hnk->ngh", products, parts)
    # An empty or all-zero group has a zero on the diagonal: a tiny ridge keeps the system solvable.
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    gram = gram + ridge[:, None, None] * torch.eye(2, device=gram.device)
    target = torch.einsum("gnk,nk->ng", products, weight) + ridge[:, None] * grid.scale
    scale = torch.linalg.solve(gram, target)
    usable = scale.isfinite() & (scale > 0.25 * grid.scale) & (scale < 4 * grid.scale)
    return dataclasses.replace(grid, scale=torch.where(usable, scale, grid.scale))


def compensate(weight: Tensor, hessian: Tensor, grid: WeightGrid, rounds: int = 3) -> tuple[Tensor, WeightGrid]:
    """Round by GPTQ, then `rounds` times: refit the scales, one sweep of coordinate descent.

    Args:
        weight: float32 `[N, K]`.
        hessian: float32 `[K, K]`, positive semi-definite.
        grid: scales and zero-points to start from.
        rounds: 0 is GPTQ alone.

    Returns:
        Codes uint8 `[N, K]` and the grid they belong to.
    """
    hessian = dampen_hessian(hessian)
    codes = gptq_codes(weight, hessian, grid)
    for _ in range(rounds):
        grid = refitted_grid(codes, weight, hessian, grid)
        codes = descended_codes(codes, weight, hessian, grid)
    return codes.to(torch.uint8), grid
