"""Distils a data set into a few synthetic images per class by matching experts' training trajectories (ATT).

A student starts where an expert was after some epoch and trains on the synthetic images; among its steps, the one that
comes nearest to where the expert was --expert_epochs later is matched. The images and the student's learning rate
follow the exact gradient of that match. The experts come from buffer_ATT.py.
"""

import contextlib
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import networks
import options
import storage
import tracking
from evaluation import POOLS, Accuracy, Judge, TestSet, evaluation_recipe, percent, random_real_images
from performance import GRADIENT, SECOND_ORDER, Meter, compile_mode, forward_flops, note, tf32
from reparam_module import DISTANCES, Minibatch, Student, draw_indices, match_trajectory
from storage import InputError
from tracking import PREFIX, Interrupted, Progress, Tracker, say, signals
from utils import Canvas, Views, expert_folder, generator, load_dataset

MOMENTUM = 0.5  # of the images and of the synthetic lr, as published


def parse_args(argv=None):
    parser = options.Parser(__doc__)
    options.add_shared(parser, batch_real=256, batch_train=256)
    add = parser.add_argument
    # the method
    add("--ipc", type=options.positive_int, default=1, help="synthetic images per class")
    add("--syn_steps", type=options.positive_int, default=20, help="N_S, steps of the student")
    add("--expert_epochs", type=options.positive_int, default=3, help="N_T, epochs of the expert to be matched")
    add("--max_start_epoch", type=options.positive_int, default=25, help="the student starts at an epoch below this")
    add("--match", type=options.one_of(("att", "mtt")), default="att", help="nearest step (att) or last step (mtt)")
    add("--select_dist", type=options.one_of(DISTANCES), default="l1", help="distance that chooses the nearest step")
    add("--Iteration", type=options.natural, default=5000, help="last iteration")
    add("--lr_img", type=options.positive, default=1000, help="learning rate of the synthetic images")
    add("--lr_lr", type=options.not_negative, default=1e-5, help="learning rate of the synthetic lr")
    add("--lr_teacher", type=options.positive, default=0.01, help="initial synthetic lr")
    add("--batch_syn", type=options.positive_int, help="synthetic images per step (default: all)")
    add("--micro_batch", type=options.positive_int, help="work a step's batch off in pieces of so many images, for memory")
    add("--pix_init", type=options.one_of(("real", "noise")), default="real", help="initial synthetic images")
    add("--no_aug", action="store_true", help="no DiffAugment in the student's steps")
    add("--texture", action="store_true", help="synthetic images are canvases of which random crops are seen")
    add("--canvas_size", type=options.positive_int, default=2, help="side of a canvas in images, with --texture")
    add("--canvas_samples", type=options.positive_int, default=1, help="crops of each canvas in a step, with --texture")
    add("--ema_decay", type=options.share, default=0.999, help="of the moving average of the images")
    # the experts
    add("--load_all", action="store_true", help="all experts in memory, drawn with replacement")
    add("--max_files", type=options.positive_int, help="use this many experts (default: all)")
    add("--max_experts", type=options.positive_int, help="use this many of one published file of several experts")
    # the evaluation
    add("--eval_mode", type=options.one_of(POOLS), default="S", help="pool of networks to evaluate with")
    add("--num_eval", type=options.positive_int, default=5, help="networks per evaluation")
    add("--eval_it", type=options.positive_int, default=100, help="evaluate every so many iterations")
    add("--epoch_eval_train", type=options.positive_int, default=1000, help="epochs of an evaluated network, less one")
    add("--baseline_draws", type=options.natural, default=3, help="sets of random real images to compare with")
    add("--eval_only", action="store_true", help="evaluate the set --load_syn without distilling")
    add("--load_syn", type=options.path, metavar="PATH", help="synthetic_best.pt, its folder, or an images_<x>.pt")
    # the run
    add("--save_dir", type=options.folder, default=Path("logged_files"), help="where results go")
    add("--run_name", type=options.file_name, help="folder of the results (default: from the settings and the time)")
    add("--resume", type=options.folder, metavar="{auto,FOLDER}", help="go on with a run, or with the last like this one")
    add("--ckpt_it", type=options.positive_int, default=500, help="iterations between checkpoints")
    add("--max_bad_steps", type=options.positive_int, default=20, help="stop after so many non-finite updates in a row")
    add("--wandb", type=options.one_of(tracking.WANDB_MODES), default="auto", help=", ".join(tracking.WANDB_MODES))
    add("--force_save", action="store_true", help="pictures to wandb at 50 images per class and more, too")
    args = parser.parse_args(argv)
    if args.texture and args.zca:
        parser.error("--texture cannot be used with --zca: whitening is of whole images, and a crop is none")
    if args.eval_only != bool(args.load_syn):
        parser.error("--eval_only and --load_syn go together: the one says to judge the set that the other names")
    if not args.texture and (args.canvas_size, args.canvas_samples) != (2, 1):
        parser.error("--canvas_size and --canvas_samples go with --texture, which is not given")
    if args.match == "mtt" and args.select_dist != "l1":
        parser.error("--select_dist cannot be used with --match mtt, which always matches the last step")
    if args.eval_only and args.resume:
        parser.error("--eval_only cannot be used with --resume: there is nothing to go on with")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


