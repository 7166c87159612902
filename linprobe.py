"""Measures what frozen features are worth: linear probe and k-nearest neighbours.

    torchrun --nproc_per_node 8 linprobe.py --checkpoint runs/pretrain/last.pt  # as published
    python linprobe.py --checkpoint runs/pretrain/last.pt --cached   # features computed once
    python linprobe.py --checkpoint runs/pretrain/last.pt --knn      # no training at all
    python linprobe.py --checkpoint none                             # random weights, the floor
    python linprobe.py --checkpoint runs/pretrain/last.pt --features FILE.npz  # those of --data

--features writes arrays of a row for each picture, and ends: features (n, D) of centre crops in
float16, labels (n,), -1 for none, names (n,), paths in the source, if the file has them, and
samples (n,), numbers in the file. Else the last line is the result, which results.jsonl keeps:
    done: linear probe on cls features, top-1 92.00 % of 200 pictures, 0:01:05
"""
import argparse
import fcntl
import json
import os
import re
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import models_mae
from essl_loader import DataError, check_classes, open_loader
from schedules import check_batches, lr_at

# Flags that a resumed run may change; all others must be those of the run before
FREE = ("checkpoint", "data", "val_data", "output_dir", "batch_size", "compile", "resume",
        "num_workers", "save_minutes", "features")


