"""Checkpoints: one safetensors file with everything a run needs to go on.

Tensors: the `state_dict()` of `Diffusion` under its own names, `optimizer.<index>.<name>`, `rng.torch`.
Header key "ddpm_fast", JSON: {format, config, extra_state, param_groups, training, crc32}, the last the checksum of the
rest of that JSON and of each tensor, by which a damaged bit is noticed. Nothing is ever unpickled.
"""

import copy
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..diffusion import Diffusion
from ..models.presets import Config
from .files import write_atomically

FORMAT = 1
HEADER = "ddpm_fast"
CHECKPOINT = "model.safetensors"  # in the folder of a run
CHECKSUMS = "crc32"  # files written before there were any lack it
OPTIMIZER, RNG = "optimizer.", "rng.torch"


class Checkpoint(NamedTuple):
    """What a checkpoint file holds, on the CPU."""

    path: Path
    config: Config
    state: dict[str, Tensor]  # of Diffusion
    extra_state: dict[str, Any]  # of Diffusion: step, call counter, seed
    optimizer: dict[str, Any] | None  # as torch.optim.Optimizer.state_dict() gives it
    rng: Tensor | None  # of torch's CPU generator
    training: dict[str, Any]  # JSON of the trainer's own

    def load_into(self, diffusion: Diffusion, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Restores a diffusion, and an optimizer over its parameters, to the saved state.

        Raises:
            ValueError: names or shapes don't fit; the text names the file.
        """
        with named(self.path):
            diffusion.load_state_dict(self.state, step=self.extra_state.get("step"))
            diffusion.load_extra_state(self.extra_state)
            if optimizer is not None:
                self._load_optimizer(optimizer)

    def diffusion(self, device: torch.device | str = "cpu") -> Diffusion:
        """The trained diffusion, in eval mode on `device`."""
        with named(self.path):
            diffusion = Diffusion.from_config(self.config)
        self.load_into(diffusion)
        return diffusion.to(device).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name per class, its number where none was saved; () without classes."""
        count = self.config.num_classes or 0
        names = self.training.get("class_names") or [str(k) for k in range(count)]
        if len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.path} has {count} classes, but the names {names}")
        return tuple(names)

    def _load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.optimizer is None:
            raise ValueError("no optimizer state: it can be sampled from, but not resumed")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [i for group in self.optimizer["param_groups"] for i in group["params"]]
        if len(saved) != len(params):
            raise ValueError(f"optimizer state for {len(saved)} parameters, expected {len(params)}")
        for index, entries in self.optimizer["state"].items():  # torch itself takes any shape
            for name, value in entries.items():
                if value.ndim and value.shape != params[index].shape:
                    came, expected = tuple(value.shape), tuple(params[index].shape)
                    raise ValueError(f"{OPTIMIZER}{index}.{name} has shape {came}, expected {expected}")
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))  # it would keep our tensors, and train them


def save_checkpoint(
    path: str | Path,
    diffusion: Diffusion,
    config: Config,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint atomically: a reader, or a crash, sees the old file or the new one, never a part.

    Args:
        optimizer: saved too, with the state of torch's CPU generator, so that training can go on.
        training: JSON-able values of the caller's own.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "config": config.to_dict(),
        "extra_state": diffusion.extra_state(),
        "training": dict(training or {}),
    }
    tensors = dict(diffusion.state_dict())
    if optimizer is not None:
        state = optimizer.state_dict()
        header["param_groups"] = state["param_groups"]
        tensors[RNG] = torch.get_rng_state()
        for index, entries in state["state"].items():
            tensors |= {f"{OPTIMIZER}{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header[CHECKSUMS] = _checksums(header, tensors)
    write_atomically(path, save(tensors, {HEADER: json.dumps(header)}), durable=True)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file written by `save_checkpoint`, or the one in the folder of a run.

    Raises:
        ValueError: it is missing, truncated, not ours, or of a later format; the text names it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise ValueError(f"{path} is a folder without {CHECKPOINT}")
        path /= CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist: expected a checkpoint (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what the file backs would change, or crash the process, with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        if _is_pickled(path):
            raise ValueError(
                f"{path} is no checkpoint that `ddpm-fast train` wrote, but a file of torch.save or pickle: to load a "
                "state dict, build the Diffusion it was saved from, then diffusion.load_state_dict(torch.load(path))"
            ) from error
        raise ValueError(f"{path} is not a safetensors file, or it is truncated: {error}") from error
    if HEADER not in metadata:
        raise ValueError(f"{path} is no checkpoint of this package: {HEADER!r} is missing in its header")
    with named(path):
        header = json.loads(metadata[HEADER])
        if (saved := header.pop(CHECKSUMS, None)) is not None:
            _compare(saved, _checksums(header, tensors))
        if header["format"] > FORMAT:
            raise ValueError(f"format {header['format']}, this version reads up to {FORMAT}")
        return _assemble(path, header, tensors)


def _is_pickled(path: Path) -> bool:
    """Whether a file begins as those of torch.save do: a zip, or in old ones pickle's protocol 2 to 5."""
    with open(path, "rb") as file:
        head = file.read(2)
    return head == b"PK" or (head[:1] == b"\x80" and head[1:] in (b"\2", b"\3", b"\4", b"\5"))


def _checksums(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The CRC-32 of the header, and by name of each tensor's dtype, shape and bytes."""
    sums = {HEADER: zlib.crc32(json.dumps(header).encode())}
    for name, tensor in sorted(tensors.items()):  # or the file of a resumed run would differ
        kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
        sums[name] = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, kind)
    return sums


def _compare(saved: Mapping[str, int], found: Mapping[str, int]) -> None:
    for name in [*saved, *found]:
        if saved.get(name) != found.get(name):
            raise ValueError(f"{name} is damaged: its checksum is not the one that was saved")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Whatever a damaged checkpoint trips over becomes one ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} can't be used: {error} is missing in its header") from error
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} can't be used: {error}") from error


def _assemble(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    for key in ("config", "extra_state", "training"):
        if not isinstance(header[key], dict):
            raise TypeError(f"{key} is {header[key]!r}, expected an object")
    config = Config.from_dict(header["config"])
    rng = tensors.pop(RNG, None)
    entries: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(OPTIMIZER)]:
        index, entry = name.removeprefix(OPTIMIZER).split(".")
        entries.setdefault(int(index), {})[entry] = tensors.pop(name)
    groups = header.get("param_groups")
    optimizer = None if groups is None else {"state": entries, "param_groups": groups}
    return Checkpoint(path, config, tensors, header["extra_state"], optimizer, rng, header["training"])


def load_diffusion(path: str | Path, device: torch.device | str = "cpu") -> tuple[Diffusion, Config]:
    """The trained diffusion in a checkpoint, in eval mode on `device`, and its configuration."""
    checkpoint = read_checkpoint(path)
    return checkpoint.diffusion(device), checkpoint.config
