"""Trains expert networks on real data and stores their parameters after every epoch, for distill_ATT.py.

Expert k depends on the settings, the seed and k alone (on the rounding of compiled steps where there is work enough to
compile), and its file appears when it is finished: a run that was stopped makes only what is missing when started
again, and a larger --num_experts adds experts.
"""

import contextlib
import shlex
import time
from pathlib import Path

import torch

import console
import distributed
import storage
import summary
from console import Interrupted, Progress, say
from distributed import Group
from evaluation import Recipe, TestSet, Trainer, lr_drop
from performance import GRADIENT, Compute, Pass, forward_flops, note, utilisation
from storage import RunError
from summary import counted
from utils import Dataset, Views, generator

EXAMPLE = "  python buffer_ATT.py --dataset=CIFAR10 --model=ConvNetD3 --zca --num_experts=100 --train_epochs=50"


def parse_args(argv=None):
    parser = console.Parser(__doc__, EXAMPLE)
    console.add_shared(parser, batch_real=512)
    add = parser.adders["experts"]
    add("--num_experts", type=console.positive_int, default=100, help="experts to have in the end")
    add("--train_epochs", type=console.positive_int, default=50, help="epochs of each expert")
    add("--batch_train", type=console.positive_int, default=512, help="images per SGD step")
    add("--lr_teacher", type=console.positive, default=0.01, help="learning rate of the experts")
    add("--mom", type=console.share, default=0.0, help="momentum")
    add("--l2", type=console.not_negative, default=0.0, help="weight decay")
    add("--decay", action="store_true", help="divide the lr by 10 after train_epochs//2 + 2 epochs")
    return parser.parse_args(argv)


def train_experts(args, dataset: Dataset, folder: Path, settings: dict, missing: list[int], compute: Compute, group: Group):
    """The loop: trains the missing experts and stores each as it is finished. The processes of `group` divide them."""
    images, labels = dataset.on(compute.device, dataset.train)
    testset = TestSet(*dataset.on(compute.device, dataset.test), args.batch_real)
    drop_after = lr_drop(args.train_epochs) if args.decay else None
    recipe = Recipe(args.train_epochs, args.batch_train, args.mom, args.l2, drop_after)
    trainer = Trainer(args.model, dataset.size, recipe, compute, args.micro_batch)
    views, work, lines = Views(console.augmentation(args)), epoch_flops(args, dataset), []
    with Progress(len(missing) * args.train_epochs, "Epochs of experts", group=group) as progress:
        for k in group.each(missing):
            start = began = time.monotonic()
            own = args.seed, "expert", k
            theta, random = trainer.fresh(*own, "parameters"), generator(*own, "training")
            trajectory, accuracies, memory_gb = torch.empty(args.train_epochs + 1, settings["parameters"]), [], 0
            trajectory[0] = trainer.flat.unpack(theta)
            for epoch, expert in enumerate(trainer.train(theta, images, labels, args.lr_teacher, views, random), 1):
                trajectory[epoch] = trainer.flat.unpack(expert.theta)
                figures = utilisation(compute, work, time.monotonic() - began)
                accuracies.append(trainer.accuracy(expert, testset))
                memory_gb = max(memory_gb, figures["memory_gb"])
                progress.advance(
                    f"expert {k}, loss {expert.loss:.3f}, test accuracy {accuracies[-1]:.1%}, {note(figures)}"
                )
                began = time.monotonic()
            if not trajectory.isfinite().all():
                raise RunError(f"Expert {k} diverged; lower --lr_teacher, which is {args.lr_teacher}.")
            cost = {"seconds": time.monotonic() - start, "memory_gb": memory_gb}
            storage.save_expert(folder, k, trajectory, settings, accuracies, cost)
            lines.append(f"Expert {k}: test accuracy {accuracies[-1]:.1%}, {cost['seconds']:.1f} s")
            say(lines[-1])
        for line in sum(group.gather(lines)[1:], []):
            say(line)


def epoch_flops(args, dataset: Dataset) -> float:
    return len(dataset.train) * GRADIENT * forward_flops(args.model, dataset.size)


def check_memory(args, dataset: Dataset, compute: Compute):
    """Raises InputError where more memory will be needed than there is."""
    train, test = (part.pixels.numel() for part in (dataset.train, dataset.test))
    chunk = min(args.micro_batch or args.batch_train, args.batch_train, len(dataset.train))
    passes = [
        Pass(console.chunk_flag(args, dataset.size, "--batch_train"), "gradient", args.model, chunk),
        Pass("--batch_real", "test", args.model, min(args.batch_real, len(dataset.test))),
    ]
    console.check_memory(compute, dataset.size, passes, ("--train_epochs", args.train_epochs), {"--res": 5 * (train + test)})


def main(argv=None):
    args, group = parse_args(argv), distributed.group()
    console.require_same_command(group, args)
    device = console.device(args)
    request = console.request(args)
    dataset = console.dataset(group, request)
    parameters = console.check_network(args, dataset.size)
    folder, renamed = storage.expert_folder(args.buffer_path, request, args.model, dataset.identity)
    found = {k: storage.load_expert(path) for k, path in storage.expert_files(folder).items()}
    done = {k: expert for k, expert in found.items() if k < args.num_experts}
    group.require_same({"experts": storage.fingerprint(list(found.values()))}, "experts in --buffer_path")
    stored = {"seed": next(iter(found.values())).settings["seed"]} if found else {}  # further experts go on from those there
    steps = -(-len(dataset.train) // args.batch_train) * args.train_epochs * args.num_experts
    flops = epoch_flops(args, dataset) * args.train_epochs * args.num_experts
    args = console.resolve(args, group, device, stored, steps, flops)
    compute = Compute(device, args.compile == "on", args.precision)

    flags = "model", "train_epochs", "lr_teacher", "batch_train", "mom", "l2", "decay", "precision", "seed"
    settings = dataset.identity | {flag: getattr(args, flag) for flag in flags}
    settings |= {"parameters": parameters, "augmentation": list(console.augmentation(args))}
    for expert in done.values():
        made = expert.settings | {"train_epochs": expert.epochs, "parameters": expert.size}
        storage.require_same(expert.path, made, settings, ": use the same settings, or another --buffer_path")
    settings["compile"] = args.compile  # said, not required
    say(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images, "
        f"{len(dataset.classes)} classes, {dataset.channels}x{dataset.resolution}x{dataset.resolution}; "
        f"{args.model} with {parameters:,} parameters; seed {args.seed}; on {device}"
    )
    check_memory(args, dataset, compute)
    for sentence in filter(None, (renamed, *storage.experts_on_trust(list(done.values()), args.dataset))):
        say(sentence)
    if done:
        say(f"{len(done)} of {counted(args.num_experts, 'expert')} already there, in {folder}.")
    missing = group.from_main(lambda: [k for k in range(args.num_experts) if k not in done])
    with storage.locked(folder) if group.is_main else contextlib.nullcontext():
        group.gather()  # no process writes before the folder is locked
        try:
            train_experts(args, dataset, folder, settings, missing, compute, group)
        except Interrupted as interrupted:
            say(f"Stopped by {interrupted}. Finished experts are kept; the same command makes the rest.")
            raise SystemExit(interrupted.exit_code) from None
    found_by = shlex.join(summary.as_flags(console.of_experts(args)))
    say(f"{counted(args.num_experts, 'expert')} in {folder}; distill_ATT.py finds them with {found_by}")


if __name__ == "__main__":
    console.run(main)
