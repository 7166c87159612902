"""Finetunes and evaluates the encoder of a masked autoencoder, with the paper's schemes.

    torchrun --nproc_per_node 8 finetune.py --finetune runs/pretrain/last.pt   # the paper's run
    python finetune.py --eval --resume runs/finetune/best.pt --val-data data/val_500_100.beton
    python finetune.py --benchmark 20      # images/s of 3 Aug and RandAug on one core (Table 7)

Give the same command again and the run goes on from last.pt. The last line is the result:
    done: 10 epochs, top-1 96.00 % of 200 pictures, best 96.50 %, 0:01:12, runs/finetune/last.pt
"""
import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import timeit
import uuid
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from timm.utils import random_seed
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import models_mae
from essl_loader import DataError, check_classes, check_labels, open_loader
from models_mae import WeightsError
from schedules import (FINETUNE, FINETUNE_SCHEMES, check_batches, lr_at, stage_at, unused_stages)

MIN_LR = 1e-6
# At magnitude 10 timm's RandAug posterizes to 0 bits, which Pillow refuses
RAND_AUG = ("rand-m9-mstd0.5-inc1", {"magnitude_max": 9.99})
# A resumed run may change these flags; all others must stay as they were
FREE = ("finetune", "eval", "data", "val_data", "output_dir", "model", "input_size", "batch_size",
        "compile", "resume", "num_workers", "save_minutes", "benchmark")


def get_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    add("--finetune", metavar="WEIGHTS",
        help="start from weights: ours, official MAE's, timm's, Hugging Face's; none: random ones")
    add("--eval", action="store_true", help="only evaluate --resume CHECKPOINT on each --val-data")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or class folders")
    add("--val-data", nargs="+", default=["data/val_500_100.beton"], help="held-out set or sets")
    add("--output-dir", default="runs/finetune", help="the run's folder")
    add("--model", choices=models_mae.VIT_SIZES,
        help="model size; the default is the checkpoint's, else ViT-B")
    add("--input-size", type=int,
        help="full resolution in pixels; the default is the checkpoint's, else 224")
    add("--scheme", default="s1", choices=FINETUNE_SCHEMES,
        help="resolution, crops and augmentation of each stage; `python schedules.py` prints them")
    add("--aug", default="3aug", choices=("3aug", "rand"),
        help="3aug: the scheme's augmentation; rand: RandAug")
    add("--epochs", type=int, default=FINETUNE["epochs"], help="passes over the data")
    add("--warmup-epochs", type=float, default=FINETUNE["warmup_epochs"],
        help="epochs in which the learning rate rises from 0; at most a quarter of --epochs")
    add("--drop-path", type=float, default=0.1, help="stochastic depth at the last block")
    add("--blr", type=float, default=FINETUNE["blr"], help="learning rate for 256 images a step")
    add("--layer-decay", type=float, default=FINETUNE["layer_decay"],
        help="learning rate of a block, divided by that of the block after it")
    add("--weight-decay", type=float, default=FINETUNE["weight_decay"],
        help="weight decay; biases and norms have none")
    add("--mixup", type=float, default=0.8, help="mixup's alpha; 0: none")
    add("--cutmix", type=float, default=1.0,
        help="CutMix's alpha; each batch gets mixup or CutMix by chance; 0: none")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--reprob", type=float, default=0.25, help="share of pictures with a rectangle erased")
    add("--total-batch", type=int, default=FINETUNE["total_batch"],
        help="pictures in a step, over all GPUs")
    add("--batch-size", type=int, default=128,
        help="pictures that a GPU computes at once; gradients are summed up to --total-batch")
    add("--compile", action=on_off, default=torch.cuda.is_available(),
        help="use torch.compile; the default on a GPU")
    add("--seed", type=int, default=0, help="decides weights, order, crops and augmentation")
    add("--resume", default="auto",
        help="auto: go on from the run's last.pt if there is one; none: begin a new run; PATH: "
             "begin from this checkpoint. none and PATH count at the first start only")
    add("--num-workers", type=int, default=0,
        help="loader threads per process; 0: all cores that the process may use")
    add("--order", default="random", choices=("random", "pages"),
        help="pages: shuffle within 512 MB, for files that are larger than the memory")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    add("--benchmark", type=int, default=0, metavar="N", help="only time augmentation, N batches")
    args = parse_flags(p, argv)
    trains = not (args.eval or args.benchmark)
    if trains and not (args.finetune and len(args.val_data) == 1):
        p.error("training needs --finetune WEIGHTS (none: random ones) and one --val-data.")
    if args.eval and args.finetune:
        p.error("--eval takes its checkpoint from --resume.")
    return args


