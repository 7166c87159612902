"""Turns pictures into a .beton file that ESSL, and FFCV, load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --demo              # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train.beton --exclude-bad

SOURCE is a folder of class folders, of class tars or of pictures; a .tar of any of these; a
WebDataset .tar, a .parquet, a folder of these or a pattern for them ("parquet/train-*.parquet", in
quotes); or a .beton, of FFCV's too: its samples are copied as they are and get the index by which
the loader finds a crop. Nothing is unpacked. Every file and label is taken, or counted and named in
the second line; pictures without any label get -1. Beside FILE.beton come FILE.beton.json (class
names, settings) and FILE.beton.names (each picture's path in its source).

--demo takes 10 s on two EPYC cores. Exit code 2: the input is bad; 1: anything else. First and last
lines:
found: class folders: 320 pictures in 5 classes (daisy, dandelion, ... tulips)
not taken: nothing
x.beton: 320 images, 5 classes, 24.2 MB, 320 re-encoded, 0 left out, 0 not taken, 1.2 s \
(259 images/s)
"""
import argparse
import codecs
import contextlib
import csv
import ctypes
import fcntl
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageOps
from pyarrow import parquet, types
from torch.utils.data import DataLoader
from tqdm import tqdm

from essl_loader import (ALLOC, ARCHIVES, ESSL, FIELD, HEADER, HIDDEN_FILE, LABEL_NAMES,
                         MAX_CLASSES, MAX_PIXELS, NAMES_HEADER, NAMES_MAGIC, OK, OTHER_ENDING,
                         SAMPLE, SETS, SPECIAL_FILE, SYSTEM_FOLDERS, BetonReader, DataError,
                         NotTaken, add_index, bind, check_shared_memory, decode_jpeg,
                         end_with_parent, ending_of, folder_classes, folder_order, is_hidden,
                         is_intact, is_sidecar, list_folder, names_of, one_name, picture_endings,
                         remove_index, sidecar_of, tables_checksum, usable_cores)

JPEG = 0  # a sample's mode in the file; the other one is raw RGB
COMMON_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif")  # picture_endings has all
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")  # parquet columns
FILE_NAMES = ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "img",
              "image_name", "image_path", "img_path", "image_id", "imageid", "picture", "photo",
              "name", "id", "key")  # of columns that hold file names in a file of labels
INDEX_NAMES = ("", "unnamed: 0", "index")  # of columns that count the lines
# Reasons why something is not taken, for one and for several; more are in essl_loader
IN_HIDDEN_FOLDER = ("file in a hidden folder", "files in hidden folders")
LABEL_ALONE = ("label without a picture", "labels without a picture")
LINE_ALONE = ("label of a picture that is not there", "labels of pictures that are not there")
OTHER_LABEL = ("label of the source, where --labels counts", "labels of the source, where --labels "
               "counts")
TABLE = ("table without pictures", "tables without pictures")
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
    what.add_argument("--data-dir", type=Path, nargs="+", metavar="SOURCE",
                      help="build from this; see above")
    what.add_argument("--demo", action="store_true", help="draw a small train and val set instead")
    what.add_argument("--verify", type=Path, metavar="FILE", help="check every byte of a .beton")
    add("--exclude-bad", action="store_true", help="with --verify: loaders leave bad samples out")
    add("--out", type=Path, help="the .beton to write; two files about it go beside it")
    add("--out-dir", type=Path, default=Path("data"), help="folder for --demo (default: data)")
    add("--labels", type=Path, metavar="FILE",
        help="a text or csv file of file names and classes: one-hot and Kaggle's boxes too")
    add("--classes", type=Path, metavar="FILE", help="number classes as this .beton does")
    add("--unlabelled", action="store_true", help="take no labels: all get -1")
    add("--columns", nargs=2, metavar=("IMAGE", "LABEL"),
        help="of a .parquet (default: by type and known names)")
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
    if args.data_dir and len(args.data_dir) > 1:
        p.error("--data-dir takes one SOURCE. Put a pattern in quotes, else the shell puts many "
                'files in its place: --data-dir "parquet/train-*.parquet".')
    args.data_dir = args.data_dir[0] if args.data_dir else None
    if args.unlabelled and (args.labels or args.classes):
        p.error("--unlabelled takes no labels: leave out --labels and --classes.")
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
# Each kind of picture has a path (of the folder or file that it is in), a name there, a label, and
# read(), its bytes. label: a number, a class's name, None if it has none; at last -1 for none.
class FilePicture(NamedTuple):
    """A file of its own in the folder `path`."""

    path: str
    name: str
    label: int | str | None

    def read(self):
        file = os.path.join(self.path, self.name)
        try:
            return Path(file).read_bytes()
        except FileNotFoundError:
            if os.path.islink(file):  # not a disk's fault: --skip-bad leaves it out
                raise DataError(f"a broken link, to {os.readlink(file)}") from None
            raise


