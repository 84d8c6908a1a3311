"""Group normalisation fused with what stands around it in a residual block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference import group_norm_silu as reference
from ..reference.group_norm_silu import ACTIVATIONS
from ..reference.philox import Dropout
from . import _checks, _cuda, _group_norm, _group_norm_gpu, _native, _triton
from ._dispatch import Impl, Op
from ._library import composition
from .noise import check_dropout, drawn_dropout

# Inside, the arguments go by place: x, weight, bias, groups and these.
_OPTIONS = "eps", "x2", "add", "residual", "scale", "shift", "activation", "dropout"


def _drawn(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, *options: Any) -> dict[str, Any]:
    """The options by name, with the factors of dropout where they don't come from torch's generator."""
    named = dict(zip(_OPTIONS, options, strict=True))
    x2, dropout = named["x2"], named["dropout"]
    n, c, h, w = x.shape
    return named | {"dropout": drawn_dropout(dropout, (n, c if x2 is None else c + x2.shape[1], h, w))}


def _reference(*arguments: Any) -> Any:
    return reference.group_norm_silu(*arguments[:4], **_drawn(*arguments))


def _composed(
    *args: Any, residual: Tensor | None = None, mask: Tensor | None = None, p: float = 0.0, **rest: Any
) -> tuple[Tensor, Tensor]:
    dropout = mask if mask is not None else Dropout(p) if p else None
    out = reference.group_norm_silu(*args, residual=residual, dropout=dropout, **rest)
    return out if isinstance(out, tuple) else (out, out.new_empty(0))


_NODE = composition(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, int groups, *, float eps=1e-5, Tensor? x2=None, "
    "Tensor? add=None, Tensor? residual=None, Tensor? scale=None, Tensor? shift=None, str activation='silu', "
    "Tensor? mask=None, float p=0.0) -> (Tensor, Tensor)",
    _composed,
)


def _traced(*arguments: Any) -> Any:
    if not torch.compiler.is_exporting() and _native.wanted() and _rejects(_native, *arguments) is None:
        return _group_norm.traced(*arguments)
    options = _drawn(*arguments)
    dropout = options.pop("dropout")
    drop = {"p": dropout.p} if isinstance(dropout, Dropout) else {"mask": dropout}
    y, h = _NODE(*arguments[:4], **options, **drop)
    return y if options["residual"] is None else (y, h)


def _rejects(
    fit: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, *options: Any
) -> str | None:
    x2, add, residual, scale, shift, _, dropout = options
    if x.dtype not in fit.ARRAY_DTYPES:
        return f"takes {fit.dtype_names(fit.ARRAY_DTYPES)}, x is {x.dtype}"
    for image in (x2, residual):
        if image is not None and image.dtype is not x.dtype:
            return f"takes images of one dtype, got {x.dtype} and {image.dtype}"
    for value in (weight, bias, add, scale, shift):
        if value is not None and value.dtype is torch.float64:
            return "computes in float32, a parameter is float64"
    if x.numel() == 0:
        return "x is empty"
    state: tuple[Tensor, ...] = ()
    if dropout is not None:
        if dropout.state is None:
            return "draws no dropout from torch's generator"
        state = dropout.state[:2]
    reason: str | None = fit.unfit(x, weight, bias, x2, add, residual, scale, shift, *state)
    return reason


def _rejects_gpu(
    fit: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, *options: Any
) -> str | None:
    x2, _, residual = options[:3]
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    more = _group_norm_gpu.rejects(x, x2, residual, channels, groups)
    if fit is _cuda:
        more = more or _group_norm_gpu.rejects_cuda(x, channels, groups)
    return _rejects(fit, x, weight, bias, groups, eps, *options) or more


def _ready(*arguments: Any) -> bool:
    fits: bool = _native.load().group_norm_silu_ready(*arguments)
    return fits and _native.in_the_way() is None


def _load_native() -> Callable[..., Any]:
    _native.load()
    return _group_norm.run


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, *options: Any
) -> tuple[Any, ...]:
    x2, add, residual, scale, shift, activation, dropout = options
    n, channels, height, width = _checks.concatenated(x, x2)
    groups, eps = _checks.integer("groups", groups, 1), _checks.number("eps", eps, 0)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias go together: give both or neither")
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("residual", residual, (n, x.shape[1], height, width)),
        ("scale", scale, (n, channels)),
        ("shift", shift, (n, channels)),
    ):
        if value is not None:
            _checks.tensor(name, value, shape=shape, device=x.device)
    if add is not None:
        _checks.tensor("add", add, device=x.device)
        if add.shape not in (torch.Size((channels,)), torch.Size((n, channels))):
            raise ValueError(f"add must have shape [{channels}] or [{n}, {channels}], got {_checks.text(add)}")
    _checks.choice("activation", activation, tuple(ACTIVATIONS))
    if dropout is not None:
        dropout = check_dropout(dropout, x)
    return x, weight, bias, groups, eps, x2, add, residual, scale, shift, activation, dropout


OP = Op(
    "group_norm_silu",
    Impl("native", _load_native, partial(_rejects, _native), _ready),
    Impl("triton", partial(_group_norm_gpu.load, _triton.load), partial(_rejects_gpu, _triton)),
    Impl("cuda", partial(_group_norm_gpu.load, _cuda.load), partial(_rejects_gpu, _cuda)),
    Impl("reference", lambda: _reference),
    check=_check,
    traced=_traced,
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    dropout: Dropout | None = None,
) -> Any:
    """dropout(activation(group_norm(cat(h, x2) + add) (1 + scale) + shift)) of h = x + residual (Wu & He 2018).

    Args:
        x: [N, C1, H, W].
        weight, bias: [C] with C = C1 + C2, both or neither; may be float32 beside half-precision `x`.
        groups: number of groups, divides C; groups may straddle x and x2.
        eps: added to the variance.
        x2: [N, C2, H, W], as if concatenated to h.
        add: [C] or [N, C], added before the norm, but not to h: convolution, time and class biases.
        residual: [N, C1, H, W], added to x and not to x2; then h is returned too.
        scale, shift: [N, C], applied after the norm (FiLM). Fast backends form weight (1 + scale) / deviation first;
            where that leaves float32, so does y.
        activation: "none", "silu", "relu" or "mish".
        dropout: probability and source of the mask; only for training.

    Returns:
        y: [N, C, H, W]; or (y, h), h like x, where `residual` is given.

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape, device or value.
    """
    return OP(x, weight, bias, groups, eps, x2, add, residual, scale, shift, activation, dropout)
