"""Chains for any callable, on data of any rank: `sample`, and how a batch is gone through in parts."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adaptive import adaptive
from .chain import Correction, OnStep, Predictor, guided, halves
from .engine import Start, denoise, eval_mode, philox_start
from .graphs import Graphs
from .memory import batch_that_fits, in_parts, out_of_memory
from .models.made import Kept, fixed_weights
from .models.state import fresh_seed
from .ops import NoiseState
from .ops import _checks as checks
from .progress import progress_bar
from .samplers import Plan
from .schedules import Array

# On the CPU larger batches gain nothing, so only beyond this size is it worth a look at what fits the memory.
UNCHECKED_BATCH = 64
STEPS_OF_FIXED_WEIGHTS = 8  # from which on it pays to make something of the weights first; on GPUs always


def output_of(result: Any) -> Tensor:
    """The tensor in what a network returned: itself, its attribute `sample`, as in diffusers, or the first of a tuple.

    Raises:
        TypeError: there is none.
    """
    if isinstance(result, Tensor):
        return result
    out = result[0] if isinstance(result, (tuple, list)) and result else getattr(result, "sample", None)
    if not isinstance(out, Tensor):
        raise TypeError(f"model must return a tensor like x, got a {type(result).__name__}")
    return out


def check_output(out: Tensor, x: Tensor) -> Tensor:
    """`out`, where it is like x, or has twice its channels.

    Raises:
        ValueError: it is not.
    """
    learned = x.ndim > 1 and out.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if out.shape != x.shape and not learned:
        raise ValueError(f"model must return a tensor like x, {list(x.shape)}; got {checks.text(out)}")
    return out


def check_callback(callback: object) -> None:
    """Raise TypeError unless it is None or a function."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of (k, x), got {checks.text(callback)}")


def check_corrections(corrections: object) -> tuple[Correction, ...]:
    """As a tuple, also of a single one; raise TypeError unless they are functions."""
    if callable(corrections):
        return (corrections,)
    if not isinstance(corrections, Sequence) or not all(callable(c) for c in corrections):
        raise TypeError(f"corrections must be a list of functions of (x0_hat, now), got {checks.text(corrections)}")
    return tuple(corrections)


