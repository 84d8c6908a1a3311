"""Where numbers stopped being finite: a step is repeated, and watched layer by layer."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..diffusion import Diffusion

ADVICE = "try a lower lr, or without bf16"


def explain(diffusion: Diffusion, step: int, losses: Callable[[], Iterable[Tensor]]) -> str:
    """One sentence on a step that failed: its loss, the timesteps of the bad images, and the first bad layer.

    Args:
        diffusion: with the weights, and the number of forward calls, that it had before that step.
        step: its number.
        losses: makes the forward passes of that step again.
    """
    seen: list[tuple[Tensor, Tensor]] = []  # t and loss of the images
    observer, diffusion.observer = diffusion.observer, lambda t, losses: seen.append((t, losses))
    try:
        with _watched(diffusion.model) as found:
            total = 0.0
            for loss in losses():
                loss.backward()
                total += float(loss.detach())
    finally:
        diffusion.observer = observer
    timesteps, images = (torch.cat(parts) for parts in zip(*seen, strict=True))
    bad = ~images.isfinite()
    if math.isfinite(total) and "gradient" in found:
        return f"the gradient is not finite at step {step}, first that of {found['gradient']}: {ADVICE}"
    if math.isfinite(total):
        return f"the loss was not finite at step {step}, but is when the step is repeated: {ADVICE}"
    t = timesteps[bad]
    where = f"{len(t)} of {len(bad)} images, at timesteps {int(t.min())} to {int(t.max())} of {diffusion.num_timesteps}"
    layer = found.get("layer", "the loss itself")
    if weight := found.get("weight"):
        layer += f", and the weight {weight} isn't either"
    return f"the loss is {total} at step {step} ({where}); the first output not finite is that of {layer}: {ADVICE}"


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, str]]:
    """Notes what isn't finite: the first "layer" by its output, the first "weight", the first weight's "gradient"."""
    found: dict[str, str] = {}
    handles = []

    def note(kind: str, name: str, values: Any) -> None:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        if kind not in found and not all(bool(x.isfinite().all()) for x in tensors):
            found[kind] = name

    for name, module in model.named_modules():
        # Layers with hooks are called one by one, never fused; what lies inside another comes first.
        hook = lambda m, x, out, name=name: note("layer", name or "the network", out)  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    for name, p in model.named_parameters():
        note("weight", name, p.detach())
        if p.requires_grad:
            grad = lambda p, name=name: note("gradient", name, p.grad)  # noqa: E731
            handles.append(p.register_post_accumulate_grad_hook(grad))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
