"""What is fast computes the same, and what is decided automatically is decided from the settings alone."""

import pytest
import torch
import torch.nn as nn
from torch.func import grad, jvp

import distill_ATT
import evaluation
import networks
import performance
from evaluation import Recipe
from performance import Arithmetic, Compiled, compile_mode, forward_flops
from reparam_module import Student, match_trajectory
from test_reparam import problem, relative
from utils import Views, generator, seeded

CPU = torch.device("cpu")


# The sigmoid is smooth. Two correct programs that round differently can be far apart after several steps with ReLU: where
# a value is zero but for rounding, they take different sides of its kink.
def test_the_compiled_step_is_the_eager_one_and_its_path_that_of_float64():
    net, slow, (start, target, images, labels, lr, minibatches) = problem(torch.float32, "cpu", "ConvNetAS")
    fast = Student(net, compile=True)
    theta, v = slow.flat.pack(start), slow.flat.pack(target - start)
    assert relative(fast.gradient(theta, images, labels), slow.gradient(theta, images, labels)) < 1e-5
    for a, b in zip(fast.second_order(theta, images, labels, v), slow.second_order(theta, images, labels, v)):
        assert relative(a, b) < 1e-5
    exact = Student(net.double())
    found = match_trajectory(fast, start, target, images, labels, lr, minibatches, "mtt")
    wanted = match_trajectory(exact, start.double(), target.double(), images.double(), labels, lr, minibatches, "mtt")
    assert relative(found.grad_images.double(), wanted.grad_images) < 1e-4
    assert found.grad_lr == pytest.approx(wanted.grad_lr, rel=1e-4)
    assert fast._gradient.compiled is not None and fast._second_order.compiled is not None


@pytest.mark.parametrize("kernel, padding, bias", [(3, 1, True), (3, 3, True), (5, 0, True), (3, 1, False)])
def test_a_convolution_of_patches_is_the_convolution(kernel, padding, bias):
    conv = networks.ImageConv2d(3, 6, kernel, padding=padding, bias=bias).double()
    patches = networks.ImageConv2d(3, 6, kernel, padding=padding, bias=bias).double()
    patches.load_state_dict(conv.state_dict())
    patches.of_patches = True
    x, t = torch.randn(2, 4, 3, 9, 8, dtype=torch.float64, generator=generator(0))
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patches(x), conv(x), **close)
    torch.testing.assert_close(jvp(patches, (x,), (t,)), jvp(conv, (x,), (t,)), **close)
    torch.testing.assert_close(grad(lambda x: patches(x).square().sum())(x), grad(lambda x: conv(x).square().sum())(x), **close)


def test_compiled_training_and_testing_are_the_eager_ones():
    model = "ConvNetBN"  # its running statistics are changed in passing
    images, labels = torch.randn(20, 3, 8, 8, generator=generator(0)), torch.arange(20) % 10
    trained = {}
    for compile in (False, True):
        with seeded(0, "net"):
            net = networks.build(model, 3, 10, 8)
        recipe = Recipe(3, 20, 0.9, 5e-4, Views(("flip", "color")), how=Arithmetic(compile))
        losses = [float(loss) for loss in evaluation.train(net, images, labels, 0.01, recipe, generator(0, "t"))]
        accuracy = evaluation.TestSet(images, labels, 20, Arithmetic(compile)).accuracy(net)
        trained[compile] = losses, accuracy, torch.cat([v.flatten().float() for v in net.state_dict().values()])
    (losses, accuracy, state), (losses_c, accuracy_c, state_c) = trained[False], trained[True]
    assert losses_c == pytest.approx(losses, rel=1e-4) and accuracy_c == accuracy
    assert relative(state_c, state) < 1e-4


