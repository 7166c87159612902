"""Turns pictures into a .beton file, which ESSL and FFCV load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --demo    # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train.beton --exclude-bad

SOURCE, which follows --data-dir, is one of these:
  * a folder of class folders, of class tars or of pictures
  * a .tar of any of these, or a WebDataset .tar
  * a .parquet file
  * a folder of .tar or .parquet files, or a pattern for them, in quotes: "parquet/train-*.parquet"
  * a .beton, which FFCV may have written. Its samples are copied as they are, and each gets the
    index by which the loader finds a crop

Nothing is unpacked. Every file and every label is taken, or it is counted and named in the second
line. Pictures get the label -1 if no picture has a label. Two files lie beside FILE.beton:
FILE.beton.json holds the class names and the settings, and FILE.beton.names holds the path of each
picture in its source.

--demo takes 10 s on two EPYC cores. The exit code is 2 if the input is bad, and 1 after any other
fault. The first, second and last line look like this:
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
import errno
import fcntl
import functools
import glob
import io
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
from dataclasses import dataclass
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

JPEG = 0  # a sample's mode in the file; the other mode is raw RGB
PAGE_SIZE = 8 << 20  # FFCV's default
FORMAT_VERSION = 2  # FFCV's
NUM_FIELDS = 2  # of a sample: the picture and the label
IMAGE_FIELD = 2  # FFCV's numbers for a picture and for a whole number
INTEGER_FIELD = 1
COMMON_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif")  # picture_endings has all
# Names of columns, in the order in which they are preferred
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")  # in a parquet
FILE_NAMES = ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "img",
              "image_name", "image_path", "img_path", "image_id", "imageid", "picture", "photo",
              "name", "id", "key")  # in a file of labels, where a cell names a picture's file
INDEX_NAMES = ("", "unnamed: 0", "index")  # in a file of labels, where a column counts the lines
# Reasons why something is not taken, for one and for several; essl_loader has the others
IN_HIDDEN_FOLDER = ("file in a hidden folder", "files in hidden folders")
LABEL_ALONE = ("label without a picture", "labels without a picture")
LINE_ALONE = ("label of a picture that is not there", "labels of pictures that are not there")
OTHER_LABEL = ("label of the source, where --labels counts",
               "labels of the source, where --labels counts")
TABLE = ("table without pictures", "tables without pictures")

LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json; a larger file describes more than a picture
MAX_LINKS = 40  # how many links in a row Linux follows
# Errors of a disk or a network: they end the build, and --skip-bad leaves no picture out for them
DISK_ERRORS = (errno.ENOENT, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.ESTALE)
RESAMPLING = {"turbojpeg": Image.Resampling.BOX, "pil": Image.Resampling.BICUBIC}
EXIF_ORIENTATION = 0x0112
# libjpeg-turbo 3's turbojpeg.h
TJINIT_TRANSFORM = 2
TJPARAM_STOPONWARNING = 0
TJXOPT_COPYNONE = 64
TJXOPT_OPTIMIZE = 256
TJTRANSFORM = np.dtype([("region", "4i4"), ("operation", "i4"), ("options", "i4"), ("data", "u8"),
                        ("filter", "u8")])

COLOURS = {"red": (220, 50, 40), "yellow": (230, 200, 50), "green": (60, 180, 70),
           "blue": (50, 100, 225), "purple": (170, 70, 200)}
SIDES = {"triangle": 3, "disc": 60}
DEMO_SETS = (("train", 1000), ("val", 200))  # names and numbers of pictures
DEMO_CLASSES = [f"{colour}_{shape}" for colour in COLOURS for shape in SIDES]


# --- arguments
def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    action = p.add_mutually_exclusive_group(required=True)
    action.add_argument("--data-dir", type=Path, nargs="+", metavar="SOURCE",
                        help="build a file from SOURCE, which is explained above")
    action.add_argument("--demo", action="store_true",
                        help="draw a small training set and a small validation set")
    action.add_argument("--verify", type=Path, metavar="FILE", help="check every byte of a .beton")
    add("--exclude-bad", action="store_true",
        help="with --verify: mark bad samples, so that loaders leave them out")
    add("--out", type=Path, help="write this .beton; two files about it are written beside it")
    add("--out-dir", type=Path, default=Path("data"),
        help="write the files of --demo into this folder (default: data)")
    add("--labels", type=Path, metavar="FILE",
        help="read the labels from a text or csv file of file names and classes; one-hot columns "
             "and Kaggle's boxes are understood")
    add("--classes", type=Path, metavar="FILE",
        help="use the class numbers of this .beton")
    add("--unlabelled", action="store_true",
        help="ignore all labels and class folders; each picture gets the label -1")
    add("--columns", nargs=2, metavar=("IMAGE", "LABEL"),
        help="name the columns of a .parquet (default: find them by their types and names)")
    add("--lossless", action="store_true",
        help="keep JPEGs that are not larger than --max-resolution")
    add("--max-resolution", type=int, default=500,
        help="shrink pictures whose longest side has more pixels than this (default: 500)")
    add("--quality", type=int, default=95,
        help="compress JPEGs with this quality, from 1 to 100 (default: 95)")
    add("--chroma", choices=("420", "444"), default="420",
        help="JPEG chroma subsampling: 4:2:0 or 4:4:4 (default: 420)")
    add("--codec", choices=tuple(RESAMPLING), default="turbojpeg",
        help="shrink by area as FFCV does (turbojpeg), or by bicubic (pil) (default: turbojpeg)")
    add("--num-workers", type=int, default=0,
        help="use this number of processes; 0 means all usable cores (default: 0)")
    add("--skip-bad", action="store_true",
        help="leave out pictures that cannot be read; without it, such a picture is an error")
    add("--limit", type=int, default=0,
        help="build this number of pictures, evenly chosen; 0 means all (default: 0)")
    words = sys.argv[1:] if argv is None else argv
    args = p.parse_args([with_hyphens(word) for word in words])
    check_args(p, args)
    args.data_dir = args.data_dir[0] if args.data_dir else None
    return args


def with_hyphens(word):
    """A word of the command line: --batch_size becomes --batch-size, and a value stays."""
    flag, equals, value = word.partition("=")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")
    return flag + equals + value


def check_args(p, args):
    """Ends with exit code 2 and a message if flags do not fit together."""
    if args.data_dir and len(args.data_dir) > 1:
        p.error("--data-dir takes one SOURCE. If you gave a pattern, put it in quotes, because the "
                "shell replaces it by the names of files: --data-dir \"parquet/train-*.parquet\".")
    if args.unlabelled and (args.labels or args.classes):
        p.error("--unlabelled ignores all labels. Remove it, or remove --labels and --classes.")
    if args.data_dir and (args.out is None or args.out.suffix != ".beton"):
        p.error(f"--data-dir needs --out FILE.beton, but --out is {args.out}.")
    if args.data_dir and args.data_dir[0].suffix == ".beton":
        changed = []
        for name in ("lossless", "max_resolution", "quality", "chroma", "codec"):
            if getattr(args, name) != p.get_default(name):
                changed.append(with_hyphens(f"--{name}"))
        if changed:
            p.error(f"The samples of {args.data_dir[0]} are copied as they are. Remove "
                    f"{', '.join(changed)}, or build from the pictures.")
    if not 1 <= args.quality <= 100:
        p.error(f"--quality is {args.quality}, but it must lie between 1 and 100.")
    if not 1 <= args.max_resolution <= 65500:  # JPEG's limit
        p.error(f"--max-resolution is {args.max_resolution}, but it must lie between 1 and 65500.")
    if args.limit < 0:
        p.error(f"--limit is {args.limit}, but it must not be negative.")


# --- sources: which files hold the pictures
@contextlib.contextmanager
def name_in_errors(path):
    """Puts the name of the archive that a block reads before the block's errors."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    except Exception as error:  # pyarrow raises anything on a damaged file
        raise DataError(f"{path}: {error}. The file may be incomplete or compressed: copy it "
                        "again, or unpack it.") from error


def is_beton(source):
    """Whether SOURCE is a .beton, whose samples are copied."""
    return source.suffix == ".beton" and source.is_file()


def root_of(source):
    """Where the names of pictures begin: at SOURCE, or at the last folder before a wildcard."""
    if source.exists():
        return source
    folder = Path()
    for part in source.parts:
        if glob.has_magic(part):
            break
        folder /= part
    return folder