def get_args(argv):
    both = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", both, {}))
    add = p.add_argument
    add("--checkpoint", required=True, help="ours, MAE's, timm's, Hugging Face's; none: random")
    add("--pool", default="cls", choices=("cls", "mean"), help="class token or mean of patches")
    add("--knn", action="store_true", help="k-nearest neighbours instead of a linear probe")
    add("--cached", action="store_true", help="train on features of centre crops, kept in memory")
    add("--features", type=Path, metavar="FILE.npz", help="only write features of --data here")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or class folders")
    add("--val-data", default="data/val_500_100.beton", help="held-out set, likewise")
    add("--output-dir", default="runs/linprobe", help="the run's folder")
    add("--model", choices=models_mae.VIT_SIZES, help="default the checkpoint's, else ViT-B")
    add("--input-size", type=int, help="resolution; default the checkpoint's, else 224")
    add("--epochs", type=int, default=90, help="passes over the data")
    add("--warmup-epochs", type=float, default=10, help="linear warm-up")
    add("--blr", type=float, default=0.1, help="learning rate for 256 images a step")
    add("--weight-decay", type=float, default=0.0, help="of the matrix")
    add("--total-batch", type=int, default=16384, help="pictures a step, over all GPUs")
    add("--batch-size", type=int, default=512, help="of one GPU at once; the rest by accumulation")
    on_off = argparse.BooleanOptionalAction
    add("--compile", action=on_off, default=torch.cuda.is_available(), help="by torch.compile")
    add("--seed", type=int, default=0, help="of weights, order and crops")
    add("--resume", default="auto", help="auto: from the run's last.pt if there; none; or a PATH")
    add("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    add("--order", default="random", choices=("random", "pages"), help="pages: for large files")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    args = p.parse_args(re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                        for word in argv)
    if args.features and args.features.suffix != ".npz":
        p.error(f"--features writes a .npz, found {args.features}.")
    if args.warmup_epochs > args.epochs / 4:
        args.warmup_epochs = args.epochs / 4
        print0(f"--warmup-epochs is shortened to {args.warmup_epochs:g}, a quarter of --epochs.")
    return args


# --- setup: the same text in pretrain.py, finetune.py and linprobe.py
def setup(seed, training):
    """torchrun's environment -> rank, world size, device; a flag that signals set in training."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and "RANK" not in os.environ:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        raise SystemExit(
            f"Slurm starts {tasks} processes (SLURM_NTASKS), and each would be a run of its own. "
            f"This makes one run of them: srun --ntasks {nodes} --cpus-per-task $SLURM_CPUS_ON_NODE"
            f" torchrun --nnodes {nodes} --nproc_per_node {tasks // nodes} --rdzv-backend c10d "
            f"--rdzv-endpoint $(hostname):29500 {shlex.join(sys.argv)} (for one process alone: "
            "unset SLURM_NTASKS)")
    if rank >= world:
        raise SystemExit(f"RANK {rank} needs a WORLD_SIZE above it. torchrun sets both.")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpu = os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())
        device = torch.device("cuda", int(gpu))
        torch.cuda.set_device(device)
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise SystemExit("torch cannot use the GPU. Update its driver; CPU: CUDA_VISIBLE_DEVICES=")
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = connect(rank, world)
        dist.init_process_group(backend, None, timedelta(hours=1), world, rank, store)
    torch.manual_seed(seed)
    stop = torch.zeros(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if training else ():
        signal.signal(number, lambda *_, flag=stop.numpy(): flag.fill(1))  # also amid torch.compile
    return rank, world, device, stop


def connect(rank, world, minutes=5):
    """The store by which the ranks find one another, behind a prefix that is new at each start.

    After a restart torchrun's store still holds the addresses of dead ranks, and the agents of two
    machines count restarts apart. So each rank asks under a new name, and rank 0 answers with the
    prefix. Without torchrun's agent rank 0 serves the store.
    """
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        raise SystemExit(f"WORLD_SIZE is {world}, but {', '.join(sorted(missing))} not set. "
                         "torchrun sets all of them.")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(minutes=minutes)
    name = uuid.uuid4().hex
    try:
        store = dist.TCPStore(*address, is_master=own_server, timeout=limit, wait_for_workers=False)
        if rank > 0:
            store.set(f"rank {rank}", name)
            prefix = store.get(name).decode()  # waits for rank 0
            store.add(prefix, 1)
            return dist.PrefixStore(prefix, store)
    except dist.DistError as e:
        raise SystemExit(f"Rank {rank}: no answer of rank 0 at {address[0]}:{address[1]}. {e}")
    keys = [f"rank {other}" for other in range(1, world)]
    start = time.monotonic()
    while store.add(name, 0) < world - 1:
        for key in keys:  # what a dead rank asked gets an answer too, which nobody reads
            if store.check([key]):
                store.set(store.get(key), name)
        if time.monotonic() - start > limit.total_seconds():
            raise SystemExit(f"{store.add(name, 0) + 1} of {world} ranks came within {minutes} "
                             "minutes. Start all of them.")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def lock_folder(folder):
    """A run has its folder alone. The kernel takes the lock back when the process ends."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)  # closing it would end the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(file, 200, 0).decode() or "another process"
        raise SystemExit(f"{folder} is in use by {owner}. Wait until that has ended (its lock ends "
                         "with it), or give another --output-dir.")
    except OSError as e:
        return print0(f"{folder}: its file system has no locks ({e}). Start no second run in it.")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    for path in (*folder.glob("*.pt.tmp-*"), *folder.glob("args.json.tmp-*")):
        path.unlink()  # of runs that were killed while they saved


def is_first_start(args, folder, free):
    """Whether --resume none or PATH counts: not where the same command began the folder's run.

    free: flags in which it may differ. Such a run goes on from its last.pt.
    """
    last = folder / "last.pt"
    if args.resume == "auto" or Path(args.resume).absolute() == last.absolute():
        return False
    try:
        before = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return True
    if args.resume == "none" and before.get("finished"):
        return True
    command = json.loads(json.dumps(vars(args), default=str))
    return any(before.get(flag) != value for flag, value in command.items()
               if flag not in free or flag == "resume")


def begin_run(args, folder):
    """An earlier run in the folder goes into old_1/, and --resume PATH becomes last.pt."""
    tmp_path = folder / f"last.pt.tmp-{os.getpid()}"
    if args.resume != "none":
        shutil.copyfile(args.resume, tmp_path)
    put_aside(folder)
    if args.resume != "none":
        os.replace(tmp_path, folder / "last.pt")


def put_aside(folder):
    """What an earlier run left in a folder goes into old_1/, or the next free number."""
    patterns = ("last.pt", "best.pt", "stage*.pt", "recon_*.png", "args.json", "log.jsonl",
                "results.jsonl", "events.out.*", "scripts")
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    if not files:
        return
    number = 1
    while (folder / f"old_{number}").exists():
        number += 1
    old = folder / f"old_{number}"
    old.mkdir()
    for path in files:
        path.rename(old / path.name)
    print0(f"The earlier run in {folder} is now in {old}.")


def write_args(args, folder, **values):
    """args.json: the flags of the run in this folder."""
    tmp_path = folder / f"args.json.tmp-{os.getpid()}"
    tmp_path.write_text(json.dumps(vars(args) | values, indent=1, default=str))
    os.replace(tmp_path, folder / "args.json")


def check_ranks(**values):
    """Ends the run where ranks differ: they would wait for one another, or train on other data."""
    if not dist.is_initialized():
        return
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, values)
    differences = []
    for name in values:
        found = [f"{other[name]} on rank {rank}" for rank, other in enumerate(ranks)]
        if any(other[name] != ranks[0][name] for other in ranks):
            differences.append(f"{name}: {', '.join(found)}")
    if differences and dist.get_rank() > 0:
        raise SystemExit(1)  # rank 0 says it
    if differences:
        raise SystemExit(f"The ranks differ. {'; '.join(differences)}. All machines must see the "
                         "same data and --output-dir, and get the same command.")


