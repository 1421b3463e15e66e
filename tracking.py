"""What a run leaves behind: its folder, checkpoint and resuming, best files, results, metrics, wandb."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import pictures
import sets
import storage
import summary
from evaluation import Accuracy, Baseline, evaluation_recipe, merits
from performance import describe
from storage import PREFIX, InputError, read_metrics
from utils import SOURCES, Dataset, parse_strategy

DRAW_AFTER = 10  # seconds; drawing takes half a second, an evaluation of a small set hardly more

# --- Resuming --------------------------------------------------------------------------------------------------------


# settings that say where and how a run is computed, not what it is
PLACE = set("resume run_name wandb device compile micro_batch save_dir data_path buffer_path".split())
FREE = PLACE | {"Iteration", "max_files"}  # nor how far it goes; its experts are compared themselves
# what may change on the way, because images and synthetic lr do not depend on it
MAY_CHANGE = set(
    """eval_it num_eval epoch_eval_train batch_real force_save baseline_draws full_data max_bad_steps ckpt_it log_artifact
    Iteration""".split()
)
AFTER_DIVERGENCE = {"lr_img", "lr_lr"}
PROTOCOL = {"num_eval", "epoch_eval_train"}  # of an evaluation

AUTO = Path("auto")  # --resume auto


def settings_of(args) -> dict:
    """The settings of a command as plain values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def config_of(settings: dict) -> dict:
    """The settings with what else is said of a command: versions, and how it was given."""
    return settings | {"made_with": storage.made_with(), "command": shlex.join(sys.argv)}


def read_checkpoint(folder: Path, default: dict) -> dict:
    """That of a run's folder. Raises InputError where the folder is no run's. A setting that the run was made before, and so
    lacks, has its `default`."""
    if not folder.exists():
        raise InputError(f"--resume {folder} does not exist.")
    if not (folder / "checkpoint.pt").is_file():
        raise InputError(f"--resume {folder} is no folder of a run: it has no checkpoint.pt.")
    checkpoint = storage.load(folder / "checkpoint.pt", "checkpoint")
    return checkpoint | {"settings": default | checkpoint["settings"]}


def is_finished(checkpoint: dict, last: int) -> bool:
    """Whether a run of iterations up to `last` was concluded, or is beyond that."""
    done = checkpoint["state"]["iteration"]
    return done > last + 1 or checkpoint["results"].get("concluded") == done == last + 1


def resume(args, runs: Path, default: dict) -> tuple[Path | None, dict | None, dict, str]:
    """The folder, the checkpoint and the changed settings of the run that --resume means, a folder or `auto`, in which
    case there may be none in the folder `runs`; and a sentence on what `auto` found. Raises InputError where a new run
    would take the name of one, and for a setting that must not change."""
    settings, said, folder = settings_of(args), "", args.resume
    named = runs / args.run_name if args.run_name else None
    if folder == AUTO and named:
        folder = named if (named / "checkpoint.pt").exists() else None
    elif folder == AUTO:
        folder, said = find_run(runs, settings, default)
    if folder is None:
        if named:
            check_new(named)
        return None, None, {}, said
    checkpoint = read_checkpoint(folder, default)
    changes = differences(checkpoint, settings)
    if (before := checkpoint["settings"]["Iteration"]) != args.Iteration:
        changes["Iteration"] = [before, args.Iteration]
    may = MAY_CHANGE | (AFTER_DIVERGENCE if checkpoint["state"]["bad_steps"] else set())
    for name, (before, now) in changes.items():
        if name not in may:
            raise InputError(
                f"--{name} cannot change within a run: {folder} has {before}, and this command says {now}; leave the flag "
                "out, or start a new run."
            )
    return folder, checkpoint, changes, said


def check_new(folder: Path):
    """Raises InputError where the folder holds a run or figures already."""
    if (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder} holds a run already; go on with it by --resume {folder}, or take another --run_name.")
    if (folder / "results.json").exists():
        raise InputError(f"{folder} holds results already; take another --run_name.")


