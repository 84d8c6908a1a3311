"""When ops may stand in for modules.

Where a submodule was hooked, parametrized, patched or replaced, the modules themselves are called: nothing of that is
skipped.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

_STOCK = {nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm2d, nn.Identity, nn.Conv2d, nn.Dropout, nn.Sequential}

_HELD = {nn.Linear, nn.SiLU, nn.Embedding, nn.ModuleList}

_CODE: dict[type, tuple[Any, ...]] = {}  # of classes, unless somebody patches them


def code(of: type[nn.Module]) -> tuple[Any, ...]:
    """What calling a module of this class runs: its forward, and the part of a convolution's that people replace."""
    return of.forward, getattr(of, "_conv_forward", None)


def remember(*classes: type[nn.Module]) -> None:
    """From now on a class is touched when its code isn't that of now."""
    _CODE.update({each: code(each) for each in classes})


remember(*_STOCK, *_HELD)


class TakesNoiseState(nn.Module):
    """A module whose forward has the argument `noise_state`, from which dropout draws; a subclass may lack it."""

    takes_noise_state = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            arguments = inspect.signature(cls.forward).parameters.values()
            cls.takes_noise_state = any(a.name == "noise_state" or a.kind is a.VAR_KEYWORD for a in arguments)


def takes_noise_state(module: nn.Module) -> bool:
    """Whether forward can be given a noise_state, also under torch.compile; not where it was replaced."""
    module = getattr(module, "_orig_mod", module)
    return getattr(module, "takes_noise_state", False) and _runs_its_own_code(module)


def is_plain(*modules: nn.Module) -> bool:
    """Whether an op may stand in for these modules: PyTorch's own classes and tensors, without hooks or other code."""
    own = all(type(m) in _STOCK and are_plain(*m._parameters.values()) for m in modules)
    return own and is_untouched(*modules)


def is_untouched(*modules: nn.Module) -> bool:
    """Whether nothing runs when these modules are called but their class's own forward, as it was written."""
    if nn.modules.module._has_any_global_hook():
        return False
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if not _runs_its_own_code(m) or getattr(m, "_compiled_call_impl", None) is not None:
            return False
    return True


def _runs_its_own_code(module: nn.Module) -> bool:
    """Whether nobody put other code in the place of its class's, into the module or the class."""
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own:
        return False
    of = type(module)
    return of not in _CODE or code(of) == _CODE[of]


def is_known_throughout(module: nn.Module, *ours: type[nn.Module]) -> bool:
    """Whether all in it is of these classes or PyTorch's, in eval mode, and nobody else's; its tensors, too."""
    classes, modules = _STOCK | _HELD | set(ours), list(module.modules())
    plain = are_plain(*module.parameters(), *module.buffers())
    return plain and all(type(m) in classes and not m.training for m in modules) and is_untouched(*modules)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether these are PyTorch's own kinds, and not of a subclass, which may compute otherwise; or a compiler's."""
    return all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors) or torch.compiler.is_compiling()


def is_convolution(conv: nn.Module) -> bool:
    """Whether this is a convolution that `F.conv2d` computes from its weight, bias, stride and padding alone."""
    return (
        type(conv) is nn.Conv2d
        and is_plain(conv)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether this is a plain 1x1 convolution."""
    if not is_convolution(conv):
        return False
    c = cast(nn.Conv2d, conv)
    return c.kernel_size == c.stride == (1, 1) and c.padding == (0, 0)


def is_conv3x3(conv: nn.Module) -> bool:
    """Whether `conv3x3` computes what this module does."""
    if not is_convolution(conv):
        return False
    c = cast(nn.Conv2d, conv)
    return c.kernel_size == (3, 3) and c.stride == c.padding == (1, 1) and c.bias is not None
