"""Checkpoints: everything comes back bit for bit, a failed write leaves the old file, damage is named."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_fast import Diffusion
from ddpm_fast.models.presets import Config
from ddpm_fast.training.checkpoint import load_diffusion, read_checkpoint, save_checkpoint

TINY = Config(
    img_size=(8, 8),
    img_channels=1,
    num_classes=3,
    base_channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    time_emb_dim=16,
    num_groups=4,
    num_timesteps=10,
    schedule="cosine",
    ema_decay=0.9,
    ema_start=1,
)


def trained(steps: int = 3) -> tuple[Diffusion, torch.optim.Optimizer]:
    torch.manual_seed(0)
    diffusion = Diffusion.from_config(TINY, seed=5, betas=TINY.betas())
    optimizer = torch.optim.Adam(diffusion.model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = diffusion(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        diffusion.update_ema()
    return diffusion, optimizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    diffusion, optimizer = trained()
    save_checkpoint(tmp_path / "model.safetensors", diffusion, TINY, optimizer=optimizer, training={"position": 12})
    return tmp_path / "model.safetensors"


def rewrite(path: Path, change) -> None:
    """Saves the file again after `change(tensors, header)`."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ddpm_fast"])
    header.pop("crc32", None)  # or every change would be noticed there
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, {"ddpm_fast": json.dumps(header)})


def test_everything_comes_back(path: Path) -> None:
    diffusion, optimizer = trained()
    torch.randn(3)  # the generator moves on after saving
    fresh = Diffusion.from_config(TINY)
    fresh_optimizer = torch.optim.Adam(fresh.model.parameters())
    saved = read_checkpoint(path)
    saved.load_into(fresh, fresh_optimizer)
    assert saved.config == TINY and saved.training == {"position": 12}
    assert fresh.extra_state() == diffusion.extra_state() and fresh.step == 3
    expected = diffusion.state_dict()
    assert list(fresh.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
    ours, theirs = fresh_optimizer.state_dict(), optimizer.state_dict()
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])  # JSON has no tuples
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][name], value) for name, value in entries.items())
    trained()
    assert torch.equal(saved.rng, torch.get_rng_state())


def test_the_file_reads_as_a_plain_state_dict(path: Path) -> None:
    diffusion, _ = trained()
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], value) for name, value in diffusion.state_dict().items())


def test_load_diffusion_samples_the_same_images(path: Path) -> None:
    diffusion, _ = trained()
    loaded, config = load_diffusion(path)
    assert config == TINY and not loaded.training
    y = torch.tensor([0, 1, 2])
    assert torch.equal(loaded.sample(3, "cpu", y, seed=1), diffusion.sample(3, "cpu", y, seed=1))


def test_class_names_come_from_the_file(path: Path) -> None:
    assert read_checkpoint(path).class_names == ("0", "1", "2")
    rewrite(path, lambda tensors, header: header["training"].update(class_names=["a", "b", "c"]))
    assert read_checkpoint(path).class_names == ("a", "b", "c")
    rewrite(path, lambda tensors, header: header["training"].update(class_names=["a", "b"]))
    with pytest.raises(ValueError, match="has 3 classes, but the names"):
        _ = read_checkpoint(path).class_names


def test_channels_last_weights_are_saved(tmp_path: Path) -> None:
    diffusion, _ = trained()
    diffusion.to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a.safetensors", diffusion, TINY)
    loaded, _ = load_diffusion(tmp_path / "a.safetensors")
    expected = diffusion.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="no optimizer state"):
        optimizer = torch.optim.Adam(loaded.model.parameters())
        read_checkpoint(tmp_path / "a.safetensors").load_into(loaded, optimizer)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, trained(5)[0], TINY)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_and_then_its_folder_reach_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    save_checkpoint(path, trained()[0], TINY)
    assert events == ["file", "replace", "folder"]


def test_others_may_read_the_file_as_the_umask_says(path: Path) -> None:
    plain = path.with_name("plain")
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a safetensors file, or it is truncated") as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_the_folder_of_a_run_will_do(path: Path, tmp_path: Path) -> None:
    assert read_checkpoint(path.parent).path == path and read_checkpoint(path.parent).config == TINY
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"photos is a folder without model\.safetensors"):
        read_checkpoint(tmp_path / "photos")