def new_folder(runs: Path, name: str | None, what: str) -> Path:
    """The folder of this name, or without one a new folder, called by what it is for and the time."""
    if name:
        return runs / name
    named = runs / f"{what}_{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (named.with_name(f"{named.name}_{n}") for n in itertools.count(2))
    return next(folder for folder in itertools.chain([named], numbered) if not folder.exists())


def find_run(runs: Path, settings: dict, default: dict) -> tuple[Path | None, str]:
    """The latest unfinished run in the folder `runs` with just these settings, and a sentence: that it was found, or how
    the nearest differs."""
    runs_there = []
    for path in runs.glob("*/checkpoint.pt"):
        with contextlib.suppress(InputError):  # another run's damage is not this one's
            checkpoint = read_checkpoint(path.parent, default)
            changes = {f"--{k}": v for k, v in differences(checkpoint, settings).items()}
            if not changes and is_finished(checkpoint, last := settings["Iteration"]):
                there = checkpoint["settings"]["Iteration"]
                changes = {"--Iteration": [there, "the same: it is finished" if there == last else last]}
            runs_there.append((len(changes), -path.stat().st_mtime, path.parent, changes))
    if not runs_there:
        return None, f"--resume auto starts a new run: there is none in {runs}."
    *_, folder, changes = min(runs_there)  # the fewest changes, then the latest
    if not changes:
        return folder, f"--resume auto goes on with {folder}."
    differing = ", ".join(f"{flag} ({before} there, here {now})" for flag, (before, now) in changes.items())
    return None, f"--resume auto starts a new run: the nearest, {folder}, differs in {differing}."


def differences(checkpoint: dict, settings: dict) -> dict[str, list]:
    """Name to [before, now] of the settings that a run and a command do not share."""
    said = {k: v for k, v in settings.items() if k not in FREE and not (k == "seed" and v is None)}
    return {k: [before, v] for k, v in said.items() if (before := checkpoint["settings"][k]) != v}


def check_same_data(folder: Path, checkpoint: dict, dataset: Dataset) -> list[str]:
    """Raises InputError where a run would go on with other data than it began with. Returns what could not be checked, as
    sentences."""
    remedy = "; give it the data in --data_path it began with"
    storage.require_same(folder / "checkpoint.pt", checkpoint["identity"], dataset.identity, remedy)
    return storage.on_trust(folder / "checkpoint.pt", checkpoint["identity"])


def check_same_experts(folder: Path, checkpoint: dict, experts: list[storage.Expert]):
    """Raises InputError where a run would go on with other experts than it began with."""
    if checkpoint["experts"] != storage.fingerprint(experts):
        remedy = "restore them, or choose as many with --max_files as there were"
        raise InputError(f"{folder} began with other experts than are in --buffer_path now; {remedy}.")


# --- The folder of a run ---------------------------------------------------------------------------------------------


