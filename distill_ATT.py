"""Distils a data set into a few synthetic images per class by automatic training trajectories (ATT).

An expert is a network trained on the real data; buffer_ATT.py stores its parameters before training and after every
epoch. A student starts at θ_0, where an expert was after a random epoch, and trains for N steps (--syn_steps) on the
synthetic images x by SGD with the synthetic lr α. The target θ* is where that expert was --expert_epochs later. Of the
student's steps, the one nearest to the target, k, is matched.

  grand loss = |θ_k - θ*|² / |θ_0 - θ*|²
  k = the i in 1..N with the smallest |θ_i - θ*| by --select_dist, or N with --match mtt

x and α are updated by SGD with momentum on the grand loss's exact gradient, which goes back through all k steps.

A run's folder is <save_dir>/<dataset>/<run_name>; tracking.Run writes it.

  config.json, transform.pt             at the start
  metrics.jsonl                         a line at every iteration and evaluation
  images_*.pt, labels_*.pt, lr_*.pt     x, labels, α and, as ema_*, the moving
                                        average (EMA) of x: at evaluations
  synthetic_best.pt, grid_best.png      the best x so far, ready to use
  results.json, summary.md, curves.png  at evaluations; more pictures at the end
  checkpoint.pt                         before and after evaluations, every
                                        --ckpt_it iterations or ten minutes, and
                                        when stopped: --resume goes on from it

--load_syn evaluates or exports a finished set in place of distilling one.
"""

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import console
import distributed
import judging
import networks
import sets
import storage
import summary
import tracking
from console import Interrupted, Progress, say, signals
from distributed import ALONE, DivergedError, Group
from evaluation import EVAL_MODES, POOLS, Judge, Judged
from performance import GRADIENT, SECOND_ORDER, Compute, Pass, forward_flops, note, utilisation
from reparam_module import DISTANCES, FlatModule, Match, Minibatch, Step, draw_indices, match_trajectory, mean_match
from storage import InputError, RunError, content_hash
from summary import counted
from tracking import WANDB_MODES, Run, Unwritten
from utils import Dataset, Views, generator, stored_transform

MOMENTUM = 0.5  # of the images and of the synthetic lr, as published
CHECKPOINT_AFTER = 600  # seconds since the last one

EXAMPLE = """  python distill_ATT.py --dataset=CIFAR10 --model=ConvNetD3 --zca --ipc=1 --syn_steps=80 \\
    --expert_epochs=4 --max_start_epoch=2 --lr_img=1e2 --lr_lr=1e-7 --ema_decay=0.9999 \\
    --Iteration=6000"""


