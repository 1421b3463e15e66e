"""Trials of many minutes: kills and stops at random moments, a soak, and the demo's accuracy."""

import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

import buffer_ATT
import storage
from conftest import ROOT
from small_runs import command, distil, kill_again_and_again, lines, same_experts, same_run, start, wait_for

pytestmark = pytest.mark.long

EXPERTS = ["--num_experts=8", "--train_epochs=10"]
RUN = ["--Iteration=500", "--eval_it=50", "--ckpt_it=3", "--run_name=r"]


@pytest.fixture(scope="module")
def whole(buffers, tmp_path_factory):
    """Experts and a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    buffer_ATT.main(command("buffer_ATT.py", *EXPERTS, f"--buffer_path={folder / 'b'}")[2:])
    return folder / "b", distil(buffers, folder, *RUN)


@pytest.mark.parametrize(
    "number, times, ends, at_work",
    [
        (signal.SIGKILL, 12, {-9}, False),
        (signal.SIGTERM, 4, {143}, True),
    ],
)
def test_experts_survive_signals_at_random_moments(whole, tmp_path, number, times, ends, at_work):
    flags = command("buffer_ATT.py", *EXPERTS, f"--buffer_path={tmp_path}")
    longest = 3 if at_work else 6
    reached, codes = kill_again_and_again(flags, times, longest, seed=1, shortest=0.5, at_work=at_work, number=number)
    assert set(codes) <= ends | {0} and reached >= times - 1, (reached, codes)
    same_experts(whole[0], tmp_path, 8)


@pytest.mark.parametrize(
    "number, times, ends, at_work",
    [
        (signal.SIGKILL, 15, {-9}, False),
        (signal.SIGTERM, 6, {143}, True),
    ],
)
def test_a_run_survives_signals_at_random_moments(whole, buffers, tmp_path, number, times, ends, at_work):
    flags = command("distill_ATT.py", f"--buffer_path={buffers}", f"--save_dir={tmp_path}", *RUN, "--resume=auto")
    longest = 3 if at_work else 8
    reached, codes = kill_again_and_again(flags, times, longest, seed=2, shortest=0.5, at_work=at_work, number=number)
    assert set(codes) <= ends | {0} and reached >= times - 1, (reached, codes)
    same_run(whole[1], tmp_path / "Digits" / "r")
    assert len(lines(whole[1])) == 501 + 12 * 2  # evaluated at 0, 50, ..., 500 and after the last update


def test_memory_does_not_grow_over_two_thousand_iterations(buffers, tmp_path):
    flags = ["--syn_steps=2", "--Iteration=2000", "--ckpt_it=50", "--eval_it=100", "--num_eval=1", "--epoch_eval_train=2",
             "--lr_img=10", "--baseline_draws=0", "--run_name=r"]  # fmt: skip
    process = start(command("distill_ATT.py", *flags, f"--buffer_path={buffers}", f"--save_dir={tmp_path}"))
    metrics = tmp_path / "Digits" / "r" / "metrics.jsonl"
    wait_for(metrics, process)
    resident = {}  # iteration -> bytes
    while process.poll() is None:
        done = metrics.read_bytes().split(b"\n")[-2:-1]
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()
        if done and len(pages) > 1:
            resident[json.loads(done[0])["iteration"]] = int(pages[1]) * resource.getpagesize()
        time.sleep(0.1)
    assert process.returncode == 0, process.communicate()
    early = max(size for iteration, size in resident.items() if iteration <= 200)
    late = max(size for iteration, size in resident.items() if iteration > 200)
    print(f"resident {early / 1e6:.1f} MB up to iteration 200, at most {late / 1e6:.1f} MB later")
    assert len(resident) > 50 and late < 1.02 * early, f"{early / 1e6:.1f} MB, then {late / 1e6:.1f} MB"


def test_the_demo_reaches_what_the_readme_says(tmp_path):
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, capture_output=True)
    folder = max((ROOT / "demo" / "results" / "Digits").iterdir(), key=lambda p: p.stat().st_mtime)
    content = storage.load(folder / "synthetic_best.pt", "synthetic")
    assert content["accuracy"]["mean"] >= 0.88 and content["ipc"] == 1
