"""The drop-in contract: numbers, names, checkpoints and random draws of the original DDPM code (docs/dropin.md)."""

import inspect
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast
from benchmarks import original
from ddpm_fast import Diffusion, UNet, generate_linear_schedule

GOLDEN = torch.load(Path(__file__).parent / "data" / "upstream_ddpm.pt", weights_only=True)
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "mish": F.mish}

pytestmark = pytest.mark.filterwarnings("ignore:this state_dict does not say")


def golden_unet(cfg: dict[str, Any]) -> UNet:
    return UNet(
        cfg["img"], cfg["base"], tuple(cfg["mults"]), cfg["nrb"], cfg["temb"], cfg["scale"], cfg["ncls"],
        ACTIVATIONS[cfg["act"]], 0.1, tuple(cfg["attn"]), cfg["norm"], cfg["groups"], cfg["pad"],
    )  # fmt: skip


def golden_diffusion(case: dict[str, Any], **options: Any) -> Diffusion:
    cfg = case["cfg"]
    options = {"rng": "torch"} | options
    size = (cfg["size"], cfg["size"])
    diffusion = Diffusion(golden_unet(cfg), size, cfg["img"], cfg["ncls"], case["betas"], cfg["loss"], **options)
    diffusion.load_state_dict(case["state"])
    return diffusion.eval()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.fixture(params=sorted(GOLDEN))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return GOLDEN[request.param]


def test_initial_weights_under_the_seed(case) -> None:
    torch.manual_seed(case["seed"])
    total = sum(p.double().abs().sum().item() for p in golden_unet(case["cfg"]).parameters())
    assert total == pytest.approx(case["init_abs_sum"], rel=1e-7)


def test_state_dict_is_strictly_loadable_both_ways(case) -> None:
    diffusion = golden_diffusion(case)
    ours = diffusion.state_dict()
    assert list(ours) == list(case["state"])
    assert all(torch.equal(ours[k], v) for k, v in case["state"].items())
    peer = original.Diffusion(
        golden_unet(case["cfg"]), diffusion.img_size, diffusion.img_channels, None, case["betas"].numpy()
    )
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded._metadata[""]["ddpm_fast"]["step"] == 0  # it travels, and nobody minds it
    peer.load_state_dict(loaded, strict=True)


@torch.no_grad()
def test_networks_and_single_steps(case) -> None:
    diffusion, x, t, y = golden_diffusion(case), case["x"], case["t"], case["y"]
    assert error(diffusion.model(x, t, y), case["eps"]) < 1e-5
    assert error(diffusion.ema_model(x, t, y), case["eps_ema"]) < 1e-5
    assert error(diffusion.perturb_x(case["x0"], t, x), case["perturb"]) < 1e-5
    assert error(diffusion.remove_noise(x, t, y), case["remove"]) < 1e-5


def test_loss_and_gradients(case) -> None:
    diffusion = golden_diffusion(case)
    torch.manual_seed(7)
    loss = diffusion(case["x0"], case["y"])
    loss.backward()
    assert error(loss.detach(), case["loss"]) < 1e-4
    assert case["grads"]
    for name, parameter in diffusion.model.named_parameters():
        norm, first = case["grads"][name]
        assert float(parameter.grad.norm()) == pytest.approx(float(norm), rel=1e-4, abs=1e-7), name
        assert float((parameter.grad.flatten()[:8] - first).abs().max()) <= 1e-4 * float(norm) + 1e-7, name


