"""How a synthetic set is judged: fresh networks are trained on it and tested on real data.

The training loop here also trains the experts: both are plain SGD with DiffAugment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import networks
from utils import draw_augmentations, generator, seeded

POOLS = {  # --eval_mode -> networks, given the training network
    "S": lambda model: [without_bn_suffix(model)],
    "M": lambda model: ["ConvNet", "AlexNet", "VGG11", "ResNet18"],
    "W": lambda model: ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
    "D": lambda model: ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
    "A": lambda model: ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
    "P": lambda model: ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
    "N": lambda model: ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    "C": lambda model: list(dict.fromkeys([model, "ConvNet"])),
}


def without_bn_suffix(model: str) -> str:
    """VGG11BN -> VGG11, ResNet18BN_AP -> ResNet18_AP; ConvNetBN names its norm and stays."""
    return model if model.startswith("ConvNet") else model.replace("BN", "")


@dataclass(frozen=True)
class Protocol:
    """How one network is trained for a test of a synthetic set; the published settings."""

    epochs: int = 1001  # --epoch_eval_train + 1
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    strategy: tuple[str, ...] = ()  # DiffAugment
    test_batch: int = 256

    @property
    def lr_drop(self) -> int:
        """Epochs after which the lr is divided by 10 and the momentum starts from zero."""
        return lr_drop(self.epochs - 1)


def lr_drop(epochs: int) -> int:
    """The published schedule for a run of `epochs`: 502 of 1000 (and one), 27 of 50."""
    return epochs // 2 + 2


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    epochs: int,
    batch: int,
    momentum: float,
    weight_decay: float,
    strategy: tuple[str, ...],
    drop_after: int | None,
    random: torch.Generator,
) -> Iterator[Tensor]:
    """Trains in place with SGD, everything resident on the images' device; yields the mean loss after each epoch.

    images (N,C,H,W) in input space; each epoch visits them once in random order, in batches of `batch` with a smaller
    last one, each augmented by one operation of `strategy`. After `drop_after` epochs lr is divided by 10 and the
    momentum starts from zero. Nothing within an epoch waits for the device.
    """

    def sgd(lr):
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    optimizer = sgd(lr)
    count = len(images)
    batches = -(-count // batch)
    for epoch in range(epochs):
        if epoch == drop_after:
            optimizer = sgd(lr / 10)  # a new optimizer has no momentum
        net.train()
        order = torch.randperm(count, generator=random).to(images.device, non_blocking=True)
        augmentations = draw_augmentations(strategy, batches, min(batch, count), random, images.device)
        total = torch.zeros((), device=images.device)
        for indices, augment in zip(order.split(batch), augmentations):
            x = images[indices]
            loss = F.cross_entropy(net(augment(x) if augment else x), labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(indices)
        yield total / count


@torch.no_grad()
def test(net: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Share of the images (N,C,H,W) classified correctly, in [0, 1]."""
    net.eval()
    correct = torch.zeros((), dtype=torch.long, device=images.device)
    for x, y in zip(images.split(batch), labels.split(batch)):
        correct += (net(x).argmax(1) == y).sum()
    return correct.item() / len(labels)


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of several networks, in [0, 1]."""

    accs: list[float]

    @property
    def mean(self) -> float:
        return sum(self.accs) / len(self.accs)

    @property
    def std(self) -> float:
        """Of the population, as published."""
        return (sum((acc - self.mean) ** 2 for acc in self.accs) / len(self.accs)) ** 0.5


@dataclass(frozen=True)
class TestSet:
    """Real data to test on, resident on a device."""

    images: Tensor  # (N,C,H,W) in input space
    labels: Tensor
    classes: int


def evaluate_synthetic(
    model: str,
    images: Tensor,
    labels: Tensor,
    lr: float,
    testset: TestSet,
    protocol: Protocol,
    count: int,
    seed: int,
    stream: tuple,
    on_epoch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Trains `count` fresh networks called `model` on a synthetic set at learning rate `lr` and tests each once.

    The networks' initial parameters, batches and augmentation come from the random stream (seed, *stream, k).
    `on_epoch` is called after every epoch of training.
    """
    accs = []
    _, channels, resolution, _ = images.shape
    for k in range(count):
        with seeded(seed, *stream, k, "parameters"):
            net = networks.build(model, channels, testset.classes, resolution).to(images.device)
        training = train(
            net,
            images,
            labels,
            lr=lr,
            epochs=protocol.epochs,
            batch=protocol.batch,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            strategy=protocol.strategy,
            drop_after=protocol.lr_drop,
            random=generator(seed, *stream, k, "training"),
        )
        for _ in training:
            on_epoch()
        accs.append(test(net, testset.images, testset.labels, protocol.test_batch))
    return Accuracy(accs)
