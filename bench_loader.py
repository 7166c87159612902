"""Shows what loading costs, against the alternatives: images/s, memory, start-up, and what they mean for training.

    python bench_loader.py --data-dir imagenet/train   # builds the files that it measures, in a temporary folder
    python bench_loader.py                             # data/train_500_95.beton, else the demo's drawn pictures

Each alternative is a process of its own, on the same samples; passes alternate between them, and a ratio is the median
of the rounds' ratios. FFCV has no flip to do, ESSL flips. Memory is what a pass holds at its peak beyond what the
process holds between passes: neither compiled code nor page cache. What is not installed, or needs a folder that was
not given, is left out with a line that says so. About eight minutes on two idle cores; the last line:
    written: runs/bench.json, runs/bench.png
"""
import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numba import njit

from essl_loader import (FLIP_DRAW, BetonReader, DataError, ESSLLoader, FolderLoader, decode_planes, ffcv_decoder,
                         make_scratch, pread, random_box, resized_crop, uniform, usable_cores)

SECTIONS = ("alternatives", "decomposition", "compression", "augmentation", "epoch", "pixels")
NEEDS = {"image folder": "torchvision", "DALI, CPU": "nvidia.dali", "FFCV": "ffcv", "FFCV + ffcv_decoder": "ffcv",
         "ESSL bilinear": "numba", "ESSL": "numba"}  # the alternatives, and what must be installed
EPOCH, AIM = 1_281_167, 11_863  # ImageNet-1k's training images; images/s that are 800 epochs in a day
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, help="the .beton; else data/train_500_95.beton, else data/demo_train.beton")
    p.add_argument("--data-dir", type=Path, help="folder of class folders; --data is built from it unless given")
    p.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="file for all numbers, each pass too")
    p.add_argument("--plot", type=Path, default=Path("runs/bench.png"), help="file for the plot")
    p.add_argument("--res", type=int, nargs="+", default=[224, 160], help="output sides; other sections take the first")
    p.add_argument("--batch-size", type=int, default=256, help="images a batch")
    p.add_argument("--num-workers", type=int, default=0, help="threads or processes of a loader; 0: all cores")
    p.add_argument("--images", type=int, default=2048, help="images a pass; a file with fewer is repeated")
    p.add_argument("--passes", type=int, default=7, help="rounds of passes that count")
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    p.add_argument("--train-img-s", type=float, help=f"images/s that pretrain.py reached; else the aim, {AIM:,}")
    argv = [a.split("=", 1) for a in (sys.argv[1:] if argv is None else argv)]
    argv = ["=".join([a[0].replace("_", "-") if a[0].startswith("--") else a[0], *a[1:]]) for a in argv]
    args = p.parse_args(argv)
    if min(args.batch_size, args.images, args.passes, *args.res) < 1:
        p.error("--batch-size, --images, --passes and --res must be at least 1")
    args.command, args.cores = shlex.join(["python", "bench_loader.py", *argv]), args.num_workers or usable_cores()
    return args


# --- processes and passes
def serve(pipe, cores, make, args):
    """A child process: answers requests with make(*args)(request), or why it cannot, until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    multiprocessing.set_start_method("fork", force=True)  # DataLoader's default; here it would be spawn, 5 s a pass
    try:
        os.sched_setaffinity(0, cores)
        run = make(*args)
        while True:
            pipe.send(run(pipe.recv()))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as e:  # whatever an alternative raises, the others go on
        pipe.send(f"{type(e).__name__}: {e}")


def start_child(stack, cores, make, *args):
    """A function that sends a new process a request; raises RuntimeError. The process ends with stack or with us."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    child = context.Process(target=serve, args=(end, cores, make, args))
    child.start()
    end.close()
    stack.callback(child.kill)

    def request(what):
        try:
            pipe.send(what)
            answer = pipe.recv()
        except (EOFError, OSError):
            answer = "its process died"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer
    return request


