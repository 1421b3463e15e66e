"""Several processes of torchrun leave what one leaves: experts, images, accuracies; and end, go on and fail as one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import buffer_ATT
import console
import distill_ATT
import distributed
import storage
from conftest import draw_blanks
from on_ranks import match
from reparam_module import Match, mean_match
from small_data import image_folder
from small_runs import DIGITS, FAST, command, lines, make_experts, same_experts, same_run, start, wait_for

long = pytest.mark.long
RUN = [*DIGITS, *FAST, "--seed=1", "--Iteration=2", "--eval_it=100", "--epoch_eval_train=2", "--lr_img=5"]
EXPERTS = [*DIGITS, "--train_epochs=2", "--batch_train=512", "--seed=0"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Here and in every process; sums round by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_blanks(monkeypatch)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun would leave a process that is alone on its node all threads
        yield
    torch.set_num_threads(before)


def torchrun(count: int, *command, **options) -> list:
    flags = {"nproc_per_node": count, "standalone": None, **options}
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items() if value is not False]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, command)]


def on_ranks(count: int, jobs: list, folder: Path) -> list:
    """What `count` processes answer to each of the jobs (see on_ranks.py)."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs").write_text(json.dumps(jobs))
    process = start(torchrun(count, "tests/on_ranks.py", folder / "jobs", folder / "results"))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return torch.load(folder / "results", weights_only=True)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def last_images(folder: Path) -> dict[str, torch.Tensor]:
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    return {name: state[name] for name in ("images", "ema")}


def close(a: Path, b: Path, bound=1e-5):
    """Two runs with the same updates up to rounding."""
    left, right = (last_images(folder) for folder in (a, b))
    start = torch.load(b / "images_0.pt", weights_only=True)
    assert not torch.equal(right["images"], start)
    assert all(relative(left[name], right[name]) < bound for name in left)
    for ours, theirs in zip(lines(a), lines(b), strict=True):
        assert ours.keys() == theirs.keys() and ours["iteration"] == theirs["iteration"]
        if "eval" not in ours:
            assert ours["grand_loss"] == pytest.approx(theirs["grand_loss"], rel=1e-4)
            assert (ours["match_step"], ours["start_epoch"]) == (theirs["match_step"], theirs["start_epoch"])


# --- the same result on any number of processes

MATCHES = [
    {"batch": 7},
    {"batch": 2},  # fewer images than processes
    {"batch": 7, "micro_batch": 2},
    {"batch": 4, "samples": 3},
    {"batch": 5, "trajectories": 4},
    {"batch": 5, "trajectories": 2},  # fewer than processes
]
BRIEFLY_JUDGED = ["--num_eval=1", "--baseline_draws=0"]
RUNS = {
    "plain": [],
    "hard": ["--texture", "--ipc=2", "--batch_syn=7", "--micro_batch=2", "--canvas_samples=2", *BRIEFLY_JUDGED],
    "wide": ["--experts_per_iter=3", "--match=mtt", *BRIEFLY_JUDGED],
}


