"""The metrics against closed forms and textbook formulas; the classifier on digits it never saw."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ddpm_fast.evaluation.classifier import judge, train_classifier
from ddpm_fast.evaluation.metrics import agreement, frechet_distance, nearest_distances
from ddpm_fast.training.data import digits, to_float


def textbook_frechet(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real))


def random_features(count: int, dims: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return torch.randn(count, dims, generator=generator, dtype=torch.float64) @ mix + seed


def test_frechet_distance_is_the_textbook_one() -> None:
    a, b = random_features(300, 16, 0), random_features(200, 16, 1)
    assert frechet_distance(a, b) == pytest.approx(textbook_frechet(a.numpy(), b.numpy()), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_of_a_shift_and_a_scale() -> None:
    a = random_features(50, 8, 0)
    assert frechet_distance(a, a + 3) == pytest.approx(8 * 9, rel=1e-12)
    centred = a - a.mean(0)
    variance = float(centred.square().sum() / 49)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-10)


def test_frechet_distance_with_fewer_images_than_features() -> None:
    a = random_features(10, 64, 0)
    assert frechet_distance(a, a) < 1e-10 * float(a.square().sum())
    assert frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-9)
    # Where one side is a single point, only its distance and the other side's spread are left.
    point = torch.zeros(5, 64)
    expected = float(a.mean(0).square().sum() + a.var(0).sum())
    assert frechet_distance(a, point) == pytest.approx(expected, rel=1e-12)


def test_bad_features_are_refused() -> None:
    good = torch.zeros(3, 4)
    for bad in (torch.zeros(1, 4), torch.zeros(3, 5), torch.zeros(3), torch.full((3, 4), torch.nan)):
        with pytest.raises(ValueError, match="b has"):
            frechet_distance(good, bad)


def test_agreement_counts() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert agreement(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="expected"):
        agreement(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected"):
        agreement(logits[:0], torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="logits has values that are not finite"):
        agreement(logits * torch.nan, torch.tensor([0, 1, 1]))


def test_nearest_distances() -> None:
    train = torch.randn(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.cat([train[7:8], train[3:4] + 1e-4, train[:5] * 0.5])
    brute = (x[:, None].double() - train[None].double()).square().flatten(2).mean(2).sqrt().amin(1)
    found = nearest_distances(x, train, chunk=3)
    assert torch.allclose(found, brute, rtol=1e-12, atol=0) and found[0] == 0
    assert float(found[1]) == pytest.approx(1e-4, rel=1e-2)
    with pytest.raises(ValueError, match="images of the same shape"):
        nearest_distances(x, torch.zeros(2, 1, 4, 4))


def test_classifier_generalises_and_repeats() -> None:
    train, held_out = digits("train"), digits("held_out")
    x, state = to_float(train.pixels), torch.get_rng_state()
    classifier = train_classifier(x, train.labels, num_classes=10, epochs=15)
    assert torch.equal(torch.get_rng_state(), state)
    features, logits = judge(classifier, to_float(held_out.pixels))
    assert agreement(logits, held_out.labels) > 0.95
    again = train_classifier(x, train.labels, num_classes=10, epochs=15)
    assert torch.equal(judge(again, to_float(held_out.pixels))[0], features)
    # Noise instead of digits is seen as far away in its features.
    noise, _ = judge(classifier, torch.randn(599, 1, 8, 8))
    real, _ = judge(classifier, x[:599])
    assert frechet_distance(noise, features) > 10 * frechet_distance(real, features)