def alternate(runs, passes, base):
    """Rows of images/s: each function of the dict in turn, in `passes` rounds after one that does not count.

    Ratios are to the one named `base`; where names have the form "step: base", to the one of the same step.
    """
    rounds = [{name: run() for name, run in runs.items()} for _ in range(passes + 1)][1:]
    rows = []
    for name in runs:
        speeds = [r[name] for r in rounds]
        other = f"{name.split(': ')[0]}: {base}" if ": " in name else base
        ratio = {f"x {base}": float(np.median([r[name] / r[other] for r in rounds]))} if other in runs else {}
        rows.append({"name": name, "images_s": float(np.median(speeds)), "min": min(speeds), "max": max(speeds),
                     **ratio, "passes": speeds})
    return rows


def timed(function, images, *args):
    """Images/s of a call."""
    clock = time.perf_counter()
    function(*args)
    return images / (time.perf_counter() - clock)


def show(value):
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


class Report:
    """What is printed, and the same for the JSON and the plot."""

    def __init__(self, args, path, reader):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or ["unknown CPU"]
        self.data = dict(command=args.command, cpu=cpu[0], cores=args.cores, file=str(path),
                         file_images=reader.num_samples, file_mb=path.stat().st_size / 1e6, left_out=[], tables={},
                         gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")

    def note(self, line):
        print(line, flush=True)
        self.data["left_out"].append(line)

    def table(self, section, title, rows):
        """Prints rows, dicts of a name and figures, under what they were measured on."""
        self.data["tables"][section] = rows
        print(title.join("\n\n") + "{cpu}, {cores} core(s), {gpu}; {file}: {file_images:,} images, {file_mb:,.1f} MB\n"
              "{command}".format(**self.data))
        columns = [[key.replace("images_s", "images/s").replace("_", " "), *[show(row[key]) for row in rows]]
                   for key in rows[0] if key != "passes"]
        for line in zip(*[[c.rjust(max(map(len, column))) for c in column] for column in columns]):
            print("  ".join(line), flush=True)


# --- alternatives
def open_alternative(name, path, folder, res, batch_size, workers, ids):
    """A function that starts a pass over ids: an iterator of (uint8 pictures, labels)."""
    shared = dict(res=res, scale=SCALE, ratio=RATIO, num_workers=workers, drop_last=False, indices=ids,
                  interpolation="bilinear" if name == "ESSL bilinear" else "bicubic")
    if name == "image folder":
        return FolderLoader(folder, batch_size, **shared).__iter__
    if name.startswith("ESSL"):
        return ESSLLoader(path, batch_size, **shared).__iter__
    if name == "DALI, CPU":
        return lambda: dali_batches(folder, res, batch_size, workers, ids)
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor
    decoder = RandomResizedCropRGBImageDecoder if name == "FFCV" else ffcv_decoder
    pipelines = {"image": [decoder((res, res), scale=SCALE, ratio=RATIO), ToTensor()],
                 "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
    return Loader(str(path), batch_size, num_workers=workers, os_cache=True, order=OrderOption.RANDOM, indices=ids,
                  drop_last=False, pipelines=pipelines).__iter__


def dali_batches(folder, res, batch_size, workers, ids):
    """DALI's pipeline for the CPU, new in each pass: an old one would have its first batches ready."""
    from nvidia.dali import fn, pipeline_def, types
    files, labels = zip(*(FolderLoader(folder, 1).samples[i] for i in ids))

    @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, prefetch_queue_depth=3)
    def pipeline():
        jpegs, label = fn.readers.file(files=list(files), labels=list(labels), random_shuffle=True)
        pictures = fn.decoders.image_random_crop(jpegs, device="cpu", output_type=types.RGB, random_area=SCALE,
                                                 random_aspect_ratio=RATIO)
        return fn.resize(pictures, size=(res, res), interp_type=types.INTERP_LINEAR, antialias=True), label
    running = pipeline()
    running.build()
    for at in range(0, len(ids), batch_size):  # the last batch comes filled up
        yield [output.as_array()[:len(ids) - at] for output in running.run()]


def held_memory():
    """Bytes of anonymous and shared memory of this process and its workers; what they share counts once."""
    pids = [os.getpid()] + [child.pid for child in multiprocessing.active_children()]
    lines = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids).splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def loader_passes(*settings):
    """run(whether to measure memory) of one alternative; the first call opens the loader."""
    start, first = None, 0.0

    def run(memory):
        nonlocal start, first
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes freed would hide what this one takes
        before, peak, n, clock = held_memory() if memory else 0, 0, 0, time.perf_counter()
        start = start or open_alternative(*settings)
        for images, _ in start():
            first = first or time.perf_counter() - clock
            n += len(images)
            peak = max(peak, held_memory()) if memory else 0  # no loader gives buffers back before the end
        return {"images": n, "speed": n / (time.perf_counter() - clock), "first": first, "memory": peak - before}
    return run


