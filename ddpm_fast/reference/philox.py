"""Philox4x32-10, the counter-based generator behind every random number here (Salmon et al. 2011, section 3.3).

A number is a function of (seed, stream, draw, sample, element) and of nothing else. All integers are int64 tensors that
hold 32-bit words.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

# What a random number is used for. Dropout layer k draws from DROPOUT + k.
X_T, PERTURB, TIMESTEPS, REVERSE, LABELS, LEVELS = range(6)
DROPOUT = 32
MAX_STREAM = 255

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class NoiseState(NamedTuple):
    """Where in the random sequence a call stands: all an op needs to draw its numbers, or to draw them again.

    `seed` and `draw` are int64 scalars on the device of the data, so that a captured graph can advance them. So may
    `first_sample` be for `sampler_step`: a recorded step serves any part of a batch.
    """

    seed: Tensor  # [] the 64-bit key
    draw: Tensor  # [] row of the plan when sampling, number of the forward call in training
    first_sample: int | Tensor = 0  # global index of the batch's first image

    @classmethod
    def at(cls, seed: int, draw: int, first_sample: int = 0, device: torch.device | str = "cpu") -> "NoiseState":
        """The state for plain integers; `seed` may use all 64 bits, signed or unsigned."""
        try:
            seed, draw, first_sample = (operator.index(v) for v in (seed, draw, first_sample))
        except TypeError as error:
            given = f"{seed!r}, {draw!r}, {first_sample!r}"
            raise TypeError(f"seed, draw and first_sample must be integers, got {given}") from error
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must fit 64 bits, got one of {seed.bit_length()} bits")
        if not -(2**63) <= draw < 2**63:
            raise ValueError(f"draw must fit 64 bits, got one of {draw.bit_length()} bits")
        signed = (seed + 2**63) % 2**64 - 2**63

        def scalar(value: int) -> Tensor:
            # full and not tensor: a fill kernel takes the value along, where a copy from the host would wait.
            return torch.full((), value, dtype=torch.int64, device=device)

        return cls(scalar(signed), scalar(draw), first_sample)


class Dropout(NamedTuple):
    """Dropout drawn from `state` and `stream` (DROPOUT + layer), or from torch's generator where `state` is None."""

    p: float
    state: NoiseState | None = None
    stream: int = DROPOUT


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product, by halves of the multiplier: it must not pass 2^63, where C++ is undefined."""
    low = word * (multiplier & 0xFFFF)
    rest = word * (multiplier >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors in [0, 2^32)) for each counter; counters and keys broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def words(state: NoiseState, stream: int, num_samples: int, num_counters: int) -> tuple[Tensor, ...]:
    """Four words [N, num_counters] for the counters (block, draw, sample, stream | high bits of sample << 8)."""
    device = state.seed.device
    block = torch.arange(num_counters, device=device)
    sample = (state.first_sample + torch.arange(num_samples, device=device))[:, None]
    last = stream | ((sample >> 32) & 0xFFFFFF) << 8
    key = (state.seed & MASK, (state.seed >> 32) & MASK)
    return philox4x32((block, state.draw & MASK, sample & MASK, last), key)
