"""The paper's numbers, as data and pure functions of progress (DailyMAE, arXiv 2404.00509).

    python schedules.py                                              # the schemes and their FLOPs
    python schedules.py --tflops 434 --gpus 1 --epochs 800 --hours 24   # hours; what fits in 24

It prints a line for each scheme. Then it prints the paper's equations 1 to 3 for each stage:
    perceptual ratio          the mean side of a crop, as a share of the picture's side
    apparent size             pixels that the whole picture would have, enlarged as the crop is
    masked perceptual ratio   the mask ratio, times the patch's side, over the image's side
The line of the lean scheme:
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
    share: float  # of the epochs; a scheme's shares sum to 1
    scale: tuple = PRETRAIN["scale"]  # smallest and largest share of the area that a crop takes
    decoder_depth: int | None = None  # the stage uses the decoder's first blocks; None: all


class FinetuneStage(NamedTuple):
    """A stage of finetuning. sigma is the crop's side as a share of the picture's."""
    res: int  # pixels, for --input-size 224
    share: float  # of the epochs; a scheme's shares sum to 1
    aug: str = "3aug"  # "3aug+" adds colour jitter
    sigma_min: float = math.sqrt(0.08)  # printed 0.28: RandomResizedCrop's usual scale (0.08, 1)
    sigma_max: float = 1.0


# --- Table 10: pretraining, resolution and mask ratio of each stage. The paper does not print the
# shares of the epochs: they are inferred from its published command and Table 11's run times.
PRETRAIN_SCHEMES = {
    "fixed": (Stage(224, 0.75, 0.25), Stage(224, 0.75, 0.25), Stage(224, 0.75, 0.50)),
    "s1": (Stage(160, 0.50, 0.25), Stage(192, 0.66, 0.25), Stage(224, 0.75, 0.50)),
    "s2": (Stage(160, 0.75, 0.25), Stage(192, 0.75, 0.25), Stage(224, 0.75, 0.50)),
    "s3": (Stage(224, 0.75, 0.25), Stage(192, 0.75, 0.25), Stage(160, 0.75, 0.50)),
    "s4": (Stage(160, 0.75, 0.25), Stage(192, 0.80, 0.25), Stage(224, 0.85, 0.50)),
    # The palindrome, the paper's choice
    "s5": (Stage(224, 0.75, 0.25), Stage(192, 0.75, 0.25), Stage(224, 0.75, 0.50)),
    "s6": (Stage(224, 0.75, 0.25), Stage(192, 0.75, 0.25), Stage(224, 0.85, 0.50)),
    # Not the paper's: a high mask ratio, to be used with --decoder-depth 2 --epochs 100
    "lean": (Stage(224, 0.90, 0.25), Stage(192, 0.90, 0.25), Stage(224, 0.90, 0.50)),
}

# --- Table 8: finetuning, resolution, augmentation and largest crop of each stage
FINETUNE_SCHEMES = {
    "fixed": (FinetuneStage(224, 0.30), FinetuneStage(224, 0.30), FinetuneStage(224, 0.40)),
    "s1": (FinetuneStage(160, 0.30), FinetuneStage(192, 0.30), FinetuneStage(224, 0.40, "3aug+")),
    "s1-": (FinetuneStage(160, 0.30), FinetuneStage(192, 0.30), FinetuneStage(224, 0.40)),
    "s1+": (FinetuneStage(160, 0.30, "3aug+"), FinetuneStage(192, 0.30, "3aug+"),
            FinetuneStage(224, 0.40, "3aug+")),
    "s3": (FinetuneStage(160, 0.30, sigma_max=0.68), FinetuneStage(192, 0.30, sigma_max=0.84),
           FinetuneStage(224, 0.40, "3aug+")),
}


# --- functions of progress
def stage_starts(epochs, scheme):
    """The first epoch of each stage: s5 in 800 epochs -> [0, 200, 400]. ValueError for shares that
    do not sum to 1."""
    shares = [stage.share for stage in scheme]
    if abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise ValueError(f"the stages' shares of the epochs are {shares}: they should sum to 1.")
    return [round(epochs * sum(shares[:i])) for i in range(len(shares))]


def unused_stages(epochs, scheme):
    """The numbers, from 1, of stages that have a share of the epochs but get no epoch."""
    starts = stage_starts(epochs, scheme)
    ends = [*starts[1:], epochs]
    unused = []
    for number, (stage, start, end) in enumerate(zip(scheme, starts, ends), start=1):
        if stage.share > 0 and start >= end:
            unused.append(number)
    return unused


def stage_at(scheme, epoch, epochs, input_size=224, patch_size=16):
    """(index, stage) of the stage that an epoch belongs to; both count from 0.

    It depends on its arguments alone, so a resumed run lands in the right stage. scheme: a row of
    PRETRAIN_SCHEMES or FINETUNE_SCHEMES. At another input size than 224 the resolutions scale with
    it (5/7, 6/7, 1) and are rounded to whole patches.
    """
    starts = stage_starts(epochs, scheme)
    index = max(i for i, start in enumerate(starts) if epoch >= start)
    patches = max(1, round(scheme[index].res * input_size / 224 / patch_size))
    return index, scheme[index]._replace(res=patches * patch_size)


def lr_at(step, num_steps, warmup_steps, lr, min_lr=0.0):
    """Learning rate of a step: linear warm-up from 0, then half a cosine to min_lr at num_steps."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# --- batches
