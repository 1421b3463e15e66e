"""Distils a data set into a few synthetic images per class by matching experts' training trajectories (ATT).

A student starts where an expert was after some epoch and trains on the synthetic images; among its steps, the one that
comes nearest to where the expert was --expert_epochs later is matched. The images and the student's learning rate
follow the exact gradient of that match. The experts come from buffer_ATT.py.
"""

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
from evaluation import POOLS, Accuracy, Protocol, TestSet, evaluate_synthetic
from reparam_module import DISTANCES, Minibatch, Student, draw_indices, match_trajectory
from storage import InputError
from tracking import PREFIX, Interrupted, Progress, Signals, Tracker, say
from utils import choose_device, draw_augmentations, expert_folder, generator, load_dataset

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
    add("--pix_init", type=options.one_of(("real", "noise")), default="real", help="initial synthetic images")
    add("--no_aug", action="store_true", help="no DiffAugment in the student's steps")
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
    # the run
    add("--save_dir", type=Path, default=Path("logged_files"), help="where results go")
    add("--run_name", help="folder of the results (default: from the settings and the time)")
    add("--resume", metavar="{auto,FOLDER}", help="go on with the run in a folder, or with the last like this one")
    add("--ckpt_it", type=options.positive_int, default=500, help="iterations between checkpoints")
    add("--max_bad_steps", type=options.positive_int, default=20, help="stop after so many non-finite updates in a row")
    add("--wandb", type=options.one_of(tracking.WANDB_MODES), default="auto", help=", ".join(tracking.WANDB_MODES))
    add("--force_save", action="store_true", help="pictures to wandb at 50 images per class and more, too")
    return parser.parse_args(argv)


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


