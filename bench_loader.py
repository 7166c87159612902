"""Shows what loading costs, against the alternatives: images/s, cores, memory, start-up, pixels.

    python bench_loader.py --data-dir imagenet/train        # builds what it needs in $TMPDIR
    python bench_loader.py --data data/demo_train.beton     # only what needs no picture folder
    python bench_loader.py --data-dir imagenet/train --only scaling    # as the work grows

Takes 3 minutes on two EPYC cores; scaling, which is not run by default, takes 5.

alternatives: every row is a process of its own and has the same pictures, distribution of crops,
output size, batch size and number of threads or processes. In each round every row makes one pass;
images_s is the median of the rounds, min and max are theirs, and "x FFCV" is the median of the
rounds' ratios. cpu_us: CPU time an image, of all threads and processes; on a busy machine it is
more reliable. A view counts as an image. Only the image folder and ESSL flip. first_batch_s: from
opening the loader in a new process, after the imports, with our kernels in numba's cache.
memory_MB: a pass's peak beyond what its process holds between passes. cores_for_N: cores that load
N images/s. The table `methods` says what each row reads, decodes and resizes by.
decomposition: Table 13, cumulative, on one core. compression: Table 4.
pixels: Appendix C, mean absolute difference of folder and .beton, of 1; in *_pixels.png folder,
.beton, 8 x difference.
scaling: ESSL against the same loader with libjpeg-turbo decoding whole pictures; *_scaling.png.
Last line:
    written: runs/bench.json, runs/bench.png, runs/bench_pixels.png
"""
import argparse
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps

from essl_loader import (BetonReader, DataError, ESSLLoader, FolderLoader, Output, Stored,
                         decode_planes, ffcv_decoder, make_scratch, random_box, remove_index,
                         resized_crop, usable_cores)

SCALE = (0.2, 1.0)  # of RandomResizedCrop, in every row
RATIO = (3 / 4, 4 / 3)
AHEAD = 3  # batches that a worker prepares ahead; ESSL's and FFCV's defaults are 3 too
PACKAGES = ("torch", "torchvision", "numpy", "numba", "llvmlite", "pillow", "turbojpeg", "ffcv",
            "opencv-python", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", type=Path, help="the .beton (default: from --data-dir, or data/train_500_95)")
    add("--data-dir", type=Path, help="folder of class folders of pictures")
    add("--json", type=Path, default=Path("runs/bench.json"), help="all numbers, of each pass too")
    add("--plot", type=Path, default=Path("runs/bench.png"), help="plot of the alternatives")
    add("--res", type=int, nargs="+", default=[224], help="pixels; other sections: the first")
    add("--batch-size", type=int, default=256, help="images a batch (default: %(default)s)")
    add("--num-workers", type=int, default=0, help="threads or processes; 0: all cores (default)")
    add("--images", type=int, default=2048, help="images a pass; a small file is repeated")
    add("--passes", type=int, default=5, help="rounds that count (default: %(default)s)")
    default = [name for name in SECTIONS if name != "scaling"]
    add("--only", nargs="+", choices=tuple(SECTIONS), default=default, metavar="SECTION",
        help=f"any of {', '.join(SECTIONS)} (default: all but scaling)")
    add("--img-s", type=int, nargs="+", default=[11863], help="to count cores for (%(default)s)")
    args = p.parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                         for word in (sys.argv[1:] if argv is None else argv)])
    args.num_workers = args.num_workers or usable_cores()
    if min(args.batch_size, args.num_workers, args.images, args.passes, *args.res, *args.img_s) < 1:
        p.error("numbers must be at least 1")
    return args


