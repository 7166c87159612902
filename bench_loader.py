"""Shows what loading costs, against the alternatives: images/s, cores, memory, start-up, pixels.

    python bench_loader.py --data-dir imagenet/train   # builds what it needs in $TMPDIR
    python bench_loader.py --data data/demo_train.beton     # only what needs no picture folder

Alternatives take turns, each in a process of its own; a ratio ("x FFCV") is the median of the
rounds' ratios. Two views count as two images. In full passes only ESSL flips.
first_batch_s: from opening the loader in a new process, imports done, kernels in numba's cache.
memory_MB: a pass's peak beyond what its process holds between passes. cores_for_N: cores that load
N images/s. decomposition (Table 13): cumulative, one core. pixels (Appendix C): mean absolute
difference of folder and .beton, of 1; in *_pixels.png folder, .beton, 8 x difference. Last line:
    written: runs/bench.json, runs/bench.png
"""
import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from essl_loader import (BetonReader, DataError, ESSLLoader, FolderLoader, decode_planes,
                         ffcv_decoder, make_scratch, random_box, resized_crop, usable_cores)

SECTIONS = ("alternatives", "decomposition", "compression", "pixels")
ALTERNATIVES = {  # name: argument that it reads, or build_beton.py's flags for a file of it
    "image folder": "data_dir", "FFCV": "data", "FFCV + ffcv_decoder": "data",
    "ESSL bilinear": "data", "ESSL": "data", "ESSL views=2": "data",
    "ESSL 4:4:4": "--chroma 444", "ESSL lossless": "--lossless"}
COMPRESSION = {f"{side}_{quality}": f"--max-resolution {side} --quality {quality}"  # Table 4
               for side, quality in ((500, 100), (500, 95), (500, 90), (256, 95))}
STEPS = ("read", "decode", "+ resize", "+ flip", "+ normalise")
SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", type=Path, help="the .beton (default: from --data-dir, or data/train_500_95)")
    add("--data-dir", type=Path, help="folder of class folders of pictures")
    add("--json", type=Path, default=Path("runs/bench.json"), help="all numbers, of each pass too")
    add("--plot", type=Path, default=Path("runs/bench.png"), help="plot of the alternatives")
    add("--res", type=int, nargs="+", default=[224, 160], help="pixels; other sections: the first")
    add("--batch-size", type=int, default=256, help="images a batch (default: %(default)s)")
    add("--num-workers", type=int, default=0, help="threads or processes; 0: all cores (default)")
    add("--images", type=int, default=2048, help="images a pass; a small file is repeated")
    add("--passes", type=int, default=7, help="rounds that count (default: %(default)s)")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all)")
    add("--img-s", type=int, nargs="+", default=[11863], help="to count cores for (%(default)s)")
    args = p.parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                         for word in (sys.argv[1:] if argv is None else argv)])
    args.num_workers = args.num_workers or usable_cores()
    if min(args.batch_size, args.num_workers, args.images, args.passes, *args.res, *args.img_s) < 1:
        p.error("numbers must be at least 1")
    return args


# --- report: what is printed, and the same for the JSON
def leave_out(report, what, reason):
    report["left_out"].append(f"{what}: left out: {str(reason).splitlines()[-1]}")
    print(report["left_out"][-1], flush=True)


def add_table(report, section, rows):
    """Prints rows, dicts with the same keys, in columns."""
    report[section] = rows
    print(f"\n{section}")
    keys = [key for key in rows[0] if key != "passes"] if rows else []
    for row in [dict(zip(keys, keys)), *rows]:
        for key in keys:
            text = f"{row[key]:,.4g}" if isinstance(row[key], float) else f"{row[key]}"
            print(text.rjust(len(key) if key != "name" else 19), end="  ")
        print(flush=True)


# --- processes
child_runs = []  # in a child process: the function that times its passes


def time_pass(make, *make_args, with_memory=False):
    """In a child process: what make(*make_args)(with_memory) returns; it is made once."""
    if not child_runs:
        os.setpgid(0, 0)  # a group: main ends it with the workers that it starts
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends when its parent does
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # by which ffcv_decoder ends a process
        child_runs.append(make(*make_args))
    return child_runs[0](with_memory)


def measure(args, report, makes, base):
    """Rows of images/s, by processes {name: (make, *arguments)} in turns; they warm up first."""
    rows = []
    children = {}  # pools of one process, which ends when nothing refers to the pool
    for name, make in makes.items():
        # Our kernels into numba's cache, by a process that measures nothing
        starts = 2 if name == "ESSL bilinear" else 1
        try:
            for _ in range(starts):
                child = ProcessPoolExecutor(1)
                row = {"name": name, **child.submit(time_pass, *make).result()}
            row |= child.submit(time_pass, *make, with_memory=True).result()
        except DataError:
            raise
        except Exception as error:  # whatever an alternative raises, the others go on
            leave_out(report, name, error)
            continue
        rows.append(row)
        children[name] = child
    rounds = [{name: child.submit(time_pass, *makes[name]).result()["images_s"]
               for name, child in children.items()} for _ in range(args.passes)]
    for row in rows:
        row["passes"] = [speeds[row["name"]] for speeds in rounds]
        row["images_s"] = float(np.median(row["passes"]))
        # for "step: name" the base is that of the same step
        other = ": ".join([*row["name"].split(": ")[:-1], base])
        if other in children:
            row[f"x {base}"] = float(np.median([r[row["name"]] / r[other] for r in rounds]))
    return rows


