"""CIFAR in both formats and any wrapping, and pickles that would rather do something else."""

import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_fast.training.data import load_images
from ddpm_fast.training.unpickle import unpickle

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNT = 3  # images per batch


def batch(k: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(k)
    return rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8), [(k + i) % 10 for i in range(COUNT)]


def python2(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as its authors' Python 2 wrote it: protocol 2, and all text as byte strings."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s

    integers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"".join(b"M" + struct.pack("<H", side) for side in pixels.shape)
    return (
        b"\x80\x02}q\x01(" + text(b"data")
        + b"q\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        + text(b"b") + b"\x87Rq\x05(K\x01" + shape + b"\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        + b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
        + text(b"labels") + b"](" + integers + b"eu."
    )  # fmt: skip


@pytest.fixture
def python(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k in range(1, 6):
        (folder / f"data_batch_{k}").write_bytes(python2(*batch(k)))
    (folder / "test_batch").write_bytes(python2(*batch(9)))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES), "num_vis": 3072}, 2))
    return folder


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, name in [*((k, f"data_batch_{k}") for k in range(1, 6)), (9, "test_batch")]:
        pixels, labels = batch(k)
        records = b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))
        (folder / f"{name}.bin").write_bytes(records)
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def packed(folder: Path, suffix: str) -> Path:
    path = folder.parent / f"packed{suffix}"
    files = sorted(folder.iterdir(), reverse=True)  # in no useful order
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"{folder.name}/{file.name}")
    else:
        with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
            for file in files:
                archive.add(file, f"{folder.name}/{file.name}")
    return path


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_all_wrappings_give_the_training_images(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    pixels = np.concatenate([batch(k)[0] for k in range(1, 6)]).reshape(-1, 3, 32, 32)
    sources = [folder, folder.parent / "above", *(packed(folder, suffix) for suffix in (".tar.gz", ".tar", ".zip"))]
    (folder.parent / "above").mkdir()
    (folder.parent / "above" / folder.name).symlink_to(folder)
    for source in (folder, *sources[2:], sources[-1] / folder.name):
        images = load_images(source)
        assert np.array_equal(images.pixels.numpy(), pixels), source
        assert images.labels.tolist() == [label for k in range(1, 6) for label in batch(k)[1]]
        assert images.class_names == NAMES


def test_one_batch_and_the_test_images_by_their_name(python: Path, binary: Path) -> None:
    for path in (python / "test_batch", binary / "test_batch.bin"):
        images = load_images(path)
        assert np.array_equal(images.pixels.numpy().reshape(COUNT, -1), batch(9)[0])
        assert images.labels.tolist() == batch(9)[1] and images.class_names == NAMES


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    pixels, _ = batch(1)
    names = [f"class {k}" for k in range(100)]
    (tmp_path / "py").mkdir()
    (tmp_path / "bin").mkdir()
    content = {b"data": pixels, b"fine_labels": [99, 0, 5], b"coarse_labels": [1, 1, 1]}
    (tmp_path / "py" / "train").write_bytes(pickle.dumps(content))
    (tmp_path / "py" / "meta").write_bytes(pickle.dumps({b"fine_label_names": [n.encode() for n in names]}))
    records = b"".join(bytes([1, k]) + row.tobytes() for row, k in zip(pixels, (99, 0, 5), strict=True))
    (tmp_path / "bin" / "train.bin").write_bytes(records)
    (tmp_path / "bin" / "fine_label_names.txt").write_text("\n".join(n.replace(" ", "_") for n in names))
    for kind, first in (("py", "class 0"), ("bin", "class_0")):
        images = load_images(tmp_path / kind)
        assert images.labels.tolist() == [99, 0, 5] and images.class_names[0] == first and images.num_classes == 100
        assert np.array_equal(images.pixels.numpy().reshape(COUNT, -1), pixels)


def test_missing_batches_are_named(python: Path, binary: Path) -> None:
    (python / "data_batch_4").unlink()
    (binary / "data_batch_1.bin").unlink()
    for folder, name in ((python, "data_batch_4"), (binary, r"data_batch_1\.bin")):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_images(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "can't be read"),
        (lambda b: b"", "can't be read"),
        (lambda b: python2(batch(1)[0][:2], [1, 2, 3]), "3 labels for 2 images"),
        (lambda b: python2(batch(1)[0][:, :3000], [1, 2, 3]), r"expected 'data', uint8 \[N, 3072\]"),
        (lambda b: python2(batch(1)[0], [1, 2, 77]), "labels 1 to 77 of 10 classes"),
        (lambda b: pickle.dumps([1]), "holds a list, expected a dict"),
        (lambda b: pickle.dumps({"data": batch(1)[0], "labels": "abc"}), "'labels', a list of numbers"),
    ],
)
def test_damaged_batch_is_named(python: Path, damage: Any, message: str) -> None:
    path = python / "data_batch_3"
    path.write_bytes(damage(path.read_bytes()))
    for source in (python, packed(python, ".tar.gz")):
        with pytest.raises(ValueError, match=message) as error:
            load_images(source)
        assert "data_batch_3" in str(error.value)


