"""Training networks, and judging a synthetic set by it: fresh networks are trained on the set and tested on real data.

Experts are trained here too: both are plain SGD with DiffAugment, step by step through `Step`.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import networks
from distributed import ALONE, Group
from performance import Compute, return_free_pages
from reparam_module import FlatModule, Step, flatten
from storage import content_hash, read_cache, write_cache
from utils import Dataset, Views, generator, seeded

POOLS = {  # --eval_mode -> networks, given the training network
    # VGG11BN -> VGG11, ResNet18BN_AP -> ResNet18_AP: a synthetic set is too small for running statistics
    "S": lambda model: [model.replace("BN", "")],
    "M": lambda model: ["ConvNet", "AlexNet", "VGG11", "ResNet18"],
    "W": lambda model: ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
    "D": lambda model: ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"],
    "A": lambda model: ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
    "P": lambda model: ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
    "N": lambda model: ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    "C": lambda model: list(dict.fromkeys([model, "ConvNet"])),
}
EVAL_MODES = """S: --model; M: ConvNet, AlexNet, VGG11, ResNet18; ConvNets of several widths (W), depths (D), activations
    (A), poolings (P), normalisations (N); C: --model and ConvNet"""


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, its learning rate aside: SGD on mean cross-entropy."""

    epochs: int
    batch: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    drop_after: int | None = None  # epochs after which lr is divided by 10 and the momentum starts from zero


def lr_drop(epochs: int) -> int:
    """Where the published schedules for a run of `epochs` drop the lr: after 502 of 1000, 27 of 50."""
    return epochs // 2 + 2


def evaluation_recipe(epoch_eval_train: int = 1000, batch: int = 256) -> Recipe:
    """The published protocol: epoch_eval_train + 1 epochs, momentum 0.9, weight decay 5e-4, lr drop half-way."""
    return Recipe(epoch_eval_train + 1, batch, 0.9, 5e-4, lr_drop(epoch_eval_train))


@dataclass(frozen=True)
class Trained:
    """A network as it is after an epoch. On CUDA, the next epoch overwrites it: copy what is to last."""

    theta: Tensor  # (P,) as FlatModule packs it
    statistics: Tensor  # (S,) of batch norms
    loss: Tensor  # mean over the epoch, 0-dim


