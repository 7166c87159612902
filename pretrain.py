"""Pretrains a masked autoencoder with the paper's schemes of resolution and mask ratio.

    torchrun --nproc_per_node 8 pretrain.py --scheme s5 --epochs 800  # ImageNet-1k, the paper's run
    python pretrain.py --demo              # drawn pictures; two minutes on two CPU cores
    python pretrain.py --benchmark 20      # images/s and MFU of each stage; nothing is saved

Give the same command again and the run goes on from last.pt. The last line is the result:
    done: 24 epochs, loss 1.366 -> 0.273, probe top-1 92.5 %, H:MM:SS, runs/demo/last.pt
"""
import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.optim.muon import zeropower_via_newtonschulz
from timm.utils import random_seed
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import models_mae
from essl_loader import DataError, check_classes, labels_fault, open_loader
from models_mae import WeightsError
from schedules import (PRETRAIN, PRETRAIN_SCHEMES, Stage, check_batches, lr_at, stage_at,
                       unused_stages)

MODEL = models_mae.MaskedAutoencoderViT  # what is trained; scripts in extras/ set another class
DEMO = dict(data="data/demo_train.beton", val_data="data/demo_val.beton", output_dir="runs/demo",
            input_size=64, model="mae_vit_nano_patch8", epochs=24, warmup_epochs=2, total_batch=64,
            batch_size=64, blr=4e-3, compile=False)  # torch.compile needs a C compiler
# Muon's rate is so many times AdamW's; 1 to 8 gave the same probe (one seed, 5 epochs, 64 pixels)
MUON_LR = 4
NEWTON_SCHULZ = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]  # timm's default, "quintic"
PROBE_LR = 1e-3  # the probe's rate stays constant
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # dense bf16, data sheets of the SXM cards
LOG_NAMES = ("step", "epoch", "stage", "res", "mask_ratio", "lr", "skipped_steps", "img_s",
             "data_wait", "tflops", "mfu", "mem", "probe_top1")
# A resumed run may change these flags; all others must stay as they were
FREE = ("demo", "data", "val_data", "output_dir", "batch_size", "compile", "recompute", "resume",
        "num_workers", "save_minutes", "viz_every", "max_steps", "benchmark", "extend")
EXTENDABLE = ("epochs", "warmup_epochs", "blr", "stages")  # these it may change with --extend alone


def get_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    add("--demo", action="store_true",
        help="train a tiny model on drawn pictures; changes the defaults of --data, --epochs, ...")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or picture folder")
    add("--val-data", default="data/val_500_100.beton", help="held-out set for the online probe")
    add("--output-dir", default="runs/pretrain", help="the run's folder")
    add("--model", default="mae_vit_base_patch16", choices=models_mae.SIZES, help="model size")
    add("--input-size", type=int, default=224,
        help="full resolution in pixels; the resolutions of a scheme scale with it")
    add("--scheme", default="s5", choices=PRETRAIN_SCHEMES,
        help="resolution and mask ratio of each stage; `python schedules.py` prints them")
    add("--stages", type=float, nargs="+", metavar="SHARE",
        help="each stage's share of the epochs, instead of the scheme's; the sum is 1")
    add("--mask-ratio", type=float, help="the same mask ratio for all stages")
    add("--decoder-depth", type=int, help="decoder blocks; the default is the model's, 8 for ViT-B")
    add("--decoder-keep", type=float, default=1.0,
        help="share of the removed patches that the decoder reconstructs")
    add("--repeat", type=int, default=1,
        help="masks of each loaded picture in a step; with 2 an epoch costs twice as much")
    add("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    add("--warmup-epochs", type=float, default=PRETRAIN["warmup_epochs"],
        help="epochs in which the learning rate rises from 0; at most a quarter of --epochs")
    add("--blr", type=float, default=PRETRAIN["blr"], help="learning rate for 256 images a step")
    add("--weight-decay", type=float, default=PRETRAIN["weight_decay"],
        help="weight decay; biases and norms have none")
    add("--optimizer", default="adamw", choices=("adamw", "muon"),
        help="muon: Muon for the matrices of the blocks, AdamW for the rest")
    add("--total-batch", type=int, default=PRETRAIN["total_batch"],
        help="masked pictures in a step, over all GPUs")
    add("--batch-size", type=int, default=512,
        help="pictures that a GPU computes at once; gradients are summed up to --total-batch")
    add("--probe", default="masked", choices=("masked", "full", "off"),
        help="input of the online probe: the masked pictures, or whole ones in a second pass")
    add("--compile", action=on_off, default=torch.cuda.is_available(),
        help="use torch.compile; the default on a GPU")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    add("--seed", type=int, default=0, help="decides weights, order, crops and masks")
    add("--resume", default="auto",
        help="auto: go on from the run's last.pt if there is one; none: begin a new run; PATH: "
             "begin from this checkpoint. none and PATH count at the first start only")
    add("--extend", action="store_true", help="go on with other --epochs, --blr or --stages")
    add("--num-workers", type=int, default=0,
        help="loader threads per process; 0: all cores that the process may use")
    add("--order", default="random", choices=("random", "pages"),
        help="pages: shuffle within 512 MB, for files that are larger than the memory")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    add("--viz-every", type=int, default=20, help="epochs between reconstructions; 0: never")
    add("--max-steps", type=int, default=0, help="save and stop after this step; 0: never")
    add("--benchmark", type=int, default=0, metavar="N", help="only time N steps of each stage")
    add("--init", metavar="WEIGHTS",
        help="start from weights: ours, official MAE's, timm's or Hugging Face's")
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), default=models_mae.IMAGENET_MEAN,
        help="mean of red, green and blue over the pictures, from 0 to 1")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), default=models_mae.IMAGENET_STD,
        help="standard deviation of red, green and blue, from 0 to 1")
    add("--norm-pix-loss", action=on_off, default=True, help="normalise the targets per patch")
    if "--demo" in argv:
        p.set_defaults(**DEMO)  # what the command line names still wins
    args = parse_flags(p, argv)
    if args.stages is None:
        args.stages = [stage.share for stage in PRETRAIN_SCHEMES[args.scheme]]
    if args.epochs < 1 or args.repeat < 1:
        p.error("--epochs and --repeat should be 1 or more.")
    if args.decoder_depth is not None and args.decoder_depth < 1:
        p.error("--decoder-depth should be 1 or more.")
    if not 0 < args.decoder_keep <= 1:
        p.error("--decoder-keep should be above 0, and 1 or less.")
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


