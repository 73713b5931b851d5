"""The few-step scheduler against golden set B."""

from __future__ import annotations

import pytest
import torch

from qarvd_diffusers.schedulers import FewStepRenoiseScheduler
from qarvd_diffusers.schedulers.scheduling_few_step_renoise import shifted_noise_table

F32 = {"atol": 1e-6, "rtol": 0}


@pytest.fixture
def data(golden):
    return golden.file("B_scheduler.safetensors")


@pytest.fixture
def scheduler():
    return FewStepRenoiseScheduler()


def assert_within_one_ulp(actual, expected):
    assert actual.dtype == expected.dtype == torch.bfloat16
    steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    near_zero = (actual.float() - expected.float()).abs() < 1e-6  # ulps are not comparable across the sign
    assert ((steps <= 1) | near_zero).all()


@pytest.mark.parametrize(
    ("suffix", "steps", "shift"), [("", 1000, 5.0), ("_shift8", 1000, 8.0), ("_shift5_50steps", 50, 5.0)]
)
def test_golden_tables(data, suffix, steps, shift):
    sigmas, timesteps = shifted_noise_table(steps, shift)
    torch.testing.assert_close(sigmas, data[f"sigmas{suffix}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(timesteps, data[f"timesteps{suffix}"], rtol=1e-6, atol=0)


def test_golden_warped_steps(data):
    scheduler = FewStepRenoiseScheduler(denoising_timesteps=data["denoising_step_list_raw"].tolist())
    torch.testing.assert_close(scheduler.timesteps, data["denoising_step_list_warped"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["t_float", "t_int64"])
def test_golden_float32(data, scheduler, kind):
    timestep = data[kind]
    torch.testing.assert_close(scheduler._sigma(timestep), data["sigmas"][data[f"{kind}_index"]], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scheduler.add_noise(data["x0"], data["eps"], timestep), data[f"add_noise_{kind}"], **F32
    )
    original = scheduler.predict_original(data["flow"], timestep, data["eps"])
    torch.testing.assert_close(original, data[f"x0_from_flow_{kind}"], **F32)


def test_golden_flow_from_original(data, scheduler):
    for kind in ("t_float", "t_int64"):
        flow = scheduler.predict_flow(data["x0"], data[kind], data["eps"])
        if torch.allclose(flow, data["flow_from_x0"], atol=1e-6, rtol=1e-6):
            return
    pytest.fail("flow_from_x0 matches neither timestep list")


def test_golden_bf16(data, scheduler):
    def any_kind(function, expected):
        errors = []
        for kind in ("t_float", "t_int64"):
            try:
                return assert_within_one_ulp(function(data[kind]), expected)
            except AssertionError as error:
                errors.append(error)
        raise errors[0]

    any_kind(lambda t: scheduler.add_noise(data["x0_bf16"], data["eps_bf16"], t), data["add_noise_bf16"])
    any_kind(lambda t: scheduler.predict_original(data["flow_bf16"], t, data["xt_bf16"]), data["x0_from_flow_bf16"])
    any_kind(
        lambda t: scheduler.predict_original(data["flow_bf16"], t, data["eps"]),
        data["x0_from_flow_flowbf16_xtfloat32"],
    )


def test_first_chunk_list_and_plain_timesteps():
    scheduler = FewStepRenoiseScheduler((1000, 500), first_chunk_timesteps=(1000, 750, 500, 250))
    assert len(scheduler.timesteps) == 4
    scheduler.set_timesteps(chunk_index=1)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 833.3333]))
    plain = FewStepRenoiseScheduler((1000, 757, 522), warp_timesteps=False, timestep_shift=8.0)
    assert plain.timesteps.tolist() == [1000, 757, 522]
    torch.testing.assert_close(plain.sigmas, torch.tensor([1.0, 0.7567567, 0.5217391]))


def test_step_renoises_until_the_last(scheduler):
    sample, flow, noise = torch.randn(3, 2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    out = scheduler.step(flow, scheduler.timesteps[0], sample, noise=noise)
    torch.testing.assert_close(out.pred_original_sample, sample - flow)
    torch.testing.assert_close(out.prev_sample, 0.0625 * (sample - flow) + 0.9375 * noise)
    drawn = [scheduler.step(flow, 1000.0, sample, generator=torch.Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(*drawn)
    last = scheduler.step(flow, scheduler.timesteps[-1], sample)
    assert torch.equal(last.prev_sample, last.pred_original_sample)


def test_errors_name_the_remedy(scheduler):
    with pytest.raises(ValueError, match="distilled for 4 steps"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="not one of the scheduler's timesteps"):
        scheduler.step(torch.zeros(1), 123.0, torch.zeros(1))
    with pytest.raises(ValueError, match="cannot be warped"):
        FewStepRenoiseScheduler((999.5,))


def test_config_round_trip(tmp_path, scheduler):
    FewStepRenoiseScheduler((1000, 757, 522), warp_timesteps=False, timestep_shift=8.0).save_pretrained(tmp_path)
    assert FewStepRenoiseScheduler.from_pretrained(tmp_path).timesteps.tolist() == [1000, 757, 522]


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device():
    """Launching the next pass has to overlap the one before."""
    scheduler = FewStepRenoiseScheduler()
    sample, noise = torch.randn(2, 1, 4, 3, 8, 8, device="cuda", dtype=torch.bfloat16)
    want = scheduler.step(sample.cpu(), 1000.0, sample.cpu(), noise=noise.cpu(), return_dict=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = scheduler.step(sample, 1000.0, sample, noise=noise, return_dict=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for on_gpu, on_cpu in zip(got, want, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)
