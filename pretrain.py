"""Pretrains a masked autoencoder with the paper's schemes of resolution and mask ratio.

    torchrun --nproc_per_node 8 pretrain.py --scheme s5 --epochs 800  # ImageNet-1k, the paper's run
    python pretrain.py --demo              # drawn pictures; two minutes on two CPU cores
    python pretrain.py --benchmark 20      # images/s and MFU of each stage; nothing is trained

Give the same command again and the run goes on from last.pt. The last line is the result:
    done: 24 epochs, loss 1.366 -> 0.273, probe top-1 92.5 %, H:MM:SS, runs/demo/last.pt
"""
import argparse
import ast
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import param_groups_weight_decay
from timm.optim.muon import zeropower_via_newtonschulz
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import models_mae
import schedules
from essl_loader import DataError, check_classes, labels_fault, open_loader
from schedules import (PRETRAIN, PRETRAIN_SCHEMES, PRETRAIN_SHARES, PRETRAIN_STAGES, Stage,
                       check_batches, lr_at, stage_at, unused_stages)

DEMO = dict(data="data/demo_train.beton", val_data="data/demo_val.beton", output_dir="runs/demo",
            input_size=64, model="mae_vit_nano_patch8", epochs=24, warmup_epochs=2, total_batch=64,
            batch_size=64, blr=4e-3, compile=False)  # torch.compile needs a C compiler
MUON_LR = 4  # times AdamW's rate; 1 to 8 gave the same probe (one seed, 5 epochs at 64 pixels)
NEWTON_SCHULZ = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]  # timm's default, "quintic"
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # dense bf16, data sheets of the SXM cards
# Flags that a resumed run may change; all others must be those of the run before
FREE = ("demo", "data", "val_data", "output_dir", "batch_size", "compile", "recompute", "resume",
        "num_workers", "save_minutes", "viz_every", "max_steps", "benchmark", "extend")
EXTENDABLE = ("epochs", "warmup_epochs", "blr", "stages")  # these it may change with --extend


