"""Diffusions whose chains are recorded, or that say why not, beside eager ones."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from toys import BETAS

from ddpm_fast import Diffusion, UNet, ops


def network(**options) -> UNet:
    torch.manual_seed(0)
    kwargs = {
        "img_channels": 1,
        "base_channels": 8,
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "time_emb_dim": 8,
        "num_groups": 4,
        "attention_resolutions": (1,),
        "activation": nn.functional.silu,
    }
    return UNet(**kwargs | options)


def pair(net: nn.Module | None = None, **options) -> tuple[Diffusion, Diffusion]:
    """The same diffusion that replays, and that doesn't; both on the ops that the tape can see."""
    net = network() if net is None else net
    make = lambda engine: Diffusion(net, (8, 8), 1, options.get("num_classes"), BETAS, engine=engine)  # noqa: E731
    return make("graph"), make("eager")


def same(graph: Diffusion, eager: Diffusion, size: int = 2, **options) -> None:
    """Both give the same bits."""
    with ops.use_backend("reference"):
        assert torch.equal(graph.sample(size, "cpu", **options), eager.sample(size, "cpu", **options))


def eagerly(diffusion: Diffusion, match: str, **options) -> Tensor:
    """Sample, and see the reason why that was eager; it is said once."""
    with pytest.warns(UserWarning, match=match):
        images = diffusion.sample(2, "cpu", seed=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(diffusion.sample(2, "cpu", seed=1, **options), images)
    return images
