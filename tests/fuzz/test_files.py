"""Damaged files: refused by name, or read as if they were whole."""

import functools
import gzip
import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from test_checkpoint import TINY, trained

from ddpm_fast.training.checkpoint import read_checkpoint, save_checkpoint
from ddpm_fast.training.data import load_images
from ddpm_fast.training.images import save_npz, save_pngs

from .harness import ROOM, Draw, deliberate, fuzz, often, one

PIXELS = torch.arange(3 * 1 * 5 * 4, dtype=torch.uint8).reshape(3, 1, 5, 4) * 4


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(dir=ROOM.name))
    checkpoint = path / "whole.safetensors"
    diffusion, optimizer = trained(1)
    save_checkpoint(checkpoint, diffusion, TINY, optimizer=optimizer, training={"position": 12})
    return path


def damaged(draw: Draw, data: bytes, front: int = 0) -> bytes:
    """With a few bits flipped, or bytes cut out, cut off or put in; often within the first `front` bytes."""
    if not often(draw, 20):
        return data
    for _ in range(one(draw, 1, 1, 1, 2, 5)):
        at = draw(st.integers(0, max(0, (front if front and often(draw) else len(data)) - 1)))
        kind = one(draw, "flip", "flip", "flip", "cut", "end", "insert", "overwrite")
        if kind == "flip" and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + draw(st.integers(1, 9)) :]
        elif kind == "end":
            data = data[:at]
        else:
            more = draw(st.binary(min_size=1, max_size=8))
            data = data[:at] + more + data[at + (len(more) if kind == "overwrite" else 0) :]
    return data


def refusal(error: BaseException, path: Path) -> bool:
    assert str(path) in str(error) and deliberate(error), error
    return False


@fuzz(600)
def test_checkpoint(draw: Draw) -> bool:
    whole, path = folder() / "whole.safetensors", folder() / "damaged.safetensors"
    data = whole.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(damaged(draw, data, header))
    try:
        loaded = read_checkpoint(path)
    except ValueError as error:
        return refusal(error, path)
    saved = _saved()
    assert loaded.state.keys() == saved.state.keys()
    assert all(torch.equal(value, saved.state[name]) for name, value in loaded.state.items())
    assert loaded.rng is not None and torch.equal(loaded.rng, saved.rng)
    for index, entries in saved.optimizer["state"].items():
        assert all(torch.equal(v, loaded.optimizer["state"][index][k]) for k, v in entries.items())
    assert loaded[1:2] + loaded[3:4] + loaded[6:] == saved[1:2] + saved[3:4] + saved[6:]
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    return True


@functools.cache
def _saved() -> Any:
    return read_checkpoint(folder() / "whole.safetensors")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def parsed(data: bytes) -> np.ndarray:
    """An idx file of rank 3, read by its description."""
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(3))
    return np.frombuffer(data[16:], np.uint8).reshape(shape)


@fuzz(400)
def test_idx(draw: Draw) -> bool:
    """Without a checksum (not gzipped) the bytes that are there are the pixels."""
    zipped, labelled = one(draw, True, False), one(draw, True, False)
    raw = idx(PIXELS[:, 0].numpy())
    data = damaged(draw, gzip.compress(raw, mtime=0) if zipped else raw, 16)
    path, labels = folder() / "x-images-idx3-ubyte", folder() / "x-labels-idx1-ubyte"
    path.write_bytes(data)
    labels.unlink(missing_ok=True)
    if labelled:
        labels.write_bytes(damaged(draw, idx(np.array([0, 1, 1], np.uint8)), 8))
    try:
        images = load_images(path)
    except ValueError as error:
        assert str(labels) in str(error) or str(path) in str(error), error
        return False
    whole = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    assert np.array_equal(images.pixels[:, 0].numpy(), parsed(whole))
    assert images.labels is None or len(images.labels) == len(images.pixels)
    assert images.num_classes is None or int(images.labels.max()) < images.num_classes
    return True


@functools.cache
def pictures() -> dict[str, bytes]:
    """The same three images as files of each kind."""
    from PIL import Image

    made: dict[str, bytes] = {}
    for suffix in ("png", "bmp", "gif", "ppm", "tif", "jpg", "webp"):
        data = io.BytesIO()
        Image.fromarray(PIXELS[0, 0].numpy()).save(data, {"tif": "tiff", "jpg": "jpeg"}.get(suffix, suffix))
        made[suffix] = data.getvalue()
    return made


@fuzz(500)
def test_image(draw: Draw) -> bool:
    suffix = one(draw, *pictures())
    place = folder() / f"images-{suffix}"
    place.mkdir(exist_ok=True)
    path = place / f"a.{suffix}"
    path.write_bytes(damaged(draw, pictures()[suffix], 40))
    try:
        images = load_images(place)
    except ValueError as error:
        return refusal(error, place)
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape[:1] == (1,) and images.pixels.shape[1] in (1, 3)
    if suffix == "png" and images.pixels.shape[1:] == PIXELS.shape[1:]:  # it has checksums
        assert torch.equal(images.pixels[0], PIXELS[0])
    return True


@functools.cache
def archive() -> bytes:
    data, png = io.BytesIO(), pictures()["png"]
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
            file.writestr(zipfile.ZipInfo(name), png)
    return data.getvalue()


@fuzz(500)
def test_zip(draw: Draw) -> bool:
    path = folder() / "images.zip"
    path.write_bytes(damaged(draw, archive()))
    inside = path / "cat" if not often(draw, 5) else path
    try:
        images = load_images(inside)
    except ValueError as error:
        assert str(path) in str(error), error
        return False
    for pixels in images.pixels:
        assert torch.equal(pixels, PIXELS[0])
    assert images.labels is None or int(images.labels.max()) < len(images.class_names or ())
    return True


@fuzz(150, both=False)
def test_written_images_come_back(draw: Draw) -> bool:
    n, c, h, w = one(draw, 1, 2), one(draw, 1, 3), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    pixels = torch.randint(0, 256, (n, c, h, w), generator=generator, dtype=torch.uint8)
    with tempfile.TemporaryDirectory(dir=folder()) as place:
        save_pngs(place, pixels)
        assert torch.equal(load_images(place).pixels, pixels)
        save_npz(Path(place) / "a.npz", pixels)
        with np.load(Path(place) / "a.npz") as file:
            assert np.array_equal(file["images"].transpose(0, 3, 1, 2), pixels.numpy())
    return True
