"""Figures of merit for samples. Each is only as good as the features it is taken in: name them with the figure."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982).

    |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)). With the centred data in rows, A^T A = C_a, the
    last trace is the nuclear norm of A B^T: no matrix square root, so rank-deficient covariances are exact too.
    It falls with the size of the sets: compare only figures from sets of equal size.

    Args:
        a, b: features [N, D] and [M, D], N and M at least 2.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [N >= 2, D], the same D for both")
        if not x.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    cross = torch.linalg.matrix_norm(root_a @ root_b.T, ord="nuc")
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and a root R of the covariance, R^T R = C, of at most D rows; in float64."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, K] whose largest entry is at `labels` int64 [N].

    Raises:
        ValueError: the shapes don't fit, N is 0, or a value is not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(logits) == 0:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [N, K] and [N >= 1]")
    if not logits.isfinite().all():
        raise ValueError("logits has values that are not finite")
    return float((logits.argmax(1) == labels).double().mean())


def nearest_distances(x: Tensor, train: Tensor, *, chunk: int = 256) -> Tensor:
    """Distance of each image to the training image nearest to it: about 0 for a copy.

    Args:
        x: float [N, C, H, W].
        train: float [M, C, H, W] in the same units.

    Returns:
        float64 [N], root mean square difference per value.

    Raises:
        ValueError: one of them is empty, or their image shapes differ.
    """
    if x.shape[1:] != train.shape[1:] or len(x) == 0 or len(train) == 0:
        raise ValueError(f"x {tuple(x.shape)} and train {tuple(train.shape)}: expected images of the same shape")
    rows, others = x.double().flatten(1), train.double().flatten(1)
    # Exact differences: the shortcut through x^2 - 2xy + y^2 loses the small distances that matter here.
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(part, others, compute_mode=exact).amin(1) for part in rows.split(chunk)]
    return torch.cat(nearest) / rows.shape[1] ** 0.5
