"""Turns pictures into a .beton file that ESSL, and FFCV, load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --data-dir ILSVRC2012_img_train.tar --out data/train.beton --lossless
    python build_beton.py --data-dir ILSVRC2012_img_val.tar --labels LOC_val_solution.csv \\
        --classes data/train.json --out data/val_500_100.beton --quality 100
    python build_beton.py --demo              # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train.beton --exclude-bad

SOURCE is a folder of class folders or of pictures; a .tar or a folder of them (WebDataset shards,
the official tar of class tars, a tar of class folders or of pictures); a .parquet or a folder of
them. Nothing is unpacked.

--demo takes 10 s on two EPYC cores. Exit code 2: the input is bad; 1: anything else. Last line:
data/train.beton: 320 images, 5 classes, 23.8 MB, 0 left out, 3.4 s (95 images/s)
"""
import argparse
import contextlib
import ctypes
import functools
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
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from essl_loader import ALLOC, FIELD, HEADER, SAMPLE, BetonReader, load_turbojpeg, tables_checksum

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, what = p.add_argument, p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-dir", type=Path, metavar="SOURCE", help="build from this; see above")
    what.add_argument("--demo", action="store_true", help="draw a small train and val set instead")
    what.add_argument("--verify", type=Path, metavar="FILE", help="check every byte of a .beton")
    add("--exclude-bad", action="store_true",
        help="with --verify: note damaged samples in the .json, so that loaders leave them out")
    add("--out", type=Path, help="the .beton to write; a .json with the class names goes beside it")
    add("--out-dir", type=Path, default=Path("data"), help="folder for --demo (default: data)")
    add("--labels", type=Path, metavar="FILE",
        help="labels of pictures without class folders: Kaggle's LOC_val_solution.csv, the "
             "devkit .tar.gz, or a text file, one number or class name a line, in the order of the "
             "sorted file names")
    add("--classes", type=Path, metavar="FILE", help="number classes as in the .json of this build")
    add("--lossless", action="store_true", help="keep JPEGs within --max-resolution as they are")
    add("--max-resolution", type=int, default=500, help="longest side in pixels (default: 500)")
    add("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (default: 95)")
    add("--chroma", choices=("420", "444"), default="420", help="chroma sampling (default: 420)")
    add("--codec", choices=("turbojpeg", "pil"), default="turbojpeg",
        help="turbojpeg shrinks by area, as FFCV does; pil by bicubic (default: turbojpeg)")
    add("--num-workers", type=int, default=0, help="processes; 0: all usable cores (default: 0)")
    add("--skip-bad", action="store_true", help="leave unreadable pictures out, do not fail")
    add("--limit", type=int, default=0, help="build only so many pictures; 0: all (default: 0)")
    args = p.parse_args([re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word)
                         for word in (sys.argv[1:] if argv is None else argv)])
    if args.data_dir and (args.out is None or args.out.suffix != ".beton"):
        p.error(f"--data-dir needs --out FILE.beton, found --out {args.out}.")
    if not 1 <= args.quality <= 100 or not 1 <= args.max_resolution <= 65500:
        p.error("--quality goes from 1 to 100, --max-resolution from 1 to 65500.")
    if args.num_workers < 0 or args.limit < 0:
        p.error("--num-workers and --limit go from 0.")
    return args


# --- sources: where the pictures lie
# A picture is `size` bytes from byte `start` on of the file `path`; all of the file `name` in the
# folder `path` if size is -1; row `size` of row group `start` of a parquet file.
Picture = namedtuple("Picture", "path name start size label")


def title(picture):
    """What a person finds a picture by, for example train.tar/n01440764/n01440764_18.JPEG."""
    return os.path.join(picture.path, picture.name)


