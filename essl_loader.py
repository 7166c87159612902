"""Turns a .beton file into batches on the device. Of each JPEG, only the crop is decoded.

    from essl_loader import ESSLLoader
    loader = ESSLLoader("data/train_500_95.beton", batch_size=256)
    for images, labels in loader:   # uint8 (B, 3, 224, 224) in channels_last, int64 (B,)
        ...

The file needs Linux, numpy, numba, torch and libturbojpeg (`pip install turbojpeg`, or Debian's
libturbojpeg0). The kernels compile once, in about 20 seconds; then numba's cache holds them.

Users of the loader read the first part: the format, the reader, order and epochs, the loaders, the
decoder as an operation of FFCV, and what a run checks. "BEHIND THE LOADERS" holds the threads, the
worker processes, and which files of a folder are pictures. "THE KERNELS" make a batch: C library,
vectors, random draws, JPEG, index, resize, and the loop of a thread. Importing the file compiles
nothing and does not load libturbojpeg.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import operator
import os
import queue
import random
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import unicodedata
import warnings
import weakref
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba import carray, objmode, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np.unsafe.ndarray import to_fixed_tuple

# --- format: FFCV's .beton, version 2, little-endian
#
#     | HEADER | FIELD, for each field | SAMPLE, for each sample | pages ... | ALLOC ... |
#
# A sample's bytes lie in a page; SAMPLE says where, and ALLOC how many they are.
HEADER = np.dtype([
    ("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
    ("alloc_table_ptr", "<u8")])
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "S1024")])
MODE_JPEG = 0  # an image's mode; the other one, 1, is raw RGB
IMAGE = np.dtype([
    ("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SAMPLE = np.dtype({  # an IMAGE, and the label at the next multiple of 8
    "names": ["mode", "width", "height", "data_ptr", "label"],
    "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"], "offsets": [0, 1, 3, 5, 16], "itemsize": 24})
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # float, integer, image
MAX_PIXELS_PER_BYTE = 1024  # a JPEG's 8x8 pixels take a bit or more: 512 a byte; twice that
MAX_CLASSES = 100_000  # a larger label is probably an id, not a class
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "class_label", "class_name",
               "classname", "fine_label", "target", "category", "species", "breed",
               "predictionstring")  # of columns and JSON keys that hold labels, in this order

# build_beton.py puts an index of entry points behind each JPEG: | JPEG | entries | TRAILER |.
# FFCV and libjpeg-turbo ignore what follows a JPEG's end. The section "index" describes an entry.
TRAILER = np.dtype([
    ("checksum", "<u8"),  # of the JPEG's headers and the entries; compared at each read
    ("index_size", "<u4"),  # bytes of the entries; 0: there is no index
    ("crc32", "<u4"),  # of all bytes before it; `build_beton.py --verify` compares it
    ("format", "S8")])
TRAILER_SIZE = TRAILER.itemsize
# Where its fields begin, in bytes
CHECKSUM_AT = TRAILER.fields["checksum"][1]
INDEX_SIZE_AT = TRAILER.fields["index_size"][1]
CRC32_AT = TRAILER.fields["crc32"][1]
FORMAT_AT = TRAILER.fields["format"][1]
INDEX_FORMAT = b"ESSLIDX1"
FORMAT_WORD = int.from_bytes(INDEX_FORMAT, "little")
ESSL = 2  # version of what build_beton.py adds to FFCV's format

# Two files lie beside x.beton. x.beton.json, the sidecar, holds class names, settings and excluded
# samples. x.beton.names holds the samples' names: this header, count + 1 offsets (u8) into the text
# that follows them, and the text in UTF-8.
NAMES_HEADER = np.dtype([  # checksum: the .beton's; crc: of the offsets and the text
    ("magic", "S8"), ("checksum", "<u4"), ("crc", "<u4"), ("count", "<u8")])
NAMES_MAGIC = b"ESSLNAME"


class DataError(ValueError):
    """A fault of a data file or folder. Its text says what is wrong, where, and what to do."""


def tables_checksum(header, settings, samples, alloc):
    """crc32 over header, settings (sorted JSON, without their checksum), samples, allocations."""
    settings = {key: value for key, value in settings.items() if key != "checksum"}
    text = json.dumps(settings, sort_keys=True).encode()
    checksum = 0
    for part in (np.ravel(header), np.frombuffer(text, np.uint8), samples, alloc):
        checksum = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), checksum)
    return checksum


def crc32_of(*tables, start=0):
    """crc32 over tables of whole numbers, each taken as int64."""
    checksum = start
    for table in tables:
        checksum = zlib.crc32(np.ascontiguousarray(table, np.int64), checksum)
    return checksum


def sidecar_of(path: str | Path) -> Path:
    """The path of the sidecar: class names, build settings and excluded samples of a .beton."""
    return Path(f"{path}.json")


def is_sidecar(content) -> bool:
    """Whether JSON content is a sidecar that build_beton.py wrote, and not a file of the user's."""
    if not isinstance(content, dict):
        return False
    return "classes" in content and ("settings" in content or "excluded" in content)


def names_of(path: str | Path) -> Path:
    """The path of the file with the samples' names of a .beton."""
    return Path(f"{path}.names")


def one_name(name):
    """A class's name in Unicode's form NFC: macOS writes e and its accent as two characters.

    Anything but text, such as None, is returned unchanged.
    """
    if isinstance(name, str):
        return unicodedata.normalize("NFC", name)
    return name


# --- one sample's bytes
# Codes that kernels return, and what they mean to a person
OK, SHORT_READ, BROKEN, OTHER_SIZE, OTHER_KIND = range(5)  # OTHER_KIND: libjpeg-turbo decodes it
REASONS = {
    SHORT_READ: "it cannot be read: the file ends inside it, or the disk fails",
    BROKEN: "its JPEG data, or their index, are damaged",
    OTHER_SIZE: "its own size and the one in the file's table differ"}


