"""What all tests share: repeatable random numbers, few threads, and memory that no one may read before writing it."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Every test starts from the same seeds and two threads, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its kin return with NaN, so that an element left unwritten shows."""

    def poisoned(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
