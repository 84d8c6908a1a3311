"""The benchmark's original formulation reproduces numbers made by running the original code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.original import Diffusion, UNet

GOLDEN = torch.load(Path(__file__).parent / "data" / "upstream_ddpm.pt", weights_only=True)
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "mish": F.mish}


def build_unet(cfg: dict) -> UNet:
    return UNet(
        cfg["img"], cfg["base"], tuple(cfg["mults"]), cfg["nrb"], cfg["temb"], cfg["scale"], cfg["ncls"],
        ACTIVATIONS[cfg["act"]], 0.1, tuple(cfg["attn"]), cfg["norm"], cfg["groups"], cfg["pad"],
    )  # fmt: skip


def build(case: dict, **ema: float) -> Diffusion:
    cfg = case["cfg"]
    size = (cfg["size"], cfg["size"])
    diffusion = Diffusion(build_unet(cfg), size, cfg["img"], cfg["ncls"], case["betas"].numpy(), cfg["loss"], **ema)
    diffusion.load_state_dict(case["state"], strict=True)
    return diffusion.eval()


def error(got: Tensor, expected: Tensor) -> float:
    """Relative error, in the 2-norm."""
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(params=sorted(GOLDEN))
def case(request) -> dict:
    return GOLDEN[request.param]


def test_initial_weights_under_the_seed(case):
    torch.manual_seed(case["seed"])
    net = build_unet(case["cfg"])
    total = sum(p.abs().sum().item() for p in net.parameters())
    assert total == pytest.approx(case["init_abs_sum"], rel=1e-6)


def test_state_dict_has_the_original_order(case):
    assert list(build(case).state_dict()) == list(case["state"])


@torch.no_grad()
def test_networks_and_single_steps(case):
    diffusion, x, t, y = build(case), case["x"], case["t"], case["y"]
    assert error(diffusion.model(x, t, y), case["eps"]) < 1e-5
    assert error(diffusion.ema_model(x, t, y), case["eps_ema"]) < 1e-5
    assert error(diffusion.perturb_x(case["x0"], t, x), case["perturb"]) < 1e-6
    assert error(diffusion.remove_noise(x, t, y), case["remove"]) < 1e-5


def test_loss_and_gradients(case):
    diffusion = build(case)
    torch.manual_seed(7)
    loss = diffusion(case["x0"], case["y"])
    loss.backward()
    assert error(loss, case["loss"]) < 1e-5
    gradients = {name: p.grad for name, p in diffusion.model.named_parameters()}
    assert set(gradients) == set(case["grads"])
    for name, (norm, first) in case["grads"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        assert torch.allclose(gradients[name].flatten()[:8], first, rtol=1e-3, atol=1e-6), name


def test_samples_and_sequence(case):
    diffusion, n = build(case), len(case["x"])
    for key, use_ema in (("sample", True), ("sample_noema", False)):
        torch.manual_seed(11)
        assert error(diffusion.sample(n, "cpu", case["y"], use_ema), case[key]) < 1e-5
    torch.manual_seed(11)
    sequence = diffusion.sample_diffusion_sequence(n, "cpu", case["y"])
    assert len(sequence) == case["seq_len"]
    assert error(sequence[len(sequence) // 2], case["seq_mid"]) < 1e-5
    assert error(sequence[-1], case["sample"]) < 1e-5


def test_ema(case):
    diffusion = build(case, ema_decay=0.9, ema_start=2, ema_update_rate=1)
    for _ in range(4):
        with torch.no_grad():
            for p in diffusion.model.parameters():
                p.mul_(1.01)
        diffusion.update_ema()
    for key, expected in case["ema_after"].items():
        assert diffusion.ema_model.state_dict()[key].abs().sum().item() == pytest.approx(expected, rel=1e-5), key


def test_the_script_defaults_give_the_published_size():
    with torch.device("meta"):
        net = UNet(3, 128, (1, 2, 2, 2), time_emb_dim=512, activation=F.silu, attention_resolutions=(1,))
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