class MemberPicture(NamedTuple):
    """`size` bytes from byte `start` on of the tar `path`."""

    path: str
    name: str
    label: int | str | None
    start: int
    size: int

    def read(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class RowPicture(NamedTuple):
    """A row of a row group of the parquet file `path`."""

    path: str
    name: str
    label: int | str | None
    group: int
    row: int
    column: str

    def read(self):
        value = read_row_group(self.path, self.group, self.column)[self.row].as_py()
        if isinstance(value, dict):  # Hugging Face's is a struct
            value = value["bytes"]
        if value is None:
            raise DataError("this row holds no bytes of a picture")
        return value


class MissingPicture(NamedTuple):
    """A name without a picture, which the build reports as it does a damaged one."""

    path: str
    name: str
    label: int | str | None
    reason: str

    def read(self):
        raise DataError(self.reason)


class SamplePicture(NamedTuple):
    """Sample `index` of the .beton `path`, which is copied without being decoded."""

    path: str
    name: str
    label: int | str | None
    index: int


class DrawnPicture(NamedTuple):
    """A picture of the demo."""

    path: str
    name: str
    label: int
    split: int
    index: int


@functools.lru_cache(1)
def read_row_group(path, group, column):
    """The picture column of a parquet file's row group."""
    return parquet.ParquetFile(path).read_row_group(group, [column], use_threads=False)[column]


# --- sources: one function for each layout
def find_in_folder(root, names):
    """Yields the pictures `names` of a folder. Labels: none yet, see folder_classes."""
    for name in names:
        yield FilePicture(str(root), name, None)


def parse_label(value):
    """A label as a number, a class's name or None (no value, no text, -1). Else DataError."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"the label {value!r} is not in UTF-8") from None
    if isinstance(value, str):
        value = one_name(value.strip())
        if value.isascii() and value.isdecimal():  # most of millions
            return int(value)
        whole = re.fullmatch(r"([+-]?\d+)(\.0*)?", value)
        if re.fullmatch(r"[+-]?\d+([\s,;]+[+-]?\d+)+", value):
            raise DataError(f"the label {value!r} is several numbers: a picture has one class")
        if re.fullmatch(r"[+-]?\d*\.\d+", value) and not whole:
            raise DataError(f"the label {value!r} is a number that is not whole")
        if not whole:
            return value or None
        value = int(whole[1])
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise DataError(f"the label {value!r} is a number that is not whole")
    elif value is not None and not isinstance(value, int):
        raise DataError(f"the label {value!r} is a {type(value).__name__}, not a number or a name: "
                        "a picture has one class")
    if value is None or value == -1:
        return None
    if value < 0:
        raise DataError(f"the label {value!r} is negative: classes count from 0, -1 means none")
    return int(value)


def find_label_in_json(data):
    """The label in WebDataset's KEY.json: the first of LABEL_NAMES, or None."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON ({error})") from None
    for name in LABEL_NAMES:
        if isinstance(content, dict) and name in content:
            return parse_label(content[name])
    return None


AMBIGUOUS = object()  # in the place of a label
LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json; a larger one describes more than a picture


class MemberLabels:
    """The labels in a tar: KEY.cls, or the label in KEY.json, is that of KEY.jpg.

    A key ends at the last dot, so that a.1.cls belongs to a.1.jpg. Where there is none for it, it
    ends at the first dot of the base name, as in WebDataset: K.cls belongs to K.image.jpg, and
    K.target.cls to K.jpg. KEY.cls goes before KEY.json.
    """

    def __init__(self):
        self.by_ending = {".cls": {}, ".json": {}}  # {key to the last dot: label}
        self.short = {}  # {key to the first dot: label}, of labels whose key to the last is longer
        self.used = set()

    @staticmethod
    def first_dot(key):
        """A key up to the first dot of its base name."""
        dot = key.find(".", key.rfind("/") + 1)
        return key if dot < 0 else key[:dot]

    def add(self, name, ending, label):
        """Of the file `name`, which ends in .cls or .json: a label, or what is wrong with it."""
        key = name[:-len(ending)]
        if self.by_ending[ending].setdefault(key, label) != label:
            raise DataError(f"{name} is there twice, with two labels")
        short = self.first_dot(key)
        if short != key and self.short.setdefault(short, label) != label:
            self.short[short] = AMBIGUOUS  # said where a picture needs it

    def find(self, name):
        """The label of the picture `name`, or None. DataError if it is none, or one of two."""
        key = name[:name.rindex(".")]
        short = self.first_dot(key)
        for labels in self.by_ending.values():
            for known in (key, short):
                if known in labels:
                    self.used.add(known)
                    if isinstance(labels[known], DataError):
                        raise labels[known]
                    return labels[known]
        if short != key or short not in self.short:  # a.2.jpg does not take the label of a.1.cls
            return None
        self.used.add(short)
        if self.short[short] is AMBIGUOUS:
            raise DataError(f"{name} has two labels, in files {short}.*.cls")
        return self.short[short]

    def count_unused(self, not_taken):
        if len(self.used) == sum(map(len, self.by_ending.values())):
            return
        for ending, labels in self.by_ending.items():
            for key in labels:
                if key in self.used or self.first_dot(key) in self.used:
                    continue
                if isinstance(labels[key], DataError):  # a .json of another kind
                    not_taken.add(OTHER_ENDING, ending)
                else:
                    not_taken.add(LABEL_ALONE, key + ending)


def find_in_tar(file, path, with_labels, not_taken, start=0, folder=""):
    """Yields the pictures of the tar `file`, which begins at byte `start` of `path`.

    Tars in it are read as folders of their names, tars that follow it in the file (as cat joins
    them) as more of it. ImageNet's n01440764.tar, whose members are called n01440764_*, is a folder
    of its name. Hard and symbolic links count as what they lead to. Labels: see MemberLabels.
    Raises TarError where the tar is damaged or cut short, which tarfile takes for the end.
    """
    endings = picture_endings()
    prefix = f"{path.stem}_"

    def titled(name):
        """A member's name, in a folder where the tar is a class."""
        return f"{path.stem}/{name}" if name.startswith(prefix) and not folder else name
    end = 0
    while end is not None:
        file.seek(end)
        tar = tarfile.TarFile(fileobj=file)
        pictures = []
        links = {}  # name of a picture: where its link leads
        labels = MemberLabels()
        for member in tqdm(tar, folder or str(path), unit=" files", leave=False, disable=None):
            tar.members.clear()  # else it keeps 1 kB for each
            name = titled(member_name(folder + member.name))
            ending = ending_of(name)
            begin = member.offset_data
            hidden = hidden_part(name)
            if member.isdir():
                if not hidden:
                    not_taken.folders.add(name)
            elif hidden == name:
                not_taken.add(HIDDEN_FILE, name, pictures=ending in endings)
            elif hidden:
                not_taken.add(IN_HIDDEN_FOLDER, hidden, pictures=ending in endings)
            elif ending in endings and (member.islnk() or member.issym()):
                near = os.path.dirname(folder + member.name) if member.issym() else folder
                links[name] = titled(member_name(os.path.join(near, member.linkname)))
            elif ending in endings and member.issparse():
                pictures.append(MissingPicture(str(path), name, None, "is stored as a sparse file"))
            elif not member.isreg():
                not_taken.add(SPECIAL_FILE, name, pictures=ending in endings)
            elif ending in endings:
                pictures.append(MemberPicture(str(path), name, None, start + begin, member.size))
            elif ending == ".tar":
                inner = tar.extractfile(member)
                inner_folder = os.path.splitext(name)[0] + "/"
                pictures += find_in_tar(inner, path, with_labels, not_taken, start + begin,
                                        inner_folder)
            else:
                label = None
                if with_labels and ending in labels.by_ending and member.size < LARGEST_LABEL:
                    file.seek(begin)
                    label = read_member_label(name, ending, file.read(member.size))
                if label is None:
                    not_taken.folders.add(os.path.dirname(name))
                    not_taken.add(OTHER_ENDING, ending or "no ending")
                else:
                    labels.add(name, ending, label)
        if links:
            places = find_places(file, end, lambda name: titled(member_name(folder + name)), links)
            for name, place in places.items():
                if place:
                    begin, size = place
                    pictures.append(MemberPicture(str(path), name, None, start + begin, size))
                else:
                    reason = f"a broken link, to {links[name]}"
                    pictures.append(MissingPicture(str(path), name, None, reason))
        if any(labels.by_ending.values()):
            for i, picture in enumerate(pictures):
                if picture.label is None:
                    pictures[i] = picture._replace(label=labels.find(picture.name))
            labels.count_unused(not_taken)
        yield from pictures
        end = find_next_tar(file, tar.offset, start)


def member_name(name):
    """A member's path, relative also where it is absolute or leads out of the tar."""
    name = os.path.normpath(name).lstrip("/")
    while name.startswith("../"):
        name = name[3:]
    return name


def hidden_part(name):
    """A member's path up to what is hidden in it, or ""."""
    if not (name.startswith(".") or "/." in name or any(map(name.__contains__, SYSTEM_FOLDERS))):
        return ""  # at once, for millions of members
    parts = name.split("/")
    for i, part in enumerate(parts):
        if is_hidden(part):
            return "/".join(parts[:i + 1])
    return ""


def read_member_label(name, ending, data):
    """The label in a member KEY.cls or KEY.json, None, or a DataError that names it."""
    try:
        return parse_label(data) if ending == ".cls" else find_label_in_json(data)
    except DataError as error:
        return DataError(f"{name}: {error}. Mend it, or add --unlabelled")


def find_places(file, begin, named, links):
    """{name: (start, size) in the file, or None} of what links {name: target} in a tar lead to.

    A second pass over the tar that begins at byte `begin`. named(member's name) is as in links.
    """
    targets = {}
    for name, target in links.items():
        for _ in range(40):  # a link may lead to a link, as many as Linux follows
            target = links.get(target, target)
        targets[name] = target
    wanted = set(targets.values())
    places = {}
    file.seek(begin)
    tar = tarfile.TarFile(fileobj=file)
    for member in tar:
        tar.members.clear()
        name = named(member.name)
        if name in wanted and member.isreg():
            places[name] = (member.offset_data, member.size)
    return {name: places.get(target) for name, target in targets.items()}


def find_next_tar(file, offset, start):
    """Where the next tar in the file begins, behind the zeros that end this one, or None."""
    file.seek(offset)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"neither a file nor the end at byte {start + offset:,}")
    while data := file.read(1 << 20):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data):
            return file.tell() - len(data) + zeros // 512 * 512
    return None


