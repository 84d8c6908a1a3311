"""Folders of images: the cache is never believed without a look, and nothing is left out in silence."""

import os
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.cli import main
from ddpm_fast.training import folders
from ddpm_fast.training.data import Images, load_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of three 4x6 images each."""
    root = tmp_path / "photos"
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (6, 4), (100 * k, 10 * i, 7)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are decoded from here on."""
    names: list[str] = []
    original = folders.decode

    def counted(name: str, data: bytes) -> Any:
        names.append(name)
        return original(name, data)

    monkeypatch.setattr(folders, "decode", counted)
    return names


def same(a: Images, b: Images) -> bool:
    return a.fingerprint() == b.fingerprint() and a.class_names == b.class_names and a.skipped == b.skipped


def the_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def packed(root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root).as_posix())
    return root.with_suffix(".zip")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("size", [None, (2, 3)])
def test_a_second_look_decodes_nothing(photos: Path, tmp_path: Path, decoded: list[str], kind: str, size: Any) -> None:
    source, cache = photos if kind == "folder" else packed(photos), tmp_path / "cache"
    plain = load_images(source, size=size)
    first = load_images(source, size=size, cache=cache)
    assert len(decoded) == 12 and same(first, plain)
    again = load_images(source, size=size, cache=cache)
    assert len(decoded) == 12 and same(again, plain)
    again.pixels[0] = 99  # mapped, but private
    assert same(load_images(source, size=size, cache=cache), plain)
    padded = load_images(source, size=size, cache=cache, pad=1)
    assert len(decoded) == 12 and same(padded, load_images(source, size=size, pad=1))


