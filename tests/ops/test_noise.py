"""Philox words, normals, timesteps and dropout masks: known answers, distribution, and equal bits on every backend."""

import math

import numpy as np
import pytest
import torch
from oracle import backends
from scipy import stats

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, PERTURB, REVERSE, Dropout, NoiseState
from ddpm_fast.reference import noise as reference
from ddpm_fast.reference.philox import philox4x32

STATE = NoiseState.at(0x9E3779B97F4A7C15, 5, 2**33 + 7)

# Published with the generator (Random123, kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    c, k, a = ([torch.tensor(int(w, 16)) for w in words.split()] for words in (counter, key, answer))
    assert [int(w) for w in philox4x32(tuple(c), tuple(k))] == [int(w) for w in a]


def test_counter_layout() -> None:
    """Seed words, draw, sample and stream stand where the contract says, high bits of the sample above the stream."""
    seed, draw, sample, stream = 0x0123456789ABCDEF, 77, (5 << 32) + 9, 35
    words = reference.words(NoiseState.at(seed, draw, sample), stream, 2, 3)
    counter = tuple(torch.tensor(c) for c in (2, draw, 10, stream | 5 << 8))
    expected = philox4x32(counter, (torch.tensor(0x89ABCDEF), torch.tensor(0x01234567)))
    assert [int(w[1, 2]) for w in words] == [int(e) for e in expected]