def get_args(argv):
    both = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", both, {}))
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    add("--demo", action="store_true", help="train a tiny model on drawn pictures, made if absent")
    add("--data", default="data/train_500_95.beton", help="training set: .beton or picture folder")
    add("--val-data", default="data/val_500_100.beton", help="held-out set for the probe, likewise")
    add("--output-dir", default="runs/pretrain", help="the run's folder")
    add("--model", default="mae_vit_base_patch16", choices=models_mae.SIZES, help="model size")
    add("--input-size", type=int, default=224, help="full resolution; a scheme's scale with it")
    add("--scheme", default="s5", choices=PRETRAIN_SCHEMES, help="resolutions and mask ratios")
    add("--stages", type=float, nargs="+", metavar="SHARE", help="shares of the epochs, sum 1")
    add("--mask-ratio", type=float, help="one for all stages, instead of the scheme's")
    add("--decoder-depth", type=int, help="decoder blocks; the default is the model's, 8 for ViT-B")
    add("--decoder-keep", type=float, default=1.0, help="share of removed patches to reconstruct")
    add("--repeat", type=int, default=1, help="uses of each loaded picture in a step")
    add("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    add("--warmup-epochs", type=float, default=PRETRAIN["warmup_epochs"], help="linear warm-up")
    add("--blr", type=float, default=PRETRAIN["blr"], help="learning rate for 256 images a step")
    add("--weight-decay", type=float, default=PRETRAIN["weight_decay"], help="of matrices")
    add("--optimizer", default="adamw", choices=("adamw", "muon"), help="of the blocks' matrices")
    add("--total-batch", type=int, default=PRETRAIN["total_batch"], help="masked pictures a step")
    add("--batch-size", type=int, default=512, help="of one GPU at once; the rest by accumulation")
    add("--probe", default="masked", choices=("masked", "full", "off"), help="online probe's input")
    add("--compile", action=on_off, default=torch.cuda.is_available(), help="by torch.compile")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, slower")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks")
    add("--resume", default="auto", help="auto: from the run's last.pt if there; none; or a PATH")
    add("--extend", action="store_true", help="go on with other --epochs, --blr or --stages")
    add("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    add("--order", default="random", choices=("random", "pages"), help="pages: for large files")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    add("--viz-every", type=int, default=20, help="epochs between reconstructions; 0: never")
    add("--max-steps", type=int, default=0, help="save and stop after this step; 0: never")
    add("--benchmark", type=int, default=0, metavar="N", help="only time N steps of each stage")
    add("--init", help="start from weights: ours, official MAE's, timm's, Hugging Face's")
    for name, default in (("--mean", models_mae.IMAGENET_MEAN), ("--std", models_mae.IMAGENET_STD)):
        add(name, type=float, nargs=3, default=default, help="of red, green, blue, from 0 to 1")
    add("--norm-pix-loss", action=on_off, default=True, help="targets are normalised per patch")
    words = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    if "--demo" in words:
        p.set_defaults(**DEMO)  # what the command line names still wins
    args = p.parse_args(words)
    args.stages = args.stages or list(PRETRAIN_SHARES.get(args.scheme, PRETRAIN_STAGES))
    try:
        stage_at(scheme_of(args), 0, args.epochs, args.stages)
    except ValueError as e:
        p.error(f"--stages: {e}")
    if min(args.epochs, args.repeat) < 1 or not 0 < args.decoder_keep <= 1:
        p.error("counts start at 1; --decoder-keep goes from above 0 to 1.")
    if args.warmup_epochs > args.epochs / 4:
        args.warmup_epochs = args.epochs / 4
        print0(f"--warmup-epochs is shortened to {args.warmup_epochs:g}, a quarter of --epochs.")
    return args


def scheme_of(args):
    """The Stages of --scheme, with --mask-ratio if it is given."""
    scheme = [Stage(*row) for row in PRETRAIN_SCHEMES[args.scheme]]
    if args.mask_ratio is not None:
        scheme = [stage._replace(mask_ratio=args.mask_ratio) for stage in scheme]
    return scheme


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


class ModelWithProbe(nn.Module):
    """Model and online probe (BatchNorm, linear) in one forward, for DDP and torch.compile.

    All parameters of this module that take gradients are trained, those of modules that are added
    to it too. What has the attribute `persistent = False`, such as a frozen teacher, is in no
    checkpoint, and no checkpoint changes it.
    """

    def __init__(self, model, classes, probe, decoder_keep):
        super().__init__()
        self.model = model
        self.probe = probe
        self.decoder_keep = decoder_keep
        width = model.settings["embed_dim"]
        self.head = nn.Identity() if probe == "off" else nn.Sequential(
            nn.BatchNorm1d(width, track_running_stats=False), nn.Linear(width, classes))

    def forward(self, images, labels, mask_ratio, noise):
        """images (B / R, 3, H, W), labels (B / R,), noise (B, L) -> {name: scalar}.

        The sum of "loss" and "probe_loss", if there is one, is minimised. The means of all scalars
        reach the log, TensorBoard and the bar under their names.
        """
        repeat = len(noise) // len(images)  # R: neighbours are masks of the same picture
        images = images.repeat_interleave(repeat, dim=0)
        labels = labels.repeat_interleave(repeat, dim=0)
        loss, _, _, latent = self.model(images, mask_ratio, noise, self.decoder_keep,
                                        return_latent=True)
        return {"loss": loss, **self.probe_loss(images, labels, latent)}

    def probe_loss(self, images, labels, latent):
        """The online probe's loss, whose gradient reaches the head alone; {} without a probe."""
        if self.probe == "off":
            return {}
        features = latent[:, 1:].mean(dim=1).detach()  # (B, D)
        if self.probe == "full":
            features = self.model.features(images)  # without gradients
        return {"probe_loss": nn.functional.cross_entropy(self.head(features.float()), labels)}

    def after_step(self, step):
        """Called when a step is done, the first one as 1: for an EMA teacher."""

    def state_dict(self, **options):
        state = super().state_dict(**options)
        for prefix in self.not_saved():
            state = {name: v for name, v in state.items() if not name.startswith(prefix)}
        return state

    def load_state_dict(self, state):
        prefixes = self.not_saved()
        own = {k: v for k, v in super().state_dict().items() if k.startswith(prefixes)}
        return super().load_state_dict(state | own)

    def not_saved(self):
        """The prefixes of the names of what has `persistent = False`."""
        return tuple(name + "." for name, part in self.named_modules()
                     if not getattr(part, "persistent", True))


def total_loss(scalars):
    """What a step minimises."""
    return scalars["loss"] + scalars.get("probe_loss", 0)


def parameter_groups(module, weight_decay):
    """All of the module's parameters that take gradients; the probe's head is the last group."""
    head = list(module.head.parameters())
    groups = param_groups_weight_decay(module, weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not other for other in head)]
    groups.append({"params": head, "weight_decay": 0.0})  # constant rate
    return groups


