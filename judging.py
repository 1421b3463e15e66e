"""Judging as a command asks for it: the judge that its flags describe, what a set is compared with at the end of a run, and
--load_syn, which evaluates a finished set, exports it, or both.
"""

import shlex
import time
from dataclasses import replace
from statistics import mean

import torch

import console
import distributed
import sets
import summary
import tracking
from console import Progress, say
from distributed import ALONE, Group
from evaluation import (
    POOLS, Accuracy, Baseline, Judge, Judged, TestSet, Trainer, evaluation_recipe, full_data, random_real_images,
)  # fmt: skip
from performance import GRADIENT, Compute, Pass, forward_flops, memory
from utils import Dataset, Views, generator, stored_transform

SELECTION = 10_000  # training images that --select_on train selects by
# what --load_syn takes from the set where the command does not say: the data, and how a network is trained on it
OF_A_SET = """data_path dataset subset res zca model lr_teacher texture canvas_size canvas_samples dsa dsa_strategy
    batch_train batch_real num_eval epoch_eval_train precision compile""".split()


def pool(args) -> list[str]:
    """The networks to judge with."""
    return POOLS[args.eval_mode](args.model)


def make_judge(args, dataset: Dataset, compute: Compute, group: Group = ALONE) -> Judge:
    recipe = evaluation_recipe(args.epoch_eval_train, args.batch_train)
    selection = None
    if args.select_on == "train":  # the same images in every run, so that runs compare
        chosen = torch.randperm(len(dataset.train), generator=generator(0, "selection"))[:SELECTION].sort().values
        selection = TestSet(*dataset.on(compute.device, dataset.train.part(chosen)), args.batch_real)
    return Judge(
        pool=[Trainer(model, dataset.size, recipe, compute) for model in pool(args)],
        testset=TestSet(*dataset.on(compute.device, dataset.test), args.batch_real),
        views=Views(console.augmentation(args), console.canvas(args, dataset)),
        count=args.num_eval,
        seed=args.seed,
        selection=selection,
        group=group,
    )


def memory_needs(args, dataset: Dataset, count: int) -> tuple[list[Pass], dict[str, int]]:
    """What training networks on `count` images and testing them compute at once, and the bytes of the data sets, for
    memory_needed."""
    count = len(dataset.train) if args.full_data else count
    seen = min(args.batch_train, count) * args.canvas_samples
    sizes = ("--batch_train", "gradient", seen), ("--batch_real", "test", min(args.batch_real, len(dataset.test)))
    passes = [Pass(flag, kind, model, images) for flag, kind, images in sizes for model in pool(args)]
    kept = len(dataset.train) if args.full_data else SELECTION if args.select_on == "train" else 0
    floats = len(dataset.test) + min(kept, len(dataset.train))
    pixels = dataset.train.pixels.numel() + dataset.test.pixels.numel()
    return passes, {"--res": pixels + 4 * floats * dataset.test.pixels[0].numel()}


def compare_with_random(args, dataset: Dataset, judge: Judge, ipc: int, rates: list[float]) -> dict[str, Baseline]:
    """Network to Baseline for random real images, `ipc` of each class; empty without --baseline_draws."""
    if not args.baseline_draws:
        return {}
    epochs = len(rates) * args.baseline_draws * judge.epochs
    with Progress(epochs, "Random real images to compare with, epochs", leave=False, group=judge.group) as progress:
        return random_real_images(judge, dataset, ipc, rates, args.baseline_draws, progress.advance)


def compare_with_all(args, dataset: Dataset, judge: Judge) -> dict[str, Accuracy]:
    """Network to what the whole training set reaches at --lr_teacher: as kept from before, and up to --full_data networks
    more are trained."""
    epochs, what = args.full_data * judge.epochs // judge.count, "Whole training set, epochs"
    with Progress(epochs, what, leave=False, group=judge.group) as progress:
        cache = console.request(args).cache
        return full_data(judge, dataset, args.lr_teacher, args.full_data, cache, progress.advance)


def conclude(args, state, judge: Judge, run: tracking.Run):
    """The end of a run: the figures to compare with, the summary, the pictures, and where to look."""

    def protocol_of_random_images():
        """[learning rates, draws, networks, epochs], and whether the run has no random real images by this protocol yet."""
        _, found = run.best()
        protocol = [sorted({args.lr_teacher, found["syn_lr"]}), args.baseline_draws, args.num_eval, args.epoch_eval_train]
        return protocol, run.results.get("random_real_protocol") != protocol

    protocol, missing = judge.group.from_main(protocol_of_random_images)
    if missing:
        baselines = compare_with_random(args, run.dataset, judge, args.ipc, protocol[0])
        if judge.group.is_main:
            run.results["random_real"] = {model: baseline.tried for model, baseline in baselines.items()}
            run.results["random_real_protocol"] = protocol
            run.checkpoint(state)
    full = compare_with_all(args, run.dataset, judge)
    if not judge.group.is_main:
        return
    variant, found = run.best()
    run.results["full_data"] = {model: all_found.accs for model, all_found in full.items()}
    run.finish(state.iteration, args.log_artifact)
    run.results["concluded"] = state.iteration
    run.checkpoint(state)  # with the wandb run, a new one where a finished run was opened again
    say(f"\n{summary.findings(run.content)}")
    if state.skipped or state.lr_rejected:
        say(f"{state.skipped} non-finite updates were skipped and {state.lr_rejected} updates of the lr rejected.\n")
    say(f"Look at {run.folder / 'grid_best.png'} and {run.folder / 'curves.png'}; read {run.folder / 'summary.md'}")
    say(f"Use     {run.folder / 'synthetic_best.pt'} (the {variant} images at iteration {found['iteration']})")