def exact_box_muller(k: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The transform in extended precision, with the angle reduced exactly."""
    u, rest = (k + np.longdouble(0.5)) / 2**32, (2**32 - 1 - k + np.longdouble(0.5)) / 2**32
    radius = np.sqrt(-2 * np.where(k < 2**31, np.log(u), np.log1p(-rest)))
    quarter = (j + 2**29) >> 30 & 3
    angle = (((j + 2**29) & (2**30 - 1)) - 2**29 + np.longdouble(0.5)) / 2**30 * 2 * np.arctan(np.longdouble(1))
    c, s = np.cos(angle), np.sin(angle)
    return radius * np.choose(quarter, [c, -s, -c, s]), radius * np.choose(quarter, [s, c, -s, -c])


def test_normals_within_4_ulp() -> None:
    generator = torch.Generator().manual_seed(1)
    edges = [
        0,
        1,
        127,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32 - 2,
        2**29 - 1,
        2**29,
        2**30,
        3 * 2**30,
        2**32 // 3,
        2**33 // 3,
    ]
    ends = torch.tensor(edges)
    k = torch.cat([torch.randint(0, 2**32, (10**7,), generator=generator), ends.repeat_interleave(len(edges))])
    j = torch.cat([torch.randint(0, 2**32, (10**7,), generator=generator), ends.repeat(len(edges))])
    for got, exact in zip(reference.box_muller(k, j), exact_box_muller(k.numpy(), j.numpy()), strict=True):
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
        assert (np.abs(got.numpy() - exact) / ulp).max() <= 4


def test_distribution_of_ten_million() -> None:
    n = 10**7
    z = ops.noise((10, n // 10), NoiseState.at(3, 0), PERTURB).double().flatten().numpy()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(z[: 2 * 10**6], "norm").pvalue > 1e-3
    assert 4.9 < np.abs(z).max() < 6.8  # the tails are there: the largest of 10^7 lies beyond 4.9 but for 1 in 10^4


def test_streams_draws_samples_and_neighbours_are_uncorrelated() -> None:
    n = 10**7
    z = ops.noise((1, n), NoiseState.at(3, 0), PERTURB)[0]
    others = {
        "stream": ops.noise((1, n), NoiseState.at(3, 0), REVERSE)[0],
        "draw": ops.noise((1, n), NoiseState.at(3, 1), PERTURB)[0],
        "sample": ops.noise((1, n), NoiseState.at(3, 0, 1), PERTURB)[0],
        "seed": ops.noise((1, n), NoiseState.at(4, 0), PERTURB)[0],
        "pair": z.view(-1, 2).flip(1).flatten(),
        "next": z.roll(1),
        "counter": z.roll(4),
    }
    for name, other in others.items():
        for power in (1, 2):
            a, b = z.double() ** power, other.double() ** power
            correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(n / 2), (name, power)


# 1 element; not a multiple of 4; of a vector of 64 numbers plus one; many; an empty batch
SHAPES = [(1, 1), (3, 1, 5, 7), (2, 65), (2, 3, 64, 64), (0, 3, 4, 4)]


@pytest.mark.parametrize("backend", backends("noise"))
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_the_references(backend: str, shape: tuple[int, ...], poison_empty: None) -> None:
    expected = reference.noise(shape, STATE, PERTURB)
    with ops.use_backend(backend):
        got = ops.noise(shape, STATE, PERTURB)
        half = ops.noise(shape, STATE, PERTURB, dtype=torch.bfloat16)
    assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), expected.view(torch.int32))
    if backend == "triton" and not torch.cuda.is_available():  # Triton's interpreter truncates
        off = half.view(torch.int16) - expected.bfloat16().view(torch.int16)
        assert not off.numel() or int(off.abs().max()) <= 1
    else:
        assert torch.equal(half, expected.bfloat16())


@pytest.mark.parametrize("backend", backends("noise"))
def test_timesteps_and_masks_are_the_references(backend: str) -> None:
    with ops.use_backend(backend):
        t = ops.timesteps(1000, 300, STATE)
        masks = {p: ops.dropout_mask((2, 12, 3, 5), p, STATE, DROPOUT + 3) for p in (0.0, 0.1, 0.5, 1.0)}
    assert torch.equal(t, reference.timesteps(1000, 300, STATE))
    for p, mask in masks.items():
        assert torch.equal(mask, reference.dropout_mask((2, 12, 3, 5), p, STATE, DROPOUT + 3))
        assert mask.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", backends("noise"))
def test_an_image_depends_on_its_index_only(backend: str) -> None:
    with ops.use_backend(backend):
        whole = ops.noise((8, 3, 5, 5), NoiseState.at(1, 4, 10), REVERSE)
        parts = [ops.noise((n, 3, 5, 5), NoiseState.at(1, 4, 10 + i), REVERSE) for i, n in ((0, 3), (3, 5))]
    assert torch.equal(whole, torch.cat(parts))


def test_timesteps_are_uniform() -> None:
    t = ops.timesteps(10**6, 10, NoiseState.at(0, 0))
    assert stats.chisquare(torch.bincount(t, minlength=10).numpy()).pvalue > 1e-3
    assert int(ops.timesteps(10**6, 2**31, NoiseState.at(0, 0)).max()) > 0.99 * 2**31


def test_dropout_mask_keeps_the_mean() -> None:
    mask = ops.dropout_mask((4, 64, 32, 32), 0.1, NoiseState.at(0, 0), DROPOUT)
    dropped = float((mask == 0).float().mean())
    assert abs(dropped - 0.1) < 5 * math.sqrt(0.09 / mask.numel()) + 2**-17
    assert abs(float(mask.mean()) - 1) < 5 * math.sqrt(0.1 / 0.9 / mask.numel())


BAD = [
    (lambda: ops.noise((), STATE, 0), ValueError, "shape"),
    (lambda: ops.noise((2, -1), STATE, 0), ValueError, "shape"),
    (lambda: ops.noise((2, 3), STATE, 256), ValueError, "stream"),
    (lambda: ops.noise((2, 3), STATE, 0, dtype=torch.int64), TypeError, "dtype"),
    (lambda: ops.noise((2, 3), (1, 2, 3), 0), TypeError, "state"),
    (lambda: ops.noise((2, 3), NoiseState.at(1, 1, -1), 0), ValueError, "first_sample"),
    (lambda: ops.timesteps(4, 0, STATE), ValueError, "num_timesteps"),
    (lambda: ops.timesteps(-1, 10, STATE), ValueError, "num_samples"),
    (lambda: ops.dropout_mask((2, 3, 4, 5), 1.5, STATE, 32), ValueError, "p must"),
    (lambda: ops.dropout_mask((2, 3, 4), 0.5, STATE, 32), ValueError, "shape"),
    (lambda: ops.noise((2, 3), STATE._replace(first_sample=np.array(2)), 0), TypeError, "state.first_sample"),
    (lambda: ops.apply_dropout(None, Dropout(0.5)), TypeError, "x must be a tensor"),
    (lambda: ops.apply_dropout(torch.zeros(1, 1, 1, 1), 0.5), TypeError, "dropout must be a Dropout"),
    (lambda: NoiseState.at(0, 2**63), ValueError, "draw must fit 64 bits"),
    (lambda: NoiseState.at(10**5000, 0), ValueError, "seed must fit 64 bits"),
    (lambda: ops.timesteps(10**5000, 10, STATE), ValueError, "num_samples must be .* got an integer of 16610 bits"),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.skipif("native" not in backends("noise"), reason="the native module is not built here")
def test_native_checks_its_arguments() -> None:
    from ddpm_fast import _C

    out = torch.empty(1, 4)
    for arguments, text in (
        ((None, STATE, 1, 1), "out: of another dtype"),
        ((out.double(), STATE, 1, 1), "out: of another dtype"),
        ((out.expand(2, 4), STATE, 1, 1), "not contiguous"),
        ((out.to("meta"), STATE, 1, 1), "out: not a plain tensor"),
        ((out, STATE, 300, 1), "stream"),
        ((out, STATE[:2], 1, 1), "a state is"),
        ((out, (out, *STATE[1:]), 1, 1), "seed: no int64"),
        ((out, (STATE.seed, torch.arange(2), 0), 1, 1), "draw: no int64"),
        ((out, (None, *STATE[1:]), 1, 1), "seed: no int64"),
    ):
        with pytest.raises(ValueError, match=text):
            _C.noise(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say(dtype: torch.dtype) -> None:
    def draw() -> list[torch.Tensor]:
        state = NoiseState.at(5, 1)
        return [reference.dropout_mask((2, 4, 3, 3), 0.3, state, 32), reference.noise((2, 5), state, 1)]

    expected = draw()
    torch.set_default_dtype(dtype)
    try:
        got = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))
