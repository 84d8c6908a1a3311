"""Pictures: what is written can be read back, pixel for pixel."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.files import check_writable
from ddpm_fast.training.images import (
    Frames,
    grid,
    save_gif,
    save_npz,
    save_png,
    save_pngs,
    saved_pngs,
    to_uint8,
    upscale_for,
)


def test_to_uint8_clips_and_rounds() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.7])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every / 127.5 - 1), every)


def test_grid_places_and_enlarges() -> None:
    pixels = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None, None]
    sheet = grid(pixels, columns=2, upscale=3)[..., 0]
    assert sheet.shape == (2 + 2 * 5, 2 + 2 * 5)
    assert (sheet[2:5, 2:5] == 10).all() and (sheet[2:5, 7:10] == 20).all() and (sheet[7:10, 2:5] == 30).all()
    assert (sheet[7:10, 7:10] == 128).all() and (sheet[5:7] == 128).all() and (sheet[:2] == 128).all()


def test_upscale_is_just_enough() -> None:
    assert [upscale_for(h) for h in (8, 28, 48, 64)] == [6, 2, 1, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_roundtrip(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(0, 256, (4, channels, 5, 7), dtype=torch.uint8)
    sheet = grid(pixels, columns=2)
    save_png(tmp_path / "new" / "sheet.png", sheet)
    back = np.array(Image.open(tmp_path / "new" / "sheet.png"))
    assert np.array_equal(back.reshape(sheet.shape), sheet)
    assert np.array_equal(back.reshape(sheet.shape)[2:7, 2:9], pixels[0].permute(1, 2, 0).numpy())  # red stays red
    save_pngs(tmp_path / "all", pixels, torch.tensor([4, 4, 2, 0]))
    names = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert names == ["000000-class-4.png", "000001-class-4.png", "000002-class-2.png", "000003-class-0.png"]
    (tmp_path / "all" / "holiday.png").write_bytes(b"")
    assert [path.name for path in saved_pngs(tmp_path / "all")] == names
    back = np.array(Image.open(tmp_path / "all" / names[2])).reshape(5, 7, channels)
    assert np.array_equal(back, pixels[2].permute(1, 2, 0).numpy())


def test_npz_roundtrip_takes_any_channels(tmp_path: Path) -> None:
    pixels, labels = torch.randint(0, 256, (3, 5, 2, 4), dtype=torch.uint8), torch.tensor([2, 0, 1])
    save_npz(tmp_path / "a.npz", pixels, labels)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["images"], pixels.permute(0, 2, 3, 1).numpy())
        assert file["labels"].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="5 channels"):
        save_png(tmp_path / "a.png", grid(pixels, columns=2))


def test_gif_holds_the_kept_steps_in_order(tmp_path: Path) -> None:
    frames = Frames(100, count=5)
    for sample in range(2):  # two batches
        for k in range(100):
            frames(k, torch.full((1, 1, 4, 4), k / 99 * 2 - 1) * (1 - 2 * sample))
    sheets = frames.grids(columns=2)
    assert [int(sheet[2, 2, 0]) for sheet in sheets] == [0, 64, 129, 191, 255]
    assert [int(sheet[2, 8, 0]) for sheet in sheets] == [255, 191, 126, 64, 0]
    save_gif(tmp_path / "a.gif", sheets, milliseconds=50, hold=700)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        for k, sheet in enumerate(sheets):
            gif.seek(k)
            assert np.array_equal(np.array(gif.convert("L")), sheet[..., 0])
            assert gif.info["duration"] == (700 if k == 4 else 50)


def test_frames_forget_a_batch_that_ran_out_of_memory() -> None:
    frames, whole = Frames(4, count=4), Frames(4, count=4)
    x = [torch.full((4, 1, 2, 2), k / 3) for k in range(4)]
    for k in range(4):
        whole(k, x[k])
    for k in range(3):
        frames(k, x[k])
    for part in (slice(0, 2), slice(2, 4)):  # and the same images again, in halves
        for k in range(4):
            frames(k, x[k][part])
    for ours, expected in zip(frames.grids(columns=2), whole.grids(columns=2), strict=True):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), columns=0), "columns must be .* at least 1, got 0"),
        (lambda: grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), columns=1, upscale=-1), "upscale must be"),
        (lambda: grid(torch.zeros(1, 2, 2, dtype=torch.uint8), columns=1), "pixels must have 4 dimensions"),
        (lambda: save_gif("x.gif", []), "frames is empty"),
        (lambda: save_gif("x.gif", 3), "frames must be a list of arrays"),
        (lambda: save_gif("x.gif", [np.zeros((2, 2))]), r"frames\[0\] must be a uint8 array"),
        (lambda: save_gif("x.gif", [np.zeros((2, 2, 1), np.uint8)], hold=10**6), "hold must be at most 655350"),
        (lambda: save_png("x.png", None), "array must be a uint8 array"),
        (lambda: save_pngs("x", torch.zeros(1, 1, 2, 2)), "pixels must have dtype torch.uint8"),
        (
            lambda: save_pngs("x", torch.zeros(1, 1, 2, 2).byte(), torch.zeros(2).long()),
            r"labels must have shape \[1\]",
        ),
        (lambda: save_pngs("x", torch.zeros(1, 1, 2, 2).byte(), first_index=0.5), "first_index must be an integer"),
        (lambda: save_npz("x.npz", None), "pixels must be a tensor"),
        (lambda: to_uint8(None), "x must be a tensor"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("name", ["x.PNG", "x.gif", "x.NPZ"])
def test_a_failed_write_leaves_the_old_picture_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pixels, path = torch.zeros(1, 1, 2, 2, dtype=torch.uint8), tmp_path / name
    sheet = grid(pixels, columns=1)
    save = {
        ".png": lambda: save_png(path, sheet),
        ".gif": lambda: save_gif(path, [sheet]),
        ".npz": lambda: save_npz(path, pixels),
    }[path.suffix.lower()]
    save()
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=f"{name} can't be written: No space left"):
        save()
    assert os.listdir(tmp_path) == [name] and path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses files even from root")
def test_a_folder_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "yet" / "to be made")
    assert os.listdir(tmp_path) == []
    for folder in ("/proc", "/proc/pictures"):
        with pytest.raises(OSError, match=f"{folder} can't be written to: /proc takes no file"):
            check_writable(folder)
