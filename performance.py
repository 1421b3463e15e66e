"""What makes a run fast and says how fast it is: compilation, precision, and the figures beside the progress bar."""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import networks
from tracking import say

# ---------------------------------------------------------------------------------------------------------------------
# Compilation

# One function meets several networks and batch sizes, and each has its own program; torch's default stops at 8.
PROGRAMS = 64


class Compiled:
    """A function of tensors and modules that torch.compile translates for every shape it meets; on CUDA, its kernels are
    recorded in a graph and launched as one. Where the machine has no working compiler, one warning, and it runs as it is.

    What it returns on CUDA is overwritten by the next call: use it, or copy it, before.
    """

    def __init__(self, function: Callable, device: torch.device):
        torch._dynamo.config.recompile_limit = PROGRAMS
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.function = function
        self.compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, *args):
        if self.compiled is None:
            return self.function(*args)
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return self.compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next(iter(str(error).splitlines()), "")
            say(f"Warning: torch.compile does not work here, and the run goes on without it ({reason}).")
            self.compiled = None
            return self.function(*args)


@functools.cache
def compiled(function: Callable, device: torch.device) -> Compiled:
    """The one `Compiled` of a function, so that what was compiled for a network serves all others of its kind."""
    return Compiled(function, device)


@dataclass(frozen=True)
class Arithmetic:
    """How experts and evaluated networks are computed."""

    compile: bool = False
    precision: str = "fp32"

    def of(self, function: Callable, device: torch.device) -> Callable:
        """A function of a network and tensors, to be computed so on a device."""
        precise = PRECISIONS[self.precision](function, device)
        return compiled(precise, device) if self.compile else precise

    def context(self):
        """To be entered around what is computed so, backward passes included."""
        return tf32(True) if self.precision == "tf32" else contextlib.nullcontext()


@functools.cache
def in_bf16(function: Callable, device: torch.device) -> Callable:
    def mixed(*args):
        with torch.autocast(device.type, torch.bfloat16):
            return function(*args)

    return mixed


PRECISIONS = {  # --precision -> the function to compute in place of a function
    "fp32": lambda function, device: function,  # as PyTorch does by itself
    "tf32": lambda function, device: function,
    "bf16": in_bf16,
}


@contextlib.contextmanager
def tf32(allowed: bool):
    """Whether CUDA rounds the factors of float32 convolutions and matrix products to 10 bits of mantissa."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


COMPILE_MODES = ("auto", "on", "off")
PAYS_FROM = 300  # seconds of work without the compiler, of which it saves about half and costs about a minute
STEP_OVERHEAD = 0.005  # seconds that the Python of one training step takes, whatever its size
RATE = {"cpu": 1e11, "cuda": 1e13}  # FLOP/s, the order of magnitude


def compile_mode(asked: str, device: torch.device, steps: int, flops: float) -> str:
    """"on" or "off" for `steps` training steps of `flops` in all. Decided from the settings alone, not from a measurement,
    so that the same command computes the same numbers."""
    if asked != "auto":
        return asked
    return "on" if steps * STEP_OVERHEAD + flops / RATE[device.type] > PAYS_FROM else "off"


# ---------------------------------------------------------------------------------------------------------------------
# Work, rate and memory

GRADIENT, SECOND_ORDER = 3, 9  # forward passes that a gradient and the second-order pass of a step count for


def forward_flops(model: str, channels: int, classes: int, resolution: int) -> int:
    """Floating-point operations of a network on one image, those of its convolutions and linear layers."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        networks.build(model, channels, classes, resolution).eval()(torch.empty(1, channels, resolution, resolution))
    return counter.get_total_flops()


@functools.cache
def convolution_rate(device: torch.device, rounds: int = 20) -> float:
    """FLOP/s that this machine reaches at the convolution which dominates ConvNet: 128 to 128 channels, 3x3, at 16x16,
    100 images. The yardstick for shares of the peak."""
    conv = nn.Conv2d(128, 128, 3, padding=1, device=device).requires_grad_(False)
    x = torch.randn(100, 128, 16, 16, device=device)
    repeats = 1 if device.type == "cpu" else 50  # a GPU needs a fraction of a millisecond
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        start = clock(device)
        for _ in range(repeats):
            conv(x)
        seconds.append((clock(device) - start) / repeats)
    return 2 * 100 * 16 * 16 * 128 * 128 * 9 / min(seconds[1:])  # a peak: the fastest


def clock(device: torch.device) -> float:
    """Seconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> int:
    """Bytes in use: what torch holds on a GPU, what is resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Meter:
    """How close to its limits a machine works."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = convolution_rate(device)

    def figures(self, flops: float, seconds: float) -> dict:
        """For metrics: the share of the peak that `flops` in `seconds` reach, and the memory in use."""
        return {"share_of_peak": round(flops / seconds / self.peak, 4), "memory_gb": round(memory(self.device) / 1e9, 3)}


def note(figures: dict) -> str:
    return f"{figures['share_of_peak']:.0%} of peak, {figures['memory_gb']:.2f} GB"
