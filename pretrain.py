"""Pretrains a masked autoencoder with the paper's progressive schemes of resolution and mask ratio.

    torchrun --nproc_per_node 8 pretrain.py --scheme s5 --epochs 800   # ImageNet-1k, the paper's run
    python pretrain.py --demo                                          # drawn pictures, two CPU cores, two minutes
    python pretrain.py --plan --hours 24                               # what fits into a day on this machine?
    python pretrain.py --bench                                         # images/s and MFU of each stage, to bench.json

A run's folder holds args.json, log.jsonl, TensorBoard events, last.pt, previous.pt, a milestone checkpoint per stage,
recon_*.png. Run the same command again and it goes on where it stopped. The last line is the result:
    done: 24 epochs, loss 1.373 -> 0.401, probe top-1 90.0 %, 0:01:54 h, runs/demo/last.pt
"""
import argparse
import copy
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

import models_mae
from essl_loader import DataError, open_loader
from models_mae import WeightsError, find_checkpoint, save_checkpoint
from schedules import PRETRAIN, PRETRAIN_SCHEMES, PRETRAIN_STAGES, lr_at, stage_at, stage_starts

DEMO = dict(data="data/demo_train.beton", val_data="data/demo_val.beton", output_dir="runs/demo", input_size=64,
            model="mae_vit_nano_patch8", epochs=24, warmup_epochs=2, total_batch=64, batch_size=64, blr=4e-3)