def bench_alternatives(args, report, path, n):
    rows, settings = [], (args.batch_size, args.cores, np.resize(np.arange(n), args.images))
    next(open_alternative("ESSL", path, None, args.res[0], *settings)())  # the kernels are on disk from here on
    for res in args.res:
        with ExitStack() as stack:
            runs, warm = {}, {}
            for name, module in NEEDS.items():
                try:
                    if name in ("image folder", "DALI, CPU") and not args.data_dir:
                        raise RuntimeError("it needs a folder of pictures, --data-dir")
                    importlib.util.find_spec(module).name  # finds, but does not import
                    child = start_child(stack, os.sched_getaffinity(0), loader_passes, name, path, args.data_dir, res,
                                        *settings)
                    child(False)
                    warm[name], runs[name] = child(True), lambda child=child: child(False)["speed"]
                except (RuntimeError, ImportError, AttributeError) as e:
                    reason = e if isinstance(e, RuntimeError) else f"{module} is not installed"
                    report.note(f"{name}, {res} px: left out: {reason}")
            for row in alternate(runs, args.passes, "FFCV"):
                w = warm[row["name"]]
                rows.append({**row, "per_core": row["images_s"] / args.cores, "memory_MB": w["memory"] / 1e6,
                             "first_batch_s": w["first"], "images": w["images"], "res": res})
    report.table("alternatives", f"Alternatives: {args.passes} passes, batch {args.batch_size}, uint8 out; first "
                 "batch: since the loader began to be built, imports done", rows)


# --- decomposition
@njit(nogil=True, cache=True)
def flip(pixels, mirrored, out):
    """FFCV's RandomHorizontalFlip on (res, res, 3): a copy."""
    for y in range(len(pixels)):
        out[y] = pixels[y, ::-1] if mirrored else pixels[y, ::1]


@njit(nogil=True, cache=True)
def normalise(pixels, table, out):
    """FFCV's NormalizeImage: uint8 (pixels, 3) to float32 by look-up in (256, 3)."""
    for i in range(len(pixels)):
        out[i, 0], out[i, 1], out[i, 2] = table[pixels[i, 0], 0], table[pixels[i, 1], 1], table[pixels[i, 2], 2]


@njit(nogil=True, cache=True)
def essl_steps(step, fd, widths, heights, ptrs, sizes, ids, scale, ratio, table, pixels, floats, scratch):
    """Loads ids as ESSL does, up to a step of Table 13; the flip is part of the resize's last write."""
    for k, i in enumerate(ids):
        pread(fd, scratch.raw.ctypes.data, sizes[i], ptrs[i])
        x, y, w, h = random_box(widths[i], heights[i], scale, ratio, 0, 0, k)
        if step == 1:
            decode_planes(scratch.raw, sizes[i], widths[i], heights[i], x, y, w, h, scratch)
        elif step > 1:
            mirrored = step > 2 and uniform(0, 0, k, FLIP_DRAW) < 0.5
            resized_crop(scratch.raw, sizes[i], 0, widths[i], heights[i], x, y, w, h, len(pixels), True, mirrored,
                         pixels.reshape(-1), scratch)
        if step > 3:
            normalise(pixels.reshape(-1, 3), table, floats)