def find_in_folder(folder, above=()):
    """Paths of the picture files below a folder; a link to a folder above it is passed over."""
    paths, above = [], (*above, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if not os.path.isdir(entry):
            paths += [entry.path] * entry.name.lower().endswith(PICTURES)
        elif os.path.realpath(entry) not in above:
            paths += find_in_folder(entry.path, above)
    return paths


def find_in_tar(file, end, folder, labels):
    """Yields the pictures of the tar that starts where `file` stands, and of tars in it.

    Puts the labels of WebDataset's KEY.cls and KEY.json into labels[KEY]. Raises TarError where
    it is damaged or cut short, which tarfile alone may take for the end.
    """
    tar = tarfile.TarFile(fileobj=file)
    for member in tar:
        tar.members.clear()  # else it keeps 1 kB for each
        start, size = member.offset_data, member.size
        key, suffix = os.path.splitext(os.path.normpath(folder + member.name))
        if start + size > end:
            raise tarfile.ReadError(f"{member.name} ends beyond it")
        if suffix.lower() in PICTURES and not member.isdir():
            yield Picture(file.name, key + suffix, start, size, None)
        if suffix in (".tar", ".cls", ".json"):
            file.seek(start)
        if suffix == ".tar":
            yield from find_in_tar(file, start + size, key + "/", labels)
        try:
            if suffix == ".cls":
                labels[key] = int(file.read(size))
            elif suffix == ".json":
                labels.setdefault(key, json.loads(file.read(size)).get("label"))
        except (ValueError, AttributeError):
            raise ValueError(f"{member.name} is no number (.cls) or object (.json)") from None
    file.seek(tar.offset)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"neither a file nor the end at byte {tar.offset:,}")


def find_in_parquet(path):
    """(pictures, class names if Hugging Face's metadata have them) of a parquet file."""
    from pyarrow import parquet
    file, pictures = parquet.ParquetFile(path), []
    schema = file.schema_arrow
    if not {"image", "label"} <= set(schema.names):
        raise ValueError(f"expected columns image and label, found {', '.join(schema.names)}")
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))
    names = metadata.get("info", {}).get("features", {}).get("label", {}).get("names")
    named = dict(enumerate(names or []))
    for group in range(file.num_row_groups):
        labels = file.read_row_group(group, ["label"]).column("label").to_pylist()
        pictures += [Picture(str(path), f"row {row} of group {group}", group, row,
                             named.get(label, label))
                     for row, label in enumerate(labels)]
    return pictures, names


def read_labels(path, names):
    """The labels in a file of --labels, of pictures with these file names, which are sorted."""
    if path.suffix == ".csv":  # Kaggle's lines: name, comma, class and boxes
        rows = [re.split("[, ]", line) for line in path.read_text().splitlines()]
        classes = {row[0]: row[1] for row in rows if len(row) > 1}
        return [classes.get(Path(name).stem) for name in names]
    if path.name.endswith(".tar.gz"):  # the devkit, whose ids do not follow the order of the names
        from scipy.io import loadmat
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: tar.extractfile(member) for member in tar}
            synsets = loadmat(files["meta.mat"], squeeze_me=True)["synsets"]
            ids = files["ILSVRC2012_validation_ground_truth.txt"].read().split()
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
        labels = [leaves[int(number)] for number in ids]
    else:
        labels = path.read_text().strip().splitlines()
        if all(label.isdigit() for label in labels):
            labels = [int(label) for label in labels]
    if len(labels) != len(names):
        raise ValueError(f"it has {len(labels):,} labels for {len(names):,} pictures")
    return labels


def find_packed(paths):
    """(pictures, class names or None) of tar or parquet files; label None where they have none."""
    pictures, names = [], None
    for path in paths:
        labels = {}
        try:
            if path.suffix == ".parquet":
                found, names = find_in_parquet(path)
            else:
                with open(path, "rb") as file:
                    found = find_in_tar(file, path.stat().st_size, "", labels)
                    found = list(tqdm(found, str(path), unit=" pictures", disable=None))
            if labels or path.suffix == ".tar" and len(paths) > 1:  # WebDataset shards
                keys = [os.path.splitext(picture.name)[0] for picture in found]
                bare = [key for key in keys if not isinstance(labels.get(key), (int, str))]
                if bare:
                    raise ValueError(f"{bare[0]} has no .cls, nor a .json with a label")
                found = [p._replace(label=labels[key]) for p, key in zip(found, keys)]
        except ModuleNotFoundError:
            raise
        except tarfile.TarError as error:
            raise ValueError(f"{path}: {error}: damaged, cut short or compressed.") from error
        except Exception as error:  # pyarrow raises anything on a damaged file
            raise ValueError(f"{path}: {error}.") from error
        pictures += found
    return pictures, names


