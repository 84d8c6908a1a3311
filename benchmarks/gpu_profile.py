"""Where the time of a run goes, by class of kernel: convolutions, norms, noise, copies..., and when nothing ran.

On a GPU the kernels are those that torch's profiler saw there, those in CUDA graphs too. Elsewhere, for a dry run, they
are ATen's operators with their own time, wrappers counted as launches beside what they call; our native functions are
none, and count as idle.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, describe, progress, time_interleaved
from benchmarks.problem import Builder, Problem

IDLE, OTHER = "idle", "other"
CONVOLUTION, PRODUCT, COPY = "convolution", "matrix product", "copies and layout"

# The first pattern found in a kernel's name, whatever the case of its letters, gives its class. Inductor's names list
# all that a kernel fuses: only its templates are classed by them. cuDNN's and cuBLAS's list layouts, types and helpers.
CLASSES = (
    (CONVOLUTION, r"^triton_(tem_fused_\w*)?convolution"),
    (PRODUCT, r"^triton_(tem_fused_\w*)?(add|b|badd)?mm"),
    ("fused by inductor", r"^triton_|^cpp_fused|CompiledFxGraph"),
    (COPY, r"nc?hwc?To|convertTensor"),
    ("attention", r"flash|fmha|softmax|sdpa|scaled_?dot_?product|attention"),
    (
        "group norm",
        r"group_?norm|norm_merge|two_pass_norm|RowwiseMoments|ComputeFusedParams|BackwardFusedParams|InternalGradients"
        r"|GammaBeta",
    ),
    (CONVOLUTION, r"conv(?!er)|fprop|dgrad|wgrad|implicit_|winograd|fft2d|cudnn"),
    (PRODUCT, r"gemm|gemv|cublas|nvjet|cutlass|splitK|\b(add|badd)?b?mm\b|matmul|aten::linear\b|(add|b)mmBackward"),
    (
        "noise, sampler, loss",
        r"q_sample|sampler_step|diffusion_loss|noise_kernel|timesteps_kernel|timestep_embedding|dropout|distribution_"
        r"|philox|mse_|aten::(normal|rand|randn|randint|random|bernoulli)(_like)?_?\b",
    ),
    ("optimizer and EMA", r"multi_tensor_apply|foreach|adam|lerp|ema_update|addcmul|addcdiv|Optimizer\."),
    (
        COPY,
        r"memcpy|memset|copy|\bcat\b|CatArray|transpose|convert|upsample|constant_pad|gather|index_?select"
        r"|aten::(to|_to_copy|clone|contiguous|fill_|zero_|zeros|zeros_like|ones|index|flip|pad"
        r"|t|view|reshape|_unsafe_view|permute|expand|as_strided|select|slice|narrow|split|chunk|unbind|unsqueeze)\b",
    ),
    ("reductions", r"reduce|reduction|aten::(sum|mean|norm|linalg_vector_norm|std|var|var_mean|amax|amin|max|min)\b"),
    (
        "pointwise",
        r"elementwise|residual_sum|aten::_?(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|sin|cos|silu|mish|relu|gelu"
        r"|sigmoid|tanh|threshold|clamp|clamp_min|clamp_max|where|reciprocal|ge|gt|le|lt|eq|ne)(_backward)?_?\b",
    ),
)
RULES = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES]


@cache
def kernel_class(kernel: str) -> str:
    """Return the class of a kernel by its name."""
    return next((name for name, rule in RULES if rule.search(kernel)), OTHER)


def by_class(averages: Iterable[Any], device: torch.device) -> dict[str, tuple[int, float]]:
    """Return class -> launches and own time in ms, of the profiler's averages; what the host did for a GPU is none."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    on_gpu = device.type == "cuda"
    for average in averages:
        if (average.device_type == DeviceType.CPU) == on_gpu or (on_gpu and average.is_user_annotation):
            continue
        launches, ms = found[name := kernel_class(average.key)]
        us = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        found[name] = launches + average.count, ms + us * 1e-3
    return dict(found)


def profiled(run: Callable[[], Any], device: torch.device) -> tuple[dict[str, tuple[int, float]], float]:
    """Run once under the profiler; return the work by class and the wall time in ms."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        (wall,) = time_interleaved({"": run}, device, repetitions=1, warmup=0)[""]
    return by_class(profiler.key_averages(), device), wall


def rows_of(work: Mapping[str, tuple[int, float]], wall: float, steps: int) -> list[Row]:
    """Return a row for each class, the longest first, and one for the time in which nothing ran.

    Args:
        work: class -> launches and ms in the run.
        wall: ms of the run.
        steps: of the run, which launches and ms are divided by.
    """
    rows: list[Row] = [
        {"kernels": name, "launches": launches / steps, "ms": ms / steps, "share_of_run": ms / wall}
        for name, (launches, ms) in sorted(work.items(), key=lambda item: -item[1][1])
    ]
    idle = max(0.0, wall - sum(ms for _, ms in work.values()))  # kernels of two streams may overlap
    return [*rows, {"kernels": IDLE, "ms": idle / steps, "share_of_run": idle / wall}]


def measure(case: str, problem: Problem, builders: Mapping[str, Builder]) -> list[Row]:
    """Build each contender, run it once to warm up and once under the profiler; one that fails becomes a row.

    Args:
        case: the name of the case in the rows.
        problem: what they solve; launches and times are per one of its ``steps``.
        builders: contender name -> function building it.

    Returns:
        a row for each class of kernels of each contender, with what the profiler costs the host in its idle time.
    """
    torch._dynamo.reset()  # drops what earlier cases compiled
    rows: list[Row] = []
    for name, build in builders.items():
        progress(f"{case} {problem.precision} batch {problem.batch}: profiling {name}")
        common: Row = {"case": case, "precision": problem.precision, "batch": problem.batch, "name": name}
        try:
            run = build(problem).run
            run()
            rows += [common | row for row in rows_of(*profiled(run, problem.device), problem.steps)]
        except Exception as error:  # a failure is a result, whatever it is
            rows.append(common | {"error": describe(error)})
    return rows
