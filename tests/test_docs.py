"""The Python in README and docs runs as it stands there, and does what the text says."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import Pixelwise

from ddpm_fast import Diffusion, generate_linear_schedule
from ddpm_fast.engine import denoise

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What a page takes for granted: the reader's data, and a trained model.
GIVEN: dict[str, Any] = {
    "loader": [torch.zeros(2, 3, 32, 32)],
    "diffusion": Diffusion(Pixelwise(), (4, 4), 1, None, generate_linear_schedule(1000, 1e-4, 0.02)),
}
GIVEN_THERE: dict[str, dict[str, Any]] = {
    "training": {"loader": [torch.zeros(2, 1, 4, 4)], "images": -torch.ones(2, 1, 4, 4), "labels": None},
    "conditions": {
        "betas": generate_linear_schedule(20, 1e-2, 0.2),
        "x": torch.zeros(16, 3, 32, 32),
        "y": torch.arange(16) % 10,
        "net": lambda x, t, *inputs: 0.5 * x,
        "text": torch.ones(16, 4),
        "mask": torch.ones(16),
        "no_text": torch.zeros(1, 4),
        "no_mask": torch.zeros(1),
        "classifier": lambda x, t: x.flatten(2).mean(2) @ torch.ones(3, 10),
    },
}
# A size that a test can wait for.
SMALLER = {
    "UNet(3, 128, ": "UNet(3, 32, ",
    "UNet(3, 64, ": "UNet(3, 8, (1, 2), 1, num_groups=4, ",
    "None, generate_linear_schedule(1000, ": "None, generate_linear_schedule(3, ",
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_examples_run(page: Path) -> None:
    names = copy.deepcopy(GIVEN | GIVEN_THERE.get(page.stem, {}))
    for block in blocks(page):
        for usual, small in SMALLER.items():
            block = block.replace(usual, small)
        exec(compile(block, page, "exec"), names)
        if "bits" in names:
            assert names["bits"].total.shape == (2,) and names["bits"].terms.shape == (2, 1000)
        if page.stem == "training":
            assert names["loss"].isfinite() and names["diffusion"].step == 1
        else:
            assert names["images"].shape[0] == 16 and names["images"].isfinite().all()


def test_readme_and_sampling_have_examples() -> None:
    assert len(blocks(ROOT / "README.md")) == 1 and len(blocks(ROOT / "docs" / "sampling.md")) == 3


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_the_ddim_of_the_docs_is_the_papers(num_steps: int) -> None:
    """Song et al. 2021, equation 12 with sigma = 0, step by step."""
    names = dict(GIVEN)
    exec(blocks(ROOT / "docs" / "sampling.md")[-1], names)
    abar = np.cumprod(1 - generate_linear_schedule(1000, 1e-4, 0.02))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.8 * x + 0.1 * torch.sin(t.to(x.dtype).view(-1, 1, 1, 1)))

    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    times = np.linspace(999, 0, num_steps).round().astype(int).tolist()
    for t, after in zip(times, [*times[1:], None], strict=True):
        eps = network(x, torch.tensor([t, t]))
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        x = x0 if after is None else np.sqrt(abar[after]) * x0 + np.sqrt(1 - abar[after]) * eps
    plan = names["ddim"](abar, num_steps)
    assert plan.column("t").tolist() == times
    assert float((denoise(network, x_T.clone(), plan) - x).abs().max()) <= 1e-10 * max(1, float(x.abs().max()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"benchmarks/results/[\w/]+\.json", text):
        if "/gpu/" not in name:  # those of a GPU are yet to come
            assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in name or (page.parent / name).exists(), name