# --- model and online probe
class ModelWithProbe(nn.Module):
    """The model and the online probe (BatchNorm, linear layer), whose one forward DDP and
    torch.compile see.

    All its parameters that take gradients are trained, also those of modules that you add to it. A
    module with the attribute `persistent = False`, such as a frozen teacher, is in no checkpoint,
    and no checkpoint changes it.
    """

    def __init__(self, model, classes, probe, decoder_keep):
        super().__init__()
        self.model = model
        self.probe = probe
        self.decoder_keep = decoder_keep
        width = model.settings["embed_dim"]
        self.head = nn.Identity()
        if probe != "off":
            self.head = nn.Sequential(nn.BatchNorm1d(width, track_running_stats=False),
                                      nn.Linear(width, classes))

    def forward(self, images, labels, mask_ratio, noise):
        """images (B / R, 3, H, W), labels (B / R,), noise (B, L) -> {name: scalar}.

        "loss", plus "probe_loss" if there is one, is minimised. All scalars are averaged and logged
        under their names.
        """
        repeat = len(noise) // len(images)  # R: rows i R to i R + R - 1 are masks of picture i
        images = images.repeat_interleave(repeat, dim=0)
        labels = labels.repeat_interleave(repeat, dim=0)
        loss, _, _, latent = self.model(images, mask_ratio, noise, self.decoder_keep,
                                        return_latent=True)
        return {"loss": loss, **self.probe_loss(images, labels, latent)}

    def probe_loss(self, images, labels, latent):
        """The online probe's loss, whose gradient trains the head only; {} without a probe."""
        if self.probe == "off":
            return {}
        features = latent[:, 1:].mean(dim=1).detach()  # (B, D)
        if self.probe == "full":
            features = self.model.features(images)  # without gradients
        return {"probe_loss": F.cross_entropy(self.head(features.float()), labels)}

    def after_step(self, step):
        """A hook that is called after each step, with 1 after the first: for an EMA teacher."""

    def state_dict(self, **options):
        state = super().state_dict(**options)
        prefixes = self.unsaved_prefixes()
        return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}

    def load_state_dict(self, state):
        prefixes = self.unsaved_prefixes()
        own = super().state_dict()
        not_saved = {name: own[name] for name in own if name.startswith(prefixes)}
        return super().load_state_dict(state | not_saved)

    def unsaved_prefixes(self):
        """The prefixes of the names in modules with `persistent = False`."""
        return tuple(name + "." for name, module in self.named_modules()
                     if not getattr(module, "persistent", True))


def check_scalars(scalars):
    """Raises WeightsError if forward() gives a value that is no scalar, or a name of the log."""
    for name, value in scalars.items():
        if name in LOG_NAMES:
            raise WeightsError(f"forward() gives {name!r}, which is a name of the log: give it "
                               "another name.")
        if not isinstance(value, torch.Tensor) or value.shape != ():
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise WeightsError(f"forward() gives {name!r} as {found}: expected a tensor of one "
                               "number, such as loss.mean().")


def total_loss(scalars):
    """The loss that a step minimises."""
    check_scalars(scalars)
    return scalars["loss"] + scalars.get("probe_loss", 0)


def make_model(args):
    """The model that the flags describe, on the CPU."""
    size = models_mae.SIZES[args.model]
    if args.decoder_depth:
        size = size | {"decoder_depth": args.decoder_depth}
    model = MODEL(img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, mean=args.mean,
                  std=args.std, **size)
    model.recompute = args.recompute
    return model


