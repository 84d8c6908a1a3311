"""Peers from other projects: each solves what it is said to solve, is refused when it doesn't, and may be missing."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import idx_bytes

from benchmarks import checks, memory, peers, sample_quality, sampling, throughput, training
from benchmarks.checks import check_sampling, check_training
from benchmarks.harness import OURS, Disagreement, check_agreement, markdown, pick_device, relative_error
from benchmarks.ops import contenders
from benchmarks.ops.group_norm_silu import cases
from benchmarks.peers import common, diffusers, expected, lucidrains, onnx_runtime, openvino
from benchmarks.problem import Contender, Problem, flops_per_image, measure
from benchmarks.sampling import CHANNELS_LAST, NCHW
from ddpm_fast import Diffusion, ops, preset
from ddpm_fast.training import readers
from ddpm_fast.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = replace(preset("digits"), base_channels=8, num_res_blocks=1, dropout=0.0)
PACKAGES = {
    "diffusers": ("diffusers",),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", "einops", "ema_pytorch", "accelerate", "scipy"),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
SAMPLERS = {
    "diffusers": diffusers.pipeline(CHANNELS_LAST),
    "denoising-diffusion-pytorch": lucidrains.sampler(NCHW, flash=True),
    "onnxruntime": onnx_runtime.onnx_runtime,
    "openvino": openvino.openvino(openvino.from_torch),
}
TRAINERS = {
    "diffusers": diffusers.trainer(NCHW),
    "denoising-diffusion-pytorch": lucidrains.trainer(CHANNELS_LAST),
}


@pytest.fixture(autouse=True)
def short_chains(monkeypatch):
    """Enough to tell a spread that is ten times too small."""
    monkeypatch.setattr(checks, "SPREAD_ELEMENTS", 1024)


def need(family: str) -> None:
    """Skip where a package of the family is missing."""
    missing = [name for name in PACKAGES[family] if find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


def make_problem(precision: str = "float32", **changes) -> Problem:
    return Problem(TINY, CPU, batch=4, steps=3, precision=precision, **changes)


def without_network(monkeypatch) -> None:
    """Sabotage every peer's network: it predicts nothing."""
    for owner in (diffusers.Unet2D, onnx_runtime.Runtime):
        monkeypatch.setattr(owner, "forward", lambda self, x, t, y=None: x * 0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("family", SAMPLERS)
def test_a_sampler_that_computes_something_else_is_refused(family, precision, monkeypatch):
    need(family)
    if (family, precision) == ("onnxruntime", "bf16"):
        pytest.skip("it has no bf16 on CPUs")
    p = make_problem(precision, checked=3)
    contender = SAMPLERS[family](p)
    check_sampling(p, family, contender)
    wrong = contender.predict() * 1.2
    with pytest.raises(Disagreement, match="from the float64 reference"):
        check_sampling(p, family, Contender(contender.run, lambda: wrong, problem=contender.problem))
    quiet = Contender(lambda: contender.run() * 0.1, contender.predict, problem=contender.problem)
    with pytest.raises(Disagreement, match="spreads its results"):
        check_sampling(p, family, quiet)
    if family != "denoising-diffusion-pytorch":  # its network is its own
        without_network(monkeypatch)
        with pytest.raises(Disagreement, match="from the float64 reference"):
            check_sampling(p, family, contender)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("family", TRAINERS)
def test_a_trainer_that_computes_something_else_is_refused(family, precision, monkeypatch):
    need(family)
    p = make_problem(precision, num_timesteps=1000)
    check_training(p, family, TRAINERS[family](p))
    for loss in (diffusers.Loss, lucidrains.Loss):
        forward = loss.forward
        monkeypatch.setattr(loss, "forward", lambda *args, forward=forward: forward(*args) / 100)
    with pytest.raises(Disagreement, match="from the float64 reference"):
        check_training(p, family, TRAINERS[family](p))


@pytest.mark.minutes
@pytest.mark.parametrize("family", TRAINERS)
def test_a_compiler_takes_a_trainer(family):
    need(family)
    p = make_problem(num_timesteps=1000, compiler="eager")
    build = {"diffusers": diffusers.trainer, "denoising-diffusion-pytorch": lucidrains.trainer}[family]
    check_training(p, family, build(CHANNELS_LAST, {})(p))


def test_diffusers_network_is_ours():
    """Weight by weight: a swapped one is found, and no FLOP is missing."""
    need("diffusers")
    p = make_problem()
    contender = SAMPLERS["diffusers"](p)
    assert contender.row["flop_ratio"] == 1
    solved = contender.problem
    plain = common.own(Problem, solved)
    x, t = p.inputs[0], torch.arange(4)
    assert relative_error(solved.network()(x, t), plain.network()(x, t)) < 1e-5
    cifar10 = preset("cifar10")
    assert flops_per_image(cifar10, build=diffusers.Unet2D) == flops_per_image(cifar10)


def test_a_swapped_weight_of_diffusers_is_found(monkeypatch):
    need("diffusers")
    pairs = diffusers._pairs

    def swapped(plain, unet):
        for layer, parts in pairs(plain, unet):
            yield layer, parts[::-1]

    monkeypatch.setattr(diffusers, "_pairs", swapped)
    with pytest.raises(Disagreement, match="UNet2DModel"):
        diffusers.pipeline(NCHW)(make_problem(num_timesteps=4))


def test_flop_of_lucidrains_network_at_cifar10():
    need("denoising-diffusion-pytorch")
    config = preset("cifar10")
    ratio = flops_per_image(config, build=lucidrains.unet) / flops_per_image(config)
    assert 0.5 < ratio < 2


def test_torchvision_is_stubbed_for_the_import_only():
    need("denoising-diffusion-pytorch")
    installed = find_spec("torchvision") is not None
    lucidrains.package()
    assert ("torchvision" in sys.modules) == installed


def test_the_fastest_setting_that_agrees_is_kept():
    p = make_problem()
    right = sampling.eager(NCHW)(p)

    def slow() -> torch.Tensor:
        for _ in range(20):
            right.run()
        return right.run()

    settings = {
        "slow": lambda p: Contender(slow, right.predict),
        "fast": lambda p: Contender(right.run, right.predict),
        "wrong": lambda p: Contender(lambda: torch.zeros(4, 1, 8, 8), right.predict),
    }
    assert common.Fastest(settings, check_sampling)(p).row["setting"] == "fast"
    with pytest.raises(Disagreement):
        common.Fastest({"wrong": settings["wrong"]}, check_sampling)(p)


def test_a_missing_peer_is_a_row(monkeypatch):
    def missing(name, *args):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(common.importlib, "import_module", missing)
    for trains in (False, True):
        builders = peers.contenders(trains, compile=True, families=peers.FAMILIES)
        rows = measure("case", make_problem(), builders, check_training if trains else check_sampling, 1, 1, 1.0)
        assert [row["name"] for row in rows] == list(builders)
        assert all("is not installed: pip install" in row["error"] for row in rows)
    assert "is not installed" in markdown(rows)


def test_peers_join_full_runs_and_quick_ones_on_request():
    parse = throughput.parser("", "steps").parse_args
    assert throughput.families(parse(["--quick"])) == ()
    assert throughput.families(parse([])) == tuple(peers.FAMILIES) == tuple(PACKAGES)
    assert throughput.families(parse(["--peers", "none"])) == ()
    assert throughput.families(parse(["--quick", "--peers", "openvino"])) == ("openvino",)
    for trains in (False, True):
        eager, compiled = (peers.contenders(trains, compile, peers.FAMILIES) for compile in (False, True))
        assert not [name for name in eager if "compile" in name] and set(eager) < set(compiled)


def test_a_slow_peer_is_noted():
    def row(name: str, ms: float, precision: str = "float32") -> dict:
        return {"case": expected.CASE, "precision": precision, "batch": expected.BATCH, "name": name, "ms": ms}

    base = row("torch eager NCHW", 100.0)
    slow, fast = row("openvino", 150.0, "bf16") | {"note": "x"}, row("onnxruntime", 80.0)
    expected.annotate([slow, fast], [base])
    assert slow["note"].startswith("x; 1.50 of eager float32 NCHW, expected 1.00") and "note" not in fast
    other = row("openvino", 500.0) | {"batch": 16}
    expected.annotate([other], [base])
    expected.annotate([unmeasured := row("openvino", 500.0)], [])
    assert "note" not in other and "note" not in unmeasured


def test_what_waits_for_the_backward_is_counted_once_and_without_weights():
    net = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 16))
    x = torch.randn(5, 16)

    def run() -> torch.Tensor:
        net(x).square().mean().backward()

    shapes = {tuple(sorted(p.shape)) for p in net.parameters()}
    # x, the sigmoid's output (kept twice, counted once), the last output.
    assert memory.saved_bytes(run, shapes) == 4 * 5 * (16 + 32 + 16)


