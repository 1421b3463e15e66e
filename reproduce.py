"""Reproduces a row of the paper by one command: trains the experts, distils, and judges the best set once more.

Each part is one of the two scripts, called with the paper's flags. Flags given here are passed on to the scripts that
know them. What is done is not done again, and what was stopped goes on. results/<row>.json then holds the accuracies,
what differs from the paper's settings, and what the parts took; --table writes the README's tables from these files.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import buffer_ATT
import console
import distill_ATT
import sets
import storage
from console import say
from evaluation import POOLS, Accuracy
from paper import CROSS, PUBLISHED, ROWS, published
from storage import InputError
from summary import span, table
from tracking import PLACE

HOME = Path(__file__).parent
RESULTS = HOME / "results"

# --- Reproducing -----------------------------------------------------------------------------------------------------

COUNTED = {"experts": "experts", "distill": "iterations", "evaluate": "evaluations"}  # what a part of a result is made of
PARTS = "experts", "distill", "judge"
# where and how a command computes, and what it is called: no difference from the paper
SAME = PLACE | {"seed", "ckpt_it"}
# what judging a finished set is told; the rest it knows from the set
OF_JUDGING = set("data_path save_dir device compile wandb num_eval epoch_eval_train batch_real".split())


def chosen(flags: list[str], names) -> list[str]:
    """Those of the flags, each --name=value or --name and its values, that are among the names."""
    starts = [i for i, text in enumerate(flags) if text.startswith("--")] + [len(flags)]
    groups = [flags[start:end] for start, end in zip(starts, starts[1:])]
    return [text for group in groups if name_of(group[0]) in names for text in group]


def name_of(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


def differences(script, published: list[str], made_with: dict) -> dict[str, list]:
    """Setting to [as published, here], of the settings with which experts or a run were made."""
    before = vars(script.parse_args(published))
    return {k: [v, made_with[k]] for k, v in before.items() if k not in SAME and made_with.get(k, v) != v}


def call(script, flags: list[str]):
    """As from the command line."""
    sys.argv = [f"{script.__name__}.py", *flags]
    say(f"\n$ python {shlex.join(sys.argv)}")
    script.main()


def reproduce(row: str, parts: list[str], extra: list[str], note: str):
    """Does those parts of a row that are not done yet, and writes results/<row>.json unless experts alone are asked for."""
    known = [vars(script.parse_args([])) for script in (buffer_ATT, distill_ATT)]
    for text in [text for n, text in enumerate(extra) if n == 0 or text.startswith("--")]:
        if not text.startswith("--") or not any(name_of(text) in names for names in known):
            raise InputError(f"{text} is a flag of neither script.")
    experts, distill = ([*flags, *chosen(extra, names)] for flags, names in zip(ROWS[row], known))
    args = distill_ATT.parse_args([f"--run_name={row}", *distill])
    folder = args.save_dir / args.dataset / args.run_name
    if "experts" in parts:
        call(buffer_ATT, experts)
    if "distill" in parts:
        call(distill_ATT, [*distill, f"--run_name={args.run_name}", "--resume=auto"])
    if set(parts) == {"experts"}:
        return
    best = sets.load_synthetic(folder / "synthetic_best.pt")
    fingerprint = storage.content_hash(best.images)[:8]
    judgings = {mode: folder.with_name(f"{args.run_name}_again_{fingerprint}_{mode}") for mode in POOLS}
    judged = judgings[args.eval_mode]
    if "judge" in parts and not (judged / "results.json").exists():
        own = [f"--load_syn={folder}", f"--run_name={judged.name}", f"--eval_mode={args.eval_mode}"]
        own += [f"--seed={best.settings['seed'] + 1}", "--baseline_draws=0"]  # other networks than those that chose it
        call(distill_ATT, ["--eval_only", *own, *chosen(distill, OF_JUDGING)])
    path = RESULTS / f"{row}.json"
    if not note and path.exists():
        note = storage.load_json(path)["note"]
    storage.save_json(path, {"row": row, "note": note} | collect(row, folder, judgings.values()))
    say(f"\n{measured([row])}\n\nAll figures are in {path}")


def collect(row: str, folder: Path, judgings: Iterable[Path]) -> dict:
    """What a run left in its folder, and those of the judgings of its best set that were done in theirs; accuracies in
    [0, 1]."""
    run, config = (storage.load_json(folder / name) for name in ("results.json", "config.json"))
    start = config["starts"][-1]
    there = storage.load_experts(Path(start["experts"][0]).parent, max_experts=config["max_experts"])
    experts = [expert for expert in there if str(expert.path) in start["experts"]][: config["max_files"]]
    changed = {"experts": None, "run": differences(distill_ATT, ROWS[row][1], run["config"])}
    if made := experts[0].settings:  # a published file does not say
        seen = made["augmentation"]
        made = made | {"num_experts": len(experts), "res": run["config"]["res"], "dsa": bool(seen)}
        made |= {"dsa_strategy": "_".join(seen)} if seen else {}
        changed["experts"] = differences(buffer_ATT, ROWS[row][0], made)
    costs, spent = [expert.cost for expert in experts if expert.cost], run["computed"]
    parts = {
        "distill": {"iterations": spent["iterations"], "seconds": spent["iterating_seconds"],
                    "memory_gb": spent["memory_gb"]},
        "evaluate": {"evaluations": len(run["evaluations"]), "seconds": spent["evaluating_seconds"]},
    }  # fmt: skip
    if costs:  # those of early versions do not say
        seconds, memory = zip(*((cost["seconds"], cost["memory_gb"]) for cost in costs))
        parts["experts"] = {"experts": len(costs), "seconds": sum(seconds), "memory_gb": max(memory)}
    found = {name: run[name] for name in ("best", "last", "random_real")}
    judged = [storage.load_json(path)["evaluations"] for one in judgings if (path := one / "results.json").exists()]
    found["best_again"] = {one["model"]: one for judging in judged for one in judging}
    used = {"changed": changed, "experts": len(experts), "iterations": run["iteration"], "seed": run["config"]["seed"]}
    device = start.get("device", "a device that was not recorded")  # by earlier versions
    return found | used | {"parts": parts, "device": device, "made_with": start["made_with"]}


# --- Tables ----------------------------------------------------------------------------------------------------------


def measured(names) -> str:
    """The rows that have been run, published beside measured, as a table in Markdown."""
    header = ["row", "network", "published", "last, raw", "last, EMA", "best", "best, again", "random real"]
    lines, notes = [], []
    for row in names:
        found = storage.load_json(RESULTS / f"{row}.json")
        own = [key.partition("/")[2] for key in found["last"]]
        for model in dict.fromkeys([*own, *found["best_again"]]):
            figures = [found["last"].get(f"{variant}/{model}") for variant in ("raw", "ema")]
            best = (found["best"].get(f"{variant}/{model}") for variant in ("raw", "ema"))
            figures.append(max(filter(None, best), key=lambda one: Accuracy.of(one).score, default=None))
            figures += [found[name].get(model) for name in ("best_again", "random_real")]
            here = [str(Accuracy.of(one)) if one else "-" for one in figures]
            _, match = found["changed"]["run"].get("match", ("att", "att"))
            lines.append([row, model, published(row, model, match) or "-", *here])
        notes.append(f"- {row}: {circumstances(found)}")
    return "\n".join([table(header, lines), "", *notes])


def circumstances(found: dict) -> str:
    """What differs from the paper's settings, and what the parts took."""
    differing = []
    for what, changed in found["changed"].items():
        if changed is None:
            differing.append(f"{what} that do not say how they were made")
        elif changed:
            settings = (f"`--{name}` {now} (published: {before})" for name, (before, now) in changed.items())
            differing.append(f"{what} with {', '.join(settings)}")
    said = [*([found["note"]] if found["note"] else []), *(differing or ["the settings of the row"])]
    for name, part in found["parts"].items():
        what, seconds = COUNTED[name], part["seconds"]
        count = part[what]
        memory = f", {part['memory_gb']:.1f} GB" if "memory_gb" in part else ""
        among = f" of {found['experts']}" if what == "experts" and count < found["experts"] else ""
        said.append(f"{count:,}{among} {what} in {span(seconds)}, {span(seconds / count)} each{memory}")
    versions = f"Python {found['made_with']['python']}, torch {found['made_with']['torch']}"
    return "; ".join([*said, f"{found['device']}, {versions}, seed {found['seed']}"]) + "."


