"""The native group_norm_silu with a residual: two outputs, of which the sum is one."""

import pytest
import torch
from test_group_norm_native import CHANNELS_LAST, NCHW, Tensors, arguments
from test_group_norm_native import restored as restored  # for every test here
from torch import Tensor

from ddpm_fast import _C, ops


@pytest.mark.parametrize("compiled", [False, True])
def test_each_output_may_be_used_alone(compiled: bool) -> None:
    x, residual, x2 = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    add = torch.randn(12)

    def run(used: int, x: Tensor, residual: Tensor, add: Tensor, x2: Tensor) -> Tensor:
        out = ops.group_norm_silu(x, None, None, 2, residual=residual, add=add, x2=x2)
        return out[used].square().sum()

    for used in (0, 1):
        grads = []
        for backend in ("native", "reference"):
            leaves = [v.detach().requires_grad_() for v in (x, residual, add, x2)]
            with ops.use_backend(backend):
                of = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
                loss = of(used, *leaves)
                grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
            torch._dynamo.reset()
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("layout", [CHANNELS_LAST, NCHW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_as_if_it_had_been_added_before(
    isa: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """The same bits, of all but the gradient of h; a group straddles h and x2."""
    _C.force_isa(isa)
    tensors = arguments(2, 20, 12, 7, dtype, layout)
    h = tensors["x"] + tensors["residual"]
    without = {k: v for k, v in tensors.items() if k != "residual"} | {"x": h}

    def outs(of: Tensors, place: int) -> list[Tensor]:
        leaves = {k: v.detach().requires_grad_() for k, v in of.items()}
        with ops.use_backend("native"):
            out = ops.group_norm_silu(**leaves, groups=4)
            found = out if isinstance(out, tuple) else (out,)
            cotangent = torch.sin(torch.arange(found[place].numel())).view(found[place].shape).to(dtype)
            grads = torch.autograd.grad(found[place], leaves.values(), cotangent)
        return [*(v.detach() for v in found), *grads]

    y, summed, dx, dx2, dresidual, *rest = outs(tensors, 0)
    y_again, dx_again, dx2_again, *rest_again = outs(without, 0)
    assert torch.equal(summed, h) and torch.equal(dresidual, dx)
    pairs = zip([y, dx, dx2, *rest], [y_again, dx_again, dx2_again, *rest_again], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    _, _, dx, dx2, dresidual, *rest = outs(tensors, 1)
    assert dx.any() and torch.equal(dresidual, dx) and not any(v.any() for v in (dx2, *rest))
