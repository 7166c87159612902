"""Shows what loading costs, against the alternatives: images/s, cores, memory, start-up, pixels.

    python bench_loader.py --data-dir imagenet/train        # builds what it needs in $TMPDIR
    python bench_loader.py --data data/demo_train.beton     # measures what needs no picture folder
    python bench_loader.py --data-dir imagenet/train --only scaling    # varies the work

It takes 3 minutes on two EPYC cores. The section `scaling`, which only --only runs, takes 5.

These words have one meaning here:
  row      a line of a table: one loader with its settings, in a child process of its own
  source   a file, or a folder of JPEG files, that rows read; all sources hold the same pictures
  pass     a row loads --images images once
  warm-up  the first pass of a row, which compiles and fills caches, and does not count
  round    each row in turn makes one pass; --passes rounds count

The columns: images_s is the median of the rounds, and min and max are their extremes. "x FFCV" is
the median of the ratios to FFCV's row, which are taken within each round. cpu_us is the CPU time of
an image in microseconds, over all threads and processes. On a busy machine it is more reliable than
images_s. A view counts as an image.

The sections:
  alternatives   loaders with the same pictures, distribution of crops, output size, batch size, and
                 number of threads or processes. Only the image folder and ESSL flip.
                 first_batch_s: the time from opening the loader to its first batch, in a new
                 process, after the imports, and with our kernels in numba's cache.
                 memory_MB: peak memory of a pass, without what its process holds between passes.
                 cores_for_N: the number of cores that load N images/s.
                 The table `methods` says what each row reads, decodes and resizes by.
  decomposition  the steps of loading, each with all steps before it, on one core (Table 13)
  compression    files of other quality or resolution (Table 4)
  pixels         the mean absolute difference between the folder's pictures and the .beton's, where
                 1 is white minus black (Appendix C). *_pixels.png shows the folder's, the .beton's
                 and 8 x their difference.
  scaling        ESSL against the same loader when libjpeg-turbo decodes whole pictures, as the work
                 grows. *_scaling.png shows it.

The last line:
    written: runs/bench.json, runs/bench.png, runs/bench_pixels.png
"""
import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps

from essl_loader import (BetonReader, DataError, ESSLLoader, FolderLoader, Output, Stored,
                         decode_planes, ffcv_decoder, make_scratch, random_box, remove_index,
                         resized_crop, usable_cores)

SCALE = (0.2, 1.0)  # RandomResizedCrop's, in every row
RATIO = (3 / 4, 4 / 3)
AHEAD = 3  # batches that a worker prepares ahead; ESSL's and FFCV's defaults are 3 too
PACKAGES = ("torch", "torchvision", "numpy", "numba", "llvmlite", "pillow", "turbojpeg", "ffcv",
            "opencv-python", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
NEEDS_FOLDER = "it needs a folder of pictures. Add --data-dir"
NEEDS_FFCV = "ffcv is not installed: pip install ffcv"
PR_SET_PDEATHSIG = 1  # prctl(2)


# --- arguments
def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", type=Path,
        help="read this .beton (default: one built from --data-dir, or data/train_500_95.beton)")
    add("--data-dir", type=Path, help="read the pictures in this folder of class folders")
    add("--json", type=Path, default=Path("runs/bench.json"),
        help="write all numbers, with those of each pass, to this file (default: %(default)s)")
    add("--plot", type=Path, default=Path("runs/bench.png"),
        help="write the plot of the alternatives to this file (default: %(default)s)")
    add("--res", type=int, nargs="+", default=[224],
        help="load crops of these sizes in pixels; only alternatives takes more than the first "
             "(default: 224)")
    add("--batch-size", type=int, default=256,
        help="load this number of images in a batch (default: %(default)s)")
    add("--num-workers", type=int, default=0,
        help="use this number of threads or processes; 0 means all usable cores (default: 0)")
    add("--images", type=int, default=2048,
        help="load this number of images in a pass; a small file is repeated "
             "(default: %(default)s)")
    add("--passes", type=int, default=5,
        help="measure this number of rounds (default: %(default)s)")
    add("--only", nargs="+", choices=tuple(SECTIONS), metavar="SECTION",
        default=[name for name in SECTIONS if name != "scaling"],
        help=f"run these sections of {', '.join(SECTIONS)} (default: all but scaling)")
    add("--img-s", type=int, nargs="+", default=[11863],
        help="compute how many cores load these numbers of images/s (default: 11863)")
    words = sys.argv[1:] if argv is None else argv
    # Flags may be written with underscores: --batch_size is --batch-size
    words = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    args = p.parse_args(words)
    args.num_workers = args.num_workers or usable_cores()
    numbers = (args.batch_size, args.num_workers, args.images, args.passes, *args.res, *args.img_s)
    if min(numbers) < 1:
        p.error("A number is below 1. Only --num-workers may be 0.")
    return args