PEAK_TFLOPS = {"A100": 312, "H100 80GB": 989, "H200": 989}  # dense bf16, data sheets of the SXM cards


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--demo", action="store_true", help="two minutes on a CPU: draw pictures if absent, tiny model")
    p.add_argument("--data", default="data/train_500_95.beton", help="training set: a .beton file or a class folder")
    p.add_argument("--val-data", default="data/val_500_100.beton", help="held-out set for the probe, likewise")
    p.add_argument("--output-dir", default="runs/pretrain", help="the run's folder")
    p.add_argument("--model", default="mae_vit_base_patch16", choices=models_mae.SIZES, help="model size")
    p.add_argument("--input-size", type=int, default=224, help="full resolution in pixels; the schemes scale with it")
    p.add_argument("--scheme", default="s5", choices=PRETRAIN_SCHEMES, help="resolutions and mask ratios (Table 10)")
    p.add_argument("--stages", type=float, nargs=3, default=PRETRAIN_STAGES, metavar="SHARE", help="in epochs, sum 1")
    p.add_argument("--mask-ratio", type=float, help="one mask ratio for all stages instead of the scheme's")
    p.add_argument("--decoder-keep", type=float, default=1.0,
                   help="share of the removed patches that the decoder reconstructs; 1 is the paper's (all)")
    p.add_argument("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    p.add_argument("--warmup-epochs", type=float, default=PRETRAIN["warmup_epochs"], help="linear warm-up of the rate")
    p.add_argument("--blr", type=float, default=PRETRAIN["blr"], help="learning rate for 256 images a step")
    p.add_argument("--weight-decay", type=float, default=PRETRAIN["weight_decay"], help="AdamW's, for matrices")
    p.add_argument("--total-batch", type=int, default=PRETRAIN["total_batch"], help="images a step, over all GPUs")
    p.add_argument("--batch-size", type=int, default=512, help="images at once on one GPU; accumulation does the rest")
    p.add_argument("--probe", default="masked", choices=("masked", "full", "off"),
                   help="online probe: on the masked forward's features (nearly free), on a second, full forward (the "
                        "paper's, +60 %% FLOPs), or none; accuracy is always on held-out full pictures")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                   help="torch.compile the training step")
    p.add_argument("--recompute", action="store_true",
                   help="activation checkpointing: for large models, whose blocks are then computed again in the "
                        "backward pass (a third more FLOPs) instead of kept in memory")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, crops and masks")
    p.add_argument("--resume", default="auto", help="auto: go on from the run's last.pt if there; none; a checkpoint")
    p.add_argument("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    p.add_argument("--preload", action="store_true", help="read the training file into memory's page cache first")
    p.add_argument("--skip-bad", action="store_true", help="replace damaged samples and name them, do not stop")
    p.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints")
    p.add_argument("--save-minutes", type=float, default=10, help="minutes after which one is written within an epoch")
    p.add_argument("--max-bad-steps", type=int, default=20,
                   help="steps in a row left out for a loss or gradient that is not finite, before the run goes back "
                        "to the last good checkpoint; the second time it stops")
    p.add_argument("--viz-every", type=int, default=20, help="epochs between reconstruction pictures; also at the end")
    p.add_argument("--bench", action="store_true", help="only measure the scheme's stages, next to a plain eager model")
    p.add_argument("--plan", action="store_true", help="only measure, and say how long every scheme would take here")
    p.add_argument("--steps", type=int, default=20, help="steps of one measurement of --bench and --plan")
    p.add_argument("--hours", type=float, default=24, help="the budget of --plan")
    p.add_argument("--gpus", type=int, default=1, help="GPUs of --plan, each with a share of cores like this one's")
    p.add_argument("--peak-tflops", type=float, help="one GPU's for the MFU; known: " + ", ".join(PEAK_TFLOPS))
    argv = [a.split("=", 1) for a in (sys.argv[1:] if argv is None else argv)]
    argv = ["=".join([a[0].replace("_", "-") if a[0].startswith("--") else a[0], *a[1:]]) for a in argv]
    if "--demo" in argv:
        p.set_defaults(**DEMO)  # what the command line names still wins
    args = p.parse_args(argv)
    if min(args.epochs, args.batch_size, args.save_every, args.max_bad_steps, args.steps, args.gpus) < 1:
        p.error("--epochs, --batch-size, --save-every, --max-bad-steps, --steps and --gpus must be at least 1")
    if not 0 < args.decoder_keep <= 1:
        p.error(f"--decoder-keep {args.decoder_keep}: expected a share above 0, at most 1")
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


class PretrainStep(nn.Module):
    """Model and online probe as one module, so that DDP and torch.compile see one forward: (loss, probe loss)."""

    def __init__(self, model, classes, probe, decoder_keep=1.0):
        super().__init__()
        self.model, self.probe, self.decoder_keep = model, probe, decoder_keep
        if probe != "off":
            width = model.settings["embed_dim"]
            self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes))

    def forward(self, images, labels, mask_ratio, noise):
        loss, _, _, latent = self.model.train_parts(images, mask_ratio, noise, self.decoder_keep)
        if self.probe == "off":
            return loss, torch.zeros_like(loss)
        features = self.model.features(images) if self.probe == "full" else latent[:, 1:].mean(dim=1).detach()
        return loss, F.cross_entropy(self.head(features.float()), labels)