# --- Finished sets ---------------------------------------------------------------------------------------------------


def judge_finished_set(args, synthetic: sets.Synthetic, dataset: Dataset):
    """--eval_only: judges a finished set with a pool of networks."""
    device, group = console.device(args), distributed.group()
    wandb, why_off = group.from_main(tracking.wandb_mode, args.wandb)
    runs = args.save_dir / args.dataset
    if args.run_name:
        group.from_main(tracking.check_new, runs / args.run_name)
    models = pool(args)
    console.check_pool(args, models, dataset.size)
    if why_off:
        say(why_off)
    if synthetic.syn_lr is None:
        say(f"{synthetic.path} comes without a learning rate; --lr_teacher {args.lr_teacher:g} is used.")
    epochs = (args.epoch_eval_train + 1) * args.num_eval * len(models)
    flops = epochs * len(synthetic.labels) * GRADIENT * mean(forward_flops(model, dataset.size) for model in models)
    args = console.resolve(args, group, device, {}, epochs * -(-len(synthetic.labels) // args.batch_train), flops)
    compute = Compute(device, args.compile == "on", args.precision)
    passes, resident = memory_needs(args, dataset, len(synthetic.labels))
    console.check_memory(compute, dataset.size, passes, ("--model", 0), resident)
    judge = make_judge(args, dataset, compute, group)
    lr = args.lr_teacher if synthetic.syn_lr is None else synthetic.syn_lr
    began = time.monotonic()
    images, labels = synthetic.images.to(device), synthetic.labels.to(device)
    judged = Judged(images, labels, lr, ("evaluation", synthetic.iteration))  # with the seed of its run, the run's networks
    with Progress(judge.epochs, "Evaluation, epochs", leave=False, group=group) as progress:
        (results,) = judge([judged], progress.advance)
    ipc, rates = max(1, len(labels) // len(dataset.classes)), sorted({args.lr_teacher, lr})
    computed = {"evaluating_seconds": round(time.monotonic() - began, 1), "memory_gb": memory(device) / 1e9}
    baselines, full = compare_with_random(args, dataset, judge, ipc, rates), compare_with_all(args, dataset, judge)
    hard = results
    if labels.ndim == 2 and full:  # soft labels: hard-label recovery needs the hard ones
        (hard,) = judge([replace(judged, labels=labels.argmax(1))])
    if not group.is_main:
        return
    folder = tracking.new_folder(runs, args.run_name, f"eval_{args.eval_mode}_{args.model}")
    settings = tracking.settings_of(args)
    content = tracking.save_judgement(folder, settings, synthetic, lr, results, hard, baselines, full, computed, wandb, say)
    say(f"\n{summary.findings(content)}\nAll figures are in {folder / 'results.json'} and {folder / 'summary.md'}")


def settings_of_set(synthetic: sets.Synthetic) -> dict:
    """What a command takes from a set where it does not say otherwise."""
    return {k: synthetic.settings[k] for k in OF_A_SET if k in synthetic.settings}


def use_finished_set(args, synthetic: sets.Synthetic, default: dict):
    """--load_syn: evaluates a finished set, exports it, or both. `default`: the settings of a command without flags."""
    group = distributed.group()
    dataset = console.dataset(group, console.request(args), stored_transform(synthetic.transform))
    synthetic, notes = sets.prepare(synthetic, dataset, console.tiles(args))
    for sentence in notes:
        say(sentence)
    if args.export and group.is_main:
        recipe = tracking.recipe_of(tracking.settings_of(args), dataset, synthetic.syn_lr)
        sets.export(args.export, synthetic, dataset, recipe, evaluation_command(args, default))
        say(f"{len(synthetic.labels)} images are in {args.export}; README.md there says how to use them.")
    if args.eval_only:
        judge_finished_set(args, synthetic, dataset)


def evaluation_command(args, default: dict) -> str:
    """The command that evaluates exported tensors with these settings, to which a reader adds --load_syn."""
    default = default | {"dataset": None, "model": None}  # always said
    said = {k: v for k in OF_A_SET if k not in ("compile", "data_path") and (v := vars(args)[k]) != default[k]}
    return shlex.join(["python", "distill_ATT.py", "--eval_only", *summary.as_flags(said)])
