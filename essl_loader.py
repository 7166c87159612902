"""Turns a .beton file into batches on the device, decoding only what each crop keeps of its JPEG.

    from essl_loader import ESSLLoader
    loader = ESSLLoader("data/train_500_95.beton", batch_size=256)
    for images, labels in loader:   # uint8 (B, 3, 224, 224) in channels_last, int64 (B,)
        ...

Needs numpy, numba, torch and libturbojpeg (`pip install turbojpeg`, or Debian's libturbojpeg0).
The kernels compile once, 20 seconds, into numba's cache beside this file. Reads top to bottom:
format, C library, kernels (draws, JPEG, resize, sample), reader, order, loaders, FFCV's operation.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
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
from collections import Counter, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import llvmlite.binding
import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba import carray, objmode, types
from numba.core.caching import FunctionCache
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from numba.np.unsafe.ndarray import to_fixed_tuple

# --- format: FFCV's .beton, version 2, little-endian
# | header 24 B | field descriptors 1041 B each | samples | pages ... | allocation table to end |
HEADER = np.dtype([
    ("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
    ("alloc_table_ptr", "<u8")])
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "S1024")])
IMAGE = np.dtype([  # mode: 0 JPEG, 1 raw RGB
    ("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SAMPLE = np.dtype({  # image and label, aligned as a C compiler would
    "names": ["mode", "width", "height", "data_ptr", "label"],
    "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"], "offsets": [0, 1, 3, 5, 16], "itemsize": 24})
# A JPEG of build_beton.py's with its index of entry points: | JPEG | entries | TRAILER |. FFCV and
# libjpeg-turbo ignore what follows a JPEG's end. See "the index" below.
TRAILER = np.dtype([
    ("checksum", "<u8"),  # of the JPEG's tables and the entries: each read compares it
    ("index_size", "<u4"),  # bytes of the entries; 0: there is no index
    ("crc32", "<u4"),  # of all that stands before it: build_beton.py --verify compares it
    ("format", "S8")])
INDEX_FORMAT = b"ESSLIDX1"
ESSL = 2  # version of what build_beton.py adds to the format
TRAILER_SIZE = TRAILER.itemsize
CHECKSUM_AT = TRAILER.fields["checksum"][1]
INDEX_SIZE_AT = TRAILER.fields["index_size"][1]
CRC32_AT = TRAILER.fields["crc32"][1]
FORMAT_AT = TRAILER.fields["format"][1]
FORMAT_WORD = int.from_bytes(INDEX_FORMAT, "little")
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # type ids that this reader knows
MAX_PIXELS_PER_BYTE = 1024  # of a JPEG: each 8x8 block takes a bit or more
# Beside x.beton: x.beton.json, the sidecar, and x.beton.names, the samples' names, which is this
# header, count + 1 offsets (u8) into the text behind them, and the text in UTF-8.
NAMES_HEADER = np.dtype([  # checksum: the .beton's; crc: of the offsets and the text
    ("magic", "S8"), ("checksum", "<u4"), ("crc", "<u4"), ("count", "<u8")])
NAMES_MAGIC = b"ESSLNAME"
MAX_CLASSES = 100_000  # a label beyond it is a number of something else
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "class_label", "class_name",
               "classname", "fine_label", "target", "category", "species", "breed",
               "predictionstring")  # of columns and JSON keys that hold labels, in this order


def tables_checksum(header, settings, samples, alloc):
    """crc32 over header, settings (sorted JSON, without their checksum), samples, allocations."""
    settings = {key: value for key, value in settings.items() if key != "checksum"}
    text = json.dumps(settings, sort_keys=True).encode()
    checksum = 0
    for part in (np.ravel(header), np.frombuffer(text, np.uint8), samples, alloc):
        checksum = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), checksum)
    return checksum


def crc32_of(*tables, start=0):
    """crc32 over tables of whole numbers, as int64."""
    checksum = start
    for table in tables:
        checksum = zlib.crc32(np.ascontiguousarray(table, np.int64), checksum)
    return checksum


class DataError(ValueError):
    """What is wrong with a data file or folder, where, and what to do about it, in words."""


def sidecar_of(path: str | Path) -> Path:
    """Where class names, build settings and excluded samples of a .beton lie."""
    return Path(f"{path}.json")


def is_sidecar(content) -> bool:
    """Whether JSON content is a sidecar of ours, not a file of the user's."""
    keys = set(content) if isinstance(content, dict) else set()
    return "classes" in keys and bool(keys & {"settings", "excluded"})


def names_of(path: str | Path) -> Path:
    """Where the samples' names of a .beton lie."""
    return Path(f"{path}.names")


def one_name(name):
    """A class's name, or None, in Unicode's NFC: macOS writes e and its accent as two letters."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


# --- reader
def add_index(jpeg: bytes, width: int, height: int) -> tuple[bytes, bool]:
    """What a .beton keeps of a JPEG: JPEG, index, TRAILER; and whether it has an index.

    It has none where the loader's own decoder cannot read it: libjpeg-turbo then decodes all of it,
    or finds out that it is damaged.
    """
    bind()
    units = -(-width // (16 * UNIT_WIDTH)) * -(-height // 8)  # or fewer
    entries = np.zeros(units + 2, np.int64)
    stored = np.frombuffer(jpeg, np.uint8)
    with kernel_cache(index_jpeg, COMPILING):
        memory, scratch = make_scratch(*np.array([[len(jpeg)], [width], [height]]), 1)
        index_size = index_jpeg(stored.ctypes.data, len(jpeg), width, height, entries.ctypes.data,
                                scratch)
    trailer = np.zeros((), TRAILER)
    if index_size > 0:
        trailer["checksum"] = entries[index_size // 8].view(np.uint64)
    trailer["index_size"] = index_size
    trailer["format"] = INDEX_FORMAT
    sample = jpeg + entries.tobytes()[:index_size] + trailer.tobytes()
    trailer["crc32"] = zlib.crc32(sample[:-TRAILER_SIZE + CRC32_AT])
    return sample[:-TRAILER_SIZE] + trailer.tobytes(), index_size > 0


def decode_jpeg(jpeg: bytes, width: int, height: int) -> tuple[int, np.ndarray]:
    """A whole JPEG by libjpeg-turbo: a code of REASONS, and uint8 (3 * height * width,) RGB."""
    bind()
    stored = np.frombuffer(jpeg, np.uint8)
    pixels = np.empty(3 * width * height, np.uint8)
    with kernel_cache(decode_rgb):
        code = decode_rgb(stored.ctypes.data, len(jpeg), width, height, pixels.ctypes.data)
    return code, pixels


def remove_index(sample: bytes) -> bytes:
    """The JPEG of a sample that add_index made."""
    index_size = int(np.frombuffer(sample[-TRAILER_SIZE:], TRAILER)["index_size"][0])
    return sample[:-TRAILER_SIZE - index_size]


def is_intact(sample: bytes) -> bool:
    """Whether the bytes that add_index made are still the same."""
    trailer = np.frombuffer(sample[-TRAILER_SIZE:].rjust(TRAILER_SIZE), TRAILER)[0]
    checksum = zlib.crc32(sample[:-TRAILER_SIZE + CRC32_AT])
    return bool(trailer["format"] == INDEX_FORMAT and trailer["crc32"] == checksum)


class Names(Sequence):
    """The samples' names of a .beton, read from a mapped file when they are asked for."""

    def __init__(self, path, checksum, count):
        self.path = path
        wrong = DataError(f"{path}: not the names of the .beton beside it. Build both again, or "
                          "remove this file to go on without names.")
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        start = NAMES_HEADER.itemsize
        text_start = start + 8 * (count + 1)
        if len(data) < text_start:
            raise wrong
        header = data[:start].view(NAMES_HEADER)[0]
        if header["magic"] != NAMES_MAGIC or header["checksum"] != checksum:
            raise wrong
        self._content = memoryview(data[start:])  # five times as fast as an array is
        self._offsets = self._content[:text_start - start].cast("Q")
        self._text = self._content[text_start - start:]
        if header["count"] != count or self._offsets[-1] != len(self._text):
            raise wrong
        self._crc = int(header["crc"])

    def __len__(self):
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.path}: name {i} of {len(self):,}")
        i %= len(self)
        name = bytes(self._text[self._offsets[i]:self._offsets[i + 1]])
        # A file's name need not be UTF-8; os.fsdecode turns such bytes into the same characters
        return name.decode("utf-8", "surrogateescape")

    def check(self):
        """Reads all of it. DataError if a bit of it is not as it was written."""
        if zlib.crc32(self._content) != self._crc:
            raise DataError(f"{self.path}: it does not match its checksum. Copy it again, or "
                            "remove it to go on without names.")


