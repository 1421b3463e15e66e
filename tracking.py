"""What a person sees of a run: console, metrics.jsonl, wandb, and pictures."""

import contextlib
import importlib.util
import json
import netrc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import storage
from storage import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Console


def say(text: str = ""):
    """A line on stdout that does not tear a progress bar."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:  # a full disk, a reader that is gone: the run matters more than what it says
        sys.stdout = open(os.devnull, "w")


class Progress:
    """A progress bar with ETA on a terminal; elsewhere a plain line every `every` seconds and at the end."""

    def __init__(self, total: int, what: str, initial: int = 0, leave: bool = True, every: float = 30):
        self.total, self.what, self.leave, self.every = total, what, leave, every
        self.n = self.initial = initial
        self.start = self.last = time.monotonic()
        self.ahead = 0.0
        self.note = ""
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=what, initial=initial, leave=leave, dynamic_ncols=True)

    def advance(self, note: str = ""):
        self.n += 1
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.last >= self.every:
            self._line()

    def interlude(self, seconds: float, more: int):
        """Something else took `seconds` and will `more` times: it counts for what is left, not for the pace."""
        self.start += seconds
        self.ahead = seconds * more
        if self.bar is not None:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def _line(self):
        self.last = time.monotonic()
        pace = (self.last - self.start) / max(1, self.n - self.initial)
        left = tqdm.format_interval(pace * (self.total - self.n) + self.ahead)
        note = f", {self.note}" if self.note else ""
        rate = f"{pace:.3g} s each" if pace > 1 else f"{1 / max(pace, 1e-9):.3g} a second"
        say(f"{self.what}: {self.n}/{self.total}, {rate}, {left} left{note}")

    def close(self):
        if self.bar is not None:
            self.bar.close()
        elif self.leave and self.n > self.initial:
            self._line()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing but the script's main catches it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """Turns SIGINT and SIGTERM into Interrupted, at once, or at the end of a `held` block."""

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
    def held(self):
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.number is not None:
            raise Interrupted(self.number)


signals = Signals()

# ---------------------------------------------------------------------------------------------------------------------
# Metrics and wandb

WANDB_PROJECT = "ATT"
WANDB_MODES = ("auto", "online", "offline", "disabled")


def logged_in_to_wandb() -> bool:
    """Whether wandb would find credentials without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


def wandb_mode(asked: str) -> str:
    """`auto` becomes what WANDB_MODE says, else online where logged in and disabled elsewhere. Raises InputError where
    wandb is asked for and not installed."""
    installed = importlib.util.find_spec("wandb") is not None
    if asked in ("online", "offline") and not installed:
        raise InputError(f"--wandb {asked} needs wandb, which is not installed: pip install wandb.")
    if asked != "auto":
        return asked
    if not installed:
        say("wandb is off: it is not installed; pip install wandb, or pass --wandb disabled.")
        return "disabled"
    if os.environ.get("WANDB_MODE") in WANDB_MODES[1:]:
        return os.environ["WANDB_MODE"]
    if not logged_in_to_wandb():
        say("wandb is off: log in with `wandb login` (https://wandb.ai/authorize), or pass --wandb offline.")
        return "disabled"
    return "online"


