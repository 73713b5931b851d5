"""Range search: degenerate input, the streaming histogram's promises, and the effect of chunk weights."""

import pytest
import torch

from qarvd_diffusers.calibration.ranges import RangeHistogram, search_rows, search_samples
from qarvd_diffusers.quantization import affine as P

PERCENTILES = (0.999, 0.9999, 0.99999)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("clamp", (False, True))
def test_degenerate_rows(bits, symmetric, clamp):
    x = torch.stack([torch.zeros(40), torch.full((40,), 0.5), torch.full((40,), -0.5), torch.randn(40)])
    scale, zero_point = search_rows(x, bits, PERCENTILES, symmetric=symmetric, clamp=clamp)
    back = P.fake_quantize(x, scale, zero_point, bits)
    assert bool(back.isfinite().all()) and bool((scale > 0).all())
    torch.testing.assert_close(back[:3], x[:3], rtol=1e-6, atol=0)


def test_an_empty_group_has_a_usable_quantizer():
    scale, zero_point = search_rows(torch.zeros(3, 0), 8, PERCENTILES, symmetric=True)
    assert torch.equal(scale, torch.ones(3, 1)) and torch.equal(zero_point, torch.full((3, 1), 128.0))


def test_search_rows_beats_the_full_range_on_heavy_tails():
    x = torch.randn(16, 4000, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 30.0
    scale, zero_point = search_rows(x, 4, (0.999, 1.0))
    full = P.affine_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), 4)
    error = P.mean_squared_error(x, P.fake_quantize(x, scale, zero_point, 4))
    assert bool((error < 0.7 * P.mean_squared_error(x, P.fake_quantize(x, *full, 4))).all())


def test_histogram_does_not_depend_on_order_and_merging_loses_nothing():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(500, generator=g) * scale + shift for scale, shift in ((0.01, 0), (1, 5), (40, -3), (0.1, 0))]
    histograms = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2)):
        histogram = RangeHistogram()
        for i in order:
            histogram.add(parts[i], weight=1.0 + i)
        histograms.append(histogram)
    first = histograms[0]
    assert int(first.counts.sum()) == 2000
    assert first.weighted.sum().item() == pytest.approx(1 + 2 + 3 + 4)
    everything = torch.cat(parts)
    assert (first.low, first.high) == (everything.min().item(), everything.max().item())
    assert first.high - first.low > first.width * RangeHistogram.BINS / 2 * 0.999
    for other in histograms[1:]:
        assert (first.width, first.start) == (other.width, other.start)
        assert torch.equal(first.counts, other.counts)
        torch.testing.assert_close(first.weighted, other.weighted)


def test_zeros_before_data_change_nothing():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first, last = RangeHistogram(), RangeHistogram()
    for histogram, parts in ((first, (torch.zeros(10), x)), (last, (x, torch.zeros(10)))):
        for part in parts:
            histogram.add(part, 1.0)
    assert (first.width, first.start) == (last.width, last.start)
    assert torch.equal(first.counts, last.counts)


@pytest.mark.parametrize(
    "x", [torch.zeros(10), torch.full((10,), 3.25), torch.tensor([1000.0, 1000.001]), torch.full((3,), 1e-37)]
)
@pytest.mark.parametrize("clamp", (False, True))
def test_constant_activations(x, clamp):
    histogram = RangeHistogram()
    histogram.add(x, 1.0)
    for scale, zero_point in (
        histogram.search(8, PERCENTILES, clamp=clamp),
        search_samples(x[None], torch.ones(1), 8, PERCENTILES, clamp=clamp),
    ):
        assert scale > 0 and scale.isfinite()
        torch.testing.assert_close(P.fake_quantize(x, scale, zero_point, 8), x, rtol=1e-5, atol=1e-37)


def test_chunk_weights_move_the_choice():
    """An outlier in a sample of little weight is clipped; in a sample of large weight it is kept."""
    g = torch.Generator().manual_seed(0)
    calm, wild = torch.randn(20000, generator=g), torch.randn(20000, generator=g)
    wild[:3] = 60.0
    scales = []
    for weight in (0.001, 10.0):
        histogram = RangeHistogram()
        histogram.add(calm, 1.0)
        histogram.add(wild, weight)
        scales.append(histogram.search(8, PERCENTILES)[0].item())
    assert scales[0] < 0.5 * scales[1]


def test_an_empty_histogram_is_refused():
    with pytest.raises(ValueError, match="the histogram is empty"):
        RangeHistogram().search(8, PERCENTILES)
