"""The calls of each op that benchmarks/gpu_checks.py makes: sizes of one pass and of several chunks, and odd ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.ops import DROPOUT, Dropout, NoiseState
from ddpm_fast.reference import (
    diffusion_loss,
    ema_update,
    group_norm_silu,
    q_sample,
    residual_sum,
    sampler_step,
    timestep_embedding,
)

STATE = NoiseState.at(-5, 7, 2**33 + 1)
ALL = (torch.float32, torch.float16, torch.bfloat16)


def normals(shape: Sequence[int], seed: int) -> Tensor:
    """Return normals in float64, the same in every run."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniforms(shape: Sequence[int], seed: int) -> Tensor:
    """Return uniform numbers in float64, the same in every run."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: dict[str, Tensor]  # its arguments in float64 and in whole numbers
    static: dict[str, Any] = field(default_factory=dict)  # its other arguments; states are on the CPU
    wrt: tuple[str, ...] = ()  # what has a gradient
    keep: tuple[str, ...] = ()  # what is float32 in every precision
    dtypes: tuple[torch.dtype, ...] = ALL


TABLES = {
    name: uniforms((9,), seed) for seed, name in enumerate(("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
}
ROWS, ROW = uniforms((4, 8), 2), torch.tensor(2)


def _images(dry: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Less than one program's elements a sample, and those of several with an end that fills no vector."""
    return ((3, 3, 7, 5), (2, 3, 21, 19)) if dry else ((3, 3, 7, 5), (64, 3, 32, 32), (4, 3, 255, 253))


def _q_sample(dry: bool) -> list[Case]:
    found = []
    for shape in _images(dry):
        tensors = {"x_start": normals(shape, 0), "t": torch.arange(shape[0]) % 9, **TABLES}
        of = ops.q_sample, q_sample.q_sample
        found.append(Case(f"drawn noise {shape}", *of, tensors, {"noise": STATE}, keep=tuple(TABLES)))
        tensors = tensors | {"noise": normals(shape, 1)}
        found.append(Case(f"given noise {shape}", *of, tensors, keep=tuple(TABLES)))
    return found


def _diffusion_loss(dry: bool) -> list[Case]:
    found = []
    for shape in _images(dry):
        only = {"model_out": normals(shape, 0)}
        target = {name: uniforms(shape[:1], seed) for seed, name in ((1, "noise_coef"), (2, "x_coef"))}
        every = only | {"noise": normals(shape, 4), "x_start": normals(shape, 3)} | target
        of = ops.diffusion_loss, diffusion_loss.diffusion_loss
        drawn: dict[str, Any] = {"loss_type": "l2", "noise": STATE}
        found.append(Case(f"l2, drawn noise {shape}", *of, only, drawn, wrt=("model_out",)))
        label, l1 = f"l1, given noise and coefficients {shape}", {"loss_type": "l1"}
        found.append(Case(label, *of, every, l1, wrt=("model_out",), keep=tuple(target)))
        huber = drawn | {"loss_type": "huber", "reduction": "none"}
        found.append(Case(f"huber of images, drawn noise {shape}", *of, only, huber, wrt=("model_out",)))
    return found


def _sampler_step(dry: bool) -> list[Case]:
    """The state is float32, or of the tested precision as the network's output always is."""
    found = []
    for shape in _images(dry):
        x, model_out, hist, z = (normals(shape, seed) for seed in range(4))
        tensors = {"x": x, "model_out": model_out, "rows": ROWS, "k": ROW}
        learned = {"rows": uniforms((4, 9), 2), "variance": 2 * uniforms(shape, 4) - 1}
        for name, more, static, keep in (
            ("no noise", {}, {}, ("x",)),
            ("given noise, clip", {"noise": z}, {"clip": 0.5}, ("x", "noise")),
            (
                "drawn noise, hist, clip",
                {"hist": hist},
                {"noise": STATE, "clip": 1.0, "return_x0": True},
                ("x", "hist"),
            ),
            ("drawn noise, variance", learned, {"noise": STATE}, ("x",)),
            ("drawn noise, low precision", {}, {"noise": STATE}, ()),
        ):
            of = ops.sampler_step, sampler_step.sampler_step
            found.append(Case(f"{name} {shape}", *of, tensors | more, static, keep=("rows", *keep)))
    return found


def _timestep_embedding(dry: bool) -> list[Case]:
    def whole(t: Tensor, dim: int) -> Tensor:
        return ops.timestep_embedding(t.long(), dim)

    times = uniforms((7 if dry else 256,), 0) * 1000
    return [
        Case(name, op, timestep_embedding.timestep_embedding, {"t": t}, {"dim": dim}, dtypes=ALL[:1])
        for name, op, t, dim in (
            ("float32", ops.timestep_embedding, times, 10),
            ("int64", whole, times.floor(), 128),
        )
    ]


