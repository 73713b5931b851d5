"""Round weights to one of their two neighbours by AdaRound (arXiv 2004.10568), with a learned activation step.

Rounding is relaxed to a soft choice per weight, trained by gradient descent on the layer's output error weighted by
chunk (arXiv 2605.21072, part S3) while a regulariser drives every choice to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization import affine as P
from .grid import WeightGrid
from .inputs import InputQuantizer, TokenQuantizer

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # the sigmoid is stretched, so that 0 and 1 are reached at finite values


@dataclass(frozen=True)
class AdaRoundSettings:
    """Set how the rounding is trained; the defaults are the paper's.

    Attributes:
        iterations: optimizer steps.
        batch_size: samples (transformer passes) per step.
        weight_lr: Adam's rate for the soft choices.
        input_lr: Adam's rate for the activation step, falling to 0 as a cosine; 0 leaves the step as it is.
        regularizer: weight of the term that makes choices hard.
        warm_up: share of the iterations without that term.
        temperature: its exponent at the end of the warm-up and at the last iteration.
    """

    iterations: int = 2000
    batch_size: int = 8
    weight_lr: float = 2e-3
    input_lr: float = 4e-5
    regularizer: float = 0.01
    warm_up: float = 0.2
    temperature: tuple[float, float] = (20.0, 2.0)


def adaround(
    weight: Tensor,
    grid: WeightGrid,
    samples: Sequence[Tensor],
    sample_weights: Tensor,
    quantizer: InputQuantizer | TokenQuantizer | None,
    batches: Tensor,
    settings: AdaRoundSettings = AdaRoundSettings(),
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, InputQuantizer | TokenQuantizer | None]:
    """Choose the codes of one weight, or of the stacked weights of layers that read one tensor.

    Args:
        weight: float32 `[N, K]`, columns in permuted order.
        grid: its scales and zero-points, which stay as they are.
        samples: S floats `[T_i, K]` on any device, the layer's inputs in permuted order.
        sample_weights: float32 `[S]`, factor of each sample's squared error.
        quantizer: quantizer of the inputs, or None for float activations.
        batches: integers `[iterations, batch]`, the samples of every step.
        settings: learning rates and regulariser; `batches` decides the number of steps and their size.
        on_step: called with the number of steps done and the step's reconstruction loss.

    Returns:
        Codes uint8 `[N, K]`, and the quantizer with its learned step.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weight = weight.detach().clone()
        rounding = _SoftRounding(weight, grid)
        optimizers, schedules = [torch.optim.Adam([rounding.alpha], lr=settings.weight_lr)], []
        if quantizer is not None:
            quantizer = quantizer.to(weight.device)
            if settings.input_lr and quantizer.learned:
                learned = [tensor.requires_grad_() for tensor in quantizer.learned]
                optimizers.append(torch.optim.Adam(learned, lr=settings.input_lr))
                schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], len(batches)))
        for step, batch in enumerate(batches.tolist(), start=1):
            x, row_weights = _rows([samples[i] for i in batch], sample_weights[batch], weight.device)
            quantized = x if quantizer is None else quantizer.straight_through(x)
            error = x @ weight.T - quantized @ rounding.soft_weight().T
            loss = (error.square() * row_weights).sum() / (len(batch) * len(weight))
            penalty = settings.regularizer * rounding.softness(_temperature(step, len(batches), settings))
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss + penalty).backward()
            for stepped in (*optimizers, *schedules):
                stepped.step()
            if on_step is not None:
                on_step(step, loss.item())
        return rounding.codes(), None if quantizer is None else quantizer.detach()


def _rows(samples: Sequence[Tensor], weights: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack the rows of some samples, float32 `[R, K]`, and the weight of each row, `[R, 1]`."""
    counts = torch.tensor([len(sample) for sample in samples])
    rows = torch.cat([sample.to(device, torch.float32) for sample in samples])
    return rows, weights.cpu().repeat_interleave(counts)[:, None].to(device)


def _temperature(step: int, steps: int, settings: AdaRoundSettings) -> float | None:
    """Compute the exponent of the regulariser at step 1, 2, ...; None during the warm-up."""
    warm_up = settings.warm_up * steps
    if step < warm_up:
        return None
    start, end = settings.temperature
    return end + (start - end) * max(0.0, 1 - (step - warm_up) / max(steps - warm_up, 1))


class _SoftRounding:
    """Choose softly between floor (0) and ceiling (1) of every weight, by `h(alpha)`."""

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        columns = grid.columns(weight.shape[1])
        self.scale, self.zero_point, self.low, self.high = columns.scale, columns.zero_point, columns.low, columns.high
        steps = weight / self.scale
        self.floor = steps.floor()
        fraction = (steps - self.floor - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.alpha = torch.logit(fraction).requires_grad_()

    def choice(self) -> Tensor:
        """Compute the soft choices, in `[0, 1]`."""
        return ((STRETCH_HIGH - STRETCH_LOW) * torch.sigmoid(self.alpha) + STRETCH_LOW).clamp(0, 1)

    def soft_weight(self) -> Tensor:
        """Compute the weight with soft choices, float32 `[N, K]`."""
        codes = (self.floor + self.choice() + self.zero_point).clamp(self.low, self.high)
        return P.dequantize(codes, self.scale, self.zero_point)

    def softness(self, exponent: float | None) -> Tensor | float:
        """Penalize choices that are not hard: largest halfway, 0 at 0 and 1."""
        return 0.0 if exponent is None else (1 - (2 * self.choice() - 1).abs().pow(exponent)).sum()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Compute the codes of the hard choices, uint8 `[N, K]`."""
        hard = self.floor + (self.alpha >= 0) + self.zero_point
        return hard.clamp(self.low, self.high).to(torch.uint8)
