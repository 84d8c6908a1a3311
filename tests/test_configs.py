"""Which configuration a Triton kernel runs in: the rule, the committed tables, and the search that one asks for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu_tune
from ddpm_fast import engine
from ddpm_fast.kernels import configs, lookup, noise, norm_cut

LISTED = {"rule": 1, "other": 2, "third": 3}
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU by name, and the folder of its table."""
    monkeypatch.setattr(configs, "_gpu_name", lambda index: "ACME G-100 80GB")
    monkeypatch.setattr(lookup, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("DDPM_FAST_TUNE", raising=False)
    lookup.committed.cache_clear()
    configs._own.cache_clear()
    yield tmp_path
    lookup.committed.cache_clear()
    configs._own.cache_clear()


def test_the_rule_without_a_table(gpu: Path) -> None:
    assert configs.chosen("op", "key", LISTED, GPU) == 1
    assert configs.chosen("op", "key", LISTED, torch.device("cpu")) == 1


def test_a_table_names_the_configuration(gpu: Path) -> None:
    names = {"header": {}, "op": {"key": "other", "old": "gone"}}
    (gpu / "acme_g_100_80gb.json").write_text(json.dumps(names))
    assert configs.chosen("op", "key", LISTED, GPU) == 2
    assert configs.chosen("op", "old", LISTED, GPU) == 1  # no longer among them
    assert configs.chosen("op", "another", LISTED, GPU) == configs.chosen("another", "key", LISTED, GPU) == 1
    assert configs.chosen("op", "key", LISTED, torch.device("cpu")) == 1


def test_a_search_is_asked_for_and_kept(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    times = {1: 1.0, 2: 0.5, 3: float("inf")}

    def milliseconds(run: object) -> float:
        run()  # type: ignore[operator]
        return times[runs[-1]]

    monkeypatch.setattr(configs, "milliseconds", milliseconds)
    assert configs.chosen("op", "key", LISTED, GPU, runs.append) == 1 and not runs
    file = gpu / "deep" / "found.json"
    monkeypatch.setenv("DDPM_FAST_TUNE", str(file))
    assert configs.chosen("op", "key", LISTED, GPU, runs.append) == 2 and runs == [1, 2, 3]
    assert configs.chosen("op", "key", LISTED, GPU, runs.append) == 2 and len(runs) == 3
    assert json.loads(file.read_text()) == {"acme_g_100_80gb": {"op": {"key": "other"}}}
    configs._own.cache_clear()  # another process
    assert configs.chosen("op", "key", LISTED, GPU, runs.append) == 2 and len(runs) == 3
    found = {"acme_g_100_80gb": {"op": {"key": "other", "theirs": "third"}}, "another": {"op": {"key": "rule"}}}
    file.write_text(json.dumps(found))  # that process has found more since
    times[2] = 0.99  # no more than the rule's, but for chance
    assert configs.chosen("op", "close", LISTED, GPU, runs.append) == 1
    found["acme_g_100_80gb"]["op"]["close"] = "rule"
    assert json.loads(file.read_text()) == found
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert configs.chosen("op", "captured", LISTED, GPU, runs.append) == 1


def test_a_file_that_is_none_is_named(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_FAST_TUNE", str(gpu / "broken.json"))
    (gpu / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"DDPM_FAST_TUNE: .*broken.json is no file of configurations"):
        configs.chosen("op", "key", LISTED, GPU)


def unknown(table: Path) -> list[str]:
    """The names of a table that nothing has."""
    names = json.loads(table.read_text())
    names.pop("header", None)
    found = []
    for op, keys in names.items():
        for key, name in keys.items():
            listed: Mapping[str, object] = engine.WAYS if op == "engine" else noise.CUTS
            if op == "group_norm_silu":
                direction, *_, sizes = key.split()
                shape, groups = sizes.split("/")
                images, channels, pixels = map(int, shape.split("x"))
                listed = norm_cut.candidates(direction, images, pixels, channels, int(groups))
            found += [] if name in listed else [f"{op} {key}: {name}"]
    return found


def test_tables_name_what_there_is(tmp_path: Path) -> None:
    calls = list(gpu_tune.calls(dry=False))
    rows = [{"case": f"{call.op} {call.key}", "name": call.listed[-1], "note": gpu_tune.CHOSEN} for call in calls]
    gpu_tune.write_table(tmp_path / "a.json", torch.device("cpu"), rows)
    assert not unknown(tmp_path / "a.json") and len(json.loads((tmp_path / "a.json").read_text())) == 8
    rows[0]["name"] = rows[-1]["name"] = "1x1w1"
    gpu_tune.write_table(tmp_path / "b.json", torch.device("cpu"), rows)
    assert len(unknown(tmp_path / "b.json")) == 2
    for path in lookup.TABLES.glob("*.json"):
        assert lookup.slug(path.stem) == path.stem and not unknown(path)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("pixels", "channels", "groups"),
    [(1024, 128, 32), (1024, 384, 32), (256, 512, 32), (1, 512, 32), (49, 3, 1), (35, 72, 1), (64, 4096, 4)],
)
@pytest.mark.parametrize("images", [1, 256])
def test_cuts_hold_whole_groups_and_all_pixels(
    images: int, direction: str, pixels: int, channels: int, groups: int
) -> None:
    per_group = channels // groups
    for name, cut in norm_cut.candidates(direction, images, pixels, channels, groups).items():
        assert name == f"{cut.width}x{cut.pixels}w{cut.warps}"
        assert cut.slab % per_group == 0 and per_group <= cut.slab <= cut.width
        assert (cut.chunks - 1) * cut.pixels < pixels <= cut.chunks * cut.pixels
        assert cut.width & (cut.width - 1) == 0 and cut.pixels & (cut.pixels - 1) == 0
        assert cut.width * cut.pixels >= 32 * cut.warps  # Triton compiles no tile of fewer numbers than threads


def test_one_pass_where_an_image_fits_and_chunks_for_few_images() -> None:
    for images in (1, 256):
        assert norm_cut.rule("forward", images, 256, 256, 32) == norm_cut.Config(64, 64, 256, 1, 8)
        assert norm_cut.rule("backward", images, 256, 256, 32) == norm_cut.Config(32, 32, 256, 1, 8)
    assert norm_cut.rule("backward", 1, 256, 384, 32).slab == 24  # two groups of 12
    assert norm_cut.rule("forward", 256, 1024, 128, 32).chunks == 8
    assert norm_cut.rule("forward", 1, 1024, 128, 32).chunks == 32