def holds_pictures(field):
    """Whether a parquet column holds bytes, or Hugging Face's struct of bytes and path."""
    kind = field.type
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_pictures(kind.field("bytes"))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def choose_columns(schema, columns):
    """The names of a parquet file's columns of pictures and labels; None for one that it has not.

    columns: --columns, or None. Of several columns of bytes the first of IMAGE_NAMES holds the
    pictures. Labels are the first column of LABEL_NAMES, else the only one that Hugging Face's
    types call a class. DataError where that does not decide.
    """
    if columns:
        missing = set(columns) - set(schema.names)
        if missing:
            raise DataError(f"it has no column {', '.join(sorted(missing))}, only "
                            f"{', '.join(schema.names)}. Change --columns")
        if not holds_pictures(schema.field(columns[0])):
            raise DataError(f"its column {columns[0]} holds no bytes. Change --columns")
        return columns
    images = [field.name for field in schema if holds_pictures(field)]
    image = next((name for name in IMAGE_NAMES if name in images), None)
    if image is None and len(images) > 1:
        raise DataError(f"which of its columns {', '.join(images)} holds the pictures? Add "
                        "--columns IMAGE LABEL")
    if image is None and images:
        image = images[0]
    names = [name for name in schema.names if name != image]
    label = next((name for name in LABEL_NAMES if name in names), None)
    if label is None:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = info.get("features", {})
        classes = [name for name in names if isinstance(features.get(name), dict)
                   and features[name].get("_type") == "ClassLabel"]
        if len(classes) > 1:
            raise DataError(f"which of its columns {', '.join(classes)} holds the labels? Add "
                            "--columns IMAGE LABEL")
        label = classes[0] if classes else None
    return image, label


