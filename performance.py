"""The one way to compute (device, compilation, capture, precision), and what is said of it: work, peak and memory."""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import networks

# --- Computing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tf32(allowed: bool):
    """TF32 in float32 convolutions and matrix products, allowed or forbidden. Also a decorator."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


PRECISIONS = {  # --precision -> (device type, function) to the function in this precision
    "auto": lambda kind, function: function,  # as PyTorch does by itself: on GPUs, TF32 in convolutions
    "fp32": lambda kind, function: tf32(False)(function),
    "tf32": lambda kind, function: tf32(True)(function),
    "bf16": lambda kind, function: torch.autocast(kind, torch.bfloat16, cache_enabled=False)(function),
}


@dataclass(frozen=True)
class Compute:
    """How functions of tensors are computed: on which device, compiled or eager, in which precision.

    On CUDA a function is captured in a CUDA graph, compiled or not. Nothing else in this project compiles, captures or
    sets precision.
    """

    device: torch.device = torch.device("cpu")
    compile: bool = False
    precision: str = "auto"

    def __call__(self, function: Callable, state: int = 0) -> Callable:
        """`function`, from tensors to a tuple of tensors, computed this way. Keep what this returns: what is compiled
        or captured lives in it, once for every shape of the arguments.

        The first `state` results are the successors of the first `state` arguments. On CUDA, what a call returns is
        overwritten: state by the next call of the same function, the rest by the next call of any. Use or copy it before.
        """
        if self.compile:
            function = Compiled(function)
        function = PRECISIONS[self.precision](self.device.type, function)
        return Captured(function, state) if self.device.type == "cuda" else function


class Compiled:
    """A function compiled by torch for every shape it meets. Without a working compiler: one warning, and eager."""

    PROGRAMS = 64  # of one function, for all networks and batch sizes together; torch's default stops at 8

    def __init__(self, function: Callable):
        torch._dynamo.config.recompile_limit = self.PROGRAMS
        self.function = function
        self.compiled = torch.compile(function, fullgraph=True, dynamic=False)
        self.tried_again = False

    def __call__(self, *args):
        try:
            return self.compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            if not self.tried_again:
                self.tried_again = True
                drop_unfinished_libraries()
                return self(*args)
            reason = next(iter(str(error).splitlines()), "")
            with contextlib.suppress(OSError):
                tqdm.write(f"Warning: torch.compile does not work here, and the run goes on without it ({reason}).")
            self.compiled = self.function
            return self(*args)


def drop_unfinished_libraries():
    """A process that was killed while it compiled may have left an empty library in torch's cache, on which compiling would
    fail ever after. Those of the last minute may still be written. Other processes may do the same at the same time."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    old = time.time() - 60
    for path in Path(cache_dir()).glob("*/*.so"):
        with contextlib.suppress(FileNotFoundError):
            if (found := path.stat()).st_size == 0 and found.st_mtime < old:
                path.unlink()


class Captured:
    """A function whose kernels are recorded in a CUDA graph and launched as one; one graph for every shape.

    Arguments are copied to where the graph reads them. The first `state` results are written there too, within the
    graph, so that a caller who passes them on to the next call has nothing copied.
    """

    WARM_UP = 3  # calls before recording, in which libraries choose and compile what they launch

    def __init__(self, function: Callable, state: int):
        self.function, self.state = function, state
        self.graphs = {}

    def __call__(self, *args: Tensor):
        shapes = tuple((arg.shape, arg.dtype) for arg in args)
        if shapes not in self.graphs:
            inputs = [arg.clone() for arg in args]
            self.graphs[shapes] = inputs, *record(functools.partial(self._run, inputs), self.WARM_UP)
        inputs, outputs, replay = self.graphs[shapes]
        for place, arg in zip(inputs, args):
            if place is not arg:
                place.copy_(arg)
        replay()
        return outputs

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = self.function(*inputs)
        for place, value in zip(inputs[: self.state], outputs):
            place.copy_(value)
        return *inputs[: self.state], *outputs[self.state :]


