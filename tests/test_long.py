"""Trials of many minutes: kills at random moments, and the demo's accuracy."""

import random
import signal
import subprocess
import sys
import time

import pytest

import storage
from conftest import ROOT
from small_runs import DIGITS, FAST, distil, lines, make_experts, same_run

pytestmark = pytest.mark.long


def kill_again_and_again(command, times, longest, seed):
    """Starts a command `times` times and kills each after a random time; then lets it finish. Returns its output."""
    moments = random.Random(seed)
    killed = 0
    for _ in range(times):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.5, longest))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed >= times // 2, "most of the kills came too late to test anything"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_experts_survive_being_killed(tmp_path):
    flags = [*DIGITS, "--num_experts=4", "--train_epochs=6", "--batch_train=64", "--seed=0"]
    command = [sys.executable, "buffer_ATT.py", *flags]
    subprocess.run([*command, f"--buffer_path={tmp_path / 'whole'}"], cwd=ROOT, check=True, capture_output=True)
    kill_again_and_again([*command, f"--buffer_path={tmp_path / 'killed'}"], times=12, longest=6, seed=1)
    for k in range(4):
        left, right = (
            storage.load_expert(tmp_path / name / "Digits" / "ConvNetW32" / f"replay_buffer_{k}.pt")
            for name in ("whole", "killed")
        )
        assert left.checksums == right.checksums and left.settings == right.settings


def test_a_run_survives_being_killed(tmp_path):
    make_experts(tmp_path)
    more = ["--Iteration=200", "--eval_it=20", "--ckpt_it=3", "--run_name=r"]
    whole = distil(tmp_path, tmp_path / "whole", *more)
    flags = [*DIGITS, *FAST, f"--buffer_path={tmp_path}", f"--save_dir={tmp_path / 'killed'}", "--seed=1", *more]
    kill_again_and_again([sys.executable, "distill_ATT.py", *flags, "--resume=auto"], times=15, longest=8, seed=2)
    same_run(whole, tmp_path / "killed" / "Digits" / "r")
    assert len(lines(whole)) == 201 + 11 * 2


def test_the_demo_reaches_what_the_readme_says(tmp_path):
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, capture_output=True)
    folder = max((ROOT / "demo" / "results" / "Digits").iterdir(), key=lambda p: p.stat().st_mtime)
    content = storage.load(folder / "synthetic_best.pt", "synthetic")
    assert content["accuracy"]["mean"] >= 0.88 and content["ipc"] == 1
