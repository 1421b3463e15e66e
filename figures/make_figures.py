"""Makes the pictures of the README again, from what is kept here of runs: `python figures/make_figures.py`.

Each folder beside this file is the folder of a run with its small files: results.json, metrics.jsonl, synthetic_best.pt
and, for the images over time, some images_<it>.pt.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import pictures  # noqa: E402
import storage  # noqa: E402

for results in sorted(HERE.glob("*/results.json")):
    for path in pictures.draw(results.parent, storage.load_json(results)):
        print(path)