# --- loaders
def find_source(args, reads):
    """The path that an alternative reads; a file of --data-dir is built once for its flags."""
    if not args.data_dir and reads != "data":
        raise RuntimeError("it needs a folder of pictures, --data-dir")
    if hasattr(args, reads):
        return getattr(args, reads)
    path = Path(args.temporary, f"{reads.replace('-', '').replace(' ', '_')}.beton")
    if not path.exists():
        words = [sys.executable, Path(__file__).with_name("build_beton.py"), "--out", path]
        words += ["--data-dir", args.data_dir, "--limit", f"{args.limit}", *reads.split()]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"build_beton.py {reads} --data-dir {args.data_dir}: {done.stderr}")
    return path


def held_memory():
    """MB of anonymous and shared memory of this process and its workers; shared counts once."""
    pids = [os.getpid()] + [child.pid for child in multiprocessing.active_children()]
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return 1024e-6 * sum(map(int, re.findall(r"Pss_(?:Anon|Shmem): *(\d+)", text)))


def open_alternative(name, source, res, args):
    """A function that starts a pass over args.ids: an iterator of (uint8 images, labels)."""
    settings = {"num_workers": args.num_workers, "drop_last": False}
    settings["indices"] = args.folder_ids if name == "image folder" else args.ids
    if name.startswith("FFCV"):
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import Squeeze, ToTensor
        decoder = RandomResizedCropRGBImageDecoder if name == "FFCV" else ffcv_decoder
        pipelines = {"image": [decoder((res, res), SCALE, RATIO), ToTensor()],
                     "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
        return Loader(str(source), args.batch_size, os_cache=True, order=OrderOption.RANDOM,
                      pipelines=pipelines, **settings).__iter__
    settings["interpolation"] = "bilinear" if "bilinear" in name else "bicubic"
    settings["views"] = 2 if "views=2" in name else 1
    loader = FolderLoader if name == "image folder" else ESSLLoader
    return loader(source, args.batch_size, True, res, SCALE, RATIO, **settings).__iter__


def loader_passes(args, name, reads, res):
    """run(with_memory): a pass's memory, or images/s and, in the first, time to its first batch."""
    if name.startswith("FFCV"):
        ffcv_decoder()  # imports ffcv and compiles our kernel before the clock runs
    source = find_source(args, reads)
    t0 = time.perf_counter()
    start_pass = open_alternative(name, source, res, args)

    def run(with_memory):
        if with_memory:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what this takes
            before = held_memory()
            start = start_pass
            if not name.startswith("FFCV"):  # ESSL keeps its buffers: those of a new loader count
                start = open_alternative(name, source, res, args)
            return {"memory_MB": max(held_memory() for _ in start()) - before}  # at each batch
        times = [time.perf_counter()]
        n = 0
        for images, _ in start_pass():
            times.append(time.perf_counter())
            n += images.numel() // (3 * res * res)  # each view counts
        return {"images_s": n / (time.perf_counter() - times[0]), "first_batch_s": times[1] - t0}
    return run


# --- sections
def bench_alternatives(args, report):
    rows = []
    for res in args.res:
        makes = {name: (loader_passes, args, name, reads, res)
                 for name, reads in ALTERNATIVES.items()}
        for row in measure(args, report, makes, "FFCV"):
            row = {"res": res, **row, "per_core": row["images_s"] / args.num_workers}
            for rate in args.img_s:
                row[f"cores_for_{rate}"] = rate / row["per_core"]
            rows.append(row)
    add_table(report, "alternatives", rows)
    figure, axis = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    names = [f"{row['name']}, {row['res']} px" for row in rows]
    axis.barh(names[::-1], [row["images_s"] for row in rows][::-1])
    axis.set_xlabel("images/s")
    figure.savefig(args.plot, dpi=100)


def bench_compression(args, report):
    makes = {name: (loader_passes, args, "ESSL", flags, args.res[0])
             for name, flags in COMPRESSION.items()}
    rows = measure(args, report, makes, "500_95")
    for row in rows:
        reader = BetonReader(find_source(args, COMPRESSION[row["name"]]))
        row["bytes_an_image"] = int(reader.sizes.mean())
    add_table(report, "compression", rows)


def step_passes(args, name, step):
    """run(): images/s on one core, up to a step, by the functions that the loaders call."""
    if name == "FFCV":
        from ffcv.libffcv import imdecode, resize_crop
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    res = args.res[0]
    reader = BetonReader(args.data)
    tables = (reader.ptrs, reader.sizes, reader.widths, reader.heights)
    samples = np.stack(tables, axis=1)[args.ids[:args.images // 4 + 1]].tolist()
    memory, scratch = make_scratch(*tables[1:], res)
    raw = memoryview(memory).cast("B")[scratch.raw - memory.ctypes.data:]
    mapped = np.memmap(args.data, np.uint8, "r")
    decoded = np.zeros(3 * (tables[2] * tables[3]).max() + tables[1].max(), np.uint8)
    crop = np.zeros((res, res, 3), np.uint8)
    mean_std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])

    def run(_):
        t0 = time.perf_counter()
        for i, (at, size, width, height) in enumerate(samples):
            x, y, w, h = random_box(width, height, SCALE, RATIO, 0, 0, i)
            flip = step >= 3 and i % 2 == 0
            pixels = torch.from_numpy(crop)
            if name == "ESSL":
                os.preadv(reader.file.fileno(), [raw[:size]], at)
                if step == 1:
                    decode_planes(scratch.raw, size, width, height, x, y, w, h, scratch)
                elif step >= 2:  # bicubic; the flip is part of its last write
                    resized_crop(scratch.raw, size, 0, width, height, x, y, w, h, res, True, flip,
                                 crop.ctypes.data, scratch)
            else:
                jpeg = mapped[at:at + size]
                decoded[:size] = jpeg  # the cost of touching the mapped file
                if step >= 1:  # the whole picture
                    imdecode(jpeg, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
                if step >= 2:  # by cv2's INTER_AREA
                    picture = decoded[:3 * height * width].reshape(height, width, 3)
                    resize_crop(picture, y, y + h, x, x + w, crop)
                if flip:
                    pixels = pixels.flip(1)
            if step == 4:
                pixels.float().sub_(mean_std[0]).div_(mean_std[1])
        return {"images_s": len(samples) / (time.perf_counter() - t0)}
    return run


def bench_decomposition(args, report):
    makes = {f"{step}: {name}": (step_passes, args, name, i)
             for i, step in enumerate(STEPS) for name in ("FFCV", "ESSL")}
    add_table(report, "decomposition", measure(args, report, makes, "FFCV"))


def bench_pixels(args, report):
    if not args.data_dir:
        return leave_out(report, "pixels", "it needs a folder of pictures, --data-dir")
    settings = {"res": args.res[0], "drop_last": False}
    folder = FolderLoader(args.data_dir, 64, indices=np.unique(args.folder_ids), **settings)
    beton = ESSLLoader(args.data, 64, indices=np.unique(args.ids), **settings)
    means = []
    for (a, _), (b, _) in zip(folder, beton):
        difference = (a.float() - b).abs()  # (B, 3, res, res)
        means += (difference.mean(dim=(1, 2, 3)) / 255).tolist()
        shown = torch.stack([a[:6], b[:6], (8 * difference[:6]).clamp(max=255).byte()])
    # (3, 6, 3, res, res) -> (3 * res, 6 * res, 3)
    picture = shown.permute(0, 3, 1, 4, 2).reshape(3 * args.res[0], -1, 3)
    plt.imsave(args.plot.with_name(f"{args.plot.stem}_pixels.png"), picture.numpy())
    add_table(report, "pixels", [{"name": "folder, .beton", "images": len(means), "largest":
                                  max(means), "mean_difference": float(np.mean(means))}])


def main(args):
    for number in (signal.SIGINT, signal.SIGTERM):  # sys.exit runs the `finally` below
        signal.signal(number, lambda *_: sys.exit("bench_loader: stopped"))
    multiprocessing.set_start_method("fork")
    report = {"command": sys.argv, "left_out": []}
    with tempfile.TemporaryDirectory() as args.temporary:
        try:
            for path in (args.json, args.plot):
                path.parent.mkdir(parents=True, exist_ok=True)
            args.limit = args.images
            if not args.data and args.data_dir:
                args.data = find_source(args, COMPRESSION["500_95"])
            reader = BetonReader(args.data or "data/train_500_95.beton")
            args.data = reader.path
            paths = FolderLoader(args.data_dir, 1).paths if args.data_dir else ()
            args.limit = reader.num_samples
            if paths and args.limit not in (len(paths), min(len(paths), args.images)):
                raise DataError(f"{args.data} holds {reader.num_samples:,} pictures, "
                                f"{args.data_dir} another number: take the folder that it is of.")
            cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
            report["measured_on"] = f"{cpu}, {args.num_workers} cores, {reader.num_samples} images"
            print(report["measured_on"], flush=True)
            kept = np.setdiff1d(np.arange(reader.num_samples), reader.excluded)
            args.ids = np.resize(kept, args.images)
            args.folder_ids = args.ids * len(paths) // reader.num_samples  # as for --limit
            for section in args.only:
                globals()[f"bench_{section}"](args, report)
            args.json.write_text(json.dumps(report, indent=1))
        except (DataError, OSError, RuntimeError) as error:
            sys.exit(f"bench_loader: {error}")
        finally:
            for child in multiprocessing.active_children():
                os.killpg(child.pid, signal.SIGKILL)  # else the end would wait for its pass
    print(f"\nwritten: {args.json}, {args.plot}")


if __name__ == "__main__":
    main(get_args())
