"""Every command of the README and of the original instructions runs as written: parsers, data set, expert folder."""

import re
import shlex

import pytest

import buffer_ATT
import console
import distill_ATT
import evaluation
import networks
import storage
from conftest import ROOT
from evaluation import POOLS
from paper import ROWS
from utils import SOURCES, SUBSETS

TRAIN, DISTIL = (
    [f"python {script} {shlex.join(flags[i])}" for row, flags in ROWS.items() if row != "Digits-1"]
    for i, script in enumerate(("buffer_ATT.py", "distill_ATT.py"))
)
ORIGINAL = list(dict.fromkeys(TRAIN + DISTIL))
COMMAND = re.compile(r"python3? (?:buffer|distill)_ATT\.py .*")
README = [line for line in (ROOT / "README.md").read_text().splitlines() if COMMAND.fullmatch(line)]
INSTRUCTIONS = ROOT.parent / "shared" / "seed" / "README_ATT.txt"  # the original ones, beside the project or absent

SCRIPTS = {"buffer_ATT.py": buffer_ATT, "distill_ATT.py": distill_ATT}
CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "Tiny": 200, "ImageNet": 10, "Folder": 4}


def parse(command):
    _, script, *flags = shlex.split(command)
    return SCRIPTS[script].parse_args(flags)


@pytest.mark.parametrize("command", dict.fromkeys(ORIGINAL + README))
def test_a_command_is_understood(command):
    args = parse(command)
    request = console.request(args)
    said = dict(re.findall(r"--(\w+)=(\S+)", command))
    for name, value in said.items():  # every flag means what it says
        found = getattr(args, name)
        assert float(value) == found if isinstance(found, (int, float)) else str(found) == value.strip("'")
    assert request.side == (args.res or SOURCES[args.dataset].resolution)
    assert console.check_network(args, (3, CLASSES[args.dataset], request.side)) > 0


def words(command: str) -> list[str]:
    return sorted(shlex.split(command)[1:])


def test_the_readme_has_every_original_command():
    there = [words(command) for command in README]
    for command in TRAIN + DISTIL:
        shown = re.sub("--subset=image[a-z]+", "--subset=imagenette", command)  # "Change --subset for the others"
        assert words(shown) in there or words(shown.replace("--train_epochs", "--zca --train_epochs")) in there, shown


def test_the_rows_are_the_original_commands():
    if not INSTRUCTIONS.exists():
        pytest.skip("the original instructions are not there")
    text = INSTRUCTIONS.read_text().replace("--data_path=--data_path=", "--data_path=")  # its one typo
    original = [words(line) for line in text.splitlines() if COMMAND.fullmatch(line)]
    assert len(original) == 15
    assert all(command in map(words, ORIGINAL) for command in original)


@pytest.mark.parametrize("train", [c for c in ORIGINAL if "buffer_ATT" in c])
def test_both_scripts_agree_on_the_experts_folder(train):
    trained = parse(train)
    where = storage.expert_folder(trained.buffer_path, console.request(trained), trained.model, {})
    distilling = [parse(c) for c in ORIGINAL if "distill_ATT" in c]
    matching = [a for a in distilling if (a.dataset, a.subset, a.zca) == (trained.dataset, trained.subset, trained.zca)]
    assert matching
    for args in matching:
        assert storage.expert_folder(args.buffer_path, console.request(args), args.model, {}) == where
        assert args.max_start_epoch - 1 + args.expert_epochs <= trained.train_epochs


