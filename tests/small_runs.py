"""Runs of both scripts on real digits that take seconds, and how two of them are compared."""

import json
from pathlib import Path

import torch

import buffer_ATT
import distill_ATT

DIGITS = ["--dataset=Digits", "--model=ConvNetW32", "--device=cpu"]
FAST = ["--syn_steps=4", "--expert_epochs=1", "--max_start_epoch=2", "--Iteration=6", "--eval_it=3", "--num_eval=2",
        "--epoch_eval_train=4", "--lr_img=100", "--baseline_draws=1", "--wandb=disabled"]  # fmt: skip


def make_experts(folder, *flags):
    defaults = [*DIGITS, "--num_experts=2", "--train_epochs=3", "--batch_train=256", "--seed=0"]
    buffer_ATT.main([*defaults, f"--buffer_path={folder}", *flags])


def distil(buffers, out, *flags) -> Path:
    distill_ATT.main([*DIGITS, *FAST, f"--buffer_path={buffers}", f"--save_dir={out}", "--seed=1", *flags])
    return max(Path(out, "Digits").iterdir(), key=lambda p: p.stat().st_mtime)


def lines(folder):
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def tensors(folder):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*images*.pt"))}


def same_run(a, b):
    assert lines(a) == lines(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys() and len(left) >= 4
    assert all(torch.equal(left[name], right[name]) for name in left)
