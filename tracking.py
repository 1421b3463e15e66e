"""What a run leaves behind: its folder, checkpoint and resuming, best files, metrics, wandb, pictures, closing table."""

import contextlib
import importlib.util
import json
import netrc
import os
import shlex
import sys
import warnings
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import storage
from evaluation import Accuracy, Baseline, evaluation_recipe
from storage import InputError
from utils import SOURCES, Dataset, parse_strategy

PREFIX = {"raw": "", "ema": "ema_"}  # of files and of names in wandb

# --- Resuming --------------------------------------------------------------------------------------------------------


# settings that say where and how a run is computed and how far it goes, not what it is
FREE = set("resume run_name wandb device compile save_dir data_path buffer_path Iteration max_files".split())
# what may change on the way, because images and synthetic lr do not depend on it
MAY_CHANGE = set("eval_it num_eval epoch_eval_train batch_real force_save baseline_draws max_bad_steps ckpt_it".split())
AFTER_DIVERGENCE = {"lr_img", "lr_lr"}


def settings_of(args) -> dict:
    """The settings of a command as plain values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def read_checkpoint(folder: Path) -> dict:
    """Raises InputError where the folder is none of a run."""
    if not (folder / "checkpoint.pt").is_file():
        raise InputError(f"--resume {folder} is no folder of a run: it has no checkpoint.pt.")
    return storage.load(folder / "checkpoint.pt", "checkpoint")


def resume(args, runs: Path) -> tuple[Path | None, dict | None, dict]:
    """The folder, the checkpoint and the changed settings of the run that --resume means, a folder or `auto`, in which
    case there may be none among `runs`. Raises InputError where a new run would take the name of one."""
    settings = settings_of(args)
    if args.resume is None:
        if args.run_name and (runs / args.run_name / "checkpoint.pt").exists():
            folder = runs / args.run_name
            remedy = f"go on with it by --resume {folder}, or take another --run_name"
            raise InputError(f"{folder} holds a run already; {remedy}.")
        return None, None, {}
    folder = find_run(runs, settings) if args.resume == Path("auto") else args.resume
    if folder is None:
        return None, None, {}
    checkpoint = read_checkpoint(folder)
    return folder, checkpoint, changes_since(checkpoint, settings, folder / "checkpoint.pt")


def find_run(runs: Path, settings: dict) -> Path | None:
    """The latest run in the folder `runs` that has the name which the settings say, or where they say none, is
    unfinished and has just these settings."""
    found = []
    for path in runs.glob("*/checkpoint.pt"):
        with contextlib.suppress(InputError):  # another run's damage is not this one's
            checkpoint = read_checkpoint(path.parent)
            changes = changes_since(checkpoint, settings, path)
            unfinished = checkpoint["state"]["iteration"] <= settings["Iteration"] and not changes
            if path.parent.name == settings["run_name"] or (settings["run_name"] is None and unfinished):
                found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def changes_since(checkpoint: dict, settings: dict, path: Path) -> dict[str, list]:
    """What changes when a run goes on with these settings: name to [before, now]. Raises InputError for what must not."""
    stored = checkpoint["settings"]
    may = MAY_CHANGE | (AFTER_DIVERGENCE if checkpoint["state"]["bad_steps"] else set())
    said = {k: v for k, v in settings.items() if k not in FREE and not (k == "seed" and v is None)}
    storage.require_same(path, stored, {k: v for k, v in said.items() if k not in may})
    return {k: [stored[k], v] for k, v in said.items() if stored[k] != v}


def check_resumed(folder: Path, checkpoint: dict, dataset: Dataset, experts: list[storage.Expert]) -> list[str]:
    """Raises InputError where a run would go on with other data or other experts than it began with. Returns what could
    not be checked, as sentences."""
    remedy = "; give it the data in --data_path it began with"
    storage.require_same(folder / "checkpoint.pt", checkpoint["identity"], dataset.identity, remedy)
    if checkpoint["experts"] != storage.fingerprint(experts):
        remedy = "restore them, or choose as many with --max_files as there were"
        raise InputError(f"{folder} began with other experts than are in --buffer_path now; {remedy}.")
    return storage.on_trust(folder / "checkpoint.pt", checkpoint["identity"])


# --- The folder of a run ---------------------------------------------------------------------------------------------


class Run:
    """A folder and what a run writes there. `state` in its methods is all that changes in a run, a dataclass of tensors
    and plain values; it has `iteration`, `syn_lr` and `variants()`, a dict from "raw" and "ema" to images."""

    def __init__(
        self, folder: Path, settings: dict, dataset: Dataset, labels: Tensor, models: list[str], experts: list, warn,
        unchecked: list[str] = (),
    ):  # fmt: skip
        self.folder, self.settings, self.dataset, self.labels = folder, settings, dataset, labels
        self.models, self.experts = models, storage.fingerprint(experts)
        self.config = settings | {"made_with": storage.made_with(), "command": shlex.join(sys.argv)}
        self.unchecked = list(unchecked)  # what it was given and could not be checked, as sentences
        self.best, self.last = {}, {}  # "variant/model" -> mean, std, accs, iteration, syn_lr
        self.tracker = Tracker(folder, warn)

    @contextlib.contextmanager
    def open(self, state, checkpoint: dict | None = None, changes: dict | None = None):
        """Writes within this block, going on where `checkpoint` ended; other processes are kept out of the folder."""
        with storage.locked(self.folder):
            if checkpoint:
                self.best, self.last = checkpoint["results"]["best"], checkpoint["results"]["last"]
            self.tracker.open(self.settings["wandb"], self.config, checkpoint["tracker"] if checkpoint else None)
            try:
                if not checkpoint:
                    self.checkpoint(state)  # from now on the run can be resumed, and its folder counts as one
                if not checkpoint or not (self.folder / "transform.pt").exists():
                    storage.save_transform(self.folder, self.dataset.transform.state(), self.dataset.identity)
                self._write_config(state.iteration, changes)
                yield self
            finally:
                self.tracker.close()

    def _write_config(self, iteration: int, changes: dict | None):
        path = self.folder / "config.json"
        if path.exists() and not changes and not self.unchecked:
            return
        config = storage.load_json(path) if path.exists() else self.config
        config["unchecked"] = list(dict.fromkeys([*config.get("unchecked", []), *self.unchecked]))
        if changes:
            config = config | {"changes": [*config.get("changes", []), {"iteration": iteration} | changes]}
        storage.save_json(path, config)

    def checkpoint(self, state):
        content = {"settings": self.settings, "identity": self.dataset.identity, "experts": self.experts}
        content["state"] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(state).items()}
        content |= {"results": {"best": self.best, "last": self.last}, "tracker": self.tracker.state()}
        storage.save(self.folder / "checkpoint.pt", "checkpoint", content)

    def record(self, state, results: dict[tuple[str, str], Accuracy]) -> list[str]:
        """Metrics, best files and pictures of one evaluation, (variant, network) to accuracy. Returns a line on each."""
        it, lines = state.iteration, []
        for (variant, model), accuracy in results.items():
            key = f"{variant}/{model}"
            self.last[key] = asdict(accuracy) | {"iteration": it, "syn_lr": state.syn_lr}
            improved = key not in self.best or accuracy.mean > self.best_accuracy(variant, model).mean
            if improved:
                self.best[key] = self.last[key]
            self.tracker.evaluation(it, model, variant, accuracy, self.best_accuracy(variant, model))
            lines.append(f"Iteration {it}: {variant} {model} {accuracy}" + (", best so far" if improved else ""))
            if model == self.models[0]:
                if improved:
                    self._save_best(state, variant)
                if improved or it % 1000 == 0:
                    self._save_images(state, variant, str(it))
        return lines

    def best_accuracy(self, variant: str, model: str) -> Accuracy:
        return Accuracy(self.best[f"{variant}/{model}"]["accs"])

    def best_variant(self) -> str:
        """The variant with the highest accuracy so far on the pool's first network."""
        found = [variant for variant in PREFIX if f"{variant}/{self.models[0]}" in self.best]
        return max(found, key=lambda variant: self.best_accuracy(variant, self.models[0]).mean)

    def best_lr(self) -> float:
        """The synthetic lr that was evaluated best."""
        return self.best[f"{self.best_variant()}/{self.models[0]}"]["syn_lr"]

    def _save_tensors(self, state, variant: str, name: str):
        named = {"images": state.variants()[variant], "labels": self.labels, "lr": torch.tensor(state.syn_lr)}
        for kind, tensor in named.items():
            storage.save_tensor(self.folder / f"{PREFIX[variant]}{kind}_{name}.pt", tensor)

    def _save_images(self, state, variant: str, name: str):
        self._save_tensors(state, variant, name)
        images, classes = state.variants()[variant].cpu(), len(self.dataset.classes)
        if variant == "raw":
            self.tracker.pixels(state.iteration, images)
        shown = self.settings["ipc"] < 50 or self.settings["force_save"]
        if shown:
            self.tracker.pictures(state.iteration, images, classes, "Synthetic", variant)
        if self.settings["zca"]:
            undone = self.dataset.transform.undo(images)
            storage.save_tensor(self.folder / f"{PREFIX[variant]}images_zca_{name}.pt", undone)
            if shown:
                self.tracker.pictures(state.iteration, undone, classes, "Reconstructed", variant)

    def _save_best(self, state, variant: str):
        """The files of a variant that has just been evaluated best, and the better of the two as one usable file."""
        self._save_tensors(state, variant, "best")
        if self.best_variant() != variant:
            return
        images, model = state.variants()[variant].detach().cpu().clone(), self.models[0]
        accuracy, transform = self.best_accuracy(variant, model), self.dataset.transform
        pixels = transform.undo(images)
        content = {
            "images": images,
            "pixels": pixels,  # the same on the scale of [0, 1], which distilled images may leave
            "labels": self.labels.cpu(),
            "syn_lr": state.syn_lr,
            "variant": variant,
            "iteration": state.iteration,
            "accuracy": {"model": model, "mean": accuracy.mean, "std": accuracy.std, "accs": accuracy.accs},
            "ipc": self.settings["ipc"],
            "classes": self.dataset.classes,
            "transform": transform.summary(),
            "identity": self.dataset.identity,
            "config": self.config,
        } | recipe_of(self.settings, self.dataset, state.syn_lr)
        storage.save(self.folder / "synthetic_best.pt", "synthetic", content)
        title = f"{self.dataset.name}, {self.settings['ipc']} per class ({variant}): {accuracy} % with {model}"
        grid(self.folder / "grid_best.png", pixels, self.dataset.classes, title)

    def draw_curves(self):
        curves(self.folder / "curves.png", self.folder / "metrics.jsonl")

    def table(self, baselines: dict[str, Baseline]) -> str:
        """The closing table."""
        ipc, draws = self.settings["ipc"], self.settings["baseline_draws"]
        said = f"{self.settings['num_eval']} networks each, {len(self.labels)} images, {ipc} per class"
        lines = [f"Test accuracy (%), {said}", ROW.format("network", "images", "best", "last")]
        for model in self.models:
            for variant in PREFIX:
                last = Accuracy(self.last[f"{variant}/{model}"]["accs"])
                lines.append(ROW.format(model, f"distilled, {variant}", f"{self.best_accuracy(variant, model)}", f"{last}"))
            if model in baselines:
                lines.append(baseline_row(model, baselines[model], draws))
        lines.append("Best is the best of the evaluations on test data, as the field reports it; last is the last one's.")
        return "\n".join(lines)


