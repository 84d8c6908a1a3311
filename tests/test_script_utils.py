"""Scripts written for the original code, and the helpers they call."""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import script_utils

SCRIPTS = Path(__file__).parent / "scripts"
TINY = (
    "--num_timesteps 25 --base_channels 32 --channel_mults 1,1 --num_res_blocks 1 --time_emb_dim 16 "
    "--attention_resolutions 1 --schedule {schedule} --use_labels {labels} --device cpu"
)


def run(script: str, arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS.parents[1])
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("schedule", "labels"), [pytest.param("cosine", "True", marks=pytest.mark.minutes), ("linear", "no")]
)
def test_scripts_run_from_training_over_resuming_to_images(tmp_path, schedule, labels) -> None:
    options = TINY.format(schedule=schedule, labels=labels)
    out = run("train_like_upstream.py", f"{options} --log_dir {tmp_path}")
    assert [line.split()[0] for line in out.splitlines()] == ["3", "6"]
    model, optimizer = (tmp_path / f"run-iteration-6-{name}.pth" for name in ("model", "optim"))
    saved = torch.load(model, weights_only=True)
    assert saved._metadata[""]["ddpm_fast"]["step"] == 6
    again = tmp_path / "again"
    again.mkdir()
    resume = f"--log_dir {again} --model_checkpoint {model} --optim_checkpoint {optimizer} --iterations 3"
    run("train_like_upstream.py", f"{options} {resume}")
    resumed = torch.load(again / "run-iteration-3-model.pth", weights_only=True)
    # Three forwards in training and two batches of the test loader, per three iterations.
    assert resumed._metadata[""]["ddpm_fast"] | {"seed": 0} == {"step": 9, "calls": 15, "seed": 0}
    steps = torch.load(again / "run-iteration-3-optim.pth", weights_only=True)["state"][0]["step"]
    assert int(steps) == 9
    run("sample_like_upstream.py", f"{options} --model_path {model} --save_dir {tmp_path}")
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 20
    pixels = np.stack([np.asarray(Image.open(p)) for p in pictures])
    assert pixels.shape == (20, 32, 32, 3) and len(np.unique(pixels.reshape(20, -1), axis=0)) == 20


def test_defaults_are_the_originals() -> None:
    assert script_utils.diffusion_defaults() == {
        "num_timesteps": 1000, "schedule": "linear", "loss_type": "l2", "use_labels": False, "base_channels": 128,
        "channel_mults": (1, 2, 2, 2), "num_res_blocks": 2, "time_emb_dim": 512, "norm": "gn", "dropout": 0.1,
        "activation": "silu", "attention_resolutions": (1,), "ema_decay": 0.9999, "ema_update_rate": 1,
    }  # fmt: skip


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    script_utils.add_dict_to_argparser(parser, script_utils.diffusion_defaults() | {"name": None, "rate": 0.5})
    return parser.parse_args(list(arguments))


def test_options_are_read_by_type() -> None:
    args = parsed(
        "--channel_mults", "(1, 2)", "--attention_resolutions", "", "--use_labels", "yes", "--rate", "2", "--name", "x"
    )
    assert args.channel_mults == (1, 2) and args.attention_resolutions == ()
    assert args.use_labels is True and args.rate == 2.0 and args.name == "x"
    assert parsed().channel_mults == (1, 2, 2, 2) and parsed().name is None
    with pytest.raises(SystemExit):
        parsed("--channel_mults", "1,two")
    with pytest.raises(SystemExit):
        parsed("--use_labels", "perhaps")