class BetonReader:
    """A .beton file's tables, checked against the file, and its single samples.

    Attributes: num_samples; labels (-1: none), widths, heights, modes, ptrs, sizes (int64, one
    entry a sample); settings (build_beton.py's, empty for FFCV's own files); classes (names or
    None); names (of the samples, each a path in its source, or None); excluded (sorted int64:
    samples that `build_beton.py --verify FILE --exclude-bad` found damaged, which loaders leave
    out); checksum (another one for other data). Raises DataError that says what is wrong, where,
    and what to do.
    """

    def __init__(self, path: str | Path):
        bind()
        self.path = Path(path)
        if not self.path.is_file():
            if self.path.suffix != ".beton":
                raise DataError(f"{path}: neither a .beton file nor a folder of pictures is there.")
            raise DataError(f"{path}: no such file. Build it: `python build_beton.py --data-dir "
                            f"PICTURES --out {shlex.quote(str(path))}`, or draw a small one, "
                            "data/demo_train.beton: `python build_beton.py --demo`.")
        self.file = open(self.path, "rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.names = None
        self._read_tables()
        self.checksum = self.settings.get("checksum")
        if self.checksum is None:  # FFCV's file
            self.checksum = crc32_of(self.labels, self.sizes, self.widths, self.heights)
        self._read_sidecar()
        if names_of(path).is_file():
            self.names = Names(names_of(path), self.settings.get("checksum"), self.num_samples)

    def _error(self, found):
        return DataError(f"{self.path}: {found}. The file is not a complete .beton of version 2; "
                         "build it again.")

    def title(self, i):
        """How messages call sample i."""
        return f"sample {i} ({self.names[i]})" if self.names else f"sample {i}"

    def sample_error(self, i, reason):
        """A DataError for sample i that says how to go on without it."""
        return DataError(f"{self.path}: {self.title(i)}: {reason}. `python build_beton.py --verify "
                         f"{shlex.quote(str(self.path))} --exclude-bad` records every damaged "
                         "sample, so that loaders leave it out.")

    def _bytes(self, size, offset):
        """`size` bytes at an offset, less where the file ends: one read may return a part only."""
        data = b""
        while part := os.pread(self.file.fileno(), size - len(data), offset + len(data)):
            data += part
        return data

    def _table(self, dtype, count, offset):
        size = count * dtype.itemsize
        if offset + size > self.size:
            raise self._error(f"it ends at byte {self.size:,}, a table at byte {offset + size:,}")
        return np.frombuffer(self._bytes(size, offset), dtype)

    def _read_tables(self):
        header = self._table(HEADER, 1, 0)[0]
        version, num_fields, self.page_size, n, alloc_ptr = header.item()
        count, rest = divmod(self.size - alloc_ptr, ALLOC.itemsize)
        sane = version == 2 and 1 <= num_fields <= 64 and self.page_size > 0 and n > 0
        if not sane or count < 1 or rest:
            raise self._error(f"its header is {dict(zip(HEADER.names, header.item()))}")
        fields = self._table(FIELD, num_fields, HEADER.itemsize)
        kinds = fields["type_id"].tolist()
        if kinds.count(2) != 1 or not set(kinds) <= set(FIELD_TYPES):
            raise self._error(f"its fields have the types {kinds}, not one picture (2) and labels")
        columns = [(f"f{i}", FIELD_TYPES[kind]) for i, kind in enumerate(kinds)]
        start = HEADER.itemsize + fields.nbytes
        samples = self._table(np.dtype(columns, align=True), n, start)
        alloc = self._table(ALLOC, count, alloc_ptr)
        image = kinds.index(2)
        try:
            text = bytes(fields["arguments"][image]).rstrip(b"\0")  # FFCV leaves these bytes 0
            self.settings = dict(json.loads(text or "{}"))
        except (ValueError, TypeError, RecursionError):
            raise self._error("its build settings are garbled") from None
        checksum = tables_checksum(header, self.settings, samples, alloc)
        ours = self.settings.get("essl") == ESSL and self.settings.get("checksum") == checksum
        if self.settings and not ours:
            raise self._error("the checksum over its header and tables does not match, or an "
                              "earlier build_beton.py made it")
        self.num_samples = n
        self.labels = np.full(n, -1)
        if 1 in kinds:
            self.labels = samples[self._label_field(fields)].astype(np.int64)
        self.modes, self.widths, self.heights, self.ptrs = (
            samples[f"f{image}"][name].astype(np.int64) for name in IMAGE.names)
        # A sample's size is in the allocation table only. Its place is checked, and no memory is
        # taken on the word of a table: pictures larger than their bytes are refused.
        places = alloc["ptr"].astype(np.int64)  # a hostile 2**63 becomes negative
        order = np.argsort(places, kind="stable")
        rows = order.take(np.searchsorted(places, self.ptrs, sorter=order), mode="clip")
        self.sizes = alloc["size"][rows].astype(np.int64)
        valid = places[rows] == self.ptrs
        valid &= (self.ptrs >= start + samples.nbytes) & (self.sizes <= alloc_ptr - self.ptrs)
        valid &= (self.sizes > 0) & (self.widths > 0) & (self.heights > 0) & (self.modes <= 1)
        valid &= self.widths * self.heights <= self.sizes * MAX_PIXELS_PER_BYTE
        if not valid.all():
            i = int(np.argmin(valid))
            raise self._error(f"sample {i} ({self.widths[i]}x{self.heights[i]}, mode "
                              f"{self.modes[i]}) has no valid place in it")

    def _label_field(self, fields):
        """Where the labels are: in the one field of whole numbers, or in that of a known name."""
        names = [name.decode(errors="replace").casefold() for name in fields["name"]]
        numbers = [i for i, kind in enumerate(fields["type_id"].tolist()) if kind == 1]
        for known in LABEL_NAMES:
            if known in names and names.index(known) in numbers:
                return f"f{names.index(known)}"
        if len(numbers) > 1:
            raise DataError(f"{self.path}: which field holds the labels? It has "
                            f"{', '.join(names[i] for i in numbers)}. Write it with one that is "
                            "called label.")
        return f"f{numbers[0]}"

    def _check_old_sidecar(self):
        """Earlier versions of build_beton.py wrote x.json; without class names classes may differ.

        It is recognised by its first bytes: a file of the user's may be large.
        """
        old = self.path.with_suffix(".json")
        if old == self.path or not old.is_file():
            return
        with open(old, "rb") as file:
            if not file.read(13).startswith(b'{\n "classes":'):
                return
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(old.read_text())
        if not is_sidecar(content):
            return
        checksum = content.get("settings", {}).get("checksum")
        if checksum == self.settings.get("checksum"):
            raise DataError(f"{old} is the sidecar of {self.path}, as earlier versions called it. "
                            f"Rename it: mv '{old}' '{sidecar_of(self.path)}'")

    def _read_sidecar(self):
        """Class names and excluded samples; a file of FFCV's has no sidecar."""
        sidecar = sidecar_of(self.path)
        if not sidecar.is_file():
            self._check_old_sidecar()
        content = {"classes": None, "excluded": {}}
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
                raise ValueError("it is another build's")
            excluded = sorted(int(number) for number in content.get("excluded") or {})
            if excluded and not 0 <= excluded[0] <= excluded[-1] < self.num_samples:
                raise ValueError(f"it excludes samples {excluded[0]} to {excluded[-1]}")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(f"{sidecar}: not the sidecar of {self.path}, which has "
                            f"{self.num_samples:,} samples ({error}). Build both again, or remove "
                            "the sidecar to go on without class names, with all samples.") from None
        self.excluded = np.array(excluded, np.int64)

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
        if self.modes[i] == 0:
            code, pixels = decode_jpeg(stored, width, height)
        else:
            code = OK if len(stored) == 3 * width * height else OTHER_SIZE
            pixels = np.frombuffer(stored, np.uint8)
        if code != OK:
            raise self.sample_error(i, REASONS[code])
        return pixels.reshape(height, width, 3).copy()

    def __getstate__(self):
        """For pickle: the path alone; the file is opened where the reader is unpickled."""
        return {"path": self.path, "size": self.size, "settings": self.settings,
                "labels": zlib.crc32(self.labels)}

    def __setstate__(self, state):
        self.__init__(state["path"])
        if self.__getstate__() != state:
            raise DataError(f"{self.path}: it is not the file any more that was open where this "
                            "was pickled. Open it anew.")

    def close(self):
        self.file.close()


# --- order, epochs and stages: what both loaders share
def usable_cores() -> int:
    """Cores for this process: affinity and cgroup quota, shared among torchrun's local ranks."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # no cgroup v2 here: no quota
        name = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        for folder in (Path("/sys/fs/cgroup") / name / "cpu.max").parents:
            with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
                quota, period = (folder / "cpu.max").read_text().split()
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def end_with_parent():
    """Called in a forked worker process: ends it within a second after its parent, even a killed
    one. torch's workers alone see that it is gone, but then wait for ever for somebody to take
    their results out of the pipe.
    """
    parent = multiprocessing.parent_process().pid

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


INTERPOLATIONS = ("bicubic", "bilinear")


def check(name, value, good, expected):
    """Raises ValueError for an argument that is not as expected."""
    if not good:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


@dataclass(eq=False, repr=False)
class EpochLoader(contextlib.AbstractContextManager):
    """What both loaders share: which sample comes when, a pure function of (seed, epoch)."""

    path: str | Path
    batch_size: int
    train: bool = True
    res: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    crop_ratio: float = 224 / 256
    interpolation: str = "bicubic"
    num_workers: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int | None = None  # None: 1, with a warning where there are several processes
    drop_last: bool | None = None
    device: str | torch.device = "cpu"
    indices: np.ndarray | list[int] | None = None
    order: str = "random"
    views: int = 1
    return_index: bool = False  # batches are (images, labels, samples), samples int64 (B,)
    transform: object = None

    def __post_init__(self):
        self._warn_of_ranks = self.world_size is None
        self.world_size = 1 if self.world_size is None else self.world_size
        for name, good, expected in (
                ("order", self.order in ("random", "pages"), "'random' or 'pages'"),
                ("interpolation", self.interpolation in INTERPOLATIONS, INTERPOLATIONS),
                ("rank", 0 <= self.rank < self.world_size, f"less than {self.world_size}"),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("num_workers", self.num_workers >= 0, "at least 0"),
                ("views", self.views == 1 or self.views > 1 and self.train, "1 where train=False"),
                ("crop_ratio", 0 < self.crop_ratio <= 1, "above 0, at most 1")):
            check(name, getattr(self, name), good, expected)
        self.device = torch.device(self.device)
        check("device", str(self.device), self.device.type != "cuda" or torch.cuda.is_available(),
              "'cpu', for torch finds no usable CUDA device: install a driver that fits this torch")
        self.train = bool(self.train)
        self.ratio = (float(self.ratio[0]), float(self.ratio[1]))
        self.hflip = float(self.hflip)
        self.crop_ratio = float(self.crop_ratio)
        self.num_workers = self.num_workers or usable_cores()
        self.drop_last = self.train if self.drop_last is None else self.drop_last
        self._kept = None
        self.set_indices(np.arange(len(self.labels)) if self.indices is None else self.indices)
        self.closed = False
        self._process = os.getpid()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.set_stage()
        self.set_epoch(0)
        self._check_length()

    def _get_indices(self):
        return self._indices

    def set_indices(self, indices: np.ndarray | list[int]):
        """The samples of an epoch, from the next epoch on, in order where train=False.

        A sample may be in it several times, each time with another crop, as for class-balanced
        epochs or hard examples. All ranks give the same. Raises ValueError for what is no list of
        samples.
        """
        if not hasattr(self, "_kept"):  # an argument, before the file is open
            self._indices = indices
            return
        total = len(self.labels)
        array = np.asarray(indices)
        whole = array.dtype.kind in "iu" and array.ndim == 1 and array.size
        if not (whole and array.min() >= 0 and array.max() < total):
            raise ValueError(f"{self.path}: indices of type {array.dtype} and shape {array.shape}: "
                             "expected a list of samples, whole numbers from 0 to "
                             f"{total - 1}. Of a mask take np.flatnonzero(mask).")
        self._indices = array.astype(np.int64)
        self._indices.flags.writeable = False  # a change in place would not be seen
        # Orders are drawn with the excluded samples and leave them out afterwards, so that a run
        # that a damaged sample ended goes on with the same order and crops of the others.
        self._kept = ~np.isin(self._indices, self.excluded)
        self.num_samples = int(self._kept.sum())

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

    def set_stage(self, res: int | None = None, scale: tuple[float, float] | None = None):
        """Output side in pixels and crop area from the next epoch on; None keeps what is."""
        res = self.res if res is None else res
        scale = self.scale if scale is None else scale
        check("res", res, res >= 1, "at least 1 pixel")
        check("scale", scale, 0 < scale[0] <= scale[1] <= 1, "0 < low <= high <= 1")
        self.res = int(res)
        self.scale = (float(scale[0]), float(scale[1]))

    def set_epoch(self, epoch: int):
        """The next iteration is this epoch from its start; otherwise iterations count up from 0."""
        self.epoch = int(epoch)
        self.batch = 0
        self._started = False

    def state_dict(self) -> dict:
        """Where the iteration stands, in samples of all ranks: another number may go on from it."""
        indices = self._epoch_indices if self._started else self.indices
        return {"epoch": self.epoch, "samples": self.batch * self.batch_size * self.world_size,
                "seed": self.seed, "num_samples": len(indices), "order": self.order,
                "indices": hashlib.sha1(indices).hexdigest(),
                "res": self.res, "scale": list(self.scale)}

    def load_state_dict(self, state: dict):
        """Goes on with the exact next batch; ValueError if the data or the batches differ."""
        for key, ours in (("seed", self.seed), ("order", self.order)):
            if state[key] != ours:
                raise ValueError(f"{self.path}: the state has {key} {state[key]}, this loader "
                                 f"{ours}. Take the same data and arguments.")
        ours = hashlib.sha1(self.indices).hexdigest()
        same_indices = state.get("indices", ours) == ours  # earlier versions did not keep it
        if state["num_samples"] != len(self.indices) or not same_indices:
            raise ValueError(f"{self.path}: the state is of num_samples {state['num_samples']}, "
                             f"this loader of {len(self.indices)}, or they are not the same "
                             "samples. Take the same data; first call set_indices() with the "
                             "indices of the epoch in which the state was saved.")
        batch, rest = divmod(state["samples"], self.batch_size * self.world_size)
        if rest:
            raise ValueError(f"{self.path}: the state is {state['samples']} samples into its "
                             "epoch. Take a batch_size x world_size that divides it.")
        self.set_epoch(state["epoch"])
        self.batch = batch
        self.set_stage(state["res"], state["scale"])

    def _positions(self):
        """This rank's positions in `indices` for self.epoch; the ranks' interleave to the whole."""
        order = np.arange(len(self.indices))
        if self.train:
            order = self._shuffle(np.random.default_rng([self.seed, self.epoch]))
        order = order[self._kept[order]]
        if self.train:
            order = order[:len(order) // self.world_size * self.world_size]  # as many for each rank
        return np.ascontiguousarray(order[self.rank::self.world_size])

    def _shuffle(self, rng):
        return rng.permutation(len(self.indices))

    def __len__(self):
        n = self.num_samples // self.world_size
        if not self.train:  # the first ranks take what is left
            n += int(self.rank < self.num_samples % self.world_size)
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def __iter__(self):
        self._check_usable()
        self._check_length()
        self._check_ranks()
        if self._started:  # an earlier iteration was left early: this is the next epoch
            self.set_epoch(self.epoch + 1)
        self._started = True
        self._epoch_indices = self.indices
        batches = self._host_batches(self._positions(), self.batch)
        for images, labels, samples in self._to_device(batches) if self._stream else batches:
            images = self._transform_batch(images)
            self.batch += 1
            yield (images, labels, samples) if self.return_index else (images, labels)
        self.set_epoch(self.epoch + 1)

    def _transform_batch(self, images):
        return images

    def __getstate__(self):
        """For pickle: the arguments and where the iteration stands; see __setstate__."""
        if self.closed:
            raise RuntimeError(f"{self.path}: this loader is closed, it cannot be pickled.")
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        if self._warn_of_ranks:
            arguments["world_size"] = None
        return {"arguments": arguments, "state": self.state_dict(),
                "labels": zlib.crc32(self.labels)}

    def __setstate__(self, state):
        """Opens the data again, in a process started by spawn for example, and goes on with the
        next batch. Raises what the constructor and load_state_dict raise."""
        self.__init__(**state["arguments"])
        if zlib.crc32(self.labels) != state["labels"]:
            raise DataError(f"{self.path}: its labels are not those that it had where the loader "
                            "was pickled. Make a new loader.")
        self.load_state_dict(state["state"])

    def _check_ranks(self):
        """Warns once if other processes seem to read the same samples: nobody shards a loader."""
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
            raise RuntimeError(f"{self.path}: this loader is closed.")
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.path}: this loader was made in process {self._process} and "
                               f"has no threads in its fork {os.getpid()}. Make one there.")

    def _to_device(self, batches):
        """Copies one batch ahead on the side stream: training never waits for a copy."""
        sent = []  # copies under way, each with the pinned batch that it reads
        for batch in batches:
            images, labels, samples = batch
            moved = batch if self.return_index else (images, labels)
            with torch.cuda.stream(self._stream):
                there = [tensor.to(self.device, non_blocking=True) for tensor in moved]
                sent.append((there, batch, self._stream.record_event()))
            if len(sent) > 1:
                yield self._receive(*sent.pop(0))
        for last in sent:
            yield self._receive(*last)

    def _receive(self, there, batch, copied):
        copied.synchronize()  # long done; until here `batch` kept its pinned buffer
        for tensor in there:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        if not self.return_index:
            there.append(None)  # in the place of the samples
        return tuple(there)

    def close(self):
        self.closed = True

    def __exit__(self, *exc):
        self.close()


# Not in the class: there it would be the default of the dataclass's argument
EpochLoader.indices = property(EpochLoader._get_indices, EpochLoader.set_indices)


# --- loader over a .beton file
AHEAD = 3  # batches that the threads fill before they are asked for
WINDOW = 512 << 20  # bytes that order="pages" shuffles in
READ_PIECE = 1 << 20  # bytes that one request to read ahead names: of a larger one Linux reads 8 MB


class Epoch:
    """The threads that fill one epoch's batches.

    An image costs no lock, no Python and no allocation; a batch costs a lock and a wake-up.
    """

    def __init__(self, loader, positions, start):
        reader = loader.reader
        size = loader.batch_size
        self.loader = loader
        self.start = start
        self.end = len(loader)
        self.granted = start  # the batches before this one may be filled
        self.filling = {}  # batch: its buffer
        self.complete = set()
        self.events = queue.SimpleQueue()  # from the threads: numbers of batches, exceptions
        # Queues, not semaphores: the garbage collector may call stop() in any of the threads
        self.fills = queue.SimpleQueue()  # wakes the threads: as many as there are for a batch
        self.reads = queue.SimpleQueue()  # batches that may be read ahead
        self.stopped = False
        self.job = Job(
            reader.file.fileno(), reader.modes, reader.widths, reader.heights, reader.ptrs,
            reader.sizes, loader.indices[positions], positions, np.array([start]),
            *np.zeros((3, self.end), np.int64), np.zeros((self.end, size), np.int64), loader.train,
            loader.res, size, loader.views, loader.interpolation == "bicubic", loader.seed,
            loader.epoch, loader.scale, loader.ratio, loader.hflip, loader.crop_ratio)
        if not fill.signatures:
            with kernel_cache(fill, COMPILING):
                memory, scratch = self._make_scratch()
                fill(self.job, scratch, start)  # returns: nothing is granted yet
                advance(self.job.limit, 0)
        work = [self._fill_batches] * loader.num_workers
        if loader.order == "pages":
            work.append(self._read_ahead)
        self.threads = [threading.Thread(target=self._run, args=(f,), daemon=True) for f in work]
        for thread in self.threads:
            thread.start()

    def _make_scratch(self):
        reader = self.loader.reader
        return make_scratch(reader.sizes, reader.widths, reader.heights, self.job.res)

    def _run(self, work):
        try:
            work()
        except BaseException as error:  # the caller would wait for ever for a thread that ended
            self.events.put(error)

    def _fill_batches(self):
        memory, scratch = self._make_scratch()  # memory lives as long as this thread
        batch = self.start
        while not self.stopped:
            completed, batch = fill(self.job, scratch, batch)
            if completed >= 0:
                self.events.put(completed)
            else:
                self.fills.get()

    def _read_ahead(self):
        """Asks the system for the windows that the coming batches lie in, front to back."""
        reader = self.loader.reader
        window = max(WINDOW, reader.page_size)
        size = self.job.batch_size
        asked = set()
        for batch in range(self.start, self.end):
            if batch >= self.start + AHEAD:
                self.reads.get()
            if self.stopped:
                return
            numbers = reader.ptrs[self.job.samples[batch * size:(batch + 1) * size]] // window
            for number in sorted(set(numbers.tolist()) - asked):
                asked.add(number)
                end = min((number + 1) * window, reader.size)
                for at in range(number * window, end, READ_PIECE):
                    if self.stopped:
                        return
                    os.posix_fadvise(reader.file.fileno(), at, READ_PIECE, os.POSIX_FADV_WILLNEED)

    def _grant(self):
        """Lets the threads fill one batch more, into a buffer that no tensor holds."""
        job = self.job
        free = self.loader.free_buffers
        nbytes = job.views * job.batch_size * 3 * job.res ** 2
        buffer = free.pop() if free else None
        while buffer is not None and buffer.nbytes != nbytes:  # of another resolution
            buffer = free.pop() if free else None
        if buffer is None:
            pinned = self.loader.device.type == "cuda"
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        view = buffer[:]  # lives as long as a tensor made from it; then the buffer is free again
        weakref.finalize(view, free.append, buffer)
        self.filling[self.granted] = view
        job.addresses[self.granted] = buffer.ctypes.data
        self.granted += 1
        advance(job.limit, 1)
        self._wake()

    def _wake(self):
        self.reads.put(None)
        for _ in self.threads:
            self.fills.put(None)

    def take(self, batch):
        """Waits for a batch: pictures, uint8 ([views,] B, 3, res, res), labels, samples (B,)."""
        self.loader._check_usable()
        reader = self.loader.reader
        job = self.job
        while self.granted < min(self.end, batch + AHEAD):
            self._grant()
        while batch not in self.complete:
            event = self.events.get()
            if isinstance(event, BaseException):
                raise RuntimeError(f"{reader.path}: loading ended: {event!r}.") from event
            self.complete.add(event)
        samples = job.samples[batch * job.batch_size:(batch + 1) * job.batch_size]
        bad = np.flatnonzero(job.status[batch])
        if len(bad):
            raise reader.sample_error(samples[bad[0]], REASONS[int(job.status[batch, bad[0]])])
        shape = (job.views, len(samples), job.res, job.res, 3)
        images = torch.from_numpy(self.filling.pop(batch))[:math.prod(shape)].view(shape)
        images = images.permute(0, 1, 4, 2, 3)
        labels = torch.from_numpy(reader.labels[samples])
        images = images if job.views > 1 else images[0]
        return images, labels, torch.from_numpy(samples.copy())

    def stop(self):
        if os.getpid() != self.loader._process or sys.is_finalizing():
            return  # in a fork, or at Python's end, the threads are gone
        self.stopped = True
        advance(self.job.limit, -2 * self.end)  # the kernels return after the image at hand
        self._wake()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        self.events.put(RuntimeError("the loader was closed"))


class ESSLLoader(EpochLoader):
    """Batches of a .beton file: uint8 (B, 3, res, res) in channels_last memory and int64 (B,).

    Training takes RandomResizedCrop(scale, ratio) and a flip with probability hflip; evaluation the
    centre square of crop_ratio of the short side. views=V: (V, B, 3, res, res), V crops of each
    sample. Bytes depend on (seed, epoch, indices) and the stage alone, not on num_workers (0: all
    cores of this process). Evaluation visits each sample once over all ranks; training leaves out
    what does not fill all ranks, and the last partial batch (drop_last=None). order="pages" is for
    files larger than memory. transform: a function of a whole batch of images, called on the
    device, in evaluation too; its result takes their place. return_index=True adds the samples'
    numbers, int64 (B,), to a batch. A pickled loader opens its file again. On a CUDA device five
    batches lie in pinned memory, each in the next power of two of bytes.
    Raises ValueError for an argument and DataError for the file; both say what to do.
    """

    def __post_init__(self):
        self.reader = BetonReader(self.path)
        self.labels = self.reader.labels
        self.classes = self.reader.classes
        self.names = self.reader.names
        self.excluded = self.reader.excluded
        self.checksum = self.reader.checksum
        self.free_buffers = []  # for batches; those that no tensor holds
        self._epochs = set()
        super().__post_init__()

    def _transform_batch(self, images):
        return self.transform(images) if self.transform else images

    def _shuffle(self, rng):
        """order="pages": windows of WINDOW bytes, in random order and shuffled within, all ranks in
        the same one at a time; their borders differ from epoch to epoch."""
        if self.order == "random":
            return super()._shuffle(rng)
        pages = max(1, WINDOW // self.reader.page_size)
        page = self.reader.ptrs[self.indices] // self.reader.page_size
        window = (page + rng.integers(pages)) // pages
        rank = rng.permutation(int(window.max()) + 1)[window]
        return np.lexsort((rng.random(len(window)), rank))

    def _host_batches(self, positions, start):
        epoch = Epoch(self, positions, start)
        self._epochs.add(epoch)
        try:
            for batch in range(start, epoch.end):
                yield epoch.take(batch)
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
def start_folder_worker(_):
    """torchrun and Slurm signal worker processes too: SIGTERM ends one only if its parent sent it,
    as Python does at its end where an epoch was left in the middle; it would wait for ever."""
    parent = multiprocessing.parent_process().pid
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # also in threads that start later

    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()
    end_with_parent()


class FolderLoader(EpochLoader):
    """ESSLLoader's surface over a folder of pictures, by Pillow and torch's DataLoader.

    Takes class folders, or a flat folder of pictures, whose labels are -1; see list_folder and
    folder_classes. What is not taken is printed once. Same order and relative boxes as ESSLLoader
    for the same seed. transform: a function of the cropped and flipped Pillow picture, in training
    (RandAug for Table 6). return_index=True adds the samples' numbers. order changes nothing here.
    Raises ValueError for an argument and DataError for the folder or a picture.
    """

    def __post_init__(self):
        not_taken = NotTaken()
        names, archives = list_folder(self.path, not_taken)
        for name in archives:
            not_taken.add(ARCHIVE, name)
        if not names:
            raise DataError(f"{self.path}: expected class folders of pictures, or pictures, and "
                            f"found none. Not taken: {not_taken}.")
        self.names = sorted(names, key=folder_order)
        labels = folder_classes(self.names, self.path, not_taken)
        self.classes = None
        self.labels = np.full(len(names), -1)
        if labels:
            self.classes = sorted(set(labels))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = np.array([numbers[label] for label in labels], np.int64)
        if not_taken.names:
            print_once(f"{self.path}: not taken: {not_taken}")
        folder = os.path.realpath(self.path)
        self.paths = [os.path.join(folder, name) for name in self.names]
        self.excluded = np.zeros(0, np.int64)
        self.checksum = crc32_of(self.labels, start=zlib.crc32("\n".join(self.names).encode()))
        super().__post_init__()

    def __getitem__(self, position):
        """For the DataLoader: (views, res, res, 3) uint8, label, sample, what is wrong or ""."""
        from PIL import Image, ImageOps
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many; a worker's own
        sample = self.indices[position]
        draw = (self.seed, self.epoch, position)
        resample = Image.Resampling[self.interpolation.upper()]
        crops = np.zeros((self.views, self.res, self.res, 3), np.uint8)
        try:
            with Image.open(self.paths[sample]) as picture:
                picture.load()
                with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
                    ImageOps.exif_transpose(picture, in_place=True)
                if picture.mode[0] in "IF":  # convert() would clip 16-bit grey at 255
                    raise ValueError(f"more than 8 bits a pixel (mode {picture.mode}): convert it")
                picture = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return crops, 0, sample, (
                f"{self.paths[sample]}: cannot be decoded ({error}). Remove it, or build a file "
                "without it: `python build_beton.py --skip-bad --data-dir "
                f"{shlex.quote(str(self.path))} --out FILE.beton`.")
        for view in range(self.views):
            x, y, w, h = center_box(*picture.size, self.crop_ratio)
            if self.train:
                x, y, w, h = random_box(*picture.size, self.scale, self.ratio, *draw, view)
            crop = picture.crop((x, y, x + w, y + h)).resize((self.res, self.res), resample)
            flip_draw = VIEW_DRAWS * view + FLIP_DRAW
            if self.train and uniform(*draw, flip_draw) < self.hflip:
                crop = ImageOps.mirror(crop)
            if self.train and self.transform:
                # Transforms draw from these generators, this worker process's own
                number = int(uniform(*draw, flip_draw + 1) * 2 ** 32)
                random.seed(number)
                np.random.seed(number)
                torch.manual_seed(number)
                try:
                    crop = np.asarray(self.transform(crop))
                    if crop.shape != crops[view].shape or crop.dtype != np.uint8:
                        raise ValueError(f"expected uint8 of shape {crops[view].shape} from it, "
                                         f"found {crop.dtype} of shape {crop.shape}")
                except Exception as error:  # the user's function can raise anything
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    return crops, 0, sample, (f"{self.paths[sample]}: transform failed on it: "
                                              f"{error!r}, {at.filename}, line {at.lineno}. Mend "
                                              "transform.")
            crops[view] = crop
        return crops, self.labels[sample], sample, ""

    def _host_batches(self, positions, start):
        size = self.batch_size
        needed = (self.num_workers * AHEAD + 1) * self.views * size * 3 * self.res ** 2
        check_shared_memory(needed, "take fewer num_workers")
        with kernel_cache(random_box):  # here, before the worker processes start
            random_box(8, 8, self.scale, self.ratio, self.seed, 0, 0, 0)
            center_box(8, 8, self.crop_ratio)
            uniform(self.seed, 0, 0, 0)
        batches = [positions[b * size:(b + 1) * size].tolist() for b in range(start, len(self))]
        for images, labels, samples, errors in torch.utils.data.DataLoader(
                self, batch_sampler=batches, num_workers=self.num_workers, prefetch_factor=AHEAD,
                pin_memory=self.device.type == "cuda", multiprocessing_context="fork",
                generator=torch.Generator(), worker_init_fn=start_folder_worker):
            if any(errors):
                raise DataError(max(errors))
            images = images.permute(1, 0, 4, 2, 3)  # (views, B, 3, res, res)
            yield images if self.views > 1 else images[0], labels, samples


# --- the same decoder inside FFCV
def interrupt_ffcv(sample):
    """FFCV's loader would wait for ever for a thread that raised: interrupts the main thread."""
    print(f"essl_loader.ffcv_decoder: sample {sample} is damaged. `python build_beton.py --verify "
          "FILE` lists all that are.", file=sys.stderr)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def ffcv_decoder(output_size: tuple[int, int] = (224, 224),
                 scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3),
                 interpolation: str = "bicubic", seed: int = 0):
    """An FFCV Operation for the place of RandomResizedCropRGBImageDecoder: the paper's ESSL.

    It decodes only the crop. Pipelines as in FFCV's documentation, e.g. {"image": [ffcv_decoder(),
    RandomHorizontalFlip(), ToTensor(), ...]}; uint8 (B, res, res, 3). Crops are a function of
    (seed, number of the batch, sample). A damaged sample is named on stderr and interrupts the
    program (KeyboardInterrupt).
    """
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    res = int(output_size[0])
    check("output_size", output_size, res == output_size[1], "a square")
    check("interpolation", interpolation, interpolation in INTERPOLATIONS, INTERPOLATIONS)
    bicubic = int(interpolation == "bicubic")
    scale = (float(scale[0]), float(scale[1]))
    ratio = (float(ratio[0]), float(ratio[1]))
    bind()
    with kernel_cache(fill_share, COMPILING):  # here, not in the middle of FFCV's compiling
        fill_share(np.zeros((0, 8), np.int64), 0, 1, scale, ratio, seed, 0, res, bicubic)

    class CropDecoder(SimpleRGBImageDecoder):  # FFCV takes only its own class for a decoder
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
                table = np.empty((n, 8), np.int64)
                for i in range(n):
                    sample = metadata[batch_indices[i]]
                    data = read(sample["data_ptr"], storage_state)
                    row = table[i]
                    row[0] = data.ctypes.data
                    row[1] = data.size
                    row[2] = sample["mode"]
                    row[3] = sample["width"]
                    row[4] = sample["height"]
                    row[5] = batch_indices[i]
                    row[6] = destination[i].ctypes.data
                for thread in parallel(threads):
                    # Not literals, for each of which numba would compile a kernel of its own
                    fill_share(table, np.int64(thread), np.int64(threads), scale, ratio,
                               np.int64(seed), number, np.int64(res), np.int64(bicubic))
                if table[:, 7].max() != 0:
                    sample = batch_indices[np.argmax(table[:, 7])]
                    with objmode():
                        interrupt_ffcv(sample)
                    raise ValueError("a sample of the .beton file is damaged")
                return destination[:n]
            decode.is_parallel = True
            return decode
    return CropDecoder()


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
    """Raises DataError where a set to evaluate on has not a label of 0 to classes - 1 each."""
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
    """Raises DataError where nothing can be learned from labels, or a held-out set has others."""
    fault = labels_fault(train)
    if fault:
        raise DataError(f"{train.path} {fault}: nothing can be learned from its labels. Give class "
                        "folders, or --labels to build_beton.py.")
    if train.classes and val.classes and list(train.classes) != list(val.classes):
        differ = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise DataError(f"{val.path} has other classes than {train.path}: they differ in "
                        f"{', '.join(differ[:4])}.")
    check_labels(val, int(train.labels.max()) + 1)


