"""The training loss and its gradient in Triton; the noise of the target is drawn again, never stored.

Least bytes: model_out read, and once more in the backward, which writes its gradient. Sums are the programs' own,
added up in float64 in a fixed order: no atomics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import PERTURB, NoiseState
from .arrays import place
from .layouts import Array, array, like, pixels
from .noise import EXACT, blocks_of, normals


@triton.jit
def _difference(
    n, first, e, mask, m, m_sample, z, z_sample, x, x_sample, noise_coef, x_coef, seed, draw, first_sample, stream,
    channels, pixels, M_LAST: tl.constexpr, Z_LAST: tl.constexpr, X_LAST: tl.constexpr, DRAWN: tl.constexpr,
    NOISE_COEF: tl.constexpr, X_COEF: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """model_out - (noise_coef noise + x_coef x_start)"""
    if DRAWN:
        target = normals(first, tl.load(seed), tl.load(draw), first_sample + n, stream, COUNTERS)
    else:
        target = tl.load(z + n * z_sample + place(e, channels, pixels, Z_LAST), mask=mask, other=0).to(tl.float32)
    if NOISE_COEF:
        target = target * tl.load(noise_coef + n)
    if X_COEF:
        x_start = tl.load(x + n * x_sample + place(e, channels, pixels, X_LAST), mask=mask, other=0).to(tl.float32)
        target = target + x_start * tl.load(x_coef + n)
    out = tl.load(m + n * m_sample + place(e, channels, pixels, M_LAST), mask=mask, other=0).to(tl.float32)
    return tl.where(mask, out - target, 0.0)


@triton.jit(do_not_specialize=["first_sample", "stream"])
def diffusion_loss_fwd_kernel(
    sums, m, m_sample, z, z_sample, x, x_sample, noise_coef, x_coef, seed, draw, first_sample, stream,
    size, blocks, channels, pixels,
    M_LAST: tl.constexpr, Z_LAST: tl.constexpr, X_LAST: tl.constexpr, DRAWN: tl.constexpr, NOISE_COEF: tl.constexpr,
    X_COEF: tl.constexpr, LOSS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    e = first * 4 + tl.arange(0, 4 * COUNTERS)
    d = _difference(
        n, first, e, e < size, m, m_sample, z, z_sample, x, x_sample, noise_coef, x_coef, seed, draw, first_sample,
        stream, channels, pixels, M_LAST, Z_LAST, X_LAST, DRAWN, NOISE_COEF, X_COEF, COUNTERS,
    )  # fmt: skip
    if LOSS == "l2":
        v = d * d
    elif LOSS == "l1":
        v = tl.abs(d)
    else:
        v = tl.where(tl.abs(d) < 1.0, 0.5 * d * d, tl.abs(d) - 0.5)
    tl.store(sums + tl.program_id(0), tl.sum(v, 0))


@triton.jit(do_not_specialize=["grad_step", "first_sample", "stream"])
def diffusion_loss_bwd_kernel(
    grad, grad_sample, grad_loss, grad_step, count, m, m_sample, z, z_sample, x, x_sample, noise_coef, x_coef, seed,
    draw, first_sample, stream, size, blocks, channels, pixels,
    GRAD_LAST: tl.constexpr, M_LAST: tl.constexpr, Z_LAST: tl.constexpr, X_LAST: tl.constexpr, DRAWN: tl.constexpr,
    NOISE_COEF: tl.constexpr, X_COEF: tl.constexpr, LOSS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * COUNTERS
    e = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = e < size
    d = _difference(
        n, first, e, mask, m, m_sample, z, z_sample, x, x_sample, noise_coef, x_coef, seed, draw, first_sample,
        stream, channels, pixels, M_LAST, Z_LAST, X_LAST, DRAWN, NOISE_COEF, X_COEF, COUNTERS,
    )  # fmt: skip
    factor = tl.load(grad_loss + n * grad_step) / count
    if LOSS == "l2":
        g = d * (2.0 * factor)
    elif LOSS == "l1":
        g = tl.where(d > 0, factor, tl.where(d < 0, -factor, 0.0))
    else:
        g = tl.where(d >= 1.0, factor, tl.where(d <= -1.0, -factor, d * factor))
    tl.store(grad + n * grad_sample + place(e, channels, pixels, GRAD_LAST), g.to(grad.dtype.element_ty), mask=mask)


class Target(NamedTuple):
    """What model_out is compared with; `noise` is a state whose tensors nobody advances, or a tensor."""

    noise: Tensor | NoiseState
    noise_coef: Tensor | None
    x_coef: Tensor | None
    x_start: Tensor | None
    loss_type: str


def _blocks(m: Tensor) -> tuple[int, dict[str, int]]:
    return blocks_of("diffusion_loss", m.shape[0], m[:1].numel(), 4, m.device)


def _operands(m: Array, of: Target) -> tuple[tuple[object, ...], dict[str, object]]:
    drawn = isinstance(of.noise, NoiseState)
    z = m if isinstance(of.noise, NoiseState) else array(of.noise)
    x = m if of.x_start is None else array(of.x_start)
    seed, draw, first_sample = of.noise if isinstance(of.noise, NoiseState) else (m.data, m.data, 0)
    coefs = [m.data if coef is None else coef for coef in (of.noise_coef, of.x_coef)]
    size = m.data[:1].numel()
    blocks, cut = _blocks(m.data)
    places = pixels(m.data)
    return (
        (*m[:2], *z[:2], *x[:2], *coefs, seed, draw, first_sample, PERTURB, size, blocks, *places),
        {
            "M_LAST": m.last,
            "Z_LAST": z.last,
            "X_LAST": x.last,
            "DRAWN": drawn,
            "NOISE_COEF": of.noise_coef is not None,
            "X_COEF": of.x_coef is not None,
            "LOSS": of.loss_type,
            **cut,
            **EXACT,
        },
    )


def forward(shape: Sequence[int], model_out: Tensor, of: Target) -> Tensor:
    """The loss, float32: of shape [], or of each image, [N]."""
    if not model_out.numel():
        return torch.full(shape, float("nan"), device=model_out.device)  # the mean of nothing
    m = array(model_out)
    operands, flags = _operands(m, of)
    programs = model_out.shape[0] * _blocks(model_out)[0]
    sums = torch.empty(programs, dtype=torch.float32, device=model_out.device)
    diffusion_loss_fwd_kernel[(programs,)](sums, *operands, **flags)
    loss = sums.view(*shape, -1).sum(-1, dtype=torch.float64)
    return (loss / (model_out.numel() // loss.numel())).float()


def backward(grad_loss: Tensor, model_out: Tensor, of: Target) -> Tensor:
    """The gradient of model_out for that of the loss, [] or [N]."""
    grad, m = like(model_out), array(model_out)
    if model_out.numel():
        operands, flags = _operands(m, of)
        programs = model_out.shape[0] * _blocks(model_out)[0]
        step = grad_loss.stride(0) if grad_loss.ndim else 0
        count = float(model_out.numel() // grad_loss.numel())  # elements of which a loss is the mean
        diffusion_loss_bwd_kernel[(programs,)](
            *grad[:2], grad_loss, step, count, *operands, GRAD_LAST=grad.last, **flags
        )
    return grad.data
