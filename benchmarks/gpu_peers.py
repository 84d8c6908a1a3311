"""The strongest settings of PyTorch on a GPU: inductor's tuning, and CUDA graphs of several steps or a whole iteration.

Without a GPU the graphs are replaced by what they would capture, so that a dry run walks the same way.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sampling, training
from benchmarks.harness import DTYPES, OURS
from benchmarks.problem import Builder, Contender, Problem
from benchmarks.sampling import CHANNELS_LAST, NCHW, ReverseStep, Step, compile_module, with_sdpa

# What `mode="max-autotune"` sets, and the rest of what diffusion-fast found to pay.
TUNED = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
}
CUDA_GRAPH_TREES = {"triton.cudagraphs": True}
WARM_UP = 3


def set_fast_math() -> None:
    """Allow TF32 and cuDNN's search, for every contender."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def capture(
    body: Callable[[], Any], device: torch.device, reset: Callable[[], Any] = lambda: None
) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of ``body``, or ``body`` itself where there is no GPU.

    ``body`` runs a few times before the capture, each time after ``reset``: lazy initialisation can't be captured.
    """
    if device.type != "cuda":
        return body
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            reset()
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class CastEmbedding(nn.Module):
    """The sinusoidal embedding in float32, handed on in the network's dtype."""

    def __init__(self, embedding: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self.dtype = embedding, dtype

    def forward(self, t: Tensor) -> Tensor:
        return self.embedding(t).to(self.dtype)


def reverse_step(problem: Problem, memory_format: torch.memory_format) -> ReverseStep:
    """Return a step whose network holds its weights in the case's precision, which spares autocast's casts."""
    dtype = DTYPES[problem.precision]
    net = with_sdpa(problem.network()).to(dtype=dtype, memory_format=memory_format)
    if net.time_mlp is not None:
        net.time_mlp[0] = CastEmbedding(net.time_mlp[0], dtype)
    return ReverseStep(net)


def step_by_step(memory_format: torch.memory_format, **options: Any) -> Builder:
    """One compiled step a call, captured by inductor itself."""

    def build(problem: Problem) -> Contender:
        step = compile_module(reverse_step(problem, memory_format), problem, options | CUDA_GRAPH_TREES)

        def fresh(*args: Any) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return step(*args).clone()  # the next replay overwrites it

        return sampling.loop(problem, fresh, context=nullcontext)

    return build


def in_graph(memory_format: torch.memory_format, unroll: int, options: dict[str, Any] | None = None) -> Builder:
    """``unroll`` steps a CUDA graph: compiled where there are options, else eager."""

    def build(problem: Problem) -> Contender:
        step: Step = reverse_step(problem, memory_format)
        if options is not None:
            step = compile_module(step, problem, options)
        return graph_loop(problem, step, unroll)

    return build


@torch.no_grad()
def graph_loop(problem: Problem, step: Step, unroll: int) -> Contender:
    """Replay a graph of ``unroll`` steps that advances x and the row's index in place."""
    for name, steps in (("steps", problem.steps), ("checked", problem.checked)):
        if steps % unroll:
            raise ValueError(f"{name}={steps}: expected a multiple of the {unroll} steps in a graph")
    (start, y), device = problem.inputs, problem.device
    rows = problem.rows.clone()
    x, k = torch.empty_like(start), torch.empty(1, dtype=torch.int64, device=device)

    def reset() -> None:
        x.normal_()
        k.fill_(problem.steps - 1)

    def body() -> None:
        for _ in range(unroll):
            x.copy_(step(x, k, rows, y))
            k.sub_(1)

    replay = capture(body, device, reset)

    @torch.no_grad()
    def chain(steps: int) -> Tensor:
        for _ in range(steps // unroll):
            replay()
        return x.to("cpu", copy=True)

    def run() -> Tensor:
        reset()
        return chain(problem.steps)

    def predict() -> Tensor:
        rows.copy_(problem.quiet_rows)
        x.copy_(start)
        k.fill_(problem.checked - 1)
        samples = chain(problem.checked)
        rows.copy_(problem.rows)
        return samples

    return Contender(run, predict)


def whole_iteration(memory_format: torch.memory_format, options: dict[str, Any]) -> Builder:
    """A training iteration (loss, backward, Adam, EMA) as one CUDA graph, the loss compiled.

    The check runs the captured iteration eagerly: the graph holds its dropout.
    """

    def build(problem: Problem) -> Contender:
        on_gpu = problem.device.type == "cuda"
        trainer = training.PlainTrainer(problem, memory_format, options, capturable=on_gpu)
        trainer.net.train()
        loss = torch.empty((), device=problem.device)
        replay = capture(lambda: loss.copy_(trainer.step()), problem.device)

        def run() -> Tensor:
            trainer.net.train()
            for _ in range(problem.steps):
                replay()
            return loss.clone()

        return Contender(run, trainer.predict)

    return build


def sampling_contenders(unroll: int) -> dict[str, Builder]:
    """Return ours, the original, and the settings S1, S2 and S4 (graphs of 1 and of ``unroll`` steps)."""
    many = f"CUDA graph of {unroll} steps"
    return {
        OURS: partial(sampling.ours, engine="graph"),
        f"{OURS} eager": partial(sampling.ours, engine="eager"),
        f"{OURS} plain path": partial(sampling.ours, engine="graph", fused=False),
        "original": sampling.original_loop,
        f"torch eager {many} channels_last": in_graph(CHANNELS_LAST, unroll),
        f"torch eager {many} NCHW": in_graph(NCHW, unroll),
        "torch.compile max-autotune channels_last": step_by_step(CHANNELS_LAST, **TUNED),
        "torch.compile max-autotune NCHW": step_by_step(NCHW, **TUNED),
        "torch.compile CUDA graph of 1 step channels_last": in_graph(CHANNELS_LAST, 1, TUNED),
        f"torch.compile {many} channels_last": in_graph(CHANNELS_LAST, unroll, TUNED),
        f"torch.compile {many} NCHW": in_graph(NCHW, unroll, TUNED),
        f"torch.compile {many} channels_last, no epilogue fusion": in_graph(
            CHANNELS_LAST, unroll, TUNED | {"epilogue_fusion": False}
        ),
        f"torch.compile {many} channels_last, no loop reindexing": in_graph(
            CHANNELS_LAST, unroll, TUNED | {"loop_reindexing_after_fusion": False}
        ),
    }


def training_contenders() -> dict[str, Builder]:
    """Return ours, the original, eager, and the compiled loss with inductor's graphs or the whole iteration in one."""
    return {
        OURS: training.recorded,
        f"{OURS} eager": training.ours(),
        f"{OURS} eager, plain path": training.ours(fused=False),
        f"{OURS} eager, recompute=norm": training.ours("norm"),
        "original": training.original_loop,
        "torch eager channels_last": training.plain(CHANNELS_LAST),
        "torch eager NCHW": training.plain(NCHW),
        "torch.compile max-autotune channels_last": training.plain(CHANNELS_LAST, TUNED | CUDA_GRAPH_TREES),
        "torch.compile CUDA graph of the iteration channels_last": whole_iteration(CHANNELS_LAST, TUNED),
        "torch.compile CUDA graph of the iteration NCHW": whole_iteration(NCHW, TUNED),
    }
