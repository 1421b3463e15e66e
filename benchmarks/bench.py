"""Times this project against the published way of doing the same work, and measures the memory of both.

    python benchmarks/bench.py [PART ...] [--rounds N] [--device DEVICE] [--dataset CIFAR10 --data_path data]
    python benchmarks/bench.py ranks [--rounds N]    # two processes of a thread against one of two threads, on a CPU

Each way runs in a process of its own. Both are warmed up, which includes compiling, and then take turns, round by round,
so that both see the same machine; the medians and their ratio are printed and go to benchmarks/results/<device>.json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
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
    Case("evaluation", "5 networks, IPC 10, 20 epochs each", {"ipc": 10, "epochs": 20}, 3),
    Case("test", "10,000 images", {"count": 10_000}, 3),
]
CONVNET = "ConvNetD3", (3, 10, 32)
START = "process start to the loop"  # needs a data set on disk

# ---------------------------------------------------------------------------------------------------------------------
# The work of a round, made inside the process of one way: PARTS[part, way](settings, device) -> (round, warm-up)


def noise(count, device):
    """Images of CIFAR-10's shape, and labels."""
    import torch

    random = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=random).to(device), (torch.arange(count) % 10).to(device)


def all_operations():
    from utils import AUGMENTATIONS, Views

    return Views(tuple(AUGMENTATIONS))


def ours_iteration(ipc, steps, device, group=None):
    import torch

    import networks
    from distributed import ALONE
    from performance import Compute
    from reparam_module import FlatModule, Minibatch, Step, draw_indices, flatten, match_trajectory
    from utils import generator

    net = networks.build("ConvNetD3", 3, 10, 32).to(device)
    start = flatten(net)
    target = start + 1e-3 * torch.randn(start.shape).to(device)
    images, labels = noise(10 * ipc, device)
    student = Step(FlatModule(net, student=True), Compute(device, compile=True, precision="fp32"), group=group or ALONE)
    rounds = iter(range(10**6))

    def run(steps=steps):
        random = generator(0, "bench", next(rounds))
        indices = draw_indices(len(labels), len(labels), steps, random)
        views = all_operations().draw(steps, len(labels), random, device)
        minibatches = [Minibatch(i.to(device), view) for i, view in zip(indices, views)]
        match_trajectory(student, start, target, images, labels, 0.01, minibatches, "mtt")

    return run, lambda: run(2)


def published_iteration(ipc, steps, device):
    import torch

    import published

    torch.backends.cudnn.allow_tf32 = False  # as the student computes
    net = published.convnet().to(device).requires_grad_(True)
    start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    target = start + 1e-3 * torch.randn(start.shape).to(device)
    images, labels = noise(10 * ipc, device)

    def run(steps=steps):
        published.distillation_iteration(net, start, target, images, labels, 0.01, steps)

    return run, lambda: run(2)


def ours_training(count, epochs, device, networks_count, **recipe):
    from evaluation import Recipe, Trainer
    from performance import Compute
    from utils import generator

    images, labels = noise(count, device)
    trainer = Trainer(*CONVNET, Recipe(epochs, **recipe), Compute(device, compile=True))

    def run():
        for k in range(networks_count):
            theta = trainer.fresh(0, k)
            for trained in trainer.train(theta, images, labels, 0.01, all_operations(), generator(0, k)):
                pass
        trained.loss.item()

    return run, run


def published_training(count, epochs, device, networks_count, batch, momentum=0.0, weight_decay=0.0):
    import published

    images, labels = noise(count, device)

    def run(epochs=epochs):
        for _ in range(networks_count):
            net = published.convnet().to(device)
            published.train_network(net, images, labels, 0.01, epochs, batch, momentum, weight_decay)

    return run, lambda: run(2)


EVALUATION = {"networks_count": 5, "batch": 256, "momentum": 0.9, "weight_decay": 5e-4}
EXPERT = {"networks_count": 1, "epochs": 1, "batch": 512}


def ours_test(count, device):
    from evaluation import Recipe, TestSet, Trained, Trainer
    from performance import Compute

    testset, trainer = TestSet(*noise(count, device), batch=256), Trainer(*CONVNET, Recipe(1, 256), Compute(device, compile=True))
    theta = trainer.fresh(0)
    run = partial(trainer.accuracy, Trained(theta, trainer.flat.initial_statistics(theta), theta), testset)
    return run, run


def published_test(count, device):
    import published

    images, labels = noise(count, device)
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
# One way, in its process: a line "time" or "memory" on stdin is a round, its seconds or peak memory are a line on stdout


def resident(what="VmRSS"):
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def start_peak(device) -> int:
    """Begins a measurement of peak memory, and returns what is in use: bytes."""
    import torch
    from performance import return_free_pages

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return_free_pages()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak(device) -> int:
    import torch

    # what a CUDA graph computes in is reserved, and allocated to nobody
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else resident("VmHWM")