def _ema_update(dry: bool) -> list[Case]:
    """Of many tensors at once; averages are float32, or of the tested precision as the weights always are."""
    shapes = ((), (3,), (5, 7), (8, 4, 3, 3), (4999,), *(() if dry else ((512, 512, 3, 3), (10**6 + 1,))))

    def updated(update: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
        def run(decay: float, **tensors: Tensor) -> tuple[Tensor, ...]:
            averages = [v.clone() for name, v in tensors.items() if name.startswith("average")]
            update(averages, [v for name, v in tensors.items() if name.startswith("value")], decay)
            return tuple(averages)

        return run

    averages = {f"average {i}": normals(shape, 2 * i) for i, shape in enumerate(shapes)}
    values = {f"value {i}": normals(shape, 2 * i + 1) for i, shape in enumerate(shapes)}
    of, static = (updated(ops.ema_update), updated(ema_update.ema_update), averages | values), {"decay": 0.7}
    return [Case("float32", *of, static, keep=tuple(averages)), Case("low precision", *of, static)]


PARAMETERS = ("weight", "bias", "add", "scale", "shift")
EVERY = ("x", "x2", "weight", "bias", "add", "residual", "scale", "shift")
DROPPED = Dropout(0.2, STATE, DROPOUT + 1)

# (N, C1, C2, H, W, groups) on a GPU, the same for an interpreter, arguments ("row": add is [C]), the rest
NORMS: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...], dict[str, Any]], ...] = (
    # groups of 4, in several chunks
    ((4, 128, 0, 32, 32, 32), (1, 64, 0, 24, 24, 16), ("x", "weight", "bias"), {}),
    # groups of 12, of which one straddles the inputs
    ((2, 64, 32, 64, 64, 8), (2, 16, 8, 3, 5, 2), EVERY, {"dropout": DROPPED}),
    # a group a channel, one pass
    ((3, 256, 0, 16, 16, 256), (2, 8, 0, 3, 3, 8), ("x",), {"weight": None, "bias": None, "activation": "none"}),
    # odd sizes: no eight channels share a counter
    (
        (2, 12, 8, 7, 5, 5), (2, 12, 8, 3, 5, 5), ("x", "x2", "row"),
        {"weight": None, "bias": None, "activation": "mish", "dropout": DROPPED},
    ),
    ((2, 48, 0, 9, 11, 4), (1, 24, 0, 3, 3, 2), ("x", "weight", "bias", "scale", "shift"), {"activation": "relu"}),
)  # fmt: skip


def _group_norm_silu(dry: bool) -> list[Case]:
    found = []
    for large, small, names, static in NORMS:
        n, c1, c2, h, w, groups = shape = small if dry else large
        c = c1 + c2
        made = {"x": (n, c1, h, w), "x2": (n, c2, h, w), "residual": (n, c1, h, w), "weight": (c,), "bias": (c,)}
        made |= {"row": (c,)} | dict.fromkeys(("add", "scale", "shift"), (n, c))
        tensors = {"add" if k == "row" else k: normals(made[k], i) for i, k in enumerate(names)}
        of = ops.group_norm_silu, group_norm_silu.group_norm_silu
        label = f"{shape} with {', '.join((*names, *static))}"
        found.append(Case(label, *of, tensors, {"groups": groups} | static, tuple(tensors), PARAMETERS))
    return found


def _of_bias(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum without a residual."""
    return lambda x, bias: function(x, None, bias)


def _residual_sum(dry: bool) -> list[Case]:
    """One program and several, whose ends fill no vector; a bias in the images' precision and in float32."""
    found = []
    for shape in ((3, 5, 7, 5), (2, 40, 21, 19)) if dry else ((3, 5, 7, 5), (16, 128, 32, 32), (2, 3, 255, 253)):
        tensors = {"x": normals(shape, 0), "residual": normals(shape, 1)}
        of, biased = (ops.residual_sum, residual_sum.residual_sum), tensors | {"bias": normals(shape[1:2], 2)}
        found.append(Case(f"no bias {shape}", *of, tensors, wrt=tuple(tensors)))
        alone = {"x": tensors["x"], "bias": biased["bias"]}
        found.append(Case(f"no residual {shape}", *map(_of_bias, of), alone, wrt=tuple(alone)))
        found.append(Case(f"bias {shape}", *of, biased, wrt=tuple(biased)))
        found.append(Case(f"float32 bias {shape}", *of, biased, wrt=tuple(biased), keep=("bias",)))
    return found


CASES: dict[str, Callable[[bool], list[Case]]] = {
    "q_sample": _q_sample,
    "diffusion_loss": _diffusion_loss,
    "sampler_step": _sampler_step,
    "timestep_embedding": _timestep_embedding,
    "ema_update": _ema_update,
    "group_norm_silu": _group_norm_silu,
    "residual_sum": _residual_sum,
}
