"""Measures what frozen features are worth: linear probe and k-nearest neighbours.

    torchrun --nproc_per_node 8 linprobe.py --checkpoint runs/pretrain/last.pt  # as published
    python linprobe.py --checkpoint runs/pretrain/last.pt --cached   # features computed once
    python linprobe.py --checkpoint runs/pretrain/last.pt --knn      # no training at all
    python linprobe.py --checkpoint none                             # random weights: the lowest
    python linprobe.py --checkpoint runs/pretrain/last.pt --features FILE.npz  # only writes them

--features writes arrays with a row for each picture: features (n, D) of centre crops in float16,
labels (n,), -1 for none, samples (n,), the picture's number in the file, names (n,), its path in
the source, if the file has names, and pool, what --pool says. Without --features the last line is
the result, which results.jsonl keeps:
    done: linear probe on cls features, top-1 92.00 % of 200 pictures, 0:01:05
"""
import argparse
import contextlib
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars
from timm.utils import random_seed
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import models_mae
from essl_loader import DataError, check_classes, open_loader
from models_mae import WeightsError
from schedules import check_batches, lr_at

# A resumed run may change these flags; all others must stay as they were
FREE = ("checkpoint", "data", "val_data", "output_dir", "batch_size", "compile", "resume",
        "num_workers", "save_minutes", "features")


def get_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    add("--checkpoint", required=True,
        help="the encoder: ours, official MAE's, timm's, Hugging Face's; none: random weights")
    add("--pool", default="cls", choices=("cls", "mean"),
        help="the features: the class token, or the mean of the patch tokens")
    add("--knn", action="store_true", help="k-nearest neighbours instead of a linear probe")
    add("--cached", action="store_true",
        help="train on features of centre crops, which are computed once and kept in memory")
    add("--features", type=Path, metavar="FILE.npz",
        help="only write the features of --data to this file")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or class folders")
    add("--val-data", default="data/val_500_100.beton", help="held-out set: .beton or folder")
    add("--output-dir", default="runs/linprobe", help="the run's folder")
    add("--model", choices=models_mae.VIT_SIZES,
        help="model size; the default is the checkpoint's, else ViT-B")
    add("--input-size", type=int,
        help="resolution in pixels; the default is the checkpoint's, else 224")
    add("--epochs", type=int, default=90, help="passes over the data")
    add("--warmup-epochs", type=float, default=10,
        help="epochs in which the learning rate rises from 0; at most a quarter of --epochs")
    add("--blr", type=float, default=0.1, help="learning rate for 256 images a step")
    add("--weight-decay", type=float, default=0.0, help="weight decay; the bias has none")
    add("--total-batch", type=int, default=16384, help="pictures in a step, over all GPUs")
    add("--batch-size", type=int, default=512,
        help="pictures that a GPU computes at once; gradients are summed up to --total-batch")
    add("--compile", action=on_off, default=torch.cuda.is_available(),
        help="use torch.compile; the default on a GPU")
    add("--seed", type=int, default=0, help="decides weights, order and crops")
    add("--resume", default="auto",
        help="auto: go on from the run's last.pt if there is one; none: begin a new run; PATH: "
             "begin from this checkpoint. none and PATH count at the first start only")
    add("--num-workers", type=int, default=0,
        help="loader threads per process; 0: all cores that the process may use")
    add("--order", default="random", choices=("random", "pages"),
        help="pages: shuffle within 512 MB, for files that are larger than the memory")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    args = parse_flags(p, argv)
    if args.features and args.features.suffix != ".npz":
        p.error(f"--features writes a .npz, but its name is {args.features}.")
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


# --- features
def encoded(encoder, loader, autocast, stop=None):
    """The loader's batches, with features (B, D) instead of pictures. A signal ends the run."""
    for images, labels in loader:
        if stop:
            raise SystemExit("linprobe: stopped before training. Give the same command again.")
        # The last batch may be short: not worth compiling for, so it goes by the plain forward
        encode = encoder if len(images) == loader.batch_size else encoder.forward
        with torch.no_grad(), autocast:
            features = encode(images)
        yield features.float(), labels  # outside: a generator's no_grad would reach its caller