def add_index(jpeg: bytes, width: int, height: int) -> tuple[bytes, bool]:
    """Puts an index behind a JPEG -> (JPEG, entries and TRAILER; whether it has entries).

    A JPEG that the loader's own decoder cannot read gets a TRAILER without entries. libjpeg-turbo
    then decodes the whole picture, or finds that it is damaged.
    """
    bind()
    most_units = -(-width // (16 * UNIT_WIDTH)) * -(-height // 8)
    entries = np.zeros(most_units + 2, np.int64)  # + the last unit's end, + the checksum
    stored = np.frombuffer(jpeg, np.uint8)
    with kernel_cache(index_jpeg, COMPILING):
        memory, scratch = make_scratch(np.array([len(jpeg)]), np.array([width]),
                                       np.array([height]), 1)
        index_size = index_jpeg(Stored(stored.ctypes.data, len(jpeg), MODE_JPEG, width, height),
                                entries.ctypes.data, scratch)
    trailer = np.zeros((), TRAILER)
    if index_size > 0:
        trailer["checksum"] = entries[index_size // 8].view(np.uint64)  # behind the entries
    trailer["index_size"] = index_size
    trailer["format"] = INDEX_FORMAT
    sample = jpeg + entries.tobytes()[:index_size] + trailer.tobytes()
    trailer["crc32"] = zlib.crc32(sample[:-TRAILER_SIZE + CRC32_AT])
    return sample[:-TRAILER_SIZE] + trailer.tobytes(), index_size > 0


def remove_index(sample: bytes) -> bytes:
    """The JPEG of a sample that add_index made."""
    index_size = int(np.frombuffer(sample[-TRAILER_SIZE:], TRAILER)["index_size"][0])
    return sample[:-TRAILER_SIZE - index_size]


def is_intact(sample: bytes) -> bool:
    """Whether all bytes of a sample are still as add_index made them."""
    trailer = np.frombuffer(sample[-TRAILER_SIZE:].rjust(TRAILER_SIZE), TRAILER)[0]
    checksum = zlib.crc32(sample[:-TRAILER_SIZE + CRC32_AT])
    return bool(trailer["format"] == INDEX_FORMAT and trailer["crc32"] == checksum)


def decode_jpeg(jpeg: bytes, width: int, height: int) -> tuple[int, np.ndarray]:
    """libjpeg-turbo decodes a whole JPEG -> (OK or a key of REASONS, RGB).

    RGB: uint8 (3 * height * width,), interleaved.
    """
    bind()
    stored = np.frombuffer(jpeg, np.uint8)
    pixels = np.empty(3 * width * height, np.uint8)
    with kernel_cache(decode_rgb):
        code = decode_rgb(Stored(stored.ctypes.data, len(jpeg), MODE_JPEG, width, height),
                          pixels.ctypes.data)
    return code, pixels


# --- reader
class Names(Sequence):
    """The samples' names of a .beton. The file is mapped; a name is read when it is asked for."""

    def __init__(self, path, checksum, count):
        self.path = path
        not_its_names = DataError(f"{path}: not the names of the .beton beside it. Build both "
                                  "again, or remove this file to go on without names.")
        data = np.zeros(0, np.uint8)
        if path.stat().st_size > 0:  # np.memmap refuses an empty file
            data = np.memmap(path, np.uint8, "r")
        start = NAMES_HEADER.itemsize
        text_start = start + 8 * (count + 1)
        if len(data) < text_start:
            raise not_its_names
        header = data[:start].view(NAMES_HEADER)[0]
        if header["magic"] != NAMES_MAGIC or header["checksum"] != checksum:
            raise not_its_names
        self._content = memoryview(data[start:])  # reads five times as fast as an array
        self._offsets = self._content[:text_start - start].cast("Q")
        self._text = self._content[text_start - start:]
        if header["count"] != count or self._offsets[-1] != len(self._text):
            raise not_its_names
        self._crc = int(header["crc"])

    def __len__(self):
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.path}: there is no name {i}, it holds {len(self):,}")
        i %= len(self)
        name = bytes(self._text[self._offsets[i]:self._offsets[i + 1]])
        # A file's name need not be UTF-8; os.fsdecode turns such bytes into the same characters
        return name.decode("utf-8", "surrogateescape")

    def check(self):
        """Reads the whole file. Raises DataError if a bit is not as it was written."""
        if zlib.crc32(self._content) != self._crc:
            raise DataError(f"{self.path}: it does not match its checksum. Copy it again, or "
                            "remove it to go on without names.")


class BetonReader:
    """Reads a .beton file: its tables, which are checked against the file, and single samples.

    Attributes, where arrays are int64 with one entry a sample:
        num_samples
        labels: -1 where a sample has none
        widths, heights: in pixels
        modes, ptrs, sizes: 0 for JPEG, 1 for raw RGB; the first byte in the file; how many bytes
        settings: those of build_beton.py as a dict, which is empty for a file that FFCV wrote
        classes: the classes' names, or None
        names: the samples' names, each a path in its source, or None
        excluded: sorted samples that `build_beton.py --verify FILE --exclude-bad` found damaged;
            loaders leave them out
        checksum: another number for other data
    Raises DataError for the file.
    """

    def __init__(self, path: str | Path):
        bind()
        self.path = Path(path)
        if not self.path.is_file():
            if self.path.suffix != ".beton":
                raise DataError(f"{path}: not found. Give a .beton file, or a folder of pictures.")
            raise DataError(f"{path}: no such file. Build it: `python build_beton.py --data-dir "
                            f"PICTURES --out {shlex.quote(str(path))}`, or draw a small one, "
                            "data/demo_train.beton: `python build_beton.py --demo`.")
        self.file = open(self.path, "rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self._read_tables()
        self._read_sidecar()
        checksum = self.settings.get("checksum")
        self.names = None
        if names_of(path).is_file():
            self.names = Names(names_of(path), checksum, self.num_samples)
        if checksum is None:  # FFCV wrote this file
            checksum = crc32_of(self.labels, self.sizes, self.widths, self.heights)
        self.checksum = checksum

    def read(self, i: int) -> bytes:
        """The stored bytes of sample i."""
        data = self._bytes(int(self.sizes[i]), int(self.ptrs[i]))
        if len(data) != self.sizes[i]:
            raise self.sample_error(i, REASONS[SHORT_READ])
        return data

    def image(self, i: int) -> np.ndarray:
        """Sample i as uint8 (height, width, 3), decoded by libjpeg-turbo."""
        width = int(self.widths[i])
        height = int(self.heights[i])
        stored = self.read(i)
        if self.modes[i] == MODE_JPEG:
            code, pixels = decode_jpeg(stored, width, height)
        else:
            code = OK if len(stored) == 3 * width * height else OTHER_SIZE
            pixels = np.frombuffer(stored, np.uint8)
        if code != OK:
            raise self.sample_error(i, REASONS[code])
        return pixels.reshape(height, width, 3).copy()

    def title(self, i):
        """What messages call sample i."""
        if self.names is None:
            return f"sample {i}"
        return f"sample {i} ({self.names[i]})"

    def sample_error(self, i, reason):
        """A DataError for sample i. It says how to go on without this sample."""
        return DataError(f"{self.path}: {self.title(i)}: {reason}. `python build_beton.py --verify "
                         f"{shlex.quote(str(self.path))} --exclude-bad` records every damaged "
                         "sample, so that loaders leave it out.")

    def close(self):
        self.file.close()

    def __getstate__(self):
        """What pickle keeps: no tables, but what __setstate__ needs to open the same file."""
        return {"path": self.path, "size": self.size, "settings": self.settings,
                "labels": zlib.crc32(self.labels)}

    def __setstate__(self, state):
        self.__init__(state["path"])
        if self.__getstate__() != state:
            raise DataError(f"{self.path}: the file has changed since this reader was pickled. "
                            "Open it anew.")

    def _error(self, found):
        return DataError(f"{self.path}: {found}. The file is not a complete .beton of version 2; "
                         "build it again.")

    def _bytes(self, size, offset):
        """`size` bytes from an offset on, or fewer where the file ends."""
        data = b""
        while part := os.pread(self.file.fileno(), size - len(data), offset + len(data)):
            data += part  # one read may return only a part
        return data

    def _table(self, dtype, count, offset):
        size = count * dtype.itemsize
        if offset + size > self.size:
            raise self._error(f"it ends at byte {self.size:,}, a table at byte {offset + size:,}")
        return np.frombuffer(self._bytes(size, offset), dtype)

    def _read_tables(self):
        header = self._table(HEADER, 1, 0)[0]
        version, num_fields, self.page_size, self.num_samples, alloc_ptr = header.item()
        num_alloc, rest = divmod(self.size - alloc_ptr, ALLOC.itemsize)
        is_header = version == 2 and 1 <= num_fields <= 64 and self.page_size > 0
        if not is_header or self.num_samples < 1 or num_alloc < 1 or rest:
            raise self._error(f"its header is {dict(zip(HEADER.names, header.item()))}")
        fields = self._table(FIELD, num_fields, HEADER.itemsize)
        kinds = fields["type_id"].tolist()
        if kinds.count(2) != 1 or not set(kinds) <= set(FIELD_TYPES):
            raise DataError(f"{self.path}: its fields have FFCV's types {kinds}: expected one "
                            "image (2), and else floats (0) and integers (1) alone. Write the file "
                            "again without the other fields.")
        columns = [(f"f{i}", FIELD_TYPES[kind]) for i, kind in enumerate(kinds)]
        start = HEADER.itemsize + fields.nbytes
        samples = self._table(np.dtype(columns, align=True), self.num_samples, start)
        alloc = self._table(ALLOC, num_alloc, alloc_ptr)
        image = kinds.index(2)
        self._read_settings(fields["arguments"][image], header, samples, alloc)
        self.labels = np.full(self.num_samples, -1)
        if 1 in kinds:
            self.labels = samples[self._label_field(fields)].astype(np.int64)
        self.modes, self.widths, self.heights, self.ptrs = (
            samples[f"f{image}"][name].astype(np.int64) for name in IMAGE.names)
        self._find_samples(alloc, start + samples.nbytes, alloc_ptr)

    def _read_settings(self, arguments, header, samples, alloc):
        """build_beton.py's settings, with their checksum. FFCV leaves these bytes 0."""
        try:
            text = bytes(arguments).rstrip(b"\0")
            self.settings = dict(json.loads(text or "{}"))
        except (ValueError, TypeError, RecursionError):
            raise self._error("its build settings cannot be read") from None
        checksum = tables_checksum(header, self.settings, samples, alloc)
        ours = self.settings.get("essl") == ESSL and self.settings.get("checksum") == checksum
        if self.settings and not ours:
            raise self._error("the checksum over its header and tables does not match, or an "
                              "earlier build_beton.py made it")

    def _label_field(self, fields):
        """The field with the labels: the only one of whole numbers, or one with a known name."""
        names = [name.decode(errors="replace").casefold() for name in fields["name"]]
        numbers = [i for i, kind in enumerate(fields["type_id"].tolist()) if kind == 1]
        for known in LABEL_NAMES:
            if known in names and names.index(known) in numbers:
                return f"f{names.index(known)}"
        if len(numbers) > 1:
            raise DataError(f"{self.path}: which field holds the labels? It has "
                            f"{', '.join(names[i] for i in numbers)}. Write the file with one "
                            "field that is called label.")
        return f"f{numbers[0]}"

    def _find_samples(self, alloc, begin, end):
        """Sets sizes, which stand in the allocation table only, and checks each sample's place.

        A table's word alone takes no memory: a picture that is too large for its bytes is refused.
        """
        places = alloc["ptr"].astype(np.int64)  # a false 2**63 becomes negative
        order = np.argsort(places, kind="stable")
        rows = order.take(np.searchsorted(places, self.ptrs, sorter=order), mode="clip")
        self.sizes = alloc["size"][rows].astype(np.int64)
        valid = places[rows] == self.ptrs
        valid &= (self.ptrs >= begin) & (self.sizes <= end - self.ptrs)
        valid &= (self.sizes > 0) & (self.widths > 0) & (self.heights > 0) & (self.modes <= 1)
        valid &= self.widths * self.heights <= self.sizes * MAX_PIXELS_PER_BYTE
        if not valid.all():
            i = int(np.argmin(valid))
            raise self._error(f"sample {i} ({self.widths[i]}x{self.heights[i]}, mode "
                              f"{self.modes[i]}) has no valid place in it")

    def _read_sidecar(self):
        """Sets classes and excluded. A file that FFCV wrote has no sidecar."""
        sidecar = sidecar_of(self.path)
        content = {"classes": None, "excluded": {}}
        if not sidecar.is_file():
            self._check_old_sidecar()
        try:
            if sidecar.is_file():
                content = json.loads(sidecar.read_text())
            if not is_sidecar(content):
                raise ValueError("build_beton.py did not write it")
            self.classes = content["classes"]
            if self.classes is not None:
                self.classes = [one_name(name) for name in self.classes]
            build = content.get("settings", self.settings)
            if build.get("checksum") != self.settings.get("checksum"):
                raise ValueError("it belongs to another build")
            excluded = sorted(int(number) for number in content.get("excluded") or {})
            if excluded and not 0 <= excluded[0] <= excluded[-1] < self.num_samples:
                raise ValueError(f"it excludes samples {excluded[0]} to {excluded[-1]}")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(f"{sidecar}: not the sidecar of {self.path}, which has "
                            f"{self.num_samples:,} samples ({error}). Build both again, or remove "
                            "the sidecar to go on without class names, with all samples.") from None
        self.excluded = np.array(excluded, np.int64)

    def _check_old_sidecar(self):
        """Raises DataError for a sidecar with the name that earlier versions gave it, x.json.

        Without it class names and excluded samples would be lost in silence.
        """
        old = self.path.with_suffix(".json")
        if old == self.path or not old.is_file():
            return
        with open(old, "rb") as file:  # a file of the user's may be large: its first bytes tell
            if not file.read(13).startswith(b'{\n "classes":'):
                return
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(old.read_text())
        if not is_sidecar(content):
            return
        checksum = content.get("settings", {}).get("checksum")
        if checksum == self.settings.get("checksum"):
            raise DataError(f"{old} is the sidecar of {self.path}, with the name that earlier "
                            f"versions gave it. Rename it: mv '{old}' '{sidecar_of(self.path)}'")


# --- order, epochs and stages: what both loaders share
INTERPOLATIONS = ("bicubic", "bilinear")
AHEAD = 3  # batches being filled, with the one that is asked for; FolderLoader: of each process


def usable_cores() -> int:
    """Cores for this process: affinity and cgroup quota, shared among torchrun's local ranks."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # without cgroup v2 there is no quota
        name = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        for folder in (Path("/sys/fs/cgroup") / name / "cpu.max").parents:
            with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
                quota, period = (folder / "cpu.max").read_text().split()
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_argument(name, value, is_good, expected):
    """Raises ValueError for an argument that is not as expected."""
    if not is_good:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


class EpochLoader(contextlib.AbstractContextManager):
    """What both loaders share. Which sample comes when is a pure function of (seed, epoch).

    Arguments of ESSLLoader and FolderLoader:
        path: the .beton file, or the folder
        batch_size: images in a batch of this process
        train: random crops and flips in random order; else the centre of each picture, in order
        res: side of the images, in pixels
        scale: limits of a random crop's area, as a share of the picture's
        ratio: limits of a random crop's width / height
        hflip: probability of a flip in training
        crop_ratio: side of the central square in evaluation, as a share of the short side
        interpolation: "bicubic", MAE's recipe, or "bilinear"; antialiased as in Pillow
        num_workers: threads of ESSLLoader, processes of FolderLoader; 0: all usable cores
        seed: another seed gives other orders, crops and flips
        rank, world_size: this process reads every world_size-th sample, from number rank on. None
            stands for 1, and warns where torch.distributed or torchrun has more processes
        drop_last: whether a last batch that is not full is left out; None: in training only
        device: where the batches go
        indices: the samples of an epoch; None: all. See set_indices
        order: "random", or "pages" for files larger than memory: it shuffles within 512 MB
        views: crops of each sample; more than 1 in training only
        return_index: whether a batch also has its samples' numbers in the file, int64 (B,)
        transform: ESSLLoader's takes a batch of images, FolderLoader's a Pillow picture
    data: what the subclass has opened: labels, classes, names, excluded and checksum.
    Raises ValueError for an argument.
    """

    def __init__(self, data, path: str | Path, batch_size: int, train: bool = True, res: int = 224,
                 scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3), hflip: float = 0.5,
                 crop_ratio: float = 224 / 256, interpolation: str = "bicubic",
                 num_workers: int = 0, seed: int = 0, rank: int = 0, world_size: int | None = None,
                 drop_last: bool | None = None, device: str | torch.device = "cpu",
                 indices: np.ndarray | list[int] | None = None, order: str = "random",
                 views: int = 1, return_index: bool = False, transform=None):
        self.labels = data.labels
        self.classes = data.classes
        self.names = data.names
        self.excluded = data.excluded
        self.checksum = data.checksum
        self._warn_of_ranks = world_size is None
        if world_size is None:
            world_size = 1
        check_argument("order", order, order in ("random", "pages"), "'random' or 'pages'")
        check_argument("interpolation", interpolation, interpolation in INTERPOLATIONS,
                       INTERPOLATIONS)
        check_argument("rank", rank, 0 <= rank < world_size,
                       f"0 to {world_size - 1}, because world_size is {world_size}")
        check_argument("batch_size", batch_size, batch_size >= 1, "at least 1")
        check_argument("num_workers", num_workers, num_workers >= 0, "at least 0")
        check_argument("views", views, views >= 1, "at least 1")
        check_argument("views", views, train or views == 1, "1, because train=False has one crop")
        check_argument("ratio", ratio, 0 < ratio[0] <= ratio[1], "0 < low <= high")
        check_argument("hflip", hflip, 0 <= hflip <= 1, "from 0 to 1")
        check_argument("seed", seed, seed >= 0, "at least 0")
        check_argument("crop_ratio", crop_ratio, 0 < crop_ratio <= 1, "above 0, at most 1")
        self.path = path
        self.batch_size = batch_size
        self.train = bool(train)
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.hflip = float(hflip)
        self.crop_ratio = float(crop_ratio)
        self.interpolation = interpolation
        self.num_workers = num_workers or usable_cores()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = self.train if drop_last is None else drop_last
        self.device = torch.device(device)
        self.order = order
        self.views = views
        self.return_index = return_index
        self.transform = transform
        self.closed = False
        self._process = os.getpid()
        self._stream = None
        if self.device.type == "cuda":
            check_argument("device", str(device), torch.cuda.is_available(),
                           "'cpu', because torch finds no usable CUDA device: install a driver "
                           "that fits this torch")
            self._stream = torch.cuda.Stream(self.device)
        self.set_indices(np.arange(len(self.labels)) if indices is None else indices)
        self.set_stage(res, scale)
        self.set_epoch(0)
        self._check_length()

    @property
    def indices(self):
        """The samples of an epoch, int64; to set it is to call set_indices."""
        return self._indices

    @indices.setter
    def indices(self, indices):
        self.set_indices(indices)

    def set_indices(self, indices: np.ndarray | list[int]):
        """Sets the samples from the next epoch on; train=False takes them in this order.

        A sample may be there several times, and gets another crop each time: for class-balanced
        epochs or hard examples. Give all ranks the same list, in the same order. Raises ValueError
        for what is no list of samples.
        """
        total = len(self.labels)
        array = np.asarray(indices)
        is_list = array.dtype.kind in "iu" and array.ndim == 1 and array.size > 0
        if not is_list or array.min() < 0 or array.max() >= total:
            limits = ""
            if is_list:
                limits = f", from {array.min()} to {array.max()}"
            raise ValueError(f"{self.path}: indices of type {array.dtype} and shape {array.shape}"
                             f"{limits}: expected a list of samples, whole numbers from 0 to "
                             f"{total - 1}. Of a mask take np.flatnonzero(mask).")
        self._indices = array.astype(np.int64)
        self._indices.flags.writeable = False  # the loader would not see a change in place
        # An order is drawn with the excluded samples, and leaves them out afterwards. So a run that
        # a damaged sample ended goes on with the same order and crops of the other samples.
        self._kept = ~np.isin(self._indices, self.excluded)
        self.num_samples = int(self._kept.sum())

    def set_stage(self, res: int | None = None, scale: tuple[float, float] | None = None):
        """Sets the images' side in pixels, and the crops' share of the area, from the next epoch
        on. None keeps what is set.
        """
        if res is not None:
            check_argument("res", res, res >= 1, "at least 1 pixel")
            self.res = int(res)
        if scale is not None:
            check_argument("scale", scale, 0 < scale[0] <= scale[1] <= 1, "0 < low <= high <= 1")
            self.scale = (float(scale[0]), float(scale[1]))

    def set_epoch(self, epoch: int):
        """The next iteration is this epoch, from its start. Without calls they count from 0."""
        self.epoch = int(epoch)
        self.batch = 0
        self._started = False

    def state_dict(self) -> dict:
        """Where the iteration stands, in samples of all ranks, so that another number of ranks can
        go on from it, and the stage of this epoch.
        """
        indices = self.indices
        res, scale = self.res, self.scale
        if self._started:  # what was set since the epoch began counts from the next one on
            indices = self._epoch_indices
            res, scale = self._epoch_stage
        return {"epoch": self.epoch, "samples": self.batch * self.batch_size * self.world_size,
                "seed": self.seed, "num_samples": len(indices), "order": self.order,
                "indices": hashlib.sha1(indices).hexdigest(), "res": res, "scale": list(scale)}

    def load_state_dict(self, state: dict):
        """Goes on with exactly the next batch, in the state's stage.

        Raises ValueError if seed, order, indices or batches differ. The content of the file is not
        compared: keep `checksum` beside the state, as pretrain.py does.
        """
        for key, ours in (("seed", self.seed), ("order", self.order)):
            if state[key] != ours:
                raise ValueError(f"{self.path}: the state has {key} {state[key]}, this loader "
                                 f"{ours}. Take the same data and arguments.")
        ours = hashlib.sha1(self.indices).hexdigest()
        same_indices = state.get("indices", ours) == ours  # earlier versions did not keep it
        if state["num_samples"] != len(self.indices) or not same_indices:
            raise ValueError(f"{self.path}: the state has num_samples {state['num_samples']}, this "
                             f"loader has {len(self.indices)}, or they are not the same samples. "
                             "Take the same data; first call set_indices() with the indices of the "
                             "epoch in which the state was saved.")
        batch, rest = divmod(state["samples"], self.batch_size * self.world_size)
        if rest:
            raise ValueError(f"{self.path}: the state is {state['samples']} samples into its "
                             "epoch. Take a batch_size x world_size that divides this number.")
        self.set_epoch(state["epoch"])
        self.batch = batch
        self.set_stage(state["res"], state["scale"])

    def __len__(self):
        """Batches of an epoch."""
        samples = self.num_samples // self.world_size
        if not self.train and self.rank < self.num_samples % self.world_size:
            samples += 1  # in evaluation, the first ranks take the samples that are left
        if self.drop_last:
            return samples // self.batch_size
        return math.ceil(samples / self.batch_size)

    def __iter__(self):
        self._check_usable()
        self._check_length()
        self._check_ranks()
        if self._started:  # an earlier iteration was left early: this is the next epoch
            self.set_epoch(self.epoch + 1)
        self._started = True
        self._epoch_indices = self.indices
        self._epoch_stage = (self.res, self.scale)
        batches = self._host_batches(self._positions(), self.batch)
        if self._stream:
            batches = self._to_device(batches)
        for images, labels, samples in batches:
            images = self._transform_batch(images)
            self.batch += 1
            if self.return_index:
                yield images, labels, samples
            else:
                yield images, labels
        self.set_epoch(self.epoch + 1)

    def _host_batches(self, positions, start):
        """Yields the batches from number `start` on: images, labels, samples. A subclass's own."""
        raise NotImplementedError

    def _transform_batch(self, images):
        return images

    def _positions(self):
        """Positions in `indices` that this rank reads in self.epoch, in order.

        Rank r takes positions r, r + world_size, r + 2 * world_size, ... of the order of all.
        """
        positions = np.arange(len(self.indices))
        if self.train:
            positions = self._shuffle(np.random.default_rng([self.seed, self.epoch]))
        positions = positions[self._kept[positions]]
        if self.train:  # each rank gets as many as the others
            each = len(positions) // self.world_size
            positions = positions[:each * self.world_size]
        return np.ascontiguousarray(positions[self.rank::self.world_size])

    def _shuffle(self, rng):
        return rng.permutation(len(self.indices))

    def _to_device(self, batches):
        """Copies the next batch on a side stream, while the model trains on this one."""
        copies = []  # under way, each with the pinned batch that it reads
        for batch in batches:
            images, labels, samples = batch
            moved = batch if self.return_index else (images, labels)
            with torch.cuda.stream(self._stream):
                tensors = [tensor.to(self.device, non_blocking=True) for tensor in moved]
                copies.append((tensors, batch, self._stream.record_event()))
            if len(copies) > 1:
                yield self._receive(*copies.pop(0))
        for copy in copies:
            yield self._receive(*copy)

    def _receive(self, tensors, batch, copied):
        copied.synchronize()  # usually done; until here `batch` kept its pinned buffer from reuse
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        if not self.return_index:
            tensors.append(None)  # in the place of the samples
        return tuple(tensors)

    def _check_length(self):
        if self.num_samples == 0:
            raise DataError(f"{self.path}: all its samples are excluded as damaged. Build it "
                            "again.")
        if len(self) == 0:
            remedy = f"Take at most {self.num_samples} rank(s), or more pictures."
            if self.num_samples >= self.world_size:
                remedy = (f"Take a batch of at most {self.num_samples // self.world_size}, or "
                          "drop_last=False.")
            raise DataError(f"{self.path}: {self.num_samples} samples on {self.world_size} rank(s) "
                            f"do not fill one batch of {self.batch_size} on each. {remedy}")

    def _check_ranks(self):
        """Warns once if other processes seem to read the same samples."""
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
        if self._warn_of_ranks and processes > 1:
            warnings.warn(f"{self.path}: each of {processes} processes reads all samples. Give the "
                          "loader rank and world_size, so that each reads its share, or "
                          "world_size=1 if this is meant.")
        self._warn_of_ranks = False

    def _check_usable(self):
        if self.closed:
            raise RuntimeError(f"{self.path}: this loader is closed. Make a new one.")
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.path}: this loader was made in process {self._process} and "
                               f"has no threads in its fork {os.getpid()}. Make one there.")

    def __getstate__(self):
        """What pickle keeps: the arguments, and where the iteration stands."""
        if self.closed:
            raise RuntimeError(f"{self.path}: this loader is closed, it cannot be pickled.")
        if self._started and (self._epoch_indices is not self.indices
                              or self._epoch_stage != (self.res, self.scale)):
            raise RuntimeError(f"{self.path}: set_indices() or set_stage() was called within an "
                               "epoch. Pickle the loader before that, or after set_epoch().")
        arguments = {name: getattr(self, name) for name in ARGUMENTS}
        if self._warn_of_ranks:
            arguments["world_size"] = None
        return {"arguments": arguments, "state": self.state_dict(),
                "labels": zlib.crc32(self.labels)}

    def __setstate__(self, state):
        """Opens the data again, for example in a process started by spawn, and goes on with the
        next batch. Raises what the constructor and load_state_dict raise.
        """
        self.__init__(**state["arguments"])
        if zlib.crc32(self.labels) != state["labels"]:
            raise DataError(f"{self.path}: its labels have changed since the loader was pickled. "
                            "Make a new loader.")
        self.load_state_dict(state["state"])

    def close(self):
        self.closed = True

    def __exit__(self, *exc):
        self.close()


# The arguments of both loaders, for help(). Each must be an attribute of the same name: pickling
# reads it.
PARAMETERS = list(inspect.signature(EpochLoader).parameters.values())[1:]
SIGNATURE = inspect.Signature(PARAMETERS)
ARGUMENTS = [parameter.name for parameter in PARAMETERS]


# --- loader over a .beton file
WINDOW = 512 << 20  # bytes in which order="pages" shuffles


