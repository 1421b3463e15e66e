"""Pictures of a run as PNG files: its images, its curves, its accuracies by network. Plain functions of tensors and numbers,
and below them what draws a folder from its files.

Colours are Okabe and Ito's, which people with any colour vision tell apart; marks and hatches tell them apart in print.
"""

import re
import warnings
from array import array
from pathlib import Path

import torch
from torch import Tensor

import paper
import storage
import summary
from evaluation import Accuracy
from utils import stored_transform

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]
GREY = "#777777"


def tile(images: Tensor, rows: int) -> Tensor:
    """(rows * k, C, H, W) to one picture (H', W', C), a row of k each, a pixel of black between."""
    n, c, h, w = images.shape
    cells = torch.nn.functional.pad(images, (0, 1, 0, 1))
    return cells.view(rows, n // rows, c, h + 1, w + 1).permute(0, 3, 1, 4, 2).reshape(rows * (h + 1), -1, c)


def stretched(picture: Tensor):
    """As uint8, lowest value black and highest white."""
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low).clamp(min=1e-8) * 255).byte().squeeze(-1).numpy()


def _figure(width: float, height: float, **settings):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **settings)


def _save(path: Path, figure):
    with storage.atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # shown as a box
        figure.savefig(temporary, format="png", dpi=100)


def _plain(names: list[str]) -> list[str]:
    """Names of folders need not be text."""
    return [name.encode(errors="replace").decode() for name in names]


def _sheet(width: float, height: float, title: str):
    """Axes on which places are in inches from the upper left corner."""
    axes = _figure(width, height).add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    _write(axes, title, width / 2, 0.12, "center", "top", 11)
    return axes


def _show(sheet, images: Tensor, left: float, top: float, width: float, height: float):
    """Images (n,C,H,W) in a row."""
    picture, place = tile(images, 1)[:-1, :-1].squeeze(-1).numpy(), (left, left + width, top + height, top)
    sheet.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto", extent=place)


def _write(sheet, text: str, x: float, y: float, ha: str, va: str, size: float):
    sheet.text(x, y, text, ha=ha, va=va, fontsize=size, parse_math=False)


# --- Images ----------------------------------------------------------------------------------------------------------

HEAD = 0.65  # inches, for two lines of title
PITCH = 1.12  # from row to row of a grid, in heights of an image


