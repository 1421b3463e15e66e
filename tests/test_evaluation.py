"""The evaluation protocol, the experts' schedule and the optimiser of the images are the published ones."""

import pytest
import torch
import torch.nn.functional as F

import distill_ATT
import evaluation
import networks
from evaluation import POOLS, Accuracy, Judge, Judged, Recipe, Trained, Trainer, evaluation_recipe, lr_drop
from performance import Compute
from reparam_module import Match, flatten
from utils import Views, generator, seeded

CPU = Compute()
SIZE = 3, 10, 8


def data(count=20, side=8, dtype=torch.float32):
    random = generator(0, "data")
    images = torch.randn(count, 3, side, side, generator=random, dtype=dtype)
    return images, torch.arange(count) % 10


@pytest.mark.parametrize("strategy", [(), ("flip", "crop")])
@pytest.mark.parametrize("drop_after", [None, 2])
def test_training_is_sgd_written_out_by_hand(strategy, drop_after):
    images, labels = data(dtype=torch.float64)
    lr, momentum, decay, batch = 0.05, 0.9, 5e-4, 8
    trainer, views = Trainer("ConvNetW32", SIZE, Recipe(4, batch, momentum, decay, drop_after), CPU), Views(strategy)
    theta = trainer.fresh(0, "net").double()
    *_, trained = epochs = list(trainer.train(theta, images, labels, lr, views, generator(0, "t")))
    assert len(epochs) == 4

    random = generator(0, "t")
    with seeded(0, "net"):
        by_hand = networks.build("ConvNetW32", *SIZE).double()
    velocity = [torch.zeros_like(p) for p in by_hand.parameters()]
    for epoch in range(4):
        if epoch == drop_after:
            lr /= 10
            velocity = [torch.zeros_like(v) for v in velocity]
        order = torch.randperm(20, generator=random)
        drawn = views.draw(3, batch, random, torch.device("cpu"))
        assert [len(chunk) for chunk in order.split(batch)] == [8, 8, 4]
        losses = []
        for chunk, view in zip(order.split(batch), drawn):
            x, y = view(images[chunk], labels[chunk])
            losses += [F.cross_entropy(by_hand(x), y)] * len(y)
            gradients = torch.autograd.grad(losses[-1], list(by_hand.parameters()))
            for p, v, g in zip(by_hand.parameters(), velocity, gradients):
                v.mul_(momentum).add_(g + decay * p.detach())
                p.data.sub_(lr * v)
        assert float(epochs[epoch].loss) == pytest.approx(sum(losses).item() / 20, rel=1e-10)
    torch.testing.assert_close(trainer.flat.unpack(trained.theta), flatten(by_hand), rtol=1e-10, atol=1e-12)


def test_the_lr_drops_where_it_was_published_to():
    published = evaluation_recipe()
    assert published.epochs == 1001 and published.drop_after == 502
    assert (published.batch, published.momentum, published.weight_decay) == (256, 0.9, 5e-4)
    assert lr_drop(50) == 27


def test_accuracy_counts_every_test_image_once():
    images, labels = data(count=23)
    trainer = Trainer("MLP", SIZE, Recipe(1, 8), CPU)
    with seeded(0, "net"):
        expected = (networks.build("MLP", *SIZE)(images).argmax(1) == labels).double().mean().item()
    fixed = Trained(trainer.fresh(0, "net"), torch.empty(0), torch.zeros(()))
    for batch in (1, 5, 23, 100):
        assert trainer.accuracy(fixed, evaluation.TestSet(images, labels, batch)) == pytest.approx(expected)


def test_mean_and_population_std():
    accuracy = Accuracy([0.5, 0.7, 0.9])
    assert accuracy.mean == pytest.approx(0.7)
    assert accuracy.std == pytest.approx((0.08 / 3) ** 0.5)
    assert str(Accuracy([0.91, 0.94])) == "92.5 ± 1.5"


def test_evaluation_trains_fresh_networks_that_depend_on_their_stream_alone():
    images, labels = data()
    trainer = Trainer("ConvNetW32", SIZE, Recipe(20, 256), CPU)
    judge = Judge([trainer], evaluation.TestSet(*data(count=200), 100), Views(("crop",)), count=3, seed=0)
    run = lambda *stream: judge([Judged(images, labels, 0.1, stream)])[0]["ConvNetW32"].accs  # noqa: E731
    first = run("a")
    torch.rand(5)  # the global generator has nothing to do with it
    assert run("a") == first
    assert len(set(first)) > 1 and run("b") != first