def record(run: Callable, warm_up: int) -> tuple[tuple[Tensor, ...], Callable]:
    """What `run` returns, and a function that computes it anew in the same place."""
    side = side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with nothing_collected(), torch.cuda.graph(graph, pool=graph_pool().id):
        outputs = run()
    return outputs, graph.replay


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Where all functions warm up: cuBLAS keeps memory for every stream that it has seen, and torch hands out the same 32
    in turn, that of its captures among them."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def nothing_collected():
    """Meanwhile no garbage is collected: a graph that is destroyed during a capture ends the capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@functools.cache
def graph_pool() -> torch.cuda.MemPool:
    """Memory that all graphs share: what one leaves there is used before the next is replayed. An object, not a handle,
    so that it outlives the graphs."""
    return torch.cuda.MemPool()


COMPILE_MODES = ("auto", "on", "off")
PAYS_FROM = {"cpu": 300, "cuda": 30}  # seconds of eager work beyond which to compile, which takes about a minute
RATE = {"cpu": 1e11, "cuda": 1e13}  # FLOP/s of eager work, the order of magnitude
STEP_OVERHEAD = {"cpu": 0.005, "cuda": 0.002}  # seconds of an eager training step beside its FLOP


def compiling_pays(device: torch.device, steps: int, flops: float) -> bool:
    """Whether a command that takes `steps` training steps of `flops` in all should compile them. Follows from the
    settings alone, not from a measurement, so that the same command computes the same numbers."""
    kind = device.type
    return steps * STEP_OVERHEAD[kind] + flops / RATE[kind] > PAYS_FROM[kind]


# --- Work, rate and memory -------------------------------------------------------------------------------------------

GRADIENT, SECOND_ORDER = 3, 9  # forward passes that a gradient and the second-order pass of a step count for
# What a pass needs at its peak, eager and compiled, as a multiple of the saved_bytes of its images. On 2 CPU cores, with
# ConvNets at 32 to 128 pixels, the estimate was 0.98 to 1.24 of the process's peak; compiled experts of CIFAR-10 took 1.8
# times as much, as holes stay in the heap that a CPU process keeps. Not measured on a GPU.
PASS_MEMORY = {"gradient": (3.2, 1), "second order": (7, 2), "test": (1.2, 1.2)}
PROCESS = 500_000_000  # bytes: Python and torch


@functools.cache
def forward_flops(model: str, size: tuple[int, int, int]) -> int:
    """Floating-point operations of a network for (channels, classes, resolution) on one image, those of its convolutions
    and linear layers."""
    channels, _, resolution = size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        networks.build(model, *size).eval()(torch.empty(1, channels, resolution, resolution))
    return counter.get_total_flops()


@functools.cache
def convolution_rate(compute: Compute, rounds: int = 5) -> float:
    """FLOP/s that this machine reaches, in the precision asked for, at the convolution which dominates ConvNet: 128 to
    128 channels, 3x3, at 16x16, 100 images. The yardstick for shares of the peak."""
    device, repeats = compute.device, 1 if compute.device.type == "cpu" else 50  # a GPU needs a fraction of a millisecond
    x, weight = torch.randn(100, 128, 16, 16, device=device), torch.randn(128, 128, 3, 3, device=device)

    def repeated(x, weight):
        for _ in range(repeats):
            y = F.conv2d(x, weight, padding=1)
        return (y,)

    convolve = Compute(device, precision=compute.precision)(repeated)
    seconds = []
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first warms up
            start = clock(device)
            convolve(x, weight)
            seconds.append((clock(device) - start) / repeats)
    return 2 * 100 * 16 * 16 * 128 * 128 * 9 / min(seconds[1:])  # a peak: the fastest


def clock(device: torch.device) -> float:
    """Seconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> int:
    """Bytes in use: what torch holds on a GPU, what is resident of the process on a CPU (its peak, without /proc)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


def use_huge_pages():
    """For large tensors on the CPU. torch reads it at the first tensor of a process: call this before."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


keeps_what_is_freed = False  # this process; one that computes on a GPU does not