def open_loader(path: str | Path, batch_size: int, train: bool = True, **kwargs):
    """ESSLLoader for a file, FolderLoader for a folder, with the same arguments."""
    loader = FolderLoader if Path(path).is_dir() else ESSLLoader
    return loader(path, batch_size, train, **kwargs)


# --- pictures in folders: what is taken, and how the rest is counted; build_beton.py does the same
MAX_PIXELS = 1 << 30  # of a picture, which then takes 3 GB; Pillow's own limit is a sixth of it
ARCHIVES = (".tar", ".parquet")  # endings of files of pictures, which build_beton.py reads
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found",
                  "System Volume Information")  # of macOS, NAS, Windows and Linux
SETS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
        "dev": "val", "test": "test", "testing": "test"}  # what they are to a person
# Reasons why something is not taken, for one and for several
OTHER_ENDING = ("file with another ending", "files with other endings")
HIDDEN_FILE = ("hidden file", "hidden files")
HIDDEN_FOLDER = ("hidden folder", "hidden folders")
LINK_BACK = ("link back to a folder above it", "links back to a folder above them")
SPECIAL_FILE = ("link, pipe or device", "links, pipes or devices")
EMPTY_CLASS = ("class folder without a picture", "class folders without a picture")
ARCHIVE = ("archive or table", "archives or tables")


