"""Turns pictures into a .beton file that ESSL, and FFCV, load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --demo              # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train.beton --exclude-bad

SOURCE is a folder of class folders, of class tars or of pictures; a .tar of any of these; a
WebDataset .tar, a .parquet or a folder of these; or a .beton, of FFCV's too: its samples are copied
as they are and get the index by which the loader finds a crop. Nothing is unpacked.

--demo takes 10 s on two EPYC cores. Exit code 2: the input is bad; 1: anything else. Last line:
x.beton: 320 images, 5 classes, 23.8 MB, 320 re-encoded, 0 left out, 1.2 s (259 images/s)
"""
import argparse
import contextlib
import ctypes
import fcntl
import functools
import glob
import io
import json
import os
import re
import signal
import sys
import tarfile
import time
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageOps
from pyarrow import parquet
from torch.utils.data import DataLoader
from tqdm import tqdm

from essl_loader import (ALLOC, ESSL, FIELD, HEADER, OK, SAMPLE, BetonReader, add_index, bind,
                         decode_jpeg, end_with_parent, is_intact, remove_index, tables_checksum,
                         usable_cores)

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
JPEG = 0  # a sample's mode in the file; the other one is raw RGB
RESAMPLING = {"turbojpeg": Image.Resampling.BOX, "pil": Image.Resampling.BICUBIC}
COLOURS = {"red": (220, 50, 40), "yellow": (230, 200, 50), "green": (60, 180, 70),
           "blue": (50, 100, 225), "purple": (170, 70, 200)}
SIDES = {"triangle": 3, "disc": 60}
DEMO_CLASSES = [f"{colour}_{shape}" for colour in COLOURS for shape in SIDES]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-dir", type=Path, metavar="SOURCE", help="build from this; see above")
    what.add_argument("--demo", action="store_true", help="draw a small train and val set instead")
    what.add_argument("--verify", type=Path, metavar="FILE", help="check every byte of a .beton")
    add("--exclude-bad", action="store_true", help="with --verify: loaders leave bad samples out")
    add("--out", type=Path, help="the .beton to write; a .json with the class names goes beside it")
    add("--out-dir", type=Path, default=Path("data"), help="folder for --demo (default: data)")
    add("--labels", type=Path, metavar="FILE",
        help="labels without class folders: lines of file name and class, or Kaggle's csv")
    add("--classes", type=Path, metavar="FILE", help="number classes as this .beton does")
    add("--lossless", action="store_true", help="keep JPEGs within --max-resolution as they are")
    add("--max-resolution", type=int, default=500, help="longest side in pixels (default: 500)")
    add("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (default: 95)")
    add("--chroma", choices=("420", "444"), default="420", help="chroma sampling (default: 420)")
    add("--codec", choices=tuple(RESAMPLING), default="turbojpeg",
        help="turbojpeg shrinks by area, as FFCV does; pil by bicubic (default: turbojpeg)")
    add("--num-workers", type=int, default=0, help="processes; 0: all usable cores (default: 0)")
    add("--skip-bad", action="store_true", help="leave unreadable pictures out, do not fail")
    add("--limit", type=int, default=0, help="build only so many pictures; 0: all (default: 0)")
    args = p.parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                         for word in (sys.argv[1:] if argv is None else argv)])
    if args.data_dir and (args.out is None or args.out.suffix != ".beton"):
        p.error(f"--data-dir needs --out FILE.beton, found --out {args.out}.")
    if args.data_dir and args.data_dir.suffix == ".beton":
        encoding = ("lossless", "max_resolution", "quality", "chroma", "codec")
        flags = [f"--{name.replace('_', '-')}" for name in encoding
                 if getattr(args, name) != p.get_default(name)]
        if flags:
            p.error(f"The samples of {args.data_dir} are copied as they are. Leave out "
                    f"{', '.join(flags)}, or build from the pictures.")
    if not (1 <= args.quality <= 100 and 1 <= args.max_resolution <= 65500 and args.limit >= 0):
        p.error("--quality goes from 1 to 100, --max-resolution from 1 to 65500, --limit from 0.")
    return args