def list_source(source, not_taken):
    """(folder, pictures, archives): the files of SOURCE, as paths from the folder.

    SOURCE is a folder, a .tar, a .parquet or a pattern for such files. In a folder, list_folder
    decides what is taken, at any depth.
    """
    if source.is_dir():
        return source, *list_folder(source, not_taken)
    if source.exists():
        folder = source.parent
        files = [source]
    else:
        folder = root_of(source)
        files = sorted(Path(name) for name in glob.glob(str(source)))
    if not files:
        raise DataError(f"{source}: there is no such file or folder. Check the path.")
    archives = []
    for file in files:
        if file.is_file() and ending_of(file.name) in ARCHIVES:
            archives.append(os.path.relpath(file, folder))
        else:
            not_taken.add(OTHER_ENDING, ending_of(file.name) or "no ending")
    if not archives:
        raise DataError(f"{source}: expected a folder, or .tar or .parquet files, but found "
                        f"{not_taken}. Unpack the file if it is compressed.")
    return folder, [], archives


def keep_tables_of_pictures(folder, tables, tars, columns, not_taken):
    """The parquet files that hold pictures. The others are counted in not_taken.

    For example, img2dataset writes 00000.parquet, which holds URLs, beside 00000.tar.
    """
    kept = []
    for name in tables:
        image_column = None
        belongs_to_tar = os.path.splitext(name)[0] + ".tar" in tars
        if not belongs_to_tar:
            with name_in_errors(folder / name):
                schema = parquet.read_schema(folder / name)
                image_column, _ = choose_columns(schema, columns)
        if image_column is None:
            not_taken.add(TABLE, name)
        else:
            kept.append(name)
    return kept


def check_one_kind(source, folder, loose, tars, tables, not_taken):
    """Raises DataError if SOURCE holds no pictures, or if it holds them in several ways."""
    kinds = []
    for kind, names in (("pictures", loose), (".tar", tars), (".parquet", tables)):
        if names:
            kinds.append(f"{len(names):,} {kind} ({min(names)})")
    if len(kinds) > 1:
        archive = (tars + tables)[0]
        raise DataError(f"{source} holds {' and '.join(kinds)}, but a build takes only one of "
                        "these kinds. Move the other ones away. Or, if you want only the archives, "
                        f'give a pattern, in quotes: --data-dir "{folder}/*{ending_of(archive)}".')
    if not kinds:
        raise DataError(f"{source} holds no picture ({' '.join(COMMON_ENDINGS)} ...), no .tar and "
                        f"no .parquet with a column of bytes. Not taken: {not_taken}. Give the "
                        "folder or the archive that holds the pictures.")


def check_one_set(folder, archives):
    """Raises DataError if archives are of several sets, by the words train, val, test in names."""
    archives_of = {}  # {"train", "val" or "test": [(archive, the word in its name)]}
    for name in archives:
        words = [word for word in re.findall("[a-z]+", name.lower()) if word in SETS]
        if words:
            archives_of.setdefault(SETS[words[0]], []).append((name, words[0]))
    if len(archives_of) < 2:
        return
    counts = []
    commands = []
    for set_name, named in archives_of.items():
        first_archive, word = named[0]
        counts.append(f"{len(named):,} of {set_name} ({first_archive})")
        patterns = {re.sub("[0-9]+", "*", name) for name, _ in named}
        pattern = patterns.pop()
        if patterns:  # one pattern of numbers does not fit all
            pattern = f"*{word}*"
        commands.append(f'--data-dir "{folder}/{pattern}"')
    raise DataError(f"{folder} holds archives of several sets: {' and '.join(counts)}. Build one "
                    f"set at a time: {' or '.join(commands)}.")


# --- pictures: one class for each place where a picture can lie
@dataclass(slots=True)
class Picture:
    """A picture of SOURCE.

    path: the folder or the file that holds it. name: its path in there. label: a class's name, a
    number, or None if it has none; number_classes turns it into the number of a class.
    """

    path: str
    name: str
    label: int | str | None

    @property
    def title(self):
        """How messages call it."""
        return f"{self.path}/{self.name}"


@dataclass(slots=True)
class FilePicture(Picture):
    """A file in the folder `path`."""

    def read(self):
        file = os.path.join(self.path, self.name)
        try:
            return Path(file).read_bytes()
        except FileNotFoundError:
            if os.path.islink(file):  # the picture is bad, not the disk: --skip-bad leaves it out
                raise DataError(f"a broken link, to {os.readlink(file)}") from None
            raise