def check_groups(module, optimizer):
    """Ends the run where a parameter gets a gradient and is in no group: it would not change."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in module.named_parameters()
            if p.grad is not None and id(p) not in trained]
    if lost:
        raise models_mae.WeightsError(
            f"{', '.join(lost)}: not trained, for the optimizer was made before they took "
            "gradients. Make them, and set requires_grad, in the module's __init__.")


def scripts():
    """The files that make a run: these three, and one that imports them."""
    files = [__file__, models_mae.__file__, schedules.__file__]
    files.append(getattr(sys.modules["__main__"], "__file__", __file__))
    paths = dict.fromkeys(Path(file).resolve() for file in files)  # each once
    return [path for path in paths if path.is_file()]  # notebooks and `python -` have none


def keep_scripts(folder, step):
    """Copies them into a run's folder, under the step from which they make it, where they differ
    from the newest copies there."""
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


def source_of(function):
    """crc32 of a function's code, without its comments and its docstring; None without a source."""
    try:
        text = inspect.getsource(function)
        tree = ast.parse(textwrap.dedent(text))
    except (OSError, TypeError):
        return None
    except SyntaxError:  # a lambda amid a call
        return zlib.crc32(text.encode())
    definition = tree.body[0]
    if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) is not None:
        del definition.body[0]
    return zlib.crc32(ast.unparse(tree).encode())