def parse_args(argv=None, stored: dict | None = None):
    """The flags; what a command leaves out comes from `stored`, the settings of the run or set that it names, or else is the
    default."""
    parser = console.Parser(__doc__, EXAMPLE)
    console.add_shared(parser, batch_real=256)
    add = parser.adders["method"]
    add("--ipc", type=console.positive_int, default=1, help="synthetic images per class")
    add("--syn_steps", type=console.positive_int, default=20, help="N_S, steps of the student")
    add("--expert_epochs", type=console.positive_int, default=3, help="N_T, epochs of the expert to be matched")
    add("--max_start_epoch", type=console.positive_int, default=25, help="the student starts at an epoch below this")
    add("--match", type=console.one_of(("att", "mtt")), default="att", help="nearest step (att) or last step (mtt)")
    add("--select_dist", type=console.one_of(DISTANCES), default="l1", help="distance that chooses the nearest step")
    add("--experts_per_iter", type=console.positive_int, default=1, help="trajectories whose gradients an update averages")
    add("--mirror_experts", action="store_true", help="match a random half of the trajectories with mirrored images")
    add("--Iteration", type=console.natural, default=5000, help="last iteration, counted from 0")
    add("--lr_img", type=console.positive, default=1000, help="learning rate of the synthetic images")
    add("--lr_lr", type=console.not_negative, default=1e-5, help="learning rate of the synthetic lr")
    add("--lr_teacher", type=console.positive, default=0.01, help="initial synthetic lr: the student's learning rate")
    add("--batch_syn", type=console.positive_int, help="synthetic images per step (default: all)")
    add("--pix_init", type=console.first_images, default="real", help="initial synthetic images; PATH: a set as --load_syn")
    add("--no_aug", type=console.boolean, nargs="?", const=True, default=False, help="no DiffAugment in the student's steps")
    add("--texture", action="store_true", help="synthetic images are canvases of which random crops are seen")
    add("--canvas_size", type=console.positive_int, default=2, help="side of a canvas in images, with --texture")
    add("--canvas_samples", type=console.positive_int, default=1, help="crops of each canvas in a step, with --texture")
    add("--ema_decay", type=console.share, default=0.999, help="decay of the moving average (EMA) of the images")
    add = parser.adders["experts"]
    add("--load_all", action="store_true", help="all experts in memory, drawn with replacement")
    add("--max_files", type=console.positive_int, help="use this many experts (default: all)")
    add("--max_experts", type=console.positive_int, help="use this many of one published file of several experts")
    add = parser.adders["evaluation"]
    add("--eval_mode", type=console.one_of(POOLS), default="S", help=f"networks to evaluate with. {EVAL_MODES}")
    add("--num_eval", type=console.positive_int, default=5, help="times that each of them is trained and tested")
    add("--eval_it", type=console.positive_int, default=100, help="evaluate every so many iterations")
    add("--epoch_eval_train", type=console.positive_int, default=1000,
        help="epochs of an evaluated network (it trains one more, as published)")
    add("--batch_train", type=console.positive_int, default=256, help="images per SGD step of an evaluated network")
    add("--baseline_draws", type=console.natural, default=3, help="sets of random real images to compare with")
    add("--full_data", type=console.natural, default=0, help="networks trained on the whole training set to compare with")
    add("--select_on", type=console.one_of(("test", "train")), default="test",
        help=f"images that choose the best: of the test set, as published, or {judging.SELECTION:,} training ones")
    add("--eval_only", action="store_true", help="evaluate the set --load_syn without distilling")
    add("--load_syn", type=console.path, help="synthetic_best.pt, an images_<x>.pt, a folder of one or of pictures by class")
    add("--export", type=console.new_folder, help="write the set --load_syn as pictures and tensors, with a card, there")
    add = parser.adders["run"]
    add("--save_dir", type=console.folder, default=Path("logged_files"), help="where results go")
    add("--run_name", type=console.file_name, help="folder of the results (default: from the settings and the time)")
    add("--resume", type=console.folder, metavar="{auto,FOLDER}", help="go on with a run, or with the last like this one")
    add("--ckpt_it", type=console.positive_int, default=500, help="iterations between checkpoints")
    add("--max_bad_steps", type=console.positive_int, default=20, help="stop after so many non-finite updates in a row")
    add("--wandb", type=console.one_of(WANDB_MODES), default="auto", help="auto: online if you are logged in, else off")
    add("--log_artifact", action="store_true", help="the best set to wandb as an artifact")
    add("--force_save", action="store_true", help="pictures to wandb at 50 images per class and more, too")
    parser.adders["speed and memory"](
        "--student_precision", type=console.one_of(("fp32", "tf32")), default="fp32",
        help="of the student's steps; --precision is for evaluation")  # fmt: skip
    parser.set_defaults(**(stored or {}))
    args = parser.parse_args(argv)
    if args.texture and args.zca:
        parser.error("--texture cannot be used with --zca: ZCA whitens whole images and cannot be applied to crops")
    if (args.eval_only or bool(args.export)) != bool(args.load_syn):
        parser.error("--eval_only and --export need --load_syn, and --load_syn needs --eval_only or --export")
    names_none = not args.load_syn and args.resume in (None, tracking.AUTO)
    known = stored is not None or names_none  # whether with --texture, which the run or set named may say
    if known and not args.texture and (args.canvas_size, args.canvas_samples) != (2, 1):
        parser.error("--canvas_size and --canvas_samples go with --texture, which is not given")
    if args.match == "mtt" and args.select_dist != "l1":
        parser.error("--select_dist cannot be used with --match mtt, which always matches the last step")
    if args.eval_only and (args.select_on != "test" or args.log_artifact):
        parser.error("--select_on train and --log_artifact cannot be used with --eval_only: they are of a run")
    if args.load_syn and args.resume:
        parser.error("--load_syn cannot be used with --resume: there is nothing to go on with")
    return args


