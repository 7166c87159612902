"""Turns pictures into a .beton file that ESSL, and FFCV, load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --demo              # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train.beton --exclude-bad

SOURCE is a folder of class folders, of class tars or of pictures; a .tar of any of these; a
WebDataset .tar, a .parquet or a folder of these. Nothing is unpacked.

--demo takes 10 s on two EPYC cores. Exit code 2: the input is bad; 1: anything else. Last line:
x.beton: 320 images, 5 classes, 23.8 MB, 0 kept, 320 re-encoded, 0 left out, 1.2 s (259 images/s)
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
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageOps
from pyarrow import parquet
from torch.utils.data import DataLoader
from tqdm import tqdm

from essl_loader import (ALLOC, FIELD, HEADER, SAMPLE, BetonReader, bind, end_with_parent,
                         tables_checksum, usable_cores)

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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
    if not (1 <= args.quality <= 100 and 1 <= args.max_resolution <= 65500 and args.limit >= 0):
        p.error("--quality goes from 1 to 100, --max-resolution from 1 to 65500, --limit from 0.")
    return args


# --- sources: where the pictures lie
# A picture is `size` bytes from byte `start` on of the file `path`; all of the file `name` in the
# folder `path` if size is -1; row `size` of row group `start` of a parquet file.
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


def find_pictures(source):
    """The pictures of --data-dir. Labels: numbers, or names of class folders."""
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


# --- encoding, in the worker processes
def compress(picture, quality, chroma):
    """An RGB image as baseline JPEG bytes with optimised Huffman tables and restart markers."""
    mcus = -(-picture.width // (16 if chroma == "420" else 8))
    divisors = [k for k in range(1, mcus + 1) if mcus % k == 0]  # so that markers line up
    interval = min(divisors, key=lambda k: (max(3 - k, k - 4, 0), -k))  # 3 or 4, if possible
    buffer = io.BytesIO()
    picture.info.clear()  # save() would copy the comment of the file that was read
    # libjpeg cannot write markers into a full buffer: let the whole JPEG fit.
    ImageFile.MAXBLOCK = 65536 + 4 * picture.width * picture.height
    picture.save(buffer, "JPEG", quality=quality, subsampling=":".join(chroma), optimize=True,
                 restart_marker_blocks=interval)
    return buffer.getvalue()


def keep_jpeg(data, picture, longest):
    """The JPEG `data`, opened as `picture`, with restart markers and its coefficients untouched.

    None if it cannot stay as it is: Pillow then judges it, as without --lossless.
    """
    mcu = 8 * max(layer[1] for layer in picture.layer) if len(picture.layer) > 1 else 8  # pixels
    # Near 64 pixels: shorter intervals cost file size (24: 2 %), longer ones speed (168: 5 %).
    mcus = -(-picture.width // mcu)
    divisors = [k for k in range(1, mcus + 1) if mcus % k == 0]
    interval = min(divisors, key=lambda k: max(k * mcu, 4096 / (k * mcu)))
    lib = bind()
    lib.tj3Init.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(lib.tj3Init(2))  # a new one each time: a fault leaves it unusable
    # It begins with libjpeg's public jpeg_compress_struct. Of its 4-byte words, 9 is global_state
    # (103: CSTATE_WRCOEFS), 18 data_precision, 20 jpeg_color_space and 70 restart_interval, which
    # TurboJPEG has no parameter for in a transform.
    fields = (ctypes.c_int * 71).from_address(handle.value)

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def set_interval():  # the transform's filter: called when all is set up and nothing written
        if (fields[9], fields[18]) != (103, 8) or fields[70] not in (0, interval):
            return -1  # not that struct
        fields[70] = interval
        return 0

    address = ctypes.cast(set_interval, ctypes.c_void_p).value
    options = 64 + 256  # TJXOPT_COPYNONE + TJXOPT_OPTIMIZE
    transform = np.array([((0,) * 4, 0, options, 0, address)], "4i4, i4, i4, u8, u8")  # tjtransform
    buffer = ctypes.c_void_p()
    size = ctypes.c_size_t()
    lib.tj3Set(handle, 0, 1)  # TJPARAM_STOPONWARNING
    failed = lib.tj3Transform(handle, data, ctypes.c_size_t(len(data)), 1, ctypes.byref(buffer),
                              ctypes.byref(size), ctypes.c_void_p(transform.ctypes.data))
    jpeg = ctypes.string_at(buffer, size.value)
    keep = not failed and max(picture.size) <= longest and fields[20] in (1, 3)  # grey or YCbCr
    lib.tj3Free(buffer)
    lib.tj3Destroy(handle)
    with contextlib.suppress(Exception):  # a turned one is turned upright and re-encoded
        keep = keep and picture.getexif().get(0x0112, 1) not in range(2, 9)
    if keep and "progressive" in picture.info:  # decoders smooth over scans that are missing
        keep = Image.open(io.BytesIO(jpeg)).tobytes() == picture.tobytes()
    return jpeg if keep else None


def seal(jpeg):
    """The JPEG with a comment behind SOI, 14 bytes in all: the crc32 of what comes after it."""
    checksum = zlib.crc32(jpeg[2:]).to_bytes(4, "big")
    return jpeg[:2] + b"\xff\xfe\x00\x0cESSL" + checksum + b"\0\0" + jpeg[2:]


def encode_sample(settings, job):
    """(JPEG, width, height, kept as it was?) of a picture, or why there is none, as a string."""
    longest = settings["max_resolution"]
    try:
        if job.path == "demo":
            picture = draw_picture(job.start, job.size)
        else:
            data = read_source(job)
            picture = Image.open(io.BytesIO(data))
            if settings["lossless"] and data[:2] == b"\xff\xd8":  # a JPEG
                jpeg = keep_jpeg(data, picture, longest)
                if jpeg:
                    return seal(jpeg), *picture.size, True
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
        return seal(jpeg), *picture.size, False
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
    kept = 0  # as they were
    bad = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(out) as file:
        results = in_order(functools.partial(encode_sample, settings), pictures, args.num_workers)
        for picture, result in zip(pictures, results):
            if isinstance(result, str):
                bad.append({"file": f"{picture.path}/{picture.name}", "reason": result})
                tqdm.write(f"{picture.path}/{picture.name}: {result}", file=sys.stderr)
            elif args.skip_bad or not bad:  # else nothing comes of it, but all bad ones are named
                jpeg, width, height, is_kept = result
                while len(jpeg) > page:
                    page *= 2  # what is placed crosses no boundary of the larger pages either
                if end // page != (end + len(jpeg) - 1) // page:
                    end = -(-end // page) * page
                samples[n] = (0, width, height, end, picture.label)
                alloc[n] = (n, end, len(jpeg))
                file.seek(end)
                file.write(jpeg)
                end += len(jpeg)
                kept += is_kept
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
        sidecar = {"classes": classes, "settings": settings, "kept": kept, "left_out": bad}
        with write_aside(out.with_suffix(".json")) as sidecar_file:  # takes its name first
            sidecar_file.write(json.dumps(sidecar, indent=1).encode())
    seconds = time.monotonic() - t0
    print(f"{out}: {n:,} images, {len(classes)} classes, {out.stat().st_size / 1e6:,.1f} MB, "
          f"{kept:,} kept, {n - kept:,} re-encoded, {len(bad):,} left out, {seconds:.1f} s "
          f"({n / seconds:,.0f} images/s)")


# --- verification
def find_fault(reader, i):
    """What is wrong with sample i of a .beton, or None."""
    try:
        jpeg = reader.read(i)
        if reader.settings and jpeg != seal(jpeg[:2] + jpeg[16:]):
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
    settings = {"essl": 1, "max_resolution": args.max_resolution, "quality": args.quality,
                "chroma": args.chroma, "codec": args.codec, "lossless": args.lossless}
    try:
        tiny = compress(Image.new("RGB", (16, 16)), 95, "420")
        if args.lossless and not (hasattr(bind(), "tj3Transform") and
                                  keep_jpeg(tiny, Image.open(io.BytesIO(tiny)), 16)):
            raise ImportError("--lossless needs libjpeg-turbo 3: `pip install turbojpeg`.")
        if args.verify:
            verify(args.verify, args.exclude_bad, args.num_workers)
        elif args.data_dir:
            pictures, classes = find_data(args.data_dir, args.labels, args.classes)
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
