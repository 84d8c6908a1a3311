"""How the table of convolutions is measured and written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ddpm_fast._C")
from benchmarks import conv3x3_table as table
from ddpm_fast.models.weights import onednn_takes_bf16
from ddpm_fast.ops._conv3x3 import CHANGING, DIRECT, FIXED, WEIGHT, Way

SMALL, LARGE = Way(2), Way(4)


@pytest.mark.parametrize(
    ("us", "way"),
    [
        ({DIRECT: 102, SMALL: 100}, DIRECT),  # hardly slower
        ({DIRECT: 104, SMALL: 100}, SMALL),
        ({DIRECT: 300, SMALL: 107, Way(2, True): 100}, SMALL),  # a chain's time isn't spent for so little
        ({DIRECT: 300, SMALL: 109, Way(2, True): 100}, Way(2, True)),
        ({DIRECT: 300, SMALL: 105, Way(2, True): 104, LARGE: 120, Way(4, True): 100}, Way(4, True)),
    ],
)
def test_what_is_taken(us: dict[Way, float], way: Way) -> None:
    assert table.taken(us) == way


@pytest.mark.parametrize("what", [FIXED, CHANGING, WEIGHT])
def test_a_row(what: str) -> None:
    """All ways that there are for a use are timed, and only those within the bound."""
    with torch.no_grad():
        row = table.measured((2, 64, 64, 8), torch.float32, what, 1)
    expected = {"direct", "F(2x2)", "F(4x4)"} | ({"F(2x2) prepared", "F(4x4) prepared"} if what == FIXED else set())
    within = {"direct"} | {
        name
        for name in expected - {"direct"}
        if row[f"errors {name}"][0] <= table.RMS and row[f"errors {name}"][1] <= table.LARGEST
    }
    assert set(row["us"]) == within and "F(2x2)" in within
    assert Way(*row["way"]).text(torch.float32) in within and min(row["us"].values()) > 0


@pytest.mark.skipif(not onednn_takes_bf16(), reason="PyTorch packs no bf16 weights on this CPU")
def test_in_bf16_tiles_have_two_rows() -> None:
    with torch.no_grad():
        row = table.measured((2, 64, 64, 8), torch.bfloat16, FIXED, 1)
    assert set(row["us"]) == {"direct", "F(2x2)", "F(2x4)", "F(2x2) prepared", "F(2x4) prepared"}


def test_a_way_beyond_the_bound_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RMS", 0.0)
    with torch.no_grad():
        row = table.measured((2, 64, 64, 8), torch.float32, FIXED, 1)
    assert set(row["us"]) == {"direct"} and row["way"] == list(DIRECT)


def test_rows_take_the_place_of_those_of_the_same_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", tmp_path / "table.json")

    def row(what: str, way: Way) -> dict[str, Any]:
        return {"dtype": "float32", "what": what, "shape": [1, 2, 3, 4], "way": list(way)}

    table.write("avx2", [row(FIXED, SMALL), row(CHANGING, SMALL)])
    table.write("avx512", [row(FIXED, LARGE)])
    table.write("avx2", [row(CHANGING, DIRECT)])
    ways = json.loads(table.TABLE.read_text())["ways"]
    assert ways["avx2"]["float32"] == {FIXED: [[1, 2, 3, 4, 2, False]], CHANGING: [[1, 2, 3, 4, 0, False]]}
    assert ways["avx512"]["float32"] == {FIXED: [[1, 2, 3, 4, 4, False]]}
