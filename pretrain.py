"""Pretrains a masked autoencoder with the paper's progressive schemes of resolution and mask ratio.

    torchrun --nproc_per_node 8 pretrain.py --scheme s5 --epochs 800      # ImageNet-1k, the paper's run
    python pretrain.py --demo                                             # drawn pictures, two CPU cores, two minutes

A run's folder holds args.json, log.jsonl, TensorBoard events, last.pt, a milestone checkpoint per stage and recon_*.png.
Run the same command again and it goes on where it stopped. The last line is the result:
    done: 24 epochs, loss 1.373 -> 0.401, probe top-1 88.0 %, 0:02:00 h, runs/demo/last.pt
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
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
from essl_loader import DataError, ESSLLoader, FolderLoader
from schedules import PRETRAIN, PRETRAIN_SCHEMES, PRETRAIN_STAGES, lr_at, stage_at, stage_starts

DEMO = dict(data="data/demo_train.beton", val_data="data/demo_val.beton", output_dir="runs/demo", input_size=64,
            model="mae_vit_nano_patch8", epochs=24, warmup_epochs=2, total_batch=64, batch_size=64, blr=4e-3)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--demo", action="store_true", help="two minutes on a CPU: draw pictures if absent, train a tiny model")
    p.add_argument("--data", default="data/train_500_95.beton", help="training set: a .beton file or a folder of classes")
    p.add_argument("--val-data", default="data/val_500_100.beton", help="held-out set for the probe, likewise")
    p.add_argument("--output-dir", default="runs/pretrain", help="the run's folder")
    p.add_argument("--model", default="mae_vit_base_patch16", choices=models_mae.SIZES, help="model size")
    p.add_argument("--input-size", type=int, default=224, help="full resolution in pixels; the schemes scale with it")
    p.add_argument("--scheme", default="s5", choices=PRETRAIN_SCHEMES, help="resolution and mask ratio per stage (Table 10)")
    p.add_argument("--stages", type=float, nargs=3, default=PRETRAIN_STAGES, metavar="SHARE", help="shares of the epochs")
    p.add_argument("--mask-ratio", type=float, help="one mask ratio for all stages instead of the scheme's")
    p.add_argument("--epochs", type=int, default=PRETRAIN["epochs"], help="passes over the data")
    p.add_argument("--warmup-epochs", type=float, default=PRETRAIN["warmup_epochs"], help="linear warm-up of the rate")
    p.add_argument("--blr", type=float, default=PRETRAIN["blr"], help="learning rate for 256 images a step")
    p.add_argument("--weight-decay", type=float, default=PRETRAIN["weight_decay"], help="AdamW's, for matrices")
    p.add_argument("--total-batch", type=int, default=PRETRAIN["total_batch"], help="images a step, over all GPUs")
    p.add_argument("--batch-size", type=int, default=512, help="images at once on one GPU; accumulation makes up the rest")
    p.add_argument("--probe", default="masked", choices=("masked", "full", "off"),
                   help="online probe: on the masked forward's features (nearly free), on a second, full forward (the "
                        "paper's, +60 %% FLOPs), or none; accuracy is always on held-out full pictures")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                   help="torch.compile the training step")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, crops and masks")
    p.add_argument("--resume", default="auto", help="auto: go on from the run's last.pt if there; none; or a checkpoint")
    p.add_argument("--num-workers", type=int, default=0, help="loader threads per process; 0: all cores")
    p.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints")
    p.add_argument("--viz-every", type=int, default=20, help="epochs between reconstruction pictures; also at the end")
    argv = [a.split("=", 1) for a in (sys.argv[1:] if argv is None else argv)]
    argv = ["=".join([a[0].replace("_", "-") if a[0].startswith("--") else a[0], *a[1:]]) for a in argv]
    if "--demo" in argv:
        p.set_defaults(**DEMO)  # what the command line names still wins
    args = p.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1 or args.save_every < 1:
        p.error("--epochs, --batch-size and --save-every must be at least 1")
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
    stop = torch.zeros(1)  # becomes 1 on the rank that was signalled; the ranks agree on it once a step

    def on_signal(number, frame):
        stop.fill_(1)
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)
    return rank, world, device, stop


def any_rank(flag):
    """Whether the flag, a one-element CPU tensor, is set on any rank."""
    flag = flag.clone()
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # over gloo: waits for no GPU
    return bool(flag.item())


def open_loader(path, batch_size, train, **kwargs):
    """ESSLLoader for a file, FolderLoader for a folder."""
    return (FolderLoader if Path(path).is_dir() else ESSLLoader)(path, batch_size, train, **kwargs)


def save(state, path):
    """Writes a checkpoint aside and renames it: `path` is always a whole checkpoint."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class RunLog:
    """log.jsonl and TensorBoard events of rank 0; a resumed run drops the lines after the step it resumes from."""

    def __init__(self, folder, step):
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if step and path.is_file() else []
        aside = folder / ".log.jsonl.tmp"
        aside.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
        os.replace(aside, path)
        self.file, self.board = open(path, "a", buffering=1), SummaryWriter(folder, purge_step=step)

    def write(self, step, **values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)