def serve(way: str, case: Case, device_name: str):
    began = time.perf_counter()
    out, sys.stdout = sys.stdout, sys.stderr  # stdout is for results
    from performance import clock
    from utils import choose_device

    import torch

    # the published way runs with the allocator as it comes, ours as the scripts set it
    device = choose_device(device_name) if way == "ours" else torch.device(device_name)
    run, warm_up = PARTS[case.part, way](**case.settings, device=device)
    warm_up()
    clock(device)
    print(json.dumps({"ready": time.perf_counter() - began}), file=out, flush=True)
    for what in sys.stdin:
        if what.strip() == "memory":
            idle = start_peak(device)
            run()
            clock(device)
            print(json.dumps({"memory": peak(device) - idle, "process": peak(device)}), file=out, flush=True)
        else:
            start = clock(device)
            run()
            print(json.dumps({"seconds": clock(device) - start}), file=out, flush=True)


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

    def measure(self, what: str) -> dict:
        """"time" or "memory" of a round."""
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(case: Case, rounds: int, device: str) -> dict:
    ways = {way: Way(way, case, device) for way in WAYS}
    seconds = {way: [] for way in WAYS}
    memory = {way: ways[way].measure("memory") for way in WAYS}  # apart: giving memory back costs time
    for _ in range(rounds):
        for way in WAYS:
            seconds[way].append(ways[way].measure("time")["seconds"])
    for way in ways.values():
        way.close()
    return {"part": case.part, "case": case.name, "settings": case.settings, "rounds": rounds} | {
        way: {"seconds": statistics.median(seconds[way]), **memory[way], "warm_up_seconds": ways[way].ready} for way in WAYS
    }


# ---------------------------------------------------------------------------------------------------------------------
# From the start of a process to the first iteration, on a data set that is there


def ours_start(request, buffers, device_name):
    """distill_ATT.py up to where its loop begins."""
    import distill_ATT

    distill_ATT.distill = lambda *args: report_start()
    flags = [f"--dataset={request.name}", f"--data_path={request.path}", "--model=ConvNetD3", f"--device={device_name}"]
    flags += [f"--res={request.resolution}"] if request.resolution else []
    flags += [f"--buffer_path={buffers}", f"--save_dir={buffers}", "--max_start_epoch=1", "--expert_epochs=1"]
    distill_ATT.main([*flags, "--seed=0", "--wandb=disabled", "--compile=off"])


def published_start(request, buffers, device_name):
    import published

    kept = published.load(request.name, request.path, request.resolution, device_name)
    assert kept
    report_start()


def report_start():
    print(json.dumps({"ready": time.time(), "process": resident()}), flush=True)
    os._exit(0)


