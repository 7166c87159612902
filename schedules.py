"""The paper's numbers, as data and pure functions of progress (DailyMAE, arXiv 2404.00509).

    python schedules.py                                              # the schemes and their FLOPs
    python schedules.py --tflops 434 --gpus 1 --epochs 800 --hours 24   # hours of each, what fits

The last line is that of the lean scheme:
    lean    224 0.90  192 0.90  224 0.90     39.6 GFLOP an image,  0.68 x fixed
"""
import argparse
import math
import os
from typing import NamedTuple

IMAGENET = 1_281_167  # training pictures of ImageNet-1k

# --- Table 1: the recipes. lr = blr * total_batch / 256
PRETRAIN = dict(total_batch=4096, blr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, epochs=800,
                warmup_epochs=40, scale=(0.2, 1.0))
FINETUNE = dict(total_batch=1024, blr=5e-4, betas=(0.9, 0.999), weight_decay=0.05, epochs=100,
                warmup_epochs=5, layer_decay=0.65)


class Stage(NamedTuple):
    """A stage of pretraining."""
    res: int  # pixels, for --input-size 224
    mask_ratio: float
    scale: tuple = PRETRAIN["scale"]  # of random crops: least and largest share of the area
    decoder_depth: int | None = None  # the decoder's first blocks, this many; None: all


class FinetuneStage(NamedTuple):
    """A stage of finetuning. sigma is the crop's side as a share of the picture's."""
    res: int  # pixels, for --input-size 224
    aug: str = "3aug"  # "3aug+" adds colour jitter
    sigma_min: float = math.sqrt(0.08)  # printed 0.28: RandomResizedCrop's usual scale (0.08, 1)
    sigma_max: float = 1.0


# --- Table 10: pretraining, resolution and mask ratio of each stage
PRETRAIN_SCHEMES = {
    "fixed": (Stage(224, 0.75), Stage(224, 0.75), Stage(224, 0.75)),
    "s1": (Stage(160, 0.50), Stage(192, 0.66), Stage(224, 0.75)),
    "s2": (Stage(160, 0.75), Stage(192, 0.75), Stage(224, 0.75)),
    "s3": (Stage(224, 0.75), Stage(192, 0.75), Stage(160, 0.75)),
    "s4": (Stage(160, 0.75), Stage(192, 0.80), Stage(224, 0.85)),
    "s5": (Stage(224, 0.75), Stage(192, 0.75), Stage(224, 0.75)),  # the palindrome, the paper's
    "s6": (Stage(224, 0.75), Stage(192, 0.75), Stage(224, 0.85)),
    # Not the paper's: a high mask ratio, to be used with --decoder-depth 2 --epochs 100
    "lean": (Stage(224, 0.90), Stage(192, 0.90), Stage(224, 0.90)),
}
# Shares of the epochs. The paper does not print them: inferred from its published command and
# from Table 11's run times. Other shares, or not three stages: a row in PRETRAIN_SHARES.
PRETRAIN_STAGES = (0.25, 0.25, 0.50)
PRETRAIN_SHARES = {}

# --- Table 8: finetuning, resolution, augmentation and largest crop of each stage
FINETUNE_SCHEMES = {
    "fixed": (FinetuneStage(224), FinetuneStage(224), FinetuneStage(224)),
    "s1": (FinetuneStage(160), FinetuneStage(192), FinetuneStage(224, "3aug+")),
    "s1-": (FinetuneStage(160), FinetuneStage(192), FinetuneStage(224)),
    "s1+": (FinetuneStage(160, "3aug+"), FinetuneStage(192, "3aug+"), FinetuneStage(224, "3aug+")),
    "s3": (FinetuneStage(160, sigma_max=0.68), FinetuneStage(192, sigma_max=0.84),
           FinetuneStage(224, "3aug+")),
}
FINETUNE_STAGES = (0.30, 0.30, 0.40)


# --- functions of progress
def stage_starts(epochs, shares):
    """First epoch of each stage; 800 epochs at (0.25, 0.25, 0.5) -> [0, 200, 400]. ValueError."""
    if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(f"stages {tuple(shares)}: expected shares that sum to 1.")
    return [round(epochs * sum(shares[:i])) for i in range(len(shares))]


def unused_stages(epochs, shares):
    """The numbers, from 1, of stages that have a share of the epochs but get no epoch."""
    ends = [*stage_starts(epochs, shares), epochs][1:]
    starts = stage_starts(epochs, shares)
    return [i for i, share in enumerate(shares, start=1)
            if share > 0 and starts[i - 1] >= ends[i - 1]]


def stage_at(scheme, epoch, epochs, shares, input_size=224, patch_size=16):
    """(stage index, the stage) at an epoch, from 0. Pure: a resumed run lands in the right stage.

    scheme: the Stages of a row of PRETRAIN_SCHEMES, or of FINETUNE_SCHEMES. At another input size
    than 224 the resolutions scale with it (5/7, 6/7, 1), rounded to whole patches. Raises
    ValueError where the shares are not as many as the stages.
    """
    if len(shares) != len(scheme):
        raise ValueError(f"{len(shares)} stage shares for a scheme of {len(scheme)} stages: "
                         "give as many, with --stages or in PRETRAIN_SHARES.")
    starts = stage_starts(epochs, shares)
    index = max(i for i, start in enumerate(starts) if epoch >= start)
    patches = round(scheme[index].res * input_size / 224 / patch_size)
    return index, scheme[index]._replace(res=max(1, patches) * patch_size)