@dataclass(slots=True)
class MemberPicture(Picture):
    """A member of the tar `path`: `size` bytes from byte `start` on."""

    start: int
    size: int

    def read(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(slots=True)
class RowPicture(Picture):
    """A cell of the parquet file `path`: `row` counts within the row group `group`."""

    group: int
    row: int
    column: str

    def read(self):
        value = read_row_group(self.path, self.group, self.column)[self.row].as_py()
        if isinstance(value, dict):  # Hugging Face's struct of bytes and path
            value = value["bytes"]
        if value is None:
            raise DataError("this row holds no bytes of a picture")
        return value


@dataclass(slots=True)
class MissingPicture(Picture):
    """A name without a picture. The build treats it as a picture that cannot be read."""

    reason: str

    def read(self):
        raise DataError(self.reason)


@dataclass(slots=True)
class SamplePicture(Picture):
    """Sample `index` of the .beton `path`. It is copied and not decoded."""

    index: int


@dataclass(slots=True)
class DrawnPicture(Picture):
    """Picture `index` of the demo's training set (split 0) or validation set (split 1)."""

    split: int
    index: int


@functools.lru_cache(1)
def read_row_group(path, group, column):
    """The column of pictures of one row group. The last group read stays in memory."""
    return parquet.ParquetFile(path).read_row_group(group, [column], use_threads=False)[column]


@functools.cache
def known_endings():
    """picture_endings(), which is slow, once."""
    return picture_endings()


def has_picture_ending(name):
    """Whether a file's name has the ending of a picture."""
    return ending_of(name) in known_endings()


# --- pictures in a tar
def find_in_tar(file, path, with_labels, not_taken, start=0, folder=""):
    """Yields the pictures of the tar `file`, which begins at byte `start` of the file `path`.

    A tar within the tar counts as a folder of its name. Its pictures' names begin with `folder`.
    Tars that follow in the same file, as `cat` joins them, count as more of the first. Raises
    TarError if a tar is damaged or cut short: tarfile alone would take that for its end.
    """
    offset = 0
    while offset is not None:
        file.seek(offset)
        content = TarContent(file, path, with_labels, not_taken, start, folder)
        for member in tqdm(content.tar, folder or str(path), unit=" files", leave=False,
                           disable=None):
            content.tar.members.clear()  # tarfile would keep 1 kB for each member
            content.add(member)
        content.follow_links(offset)
        content.find_labels()
        yield from content.pictures
        offset = find_next_tar(file, content.tar.offset, start)


class TarContent:
    """What one tar holds: pictures, links to pictures and labels. add() fills it.

    The arguments are those of find_in_tar.
    """

    def __init__(self, file, path, with_labels, not_taken, start, folder):
        self.file = file
        self.path = path
        self.with_labels = with_labels
        self.not_taken = not_taken
        self.start = start
        self.folder = folder
        self.class_prefix = f"{path.stem}_"
        self.tar = tarfile.TarFile(fileobj=file)
        self.pictures = []
        self.links = {}  # {name of a link: name of what it leads to}
        self.labels = MemberLabels()

    def name_of(self, path):
        """The name of what lies at `path`, which begins with the folder of the tar.

        The members of ImageNet's n01440764.tar are called n01440764_*: such a tar is a class, so
        its members lie in a folder of the tar's name.
        """
        name = relative_path(path)
        if name.startswith(self.class_prefix) and not self.folder:
            name = f"{self.path.stem}/{name}"
        return name

    def add(self, member):
        """Takes a member, or counts it in not_taken."""
        name = self.name_of(self.folder + member.name)
        ending = ending_of(name)
        is_picture = has_picture_ending(name)
        is_link = member.islnk() or member.issym()
        hidden = hidden_part(name)
        if member.isdir():
            if not hidden:
                self.not_taken.folders.add(name)
        elif hidden == name:
            self.not_taken.add(HIDDEN_FILE, name, pictures=int(is_picture))
        elif hidden:
            self.not_taken.add(IN_HIDDEN_FOLDER, hidden, pictures=int(is_picture))
        elif is_picture and is_link:
            self.links[name] = self.target_of(member)
        elif is_picture and member.issparse():
            self.pictures.append(
                MissingPicture(str(self.path), name, None, "it is stored as a sparse file"))
        elif not member.isreg():
            self.not_taken.add(SPECIAL_FILE, name, pictures=int(is_picture))
        elif is_picture:
            self.add_picture(name, member.offset_data, member.size)
        elif ending == ".tar":
            self.pictures += find_in_tar(self.tar.extractfile(member), self.path, self.with_labels,
                                         self.not_taken, self.start + member.offset_data,
                                         folder=os.path.splitext(name)[0] + "/")
        else:
            self.add_other(name, ending, member)

    def add_picture(self, name, begin, size):
        """begin: the byte of the tar at which the picture begins."""
        self.pictures.append(MemberPicture(str(self.path), name, None, self.start + begin, size))

    def add_other(self, name, ending, member):
        """Takes a label, or counts a file that is none."""
        label = None
        may_be_label = ending in self.labels.by_stem and member.size < LARGEST_LABEL
        if may_be_label and self.with_labels:
            self.file.seek(member.offset_data)
            label = read_member_label(name, ending, self.file.read(member.size))
        if label is None:
            self.not_taken.folders.add(os.path.dirname(name))
            self.not_taken.add(OTHER_ENDING, ending or "no ending")
        else:
            self.labels.add(name, ending, label)

    def target_of(self, link):
        """The name of the member that a link leads to."""
        base = self.folder
        if link.issym():  # its target counts from where the link lies
            base = os.path.dirname(self.folder + link.name)
        return self.name_of(os.path.join(base, link.linkname))

    def follow_links(self, offset):
        """Takes links as the pictures that they lead to: a second pass over the tar at `offset`."""
        if not self.links:
            return
        targets = {}  # {name of a link: name of the member at the end of the chain of links}
        for name, target in self.links.items():
            for _ in range(MAX_LINKS):
                target = self.links.get(target, target)
            targets[name] = target
        wanted = set(targets.values())
        places = {}  # {name of a member: (where it begins, its size)}
        self.file.seek(offset)
        tar = tarfile.TarFile(fileobj=self.file)
        for member in tar:
            tar.members.clear()
            name = self.name_of(self.folder + member.name)
            if name in wanted and member.isreg():
                places[name] = (member.offset_data, member.size)
        for name, target in targets.items():
            if target in places:
                self.add_picture(name, *places[target])
            else:
                reason = f"a broken link, to {self.links[name]}"
                self.pictures.append(MissingPicture(str(self.path), name, None, reason))

    def find_labels(self):
        """Gives the pictures their labels, and counts the labels that no picture has."""
        if self.labels.is_empty():
            return
        for picture in self.pictures:
            if picture.label is None:  # an inner tar has found those of its pictures
                picture.label = self.labels.find(picture.name)
        self.labels.count_unused(self.not_taken)


AMBIGUOUS = object()  # stands for a label where files give several


class MemberLabels:
    """The labels of a tar: K.cls, or a label in K.json, is the label of K.jpg.

    A file's stem is its name up to the last dot: a.1.cls belongs to a.1.jpg. Where that finds
    nothing, WebDataset's key decides, which ends at the first dot of the base name: K.cls belongs
    to K.image.jpg, and K.target.cls to K.jpg. A .cls is preferred to a .json.
    """

    def __init__(self):
        self.by_stem = {".cls": {}, ".json": {}}  # {ending: {stem: label}}
        self.by_key = {}  # {key: label}, of files whose stem is longer than their key
        self.used = set()  # stems and keys

    @staticmethod
    def key_of(stem):
        """WebDataset's key: the stem up to the first dot of its base name."""
        dot = stem.find(".", stem.rfind("/") + 1)
        return stem if dot < 0 else stem[:dot]

    def is_empty(self):
        return not any(self.by_stem.values())

    def add(self, name, ending, label):
        """Keeps the label of the file `name`; in its place may stand the DataError for it."""
        stem = name[:-len(ending)]
        if self.by_stem[ending].setdefault(stem, label) != label:
            raise DataError(f"{name} is there twice, with two labels. Remove one of the two")
        key = self.key_of(stem)
        if key != stem and self.by_key.setdefault(key, label) != label:
            self.by_key[key] = AMBIGUOUS  # an error only if a picture needs it

    def find(self, name):
        """The label of the picture `name`, or None. Raises DataError for one that is not clear."""
        stem = name[:name.rindex(".")]
        key = self.key_of(stem)
        for labels in self.by_stem.values():
            for wanted in (stem, key):
                if wanted in labels:
                    self.used.add(wanted)
                    if isinstance(labels[wanted], DataError):
                        raise labels[wanted]
                    return labels[wanted]
        has_longer_stem = key != stem  # a.2.jpg does not take the label of a.1.cls
        if has_longer_stem or key not in self.by_key:
            return None
        self.used.add(key)
        if self.by_key[key] is AMBIGUOUS:
            raise DataError(f"{name} has two labels, in files {key}.*.cls. Remove one of the two")
        return self.by_key[key]

    def count_unused(self, not_taken):
        """Counts the labels that no picture has."""
        for ending, labels in self.by_stem.items():
            for stem, label in labels.items():
                if stem in self.used or self.key_of(stem) in self.used:
                    continue
                if isinstance(label, DataError):  # a .json that holds something else
                    not_taken.add(OTHER_ENDING, ending)
                else:
                    not_taken.add(LABEL_ALONE, stem + ending)


def read_member_label(name, ending, data):
    """The label in a tar's K.cls or K.json, or None, or the DataError that says what is wrong."""
    try:
        if ending == ".cls":
            return parse_label(data)
        return find_label_in_json(data)
    except DataError as error:
        return DataError(f"{name}: {error}. Correct it, or ignore all labels by --unlabelled")


def relative_path(path):
    """A path without "." and "..", also if it is absolute or leads out of the tar."""
    path = os.path.normpath(path).lstrip("/")
    while path.startswith("../"):
        path = path[3:]
    return path


def hidden_part(name):
    """A member's name up to its first hidden folder or file, or ""."""
    has_dot = name.startswith(".") or "/." in name
    if not has_dot and not any(folder in name for folder in SYSTEM_FOLDERS):
        return ""  # a quick answer for nearly all of a million members
    parts = name.split("/")
    for i, part in enumerate(parts):
        if is_hidden(part):
            return "/".join(parts[:i + 1])
    return ""


def find_next_tar(file, offset, start):
    """The byte of `file` at which the next tar begins, or None.

    offset: where this tar ends. Zeros lie between them.
    """
    file.seek(offset)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"neither a file nor the end of the tar is at byte "
                                f"{start + offset:,}")
    while data := file.read(1 << 20):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data):
            return file.tell() - len(data) + zeros // 512 * 512
    return None


# --- pictures in a parquet file
def holds_pictures(field):
    """Whether a column holds bytes, or Hugging Face's struct of bytes and path."""
    kind = field.type
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_pictures(kind.field("bytes"))
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def first_known(known, names):
    """The first of the known names that is in `names`, or None."""
    for name in known:
        if name in names:
            return name
    return None


def choose_columns(schema, columns):
    """(column of pictures, column of labels) of a parquet file. None stands for a missing one.

    columns: those of --columns, or None.
    """
    if not columns:
        image = choose_image_column(schema)
        return image, choose_label_column(schema, image)
    missing = set(columns) - set(schema.names)
    if missing:
        raise DataError(f"it has no column {', '.join(sorted(missing))}, only "
                        f"{', '.join(schema.names)}. Change --columns")
    if not holds_pictures(schema.field(columns[0])):
        raise DataError(f"its column {columns[0]} holds no bytes. Change --columns")
    return tuple(columns)


def choose_image_column(schema):
    """The only column of bytes, or of several the first of IMAGE_NAMES."""
    columns = [field.name for field in schema if holds_pictures(field)]
    if len(columns) < 2:
        return columns[0] if columns else None
    column = first_known(IMAGE_NAMES, columns)
    if column is None:
        raise DataError(f"it is not clear which of its columns {', '.join(columns)} holds the "
                        "pictures. Add --columns IMAGE LABEL")
    return column


def choose_label_column(schema, image):
    """The first of LABEL_NAMES, or else the only column that Hugging Face's types call a class."""
    names = [name for name in schema.names if name != image]
    column = first_known(LABEL_NAMES, names)
    if column is not None:
        return column
    metadata = schema.metadata or {}
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    features = info.get("features", {})
    columns = []
    for name in names:
        feature = features.get(name)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            columns.append(name)
    if len(columns) > 1:
        raise DataError(f"it is not clear which of its columns {', '.join(columns)} holds the "
                        "labels. Add --columns IMAGE LABEL")
    return columns[0] if columns else None


def find_in_parquet(path, columns, with_labels):
    """Yields the pictures of a parquet file, row by row.

    A picture's name is "row N", and after a slash the path that Hugging Face's struct gives.
    """
    file = parquet.ParquetFile(path)
    image_column, label_column = choose_columns(file.schema_arrow, columns)
    image_type = file.schema_arrow.field(image_column).type
    has_paths = types.is_struct(image_type) and image_type.get_field_index("path") >= 0
    has_labels = with_labels and label_column is not None
    wanted = []  # small columns alone: RowPicture reads the pictures
    if has_paths:
        wanted.append(f"{image_column}.path")
    if has_labels:
        wanted.append(label_column)
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        paths = [None] * count
        labels = [None] * count
        if wanted:
            table = file.read_row_group(group, wanted)
        if has_paths:
            structs = table[image_column].to_pylist()
            paths = [struct["path"] if struct else None for struct in structs]
        if has_labels:
            labels = table[label_column].to_pylist()
        for row in range(count):
            name = f"row {number}"
            try:
                label = parse_label(labels[row])
            except DataError as error:
                raise DataError(f"{name}, column {label_column}: {error}. Name another column by "
                                "--columns, or ignore all labels by --unlabelled") from None
            if paths[row]:
                name += f"/{paths[row]}"
            yield RowPicture(str(path), name, label, group, row, image_column)
            number += 1


