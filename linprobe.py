"""Measures what frozen features are worth: linear probe and k-nearest neighbours.

    torchrun --nproc_per_node 8 linprobe.py --checkpoint runs/pretrain/last.pt    # the published protocol, 90 epochs
    python linprobe.py --checkpoint runs/pretrain/last.pt --cached                # features stored once: minutes
    python linprobe.py --checkpoint runs/pretrain/last.pt --knn                   # no training at all
    python linprobe.py --checkpoint none                                          # random weights, the floor

The last line is the result:
    done: linear probe on cls features, 90 epochs, top-1 92.00 %, top-5 99.50 % of 200 pictures, 0:01:05 h
"""
import argparse
import errno
import json
import math
import os
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from essl_loader import DataError, ESSLLoader, open_loader
from models_mae import (VIT_SIZES, ViT, WeightsError, find_checkpoint, load_encoder, read_weights, save_checkpoint,
                        vit_settings)
from schedules import lr_at


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="ours, official MAE, timm's or Hugging Face's; or none")
    p.add_argument("--knn", action="store_true", help="k-nearest neighbours on stored features, instead of a probe")
    p.add_argument("--cached", action="store_true", help="train the probe on stored features of the centre crops")
    p.add_argument("--pool", default="cls", choices=("cls", "mean"), help="class token or mean of the patch tokens")
    p.add_argument("--data", default="data/train_500_95.beton", help="training set: a .beton file or class folders")
    p.add_argument("--val-data", default="data/val_500_100.beton", help="held-out set, likewise")
    p.add_argument("--output-dir", default="runs/linprobe", help="the run's folder")
    p.add_argument("--model", choices=VIT_SIZES, help="absent: as the checkpoint; else vit_base_patch16")
    p.add_argument("--input-size", type=int, help="resolution; absent: the checkpoint's; else 224")
    p.add_argument("--epochs", type=int, default=90, help="passes over the data")
    p.add_argument("--warmup-epochs", type=float, default=10, help="linear warm-up of the rate")
    p.add_argument("--blr", type=float, default=0.1, help="learning rate for 256 images a step")
    p.add_argument("--weight-decay", type=float, default=0.0, help="LARS's, for the matrix")
    p.add_argument("--total-batch", type=int, default=16384, help="images a step, over all GPUs")
    p.add_argument("--batch-size", type=int, default=512, help="images at once on one GPU; the rest by accumulation")
    p.add_argument("--seed", type=int, default=0, help="of weights, order and crops")
    p.add_argument("--resume", default="auto", help="auto: go on from the run's last.pt if there; none; a checkpoint")
    p.add_argument("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    p.add_argument("--preload", action="store_true", help="read the training file into memory's page cache first")
    p.add_argument("--skip-bad", action="store_true", help="replace damaged samples and name them, do not stop")
    p.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints")
    p.add_argument("--save-minutes", type=float, default=10, help="minutes after which one is written within an epoch")
    p.add_argument("--max-bad-steps", type=int, default=20,
                   help="steps in a row left out for a loss or gradient that is not finite, before the run stops")
    argv = [a.split("=", 1) for a in (sys.argv[1:] if argv is None else argv)]
    argv = ["=".join([a[0].replace("_", "-") if a[0].startswith("--") else a[0], *a[1:]]) for a in argv]
    args = p.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1 or min(args.save_every, args.max_bad_steps) < 1:
        p.error("--epochs, --batch-size, --save-every and --max-bad-steps must be at least 1")
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


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled to trust * |weight| / |gradient| (You et al., arXiv 1708.03888).

    Weight decay and scaling are for parameters with ndim > 1 alone.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))
        self.found_inf = False

    @torch.no_grad()
    def step(self):
        if self.found_inf:  # waits for the device: a step is long here, and the encoder frozen
            return
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    weight, gradient = p.norm(), update.norm()
                    scale = torch.where((weight > 0) & (gradient > 0), group["trust"] * weight / gradient, 1.0)
                    update = update * scale
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * velocity)