# --- report: what is printed, and the same for the JSON
def installed_version(packages):
    """(name, version) of the first of these packages that is installed, or None."""
    for package in packages:
        try:
            return package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def start_report(args):
    """What the numbers were measured on and with."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {"python": platform.python_version()}
    versions |= dict(filter(None, [installed_version([package]) for package in PACKAGES]))
    return {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": {key: str(value) if isinstance(value, Path) else value
                     for key, value in vars(args).items()},
        "hardware": {"cpu": model[1] if model else platform.processor(),
                     "cpu_flags": flags[1].split() if flags else [],
                     "usable_cores": usable_cores(), "all_cores": os.cpu_count(),
                     "memory_GB": memory / 1e9, "system": platform.platform(),
                     "load_average_before": os.getloadavg()},
        "versions": versions,
        "left_out": [],
        "plots": []}


def write_report(path, report):
    """Writes the JSON aside, so that it is whole whenever it is there."""
    report["hardware"]["load_average_after"] = os.getloadavg()
    tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    tmp_path.write_text(json.dumps(report, indent=1))
    os.replace(tmp_path, path)


def leave_out(report, what, error):
    lines = str(error).splitlines() or [type(error).__name__]
    text = f"{what}: left out: {lines[-1]}"
    report["left_out"].append(text)
    print(text, flush=True)


def format_cell(value):
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def add_table(report, section, rows, hidden=()):
    """Prints rows, dicts with the same keys, in columns; `hidden` ones are in the JSON only."""
    report[section] = rows
    print(f"\n{section}")
    if not rows:
        return
    keys = [key for key in rows[0] if key not in ("passes", "cpu_us_passes", *hidden)]
    lines = [keys] + [[format_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    is_text = [isinstance(rows[0][key], str) for key in keys]
    for line in lines:
        cells = []
        for cell, width, text in zip(line, widths, is_text):
            cells.append(cell.ljust(width) if text else cell.rjust(width))
        print("  ".join(cells).rstrip(), flush=True)


# --- child processes: each loader runs in one of its own
def cpu_seconds():
    """CPU time of this process and its workers, also of those that have ended."""
    seconds = 0
    for worker in multiprocessing.active_children():
        # proc(5): utime and stime are fields 14 and 15, the name in parentheses is field 2
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds + ended.ru_utime + ended.ru_stime + time.process_time()


class Stopwatch:
    """Measures wall-clock and CPU time from when it is made."""

    def __init__(self):
        self.cpu_start = cpu_seconds()
        self.start = time.perf_counter()

    def rates(self, images):
        """What a pass returns."""
        seconds = time.perf_counter() - self.start
        return {"images_s": images / seconds,
                "cpu_us": 1e6 * (cpu_seconds() - self.cpu_start) / images}


start_pass = None  # in a child process: the function that makes a pass


def start_child():
    """In a new child process: main can end it together with the workers that it starts."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when its parent does
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # by which ffcv_decoder ends a process


def open_in_child(function, *arguments):
    global start_pass
    start_pass = function(*arguments)


def pass_in_child(*arguments):
    return start_pass(*arguments)


class Child:
    """A child process that calls functions. It ends with its last reference."""

    def __init__(self):
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(1, context, initializer=start_child)

    def call(self, function, *arguments, timeout=None):
        return self.pool.submit(function, *arguments).result(timeout)


def end_children():
    """Ends all child processes and their workers, also in the middle of a pass."""
    for child in multiprocessing.active_children():
        os.killpg(child.pid, signal.SIGKILL)


# --- rounds: how rows are measured
@dataclass(eq=False)
class Row:
    """A line of a table: what it is called, how its process opens it, what it is compared with."""

    labels: dict  # the first columns
    open: tuple  # a function and its arguments; it returns a function that makes a pass
    base: "Row | None" = None
    base_name: str = ""
    first: dict = field(default_factory=dict)  # what the passes before the rounds gave
    passes: list = field(default_factory=list)  # images/s of each round
    cpu_us: list = field(default_factory=list)  # CPU time an image, microseconds, of each round

    @property
    def name(self):
        return ", ".join(str(label) for label in self.labels.values())

    def values(self):
        """The row as a dict for the table and the JSON."""
        values = {**self.labels, "images_s": float(np.median(self.passes)),
                  "min": min(self.passes), "max": max(self.passes)}
        base = self.base
        if base and len(base.passes) == len(self.passes):
            ratios = np.divide(self.passes, base.passes)
            values[f"x {self.base_name}"] = float(np.median(ratios))
        values["cpu_us"] = float(np.median(self.cpu_us))
        if base and len(base.passes) == len(self.passes):
            ratios = np.divide(base.cpu_us, self.cpu_us)
            values[f"x {self.base_name} by CPU time"] = float(np.median(ratios))
        return {**values, **self.first, "passes": self.passes, "cpu_us_passes": self.cpu_us}