def adamw(step_module, weight_decay, **kwargs):
    """Decay for matrices only; the last group, the probe's, has its own constant rate."""
    trained = [p for p in step_module.model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    if step_module.probe != "off":
        groups.append({"params": list(step_module.head.parameters()), "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=1e-3, betas=PRETRAIN["betas"], **kwargs)


def mask_noise(rng, seed, step, shape, rank):
    """(accum, B, L) of one draw (accum, B, world, L) by (seed, step): the same masks for any number of ranks."""
    return torch.rand(shape, device=rng.device, generator=rng.manual_seed(seed * 1_000_003 + step))[:, :, rank]


def take_step(train_step, optimizer, scaler, autocast, statistics, batches, noise, mask_ratio):
    """One step over the micro-batches of noise (accum, B, L) -> loss, whether it was left out (1.0 or 0.0), both on the
    device, and seconds waited for data. scaler: only the eager reference's. statistics: buffers that a step changes."""
    total, waited, no_sync = 0.0, 0.0, getattr(train_step, "no_sync", nullcontext)  # DDP's: gradients meet once
    before = [(b, b.clone()) for b in statistics]
    for micro in range(len(noise)):
        t = time.time()
        images, labels = next(batches)
        waited += time.time() - t
        with nullcontext() if micro == len(noise) - 1 else no_sync():
            with autocast:
                loss, probe_loss = train_step(images, labels, mask_ratio, noise[micro])
            loss_share = (loss + probe_loss) / len(noise)
            (scaler.scale(loss_share) if scaler else loss_share).backward()
        total = total + loss.detach() / len(noise)
    if not scaler:
        return total, guarded_step(optimizer, total, before), waited
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, torch.zeros_like(total), waited


def warm_up(train_step, stages, batch_size, patch_size, world, autocast, device):
    """Compiles every stage's graphs on blank pictures; weights, statistics and generators stay as they were."""
    before = [(b, b.clone()) for b in train_step.buffers()]
    for res, mask_ratio in stages:
        images = torch.zeros(batch_size, 3, res, res, dtype=torch.uint8, device=device)
        noise = mask_noise(torch.Generator(device), 0, 0, (1, batch_size, world, (res // patch_size) ** 2), 0)
        with autocast:
            losses = train_step(images.contiguous(memory_format=torch.channels_last),
                                torch.zeros(batch_size, dtype=torch.int64, device=device), mask_ratio, noise[0])
        sum(losses).backward()
    for buffer, value in before:
        buffer.copy_(value)
    train_step.zero_grad(set_to_none=True)


@torch.no_grad()
def probe_accuracy(step_module, loader, autocast, device):
    """The probe's top-1 in percent on held-out full pictures at the run's input size, over all ranks.

    A probe that learnt on masked features gets the full pictures' standardised by their own mean and variance: these
    are not the masked ones', whose running values made 36 % of 52 % (imagenette, 60 epochs at 64 px).
    """
    step_module.eval()
    found = []
    for images, labels in loader:
        with autocast:
            found.append((step_module.model.features(images).double(), labels))
    features, labels, (norm, linear) = *map(torch.cat, zip(*found)), step_module.head
    sums = torch.stack([torch.ones_like(features[0]) * len(labels), features.sum(dim=0), features.square().sum(dim=0)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    n, mean = sums[0], sums[1] / sums[0]
    statistics = (norm.running_mean, norm.running_var)
    if step_module.probe == "masked":
        statistics = mean.float(), (sums[2] / n - mean.square()).float()
    hits = linear(F.batch_norm(features.float(), *statistics, norm.weight, norm.bias)).argmax(dim=1) == labels
    hits = hits.sum().double()
    if dist.is_initialized():
        dist.all_reduce(hits)
    step_module.train()
    return 100 * (hits / n[0]).item()


@torch.no_grad()
def save_reconstructions(model, images, mask_ratio, path):
    """A picture with one row per image: original, what the encoder saw, and the reconstruction in true colours.

    A model trained on normalised patches predicts patches of mean 0 and variance 1: its output is shown with each
    patch's own mean and deviation.
    """
    p, L = model.patch_size, (images.shape[-1] // model.patch_size) ** 2
    noise = torch.rand(len(images), L, generator=torch.Generator().manual_seed(0)).to(images.device)
    model.eval()
    _, pred, mask = model(images, mask_ratio, noise)
    model.train()
    patches = model.patches(images)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred.float() * (var + 1e-6) ** 0.5 + mean
    mask = mask[..., None]
    rows = torch.stack([patches, patches * (1 - mask), patches * (1 - mask) + pred * mask], dim=1).flatten(0, 1)
    pixels = (models_mae.unpatchify(rows, p) * model.std + model.mean).clamp(0, 1)
    save_image(pixels, path, nrow=3 * 4)


# --- measure
def forever(loader):
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def measure(step, count, device):
    """count calls of step() after two -> seconds a call, share of them that waits for data, peak GiB on a GPU."""
    cuda = torch.cuda if device.type == "cuda" else None
    step(), step()
    if cuda:
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
    clock = time.time()
    waited = sum(step()[2] for _ in range(count))
    if cuda:
        cuda.synchronize(device)
    seconds = time.time() - clock
    return seconds / count, waited / seconds, cuda.max_memory_allocated(device) / 2 ** 30 if cuda else None


def measure_stage(res, mask_ratio, count, loader, accum, patch_size, ours, plain=None):
    """{way: {seconds, img_s, data_wait, peak_gib}} at a stage: `loader`, the training; `model`, on random pictures
    alone; `plain`, that of the eager reference. In turns, three rounds, the median; without plain, one of `loader`.

    ours and plain: the first arguments of take_step.
    """
    loader.set_stage(res=res)
    device, B, found = loader.device, loader.batch_size, {}
    noise = torch.rand(accum, B, (res // patch_size) ** 2, device=device)
    images = torch.randint(256, (B, 3, res, res), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(B, dtype=torch.int64, device=device)
    for _ in range(3 if plain else 1):
        ways = {"loader": (ours, forever(loader))}
        if plain:
            ways["model"] = ours, itertools.repeat((images, labels))
            ways["plain"] = plain, itertools.repeat((plain[0].model.normalize(images), labels))
        for way, (how, batches) in ways.items():
            found.setdefault(way, []).append(
                measure(lambda: take_step(*how, batches, noise, mask_ratio), count, device))
        ways["loader"][1].close()
    middle = {way: sorted(results)[len(results) // 2] for way, results in found.items()}
    return {way: dict(seconds=seconds, img_s=accum * B / seconds, data_wait=waited, peak_gib=peak)
            for way, (seconds, waited, peak) in middle.items()}


def main(args):
    start = time.time()
    rank, world, device, stop = setup(args.seed)

    def say(text):
        if rank == 0:
            tell(text)
    if args.demo and not (Path(args.data).exists() and Path(args.val_data).exists()) and rank == 0:
        subprocess.run([sys.executable, Path(__file__).with_name("build_beton.py"), "--demo"], check=True)
    if world > 1:
        dist.barrier()
    if world > 1 and (args.bench or args.plan):
        raise SystemExit("--bench and --plan measure one GPU: run them without torchrun; --plan takes --gpus")
    ranks = args.gpus if args.plan else world
    accum = args.total_batch // (args.batch_size * ranks)
    if accum * args.batch_size * ranks != args.total_batch:
        raise SystemExit(f"--total-batch {args.total_batch} is not a multiple of --batch-size {args.batch_size} x "
                         f"{ranks} process(es): take --batch-size "
                         f"{math.gcd(args.total_batch // ranks or 1, args.batch_size)}, or another total")
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".writable-{rank}").touch()
        (folder / f".writable-{rank}").unlink()
    except OSError as e:
        raise SystemExit(f"--output-dir {folder} cannot be written: {e.strerror}. Name a folder that can.")

    # --- data
    shared = dict(num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world, device=device,
                  skip_bad=args.skip_bad)
    loader = open_loader(args.data, args.batch_size, True, args.preload, res=args.input_size, scale=PRETRAIN["scale"],
                         **shared)
    classes = len(loader.classes or ()) or (int(loader.reader.labels.max()) + 1)
    probe = args.probe if classes > 1 else "off"  # a flat folder has nothing to probe for
    val = None
    if probe != "off":
        try:
            val = open_loader(args.val_data, args.batch_size, False, res=args.input_size, **shared)
        except DataError as e:
            raise SystemExit(f"--val-data, for the held-out probe: {e} Or train without it: --probe off.")
        if loader.classes and val.classes and loader.classes != val.classes:
            raise SystemExit(f"{args.data} has the classes {loader.classes[:3]}..., {args.val_data} has "
                             f"{val.classes[:3]}...: the probe needs the same; name the matching --val-data, or "
                             "--probe off")
    steps_per_epoch = len(loader) * world // (accum * ranks)
    if steps_per_epoch == 0:
        raise SystemExit(f"{loader.num_samples} pictures do not fill one step of {args.total_batch}: lower "
                         "--total-batch")
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    probe_every = max(1, args.epochs // 100)  # a hundred points of the curve: the held-out pass costs a little

    # --- model
    model = getattr(models_mae, args.model)(img_size=args.input_size)
    p = model.patch_size

    def stage_of(scheme, epoch):
        """(stage index, (resolution, mask ratio)) of an epoch"""
        i, (res, mask_ratio) = stage_at(PRETRAIN_SCHEMES[scheme], epoch, args.epochs, args.stages, args.input_size, p)
        return i, (res, mask_ratio if args.mask_ratio is None else args.mask_ratio)
    schemes = PRETRAIN_SCHEMES if args.plan else (args.scheme,)
    stages = list(dict.fromkeys(stage_of(name, epoch)[1] for name in schemes for epoch in range(args.epochs)))
    flops = {stage: models_mae.flops_per_image(*stage, args.decoder_keep, **model.settings) for stage in stages}
    model.prepare(*{res // p for res, _ in stages})
    model.recompute = args.recompute
    step_module = PretrainStep(model, classes, probe, args.decoder_keep).to(device)
    wrapped = step_module
    if world > 1:  # a static graph cannot be told of no_sync, so of accumulation
        wrapped = DistributedDataParallel(wrapped, device_ids=[device] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True, static_graph=accum == 1)
    train_step = torch.compile(wrapped, dynamic=False) if args.compile else wrapped
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = args.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in hardware), None)

    # --- optimizer
    peak_lr = args.blr * args.total_batch / 256
    optimizer = adamw(step_module, args.weight_decay, fused=True)
    ours = (train_step, optimizer, None, autocast, list(step_module.head.buffers()) if probe != "off" else [])
    if args.compile:
        warm_up(train_step, stages, args.batch_size, p, world, autocast, device)

    # --- bench and plan
    if args.bench or args.plan:
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, signal.SIG_DFL)  # nothing to save: stop at once
        plain, report = None, dict(hardware=hardware, torch=torch.__version__, loader_threads=loader.num_workers,
                                   peak_tflops=peak, args=vars(args), stages=[])
        if args.bench:  # as MAE is run elsewhere: eager, fp16 and its scaler, float pictures, the whole decoder
            twin, cuda = copy.deepcopy(step_module), device.type == "cuda"
            twin.decoder_keep = 1.0
            plain = (twin, adamw(twin, args.weight_decay), torch.amp.GradScaler(device.type, enabled=cuda),
                     torch.autocast("cuda", torch.float16) if cuda else nullcontext(), [])
        print(f"{hardware}, {loader.num_workers} loader threads, torch {torch.__version__}: {args.model}, {accum} x "
              f"{args.batch_size} a step, decoder-keep {args.decoder_keep}, {'compiled' if args.compile else 'eager'}")
        for stage in stages:
            found = measure_stage(*stage, args.steps, loader, accum, p, ours, plain)
            report["stages"].append(dict(res=stage[0], mask_ratio=stage[1], **found))
            for way, row in found.items():
                keep = 1.0 if way == "plain" else args.decoder_keep
                cost = models_mae.flops_per_image(*stage, keep, **model.settings)
                row["tflops"] = row["img_s"] * cost / 1e12
                row["mfu"] = row["tflops"] / peak if peak else None
                print(f"{stage[0]:4} px, {stage[1]:.2f}  {way:6} {row['img_s']:9.1f} images/s, "
                      f"{row['data_wait']:6.1%} waiting, {row['tflops']:8.4g} TFLOP/s"
                      + (f", MFU {row['mfu']:.1%}" if peak else "")
                      + (f", {row['peak_gib']:.1f} GiB" if row["peak_gib"] else "")
                      + (f", {row['img_s'] / found['plain']['img_s']:.2f} x plain" if way == "model" else ""))
        if args.plan:
            clock = time.time()
            if val:
                probe_accuracy(step_module, val, autocast, device)
            probing = (time.time() - clock) / args.gpus * len(range(0, args.epochs, probe_every))
            clock = time.time()
            save_checkpoint({"modules": step_module.state_dict(), "optimizer": optimizer.state_dict()},
                            folder / "plan.pt")
            (folder / "plan.pt").unlink()
            saving = (time.time() - clock) * (args.epochs // args.save_every)
            seconds = {(row["res"], row["mask_ratio"]): row["loader"]["seconds"] for row in report["stages"]}
            print(f"{args.epochs} epochs of {loader.num_samples:,} pictures on {args.gpus} such GPU(s), of it "
                  f"{(probing + saving) / 3600:.3f} h probe passes and checkpoints; start-up aside")
            for name in PRETRAIN_SCHEMES:
                training = steps_per_epoch * sum(seconds[stage_of(name, epoch)[1]] for epoch in range(args.epochs))
                hours = report.setdefault("hours", {})[name] = (training + probing + saving) / 3600
                print(f"{name:6} {hours:9.3f} h, {'within' if hours <= args.hours else 'over'} {args.hours:g} h, which "
                      f"would do for {int(args.epochs * args.hours / hours)} epochs")
        written = folder / ("bench.json" if args.bench else "plan.json")
        written.write_text(json.dumps(report, indent=1))
        print(f"done: {written}")
        return

    # --- resume
    last = folder / "last.pt"
    source = find_checkpoint(folder, args.resume, say)
    settings = {k: getattr(args, k) for k in ("model", "input_size", "scheme", "mask_ratio", "epochs", "warmup_epochs",
                                              "blr", "weight_decay", "total_batch", "seed", "decoder_keep")}
    settings.update(stages=list(args.stages), probe=probe, num_samples=loader.num_samples, **model.settings)

    def restore(source):
        """Takes up a checkpoint -> step, position in the data, the run's first loss."""
        try:
            state = torch.load(source, map_location=device, weights_only=True)
            theirs = state["settings"]
        except Exception as e:  # a damaged pickle can raise anything
            raise SystemExit(f"--resume {source}: not a checkpoint of pretrain.py that can be read ({e}). "
                             "--resume none starts anew.")
        differ = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in settings.items() if theirs.get(k) != v]
        if differ:
            raise SystemExit(f"{source} is of a run with other settings ({'; '.join(differ)}). Give the same, or "
                             "another --output-dir, or --resume none to start over in this one.")
        step_module.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["loader"], state["first_loss"]
    step, position, first_loss = restore(source) if source else (0, None, None)
    log = bar = None
    if rank == 0:
        (folder / "args.json").write_text(json.dumps({**vars(args), "world_size": world}, indent=1))
        log = RunFolder(folder, step, source)
        bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def checkpoint(name, step):
        """Whether it is written, on rank 0."""
        return rank == 0 and log.save({
            "modules": step_module.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(),
            "step": step, "epoch": step // steps_per_epoch, "first_loss": first_loss, "settings": settings,
            "model": model.settings, "classes": loader.classes}, name)

    size = sum(w.numel() for w in model.parameters() if w.requires_grad) / 1e6
    say(f"{args.model}, {size:.1f} M parameters; {loader.num_samples:,} pictures, {classes} classes; "
        f"{world} x {args.batch_size} x {accum} = {args.total_batch} a step, {steps_per_epoch} steps an epoch; "
        f"{hardware}, {loader.num_workers} loader threads" + (f"; from {source}, step {step}" if source else ""))

    # --- train
    mask_rng, bad_steps, went_back, left_out, loss_text = torch.Generator(device), BadSteps(device), False, 0, None
    total, seen, waited, clock, mean_loss, top1 = torch.zeros((), device=device), 0, 0.0, time.time(), None, None
    log_every, saved_at, last_stage, batches = min(50, steps_per_epoch), time.time(), None, None
    while step < steps:
        epoch = step // steps_per_epoch
        if batches is None:  # an epoch begins, or one is gone on with
            stage, (res, mask_ratio) = stage_of(args.scheme, epoch)
            if stage != last_stage:
                say(f"epoch {epoch}: stage {stage + 1}, {res} px, mask ratio {mask_ratio}")
            last_stage = stage
            if step % steps_per_epoch:
                loader.load_state_dict(position)
            else:
                loader.set_epoch(epoch)
            loader.set_stage(res=res)
            batches, shape = iter(loader), (accum, args.batch_size, world, (res // p) ** 2)
        lr = lr_at(step, steps, warmup, peak_lr)
        for group in optimizer.param_groups[:2]:
            group["lr"] = lr
        noise = mask_noise(mask_rng, args.seed, step, shape, rank)
        loss, bad, seconds_waited = take_step(*ours, batches, noise, mask_ratio)
        bad_steps.add(bad)
        total += torch.where(bad > 0, 0, loss)
        waited += seconds_waited
        seen += args.total_batch
        step += 1
        if rank == 0:
            bar.update()

        # --- log
        epoch_ends, stopping = step % steps_per_epoch == 0, any_rank(stop)
        if epoch_ends or stopping or step % log_every == 0:
            if world > 1:
                dist.all_reduce(total)
            before, (left_out, _, longest) = left_out, bad_steps.read()
            count, elapsed = seen // args.total_batch - (left_out - before), time.time() - clock
            mean_loss = total.item() / count / world if count else None
            first_loss = mean_loss if first_loss is None else first_loss
            loss_text = f"{mean_loss:.4f}" if count else "not finite"
            values = dict(epoch=epoch, stage=stage + 1, loss=mean_loss, lr=lr, res=res, mask_ratio=mask_ratio,
                          img_s=seen / elapsed, data_wait=waited / elapsed, bad_steps=left_out,
                          tflops=seen / elapsed * flops[res, mask_ratio] / 1e12 / world)  # of one GPU
            if peak:
                values["mfu"] = values["tflops"] / peak
            if device.type == "cuda":
                values["mem"] = torch.cuda.max_memory_allocated() / 2 ** 30  # GiB
            if epoch_ends and val and ((epoch + 1) % probe_every == 0 or epoch + 1 == args.epochs):
                top1 = values["probe_top1"] = probe_accuracy(step_module, val, autocast, device)
            found = {k: v for data in (loader, val) if data for k, v in data.new_bad_samples().items()}
            if found:  # with --skip-bad
                values["bad_samples"] = found
                say(f"{len(found)} damaged samples replaced: {', '.join(list(found)[:5])}")
            if rank == 0:
                log.write(step, **values)
                bar.set_postfix(loss=loss_text, img_s=f"{seen / elapsed:.0f}")
            if epoch_ends:
                say(f"epoch {epoch} loss {loss_text} {seen / elapsed:.0f} images/s, {waited / elapsed:.1%} waiting"
                    + (f", MFU {values['mfu']:.1%}" if peak else "")
                    + (f", probe {top1:.1f} %" if "probe_top1" in values else "")
                    + (f", {left_out} steps left out" if left_out else ""))
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
                (step, position, _), batches, went_back = restore(good), None, True
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
            if epoch + 1 in stage_starts(args.epochs, args.stages)[1:]:
                checkpoint(f"stage{stage + 1}.pt", step)
            if rank == 0 and ((epoch + 1) % args.viz_every == 0 or step == steps):
                pictures, name = next(iter(val or loader))[0][:12], f"recon_{epoch + 1:04d}.png"
                log.attempt(name, save_reconstructions, model, pictures, 0.75, folder / name)
        due = (epoch + 1) % args.save_every == 0 if epoch_ends else time.time() - saved_at > 60 * args.save_minutes
        if stopping or step == steps or (due and rank == 0 and not bad_steps.counts[1]):  # not in a row of bad steps
            written = checkpoint("last.pt", step)
            saved_at = time.time()
        if stopping and step < steps:
            raise SystemExit(f"stopped by a signal at step {step}; {last} is " + (
                "written: the same command goes on there" if written or rank else "not, see above"))
    if loss_text is None:
        say(f"{last} is of a finished run: {args.epochs} epochs")
    else:
        hours = f"{int(time.time() - start) // 3600}:{time.strftime('%M:%S', time.gmtime(time.time() - start))}"
        say(f"done: {args.epochs} epochs, loss {first_loss or math.nan:.3f} -> {mean_loss or math.nan:.3f}, "
            + (f"probe top-1 {top1:.1f} %, " if top1 is not None else "") + f"{hours} h, {last}")
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        log.end()


if __name__ == "__main__":
    try:
        main(get_args())
    except (DataError, WeightsError) as e:
        raise SystemExit(f"pretrain: {e}")
