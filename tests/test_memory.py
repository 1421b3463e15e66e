"""Memory does not grow with the number of unrolled steps, beyond the parameters that are kept."""

import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = """
import resource, sys
import torch
import networks
from performance import Compute
from reparam_module import FlatModule, Minibatch, Step, flatten, match_trajectory
from utils import Views, choose_device, generator

choose_device("cpu")
steps, batch, compile = (int(arg) for arg in sys.argv[1:])
net = networks.build("ConvNetD3", 3, 10, 32)
start = flatten(net)
images = torch.randn(batch, 3, 32, 32, generator=generator(0))
views = Views(("crop", "scale")).draw(steps, batch, generator(1), "cpu")
minibatches = [Minibatch(torch.arange(batch), view) for view in views]
student = Step(FlatModule(net, student=True), Compute(compile=bool(compile), precision="fp32"))
match_trajectory(student, start, start + 1e-3, images, torch.arange(batch) % 10, 0.01, minibatches, "mtt")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, start.numel() * 4)
"""


def peak(steps, batch, compile):
    command = [sys.executable, "-c", PROGRAM, str(steps), str(batch), str(int(compile))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return map(int, result.stdout.split())


long = pytest.mark.long


@pytest.mark.parametrize(
    "many, batch, compile",
    [(40, 10, False)] + [pytest.param(80, batch, compile, marks=long) for batch in (10, 100) for compile in (False, True)],
)
def test_many_steps_need_what_ten_need_and_at_most_twice_the_stored_parameters(many, batch, compile):
    if compile:
        peak(2, batch, compile)  # compiling itself takes memory; what it made is kept for the next process
    ten, parameters = peak(10, batch, compile)
    needed, _ = peak(many, batch, compile)
    stored = (many - 10) * parameters
    print(f"{ten / 1e6:.0f} MB with 10 steps, {needed / 1e6:.0f} MB with {many}; {stored / 1e6:.0f} MB more stored")
    assert needed - ten <= 2 * stored, f"{ten / 1e6:.0f} MB, {needed / 1e6:.0f} MB"
