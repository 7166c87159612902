"""Finetunes and evaluates the encoder of a masked autoencoder, with the paper's progressive schemes.

    torchrun --nproc_per_node 8 finetune.py --finetune runs/pretrain/last.pt --scheme s1  # ImageNet-1k, the paper's run
    python finetune.py --eval --resume runs/finetune/best.pt --val-data data/val_500_100.beton data/val_256_90.beton

A run's folder holds args.json, log.jsonl, TensorBoard events, last.pt, previous.pt and best.pt. Run the same command
again and it goes on where it stopped. The last line is the result:
    done: 10 epochs, top-1 96.00 %, top-5 100.00 % of 200 pictures (best 96.50 %), 0:01:12 h, runs/finetune/last.pt
"""
import argparse
import errno
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from essl_loader import DataError, ESSLLoader, open_loader
from models_mae import (VIT_SIZES, ViT, WeightsError, find_checkpoint, load_encoder, read_weights, save_checkpoint,
                        vit_settings)
from schedules import FINETUNE, FINETUNE_SCHEMES, FINETUNE_STAGES, lr_at, stage_at

MIN_LR = 1e-6
RAND_AUG = "rand-m9-mstd0.5-inc1", {"magnitude_max": 9.99}  # at 10 it posterizes to 0 bits, which Pillow 13 refuses


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--finetune", help="start from this checkpoint (ours, official MAE, timm, Hugging Face), or none")
    p.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume, on every --val-data")
    p.add_argument("--data", default="data/train_500_95.beton", help="training set: a .beton file or class folders")
    p.add_argument("--val-data", nargs="+", default=["data/val_500_100.beton"], help="held-out; several with --eval")
    p.add_argument("--output-dir", default="runs/finetune", help="the run's folder")
    p.add_argument("--model", choices=VIT_SIZES, help="absent: as the checkpoint; else vit_base_patch16")
    p.add_argument("--input-size", type=int, help="full resolution; absent: the checkpoint's; from scratch 224")
    p.add_argument("--scheme", default="s1", choices=FINETUNE_SCHEMES, help="resolution, crop and 3 Aug by stage")
    p.add_argument("--aug", default="3aug", choices=("3aug", "rand"), help="3 Aug by scheme; RandAug for folders")
    p.add_argument("--epochs", type=int, default=FINETUNE["epochs"], help="passes over the data")
    p.add_argument("--warmup-epochs", type=float, default=FINETUNE["warmup_epochs"], help="linear warm-up of the rate")
    p.add_argument("--blr", type=float, default=FINETUNE["blr"], help="learning rate for 256 images a step")
    p.add_argument("--layer-decay", type=float, default=FINETUNE["layer_decay"], help="of the rate, block by block")
    p.add_argument("--weight-decay", type=float, default=FINETUNE["weight_decay"], help="AdamW's, for matrices")
    p.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth at the last block, rising from 0")
    p.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup; 0: none")
    p.add_argument("--cutmix", type=float, default=1.0, help="alpha of CutMix, which alternates with mixup; 0: none")
    p.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    p.add_argument("--reprob", type=float, default=0.25, help="share of pictures with a random rectangle erased")
    p.add_argument("--total-batch", type=int, default=FINETUNE["total_batch"], help="images a step, over all GPUs")
    p.add_argument("--batch-size", type=int, default=128, help="images at once on one GPU; the rest by accumulation")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                   help="torch.compile the training step")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, crops and augmentation")
    p.add_argument("--resume", default="auto", help="auto: go on from the run's last.pt if there; none; a checkpoint")
    p.add_argument("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    p.add_argument("--preload", action="store_true", help="read the training file into memory's page cache first")
    p.add_argument("--skip-bad", action="store_true", help="replace damaged samples and name them, do not stop")
    p.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints")
    p.add_argument("--save-minutes", type=float, default=10, help="minutes after which one is written within an epoch")
    p.add_argument("--max-bad-steps", type=int, default=20,
                   help="steps in a row left out for a loss or gradient that is not finite, before the run goes back "
                        "to the last good checkpoint; the second time it stops")
    argv = [a.split("=", 1) for a in (sys.argv[1:] if argv is None else argv)]
    argv = ["=".join([a[0].replace("_", "-") if a[0].startswith("--") else a[0], *a[1:]]) for a in argv]
    args = p.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1 or min(args.save_every, args.max_bad_steps) < 1:
        p.error("--epochs, --batch-size, --save-every and --max-bad-steps must be at least 1")
    if not args.eval and (args.finetune is None or len(args.val_data) > 1):
        p.error("training needs --finetune CHECKPOINT, or --finetune none for from scratch, and one --val-data")
    if not args.eval and args.mixup + args.cutmix > 0 and args.batch_size % 2:
        p.error(f"--mixup and --cutmix pair the pictures of a batch: --batch-size {args.batch_size} must be even")
    return args


# --- setup
def setup(seed):
    """torchrun's environment -> rank, world size, device; joins the process group, seeds torch, catches signals."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    stop, first = torch.zeros(1), []  # stop becomes 1 on the rank that was signalled; the ranks agree once a step

    def on_signal(number, frame):
        stop.fill_(1)
        first.append(time.time())
        if first[-1] - first[0] > 5:  # a shell and torchrun may both send the first
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # SIGUSR1: Slurm's --signal, ahead of the time limit
        signal.signal(s, on_signal)
    return rank, world, device, stop


def tell(text, file=None):
    """A line above the progress bar; where nobody can take it, a full disk or a closed pipe, the training goes on."""
    with suppress(OSError):
        tqdm.write(text, file=file)


def any_rank(flag):
    """Whether the flag, a one-element CPU tensor, is set on any rank."""
    flag = flag.clone()
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # over gloo: waits for no GPU
    return bool(flag.item())


def guarded_step(optimizer, loss, statistics=()):
    """optimizer.step(), left out on all ranks where loss or a gradient is not finite on one; never waits for a GPU.

    optimizer: heeds `found_inf`, as fused AdamW does. statistics: pairs (buffer, its value before the step), put back
    then. Returns 1.0 if the step was left out, else 0.0, on the device.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    bad = 1 - (loss.detach() + nn.utils.get_total_norm(grads)).isfinite().float()
    if dist.is_initialized():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    optimizer.found_inf = bad
    optimizer.step()
    for buffer, before in statistics:
        buffer.copy_(torch.where(bad > 0, before, buffer))
    optimizer.zero_grad(set_to_none=True)
    return bad


class BadSteps:
    """Counts the steps that guarded_step left out: in all, in a row up to now, the longest row since it was read."""

    def __init__(self, device):
        self.counts = torch.zeros(3, device=device)

    def add(self, bad):
        row = (self.counts[1] + 1) * bad
        self.counts = torch.stack([self.counts[0] + bad, row, torch.maximum(self.counts[2], row)])

    def read(self):
        found = [int(n) for n in self.counts.tolist()]
        self.counts[2] = self.counts[1]
        return found


class RunFolder:
    """What rank 0 writes of a run: checkpoints, log.jsonl, TensorBoard events. Where the disk refuses, it is said, the
    training goes on, the log's lines wait for the next time, and end() makes the exit code 1.

    A resumed run drops the log's lines after the step that it resumes from. Checkpoints that are not gone on from get
    other names.
    """

    def __init__(self, folder, step, source):
        from_here = source.name if source and source.resolve().parent == folder.resolve() else None
        for old in folder / "last.pt", folder / "previous.pt":
            if old.is_file() and from_here not in ("last.pt", old.name):
                os.replace(old, old.with_suffix(".old.pt"))
        self.folder, self.path, self.waiting, self.failed = folder, folder / "log.jsonl", b"", []
        lines = self.path.read_bytes().splitlines(keepends=True) if step and self.path.is_file() else []
        aside = folder / ".log.jsonl.tmp"
        aside.write_bytes(b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step))
        os.replace(aside, self.path)
        self.board = SummaryWriter(folder, purge_step=step)

    def attempt(self, what, write, *args):
        """write(*args), or False and a line about it; torch.save makes a RuntimeError of a full disk."""
        try:
            write(*args)
        except (OSError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not isinstance(e.__context__, OSError) and "container" not in str(e):
                raise  # not the disk's
            self.failed.append(what)
            e = e.__context__ if isinstance(e.__context__, OSError) else e
            tell(f"{self.folder / what} could not be written ({e}): the training goes on", sys.stderr)
            return False
        return True

    def write(self, step, **values):
        self.waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        self.attempt("log.jsonl", self._append)
        if self.board and not self.attempt("TensorBoard events", self._plot, step, values):
            self.board = None  # its writing thread has ended

    def _append(self):
        with open(self.path, "ab", buffering=0) as f:
            before = f.tell()
            if f.write(self.waiting) < len(self.waiting):
                f.truncate(before)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.waiting = b""

    def _plot(self, step, values):
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def save(self, state, name):
        """Whether the checkpoint was written; last.pt's predecessor stays as previous.pt."""
        keep = self.folder / "previous.pt" if name == "last.pt" else None
        return self.attempt(name, save_checkpoint, state, self.folder / name, keep)

    def end(self):
        if self.board:
            self.attempt("TensorBoard events", self.board.close)
        if self.failed:
            raise SystemExit(f"{len(self.failed)} times this run could not write to {self.folder}: "
                             f"{', '.join(dict.fromkeys(self.failed))}. What is there is whole but may be old.")
# --- end setup


# --- augmentation, batched on the device. References: the same operations of Pillow
def luma(images):
    """(B, 3, H, W) -> (B, 1, H, W) float, ITU-R 601 as in Pillow."""
    weights = torch.tensor((0.299, 0.587, 0.114)).to(images.device, non_blocking=True)
    return (images * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True).round()


def gaussian_blur(images, radius):
    """Pillow's GaussianBlur, images (B, 3, H, W), radius (B,) below 2.4: three box filters of fractional width each.

    A box takes `whole` pixels on either side and `part` of the next, so that three have the variance radius^2 (Gwosdek
    et al. 2011, extended box filters). A sampled Gaussian would be off by over 10 levels at an edge for small radii.
    """
    (B, _, H, W), variance = images.shape, radius.double() ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance, whole = torch.tensor([2, 1, 0, 1, 2]), whole[:, None]
    taps = (distance <= whole) + (distance == whole + 1) * part[:, None]  # (B, 5)
    taps = (taps / taps.sum(dim=1, keepdim=True)).float().to(images.device, non_blocking=True)
    taps = taps.repeat_interleave(3, dim=0)[:, None]  # (3 B, 1, 5): every plane is a channel of its own
    x = images.float().reshape(1, 3 * B, H, W)
    for pad, kernel in 3 * [((2, 2, 0, 0), taps[:, :, None])] + 3 * [((0, 0, 2, 2), taps[..., None])]:
        x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=3 * B).round()  # Pillow rounds each pass too
    return x.reshape(B, 3, H, W)