def ffcv_steps(step, data, widths, heights, ptrs, sizes, ids, table, pixels, floats, picture, mirrored):
    """The same by FFCV's C functions: the whole picture decoded, the box resized with cv2's INTER_AREA."""
    from ffcv.libffcv import imdecode, resize_crop
    for k, i in enumerate(ids):
        w, h, jpeg = int(widths[i]), int(heights[i]), data[ptrs[i]:ptrs[i] + sizes[i]]
        if step == 0:
            picture[:len(jpeg)] = jpeg  # FFCV decodes from the mapped file: the cost of touching it
            continue
        imdecode(jpeg, picture, h, w, h, w, 0, 0, 1, 1, False, False)
        if step > 1:
            x, y, cols, rows = random_box(w, h, SCALE, RATIO, 0, 0, k)
            resize_crop(picture[:3 * w * h].reshape(h, w, 3), y, y + rows, x, x + cols, pixels)
        if step > 2:
            flip(pixels, uniform(0, 0, k, FLIP_DRAW) < 0.5, mirrored)
        if step > 3:
            normalise(mirrored.reshape(-1, 3), table, floats)


def step_passes(name, path, res, images):
    """run(step) of FFCV or ESSL: images/s up to that step."""
    reader = BetonReader(path)
    if reader.modes.any():
        raise RuntimeError("the file stores pictures that are not JPEG")
    tables = reader.widths, reader.heights, reader.ptrs, reader.sizes, np.resize(np.arange(reader.num_samples), images)
    look_up = ((np.arange(256)[:, None] - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]).astype(np.float32)
    outs = look_up, np.zeros((res, res, 3), np.uint8), np.zeros((res * res, 3), np.float32)
    if name == "ESSL":
        scratch = make_scratch(reader.sizes, reader.widths, reader.heights, res)
        return lambda step: timed(essl_steps, images, step, reader.file.fileno(), *tables, SCALE, RATIO, *outs, scratch)
    room = np.zeros(max(reader.sizes.max(), 3 * (reader.widths * reader.heights).max()), np.uint8), outs[1].copy()
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    return lambda step: timed(ffcv_steps, images, step, data, *tables, *outs, *room)