class ESSLLoader(EpochLoader):
    """Batches of a .beton file: uint8 (B, 3, res, res) in channels_last memory, and int64 (B,).

        ESSLLoader(path, batch_size, train=True, ...); EpochLoader lists the arguments.

    Training takes RandomResizedCrop(scale, ratio), and a flip with probability hflip. Evaluation
    takes the central square of crop_ratio of the short side. With views=V a batch has V crops of
    each sample: (V, B, 3, res, res).
    Crops and flips depend only on (seed, epoch, position in indices) and the stage, and the order
    on (seed, epoch): not on num_workers. Evaluation visits each sample once over all ranks, so a
    rank may have one batch more than another. Training leaves out the samples that do not fill all
    ranks, and the last batch if it is not full. After a loop that is left early, the next one is
    the next epoch.
    transform: a function of a whole batch of images; its result takes their place. It is called on
    the device, in evaluation too.
    On a CUDA device, four batches lie in pinned memory; each takes the next power of two of bytes.
    A loader can be pickled: the copy opens the file again.
    Raises ValueError for an argument and DataError for the file; both say what to do.
    """

    __signature__ = SIGNATURE

    def __init__(self, path: str | Path, *arguments, **named_arguments):
        self.reader = BetonReader(path)
        self.free_buffers = []  # memory for batches, which no tensor uses
        self._epochs = set()
        super().__init__(self.reader, path, *arguments, **named_arguments)

    def _transform_batch(self, images):
        if self.transform:
            return self.transform(images)
        return images

    def _shuffle(self, rng):
        """order="pages" shuffles within windows of WINDOW bytes, and the windows themselves.

        All ranks read the same window at a time. Its borders differ from epoch to epoch.
        """
        if self.order == "random":
            return super()._shuffle(rng)
        window_pages = max(1, WINDOW // self.reader.page_size)
        page = self.reader.ptrs[self.indices] // self.reader.page_size
        window = (page + rng.integers(window_pages)) // window_pages
        turn = rng.permutation(int(window.max()) + 1)[window]  # when each sample's window comes
        return np.lexsort((rng.random(len(window)), turn))

    def _host_batches(self, positions, start):
        epoch = Epoch(self, positions, start)
        self._epochs.add(epoch)
        try:
            for batch in range(start, epoch.end):
                yield epoch.take_batch(batch)
        finally:
            epoch.stop()
            self._epochs.discard(epoch)

    def close(self):
        """Stops the threads, also of an iteration under way, and closes the file."""
        super().close()
        for epoch in list(self._epochs):
            epoch.stop()
        self.reader.close()


# --- loader over a folder of pictures
class FolderLoader(EpochLoader):
    """Batches of the same shapes from a folder of pictures, by Pillow and torch's DataLoader.

        FolderLoader(path, batch_size, train=True, ...); EpochLoader lists the arguments.

    The folder holds class folders, or is a flat folder of pictures, whose labels are -1; see
    list_folder and folder_classes. What is not taken is printed once. The same seed gives
    ESSLLoader's order, and its crops as shares of the picture; order="pages" is "random" here.
    transform: a function of the Pillow picture, after its crop and flip, in training only (RandAug
    for Table 6).
    Raises ValueError for an argument, and DataError for the folder or a picture.
    """

    __signature__ = SIGNATURE

    def __init__(self, path: str | Path, *arguments, **named_arguments):
        data = PictureFolder(path)
        self.paths = data.paths
        super().__init__(data, path, *arguments, **named_arguments)

    def __getitem__(self, position):
        """For the DataLoader: crops (views, res, res, 3) uint8, label, sample, fault or ""."""
        sample = self.indices[position]
        crops = np.zeros((self.views, self.res, self.res, 3), np.uint8)
        try:
            picture = self._open_picture(sample)
            for view in range(self.views):
                crops[view] = self._crop(picture, sample, position, view)
        except DataError as error:  # the DataLoader would add a worker's traceback to it
            return crops, 0, sample, str(error)
        return crops, self.labels[sample], sample, ""

    def _open_picture(self, sample):
        """A sample as a Pillow picture, RGB and upright. Raises DataError if it is damaged."""
        from PIL import Image, ImageOps
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
        try:
            with Image.open(self.paths[sample]) as picture:
                picture.load()
                with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
                    ImageOps.exif_transpose(picture, in_place=True)
                if picture.mode[0] in "IF":  # convert() would clip 16-bit grey at 255
                    raise ValueError(f"it has more than 8 bits a pixel (mode {picture.mode})")
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.paths[sample]}: cannot be decoded ({error}). Remove it, or build a file "
                "without it: `python build_beton.py --skip-bad --data-dir "
                f"{shlex.quote(str(self.path))} --out FILE.beton`.") from None

    def _crop(self, picture, sample, position, view):
        """A view of a picture: (res, res, 3) uint8, or a Pillow picture of this size."""
        from PIL import Image, ImageOps
        key = (self.seed, self.epoch, position)
        if self.train:
            x, y, w, h = random_box(*picture.size, self.scale, self.ratio, *key, view)
        else:
            x, y, w, h = center_box(*picture.size, self.crop_ratio)
        resample = Image.Resampling[self.interpolation.upper()]
        crop = picture.crop((x, y, x + w, y + h)).resize((self.res, self.res), resample)
        if not self.train:
            return crop
        flip_draw = VIEW_DRAWS * view + FLIP_DRAW
        if uniform(*key, flip_draw) < self.hflip:
            crop = ImageOps.mirror(crop)
        if self.transform:
            number = int(uniform(*key, flip_draw + 1) * 2 ** 32)
            crop = self._transform_crop(crop, sample, number)
        return crop

    def _transform_crop(self, crop, sample, number):
        """What the user's transform makes of a crop. Raises DataError if it fails.

        number: the seed of the generators that transforms draw from; a worker process has its own.
        """
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        expected = (self.res, self.res, 3)
        try:
            crop = np.asarray(self.transform(crop))
            if crop.shape != expected or crop.dtype != np.uint8:
                raise ValueError(f"expected uint8 of shape {expected} from it, found {crop.dtype} "
                                 f"of shape {crop.shape}")
        except Exception as error:  # the user's function can raise anything
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise DataError(f"{self.paths[sample]}: transform failed on it: {error!r}, "
                            f"{at.filename}, line {at.lineno}. Correct the transform.") from None
        return crop

    def _host_batches(self, positions, start):
        size = self.batch_size
        needed = (self.num_workers * AHEAD + 1) * self.views * size * 3 * self.res ** 2
        check_shared_memory(needed, "take fewer num_workers")
        with kernel_cache(random_box):  # compiles here, before the worker processes start
            random_box(8, 8, self.scale, self.ratio, self.seed, 0, 0, 0)
            center_box(8, 8, self.crop_ratio)
            uniform(self.seed, 0, 0, 0)
        batches = [positions[b * size:(b + 1) * size].tolist() for b in range(start, len(self))]
        for images, labels, samples, faults in torch.utils.data.DataLoader(
                self, batch_sampler=batches, num_workers=self.num_workers, prefetch_factor=AHEAD,
                pin_memory=self.device.type == "cuda", multiprocessing_context="fork",
                generator=torch.Generator(), worker_init_fn=start_folder_worker):
            for fault in faults:
                if fault:
                    raise DataError(fault)
            images = images.permute(1, 0, 4, 2, 3)  # (views, B, 3, res, res)
            if self.views == 1:
                images = images[0]
            yield images, labels, samples


class PictureFolder:
    """The pictures of a folder, as FolderLoader needs them. Raises DataError for the folder.

    Attributes: paths; names, the paths from the folder on; labels (int64, -1 in a flat folder);
    classes (names, or None); excluded (none); checksum (of names and labels).
    """

    def __init__(self, path):
        not_taken = NotTaken()
        names, archives = list_folder(path, not_taken)
        for name in archives:
            not_taken.add(ARCHIVE, name)
        if not names:
            raise DataError(f"{path}: expected class folders of pictures, or pictures, and "
                            f"found none. Not taken: {not_taken}.")
        self.names = sorted(names, key=folder_order)
        labels = folder_classes(self.names, path, not_taken)
        self.classes = None
        self.labels = np.full(len(names), -1)
        if labels:
            self.classes = sorted(set(labels))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = np.array([numbers[label] for label in labels], np.int64)
        if not_taken.names:
            print_once(f"{path}: not taken: {not_taken}")
        folder = os.path.realpath(path)
        self.paths = [os.path.join(folder, name) for name in self.names]
        self.excluded = np.zeros(0, np.int64)
        self.checksum = crc32_of(self.labels, start=zlib.crc32("\n".join(self.names).encode()))


def open_loader(path: str | Path, batch_size: int, train: bool = True, **arguments):
    """Opens an ESSLLoader for a file, or a FolderLoader for a folder. Their transforms differ."""
    loader = FolderLoader if Path(path).is_dir() else ESSLLoader
    return loader(path, batch_size, train, **arguments)


# --- the same decoder as an operation of FFCV
def ffcv_decoder(output_size: tuple[int, int] = (224, 224),
                 scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3),
                 interpolation: str = "bicubic", seed: int = 0):
    """An FFCV Operation for the place of RandomResizedCropRGBImageDecoder.

    It decodes only the crop, to uint8 (B, res, res, 3). Pipelines are as in FFCV's documentation,
    for example {"image": [ffcv_decoder(), RandomHorizontalFlip(), ToTensor(), ...]}. A crop is a
    function of (seed, number of the batch, sample). Batches count from 0 in each process, so give a
    resumed run another seed. The number of a damaged sample is printed to stderr, and the program
    is interrupted (KeyboardInterrupt).
    Raises ValueError for an argument.
    """
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    res = int(output_size[0])
    check_argument("output_size", output_size, res == output_size[1], "a square")
    check_argument("interpolation", interpolation, interpolation in INTERPOLATIONS, INTERPOLATIONS)
    crops = FfcvCrops(res=res, bicubic=interpolation == "bicubic",
                      scale=(float(scale[0]), float(scale[1])),
                      ratio=(float(ratio[0]), float(ratio[1])), seed=seed)
    bind()
    with kernel_cache(fill_share, COMPILING):  # compiles here, not while FFCV compiles
        fill_share(np.zeros((0, ROW_WORDS), np.int64), 0, 1, 0, crops)

    class CropDecoder(SimpleRGBImageDecoder):  # FFCV accepts only its own class as a decoder
        def declare_state_and_memory(self, previous_state):
            memory = AllocationQuery((res, res, 3), np.dtype("u1"))
            return replace(previous_state, jit_mode=True, shape=memory.shape,
                           dtype=memory.dtype), memory

        def generate_code(self):
            read = self.memory_read
            parallel = Compiler.get_iterator()
            threads = Compiler.num_threads
            self.batches = np.zeros(1, np.int64)
            counter = self.batches.ctypes.data

            def decode(batch_indices, destination, metadata, storage_state):
                n = len(batch_indices)
                number = atomic_add(counter, 1)
                table = np.empty((n, ROW_WORDS), np.int64)
                for i in range(n):
                    sample = metadata[batch_indices[i]]
                    data = read(sample["data_ptr"], storage_state)
                    row = table[i]
                    row[ROW_ADDRESS] = data.ctypes.data
                    row[ROW_SIZE] = data.size
                    row[ROW_MODE] = sample["mode"]
                    row[ROW_WIDTH] = sample["width"]
                    row[ROW_HEIGHT] = sample["height"]
                    row[ROW_SAMPLE] = batch_indices[i]
                    row[ROW_TO] = destination[i].ctypes.data
                for thread in parallel(threads):
                    # int64, not literals: numba would compile a kernel of its own for each literal
                    fill_share(table, np.int64(thread), np.int64(threads), number, crops)
                codes = table[:, ROW_CODE]
                if codes.max() != OK:
                    sample = batch_indices[np.argmax(codes)]
                    with objmode():
                        interrupt_ffcv(sample)
                    raise ValueError("a sample of the .beton file is damaged")
                return destination[:n]
            decode.is_parallel = True
            return decode
    return CropDecoder()


def interrupt_ffcv(sample):
    """Interrupts the main thread: FFCV's loader would wait for ever for a thread that raised."""
    print(f"essl_loader.ffcv_decoder: sample {sample} is damaged. `python build_beton.py --verify "
          "FILE` lists all damaged samples.", file=sys.stderr)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


# --- what a run checks before it begins
def labels_fault(loader):
    """Why nothing can be learned from a loader's labels, as the end of a sentence, or ""."""
    lowest = int(loader.labels.min())
    highest = int(loader.labels.max())
    if highest < 0:
        return "has no labels"
    if lowest < 0:
        return f"has pictures without a label, the first is sample {np.argmin(loader.labels)}"
    if highest >= MAX_CLASSES:
        return f"has labels up to {highest:,}, which are no numbers of classes"
    if lowest == highest:
        return "has pictures of one class only"
    return ""


def check_labels(loader, classes):
    """Raises DataError if a label of a set to evaluate on is not a number from 0 to classes - 1."""
    lowest = int(loader.labels.min())
    highest = int(loader.labels.max())
    if lowest < 0:
        raise DataError(f"{loader.path} has pictures without a label, the first is sample "
                        f"{np.argmin(loader.labels)}: accuracy cannot be measured on it. Build it "
                        "with class folders, or with --labels.")
    if highest >= classes:
        raise DataError(f"{loader.path} has labels {lowest} to {highest}: expected 0 to "
                        f"{classes - 1}. Build it with --classes TRAIN.beton.")


def check_classes(train, val):
    """Raises DataError if nothing can be learned from the labels, or val has other classes."""
    fault = labels_fault(train)
    if fault:
        raise DataError(f"{train.path} {fault}: nothing can be learned from its labels. Give class "
                        "folders, or --labels to build_beton.py.")
    if train.classes and val.classes and list(train.classes) != list(val.classes):
        differ = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise DataError(f"{val.path} has other classes than {train.path}: they differ in "
                        f"{', '.join(differ[:4])}. Build it with --classes TRAIN.beton.")
    check_labels(val, int(train.labels.max()) + 1)


# ==================================================================================================
# BEHIND THE LOADERS: threads, worker processes, and which files of a folder are pictures
# ==================================================================================================

# --- the threads of ESSLLoader
READ_PIECE = 1 << 20  # bytes of one request to read ahead: of a larger one, Linux reads 8 MB


class Epoch:
    """The threads that fill one epoch's batches.

    An image costs no lock and no Python, and no allocation unless libjpeg-turbo decodes it. A batch
    costs a lock and a wake-up.
    """

    def __init__(self, loader, positions, start):
        self.loader = loader
        self.start = start
        self.end = len(loader)
        self.submitted = start  # the threads may fill the batches before this one
        self.filling = {}  # number of a batch: its memory
        self.complete = set()
        self.events = queue.SimpleQueue()  # from the threads: numbers of batches, or exceptions
        # Queues, not semaphores: the garbage collector may call stop() in any of the threads
        self.wake_ups = queue.SimpleQueue()  # for each batch, one for each thread
        self.reads = queue.SimpleQueue()  # batches that may be read ahead
        self.stopped = False
        self.job = self._make_job(positions)
        if not fill.signatures:
            with kernel_cache(fill, COMPILING):
                memory, scratch = self._make_scratch()
                fill(self.job, scratch, start)  # returns at once: no batch is submitted yet
                advance(self.job.limit, 0)
        work = [self._worker_loop] * loader.num_workers
        if loader.order == "pages":
            work.append(self._read_ahead)
        self.threads = [threading.Thread(target=self._run, args=(f,), daemon=True) for f in work]
        for thread in self.threads:
            thread.start()

    def _make_job(self, positions):
        loader = self.loader
        reader = loader.reader
        return Job(
            fd=reader.file.fileno(), modes=reader.modes, widths=reader.widths,
            heights=reader.heights, ptrs=reader.ptrs, sizes=reader.sizes,
            samples=loader.indices[positions], positions=positions,
            limit=np.array([self.start]), stop=np.zeros(1, np.int64),
            addresses=np.zeros(self.end, np.int64), taken=np.zeros(self.end, np.int64),
            done=np.zeros(self.end, np.int64),
            status=np.zeros((self.end, loader.batch_size), np.int64),
            train=loader.train, res=loader.res, batch_size=loader.batch_size, views=loader.views,
            bicubic=loader.interpolation == "bicubic", seed=loader.seed, epoch=loader.epoch,
            scale=loader.scale, ratio=loader.ratio, hflip=loader.hflip,
            crop_ratio=loader.crop_ratio)

    def _make_scratch(self):
        reader = self.loader.reader
        return make_scratch(reader.sizes, reader.widths, reader.heights, self.job.res)

    def _run(self, work):
        try:
            work()
        except BaseException as error:  # else the caller would wait for a thread that ended
            self.events.put(error)

    def _worker_loop(self):
        memory, scratch = self._make_scratch()  # memory lives as long as this thread
        batch = self.start
        while not self.stopped:
            completed, batch = fill(self.job, scratch, batch)
            if completed >= 0:
                self.events.put(completed)
            else:
                self.wake_ups.get()

    def _read_ahead(self):
        """Asks the system to read the windows of the coming batches, each from its start on."""
        reader = self.loader.reader
        window = max(WINDOW, reader.page_size)
        size = self.job.batch_size
        asked = set()
        for batch in range(self.start, self.end):
            if batch >= self.start + AHEAD:
                self.reads.get()
            if self.stopped:
                return
            samples = self.job.samples[batch * size:(batch + 1) * size]
            numbers = set((reader.ptrs[samples] // window).tolist())
            for number in sorted(numbers - asked):
                asked.add(number)
                end = min((number + 1) * window, reader.size)
                for at in range(number * window, end, READ_PIECE):
                    if self.stopped:
                        return
                    os.posix_fadvise(reader.file.fileno(), at, READ_PIECE, os.POSIX_FADV_WILLNEED)

    def _submit_batch(self):
        """Lets the threads fill the next batch, in memory that no tensor uses."""
        job = self.job
        nbytes = job.views * job.batch_size * 3 * job.res ** 2
        buffer = self._free_buffer(nbytes)
        if buffer is None:
            pinned = self.loader.device.type == "cuda"
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        view = buffer[:]  # lives as long as a tensor that is made from it; then the buffer is free
        weakref.finalize(view, self.loader.free_buffers.append, buffer)
        self.filling[self.submitted] = view
        job.addresses[self.submitted] = buffer.ctypes.data
        self.submitted += 1
        advance(job.limit, 1)
        self._wake()

    def _free_buffer(self, nbytes):
        """A free buffer of this size, or None. Free buffers of another resolution are dropped."""
        free = self.loader.free_buffers
        while free:
            buffer = free.pop()
            if buffer.nbytes == nbytes:
                return buffer
        return None

    def _wake(self):
        self.reads.put(None)
        for _ in self.threads:
            self.wake_ups.put(None)

    def take_batch(self, batch):
        """Waits for a batch: images, uint8 ([views,] B, 3, res, res), labels, samples (B,)."""
        self.loader._check_usable()
        reader = self.loader.reader
        job = self.job
        while self.submitted < min(self.end, batch + AHEAD):
            self._submit_batch()
        while batch not in self.complete:
            event = self.events.get()
            if isinstance(event, BaseException):
                raise RuntimeError(f"{reader.path}: loading ended: {event!r}.") from event
            self.complete.add(event)
        samples = job.samples[batch * job.batch_size:(batch + 1) * job.batch_size]
        bad = np.flatnonzero(job.status[batch])
        if len(bad) > 0:
            reason = REASONS[int(job.status[batch, bad[0]])]
            raise reader.sample_error(samples[bad[0]], reason)
        shape = (job.views, len(samples), job.res, job.res, 3)
        memory = torch.from_numpy(self.filling.pop(batch))
        images = memory[:math.prod(shape)].view(shape).permute(0, 1, 4, 2, 3)
        if job.views == 1:
            images = images[0]
        labels = torch.from_numpy(reader.labels[samples])
        return images, labels, torch.from_numpy(samples.copy())

    def stop(self):
        if os.getpid() != self.loader._process or sys.is_finalizing():
            return  # in a fork, or at Python's end, the threads are gone
        self.stopped = True
        self.job.stop[0] = 1  # the kernels return after the image that they are at
        self._wake()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        self.events.put(RuntimeError("the loader was closed"))


# --- the worker processes of FolderLoader
def start_folder_worker(_):
    """Called at the start of a worker process: only its parent's SIGTERM ends it.

    torchrun and Slurm send SIGTERM to worker processes too. The parent sends it at Python's end if
    an epoch was left in the middle, and would else wait for ever.
    """
    parent = multiprocessing.parent_process().pid
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # also in threads that start later

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()
    end_with_parent()


def end_with_parent():
    """Called in a forked worker process: ends it within a second after its parent has ended.

    A parent that is killed cannot end its workers. torch's workers see by themselves that it is
    gone, but then wait for ever for somebody to take their results out of the pipe.
    """
    parent = multiprocessing.parent_process().pid

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def check_shared_memory(needed, remedy):
    """Raises DataError if /dev/shm, by which worker processes talk, has too few bytes free.

    Without this check a process ends by a bus error.
    """
    free = 0
    with contextlib.suppress(OSError):
        shm = os.statvfs("/dev/shm")
        free = shm.f_bavail * shm.f_frsize
    if free < needed:
        raise DataError(f"the worker processes need {needed / 1e6:,.1f} MB free in /dev/shm, which "
                        f"has {free / 1e6:,.3f} MB. Start the container with a larger --shm-size, "
                        f"mount /dev/shm larger, or {remedy}.")


# --- which files of a folder are pictures; build_beton.py walks by the same functions
MAX_PIXELS = 1 << 30  # of a picture, which then takes 3 GB; Pillow's own limit is a sixth of it
ARCHIVES = (".tar", ".parquet")  # endings of files of pictures, which build_beton.py reads
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found",
                  "System Volume Information")  # of macOS, NAS, Windows and Linux
SETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
        "dev": "val", "test": "test", "testing": "test"}  # names of splits, and the split of each