def measure(args, report, rows, with_memory=False):
    """Measures rows in turns, each in its process; returns those that worked, as dicts.

    A row first makes a pass that does not count, which compiles and fills caches.
    """
    children = {}

    def call(row, function, *arguments):
        """What the row's process returns. A row that fails is left out, the others go on."""
        if row not in children:
            return {}
        try:
            return children[row].call(function, *arguments)
        except DataError:
            raise
        except Exception as error:  # a library may raise anything
            leave_out(report, row.name, error)
            del children[row]
            return {}

    for row in rows:
        children[row] = Child()
        call(row, open_in_child, *row.open)
        row.first |= call(row, pass_in_child, False)
        if with_memory:
            row.first |= call(row, pass_in_child, True)
        for key in ("images_s", "cpu_us"):  # of the pass that does not count
            row.first.pop(key, None)
    for _ in range(args.passes):
        for row in rows:
            result = call(row, pass_in_child, False)
            if row in children:
                row.passes.append(result["images_s"])
                row.cpu_us.append(result["cpu_us"])
    return [row.values() for row in rows if row in children]


# --- sources: the files that the rows read, all of the same pictures
class FfcvPictures(torch.utils.data.Dataset):
    """For FFCV's DatasetWriter: (picture, label) of each path."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        picture = Image.open(self.paths[i])
        return ImageOps.exif_transpose(picture).convert("RGB"), i


def write_ffcv(out, paths, num_workers):
    """In a child process: FFCV's own file, with build_beton.py's defaults."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    image = RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=95)
    writer = DatasetWriter(str(out), {"image": image, "label": IntField()},
                           num_workers=num_workers)
    writer.from_indexed_dataset(FfcvPictures(paths))


def run_builder(out, *words):
    """Builds a .beton by build_beton.py. RuntimeError with the command if it fails."""
    words = [str(word) for word in words]
    script = str(Path(__file__).with_name("build_beton.py"))
    done = subprocess.run([sys.executable, script, "--out", str(out), *words],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"build_beton.py {' '.join(words)}: {done.stderr.strip()}")


def write_jpegs(reader, ids, folder):
    """Writes samples of a .beton as JPEG files, without their index; returns the paths."""
    folder.mkdir()
    for i in ids:
        if reader.modes[i] != 0:
            raise RuntimeError(f"{reader.path}: sample {i} is stored as raw pixels, not as a JPEG")
        data = reader.read(i)
        jpeg = remove_index(data) if reader.settings else data  # FFCV's files have no index
        Path(folder, f"{i:09}.jpg").write_bytes(jpeg)
    return sorted(folder.iterdir())


