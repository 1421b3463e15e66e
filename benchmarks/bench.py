"""Times this project against the published way of doing the same work, and measures the memory of both.

    python benchmarks/bench.py [PART ...] [--rounds N] [--device cpu]

Each way runs in a process of its own. Both are warmed up, which includes compiling, and then take turns, round by round,
so that both see the same machine; the medians and their ratio are printed and go to benchmarks/results/<device>.json.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = ("published", "ours")


@dataclass(frozen=True)
class Case:
    """One comparison: what both ways do in a round."""

    part: str
    name: str
    settings: dict = field(default_factory=dict)
    rounds: int = 5


CASES = [
    Case("expert", "10 batches of 512 images (a CIFAR-10 epoch has 98)", {"count": 5120}, 3),
    *(Case("iteration", f"IPC 1, {n} steps", {"ipc": 1, "steps": n}) for n in (10, 20, 40, 80)),
    Case("iteration", "IPC 10, 30 steps", {"ipc": 10, "steps": 30}, 3),
    Case("evaluation", "5 networks, IPC 1, 50 epochs each", {"ipc": 1, "epochs": 50}),
    Case("evaluation", "5 networks, IPC 10, 20 epochs each", {"ipc": 10, "epochs": 20}),
    Case("test", "10,000 images", {"count": 10_000}),
    Case("start", "50,000 images of 32x32 to where training starts", {"count": 50_000}, 3),
]

# ---------------------------------------------------------------------------------------------------------------------
# The work of a round, made inside the process of one way: PARTS[part, way](settings, device) -> (round, warm-up)


def problem(ipc, device):
    import torch

    random = torch.Generator().manual_seed(0)
    images = torch.randn(10 * ipc, 3, 32, 32, generator=random).to(device)
    return images, torch.arange(10, device=device).repeat_interleave(ipc)


def real_data(count, device):
    import torch

    random = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=random).to(device), (torch.arange(count) % 10).to(device)


def all_operations():
    from utils import parse_strategy

    return parse_strategy("color_crop_cutout_flip_scale_rotate")


def ours_iteration(ipc, steps, device):
    import torch

    import networks
    from reparam_module import Minibatch, Student, draw_indices, flatten, match_trajectory
    from utils import Views, generator

    net = networks.build("ConvNetD3", 3, 10, 32).to(device)
    start = flatten(net)
    target = start + 1e-3 * torch.randn(start.shape).to(device)
    images, labels = problem(ipc, device)
    student = Student(net, compile=True)
    rounds = iter(range(10**6))

    def run(steps=steps):
        random = generator(0, "bench", next(rounds))
        indices = draw_indices(len(labels), len(labels), steps, random)
        views = Views(all_operations()).draw(steps, len(labels), random, device)
        minibatches = [Minibatch(i.to(device), view) for i, view in zip(indices, views)]
        match_trajectory(student, start, target, images, labels, 0.01, minibatches, "mtt")

    return run, lambda: run(2)


def published_iteration(ipc, steps, device):
    import torch

    import published

    net = published.convnet().to(device).requires_grad_(True)
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    target = start + 1e-3 * torch.randn(start.shape).to(device)
    images, labels = problem(ipc, device)

    def run(steps=steps):
        published.distillation_iteration(net, start, target, images, labels, 0.01, steps)

    return run, lambda: run(2)


def ours_training(count, epochs, device, networks_count, **recipe):
    import networks
    from evaluation import Recipe, train
    from performance import Arithmetic
    from utils import Views, generator

    images, labels = real_data(count, device)

    def run(epochs=epochs):
        for k in range(networks_count):
            net = networks.build("ConvNetD3", 3, 10, 32).to(device)
            plan = Recipe(epochs=epochs, views=Views(all_operations()), how=Arithmetic(compile=True), **recipe)
            for loss in train(net, images, labels, 0.01, plan, generator(0, k)):
                pass
        float(loss)

    return run, lambda: run(2)


def published_training(count, epochs, device, networks_count, batch, momentum=0.0, weight_decay=0.0):
    import published

    images, labels = real_data(count, device)

    def run(epochs=epochs):
        for _ in range(networks_count):
            net = published.convnet().to(device)
            published.train_network(net, images, labels, 0.01, epochs, batch, momentum, weight_decay)

    return run, lambda: run(2)


EVALUATION = {"networks_count": 5, "batch": 256, "momentum": 0.9, "weight_decay": 5e-4}
EXPERT = {"networks_count": 1, "epochs": 1, "batch": 512}


def ours_test(count, device):
    import networks
    from evaluation import TestSet
    from performance import Arithmetic

    testset = TestSet(*real_data(count, device), batch=256, how=Arithmetic(compile=True))
    net = networks.build("ConvNetD3", 3, 10, 32).to(device)
    return lambda: testset.accuracy(net), lambda: testset.accuracy(net)


def published_test(count, device):
    import published

    images, labels = real_data(count, device)
    net = published.convnet().to(device)
    return lambda: published.test_network(net, images, labels), lambda: published.test_network(net, images[:512], labels[:512])


PARTS = {
    ("iteration", "ours"): ours_iteration,
    ("iteration", "published"): published_iteration,
    ("expert", "ours"): lambda count, device: ours_training(count, device=device, **EXPERT),
    ("expert", "published"): lambda count, device: published_training(count, device=device, **EXPERT),
    ("evaluation", "ours"): lambda ipc, epochs, device: ours_training(10 * ipc, epochs, device, **EVALUATION),
    ("evaluation", "published"): lambda ipc, epochs, device: published_training(10 * ipc, epochs, device, **EVALUATION),
    ("test", "ours"): ours_test,
    ("test", "published"): published_test,
}


# ---------------------------------------------------------------------------------------------------------------------
# One way, in its process: a line "go" on stdin is a round, its seconds and peak memory are a line on stdout


def resident(what="VmRSS"):
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def start_peak(device) -> int:
    """Begins a measurement of peak memory, and returns what is in use: bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak(device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def serve(way: str, case: Case, device_name: str):
    began = time.perf_counter()
    out, sys.stdout = sys.stdout, sys.stderr  # stdout is for results
    from performance import clock
    from utils import choose_device

    import torch

    # the published way runs with the allocator as it comes
    device = choose_device(device_name) if way == "ours" else torch.device(device_name)
    run, warm_up = PARTS[case.part, way](**case.settings, device=device)
    warm_up()
    clock(device)
    print(json.dumps({"ready": time.perf_counter() - began}), file=out, flush=True)
    for _ in sys.stdin:
        idle = start_peak(device)
        start = clock(device)
        run()
        seconds = clock(device) - start
        print(json.dumps({"seconds": seconds, "memory": peak(device) - idle, "process": peak(device)}), file=out, flush=True)


class Way:
    def __init__(self, way: str, case: Case, device: str):
        command = [sys.executable, __file__, "--serve", way, json.dumps(vars(case)), "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()["ready"]

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a benchmark's process failed; what it said is above")
        return json.loads(line)

    def round(self) -> dict:
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(case: Case, rounds: int | None, device: str) -> dict:
    ways = {way: Way(way, case, device) for way in WAYS}
    found = {way: [] for way in WAYS}
    for _ in range(rounds or case.rounds):
        for way in WAYS:
            found[way].append(ways[way].round())
    for way in ways.values():
        way.close()
    result = {"part": case.part, "case": case.name, "rounds": rounds or case.rounds}
    for way in WAYS:
        medians = {key: statistics.median(r[key] for r in found[way]) for key in ("seconds", "memory", "process")}
        result[way] = medians | {"warm_up_seconds": ways[way].ready}
    result["times_as_fast"] = result["published"]["seconds"] / result["ours"]["seconds"]
    result["share_of_memory"] = result["ours"]["memory"] / max(1, result["published"]["memory"])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="expert, iteration, evaluation, test, start (default: all)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        way, case = args.serve
        return serve(way, Case(**json.loads(case)), args.device)
    for case in CASES:
        if (not args.parts or case.part in args.parts) and args.only in case.name and (case.part, "ours") in PARTS:
            print(json.dumps(compare(case, args.rounds, args.device)), flush=True)


if __name__ == "__main__":
    main()
