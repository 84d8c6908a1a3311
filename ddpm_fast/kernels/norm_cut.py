"""How calls of group_norm_silu are cut into programs: the rule, and what a search may pick instead."""

import functools
import math
from typing import NamedTuple

import triton


class Config(NamedTuple):
    """How a call is cut."""

    slab: int  # channels of a program, whole groups
    width: int  # lanes for them, a power of two
    pixels: int  # pixels of a program, a power of two
    chunks: int  # programs that share a slab's pixels; 1 for one pass
    warps: int


_LANES = 32
_PROCESSORS = 128  # about what a large GPU has


def _room(direction: str, warps: int) -> int:
    """Numbers of a tile that so many warps keep in registers without a spill, of 255 a thread, or 128 with 16 warps."""
    kept = {"forward": 64, "backward": 32}[direction]
    return (kept if warps <= 8 else kept // 2) * _LANES * warps


def _padded(pixels: int, width: int) -> int:
    """Triton 3.6 fails to compile tiles of fewer numbers than threads: four warps have 128, or 256 on AMD."""
    return max(256 // width, triton.next_power_of_2(pixels))


def _cut(pixels: int, channels: int, groups: int, width: int, rows: int, warps: int) -> Config:
    per_group = channels // groups
    slab = width // per_group * per_group
    if channels % 8 == 0 and slab < channels:  # each slab begins at 16 bytes
        aligned = per_group * 8 // math.gcd(per_group, 8)
        slab = slab // aligned * aligned or slab
    return Config(slab, width, rows, triton.cdiv(pixels, rows), warps)


def rule(direction: str, images: int, pixels: int, channels: int, groups: int) -> Config:
    """By metadata: one pass, with slabs of 64 channels or, if that is too much, of 32; else chunks for four warps."""
    widths = _widths(channels, groups, (64, 32))
    for width in widths:
        rows = _padded(pixels, width)
        for warps in (4, 8):
            if rows * width <= _room(direction, warps):
                return _cut(pixels, channels, groups, width, rows, warps)
    width = widths[0]
    rows = max(16, _room(direction, 4) // width)
    cut = _cut(pixels, channels, groups, width, rows, 4 if rows * width <= _room(direction, 4) else 16)
    while cut.pixels > 32 and images * triton.cdiv(channels, cut.slab) * cut.chunks < _PROCESSORS:  # few images
        cut = _cut(pixels, channels, groups, width, cut.pixels // 2, cut.warps)
    return cut


def _widths(channels: int, groups: int, wanted: tuple[int, ...]) -> list[int]:
    """Lanes that hold a group or more, and no more than all channels."""
    least, most = triton.next_power_of_2(channels // groups), triton.next_power_of_2(channels)
    return list(dict.fromkeys(min(max(width, least), most) for width in wanted))


@functools.cache
def candidates(direction: str, images: int, pixels: int, channels: int, groups: int) -> dict[str, Config]:
    """What a search may pick from, by name; the rule's comes first. "64x256w8": 64 lanes, 256 pixels, 8 warps."""
    listed = [rule(direction, images, pixels, channels, groups)]
    per_group = channels // groups
    compared = per_group & (per_group - 1) != 0  # channels with each other, which takes registers of its own
    for width in _widths(channels, groups, (32, 64) if compared else (32, 64, 128)):
        for warps in (4, 8, 16):
            room = _room(direction, warps)
            if compared and room < width * pixels:
                room //= 2
            rows = min(_padded(pixels, width), room // width)
            enough = rows >= 16 and rows * width >= 64 * warps
            if enough and (warps < 16 or width < 128 and rows >= pixels):  # the rest of 16 warps spills
                listed.append(_cut(pixels, channels, groups, width, rows, warps))
    return {f"{cut.width}x{cut.pixels}w{cut.warps}": cut for cut in listed}