@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_torch_save_are_told_apart(path: Path, as_zip: bool) -> None:
    diffusion, _ = load_diffusion(path)
    torch.save(diffusion.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    advice = r"no checkpoint that `ddpm-fast train` wrote, .* diffusion\.load_state_dict\(torch\.load\(path\)\)"
    with pytest.raises(ValueError, match=advice) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_damaged_bit_is_noticed(path: Path) -> None:
    """Also one that leaves a file in order: in a tensor's numbers, or in the text of the header."""
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    with safe_open(path, framework="pt") as file:
        assert "crc32" in json.loads(file.metadata()["ddpm_fast"])
    step = whole.index(b'\\"step\\": 3')
    for at, what in ((size + 1, "is damaged"), (len(whole) - 1, "is damaged"), (step + 10, "ddpm_fast is damaged")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=what) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value)


def test_a_file_without_checksums_is_read(path: Path) -> None:
    before = read_checkpoint(path)
    rewrite(path, lambda tensors, header: None)
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["ddpm_fast"]
    after = read_checkpoint(path)
    assert all(torch.equal(value, after.state[name]) for name, value in before.state.items())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.safetensors doesn't exist"):
        read_checkpoint(tmp_path / "nowhere.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"other\.safetensors is no checkpoint of this package: 'ddpm_fast' is missing"
    ):
        read_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.update(format=2), "format 2, this version reads up to 1"),
        (lambda tensors, header: header.pop("extra_state"), "'extra_state' is missing"),
        (lambda tensors, header: header["config"].update(colour=1), "colour"),
        (lambda tensors, header: tensors.pop("model.init_conv.weight"), "model.init_conv.weight"),
        (lambda tensors, header: tensors.update(surplus=torch.zeros(1)), "surplus"),
        (lambda tensors, header: header["config"].update(base_channels=16), "size mismatch"),
        (lambda tensors, header: tensors.update({"optimizer.0.exp_avg": torch.zeros(3)}), r"0\.exp_avg has shape"),
        (lambda tensors, header: header["param_groups"][0]["params"].pop(), "optimizer state for"),
        (lambda tensors, header: header["param_groups"][0].pop("params"), "'params' is missing"),
        (lambda tensors, header: header.update(param_groups=3), "can't be used"),
        (lambda tensors, header: header.update(format="new"), "can't be used"),
        (lambda tensors, header: header.update(config=[1]), r"config is \[1\]"),
        (lambda tensors, header: header.update(extra_state=None), "extra_state is None"),
        (lambda tensors, header: header.update(training="x"), "training is 'x'"),
        (lambda tensors, header: header["extra_state"].update(calls="many"), "calls must be an integer"),
        (lambda tensors, header: header["config"].update(base_channels="wide"), "base_channels must be an integer"),
        (lambda tensors, header: header["config"].update(img_size=8), "img_size must be a tuple"),
        (lambda tensors, header: header["config"].update(img_size=[8]), r"img_size must be \(height, width\)"),
        (lambda tensors, header: header["config"].update(dropout=float("nan")), "dropout must be a finite number"),
        (lambda tensors, header: header["config"].update(num_timesteps=None), "num_timesteps must be an integer"),
        (lambda tensors, header: header["config"].update(activation=["relu"]), "activation must be one of"),
        (lambda tensors, header: tensors.update({"optimizer.x": torch.zeros(3)}), "can't be used"),
        (lambda tensors, header: tensors.update({"optimizer.999.step": torch.zeros(3)}), "can't be used"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(path: Path, change, message: str) -> None:
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as error:
        saved = read_checkpoint(path)
        diffusion = Diffusion.from_config(saved.config)
        saved.load_into(diffusion, torch.optim.Adam(diffusion.model.parameters()))
    assert str(path) in str(error.value)


def test_what_was_read_does_not_hang_on_the_file(path: Path) -> None:
    """Nor on the file being left alone, nor on who loaded it before."""
    saved = read_checkpoint(path)
    data = path.read_bytes()
    with open(path, "r+b") as file:  # in place, as cp writes
        file.write(b"\0" * len(data))
    optimizers = []
    for _ in range(2):
        diffusion, optimizer = trained(0)
        saved.load_into(diffusion, optimizer)
        diffusion(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizers.append(optimizer)
    for a, b in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a) and float(a["step"]) == 4
