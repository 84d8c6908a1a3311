"""group_norm_silu on the native module: its arguments, its gradient, and its node in compiled graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.group_norm_silu import ACTIVATIONS
from ..reference.noise import dropout_threshold
from ..reference.philox import Dropout, NoiseState
from . import _native
from ._library import differentiable, opaque

Parameters = Sequence[Tensor | None]  # weight, bias, add, scale, shift
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # as csrc/cpu/group_norm_silu.h numbers them


def _image(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in a layout whose rows are as far apart as their pixels; a slice of a larger tensor stays where it is."""
    if x.is_contiguous(memory_format=layout):
        return x
    _, channels, height, width = x.shape
    _, channel, row, pixel = x.stride()
    if width == 1:
        pixel = row
    adjacent = channels == 1 or channel == 1 if layout is torch.channels_last else height * width == 1 or pixel == 1
    return x if adjacent and (height == 1 or row == width * pixel) else x.contiguous(memory_format=layout)


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.dtype is torch.float32 and v.is_contiguous() else v.float().contiguous()


def _placed(x: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None, torch.memory_format]:
    """The images in one layout that the kernels take, and that layout: channels_last if x's channels are adjacent."""
    layout = torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
    return _image(x, layout), x2 if x2 is None else _image(x2, layout), layout


def _like(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Room for a result like x: laid out as torch would, if that is a layout which the kernels take."""
    out = torch.empty_like(x)
    return out if _image(out, layout) is out else torch.empty_like(x, memory_format=layout)


def _empty(x: Tensor, x2: Tensor | None, layout: torch.memory_format) -> Tensor:
    """Room for cat(x, x2)."""
    if x2 is None:
        return _like(x, layout)
    n, channels, height, width = x.shape
    shape = n, channels + x2.shape[1], height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _dropout(dropout: Dropout | None) -> tuple[Any, ...] | None:
    """As the kernels take it."""
    if dropout is None:
        return None
    return *dropout_threshold(dropout.p), dropout.state, dropout.stream


def forward(
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    parameters: Parameters,
    statistics: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor | None]:
    """y, and h where there is a residual."""
    kernel, rest = _native.kernel("group_norm_silu"), (groups, eps, _CODES[activation], _dropout(dropout))
    parameters = tuple(parameters)
    if x2 is None:
        y = torch.empty_like(x)
        h = None if residual is None else torch.empty_like(x)
        if kernel(x, x2, residual, parameters, statistics, y, h, *rest, _native.threads()):
            return y, h
    x, x2, layout = _placed(x, x2)
    y = _empty(x, x2, layout)
    residual, h = (None, None) if residual is None else (_image(residual, layout), _like(x, layout))
    _must(kernel(x, x2, residual, tuple(map(_vector, parameters)), statistics, y, h, *rest, _native.threads()))
    return y, h


def _must(done: bool) -> None:
    if not done:
        raise AssertionError("group_norm_silu: images that were laid out for the kernel don't fit it")


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    parameters: Parameters,
    statistics: Tensor,
    needed: Sequence[bool],
    groups: int,
    eps: float,
    activation: str,
    dropout: Dropout | None,
) -> list[Tensor | None]:
    """Gradients of x, x2 and the parameters that are `needed`.

    Args:
        dy, dh: gradients of the outputs, None where there is none.
        x, x2: the forward's; with a residual, h in place of x: its gradient is that of both.
    """
    parameters = tuple(parameters)
    kernel, rest = _native.kernel("group_norm_silu_backward"), (groups, eps, _CODES[activation], _dropout(dropout))
    rooms = tuple([None if v is None or not need else _room(v) for v, need in zip(parameters, needed, strict=True)])
    dx, dx2 = torch.empty_like(x), None if x2 is None else torch.empty_like(x2)
    dy, dh = dy if dy is None else dy.resolve_neg(), dh if dh is None else dh.resolve_neg()
    if dy is None or not kernel(x, x2, dy, dh, parameters, statistics, dx, dx2, rooms, *rest, _native.threads()):
        x, x2, layout = _placed(x, x2)
        dx, dx2 = _like(x, layout), None if x2 is None else _like(x2, layout)
        dy = _empty(x, x2, layout).zero_() if dy is None else _image(dy, layout)
        dh = dh if dh is None else _image(dh, layout)
        vectors = tuple(map(_vector, parameters))
        _must(kernel(x, x2, dy, dh, vectors, statistics, dx, dx2, rooms, *rest, _native.threads()))
    found = list(rooms)
    for i, (g, v) in enumerate(zip(found, parameters, strict=True)):
        if g is not None and v is not None and g.dtype is not v.dtype:
            found[i] = g.to(v.dtype)
    return [dx, dx2, *found]


def _room(parameter: Tensor) -> Tensor:
    as_it_is = parameter.dtype in _native.ARRAY_DTYPES and parameter.is_contiguous()
    return torch.empty_like(parameter) if as_it_is else torch.empty(parameter.shape, dtype=torch.float32, device="cpu")


class Differentiable(torch.autograd.Function):
    """group_norm_silu with a gradient; saves x and its groups' statistics, and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> Any:
        x, x2, residual, *parameters = tensors
        groups, dropout = rest[0], rest[-1]
        # Strides make this call cheaper than torch.empty.
        statistics = torch.empty_strided((x.shape[0], groups, 2), (2 * groups, 2, 1), dtype=torch.float64, device="cpu")
        y, h = forward(x, x2, residual, parameters, statistics, *rest)
        if dropout is not None:  # whose owner may advance the state before the backward
            seed, draw, first = dropout.state
            rest = *rest[:-1], dropout._replace(state=NoiseState(seed.clone(), draw.clone(), first))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if h is None else h, x2, *parameters, statistics)
        ctx.rest = rest
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Any:
        _native.check_backward("group_norm_silu", dy, dh)
        if dy is None and dh is None:
            return (None,) * 9
        x, x2, *parameters, statistics = ctx.saved_tensors
        _, _, _, of_residual, *needed = ctx.needs_input_grad
        dx, dx2, *rows = backward(dy, dh, x, x2, parameters, statistics, needed, *ctx.rest)
        return None, dx, dx2, dx if of_residual else None, *rows