class NotTaken:
    """What was seen and not taken, counted and named by reason. str(): in words.

    Attributes: pictures, how many of it have a picture's ending; folders, all that were seen.
    """

    def __init__(self):
        self.names = {}  # reason: Counter of names
        self.inside = Counter()  # reason: how many pictures lie in folders that were not taken
        self.pictures = 0
        self.folders = set()

    def add(self, reason, name, pictures=0, inside=0):
        """Counts `name`, which is a picture if pictures is 1, with `inside` pictures in it."""
        names = self.names.setdefault(reason, Counter())
        if len(names) >= 1000 and name not in names:  # millions of names would take memory
            name = "others"
        names[name] += 1
        self.inside[reason] += inside
        self.pictures += pictures + inside

    def take_back(self, reason, name):
        """One that was counted is taken after all."""
        names = self.names.get(reason, Counter())
        if names[name] > 0:
            names[name] -= 1
        self.names[reason] = +names  # without zeros
        if not self.names[reason]:
            del self.names[reason]

    def __str__(self):
        parts = []
        for (one, several), names in self.names.items():
            total = names.total()
            repeated = len(names) > 1 and total > len(names)
            shown = [f"{name} {count:,}" if repeated else name
                     for name, count in names.most_common(4)]
            if len(names) > len(shown):
                shown.append("...")
            part = f"{total:,} {one if total == 1 else several} ({', '.join(shown)})"
            inside = self.inside[one, several]
            if inside:
                part += f" with {inside:,} picture{'' if inside == 1 else 's'}"
            parts.append(part)
        return ", ".join(parts) or "nothing"


def picture_endings():
    """The endings, in lower case, of files that Pillow can open here.

    HEIC is one once its plugin is registered. Left out are films (MPEG), programs (EPS runs
    Ghostscript) and formats that Pillow only knows by name (its stubs: HDF5, WMF, ...).
    """
    from PIL import Image, ImageFile
    known = Image.registered_extensions()  # loads all of Pillow's formats
    opened = {"MPO"}  # which Pillow opens as a JPEG
    for name, (opener, _) in Image.OPEN.items():
        is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if not is_stub and name not in ("MPEG", "EPS"):
            opened.add(name)
    return frozenset(ending for ending, name in known.items() if name in opened)


def is_hidden(name):
    """Whether a file or folder is the system's or a program's, not data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def ending_of(name):
    return os.path.splitext(name)[1].lower()


def list_folder(folder, not_taken):
    """(pictures, archives) anywhere below a folder, as paths from it, in no order.

    Links are followed, but not back to a folder that they lie in. A broken link is a picture that
    cannot be read. The rest is counted in not_taken. DataError for a folder that cannot be read.
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
            raise DataError(f"{here}: this folder cannot be read ({error.strerror}). Mend its "
                            "rights or its disk, or move it away.") from None
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
                inside = sum(ending_of(file) in endings
                             for _, _, files in os.walk(entry.path) for file in files)
                not_taken.add(HIDDEN_FOLDER, name, inside=inside)
            elif is_folder:
                waiting.append((name, (*above, identity)))
            elif not is_file:
                not_taken.add(SPECIAL_FILE, name)
            elif is_hidden(entry.name):
                not_taken.add(HIDDEN_FILE, name, pictures=ending in endings)
            elif ending in endings:
                pictures.append(name)
            elif ending in ARCHIVES:
                archives.append(name)
            else:
                not_taken.add(OTHER_ENDING, ending or "no ending")
    return pictures, archives


def class_of(name, top=""):
    """The class of a picture by its path behind the folders `top`: its first folder, else ""."""
    folder, slash, _ = name[len(top):].partition("/")
    return one_name(folder) if slash else ""


def folder_order(name, top=""):
    """To sort pictures by, as torchvision's ImageFolder does: class, folder, file."""
    return class_of(name, top), os.path.split(name)


def folder_classes(names, source, not_taken, top=""):
    """The class of each picture by its path in `source`, behind the folders `top`.

    Where all lie in folders, the first folder is the class, as in torchvision's ImageFolder. None
    if no picture lies in a folder. DataError where some do and some do not, and where folders are
    called train, val or test. Folders of not_taken without a picture are counted there.
    """
    one_copy = {}  # else a million strings
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
    set_of = {name: SETS.get(re.sub("[0-9_-]+$", "", name.casefold())) for name in classes}
    sets = {kind for kind in set_of.values() if kind}
    if len(sets) > 1 or all(set_of.values()):
        found = sorted(name for name in classes if set_of[name])
        one_set = os.path.join(source, found[0])
        way = f"Give the folder of one split, such as {one_set}"
        if not os.path.isdir(one_set):
            way = f"Make an archive of {found[0]} alone"
        raise DataError(f"{source} holds {', '.join(found)}: these look like splits, not classes. "
                        f"{way}. If you want the pictures of all of them together, without labels, "
                        "give build_beton.py --unlabelled.")
    seen = {class_of(folder + "/", top) for folder in not_taken.folders if folder.startswith(top)}
    for name in sorted(seen - classes - {""}):
        not_taken.add(EMPTY_CLASS, name)
    return labels


@functools.cache
def print_once(text):
    """Prints to stderr what several loaders of a run would print again."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


def check_shared_memory(needed, remedy):
    """Raises DataError if /dev/shm, by which worker processes talk, has too few bytes free."""
    free = 0
    with contextlib.suppress(OSError):
        shm = os.statvfs("/dev/shm")
        free = shm.f_bavail * shm.f_frsize
    if free < needed:  # else a bus error, or "no space left" of no disk
        raise DataError(f"the worker processes need {needed / 1e6:,.1f} MB free in /dev/shm, which "
                        f"has {free / 1e6:,.3f} MB. Start the container with a larger --shm-size, "
                        f"mount /dev/shm larger, or {remedy}.")


# --- C library: libjpeg-turbo, called from the kernels without the GIL
@functools.cache
def bind():
    """libjpeg-turbo as a ctypes.CDLL, after its functions were made known to the kernels.

    The turbojpeg wheel's (version 3), else the system's (2.1). Every public entry calls this:
    importing the file does nothing. Raises ImportError that names both ways to get it.
    """
    wheel = [str(path) for folder in sys.path
             for path in Path(folder).glob("turbojpeg.libs/libturbojpeg*")]
    for path in wheel + ["libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib"]:
        with contextlib.suppress(OSError):
            lib = ctypes.CDLL(path)
            break
    else:
        raise ImportError(
            "libturbojpeg was not found: `pip install turbojpeg` brings version 3 (preferred), "
            "`apt-get install libturbojpeg0` version 2.1; either will do.")
    for name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy"):
        # Under a name of our own: ffcv brings the system's copy into the process.
        address = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol("essl_" + name, address)
    return lib


@functools.cache
def say_uncached():
    """Says once that there is no cache; worker processes and all ranks but 0 leave it to others."""
    if multiprocessing.parent_process() is None and int(os.environ.get("RANK", 0)) == 0:
        print("essl_loader: numba's cache cannot be read or written, so each process compiles the "
              "kernels anew, about 20 s. Set NUMBA_CACHE_DIR to a folder that you can write to, "
              "with 10 MB free.", file=sys.stderr, flush=True)


class KernelCache(FunctionCache):
    """numba's cache on disk. A full disk, or another user's file, costs time but ends nothing."""

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except OSError:
            say_uncached()

    def save_overload(self, *args):
        try:
            super().save_overload(*args)
        except OSError:
            say_uncached()


def njit(function=None, cache=False, **options):
    """numba.njit, whose cache=True raises at once where no folder for the cache can be written.

    Read-only code and no home are such a case. Here the kernel then goes without a cache.
    """
    if function is None:
        return functools.partial(njit, cache=cache, **options)
    kernel = numba.njit(function, **options)
    if cache:
        with contextlib.suppress(RuntimeError):  # "no locator available for file ..."
            kernel._cache = KernelCache(function)  # as numba's own cache=True does
    return kernel


@contextlib.contextmanager
def kernel_cache(kernel, notice=""):
    """Holds a lock on numba's cache while `kernel` is called for the first time in this process.

    torchrun's ranks start at once, and numba's cache is not made for several that write. Numba
    renews a kernel's index before its code: a process killed in between would leave old code under
    the new index, so the code of another version of this file is removed first. The lock file
    holds the version. `notice` goes to stderr if the kernel has to be compiled.
    """
    if kernel.signatures:
        yield
        return
    if kernel.stats.cache_path is None:
        say_uncached()
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


_c = types.ExternalFunction
_i32 = types.int32
_word = types.intp
pread = _c("pread", _word(_i32, _word, _word, _word))  # fd, to, size, offset
memchr = _c("memchr", _word(_word, _i32, _word))  # start, byte, size
memcmp = _c("memcmp", _i32(_word, _word, _word))  # one, other, size
memset = _c("memset", _word(_word, _i32, _word))  # to, byte, size
memcpy = _c("memcpy", _word(_word, _word, _word))  # to, from, size
tj_init = _c("essl_tjInitDecompress", _word())
tj_destroy = _c("essl_tjDestroy", _i32(_word))
tj_header = _c(  # handle, jpeg, size, addresses: width, height, subsampling, colour space
    "essl_tjDecompressHeader3", _i32(_word, _word, _word, _word, _word, _word, _word))
tj_rgb = _c(  # handle, jpeg, size, to, width, pitch, height, format, flags
    "essl_tjDecompress2", _i32(_word, _word, _word, _word, _i32, _i32, _i32, _i32, _i32))
STOP_ON_WARNING = 8192  # libjpeg-turbo then fails where it would paint damaged blocks grey
COMPILING = ("essl_loader: compiling the loader's kernels, once, about 20 s; later processes load "
             "them from numba's cache.")
U = np.uint64


# --- kernels: LLVM instructions that numba does not offer, on addresses and on vectors of 8 to 32
# numbers. LLVM does not vectorise these loops (16-bit products, transposes, packing) well itself.
# Only generic operations are used: the same source compiles for x86 and ARM. Kernels take
# addresses, not byte arrays: FFCV alters numba's shared type of those (os_cache.py,
# `t1.mutable = False`), and a kernel that uses it is not found afterwards.
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
BYTES = ir.VectorType(I8, 32)
WORDS = Vector(I16, 16)
FLOATS = Vector(ir.FloatType(), 8)


def emits(result, *arguments, function=None):
    """Kernels may call the decorated function, or `function`; it emits LLVM code for such a call.

    result, arguments: numba's types.
    """
    def register(emit):
        key = function or emit
        members = {"key": key, "cases": [signature(result, *arguments)]}
        infer_global(key, types.Function(type("Emitted", (ConcreteTemplate,), members)))

        @lower_builtin(key, *arguments)
        def lower(context, builder, sig, args):
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value
        return emit
    return register


def load_from(builder, address, ir_type):
    """The value of an LLVM type at an address, aligned or not."""
    return builder.load(builder.inttoptr(address, ir_type.as_pointer()), align=1)


def store_to(builder, address, value):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def load_and_store(kind, memory_type, extend="sext"):
    """Two functions for kernels: load a value from an address, and store it there.

    Shorter integers than int64 are extended and cut.
    """
    wide = I64 if kind == types.int64 else memory_type

    @emits(kind, types.intp)
    def load(builder, address):
        return getattr(builder, extend)(load_from(builder, address, memory_type), wide)

    @emits(types.none, types.intp, kind)
    def store(builder, address, value):
        store_to(builder, address, builder.trunc(value, memory_type))
    return load, store


load_byte, store_byte = load_and_store(types.int64, I8, "zext")
_, store_int16 = load_and_store(types.int64, I16)
load_int32, store_int32 = load_and_store(types.int64, I32)
load_int64, store_int64 = load_and_store(types.int64, I64)
load_float, store_float = load_and_store(types.float32, ir.FloatType())
load_floats, store_floats = load_and_store(FLOATS, FLOATS.ir_type)
load_words, store_words = load_and_store(WORDS, WORDS.ir_type)


@emits(types.uint64, types.intp)
def load_big_endian(builder, address):
    """The eight bytes at an address as a big-endian number."""
    return builder.bswap(load_from(builder, address, I64))  # on a little-endian machine


@emits(types.voidptr, types.intp)
def as_pointer(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


@emits(types.int64, types.intp, types.int64)
def atomic_add(builder, address, value):
    """Adds to the int64 at an address, after all that was stored before; returns what was there."""
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "acq_rel")


def call_llvm(builder, name, *args, result=None):
    function_type = ir.FunctionType(result or args[0].type, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, (), function_type), args)


@emits(types.boolean, types.boolean)
def unlikely(builder, condition):
    """Tells LLVM that a condition is rarely true, so that the other path keeps its registers."""
    return call_llvm(builder, "llvm.expect.i1", condition, ir.Constant(ir.IntType(1), 0))


def shuffle(builder, a, b, lanes):
    """LLVM's shufflevector: lanes of a followed by b."""
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
    """Kernels may write the operation for two vectors, and for a vector and a number."""
    def emit(builder, a, b):
        a = splat(builder, a, vector.ir_type)
        b = splat(builder, b, vector.ir_type)
        return instruction(builder, a, b, **options)
    for kinds in ((vector, vector), (vector, scalar), (scalar, vector)):
        emits(vector, *kinds, function=operation)(emit)


