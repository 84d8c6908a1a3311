"""A cache of decoded images, verified by content: a source that changed in any byte or name is decoded anew.

One safetensors file per source and size, uncompressed and mapped into memory. It may be deleted at any time.
"""

import hashlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .extras import require

FORMAT = 1  # raise it when decoding gives other pixels
FOLDER = "DDPM_FAST_CACHE"  # in the environment: where the cache lies

# Where an image lies, and the hash of its file.
Digest = tuple[PurePosixPath, bytes]


def default_folder() -> Path:
    """$DDPM_FAST_CACHE, or ~/.cache/ddpm_fast."""
    return Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "ddpm_fast")


def cache_file(folder: Path, source: Path, size: tuple[int, int] | None) -> Path:
    """Where the images of a source are kept. Of one that changed, the new ones take the place of the old."""
    key = hashlib.sha256(f"{source.resolve()}\n{size}".encode("utf-8", "surrogateescape")).hexdigest()
    name = re.sub(r"[^\w-]+", "-", source.resolve().name)[:40]
    return folder / f"{name}-{key[:16]}.safetensors"


def content_hash(data: bytes) -> bytes:
    """Of one source file."""
    return hashlib.sha256(data).digest()


def fingerprint(digests: Iterable[Digest]) -> str:
    """Names and contents of all images in their order, and what turns them into pixels."""
    decoders = [FORMAT, require("PIL").__version__, torch.__version__]
    whole = hashlib.sha256(json.dumps(decoders).encode())
    for name, digest in digests:
        path = str(name).encode("utf-8", "surrogateescape")
        whole.update(len(path).to_bytes(8, "big") + path + digest)
    return whole.hexdigest()


def load(path: Path, expected: str) -> tuple[Tensor, dict[str, str]] | None:
    """Pixels and reasons why images were skipped, by name; None unless they are those of the fingerprint `expected`."""
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("about", "")
            if json.loads(about)["fingerprint"] != expected:
                return None
            pixels = file.get_tensor("pixels")
            found = file.metadata().get("crc32")
        skipped = json.loads(about)["skipped"]
        if found != _checksum(about, pixels) or pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError("its checksum is wrong")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error}): the images are decoded anew", stacklevel=2)
        return None
    return pixels, skipped


def save(path: Path, seen: str, pixels: Tensor, skipped: dict[str, str]) -> None:
    """Writes whole or not at all; a warning where it can't be written, since training can go on without."""
    about = json.dumps({"fingerprint": seen, "skipped": skipped})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # not through bytes in memory, which the pixels may fill
            metadata = {"about": about, "crc32": _checksum(about, pixels)}
            safetensors.torch.save_file({"pixels": pixels.contiguous()}, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} can't be written, the next run decodes again: {error}", stacklevel=2)


def _checksum(about: str, pixels: Tensor) -> str:
    return str(zlib.crc32(pixels.contiguous().numpy().data, zlib.crc32(about.encode())))
