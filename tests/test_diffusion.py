"""Against diffusers' DPMSolverMultistepScheduler with PixArt-Σ's config, and closed forms.

Tolerance of trajectories: 1e-5 of the norm; both work in float32, in different variables.
"""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from dit.config import SchedulerConfig
from dit.diffusion import add_noise, alphas_sigmas, dpm_solver, noise_error, sampling_timesteps
from sparsecode import UserError

SCHEDULE = SchedulerConfig()
# scheduler_config.json of the released PixArt-Σ, with all that it spells out.
RELEASED = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000,
                algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="epsilon",
                lower_order_final=True, euler_at_final=False, use_karras_sigmas=False, use_lu_lambdas=False,
                thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0, steps_offset=0,
                timestep_spacing="linspace", variance_type=None, trained_betas=None)  # fmt: skip


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def noise(seed=0):
    return torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(seed))


def curved(x, t):
    """A prediction of noise that depends on place and time in a way no solver gets exactly right."""
    return torch.tanh(x + 0.3 * x.roll(1, 3)) * (0.5 + t / 1000)


@pytest.mark.parametrize("change", [{}, {"beta_end": 0.012, "num_train_timesteps": 400}])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 20, 50])
def test_trajectory_equals_diffusers(steps, change):
    scheduler, schedule = DPMSolverMultistepScheduler(**RELEASED | change), SchedulerConfig(**change)
    scheduler.set_timesteps(steps)
    x, count = noise(), 0
    for (t, ours, _), expected_t in zip(dpm_solver(curved, noise(), steps, schedule), scheduler.timesteps, strict=True):
        x = scheduler.step(curved(x, expected_t), expected_t, x).prev_sample
        assert t == expected_t
        assert relative(ours, x) < 1e-5
        count += 1
    assert count == steps


def test_timesteps_equal_diffusers_for_all_numbers_of_steps():
    scheduler = DPMSolverMultistepScheduler(**RELEASED)
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)
        assert sampling_timesteps(steps, SCHEDULE).tolist() == scheduler.timesteps.tolist()
    assert sampling_timesteps(20, SCHEDULE).tolist() == [999, 949, 899, 849, 799, 749, 699, 649, 599, 549,
                                               500, 450, 400, 350, 300, 250, 200, 150, 100, 50]  # fmt: skip


def test_most_steps():
    assert sampling_timesteps(999, SCHEDULE).tolist() == list(range(999, 0, -1))
    for steps in (0, -1, 1000):
        with pytest.raises(UserError, match="expected 1 to 999"):
            sampling_timesteps(steps, SCHEDULE)


def test_a_perfect_model_recovers_its_picture():
    """For a single picture y the true noise is (x − α y) / σ, and the flow to y is exact for any number of steps."""
    y, (alphas, sigmas) = noise(1), alphas_sigmas(SCHEDULE)
    for steps in (1, 2, 7):
        for t, x, x0 in dpm_solver(lambda x, t: (x - alphas[t] * y) / sigmas[t], noise(), steps, SCHEDULE):
            # x − σ ε is divided by α, 0.006 at t = 999, which magnifies the rounding of float32 (6e-8) to 1e-5.
            assert relative(x0, y) < 5e-5
        assert torch.equal(x, x0)