def three_augment(images, generator):
    """3 Aug (DeiT III): one of grayscale, solarize, blur for each image, a third each; uint8 -> uint8."""
    choice = torch.randint(3, (len(images),), generator=generator)  # on the CPU: no waiting for the GPU to know it
    radius = 0.1 + 1.9 * torch.rand(len(images), generator=generator)
    changes = (lambda x, _: luma(x).expand_as(x), lambda x, _: torch.where(x < 128, x, 255 - x), gaussian_blur)
    out = images.clone()
    for kind, change in enumerate(changes):
        rows = (choice == kind).nonzero()[:, 0]
        where = rows.to(images.device, non_blocking=True)
        if len(rows):
            out[where] = change(images[where], radius[rows]).to(torch.uint8)
    return out


def color_jitter(images, generator, strength=0.3):
    """ColorJitter without hue for each image: brightness, contrast, saturation, in this fixed order; uint8 -> uint8."""
    draws = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images.device, non_blocking=True)
    brightness, contrast, saturation = 1 + strength * (2 * draws - 1)

    def blend(base, x, factor):
        return (base + factor * (x - base)).clamp(0, 255).floor()  # Pillow truncates
    x = blend(0, images.float(), brightness)
    x = blend(luma(x).mean(dim=(1, 2, 3), keepdim=True).round(), x, contrast)
    return blend(luma(x), x, saturation).to(torch.uint8)


