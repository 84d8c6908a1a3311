"""Samplers: functions (alphas_cumprod, prediction, num_steps, options) -> Plan, one short file each."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..ops import _checks as checks
from ..schedules import Array
from .ddim import ddim
from .ddpm import ddpm
from .dpmpp import dpmpp_2m, dpmpp_2m_sde
from .euler import ancestral_euler, euler
from .heun import heun
from .plan import COLUMNS, Plan, mean_plan

SAMPLERS: dict[str, Callable[..., Plan]] = {
    build.__name__: build for build in (ddpm, ddim, euler, ancestral_euler, heun, dpmpp_2m, dpmpp_2m_sde)
}

ADAPTIVE = "adaptive"  # what no table holds (adaptive.py), by its name
INNER = ("time_input", "on_step")  # keywords that are no options


def make_plan(
    sampler: str | Plan,
    alphas_cumprod: Array,
    prediction: str = "eps",
    num_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a sampler by name; a Plan is passed through.

    Args:
        sampler: a key of SAMPLERS, or a Plan.
        alphas_cumprod: [T] float64.
        prediction: "eps", "x0" or "v".
        num_steps: steps to take, all T by default.
        options: keyword arguments of the sampler.

    Raises:
        ValueError, TypeError: an unknown sampler or option, a value out of range, or options beside a Plan.
    """
    if isinstance(sampler, Plan):
        if num_steps is not None or options:
            raise ValueError("num_steps and sampler_options are for samplers by name: a Plan holds its own")
        return sampler
    if isinstance(sampler, str) and sampler == ADAPTIVE:
        raise ValueError(f"{ADAPTIVE!r} has no plan: only sample(sampler={ADAPTIVE!r}) of a Diffusion takes such steps")
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        names = ", ".join((*SAMPLERS, ADAPTIVE))
        close = difflib.get_close_matches(str(sampler).lower().replace("-", "_"), SAMPLERS, 1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"sampler must be a Plan or one of {names}; got {checks.text(sampler)}{hint}")
    alphas_cumprod = _checked(alphas_cumprod)
    build = SAMPLERS[sampler]
    options = checked_options(sampler, build, options)
    return build(alphas_cumprod, prediction, num_steps, **options)


def _checked(alphas_cumprod: Any) -> Array:
    try:
        levels = np.asarray(alphas_cumprod, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"alphas_cumprod must be numbers [T], got {checks.text(alphas_cumprod)}") from error
    if levels.ndim != 1 or not len(levels) or not ((levels >= 0) & (levels < 1)).all() or (np.diff(levels) > 0).any():
        text = "alphas_cumprod must fall from below 1 to 0 or more, [T]"
        rising = levels.ndim == 1 and len(levels) > 1 and levels[-1] > levels[0]
        raise ValueError(f"{text}; from betas, np.cumprod(1 - betas) makes it" if rising else text)
    return levels


def option_defaults(build: Callable[..., Any]) -> dict[str, Any]:
    """The options of a sampler and their defaults."""
    parameters = inspect.signature(build).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in INNER}


def checked_options(sampler: str, build: Callable[..., Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`options` as a dictionary.

    Raises:
        TypeError: they are none, or one is not the sampler's.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"sampler_options must be a dictionary, got {checks.text(options)}")
    known = option_defaults(build)
    for name in options or {}:
        if name not in known:
            raise TypeError(f"sampler_options: {sampler!r} has no option {name!r}; it has {', '.join(known)}")
    return dict(options or {})


__all__ = [
    "ADAPTIVE",
    "COLUMNS",
    "SAMPLERS",
    "Plan",
    "ancestral_euler",
    "checked_options",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "euler",
    "heun",
    "make_plan",
    "mean_plan",
    "option_defaults",
]
