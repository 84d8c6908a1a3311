"""What tests of the native module change, and put back."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("ddpm_fast._C") is None:
    pytest.skip("the native module is not built here", allow_module_level=True)
from ddpm_fast import _C


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The instruction set and the number of threads that were there before are back after a test."""
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.force_isa(isa)
    torch.set_num_threads(threads)