# --- sources: where the pictures lie
# A picture is `size` bytes from byte `start` on of the file `path`; all of the file `name` in the
# folder `path` if size is -1; row `size` of row group `start` of a parquet file; sample `start` of a
# .beton.
Picture = namedtuple("Picture", "path name start size label")


def find_in_tar(file, path, start=0, folder=""):
    """The pictures of the tar `file`, which begins at byte `start` of `path`, and of tars in it.

    WebDataset's KEY.cls is the label of KEY.jpg. Raises TarError where the tar is damaged or cut
    short, which tarfile alone may take for the end.
    """
    tar = tarfile.TarFile(fileobj=file)
    pictures = []
    labels = {}
    for member in tqdm(tar, folder or str(path), unit=" files", leave=False, disable=None):
        tar.members.clear()  # else it keeps 1 kB for each
        key, suffix = os.path.splitext(os.path.normpath(folder + member.name))
        begin = start + member.offset_data
        if member.name.startswith(f"{path.stem}_"):  # ImageNet's n01440764.tar, a class
            key = f"{path.stem}/{key}"
        if suffix.lower() in PICTURES and not member.isdir():
            pictures.append(Picture(str(path), key + suffix, begin, member.size, None))
        elif suffix == ".tar":
            pictures += find_in_tar(tar.extractfile(member), path, begin, key + "/")
        elif suffix == ".cls":
            labels[key] = int(tar.extractfile(member).read())
    file.seek(tar.offset)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"neither a file nor the end at byte {start + tar.offset:,}")
    return [p._replace(label=labels.get(os.path.splitext(p.name)[0], p.label)) for p in pictures]


def find_in_parquet(path):
    """The pictures of a parquet file."""
    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if not {"image", "label"} <= set(names):
        raise ValueError(f"expected columns image and label, found {', '.join(names)}")
    pictures = []
    for group in range(file.num_row_groups):
        labels = file.read_row_group(group, ["label"])["label"].to_pylist()
        pictures += [Picture(str(path), f"row {row} of group {group}", group, row, label)
                     for row, label in enumerate(labels)]
    return pictures


@functools.lru_cache(1)
def open_beton(path):
    return BetonReader(path)


def find_in_beton(path):
    """The samples of a .beton, in its order, with its labels."""
    reader = open_beton(str(path))
    return [Picture(str(path), f"sample {i}", i, 0, label)
            for i, label in enumerate(reader.labels.tolist())]


def find_pictures(source):
    """The pictures of --data-dir. Labels: numbers, or names of class folders."""
    if source.suffix == ".beton":
        return find_in_beton(source)
    files = [source] if source.is_file() else sorted(source.iterdir())
    packed = [path for path in files if path.suffix in (".tar", ".parquet")]
    pictures = []
    for path in packed:
        try:
            if path.suffix == ".parquet":
                pictures += find_in_parquet(path)
            else:
                with open(path, "rb") as file:
                    pictures += find_in_tar(file, path)
        except Exception as error:  # pyarrow raises anything on a damaged file
            raise ValueError(f"{path}: {error}. Is it complete, and not compressed?") from error
    if not packed:
        names = glob.glob("**", root_dir=source, recursive=True, include_hidden=True)
        pictures = [Picture(str(source), name, 0, -1, None)
                    for name in names if name.lower().endswith(PICTURES)]
    if not pictures:
        raise ValueError(f"{source} holds no picture ({' '.join(PICTURES)}), .tar or .parquet.")
    some_flat = not all(os.path.dirname(picture.name) for picture in pictures)
    if len(packed) > 1 and some_flat or any(p.label is not None for p in pictures):
        return pictures
    # Class folders in ImageFolder's order. A tar's may all lie in ILSVRC/Data/CLS-LOC/train.
    folders = [os.path.dirname(picture.name) for picture in pictures]
    top = os.path.commonpath(folders) if packed else ""
    labels = [folder[len(top):].strip("/").split("/")[0] for folder in folders]
    if not any(labels):  # a flat source is one class
        labels = [os.path.basename(top) or source.resolve().name] * len(labels)
    pictures = [p._replace(label=label) for p, label in zip(pictures, labels) if label]
    return sorted(pictures, key=lambda p: (p.label, os.path.split(p.name)))


