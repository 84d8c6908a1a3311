"""Readers and batches: values, damaged files, and an order that depends on (seed, position) alone."""

import gzip
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import idx_bytes

from ddpm_fast.training.data import Batches, Images, digits, load_images, read_idx, stratified, to_float


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of two 4x6 RGB images each, and files that are no images."""
    root = tmp_path / "photos"
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 4), (100 * k, 10 * i, 7)).save(root / name / f"{i}.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "0.png").write_bytes(b"resource fork")
    return root


def zipped(root: Path, prefix: str = "") -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*"):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def test_digits_are_split_by_class_and_not_shared() -> None:
    train, held_out, everything = digits("train"), digits("held_out"), digits("all")
    assert (len(train.pixels), len(held_out.pixels)) == (1198, 599)
    assert everything.pixels.shape == (1797, 1, 8, 8) and everything.pixels.max() == 255
    share = train.labels.bincount() / everything.labels.bincount()
    assert (share - 2 / 3).abs().max() < 0.005
    parts = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert torch.equal(parts.unique(dim=0), everything.pixels.flatten(1).unique(dim=0))
    assert torch.equal(digits("train").pixels, train.pixels)
    assert not torch.equal(digits("train", seed=1).pixels, train.pixels)


def test_stratified_needs_labels() -> None:
    with pytest.raises(ValueError, match="no labels"):
        stratified(Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None), 0.5, seed=0)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_with_its_labels(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    labels = np.array([3, 0, 1, 1, 2], dtype=np.uint8)
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(pixels)))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))
    for source in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        images = load_images(source)
        assert np.array_equal(images.pixels[:, 0].numpy(), pixels)
        assert images.labels.tolist() == [3, 0, 1, 1, 2] and images.labels.dtype == torch.int64
    assert (
        load_images(tmp_path, pad=1).pixels[:, 0].numpy().tolist() == np.pad(pixels, ((0, 0), (1, 1), (1, 1))).tolist()
    )


def test_idx_in_folders_of_the_files_names(tmp_path: Path, pixels: np.ndarray) -> None:
    labels = np.array([3, 0, 1, 1, 2], dtype=np.uint8)
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(idx_bytes(array))
    images = load_images(tmp_path)
    assert np.array_equal(images.pixels[:, 0].numpy(), pixels) and images.labels.tolist() == labels.tolist()
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx_bytes(pixels[:2]))  # a file before a folder of its name
    assert len(load_images(tmp_path).pixels) == 2


def test_test_images_alone_are_not_taken_for_training_ones(tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels)))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz, the test images, but no train-images"):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "t10k-images-idx3-ubyte.gz").pixels) == 5


def test_a_gzip_bomb_is_left_alone(tmp_path: Path, pixels: np.ndarray) -> None:
    bomb = tmp_path / "x-images-idx3-ubyte.gz"
    bomb.write_bytes(gzip.compress(idx_bytes(pixels) + bytes(200 * 2**20), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="found more: truncated or damaged"):
        load_images(bomb)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


@pytest.mark.skipif("DDPM_FAST_DATA" not in os.environ, reason="DDPM_FAST_DATA names no folder with real data sets")
@pytest.mark.parametrize(("name", "first", "mean"), [("mnist", [5, 0, 4], 33.32), ("fashion-mnist", [9, 0, 0], 72.94)])
def test_real_data(name: str, first: list[int], mean: float) -> None:
    folder = Path(os.environ["DDPM_FAST_DATA"]) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} doesn't exist")
    images = load_images(folder, pad=2)
    assert images.pixels.shape == (60_000, 1, 32, 32) and images.labels[:3].tolist() == first
    assert images.class_names == tuple("0123456789")
    assert images.pixels[..., 2:-2, 2:-2].float().mean() == pytest.approx(mean, abs=0.01)
    assert len(load_images(folder / "t10k-images-idx3-ubyte.gz").pixels) == 10_000


def test_idx_without_labels(tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "x.idx").write_bytes(idx_bytes(pixels))
    assert read_idx(tmp_path / "x.idx").labels is None
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx_bytes(pixels))
    with pytest.warns(UserWarning, match=r"no classes: .*train-labels\.idx1-ubyte\[\.gz\] with its labels is missing"):
        assert load_images(tmp_path / "train-images.idx3-ubyte").labels is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"\0", "truncated or damaged"),
        (lambda b: b[:7], "neither an idx file nor a zip"),
        (lambda b: b"", "neither an idx file nor a zip"),
        (lambda b: b"\1" + b[1:], "neither an idx file nor a zip"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "type 0xd of rank 3, expected uint8"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "truncated"),
        (lambda b: gzip.compress(b)[:-12], "can't be read"),
        (lambda b: gzip.compress(b)[:20] + b"garbage" + gzip.compress(b)[27:], "can't be read"),
    ],
)
def test_damaged_idx_names_the_file(tmp_path: Path, pixels: np.ndarray, damage, message: str) -> None:
    path = tmp_path / "bad-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(pixels)))
    with pytest.raises(ValueError, match=message) as error:
        load_images(path)
    assert str(path) in str(error.value)


def test_idx_with_too_few_labels(tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "t-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    with pytest.raises(ValueError, match="t-labels-idx1-ubyte has 4 labels, .*t-images-idx3-ubyte has 5 images"):
        load_images(tmp_path / "t-images-idx3-ubyte")


def test_folder_and_zip_give_the_same_classes(photos: Path) -> None:
    for source in (photos, zipped(photos)):
        images = load_images(source)
        assert images.class_names == ("cat", "dog")
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert images.pixels.shape == (4, 3, 4, 6)
        assert images.pixels[:, :, 0, 0].tolist() == [[0, 0, 7], [0, 10, 7], [100, 0, 7], [100, 10, 7]]


def test_a_folder_inside_a_zip(photos: Path) -> None:
    archive = zipped(photos, "train/")
    assert load_images(archive / "train").class_names == ("cat", "dog")
    assert load_images(archive / "train" / "dog").labels is None
    with pytest.raises(ValueError, match="holds no images"):
        load_images(archive / "test")


def test_classes_on_two_levels_are_refused_before_any_image_is_decoded(photos: Path) -> None:
    nested = zipped(photos, "train/")
    with zipfile.ZipFile(nested, "a") as archive:
        archive.writestr("test/cat/a.png", b"no image")
    with pytest.raises(ValueError, match=r"one sub-folder per class, or --data .*\.zip/train; found .*/test/cat, "):
        load_images(nested)
    (photos / "stray.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="one sub-folder per class, none of them beside sub-folders"):
        load_images(photos)


def test_images_of_several_sizes_need_a_size(photos: Path) -> None:
    Image.new("RGB", (9, 4), (0, 0, 7)).save(photos / "dog" / "9.png")
    with pytest.raises(ValueError, match=r"dog/9\.png is 4x9, the images before it are 4x6: give a size"):
        load_images(photos)
    for size, message in (((2,), "size must be"), ((0, 2), r"size\[0\] must be"), ("32", "size must be a tuple")):
        with pytest.raises((ValueError, TypeError), match=message):
            load_images(photos, size=size)
    with pytest.raises(ValueError, match="pad must be"):
        load_images(photos, pad=-1)
    assert load_images(photos, size=(2, 2)).pixels[-1, :, 0, 0].tolist() == [0, 0, 7]


def test_resize_fits_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    array = np.zeros((4, 12, 3), np.uint8)
    array[:, 4:8] = 200  # all that is left of the middle third
    Image.fromarray(array).save(tmp_path / "wide.png")
    assert load_images(tmp_path, size=(4, 4)).pixels.unique().tolist() == [200]
    half = load_images(tmp_path, size=(2, 6)).pixels[0, 0, 0].tolist()
    assert half[0] == half[5] == 0 and half[2] == half[3] == 175 and half[1] == half[4] == 25  # a triangle 4 wide


def test_one_image_in_colour_makes_all_so(tmp_path: Path) -> None:
    Image.new("L", (3, 3), 9).save(tmp_path / "a.png")
    assert load_images(tmp_path).pixels.shape == (1, 1, 3, 3)
    Image.new("RGB", (3, 3), (250, 20, 30)).save(tmp_path / "b.png")
    assert load_images(tmp_path).pixels[:, :, 0, 0].tolist() == [[9, 9, 9], [250, 20, 30]]


def test_every_kind_of_pixel_becomes_eight_bits(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 3), (10, 20, 30, 255))
    rgba.putpixel((0, 0), (10, 20, 30, 0))
    deep = Image.fromarray(np.array([[0, 257, 65535]] * 3, dtype=np.uint16))
    grey, colour = Image.new("P", (3, 3), 1), Image.new("P", (3, 3), 1)
    grey.putpalette([0, 0, 0, 7, 7, 7])
    colour.putpalette([0, 0, 0, 7, 8, 9])
    for image, expected in (
        (rgba, [[255, 10], [255, 20], [255, 30]]),  # what is transparent becomes white
        (Image.new("LA", (3, 3), (9, 0)), [[255, 255]]),
        (deep, [[0, 1]]),
        (grey, [[7, 7]]),
        (colour, [[7, 7], [8, 8], [9, 9]]),
        (Image.new("1", (3, 3), 1), [[255, 255]]),
    ):
        image.save(tmp_path / "x.png")
        assert load_images(tmp_path).pixels[0, :, 0, :2].tolist() == expected, image.mode
    (tmp_path / "x.png").unlink()
    Image.new("F", (3, 3)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif can't be read: mode F has no fixed white"):
        load_images(tmp_path)


def test_cameras_say_which_side_is_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    pixels = load_images(tmp_path).pixels[0, 0]
    assert pixels.shape == (16, 8) and (pixels[:8] == 255).all() and (pixels[8:] == 0).all()


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "1"):
        (tmp_path / "n" / name).mkdir(parents=True)
        Image.new("L", (2, 2), int(name)).save(tmp_path / "n" / name / "x.png")
    for source in (tmp_path / "n", zipped(tmp_path / "n")):
        images = load_images(source)
        assert images.class_names == ("1", "2", "10")
        assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 10] and images.labels.tolist() == [0, 1, 2]


def test_an_empty_class_keeps_its_number(photos: Path) -> None:
    (photos / "cow").mkdir()
    with pytest.warns(UserWarning, match="photos/cow holds no images: class 1 stays empty"):
        images = load_images(photos)
    assert images.class_names == ("cat", "cow", "dog") and images.num_classes == 3
    assert images.labels.tolist() == [0, 0, 2, 2]


def test_zips_of_any_program_read_as_the_folder(photos: Path, tmp_path: Path) -> None:
    (photos / "cat.b").mkdir()  # sorts before "cat/" as a string, but after "cat"
    Image.new("RGB", (6, 4), (1, 2, 3)).save(photos / "cat.b" / "0.png")
    names = [f.relative_to(photos).as_posix() for f in sorted(photos.rglob("*.png"), reverse=True)]
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = "./" + name if "dog" in name else name.replace("/", "\\")
            archive.writestr(info, (photos / name).read_bytes())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("./dog/1.png", (photos / "dog" / "1.png").read_bytes())
    folder, odd = load_images(photos), load_images(tmp_path / "odd.zip")
    assert folder.class_names == odd.class_names == ("cat", "cat.b", "dog")
    assert folder.fingerprint() == odd.fingerprint() == load_images(zipped(photos)).fingerprint()


@pytest.mark.parametrize("keep", [0, 20, 45])
def test_damaged_image_is_named(photos: Path, keep: int) -> None:
    path = photos / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:keep])
    for source in (photos, zipped(photos)):
        with pytest.raises(ValueError, match=r"dog/1\.png can't be read"):
            load_images(source)


@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (b"<html>", "it is no image")])
def test_what_is_no_image_is_named(photos: Path, content: bytes, message: str) -> None:
    (photos / "dog" / "1.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"dog/1\.png can't be read: {message}; --skip-bad leaves such"):
        load_images(photos)


def test_damaged_zip_and_missing_source(photos: Path, tmp_path: Path) -> None:
    archive = zipped(photos)
    archive.write_bytes(archive.read_bytes()[:-30])
    for source in (archive, archive / "dog"):
        with pytest.raises(ValueError, match=r"photos\.zip is a damaged zip"):
            load_images(source)
    with pytest.raises(ValueError, match="nowhere doesn't exist"):
        load_images(tmp_path / "nowhere")


def numbered(count: int) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 1, 2)
    pixels[..., 1] += 100
    return Images(pixels, torch.arange(count))


def test_every_epoch_holds_every_image_once() -> None:
    batches = Batches(numbered(10), seed=3)
    drawn = [batches.take(position, 4)[1] for position in range(0, 40, 4)]  # batches straddle the epochs
    epochs = torch.cat(drawn).reshape(4, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).repeat(4, 1))
    assert len(epochs.unique(dim=0)) == 4


def test_batches_depend_on_seed_and_position_alone() -> None:
    data = numbered(10)
    x, y = Batches(data, seed=3, flip=True).take(0, 57)
    late = Batches(data, seed=3, flip=True)
    late.take(90, 2)
    x_late, y_late = late.take(31, 20)
    assert torch.equal(x_late, x[31:51]) and torch.equal(y_late, y[31:51])
    assert not torch.equal(Batches(data, seed=4).take(0, 57)[1], y)


def test_flip_mirrors_about_half_and_pixels_are_scaled() -> None:
    data = numbered(100)
    x, y = Batches(data, seed=0, flip=True).take(0, 400)
    plain = to_float(data.pixels[y])
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert ((x == plain).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert torch.equal(
        Batches(data, seed=0).take(0, 100)[0], to_float(data.pixels[Batches(data, seed=0).take(0, 100)[1]])
    )


def test_fingerprint_sees_pixels_and_labels() -> None:
    data = numbered(4)
    seen = {
        tuple(images.fingerprint().values()) for images in (data, numbered(5), data._replace(labels=data.labels + 1))
    }
    assert len(seen) == 3 and data.fingerprint() == numbered(4).fingerprint()


def test_a_zip_of_an_unknown_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 152  # the version that is needed to read it
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"new\.zip .*: zip file version 15\.2"):
        load_images(path)


def test_damaged_pixels_of_a_png_are_found_by_their_checksum(photos: Path) -> None:
    """Pillow alone would decode them to other pixels, in silence."""
    path = sorted((photos / "dog").glob("*.png"))[0]
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 4 + 6] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name} can't be read: .*checksum"):
        load_images(photos)