class Trainer:
    """Trains and tests networks of one architecture on data of one size, (channels, classes, resolution). However many
    there are, each program is made once: a fresh network is a copy into theta."""

    def __init__(
        self, model: str, size: tuple[int, int, int], recipe: Recipe, compute: Compute, micro_batch: int | None = None
    ):
        self.model, self.size, self.recipe, self.device = model, size, recipe, compute.device
        with torch.device("meta"):
            self.flat = FlatModule(networks.build(model, *size))
        self.step = Step(self.flat, compute, recipe.momentum, recipe.weight_decay, micro_batch)
        self._hits = compute(self._count_hits)

    def fresh(self, seed: int, *stream) -> Tensor:
        """Initial parameters theta from a random stream, drawn on the CPU."""
        with seeded(seed, *stream):
            return self.flat.pack(flatten(networks.build(self.model, *self.size))).to(self.device)

    def train(
        self, theta: Tensor, images: Tensor, labels: Tensor, lr: float, views: Views, random: torch.Generator
    ) -> Iterator[Trained]:
        """Trains from theta, everything resident on the device; yields the network after each epoch.

        images (N,C,H,W) in input space, or canvases; labels (N,), or soft ones (N, classes). Each epoch visits them once
        in random order, in batches of `recipe.batch` with a smaller last one, each seen through `views`. Nothing within
        an epoch waits for the device.
        """
        recipe, count = self.recipe, len(images)
        batches = -(-count // recipe.batch)
        rate = torch.tensor(lr, dtype=theta.dtype, device=self.device)
        momentum, statistics = torch.zeros_like(theta), self.flat.initial_statistics(theta)
        for epoch in range(recipe.epochs):
            if epoch == recipe.drop_after:
                rate, momentum = rate / 10, torch.zeros_like(theta)
            order = torch.randperm(count, generator=random).to(self.device, non_blocking=True)
            drawn = views.draw(batches, min(recipe.batch, count), random, self.device)
            total = torch.zeros_like(rate)
            for indices, view in zip(order.split(recipe.batch), drawn):
                x, y = view(images[indices], labels[indices])
                theta, momentum, statistics, loss = self.step(theta, momentum, statistics, x, y, rate)
                total += loss * len(indices)
            yield Trained(theta, statistics, total / count)

    def _count_hits(self, theta, statistics, x, y):
        return ((self.flat.test(theta, statistics, x).argmax(1) == y).sum(),)

    @torch.no_grad()
    def accuracy(self, trained: Trained, testset: "TestSet") -> float:
        """Share of the test images classified correctly, in [0, 1]."""
        return_free_pages()  # training and testing leave each other holes in the CPU's heap, which would add up
        correct = torch.zeros((), dtype=torch.long, device=self.device)
        for x, y in zip(testset.images.split(testset.batch), testset.labels.split(testset.batch)):
            correct += self._hits(trained.theta, trained.statistics, x, y)[0]
        return_free_pages()
        return correct.item() / len(testset.labels)


@dataclass(frozen=True)
class TestSet:
    """Real data to test on, resident on a device."""

    images: Tensor  # (N,C,H,W) in input space
    labels: Tensor
    batch: int  # images at a time


# --- Judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of several networks, in [0, 1]."""

    accs: list[float]
    train_accs: list[float] | None = None  # on the real training images that --select_on train selects by

    @classmethod
    def of(cls, found: dict) -> "Accuracy":
        """From what `as_dict` gave, or from what results.json says of random real images."""
        if "tried" in found:
            return Baseline(dict(found["tried"])).accuracy
        return cls(found["accs"], found.get("train_accs"))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accs)

    @property
    def std(self) -> float:
        """Of the population, as published."""
        return statistics.pstdev(self.accs)

    @property
    def score(self) -> float:
        """By which the best is selected: on training images where there are such, else, as published, on test images."""
        return self.mean if self.train_accs is None else Accuracy(self.train_accs).mean

    def as_dict(self) -> dict:
        said = {"mean": self.mean, "std": self.std, "accs": self.accs}
        return said if self.train_accs is None else said | {"train_mean": self.score, "train_accs": self.train_accs}

    def __str__(self):
        """In percent; one network has no spread."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if len(self.accs) > 1 else "")


@dataclass(frozen=True)
class Judged:
    """A synthetic set as it is judged."""

    images: Tensor  # (M,C,H,W)
    labels: Tensor  # (M,), or soft ones (M, classes)
    lr: float
    stream: tuple  # every draw comes from the random stream (seed, *stream, network, k)


@dataclass(frozen=True)
class Judge:
    """Judges synthetic sets: `count` fresh networks of each trainer, trained on the set and tested once. The processes of
    `group` divide the networks among them, and have the same result."""

    pool: list[Trainer]
    testset: TestSet
    views: Views
    count: int
    seed: int
    selection: TestSet | None = None  # training images to test on too
    group: Group = ALONE

    @property
    def models(self) -> list[str]:
        return [trainer.model for trainer in self.pool]

    @property
    def epochs(self) -> int:
        """Epochs of training that one set takes."""
        return sum(self.count * trainer.recipe.epochs for trainer in self.pool)

    def __call__(
        self, judged: list[Judged], on_epoch: Callable[[str], None] = lambda model: None
    ) -> list[dict[str, Accuracy]]:
        """For each set, network to accuracy. `on_epoch` is called with a network's name after every epoch of it here."""
        todo = [(i, trainer, k) for i in range(len(judged)) for trainer in self.pool for k in range(self.count)]
        tested = [self.testset, self.selection] if self.selection else [self.testset]
        accs = {}  # of each network on all that it is tested on
        for i, trainer, k in self.group.each(todo):
            one = judged[i]
            own = self.seed, *one.stream, trainer.model, k
            theta, random = trainer.fresh(*own, "parameters"), generator(*own, "training")
            for trained in trainer.train(theta, one.images, one.labels, one.lr, self.views, random):
                on_epoch(trainer.model)
            accs[i, trainer.model, k] = [trainer.accuracy(trained, data) for data in tested]
        for theirs in self.group.gather(accs):
            accs |= theirs

        def accuracy(i: int, model: str) -> Accuracy:
            of_networks = [accs[i, model, k] for k in range(self.count)]
            return Accuracy(*map(list, zip(*of_networks)))  # a list for each test set

        return [{model: accuracy(i, model) for model in self.models} for i in range(len(judged))]


