"""metrics.jsonl is whole, and wandb failing costs a warning, never the run."""

import errno
import importlib.machinery
import json
import sys
import types

import pytest

from console import Interrupted, say
from small_runs import distil, lines, same_run
from tracking import Tracker, read_metrics

RUN = ["--syn_steps=1", "--num_eval=1", "--epoch_eval_train=1", "--baseline_draws=0", "--run_name=r"]


class Wandb(types.ModuleType):
    """Stands in for wandb: notes what is called, and raises `error` at the n-th call of a function, and ever after."""

    def __init__(self, fails=None, at=1, error=None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self.fails, self.at, self.error = [], fails, at, error
        self.run = types.SimpleNamespace(id="its-id", log=self.function("log"), finish=self.function("finish"))
        self.init, self.Image, self.Histogram = map(self.function, ("init", "Image", "Histogram"))

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
    distil(buffers, tmp_path, "--wandb=online", "--Iteration=3", *RUN)
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


def test_metrics_are_read_back_by_key_and_by_network(tmp_path):
    path = tmp_path / "metrics.jsonl"
    evaluated = {"iteration": 0, "eval": {"model": "ConvNet", "variant": "raw", "mean": 0.5, "std": 0.25, "accs": [0.5]}}
    updates = [{"iteration": i, "grand_loss": loss, "syn_lr": 0.1} for i, loss in enumerate((1.0, None))]
    path.write_text("".join(json.dumps(line) + "\n" for line in (evaluated, *updates)))
    values, evaluations = read_metrics(path, ["grand_loss", "syn_lr"])
    assert {key: tuple(map(list, columns)) for key, columns in values.items()} == {
        "grand_loss": ([0], [1.0]),
        "syn_lr": ([0, 1], [0.1, 0.1]),
    }
    assert evaluations == {("ConvNet", "raw"): [(0, 0.5, 0.25)]}


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