# Without Function.apply's own look at torch.func's wrappers: `unfit` and `in_the_way` have looked.
_apply = super(torch.autograd.Function, Differentiable).apply


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    x2: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    dropout: Dropout | None,
) -> Any:
    """The op on plain tensors, with a gradient where one is asked for."""
    if torch.is_grad_enabled():
        tensors = x, x2, residual, weight, bias, add, scale, shift
        for v in tensors:
            if v is not None and v.requires_grad:
                return _apply((groups, eps, activation, dropout), *tensors)
    y, h = forward(x, x2, residual, (weight, bias, add, scale, shift), None, groups, eps, activation, dropout)
    return y if h is None else (y, h)


# The same as a node of compiled graphs. Results that the arguments leave out are empty.
_REST = "int groups, float eps, str activation, float p, SymInt first_sample, int stream"
_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, Tensor? shift"


def _source(p: float, first_sample: int, stream: int, seed: Tensor, draw: Tensor) -> Dropout:
    return Dropout(p, NoiseState(seed, draw, first_sample), stream)


def _node_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, groups, eps, activation, p, first_sample, stream, seed, draw = arguments
    x, *others = tensors
    x2, residual, *parameters = (v if v is None else v.resolve_neg() for v in others)
    x = x.resolve_neg()
    _native.check_not_forced_away("group_norm_silu")
    statistics = torch.empty((x.shape[0], groups, 2), dtype=torch.float64, device=x.device)
    dropout = None if seed is None else _source(p, first_sample, stream, seed, draw)
    y, h = forward(x, x2, residual, parameters, statistics, groups, eps, activation, dropout)
    state = statistics.new_empty(0, dtype=torch.int64) if seed is None else torch.stack((seed, draw))
    return y, y.new_empty(0) if h is None else h, statistics, state


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x, x2, residual, *_, seed, draw = arguments
    x, x2, layout = _placed(x, x2)
    y = _empty(x, x2, layout)
    statistics = x.new_empty((x.shape[0], arguments[8], 2), dtype=torch.float64)
    state = x.new_empty(0 if seed is None else 2, dtype=torch.int64)
    return y, y.new_empty(0) if residual is None else _like(x, layout), statistics, state


def _node_backward(*arguments: Any) -> list[Tensor]:
    dy, dh, x, x2, *parameters, statistics, state, needed, groups, eps, activation, p, first, stream = arguments
    dropout = _source(p, first, stream, *state) if state.numel() else None
    found = backward(dy, dh, x, x2, parameters, statistics, needed, groups, eps, activation, dropout)
    return [g for g in found if g is not None]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    _, _, x, x2, *parameters = arguments[:9]
    needed = arguments[11]
    x, x2, layout = _placed(x, x2)
    images = [_like(v, layout) for v in (x, x2) if v is not None]
    return images + [v.new_empty(v.shape) for v, need in zip(parameters, needed, strict=True) if v is not None and need]


_BACKWARD = opaque(
    f"group_norm_silu_native_backward(Tensor? dy, Tensor? dh, Tensor x, Tensor? x2, {_PARAMETERS}, Tensor statistics, "
    f"Tensor state, bool[] needed, {_REST}) -> Tensor[]",
    _node_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x2, residual, *parameters = inputs[:8]
    h, statistics, state = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[2:] if residual is not None else output[1:]))
    ctx.save_for_backward(x if residual is None else h, x2, *parameters, statistics, state)
    ctx.rest = inputs[8:14]


def _formula(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None and dh is None:
        return (None,) * 16
    saved = ctx.saved_tensors
    _, _, of_residual, *needed = ctx.needs_input_grad[:8]
    found = iter(_BACKWARD(dy, dh, *saved, needed, *ctx.rest))
    dx, dx2 = next(found), None if saved[1] is None else next(found)
    typed = [next(found) if v is not None and need else None for v, need in zip(saved[2:7], needed, strict=True)]
    return dx, dx2, dx if of_residual else None, *typed, *[None] * 8


NODE = differentiable(
    f"group_norm_silu_native(Tensor x, Tensor? x2, Tensor? residual, {_PARAMETERS}, {_REST}, Tensor? seed, "
    "Tensor? draw) -> (Tensor, Tensor, Tensor, Tensor)",
    _node_forward,
    _fake_forward,
    _formula,
    _save,
)


def traced(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, x2: Tensor | None, *rest: Any
) -> Any:
    """The op as that node."""
    add, residual, scale, shift, activation, dropout = rest
    p, state, stream = dropout if dropout is not None else (0.0, None, 0)
    seed, draw, first_sample = state if state is not None else (None, None, 0)
    tensors = x, x2, residual, weight, bias, add, scale, shift
    y, h, *_ = NODE(*tensors, groups, eps, activation, p, first_sample, stream, seed, draw)
    return y if residual is None else (y, h)