# --- pictures in a .beton
@functools.lru_cache(1)
def open_beton(path):
    """A BetonReader, which stays open for the next sample."""
    return BetonReader(path)


def find_in_beton(path, classes):
    """Yields the samples of a .beton, in its order.

    A label is the class's name in `classes`, or the number itself if that has no such place.
    """
    reader = open_beton(str(path))
    for i, number in enumerate(reader.labels.tolist()):
        name = reader.names[i] if reader.names else f"sample {i}"
        label = None if number == -1 else number
        if classes is not None and 0 <= number < len(classes):
            label = classes[number]
        yield SamplePicture(str(path), name, label, i)


# --- pictures of a source
class Listing(NamedTuple):
    """The pictures of SOURCE, with the labels that it gives itself.

    kind: what SOURCE is, in words. class_root: the folders above the class folders, with which all
    names begin, such as "ILSVRC/train/", or ""; None if folders are no classes in such a source.
    """

    pictures: list
    kind: str
    class_root: str | None


def find_pictures(source, columns, with_labels, not_taken, known_classes=None):
    """A Listing of SOURCE. Raises DataError if it is of two kinds, or of none.

    known_classes: the names in the file of --classes, which a .beton without names takes.
    """
    if is_beton(source):
        classes = open_beton(str(source)).classes or known_classes
        return Listing(list(find_in_beton(source, classes)), "a .beton", None)
    folder, loose, archives = list_source(source, not_taken)
    archives.sort(key=Path)
    tars = [name for name in archives if ending_of(name) == ".tar"]
    tables = [name for name in archives if ending_of(name) == ".parquet"]
    tables = keep_tables_of_pictures(folder, tables, tars, columns, not_taken)
    check_one_kind(source, folder, loose, tars, tables, not_taken)
    if loose:
        loose.sort(key=folder_order)
        return Listing([FilePicture(str(folder), name, None) for name in loose], "a folder", "")
    if tables:
        listing = list_tables(folder, tables, columns, with_labels)
    else:
        listing = list_tars(folder, tars, with_labels, not_taken)
    if not listing.pictures:
        raise DataError(f"{source} holds no picture. Not taken: {not_taken}. Give the folder or "
                        "the archive that holds the pictures.")
    return listing


def count_files(names, one):
    """How many files of a kind there are, in words."""
    ending = "" if len(names) == 1 else "s"
    return f"{len(names):,} {one}{ending}"


def list_tables(folder, tables, columns, with_labels):
    """A Listing of parquet files: the pictures stay in the order of the rows."""
    pictures = []
    for name in tables:
        with name_in_errors(folder / name):
            pictures += find_in_parquet(folder / name, columns, with_labels)
    check_one_set(folder, tables)
    image_column, label_column = choose_columns(parquet.read_schema(folder / tables[0]), columns)
    used = f"column {image_column}"
    if label_column and with_labels:
        used = f"columns {image_column} and {label_column}"
    return Listing(pictures, f"{count_files(tables, 'parquet file')} ({used})", None)


def list_tars(folder, tars, with_labels, not_taken):
    """A Listing of tars.

    The pictures are sorted as torchvision's ImageFolder sorts them if their folders can be
    classes. With labels beside them, or in several tars without folders, they stay in the tars'
    order.
    """
    pictures = []
    for name in tars:
        with name_in_errors(folder / name), open(folder / name, "rb") as file:
            pictures += find_in_tar(file, folder / name, with_labels, not_taken)
    if not pictures:
        return Listing([], "", None)
    class_folder = {str(folder / name): f"{Path(name).stem}/" for name in tars}
    are_class_tars = all(picture.name.startswith(class_folder[picture.path])
                         for picture in pictures)
    if not are_class_tars:
        check_one_set(folder, tars)
    kind = count_files(tars, "tar")
    folders = {os.path.dirname(picture.name) for picture in pictures}
    if any(picture.label is not None for picture in pictures):
        return Listing(pictures, f"WebDataset labels in {kind}", "")
    if len(tars) > 1 and "" in folders:
        return Listing(pictures, kind, "")
    class_root = os.path.commonpath(folders)  # as ILSVRC/Data/CLS-LOC/train in Kaggle's tar
    if class_root:
        class_root += "/"

    def order(picture):
        return folder_order(picture.name, class_root)
    pictures.sort(key=order)
    return Listing(pictures, kind, class_root)


# --- labels: what counts as one
def parse_label(value):
    """A label as a number, as a class's name, or None if there is none: no value, no text, or -1.

    Raises DataError, which says what is wrong with the value, for anything else.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"the label {value!r} is not in UTF-8") from None
    if isinstance(value, str):
        text = one_name(value.strip())
        value = number_in(text)
        if value is None:
            return text or None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise DataError(f"the label {value!r} is a number that is not whole")
        value = int(value)
    if value is None or value == -1:
        return None
    if not isinstance(value, int):
        raise DataError(f"the label {value!r} is a {type(value).__name__}, not a number or a name: "
                        "a picture has one class")
    if value < 0:
        raise DataError(f"the label {value!r} is negative: classes count from 0, -1 means none")
    return int(value)  # a bool becomes 0 or 1


def number_in(text):
    """The whole number that a text is, or None. 3.0 is one; 0.5 and "1 2" are errors."""
    if text.isascii() and text.isdecimal():  # a quick answer for nearly all of a million labels
        return int(text)
    if re.fullmatch(r"[+-]?\d+([\s,;]+[+-]?\d+)+", text):
        raise DataError(f"the label {text!r} is several numbers: a picture has one class")
    whole = re.fullmatch(r"([+-]?\d+)(\.0*)?", text)
    if whole:
        return int(whole[1])
    if re.fullmatch(r"[+-]?\d*\.\d+", text):
        raise DataError(f"the label {text!r} is a number that is not whole")
    return None


def find_label_in_json(data):
    """The label in WebDataset's KEY.json: the value of the first of LABEL_NAMES, or None."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON ({error})") from None
    if not isinstance(content, dict):
        return None
    name = first_known(LABEL_NAMES, content)
    return None if name is None else parse_label(content[name])


# --- labels: the file of --labels
class LabelTable(NamedTuple):
    """The content of a file of labels.

    rows: (number of the line, cells), without the header. file_column: the number of the column of
    file names. label_column: that of the labels, or None where each class has a column of 0 and 1:
    then class_columns is {number of the column: class}. columns: these columns, in words.
    """

    rows: list
    file_column: int
    label_column: int | None
    class_columns: dict
    columns: str


def read_text(path):
    """A text file in UTF-8, or in UTF-16 if it begins with its mark."""
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
        raise DataError(f"{path} is not a text in UTF-8. Save the file as UTF-8.")
    return text


def stem_of(name):
    """By what a picture and its line in a file of labels are matched: the path without ending."""
    name = one_name(name.strip().replace("\\", "/").removeprefix("./"))
    if has_picture_ending(name):
        return os.path.splitext(name)[0]
    return name


def base_of(stem):
    """A stem without its folders."""
    return stem.rpartition("/")[2]


def split_rows(path, names_picture):
    """The rows of a file of labels, [(number of the line, cells)], of two cells or more each.

    The separator is the first of tab, comma, semicolon and bar that is in all lines and that makes
    some cell name a picture, or else spaces. Quotes work as in csv.
    """
    text = read_text(path)
    lines = {number: line for number, line in enumerate(text.splitlines(), start=1)
             if line.strip()}
    if not lines:
        raise DataError(f"{path} is empty: expected lines of a file name and a class.")
    separated = None  # by the first separator that is in all lines
    for separator in "\t,;|":
        if not all(separator in line for line in lines.values()):
            continue
        rows = split_at(path, text, separator)
        for _, cells in rows:
            if any(names_picture(cell) for cell in cells):
                return rows
        separated = separated or rows
    rows = [(number, split_at_spaces(line)) for number, line in lines.items()]
    bad_rows = [row for row in rows if len(row[1]) != 2]
    if not bad_rows:
        return rows
    if separated:
        return separated
    number, cells = bad_rows[0]
    raise DataError(f"{path}: line {number}: expected a file name and one class, but found "
                    f"{cells[0]!r}. Put a comma between them, and put a name that holds a comma "
                    "in quotes.")


