"""Shows whether the matrices of a model lose rank during training, and whether MLP units die.

    python extras/spectra.py runs/pretrain/*.pt --data data/val_500_100.beton

Prints a line of JSON for each checkpoint. For each kind of matrix in the blocks of the encoder and
of the decoder it has two means over the blocks: the stable rank, ||W||_F^2 / ||W||_2^2, and the
share of the largest singular value in the sum of all. For the MLPs it has the share of dead units:
their output (GELU's) stays below 0.01 in size for all tokens of --pictures whole pictures. A line:
    {"checkpoint": "runs/demo/last.pt", "encoder qkv": [21.3, 0.031], ..., "encoder dead": 0.0, ...}
"""
import argparse
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
    p.add_argument("--pictures", type=int, default=256, help="how many pictures of it")
    args = p.parse_args(argv)
    for path in args.checkpoints:
        mae = load_mae(path)
        loader = open_loader(args.data, args.pictures, train=False, res=mae.settings["img_size"])
        images, _ = next(iter(loader))
        parts = {"encoder": mae.blocks, "decoder": mae.decoder_blocks}
        outputs = {name: largest_outputs(blocks) for name, blocks in parts.items()}
        mae(images, mask_ratio=0.0)
        row = {"checkpoint": path}
        for name, blocks in parts.items():
            for kind in KINDS:
                row[f"{name} {kind.split('.')[1]}"] = measure_matrices(blocks, kind)
            row[f"{name} dead"] = (torch.cat(outputs[name]) < DEAD).float().mean().item()
        print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1:])
