"""OpenVINO: the plain network, converted from ONNX or from torch.export, whichever runs faster, in static shapes."""

from typing import Any

import torch

from benchmarks.checks import check_sampling
from benchmarks.peers.common import Fastest, cpu_only, require
from benchmarks.peers.onnx_runtime import exported, loop_of
from benchmarks.problem import Builder, Contender, Problem
from benchmarks.sampling import with_sdpa

PRECISION = {"float32": "f32", "bf16": "bf16"}


def from_onnx(problem: Problem) -> Any:
    with exported(problem) as file:
        return require("openvino").convert_model(file)


def from_torch(problem: Problem) -> Any:
    x, y = problem.inputs
    given = (x, torch.zeros(problem.batch)) + (() if y is None else (y,))
    program = torch.export.export(with_sdpa(problem.network()), given)
    return require("openvino").convert_model(program)


def openvino(convert: Any) -> Builder:
    """The model of ``convert``, compiled for latency: one stream on all of torch's threads."""

    def build(problem: Problem) -> Contender:
        core = require("openvino").Core()
        cpu_only(problem)
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISION[problem.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = core.compile_model(convert(problem), "CPU", settings).create_infer_request()
        return loop_of(problem, lambda given: request.infer(given, share_inputs=True, share_outputs=True)[0])

    return build


def contenders(compile: bool) -> dict[str, Builder]:
    """Return the one contender."""
    settings = {"from ONNX": openvino(from_onnx), "from torch.export": openvino(from_torch)}
    return {"openvino": Fastest(settings, check_sampling)}
