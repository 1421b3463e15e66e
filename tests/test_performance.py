"""What is fast computes the same, and what is decided automatically is decided from the settings alone."""

import gc
import inspect
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

import console
import distill_ATT
import evaluation
import networks
import performance
from distributed import ALONE
from evaluation import Recipe, Trainer
from performance import Captured, Compiled, Compute, compiling_pays, forward_flops
from reparam_module import FlatModule, Step, flatten, match_trajectory
from test_reparam import NONE, problem, relative, student_of
from utils import Views, generator

CPU = torch.device("cpu")
SIZE = 3, 10, 8


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Smooth ones. Two correct programs that round differently can be far apart after several steps with ReLU: where a
    value is zero but for rounding, they take different sides of its kink."""
    for name, norm in (("Small", "instance"), ("SmallBN", "batch")):
        builder = partial(networks.ConvNet, width=8, depth=1, act="sigmoid", norm=norm)
        monkeypatch.setitem(networks.NETWORKS, name, builder)


def test_the_compiled_step_is_the_eager_one_and_its_path_that_of_float64():
    net, slow, (start, target, images, labels, lr, minibatches) = problem(torch.float32, "cpu", "Small", side=8)
    fast = student_of(net, Compute(compile=True, precision="fp32"))
    theta, v = slow.flat.pack(start), slow.flat.pack(target - start)
    for name, more in (("gradient", ()), ("second_order", (v,))):
        args = theta, NONE.float(), images, labels, *more
        for a, b in zip(getattr(fast, name)(*args), getattr(slow, name)(*args)):
            assert a.numel() == b.numel() == 0 or relative(a, b) < 1e-5
    exact = student_of(net.double())
    found = match_trajectory(fast, start, target, images, labels, lr, minibatches, "mtt")
    wanted = match_trajectory(exact, start.double(), target.double(), images.double(), labels, lr, minibatches, "mtt")
    assert relative(found.grad_images.double(), wanted.grad_images) < 1e-4
    assert found.grad_lr == pytest.approx(wanted.grad_lr, rel=1e-4)


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
    ours, torchs = (grad(lambda x: layer(x).square().sum())(x) for layer in (patches, conv))
    torch.testing.assert_close(ours, torchs, **close)


# --- one network after the other, by the same programs


def train_in_turn(compute, device=CPU, batches=(20, 20), networks=3):
    """Networks trained and tested with 20 images in batches: what each ends with, on the CPU, and after how many compiled
    programs."""
    images, labels = torch.randn(20, 3, 8, 8, generator=generator(0)).to(device), (torch.arange(20) % 10).to(device)
    trainer = Trainer("SmallBN", SIZE, Recipe(3, batches[0], 0.9, 5e-4, drop_after=2), compute)
    found, programs = [], []
    for k in range(networks):
        views, random = Views(("flip", "color")), generator(k, "training")
        losses = []
        for trained in trainer.train(trainer.fresh(k), images, labels, 0.05, views, random):
            losses.append(trained.loss.item())
        accuracy = trainer.accuracy(trained, evaluation.TestSet(images, labels, batches[1]))
        found.append((trained.theta.cpu().clone(), trained.statistics.cpu().clone(), torch.tensor(losses), accuracy))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return found, programs


@dataclass(frozen=True)
class Plain(Compute):
    def __call__(self, function, state=0):
        return performance.tf32(False)(function)


@pytest.mark.parametrize("compile, batches", [(False, (12, 15)), (True, (20, 20))])
def test_networks_in_turn_are_what_the_plain_step_makes_of_them(compile, batches, device):
    found, programs = train_in_turn(Compute(device, compile, "fp32"), device, batches)
    plain, _ = train_in_turn(Plain(device), device, batches)
    for (*tensors, accuracy), (*expected, expected_accuracy) in zip(found, plain):
        assert all(relative(a, b) < 1e-4 for a, b in zip(tensors, expected))
        assert accuracy == pytest.approx(expected_accuracy, abs=0.051)  # an image on the border of two classes
    assert len(set(programs)) == 1  # what is compiled for one network serves the next


@dataclass(frozen=True)
class Capturing(Compute):
    def __call__(self, function, state=0):
        return Captured(super().__call__(function, state), state)


@pytest.fixture
def recordings(monkeypatch):
    """Stands in for CUDA graphs on a CPU: what is recorded runs anew into the same tensors."""
    made = []

    def record(run, warm_up):
        made.append(run)
        for _ in range(warm_up + 1):
            outputs = run()

        def replay():
            for place, value in zip(outputs, run()):
                if place is not value:
                    place.copy_(value)

        return outputs, replay

    monkeypatch.setattr(performance, "record", record)
    return made


def test_captured_networks_are_to_the_bit_those_without_in_one_recording_a_shape(recordings):
    captured, plain = (train_in_turn(compute, batches=(12, 15))[0] for compute in (Capturing(), Compute()))
    for (*tensors, accuracy), (*expected, expected_accuracy) in zip(captured, plain):
        assert all(map(torch.equal, tensors, expected)) and accuracy == expected_accuracy
    assert len(recordings) == 4  # steps on 12 and 8 images, tests on 15 and 5


def test_state_that_is_passed_on_is_not_copied(recordings):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.copy_.default
            return func(*args, **kwargs or {})

    def copies(*args):
        with Copies() as mode:
            found = function(*args)
        return found, mode.count

    function = Captured(lambda a, b, x: (a + x, b * x, a.sum()), state=2)
    a, b, x = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    first, other = function(a, b, x), (a, b)
    assert [v.item() for v in (*first, a, b)] == [4, 6, 1, 1, 2]
    monitored = {}
    for name, state in (("its own", first[:2]), ("another's", other)):
        found, monitored[name] = copies(*state, x)
    assert [v.item() for v in found] == [4, 6, 1] and found[0] is first[0] and found[1] is first[1]
    assert monitored["another's"] - monitored["its own"] == 2
    assert len(recordings) == 1


def test_without_a_compiler_a_run_goes_on_with_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before is found
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    function = Compiled(lambda x: (x.sin() * 3,))
    x = torch.arange(5.0)
    for _ in range(2):
        assert torch.equal(function(x)[0], x.sin() * 3)
    out = capsys.readouterr().out
    assert out.startswith("Warning: torch.compile does not work here, and the run goes on without it (")
    assert out.count("\n") == 1


def test_what_a_killed_compilation_left_is_removed_and_compiled_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    left, written, whole = (tmp_path / "ab" / f"{name}.so" for name in ("left", "written", "whole"))
    left.parent.mkdir()
    for library in (left, written, whole):
        library.touch()
        os.utime(library, (0, 0))
    whole.write_text("whole")
    written.touch()

    def load(x):
        if left.exists():
            raise torch._dynamo.exc.TorchDynamoException("file too short")
        return x + 1

    function = Compiled(lambda x: x)
    function.compiled = load
    assert function(torch.zeros(1)) == 1 and capsys.readouterr() == ("", "")
    assert not left.exists() and written.exists() and whole.exists()

    failures = [torch._dynamo.exc.TorchDynamoException("file too short")]  # another process removes it first

    def load_again(x):
        if failures:
            raise failures.pop()
        return x + 1

    function = Compiled(lambda x: x)
    function.compiled = load_again
    assert function(torch.zeros(1)) == 1 and capsys.readouterr() == ("", "")


def test_long_runs_are_compiled_and_short_ones_are_not():
    def pays(steps, model, size, device="cpu"):
        return compiling_pays(torch.device(device), steps, steps * 10 * 12 * forward_flops(model, size))

    paper, demo = (6001 * 80, "ConvNetD3", (3, 10, 32)), (151 * 20, "ConvNetD2", (1, 10, 8))
    assert pays(*paper) and pays(*paper, "cuda") and not pays(*demo)
    for asked, before, comes_to in (("auto", None, "off"), ("auto", "on", "on"), ("on", "off", "on")):
        args = distill_ATT.parse_args([f"--compile={asked}", "--wandb=disabled"])
        stored = {"compile": before} if before else {}
        assert console.resolve(args, ALONE, CPU, stored, 1, 1e9).compile == comes_to
    assert console.resolve(args, ALONE, CPU, {}, 1, 1e15).compile == "on"


def test_work_is_counted_as_by_hand():
    # ConvNetD3: a 3x3 convolution at 32, 16 and 8 pixels, and the linear layer; two operations a multiplication
    by_hand = 2 * (32 * 32 * 128 * 3 * 9 + (16 * 16 + 8 * 8) * 128 * 128 * 9 + 128 * 4 * 4 * 10)
    assert forward_flops("ConvNetD3", (3, 10, 32)) == by_hand


def test_what_autograd_keeps_is_counted_as_by_hand():
    # ConvNetD3: the image, and of each block what its norm, its ReLU and its pooling take or give
    by_hand = 4 * (3 * 32 * 32 + 128 * sum(2 * side**2 + (side // 2) ** 2 for side in (32, 16, 8)))
    assert performance.saved_bytes("ConvNetD3", (3, 10, 32)) == pytest.approx(by_hand, rel=0.01)


def test_the_memory_needed_is_that_of_the_largest_pass_the_parameters_kept_and_the_data():
    size, parameters = (3, 10, 32), 320010

    def needed(*passes, steps=0, resident=0):
        passes = [performance.Pass(f"--{kind}", kind, "ConvNetD3", images) for kind, images in passes]
        return performance.memory_needed(size, passes, ("--steps", steps), {"--res": resident})

    small, large = needed(("gradient", 100)), needed(("gradient", 200), ("test", 100))
    saved = performance.PASS_MEMORY["gradient"][0] * performance.saved_bytes("ConvNetD3", size)
    assert large[0] - small[0] == pytest.approx(100 * saved, rel=1e-6) and large[1] == "--gradient"
    kept = needed(("gradient", 100), steps=1000, resident=5)
    assert kept[0] - small[0] == 4000 * parameters + 5 and kept[1] == "--steps"
    assert needed(("test", 1), resident=10**10)[1] == "--res"


def test_a_control_groups_limit_is_the_machines_memory(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "1000000\n" if path.name == "memory.max" else "max")
    assert performance.machine_memory(CPU) == 10**6
    monkeypatch.setattr(Path, "read_text", lambda path: "max")
    assert performance.machine_memory(CPU) > 10**8


# --- precision


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_every_precision_learns(precision, device):
    images, labels = torch.randn(20, 3, 8, 8, generator=generator(0)).to(device), (torch.arange(20) % 10).to(device)
    trainer = Trainer("ConvNetW32", SIZE, Recipe(100, 20, 0.9), Compute(device, precision=precision))
    seen = []
    trainer.flat.testing.classifier.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    losses = []
    for trained in trainer.train(trainer.fresh(0), images, labels, 0.3, Views(), generator(0)):
        losses.append(trained.loss.item())
    testset = evaluation.TestSet(images, labels, 20)
    assert losses[-1] < losses[0] / 10 and trainer.accuracy(trained, testset) == 1
    assert trained.theta.dtype == torch.float32
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def tf32_state():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    "precision, inside", [("auto", None), ("fp32", (False, "highest")), ("tf32", (True, "high")), ("bf16", None)]
)
def test_tf32_is_allowed_or_forbidden_inside_a_function_and_nowhere_else(precision, inside, device):
    before, seen = tf32_state(), []
    function = Compute(device, precision=precision)(lambda x: (seen.append(tf32_state()), x * 2)[1:])
    for _ in range(2):
        assert function(torch.ones(1, device=device))[0].item() == 2
    assert set(seen) == {inside or before} and tf32_state() == before


def test_the_students_steps_are_strict_float32_unless_asked():
    assert inspect.signature(Step).parameters["compute"].default == Compute(precision="fp32")
    args = distill_ATT.parse_args([])
    assert (args.precision, args.student_precision) == ("auto", "fp32")
    step, seen = Step(FlatModule(net := networks.build("Small", *SIZE), student=True)), []
    step.flat.training.register_forward_pre_hook(lambda module, args: seen.append(tf32_state()))
    theta, x, y = step.flat.pack(flatten(net)), torch.randn(2, 3, 8, 8), torch.arange(2)
    step.gradient(theta, NONE.float(), x, y)
    step.second_order(theta, NONE.float(), x, y, theta)
    assert seen == [(False, "highest")] * 2


# --- what is said of a machine


def test_the_share_of_the_peak_is_of_a_measured_rate():
    peak = performance.convolution_rate(Compute())
    assert peak > 1e9  # FLOP/s; the slowest machine that runs torch does more
    work = 2 * 100 * 16 * 16 * 128 * 128 * 9
    assert performance.utilisation(Compute(), work, work / peak)["share_of_peak"] == 1
    assert 0.05 < performance.utilisation(Compute(), work, 1)["memory_gb"] < 100


def test_memory_is_told_without_proc_too(monkeypatch):
    resident = performance.memory(CPU)

    def read_text(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert 0.5 * resident < performance.memory(CPU) < 100e9


def test_no_garbage_is_collected_while_a_graph_is_recorded():
    assert gc.isenabled()
    with performance.nothing_collected():
        assert not gc.isenabled()
    assert gc.isenabled()