def find_in_parquet(path, columns, with_labels):
    """Yields the pictures of a parquet file, row by row, with the labels of a column.

    A picture's name is its row, and behind a slash the path that Hugging Face's struct may give.
    """
    file = parquet.ParquetFile(path)
    schema = file.schema_arrow
    image, label = choose_columns(schema, columns)
    has_paths = types.is_struct(schema.field(image).type)
    has_paths = has_paths and schema.field(image).type.get_field_index("path") >= 0
    wanted = [f"{image}.path"] if has_paths else []
    if with_labels and label:
        wanted.append(label)
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        table = file.read_row_group(group, wanted) if wanted else None
        labels = [None] * count
        paths = [None] * count
        if has_paths:
            paths = [value and value["path"] for value in table[image].to_pylist()]
        if with_labels and label:
            labels = table[label].to_pylist()
        for row in range(count):
            name = f"row {number}" + (f"/{paths[row]}" if paths[row] else "")
            number += 1
            try:
                value = parse_label(labels[row])
            except DataError as error:
                raise DataError(f"row {number - 1}, column {label}: {error}. Give another column "
                                "by --columns, or add --unlabelled") from None
            yield RowPicture(str(path), name, value, group, row, image)


@functools.lru_cache(1)
def open_beton(path):
    return BetonReader(path)


def find_in_beton(path, classes):
    """Yields the samples of a .beton, in its order. Labels are places in `classes`, if not None."""
    reader = open_beton(str(path))
    for i, number in enumerate(reader.labels.tolist()):
        name = reader.names[i] if reader.names else f"sample {i}"
        label = None if number == -1 else number
        if classes is not None and 0 <= number < len(classes):
            label = classes[number]
        yield SamplePicture(str(path), name, label, i)


# --- sources: which layout it is
def root_of(source):
    """Where names of pictures count from: --data-dir, of a pattern the folders before it."""
    if source.exists():
        return source
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), source.parts))


def list_source(source, not_taken):
    """(pictures, archives) of --data-dir, as paths from its folder.

    A source is a folder, a .tar, a .parquet or a pattern such as "shards/train-*.tar" for these.
    Of what is in a folder, at any depth, list_folder says what counts.
    """
    if source.is_dir():
        return list_folder(source, not_taken)
    files = [source]
    folder = source.parent
    if not source.exists():
        files = sorted(Path(name) for name in glob.glob(str(source)))
        folder = root_of(source)
    if not files:
        raise DataError(f"{source}: there is no such file or folder.")
    archives = []
    for file in files:
        if file.is_file() and ending_of(file.name) in ARCHIVES:
            archives.append(os.path.relpath(file, folder))
        else:
            not_taken.add(OTHER_ENDING, ending_of(file.name) or "no ending")
    if not archives:
        raise DataError(f"{source}: expected a folder, or .tar or .parquet files, and found "
                        f"{not_taken}. Unpack what is compressed.")
    return [], archives


def check_one_set(root, archives):
    """Raises DataError, with patterns to give, for archives of train, val or test together."""
    of_set = {}  # "train", "val" or "test": the archives whose names hold such a word
    for name in archives:
        words = [word for word in re.findall("[a-z]+", name.lower()) if word in SETS]
        if words:
            of_set.setdefault(SETS[words[0]], []).append((name, words[0]))
    if len(of_set) < 2:
        return
    found = []
    ways = []
    for kind, names in of_set.items():
        found.append(f"{len(names):,} of {kind} ({names[0][0]})")
        patterns = {re.sub("[0-9]+", "*", name) for name, _ in names}
        if len(patterns) > 1:
            patterns = {f"*{names[0][1]}*"}
        ways.append(f'--data-dir "{root}/{patterns.pop()}"')
    raise DataError(f"{root} holds archives of several sets: {' and '.join(found)}. Build one set "
                    f"at a time: {' or '.join(ways)}.")


def keep_tables_of_pictures(root, tables, tars, columns, not_taken):
    """Those of the parquet files that hold pictures; others are counted.

    img2dataset writes 00000.parquet, the URLs, beside 00000.tar.
    """
    kept = []
    for name in tables:
        path = root / name
        image = None
        if os.path.splitext(name)[0] + ".tar" not in tars:
            with naming(path):
                image, _ = choose_columns(parquet.read_schema(path), columns)
        if image is None:
            not_taken.add(TABLE, name)
        else:
            kept.append(name)
    return kept


