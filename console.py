"""Between the scripts and the terminal: what is said, progress, signals, errors, and the flags both scripts share.

A bad command line or bad input ends with one sentence on stderr and exit code 2, before any work starts.
"""

import argparse
import contextlib
import difflib
import functools
import math
import os
import secrets
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import networks
from performance import (
    COMPILE_MODES, PRECISIONS, Compute, Pass, compiling_pays, machine_memory, memory_needed, use_huge_pages,
)  # fmt: skip
from storage import InputError, RunError, made_with
from utils import SOURCES, SUBSETS, Canvas, Dataset, Request, choose_device, load_dataset, parse_strategy

# --- What is said ----------------------------------------------------------------------------------------------------


def say(text: str = ""):
    """A line on stdout that does not tear a progress bar."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:  # a full disk, a reader that is gone: the run matters more than what it says
        sys.stdout = open(os.devnull, "w")


class Progress:
    """tqdm's bar on a terminal; elsewhere its line every so often and at the end. With a `group`, it counts what all
    processes do together."""

    EVERY = 30  # seconds
    silent = False

    def __init__(self, total: int, what: str, initial: int = 0, leave: bool = True, group=distributed.ALONE):
        self.leave, self.said, self.shown = leave, time.monotonic(), initial
        self.terminal, self.tally = sys.stderr.isatty() and not self.silent, group.tally()
        self.bar = tqdm(total=total, desc=what, initial=initial, leave=leave, dynamic_ncols=True, disable=False,
                        file=sys.stderr if self.terminal else open(os.devnull, "w"))  # fmt: skip

    def advance(self, note: str):
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(self.tally())
        if not self.terminal and time.monotonic() - self.said >= self.EVERY:
            self._say()

    def _say(self):
        self.said, self.shown = time.monotonic(), self.bar.n
        say(str(self.bar))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None and self.bar.n < self.bar.total:
            self.bar.update(self.bar.total - self.bar.n)  # what others did last
        if not self.terminal and self.leave and self.bar.n > self.shown:
            self._say()
        self.bar.close()


# --- Signals and errors ----------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing but the script's main catches it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """Turns SIGINT and SIGTERM into Interrupted: at once, or at the end of a `held` block."""

    def __init__(self):
        self.number = None
        self.holding = False

    def install(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrived)

    def _arrived(self, number, frame):
        if self.number is None:  # a second signal must not disturb the saving that the first one started
            self.number = number
            if not self.holding:
                raise Interrupted(number)

    @contextlib.contextmanager
    def held(self, holding: bool = True):
        """Signals wait for the end of this block."""
        before, self.holding = self.holding, holding
        try:
            self._raise()
            yield
        finally:
            self.holding = before
        self._raise()

    def released(self):
        """At once within this block, though it is in a held one."""
        return self.held(False)

    def _raise(self):
        if self.number is not None and not self.holding:
            raise Interrupted(self.number)

    def agree(self, group: distributed.Group):
        """Within a held block: raises Interrupted in all processes of a group, where a signal came to any."""
        if number := group.largest(self.number or 0):
            self.number = number  # its own may still be on its way, and must not disturb the saving
            raise Interrupted(number)


signals = Signals()


def run(main):
    """Calls a script's main. An InputError is reported as argparse reports its own and exits with 2; a RunError exits
    with 1, a signal with 128 and its number. Of the processes of a job, the first says what all have to say."""
    signals.install()
    use_huge_pages()
    for said in ("`torch.jit.script", "TensorFloat32 tensor cores"):  # of what is imported, and of what --precision decides
        warnings.filterwarnings("ignore", said)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no name and no ± is worth a run
    group = distributed.ALONE
    try:
        group = distributed.group()
        if not group.is_main:  # another process of the job speaks
            sys.stdout = open(os.devnull, "w")
            Progress.silent = True
        main()
    except (InputError, RunError, OSError, MemoryError, RuntimeError) as error:
        message, code = describe_error(error)
        fail(Path(sys.argv[0]).name, message, code, group)
    except Interrupted as interrupted:
        say(f"Stopped by {interrupted}.")
        sys.exit(interrupted.exit_code)
    finally:
        group.leave()


def fail(script: str, message: str, code: int, group: distributed.Group):
    """Ends the process with a sentence, which one of the group's processes says."""
    if group.first_to_say(message):
        print(f"{script}: error: {message}", file=sys.stderr)
    sys.exit(code)


