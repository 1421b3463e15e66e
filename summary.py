"""summary.md, the page on a run or an evaluation, made from the content of its results.json alone: accuracies, figures of
merit, time and memory, settings, and what to do next."""

import shlex
import textwrap
from pathlib import Path

import paper
from evaluation import Accuracy
from utils import SOURCES

# --- Tables ----------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown, padded so that it can be read as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


def accuracies(content: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of accuracies: of a run's best and last images, or of the set that was evaluated."""
    header, rows = ["network", "images", "test accuracy (%)"], []
    if is_run := "best_set" in content:
        header[2:] = "best, at iteration", "last, at iteration"
    for model in content["merits"]:
        if is_run:
            for variant in ("raw", "ema"):
                found = [content[which][f"{variant}/{model}"] for which in ("best", "last")]
                at = [f"{Accuracy.of(one)} at {one['iteration']}" for one in found]
                rows.append([model, f"distilled, {variant}", *at])
        else:
            found = [Accuracy.of(one) for one in content["evaluations"] if one["model"] == model]
            rows.append([model, "synthetic", f"{found[0]}"])
        if real := content["random_real"].get(model):
            draws = counted(len(dict(real["tried"])[real["lr"]]), "draw")
            rows.append([model, f"random real ({draws}, lr {real['lr']:.4g})", f"{Accuracy.of(real)}"])
        if full := content["full_data"].get(model):
            networks, lr = counted(len(full["accs"]), "network"), content["config"]["lr_teacher"]
            rows.append([model, f"whole training set ({networks}, lr {lr:.4g})", f"{Accuracy.of(full)}"])
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


MERITS = {
    "hard_label_recovery": "hard-label recovery",
    "improvement_over_random": "improvement over random",
    "label_robust_score": "label-robust score",
}


def figures_of_merit(content: dict) -> str:
    """Their section; empty where none is known."""
    merits = content["merits"]
    if not any(score is not None for scores in merits.values() for score in scores.values()):
        return ""
    rows = [[m, *("-" if scores[k] is None else f"{scores[k]:.3f}" for k in MERITS)] for m, scores in merits.items()]
    said = "Fractions of 1. Hard-label recovery, whole training set minus this set, is good when low; the others when high."
    if not content["full_data"]:
        said += " --full_data=1 trains a network on the whole training set, once for all runs, and so fills the gaps."
    best = content.get("best_set")
    of = f" of synthetic_best.pt ({best['variant']}, iteration {best['iteration']})" if best else ""
    return f"## Figures of merit{of}\n\n{table(['network', *MERITS.values()], rows)}\n\n{wrapped(said)}\n\n"


# --- The page --------------------------------------------------------------------------------------------------------


def title(settings: dict) -> str:
    return f"{paper.data(settings)}, {settings['ipc']} per class, {settings['model']}, seed {settings['seed']}"


def heading(content: dict) -> str:
    """What results are of."""
    config = content["config"]
    if "best_set" in content:
        return title(config)
    return f"{paper.data(config)}, {counted(content['images'], 'synthetic image')}, seed {config['seed']}"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def span(seconds: float) -> str:
    units = ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)
    unit, size = next((u, s) for u, s in units if seconds >= 2 * s or s == 1)
    return f"{seconds / size:.3g} {unit}"


def as_flags(settings: dict) -> list[str]:
    """As a command line gives them: --dsa takes a value, and other switches that are off are left out, as what is None."""
    said = {k: v for k, v in settings.items() if v is not None and (v is not False or k == "dsa")}
    return [f"--{k}" if v is True and k != "dsa" else f"--{k}={v}" for k, v in said.items()]


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


CHOSEN = {  # --select_on -> what is said of the best
    "test": "Best is the best of the evaluations on test data, as the field reports it; the last chose nothing there.",
    "train": "Best is the best of the evaluations on real training images: test data chose nothing.",
}


def findings(content: dict) -> str:
    """What was found, as the console shows it too."""
    config, computed, is_run = content["config"], content["computed"], "best_set" in content
    head = heading(content) + (f": iteration {content['iteration']}" if is_run else f", {content['set']}")
    said = f"Test accuracy (%), {counted(config['num_eval'], 'network')} of {config['epoch_eval_train'] + 1} epochs each."
    said += f" {CHOSEN[config['select_on']]}" if is_run else f" Learning rate {content['evaluations'][0]['syn_lr']:.4g}."
    found = f"# {head}\n\n{wrapped(said)}\n\n{table(*accuracies(content))}\n\n"
    if figure := paper.figure(config) if is_run else None:
        found += f"The paper reports {figure} for {paper.data(config)} at {config['ipc']} per class, with its settings.\n\n"
    spent = [f"{span(computed['evaluating_seconds'])} in evaluations"] if computed["evaluating_seconds"] else []
    if computed.get("iterations"):
        pace = f"{counted(computed['iterations'], 'iteration')} in {span(computed['iterating_seconds'])}"
        spent.insert(0, f"{pace} ({computed['median_seconds']:.3g} s each, median)")
    if computed["memory_gb"]:
        spent.append(f"up to {computed['memory_gb']:.2f} GB of memory in use")
    made = f"Seed {config['seed']}, torch {config['made_with']['torch']}."
    return f"{found}{figures_of_merit(content)}## Time and memory\n\n{wrapped('; '.join(spent) + '. ' + made)}\n"


def page(content: dict, folder: Path) -> str:
    config, commands = content["config"], [("made by", content["config"]["command"])]
    if "best_set" in content:
        # VGG11 of pool M halves an image five times
        pool = "M" if (config["res"] or SOURCES[config["dataset"]].resolution) >= 32 else "W"
        script, best = "python distill_ATT.py", shlex.join([f"--load_syn={folder}", f"--data_path={config['data_path']}"])
        commands += [
            ("go on, or further with a larger --Iteration", config["to_go_on"]),
            ("evaluate the best images with other networks", f"{script} --eval_only {best} --eval_mode={pool}"),
            ("write them as pictures and tensors", f"{script} {best} --export={shlex.quote(f'{folder}/export')}"),
        ]
    said = "\n".join(f"# {what}\n{command}" for what, command in commands)
    settings = {k: v for k, v in config.items() if k not in ("made_with", "command", "to_go_on")}
    flags = wrapped(shlex.join(as_flags(settings)))
    return f"{findings(content)}\n## Commands\n\n```\n{said}\n```\n\n## Settings\n\n```\n{flags}\n```\n"