def measure_start(args, rounds: int) -> dict:
    import networks
    import storage
    import torch
    from reparam_module import flatten
    from utils import Request, load_dataset

    request = Request(args.dataset, args.data_path, resolution=args.res)
    dataset = load_dataset(request)  # fills the cache
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as buffers:
        theta = flatten(networks.build("ConvNetD3", *dataset.size))
        settings = dataset.identity | {"model": "ConvNetD3"}
        folder, _ = storage.expert_folder(Path(buffers), request, "ConvNetD3", dataset.identity)
        storage.save_expert(folder, 0, torch.stack([theta] * 2), settings, [0.1])
        for _ in range(rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--start", way, buffers, f"--dataset={args.dataset}"]
                command += [f"--data_path={args.data_path}", f"--device={args.device}"] + ([f"--res={args.res}"] if args.res else [])
                began = time.time()
                line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                answer = json.loads(line)
                found[way].append({"seconds": answer["ready"] - began, "process": answer["process"]})
    name = f"{START}, {args.dataset} with {len(dataset.train)} images"
    return {"part": "start", "case": name, "rounds": rounds} | {
        way: {key: statistics.median(r[key] for r in found[way]) for key in ("seconds", "process")} for way in WAYS
    }


# ---------------------------------------------------------------------------------------------------------------------
# Processes of torchrun against threads, on two cores

RANKS = {
    "IPC 1, 10 steps": {"ipc": 1, "steps": 10},
    "IPC 10, 10 steps": {"ipc": 10, "steps": 10},
    "evaluation of 4 networks, IPC 1, 20 epochs each": {"networks": 4, "ipc": 1, "epochs": 20},
}
DIVISIONS = {"1 process of 2 threads": (1, 2), "2 processes of 1 thread": (2, 1)}


def ours_judgement(networks, ipc, epochs, device, group):
    from evaluation import Judge, Judged, TestSet, Trainer, evaluation_recipe
    from performance import Compute

    trainer = Trainer(*CONVNET, evaluation_recipe(epochs - 1), Compute(device, compile=True))
    judge = Judge([trainer], TestSet(*noise(100, device), 100), all_operations(), networks, seed=0, group=group)
    run = partial(judge, [Judged(*noise(10 * ipc, device), 0.01, ())])
    return run, run


def serve_ranks(rounds: int):
    """Started by torchrun: seconds of each case in each round; a line of JSON on stdout."""
    import distributed
    from utils import choose_device

    group, device, seconds = distributed.group(), choose_device("cpu"), {}
    for name, settings in RANKS.items():
        make = ours_judgement if "networks" in settings else ours_iteration
        run, warm_up = make(**settings, device=device, group=group)
        warm_up()
        seconds[name] = []
        for _ in range(rounds):
            group.gather()
            start = time.perf_counter()
            run()
            group.gather()
            seconds[name].append(time.perf_counter() - start)
    if group.is_main:
        print(json.dumps(seconds), flush=True)
    group.leave()


def measure_ranks(rounds: int) -> list[dict]:
    """The ways take turns, twice."""
    found = {way: {name: [] for name in RANKS} for way in DIVISIONS}
    for _ in range(2):
        for way, (processes, threads) in DIVISIONS.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            command += ["ranks", "--serve", "ranks", str(rounds)]
            line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout.splitlines()[-1]
            for name, seconds in json.loads(line).items():
                found[way][name] += seconds
    results = [
        {"part": "ranks", "case": name, "rounds": 2 * rounds} | {w: statistics.median(found[w][name]) for w in DIVISIONS}
        for name in RANKS
    ]
    for result in results:
        print(f"ranks      {result['case']:<54}" + ", ".join(f"{way}: {result[way]:.2f} s" for way in DIVISIONS), flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def describe(result: dict, peak_rate: float) -> dict:
    """Adds the ratios, and where the work is counted, the share of the measured convolution peak that we reach."""
    ours, published = result["ours"], result["published"]
    result["speed_up"] = round(published["seconds"] / ours["seconds"], 3)
    if "memory" in ours:
        result["share_of_memory"] = round(ours["memory"] / max(1, published["memory"]), 4)
    if result["part"] == "iteration":
        from performance import GRADIENT, SECOND_ORDER, forward_flops

        ipc, steps = result["settings"]["ipc"], result["settings"]["steps"]
        work = 10 * ipc * steps * (GRADIENT + SECOND_ORDER) * forward_flops(*CONVNET)
        result["share_of_peak"] = round(work / ours["seconds"] / peak_rate, 3)
    return result


def line_of(result: dict) -> str:
    ours, published = result["ours"], result["published"]
    memory = f"{published['memory'] / 1e6:.0f} -> {ours['memory'] / 1e6:.0f} MB, " if "memory" in ours else ""
    peak_share = f", {result['share_of_peak']:.0%} of peak" if "share_of_peak" in result else ""
    return (
        f"{result['part']:<11}{result['case']:<54}{published['seconds']:8.2f} s -> {ours['seconds']:7.2f} s, {memory}"
        f"{result['speed_up']:.2f} speed-up{peak_share}"
    )


def machine(device) -> dict:
    from performance import describe as in_words
    from storage import made_with

    return {"device": in_words(device), "date": time.strftime("%Y-%m-%d"), "made_with": made_with()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="expert, iteration, evaluation, test, start (default: all these); ranks")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, help="default: 3 to 5")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="CIFAR10", help="data set of the part start")
    parser.add_argument("--data_path", type=Path, help="where it is; without it, start is left out")
    parser.add_argument("--res", type=int)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        way, case = args.serve
        if way == "ranks":
            return serve_ranks(int(case))
        return serve(way, Case(**json.loads(case)), args.device)
    if args.start:
        from utils import Request

        way, buffers = args.start
        start = {"ours": ours_start, "published": published_start}[way]
        return start(Request(args.dataset, args.data_path, resolution=args.res), buffers, args.device)

    import storage
    from performance import Compute, convolution_rate
    from utils import choose_device

    args.device = str(choose_device(args.device))
    device = choose_device(args.device)
    made = machine(device) | {"convolution_peak_gflops": round(convolution_rate(Compute(device)) / 1e9, 1)}
    out = args.out or ROOT / "benchmarks" / "results" / (re.sub(r"\W+", "_", made["device"]) + ".json")
    print(f"{made['device']}: {made['convolution_peak_gflops']} GFLOP/s at 3x3 convolutions. Published way -> ours, medians:")

    def keep(result):
        """In the file in place of an earlier measurement of the same."""
        kept = storage.load_json(out)["results"] if out.exists() else []
        kept = [r for r in kept if (r["part"], r["case"]) != (result["part"], result["case"])]
        storage.save_json(out, {"device": made["device"], "results": [*kept, result | made]})

    for case in CASES:
        if (not args.parts or case.part in args.parts) and args.only in case.name:
            yardstick = Compute(device, precision="fp32" if case.part == "iteration" else "auto")
            before = convolution_rate.__wrapped__(yardstick)
            result = compare(case, args.rounds or case.rounds, args.device)
            describe(result, max(before, convolution_rate.__wrapped__(yardstick)))
            print(line_of(result), flush=True)
            keep(result)
    if args.data_path and (not args.parts or "start" in args.parts):
        result = describe(measure_start(args, args.rounds or 3), 0)
        print(line_of(result), flush=True)
        keep(result)
    if "ranks" in args.parts:
        for result in measure_ranks(args.rounds or 3):
            keep(result)
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