def split_at(path, text, separator):
    """The rows of a text by csv's rules, without empty lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                        skipinitialspace=True)
    rows = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}. Correct the quotes.") from None
    return rows


def split_at_spaces(line):
    """[file name, label] of a line that spaces, commas or semicolons separate, or else [line]."""
    words = next(csv.reader([line.replace("\t", " ")], delimiter=" ", skipinitialspace=True))
    words = [word for word in words if word]
    if len(words) == 2:
        return [words[0].rstrip(",;"), words[1]]
    line = line.strip()
    for gap in re.finditer(r"[\s,;]+", line):  # the name may hold spaces: it ends in .jpg
        name = line[:gap.start()]
        label = line[gap.end():]
        is_word = len(label.split()) == 1
        if has_picture_ending(name) and (is_word or first_of_boxes(label) is not None):
            return [name, label]
    words = re.split(r"[,;\s]+", line, maxsplit=1)
    if len(words) == 2:
        label = words[1]
        is_word = re.fullmatch(r"[^,;\s]+", label) is not None
        if is_word or first_of_boxes(label) is not None:
            return words
    return [line]


def first_of_boxes(cell):
    """The class of the first box in a cell of Kaggle's LOC_*_solution.csv, or None.

    A cell holds a class and four numbers for each box: "n01440764 1 2 30 40 n01440764 5 6 ...".
    """
    words = cell.split()
    if not words or len(words) % 5 != 0:
        return None
    for i, word in enumerate(words):
        is_class = i % 5 == 0
        if not is_class and not re.fullmatch(r"-?[\d.]+", word):
            return None
    return words[0]


def read_label_table(path, names_picture):
    """A LabelTable of a file. names_picture(cell) tells whether a cell names a picture."""
    rows = split_rows(path, names_picture)
    check_row_lengths(path, rows)
    first_cells = rows[0][1]
    if not is_header(first_cells, names_picture):
        return choose_columns_by_place(path, rows, names_picture)
    if len(rows) == 1:
        raise DataError(f"{path} holds only a header: expected lines of a file name and a class.")
    return choose_columns_by_name(path, first_cells, rows[1:], names_picture)


def check_row_lengths(path, rows):
    """Raises DataError if a row has more or fewer cells than the first; empty ones are cut off."""
    count = len(rows[0][1])
    for number, cells in rows:
        if not any(cells[count:]):
            del cells[count:]
        if len(cells) != count:
            raise DataError(f"{path}: line {number} has {len(cells)} columns, but the first line "
                            f"has {count}, and a picture has one class. If a name holds the "
                            "separator, put it in quotes.")


def is_header(cells, names_picture):
    """Whether the first row names the columns: of files and of labels, or one, but no picture."""
    names = {cell.casefold() for cell in cells}
    names_files = not names.isdisjoint(FILE_NAMES)
    names_labels = not names.isdisjoint(LABEL_NAMES)
    names_index = not names.isdisjoint(INDEX_NAMES)
    if names_files and names_labels:
        return True
    names_a_column = names_files or names_labels or names_index
    return names_a_column and not any(names_picture(cell) for cell in cells)


def choose_columns_by_place(path, rows, names_picture):
    """A LabelTable without a header: file name, then class. A column before may count the lines."""
    count = len(rows[0][1])
    columns = [column for column in range(count) if any(cells[column] for _, cells in rows)]
    if len(columns) == 3:
        first_cells = [cells[columns[0]] for _, cells in rows]
        start = int(first_cells[0]) if first_cells[0].isdecimal() else 0
        counts_lines = first_cells == [str(start + i) for i in range(len(rows))]
        if counts_lines and not any(names_picture(cell) for cell in first_cells):
            columns = columns[1:]
    if len(columns) != 2:
        raise DataError(f"{path}: line {rows[0][0]} has {len(columns)} columns: expected a file "
                        "name and one class, or a first line with the columns' names, such as "
                        "file,label.")
    file_column, label_column = columns
    return LabelTable(rows, file_column, label_column, {}, "file name, then class")


def choose_columns_by_name(path, header, rows, names_picture):
    """A LabelTable with a header.

    The names of the columns say which one holds file names, and which one labels. If one of the two
    has no known name, it is the only column that is left. If several are left and hold 0 and 1
    alone, each of them is a class.
    """
    column_of = {}  # the first column of each name
    for column, cell in enumerate(header):
        column_of.setdefault(cell.casefold(), column)
    file_column = choose_file_column(column_of, rows, names_picture)
    label_columns = [column_of[name] for name in LABEL_NAMES if name in column_of]
    label_columns = [column for column in label_columns if column != file_column]
    label_column = label_columns[0] if label_columns else None
    others = [column for column, cell in enumerate(header)
              if cell.casefold() not in INDEX_NAMES and column not in (file_column, label_column)]
    if file_column is None and len(others) == 1:
        file_column = others[0]
    elif label_column is None and len(others) == 1:
        label_column = others[0]
    only_labels_missing = file_column is not None and label_column is None and len(others) > 0
    if only_labels_missing and are_marks(rows, others):
        class_columns = {column: header[column] for column in others}
        words = f"column {header[file_column]}, one-hot classes"
        return LabelTable(rows, file_column, None, class_columns, words)
    if file_column is None or label_column is None:
        raise DataError(f"{path}: it is not clear which of its columns {', '.join(header)} are the "
                        "file name and the class. Call them file and label.")
    words = f"columns {header[file_column]} and {header[label_column]}"
    return LabelTable(rows, file_column, label_column, {}, words)


def are_marks(rows, columns):
    """Whether columns hold only 0 and 1: one-hot classes."""
    for _, cells in rows:
        if not all(cells[column] in ("0", "1", "0.0", "1.0") for column in columns):
            return False
    return True


def choose_file_column(column_of, rows, names_picture):
    """The first column of FILE_NAMES whose cells name pictures, or else the first of FILE_NAMES."""
    columns = [column_of[name] for name in FILE_NAMES if name in column_of]
    for column in columns:
        if any(names_picture(cells[column]) for _, cells in rows):
            return column
    return columns[0] if columns else None


def label_in_row(table, cells):
    """The label in a row of a LabelTable. Raises DataError that says what is wrong with it."""
    if table.label_column is not None:
        cell = cells[table.label_column]
        return parse_label(first_of_boxes(cell) or cell)
    marked = [name for column, name in table.class_columns.items() if float(cells[column]) == 1]
    if len(marked) != 1:
        raise DataError(f"{len(marked)} classes are marked: a picture has one")
    return one_name(marked[0])


class Line(NamedTuple):
    """A line of a file of labels: its number in the file, and the label in it."""

    number: int
    label: int | str | None


def find_lines(path, table):
    """{base name: {stem: Line}} of a LabelTable. DataError where lines give two labels."""
    lines_of = {}
    for number, cells in table.rows:
        try:
            line = Line(number, label_in_row(table, cells))
        except DataError as error:
            raise DataError(f"{path}: line {number}: {error}. Correct this line.") from None
        stem = stem_of(cells[table.file_column])
        first = lines_of.setdefault(base_of(stem), {}).setdefault(stem, line)
        if first.label != line.label:
            raise DataError(f"{path}: lines {first.number} and {number} give "
                            f"{cells[table.file_column]} two labels. Remove one of them.")
    return lines_of


def is_same_path(one, other):
    """Whether one of two paths is the end of the other."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def read_labels(path, pictures, not_taken):
    """Gives pictures the labels of a file, and returns the columns that it used, in words.

    A line belongs to the picture of its base name, with or without ending. Where that leaves a
    choice, the folders decide. Raises DataError if lines give a picture two labels, or if a line
    names two pictures. Lines that name no picture are counted.
    """
    stems = [stem_of(picture.name) for picture in pictures]
    pictures_with = Counter(base_of(stem) for stem in stems)  # how many have a base name

    def names_picture(cell):
        return base_of(stem_of(cell)) in pictures_with
    table = read_label_table(path, names_picture)
    lines_of = find_lines(path, table)
    picture_of = {}  # {stem in the file: picture}
    for stem, picture in zip(stems, pictures):
        base = base_of(stem)
        lines = lines_of.get(base, {})
        if len(lines) > 1 or pictures_with[base] > 1:
            lines = {name: line for name, line in lines.items() if is_same_path(name, stem)}
        for name in lines:
            first = picture_of.setdefault(name, picture)
            if first is not picture:
                raise DataError(f"{path}: {name} may be {first.name} or {picture.name}. Write it "
                                "with its folder, as in the source.")
        labels = {line.label for line in lines.values()}
        if len(labels) > 1:
            numbers = ", ".join(str(line.number) for line in lines.values())
            raise DataError(f"{path}: lines {numbers} give {picture.name} two labels. Write names "
                            "with their folders, as in the source.")
        picture.label = labels.pop() if labels else None
    if not picture_of:
        raise DataError(f"{path}: no line names a picture: the first line is {table.rows[0][1]}, "
                        f"and the first picture {pictures[0].name}. Expected lines of a file name "
                        "and a class.")
    for lines in lines_of.values():
        for name in lines:
            if name not in picture_of:
                not_taken.add(LINE_ALONE, name)
    return table.columns