# --- report: what is printed also goes into the JSON file
def installed_version(packages):
    """(name, version) of the first of these packages that is installed, or None."""
    for package in packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def start_report(args):
    """On what machine and with what settings and versions the numbers were measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = re.search(r"flags\s*: (.*)", cpuinfo)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = {"cpu": model[1] if model else platform.processor(),
                "cpu_flags": flags[1].split() if flags else [],
                "usable_cores": usable_cores(),
                "all_cores": os.cpu_count(),
                "memory_GB": memory / 1e9,
                "system": platform.platform(),
                "load_average_before": os.getloadavg()}
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        found = installed_version([package])
        if found:
            versions[package] = found[1]
    settings = {}
    for key, value in vars(args).items():
        settings[key] = str(value) if isinstance(value, Path) else value
    return {"command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "settings": settings,
            "hardware": hardware, "versions": versions, "left_out": [], "plots": []}


def write_report(path, report):
    """Writes the JSON file under another name and renames it: it is never half written."""
    report["hardware"]["load_average_after"] = os.getloadavg()
    tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    tmp_path.write_text(json.dumps(report, indent=1))
    os.replace(tmp_path, path)


def leave_out(report, name, reason):
    """Notes and prints that a row, a source or a section is left out. reason: text or exception."""
    lines = str(reason).splitlines() or [type(reason).__name__]
    text = f"{name}: left out: {lines[-1]}"
    report["left_out"].append(text)
    print(text, flush=True)


def format_cell(value):
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def add_table(report, section, rows, hidden=()):
    """Prints rows, dicts with the same keys, as a table; `hidden` keys are in the JSON alone."""
    report[section] = rows
    print(f"\n{section}")
    if not rows:
        return
    hidden = {"passes", "cpu_us_passes", *hidden}
    keys = [key for key in rows[0] if key not in hidden]
    lines = [keys]
    for row in rows:
        lines.append([format_cell(row.get(key, "")) for key in keys])
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    is_text = [isinstance(rows[0][key], str) for key in keys]
    for line in lines:
        cells = []
        for cell, width, to_the_left in zip(line, widths, is_text):
            cells.append(cell.ljust(width) if to_the_left else cell.rjust(width))
        print("  ".join(cells).rstrip(), flush=True)


# --- child processes: each row has one of its own
def cpu_seconds():
    """The CPU time of this process and of its workers, also of those that have ended."""
    seconds = 0
    for worker in multiprocessing.active_children():
        # proc(5): utime and stime are fields 14 and 15; field 2 is the name in parentheses
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds + ended.ru_utime + ended.ru_stime + time.process_time()


class Stopwatch:
    """Measures wall-clock time and CPU time from when it is made."""

    def __init__(self):
        self.cpu_start = cpu_seconds()
        self.start = time.perf_counter()

    def rates(self, images):
        """What a pass of this number of images returns."""
        seconds = time.perf_counter() - self.start
        cpu = cpu_seconds() - self.cpu_start
        return {"images_s": images / seconds, "cpu_us": 1e6 * cpu / images}


make_pass = None  # in a child process: what its row's opener returned


def start_child():
    """Prepares a new child process: main can end it together with the workers that it starts."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends when its parent ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ffcv_decoder ends its process by it


def open_in_child(opener, arguments):
    global make_pass
    make_pass = opener(**arguments)


def pass_in_child():
    """A pass that measures time."""
    return make_pass(with_memory=False)


def memory_pass_in_child():
    """A pass that measures memory: reading it at each batch takes time."""
    return make_pass(with_memory=True)


class Child:
    """A child process that calls functions. It ends when nothing refers to it any more."""

    def __init__(self):
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(1, context, initializer=start_child)

    def call(self, function, *arguments, timeout=None):
        """What the function returns in the child, or the exception that it raises there."""
        return self.pool.submit(function, *arguments).result(timeout)


def end_children():
    """Ends all child processes and their workers, also in the middle of a pass."""
    for child in multiprocessing.active_children():
        os.killpg(child.pid, signal.SIGKILL)


# --- rows and rounds
@dataclass(eq=False)
class Row:
    """A line of a table, and how it is measured.

    labels: its first columns, such as {"step": "decode", "loader": "FFCV"}. opener(**arguments) is
    called once in the row's child process. It returns make_pass(with_memory), which makes a pass
    and returns {column: value}. base: the row that this one is compared with.
    """

    labels: dict
    opener: Callable
    arguments: dict
    base: "Row | None" = None
    base_name: str = ""
    once: dict = field(default_factory=dict)  # columns that the warm-up has measured
    passes: list = field(default_factory=list)  # images/s in each round
    cpu_us: list = field(default_factory=list)  # CPU time of an image, microseconds, in each round

    @property
    def name(self):
        return ", ".join(str(label) for label in self.labels.values())

    def values(self):
        """The row as a dict, for the table and the JSON file."""
        values = {**self.labels, "images_s": float(np.median(self.passes)),
                  "min": min(self.passes), "max": max(self.passes)}
        base = self.base
        has_base = base is not None and len(base.passes) == len(self.passes)
        if has_base:
            ratios = np.divide(self.passes, base.passes)
            values[f"x {self.base_name}"] = float(np.median(ratios))
        values["cpu_us"] = float(np.median(self.cpu_us))
        if has_base:
            ratios = np.divide(base.cpu_us, self.cpu_us)
            values[f"x {self.base_name} by CPU time"] = float(np.median(ratios))
        return {**values, **self.once, "passes": self.passes, "cpu_us_passes": self.cpu_us}


@contextlib.contextmanager
def leaving_out_failures(report, row, children):
    """If the block fails, leaves its row out by name and ends its child; other rows go on."""
    try:
        yield
    except DataError:  # the data are bad for all rows
        raise
    except Exception as error:  # a library may raise anything
        leave_out(report, row.name, error)
        del children[row]