class Run:
    """A folder and what a run writes there. `state` in its methods is all that changes in a run, a dataclass of tensors
    and plain values; it has `iteration`, `syn_lr`, `variants()`, a dict from "raw" and "ema" to images, and `to(device)`."""

    def __init__(
        self, folder: Path, settings: dict, dataset: Dataset, labels: Tensor, models: list[str], experts: list, warn,
        unchecked: list[str],
    ):  # fmt: skip
        self.folder, self.settings, self.dataset, self.labels = folder, settings, dataset, labels
        self.models, self.experts, self.fingerprint = models, experts, storage.fingerprint(experts)
        self.config = config_of(settings) | {"to_go_on": shlex.join(["python", sys.argv[0], f"--resume={folder}"])}
        self.unchecked = unchecked  # what it was given and could not be checked, as sentences
        # best, last: "variant/model" -> mean, std, accs, iteration, syn_lr
        self.results = {"best": {}, "last": {}, "evaluating_seconds": 0.0}
        self.content = {}  # of results.json
        self.tracker, self.drawn = Tracker(folder, warn), -DRAW_AFTER
        self.iteration = self.tracker.iteration  # takes the line of an update

    @contextlib.contextmanager
    def open(self, state, wandb: str, checkpoint: dict | None, changes: dict):
        """Writes within this block, going on where `checkpoint` ended, with wandb in this mode; other processes are kept
        out of the folder."""
        with storage.locked(self.folder):
            if checkpoint:
                self.results |= checkpoint["results"]
                if changes.keys() & PROTOCOL:  # accuracies by another do not compare
                    self.results["best"] = {}
            self.tracker.open(wandb, self.config, checkpoint["tracker"] if checkpoint else None)
            self.cut = self.tracker.cut  # updates computed after the checkpoint
            exit_code = 1
            try:
                if not checkpoint:
                    self.checkpoint(state)  # from now on the run can be resumed, and its folder counts as one
                if not checkpoint or not (self.folder / "transform.pt").exists():
                    sets.save_transform(self.folder, self.dataset.transform.state(), self.dataset.identity)
                self._write_config(state, changes)
                yield
                exit_code = 0
            except SystemExit as stop:
                exit_code = stop.code
                raise
            finally:
                self.tracker.close(exit_code)

    def _write_config(self, state, changes: dict):
        """The settings that the run began with, and what each start of it was."""
        path = self.folder / "config.json"
        config = storage.load_json(path) if path.exists() else self.config
        start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "iteration": state.iteration, "command": self.config["command"]}
        files = sorted({str(expert.path) for expert in self.experts})
        start |= {"changes": changes, "made_with": self.config["made_with"], "experts": files, "unchecked": self.unchecked}
        start["device"] = describe(state.variants()["raw"].device)
        to_go_on = self.config["to_go_on"]  # the folder may have moved
        storage.save_json(path, config | {"to_go_on": to_go_on, "starts": [*config.get("starts", []), start]})
        self.config["command"] = config["command"]  # a run was made by its first one

    def checkpoint(self, state):
        content = {"settings": self.settings, "identity": self.dataset.identity, "experts": self.fingerprint}
        content["state"] = vars(state.to("cpu"))
        content |= {"results": self.results, "tracker": self.tracker.state()}
        storage.save(self.folder / "checkpoint.pt", "checkpoint", content)

    def record(self, state, results: dict[tuple[str, str], Accuracy], seconds: float) -> list[str]:
        """Metrics, files and pictures of one evaluation, which took so long: (variant, network) to accuracy. Returns a
        line on each."""
        it, lines, best, last = state.iteration, [], self.results["best"], self.results["last"]
        for (variant, model), accuracy in results.items():
            key = f"{variant}/{model}"
            last[key] = accuracy.as_dict() | {"iteration": it, "syn_lr": state.syn_lr}
            improved = key not in best or accuracy.score > Accuracy.of(best[key]).score
            if improved:
                best[key] = last[key]
            self.tracker.evaluation(it, model, variant, accuracy)
            selecting = "" if accuracy.train_accs is None else f" ({Accuracy(accuracy.train_accs)} % on training images)"
            lines.append(f"Iteration {it}: {variant} {model} {accuracy} %{selecting}" + ", best so far" * improved)
            if model == self.models[0]:
                self._save_tensors(state, variant, "last")
                if improved:
                    self._save_best(state, variant)
                if improved or it % 1000 == 0:
                    self._save_images(state, variant, str(it))
        self.results["evaluating_seconds"] += seconds
        self.save_results(it)
        if time.monotonic() > self.drawn + DRAW_AFTER:
            self.draw_curves()
        return lines

    def best(self) -> tuple[str, dict]:
        """The variant with the highest accuracy so far on the pool's first network, and what its evaluation found."""
        found = {v: self.results["best"].get(f"{v}/{self.models[0]}") for v in PREFIX}
        variant = max((v for v in found if found[v]), key=lambda v: Accuracy.of(found[v]).score)
        return variant, found[variant]

    @property
    def baselines(self) -> dict[str, Baseline]:
        """Network to what random real images reach; empty before they were evaluated."""
        return {model: Baseline(tried) for model, tried in self.results.get("random_real", {}).items()}

    def save_results(self, iteration: int):
        """results.json and summary.md: all figures so far, and wandb's summary of them."""
        values, lines = read_metrics(self.folder / "metrics.jsonl", ("seconds", "memory_gb"))
        seconds, memory = (values[key][1] for key in ("seconds", "memory_gb"))
        computed = {
            "iterations": len(seconds),
            "iterating_seconds": round(sum(seconds), 1),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "evaluating_seconds": round(self.results["evaluating_seconds"], 1),
            "memory_gb": max(memory, default=None),
        }
        variant, found = self.best()
        at = found["iteration"]
        own = {line["model"]: Accuracy.of(line) for line in lines if (line["variant"], line["iteration"]) == (variant, at)}
        best_set = {"variant": variant, "iteration": at, "reached": {model: one.as_dict() for model, one in own.items()}}
        content = {"iteration": iteration, "best": self.results["best"], "last": self.results["last"], "best_set": best_set}
        content |= {"computed": computed, "evaluations": lines, "config": self.config}
        full = {model: Accuracy(accs) for model, accs in self.results.get("full_data", {}).items()}
        self.content = save_results(self.folder, content, own, own, self.baselines, full)
        self.tracker.summary(self.content)

    def finish(self, iteration: int, log_artifact: bool):
        """The last figures, all pictures, and what wandb shows at the end of a run."""
        self.save_results(iteration)
        drawn = pictures.draw(self.folder, self.content)
        self.tracker.closing(iteration, self.content, drawn)
        if log_artifact:
            files = [self.folder / name for name in ("synthetic_best.pt", "transform.pt", "summary.md")]
            self.tracker.artifact(files + drawn, {k: self.settings[k] for k in ("dataset", "ipc", "model", "seed")})

    def _save_tensors(self, state, variant: str, name: str):
        named = {"images": state.variants()[variant], "labels": self.labels, "lr": torch.tensor(state.syn_lr)}
        for kind, tensor in named.items():
            storage.save_tensor(self.folder / f"{PREFIX[variant]}{kind}_{name}.pt", tensor)

    def _save_images(self, state, variant: str, name: str):
        self._save_tensors(state, variant, name)
        images, classes = state.variants()[variant].cpu(), self.dataset.classes
        self.tracker.pixels(state.iteration, images, variant)
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
        better, found = self.best()
        if better != variant:
            return
        images, transform = state.variants()[variant].cpu(), self.dataset.transform
        content = {
            "images": images,
            "pixels": transform.undo(images),  # the same on the scale of [0, 1], which distilled images may leave
            "labels": self.labels.cpu(),
            "syn_lr": state.syn_lr,
            "variant": variant,
            "iteration": state.iteration,
            "accuracy": {"model": self.models[0], **Accuracy.of(found).as_dict()},
            "ipc": self.settings["ipc"],
            "classes": self.dataset.classes,
            "transform": transform.summary(),
            "identity": self.dataset.identity,
            "config": self.config,
        } | recipe_of(self.settings, self.dataset, state.syn_lr)
        storage.save(self.folder / "synthetic_best.pt", "synthetic", content)
        pictures.draw_grid(self.folder / "grid_best.png", content)
        self.tracker.image(state.iteration, "Best_Images", self.folder / "grid_best.png")

    def draw_curves(self):
        self.drawn = time.monotonic()
        real = {model: baseline.accuracy for model, baseline in self.baselines.items()}
        pictures.draw_curves(self.folder, self.config, real)