def test_networks_with_batch_statistics_can_be_evaluated():
    pool = [Trainer(model, (3, 10, 32), Recipe(2, 256), CPU) for model in ("ConvNetBN", "VGG11BN")]
    judge = Judge(pool, evaluation.TestSet(*data(count=20, side=32), 20), Views(), count=1, seed=0)
    (found,) = judge([Judged(*data(side=32), 0.01, ())])
    assert list(found) == ["ConvNetBN", "VGG11BN"] and all(0 <= accuracy.mean <= 1 for accuracy in found.values())


def test_pools():
    expected = {
        "S": ["ConvNetD3"], "C": ["ConvNetD3", "ConvNet"], "M": ["ConvNet", "AlexNet", "VGG11", "ResNet18"],
        "W": ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"],
        "D": ["ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"], "A": ["ConvNetAS", "ConvNetAR", "ConvNetAL"],
        "P": ["ConvNetNP", "ConvNetMP", "ConvNetAP"],
        "N": ["ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"],
    }  # fmt: skip
    assert {name: pool("ConvNetD3") for name, pool in POOLS.items()} == expected
    without = {"ConvNetBN": "ConvNet", "VGG11BN": "VGG11", "ResNet18BN_AP": "ResNet18_AP"}
    assert all(POOLS["S"](name) == [other] for name, other in without.items())
    assert all(model in networks.NETWORKS for pool in POOLS.values() for model in pool("ConvNet"))


# --- the update of images, synthetic lr and moving average


RATES = 10, 0.1, 0.9  # of the images, of the synthetic lr, and of the average


def initial():
    images = torch.zeros(2, 1, 4, 4)
    return distill_ATT.State(images, images.clone(), torch.zeros_like(images), syn_lr=1.0)


def gradient(value, lr=0.0, loss=1.0):
    return Match(loss, 1, torch.full((2, 1, 4, 4), value), lr)


def test_images_and_lr_follow_sgd_with_momentum_one_half():
    state = initial()
    parameters = [torch.zeros(2, 1, 4, 4, requires_grad=True), torch.tensor(1.0, requires_grad=True)]
    optimizers = [torch.optim.SGD([p], lr=lr, momentum=0.5) for p, lr in zip(parameters, (10, 0.1))]
    for value, lr in ((1.0, 2.0), (-0.5, 1.0), (0.25, -3.0)):
        state.update(gradient(value, lr), *RATES)
        for p, optimizer, g in zip(parameters, optimizers, (value, lr)):
            p.grad = torch.full_like(p, g)
            optimizer.step()
    torch.testing.assert_close(state.images, parameters[0].detach())
    assert state.syn_lr == pytest.approx(parameters[1].item())
    assert state.iteration == 3


def test_the_moving_average_starts_as_a_copy_without_bias_correction():
    state = initial()
    expected = state.images.clone()
    for value in (1.0, 2.0, -1.0):
        state.update(gradient(value), *RATES)
        expected = 0.9 * expected + 0.1 * state.images
        torch.testing.assert_close(state.ema, expected)


def test_an_update_that_would_take_the_lr_to_zero_leaves_it_and_is_counted():
    state = initial()
    state.update(gradient(1.0, lr=10.0), *RATES)
    assert (state.syn_lr, state.lr_momentum, state.lr_rejected) == (1.0, 0.0, 1)
    assert (state.images == -10).all()
    state.update(gradient(0.0, lr=1.0), *RATES)
    assert state.syn_lr == pytest.approx(0.9) and state.lr_rejected == 1


NAN, INF = float("nan"), float("inf")
ONE_PIXEL = torch.ones(2, 1, 4, 4).index_fill(3, torch.tensor([2]), NAN)


@pytest.mark.parametrize(
    "bad",
    [
        gradient(NAN), gradient(INF), gradient(1e38), Match(1.0, 1, ONE_PIXEL, 0.0),
        gradient(1.0, loss=NAN), gradient(1.0, loss=INF),
        gradient(1.0, NAN), gradient(1.0, INF), gradient(1.0, -INF), gradient(1.0, -1e300),
    ],
)  # fmt: skip
def test_a_non_finite_update_changes_nothing_but_the_counts(bad):
    state = initial()
    state.update(gradient(1.0, 1.0), *RATES)
    before = [state.images.clone(), state.ema.clone(), state.momentum.clone(), state.syn_lr, state.lr_momentum]
    state.update(bad, *RATES)
    after = [state.images, state.ema, state.momentum, state.syn_lr, state.lr_momentum]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after))
    assert (state.skipped, state.bad_steps, state.iteration) == (1, 1, 2)
    state.update(gradient(1.0), *RATES)
    assert (state.skipped, state.bad_steps) == (1, 0)
