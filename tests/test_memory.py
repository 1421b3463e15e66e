"""Memory does not grow with the number of unrolled steps, beyond the parameters that are kept."""

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import resource, sys
import torch
import networks
from reparam_module import Minibatch, Student, flatten, match_trajectory
from utils import Views, choose_device, generator

choose_device("cpu")
steps = int(sys.argv[1])
net = networks.build("ConvNetD3", 3, 10, 32)
start = flatten(net)
images = torch.randn(10, 3, 32, 32, generator=generator(0))
views = Views(("crop", "scale")).draw(steps, 10, generator(1), "cpu")
minibatches = [Minibatch(torch.arange(10), view) for view in views]
match_trajectory(Student(net), start, start + 1e-3, images, torch.arange(10), 0.01, minibatches, "mtt")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, start.numel() * 4)
"""


def peak(steps):
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(steps)], cwd=ROOT, capture_output=True, text=True, check=True)
    return map(int, result.stdout.split())


def test_eighty_steps_need_what_ten_need_and_at_most_twice_the_stored_parameters():
    few, parameters = peak(10)
    many, _ = peak(80)
    assert many - few <= 2 * 70 * parameters, f"{few / 1e6:.0f} MB, {many / 1e6:.0f} MB"