def warm_up(row, child, with_memory):
    """Opens the row's loader and makes its first pass, and one more that measures memory.

    Their rates do not count: the first pass compiles and fills caches.
    """
    child.call(open_in_child, row.opener, row.arguments)
    row.once = child.call(pass_in_child)
    if with_memory:
        row.once |= child.call(memory_pass_in_child)
    row.once.pop("images_s")
    row.once.pop("cpu_us")


def measure(args, report, rows, with_memory=False):
    """Measures rows in --passes rounds. Returns those that worked, as dicts."""
    children = {}  # {row: its child}, of the rows that work
    for row in rows:
        children[row] = Child()
        with leaving_out_failures(report, row, children):
            warm_up(row, children[row], with_memory)
    for _ in range(args.passes):
        for row in list(children):
            with leaving_out_failures(report, row, children):
                rates = children[row].call(pass_in_child)
                row.passes.append(rates["images_s"])
                row.cpu_us.append(rates["cpu_us"])
    return [row.values() for row in children]


# --- sources: what the rows read
class FfcvPictures(torch.utils.data.Dataset):
    """(picture, number) of each path, for FFCV's DatasetWriter."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return open_rgb(self.paths[i]), i


def open_rgb(path):
    """A picture as RGB, turned as EXIF says."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def write_ffcv(out, paths, num_workers):
    """Writes FFCV's own file with build_beton.py's defaults. It runs in a child process."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    image = RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=95)
    writer = DatasetWriter(str(out), {"image": image, "label": IntField()},
                           num_workers=num_workers)
    writer.from_indexed_dataset(FfcvPictures(paths))


def run_builder(out, *words):
    """Builds a .beton by build_beton.py. RuntimeError with the command if that fails."""
    words = [str(word) for word in words]
    script = str(Path(__file__).with_name("build_beton.py"))
    done = subprocess.run([sys.executable, script, "--out", str(out), *words],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"build_beton.py {' '.join(words)}: {done.stderr.strip()}")


def write_jpegs(reader, ids, folder):
    """Writes samples of a .beton as JPEG files, without their index. Returns the paths."""
    folder.mkdir()
    for i in ids:
        if reader.modes[i] != 0:
            raise RuntimeError(f"{reader.path}: sample {i} is stored as raw pixels, not as a JPEG. "
                               "Give another --data")
        data = reader.read(i)
        jpeg = remove_index(data) if reader.settings else data  # FFCV's files have no index
        Path(folder, f"{i:09}.jpg").write_bytes(jpeg)
    return sorted(folder.iterdir())


class Source(NamedTuple):
    """A file, or a folder of JPEG files, and the numbers of its samples that are read."""

    path: Path
    ids: np.ndarray


class Sources:
    """The same pictures in files of several kinds, each built when it is first asked for.

    At most --images pictures are taken, evenly spread, as build_beton.py --limit takes them.

    data: a BetonReader of the source `500_95`, which is --data if that is given. ids: the samples
    that are read of it. paths: the pictures in --data-dir, or []. kept: the numbers of those in
    paths that belong to ids; the others are damaged samples, which loaders leave out.
    """

    FLAGS = {"4:4:4": "--chroma 444",
             "originals (--lossless)": "--lossless",
             "500_100": "--max-resolution 500 --quality 100",
             "500_90": "--max-resolution 500 --quality 90",
             "256_95": "--max-resolution 256 --quality 95"}

    def __init__(self, args, folder):
        self.args = args
        self.folder = Path(folder)
        self.found = {}  # {name: Source, or the RuntimeError that building it raised}
        path = args.data or Path("data/train_500_95.beton")
        all_paths = FolderLoader(args.data_dir, 1).paths if args.data_dir else []
        if args.data_dir and not args.data:
            path = self.folder / "500_95.beton"
            run_builder(path, "--data-dir", args.data_dir, "--limit", args.images)
        self.data = BetonReader(path)
        n = self.data.num_samples
        if all_paths and n not in (len(all_paths), min(len(all_paths), args.images)):
            raise DataError(f"{path} holds {n:,} pictures, but {args.data_dir} holds "
                            f"{len(all_paths):,}. Give the folder from which the file was built.")
        self.count = min(n, args.images)
        numbers = np.arange(self.count)
        ids = numbers * n // self.count
        is_good = ~np.isin(ids, self.data.excluded)
        self.ids = ids[is_good]
        self.kept = numbers[is_good]
        self.paths = [all_paths[i * len(all_paths) // n] for i in ids] if all_paths else []

    def find(self, name):
        """The Source of this name. RuntimeError if it cannot be built."""
        if name not in self.found:
            try:
                self.found[name] = self.build(name)
            except RuntimeError as error:
                self.found[name] = error
        if isinstance(self.found[name], RuntimeError):
            raise self.found[name]
        return self.found[name]

    def build(self, name):
        """Builds a source in the temporary folder. RuntimeError if that fails."""
        if name == "500_95":
            return Source(self.data.path, self.ids)
        out = self.folder / f"{re.sub('[^a-zA-Z0-9]+', '_', name)}.beton"
        if name == "500_95 as JPEG files":
            out = self.folder / "jpegs"
            count = len(write_jpegs(self.data, self.ids, out))
        elif name == "FFCV's file":
            count = self.build_by_ffcv(out)
        elif name == "FFCV's file, converted":
            source = self.find("FFCV's file")
            run_builder(out, "--data-dir", source.path)
            count = len(source.ids)
        elif self.args.data_dir:
            run_builder(out, "--data-dir", self.args.data_dir, "--limit", self.count,
                        *self.FLAGS[name].split())
            count = self.count
        else:
            raise RuntimeError(NEEDS_FOLDER)
        return Source(out, np.arange(count))

    def build_by_ffcv(self, out):
        """Writes FFCV's own file; returns how many samples it has."""
        if not installed_version(["ffcv"]):
            raise RuntimeError(NEEDS_FFCV)
        paths = self.pictures()
        seconds = 60 + len(paths) / 5  # any machine is faster
        try:
            Child().call(write_ffcv, out, paths, self.args.num_workers, timeout=seconds)
        except TimeoutError:  # it waits for ever for a worker that died
            raise RuntimeError(f"FFCV's DatasetWriter did not end in {seconds:.0f} s") from None
        return len(paths)

    def pictures(self):
        """Paths of the pictures: those of --data-dir, or else the samples of --data."""
        return self.paths or sorted(self.find("500_95 as JPEG files").path.iterdir())