# --- end setup


class PretrainStep(nn.Module):
    """Model and online probe as one module, so that DDP and torch.compile see one forward: (loss, probe loss)."""

    def __init__(self, model, classes, probe):
        super().__init__()
        self.model, self.probe = model, probe
        if probe != "off":
            width = model.settings["embed_dim"]
            self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes))

    def forward(self, images, labels, mask_ratio, noise):
        patches = self.model.patches(images)
        latent, mask, restore = self.model.forward_encoder(patches, mask_ratio, noise)
        loss = self.model.forward_loss(patches, self.model.forward_decoder(latent, restore), mask)
        if self.probe == "off":
            return loss, torch.zeros_like(loss)
        features = self.model.features(images) if self.probe == "full" else latent[:, 1:].mean(dim=1).detach()
        return loss, F.cross_entropy(self.head(features.float()), labels)


@torch.no_grad()
def probe_accuracy(step_module, loader, autocast, device):
    """The probe's top-1 in percent on held-out full pictures at the run's input size, over all ranks."""
    step_module.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in loader:
        with autocast:
            features = step_module.model.features(images)
        hits = step_module.head(features.float()).argmax(dim=1) == labels
        counts += torch.stack([hits.sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    step_module.train()
    return 100 * (counts[0] / counts[1]).item()


@torch.no_grad()
def save_reconstructions(model, images, mask_ratio, path):
    """A picture with one row per image: original, what the encoder saw, and the reconstruction in true colours.

    A model trained on normalised patches predicts patches of mean 0 and variance 1: its output is shown with each
    patch's own mean and deviation.
    """
    model.eval()
    p, L = model.patch_size, (images.shape[-1] // model.patch_size) ** 2
    noise = torch.rand(len(images), L, generator=torch.Generator().manual_seed(0)).to(images.device)
    _, pred, mask = model(images, mask_ratio, noise)
    patches = model.patches(images)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred.float() * (var + 1e-6) ** 0.5 + mean
    mask = mask[..., None]
    rows = torch.stack([patches, patches * (1 - mask), patches * (1 - mask) + pred * mask], dim=1).flatten(0, 1)
    pixels = (models_mae.unpatchify(rows, p) * model.std + model.mean).clamp(0, 1)
    save_image(pixels, path, nrow=3 * 4)
    model.train()


def main(args):
    start = time.time()
    rank, world, device, stop = setup(args.seed)
    if args.demo and not (Path(args.data).exists() and Path(args.val_data).exists()) and rank == 0:
        subprocess.run([sys.executable, Path(__file__).with_name("build_beton.py"), "--demo"], check=True)
    if world > 1:
        dist.barrier()
    accum = args.total_batch // (args.batch_size * world)
    if accum * args.batch_size * world != args.total_batch:
        raise SystemExit(f"--total-batch {args.total_batch} is not a multiple of --batch-size {args.batch_size} x {world} "
                         f"process(es): take --batch-size {math.gcd(args.total_batch // world or 1, args.batch_size)}, or "
                         "another total")
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".writable-{rank}").touch()
        (folder / f".writable-{rank}").unlink()
    except OSError as e:
        raise SystemExit(f"--output-dir {folder} cannot be written: {e.strerror}. Name a folder that can.")

    # --- data
    shared = dict(num_workers=args.num_workers, seed=args.seed, rank=rank, world_size=world, device=device)
    loader = open_loader(args.data, args.batch_size, True, res=args.input_size, scale=PRETRAIN["scale"], **shared)
    classes = len(loader.classes or ()) or (int(loader.reader.labels.max()) + 1)
    probe = args.probe if classes > 1 else "off"  # a flat folder has nothing to probe for
    val = None
    if probe != "off":
        try:
            val = open_loader(args.val_data, args.batch_size, False, res=args.input_size, **shared)
        except DataError as e:
            raise SystemExit(f"--val-data, for the held-out probe: {e} Or train without it: --probe off.")
        if loader.classes and val.classes and loader.classes != val.classes:
            raise SystemExit(f"{args.data} has the classes {loader.classes[:3]}..., {args.val_data} {val.classes[:3]}...: "
                             "the probe needs the same; name the matching --val-data, or --probe off")
    steps_per_epoch = len(loader) // accum
    if steps_per_epoch == 0:
        raise SystemExit(f"{loader.num_samples} pictures do not fill one step of {args.total_batch}: lower --total-batch")
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    # --- model
    model = getattr(models_mae, args.model)(img_size=args.input_size)
    step_module = PretrainStep(model, classes, probe).to(device)
    wrapped = step_module
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=[device] if device.type == "cuda" else None)
    train_step = torch.compile(wrapped, dynamic=False) if args.compile else wrapped
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    # --- optimizer: decay for matrices only; the probe has its own constant rate
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    if probe != "off":
        groups.append({"params": list(step_module.head.parameters()), "weight_decay": 0.0})
    peak_lr = args.blr * args.total_batch / 256
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=PRETRAIN["betas"], fused=True)

    # --- resume
    last = folder / "last.pt"
    source = {"auto": last if last.is_file() else None, "none": None}.get(args.resume, Path(args.resume))
    settings = {k: getattr(args, k) for k in ("model", "input_size", "scheme", "mask_ratio", "epochs", "warmup_epochs",
                                              "blr", "weight_decay", "total_batch", "seed")}
    settings.update(stages=list(args.stages), probe=probe, num_samples=loader.num_samples, **model.settings)
    step, position, first_loss = 0, None, None
    if source:
        try:
            state = torch.load(source, map_location=device, weights_only=True)
            theirs = state["settings"]
        except Exception as e:  # a damaged pickle can raise anything
            raise SystemExit(f"--resume {source}: not a checkpoint of pretrain.py that can be read ({e}). --resume none "
                             "starts anew.")
        differ = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in settings.items() if theirs.get(k) != v]
        if differ:
            raise SystemExit(f"{source} is of a run with other settings ({'; '.join(differ)}). Give the same, or another "
                             "--output-dir, or --resume none to start over in this one.")
        step_module.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        step, position, first_loss = state["step"], state["loader"], state["first_loss"]
    log = bar = None
    if rank == 0:
        (folder / "args.json").write_text(json.dumps({**vars(args), "world_size": world}, indent=1))
        log = RunLog(folder, step)
        bar = tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def say(text):
        if rank == 0:
            tqdm.write(text)

    def checkpoint(name, step):
        if rank == 0:
            save({"modules": step_module.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(),
                  "step": step, "epoch": step // steps_per_epoch, "first_loss": first_loss, "settings": settings,
                  "model": model.settings, "classes": loader.classes}, folder / name)
    say(f"{args.model}, {sum(p.numel() for p in trained) / 1e6:.1f} M parameters; {loader.num_samples:,} pictures, "
        f"{classes} classes; {world} x {args.batch_size} x {accum} = {args.total_batch} a step, {steps_per_epoch} steps an "
        f"epoch; {device.type}, {loader.num_workers} loader threads" + (f"; from {source}, step {step}" if source else ""))

    # --- train
    mask_rng, stage_of = torch.Generator(device), None
    probe_every = max(1, args.epochs // 100)  # a hundred points of the curve: the held-out pass costs a little
    total, seen, waited, clock, mean_loss, top1 = torch.zeros((), device=device), 0, 0.0, time.time(), None, None
    log_every = min(50, steps_per_epoch)
    for epoch in range(step // steps_per_epoch, args.epochs):
        stage, (res, mask_ratio) = stage_at(PRETRAIN_SCHEMES[args.scheme], epoch, args.epochs, args.stages,
                                            args.input_size, model.patch_size)
        mask_ratio = args.mask_ratio if args.mask_ratio is not None else mask_ratio
        if stage != stage_of:
            say(f"epoch {epoch}: stage {stage + 1}, {res} px, mask ratio {mask_ratio}")
        stage_of = stage
        if position and step % steps_per_epoch:
            loader.load_state_dict(position)
        else:
            loader.set_epoch(epoch)
        position = None
        loader.set_stage(res=res)
        L = (res // model.patch_size) ** 2
        batches = iter(loader)
        for step in range(step, (epoch + 1) * steps_per_epoch):
            lr = lr_at(step, steps, warmup, peak_lr)
            for group in optimizer.param_groups[:2]:
                group["lr"] = lr
            # One draw for the whole step, a function of (seed, step): the same masks for any number of ranks
            noise = torch.rand(accum, args.batch_size, world, L, device=device,
                               generator=mask_rng.manual_seed(args.seed * 1_000_003 + step))[:, :, rank]
            for micro in range(accum):
                t = time.time()
                images, labels = next(batches)
                waited += time.time() - t
                with nullcontext() if world == 1 or micro == accum - 1 else wrapped.no_sync():
                    with autocast:
                        loss, probe_loss = train_step(images, labels, mask_ratio, noise[micro])
                    ((loss + probe_loss) / accum).backward()
                total += loss.detach() / accum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += args.total_batch

            # --- log, save, stop
            done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
            stopping = any_rank(stop)
            if epoch_ends or stopping or done % log_every == 0:
                count = seen // args.total_batch
                if world > 1:
                    dist.all_reduce(total)
                mean_loss, elapsed = total.item() / count / world, time.time() - clock
                if not math.isfinite(mean_loss):
                    raise SystemExit(f"the loss is {mean_loss} at step {done} (epoch {epoch}, lr {lr:.2e}). {last} is the "
                                     "last good checkpoint; try a lower --blr or a longer --warmup-epochs")
                first_loss = mean_loss if first_loss is None else first_loss
                values = dict(epoch=epoch, stage=stage + 1, loss=mean_loss, lr=lr, res=res, mask_ratio=mask_ratio,
                              img_s=seen / elapsed, data_wait=waited / elapsed)
                if device.type == "cuda":
                    values["mem"] = torch.cuda.max_memory_allocated() / 2 ** 30  # GiB
                if epoch_ends and val and ((epoch + 1) % probe_every == 0 or epoch + 1 == args.epochs):
                    top1 = values["probe_top1"] = probe_accuracy(step_module, val, autocast, device)
                if rank == 0:
                    log.write(done, **values)
                    bar.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{seen / elapsed:.0f}")
                if epoch_ends:
                    say(f"epoch {epoch} loss {mean_loss:.4f} {seen / elapsed:.0f} images/s, {waited / elapsed:.1%} waiting"
                        + (f", probe {top1:.1f} %" if "probe_top1" in values else ""))
                total.zero_()
                seen, waited, clock = 0, 0.0, time.time()
            if rank == 0:
                bar.update()
            if stopping and not epoch_ends:
                batches.close()
                checkpoint("last.pt", done)
                raise SystemExit(f"stopped by a signal at step {done}; {last} is written: the same command goes on there")
        step += 1
        batches.close()
        loader.set_epoch(epoch + 1)  # what the checkpoint below resumes with
        ended = epoch + 1
        if ended % args.save_every == 0 or ended == args.epochs or stopping:
            checkpoint("last.pt", step)
        if ended in stage_starts(args.epochs, args.stages)[1:]:
            checkpoint(f"stage{stage + 1}.pt", step)
        if rank == 0 and (ended % args.viz_every == 0 or ended == args.epochs):
            pictures = next(iter(val or loader))[0][:12]
            save_reconstructions(model, pictures, 0.75, folder / f"recon_{ended:04d}.png")
        if stopping and ended < args.epochs:
            raise SystemExit(f"stopped by a signal at step {step}; {last} is written: the same command goes on there")
    if mean_loss is None:
        say(f"{last} is of a finished run: {args.epochs} epochs")
    else:
        hours = f"{int(time.time() - start) // 3600}:{time.strftime('%M:%S', time.gmtime(time.time() - start))}"
        say(f"done: {args.epochs} epochs, loss {first_loss:.3f} -> {mean_loss:.3f}, "
            + (f"probe top-1 {top1:.1f} %, " if top1 is not None else "") + f"{hours} h, {last}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args())
    except DataError as e:
        raise SystemExit(f"pretrain: {e}")
