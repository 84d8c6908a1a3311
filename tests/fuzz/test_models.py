"""Networks and their layers: what they are built from, and the fused path against the plain one."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm_fast import (
    AttentionBlock,
    Downsample,
    PositionalEmbedding,
    ResidualBlock,
    UNet,
    Upsample,
    get_norm,
    ops,
)

from .harness import REFUSED, SMALL, Draw, attempt, fuzz, often, one, spoilt, tensor

SIDES = st.sampled_from((1, 2, 4, 6, 8, 3, 0))
NORMS = ("gn", "in", "bn", None, "ln")


def plain(module: nn.Module) -> nn.Module:
    """A copy in which nothing is fused: a hook on every submodule, which sees nothing and changes nothing."""
    module = copy.deepcopy(module)
    for m in module.modules():
        m.register_forward_hook(lambda *_: None)
    return module


SHAKES = 8  # with two pixels every second one moves both alike, and a norm doesn't see it


def shaken_result(module: nn.Module, inputs: dict[str, Any], eps: float, seed: int) -> Tensor:
    """The result where what every layer takes is one rounding off: a norm over few pixels multiplies that."""
    generator = torch.Generator().manual_seed(seed)

    def shaken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1 + eps * (2 * torch.randint(0, 2, value.shape, generator=generator) - 1))

    net = plain(module).double()
    for layer in net.modules():
        layer.register_forward_pre_hook(lambda _, taken: tuple(map(shaken, taken)))
    result: Tensor = net(**inputs)
    return result


def matches(module: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether forward took its arguments; then its result is that of the plain path in float64, up to rounding.

    What rounds is bounded by the plain path's own error, and as that is small by luck in few numbers, by 64 roundings.
    """
    if any(isinstance(v, Tensor) and v.is_meta for v in inputs.values()):
        return False  # on another device than the weights: torch says so
    result = attempt(module, **inputs)
    if result is REFUSED:
        return False
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    try:
        truth = plain(module).double()(**exact)
        own = plain(module)(**inputs)
    except (ValueError, IndexError) as error:  # torch's own norms of a single pixel, or of no image
        assert "more than 1" in str(error) or "index 0" in str(error)
        return True
    assert result.shape == truth.shape and result.dtype == own.dtype
    if not all(bool((v.abs() < 1e9).all()) for v in exact.values() if isinstance(v, Tensor) and v.dtype != torch.bool):
        return True  # it overflows, sooner in one order of the sums than in another
    known = truth.isfinite() & own.isfinite()
    assert bool(result[truth.isnan() & own.isnan()].isnan().all())
    if known.any():
        top = float(truth[known].abs().max())
        eps = torch.finfo(own.dtype).eps
        error = float((result[known] - truth[known]).abs().max())
        allowed = 4 * float((own[known] - truth[known]).abs().max()) + 64 * eps * max(top, 1e-3)
        if error > allowed:
            shaken = torch.stack([shaken_result(module, exact, eps, seed) for seed in range(SHAKES)])
            allowed += 64 * float((shaken - truth)[:, known].abs().max())
        assert error <= allowed
    return True


def images(draw: Draw, channels: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor(draw, (one(draw, 1, 2, 3, 0), channels, draw(SIDES), draw(SIDES)), dtype)


@fuzz(150)
def test_get_norm(draw: Draw) -> bool:
    groups = draw(SMALL)
    args = {"norm": one(draw, *NORMS), "num_channels": groups * draw(SMALL), "num_groups": groups}
    return attempt(get_norm, **spoilt(draw, args)) is not REFUSED


@fuzz(250)
def test_positional_embedding(draw: Draw) -> bool:
    args = spoilt(draw, {"dim": draw(st.integers(1, 12)), "scale": one(draw, 1.0, 0.5, 1000)})
    layer = attempt(PositionalEmbedding, **args)
    if layer is REFUSED:
        return False
    x = spoilt(draw, {"x": tensor(draw, (draw(SMALL),), torch.float32)})["x"]
    result = attempt(layer, x, names=("t",))
    if result is REFUSED:
        return False
    expected = ops.timestep_embedding(x, int(args["dim"]), float(args["scale"])).float()
    assert result.is_meta or torch.equal(result.nan_to_num(), expected.nan_to_num())
    return True


@fuzz(350)
def test_resampling_and_attention(draw: Draw) -> bool:
    kind, channels = one(draw, Downsample, Upsample, AttentionBlock), draw(SMALL)
    args = {"in_channels": channels}
    if kind is AttentionBlock:
        args |= {"norm": one(draw, *NORMS), "num_groups": one(draw, 1, channels, 2)}
    layer = attempt(kind, **(args if often(draw, 3) else spoilt(draw, args)))
    if layer is REFUSED:
        return False
    return matches(layer.eval(), spoilt(draw, {"x": images(draw, channels)}))


@fuzz(500)
def test_residual_block(draw: Draw) -> bool:
    c, k, classes, emb = draw(SMALL), draw(SMALL), one(draw, None, 3), one(draw, None, 4)
    args = {"in_channels": c, "out_channels": k, "dropout": one(draw, 0, 0.5, 1.0), "time_emb_dim": emb}
    args |= {"num_classes": classes, "norm": one(draw, *NORMS), "num_groups": one(draw, 1, c, k)}
    args |= {"activation": one(draw, F.relu, F.silu, F.mish, torch.tanh), "use_attention": one(draw, True, False)}
    block = attempt(ResidualBlock, **(args if often(draw, 4) else spoilt(draw, args)))
    if block is REFUSED:
        return False
    x = images(draw, c)
    inputs = {"x": x, "time_emb": None if emb is None else tensor(draw, (len(x), 4), torch.float32)}
    inputs["y"] = torch.zeros(len(x), dtype=torch.int64) + draw(st.integers(0, 3)) if classes else None
    return matches(block.eval(), spoilt(draw, inputs))


@fuzz(200)
def test_unet_arguments(draw: Draw) -> bool:
    return attempt(UNet, **spoilt(draw, unet(draw))) is not REFUSED


def unet(draw: Draw) -> dict[str, Any]:
    groups = one(draw, 1, 2)
    args = {"img_channels": one(draw, 1, 2, 3), "base_channels": groups * one(draw, 2, 3), "num_groups": groups}
    args |= {"channel_mults": one(draw, (1,), (1, 2), [2, 1, 1]), "num_res_blocks": one(draw, 0, 1)}
    args |= {"time_emb_dim": one(draw, None, 4, 5), "num_classes": one(draw, None, 3), "norm": one(draw, *NORMS)}
    args |= {"attention_resolutions": one(draw, (), (0,), (1, 7)), "initial_pad": one(draw, 0, 1, 2)}
    return args | {"activation": one(draw, F.relu, F.silu, torch.tanh), "dropout": one(draw, 0, 0.1)}


@fuzz(450)
def test_unet(draw: Draw) -> bool:
    args = unet(draw)
    net = attempt(UNet, **args)
    if net is REFUSED:
        return False
    x = images(draw, args["img_channels"])
    inputs: dict[str, Any] = {"x": x, "time": torch.arange(len(x)), "y": torch.zeros(len(x), dtype=torch.int64)}
    inputs["y"] += draw(st.integers(0, 3))
    return matches(net.eval(), spoilt(draw, inputs))