# Reasons why something is not taken, in singular and plural
OTHER_ENDING = ("file with another ending", "files with other endings")
HIDDEN_FILE = ("hidden file", "hidden files")
HIDDEN_FOLDER = ("hidden folder", "hidden folders")
LINK_BACK = ("link back to a folder above it", "links back to a folder above them")
SPECIAL_FILE = ("link, pipe or device", "links, pipes or devices")
EMPTY_CLASS = ("class folder without a picture", "class folders without a picture")
ARCHIVE = ("archive or table", "archives or tables")


class NotTaken:
    """Counts, by reason, what was seen and not taken. str() says it in words.

    Attributes: names, a Counter for each reason; inside, for each reason the number of pictures in
    folders that were not taken; pictures, how many have a picture's ending; folders, all that were
    seen.
    """

    def __init__(self):
        self.names = {}
        self.inside = Counter()
        self.pictures = 0
        self.folders = set()

    def add(self, reason, name, pictures=0, inside=0):
        """Counts `name`. pictures: 1 if it is a picture; inside: how many pictures lie in it."""
        names = self.names.setdefault(reason, Counter())
        if len(names) >= 1000 and name not in names:  # millions of names would take memory
            name = "others"
        names[name] += 1
        self.inside[reason] += inside
        self.pictures += pictures + inside

    def take_back(self, reason, name):
        """Counts `name` once less: it is taken after all."""
        names = self.names.get(reason, Counter())
        if names[name] > 0:
            names[name] -= 1
        self.names[reason] = +names  # without zeros
        if not self.names[reason]:
            del self.names[reason]

    def __str__(self):
        if not self.names:
            return "nothing"
        return ", ".join(self._words(reason) for reason in self.names)

    def _words(self, reason):
        """For example: 3 hidden files (.a, .b, .c)."""
        names = self.names[reason]
        total = names.total()
        one, several = reason
        kind = one if total == 1 else several
        with_counts = len(names) > 1 and total > len(names)
        shown = [f"{name} {count:,}" if with_counts else name
                 for name, count in names.most_common(4)]
        if len(names) > len(shown):
            shown.append("...")
        words = f"{total:,} {kind} ({', '.join(shown)})"
        inside = self.inside[reason]
        if inside == 1:
            words += " with 1 picture"
        elif inside > 1:
            words += f" with {inside:,} pictures"
        return words


def picture_endings():
    """The endings, in lower case, of files that Pillow can open here.

    HEIC is one of them once its plugin is registered. Films (MPEG), programs (EPS runs Ghostscript)
    and formats that Pillow knows only by name (its stubs: HDF5, WMF, ...) are not.
    """
    from PIL import Image, ImageFile
    known = Image.registered_extensions()  # loads all of Pillow's formats
    opened = {"MPO"}  # Pillow opens it as a JPEG
    for name, (opener, _) in Image.OPEN.items():
        is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if not is_stub and name not in ("MPEG", "EPS"):
            opened.add(name)
    return frozenset(ending for ending, name in known.items() if name in opened)


def is_hidden(name):
    """Whether a file or folder belongs to the system or to a program, and is not data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def ending_of(name):
    return os.path.splitext(name)[1].lower()


def list_folder(folder, not_taken):
    """All files below a folder -> (pictures, archives), as paths from the folder, in no order.

    Links are followed, but not back to a folder above them. A broken link is a picture that cannot
    be read. not_taken counts the rest. Raises DataError for a folder that cannot be read.
    """
    endings = picture_endings()
    pictures = []
    archives = []
    waiting = [("", ())]  # a folder, and what identifies the folders above it
    while waiting:
        below, above = waiting.pop()
        here = os.path.join(folder, below)
        try:
            status = os.stat(here)
            with os.scandir(here) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{here}: this folder cannot be read ({error.strerror}). Correct its "
                            "rights or repair its disk, or move it away.") from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            not_taken.add(LINK_BACK, below)
            continue
        not_taken.folders.add(below)
        for entry in entries:
            name = os.path.join(below, entry.name)
            ending = ending_of(entry.name)
            is_folder = entry.is_dir(follow_symlinks=False)
            is_file = entry.is_file(follow_symlinks=False)
            if entry.is_symlink():
                is_folder = os.path.isdir(entry.path)
                is_file = os.path.isfile(entry.path) or not os.path.exists(entry.path)
            if is_folder and is_hidden(entry.name):
                inside = count_endings(entry.path, endings)
                not_taken.add(HIDDEN_FOLDER, name, inside=inside)
            elif is_folder:
                waiting.append((name, (*above, identity)))
            elif not is_file:
                not_taken.add(SPECIAL_FILE, name)
            elif is_hidden(entry.name):
                not_taken.add(HIDDEN_FILE, name, pictures=int(ending in endings))
            elif ending in endings:
                pictures.append(name)
            elif ending in ARCHIVES:
                archives.append(name)
            else:
                not_taken.add(OTHER_ENDING, ending or "no ending")
    return pictures, archives


def count_endings(folder, endings):
    """How many files below a folder have one of these endings."""
    count = 0
    for _, _, files in os.walk(folder):
        for name in files:
            count += ending_of(name) in endings
    return count


def class_of(name, top=""):
    """The class of a picture by its path: the first folder after `top`, or "" without a folder."""
    folder, slash, _ = name[len(top):].partition("/")
    return one_name(folder) if slash else ""


def folder_order(name, top=""):
    """A key to sort pictures by class, folder and file, as torchvision's ImageFolder does."""
    return class_of(name, top), os.path.split(name)


def folder_classes(names, source, not_taken, top=""):
    """The class of each picture, by its path in `source`, after the folders `top`.

    If all pictures lie in folders, the first folder is the class, as in torchvision's ImageFolder.
    Returns None if no picture lies in a folder. Raises DataError if some do and some do not, and if
    folders have names of splits, such as train and val. not_taken counts folders without a picture.
    """
    one_copy = {}  # a million labels are the same few strings
    labels = []
    for name in names:
        label = class_of(name, top)
        labels.append(one_copy.setdefault(label, label))
    classes = set(one_copy) - {""}
    if not classes:
        return None
    if "" in one_copy:
        outside = labels.count("")
        first_outside = names[labels.index("")]
        first_inside = next(name for name, label in zip(names, labels) if label)
        raise DataError(f"{source} holds {outside:,} picture(s) outside of folders, such as "
                        f"{first_outside}, and {len(names) - outside:,} in folders, such as "
                        f"{first_inside}. If the folders are classes, move what lies outside of "
                        "them away. If they are not, give build_beton.py --unlabelled, which "
                        "ignores the folders, or --labels FILE, a csv of file names and classes.")
    check_splits(classes, source)
    seen = {class_of(folder + "/", top) for folder in not_taken.folders if folder.startswith(top)}
    for name in sorted(seen - classes - {""}):
        not_taken.add(EMPTY_CLASS, name)
    return labels


def check_splits(classes, source):
    """Raises DataError if folders are not classes but splits, such as train and val."""
    split_of = {name: SETS.get(re.sub("[0-9_-]+$", "", name.casefold())) for name in classes}
    found = sorted(name for name in classes if split_of[name])
    splits = {split_of[name] for name in found}
    if len(splits) < 2 and len(found) < len(classes):
        return
    one_split = os.path.join(source, found[0])
    remedy = f"Give the folder of one split, such as {one_split}"
    if not os.path.isdir(one_split):
        remedy = f"Make an archive of {found[0]} alone"
    raise DataError(f"{source} holds {', '.join(found)}: these look like splits, not classes. "
                    f"{remedy}. If you want the pictures of all of them together, without labels, "
                    "give build_beton.py --unlabelled.")


@functools.cache
def print_once(text):
    """Prints to stderr what several loaders of a run would print again."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


# ==================================================================================================
# THE KERNELS: how a batch is made
#
# The way of a sample, with the function of each step:
#
#     stored JPEG                    read_sample
#     -> coefficients, row by row    decode_from_index, decode_units
#     -> planes Y, Cb, Cr            row_to_planes, inverse_dct
#     -> resized planes              write_crop: resize_rows along y, weighted_sum along x
#     -> R, G, B, flipped            store_pixels, store_interleaved
#
# All of it is called by the functions above. numba compiles a kernel, and looks up the names in it,
# when the kernel is called for the first time; so kernels can stand at the end of the file.
# @njit(nogil=True, cache=True) marks what Python calls; plain @njit marks what only kernels call.
#
# A kernel takes addresses, not arrays of bytes, for two reasons. The vector loads and stores below
# need addresses. And FFCV alters numba's shared type of byte arrays (os_cache.py: `t1.mutable =
# False`); numba then no longer finds a compiled kernel that takes such an array.
# ==================================================================================================

# --- C library: libjpeg-turbo, which kernels call without the GIL; and numba's cache
COMPILING = ("essl_loader: compiling the loader's kernels, once, about 20 s; later processes load "
             "them from numba's cache.")


@functools.cache
def bind():
    """Loads libjpeg-turbo and makes its functions known to the kernels -> a ctypes.CDLL.

    Takes that of the turbojpeg wheel (version 3), else the system's (2.1). Each public entry calls
    this. Raises ImportError, which names both ways to get it.
    """
    wheel = [str(path) for folder in sys.path
             for path in Path(folder).glob("turbojpeg.libs/libturbojpeg*")]
    for path in wheel + ["libturbojpeg.so.0", "libturbojpeg.so"]:
        with contextlib.suppress(OSError):
            lib = ctypes.CDLL(path)
            break
    else:
        raise ImportError(
            "libturbojpeg was not found: `pip install turbojpeg` brings version 3 (preferred), "
            "`apt-get install libturbojpeg0` version 2.1; the loader works with both.")
    for name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy"):
        # Under names of our own: ffcv loads the system's library into the same process
        address = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol("essl_" + name, address)
    return lib


@functools.cache
def warn_uncached():
    """Says once that there is no cache. Worker processes, and ranks other than 0, say nothing."""
    if multiprocessing.parent_process() is None and int(os.environ.get("RANK", 0)) == 0:
        print("essl_loader: numba's cache cannot be read or written, so each process compiles the "
              "kernels again, in about 20 s. Set NUMBA_CACHE_DIR to a folder that you can write "
              "to, with 10 MB free.", file=sys.stderr, flush=True)


class KernelCache(FunctionCache):
    """numba's cache on disk. A full disk, or another user's file, costs time but ends nothing."""

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except OSError:
            warn_uncached()

    def save_overload(self, *args):
        try:
            super().save_overload(*args)
        except OSError:
            warn_uncached()


def njit(function=None, cache=False, **options):
    """numba.njit, but cache=True raises no error where no folder for the cache can be written.

    That is so for read-only code of a user without a home. The kernel then has no cache.
    """
    if function is None:
        return functools.partial(njit, cache=cache, **options)
    kernel = numba.njit(function, **options)
    if cache:
        with contextlib.suppress(RuntimeError):  # "no locator available for file ..."
            kernel._cache = KernelCache(function)  # numba's own cache=True sets this attribute too
    return kernel


@contextlib.contextmanager
def kernel_cache(kernel, notice=""):
    """Holds a lock on numba's cache while `kernel` is called for the first time in this process.

    torchrun's ranks start at once, but numba's cache is not made for several writers. And numba
    renews a kernel's index before its code: if a process is killed in between, the new index leads
    to old code. So the code of another version of this file is removed first; the lock file holds
    the version. `notice` is printed to stderr if the kernel has to be compiled.
    """
    if kernel.signatures:
        yield
        return
    if kernel.stats.cache_path is None:
        warn_uncached()
        yield
        return
    source = Path(__file__)
    cache = Path(kernel.stats.cache_path)
    version = f"{source.stat().st_mtime_ns} {source.stat().st_size} {numba.__version__}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written is not used either
            cache.mkdir(parents=True, exist_ok=True)
            lock = cache / f"{source.stem}.lock"
            fcntl.flock(stack.enter_context(open(lock, "a")), fcntl.LOCK_EX)
            if lock.read_text() != version:
                for old in cache.glob(f"{source.stem}.*.nb[ic]"):
                    old.unlink(missing_ok=True)
                lock.write_text(version)
        if notice and not any(cache.glob(f"{source.stem}.{kernel.__name__}-*.nbc")):
            print(notice, file=sys.stderr, flush=True)
        yield


c_function = types.ExternalFunction
c_int = types.int32
c_word = types.intp  # an address, a size, or another number of 64 bits
pread = c_function("pread", c_word(c_int, c_word, c_word, c_word))  # fd, to, size, offset
memchr = c_function("memchr", c_word(c_word, c_int, c_word))  # start, byte, size
memcmp = c_function("memcmp", c_int(c_word, c_word, c_word))  # one, other, size
memset = c_function("memset", c_word(c_word, c_int, c_word))  # to, byte, size
memcpy = c_function("memcpy", c_word(c_word, c_word, c_word))  # to, from, size
tj_init = c_function("essl_tjInitDecompress", c_word())
tj_destroy = c_function("essl_tjDestroy", c_int(c_word))
tj_header = c_function(  # handle, jpeg, size, addresses: width, height, subsampling, colour space
    "essl_tjDecompressHeader3",
    c_int(c_word, c_word, c_word, c_word, c_word, c_word, c_word))
tj_rgb = c_function(  # handle, jpeg, size, to, width, pitch, height, format, flags
    "essl_tjDecompress2",
    c_int(c_word, c_word, c_word, c_word, c_int, c_int, c_int, c_int, c_int))
TJ_RGB = 0  # a pixel format
STOP_ON_WARNING = 8192  # a flag: an error where libjpeg-turbo would paint damaged blocks grey


# --- vectors and instructions: LLVM code that numba does not offer
#
# Addresses, and vectors of 8 to 32 numbers. LLVM does not vectorise these loops well by itself
# (products of 16 bits, transposes, packing). Only generic operations are used, so that the same
# source compiles for x86 and for ARM.
class Vector(types.Type):
    """`lanes` numbers of one LLVM type."""

    def __init__(self, element, lanes):
        self.ir_type = ir.VectorType(element, lanes)
        super().__init__(f"Vector({self.ir_type})")


@register_model(Vector)
def vector_model(manager, vector):
    return models.PrimitiveModel(manager, vector, vector.ir_type)


I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
BYTES = ir.VectorType(I8, 32)
WORDS = Vector(I16, 16)  # also holds 32 bytes on their way between two functions
FLOATS = Vector(F32, 8)


def emits(result, *arguments):
    """Kernels may call the decorated function: its code emits LLVM code for such a call.

    result, arguments: numba's types.
    """
    def register(emit):
        def generate(context, builder, sig, args):
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        def typing(typingctx, *kinds):
            return result(*arguments), generate
        typing.__name__ = emit.__name__
        typing.__signature__ = inspect.signature(emit)  # intrinsic refuses *kinds
        return intrinsic(typing)
    return register


def load_from(builder, address, ir_type):
    """The value of an LLVM type at an address, aligned or not."""
    return builder.load(builder.inttoptr(address, ir_type.as_pointer()), align=1)


def store_to(builder, address, value):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def integer_access(ir_type, extend):
    """Two functions for kernels: one loads an integer of this type as int64, one stores it there.

    extend: the builder's sext or zext, which fills the upper bits.
    """
    @emits(types.int64, types.intp)
    def load(builder, address):
        return extend(builder, load_from(builder, address, ir_type), I64)

    @emits(types.none, types.intp, types.int64)
    def store(builder, address, value):
        store_to(builder, address, builder.trunc(value, ir_type))
    return load, store


def value_access(kind, ir_type):
    """Two functions for kernels: one loads a value of numba's type `kind`, one stores it there."""
    @emits(kind, types.intp)
    def load(builder, address):
        return load_from(builder, address, ir_type)

    @emits(types.none, types.intp, kind)
    def store(builder, address, value):
        store_to(builder, address, value)
    return load, store


load_byte, store_byte = integer_access(I8, ir.IRBuilder.zext)
_, store_int16 = integer_access(I16, ir.IRBuilder.sext)
load_int32, store_int32 = integer_access(I32, ir.IRBuilder.sext)
load_int64, store_int64 = integer_access(I64, ir.IRBuilder.sext)
load_float, store_float = value_access(types.float32, F32)
load_floats, store_floats = value_access(FLOATS, FLOATS.ir_type)
load_words, store_words = value_access(WORDS, WORDS.ir_type)


