"""Every setting of the paper runs end to end on its own kind of data: an expert of one epoch, then an iteration.

The commands are the original ones, with fewer images, steps and networks. Made so small, many differ in nothing that
others do not run, and are left to the long trials. Images are real where the archives of real CIFAR-10 and Tiny ImageNet
lie beside the project, and noise in each source's own format elsewhere.
"""

import json

import pytest
import torch

import buffer_ATT
import console
import distill_ATT
import storage
import utils
from small_data import cifar, imagenet, mnist, real_cifar10, real_tiny, svhn, tiny
from test_commands import DISTIL, parse

OTHERS = [  # data sets without a published setting, with the depth that their resolution takes
    f"python3 distill_ATT.py --dataset={name} --model=ConvNetD3 --ipc=1 --lr_img=1e2 --lr_lr=1e-5"
    for name in ("MNIST", "FashionMNIST", "SVHN", "Digits")
]
SMALLER = ["--ipc=1", "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=1", "--Iteration=0", "--eval_it=1",
           "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0", "--wandb=disabled", "--seed=0", "--device=cpu"]  # fmt: skip


def settings():
    seen = set()
    commands = [c for c in DISTIL if "--subset" not in c or "imagenette" in c] + OTHERS
    for command in sorted(commands, key=lambda c: ("batch_syn" not in c, "eval_mode" in c, "--zca" not in c)):
        args = parse(command)
        features = {args.dataset, args.zca, args.batch_syn}
        yield pytest.param(command, marks=[pytest.mark.long] if features <= seen else [])
        seen |= features


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data set to a small copy of it in its own format, and a folder for experts."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield {
            "CIFAR10": cifar(root / "c10", monkeypatch, real=real_cifar10(per_class=8)),
            "CIFAR100": cifar(root / "c100", monkeypatch, "CIFAR100", per_class=1),
            "Tiny": real_tiny(root / "tiny") or tiny(root / "tiny"),
            "ImageNet": imagenet(root / "imagenet", utils.SUBSETS["imagenette"], train=2, test=1),
            "MNIST": mnist(root / "mnist"),
            "FashionMNIST": mnist(root / "fashion", "FashionMNIST"),
            "SVHN": svhn(root / "svhn", monkeypatch),
            "Digits": root,
            "experts": root / "experts",
        }


@pytest.mark.parametrize("command", list(settings()), ids=lambda c: " ".join(c.split()[2:6]))
def test_a_setting_runs_end_to_end(places, tmp_path, command):
    args = parse(command)
    if args.zca:
        pytest.importorskip("kornia")
    where = [f"--data_path={places[args.dataset]}", f"--buffer_path={places['experts']}"]
    common = [f"--dataset={args.dataset}", f"--model={args.model}", "--seed=0", "--device=cpu"]
    common += ["--zca"] if args.zca else []
    side = utils.SOURCES[args.dataset].resolution
    if args.zca and args.eval_mode != "M":  # which needs 32 pixels, and fitting a whitening of so many takes long
        side = 16
        where += [f"--res={side}"]
    if args.dataset == "ImageNet" and args.ipc == 1:  # another, a long trial made as small, keeps 128
        side = 32
        where += [f"--res={side}"]
    buffer_ATT.main([*common, *where, "--num_experts=1", "--train_epochs=1"])
    flags = [*command.split()[2:], *SMALLER, *where, f"--save_dir={tmp_path}", "--run_name=r"]
    flags = [flag.replace("'", "") for flag in flags] + (["--batch_syn=40"] if args.batch_syn else [])
    distill_ATT.main(flags)

    folder = tmp_path / args.dataset / "r"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "eval" not in line] == [0]
    assert sum("eval" in line for line in lines) == 2 * 2 * (4 if args.eval_mode == "M" else 1)  # before, after; raw, EMA
    content = storage.load(folder / "synthetic_best.pt", "synthetic")
    dataset = utils.load_dataset(console.request(distill_ATT.parse_args(flags)))
    assert content["images"].shape == (len(dataset.classes), dataset.channels, side, side)
    # images and pixels, and nothing large beside: 10 images of CIFAR take less than 1 MB
    assert (folder / "synthetic_best.pt").stat().st_size < 2 * content["images"].nbytes + 50_000
    # the images have moved, and look like images when brought back
    first = torch.load(folder / "images_0.pt", weights_only=True)
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    assert not torch.equal(first, state["images"]) and state["skipped"] == 0
    back = dataset.transform.undo(first)
    assert -0.01 < back.min() and back.max() < 1.01
    if args.zca:
        torch.testing.assert_close(torch.load(folder / "images_zca_0.pt", weights_only=True), back)