@dataclass(frozen=True)
class Baseline:
    """Accuracies of random real images with one network: learning rate -> for each draw of images, those of its networks."""

    tried: dict[float, list[list[float]]]

    @property
    def lr(self) -> float:
        """The best one, so that a badly tuned baseline does not flatter the distilled set."""
        return max(self.tried, key=lambda lr: self.at(lr).mean)

    @property
    def accuracy(self) -> Accuracy:
        return self.at(self.lr)

    def at(self, lr: float) -> Accuracy:
        return Accuracy([acc for draw in self.tried[lr] for acc in draw])


def random_real_images(
    judge: Judge, dataset: Dataset, ipc: int, rates: list[float], draws: int, on_epoch: Callable[[str], None]
) -> dict[str, Baseline]:
    """What `ipc` random real images of each class reach under the same protocol, network to Baseline, at each learning rate
    of `rates`, in as many draws."""
    whole = replace(judge, views=replace(judge.views, canvas=None), selection=None)
    labels = torch.arange(len(dataset.classes), device=judge.testset.labels.device).repeat_interleave(ipc)
    drawn = (dataset.sample(ipc, generator(judge.seed, "random real images", draw)) for draw in range(draws))
    chosen = [images.to(labels.device) for images in drawn]
    tried = [(lr, draw) for lr in rates for draw in range(draws)]
    results = whole([Judged(chosen[draw], labels, lr, ("random real images", draw)) for lr, draw in tried], on_epoch)
    found = {model: {lr: [] for lr in rates} for model in judge.models}
    for (lr, _), accuracies in zip(tried, results):
        for model, accuracy in accuracies.items():
            found[model][lr].append(accuracy.accs)
    return {model: Baseline(tried) for model, tried in found.items()}


def full_data(judge: Judge, dataset: Dataset, lr: float, count: int, cache: Path, on_epoch: Callable) -> dict[str, Accuracy]:
    """What the whole training set reaches under the same recipe at learning rate `lr`, network to accuracy; without the
    networks of which none was ever trained. The folder `cache` keeps every accuracy, and has `count` of each afterwards:
    network k is the same for every run."""
    test, found, train = content_hash(dataset.test.labels, dataset.test.pixels), {}, None
    for trainer in judge.pool:
        recipe = asdict(trainer.recipe) | {"lr": lr, "augmentation": list(judge.views.strategy)}
        recipe |= {"network": trainer.model, "precision": trainer.step.compute.precision}
        made = dataset.identity | {"test": test} | recipe
        path = cache / f"full_data-{content_hash(json.dumps(made).encode())}.pt"
        accs = (judge.group.from_main(read_cache, path, "full-data") or {"accs": []})["accs"]
        one = replace(judge, pool=[trainer], views=Views(judge.views.strategy), count=1, seed=0, selection=None)
        while len(accs) < count:
            train = train or dataset.on(trainer.device, dataset.train)
            more = range(len(accs), min(count, len(accs) + judge.group.count))  # one for each process
            trained = one([Judged(*train, lr, ("full data", k)) for k in more], on_epoch)
            accs = accs + [acc for each in trained for acc in each[trainer.model].accs]
            if judge.group.is_main:  # each may have taken hours
                write_cache(path, "full-data", {"accs": accs, "made": made})
        if accs:
            found[trainer.model] = Accuracy(accs)
    return found


def merits(own: Accuracy, hard: Accuracy, real: Accuracy | None, full: Accuracy | None) -> dict[str, float | None]:
    """Figures of merit of a set with one network, defined as by DD-Ranking (arXiv 2505.13300), on accuracies in [0, 1]:

        hard-label recovery       HLR = full - hard                  low is good
        improvement over random   IOR = own - real                   high is good
        label-robust score        LRS = (e^a - 1/e) / (e - 1/e),     a = (IOR - HLR) / 2; in [0, 1], high is good

    own, hard: of the set, with its own and with hard labels; real: of random real images; full: of the whole training
    set. None where the accuracy that it needs is None.
    """
    recovery, improvement = full and full.mean - hard.mean, real and own.mean - real.mean
    score = None
    if full and real:
        score = (math.exp((improvement - recovery) / 2) - math.exp(-1)) / (math.e - math.exp(-1))
    return {"hard_label_recovery": recovery, "improvement_over_random": improvement, "label_robust_score": score}