def find_data(source, labels_file, classes_file):
    """(pictures with labels 0 to C - 1, C class names) of --data-dir. ValueError if it is bad."""
    pictures = find_pictures(source)
    if labels_file:
        lines = labels_file.read_text(errors="replace").splitlines()
        rows = [re.split(r"[,\s]+", line.strip()) for line in lines]  # Kaggle's have boxes behind
        pairs = {(Path(row[0]).stem, int(row[1]) if row[1].isdecimal() else row[1])
                 for row in rows if row[1:]}
        label_of = dict(pairs)
        if len(label_of) < len(pairs):
            raise ValueError(f"{labels_file} gives a file name two labels: names must be unique.")
        pictures = [p._replace(label=label_of.get(Path(p.name).stem)) for p in pictures]
    labels = {picture.label for picture in pictures}
    if classes_file:
        classes = BetonReader(classes_file.with_suffix(".beton")).classes or []
    elif source.suffix == ".beton" and open_beton(str(source)).classes:
        classes = open_beton(str(source)).classes
    elif all(isinstance(label, int) for label in labels):
        classes = [str(number) for number in range(min(max(labels), 99_999) + 1)]
    else:
        classes = sorted(label for label in labels if isinstance(label, str))
    # A number of --labels is a class's name where all names are numbers, else its place
    named = labels_file and all(map(str.isdecimal, classes))
    numbers = map(int, classes) if named else range(len(classes))
    number_of = {label: i for i, pair in enumerate(zip(numbers, classes)) for label in pair}
    for path, name, _, _, label in pictures:
        if label not in number_of:
            raise ValueError(f"{path}/{name} has the label {label!r}, none of the {len(classes):,} "
                             f"classes. Change it in {labels_file or source}, or use --classes.")
    print(f"found: {len(pictures):,} pictures in {len(classes):,} classes", flush=True)
    return [p._replace(label=number_of[p.label]) for p in pictures], classes


# --- pictures: read or drawn
@functools.lru_cache(1)
def read_row_group(path, group):
    """The picture column of a parquet file's row group."""
    return parquet.ParquetFile(path).read_row_group(group, ["image"], use_threads=False)["image"]


def read_source(picture):
    """A picture's bytes."""
    path, name, start, size, _ = picture
    if path.endswith(".parquet"):
        value = read_row_group(path, start)[size].as_py()
        return value["bytes"] if isinstance(value, dict) else value  # Hugging Face's is a struct
    with open(f"{path}/{name}" if size == -1 else path, "rb") as file:
        file.seek(start)
        return file.read(size)


def draw_picture(split, index):
    """A large shape of class index % 10 on shaded ground, 96 to 160 pixels a side."""
    rng = np.random.default_rng((split, index))
    colour, shape = DEMO_CLASSES[index % len(DEMO_CLASSES)].split("_")
    w, h = (2 * rng.integers(96, 161, 2)).tolist()  # drawn at twice the size, for smooth edges
    shade = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).crop((40, 40, 216, 216))
    dark, light = rng.integers((30, 140), (100, 220), (3, 2)).T.tolist()
    picture = ImageOps.colorize(shade.resize((w, h)), dark, light)
    r = min(w, h) * rng.uniform(0.32, 0.45)
    x, y = (np.array([w, h]) / 2 + r * rng.uniform(-0.1, 0.1, 2)).tolist()
    fill = tuple((COLOURS[colour] + rng.integers(-25, 26, 3)).tolist())
    ImageDraw.Draw(picture).regular_polygon((x, y, r), SIDES[shape], rng.uniform(-15, 15), fill)
    return picture.reduce(2)


# --- encoding, in the worker processes. how: what was done, which the last line counts
Sample = namedtuple("Sample", "data mode width height how")


def compress(picture, quality, chroma):
    """An RGB image as baseline JPEG bytes with optimised Huffman tables."""
    buffer = io.BytesIO()
    picture.info.clear()  # save() would copy the comment of the file that was read
    # Pillow cannot go on when its buffer is full: noise at quality 100 takes 4 bytes a pixel
    ImageFile.MAXBLOCK = 65536 + 4 * picture.width * picture.height
    picture.save(buffer, "JPEG", quality=quality, subsampling=":".join(chroma), optimize=True)
    return buffer.getvalue()


