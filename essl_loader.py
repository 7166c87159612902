"""Turns a .beton file into batches on the device, decoding only the part of each JPEG that its crop keeps.

    from essl_loader import ESSLLoader
    for images, labels in ESSLLoader("data/train_500_95.beton", batch_size=256):   # uint8 (B, 3, 224, 224), int64 (B,)
        ...

Needs numpy, numba, torch and libturbojpeg (`pip install turbojpeg`, or Debian's libturbojpeg0). The kernels compile
once, about half a minute, into numba's cache beside this file. Reads top to bottom: format, C library, kernels (draws,
JPEG, resize, sample), reader, loaders, the operation for FFCV.
"""
import contextlib
import ctypes
import fcntl
import json
import math
import os
import random
import signal
import sys
import threading
import weakref
import zlib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import llvmlite.binding
import llvmlite.ir as ir
import numba
import numpy as np
import torch
from numba import carray, njit, objmode, types
from numba.extending import intrinsic

# --- format: FFCV's .beton, version 2, little-endian
# | header 24 B | field descriptors 1041 B each | samples | pages of page_size bytes ... | allocation table to the end |
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                   ("alloc_table_ptr", "<u8")])
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "S1024")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])  # mode: 0 jpg, 1 raw RGB
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SAMPLE = np.dtype({"names": ["mode", "width", "height", "data_ptr", "label"], "itemsize": 24,  # image + label, aligned
                   "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"], "offsets": [0, 1, 3, 5, 16]})
MOST_PIXELS = 1024  # in a byte of JPEG, at most: each block takes a bit or more
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # type ids that this reader knows


def tables_checksum(header, settings, samples, alloc):
    """crc32 over the header, the settings without their checksum as sorted JSON, the samples, the allocation table."""
    told = json.dumps({k: v for k, v in settings.items() if k != "checksum"}, sort_keys=True).encode()
    checksum = 0
    for part in np.ravel(header), np.frombuffer(told, np.uint8), samples, alloc:
        checksum = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), checksum)
    return checksum


class DataError(ValueError):
    """What is wrong with a data file or folder, where, and what to do about it, in words for the one who runs it."""


# --- C library: libjpeg-turbo, called from numba without the GIL
def load_turbojpeg():
    """libjpeg-turbo as a ctypes.CDLL: the one in the turbojpeg wheel (version 3), else the system's (2.1).

    Raises ImportError that names both ways to get it. PyTurboJPEG, another package, ships no library and is not used.
    """
    try:
        wheel = [str(f.locate()) for f in metadata.files("turbojpeg") or () if "turbojpeg.libs/libturbojpeg" in str(f)]
    except metadata.PackageNotFoundError:
        wheel = []
    for path in wheel + ["libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib"]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise ImportError("libturbojpeg was not found: `pip install turbojpeg` brings version 3 (preferred), "
                      "`apt-get install libturbojpeg0` version 2.1; either will do")


_bound = []


def drop_old_kernels(cache):
    """Removes from numba's cache folder what it holds of another version of this file.

    numba renews a kernel's index before its code, so a process killed in between would leave the old code under the new
    index, and a process reading in between would run it.
    """
    source, note = Path(__file__), cache / f"{Path(__file__).stem}.version"
    version = f"{source.stat().st_mtime_ns} {source.stat().st_size} {numba.__version__}"
    with contextlib.suppress(OSError):  # numba does without a cache where it cannot write
        if not (note.is_file() and note.read_text() == version):
            for old in [*cache.glob(f"{source.stem}.*.nb[ic]"), *cache.glob("bench_loader.*.nb[ic]")]:  # holds ours too
                old.unlink(missing_ok=True)
            cache.mkdir(parents=True, exist_ok=True)
            note.write_text(version)


def bind():
    """Resolves the symbols that the kernels call; every public entry does it, importing the file does not."""
    if _bound:
        return
    drop_old_kernels(Path(fill.stats.cache_path))
    lib = load_turbojpeg()
    for name in ("tjInitDecompress", "tjDestroy", "tjDecompress2"):
        # Under a name of our own: ffcv brings the system's copy of the same symbols into the process.
        llvmlite.binding.add_symbol("essl_" + name, ctypes.cast(getattr(lib, name), ctypes.c_void_p).value)
    _bound.append(lib)


def _c(name, restype, *argtypes):
    return types.ExternalFunction(name, restype(*argtypes))


_i, _p = types.int32, types.intp
pread = _c("pread", _p, _i, _p, _p, _p)                                  # fd, buffer, size, offset
memchr = _c("memchr", _p, _p, _i, _p)                                    # start, byte, size
memcpy = _c("memcpy", _p, _p, _p, _p)                                    # to, from, size
tj_init = _c("essl_tjInitDecompress", _p)
tj_destroy = _c("essl_tjDestroy", _i, _p)
tj_rgb = _c("essl_tjDecompress2", _i, _p, _p, _p, _p, _i, _i, _i, _i, _i)  # handle, jpeg, size, to, w, pitch, h, format
STOP_ON_WARNING = 8192  # libjpeg-turbo then fails where it would paint damaged blocks grey


@intrinsic
def as_pointer(typing_context, address):
    """An address as the pointer that carray() wants."""
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))
    return types.voidptr(types.intp), codegen


@intrinsic
def load_big_endian(typing_context, address):
    """The eight bytes at an address, aligned or not, as a big-endian number."""
    def codegen(context, builder, signature, args):
        word = builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1)
        return word if sys.byteorder == "big" else builder.bswap(word)
    return types.uint64(types.intp), codegen


@intrinsic
def load_int32(typing_context, address):
    """The int32 at an address: in the entropy decoder's loop an array index would cost a test for its sign."""
    def codegen(context, builder, signature, args):
        return builder.sext(builder.load(builder.inttoptr(args[0], ir.IntType(32).as_pointer())), ir.IntType(64))
    return types.int64(types.intp), codegen


@intrinsic
def store_int16(typing_context, address, value):
    """Stores the low half of value at an address."""
    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[1], ir.IntType(16)), builder.inttoptr(args[0], ir.IntType(16).as_pointer()))
        return context.get_dummy_value()
    return types.none(types.intp, types.int64), codegen


@intrinsic
def atomic_add(typing_context, address, value):
    """Adds to the int64 at an address; returns what was there."""
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")
    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_swap_if(typing_context, address, expected, value):
    """Stores value in the int64 at an address if expected is there; returns what was there."""
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 0)
    return types.int64(types.intp, types.int64, types.int64), codegen


# --- kernels: random draws. Reference: torchvision's RandomResizedCrop.get_params, in distribution
@njit(nogil=True, cache=True)
def uniform(seed, epoch, index, draw):
    """The draw-th number in [0, 1) of sample `index` in `epoch`: splitmix64 over the four, no state anywhere."""
    z = np.uint64(seed)
    for word in (np.uint64(epoch), np.uint64(index), np.uint64(draw)):
        z = (z ^ word) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0 ** -53


FLIP_DRAW = 40  # random_box uses draws 0 to 39


@njit(nogil=True, cache=True)
def random_box(width, height, scale, ratio, seed, epoch, index):
    """RandomResizedCrop's (x, y, w, h): ten tries at area ~ U(scale), log aspect ~ U(log ratio), else the centre."""
    for attempt in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, index, 4 * attempt))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, index, 4 * attempt + 1))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return (int(uniform(seed, epoch, index, 4 * attempt + 2) * (width - w + 1)),
                    int(uniform(seed, epoch, index, 4 * attempt + 3) * (height - h + 1)), w, h)
    w, h = width, height
    if width < ratio[0] * height:
        h = min(height, max(1, int(round(width / ratio[0]))))
    elif width > ratio[1] * height:
        w = min(width, max(1, int(round(height * ratio[1]))))
    return (width - w) // 2, (height - h) // 2, w, h


@njit(nogil=True, cache=True)
def center_box(width, height, crop_ratio):
    """The central square whose side is crop_ratio of the short side: Resize(256) + CenterCrop(224) in one."""
    side = max(1, int(round(min(width, height) * crop_ratio)))
    return (width - side) // 2, (height - side) // 2, side, side


# --- kernels: JPEG. Codes that kernels return, and what they mean to a person
OK, SHORT_READ, BROKEN, OTHER_SIZE, UNKNOWN = range(5)
REASONS = {SHORT_READ: "the file ends inside it", BROKEN: "its JPEG data are damaged",
           OTHER_SIZE: "its JPEG header and the file's table give different sizes",
           UNKNOWN: "its kind of JPEG cannot be decoded to RGB"}
# What parse_jpeg finds. MCU = the 8x8 to 16x16 pixels whose blocks of all components JPEG stores together; QUANT, DC
# and AC: the table of each of three components; TABLES: a bit for each table that the file defines.
HEIGHT, WIDTH, COMPONENTS, H_SAMP, V_SAMP, INTERVAL, SCAN, TABLES = range(8)
QUANT, DC, AC = 8, 11, 14
PREFIX = 10  # bits that one look-up decodes: larger tables take longer to build for each image than they save
PREFIXES = 1 << PREFIX
TABLE = 2 * PREFIXES + 320  # a Huffman table: values, codes, 20 limits, 20 offsets, symbols
LANES = 160  # blocks side by side; an odd number of cache lines, or their coefficients would share a few cache sets
CHUNK = 64  # MCUs for one inverse DCT: 128 blocks and, above them, lanes for the blocks that nobody will see
ZIGZAG = np.array([0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
                   6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45,
                   38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63])