@torch.no_grad()
def probe_accuracy(module, loader, autocast):
    """The probe's top-1 in percent on the held-out pictures of all ranks, unmasked and at full
    resolution.

    Its BatchNorm takes mean and variance from these features. With those of masked pictures the
    accuracy on imagenette was 36 % instead of 52 %.
    """
    features = []
    labels = []
    for images, batch_labels in loader:
        with autocast:
            features.append(module.model.features(images).float().cpu())  # (B, D)
        labels.append(batch_labels.cpu())
    own = (torch.cat(features), torch.cat(labels))
    ranks = [own]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    features = torch.cat([rank_features for rank_features, _ in ranks])  # (n, D)
    labels = torch.cat([rank_labels for _, rank_labels in ranks])  # (n,)
    scores = module.head(features.to(loader.device)).cpu()
    return 100 * (scores.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def save_reconstructions(model, loader, epoch, progress, board, steps_done):
    """Writes recon_*.png, three pictures a row. It shows of each picture the original, what the
    encoder saw, the reconstruction, and, to compare, what the prediction 0 would give."""
    images, _ = next(iter(loader))
    images = images[:12]
    # The same seed each time: the same masks, if masking_noise does not change with progress
    noise = draw_noise((len(images),), model, images.shape[-1], 0, progress, loader.device)
    parts = model.reconstruct(images, epoch.stage.mask_ratio, noise, with_zero=True)
    grid = make_grid(parts.transpose(0, 1).flatten(0, 1), nrow=12)  # from (4, B, 3, H, W)
    save_image(grid, Path(board.log_dir, f"recon_{epoch.index + 1:04d}.png"))
    board.add_image("reconstructions", grid, steps_done)


# --- schedule: what each epoch does
class EpochPlan(NamedTuple):
    """What an epoch of the run does."""
    index: int  # from 0
    stage_index: int  # from 0
    stage: Stage  # with this run's resolution in pixels
    flops: float  # to train on one masked picture, forward and backward
    starts_stage: bool
    ends_stage: bool

    @property
    def description(self):
        return (f"stage {self.stage_index + 1}: {self.stage.res} pixels, mask ratio "
                f"{self.stage.mask_ratio:g}, crops {self.stage.scale}, "
                f"{self.stage.decoder_depth} decoder blocks")


def scheme_of(args, model):
    """The Stages of --scheme, completed by --mask-ratio, --stages and the model's decoder depth."""
    scheme = PRETRAIN_SCHEMES[args.scheme]
    if len(args.stages) != len(scheme):
        raise SystemExit(f"--stages gives {len(args.stages)} shares, but scheme {args.scheme} has "
                         f"{len(scheme)} stages: give as many.")
    available = len(model.decoder_blocks)
    completed = []
    for number, (stage, share) in enumerate(zip(scheme, args.stages), start=1):
        mask_ratio = stage.mask_ratio if args.mask_ratio is None else args.mask_ratio
        depth = stage.decoder_depth or available
        if depth > available:
            raise WeightsError(
                f"stage {number} takes {depth} decoder blocks, but the model has {available}: give "
                f"--decoder-depth {depth} or more.")
        if depth < available and args.optimizer == "muon":
            raise WeightsError(
                f"stage {number} takes {depth} of {available} decoder blocks, but Muon steps them "
                "together: take --optimizer adamw, or one depth by --decoder-depth.")
        completed.append(Stage(stage.res, mask_ratio, share, tuple(stage.scale), depth))
    return completed


def without_share(stage):
    """A Stage as a dict, without its share of the epochs."""
    return {name: value for name, value in stage._asdict().items() if name != "share"}


def plan_epochs(args, model, scheme):
    """The EpochPlans of the run."""
    try:
        stages = [stage_at(scheme, epoch, args.epochs, args.input_size, model.patch_size)
                  for epoch in range(args.epochs)]
    except ValueError as e:
        raise SystemExit(f"--stages: {e}")
    for number in unused_stages(args.epochs, scheme):
        print0(f"Stage {number} gets no epoch: its share of --epochs {args.epochs} is too small.")
    epochs = []
    for epoch, (stage_index, stage) in enumerate(stages):
        flops = model.flops_per_image(stage.res, stage.mask_ratio, args.decoder_keep,
                                      decoder_depth=stage.decoder_depth)
        starts_stage = epoch == 0 or stages[epoch - 1][0] != stage_index
        ends_stage = epoch + 1 == args.epochs or stages[epoch + 1][0] != stage_index
        epochs.append(EpochPlan(epoch, stage_index, stage, flops, starts_stage, ends_stage))
    return epochs


# --- data and masks
def training_batches(args, loader, model, epochs, first_step, num_steps, meter):
    """Yields micro-batches, accum of them for each step of --total-batch pictures.

    A micro-batch is images (B / R, 3, H, W), labels (B / R,) and noise (B, L), R the --repeat: the
    patches with the smallest noise stay visible. At the start of an epoch or a stage this generator
    sets the loader and the model for it. first_step: the step at which the run goes on; the loader
    was loaded to the same place. The meter counts the time in which the loader is waited for.
    """
    steps_per_epoch = num_steps // len(epochs)
    first_epoch, steps_into_epoch = divmod(first_step, steps_per_epoch)
    for epoch in epochs[first_epoch:]:
        is_first = epoch.index == first_epoch
        steps = range(epoch.index * steps_per_epoch, (epoch.index + 1) * steps_per_epoch)
        if is_first:
            steps = steps[steps_into_epoch:]
        if len(steps) == steps_per_epoch:  # else the loader stands at the right batch already
            loader.set_epoch(epoch.index)
        loader.set_stage(res=epoch.stage.res, scale=epoch.stage.scale)
        if is_first or epoch.starts_stage:
            print0(f"epoch {epoch.index + 1}, {epoch.description}")
            model.active_decoder_blocks = epoch.stage.decoder_depth
            meter.restart(compiles=True)
        with contextlib.closing(iter(loader)) as loaded:
            batches = meter.timed(loaded)
            for step in steps:
                seed_step(args.seed, step, loader.rank)
                masks = draw_masks(step, num_steps, args, model, epoch.stage.res, loader)
                for noise in masks:
                    images, labels = next(batches)
                    yield images, labels, noise


def draw_noise(shape, model, res, seed, progress, device):
    """Calls masking_noise, for training and for pictures -> (*shape, L), the same for a seed.

    It also tells the model how much of the run is done, for targets().
    """
    rng = torch.Generator(device).manual_seed(seed)
    L = (res // model.patch_size) ** 2
    model.progress.fill_(progress)
    noise = models_mae.masking_noise((*shape, L), rng, device, progress=progress)
    if noise.shape != (*shape, L) or not noise.is_floating_point():
        raise WeightsError(f"masking_noise() gives {noise.dtype} of shape {tuple(noise.shape)}: "
                           f"expected floats of the given shape, {(*shape, L)}, such as "
                           "torch.rand(shape); the patches with the smallest stay visible.")
    return noise


def draw_masks(step, num_steps, args, model, res, loader):
    """The noise of a step's masks on this rank, (accum, B, L), for accum micro-batches.

    It depends on the seed and the step alone, so a resumed run repeats it. It is drawn for all
    ranks, of which each takes its own, in the order in which the loader gives them pictures: a
    picture gets the same noise for any --batch-size and number of GPUs.
    """
    accum = args.total_batch // (args.batch_size * loader.world_size)
    shape = (accum, args.batch_size // args.repeat, loader.world_size, args.repeat)
    seed = args.seed * 1_000_003 + step
    noise = draw_noise(shape, model, res, seed, step / num_steps, loader.device)
    return noise[:, :, loader.rank].flatten(1, 2)


# --- optimizer
def make_optimizer(module, args):
    """AdamW, or Muon for the matrices of the blocks and AdamW for all else.

    Its groups have names: "matrices" (Muon's), "no_decay" (vectors), "decay" and "probe".
    """
    probe = list(module.head.parameters())
    matrices = []
    if args.optimizer == "muon":
        blocks = [*module.model.blocks.parameters(), *module.model.decoder_blocks.parameters()]
        matrices = [p for p in blocks if p.ndim == 2 and p.requires_grad]
    assigned = {*probe, *matrices}
    others = [p for p in module.parameters() if p.requires_grad and p not in assigned]
    no_decay = [p for p in others if p.ndim <= 1]
    decay = [p for p in others if p.ndim > 1]
    groups = [dict(name="no_decay", params=no_decay, weight_decay=0.0),
              dict(name="decay", params=decay, weight_decay=args.weight_decay),
              dict(name="probe", params=probe, weight_decay=0.0)]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=PROBE_LR, betas=PRETRAIN["betas"], fused=True)
    group = dict(name="matrices", params=matrices, weight_decay=args.weight_decay,
                 lr_scale=MUON_LR, momentum=0.95)
    return Muon([group, *groups], lr=PROBE_LR, betas=PRETRAIN["betas"], eps=1e-7, fused=True)


def set_lr(optimizer, step, num_steps, args):
    """Sets a step's learning rate in all groups but the probe's, and returns it."""
    peak_lr = args.blr * args.total_batch / 256
    steps_per_epoch = num_steps // args.epochs
    warmup_steps = args.warmup_epochs * steps_per_epoch
    lr = lr_at(step, num_steps, warmup_steps, peak_lr)
    for group in optimizer.param_groups:
        if group["name"] != "probe":
            group["lr"] = lr * group.get("lr_scale", 1)
    return lr


def check_trained_parameters(module, optimizer):
    """Ends the run where a parameter with a gradient is not in the optimizer, or a trained one is
    not in the checkpoint. Warns of trained parameters that get no gradient."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in module.named_parameters()
            if p.grad is not None and id(p) not in trained]
    if lost:
        raise WeightsError(
            f"{', '.join(lost)}: not trained, for the optimizer was made before they took "
            "gradients. Make them, and set requires_grad, in the module's __init__.")
    unsaved = module.unsaved_prefixes()
    forgotten = [name for name, p in module.named_parameters()
                 if id(p) in trained and name.startswith(unsaved)]
    if forgotten:
        raise WeightsError(
            f"{', '.join(forgotten)}: trained, but not saved (persistent = False): a resumed run "
            "would lose them. Freeze them, or save them.")
    inactive = tuple(f"model.decoder_blocks.{i}." for i in range(
        module.model.active_decoder_blocks, len(module.model.decoder_blocks)))
    unused = [name for name, p in module.named_parameters()
              if id(p) in trained and p.grad is None and not name.startswith(inactive)]
    if unused:
        warnings.warn(f"no gradient reaches {', '.join(unused)}: they are not trained.")


def count_updates(optimizer):
    """Steps that were not skipped, by AdamW's own count."""
    counts = []
    for group in optimizer.param_groups:
        if group["name"] != "matrices":
            counts += [optimizer.state[p]["step"] for p in group["params"] if p in optimizer.state]
    # The largest: decoder blocks that a stage did not use count fewer
    return int(torch.stack(counts).max()) if counts else 0


@functools.cache
def cpu_has_bfloat16():  # without such instructions float32 is four times faster, same loss
    return "bf16" in Path("/proc/cpuinfo").read_text()


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of the first group are updated by their orthogonalised momentum.

    The update is timm.optim.Muon's with Nesterov's momentum. Matrices of one shape go through the
    Newton-Schulz iteration as one batch: ViT-B has 80 of 8 shapes. A step that GradScaler skips
    changes nothing, without waiting for the GPU.
    """

    @torch.no_grad()
    def step(self):
        matrix_group, *adamw_groups = self.param_groups
        self.param_groups = adamw_groups
        super().step()
        self.param_groups = [matrix_group, *adamw_groups]
        matrices_of_shape = {}
        for matrix in matrix_group["params"]:
            matrices_of_shape.setdefault(matrix.shape, []).append(matrix)
        for matrices in matrices_of_shape.values():
            self.step_together(matrices, matrix_group)

    def step_together(self, matrices, group):
        """A step of n matrices (out, in). The state of the first one holds all their momentum."""
        applied = 1 - getattr(self, "found_inf", 0)  # 0 where GradScaler skips the step
        grads = torch.stack([matrix.grad for matrix in matrices])  # (n, out, in)
        grads.nan_to_num_(0, 0, 0).div_(getattr(self, "grad_scale", 1))
        state = self.state[matrices[0]]
        if not state:
            state["step"] = torch.zeros(())  # AdamW asks for it when it loads a checkpoint
            state["momentum"] = torch.zeros_like(grads)
        state["momentum"].lerp_(grads, (1 - group["momentum"]) * applied)
        update = grads.lerp_(state["momentum"], group["momentum"])
        dtype = torch.bfloat16 if update.is_cuda or cpu_has_bfloat16() else torch.float32
        update = zeropower_via_newtonschulz(update, 5, NEWTON_SCHULZ, dtype=dtype).float()
        lr = group["lr"] * applied
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        update *= -0.2 * max(update.shape[1:]) ** 0.5 * lr  # 0.2: the size of AdamW's update
        torch._foreach_add_(matrices, update.unbind())

    def load_state_dict(self, state_dict):
        if "ns_steps" in state_dict["param_groups"][0]:
            raise WeightsError("its Muon is timm's, of an older version of this code")
        super().load_state_dict(state_dict)


# --- measuring
class Meter:
    """Collects scalars and times between two log lines, and makes a line of them.

    images_per_step: of one GPU. log_every: steps between two lines.
    """

    def __init__(self, device, images_per_step, world_size, log_every=1, first_loss=None,
                 skipped_before=0):
        self.device = device
        self.images_per_step = images_per_step
        self.world_size = world_size
        self.log_every = log_every
        self.first_loss = first_loss
        self.skipped_before = skipped_before  # steps that were skipped before this line began
        self.restart()

    def restart(self, compiles=False):
        """Starts a new log line. compiles: the first step compiles; the rates leave it out."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.sums = {}  # name -> tensor (2,): the sum of the finite values, and their count
        self.steps = 0
        self.start_clock()
        self.compiles = compiles

    def start_clock(self):
        """The rates count from here on."""
        wait_for_gpu()
        self.compiles = False
        self.steps_before_clock = self.steps
        self.data_time = 0.0  # seconds of waiting for the loader
        self.t0 = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        """The rates leave out what happens in this block."""
        wait_for_gpu()
        paused_at = time.monotonic()
        yield
        self.t0 += time.monotonic() - paused_at

    def timed(self, batches):
        """The same batches; the time in which the loader makes them wait is added to data_time."""
        t0 = time.monotonic()
        for batch in batches:
            self.data_time += time.monotonic() - t0
            yield batch
            t0 = time.monotonic()

    def add(self, scalars):
        """Adds a micro-batch's {name: scalar}, without waiting for the GPU."""
        for name, value in scalars.items():
            value = value.detach()
            if name not in self.sums:
                self.sums[name] = torch.zeros(2, device=self.device)
            self.sums[name] += torch.stack([value.nan_to_num(0, 0, 0), value.isfinite()])

    def means(self):
        """{name: mean of the finite values over all ranks}, NaN where none was finite."""
        sums = torch.stack(list(self.sums.values()))  # (names, 2)
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        return dict(zip(self.sums, means))

    def rates(self, flops):
        """img_s: images/s of all GPUs; data_wait: share of the time spent waiting for the loader;
        tflops: TFLOP/s of one GPU; mfu: their share of its peak; mem: GiB reserved on it.

        flops: to train on one image.
        """
        seconds = time.monotonic() - self.t0
        gpu_img_s = (self.steps - self.steps_before_clock) * self.images_per_step / seconds
        row = dict(img_s=gpu_img_s * self.world_size, data_wait=self.data_time / seconds,
                   tflops=gpu_img_s * flops / 1e12)
        if torch.cuda.is_available():
            for name, peak in PEAK_TFLOPS.items():
                if name in torch.cuda.get_device_name():
                    row["mfu"] = row["tflops"] / peak
            row["mem"] = torch.cuda.max_memory_reserved() / 2 ** 30
        return row

    def row(self, epoch, lr, skipped_steps):
        """The log line. Ends the run where no loss of the line was finite, or all steps skipped."""
        means = self.means()
        if self.first_loss is None and math.isfinite(means["loss"]):
            self.first_loss = means["loss"]
        all_skipped = skipped_steps - self.skipped_before == self.steps
        fails = all_skipped or not math.isfinite(means["loss"])
        if fails and self.steps > self.log_every / 2:  # in a short line a few steps may be all
            raise DataError("The loss or the gradients are not finite. Lower --blr, and start over "
                            "with --resume none. If you changed targets() or the loss, look for "
                            "NaN there.")
        self.skipped_before = skipped_steps
        return dict(epoch=epoch.index + 1, stage=epoch.stage_index + 1, res=epoch.stage.res,
                    mask_ratio=epoch.stage.mask_ratio, **means, lr=lr,
                    skipped_steps=skipped_steps, **self.rates(epoch.flops))


def wait_for_gpu():
    """Waits until the GPU's queue is empty, so that a clock that is read next is right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(board, bar, args, epochs, steps_done, row, scalars):
    """Writes a log line to the log and the bar; at an epoch's end it prints the line.

    The time left is computed from the FLOPs that are left, at the FLOP/s of this line: stages with
    other resolutions cost more or less.
    """
    log(board, steps_done, **row)
    now = epochs[row["epoch"] - 1]
    steps_per_epoch = bar.total // len(epochs)
    steps_left_here = (now.index + 1) * steps_per_epoch - steps_done
    later = sum(epoch.flops for epoch in epochs[now.index + 1:]) * steps_per_epoch
    steps_left = steps_left_here + later / now.flops  # as if all cost as much as now
    left = timedelta(seconds=int(steps_left * args.total_batch / row["img_s"]))
    losses = ", ".join(f"{name} {row[name]:.4f}" for name in scalars)
    bar.set_postfix_str(f"{losses}, {row['img_s']:.0f} img/s, {left} left")
    if steps_done % steps_per_epoch == 0:
        print0("  ".join(f"{name} {value:.4g}" for name, value in row.items()) + f"  left {left}")


def forever(loader):
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


def benchmark(args, module, compute_loss, optimizer, scaler, autocast, loader, epochs):
    """Times N steps of --batch-size in each stage: on random pictures, then with the loader."""
    flops_of_stage = {}  # stages that differ only in their share are timed once
    for epoch in epochs:
        flops_of_stage[epoch.stage._replace(share=1.0)] = epoch.flops
    for stage, source in itertools.product(flops_of_stage, ("random", "loader")):
        loader.set_stage(res=stage.res, scale=stage.scale)
        module.model.active_decoder_blocks = stage.decoder_depth
        meter = Meter(loader.device, args.batch_size, loader.world_size)
        batches = meter.timed(forever(loader))
        images, labels = next(batches)
        if source == "random":
            batches = itertools.repeat((torch.randint_like(images, 256), labels))
        noise = draw_noise((args.batch_size,), module.model, stage.res, 0, 0.0, loader.device)
        for step in range(-2, args.benchmark):  # the first two do not count
            if step <= 0:
                meter.restart()
            images, labels = next(batches)
            with autocast:
                loss = total_loss(compute_loss(images, labels, stage.mask_ratio, noise))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
            optimizer.zero_grad()
            meter.steps += 1
        wait_for_gpu()
        row = dict(source=source, **without_share(stage), batch_size=args.batch_size)
        print0(json.dumps(row | meter.rates(flops_of_stage[stage])))


# --- what a checkpoint says about the run
def settings_of(args, model, scheme, loader):
    """All that changes the result: a run that goes on must have the same."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in FREE}
    stages = [without_share(stage) for stage in scheme]  # args.stages holds the shares
    settings |= dict(num_samples=len(loader.indices), data_checksum=loader.checksum,
                     scheme_stages=stages, betas=PRETRAIN["betas"],
                     targets=source_of(models_mae.targets),
                     masking_noise=source_of(models_mae.masking_noise), probe_lr=PROBE_LR,
                     steps_per_epoch=loader.num_samples * args.repeat // args.total_batch)
    if args.optimizer == "muon":
        settings["muon_lr"] = MUON_LR
    return settings | model.settings


def source_of(function):
    """crc32 of a function's code, without its comments and its docstring; None without a source."""
    try:
        text = inspect.getsource(function)
        tree = ast.parse(textwrap.dedent(text))
    except (OSError, TypeError):
        return None
    except SyntaxError:  # the source of a lambda is no statement
        return zlib.crc32(text.encode())
    definition = tree.body[0]
    if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) is not None:
        del definition.body[0]
    return zlib.crc32(ast.unparse(tree).encode())


def scripts():
    """The files that make a run: this one, those that it imports, and one that imports it.

    They are the modules whose files lie in the folder of this file or of the program.
    """
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program is None:  # a notebook, or `python -`
        program = __file__
    folders = {Path(__file__).resolve().parent, Path(program).resolve().parent}
    paths = {Path(program).resolve()}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).suffix == ".py" and Path(file).resolve().parent in folders:
            paths.add(Path(file).resolve())
    return sorted(path for path in paths if path.is_file())


def keep_scripts(folder, step):
    """Copies the scripts to scripts/from_step_N if they differ from the newest copies there."""
    folder.mkdir(exist_ok=True)
    copies = sorted(folder.glob("from_step_*"), key=lambda path: int(path.name.split("_")[2]))
    newest = copies[-1] if copies else folder / "none"
    if all((newest / path.name).is_file() and
           (newest / path.name).read_bytes() == path.read_bytes() for path in scripts()):
        return
    target = folder / f"from_step_{step}"
    target.mkdir(exist_ok=True)
    for path in scripts():
        shutil.copyfile(path, target / path.name)


def say_what_changed(state, settings, sources):
    """Prints which scripts and extended settings changed since the checkpoint was written."""
    changed = [name for name, sha1 in state.get("sources", {}).items() if sources.get(name) != sha1]
    if changed:
        print0(f"Warning: {', '.join(changed)} changed since the checkpoint was written.")
    before = settings | state["settings"]
    extended = [f"{name} {before[name]} -> {settings[name]}" for name in EXTENDABLE
                if before[name] != settings[name]]
    if extended:
        print0(f"Extended at step {state['step']}: {', '.join(extended)}. Rate and stages follow "
               "the new schedule from here on.")


def save_run(folder, epoch, milestone, parts, **values):
    """Writes last.pt, and for a milestone stageN.pt too."""
    state = dict(epoch=epoch.index + 1, **values)
    state["model"] = state["model"] | {"active_decoder_blocks": epoch.stage.decoder_depth}
    state |= {name: part.state_dict() for name, part in parts.items()}
    if milestone:
        save_checkpoint(folder / f"stage{epoch.stage_index + 1}.pt", **state)
    save_checkpoint(folder / "last.pt", **state)


def main(args):
    start = time.monotonic()
    rank, world_size, device, stop = setup(args.seed, training=not args.benchmark)
    folder = Path(args.output_dir)
    last = folder / "last.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not args.benchmark:
        lock_folder(folder)
    if args.demo and rank == 0 and not Path(args.data).exists():
        builder = Path(__file__).with_name("build_beton.py")
        if subprocess.run([sys.executable, builder, "--demo"]).returncode:
            raise SystemExit("The demo's pictures could not be drawn: see above.")
    if world_size > 1:
        dist.barrier()

    # --- data
    with open_loader(args.data, 1) as loader:  # to know how many pictures there are
        indices = loader.indices
        num_pictures = loader.num_samples  # without those that are excluded
        fault = labels_fault(loader)
    if fault and args.probe != "off":
        print0(f"{args.data} {fault}: there is no online probe.")
        args.probe = "off"
    if args.benchmark:  # few pictures will do: they are read again and again
        indices = indices.repeat(math.ceil(args.batch_size * world_size / len(indices)))
    else:
        check_batches(num_pictures * args.repeat, args.total_batch, args.batch_size, world_size,
                      multiple=args.repeat, least=1 if args.probe == "off" else 2)
    shared = dict(num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world_size,
                  device=device, res=args.input_size)
    loader = open_loader(args.data, args.batch_size // args.repeat, scale=PRETRAIN["scale"],
                         order=args.order, indices=indices, **shared)
    val = None
    if args.probe != "off":
        val = open_loader(args.val_data, args.batch_size, train=False, **shared)
        check_classes(loader, val)
        if val.num_samples < 2:  # its BatchNorm takes a variance
            raise DataError(f"{args.val_data} holds one picture, and the online probe needs two. "
                            "Give more, or --probe off.")
    accum = args.total_batch // (args.batch_size * world_size)
    steps_per_epoch = loader.num_samples * args.repeat // args.total_batch
    num_steps = args.epochs * steps_per_epoch

    # --- model
    model = make_model(args)
    scheme = scheme_of(args, model)
    epochs = plan_epochs(args, model, scheme)
    module = ModelWithProbe(model, int(loader.labels.max()) + 1, args.probe, args.decoder_keep)
    ddp_model = module.to(device)
    if world_size > 1:  # DDP must know whether a stage leaves decoder blocks without gradients
        some_blocks_inactive = any(stage.decoder_depth < len(model.decoder_blocks)
                                   for stage in scheme)
        ddp_model = nn.parallel.DistributedDataParallel(
            module, gradient_as_bucket_view=True, find_unused_parameters=some_blocks_inactive)
    compute_loss = torch.compile(ddp_model, dynamic=False) if args.compile else ddp_model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    # --- optimizer
    optimizer = make_optimizer(module, args)
    group_names = [group["name"] for group in optimizer.param_groups]
    # Its scale stays 1: it is here to skip steps whose gradients are not finite, without waiting
    # for the GPU
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    if args.benchmark:
        benchmark(args, module, compute_loss, optimizer, scaler, autocast, loader, epochs)
        return leave()

    # --- resume
    settings = settings_of(args, model, scheme, loader)
    sources = {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in scripts()}
    about = dict(settings=settings, model=model.settings, model_class=type(model).__name__,
                 classes=loader.classes, sources=sources)
    parts = dict(modules=module, optimizer=optimizer, scaler=scaler, loader=loader)
    new_run = starts_over(args, folder, FREE)
    state = models_mae.resume(resume_path(args, folder, new_run), settings, vars(get_args([])),
                              EXTENDABLE, args.extend, **parts)
    first_step = 0
    first_loss = None
    skipped_before = 0
    if state:
        first_step = state["step"]
        first_loss = state["first_loss"]
        say_what_changed(state, settings, sources)
        for group, name in zip(optimizer.param_groups, group_names):
            group["name"] = name  # older checkpoints have no names
        skipped_before = first_step - count_updates(optimizer)
    if first_step > num_steps:
        raise WeightsError(
            f"{last} has done {first_step} steps, but --epochs {args.epochs} are {num_steps}: give "
            f"--epochs {math.ceil(first_step / steps_per_epoch)} or more.")
    check_ranks(step=first_step, batch_size=args.batch_size, **settings)
    if args.init and not state:
        decoder_fits = models_mae.init_from(model, args.model.removeprefix("mae_"), args.init)
        what = "the encoder and the decoder" if decoder_fits else "the encoder"
        print0(f"{args.init} gives {what}.")
    if first_step == num_steps:
        print0(f"{last}: this run of {args.epochs} epochs is finished.")
        return leave()
    print0(f"{args.model} from step {first_step} of {num_steps}: {num_pictures:,} pictures, "
           f"{world_size} x {args.batch_size} x {accum} a step, {loader.num_workers} threads, "
           f"{device.type}")

    # --- the run's folder
    board = None
    if rank == 0:
        begin_run(args, folder, new_run, world_size=world_size)
        keep_scripts(folder / "scripts", first_step)
        board = SummaryWriter(folder, purge_step=first_step + 1)
    viz_every = args.viz_every if rank == 0 else 0
    if viz_every and not model.predicts_pixels:
        print0("The targets are no pixels: there are no pictures of reconstructions.")
        viz_every = 0
    shown = val
    if viz_every and val is None:
        shown = open_loader(args.data, 12, train=False, indices=indices[:12],
                            res=args.input_size, num_workers=1, device=device, world_size=1)
    probe_every = max(1, args.epochs // 100)  # epochs; a hundred points of the curve cost little
    log_every = min(50, steps_per_epoch)

    # --- train
    meter = Meter(device, accum * args.batch_size, world_size, log_every, first_loss,
                  skipped_before)
    batches = training_batches(args, loader, model, epochs, first_step, num_steps, meter)
    hidden = None if rank == 0 else True  # None: tqdm hides the bar if there is no terminal
    bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden)
    saved_at = time.monotonic()
    for step in range(first_step, num_steps):
        epoch = epochs[step // steps_per_epoch]
        lr = set_lr(optimizer, step, num_steps, args)
        for micro in range(accum):
            images, labels, noise = next(batches)
            # DDP averages the gradients in the last one alone; without DDP nothing reads this
            ddp_model.require_backward_grad_sync = micro == accum - 1
            with autocast:
                scalars = compute_loss(images, labels, epoch.stage.mask_ratio, noise)
            scaler.scale(total_loss(scalars) / accum).backward()
            meter.add(scalars)
        if meter.steps == 0:
            check_trained_parameters(module, optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
        module.after_step(step + 1)
        meter.steps += 1
        bar.update()
        steps_done = step + 1
        epoch_ends = steps_done % steps_per_epoch == 0
        stopping = on_any_rank(stop) or steps_done == args.max_steps

        if epoch_ends or stopping or steps_done % log_every == 0:
            row = meter.row(epoch, lr, skipped_steps=steps_done - count_updates(optimizer))
            probe_is_due = (epoch.index + 1) % probe_every == 0 or steps_done == num_steps
            if val is not None and epoch_ends and probe_is_due:
                row["probe_top1"] = probe_accuracy(module, val, autocast)
            report(board, bar, args, epochs, steps_done, row, scalars)
            meter.restart()
        elif meter.compiles:
            meter.start_clock()

        stage_ends = epoch_ends and epoch.ends_stage
        if stopping or stage_ends or time.monotonic() - saved_at > 60 * args.save_minutes:
            with meter.paused():
                if rank == 0:
                    save_run(folder, epoch, stage_ends and steps_done < num_steps, parts,
                             step=steps_done, first_loss=meter.first_loss, **about)
            saved_at = time.monotonic()

        if viz_every and epoch_ends:
            if (epoch.index + 1) % viz_every == 0 or steps_done == num_steps:
                with meter.paused():
                    save_reconstructions(model, shown, epoch, step / num_steps, board, steps_done)
        if stopping:
            break
    batches.close()

    # --- end
    if steps_done == num_steps:
        if rank == 0:
            write_args(args, folder, world_size=world_size, finished=True)
        probe = ""
        if val is not None:
            probe = f"probe top-1 {row['probe_top1']:.1f} %, "
        print0(f"done: {args.epochs} epochs, loss {meter.first_loss:.3f} -> {row['loss']:.3f}, "
               f"{probe}{timedelta(seconds=int(time.monotonic() - start))}, {last}")
    else:
        print0(f"stopped at step {steps_done}: the same command goes on from {last}")
    if board:
        board.close()
    leave()
    stopped_by_signal = steps_done < num_steps and steps_done != args.max_steps
    sys.exit(1 if stopped_by_signal else 0)


def run(argv):
    """Runs a command line. Errors of data, weights and files end it with a message alone."""
    try:
        main(get_args(argv))
    except (DataError, WeightsError, OSError) as e:
        raise SystemExit(f"pretrain: {e}")


if __name__ == "__main__":
    run(sys.argv[1:])