class Unwritten:
    """What a Run is in the processes that do not write: it takes what the loop tells a Run, and leaves it to rank 0."""

    def __init__(self, folder: Path, dataset: Dataset, labels: Tensor):
        self.folder, self.dataset, self.labels = folder, dataset, labels

    config = {"to_go_on": "what rank 0 says"}
    cut = 0

    def open(self, *_):
        return contextlib.nullcontext()

    def _nothing(self, *_, **__) -> list[str]:
        return []

    checkpoint = iteration = record = draw_curves = _nothing


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


def save_judgement(
    folder: Path, settings: dict, synthetic: sets.Synthetic, lr: float, results: dict, hard: dict, baselines: dict,
    full: dict, computed: dict, wandb: str, warn,
) -> dict:  # fmt: skip
    """What --eval_only found: results.json, summary.md and a picture, mirrored to wandb. Network to Accuracy with the set's
    own and with hard labels, to Baseline, and to Accuracy of the whole training set. Returns what results.json holds."""
    content = {"set": str(synthetic.path), "images": len(synthetic.labels), "iteration": synthetic.iteration}
    found = [{"model": m, "iteration": synthetic.iteration, "syn_lr": lr, **a.as_dict()} for m, a in results.items()]
    config = config_of(settings)
    content |= {"computed": computed, "evaluations": found, "config": config}
    content = save_results(folder, content, results, hard, baselines, full)
    drawn, tracker, it = pictures.draw(folder, content), Tracker(folder, warn), synthetic.iteration or 0
    tracker.open(wandb, config)
    for model, accuracy in results.items():
        tracker.evaluation(it, model, "raw", accuracy)
    tracker.summary(content)
    tracker.closing(it, content, drawn)
    tracker.close()
    return content