def describe_error(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for what ended a script. An error of the program itself is raised again."""
    if isinstance(error, (InputError, RunError)):
        return str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, OSError) and error.filename is not None:  # what is written raises WriteError
        return f"{error.filename} cannot be used: {error.strerror}.", 2
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return "There is not enough memory for this; lower --micro_batch, --batch_train or --batch_real.", 1
    raise error


GROUPS = "data", "experts", "method", "evaluation", "run", "speed and memory"  # of flags, as --help shows them


class HelpFormatter(argparse.HelpFormatter):
    """Says of each flag what it takes and its default; few choices stand at the flag, many after its help."""

    FEW = 40  # characters

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        choices = f"{{{','.join(getattr(action.type, 'choices', ()))}}}"
        return METAVARS.get(action.type) or (choices if 2 < len(choices) < self.FEW else action.dest.upper())

    def _get_help_string(self, action):
        choices = getattr(action.type, "choices", ())
        many = f". One of {', '.join(choices)}" if len(",".join(choices)) > self.FEW else ""
        unsaid = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return (action.help + ("" if unsaid else f" (default: {action.default})") + many).replace("%", "%%")

    def _fill_text(self, text, width, indent):
        parts = text.strip("\n").split("\n\n")  # an indented one stays as it is
        return "\n\n".join(p if p[0] == " " else super(HelpFormatter, self)._fill_text(p, width, indent) for p in parts)


class Gone(argparse.Action):
    """A flag of the published scripts without a use here."""

    def __call__(self, parser, namespace, values, option_string=None):
        say_gone(option_string)


@functools.cache  # once, though a command that goes on with a run is parsed twice
def say_gone(flag: str):
    say(f"{flag}, a flag of the published scripts, does nothing here and may be left out.")


class Parser(argparse.ArgumentParser):
    """argparse with one sentence for an error, and in its help groups of flags, defaults and an example."""

    def __init__(self, description: str, example: str):
        epilog = f"An example:\n\n{example}"
        super().__init__(usage="python %(prog)s [flags]", description=description, epilog=epilog,
                         formatter_class=HelpFormatter, allow_abbrev=False)  # fmt: skip
        groups = {title: self.add_argument_group(title) for title in GROUPS}
        self.adders = {title: group.add_argument for title, group in groups.items()}
        for flag in ("--lr_init", "--save_interval"):
            self.add_argument(flag, action=Gone, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message):
        unknown, _, flag = message.partition("unrecognized arguments: ")
        if not unknown and (close := difflib.get_close_matches(flag.partition("=")[0], self._option_string_actions, 1)):
            message += f", did you mean {close[0]}?"
        fail(self.prog, message, 2, distributed.group())


# --- Types of flags --------------------------------------------------------------------------------------------------
# argparse puts "argument --flag: " before what they raise


def one_of(choices):
    def check(text):
        if text not in choices:
            lower = {choice.lower(): choice for choice in choices}
            close = difflib.get_close_matches(text.lower(), lower, 1, 0.5)
            guess = f", did you mean {lower[close[0]]}?" if close else ";"
            raise argparse.ArgumentTypeError(f"there is no {text!r}{guess} choose from {', '.join(choices)}")
        return text

    check.choices = tuple(choices)  # for the help
    return check


def _number(convert, kind, low, low_allowed, high=math.inf):
    bound = f"{'at least' if low_allowed else 'above'} {low}" + (f" and at most {high}" if high < math.inf else "")

    def check(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high or (low_allowed and value == low)) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {bound}")
        return value

    return check


LARGEST = 10**9  # of any count: what is beyond only fills memory, or overflows in torch
positive_int = _number(int, "a whole number", 1, True, LARGEST)
natural = _number(int, "a whole number", 0, True, LARGEST)
seed = _number(int, "a whole number", 0, True, 2**63 - 1)
positive = _number(float, "a finite number", 0, False)
not_negative = _number(float, "a finite number", 0, True)
share = _number(float, "a number", 0, True, 1)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def path(text) -> Path:
    """Something or nothing, but a name that the system would take."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a path")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {getattr(error, 'strerror', error)}") from error
    return Path(text)