def as_published() -> str:
    """The paper's figures as tables in Markdown."""
    figures = {(row, "ConvNet"): values for row, values in PUBLISHED.items()} | CROSS
    return table(["row", "network", "MTT", "FTD", "ATT"], [[*key, *values] for key, values in figures.items()])


def section() -> str:
    """The README's section of results."""
    there = [row for row in ROWS if (RESULTS / f"{row}.json").exists()]
    return "\n\n".join([*([measured(there)] if there else []), "As published:", as_published()])


def write_readme(path: Path = HOME / "README.md"):
    """Renews what stands between two comments of the README."""
    text = path.read_text()
    before, after = text.partition(START)[0], text.partition(END)[2]
    with storage.atomic_path(path) as temporary:
        temporary.write_text(f"{before}{START}\n\n{section()}\n\n{END}{after}")


START, END = "<!-- reproduce.py --table writes what follows -->", "<!-- and this is the end of it -->"


def main():
    usage = "python %(prog)s ROW [flags of the two scripts]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.add_argument("row", nargs="?", type=console.one_of(ROWS), help="such as CIFAR10-1; see --list")
    parser.add_argument("--list", action="store_true", help="show the rows and their commands")
    parser.add_argument("--table", action="store_true", help="write the tables of the README from the files in results/")
    parser.add_argument("--parts", nargs="+", type=console.one_of(PARTS), default=PARTS, help="do only these: %(default)s")
    parser.add_argument("--note", default="", help="a remark on the data, shown beside the figures")
    args, extra = parser.parse_known_args()
    if args.list:
        for row, (experts, distill) in ROWS.items():
            say(f"{row}\n  python buffer_ATT.py {shlex.join(experts)}\n  python distill_ATT.py {shlex.join(distill)}")
    elif args.table:
        write_readme()
    elif args.row is None:
        raise InputError(f"Name a row: {', '.join(ROWS)}.")
    else:
        reproduce(args.row, args.parts, extra, args.note)


if __name__ == "__main__":
    console.run(main)
