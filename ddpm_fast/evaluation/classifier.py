"""A small convolutional classifier, trained in seconds: a judge of samples and a source of features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
BATCH = 128


class Classifier(nn.Module):
    """Two convolutions and a hidden layer of 64 features, for small images [N, C, H, W] in [-1, 1]."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv_2 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 4 * 4, FEATURES)
        self.out = nn.Linear(FEATURES, num_classes)
        self.dropout = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the hidden layer [N, 64]."""
        h = F.relu(self.conv_2(F.relu(self.conv_1(x))))
        return F.relu(self.hidden(F.adaptive_avg_pool2d(h, 4).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.out(self.dropout(self.features(x)))


def train_classifier(x: Tensor, labels: Tensor, *, num_classes: int, epochs: int = 40, seed: int = 0) -> Classifier:
    """Trains on real images; the same arguments give the same classifier.

    Args:
        x: float [N, C, H, W] in [-1, 1].
        labels: int64 [N].

    Returns:
        The classifier, in eval mode.
    """
    steps = epochs * -(-len(x) // BATCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(x.shape[1], num_classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(BATCH):
                loss = F.cross_entropy(model(x[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
    return model.eval()


@torch.no_grad()
def judge(classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and logits [N, K] of images float [N, C, H, W] in [-1, 1]."""
    features = torch.cat([classifier.features(part) for part in x.split(1024)])
    return features, classifier.out(features)