def test_what_is_compiled_for_one_network_serves_the_next():
    programs = torch._dynamo.utils.counters["stats"]
    images, labels = torch.randn(20, 3, 8, 8, generator=generator(0)), torch.arange(20) % 10
    made = []
    for k in range(3):
        net = networks.build("ConvNetBN", 3, 10, 8)
        list(evaluation.train(net, images, labels, 0.01, Recipe(1, 20, how=Arithmetic(True)), generator(k)))
        made.append(programs["unique_graphs"])
    assert made[0] == made[1] == made[2]


def test_without_a_compiler_a_run_goes_on_with_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    function = Compiled(lambda x: x.sin() * 3, CPU)
    x = torch.arange(5.0)
    for _ in range(2):
        assert torch.equal(function(x), x.sin() * 3)
    out = capsys.readouterr().out
    assert out.startswith("Warning: torch.compile does not work here, and the run goes on without it (")
    assert out.count("\n") == 1


def test_auto_compiles_long_runs_and_not_short_ones():
    def choice(argv, classes=10, channels=3, resolution=32, device=CPU):
        args = distill_ATT.parse_args(argv.split())
        size = type("Dataset", (), {"size": (channels, classes, resolution), "classes": range(classes)})
        return distill_ATT.compile_student(args, size, device)

    paper = "--model=ConvNetD3 --ipc=1 --syn_steps=80 --Iteration=6000"
    demo = "--model=ConvNetD2 --ipc=1 --syn_steps=20 --Iteration=150"
    assert choice(paper) == "on" and choice(paper, device=torch.device("cuda")) == "on"
    assert choice(demo, channels=1, resolution=8) == "off"
    assert choice(demo + " --compile=on", channels=1, resolution=8) == "on"
    assert choice(paper + " --compile=off") == "off"
    # how often a run evaluates must not change what it computes
    assert choice(demo + " --eval_it=1 --num_eval=50", channels=1, resolution=8) == "off"
    assert compile_mode("auto", CPU, steps=10, flops=1e9) == "off"
    assert compile_mode("auto", CPU, steps=10, flops=1e15) == "on"


def test_work_is_counted_as_by_hand():
    # ConvNetD3: a 3x3 convolution at 32, 16 and 8 pixels, and the linear layer; two operations a multiplication
    by_hand = 2 * (32 * 32 * 128 * 3 * 9 + (16 * 16 + 8 * 8) * 128 * 128 * 9 + 128 * 4 * 4 * 10)
    assert forward_flops("ConvNetD3", 3, 10, 32) == by_hand


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_learns(precision, device):
    images, labels = torch.randn(20, 3, 8, 8, generator=generator(0)).to(device), (torch.arange(20) % 10).to(device)
    with seeded(0, "net"):
        net = networks.build("ConvNetW32", 3, 10, 8).to(device)
    how = Arithmetic(precision=precision)
    losses = list(evaluation.train(net, images, labels, 0.3, Recipe(100, 20, 0.9, how=how), generator(0)))
    assert losses[-1] < losses[0] / 10
    assert evaluation.TestSet(images, labels, 20, how).accuracy(net) == 1
    assert all(p.dtype == torch.float32 for p in net.parameters())
    seen = []
    net.classifier.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    evaluation.TestSet(images, labels, 20, how).accuracy(net)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]


def test_tf32_is_in_force_inside_and_not_after():
    def state():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = state()
    with Arithmetic(precision="tf32").context():
        assert state() == (True, "high")
        with performance.tf32(False):
            assert state() == (False, "highest")
        assert state() == (True, "high")
    with Arithmetic().context():
        assert state() == before
    assert state() == before


def test_the_share_of_the_peak_is_of_a_measured_rate():
    meter = performance.Meter(CPU)
    assert meter.peak > 1e9  # FLOP/s; the slowest machine that runs torch does more
    conv, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(100, 128, 16, 16)
    work = 2 * 100 * 16 * 16 * 128 * 128 * 9
    assert meter.figures(work, work / meter.peak)["share_of_peak"] == 1
    assert tuple(conv(x).shape) == (100, 128, 16, 16)
    assert 0.05 < meter.figures(work, 1)["memory_gb"] < 100