@contextlib.contextmanager
def naming(path):
    """Errors in a block name the archive that it reads."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    except Exception as error:  # pyarrow raises anything on a damaged file
        raise DataError(f"{path}: {error}. Is it complete, and not compressed?") from error


def find_pictures(source, columns, with_labels, not_taken, known=None):
    """(pictures, the source in words, folders that all lie in, or None if folders mean nothing).

    A label is what the source itself gives (KEY.cls, a column, a .beton's class, by its name or
    that in `known`, the classes of --classes), or None. Pictures are in
    ImageFolder's order, but those of tables, of tars with labels and of several tars without
    folders stay in theirs. DataError for a source of two kinds, or of none.
    """
    if source.suffix == ".beton" and source.is_file():
        classes = open_beton(str(source)).classes or known
        return list(find_in_beton(source, classes)), "a .beton", None
    loose, archives = list_source(source, not_taken)
    root = root_of(source)
    if source.is_file():
        root = source.parent
    archives.sort(key=Path)
    tars = [name for name in archives if ending_of(name) == ".tar"]
    tables = [name for name in archives if ending_of(name) == ".parquet"]
    tables = keep_tables_of_pictures(root, tables, tars, columns, not_taken)
    halves = [f"{len(names):,} {kind} ({min(names)})" for kind, names in (
        ("pictures", loose), (".tar", tars), (".parquet", tables)) if names]
    if len(halves) > 1:
        raise DataError(f"{source} holds {' and '.join(halves)}: which of them are the data? Move "
                        "what is not data out of it. Or, if the archives are the data, name only "
                        "them by a pattern, with its quotes: --data-dir "
                        f'"{root}/*{ending_of((tars + tables)[0])}".')
    if not halves:
        raise DataError(f"{source} holds no picture ({' '.join(COMMON_ENDINGS)} ...), no .tar and "
                        f"no .parquet with a column of bytes. Not taken: {not_taken}.")
    if loose:
        pictures = list(find_in_folder(root, loose))
        pictures.sort(key=lambda picture: folder_order(picture.name))
        return pictures, "a folder", ""
    pictures = []
    for name in tables:
        with naming(root / name):
            pictures += find_in_parquet(root / name, columns, with_labels)
    for name in tars:
        with naming(root / name), open(root / name, "rb") as file:
            pictures += find_in_tar(file, root / name, with_labels, not_taken)
    if not pictures:
        raise DataError(f"{source} holds no picture. Not taken: {not_taken}.")
    several = "s" if len(tars + tables) > 1 else ""
    if tables:
        check_one_set(root, tables)
        image, label = choose_columns(parquet.read_schema(root / tables[0]), columns)
        read = f"columns {image} and {label}" if label and with_labels else f"column {image}"
        return pictures, f"{len(tables):,} parquet file{several} ({read})", None
    folder_of = {str(root / name): f"{Path(name).stem}/" for name in tars}
    if not all(picture.name.startswith(folder_of[picture.path]) for picture in pictures):
        check_one_set(root, tars)
    words = f"{len(tars):,} tar{several}"
    folders = {os.path.dirname(picture.name) for picture in pictures}
    if any(picture.label is not None for picture in pictures):
        return pictures, f"WebDataset labels in {words}", ""
    if len(tars) > 1 and "" in folders:
        return pictures, words, ""
    top = os.path.commonpath(folders)  # a tar's may all lie in ILSVRC/Data/CLS-LOC/train
    top = f"{top}/" if top else ""
    pictures.sort(key=lambda picture: folder_order(picture.name, top))
    return pictures, words, top


# --- labels
def read_text(path):
    """A text file in UTF-8, or in UTF-16 if it says so. DataError for anything else."""
    data = path.read_bytes()
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not in {error.encoding}. Save the file as "
                        "UTF-8.") from None
    if "\0" in text:
        raise DataError(f"{path}: it is not text in UTF-8. Save it as UTF-8.")
    return text


def picture_key(name, endings):
    """What a picture is known by in a file of labels: its path without the picture's ending."""
    name = one_name(name.strip().replace("\\", "/").removeprefix("./"))
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in endings else name


def base_of(key):
    return key.rpartition("/")[2]


def split_at_spaces(line, endings):
    """[file name, label] of a line without a separator of its own, else [line]."""
    words = next(csv.reader([line.replace("\t", " ")], delimiter=" ", skipinitialspace=True))
    words = [word for word in words if word]
    if len(words) == 2:
        return [words[0].rstrip(",;"), words[1]]
    for match in re.finditer(r"[\s,;]+", line.strip()):  # a file name with spaces ends in .jpg
        name = line.strip()[:match.start()]
        label = line.strip()[match.end():]
        is_name = os.path.splitext(name)[1].lower() in endings
        if is_name and (len(label.split()) == 1 or first_of_boxes(label)):
            return [name, label]
    words = re.split(r"[,;\s]+", line.strip(), maxsplit=1)
    if len(words) == 2 and (re.fullmatch(r"[^,;\s]+", words[1]) or first_of_boxes(words[1])):
        return words
    return [line]


def first_of_boxes(cell):
    """The class of the first box in Kaggle's LOC_*_solution.csv ("n01440764 1 2 30 40 ..."), or
    None: a class and four numbers for each box."""
    words = cell.split()
    numbers = [word for i, word in enumerate(words) if i % 5]
    if not words or len(words) % 5 or not all(re.fullmatch(r"-?[\d.]+", n) for n in numbers):
        return None
    return words[0]


