"""Contenders from other projects, a module each; imported when built, so that none of them need be installed."""

from collections.abc import Callable, Iterable

from benchmarks.peers import diffusers, lucidrains, onnx_runtime, openvino
from benchmarks.problem import Builder

# Family -> (sampling, training): each takes whether to compile and returns contenders by name.
Family = Callable[[bool], dict[str, Builder]]
FAMILIES: dict[str, tuple[Family, Family]] = {
    "diffusers": (diffusers.sampling_contenders, diffusers.training_contenders),
    "denoising-diffusion-pytorch": (lucidrains.sampling_contenders, lucidrains.training_contenders),
    "onnxruntime": (onnx_runtime.contenders, lambda compile: {}),
    "openvino": (openvino.contenders, lambda compile: {}),
}


def contenders(training: bool, compile: bool, families: Iterable[str]) -> dict[str, Builder]:
    """Return the contenders of these families in sampling or training; ONNX Runtime and OpenVINO only sample."""
    found: dict[str, Builder] = {}
    for family in families:
        found |= FAMILIES[family][training](compile)
    return found