def grid(path: Path, images: Tensor, classes: list[str], title: str):
    """The images in [0, 1], (classes * ipc, C, H, W) grouped by class, as a PNG: one per class below its name, several as
    a row beside it.

    Where there are more classes than fit a square, the rows go on in further columns.
    """
    ipc, classes = len(images) // len(classes), _plain(classes)
    images = images.clamp(0, 1).cpu().unflatten(0, (len(classes), ipc))
    longest = max(map(len, classes))
    if ipc == 1:  # as few empty places as can be, wider than high
        n = len(classes)
        blocks = min(range(int(n**0.5 + 0.999), int((2 * n) ** 0.5) + 3), key=lambda k: (-n % k, -k))
    else:  # blocks side by side, so that the whole is about as wide as high
        blocks = max(1, round((len(classes) / (ipc + 1)) ** 0.5))
    rows = -(-len(classes) // blocks)
    cell = min(1.0, 14 / max(rows, blocks * (ipc + (ipc > 1))))  # inches
    font = max(4, min(11, cell * 24))
    if ipc == 1:
        font = min(font, max(3, cell * 110 / longest))  # points: a name fits above its image
        beside, above, gap = 0, font / 72 * 1.5, 0.12 * cell
    else:
        beside, above, gap = longest * font * 0.0085 + 0.12, (PITCH - 1) * cell, 0.1
    block = beside + cell * ipc + gap
    width, height = max(4.5, blocks * block + 0.2), HEAD + rows * (cell + above) + 0.12
    sheet = _sheet(width, height, title)
    margin = (width - blocks * block) / 2 + gap / 2
    for i, (name, row) in enumerate(zip(classes, images)):
        across, line = (i % blocks, i // blocks) if ipc == 1 else divmod(i, rows)
        left, top = margin + across * block + beside, HEAD + line * (cell + above) + above
        _show(sheet, row, left, top, cell * ipc, cell)
        if ipc == 1:
            _write(sheet, name, left + cell / 2, top - 0.03 * cell, "center", "bottom", font)
        else:
            _write(sheet, name, left - 0.06 * cell, top + cell / 2, "right", "center", font)
    _save(path, sheet.figure)


STRIP = 12  # images of a row, at most


def strip(path: Path, moments: list[tuple[str, Tensor]], classes: list[str], title: str):
    """Images over time as a PNG: for each moment, its name and images in [0, 1], (classes * ipc, C, H, W) grouped by
    class, a row of one image per class, of the first classes."""
    names, cell = _plain(classes)[:STRIP], 1.0
    beside = max(len(line) for name, _ in moments for line in name.split("\n")) * 10 * 0.0085 + 0.2
    font = max(5, min(10, 118 / max(map(len, names))))
    width, height = max(4.5, beside + len(names) * cell * 1.04 + 0.1), HEAD + 0.2 + len(moments) * cell * PITCH
    sheet = _sheet(width, height, title)
    for line, (moment, images) in enumerate(moments):
        firsts = images.clamp(0, 1).cpu().unflatten(0, (len(classes), -1))[:, 0]
        for c, name in enumerate(names):
            left, top = beside + c * cell * 1.04, HEAD + 0.15 + line * cell * PITCH
            _show(sheet, firsts[c : c + 1], left, top, cell, cell)
            if line == 0:
                _write(sheet, name, left + cell / 2, top - 0.03 * cell, "center", "bottom", font)
            if c == 0:
                _write(sheet, moment, left - 0.08 * cell, top + cell / 2, "right", "center", 10)
    _save(path, sheet.figure)


# --- Curves ----------------------------------------------------------------------------------------------------------

CURVES = {"grand_loss": "grand loss", "match_step": "matched step", "syn_lr": "synthetic learning rate"}
FEW = 40  # points that are seen as they are


def curves(
    path: Path, values: dict[str, tuple[array, array]], evaluations: list[dict], real: dict[str, Accuracy], title: str,
    steps: int,
):
    """Grand loss, matched step of `steps`, synthetic lr and accuracy over iterations as a PNG. `values`: iterations
    and values for each of CURVES; `evaluations`: what each found, as in metrics.jsonl; `real`: network to random images."""
    figure = _figure(11, 7)
    figure.suptitle(title, fontsize=11)
    # margins as shares of the figure: a layout that is computed takes longer than the drawing
    place = {"left": 0.09, "right": 0.985, "bottom": 0.075, "top": 0.9, "wspace": 0.16, "hspace": 0.33}
    *panels, accuracy = figure.subplots(2, 2, gridspec_kw=place).ravel()
    for panel, (key, name) in zip(panels, CURVES.items()):
        x, y = (torch.tensor(column, dtype=torch.float64) for column in values[key])
        if key == "syn_lr":
            panel.plot(x, y, color=BLUE, marker="." if len(x) < FEW else None)
        else:
            size = min(9, max(2, 90 / max(1, len(x)) ** 0.5))  # points, to be seen among 9 and among 100,000
            panel.plot(x, y, ".", color=SKY, markersize=size)
            if len(x) >= FEW:
                window = len(x) // 20
                means = torch.nn.functional.avg_pool1d(y[None], window, stride=1)[0]
                panel.plot(x[window // 2 :][: len(means)], means, color=BLUE, label=f"mean of {window}", linewidth=2)
        if key == "match_step":
            panel.axhline(steps, color=GREY, linestyle=":", label=f"last step, {steps}")
            panel.set_ylim(0, 1.06 * steps)
            panel.yaxis.get_major_locator().set_params(integer=True)
        _finish(panel, name)
    pool = list(dict.fromkeys(one["model"] for one in evaluations))
    for model, variant in dict.fromkeys((one["model"], one["variant"]) for one in evaluations):
        found = [one for one in evaluations if (one["model"], one["variant"]) == (model, variant)]
        colour = COLOURS[(pool.index(model) if len(pool) > 1 else variant == "ema") % len(COLOURS)]
        dash, marker = ("--", "s") if variant == "ema" else ("-", "o")
        columns = ([one[key] for one in found] for key in ("iteration", "mean", "std"))
        x, mean, std = torch.tensor([*columns], dtype=torch.float64) * torch.tensor([[1], [100], [100]])
        label = f"{model}, {variant}"
        if len(x) < FEW:
            settings = {"markerfacecolor": "white"} if variant == "ema" else {}
            accuracy.errorbar(x, mean, std, color=colour, label=label, linestyle=dash, marker=marker, capsize=3, **settings)
        else:
            accuracy.plot(x, mean, color=colour, label=label, linestyle=dash)
            accuracy.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    for model, found in real.items():
        label = "random real images" if len(pool) == 1 else f"{model}, random real"
        colour = GREY if len(pool) == 1 else COLOURS[pool.index(model) % len(COLOURS)]
        accuracy.axhline(100 * found.mean, color=colour, label=label, linestyle=":", linewidth=1.5)
    _finish(accuracy, "test accuracy (%)")
    _save(path, figure)


def choices(path: Path, matched: dict[str, tuple], reached: dict[str, dict[str, Accuracy]], title: str):
    """Runs that match different steps, as a PNG: the matched steps, iterations and values by run, and what their variants
    reach, with its standard deviation."""
    figure = _figure(11, 4.2, layout="constrained")
    steps, accuracy = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, ((name, (x, y)), colour) in enumerate(zip(matched.items(), COLOURS)):
        steps.plot(x, y, ".", color=colour, markersize=4, label=name)
        for variant, aside, face in (("raw", -0.12, colour), ("ema", 0.12, "white")):
            found, at = reached[name][variant], i + aside
            mean, std = 100 * found.mean, 100 * found.std
            accuracy.errorbar(at, mean, std, color=colour, marker="o", markerfacecolor=face, capsize=4)
            accuracy.annotate(variant, (at, mean + std), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    _finish(steps, "matched step of the student")
    _finish(accuracy, f"{title}, {len(found.accs)} networks")
    accuracy.set(xlabel="matched", xlim=(-0.6, len(matched) - 0.4), ymargin=0.25)
    accuracy.set_xticks(range(len(matched)), [name.replace(" by ", "\nby ") for name in matched])
    _save(path, figure)


def _finish(panel, title: str):
    panel.set(title=title, xlabel="iteration")
    panel.grid(alpha=0.3)
    panel.ticklabel_format(useOffset=False)
    panel.spines[["top", "right"]].set_visible(False)
    if lines := panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=9 if len(lines) < 6 else 7, ncols=1 + len(lines) // 6)


# --- A pool of networks ----------------------------------------------------------------------------------------------

LOOKS = [(BLUE, ""), (ORANGE, "//"), (GREEN, "..")]  # of the kinds of images


def pool(path: Path, bars: dict[str, dict[str, Accuracy]], title: str):
    """Accuracies by network as a PNG: a bar with its standard deviation for each kind of images; `bars`: kind to network to
    accuracy."""
    models, width = list(next(iter(bars.values()))), 0.8 / len(bars)
    figure = _figure(max(5, 1.5 + 1.5 * len(models)), 4.2, layout="constrained")
    panel = figure.subplots()
    for k, ((kind, found), (colour, hatch)) in enumerate(zip(bars.items(), LOOKS)):
        there = [(i, found[model]) for i, model in enumerate(models) if model in found]
        x = [i + (k - (len(bars) - 1) / 2) * width for i, _ in there]
        means, stds = ([100 * getattr(one, what) for _, one in there] for what in ("mean", "std"))
        drawn = panel.bar(x, means, 0.92 * width, yerr=stds, label=kind, color=colour, hatch=hatch, edgecolor="white",
                          error_kw={"capsize": 3, "elinewidth": 1})  # fmt: skip
        panel.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    panel.set_xticks(range(len(models)), models)
    panel.set_ylabel("test accuracy (%)")
    highest = max(100 * (one.mean + one.std) for found in bars.values() for one in found.values())
    panel.set_ylim(0, min(110, 1.12 * max(highest, 1)))
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False, fontsize=9)
    _save(path, figure)


# --- The pictures of a folder ----------------------------------------------------------------------------------------


def draw(folder: Path, content: dict) -> list[Path]:
    """Draws what a folder of a run or of --eval_only holds files for, with the content of its results.json. Returns the
    pictures."""
    drawn = []
    if "best_set" in content:
        draw_curves(folder, content["config"], by_network(content["random_real"]))
        best = storage.load(folder / "synthetic_best.pt", "synthetic")
        if "pixels" not in best:  # versions 1 and 2
            best["pixels"] = stored_transform(best["transform"]).undo(best["images"])
        draw_grid(folder / "grid_best.png", best)
        drawn = [folder / "curves.png", folder / "grid_best.png", *draw_over_time(folder, content, best)]
    return drawn + draw_pool(folder, content)


def by_network(found: dict) -> dict[str, Accuracy]:
    """Network to accuracy, from what a results.json holds of the set, of random real images or of the whole training set."""
    return {model: Accuracy.of(one) for model, one in found.items()}


def draw_curves(folder: Path, config: dict, real: dict[str, Accuracy]):
    values, evaluations = storage.read_metrics(folder / "metrics.jsonl", CURVES)
    curves(folder / "curves.png", values, evaluations, real, summary.title(config), config["syn_steps"])


def draw_grid(path: Path, best: dict):
    """`best`: what synthetic_best.pt holds."""
    accuracy, at = best["accuracy"], f"{best['variant']}, iteration {best['iteration']}"
    title = f"{paper.data(best['config'])}, {best['ipc']} per class ({at})"
    title += f"\n{Accuracy.of(accuracy)} % with {accuracy['model']}"
    grid(path, best["pixels"], best["classes"], title)


def draw_over_time(folder: Path, content: dict, best: dict) -> list[Path]:
    """The images at first, midway and at their best, as far as they were saved; nothing where there is one moment."""
    variant, last = best["variant"], best["iteration"]
    name = re.compile(rf"{storage.PREFIX[variant]}images_(\d+)\.pt")
    files = {int(m[1]): p for p in folder.iterdir() if (m := name.fullmatch(p.name))}
    which = best["accuracy"]["model"], variant
    found = {e["iteration"]: Accuracy.of(e) for e in content["evaluations"] if (e["model"], e["variant"]) == which}
    found[last] = Accuracy.of(best["accuracy"])
    # a run that was killed while it saved an evaluation, and goes on with another --eval_it, leaves images unjudged
    before = sorted(it for it in files if it < last and it in found)
    if not before:
        return []
    moments = []
    for it in dict.fromkeys((before[0], min(before, key=lambda it: abs(it - last / 2)), last)):
        if it == last:
            pixels = best["pixels"]
        elif best["config"]["zca"]:
            pixels = storage.load_any(files[it].with_name(files[it].name.replace("images_", "images_zca_")))
        else:
            pixels = stored_transform(best["transform"]).undo(storage.load_any(files[it]))
        moments.append((f"iteration {it}\n{found[it]} %", pixels))
    first = "" if best["ipc"] == 1 else ", the first of each class"
    title = f"{summary.title(best['config'])}\nthe {variant} images over time{first}"
    path = folder / "grid_over_time.png"
    strip(path, moments, best["classes"], title)
    return [path]


def draw_pool(folder: Path, content: dict) -> list[Path]:
    """Accuracies by network; nothing where there is but one."""
    what, reached = "synthetic", {one["model"]: one for one in content["evaluations"]}
    if best := content.get("best_set"):
        what, reached = f"distilled ({best['variant']}, iteration {best['iteration']})", best["reached"]
    if len(reached) < 2:
        return []
    kinds = {what: reached, "random real": content["random_real"], "whole training set": content["full_data"]}
    bars = {kind: by_network(found) for kind, found in kinds.items() if found}
    path = folder / "pool.png"
    pool(path, bars, summary.heading(content))
    return [path]