def leave():
    """The ranks end together: torchrun would kill rank 0 while it writes if another ended first."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def print0(text):
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)


def save_checkpoint(path, **state):  # written aside, then renamed: path is always whole
    tmp_path = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp_path, "wb") as f:
            torch.save(state, f)
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch makes a RuntimeError of a full disk
        tmp_path.unlink(missing_ok=True)
        reason = e if isinstance(e, OSError) else e.__context__ or e
        raise SystemExit(f"{path} cannot be written: {reason}. Make room for it, then give the "
                         "same command again: the run goes on from its last checkpoint.")
    os.replace(tmp_path, path)


def log(board, step, **values):  # board is None on all ranks but 0
    if board:
        with open(Path(board.log_dir, "log.jsonl"), "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            board.add_scalar(name, value, step)
# --- end setup


# --- features
def encoded(model, loader, autocast, stop=None):
    """The loader's batches with features (B, D) in the place of pictures; `stop` ends the run."""
    for images, labels in loader:
        if stop:
            raise SystemExit("linprobe: stopped before training; give the command again.")
        # The last batch may be short: not worth compiling for, so it goes by the plain forward
        encode = model if len(images) == loader.batch_size else model.forward
        with torch.no_grad(), autocast:
            features = encode(images)
        yield features.float(), labels  # outside: a generator's no_grad would reach its caller


def store_features(model, loader, autocast, stop):
    """All features (n, D) as one float16 tensor and labels (n,) on the CPU, on every rank."""
    bar = tqdm(encoded(model, loader, autocast, stop), "features", len(loader), disable=None)
    features, labels = zip(*((x.half().cpu(), y.cpu()) for x, y in bar))
    share = slice(loader.rank, None, loader.world_size)  # a rank has every world_size-th picture
    all_features = torch.zeros(loader.num_samples, model.embed_dim, dtype=torch.float16)
    all_labels = torch.zeros(loader.num_samples, dtype=torch.int64)
    all_features[share] = torch.cat(features)
    all_labels[share] = torch.cat(labels)
    if dist.is_initialized():  # the other ranks' are zeros
        dist.all_reduce(all_features)
        dist.all_reduce(all_labels)
    return all_features, all_labels


def write_features(path, model, loader, autocast):
    """All features of a set, with what leads from a row back to its picture, in an .npz."""
    features, labels = store_features(model, loader, autocast, None)
    samples = np.setdiff1d(loader.indices, loader.excluded)
    arrays = dict(features=features.numpy(), labels=labels.numpy(), samples=samples)
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
    print0(f"done: {len(features):,} features of {features.shape[1]} numbers in {path}")


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