@dataclass
class State:
    """All that changes from one iteration to the next; every random draw follows from the seed and the iteration."""

    images: Tensor  # (classes * ipc, C, H, W) in input space
    ema: Tensor
    momentum: Tensor  # of the images
    syn_lr: float
    lr_momentum: float = 0.0
    iteration: int = 0  # the next one
    evaluated: bool = False  # whether it has been evaluated already
    bad_steps: int = 0  # non-finite updates in a row
    skipped: int = 0  # non-finite updates in all
    lr_rejected: int = 0  # updates that would have made the synthetic lr zero or negative
    best: dict = field(default_factory=dict)  # variant/model -> mean, std, accs, iteration, syn_lr
    last: dict = field(default_factory=dict)  # the same of the last evaluation

    def variants(self) -> dict[str, Tensor]:
        return {"raw": self.images, "ema": self.ema}

    def update(self, match, args) -> bool:
        """SGD with momentum on images and lr, then the moving average. Returns whether the update was finite; one
        that was not changes nothing but the counts."""
        momentum = MOMENTUM * self.momentum + match.grad_images
        images = self.images - args.lr_img * momentum
        lr_momentum = MOMENTUM * self.lr_momentum + match.grad_lr
        syn_lr = self.syn_lr - args.lr_lr * lr_momentum
        finite = torch.isfinite(torch.tensor([match.grand_loss, syn_lr])).all() and images.isfinite().all()
        self.iteration += 1
        self.evaluated = False
        if not finite:
            self.bad_steps += 1
            self.skipped += 1
            return False
        self.bad_steps = 0
        self.images, self.momentum = images, momentum
        self.ema = args.ema_decay * self.ema + (1 - args.ema_decay) * images
        if syn_lr > 0:
            self.syn_lr, self.lr_momentum = syn_lr, lr_momentum
        else:
            self.lr_rejected += 1
        return True


def initial_images(args, dataset) -> Tensor:
    """(classes * ipc, C, H, W) real images or noise in input space; of canvases each is made of several."""
    random = generator(args.seed, "initial images")
    tiles = args.canvas_size if args.texture else 1
    count, side = len(dataset.classes) * args.ipc, dataset.resolution
    if args.pix_init == "noise":
        return torch.randn(count, dataset.channels, tiles * side, tiles * side, generator=random)
    images = dataset.sample(args.ipc * tiles**2, random)
    # (count, row, column, C, H, W) -> (count, C, row, H, column, W)
    canvases = images.view(count, tiles, tiles, *images.shape[1:]).permute(0, 3, 1, 4, 2, 5)
    return canvases.reshape(count, dataset.channels, tiles * side, tiles * side)


