"""Images, channels and pixels that lie more than 2^32 elements apart: offsets are of 64 bits."""

import mmap
import sys
from itertools import count
from typing import Any

import pytest
import torch
from oracle import backends
from torch import Tensor

from ddpm_fast import ops

if "native" not in backends("group_norm_silu"):
    pytest.skip("the native module is not built here", allow_module_level=True)
if sys.platform != "linux" or sys.maxsize < 2**40:
    pytest.skip("needs memory that is not there until it is touched", allow_module_level=True)

FAR = 2**32 + 64  # elements; of 32 bits, signed or not, 64 are left, which is memory of the same tensor
ROOM = 2**14  # elements for the near dimensions of one tensor
TENSORS = 8


class Memory:
    """Address space for tensors of one dtype, most of it never touched, so that it takes no memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            memory = mmap.mmap(-1, (FAR + TENSORS * ROOM) * dtype.itemsize, flags=flags)
        except OSError as error:
            pytest.skip(f"{FAR * dtype.itemsize / 2**30:.0f} GiB of address space: {error}")
        self.data, self.places = torch.frombuffer(memory, dtype=dtype), count(0, ROOM)

    def far(self, values: Tensor, dim: int) -> Tensor:
        """The same values in the same layout, but along `dim` as far apart as can be."""
        assert values.shape[dim] == 2 and values.numel() <= ROOM
        strides = list(values.stride())
        strides[dim] = FAR
        return self.data.as_strided(values.shape, strides, next(self.places)).copy_(values)


def images(number: int, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Near ones; where pixels are to be far apart, their channels are adjacent."""
    layout = torch.channels_last if dim == 3 else torch.contiguous_format
    return [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(number)]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Images of a piece in place and one that fills no vector; channels; the pixels of a row.
SHAPES = [
    pytest.param((2, 10, 11, 13), 0, id="image"),
    pytest.param((3, 2, 9, 9), 1, id="channel"),
    pytest.param((2, 72, 1, 2), 3, id="pixel"),
]
IMAGES = pytest.mark.parametrize(("shape", "dim"), [*SHAPES, pytest.param((1, 2, 64, 64), 1, id="slab")])
ARRAYS = pytest.mark.parametrize(("shape", "dim"), [*SHAPES, pytest.param((3, 2, 1, 1), 1, id="element")])


@DTYPES
@IMAGES
@pytest.mark.parametrize("joined", [False, True])
def test_group_norm_silu(shape: tuple[int, ...], dim: int, dtype: torch.dtype, joined: bool) -> None:
    x, x2, dy, dh = images(4, shape, dim, dtype)
    memory = Memory(dtype)
    torch.set_num_threads(2)  # which take one slab each

    def run(x: Tensor, x2: Tensor, dy: Tensor, dh: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), x2.detach().requires_grad_()]
        x, x2 = leaves
        if joined:  # dy would have the channels of both
            y, h = ops.group_norm_silu(x, None, None, 2, x2=x2, residual=dy)
            grads = torch.autograd.grad((y.float().square().sum(), h), leaves, (None, dh))
            return [y.detach(), h.detach(), *grads]
        outs = ops.group_norm_silu(x, None, None, 2, residual=x2)
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, [dy, dh])]

    with ops.use_backend("native"):
        near = run(x, x2, dy, dh)
        far = run(*(memory.far(v, dim) for v in (x, x2, dy, dh)))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@DTYPES
@ARRAYS
def test_q_sample(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x, z = images(2, shape, dim, dtype)
    t, (signal, sigma), memory = torch.arange(shape[0]), torch.rand(2, 5), Memory(dtype)
    with ops.use_backend("native"):
        near = ops.q_sample(x, t, signal, sigma, z)
        assert torch.equal(ops.q_sample(memory.far(x, dim), t, signal, sigma, memory.far(z, dim)), near)


@DTYPES
@ARRAYS
@pytest.mark.parametrize("which", ["in", "out", "x0_out"])
def test_sampler_step(shape: tuple[int, ...], dim: int, dtype: torch.dtype, which: str) -> None:
    x, model_out, hist, z, v, out, x0_out = images(7, shape, dim, dtype)
    rows, k, memory = torch.rand(2, 9), torch.tensor(1), Memory(dtype)

    def run(x: Tensor, model_out: Tensor, hist: Tensor, noise: Tensor, v: Tensor, **outs: Any) -> Any:
        return ops.sampler_step(x, model_out, rows, k, noise=noise, hist=hist, variance=v, return_x0=True, **outs)

    with ops.use_backend("native"):
        near = run(x, model_out, hist, z, v)
        if which == "in":
            far = run(*(memory.far(each, dim) for each in (x, model_out, hist, z, v)))
        else:
            outs = {"out": out, "x0_out": x0_out}
            far = run(x, model_out, hist, z, v, **outs | {which: memory.far(outs[which], dim)})
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