for operation, instruction in (
        (operator.add, ir.IRBuilder.add), (operator.sub, ir.IRBuilder.sub),
        (operator.and_, ir.IRBuilder.and_), (operator.lshift, ir.IRBuilder.shl)):
    add_operator(operation, WORDS, types.int64, instruction)
for operation, instruction in (
        (operator.add, ir.IRBuilder.fadd), (operator.sub, ir.IRBuilder.fsub),
        (operator.mul, ir.IRBuilder.fmul), (operator.truediv, ir.IRBuilder.fdiv)):
    add_operator(operation, FLOATS, types.float32, instruction, flags=("contract",))  # maybe FMAs


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
    low = splat(builder, low, FLOATS.ir_type)  # a comparison and a choice are one instruction
    high = splat(builder, high, FLOATS.ir_type)
    a = builder.select(builder.fcmp_ordered(">", a, low), a, low)
    return builder.select(builder.fcmp_ordered("<", a, high), a, high)


def rounded(builder, floats):
    n = floats.type.count
    return call_llvm(builder, f"llvm.lrint.v{n}i32.v{n}f32", floats, result=ir.VectorType(I32, n))


@emits(types.none, types.intp, FLOATS)
def store_integers(builder, address, a):
    """Stores eight numbers, rounded to int32."""
    store_to(builder, address, rounded(builder, a))


@emits(FLOATS, types.intp)
def load_coefficients(builder, address):
    """Eight int16 as float32."""
    return builder.sitofp(load_from(builder, address, ir.VectorType(I16, 8)), FLOATS.ir_type)


def multiply_high(builder, a, b):
    """(a * b) >> 16: one instruction on x86."""
    wide = ir.VectorType(I32, 16)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    return builder.trunc(builder.ashr(product, ir.Constant(wide, [16] * 16)), WORDS.ir_type)


add_operator(multiply_high, WORDS, types.int64, multiply_high)


def clamp_to_byte(builder, value):
    """Integers within -128 and 127: before a truncation LLVM makes it a saturating pack."""
    for order, bound in ((">", -128), ("<", 127)):
        bounds = ir.Constant(value.type, [bound] * value.type.count)
        value = builder.select(builder.icmp_signed(order, value, bounds), value, bounds)
    return value