# --- loaders: open_*(load) opens one and returns a function; each call of it iterates over a pass
@dataclass
class Load:
    """What a loader has to load. It is the same in each row but for the path."""

    path: Path
    ids: np.ndarray  # samples of a pass, repeated if the file is small
    res: int
    batch_size: int
    num_workers: int
    scale: tuple = SCALE


def make_load(args, source, res):
    ids = np.resize(source.ids, args.images)  # repeats them
    return Load(source.path, ids, res, args.batch_size, args.num_workers)


def open_essl(load, loader=ESSLLoader, **settings):
    return loader(load.path, load.batch_size, True, load.res, load.scale, RATIO, indices=load.ids,
                  num_workers=load.num_workers, drop_last=False, **settings).__iter__


def open_folder(load):
    return open_essl(load, FolderLoader)


class JpegFiles(torch.utils.data.Dataset):
    """JPEG files, decoded whole by torchvision's libjpeg-turbo, cropped and resized by torch."""

    def __init__(self, paths, res, scale):
        from torchvision.transforms import v2
        self.paths = paths
        self.crop = v2.RandomResizedCrop(res, scale, RATIO, v2.InterpolationMode.BILINEAR,
                                         antialias=True)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        return self.crop(decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)), 0


def jpeg_paths(load):
    """The paths of a pass, from a folder of JPEG files."""
    paths = sorted(str(path) for path in load.path.iterdir())
    return [paths[i] for i in load.ids]


def open_torchvision(load):
    files = JpegFiles(jpeg_paths(load), load.res, load.scale)
    return torch.utils.data.DataLoader(
        files, load.batch_size, shuffle=True, num_workers=load.num_workers, prefetch_factor=AHEAD,
        persistent_workers=True, multiprocessing_context="fork").__iter__