# --- classes
def number_classes(pictures, known_classes):
    """Turns labels into numbers 0 to C - 1; returns (C class names, how numbers were read or "").

    known_classes: the names in the file of --classes, or None.
    """
    first_with = {}  # {label: the first picture that has it}
    for picture in pictures:
        first_with.setdefault(picture.label, picture)
    reading = ""
    if known_classes is None:
        classes, number_of = make_classes(first_with)
    else:
        classes = known_classes
        number_of, reading = read_as_classes(known_classes, first_with)
    if len(classes) > MAX_CLASSES:
        raise DataError(f"there are {len(classes):,} classes, such as {classes[0]}. At most "
                        f"{MAX_CLASSES:,} are taken. If these are not labels, ignore them by "
                        "--unlabelled.")
    for label, picture in first_with.items():
        if label not in number_of:
            raise DataError(f"{picture.title} has the label {label!r}, which is none of the "
                            f"{len(classes):,} classes. Change it, or give --classes a file that "
                            "has it.")
    for picture in pictures:
        picture.label = number_of[picture.label]
    return classes, reading


def make_classes(first_with):
    """(class names, {label: number}) of {label: picture}: numbers count, names are sorted."""
    numbers = [label for label in first_with if isinstance(label, int)]
    names = [label for label in first_with if isinstance(label, str)]
    if numbers and names:
        raise DataError(f"{first_with[numbers[0]].title} has the number {numbers[0]} for a label, "
                        f"but {first_with[names[0]].title} has the name {names[0]}. Give all "
                        "pictures numbers, or all names, or say which is which by --classes.")
    if names:
        classes = sorted(names)
        return classes, {name: i for i, name in enumerate(classes)}
    for number in numbers:
        if number >= MAX_CLASSES:
            raise DataError(f"{first_with[number].title} has the label {number:,}, but numbers of "
                            f"classes end at {MAX_CLASSES - 1:,}. If it is a number of something "
                            "else, choose other labels by --columns or --labels FILE, or ignore "
                            "them by --unlabelled.")
    classes = [str(number) for number in range(max(numbers) + 1)]
    return classes, {number: number for number in range(len(classes))}


def read_as_classes(known_classes, labels):
    """({label: number}, in words how numbers were read) for the classes of --classes.

    A number is the name of a class if all names are numbers. Else it is a class's place.
    """
    number_of = {name: i for i, name in enumerate(known_classes)}
    if known_classes and all(name.isdecimal() for name in known_classes):
        number_of |= {int(name): i for i, name in enumerate(known_classes)}
        reading = "numbers are names of classes"
    else:
        number_of |= {i: i for i in range(len(known_classes))}
        reading = "numbers are places in --classes"
    has_numbers = any(isinstance(label, int) for label in labels)
    if not has_numbers:
        reading = ""
    return number_of, reading


def label_by_file(source, pictures, labels_file, not_taken):
    """Gives pictures the labels of --labels. Returns a remark for the first line."""
    for picture in pictures:
        if picture.label is not None:
            not_taken.add(OTHER_LABEL, picture.name)
    folders_above = Path(os.path.realpath(labels_file)).parents
    if Path(os.path.realpath(source)) in folders_above:  # so it was counted as not taken
        not_taken.take_back(OTHER_ENDING, ending_of(labels_file.name) or "no ending")
    columns = read_labels(labels_file, pictures, not_taken)
    return f"labels from {labels_file} ({columns})"


def label_by_folders(source, listing, not_taken):
    """Gives pictures the names of their class folders, if there are any, as labels.

    Returns (what SOURCE is, in words; a remark for the first line, or "").
    """
    names = [picture.name for picture in listing.pictures]
    folders = folder_classes(names, source, not_taken, listing.class_root)
    if not folders:
        return listing.kind, ""
    for picture, folder in zip(listing.pictures, folders):
        picture.label = folder
    kind = "class folders"
    if listing.kind != "a folder":
        kind = f"class folders in {listing.kind}"
    for name in names:
        has_folder_in_class = name.count("/", len(listing.class_root)) > 1
        if has_folder_in_class:
            return kind, (f"folders in them are not ({os.path.dirname(name)}); if the first are no "
                          "classes either, add --unlabelled")
    return kind, ""


def check_all_labelled(pictures, labels_file):
    """Raises DataError that names the first picture without a label."""
    missing = [picture for picture in pictures if picture.label is None]
    if missing:
        raise DataError(f"{missing[0].title} has no label: {len(missing):,} of {len(pictures):,} "
                        f"pictures have none. Add them to {labels_file or 'the source'}, or move "
                        "the pictures without a label away, or build without labels: add "
                        "--unlabelled and remove --labels.")


def find_data(source, labels_file, classes_file, unlabelled=False, columns=None, not_taken=None):
    """(pictures with labels 0 to C - 1, C class names) of --data-dir, or (pictures with labels -1,
    None) if there are no labels. Prints what was found and what was not taken.

    Labels are those of --labels, or else of SOURCE itself (K.cls, a column), or else the folders.
    --unlabelled ignores all of them. Raises DataError if the input is bad.
    """
    if not_taken is None:
        not_taken = NotTaken()
    known_classes = None
    if classes_file:
        known_classes = BetonReader(classes_file.with_suffix(".beton")).classes or []
    listing = find_pictures(source, columns, not unlabelled, not_taken, known_classes)
    pictures = listing.pictures
    kind = listing.kind
    remark = ""
    has_labels = any(picture.label is not None for picture in pictures)
    if unlabelled:
        for picture in pictures:
            picture.label = None
    elif labels_file:
        remark = label_by_file(source, pictures, labels_file, not_taken)
    elif not has_labels and listing.class_root is not None:
        kind, remark = label_by_folders(source, listing, not_taken)
    if known_classes is None and not labels_file and is_beton(source):
        known_classes = open_beton(str(source)).classes  # a copy has the same numbers
    classes = None
    reading = ""
    if any(picture.label is not None for picture in pictures):
        check_all_labelled(pictures, labels_file)
        classes, reading = number_classes(pictures, known_classes)
        result = f"in {len(classes):,} classes ({shorten(classes)})"
    else:
        if classes_file:
            raise DataError(f"{source} has no labels that --classes could number. Remove "
                            "--classes, or add --labels FILE.")
        for picture in pictures:
            picture.label = -1
        result = "without labels" if unlabelled else "without labels: none were found"
    first_line = [f"found: {kind}: {len(pictures):,} pictures {result}", remark, reading]
    print_text("; ".join(part for part in first_line if part))
    print_text(f"not taken: {not_taken}")
    return pictures, classes