def folder(text) -> Path:
    """A folder that is there or may be made."""
    if path(text).exists() and not path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, where a folder is needed")
    return Path(text)


def new_folder(text) -> Path:
    """A folder that may be made, or is empty."""
    if folder(text).is_dir() and any(Path(text).iterdir()):
        raise argparse.ArgumentTypeError(f"{text!r} holds something already; name a new or an empty folder")
    return Path(text)


def first_images(text) -> str | Path:
    """real, noise, or a path."""
    return text if text in ("real", "noise") else path(text)


def file_name(text) -> str:
    if text in ("", ".", "..") or "/" in text or len(os.fsencode(text)) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a folder: up to 255 bytes, without /")
    return text


def strategy(text):
    try:
        parse_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


METAVARS = {  # what the help shows a type to take
    **dict.fromkeys((positive_int, natural, seed), "N"),
    **dict.fromkeys((positive, not_negative, share), "X"),
    boolean: "{True,False}",
    path: "PATH",
    folder: "FOLDER",
    new_folder: "FOLDER",
    first_images: "{real,noise,PATH}",
    file_name: "NAME",
    strategy: "NAMES",
}

# --- Flags of both scripts -------------------------------------------------------------------------------------------

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


def add_shared(parser: Parser, batch_real: int):
    add = parser.adders["data"]
    add("--dataset", type=one_of(SOURCES), default="CIFAR10", help="data set; Folder is of your own images")
    add("--subset", type=one_of(SUBSETS), default="imagenette", help="classes of --dataset ImageNet")
    add("--data_path", type=folder, default=Path("datas"), help="where the data set is, or is downloaded to")
    add("--res", type=positive_int, help="side in pixels to bring images to (default: the data set's own)")
    add("--zca", action="store_true", help="ZCA whitening in place of normalisation by mean and std")
    add("--dsa", type=boolean, default=True, help="DiffAugment: images are augmented at random in training")
    add("--dsa_strategy", type=strategy, default=DSA_STRATEGY, help="operations of DiffAugment, joined by _")
    add = parser.adders["experts"]
    add("--model", type=one_of(networks.NETWORKS), default="ConvNet", help="network of experts and student")
    add("--buffer_path", type=folder, default=Path("./buffers"), help="where the experts are")
    add = parser.adders["run"]
    add("--seed", type=seed, help="of every random draw (default: drawn, printed and stored)")
    add("--device", default="auto", help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")
    add = parser.adders["speed and memory"]
    add("--compile", type=one_of(COMPILE_MODES), default="auto", help="torch.compile training steps; auto: in long runs")
    add("--precision", type=one_of(PRECISIONS), default="auto",
        help="of experts and evaluated networks; auto: as PyTorch chooses, which on GPUs is TF32 in convolutions")
    add("--micro_batch", type=positive_int, help="compute a step in chunks of this many images (default: all at once)")
    add("--batch_real", type=positive_int, default=batch_real, help="real images at a time in test passes")


# --- What flags come to ----------------------------------------------------------------------------------------------


def request(args) -> Request:
    return Request(args.dataset, args.data_path, args.subset, args.res, args.zca)


def augmentation(args) -> tuple[str, ...]:
    return parse_strategy(args.dsa_strategy) if args.dsa else ()


def of_experts(args) -> dict:
    """Flag to value of those by which either script finds the experts."""
    subset = ("subset",) if args.dataset == "ImageNet" else ()
    return {k: vars(args)[k] for k in ("dataset", *subset, "res", "zca", "model", "data_path", "buffer_path")}


def tiles(args) -> int:
    """Side of a synthetic image in images."""
    return args.canvas_size if args.texture else 1


def canvas(args, dataset: Dataset) -> Canvas | None:
    return Canvas(dataset.resolution, args.canvas_size, args.canvas_samples) if args.texture else None


def device(args) -> torch.device:
    """Where to compute. Raises InputError for a device that is not there, or that cannot compute in the precision."""
    found = choose_device(args.device)
    if args.device.startswith("cuda:") and distributed.group().on_node > 1:
        raise InputError(f"--device {args.device} would be that of every process here; leave it out: each takes its own.")
    for flag, others in {"precision": "auto, fp32 or bf16", "student_precision": "fp32"}.items():
        if getattr(args, flag, None) == "tf32" and found.type != "cuda":
            raise InputError(f"--{flag} tf32 needs a CUDA device; use {others}.")
    return found


# where a process computes, not what
OF_A_PROCESS = "device", "data_path", "buffer_path", "save_dir"


def require_same_command(group: distributed.Group, args):
    """Raises InputError where the processes of a job were not given the same command, or not the same code."""
    settings = {f"--{name}": value for name, value in vars(args).items() if name not in OF_A_PROCESS}
    group.require_same(settings | {f"version of {part}": v for part, v in made_with().items()}, "command and code")


def dataset(group: distributed.Group, request: Request, transform=None) -> Dataset:
    """As `load_dataset`, once on every node before the node's other processes, which find it in the cache; all see it
    through the same transform: two machines fit a whitening with other rounding."""
    with group.one_per_node_first():
        found = load_dataset(request, transform)
    # means and deviations are measured on what two machines may decode to slightly different pixels
    group.require_same({k: v for k, v in found.identity.items() if k != "normalisation"}, "data in --data_path")
    return replace(found, transform=group.from_main(lambda: found.transform))


def resolve(args, group: distributed.Group, device, stored: dict, steps: int, flops: float) -> argparse.Namespace:
    """Settings with seed and compile filled in. Each comes from the command, or else from `stored`, the settings of a run
    that goes on. Else the seed is drawn, and whether to compile follows from the training steps and their FLOP."""
    pays = "on" if compiling_pays(device, steps, flops) else "off"
    filled = {
        "seed": stored.get("seed", group.from_main(secrets.randbelow, 2**31)) if args.seed is None else args.seed,
        "compile": stored.get("compile", pays) if args.compile == "auto" else args.compile,
    }
    return argparse.Namespace(**vars(args) | filled)


# --- Flags against the data. Each raises InputError. -----------------------------------------------------------------


def check_network(args, size: tuple[int, int, int]) -> int:
    """The number of parameters of --model for (channels, classes, resolution), which it must be able to take."""
    module = _on_meta("--model", args.model, size)
    if args.micro_batch and networks.has_batch_statistics(module):
        raise InputError(f"--micro_batch cannot be used with {args.model}, which normalises over the whole batch.")
    return sum(p.numel() for p in module.parameters())


def chunk_flag(args, size: tuple[int, int, int], batch: str) -> str:
    """The flag that lowers the images a step computes at once."""
    return batch if networks.has_batch_statistics(_on_meta("--model", args.model, size)) else "--micro_batch"


def check_pool(args, models: list[str], size: tuple[int, int, int]):
    for model in models:
        _on_meta(f"--eval_mode {args.eval_mode}: network", model, size)


def check_memory(compute: Compute, size: tuple[int, int, int], passes: list[Pass], kept: tuple[str, int], resident: dict):
    """Says about how much memory a command needs (see memory_needed), which must not be far beyond what there is."""
    needed, flag = memory_needed(size, passes, kept, resident, compute.compile)
    there = machine_memory(compute.device)
    if compute.device.type == "cpu":  # which all processes of a node share
        needed *= distributed.group().on_node
    if needed / 1.3 > there:  # it is an estimate
        raise InputError(f"About {needed / 1e9:.1f} GB of memory would be needed, of {there / 1e9:.1f} GB; lower {flag}.")
    say(f"About {needed / 1e9:.1f} GB of memory of {there / 1e9:.0f} GB will be needed")


def _on_meta(flag: str, model: str, size: tuple[int, int, int]) -> torch.nn.Module:
    try:
        with torch.device("meta"):
            return networks.build(model, *size)
    except ValueError as error:
        raise InputError(f"{flag} {model} cannot be used: {error}.") from error


def check_set(args, dataset: Dataset):
    """Whether there are images enough for the synthetic set that the command names."""
    for name, count in zip(dataset.classes, dataset.train.labels.bincount(minlength=len(dataset.classes)).tolist()):
        if count < args.ipc:
            raise InputError(f"Class {name} has {count} training images, fewer than --ipc {args.ipc} asks for.")
    total = args.ipc * len(dataset.classes)
    if args.batch_syn and args.batch_syn > total:
        raise InputError(f"--batch_syn {args.batch_syn} is more than the {total} synthetic images.")