def store_features(encoder, loader, autocast, stop):
    """All features (n, D) as one float16 tensor and labels (n,) on the CPU, on every rank."""
    share = slice(loader.rank, None, loader.world_size)  # a rank has every world_size-th picture
    own_features = []
    own_labels = []
    batches = encoded(encoder, loader, autocast, stop)
    for features, labels in tqdm(batches, "features", len(loader), disable=None):
        own_features.append(features.half().cpu())
        own_labels.append(labels.cpu())
    all_features = torch.zeros(loader.num_samples, encoder.embed_dim, dtype=torch.float16)
    all_labels = torch.zeros(loader.num_samples, dtype=torch.int64)
    all_features[share] = torch.cat(own_features)
    all_labels[share] = torch.cat(own_labels)
    if dist.is_initialized():  # the other ranks' rows are zeros here: the sum has all
        dist.all_reduce(all_features)
        dist.all_reduce(all_labels)
    return all_features, all_labels


def write_features(path, encoder, pool, loader, autocast):
    """Writes all features of a set, with what leads from a row back to its picture, as .npz."""
    features, labels = store_features(encoder, loader, autocast, None)
    samples = np.setdiff1d(loader.indices, loader.excluded)
    arrays = dict(features=features.numpy(), labels=labels.numpy(), samples=samples,
                  pool=np.array(pool))
    if loader.names:
        arrays["names"] = np.array([loader.names[i] for i in samples])
    else:
        print0(f"{loader.path} has no names of pictures: samples are their numbers in it.")
    if loader.rank == 0:
        tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            with open(tmp_path, "xb") as f:
                np.savez(f, **arrays)
            os.replace(tmp_path, path)
        finally:
            tmp_path.unlink(missing_ok=True)
    print0(f"done: {len(features):,} {pool} features of {features.shape[1]} numbers in {path}")


def stored_batches(features, labels, order, batch_size, device):
    """Batches (B, D), (B,) of stored features in an order; the last one may be short."""
    for rows in order.split(batch_size):
        yield features[rows].to(device).float(), labels[rows].to(device)


def knn_score(features, bank, bank_labels, classes, k=20, temperature=0.07):
    """(B, D) -> votes (B, classes): exp(cosine / temperature) of the k nearest in bank (n, D)."""
    near = F.normalize(features, dim=1) @ bank.T  # (B, n)
    near, index = near.topk(min(k, len(bank)))
    votes = torch.zeros(len(features), classes, device=bank.device)
    return votes.scatter_add_(1, bank_labels[index], ((near - 1) / temperature).exp())


# --- training the probe
def training_batches(args, loader, encoder, stored, autocast, first_step, num_steps):
    """Yields micro-batches, features (B, D) and labels (B,), accum of them for each step.

    stored: the features and labels of the training set, which each epoch takes in another order.
    None: the loader's random crops are encoded.
    """
    accum = args.total_batch // (args.batch_size * loader.world_size)
    steps_per_epoch = num_steps // args.epochs
    for epoch in range(first_step // steps_per_epoch, args.epochs):
        steps_skipped = max(0, first_step - epoch * steps_per_epoch)  # in the epoch of a resume
        done = steps_skipped * args.total_batch  # pictures of this epoch, of all ranks
        if stored:
            features, labels = stored
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(features), generator=rng)
            order = order[done:steps_per_epoch * args.total_batch]
            order = order[loader.rank::loader.world_size]
            batches = stored_batches(features, labels, order, args.batch_size, loader.device)
        else:
            loader.set_epoch(epoch)
            loader.load_state_dict(loader.state_dict() | {"samples": done})
            batches = encoded(encoder, loader, autocast)
        with contextlib.closing(batches):
            epoch_start = epoch * steps_per_epoch
            for step in range(epoch_start + steps_skipped, epoch_start + steps_per_epoch):
                seed_step(args.seed, step, loader.rank)
                yield from itertools.islice(batches, accum)


def make_head(dim, classes):
    """MAE's linear probe: BatchNorm without weights, and a linear layer."""
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


def make_optimizer(matrix, vector, weight_decay):
    """LARS: trust scaling and weight decay for the matrix alone."""
    matrix_group = {"params": [matrix], "always_adapt": True, "weight_decay": weight_decay}
    return Lars([matrix_group, {"params": [vector]}], momentum=0.9, trust_coeff=0.001)


