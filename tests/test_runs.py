"""Both scripts end to end on real digits: what they leave behind, seeds, and resuming."""

import itertools
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import console
import distill_ATT
import distributed
import evaluation
import judging
import networks
import performance
import storage
import tracking
import utils
from evaluation import Judge, Recipe, Trainer, random_real_images
from performance import Compute, forward_flops
from reparam_module import flatten
from small_runs import DIGITS, FAST, command, distil, lines, make_experts, same_run, start, stopped, wait_for

pytestmark = pytest.mark.usefixtures("blank_pictures")

# --- experts


def expert(root, k) -> storage.Expert:
    return storage.load_expert(root / "Digits" / "ConvNetW32" / f"replay_buffer_{k}.pt")


def test_expert_files_hold_every_epoch_and_what_made_them(buffers):
    found = expert(buffers, 1)
    assert found.epochs == 3 and found.settings["model"] == "ConvNetW32" and found.settings["batch_train"] == 256
    rows = [found.snapshot(epoch) for epoch in range(4)]
    # snapshots are copies: each epoch moved on from the one before
    assert all((a - b).norm() > 1e-3 for a, b in zip(rows, rows[1:]))


def test_the_first_snapshot_is_the_untrained_network(buffers):
    with utils.seeded(0, "expert", 1, "parameters"):
        fresh = networks.build("ConvNetW32", 1, 10, 8)
    assert torch.equal(expert(buffers, 1).snapshot(0), flatten(fresh))


