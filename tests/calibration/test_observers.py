"""The streaming observer against the one that keeps everything."""

import pytest
import torch

from qarvd_diffusers.calibration.observers import InputObserver, ReferenceObserver
from qarvd_diffusers.calibration.outliers import OutlierSet

PERCENTILES = (0.999, 0.9999, 0.99999)


def inputs():
    """Twelve calls with two channels that are large, in reverse of what the outlier group holds."""
    g = torch.Generator().manual_seed(0)
    for call in range(12):
        x = torch.randn(1, 40, 16, generator=g)
        x[..., [3, 7]] *= 20 if call > 5 else 5
        yield x, (2.0, 0.5)[call // 6]


def outlier_set(count):
    order = torch.tensor([7, 3, *(c for c in range(16) if c not in (3, 7))], dtype=torch.int32)
    return OutlierSet(order if count else torch.arange(16, dtype=torch.int32), count, 0.0)


@pytest.mark.parametrize("count", (0, 2, 16))
def test_streaming_equals_keeping_everything(count):
    streaming, keeping = InputObserver(outlier_set(count)), ReferenceObserver(outlier_set(count))
    for x, weight in inputs():
        # the reference weighs chunks alike where there are outliers
        streaming.add(x, 1.0 if count else weight)
        keeping.add(x, weight)
    (scale, zero_point), (want_scale, want_zero_point) = (o.quantizer(PERCENTILES) for o in (streaming, keeping))
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    torch.testing.assert_close(scale, want_scale, rtol=1e-3, atol=0)
    assert bool(((zero_point - want_zero_point).abs() <= 1).all())
    if count == 2:
        assert scale[0] > 8 * scale[1]
    if count != 2:
        empty = 0 if count == 0 else 1
        assert scale[empty] == 1 and zero_point[empty] == 0


def test_batch_and_shape_do_not_matter():
    """A batch of samples, one by one, or as plain rows: the same quantizer."""
    calls = list(inputs())
    one_by_one, batched, rows = (InputObserver(outlier_set(2)) for _ in range(3))
    for x, _ in calls:
        one_by_one.add(x, 1.0)
        rows.add(x[0], 1.0)
    batched.add(torch.cat([x for x, _ in calls]), 1.0)
    want = one_by_one.quantizer(PERCENTILES)
    for other in (batched, rows):
        assert all(torch.equal(a, b) for a, b in zip(other.quantizer(PERCENTILES), want, strict=True))
