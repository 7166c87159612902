"""Finetunes and evaluates the encoder of a masked autoencoder, with the paper's schemes.

    torchrun --nproc_per_node 8 finetune.py --finetune runs/pretrain/last.pt   # the paper's run
    python finetune.py --eval --resume runs/finetune/best.pt --val-data data/val_500_100.beton
    python finetune.py --benchmark 20      # images/s of 3 Aug and RandAug on one core (Table 7)

Give the same command again and the run goes on from last.pt. The last line is the result:
    done: 10 epochs, top-1 96.00 % of 200 pictures, best 96.50 %, 0:01:12, runs/finetune/last.pt
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
from schedules import (FINETUNE, FINETUNE_SCHEMES, FINETUNE_STAGES, check_batches, lr_at, stage_at,
                       unused_stages)

MIN_LR = 1e-6
# At magnitude 10 timm's RandAug posterizes to 0 bits, which Pillow refuses
RAND_AUG = ("rand-m9-mstd0.5-inc1", {"magnitude_max": 9.99})
# Flags that a resumed run may change; all others must be those of the run before
FREE = ("finetune", "eval", "data", "val_data", "output_dir", "model", "input_size", "batch_size",
        "compile", "resume", "num_workers", "save_minutes", "benchmark")


def get_args(argv):
    both = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", both, {}))
    add = p.add_argument
    add("--finetune", help="weights: ours, official MAE's, timm's, Hugging Face's; none: random")
    add("--eval", action="store_true", help="only evaluate --resume CHECKPOINT on each --val-data")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or class folders")
    add("--val-data", nargs="+", default=["data/val_500_100.beton"], help="held-out set or sets")
    add("--output-dir", default="runs/finetune", help="the run's folder")
    add("--model", choices=models_mae.VIT_SIZES, help="default the checkpoint's, else ViT-B")
    add("--input-size", type=int, help="full resolution; default the checkpoint's, else 224")
    add("--scheme", default="s1", choices=FINETUNE_SCHEMES, help="resolution, crop, 3 Aug by stage")
    add("--aug", default="3aug", choices=("3aug", "rand"), help="the scheme's 3 Aug, or RandAug")
    add("--epochs", type=int, default=FINETUNE["epochs"], help="passes over the data")
    add("--warmup-epochs", type=float, default=FINETUNE["warmup_epochs"], help="linear warm-up")
    add("--drop-path", type=float, default=0.1, help="stochastic depth at the last block")
    add("--blr", type=float, default=FINETUNE["blr"], help="learning rate for 256 images a step")
    add("--layer-decay", type=float, default=FINETUNE["layer_decay"], help="of the rate by block")
    add("--weight-decay", type=float, default=FINETUNE["weight_decay"], help="of matrices")
    add("--mixup", type=float, default=0.8, help="alpha of mixup; 0: none")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix, in turn with mixup; 0: none")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--reprob", type=float, default=0.25, help="share of pictures with a rectangle erased")
    add("--total-batch", type=int, default=FINETUNE["total_batch"], help="pictures a step")
    add("--batch-size", type=int, default=128, help="of one GPU at once; the rest by accumulation")
    on_off = argparse.BooleanOptionalAction
    add("--compile", action=on_off, default=torch.cuda.is_available(), help="by torch.compile")
    add("--seed", type=int, default=0, help="of weights, order, crops and augmentation")
    add("--resume", default="auto", help="auto: from the run's last.pt if there; none; or a PATH")
    add("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    add("--order", default="random", choices=("random", "pages"), help="pages: for large files")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    add("--benchmark", type=int, default=0, metavar="N", help="only time augmentation, N batches")
    args = p.parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                         for word in argv])
    if not (args.eval or args.benchmark or args.finetune and len(args.val_data) == 1):
        p.error("training needs --finetune CHECKPOINT, or none for random weights, one --val-data.")
    if args.eval and args.finetune:
        p.error("--eval takes its checkpoint from --resume.")
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
    passes = 3 * [((2, 2, 0, 0), taps[:, :, None])] + 3 * [((0, 0, 2, 2), taps[..., None])]
    for pad, kernel in passes:  # as Pillow: three boxes across, three down, each rounded
        x = F.conv2d(F.pad(x, pad, mode="replicate"), kernel, groups=3 * B).round()
    return x.reshape(B, 3, H, W)


def three_augment(images, generator=None):
    """3 Aug (DeiT III): grayscale, solarize or blur, a third each; uint8 (B, 3, H, W)."""
    choice = torch.randint(3, (len(images),), generator=generator)  # on the CPU: no wait to know it
    radius = 0.1 + 1.9 * torch.rand(len(images), generator=generator)
    rows = [(choice == kind).nonzero()[:, 0] for kind in range(3)]
    gray, solar, blurred = (r.to(images.device, non_blocking=True) for r in rows)
    out = images.clone()
    out[gray] = luma(images[gray]).to(torch.uint8).expand(-1, 3, -1, -1)
    out[solar] = torch.where(images[solar] < 128, images[solar], 255 - images[solar])
    if len(blurred):
        out[blurred] = gaussian_blur(images[blurred], radius[rows[2]]).to(torch.uint8)
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
    """Table 7: images/s of RandAug and 3 Aug on one core, and of 3 Aug in batches on the device."""
    torch.set_num_threads(1)
    images, _ = next(iter(open_loader(args.data, args.batch_size, num_workers=1, device=device)))
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images.cpu()]
    rand_augment = rand_augment_transform(*RAND_AUG)
    three_augment_pillow = auto_augment_transform("3a", {})
    ways = {"RandAug, Pillow, one core": lambda: [rand_augment(x) for x in pictures],
            "3 Aug, Pillow, one core": lambda: [three_augment_pillow(x) for x in pictures],
            f"3 Aug, batches, {device.type}": lambda: three_augment(images)[0, 0, 0, 0].item()}
    for name, way in ways.items():
        way()
        seconds = timeit.timeit(way, number=args.benchmark)
        print0(f"{name}: {args.benchmark * len(images) / seconds:,.0f} images/s")


def evaluate(model, loader, autocast):
    """Top-1, top-5 and n of a loader's pictures, each counted once."""
    model.eval()
    with autocast:
        return models_mae.accuracy(((model(x).float(), y) for x, y in loader), loader.device)