def test_second_order_beats_first():
    """Halving the steps' length must cut the error by about 4, where a first-order solver would halve it.

    For pictures from N(0, 0.5² I) the best prediction is linear, ε = σ x / (0.25 α² + σ²), and the flow is known:
    x shrinks with the standard deviation of its distribution.
    """
    alphas, sigmas = (table.double() for table in alphas_sigmas(SCHEDULE))

    def spread(t):
        return (0.25 * alphas[t] ** 2 + sigmas[t] ** 2) ** 0.5

    def error(steps):
        path = dpm_solver(lambda x, t: (sigmas[t] / spread(t) ** 2).float() * x, noise(), steps, SCHEDULE)
        halfway = [x for _, x, _ in path][steps // 2 - 1].double()  # at t = 500, well before σ = 0
        return relative(halfway, noise().double() * spread(500) / spread(999))

    assert 3.3 < error(20) / error(40) < 4.7


def test_the_solver_keeps_float32_whatever_the_model():
    kinds = []

    def model(x, t):
        kinds.append(x.dtype)
        return x * 0.1

    for _, x, x0 in dpm_solver(model, noise().bfloat16(), 3, SCHEDULE):
        assert x.dtype == x0.dtype == torch.float32
    assert kinds == [torch.bfloat16] * 3


@pytest.mark.parametrize("beta_end", [0.02, 0.012])
def test_noise_equals_diffusers(beta_end):
    scheduler, t = DDPMScheduler(beta_start=0.0001, beta_end=beta_end, beta_schedule="linear"), torch.tensor([3, 998])
    ours = add_noise(noise(1), noise(2), t, SchedulerConfig(beta_end=beta_end))
    torch.testing.assert_close(ours, scheduler.add_noise(noise(1), noise(2), t), atol=1e-6, rtol=0)


def test_schedule():
    alphas, sigmas = alphas_sigmas(SCHEDULE)
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(alphas.double() ** 2, np.cumprod(1 - betas), rtol=1e-4)  # 1000 products in float32
    np.testing.assert_allclose(alphas.double() ** 2 + sigmas.double() ** 2, 1, atol=2e-7)


def test_loss_is_the_error_of_the_first_channels():
    t, text, mask = torch.tensor([10, 700]), torch.randn(2, 3, 5), torch.ones(2, 3)

    def model(x, timesteps, text_given, mask_given):
        assert text_given is text and mask_given is mask and timesteps is t
        torch.testing.assert_close(x, add_noise(noise(1), noise(2), t, SCHEDULE))
        wrong_by = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        return torch.cat([noise(2) + wrong_by, torch.full((2, 4, 6, 10), 99.0)], dim=1)

    errors = noise_error(model, noise(1), t, noise(2), text, mask, SCHEDULE)
    torch.testing.assert_close(errors, torch.tensor([1.0, 9.0]))


def test_no_function_has_a_schedule_of_its_own():
    for function in (alphas_sigmas, add_noise, noise_error, sampling_timesteps, dpm_solver):
        assert inspect.signature(function).parameters["schedule"].default is inspect.Parameter.empty


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += {x.device.type for x in (*args[:2], result) if isinstance(x, torch.Tensor)} == {"cpu", "meta"}
        return result


def test_no_table_is_copied_to_the_device_in_each_step():
    """The meta device stands for a GPU: what is on the CPU has to be copied there."""
    alphas_sigmas.cache_clear()
    x, t = noise().to("meta"), torch.tensor([1, 2], device="meta")
    counts = []
    for _ in range(2):
        with Copies() as copies:
            add_noise(x, x, t, SCHEDULE)
            assert len(list(dpm_solver(lambda x, t: x, x, 4, SCHEDULE))) == 4
        counts.append(copies.count)
    assert counts == [2, 0]  # both tables once


def test_a_schedule_made_in_inference_mode_serves_training():
    alphas_sigmas.cache_clear()
    with torch.inference_mode():
        add_noise(noise(1), noise(2), torch.tensor([1, 2]), SCHEDULE)
    latents = noise(1).requires_grad_()
    *_, (_, _, x0) = dpm_solver(lambda x, t: 0.5 * x, latents, 1, SCHEDULE)
    x0.sum().backward()
    alphas, sigmas = alphas_sigmas(SCHEDULE)
    torch.testing.assert_close(latents.grad, ((1 - 0.5 * sigmas[999]) / alphas[999]).expand_as(latents))


def test_the_released_config_is_read_and_others_are_refused():
    assert SchedulerConfig.from_dict({"_class_name": "DPMSolverMultistepScheduler", **RELEASED}) == SchedulerConfig()
    for change in (dict(prediction_type="v_prediction"), dict(beta_schedule="scaled_linear"), dict(solver_order=3),
                   dict(use_karras_sigmas=True), dict(timestep_spacing="trailing")):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(change))):
            SchedulerConfig.from_dict(RELEASED | change)


def test_our_scheduler_config_is_read_by_diffusers(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(SchedulerConfig().to_json())
    theirs = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    expected = DPMSolverMultistepScheduler(**RELEASED)
    assert {k: v for k, v in theirs.config.items() if k[0] != "_"} == {
        k: v for k, v in expected.config.items() if k[0] != "_"
    }
