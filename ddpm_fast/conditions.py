"""What a Diffusion's network is given beside x_t, and what it must return."""

import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .functional import output_of
from .models.fusing import takes_noise_state
from .models.state import DiffusionState
from .ops import NoiseState, exact_convolutions, extract
from .ops import _checks as checks
from .predictions import x0_coefficients


def takes_labels(model: nn.Module) -> bool:
    """Whether a network can be called with three arguments: (x, t, y)."""
    try:
        inspect.signature(model.forward).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # no signature
        pass
    return True


def null_label_of(model: nn.Module, given: object, default: int | None) -> int | Tensor | None:
    """The null label, after a look at whether it can be one.

    Raises:
        ValueError, TypeError: it is neither an integer nor a tensor, or a class that the network does not have.
    """
    if given is None and default is None:
        return None
    if isinstance(given, Tensor):
        return given.detach().clone()
    label = checks.integer("null_label", default if given is None else given, 0)
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and label >= classes:
        raise ValueError(
            f"null_label {label} is no class of the network, which has {classes}: build it with num_classes={label + 1}"
            + (f", or give Diffusion num_classes={label - 1}" if given is None and label == classes else "")
        )
    return label


def given(cond: Tensor | None) -> dict[str, Any]:
    """As a keyword, for methods that a subclass may have without it."""
    return {} if cond is None else {"cond": cond}


class Conditions(DiffusionState):
    """Calls a network with what it is conditioned on; Diffusion documents the attributes."""

    model: nn.Module
    img_size: tuple[int, ...]
    img_channels: int
    num_classes: int | None
    null_label: int | Tensor | None
    cond_channels: int
    time_input: str
    learned_variance: bool
    exact: bool = False  # where an older pickle has none

    def __init__(self, betas: Any, prediction: str, seed: int | None):
        super().__init__(betas, prediction, seed)
        self._takes_labels = True
        self._warned: set[str] = set()  # what was said already

    def _call(
        self,
        model: nn.Module,
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        state: NoiseState | None = None,
        *,
        cond: Tensor | None = None,
    ) -> Tensor:
        """The network's output, for x in the network's own dtype; dropout draws from `state` where it can."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        more = {"noise_state": state} if state is not None and model.training and takes_noise_state(model) else {}
        model_in = x if cond is None else torch.cat([x, cond.to(x.dtype)], dim=1)
        labels = (y,) if self._takes_labels else ()
        exact = self.exact or self.rng == "torch"
        # Where a compiler asks, convolutions are the library's in any case.
        with exact_convolutions() if exact and not torch.compiler.is_compiling() else nullcontext():
            out = output_of(model(model_in.to(dtype), t, *labels, **more))
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        if out.shape != (x.shape[0], channels, *x.shape[2:]):
            expected = f"a tensor like x, {list(x.shape)}"
            if self.learned_variance:
                expected = f"{channels} channels, the prediction and the learned variance of {expected}"
            raise ValueError(f"model must return {expected}; got {checks.text(out)}")
        return out

    def _x0_hat(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The image that a prediction for x_t stands for, at least in float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        coefs = x0_coefficients(self.prediction, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        p_x, p_m = (extract(coef.to(dtype), t, x.shape) for coef in coefs)
        return p_x * x + p_m * prediction.to(dtype)

    def _check_x(self, x: Tensor) -> None:
        checks.tensor("x", x)
        expected = (self.img_channels, *self.img_size)
        if x.shape[1:] != expected or x.ndim == 0 or x.shape[0] == 0:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"x must have shape [N, {shape}] with N >= 1, got {checks.text(x)}")
        if x.device != self.betas.device:
            raise ValueError(f"x is on {x.device}, this Diffusion on {self.betas.device}: move one of them with .to()")

    def _checked_place(self, batch_size: int, device: torch.device | str) -> tuple[int, torch.device]:
        """batch_size as an int, and the device, which must be the network's."""
        batch_size = checks.integer("batch_size", batch_size, 1)
        device = checks.device("device", device)
        home = next((p.device for p in self.model.parameters()), device)
        if home.type != device.type or None not in (home.index, device.index) and home.index != device.index:
            raise ValueError(f"device is {device}, the network is on {home}: call diffusion.to({str(device)!r}) first")
        return batch_size, home

    def _checked_y(
        self, y: Tensor | None, batch_size: int, device: torch.device, others: bool = False
    ) -> Tensor | None:
        """y on the device, after a look at its shape and range; `others`: who knows of y beside the network."""
        null = self.null_label
        if y is None:
            if isinstance(null, Tensor):
                raise ValueError(f"y is required: [{batch_size}, ...], the condition of each image")
            return None
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor, got {checks.text(y)}: torch.as_tensor(y) makes one")
        if y.ndim == 0 or y.shape[0] != batch_size:
            rest = "".join(f", {n}" for n in null.shape) if isinstance(null, Tensor) else ""
            what = "as null_label has it" if isinstance(null, Tensor) else "a class per image"
            raise ValueError(f"y must have shape [{batch_size}{rest}], {what}; got {checks.text(y)}")
        if isinstance(null, Tensor) and y.shape[1:] != null.shape:
            raise ValueError(f"y must be like null_label, {list(null.shape)} for each image; got {checks.text(y)}")
        if isinstance(null, Tensor) and y.is_floating_point() != null.is_floating_point():
            raise TypeError(f"y must be like null_label, {checks.text(null)}; got {checks.text(y)}")
        if isinstance(null, int) and y.ndim != 1:
            raise ValueError(f"y must have shape [{batch_size}], or null_label be a tensor; got {checks.text(y)}")
        if y.is_meta and device.type != "meta":
            raise ValueError(f"y must hold numbers, got {checks.text(y)}")
        # A network that says nothing of classes may take any kind of condition.
        num_classes = getattr(self.model, "num_classes", self.num_classes)
        if num_classes is not None and isinstance(self.null_label, int):
            num_classes = max(num_classes, self.null_label + 1)
        if num_classes is not None:
            if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
                raise TypeError(f"y must be int64, the classes; got {checks.text(y)}: convert it with .long()")
            y = y.long()
            checks.tensor("y", y, shape=(batch_size,), dtype=torch.int64)
            checks.indices("y", y, num_classes)
        elif not others and not self._takes_labels:
            self._warn("y", "y is ignored: the network takes no labels")
        elif not others and hasattr(self.model, "num_classes"):
            self._warn("y", "y is ignored: the network was built without num_classes")
        return y.to(device)

    def _null(self, batch_size: int, device: torch.device) -> Tensor | None:
        """What stands for no condition, for each image; None where there is no such thing."""
        null = self.null_label
        if null is None:
            return None
        if isinstance(null, Tensor):
            return null.to(device).expand(batch_size, *null.shape)
        return torch.full((batch_size,), null, dtype=torch.int64, device=device)

    def _checked_cond(self, cond: Tensor | None, batch_size: int, device: torch.device) -> Tensor | None:
        """cond on the device, after a look at its shape."""
        if cond is None and not self.cond_channels:
            return None
        if not self.cond_channels:
            raise ValueError("cond is for a Diffusion made with cond_channels: this one has none")
        if cond is None:
            raise ValueError(f"cond is required: this Diffusion was made with cond_channels={self.cond_channels}")
        checks.tensor("cond", cond, shape=(batch_size, self.cond_channels, *self.img_size))
        return cond.to(device)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)
