"""The command line that both scripts share: flags, checked types and how errors are told.

A bad command line or bad input ends with one sentence on stderr and exit code 2, before any work starts.
"""

import argparse
import difflib
import math
import os
import secrets
import sys
from pathlib import Path

import torch

import networks
from performance import COMPILE_MODES, PRECISIONS, Arithmetic
from storage import InputError, RunError
from tracking import Interrupted, say, signals
from utils import SOURCES, SUBSETS, Request, choose_device, parse_strategy

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one sentence for an error, and defaults in the help."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(main):
    """Calls a script's main, and tells an InputError as argparse tells its own; a RunError exits with 1, a signal with
    128 and its number."""
    signals.install()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no name and no ± is worth a run
    try:
        main()
    except (InputError, RunError, OSError, MemoryError, RuntimeError) as error:
        message, code = told(error)
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(code)
    except Interrupted as interrupted:
        say(f"Stopped by {interrupted}.")
        sys.exit(interrupted.exit_code)


def told(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for what ended a script. Raises an error again that is none of the user's."""
    if isinstance(error, (InputError, RunError)):
        return str(error), 2 if isinstance(error, InputError) else 1
    if isinstance(error, OSError) and error.filename is not None:  # what is written raises WriteError
        return f"{error.filename} cannot be used: {error.strerror}.", 2
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return "There is not enough memory for this; lower the sizes, or those of a piece: --micro_batch, --batch_real.", 1
    raise error


# ---------------------------------------------------------------------------------------------------------------------
# Checked types; argparse puts "argument --flag: " before what they raise


def one_of(choices):
    def check(text):
        if text in choices:
            return text
        close = difflib.get_close_matches(text.lower(), {c.lower(): c for c in choices}, 1, 0.5)
        guess = f", did you mean {next(c for c in choices if c.lower() == close[0])}?" if close else ";"
        raise argparse.ArgumentTypeError(f"there is no {text!r}{guess} choose from {', '.join(choices)}")

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
    """A path that the system would take, whether or not there is something."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a path")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {getattr(error, 'strerror', error)}") from error
    return Path(text)


def folder(text) -> Path:
    """A folder that is there or may be made."""
    if path(text).exists() and not path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, where a folder is needed")
    return Path(text)


def file_name(text) -> str:
    if text in ("", ".", "..") or "/" in text or "\0" in text or len(os.fsencode(text)) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a folder: up to 255 bytes, without /")
    return text


def strategy(text):
    try:
        parse_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Flags of both scripts


def add_shared(parser: Parser, batch_real: int, batch_train: int):
    add = parser.add_argument
    add("--dataset", type=one_of(SOURCES), default="CIFAR10", help="data set")
    add("--subset", type=one_of(SUBSETS), default="imagenette", help="classes of --dataset ImageNet")
    add("--model", type=one_of(networks.NETWORKS), default="ConvNet", help="network of experts and student")
    add("--data_path", type=folder, default=Path("datas"), help="where the data set is, or is downloaded to")
    add("--buffer_path", type=folder, default=Path("./buffers"), help="where the experts are")
    add("--res", type=positive_int, help="side in pixels to bring images to (default: the data set's own)")
    add("--zca", action="store_true", help="ZCA whitening in place of normalisation by mean and std")
    add("--batch_real", type=positive_int, default=batch_real, help="real images at a time in test passes")
    add("--batch_train", type=positive_int, default=batch_train, help="images per SGD step of a network's training")
    add("--dsa", type=boolean, default=True, metavar="{True,False}", help="DiffAugment")
    add("--dsa_strategy", type=strategy, default=DSA_STRATEGY, help="operations of DiffAugment, joined by _")
    add("--seed", type=seed, help="of every random draw (default: drawn, printed and stored)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--compile", type=one_of(COMPILE_MODES), default="auto", help="training steps by torch.compile (auto: in long runs)")
    add("--precision", type=one_of(PRECISIONS), default="fp32", help="of experts and evaluated networks")


def request(args) -> Request:
    return Request(args.dataset, args.data_path, args.subset, args.res, args.zca)


def augmentation(args) -> tuple[str, ...]:
    return parse_strategy(args.dsa_strategy) if args.dsa else ()


def device(args) -> torch.device:
    """Where to compute. Raises InputError for a device that is not there, or cannot compute in --precision."""
    found = choose_device(args.device)
    if args.precision == "tf32" and found.type != "cuda":
        raise InputError("--precision tf32 needs a CUDA device; use fp32 or bf16.")
    return found


def arithmetic(args) -> Arithmetic:
    """How networks are trained and tested, once --compile is decided."""
    return Arithmetic(args.compile == "on", args.precision)


def draw_seed() -> int:
    return secrets.randbelow(2**31)


def check_network(name: str, channels: int, classes: int, resolution: int, flag: str = "--model") -> int:
    """The number of parameters. Raises InputError, naming the flag, where it cannot take images of this size."""
    try:
        with torch.device("meta"):
            module = networks.build(name, channels, classes, resolution)
    except ValueError as error:
        raise InputError(f"{flag} {name} cannot be used: {error}.") from error
    return sum(p.numel() for p in module.parameters())