def find_data(source, labels_file, classes_file):
    """(pictures with labels 0 to C - 1, C class names) of --data-dir. ValueError if it is bad."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    packed = [path for path in files if path.suffix in (".tar", ".parquet")]
    classes, kind = None, "folder"
    if packed:
        pictures, classes = find_packed(packed)
        kind = packed[0].suffix[1:]
    else:
        paths = find_in_folder(source)
        pictures = [Picture(str(source), os.path.relpath(path, source), 0, -1, None)
                    for path in paths]
        empty = ({path.name for path in files if os.path.isdir(path)}
                 - {picture.name.partition("/")[0] for picture in pictures})
        if empty:
            raise ValueError(f"{source / min(empty)} holds no picture: remove it.")
    if not pictures:
        raise ValueError(f"{source} holds no picture ({' '.join(PICTURES)}), .tar or .parquet.")
    flat = False
    if pictures[0].label is not None:
        kind = kind.replace("tar", "WebDataset shards")
    else:  # in ImageFolder's order; a tar's names may all begin with ILSVRC/Data/CLS-LOC/train
        folders = [os.path.dirname(picture.name) for picture in pictures]
        top = os.path.commonpath(folders) if packed else ""
        names = [sys.intern(folder[len(top):].strip("/").partition("/")[0]) for folder in folders]
        flat = not any(names)
        if flat:
            names = [os.path.basename(top) or source.resolve().name] * len(names)
        pictures = [p._replace(label=name) for p, name in zip(pictures, names) if name]
        pictures.sort(key=lambda p: (p.label, os.path.split(p.name)))
        kind = f"flat {kind}" if flat else f"class folders in a {kind}"
    if labels_file:
        if not flat:
            raise ValueError(f"{source} has labels of its own: leave --labels out.")
        try:
            labels = read_labels(labels_file, [picture.name for picture in pictures])
        except ModuleNotFoundError:
            raise
        except Exception as error:  # scipy raises anything on a damaged file
            raise ValueError(f"{labels_file}: {error}. See --help for what it may be.") from error
        pictures = [p._replace(label=label) for p, label in zip(pictures, labels)]
    if classes_file:
        classes = read_sidecar(classes_file)["classes"]
        if not classes:
            raise ValueError(f"{classes_file} has no class names: leave --classes out.")
    labels = {picture.label for picture in pictures}
    if all(isinstance(label, int) for label in labels):
        classes = classes or [str(number) for number in range(min(max(labels), 99_999) + 1)]
        number_of = {number: number for number in range(len(classes))}
    else:
        classes = classes or sorted(label for label in labels if isinstance(label, str))
        number_of = {name: number for number, name in enumerate(classes)}
    for picture in pictures:
        if picture.label not in number_of:
            raise ValueError(f"{title(picture)} has the label {picture.label!r}, which is none of "
                             f"the {len(classes):,} classes. Mend it, --labels or --classes.")
    if not flat and {"train", "val", "test"} & {name.lower() for name in classes}:
        print(f"warning: {', '.join(sorted(classes)[:4])}: is --data-dir one level too high?",
              file=sys.stderr)
    print(f"found: {len(pictures):,} pictures in {len(classes):,} classes, {kind}", flush=True)
    return [p._replace(label=number_of[p.label]) for p in pictures], classes


# --- pictures: read or drawn
@functools.lru_cache(1)
def read_row_group(path, group):
    """The picture column of a parquet file's row group."""
    from pyarrow import parquet
    file = parquet.ParquetFile(path)
    return file.read_row_group(group, ["image"], use_threads=False).column("image")