class Tracker:
    """Appends to metrics.jsonl and mirrors to wandb. wandb failing costs a warning, never the run."""

    def __init__(self, folder: Path, mode: str, name: str, config: dict, resume: dict | None = None):
        """`resume`: what `state()` returned; lines written after that are cut off, and the wandb run goes on."""
        self.path = folder / "metrics.jsonl"
        kept = resume["metrics_bytes"] if resume else 0
        if kept and (not self.path.is_file() or self.path.stat().st_size < kept):
            raise InputError(f"{self.path} lacks lines that the checkpoint beside it knows of; restore it.")
        with storage.writing(self.path):
            self.file = open(self.path, "r+b" if kept else "wb", buffering=0)
            self.file.truncate(kept)
            self.file.seek(kept)
        read_metrics(self.path)
        self.run_id = resume.get("wandb_id") if resume else None
        self.wandb = self.run = None
        if mode != "disabled":
            self._start_wandb(folder, mode, name, config)

    def _start_wandb(self, folder, mode, name, config):
        with self._guard():
            import wandb

            self.run = wandb.init(
                project=WANDB_PROJECT, name=name, config=config, mode=mode, dir=str(folder), id=self.run_id,
                resume="allow" if self.run_id else None,
            )  # fmt: skip
            self.run_id = self.run.id
            self.wandb = wandb

    @contextlib.contextmanager
    def _guard(self):
        try:
            yield
        except (Exception, SystemExit) as error:  # anything wandb raises: it is a mirror, the run is the original
            self.run = None
            say(f"Warning: wandb failed and is off for the rest of this run ({type(error).__name__}: {error}).")

    def state(self) -> dict:
        with storage.writing(self.path):
            os.fsync(self.file.fileno())
        return {"metrics_bytes": self.file.tell(), "wandb_id": self.run_id}

    def _write(self, line: dict):
        rest = (json.dumps(line) + "\n").encode()
        with storage.writing(self.path):
            while rest:  # a disk that is filling up takes a part, and refuses only the rest
                rest = rest[self.file.write(rest) :]

    def _mirror(self, iteration: int, values: dict | Callable):
        """Values, or a function from the wandb module to them, so that making them is guarded too."""
        if self.run is not None:
            with self._guard():
                self.run.log(values(self.wandb) if callable(values) else values, step=iteration)

    def iteration(self, **line):
        """One update: the keys of a line of metrics.jsonl; JSON has no NaN, so a non-finite loss is null."""
        finite = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in line.items()}
        self._write(finite)
        names = {
            "grand_loss": "Grand_Loss",
            "start_epoch": "Start_Epoch",
            "syn_lr": "Synthetic_LR",
            "match_step": "Match_Step",
            "skipped": "Skipped_Updates",
            "lr_rejected": "Rejected_LR_Updates",
            "seconds": "Seconds",
            "share_of_peak": "Share_of_Peak",
            "memory_gb": "Memory_GB",
        }
        shown = {names[k]: v for k, v in finite.items() if k in names and v is not None}
        self._mirror(line["iteration"], {"Progress": line["iteration"], **shown})

    def evaluation(self, iteration: int, model: str, variant: str, accuracy, best):
        """accuracy, best: of this evaluation and the highest so far, with `mean`, `std` and `accs`."""
        self._write({
            "iteration": iteration,
            "eval": {
                "model": model, "variant": variant,
                "mean": accuracy.mean, "std": accuracy.std, "accs": accuracy.accs,
            },
        })  # fmt: skip
        prefix = PREFIX[variant]
        self._mirror(
            iteration,
            {
                f"{prefix}Accuracy/{model}": accuracy.mean,
                f"{prefix}Std/{model}": accuracy.std,
                f"{prefix}Max_Accuracy/{model}": best.mean,
                f"{prefix}Max_Std/{model}": best.std,
            },
        )

    def pixels(self, iteration: int, images: Tensor):
        self._mirror(iteration, lambda wandb: {"Pixels": wandb.Histogram(images)})

    def pictures(self, iteration: int, images: Tensor, classes: int, name: str, variant: str):
        """Histogram and grids of images (N,C,H,W), grouped by class; `name` "Synthetic" or "Reconstructed"."""
        prefix = PREFIX[variant]

        def values(wandb):
            clipped = images.clamp(images.mean() - 2.5 * images.std(), images.mean() + 2.5 * images.std())
            return {
                f"{prefix}{name}_Pixels": wandb.Histogram(images),
                f"{prefix}{name}_Images": wandb.Image(_stretched(tile(images, classes))),
                f"{prefix}Clipped_{name}_Images/std_2.5": wandb.Image(_stretched(tile(clipped, classes))),
            }

        self._mirror(iteration, values)

    def close(self):
        self.file.close()
        if self.run is not None:
            with self._guard():
                self.run.finish(quiet=True)


PREFIX = {"raw": "", "ema": "ema_"}  # names in wandb and of files

# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def tile(images: Tensor, rows: int) -> Tensor:
    """(rows * k, C, H, W) to one picture (H', W', C), a row of k each, a pixel of black between."""
    n, c, h, w = images.shape
    cells = torch.nn.functional.pad(images, (0, 1, 0, 1))
    return cells.view(rows, n // rows, c, h + 1, w + 1).permute(0, 3, 1, 4, 2).reshape(rows * (h + 1), -1, c)


def _stretched(picture: Tensor):
    """As uint8, lowest value black and highest white."""
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low).clamp(min=1e-8) * 255).byte().squeeze(-1).numpy()


