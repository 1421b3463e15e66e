"""metrics.jsonl is whole, and wandb failing costs a warning, never the run."""

import errno
import importlib.machinery
import itertools
import json
import os
import struct
import sys
import types

import pytest
from matplotlib.image import imread

import distill_ATT
import storage
from console import Interrupted, say
from small_runs import distil, lines, make_experts, same_run, stopped
from storage import InputError, RunError
from tracking import Tracker, read_metrics, wandb_mode

RUN = ["--syn_steps=1", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0", "--run_name=r"]


class Wandb(types.ModuleType):
    """Stands in for wandb: notes what is called, and raises `error` at the n-th call of a function, and ever after."""

    def __init__(self, fails=None, at=1, error=None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self.fails, self.at, self.error = [], fails, at, error
        self.run = types.SimpleNamespace(id="its-id", log=self.function("log"), finish=self.function("finish"), summary={})
        self.login = lambda **_: True
        self.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(project=None, run_name=None))
        self.init, self.Image, self.Histogram, self.Table = map(self.function, ("init", "Image", "Histogram", "Table"))

    def function(self, name):
        def called(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails and len(self.of(name)) >= self.at:
                raise self.error
            return self.run

        return called

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    def install(*how) -> Wandb:
        fake = Wandb(*how)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


@pytest.fixture(scope="module")
def run(buffers, tmp_path_factory):
    return distil(buffers, tmp_path_factory.mktemp("plain"), *RUN)


def opened(folder, mode="disabled", resume=None) -> Tracker:
    tracker = Tracker(folder, warn=print)
    tracker.open(mode, {}, resume)
    return tracker


class CommError(Exception):
    pass


@pytest.mark.parametrize(
    "fails, at, error",
    [
        ("init", 1, SystemExit(1)),
        ("log", 9, OSError(errno.ENOSPC, "No space left on device")),
        ("Image", 2, AttributeError("PIL")),
        ("finish", 1, CommError("no network")),
    ],
)
def test_wandb_failing_costs_a_warning_and_not_the_run(run, buffers, tmp_path, wandb, capsys, fails, at, error):
    fake = wandb(fails, at, error)
    same_run(run, distil(buffers, tmp_path, "--wandb=online", *RUN))
    warning = "Warning: wandb failed and is off for the rest of this run"
    assert capsys.readouterr().out.count(f"{warning} ({type(error).__name__}: {error}).") == 1
    assert fake.calls[-1][0] == fails and len(fake.of(fails)) == at  # it was not called again


def test_wandb_gets_every_iteration_and_the_same_run_after_resuming(run, buffers, tmp_path, wandb):
    first = wandb()
    stopped(4, buffers, tmp_path, "--wandb=online", *RUN)
    second = wandb()
    same_run(run, distil(buffers, tmp_path, "--wandb=online", "--resume=auto", *RUN))
    identities = [{k: fake.of("init")[0][1][k] for k in ("id", "resume", "name")} for fake in (first, second)]
    assert identities == [
        {"id": None, "resume": None, "name": "r"},
        {"id": "its-id", "resume": "allow", "name": "r"},
    ]
    assert {"Skipped_Updates": 0, "Rejected_LR_Updates": 0}.items() <= second.of("log")[0][0][0].items()
    steps = [[kwargs["step"] for args, kwargs in fake.of("log") if "Grand_Loss" in args[0]] for fake in (first, second)]
    assert steps == [[0, 1, 2, 3], [4, 5, 6]]
    # written at once: a kill does not cost wandb the iteration before it
    assert all(kwargs["commit"] for args, kwargs in first.of("log") if "Grand_Loss" in args[0])


def test_a_run_keeps_its_identity_while_wandb_is_off(buffers, tmp_path, wandb):
    wandb()
    distil(buffers, tmp_path, "--wandb=online", "--Iteration=1", *RUN)
    distil(buffers, tmp_path, "--wandb=disabled", "--Iteration=2", "--resume=auto", *RUN)
    third = wandb()
    distil(buffers, tmp_path, "--wandb=online", "--Iteration=3", "--resume=auto", *RUN)
    assert third.of("init")[0][1]["id"] == "its-id"


def test_a_signal_while_wandb_works_is_no_failure_of_wandb(tmp_path, wandb):
    wandb("log", 1, Interrupted(15))
    tracker = opened(tmp_path, "online")
    with pytest.raises(Interrupted):
        tracker.iteration(iteration=0, grand_loss=1.0)
    assert len(lines(tmp_path)) == 1


# --- the real wandb, offline: what its file holds


def records(folder):
    """Of the .wandb files of a run, in order; a file is a LevelDB log of protobuf messages."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # offline, a run that has finished may not be written yet
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # a whole message, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                yield record
                whole = b""


def history(folder) -> list[dict]:
    found = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items} for items in found]


def shown(folder, name) -> list:
    return [(line["_step"], line[name]) for line in history(folder) if name in line]


@pytest.fixture
def quiet(monkeypatch):
    """The real wandb, without what the machine's own environment says."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", os.devnull)
    wandb.teardown()  # it reads its environment once a process
    yield monkeypatch
    wandb.teardown()


def test_wandb_holds_every_name_setting_image_and_figure_of_an_offline_run(quiet, tmp_path, capsys):
    pytest.importorskip("kornia")
    data = f"--data_path={tmp_path}"
    make_experts(tmp_path, "--zca", "--num_experts=1", data)
    flags = [*RUN, "--zca", data, "--eval_mode=C", "--baseline_draws=1", "--full_data=1", "--log_artifact"]
    folder = distil(tmp_path, tmp_path / "out", "--wandb=offline", *flags)
    found = {r.WhichOneof("record_type"): r for r in records(folder)}
    assert found["run"].run.project == "DatasetDistillation" and found["run"].run.display_name == "r"
    assert found["exit"].exit.exit_code == 0
    # every setting
    config = {u.key: json.loads(u.value_json) for r in records(folder) for u in r.run.config.update}
    stored = storage.load_json(folder / "config.json")
    assert {k: config[k] for k in stored if k != "starts"} == {k: v for k, v in stored.items() if k != "starts"}
    # every name, with what metrics.jsonl holds
    pool, both = ("ConvNetW32", "ConvNet"), ("", "ema_")
    names = {name for line in history(folder) for name in line}
    expected = {"Progress", "Grand_Loss", "Start_Epoch", "Synthetic_LR", "Match_Step", "Match_Steps"}
    expected |= {"Skipped_Updates", "Rejected_LR_Updates", "Seconds", "Iterations_per_Second", "Share_of_Peak", "Memory_GB"}
    kinds = ("Accuracy", "Std", "Max_Accuracy", "Max_Std")
    expected |= {f"{v}{kind}/{model}" for v in both for kind in kinds for model in pool}
    expected |= {f"{v}{name}Pixels" for v in both for name in ("", "Synthetic_", "Reconstructed_")}
    closing = ["Random_Real", "Random_Real_Std", "Full_Data", "Full_Data_Std"]
    closing += ["Hard_Label_Recovery", "Improvement_Over_Random", "Label_Robust_Score"]
    expected |= {f"{name}/{model}" for name in closing for model in pool}
    assert expected <= {name.removesuffix("/_type") for name in names}
    assert [step for step, _ in shown(folder, "Grand_Loss")] == list(range(7))
    evaluations = read_metrics(folder / "metrics.jsonl", ())[1]
    for model, variant in itertools.product(pool, ("raw", "ema")):
        every = [(e["iteration"], e["mean"]) for e in evaluations if (e["model"], e["variant"]) == (model, variant)]
        assert every and shown(folder, f"{'ema_' * (variant == 'ema')}Accuracy/{model}") == every
    counts = [sum(values) for _, values in shown(folder, "Match_Steps/values")]
    assert counts == [3, 3, 1]  # the steps between evaluations at 0, 3, 6 and 7
    # every image, as a file that can be opened
    made = [name for v in both for kind in ("Synthetic", "Reconstructed")
            for name in (f"{v}{kind}_Images", f"{v}Clipped_{kind}_Images/std_2.5")]  # fmt: skip
    made += ["Best_Images", *(f"Pictures/{name}" for name in ("grid_best", "curves", "pool"))]
    (wandb_folder,) = folder.glob("wandb/offline-run-*")
    for name in made:
        paths = shown(folder, f"{name}/path")
        assert paths, name
        assert all(imread(wandb_folder / "files" / path).size > 300 for _, path in paths)
    captions = [caption for _, caption in shown(folder, "Synthetic_Images/caption")]
    assert set(captions) == {"a row per class: 0 to 9"}
    # the closing table, the summary of each network, and the best set
    ((_, path),) = shown(folder, "Closing_Table/path")
    table = json.loads((wandb_folder / "files" / path).read_text())
    assert [row[:2] for row in table["data"]][:2] == [["ConvNetW32", "distilled, raw"], ["ConvNetW32", "distilled, ema"]]
    assert len(table["data"]) == 8 and table["columns"][0] == "network"
    summary = {u.key: json.loads(u.value_json) for r in records(folder) for u in r.summary.update}
    results = storage.load_json(folder / "results.json")
    assert {"best", "last", "best_set", "random_real", "full_data", "merits", "computed"} <= summary.keys()
    assert {key: one["mean"] for key, one in summary["best"].items()} == {k: v["mean"] for k, v in results["best"].items()}
    artifact = found["artifact"].artifact
    assert artifact.type == "synthetic-set" and artifact.name == "r"
    files = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert files["synthetic_best.pt"] == (folder / "synthetic_best.pt").stat().st_size and "summary.md" in files
    assert f"wandb sync {next(folder.glob('wandb/offline-run-*'))}" in capsys.readouterr().out


def test_wandbs_own_variables_are_respected(quiet, buffers, tmp_path):
    for name, value in dict(PROJECT="mine", ENTITY="us", RUN_GROUP="sweep", TAGS="a,b", MODE="offline").items():
        quiet.setenv(f"WANDB_{name}", value)
    folder = distil(buffers, tmp_path, *RUN, "--Iteration=0", "--wandb=auto")
    run = next(r.run for r in records(folder) if r.WhichOneof("record_type") == "run")
    assert (run.project, run.entity, run.run_group, list(run.tags)) == ("mine", "us", "sweep", ["a", "b"])


def test_a_resumed_run_gives_wandb_what_it_missed_and_names_every_folder(quiet, buffers, tmp_path, capsys):
    stopped(2, buffers, tmp_path, "--wandb=offline", *RUN)
    stopped(4, buffers, tmp_path, "--wandb=disabled", "--resume=auto", *RUN)
    folder = distil(buffers, tmp_path, "--wandb=offline", "--resume=auto", *RUN)
    assert [step for step, _ in shown(folder, "Grand_Loss")] == list(range(7))
    best = [line["eval"]["mean"] for line in lines(folder) if line.get("eval", {}).get("variant") == "raw"]
    assert [value for _, value in shown(folder, "Max_Accuracy/ConvNetW32")] == [max(best[: n + 1]) for n in range(len(best))]
    codes = [r.exit.exit_code for r in records(folder) if r.WhichOneof("record_type") == "exit"]
    assert codes == [143, 0] and any(r.WhichOneof("record_type") == "preempting" for r in records(folder))
    hint = capsys.readouterr().out.split("wandb sync ")[-1].splitlines()[0]
    assert hint.split() == sorted(map(str, folder.glob("wandb/offline-run-*"))) and len(hint.split()) == 2


def test_a_crash_ends_as_failed(quiet, buffers, tmp_path):
    flags = ["--wandb=offline", "--lr_img=1e30", "--max_bad_steps=1", *RUN]
    with pytest.raises(RunError):
        distil(buffers, tmp_path, *flags)
    assert [r.exit.exit_code for r in records(tmp_path / "Digits" / "r") if r.WhichOneof("record_type") == "exit"] == [1]


def test_wandb_is_asked_whether_there_is_a_login(quiet, tmp_path):
    assert wandb_mode("auto")[0] == "disabled" and "wandb login" in wandb_mode("auto")[1]
    with pytest.raises(InputError, match="--wandb online cannot be used: wandb is not logged in; run `wandb login`"):
        wandb_mode("online")
    wandb = sys.modules["wandb"]
    host = wandb.Settings().base_url.split("//")[1]
    (tmp_path / "netrc").write_text(f"machine {host} login user password {'a' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    quiet.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("auto") == ("online", "")


def test_without_a_network_an_offline_copy_is_kept(quiet, buffers, tmp_path, capsys):
    quiet.setenv("WANDB_API_KEY", "a" * 40)
    quiet.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    quiet.setenv("WANDB_INIT_TIMEOUT", "8")  # seconds, in which a busy machine starts an offline run too
    folder = distil(buffers, tmp_path, *RUN, "--wandb=online", "--Iteration=0")
    assert "Warning: wandb does not answer, and an offline copy is kept" in capsys.readouterr().out
    assert len(shown(folder, "Grand_Loss")) == 1


def test_an_evaluation_of_a_finished_set_goes_to_wandb_too(quiet, run, tmp_path):
    flags = ["--eval_only", f"--load_syn={run}", "--run_name=e", f"--save_dir={tmp_path}", "--device=cpu", "--baseline_draws=1"]
    distill_ATT.main([*flags, "--wandb=offline", "--seed=1"])
    folder = tmp_path / "Digits" / "e"
    accuracy = storage.load(run / "synthetic_best.pt", "synthetic")["accuracy"]["mean"]
    assert [value for _, value in shown(folder, "Accuracy/ConvNetW32")] == [accuracy]
    assert {"random_real", "merits"} <= {u.key for r in records(folder) for u in r.summary.update}
    assert shown(folder, "Random_Real/ConvNetW32") and shown(folder, "Closing_Table/path")


# --- metrics.jsonl


def test_a_line_is_written_whole_though_a_disk_takes_it_in_parts(tmp_path):
    tracker = opened(tmp_path)
    whole = tracker.file

    class Filling:
        def write(self, data):
            return whole.write(data[:7])

    tracker.file = Filling()
    for iteration in range(3):
        tracker.iteration(iteration=iteration, grand_loss=0.5)
    assert lines(tmp_path) == [{"iteration": i, "grand_loss": 0.5} for i in range(3)]


def test_what_is_not_finite_is_null_in_a_line(tmp_path):
    opened(tmp_path).iteration(iteration=0, grand_loss=float("nan"), syn_lr=float("inf"))
    assert lines(tmp_path) == [{"iteration": 0, "grand_loss": None, "syn_lr": None}]


def test_resuming_cuts_off_what_was_written_after_the_checkpoint_and_a_half_line(tmp_path):
    tracker = opened(tmp_path)
    tracker.iteration(iteration=0)
    state = tracker.state()
    tracker.iteration(iteration=1)
    tracker.file.write(b'{"iterat')
    opened(tmp_path, resume=state).iteration(iteration=1)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1]


def test_metrics_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    evaluated = {"iteration": 0, "eval": {"model": "ConvNet", "variant": "raw", "mean": 0.5, "std": 0.25, "accs": [0.5]}}
    updates = [{"iteration": i, "grand_loss": loss, "syn_lr": 0.1} for i, loss in enumerate((1.0, None))]
    path.write_text("".join(json.dumps(line) + "\n" for line in (evaluated, *updates)))
    values, evaluations = read_metrics(path, ["grand_loss", "syn_lr"])
    assert {key: tuple(map(list, columns)) for key, columns in values.items()} == {
        "grand_loss": ([0], [1.0]),
        "syn_lr": ([0, 1], [0.1, 0.1]),
    }
    assert evaluations == [{"iteration": 0} | evaluated["eval"]]


def test_a_console_that_is_gone_is_not_missed(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Gone())
    say("to nobody")
    say("still to nobody")
    assert sys.stdout.name == "/dev/null"