def recipe_of(settings: dict, dataset: Dataset, lr: float) -> dict:
    """How a set is to be used: the network, how it is trained, and how real and synthetic images are shown to it."""
    recipe = evaluation_recipe(settings["epoch_eval_train"], settings["batch_train"])
    augmentation = parse_strategy(settings["dsa_strategy"]) if settings["dsa"] else ()
    schedule = "after drop_after epochs, the lr is divided by 10 and the momentum starts from zero"
    canvas = {"size": settings["canvas_size"], "samples": settings["canvas_samples"]} if settings["texture"] else None
    return {
        "network": dict(zip(("name", "channels", "classes", "resolution"), (settings["model"], *dataset.size))),
        "evaluation": asdict(recipe) | {"lr": lr, "schedule": schedule, "augmentation": list(augmentation)},
        "resize": SOURCES[dataset.name].resize,
        "canvas": canvas,  # a network sees `samples` crops of `resolution` pixels of each image, `size` times as large
    }


ROW = "{:<14}{:<16}{:>12}{:>14}"


def baseline_row(model: str, baseline: Baseline, draws: int) -> str:
    return ROW.format(model, "random real", "", f"{baseline.accuracy}") + f"   {draws} draws, lr {baseline.lr:.4g}"


# --- Metrics and wandb -----------------------------------------------------------------------------------------------

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