# --- setup: the same text in pretrain.py, finetune.py and linprobe.py
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as it is written, and the defaults that the texts do not name."""

    def _get_help_string(self, action):
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def parse_flags(parser, argv):
    """argv -> arguments. Underscores in the names of flags count as hyphens. A warm-up is cut to a
    quarter of the run."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        words.append(name + equals + value)
    args = parser.parse_args(words)
    if args.warmup_epochs > args.epochs / 4:
        args.warmup_epochs = args.epochs / 4
        print0(f"--warmup-epochs is shortened to {args.warmup_epochs:g}, a quarter of --epochs.")
    return args


def setup(seed, training):
    """Joins the processes that torchrun started -> rank, world_size, device, stop.

    stop is a tensor (1,), which the signals SIGTERM, SIGINT and SIGUSR1 set to 1 in training.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    refuse_tasks_without_ranks()
    if rank >= world_size:
        raise SystemExit(f"RANK {rank} needs a WORLD_SIZE above it. torchrun sets both.")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpu = os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())
        device = torch.device("cuda", int(gpu))
        torch.cuda.set_device(device)
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise SystemExit("There is a GPU, but torch cannot use it. Update the GPU's driver, or "
                         "train on the CPU: export CUDA_VISIBLE_DEVICES=")
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = connect(rank, world_size)
        dist.init_process_group(backend, None, timedelta(hours=1), world_size, rank, store)
    torch.manual_seed(seed)
    stop = torch.zeros(1)
    # The same memory: a signal may come while torch.compile traces, where torch's operations fail
    flag = stop.numpy()
    if training:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: flag.fill(1))
    return rank, world_size, device, stop


def seed_step(seed, step, rank):
    """The random numbers of a step depend on these alone, so a resumed run draws the same."""
    number = np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]
    random_seed(int(number))  # Python's, numpy's and torch's


def refuse_tasks_without_ranks():
    """Ends the run if Slurm started several tasks without torchrun, and says what to start."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks == 1 or "RANK" in os.environ:
        return
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    raise SystemExit(
        f"Slurm starts {tasks} processes (SLURM_NTASKS), and each would be a run of its own. "
        f"This makes one run of them: srun --ntasks {nodes} --cpus-per-task $SLURM_CPUS_ON_NODE"
        f" torchrun --nnodes {nodes} --nproc_per_node {tasks // nodes} --rdzv-backend c10d "
        f"--rdzv-endpoint $(hostname):29500 {shlex.join(sys.argv)} (for one process alone: "
        "unset SLURM_NTASKS)")


def connect(rank, world_size, minutes=5):
    """The store through which the ranks find one another, with a prefix that is new at each start.

    After a restart torchrun's store still holds the addresses of dead ranks, and the agents of two
    machines count restarts separately, so their count cannot serve as the prefix. Instead each rank
    leaves a key of its own in the store, and rank 0 answers under that key with the prefix. Where
    torchrun's agent does not serve the store, rank 0 does.
    """
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        raise SystemExit(f"WORLD_SIZE is {world_size}, but {', '.join(sorted(missing))} not set. "
                         "torchrun sets all of them.")
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(minutes=minutes)
    own_key = uuid.uuid4().hex
    try:
        store = dist.TCPStore(host, port, is_master=is_server, timeout=limit,
                              wait_for_workers=False)
        if rank > 0:
            store.set(f"rank {rank}", own_key)
            prefix = store.get(own_key).decode()  # waits for rank 0's answer
            store.add(prefix, 1)  # rank 0 counts who has read it
            return dist.PrefixStore(prefix, store)
    except dist.DistError as e:
        raise SystemExit(f"Rank {rank} got no answer from rank 0 at {host}:{port}. {e}")
    prefix = own_key
    start = time.monotonic()
    while store.add(prefix, 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"rank {other}"]):  # a dead rank's key is answered too; nobody reads it
                store.set(store.get(f"rank {other}"), prefix)
        if time.monotonic() - start > limit.total_seconds():
            raise SystemExit(f"{store.add(prefix, 0) + 1} of {world_size} ranks came within "
                             f"{minutes} minutes. Start all of them.")
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def check_ranks(**values):
    """Ends the run where ranks differ: they would wait for one another, or train on other data."""
    if not dist.is_initialized():
        return
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, values)
    differences = []
    for name in values:
        if any(other[name] != ranks[0][name] for other in ranks):
            on_ranks = [f"{other[name]} on rank {rank}" for rank, other in enumerate(ranks)]
            differences.append(f"{name}: {', '.join(on_ranks)}")
    if differences and dist.get_rank() > 0:
        raise SystemExit(1)  # rank 0 says why
    if differences:
        raise SystemExit(f"The ranks differ. {'; '.join(differences)}. All machines must see the "
                         "same data and --output-dir, and get the same command.")