def lr_at(step, steps, warmup_steps, lr, min_lr=0.0):
    """Learning rate of a step: linear warm-up from 0, then half a cosine to min_lr at `steps`."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# --- batches
def check_batches(num_samples, total_batch, batch_size, world_size, multiple=1, least=1):
    """Ends the script with flags that work, where a step is not made of whole batches of all ranks.

    num_samples: how often pictures are used in an epoch. batch_size: a multiple of `multiple`, and
    at least `least` (2 where a BatchNorm is trained).
    """
    if min(total_batch, batch_size) > 0 and batch_size % multiple == 0 and batch_size >= least:
        if total_batch % (batch_size * world_size) == 0 and total_batch <= num_samples:
            return
    if int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(1)  # rank 0 says it
    smallest = math.ceil(least / multiple) * multiple  # batch
    if num_samples < smallest:
        raise SystemExit(f"{num_samples} picture(s) are too few: a batch needs {smallest}. Give "
                         "more pictures.")
    world = min(world_size, num_samples // smallest)
    processes = ""
    if world < world_size:
        processes = f"{world} process(es) in all, as by torchrun --nproc_per_node {world}, with "
    batch = min(batch_size, total_batch // world, num_samples // world)
    batch = max(smallest, batch // multiple * multiple)
    total = max(1, min(total_batch, num_samples) // (batch * world)) * batch * world
    raise SystemExit(
        f"--total-batch {total_batch} should be a multiple of --batch-size {batch_size} x "
        f"{world_size} process(es), and at most {num_samples:,}, the number of pictures (x "
        f"--repeat); --batch-size a multiple of {multiple}, at least {least}. This works: "
        f"{processes}--total-batch {total} --batch-size {batch}")


# --- equations 1 to 3: RandomResizedCrop with area ~ U(low^2, high^2), so side ratio in (low, high)
def perceptual_ratio(low, high):
    """E[sigma], equation 1. Table 8 prints 0.47 for (0.28, 1): 2/3 of what its formula gives."""
    return high if low == high else 2 / 3 * (high ** 3 - low ** 3) / (high ** 2 - low ** 2)


def apparent_size(resolution, low, high):
    """resolution / E[sigma] in pixels, equation 2: the whole picture's size at the crop's zoom.

    Table 8 prints 151/181/211 for s1; the formula gives 226/271/317 (again the factor 2/3). The
    exact E[resolution / sigma] is 2 * resolution / (low + high).
    """
    return resolution / perceptual_ratio(low, high)


def masked_perceptual_ratio(resolution, mask_ratio, patch_size=16):
    """E[m p / h], equation 3, read as: m visible patches of side p in a row of h pixels."""
    patches = (resolution // patch_size) ** 2
    return int(round(patches * (1 - mask_ratio), 6)) / patches


def main():
    from models_mae import flops_per_image
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tflops", type=float, help="TFLOP/s of one GPU, as pretrain.py reports them")
    p.add_argument("--gpus", type=int, default=1, help="GPUs; scaling is taken as linear")
    p.add_argument("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    p.add_argument("--hours", type=float, default=24, help="the budget")
    p.add_argument("--images", type=int, default=IMAGENET, help="pictures of an epoch")
    p.add_argument("--decoder-depth", type=int, default=8, help="decoder blocks; 8 is the paper's")
    p.add_argument("--decoder-keep", type=float, default=1, help="share of removed patches decoded")
    p.add_argument("--repeat", type=int, default=1, help="masks of each loaded picture in a step")
    args = p.parse_args()
    gflop = {}
    schemes = {name: [Stage(*row) for row in rows] for name, rows in PRETRAIN_SCHEMES.items()}
    for name, scheme in schemes.items():
        shares = PRETRAIN_SHARES.get(name, PRETRAIN_STAGES)
        costs = []
        for stage in scheme:
            depth = stage.decoder_depth or args.decoder_depth
            costs.append(flops_per_image(stage.res, stage.mask_ratio, args.decoder_keep,
                                         decoder_depth=depth))
        gflop[name] = sum(share * cost for share, cost in zip(shares, costs, strict=True)) / 1e9
    print(f"MAE-B/16, {args.decoder_depth} decoder blocks: resolution and mask ratio of each stage")
    for name, scheme in schemes.items():
        line = f"{name:6}  " + "  ".join(f"{stage.res} {stage.mask_ratio:.2f}" for stage in scheme)
        line += f"  {gflop[name]:7.1f} GFLOP an image,  {gflop[name] / gflop['fixed']:.2f} x fixed"
        if args.tflops:
            epoch_hours = gflop[name] * args.images * args.repeat / args.tflops / args.gpus / 3.6e6
            hours = epoch_hours * args.epochs
            line += f"  {hours:7.2f} h, {'within' if hours <= args.hours else 'over'} "
            line += f"{args.hours:g} h, enough for {int(args.hours / epoch_hours)} epochs"
        print(line)


if __name__ == "__main__":
    main()
