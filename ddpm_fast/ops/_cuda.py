"""Lazy load of the CUDA kernels, and what they can't run on."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from . import _native, _triton
from ._dispatch import Unavailable, forced

ARRAY_DTYPES = _triton.ARRAY_DTYPES
dtype_names, on, unfit_arrays = _triton.dtype_names, _triton.on, _triton.unfit_arrays


@functools.cache
def device_type() -> str:
    """Where the kernels of the module that is loaded run: "cuda", or "cpu" in a build for tests."""
    kind: str = _native.load("_cuda").device_type
    return kind


def load(op: str) -> Any:
    """The module ddpm_fast.kernels.cuda.<op>.

    Raises:
        Unavailable: ddpm_fast._cuda was not built, or there is no GPU that it could run on.
    """
    module = _native.load("_cuda")
    if device_type() == "cuda":
        if not torch.cuda.is_available():
            raise Unavailable("no GPU")
        if torch.version.cuda is None:
            raise Unavailable("torch is built for GPUs of another kind")
        try:
            major, *_ = module.limits(torch.cuda.current_device())
        except RuntimeError as error:  # a driver older than what the module was built for
            raise Unavailable(str(error)) from None
        if major < 8:
            raise Unavailable(f"needs compute capability 8.0 or more, this GPU has {major}")
    return importlib.import_module(f"ddpm_fast.kernels.cuda.{op}")


def unfit(*values: Tensor | None) -> str | None:
    """Why no kernel can run on these tensors, or in torch's present state."""
    if device_type() == "cuda":
        return _native.unfit(*values, device="cuda")
    return _native.unfit(*values) if forced() == "cuda" else "runs on a CPU only where it is forced"
