"""What a network is told and given beside x_t: noise levels between timesteps, an image."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import BETAS, Pixelwise, pixelwise

from ddpm_fast import Diffusion, TrainStep, UNet, generate_linear_schedule
from ddpm_fast.ops import NoiseState
from ddpm_fast.reference import noise as reference
from ddpm_fast.reference.philox import LEVELS, PERTURB
from ddpm_fast.samplers import make_plan
from ddpm_fast.schedules import zero_terminal_snr

ABAR = np.cumprod(1 - BETAS)


def test_noise_levels() -> None:
    """Told a, drawn between neighbours; the image is perturbed at just that level, and the loss's target, too."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Asks(Pixelwise):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append((x, t))
            return super().forward(x, t, y)

    diffusion = Diffusion(Asks(), (5, 7), 2, None, BETAS, time_input="noise_level", prediction="v", seed=4).train()
    x = torch.randn(500, 2, 5, 7)
    loss = diffusion(x)
    x_t, told = seen[0]
    state = NoiseState.at(4, 1)
    t = reference.timesteps(500, 12, state)
    u = (reference.timesteps(500, 2**31, state, LEVELS).double() + 0.5) / 2**31
    edges = torch.from_numpy(np.append(1.0, ABAR))
    abar = edges[t] + u * (edges[t + 1] - edges[t])
    torch.testing.assert_close(told.double(), abar.sqrt(), rtol=1e-6, atol=0)
    a, s = (v.sqrt().view(-1, 1, 1, 1) for v in (abar, 1 - abar))
    noise = reference.noise(x.shape, state, PERTURB).double()
    torch.testing.assert_close(x_t.double(), a * x + s * noise, rtol=1e-5, atol=1e-5)
    out = 0.3 * x_t.double() + 0.001 * told.double().view(-1, 1, 1, 1)
    assert float(loss) == pytest.approx(float(((out - (a * noise - s * x)) ** 2).mean()), rel=1e-5)
    seen.clear()
    diffusion.loss_of(diffusion.model, x[:12], torch.arange(12), None, noise[:12].float())
    torch.testing.assert_close(seen[0][1].double(), torch.from_numpy(np.sqrt(ABAR)), rtol=1e-6, atol=0)
    seen.clear()
    images = diffusion.sample(2, "cpu", seed=1)
    levels = torch.stack([told[0] for _, told in seen]).double()
    torch.testing.assert_close(levels, torch.from_numpy(np.sqrt(ABAR[::-1].copy())), rtol=1e-6, atol=0)
    assert images.isfinite().all()
    x0_hat, v = diffusion.pred_x_start(x[:2], torch.tensor([3, 4]))
    assert v is None and x0_hat.shape == (2, 2, 5, 7) and seen[-1][1].tolist() == pytest.approx(np.sqrt(ABAR[3:5]))


def test_noise_levels_in_float64() -> None:
    diffusion = pixelwise(time_input="noise_level").double().train()
    assert diffusion(torch.randn(3, 2, 5, 7, dtype=torch.float64)).dtype == torch.float64
    ended = zero_terminal_snr(generate_linear_schedule(50, 1e-3, 0.2))
    plan = make_plan("ddim", np.cumprod(1 - ended), "v", 1).told_noise_levels()
    assert plan.timesteps("cpu").dtype == torch.float32 and plan.timesteps("cpu").tolist() == [0.0]


def test_an_embedding_for_timesteps_is_warned_of() -> None:
    build = lambda scale: UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, time_emb_scale=scale)  # noqa: E731
    with pytest.warns(UserWarning, match="can hardly tell noise levels, 0 to 1, apart: .* time_emb_scale=1000"):
        Diffusion(build(1.0), (8, 8), 1, None, BETAS, time_input="noise_level")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Diffusion(build(1000.0), (8, 8), 1, None, BETAS, time_input="noise_level")


def test_an_image_condition() -> None:
    """Beside x_t, in training, in a whole training step and in sampling."""
    torch.manual_seed(0)
    net = UNet(3, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, out_channels=1, dropout=0.0)
    diffusion = Diffusion(net, (8, 8), 1, None, BETAS, cond_channels=2, seed=1).train()
    x, cond = torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss = diffusion(x, cond=cond)
    assert torch.equal(inputs[0][:, 1:], cond)
    diffusion.calls = 0
    step = TrainStep(diffusion, torch.optim.SGD(net.parameters(), lr=0.0), accumulate=2)
    step(x, cond=cond)
    assert torch.equal(inputs[1][:, 1:], cond[:2]) and torch.equal(inputs[2][:, 1:], cond[2:])
    images = diffusion.sample(4, "cpu", cond=cond, seed=1)
    parts = [diffusion.sample(2, "cpu", cond=cond[k : k + 2], seed=1, first_index=k) for k in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), images)
    assert not torch.allclose(diffusion.sample(4, "cpu", cond=-cond, seed=1), images)
    mean = diffusion.remove_noise(x, torch.tensor([3] * 4), None, cond=cond)
    assert mean.shape == x.shape and loss.isfinite()