def initial_state(args, dataset, device) -> State:
    stream = generator(args.seed, "initial images")
    if args.pix_init == "real":
        images = dataset.sample(args.ipc, stream)
    else:
        shape = (len(dataset.classes) * args.ipc, dataset.channels, dataset.resolution, dataset.resolution)
        images = torch.randn(shape, generator=stream)
    images = images.to(device)
    return State(images, images.clone(), torch.zeros_like(images), args.lr_teacher)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """Everything a run needs: what does not change while it goes on, and its `state`, which does."""

    def __init__(self, args, dataset, experts, folder: Path, device, checkpoint: dict | None):
        self.args, self.dataset, self.experts, self.folder, self.device = args, dataset, experts, folder, device
        self.classes = len(dataset.classes)
        self.labels = torch.arange(self.classes, device=device).repeat_interleave(args.ipc)
        self.pool = POOLS[args.eval_mode](args.model)
        self.student = Student(self.network(args.model).to(device))
        self.strategy = () if args.no_aug else options.augmentation(args)
        self.protocol = Protocol(
            epochs=args.epoch_eval_train + 1,
            batch=args.batch_train,
            strategy=options.augmentation(args),
            test_batch=args.batch_real,
        )
        self.testset = TestSet(
            dataset.transform(dataset.test.pixels.to(device)), dataset.test.labels.to(device), self.classes
        )
        self.state = initial_state(args, dataset, device)
        if checkpoint:
            self.state = State(**{k: to(v, device) for k, v in checkpoint["state"].items()})
        self.config = settings_of(args) | {"made_with": storage.made_with(), "command": shlex.join(sys.argv)}
        if not checkpoint:
            storage.save_json(folder / "config.json", self.config)
        self.tracker = Tracker(
            folder,
            tracking.wandb_mode(args.wandb),
            folder.name,
            self.config,
            checkpoint["tracker"] if checkpoint else None,
        )
        self.saved_at = time.monotonic()

    def network(self, model: str):
        return networks.build(model, self.dataset.channels, self.classes, self.dataset.resolution)

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
        augmentations = draw_augmentations(
            self.strategy, args.syn_steps, size, generator(args.seed, "augmentation", it), self.device
        )
        return [Minibatch(i.to(self.device), augment) for i, augment in zip(indices, augmentations)]

    def iterate(self, signals: Signals):
        """One update of the synthetic images and the synthetic lr."""
        args, state, it = self.args, self.state, self.state.iteration
        began = time.monotonic()
        expert, start_epoch = self.expert_for(it)
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
        with signals.held():
            state.update(match, args)
            self.tracker.iteration(
                iteration=it,
                grand_loss=match.grand_loss,
                syn_lr=state.syn_lr,
                match_step=match.step,
                start_epoch=start_epoch,
                seconds=round(time.monotonic() - began, 4),
                skipped=state.skipped,
                lr_rejected=state.lr_rejected,
            )
        return match

    # --- judging and keeping

    def evaluate(self):
        """Trains and tests fresh networks on the raw and on the EMA images, and keeps each where it is the best."""
        args, state, it = self.args, self.state, self.state.iteration
        epochs = 2 * len(self.pool) * args.num_eval * self.protocol.epochs
        with Progress(epochs, f"Evaluation at iteration {it}, epochs", leave=False) as progress:
            results = {
                (variant, model): evaluate_synthetic(
                    model,
                    images,
                    self.labels,
                    state.syn_lr,
                    self.testset,
                    self.protocol,
                    args.num_eval,
                    args.seed,
                    ("evaluation", it, variant, model),
                    progress.advance,
                )
                for variant, images in state.variants().items()
                for model in self.pool
            }
        return results

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
            if model == self.pool[0] and improved:
                self.save_best(variant)
            if model == self.pool[0] and (improved or it % 1000 == 0):
                self.save_images(variant, it)
        state.evaluated = True

    def save_images(self, variant: str, it: int):
        images, prefix = self.state.variants()[variant], PREFIX[variant]
        storage.save_tensor(self.folder / f"{prefix}images_{it}.pt", images)
        storage.save_tensor(self.folder / f"{prefix}labels_{it}.pt", self.labels)
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
        model = self.pool[0]
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
            f"{self.dataset.name}, {self.args.ipc} per class ({variant}), {percent(accuracy)}",
        )

    def best_variant(self) -> str:
        """The variant with the highest accuracy so far on the pool's first network."""
        found = {v: self.state.best.get(f"{v}/{self.pool[0]}") for v in PREFIX}
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
            },
        )
        self.saved_at = time.monotonic()

    # --- the whole

    def distil(self, signals: Signals):
        """The loop: it = 0..Iteration inclusive; evaluate where due, then update."""
        args, state = self.args, self.state
        with Progress(args.Iteration + 1, "Iterations", initial=state.iteration) as progress:
            while state.iteration <= args.Iteration:
                if state.iteration % args.eval_it == 0 and not state.evaluated:
                    results = self.evaluate()
                    with signals.held():
                        self.record(results)
                match = self.iterate(signals)
                progress.advance(f"grand loss {match.grand_loss:.4f}, step {match.step}, lr {state.syn_lr:.4g}")
                if state.bad_steps >= args.max_bad_steps:
                    raise Diverged
                if state.iteration % args.ckpt_it == 0 or time.monotonic() - self.saved_at > 600:
                    with signals.held():
                        self.checkpoint()

    def baseline(self, model: str) -> tuple[Accuracy, float] | None:
        """Accuracy of as many random real images under the same protocol, over --baseline_draws draws, and the lr it
        was reached with: the better of lr_teacher and the learned one, so that it is not undertrained."""
        args, found = self.args, []
        learned = self.state.best[f"{self.best_variant()}/{self.pool[0]}"]["syn_lr"]
        rates = sorted({args.lr_teacher, learned})
        epochs = len(rates) * args.baseline_draws * args.num_eval * self.protocol.epochs
        with Progress(epochs, f"Random real images on {model}, epochs", leave=False) as progress:
            for lr in rates:
                accs = []
                for draw in range(args.baseline_draws):
                    images = self.dataset.sample(args.ipc, generator(args.seed, "random real images", draw))
                    result = evaluate_synthetic(
                        model,
                        images.to(self.device),
                        self.labels,
                        lr,
                        self.testset,
                        self.protocol,
                        args.num_eval,
                        args.seed,
                        ("random real images", draw, model),
                        progress.advance,
                    )
                    accs += result.accs
                found.append((Accuracy(accs), lr))
        return max(found, key=lambda result: result[0].mean)

    def report(self):
        """The closing table, the curves, and where to look."""
        args, state = self.args, self.state
        tracking.curves(self.folder / "curves.png", self.folder / "metrics.jsonl")
        say(f"\nTest accuracy (%), {args.num_eval} networks each, {args.ipc} images per class")
        say(f"{'network':<14}{'images':<14}{'best':>14}{'last':>14}")
        for model in self.pool:
            for variant in PREFIX:
                best, last = (Accuracy(kept[f"{variant}/{model}"]["accs"]) for kept in (state.best, state.last))
                say(f"{model:<14}{'distilled, ' + variant:<14}{percent(best):>14}{percent(last):>14}")
            if args.baseline_draws:
                accuracy, lr = self.baseline(model)
                note = f"   {args.baseline_draws} draws, lr {lr:.4g}"
                say(f"{model:<14}{'random real':<14}{'':>14}{percent(accuracy):>14}{note}")
        say("Best is the best of the evaluations on test data, as the field reports it; last is the last one's.")
        if state.skipped or state.lr_rejected:
            say(f"{state.skipped} non-finite updates were skipped and {state.lr_rejected} updates of the lr rejected.")
        say(f"\nLook at {self.folder / 'grid_best.png'} and {self.folder / 'curves.png'}")
        say(f"Use     {self.folder / 'synthetic_best.pt'} (the {self.best_variant()} images of the best evaluation)")