def reuse_freed_memory():
    """Has glibc keep what is freed for the next tensor. By default it returns every large tensor to the system, and half
    the time of a training step on the CPU goes into faulting the same pages in again."""
    global keeps_what_is_freed
    keeps_what_is_freed = True
    use_huge_pages()
    _glibc("mallopt", M_MMAP_MAX, 0)
    _glibc("mallopt", M_TRIM_THRESHOLD, -1)  # never give back


@contextlib.contextmanager
def mapped_largest_tensors():
    """Meanwhile tensors of 32 MB and more, the largest threshold that glibc takes, come and go as mappings of their own:
    among the parameters that a student keeps of every step they would leave holes which nothing else fills. It costs a tenth
    of the time, of which experts and evaluations, that keep nothing, are spared. Also a decorator."""
    if not keeps_what_is_freed:  # glibc maps smaller ones too
        yield
        return
    _glibc("mallopt", M_MMAP_THRESHOLD, 32 << 20)
    _glibc("mallopt", M_MMAP_MAX, 65536)  # glibc's default
    try:
        yield
    finally:
        _glibc("mallopt", M_MMAP_MAX, 0)


def return_free_pages():
    """Gives back to the system, after all, what now lies free in glibc's heap: holes that later tensors may not fit."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *args: int):
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to do
        getattr(ctypes.CDLL("libc.so.6"), function)(*args)


@functools.cache
def saved_bytes(model: str, size: tuple[int, int, int]) -> int:
    """Bytes that autograd keeps of a forward pass on one image: the distinct tensors it saves, parameters left out."""
    channels, _, resolution = size
    with torch.device("meta"):
        network, image = networks.build(model, *size), torch.empty(1, channels, resolution, resolution)
    saved = []  # alive, so that no two storages share an address
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage()) or t, lambda t: t):
        output = network(image)  # noqa: F841
    distinct = {storage._cdata: storage.nbytes() for storage in saved}
    return sum(distinct.values()) - sum(distinct.get(p.untyped_storage()._cdata, 0) for p in network.parameters())


@dataclass(frozen=True)
class Pass:
    """What is computed at once: the most memory-hungry of them makes the peak."""

    flag: str  # the one to lower
    kind: str  # of PASS_MEMORY
    model: str
    images: int


def memory_needed(
    size: tuple[int, int, int], passes: list[Pass], kept: tuple[str, int], resident: dict[str, int], compiled: bool = False
) -> tuple[int, str]:
    """An estimate of a command's peak in bytes, and the flag that lowers its largest part:

    max over passes of images x saved_bytes x PASS_MEMORY, + 4 P x (kept + 10) for P parameters, + resident + PROCESS

    size is (channels, classes, resolution); kept the flag and number of vectors of parameters that are kept; resident
    a flag and the bytes of data sets or experts that it lowers.
    """
    with torch.device("meta"):
        parameters = max(sum(p.numel() for p in networks.build(each.model, *size).parameters()) for each in passes)
    costs = {each: int(each.images * saved_bytes(each.model, size) * PASS_MEMORY[each.kind][compiled]) for each in passes}
    largest = max(costs, key=costs.get)
    flag, count = kept
    parts = {largest.flag: costs[largest], flag: 4 * parameters * (count + 10), **resident}
    return sum(parts.values()) + PROCESS, max(parts, key=parts.get)


def machine_memory(device: torch.device) -> int:
    """Bytes a GPU has; on a CPU, what the machine has or the process's control group may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            found.append(int(Path(limit).read_text()))
    return min(found)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def utilisation(compute: Compute, flops: float, seconds: float) -> dict:
    """For metrics: the share of the machine's peak that `flops` in `seconds` reach, and the memory in use."""
    share = flops / seconds / convolution_rate(compute)
    return {"share_of_peak": round(share, 4), "memory_gb": round(memory(compute.device) / 1e9, 3)}


def note(figures: dict) -> str:
    return f"{figures['share_of_peak']:.0%} of peak, {figures['memory_gb']:.2f} GB"