def draw_noise(shape, model, res, seed, progress, device):
    """The one call of masking_noise for training and pictures: (*shape, L) of a seed alone."""
    rng = torch.Generator(device).manual_seed(seed)
    L = (res // model.patch_size) ** 2
    model.progress.fill_(progress)  # for targets()
    return models_mae.masking_noise((*shape, L), rng, device, progress=progress)


@torch.no_grad()
def probe_accuracy(module, loader, autocast):
    """The probe's top-1 in percent on full held-out pictures, all ranks'. BatchNorm takes the mean
    and variance of these: with those of masked ones it was 36 instead of 52 % on imagenette."""
    with autocast:
        shares = [[(module.model.features(x).float().cpu(), y.cpu()) for x, y in loader]]
    if dist.is_initialized():
        shares = shares * dist.get_world_size()
        dist.all_gather_object(shares, shares[0])
    features, labels = (torch.cat(parts) for parts in zip(*sum(shares, [])))  # (n, D), (n,)
    scores = module.head(features.to(loader.device)).cpu()
    return 100 * (scores.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def save_reconstructions(model, loader, mask_ratio, progress, board, epoch, step):
    """recon_*.png, three pictures a row: original, what the encoder saw, reconstruction, and what
    the prediction 0 would show, which takes nothing to learn."""
    images = next(iter(loader))[0][:12]
    # The same seed each time: the same masks, if masking_noise does not change with progress
    noise = draw_noise((len(images),), model, images.shape[-1], 0, progress, loader.device)
    parts = model.reconstruct(images, mask_ratio, noise, with_zero=True)  # (4, B, 3, H, W)
    grid = make_grid(parts.transpose(0, 1).flatten(0, 1), nrow=12)
    save_image(grid, Path(board.log_dir, f"recon_{epoch:04d}.png"))
    board.add_image("reconstructions", grid, step)


@functools.cache
def cpu_has_bfloat16():  # where it has not, float32 is four times faster, with the same loss
    return "bf16" in Path("/proc/cpuinfo").read_text()


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of the first group move along their momentum made orthogonal.

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
        taken = 1 - getattr(self, "found_inf", 0)  # 0 where GradScaler skips the step
        grads = torch.stack([matrix.grad for matrix in matrices])  # (n, out, in)
        grads.nan_to_num_(0, 0, 0).div_(getattr(self, "grad_scale", 1))
        state = self.state[matrices[0]]
        if not state:
            state["step"] = torch.zeros(())  # AdamW asks for it when it loads a checkpoint
            state["momentum"] = torch.zeros_like(grads)
        state["momentum"].lerp_(grads, (1 - group["momentum"]) * taken)
        update = grads.lerp_(state["momentum"], group["momentum"])
        dtype = torch.bfloat16 if update.is_cuda or cpu_has_bfloat16() else torch.float32
        update = zeropower_via_newtonschulz(update, 5, NEWTON_SCHULZ, dtype=dtype).float()
        lr = group["lr"] * taken
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        update *= -0.2 * max(update.shape[1:]) ** 0.5 * lr  # 0.2: the size of AdamW's update
        torch._foreach_add_(matrices, update.unbind())

    def load_state_dict(self, state_dict):
        if "ns_steps" in state_dict["param_groups"][0]:
            raise models_mae.WeightsError("its Muon is timm's, of an older version of this code")
        super().load_state_dict(state_dict)


class Window:
    """What is added up from one log line to the next, and the rates that come of it."""

    def __init__(self, device, compiles=False):
        self.steps = 0
        self.device = device
        self.sums = {}  # of each scalar: sum of the finite ones, how many they are
        self.start_clock()
        self.compiles = compiles  # in its first step

    def start_clock(self):
        """The rates leave out what was before."""
        self.steps_before = self.steps
        self.data_time = 0.0  # seconds of waiting for the loader
        self.t0 = time.monotonic()
        self.compiles = False

    def add(self, scalars):
        """Adds a micro-batch's {name: scalar}, without waiting for the GPU."""
        for name, value in scalars.items():
            value = value.detach()
            sums = self.sums.setdefault(name, torch.zeros(2, device=self.device))
            sums += torch.stack([value.nan_to_num(0, 0, 0), value.isfinite()])

    def means(self, scaler, enough):
        """{name: mean} of the finite ones. DataError if over `enough` steps had no finite loss, or
        were all skipped."""
        sums = torch.stack(list(self.sums.values()))  # (names, 2)
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = dict(zip(self.sums, (sums[:, 0] / sums[:, 1]).tolist()))
        all_skipped = scaler.get_scale() <= 0.5 ** self.steps  # each skipped step halved it
        if self.steps > enough and (all_skipped or not math.isfinite(means["loss"])):
            raise DataError("Loss or gradients are not finite. Lower --blr, and start over with "
                            "--resume none.")
        scaler.update(1.0)  # counts the skips of the next window
        return means

    def rates(self, gpu_batch, world, flops):
        """Images/s, share of waiting; of a GPU TFLOP/s, MFU if its peak is known, GiB reserved."""
        seconds = time.monotonic() - self.t0
        gpu_img_s = (self.steps - self.steps_before) * gpu_batch / seconds
        row = dict(img_s=gpu_img_s * world, data_wait=self.data_time / seconds,
                   tflops=gpu_img_s * flops / 1e12)
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            row |= {"mfu": row["tflops"] / peak for k, peak in PEAK_TFLOPS.items() if k in name}
            row["mem"] = torch.cuda.max_memory_reserved() / 2 ** 30
        return row


def complete_stages(scheme, model, optimizer):
    """Stages with tuples for their crops' scale and numbers for their decoder's blocks."""
    available = len(model.decoder_blocks)
    complete = []
    for number, stage in enumerate(scheme, start=1):
        depth = stage.decoder_depth or available
        if depth > available:
            raise models_mae.WeightsError(
                f"stage {number} takes {depth} decoder blocks, but the model has {available}: give "
                f"--decoder-depth {depth} or more.")
        if depth < available and optimizer == "muon":
            raise models_mae.WeightsError(
                f"stage {number} takes {depth} of {available} decoder blocks, but Muon steps them "
                "together: take --optimizer adamw, or one depth by --decoder-depth.")
        complete.append(stage._replace(scale=tuple(stage.scale), decoder_depth=depth))
    return complete


def benchmark(args, module, compute_loss, optimizer, scaler, autocast, loader, flops):
    """Times N steps of --batch-size in each stage: on random pictures, then with the loader."""
    for stage, source in itertools.product(flops, ("random", "loader")):
        loader.set_stage(res=stage.res, scale=stage.scale)
        module.model.active_decoder_blocks = stage.decoder_depth
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        images, labels = next(batches)
        if source == "random":
            batches = itertools.repeat((torch.randint_like(images, 256), labels))
        noise = draw_noise((args.batch_size,), module.model, stage.res, 0, 0.0, loader.device)
        row = dict(source=source, **stage._asdict(), batch_size=args.batch_size)
        for step in range(-2, args.benchmark):  # the first two do not count
            if step <= 0:
                scaler.get_scale()  # waits for the GPU
                window = Window(loader.device)
            t_data = time.monotonic()
            images, labels = next(batches)
            window.data_time += time.monotonic() - t_data
            with autocast:
                loss = total_loss(compute_loss(images, labels, stage.mask_ratio, noise))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            window.steps += 1
        scaler.get_scale()
        rates = window.rates(args.batch_size, loader.world_size, flops[stage])
        print0(json.dumps(row | rates))


def main(args):
    start = time.monotonic()
    rank, world, device, stop = setup(args.seed, training=not args.benchmark)
    folder = Path(args.output_dir)
    last = folder / "last.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not args.benchmark:
        lock_folder(folder)
    if args.demo and rank == 0 and not Path(args.data).exists():
        builder = Path(__file__).with_name("build_beton.py")
        subprocess.run([sys.executable, builder, "--demo"], check=True)
    if world > 1:
        dist.barrier()

    # --- data
    with open_loader(args.data, 1) as loader:  # to know how many pictures there are
        indices = loader.indices
        num_pictures = loader.num_samples  # without those that are excluded
        has_probe = args.probe != "off" and loader.labels.min() < loader.labels.max()
    if args.benchmark:  # few pictures will do: they are read again and again
        indices = indices.repeat(-(-args.batch_size * world // len(indices)))
    else:
        check_batches(num_pictures * args.repeat, args.total_batch, args.batch_size, world,
                      args.repeat, least=2 if has_probe else 1)
    shared = dict(num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world,
                  device=device, res=args.input_size)
    loader = open_loader(args.data, args.batch_size // args.repeat, scale=PRETRAIN["scale"],
                         order=args.order, indices=indices, **shared)
    fault = labels_fault(loader)
    if fault and args.probe != "off":
        print0(f"{args.data} {fault}: there is no online probe.")
        args.probe = "off"
    val = None
    if args.probe != "off":
        val = open_loader(args.val_data, args.batch_size, train=False, **shared)
        check_classes(loader, val)
        if val.num_samples < 2:  # its BatchNorm takes a variance
            raise DataError(f"{args.val_data} holds one picture, and the online probe needs two. "
                            "Give more, or --probe off.")
    accum = args.total_batch // (args.batch_size * world)
    steps_per_epoch = loader.num_samples * args.repeat // args.total_batch
    steps = args.epochs * steps_per_epoch
    probe_every = max(1, args.epochs // 100)  # a hundred points of the curve cost little
    log_every = min(50, steps_per_epoch)

    # --- model
    sizes = {"decoder_depth": args.decoder_depth} if args.decoder_depth else {}
    sizes |= dict(img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, mean=args.mean,
                  std=args.std)
    model = getattr(models_mae, args.model)(**sizes)
    model.recompute = args.recompute
    scheme = complete_stages(scheme_of(args), model, args.optimizer)
    stages = [stage_at(scheme, epoch, args.epochs, args.stages, args.input_size, model.patch_size)
              for epoch in range(args.epochs)]
    for number in unused_stages(args.epochs, args.stages):
        print0(f"Stage {number} gets no epoch: its share of --epochs {args.epochs} is too small.")
    costs = [model.flops_per_image(stage.res, stage.mask_ratio, args.decoder_keep,
                                   decoder_depth=stage.decoder_depth) for _, stage in stages]
    module = ModelWithProbe(model, int(loader.labels.max()) + 1, args.probe, args.decoder_keep)
    ddp_model = module.to(device)
    if world > 1:
        depths = {stage.decoder_depth for stage in scheme}
        ddp_model = nn.parallel.DistributedDataParallel(
            module, gradient_as_bucket_view=True,
            find_unused_parameters=depths != {len(model.decoder_blocks)})
    compute_loss = torch.compile(ddp_model, dynamic=False) if args.compile else ddp_model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    # --- optimizer
    groups = parameter_groups(module, args.weight_decay)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=PRETRAIN["betas"], fused=True)
    else:
        blocks = [*model.blocks.parameters(), *model.decoder_blocks.parameters()]
        matrices = dict.fromkeys(p for p in blocks if p.ndim == 2)  # a set in order
        muon = dict(groups[1], params=list(matrices), lr_scale=MUON_LR, momentum=0.95)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in matrices]
        optimizer = Muon([muon, *groups], lr=1e-3, betas=PRETRAIN["betas"], eps=1e-7, fused=True)
    peak_lr = args.blr * args.total_batch / 256
    # At scale 1 it only skips steps whose gradients are not finite, and waits for no GPU
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2 ** 30)
    if args.benchmark:
        benchmark(args, module, compute_loss, optimizer, scaler, autocast, loader,
                  dict(zip((stage for _, stage in stages), costs)))
        return leave()

    # --- resume
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= dict(num_samples=len(loader.indices), data_checksum=loader.checksum,
                     scheme_stages=[stage._asdict() for stage in scheme], betas=PRETRAIN["betas"],
                     targets=source_of(models_mae.targets),
                     masking_noise=source_of(models_mae.masking_noise), **model.settings)
    sources = {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in scripts()}
    about = dict(settings=settings, model=model.settings, model_class=type(model).__name__,
                 classes=loader.classes, sources=sources)
    parts = dict(modules=module, optimizer=optimizer, scaler=scaler, loader=loader)
    first_start = is_first_start(args, folder, FREE)
    source = args.resume
    if last.exists() and not first_start:
        source = "auto"
    state = models_mae.resume(source, last, settings, vars(get_args([])), EXTENDABLE, args.extend,
                              **parts)
    step = state["step"] if state else 0
    if step > steps:
        raise models_mae.WeightsError(
            f"{last} has done {step} steps, but --epochs {args.epochs} are {steps}: give "
            f"--epochs {math.ceil(step / steps_per_epoch)} or more.")
    if state:
        changed = [name for name, sha1 in state.get("sources", {}).items()
                   if sources.get(name) != sha1]
        if changed:
            print0(f"Warning: {', '.join(changed)} changed since the checkpoint was written.")
        extended = [f"{k} {state['settings'][k]} -> {settings[k]}" for k in EXTENDABLE
                    if state["settings"].get(k, settings[k]) != settings[k]]
        if extended:
            print0(f"Extended at step {step}: {', '.join(extended)}. Rate and stages follow the "
                   "new schedule from here on.")
    first_loss = state["first_loss"] if state else None
    check_ranks(step=step, batch_size=args.batch_size, **settings)
    if args.init and not state:
        fits = models_mae.init_from(model, args.model.removeprefix("mae_"), args.init)
        print0(f"{args.init} gives the encoder{' and the decoder' * fits}.")
    if step == steps:
        print0(f"{last} is of a finished run of {args.epochs} epochs.")
        return leave()
    print0(f"{args.model} from step {step} of {steps}: {loader.num_samples:,} pictures, {world} x "
           f"{args.batch_size} x {accum} a step, {loader.num_workers} threads, {device.type}")

    # --- train
    if rank == 0 and first_start:
        begin_run(args, folder)
    board = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    if rank == 0:
        write_args(args, folder, world_size=world)
        keep_scripts(folder / "scripts", step)
    bar = tqdm(total=steps, initial=step, unit="step", disable=None if rank == 0 else True)
    has_pictures = rank == 0 and args.viz_every > 0
    if has_pictures and not model.predicts_pixels:
        print0("The targets are no pixels: there are no pictures of reconstructions.")
        has_pictures = False
    noise_shape = (accum, args.batch_size // args.repeat, world, args.repeat)
    stopping = False
    first_epoch = step // steps_per_epoch
    saved_at = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        index, stage = stages[epoch]
        if epoch == first_epoch or stages[epoch - 1][0] != index:
            print0(f"epoch {epoch + 1}, stage {index + 1}: {stage.res} pixels, mask ratio "
                   f"{stage.mask_ratio:g}, crops {stage.scale}, {stage.decoder_depth} decoder "
                   "blocks")
            model.active_decoder_blocks = stage.decoder_depth
            window = Window(device, compiles=True)
        if step % steps_per_epoch == 0:  # else the resumed loader goes on in the middle
            loader.set_epoch(epoch)
        loader.set_stage(res=stage.res, scale=stage.scale)
        batches = iter(loader)
        while step < (epoch + 1) * steps_per_epoch and not stopping:
            # Every rank draws all ranks' masks and takes its own, (accum, B, L)
            noise = draw_noise(noise_shape, model, stage.res, args.seed * 1_000_003 + step,
                               step / steps, device)[:, :, rank].flatten(1, 2)
            lr = lr_at(step, steps, args.warmup_epochs * steps_per_epoch, peak_lr)
            for group in optimizer.param_groups[:-1]:  # not the probe's
                group["lr"] = lr * group.get("lr_scale", 1)
            for micro in range(accum):
                t_data = time.monotonic()
                images, labels = next(batches)
                window.data_time += time.monotonic() - t_data
                ddp_model.require_backward_grad_sync = micro == accum - 1  # DDP averages then
                with autocast:
                    scalars = compute_loss(images, labels, stage.mask_ratio, noise[micro])
                scaler.scale(total_loss(scalars) / accum).backward()
                window.add(scalars)
            if window.steps == 0:
                check_groups(module, optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            module.after_step(step)
            window.steps += 1
            bar.update()
            epoch_ends = step % steps_per_epoch == 0
            stopping = stop + (step == args.max_steps)  # a copy: a signal may come at any moment
            if world > 1:
                dist.all_reduce(stopping, op=dist.ReduceOp.MAX)  # on the CPU: waits for no GPU

            if epoch_ends or stopping or step % log_every == 0:
                means = window.means(scaler, log_every / 2)
                taken = int(optimizer.state[model.cls_token]["step"])  # AdamW's count
                row = dict(epoch=epoch + 1, stage=index + 1, res=stage.res,
                           mask_ratio=stage.mask_ratio, **means, lr=lr, skipped_steps=step - taken,
                           **window.rates(accum * args.batch_size, world, costs[epoch]))
                if val and epoch_ends and ((epoch + 1) % probe_every == 0 or step == steps):
                    row["probe_top1"] = probe_accuracy(module, val, autocast)
                log(board, step, **row)
                # What is left of the run at this stage's cost: right across stages
                steps_left = (epoch + sum(costs[epoch:]) / costs[epoch]) * steps_per_epoch - step
                left = timedelta(seconds=int(steps_left * args.total_batch / row["img_s"]))
                text = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                bar.set_postfix_str(f"{text}, {row['img_s']:.0f} img/s, {left} left")
                first_loss = first_loss or means["loss"]
                if epoch_ends:
                    print0("  ".join(f"{k} {v:.4g}" for k, v in row.items()) + f"  left {left}")
                window = Window(device)
            elif window.compiles:
                scaler.get_scale()  # waits for the GPU
                window.start_clock()

            stage_ends = epoch_ends and (step == steps or stages[epoch + 1][0] != index)
            if stopping or stage_ends or time.monotonic() - saved_at > 60 * args.save_minutes:
                scaler.get_scale()  # waits for the GPU
                saved_at = time.monotonic()
                milestone = [folder / f"stage{index + 1}.pt"] if stage_ends and step < steps else []
                for path in [*milestone, last] if rank == 0 else []:
                    save_checkpoint(path, step=step, epoch=epoch + 1, first_loss=first_loss,
                                    **about, **{k: part.state_dict() for k, part in parts.items()})
                window.t0 += time.monotonic() - saved_at  # the rates leave it out
            show = has_pictures and ((epoch + 1) % args.viz_every == 0 or step == steps)
            if show and epoch_ends:
                save_reconstructions(model, val or loader, stage.mask_ratio, (step - 1) / steps,
                                     board, epoch + 1, step)
                window.start_clock()
        batches.close()
        if stopping:
            break

    # --- end
    if step == steps:
        probe = f"probe top-1 {row['probe_top1']:.1f} %, " if val else ""
        if rank == 0:
            write_args(args, folder, world_size=world, finished=True)
        print0(f"done: {args.epochs} epochs, loss {first_loss:.3f} -> {means['loss']:.3f}, {probe}"
               f"{timedelta(seconds=int(time.monotonic() - start))}, {last}")
    else:
        print0(f"stopped at step {step}: the same command goes on from {last}")
    if board:
        board.close()
    leave()
    sys.exit(step < steps and step != args.max_steps)  # 1: cut short by a signal


def run(argv):
    """A command line's run, which ends in words where data, weights or files do not fit."""
    try:
        main(get_args(argv))
    except (DataError, models_mae.WeightsError, OSError) as e:
        raise SystemExit(f"pretrain: {e}")


if __name__ == "__main__":
    run(sys.argv[1:])
