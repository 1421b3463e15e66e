"""The settings and figures of the paper (arXiv 2407.14245), row by row: one source for what is run, tested and shown."""

from networks import OTHER_NAMES

FLAGS = """dataset model ipc zca syn_steps expert_epochs max_start_epoch lr_img lr_lr lr_teacher ema_decay eval_it Iteration
    batch_syn eval_mode""".split()
# the published commands of distill_ATT.py, a column for each of FLAGS; - where a command leaves one out
SETTINGS = """
CIFAR10-1         CIFAR10   ConvNetD3  1  yes  80  4   2  1e2   1e-07  1e-2   0.9999     100     6000  -     -
CIFAR10-10        CIFAR10   ConvNetD3  10 yes  30  2  20  1e04  1e-04  1e-02  0.9999     100    60000  -     -
CIFAR10-50        CIFAR10   ConvNetD3  50 -    50  2  40  1e02  1e-05  1e-03  0.999     1000  1000000  -     -
CIFAR100-1        CIFAR100  ConvNetD3  1  yes  50  4  20  500   1e-05  1e-02  0.9995      10     3000  -     -
CIFAR100-10       CIFAR100  ConvNetD3  10 -    20  2  40  1e3   1e-05  1e-2   0.9995    5000   200000  -     -
CIFAR100-50       CIFAR100  ConvNetD3  50 yes  80  2  40  1e3   1e-05  1e-2   0.999   100000   100000  1200  -
Tiny-1            Tiny      ConvNetD4  1  -    30  2  10  1e04  1e-04  1e-02  0.999       10    10000  -     -
Tiny-10           Tiny      ConvNetD4  10 -    20  2  40  1e04  1e-06  1e-03  0.999      100    80000  -     -
<subset>-1        <subset>  ConvNetD5  1  -    20  2  10  1e4   5e-08  1e-02  0.9999      10    10000  -     -
<subset>-10       <subset>  ConvNetD5  10 -    20  2  10  1e04  1e-04  1e-2   0.999     1000   100000  -     -
CIFAR10-10-cross  CIFAR10   ConvNetD3  10 yes  30  2  20  1e04  1e-04  1e-02  0.9999     100    60000  -     M
CIFAR10-50-cross  CIFAR10   ConvNetD3  50 -    30  2  40  1e02  1e-05  1e-03  0.999     1000  1000000  -     M
"""
SUBSETS = "imagenette", "imagewoof", "imagefruit", "imagemeow"  # of ImageNet, in the paper
EXPERTS = "--train_epochs=50", "--num_experts=100"
PATHS = "--buffer_path=buffer", "--data_path=data"
# test accuracy in percent, trained on the synthetic set: MTT, FTD, ATT
PUBLISHED = {
    "CIFAR10-1": ("46.2 ± 0.8", "46.8 ± 0.3", "48.3 ± 1.0"),
    "CIFAR10-10": ("65.4 ± 0.7", "66.6 ± 0.3", "67.7 ± 0.6"),
    "CIFAR10-50": ("71.6 ± 0.2", "73.8 ± 0.2", "74.5 ± 0.4"),
    "CIFAR100-1": ("24.3 ± 0.3", "25.2 ± 0.2", "26.1 ± 0.3"),
    "CIFAR100-10": ("39.7 ± 0.4", "43.4 ± 0.3", "44.2 ± 0.5"),
    "CIFAR100-50": ("47.7 ± 0.2", "50.7 ± 0.3", "51.2 ± 0.3"),
    "Tiny-1": ("8.8 ± 0.3", "10.4 ± 0.3", "11.0 ± 0.5"),
    "Tiny-10": ("23.2 ± 0.2", "24.5 ± 0.2", "25.8 ± 0.4"),
    "imagenette-1": ("47.7 ± 0.9", "52.2 ± 1.0", "52.4 ± 1.1"),
    "imagenette-10": ("63.0 ± 1.3", "67.7 ± 0.7", "69.3 ± 0.8"),
    "imagewoof-1": ("28.6 ± 0.8", "30.1 ± 1.0", "31.2 ± 1.8"),
    "imagewoof-10": ("35.8 ± 1.8", "38.8 ± 1.4", "40.0 ± 1.4"),
    "imagefruit-1": ("26.6 ± 0.8", "29.1 ± 0.9", "30.0 ± 0.8"),
    "imagefruit-10": ("40.3 ± 1.3", "44.9 ± 1.5", "45.9 ± 1.2"),
    "imagemeow-1": ("30.7 ± 1.6", "33.8 ± 1.5", "34.0 ± 1.4"),
    "imagemeow-10": ("40.4 ± 2.2", "43.3 ± 0.6", "45.5 ± 1.6"),
}
# likewise for networks that the images were not distilled with
CROSS = {
    ("CIFAR10-10-cross", "ConvNet"): ("64.3 ± 0.7", "66.1 ± 0.3", "67.7 ± 0.6"),
    ("CIFAR10-10-cross", "ResNet18"): ("46.4 ± 0.6", "53.2 ± 1.4", "54.5 ± 0.9"),
    ("CIFAR10-10-cross", "VGG11"): ("50.3 ± 0.8", "47.0 ± 1.5", "54.2 ± 0.8"),
    ("CIFAR10-10-cross", "AlexNet"): ("34.2 ± 2.6", "35.9 ± 2.3", "43.6 ± 1.4"),
    ("CIFAR10-50-cross", "ConvNet"): ("71.6 ± 0.2", "73.8 ± 0.2", "74.5 ± 0.4"),
    ("CIFAR10-50-cross", "ResNet18"): ("61.9 ± 0.7", "65.7 ± 0.3", "66.3 ± 1.1"),
    ("CIFAR10-50-cross", "VGG11"): ("55.4 ± 0.8", "58.4 ± 1.6", "61.7 ± 0.9"),
    ("CIFAR10-50-cross", "AlexNet"): ("48.2 ± 1.0", "53.8 ± 0.9", "60.0 ± 0.9"),
}
# `make demo`, which is no row of the paper
DIGITS = "--dataset=Digits --model=ConvNetD2"
DIGITS_EXPERTS = f"{DIGITS} --num_experts=4 --train_epochs=15 --batch_train=32 --lr_teacher=0.02"
DIGITS_DISTIL = f"""{DIGITS} --ipc=1 --syn_steps=20 --expert_epochs=2 --max_start_epoch=5 --lr_img=100 --lr_lr=1e-5
    --ema_decay=0.98 --Iteration=150 --eval_it=75 --num_eval=3 --epoch_eval_train=200"""


