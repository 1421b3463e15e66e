"""Trains expert networks on real data and stores their parameters after every epoch, for distill_ATT.py.

Expert k depends on the settings, the seed and k alone, and its file appears when it is finished: a run that was
stopped makes only what is missing when started again, and a larger --num_experts adds experts.
"""

import time

import torch

import networks
import options
import storage
from evaluation import Recipe, TestSet, lr_drop, train
from performance import GRADIENT, Meter, compile_mode, forward_flops, note
from reparam_module import flatten
from storage import RunError
from tracking import Interrupted, Progress, say
from utils import Views, expert_folder, generator, load_dataset, seeded


def parse_args(argv=None):
    parser = options.Parser(__doc__)
    options.add_shared(parser, batch_real=512, batch_train=512)
    add = parser.add_argument
    add("--num_experts", type=options.positive_int, default=100, help="experts to have in the end")
    add("--train_epochs", type=options.positive_int, default=50, help="epochs of each expert")
    add("--lr_teacher", type=options.positive, default=0.01, help="learning rate of the experts")
    add("--mom", type=options.share, default=0.0, help="momentum")
    add("--l2", type=options.not_negative, default=0.0, help="weight decay")
    add("--decay", action="store_true", help="divide the lr by 10 after train_epochs//2 + 2 epochs")
    return parser.parse_args(argv)


def finished_experts(folder, wanted: int, settings: dict) -> set[int]:
    """Numbers of the experts below `wanted` that are there. Raises InputError where one was made otherwise."""
    done = set()
    for k, path in storage.expert_files(folder).items():
        if k >= wanted:
            continue
        expert = storage.load_expert(path)
        made = expert.settings | {"train_epochs": expert.epochs, "parameters": expert.size}
        storage.check_made(path, made, settings, ": use the same settings, or another --buffer_path")
        done.add(k)
    return done


def stored_seed(folder) -> int | None:
    """The seed of the experts already there, which further experts go on from."""
    for path in storage.expert_files(folder).values():
        return storage.load_expert(path).settings.get("seed")
    return None


class Experts:
    """What all experts of a folder share: data, network, recipe and settings."""

    def __init__(self, args, dataset, settings: dict, folder, device):
        self.args, self.settings, self.folder = args, settings, folder
        self.size = dataset.size
        # the work of an epoch; whether to compile must not depend on how many experts there are
        self.work = len(dataset.train) * GRADIENT * forward_flops(args.model, *self.size)
        batches = -(-len(dataset.train) // args.batch_train) * args.train_epochs
        args.compile = compile_mode(args.compile, device, batches, self.work * args.train_epochs)
        how = options.arithmetic(args)
        self.images = dataset.transform(dataset.train.pixels.to(device))
        self.labels = dataset.train.labels.to(device)
        test = dataset.transform(dataset.test.pixels.to(device)), dataset.test.labels.to(device)
        self.testset = TestSet(*test, args.batch_real, how)
        self.recipe = Recipe(
            epochs=args.train_epochs,
            batch=args.batch_train,
            momentum=args.mom,
            weight_decay=args.l2,
            views=Views(options.augmentation(args)),
            drop_after=lr_drop(args.train_epochs) if args.decay else None,
            how=how,
        )
        self.meter = Meter(device)

    def train(self, k: int, progress) -> float:
        """Trains expert k from the random stream (seed, "expert", k) and stores its trajectory. Returns its accuracy."""
        args = self.args
        with seeded(args.seed, "expert", k, "parameters"):
            net = networks.build(args.model, *self.size).to(self.images.device)
        trajectory = torch.empty(args.train_epochs + 1, self.settings["parameters"])
        trajectory[0] = flatten(net)
        accuracy = []
        random = generator(args.seed, "expert", k, "training")
        began = time.monotonic()
        for epoch, loss in enumerate(train(net, self.images, self.labels, args.lr_teacher, self.recipe, random), 1):
            trajectory[epoch] = flatten(net)
            figures = self.meter.figures(self.work, time.monotonic() - began)
            accuracy.append(self.testset.accuracy(net))
            progress.advance(f"expert {k}, loss {loss:.3f}, test accuracy {accuracy[-1]:.1%}, {note(figures)}")
            began = time.monotonic()
        if not trajectory.isfinite().all():
            raise RunError(f"Expert {k} diverged; lower --lr_teacher, which is {args.lr_teacher}.")
        storage.save_expert(self.folder, k, trajectory, self.settings, accuracy)
        return accuracy[-1]


def main(argv=None):
    args = parse_args(argv)
    device = options.device(args)
    request = options.request(args)
    folder = expert_folder(args.buffer_path, request, args.model)
    if args.seed is None:
        stored = stored_seed(folder)
        args.seed = options.draw_seed() if stored is None else stored
    dataset = load_dataset(request)
    classes = len(dataset.classes)
    settings = dataset.identity | {
        "model": args.model,
        "parameters": options.check_network(args.model, *dataset.size),
        "seed": args.seed,
        "train_epochs": args.train_epochs,
        "lr_teacher": args.lr_teacher,
        "batch_train": args.batch_train,
        "mom": args.mom,
        "l2": args.l2,
        "decay": args.decay,
        "augmentation": list(options.augmentation(args)),
        "precision": args.precision,
    }
    done = finished_experts(folder, args.num_experts, settings)
    say(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images, {classes} classes, "
        f"{dataset.channels}x{dataset.resolution}x{dataset.resolution}; "
        f"{args.model} with {settings['parameters']:,} parameters; seed {args.seed}; on {device}"
    )
    if done:
        say(f"{len(done)} of {args.num_experts} experts are already in {folder}.")

    with storage.locked(folder):
        try:
            experts = Experts(args, dataset, settings, folder, device)
            with Progress((args.num_experts - len(done)) * args.train_epochs, "Epochs of experts") as progress:
                for k in (k for k in range(args.num_experts) if k not in done):
                    start = time.monotonic()
                    accuracy = experts.train(k, progress)
                    say(f"Expert {k}: test accuracy {accuracy:.1%}, {time.monotonic() - start:.1f} s")
        except Interrupted as interrupted:
            say(f"Stopped by {interrupted}. Finished experts are kept; the same command makes the rest.")
            raise SystemExit(interrupted.exit_code) from None
    say(f"{args.num_experts} experts in {folder}")


if __name__ == "__main__":
    options.run(main)
