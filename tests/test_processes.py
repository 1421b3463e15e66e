"""Runs as real processes: killed, out of room, without permission, and two at one folder."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from PIL import Image

import buffer_ATT
import console
import distill_ATT
import storage
from damage import refused
from small_data import image_folder
from small_runs import (
    DIGITS, FAST, command, distil, kill_again_and_again, lines, make_experts, same_experts, same_run, start, stopped,
    wait_for,
)  # fmt: skip


def sound(folder: Path):
    """Every tensor file and picture can be read, and nothing half-written is left."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if path.name.endswith(".tmp")]
    for path in files:
        if path.suffix == ".pt":
            storage.load_any(path)
        elif path.suffix == ".png":
            Image.open(path).load()


# --- kill -9; many more of these are in test_long.py


def test_experts_survive_being_killed(tmp_path):
    flags = ["--num_experts=2", "--train_epochs=4"]
    buffer_ATT.main(command("buffer_ATT.py", *flags, f"--buffer_path={tmp_path / 'whole'}")[2:])
    killed = command("buffer_ATT.py", *flags, f"--buffer_path={tmp_path / 'killed'}")
    assert kill_again_and_again(killed, times=1, longest=0.5, seed=1, at_work=True) == (1, [-signal.SIGKILL])
    same_experts(tmp_path / "whole", tmp_path / "killed", 2)


def test_a_run_survives_being_killed(buffers, tmp_path):
    more = ["--Iteration=30", "--eval_it=15", "--ckpt_it=3", "--num_eval=1", "--baseline_draws=0", "--run_name=r"]
    whole = distil(buffers, tmp_path / "whole", *more)
    flags = [f"--buffer_path={buffers}", f"--save_dir={tmp_path / 'killed'}", *more, "--resume=auto"]
    killed = command("distill_ATT.py", *flags)
    reached = kill_again_and_again(killed, times=1, shortest=0.5, longest=1, seed=2, at_work=True)
    assert reached == (1, [-signal.SIGKILL])
    same_run(whole, tmp_path / "killed" / "Digits" / "r")


# --- no room


