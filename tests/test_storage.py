"""Files appear whole or not at all, and nothing damaged or hostile is taken for good."""

import errno
import os

import pytest
import torch

import sets
import storage
from storage import InputError


@pytest.fixture
def expert(tmp_path):
    trajectory = torch.randn(4, 300_000, generator=torch.Generator().manual_seed(0))
    storage.save_expert(tmp_path, 3, trajectory, {"model": "ConvNet", "seed": 0}, [0.1, 0.2, 0.3])
    return tmp_path / "replay_buffer_3.pt", trajectory


def test_an_expert_comes_back_epoch_by_epoch(expert):
    path, trajectory = expert
    loaded = storage.load_expert(path)
    assert (loaded.epochs, loaded.size, loaded.settings["model"]) == (3, 300_000, "ConvNet")
    for epoch in range(4):
        assert torch.equal(loaded.snapshot(epoch), trajectory[epoch])


def test_a_snapshot_is_a_copy(expert):
    loaded = storage.load_expert(expert[0])
    loaded.snapshot(1).zero_()
    assert torch.equal(loaded.snapshot(1), expert[1][1])


def test_a_flipped_bit_is_noticed_when_its_epoch_is_read(expert):
    path, trajectory = expert
    content = bytearray(path.read_bytes())
    at = content.index(trajectory[2].numpy().tobytes()) + 1234
    content[at] ^= 1
    path.write_bytes(content)
    loaded = storage.load_expert(path)
    assert torch.equal(loaded.snapshot(1), trajectory[1])
    with pytest.raises(InputError, match="replay_buffer_3.pt is damaged: the parameters of epoch 2"):
        loaded.snapshot(2)
    with pytest.raises(InputError, match="epoch 2"):
        loaded.in_memory(2)