def save_figure(path: Path, figure):
    with storage.atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # shown as a box
        figure.savefig(temporary, format="png", dpi=100)


PITCH = 1.12  # from row to row of a grid, in heights of an image


def grid(path: Path, images: Tensor, classes: list[str], title: str):
    """The images in [0, 1], (classes * ipc, C, H, W) grouped by class, as a PNG: a labelled row for each class.

    Where there are more classes than fit a square, the rows go on in further columns.
    """
    from matplotlib.figure import Figure

    ipc = len(images) // len(classes)
    classes = [name.encode(errors="replace").decode() for name in classes]  # names of folders need not be text
    images = images.clamp(0, 1).cpu().unflatten(0, (len(classes), ipc))
    # blocks side by side, so that the whole is about as wide as high
    blocks = max(1, round((len(classes) / (ipc + 1)) ** 0.5))
    rows = -(-len(classes) // blocks)
    cell = min(1.0, 14 / max(rows, blocks * (ipc + 1)))  # inches
    longest = max(map(len, classes))
    font = max(4, min(11, cell * 24))
    label = longest * font * 0.0085 + 0.12  # inches
    width, height = max(4.5, blocks * (label + cell * ipc + 0.1) + 0.1), rows * cell * PITCH + 0.45
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top")
    for i, (name, row) in enumerate(zip(classes, images)):
        block, line = divmod(i, rows)
        strip = tile(row, 1)[:-1, :-1]
        left = block * (width / blocks) + label
        bottom = height - 0.45 - (line + 1) * cell * PITCH
        axes = figure.add_axes((left / width, bottom / height, cell * ipc / width, cell / height))
        axes.imshow(strip.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.text(
            -0.06 / ipc, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=font, parse_math=False
        )  # fmt: skip
    save_figure(path, figure)


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The lines of metrics.jsonl: iterations, and evaluations. Raises InputError naming a damaged line."""
    updates, evaluations = [], []
    for number, text in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            result = line.get("eval")
            sound = isinstance(line["iteration"], int) and (result is None or EVALUATED <= result.keys())
        except (ValueError, LookupError, AttributeError):
            sound = False
        if not sound:
            raise InputError(f"{path} line {number} is damaged; restore the file.")
        (updates if result is None else evaluations).append(line)
    return updates, evaluations


EVALUATED = {"model", "variant", "mean", "std"}


def curves(path: Path, metrics: Path):
    """Grand loss, matched step, synthetic lr and accuracy over iterations, from metrics.jsonl."""
    from matplotlib.figure import Figure

    updates, evaluations = read_metrics(metrics)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    panels = {"grand_loss": "grand loss", "match_step": "matched step", "syn_lr": "synthetic learning rate"}
    for panel, (key, name) in zip(axes, panels.items()):
        points = [(line["iteration"], line[key]) for line in updates if line.get(key) is not None]
        if points:
            noisy = key != "syn_lr"
            panel.plot(*zip(*points), ".", markersize=2, alpha=0.4) if noisy else panel.plot(*zip(*points))
            if noisy and len(points) >= 20:
                panel.plot(*zip(*running_mean(points, len(points) // 20)), linewidth=2, label="running mean")
                panel.legend()
        panel.set(title=name, xlabel="iteration")
        panel.ticklabel_format(useOffset=False)
    by_curve = {}
    for line in evaluations:
        result = line["eval"]
        by_curve.setdefault((result["model"], result["variant"]), []).append(
            (line["iteration"], 100 * result["mean"], 100 * result["std"])
        )
    panel = axes[3]
    for (model, variant), points in by_curve.items():
        x, mean, std = zip(*points)
        panel.errorbar(x, mean, std, label=f"{model}, {variant}", capsize=2, marker="o", markersize=3)
    panel.set(title="test accuracy (%)", xlabel="iteration")
    if by_curve:
        panel.legend()
    save_figure(path, figure)


def running_mean(points: list[tuple], window: int) -> list[tuple]:
    """Means of `window` consecutive values, each at the middle of its window."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    total = torch.nn.functional.pad(y.cumsum(0), (1, 0))
    means = (total[window:] - total[:-window]) / window
    return list(zip(x[window // 2 :][: len(means)].tolist(), means.tolist()))