def trainers(allocate: int = 0) -> dict:
    def build(problem: Problem) -> Contender:
        contender = training.plain(NCHW)(problem)

        def run() -> torch.Tensor:
            torch.ones(allocate + 1)
            return contender.run()

        return Contender(run, contender.predict)

    return {"peer": build}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 128, 5, 7), 32),  # two slabs; more rows than pixels
        ((3, 36, 9, 5), 3),  # groups of 12 channels, one slab not full, chunks that end outside
        ((1, 132, 3, 3), 11),  # slabs of 48: the last not full
        ((1, 8, 70, 1), 2),  # chunks of several tiles, cut below
    ],
)
def test_two_pass_norm_is_the_norm(shape, groups, dtype, monkeypatch, poison_empty):
    if ("noise", "triton", None) not in ops.availability():
        pytest.skip("Triton is not installed, or finds nothing to run on")
    norm = common.require("benchmarks.peers.two_pass_norm")
    if shape[2] == 70:
        monkeypatch.setattr(norm, "PROGRAMS", 2)
        monkeypatch.setattr(norm, "TILE", 1024)
        assert norm.cut(1, 8, 70, groups).tiles > 1
    n, channels = shape[:2]
    device = pick_device("auto")
    x = (torch.randn(shape) + 3).to(device, dtype, memory_format=CHANNELS_LAST)
    weight, bias, add = (torch.randn(size).to(device, dtype) for size in ((channels,), (channels,), (n, channels)))

    def plain(dtype: torch.dtype) -> torch.Tensor:
        of, *affine, more = (v.to(dtype) for v in (x, weight, bias, add))
        return nn.functional.silu(nn.functional.group_norm(of + more[:, :, None, None], groups, *affine))

    got = norm.two_pass_group_norm_silu(x, weight, bias, add, groups)
    check_agreement("two passes", got, [plain(dtype)], plain(torch.float64), dtype)
    assert got.is_contiguous(memory_format=CHANNELS_LAST) and got.dtype == dtype
    with pytest.raises(ValueError, match="expected a channels_last image"):
        norm.two_pass_group_norm_silu(x.contiguous(), weight, bias, add, groups)


