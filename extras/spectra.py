"""Shows whether the matrices of a model lose rank during training, and whether MLP units die.

    python extras/spectra.py runs/pretrain/*.pt --data data/val_500_100.beton [--plot spectra.png]

Prints a line of JSON for each checkpoint. For each kind of matrix in the blocks of the encoder and
of the decoder it has two means over the blocks: the stable rank, ||W||_F^2 / ||W||_2^2, and the
share of the largest singular value in the sum of all. For the MLPs it has the share of dead units:
their output (GELU's) stays below 0.01 in size for all tokens of --pictures whole pictures. --plot
draws the stable ranks against the epoch, a line for each folder of checkpoints. A line of JSON:
    {"checkpoint": "runs/demo/last.pt", "epoch": 24, "encoder qkv": [21.3, 0.031], ...}
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from essl_loader import open_loader
from models_mae import load_mae

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
DEAD = 0.01


def measure_matrices(blocks, kind):
    """Mean over the blocks of a matrix's stable rank and of its top singular value's share."""
    stable_ranks = []
    top_shares = []
    for block in blocks:
        values = torch.linalg.svdvals(block.get_submodule(kind).weight.detach().float())
        stable_ranks.append((values.square().sum() / values[0] ** 2).item())
        top_shares.append((values[0] / values.sum()).item())
    return [round(sum(stable_ranks) / len(blocks), 2), round(sum(top_shares) / len(blocks), 4)]


def largest_outputs(blocks):
    """A list that fills up with the largest output of each MLP unit, (units,), block by block."""
    found = []

    def keep(module, args, output):
        found.append(output.detach().abs().amax(dim=(0, 1)))

    for block in blocks:
        block.mlp.act.register_forward_hook(keep)
    return found


@torch.no_grad()
def main(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", help="checkpoints of pretrain.py, or official files")
    p.add_argument("--data", required=True, help=".beton or folder for the MLP units")
    p.add_argument("--pictures", type=int, default=256, help="number of pictures from --data")
    p.add_argument("--plot", metavar="FILE.png", help="draw the stable ranks to this file")
    args = p.parse_args(argv)
    rows = []
    for path in args.checkpoints:
        mae = load_mae(path)
        loader = open_loader(args.data, args.pictures, train=False, res=mae.settings["img_size"])
        images, _ = next(iter(loader))
        parts = {"encoder": mae.blocks, "decoder": mae.decoder_blocks}
        outputs = {name: largest_outputs(blocks) for name, blocks in parts.items()}
        mae(images, mask_ratio=0.0)
        epoch = torch.load(path, map_location="cpu", weights_only=True).get("epoch", 0)
        row = {"checkpoint": path, "epoch": epoch}
        for name, blocks in parts.items():
            for kind in KINDS:
                row[f"{name} {kind.split('.')[1]}"] = measure_matrices(blocks, kind)
            row[f"{name} dead"] = (torch.cat(outputs[name]) < DEAD).float().mean().item()
        print(json.dumps(row))
        rows.append(row)
    if args.plot:
        draw_stable_ranks(rows, args.plot)


def draw_stable_ranks(rows, path):
    """A panel for each kind of matrix, a line for each folder of checkpoints."""
    import matplotlib.pyplot as plt
    _, axes = plt.subplots(2, len(KINDS), figsize=(14, 6), sharex=True, sharey=True)
    folders = dict.fromkeys(Path(row["checkpoint"]).parent for row in rows)  # each once, in order
    for panel, (part, kind) in zip(axes.flat, itertools.product(("encoder", "decoder"), KINDS)):
        name = f"{part} {kind.split('.')[1]}"
        for folder in folders:
            own = [row for row in rows if Path(row["checkpoint"]).parent == folder]
            own.sort(key=lambda row: row["epoch"])
            panel.plot([row["epoch"] for row in own], [row[name][0] for row in own],
                       label=folder.name)
        panel.set_title(name)
    axes[0, 0].set_ylabel("stable rank")
    axes[1, 0].set_ylabel("stable rank")
    axes[1, 0].set_xlabel("epoch")
    axes[0, 0].legend()
    plt.tight_layout()
    plt.savefig(path, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1:])
