"""A row of the paper by one command: killed, resumed, collected, and shown as a table."""

import json
import re
import sys

import pytest

import reproduce
from conftest import ROOT
from small_data import cifar, real_cifar10
from small_runs import start, wait_for

SMALL = ["--num_experts=1", "--train_epochs=1", "--syn_steps=2", "--expert_epochs=1", "--max_start_epoch=1",
         "--num_eval=2", "--epoch_eval_train=1", "--seed=0", "--device=cpu", "--wandb=disabled"]  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Calls reproduce.py in this process; its results go to the test's folder."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
        reproduce.main()

    return run


def places(tmp_path):
    return [f"--buffer_path={tmp_path / 'b'}", f"--save_dir={tmp_path / 'o'}"]


def found(tmp_path, row):
    return json.loads((tmp_path / "results" / f"{row}.json").read_text())


def test_a_killed_row_goes_on_and_what_is_done_is_not_done_again(run, tmp_path, capsys):
    flags = ["Digits-1", *SMALL, *places(tmp_path), "--Iteration=3", "--ckpt_it=1", "--eval_it=1", "--baseline_draws=1"]
    killed = start([sys.executable, "reproduce.py", *flags])
    folder = tmp_path / "o" / "Digits" / "Digits-1"
    wait_for(folder / "synthetic_best.pt", killed)
    killed.kill()
    killed.communicate()
    run(*flags, "--note=small")
    said = capsys.readouterr().out
    assert "1 of 1 expert already there" in said and "--resume auto goes on" not in said and "Resumed at iteration" in said
    result = found(tmp_path, "Digits-1")
    own = json.loads((folder / "results.json").read_text())
    assert [result[name] for name in ("best", "last")] == [own[name] for name in ("best", "last")]
    assert result["random_real"] == own["random_real"] != {}
    assert result["iterations"] == 4 and result["experts"] == 1 and result["note"] == "small"
    assert result["parts"]["distill"]["iterations"] == 4 and result["parts"]["experts"]["seconds"] > 0
    # other networks than those that chose the best
    again = result["best_again"]["ConvNetD2"]
    assert len(again["accs"]) == 2 and again["iteration"] in [one["iteration"] for one in own["best"].values()]
    changed = result["changed"]
    assert changed["run"]["Iteration"] == [150, 3] and "seed" not in changed["run"]
    assert changed["experts"]["train_epochs"] == [15, 1] and changed["experts"]["num_experts"] == [4, 1]
    run(*flags)
    said = capsys.readouterr().out
    assert "This run is finished" in said and "--eval_only" not in said
    run(*flags, "--parts", "judge", "--eval_mode=W")
    assert "$ python distill_ATT.py --eval_only" in capsys.readouterr().out
    other = found(tmp_path, "Digits-1")["best_again"]
    assert other.pop("ConvNetD2") == again and [*other] == ["ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"]
    cells = [cell.strip() for cell in re.search(r"\| Digits-1 +\| ConvNetW64 (.*)\|", reproduce.section())[1].split("|")[1:]]
    mean, std = (100 * other["ConvNetW64"][name] for name in ("mean", "std"))
    assert cells == ["-", "-", "-", "-", f"{mean:.1f} ± {std:.1f}", "-"]


def test_a_row_of_the_paper_runs_on_a_thinned_cifar10_and_renders_its_table(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("kornia")
    data = cifar(tmp_path / "c10", monkeypatch, real=real_cifar10(per_class=8))
    # at 8 pixels the whitening takes no time
    run("CIFAR10-1", *SMALL, *places(tmp_path), f"--data_path={data}", "--res=8", "--Iteration=0", "--baseline_draws=0")
    result = found(tmp_path, "CIFAR10-1")
    assert "zca" not in result["changed"]["run"]
    assert result["changed"]["experts"] == {"train_epochs": [50, 1], "num_experts": [100, 1], "res": [None, 8]}
    last = result["last"]["raw/ConvNetD3"]
    mean, std = 100 * last["mean"], 100 * last["std"]
    assert re.search(rf"\| CIFAR10-1 \| ConvNetD3 \| 48.3 ± 1.0 \| {mean:.1f} ± {std:.1f} +\|", reproduce.section())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{reproduce.START}\nold\n{reproduce.END}\nafter\n")
    reproduce.write_readme(readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and reproduce.section() in text


def test_a_flag_of_neither_script_is_refused_before_any_work(run, tmp_path):
    with pytest.raises(reproduce.InputError, match="--lr_image=3 is a flag of neither script"):
        run("CIFAR10-1", "--lr_image=3", *places(tmp_path))
    with pytest.raises(reproduce.InputError, match="num_experts=1 is a flag of neither script"):
        run("CIFAR10-1", "num_experts=1", *places(tmp_path))
    assert not (tmp_path / "b").exists()


def test_the_results_of_the_readme_are_those_in_the_files():
    text = (ROOT / "README.md").read_text()
    assert reproduce.section() in text.partition(reproduce.START)[2].partition(reproduce.END)[0]
    under_the_picture = re.search(r"^\*Ten images.*?\*$", text, re.S | re.M)[0]
    figures = re.findall(r"\d+\.\d ± \d+\.\d", under_the_picture)
    assert len(figures) == 3 and all(figure in reproduce.measured(["Digits-1"]) for figure in figures)