def check_batches(num_images, total_batch, batch_size, world_size, multiple=1, least=1):
    """Ends the script, and proposes flags that work, where a step is not made of whole batches.

    num_images: the images of an epoch, counting repeated ones. multiple, least: batch_size should
    be a multiple of the one (2 where mixup takes pairs) and at least the other (2 where a BatchNorm
    is trained).
    """
    batch_fits = batch_size >= max(1, least) and batch_size % multiple == 0
    step_fits = batch_fits and total_batch % (batch_size * world_size) == 0
    if step_fits and 0 < total_batch <= num_images:
        return
    if int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(1)  # rank 0 says why

    smallest_batch = math.ceil(least / multiple) * multiple
    if num_images < smallest_batch:
        raise SystemExit(f"{num_images} picture(s) are too few: a batch needs {smallest_batch}. "
                         "Give more pictures.")
    processes = ""
    if num_images < smallest_batch * world_size:
        world_size_that_fits = num_images // smallest_batch
        processes = (f"{world_size_that_fits} process(es) in all, as by torchrun --nproc_per_node "
                     f"{world_size_that_fits}, with ")
    else:
        world_size_that_fits = world_size
    batch = min(batch_size, total_batch // world_size_that_fits, num_images // world_size_that_fits)
    batch = max(smallest_batch, batch // multiple * multiple)
    images_at_once = batch * world_size_that_fits
    batches = max(1, min(total_batch, num_images) // images_at_once)
    raise SystemExit(
        f"--total-batch {total_batch} should be a multiple of --batch-size {batch_size} x "
        f"{world_size} process(es), and at most {num_images:,}, the number of pictures (x "
        f"--repeat); --batch-size a multiple of {multiple}, at least {least}. This works: "
        f"{processes}--total-batch {batches * images_at_once} --batch-size {batch}")


# --- equations 1 to 3, for RandomResizedCrop: the crop's area is uniform between low^2 and high^2,
# so its side, as a share of the picture's, lies between low and high
def perceptual_ratio(low, high):
    """E[sigma], equation 1. Table 8 prints 0.47 for (0.28, 1): 2/3 of what its formula gives."""
    if low == high:
        return high
    return 2 / 3 * (high ** 3 - low ** 3) / (high ** 2 - low ** 2)


def apparent_size(resolution, low, high):
    """resolution / E[sigma] in pixels, equation 2: the whole picture's size at the crop's zoom.

    Table 8 prints 151/181/211 for s1; the formula gives 226/271/317 (again the factor 2/3). The
    exact E[resolution / sigma] is 2 * resolution / (low + high).
    """
    return resolution / perceptual_ratio(low, high)


def masked_perceptual_ratio(resolution, mask_ratio, patch_size=16):
    """E[m p / h], equation 3: mask ratio times the patch's side over the image's side."""
    return mask_ratio * patch_size / resolution


# --- the command
def print_schemes(args):
    """A line for each scheme of pretraining: its stages, FLOPs and, with --tflops, hours."""
    from models_mae import flops_per_image
    gflop = {}
    for name, scheme in PRETRAIN_SCHEMES.items():
        gflop[name] = 0
        for stage in scheme:
            depth = stage.decoder_depth or args.decoder_depth
            flops = flops_per_image(stage.res, stage.mask_ratio, args.decoder_keep,
                                    decoder_depth=depth)
            gflop[name] += stage.share * flops / 1e9
    print(f"MAE-B/16, {args.decoder_depth} decoder blocks: resolution and mask ratio of each stage")
    for name, scheme in PRETRAIN_SCHEMES.items():
        line = f"{name:6}  " + "  ".join(f"{stage.res} {stage.mask_ratio:.2f}" for stage in scheme)
        line += f"  {gflop[name]:7.1f} GFLOP an image,  {gflop[name] / gflop['fixed']:.2f} x fixed"
        if args.tflops:
            epoch_hours = gflop[name] * args.images * args.repeat / args.tflops / args.gpus / 3.6e6
            hours = epoch_hours * args.epochs
            verdict = "within" if hours <= args.hours else "over"
            line += f"  {hours:7.2f} h, {verdict} {args.hours:g} h, "
            line += f"enough for {int(args.hours / epoch_hours)} epochs"
        print(line)


def print_equations():
    """What equations 1 to 3 give for each stage of pretraining and finetuning."""
    print("\nstage of pretraining    perceptual ratio  apparent size  masked perceptual ratio")
    for name, scheme in PRETRAIN_SCHEMES.items():
        for stage in scheme:
            low = math.sqrt(stage.scale[0])
            high = math.sqrt(stage.scale[1])
            ratio = perceptual_ratio(low, high)
            size = apparent_size(stage.res, low, high)
            masked_ratio = masked_perceptual_ratio(stage.res, stage.mask_ratio)
            print(f"{name:6} {stage.res:3} {stage.mask_ratio:.2f} {ratio:26.2f}{size:15.0f}"
                  f"{masked_ratio:25.4f}")
    print("\nstage of finetuning     perceptual ratio  apparent size")
    for name, scheme in FINETUNE_SCHEMES.items():
        for stage in scheme:
            ratio = perceptual_ratio(stage.sigma_min, stage.sigma_max)
            size = apparent_size(stage.res, stage.sigma_min, stage.sigma_max)
            print(f"{name:6} {stage.res:3} {stage.aug:5} {ratio:25.2f}{size:15.0f}")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tflops", type=float, help="TFLOP/s of one GPU, as pretrain.py reports them")
    p.add_argument("--gpus", type=int, default=1, help="number of GPUs; linear scaling is assumed")
    p.add_argument("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    p.add_argument("--hours", type=float, default=24, help="hours that a run may take")
    p.add_argument("--images", type=int, default=IMAGENET, help="number of pictures in an epoch")
    p.add_argument("--decoder-depth", type=int, default=8, help="decoder blocks; 8 is the paper's")
    p.add_argument("--decoder-keep", type=float, default=1,
                   help="share of the masked patches that is decoded")
    p.add_argument("--repeat", type=int, default=1, help="masks of each loaded picture in a step")
    args = p.parse_args()
    print_schemes(args)
    print_equations()


if __name__ == "__main__":
    main()