def on_any_rank(flag):
    """Whether any rank has set the flag (1,), so that all ranks stop after the same step."""
    flag = flag.clone()  # a signal may set it at any moment
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for the GPU
    return bool(flag)


def leave():
    """Waits for all ranks, then ends the process group. If one ended first, torchrun would kill
    rank 0 while it writes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def print0(text):
    """Prints on rank 0, above a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def log(board, step, **values):
    """Writes a line of log.jsonl, and the same to TensorBoard. Only rank 0 has a board."""
    if board:
        with open(Path(board.log_dir, "log.jsonl"), "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            board.add_scalar(name, value, step)


def lock_folder(folder):
    """Keeps a second run out of the folder. The kernel ends the lock with this process."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)  # stays open: closing ends the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(file, 200, 0).decode() or "another process"
        raise SystemExit(f"{folder} is in use by {owner}. Wait until that has ended (its lock ends "
                         "with it), or give another --output-dir.")
    except OSError as e:
        print0(f"{folder}: its file system has no locks ({e}). Start no second run in it.")
        return
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    for path in (*folder.glob("*.pt.tmp-*"), *folder.glob("args.json.tmp-*")):
        path.unlink()  # of runs that were killed while they saved


def starts_over(args, folder, free):
    """Whether this start begins a new run, as --resume none or --resume PATH ask.

    It does if args.json in the folder holds another command, or a finished run. Else the folder's
    run was begun by this very command, which was given again to go on. free: flags that may differ
    in the same command.
    """
    last = folder / "last.pt"
    if args.resume == "auto" or Path(args.resume).absolute() == last.absolute():
        return False
    try:
        before = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):  # there is none, or it is damaged
        return True
    if args.resume == "none" and before.get("finished"):
        return True
    command = json.loads(json.dumps(vars(args), default=str))  # as args.json holds it
    compared = [flag for flag in command if flag == "resume" or flag not in free]
    return any(before.get(flag) != command[flag] for flag in compared)


def resume_path(args, folder, new_run):
    """The checkpoint that this start goes on from, or None."""
    last = folder / "last.pt"
    if not new_run and last.exists():
        return last
    if args.resume in ("auto", "none"):
        return None
    return Path(args.resume)


def begin_run(args, folder, new_run, **about):
    """Writes args.json. A new run first moves an earlier one to old_1/, and PATH to last.pt."""
    if new_run:
        tmp_path = folder / f"last.pt.tmp-{os.getpid()}"
        if args.resume != "none":
            shutil.copyfile(args.resume, tmp_path)  # it may be one of the files that are moved
        move_old_run(folder)
        if args.resume != "none":
            os.replace(tmp_path, folder / "last.pt")
    write_args(args, folder, **about)


def move_old_run(folder):
    """Moves what an earlier run left in a folder into old_1/, or the next free number."""
    patterns = ("last.pt", "best.pt", "stage*.pt", "recon_*.png", "args.json", "log.jsonl",
                "results.jsonl", "events.out.*", "scripts")
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    if not paths:
        return
    number = 1
    while (folder / f"old_{number}").exists():
        number += 1
    old = folder / f"old_{number}"
    old.mkdir()
    for path in paths:
        path.rename(old / path.name)
    print0(f"The earlier run in {folder} is now in {old}.")


def write_args(args, folder, **about):
    """args.json: the flags of the run in this folder, and what else is known about it."""
    tmp_path = folder / f"args.json.tmp-{os.getpid()}"
    tmp_path.write_text(json.dumps(vars(args) | about, indent=1, default=str))
    os.replace(tmp_path, folder / "args.json")


def save_checkpoint(path, **state):
    """Writes to a temporary file and renames it, so that the file at `path` is always whole."""
    tmp_path = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp_path, "wb") as f:
            torch.save(state, f)
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch makes a RuntimeError of a full disk
        tmp_path.unlink(missing_ok=True)
        reason = e
        if isinstance(e, RuntimeError):
            reason = e.__context__ or e  # the OSError
        raise SystemExit(f"{path} cannot be written: {reason}. Make room for it, then give the "
                         "same command again: the run goes on from its last checkpoint.")
    os.replace(tmp_path, path)
# --- end setup


# --- augmentation, batched on the device. References: the same operations of Pillow
def luma(images):
    """(B, 3, H, W) -> (B, 1, H, W) float, ITU-R 601 as in Pillow."""
    weights = torch.tensor((0.299, 0.587, 0.114)).to(images.device, non_blocking=True)
    return (images * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True).round()


def gaussian_blur(images, radius):
    """Pillow's GaussianBlur, images (B, 3, H, W), radius (B,) below 2.4: three box filters.

    A box has `whole` pixels on either side and `part` of the next (Gwosdek et al. 2011). A sampled
    Gaussian would be off by over 10 levels at an edge for small radii.
    """
    B, _, H, W = images.shape
    variance = radius.double() ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) ** 2))
    beyond = torch.tensor([2, 1, 0, 1, 2]) - whole[:, None]
    taps = (beyond <= 0) + (beyond == 1) * part[:, None]  # (B, 5)
    taps = (taps / taps.sum(dim=1, keepdim=True)).float().to(images.device, non_blocking=True)
    taps = taps.repeat_interleave(3, dim=0)[:, None]  # (3 B, 1, 5): each plane is a channel
    x = images.float().reshape(1, 3 * B, H, W)
    across = taps[:, :, None]  # (3 B, 1, 1, 5)
    down = taps[..., None]  # (3 B, 1, 5, 1)
    for _ in range(3):  # as Pillow: three boxes across, three down, each rounded
        x = F.conv2d(F.pad(x, (2, 2, 0, 0), mode="replicate"), across, groups=3 * B).round()
    for _ in range(3):
        x = F.conv2d(F.pad(x, (0, 0, 2, 2), mode="replicate"), down, groups=3 * B).round()
    return x.reshape(B, 3, H, W)


def three_augment(images, generator=None):
    """3 Aug (DeiT III): grayscale, solarize or blur, a third each; uint8 (B, 3, H, W)."""
    choice = torch.randint(3, (len(images),), generator=generator)  # on the CPU: no wait to know it
    radius = 0.1 + 1.9 * torch.rand(len(images), generator=generator)
    gray = (choice == 0).nonzero()[:, 0]
    solarized = (choice == 1).nonzero()[:, 0]
    blurred = (choice == 2).nonzero()[:, 0]
    radius = radius[blurred]
    gray = gray.to(images.device, non_blocking=True)
    solarized = solarized.to(images.device, non_blocking=True)
    blurred = blurred.to(images.device, non_blocking=True)
    out = images.clone()
    out[gray] = luma(images[gray]).to(torch.uint8).expand(-1, 3, -1, -1)
    out[solarized] = torch.where(images[solarized] < 128, images[solarized],
                                 255 - images[solarized])
    if len(blurred):
        out[blurred] = gaussian_blur(images[blurred], radius).to(torch.uint8)
    return out


def color_jitter(images, generator=None, strength=0.3):
    """Brightness, contrast, saturation of each image, in this order; uint8 (B, 3, H, W)."""
    draws = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    factors = (1 + strength * (2 * draws - 1)).to(images.device, non_blocking=True)

    def blend(base, x, factor):
        return (base + factor * (x - base)).clamp(0, 255).floor()  # Pillow truncates

    x = blend(0, images.float(), factors[0])
    x = blend(luma(x).mean(dim=(1, 2, 3), keepdim=True).round(), x, factors[1])
    return blend(luma(x), x, factors[2]).to(torch.uint8)


def benchmark(args, device):
    """Table 7: prints images/s of RandAug and 3 Aug on one core, and of 3 Aug in batches."""
    torch.set_num_threads(1)
    images, _ = next(iter(open_loader(args.data, args.batch_size, num_workers=1, device=device)))
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images.cpu()]
    rand_augment = rand_augment_transform(*RAND_AUG)
    three_augment_pillow = auto_augment_transform("3a", {})

    def run_rand_augment():
        return [rand_augment(picture) for picture in pictures]

    def run_three_augment_pillow():
        return [three_augment_pillow(picture) for picture in pictures]

    def run_three_augment():
        return three_augment(images)[0, 0, 0, 0].item()  # waits for the GPU

    for name, augment in (("RandAug, Pillow, one core", run_rand_augment),
                          ("3 Aug, Pillow, one core", run_three_augment_pillow),
                          (f"3 Aug, batches, {device.type}", run_three_augment)):
        augment()
        seconds = timeit.timeit(augment, number=args.benchmark)
        print0(f"{name}: {args.benchmark * len(images) / seconds:,.0f} images/s")


# --- data
def training_batches(args, loader, model, stages, mixup, first_step, num_steps):
    """Yields micro-batches, accum of them for each step of --total-batch pictures.

    A micro-batch is augmented, normalised images (B, 3, res, res) and targets: labels (B,), or with
    mixup a share of each class (B, classes). At the start of an epoch this generator sets the
    loader for it. 3 Aug, erasing, mixup and drop path depend on (seed, step, rank) alone.
    """
    erase = RandomErasing(args.reprob, mode="pixel", device=loader.device)
    accum = args.total_batch // (args.batch_size * loader.world_size)
    steps_per_epoch = num_steps // args.epochs
    for epoch in range(first_step // steps_per_epoch, args.epochs):
        index, stage = stages[epoch]
        print0(f"epoch {epoch + 1}, stage {index + 1}: {stage.res} pixels")
        epoch_start = epoch * steps_per_epoch
        if first_step <= epoch_start:  # else the loader goes on in the middle of the epoch
            loader.set_epoch(epoch)
        loader.set_stage(res=stage.res, scale=(stage.sigma_min ** 2, stage.sigma_max ** 2))
        with contextlib.closing(iter(loader)) as batches:
            for step in range(max(first_step, epoch_start), epoch_start + steps_per_epoch):
                seed_step(args.seed, step, loader.rank)
                for images, targets in itertools.islice(batches, accum):
                    if args.aug == "3aug":
                        images = three_augment(images)
                        if stage.aug == "3aug+":
                            images = color_jitter(images)
                    images = erase(model.normalize(images))
                    if mixup:
                        images, targets = mixup(images, targets)
                    yield images, targets


# --- training and evaluation
def make_optimizer(model, args):
    """AdamW, whose learning rate falls from block to block towards the input (layer decay)."""
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(),
                                      layer_decay=args.layer_decay)
    return torch.optim.AdamW(groups, lr=1e-3, betas=FINETUNE["betas"], fused=True)


def set_lr(optimizer, step, num_steps, args):
    """Sets a step's learning rate in all groups, times their layer decay, and returns it."""
    peak_lr = args.blr * args.total_batch / 256
    warmup_steps = args.warmup_epochs * (num_steps // args.epochs)
    lr = lr_at(step, num_steps, warmup_steps, peak_lr, MIN_LR)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


class Meter:
    """Adds up an epoch's loss and times its steps, without the first one, which may compile."""

    def __init__(self, device):
        self.loss_sum = torch.zeros((), device=device)
        self.finite = torch.zeros((), device=device)  # how many losses were finite
        self.start_clock()

    def start_clock(self):
        """The rate counts from here on."""
        wait_for_gpu()
        self.steps = 0
        self.t0 = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        """The rate leaves out what happens in this block."""
        wait_for_gpu()
        paused_at = time.monotonic()
        yield
        self.t0 += time.monotonic() - paused_at

    def add(self, loss):
        """Adds a micro-batch's loss, without waiting for the GPU."""
        loss = loss.detach()
        self.loss_sum += loss.nan_to_num(0, 0, 0)
        self.finite += loss.isfinite()

    def mean_loss(self):
        """Mean of the finite losses of all ranks, NaN if there is none."""
        sums = torch.stack([self.loss_sum, self.finite])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()


def wait_for_gpu():
    """Waits until the GPU's queue is empty, so that a clock that is read next is right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def evaluate(model, loader, autocast):
    """{top1, top5, n}: percent of a loader's pictures, each counted once, and how many they are."""
    model.eval()
    with autocast:
        result = models_mae.accuracy(((model(x).float(), y) for x, y in loader), loader.device)
    model.train()
    return result


def evaluate_only(args, vit, size, weights, classes, folder, device, **shared):
    """Prints the accuracy of --resume on each --val-data, and adds it to results.jsonl."""
    if "head.weight" not in weights:
        raise WeightsError(f"{args.resume} has no classifier: finetune it first.")
    num_classes = len(weights["head.weight"])
    model = models_mae.ViT(vit, size, num_classes).to(device)
    models_mae.load_into(model, weights, args.resume)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for val_data in args.val_data:
        val = open_loader(val_data, args.batch_size, train=False, device=device, **shared)
        if classes and val.classes and list(classes) != list(val.classes):
            raise DataError(f"{val_data} has other classes than {args.resume}.")
        check_labels(val, num_classes)
        result = evaluate(model, val, autocast)
        row = json.dumps(dict(checkpoint=str(args.resume), data=val_data, **result))
        print0(row)
        if val.rank == 0:
            with open(folder / "results.jsonl", "a") as f:
                f.write(row + "\n")


def settings_of(args, model, loader, weights, scheme, classes):
    """All that changes the result: a run that goes on must have the same."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in FREE}
    stages = [stage._asdict() for stage in scheme]
    shares = tuple(stage.pop("share") for stage in stages)
    sum_of_weights = sum(tensor.double().abs().sum() for tensor in weights.values())
    return settings | model.settings | dict(
        num_samples=len(loader.indices), steps_per_epoch=loader.num_samples // args.total_batch,
        data_checksum=loader.checksum, classes=classes,
        scheme_stages=stages, shares=shares, weights=f"{sum_of_weights:.9g}")


def main(args):
    start = time.monotonic()
    rank, world_size, device, stop = setup(args.seed, training=not (args.eval or args.benchmark))
    if args.benchmark:
        return benchmark(args, device)
    folder = Path(args.output_dir)
    last = folder / "last.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not args.eval:
        lock_folder(folder)

    # --- weights
    if args.eval:
        args.resume = last if args.resume == "auto" else args.resume
        args.finetune = args.resume
    weights, ckpt_settings, ckpt_classes = models_mae.read_weights(args.finetune)
    size = args.input_size or ckpt_settings.get("img_size", 224)
    vit = models_mae.vit_settings(args.model, ckpt_settings, args.finetune)
    shared = dict(res=size, num_workers=args.num_workers, seed=args.seed, rank=rank,
                  world_size=world_size)
    if args.eval:
        evaluate_only(args, vit, size, weights, ckpt_classes, folder, device, **shared)
        return leave()

    # --- data
    uses_mixup = args.mixup + args.cutmix > 0
    if args.aug == "rand" and not Path(args.data).is_dir():
        raise DataError(f"--aug rand works on Pillow's pictures: {args.data} must be a folder.")
    with open_loader(args.data, 1) as loader:  # to know how many pictures there are
        check_batches(loader.num_samples, args.total_batch, args.batch_size, world_size,
                      multiple=2 if uses_mixup else 1)  # it mixes pairs of pictures
    own = {"order": args.order}
    if args.aug == "rand":
        own = {"transform": rand_augment_transform(*RAND_AUG)}
    loader = open_loader(args.data, args.batch_size, device=device, **shared, **own)
    val = open_loader(args.val_data[0], args.batch_size, train=False, device=device, **shared)
    check_classes(loader, val)
    classes = len(loader.classes or ()) or int(loader.labels.max()) + 1
    accum = args.total_batch // (args.batch_size * world_size)
    steps_per_epoch = loader.num_samples // args.total_batch
    num_steps = args.epochs * steps_per_epoch

    # --- model
    model = models_mae.ViT(vit, size, classes, drop_path=args.drop_path)
    if weights:
        models_mae.load_into(model, weights, args.finetune, fresh=("fc_norm.", "head."))
    ddp_model = model.to(device)
    if world_size > 1:
        ddp_model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    compute_scores = torch.compile(ddp_model, dynamic=False) if args.compile else ddp_model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    mixup = None
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if uses_mixup:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)
        criterion = nn.CrossEntropyLoss()  # mixup smooths its targets
    scheme = FINETUNE_SCHEMES[args.scheme]
    stages = [stage_at(scheme, epoch, args.epochs, size, vit["patch_size"])
              for epoch in range(args.epochs)]
    for number in unused_stages(args.epochs, scheme):
        print0(f"Stage {number} gets no epoch: its share of --epochs {args.epochs} is too small.")

    # --- optimizer
    optimizer = make_optimizer(model, args)
    # Its scale stays 1: it is here to skip steps whose gradients are not finite, see pretrain.py
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)

    # --- resume
    settings = settings_of(args, model, loader, weights, scheme, classes)
    about = dict(settings=settings, model=model.settings, classes=loader.classes)
    # The prefix "model." is that of pretraining's checkpoints
    parts = dict(modules=nn.ModuleDict({"model": model}), optimizer=optimizer, scaler=scaler,
                 loader=loader)
    new_run = starts_over(args, folder, FREE)
    state = models_mae.resume(resume_path(args, folder, new_run), settings,
                              vars(get_args(["--finetune=none"])), **parts)
    first_step = state["step"] if state else 0
    best = state["best"] if state else -1.0
    check_ranks(step=first_step, batch_size=args.batch_size, **settings)
    if first_step == num_steps:
        print0(f"{last}: this run of {args.epochs} epochs is finished, best top-1 {best:.2f} %.")
        return leave()
    print0(f"{args.finetune} from step {first_step} of {num_steps}: {loader.num_samples:,} "
           f"pictures, {world_size} x {args.batch_size} x {accum} a step")

    # --- the run's folder
    board = None
    if rank == 0:
        begin_run(args, folder, new_run, world_size=world_size)
        board = SummaryWriter(folder, purge_step=first_step + 1)

    # --- train
    batches = training_batches(args, loader, model, stages, mixup, first_step, num_steps)
    meter = Meter(device)
    saved_at = time.monotonic()
    for step in range(first_step, num_steps):
        lr = set_lr(optimizer, step, num_steps, args)
        for micro in range(accum):
            images, targets = next(batches)
            # DDP averages the gradients in the last one alone; without DDP nothing reads this
            ddp_model.require_backward_grad_sync = micro == accum - 1
            with autocast:
                scores = compute_scores(images)
            loss = criterion(scores.float(), targets)
            scaler.scale(loss / accum).backward()
            meter.add(loss)
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
        meter.steps += 1
        steps_done = step + 1
        epoch = step // steps_per_epoch
        epoch_ends = steps_done % steps_per_epoch == 0
        stopping = on_any_rank(stop)

        if epoch_ends:
            mean_loss = meter.mean_loss()
            img_s = meter.steps * args.total_batch / (time.monotonic() - meter.t0)
            # AdamW counts the steps that were not skipped
            skipped_steps = steps_done - int(optimizer.state[model.cls_token]["step"])
            if not math.isfinite(mean_loss) or skipped_steps > steps_done / 2:
                raise DataError(f"epoch {epoch + 1}: loss {mean_loss}, {skipped_steps} steps whose "
                                "gradients were not finite. Lower --blr, and start over with "
                                "--resume none.")
            result = evaluate(model, val, autocast)
            index, stage = stages[epoch]
            row = dict(epoch=epoch + 1, stage=index + 1, res=stage.res, loss=mean_loss, lr=lr,
                       img_s=img_s, skipped_steps=skipped_steps, **result)
            print0("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
            log(board, steps_done, **row)
            is_best = result["top1"] > best
            best = max(best, result["top1"])
            if is_best and rank == 0:
                save_checkpoint(folder / "best.pt", step=steps_done, epoch=epoch + 1, best=best,
                                modules=parts["modules"].state_dict(), **about)
            meter = Meter(device)
        elif step == first_step or step % steps_per_epoch == 0:
            meter.start_clock()  # the epoch's first step may have compiled

        minutes = (time.monotonic() - saved_at) / 60
        if stopping or steps_done == num_steps or minutes > args.save_minutes:
            with meter.paused():
                if rank == 0:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    save_checkpoint(last, step=steps_done, epoch=epoch + 1, best=best, **about,
                                    **states)
            saved_at = time.monotonic()
        if stopping:
            break
    batches.close()

    # --- end
    if steps_done == num_steps:
        if rank == 0:
            write_args(args, folder, world_size=world_size, finished=True)
        print0(f"done: {args.epochs} epochs, top-1 {result['top1']:.2f} % of {result['n']:,} "
               f"pictures, best {best:.2f} %, "
               f"{timedelta(seconds=int(time.monotonic() - start))}, {last}")
    else:
        print0(f"stopped at step {steps_done}: the same command goes on from {last}")
    if board:
        board.close()
    leave()
    sys.exit(1 if steps_done < num_steps else 0)


if __name__ == "__main__":
    try:
        main(get_args(sys.argv[1:]))
    except (DataError, WeightsError, OSError) as e:
        raise SystemExit(f"finetune: {e}")
