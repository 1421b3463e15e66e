"""A step is SGD's, the adjoint gradient equals autograd through the unrolled graph, and ATT's choice of step is the
paper's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import networks
from performance import Compute
from reparam_module import DISTANCES, FlatModule, Minibatch, Step, draw_indices, flatten, match_trajectory, nearest_step
from utils import Canvas, Request, Views, generator, load_dataset, parse_strategy, seeded

ALL = "color_crop_cutout_flip_scale_rotate"


def relative(a, b):
    return float((a - b).norm() / b.norm())


def student_of(net, compute=Compute(precision="fp32"), micro_batch=None) -> Step:
    return Step(FlatModule(net, student=True), compute, micro_batch=micro_batch)


NONE = torch.empty(0, dtype=torch.float64)  # statistics, of which a student has none


def in_type(view, dtype):
    """A view whose augmentation is computed in another type."""
    drawn = view.augmentation
    return replace(view, augmentation=drawn and replace(drawn, u=drawn.u.to(dtype)))


def unrolled(net, start, target, images, labels, lr, minibatches, match, select_dist):
    """The obviously right version: one graph through all steps, and autograd."""
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()))
    images, lr = images.clone().requires_grad_(), torch.tensor(lr, dtype=start.dtype, device=start.device)
    lr.requires_grad_()
    theta = start.clone().requires_grad_()
    path = []
    for m in minibatches:
        x, y = m.view(images[m.indices], labels[m.indices])
        pieces = theta.split([s.numel() for s in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, pieces, shapes)}
        (g,) = torch.autograd.grad(F.cross_entropy(functional_call(net, params, (x,)), y), theta, create_graph=True)
        theta = torch.addcmul(theta, g, lr, value=-1)
        path.append(theta)
    distances = torch.stack([DISTANCES[select_dist](t.detach(), target) for t in path])
    n = max(i for i, d in enumerate(distances) if d == distances.min()) + 1 if match == "att" else len(path)
    loss = (path[n - 1] - target).square().sum() / (start - target).square().sum()
    grad_images, grad_lr = torch.autograd.grad(loss, (images, lr))
    return loss.item(), n, grad_images, grad_lr.item()


def problem(dtype, device, model="ConvNetW32", steps=10, batch=10, strategy=ALL, channels=3, side=16, target_step=None):
    """A student's start, and as target where its training on other images leads; with `target_step`, its own place
    after that step, moved a little in that direction."""
    with seeded(0, "test"):
        net = networks.build(model, channels, 10, side).to(device, dtype)
    for part in net.modules():
        if isinstance(part, networks.ImageConv2d):
            part.of_patches = True  # rounded as the student rounds: what is a tie or a zero is one for both
    random = generator(0, "problem")
    digits = load_dataset(Request("Digits", Path("."), resolution=side)).sample(1, random)
    images = digits.expand(-1, channels, -1, -1).clone().to(device, dtype)
    labels = torch.arange(10, device=device)
    indices = draw_indices(10, batch, steps, random)
    views = Views(parse_strategy(strategy)).draw(steps, batch, random, device)
    minibatches = [Minibatch(i.to(device), in_type(view, dtype)) for i, view in zip(indices, views)]
    start = flatten(net)
    student, lr = student_of(net, Compute(torch.device(device), precision="fp32")), 0.01
    gradient = lambda theta, x, y: student.gradient(theta, NONE.to(theta), x, y)[0]  # noqa: E731
    own = other = student.flat.pack(start)
    for t, m in enumerate(minibatches):
        x, y = images[m.indices], labels[m.indices]
        other = other - lr * gradient(other, torch.randn(x.shape, generator=random).to(x), y)
        if t < (target_step or 0):
            own = own - lr * gradient(own, *m.view(x, y))
    target = own + 0.2 * (other - student.flat.pack(start)) if target_step else other
    target = student.flat.unpack(target)
    return net, student, (start, target, images, labels, lr, minibatches)


# --- one step


@pytest.mark.parametrize(
    "norm, micro_batch", [(norm, size) for norm in networks.NORMS for size in (None, 3) if (norm, size) != ("batch", 3)]
)
def test_a_step_is_that_of_torchs_sgd(norm, micro_batch, device):
    with seeded(0, "net"):
        net = networks.ConvNet(3, 10, 8, width=16, depth=2, norm=norm).to(device, torch.float64)
    flat = FlatModule(net)
    step = Step(flat, Compute(device, precision="fp32"), 0.9, 5e-4, micro_batch)
    theta = flat.pack(flatten(net))
    momentum, statistics = torch.zeros_like(theta), flat.initial_statistics(theta)
    sgd, random = torch.optim.SGD(net.parameters(), lr=1, momentum=0.9, weight_decay=5e-4), generator(0, "steps")
    for i in range(20):
        count = (6, 4, 7)[i % 3]
        x = torch.randn(count, 3, 8, 8, generator=random, dtype=torch.float64).to(device)
        y = torch.randint(10, (count,), generator=random).to(device)
        lr = torch.tensor(0.02 / (1 + i), dtype=torch.float64, device=device)
        theta, momentum, statistics, loss = step(theta, momentum, statistics, x, y, lr)
        sgd.param_groups[0]["lr"] = lr.item()
        sgd.zero_grad()
        expected = F.cross_entropy(net(x), y)
        expected.backward()
        sgd.step()
        assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
        assert relative(flat.unpack(theta), flatten(net)) < 1e-12
    buffers = [buffer for name, buffer in net.named_buffers() if "running" in name]
    assert len(statistics) == sum(map(torch.numel, buffers)) and bool(buffers) == (norm == "batch")
    assert not buffers or relative(statistics, torch.cat(buffers)) < 1e-12


# --- the gradient of a match

CASES = [  # match, select_dist, batch, strategy, target_step
    ("mtt", "l1", 10, ALL, None),
    ("att", "l1", 10, ALL, 6),
    ("att", "l2", 4, ALL, 7),
    ("mtt", "l1", 4, "none", None),
    ("att", "l1", 3, "crop_cutout_scale", 5),
]


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("match, select_dist, batch, strategy, target_step", CASES)
def test_adjoint_equals_autograd_through_the_unrolled_graph(
    dtype, bound, match, select_dist, batch, strategy, target_step, device
):
    net, student, args = problem(dtype, device, batch=batch, strategy=strategy, target_step=target_step)
    ours = match_trajectory(student, *args, match, select_dist)
    loss, step, grad_images, grad_lr = unrolled(net, *args, match, select_dist)
    assert ours.step == step == (target_step or 10)
    assert ours.grand_loss == pytest.approx(loss, rel=bound)
    assert relative(ours.grad_images, grad_images) < bound
    assert ours.grad_lr == pytest.approx(grad_lr, rel=bound)


def test_images_that_no_step_up_to_the_matched_one_saw_have_no_gradient():
    _, student, args = problem(torch.float64, "cpu", batch=3, target_step=1)
    result = match_trajectory(student, *args)
    assert result.step == 1
    seen = result.grad_images.flatten(1).norm(dim=1) > 0
    assert sorted(torch.where(seen)[0].tolist()) == sorted(args[-1][0].indices.tolist())


@pytest.mark.parametrize("model", ["ConvNetBN", "ConvNetGN", "ConvNetLN", "ConvNetMP", "ConvNetAS", "MLP", "AlexNet"])
def test_other_networks_have_the_exact_gradient_too(model):
    net, student, args = problem(torch.float64, "cpu", model=model, steps=2, side=8)
    ours = match_trajectory(student, *args, "mtt")
    loss, _, grad_images, grad_lr = unrolled(net.train(), *args, "mtt", "l1")
    assert ours.grand_loss == pytest.approx(loss, rel=1e-9)
    assert relative(ours.grad_images, grad_images) < 1e-9
    assert ours.grad_lr == pytest.approx(grad_lr, rel=1e-9)


def test_mirrored_images_match_an_expert_as_it_matches_the_images_in_the_mirror():
    net, student, (start, target, images, labels, lr, minibatches) = problem(torch.float64, "cpu", strategy="none")

    def mirrored(theta):
        """The same network for images in the mirror."""
        shapes = [p.shape for p in net.parameters()]
        parts = theta.split([shape.numel() for shape in shapes])
        kernels = [part.view(shape) for part, shape in zip(parts, shapes)]
        kernels[-2] = kernels[-2].view(10, -1, 2, 2)  # the linear layer sees 2x2 pixels
        return torch.cat([(kernel.flip(-1) if kernel.ndim == 4 else kernel).flatten() for kernel in kernels])

    views = [replace(m, view=replace(m.view, mirrored=True)) for m in minibatches]
    ours = match_trajectory(student, start, target, images, labels, lr, views, "mtt")
    theirs = match_trajectory(student, mirrored(start), mirrored(target), images, labels, lr, minibatches, "mtt")
    plain = match_trajectory(student, start, target, images, labels, lr, minibatches, "mtt")
    assert ours.grand_loss == pytest.approx(theirs.grand_loss, rel=1e-9) != plain.grand_loss
    assert relative(ours.grad_images, theirs.grad_images) < 1e-9 and ours.grad_lr == pytest.approx(theirs.grad_lr)


def test_finite_difference_of_the_lr_agrees_where_the_network_is_smooth():
    """Autograd aside: the gradient is that of the loss as a number. Sigmoids, because ReLU kinks spoil differences."""
    _, student, (start, target, images, labels, lr, minibatches) = problem(
        torch.float64, "cpu", model="ConvNetAS", steps=3, side=8
    )

    def loss(lr):
        return match_trajectory(student, start, target, images, labels, lr, minibatches, "mtt").grand_loss

    ours = match_trajectory(student, start, target, images, labels, lr, minibatches, "mtt").grad_lr
    assert ours == pytest.approx((loss(lr + 1e-5) - loss(lr - 1e-5)) / 2e-5, rel=1e-6)


def test_the_nearest_step_is_the_later_of_equals():
    assert nearest_step(torch.tensor([3.0, 1.0, 2.0])) == 2
    assert nearest_step(torch.tensor([1.0, 2.0, 1.0, 5.0])) == 3
    assert nearest_step(torch.tensor([4.0, 4.0])) == 2
    assert nearest_step(torch.tensor([3.0, 1.0, 2.0, float("nan"), float("nan")])) == 2


def test_l1_and_l2_choose_as_their_names_say():
    target = torch.zeros(4)
    spread, peaked = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert DISTANCES["l1"](peaked, target) < DISTANCES["l1"](spread, target)
    assert DISTANCES["l2"](spread, target) < DISTANCES["l2"](peaked, target)


def test_a_permutation_is_used_up_from_its_end_with_the_smaller_chunk_first():
    drawn = draw_indices(10, 4, 6, generator(0, "t"))
    assert [len(d) for d in drawn] == [2, 4, 4, 2, 4, 4]
    for pass_ in (drawn[:3], drawn[3:]):
        assert sorted(torch.cat(pass_).tolist()) == list(range(10))
    whole = torch.randperm(10, generator=generator(0, "t"))
    assert torch.equal(torch.cat(drawn[:3][::-1]), whole)


def test_flat_parameters_are_a_copy_in_the_modules_order():
    net = networks.build("ConvNet", 3, 10, 32)
    theta = flatten(net)
    x = torch.randn(2, 3, 32, 32)
    flat = FlatModule(net)
    torch.testing.assert_close(flat.test(flat.pack(theta), torch.empty(0), x), net(x))
    assert torch.equal(flat.unpack(flat.pack(theta)), theta) and not torch.equal(flat.pack(theta), theta)
    before = theta.clone()
    for p in net.parameters():
        p.data.zero_()
    assert torch.equal(theta, before)


@pytest.mark.parametrize("size", [1, 3, 4, 10, 100])
def test_micro_batches_do_not_change_the_result(size):
    net, student, args = problem(torch.float64, "cpu", batch=7, steps=4)
    whole = match_trajectory(student, *args, "mtt")
    pieces = match_trajectory(student_of(net, micro_batch=size), *args, "mtt")
    assert pieces.grand_loss == pytest.approx(whole.grand_loss, rel=1e-9)
    assert relative(pieces.grad_images, whole.grad_images) < 1e-9
    assert pieces.grad_lr == pytest.approx(whole.grad_lr, rel=1e-9)


@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("samples", [1, 3])
def test_textures_have_the_exact_gradient_of_the_whole_canvas(samples, strategy):
    net, student, (start, target, _, labels, lr, _) = problem(torch.float64, "cpu", steps=4)
    random = generator(0, "canvas")
    canvases = torch.randn(10, 3, 32, 32, generator=random, dtype=torch.float64)
    views = Views(parse_strategy(strategy), Canvas(side=16, size=2, samples=samples)).draw(4, 6, random, "cpu")
    views = [in_type(view, torch.float64) for view in views]
    minibatches = [Minibatch(i, view) for i, view in zip(draw_indices(10, 6, 4, random), views)]
    args = start, target, canvases, labels, lr, minibatches
    ours = match_trajectory(student, *args, "mtt")
    loss, _, grad_images, grad_lr = unrolled(net, *args, "mtt", "l1")
    assert ours.grand_loss == pytest.approx(loss, rel=1e-9)
    assert relative(ours.grad_images, grad_images) < 1e-9 and ours.grad_images.shape == canvases.shape
    assert ours.grad_lr == pytest.approx(grad_lr, rel=1e-9)