def flag(name: str, value: str) -> list[str]:
    if value == "-":
        return []
    if value in SUBSETS:
        return ["--dataset=ImageNet", f"--subset={value}"]
    return [f"--{name}"] if value == "yes" else [f"--{name}={value}"]


def rows() -> dict[str, tuple[list[str], list[str]]]:
    """Row to the flags of buffer_ATT.py and of distill_ATT.py, as published."""
    found = {}
    for line in SETTINGS.strip().splitlines():
        for subset in SUBSETS if "<subset>" in line else [""]:
            name, *values = line.replace("<subset>", subset).split()
            *distill, mode = [flag(*pair) for pair in zip(FLAGS, values)]
            data, model, zca = distill[0], distill[1], distill[3]
            experts = [*data, *model, *EXPERTS, *zca, *reversed(PATHS)]
            found[name] = experts, [*sum(distill, []), *PATHS, *mode]
    return found | {"Digits-1": (DIGITS_EXPERTS.split(), DIGITS_DISTIL.split())}


ROWS = rows()


def data(settings: dict) -> str:
    """What the paper calls the data of a run."""
    return settings["subset"] if settings["dataset"] == "ImageNet" else settings["dataset"]


def published(row: str, model: str, method: str = "att") -> str | None:
    """The paper's figure for a row and a network, of MTT or of ATT; None where it has none."""
    own_network = not {f"--model={model}", f"--model={OTHER_NAMES.get(model)}"}.isdisjoint(ROWS[row][1])
    figures = CROSS.get((row, model)) or (PUBLISHED.get(row) if own_network else None)
    return figures and figures[0 if method == "mtt" else -1]


def figure(settings: dict) -> str | None:
    """The paper's figure for the data set, network, images per class and method of a run; None where it has none."""
    row = f"{data(settings)}-{settings['ipc']}"
    if row not in PUBLISHED or settings["res"] or settings["texture"]:
        return None
    return published(row, settings["model"], settings["match"])