@emits(types.uint64, types.intp)
def load_big_endian(builder, address):
    """The eight bytes at an address as a big-endian number."""
    return builder.bswap(load_from(builder, address, I64))  # the machine is little-endian


@emits(types.voidptr, types.intp)
def as_pointer(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


@emits(types.int64, types.intp, types.int64)
def atomic_add(builder, address, value):
    """Adds to the int64 at an address -> the number that was there.

    A thread that sees the sum also sees all that was stored before.
    """
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "acq_rel")


@emits(types.int64, types.intp)
def atomic_load(builder, address):
    """The int64 at an address, read anew each time, with all that was stored before it."""
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


def call_llvm(builder, name, *args, result=None):
    function_type = ir.FunctionType(result or args[0].type, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, (), function_type), args)


@emits(types.boolean, types.boolean)
def unlikely(builder, condition):
    """Tells LLVM that a condition is rarely true, so that the other path keeps its registers."""
    return call_llvm(builder, "llvm.expect.i1", condition, ir.Constant(ir.IntType(1), 0))


def shuffle(builder, a, b, lanes):
    """LLVM's shufflevector: a vector of these lanes of a followed by b."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(a, b, mask)


def splat(builder, number, ir_type):
    """A number in every lane, an int64 cut to the lane's size; a vector stays as it is."""
    if number.type == ir_type:
        return number
    if number.type == I64:
        number = builder.trunc(number, ir_type.element)
    one = builder.insert_element(ir.Constant(ir_type, ir.Undefined), number, ir.Constant(I32, 0))
    return shuffle(builder, one, one, [0] * ir_type.count)


def add_operator(operation, vector, scalar, instruction, **options):
    """Kernels may use the operation for two vectors, and for a vector and a number."""
    @type_callable(operation)
    def typing(context):
        def typer(a, b):
            if vector in (a, b):
                return vector(vector if a == vector else scalar, vector if b == vector else scalar)
        return typer

    def generate(context, builder, sig, args):
        a = splat(builder, args[0], vector.ir_type)
        b = splat(builder, args[1], vector.ir_type)
        return instruction(builder, a, b, **options)
    for kinds in ((vector, vector), (vector, scalar), (scalar, vector)):
        lower_builtin(operation, *kinds)(generate)


for operation, instruction in (
        (operator.add, ir.IRBuilder.add), (operator.sub, ir.IRBuilder.sub),
        (operator.and_, ir.IRBuilder.and_), (operator.lshift, ir.IRBuilder.shl)):
    add_operator(operation, WORDS, types.int64, instruction)
for operation, instruction in (
        (operator.add, ir.IRBuilder.fadd), (operator.sub, ir.IRBuilder.fsub),
        (operator.mul, ir.IRBuilder.fmul), (operator.truediv, ir.IRBuilder.fdiv)):
    # "contract" lets LLVM make a product and a sum one instruction
    add_operator(operation, FLOATS, types.float32, instruction, flags=("contract",))


@emits(WORDS, types.int64)
def splat_word(builder, number):
    return splat(builder, number, WORDS.ir_type)


@emits(FLOATS)
def lane_numbers(builder):
    """0, 1, ..., 7."""
    return ir.Constant(FLOATS.ir_type, [float(lane) for lane in range(8)])


@emits(FLOATS, FLOATS)
def magnitude(builder, a):
    return call_llvm(builder, "llvm.fabs.v8f32", a)


@emits(FLOATS, FLOATS)
def floor(builder, a):
    return call_llvm(builder, "llvm.floor.v8f32", a)


@emits(FLOATS, FLOATS, types.float32, types.float32)
def clamp(builder, a, low, high):
    low = splat(builder, low, FLOATS.ir_type)
    high = splat(builder, high, FLOATS.ir_type)
    # A comparison and its choice become one instruction
    a = builder.select(builder.fcmp_ordered(">", a, low), a, low)
    return builder.select(builder.fcmp_ordered("<", a, high), a, high)


def rounded(builder, floats):
    """Floats as int32, rounded to the nearest."""
    n = floats.type.count
    return call_llvm(builder, f"llvm.lrint.v{n}i32.v{n}f32", floats, result=ir.VectorType(I32, n))


@emits(types.none, types.intp, FLOATS)
def store_integers(builder, address, a):
    """Stores eight floats as int32, rounded."""
    store_to(builder, address, rounded(builder, a))


@emits(FLOATS, types.intp)
def load_coefficients(builder, address):
    """Eight int16 at an address as float32."""
    return builder.sitofp(load_from(builder, address, ir.VectorType(I16, 8)), FLOATS.ir_type)


def multiply_high(builder, a, b):
    """(a * b) >> 16 of int16: one instruction on x86."""
    wide = ir.VectorType(I32, 16)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return builder.trunc(builder.ashr(product, ir.Constant(wide, [16] * 16)), WORDS.ir_type)


add_operator(multiply_high, WORDS, types.int64, multiply_high)


def clamp_to_byte(builder, value):
    """Integers within -128 and 127. LLVM makes this and a truncation one saturating instruction."""
    for order, bound in ((">", -128), ("<", 127)):
        bounds = ir.Constant(value.type, [bound] * value.type.count)
        value = builder.select(builder.icmp_signed(order, value, bounds), value, bounds)
    return value


@emits(WORDS, WORDS, WORDS)
def pack_bytes(builder, even, odd):
    """Samples in 1/64 level, int16, as int8 levels, saturated. The even ones come first:

        even: s0 s2 ... s30    odd: s1 s3 ... s31    ->    s0 s2 ... s30 s1 s3 ... s31
    """
    six = ir.Constant(WORDS.ir_type, [6] * 16)
    both = shuffle(builder, builder.ashr(even, six), builder.ashr(odd, six), range(32))
    return builder.bitcast(builder.trunc(clamp_to_byte(builder, both), BYTES), WORDS.ir_type)


@emits(types.none, types.intp, FLOATS, FLOATS, FLOATS, FLOATS)
def store_rounded(builder, address, a, b, c, d):
    """Stores four vectors of eight float32 as 32 int8, rounded and saturated."""
    ab = shuffle(builder, a, b, range(16))
    cd = shuffle(builder, c, d, range(16))
    numbers = clamp_to_byte(builder, rounded(builder, shuffle(builder, ab, cd, range(32))))
    store_to(builder, address, builder.trunc(numbers, BYTES))


@emits(types.none, types.intp, WORDS, WORDS, WORDS)
def store_interleaved(builder, address, r, g, b):
    """Stores three vectors of 32 int8 as 32 pixels of three uint8, each 128 higher:

        r0 ... r31    g0 ... g31    b0 ... b31    ->    r0 g0 b0 r1 g1 b1 ... r31 g31 b31
    """
    high = ir.Constant(BYTES, [128] * 32)
    r, g, b = (builder.xor(builder.bitcast(plane, BYTES), high) for plane in (r, g, b))
    rg = shuffle(builder, r, g, range(64))  # r: lanes 0 to 31, g: lanes 32 to 63
    bb = shuffle(builder, b, b, range(64))  # lanes 64 to 127 of both
    lanes = [pixel + 32 * channel for pixel in range(32) for channel in range(3)]
    store_to(builder, address, shuffle(builder, rg, bb, lanes))


