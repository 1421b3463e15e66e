"""What people look at after a run: figures of merit, the choice of the best, the page and the pictures."""

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import distill_ATT
import evaluation
import judging
import pictures
import storage
import paper
import summary
import utils
from conftest import ROOT
from evaluation import Accuracy, Judge, Recipe, Trainer, full_data, merits
from performance import Compute
from small_runs import distil, lines, stopped

SMALL = ["--num_eval=1", "--baseline_draws=0", "--run_name=r"]


@pytest.fixture(scope="module")
def run(buffers, tmp_path_factory):
    """A run with two networks, whose first is the one that chooses."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--eval_mode=C", "--Iteration=3", "--run_name=r", f"--data_path={out}", "--lr_teacher=0.05"]
    return distil(buffers, out, *flags)


# --- figures of merit


def test_figures_of_merit_equal_those_calculated_by_hand():
    found = merits(Accuracy([0.6, 0.5]), Accuracy([0.5, 0.5]), Accuracy([0.3]), Accuracy([0.9]))
    assert found["hard_label_recovery"] == pytest.approx(0.4) and found["improvement_over_random"] == pytest.approx(0.25)
    # a = (0.25 - 0.4) / 2 = -0.075; (0.9277435 - 0.3678794) / (2.7182818 - 0.3678794)
    assert found["label_robust_score"] == pytest.approx(0.2381994, abs=1e-6)


@pytest.mark.parametrize("own, real, full, score", [(1, 0, 1, (math.exp(0.5), 0.5)), (0, 1, 1, (math.exp(-1), -1))])
def test_the_score_lies_between_its_ends(own, real, full, score):
    exponential, _ = score
    expected = (exponential - math.exp(-1)) / (math.e - math.exp(-1))
    assert merits(*(Accuracy([v]) for v in (own, own, real, full)))["label_robust_score"] == pytest.approx(expected)


def test_what_is_not_known_has_no_figure():
    own, other = Accuracy([0.5]), Accuracy([0.25])
    known = lambda *args: [name for name, value in merits(own, own, *args).items() if value is not None]  # noqa: E731
    assert known(None, None) == [] and known(other, None) == ["improvement_over_random"]
    assert known(None, other) == ["hard_label_recovery"] and len(known(other, other)) == 3


def digits_judge(epochs=2, canvas=None, precision="auto"):
    data = utils.load_dataset(utils.Request("Digits", Path("unused")))
    data = replace(data, train=data.train.part(torch.arange(200)), test=data.test.part(torch.arange(100)))
    testset = evaluation.TestSet(data.transform(data.test.pixels), data.test.labels, 100)
    trainer = Trainer("ConvNetW32", data.size, Recipe(epochs, 64, 0.9), Compute(precision=precision))
    return data, Judge([trainer], testset, utils.Views(("crop",), canvas), count=4, seed=9)


def test_the_whole_training_set_is_trained_on_once_for_all_runs(tmp_path, monkeypatch):
    data, judge = digits_judge(canvas=utils.Canvas(8, 2, 1))  # canvases are not for real images
    epochs = []
    first = full_data(judge, data, 0.05, 1, tmp_path, lambda model: epochs.append(0))
    assert len(epochs) == 2 and full_data(judge, data, 0.05, 1, tmp_path, pytest.fail) == first
    both = full_data(replace(judge, seed=1), data, 0.05, 2, tmp_path, lambda model: None)["ConvNetW32"].accs
    assert len(both) == 2 and both[0] == first["ConvNetW32"].accs[0] and both[0] != both[1]
    assert full_data(judge, data, 0.05, 0, tmp_path, pytest.fail)["ConvNetW32"].accs == both  # what is known is shown
    # by hand: network 0
    trainer, own = judge.pool[0], (0, "full data", 0, "ConvNetW32", 0)
    images, random = data.transform(data.train.pixels), utils.generator(*own, "training")
    views = utils.Views(("crop",))
    *_, trained = trainer.train(trainer.fresh(*own, "parameters"), images, data.train.labels, 0.05, views, random)
    assert trainer.accuracy(trained, judge.testset) == both[0]


def test_another_recipe_or_other_data_is_another_figure(tmp_path):
    data, judge = digits_judge()
    full_data(judge, data, 0.05, 1, tmp_path, lambda model: None)
    other = {
        "lr": (judge, data, 0.01),
        "epochs": (digits_judge(3)[1], data, 0.05),
        "augmentation": (replace(judge, views=utils.Views()), data, 0.05),
        "precision": (digits_judge(precision="bf16")[1], data, 0.05),
        "training images": (judge, replace(data, identity=data.identity | {"images": "other"}), 0.05),
        "test images": (judge, replace(data, test=data.test.part(torch.arange(50))), 0.05),
    }
    assert [name for name, asked in other.items() if full_data(*asked, 0, tmp_path, None)] == []


def test_an_evaluation_gives_the_figures_of_merit_of_a_set(run, tmp_path, capsys):
    flags = ["--eval_only", f"--load_syn={run}", f"--save_dir={tmp_path}", "--device=cpu", f"--data_path={tmp_path}",
             "--baseline_draws=1", "--eval_mode=C", "--num_eval=2", "--epoch_eval_train=1"]  # fmt: skip
    distill_ATT.main([*flags, "--run_name=a", "--full_data=1", "--seed=1"])
    out, found = capsys.readouterr().out, storage.load_json(tmp_path / "Digits" / "a" / "results.json")
    for own in found["evaluations"]:
        model = own["model"]
        hlr, ior = found["full_data"][model]["mean"] - own["mean"], own["mean"] - found["random_real"][model]["mean"]
        lrs = (math.exp((ior - hlr) / 2) - math.exp(-1)) / (math.e - math.exp(-1))
        expected = dict(zip(summary.MERITS, (hlr, ior, lrs)))
        assert found["merits"][model] == pytest.approx(expected)
        assert re.search(rf"{model} +\| {hlr:.3f} +\| {ior:.3f} +\| {lrs:.3f} +\|", out)
    assert (tmp_path / "Digits" / "a" / "pool.png").exists() and (tmp_path / "Digits" / "a" / "summary.md").exists()
    # a run that distils with the same recipe shows it as well, without training
    distill_ATT.main([*flags, "--run_name=b", "--seed=2"])
    assert storage.load_json(tmp_path / "Digits" / "b" / "results.json")["full_data"] == found["full_data"]


# --- the choice of the best


def test_the_best_may_be_chosen_by_training_images(buffers, tmp_path):
    flags = ["--eval_it=1", "--Iteration=3", *SMALL]
    chosen, plain = (distil(buffers, tmp_path / on, *flags, f"--select_on={on}") for on in ("train", "test"))
    said = [line["eval"] | {"iteration": line["iteration"]} for line in lines(chosen) if "eval" in line]
    results = storage.load_json(chosen / "results.json")
    for variant in ("raw", "ema"):
        found = [one for one in said if one["variant"] == variant]
        best = max(found, key=lambda one: one["train_mean"])  # the first of equals
        assert results["best"][f"{variant}/ConvNetW32"]["iteration"] == best["iteration"]
    assert any(one["train_mean"] != one["mean"] for one in said)
    # nothing but the choice depends on it
    assert [line for line in lines(chosen) if "eval" not in line] == [line for line in lines(plain) if "eval" not in line]
    assert [one["accs"] for one in said] == [line["eval"]["accs"] for line in lines(plain) if "eval" in line]
    content = storage.load(chosen / "synthetic_best.pt", "synthetic")
    assert content["accuracy"]["train_mean"] == max(one["train_mean"] for one in said)
    assert "training images: test data chose nothing" in " ".join((chosen / "summary.md").read_text().split())


def test_the_choosing_images_are_ten_thousand_at_most_and_the_same_for_every_seed(monkeypatch):
    def selection(*flags):
        args = distill_ATT.parse_args(["--dataset=Digits", "--select_on=train", *flags])
        return judging.make_judge(args, utils.load_dataset(utils.Request("Digits", Path("unused"))), Compute()).selection

    assert judging.SELECTION == 10_000 and len(selection("--seed=0").labels) == 1437  # all, where there are fewer
    monkeypatch.setattr(judging, "SELECTION", 50)
    one, other = selection("--seed=0"), selection("--seed=1")
    assert len(one.labels) == 50 and torch.equal(one.images, other.images) and one.labels.unique().numel() == 10


def test_a_run_made_before_the_flag_averages_no_trajectories_when_it_goes_on(buffers, tmp_path):
    folder = stopped(2, buffers, tmp_path, *SMALL)
    path = folder / "checkpoint.pt"
    content = storage.load(path, "checkpoint")
    del content["settings"]["experts_per_iter"]
    storage.save(path, "checkpoint", content)
    with pytest.raises(storage.InputError, match="--experts_per_iter cannot change within a run: .* has 1, .* says 2"):
        distil(buffers, tmp_path, f"--resume={folder}", "--experts_per_iter=2")


def test_what_chooses_cannot_change_within_a_run(buffers, tmp_path):
    folder = stopped(2, buffers, tmp_path, *SMALL)
    with pytest.raises(storage.InputError, match="--select_on cannot change within a run: .* has test, .* says train"):
        distil(buffers, tmp_path, f"--resume={folder}", "--select_on=train")
    path = folder / "checkpoint.pt"  # of a version that had no choice
    content = storage.load(path, "checkpoint")
    del content["settings"]["select_on"]
    storage.save(path, "checkpoint", content)
    with pytest.raises(storage.InputError, match="--select_on cannot change within a run"):
        distil(buffers, tmp_path, f"--resume={folder}", "--select_on=train")


# --- the page


def test_the_summary_holds_every_figure_and_the_commands_that_go_on(run):
    page, results = (run / "summary.md").read_text(), storage.load_json(run / "results.json")
    for model in ("ConvNetW32", "ConvNet"):
        for variant in ("raw", "ema"):
            best, last = (results[which][f"{variant}/{model}"] for which in ("best", "last"))
            cells = [f"{Accuracy(one['accs'])} at {one['iteration']}" for one in (best, last)]
            assert re.search(rf"\| {model} +\| distilled, {variant} +\| {cells[0]} +\| {cells[1]} +\|", page)
        assert re.search(rf"\| {model} +\| random real \(1 draw, lr [\d.]+\) +\| \d", page)
        score = results["merits"][model]["improvement_over_random"]
        assert re.search(rf"\| {model} +\| - +\| {score:.3f} +\| - +\|", page)
    said = "4 iterations in", "GB of memory", "Seed 1", f"--resume={run}", f"--eval_only --load_syn={run}", "--export="
    assert all(text in page for text in said)
    flags = page.split("## Settings")[1].split("```")[1].split()
    args = distill_ATT.parse_args(flags)  # they are flags of a command
    assert args.syn_steps == 4 and args.seed == 1 and args.dsa is True and not args.zca
    flags = summary.as_flags({"seed": 0, "dsa": False, "zca": False, "res": None, "texture": True})
    assert flags == ["--seed=0", "--dsa=False", "--texture"]


def test_the_figures_are_of_the_set_that_is_used(run):
    results, best = storage.load_json(run / "results.json"), storage.load(run / "synthetic_best.pt", "synthetic")
    assert results["best_set"]["reached"]["ConvNetW32"]["accs"] == best["accuracy"]["accs"]
    at = {(e["model"], e["variant"], e["iteration"]): e["accs"] for e in results["evaluations"]}
    assert results["best_set"]["reached"]["ConvNet"]["accs"] == at["ConvNet", best["variant"], best["iteration"]]


@pytest.mark.parametrize(
    "changed, figure",
    [
        ({}, "48.3 ± 1.0"), ({"dataset": "CIFAR100", "ipc": 50}, "51.2 ± 0.3"), ({"model": "ConvNet"}, "48.3 ± 1.0"),
        ({"dataset": "ImageNet", "subset": "imagemeow", "model": "ConvNetD5"}, "34.0 ± 1.4"), ({"ipc": 2}, None),
        ({"model": "ConvNetD4"}, None), ({"res": 64}, None), ({"dataset": "Digits"}, None), ({"match": "mtt"}, "46.2 ± 0.8"),
    ],
)  # fmt: skip
def test_the_papers_figure_stands_beside_a_run_of_its_setting(changed, figure):
    settings = {"dataset": "CIFAR10", "subset": "imagenette", "ipc": 1, "model": "ConvNetD3", "match": "att"}
    settings |= {"res": None, "texture": False}
    assert paper.figure(settings | changed) == figure


# --- pictures


def test_pictures_are_there_while_a_run_goes_on(buffers, tmp_path):
    folder = stopped(2, buffers, tmp_path)
    assert all((folder / name).stat().st_size > 1000 for name in ("curves.png", "grid_best.png"))


def test_a_run_leaves_every_picture_that_shows_something(run, buffers, tmp_path):
    for folder, several in ((run, True), (distil(buffers, tmp_path, *SMALL, "--Iteration=0"), False)):
        moments = storage.load(folder / "synthetic_best.pt", "synthetic")["iteration"] > 0
        expected = {"grid_best.png": True, "curves.png": True, "pool.png": several, "grid_over_time.png": moments}
        assert {path.name for path in folder.glob("*.png")} == {name for name, drawn in expected.items() if drawn}


def test_the_strip_shows_first_middle_and_best(run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "strip", lambda path, moments, classes, title: shown.extend(moments))
    content, best = storage.load_json(run / "results.json"), storage.load(run / "synthetic_best.pt", "synthetic")
    for it in (0, 2, 5):
        torch.save(torch.full((10, 1, 8, 8), float(it)), tmp_path / f"images_{it}.pt")
    found = {"model": "ConvNetW32", "variant": "raw"}
    content["evaluations"] = [found | {"iteration": it, "accs": [it / 10]} for it in (0, 2, 5)]
    torch.save(torch.zeros(10, 1, 8, 8), tmp_path / "images_3.pt")  # saved by an evaluation that was killed
    best |= {"variant": "raw", "iteration": 6, "accuracy": {"model": "ConvNetW32", "accs": [0.6]}}
    assert pictures.draw_over_time(tmp_path, content, best)
    assert [name for name, _ in shown] == ["iteration 0\n0.0 %", "iteration 2\n20.0 %", "iteration 6\n60.0 %"]
    undo = utils.stored_transform(best["transform"]).undo
    expected = [undo(torch.zeros(10, 1, 8, 8)), undo(torch.full((10, 1, 8, 8), 2.0)), best["pixels"]]
    assert all(torch.equal(found, wanted) for (_, found), wanted in zip(shown, expected))


def test_pictures_of_any_number_of_classes_and_images_are_drawn(tmp_path):
    for classes, ipc in ((1, 1), (200, 1), (4, 3)):
        names = ["$a$ long name of 犬", *(f"class {c}" for c in range(1, classes))]
        images = torch.rand(classes * ipc, 3, 4, 4)
        pictures.grid(tmp_path / "g.png", images, names, "title")
        pictures.strip(tmp_path / "s.png", [("first", images), ("last", images)], names, "title")
        for name in ("g.png", "s.png"):
            height, width = imread(tmp_path / name).shape[:2]
            assert 100 < height <= 1700 and 440 < width <= 2200, (classes, ipc)


def test_a_grid_shows_each_image_below_its_class(tmp_path):
    images = torch.stack([torch.full((3, 4, 4), c / 10) for c in range(10)])
    pictures.grid(tmp_path / "g.png", images, [str(c) for c in range(10)], "")
    shown = torch.from_numpy(imread(tmp_path / "g.png")[..., 0])
    rows = [line for line in shown if len(set(line.tolist())) > 4]  # through images, not text
    grey = [sorted({round(v, 1) for v in line.tolist()} - {1.0}) for line in rows]
    assert [0.0, 0.1, 0.2, 0.3, 0.4] in grey and [0.5, 0.6, 0.7, 0.8, 0.9] in grey


def test_every_picture_of_a_run_in_the_readme_is_made_from_files_in_the_repository(tmp_path):
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    made = [path for path in (tmp_path / "figures").glob("*/*.png")]
    for path in made:
        path.unlink()
    subprocess.run([sys.executable, tmp_path / "figures" / "make_figures.py"], check=True, env={"PYTHONPATH": str(ROOT)})
    shown = set(re.findall(r"figures/(\w+/\w+\.png)", (ROOT / "README.md").read_text()))
    assert shown and all((tmp_path / "figures" / name).stat().st_size > 5000 for name in shown)
    assert sum(path.stat().st_size for path in (ROOT / "figures").glob("*/*") if path.suffix != ".png") < 500_000


def test_hard_label_recovery_is_measured_with_hard_labels(run, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "full_data", lambda *args: {"ConvNetW32": Accuracy([0.9])})
    results = []
    for name, soften in (("hard", lambda y: y), ("soft", lambda y: 0.3 * torch.eye(10)[y] + 0.07)):
        (tmp_path / name).mkdir()
        for kind in ("images", "labels", "lr"):
            tensor = torch.load(run / f"{kind}_best.pt", weights_only=True)
            torch.save(soften(tensor) if kind == "labels" else tensor, tmp_path / name / f"{kind}_best.pt")
        distill_ATT.main(["--eval_only", f"--load_syn={tmp_path / name / 'images_best.pt'}", "--dataset=Digits", "--seed=1",
                          "--model=ConvNetW32", f"--save_dir={tmp_path}", f"--run_name={name}", "--num_eval=2",
                          "--epoch_eval_train=30", "--baseline_draws=1", "--device=cpu"])  # fmt: skip
        results.append(storage.load_json(tmp_path / "Digits" / name / "results.json"))
    hard, soft = ([one["evaluations"][0]["mean"], *one["merits"]["ConvNetW32"].values()] for one in results)
    assert hard[0] != soft[0] and hard[1] == soft[1] == pytest.approx(0.9 - hard[0])  # recovery, of both with hard labels
    assert soft[2] - hard[2] == pytest.approx(soft[0] - hard[0])  # improvement over random, with their own