def test_an_expert_depends_on_seed_and_number_alone(buffers, tmp_path):
    make_experts(tmp_path, "--num_experts=1")
    (tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_0.pt").unlink()
    make_experts(tmp_path, "--num_experts=3")
    for k in (0, 1):
        ours, theirs = (expert(root, k) for root in (tmp_path, buffers))
        assert all(torch.equal(ours.snapshot(e), theirs.snapshot(e)) for e in range(4))


def test_an_expert_made_in_micro_batches_is_the_same_up_to_rounding(buffers, tmp_path):
    make_experts(tmp_path, "--num_experts=1", "--micro_batch=100")
    ours, theirs = (expert(root, 0) for root in (tmp_path, buffers))
    assert ours.settings == theirs.settings
    for epoch in (1, 3):
        assert (ours.snapshot(epoch) - theirs.snapshot(epoch)).norm() < 1e-4 * theirs.snapshot(epoch).norm()


def test_finished_experts_are_kept_and_more_are_added(buffers, capsys):
    path = buffers / "Digits" / "ConvNetW32" / "replay_buffer_0.pt"
    before = path.stat().st_mtime_ns
    make_experts(buffers)
    assert path.stat().st_mtime_ns == before
    assert "2 of 2 experts already there" in capsys.readouterr().out


@pytest.mark.parametrize("flag, name", [("--train_epochs=4", "--train_epochs 3"), ("--mom=0.9", "--mom 0.0")])
def test_other_settings_on_the_same_folder_are_refused(buffers, flag, name):
    with pytest.raises(storage.InputError, match=f"replay_buffer_0.pt was made with {name}, and this command says"):
        make_experts(buffers, flag)


# --- a run


# where the distillation alone counts
UNJUDGED = ["--eval_it=100", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0"]


@pytest.fixture(scope="module")
def run(buffers, tmp_path_factory):
    return distil(buffers, tmp_path_factory.mktemp("out"), "--run_name=first")


def test_the_closing_table_stands_beside_random_real_images_which_are_not_trained_again(run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run, tmp_path / "Digits" / "r")
    before = storage.load_json(folder / "results.json")["random_real"]
    monkeypatch.setattr(judging, "random_real_images", None)  # would fail if called
    distill_ATT.main([f"--resume={folder}"])
    assert storage.load_json(folder / "results.json")["random_real"] == before
    out = capsys.readouterr().out
    number = r"\d+\.\d ± \d+\.\d"
    assert re.search(rf"ConvNetW32 +\| distilled, raw +\| {number} at \d +\| {number} at 7", out)
    assert re.search(rf"ConvNetW32 +\| distilled, ema +\| {number} at \d +\| {number} at 7", out)
    assert re.search(rf"ConvNetW32 +\| random real \(1 draw, lr 0\.0\d*\) +\| {number}", out)
    assert str(folder / "grid_best.png") in out and str(folder / "synthetic_best.pt") in out


def test_the_baseline_takes_the_better_learning_rate():
    data = utils.load_dataset(utils.Request("Digits", Path("unused")))
    testset = evaluation.TestSet(data.transform(data.test.pixels), data.test.labels, 360)
    trainer = Trainer("ConvNetW32", data.size, Recipe(40, 256, 0.9), Compute())
    judge = Judge([trainer], testset, utils.Views(), count=1, seed=0)
    found = random_real_images(judge, data, 2, [1e-6, 0.05], 2, lambda model: None)["ConvNetW32"]
    alone = random_real_images(judge, data, 2, [0.05], 2, lambda model: None)["ConvNetW32"]
    assert found.accuracy == alone.accuracy and found.lr == 0.05 and found.accuracy.mean > 0.3
    assert [len(draws) for draws in found.tried.values()] == [2, 2] and list(found.tried) == [1e-6, 0.05]


def test_a_run_leaves_behind_what_the_readme_says(run):
    names = {path.name for path in run.iterdir()}
    for prefix in ("", "ema_"):
        assert {f"{prefix}images_0.pt", f"{prefix}labels_0.pt", f"{prefix}images_best.pt", f"{prefix}labels_best.pt",
                f"{prefix}lr_best.pt"} <= names  # fmt: skip
    assert {"config.json", "metrics.jsonl", "synthetic_best.pt", "grid_best.png", "curves.png", "checkpoint.pt",
            "transform.pt", "results.json", "summary.md"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]


def test_tensors_are_named_and_shaped_as_the_fields_tools_load_them(run):
    images, labels, lr = (torch.load(run / f"{n}_best.pt", weights_only=True) for n in ("images", "labels", "lr"))
    assert images.shape == (10, 1, 8, 8) and images.dtype == torch.float32 and not images.requires_grad
    assert labels.tolist() == list(range(10)) and labels.dtype == torch.int64
    assert lr.shape == ()


def test_metrics_have_a_line_for_every_update_and_every_evaluation(run):
    updates = [line for line in lines(run) if "eval" not in line]
    evaluations = [line for line in lines(run) if "eval" in line]
    assert [line["iteration"] for line in updates] == list(range(7))  # 0..Iteration inclusive
    assert {"grand_loss", "syn_lr", "match_step", "start_epoch"} <= updates[0].keys()
    assert all(1 <= line["match_step"] <= 4 and 0 <= line["start_epoch"] < 2 for line in updates)
    where = [(line["iteration"], line["eval"]["variant"]) for line in evaluations]
    assert where == [(it, variant) for it in (0, 3, 6, 7) for variant in ("raw", "ema")]
    for line in evaluations:
        accs = line["eval"]["accs"]
        assert len(accs) == 2 and line["eval"]["mean"] == pytest.approx(sum(accs) / 2)


def test_metrics_say_how_close_to_the_machines_limits_an_iteration_ran(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in found if "eval" not in line):
        assert 0 < line["share_of_peak"] < 2 and 0.05 < line["memory_gb"] < 100 and line["seconds"] > 0


def test_the_synthetic_set_brings_what_is_needed_to_use_it(run):
    content = storage.load(run / "synthetic_best.pt", "synthetic")
    assert content["variant"] in ("raw", "ema") and content["images"].shape == (10, 1, 8, 8)
    assert content["classes"] == [str(c) for c in range(10)] and content["ipc"] == 1
    assert content["transform"]["kind"] == "normalisation" and content["config"]["seed"] == 1
    best = max((line["eval"]["mean"], line["eval"]["variant"]) for line in lines(run) if "eval" in line)
    assert content["accuracy"]["mean"] == pytest.approx(best[0])


def test_config_names_every_setting(run):
    config = storage.load_json(run / "config.json")
    assert config["seed"] == 1 and config["syn_steps"] == 4 and config["made_with"]["torch"] == torch.__version__
    assert config["compile"] == "off"  # what auto came to
    assert [start["device"] for start in config["starts"]] == [performance.describe(torch.device("cpu"))]
    assert tracking.settings_of(distill_ATT.parse_args([])).keys() <= config.keys()


def test_evaluating_more_often_does_not_change_the_distillation(run, buffers, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(console, "compiling_pays", lambda device, steps, flops: asked.append((steps, flops)))
    other = distil(buffers, tmp_path, "--eval_it=2", "--num_eval=1", "--baseline_draws=0")
    keys = ("grand_loss", "syn_lr", "match_step")
    path = lambda folder: [[line[k] for k in keys] for line in lines(folder) if "eval" not in line]  # noqa: E731
    assert path(other) == path(run)
    # and so must not decide what is compiled: a forward pass on 10 images counts for 12 in each of the student's steps
    assert asked == [(7 * 4, 7 * 4 * 10 * 12 * forward_flops("ConvNetW32", (1, 10, 8)))]


def test_random_streams_are_independent_of_each_other(run, buffers, tmp_path):
    other = distil(buffers, tmp_path, *UNJUDGED, "--no_aug", "--eval_mode=C", "--batch_train=5", "--lr_img=1")
    starts = lambda folder: [line["start_epoch"] for line in lines(folder) if "eval" not in line]  # noqa: E731
    assert starts(other) == starts(run)
    first = lambda folder: torch.load(folder / "images_0.pt", weights_only=True)  # noqa: E731
    assert torch.equal(first(other), first(run))


def test_a_seed_that_is_not_given_is_drawn_printed_and_stored(buffers, tmp_path, capsys):
    flags = [*DIGITS, *FAST, *UNJUDGED, "--Iteration=1", f"--buffer_path={buffers}", f"--save_dir={tmp_path}"]
    seeds = []
    for name in ("a", "b"):
        distill_ATT.main([*flags, f"--run_name={name}"])
        seeds.append(storage.load_json(tmp_path / "Digits" / name / "config.json")["seed"])
        assert f", seed {seeds[-1]}, on cpu" in capsys.readouterr().out
    assert seeds[0] != seeds[1]
    distill_ATT.main([*flags, "--run_name=c", f"--seed={seeds[0]}"])
    same_run(tmp_path / "Digits" / "a", tmp_path / "Digits" / "c")


def test_a_checkpoint_is_written_every_so_many_iterations_and_after_ten_minutes(buffers, tmp_path, monkeypatch):
    saved, late, checkpoint, draw = [], [], tracking.Run.checkpoint, distill_ATT.draw_start
    monkeypatch.setattr(tracking.Run, "checkpoint", lambda self, s: saved.append(s.iteration) or checkpoint(self, s))
    monkeypatch.setattr(distill_ATT, "draw_start", lambda args, experts, it: draw(args, experts, late.append(it) or it))
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 601 * (6 in late), strftime=time.strftime)
    monkeypatch.setattr(distill_ATT, "time", clock)
    distil(buffers, tmp_path, "--Iteration=9", "--ckpt_it=4", "--eval_it=100", "--num_eval=1", "--baseline_draws=0")
    assert saved == [0, 0, 0, 4, 7, 8, 10, 10, 10, 10]  # around evaluations, as asked, after ten minutes, in the end


def test_mtt_matches_the_last_step(run, buffers, tmp_path):
    steps = lambda folder: {line["match_step"] for line in lines(folder) if "eval" not in line}  # noqa: E731
    assert steps(distil(buffers, tmp_path, *UNJUDGED, "--match=mtt")) == {4} != steps(run)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, buffers, tmp_path, capsys):
    metrics = stopped(4, buffers, tmp_path, "--run_name=first", "--ckpt_it=2") / "metrics.jsonl"
    metrics.write_text(metrics.read_text() * 2)  # as a kill leaves it, after updates of which there is no checkpoint
    resumed = distil(buffers, tmp_path, "--run_name=first", "--resume=auto")
    same_run(run, resumed)
    again = re.search("Resumed at iteration 4(.*)\n", capsys.readouterr().out)[1]
    assert again == ", the last checkpoint; 4 updates after it will be computed again; ckpt_it is now 500, was 2"


def changes(folder):
    """Of each start of a run."""
    return [start["changes"] for start in storage.load_json(folder / "config.json")["starts"]]


def test_how_often_a_run_looks_may_change_on_resuming_and_changes_nothing_it_sees(run, buffers, tmp_path, capsys):
    stopped(4, buffers, tmp_path, "--run_name=r")
    folder = distil(buffers, tmp_path, "--resume=auto", "--run_name=r", "--eval_it=2", "--num_eval=1", "--ckpt_it=3")
    said = re.search("Resumed at iteration 4(.*)\n", capsys.readouterr().out)[1]
    changed = {"ckpt_it is now 3, was 500", "eval_it is now 2, was 3", "num_eval is now 1, was 2"}
    assert set(said.split("; ")[1:]) == changed
    assert changes(folder) == [{}, {"num_eval": [2, 1], "eval_it": [3, 2], "ckpt_it": [500, 3]}]
    ours, theirs = (storage.load(path / "checkpoint.pt", "checkpoint")["state"] for path in (folder, run))
    assert all(torch.equal(ours[k], theirs[k]) for k in ("images", "ema", "momentum")) and ours["syn_lr"] == theirs["syn_lr"]
    best = storage.load_json(folder / "results.json")["best"].values()
    assert {len(one["accs"]) for one in best} == {1}  # those by two networks do not compare
    assert [line["iteration"] for line in lines(folder) if "eval" in line] == [0, 0, 3, 3, 4, 4, 6, 6, 7, 7]


def test_a_longer_run_says_so_and_records_it_and_was_made_by_its_first_command(buffers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill_ATT.py", "--first"])
    folder = distil(buffers, tmp_path, *UNJUDGED, "--run_name=r", "--Iteration=1")
    monkeypatch.setattr(sys, "argv", ["distill_ATT.py", "--second"])
    distil(buffers, tmp_path, *UNJUDGED, f"--resume={folder}", "--Iteration=2")
    assert "Resumed at iteration 2; Iteration is now 2, was 1\n" in capsys.readouterr().out
    assert changes(folder) == [{}, {"Iteration": [1, 2]}]
    starts = storage.load_json(folder / "config.json")["starts"]
    assert [start["command"].split()[-1] for start in starts] == ["--first", "--second"]
    made_by = (folder / "summary.md").read_text().partition("# made by\n")[2]
    assert made_by.startswith("distill_ATT.py --first\n")


@pytest.mark.parametrize("flag, says", [("--syn_steps=5", "4"), ("--lr_img=50", "100.0")])
def test_going_on_with_another_method_is_refused_by_the_setting(run, buffers, flag, says):
    name = flag.split("=")[0]
    with pytest.raises(storage.InputError, match=f"{name} cannot change within a run: .* has {says}, and this .* says 5"):
        distil(buffers, run.parent.parent, f"--resume={run}", flag)


def test_a_signal_saves_and_says_how_to_go_on(buffers, tmp_path):
    slow = ["--epoch_eval_train=100000", "--run_name=stopped"]  # it is stopped in an evaluation
    process = start(command("distill_ATT.py", f"--buffer_path={buffers}", f"--save_dir={tmp_path}", *slow))
    folder = tmp_path / "Digits" / "stopped"
    wait_for(folder / "config.json", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 143 and err == "" and console.Interrupted(signal.SIGINT).exit_code == 130
    assert f"python distill_ATT.py --resume={folder}" in out
    assert storage.load(folder / "checkpoint.pt", "checkpoint")["state"]["iteration"] == 0


def test_a_run_that_was_killed_before_it_wrote_its_settings_counts_as_one(buffers, tmp_path):
    folder = distil(buffers, tmp_path, *UNJUDGED, "--Iteration=0", "--run_name=r")
    (folder / "config.json").unlink()
    with pytest.raises(storage.InputError, match="holds a run already; go on with it by --resume"):
        distil(buffers, tmp_path, "--run_name=r")
    distil(buffers, tmp_path, *UNJUDGED, "--Iteration=1", f"--resume={folder}")
    assert storage.load_json(folder / "config.json")["seed"] == 1


DIVERGING = [*UNJUDGED, "--Iteration=8", "--max_bad_steps=3", "--eval_it=2", "--run_name=x"]


def test_diverging_stops_with_finite_images_and_says_what_to_lower(buffers, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        console.run(lambda: distil(buffers, tmp_path, *DIVERGING, "--lr_img=1e30"))
    folder = tmp_path / "Digits" / "x"
    says = r"Stopped after 3 non-finite .* --resume \S+/x and a lower --lr_img \(now 1e\+30\) or --lr_lr \(1e-05\)\.\n"
    assert stopped.value.code == 1 and re.search(says, capsys.readouterr().err)
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    assert (state["bad_steps"], state["skipped"]) == (3, 3)
    updates = [line for line in lines(folder) if "eval" not in line]
    assert [line["skipped"] for line in updates][-4:] == [0, 1, 2, 3] and updates[-1]["syn_lr"] == state["syn_lr"]
    kept = [state["images"], state["ema"], *(torch.load(path, weights_only=True) for path in folder.glob("*images_*.pt"))]
    kept.append(storage.load(folder / "synthetic_best.pt", "synthetic")["images"])
    assert len(kept) >= 7 and all(images.isfinite().all() for images in kept)


def test_a_run_that_diverged_goes_on_with_a_lower_rate_and_the_same_method(buffers, tmp_path):
    with pytest.raises(storage.RunError):
        distil(buffers, tmp_path, *DIVERGING, "--lr_img=1e300")  # no update of its was taken
    folder = tmp_path / "Digits" / "x"
    with pytest.raises(storage.RunError):  # as it is, it diverges again
        distil(buffers, tmp_path, *DIVERGING, "--lr_img=1e300", f"--resume={folder}")
    with pytest.raises(storage.InputError, match="--ema_decay cannot change within a run: .* has 0.999, and this"):
        distil(buffers, tmp_path, *DIVERGING, "--lr_img=10", "--ema_decay=0.5", f"--resume={folder}")
    distil(buffers, tmp_path, *DIVERGING, "--lr_img=10", f"--resume={folder}")
    assert changes(folder) == [{}, {}, {"lr_img": [1e300, 10]}]
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    assert (state["iteration"], state["bad_steps"], state["skipped"]) == (9, 0, 6)
    first = torch.load(folder / "images_0.pt", weights_only=True)
    assert not torch.equal(state["images"], first) and (state["images"] - first).abs().max() < 100


def test_a_synthetic_lr_that_would_become_negative_stays_and_is_counted(buffers, tmp_path):
    folder = distil(buffers, tmp_path, *UNJUDGED, "--lr_lr=1e6")
    updates = [line for line in lines(folder) if "eval" not in line]
    rejected = [0, *(line["lr_rejected"] for line in updates)]
    last = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]["syn_lr"]
    rates = [*(line["syn_lr"] for line in updates), last]  # that each iteration used
    assert rejected[-1] > 0 and all(rate > 0 for rate in rates) and rates[0] == 0.01
    assert all((a == b) == (m < n) for a, b, m, n in zip(rates, rates[1:], rejected, rejected[1:]))


def drawn(trajectories: int, *flags):
    """A command's settings, its data, and the mini-batches of so many trajectories."""
    args = distill_ATT.parse_args([*DIGITS, *FAST, "--seed=1", *flags])
    dataset = utils.load_dataset(console.request(args))
    run = SimpleNamespace(labels=torch.arange(10).repeat_interleave(args.ipc), dataset=dataset)
    return args, dataset, [distill_ATT.draw_minibatches(args, run, trajectory) for trajectory in range(trajectories)]


def test_flags_that_change_what_the_student_sees():
    def views_and_chunks(*flags):
        args, dataset, (minibatches,) = drawn(1, "--ipc=2", *flags)
        judge = judging.make_judge(args, dataset, Compute())
        augmented = {m.view.augmentation is not None for m in minibatches}
        return augmented, [len(m.indices) for m in minibatches], bool(judge.views.strategy)

    assert views_and_chunks() == ({True}, [20] * 4, True)
    assert views_and_chunks("--no_aug") == views_and_chunks("--no_aug=True") == ({False}, [20] * 4, True)
    assert views_and_chunks("--dsa=False") == ({False}, [20] * 4, False)
    assert views_and_chunks("--batch_syn=12") == ({True}, [8, 12, 8, 12], True)


def test_half_of_the_trajectories_are_matched_in_the_mirror_where_asked_for():
    x, y = torch.randn(10, 1, 8, 8), torch.arange(10)
    count = 0
    for plain, mirrored in zip(drawn(200)[-1], drawn(200, "--mirror_experts")[-1], strict=True):
        (seen_mirrored,) = {minibatch.view.mirrored for minibatch in mirrored}  # all steps alike
        count += seen_mirrored
        ours, theirs = (minibatches[0].view(image, y)[0] for minibatches, image in
                        ((mirrored, x), (plain, x.flip(-1) if seen_mirrored else x)))  # fmt: skip
        assert torch.equal(ours, theirs)
    assert 80 < count < 120


@pytest.mark.parametrize("flags, shown", [(["--ipc=50"], False), (["--ipc=50", "--force_save"], True), ([], True)])
def test_pictures_of_fifty_per_class_go_to_wandb_only_when_forced(buffers, tmp_path, monkeypatch, flags, shown):
    calls = []
    monkeypatch.setattr(tracking.Tracker, "pictures", lambda self, *args: calls.append(args))
    distil(buffers, tmp_path, "--Iteration=0", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0", *flags)
    assert bool(calls) == shown


def test_going_on_with_other_experts_or_other_data_is_refused(tmp_path):
    make_experts(tmp_path, "--num_experts=1")
    folder = distil(tmp_path, tmp_path / "out", *UNJUDGED, "--Iteration=1")
    make_experts(tmp_path, "--num_experts=2")
    with pytest.raises(storage.InputError, match="began with other experts than are in --buffer_path now"):
        distil(tmp_path, tmp_path / "out", f"--resume={folder}")
    distil(tmp_path, tmp_path / "out", *UNJUDGED, f"--resume={folder}", "--Iteration=1", "--max_files=1")


def test_a_damaged_expert_found_on_the_way_costs_no_work(tmp_path):
    make_experts(tmp_path, "--num_experts=1", "--model=ConvNetW64")
    path = tmp_path / "Digits" / "ConvNetW64" / "replay_buffer_0.pt"
    expert = storage.load_expert(path)
    content = bytearray(path.read_bytes())
    content[content.index(expert.snapshot(2).numpy().tobytes()) + 99] ^= 4
    path.write_bytes(content)
    flags = ["--model=ConvNetW64", "--Iteration=50", "--eval_it=100", "--run_name=r"]
    with pytest.raises(storage.InputError, match="replay_buffer_0.pt is damaged"):
        distil(tmp_path, tmp_path / "out", *flags)
    storage.load(tmp_path / "out" / "Digits" / "r" / "checkpoint.pt", "checkpoint")


@pytest.mark.parametrize(
    "flags",
    [
        ["--ipc=3", "--batch_syn=12", "--pix_init=noise"],
        ["--load_all", "--max_files=1", "--no_aug"],
        ["--dsa=False", "--select_dist=l2", "--eval_mode=C"],
    ],
)
def test_other_ways_to_run(buffers, tmp_path, flags):
    folder = distil(buffers, tmp_path, "--Iteration=1", "--num_eval=1", *flags)
    assert (folder / "synthetic_best.pt").exists()


def test_textures_are_canvases_of_real_images(buffers, tmp_path):
    flags = ["--texture", "--canvas_size=3", "--canvas_samples=2", "--ipc=2"]
    folder = distil(buffers, tmp_path, *UNJUDGED, "--Iteration=0", *flags)
    images = torch.load(folder / "images_0.pt", weights_only=True)
    assert images.shape == (20, 1, 24, 24)
    real = utils.load_dataset(utils.Request("Digits", tmp_path))
    known = {image.numpy().tobytes() for image in real.transform(real.train.pixels)}
    corner = images[:, :, 8:16, 16:24]
    assert all(image.contiguous().numpy().tobytes() in known for image in corner)


@pytest.mark.parametrize("what", ["synthetic_best.pt", "", "images_best.pt"])
def test_a_finished_set_is_judged_without_distilling(run, tmp_path, capsys, what):
    flags = ["--dataset=Digits", "--model=ConvNetW32"] if what == "images_best.pt" else []  # a set of ours says it
    flags += ["--eval_only", "--eval_mode=C", f"--load_syn={run / what}", "--num_eval=1", "--epoch_eval_train=2"]
    distill_ATT.main([*flags, "--baseline_draws=1", "--seed=0", "--device=cpu", f"--save_dir={tmp_path}"])
    out = capsys.readouterr().out
    assert re.search(r"ConvNetW32 +\| synthetic", out) and re.search(r"ConvNet +\| random real", out)


def test_load_all_draws_with_replacement_and_else_each_expert_comes_once_per_pass():
    experts = [f"expert {k}" for k in range(5)]
    order = lambda *flags: [distill_ATT.draw_start(args(*flags), experts, it)[0] for it in range(50)]  # noqa: E731
    args = lambda *flags: distill_ATT.parse_args(["--seed=3", *flags])  # noqa: E731
    passes, drawn = ([set(chosen[i : i + 5]) for i in range(0, 50, 5)] for chosen in (order(), order("--load_all")))
    assert all(len(one) == 5 for one in passes) and order()[:5] != order()[5:10]
    assert any(len(one) < 5 for one in drawn) and set.union(*drawn) == set(experts)


# --- going on with a run


def said_on_starting(capsys, *args) -> str:
    capsys.readouterr()
    distil(*args)
    return capsys.readouterr().out


def test_a_run_is_resumed_by_its_folder_alone(run, buffers, tmp_path):
    folder = stopped(4, buffers, tmp_path)
    distill_ATT.main([f"--resume={folder}"])
    same_run(run, folder)
    config = storage.load_json(folder / "config.json")
    assert config["to_go_on"].endswith(f"--resume={folder}")
    assert [start["iteration"] for start in config["starts"]] == [0, 4]
    experts = [str(buffers / "Digits" / "ConvNetW32" / f"replay_buffer_{k}.pt") for k in range(2)]
    assert all(start["experts"] == experts and start["time"] for start in config["starts"])


def test_resuming_says_what_it_found_or_why_it_starts_anew(buffers, tmp_path, capsys):
    runs = tmp_path / "Digits"
    small = [*UNJUDGED, "--Iteration=2", "--syn_steps=1"]
    more = buffers, tmp_path, "--resume=auto", *small
    assert f"--resume auto starts a new run: there is none in {runs}." in said_on_starting(capsys, *more)
    (first,) = runs.iterdir()
    finished = said_on_starting(capsys, *more)  # a finished run that was not named is left alone
    assert f"the nearest, {first}, differs in --Iteration (2 there, here the same: it is finished)" in finished
    shutil.rmtree(max(runs.iterdir()))
    other = said_on_starting(capsys, *more, "--lr_img=50")
    assert f"starts a new run: the nearest, {first}, differs in --lr_img (100.0 there, here 50.0)." in other
    folder = stopped(2, buffers, tmp_path, *small, "--ipc=2", "--run_name=b")
    assert f"--resume auto goes on with {folder}." in said_on_starting(capsys, *more, "--ipc=2")
    (runs / "judged").mkdir()
    (runs / "judged" / "results.json").write_text("{}")
    with pytest.raises(storage.InputError, match="judged holds results already"):  # of --eval_only
        distil(*more, "--run_name=judged")
    capsys.readouterr()
    distill_ATT.main([f"--resume={folder}"])
    out = capsys.readouterr().out
    assert "This run is finished; --Iteration=4 beside --resume" in out and "distilled, raw" in out


def stopping(function, at: int):
    """The function, but that a signal comes with that call."""
    calls = itertools.count(1)

    def called(*args):
        if next(calls) == at:
            raise console.Interrupted(signal.SIGTERM)
        return function(*args)

    return called


def test_a_run_that_was_stopped_after_its_last_update_goes_on(buffers, tmp_path, capsys):
    small = [*UNJUDGED, "--Iteration=2", "--syn_steps=1", "--baseline_draws=1", "--resume=auto"]
    for place, name, last in (distill_ATT, "evaluate", 2), (judging, "compare_with_random", 1):
        with mock.patch.object(place, name, stopping(getattr(place, name), last)), pytest.raises(SystemExit):
            distil(buffers, tmp_path, *small)
    capsys.readouterr()
    folder = distil(buffers, tmp_path, *small)
    said = capsys.readouterr().out
    assert f"--resume auto goes on with {folder}." in said and "This run is finished" not in said
    assert [folder] == [*(tmp_path / "Digits").iterdir()] and storage.load_json(folder / "results.json")["random_real"]
    assert [line["iteration"] for line in lines(folder) if "eval" in line] == [0, 0, 3, 3]
    distil(buffers, tmp_path, *small)
    assert "the same: it is finished" in capsys.readouterr().out and len([*(tmp_path / "Digits").iterdir()]) == 2
    distill_ATT.main([f"--resume={folder}", "--Iteration=0"])
    assert "This run is finished; --Iteration=3 beside --resume" in capsys.readouterr().out


# --- what counts in the end


def test_the_last_images_are_evaluated_and_saved(buffers, tmp_path):
    folder = distil(buffers, tmp_path, "--eval_it=100", "--ema_decay=0")  # EMA images are the raw ones then
    results = storage.load_json(folder / "results.json")
    assert [e["iteration"] for e in results["evaluations"]] == [0, 0, 7, 7] and results["iteration"] == 7
    raw, ema = (results["last"][f"{variant}/ConvNetW32"] for variant in ("raw", "ema"))
    assert raw == ema and raw["iteration"] == 7  # equal images score equal
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    assert torch.equal(torch.load(folder / "images_last.pt", weights_only=True), state["images"])
    assert torch.equal(torch.load(folder / "ema_images_last.pt", weights_only=True), state["ema"])


@pytest.mark.parametrize("ema, count", [(0, 1), (2, 2)])  # equal images, as at the start, are judged once
def test_raw_and_ema_images_get_the_accuracies_of_their_own(ema, count):
    zeros = torch.zeros(10, 1, 8, 8)
    state = distill_ATT.State(zeros, zeros + ema, zeros, syn_lr=0.01)
    recorded = {}
    run = mock.Mock(labels=torch.arange(10), record=lambda state, results, seconds: recorded.update(results) or [])

    def judge(sets, on_epoch):
        assert len(sets) == count
        return [{"net": judged.images.mean().item()} for judged in sets]

    judge = mock.Mock(group=distributed.ALONE, epochs=1, side_effect=judge)
    distill_ATT.evaluate(state, judge, run, mock.Mock())
    assert recorded == {("raw", "net"): 0, ("ema", "net"): ema} and state.evaluated


def test_results_hold_every_accuracy_and_every_draw(run):
    results = storage.load_json(run / "results.json")
    assert [e["accs"] for e in results["evaluations"]] == [e["eval"]["accs"] for e in lines(run) if "eval" in e]
    assert all(len(e["accs"]) == 2 for e in results["evaluations"]) and results["config"]["seed"] == 1
    tried = results["random_real"]["ConvNetW32"]["tried"]
    assert tried and all(len(draws) == 1 and len(accs) == 2 for _, draws in tried for accs in draws)
    best = max(found["mean"] for found in results["best"].values())
    assert best == pytest.approx(storage.load(run / "synthetic_best.pt", "synthetic")["accuracy"]["mean"])


def test_a_finished_set_scores_as_in_its_run_when_given_the_seed(run, tmp_path, capsys):
    content = storage.load(run / "synthetic_best.pt", "synthetic")
    flags = ["--eval_only", f"--load_syn={run}", "--baseline_draws=1", "--device=cpu", f"--save_dir={tmp_path}"]
    distill_ATT.main([*flags, "--seed=1", "--run_name=e"])
    results = storage.load_json(tmp_path / "Digits" / "e" / "results.json")
    assert results["evaluations"][0]["accs"] == content["accuracy"]["accs"]
    assert results["iteration"] == content["iteration"] and results["config"]["seed"] == 1
    with pytest.raises(storage.InputError, match="e holds results already; take another --run_name"):
        distill_ATT.main([*flags, "--run_name=e"])
    capsys.readouterr()
    distill_ATT.main([*flags, "--num_eval=1"])
    assert re.search(r"synthetic +\| \d+\.\d +\|\n", capsys.readouterr().out)  # one network has no spread