def open_dali(load):
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.types import INTERP_LINEAR, RGB
    files = jpeg_paths(load)

    @pipeline_def
    def define():
        jpegs, labels = fn.readers.file(files=files, shuffle_after_epoch=True)
        crops = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=RGB, random_area=load.scale,
            random_aspect_ratio=RATIO, num_attempts=10)
        images = fn.resize(crops, resize_x=load.res, resize_y=load.res,
                           interp_type=INTERP_LINEAR, antialias=True)
        return images, labels

    num_batches = -(-len(load.ids) // load.batch_size)
    ahead = min(AHEAD, num_batches)
    pipeline = define(batch_size=load.batch_size, num_threads=load.num_workers, device_id=None,
                      prefetch_queue_depth=ahead)
    pipeline.build()
    pass_numbers = itertools.count()

    def batches():
        # It asks for as many batches as the pass has: pipeline.run() would load those of the next
        # pass while other rows are measured. The first schedule_run of all starts `ahead` batches
        is_first_pass = next(pass_numbers) == 0
        for _ in range(1 if is_first_pass else ahead):
            pipeline.schedule_run()
        for batch in range(num_batches):
            images, labels = pipeline.share_outputs()
            yield np.asarray(images.as_tensor()), labels  # a view, valid until it is released
            pipeline.release_outputs()
            if batch + ahead < num_batches:
                pipeline.schedule_run()
    return batches


def open_ffcv(load, make_decoder=None):
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor
    make_decoder = make_decoder or RandomResizedCropRGBImageDecoder
    decoder = make_decoder((load.res, load.res), load.scale, RATIO)
    pipelines = {"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
    return Loader(str(load.path), load.batch_size, num_workers=load.num_workers, os_cache=True,
                  order=OrderOption.RANDOM, indices=load.ids, drop_last=False,
                  pipelines=pipelines).__iter__


def open_ffcv_with_ours(load):
    return open_ffcv(load, ffcv_decoder)


# --- passes of a loader, in its child process
def held_memory():
    """MB of anonymous and shared memory of this process and its workers; shared counts once."""
    pids = [os.getpid()] + [worker.pid for worker in multiprocessing.active_children()]
    kilobytes = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kilobytes += sum(int(size) for size in re.findall(r"Pss_(?:Anon|Shmem): *(\d+)", text))
    return kilobytes * 1024e-6


class LoaderPasses:
    """The opener of a row that measures a loader. It opens the loader; each call makes a pass."""

    def __init__(self, alternative, load):
        for module in alternative.modules:
            importlib.import_module(module)
        if alternative.is_ffcv:
            ffcv_decoder()  # compiles our kernel before the clock runs
        self.alternative = alternative
        self.load = load
        self.opened_at = time.perf_counter()
        self.first_batch_s = None
        self.batches = self.open()

    def open(self):
        return self.alternative.open(self.load, **self.alternative.settings)

    def __call__(self, with_memory):
        return self.measure_memory() if with_memory else self.measure_time()

    def measure_memory(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the pass takes again would not count
        before = held_memory()
        # The others keep buffers from pass to pass, so a new loader shows what they take. FFCV
        # takes its buffers anew in each pass, and a new loader of FFCV would compile
        batches = self.batches if self.alternative.is_ffcv else self.open()
        most = max(held_memory() for _ in batches())  # at each batch
        return {"memory_MB": most - before}

    def measure_time(self):
        stopwatch = Stopwatch()
        values = 0
        for images, _ in self.batches():
            if self.first_batch_s is None:
                self.first_batch_s = time.perf_counter() - self.opened_at
            values += int(np.prod(images.shape))
        count = values / (3 * self.load.res ** 2)  # each view counts
        return {**stopwatch.rates(count), "first_batch_s": self.first_batch_s}


def compile_kernels(load):
    """Puts our kernels into numba's cache. It runs in a child process that measures nothing."""
    for _ in ESSLLoader(load.path, load.batch_size, True, load.res, indices=load.ids[:1],
                        drop_last=False):
        pass


# --- section: alternatives
@dataclass(frozen=True)
class Alternative:
    """A loader of the first table."""

    name: str
    source: str
    open: Callable  # one of the functions above
    resize: str  # the filter, and whether it is antialiased
    decodes: str = "the whole picture"
    settings: dict = field(default_factory=dict)
    modules: tuple = ()  # they are imported before the clock runs
    packages: tuple = ()  # it needs one of them

    @property
    def is_ffcv(self):
        return "ffcv" in self.packages


FFCV = {"modules": ("ffcv", "ffcv.loader", "ffcv.transforms"), "packages": ("ffcv",)}
DALI = {"modules": ("nvidia.dali", "nvidia.dali.fn"),
        "packages": ("nvidia-dali-cuda120", "nvidia-dali-cuda130")}
BICUBIC = "bicubic, antialiased"
BILINEAR = "bilinear, antialiased"
CROP = "the crop, by the index"
CROP_FROM_START = "the crop and what lies before it"
ALTERNATIVES = (
    Alternative("image folder (Pillow)", "500_95 as JPEG files", open_folder, BICUBIC),
    Alternative("torchvision decode_jpeg", "500_95 as JPEG files", open_torchvision, BILINEAR,
                modules=("torchvision.io", "torchvision.transforms.v2"), packages=("torchvision",)),
    Alternative("DALI on the CPU", "500_95 as JPEG files", open_dali, BILINEAR, CROP_FROM_START,
                **DALI),
    Alternative("FFCV", "FFCV's file", open_ffcv, "area; bilinear where it enlarges", **FFCV),
    Alternative("FFCV + ffcv_decoder", "500_95", open_ffcv_with_ours, BICUBIC, CROP, **FFCV),
    Alternative("ESSL bilinear", "500_95", open_essl, BILINEAR, CROP,
                {"interpolation": "bilinear"}),
    Alternative("ESSL", "500_95", open_essl, BICUBIC, CROP),
    Alternative("ESSL views=2", "500_95", open_essl, BICUBIC, CROP, {"views": 2}),
    Alternative("ESSL 4:4:4", "4:4:4", open_essl, BICUBIC, CROP),
    Alternative("ESSL lossless", "originals (--lossless)", open_essl, BICUBIC, CROP),
    Alternative("ESSL, FFCV's file", "FFCV's file", open_essl, BICUBIC, CROP_FROM_START),
    Alternative("ESSL, FFCV's file converted", "FFCV's file, converted", open_essl, BICUBIC, CROP))

PLAIN_ESSL = next(row for row in ALTERNATIVES if row.name == "ESSL")


def find_alternatives(sources, report):
    """[(Alternative, its Source)] of those that can run here; the others are left out by name."""
    found = []
    for alternative in ALTERNATIVES:
        packages = alternative.packages
        if packages and not installed_version(packages):
            leave_out(report, alternative.name,
                      f"{packages[0]} is not installed: pip install {packages[0]}")
            continue
        try:
            found.append((alternative, sources.find(alternative.source)))
        except RuntimeError as error:
            leave_out(report, alternative.name, error)
    return found


def make_alternative_rows(args, found, res):
    rows = {}
    for alternative, source in found:
        arguments = {"alternative": alternative, "load": make_load(args, source, res)}
        rows[alternative.name] = Row({"name": alternative.name, "res": res}, LoaderPasses,
                                     arguments)
    for row in rows.values():
        row.base = rows.get("FFCV")
        row.base_name = "FFCV"
    return list(rows.values())


def spread_of(rows, speeds):
    """How far below and above `speeds` the slowest and the fastest round are: (2, len(rows))."""
    lowest = np.array([row["min"] for row in rows])
    highest = np.array([row["max"] for row in rows])
    return np.stack([speeds - lowest, highest - speeds])


def plot_alternatives(rows, path):
    resolutions = list(dict.fromkeys(row["res"] for row in rows))
    height = 1.2 + 0.32 * len(rows) / len(resolutions)
    figure, axes = plt.subplots(1, len(resolutions), figsize=(2 + 4.5 * len(resolutions), height),
                                sharey=True, squeeze=False, layout="constrained")
    for axis, res in zip(axes[0], resolutions):
        shown = [row for row in rows if row["res"] == res]
        shown.reverse()  # barh draws upwards
        speeds = np.array([row["images_s"] for row in shown])
        spread = spread_of(shown, speeds)
        colours = ["tab:orange" if row["name"].startswith("ESSL") else "tab:gray" for row in shown]
        axis.barh([row["name"] for row in shown], speeds, color=colours, xerr=spread,
                  error_kw={"elinewidth": 1, "capsize": 2})
        right = speeds + spread[1]
        for i, row in enumerate(shown):
            text = f"{row['images_s']:,.0f}"
            if "x FFCV" in row:
                text += f" ({row['x FFCV']:.2f})"
            axis.text(right[i] + 0.02 * right.max(), i, text, va="center", fontsize=8)
        axis.set_xlim(0, 1.3 * right.max())
        axis.set_xlabel("images/s (x FFCV); line: slowest to fastest round")
        axis.set_title(f"to {res} pixels")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bench_alternatives(args, sources, report):
    """Loaders against each other, at each --res."""
    found = find_alternatives(sources, report)
    rows = []
    for res in args.res:
        Child().call(compile_kernels, make_load(args, sources.find("500_95"), res))
        measured = measure(args, report, make_alternative_rows(args, found, res), with_memory=True)
        for row in measured:
            row["per_core"] = row["images_s"] / args.num_workers
            for rate in args.img_s:
                row[f"cores_for_{rate}"] = rate / row["per_core"]
        rows += measured
    add_table(report, "alternatives", rows)
    methods = [{"name": alternative.name, "reads": alternative.source,
                "decodes": alternative.decodes, "resizes by": alternative.resize}
               for alternative, _ in found]
    add_table(report, "methods", methods)
    if rows:
        plot_alternatives(rows, args.plot)
        report["plots"].append(str(args.plot))


# --- section: compression
COMPRESSION = ("500_100", "500_95", "500_90", "256_95")  # sources, as in Table 4


def bench_compression(args, sources, report):
    """ESSL on files of other quality or resolution."""
    rows = {}
    bytes_an_image = {}
    for name in COMPRESSION:
        try:
            source = sources.find(name)
        except RuntimeError as error:
            leave_out(report, name, error)
            continue
        bytes_an_image[name] = int(BetonReader(source.path).sizes[source.ids].mean())
        load = make_load(args, source, args.res[0])
        rows[name] = Row({"name": name}, LoaderPasses, {"alternative": PLAIN_ESSL, "load": load})
    for row in rows.values():
        row.base = rows["500_95"]
        row.base_name = "500_95"
    measured = measure(args, report, list(rows.values()))
    for row in measured:
        row["bytes_an_image"] = bytes_an_image[row["name"]]
    add_table(report, "compression", measured, hidden=["first_batch_s"])


# --- section: decomposition
STEPS = ("read", "decode", "+ resize", "+ flip", "+ normalise")  # each with all before it
READ, DECODE, RESIZE, FLIP, NORMALISE = range(len(STEPS))
MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of 255
STD = (58.395, 57.12, 57.375)


def make_essl_steps(reader, res, last_step):
    """load(at, size, width, height, box, flip): a picture by ESSL's functions, up to a step."""
    memory, scratch = make_scratch(reader.sizes, reader.widths, reader.heights, res)
    begin = scratch.raw - memory.ctypes.data
    stored = memoryview(memory).cast("B")[begin:]
    crop = np.zeros((res, res, 3), np.uint8)

    def load(at, size, width, height, box, flip):
        os.preadv(reader.file.fileno(), [stored[:size]], at)
        sample = Stored(scratch.raw, size, 0, width, height)
        if last_step == DECODE:
            decode_planes(sample, box, scratch)
        elif last_step >= RESIZE:  # bicubic; it decodes too, and its last write flips
            resized_crop(sample, box, Output(res, True, flip), crop.ctypes.data, scratch)
        return torch.from_numpy(crop)
    return load


def make_ffcv_steps(reader, res, last_step):
    """load(at, size, width, height, box, flip): a picture by FFCV's functions, up to a step."""
    from ffcv.libffcv import imdecode, resize_crop
    mapped = np.memmap(reader.path, np.uint8, "r")
    most = 3 * (reader.widths * reader.heights).max() + reader.sizes.max()
    decoded = np.zeros(most, np.uint8)
    crop = np.zeros((res, res, 3), np.uint8)

    def load(at, size, width, height, box, flip):
        x, y, w, h = box
        jpeg = mapped[at:at + size]
        decoded[:size] = jpeg  # the cost of touching the mapped file
        if last_step >= DECODE:  # the whole picture
            imdecode(jpeg, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
        if last_step >= RESIZE:  # by cv2's INTER_AREA
            picture = decoded[:3 * height * width].reshape(height, width, 3)
            resize_crop(picture, y, y + h, x, x + w, crop)
        pixels = torch.from_numpy(crop)
        return pixels.flip(1) if flip else pixels
    return load


def open_steps(make_steps, last_step, load):
    """The opener of a row of steps: make_pass loads on one core, up to a step.

    It calls the functions that a loader calls, picture by picture.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    reader = BetonReader(load.path)
    load_picture = make_steps(reader, load.res, last_step)
    columns = (reader.ptrs, reader.sizes, reader.widths, reader.heights)
    samples = np.stack(columns, axis=1)[load.ids].tolist()
    mean = torch.tensor(MEAN)
    std = torch.tensor(STD)

    def make_pass(with_memory):  # memory is not measured here
        stopwatch = Stopwatch()
        for i, (at, size, width, height) in enumerate(samples):
            box = random_box(width, height, SCALE, RATIO, 0, 0, i)
            flip = last_step >= FLIP and i % 2 == 0
            pixels = load_picture(at, size, width, height, box, flip)
            if last_step == NORMALISE:
                pixels.float().sub_(mean).div_(std)
        return stopwatch.rates(len(samples))
    return make_pass


def bench_decomposition(args, sources, report):
    """The steps of loading, by FFCV's and by ESSL's functions."""
    load = make_load(args, sources.find("500_95"), args.res[0])
    load.ids = load.ids[:args.images // 4 + 1]  # a quarter is enough: one core, and Python's loop
    loaders = {"FFCV": make_ffcv_steps, "ESSL": make_essl_steps}
    if not installed_version(["ffcv"]):
        leave_out(report, "decomposition of FFCV", NEEDS_FFCV)
        del loaders["FFCV"]
    rows = []
    for number, step in enumerate(STEPS):
        row_of = {}  # {loader: row}
        for loader, make_steps in loaders.items():
            arguments = {"make_steps": make_steps, "last_step": number, "load": load}
            row_of[loader] = Row({"step": step, "loader": loader}, open_steps, arguments)
        for row in row_of.values():
            row.base = row_of.get("FFCV")
            row.base_name = "FFCV"
        rows += row_of.values()
    add_table(report, "decomposition", measure(args, report, rows))


# --- section: pixels
def bench_pixels(args, sources, report):
    """How far the .beton's pictures are from the folder's, with the same crops."""
    if not sources.paths:
        leave_out(report, "pixels", NEEDS_FOLDER)
        return
    res = args.res[0]
    all_paths = FolderLoader(args.data_dir, 1).paths
    number_of = {path: number for number, path in enumerate(all_paths)}
    numbers = [number_of[sources.paths[i]] for i in sources.kept]
    folder = FolderLoader(args.data_dir, 64, indices=numbers, res=res, drop_last=False)
    beton = ESSLLoader(sources.data.path, 64, indices=sources.ids, res=res, drop_last=False)
    means = []
    for (a, _), (b, _) in zip(folder, beton):
        difference = (a.float() - b).abs()  # (B, 3, res, res)
        means += (difference.mean(dim=(1, 2, 3)) / 255).tolist()
        shown = torch.stack([a[:6], b[:6], (8 * difference[:6]).clamp(max=255).byte()])
    # (3, 6, 3, res, res) -> (3 * res, 6 * res, 3)
    picture = shown.permute(0, 3, 1, 4, 2).reshape(3 * res, -1, 3)
    path = args.plot.with_name(f"{args.plot.stem}_pixels.png")
    plt.imsave(path, picture.numpy())
    report["plots"].append(str(path))
    add_table(report, "pixels", [{"name": "folder, .beton", "images": len(means),
                                  "largest": max(means),
                                  "mean_difference": float(np.mean(means))}])


# --- section: scaling
AXES = {  # what grows: label of the axis, values; the first two change the file
    "picture": ("longer side of the picture, pixels", (256, 375, 500, 1000, 2000)),
    "quality": ("JPEG quality", (75, 85, 90, 95, 100)),
    "output": ("side of the output, pixels", (96, 160, 224, 320, 384)),
    "crop": ("share of the picture that the crop takes", (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "threads": ("threads", None)}  # up to the number of cores
USUAL = {"picture": 500, "quality": 95, "output": 224, "crop": None}  # None: SCALE
SCALING_PICTURES = 64  # so many different ones
SCALING_BATCH = 32
ESSL_CURVE = "ESSL, crop by index"
WHOLE_CURVE = "ESSL, libjpeg-turbo decodes the whole picture"
# A JPEG's DRI segment: restart markers every 65,535 MCUs, which is longer than the picture
RESTART_INTERVAL = b"\xff\xdd\x00\x04\xff\xff"


def paste_picture(paths, number, side):
    """A picture of side x 2/3 side pixels, pasted together from photos at their own size.

    A pixel then takes as many bits at every size: an enlarged photo would be smooth, thus cheap.
    """
    width = side
    height = side * 2 // 3
    picture = Image.new("RGB", (width, height))
    y = 0
    while y < height:
        x = 0
        row_height = height
        while x < width:
            photo = open_rgb(paths[number % len(paths)])
            number += 1
            picture.paste(photo, (x, y))
            x += photo.width
            row_height = min(row_height, photo.height)
        y += row_height  # the next row covers what sticks out of a higher photo
    return picture


def make_scaling_files(sources, side, quality):
    """Two .beton files of the same JPEGs: with an index, and for libjpeg-turbo to decode whole."""
    name = f"scaling_{side}_{quality}"
    indexed = sources.folder / f"{name}.beton"
    whole = sources.folder / f"{name}_whole.beton"
    if whole.exists():
        return indexed, whole
    pasted = sources.folder / name
    pasted.mkdir()
    paths = sources.pictures()
    for i in range(SCALING_PICTURES):
        picture = paste_picture(paths, i * len(paths) // SCALING_PICTURES, side)
        picture.save(pasted / f"{i:03}.ppm")
    run_builder(indexed, "--data-dir", pasted, "--max-resolution", side, "--quality", quality)
    jpegs = sources.folder / f"{name}_jpegs"
    for path in write_jpegs(BetonReader(indexed), range(SCALING_PICTURES), jpegs):
        # ESSL leaves JPEGs with a restart interval to libjpeg-turbo. The picture ends before the
        # first marker, so the coded data stay the same
        data = path.read_bytes()
        path.write_bytes(data[:2] + RESTART_INTERVAL + data[2:])
    run_builder(whole, "--data-dir", jpegs, "--max-resolution", side, "--lossless")
    return indexed, whole


def make_scaling_rows(args, sources, axis, value):
    """Two rows, ESSL and ESSL with libjpeg-turbo's decoder, where `axis` has this value."""
    point = {**USUAL, "threads": args.num_workers, axis: value}
    files = make_scaling_files(sources, point["picture"], point["quality"])
    scale = (point["crop"], point["crop"]) if point["crop"] else SCALE
    # Fewer images of larger pictures, so that a pass takes about as long
    images = max(SCALING_PICTURES, int(args.images * (USUAL["picture"] / point["picture"]) ** 2))
    ids = np.resize(np.arange(SCALING_PICTURES), images)
    load = Load(files[0], ids, point["output"], SCALING_BATCH, point["threads"], scale)
    rows = []
    for curve, path in zip((ESSL_CURVE, WHOLE_CURVE), files):
        labels = {"axis": axis, "value": value, "decoder": curve}
        arguments = {"alternative": PLAIN_ESSL, "load": replace(load, path=path)}
        rows.append(Row(labels, LoaderPasses, arguments))
    for row in rows:
        row.base = rows[1]
        row.base_name = "whole decode"
    return rows


def plot_axis(panel, rows, axis_name):
    """Draws the two curves of one axis."""
    for curve, colour in ((ESSL_CURVE, "tab:orange"), (WHOLE_CURVE, "tab:blue")):
        points = [row for row in rows if row["axis"] == axis_name and row["decoder"] == curve]
        speeds = np.array([row["images_s"] for row in points])
        values = [row["value"] for row in points]
        panel.errorbar(values, speeds, spread_of(points, speeds), marker="o", markersize=4,
                       capsize=2, color=colour, label=curve)
    label, _ = AXES[axis_name]
    panel.set_xlabel(label)
    panel.set_ylabel("images/s")
    panel.grid(alpha=0.3)
    if axis_name == "picture":  # the number of pixels grows by a factor of 60
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(values, values)
        panel.set_xticks([], minor=True)
    else:
        panel.set_ylim(bottom=0)
    if axis_name == "threads":
        panel.set_xticks(values)


def plot_scaling(rows, cpu, path):
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    figure.suptitle(f"Images/s as the work grows ({cpu})")
    for panel, axis_name in zip(axes.flat, AXES):
        plot_axis(panel, rows, axis_name)
    last = axes.flat[-1]
    last.axis("off")
    last.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper left", frameon=False)
    usual = (f"Where it is not the axis: pictures of {USUAL['picture']} x "
             f"{USUAL['picture'] * 2 // 3} pixels,\nquality {USUAL['quality']}, 4:2:0, output "
             f"{USUAL['output']} pixels, crops of 0.2 to 1 of\nthe picture, all cores. Line: "
             "slowest to fastest round.")
    last.text(0.02, 0.7, usual, va="top", transform=last.transAxes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bench_scaling(args, sources, report):
    """Two rows, with and without crop decoding, for each value of each axis."""
    rows = []
    for axis, (_, values) in AXES.items():
        if axis == "threads":
            cores = usable_cores()
            powers_of_2 = {2 ** k for k in range(cores.bit_length())}
            values = sorted(powers_of_2 | {cores})
        for value in values:
            rows += measure(args, report, make_scaling_rows(args, sources, axis, value))
    add_table(report, "scaling", rows, hidden=["first_batch_s"])
    path = args.plot.with_name(f"{args.plot.stem}_scaling.png")
    plot_scaling(rows, report["hardware"]["cpu"], path)
    report["plots"].append(str(path))


# --- main
SECTIONS = {  # they run in the order of --only
    "alternatives": bench_alternatives,
    "decomposition": bench_decomposition,
    "compression": bench_compression,
    "pixels": bench_pixels,
    "scaling": bench_scaling}


def stop(number, frame):
    """What SIGINT and SIGTERM do: sys.exit runs the `finally` of main."""
    sys.exit("bench_loader: it was stopped by a signal.")


def main(args):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
        tempfile.tempdir = folder  # libraries leave files behind when their process is ended
        try:
            for path in (args.json, args.plot):
                path.parent.mkdir(parents=True, exist_ok=True)
            report = start_report(args)
            sources = Sources(args, folder)
            sizes = sources.data.sizes[sources.ids]
            report["data"] = {"images": len(sizes), "bytes_an_image": int(sizes.mean())}
            print(f"{report['hardware']['cpu']}, {args.num_workers} threads or processes, "
                  f"{len(sizes)} images", flush=True)
            for section in args.only:
                SECTIONS[section](args, sources, report)
                write_report(args.json, report)
        except (DataError, OSError, RuntimeError) as error:
            sys.exit(f"bench_loader: {error}")
        finally:
            end_children()  # else the end would wait for their passes
    print(f"\nwritten: {', '.join([str(args.json), *report['plots']])}")


if __name__ == "__main__":
    main(get_args())