def test_damaged_binary_batch_and_archive_are_named(binary: Path) -> None:
    path = binary / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin can't be read: .*truncated"):
        load_images(binary)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin can't be read: 0 bytes"):
        load_images(binary)
    archive = packed(binary, ".tar.gz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"packed\.tar\.gz can't be read"):
        load_images(archive)
    with tarfile.open(binary.parent / "photos.tar", "w") as photos:
        photos.addfile(tarfile.TarInfo("cat/1.png"))
    with pytest.raises(ValueError, match=r"photos\.tar holds no CIFAR"):
        load_images(binary.parent / "photos.tar")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_reads_as_it_was_written(protocol: int) -> None:
    shared = [1, -2, 2**40, 1.5, None, True, "é", b"\0\xff", (), (1,), (1, 2, 3, 4), {"k": [3]}]
    arrays = {"u": batch(1)[0], "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "i": np.arange(3, dtype=">i4")}
    written = {"a": shared, "b": shared, **arrays}
    read = unpickle(pickle.dumps(written, protocol))
    assert read["a"] == shared and read["a"] is read["b"]
    for name, array in arrays.items():
        assert np.array_equal(read[name], array) and read[name].dtype == array.dtype


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.called


def deeds(marker: str) -> dict[str, bytes]:
    """Pickles that make a folder called `marker`."""
    code = f"__import__('os').mkdir({marker!r})"
    text = marker.encode()
    return {
        "a call": pickle.dumps(Call(os.mkdir, marker)),
        "system": pickle.dumps(Call(os.system, f"mkdir {marker}"), 2),
        "eval": pickle.dumps({"data": Call(eval, code)}),
        "exec in a list": pickle.dumps({"labels": [Call(exec, code)]}, 0),
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVmkdir\ntR(V" + text + b"\ntR.",
        "a dotted name": b"\x80\x04\x8c\x02os\x8c\x0dpath.os.mkdir\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "INST": b"(V" + text + b"\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nV" + text + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "BUILD": b"c_codecs\nencode\np0\nN}Vx\ncos\nmkdir\n(V" + text + b"\ntRs\x860g0\n.",
        "after the array": python2(*batch(1))[:-1] + b"cos\nmkdir\n(V" + text + b"\ntR.",
        "numpy's own": b"cnumpy.testing\nrunstring\n(V" + code.encode() + b"\n}tR.",
    }  # fmt: skip


@pytest.mark.parametrize("deed", deeds("x"))
def test_nothing_in_a_pickle_is_executed(python: Path, deed: str) -> None:
    marker = python.parent / "marker"
    evil = deeds(str(marker))[deed]
    pickle.loads(evil, encoding="bytes")
    marker.rmdir()  # so it would have worked
    (python / "data_batch_2").write_bytes(evil)
    with pytest.raises(ValueError, match="data_batch_2 can't be read"):
        load_images(python)
    assert not marker.exists()


def bombs() -> dict[str, bytes]:
    key = b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s."
    array = python2(*batch(1))
    return {
        "memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
        "claims a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "nested key": key,
        "nested value": b"\x80\x02}U\x04data" + b")" + b"\x85" * 50_000 + b"s.",
        "doubling": b"\x80\x02}U\x04data]" + b"".join(b"q%c(h%ch%ce" % (k, k, k) for k in range(60)) + b"s.",
        "many": b"\x80\x02]" + b"]0" * 1_100_000 + b".",
        "objects": array.replace(b"U\x02u1", b"U\x02O8"),
        "negative shape": array.replace(b"(K\x01M\x03\x00", b"(K\x01J\xff\xff\xff\xff"),
        "huge shape": array.replace(b"(K\x01M\x03\x00", b"(K\x01J\xff\xff\xff\x7f"),
        "long digits": b"I" + b"9" * 10**6 + b"\n.",
        "BUILD of a name": b"\x80\x02cnumpy\ndtype\n}b.",
        "slots of a name": b"\x80\x02c_codecs\nencode\nN}U\x0c__defaults__)s\x86b.",
        "slots of an array": array[: array.index(b"(K\x01M")] + b"N}\x86bs.",
        "NEWOBJ": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "EXT": b"\x80\x02\x82\x01.",
        "persistent": b"Pid\n.",
        "stack underflow": b"\x80\x02}(0000t.",
        "no stop": b"\x80\x02}",
    }


@pytest.mark.parametrize("kind", bombs())
def test_bombs_cost_little(kind: str) -> None:
    data = bombs()[kind]
    tracemalloc.start()
    try:
        found = unpickle(data)
        assert set(found) <= {"data"} and kind in ("memo index", "nested value", "doubling"), kind
    except ValueError as error:
        assert len(str(error)) < 300
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


@pytest.mark.skipif("DDPM_FAST_DATA" not in os.environ, reason="DDPM_FAST_DATA names no folder with real data sets")
@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-python.tar.gz"])
def test_real_cifar(name: str) -> None:
    path = Path(os.environ["DDPM_FAST_DATA"]) / name
    if not path.exists():
        pytest.skip(f"{path} doesn't exist")
    images = load_images(path)
    assert images.pixels.shape == (50_000, 3, 32, 32) and images.class_names == NAMES
    assert torch.equal(images.labels.bincount(), torch.full((10,), 5000))
    assert images.labels[:3].tolist() == [6, 9, 9]