def test_another_format_and_another_version_are_refused(tmp_path):
    storage.save(tmp_path / "a.pt", "checkpoint", {})
    with pytest.raises(InputError, match="a.pt holds att-checkpoint, where a file of format att-expert is needed"):
        storage.load_expert(tmp_path / "a.pt")
    torch.save({"format": "att-expert", "version": 99}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="b.pt has format version 99, and this program reads versions 1 to 3"):
        storage.load_expert(tmp_path / "b.pt")
    torch.save(torch.zeros(3), tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt holds Tensor"):
        storage.load_expert(tmp_path / "c.pt")


def published(path, experts=3, epochs=4):
    random = torch.Generator().manual_seed(1)
    content = [
        [[torch.randn(5, 2, generator=random), torch.randn(7, generator=random)] for _ in range(epochs + 1)]
        for _ in range(experts)
    ]
    torch.save(content, path)
    return content


def test_files_of_the_published_code_are_read(tmp_path):
    content = published(tmp_path / "replay_buffer_0.pt")
    loaded = storage.load_experts(tmp_path)
    assert [e.epochs for e in loaded] == [4, 4, 4] and loaded[0].size == 17
    expected = torch.cat([p.reshape(-1) for p in content[2][3]])
    assert torch.equal(loaded[2].snapshot(3), expected)
    assert torch.equal(loaded[2].in_memory(3).snapshot(3), expected)


def test_max_files_counts_experts_and_max_experts_caps_a_published_file(tmp_path):
    for k in (0, 1, 10):
        published(tmp_path / f"replay_buffer_{k}.pt")
    trajectory = torch.zeros(5, 17)
    storage.save_expert(tmp_path, 2, trajectory, {}, [])
    names = lambda **kw: [e.path.name for e in storage.load_experts(tmp_path, **kw)]  # noqa: E731
    assert len(names()) == 10
    published_two, own = ["replay_buffer_0.pt"] * 2 + ["replay_buffer_1.pt"] * 2, ["replay_buffer_2.pt"]
    assert names(max_experts=2) == published_two + own + ["replay_buffer_10.pt"] * 2
    assert names(max_files=5, max_experts=2) == published_two + own
    assert names(max_files=3) == ["replay_buffer_0.pt"] * 3


def epochs(shapes=((3, 2), (4,)), count=4):
    return [[torch.zeros(shape) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize(
    "content",
    [
        [[]],
        [epochs(), "expert"],
        [epochs(count=3) + epochs([(3, 2), (5,)], 1)],
        [epochs(), epochs([(4,), (3, 2)])],
        [epochs(count=3) + [[1.0, 2.0]]],
        [epochs(count=3) + [[torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4)]]],
        [epochs(count=3) + [[torch.zeros(3, 2).to_sparse(), torch.zeros(4)]]],
    ],
)
def test_a_published_file_must_hold_the_same_shapes_after_every_epoch(tmp_path, content):
    torch.save(content, tmp_path / "replay_buffer_0.pt")
    says = "replay_buffer_0.pt is damaged: it holds no list of experts with parameters of the same shapes after every epoch"
    with pytest.raises(InputError, match=says):
        storage.load_experts(tmp_path)


def test_published_parameters_that_are_not_finite_are_noticed_when_they_are_read(tmp_path):
    torch.save([epochs(count=1) + [[torch.full((3, 2), float("nan")), torch.zeros(4)]]], tmp_path / "replay_buffer_0.pt")
    (expert,) = storage.load_experts(tmp_path)
    assert expert.snapshot(0).tolist() == [0] * 10
    with pytest.raises(InputError, match="replay_buffer_0.pt holds parameters that are not finite in epoch 1"):
        expert.snapshot(1)


def test_a_fingerprint_tells_experts_apart(tmp_path):
    for k in (0, 1):
        storage.save_expert(tmp_path, k, torch.full((2, 3), float(k)), {}, [])
    experts = storage.load_experts(tmp_path)
    assert storage.fingerprint(experts) == storage.fingerprint(storage.load_experts(tmp_path))
    assert len({storage.fingerprint(e) for e in (experts, experts[:1], experts[1:])}) == 3


def test_a_set_of_bare_tensors_is_read_with_what_lies_beside_it(tmp_path):
    storage.save_tensor(tmp_path / "images_7.pt", torch.zeros(4, 3, 8, 8))
    with pytest.raises(InputError, match="labels_7.pt does not exist"):
        sets.load_synthetic(tmp_path / "images_7.pt")
    storage.save_tensor(tmp_path / "labels_7.pt", torch.arange(4))
    assert sets.load_synthetic(tmp_path / "images_7.pt").syn_lr is None
    storage.save_tensor(tmp_path / "lr_7.pt", torch.tensor(0.5))
    assert sets.load_synthetic(tmp_path / "images_7.pt").syn_lr == 0.5
    storage.save_tensor(tmp_path / "lr_7.pt", torch.zeros(2))
    with pytest.raises(InputError, match="lr_7.pt holds no learning rate"):
        sets.load_synthetic(tmp_path / "images_7.pt")
    for images in (torch.zeros(0, 3, 8, 8), torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4, 8, 8)):
        storage.save_tensor(tmp_path / "images_7.pt", images)
        storage.save_tensor(tmp_path / "labels_7.pt", torch.arange(len(images)))
        (tmp_path / "lr_7.pt").unlink(missing_ok=True)
        with pytest.raises(InputError, match="holds no synthetic set"):
            sets.load_synthetic(tmp_path / "images_7.pt")


def test_an_interrupted_write_leaves_the_last_good_file_and_no_other(tmp_path):
    path = tmp_path / "a.pt"
    storage.save(path, "checkpoint", {"n": 1})

    class Stop(BaseException):
        pass

    with pytest.raises(Stop), storage.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise Stop
    assert storage.load(path, "checkpoint")["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    storage.save(path, "checkpoint", {"n": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(storage.WriteError, match=r"a.pt cannot be written \(No space left on device\)"):
        storage.save(path, "checkpoint", {"n": 2})
    monkeypatch.undo()
    assert storage.load(path, "checkpoint")["n"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_one_process_at_a_time(tmp_path):
    with storage.locked(tmp_path), pytest.raises(InputError, match="is in use by another process"):
        with storage.locked(tmp_path):
            pass
    with storage.locked(tmp_path):
        pass


def test_what_a_killed_process_was_writing_is_cleared_away_by_the_next(tmp_path):
    left = tmp_path / ".replay_buffer_3.pt.abcdefgh.tmp"
    left.write_bytes(b"half")
    folder = tmp_path / ".export.abcdefgh.tmp"
    (folder / "pictures").mkdir(parents=True)
    (tmp_path / "notes.tmp").write_text("not ours")
    with storage.locked(tmp_path):
        assert not left.exists() and not folder.exists() and (tmp_path / "notes.tmp").exists()


def test_a_file_system_without_locks_can_be_used(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with storage.locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_saved_tensors_own_their_storage(tmp_path):
    storage.save_tensor(tmp_path / "t.pt", torch.randn(1000, 1000)[:2, :2])
    assert (tmp_path / "t.pt").stat().st_size < 10_000
    assert torch.load(tmp_path / "t.pt", weights_only=True).shape == (2, 2)


def test_what_is_written_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    storage.save_json(tmp_path / "a.json", {})
    assert done == ["fsync", "replace", "fsync"]
    done.clear()
    with storage.atomic_path(tmp_path / "folder", folder=True) as temporary:
        (temporary / "a").touch()
    assert done == ["fsync", "fsync", "replace", "fsync"] and (tmp_path / "folder" / "a").exists()