def shorten(names):
    """Some of many names, in words."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]}"


def print_text(text):
    """Prints at once, also names that are not UTF-8."""
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


# --- encode: a picture becomes a sample, in the worker processes
class Sample(NamedTuple):
    """What the file keeps of a picture. how: what was done to it, which the last line counts."""

    data: bytes
    mode: int
    width: int
    height: int
    how: str


def draw_picture(split, index):
    """A picture of the demo: a large shape on shaded ground, 96 to 160 pixels a side."""
    rng = np.random.default_rng((split, index))
    colour, shape = DEMO_CLASSES[index % len(DEMO_CLASSES)].split("_")
    w, h = (2 * rng.integers(96, 161, 2)).tolist()  # it is halved at the end, for smooth edges
    shade = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).crop((40, 40, 216, 216))
    dark, light = rng.integers((30, 140), (100, 220), (3, 2)).T.tolist()
    image = ImageOps.colorize(shade.resize((w, h)), dark, light)
    radius = min(w, h) * rng.uniform(0.32, 0.45)
    x, y = (np.array([w, h]) / 2 + radius * rng.uniform(-0.1, 0.1, 2)).tolist()
    fill = tuple((COLOURS[colour] + rng.integers(-25, 26, 3)).tolist())
    rotation = rng.uniform(-15, 15)
    ImageDraw.Draw(image).regular_polygon((x, y, radius), SIDES[shape], rotation, fill)
    return image.reduce(2)


def index_sample(jpeg, width, height, how):
    """A Sample of a JPEG with its index, or without it for restart markers or a rare sampling.

    Without an index libjpeg-turbo has to decode it later: None if it finds a fault in it.
    """
    data, has_index = add_index(jpeg, width, height)
    if not has_index:
        how += " without index"
        code, pixels = decode_jpeg(jpeg, width, height)
        _, stored_pixels = decode_jpeg(data, width, height)
        # Where more bytes follow, it reads some damage in another way, and does not warn
        if code != OK or not np.array_equal(pixels, stored_pixels):
            return None
    return Sample(data, JPEG, width, height, how)


def copy_sample(path, i):
    """Sample i of another .beton. A JPEG gets a new index. ValueError if it is damaged."""
    reader = open_beton(path)
    data = reader.read(i)
    mode = int(reader.modes[i])
    width = int(reader.widths[i])
    height = int(reader.heights[i])
    if mode != JPEG:
        return Sample(data, mode, width, height, "raw copied")
    if is_intact(data):
        data = remove_index(data)
    elif reader.settings:  # a file of ours, where each sample has a checksum
        raise ValueError("its bytes do not match their checksum")
    sample = index_sample(data, width, height, "copied")
    if sample is None:
        raise ValueError("its JPEG data are damaged")
    return sample


def make_baseline(progressive, image):
    """The bytes of a progressive JPEG, opened as `image`, as a baseline JPEG of the same pixels.

    None if libjpeg-turbo finds a fault in it.
    """
    lib = bind()
    lib.tj3Init.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(lib.tj3Init(TJINIT_TRANSFORM))
    lib.tj3Set(handle, TJPARAM_STOPONWARNING, 1)
    transform = np.zeros(1, TJTRANSFORM)
    transform["options"] = TJXOPT_COPYNONE + TJXOPT_OPTIMIZE
    buffer = ctypes.c_void_p()
    size = ctypes.c_size_t()
    failed = lib.tj3Transform(handle, progressive, ctypes.c_size_t(len(progressive)), 1,
                              ctypes.byref(buffer), ctypes.byref(size),
                              ctypes.c_void_p(transform.ctypes.data))
    jpeg = ctypes.string_at(buffer, size.value)
    lib.tj3Free(buffer)
    lib.tj3Destroy(handle)
    # Where scans are missing, decoders smooth the progressive image but not the baseline one
    if failed or Image.open(io.BytesIO(jpeg)).tobytes() != image.tobytes():
        return None
    return jpeg


def keep_jpeg(data, image, longest):
    """A Sample of the JPEG `data`, opened as `image`, byte for byte.

    A progressive JPEG becomes a baseline one with the same coefficients. None if the JPEG is too
    large, turned by EXIF, CMYK, or faulty.
    """
    if max(image.size) > longest or image.mode not in ("L", "RGB"):
        return None
    with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
        is_turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
        if is_turned:
            return None
    how = "kept"
    if "progressive" in image.info:
        how = "made baseline"
        data = make_baseline(data, image)
        if data is None:
            return None
    return index_sample(data, *image.size, how)


def compress(image, quality, chroma):
    """An RGB image as the bytes of a baseline JPEG with optimised Huffman tables."""
    buffer = io.BytesIO()
    image.info.clear()  # save() would copy the comment of the file that was read
    # Pillow cannot go on when its buffer is full: noise at quality 100 takes 4 bytes a pixel
    ImageFile.MAXBLOCK = 65536 + 4 * image.width * image.height
    image.save(buffer, "JPEG", quality=quality, subsampling=":".join(chroma), optimize=True)
    return buffer.getvalue()


def encode_image(settings, image):
    """A Sample of a Pillow image in RGB."""
    longest = settings["max_resolution"]
    if max(image.size) > longest:
        size = [max(1, round(side * longest / max(image.size))) for side in image.size]
        image = image.resize(size, RESAMPLING[settings["codec"]])
    jpeg = compress(image, settings["quality"], settings["chroma"])
    return index_sample(jpeg, *image.size, "re-encoded")


def encode_file(settings, data):
    """A Sample of a picture file's bytes."""
    image = Image.open(io.BytesIO(data))
    is_jpeg = data.startswith(b"\xff\xd8")
    if settings["lossless"] and is_jpeg:
        sample = keep_jpeg(data, image, settings["max_resolution"])
        if sample is not None:
            return sample
    image.load()
    with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # convert() would clip 16-bit grey at 255
        raise ValueError(f"it has more than 8 bits a pixel (mode {image.mode}). Convert it to 8")
    # As ImageFolder does, convert() drops alpha and all frames but the first
    return encode_image(settings, image.convert("RGB"))


def encode_sample(settings, picture):
    """A Sample of a Picture, or a string that says why there is none. OSError if a disk fails."""
    try:
        if isinstance(picture, SamplePicture):
            return copy_sample(picture.path, picture.index)
        if isinstance(picture, DrawnPicture):
            return encode_image(settings, draw_picture(picture.split, picture.index))
        return encode_file(settings, picture.read())
    except Exception as error:  # Pillow raises anything on a damaged file
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise OSError(f"{picture.title}: {error}") from None
        return str(error) or type(error).__name__


def in_order(work, jobs, num_workers):
    """Yields work(job) for each job, in order, from worker processes. RuntimeError if one dies."""
    def work_on_all(batch):
        return [work(job) for job in batch]

    def start_worker(_):
        end_with_parent()
    workers = min(num_workers or usable_cores(), len(jobs))
    needed = (workers + 4) << 14  # bytes: a worker's locks take four pages of 4 kB or less
    check_shared_memory(needed, "use fewer --num-workers")
    loader = DataLoader(jobs, batch_size=16, num_workers=workers, multiprocessing_context="fork",
                        collate_fn=work_on_all, worker_init_fn=start_worker)
    # disable=None: the bar is shown on a terminal only
    for results in tqdm(loader, unit=" images", unit_scale=16, disable=None):
        yield from results


# --- write: a file has its name only when it is complete
def check_replaceable(out):
    """Raises ValueError if `out`, or a file that is written beside it, is not a builder's."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder. Choose another --out.")
    strangers = []
    if out.exists():
        with open(out, "rb") as file:
            head = file.read(HEADER.itemsize + FIELD.itemsize)
        if b'"essl":' not in head:  # one of the build settings
            strangers.append(out)
    if sidecar_of(out).exists():
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(sidecar_of(out).read_bytes())
        if not is_sidecar(content):
            strangers.append(sidecar_of(out))
    if names_of(out).exists():
        with open(names_of(out), "rb") as file:
            magic = file.read(len(NAMES_MAGIC))
        if magic != NAMES_MAGIC:
            strangers.append(names_of(out))
    if strangers:
        raise ValueError(f"{strangers[0]} is a file that another program wrote, and the build of "
                         f"{out} would replace it. Move it away, or choose another --out.")


def remove_leftovers(path):
    """Removes the hidden files, of up to 95 GB, that killed builds of `path` left.

    A file stays if the process of its number lives. It also stays if it is locked: a build in
    another container, where processes have other numbers, may be writing it.
    """
    for left in path.parent.iterdir():
        match = re.fullmatch(re.escape(f".{path.name}.tmp-") + "([0-9]+)", left.name)
        if not match:
            continue
        pid = match[1]
        is_of_other_process = pid != str(os.getpid())
        if is_of_other_process and Path("/proc", pid).exists():
            continue
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is locked
            left.unlink()
            print(f"removed: {left}, which a killed build left", flush=True)


@contextlib.contextmanager
def write_aside(path):
    """Opens a file that takes the name `path` once it is complete and on the disk.

    After an error it is removed. A process that is killed leaves it under a hidden name, and the
    next build removes it.
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


class BetonWriter:
    """Writes a .beton: | header | fields | samples | the samples' data | allocations |."""

    def __init__(self, file, capacity):
        """capacity: how many samples may come; the table of samples has room for them."""
        self.file = file
        self.samples = np.zeros(capacity, SAMPLE)
        self.alloc = np.zeros(capacity, ALLOC)
        self.count = 0
        self.page_size = PAGE_SIZE
        # Where the data end that are in the file; the tables before them are written last
        self.end = HEADER.itemsize + NUM_FIELDS * FIELD.itemsize + self.samples.nbytes

    def add(self, sample, label):
        """Writes a sample's data. FFCV reads whole pages, so data cross no boundary of a page."""
        size = len(sample.data)
        while size > self.page_size:
            self.page_size *= 2  # what is placed stays valid: larger pages have fewer boundaries
        first_page = self.end // self.page_size
        last_page = (self.end + size - 1) // self.page_size
        if first_page != last_page:
            self.end = (first_page + 1) * self.page_size
        self.samples[self.count] = (sample.mode, sample.width, sample.height, self.end, label)
        self.alloc[self.count] = (self.count, self.end, size)
        self.file.seek(self.end)
        self.file.write(sample.data)
        self.end += size
        self.count += 1

    def finish(self, settings):
        """Writes the tables. Returns the settings with the checksum over the tables."""
        samples = self.samples[:self.count]
        alloc = self.alloc[:self.count]
        header = np.array(
            (FORMAT_VERSION, NUM_FIELDS, self.page_size, self.count, self.end), HEADER)
        settings = {**settings, "checksum": tables_checksum(header, settings, samples, alloc)}
        fields = np.array([(IMAGE_FIELD, b"image", json.dumps(settings).encode()),
                           (INTEGER_FIELD, b"label", b"")], FIELD)
        self.file.seek(self.end)
        self.file.write(alloc.tobytes())
        self.file.seek(0)
        self.file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        return settings


