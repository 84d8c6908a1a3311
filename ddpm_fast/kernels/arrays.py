"""Where an element of a sample's own order lies, in Triton; layouts.py has which orders there are."""

import triton
import triton.language as tl


@triton.jit
def place(e, channels, pixels, LAST: tl.constexpr):
    """Where element e of a sample lies, in its own order or in channels_last."""
    return (e % pixels) * channels + e // pixels if LAST else e
