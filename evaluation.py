"""How a synthetic set is judged: fresh networks are trained on it and tested on real data.

The training loop here also trains the experts: both are plain SGD with DiffAugment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import networks
from performance import Arithmetic
from utils import Views, generator, seeded

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
    """VGG11BN -> VGG11, ResNet18BN_AP -> ResNet18_AP: a synthetic set is too small for running statistics."""
    return model.replace("BN", "")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, its learning rate aside: SGD on mean cross-entropy."""

    epochs: int
    batch: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    views: Views = Views()
    drop_after: int | None = None  # epochs after which lr is divided by 10 and the momentum starts from zero
    how: Arithmetic = Arithmetic()


def lr_drop(epochs: int) -> int:
    """Where the published schedules for a run of `epochs` drop the lr: after 502 of 1000, 27 of 50."""
    return epochs // 2 + 2


def evaluation_recipe(
    epoch_eval_train: int = 1000, batch: int = 256, views: Views = Views(), how: Arithmetic = Arithmetic()
) -> Recipe:
    """The published protocol: epoch_eval_train + 1 epochs, momentum 0.9, weight decay 5e-4, lr drop half-way."""
    return Recipe(epoch_eval_train + 1, batch, 0.9, 5e-4, views, lr_drop(epoch_eval_train), how)


def mean_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def hits(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How many images are classified correctly."""
    return (net(x).argmax(1) == y).sum()


def train(
    net: nn.Module, images: Tensor, labels: Tensor, lr: float, recipe: Recipe, random: torch.Generator
) -> Iterator[Tensor]:
    """Trains in place, everything resident on the images' device; yields the mean loss after each epoch.

    images (N,C,H,W) in input space, or canvases; each epoch visits them once in random order, in batches of
    `recipe.batch` with a smaller last one, each seen through `recipe.views`. Nothing within an epoch waits for the
    device.
    """

    def sgd(lr):
        return torch.optim.SGD(net.parameters(), lr, recipe.momentum, weight_decay=recipe.weight_decay)

    net.to(memory_format=torch.channels_last)  # as convolutions want their weights
    loss_of = recipe.how.of(mean_loss, images.device)
    optimizer = sgd(lr)
    count = len(images)
    batches = -(-count // recipe.batch)
    for epoch in range(recipe.epochs):
        if epoch == recipe.drop_after:
            optimizer = sgd(lr / 10)  # a new optimizer has no momentum
        net.train()
        order = torch.randperm(count, generator=random).to(images.device, non_blocking=True)
        drawn = recipe.views.draw(batches, min(recipe.batch, count), random, images.device)
        total = torch.zeros((), device=images.device)
        with recipe.how.context():  # within an epoch: it must not stay in force where the generator yields
            for indices, view in zip(order.split(recipe.batch), drawn):
                x, y = images[indices], labels[indices]
                if view:
                    x = view(x)
                    y = y.repeat(len(x) // len(y))  # crops of a canvas: several views of each
                optimizer.zero_grad(set_to_none=True)
                loss = loss_of(net, x, y)
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(indices)
        yield total / count


@dataclass(frozen=True)
class TestSet:
    """Real data to test on, resident on a device."""

    images: Tensor  # (N,C,H,W) in input space
    labels: Tensor
    batch: int  # images at a time
    how: Arithmetic = Arithmetic()

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of the images classified correctly, in [0, 1]."""
        net.eval()
        hits_of = self.how.of(hits, self.images.device)
        correct = torch.zeros((), dtype=torch.long, device=self.images.device)
        with self.how.context():
            for x, y in zip(self.images.split(self.batch), self.labels.split(self.batch)):
                correct += hits_of(net, x, y)
        return correct.item() / len(self.labels)


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


def percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} ± {100 * accuracy.std:.1f}"


@dataclass(frozen=True)
class Judge:
    """Judges synthetic sets: `count` fresh networks of each name in `pool`, trained by `recipe`, tested once."""

    pool: list[str]
    recipe: Recipe
    testset: TestSet
    classes: int
    count: int
    seed: int

    @property
    def epochs(self) -> int:
        """Epochs of training that one call takes."""
        return len(self.pool) * self.count * self.recipe.epochs

    def __call__(
        self, images: Tensor, labels: Tensor, lr: float, *stream, on_epoch: Callable[[], None] = lambda: None
    ) -> dict[str, Accuracy]:
        """Network to accuracy for a set (M,C,H,W), (M,) used at learning rate `lr`. Every draw comes from the random
        stream (seed, *stream, network, k). `on_epoch` is called after every epoch of training."""
        return {
            model: Accuracy([
                self.train_and_test(model, images, labels, lr, (*stream, model, k), on_epoch) for k in range(self.count)
            ])
            for model in self.pool
        }  # fmt: skip

    def train_and_test(self, model, images, labels, lr, stream, on_epoch) -> float:
        _, channels, resolution, _ = self.testset.images.shape
        with seeded(self.seed, *stream, "parameters"):
            net = networks.build(model, channels, self.classes, resolution).to(images.device)
        for _ in train(net, images, labels, lr, self.recipe, generator(self.seed, *stream, "training")):
            on_epoch()
        return self.testset.accuracy(net)


@dataclass(frozen=True)
class Baseline:
    """Accuracy of random real images, per network, and the learning rate that it was reached with."""

    accuracy: Accuracy
    lr: float


def random_real_images(
    judge: Judge, sample: Callable, labels: Tensor, rates: list[float], draws: int, on_epoch: Callable[[], None]
) -> dict[str, Baseline]:
    """What as many random real images reach under the same protocol: the better of `rates` for each network, so that
    an undertrained baseline flatters nobody. `sample(random)` draws a set in input space."""
    whole = replace(judge, recipe=replace(judge.recipe, views=Views(judge.recipe.views.strategy)))  # no canvases
    sets = [sample(generator(judge.seed, "random real images", draw)).to(labels.device) for draw in range(draws)]
    best = {}
    for lr in rates:
        results = [whole(images, labels, lr, "random real images", i, on_epoch=on_epoch) for i, images in enumerate(sets)]
        for model in judge.pool:
            accuracy = Accuracy([acc for result in results for acc in result[model].accs])
            if model not in best or accuracy.mean > best[model].accuracy.mean:
                best[model] = Baseline(accuracy, lr)
    return best