def seed_step(seed, step, rank):
    """Makes all that a step draws (3 Aug, erasing, mixup, drop path) a function of the three, also in a resumed run."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(number)  # timm's RandomErasing
    np.random.seed(number)  # timm's Mixup
    torch.manual_seed(number)


# --- optimizer and evaluation
def parameter_groups(model, weight_decay, layer_decay):
    """AdamW's groups, with lr_scale = layer_decay^(depth + 1 - id): id 0 up to the position table, k + 1 for block k.

    Vectors, the class token and the position table are not decayed.
    """
    groups, depth = {}, len(model.blocks)
    for name, parameter in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed.")) else depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decay = 0.0 if parameter.ndim <= 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = dict(params=[], lr_scale=layer_decay ** (depth + 1 - layer), weight_decay=decay)
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def evaluate(model, loader, autocast, device):
    """(top-1 in percent, top-5 in percent, n) over all ranks, each picture counted once."""
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in loader:
        with autocast:
            logits = model(images)
        hits = logits.float().topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    model.train()
    top1, top5, n = counts.tolist()
    return 100 * top1 / n, 100 * top5 / n, int(n)


def check_labels(path, loader, classes, names):
    """Refuses a set whose labels are beyond a head of `classes` outputs, or whose class names are others than names."""
    labels = loader.reader.labels if isinstance(loader, ESSLLoader) else np.array([y for _, y in loader.samples])
    if labels.min() < 0 or labels.max() >= classes:
        raise SystemExit(f"{path} has labels from {labels.min()} to {labels.max()}, the head is for 0 to {classes - 1}")
    if names and loader.classes and list(names) != list(loader.classes):
        odd = sorted(set(names) ^ set(loader.classes)) or ["their order"]
        raise SystemExit(f"{path} has other classes than the model; they differ in {', '.join(odd[:4])} ({len(odd)})")


def main(args):
    start, folder = time.time(), Path(args.output_dir)
    rank, world, device, stop = setup(args.seed)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def say(text):
        if rank == 0:
            tell(text)

    # --- weights: of the run to go on with, else of the pretrained encoder
    last = folder / "last.pt"
    source = find_checkpoint(folder, args.resume, say)
    begin = source or (None if args.finetune == "none" or args.eval else args.finetune)
    if args.eval and not source:
        raise SystemExit(f"--eval needs a finetuned checkpoint: --resume CHECKPOINT, or a run that left {last}")
    weights, found, names = read_weights(begin) if begin else ({}, {}, None)
    if source and "head.weight" not in weights:
        raise SystemExit(f"{source} holds no classifier to go on with; --finetune {source} makes one of its encoder")
    vit, size = vit_settings(args.model, found, begin), args.input_size or found.get("img_size", 224)

    # --- data
    shared = dict(res=size, num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world, device=device,
                  skip_bad=args.skip_bad)
    vals = [open_loader(path, args.batch_size, False, **shared) for path in args.val_data]
    if args.eval:
        model = ViT(vit, size, len(weights["head.weight"])).to(device)
        load_encoder(model, weights, source, fresh=())
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, signal.SIG_DFL)  # nothing to save: stop at once
        say(f"{source} {size} px\n| {'set':20} |  top-1 |  top-5 |       n |\n|{'-' * 22}|-------:|-------:|--------:|")
        for path, val in zip(args.val_data, vals):
            check_labels(path, val, model.num_classes, names)
            top1, top5, n = evaluate(model, val, autocast, device)
            say(f"| {Path(path).stem:20} | {top1:6.2f} | {top5:6.2f} | {n:7} |")
            if found := val.new_bad_samples():  # with --skip-bad
                say(f"{len(found)} damaged samples replaced: {', '.join(list(found)[:5])}")
        return
    if args.aug == "rand" and not Path(args.data).is_dir():
        raise SystemExit(f"--aug rand works on Pillow's pictures: --data {args.data} must be an image folder")
    rand = {"transform": rand_augment_transform(*RAND_AUG)} if args.aug == "rand" else {}
    val, loader = vals[0], open_loader(args.data, args.batch_size, True, args.preload, **shared, **rand)
    classes = len(loader.classes or ()) or int(loader.reader.labels.max()) + 1
    for path, data in (args.data, loader), (args.val_data[0], val):
        check_labels(path, data, classes, loader.classes)
    accum = args.total_batch // (args.batch_size * world)
    if accum * args.batch_size * world != args.total_batch:
        raise SystemExit(f"--total-batch {args.total_batch} is no multiple of --batch-size {args.batch_size} x {world}")
    steps_per_epoch = len(loader) // accum
    if steps_per_epoch == 0:
        raise SystemExit(f"{loader.num_samples} pictures do not fill a step of {args.total_batch}: lower --total-batch")
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    # --- model
    model = ViT(vit, size, classes, drop_path=args.drop_path)
    if begin and not source:
        load_encoder(model, weights, begin)
    model = wrapped = model.to(device)
    if world > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    train_step = torch.compile(wrapped, dynamic=False) if args.compile else wrapped
    mixing = args.mixup > 0 or args.cutmix > 0
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes) if mixing else None
    erase = RandomErasing(args.reprob, mode="pixel", device=device)

    # --- optimizer
    peak_lr = args.blr * args.total_batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.layer_decay), lr=1e-3,
                                  betas=FINETUNE["betas"], fused=True)

    # --- resume
    settings = {k: getattr(args, k) for k in (
        "finetune", "scheme", "aug", "epochs", "warmup_epochs", "blr", "layer_decay", "weight_decay", "drop_path",
        "mixup", "cutmix", "smoothing", "reprob", "total_batch", "seed")}
    settings.update(num_samples=loader.num_samples, classes=classes, **model.settings)
    whole = nn.ModuleDict({"model": model})  # gives the checkpoint's keys the prefix they have in pretraining's

    def restore(source):
        """Takes up a checkpoint -> step, best top-1."""
        state = torch.load(source, map_location=device, weights_only=True)
        theirs = state.get("settings", {})
        differ = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in settings.items() if theirs.get(k) != v]
        if differ:
            raise SystemExit(f"{source} is of a run with other settings ({'; '.join(differ)}). Give the same, or "
                             "another --output-dir, or --resume none to start over in this one.")
        whole.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        return state["step"], state["best"]
    step, best = restore(source) if source else (0, -1.0)
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.json").write_text(json.dumps({**vars(args), "world_size": world}, indent=1))
        except OSError as e:
            raise SystemExit(f"--output-dir {folder} cannot be written: {e.strerror}. Name a folder that can.")
        log = RunFolder(folder, step, source)
        bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def checkpoint(name):
        """Whether it is written, on rank 0."""
        return rank == 0 and log.save({
            "modules": whole.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(),
            "step": step, "epoch": step // steps_per_epoch, "best": best, "settings": settings,
            "model": model.settings, "classes": loader.classes}, name)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters from {begin or 'scratch'}, step {step}; "
        f"{loader.num_samples:,} pictures, {classes} classes; {world} x {args.batch_size} x {accum} = "
        f"{args.total_batch} a step, {steps_per_epoch} an epoch; {device.type}, {loader.num_workers} loader threads")

    # --- train
    total, seen, waited, clock, top1 = torch.zeros((), device=device), 0, 0.0, time.time(), None
    bad_steps, went_back, left_out, saved_at, batches = BadSteps(device), False, 0, time.time(), None
    while step < steps:
        epoch = step // steps_per_epoch
        if batches is None:  # an epoch begins, or one is gone on with
            stage, (res, aug, low, high) = stage_at(FINETUNE_SCHEMES[args.scheme], epoch, args.epochs, FINETUNE_STAGES,
                                                    size, vit["patch_size"])
            aug = "rand" if args.aug == "rand" else aug
            loader.set_stage(res=res, scale=(low ** 2, high ** 2))
            batches = iter(loader)
        lr = lr_at(step, steps, warmup, peak_lr, MIN_LR)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        seed_step(args.seed, step, rank)
        step_loss = torch.zeros((), device=device)
        for micro in range(accum):
            t = time.time()
            images, labels = next(batches)
            waited += time.time() - t
            if aug != "rand":
                images = three_augment(images, torch.default_generator)
            if aug == "3aug+":
                images = color_jitter(images, torch.default_generator)
            images = erase(model.normalize(images))
            images, targets = mixup(images, labels) if mixup else (images, labels)  # soft (B, classes), or (B,)
            with nullcontext() if world == 1 or micro == accum - 1 else wrapped.no_sync():
                with autocast:
                    logits = train_step(images)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.0 if mixup else args.smoothing)
                (loss / accum).backward()
            step_loss += loss.detach() / accum
        bad_steps.add(bad := guarded_step(optimizer, step_loss))
        total += torch.where(bad > 0, 0, step_loss)
        seen += args.total_batch
        step += 1
        if rank == 0:
            bar.update()

        # --- log, evaluate
        epoch_ends, stopping = step % steps_per_epoch == 0, any_rank(stop)
        if epoch_ends or stopping or step % 50 == 0:
            if world > 1:
                dist.all_reduce(total)
            before, (left_out, _, longest) = left_out, bad_steps.read()
            count, elapsed = seen // args.total_batch - (left_out - before), time.time() - clock
            mean_loss = total.item() / count / world if count else None
            loss_text = f"{mean_loss:.4f}" if count else "not finite"
            values = dict(epoch=epoch, stage=stage + 1, loss=mean_loss, lr=lr, res=res, img_s=seen / elapsed,
                          data_wait=waited / elapsed, bad_steps=left_out)
            if device.type == "cuda":
                values["mem"] = torch.cuda.max_memory_allocated() / 2 ** 30  # GiB
            if epoch_ends:
                top1, top5, n = evaluate(model, val, autocast, device)
                values.update(top1=top1, top5=top5)
                say(f"epoch {epoch}, stage {stage + 1}, {res} px, {aug}: loss {loss_text}, top-1 {top1:.2f} %, "
                    f"top-5 {top5:.2f} %, {seen / elapsed:.0f} images/s, {waited / elapsed:.1%} waiting"
                    + (f", {left_out} steps left out" if left_out else ""))
            if found := {**loader.new_bad_samples(), **val.new_bad_samples()}:  # with --skip-bad
                values["bad_samples"] = found
                say(f"{len(found)} damaged samples replaced: {', '.join(list(found)[:5])}")
            if rank == 0:
                log.write(step, **values)
                bar.set_postfix(loss=loss_text, img_s=f"{seen / elapsed:.0f}")
            total.zero_()
            seen, waited, clock = 0, 0.0, time.time()
            if longest >= args.max_bad_steps:
                found = (f"{longest} steps in a row up to step {step} were left out: loss or gradient not finite "
                         f"(epoch {epoch}, lr {lr:.2e}, {left_out} such steps in all)")
                good = find_checkpoint(folder, "auto", say) or source
                if went_back or good is None:
                    raise SystemExit(f"{found}{', again' * went_back}; {good or 'no checkpoint'} is the last good one. "
                                     "Try a lower --blr or a longer --warmup-epochs")
                batches.close()
                (step, best), batches, went_back = restore(good), None, True
                bad_steps, left_out = BadSteps(device), 0
                say(f"{found}: going back to {good}, step {step}; the next time the run stops")
                if rank == 0:
                    log.write(step, went_back=found)
                    bar.update(step - bar.n)
                continue

        # --- save, stop
        if epoch_ends:
            batches.close()
            batches = None
            loader.set_epoch(epoch + 1)  # what the checkpoints below resume with
            if top1 > best:
                best = top1
                checkpoint("best.pt")
        due = (epoch + 1) % args.save_every == 0 if epoch_ends else time.time() - saved_at > 60 * args.save_minutes
        if stopping or step == steps or (due and rank == 0 and not bad_steps.counts[1]):  # not in a row of bad steps
            written = checkpoint("last.pt")
            saved_at = time.time()
        if stopping and step < steps:
            raise SystemExit(f"stopped by a signal at step {step}; {last} is " + (
                "written: the same command goes on there" if written or rank else "not, see above"))
    if top1 is None:  # a finished run: nothing was left to do
        top1, top5, n = evaluate(model, val, autocast, device)
    hours = f"{int(time.time() - start) // 3600}:{time.strftime('%M:%S', time.gmtime(time.time() - start))}"
    say(f"done: {args.epochs} epochs, top-1 {top1:.2f} %, top-5 {top5:.2f} % of {n} pictures (best {best:.2f} %), "
        f"{hours} h, {last}")
    if rank == 0:
        log.end()


if __name__ == "__main__":
    try:
        main(get_args())
    except (DataError, WeightsError) as e:
        raise SystemExit(f"finetune: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
