"""The paper's numbers, as data and pure functions of progress (DailyMAE, arXiv 2404.00509).

`python schedules.py` prints the pretraining schemes with each one's cost in FLOPs relative to the fixed recipe.
"""
import math

# --- Table 1: the recipes. lr = blr * total_batch / 256
PRETRAIN = dict(total_batch=4096, blr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, epochs=800, warmup_epochs=40,
                scale=(0.2, 1.0))
FINETUNE = dict(total_batch=1024, blr=5e-4, betas=(0.9, 0.999), weight_decay=0.05, epochs=100, warmup_epochs=5,
                layer_decay=0.65)

# --- Table 10: pretraining, (resolution, mask ratio) of the three stages
PRETRAIN_SCHEMES = {
    "fixed": ((224, 0.75), (224, 0.75), (224, 0.75)),
    "s1": ((160, 0.50), (192, 0.66), (224, 0.75)),
    "s2": ((160, 0.75), (192, 0.75), (224, 0.75)),
    "s3": ((224, 0.75), (192, 0.75), (160, 0.75)),
    "s4": ((160, 0.75), (192, 0.80), (224, 0.85)),
    "s5": ((224, 0.75), (192, 0.75), (224, 0.75)),  # the palindrome, the paper's choice
    "s6": ((224, 0.75), (192, 0.75), (224, 0.85)),
}
# Shares of the epochs. The paper does not print them: inferred from its published command and Table 11's run times.
PRETRAIN_STAGES = (0.25, 0.25, 0.50)

# --- Table 8: finetuning, (resolution, augmentation, sigma_min, sigma_max); sigma is the crop's side ratio
LOW = math.sqrt(0.08)  # printed 0.28: RandomResizedCrop's usual scale (0.08, 1)
FINETUNE_SCHEMES = {
    "fixed": ((224, "3aug", LOW, 1.0), (224, "3aug", LOW, 1.0), (224, "3aug", LOW, 1.0)),
    "s1": ((160, "3aug", LOW, 1.0), (192, "3aug", LOW, 1.0), (224, "3aug+", LOW, 1.0)),
    "s1-": ((160, "3aug", LOW, 1.0), (192, "3aug", LOW, 1.0), (224, "3aug", LOW, 1.0)),
    "s1+": ((160, "3aug+", LOW, 1.0), (192, "3aug+", LOW, 1.0), (224, "3aug+", LOW, 1.0)),
    "s3": ((160, "3aug", LOW, 0.68), (192, "3aug", LOW, 0.84), (224, "3aug+", LOW, 1.0)),
}
FINETUNE_STAGES = (0.30, 0.30, 0.40)


# --- functions of progress
def stage_starts(epochs, stages):
    """First epoch of each stage for shares that sum to 1; 800 epochs at 25/25/50 % -> [0, 200, 400]."""
    if abs(sum(stages) - 1) > 1e-6 or min(stages) < 0:
        raise ValueError(f"stages {tuple(stages)}: expected shares that sum to 1")
    return [round(epochs * sum(stages[:i])) for i in range(len(stages))]


def stage_at(scheme, epoch, epochs, stages, input_size=224, patch_size=16):
    """(stage index, its tuple) at an epoch: a resumed run lands in the right stage because nothing is remembered.

    scheme: a row of PRETRAIN_SCHEMES or FINETUNE_SCHEMES. At another input size than 224 the resolutions scale
    with it (5/7, 6/7, 1), rounded to whole patches.
    """
    i = max(i for i, start in enumerate(stage_starts(epochs, stages)) if epoch >= start)
    resolution = scheme[i][0] * input_size / 224
    return i, (max(1, round(resolution / patch_size)) * patch_size, *scheme[i][1:])


def lr_at(step, steps, warmup_steps, lr, min_lr=0.0):
    """Learning rate of a step: linear warm-up from 0, then half a cosine to min_lr at `steps`."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# --- equations 1 to 3: RandomResizedCrop with area ~ U(low^2, high^2), so side ratio sigma in (low, high)
def perceptual_ratio(low, high):
    """E[sigma], equation 1. Table 8 prints 0.47 for (0.28, 1): two thirds of what its own formula gives, 0.71."""
    return high if low == high else 2 / 3 * (high ** 3 - low ** 3) / (high ** 2 - low ** 2)


def apparent_size(resolution, low, high):
    """resolution / E[sigma] in pixels, equation 2: how large the whole picture would appear at the crop's zoom.

    Table 8 prints 151/181/211 for s1; the formula gives 226/271/317 (again the factor 2/3). The exact
    E[resolution / sigma] is 2 * resolution / (low + high).
    """
    return resolution / perceptual_ratio(low, high)


def masked_perceptual_ratio(resolution, mask_ratio, patch_size=16):
    """E[m p / h], equation 3, read as: m visible patches of side p in a row of h = resolution pixels."""
    patches = (resolution // patch_size) ** 2
    return int(round(patches * (1 - mask_ratio), 6)) / patches


def main():
    from models_mae import flops_per_image, num_kept

    def cost(scheme):
        return sum(share * flops_per_image(*stage) for stage, share in zip(scheme, PRETRAIN_STAGES))
    print("MAE-B/16, stages at " + "/".join(f"{s:.0%}" for s in PRETRAIN_STAGES) + " of the epochs: "
          "resolution, mask ratio (kept tokens)")
    for name, scheme in PRETRAIN_SCHEMES.items():
        stages = [f"{r}, {m:.2f} ({num_kept((r // 16) ** 2, m)})" for r, m in scheme]
        print(f"{name:6} {stages[0]:>16} {stages[1]:>16} {stages[2]:>16}  {cost(scheme) / 1e9:5.1f} GFLOP an image, "
              f"{cost(scheme) / cost(PRETRAIN_SCHEMES['fixed']):.2f} x fixed")


if __name__ == "__main__":
    main()
