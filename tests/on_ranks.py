"""Started by torchrun: what test_distributed.py asks for, one after the other in one group of processes.

    on_ranks.py JOBS RESULTS
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from conftest import draw_blanks
from test_reparam import ALL, in_type, problem

import buffer_ATT
import console
import distill_ATT
import distributed
import performance
from performance import Compute
from reparam_module import FlatModule, Match, Minibatch, Step, draw_indices, match_trajectory, mean_match
from storage import InputError
from utils import Canvas, Views, generator, parse_strategy


def match(group, batch, micro_batch=None, samples=0, trajectories=0, steps=3, compiled=False) -> Match:
    """A match in float64, of which the processes of a group divide the batches, or the trajectories where there are some."""
    net, _, (start, target, images, labels, lr, minibatches) = problem(torch.float64, "cpu", batch=batch, steps=steps)
    if samples:
        random = generator(0, "canvases")
        images = torch.randn(10, 3, 32, 32, generator=random, dtype=torch.float64)
        views = Views(parse_strategy(ALL), Canvas(side=16, size=2, samples=samples)).draw(steps, batch, random, "cpu")
        indices = draw_indices(10, batch, steps, random)
        minibatches = [Minibatch(i, in_type(view, torch.float64)) for i, view in zip(indices, views)]
    over_batches, over_trajectories = (distributed.ALONE, group) if trajectories else (group, distributed.ALONE)
    compute = Compute(compile=compiled, precision="fp32")
    student = Step(FlatModule(net, student=True), compute, micro_batch=micro_batch, group=over_batches)
    matches = [
        match_trajectory(student, start, target * (1 + j), images, labels, lr, minibatches, "mtt")
        for j in range(trajectories or 1)[over_trajectories.rank :: over_trajectories.count]
    ]
    return mean_match(matches, trajectories or 1, images, over_trajectories)


def command(group, script: str, *flags: str):
    """A command of a script; {rank} in its flags is the process's. What it is refused for, or None."""
    flags = [flag.format(rank=group.rank) for flag in flags]
    try:
        {"buffer_ATT.py": buffer_ATT, "distill_ATT.py": distill_ATT}[script].main(flags)
    except InputError as error:
        return str(error)


def other_code(group, *flags: str):
    """A command of processes that run different versions of the code."""
    before, console.made_with = console.made_with, lambda: {"project": f"v{group.rank}"}
    try:
        return command(group, *flags)
    finally:
        console.made_with = before


def diverged(group):
    """What processes say that do not hold the same state."""
    try:
        group.require_identical(lambda: f"{group.rank // 2}")
    except distributed.DivergedError as error:
        return str(error)


def main():
    performance.convolution_rate = lambda compute: 1e11
    draw_blanks(pytest.MonkeyPatch())
    group, results = distributed.group(), []
    for kind, args in json.loads(Path(sys.argv[1]).read_text()):
        before = group.bytes
        answer = match(group, **args) if kind == "match" else globals()[kind](group, *args)
        answer = vars(answer) if isinstance(answer, Match) else answer
        results.append({"answers": group.gather(answer), "bytes": group.bytes - before})
    if group.is_main:
        torch.save(results, sys.argv[2])


if __name__ == "__main__":
    console.run(main)
    # threads of the group that run on while Python ends would abort the process now and then
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if left := [name for name in names if "gloo" in name]:
        sys.exit(f"Threads of the group are left: {left}")