def test_two_pass_norm_joins_the_forward_on_gpus_alone():
    name = "two passes, as apex"
    for case in cases(2):
        assert name not in contenders(case, CPU, compile=False)
        assert (name in contenders(case, torch.device("cuda"), compile=False)) == (not case.grads)


@pytest.mark.minutes
@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_peak_memory_is_the_contenders_own():
    peaks = []
    for megabytes in (0, 256):
        row = {"name": "peer", "ms": 1.0}
        memory.measure(partial(trainers, megabytes << 18), make_problem(num_timesteps=1000), [row])
        assert row["saved_mib"] > 0
        peaks.append(row["peak_mib"])
    assert peaks[1] - peaks[0] == pytest.approx(256, rel=0.2)


def test_sample_quality_of_an_untrained_model(tmp_path, monkeypatch, capsys):
    config = replace(TINY, num_timesteps=12)
    save_checkpoint(tmp_path / "model.safetensors", Diffusion.from_config(config), config)
    monkeypatch.setattr(sample_quality, "train_classifier", partial(sample_quality.train_classifier, epochs=1))
    monkeypatch.setattr(sample_quality, "SEEN", 1)
    argv = ["--checkpoint", str(tmp_path / "model.safetensors"), "--num", "20", "--device", "cpu"]
    argv += ["--out", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert sample_quality.main([*argv, "--steps", "2", "4", "1000"]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    rows = document["rows"]
    assert [row["name"] for row in rows] == [OURS, OURS, sample_quality.REAL]
    assert [row.get("num_steps") for row in rows] == [2, 4, None]
    assert all(row["frechet"] > 0 and 0 <= row["agreement"] <= 1 and "classifier" in row["features"] for row in rows)
    assert rows[-1]["frechet"] < rows[0]["frechet"]
    assert (tmp_path / "quality_digits.png").read_bytes().startswith(b"\x89PNG")
    assert "Frechet distance" in capsys.readouterr().out
    assert sample_quality.main([*argv, "--steps", "4", "--sampler", "ddim", "heun", "adaptive", "--diffusers"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    names = [f"{OURS} ddim", f"{OURS} heun", *[f"{OURS} adaptive"] * 4, "diffusers ddim", "diffusers heun"]
    assert [row["name"] for row in rows] == [*names, sample_quality.REAL]
    assert rows[0]["num_steps"] == 4 and all(row["num_steps"] > 1 for row in rows[2:6])
    assert sample_quality.main([*argv, "--data", str(tmp_path / "nowhere")]) == 0
    assert "skipped: no t10k-images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4, 4), lambda x: x),
        ((6, 6), lambda x: nn.functional.pad(x, (1, 1, 1, 1))),
        ((2, 2), lambda x: readers.resize(x, (2, 2))),
    ],
)
def test_real_images_come_in_the_models_size(tmp_path, size, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(3, dtype=np.uint8)))
    for images in sample_quality.real_images(str(tmp_path), replace(TINY, img_size=size)):
        assert torch.equal(images.pixels, expected(torch.from_numpy(pixels[:, None])))


@pytest.mark.minutes
def test_scripts_take_peers(tmp_path):
    need("onnxruntime")
    file = tmp_path / "out.json"
    options = "--quick --model digits --batch 2 --steps 2 --repetitions 1 --precision float32 --peers onnxruntime"
    command = [sys.executable, ROOT / "benchmarks" / "sample_throughput.py", *options.split(), "--json", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert names["onnxruntime"]["ms"] > 0