def wandb_mode(asked: str) -> tuple[str, str]:
    """The mode, and why wandb is off where nobody turned it off. `auto` becomes what WANDB_MODE says, else online where
    logged in and disabled elsewhere. Raises InputError where wandb is asked for and not installed."""
    installed = importlib.util.find_spec("wandb") is not None
    if asked in ("online", "offline") and not installed:
        raise InputError(f"--wandb {asked} needs wandb, which is not installed: pip install wandb.")
    if asked != "auto":
        return asked, ""
    if not installed:
        return "disabled", "wandb is off: it is not installed; pip install wandb, or pass --wandb disabled."
    if os.environ.get("WANDB_MODE") in WANDB_MODES[1:]:
        return os.environ["WANDB_MODE"], ""
    if logged_in_to_wandb():
        return "online", ""
    return "disabled", "wandb is off: log in with `wandb login` (https://wandb.ai/authorize), or pass --wandb offline."


class Tracker:
    """Appends to metrics.jsonl and mirrors to wandb. wandb failing costs a warning, never the run."""

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.folder, self.path, self.warn = folder, folder / "metrics.jsonl", warn
        self.file = self.wandb = self.run = self.run_id = None

    def open(self, mode: str, config: dict, resume: dict | None = None):
        """`resume`: what `state()` returned; lines written after that are cut off, and the wandb run goes on."""
        kept = resume["metrics_bytes"] if resume else 0
        if kept and (not self.path.is_file() or self.path.stat().st_size < kept):
            raise InputError(f"{self.path} lacks lines that the checkpoint beside it knows of; restore it.")
        with storage.writing(self.path):
            self.file = open(self.path, "r+b" if kept else "wb", buffering=0)
            self.file.truncate(kept)
            self.file.seek(kept)
        self.run_id = resume["wandb_id"] if resume else None
        if mode != "disabled":
            self._start_wandb(mode, config)

    def _start_wandb(self, mode, config):
        with self._guard():
            import wandb

            self.run = wandb.init(
                project=WANDB_PROJECT, name=self.folder.name, config=config, mode=mode, dir=str(self.folder), id=self.run_id,
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
            self.warn(f"Warning: wandb failed and is off for the rest of this run ({type(error).__name__}: {error}).")

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
            "grand_loss": "Grand_Loss", "start_epoch": "Start_Epoch", "syn_lr": "Synthetic_LR", "match_step": "Match_Step",
            "skipped": "Skipped_Updates", "lr_rejected": "Rejected_LR_Updates", "seconds": "Seconds",
            "share_of_peak": "Share_of_Peak", "memory_gb": "Memory_GB",
        }  # fmt: skip
        shown = {names[k]: v for k, v in finite.items() if k in names and v is not None}
        self._mirror(line["iteration"], {"Progress": line["iteration"], **shown})

    def evaluation(self, iteration: int, model: str, variant: str, accuracy: Accuracy, best: Accuracy):
        """This evaluation, and the highest so far."""
        result = {"mean": accuracy.mean, "std": accuracy.std, "accs": accuracy.accs}
        self._write({"iteration": iteration, "eval": {"model": model, "variant": variant, **result}})
        values = {"Accuracy": accuracy.mean, "Std": accuracy.std, "Max_Accuracy": best.mean, "Max_Std": best.std}
        self._mirror(iteration, {f"{PREFIX[variant]}{name}/{model}": value for name, value in values.items()})

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
                self.run.finish()


