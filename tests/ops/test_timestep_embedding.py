import math

import pytest
import torch
from oracle import backends

from ddpm_fast import ops
from ddpm_fast.reference import timestep_embedding as reference


def test_formula() -> None:
    t = torch.tensor([0, 1, 10, 999], dtype=torch.float64)
    got = ops.timestep_embedding(t, 6, 0.5)
    for n, time in enumerate(t.tolist()):
        angles = [0.5 * time * 10000 ** (-i / 3) for i in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert torch.allclose(got[n], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# one timestep; a batch that is no multiple of a vector; the CIFAR-10 network's size; none
@pytest.mark.parametrize(("n", "dim"), [(1, 2), (7, 10), (64, 128), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("backend", backends("timestep_embedding"))
def test_against_reference(backend: str, n: int, dim: int, dtype: torch.dtype, poison_empty: None) -> None:
    t = torch.randint(0, 1000, (n,)).to(dtype)
    with ops.use_backend(backend):
        fast = ops.timestep_embedding(t, dim)
    plain, truth = reference.timestep_embedding(t, dim), reference.timestep_embedding(t.double(), dim)
    assert fast.dtype == torch.float32 and fast.shape == (n, dim)
    # Angles reach 1000 radians, so float32 is off by up to 1000 * 2^-24; the rule holds in absolute terms.
    error, allowed = ((v - truth).abs().max() if n else torch.tensor(0.0) for v in (fast, plain))
    assert error <= 2 * allowed + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", backends("timestep_embedding"))
def test_any_times(backend: str) -> None:
    """Negative, fractional, strided, huge and not finite ones; the sizes end inside a vector and beyond a block."""
    few = 20 if backend == "triton" else 500  # its interpreter takes a millisecond for each
    t = torch.cat([torch.linspace(-1100, 1100, few), torch.randn(few) * 10, torch.tensor([2.0**20, -(2.0**21), 1e7])])
    for dim, scale in ((2, 1.0), (34, 0.37), (258, 1000.0)):
        fast = {}
        for times in (t, t.repeat_interleave(3)[::3], t.long().int(), t.long()):
            with ops.use_backend(backend):
                fast[times.dtype] = ops.timestep_embedding(times, dim, scale)
            plain, truth = (reference.timestep_embedding(v, dim, scale) for v in (times, times.double()))
            error, allowed = ((v - truth).abs().max() for v in (fast[times.dtype], plain))
            assert error <= 2 * allowed + torch.finfo(torch.float32).eps
        assert torch.equal(fast[torch.int32], fast[torch.int64])
    with ops.use_backend(backend):
        odd = ops.timestep_embedding(torch.tensor([float("nan"), float("inf"), 3e38]), 8)
    assert odd[:2, 0].isnan().all() and (odd[2].abs() <= 1).all()


@pytest.mark.skipif("native" not in backends("timestep_embedding"), reason="the reference computes in float32")
def test_the_kernel_rounds_once() -> None:
    """Angles, sines and cosines in float64."""
    t = torch.arange(-1000, 1000) * 97
    with ops.use_backend("native"):
        fast = ops.timestep_embedding(t, 128)
    truth = reference.timestep_embedding(t.double(), 128)
    assert (fast - truth).abs().max() <= 2.0**-25 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16, torch.float64, torch.bool], ids=str)
def test_what_no_kernel_takes_goes_to_the_reference(dtype: torch.dtype) -> None:
    t = torch.tensor([0, 1, 7]).to(dtype)
    assert torch.equal(ops.timestep_embedding(t, 6), reference.timestep_embedding(t, 6))
    leaf = torch.tensor([0.5, 7.0], requires_grad=True)
    got, expected = ops.timestep_embedding(leaf, 6), reference.timestep_embedding(leaf, 6)
    assert torch.equal(*(torch.autograd.grad(v.sum(), leaf)[0] for v in (got, expected)))


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        ((5, 8), TypeError, "t must be a tensor"),
        ((torch.zeros(2, 2), 8), ValueError, r"t must have shape \[N\]"),
        ((torch.zeros(2), 7), ValueError, "dim must be a positive even number, got 7: 8"),
        ((torch.zeros(2), 0), ValueError, "dim must be an integer of at least 2"),
    ],
)
def test_bad_input(args, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ops.timestep_embedding(*args)