def test_samples(case) -> None:
    diffusion = golden_diffusion(case)
    for name, use_ema in (("sample", True), ("sample_noema", False)):
        torch.manual_seed(11)
        assert error(diffusion.sample(3, "cpu", y=case["y"], use_ema=use_ema), case[name]) < 1e-5
    torch.manual_seed(11)
    sequence = diffusion.sample_diffusion_sequence(3, "cpu", y=case["y"])
    assert len(sequence) == case["seq_len"]
    assert error(sequence[len(sequence) // 2], case["seq_mid"]) < 1e-5
    assert error(sequence[-1], case["sample"]) < 1e-5


def test_ema(case) -> None:
    diffusion = golden_diffusion(case, ema_decay=0.9, ema_start=2, ema_update_rate=1)
    pointers = [p.data_ptr() for p in diffusion.ema_model.parameters()]
    for _ in range(4):
        with torch.no_grad():
            for parameter in diffusion.model.parameters():
                parameter.mul_(1.01)
        diffusion.update_ema()
    averaged = diffusion.ema_model.state_dict()
    for key, total in case["ema_after"].items():
        assert float(averaged[key].abs().sum()) == pytest.approx(float(total), rel=1e-5, abs=1e-7), key
    assert pointers == [p.data_ptr() for p in diffusion.ema_model.parameters()], "the average must stay in place"


# What else the constructor takes, against a plain re-implementation: (options, height and width, why).
PLAIN_CASES = [
    ({"norm": "in"}, (8, 8), "instance norm"),
    ({"norm": "bn", "activation": F.silu}, (8, 8), "batch norm"),
    ({"norm": None, "activation": F.mish}, (8, 8), "no norm"),
    ({"activation": F.mish, "time_emb_dim": None}, (8, 8), "mish, no time embedding"),
    ({"activation": torch.tanh, "num_classes": 5}, (8, 8), "an activation that no op knows"),
    ({"activation": F.gelu, "norm": "in", "attention_resolutions": (0, 1)}, (8, 8), "attention on each level"),
    ({"initial_pad": 1, "attention_resolutions": (0,)}, (6, 10), "padding, not square"),
    ({"channel_mults": (1, 2, 3), "num_res_blocks": 2, "num_groups": 1}, (12, 4), "three levels, one group"),
    ({"time_emb_scale": 0.25, "activation": F.silu, "num_res_blocks": 0}, (2, 2), "no blocks on the way, tiny"),
]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("options", "size", "why"), PLAIN_CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("train", [False, True])
def test_against_the_plain_formulation(float64, options, size, why, train) -> None:
    kwargs = {
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "time_emb_dim": 12,
        "num_groups": 4,
        "dropout": 0.2,
    } | options
    nets = []
    for cls in (original.UNet, UNet):
        torch.manual_seed(3)
        nets.append(cls(2, 8, **kwargs).train(train))
    plain, ours = nets
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
    x, t = torch.randn(3, 2, *size), torch.randint(0, 1000, (3,)).double()
    y = torch.randint(0, 5, (3,)) if options.get("num_classes") else None
    outs, grads = [], []
    for net in nets:
        torch.manual_seed(5)  # dropout draws the same masks
        out = net(x, t, y)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        outs.append(out.detach())
        grads.append({k: p.grad for k, p in net.named_parameters()})
    # In float64 nothing but rounding is left, whatever the condition of a norm over few numbers.
    assert error(outs[1], outs[0]) < 1e-9
    scale = max(float(g.abs().max()) for g in grads[0].values())
    for key, gradient in grads[0].items():
        assert float((grads[1][key] - gradient).abs().max()) < 1e-9 * scale, key
    if options.get("norm") == "bn":
        statistics = [k for k in plain.state_dict() if "running" in k]
        assert statistics
        assert all(torch.allclose(plain.state_dict()[k], ours.state_dict()[k], rtol=1e-5) for k in statistics)


def test_training_draws_what_the_original_draws() -> None:
    """Timesteps, noise and dropout from torch's generator in the original order: equal losses over several steps."""
    runs = []
    for module, options in ((original, {}), (ddpm_fast, {"rng": "torch"})):
        torch.manual_seed(0)
        net = module.UNet(1, 8, (1, 2), 1, time_emb_dim=8, num_groups=4, dropout=0.3)
        diffusion = module.Diffusion(
            net, (8, 8), 1, None, generate_linear_schedule(10, 1e-2, 0.2), ema_start=2, **options
        )
        optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = diffusion(torch.rand(4, 1, 8, 8))
            loss.backward()
            optimizer.step()
            diffusion.update_ema()
            losses.append(float(loss.detach()))
        runs.append((losses, diffusion, optimizer.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    # The original's optimizer state fits ours, by position and shape.
    optimizer = torch.optim.Adam(runs[1][1].parameters(), 1e-3)
    optimizer.load_state_dict(runs[0][2])
    parameters = list(runs[1][1].parameters())
    for index, state in optimizer.state_dict()["state"].items():
        assert state["exp_avg"].shape == parameters[index].shape
    theirs, ours = (run[2]["state"] for run in runs)
    assert set(theirs) == set(ours)
    for index in theirs:
        assert torch.allclose(theirs[index]["exp_avg"], ours[index]["exp_avg"], rtol=1e-3, atol=1e-5), index


def test_the_scripts_network() -> None:
    from ddpm_fast import script_utils

    diffusion = script_utils.get_diffusion_from_args(
        script_utils.argparse.Namespace(schedule_low=1e-4, schedule_high=0.02)
    )
    net = diffusion.model
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    blocks = [m for m in net.modules() if isinstance(m, ddpm_fast.ResidualBlock)]
    assert len(blocks) == 22
    keys = set(net.state_dict())
    assert {"downs.2.downsample.weight", "ups.11.upsample.1.bias", "downs.3.attention.to_qkv.bias"} <= keys
    assert {"ups.10.attention.norm.weight", "mid.0.attention.to_out.weight", "ups.14.conv_2.1.weight"} <= keys
    assert diffusion.ema_start == 2000 and diffusion.num_classes == 10 and net.num_classes is None
    # Ancestors of the parameters, in order: old optimizer files go by index.
    tops = list(dict.fromkeys(name.split(".")[0] for name, _ in net.named_parameters()))
    assert tops == ["time_mlp", "init_conv", "downs", "ups", "mid", "out_norm", "out_conv"]


SIGNATURES = {
    "Diffusion": "model img_size img_channels num_classes betas loss_type='l2' ema_decay=0.9999 ema_start=5000 "
    "ema_update_rate=1",
    "UNet": "img_channels base_channels channel_mults=(1, 2, 4, 8) num_res_blocks=2 time_emb_dim=None "
    "time_emb_scale=1.0 num_classes=None activation=relu dropout=0.1 attention_resolutions=() norm='gn' "
    "num_groups=32 initial_pad=0",
    "ResidualBlock": "in_channels out_channels dropout time_emb_dim=None num_classes=None activation=relu norm='gn' "
    "num_groups=32 use_attention=False",
    "AttentionBlock": "in_channels norm='gn' num_groups=32",
    "Downsample": "in_channels",
    "Upsample": "in_channels",
    "PositionalEmbedding": "dim scale=1.0",
    "get_norm": "norm num_channels num_groups",
    "EMA": "decay",
    "generate_cosine_schedule": "T s=0.008",
    "generate_linear_schedule": "T low high",
    "Diffusion.forward": "self x y=None",
    "Diffusion.get_losses": "self x t y",
    "Diffusion.perturb_x": "self x t noise",
    "Diffusion.remove_noise": "self x t y use_ema=True",
    "Diffusion.sample": "self batch_size device y=None use_ema=True",
    "Diffusion.sample_diffusion_sequence": "self batch_size device y=None use_ema=True",
    "Diffusion.update_ema": "self",
    "UNet.forward": "self x time=None y=None",
    "EMA.update_average": "self old new",
    "EMA.update_model_average": "self ema_model current_model",
    "utils.extract": "a t x_shape",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    import ddpm_fast.utils  # noqa: F401 - a submodule that the package does not load

    thing: Any = ddpm_fast
    for part in name.split("."):
        thing = getattr(thing, part)
    parameters = inspect.signature(thing).parameters.values()
    shown = []
    for p in parameters:
        default = getattr(p.default, "__name__", None) or repr(p.default)
        shown.append(p.name if p.default is p.empty else f"{p.name}={default}")
    expected = SIGNATURES[name]
    assert " ".join(shown).startswith(expected)
    extra = list(parameters)[len(expected.replace(", ", ",").split()) :]
    assert name == "UNet.forward" or all(p.kind is p.KEYWORD_ONLY for p in extra), "what is ours comes as keyword only"


def test_module_names() -> None:
    from ddpm_fast.diffusion import GaussianDiffusion
    from ddpm_fast.ema import EMA
    from ddpm_fast.unet import UNet as same
    from ddpm_fast.utils import extract

    assert GaussianDiffusion is Diffusion and same is UNet and EMA is ddpm_fast.EMA
    table, t = torch.arange(5.0), torch.tensor([4, 0])
    assert torch.equal(extract(table, t, (2, 3, 4, 4)), torch.tensor([4.0, 0.0]).view(2, 1, 1, 1))


def test_tables() -> None:
    betas = generate_linear_schedule(50, 1e-3, 0.3)
    net = UNet(1, 4, (1,), 1, num_groups=1)
    diffusion = Diffusion(net, (4, 4), 1, None, betas)
    alphas = 1 - betas
    abar = np.cumprod(alphas)
    expected = {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": abar,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "reciprocal_sqrt_alphas": np.sqrt(1 / alphas),
        "remove_noise_coeff": betas / np.sqrt(1 - abar),
        "sigma": np.sqrt(betas),
    }
    assert list(diffusion.state_dict())[:8] == list(expected)
    for name, table in expected.items():
        buffer = getattr(diffusion, name)
        assert buffer.dtype == torch.float32 and np.array_equal(buffer.numpy(), table.astype(np.float32)), name


def test_only_a_file_that_was_loaded_warns() -> None:
    case = next(iter(GOLDEN.values()))
    diffusion, wrong = golden_diffusion(case), {**case["state"], "extra": torch.zeros(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="extra"):
            diffusion.load_state_dict(wrong)
    with pytest.warns(UserWarning, match="does not say how often") as seen:
        diffusion.load_state_dict(wrong, strict=False)
    assert len(seen) == 1 and seen[0].filename == __file__
    outer = torch.nn.Sequential(diffusion)
    with pytest.warns(UserWarning, match="does not say how often") as seen:
        outer.load_state_dict({f"0.{key}": value for key, value in case["state"].items()})
    assert len(seen) == 1 and seen[0].filename == __file__


def test_an_old_file_without_step_warns_unless_told() -> None:
    case = next(iter(GOLDEN.values()))
    diffusion = golden_diffusion(case, ema_start=100)
    with pytest.warns(UserWarning, match=r"load_state_dict\(..., step=N\)"):
        diffusion.load_state_dict(case["state"])
    assert diffusion.step == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.load_state_dict(case["state"], step=500)
    assert diffusion.step == 500
    before = [p.clone() for p in diffusion.ema_model.parameters()]
    diffusion.update_ema()
    for old, new, raw in zip(before, diffusion.ema_model.parameters(), diffusion.model.parameters(), strict=True):
        assert torch.allclose(new, old + (raw - old) * 1e-4, atol=1e-7), "averaged, not overwritten"