def make_baseline(progressive, picture):
    """A progressive JPEG, opened as `picture`, as a baseline one with the same coefficients.

    None if libjpeg-turbo finds a fault in it.
    """
    lib = bind()
    lib.tj3Init.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(lib.tj3Init(2))  # TJINIT_TRANSFORM
    lib.tj3Set(handle, 0, 1)  # TJPARAM_STOPONWARNING
    options = 64 + 256  # TJXOPT_COPYNONE + TJXOPT_OPTIMIZE
    transform = np.array([((0,) * 4, 0, options, 0, 0)], "4i4, i4, i4, u8, u8")  # tjtransform
    buffer = ctypes.c_void_p()
    size = ctypes.c_size_t()
    failed = lib.tj3Transform(handle, progressive, ctypes.c_size_t(len(progressive)), 1,
                              ctypes.byref(buffer), ctypes.byref(size),
                              ctypes.c_void_p(transform.ctypes.data))
    jpeg = ctypes.string_at(buffer, size.value)
    lib.tj3Free(buffer)
    lib.tj3Destroy(handle)
    if failed or Image.open(io.BytesIO(jpeg)).tobytes() != picture.tobytes():
        return None  # decoders smooth over scans that are missing, and here they do not
    return jpeg


def keep_jpeg(data, picture, longest):
    """A Sample of the JPEG `data`, opened as `picture`, byte for byte, or if it is progressive with
    the same coefficients.

    None if it is too large, turned by EXIF, CMYK, or faulty.
    """
    if max(picture.size) > longest or picture.mode not in ("L", "RGB"):
        return None
    with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
        if picture.getexif().get(0x0112, 1) in range(2, 9):
            return None
    how = "kept"
    if "progressive" in picture.info:
        how = "made baseline"
        data = make_baseline(data, picture)
        if data is None:
            return None
    return sample_of(data, *picture.size, how)


def sample_of(jpeg, width, height, how):
    """A Sample of a JPEG with its index, or without one if it has restart markers or rare sampling.

    None if libjpeg-turbo, which then has to decode it, finds a fault in it.
    """
    data, indexed = add_index(jpeg, width, height)
    if not indexed:
        how += " without index"
        code, pixels = decode_jpeg(jpeg, width, height)
        _, stored_pixels = decode_jpeg(data, width, height)
        # It reads some damage in another way, and without a warning, where more bytes follow
        if code != OK or not np.array_equal(pixels, stored_pixels):
            return None
    return Sample(data, JPEG, width, height, how)


def copy_sample(path, i):
    """Sample i of another .beton, a JPEG with a new index. ValueError if it is damaged."""
    reader = open_beton(path)
    data = reader.read(i)
    size = (int(reader.widths[i]), int(reader.heights[i]))
    if reader.modes[i] != JPEG:
        return Sample(data, int(reader.modes[i]), *size, "raw copied")
    if is_intact(data):
        data = remove_index(data)
    elif reader.settings:  # FFCV's files have none
        raise ValueError("its bytes do not match their checksum")
    sample = sample_of(data, *size, "copied")
    if sample is None:
        raise ValueError("its JPEG data are damaged")
    return sample


def encode_sample(settings, job):
    """A Sample of a picture, or why there is none, as a string."""
    try:
        if job.path.endswith(".beton"):
            return copy_sample(job.path, job.start)
        longest = settings["max_resolution"]
        if job.path == "demo":
            picture = draw_picture(job.start, job.size)
        else:
            data = read_source(job)
            picture = Image.open(io.BytesIO(data))
            if settings["lossless"] and data[:2] == b"\xff\xd8":  # a JPEG
                sample = keep_jpeg(data, picture, longest)
                if sample:
                    return sample
            picture.load()
            with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
                ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode[0] in "IF":  # convert() would clip 16-bit grey at 255
                raise ValueError(f"more than 8 bits a pixel (mode {picture.mode}): convert it")
            picture = picture.convert("RGB")  # drops alpha and later frames, as ImageFolder does
        if max(picture.size) > longest:
            size = [max(1, round(side * longest / max(picture.size))) for side in picture.size]
            picture = picture.resize(size, RESAMPLING[settings["codec"]])
        jpeg = compress(picture, settings["quality"], settings["chroma"])
        return sample_of(jpeg, *picture.size, "re-encoded")
    except Exception as error:  # Pillow raises anything on a damaged file; a disk's error ends all
        if getattr(error, "errno", 0) in (2, 5, 107, 110, 116):  # no file, I/O, network
            raise OSError(f"{job.path}/{job.name}: {error}") from None
        return str(error) or type(error).__name__


