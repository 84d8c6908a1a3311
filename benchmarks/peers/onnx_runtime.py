"""ONNX Runtime: the plain network exported with its weights in static shapes, in a loop that costs the host little."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.common import cpu_only, require
from benchmarks.problem import Builder, Contender, Problem
from benchmarks.sampling import ReverseStep, loop

OPSET = 18  # of 17 to 23 the fastest in both runtimes, which then see GroupNorm in parts


@contextmanager
def exported(problem: Problem) -> Iterator[Path]:
    """The plain network of the problem as an ONNX file with the inputs x, t float32 [N] and, with classes, y."""
    for module in ("onnx", "onnxscript"):
        require(module)
    x, y = problem.inputs
    inputs = {"x": x, "t": torch.zeros(problem.batch), "y": y}
    given = {name: value for name, value in inputs.items() if value is not None}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of ops of torchvision
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unet.onnx"
        torch.onnx.export(
            problem.network(),
            tuple(given.values()),
            file,
            input_names=list(given),
            output_names=["eps"],
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        yield file


class Runtime(nn.Module):
    """A foreign runtime as a network: ``infer`` takes and returns arrays, which share their memory with tensors."""

    def __init__(self, infer: Callable[[list[np.ndarray]], np.ndarray]) -> None:
        super().__init__()
        self.infer = infer

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        given = [value.contiguous().numpy() for value in (x, t, y) if value is not None]
        return torch.from_numpy(self.infer(given))


def loop_of(problem: Problem, infer: Callable[[list[np.ndarray]], np.ndarray]) -> Contender:
    """Return the plain loop around a runtime."""
    return loop(problem, ReverseStep(Runtime(infer)), context=nullcontext)


def onnx_runtime(problem: Problem) -> Contender:
    """All graph optimizations, as many threads as torch has."""
    runtime = require("onnxruntime")
    cpu_only(problem)
    if problem.precision != "float32":
        raise ValueError("its CPU kernels have no bf16")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with exported(problem) as file:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return loop_of(problem, lambda given: session.run(None, dict(zip(names, given, strict=True)))[0])


def contenders(compile: bool) -> dict[str, Builder]:
    """Return the one contender."""
    return {"onnxruntime": onnx_runtime}
