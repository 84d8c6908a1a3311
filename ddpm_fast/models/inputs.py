"""What the layers take, checked."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as checks


class Switch:
    """An attribute of a module that takes one of a few values; the first of them where nobody set it."""

    def __init__(self, *options: Any):
        self.options = options

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.place = name, f"_{name}"

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else vars(module).get(self.place, self.options[0])

    def __set__(self, module: Any, value: object) -> None:
        if not any(type(value) is type(option) and value == option for option in self.options):
            raise ValueError(f"{self.name} must be one of {', '.join(map(str, self.options))}; got {value!r}")
        vars(module)[self.place] = value


def check_input(x: Tensor, channels: int, conv: nn.Module | None = None) -> None:
    """Raise unless x is [N, channels, H, W], and of the dtype of `conv`, which is what takes it."""
    checks.tensor("x", x, ndim=4)
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {checks.text(x)}")
    for name, size in zip(("height", "width"), x.shape[2:], strict=True):
        if size < 1:
            raise ValueError(f"x: {name} must be at least 1, got 0")
    if type(conv) is nn.Conv2d and x.dtype != conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the dtype of the layer, {conv.weight.dtype}; got {checks.text(x)}")


def check_labels(y: Tensor, num_images: int) -> None:
    """Raise unless y is [N], int64 or int32."""
    dtype = torch.int32 if isinstance(y, Tensor) and y.dtype == torch.int32 else torch.int64
    checks.tensor("y", y, shape=(num_images,), dtype=dtype)


def check_size(owner: str, height: int, width: int, multiple: int, padding: int) -> None:
    """Raise ValueError unless both are multiples of so many pixels once padded by so many on each side."""
    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got 0")
        if (size + 2 * padding) % multiple:
            enough = [
                q for q in range(multiple) if (height + 2 * q) % multiple == 0 and (width + 2 * q) % multiple == 0
            ]
            advice = f" or build the network with initial_pad={enough[0]}" if enough else ""
            padded = f" + 2 * initial_pad = {size + 2 * padding}" if padding else ""
            raise ValueError(
                f"{owner}: {name} {size}{padded} is not divisible by {multiple}: "
                f"resize or pad to {-(-(size + 2 * padding) // multiple) * multiple - 2 * padding}{advice}"
            )