def test_published_defaults():
    buffer, distill = buffer_ATT.parse_args([]), distill_ATT.parse_args([])
    shared = dict(dataset="CIFAR10", subset="imagenette", model="ConvNet", zca=False, dsa=True,
                  dsa_strategy="color_crop_cutout_flip_scale_rotate", lr_teacher=0.01)  # fmt: skip
    for args in (buffer, distill):
        assert {name: getattr(args, name) for name in shared} == shared
        assert (str(args.data_path), str(args.buffer_path)) == ("datas", "buffers")
    expected = dict(num_experts=100, batch_train=512, batch_real=512, train_epochs=50, decay=False, mom=0, l2=0)
    assert {name: getattr(buffer, name) for name in expected} == expected
    expected = dict(
        batch_real=256, batch_train=256, ipc=1, eval_mode="S", num_eval=5, eval_it=100, epoch_eval_train=1000,
        Iteration=5000, lr_img=1000, lr_lr=1e-5, batch_syn=None, pix_init="real", expert_epochs=3, syn_steps=20,
        max_start_epoch=25, load_all=False, no_aug=False, max_files=None, max_experts=None, force_save=False,
        texture=False, canvas_size=2, canvas_samples=1, ema_decay=0.999, match="att", select_dist="l1", wandb="auto",
    )  # fmt: skip
    assert {name: getattr(distill, name) for name in expected} == expected


def test_every_subset_has_ten_classes_of_imagenet():
    assert all(len(set(wnids)) == 10 and all(re.fullmatch(r"n\d{8}", w) for w in wnids) for wnids in SUBSETS.values())
    assert SUBSETS["imagenette"][0] == "n01440764" and SUBSETS["imageyellow"][-1] == "n01531178"


# --- help


@pytest.fixture(params=SCRIPTS)
def help_of(request, monkeypatch, capsys):
    """A script's module, and its --help in 100 columns: the text, and what it says of each flag by name."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        SCRIPTS[request.param].parse_args(["--help"])
    text = capsys.readouterr().out
    entries = re.findall(r"^  --(\w+)(.*(?:\n {4,}.*)*)", text, re.M)
    return SCRIPTS[request.param], text, {name: " ".join(said.split()) for name, said in entries}


def test_the_help_shows_every_flag_in_its_group_with_choices_and_default(help_of):
    script, text, flags = help_of
    groups = [group for group in console.GROUPS if script is distill_ATT or group not in ("method", "evaluation")]
    assert re.findall(r"^(\w.*):$", text, re.M) == ["options", *groups, "An example"]
    assert max(map(len, text.splitlines())) <= 100
    found = vars(script.parse_args([]))
    assert flags.keys() == found.keys()
    for name, value in found.items():
        assert value is None or value is False or f"(default: {value})" in flags[name]
    assert flags["compile"].startswith("{auto,on,off} ") and flags["precision"].startswith("{auto,fp32,tf32,bf16} ")
    many = {"model": networks.NETWORKS, "dataset": SOURCES, "subset": SUBSETS}
    assert all(flags[name].endswith(f"One of {', '.join(choices)}") for name, choices in many.items())


def test_the_example_of_the_help_is_a_command(help_of):
    script, text, _ = help_of
    example = text[text.index("  python ", text.index("An example")) :].replace("\\\n", "")
    assert script.parse_args(shlex.split(example)[2:]).model == "ConvNetD3"


@pytest.mark.parametrize("mode", POOLS)
def test_help_and_readme_say_what_each_letter_of_eval_mode_means(mode):
    assert re.search(rf"\b{mode}: |\({mode}\)", evaluation.EVAL_MODES)
    assert re.search(rf"^\| (`\w`, )*`{mode}`", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_published_flags_that_are_gone_are_taken_with_a_line_on_screen_and_change_nothing(script, capsys):
    console.say_gone.cache_clear()
    for _ in range(2):
        assert script.parse_args(["--lr_init", "0.01", "--save_interval=10"]) == script.parse_args([])
    said = "{}, a flag of the published scripts, does nothing here and may be left out.\n"
    assert capsys.readouterr().out == said.format("--lr_init") + said.format("--save_interval")


def test_the_demo_is_its_row():
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].replace("\\\n", " ")
    commands = re.findall(r"\$\(PY\) (?:buffer|distill)_ATT.py (.*)", recipe)
    for row, command in zip(ROWS["Digits-1"], commands, strict=True):
        where = {"--buffer_path=demo/buffers", "--save_dir=demo/results", "--seed=0", "--wandb=disabled"}
        assert set(row) == set(command.split()) - where