class Diverged(Exception):
    pass


def percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} ± {100 * accuracy.std:.1f}"


def to(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


MAY_DIFFER = ("resume", "run_name", "wandb", "device", "save_dir", "ckpt_it", "data_path", "buffer_path", "Iteration")


def settings_of(args) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def run_to_resume(args) -> Path | None:
    """The folder that --resume means. `auto`: the latest unfinished run with these settings; None where there is none."""
    if args.resume != "auto":
        folder = Path(args.resume)
        if not (folder / "checkpoint.pt").is_file():
            raise InputError(f"--resume {folder} is no folder of a run: it has no checkpoint.pt.")
        return folder
    wanted = comparable(settings_of(args))
    found = []
    for config in Path(args.save_dir, args.dataset).glob("*/config.json"):
        stored = comparable(storage.load_json(config))
        if args.seed is None:
            stored["seed"] = None
        named = args.run_name in (None, config.parent.name)
        if named and stored == wanted and (config.parent / "checkpoint.pt").is_file():
            found.append(config.parent)
    return max(found, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime, default=None)


def comparable(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k not in (*MAY_DIFFER, "made_with", "command")}


def load_checkpoint(folder: Path, args) -> dict:
    """The checkpoint in a run's folder; takes over its seed. Raises InputError where the command differs from it."""
    path = folder / "checkpoint.pt"
    checkpoint = storage.load(path, "checkpoint")
    stored = checkpoint["settings"]
    if args.seed is None:
        args.seed = stored["seed"]
    for name, value in comparable(settings_of(args)).items():
        if stored.get(name) != value:
            raise InputError(f"{path} was made with --{name} {stored.get(name)}, and this command says {value}.")
    return checkpoint


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
    parameters = options.check_network(args.model, dataset.channels, len(dataset.classes), dataset.resolution)
    wanted = dataset.identity | {"model": args.model, "parameters": parameters}
    for expert in experts:
        made = expert.settings or {"parameters": expert.size}  # a published file says nothing else
        for name, value in wanted.items():
            if name in made and made[name] != value:
                raise InputError(f"{expert.path} was made with {name} {made[name]}, and this command needs {value}.")


def check_classes(args, dataset):
    for name, count in zip(dataset.classes, dataset.train.labels.bincount(minlength=len(dataset.classes)).tolist()):
        if count < args.ipc:
            raise InputError(f"Class {name} has {count} training images, fewer than --ipc {args.ipc} asks for.")
    total = args.ipc * len(dataset.classes)
    if args.batch_syn and args.batch_syn > total:
        raise InputError(f"--batch_syn {args.batch_syn} is more than the {total} synthetic images.")


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device)
    resumed = run_to_resume(args) if args.resume else None
    checkpoint = load_checkpoint(resumed, args) if resumed else None
    if args.seed is None:
        args.seed = options.draw_seed()
    request = options.request(args)
    name = args.run_name or f"{args.model}_ipc{args.ipc}_{args.match}_seed{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = resumed or args.save_dir / args.dataset / name
    if not resumed and (folder / "config.json").exists():
        raise InputError(f"{folder} holds a run already; go on with it by --resume {folder}, or take another --run_name.")
    experts = load_experts(args, expert_folder(args.buffer_path, request, args.model))
    dataset = load_dataset(request)
    check_experts(experts, args, dataset)
    check_classes(args, dataset)
    if args.load_all:
        experts = [expert.in_memory() for expert in experts]

    signals = Signals()
    with storage.locked(folder):
        run = Run(args, dataset, experts, folder, device, checkpoint)
        say(
            f"{dataset.name}, {args.ipc} per class, {len(experts)} experts of {args.model}, seed {args.seed}, "
            f"on {device}; results go to {folder}"
        )
        if checkpoint:
            say(f"Resumed at iteration {run.state.iteration}")
        try:
            run.distil(signals)
            run.checkpoint()
            run.report()
        except Interrupted as interrupted:
            run.checkpoint()
            say(f"Stopped by {interrupted} and saved. Go on with the same command and --resume {folder}")
            raise SystemExit(interrupted.exit_code) from None
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