def bench_decomposition(args, report, path, n):
    images, core = max(1, args.images // 4), {min(os.sched_getaffinity(0))}
    with ExitStack() as stack:
        children = {}
        for name in ("FFCV", "ESSL"):
            child = start_child(stack, core, step_passes, name, path, args.res[0], images)
            try:
                child(4)
                children[name] = child
            except RuntimeError as e:
                report.note(f"decomposition: {name} left out: {e}")
        runs = {f"{step}: {name}": lambda child=child, i=i: child(i)
                for i, step in enumerate(("read", "decode", "+ resize", "+ flip", "+ normalise"))
                for name, child in children.items()}
        rows = alternate(runs, args.passes, "FFCV")
    if rows:
        report.table("decomposition", f"Steps (Table 13), cumulative: one core, {images:,} images a pass, "
                     f"{args.res[0]} px; the last on the CPU, where ESSL leaves it to the device", rows)


# --- compression
def build(folder, out, side, quality):
    """A .beton of the folder."""
    words = "--data-dir", folder, "--out", out, "--max-resolution", str(side), "--quality", str(quality)
    done = subprocess.run([sys.executable, Path(__file__).with_name("build_beton.py"), *words], capture_output=True,
                          text=True)
    if done.returncode:
        raise DataError(f"building {out.name} from {folder} failed: {done.stderr.strip()}")
    return out


def bench_compression(args, report, path, n):
    if not args.data_dir:
        return report.note("compression: left out: it needs a folder of pictures, --data-dir")
    with tempfile.TemporaryDirectory() as temporary:
        files = {f"({s}, {q})": build(args.data_dir, Path(temporary) / f"train_{s}_{q}.beton", s, q)
                 for s, q in ((500, 100), (500, 95), (500, 90), (1000, 95), (256, 95))}
        starts = {name: open_alternative("ESSL", file, None, args.res[0], args.batch_size, args.cores,
                                         np.resize(np.arange(n), args.images)) for name, file in files.items()}
        rows = alternate({name: lambda start=start: timed(lambda: [None for _ in start()], args.images)
                          for name, start in starts.items()}, args.passes, "(500, 95)")
        for row in rows:
            size = files[row["name"]].stat().st_size
            row.update(MB=size / 1e6, bytes_per_image=size // n)
    report.table("compression", f"(Longest side, quality) (Table 4, Figure 3c): ESSL, {args.images:,} images a pass, "
                 f"{args.res[0]} px", rows)


# --- augmentation
def three_aug(picture, rng):
    """3 Aug with Pillow: one of grayscale, solarize and blur."""
    from PIL import ImageFilter, ImageOps
    changes = (lambda: ImageOps.grayscale(picture).convert("RGB"), lambda: ImageOps.solarize(picture, 128),
               lambda: picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2))))
    return changes[rng.integers(3)]()


def batched_passes(device, images):
    """run() of finetune.py's 3 Aug; called in a process of its own, since scripts do not import each other."""
    torch.set_num_threads(1)
    augment = importlib.import_module("finetune").three_augment
    images, generator = torch.from_numpy(images).to(device), torch.Generator()
    return lambda _: timed(lambda: augment(images, generator)[0, 0, 0, 0].item(), len(images))  # waits for the GPU


def bench_augmentation(args, report, path, n):
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform
    rand_aug = rand_augment_transform("rand-m9-mstd0.5-inc1", {"magnitude_max": 9.99})  # 10 posterizes to 0 bits
    ids = np.resize(np.arange(n), args.batch_size)
    images = next(iter(ESSLLoader(path, args.batch_size, res=args.res[0], indices=ids)))[0]
    pictures, rng = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], np.random.default_rng(0)
    runs = {"RandAug, Pillow": lambda: timed(lambda: [rand_aug(p) for p in pictures], len(pictures)),
            "3 Aug, Pillow": lambda: timed(lambda: [three_aug(p, rng) for p in pictures], len(pictures))}
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            try:
                if device == "cuda" and not torch.cuda.is_available():
                    raise RuntimeError("there is no CUDA device")
                child = start_child(stack, {min(os.sched_getaffinity(0))}, batched_passes, device, images.numpy())
                child(0)
                runs[f"3 Aug, batches, {device}"] = lambda child=child: child(0)
            except RuntimeError as e:
                report.note(f"3 Aug, batches, {device}: left out: {e}")
        rows = alternate(runs, args.passes, "RandAug, Pillow")
    report.table("augmentation", f"Augmentation (Table 7): one core, {len(pictures)} pictures of {args.res[0]} px",
                 rows)


# --- epoch
def bench_epoch(args, report, path, n):
    rows, train = [], args.train_img_s or AIM
    for r in report.data["tables"].get("alternatives", ()):
        if r["res"] == args.res[0]:
            rows.append({"name": r["name"], "load_s": EPOCH / r["images_s"], "train_s": EPOCH / train,
                         "load_/_train": train / r["images_s"], "cores_per_GPU": train / r["per_core"]})
    if not rows:
        return report.note("epoch: left out: it follows from the section alternatives")
    source = "as given" if args.train_img_s else "the aim of a day on one H200, NOT a measurement"
    report.table("epoch", f"An ImageNet epoch (Figure 1), training at {train:,.0f} images/s: {source}", rows)