def read_source(picture):
    """A picture's bytes."""
    path, _, start, size, _ = picture
    if path.endswith(".parquet"):
        value = read_row_group(path, start)[size].as_py()
        return value["bytes"] if isinstance(value, dict) else value  # Hugging Face's is a struct
    path = title(picture) if size == -1 else path
    if not os.path.isfile(path):
        raise ValueError("not a file")  # a link to nothing, or a pipe: reading that would hang
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def to_rgb(picture):
    """An opened picture, upright, in RGB; drops alpha and later frames, as ImageFolder does."""
    picture.load()
    with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF; pixels are good
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] in "IF":  # 16-bit grey, which convert() would clip at 255
        levels = np.asarray(picture).astype(np.int64)
        if picture.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixels of mode {picture.mode} beyond 16 bits: convert it to 8 bits")
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")


SHAPES = {  # z: (h, w) positions in the complex plane, the shape about 1 in radius
    "disc": lambda z: abs(z) < 0.9,
    "ring": lambda z: abs(abs(z) - 0.75) < 0.25,
    "square": lambda z: np.maximum(abs(z.real), abs(z.imag)) < 0.8,
    "cross": lambda z: ((np.minimum(abs(z.real), abs(z.imag)) < 0.3)
                        & (np.maximum(abs(z.real), abs(z.imag)) < 1)),
    "triangle": lambda z: np.max([(z * np.exp(2j * np.pi * k / 3)).imag for k in range(3)],
                                 axis=0) < 0.55}
COLOURS = {"red": (220, 50, 40), "yellow": (230, 200, 50), "green": (60, 180, 70),
           "blue": (50, 100, 225), "purple": (170, 70, 200)}
# Five plain and five striped classes: each shape and each colour occurs once among either.
DEMO_CLASSES = [f"{list(COLOURS)[(k + 2 * (k // 5)) % 5]}_{list(SHAPES)[k % 5]}" for k in range(10)]


def draw_picture(split, index):
    """A large shape of class index % 10 on shaded ground, 96 to 160 pixels a side."""
    rng = np.random.default_rng((split, index))
    label = index % len(DEMO_CLASSES)
    colour, shape = DEMO_CLASSES[label].split("_")
    w, h = 2 * rng.integers(96, 161, 2)  # drawn at twice the size, for smooth edges
    radius = min(w, h) * rng.uniform(0.32, 0.45)
    z = (np.arange(w) - w / 2 + 1j * (np.arange(h)[:, None] - h / 2)) / radius  # (h, w)
    light, lines, tilt = np.exp(2j * np.pi * rng.uniform([0, 0, -0.04], [1, 1, 0.04]))  # directions
    shade = np.clip((z * light).real / 4 + 0.5, 0, 1)[..., None]  # (h, w, 1)
    pixels = rng.uniform(30, 100, 3) * (1 - shade) + rng.uniform(140, 220, 3) * shade  # (h, w, 3)
    fill = COLOURS[colour] + rng.uniform(-25, 25, 3)
    stripes = np.where(np.sin((z * lines).real * 11) > 0, 1, 0.4 if label >= 5 else 1)  # (h, w)
    inside = SHAPES[shape]((z + complex(*rng.uniform(-0.1, 0.1, 2))) * tilt)
    pixels[inside] = fill * stripes[inside, None]
    return Image.fromarray(pixels.astype(np.uint8)).reduce(2)


# --- encoding, in the worker processes
def divisors(mcus):
    """What a row of so many MCUs can be cut into, so that restart markers line up in columns."""
    return [k for k in range(1, mcus + 1) if mcus % k == 0]


@functools.cache
def load_turbo():
    """(libjpeg-turbo, a compressor of it). Raises ImportError if its version 3 is absent."""
    lib = load_turbojpeg()
    if not hasattr(lib, "tj3Transform"):
        raise ImportError("libjpeg-turbo 2 cannot write restart markers: `pip install turbojpeg` "
                          "brings version 3, or use --codec pil.")
    lib.tj3Init.restype = ctypes.c_void_p
    lib.tj3GetErrorStr.restype = ctypes.c_char_p
    return lib, ctypes.c_void_p(lib.tj3Init(0))


def take_jpeg(failed, handle, buffer, size):
    """The bytes of a JPEG that libjpeg-turbo allocated, then freed. ValueError if it failed."""
    lib, _ = load_turbo()
    jpeg = ctypes.string_at(buffer, size.value)
    lib.tj3Free(buffer)
    if failed:
        raise ValueError(lib.tj3GetErrorStr(handle).decode())
    return jpeg


