"""Measures what single patch tokens know: kNN of patches on drawn shapes, whose masks are exact.

    python extras/dense_knn.py runs/pretrain/*.pt      # checkpoints of pretraining

Each picture has a triangle, a disc and a third shape on shaded ground, of any colour and place.
Triangles have the areas of discs. So a patch alone does not tell which shape it is a part of. A
patch has the class of most of its pixels. The patches of 200 pictures vote for those of 200 others,
as in linprobe.py --knn. A line for each checkpoint has the intersection over union in percent, the
mean of the classes and each one (nan: the patches are too large, none has this class):
    runs/pretrain/last.pt: mean IoU 72.7 (ground 96.7, triangle 52.7, disc 68.8)
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from linprobe import knn_score
from models_mae import WeightsError, load_mae

# Class -> sides of its polygon, and the radius that gives equal areas. Ground is class 0
SHAPES = {1: (3, 1.555), 2: (60, 1.0)}  # triangle, disc


def draw_scene(seed, size):
    """-> a picture, uint8 (3, size, size), and the class of each pixel, (size, size)."""
    rng = np.random.default_rng(seed)
    side = 4 * size  # reduced at the end, for smooth edges
    dark, light = rng.integers((30, 140), (100, 220), (3, 2)).T.tolist()
    shade = Image.linear_gradient("L").rotate(90 * rng.integers(4)).resize((side, side))
    picture = ImageOps.colorize(shade, dark, light)
    mask = Image.new("L", (side, side))
    for label, quarter in zip((1, 2, int(rng.integers(1, 3))), rng.permutation(4)):
        sides, unit = SHAPES[label]
        radius = side * rng.uniform(0.09, 0.155) * unit
        x, y = side * (0.25 + 0.5 * np.array(divmod(quarter, 2)))
        polygon = ((x, y, radius), sides, rng.uniform(0, 360))
        ImageDraw.Draw(picture).regular_polygon(*polygon, tuple(rng.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(mask).regular_polygon(*polygon, label)
    return pil_to_tensor(picture.reduce(4)), pil_to_tensor(mask)[0, 2::4, 2::4].long()


@torch.no_grad()
def patches_of(mae, seeds):
    """The patches of drawn pictures: tokens of length 1, (patches, D), and classes (patches,)."""
    scenes = [draw_scene(seed, mae.settings["img_size"]) for seed in seeds]
    images, masks = map(torch.stack, zip(*scenes))
    tokens = torch.cat([mae.tokens(batch).movedim(1, 3) for batch in images.split(50)])
    shares = F.avg_pool2d(F.one_hot(masks, 3).movedim(3, 1).float(), mae.patch_size)
    return F.normalize(tokens.flatten(0, 2), dim=1), shares.argmax(dim=1).flatten()


def class_ious(mae, pictures=200):
    """Intersection over union of ground, triangle and disc, (3,)."""
    bank, bank_classes = patches_of(mae, range(pictures))
    queries, truth = patches_of(mae, range(pictures, 2 * pictures))
    votes = torch.cat([knn_score(part, bank, bank_classes, 3) for part in queries.split(512)])
    counts = torch.bincount(3 * truth + votes.argmax(dim=1), minlength=9).view(3, 3)
    return counts.diag() / (counts.sum(dim=0) + counts.sum(dim=1) - counts.diag())


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    for path in sys.argv[1:]:
        try:
            ious = 100 * class_ious(load_mae(path))
        except WeightsError as e:
            raise SystemExit(f"dense_knn: {e}")
        print(f"{path}: mean IoU {ious.mean():.1f} (ground {ious[0]:.1f}, triangle {ious[1]:.1f}, "
              f"disc {ious[2]:.1f})")
