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