@pytest.fixture(scope="module")
def alone(buffers, tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    buffer_ATT.main([*EXPERTS, "--num_experts=4", f"--buffer_path={folder / 'b'}"])
    for name, flags in RUNS.items():
        distill_ATT.main([*RUN, *flags, f"--buffer_path={buffers}", f"--save_dir={folder}", f"--run_name={name}"])
    distill_ATT.main(judged(folder / "Digits" / "plain", folder))
    return folder


def judged(synthetic: Path, out: Path) -> list:
    return [*DIGITS, "--eval_only", f"--load_syn={synthetic}", "--num_eval=2", "--epoch_eval_train=3", "--eval_mode=C",
            "--baseline_draws=2", "--seed=1", f"--save_dir={out}", "--run_name=judged", "--wandb=disabled"]  # fmt: skip


def commands(buffers: Path, alone: Path, out: Path) -> list:
    experts = ["buffer_ATT.py", *EXPERTS, "--num_experts=4", f"--buffer_path={out / 'b'}"]
    more = [f"--buffer_path={buffers}", f"--save_dir={out}"]
    runs = [[*RUN, *flags, f"--run_name={name}", *more] for name, flags in RUNS.items()]
    judgement = judged(alone / "Digits" / "plain", out)
    return [experts, *(["distill_ATT.py", *flags] for flags in (*runs, judgement))]


def same_as_alone(out: Path, alone: Path):
    same_experts(out / "b", alone / "b", 4)
    for name in RUNS:
        ours, theirs = (root / "Digits" / name for root in (out, alone))
        close(ours, theirs)
        first = [[line for line in lines(folder) if "eval" in line][:2] for folder in (ours, theirs)]
        assert first[0] == first[1] and first[0][0]["iteration"] == 0  # of the same images
    ours, theirs = (storage.load_json(root / "Digits" / "judged" / "results.json") for root in (out, alone))
    assert ours["evaluations"] == theirs["evaluations"] and ours["random_real"] == theirs["random_real"]


@pytest.fixture(scope="module")
def three(alone, buffers, tmp_path_factory):
    """What three processes leave and answer, and where."""
    out = tmp_path_factory.mktemp("three")
    image_folder(out / "0" / "pets")
    image_folder(out / "1" / "pets", train=5)
    shutil.copytree(out / "0" / "pets", out / "2" / "pets")
    for rank in range(3):
        make_experts(out / f"{rank}" / "b", f"--num_experts={1 + (rank == 1)}", "--train_epochs=2")
    new = [*RUN, f"--save_dir={out / 'refused'}"]
    refusals = {
        "settings": ["command", "distill_ATT.py", *new, "--lr_img=10{rank}", f"--buffer_path={buffers}"],
        "code": ["other_code", "distill_ATT.py", *new, f"--buffer_path={buffers}"],
        "experts": ["command", "distill_ATT.py", *new, f"--buffer_path={out}/{{rank}}/b"],
        "data": ["command", "buffer_ATT.py", *EXPERTS, "--dataset=Folder", "--res=16", f"--data_path={out}/{{rank}}/pets"],
        "nothing there": ["command", "distill_ATT.py", *new, "--buffer_path=nowhere"],
    }
    jobs = [["match", case] for case in MATCHES] + [["command", args] for args in commands(buffers, alone, out)]
    jobs += [[kind, args] for kind, *args in refusals.values()]
    jobs += [["diverged", []]]
    *answers, diverged = on_ranks(3, jobs, out / "jobs")
    refused = dict(zip(refusals, answers[-len(refusals) :]))
    return {"out": out, "matches": answers[: len(MATCHES)], "refusals": refused, "diverged": diverged}


def test_several_trajectories_of_an_iteration_are_averaged():
    ones = torch.ones(2, 1, 4, 4)
    mean = mean_match([Match(1.0, 2, ones, 3.0), Match(3.0, 5, 3 * ones, -5.0)], 2, ones, distributed.ALONE)
    assert (mean.grand_loss, mean.step, mean.grad_lr) == (2.0, 3.5, -1.0) and torch.equal(mean.grad_images, 2 * ones)


def test_a_match_is_the_same_on_three_processes(three):
    for case, found in zip(MATCHES, three["matches"], strict=True):
        one = match(distributed.ALONE, **case)
        for answer in found["answers"]:
            assert relative(answer["grad_images"], one.grad_images) < 1e-10, case
            assert answer["grad_lr"] == pytest.approx(one.grad_lr, rel=1e-10)
            assert answer["grand_loss"] == pytest.approx(one.grand_loss, rel=1e-10) and answer["step"] == one.step
            assert torch.equal(answer["grad_images"], found["answers"][0]["grad_images"])


def test_the_bytes_that_are_summed_are_those_of_the_readme(three):
    parameters = 896 + 64 + 2 * (9248 + 64) + 1290  # of ConvNetW32 on 3x16x16
    for case, found in zip(MATCHES, three["matches"], strict=True):
        steps = matched = 3
        pixels = 10 * 3 * (32 if "samples" in case else 16) ** 2
        divided = (steps + matched) * (parameters + 1) + steps + pixels
        assert found["bytes"] == 8 * (pixels + 3 if "trajectories" in case else divided)


def test_three_processes_leave_what_one_leaves(three, alone):
    same_as_alone(three["out"], alone)


@pytest.mark.parametrize(
    "what, says",
    [
        ("settings", "Process 1 has --lr_img 101.0, and process 0 has 100.0; all processes need the same command and code"),
        ("code", "Process 1 has version of project v1, and process 0 has v0; all processes need the same command and code"),
        ("experts", "Process 1 has experts .*; all processes need the same experts in --buffer_path"),
        ("data", "Process 1 has images .*; all processes need the same data in --data_path"),
        ("nothing there", "There are no experts in nowhere/Digits/ConvNetW32"),
    ],
)
def test_processes_that_differ_are_refused_in_the_same_words(three, what, says):
    answers = three["refusals"][what]["answers"]
    assert re.match(says, answers[0]), answers
    assert len(set(answers)) == 1 and not (three["out"] / "refused").exists()


def test_images_that_are_no_longer_the_same_on_all_processes_end_the_run(three):
    says = "The images of process 2 are no longer those of process 0; look for faulty hardware, and go on from the last"
    assert all(answer.startswith(says) for answer in three["diverged"]["answers"])


def test_a_process_that_never_comes_is_told_after_the_stated_time(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "START_WAIT", timedelta(seconds=2))
    began, says = time.monotonic(), r"Process 0 waited 2 s at 127.0.0.1:\d+ for all 2 processes, and not all came"
    with pytest.raises(storage.RunError, match=says):
        distributed.group.__wrapped__()
    assert 1 < time.monotonic() - began < 10


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# --- ending and going on

# small rates: rounding must not grow
SLOW = ["--Iteration=40", "--eval_it=1000", "--num_eval=1", "--baseline_draws=0", "--run_name=r", "--ckpt_it=5",
        "--lr_img=1e-3", "--lr_lr=1e-8", "--match=mtt"]  # fmt: skip


def distil_on(count: int, buffers: Path, out: Path, *more, **options) -> subprocess.Popen:
    """A process that runs SLOW."""
    flags = command("distill_ATT.py", f"--buffer_path={buffers}", f"--save_dir={out}", *SLOW, *more)[1:]
    return start(torchrun(count, *flags, **options))


def workers(agent: subprocess.Popen) -> list[int]:
    """Their process numbers, in order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def at_iteration(number: int, folder: Path, process: subprocess.Popen):
    wait_for(folder / "metrics.jsonl", process)
    while len((folder / "metrics.jsonl").read_bytes().splitlines()) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(buffers, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    distill_ATT.main(command("distill_ATT.py", f"--buffer_path={buffers}", f"--save_dir={out}", *SLOW)[2:])
    return out / "Digits" / "r"


@long
def test_a_job_that_is_told_to_stop_saves_once_and_goes_on_with_another_number_of_processes(undisturbed, buffers, tmp_path):
    agent, folder = distil_on(2, buffers, tmp_path), tmp_path / "Digits" / "r"
    at_iteration(10, folder, agent)
    agent.send_signal(signal.SIGTERM)
    out, err = agent.communicate(timeout=60)
    state = storage.load(folder / "checkpoint.pt", "checkpoint")["state"]
    assert out.count("Stopped by SIGTERM and saved. Go on with: python") == 1 and "error:" not in err
    assert agent.returncode == 1, (out, err)  # torchrun's own
    updates = [line for line in lines(folder) if "eval" not in line]
    assert len(updates) == state["iteration"] and 0 < state["iteration"] < 40
    distill_ATT.main([f"--resume={folder}"])
    start = torch.load(undisturbed / "images_0.pt", weights_only=True)
    ours, theirs = (last_images(run)["images"] - start for run in (folder, undisturbed))
    assert relative(ours, theirs) < 1e-2 and theirs.norm() > 1e-5 * start.norm()  # of 41 updates, none is lost
    assert [line["iteration"] for line in lines(folder)] == [line["iteration"] for line in lines(undisturbed)]


def test_a_signal_that_came_to_another_process_first_does_not_disturb_the_saving():
    signals, group = console.Signals(), SimpleNamespace(largest=lambda number: max(number, signal.SIGTERM))
    with pytest.raises(console.Interrupted, match="SIGTERM"), signals.held():
        signals.agree(group)
    signals._arrived(signal.SIGTERM, None)  # would raise


def test_what_all_processes_refuse_is_said_once():
    process = start(torchrun(2, "distill_ATT.py", *DIGITS, "--lr_img=-1"))
    out, err = process.communicate(timeout=60)
    assert err.count("error: argument --lr_img: '-1' is not a finite number above 0\n") == 1 and not out
    assert process.returncode == 1 and re.search(r"exitcode *: 2 ", err)  # torchrun's own, and its report of theirs


@long
def test_a_job_goes_on_by_itself_when_a_process_is_killed(buffers, tmp_path):
    whole = distil_on(2, buffers, tmp_path / "whole")
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, out + err
    agent, folder = distil_on(2, buffers, tmp_path, "--resume=auto", max_restarts=1), tmp_path / "Digits" / "r"
    at_iteration(10, folder, agent)
    os.kill(workers(agent)[1], signal.SIGKILL)
    out, err = agent.communicate(timeout=120)
    assert agent.returncode == 0 and "Resumed at iteration" in out, out + err
    same_run(folder, tmp_path / "whole" / "Digits" / "r")


@long
def test_a_job_without_restarts_ends_when_a_process_is_killed(buffers, tmp_path):
    agent, folder = distil_on(2, buffers, tmp_path), tmp_path / "Digits" / "r"
    at_iteration(10, folder, agent)
    os.kill(workers(agent)[1], signal.SIGKILL)
    out, err = agent.communicate(timeout=60)
    assert agent.returncode == 1 and err.count("error: Another process of this job is gone") == 1, out + err
    assert storage.load(folder / "checkpoint.pt", "checkpoint")["state"]["iteration"] >= 5


@long
def test_experts_of_a_job_that_was_stopped_are_made_by_another_number_of_processes(tmp_path):
    flags = ["--num_experts=6", "--train_epochs=4"]
    buffer_ATT.main(command("buffer_ATT.py", *flags, f"--buffer_path={tmp_path / 'whole'}")[2:])
    agent = start(torchrun(3, *command("buffer_ATT.py", *flags, f"--buffer_path={tmp_path}")[1:]))
    wait_for(tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_1.pt", agent)
    agent.send_signal(signal.SIGINT)
    out, err = agent.communicate(timeout=60)
    assert "Stopped by SIGINT. Finished experts are kept" in out and "error:" not in err, out + err
    again = start(torchrun(2, *command("buffer_ATT.py", *flags, f"--buffer_path={tmp_path}")[1:]))
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and "of 6 experts already there" in out, out + err
    same_experts(tmp_path, tmp_path / "whole", 6)


@long
@pytest.mark.parametrize("machines", [1, 2])
def test_machines_of_one_process_each_leave_what_one_process_leaves(alone, buffers, tmp_path, machines):
    (tmp_path / "jobs").write_text(json.dumps([["command", args] for args in commands(buffers, alone, tmp_path)]))
    where = {"standalone": False, "nnodes": machines, "master_addr": "127.0.0.1", "master_port": free_port()}
    script = "tests/on_ranks.py", tmp_path / "jobs", tmp_path / "results"
    agents = [start(torchrun(1, *script, node_rank=node, **where)) for node in range(machines)]
    for agent in agents:
        out, err = agent.communicate(timeout=900)
        assert agent.returncode == 0, out + err
    same_as_alone(tmp_path, alone)


@long
def test_compiled_steps_are_divided_as_others_are(buffers, tmp_path):
    case = {"batch": 7, "micro_batch": 2}
    flags = [*RUN, f"--buffer_path={buffers}", "--run_name=r", "--Iteration=2"]
    distill_ATT.main([*flags, f"--save_dir={tmp_path / 'alone'}"])
    run = ["command", ["distill_ATT.py", *flags, "--compile=on", f"--save_dir={tmp_path}"]]
    found, _ = on_ranks(2, [["match", case | {"compiled": True}], run], tmp_path / "jobs")
    one = match(distributed.ALONE, **case)
    assert all(relative(answer["grad_images"], one.grad_images) < 1e-10 for answer in found["answers"])
    close(tmp_path / "Digits" / "r", tmp_path / "alone" / "Digits" / "r")


@long
def test_a_network_that_normalises_over_its_batch_is_distilled_on_several_processes(tmp_path):
    make_experts(tmp_path / "b", "--model=ConvNetBN")
    flags = [*RUN, "--model=ConvNetBN", f"--buffer_path={tmp_path / 'b'}", "--run_name=r"]
    distill_ATT.main([*flags, f"--save_dir={tmp_path / 'alone'}"])
    on_ranks(2, [["command", ["distill_ATT.py", *flags, f"--save_dir={tmp_path}"]]], tmp_path / "jobs")
    close(tmp_path / "Digits" / "r", tmp_path / "alone" / "Digits" / "r")