@emits(types.none, types.intp, types.int64, types.intp, types.int64)
def transpose_16x32(builder, source, source_stride, target, target_stride):
    """16 rows of 32 bytes at source, as pack_bytes leaves them, become 32 rows of 16 at target.

    A row is two halves of 16 lanes: the even columns and the odd ones. In each of four steps, row i
    and row i + 8 become rows 2 i and 2 i + 1: in each half, eight lanes of both rows alternate.

        row i       a0 a1 ... a15        row 2 i        a0 b0 a1 b1 ... a7  b7
        row i + 8   b0 b1 ... b15        row 2 i + 1    a8 b8 a9 b9 ... a15 b15

    Then row i holds column 2 i in its first half, and column 2 i + 1 in its second.
    """
    rows = []
    for _ in range(16):
        rows.append(load_from(builder, source, BYTES))
        source = builder.add(source, source_stride)
    alternate = []  # the lanes that make row 2 i, and those that make row 2 i + 1
    for eight in (0, 8):
        alternate.append([half + eight + lane + 32 * other
                          for half in (0, 16) for lane in range(8) for other in (0, 1)])
    for _ in range(4):
        rows = [shuffle(builder, rows[row // 2], rows[row // 2 + 8], alternate[row % 2])
                for row in range(16)]
    for column in range(32):
        row = rows[column // 2]
        half = 16 * (column % 2)
        store_to(builder, target, shuffle(builder, row, row, range(half, half + 16)))
        target = builder.add(target, target_stride)


@njit
def int64s_at(address, shape):
    """An array of int64 over the memory at an address."""
    return carray(as_pointer(address), shape, np.int64)


@njit(nogil=True, cache=True)
def advance(limit, batches):
    """Adds to an epoch's limit: what Python wrote into the job before is seen by the threads."""
    atomic_add(limit.ctypes.data, batches)


# --- random draws. Reference: torchvision's RandomResizedCrop.get_params, in distribution
VIEW_DRAWS = 64  # numbers of draws of one view: view 1 uses 64 to 127
FLIP_DRAW = 40  # random_box uses draws 0 to 39 of a view
U = np.uint64


class Box(NamedTuple):
    """A part of a picture, in pixels: its left upper corner, width and height."""
    x: int
    y: int
    w: int
    h: int


@njit(nogil=True, cache=True)
def uniform(seed, epoch, position, draw):
    """A number in [0, 1): draw number `draw` of a position in `epoch`. splitmix64 over the four.

    position: the sample's place in the loader's indices.
    """
    z = U(seed)
    for word in (U(epoch), U(position), U(draw)):
        z = (z ^ word) * U(0x9E3779B97F4A7C15) + U(0xD1B54A32D192ED03)
        z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
        z = z ^ (z >> U(31))
    return np.float64(z >> U(11)) * 2.0 ** -53


@njit(nogil=True, cache=True)
def random_box(width, height, scale, ratio, seed, epoch, position, view=0):
    """RandomResizedCrop's box: ten tries, then the central box with an aspect within `ratio`.

    A try has an area ~ U(scale) of the picture, and a logarithm of its aspect ~ U(log ratio).
    """
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    for attempt in range(10):
        draw = VIEW_DRAWS * view + 4 * attempt
        share = scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, position, draw)
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, position, draw + 1))
        area = width * height * share
        w = int(round(math.sqrt(area * aspect)))
        h = int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            x = int(uniform(seed, epoch, position, draw + 2) * (width - w + 1))
            y = int(uniform(seed, epoch, position, draw + 3) * (height - h + 1))
            return Box(x, y, w, h)
    w = width
    h = height
    if width < ratio[0] * height:
        h = min(height, max(1, int(round(width / ratio[0]))))
    elif width > ratio[1] * height:
        w = min(width, max(1, int(round(height * ratio[1]))))
    return Box((width - w) // 2, (height - h) // 2, w, h)


@njit(nogil=True, cache=True)
def center_box(width, height, crop_ratio):
    """The central square of crop_ratio of the short side: Resize(256) with CenterCrop(224)."""
    side = max(1, int(round(min(width, height) * crop_ratio)))
    return Box((width - side) // 2, (height - side) // 2, side, side)


# --- a stored sample, and the memory of the thread that decodes it
class Stored(NamedTuple):
    """A stored sample in memory."""
    address: int
    size: int  # bytes
    mode: int  # MODE_JPEG, or 1 for raw RGB
    width: int  # what the file's table says, in pixels
    height: int


class Scratch(NamedTuple):
    """One thread's memory: the address of each part. make_scratch says how large they are."""
    raw: int  # the stored sample
    clean: int  # its entropy-coded data, without stuffed zeros
    info: int  # what parse_jpeg finds
    plane: int  # three rows, of Y, Cb, Cr or R, G, B
    tables: int  # four Huffman tables
    quants: int  # four quantisation tables
    zigzag: int  # where a coefficient goes, for each number of 8 bits
    wait: int  # what a waiting stream reads, and its tables
    streams: int
    units: int  # of a row of MCUs
    places: int  # of a row of MCUs
    coefs: int  # of a row of MCUs
    work: int  # of the inverse DCT
    planes: int  # samples; or RGB where libjpeg-turbo decodes
    split: int  # RGB as three planes
    rows_axis: int  # memory of an Axis
    luma_axis: int
    chroma_axis: int
    strip: int  # 64 columns of resized rows
    luma: int  # resized along y
    chroma: int
    resized: int  # along both axes
    end: int  # of the last part


SCRATCH_PARTS = len(Scratch._fields)


@njit(nogil=True, cache=True)
def make_scratch(bytes_of, widths, heights, res):
    """(memory, Scratch in it) for samples of these bytes, widths and heights; needs bind()."""
    side = max(widths.max(), heights.max()) + 144  # with the MCUs and groups that stick out
    area = (widths * heights).max() + 288 * side
    mcus = side // 8  # of a row, at least 16 too many
    out = (res + 31) // 32 * 32
    most_taps = 4 * side // res + 8
    axis = 8 * (side + most_taps) + 4 * (res + 8) * (most_taps + 1)
    sizes = Scratch(
        raw=bytes_of.max(),
        clean=bytes_of.max(),
        info=8 * INFO_SIZE,
        plane=3 * 8 * PLANE_SIZE,
        tables=4 * TABLE_SIZE,
        quants=4 * 256,
        zigzag=8 * 256,
        wait=16,
        streams=24,
        units=UNIT_SIZE * mcus,
        places=6 * PLACE_SIZE * mcus,
        coefs=GROUP_SIZE * mcus,
        work=2048,
        planes=3 * area,
        split=3 * area,
        rows_axis=axis,
        luma_axis=axis,
        chroma_axis=axis,
        strip=192 * out + 32 * most_taps,
        luma=out * side,
        chroma=2 * out * side,
        resized=3 * out * out,
        end=0)
    # Kernels read up to 256 bytes behind some parts; each part begins at a cache line
    ends = np.cumsum((np.array(sizes)[:-1] + 256 + 63) // 64 * 64)
    memory = np.empty(ends[-1] // 8 + 8, np.int64)
    addresses = np.full(SCRATCH_PARTS, (memory.ctypes.data + 63) // 64 * 64)
    addresses[1:] += ends
    scratch = Scratch(*to_fixed_tuple(addresses, SCRATCH_PARTS))
    memset(scratch.tables, 0, 4 * TABLE_SIZE)  # no table is there yet
    return memory, scratch


# --- JPEG: header and tables
#
# The terms are those of ITU-T T.81. An MCU is the 8x8 to 16x16 pixels whose blocks of all
# components JPEG stores together. A unit is a piece of a row of MCUs that is decoded in one go; an
# index says where each begins.
#
# What parse_jpeg finds, in an array of int64:
(HEIGHT, WIDTH, COMPONENTS,
 H_SAMP, V_SAMP,  # of luma, 1 or 2; chroma has 1
 MCUS_X, MCUS_Y,  # in a row and in a column of the picture
 UNIT_MCUS,  # in a unit
 INTERVAL,  # MCUs between restart markers; 0: there are none
 SCAN,  # address of the entropy-coded data
 TABLES,  # a bit for each table that was defined: 0 to 3 Huffman, 4 to 7 quantisation
 CHECKSUM,  # of all segments that matter for the pixels
 ) = range(12)
QUANT = 12  # from here on: the quantisation table of each of three components
DC = 15  # their Huffman tables for DC coefficients
AC = 18  # and for AC coefficients
INFO_SIZE = 21
# Narrower units cost file size, wider ones time: these take 2.6 % of 500_95, 2.9 % in 4:4:4
UNIT_WIDTH = 3  # MCUs of 16 pixels
UNIT_WIDTH_444 = 7  # MCUs of 8 pixels
SOI = 0xFFD8  # markers
SOF0 = 0xFFC0
SOF1 = 0xFFC1
DHT = 0xFFC4
DQT = 0xFFDB
DRI = 0xFFDD
SOS = 0xFFDA
APP0 = 0xFFE0
APP14 = 0xFFEE  # Adobe's: it may say that the components are RGB
COM = 0xFFFE
EOI = 0xFFD9

# A Huffman table, in bytes from its address: entries for all values of the next PREFIX bits, then
# what decodes longer codes: 20 limits, 20 offsets and 256 symbols, all int32. Then the bytes that
# it was built from: if the next picture has the same, as in files of FFCV, nothing is built.
PREFIX = 11  # bits that one look-up decodes; a table for more takes longer to build than it saves
PREFIXES = 1 << PREFIX
TABLE_LIMITS = 4 * PREFIXES
TABLE_OFFSETS = TABLE_LIMITS + 80
TABLE_SYMBOLS = TABLE_OFFSETS + 80
TABLE_SOURCE_SIZE = TABLE_SYMBOLS + 1024
TABLE_SOURCE = TABLE_SOURCE_SIZE + 8
TABLE_SIZE = TABLE_SOURCE + 16 + 256
# An entry is one int32. DC tables have escapes only.
#
#     bits          | 31-24  | 23-16        | 15-8                | 7-0
#     coefficient   | value                 | zeros before it + 1 | bits of code and value
#     end of block  | 0                     | END_OF_BLOCK        | bits of code
#     escape        | symbol | bits of code | ESCAPE              | 0
#
# An escape is a symbol whose value does not fit into the prefix. Its bits of code are 0 where even
# the code does not fit, or there is no such code: then limits, offsets and symbols tell.
END_OF_BLOCK = 128
ESCAPE = 192
# While a block is decoded, its count is the number of the last coefficient << 8 | the bits that are
# used since the last refill. An entry's lower 16 bits are added to advance both. A count from here
# on is the last coefficient, an end of block, an escape or damage: one test finds them all.
BLOCK_DONE = 63 << 8

ZIGZAG = np.array([
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63])
# Arai, Agui and Nakajima's scale factors of a row or column (Pennebaker and Mitchell, 4.4.3)
AAN_SCALE = np.array([1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100,
                0.275899379])


@njit(forceinline=True)
def value_at_top(word, size):
    """The value of a word's upper `size` bits (ITU-T T.81, F.2.2.1, EXTEND), without a branch."""
    negative = (np.int64(word) >> 63) + 1  # 1 or 0
    return np.int64((word >> U(1)) >> U(63 - size)) - ((negative << size) - negative)


@njit
def fill_entries(table, first, count, entry):
    for i in range(first, first + count):
        store_int32(table + 4 * i, entry)


@njit
def build_table(source, is_dc, table):
    """Builds a Huffman table (ITU-T T.81, annex C) from its 16 counts and symbols at an address.

    Returns False if it is not one.
    """
    code = 0
    n = 0
    for length in range(1, 17):
        count = load_byte(source + length - 1)
        store_int32(table + TABLE_OFFSETS + 4 * length, n - code)
        if code + count > 1 << length or n + count > 256:
            return False
        for _ in range(count):
            symbol = load_byte(source + 16 + n)
            store_int32(table + TABLE_SYMBOLS + 4 * n, symbol)
            run = symbol >> 4
            size = symbol & 15
            if is_dc and run:
                return False
            free = PREFIX - length  # bits of a prefix behind the code
            if free >= 0 and (is_dc or free < size):
                entry = symbol << 24 | length << 16 | ESCAPE << 8
                fill_entries(table, code << free, 1 << free, entry)
            elif free >= 0:
                is_end = size == 0 and run != 15
                zeros = END_OF_BLOCK if is_end else run + 1
                for bits in range(1 << size):
                    value = value_at_top(U(bits) << U(63 - size) << U(1), size)
                    entry = value << 16 | zeros << 8 | (length + size)
                    first = (code << free) + (bits << (free - size))
                    fill_entries(table, first, 1 << (free - size), entry)
            n += 1
            code += 1
        if length == PREFIX:  # the other prefixes begin longer codes, or none
            fill_entries(table, code, PREFIXES - code, ESCAPE << 8)
        store_int32(table + TABLE_LIMITS + 4 * length, code << (16 - length))
        code <<= 1
    return True


@njit
def long_code(word, table):
    """(bits, symbol) of a code of more than PREFIX bits; 0 bits if there is no such code."""
    top = np.int64(word >> U(48))
    for length in range(PREFIX + 1, 17):
        if top < load_int32(table + TABLE_LIMITS + 4 * length):
            number = load_int32(table + TABLE_OFFSETS + 4 * length) + (top >> (16 - length))
            return length, load_int32(table + TABLE_SYMBOLS + 4 * number)
    return 0, 0


@njit
def add_to_checksum(checksum, start, size):
    """Goes on with a checksum of 64 bits over more bytes, eight at a time.

    Each step is a bijection, so a single word that differs always shows.
    """
    total = U(checksum)
    tail = start + size // 8 * 8
    for at in range(start, tail, 8):
        total = (total ^ U(load_int64(at))) * U(0x9E3779B97F4A7C15)
        total = total ^ (total >> U(32))
    for at in range(tail, start + size):
        total = (total ^ U(load_byte(at))) * U(0x9E3779B97F4A7C15)
        total = total ^ (total >> U(32))
    return np.int64(total)


@njit
def load_16(address):
    return load_byte(address) << 8 | load_byte(address + 1)


@njit
def read_quants(at, end, info, quants):
    """Reads a segment of quantisation tables of bytes; False if it is none.

    A step is stored with the scale factors of the inverse DCT, as float32, in natural order.
    """
    while at + 65 <= end:
        number = load_byte(at)
        if number > 3:
            return False
        for k in range(64):
            natural = ZIGZAG[k]
            scale = AAN_SCALE[natural >> 3] * AAN_SCALE[natural & 7] / 8
            store_float(quants + 256 * number + 4 * natural, load_byte(at + 1 + k) * scale)
        info[TABLES] |= 16 << number
        at += 65
    return True


@njit
def read_tables(at, end, info, tables):
    """Reads a segment of Huffman tables; False if it is none. A table that is there stays."""
    while at + 17 <= end:
        kind = load_byte(at)  # 0, 1: DC tables; 16, 17: AC tables
        number = (kind >> 3) + (kind & 1)
        size = 16
        for i in range(16):
            size += load_byte(at + 1 + i)
        if kind & 0xEE or at + 1 + size > end:
            return False
        table = tables + TABLE_SIZE * number
        same_size = load_int64(table + TABLE_SOURCE_SIZE) == size
        if not same_size or memcmp(table + TABLE_SOURCE, at + 1, size) != 0:
            store_int64(table + TABLE_SOURCE_SIZE, 0)
            if not build_table(at + 1, number < 2, table):
                return False
            memcpy(table + TABLE_SOURCE, at + 1, size)
            store_int64(table + TABLE_SOURCE_SIZE, size)
        info[TABLES] |= 1 << number
        at += 1 + size
    return True


@njit
def read_frame(at, length, info):
    """Reads the frame: size and sampling. False if it is none that decode_planes can read."""
    components = (length - 8) // 3
    if length != 11 and length != 17:
        return False
    if load_byte(at) != 8 or load_byte(at + 5) != components:
        return False
    info[HEIGHT] = load_16(at + 1)
    info[WIDTH] = load_16(at + 3)
    info[COMPONENTS] = components
    for c in range(components):
        sampling = load_byte(at + 7 + 3 * c)
        if load_byte(at + 6 + 3 * c) != c + 1 or (c > 0 and sampling != 0x11):
            return False
        info[QUANT + c] = min(load_byte(at + 8 + 3 * c), 4)  # 4 is never defined
    info[H_SAMP] = load_byte(at + 7) >> 4 if components == 3 else 1
    info[V_SAMP] = load_byte(at + 7) & 15 if components == 3 else 1
    if not (1 <= info[H_SAMP] <= 2 and 1 <= info[V_SAMP] <= 2):
        return False
    info[MCUS_X] = (info[WIDTH] + 8 * info[H_SAMP] - 1) // (8 * info[H_SAMP])
    info[MCUS_Y] = (info[HEIGHT] + 8 * info[V_SAMP] - 1) // (8 * info[V_SAMP])
    info[UNIT_MCUS] = UNIT_WIDTH if info[H_SAMP] == 2 else UNIT_WIDTH_444
    return True


@njit
def read_scan(at, length, info):
    """Reads the scan's header: the tables of each component. False if one was not defined."""
    components = info[COMPONENTS]
    if components == 0 or length != 6 + 2 * components or load_byte(at) != components:
        return False
    if load_16(at + 1 + 2 * components) != 63 or load_byte(at + 3 + 2 * components) != 0:
        return False  # not all coefficients, as in progressive JPEG
    for c in range(components):
        used = load_byte(at + 2 + 2 * c)
        info[DC + c] = used >> 4
        info[AC + c] = 2 + (used & 15)
        needed = 16 << info[QUANT + c] | 1 << info[DC + c] | 1 << info[AC + c]
        if load_byte(at + 1 + 2 * c) != c + 1 or used & 0xEE:
            return False
        if info[TABLES] & needed != needed:
            return False
    return True


@njit
def parse_jpeg(stored, info, scratch):
    """Reads the header and tables of a baseline JPEG; False for any other kind."""
    info[:] = 0
    file_end = stored.address + stored.size
    if stored.size < 4 or load_16(stored.address) != SOI:
        return False
    segment = stored.address + 2
    while segment + 4 <= file_end:
        marker = load_16(segment)
        length = load_16(segment + 2)
        at = segment + 4
        end = segment + 2 + length
        good = end + 2 <= file_end
        if not good:
            return False
        if marker == DQT:
            good = read_quants(at, end, info, scratch.quants)
        elif marker == DHT:
            good = read_tables(at, end, info, scratch.tables)
        elif marker == SOF0 or marker == SOF1:
            good = read_frame(at, length, info)
        elif marker == DRI and length == 4:
            info[INTERVAL] = load_16(at)
        elif marker == SOS:
            info[SCAN] = end
            good = read_scan(at, length, info)
        else:  # other applications' segments and comments do not matter
            good = APP0 <= marker <= COM and marker != APP14
        if not good:
            return False
        if marker < APP0:
            info[CHECKSUM] = add_to_checksum(info[CHECKSUM], segment, end - segment)
        if marker == SOS:
            return True
        segment = end
    return False


@njit
def can_decode(stored, info, scratch):
    """Reads a JPEG's header. False for another kind or size, and for one with restart markers."""
    known = parse_jpeg(stored, info, scratch)
    same_size = info[WIDTH] == stored.width and info[HEIGHT] == stored.height
    return known and same_size and info[INTERVAL] == 0


# --- JPEG: from entropy-coded data to coefficients
#
# The coefficients of eight neighbouring blocks are a group: int16 [coefficient][block], in bytes:
GROUP_TRASH = 1024  # where the coefficients end: what decodes as coefficient 64 to 255 is put here
GROUP_SIZE = 1040

# A place says where a block of a row goes. In bytes from its address, all int64:
PLACE_COEFS = 0  # address of its coefficients
PLACE_DC = 8  # address of its DC table
PLACE_AC = 16  # address of its AC table
PLACE_PREDICTOR = 24  # where in the unit its DC predictor is
PLACE_SIZE = 32
# The first place of a list is where a stream waits when no unit is left: its tables give for ever a
# symbol that advances nothing.

# A unit, in bytes from its address, all int64; positions are absolute, in bits:
UNIT_BEGIN = 0  # position where it begins
UNIT_LIMIT = 8  # position where it may end at the latest
UNIT_END = 16  # position where it ended
UNIT_PLACE = 24  # address of its first place
UNIT_PLACES_END = 32  # where its places end
UNIT_PREDICTORS = 40  # three DC predictors
UNIT_SIZE = 64

# Two streams decode units in turn. In bytes from scratch.streams, all int64:
STREAM_1 = 0  # address of the unit that the first stream is at
STREAM_2 = 8
NEXT_UNIT = 16  # address of the unit that the next free stream takes
DAMAGED = 0  # stands for the address of a stream's place where the data are damaged


class Stream(NamedTuple):
    """How far a stream has decoded its block."""
    word: int  # the next bits, at the top of 64
    position: int  # in bits, at the last refill of the word
    count: int  # see BLOCK_DONE
    table: int  # address of the block's AC table
    coefs: int  # address of its coefficients
    place: int  # address of its place, or DAMAGED


@njit
def find_end(start, end):
    """Where the entropy-coded data at `start` end: at EOI, or at fill bytes before it.

    Returns 0 for other markers, and for fill bytes within the data: libjpeg-turbo reads those.
    """
    while start < end - 1:
        start = memchr(start, 0xFF, end - 1 - start)
        if start == 0:
            return 0
        if load_byte(start + 1) != 0:  # else the 0xFF belongs to the data
            at = start + 1
            while at < end - 1 and load_byte(at) == 0xFF:
                at += 1
            return start if load_byte(at) == EOI & 0xFF else 0
        start += 2
    return 0


@njit
def unstuff(start, end, clean):
    """Copies entropy-coded data without the zero that JPEG puts behind each 0xFF -> the size."""
    first = clean
    while start < end:
        found = memchr(start, 0xFF, end - start)
        n = end - start if found == 0 else found - start + 1
        memcpy(clean, start, n)
        clean += n
        start += n + 1
    return clean - first


@njit(forceinline=True)
def bits_at(position):
    """The next 57 bits or more, from an absolute bit position, at the top of a word."""
    return load_big_endian(position >> 3) << U(position & 7)


@njit(forceinline=True)
def next_symbol(stream, zigzag):
    """Decodes one symbol of a stream by a look-up -> (stream, entry of the Huffman table)."""
    entry = load_int32(stream.table + (np.int64(stream.word >> U(64 - PREFIX)) << 2))
    count = stream.count + (entry & 0xFFFF)
    store_int16(stream.coefs + load_int64(zigzag + ((count >> 8 & 255) << 3)), entry >> 16)
    word = stream.word << U(entry & 63)
    return Stream(word, stream.position, count, stream.table, stream.coefs, stream.place), entry


@njit(forceinline=True)
def refill(stream):
    """Reads a stream's next bits, behind those that are used."""
    position = stream.position + (stream.count & 255)
    return Stream(bits_at(position), position, stream.count & -256, stream.table, stream.coefs,
                  stream.place)


@njit(forceinline=True)
def long_symbol(entry, word, table):
    """(bits, symbol) of an ESCAPE entry; 0 bits if there is no such code."""
    length = (entry >> 16) & 255
    if length:
        return length, (entry >> 24) & 255
    return long_code(word, table)


@njit(forceinline=True)
def next_block(current, next_unit, position, place):
    """A block ends: decodes the DC coefficient of the next (ITU-T T.81, F.2.2.1) -> Stream.

    current: where scratch.streams holds the stream's unit; next_unit: where it holds the next one.
    position, place: where the block ended, and its place.
    """
    unit = load_int64(current)
    place += PLACE_SIZE
    good = position <= load_int64(unit + UNIT_LIMIT)
    if place == load_int64(unit + UNIT_PLACES_END):
        store_int64(unit + UNIT_END, position)
        unit = load_int64(next_unit)
        store_int64(next_unit, unit + UNIT_SIZE)
        store_int64(current, unit)
        position = load_int64(unit + UNIT_BEGIN)
        place = load_int64(unit + UNIT_PLACE)
    table = load_int64(place + PLACE_DC)
    word = bits_at(position)
    entry = load_int32(table + (np.int64(word >> U(64 - PREFIX)) << 2))
    length, size = long_symbol(entry, word, table)
    word <<= U(length)
    value = value_at_top(word, size)
    predictor = unit + load_int64(place + PLACE_PREDICTOR)
    value += load_int64(predictor)
    store_int64(predictor, value)
    coefs = load_int64(place + PLACE_COEFS)
    store_int16(coefs, value)
    position += length + size
    table = load_int64(place + PLACE_AC)
    place = place if good and length > 0 else DAMAGED
    return Stream(bits_at(position), position, 0, table, coefs, place)


@njit(forceinline=True)
def after_symbol(stream, entry, current, next_unit, zigzag):
    """Goes on after a symbol that is an escape or ends its block -> Stream."""
    position = stream.position + (stream.count & 255)
    k = stream.count >> 8
    if k >= ESCAPE:
        k -= ESCAPE
        word = bits_at(position)
        length, symbol = long_symbol(entry, word, stream.table)
        size = symbol & 15
        position += length + size
        k += (symbol >> 4) + 1
        if size == 0 and symbol != 0xF0:
            k = END_OF_BLOCK
        elif size > 0:
            value = value_at_top(word << U(length), size)
            store_int16(stream.coefs + load_int64(zigzag + 8 * k), value)
        if length == 0:
            k = 64
        if k < 63:
            return Stream(bits_at(position), position, k << 8, stream.table, stream.coefs,
                          stream.place)
    following = next_block(current, next_unit, position, stream.place)
    if 63 < k < END_OF_BLOCK:  # more coefficients than a block has
        return Stream(following.word, following.position, following.count, following.table,
                      following.coefs, DAMAGED)
    return following


@njit
def decode_units(scratch):
    """Decodes all listed units to coefficients: ITU-T T.81, annex F; False if one is damaged.

    Two streams take turns symbol by symbol, so that the latency of one's look-up hides behind the
    other's. A refill lasts for five symbols. Each coefficient is stored before it is known whether
    it is one: the zigzag table sends the others into the trash. Reads at most 250 bytes behind a
    unit. Reference: libjpeg-turbo; about 160 us for a crop of 278 x 278.
    """
    zigzag = scratch.zigzag
    waiting = scratch.places
    first = scratch.streams + STREAM_1
    second = scratch.streams + STREAM_2
    next_unit = scratch.streams + NEXT_UNIT
    one = next_block(first, next_unit, 0, 0)
    two = next_block(second, next_unit, 0, 0)
    if one.place == DAMAGED or two.place == DAMAGED:
        return False
    while True:
        for _ in range(5):
            one, entry = next_symbol(one, zigzag)
            if unlikely(one.count >= BLOCK_DONE):
                one = after_symbol(one, entry, first, next_unit, zigzag)
                if one.place == DAMAGED or (one.place == waiting and two.place == waiting):
                    return one.place != DAMAGED
            two, entry = next_symbol(two, zigzag)
            if unlikely(two.count >= BLOCK_DONE):
                two = after_symbol(two, entry, second, next_unit, zigzag)
                if two.place == DAMAGED or (one.place == waiting and two.place == waiting):
                    return two.place != DAMAGED
        one = refill(one)
        two = refill(two)


@njit
def set_place(place, coefs, dc_table, ac_table, predictor):
    store_int64(place + PLACE_COEFS, coefs)
    store_int64(place + PLACE_DC, dc_table)
    store_int64(place + PLACE_AC, ac_table)
    store_int64(place + PLACE_PREDICTOR, predictor)


@njit
def set_unit(unit, begin, limit, place, places_end):
    """Sets all of a unit but its predictors."""
    store_int64(unit + UNIT_BEGIN, begin)
    store_int64(unit + UNIT_LIMIT, limit)
    store_int64(unit + UNIT_END, 0)
    store_int64(unit + UNIT_PLACE, place)
    store_int64(unit + UNIT_PLACES_END, places_end)


@njit
def blocks_of_mcu(info):
    return info[H_SAMP] * info[V_SAMP] + info[COMPONENTS] - 1


@njit
def list_places(info, first, last, col0, col1, scratch):
    """Lists the places of a row's MCUs first to last. Blocks outside of col0 to col1 go into the
    trash.

    Returns the bytes of a row's coefficients: groups of trash, of luma's rows, of Cb, of Cr.
    """
    store_int64(scratch.wait, 0)  # the bits that a waiting stream reads
    store_int32(scratch.wait + 8, 1 << 16 | ESCAPE << 8)  # of its DC table: a code of one bit
    store_int32(scratch.wait + 12, 0)  # of its AC table: a symbol that advances nothing
    place = scratch.places
    set_place(place, scratch.coefs, scratch.wait + 8, scratch.wait + 12, UNIT_PREDICTORS)
    group = 1
    for column in range(first, last):
        group = 1
        for c in range(info[COMPONENTS]):
            across = info[H_SAMP] if c == 0 else 1
            down = info[V_SAMP] if c == 0 else 1
            dc_table = scratch.tables + TABLE_SIZE * info[DC + c]
            ac_table = scratch.tables + TABLE_SIZE * info[AC + c]
            for _ in range(down):
                for h in range(across):
                    coefs = scratch.coefs
                    if col0 <= column < col1:
                        block = (column - col0) * across + h
                        coefs += (group + (block >> 3)) * GROUP_SIZE + 2 * (block & 7)
                    place += PLACE_SIZE
                    set_place(place, coefs, dc_table, ac_table, UNIT_PREDICTORS + 8 * c)
                group += ((col1 - col0) * across + 7) // 8
    return group * GROUP_SIZE


@njit
def start_streams(number, scratch):
    """Puts both streams before unit 1, and behind `number` units two for them to wait in."""
    memset(scratch.units, 0, UNIT_SIZE)  # unit 0, which ends at once
    store_int64(scratch.units + UNIT_PLACES_END, PLACE_SIZE)
    store_int64(scratch.streams + STREAM_1, scratch.units)
    store_int64(scratch.streams + STREAM_2, scratch.units)
    store_int64(scratch.streams + NEXT_UNIT, scratch.units + UNIT_SIZE)
    for n in range(number + 1, number + 3):
        unit = scratch.units + UNIT_SIZE * n
        set_unit(unit, 8 * scratch.wait, 8 * scratch.wait + 64, scratch.places, scratch.places)


@njit
def fill_zigzag(zigzag):
    """Where a coefficient goes, by the upper bits of a count: 64 of 256 are coefficients."""
    for k in range(256):
        store_int64(zigzag + 8 * k, 16 * ZIGZAG[k] if k < 64 else GROUP_TRASH)


# --- JPEG: from coefficients to planes of samples
#
# A plane of samples is a row of int64, here as columns:
(PLANE_ADDRESS, PLANE_STRIDE,
 PLANE_LEFT, PLANE_TOP,  # the picture's pixel where it begins
 PLANE_STEP_X, PLANE_STEP_Y,  # pixels that a sample is wide and high
 PLANE_COMPONENTS,  # of its JPEG, whose columns lie as inverse_dct says; 0: in order
 PLANE_SIZE) = range(8)


@njit(forceinline=True)
def inverse_dct_8(a):
    """Inverse DCT of eight scaled values: Arai, Agui and Nakajima (Pennebaker, Mitchell, 4.4.3)."""
    root2 = 1.414213562
    e0 = a[0] + a[4]
    e1 = a[0] - a[4]
    e3 = a[2] + a[6]
    e2 = (a[2] - a[6]) * root2 - e3
    b0 = e0 + e3
    b3 = e0 - e3
    b1 = e1 + e2
    b2 = e1 - e2
    z13 = a[5] + a[3]
    z10 = a[5] - a[3]
    z11 = a[1] + a[7]
    z12 = a[1] - a[7]
    c7 = z11 + z13
    z5 = (z10 + z12) * 1.847759065
    c6 = z5 - z10 * 2.613125930 - c7
    c5 = (z11 - z13) * root2 - c6
    c4 = z5 - z12 * 1.082392200 - c5
    return b0 + c7, b1 + c6, b2 + c5, b3 + c4, b3 - c4, b2 - c5, b1 - c6, b0 - c7


@njit(forceinline=True)
def dequantised(coefs, quants, natural):
    """A coefficient of eight blocks, by its number in natural order, as float32."""
    return load_coefficients(coefs + 16 * natural) * load_float(quants + 4 * natural)


@njit
def inverse_dct(coefs, quants, work, to, stride):
    """Eight blocks' coefficients to 8 rows of 64 samples, int8 (level - 128).

    A vector holds one coefficient of each of the eight blocks, so nothing is transposed, and column
    c of block b lands at 8 * c + b of its row:

        b0 c0, b1 c0, ... b7 c0, b0 c1, b1 c1, ... b7 c7

    Reference: libjpeg-turbo's accurate integer transform, to one level; 0.13 us.
    """
    for c in range(8):
        v = inverse_dct_8((
            dequantised(coefs, quants, c), dequantised(coefs, quants, c + 8),
            dequantised(coefs, quants, c + 16), dequantised(coefs, quants, c + 24),
            dequantised(coefs, quants, c + 32), dequantised(coefs, quants, c + 40),
            dequantised(coefs, quants, c + 48), dequantised(coefs, quants, c + 56)))
        for r in range(8):
            store_floats(work + 256 * r + 32 * c, v[r])
    for r in range(8):
        at = work + 256 * r
        v = inverse_dct_8((
            load_floats(at), load_floats(at + 32), load_floats(at + 64), load_floats(at + 96),
            load_floats(at + 128), load_floats(at + 160), load_floats(at + 192),
            load_floats(at + 224)))
        store_rounded(to + r * stride, v[0], v[1], v[2], v[3])
        store_rounded(to + r * stride + 32, v[4], v[5], v[6], v[7])


@njit
def mcus_of(info, box):
    """The rows and columns of MCUs that a box touches: (row0, row1, col0, col1)."""
    mcu_w = 8 * info[H_SAMP]
    mcu_h = 8 * info[V_SAMP]
    row1 = (box.y + box.h + mcu_h - 1) // mcu_h
    col1 = (box.x + box.w + mcu_w - 1) // mcu_w
    return box.y // mcu_h, row1, box.x // mcu_w, col1


@njit
def set_planes(info, col0, col1, row0, row1, scratch):
    """Describes the planes of these MCUs. A gray plane stands for R, G and B."""
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    mcu_w = 8 * info[H_SAMP]
    mcu_h = 8 * info[V_SAMP]
    address = scratch.planes
    for c in range(3):
        step_x = 1 if c == 0 else info[H_SAMP]
        step_y = 1 if c == 0 else info[V_SAMP]
        stride = ((col1 - col0) * mcu_w // step_x + 63) // 64 * 64
        row = plane[c]
        row[PLANE_ADDRESS] = address
        row[PLANE_STRIDE] = stride
        row[PLANE_LEFT] = col0 * mcu_w
        row[PLANE_TOP] = row0 * mcu_h
        row[PLANE_STEP_X] = step_x
        row[PLANE_STEP_Y] = step_y
        row[PLANE_COMPONENTS] = info[COMPONENTS]
        if info[COMPONENTS] == 3:
            address += stride * (row1 - row0) * mcu_h // step_y


@njit
def row_to_planes(info, row, scratch):
    """One MCU row's coefficients become samples of the planes."""
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    coefs = scratch.coefs + GROUP_SIZE  # the first group is trash
    for c in range(info[COMPONENTS]):
        stride = plane[c, PLANE_STRIDE]
        quants = scratch.quants + 256 * info[QUANT + c]
        down = info[V_SAMP] if c == 0 else 1
        for v in range(down):
            to = plane[c, PLANE_ADDRESS] + (row * down + v) * 8 * stride
            for group in range(stride // 64):
                inverse_dct(coefs, quants, scratch.work, to + 64 * group, stride)
                coefs += GROUP_SIZE


@njit
def decode_from_start(stored, info, box, scratch):
    """decode_planes for a JPEG without an index: decodes all that lies before the box's end.

    Each row is one unit, which goes on where the row before ended.
    """
    end = find_end(info[SCAN], stored.address + stored.size)
    if end == 0:
        return OTHER_KIND
    limit = 8 * (scratch.clean + unstuff(info[SCAN], end, scratch.clean))
    row0, row1, col0, col1 = mcus_of(info, box)
    first = np.int64(0)  # numba would compile list_places again for a literal
    row_bytes = list_places(info, first, info[MCUS_X], col0, col1, scratch)
    unit = scratch.units + UNIT_SIZE
    place = scratch.places + PLACE_SIZE
    places_end = place + PLACE_SIZE * blocks_of_mcu(info) * info[MCUS_X]
    position = 8 * scratch.clean
    memset(unit + UNIT_PREDICTORS, 0, 24)
    for row in range(row1):
        memset(scratch.coefs, 0, row_bytes)
        start_streams(1, scratch)
        set_unit(unit, position, limit, place, places_end)
        if not decode_units(scratch):
            return OTHER_KIND
        position = load_int64(unit + UNIT_END)
        if row >= row0:
            row_to_planes(info, row - row0, scratch)
    if row1 == info[MCUS_Y] and position <= limit - 8:  # the data must end with the last row
        return OTHER_KIND
    return OK


@njit(nogil=True, cache=True)
def decode_planes(stored, box, scratch):
    """Decodes the MCUs of a JPEG that the box touches to Y, Cb, Cr planes: rows of scratch.plane.

    With an index, only the units that the box touches are decoded. Returns OK, a key of REASONS, or
    OTHER_KIND where only libjpeg-turbo can tell. Reference: libjpeg-turbo's planes of the whole
    picture.
    """
    info = int64s_at(scratch.info, (INFO_SIZE,))
    if not can_decode(stored, info, scratch):
        return OTHER_KIND
    entries, good = find_index(stored, info)
    if not good:
        return BROKEN
    fill_zigzag(scratch.zigzag)
    row0, row1, col0, col1 = mcus_of(info, box)
    set_planes(info, col0, col1, row0, row1, scratch)
    if entries == 0:
        return decode_from_start(stored, info, box, scratch)
    return decode_from_index(stored, entries, info, box, scratch)


# --- index
#
# A row of MCUs is cut into units of UNIT_MCUS. Entry n says where unit n begins, counted over all
# rows; one more entry says where the last unit ends. An entry is one int64:
#
#     bits 63-36                          | 35-24        | 23-12        | 11-0
#     where it begins: a bit of the JPEG, | predictor of | predictor of | predictor of
#     in a byte that is no stuffed zero   | Cr           | Cb           | Y
#
# A predictor is the DC coefficient before, in two's complement. A unit must end where the next one
# begins, with its predictors: that is the check on damage.
POSITION_SHIFT = 36
PREDICTOR_BITS = 12
PREDICTORS_MASK = (1 << POSITION_SHIFT) - 1
MAX_INDEXED = 1 << 24  # bytes of a JPEG: its bits are counted in 27 bits


@njit(forceinline=True)
def pack_predictors(luma, cb, cr):
    mask = (1 << PREDICTOR_BITS) - 1
    return (cr & mask) << 2 * PREDICTOR_BITS | (cb & mask) << PREDICTOR_BITS | luma & mask


@njit(forceinline=True)
def predictor_of(entry, component):
    """A component's predictor, with its sign."""
    left = 64 - PREDICTOR_BITS * (component + 1)  # shifts the fields above it out
    return (entry << left) >> (64 - PREDICTOR_BITS)


@njit
def units_of_row(info):
    return (info[MCUS_X] + info[UNIT_MCUS] - 1) // info[UNIT_MCUS]


@njit
def size_of_index(info):
    return 8 * (info[MCUS_Y] * units_of_row(info) + 1)


@njit
def find_index(stored, info):
    """(address of the first entry, or 0 where there is no index; False if the index is damaged)."""
    trailer = stored.address + stored.size - TRAILER_SIZE
    if stored.size < TRAILER_SIZE or load_int64(trailer + FORMAT_AT) != FORMAT_WORD:
        return 0, True
    index_size = load_int32(trailer + INDEX_SIZE_AT)
    if index_size == 0:
        return 0, True
    entries = trailer - index_size
    if index_size != size_of_index(info) or entries < info[SCAN]:
        return 0, False
    checksum = add_to_checksum(info[CHECKSUM], entries, index_size)
    return entries, checksum == load_int64(trailer + CHECKSUM_AT)


@njit
def decode_from_index(stored, entries, info, box, scratch):
    """decode_planes for a JPEG with an index: decodes the units that the box touches."""
    row0, row1, col0, col1 = mcus_of(info, box)
    first_unit = col0 // info[UNIT_MCUS]
    num_units = (col1 + info[UNIT_MCUS] - 1) // info[UNIT_MCUS] - first_unit
    first = first_unit * info[UNIT_MCUS]
    last = min(first + num_units * info[UNIT_MCUS], info[MCUS_X])
    row_bytes = list_places(info, first, last, col0, col1, scratch)
    places_end = scratch.places + PLACE_SIZE * (1 + blocks_of_mcu(info) * (last - first))
    for row in range(row0, row1):
        memset(scratch.coefs, 0, row_bytes)
        row_entries = entries + 8 * (row * units_of_row(info) + first_unit)
        if not list_units(stored, info, row_entries, entries, num_units, places_end, scratch):
            return BROKEN
        if not decode_units(scratch):
            return BROKEN
        if not end_at_entries(row_entries, num_units, scratch):
            return BROKEN
        row_to_planes(info, row - row0, scratch)
    return OK


@njit
def list_units(stored, info, entries, data_end, count, places_end, scratch):
    """Lists `count` units from an entry on, and copies their data without stuffing.

    data_end: where the JPEG ends. Returns False if an entry points outside of it.
    """
    start_streams(count, scratch)
    unit_places = PLACE_SIZE * blocks_of_mcu(info) * info[UNIT_MCUS]
    data_begin = 8 * (info[SCAN] - stored.address)
    data_end = 8 * (data_end - stored.address)
    unit = scratch.units
    place = scratch.places + PLACE_SIZE
    clean = scratch.clean
    entry = load_int64(entries)
    for n in range(1, count + 1):
        next_entry = load_int64(entries + 8 * n)
        begin = entry >> POSITION_SHIFT
        end = next_entry >> POSITION_SHIFT
        if not data_begin <= begin <= end < data_end:
            return False
        last_byte = stored.address + (end >> 3)
        size = unstuff(stored.address + (begin >> 3), last_byte, clean)
        store_byte(clean + size, load_byte(last_byte))  # its first bits belong to this unit
        unit += UNIT_SIZE
        set_unit(unit, 8 * clean + (begin & 7), 8 * (clean + size) + (end & 7), place,
                 min(place + unit_places, places_end))
        for c in range(3):
            store_int64(unit + UNIT_PREDICTORS + 8 * c, predictor_of(entry, c))
        place += unit_places
        clean += size + 1
        entry = next_entry
    return True


@njit
def predictors_of_unit(unit):
    """A unit's predictors as in an entry."""
    return pack_predictors(load_int64(unit + UNIT_PREDICTORS),
                           load_int64(unit + UNIT_PREDICTORS + 8),
                           load_int64(unit + UNIT_PREDICTORS + 16))


@njit
def end_at_entries(entries, count, scratch):
    """Whether decoded units ended where the next ones begin, with their DC predictors."""
    for n in range(1, count + 1):
        unit = scratch.units + UNIT_SIZE * n
        if load_int64(unit + UNIT_END) != load_int64(unit + UNIT_LIMIT):
            return False
        if predictors_of_unit(unit) != load_int64(entries + 8 * n) & PREDICTORS_MASK:
            return False
    return True


@njit
def place_in_file(start, clean_start, clean, end):
    """The address of the byte that unstuffing put at `clean`, from an earlier pair of the two."""
    while True:
        found = memchr(start, 0xFF, end - start)
        if found == 0 or found - start >= clean - clean_start:
            return start + clean - clean_start
        clean_start += found - start + 1
        start = found + 2


@njit(nogil=True, cache=True)
def index_jpeg(stored, entries, scratch):
    """Writes a JPEG's entries to an address, and behind them their checksum.

    Returns the bytes of the entries, or 0 if decode_planes cannot read the JPEG. Each unit is
    decoded from where the one before ended, and its coefficients are thrown away: about 0.5 ms.
    """
    info = int64s_at(scratch.info, (INFO_SIZE,))
    if not can_decode(stored, info, scratch):
        return 0
    end = find_end(info[SCAN], stored.address + stored.size)
    if end == 0 or stored.size >= MAX_INDEXED:
        return 0
    fill_zigzag(scratch.zigzag)
    list_places(info, 0, info[MCUS_X], 0, 0, scratch)  # all blocks go into the trash
    place = scratch.places + PLACE_SIZE
    unit = scratch.units + UNIT_SIZE
    at = info[SCAN]
    clean = scratch.clean
    limit = 8 * (clean + unstuff(at, end, clean))
    position = 8 * clean
    memset(unit + UNIT_PREDICTORS, 0, 24)
    num_units = info[MCUS_Y] * units_of_row(info)
    for number in range(num_units + 1):
        at = place_in_file(at, clean, position >> 3, end)
        clean = position >> 3
        bit = 8 * (at - stored.address) + (position & 7)
        predictors = predictors_of_unit(unit)
        for c in range(3):
            if predictor_of(predictors, c) != load_int64(unit + UNIT_PREDICTORS + 8 * c):
                return 0  # it does not fit into 12 bits
        store_int64(entries + 8 * number, bit << POSITION_SHIFT | predictors)
        if number < num_units:
            column = number % units_of_row(info) * info[UNIT_MCUS]
            mcus = min(info[UNIT_MCUS], info[MCUS_X] - column)
            start_streams(1, scratch)
            set_unit(unit, position, limit, place, place + PLACE_SIZE * blocks_of_mcu(info) * mcus)
            if not decode_units(scratch):
                return 0
            position = load_int64(unit + UNIT_END)
    if position <= limit - 8:
        return 0
    size = size_of_index(info)
    store_int64(entries + size, add_to_checksum(info[CHECKSUM], entries, size))
    return size


# --- resize: antialiased. Reference: Pillow's resize of the crop, plane by plane
class Output(NamedTuple):
    """What a crop becomes."""
    res: int  # side, in pixels
    bicubic: bool  # else bilinear
    flip: bool


class Span(NamedTuple):
    """The pixels of an axis that are resized, and the samples that they lie in."""
    begin: int  # its first pixel, from sample 0 on
    size: int  # pixels
    count: int  # samples from sample 0 on
    step: int  # pixels of a sample: 2 for half-size chroma, else 1


class Axis(NamedTuple):
    """One axis of a resize.

    Output i is the sum over t < taps of weight (i, t) * the row at address rows[first[i] + t].
    """
    rows: int  # address of int64 addresses, of which the last one is there `taps` times more
    first: int  # address of int32
    weights: int  # address of int32, in 1/16384: [i // 8, t, i % 8]
    taps: int
    bias: int  # rounds the sum


@njit(forceinline=True)
def pixel_weights(pixels, centers, low, high, narrower, bicubic):
    """The filter at eight pixels, each for its own output; 0 outside of low to high. No branches.

    The filter is the triangle, or Keys' cubic with a = -0.5.
    """
    distance = magnitude(pixels - centers) * narrower
    near = clamp(distance, 0, 1)
    values = 1 - near
    if bicubic:  # each of its two pieces is 0 where the other one holds
        far = clamp(distance, 1, 2)
        far_value = (2.5 - 0.5 * far) * far - 4
        values = (1.5 * near - 2.5) * near * near + 1 + far_value * far + 2
    return values * (clamp(pixels - low + 1, 0, 1) * clamp(high - pixels + 1, 0, 1))


@njit
def make_axis(span, out, bicubic, half_level, memory, work):
    """Makes an Axis to `out` outputs in memory; the addresses in rows are left to the caller.

    The weights are Pillow's for a box. At step 2 they are those of libjpeg-turbo's triangle
    upsampling and of the resize, in one; at the box's ends the last sample stands for the one
    outside. half_level: 32 if sums become whole levels, else 0. work: memory for eight outputs'
    weights as floats. Exact to a level for size / out up to 16. Reference: Pillow; 1 to 3 us.
    """
    begin = span.begin
    step = span.step
    scale = span.size / out
    narrower = min(1.0 / scale, 1.0)
    support = (2.0 if bicubic else 1.0) * max(scale, 1.0)
    pixels = int(math.ceil(2 * support))
    taps = pixels if step == 1 else pixels // 2 + 2
    first = memory + 8 * (span.count + taps)
    weights = first + 4 * (out + 8)
    for i in range(0, out, 8):
        center = begin + (i + 0.5) * scale
        origin = int(center - support) // 2 * 2  # positions from here on are exact in float32
        low = begin - origin
        high = begin + span.size - 1 - origin
        centers = lane_numbers() * scale + (center - origin - 0.5)
        starts = floor(centers - support + 1)  # the first pixels, then the first samples
        if step == 2:
            starts = floor((starts - 1) * 0.5)
        starts = clamp(starts, -origin // step, 1e9)
        store_integers(first + 4 * i, starts + origin // step)
        total = lane_numbers() * 0  # a vector of zeros
        for t in range(taps):
            samples = starts + t
            at = samples if step == 1 else samples + samples
            values = pixel_weights(at, centers, low, high, narrower, bicubic)
            if step == 2:  # a pixel lies a quarter of a sample off its sample, towards the next
                values = values + pixel_weights(at + 1, centers, low, high, narrower, bicubic)
                before = clamp(at - 1, -origin, 1e9)  # at an end, the sample itself
                behind = clamp(at + 2, -1e9, 2 * span.count - 1 - origin)
                others = pixel_weights(before, centers, low, high, narrower, bicubic)
                others = others + pixel_weights(behind, centers, low, high, narrower, bicubic)
                values = 0.75 * values + 0.25 * others
                values = values * clamp(span.count - origin // 2 - samples, 0, 1)
            store_floats(work + 32 * t, values)
            total = total + values
        norm = 16384 / total
        for t in range(taps):
            store_integers(weights + 4 * i * taps + 32 * t, load_floats(work + 32 * t) * norm)
    # Each product is rounded down, which loses half of 1/64 level on average
    products = pixels // step + step - 1
    return Axis(memory, first, weights, taps, half_level + products // 2)


@njit(forceinline=True)
def weighted_sum(axis, i, at):
    """Output i of an axis, of the 64 samples from `at` on in each row, as int16 in 1/64 level.

    Returns four vectors: even and odd samples of the first 32, even and odd ones of the others.
    A sample is moved into the high byte of an int16, so the high half of its product with a weight
    in 1/16384 is in 1/64 level. Reference: the same sum in float.
    """
    row = axis.rows + 8 * load_int32(axis.first + 4 * i)
    weights = axis.weights + 4 * ((i & -8) * axis.taps + (i & 7))
    even1 = splat_word(axis.bias)
    even2 = even1
    odd1 = even1
    odd2 = even1
    for t in range(axis.taps):
        source = load_int64(row + 8 * t) + at
        weight = splat_word(load_int32(weights + 32 * t))
        v = load_words(source)
        even1 = even1 + multiply_high(v << 8, weight)
        odd1 = odd1 + multiply_high(v & -256, weight)
        v = load_words(source + 32)
        even2 = even2 + multiply_high(v << 8, weight)
        odd2 = odd2 + multiply_high(v & -256, weight)
    return even1, odd1, even2, odd2


@njit
def transpose_strip(strip, rows, cols, to, stride):
    """`cols` columns of a strip become rows at `to`.

    A strip is rows of 64 bytes, as pack_bytes leaves them; their number is rounded up to 16. It is
    transposed while it is still in a near cache.
    """
    for i in range(0, rows, 16):
        for j in range(0, min(64, cols), 32):
            transpose_16x32(strip + 64 * i + j, 64, to + j * stride + i, stride)


@njit
def resize_rows(planes, box, output, half_level, axis_memory, to, scratch):
    """Resizes the box of planes of one layout along y -> the Axis that resizes them along x.

    Writes int8 samples at `to`, transposed: for each column of samples, the resized columns of all
    planes side by side, each of res rounded up to 32.
    """
    plane = planes[0]
    step_x = plane[PLANE_STEP_X]
    step_y = plane[PLANE_STEP_Y]
    left = box.x - plane[PLANE_LEFT]
    top = box.y - plane[PLANE_TOP]
    col0 = left // step_x
    cols = (left + box.w + step_x - 1) // step_x - col0
    row0 = top // step_y
    rows = (top + box.h + step_y - 1) // step_y - row0
    start = col0 // 64 * 64  # the first column of a group of blocks
    res = output.res
    out = (res + 31) // 32 * 32
    stride = len(planes) * out
    span = Span(top - step_y * row0, box.h, rows, step_y)
    axis = make_axis(span, res, output.bicubic, 32, scratch.rows_axis, scratch.strip)
    for c in range(len(planes)):
        for i in range(rows + axis.taps):
            row = row0 + min(i, rows - 1)
            address = planes[c, PLANE_ADDRESS] + row * plane[PLANE_STRIDE] + start
            store_int64(axis.rows + 8 * i, address)
        for at in range(0, col0 + cols - start, 64):
            for i in range(res):
                even1, odd1, even2, odd2 = weighted_sum(axis, i, at)
                store_words(scratch.strip + 64 * i, pack_bytes(even1, odd1))
                store_words(scratch.strip + 64 * i + 32, pack_bytes(even2, odd2))
            transpose_strip(scratch.strip, res, 64, to + at * stride + c * out, stride)
    span = Span(left - step_x * col0, box.w, cols, step_x)
    axis = make_axis(span, res, output.bicubic, half_level, axis_memory, scratch.strip)
    for i in range(cols + axis.taps):
        position = col0 + min(i, cols - 1) - start
        if plane[PLANE_COMPONENTS] > 0:  # undoes inverse_dct's order of columns
            position = (position & ~63) + 8 * (position & 7) + (position >> 3 & 7)
        store_int64(axis.rows + 8 * i, to + position * stride)
    return axis


@njit(forceinline=True)
def rgb_parts(luma, cb, cr):
    """R, G and B of int16 in 1/64 level: ITU-T T.871, section 7."""
    r = luma + cr + multiply_high(cr << 1, 13173)  # 1.402 = 1 + 13173 / 32768
    g = luma - multiply_high(cb << 1, 11277) - multiply_high(cr << 1, 23401)  # 0.344136, 0.714136
    b = luma + cb + multiply_high(cb << 1, 25297)  # 1.772
    return r, g, b


@njit(forceinline=True)
def store_pixels(at, strip_size, is_ycc, even, odd):
    """Stores 32 samples of three planes in three strips; YCbCr becomes R, G and B.

    even, odd: the planes' even samples, and their odd ones.
    """
    if is_ycc:
        even = rgb_parts(even[0], even[1], even[2])
        odd = rgb_parts(odd[0], odd[1], odd[2])
    store_words(at, pack_bytes(even[0], odd[0]))
    store_words(at + strip_size, pack_bytes(even[1], odd[1]))
    store_words(at + 2 * strip_size, pack_bytes(even[2], odd[2]))


@njit
def write_crop(box, output, to, scratch):
    """Resizes and flips a box of decoded planes to res * res * 3 bytes of interleaved RGB at `to`.

    Reference: Pillow's resize, and T.871; 35 us at 224.
    """
    res = output.res
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    is_ycc = plane[0, PLANE_COMPONENTS] == 3
    chroma_half_level = 0 if is_ycc else 32  # Cb and Cr stay in 1/64 level
    luma = resize_rows(plane[:1], box, output, 32, scratch.luma_axis, scratch.luma, scratch)
    chroma = resize_rows(plane[1:], box, output, chroma_half_level, scratch.chroma_axis,
                         scratch.chroma, scratch)
    out = (res + 31) // 32 * 32
    for row in range(0, out, 64):
        for i in range(res):
            # Each is four vectors: even and odd samples of 32, then of the next 32
            a = weighted_sum(luma, i, row)
            b = weighted_sum(chroma, i, row)
            c = weighted_sum(chroma, i, row + out)
            column = res - 1 - i if output.flip else i
            at = scratch.strip + 64 * column
            store_pixels(at, 64 * out, is_ycc, (a[0], b[0], c[0]), (a[1], b[1], c[1]))
            store_pixels(at + 32, 64 * out, is_ycc, (a[2], b[2], c[2]), (a[3], b[3], c[3]))
        for channel in range(3):
            transpose_strip(scratch.strip + 64 * out * channel, res, out - row,
                            scratch.resized + out * (out * channel + row), out)
    for row in range(res):
        for column in range(0, res, 32):
            at = scratch.resized + out * row + column
            pixels = to + 3 * (row * res + column)
            is_whole = column + 32 <= res
            store_interleaved(pixels if is_whole else scratch.strip, load_words(at),
                              load_words(at + out * out), load_words(at + 2 * out * out))
            if not is_whole:
                memcpy(pixels, scratch.strip, 3 * (res - column))


# --- one sample, and the loop of a thread
@njit
def split_rgb(rgb, width, box, scratch):
    """Takes the box of an interleaved RGB picture apart into three planes of int8."""
    stride = (box.w + 63) // 64 * 64
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    for c in range(3):
        to = scratch.split + c * box.h * stride
        plane[c, PLANE_ADDRESS] = to
        plane[c, PLANE_STRIDE] = stride
        plane[c, PLANE_LEFT] = box.x
        plane[c, PLANE_TOP] = box.y
        plane[c, PLANE_STEP_X] = 1
        plane[c, PLANE_STEP_Y] = 1
        plane[c, PLANE_COMPONENTS] = 0
        for row in range(box.h):
            line = rgb + 3 * ((box.y + row) * width + box.x) + c
            for i in range(box.w):
                store_byte(to + row * stride + i, load_byte(line + 3 * i) ^ 128)


@njit(nogil=True, cache=True)
def decode_rgb(stored, to):
    """libjpeg-turbo decodes a whole JPEG of any kind to RGB at `to` -> OK or a key of REASONS."""
    handle = tj_init()
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = found.ctypes.data
    code = BROKEN
    if tj_header(handle, stored.address, stored.size, at, at + 4, at + 8, at + 12) == 0:
        if found[0] != stored.width or found[1] != stored.height:
            code = OTHER_SIZE
        elif tj_rgb(handle, stored.address, stored.size, to, stored.width, 0, stored.height, TJ_RGB,
                    STOP_ON_WARNING) == 0:
            code = OK
    tj_destroy(handle)
    return code


@njit
def decode_sample(stored, box, scratch):
    """Decodes a sample's box to planes: Y, Cb, Cr or R, G, B -> OK or a key of REASONS."""
    rgb = stored.address
    if stored.mode == MODE_JPEG:
        code = decode_planes(stored, box, scratch)
        if code != OTHER_KIND:
            return code
        rgb = scratch.planes
        code = decode_rgb(stored, rgb)  # libjpeg-turbo decides, as in build_beton.py --verify
    else:
        code = OK if stored.size == 3 * stored.width * stored.height else OTHER_SIZE
    if code == OK:
        split_rgb(rgb, stored.width, box, scratch)
    return code


@njit(nogil=True, cache=True)
def resized_crop(stored, box, output, to, scratch):
    """Decodes, crops, resizes and flips a stored sample to res * res * 3 bytes of RGB at `to`.

    Returns OK or a key of REASONS. Reference: Pillow's decode, crop, resize.
    """
    code = decode_sample(stored, box, scratch)
    if code == OK:
        write_crop(box, output, to, scratch)
    return code


class Job(NamedTuple):
    """What the threads need to fill an epoch's batches."""
    fd: int
    modes: np.ndarray  # of all samples, int64, as the four below
    widths: np.ndarray
    heights: np.ndarray
    ptrs: np.ndarray
    sizes: np.ndarray
    samples: np.ndarray  # of this rank's epoch, in order
    positions: np.ndarray  # their positions in the loader's indices
    limit: np.ndarray  # one int64: batches before this one may be filled
    stop: np.ndarray  # one int64: 1 ends the work
    addresses: np.ndarray  # of the batches' memory
    taken: np.ndarray  # rows of each batch that threads have taken
    done: np.ndarray  # rows of each batch that are done
    status: np.ndarray  # of each row of each batch: OK or a key of REASONS
    train: bool
    res: int
    batch_size: int
    views: int
    bicubic: bool
    seed: int
    epoch: int
    scale: tuple
    ratio: tuple
    hflip: float
    crop_ratio: float


READ_TRIES = 10  # reads that bring nothing, before it counts as the end of the file


@njit
def read_sample(fd, to, size, offset):
    """Reads `size` bytes; an interrupted or short read goes on. False where the file ends."""
    got = 0
    tries = 0
    while got < size and tries < READ_TRIES:
        n = pread(fd, to + got, size - got, offset + got)
        if n > 0:
            got += n
        else:
            tries += 1
    return got == size


@njit
def box_of(job, stored, position, view):
    """The box of one view."""
    if job.train:
        return random_box(stored.width, stored.height, job.scale, job.ratio, job.seed, job.epoch,
                          position, view)
    return center_box(stored.width, stored.height, job.crop_ratio)


@njit
def box_of_views(job, stored, position):
    """The smallest box that holds the boxes of all views."""
    left = stored.width
    top = stored.height
    right = 0
    bottom = 0
    for view in range(job.views):
        box = box_of(job, stored, position, view)
        left = min(left, box.x)
        top = min(top, box.y)
        right = max(right, box.x + box.w)
        bottom = max(bottom, box.y + box.h)
    return Box(left, top, right - left, bottom - top)


@njit
def fill_row(job, scratch, sample, position, address, view_stride):
    """Writes a sample's views to addresses in a batch -> OK or a key of REASONS.

    What the views need is decoded once, because two crops overlap much.
    """
    stored = Stored(scratch.raw, job.sizes[sample], job.modes[sample], job.widths[sample],
                    job.heights[sample])
    if not read_sample(job.fd, scratch.raw, stored.size, job.ptrs[sample]):
        return SHORT_READ
    code = decode_sample(stored, box_of_views(job, stored, position), scratch)
    if code != OK:
        return code
    for view in range(job.views):
        box = box_of(job, stored, position, view)
        flip_number = uniform(job.seed, job.epoch, position, VIEW_DRAWS * view + FLIP_DRAW)
        output = Output(job.res, job.bicubic, job.train and flip_number < job.hflip)
        write_crop(box, output, address + view * view_stride, scratch)
    return OK


@njit(nogil=True, cache=True)
def fill(job, scratch, batch):
    """Fills rows of this batch and of later ones, with other threads at the same time.

    Returns (the number of a batch that this call completed, or -1 if there is nothing to do; the
    batch to go on with).
    """
    row_bytes = 3 * job.res * job.res
    while batch < atomic_load(job.limit.ctypes.data) and not atomic_load(job.stop.ctypes.data):
        first = batch * job.batch_size
        size = min(job.batch_size, len(job.samples) - first)
        row = atomic_add(job.taken.ctypes.data + 8 * batch, 1)
        if row >= size:
            batch += 1
            continue
        code = fill_row(job, scratch, job.samples[first + row], job.positions[first + row],
                        job.addresses[batch] + row * row_bytes, size * row_bytes)
        job.status[batch, row] = code
        if atomic_add(job.done.ctypes.data + 8 * batch, 1) + 1 == size:
            return batch, batch + 1
    return -1, batch


class FfcvCrops(NamedTuple):
    """The arguments of ffcv_decoder."""
    res: int
    bicubic: bool
    scale: tuple
    ratio: tuple
    seed: int


# A row of the table with which FFCV's batches are handed over, as columns:
(ROW_ADDRESS, ROW_SIZE, ROW_MODE, ROW_WIDTH, ROW_HEIGHT,  # see Stored
 ROW_SAMPLE,  # its number
 ROW_TO,  # address of its pixels
 ROW_CODE,  # written by fill_share: OK or a key of REASONS
 ROW_WORDS) = range(9)


@njit(nogil=True, cache=True)
def fill_share(table, thread, threads, number, crops):
    """Fills one thread's share of FFCV's batch `number`."""
    if len(table) == 0:
        return
    memory, scratch = make_scratch(table[:, ROW_SIZE], table[:, ROW_WIDTH], table[:, ROW_HEIGHT],
                                   crops.res)
    for i in range(thread, len(table), threads):
        row = table[i]
        stored = Stored(row[ROW_ADDRESS], row[ROW_SIZE], row[ROW_MODE], row[ROW_WIDTH],
                        row[ROW_HEIGHT])
        box = random_box(stored.width, stored.height, crops.scale, crops.ratio, crops.seed, number,
                         row[ROW_SAMPLE], 0)
        output = Output(crops.res, crops.bicubic, False)
        row[ROW_CODE] = resized_crop(stored, box, output, row[ROW_TO], scratch)
    memory[0] = 0  # numba frees an array after its last use, and scratch lies in this one