def save_results(
    folder: Path, content: dict, own: dict[str, Accuracy], hard: dict[str, Accuracy], baselines: dict[str, Baseline],
    full: dict[str, Accuracy],
) -> dict:  # fmt: skip
    """Writes results.json and summary.md, of a run and of --eval_only, and returns what results.json holds: beside the
    content given, every accuracy in [0, 1], those of random real images as [learning rate, the networks' accuracies for each
    draw], and the figures of merit of a set with its own and with hard labels."""
    random = {model: baseline.accuracy for model, baseline in baselines.items()}
    real = {m: {"mean": random[m].mean, "std": random[m].std, "lr": b.lr, "tried": list(b.tried.items())}
            for m, b in baselines.items()}  # fmt: skip
    found = {model: merits(own[model], hard[model], random.get(model), full.get(model)) for model in own}
    content |= {"random_real": real, "full_data": {m: a.as_dict() for m, a in full.items()}, "merits": found}
    storage.save_json(folder / "results.json", content)
    with storage.atomic_path(folder / "summary.md") as temporary:
        temporary.write_text(summary.page(content, folder), encoding="utf-8", errors="backslashreplace")
    return content


# --- Metrics and wandb -----------------------------------------------------------------------------------------------

WANDB_PROJECT = "DatasetDistillation"  # as published, where wandb's own settings name none
WANDB_MODES = ("auto", "online", "offline", "disabled")


def logged_in_to_wandb() -> bool:
    """Whether wandb has credentials: in the environment, its settings or a netrc file."""
    try:
        import wandb

        return wandb.login(prompt=False, verify=False)
    except Exception:  # whatever wandb says to a key of the wrong form
        return False


def wandb_mode(asked: str) -> tuple[str, str]:
    """The mode, and why wandb is off where nobody turned it off. `auto` becomes what WANDB_MODE says, else online where
    logged in and disabled elsewhere. Raises InputError where wandb is asked for and cannot be had."""
    if asked == "auto" and os.environ.get("WANDB_MODE") in WANDB_MODES[1:]:
        asked = os.environ["WANDB_MODE"]
    if asked == "disabled":
        return asked, ""
    if not importlib.util.find_spec("wandb"):
        missing, remedy = "is not installed", "pip install wandb"
    elif asked == "offline" or logged_in_to_wandb():
        return "offline" if asked == "offline" else "online", ""
    else:
        missing, remedy = "is not logged in", "run `wandb login` or set WANDB_API_KEY"
    if asked == "auto":
        return "disabled", f"wandb is off: it {missing}; {remedy}, or pass --wandb offline or disabled."
    raise InputError(f"--wandb {asked} cannot be used: wandb {missing}; {remedy}, or pass --wandb disabled.")


SUMMARISED = "best", "last", "best_set", "set", "random_real", "full_data", "merits", "computed"  # of results.json
WANDB_NAMES = {
    "grand_loss": "Grand_Loss", "start_epoch": "Start_Epoch", "syn_lr": "Synthetic_LR", "match_step": "Match_Step",
    "skipped": "Skipped_Updates", "lr_rejected": "Rejected_LR_Updates", "seconds": "Seconds",
    "share_of_peak": "Share_of_Peak", "memory_gb": "Memory_GB",
}  # fmt: skip