@njit(nogil=True, cache=True)
def build_table(src, at, dc, table):
    """Huffman table (ITU-T T.81, annex C) from its 16 counts and symbols at src[at]; False if it is not one.

    table[prefix] = value << 16 | zeros before it << 8 | bits of code and value; 0 where they are more than PREFIX.
    table[PREFIXES + prefix] = symbol << 8 | bits of the code alone; 0 where even that is longer.
    """
    table[:2 * PREFIXES] = 0
    limits, offsets, symbols = table[2 * PREFIXES:], table[2 * PREFIXES + 20:], table[2 * PREFIXES + 40:]
    code, n = 0, 0
    for length in range(1, 17):
        count = np.int64(src[at + length - 1])
        offsets[length] = n - code
        if code + count > 1 << length or n + count > 256:
            return False
        for _ in range(count):
            symbol = np.int64(src[at + 16 + n])
            symbols[n] = symbol
            run, size = (0, symbol) if dc else (symbol >> 4, symbol & 15)
            if size > 15:
                return False
            if not dc and size == 0 and run != 15:
                run = 128  # end of block: past the 63rd coefficient
            free = PREFIX - length
            if free >= 0:
                table[PREFIXES + (code << free):PREFIXES + ((code + 1) << free)] = symbol << 8 | length
            if free >= size:
                for v in range(1 << size):
                    value = v if size == 0 or v >> (size - 1) else v - (1 << size) + 1
                    first = (code << free) + (v << (free - size))
                    table[first:first + (1 << (free - size))] = value << 16 | run << 8 | (length + size)
            n += 1
            code += 1
        limits[length] = code << (16 - length)
        code <<= 1
    return True


@njit(nogil=True, cache=True)
def parse_jpeg(src, size, info, tables, orders):
    """Reads a baseline JPEG's header and tables; BROKEN, or UNKNOWN where it takes libjpeg-turbo (progressive, ...).

    orders[table] = pairs (where the k-th coefficient goes, in bytes; its quantisation step).
    """
    info[:] = 0
    rgb, names, i = False, 0, 2
    if size < 4 or src[0] != 0xFF or src[1] != 0xD8:
        return BROKEN
    while i + 4 <= size:
        marker, length = src[i + 1], (src[i + 2] << 8) + src[i + 3]
        p, end = i + 4, i + 2 + length
        if src[i] != 0xFF or length < 2 or end > size:
            return BROKEN
        if marker == 0xDB:  # quantisation tables, of bytes or words
            while p < end:
                wide, t = src[p] >> 4, src[p] & 3
                if wide > 1 or p + 65 + 64 * wide > end:
                    return BROKEN
                for k in range(64):
                    orders[t, 2 * k] = 2 * LANES * ZIGZAG[k]
                    q = p + 1 + k + wide * k
                    orders[t, 2 * k + 1] = src[q] if wide == 0 else (src[q] << 8) + src[q + 1]
                info[TABLES] |= 16 << t
                p += 65 + 64 * wide
        elif marker == 0xC4:  # Huffman tables
            while p + 17 <= end:
                t, n = (src[p] >> 4 << 1) + (src[p] & 1), 0
                for k in range(16):
                    n += src[p + 1 + k]
                if src[p] & 0xEE:
                    return UNKNOWN
                if p + 17 + n > end or not build_table(src, p + 1, t < 2, tables[t]):
                    return BROKEN
                info[TABLES] |= 1 << t
                p += 17 + n
        elif 0xC0 <= marker <= 0xCF and marker != 0xC8 and marker != 0xCC:  # SOF: sizes and sampling
            n = np.int64(src[i + 9]) if length >= 8 else 0
            if n == 0 or length < 8 + 3 * n:
                return BROKEN
            info[HEIGHT], info[WIDTH] = (src[i + 5] << 8) + src[i + 6], (src[i + 7] << 8) + src[i + 8]
            if marker > 0xC1 or src[p] != 8 or (n != 1 and n != 3):
                return UNKNOWN
            info[COMPONENTS], info[H_SAMP], info[V_SAMP] = n, src[i + 11] >> 4, src[i + 11] & 15
            if n == 1:
                info[H_SAMP], info[V_SAMP] = 1, 1
            elif src[i + 14] != 0x11 or src[i + 17] != 0x11 or not (1 <= info[H_SAMP] <= 2 and 1 <= info[V_SAMP] <= 2):
                return UNKNOWN
            rgb = rgb or src[i + 10] == 82  # a component named R is red
            for c in range(n):
                info[QUANT + c] = src[i + 12 + 3 * c] & 3
                names = names << 8 | src[i + 10 + 3 * c]
        elif marker == 0xEE and length >= 14 and src[p] == 65 and src[p + 11] == 0:
            rgb = True  # Adobe's mark with transform 0
        elif marker == 0xDD and length >= 4:
            info[INTERVAL] = (src[p] << 8) + src[p + 1]
        elif marker == 0xDA:  # SOS: the entropy-coded data follow
            info[SCAN], n, theirs = end, info[COMPONENTS], 0
            if n == 0 or length < 6 + 2 * n or src[p] != n or (rgb and n == 3):
                return UNKNOWN
            for c in range(n):
                theirs = theirs << 8 | src[p + 1 + 2 * c]
                info[DC + c], info[AC + c] = src[p + 2 + 2 * c] >> 4, 2 + (src[p + 2 + 2 * c] & 15)
                needed = 16 << info[QUANT + c] | 1 << info[DC + c] | 1 << info[AC + c]
                if info[DC + c] > 1 or info[AC + c] > 3 or info[TABLES] & needed != needed:
                    return BROKEN
            return OK if names == theirs else UNKNOWN
        i = end
    return BROKEN


@njit(nogil=True, cache=True)
def find_intervals(src, size, info, starts, needed):
    """Offsets of the first `needed` restart intervals into starts, and of what follows the marker behind the last.

    Returns how many there are up to there, -1 where the markers are not in sequence.
    """
    base, i, n = src.ctypes.data, info[SCAN], 0
    starts[0] = i
    while n < needed and i < size - 1:
        found = memchr(base + i, 0xFF, size - 1 - i)
        if found == 0:
            return -1
        i = found - base
        marker = src[i + 1]
        i += 1 if marker == 0xFF else 2
        if marker != 0 and marker != 0xFF:
            n += 1
            starts[n] = i
            if marker == 0xD9:
                return n
            if marker != 0xD0 + ((n - 1) & 7):
                return -1
    return n


@njit(nogil=True, cache=True)
def unstuff(src, start, end, clean):
    """Copies entropy-coded data without the zero that JPEG puts behind each 0xFF; returns the size."""
    frm, to, o = src.ctypes.data, clean.ctypes.data, 0
    while start < end:
        found = memchr(frm + start, 0xFF, end - start)
        n = end - start if found == 0 else found - frm - start + 1
        memcpy(to + o, frm + start, n)
        o += n
        start += n + 1
    return o


@njit(nogil=True, cache=True)
def long_code(word, table):
    """(bits, symbol) of a code that the look-up table has no value for; 0 bits if it is none."""
    e = load_int32(table + 4 * PREFIXES + (np.int64(word >> np.uint64(64 - PREFIX)) << 2))
    if e != 0:
        return e & 255, e >> 8
    top, limits = np.int64(word >> np.uint64(48)), table + 8 * PREFIXES
    for length in range(PREFIX + 1, 17):
        if top < load_int32(limits + 4 * length):
            index = load_int32(limits + 80 + 4 * length) + (top >> (16 - length))
            return length, load_int32(limits + 160 + 4 * index)
    return 0, 0


FAILED = 1 << 40  # no DC value


