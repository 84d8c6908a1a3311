"""The ops as torch's graphs see them: nodes that torch.compile and torch.export trace, `torch.ops.ddpm_fast.<op>`.

A composition is one node to the tracer, and looked into when the graph is lowered: autocast, gradients of any order and
the compiler's fusion work on what it is made of. An opaque node is dispatched when it runs, as an eager call is.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ddpm_fast", "FRAGMENT")  # lives as long as the process, or the ops would go with it


def composition(schema: str, run: Callable[..., Any]) -> Any:
    """Define an op that is made of others.

    Args:
        schema: "name(Tensor x, ...) -> Tensor".
        run: takes and returns what the schema says; neither result nor inside may alias an argument.

    Returns:
        The op, to be called with the schema's arguments.
    """
    return _define(schema, run, "CompositeImplicitAutograd")


def opaque(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op without gradient that a graph calls as it is; `fake` returns empty results for a tracer."""
    op = _define(schema, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ddpm_fast::{_name(schema)}", fake, lib=_LIBRARY)
    return op


def differentiable(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., Any],
) -> Any:
    """Define an opaque op with a gradient: `backward`, and `save` as its set-up, as torch.library.register_autograd."""
    op = opaque(schema, run, fake)
    torch.library.register_autograd(f"ddpm_fast::{_name(schema)}", backward, setup_context=save, lib=_LIBRARY)
    return op


def _name(schema: str) -> str:
    return schema.partition("(")[0]


def _define(schema: str, run: Callable[..., Any], key: str) -> Any:
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name(schema), run, key)
    return getattr(torch.ops.ddpm_fast, _name(schema)).default