def initial_state(args, dataset, device) -> State:
    images = initial_images(args, dataset).to(device)
    return State(images, images.clone(), torch.zeros_like(images), args.lr_teacher)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """Everything a run needs: what does not change while it goes on, and its `state`, which does."""

    def __init__(self, args, dataset, experts, folder: Path, device, checkpoint: dict | None):
        self.args, self.dataset, self.experts, self.folder, self.device = args, dataset, experts, folder, device
        self.classes = len(dataset.classes)
        self.labels = torch.arange(self.classes, device=device).repeat_interleave(args.ipc)
        self.views = Views(() if args.no_aug else options.augmentation(args), canvas_of(args, dataset))
        self.judge = make_judge(args, dataset, device)
        net = networks.build(args.model, *dataset.size).to(device)
        self.student = Student(net, args.micro_batch, args.compile == "on")
        self.forward = forward_work(args, dataset)
        self.meter = Meter(device)
        self.state = initial_state(args, dataset, device)
        if checkpoint:
            self.state = State(**{k: to(v, device) for k, v in checkpoint["state"].items()})
        self.config = settings_of(args) | {"made_with": storage.made_with(), "command": shlex.join(sys.argv)}
        self.saved_at = time.monotonic()
        self.tracker = Tracker(
            folder,
            args.wandb,
            folder.name,
            self.config,
            checkpoint["tracker"] if checkpoint else None,
        )
        if not checkpoint:
            self.checkpoint()  # from now on the run can be resumed, and its folder counts as one
        if not (folder / "config.json").exists():
            storage.save_json(folder / "config.json", self.config)

    # --- one iteration of the method

    def expert_for(self, it: int):
        """The expert and start epoch of iteration `it`: experts in shuffled order, each once per pass."""
        count = len(self.experts)
        draw = generator(self.args.seed, "start", it)
        if self.args.load_all:
            chosen = int(torch.randint(count, (), generator=draw))
        else:
            order = torch.randperm(count, generator=generator(self.args.seed, "expert order", it // count))
            chosen = int(order[it % count])
        return self.experts[chosen], int(torch.randint(self.args.max_start_epoch, (), generator=draw))

    def minibatches(self, it: int) -> list[Minibatch]:
        """Indices and augmentation of the student's steps in iteration `it`."""
        args, count = self.args, len(self.labels)
        size = args.batch_syn or count
        indices = draw_indices(count, size, args.syn_steps, generator(args.seed, "batches", it))
        views = self.views.draw(args.syn_steps, size, generator(args.seed, "augmentation", it), self.device)
        return [Minibatch(i.to(self.device), view) for i, view in zip(indices, views)]

    def iterate(self) -> str:
        """One update of the synthetic images and the synthetic lr. Returns what to say of it."""
        args, state, it = self.args, self.state, self.state.iteration
        began = time.monotonic()
        expert, start_epoch = self.expert_for(it)
        with tf32(False):  # the second-order pass needs all the digits
            match = match_trajectory(
                self.student,
                expert.snapshot(start_epoch).to(self.device),
                expert.snapshot(start_epoch + args.expert_epochs).to(self.device),
                state.images,
                self.labels,
                state.syn_lr,
                self.minibatches(it),
                args.match,
                args.select_dist,
            )
        seconds = time.monotonic() - began
        work = self.forward * (args.syn_steps * GRADIENT + match.step * SECOND_ORDER)
        figures = self.meter.figures(work, seconds)
        with signals.held():
            state.update(match, args)
            self.tracker.iteration(
                iteration=it,
                grand_loss=match.grand_loss,
                syn_lr=state.syn_lr,
                match_step=match.step,
                start_epoch=start_epoch,
                seconds=round(seconds, 4),
                skipped=state.skipped,
                lr_rejected=state.lr_rejected,
                **figures,
            )
        return f"grand loss {match.grand_loss:.4f}, step {match.step}, lr {state.syn_lr:.4g}, {note(figures)}"

    def compile(self):
        """Compiles the student's step for every size of batch, before the loop, whose pace is then its own."""
        began = time.monotonic()
        theta = self.experts[0].snapshot(0).to(self.device)
        for minibatch in {len(m.indices): m for m in self.minibatches(self.state.iteration)}.values():
            x, y = minibatch.see(self.state.images[minibatch.indices], self.labels)
            with tf32(False):
                self.student.gradient(theta, x, y)
                self.student.second_order(theta, x, y, theta)
        say(f"Compiled the student's step in {time.monotonic() - began:.0f} s (--compile off does without)")

    # --- judging and keeping

    def evaluate(self):
        """Trains and tests fresh networks on the raw and on the EMA images: (variant, network) to accuracy."""
        state, it = self.state, self.state.iteration
        with Progress(2 * self.judge.epochs, f"Evaluation at iteration {it}, epochs", leave=False) as progress:
            return {
                (variant, model): accuracy
                for variant, images in state.variants().items()
                for model, accuracy in self.judge(
                    images, self.labels, state.syn_lr, "evaluation", it, variant, on_epoch=progress.advance
                ).items()
            }

    def record(self, results: dict):
        """Metrics, best files and pictures of one evaluation."""
        state, it = self.state, self.state.iteration
        for (variant, model), accuracy in results.items():
            entry = asdict(accuracy) | {"iteration": it, "syn_lr": state.syn_lr}
            key = f"{variant}/{model}"
            state.last[key] = entry
            improved = key not in state.best or accuracy.mean > Accuracy(state.best[key]["accs"]).mean
            if improved:
                state.best[key] = entry
            self.tracker.evaluation(it, model, variant, accuracy, Accuracy(state.best[key]["accs"]))
            say(f"Iteration {it}: {variant} {model} {percent(accuracy)}" + (", best so far" if improved else ""))
            if model == self.judge.pool[0] and improved:
                self.save_best(variant)
            if model == self.judge.pool[0] and (improved or it % 1000 == 0):
                self.save_images(variant, it)
        state.evaluated = True

    def save_images(self, variant: str, it: int):
        images, prefix = self.state.variants()[variant], PREFIX[variant]
        storage.save_tensor(self.folder / f"{prefix}images_{it}.pt", images)
        storage.save_tensor(self.folder / f"{prefix}labels_{it}.pt", self.labels)
        storage.save_tensor(self.folder / f"{prefix}lr_{it}.pt", torch.tensor(self.state.syn_lr))
        if variant == "raw":
            self.tracker.pixels(it, images.cpu())
        shown = self.args.ipc < 50 or self.args.force_save
        if shown:
            self.tracker.pictures(it, images.cpu(), self.classes, "Synthetic", variant)
        if self.args.zca:
            undone = self.dataset.transform.undo(images)
            storage.save_tensor(self.folder / f"{prefix}images_zca_{it}.pt", undone)
            if shown:
                self.tracker.pictures(it, undone.cpu(), self.classes, "Reconstructed", variant)

    def save_best(self, variant: str):
        """The files of a variant that has just been evaluated best, and the better of the two as one usable file."""
        images, prefix = self.state.variants()[variant], PREFIX[variant]
        storage.save_tensor(self.folder / f"{prefix}images_best.pt", images)
        storage.save_tensor(self.folder / f"{prefix}labels_best.pt", self.labels)
        storage.save_tensor(self.folder / f"{prefix}lr_best.pt", torch.tensor(self.state.syn_lr))
        model = self.judge.pool[0]
        if self.best_variant() != variant:
            return
        accuracy = Accuracy(self.state.best[f"{variant}/{model}"]["accs"])
        storage.save(
            self.folder / "synthetic_best.pt",
            "synthetic",
            {
                "images": images.detach().cpu().clone(),
                "labels": self.labels.cpu(),
                "syn_lr": self.state.syn_lr,
                "variant": variant,
                "iteration": self.state.iteration,
                "accuracy": {"model": model, "mean": accuracy.mean, "std": accuracy.std, "accs": accuracy.accs},
                "ipc": self.args.ipc,
                "classes": self.dataset.classes,
                "transform": self.dataset.transform.state(),
                "identity": self.dataset.identity,
                "config": self.config,
            },
        )
        tracking.grid(
            self.folder / "grid_best.png",
            self.dataset.transform.undo(images),
            self.dataset.classes,
            f"{self.dataset.name}, {self.args.ipc} per class ({variant}): {percent(accuracy)} % with {model}",
        )

    def best_variant(self) -> str:
        """The variant with the highest accuracy so far on the pool's first network."""
        found = {v: self.state.best.get(f"{v}/{self.judge.pool[0]}") for v in PREFIX}
        return max((v for v in found if found[v]), key=lambda v: Accuracy(found[v]["accs"]).mean)

    def checkpoint(self):
        storage.save(
            self.folder / "checkpoint.pt",
            "checkpoint",
            {
                "state": {k: to(v, "cpu") for k, v in vars(self.state).items()},
                "tracker": self.tracker.state(),
                "settings": settings_of(self.args),
                "identity": self.dataset.identity,
                "experts": storage.fingerprint(self.experts),
            },
        )
        self.saved_at = time.monotonic()

    # --- the whole

    def distil(self):
        """The loop: it = 0..Iteration inclusive; evaluate where due, then update."""
        args, state = self.args, self.state
        with Progress(args.Iteration + 1, "Iterations", initial=state.iteration) as progress:
            while state.iteration <= args.Iteration:
                if state.iteration % args.eval_it == 0 and not state.evaluated:
                    self.checkpoint()  # an evaluation may take hours
                    began = time.monotonic()
                    results = self.evaluate()
                    with signals.held():
                        self.record(results)
                        self.checkpoint()
                    still = args.Iteration // args.eval_it - state.iteration // args.eval_it
                    progress.interlude(time.monotonic() - began, still)
                progress.advance(self.iterate())
                if state.bad_steps >= args.max_bad_steps:
                    raise Diverged
                if state.iteration % args.ckpt_it == 0 or time.monotonic() - self.saved_at > 600:
                    with signals.held():
                        self.checkpoint()

    def report(self):
        """The closing table, the curves, and where to look."""
        args, state = self.args, self.state
        tracking.curves(self.folder / "curves.png", self.folder / "metrics.jsonl")
        learned = state.best[f"{self.best_variant()}/{self.judge.pool[0]}"]["syn_lr"]
        baselines = compare_with_random(args, self.dataset, self.judge, learned)
        say(f"\nTest accuracy (%), {args.num_eval} networks each, {len(self.labels)} images, {args.ipc} per class")
        say(TABLE.format("network", "images", "best", "last"))
        for model in self.judge.pool:
            for variant in PREFIX:
                best, last = (Accuracy(kept[f"{variant}/{model}"]["accs"]) for kept in (state.best, state.last))
                say(TABLE.format(model, f"distilled, {variant}", percent(best), percent(last)))
            if model in baselines:
                say(baseline_line(args, model, baselines[model]))
        say("Best is the best of the evaluations on test data, as the field reports it; last is the last one's.")
        if state.skipped or state.lr_rejected:
            say(f"{state.skipped} non-finite updates were skipped and {state.lr_rejected} updates of the lr rejected.")
        say(f"\nLook at {self.folder / 'grid_best.png'} and {self.folder / 'curves.png'}")
        say(f"Use     {self.folder / 'synthetic_best.pt'} (the {self.best_variant()} images of the best evaluation)")


TABLE = "{:<14}{:<16}{:>12}{:>14}"


def baseline_line(args, model: str, baseline) -> str:
    note = f"   {args.baseline_draws} draws, lr {baseline.lr:.4g}"
    return TABLE.format(model, "random real", "", percent(baseline.accuracy)) + note


def canvas_of(args, dataset) -> Canvas | None:
    return Canvas(dataset.resolution, args.canvas_size, args.canvas_samples) if args.texture else None


def make_judge(args, dataset, device) -> Judge:
    views = Views(options.augmentation(args), canvas_of(args, dataset))
    how = options.arithmetic(args)
    images = dataset.transform(dataset.test.pixels.to(device))
    return Judge(
        pool=POOLS[args.eval_mode](args.model),
        recipe=evaluation_recipe(args.epoch_eval_train, args.batch_train, views, how),
        testset=TestSet(images, dataset.test.labels.to(device), args.batch_real, how),
        classes=len(dataset.classes),
        count=args.num_eval,
        seed=args.seed,
    )


def compare_with_random(args, dataset, judge: Judge, learned_lr: float) -> dict:
    """Network to Baseline for as many random real images as are synthetic; empty without --baseline_draws."""
    if not args.baseline_draws:
        return {}
    rates = sorted({args.lr_teacher, learned_lr})
    labels = torch.arange(judge.classes, device=judge.testset.labels.device).repeat_interleave(args.ipc)
    epochs = len(rates) * args.baseline_draws * judge.epochs
    with Progress(epochs, "Random real images to compare with, epochs", leave=False) as progress:
        return random_real_images(
            judge, lambda random: dataset.sample(args.ipc, random), labels, rates, args.baseline_draws, progress.advance
        )


def forward_work(args, dataset) -> float:
    """FLOP of the forward pass of one student step."""
    images = args.batch_syn or args.ipc * len(dataset.classes)
    return images * (args.canvas_samples if args.texture else 1) * forward_flops(args.model, *dataset.size)


def compile_student(args, dataset, device) -> str:
    """--compile, decided for the student's steps; evaluations go along."""
    steps = (args.Iteration + 1) * args.syn_steps
    return compile_mode(args.compile, device, steps, steps * forward_work(args, dataset) * (GRADIENT + SECOND_ORDER))


def evaluate_only(args, dataset, synthetic: storage.Synthetic, device):
    """Judges a finished set with a pool of networks."""
    epochs = (args.epoch_eval_train + 1) * args.num_eval * len(POOLS[args.eval_mode](args.model))
    work = epochs * len(synthetic.labels) * GRADIENT * forward_flops(args.model, *dataset.size)
    steps = epochs * -(-len(synthetic.labels) // args.batch_train)
    args.compile = compile_mode(args.compile, device, steps, work)
    judge = make_judge(args, dataset, device)
    lr = args.lr_teacher if synthetic.syn_lr is None else synthetic.syn_lr
    images, labels = synthetic.images.float().to(device), synthetic.labels.long().to(device)
    args.ipc = max(1, len(labels) // judge.classes)  # of the random real images to compare with
    with Progress(judge.epochs, "Evaluation, epochs", leave=False) as progress:
        results = judge(images, labels, lr, "evaluation only", on_epoch=progress.advance)
    baselines = compare_with_random(args, dataset, judge, lr)
    say(f"\nTest accuracy (%) of {synthetic.path}, {args.num_eval} networks each, lr {lr:.4g}")
    for model, accuracy in results.items():
        say(TABLE.format(model, "synthetic", "", percent(accuracy)))
        if model in baselines:
            say(baseline_line(args, model, baselines[model]))


class Diverged(Exception):
    pass


def to(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


MAY_DIFFER = (
    "resume", "run_name", "wandb", "device", "compile", "save_dir", "ckpt_it", "data_path", "buffer_path", "Iteration",
    "max_files",
)  # fmt: skip


def settings_of(args) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def run_to_resume(args) -> Path | None:
    """The folder that --resume means. `auto`: the latest unfinished run with these settings; None where there is none."""
    if args.resume != Path("auto"):
        folder = args.resume
        if not (folder / "checkpoint.pt").is_file():
            raise InputError(f"--resume {folder} is no folder of a run: it has no checkpoint.pt.")
        return folder
    wanted = comparable(settings_of(args))
    found = []
    for path in Path(args.save_dir, args.dataset).glob("*/checkpoint.pt"):
        with contextlib.suppress(InputError):  # another run's damage is not this one's
            checkpoint = read_checkpoint(path)
            stored = comparable(checkpoint["settings"])
            if args.seed is None:
                stored["seed"] = None
            named = path.parent.name == args.run_name
            unfinished = args.run_name is None and checkpoint["state"]["iteration"] <= args.Iteration
            if stored == wanted and (named or unfinished):
                found.append(path.parent)
    return max(found, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime, default=None)


def comparable(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k not in MAY_DIFFER}


def read_checkpoint(path: Path) -> dict:
    """Raises InputError where it is none, or its parts are none of a checkpoint; `check_resumed` looks at its values."""
    checkpoint = storage.load(path, "checkpoint")
    parts = [checkpoint.get(name) for name in ("state", "tracker", "settings", "identity")]
    sound = all(isinstance(part, dict) for part in parts) and all(
        isinstance(value, int)
        for value in (parts[0].get("iteration"), parts[1].get("metrics_bytes"), parts[2].get("seed"))
    )
    if not sound:
        raise InputError(f"{path} is damaged: it lacks a part of a checkpoint; begin the run again in another folder.")
    return checkpoint


def load_checkpoint(folder: Path, args) -> dict:
    """The checkpoint in a run's folder; takes over its seed. Raises InputError where the command differs from it."""
    path = folder / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    stored = checkpoint["settings"]
    if args.seed is None:
        args.seed = stored["seed"]
    if args.compile == "auto":
        args.compile = stored.get("compile", "off")  # the other would round differently
    storage.check_made(path, stored, comparable(settings_of(args)))
    return checkpoint


def check_resumed(checkpoint: dict, folder: Path, experts, dataset, args):
    """Raises InputError where a run would go on with other data or other experts than it began with, or from a state
    that no run with these settings can have."""
    path = folder / "checkpoint.pt"
    storage.check_made(path, checkpoint["identity"], dataset.identity, "; give it the data in --data_path it began with")
    if checkpoint.get("experts") != storage.fingerprint(experts):
        raise InputError(
            f"{folder} began with other experts than are in --buffer_path now; restore them, or choose as many with "
            "--max_files as there were."
        )
    state, fresh = checkpoint["state"], vars(initial_state(args, dataset, "cpu"))
    judged = state["iteration"] > 0 or state.get("evaluated")
    results = {f"{variant}/{model}" for variant in PREFIX for model in POOLS[args.eval_mode](args.model) if judged}
    sound = (
        state.keys() == fresh.keys()
        and all(alike(state[name], value) for name, value in fresh.items())
        and state["iteration"] >= 0
        and 0 < state["syn_lr"] < math.inf
        and all(state[name].keys() == results for name in ("best", "last"))
        and all(is_result(entry) for name in ("best", "last") for entry in state[name].values())
    )
    if not sound:
        raise InputError(f"{path} is damaged: it holds no state of this run; begin the run again in another folder.")


def alike(stored, fresh) -> bool:
    """Whether a stored value could have taken the place of a fresh one: the same type and shape, and finite."""
    if isinstance(fresh, Tensor):
        dense = storage.is_dense(stored, fresh.ndim) and stored.dtype == fresh.dtype and stored.shape == fresh.shape
        return dense and bool(stored.isfinite().all())
    return type(stored) is type(fresh)


def is_result(entry) -> bool:
    """Whether it is an entry of State.best or State.last."""
    accs = entry.get("accs") if isinstance(entry, dict) else None
    return bool(accs) and all(isinstance(acc, float) for acc in accs) and isinstance(entry.get("syn_lr"), float)


def load_experts(args, folder: Path) -> list[storage.Expert]:
    """The experts to match. Raises InputError where there are none, or they have too few epochs."""
    experts = storage.load_experts(folder, args.max_files, args.max_experts)
    if not experts:
        flags = f"--dataset={args.dataset} --model={args.model} --buffer_path={args.buffer_path}"
        raise InputError(f"There are no experts in {folder}; make them with: python buffer_ATT.py {flags} ...")
    needed = args.max_start_epoch - 1 + args.expert_epochs
    for expert in experts:
        if expert.epochs < needed:
            raise InputError(
                f"{expert.path} holds {expert.epochs} epochs, but --max_start_epoch {args.max_start_epoch} and "
                f"--expert_epochs {args.expert_epochs} need {needed}; lower one of them or train experts for longer."
            )
    return experts


def check_experts(experts, args, dataset):
    """Raises InputError where an expert was trained on other data or another network than this command names."""
    parameters = options.check_network(args.model, *dataset.size)
    for expert in experts:
        if expert.settings is not None:  # a published file does not say
            storage.check_made(expert.path, expert.settings, dataset.identity | {"model": args.model})
        storage.check_made(expert.path, {"parameters": expert.size}, {"parameters": parameters})


def check_networks(args, dataset):
    """Raises InputError where a network of the pool cannot take the images, or micro-batches would change the result."""
    for model in POOLS[args.eval_mode](args.model):
        options.check_network(model, *dataset.size, flag=f"--eval_mode {args.eval_mode}: network")
    if args.micro_batch:
        with torch.device("meta"):
            if networks.has_batch_statistics(networks.build(args.model, *dataset.size)):
                raise InputError(f"--micro_batch cannot be used with {args.model}, which normalises over the whole batch.")


def check_classes(args, dataset):
    for name, count in zip(dataset.classes, dataset.train.labels.bincount(minlength=len(dataset.classes)).tolist()):
        if count < args.ipc:
            raise InputError(f"Class {name} has {count} training images, fewer than --ipc {args.ipc} asks for.")
    total = args.ipc * len(dataset.classes)
    if args.batch_syn and args.batch_syn > total:
        raise InputError(f"--batch_syn {args.batch_syn} is more than the {total} synthetic images.")


def check_synthetic(synthetic: storage.Synthetic, args, dataset):
    """Raises InputError where a set was made for other data than this command names."""
    if synthetic.identity is not None:  # bare tensors do not say
        storage.check_made(synthetic.path, synthetic.identity, dataset.identity)
    side = dataset.resolution * (args.canvas_size if args.texture else 1)
    wanted, found = [dataset.channels, side, side], list(synthetic.images.shape[1:])
    if found != wanted:
        raise InputError(
            f"{synthetic.path} holds images of {'x'.join(map(str, found))}, and this command needs "
            f"{'x'.join(map(str, wanted))}; --res, --texture and --canvas_size say which."
        )
    if not 0 <= synthetic.labels.min() <= synthetic.labels.max() < len(dataset.classes):
        raise InputError(f"{synthetic.path} has labels that {dataset.name} with its {len(dataset.classes)} classes has not.")


def main(argv=None):
    args = parse_args(argv)
    device = options.device(args)
    if args.eval_only:
        synthetic = storage.load_synthetic(args.load_syn)
        args.seed = options.draw_seed() if args.seed is None else args.seed
        dataset = load_dataset(options.request(args))
        check_networks(args, dataset)
        check_synthetic(synthetic, args, dataset)
        evaluate_only(args, dataset, synthetic, device)
    else:
        distil(args, device)


def distil(args, device):
    resumed = run_to_resume(args) if args.resume else None
    checkpoint = load_checkpoint(resumed, args) if resumed else None
    if args.seed is None:
        args.seed = options.draw_seed()
    request = options.request(args)
    name = args.run_name or f"{args.model}_ipc{args.ipc}_{args.match}_seed{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = resumed or args.save_dir / args.dataset / name
    if not resumed and (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder} holds a run already; go on with it by --resume {folder}, or take another --run_name.")
    experts = load_experts(args, expert_folder(args.buffer_path, request, args.model))
    dataset = load_dataset(request)
    check_networks(args, dataset)
    check_experts(experts, args, dataset)
    check_classes(args, dataset)
    if checkpoint:
        check_resumed(checkpoint, folder, experts, dataset, args)
    args.wandb = tracking.wandb_mode(args.wandb)
    if args.load_all:
        experts = [expert.in_memory() for expert in experts]
    args.compile = compile_student(args, dataset, device)

    with storage.locked(folder):
        run = Run(args, dataset, experts, folder, device, checkpoint)
        say(
            f"{dataset.name}, {args.ipc} per class, {len(experts)} experts of {args.model}, seed {args.seed}, "
            f"on {device}; results go to {folder}"
        )
        if checkpoint:
            say(f"Resumed at iteration {run.state.iteration}")
        try:
            if args.compile == "on":
                run.compile()
            run.distil()
            run.checkpoint()
            run.report()
        except Interrupted as interrupted:
            run.checkpoint()
            say(f"Stopped by {interrupted} and saved. Go on with the same command and --resume {folder}")
            raise SystemExit(interrupted.exit_code) from None
        except InputError:  # a damaged expert, found on reading it
            run.checkpoint()
            raise
        except Diverged:
            run.checkpoint()
            say(
                f"Stopped after {args.max_bad_steps} non-finite updates in a row; the images are those before them. "
                f"Lower --lr_img (now {args.lr_img:g}), --lr_lr ({args.lr_lr:g}) or --syn_steps ({args.syn_steps})."
            )
            raise SystemExit(1) from None
        finally:
            run.tracker.close()


if __name__ == "__main__":
    options.run(main)