def set_lr(optimizer, step, num_steps, args):
    """Sets a step's learning rate in both groups, and returns it."""
    peak_lr = args.blr * args.total_batch / 256
    warmup_steps = args.warmup_epochs * (num_steps // args.epochs)
    lr = lr_at(step, num_steps, warmup_steps, peak_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def mean_over_ranks(loss_sum, micro_batches, head):
    """The epoch's mean loss. Rank 0's BatchNorm goes to all ranks: each saw other pictures."""
    if dist.is_initialized():
        dist.all_reduce(loss_sum)
        micro_batches *= dist.get_world_size()
        for buffer in head.buffers():
            dist.broadcast(buffer, 0)
    return loss_sum.item() / micro_batches


# --- results
def measure(score, val_features, val_labels, batch_size, rank, world_size, device):
    """{top1, top5, n} of the held-out features; score: features (B, D) -> (B, classes)."""
    own = torch.arange(rank, len(val_features), world_size)
    batches = stored_batches(val_features, val_labels, own, batch_size, device)
    return models_mae.accuracy(((score(x), y) for x, y in batches), device)


def finish(args, kind, result, start, rank):
    """Adds the result to results.jsonl and prints the last line."""
    if rank == 0:
        row = dict(kind=kind, pool=args.pool, checkpoint=args.checkpoint, **result)
        with open(Path(args.output_dir, "results.jsonl"), "a") as f:
            f.write(json.dumps(row) + "\n")
    print0(f"done: {kind} on {args.pool} features, top-1 {result['top1']:.2f} % of "
           f"{result['n']:,} pictures, {timedelta(seconds=int(time.monotonic() - start))}")


def settings_of(args, loader, weights, vit, size, classes):
    """All that changes the result: a run that goes on must have the same."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in FREE}
    sum_of_weights = sum(tensor.double().abs().sum() for tensor in weights.values())
    return settings | vit | dict(
        num_samples=len(loader.indices), steps_per_epoch=loader.num_samples // args.total_batch,
        data_checksum=loader.checksum, classes=classes, size=size,
        weights=f"{sum_of_weights:.9g}")


def main(args):
    start = time.monotonic()
    trains = not (args.knn or args.features)
    if args.features and args.features.exists():
        raise DataError(f"{args.features} exists and is not replaced. Name another file.")
    rank, world_size, device, stop = setup(args.seed, training=trains)
    folder = Path(args.output_dir)
    last = folder / "last.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and trains:
        lock_folder(folder)

    # --- encoder, frozen
    weights, ckpt_settings, _ = models_mae.read_weights(args.checkpoint)
    vit = models_mae.vit_settings(args.model, ckpt_settings, args.checkpoint)
    size = args.input_size or ckpt_settings.get("img_size", 224)
    encoder = models_mae.ViT(vit, size, classes=0, pool=args.pool)
    if weights:
        models_mae.load_into(encoder, weights, args.checkpoint)
    encoder = encoder.to(device).eval().requires_grad_(False)
    if args.compile:
        encoder.compile(dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    # --- data
    shared = dict(res=size, num_workers=args.num_workers, seed=args.seed, rank=rank,
                  world_size=world_size, device=device)
    if args.features:
        loader = open_loader(args.data, args.batch_size, train=False, **shared)
        return write_features(args.features, encoder, args.pool, loader, autocast)
    if trains:
        with open_loader(args.data, 1) as loader:  # to know how many pictures there are
            check_batches(loader.num_samples, args.total_batch, args.batch_size, world_size,
                          least=2)  # a BatchNorm is trained
    stores = args.cached or args.knn
    # The published crop tries one box and clips it; ours tries ten, of the same areas
    loader = open_loader(args.data, args.batch_size, train=not stores, scale=(0.08, 1.0),
                         order=args.order, **shared)
    val = open_loader(args.val_data, args.batch_size, train=False, **shared)
    check_classes(loader, val)
    classes = len(loader.classes or ()) or int(loader.labels.max()) + 1

    # --- nearest neighbours
    if args.knn:
        check_ranks(**settings_of(args, loader, weights, vit, size, classes))
        bank, bank_labels = store_features(encoder, loader, autocast, stop)
        val_features, val_labels = store_features(encoder, val, autocast, stop)
        bank = F.normalize(bank.to(device).float(), dim=1)  # float16 would make ties
        bank_labels = bank_labels.to(device)
        batch_size = max(1, min(512, 2 ** 26 // len(bank)))  # the similarities take memory

        def score(features):
            return knn_score(features, bank, bank_labels, classes)

        result = measure(score, val_features, val_labels, batch_size, rank, world_size, device)
        finish(args, "kNN", result, start, rank)
        return leave()

    # --- head and optimizer
    accum = args.total_batch // (args.batch_size * world_size)
    steps_per_epoch = loader.num_samples // args.total_batch
    num_steps = args.epochs * steps_per_epoch
    head = make_head(encoder.embed_dim, classes).to(device)
    ddp_head = head
    if world_size > 1:
        ddp_head = nn.parallel.DistributedDataParallel(head)
    optimizer = make_optimizer(head[1].weight, head[1].bias, args.weight_decay)

    # --- resume; then features, so that a wrong flag ends the run before they are computed
    settings = settings_of(args, loader, weights, vit, size, classes)
    parts = dict(head=head, optimizer=optimizer)
    new_run = starts_over(args, folder, FREE)
    state = models_mae.resume(resume_path(args, folder, new_run), settings,
                              vars(get_args(["--checkpoint="])), **parts)
    first_step = state["step"] if state else 0
    check_ranks(step=first_step, batch_size=args.batch_size, **settings)
    stored = None
    if stores:
        stored = store_features(encoder, loader, autocast, stop)
    val_features, val_labels = store_features(encoder, val, autocast, stop)  # they never change
    val_set = (val_features, val_labels, args.batch_size, rank, world_size, device)

    # --- the run's folder
    board = None
    if rank == 0:
        begin_run(args, folder, new_run, world_size=world_size)
        board = SummaryWriter(folder, purge_step=first_step + 1)
    print0(f"{args.checkpoint}, {args.pool} features, from step {first_step} of {num_steps}, "
           f"{device.type}")

    # --- train
    batches = training_batches(args, loader, encoder, stored, autocast, first_step, num_steps)
    loss_sum = torch.zeros((), device=device)  # of this epoch
    micro_batches = 0  # whose losses are in loss_sum
    saved_at = time.monotonic()
    steps_done = first_step
    for step in range(first_step, num_steps):
        lr = set_lr(optimizer, step, num_steps, args)
        for micro in range(accum):
            features, labels = next(batches)
            # DDP averages the gradients in the last one alone; without DDP nothing reads this
            ddp_head.require_backward_grad_sync = micro == accum - 1
            loss = F.cross_entropy(ddp_head(features), labels)
            (loss / accum).backward()
            loss_sum += loss.detach()
            micro_batches += 1
        optimizer.step()
        optimizer.zero_grad()
        steps_done = step + 1
        epoch_ends = steps_done % steps_per_epoch == 0
        stopping = on_any_rank(stop)

        if epoch_ends:
            mean_loss = mean_over_ranks(loss_sum, micro_batches, head)
            result = measure(head.eval(), *val_set)
            head.train()
            row = dict(epoch=steps_done // steps_per_epoch, lr=lr, loss=mean_loss, **result)
            print0("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
            log(board, steps_done, **row)

        minutes = (time.monotonic() - saved_at) / 60
        if epoch_ends or stopping or minutes > args.save_minutes:
            if not (loss_sum.isfinite() and head[1].weight.isfinite().all()):
                raise DataError("The loss is not finite. Lower --blr, and start over with --resume "
                                "none.")
            if rank == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(last, step=steps_done, settings=settings, model=encoder.settings,
                                **states)
            saved_at = time.monotonic()
        if epoch_ends:
            loss_sum.zero_()
            micro_batches = 0
        if stopping:
            break
    batches.close()

    # --- end
    if board:
        board.close()
    if steps_done == num_steps:
        if rank == 0:
            write_args(args, folder, world_size=world_size, finished=True)
        finish(args, "linear probe", measure(head.eval(), *val_set), start, rank)
    else:
        print0(f"stopped at step {steps_done}: the same command goes on from {last}")
    leave()
    sys.exit(1 if steps_done < num_steps else 0)


if __name__ == "__main__":
    try:
        main(get_args(sys.argv[1:]))
    except (DataError, WeightsError, OSError) as e:
        raise SystemExit(f"linprobe: {e}")
