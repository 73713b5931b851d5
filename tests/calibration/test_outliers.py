"""Outlier channels: planted ones are found, whatever the rest of the norms look like."""

import pytest
import torch

from qarvd_diffusers.calibration.outliers import aligned_count, column_norms, find_outliers, min_noise_split


def planted(columns=96, outliers=(5, 40, 41), gain=8.0, spread=0.05):
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(64, columns, generator=g), dim=0)
    weight *= 1 + spread * torch.randn(columns, generator=g)
    weight[:, list(outliers)] *= gain
    return weight


@pytest.mark.parametrize("method", ("mad_zscore", "iqr"))
@pytest.mark.parametrize("spread", (0.05, 0.0))
def test_planted_outliers_are_found(method, spread):
    """With spread 0 the median absolute deviation is about zero, and the reference implementation finds nothing."""
    found = find_outliers([planted(spread=spread)], method)
    assert found.num_outliers == 3
    assert found.channel_order[:3].tolist() == [5, 40, 41]
    assert found.channel_order[3:].tolist() == [c for c in range(96) if c not in (5, 40, 41)]


def test_no_outliers_keeps_the_order():
    for method, gain in (("mad_zscore", 1.0), ("iqr", 1.0), ("none", 8.0)):
        found = find_outliers([planted(gain=gain)], method, alignment=32)
        assert found.num_outliers == 0
        assert torch.equal(found.channel_order, torch.arange(96, dtype=torch.int32))
    assert find_outliers([torch.zeros(4, 8)], "mad_zscore").num_outliers == 0


def test_alignment_takes_the_next_largest_and_caps_at_half():
    weight = planted()
    found = find_outliers([weight], "mad_zscore", alignment=32)
    assert found.num_outliers == 32
    norms = column_norms([weight])[found.channel_order.long()]
    assert norms[:32].min() >= norms[32:].max()
    assert find_outliers([weight], "mad_zscore", alignment=128).num_outliers == 48
    assert [aligned_count(n, 32, 96) for n in (0, 1, 32, 33)] == [0, 32, 32, 48]


def test_tied_layers_share_the_outliers_of_the_stack():
    q, k = planted(outliers=(3,)), planted(outliers=(60,))
    found = find_outliers([q, k], "mad_zscore")
    assert found.channel_order[: found.num_outliers].tolist() == [3, 60]
    torch.testing.assert_close(column_norms([q, k]), torch.cat([q, k]).norm(dim=0))


def test_unknown_method():
    with pytest.raises(ValueError, match="outlier method is 'zscore', expected 'mad_zscore'"):
        find_outliers([planted()], "zscore")


def noise(weight, low, high, channels, num_outliers):
    """Expected rounding error, up to a factor, from the definition."""
    total = 0.0
    for part in (channels[:num_outliers], channels[num_outliers:]):
        if len(part):
            span = high[part].clamp(min=0).max() - low[part].clamp(max=0).min()
            total += (span.double().square() * weight[:, part].double().square().sum()).item()
    return total


@pytest.mark.parametrize("alignment", (1, 4, 64))
def test_the_min_noise_split(alignment):
    """No split by magnitude or by norm is quieter, and one is found where there is something to gain."""
    g = torch.Generator().manual_seed(0)
    weight, high = planted(columns=32, outliers=(5, 20)), torch.rand(32, generator=g).exp()
    high[[3, 9]], low = 40.0, -torch.rand(32, generator=g)
    found = min_noise_split([weight], low, high, alignment)
    assert sorted(found.channel_order.tolist()) == list(range(32))
    assert found.num_outliers == 16 if alignment == 64 else found.num_outliers % alignment == 0
    got = noise(weight, low, high, found.channel_order.long(), found.num_outliers)
    for key in (torch.maximum(high, -low), column_norms([weight])):
        order = key.argsort(descending=True, stable=True)
        for count in range(0, 17, min(alignment, 16)):
            assert got <= noise(weight, low, high, order, count) * (1 + 1e-6)
    assert got < 0.3 * noise(weight, low, high, torch.arange(32), 0)
    if alignment < 64:  # otherwise half of the channels is all there is to choose
        assert {3, 9} <= set(found.channel_order[: found.num_outliers].tolist())


def test_the_min_noise_split_of_channels_that_are_alike():
    found = min_noise_split([torch.ones(8, 32)], -torch.ones(32), torch.ones(32), 4)
    assert found.num_outliers == 0 and found.channel_order.tolist() == list(range(32))
    assert min_noise_split([torch.ones(8, 32)], -torch.ones(32), torch.ones(32), 4, at_least=5).num_outliers == 8
    assert min_noise_split([torch.zeros(8, 32)], torch.zeros(32), torch.zeros(32), 4).num_outliers == 0