# --- Pictures --------------------------------------------------------------------------------------------------------


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


def read_metrics(path: Path, keys) -> tuple[dict[str, tuple[array, array]], dict[tuple[str, str], list[tuple]]]:
    """Of metrics.jsonl, key to iterations and values, and (network, variant) to (iteration, mean, std) of evaluations.
    Reads line by line: a file may have a million. Raises InputError for a line that is none."""
    values, evaluations = {key: (array("d"), array("d")) for key in keys}, {}
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise InputError(f"{path} line {number} is damaged; restore the file.") from error
            if result := line.get("eval"):
                found = evaluations.setdefault((result["model"], result["variant"]), [])
                found.append((line["iteration"], result["mean"], result["std"]))
                continue
            for key, (x, y) in values.items():
                if line.get(key) is not None:
                    x.append(line["iteration"])
                    y.append(line[key])
    return values, evaluations


CURVES = {"grand_loss": "grand loss", "match_step": "matched step", "syn_lr": "synthetic learning rate"}


def curves(path: Path, metrics: Path):
    """Grand loss, matched step, synthetic lr and accuracy over iterations, from metrics.jsonl."""
    from matplotlib.figure import Figure

    values, evaluations = read_metrics(metrics, CURVES)
    figure = Figure(figsize=(11, 7), layout="constrained")
    *panels, accuracy = figure.subplots(2, 2).ravel()
    for panel, (key, title) in zip(panels, CURVES.items()):
        x, y = (torch.tensor(column, dtype=torch.float64) for column in values[key])
        if key == "syn_lr":
            panel.plot(x, y)
        else:
            panel.plot(x, y, ".", markersize=2, alpha=0.4)
            if len(x) >= 20:
                window = len(x) // 20
                means = torch.nn.functional.avg_pool1d(y[None], window, stride=1)[0]
                panel.plot(x[window // 2 :][: len(means)], means, linewidth=2, label="running mean")
                panel.legend()
        panel.set(title=title, xlabel="iteration")
        panel.ticklabel_format(useOffset=False)
    for (model, variant), points in evaluations.items():
        x, mean, std = torch.tensor(points, dtype=torch.float64).T
        accuracy.errorbar(x, 100 * mean, 100 * std, label=f"{model}, {variant}", capsize=2, marker="o", markersize=3)
    accuracy.set(title="test accuracy (%)", xlabel="iteration")
    if evaluations:
        accuracy.legend()
    save_figure(path, figure)