def change_content(photos: Path) -> None:
    """Another image of the same size in bytes, and the same time."""
    path = photos / "dog" / "1.png"
    before = path.stat()
    Image.new("RGB", (6, 4), (100, 11, 7)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_names(photos: Path) -> None:
    """All bytes as before, and two images changed places."""
    a, b = photos / "cat" / "0.png", photos / "cat" / "2.png"
    a.rename(photos / "x")
    b.rename(a)
    (photos / "x").rename(b)


@pytest.mark.parametrize(
    "change",
    [
        change_content,
        change_names,
        lambda photos: (photos / "cat" / "1.png").unlink(),
        lambda photos: shutil.copy(photos / "cat" / "1.png", photos / "dog" / "7.png"),
        lambda photos: (photos / "cat" / "1.png").rename(photos / "dog" / "9.png"),
    ],
)
def test_every_change_of_the_source_is_noticed(photos: Path, tmp_path: Path, change: Any) -> None:
    before = load_images(photos, cache=tmp_path / "cache")
    change(photos)
    after = load_images(photos, cache=tmp_path / "cache")
    assert same(after, load_images(photos)) and not same(after, before)
    assert the_file(tmp_path / "cache").stat().st_size < 10_000  # the new in the place of the old


def test_sizes_and_sources_have_their_own(photos: Path, tmp_path: Path, decoded: list[str]) -> None:
    shutil.copytree(photos, tmp_path / "b" / "photos")
    for _ in range(2):
        for source in (photos, tmp_path / "b" / "photos"):
            for size in (None, (2, 3), (3, 2)):
                assert same(load_images(source, size=size, cache=tmp_path / "cache"), load_images(source, size=size))
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert len(decoded) == 6 * 6 * 3  # once into the cache, and twice without


def test_other_decoders_decode_anew(
    photos: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_images(photos, cache=tmp_path / "cache")
    monkeypatch.setattr("PIL.__version__", "0")
    load_images(photos, cache=tmp_path / "cache")
    assert len(decoded) == 12


@pytest.mark.parametrize("place", [0.0, 0.3, 0.99, "cut", "empty", "swapped"])
def test_a_damaged_cache_is_replaced(photos: Path, tmp_path: Path, place: Any, decoded: list[str]) -> None:
    plain = load_images(photos, cache=tmp_path / "cache")
    file = the_file(tmp_path / "cache")
    good = file.read_bytes()
    if place == "swapped":
        file.write_bytes(good.replace(b'"cat/', b'"cow/').replace(b"skipped", b"skipqed"))
    elif isinstance(place, float):
        at = int(place * len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    else:
        file.write_bytes(good[: len(good) // 2] if place == "cut" else b"")
    with pytest.warns(UserWarning, match="is damaged .*: the images are decoded anew"):
        assert same(load_images(photos, cache=tmp_path / "cache"), plain)
    warnings.simplefilter("error")
    assert same(load_images(photos, cache=tmp_path / "cache"), plain)
    assert len(decoded) == 12


def test_a_cache_that_cannot_be_written_is_no_error(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="can't be written, the next run decodes again"):
        assert same(load_images(photos, cache=tmp_path / "file"), load_images(photos))
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp"]


def spoil(photos: Path) -> None:
    """Empty, cut and foreign files, and one of another size: half of the images."""
    (photos / "cat" / "0.png").write_bytes(b"")
    path = photos / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:45])
    Image.new("RGB", (9, 9)).save(photos / "dog" / "2.png")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_images_are_an_error_or_listed(photos: Path, tmp_path: Path, kind: str, decoded: list[str]) -> None:
    good = load_images(photos)
    spoil(photos)
    source = photos if kind == "folder" else packed(photos)
    with pytest.raises(ValueError, match=r"cat/0\.png can't be read: .*; --skip-bad leaves such images out"):
        load_images(source)
    for _ in range(2):  # the second time out of the cache
        with pytest.warns(UserWarning, match=rf"skipped 3 of the 6 images of {source}: .*cat/0\.png.*dog/0\.png"):
            images = load_images(source, skip_bad=True, cache=tmp_path / "cache")
        assert torch.equal(images.pixels, good.pixels[[1, 2, 4]])
        assert images.labels.tolist() == [0, 0, 1] and images.class_names == ("cat", "dog")
        names = [reason.split(" ")[0] for reason in images.skipped]
        assert names == [f"{source}/{n}.png" for n in ("cat/0", "dog/0", "dog/2")]
        assert "is 9x9, most images are 4x6" in images.skipped[2]
    assert len(decoded) == 6 + 6 + 1
    with pytest.raises(ValueError, match="can't be read"):
        load_images(source, cache=tmp_path / "cache")  # what was skipped once isn't for ever
    with pytest.warns(UserWarning, match="skipped 2 of the 6"):  # with a size all sizes are welcome
        assert len(load_images(source, skip_bad=True, size=(4, 4)).pixels) == 4


def test_a_damaged_member_of_a_zip_is_skipped(photos: Path) -> None:
    archive = packed(photos)
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255  # the zip's own checksum is wrong now
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"cat/0\.png can't be read: Bad CRC"):
        load_images(archive)
    with pytest.warns(UserWarning, match="skipped 1 of the 6"):
        assert len(load_images(archive, skip_bad=True).pixels) == 5


def test_all_bad_is_an_error(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 6 images of .*photos can be read: .*cat/0\.png"):
        load_images(photos, skip_bad=True)


def test_a_class_that_lost_all_its_images_keeps_its_number(photos: Path) -> None:
    for path in (photos / "cat").iterdir():
        path.write_bytes(b"no image")
    for source in (photos, packed(photos)):
        with (
            pytest.warns(UserWarning, match="skipped 3 of the 6"),
            pytest.warns(UserWarning, match="cat holds no images: class 0 stays empty"),
        ):
            images = load_images(source, skip_bad=True)
        assert images.labels.tolist() == [1, 1, 1] and images.class_names == ("cat", "dog")


def test_a_long_list_is_cut_short_in_the_warning_alone(tmp_path: Path) -> None:
    for k in range(14):
        (tmp_path / f"{k}.png").write_bytes(b"")
    Image.new("L", (2, 2)).save(tmp_path / "good.png")
    with pytest.warns(UserWarning) as caught:
        images = load_images(tmp_path, skip_bad=True)
    text = str(caught[0].message)
    assert "/9.png" in text and "/10.png" not in text and text.endswith("; and 4 more")
    assert len(images.skipped) == 14 and images.skipped[13].startswith(f"{tmp_path}/13.png can't be read")


def test_train_lists_what_it_skips_and_keeps_what_it_decodes(
    photos: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(photos)
    out, cache = tmp_path / "out", tmp_path / "cache"
    model = "--base-channels 8 --channel-mults 1 --attention-resolutions= --num-timesteps 50 --steps 1 --batch 2"
    common = ["train", "--data", str(photos), "--out", str(out), *model.split(), "--device", "cpu", "--overwrite"]
    assert main([*common, "--cache", str(cache)]) == 2 and "--skip-bad" in capsys.readouterr().err
    assert not out.exists()
    for repeated in (False, True):
        count = len(decoded)
        assert main([*common, "--skip-bad", "--cache", str(cache)]) == 0
        assert "warning: skipped 3 of the 6 images" in capsys.readouterr().err
        assert len((out / "skipped.txt").read_text().splitlines()) == 3
        assert (len(decoded) == count) == repeated
    shutil.rmtree(photos / "cat")
    spoiled = photos / "dog"
    (spoiled / "0.png").unlink()
    (spoiled / "2.png").unlink()
    assert main([*common, "--no-cache"]) == 0
    assert not (out / "skipped.txt").exists() and len(list(cache.iterdir())) == 1
    assert main(common) == 0
    assert list(Path(os.environ["DDPM_FAST_CACHE"]).glob("photos-*.safetensors"))


def png16(array: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: uint16 [H, W, C], which Pillow reads and doesn't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_become_eight(tmp_path: Path, channels: int) -> None:
    values = np.array([0, 257, 257 * 100, 257 * 255, 30_000, 65_000], dtype=np.uint16)
    array = np.repeat(values[None, :, None], channels, axis=2)
    array[..., 3:] = 65535
    (tmp_path / "x.png").write_bytes(png16(array))
    pixels = load_images(tmp_path).pixels
    assert pixels.shape == (1, min(channels, 3), 1, 6)
    assert pixels[0, :, 0, :4].tolist() == [[0, 1, 100, 255]] * min(channels, 3)
    # Pillow takes the high byte of colours, which is at most one level away.
    assert (pixels[0, :, 0].float() - torch.from_numpy(values / 257)).abs().max() <= 1


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_targets_need_not_be_square(photos: Path, size: tuple[int, int], tmp_path: Path) -> None:
    array = np.zeros((32, 48, 3), np.uint8)
    array[:, 24:] = (10, 20, 30)  # the right half
    Image.fromarray(array).save(photos / "cat" / "0.png")
    pixels = load_images(photos, size=size).pixels
    assert pixels.shape == (6, 3, *size)
    assert pixels[0, :, :, 0].unique().tolist() == [0] and pixels[0, :, 5, -1].tolist() == [10, 20, 30]
    if size == (32, 48):
        assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), array)
