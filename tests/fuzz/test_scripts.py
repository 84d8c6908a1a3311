"""What training scripts call, and how samples become pictures."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ddpm_fast.script_utils import (
    add_dict_to_argparser,
    cycle,
    diffusion_defaults,
    get_diffusion_from_args,
    image_to_tensor,
    str2bool,
)
from ddpm_fast.training.images import BORDER, grid, save_gif, save_npz, save_png, save_pngs, to_uint8

from .harness import JUNK, REFUSED, ROOM, Draw, attempt, fuzz, often, one, spoilt, tensor

SIDES = st.integers(1, 5)


@fuzz(150)
def test_cycle(draw: Draw) -> bool:
    loader = one(draw, [1, 2], (3,), np.arange(3), torch.arange(2), *JUNK)
    first = attempt(lambda dl: next(cycle(dl)), loader)
    if first is REFUSED:
        return False
    assert np.array_equal(first, list(loader)[0])
    return True


@fuzz(250)
def test_image_to_tensor(draw: Draw) -> bool:
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).random(shape)
    dtype = one(draw, np.uint8, np.float32, np.float64, np.float16, np.bool_, np.int64, np.complex64, np.uint16)
    array = (pixels * 255).astype(dtype) if dtype == np.uint8 else pixels.astype(dtype)
    if not often(draw, 5) and array.size and array.dtype.kind == "f":
        array.flat[0] = one(draw, np.nan, np.inf, -0.0, 1.5)
    image = spoilt(draw, {"image": array})["image"]
    x = attempt(image_to_tensor, image)
    if x is REFUSED:
        return False
    value = np.asarray(image, dtype=np.float64) / (255 if np.asarray(image).dtype == np.uint8 else 1) * 2 - 1
    value = value[..., None] if value.ndim == 2 else value
    assert x.dtype == torch.float32 and np.allclose(x.numpy(), value.transpose(2, 0, 1), atol=1e-6, rtol=0)
    return True


@fuzz(100)
def test_str2bool(draw: Draw) -> bool:
    word = one(draw, "yes", "TRUE", "t", "1", "no", "False", "n", "0", *JUNK)
    try:
        answer = str2bool(word)
    except argparse.ArgumentTypeError:
        return False
    return answer is (str(word).lower() in ("yes", "true", "t", "y", "1")) or not answer


@fuzz(150)
def test_add_dict_to_argparser(draw: Draw) -> bool:
    value = one(draw, 1, 0.5, True, "x", None, (1, 2), [3], (), *JUNK)
    parser = argparse.ArgumentParser()
    args = {"parser": parser, "default_dict": {one(draw, "a", "key", 3): value}}
    if attempt(add_dict_to_argparser, **spoilt(draw, args)) is REFUSED:
        return False
    return parser.parse_args([]) is not None


@fuzz(250)
def test_get_diffusion_from_args(draw: Draw) -> bool:
    options: dict[str, Any] = diffusion_defaults() | {"base_channels": 4, "channel_mults": (1,), "num_res_blocks": 1}
    options |= {"num_groups": 2, "time_emb_dim": 4, "num_timesteps": 20, "img_size": (4, 4)}
    options |= {"schedule": one(draw, "linear", "cosine"), "use_labels": one(draw, True, False)}
    options |= {"dropout": draw(st.floats(0, 1)), "ema_update_rate": draw(st.integers(1, 9))}
    if often(draw):
        options |= {one(draw, *options, "schedule_low", "img_channels", "initial_pad"): one(draw, *JUNK)}
    args = one(draw, options, argparse.Namespace(**options)) if often(draw, 9) else one(draw, *JUNK)
    names = (*options, "betas", "schedule_low", "img_channels", "initial_pad", "schedule_high", "args")
    diffusion = attempt(get_diffusion_from_args, args, names=names)
    return diffusion is not REFUSED and diffusion.num_timesteps > 0


def pixels(draw: Draw) -> torch.Tensor:
    return tensor(draw, (one(draw, 1, 2, 5, 0), one(draw, 1, 3, 2), draw(SIDES), draw(SIDES)), torch.uint8)


@fuzz(300)
def test_grid(draw: Draw) -> bool:
    args = spoilt(draw, {"pixels": pixels(draw), "columns": draw(SIDES), "upscale": one(draw, 1, 2)})
    sheet = attempt(grid, **args)
    if sheet is REFUSED:
        return False
    (n, c, h, w), columns, up = args["pixels"].shape, int(args["columns"]), int(args["upscale"])
    expected = np.full((-(-n // columns) * (h * up + BORDER) + BORDER, columns * (w * up + BORDER) + BORDER, c), 128)
    for i in range(n):
        top, left = i // columns * (h * up + BORDER) + BORDER, i % columns * (w * up + BORDER) + BORDER
        for y in range(h * up):
            for x in range(w * up):
                expected[top + y, left + x] = args["pixels"][i, :, y // up, x // up].numpy()
    assert np.array_equal(sheet, expected)
    return True


@fuzz(150)
def test_to_uint8(draw: Draw) -> bool:
    args = spoilt(draw, {"x": tensor(draw, (draw(SIDES), draw(SIDES)))})
    result = attempt(to_uint8, **args)
    if result is REFUSED:
        return False
    x = torch.as_tensor(args["x"]).double()
    known = x.isfinite()
    if not result.is_meta:
        exact = (x[known].clamp(-1, 1) * 127.5 + 127.5).clamp(0, 255)
        assert float((result[known].double() - exact).abs().max() if known.any() else 0.0) <= 0.5001
    return result.dtype == torch.uint8


@fuzz(350)
def test_save(draw: Draw) -> bool:
    """A picture that can't be written leaves no file."""
    made, path = pixels(draw), Path(tempfile.mkdtemp(dir=ROOM.name)) / "a"
    labels = one(draw, None, torch.zeros(len(made), dtype=torch.int64))
    picture = np.zeros((draw(SIDES), draw(SIDES), one(draw, 1, 3, 3, 2)), np.uint8)
    function, args = one(
        draw,
        (save_png, {"array": picture}),
        (save_gif, {"frames": [picture, picture], "milliseconds": 80, "hold": 2000}),
        (save_pngs, {"pixels": made, "labels": labels, "first_index": 0}),
        (save_npz, {"pixels": made, "labels": labels}),
    )
    first = "folder" if function is save_pngs else "path"
    args = spoilt(draw, args)
    if attempt(function, path, **args, names=("images",)) is REFUSED:
        assert not path.is_file() and not list(path.glob("*")), first
        return False
    return path.exists() or len(args["pixels"]) == 0