# --- features
def store_features(model, loader, path, autocast, told, say):
    """Features (n, D) and labels (n,) of an evaluation loader's pictures as memory maps, float16 and int64.

    Each rank writes its own rows. `told` describes what they are of: maps stored for the same are used again.
    """
    def is_stored():
        try:
            return json.loads(note.read_text()) == told and path.is_file() and labels_path.is_file()
        except (OSError, ValueError):
            return False
    note, labels_path = path.with_suffix(".json"), path.with_name(path.name.replace("features", "labels"))
    if any_rank(torch.tensor([float(not is_stored())])):
        if loader.rank == 0:
            note.unlink(missing_ok=True)
            for to, kind, shape in (path, np.float16, (loader.num_samples, model.embed_dim)), (
                    labels_path, np.int64, (loader.num_samples,)):
                np.lib.format.open_memmap(to, "w+", kind, shape).flush()
                with open(to, "r+b") as f:  # a full disk would kill the one who writes to the map
                    os.posix_fallocate(f.fileno(), 0, to.stat().st_size)
        any_rank(torch.zeros(1))  # waits for all
        rows, labels, at = np.load(path, mmap_mode="r+"), np.load(labels_path, mmap_mode="r+"), loader.rank
        for features, y in tqdm(encoded(model, loader, autocast), path.name, len(loader), disable=loader.rank > 0):
            mine = slice(at, at + len(features) * loader.world_size, loader.world_size)
            rows[mine], labels[mine], at = features.half().cpu().numpy(), y.cpu().numpy(), mine.stop
        rows.flush(), labels.flush()
        any_rank(torch.zeros(1))
        if loader.rank == 0:
            note.write_text(json.dumps(told))
        say(f"{path}: {rows.shape[0]:,} x {rows.shape[1]} features stored")
    return np.load(path, mmap_mode="r"), np.load(labels_path, mmap_mode="r")


def stamp(path):
    """What tells a file or folder from a later one of the same name."""
    return [str(path), Path(path).stat().st_size, int(Path(path).stat().st_mtime)]


def stored_batches(rows, labels, order, batch_size, device):
    """Batches (B, D), (B,) of stored features in an order; the last one may be short."""
    for i in range(0, len(order), batch_size):
        at = order[i:i + batch_size]
        yield torch.from_numpy(rows[at]).to(device).float(), torch.from_numpy(labels[at]).to(device)


def encoded(model, loader, autocast):
    """A loader's batches with features in the place of pictures."""
    for images, labels in loader:
        with torch.no_grad(), autocast:
            features = model(images)
        yield features.float(), labels  # outside: a generator's no_grad would reach into its caller


# --- measures
@torch.no_grad()
def accuracy(score, batches, device):
    """(top-1 in percent, top-5 in percent, n) over all ranks of what score(features) -> (B, classes) ranks highest."""
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for features, labels in batches:
        scores = score(features)
        hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    top1, top5, n = counts.tolist()
    return 100 * top1 / n, 100 * top5 / n, int(n)


def knn_scores(bank, bank_labels, classes, k=20, temperature=0.07):
    """A function (B, D) -> votes (B, classes): each of the k nearest by cosine counts exp(similarity / temperature)."""
    bank = F.normalize(bank, dim=1)

    def score(features):
        near, index = (F.normalize(features, dim=1).to(bank.dtype) @ bank.T).float().topk(min(k, len(bank)))
        votes = torch.zeros(len(features), classes, device=bank.device)
        return votes.scatter_add_(1, bank_labels[index], ((near - 1) / temperature).exp())  # - 1: no overflow
    return score