def make_optimizer(matrix, vector, weight_decay):
    """LARS: trust scaling and weight decay for the matrix alone."""
    matrix = {"params": [matrix], "always_adapt": True, "weight_decay": weight_decay}
    return Lars([matrix, {"params": [vector]}], momentum=0.9, trust_coeff=0.001)


def main(args):
    start = time.monotonic()
    if args.features and args.features.exists():
        raise DataError(f"{args.features} exists: it is not replaced. Name another file.")
    rank, world, device, stop = setup(args.seed, training=not (args.knn or args.features))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not (args.knn or args.features):
        lock_folder(folder)
    last = folder / "last.pt"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    # --- model, frozen
    weights, ckpt_settings, _ = models_mae.read_weights(args.checkpoint)
    vit = models_mae.vit_settings(args.model, ckpt_settings, args.checkpoint)
    size = args.input_size or ckpt_settings.get("img_size", 224)
    model = models_mae.ViT(vit, size, classes=0, pool=args.pool)
    if weights:
        models_mae.load_into(model, weights, args.checkpoint)
    model = model.to(device).eval().requires_grad_(False)
    if args.compile:
        model.compile(dynamic=False)

    # --- data. The published crop tries one box and clips it; ours tries ten, of the same areas
    shared = dict(res=size, num_workers=args.num_workers, seed=args.seed, rank=rank,
                  world_size=world, device=device)
    if args.features:
        loader = open_loader(args.data, args.batch_size, train=False, **shared)
        return write_features(args.features, model, loader, autocast)
    with open_loader(args.data, 1) as loader:
        if not args.knn:
            check_batches(loader.num_samples, args.total_batch, args.batch_size, world, least=2)
    stored = args.cached or args.knn
    loader = open_loader(args.data, args.batch_size, train=not stored, scale=(0.08, 1.0),
                         order=args.order, **shared)
    val = open_loader(args.val_data, args.batch_size, train=False, **shared)
    check_classes(loader, val)
    classes = len(loader.classes or ()) or int(loader.labels.max()) + 1

    # --- head and optimizer
    accum = args.total_batch // (args.batch_size * world)
    steps_per_epoch = loader.num_samples // args.total_batch
    steps = args.epochs * steps_per_epoch
    peak_lr = args.blr * args.total_batch / 256
    head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6),
                         nn.Linear(model.embed_dim, classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    ddp_head = head.to(device)
    if world > 1:
        ddp_head = nn.parallel.DistributedDataParallel(head)
    optimizer = make_optimizer(head[1].weight, head[1].bias, args.weight_decay)

    # --- resume; then features, so that a wrong flag ends the run before they are computed
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= dict(num_samples=len(loader.indices), classes=classes, size=size, **vit)
    settings["weights"] = f"{sum(v.double().abs().sum() for v in weights.values()):.9g}"
    parts = dict(head=head, optimizer=optimizer)
    settings["data_checksum"] = loader.checksum
    first_start = is_first_start(args, folder, FREE)
    source = args.resume
    if last.exists() and not first_start:
        source = "auto"
    if args.knn:
        source = "none"
    state = models_mae.resume(source, last, settings, vars(get_args(["--checkpoint="])), **parts)
    step = state["step"] if state else 0
    check_ranks(step=step, batch_size=args.batch_size, **settings)
    if stored:
        bank, bank_labels = store_features(model, loader, autocast, stop)
    val_features, val_labels = store_features(model, val, autocast, stop)  # they never change

    def measure(score, batch_size):  # score: features (B, D) -> (B, classes)
        share = torch.arange(rank, len(val_features), world)
        batches = stored_batches(val_features, val_labels, share, batch_size, device)
        return models_mae.accuracy(((score(x), y) for x, y in batches), device)

    def finish(kind, result):
        row = json.dumps(dict(kind=kind, pool=args.pool, checkpoint=args.checkpoint, **result))
        if rank == 0:
            with open(folder / "results.jsonl", "a") as f:
                f.write(row + "\n")
        print0(f"done: {kind} on {args.pool} features, top-1 {result['top1']:.2f} % of "
               f"{result['n']:,} pictures, {timedelta(seconds=int(time.monotonic() - start))}")

    if args.knn:
        bank = F.normalize(bank.to(device).float(), dim=1)  # float16 would make ties
        bank_labels = bank_labels.to(device)
        batch_size = max(1, min(512, 2 ** 26 // len(bank)))  # the similarities take memory
        result = measure(lambda x: knn_score(x, bank, bank_labels, classes), batch_size)
        finish("kNN", result)
        return leave()

    # --- train
    if rank == 0:
        if first_start:
            begin_run(args, folder)
        write_args(args, folder, world_size=world)
    board = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    print0(f"{args.checkpoint}, {args.pool} features, from step {step} of {steps}, {device.type}")

    def checkpoint():
        if not (loss_sum.isfinite() and head[1].weight.isfinite().all()):
            raise DataError("The loss is not finite. Lower --blr, start over: --resume none.")
        if rank == 0:
            save_checkpoint(last, step=step, settings=settings, model=model.settings,
                            **{k: part.state_dict() for k, part in parts.items()})
    saved_at = time.monotonic()
    stopping = False
    for epoch in range(step // steps_per_epoch, args.epochs):
        done = step % steps_per_epoch * args.total_batch  # pictures of this epoch, all ranks
        if stored:
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(loader.num_samples, generator=rng)
            order = order[done:steps_per_epoch * args.total_batch][rank::world]
            batches = stored_batches(bank, bank_labels, order, args.batch_size, device)
        else:
            loader.set_epoch(epoch)
            loader.load_state_dict(loader.state_dict() | {"samples": done})
            batches = encoded(model, loader, autocast)
        loss_sum = torch.zeros((), device=device)
        first_step = step
        while step < (epoch + 1) * steps_per_epoch and not stopping:
            if time.monotonic() - saved_at > 60 * args.save_minutes:
                checkpoint()
                saved_at = time.monotonic()
            lr = lr_at(step, steps, args.warmup_epochs * steps_per_epoch, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(accum):
                features, labels = next(batches)
                ddp_head.require_backward_grad_sync = micro == accum - 1  # DDP averages then
                loss = F.cross_entropy(ddp_head(features), labels)
                (loss / accum).backward()
                loss_sum += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stopping = stop.clone()  # a signal may come at any moment: the ranks agree on a copy
            if world > 1:
                dist.all_reduce(stopping, op=dist.ReduceOp.MAX)  # on the CPU: waits for no GPU
        batches.close()

        if step == (epoch + 1) * steps_per_epoch:
            if world > 1:
                dist.all_reduce(loss_sum)
                for buffer in head.buffers():  # each rank's BatchNorm saw other pictures
                    dist.broadcast(buffer, 0)
            result = measure(head.eval(), args.batch_size)
            head.train()
            mean_loss = loss_sum.item() / ((step - first_step) * accum * world)
            values = dict(epoch=epoch + 1, lr=lr, loss=mean_loss, **result)
            print0("  ".join(f"{k} {v:.4g}" for k, v in values.items()))
            log(board, step, **values)
        checkpoint()
        saved_at = time.monotonic()
        if stopping:
            break

    # --- end
    if board:
        board.close()
    if rank == 0 and step == steps:
        write_args(args, folder, world_size=world, finished=True)
    if step == steps:
        finish("linear probe", measure(head.eval(), args.batch_size))  # of a finished run too
    else:
        print0(f"stopped at step {step}; the same command goes on from {last}")
    leave()
    sys.exit(step < steps)


if __name__ == "__main__":
    try:
        main(get_args(sys.argv[1:]))
    except (DataError, models_mae.WeightsError, OSError) as e:
        raise SystemExit(f"linprobe: {e}")