def read_rows(path, bases, endings):
    """The rows of a file of labels, [(number of the line, cells)], of two cells or more each.

    The separator is the first of tab, comma, semicolon and bar that all lines have and by which a
    cell names a picture; else spaces. Quotes are csv's. bases: the pictures' names.
    """
    text = read_text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty: expected lines of file name and class.")
    tables = []
    for separator in "\t,;|":
        if not all(separator in line for line in lines):
            continue
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                            skipinitialspace=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in cells])
                    for cells in reader if any(cell.strip() for cell in cells)]
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: {error}. Mend its quotes.") from None
        tables.append(rows)
        if any(base_of(picture_key(cell, endings)) in bases for _, cells in rows for cell in cells):
            return rows
    rows = [(number, split_at_spaces(line, endings))
            for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if all(len(cells) == 2 for _, cells in rows):
        return rows
    if tables:
        return tables[0]
    line, cells = next(row for row in rows if len(row[1]) != 2)
    raise DataError(f"{path}: line {line}: expected a file name and one class, found {cells[0]!r}: "
                    "put a comma between them, and quotes around a name with a comma.")


def choose_label_columns(path, rows, names_picture):
    """(number of the column of file names, that of labels or {column: class}, in words, rows).

    The first line is a header if it names columns of FILE_NAMES and LABEL_NAMES, or one of them
    and no picture. Then these are the columns, or the only other one; columns of 0 and 1 are
    one-hot classes. Without a header: file name, then class, perhaps behind a column that counts
    the lines.
    """
    count = len(rows[0][1])
    for line, cells in rows:
        if len(cells) > count and not any(cells[count:]):
            del cells[count:]
        if len(cells) != count:
            raise DataError(f"{path}: line {line} has {len(cells)} columns, the first one {count}: "
                            "a picture has one class. Put quotes around a name with a separator.")
    first = [cell.casefold() for cell in rows[0][1]]
    known = set(FILE_NAMES) | set(LABEL_NAMES) | set(INDEX_NAMES)
    has_both = not set(FILE_NAMES).isdisjoint(first) and not set(LABEL_NAMES).isdisjoint(first)
    has_one = not known.isdisjoint(first) and not any(map(names_picture, rows[0][1]))
    columns = range(count)
    if not (has_both or has_one):
        columns = [column for column in columns if any(cells[column] for _, cells in rows)]
        numbers = [cells[columns[0]] for _, cells in rows]
        start = int(numbers[0]) if numbers[0].isdecimal() else 0
        counts = numbers == [str(start + i) for i in range(len(rows))]
        if len(columns) == 3 and counts and not any(map(names_picture, numbers)):
            columns = columns[1:]
        if len(columns) != 2:
            raise DataError(f"{path}: line {rows[0][0]} has {len(columns)} columns: expected a "
                            "file name and one class, or a first line with the columns' names, "
                            "such as file,label.")
        return *columns, "file name, then class", rows
    header = rows[0][1]
    rows = rows[1:]
    if not rows:
        raise DataError(f"{path} holds a header alone: expected lines of file name and class.")
    columns = [column for column in columns if first[column] not in INDEX_NAMES]
    files = [first.index(name) for name in FILE_NAMES if name in first]
    naming_files = (column for column in files
                    if any(names_picture(cells[column]) for _, cells in rows))
    file = next(naming_files, files[0] if files else None)
    label = next((first.index(name) for name in LABEL_NAMES
                  if name in first and first.index(name) != file), None)
    others = [column for column in columns if column not in (file, label)]
    if file is None and len(others) == 1:
        file = others[0]
    elif label is None and len(others) == 1:
        label = others[0]
    one_hot = all(cells[column] in ("0", "1", "0.0", "1.0")
                  for _, cells in rows for column in others)
    if file is not None and label is None and others and one_hot:
        classes = {column: header[column] for column in others}
        return file, classes, f"column {header[file]}, one-hot classes", rows
    if file is None or label is None:
        raise DataError(f"{path}: which of its columns {', '.join(header)} are the file name and "
                        "the class? Call them file and label.")
    return file, label, f"columns {header[file]} and {header[label]}", rows


def label_in_row(cells, label):
    """A row's label. DataError in words."""
    if isinstance(label, int):
        return parse_label(first_of_boxes(cells[label]) or cells[label])
    marked = [name for column, name in label.items() if float(cells[column]) == 1]
    if len(marked) != 1:
        raise DataError(f"{len(marked)} classes are marked: a picture has one")
    return one_name(marked[0])


def read_labels(path, pictures, not_taken):
    """(label of each picture, columns in words) from a file of labels.

    A line belongs to a picture of its base name, with or without ending; folders count where that
    leaves a choice. Lines without a picture are counted; DataError where a picture has two labels,
    or a line two pictures.
    """
    endings = picture_endings()
    keys = [picture_key(picture.name, endings) for picture in pictures]
    count_of = Counter(map(base_of, keys))

    def names_picture(cell):
        return base_of(picture_key(cell, endings)) in count_of
    rows = read_rows(path, count_of, endings)
    file, label, words, rows = choose_label_columns(path, rows, names_picture)
    lines_of = {}  # base name: {path: (label, line)}
    for line, cells in rows:
        try:
            value = label_in_row(cells, label)
        except DataError as error:
            raise DataError(f"{path}: line {line}: {error}.") from None
        key = picture_key(cells[file], endings)
        known = lines_of.setdefault(base_of(key), {})
        if known.setdefault(key, (value, line))[0] != value:
            raise DataError(f"{path}: lines {known[key][1]} and {line} give {cells[file]} two "
                            "labels. Remove one.")
    labels = []
    used = {}  # path in the file: the picture that it belongs to
    for key, picture in zip(keys, pictures):
        base = base_of(key)
        lines = lines_of.get(base, {})
        if len(lines) > 1 or count_of[base] > 1:
            lines = {name: value for name, value in lines.items()
                     if f"/{name}".endswith(f"/{key}") or f"/{key}".endswith(f"/{name}")}
        for name in lines:
            if used.setdefault(name, picture) is not picture:
                raise DataError(f"{path}: {name} may be {used[name].name} or {picture.name}: write "
                                "it with its folder, as in the source.")
        if len({value for value, _ in lines.values()}) > 1:
            numbers = ", ".join(str(line) for _, line in lines.values())
            raise DataError(f"{path}: lines {numbers} give {picture.name} two labels. Write "
                            "names with their folders, as in the source.")
        labels.append(next((value for value, _ in lines.values()), None))
    if not used:
        raise DataError(f"{path}: no line names a picture, the first one {rows[0][1]}, as "
                        f"{pictures[0].name}: expected file name, then class.")
    if sum(map(len, lines_of.values())) > len(used):
        for lines in lines_of.values():
            for name in lines:
                if name not in used:
                    not_taken.add(LINE_ALONE, name)
    return labels, words


def number_classes(pictures, known):
    """(pictures with labels 0 to C - 1, class names, in words how numbers were read or "").

    known: the class names of --classes, or None. Then a number is the class of that name if all
    names are numbers, else a place among them. Without, numbers are places, and names are sorted.
    """
    example = {}  # label: the first picture that has it
    for picture in pictures:
        example.setdefault(picture.label, picture)
    numbers = [label for label in example if isinstance(label, int)]
    names = [label for label in example if isinstance(label, str)]
    words = ""
    if known is not None:
        number_of = {name: i for i, name in enumerate(known)}
        if known and all(map(str.isdecimal, known)):
            number_of |= {int(name): i for i, name in enumerate(known)}
            words = "numbers are names of classes" if numbers else ""
        else:
            number_of |= {i: i for i in range(len(known))}
            words = "numbers are places in --classes" if numbers else ""
        classes = known
    elif numbers and names:
        ours, theirs = example[numbers[0]], example[names[0]]
        raise DataError(f"{ours.path}/{ours.name} has the number {ours.label} for a label, and "
                        f"{theirs.path}/{theirs.name} the name {theirs.label}. Give all pictures "
                        "numbers or all names, or say which is which by --classes.")
    elif numbers:
        classes = [str(number) for number in range(min(max(numbers) + 1, MAX_CLASSES))]
        number_of = {i: i for i in range(len(classes))}
    else:
        classes = sorted(names)
        number_of = {name: i for i, name in enumerate(classes)}
    if len(classes) > MAX_CLASSES:
        raise DataError(f"there are {len(classes):,} classes, such as {classes[0]}: are these "
                        "labels? At most 100,000 are taken; --unlabelled takes none.")
    for label, picture in example.items():
        if known is None and isinstance(label, int) and label >= MAX_CLASSES:
            raise DataError(f"{picture.path}/{picture.name} has the label {label:,}, but numbers "
                            f"of classes end at {MAX_CLASSES - 1:,}. Is it another number? Give "
                            "labels by --columns or --labels FILE, or add --unlabelled.")
        if label not in number_of:
            raise DataError(f"{picture.path}/{picture.name} has the label {label!r}, none of the "
                            f"{len(classes):,} classes. Change it, or use --classes with a file "
                            "that has it.")
    return [p._replace(label=number_of[p.label]) for p in pictures], classes, words


def find_data(source, labels_file, classes_file, unlabelled=False, columns=None, not_taken=None):
    """(pictures with labels 0 to C - 1, C class names) of --data-dir; (with labels -1, None)
    where there is no label. Prints what was found and what not taken. DataError if it is bad.

    Labels are those of --labels, else of the source itself (KEY.cls, a column), else the folders;
    --unlabelled takes none of them.
    """
    not_taken = NotTaken() if not_taken is None else not_taken
    known = None
    if classes_file:
        known = BetonReader(classes_file.with_suffix(".beton")).classes or []
    pictures, words, top = find_pictures(source, columns, not unlabelled, not_taken, known)
    if unlabelled:
        pictures = [picture._replace(label=None) for picture in pictures]
    elif known is None and not labels_file and source.suffix == ".beton":
        known = open_beton(str(source)).classes
    labels = [picture.label for picture in pictures]
    notes = []
    if labels_file:
        for picture in pictures:
            if picture.label is not None:
                not_taken.add(OTHER_LABEL, picture.name)
        if Path(os.path.realpath(source)) in Path(os.path.realpath(labels_file)).parents:
            not_taken.take_back(OTHER_ENDING, ending_of(labels_file.name) or "no ending")
        labels, label_columns = read_labels(labels_file, pictures, not_taken)
        notes.append(f"labels from {labels_file} ({label_columns})")
    elif top is not None and not unlabelled and not any(label is not None for label in labels):
        names = [picture.name for picture in pictures]
        folders = folder_classes(names, source, not_taken, top)
        if folders:
            labels = folders
            words = "class folders" if words == "a folder" else f"class folders in {words}"
            deep = next((name for name in names if name[len(top):].count("/") > 1), None)
            if deep:
                notes.append(f"folders in them are not ({os.path.dirname(deep)}); if the first "
                             "are no classes either, add --unlabelled")
    if any(label is not None for label in labels):
        missing = [i for i, label in enumerate(labels) if label is None]
        if missing:
            picture = pictures[missing[0]]
            raise DataError(f"{picture.path}/{picture.name} has no label: {len(missing):,} of "
                            f"{len(labels):,} pictures have none. Add what is missing to "
                            f"{labels_file or 'the source'}, or move pictures without a label "
                            "away, or build without any labels: --unlabelled, and no --labels.")
        pictures = [p._replace(label=label) for p, label in zip(pictures, labels)]
        pictures, classes, reading = number_classes(pictures, known)
        notes += [reading] if reading else []
        what = f"in {len(classes):,} classes ({shorten(classes)})"
    else:
        if classes_file:
            raise DataError(f"{source} has no labels that --classes could number. Leave it out, "
                            "or give --labels FILE.")
        pictures = [p._replace(label=-1) for p in pictures]
        classes = None
        what = "without labels" if unlabelled else "without labels: none were found"
    print_text("; ".join([f"found: {words}: {len(pictures):,} pictures {what}", *notes]))
    print_text(f"not taken: {not_taken}")
    return pictures, classes


def shorten(names):
    """Some names of many, in words."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]}"


def print_text(text):
    """Prints at once, also names that are not UTF-8."""
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


# --- pictures: drawn
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
class Sample(NamedTuple):
    """What the file keeps of a picture. how: what was done to it, which the last line counts."""

    data: bytes
    mode: int
    width: int
    height: int
    how: str


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
    # Where scans are missing, decoders smooth the progressive picture but not the baseline one
    if failed or Image.open(io.BytesIO(jpeg)).tobytes() != picture.tobytes():
        return None
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
        if isinstance(job, SamplePicture):
            return copy_sample(job.path, job.index)
        longest = settings["max_resolution"]
        if isinstance(job, DrawnPicture):
            picture = draw_picture(job.split, job.index)
        else:
            data = job.read()
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
    needed = (workers + 4) << 14  # a worker's locks take four pages of 4 kB or less
    check_shared_memory(needed, "take fewer --num-workers")
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


def check_replaceable(out):
    """Raises ValueError where writing `out` would replace what no build wrote."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder. Take another --out.")
    strange = []
    if out.exists():
        with open(out, "rb") as file:
            if b'"essl":' not in file.read(HEADER.itemsize + FIELD.itemsize):  # settings
                strange.append(out)
    if sidecar_of(out).exists():
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(sidecar_of(out).read_bytes())
        if not is_sidecar(content):
            strange.append(sidecar_of(out))
    if names_of(out).exists():
        with open(names_of(out), "rb") as file:
            if file.read(len(NAMES_MAGIC)) != NAMES_MAGIC:
                strange.append(names_of(out))
    if strange:
        raise ValueError(f"{strange[0]} is a file that build_beton.py has to write for {out}, but "
                         "another program has written one of that name. Move it away, or take "
                         "another --out.")


