"""What the peers took elsewhere, against which a row is held: a peer set up badly here must not pass unseen.

As ratios to eager float32 in NCHW, since machines differ: 80 ms an image and step there.
"""

from collections.abc import Iterable, Sequence

from benchmarks.harness import Row

MACHINE = "2 Zen 4 cores without AMX"  # AVX-512 and bf16 dot products; PyTorch's figures there varied by a tenth
CASE, BATCH = "sample cifar10", 4
BASELINE = ("float32", "torch eager NCHW")
RATIOS = {
    ("float32", "torch eager channels_last"): 78 / 80,
    ("float32", "torch.compile"): 73 / 80,
    ("float32", "torch.compile freezing"): 77 / 80,
    ("float32", "onnxruntime"): 61 / 80,
    ("float32", "openvino"): 140 / 80,
    ("bf16", "torch eager channels_last"): 44 / 80,
    ("bf16", "torch.compile freezing"): 35 / 80,
    ("bf16", "openvino"): 80 / 80,
}
SLOWER = 1.2


def annotate(group: Sequence[Row], measured: Iterable[Row]) -> None:
    """Note on a row of ``group`` where it is more than a fifth slower than expected.

    ``measured`` has the run's rows, with the baseline among them; without it, or in another case, nothing is said.
    """
    baseline = next((row["ms"] for row in measured if _key(row) == BASELINE and _comparable(row)), None)
    for row in group:
        expected = RATIOS.get(_key(row))
        if baseline is None or expected is None or not _comparable(row):
            continue
        ratio = row["ms"] / baseline
        if ratio > SLOWER * expected:
            note = f"{ratio:.2f} of eager float32 NCHW, expected {expected:.2f} (from {MACHINE})"
            row["note"] = "; ".join(filter(None, (row.get("note"), note)))


def _key(row: Row) -> tuple[str, str]:
    return row["precision"], row["name"]


def _comparable(row: Row) -> bool:
    return row["case"] == CASE and row["batch"] == BATCH and "ms" in row