@emits(WORDS, WORDS, WORDS)
def pack_bytes(builder, even, odd):
    """Samples in 1/64 level as int8: the 16 even ones, then the 16 odd ones."""
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
def store_interleaved(builder, address, *planes):
    """Stores three vectors of 32 int8 as 32 pixels of three bytes, 128 higher."""
    high = ir.Constant(BYTES, [128] * 32)
    r, g, b = (builder.xor(builder.bitcast(plane, BYTES), high) for plane in planes)
    rg = shuffle(builder, r, g, range(64))
    bb = shuffle(builder, b, b, range(64))
    store_to(builder, address, shuffle(builder, rg, bb, [k // 3 + 32 * (k % 3) for k in range(96)]))


@emits(types.none, types.intp, types.int64, types.intp, types.int64)
def transpose_16x32(builder, source, source_stride, target, target_stride):
    """16 rows of 32 bytes at source, as pack_bytes leaves them, become 32 rows of 16 at target."""
    rows = []
    for _ in range(16):
        rows.append(load_from(builder, source, BYTES))
        source = builder.add(source, source_stride)
    # Four times each 16 bytes of row k and of row k + 8 alternate: in the low or high half
    lanes = [[part + 8 * high + i // 2 + 32 * (i % 2) for part in (0, 16) for i in range(16)]
             for high in range(2)]
    for _ in range(4):
        rows = [shuffle(builder, rows[k // 2], rows[k // 2 + 8], lanes[k % 2]) for k in range(16)]
    for i in range(32):
        half = range(i % 2 * 16, i % 2 * 16 + 16)
        store_to(builder, target, shuffle(builder, rows[i // 2], rows[i // 2], half))
        target = builder.add(target, target_stride)


@njit
def int64s_at(address, shape):
    return carray(as_pointer(address), shape, np.int64)


@njit(nogil=True, cache=True)
def advance(limit, batches):
    """atomic_add for Python."""
    atomic_add(limit.ctypes.data, batches)


# --- kernels: random draws. Reference: torchvision's RandomResizedCrop.get_params, in distribution
@njit(nogil=True, cache=True)
def uniform(seed, epoch, index, draw):
    """The draw-th number in [0, 1) of sample `index` in `epoch`: splitmix64 over the four."""
    z = U(seed)
    for word in (U(epoch), U(index), U(draw)):
        z = (z ^ word) * U(0x9E3779B97F4A7C15) + U(0xD1B54A32D192ED03)
        z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
        z = z ^ (z >> U(31))
    return np.float64(z >> U(11)) * 2.0 ** -53


FLIP_DRAW = 40  # random_box uses draws 0 to 39
VIEW_DRAWS = 64  # the draws of one view: view 1 uses 64 to 127


@njit(nogil=True, cache=True)
def random_box(width, height, scale, ratio, seed, epoch, index, view=0):
    """RandomResizedCrop's (x, y, w, h): ten tries, else the centre.

    A try has area ~ U(scale) and log aspect ~ U(log ratio).
    """
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    for attempt in range(10):
        draw = VIEW_DRAWS * view + 4 * attempt
        share = scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, index, draw)
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, index, draw + 1))
        area = width * height * share
        w = int(round(math.sqrt(area * aspect)))
        h = int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            x = int(uniform(seed, epoch, index, draw + 2) * (width - w + 1))
            y = int(uniform(seed, epoch, index, draw + 3) * (height - h + 1))
            return x, y, w, h
    w = width
    h = height
    if width < ratio[0] * height:
        h = min(height, max(1, int(round(width / ratio[0]))))
    elif width > ratio[1] * height:
        w = min(width, max(1, int(round(height * ratio[1]))))
    return (width - w) // 2, (height - h) // 2, w, h


@njit(nogil=True, cache=True)
def center_box(width, height, crop_ratio):
    """The central square of crop_ratio of the short side: Resize(256) + CenterCrop(224) in one."""
    side = max(1, int(round(min(width, height) * crop_ratio)))
    return (width - side) // 2, (height - side) // 2, side, side


# --- kernels: JPEG. Codes that kernels return, and what they mean to a person
OK, SHORT_READ, BROKEN, OTHER_SIZE, OTHER_KIND = range(5)  # the last one: ask libjpeg-turbo
REASONS = {
    SHORT_READ: "it cannot be read: the file ends inside it, or the disk fails",
    BROKEN: "its JPEG data, or their index, are damaged",
    OTHER_SIZE: "its own size and the one in the file's table differ"}
# What parse_jpeg finds. MCU = the 8x8 to 16x16 pixels whose blocks of all components JPEG stores
# together. QUANT, DC, AC: the table of each of three components. TABLES: a bit for each that was
# defined.
# MCUS_X, MCUS_Y: how many a row and a column of the picture have. UNIT_MCUS: those of a unit.
# CHECKSUM: of all segments that matter for the pixels.
(HEIGHT, WIDTH, COMPONENTS, H_SAMP, V_SAMP, MCUS_X, MCUS_Y, UNIT_MCUS, INTERVAL, SCAN, TABLES,
 CHECKSUM) = range(12)
QUANT = 12
DC = 15
AC = 18
INFO_SIZE = 21
# Narrower units cost file size, wider ones time: these take 2.6 % of 500_95, 2.9 % in 4:4:4
UNIT_WIDTH = 3  # MCUs of 16 pixels
UNIT_WIDTH_444 = 7  # MCUs of 8 pixels
PREFIX = 11  # bits that one look-up decodes: larger tables take longer to build than they save
PREFIXES = 1 << PREFIX
# A Huffman table: entries, 20 limits, 20 offsets, 256 symbols, all int32; then what it was built
# from, by which the next picture, of FFCV's files always, finds that its table is there already
LIMITS = 4 * PREFIXES
OFFSETS = LIMITS + 80
SYMBOLS = OFFSETS + 80
SOURCE_SIZE = SYMBOLS + 1024
SOURCE = SOURCE_SIZE + 8
TABLE = SOURCE + 16 + 256
GROUP = 1040  # bytes of eight neighbours' coefficients: int16 [coefficient][block], and trash
END_OF_BLOCK = 128  # what an entry adds to the coefficient's number, so that one test finds both
ESCAPE = 192
ZIGZAG = np.array([
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63])
# Arai, Agui, Nakajima's scale factors of a row or column, for dequantisation: Pennebaker, 4.4.3
AAN = np.array([1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100,
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
def build_table(source, dc, table):
    """Huffman table (ITU-T T.81, annex C) from its 16 counts and symbols at an address.

    An entry of 32 bits for the next PREFIX bits: value << 16 | (zeros before it + 1) << 8 | bits of
    code and value. Where they are more than PREFIX, symbol << 24 | bits of the code << 16 |
    ESCAPE << 8; and those bits are 0 where even the code is longer: then limits, offsets and
    symbols tell. All entries of a DC table are of the second kind. Returns False if it is not one.
    """
    code = 0
    n = 0
    for length in range(1, 17):
        count = load_byte(source + length - 1)
        store_int32(table + OFFSETS + 4 * length, n - code)
        if code + count > 1 << length or n + count > 256:
            return False
        for _ in range(count):
            symbol = load_byte(source + 16 + n)
            store_int32(table + SYMBOLS + 4 * n, symbol)
            run = symbol >> 4
            size = symbol & 15
            if dc and run:
                return False
            free = PREFIX - length
            if free >= 0 and (dc or free < size):
                entry = symbol << 24 | length << 16 | ESCAPE << 8
                fill_entries(table, code << free, 1 << free, entry)
            elif free >= 0:
                zeros = END_OF_BLOCK if size == 0 and run != 15 else run + 1
                for v in range(1 << size):
                    value = value_at_top(U(v) << U(63 - size) << U(1), size)
                    entry = value << 16 | zeros << 8 | (length + size)
                    first = (code << free) + (v << (free - size))
                    fill_entries(table, first, 1 << (free - size), entry)
            n += 1
            code += 1
        if length == PREFIX:  # the codes of all others are longer, or none
            fill_entries(table, code, PREFIXES - code, ESCAPE << 8)
        store_int32(table + LIMITS + 4 * length, code << (16 - length))
        code <<= 1
    return True


@njit
def long_code(word, table):
    """(bits, symbol) of a code of more than PREFIX bits; 0 bits if it is none."""
    top = np.int64(word >> U(48))
    for length in range(PREFIX + 1, 17):
        if top < load_int32(table + LIMITS + 4 * length):
            index = load_int32(table + OFFSETS + 4 * length) + (top >> (16 - length))
            return length, load_int32(table + SYMBOLS + 4 * index)
    return 0, 0


@njit
def add_to_checksum(checksum, start, size):
    """A checksum of 64 bits goes on over more bytes, eight at a time.

    Each step is a bijection: a single word that differs always shows.
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
def parse_jpeg(source, size, info, tables, quants):
    """Reads the header and tables of a baseline JPEG at an address; False for any other kind.

    tables, quants: addresses of four each. A quantisation step is stored with the inverse DCT's
    scale factors, float32, in natural order.
    """
    info[:] = 0
    if size < 4 or load_16(source) != 0xFFD8:
        return False
    at = source + 2
    while at + 4 <= source + size:
        marker = load_16(at)
        length = load_16(at + 2)
        p = at + 4
        end = at + 2 + length
        if end + 2 > source + size:
            return False
        if marker == 0xFFDB:  # quantisation tables of bytes
            while p + 65 <= end:
                t = load_byte(p)
                if t > 3:
                    return False
                for k in range(64):
                    natural = ZIGZAG[k]
                    scale = AAN[natural >> 3] * AAN[natural & 7] / 8
                    store_float(quants + 256 * t + 4 * natural, load_byte(p + 1 + k) * scale)
                info[TABLES] |= 16 << t
                p += 65
        elif marker == 0xFFC4:  # Huffman tables
            while p + 17 <= end:
                t = (load_byte(p) >> 3) + (load_byte(p) & 1)
                n = 0
                for k in range(16):
                    n += load_byte(p + 1 + k)
                if load_byte(p) & 0xEE or p + 17 + n > end:
                    return False
                table = tables + TABLE * t
                same = load_int64(table + SOURCE_SIZE) == 16 + n
                if not same or memcmp(table + SOURCE, p + 1, 16 + n) != 0:
                    store_int64(table + SOURCE_SIZE, 0)
                    if not build_table(p + 1, t < 2, table):
                        return False
                    memcpy(table + SOURCE, p + 1, 16 + n)
                    store_int64(table + SOURCE_SIZE, 16 + n)
                info[TABLES] |= 1 << t
                p += 17 + n
        elif marker == 0xFFC0 or marker == 0xFFC1:  # frame: size and sampling
            n = (length - 8) // 3
            if length != 11 and length != 17 or load_byte(p) != 8 or load_byte(p + 5) != n:
                return False
            info[HEIGHT] = load_16(p + 1)
            info[WIDTH] = load_16(p + 3)
            info[COMPONENTS] = n
            for c in range(n):
                sampling = load_byte(p + 7 + 3 * c)
                if load_byte(p + 6 + 3 * c) != c + 1 or (c > 0 and sampling != 0x11):
                    return False
                info[QUANT + c] = min(load_byte(p + 8 + 3 * c), 4)  # 4: never defined
            info[H_SAMP] = load_byte(p + 7) >> 4 if n == 3 else 1
            info[V_SAMP] = load_byte(p + 7) & 15 if n == 3 else 1
            if not (1 <= info[H_SAMP] <= 2 and 1 <= info[V_SAMP] <= 2):
                return False
            info[MCUS_X] = (info[WIDTH] + 8 * info[H_SAMP] - 1) // (8 * info[H_SAMP])
            info[MCUS_Y] = (info[HEIGHT] + 8 * info[V_SAMP] - 1) // (8 * info[V_SAMP])
            info[UNIT_MCUS] = UNIT_WIDTH if info[H_SAMP] == 2 else UNIT_WIDTH_444
        elif marker == 0xFFDD and length == 4:
            info[INTERVAL] = load_16(p)
        elif marker == 0xFFDA:  # scan: the entropy-coded data follow
            info[SCAN] = end
            n = info[COMPONENTS]
            if n == 0 or length != 6 + 2 * n or load_byte(p) != n:
                return False
            if load_16(p + 1 + 2 * n) != 63 or load_byte(p + 3 + 2 * n) != 0:  # all coefficients
                return False
            for c in range(n):
                used = load_byte(p + 2 + 2 * c)
                info[DC + c] = used >> 4
                info[AC + c] = 2 + (used & 15)
                needed = 16 << info[QUANT + c] | 1 << info[DC + c] | 1 << info[AC + c]
                if load_byte(p + 1 + 2 * c) != c + 1 or used & 0xEE:
                    return False
                if info[TABLES] & needed != needed:
                    return False
            info[CHECKSUM] = add_to_checksum(info[CHECKSUM], at, end - at)
            return True
        elif not 0xFFE0 <= marker <= 0xFFFE or marker == 0xFFEE:  # comments do not matter
            return False  # FFEE: Adobe's, which may say that the components are RGB
        if marker < 0xFFE0:
            info[CHECKSUM] = add_to_checksum(info[CHECKSUM], at, end - at)
        at = end
    return False


@njit
def can_decode(address, size, width, height, info, scratch):
    """Reads a JPEG's header. False for another kind or size, and for one with restart markers."""
    known = parse_jpeg(address, size, info, scratch.tables, scratch.quants)
    return known and info[WIDTH] == width and info[HEIGHT] == height and info[INTERVAL] == 0


@njit
def find_end(start, end):
    """Where the entropy-coded data at `start` end: at EOI, or at fill bytes before it; else 0.

    Other markers, and fill bytes within the data, are for libjpeg-turbo.
    """
    while start < end - 1:
        start = memchr(start, 0xFF, end - 1 - start)
        if start == 0:
            return 0
        if load_byte(start + 1) != 0:  # else the 0xFF belongs to the data
            at = start + 1
            while at < end - 1 and load_byte(at) == 0xFF:
                at += 1
            return start if load_byte(at) == 0xD9 else 0
        start += 2
    return 0


@njit
def unstuff(start, end, clean):
    """Copies entropy-coded data without the zero that JPEG puts behind each 0xFF; the size."""
    first = clean
    while start < end:
        found = memchr(start, 0xFF, end - start)
        n = end - start if found == 0 else found - start + 1
        memcpy(clean, start, n)
        clean += n
        start += n + 1
    return clean - first


# A place is where a block of a row goes, in 64-bit words: address of its coefficients, addresses of
# its tables, offset of its DC predictor in the unit. The first place is where a stream waits when
# nothing is left: its tables give the same symbol for ever.
PLACE_SIZE = 32
# A unit is a piece of an MCU row that is decoded in one go, in 64-bit words: bit positions where it
# begins, may end at the latest, and ended; its first place, and the end of its places; three DC
# predictors. A stream, one word, is the unit that it is at; the word after both is the next unit.
BIT_HIGH, BIT_LAST, PLACE, PLACE_END, PREDICTORS = range(8, 48, 8)
UNIT_SIZE = 64
DAMAGED = 0
BLOCK_DONE = 63 << 8  # a count from here on is the end of a block, an escape, or damage


@njit(forceinline=True)
def bits_at(position):
    """The next 57 bits or more, from an absolute bit position, at the top of a word."""
    return load_big_endian(position >> 3) << U(position & 7)


@njit(forceinline=True)
def next_symbol(word, count, table, coefs, zigzag):
    """Decodes a look-up's worth; count: coefficient's number << 8 | bits used since the refill."""
    entry = load_int32(table + (np.int64(word >> U(64 - PREFIX)) << 2))
    count += entry & 0xFFFF
    store_int16(coefs + load_int64(zigzag + ((count >> 8 & 255) << 3)), entry >> 16)
    return word << U(entry & 63), count, entry


@njit(forceinline=True)
def long_symbol(entry, word, table):
    """(bits, symbol) of an ESCAPE entry; 0 bits if there is no such code."""
    length = (entry >> 16) & 255
    if length:
        return length, (entry >> 24) & 255
    return long_code(word, table)


@njit(forceinline=True)
def next_block(stream, units, position, place):
    """A block ends: decodes the DC coefficient of the next (ITU-T T.81, F.2.2.1).

    units: address of the address of the next unit. Returns (word, position, count, AC table,
    coefficients, place).
    """
    unit = load_int64(stream)
    place += PLACE_SIZE
    good = position <= load_int64(unit + BIT_HIGH)
    if place == load_int64(unit + PLACE_END):
        store_int64(unit + BIT_LAST, position)
        unit = load_int64(units)
        store_int64(units, unit + UNIT_SIZE)
        store_int64(stream, unit)
        position = load_int64(unit)
        place = load_int64(unit + PLACE)
    table = load_int64(place + 8)
    word = bits_at(position)
    entry = load_int32(table + (np.int64(word >> U(64 - PREFIX)) << 2))
    length, size = long_symbol(entry, word, table)
    word <<= U(length)
    value = value_at_top(word, size)
    predictor = unit + load_int64(place + 24)
    value += load_int64(predictor)
    store_int64(predictor, value)
    coefs = load_int64(place)
    store_int16(coefs, value)
    position += length + size
    table = load_int64(place + 16)
    place = place if good and length > 0 else DAMAGED
    return bits_at(position), position, 0, table, coefs, place


@njit(forceinline=True)
def after_symbol(stream, units, zigzag, entry, position, count, table, coefs, place):
    """What follows a symbol that is an escape or ends its block; returns as next_block does."""
    position += count & 255
    k = count >> 8
    if k >= ESCAPE:
        k -= ESCAPE
        word = bits_at(position)
        length, symbol = long_symbol(entry, word, table)
        size = symbol & 15
        position += length + size
        k += (symbol >> 4) + 1
        if size == 0 and symbol != 0xF0:
            k = END_OF_BLOCK
        elif size > 0:
            value = value_at_top(word << U(length), size)
            store_int16(coefs + load_int64(zigzag + 8 * k), value)
        if length == 0:
            k = 64
        if k < 63:
            return bits_at(position), position, k << 8, table, coefs, place
    word, position, count, table, coefs, place = next_block(stream, units, position, place)
    if 63 < k < END_OF_BLOCK:
        place = DAMAGED
    return word, position, count, table, coefs, place


@njit
def decode_units(streams, zigzag, waiting):
    """Decodes all units of a list to coefficients: ITU-T T.81, annex F; False if one is damaged.

    Two streams take turns symbol by symbol, so that the latency of one's look-up hides behind the
    other's. A refill lasts for five symbols. The zigzag table has 256 rows: those that are no
    coefficient lead to a place for trash, so that the store comes before the test. Reads at most
    250 bytes behind a unit. waiting: the place where a stream ends. Reference: libjpeg-turbo; about
    160 us for a crop of 278 x 278.
    """
    one = streams
    two = streams + 8
    units = streams + 16
    word1, position1, count1, table1, coefs1, place1 = next_block(one, units, 0, 0)
    word2, position2, count2, table2, coefs2, place2 = next_block(two, units, 0, 0)
    if place1 == DAMAGED or place2 == DAMAGED:
        return False
    while True:
        for _ in range(5):
            word1, count1, entry = next_symbol(word1, count1, table1, coefs1, zigzag)
            if unlikely(count1 >= BLOCK_DONE):
                word1, position1, count1, table1, coefs1, place1 = after_symbol(
                    one, units, zigzag, entry, position1, count1, table1, coefs1, place1)
                if place1 == DAMAGED or (place1 == waiting and place2 == waiting):
                    return place1 != DAMAGED
            word2, count2, entry = next_symbol(word2, count2, table2, coefs2, zigzag)
            if unlikely(count2 >= BLOCK_DONE):
                word2, position2, count2, table2, coefs2, place2 = after_symbol(
                    two, units, zigzag, entry, position2, count2, table2, coefs2, place2)
                if place2 == DAMAGED or (place1 == waiting and place2 == waiting):
                    return place2 != DAMAGED
        position1 += count1 & 255
        count1 &= -256
        word1 = bits_at(position1)
        position2 += count2 & 255
        count2 &= -256
        word2 = bits_at(position2)


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
def dequantised(coefs, quants, k):
    """Coefficient k of eight blocks, as float32."""
    return load_coefficients(coefs + 16 * k) * load_float(quants + 4 * k)


@njit
def inverse_dct(coefs, quants, work, to, stride):
    """Eight blocks' coefficients to 8 rows of 64 samples, int8 (level - 128).

    Each vector holds one coefficient of the eight blocks, so nothing is transposed: column c of
    block b lands at 8 * c + b of its row. Reference: libjpeg-turbo's accurate integer transform, to
    one level; 0.13 us.
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


# One thread's memory: addresses. A plane's row in `plane`: its address, stride, first column and
# row, pixels that a sample is wide and high, components of its JPEG (0: none, columns in order).
Scratch = namedtuple("Scratch", (
    "raw clean info plane tables quants zigzag wait streams units places coefs work planes "
    "split rows_axis luma_axis chroma_axis strip luma chroma resized end"))
ADDRESS, STRIDE, LEFT, TOP, STEP_X, STEP_Y, OF_JPEG, PLANE_SIZE = range(8)


@njit(nogil=True, cache=True)
def make_scratch(bytes_of, widths, heights, res):
    """(memory, Scratch in it) for samples of these bytes, widths and heights; needs bind()."""
    side = max(widths.max(), heights.max()) + 144  # with the MCUs and groups that stick out
    area = (widths * heights).max() + 288 * side
    mcus = side // 8  # of a row, at least 16 too many
    out = (res + 31) // 32 * 32
    most_taps = 4 * side // res + 8
    axis = 8 * (side + most_taps) + 4 * (res + 8) * (most_taps + 1)  # see Axis
    sizes = np.array((
        bytes_of.max(), bytes_of.max(), 8 * INFO_SIZE, 24 * PLANE_SIZE, 4 * TABLE,
        4 * 256, 8 * 256, 16, 24, UNIT_SIZE * mcus, 6 * PLACE_SIZE * mcus, GROUP * mcus, 2048,
        3 * area, 3 * area, axis, axis, axis, 192 * out + 32 * most_taps, out * side,
        2 * out * side, 3 * out * out))
    ends = np.cumsum((sizes + 256 + 63) // 64 * 64)  # kernels read up to 256 bytes behind some
    memory = np.empty(ends[-1] // 8 + 8, np.int64)
    at = np.full(23, (memory.ctypes.data + 63) // 64 * 64)
    at[1:] += ends
    scratch = Scratch(*to_fixed_tuple(at, 23))
    memset(scratch.tables, 0, 4 * TABLE)  # no table is there yet
    return memory, scratch


@njit
def list_places(info, first, last, col0, col1, scratch):
    """Where the blocks of a row's MCUs first to last go; those outside col0 to col1 into the trash.

    Returns the bytes of a row's coefficients: groups of trash, of luma's rows, of Cb, of Cr.
    """
    store_int64(scratch.wait, 0)  # what a waiting stream reads, and one entry of each table
    store_int64(scratch.wait + 8, 1 << 16 | ESCAPE << 8)
    places = int64s_at(scratch.places, (1 + 6 * (last - first), PLACE_SIZE // 8))
    places[0] = (scratch.coefs, scratch.wait + 8, scratch.wait + 12, PREDICTORS)
    n = 1
    for column in range(first, last):
        group = 1
        for c in range(info[COMPONENTS]):
            across = info[H_SAMP] if c == 0 else 1
            dc_table = scratch.tables + TABLE * info[DC + c]
            ac_table = scratch.tables + TABLE * info[AC + c]
            for _ in range(info[V_SAMP] if c == 0 else 1):
                for h in range(across):
                    block = (column - col0) * across + h
                    offset = (group + (block >> 3)) * GROUP + 2 * (block & 7)
                    coefs = scratch.coefs + (offset if col0 <= column < col1 else 0)
                    places[n] = (coefs, dc_table, ac_table, PREDICTORS + 8 * c)
                    n += 1
                group += ((col1 - col0) * across + 7) // 8
    return group * GROUP


@njit
def blocks_of_mcu(info):
    return info[H_SAMP] * info[V_SAMP] + info[COMPONENTS] - 1


@njit
def fill_zigzag(zigzag):
    """256 rows for decode_units: where a coefficient goes. What is none goes into the trash."""
    for i in range(256):
        store_int64(zigzag + 8 * i, 16 * ZIGZAG[i] if i < 64 else GROUP - 16)


# The index. A row of MCUs is cut into units of UNIT_MCUS, and entry n says where unit n begins,
# counted over all rows. One more entry says where the last unit ends. An entry is one int64:
#
#     bits 63-36                                     | 35-24  | 23-12  | 11-0
#     bit in the file of the JPEG, of a byte that is | DC predictors there, in two's complement
#     no stuffed zero                                | Cr     | Cb     | Y
#
# A unit must end where the next one begins, with its predictors: that is the check on damage.
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
    """Shifts the other fields out, and the sign in."""
    return (entry << (64 - PREDICTOR_BITS * (component + 1))) >> (64 - PREDICTOR_BITS)


@njit
def units_of_row(info):
    return (info[MCUS_X] + info[UNIT_MCUS] - 1) // info[UNIT_MCUS]


@njit
def size_of_index(info):
    return 8 * (info[MCUS_Y] * units_of_row(info) + 1)


@njit
def find_index(address, size, info):
    """(address of the first entry, or 0 where there is no index; False if it is damaged)."""
    trailer = address + size - TRAILER_SIZE
    if size < TRAILER_SIZE or load_int64(trailer + FORMAT_AT) != FORMAT_WORD:
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
def start_streams(scratch, number):
    """Puts both streams before unit 1, and behind the last of `number` units two to wait in."""
    units = int64s_at(scratch.units, (number + 3, UNIT_SIZE // 8))
    units[0] = (0, 0, 0, 0, PLACE_SIZE, 0, 0, 0)  # where streams begin: it ends at once
    streams = int64s_at(scratch.streams, (3,))
    streams[:2] = scratch.units
    streams[2] = scratch.units + UNIT_SIZE
    for n in range(number + 1, number + 3):
        units[n] = (8 * scratch.wait, 8 * scratch.wait + 64, 0, scratch.places, 0, 0, 0, 0)
    return units


@njit
def list_units(info, address, entries, number, count, mcus, scratch):
    """The units `number` and following of an index, and their data without stuffing.

    mcus: how many they have, as list_places was told. False if an entry points outside the JPEG.
    """
    step = PLACE_SIZE * blocks_of_mcu(info) * info[UNIT_MCUS]
    units = start_streams(scratch, count)
    place = scratch.places + PLACE_SIZE
    last_place = place + PLACE_SIZE * blocks_of_mcu(info) * mcus
    clean = scratch.clean
    entry = load_int64(entries + 8 * number)
    for n in range(1, count + 1):
        next_entry = load_int64(entries + 8 * (number + n))
        begin = entry >> POSITION_SHIFT
        end = next_entry >> POSITION_SHIFT
        if not 8 * (info[SCAN] - address) <= begin <= end < 8 * (entries - address):
            return False
        size = unstuff(address + (begin >> 3), address + (end >> 3), clean)
        store_byte(clean + size, load_byte(address + (end >> 3)))  # its first bits belong here
        units[n] = (8 * clean + (begin & 7), 8 * (clean + size) + (end & 7), 0, place,
                    min(place + step, last_place), predictor_of(entry, 0), predictor_of(entry, 1),
                    predictor_of(entry, 2))
        place += step
        clean += size + 1
        entry = next_entry
    return True


@njit
def end_at_entries(entries, number, count, scratch):
    """Whether decoded units ended where the next ones begin, with their DC predictors."""
    units = int64s_at(scratch.units, (count + 1, UNIT_SIZE // 8))
    at = PREDICTORS // 8
    for n in range(1, count + 1):
        unit = units[n]
        found = pack_predictors(unit[at], unit[at + 1], unit[at + 2])
        if unit[BIT_LAST // 8] != unit[BIT_HIGH // 8]:
            return False
        if found != load_int64(entries + 8 * (number + n)) & PREDICTORS_MASK:
            return False
    return True


@njit
def row_to_planes(info, plane, row, scratch):
    """One MCU row's coefficients become samples of the planes."""
    coefs = scratch.coefs + GROUP
    for c in range(info[COMPONENTS]):
        stride = plane[c, STRIDE]
        quants = scratch.quants + 256 * info[QUANT + c]
        down = info[V_SAMP] if c == 0 else 1
        for v in range(down):
            to = plane[c, ADDRESS] + (row * down + v) * 8 * stride
            for group in range(stride // 64):
                inverse_dct(coefs, quants, scratch.work, to + 64 * group, stride)
                coefs += GROUP


@njit
def list_whole_row(info, clean_size, scratch):
    """Without an index: a whole row as one unit, which goes on where the row before ended."""
    units = start_streams(scratch, 1)
    place = scratch.places + PLACE_SIZE
    units[1, 0] = units[1, BIT_LAST // 8]
    units[1, BIT_HIGH // 8] = 8 * (scratch.clean + clean_size)
    units[1, PLACE // 8] = place
    units[1, PLACE_END // 8] = place + PLACE_SIZE * blocks_of_mcu(info) * info[MCUS_X]


@njit(nogil=True, cache=True)
def decode_planes(address, size, width, height, x, y, w, h, scratch):
    """Decodes the MCUs of a JPEG that the box touches to Y, Cb, Cr planes: rows of scratch.plane.

    With an index only the units that the box touches are decoded; without one, all that lies before
    the box's end. Returns a code of REASONS, or OTHER_KIND where only libjpeg-turbo can tell.
    Reference: libjpeg-turbo's planes of the whole picture.
    """
    info = int64s_at(scratch.info, (INFO_SIZE,))
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    if not can_decode(address, size, width, height, info, scratch):
        return OTHER_KIND
    entries, good = find_index(address, size, info)
    if not good:
        return BROKEN
    mcu_w = 8 * info[H_SAMP]
    mcu_h = 8 * info[V_SAMP]
    row0 = y // mcu_h
    row1 = (y + h + mcu_h - 1) // mcu_h
    col0 = x // mcu_w
    col1 = (x + w + mcu_w - 1) // mcu_w
    first_row = row0
    first_unit = col0 // info[UNIT_MCUS]
    num_units = (col1 + info[UNIT_MCUS] - 1) // info[UNIT_MCUS] - first_unit
    first = first_unit * info[UNIT_MCUS]
    last = min(first + num_units * info[UNIT_MCUS], info[MCUS_X])
    clean_size = 0
    if entries == 0:
        end = find_end(info[SCAN], address + size)
        if end == 0:
            return OTHER_KIND
        clean_size = unstuff(info[SCAN], end, scratch.clean)
        first_row = 0
        first = 0
        last = info[MCUS_X]
        unit = int64s_at(scratch.units + UNIT_SIZE, (UNIT_SIZE // 8,))
        unit[:] = 0
        unit[BIT_LAST // 8] = 8 * scratch.clean
    fill_zigzag(scratch.zigzag)
    at = scratch.planes
    for c in range(3):
        step_x = 1 if c == 0 else info[H_SAMP]
        step_y = 1 if c == 0 else info[V_SAMP]
        stride = ((col1 - col0) * mcu_w // step_x + 63) // 64 * 64
        plane[c] = (at, stride, col0 * mcu_w, row0 * mcu_h, step_x, step_y, info[COMPONENTS])
        if info[COMPONENTS] == 3:  # else the gray plane stands for R, G and B
            at += stride * (row1 - row0) * mcu_h // step_y
    row_bytes = list_places(info, first, last, col0, col1, scratch)
    for row in range(first_row, row1):
        memset(scratch.coefs, 0, row_bytes)
        if entries == 0:
            list_whole_row(info, clean_size, scratch)
            if not decode_units(scratch.streams, scratch.zigzag, scratch.places):
                return OTHER_KIND
        else:
            number = row * units_of_row(info) + first_unit
            if not list_units(info, address, entries, number, num_units, last - first, scratch):
                return BROKEN
            if not decode_units(scratch.streams, scratch.zigzag, scratch.places):
                return BROKEN
            if not end_at_entries(entries, number, num_units, scratch):
                return BROKEN
        if row >= row0:
            row_to_planes(info, plane, row - row0, scratch)
    if entries == 0 and row1 == info[MCUS_Y]:  # the data end with the last row
        unit = int64s_at(scratch.units + UNIT_SIZE, (UNIT_SIZE // 8,))
        if unit[BIT_LAST // 8] <= unit[BIT_HIGH // 8] - 8:
            return OTHER_KIND
    return OK


@njit
def place_in_file(start, clean_start, clean, end):
    """Where the byte `clean` of the unstuffed data stands, from an earlier pair of such places."""
    while True:
        found = memchr(start, 0xFF, end - start)
        if found == 0 or found - start >= clean - clean_start:
            return start + clean - clean_start
        clean_start += found - start + 1
        start = found + 2


@njit(nogil=True, cache=True)
def index_jpeg(address, size, width, height, entries, scratch):
    """Writes a JPEG's entries to an address, and behind them their checksum.

    Returns the bytes of the entries, or 0 if decode_planes cannot read the JPEG. Each unit is
    decoded, its coefficients thrown away, from where the last one ended: about 0.5 ms.
    """
    info = int64s_at(scratch.info, (INFO_SIZE,))
    if not can_decode(address, size, width, height, info, scratch):
        return 0
    end = find_end(info[SCAN], address + size)
    if end == 0 or size >= MAX_INDEXED:
        return 0
    fill_zigzag(scratch.zigzag)
    list_places(info, 0, info[MCUS_X], 0, 0, scratch)  # all blocks go into the trash
    place = scratch.places + PLACE_SIZE
    at = info[SCAN]
    clean = scratch.clean
    bit_high = 8 * (clean + unstuff(at, end, clean))
    position = 8 * clean
    predictors = int64s_at(scratch.units + UNIT_SIZE + PREDICTORS, (3,))
    predictors[:] = 0
    num_units = info[MCUS_Y] * units_of_row(info)
    for number in range(num_units + 1):
        at = place_in_file(at, clean, position >> 3, end)
        clean = position >> 3
        bit = 8 * (at - address) + (position & 7)
        fields = pack_predictors(predictors[0], predictors[1], predictors[2])
        for c in range(3):
            if predictor_of(fields, c) != predictors[c]:
                return 0
        store_int64(entries + 8 * number, bit << POSITION_SHIFT | fields)
        if number < num_units:
            column = number % units_of_row(info) * info[UNIT_MCUS]
            mcus = min(info[UNIT_MCUS], info[MCUS_X] - column)
            units = start_streams(scratch, 1)
            units[1, :PREDICTORS // 8] = (position, bit_high, 0, place,
                                          place + PLACE_SIZE * blocks_of_mcu(info) * mcus)
            if not decode_units(scratch.streams, scratch.zigzag, scratch.places):
                return 0
            position = units[1, BIT_LAST // 8]
    if position <= bit_high - 8:
        return 0
    size = size_of_index(info)
    store_int64(entries + size, add_to_checksum(info[CHECKSUM], entries, size))
    return size


# --- kernels: antialiased resize. Reference: Pillow's resize of the crop, plane by plane
@njit(forceinline=True)
def pixel_weights(pixels, centers, low, high, narrower, bicubic):
    """The filter at eight pixels, each for its output; 0 outside of low to high; no branches.

    The triangle, or Keys' cubic with a = -0.5.
    """
    d = magnitude(pixels - centers) * narrower
    near = clamp(d, 0, 1)
    values = 1 - near
    if bicubic:  # each of its two pieces is 0 where the other is meant
        far = clamp(d, 1, 2)
        far_value = (2.5 - 0.5 * far) * far - 4
        values = (1.5 * near - 2.5) * near * near + 1 + far_value * far + 2
    return values * (clamp(pixels - low + 1, 0, 1) * clamp(high - pixels + 1, 0, 1))


# One axis of a resize. Output i is the sum over t of weight (i, t) * the row at address
# rows[first[i] + t], for t below taps. rows: int64, the last one again `taps` times; first: int32;
# weights: [i // 8, t, i % 8], int32. bias: what rounds the sum.
Axis = namedtuple("Axis", ("rows", "first", "weights", "taps", "bias"))


@njit
def make_axis(begin, size, count, out, bicubic, step, half_level, memory, work):
    """Fills an Axis in memory, but for the addresses in rows: filter coefficients, in 1/16384.

    Pillow's for a box of `size` pixels from `begin` on, of an axis of `count` samples. At step 2
    the samples are half-size chroma, and the weights are those of libjpeg-turbo's triangle
    upsampling and then the resize, in one; at the box's ends the last sample stands in for the one
    outside. half_level: 32 if sums become whole levels, else 0. work: memory for eight outputs'
    weights as floats. Exact to a level for size / out up to 16. Reference: Pillow; 1 to 3 us.
    """
    scale = size / out
    narrower = min(1.0 / scale, 1.0)
    support = (2.0 if bicubic else 1.0) * max(scale, 1.0)
    pixels = int(math.ceil(2 * support))
    taps = pixels if step == 1 else pixels // 2 + 2
    first = memory + 8 * (count + taps)
    weights = first + 4 * (out + 8)
    for i in range(0, out, 8):
        center = begin + (i + 0.5) * scale
        origin = int(center - support) // 2 * 2  # of all positions below: float32 is exact enough
        low = begin - origin
        high = begin + size - 1 - origin
        centers = lane_numbers() * scale + (center - origin - 0.5)
        starts = floor(centers - support + 1)  # first pixels, then samples
        if step == 2:
            starts = floor((starts - 1) * 0.5)
        starts = clamp(starts, -origin // step, 1e9)
        store_integers(first + 4 * i, starts + origin // step)
        total = lane_numbers() * 0  # a vector of zeros
        for t in range(taps):
            samples = starts + t
            at = samples if step == 1 else samples + samples
            v = pixel_weights(at, centers, low, high, narrower, bicubic)
            if step == 2:  # a pixel lies a quarter of a sample off its sample, towards the next
                v = v + pixel_weights(at + 1, centers, low, high, narrower, bicubic)
                before = clamp(at - 1, -origin, 1e9)  # at an end the sample itself
                behind = clamp(at + 2, -1e9, 2 * count - 1 - origin)
                others = pixel_weights(before, centers, low, high, narrower, bicubic)
                others = others + pixel_weights(behind, centers, low, high, narrower, bicubic)
                v = 0.75 * v + 0.25 * others
                v = v * clamp(count - origin // 2 - samples, 0, 1)
            store_floats(work + 32 * t, v)
            total = total + v
        norm = 16384 / total
        for t in range(taps):
            store_integers(weights + 4 * i * taps + 32 * t, load_floats(work + 32 * t) * norm)
    # Each product is rounded down, which loses half of 1/64 level on average
    products = pixels // step + step - 1
    return Axis(memory, first, weights, taps, half_level + products // 2)


@njit(forceinline=True)
def weighted_sum(axis, i, at):
    """Output i of an axis at 64 places from `at` on: even, odd ones of the first 32, of the rest.

    int16 in 1/64 level. Bytes above a zero byte are samples << 8, so the high half of their product
    with a weight of 1/16384 is in 1/64 level. Reference: the same sum in float.
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
    """Of a strip, rows of 64 bytes as pack_bytes leaves them, `cols` columns become rows at `to`.

    Rows are rounded up to 16. Strips are transposed while they are still in a near cache.
    """
    for i in range(0, rows, 16):
        for j in range(0, min(64, cols), 32):
            transpose_16x32(strip + 64 * i + j, 64, to + j * stride + i, stride)


@njit
def resize_rows(planes, x, y, w, h, res, bicubic, half_level, axis_memory, to, scratch):
    """Resizes the box (full-size pixels) of planes of one layout along y; the Axis along x.

    int8 samples, transposed: for each column the resized columns of all planes side by side, each
    of res rounded up to 32. The Axis' addresses undo the column order of inverse_dct.
    """
    p = planes[0]
    step_x = p[STEP_X]
    step_y = p[STEP_Y]
    left = x - p[LEFT]
    top = y - p[TOP]
    col0 = left // step_x
    cols = (left + w + step_x - 1) // step_x - col0
    row0 = top // step_y
    num_rows = (top + h + step_y - 1) // step_y - row0
    start = col0 // 64 * 64  # of a group
    out = (res + 31) // 32 * 32
    stride = len(planes) * out
    axis = make_axis(top - step_y * row0, h, num_rows, res, bicubic, step_y, 32, scratch.rows_axis,
                     scratch.strip)
    for c in range(len(planes)):
        for i in range(num_rows + axis.taps):
            row = row0 + min(i, num_rows - 1)
            store_int64(axis.rows + 8 * i, planes[c, ADDRESS] + row * p[STRIDE] + start)
        for at in range(0, col0 + cols - start, 64):
            for i in range(res):
                even1, odd1, even2, odd2 = weighted_sum(axis, i, at)
                store_words(scratch.strip + 64 * i, pack_bytes(even1, odd1))
                store_words(scratch.strip + 64 * i + 32, pack_bytes(even2, odd2))
            transpose_strip(scratch.strip, res, 64, to + at * stride + c * out, stride)
    axis = make_axis(left - step_x * col0, w, cols, res, bicubic, step_x, half_level,
                     axis_memory, scratch.strip)
    for i in range(cols + axis.taps):
        position = col0 + min(i, cols - 1) - start
        if p[OF_JPEG]:  # column c of block b at 8 * c + b
            position = (position & ~63) + 8 * (position & 7) + (position >> 3 & 7)
        store_int64(axis.rows + 8 * i, to + position * stride)
    return axis


@njit(forceinline=True)
def rgb_parts(luma, cb, cr):
    """R, G, B of int16 in 1/64 level: ITU-T T.871, section 7."""
    r = luma + cr + multiply_high(cr << 1, 13173)  # 1.402 = 1 + 13173 / 32768
    g = luma - multiply_high(cb << 1, 11277) - multiply_high(cr << 1, 23401)  # 0.344136, 0.714136
    b = luma + cb + multiply_high(cb << 1, 25297)  # 1.772
    return r, g, b


@njit(forceinline=True)
def store_pixels(at, size, ycc, even0, odd0, even1, odd1, even2, odd2):
    """Stores 32 samples of three planes in strips `size` bytes apart, YCbCr as R, G and B."""
    if ycc:
        even0, even1, even2 = rgb_parts(even0, even1, even2)
        odd0, odd1, odd2 = rgb_parts(odd0, odd1, odd2)
    store_words(at, pack_bytes(even0, odd0))
    store_words(at + size, pack_bytes(even1, odd1))
    store_words(at + 2 * size, pack_bytes(even2, odd2))


@njit
def write_crop(x, y, w, h, res, bicubic, flip, to, scratch):
    """A box of decoded planes, resized and flipped, to res * res * 3 bytes of interleaved RGB.

    Reference: Pillow's resize, and T.871; 35 us at 224.
    """
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    ycc = plane[0, OF_JPEG] == 3
    luma = resize_rows(plane[:1], x, y, w, h, res, bicubic, 32, scratch.luma_axis, scratch.luma,
                       scratch)
    chroma = resize_rows(plane[1:], x, y, w, h, res, bicubic, 0 if ycc else 32,
                         scratch.chroma_axis, scratch.chroma, scratch)
    out = (res + 31) // 32 * 32
    for row in range(0, out, 64):
        for i in range(res):
            a = weighted_sum(luma, i, row)
            b = weighted_sum(chroma, i, row)
            c = weighted_sum(chroma, i, row + out)
            at = scratch.strip + 64 * (res - 1 - i if flip else i)
            store_pixels(at, 64 * out, ycc, a[0], a[1], b[0], b[1], c[0], c[1])
            store_pixels(at + 32, 64 * out, ycc, a[2], a[3], b[2], b[3], c[2], c[3])
        for k in range(3):
            transpose_strip(scratch.strip + 64 * out * k, res, out - row,
                            scratch.resized + out * (out * k + row), out)
    for row in range(res):
        for column in range(0, res, 32):
            at = scratch.resized + out * row + column
            pixels = to + 3 * (row * res + column)
            whole = column + 32 <= res
            store_interleaved(pixels if whole else scratch.strip, load_words(at),
                              load_words(at + out * out), load_words(at + 2 * out * out))
            if not whole:
                memcpy(pixels, scratch.strip, 3 * (res - column))


# --- kernels: one sample, and the loop that every thread runs
@njit
def split_rgb(rgb, width, x, y, w, h, scratch):
    """Takes the box of an interleaved RGB picture apart into three planes of int8."""
    stride = (w + 63) // 64 * 64
    plane = int64s_at(scratch.plane, (3, PLANE_SIZE))
    for c in range(3):
        to = scratch.split + c * h * stride
        plane[c] = (to, stride, x, y, 1, 1, 0)
        for row in range(h):
            line = rgb + 3 * ((y + row) * width + x) + c
            for i in range(w):
                store_byte(to + row * stride + i, load_byte(line + 3 * i) ^ 128)


@njit(nogil=True, cache=True)
def decode_rgb(address, size, width, height, to):
    """A whole JPEG of any kind, by libjpeg-turbo, to RGB at `to`: a code of REASONS."""
    handle = tj_init()
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = found.ctypes.data
    code = BROKEN
    if tj_header(handle, address, size, at, at + 4, at + 8, at + 12) == 0:
        if found[0] != width or found[1] != height:
            code = OTHER_SIZE
        elif tj_rgb(handle, address, size, to, width, 0, height, 0, STOP_ON_WARNING) == 0:
            code = OK
    tj_destroy(handle)
    return code


@njit
def decode_sample(address, size, mode, width, height, x, y, w, h, scratch):
    """One stored sample's box to scratch.plane, Y, Cb, Cr or R, G, B; returns a code of REASONS."""
    if mode == 0:
        code = decode_planes(address, size, width, height, x, y, w, h, scratch)
        if code != OTHER_KIND:
            return code
        rgb = scratch.planes
        code = decode_rgb(address, size, width, height, rgb)  # as --verify does: it decides
    else:
        rgb = address
        code = OK if size == 3 * width * height else OTHER_SIZE
    if code == OK:
        split_rgb(rgb, width, x, y, w, h, scratch)
    return code


@njit(nogil=True, cache=True)
def resized_crop(address, size, mode, width, height, x, y, w, h, res, bicubic, flip, to, scratch):
    """Decodes, crops, resizes and flips one stored sample to res * res * 3 bytes of RGB at `to`.

    Returns a code of REASONS. Reference: Pillow's decode, crop, resize.
    """
    code = decode_sample(address, size, mode, width, height, x, y, w, h, scratch)
    if code == OK:
        write_crop(x, y, w, h, res, bicubic, flip, to, scratch)
    return code


# What `fill` needs of an epoch. limit: batches before this one may be filled. Of each batch:
# addresses; rows that were taken and that are done; status, a code of REASONS for each row.
Job = namedtuple("Job", (
    "fd modes widths heights ptrs sizes samples draws limit addresses taken done status train res "
    "batch_size views bicubic seed epoch scale ratio hflip crop_ratio"))
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
def box_of(job, width, height, draw, view):
    if job.train:
        return random_box(width, height, job.scale, job.ratio, job.seed, job.epoch, draw, view)
    return center_box(width, height, job.crop_ratio)


@njit
def fill_row(job, scratch, i, draw, address, view_stride):
    """Sample i, with the crops and flips of a draw, to addresses in a batch: REASONS.

    What all views need is decoded once: two crops overlap much.
    """
    size = job.sizes[i]
    width = job.widths[i]
    height = job.heights[i]
    if not read_sample(job.fd, scratch.raw, size, job.ptrs[i]):
        return SHORT_READ
    left = width
    top = height
    right = 0
    bottom = 0
    for view in range(job.views):
        x, y, w, h = box_of(job, width, height, draw, view)
        left = min(left, x)
        top = min(top, y)
        right = max(right, x + w)
        bottom = max(bottom, y + h)
    code = decode_sample(scratch.raw, size, job.modes[i], width, height, left, top, right - left,
                         bottom - top, scratch)
    if code != OK:
        return code
    for view in range(job.views):
        x, y, w, h = box_of(job, width, height, draw, view)
        flip_draw = uniform(job.seed, job.epoch, draw, VIEW_DRAWS * view + FLIP_DRAW)
        flip = job.train and flip_draw < job.hflip
        write_crop(x, y, w, h, job.res, job.bicubic, flip, address + view * view_stride, scratch)
    return OK


@njit(nogil=True, cache=True)
def fill(job, scratch, batch):
    """Fills rows of this batch and of later ones, with other threads at the same time.

    Returns (number of a batch that this call completed, or -1 at the limit; where to go on).
    """
    row_bytes = 3 * job.res * job.res
    while batch < atomic_add(job.limit.ctypes.data, 0):
        first = batch * job.batch_size
        size = min(job.batch_size, len(job.samples) - first)
        row = atomic_add(job.taken.ctypes.data + 8 * batch, 1)
        if row >= size:
            batch += 1
            continue
        code = fill_row(job, scratch, job.samples[first + row], job.draws[first + row],
                        job.addresses[batch] + row * row_bytes, size * row_bytes)
        job.status[batch, row] = code
        if atomic_add(job.done.ctypes.data + 8 * batch, 1) + 1 == size:
            return batch, batch + 1
    return -1, batch


@njit(nogil=True, cache=True)
def fill_share(table, thread, threads, scale, ratio, seed, epoch, res, bicubic):
    """One thread's share of one of FFCV's batches.

    A row of table: address, size, mode, width, height, sample, where to, and its code (written).
    """
    if len(table) == 0:
        return
    memory, scratch = make_scratch(table[:, 1], table[:, 3], table[:, 4], res)
    for i in range(thread, len(table), threads):
        address, size, mode, width, height, draw, to, _ = table[i]
        x, y, w, h = random_box(width, height, scale, ratio, seed, epoch, draw, 0)
        table[i, 7] = resized_crop(address, size, mode, width, height, x, y, w, h, res,
                                   bicubic == 1, False, to, scratch)
    memory[0] = 0  # numba frees an array after its last use, and scratch lies in this one