def main(args):
    start = time.monotonic()
    rank, world, device, stop = setup(args.seed, training=not (args.eval or args.benchmark))
    folder = Path(args.output_dir)
    last = folder / "last.pt"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    shared = dict(num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world,
                  device=device)
    if args.benchmark:
        return benchmark(args, device)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not args.eval:
        lock_folder(folder)

    # --- weights
    if args.eval:
        args.finetune = last if args.resume == "auto" else args.resume
    weights, ckpt_settings, names = models_mae.read_weights(args.finetune)
    size = args.input_size or ckpt_settings.get("img_size", 224)
    vit = models_mae.vit_settings(args.model, ckpt_settings, args.finetune)

    # --- evaluate only
    if args.eval:
        if "head.weight" not in weights:
            raise models_mae.WeightsError(f"{args.finetune} has no classifier: finetune it first.")
        model = models_mae.ViT(vit, size, len(weights["head.weight"])).to(device)
        models_mae.load_into(model, weights, args.finetune)
        for val_data in args.val_data:
            val = open_loader(val_data, args.batch_size, train=False, res=size, **shared)
            if names and val.classes and list(names) != list(val.classes):
                raise DataError(f"{val_data} has other classes than {args.finetune}.")
            check_labels(val, len(weights["head.weight"]))
            result = evaluate(model, val, autocast)
            row = json.dumps(dict(checkpoint=str(args.finetune), data=val_data, **result))
            print0(row)
            if rank == 0:
                with open(folder / "results.jsonl", "a") as f:
                    f.write(row + "\n")
        return leave()

    # --- data
    transform = rand_augment_transform(*RAND_AUG) if args.aug == "rand" else None
    if transform and not Path(args.data).is_dir():
        raise DataError(f"--aug rand works on Pillow's pictures: {args.data} must be a folder.")
    mixing = args.mixup + args.cutmix > 0  # pairs of pictures
    with open_loader(args.data, 1) as loader:
        check_batches(loader.num_samples, args.total_batch, args.batch_size, world, 1 + mixing)
    extra = {"transform": transform} if transform else {"order": args.order}
    loader = open_loader(args.data, args.batch_size, res=size, **shared, **extra)
    val = open_loader(args.val_data[0], args.batch_size, train=False, res=size, **shared)
    check_classes(loader, val)
    classes = len(loader.classes or ()) or int(loader.labels.max()) + 1
    accum = args.total_batch // (args.batch_size * world)
    steps_per_epoch = loader.num_samples // args.total_batch
    steps = args.epochs * steps_per_epoch

    # --- model
    model = models_mae.ViT(vit, size, classes, drop_path=args.drop_path)
    if weights:
        models_mae.load_into(model, weights, args.finetune, fresh=("fc_norm.", "head."))
    ddp_model = model.to(device)
    if world > 1:
        ddp_model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    compute_scores = torch.compile(ddp_model, dynamic=False) if args.compile else ddp_model
    for number in unused_stages(args.epochs, FINETUNE_STAGES):
        print0(f"Stage {number} gets no epoch: its share of --epochs {args.epochs} is too small.")
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)
    erase = RandomErasing(args.reprob, mode="pixel", device=device)

    # --- optimizer
    groups = param_groups_layer_decay(model, args.weight_decay, model.no_weight_decay(),
                                      layer_decay=args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=FINETUNE["betas"], fused=True)
    peak_lr = args.blr * args.total_batch / 256
    # At scale 1 it only skips steps whose gradients are not finite: see pretrain.py
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2 ** 30)

    # --- resume
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    scheme_stages = [stage._asdict() for stage in FINETUNE_SCHEMES[args.scheme]]
    settings |= dict(num_samples=len(loader.indices), classes=classes, **model.settings,
                     data_checksum=loader.checksum, scheme_stages=scheme_stages,
                     shares=FINETUNE_STAGES)
    settings["weights"] = f"{sum(v.double().abs().sum() for v in weights.values()):.9g}"
    # The prefix "model." is that of pretraining's checkpoints
    parts = dict(modules=nn.ModuleDict({"model": model}), optimizer=optimizer, scaler=scaler,
                 loader=loader)
    defaults = vars(get_args(["--finetune=none"]))
    first_start = is_first_start(args, folder, FREE)
    source = args.resume
    if last.exists() and not first_start:
        source = "auto"
    state = models_mae.resume(source, last, settings, defaults, **parts)
    step = state["step"] if state else 0
    best = state["best"] if state else -1.0
    check_ranks(step=step, batch_size=args.batch_size, **settings)
    if step == steps:
        print0(f"{last} is finished: {args.epochs} epochs, best top-1 {best:.2f} %.")
        return leave()

    # --- train
    if rank == 0:
        if first_start:
            begin_run(args, folder)
        write_args(args, folder, world_size=world)
    board = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    print0(f"{args.finetune} from step {step} of {steps}: {loader.num_samples:,} pictures, {world} "
           f"x {args.batch_size} x {accum} a step")

    def checkpoint(path, parts):
        if rank == 0:
            save_checkpoint(path, epoch=epoch + 1, step=step, best=best, settings=settings,
                            model=model.settings, classes=loader.classes,
                            **{k: part.state_dict() for k, part in parts.items()})
    saved_at = time.monotonic()
    stopping = False
    for epoch in range(step // steps_per_epoch, args.epochs):
        index, stage = stage_at(FINETUNE_SCHEMES[args.scheme], epoch, args.epochs,
                                FINETUNE_STAGES, size, vit["patch_size"])
        print0(f"epoch {epoch + 1}, stage {index + 1}: {stage.res} pixels")
        if step % steps_per_epoch == 0:  # else the resumed loader goes on in the middle
            loader.set_epoch(epoch)
        loader.set_stage(res=stage.res, scale=(stage.sigma_min ** 2, stage.sigma_max ** 2))
        batches = iter(loader)
        loss_sum = torch.zeros(2, device=device)  # of this epoch; and how many were finite
        t0 = time.monotonic()
        first_step = step
        timed_from = step  # the step at t0
        model.train()
        while step < (epoch + 1) * steps_per_epoch and not stopping:
            if time.monotonic() - saved_at > 60 * args.save_minutes:  # after an evaluation
                scaler.get_scale()  # waits for the GPU
                saved_at = time.monotonic()
                checkpoint(last, parts)
                t0 += time.monotonic() - saved_at
            # 3 Aug, erasing, mixup and drop path draw by (seed, step, rank) alone
            draws = np.random.SeedSequence([args.seed, step, rank])
            random_seed(int(draws.generate_state(1)[0]))  # Python's, numpy's and torch's
            lr = lr_at(step, steps, args.warmup_epochs * steps_per_epoch, peak_lr, MIN_LR)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for micro in range(accum):
                images, targets = next(batches)
                if args.aug == "3aug":
                    images = three_augment(images)
                    images = color_jitter(images) if stage.aug == "3aug+" else images
                images = erase(model.normalize(images))
                if mixing:
                    images, targets = mixup(images, targets)  # targets become (B, classes)
                ddp_model.require_backward_grad_sync = micro == accum - 1  # DDP averages then
                with autocast:
                    scores = compute_scores(images)
                loss = F.cross_entropy(scores.float(), targets,
                                       label_smoothing=0.0 if mixing else args.smoothing)
                scaler.scale(loss / accum).backward()
                loss_sum += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()]).detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            stopping = stop.clone()  # a signal may come at any moment: the ranks agree on a copy
            if world > 1:
                dist.all_reduce(stopping, op=dist.ReduceOp.MAX)  # on the CPU: waits for no GPU
            if step == first_step + 1 and step < (epoch + 1) * steps_per_epoch:
                scaler.get_scale()  # waits for the GPU: the first step may compile
                t0 = time.monotonic()
                timed_from = step

        batches.close()
        if step == (epoch + 1) * steps_per_epoch:
            if world > 1:
                dist.all_reduce(loss_sum)
            mean_loss = (loss_sum[0] / loss_sum[1]).item()
            scaler.update(1.0)
            skipped = step - int(optimizer.state[model.cls_token]["step"])  # which AdamW counts
            if not np.isfinite(mean_loss) or skipped > step / 2:
                raise DataError(f"epoch {epoch + 1}: loss {mean_loss}, {skipped} steps not finite. "
                                "Lower --blr and start over with --resume none.")
            img_s = (step - timed_from) * args.total_batch / (time.monotonic() - t0)
            result = evaluate(model, val, autocast)
            values = dict(epoch=epoch + 1, stage=index + 1, res=stage.res, loss=mean_loss, lr=lr,
                          img_s=img_s, skipped_steps=skipped, **result)
            print0("  ".join(f"{k} {v:.4g}" for k, v in values.items()))
            log(board, step, **values)
            if result["top1"] > best:
                best = result["top1"]
                checkpoint(folder / "best.pt", {"modules": parts["modules"]})
        if stopping or step == steps:
            checkpoint(last, parts)
            break

    # --- end
    if rank == 0 and step == steps:
        write_args(args, folder, world_size=world, finished=True)
    print0(f"done: {args.epochs} epochs, top-1 {result['top1']:.2f} % of {result['n']:,} pictures, "
           f"best {best:.2f} %, {timedelta(seconds=int(time.monotonic() - start))}, {last}"
           if step == steps else f"stopped at step {step}; the same command goes on from {last}")
    if board:
        board.close()
    leave()
    sys.exit(step < steps)


if __name__ == "__main__":
    try:
        main(get_args(sys.argv[1:]))
    except (DataError, models_mae.WeightsError, OSError) as e:
        raise SystemExit(f"finetune: {e}")
