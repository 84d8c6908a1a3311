"""Plans against the schedulers of diffusers, step by step, where the conventions coincide (docs/sampling.md)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import generate_linear_schedule
from ddpm_fast.engine import denoise
from ddpm_fast.samplers import make_plan

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

T, SHAPE = 1000, (2, 3, 4, 4)
ABAR = np.cumprod(1 - generate_linear_schedule(T, 1e-4, 0.02))
COMMON = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++", **KARRAS}

# The modules of those that draw noise.
DRAWING = {
    "DDPMScheduler": "scheduling_ddpm",
    "DDIMScheduler": "scheduling_ddim",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
}

# Theirs: name and settings; ours: name and options. In ten steps, so that even spacings have whole timesteps.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "DDPM": (
        "DDPMScheduler",
        {"clip_sample": False, "timestep_spacing": "leading"},
        "ddpm",
        {"variance": "posterior", "spacing": "leading"},
    ),
    "DDPM large, clipped": (
        "DDPMScheduler",
        {"variance_type": "fixed_large", "timestep_spacing": "linspace"},
        "ddpm",
        {"clip": True},
    ),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, "ddim", {"spacing": "leading"}),
    "DDIM to the first": (
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"},
        "ddim",
        {"spacing": "trailing", "final": "first"},
    ),
    "Euler": ("EulerDiscreteScheduler", {}, "euler", {"spacing": "linspace"}),
    "Euler, Karras": ("EulerDiscreteScheduler", KARRAS, "euler", {"spacing": "karras"}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, "ancestral_euler", {"spacing": "linspace"}),
    "Heun": ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}, "heun", {"spacing": "linspace"}),
    "Heun, Karras": ("HeunDiscreteScheduler", KARRAS, "heun", {"spacing": "karras"}),
    "DPM-Solver++(2M), Karras": ("DPMSolverMultistepScheduler", KARRAS, "dpmpp_2m", {}),
    "SDE-DPM-Solver++(2M), Karras": ("DPMSolverMultistepScheduler", SDE, "dpmpp_2m_sde", {}),
}


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Non-linear, different at each timestep; their multistep scheduler rounds what it tells."""
    time = torch.as_tensor(t, dtype=torch.float64).round().reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.8 * x + 0.1 * torch.sin(time))


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("case", CASES)
def test_step_by_step(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The state after every step, in their scale, from the same noise; their tables are float32."""
    theirs, settings, ours, options = CASES[case]
    scheduler = getattr(diffusers, theirs)(**COMMON, **settings)
    scheduler.set_timesteps(10)
    plan = make_plan(ours, ABAR, num_steps=10, options=options)
    told = plan.column("t").round().long().tolist()
    assert [round(float(t)) for t in scheduler.timesteps] == told
    noise = {k: torch.randn(SHAPE, dtype=torch.float64) for k in range(len(plan))}

    def theirs_at(k: int, sample: Tensor) -> Tensor:
        """Their sample, scaled as ours: what they tell a network."""
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or theirs.startswith("DPM"):
            return sample
        return sample / math.sqrt(1 + float(sigmas[k]) ** 2)

    x = torch.randn(SHAPE, dtype=torch.float64)
    sample = x if theirs_at(0, x) is x else x * math.sqrt(1 + float(scheduler.sigmas[0]) ** 2)
    states = []
    for k, t in enumerate(scheduler.timesteps):
        if theirs in DRAWING:
            monkeypatch.setattr(f"diffusers.schedulers.{DRAWING[theirs]}.randn_tensor", lambda *_, k=k, **__: noise[k])
        out = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(out, t, sample).prev_sample
        states.append(theirs_at(k + 1, sample))
    noisy = iter([noise[k] for k, c in enumerate(plan.column("c_z").tolist()) if c])
    monkeypatch.setattr(torch, "randn", lambda shape, dtype, device: next(noisy).to(dtype))
    seen: list[Tensor] = []
    denoise(network, x.clone(), plan, on_step=lambda k, x: seen.append(x.clone()))
    for k, (got, expected) in enumerate(zip(seen, states, strict=True)):
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max()), k