@contextmanager
def _bar(progress: bool, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar, told how much of the total is done; or nothing."""
    if not progress:
        yield lambda done: None
        return
    with progress_bar(total, f"sampling, images x {unit}") as bar:
        yield lambda done: bar.update(done - bar.n)


Watch = Callable[[int, float, Tensor], None]  # (k, share of the way that is done, x) after step k


class Way(NamedTuple):
    """How a chain gets from x_T to images."""

    steps: int  # of an image, for the progress bar
    unit: str  # what they are
    t: Tensor  # [1], what the network is told at first
    go: Callable[[Predictor, Tensor, NoiseState | None, Watch | None], Tensor]  # (network, x_T, noise, watch) -> images


def by_plan(plan: Plan, device: torch.device, graphs: Graphs | None, **options: Any) -> Way:
    """Through the rows of a plan; `options` are those of `engine.denoise`."""

    def go(network: Predictor, x: Tensor, state: NoiseState | None, watch: Watch | None) -> Tensor:
        on_step = None if watch is None else lambda k, x: watch(k, (k + 1) / len(plan), x)
        try:
            return denoise(network, x, plan, state, on_step, graphs=graphs, **options)
        except (RuntimeError, MemoryError) as error:
            if graphs is not None and out_of_memory(error):
                graphs.clear()
            raise

    return Way(len(plan), "steps", plan.timesteps(device)[:1], go)


def by_adaptive_steps(
    alphas_cumprod: Array, prediction: str, device: torch.device, scale: float | None, options: Mapping[str, Any]
) -> Way:
    """In steps of each image's own; `scale` of guidance, `options` are those of `adaptive`."""

    def go(network: Predictor, x: Tensor, state: NoiseState | None, watch: Watch | None) -> Tensor:
        count = itertools.count()

        def predict(x: Tensor, t: Tensor, places: Tensor) -> Tensor:
            out, _ = halves(network.of(places)(x, t), x.shape[1])
            return out if scale is None else guided(out, x.new_full((1,), scale), x.shape[0])

        on_step = None if watch is None else lambda share, x: watch(next(count), share, x)
        return adaptive(predict, x, alphas_cumprod, prediction, on_step=on_step, **options)

    return Way(100, "percent", torch.full((1,), len(alphas_cumprod) - 1.0, device=device), go)


def run_chains(
    way: Way,
    predict: Callable[[slice], Predictor],
    start: Start,
    batch_size: int,
    *,
    progress: bool = False,
    callback: OnStep | None = None,
    whole: bool = False,
    place: torch.device | str | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """The chains of a batch, in as many parts as the memory asks for.

    Args:
        predict: what predicts for a part of the batch.
        start: where that starts.
        whole: never split.
        place: where the images are collected; by default where they are made.
        kept: what chains before have made of the network's weights on a CPU.
    """
    with _bar(progress, batch_size * way.steps, way.unit) as show:

        def run(part: slice) -> Tensor:
            def watch(k: int, share: float, x: Tensor) -> None:
                show(part.start * way.steps + round(share * way.steps) * x.shape[0])
                if callback is not None:
                    callback(k, x)

            x, state = start(part)
            watched = watch if progress or callback is not None else None
            fixed = way.steps >= STEPS_OF_FIXED_WEIGHTS or not x.is_cpu
            with fixed_weights(kept if x.is_cpu else None) if fixed else nullcontext():
                images = way.go(predict(part), x, state, watched)
            return images if place is None else images.to(place)

        if whole:
            return run(slice(0, batch_size))
        limit = batch_size
        if batch_size > UNCHECKED_BATCH:
            one = slice(0, 1)
            limit = batch_that_fits(predict(one), start(one)[0], way.t)
        return in_parts(run, batch_size, limit)


def sample(
    model_fn: Callable[..., Any],
    x: Tensor | Sequence[int],
    plan: Plan,
    *inputs: Tensor,
    guidance: float | Sequence[float] | None = None,
    without: Sequence[Tensor] | None = None,
    corrections: Sequence[Correction] = (),
    seed: int | None = None,
    first_index: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    graphs: Graphs | None = None,
    progress: bool = False,
    callback: OnStep | None = None,
) -> Tensor:
    """Draw from anything that predicts: `model_fn(x, t, *inputs)` for x [N, ...] and t [N] as the plan tells it.

        plan = make_plan("dpmpp_2m", alphas_cumprod, "eps", 20)
        images = sample(net, (16, 3, 32, 32), plan, labels, guidance=3.0, without=[no_label])

    Args:
        model_fn: returns a tensor like x (alone, in a tuple, or as attribute `sample`), or one with twice the channels,
            whose second half is the learned variance. A Module is run in eval mode.
        x: [N, ...], x_T; or its shape, to be drawn.
        plan: `make_plan` makes one.
        inputs: further arguments of `model_fn`, [N, ...] each, such as labels.
        guidance: scale of classifier-free guidance, one or one a row; `without` are the inputs that stand for none, as
            of one image, [1, ...] or [N, ...] each. A step calls `model_fn` once, with 2 N images.
        corrections: functions (x0_hat, now) -> x0_hat, such as `dynamic_threshold()`.
        seed, first_index: as in `Diffusion.sample`.
        device, dtype: of the chain; by default those of x, else of `model_fn`'s parameters, else the CPU and float32.
        graphs: a `Graphs()` of the caller's, which keeps recorded steps of a Module from call to call, and on a CPU
            what was made of its weights; without it steps are eager on a GPU.
        progress, callback: as in `Diffusion.sample`.

    Returns:
        Like x_T, on its device.

    Raises:
        ValueError, TypeError: an argument is out of range or does not fit.
    """
    if not callable(model_fn):
        raise TypeError(f"model_fn must be a function of (x, t, *inputs), got {checks.text(model_fn)}")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {checks.text(plan)}: make_plan makes one")
    plan = plan if guidance is None else plan.guided(guidance)
    noise = x if isinstance(x, Tensor) else None
    shape = tuple(noise.shape) if noise is not None else checks.integers("x", x, 1)
    if not shape:
        raise ValueError("x must have a batch dimension, got a scalar")
    given = [noise] if noise is not None else []
    module = model_fn if isinstance(model_fn, nn.Module) else None
    weights = [] if module is None else [p for p in module.parameters() if p.is_floating_point()][:1]
    home = (given + weights)[0].device if given + weights else torch.device("cpu")
    place = home if device is None else checks.device("device", device)
    if dtype is None:
        dtype = noise.dtype if noise is not None and noise.is_floating_point() else torch.float32
        dtype = torch.promote_types(dtype, torch.float32)
    conditions = _conditions("inputs", inputs, shape[0], place)
    none_each = _without(without, conditions) if plan.guidance is not None else None
    corrections = check_corrections(corrections)
    check_callback(callback)
    checks.flag("progress", progress)
    if not isinstance(graphs, (Graphs, type(None))):
        raise TypeError(f"graphs must be a ddpm_fast.graphs.Graphs(), got {checks.text(graphs)}")

    def call(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return check_output(output_of(model_fn(x if not weights else x.to(weights[0].dtype), t, *conditions)), x)

    def predict(part: slice) -> Predictor:
        none = None if none_each is None else [w[part] for w in none_each]
        return Predictor(module, call, [i[part] for i in conditions], none)

    start = philox_start(shape, dtype, place, fresh_seed() if seed is None else seed, first_index, noise)
    way = by_plan(plan, place, graphs, engine="auto", corrections=corrections)
    with nullcontext() if module is None else eval_mode(module):
        kept = None if graphs is None else graphs.made_of(model_fn)
        return run_chains(way, predict, start, shape[0], progress=progress, callback=callback, kept=kept)


def _without(without: object, conditions: Sequence[Tensor]) -> list[Tensor]:
    """What stands for no condition, like each of the conditions [N, ...].

    Raises:
        ValueError, TypeError: it is not, or missing.
    """
    if without is None or not conditions:
        raise ValueError("guidance needs inputs, and without: what stands for them in images without condition")
    if not isinstance(without, (list, tuple)):
        raise TypeError(f"without must be a list with a tensor for each of the inputs, got {checks.text(without)}")
    if len(without) != len(conditions):
        raise ValueError(f"without must hold an input for each of the {len(conditions)}, got {len(without)}")
    found = []
    for none, condition in zip(without, conditions, strict=True):
        value = torch.tensor(none, dtype=condition.dtype) if isinstance(none, (int, float)) else none
        if isinstance(value, Tensor) and value.shape == condition.shape[1:]:  # as of one image
            value = value[None]
        (value,) = _conditions("without", [value], condition.shape[0], condition.device, 1)
        if value.shape != condition.shape or value.is_floating_point() != condition.is_floating_point():
            raise ValueError(f"without must be like inputs, {checks.text(condition)}; got {checks.text(value)}")
        found.append(value)
    return found


def _conditions(
    name: str, values: Sequence[Tensor], images: int, device: torch.device, least: int | None = None
) -> list[Tensor]:
    """One for each image, on the device; `least`: other sizes that stand for all."""
    for value in values:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] not in (images, least):
            sizes = f"{images}" if least is None else f"{images} or {least}"
            raise ValueError(f"{name} must be tensors with a first dimension of {sizes}, got {checks.text(value)}")
    return [v.to(device).expand(images, *v.shape[1:]) for v in values]