@functools.cache
def folder_in_source(path, root):
    """How names of pictures in `path` begin, as paths from the source's folder `root`."""
    folder = os.path.relpath(path, root)
    return "" if folder == "." else f"{folder}/"


def names_bytes(names, checksum):
    """The content of a .names file, whose format stands with NAMES_HEADER."""
    texts = [name.encode("utf-8", "surrogateescape") for name in names]
    offsets = np.zeros(len(texts) + 1, "<u8")
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    content = offsets.tobytes() + b"".join(texts)
    header = np.array((NAMES_MAGIC, checksum, zlib.crc32(content), len(texts)), NAMES_HEADER)
    return header.tobytes() + content


def write_beton(out, pictures, classes, settings, args, not_taken):
    """Encodes pictures into `out`, its sidecar and its names.

    classes: names, or None where labels are -1. ValueError if a picture is bad (--skip-bad: all).
    """
    t0 = time.monotonic()
    page = 8 << 20  # FFCV's default page size
    samples = np.zeros(len(pictures), SAMPLE)
    alloc = np.zeros(len(pictures), ALLOC)
    end = HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes
    n = 0
    counts = Counter()  # how many samples were kept, re-encoded, ...
    bad = []
    names = []
    root = root_of(args.data_dir) if args.data_dir else "demo"
    out.parent.mkdir(parents=True, exist_ok=True)
    # Compiles or loads the kernel here: worker processes are forked and have it then
    add_index(compress(Image.new("RGB", (16, 16)), 95, "420"), 16, 16)
    with write_aside(out) as file:
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
                names.append(folder_in_source(picture.path, root) + picture.name)
                alloc[n] = (n, end, size)
                file.seek(end)
                file.write(result.data)
                end += size
                counts[result.how] += 1
                n += 1
        if bad and not (args.skip_bad and n):
            remedy = "Repair or remove the bad pictures"
            if len(bad) < len(pictures):
                remedy += ", or add --skip-bad, which leaves them out"
            raise ValueError(f"{len(bad):,} of {len(pictures):,} pictures are bad, see above. "
                             f"{out} was not written. {remedy}.")
        header = np.array((2, 2, page, n, end), HEADER)
        checksum = tables_checksum(header, settings, samples[:n], alloc[:n])
        settings = settings | {"checksum": checksum}
        fields = np.array([(2, b"image", json.dumps(settings).encode()), (1, b"label", b"")], FIELD)
        file.seek(end)
        file.write(alloc[:n].tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples[:n].tobytes())
        sidecar = {"classes": classes, "settings": settings, "counts": counts, "left_out": bad}
        with write_aside(sidecar_of(out)) as sidecar_file:  # these take their names first
            sidecar_file.write(json.dumps(sidecar, indent=1).encode())
        with write_aside(names_of(out)) as names_file:
            names_file.write(names_bytes(names, checksum))
    seconds = time.monotonic() - t0
    if classes is not None and not (args.classes or args.limit):
        class_counts = np.bincount(samples["label"][:n], minlength=len(classes))
        empty = [name for name, count in zip(classes, class_counts) if not count]
        if empty:
            print_text(f"classes without a picture: {len(empty):,} ({shorten(empty)})")
    parts = [f"{n:,} images", "no labels" if classes is None else f"{len(classes)} classes",
             f"{out.stat().st_size / 1e6:,.1f} MB"]
    parts += [f"{number:,} {how}" for how, number in sorted(counts.items())]
    parts += [f"{len(bad):,} left out", f"{not_taken.pictures:,} not taken"]
    print_text(f"{out}: {', '.join(parts)}, {seconds:.1f} s ({n / seconds:,.0f} images/s)")


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
    if reader.names:
        reader.names.check()
    count = reader.num_samples
    found = in_order(functools.partial(find_fault, reader), range(count), num_workers)
    faults = {i: fault for i, fault in enumerate(found) if fault}
    for i, fault in faults.items():
        print(f"{reader.title(i)}: {fault}", file=sys.stderr)
    new = set(faults) - set(reader.excluded.tolist())
    if exclude_bad:
        sidecar = {"classes": None}
        if sidecar_of(path).exists():  # one of ours: the reader has read it
            sidecar = json.loads(sidecar_of(path).read_text())
        with write_aside(sidecar_of(path)) as file:
            file.write(json.dumps(sidecar | {"excluded": faults}, indent=1).encode())
    elif new:
        sys.exit(f"build_beton: {path}: {len(new):,} of {count:,} are damaged, as listed. Copy it "
                 "again, or add --exclude-bad, with which loaders leave them out.")
    print(f"{path}: {count:,} samples verified, {len(faults):,} damaged and excluded")