@njit(nogil=True, cache=True)
def decode_block(word, bits, at, dc, ac, last, order, coefs):
    """Decodes one block's 64 coefficients, dequantised, to int16 at coefs: ITU-T T.81, annex F.

    The next bits stand at the top of word, `bits` of them, the others at address `at`; dc, ac, order are addresses of
    tables, last is the DC value before. Returns (word, bits, at, DC value or FAILED). Reads at most 250 bytes too far.
    """
    shift = np.uint64(64 - PREFIX)
    word |= load_big_endian(at) >> np.uint64(bits)  # refill to at least 56 bits
    at += (63 - bits) >> 3
    bits |= 56
    e = load_int32(dc + (np.int64(word >> shift) << 2))
    n, size = e & 255, 0
    if e == 0:
        n, size = long_code(word, dc)
        if n == 0:
            return word, bits, at, FAILED
    word <<= np.uint64(n)
    last += e >> 16
    if size > 0:
        v = np.int64(word >> np.uint64(64 - size))
        last += v if v >> (size - 1) else v - (1 << size) + 1
        word <<= np.uint64(size)
    bits -= n + size
    store_int16(coefs, last * load_int32(order + 4))
    k = 1
    while True:
        word |= load_big_endian(at) >> np.uint64(bits)
        at += (63 - bits) >> 3
        bits |= 56
        e = 1
        for _ in range(56 // PREFIX):  # as many as a refill lasts for
            e = load_int32(ac + (np.int64(word >> shift) << 2))
            if e == 0:
                break
            word <<= np.uint64(e & 63)
            bits -= e & 63
            k += (e >> 8) & 255
            if k > 63:
                return word, bits, at, last if k >= 128 else FAILED
            store_int16(coefs + load_int32(order + 8 * k), (e >> 16) * load_int32(order + 8 * k + 4))
            k += 1
            if k == 64:
                return word, bits, at, last
        if e != 0:
            continue
        word |= load_big_endian(at) >> np.uint64(bits)
        at += (63 - bits) >> 3
        bits |= 56
        n, symbol = long_code(word, ac)
        size = symbol & 15
        word <<= np.uint64(n)
        bits -= n + size
        if n == 0:
            return word, bits, at, FAILED
        if size == 0 and symbol != 0xF0:
            return word, bits, at, last
        k += symbol >> 4
        if k > 63:
            return word, bits, at, FAILED
        if size > 0:
            v = np.int64(word >> np.uint64(64 - size))
            v = v if v >> (size - 1) else v - (1 << size) + 1
            word <<= np.uint64(size)
            store_int16(coefs + load_int32(order + 8 * k), v * load_int32(order + 8 * k + 4))
        k += 1
        if k == 64:
            return word, bits, at, last


F, U = np.float32, np.uint64  # unsigned indices: numba tests signed ones for wrapping around
# sqrt(2) cos(k pi / 16) and their sums: Loeffler, Ligtenberg and Moschytz, ICASSP 1989, figure 1
C = tuple(np.float32(c) for c in (0.541196100, 1.847759065, 0.765366865, 1.175875602, 0.899976223, 2.562915447,
                                  1.961570560, 0.390180644, 0.298631336, 2.053119869, 3.072711026, 1.501321110))


@njit(nogil=True, cache=True, inline="always")
def dct8(a0, a1, a2, a3, a4, a5, a6, a7):
    """Inverse DCT of eight values, times sqrt(8)."""
    z = (a2 + a6) * C[0]
    t2, t3 = z - a6 * C[1], z + a2 * C[2]
    t0, t1 = a0 + a4, a0 - a4
    e0, e1, e2, e3 = t0 + t3, t1 + t2, t1 - t2, t0 - t3
    z3, z4 = a7 + a3, a5 + a1
    z = (z3 + z4) * C[3]
    z1, z2, z3, z4 = (a7 + a1) * C[4], (a5 + a3) * C[5], z - z3 * C[6], z - z4 * C[7]
    o0, o1, o2, o3 = a7 * C[8] - z1 + z3, a5 * C[9] - z2 + z4, a3 * C[10] - z2 + z3, a1 * C[11] - z1 + z4
    return e0 + o3, e1 + o2, e2 + o1, e3 + o0, e3 - o0, e2 - o1, e1 - o2, e0 - o3


@njit(nogil=True, cache=True, inline="always")
def to_byte(v):
    return np.uint8(np.int32(min(max(v, F(0)), F(255))))


@njit(nogil=True, cache=True, fastmath=True)
def inverse_dct(coefs, first, n, work, dst, offset, stride):
    """n neighbouring blocks of coefficients, each LANES apart, to eight rows of pixels.

    Both passes run across blocks, so that every loop vectorises and nothing is transposed. Always does whole groups of
    eight blocks: dst has room for them. Reference: libjpeg-turbo's accurate integer transform, to one level.
    """
    blocks, L = U((n + 7) // 8 * 8), U(LANES)
    for c in range(U(8)):
        i, o = U(first) + c * L, c * U(8) * L
        for b in range(blocks):  # the coefficients are cleared for the next blocks while they are in the cache
            (work[o + b], work[o + L + b], work[o + U(2) * L + b], work[o + U(3) * L + b], work[o + U(4) * L + b],
             work[o + U(5) * L + b], work[o + U(6) * L + b], work[o + U(7) * L + b]) = dct8(
                F(coefs[i + b]), F(coefs[i + U(8) * L + b]), F(coefs[i + U(16) * L + b]), F(coefs[i + U(24) * L + b]),
                F(coefs[i + U(32) * L + b]), F(coefs[i + U(40) * L + b]), F(coefs[i + U(48) * L + b]),
                F(coefs[i + U(56) * L + b]))
            coefs[i + b] = coefs[i + U(8) * L + b] = coefs[i + U(16) * L + b] = coefs[i + U(24) * L + b] = 0
            coefs[i + U(32) * L + b] = coefs[i + U(40) * L + b] = coefs[i + U(48) * L + b] = 0
            coefs[i + U(56) * L + b] = 0
    for r in range(U(8)):
        i, o = r * L, U(offset) + r * U(stride)
        for b in range(blocks):
            p0, p1, p2, p3, p4, p5, p6, p7 = dct8(  # 1028 / 8 = 128, JPEG's zero, and a half to round
                work[i + b] + F(1028), work[i + U(8) * L + b], work[i + U(16) * L + b], work[i + U(24) * L + b],
                work[i + U(32) * L + b], work[i + U(40) * L + b], work[i + U(48) * L + b], work[i + U(56) * L + b])
            d, e = o + U(8) * b, F(0.125)
            dst[d], dst[d + U(1)], dst[d + U(2)], dst[d + U(3)] = (to_byte(p0 * e), to_byte(p1 * e), to_byte(p2 * e),
                                                                   to_byte(p3 * e))
            dst[d + U(4)], dst[d + U(5)], dst[d + U(6)], dst[d + U(7)] = (to_byte(p4 * e), to_byte(p5 * e),
                                                                          to_byte(p6 * e), to_byte(p7 * e))


@njit(nogil=True, cache=True)
def flush(row, column, n, horizontal, vertical, components, scratch):
    """n MCUs' coefficients become pixels of the planes, at an MCU row and column of theirs, and are cleared."""
    planes, plane, size = scratch.planes, scratch.plane, 64 * LANES
    for v in range(vertical):
        inverse_dct(scratch.coefs, v * size, n * horizontal, scratch.work, planes,
                    plane[0, 0] + (row * vertical + v) * 8 * plane[0, 1] + 8 * horizontal * column, plane[0, 1])
    for c in range(1, components):
        inverse_dct(scratch.coefs, (1 + c) * size, n, scratch.work, planes,
                    plane[c, 0] + row * 8 * plane[c, 1] + 8 * column, plane[c, 1])


@njit(nogil=True, cache=True)
def decode_planes(src, size, width, height, x, y, w, h, scratch):
    """Decodes the MCUs that the box touches to Y, Cb, Cr planes, without upsampling or colour conversion.

    scratch.plane[c] becomes (offset in scratch.planes, row stride, first column, first row, pixels a sample is wide and
    high). Where restart intervals divide the rows, nothing but the intervals that the box touches is decoded; else all
    that lies before its end. Returns a code of REASONS. Reference: libjpeg-turbo's planes of the whole picture.
    """
    info, plane = scratch.info, scratch.plane
    code = parse_jpeg(src, size, info, scratch.tables, scratch.orders)
    if code != BROKEN and (info[WIDTH] != width or info[HEIGHT] != height):
        return OTHER_SIZE if info[HEIGHT] > 0 else BROKEN
    if code != OK:
        return code
    components, horizontal, vertical, k = info[COMPONENTS], info[H_SAMP], info[V_SAMP], info[INTERVAL]
    mcu_w, mcu_h = 8 * horizontal, 8 * vertical
    across, down = (width + mcu_w - 1) // mcu_w, (height + mcu_h - 1) // mcu_h
    row0, row1, col0, col1 = y // mcu_h, (y + h + mcu_h - 1) // mcu_h, x // mcu_w, (x + w + mcu_w - 1) // mcu_w
    first_row, first, last = 0, 0, across
    if k > 0 and across % k == 0:
        first_row, first, last = row0, col0 // k * k, col1
    k = k if k > 0 else across * down
    needed = ((row1 - 1) * across + last + k - 1) // k
    if needed >= scratch.starts.size:
        return OTHER_SIZE
    if find_intervals(src, size, info, scratch.starts, needed) != needed:
        return BROKEN
    at = 0
    for c in range(components):
        p, sx, sy = plane[c], (1 if c == 0 else horizontal), (1 if c == 0 else vertical)
        p[0], p[1], p[2], p[3] = at, ((col1 - col0) * mcu_w // sx + 63) // 64 * 64, col0 * mcu_w, row0 * mcu_h
        p[4], p[5] = sx, sy
        at += p[1] * (row1 - row0) * mcu_h // sy
    tables, orders = scratch.tables.ctypes.data, scratch.orders.ctypes.data
    lanes, unseen, block_row = scratch.coefs.ctypes.data, scratch.coefs.ctypes.data + 2 * (LANES - 2), 128 * LANES
    scratch.coefs[:] = 0
    word, bits, at, begin, n, dc0, dc1, dc2 = U(0), 0, 0, 0, 0, 0, 0, 0
    for row in range(first_row, row1):
        done, flushed = 0, 0  # MCUs of this row, and how many of them are pixels already
        for column in range(first, last):
            count = row * across + column
            if count % k == 0:  # a new interval
                n = unstuff(src, scratch.starts[count // k], scratch.starts[count // k + 1] - 2, scratch.clean)
                begin = scratch.clean.ctypes.data
                word, bits, at, dc0, dc1, dc2 = U(0), 0, begin, 0, 0, 0
            seen = row >= row0 and col0 <= column < col1
            luma = lanes + 2 * (done - flushed) * horizontal if seen else unseen
            chroma = lanes + 2 * (done - flushed) if seen else unseen
            for v in range(vertical):
                for i in range(horizontal):
                    word, bits, at, dc0 = decode_block(
                        word, bits, at, tables + 4 * TABLE * info[DC], tables + 4 * TABLE * info[AC], dc0,
                        orders + 512 * info[QUANT], luma + v * block_row + 2 * i)
            if components == 3:
                word, bits, at, dc1 = decode_block(
                    word, bits, at, tables + 4 * TABLE * info[DC + 1], tables + 4 * TABLE * info[AC + 1], dc1,
                    orders + 512 * info[QUANT + 1], chroma + 2 * block_row)
                word, bits, at, dc2 = decode_block(
                    word, bits, at, tables + 4 * TABLE * info[DC + 2], tables + 4 * TABLE * info[AC + 2], dc2,
                    orders + 512 * info[QUANT + 2], chroma + 3 * block_row)
            left = 8 * n - (8 * (at - begin) - bits)  # bits behind this MCU: an interval ends within a byte
            ends = count % k == k - 1 or count == across * down - 1
            if left < 0 or (ends and left > 7) or dc0 >= FAILED or dc1 >= FAILED or dc2 >= FAILED:
                return BROKEN
            if seen:
                done += 1
                if done - flushed == CHUNK or column == col1 - 1:
                    flush(row - row0, flushed, done - flushed, horizontal, vertical, components, scratch)
                    flushed = done
    return OK


@njit(nogil=True, cache=True)
def decode_rgb(src, size, width, height, scratch):
    """Decodes a whole JPEG of any kind by libjpeg-turbo to interleaved RGB in scratch.planes; a code of REASONS."""
    to, info = scratch.planes.ctypes.data, scratch.info
    parse_jpeg(src, size, info, scratch.tables, scratch.orders)
    if info[WIDTH] != width or info[HEIGHT] != height:  # the size that scratch was made for
        return OTHER_SIZE if info[HEIGHT] > 0 else BROKEN
    if tj_rgb(scratch.tj[0], src.ctypes.data, size, to, width, 3 * width, height, 0, STOP_ON_WARNING) != 0:
        return BROKEN
    return OK


# --- kernels: antialiased resize. Reference: Pillow's resize(BILINEAR / BICUBIC) of the crop, plane by plane
@njit(nogil=True, cache=True)
def filter_weights(box0, box1, out, bicubic, step, low, high, first, taps, weights):
    """Filter coefficients for one axis: output i sums taps samples from first[i] with weights[i * taps ...].

    Pillow's coefficients for the box in pixels. At step 2 the samples are 4:2:0's half-size chroma, and the weights are
    those of libjpeg-turbo's triangle upsampling and then the resize, in one. Samples outside low..high are not used.
    """
    scale = (box1 - box0) / out
    narrower = min(1.0 / scale, 1.0)
    support = (2.0 if bicubic else 1.0) / narrower
    weights[:out * taps] = 0
    for i in range(out):
        center = box0 + (i + 0.5) * scale
        start, stop = max(box0, int(center - support + 0.5)), min(box1, int(center + support + 0.5))
        f = start if step == 1 else max(low, (start - 1) >> 1)
        first[i], row, total = f, U(i * taps), 0.0
        for p in range(start, stop):
            d = abs((p - center + 0.5) * narrower)
            v = max(0.0, 1.0 - d)
            if bicubic:
                inner, outer = (1.5 * d - 2.5) * d * d + 1.0, ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
                v = inner if d < 1.0 else (outer if d < 2.0 else 0.0)
            total += v
            if step == 1:
                weights[row + U(p - f)] = v
            else:  # pixel p lies a quarter of a sample off sample p // 2, towards its neighbour
                far = min(max((p >> 1) + (p & 1) * 2 - 1, low), high - 1)
                weights[row + U((p >> 1) - f)] += F(0.75 * v)
                weights[row + U(far - f)] += F(0.25 * v)
        scaled = F(1.0 / total)
        for t in range(U(taps)):
            weights[row + t] *= scaled


@njit(nogil=True, cache=True)
def count_taps(size, out, bicubic, step):
    """Taps per output sample, rounded up to a pair: the most that filter_weights can ask for."""
    pixels = int(math.ceil((4.0 if bicubic else 2.0) * max(size / out, 1.0)))
    return max(4, ((pixels if step == 1 else pixels // 2 + 3) + 1) // 2 * 2)


@njit(nogil=True, cache=True, fastmath=True)
def vertical_pass(src, offset, stride, last, width, out, first, taps, weights, flip, acc, dst, dst_stride):
    """Filters columns: row i of dst = sum over t of weights[i, t] * row first[i] + t of src, rounded and clipped.

    Rows are contiguous, so every inner loop vectorises; taps go in by four, then in pairs. last: the last source row.
    """
    for i in range(out):
        o = (out - 1 - i if flip else i) * dst_stride
        to = dst[o:o + width]
        f, k = first[i], i * taps
        r0 = src[offset + min(f, last) * stride:][:width]
        r1 = src[offset + min(f + 1, last) * stride:][:width]
        r2 = src[offset + min(f + 2, last) * stride:][:width]
        r3 = src[offset + min(f + 3, last) * stride:][:width]
        w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        half = F(0.5)
        if taps == 4:
            for x in range(width):
                v = w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x] + half
                to[x] = to_byte(v)
            continue
        sums = acc[:width]
        for x in range(width):
            sums[x] = w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x] + half
        for t in range(4, taps, 2):
            r0 = src[offset + min(f + t, last) * stride:][:width]
            r1 = src[offset + min(f + t + 1, last) * stride:][:width]
            w0, w1 = weights[k + t], weights[k + t + 1]
            for x in range(width):
                sums[x] += w0 * r0[x] + w1 * r1[x]
        for x in range(width):
            to[x] = to_byte(sums[x])


@njit(nogil=True, cache=True)
def transpose(src, src_stride, rows, cols, dst, dst_stride):
    """dst[x, y] = src[y, x] for bytes, 8x8 at a time in eight uint64; src, dst: uint64 views, strides in words."""
    m4, m2, m1 = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    s4, s2, s1 = np.uint64(32), np.uint64(16), np.uint64(8)
    for i in range((rows + 7) // 8):
        for j in range((cols + 7) // 8):
            s = 8 * i * src_stride + j
            a0, a1, a2, a3 = src[s], src[s + src_stride], src[s + 2 * src_stride], src[s + 3 * src_stride]
            s += 4 * src_stride
            a4, a5, a6, a7 = src[s], src[s + src_stride], src[s + 2 * src_stride], src[s + 3 * src_stride]
            t0, t1 = ((a0 >> s4) ^ a4) & m4, ((a1 >> s4) ^ a5) & m4
            t2, t3 = ((a2 >> s4) ^ a6) & m4, ((a3 >> s4) ^ a7) & m4
            a4, a5, a6, a7 = a4 ^ t0, a5 ^ t1, a6 ^ t2, a7 ^ t3
            a0, a1, a2, a3 = a0 ^ (t0 << s4), a1 ^ (t1 << s4), a2 ^ (t2 << s4), a3 ^ (t3 << s4)
            t0, t1 = ((a0 >> s2) ^ a2) & m2, ((a1 >> s2) ^ a3) & m2
            t2, t3 = ((a4 >> s2) ^ a6) & m2, ((a5 >> s2) ^ a7) & m2
            a2, a3, a6, a7 = a2 ^ t0, a3 ^ t1, a6 ^ t2, a7 ^ t3
            a0, a1, a4, a5 = a0 ^ (t0 << s2), a1 ^ (t1 << s2), a4 ^ (t2 << s2), a5 ^ (t3 << s2)
            t0, t1 = ((a0 >> s1) ^ a1) & m1, ((a2 >> s1) ^ a3) & m1
            t2, t3 = ((a4 >> s1) ^ a5) & m1, ((a6 >> s1) ^ a7) & m1
            d = 8 * j * dst_stride + i
            dst[d], dst[d + dst_stride] = a0 ^ (t0 << s1), a1 ^ t0
            dst[d + 2 * dst_stride], dst[d + 3 * dst_stride] = a2 ^ (t1 << s1), a3 ^ t1
            d += 4 * dst_stride
            dst[d], dst[d + dst_stride] = a4 ^ (t2 << s1), a5 ^ t2
            dst[d + 2 * dst_stride], dst[d + 3 * dst_stride] = a6 ^ (t3 << s1), a7 ^ t3


@njit(nogil=True, cache=True)
def resize_plane(planes, plane, x, y, w, h, res, bicubic, flip, dst, scratch):
    """Resizes the box (full-size pixels) of one plane to res x res in dst, whose row stride is res rounded up to 8."""
    offset, stride, step_x, step_y = plane[0], plane[1], plane[4], plane[5]
    left, top = x - plane[2], y - plane[3]
    right, bottom = left + w, top + h
    col0, col1 = left // step_x, (right + step_x - 1) // step_x
    row0, row1 = top // step_y, (bottom + step_y - 1) // step_y
    cols = col1 - col0
    wide, out8 = (cols + 7) // 8 * 8, (res + 7) // 8 * 8
    taps = count_taps(bottom - top, res, bicubic, step_y)
    filter_weights(top, bottom, res, bicubic, step_y, row0, row1, scratch.first, taps, scratch.weights)
    vertical_pass(planes, offset + col0, stride, row1 - 1, cols, res, scratch.first, taps, scratch.weights, False,
                  scratch.acc, scratch.a, wide)
    transpose(scratch.a.view(np.uint64), wide // 8, res, cols, scratch.b.view(np.uint64), out8 // 8)
    taps = count_taps(right - left, res, bicubic, step_x)
    filter_weights(left, right, res, bicubic, step_x, col0, col1, scratch.first, taps, scratch.weights)
    vertical_pass(scratch.b, -col0 * out8, out8, col1 - 1, res, res, scratch.first, taps, scratch.weights, flip,
                  scratch.acc, scratch.a, out8)
    transpose(scratch.a.view(np.uint64), out8 // 8, res, res, dst.view(np.uint64), out8 // 8)


@njit(nogil=True, cache=True, fastmath=True)
def write_rgb(p, n, stride, res, ycc, out):
    """Writes resized planes p[0..n) as interleaved RGB into out; ycc: JFIF's YCbCr -> RGB (ITU-T T.871, section 7)."""
    for y in range(res):
        p0, o = p[0, y * stride:][:res], out[3 * res * y:][:3 * res]
        if n == 1:
            for x in range(res):
                o[3 * x], o[3 * x + 1], o[3 * x + 2] = p0[x], p0[x], p0[x]
            continue
        p1, p2 = p[1, y * stride:][:res], p[2, y * stride:][:res]
        if not ycc:
            for x in range(res):
                o[3 * x], o[3 * x + 1], o[3 * x + 2] = p0[x], p1[x], p2[x]
            continue
        for x in range(res):
            luma, cb, cr = F(p0[x]) + F(0.5), F(p1[x]) - F(128), F(p2[x]) - F(128)  # half: to round
            o[3 * x] = to_byte(luma + F(1.402) * cr)
            o[3 * x + 1] = to_byte(luma - F(0.344136) * cb - F(0.714136) * cr)
            o[3 * x + 2] = to_byte(luma + F(1.772) * cb)


# --- kernels: one sample, and the loop that every thread runs
Scratch = namedtuple("Scratch", "tj info starts raw clean tables orders coefs work planes plane split first weights "
                                "acc a b resized")
Job = namedtuple("Job", "fd modes widths heights ptrs sizes wanted ids draws control done addresses status "
                        "train res batch_size bicubic seed epoch scale ratio hflip crop_ratio skip_bad")
MOST_TRIES = 100  # samples tried in the place of a damaged one: more damage than that is no accident
NEXT, LIMIT = 0, 1  # control: the next ticket (position in the epoch) to hand out, and the first that must wait


@njit(nogil=True, cache=True)
def make_scratch(sizes, widths, heights, res):
    """One thread's memory, sized once for the largest of the samples; tj holds libjpeg-turbo's handle."""
    out8, max_bytes, side, area = (res + 7) // 8 * 8, 0, 0, 0
    for i in range(len(sizes)):
        wide, tall = widths[i] + 128, heights[i] + 32
        max_bytes, side, area = max(max_bytes, sizes[i]), max(side, wide, tall), max(area, wide * tall)
    side = (side + 7) // 8 * 8
    tj = np.zeros(1, np.int64)
    tj[0] = tj_init()
    return Scratch(tj, np.zeros(17, np.int64), np.empty(area // 64 + 2, np.int64),
                   np.empty(max_bytes + 64, np.uint8), np.empty(max_bytes + 2048, np.uint8),
                   np.empty((4, TABLE), np.int32), np.empty((4, 128), np.int32), np.empty(4 * 64 * LANES, np.int16),
                   np.empty(64 * LANES, np.float32), np.empty(3 * area, np.uint8), np.zeros((3, 6), np.int64),
                   np.empty(3 * area, np.uint8), np.empty(res, np.int64),
                   np.empty(4 * side + 8 * res, np.float32), np.empty(side + out8, np.float32),
                   np.empty((side + out8) * out8, np.uint8), np.empty((side + out8) * out8, np.uint8),
                   np.empty((3, out8 * out8), np.uint8))


@njit(nogil=True, cache=True)
def destroy_decoder(handle):
    tj_destroy(handle)


@njit(nogil=True, cache=True)
def split_rgb(rgb, width, x, y, w, h, scratch):
    """Takes the box of an interleaved RGB picture apart into three planes in scratch.split."""
    wide = (w + 63) // 64 * 64
    for c in range(3):
        for row in range(h):
            line, to = rgb[3 * ((y + row) * width + x) + c:][:3 * w], scratch.split[(c * h + row) * wide:][:w]
            for i in range(w):
                to[i] = line[3 * i]
        p = scratch.plane[c]
        p[0], p[1], p[2], p[3], p[4], p[5] = c * h * wide, wide, x, y, 1, 1


@njit(nogil=True, cache=True)
def resized_crop(src, size, mode, width, height, x, y, w, h, res, bicubic, flip, out, scratch):
    """Decodes, crops, resizes and flips one stored sample into out, res * res * 3 bytes of interleaved RGB.

    Reference: Pillow's decode, crop, resize. Returns a code of REASONS.
    """
    planes, ycc, components, code = scratch.split, False, 3, OK
    if mode == 1 and size == 3 * width * height:
        split_rgb(src, width, x, y, w, h, scratch)
    elif mode == 1:
        return OTHER_SIZE
    else:
        code = decode_planes(src, size, width, height, x, y, w, h, scratch)
        if code == OK:
            planes, ycc, components = scratch.planes, True, scratch.info[COMPONENTS]
        elif code == UNKNOWN:
            code = decode_rgb(src, size, width, height, scratch)
            split_rgb(scratch.planes, width, x, y, w, h, scratch)
    if code != OK:
        return code
    for c in range(components):
        resize_plane(planes, scratch.plane[c], x, y, w, h, res, bicubic, flip, scratch.resized[c], scratch)
    write_rgb(scratch.resized, components, (res + 7) // 8 * 8, res, ycc, out)
    return OK


@njit(nogil=True, cache=True)
def take_ticket(control):
    """The next position in the epoch, -1 if it may not be started yet."""
    at = control.ctypes.data
    while True:
        ticket = atomic_add(at, 0)
        if ticket >= atomic_add(at + 8, 0):
            return -1
        if atomic_swap_if(at, ticket, ticket + 1) == ticket:
            return ticket


@njit(nogil=True, cache=True)
def fill_row(job, scratch, i, draw, address):
    """Sample i, with the crop and flip of a draw, to an address in a batch; returns a code of REASONS."""
    width, height, flip = job.widths[i], job.heights[i], False
    if job.train:
        x, y, w, h = random_box(width, height, job.scale, job.ratio, job.seed, job.epoch, draw)
        flip = uniform(job.seed, job.epoch, draw, FLIP_DRAW) < job.hflip
    else:
        x, y, w, h = center_box(width, height, job.crop_ratio)
    out = carray(as_pointer(address), (3 * job.res * job.res,), np.uint8)
    if pread(job.fd, scratch.raw.ctypes.data, job.sizes[i], job.ptrs[i]) != job.sizes[i]:
        return SHORT_READ
    return resized_crop(scratch.raw, job.sizes[i], job.modes[i], width, height, x, y, w, h, job.res, job.bicubic, flip,
                        out, scratch)


@njit(nogil=True, cache=True)
def fill(job, scratch):
    """Fills batches until the limit (returns -1) or until this thread completes a batch (returns its number).

    With job.skip_bad a bad sample's row takes the next good one of the epoch, which job.ids names then.
    """
    n, slots = len(job.ids), len(job.done)
    while True:
        ticket = take_ticket(job.control)
        if ticket < 0:
            return -1
        batch, row = ticket // job.batch_size, ticket % job.batch_size
        slot, i, draw = batch % slots, job.wanted[ticket], job.draws[ticket]
        address = job.addresses[slot] + row * 3 * job.res * job.res
        code = fill_row(job, scratch, i, draw, address)
        job.status[slot, row] = code
        for step in range(1, min(n, MOST_TRIES) if job.skip_bad and code != OK else 1):
            if job.control[LIMIT] < 0:
                break  # stopped
            i = job.wanted[(ticket + step) % n]
            code = fill_row(job, scratch, i, draw, address)
            if code == OK:
                job.ids[ticket] = i
                break
        size = min(job.batch_size, n - batch * job.batch_size)
        if atomic_add(job.done.ctypes.data + 8 * slot, 1) + 1 == size:
            return batch


def compile_kernels(job, reader):
    """Compiles or loads the kernels by calling them for nothing, one process after the other: torchrun's ranks start at
    once, and numba's cache is not made for several that write."""
    if fill.signatures:
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written needs no lock
            lock = stack.enter_context(open(Path(fill.stats.cache_path) / f"{Path(__file__).stem}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = make_scratch(reader.sizes[:0], reader.widths[:0], reader.heights[:0], job.res)
        fill(job, scratch)  # the limit is where the tickets begin: returns at once
        destroy_decoder(scratch.tj[0])


# --- reader
class BetonReader:
    """A .beton file's tables, checked against the file, and its single samples.

    Attributes: num_samples, labels (int64), widths, heights, modes, ptrs, sizes (int64 arrays, one entry a sample),
    settings (dict of build_beton.py's settings, empty for FFCV's own files), classes (list of names or None).
    Raises DataError (a ValueError) that says what is wrong with the file, where, and what to do.
    """

    def __init__(self, path):
        bind()
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file. Build it: python build_beton.py --data-dir PICTURES --out "
                            f"{path}, or draw a small one: python build_beton.py --demo")
        self.file = open(self.path, "rb", buffering=0)
        try:
            self._read_tables()
        except BaseException:
            self.file.close()
            raise
        sidecar = self.path.with_suffix(".json")
        try:
            self.classes = json.loads(sidecar.read_text())["classes"] if sidecar.is_file() else None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{sidecar}: not the sidecar that build_beton.py writes; rebuild {path}, or remove it to "
                             "go on without class names") from None

    def _wrong(self, found):
        return DataError(f"{self.path}: {found}. The file is not a complete .beton of version 2; build it again.")

    def _table(self, dtype, count, offset, what):
        size = count * dtype.itemsize
        if offset + size > self.size:
            raise self._wrong(f"{what} should end at byte {offset + size:,}, the file at {self.size:,}")
        return np.frombuffer(os.pread(self.file.fileno(), size, offset), dtype)

    def _read_tables(self):
        self.size = os.fstat(self.file.fileno()).st_size
        header = self._table(HEADER, 1, 0, "the header")[0]
        version, fields, n, self.page_size = (int(header[k]) for k in
                                              ("version", "num_fields", "num_samples", "page_size"))
        end = int(header["alloc_table_ptr"])
        if version != 2:
            raise self._wrong(f"its version is {version}")
        if (not 1 <= fields <= 64 or not 0 < n <= self.size or self.page_size == 0 or end > self.size
                or (self.size - end) % ALLOC.itemsize):
            raise self._wrong(f"its header names {fields} fields, {n:,} samples, pages of {self.page_size:,} and an "
                              f"allocation table at byte {end:,} of {self.size:,}")
        descriptors = self._table(FIELD, fields, HEADER.itemsize, "the list of fields")
        kinds = [int(k) for k in descriptors["type_id"]]
        if kinds.count(2) != 1 or any(k not in FIELD_TYPES for k in kinds):
            raise self._wrong(f"its fields have the types {kinds}, where one picture (2) and integers (1) are expected")
        record = np.dtype([(f"f{i}", FIELD_TYPES[k]) for i, k in enumerate(kinds)], align=True)
        image = kinds.index(2)
        samples = self._table(record, n, HEADER.itemsize + descriptors.nbytes, "the table of samples")
        alloc = self._table(ALLOC, (self.size - end) // ALLOC.itemsize, end, "the allocation table")
        try:
            text = bytes(descriptors["arguments"][image]).rstrip(b"\0")
            self.settings = json.loads(text) if text else {}  # FFCV leaves these bytes 0
            self.settings.get("essl")
        except (ValueError, AttributeError):
            raise self._wrong("its build settings are garbled") from None
        if self.settings and self.settings.get("checksum") != tables_checksum(header, self.settings, samples, alloc):
            raise self._wrong("the checksum over its header and tables does not match, or an earlier "
                              "build_beton.py made it")
        self._check_samples(samples[f"f{image}"], alloc, HEADER.itemsize + descriptors.nbytes + samples.nbytes, end)
        self.labels = (samples[f"f{kinds.index(1)}"] if 1 in kinds else np.zeros(n)).astype(np.int64)
        self.num_samples = n

    def _check_samples(self, images, alloc, start, end):
        """Gives every sample its size, which only the allocation table has, and refuses one that is not in the data."""
        self.modes = images["mode"].copy()
        self.widths, self.heights = images["width"].astype(np.int64), images["height"].astype(np.int64)
        order = np.argsort(alloc["ptr"], kind="stable")
        at = np.searchsorted(alloc["ptr"], images["data_ptr"], sorter=order)
        known = at < len(alloc)
        rows = alloc[order[np.minimum(at, len(alloc) - 1)]] if len(alloc) else np.zeros(len(images), ALLOC)
        known &= rows["ptr"] == images["data_ptr"]
        ptrs, sizes = images["data_ptr"], rows["size"]
        known &= (ptrs >= start) & (ptrs <= end) & (sizes <= self.size) & (sizes <= end - np.minimum(ptrs, end))
        known &= (sizes > 0) & (self.widths > 0) & (self.heights > 0) & (self.modes <= 1)
        # no memory on the word of a table: a block of a JPEG takes a bit or more, a raw pixel three bytes
        known &= self.widths * self.heights <= np.minimum(sizes, self.size).astype(np.int64) * MOST_PIXELS
        if not known.all():
            i = int(np.argmin(known))
            raise self._wrong(f"sample {i} ({self.widths[i]}x{self.heights[i]}, mode {self.modes[i]}) has no valid "
                              "place in it")
        self.ptrs, self.sizes = ptrs.astype(np.int64), sizes.astype(np.int64)

    def read(self, i):
        """The stored bytes of sample i."""
        data = os.pread(self.file.fileno(), int(self.sizes[i]), int(self.ptrs[i]))
        if len(data) != self.sizes[i]:
            raise DataError(f"{self.path}: sample {i}: {REASONS[SHORT_READ]}")
        return data

    def image(self, i, box=None):
        """Sample i, or its box (x, y, w, h), as uint8 (h, w, 3) by libjpeg-turbo; DataError names a damaged sample."""
        width, height = int(self.widths[i]), int(self.heights[i])
        x, y, w, h = box or (0, 0, width, height)
        if not (0 <= x and 0 <= y and 0 < w <= width - x and 0 < h <= height - y):
            raise ValueError(f"{self.path}: box {box} is not inside sample {i}, {width}x{height}")
        src, code = np.frombuffer(bytearray(self.read(i)), np.uint8), OK
        pixels = src
        if self.modes[i] == 0:
            scratch = make_scratch(*(table[i:i + 1] for table in (self.sizes, self.widths, self.heights)), 8)
            code, pixels = decode_rgb(src, len(src), width, height, scratch), scratch.planes[:3 * width * height]
            destroy_decoder(scratch.tj[0])
        elif len(src) != 3 * width * height:
            code = OTHER_SIZE
        if code != OK:
            raise DataError(f"{self.path}: sample {i}: {REASONS[code]}")
        return pixels.reshape(height, width, 3)[y:y + h, x:x + w].copy()

    def preload(self):
        """Reads the file once, in pieces, into the page cache; yields the size of each piece, for a progress bar."""
        for at in range(0, self.size, 1 << 26):
            yield len(os.pread(self.file.fileno(), 1 << 26, at))

    def close(self):
        self.file.close()


def refuse_fork(process):
    """Raises RuntimeError in any other process than the one that made a loader: threads do not survive a fork."""
    if os.getpid() != process:
        raise RuntimeError(f"this loader was made in process {process} and has no threads in its fork {os.getpid()}: "
                           "make one there")


WINDOW = 512 << 20  # bytes that order="pages" shuffles in


# --- order, epochs and stages: what both loaders share
def usable_cores():
    """The cores that this process may use, shared out among torchrun's processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Loader:
    """Epochs of batches: which sample comes when, as a pure function of (seed, epoch), and where to resume."""

    def __init__(self, batch_size, train=True, res=224, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5,
                 crop_ratio=224 / 256, interpolation="bicubic", num_workers=0, seed=0, rank=0, world_size=1,
                 drop_last=None, device="cpu", indices=None, ahead=3, order="random", skip_bad=False):
        if order not in ("random", "pages"):
            raise ValueError(f"order={order!r}: expected 'random' or 'pages'")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation={interpolation!r}: expected 'bicubic' or 'bilinear'")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.batch_size, self.train, self.ratio, self.hflip = int(batch_size), bool(train), ratio, hflip
        self.crop_ratio, self.interpolation, self.seed = crop_ratio, interpolation, seed
        self.rank, self.world_size, self.device, self.ahead = rank, world_size, torch.device(device), ahead
        self.num_workers = num_workers or usable_cores()
        self.drop_last = self.train if drop_last is None else drop_last
        self.indices = np.arange(self.total) if indices is None else np.asarray(indices, np.int64)
        if len(self.indices) == 0 or self.indices.min() < 0 or self.indices.max() >= self.total:
            raise ValueError(f"indices must name samples 0 to {self.total - 1}, at least one")
        self.num_samples, self.epoch, self.batch, self.closed = len(self.indices), 0, 0, False
        self.skip_bad, self.bad_samples, self.num_replaced, self._told_bad = skip_bad, {}, 0, set()
        self.process = os.getpid()
        self._started, self.res, self.scale, self.order = False, None, None, order
        self.set_stage(res, scale)
        if len(self) == 0:
            raise DataError(f"{self.num_samples} samples on {world_size} rank(s) do not fill one batch of "
                            f"{batch_size}; take a smaller batch or drop_last=False")

    def set_stage(self, res=None, scale=None):
        """Output side in pixels and crop area range from the next epoch on; None keeps what is."""
        if res is not None and res < 1 or scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"res={res}, scale={scale}: expected a positive side and 0 < low <= high <= 1")
        self.res = self.res if res is None else int(res)
        self.scale = self.scale if scale is None else (float(scale[0]), float(scale[1]))

    def set_epoch(self, epoch):
        """The next iteration is this epoch from its start; otherwise iterations count up from 0."""
        self.epoch, self.batch, self._started = int(epoch), 0, False

    def state_dict(self):
        """Where the iteration stands, in samples of all ranks: it can be resumed on another number of ranks."""
        return {"epoch": self.epoch, "samples": self.batch * self.batch_size * self.world_size, "seed": self.seed,
                "num_samples": self.num_samples, "order": self.order, "res": self.res, "scale": list(self.scale)}

    def load_state_dict(self, state):
        """Makes the next iteration go on with the exact next batch. ValueError if the data or the batching differ."""
        total = self.batch_size * self.world_size
        differ = [f"{k}: {state[k]} there, {getattr(self, k)} here" for k in ("num_samples", "seed", "order")
                  if state[k] != getattr(self, k)]
        if differ:
            raise ValueError(f"the state is of another loader ({'; '.join(differ)})")
        if state["samples"] % total:
            raise ValueError(f"the state is {state['samples']} samples into its epoch, which {self.world_size} rank(s) "
                             f"x batch {self.batch_size} cannot continue; take a total batch that divides it")
        self.epoch, self.batch, self._started = state["epoch"], state["samples"] // total, False
        self.set_stage(state["res"], state["scale"])

    def _positions(self):
        """This rank's positions in `indices` for self.epoch, in order; the ranks' lists interleave to the whole."""
        if not self.train:
            return np.arange(self.rank, self.num_samples, self.world_size)
        order = self._shuffle(np.random.default_rng([self.seed, self.epoch]))
        order = order[:len(order) // self.world_size * self.world_size]  # as many for each rank
        return np.ascontiguousarray(order[self.rank::self.world_size])

    def _shuffle(self, rng):
        return rng.permutation(self.num_samples)

    def __len__(self):
        n = self.num_samples // self.world_size
        if not self.train:
            n = len(range(self.rank, self.num_samples, self.world_size))
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self):
        if self.closed:
            raise RuntimeError("this loader is closed")
        refuse_fork(self.process)
        if self._started:  # an earlier iteration was left early: this is the next epoch
            self.epoch, self.batch = self.epoch + 1, 0
        self._started = True
        batches = self._host_batches(self._positions(), self.batch)
        for batch in self._to_device(batches) if self.device.type == "cuda" else batches:
            self.batch += 1
            yield batch
        self.epoch, self.batch, self._started = self.epoch + 1, 0, False

    def _to_device(self, batches):
        """Copies one batch ahead on a side stream, so that the training stream never waits for a copy."""
        stream, ready, copied = torch.cuda.Stream(self.device), None, None
        for images, labels in batches:
            if copied is not None:
                copied.synchronize()  # long done; until here `images` kept its pinned buffer from being filled again
            with torch.cuda.stream(stream):
                upload = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
                copied = stream.record_event()
            if ready is not None:
                yield self._hand_over(*ready)
            ready = *upload, copied
        if ready is not None:
            yield self._hand_over(*ready)

    def _hand_over(self, images, labels, copied):
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        images.record_stream(current)
        labels.record_stream(current)
        return images, labels

    def _note_bad(self, replaced):
        """Counts and names the samples that were replaced: pairs (sample, reason), which are taken from the list."""
        self.num_replaced += len(replaced)
        self.bad_samples.update(replaced)
        replaced.clear()
        if len(self.bad_samples) > max(10, self.num_samples // 100):
            raise DataError(f"{self.source}: over 1 % of its {self.num_samples:,} samples are damaged, more than "
                            f"skip_bad makes up for; the first: {next(iter(self.bad_samples.items()))}. Is it whole?")

    def new_bad_samples(self):
        """{"file: sample number": reason} of those that no earlier call has returned, over all ranks, together."""
        new = {f"{self.source}: sample {k}": v for k, v in self.bad_samples.items() if k not in self._told_bad}
        self._told_bad.update(self.bad_samples)
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(found := [None] * torch.distributed.get_world_size(), new)
            new = {k: v for part in found for k, v in part.items()}
        return new

    @property
    def labels(self):
        return self.reader.labels if hasattr(self, "reader") else np.array([y for _, y in self.samples])

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# --- loader over a .beton file
class _Run:
    """The threads that fill one epoch: no lock, no Python and no allocation an image; a lock and a wake-up a batch."""

    def __init__(self, loader, positions, start):
        reader, self.size = loader.reader, loader.batch_size
        self.slots, self.pinned = loader.ahead, loader.device.type == "cuda"
        self.bytes = self.size * 3 * loader.res ** 2
        self.reader, self.res, self.total = reader, loader.res, len(positions)
        self.batches = len(loader)
        self.buffers, self.holders, self.views, self.granted = [], [], {}, start
        self.failure, self.wake, self.process, self.replaced = None, threading.Condition(), os.getpid(), []
        control, wanted = np.array([start * self.size, start * self.size]), loader.indices[positions]
        self.job = Job(reader.file.fileno(), reader.modes, reader.widths, reader.heights, reader.ptrs, reader.sizes,
                       wanted, wanted.copy(), positions, control, np.zeros(self.slots, np.int64),
                       np.zeros(self.slots, np.int64), np.zeros((self.slots, self.size), np.uint8), loader.train,
                       loader.res, self.size, loader.interpolation == "bicubic", loader.seed, loader.epoch,
                       loader.scale, tuple(map(float, loader.ratio)), float(loader.hflip), float(loader.crop_ratio),
                       bool(loader.skip_bad))
        compile_kernels(self.job, reader)
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(loader.num_workers)]
        for thread in self.threads:
            thread.start()

    def _work(self):
        scratch, control = None, self.job.control
        try:
            scratch = make_scratch(self.reader.sizes, self.reader.widths, self.reader.heights, self.res)
            while control[LIMIT] >= 0:
                completed = fill(self.job, scratch)
                with self.wake:
                    if completed >= 0:
                        self.wake.notify_all()
                    while 0 <= control[LIMIT] <= control[NEXT]:
                        self.wake.wait()
        except BaseException as e:  # whatever it is, the caller gets it; a thread that just ends would leave it waiting
            with self.wake:
                self.failure = e
                self.wake.notify_all()
        finally:
            if scratch is not None:
                destroy_decoder(scratch.tj[0])

    def _grant(self, batch):
        """Lets the threads fill `batch` too, into a buffer that nobody outside holds any more."""
        free = [i for i, holder in enumerate(self.holders) if holder() is None]
        if not free:
            free = [len(self.buffers)]
            self.buffers.append(torch.empty(self.bytes, dtype=torch.uint8, pin_memory=self.pinned).numpy())
            self.holders.append(None)
        buffer = self.buffers[free[0]]
        view = self.views[batch] = buffer[:]  # lives as long as a tensor made from it: then the buffer is free again
        self.holders[free[0]] = weakref.ref(view)
        slot = batch % self.slots
        self.job.addresses[slot], self.job.done[slot] = buffer.ctypes.data, 0
        self.job.control[LIMIT] = min(self.total, (batch + 1) * self.size)

    def take(self, batch):
        """Waits for a batch and returns its pictures; raises what went wrong in it."""
        refuse_fork(self.process)
        slot, size = batch % self.slots, min(self.size, self.total - batch * self.size)
        with self.wake:
            while self.granted < min(self.batches, batch + self.slots) and self.job.control[LIMIT] >= 0:  # not stopped
                self._grant(self.granted)
                self.granted += 1
            self.wake.notify_all()
            while self.job.done[slot] < size and self.failure is None and self.job.control[LIMIT] >= 0:
                self.wake.wait()
        if self.failure is not None:
            raise RuntimeError(f"a loader thread on {self.reader.path} failed: {self.failure!r}") from self.failure
        if self.job.control[LIMIT] < 0:
            raise RuntimeError("the loader was closed while it was being read")
        for row in np.flatnonzero(self.job.status[slot, :size]):
            sample, reason = int(self.job.wanted[batch * self.size + row]), REASONS[int(self.job.status[slot, row])]
            if self.job.ids[batch * self.size + row] == sample:
                raise DataError(f"{self.reader.path}: sample {sample}: {reason}. "
                                f"`python build_beton.py --verify {self.reader.path}` lists all that is wrong; "
                                "skip_bad=True (--skip-bad) takes the next good one instead.")
            self.replaced.append((sample, reason))
        return torch.from_numpy(self.views.pop(batch)).view(self.size, self.res, self.res, 3)[:size].permute(0, 3, 1, 2)

    def stop(self):
        if os.getpid() != self.process:
            return  # in a fork: the threads are not here, and one of them may hold the lock for ever
        with self.wake:
            self.job.control[LIMIT] = -1
            self.wake.notify_all()
        for thread in self.threads:
            thread.join()


class ESSLLoader(_Loader):
    """Batches of a .beton file: uint8 (B, 3, res, res) in channels_last memory and int64 (B,), on the device.

    Training takes RandomResizedCrop(scale, ratio) and a flip with probability hflip; evaluation the centre square of
    crop_ratio of the short side. The bytes of a batch depend on (seed, epoch, indices) and the stage alone, not on
    num_workers (0: all cores this process may use). Training leaves out the last num_samples % world_size samples of an
    epoch's order, and the last partial batch with drop_last; evaluation visits each sample once over all ranks.
    order="pages" reads a file that is larger than memory in large sequential pieces. skip_bad=True takes the next good
    sample of the epoch for a damaged one, counts it in num_replaced and names it in bad_samples ({number: reason}).
    Raises ValueError for the arguments and DataError for the file, naming the sample where one is damaged.
    """

    def __init__(self, path, batch_size, train=True, **kwargs):
        self.reader, self.source = BetonReader(path), str(path)
        self.total, self.classes, self._runs = self.reader.num_samples, self.reader.classes, set()
        super().__init__(batch_size, train, **kwargs)

    def _shuffle(self, rng):
        """order="pages": windows of consecutive pages in random order, samples shuffled within a window.

        A window is WINDOW bytes long and starts elsewhere in each epoch. All ranks are in the same window at a time.
        """
        if self.order == "random":
            return super()._shuffle(rng)
        pages = max(1, WINDOW // self.reader.page_size)
        window = (self.reader.ptrs[self.indices] // self.reader.page_size + rng.integers(pages)) // pages
        rank = rng.permutation(int(window.max()) + 1)[window]
        return np.lexsort((rng.random(len(window)), rank))

    def _host_batches(self, positions, start):
        run = _Run(self, positions, start)
        self._runs.add(run)
        self._read = set()  # the windows that this epoch has asked for
        try:
            for b in range(start, len(self)):
                if self.order == "pages":
                    self._read_ahead(run.job.ids[b * run.size:(b + 2 * run.slots) * run.size])
                pictures = run.take(b)
                self._note_bad(run.replaced)
                yield pictures, torch.from_numpy(self.reader.labels[run.job.ids[b * run.size:(b + 1) * run.size]])
        finally:
            run.stop()
            self._runs.discard(run)

    def _read_ahead(self, ids):
        """Asks the system to read the windows that the coming samples lie in, front to back, before they are needed."""
        ptrs, window = self.reader.ptrs, max(WINDOW, self.reader.page_size)
        for number in set((ptrs[ids] // window).tolist()) - self._read:
            os.posix_fadvise(self.reader.file.fileno(), number * window, window, os.POSIX_FADV_WILLNEED)
            self._read.add(number)

    def close(self):
        """Stops the threads, also of an iteration under way, and closes the file. Safe to call twice."""
        for run in list(self._runs):
            run.stop()
        self.reader.close()
        super().close()


# --- loader over a folder of pictures
class _Pictures(torch.utils.data.Dataset):
    """One epoch of an image folder: Pillow decodes the whole picture, then box, resize and flip as in ESSLLoader."""

    def __init__(self, loader):
        self.samples, self.indices, self.train, self.res = loader.samples, loader.indices, loader.train, loader.res
        self.scale, self.ratio, self.hflip = loader.scale, loader.ratio, loader.hflip
        self.crop_ratio, self.interpolation = loader.crop_ratio, loader.interpolation
        self.seed, self.epoch = loader.seed, loader.epoch
        self.transform, self.skip_bad = loader.transform, loader.skip_bad

    def _open(self, position):
        """(picture, label, reason why the one at the position was passed over or "")."""
        from torchvision.datasets.folder import default_loader
        reason = ""
        for step in range(min(len(self.indices), MOST_TRIES) if self.skip_bad else 1):
            path, label = self.samples[self.indices[(position + step) % len(self.indices)]]
            try:
                return default_loader(path), label, reason
            except (OSError, ValueError, SyntaxError) as e:
                reason = reason or f"{path}: cannot be decoded ({e})"
        raise DataError(f"{reason}; remove it, or take the next good one by skip_bad=True (--skip-bad)")

    def __getitem__(self, position):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F
        picture, label, reason = self._open(position)
        if self.train:
            x, y, w, h = random_box(*picture.size, self.scale, self.ratio, self.seed, self.epoch, position)
        else:
            x, y, w, h = center_box(*picture.size, self.crop_ratio)
        picture = F.resized_crop(picture, y, x, h, w, [self.res, self.res], InterpolationMode(self.interpolation))
        if self.train and uniform(self.seed, self.epoch, position, FLIP_DRAW) < self.hflip:
            picture = F.hflip(picture)
        if self.train and self.transform:  # timm's RandAug draws from these two generators, this worker process's own
            number = int(uniform(self.seed, self.epoch, position, FLIP_DRAW + 1) * 2 ** 32)
            random.seed(number)
            np.random.seed(number)
            picture = self.transform(picture)
        return torch.from_numpy(np.array(picture)), label, reason


class FolderLoader(_Loader):
    """ESSLLoader's surface over class folders of pictures, by torchvision's ImageFolder and torch's DataLoader.

    Same order and same relative boxes as ESSLLoader for the same seed: for comparison, and for the paper's Table 12.
    transform: a function of the cropped and flipped Pillow picture, in training: RandAug for Table 6.
    """

    def __init__(self, folder, batch_size, train=True, transform=None, **kwargs):
        from torchvision.datasets import ImageFolder
        bind()
        try:
            data = ImageFolder(folder)
        except FileNotFoundError as e:
            raise DataError(f"{folder}: expected one sub-folder of pictures for each class ({e})") from None
        self.samples, self.classes, self.total, self.transform = data.samples, data.classes, len(data), transform
        self.source = str(folder)
        super().__init__(batch_size, train, **kwargs)

    def _host_batches(self, positions, start):
        size = self.batch_size
        batches = [positions[b * size:(b + 1) * size].tolist() for b in range(start, len(self))]
        loader = torch.utils.data.DataLoader(_Pictures(self), batch_sampler=batches, num_workers=self.num_workers,
                                             pin_memory=self.device.type == "cuda", prefetch_factor=self.ahead)
        for batch, (pixels, labels, reasons) in zip(batches, loader):
            self._note_bad([(int(self.indices[at]), reason) for at, reason in zip(batch, reasons) if reason])
            yield pixels.permute(0, 3, 1, 2), labels


# --- what a run checks before it begins
def check_batches(num_samples, total_batch, batch_size, world_size, repeat=1):
    """Raises DataError, with flags that work, where steps are not whole batches of each rank.

    repeat: the times that a picture is used in a step.
    """
    most = num_samples * repeat
    whole = total_batch % (batch_size * world_size) == 0 and batch_size % repeat == 0
    if whole and total_batch <= most:
        return
    batch = max(1, min(batch_size, total_batch // world_size, most // world_size) // repeat) * repeat
    total = max(1, min(total_batch, most) // (batch * world_size)) * batch * world_size
    raise DataError(
        f"--total-batch {total_batch} should be a multiple of --batch-size {batch_size} x "
        f"{world_size} process(es), and at most {most:,}, the number of pictures (x --repeat). "
        f"This works: --total-batch {total} --batch-size {batch}")


def check_classes(train, val):
    """Raises DataError where a held-out set's labels do not mean what the training set's do."""
    if train.classes and val.classes and list(train.classes) != list(val.classes):
        differ = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise DataError(f"{val.source} has other classes than {train.source}: they differ in "
                        f"{', '.join(differ[:4])}.")
    if val.labels.min() < 0 or val.labels.max() > train.labels.max():
        raise DataError(f"{val.source} has labels {val.labels.min()} to {val.labels.max()}, "
                        f"{train.source} {train.labels.min()} to {train.labels.max()}.")


def open_loader(path, batch_size, train=True, preload=False, **kwargs):
    """ESSLLoader for a file, FolderLoader for a folder; preload reads a file into the page cache, once a machine."""
    loader = (FolderLoader if Path(path).is_dir() else ESSLLoader)(path, batch_size, train, **kwargs)
    if preload and not Path(path).is_dir() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        from tqdm import tqdm
        with tqdm(desc=f"preload {path}", total=loader.reader.size, unit="B", unit_scale=True) as bar:
            for size in loader.reader.preload():
                bar.update(size)
    return loader


# --- the same decoder inside FFCV
@njit(nogil=True, cache=True)
def fill_share(table, scale, ratio, seed, epoch, res, bicubic, codes):
    """One thread's share of a batch; a row of table: address, size, mode, width, height, number of a sample, output."""
    scratch = make_scratch(table[:, 1].copy(), table[:, 3].copy(), table[:, 4].copy(), res)
    for i in range(len(table)):
        address, size, mode, width, height, draw, to = table[i]
        x, y, w, h = random_box(width, height, scale, ratio, seed, epoch, draw)
        codes[i] = resized_crop(carray(as_pointer(address), (size,), np.uint8), size, mode, width, height, x, y, w, h,
                                res, bicubic, False, carray(as_pointer(to), (3 * res * res,), np.uint8), scratch)
    destroy_decoder(scratch.tj[0])


def interrupt_ffcv(sample):
    """FFCV's loader would wait for ever for a thread that raised: says what is wrong and interrupts the main thread."""
    print(f"essl_loader.ffcv_decoder: sample {sample} is damaged: python build_beton.py --verify FILE", file=sys.stderr)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def ffcv_decoder(output_size=(224, 224), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic", seed=0):
    """An FFCV Operation for the place of RandomResizedCropRGBImageDecoder: decodes only the crop (the paper's ESSL).

    Pipelines as in FFCV's documentation, e.g. {"image": [ffcv_decoder(), RandomHorizontalFlip(), ToTensor(), ...]};
    uint8 (B, res, res, 3). Crops are a function of (seed, number of the batch, sample). A damaged sample is named on
    stderr and interrupts the program (KeyboardInterrupt).
    """
    from dataclasses import replace

    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    bind()
    res, bicubic = int(output_size[0]), interpolation == "bicubic"
    scale, ratio = tuple(map(float, scale)), tuple(map(float, ratio))
    if output_size[0] != output_size[1] or interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"output_size={output_size}, interpolation={interpolation!r}: expected a square, and "
                         "'bicubic' or 'bilinear'")

    class CropDecoder(SimpleRGBImageDecoder):  # FFCV takes only its own class for a decoder
        def declare_state_and_memory(self, previous_state):
            shape = (res, res, 3)
            return (replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")),
                    AllocationQuery(shape, np.dtype("u1")))

        def generate_code(self):
            read, parallel, threads = self.memory_read, Compiler.get_iterator(), Compiler.num_threads
            self.batches = np.zeros(1, np.int64)
            counter = self.batches.ctypes.data

            def decode(batch_indices, destination, metadata, storage_state):
                n, number = len(batch_indices), atomic_add(counter, 1)
                table, codes = np.empty((n, 7), np.int64), np.empty(n, np.int64)
                for i in range(n):
                    sample = metadata[batch_indices[i]]
                    data, row = read(sample["data_ptr"], storage_state), table[i]
                    row[0], row[1], row[2] = data.ctypes.data, data.size, sample["mode"]
                    row[3], row[4], row[5] = sample["width"], sample["height"], batch_indices[i]
                    row[6] = destination[i].ctypes.data
                for thread in parallel(threads):
                    fill_share(table[thread::threads], scale, ratio, seed, number, res, bicubic, codes[thread::threads])
                if codes.max() != 0:
                    sample = batch_indices[np.argmax(codes)]
                    with objmode():
                        interrupt_ffcv(sample)
                    raise ValueError("a sample of the .beton file is damaged")
                return destination[:n]
            decode.is_parallel = True
            return decode
    return CropDecoder()
