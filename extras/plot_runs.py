"""Compares runs: draws what they logged, such as loss and probe, against epochs or TFLOP.

    python extras/plot_runs.py runs/a runs/b
    python extras/plot_runs.py "runs/fixed_[012]" "runs/muon_[012]" --x tflop --out flops.png

Each word is a curve: a run's folder, or a pattern in quotes for runs that differ in --seed alone.
For such runs it draws the mean, and a band of one standard deviation over the seeds. Needs
matplotlib. It prints a line for each curve, with the values at its end. Last line:
    written: runs.png
"""
import argparse
import glob
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt

# Flags that change where or how fast a run is made, but not what it is
NOT_THE_RECIPE = {"seed", "output_dir", "resume", "extend", "num_workers", "batch_size", "compile",
                  "recompute", "save_minutes", "viz_every", "max_steps", "benchmark", "world_size",
                  "finished"}
LABELS = {"epoch": "epoch", "tflop": "TFLOP of training", "probe_top1": "online probe, top-1 in %",
          "top1": "top-1 in %"}


def get_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a pattern in quotes")
    p.add_argument("--x", choices=("epoch", "tflop"), default="epoch",
                   help="the horizontal axis (default: epoch)")
    p.add_argument("--keys", nargs="+", default=["loss", "probe_top1"], metavar="KEY",
                   help="the values of log.jsonl to draw (default: loss probe_top1)")
    p.add_argument("--out", default="runs.png",
                   help="the picture to write; an older one is replaced (default: runs.png)")
    return p.parse_args()


def read_settings(folder):
    """The flags of a run, from its args.json; {} where there is none."""
    path = folder / "args.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_log(folder):
    """log.jsonl -> its rows in the order of steps; the last line of a step counts."""
    path = folder / "log.jsonl"
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise SystemExit(f"{path}: line {number} is not whole, as when a run is killed while "
                             "it writes. Remove this line.")
        rows[row["step"]] = row
    if not rows:
        raise SystemExit(f"{path} is empty: the run has not logged anything yet.")
    return [rows[step] for step in sorted(rows)]


def positions(folder, rows, x):
    """Where the rows of a run lie on the horizontal axis -> (rows,)"""
    steps = np.array([row["step"] for row in rows])
    if x == "epoch":
        epoch = rows[0]["epoch"]  # the first in the log
        last_step = max(row["step"] for row in rows if row["epoch"] == epoch)
        return steps * epoch / last_step
    if "total_batch" not in read_settings(folder):
        raise SystemExit(f"{folder / 'args.json'} should give total_batch, the pictures of a step, "
                         "but does not. Without it draw --x epoch.")
    if not all("tflops" in row and "img_s" in row for row in rows):
        raise SystemExit(f"{folder / 'log.jsonl'} has no tflops: only pretrain.py logs them. Draw "
                         "--x epoch.")
    cost = np.array([row["tflops"] / row["img_s"] for row in rows])  # TFLOP an image
    images = np.diff(steps, prepend=0) * read_settings(folder)["total_batch"]
    return np.cumsum(cost * images)


def find_runs(word):
    """A folder or a pattern -> the folders of one curve, which differ in the seed alone."""
    folders = [Path(word)] if Path(word).is_dir() else sorted(map(Path, glob.glob(word)))
    if not folders:
        raise SystemExit(f"{word}: there is no such folder. Give a run's folder (--output-dir), or "
                         "a pattern in quotes.")
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            raise SystemExit(f"{folder} has no log.jsonl, so it is no run. Give other folders, or "
                             'a narrower pattern, such as "runs/fixed_[012]".')
    recipes = []
    for folder in folders:
        settings = read_settings(folder)
        recipes.append({k: v for k, v in settings.items() if k not in NOT_THE_RECIPE})
    for folder, recipe in zip(folders, recipes):
        flags = sorted(k for k in {*recipe, *recipes[0]} if recipe.get(k) != recipes[0].get(k))
        if flags:
            raise SystemExit(f"{folders[0]} and {folder} differ in {', '.join(flags)}, so they "
                             "have no mean. Give them as words of their own.")
    return folders


def curve(runs, key):
    """runs: (positions, rows) of each run -> x (n,), values (runs, n) at the steps that all have"""
    tables = []
    for xs, rows in runs:
        tables.append({row["step"]: (x, row[key]) for x, row in zip(xs, rows) if key in row})
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    points = np.array([[table[step] for step in steps] for table in tables])
    points = points.reshape(len(tables), len(steps), 2)
    return points[:, :, 0].mean(axis=0), points[:, :, 1]


def main():
    args = get_args()
    _, axes = plt.subplots(1, len(args.keys), figsize=(5 * len(args.keys), 4), squeeze=False)
    drawn = set()
    for word in args.runs:
        folders = find_runs(word)
        runs = []
        for folder in folders:
            rows = read_log(folder)
            runs.append((positions(folder, rows, args.x), rows))
        ends = [rows[-1]["step"] for _, rows in runs]
        if min(ends) < max(ends):
            print(f"{folders[ends.index(min(ends))]} ends at step {min(ends)}, others at "
                  f"{max(ends)}: the mean ends there.")
        text = f"{word}: {len(runs)} run(s)"
        for axis, key in zip(axes[0], args.keys):
            x, values = curve(runs, key)  # (n,), (runs, n)
            if len(x) == 0:
                print(f"{word}: {key} is not in all of its logs: not drawn.")
                continue
            drawn.add(key)
            mean = values.mean(axis=0)
            line, = axis.plot(x, mean, label=word)
            text += f", {key} {mean[-1]:.3f}"
            if len(runs) > 1:
                std = values.std(axis=0, ddof=1)
                axis.fill_between(x, mean - std, mean + std, alpha=0.3, color=line.get_color())
                text += f" ± {std[-1]:.3f}"
            text += f" at {args.x} {x[-1]:.4g}"
        print(text)
    if not drawn:
        raise SystemExit(f"No run has logged any of {', '.join(args.keys)}. Give other --keys.")
    for axis, key in zip(axes[0], args.keys):
        axis.set(xlabel=LABELS[args.x], ylabel=LABELS.get(key, key))
        axis.set_visible(key in drawn)
    axes[0][[key in drawn for key in args.keys].index(True)].legend()
    plt.tight_layout()
    plt.savefig(args.out, dpi=80)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
