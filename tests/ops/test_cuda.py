"""The CUDA kernels without a GPU: built by a C++ compiler for a machine that csrc/cuda/host stands in for.

The first test builds them under sanitizers and runs the others, which need the module, in a process that has these loaded.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import check, laid_out
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, REVERSE, Dropout, NoiseState
from ddpm_fast.reference import group_norm_silu as norm_reference
from ddpm_fast.reference import sampler_step as step_reference

ROOT = Path(__file__).parents[2]
MODULE = os.environ.get("DDPM_TEST_CUDA_HOST")
STATE = NoiseState.at(-5, 7, 2**33 + 1)
PARAMETERS = ("weight", "bias", "add", "scale", "shift")
inside = pytest.mark.skipif(MODULE is None, reason="needs the sanitizers: the test that builds the kernels runs it")

if MODULE is not None:
    spec = importlib.util.spec_from_file_location("ddpm_fast._cuda", MODULE)
    assert spec is not None and spec.loader is not None
    sys.modules["ddpm_fast._cuda"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from ddpm_fast.kernels.cuda import group_norm_silu as kernels

# (N, C1, C2, H, W, groups): why
NORMS = [
    (2, 16, 0, 4, 4, 4),  # plain
    (1, 24, 0, 5, 3, 2),  # groups of 12, an odd number of pixels: clusters of other sizes
    (2, 16, 8, 3, 3, 2),  # a group of 12 straddles the two inputs
    (1, 80, 40, 3, 5, 40),  # two slabs of 64 channels, in bfloat16; the second one isn't full
    (1, 20, 0, 3, 5, 4),  # five channels a group, vectors in float32 alone
    (1, 6, 3, 2, 3, 9),  # a group a channel, no vectors
    (3, 16, 0, 1, 1, 4),  # one pixel
]
CUTS = {"rule": 0, "1 block": 1, "2 blocks": 2, "4 blocks": 4, "8 blocks": 8, "two launches": -3}


def cut_as(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces a cluster of some size, or chunks of two launches; where elements don't lie in vectors, always those."""
    rule, parts = kernels.rule, CUTS[name]

    def chosen(direction: str, of: Any, vectors: bool, device: int) -> Any:
        found = rule(direction, of, vectors, device)
        pixels = of.x.shape[2] * of.x.shape[3]
        some = -(-pixels // abs(parts or 1))
        one_pass = vectors and parts > 0
        return found if not parts else found._replace(pixels=some, chunks=-(-pixels // some), one_pass=one_pass)

    monkeypatch.setattr(kernels, "rule", chosen)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_norm(
    cut: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, poison_empty: None
) -> None:
    """Every argument at once, then without a sum."""
    n, c1, c2, height, width, groups = shape
    cut_as(cut, monkeypatch)
    c = c1 + c2
    made = {"x": (n, c1, height, width), "x2": (n, c2, height, width), "residual": (n, c, height, width)}
    made |= {"weight": (c,), "bias": (c,), "add": (n, c), "scale": (n, c), "shift": (n, c)}
    tensors = {k: torch.randn(s, dtype=torch.float64) for k, s in made.items() if k != "x2" or c2}
    some = {k: v for k, v in tensors.items() if k not in ("residual", "scale", "shift")}
    options: dict[str, Any] = {"backend": "cuda", "dtype": dtype, "layout": "channels_last", "keep": PARAMETERS}
    for given, static in (
        (tensors, {"groups": groups, "dropout": Dropout(0.2, STATE, DROPOUT)}),
        (some, {"groups": groups, "activation": "mish"}),
    ):
        check(ops.group_norm_silu, norm_reference.group_norm_silu, given, static, wrt=list(given), **options)
