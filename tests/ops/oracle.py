"""The test rule of every op: err(fast) <= 2 err(plain) + floor(dtype), 3x for gradients.

Truth is the reference in float64, plain the reference in the tested dtype; no tolerance is typed into a test.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Roundings of the largest value, in or out, that a reference may be off: float32 adds some up in its sums;
# lower precisions, computed in float32, round once.
ROUNDINGS = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}
LAYOUTS = ("contiguous", "channels_last", "slice")

Tensors = dict[str, Tensor]


def backends(op: str) -> list[str]:
    """The backends that can run an op on this machine; the norm has tests of its own in Triton's interpreter."""
    found = [backend for name, backend, reason in ops.availability() if name == op and reason is None]
    if op == "group_norm_silu" and not torch.cuda.is_available():
        found = [backend for backend in found if backend != "triton"]
    return found


def typed_backends(op: str) -> list[tuple[str, torch.dtype]]:
    """Each backend with each dtype that it takes."""
    takes = {"native": (torch.float32, torch.bfloat16)}
    return [(backend, dtype) for backend in backends(op) for dtype in takes.get(backend, DTYPES)]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "slice" is a part of a larger tensor, at an odd offset."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice" and x.ndim > 1:
        larger = torch.full([s + 3 for s in x.shape], float("nan"), dtype=x.dtype)
        part = larger[tuple(slice(1, 1 + s) for s in x.shape)]
        return part.copy_(x)
    return x.contiguous()


def error(result: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest value of the truth; infinite for a NaN that the truth hasn't."""
    difference = (result.double() - truth).abs().nan_to_num(nan=float("inf"))
    return float(difference.max() / truth.abs().max().clamp_min(1e-30)) if truth.numel() else 0.0


def assert_rule(name: str, fast: Tensor, plain: Tensor, truth: Tensor, factor: float) -> None:
    """The rule, for one tensor."""
    assert fast.shape == truth.shape and fast.dtype == plain.dtype, (name, fast.shape, truth.shape, fast.dtype)
    bound = factor * error(plain, truth) + torch.finfo(plain.dtype).eps
    assert error(fast, truth) <= bound, f"{name}: error {error(fast, truth):.3g}, allowed {bound:.3g}"


def _run(
    function: Callable[..., Any], tensors: Tensors, static: dict[str, Any], wrt: Sequence[str], cotangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, for cotangents given in float64 and rounded to the outputs' dtypes."""
    leaves = {k: v.detach().requires_grad_(k in wrt) for k, v in tensors.items()}
    out = function(**leaves, **static)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not cotangents:
        cotangents.extend(torch.randn(o.shape, dtype=torch.float64) for o in outs)
    grads: Sequence[Tensor] = ()
    if wrt:
        rounded = [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=True)]
        grads = torch.autograd.grad(outs, [leaves[k] for k in wrt], rounded)
    return [o.detach() for o in outs], list(grads)


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Tensors,
    static: dict[str, Any] | None = None,
    *,
    backend: str,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    wrt: Sequence[str] = (),
    keep: Sequence[str] = (),
    factors: tuple[float, float] = (2, 3),
) -> None:
    """Hold an op on one backend against its reference, forward and (for the tensors named in `wrt`) backward.

    `tensors` are given in float64; those of floating point are rounded to `dtype`, except the ones named in `keep`,
    which stay float32 (parameters and tables). `factors` are those of the rule, for outputs and gradients: others only
    where the design derives another bound.
    """
    static = static or {}

    def cast(v: Tensor, k: str, to: torch.dtype | None) -> Tensor:
        if not v.is_floating_point():
            return v
        rounded = v.to(torch.float32 if k in keep else dtype)
        return rounded if to is None else rounded.to(to)

    given = {k: laid_out(cast(v, k, None), layout) for k, v in tensors.items()}
    exact = {k: cast(v, k, torch.float64) for k, v in tensors.items()}
    cotangents: list[Tensor] = []
    truth, truth_grads = _run(reference, exact, static, wrt, cotangents)
    cotangents = [c.to(dtype).double() for c in cotangents]
    truth, truth_grads = _run(reference, exact, static, wrt, cotangents)
    plain, plain_grads = _run(reference, given, static, wrt, cotangents)
    with ops.use_backend(backend):
        fast, fast_grads = _run(op, given, static, wrt, cotangents)
        again, again_grads = _run(op, given, static, wrt, cotangents)
    largest = max(float(v.abs().max()) for v in (*exact.values(), *truth) if v.numel() and v.is_floating_point())
    for i in range(len(truth)):
        # The oracle itself: a reference that computed in less than its dtype would hide behind the rule.
        off = float((plain[i].double() - truth[i]).abs().max()) if truth[i].numel() else 0.0
        assert off <= ROUNDINGS[dtype] * torch.finfo(dtype).eps * largest, f"output {i} of the reference is off"
        assert_rule(f"output {i}", fast[i], plain[i], truth[i], factors[0])
    for k, f, p, t in zip(wrt, fast_grads, plain_grads, truth_grads, strict=True):
        assert_rule(f"gradient of {k}", f, p, t, factors[1])
    for a, b in zip([*fast, *fast_grads], [*again, *again_grads], strict=True):
        assert torch.equal(a, b), "two runs differ"
