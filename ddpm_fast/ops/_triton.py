"""Lazy load of the Triton kernels, and what they can't run on."""

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._dispatch import Unavailable, forced

ARRAY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU, one program after the other: only for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def load(op: str) -> Any:
    """The module ddpm_fast.kernels.<op>.

    Raises:
        Unavailable: there is no Triton, or nothing that it could run on.
    """
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("Triton is not installed: CUDA builds of torch bring it")
    if not (torch.cuda.is_available() or interpreting()):
        raise Unavailable("no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)")
    return importlib.import_module(f"ddpm_fast.kernels.{op}")


dtype_names = _native.dtype_names


def unfit(*values: Tensor | None) -> str | None:
    """Why no kernel can run on these tensors, or in torch's present state."""
    if not interpreting():
        return _native.unfit(*values, device="cuda")
    return _native.unfit(*values) if forced() == "triton" else "is interpreted only where it is forced"


def unfit_arrays(*values: Tensor | None, grads: bool = False) -> str | None:
    """Why a kernel with or without `grads` for these tensors can't take them; see `unfit`, too."""
    return _native.unfit_arrays(*values, grads=grads, dtypes=ARRAY_DTYPES)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Where x lies is where a kernel is launched."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
