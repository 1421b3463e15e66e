"""Runs of both scripts on real digits that take seconds, and how two of them are compared."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import buffer_ATT
import distill_ATT
import storage
from conftest import ROOT
from console import Interrupted

DIGITS = ["--dataset=Digits", "--model=ConvNetW32", "--device=cpu"]
FAST = ["--syn_steps=4", "--expert_epochs=1", "--max_start_epoch=2", "--Iteration=6", "--eval_it=3", "--num_eval=2",
        "--epoch_eval_train=4", "--lr_img=100", "--baseline_draws=1", "--wandb=disabled"]  # fmt: skip


def make_experts(folder, *flags):
    defaults = [*DIGITS, "--num_experts=2", "--train_epochs=3", "--batch_train=256", "--seed=0"]
    buffer_ATT.main([*defaults, f"--buffer_path={folder}", *flags])


def distil(buffers, out, *flags) -> Path:
    distill_ATT.main([*DIGITS, *FAST, f"--buffer_path={buffers}", f"--save_dir={out}", "--seed=1", *flags])
    return max(Path(out, "Digits").iterdir(), key=lambda p: p.stat().st_mtime)


def stopped(it: int, buffers, out, *flags) -> Path:
    """A run that is told to stop before iteration `it`."""
    draw = distill_ATT.draw_start

    def draw_or_stop(args, experts, now):
        if now == it:
            raise Interrupted(signal.SIGTERM)
        return draw(args, experts, now)

    with mock.patch.object(distill_ATT, "draw_start", draw_or_stop), pytest.raises(SystemExit):
        distil(buffers, out, *flags)
    return max(Path(out, "Digits").iterdir(), key=lambda p: p.stat().st_mtime)


def lines(folder):
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "share_of_peak", "memory_gb")} for line in found]


def tensors(folder):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*images*.pt"))}


def same_run(a, b):
    assert lines(a) == lines(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys() and len(left) >= 4
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- as real processes


def command(script: str, *flags) -> list:
    """The command line of a script on digits, `FAST` for distill_ATT.py."""
    own = [*FAST, "--seed=1"] if script == "distill_ATT.py" else ["--batch_train=64", "--seed=0"]
    return [sys.executable, script, *DIGITS, *own, *flags]


def start(command: list) -> subprocess.Popen:
    told = os.environ | {"PYTHONFAULTHANDLER": "1"}  # a process that crashes says where
    return subprocess.Popen(command, cwd=ROOT, env=told, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen):
    """Until a process has made a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def kill_again_and_again(command, times, longest, seed, shortest=0.0, at_work=False, number=signal.SIGKILL):
    """Starts a command `times` times and sends each a signal after a random time, which begins with the first line it
    says where it is to be `at_work`; then lets it finish. Returns how many were reached while they ran, and what they
    ended with."""
    moments, codes, reached = random.Random(seed), [], 0
    for _ in range(times):
        process = start(command)
        if at_work:
            process.stdout.readline()
        time.sleep(moments.uniform(shortest, longest))
        reached += process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=15)  # a run that is asked to stop does so within this time
        codes.append(process.returncode)
    {"buffer_ATT.py": buffer_ATT, "distill_ATT.py": distill_ATT}[command[1]].main(command[2:])
    return reached, codes


def same_experts(a: Path, b: Path, count: int):
    for k in range(count):
        left, right = (storage.load_expert(root / "Digits" / "ConvNetW32" / f"replay_buffer_{k}.pt") for root in (a, b))
        assert left.checksums == right.checksums and left.settings == right.settings
        assert all(torch.equal(left.snapshot(e), right.snapshot(e)) for e in range(left.epochs + 1))
