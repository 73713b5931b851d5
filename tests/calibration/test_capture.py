"""Input capture: who was called when, and which gaps are refused."""

import pytest
import torch
from torch import nn

from qarvd_diffusers.calibration.capture import InputCapture
from qarvd_diffusers.rollout.pass_info import PassInfo


class Net(nn.Module):
    """`q` and `k` read one tensor; `text` runs when it is asked to."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.text = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, text=False, k=True, copy=False):
        y = self.q(x)
        if k:
            y = y + self.k(input=x.clone() if copy else x)
        return self.text(torch.ones(1, 2, 4)) if text else y


def passes(chunks=2, context=False):
    infos = [PassInfo(-1, "context", 0, 0.0, 0, 3)] if context else []
    for chunk in range(chunks):
        offset = 3 * (chunk + context)
        infos += [PassInfo(chunk, "denoise", step, 999.0, offset, 3) for step in (0, 1)]
        infos.append(PassInfo(chunk, "refresh", 0, 0.0, offset, 3))
    return infos


def capture(net, infos, **when):
    """Run one pass per info; `when` gives forward's flags by pass index."""
    linears = {name: getattr(net, name) for name in ("q", "k", "text")}
    seen = []
    with InputCapture(linears, [("q", "k"), ("text",)], lambda g, x, info: seen.append((g, info))) as captured:
        for i, info in enumerate(infos):
            captured.on_pass(info)
            net(torch.randn(1, 3, 4), **{name: flag(i, info) for name, flag in when.items()})
    assert not any(module._forward_pre_hooks for module in net.modules())
    return captured, seen


@pytest.mark.parametrize("context", (False, True))
def test_every_pass_or_the_first_of_every_rollout(context):
    infos = passes(context=context) * 2  # two prompts
    captured, seen = capture(Net(), infos, text=lambda i, info: i % (len(infos) // 2) == 0)
    captured.check(range(2))
    assert [info for g, info in seen if g == 0] == infos
    assert len([g for g, _ in seen if g == 1]) == 2
    assert captured.calls("q")[(0, "denoise")] == 4 and captured.calls("k")[(1, "refresh")] == 2


def test_a_layer_that_never_ran():
    captured, _ = capture(Net(), passes())
    with pytest.raises(
        ValueError, match="text was never called in 6 calibration passes: add it to modules_to_not_convert"
    ):
        captured.check(range(2))


def test_a_layer_that_missed_a_pass():
    captured, _ = capture(Net(), passes(), text=lambda i, info: True, k=lambda i, info: i != 4)
    with pytest.raises(ValueError, match=r"k was not called as often.*5 of 6 passes.*chunk 1, denoise pass, step 1"):
        captured.check(range(2))


def test_tied_layers_must_read_the_same_tensor():
    with pytest.raises(ValueError, match="k does not read the same tensor as q: set tie_inputs=False"):
        capture(Net(), passes(), copy=lambda i, info: True)


def test_a_pass_over_several_chunks_is_divided_among_them():
    linear, seen = nn.Linear(4, 4), []
    info = PassInfo(1, "denoise", 0, 500.0, 0, 3, chunks=(0, 1, 1))
    with InputCapture({"q": linear}, [("q",)], lambda group, x, info: seen.append((x, info))) as captured:
        captured.on_pass(info)
        x = torch.randn(2, 6, 4)
        linear(x)
        linear(torch.randn(2, 0, 4))
    assert [(part.shape[0], place.chunk) for part, place in seen] == [(4, 0), (8, 1)]
    assert torch.equal(seen[0][0].reshape(2, 2, 4), x[:, :2])
    assert [place.share for _, place in seen] == pytest.approx([1 / 3, 2 / 3])
    captured.check(range(2))