class Sources:
    """The same pictures as files of several kinds, made in a temporary folder when asked for.

    It takes at most --images pictures, evenly spread, as build_beton.py --limit does.

    data: a BetonReader of the file that `500_95` stands for, which is --data where it is given.
    ids: the samples that are read of it. paths: the pictures in --data-dir.
    """

    FLAGS = {"4:4:4": "--chroma 444", "originals (--lossless)": "--lossless",
             "500_100": "--max-resolution 500 --quality 100",
             "500_90": "--max-resolution 500 --quality 90",
             "256_95": "--max-resolution 256 --quality 95"}

    def __init__(self, args, folder):
        self.args = args
        self.folder = Path(folder)
        self.made = {}  # name: (path, numbers of its samples), or the error that making it raised
        path = args.data or Path("data/train_500_95.beton")
        all_paths = FolderLoader(args.data_dir, 1).paths if args.data_dir else []
        if args.data_dir and not args.data:
            path = self.folder / "500_95.beton"
            run_builder(path, "--data-dir", args.data_dir, "--limit", args.images)
        self.data = BetonReader(path)
        n = self.data.num_samples
        if all_paths and n not in (len(all_paths), min(len(all_paths), args.images)):
            raise DataError(f"{path} holds {n:,} pictures, {args.data_dir} holds "
                            f"{len(all_paths):,}. Give the folder that the file was built from.")
        self.count = min(n, args.images)
        ids = np.arange(self.count) * n // self.count
        self.paths = [all_paths[i * len(all_paths) // n] for i in ids] if all_paths else []
        kept = ~np.isin(ids, self.data.excluded)
        self.ids = ids[kept]
        self.path_ids = np.arange(self.count)[kept]

    def find(self, name):
        """(path, numbers of its samples) of a source; it is made when first asked for."""
        if name not in self.made:
            try:
                self.made[name] = self._make(name)
            except RuntimeError as error:
                self.made[name] = error
        if isinstance(self.made[name], Exception):
            raise self.made[name]
        return self.made[name]

    def pictures(self):
        """Paths of the pictures: those of --data-dir, or without it the samples of --data."""
        return self.paths or sorted(self.find("500_95 as JPEG files")[0].iterdir())

    def _make(self, name):
        if name == "500_95":
            return self.data.path, self.ids
        out = self.folder / f"{re.sub('[^a-zA-Z0-9]+', '_', name)}.beton"
        if name == "500_95 as JPEG files":
            out = self.folder / "jpegs"
            count = len(write_jpegs(self.data, self.ids, out))
        elif name == "FFCV's file":
            if not installed_version(["ffcv"]):
                raise RuntimeError("ffcv is not installed: pip install ffcv")
            paths = self.pictures()
            count = len(paths)
            seconds = 60 + count / 5  # slower than any machine
            try:
                Child().call(write_ffcv, out, paths, self.args.num_workers, timeout=seconds)
            except TimeoutError:  # it waits for ever for a worker that died
                raise RuntimeError(f"FFCV's DatasetWriter did not end in {seconds:.0f} s") from None
        elif name == "FFCV's file, converted":
            path, numbers = self.find("FFCV's file")
            run_builder(out, "--data-dir", path)
            count = len(numbers)
        elif self.args.data_dir:
            run_builder(out, "--data-dir", self.args.data_dir, "--limit", self.count,
                        *self.FLAGS[name].split())
            count = self.count
        else:
            raise RuntimeError("it needs a folder of pictures: give --data-dir")
        return out, np.arange(count)


# --- loaders: each opens one and returns a function that starts a pass, whose batches are iterated
@dataclass
class Load:
    """What a loader has to load, the same in each row but for the path."""

    path: Path
    ids: np.ndarray  # samples of a pass, repeated where the file is small
    res: int
    batch_size: int
    num_workers: int
    scale: tuple = SCALE


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


def open_torchvision(load):
    paths = sorted(str(path) for path in load.path.iterdir())
    files = JpegFiles([paths[i] for i in load.ids], load.res, load.scale)
    return torch.utils.data.DataLoader(
        files, load.batch_size, shuffle=True, num_workers=load.num_workers, prefetch_factor=AHEAD,
        persistent_workers=True, multiprocessing_context="fork").__iter__


def open_dali(load):
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.types import INTERP_LINEAR, RGB
    paths = sorted(str(path) for path in load.path.iterdir())
    files = [paths[i] for i in load.ids]

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
    passes = itertools.count()

    def run():
        # As many batches as the pass has: pipeline.run() would go on with those of the next pass
        # while other rows are measured. The first schedule_run of all starts `ahead` batches
        is_first = next(passes) == 0
        for _ in range(1 if is_first else ahead):
            pipeline.schedule_run()
        for batch in range(num_batches):
            images, labels = pipeline.share_outputs()
            yield np.asarray(images.as_tensor()), labels  # a view, valid until it is released
            pipeline.release_outputs()
            if batch + ahead < num_batches:
                pipeline.schedule_run()
    return run


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
    pids = [os.getpid()] + [child.pid for child in multiprocessing.active_children()]
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return 1024e-6 * sum(map(int, re.findall(r"Pss_(?:Anon|Shmem): *(\d+)", text)))


class LoaderPasses:
    """Opens a loader; called, it makes a pass and returns what it measured of it."""

    def __init__(self, alternative, load):
        for module in alternative.modules:
            importlib.import_module(module)
        if alternative.is_ffcv:
            ffcv_decoder()  # compiles our kernel before the clock runs
        self.alternative = alternative
        self.load = load
        self.opened_at = time.perf_counter()
        self.first_batch_s = None
        self.start = self.open()

    def open(self):
        return self.alternative.open(self.load, **self.alternative.settings)

    def __call__(self, with_memory):
        return self.measure_memory() if with_memory else self.measure_time()

    def measure_memory(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what this takes
        before = held_memory()
        # The others keep buffers from pass to pass: those of a new loader count. FFCV takes its
        # buffers anew in each pass, and a new loader would compile
        start = self.start if self.alternative.is_ffcv else self.open()
        return {"memory_MB": max(held_memory() for _ in start()) - before}  # at each batch

    def measure_time(self):
        stopwatch = Stopwatch()
        values = 0
        for images, _ in self.start():
            if self.first_batch_s is None:
                self.first_batch_s = time.perf_counter() - self.opened_at
            values += int(np.prod(images.shape))
        rates = stopwatch.rates(values / (3 * self.load.res ** 2))  # each view counts
        return {**rates, "first_batch_s": self.first_batch_s}


def compile_kernels(load):
    """In a child process that measures nothing: our kernels go into numba's cache."""
    for _ in ESSLLoader(load.path, load.batch_size, True, load.res, indices=load.ids[:1],
                        drop_last=False):
        pass


# --- section: alternatives
@dataclass(frozen=True)
class Alternative:
    """A loader of the first table."""

    name: str
    source: str
    open: object  # one of the functions above
    resize: str  # filter, and whether it is antialiased
    decodes: str = "the whole picture"
    settings: dict = field(default_factory=dict)
    modules: tuple = ()  # imported before the clock runs
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


def make_load(args, source, res):
    path, numbers = source
    return Load(path, np.resize(numbers, args.images), res, args.batch_size, args.num_workers)


def find_alternatives(sources, report):
    """[(Alternative, its source)] of those that can run here; the others are left out by name."""
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
        opening = (LoaderPasses, alternative, make_load(args, source, res))
        rows[alternative.name] = Row({"name": alternative.name, "res": res}, opening)
    for row in rows.values():
        row.base = rows.get("FFCV")
        row.base_name = "FFCV"
    return list(rows.values())


def plot_alternatives(rows, path):
    resolutions = list(dict.fromkeys(row["res"] for row in rows))
    height = 1.2 + 0.32 * len(rows) / len(resolutions)
    figure, axes = plt.subplots(1, len(resolutions), figsize=(2 + 4.5 * len(resolutions), height),
                                sharey=True, squeeze=False, layout="constrained")
    for axis, res in zip(axes[0], resolutions):
        shown = [row for row in rows if row["res"] == res][::-1]
        speeds = np.array([row["images_s"] for row in shown])
        spread = np.abs([[row[end] for row in shown] for end in ("min", "max")] - speeds)
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
    rows = []
    sizes = {}
    for name in COMPRESSION:
        try:
            path, numbers = sources.find(name)
        except RuntimeError as error:
            leave_out(report, name, error)
            continue
        sizes[name] = int(BetonReader(path).sizes[numbers].mean())
        load = make_load(args, (path, numbers), args.res[0])
        rows.append(Row({"name": name}, (LoaderPasses, PLAIN_ESSL, load)))
    for row in rows:
        row.base = next(row for row in rows if row.labels["name"] == "500_95")
        row.base_name = "500_95"
    measured = measure(args, report, rows)
    for row in measured:
        row["bytes_an_image"] = sizes[row["name"]]
    add_table(report, "compression", measured, hidden=["first_batch_s"])


# --- section: decomposition
STEPS = ("read", "decode", "+ resize", "+ flip", "+ normalise")
READ, DECODE, RESIZE, FLIP, NORMALISE = range(5)


def make_essl_steps(reader, res, step):
    """load(at, size, width, height, box, flip): a picture by ESSL's functions, up to a step."""
    tables = (reader.sizes, reader.widths, reader.heights)
    memory, scratch = make_scratch(*tables, res)
    begin = scratch.raw - memory.ctypes.data
    stored = memoryview(memory).cast("B")[begin:]
    crop = np.zeros((res, res, 3), np.uint8)

    def load(at, size, width, height, box, flip):
        os.preadv(reader.file.fileno(), [stored[:size]], at)
        if step == DECODE:
            decode_planes(Stored(scratch.raw, size, 0, width, height), box, scratch)
        elif step >= RESIZE:  # bicubic; the flip is part of its last write
            resized_crop(Stored(scratch.raw, size, 0, width, height), box, Output(res, True, flip),
                         crop.ctypes.data, scratch)
        return torch.from_numpy(crop)
    return load


def make_ffcv_steps(reader, res, step):
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
        if step >= DECODE:  # the whole picture
            imdecode(jpeg, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
        if step >= RESIZE:  # by cv2's INTER_AREA
            picture = decoded[:3 * height * width].reshape(height, width, 3)
            resize_crop(picture, y, y + h, x, x + w, crop)
        pixels = torch.from_numpy(crop)
        return pixels.flip(1) if flip else pixels
    return load


def open_steps(make_steps, step, load):
    """run(): images/s on one core, up to a step, by the functions that a loader calls."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    reader = BetonReader(load.path)
    load_picture = make_steps(reader, load.res, step)
    tables = (reader.ptrs, reader.sizes, reader.widths, reader.heights)
    samples = np.stack(tables, axis=1)[load.ids].tolist()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])

    def run(_):
        stopwatch = Stopwatch()
        for i, (at, size, width, height) in enumerate(samples):
            box = random_box(width, height, SCALE, RATIO, 0, 0, i)
            flip = step >= FLIP and i % 2 == 0
            pixels = load_picture(at, size, width, height, box, flip)
            if step == NORMALISE:
                pixels.float().sub_(mean).div_(std)
        return stopwatch.rates(len(samples))
    return run


def bench_decomposition(args, sources, report):
    load = make_load(args, sources.find("500_95"), args.res[0])
    load.ids = load.ids[:args.images // 4 + 1]  # one core, by Python: a fourth is enough
    loaders = {"FFCV": make_ffcv_steps, "ESSL": make_essl_steps}
    if not installed_version(["ffcv"]):
        leave_out(report, "decomposition of FFCV", "ffcv is not installed: pip install ffcv")
        del loaders["FFCV"]
    rows = []
    for number, step in enumerate(STEPS):
        ours = {name: Row({"step": step, "loader": name}, (open_steps, make, number, load))
                for name, make in loaders.items()}
        for row in ours.values():
            row.base = ours.get("FFCV")
            row.base_name = "FFCV"
        rows += ours.values()
    add_table(report, "decomposition", measure(args, report, rows))


# --- section: pixels
def bench_pixels(args, sources, report):
    if not sources.paths:
        return leave_out(report, "pixels", "it needs a folder of pictures: give --data-dir")
    settings = {"res": args.res[0], "drop_last": False}
    all_paths = FolderLoader(args.data_dir, 1).paths
    number_of = {path: number for number, path in enumerate(all_paths)}
    numbers = [number_of[sources.paths[i]] for i in sources.path_ids]
    folder = FolderLoader(args.data_dir, 64, indices=numbers, **settings)
    beton = ESSLLoader(sources.data.path, 64, indices=sources.ids, **settings)
    means = []
    for (a, _), (b, _) in zip(folder, beton):
        difference = (a.float() - b).abs()  # (B, 3, res, res)
        means += (difference.mean(dim=(1, 2, 3)) / 255).tolist()
        shown = torch.stack([a[:6], b[:6], (8 * difference[:6]).clamp(max=255).byte()])
    # (3, 6, 3, res, res) -> (3 * res, 6 * res, 3)
    picture = shown.permute(0, 3, 1, 4, 2).reshape(3 * args.res[0], -1, 3)
    path = args.plot.with_name(f"{args.plot.stem}_pixels.png")
    plt.imsave(path, picture.numpy())
    report["plots"].append(str(path))
    add_table(report, "pixels", [{"name": "folder, .beton", "images": len(means), "largest":
                                  max(means), "mean_difference": float(np.mean(means))}])


# --- section: scaling
AXES = {  # what grows: label of the axis, values; the first three change the file
    "picture": ("longer side of the picture, pixels", (256, 375, 500, 1000, 2000)),
    "quality": ("JPEG quality", (75, 85, 90, 95, 100)),
    "output": ("side of the output, pixels", (96, 160, 224, 320, 384)),
    "crop": ("share of the picture that the crop takes", (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "threads": ("threads", None)}  # up to the cores
USUAL = {"picture": 500, "quality": 95, "output": 224, "crop": None}  # None: SCALE
SCALING_PICTURES = 64  # different ones
SCALING_BATCH = 32
ESSL_CURVE = "ESSL, crop by index"
WHOLE_CURVE = "ESSL, libjpeg-turbo decodes the whole picture"


def paste_picture(paths, number, side):
    """A picture of side x 2/3 side, pasted together from photos at their own size.

    So a pixel takes as many bits at every size: an enlarged photo would be smooth, thus cheap.
    """
    width = side
    height = side * 2 // 3
    picture = Image.new("RGB", (width, height))
    y = 0
    while y < height:
        x = 0
        row_height = height
        while x < width:
            photo = Image.open(paths[number % len(paths)])
            photo = ImageOps.exif_transpose(photo).convert("RGB")
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
        # ESSL leaves JPEGs with a restart interval to libjpeg-turbo. This one is longer than the
        # picture, so the data stay as they are.
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xdd\x00\x04\xff\xff" + data[2:])
    run_builder(whole, "--data-dir", jpegs, "--max-resolution", side, "--lossless")
    return indexed, whole


def make_scaling_rows(args, sources, axis, value):
    """Two rows: ESSL, and ESSL with libjpeg-turbo's decoder, where `axis` has a value."""
    point = {**USUAL, "threads": args.num_workers, axis: value}
    files = make_scaling_files(sources, point["picture"], point["quality"])
    scale = (point["crop"], point["crop"]) if point["crop"] else SCALE
    images = max(SCALING_PICTURES, int(args.images * (USUAL["picture"] / point["picture"]) ** 2))
    ids = np.resize(np.arange(SCALING_PICTURES), images)
    rows = []
    for name, path in zip((ESSL_CURVE, WHOLE_CURVE), files):
        load = Load(path, ids, point["output"], SCALING_BATCH, point["threads"], scale)
        labels = {"axis": axis, "value": value, "decoder": name}
        rows.append(Row(labels, (LoaderPasses, PLAIN_ESSL, load)))
    rows[0].base = rows[1].base = rows[1]
    rows[0].base_name = rows[1].base_name = "whole decode"
    return rows


def plot_scaling(rows, cpu, path):
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    figure.suptitle(f"Images/s as the work grows ({cpu})")
    panels = axes.flat
    for axis_name, (label, _) in AXES.items():
        panel = next(panels)
        for decoder, colour in ((ESSL_CURVE, "tab:orange"), (WHOLE_CURVE, "tab:blue")):
            curve = [row for row in rows if (row["axis"], row["decoder"]) == (axis_name, decoder)]
            speeds = np.array([row["images_s"] for row in curve])
            spread = np.abs([[row[end] for row in curve] for end in ("min", "max")] - speeds)
            values = [row["value"] for row in curve]
            panel.errorbar(values, speeds, spread, marker="o", markersize=4, capsize=2,
                           color=colour, label=decoder)
        panel.set_xlabel(label)
        panel.set_ylabel("images/s")
        panel.grid(alpha=0.3)
        if axis_name == "picture":  # pixels grow by 60
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(values, values)
            panel.set_xticks([], minor=True)
        else:
            panel.set_ylim(bottom=0)
        if axis_name == "threads":
            panel.set_xticks(values)
    last = next(panels)
    last.axis("off")
    last.legend(*panel.get_legend_handles_labels(), loc="upper left", frameon=False)
    usual = (f"Where it is not the axis: pictures of {USUAL['picture']} x "
             f"{USUAL['picture'] * 2 // 3} pixels,\nquality {USUAL['quality']}, 4:2:0, output "
             f"{USUAL['output']} pixels, crops of 0.2 to 1 of\nthe picture, all cores. Line: "
             "slowest to fastest round.")
    last.text(0.02, 0.7, usual, va="top", transform=last.transAxes)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bench_scaling(args, sources, report):
    rows = []
    for axis, (_, values) in AXES.items():
        if axis == "threads":
            cores = usable_cores()
            values = sorted({2 ** k for k in range(cores.bit_length())} | {cores})
        for value in values:
            rows += measure(args, report, make_scaling_rows(args, sources, axis, value))
    add_table(report, "scaling", rows, hidden=["first_batch_s"])
    path = args.plot.with_name(f"{args.plot.stem}_scaling.png")
    plot_scaling(rows, report["hardware"]["cpu"], path)
    report["plots"].append(str(path))


# --- all sections
SECTIONS = {"alternatives": bench_alternatives, "decomposition": bench_decomposition,
            "compression": bench_compression, "pixels": bench_pixels, "scaling": bench_scaling}


def main(args):
    for number in (signal.SIGINT, signal.SIGTERM):  # sys.exit runs the `finally` below
        signal.signal(number, lambda *_: sys.exit("bench_loader: stopped"))
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
        tempfile.tempdir = folder  # for what libraries leave behind when a process is ended
        try:
            for path in (args.json, args.plot):
                path.parent.mkdir(parents=True, exist_ok=True)
            report = start_report(args)
            sources = Sources(args, folder)
            report["data"] = {"images": len(sources.ids),
                              "bytes_an_image": int(sources.data.sizes[sources.ids].mean())}
            print(f"{report['hardware']['cpu']}, {args.num_workers} threads or processes, "
                  f"{len(sources.ids)} images", flush=True)
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