def in_order(work, jobs, num_workers):
    """Yields work(job) for every job, in order, from worker processes. RuntimeError if one dies."""
    workers = min(num_workers or usable_cores(), len(jobs))
    loader = DataLoader(jobs, 16, num_workers=workers, multiprocessing_context="fork",
                        collate_fn=lambda batch: [work(job) for job in batch],
                        worker_init_fn=lambda _: end_with_parent())
    for results in tqdm(loader, unit=" images", unit_scale=16, disable=None):  # on a terminal
        yield from results


# --- file
def remove_leftovers(path):
    """Removes what killed builds of `path` left: up to 95 GB in a hidden file.

    A file whose process lives stays. So does a locked one: another container, which numbers its
    processes anew, may be writing it.
    """
    for left in path.parent.iterdir():
        match = re.fullmatch(re.escape(f".{path.name}.tmp-") + "([0-9]+)", left.name)
        if not match:
            continue
        pid = match[1]
        if pid != str(os.getpid()) and Path("/proc", pid).exists():
            continue
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is locked
            left.unlink()
            print(f"removed: {left}, which a killed build left", flush=True)


@contextlib.contextmanager
def write_aside(path):
    """A file that takes its name only when it is complete and on the disk, else leaves nothing.

    A process that is killed does leave it, under a hidden name; the next build removes that.
    """
    remove_leftovers(path)
    tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(tmp_path, "xb") as file:
        try:
            with contextlib.suppress(OSError):  # a network's file system may have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(tmp_path, path)
        finally:
            tmp_path.unlink(missing_ok=True)