# --- pixels
def bench_pixels(args, report, path, n):
    if not args.data_dir:
        return report.note("pixels: left out: it needs a folder of pictures, --data-dir")
    import matplotlib.pyplot as plt
    rows, shared = [], dict(res=args.res[0], indices=np.arange(min(n, args.images)), drop_last=False)
    for train in (False, True):
        with ESSLLoader(path, 64, train, **shared) as loader:
            means = []
            for (a, _), (b, _) in zip(FolderLoader(args.data_dir, 64, train, **shared), loader):
                means += ((a.float() - b).abs().mean(dim=(1, 2, 3)) / 255).tolist()
                shown = [[x.permute(1, 2, 0).numpy().astype(int) for x in pair] for pair in zip(a[:6], b[:6])]
        rows.append({"name": "training" if train else "evaluation", "mean_difference": float(np.mean(means)),
                     "largest_of_a_picture": max(means), "images": len(means)})
    picture = np.hstack([np.vstack([a, b, np.minimum(8 * abs(a - b), 255)]) for a, b in shown]).astype(np.uint8)
    plt.imsave(args.plot.with_name(f"{args.plot.stem}_difference.png"), picture)
    report.table("pixels", "Mean absolute difference, of 1 (Appendix C; the paper has 0.025), between folder and "
                 f".beton, same boxes; in {args.plot.stem}_difference.png: folder, .beton, 8 x difference", rows)


# --- plot
def draw(report, path):
    import matplotlib.pyplot as plt
    tables = {k: v for k, v in report.data["tables"].items() if k != "pixels"}
    figure, axes = plt.subplots(len(tables) or 1, figsize=(8, 1 + 2.5 * len(tables)), squeeze=False,
                                layout="constrained")
    for axis, (section, rows) in zip(axes[:, 0], tables.items()):
        key = "load_s" if section == "epoch" else "images_s"
        names = [r["name"] + (f", {r['res']} px" if "res" in r else "") for r in rows]
        axis.barh(names[::-1], [r[key] for r in rows][::-1])
        axis.set(title=section, xlabel=key.replace("_", "/"), xscale="log" if section == "decomposition" else "linear")
    figure.suptitle("{cpu}, {cores} core(s), {file}".format(**report.data))
    figure.savefig(path, dpi=100)


def find_file(args, temporary):
    """The .beton to measure, made where it has to be."""
    if args.data or args.data_dir:
        return args.data or build(args.data_dir, Path(temporary) / "train_500_95.beton", 500, 95)
    path = Path("data/train_500_95.beton")
    if not path.exists():
        print(f"{path} is not there and no --data-dir was given: the demo's drawn pictures, smaller than photos, it is")
        path = Path("data/demo_train.beton")
        if not path.exists():
            subprocess.run([sys.executable, Path(__file__).with_name("build_beton.py"), "--demo"], check=True)
    return path


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_loader: stopped"))  # so that files and processes go too
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = find_file(args, temporary)
            reader = BetonReader(path)
            n = reader.num_samples
            if args.data_dir and FolderLoader(args.data_dir, 1).total != n:
                raise DataError(f"{path} has {n:,} pictures, {args.data_dir} another number: name the folder that the "
                                "file was built from")
            for output in (args.json, args.plot):
                output.parent.mkdir(parents=True, exist_ok=True)
            report = Report(args, path, reader)
            for _ in reader.preload():  # decoding is measured, not the disk
                pass
            for section in SECTIONS:
                if section in args.only:
                    globals()[f"bench_{section}"](args, report, path, n)
        except (DataError, subprocess.CalledProcessError) as e:
            raise SystemExit(f"bench_loader: {e}") from None
        draw(report, args.plot)
        args.json.write_text(json.dumps(report.data, indent=1))
    print(f"\nwritten: {args.json}, {args.plot}")


if __name__ == "__main__":
    main(get_args())