@functools.cache
def folder_in_source(path, root):
    """The folders between the source's root and `path`, with a slash, or ""."""
    folder = os.path.relpath(path, root)
    return "" if folder == "." else f"{folder}/"


def names_bytes(names, checksum):
    """The content of a .names file. NAMES_HEADER explains its format."""
    texts = [name.encode("utf-8", "surrogateescape") for name in names]
    offsets = np.zeros(len(texts) + 1, "<u8")
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    content = offsets.tobytes() + b"".join(texts)
    header = np.array((NAMES_MAGIC, checksum, zlib.crc32(content), len(texts)), NAMES_HEADER)
    return header.tobytes() + content


def encode_into(writer, pictures, settings, skip_bad, num_workers):
    """Encodes pictures into a BetonWriter.

    Returns (the pictures that were written, a Counter of what was done to them, [{file, reason}] of
    the bad ones). After a bad picture nothing more is written unless skip_bad is true, but the
    others are still read, so that all bad ones are named.
    """
    written = []
    counts = Counter()
    bad = []
    results = in_order(functools.partial(encode_sample, settings), pictures, num_workers)
    for picture, result in zip(pictures, results):
        if isinstance(result, str):
            bad.append({"file": picture.title, "reason": result})
            tqdm.write(f"{picture.title}: {result}", file=sys.stderr)
        elif skip_bad or not bad:
            writer.add(result, picture.label)
            written.append(picture)
            counts[result.how] += 1
    return written, counts, bad


def write_beton(out, pictures, classes, settings, args, not_taken):
    """Encodes pictures into `out`, writes its sidecar and its names, and accounts for all pictures.

    classes: the class names, or None if labels are -1. ValueError if a picture is bad, or with
    --skip-bad if all are.
    """
    t0 = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Compiles or loads the kernel here: worker processes are forked and have it then
    add_index(compress(Image.new("RGB", (16, 16)), 95, "420"), 16, 16)
    with write_aside(out) as file:
        writer = BetonWriter(file, len(pictures))
        written, counts, bad = encode_into(writer, pictures, settings, args.skip_bad,
                                           args.num_workers)
        if bad and not (args.skip_bad and written):
            remedy = "Repair or remove the bad pictures"
            if len(bad) < len(pictures):
                remedy += ", or add --skip-bad, which leaves them out"
            raise ValueError(f"{len(bad):,} of {len(pictures):,} pictures are bad; they are listed "
                             f"above. {out} was not written. {remedy}.")
        settings = writer.finish(settings)
        sidecar = {"classes": classes, "settings": settings, "counts": counts, "left_out": bad}
        root = root_of(args.data_dir) if args.data_dir else "demo"
        names = [folder_in_source(picture.path, root) + picture.name for picture in written]
        with write_aside(sidecar_of(out)) as sidecar_file:  # these two get their names first
            sidecar_file.write(json.dumps(sidecar, indent=1).encode())
        with write_aside(names_of(out)) as names_file:
            names_file.write(names_bytes(names, settings["checksum"]))
    seconds = time.monotonic() - t0
    all_classes_expected = classes is not None and not args.classes and not args.limit
    if all_classes_expected:
        print_empty_classes(classes, written)
    print_account(out, written, classes, counts, bad, not_taken, seconds)


# --- account
def print_empty_classes(classes, pictures):
    """Names the classes of which no picture is left."""
    used = {picture.label for picture in pictures}
    empty = [name for number, name in enumerate(classes) if number not in used]
    if empty:
        print_text(f"classes without a picture: {len(empty):,} ({shorten(empty)})")


def print_account(out, written, classes, counts, bad, not_taken, seconds):
    """The last line: each picture that was seen is in one of its numbers."""
    parts = [f"{len(written):,} images"]
    parts.append("no labels" if classes is None else f"{len(classes)} classes")
    parts.append(f"{out.stat().st_size / 1e6:,.1f} MB")
    parts += [f"{count:,} {how}" for how, count in sorted(counts.items())]
    parts.append(f"{len(bad):,} left out")
    parts.append(f"{not_taken.pictures:,} not taken")
    speed = len(written) / seconds
    print_text(f"{out}: {', '.join(parts)}, {seconds:.1f} s ({speed:,.0f} images/s)")


# --- verify
def find_fault(reader, i):
    """What is wrong with sample i of a .beton, or None."""
    try:
        data = reader.read(i)
        if reader.settings and reader.modes[i] == JPEG and not is_intact(data):
            return "its bytes do not match their checksum"
        reader.image(i)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def verify(path, exclude_bad, num_workers):
    """Checks all of a .beton: header, tables, names and each sample. Damage ends it with code 1."""
    reader = BetonReader(path)
    if reader.names:
        reader.names.check()
    count = reader.num_samples
    results = in_order(functools.partial(find_fault, reader), range(count), num_workers)
    faults = {i: fault for i, fault in enumerate(results) if fault}
    for i, fault in faults.items():
        print(f"{reader.title(i)}: {fault}", file=sys.stderr)
    if exclude_bad:
        sidecar = {"classes": None}
        if sidecar_of(path).exists():  # it is a builder's, or the reader would have refused it
            sidecar = json.loads(sidecar_of(path).read_text())
        with write_aside(sidecar_of(path)) as file:
            file.write(json.dumps({**sidecar, "excluded": faults}, indent=1).encode())
    else:
        new_faults = set(faults) - set(reader.excluded.tolist())
        if new_faults:
            sys.exit(f"build_beton: {path}: {len(new_faults):,} of {count:,} samples are damaged; "
                     "they are listed above. Copy the file again, or add --exclude-bad, and "
                     "loaders leave them out.")
    print(f"{path}: {count:,} samples verified, {len(faults):,} damaged and excluded")


# --- main
def settings_of(args):
    """The build settings, which stand in the file."""
    return {"essl": ESSL, "max_resolution": args.max_resolution, "quality": args.quality,
            "chroma": args.chroma, "codec": args.codec, "lossless": args.lossless}


def choose_evenly(pictures, limit):
    """At most `limit` pictures from all of the list; 0 means all."""
    count = min(limit or len(pictures), len(pictures))
    return [pictures[i * len(pictures) // count] for i in range(count)]


def build(args):
    """Builds --out from --data-dir."""
    check_replaceable(args.out)
    not_taken = NotTaken()
    pictures, classes = find_data(args.data_dir, args.labels, args.classes, args.unlabelled,
                                  args.columns, not_taken)
    settings = settings_of(args)
    if is_beton(args.data_dir):  # its samples are copied, so its settings are true of them
        settings = {**open_beton(str(args.data_dir)).settings, "essl": ESSL}
    chosen = choose_evenly(pictures, args.limit)
    not_taken.pictures += len(pictures) - len(chosen)
    write_beton(args.out, chosen, classes, settings, args, not_taken)


def build_demo(args):
    """Draws the demo's training and validation set into --out-dir."""
    for split, (name, size) in enumerate(DEMO_SETS):
        out = args.out_dir / f"demo_{name}.beton"
        check_replaceable(out)
        pictures = [DrawnPicture("demo", str(i), i % len(DEMO_CLASSES), split, i)
                    for i in range(args.limit or size)]
        write_beton(out, pictures, DEMO_CLASSES, settings_of(args), args, NotTaken())


def main(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: workers just end
    warnings.simplefilter("ignore")  # Pillow warns of EXIF and palettes that it can live with
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses pictures of twice as many
    try:
        if args.lossless and not hasattr(bind(), "tj3Transform"):
            raise ImportError("--lossless needs libjpeg-turbo 3: `pip install turbojpeg`.")
        if args.verify:
            verify(args.verify, args.exclude_bad, args.num_workers)
        elif args.demo:
            build_demo(args)
        else:
            build(args)
    except (ValueError, FileNotFoundError, NotADirectoryError, ImportError) as error:
        print(f"build_beton: {error}", file=sys.stderr)
        sys.exit(1 if args.verify else 2)
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]  # a worker's traceback stands before it
        sys.exit(f"build_beton: {reason}. Check the path and the disk.")
    except RuntimeError as error:
        sys.exit(f"build_beton: a worker process died: {error} If memory was full, use fewer "
                 "--num-workers.")
    except KeyboardInterrupt:
        sys.exit("build_beton: it was stopped by a signal. Nothing was written.")


if __name__ == "__main__":
    main(get_args())