def main(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C: workers just end
    warnings.simplefilter("ignore")  # Pillow's, on EXIF and palettes that it can live with
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses pictures of twice as many
    not_taken = NotTaken()
    settings = {"essl": ESSL, "max_resolution": args.max_resolution, "quality": args.quality,
                "chroma": args.chroma, "codec": args.codec, "lossless": args.lossless}
    try:
        if args.lossless and not hasattr(bind(), "tj3Transform"):
            raise ImportError("--lossless needs libjpeg-turbo 3: `pip install turbojpeg`.")
        if args.verify:
            verify(args.verify, args.exclude_bad, args.num_workers)
        elif args.data_dir:
            check_replaceable(args.out)
            pictures, classes = find_data(args.data_dir, args.labels, args.classes,
                                          args.unlabelled, args.columns, not_taken)
            if args.data_dir.suffix == ".beton":
                settings = open_beton(str(args.data_dir)).settings | {"essl": ESSL}
            count = min(args.limit or len(pictures), len(pictures))
            not_taken.pictures += len(pictures) - count
            pictures = [pictures[i * len(pictures) // count] for i in range(count)]
            write_beton(args.out, pictures, classes, settings, args, not_taken)
        else:
            for split, (name, size) in enumerate((("train", 1000), ("val", 200))):
                pictures = [DrawnPicture("demo", str(i), i % len(DEMO_CLASSES), split, i)
                            for i in range(args.limit or size)]
                out = args.out_dir / f"demo_{name}.beton"
                check_replaceable(out)
                write_beton(out, pictures, DEMO_CLASSES, settings, args, not_taken)
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