class Tracker:
    """Appends to metrics.jsonl and mirrors to wandb. wandb failing costs a warning, never the run."""

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.folder, self.path, self.warn = folder, folder / "metrics.jsonl", warn
        self.file = self.wandb = self.run = self.run_id = None
        self.best = {}  # (network, variant) -> the highest accuracy that wandb was told of: its line
        self.mirrored = -1  # the last iteration that wandb was told of
        self.matched = []  # steps since the last histogram of them
        self.cut = 0  # updates after the checkpoint, whose lines are gone

    def open(self, mode: str, config: dict, resume: dict | None = None):
        """`resume`: what `state()` returned; lines written after that are cut off, and the wandb run goes on, with the
        lines that it missed."""
        kept = resume["metrics_bytes"] if resume else 0
        if kept and (not self.path.is_file() or self.path.stat().st_size < kept):
            raise InputError(f"{self.path} lacks lines that the checkpoint beside it knows of; restore it.")
        with storage.writing(self.path):
            self.file = open(self.path, "r+b" if resume and self.path.is_file() else "w+b", buffering=0)
            self.file.seek(kept)
            self.cut = sum(b'"match_step"' in line for line in self.file)
            self.file.truncate(kept)
            self.file.seek(kept)
        if resume:
            self.run_id, self.mirrored = resume["wandb_id"], resume.get("mirrored", -1)
        if mode != "disabled":
            with self._guard():
                self._start_wandb(mode, config)
                self._replay()

    def _start_wandb(self, mode, config):
        import wandb

        its_own = wandb.setup().settings  # from the environment and wandb's files
        # what a run says last would be lost before sixty lines of wandb's
        brief = {"max_end_of_run_history_metrics": 0, "max_end_of_run_summary_metrics": 0}
        start = functools.partial(
            wandb.init, project=its_own.project or WANDB_PROJECT, name=its_own.run_name or self.folder.name, config=config,
            dir=str(self.folder), id=self.run_id, resume="allow" if self.run_id else None, settings=brief,
        )  # fmt: skip
        try:
            self.run = start(mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            reason = str(error).partition("\n")[0]
            self.warn(f"Warning: wandb does not answer, and an offline copy is kept ({reason}).")
            self.run = start(mode="offline")
        self.run_id, self.wandb = self.run.id, wandb

    def _replay(self):
        """Gives wandb the lines of metrics.jsonl that were written while it was off."""
        known = self.mirrored
        with open(self.path, "rb") as file:
            for text in file:
                line = json.loads(text)
                self._mirror_line(line, shown=line["iteration"] > known)

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
        return {"metrics_bytes": self.file.tell(), "wandb_id": self.run_id, "mirrored": self.mirrored}

    def _write(self, line: dict):
        rest = (json.dumps(line) + "\n").encode()
        with storage.writing(self.path):
            while rest:  # a disk that is filling up takes a part, and refuses only the rest
                rest = rest[self.file.write(rest) :]
        self._mirror_line(line)

    def _mirror(self, iteration: int, values: dict | Callable, last: bool = False):
        """Values, or a function from the wandb module to them, so that making them is guarded too. wandb writes those of
        an iteration when it is told of the next, or that they are the last: what a kill would lose is one iteration's."""
        if self.run is not None:
            with self._guard():
                self.run.log(values(self.wandb) if callable(values) else values, step=iteration, commit=last or None)
                self.mirrored = iteration

    def _mirror_line(self, line: dict, shown: bool = True):
        """A line of metrics.jsonl by the names of wandb's panels. The highest accuracy so far is kept, shown or not."""
        if found := line.get("eval"):
            key = found["model"], found["variant"]
            best = self.best[key] = max(self.best.get(key, found), found, key=lambda one: Accuracy.of(one).score)
            values = {"Accuracy": found["mean"], "Std": found["std"], "Max_Accuracy": best["mean"], "Max_Std": best["std"]}
            values = {f"{PREFIX[found['variant']]}{name}/{found['model']}": value for name, value in values.items()}
            steps, self.matched = self.matched, []
            if shown and steps:
                self._mirror(line["iteration"], lambda wandb: {"Match_Steps": wandb.Histogram(steps)})
        else:
            values = {"Progress": line["iteration"]}
            values |= {name: line[k] for k, name in WANDB_NAMES.items() if line.get(k) is not None}
            self.matched += [line["match_step"]] if "match_step" in line else []
            if line.get("seconds"):
                values["Iterations_per_Second"] = 1 / line["seconds"]
        if shown:
            self._mirror(line["iteration"], values, last=not found)

    def iteration(self, **line):
        """One update: the keys of a line of metrics.jsonl; JSON has no NaN, so a non-finite loss is null."""
        self._write({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()})

    def evaluation(self, iteration: int, model: str, variant: str, accuracy: Accuracy):
        self._write({"iteration": iteration, "eval": {"model": model, "variant": variant, **accuracy.as_dict()}})

    def summary(self, content: dict):
        """Of what results.json holds."""
        if self.run is not None:
            with self._guard():
                self.run.summary.update({name: content[name] for name in SUMMARISED if name in content})

    def pixels(self, iteration: int, images: Tensor, variant: str):
        self._mirror(iteration, lambda wandb: {f"{PREFIX[variant]}Pixels": wandb.Histogram(images)})

    def pictures(self, iteration: int, images: Tensor, classes: list[str], name: str, variant: str):
        """Histogram and grids of images (N,C,H,W), grouped by class; `name` "Synthetic" or "Reconstructed"."""
        prefix, caption = PREFIX[variant], f"a row per class: {classes[0]} to {classes[-1]}"

        def values(wandb):
            clipped = images.clamp(images.mean() - 2.5 * images.std(), images.mean() + 2.5 * images.std())
            whole, cut = (pictures.stretched(pictures.tile(each, len(classes))) for each in (images, clipped))
            return {
                f"{prefix}{name}_Pixels": wandb.Histogram(images),
                f"{prefix}{name}_Images": wandb.Image(whole, caption=caption),
                f"{prefix}Clipped_{name}_Images/std_2.5": wandb.Image(cut, caption=caption),
            }

        self._mirror(iteration, values)

    def image(self, iteration: int, name: str, path: Path):
        self._mirror(iteration, lambda wandb: {name: wandb.Image(str(path))})

    def closing(self, iteration: int, content: dict, files: list[Path]):
        """What results.json holds beside the set's own accuracies, the closing table, and pictures."""

        def values(wandb):
            header, rows = summary.accuracies(content)
            found = {"Closing_Table": wandb.Table(columns=header, data=rows)}
            found |= {f"Pictures/{path.stem}": wandb.Image(str(path)) for path in files}
            for name in ("random_real", "full_data"):
                for model, one in content[name].items():
                    found |= {f"{name.title()}/{model}": one["mean"], f"{name.title()}_Std/{model}": one["std"]}
            for model, scores in content["merits"].items():
                found |= {f"{name.title()}/{model}": score for name, score in scores.items() if score is not None}
            return found

        self._mirror(iteration, values)

    def artifact(self, files: list[Path], metadata: dict):
        """The best set with what belongs to it."""
        if self.run is not None:
            with self._guard():
                artifact = self.wandb.Artifact(re.sub(r"[^\w.-]", "-", self.folder.name), "synthetic-set", metadata=metadata)
                for path in files:
                    artifact.add_file(str(path))
                self.run.log_artifact(artifact)

    def close(self, exit_code: int = 0):
        """With the exit code of the run, by which wandb shows it as finished or failed, or by a signal's as preempted."""
        self.file.close()
        if self.run is not None:
            with self._guard():
                if exit_code > 128:
                    self.run.mark_preempting()
                self.run.finish(exit_code=exit_code)
            if folders := sorted(str(path) for path in self.folder.glob("wandb/offline-run-*")):
                self.warn(f"Send what wandb kept offline by: wandb sync {shlex.join(folders)}")