# --- The synthetic set -----------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that changes from one iteration to the next; every random draw follows from the seed and the iteration."""

    images: Tensor  # (classes * ipc, C, H, W) in input space
    ema: Tensor
    momentum: Tensor  # of the images
    syn_lr: float
    lr_momentum: float = 0.0
    iteration: int = 0  # the next one to compute
    evaluated: bool = False  # whether the images have been evaluated as they are
    bad_steps: int = 0  # non-finite updates in a row
    skipped: int = 0  # non-finite updates in all
    lr_rejected: int = 0  # updates that would have made the synthetic lr zero or negative

    def variants(self) -> dict[str, Tensor]:
        return {"raw": self.images, "ema": self.ema}

    def to(self, device) -> "State":
        return State(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def checksum(self) -> str:
        return content_hash(*(v if isinstance(v, Tensor) else repr(v).encode() for v in vars(self.to("cpu")).values()))

    def update(self, match: Match, lr_img: float, lr_lr: float, ema_decay: float):
        """SGD with momentum on images and lr, then the moving average. An update that is not finite changes nothing but
        the counts; one that would make the lr zero or negative changes neither the lr nor its momentum."""
        momentum = MOMENTUM * self.momentum + match.grad_images
        images = self.images - lr_img * momentum
        lr_momentum = MOMENTUM * self.lr_momentum + match.grad_lr
        syn_lr = self.syn_lr - lr_lr * lr_momentum
        scalars = torch.tensor([match.grand_loss, syn_lr])  # in float32, as they are used
        finite = scalars.isfinite().all() and images.isfinite().all()
        self.iteration += 1
        if not finite:
            self.bad_steps += 1
            self.skipped += 1
            return
        self.evaluated = False
        self.bad_steps = 0
        self.images, self.momentum = images, momentum
        self.ema = ema_decay * self.ema + (1 - ema_decay) * images
        if syn_lr > 0:
            self.syn_lr, self.lr_momentum = syn_lr, lr_momentum
        else:
            self.lr_rejected += 1


def given_images(args, dataset: Dataset) -> tuple[Tensor | None, list[str]]:
    """The images of the set that --pix_init names, None where it names none; and notes for the user."""
    if args.pix_init in ("real", "noise"):
        return None, []
    if not args.pix_init.exists():
        raise InputError(f"--pix_init {args.pix_init} is neither real nor noise, nor the path of a set.")
    synthetic, notes = sets.prepare(sets.load_synthetic(args.pix_init), dataset, console.tiles(args))
    return sets.start_images(synthetic, len(dataset.classes), args.ipc), notes


def initial_state(args, dataset: Dataset, images: Tensor | None = None) -> State:
    """Starts from `images`, else from noise or real images in input space; a canvas is tiled from several real ones."""
    random = generator(args.seed, "initial images")
    count, side, tiled = len(dataset.classes) * args.ipc, dataset.resolution, console.tiles(args)
    if args.pix_init == "noise":
        images = torch.randn(count, dataset.channels, tiled * side, tiled * side, generator=random)
    elif images is None:
        images = dataset.sample(args.ipc * tiled**2, random)
        # (count, row, column, C, H, W) -> (count, C, row, H, column, W)
        images = images.view(count, tiled, tiled, *images.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        images = images.reshape(count, dataset.channels, tiled * side, tiled * side)
    return State(images, images.clone(), torch.zeros_like(images), args.lr_teacher)


# --- The method ------------------------------------------------------------------------------------------------------


def distill(args, state: State, experts: list[storage.Expert], student: Step, judge: Judge, run: Run):
    """The loop: evaluate where due, match the student's path with experts', update images and synthetic lr, log, save.

    Several processes divide either the batch of every student step or the trajectories of an iteration."""
    everyone, count = judge.group, args.experts_per_iter
    over_trajectories = everyone if student.group.count == 1 else ALONE
    saved = time.monotonic()
    # processes stop between the same iterations: one that left would keep the others waiting on their GPUs
    with signals.held(everyone.count > 1), Progress(args.Iteration + 1, "Iterations", initial=state.iteration) as progress:
        while (it := state.iteration) <= args.Iteration:
            signals.agree(everyone)
            if it % args.eval_it == 0 and not state.evaluated:
                evaluate(state, judge, run, progress)
                saved = time.monotonic()

            began = time.monotonic()
            starts = {n: draw_start(args, experts, n) for n in range(it * count, (it + 1) * count)}  # by trajectory
            match = match_experts(args, state, starts, student, run, over_trajectories)
            seconds = time.monotonic() - began

            figures = speed(args, match, seconds, student, run.dataset, over_trajectories)
            with signals.held():  # the update and its line in metrics.jsonl belong together
                syn_lr = state.syn_lr  # the one that was used
                state.update(match, args.lr_img, args.lr_lr, args.ema_decay)
                run.iteration(
                    iteration=it, grand_loss=match.grand_loss, syn_lr=syn_lr, match_step=match.step,
                    start_epoch=mean(epoch for _, epoch in starts.values()), seconds=round(seconds, 4),
                    skipped=state.skipped, lr_rejected=state.lr_rejected, **figures,
                )  # fmt: skip
            progress.advance(f"grand loss {match.grand_loss:.4f}, step {match.step:g}, lr {syn_lr:.4g}, {note(figures)}")
            if state.bad_steps >= args.max_bad_steps:
                raise RunError(
                    f"Stopped after {args.max_bad_steps} non-finite updates in a row; the images are those before them. Go "
                    f"on with --resume {run.folder} and a lower --lr_img (now {args.lr_img:g}) or --lr_lr ({args.lr_lr:g})."
                )
            due = state.iteration % args.ckpt_it == 0
            if due:  # in all processes at once, which the time is not
                everyone.require_identical(state.checksum)
            if due or time.monotonic() - saved > CHECKPOINT_AFTER:
                with signals.held():
                    run.checkpoint(state)
                saved = time.monotonic()
        if not state.evaluated:
            evaluate(state, judge, run, progress)  # the last images count


def match_experts(args, state: State, starts: dict, student: Step, run: Run, over_trajectories: Group) -> Match:
    """The mean of the matches of an iteration's trajectories; `starts`: the expert and start epoch of each."""
    labels, matches = run.labels, []
    for trajectory in list(starts)[over_trajectories.rank :: over_trajectories.count]:
        expert, start_epoch = starts[trajectory]
        theta_0 = expert.snapshot(start_epoch).to(labels.device)
        target = expert.snapshot(start_epoch + args.expert_epochs).to(labels.device)
        minibatches = draw_minibatches(args, run, trajectory)
        match = match_trajectory(
            student, theta_0, target, state.images, labels, state.syn_lr, minibatches, args.match, args.select_dist
        )
        matches.append(match)
    return mean_match(matches, len(starts), state.images, over_trajectories)


def speed(args, match: Match, seconds: float, student: Step, dataset: Dataset, over_trajectories: Group) -> dict[str, float]:
    """Share of the device's peak and memory of an iteration that took so long."""
    count = args.experts_per_iter
    work = count * step_flops(args, dataset) * (args.syn_steps * GRADIENT + match.step * SECOND_ORDER)
    sharing = student.group.count * min(over_trajectories.count, count)  # processes that do this work
    return utilisation(student.compute, work / sharing, seconds)


def draw_start(args, experts: list, trajectory: int):
    """The expert and start epoch of a trajectory, counted over all iterations: experts in shuffled order, each once per
    pass; with --load_all, any expert at any time, as published."""
    draw = generator(args.seed, "start", trajectory)
    if args.load_all:
        chosen = int(torch.randint(len(experts), (), generator=draw))
    else:
        order = torch.randperm(len(experts), generator=generator(args.seed, "expert order", trajectory // len(experts)))
        chosen = int(order[trajectory % len(experts)])
    return experts[chosen], int(torch.randint(args.max_start_epoch, (), generator=draw))


def draw_minibatches(args, run: Run, trajectory: int) -> list[Minibatch]:
    """What the student's steps train on in a trajectory, counted as by draw_start: which images, and their augmentation."""
    count, device = len(run.labels), run.labels.device
    size = args.batch_syn or count
    indices = draw_indices(count, size, args.syn_steps, generator(args.seed, "batches", trajectory))
    views = Views(() if args.no_aug else console.augmentation(args), console.canvas(args, run.dataset))
    drawn = views.draw(args.syn_steps, size, generator(args.seed, "augmentation", trajectory), device)
    if args.mirror_experts and torch.rand((), generator=generator(args.seed, "mirror", trajectory)) < 0.5:
        # it comes to the same as to mirror the expert's kernels, which makes it an expert trained on mirrored real images
        drawn = [replace(view, mirrored=True) for view in drawn]
    return [Minibatch(i.to(device, non_blocking=True), view) for i, view in zip(indices, drawn)]


def evaluate(state: State, judge: Judge, run: Run, progress: Progress):
    """Trains and tests fresh networks on the raw and on the EMA images, and keeps what they reach."""
    judge.group.require_identical(state.checksum)
    run.checkpoint(state)  # an evaluation may take hours
    began, it, variants = time.monotonic(), state.iteration, state.variants()
    if torch.equal(state.images, state.ema):  # before the first update: the same networks on the same images
        variants = {"raw": state.images}
    judged = [Judged(images, run.labels, state.syn_lr, ("evaluation", it)) for images in variants.values()]
    what = f"Evaluation at iteration {it}, epochs"
    with signals.released(), Progress(len(judged) * judge.epochs, what, leave=False, group=judge.group) as epochs:
        by_variant = dict(zip(variants, judge(judged, epochs.advance)))
    by_variant.setdefault("ema", by_variant["raw"])
    results = {(variant, model): found for variant, models in by_variant.items() for model, found in models.items()}
    with signals.held():
        lines = run.record(state, results, time.monotonic() - began)
        state.evaluated = True
        run.checkpoint(state)
        for line in lines:
            say(line)
    progress.bar.unpause()  # leaves the evaluation out of the pace and of the time left


# --- Setting up ------------------------------------------------------------------------------------------------------


def step_flops(args, dataset: Dataset) -> float:
    """FLOP of a forward pass on the batch of one student step."""
    images = args.batch_syn or args.ipc * len(dataset.classes)
    return images * args.canvas_samples * forward_flops(args.model, dataset.size)


def last_epoch(args) -> int:
    """The last epoch of an expert that is ever a target."""
    return args.max_start_epoch - 1 + args.expert_epochs


def training_command(args) -> str:
    """The command that trains the experts that this one needs, as many and as long as published."""
    said = console.of_experts(args) | {"train_epochs": max(50, last_epoch(args)), "num_experts": 100}
    return shlex.join(["python", "buffer_ATT.py", *summary.as_flags(said)])


@dataclass
class Given:
    """What a command names, as it was read and checked."""

    dataset: Dataset
    experts: list[storage.Expert]
    images: Tensor | None  # to begin with, where --pix_init names a set
    folder: Path | None  # of the run that goes on
    checkpoint: dict | None  # its own
    changes: dict[str, list]  # setting to [before, now]
    unchecked: list[str]  # what could not be checked, as sentences


def read(args, group: Group) -> Given:
    """The run to go on with, the data, the experts and the first images. Raises InputError where they do not go together."""
    request = console.request(args)
    default = {k: v for k, v in tracking.settings_of(parse_args([])).items() if k not in tracking.FREE}
    folder, checkpoint, changes, found = group.from_main(tracking.resume, args, args.save_dir / args.dataset, default)
    transform = stored_transform(group.from_main(sets.load_transform, folder)) if folder else None
    dataset = console.dataset(group, request, transform)
    data_unchecked = tracking.check_same_data(folder, checkpoint, dataset) if checkpoint else []
    source, renamed = storage.expert_folder(args.buffer_path, request, args.model, dataset.identity, published=True)
    experts = storage.load_experts(source, args.max_files, args.max_experts, training_command(args))
    group.require_same({"experts": storage.fingerprint(experts)}, "experts in --buffer_path")
    console.check_pool(args, judging.pool(args), dataset.size)
    console.check_set(args, dataset)
    made_for = dataset.identity | {"model": source.name, "parameters": console.check_network(args, dataset.size)}
    experts_unchecked = storage.check_experts(experts, made_for, last_epoch(args))
    if checkpoint:
        tracking.check_same_experts(folder, checkpoint, experts)
    images, images_unchecked = (None, []) if checkpoint else given_images(args, dataset)
    unchecked = [*experts_unchecked, *data_unchecked, *images_unchecked]
    for sentence in filter(None, (found, renamed, *unchecked)):
        say(sentence)
    return Given(dataset, experts, images, folder, checkpoint, changes, unchecked)


def make_student(args, dataset: Dataset, device, group: Group) -> Step:
    """The student's step. The processes of `group` divide its batches, unless they divide trajectories."""
    with torch.device("meta"):
        flat = FlatModule(networks.build(args.model, *dataset.size), student=True)
    # batches are divided where there are too few trajectories, unless the network needs the statistics of the whole batch
    whole = args.experts_per_iter >= group.count or networks.has_batch_statistics(flat.training)
    compute = Compute(device, args.compile == "on", args.student_precision)
    return Step(flat, compute, micro_batch=args.micro_batch, group=ALONE if whole else group)


def check_memory(args, given: Given, student: Step):
    """Raises InputError where the run will need more memory than there is."""
    dataset, count = given.dataset, args.ipc * len(given.dataset.classes)
    passes, resident = judging.memory_needs(args, dataset, count)
    seen = (args.batch_syn or count) * args.canvas_samples
    chunk = -(-seen // student.group.count)  # the largest part that a process takes
    chunk = min(args.micro_batch or chunk, chunk)
    passes.append(Pass(console.chunk_flag(args, dataset.size, "--batch_syn"), "second order", args.model, chunk))
    if args.load_all and student.compute.device.type == "cpu":  # a GPU holds two rows of them at a time
        resident["--max_files"] = 4 * sum(expert.size for expert in given.experts) * (last_epoch(args) + 1)
    console.check_memory(student.compute, dataset.size, passes, ("--syn_steps", args.syn_steps), resident)


def announce(args, given: Given, state: State, run: Run, group: Group, student: Step):
    """What is about to be computed, from where on, and by whom."""
    say(
        f"{given.dataset.name}, {args.ipc} per class, {counted(len(given.experts), 'expert')} of {args.model}, seed "
        f"{args.seed}, on {run.labels.device}; results go to {run.folder}"
    )
    if args.compile == "on":
        say("The student's step is compiled in the first iteration, which takes a minute or two (--compile off: none)")
    if group.count > 1:
        divided = "the batch of every step" if student.group.count > 1 else "trajectories"
        if student.group.count == 1 and args.experts_per_iter < group.count:  # with batch norm
            divided += f" (processes beyond --experts_per_iter {args.experts_per_iter} wait)"
        say(f"{group.count} processes divide {divided} and the networks of an evaluation.")
    if given.checkpoint:
        again = f", the last checkpoint; {counted(run.cut, 'update')} after it will be computed again" if run.cut else ""
        changed = "".join(f"; {setting} is now {now}, was {before}" for setting, (before, now) in given.changes.items())
        say(f"Resumed at iteration {state.iteration}{again}{changed}")
        if tracking.is_finished(given.checkpoint, args.Iteration):
            more = max(2 * args.Iteration, state.iteration)
            say(f"This run is finished; --Iteration={more} beside --resume, or another number, extends it.")


def main(argv=None):
    args, group = parse_args(argv), distributed.group()
    console.require_same_command(group, args)
    if args.load_syn:
        synthetic = group.from_main(sets.load_synthetic, args.load_syn)
        args = parse_args(argv, judging.settings_of_set(synthetic))
        return judging.use_finished_set(args, synthetic, vars(parse_args([])))
    if args.resume not in (None, tracking.AUTO):
        args = parse_args(argv, group.from_main(lambda: tracking.read_checkpoint(args.resume, {})["settings"]))
    device = console.device(args)
    wandb, why_off = group.from_main(tracking.wandb_mode, args.wandb)
    if why_off:
        say(why_off)
    given = read(args, group)
    dataset, checkpoint, experts = given.dataset, given.checkpoint, given.experts
    # of distilling alone, by one process: compiling changes the rounding, and neither evaluations nor processes may
    steps = (args.Iteration + 1) * args.experts_per_iter * args.syn_steps
    flops = steps * step_flops(args, dataset) * (GRADIENT + SECOND_ORDER)
    args = console.resolve(args, group, device, checkpoint["settings"] if checkpoint else {}, steps, flops)
    student = make_student(args, dataset, device, group)
    check_memory(args, given, student)
    judge = judging.make_judge(args, dataset, Compute(device, args.compile == "on", args.precision), group)
    if args.load_all:
        experts = [expert.in_memory(last_epoch(args)) for expert in experts]

    state = group.from_main(
        lambda: State(**checkpoint["state"]) if checkpoint else initial_state(args, dataset, given.images)
    ).to(device)
    if given.changes.keys() & tracking.AFTER_DIVERGENCE or state.bad_steps >= args.max_bad_steps:
        state.bad_steps = 0  # a run that goes on after it diverged may fail as often again
    if given.changes.keys() & tracking.PROTOCOL:
        state.evaluated = False  # not by this one
    labels = torch.arange(len(dataset.classes), device=device).repeat_interleave(args.ipc)
    what = f"{args.model}_ipc{args.ipc}_{args.match}_seed{args.seed}"
    folder = given.folder or group.from_main(tracking.new_folder, args.save_dir / args.dataset, args.run_name, what)
    if group.is_main:
        run = Run(folder, tracking.settings_of(args), dataset, labels, judge.models, given.experts, say, given.unchecked)
    else:
        run = Unwritten(folder, dataset, labels)
    with run.open(state, wandb, checkpoint, given.changes):
        announce(args, given, state, run, group, student)
        try:
            distill(args, state, experts, student, judge, run)
            judging.conclude(args, state, judge, run)
        except (storage.WriteError, DivergedError):  # no disk to write to, or processes that no longer hold the same state
            raise
        except (Interrupted, InputError, RunError) as stop:  # InputError: a damaged expert, found on reading it
            run.checkpoint(state)
            run.draw_curves()
            if isinstance(stop, Interrupted):
                say(f"Stopped by {stop} and saved. Go on with: {run.config['to_go_on']}")
                raise SystemExit(stop.exit_code) from None
            raise


if __name__ == "__main__":
    console.run(main)