def main(args):
    start, folder = time.time(), Path(args.output_dir)
    rank, world, device, stop = setup(args.seed)
    handlers = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def say(text):
        if rank == 0:
            tell(text)

    # --- model: frozen
    begin = None if args.checkpoint == "none" else args.checkpoint
    weights, found, _ = read_weights(begin) if begin else ({}, {}, None)
    vit, size = vit_settings(args.model, found, begin), args.input_size or found.get("img_size", 224)
    model = ViT(vit, size, classes=0, pool=args.pool)
    if begin:
        load_encoder(model, weights, begin)
    model = model.to(device).eval().requires_grad_(False)

    # --- data
    stored = args.cached or args.knn
    shared = dict(res=size, num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world, device=device,
                  skip_bad=args.skip_bad)
    # The published crop tries one box and clips it; ours tries up to ten and takes the centre, of the same area range
    loader = open_loader(args.data, args.batch_size, not stored, args.preload, scale=(0.08, 1.0), **shared)
    val = open_loader(args.val_data, args.batch_size, False, **shared)
    labels, val_labels = (x.reader.labels if isinstance(x, ESSLLoader) else np.array([y for _, y in x.samples])
                          for x in (loader, val))
    classes = len(loader.classes or ()) or int(labels.max()) + 1
    for path, found in (args.data, labels), (args.val_data, val_labels):
        if found.min() < 0 or found.max() >= classes:
            raise SystemExit(f"{path} has labels from {found.min()} to {found.max()}, expected 0 to {classes - 1}")
    if loader.classes and val.classes and list(loader.classes) != list(val.classes):
        odd = sorted(set(loader.classes) ^ set(val.classes)) or ["their order"]
        raise SystemExit(f"{args.val_data} has other classes than {args.data}; they differ in {', '.join(odd[:4])}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps({**vars(args), "world_size": world}, indent=1))
    except OSError as e:
        raise SystemExit(f"--output-dir {folder} cannot be written: {e.strerror}. Name a folder that can.")
    say(f"features of {begin or 'random weights'}, {args.pool}, {size} px; {loader.num_samples:,} + "
        f"{val.num_samples:,} pictures, {classes} classes; {device.type} x {world}")
    if stored:
        told = dict(pool=args.pool, size=size, model=vit, weights=stamp(begin) if begin else args.seed)
        (bank, labels), (val_rows, val_labels) = (
            store_features(model, data, folder / f"features_{name}.npy", autocast, dict(told, data=stamp(path)), say)
            for name, path, data in (("train", args.data, loader), ("val", args.val_data, val)))
    if found := {**loader.new_bad_samples(), **val.new_bad_samples()}:  # with --skip-bad, while features were stored
        say(f"{len(found)} damaged samples replaced: {', '.join(list(found)[:5])}")

    def val_batches(size=args.batch_size):
        if not stored:
            return encoded(model, val, autocast)
        return stored_batches(val_rows, val_labels, np.arange(rank, len(val_rows), world), size, device)

    # --- kNN
    if args.knn:
        rows = torch.from_numpy(np.array(bank)).to(device, torch.float16 if device.type == "cuda" else torch.float32)
        score = knn_scores(rows, torch.from_numpy(np.array(labels)).to(device), classes)
        top1, top5, n = accuracy(score, val_batches(max(1, min(512, 2 ** 26 // len(bank)))), device)
        say(f"done: kNN on {args.pool} features, k 20, temperature 0.07, top-1 {top1:.2f} %, top-5 {top5:.2f} % of {n} "
            f"pictures, {time.strftime('%H:%M:%S', time.gmtime(time.time() - start))} h")
        return

    # --- head and optimizer
    accum = args.total_batch // (args.batch_size * world)
    if accum * args.batch_size * world != args.total_batch:
        raise SystemExit(f"--total-batch {args.total_batch} is no multiple of --batch-size {args.batch_size} x {world}")
    steps_per_epoch = loader.num_samples // world // args.batch_size // accum
    if steps_per_epoch == 0:
        raise SystemExit(f"{loader.num_samples} pictures do not fill a step of {args.total_batch}: lower --total-batch")
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), nn.Linear(model.embed_dim, classes))
    nn.init.normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    head = wrapped = head.to(device)
    if world > 1:
        wrapped = DistributedDataParallel(head, device_ids=[device] if device.type == "cuda" else None)
    optimizer = LARS(head.parameters(), weight_decay=args.weight_decay)

    # --- resume
    last = folder / "last.pt"
    source = find_checkpoint(folder, args.resume, say)
    settings = {k: getattr(args, k) for k in ("checkpoint", "cached", "pool", "epochs", "warmup_epochs", "blr",
                                              "weight_decay", "total_batch", "seed")}
    settings.update(num_samples=loader.num_samples, classes=classes, size=size, **vit)
    step, top1, top5, n = 0, None, None, None
    if source:
        try:
            state = torch.load(source, map_location=device, weights_only=True)
            differ = [f"{k}: {state['settings'].get(k)} there, {v} here" for k, v in settings.items()
                      if state["settings"].get(k) != v]
        except Exception as e:  # a damaged pickle can raise anything
            raise SystemExit(f"--resume {source}: not a checkpoint of linprobe.py that can be read ({e})")
        if differ:
            raise SystemExit(f"{source} is of a run with other settings ({'; '.join(differ)}). Give the same, or "
                             "another --output-dir, or --resume none to start over in this one.")
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, (top1, top5, n) = state["step"], state["result"]
    log = RunFolder(folder, step, source) if rank == 0 else None

    def checkpoint():
        """Whether it is written, on rank 0."""
        return rank == 0 and log.save({"head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                                       "result": [top1, top5, n], "settings": settings, "model": model.settings},
                                      "last.pt")

    # --- train
    for s, handler in handlers.items():  # until here there was nothing to save
        signal.signal(s, handler)
    total, clock, seen, saved_at, batches = torch.zeros((), device=device), time.time(), 0, time.time(), None
    bad_steps, left_out = BadSteps(device), 0
    while step < steps:
        epoch, at = step // steps_per_epoch, step % steps_per_epoch * accum * args.batch_size  # pictures, on this rank
        if batches is None:  # an epoch begins, or one is gone on with
            if stored:
                order = np.random.default_rng([args.seed, epoch]).permutation(loader.num_samples)
                order = order[:len(order) // world * world][rank::world]
                batches = stored_batches(bank, labels, order[at:], args.batch_size, device)
            else:
                loader.set_epoch(epoch)
                loader.load_state_dict({**loader.state_dict(), "samples": at * world})
                batches = encoded(model, loader, autocast)
        optimizer.param_groups[0]["lr"] = lr = lr_at(step, steps, warmup, args.blr * args.total_batch / 256)
        before, step_loss = [(b, b.clone()) for b in head.buffers()], torch.zeros((), device=device)
        for micro in range(accum):
            features, targets = next(batches)
            with nullcontext() if world == 1 or micro == accum - 1 else wrapped.no_sync():
                loss = F.cross_entropy(wrapped(features), targets)
                (loss / accum).backward()
            step_loss += loss.detach() / accum
        bad_steps.add(bad := guarded_step(optimizer, step_loss, before))
        total += torch.where(bad > 0, 0, step_loss)
        step, seen = step + 1, seen + 1

        # --- measure, log
        epoch_ends, stopping = step % steps_per_epoch == 0, any_rank(stop)
        if epoch_ends:
            batches.close()
            batches = None
            head.eval()
            top1, top5, n = accuracy(head, val_batches(), device)
            head.train()
            if world > 1:
                dist.all_reduce(total)
            before, (left_out, _, longest) = left_out, bad_steps.read()
            count = seen - (left_out - before)
            values = dict(epoch=epoch, loss=total.item() / count / world if count else None, lr=lr, top1=top1,
                          top5=top5, bad_steps=left_out, img_s=seen * args.total_batch / (time.time() - clock))
            if found := {**loader.new_bad_samples(), **val.new_bad_samples()}:  # with --skip-bad
                values["bad_samples"] = found
                say(f"{len(found)} damaged samples replaced: {', '.join(list(found)[:5])}")
            say(f"epoch {epoch} loss {values['loss'] or math.nan:.4f}, top-1 {top1:.2f} %, {values['img_s']:.0f} "
                "images/s" + (f", {left_out} steps left out" if left_out else ""))
            if rank == 0:
                log.write(step, **values)
            if longest >= args.max_bad_steps:
                raise SystemExit(f"{longest} steps in a row up to step {step} were left out: loss or gradient not "
                                 f"finite ({left_out} such steps in all). The encoder is frozen: try a lower --blr")
            total.zero_()
            seen, clock = 0, time.time()

        # --- save, stop
        due = (epoch + 1) % args.save_every == 0 if epoch_ends else time.time() - saved_at > 60 * args.save_minutes
        if stopping or step == steps or due:
            written, saved_at = checkpoint(), time.time()
        if stopping and step < steps:
            raise SystemExit(f"stopped by a signal at step {step}; {last} is " + (
                "written: the same command goes on there" if written or rank else "not, see above"))
    say(f"done: linear probe on {args.pool} features, {args.epochs} epochs, top-1 {top1:.2f} %, top-5 {top5:.2f} % of "
        f"{n} pictures, {time.strftime('%H:%M:%S', time.gmtime(time.time() - start))} h")
    if rank == 0:
        log.end()


if __name__ == "__main__":
    try:
        main(get_args())
    except (DataError, WeightsError) as e:
        raise SystemExit(f"linprobe: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