def test_options_reach_the_network() -> None:
    args = parsed("--base_channels", "32", "--channel_mults", "1,2", "--num_res_blocks", "3", "--norm", "bn")
    args.__dict__ |= {
        "img_size": (16, 24),
        "img_channels": 1,
        "num_classes": 4,
        "use_labels": True,
        "schedule": "other",
    }
    diffusion = script_utils.get_diffusion_from_args(args)
    net = diffusion.model
    assert len(net.downs) == 7 and isinstance(net.out_norm, torch.nn.BatchNorm2d) and net.num_classes == 4
    assert diffusion.img_size == (16, 24) and diffusion.img_channels == 1 and diffusion.num_timesteps == 1000
    assert float(diffusion.betas[-1]) == pytest.approx(0.02), "any schedule but cosine is linear"


def test_str2bool() -> None:
    assert [script_utils.str2bool(v) for v in (True, "T", "yes", "1", "Y")] == [True] * 5
    assert [script_utils.str2bool(v) for v in (False, "f", "No", "0", "n")] == [False] * 5
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe'"):
        script_utils.str2bool("maybe")


def test_cycle() -> None:
    assert list(itertools.islice(script_utils.cycle([1, 2]), 5)) == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="empty loader"):
        next(script_utils.cycle([]))


def test_transform() -> None:
    transform = script_utils.get_transform()
    pixels = np.array([[[0, 51, 102]], [[153, 204, 255]]], dtype=np.uint8)  # [2, 1, 3]
    expected = torch.tensor([[[-1.0], [0.2]], [[-0.6], [0.6]], [[-0.2], [1.0]]])
    for image in (pixels, Image.fromarray(pixels)):
        assert torch.allclose(transform(image), expected, atol=1e-6)
    grey = transform(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    assert grey.tolist() == [[[-1.0, 1.0]]]
    assert transform(np.array([[False, True]])).tolist() == [[[-1.0, 1.0]]]
    assert transform(np.array([[0.5]], dtype=np.float64)).dtype == torch.float32
    with pytest.raises(TypeError, match="uint8 or floating point"):
        transform(np.zeros((2, 2), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"shape \[H, W\]"):
        transform(np.zeros(3, dtype=np.uint8))


def test_none_is_a_value_where_a_network_knows_it() -> None:
    tiny = {"base_channels": 8, "channel_mults": (1, 2), "num_groups": 4, "attention_resolutions": ()}
    net = script_utils.get_diffusion_from_args(tiny | {"norm": None, "time_emb_dim": None, "loss_type": None}).model
    assert type(net.out_norm) is torch.nn.Identity and net.time_mlp is None
    with pytest.raises(TypeError, match="args must be what argparse returns, got 5"):
        script_utils.get_diffusion_from_args(5)


def test_a_tuple_is_read_by_the_type_of_its_elements() -> None:
    parser = argparse.ArgumentParser()
    script_utils.add_dict_to_argparser(parser, {"adam_betas": (0.9, 0.999), "names": ["a"], "levels": ()})
    args = parser.parse_args(["--adam_betas", "0.8,0.99", "--names", "x y", "--levels", "1"])
    assert (args.adam_betas, args.names, args.levels) == ((0.8, 0.99), ("x", "y"), (1,))


def test_what_cannot_be_an_image_or_a_loader() -> None:
    with pytest.raises(TypeError, match="got a tensor: it needs no transform"):
        script_utils.get_transform()(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match="dl must be a loader or list"):
        next(script_utils.cycle(iter([1, 2])))
    with pytest.raises(TypeError, match="dl must be a loader or list"):
        next(script_utils.cycle(None))
    with pytest.raises(TypeError, match="dl must be a loader or list"):
        next(script_utils.cycle(np.array(2)))
    with pytest.raises(TypeError, match="parser must be an argparse.ArgumentParser, got None"):
        script_utils.add_dict_to_argparser(None, {})
    with pytest.raises(TypeError, match="default_dict must be a dictionary, got 3"):
        script_utils.add_dict_to_argparser(argparse.ArgumentParser(), 3)
    with pytest.raises(ValueError, match=r"image must lie in \[0, 1\]"):
        script_utils.get_transform()(np.full((2, 2), 200.0))
    assert script_utils.str2bool(1) and not script_utils.str2bool(np.False_)
