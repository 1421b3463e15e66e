"""What cannot be used is refused before any work starts: one sentence, exit code 2, and nothing written."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import buffer_ATT
import console
import distill_ATT
import storage
import utils
from conftest import ROOT
from damage import cut, refused
from small_data import image_folder, imagenet, tiny
from small_runs import DIGITS, FAST, distil

MINIMAL = "--max_start_epoch=1"  # what the experts of the fixture suffice for

BAD_BUFFER = [  # flags, what the sentence says: each checked type and each sentence once
    (["--dataset=CIFAR11"], "argument --dataset: there is no 'CIFAR11', did you mean CIFAR10"),
    (["--dataset="], "argument --dataset: there is no ''; choose from CIFAR10"),
    (["--num_experts=0"], "argument --num_experts: '0' is not a whole number at least 1"),
    (["--num_experts=1000000001"], "argument --num_experts: '1000000001' is not .* at most 1000000000"),
    (["--num_experts=1.5"], "argument --num_experts: '1.5' is not a whole number"),
    (["--batch_real=" + "9" * 5000], "argument --batch_real: '9+' is not a whole number"),
    (["--num_expert=3"], "unrecognized arguments: --num_expert=3, did you mean --num_experts?"),
    (["more"], "unrecognized arguments: more"),
    (["--lr_teacher=0"], "argument --lr_teacher: '0' is not a finite number above 0"),
    (["--lr_teacher=nan"], "argument --lr_teacher: 'nan' is not a finite number above 0"),
    (["--lr_teacher=1e999"], "argument --lr_teacher: '1e999' is not a finite number"),
    (["--mom=-0.1"], "argument --mom: '-0.1' is not a number at least 0 and at most 1"),
    (["--mom=1.0001"], "argument --mom: '1.0001' is not a number at least 0 and at most 1"),
    (["--l2=-1e-9"], "argument --l2: '-1e-9' is not a finite number at least 0"),
    (["--seed=-1"], "argument --seed: '-1' is not a whole number at least 0"),
    (["--seed=9223372036854775808"], "argument --seed: '9223372036854775808' is not .* at most 9223372036854775807"),
    (["--res=1"], "--model ConvNetW32 cannot be used: .* at least 8 pixels"),
    (["--zca", "--res=65"], "--zca is limited to 64 pixels, .* Digits is at 65: leave out --zca or lower --res"),
    (["--dsa=yes"], "argument --dsa: 'yes' is neither True nor False"),
    (["--dsa_strategy=color_blur"], "argument --dsa_strategy: 'blur' is no augmentation"),
    (["--device=tpu9"], "--device tpu9 is not available here"),
    (["--device=cuda:99"], "--device cuda:99 is not available here"),
    (["--device="], "--device  is not available here"),
    (["--precision=tf32"], "--precision tf32 needs a CUDA device; use auto, fp32 or bf16"),
    (["--data_path="], "argument --data_path: it is empty; name a path"),
    (["--data_path=file"], "argument --data_path: 'file' is a file, where a folder is needed"),
    (["--data_path=" + "x" * 300], "argument --data_path: 'x+' cannot be used: File name too long"),
    (["--data_path=a\0b"], "argument --data_path: .* cannot be used: embedded null"),
    (["--buffer_path=file/below"], "file/below/Digits/ConvNetW32 cannot be written to: Not a directory"),
    (["--buffer_path=/proc/nowhere"], "/proc/nowhere/Digits/ConvNetW32 cannot be written to: "),
    (["--buffer_path=experts/folder"], "replay_buffer_0.pt is not a file"),
    (["--dataset=Folder"], "--dataset Folder needs --res"),
    (["--dataset=Tiny", "--data_path=nowhere"], "no Tiny ImageNet in --data_path nowhere: get http"),
    (["--dataset=ImageNet", "--subset=imagewoof", "--data_path=nowhere"],
     "no imagewoof in --data_path nowhere: it needs train/<wnid>/.*n02096294"),
]
BAD_DISTILL = [
    ([MINIMAL, "--ipc=143"], "Class 0 has 142 training images, fewer than --ipc 143 asks for"),
    (["--max_start_epoch=2"], r"holds 3 epochs, and 4 are needed \(--max_start_epoch - 1 \+ --expert_epochs\)"),
    ([MINIMAL, "--batch_syn=11"], "--batch_syn 11 is more than the 10 synthetic images"),
    (["--Iteration=-1"], "argument --Iteration: '-1' is not a whole number at least 0"),
    (["--match=mtt", "--select_dist=l2"], "--select_dist cannot be used with --match mtt"),
    ([MINIMAL, "--eval_mode=M"], "--eval_mode M: network AlexNet|VGG11 cannot be used"),
    (["--texture", "--zca"], "--texture cannot be used with --zca"),
    (["--canvas_size=3"], "--canvas_size and --canvas_samples go with --texture"),
    (["--student_precision=tf32"], "--student_precision tf32 needs a CUDA device; use fp32"),
    (["--model=ConvNetW64"], "no experts in .*W64 .*W32 has some, .*; make them with: python buffer_ATT.py"),
    ([MINIMAL, "--save_dir=/proc/nowhere"], "/proc/nowhere/Digits/.* cannot be written to: "),
    (["--run_name="], "argument --run_name: '' is no name for a folder"),
    (["--run_name=.."], r"argument --run_name: '..' is no name for a folder: up to 255 bytes, without /"),
    (["--run_name=a/b"], "argument --run_name: 'a/b' is no name for a folder: up to 255 bytes, without /"),
    (["--run_name=" + "é" * 128], "argument --run_name: 'é+' is no name for a folder: up to 255 bytes"),
    (["--resume=nowhere"], "--resume nowhere does not exist"),
    (["--resume=run"], "--resume run is no folder of a run: it has no checkpoint.pt"),
    (["--eval_only"], "--eval_only and --export need --load_syn, and --load_syn needs --eval_only or --export"),
    (["--load_syn=x.pt"], "--eval_only and --export need --load_syn, and --load_syn needs --eval_only or --export"),
    (["--eval_only", "--load_syn=run", "--resume=run"], "--load_syn cannot be used with --resume"),
    (["--eval_only", "--load_syn=run", "--select_on=train"], "--select_on train and --log_artifact cannot be used with"),
    (["--load_syn=x.pt", "--export=run"], "argument --export: 'run' holds something already; name a new or an empty folder"),
    (["--eval_only", "--load_syn=file/x.pt"], "file/x.pt does not exist"),
    (["--eval_only", "--load_syn=run"], "run holds no synthetic set: neither synthetic_best.pt, .*, nor pictures by class"),
    (["--eval_only", "--load_syn=run/images_best.pt/"], "run/images_best.pt holds no synthetic set"),
    ([MINIMAL, "--pix_init=nosie"], "--pix_init nosie is neither real nor noise, nor the path of a set"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a file, an expert and a run's files that are folders."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    for folder in ("experts/folder/Digits/ConvNetW32/replay_buffer_0.pt", "run/checkpoint.pt", "run/images_best.pt"):
        Path(folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("flags, says", BAD_BUFFER, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_bad_input_to_buffer_is_one_sentence_and_exit_code_2(flags, says, place, capsys):
    err = refused(buffer_ATT, [*DIGITS, "--num_experts=1", "--buffer_path=new", *flags], place, capsys)
    assert re.search(says, err), err


@pytest.mark.parametrize("flags, says", BAD_DISTILL, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_bad_input_to_distill_is_one_sentence_and_exit_code_2(flags, says, buffers, place, capsys):
    where = [f"--buffer_path={buffers}", "--save_dir=out", "--wandb=disabled"]
    err = refused(distill_ATT, [*DIGITS, *where, *flags], place, capsys)
    assert re.search(says, err), err


def test_micro_batches_are_refused_by_both_scripts_where_a_network_normalises_over_the_batch():
    for script in (buffer_ATT, distill_ATT):
        args = script.parse_args(["--model=ConvNetBN", "--micro_batch=4"])
        with pytest.raises(storage.InputError, match="--micro_batch cannot be used with ConvNetBN, which normalises over"):
            console.check_network(args, (1, 10, 8))


# --- data folders


def write(path, content=b"no image"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def move(source, target):
    Path(source).rename(target)


def empty(folder):
    for path in Path(folder).iterdir():
        path.unlink()


def annotate(line: bytes):
    path = Path("data/tiny-imagenet-200/val/val_annotations.txt")
    path.write_bytes(path.read_bytes() + line)


MADE = {  # --dataset -> what makes it in a folder
    "Folder": image_folder,
    "Tiny": tiny,
    "ImageNet": lambda root: imagenet(root, utils.SUBSETS["imagenette"], train=1, test=1),
}
TINY, NETTE = "data/tiny-imagenet-200", utils.SUBSETS["imagenette"]
BAD_DATA = [  # --dataset, what is done to a sound one, what the sentence says
    ("Folder", lambda: move("data/train", "data/training"), r"data has no folder train/; .* needs train/<class>/\*"),
    ("Folder", lambda: move("data/val", "data/validation"), "data has no folder val/ or test/"),
    ("Folder", lambda: shutil.rmtree("data"), "--data_path data does not exist"),
    ("Folder", lambda: empty("data/train/dog"), "data/train/dog holds no images"),
    ("Folder", lambda: move("data/val/dog", "data/val/fox"), "Class 'dog' has a folder in data/train and none in data/val"),
    ("Folder", lambda: [shutil.rmtree(f"data/train/{c}") for c in ("dog", "eel")], "has 1 class folders; .* at least 2"),
    ("Folder", lambda: write("data/train/dog/text.jpg", b"some text"), "train/dog/text.jpg cannot be decoded as an image"),
    ("Folder", lambda: cut(Path("data/train/dog/0.png"), 0.3), "train/dog/0.png cannot be decoded as an image"),
    ("Tiny", lambda: move(f"{TINY}/val", f"{TINY}/test"), "no Tiny ImageNet in --data_path data: get http"),
    ("Tiny", lambda: annotate(b"val_9.JPEG\tn01\t0\n"), "val_annotations.txt line 7 .*val_9.JPEG does not exist"),
    ("Tiny", lambda: annotate(b"val_0.JPEG\tn77\t0\n"), "val_annotations.txt line 7 .* no class 'n77' in train/"),
    ("Tiny", lambda: annotate(b"\xff\xfe\x00\n"), "val_annotations.txt line 7 cannot be used"),
    ("Tiny", lambda: Path(TINY, "val/val_annotations.txt").write_bytes(b""), "val_annotations.txt names no images"),
    ("ImageNet", lambda: move(f"data/val/{NETTE[3]}", "n"), f"no imagenette in --data_path data: .*{NETTE[3]}"),
]  # fmt: skip


@pytest.mark.parametrize("name, damage, says", BAD_DATA)
def test_bad_data_is_one_sentence_and_exit_code_2(name, damage, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MADE[name](Path("data"))
    damage()
    flags = [f"--dataset={name}", "--res=16", "--model=ConvNetW32", "--data_path=data", "--buffer_path=b"]
    # images decoded before the damaged one are kept for the next start
    err = refused(buffer_ATT, [*flags, "--device=cpu"], tmp_path, capsys, but=tmp_path / "data" / "cache")
    assert re.search(says, err), err


def test_a_cache_that_cannot_be_kept_costs_a_line_on_screen(tmp_path, capsys):
    root = image_folder(tmp_path / "pets")
    flags = ["--dataset=Folder", "--res=16", "--model=ConvNetW32", "--train_epochs=1", "--num_experts=1"]
    write(root / "cache", b"a file where a folder is needed")
    buffer_ATT.main([*flags, f"--data_path={root}", f"--buffer_path={tmp_path / 'b'}", "--device=cpu"])
    assert capsys.readouterr().out.count("Not cached for the next start: ") == 2
    assert len(list(tmp_path.glob("b/Folder/*/ConvNetW32/replay_buffer_0.pt"))) == 1


# --- what looks odd and must work


def test_names_with_spaces_unicode_and_signs_work_from_end_to_end(tmp_path, capfd):
    classes = sorted(["chat d'été", "犬", "x y", "$\\frac$ %d {}", os.fsdecode(b"caf\xe9")])
    root = image_folder(tmp_path / "mes données ü", classes)
    common = ["--dataset=Folder", "--res=16", "--model=ConvNetW32", f"--data_path={root}", "--device=cpu"]
    common += [f"--buffer_path={tmp_path / 'des experts 犬'}"]
    buffer_ATT.main([*common, "--num_experts=1", "--train_epochs=3"])
    out = tmp_path / "out put é"
    flags = [*common, *FAST, "--Iteration=1", f"--save_dir={out}", "--run_name=a run, 犬 $x$"]
    distill_ATT.main(flags)
    folder = out / "Folder" / "a run, 犬 $x$"
    assert storage.load(folder / "synthetic_best.pt", "synthetic")["classes"] == classes
    assert (folder / "grid_best.png").stat().st_size > 1000
    distill_ATT.main([*flags, "--Iteration=2", f"--resume={folder}"])
    judge = ["--eval_only", f"--load_syn={folder}", "--num_eval=1", "--epoch_eval_train=1", f"--save_dir={out}"]
    distill_ATT.main([*common, *judge])
    said = capfd.readouterr()
    assert "Resumed at iteration 2" in said.out and str(folder) in said.out and said.err == ""


HUGE = [*DIGITS, "--train_epochs=1000000000"]


def test_what_needs_more_memory_than_there_is_is_refused_with_the_flag_to_lower(buffers, place, capsys, monkeypatch):
    said = "About .* GB of memory would be needed, of .* GB; lower {}.\n"
    assert re.search(said.format("--train_epochs"), refused(buffer_ATT, [*HUGE, "--buffer_path=new"], place, capsys))
    monkeypatch.setattr(console, "machine_memory", lambda device: 10**8)
    distill = [*DIGITS, MINIMAL, f"--buffer_path={buffers}", "--save_dir=out", "--wandb=disabled"]
    for script, flags, flag in (
        (buffer_ATT, [*DIGITS, "--buffer_path=new"], "--micro_batch"),
        (buffer_ATT, [*DIGITS, "--model=ConvNetBN", "--buffer_path=new", "--compile=off"], "--batch_train"),
        (distill_ATT, distill, "--batch_real"),
        (distill_ATT, [*distill, "--ipc=50", "--batch_real=1"], "--micro_batch"),
    ):
        assert re.search(said.format(flag), refused(script, flags, place, capsys))


def test_sizes_that_no_memory_holds_are_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["buffer_ATT.py"])
    monkeypatch.setattr(console, "machine_memory", lambda device: 10**30)  # the estimate was too low
    with pytest.raises(SystemExit) as stopped:
        console.run(lambda: buffer_ATT.main([*HUGE, f"--buffer_path={tmp_path}"]))
    assert stopped.value.code == 1
    assert re.fullmatch("buffer_ATT.py: error: There is not enough memory for .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError("no file"), KeyError("name")])
def test_an_error_of_the_program_itself_is_not_told_as_the_users(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        console.run(main)


# --- as real processes


@pytest.mark.parametrize(
    "command, says",
    [
        ("distill_ATT.py --ipc none", "argument --ipc: 'none' is not a whole number at least 1 and at most 1000000000"),
        ("buffer_ATT.py --dataset=Folder --res=8 --data_path=nö", "--data_path nö does not exist."),
    ],
)
def test_a_bad_command_in_a_real_process(command, says, tmp_path):
    script, *flags = command.split()
    run = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"{script}: error: {says}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_console_without_unicode_costs_no_run(buffers, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console.run(lambda: distil(buffers, tmp_path, "--Iteration=0", "--run_name=犬"))
    said = written.getvalue().decode("ascii")
    assert r"\xb1" in said and r"\u72ac" in said and (tmp_path / "Digits" / "犬" / "curves.png").exists()


def test_a_console_without_room_costs_no_expert(tmp_path):
    flags = [*DIGITS, "--num_experts=1", "--train_epochs=1", f"--buffer_path={tmp_path}"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, ROOT / "buffer_ATT.py", *flags], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (run.returncode, run.stderr) == (0, "")
    assert storage.load_expert(tmp_path / "Digits" / "ConvNetW32" / "replay_buffer_0.pt").epochs == 1
