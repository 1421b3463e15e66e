"""Makes the pictures of the README again, from what is kept here of runs: `python figures/make_figures.py`.

Each folder beside this file is the folder of a run with its small files: results.json, metrics.jsonl, synthetic_best.pt
and, for the images over time, some images_<it>.pt. Those in choice_of_step/ are runs that differ in the step they match
alone, and are compared in one picture.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import pictures  # noqa: E402
import storage  # noqa: E402
from evaluation import Accuracy  # noqa: E402

CHOICES = {"att": "nearest step by l1", "l2": "nearest step by l2", "mtt": "last step"}  # folder -> what its run matches


def choice_of_step(folder: Path) -> Path:
    """Compares the runs at the last iteration at which all were evaluated."""
    files = {name: path for name in CHOICES if (path := folder / name / "metrics.jsonl").exists()}
    read = {CHOICES[name]: storage.read_metrics(path, ["match_step"]) for name, path in files.items()}
    last = max(set.intersection(*({one["iteration"] for one in evaluations} for _, evaluations in read.values())))
    path, matched, reached = folder / "choice_of_step.png", {}, {}
    for name, (values, evaluations) in read.items():
        matched[name] = tuple(column[:last] for column in values["match_step"])
        reached[name] = {one["variant"]: Accuracy.of(one) for one in evaluations if one["iteration"] == last}
    pictures.choices(path, matched, reached, f"test accuracy (%) at iteration {last}")
    return path


for results in sorted(HERE.glob("*/results.json")):
    for path in pictures.draw(results.parent, storage.load_json(results)):
        print(path)
print(choice_of_step(HERE / "choice_of_step"))