@contextlib.contextmanager
def files_up_to(size):
    """No file may become larger, as on a disk that is full at this point."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def stopped_for_room(script, flags, size, name, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, files_up_to(size):
        console.run(lambda: script.main(flags))
    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert re.fullmatch(rf"\S+: error: \S*{name} cannot be written \(.+\); make room or permit it, and go on.\n", err), err
    assert "None" not in err


def test_a_full_disk_costs_buffer_no_finished_expert(buffers, tmp_path, capsys):
    folder = tmp_path / "Digits" / "ConvNetW32"
    shutil.copytree(buffers, tmp_path, dirs_exist_ok=True)
    (folder / "replay_buffer_1.pt").unlink()
    before = (folder / "replay_buffer_0.pt").read_bytes()
    flags = [*DIGITS, "--num_experts=2", "--train_epochs=3", "--batch_train=256", "--seed=0", f"--buffer_path={tmp_path}"]
    stopped_for_room(buffer_ATT, flags, 100_000, "replay_buffer_1.pt", capsys)
    assert {path.name for path in folder.iterdir()} == {"replay_buffer_0.pt", ".lock"}
    assert (folder / "replay_buffer_0.pt").read_bytes() == before
    make_experts(tmp_path)
    same_experts(buffers, tmp_path, 2)


MORE = ["--eval_it=80", "--num_eval=1", "--baseline_draws=0", "--syn_steps=1"]


@pytest.fixture(scope="module")
def long_run(buffers, tmp_path_factory):
    """A run whose metrics.jsonl is larger than its checkpoint, whole and stopped before its end."""
    out = tmp_path_factory.mktemp("long")
    partial = stopped(82, buffers, out, "--run_name=stopped", "--Iteration=83", *MORE)
    whole = shutil.copytree(partial, out / "whole")
    distill_ATT.main([f"--resume={whole}"])
    return whole, partial


@pytest.mark.parametrize(
    "name, beyond",
    [("curves.png", -20_000), ("metrics.jsonl", +100)],  # bytes it may have beyond its size: the latter ends within a line
)
def test_a_full_disk_costs_a_run_nothing_that_was_written(buffers, long_run, tmp_path, capsys, name, beyond):
    whole, partial = long_run
    folder = shutil.copytree(partial, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    room = (folder / name).stat().st_size + beyond
    flags = command("distill_ATT.py", f"--buffer_path={buffers}", "--Iteration=83", *MORE, f"--resume={folder}")[2:]
    stopped_for_room(distill_ATT, flags, room, name, capsys)
    sound(folder)
    changed = {path.name for path in folder.iterdir() if before.pop(path) != path.read_bytes()}
    written = {"config.json", "metrics.jsonl", "checkpoint.pt"}
    if name == "curves.png":  # drawn when the last images are evaluated and saved
        written |= {"results.json", "summary.md", *(path.name for path in folder.glob("*_last.pt"))}
    assert not before and changed <= written
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n") == (name != "metrics.jsonl")
    distill_ATT.main(flags)
    same_run(whole, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_disk_that_fills_up_again_and_again_goes_on_in_the_end(buffers, tmp_path, small_disk, capsys):
    more = ["--num_eval=1", "--baseline_draws=0", "--run_name=r", "--ckpt_it=1"]
    whole = distil(buffers, tmp_path / "whole", *more)
    ballast, refusals = small_disk / "ballast", set()
    flags = [*DIGITS, *FAST, f"--buffer_path={buffers}", f"--save_dir={small_disk}", "--seed=1", *more, "--resume=auto"]
    for room in (*range(0, 60, 6), *range(60, 400, 30)):  # KB; it stops at one file after the other
        ballast.unlink(missing_ok=True)
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - room * 1024)))
        with contextlib.suppress(SystemExit):
            console.run(lambda: distill_ATT.main(flags))
        said = re.fullmatch(r".* error: \S*/([\w.]+) cannot be written.*\n", capsys.readouterr().err)
        if said is None:
            break  # it had room to the end
        refusals.add(re.sub(r"\d+", "", said[1]))
        for path in small_disk.rglob("*.pt"):
            storage.load_any(path)
        assert not list(small_disk.rglob("*.tmp"))
    assert {"checkpoint.pt", "curves.png"} <= refusals
    assert any(name.startswith(("images", "labels", "lr", "ema")) for name in refusals)
    ballast.unlink()
    console.run(lambda: distill_ATT.main(flags))
    same_run(whole, small_disk / "Digits" / "r")


# --- no permission


@pytest.fixture
def unprivileged(buffers):
    """A folder for anybody with experts in b/, and a block in which permissions count for root, too."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    shutil.copytree(buffers, folder / "b")
    subprocess.run(["chmod", "-R", "a+rX", folder / "b"], check=True)

    @contextlib.contextmanager
    def nobody():
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    yield folder, nobody
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "where, mode, says",
    [
        ("b/Digits/ConvNetW32", 0o000, "b/Digits/ConvNetW32 cannot be used: Permission denied"),
        ("b/Digits/ConvNetW32/replay_buffer_1.pt", 0o000, "replay_buffer_1.pt cannot be read: Permission denied"),
        ("out", 0o555, "out/Digits/r cannot be written to: Permission denied"),
        ("pets", 0o000, "pets/train cannot be used: Permission denied"),
        ("pets/train/dog/0.png", 0o000, "dog/0.png cannot be used: Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_named(unprivileged, capsys, where, mode, says):
    root, nobody = unprivileged
    image_folder(root / "pets")
    (root / "out").mkdir()
    (root / where).chmod(mode)
    if where.startswith("pets"):
        script, flags = buffer_ATT, [*DIGITS, "--dataset=Folder", "--res=16", f"--data_path={root / 'pets'}"]
    else:
        script, flags = distill_ATT, [*DIGITS, *FAST, f"--save_dir={root / 'out'}", "--run_name=r"]
    with nobody():
        err = refused(script, [*flags, f"--buffer_path={root / 'b'}"], root / "none", capsys)
    assert re.search(says, err), err


def test_a_permission_lost_on_the_way_leaves_the_last_good_files(unprivileged, capsys):
    root, nobody = unprivileged
    with nobody():
        folder = distil(root / "b", root / "out", "--Iteration=1", "--num_eval=1", "--run_name=r")
        before = {path: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        with pytest.raises(SystemExit) as ended:
            console.run(lambda: distil(root / "b", root / "out", f"--resume={folder}", "--num_eval=1"))
        assert ended.value.code == 1
        assert "config.json cannot be written (Permission denied); make room or permit it" in capsys.readouterr().err
        after = {path: path.read_bytes() for path in folder.iterdir()}
        metrics = folder / "metrics.jsonl"
        assert after.pop(metrics).startswith(before.pop(metrics)) and after == before
        folder.chmod(0o755)
        distil(root / "b", root / "out", f"--resume={folder}", "--num_eval=1")
        assert lines(folder)[-1]["iteration"] == 7


# --- two at one folder


def test_a_second_process_leaves_the_experts_to_the_first(tmp_path, capsys):
    with storage.locked(tmp_path / "Digits" / "ConvNetW32"):
        err = refused(buffer_ATT, command("buffer_ATT.py", f"--buffer_path={tmp_path}")[2:], tmp_path, capsys)
    assert "Digits/ConvNetW32 is in use by another process; wait for it or choose another folder." in err


def test_a_second_process_leaves_the_run_to_the_first(buffers, tmp_path, capsys):
    more = ["--Iteration=2", "--eval_it=1000", "--num_eval=1", "--baseline_draws=0", "--run_name=r"]
    flags = [f"--buffer_path={buffers}", f"--save_dir={tmp_path}", *more]
    first = start(command("distill_ATT.py", *flags))
    wait_for(tmp_path / "Digits" / "r" / "config.json", first)
    first.send_signal(signal.SIGSTOP)
    second = command("distill_ATT.py", *flags)[2:]
    err = refused(distill_ATT, [*second, "--resume=auto"], tmp_path / "none", capsys)
    assert "Digits/r is in use by another process; wait for it or choose another folder." in err
    err = refused(distill_ATT, second, tmp_path / "none", capsys)
    assert "Digits/r holds a run already; go on with it by --resume" in err
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=120)
    assert (first.returncode, err) == (0, "")
    assert lines(tmp_path / "Digits" / "r") == lines(distil(buffers, tmp_path / "alone", *more))