def compress(picture, codec, quality, chroma):
    """An RGB image as baseline JPEG bytes with optimised Huffman tables and restart markers."""
    mcus = -(-picture.width // (16 if chroma == "420" else 8))
    interval = min(divisors(mcus), key=lambda k: (max(3 - k, k - 4, 0), -k))  # 3 or 4, if possible
    if codec == "pil":
        buffer = io.BytesIO()
        picture.info.clear()  # save() would copy the comment of the file that was read
        picture.save(buffer, "JPEG", quality=quality, subsampling=":".join(chroma), optimize=True,
                     restart_marker_blocks=interval)
        return buffer.getvalue()
    lib, handle = load_turbo()
    for parameter, value in (3, quality), (4, 2 if chroma == "420" else 0), (11, 1), (18, interval):
        lib.tj3Set(handle, parameter, value)  # TJPARAM_QUALITY, _SUBSAMP, _OPTIMIZE, _RESTARTBLOCKS
    buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
    failed = lib.tj3Compress8(handle, picture.tobytes(), picture.width, 0, picture.height, 0,
                              ctypes.byref(buffer), ctypes.byref(size))  # 0: packed; 0: TJPF_RGB
    return take_jpeg(failed, handle, buffer, size)


def keep_jpeg(data, picture, longest):
    """The JPEG `data`, opened as `picture`, with restart markers and its coefficients untouched.

    None if it is no JPEG or cannot stay as it is. ValueError if libjpeg-turbo warns of anything, as
    it does where data are damaged.
    """
    if data[:2] != b"\xff\xd8":
        return None
    keep = max(picture.size) <= longest
    with contextlib.suppress(Exception):  # as in to_rgb
        keep = keep and picture.getexif().get(0x0112, 1) not in range(2, 9)  # turned by EXIF
    mcu = 8 * max(layer[1] for layer in picture.layer) if len(picture.layer) > 1 else 8  # pixels
    # Near 64 pixels: shorter intervals cost file size (24: 2 %), longer ones speed (168: 5 %).
    interval = min(divisors(-(-picture.width // mcu)), key=lambda k: max(k * mcu, 4096 / (k * mcu)))
    lib, _ = load_turbo()
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

    options = 64 + 256 if keep else 16  # TJXOPT_COPYNONE + TJXOPT_OPTIMIZE, or TJXOPT_NOOUTPUT
    address = ctypes.cast(set_interval, ctypes.c_void_p).value if keep else 0
    transform = np.array([((0,) * 4, 0, options, 0, address)], "4i4, i4, i4, u8, u8")  # tjtransform
    buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
    lib.tj3Set(handle, 0, 1)  # TJPARAM_STOPONWARNING
    failed = lib.tj3Transform(handle, data, ctypes.c_size_t(len(data)), 1, ctypes.byref(buffer),
                              ctypes.byref(size), ctypes.c_void_p(transform.ctypes.data))
    keep = keep and fields[20] in (1, 3)  # JCS_GRAYSCALE, JCS_YCbCr
    try:
        jpeg = take_jpeg(failed, handle, buffer, size)
    finally:
        lib.tj3Destroy(handle)
    if keep and "progressive" in picture.info:  # decoders smooth over scans that are missing
        keep = Image.open(io.BytesIO(jpeg)).tobytes() == picture.tobytes()
    return jpeg if keep else None


def seal(jpeg):
    """The JPEG with a comment behind SOI, 14 bytes in all: the crc32 of what comes after it."""
    checksum = zlib.crc32(jpeg[2:]).to_bytes(4, "big")
    return jpeg[:2] + b"\xff\xfe\x00\x0cESSL" + checksum + b"\0\0" + jpeg[2:]


def encode_sample(settings, job):
    """(JPEG, width, height, kept as it was?) of a picture, or why there is none, as a string."""
    codec, longest = settings["codec"], settings["max_resolution"]
    try:
        if job.path == "demo":
            picture = draw_picture(job.start, job.size)
        else:
            data = read_source(job)
            picture = Image.open(io.BytesIO(data))
            jpeg = keep_jpeg(data, picture, longest) if "lossless" in settings else None
            if jpeg:
                return seal(jpeg), *picture.size, True
            picture = to_rgb(picture)
        if max(picture.size) > longest:
            size = [max(1, round(side * longest / max(picture.size))) for side in picture.size]
            resampling = Image.Resampling.BOX if codec == "turbojpeg" else Image.Resampling.BICUBIC
            picture = picture.resize(size, resampling)
        jpeg = compress(picture, codec, settings["quality"], settings["chroma"])
        return seal(jpeg), *picture.size, False
    except Exception as error:  # Pillow raises anything on a damaged file; it is listed
        return str(error) or type(error).__name__


# --- worker processes
def in_order(work, jobs, num_workers):
    """Yields work(job) for every job, in order, from worker processes. RuntimeError if one dies."""
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(jobs))
    loader = DataLoader(jobs, 16, num_workers=workers, multiprocessing_context="fork",
                        collate_fn=lambda batch: [work(job) for job in batch])
    with tqdm(total=len(jobs), unit=" images", disable=None) as bar:  # None: on a terminal only
        try:
            for results in loader:
                yield from results
                bar.update(len(results))
        except RuntimeError as error:
            raise RuntimeError(f"a worker process died: {error} If memory ran out, use fewer "
                               "--num-workers.") from error


# --- file
@contextlib.contextmanager
def write_aside(path):
    """A file that takes its name only when it is complete and on the disk, else leaves nothing."""
    tmp_path = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


def read_sidecar(beton):
    """What is in the .json beside a .beton. Raises ValueError if that is damaged or not there."""
    path = beton.with_suffix(".json")
    try:
        return {"classes": None} | json.loads(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the .json of a .beton: {error}.") from error


def write_sidecar(beton, sidecar):
    with write_aside(beton.with_suffix(".json")) as file:
        file.write(json.dumps(sidecar, indent=1).encode())


def print_faults(faults):
    for name, reason in faults[:20]:
        print(f"{name}: {reason}", file=sys.stderr)
    if len(faults) > 20:
        print(f"... and {len(faults) - 20:,} more", file=sys.stderr)


def write_beton(out, pictures, classes, settings, args):
    """Encodes pictures into `out` and its .json. ValueError if one is bad (--skip-bad: all)."""
    t0, page, bad = time.monotonic(), 8 << 20, []  # FFCV's default page size
    samples, alloc = np.zeros(len(pictures), SAMPLE), np.zeros(len(pictures), ALLOC)
    n, kept, end = 0, 0, HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(out) as file:
        results = in_order(functools.partial(encode_sample, settings), pictures, args.num_workers)
        for picture, result in zip(pictures, results):
            if isinstance(result, str):
                bad.append((title(picture), result))
            elif args.skip_bad or not bad:  # else nothing comes of it, but all bad ones are named
                jpeg, width, height, is_kept = result
                while len(jpeg) > page:
                    page *= 2  # what is placed crosses no boundary of the larger pages either
                if end // page != (end + len(jpeg) - 1) // page:
                    end = -(-end // page) * page
                samples[n], alloc[n] = (0, width, height, end, picture.label), (n, end, len(jpeg))
                file.seek(end)
                file.write(jpeg)
                n, end, kept = n + 1, end + len(jpeg), kept + is_kept
        print_faults(bad)
        if bad and not (args.skip_bad and n):
            raise ValueError(f"{len(bad):,} of {len(pictures):,} pictures are bad, see above. "
                             f"{out} was not written: repair or remove them, or use --skip-bad.")
        samples, alloc = samples[:n], alloc[:n]
        header = np.array((2, 2, page, n, end), HEADER)
        settings = settings | {"checksum": tables_checksum(header, settings, samples, alloc)}
        fields = np.array([(2, b"image", json.dumps(settings).encode()), (1, b"label", b"")], FIELD)
        file.seek(end)
        file.write(alloc.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        write_sidecar(out, {"classes": classes, "num_samples": n, "kept": kept,
                            "re_encoded": n - kept, "settings": settings,
                            "left_out": [{"file": name, "reason": reason} for name, reason in bad]})
    seconds, size = time.monotonic() - t0, out.stat().st_size / 1e6
    lossless = f"{kept:,} kept, {n - kept:,} re-encoded, " if "lossless" in settings else ""
    print(f"{out}: {n:,} images, {len(classes)} classes, {size:,.1f} MB, {lossless}{len(bad):,} "
          f"left out, {seconds:.1f} s ({len(pictures) / seconds:,.0f} images/s)")


# --- verification
open_reader = functools.cache(BetonReader)  # once per worker process


def find_fault(path, i):
    """What is wrong with sample i of a .beton, or None."""
    try:
        reader = open_reader(path)
        jpeg = reader.read(i)
        if reader.settings and jpeg != seal(jpeg[:2] + jpeg[16:]):
            return "its bytes do not match their checksum"
        reader.image(i)
    except (OSError, ValueError) as error:
        return str(error)


def verify(path, exclude_bad, num_workers):
    """Checks header, tables, checksums and every sample of a .beton; exits with 1 at damage."""
    t0, reader = time.monotonic(), BetonReader(path)
    sidecar = read_sidecar(path) if path.with_suffix(".json").exists() else {"classes": None}
    found = in_order(functools.partial(find_fault, path), range(reader.num_samples), num_workers)
    faults = {str(i): fault for i, fault in enumerate(found) if fault}
    if exclude_bad:
        write_sidecar(path, sidecar | {"excluded": faults})
        print_faults([(f"sample {i}, excluded", fault) for i, fault in faults.items()])
    else:
        excluded = sidecar.get("excluded", {})
        faults = [(f"sample {i}", fault) for i, fault in faults.items() if i not in excluded]
        print_faults(faults)
        if faults:
            raise SystemExit(f"build_beton: {path}: {len(faults):,} of {reader.num_samples:,} are "
                             "damaged, as listed. Copy it again, or let loaders leave them out: "
                             f"`python build_beton.py --verify {path} --exclude-bad`.")
        faults = excluded
    decoded = "" if reader.settings else " (a file of FFCV: decoded only, it has no checksums)"
    print(f"{path}: {reader.num_samples:,} samples verified{decoded}, {len(faults):,} excluded, "
          f"{time.monotonic() - t0:.1f} s")


def main(args):
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.default_int_handler)  # as for Ctrl-C: workers just end
    warnings.simplefilter("ignore")  # Pillow's, on EXIF and palettes that it can live with
    settings = {"essl": 1, "max_resolution": args.max_resolution, "quality": args.quality,
                "chroma": args.chroma, "codec": args.codec, "restart": 1}
    if args.lossless:
        settings["lossless"] = True
    try:
        if args.verify:
            return verify(args.verify, args.exclude_bad, args.num_workers)
        if args.codec == "turbojpeg" or args.lossless:
            load_turbo()  # if it is missing, one error here instead of one per picture
        if args.data_dir:
            pictures, classes = find_data(args.data_dir, args.labels, args.classes)
            count = min(args.limit or len(pictures), len(pictures))
            pictures = [pictures[i * len(pictures) // count] for i in range(count)]
            return write_beton(args.out, pictures, classes, settings, args)
        for split, (name, size) in enumerate((("train", 1000), ("val", 200))):
            size = min(size, args.limit or size)
            pictures = [Picture("demo", str(i), split, i, i % 10) for i in range(size)]
            write_beton(args.out_dir / f"demo_{name}.beton", pictures, DEMO_CLASSES, settings, args)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"build_beton: {str(error).rstrip('.')}.", file=sys.stderr)
        sys.exit(1 if args.verify else 2)
    except ModuleNotFoundError as error:
        raise SystemExit(f"build_beton: {error}: pip install {error.name}.") from error
    except (OSError, ImportError, RuntimeError) as error:
        advice = " Check that path, its permissions and the space left there."
        raise SystemExit(f"build_beton: {str(error).rstrip('.')}."
                         f"{advice * isinstance(error, OSError)}") from error
    except KeyboardInterrupt:
        raise SystemExit("build_beton: stopped by a signal, nothing was written.") from None


if __name__ == "__main__":
    main(get_args())