def write_beton(out, pictures, classes, settings, args):
    """Encodes pictures into `out` and its .json. ValueError if one is bad (--skip-bad: all)."""
    t0 = time.monotonic()
    page = 8 << 20  # FFCV's default page size
    samples = np.zeros(len(pictures), SAMPLE)
    alloc = np.zeros(len(pictures), ALLOC)
    end = HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes
    n = 0
    counts = Counter()  # how many samples were kept, re-encoded, ...
    bad = []
    out.parent.mkdir(parents=True, exist_ok=True)
    add_index(compress(Image.new("RGB", (16, 16)), 95, "420"), 16, 16)  # loads its kernel: workers
    with write_aside(out) as file:  # that are forked have it
        results = in_order(functools.partial(encode_sample, settings), pictures, args.num_workers)
        for picture, result in zip(pictures, results):
            if isinstance(result, str):
                bad.append({"file": f"{picture.path}/{picture.name}", "reason": result})
                tqdm.write(f"{picture.path}/{picture.name}: {result}", file=sys.stderr)
            elif args.skip_bad or not bad:  # else nothing comes of it, but all bad ones are named
                size = len(result.data)
                while size > page:
                    page *= 2  # what is placed crosses no boundary of the larger pages either
                if end // page != (end + size - 1) // page:
                    end = -(-end // page) * page
                samples[n] = (result.mode, result.width, result.height, end, picture.label)
                alloc[n] = (n, end, size)
                file.seek(end)
                file.write(result.data)
                end += size
                counts[result.how] += 1
                n += 1
        if bad and not (args.skip_bad and n):
            remedy = "repair or remove them"
            if len(bad) < len(pictures):
                remedy += ", or use --skip-bad"
            raise ValueError(f"{len(bad):,} of {len(pictures):,} pictures are bad, see above. "
                             f"{out} was not written: {remedy}.")
        header = np.array((2, 2, page, n, end), HEADER)
        checksum = tables_checksum(header, settings, samples[:n], alloc[:n])
        settings = settings | {"checksum": checksum}
        fields = np.array([(2, b"image", json.dumps(settings).encode()), (1, b"label", b"")], FIELD)
        file.seek(end)
        file.write(alloc[:n].tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples[:n].tobytes())
        sidecar = {"classes": classes, "settings": settings, "counts": counts, "left_out": bad}
        with write_aside(out.with_suffix(".json")) as sidecar_file:  # takes its name first
            sidecar_file.write(json.dumps(sidecar, indent=1).encode())
    seconds = time.monotonic() - t0
    kinds = "".join(f"{number:,} {how}, " for how, number in sorted(counts.items()))
    print(f"{out}: {n:,} images, {len(classes)} classes, {out.stat().st_size / 1e6:,.1f} MB, "
          f"{kinds}{len(bad):,} left out, {seconds:.1f} s ({n / seconds:,.0f} images/s)")


# --- verification
def find_fault(reader, i):
    """What is wrong with sample i of a .beton, or None."""
    try:
        data = reader.read(i)
        if reader.settings and reader.modes[i] == JPEG and not is_intact(data):
            return "its bytes do not match their checksum"
        reader.image(i)
    except (OSError, ValueError) as error:
        return str(error)


def verify(path, exclude_bad, num_workers):
    """Checks header, tables, checksums and every sample of a .beton; exits with 1 at damage."""
    reader = BetonReader(path)
    count = reader.num_samples
    found = in_order(functools.partial(find_fault, reader), range(count), num_workers)
    faults = {i: fault for i, fault in enumerate(found) if fault}
    for i, fault in faults.items():
        print(f"sample {i}: {fault}", file=sys.stderr)
    new = set(faults) - set(reader.excluded.tolist())
    if exclude_bad:
        json_path = path.with_suffix(".json")
        sidecar = json.loads(json_path.read_text()) if json_path.exists() else {"classes": None}
        with write_aside(json_path) as file:
            file.write(json.dumps(sidecar | {"excluded": faults}, indent=1).encode())
    elif new:
        sys.exit(f"build_beton: {path}: {len(new):,} of {count:,} are damaged, as listed. Copy it "
                 "again, or add --exclude-bad, with which loaders leave them out.")
    print(f"{path}: {count:,} samples verified, {len(faults):,} damaged and excluded")


def main(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C: workers just end
    warnings.simplefilter("ignore")  # Pillow's, on EXIF and palettes that it can live with
    settings = {"essl": ESSL, "max_resolution": args.max_resolution, "quality": args.quality,
                "chroma": args.chroma, "codec": args.codec, "lossless": args.lossless}
    try:
        if args.lossless and not hasattr(bind(), "tj3Transform"):
            raise ImportError("--lossless needs libjpeg-turbo 3: `pip install turbojpeg`.")
        if args.verify:
            verify(args.verify, args.exclude_bad, args.num_workers)
        elif args.data_dir:
            pictures, classes = find_data(args.data_dir, args.labels, args.classes)
            if args.data_dir.suffix == ".beton":
                settings = open_beton(str(args.data_dir)).settings | {"essl": ESSL}
            count = min(args.limit or len(pictures), len(pictures))
            pictures = [pictures[i * len(pictures) // count] for i in range(count)]
            write_beton(args.out, pictures, classes, settings, args)
        else:
            for split, (name, size) in enumerate((("train", 1000), ("val", 200))):
                pictures = [Picture("demo", str(i), split, i, i % len(DEMO_CLASSES))
                            for i in range(args.limit or size)]
                out = args.out_dir / f"demo_{name}.beton"
                write_beton(out, pictures, DEMO_CLASSES, settings, args)
    except (ValueError, FileNotFoundError, NotADirectoryError, ImportError) as error:
        print(f"build_beton: {error}", file=sys.stderr)
        sys.exit(1 if args.verify else 2)
    except OSError as error:  # a worker's stands behind its traceback
        sys.exit(f"build_beton: {str(error).strip().splitlines()[-1]}. Check path and disk.")
    except RuntimeError as error:
        sys.exit(f"build_beton: a worker died: {error} Out of memory? Use fewer --num-workers.")
    except KeyboardInterrupt:
        sys.exit("build_beton: stopped by a signal, nothing was written.")


if __name__ == "__main__":
    main(get_args())
