"""Turns a .beton file into batches on the device, decoding only the part of each JPEG that its crop keeps.

    from essl_loader import ESSLLoader
    for images, labels in ESSLLoader("data/train_500_95.beton", batch_size=256):   # uint8 (B, 3, 224, 224), int64 (B,)
        ...

Needs numpy, numba, torch and libturbojpeg (`pip install turbojpeg`, or Debian's libturbojpeg0). The kernels compile once,
about half a minute, into numba's cache beside this file. Reads top to bottom: format, C library, kernels, reader, loader.
"""
import ctypes
import json
import math
import os
import random
import threading
import weakref
import zlib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import llvmlite.binding
import numpy as np
import torch
from numba import carray, njit, types
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
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # type ids that this reader knows


def tables_checksum(samples, alloc):
    """crc32 over the bytes of the samples table and then the allocation table."""
    return zlib.crc32(np.ascontiguousarray(alloc).view(np.uint8),
                      zlib.crc32(np.ascontiguousarray(samples).view(np.uint8)))


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


def bind():
    """Resolves the symbols that the kernels call; every public entry does it, importing the file does not."""
    if _bound:
        return
    lib, crop = load_turbojpeg(), True
    for name in ("tjInitDecompress", "tjDestroy", "tjDecompress2", "tjDecompressToYUVPlanes",
                 "tj3DecompressHeader", "tj3SetCroppingRegion", "tj3Decompress8"):
        if not hasattr(lib, name):  # libjpeg-turbo 2.1 has no tj3 calls; the symbol must resolve, `crop` keeps it uncalled
            crop, symbol = False, lib.tjDestroy
        else:
            symbol = getattr(lib, name)
        # Under a name of our own: ffcv brings the system's copy of the same symbols into the process.
        llvmlite.binding.add_symbol("essl_" + name, ctypes.cast(symbol, ctypes.c_void_p).value)
    _bound.append((lib, crop))


def _c(name, restype, *argtypes):
    return types.ExternalFunction(name, restype(*argtypes))


_i, _p = types.int32, types.intp
pread = _c("pread", _p, _i, _p, _p, _p)                                  # fd, buffer, size, offset
memchr = _c("memchr", _p, _p, _i, _p)                                    # start, byte, size
memcpy = _c("memcpy", _p, _p, _p, _p)                                    # to, from, size
tj_init = _c("essl_tjInitDecompress", _p)
tj_destroy = _c("essl_tjDestroy", _i, _p)
tj_rgb = _c("essl_tjDecompress2", _i, _p, _p, _p, _p, _i, _i, _i, _i, _i)  # handle, jpeg, size, to, w, pitch, h, format
tj_planes = _c("essl_tjDecompressToYUVPlanes", _i, _p, _p, _p, _p, _i, _p, _i, _i)  # .., planes, w, strides, h, flags
tj3_header = _c("essl_tj3DecompressHeader", _i, _p, _p, _p)
tj3_crop = _c("essl_tj3SetCroppingRegion", _i, _p, types.int64, types.int64)  # handle, struct {int x, y, w, h} in two words
tj3_rgb = _c("essl_tj3Decompress8", _i, _p, _p, _p, _p, _i, _i)
STOP_ON_WARNING = 8192  # libjpeg-turbo then fails where it would paint damaged blocks grey


@intrinsic
def as_pointer(typing_context, address):
    """An address as the pointer that carray() wants."""
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))
    return types.voidptr(types.intp), codegen


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
    """RandomResizedCrop's box (x, y, w, h): ten tries at area ~ U(scale), log aspect ~ U(log ratio), else the centre."""
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
# What parse_jpeg finds; MCU = the block of 8x8 to 16x16 pixels in which JPEG stores its components together.
HEIGHT, WIDTH, SOF, COMPONENTS, H_SAMP, V_SAMP, INTERVAL, SCAN, SUBSAMP, LAST = range(10)
S444, S422, S420, GRAY, S440, OTHER = range(6)  # libjpeg-turbo's numbers; OTHER is ours


@njit(nogil=True, cache=True)
def parse_jpeg(src, size, info):
    """Reads a baseline JPEG's header into info; BROKEN, or UNKNOWN where only libjpeg-turbo can tell (progressive, ...)."""
    info[:] = 0
    adobe_rgb = False
    if size < 4 or src[0] != 0xFF or src[1] != 0xD8:
        return BROKEN
    i = 2
    while i + 4 <= size:
        marker, length = src[i + 1], (src[i + 2] << 8) + src[i + 3]
        if src[i] != 0xFF or length < 2 or i + 2 + length > size:
            return BROKEN
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:  # SOF: sizes and sampling
            if length < 8 + 3 * np.int64(src[i + 9]):
                return BROKEN
            n = np.int64(src[i + 9])
            info[SOF], info[COMPONENTS], info[SUBSAMP] = i + 5, n, OTHER
            info[HEIGHT], info[WIDTH] = (src[i + 5] << 8) + src[i + 6], (src[i + 7] << 8) + src[i + 8]
            if marker > 0xC1 or src[i + 4] != 8 or (n != 1 and n != 3):
                return UNKNOWN
            info[H_SAMP], info[V_SAMP] = src[i + 11] >> 4, src[i + 11] & 15
            if n == 1:
                info[H_SAMP], info[V_SAMP], info[SUBSAMP] = 1, 1, GRAY
            elif (src[i + 10] != 82 and src[i + 14] == 0x11 and src[i + 17] == 0x11  # a component named R is red
                  and 1 <= info[H_SAMP] <= 2 and 1 <= info[V_SAMP] <= 2):
                info[SUBSAMP] = ((S444, S440), (S422, S420))[info[H_SAMP] - 1][info[V_SAMP] - 1]
        elif marker == 0xEE and length >= 14 and src[i + 4] == 65 and src[i + 15] == 0:
            adobe_rgb = True  # Adobe's mark with transform 0: three planes are R, G, B
        elif marker == 0xDD:
            info[INTERVAL] = (src[i + 4] << 8) + src[i + 5]
        elif marker == 0xDA:  # SOS: the entropy-coded data follow
            info[SCAN] = i + 2 + length
            if adobe_rgb and info[COMPONENTS] == 3:
                info[SUBSAMP] = OTHER
            return OK if info[SOF] > 0 and src[i + 4] == info[COMPONENTS] else UNKNOWN
        i += 2 + length
    return BROKEN


@njit(nogil=True, cache=True)
def find_intervals(src, size, info, starts):
    """Offsets of the restart intervals into starts, and one past EOI after the last; returns how many, -1 if damaged."""
    base, i, n = src.ctypes.data, info[SCAN], 0
    starts[0] = i
    while i < size - 1:
        found = memchr(base + i, 0xFF, size - 1 - i)
        if found == 0:
            return -1
        i = found - base
        marker = src[i + 1]
        if marker == 0xFF:
            i += 1
            continue
        i += 2
        if marker == 0:
            continue
        n += 1
        if n >= starts.size:
            return -1
        starts[n] = i
        if marker == 0xD9:
            return n
        if marker != 0xD0 + ((n - 1) & 7):
            return -1
    return -1


@njit(nogil=True, cache=True)
def splice(src, info, starts, row0, row1, col0, col1, dst):
    """A JPEG of MCU rows row0..row1 and, in each, restart intervals col0..col1; returns its size.

    Reference: the same crop of the whole picture's decode.
    """
    mcu_w, mcu_h, k = 8 * info[H_SAMP], 8 * info[V_SAMP], info[INTERVAL]
    per_row = (info[WIDTH] + mcu_w - 1) // mcu_w // k
    height = min(info[HEIGHT], row1 * mcu_h) - row0 * mcu_h
    width = min(info[WIDTH], col1 * k * mcu_w) - col0 * k * mcu_w
    to, frm, o = dst.ctypes.data, src.ctypes.data, info[SCAN]
    memcpy(to, frm, o)
    s = info[SOF]
    dst[s], dst[s + 1], dst[s + 2], dst[s + 3] = height >> 8, height & 255, width >> 8, width & 255
    n = 0
    for row in range(row0, row1):
        first, last = row * per_row + col0, row * per_row + col1
        memcpy(to + o, frm + starts[first], starts[last] - starts[first])
        for j in range(first + 1, last + 1):  # each interval brings the marker behind it, which counts modulo 8
            at = o + starts[j] - starts[first]
            dst[at - 2], dst[at - 1] = 0xFF, 0xD0 + (n & 7)
            n += 1
        o += starts[last] - starts[first]
    dst[o - 1] = 0xD9
    return o


@njit(nogil=True, cache=True)
def cut(src, size, width, height, x, y, w, h, margin, scratch):
    """Makes the smallest JPEG that holds the box and `margin` pixels around it.

    Returns (code, address, size, x0, y0, width, height) of that JPEG and of the part of the picture that it shows. A
    file without usable restart markers comes back whole.
    """
    info, base = scratch.info, src.ctypes.data
    code = parse_jpeg(src, size, info)
    if code == BROKEN or info[SOF] == 0:
        return BROKEN, base, size, 0, 0, width, height
    if info[WIDTH] != width or info[HEIGHT] != height:
        return OTHER_SIZE, base, size, 0, 0, width, height
    if code == UNKNOWN:
        info[SUBSAMP] = OTHER
        return OK, base, size, 0, 0, width, height
    mcu_w, mcu_h, k = 8 * info[H_SAMP], 8 * info[V_SAMP], info[INTERVAL]
    across, down = (width + mcu_w - 1) // mcu_w, (height + mcu_h - 1) // mcu_h
    if info[SUBSAMP] == OTHER or k == 0 or across % k != 0:
        return OK, base, size, 0, 0, width, height
    if across // k * down >= scratch.starts.size:
        return OTHER_SIZE, base, size, 0, 0, width, height
    if find_intervals(src, size, info, scratch.starts) != across // k * down:
        return BROKEN, base, size, 0, 0, width, height
    row0, row1 = max(0, y - margin) // mcu_h, (min(height, y + h + margin) + mcu_h - 1) // mcu_h
    wide = mcu_w * k
    col0, col1 = max(0, x - margin) // wide, (min(width, x + w + margin) + wide - 1) // wide
    n = splice(src, info, scratch.starts, row0, row1, col0, col1, scratch.jpeg)
    x0, y0 = col0 * wide, row0 * mcu_h
    return OK, scratch.jpeg.ctypes.data, n, x0, y0, min(width, col1 * wide) - x0, min(height, row1 * mcu_h) - y0


@njit(nogil=True, cache=True)
def decode_rgb(src, size, width, height, x, y, w, h, scratch):
    """Decodes the box to interleaved RGB in scratch.planes; returns (code, offset of the box's corner, row stride).

    Reference: a full libjpeg-turbo decode, cropped. Chroma upsampling looks one chroma sample (two pixels) past the box.
    """
    code, jpeg, n, x0, y0, pw, ph = cut(src, size, width, height, x, y, w, h, 2, scratch)
    if code != OK:
        return code, 0, 0
    to, mcu_w = scratch.planes.ctypes.data, 8 * scratch.info[H_SAMP]
    if pw == width and ph == height and w * h < width * height and scratch.info[SUBSAMP] != OTHER and scratch.tj[1]:
        # A whole file and a library that crops: rows above and below are only entropy-decoded.
        x0 = max(0, x - mcu_w) // mcu_w * mcu_w
        y0 = max(0, y - 2)
        pw, ph = min(width - x0, x + w + mcu_w - x0), min(height - y0, y + h + 2 - y0)
        bad = (tj3_header(scratch.tj[0], jpeg, n) != 0 or tj3_crop(scratch.tj[0], x0 | (y0 << 32), pw | (ph << 32)) != 0
               or tj3_rgb(scratch.tj[0], jpeg, n, to, 3 * pw, 0) != 0)
        tj3_crop(scratch.tj[0], 0, 0)
        if bad:
            return BROKEN, 0, 0
    elif tj_rgb(scratch.tj[0], jpeg, n, to, pw, 3 * pw, ph, 0, STOP_ON_WARNING) != 0:
        return (UNKNOWN if scratch.info[SUBSAMP] == OTHER else BROKEN), 0, 0
    return OK, 3 * ((y - y0) * pw + x - x0), 3 * pw


@njit(nogil=True, cache=True)
def decode_planes(src, size, width, height, x, y, w, h, denom, scratch):
    """Decodes the box to Y, Cb, Cr planes at 1/denom of the size, without upsampling or colour conversion.

    scratch.plane[c] becomes (offset in scratch.planes, row stride, first column, first row, pixels a sample is wide and
    high, denom).
    Returns a code of REASONS, or -1 where only decode_rgb can do it.
    """
    code, jpeg, n, x0, y0, pw, ph = cut(src, size, width, height, x, y, w, h, 0, scratch)
    if code != OK:
        return code
    info = scratch.info
    if info[SUBSAMP] == OTHER:
        return -1
    pw, ph, at = (pw + denom - 1) // denom, (ph + denom - 1) // denom, 0
    for c in range(1 if info[SUBSAMP] == GRAY else 3):
        sx, sy = (1, 1) if c == 0 else (info[H_SAMP], info[V_SAMP])
        stride = ((pw + info[H_SAMP] - 1) // sx + 63) // 64 * 64
        scratch.addresses[c], scratch.strides[c] = scratch.planes.ctypes.data + at, stride
        plane = scratch.plane[c]
        plane[0], plane[1], plane[2], plane[3], plane[4], plane[5], plane[6] = at, stride, x0, y0, sx, sy, denom
        at += stride * ((ph + info[V_SAMP] - 1) // sy + 1)
    if tj_planes(scratch.tj[0], jpeg, n, scratch.addresses.ctypes.data, pw, scratch.strides.ctypes.data, ph,
                 STOP_ON_WARNING) != 0:
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
    wider = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * wider
    for i in range(out):
        center = box0 + (i + 0.5) * scale
        start = max(int(math.floor(box0)), int(center - support + 0.5))
        stop = min(int(math.ceil(box1)), int(center + support + 0.5))
        f = start if step == 1 else max(low, (start - 1) >> 1)
        first[i] = f
        row = weights[i * taps:(i + 1) * taps]
        row[:] = 0
        total = 0.0
        for p in range(start, stop):
            d = abs((p - center + 0.5) / wider)
            v = 0.0
            if not bicubic:
                v = max(0.0, 1.0 - d)
            elif d < 1.0:
                v = (1.5 * d - 2.5) * d * d + 1.0
            elif d < 2.0:
                v = ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
            total += v
            if step == 1:
                row[p - f] += v
            else:  # pixel p lies a quarter of a sample off sample p // 2, towards its neighbour
                near, far = p >> 1, (p >> 1) + (1 if p & 1 else -1)
                row[near - f] += 0.75 * v
                row[min(max(far, low), high - 1) - f] += 0.25 * v
        for t in range(taps):
            row[t] /= total


@njit(nogil=True, cache=True)
def count_taps(size, out, bicubic, step):
    """Taps per output sample, rounded up to a pair: the most that filter_weights can ask for."""
    pixels = int(math.ceil((4.0 if bicubic else 2.0) * max(size / out, 1.0)))
    return max(4, ((pixels if step == 1 else pixels // 2 + 3) + 1) // 2 * 2)


@njit(nogil=True, cache=True, fastmath=True)
def vertical_pass(src, offset, stride, last, width, out, first, taps, weights, flip, acc, dst, dst_stride):
    """Filters columns: row i of dst = sum over t of weights[i, t] * row first[i] + t of src, rounded and clipped.

    Rows are contiguous, so every inner loop vectorises; taps go in by four, then in pairs. `last` is the last source row.
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
        half = np.float32(0.5)
        if taps == 4:
            for x in range(width):
                v = w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x] + half
                to[x] = np.uint8(np.int32(min(max(v, np.float32(0)), np.float32(255))))
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
            to[x] = np.uint8(np.int32(min(max(sums[x], np.float32(0)), np.float32(255))))


@njit(nogil=True, cache=True)
def transpose(src, src_stride, rows, cols, dst, dst_stride):
    """dst[x, y] = src[y, x] for bytes, 8x8 at a time in eight uint64 (src and dst are uint64 views, strides in words)."""
    m4, m2, m1 = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
    s4, s2, s1 = np.uint64(32), np.uint64(16), np.uint64(8)
    for i in range((rows + 7) // 8):
        for j in range((cols + 7) // 8):
            s = 8 * i * src_stride + j
            a0, a1, a2, a3 = src[s], src[s + src_stride], src[s + 2 * src_stride], src[s + 3 * src_stride]
            s += 4 * src_stride
            a4, a5, a6, a7 = src[s], src[s + src_stride], src[s + 2 * src_stride], src[s + 3 * src_stride]
            t0, t1, t2, t3 = ((a0 >> s4) ^ a4) & m4, ((a1 >> s4) ^ a5) & m4, ((a2 >> s4) ^ a6) & m4, ((a3 >> s4) ^ a7) & m4
            a4, a5, a6, a7 = a4 ^ t0, a5 ^ t1, a6 ^ t2, a7 ^ t3
            a0, a1, a2, a3 = a0 ^ (t0 << s4), a1 ^ (t1 << s4), a2 ^ (t2 << s4), a3 ^ (t3 << s4)
            t0, t1, t2, t3 = ((a0 >> s2) ^ a2) & m2, ((a1 >> s2) ^ a3) & m2, ((a4 >> s2) ^ a6) & m2, ((a5 >> s2) ^ a7) & m2
            a2, a3, a6, a7 = a2 ^ t0, a3 ^ t1, a6 ^ t2, a7 ^ t3
            a0, a1, a4, a5 = a0 ^ (t0 << s2), a1 ^ (t1 << s2), a4 ^ (t2 << s2), a5 ^ (t3 << s2)
            t0, t1, t2, t3 = ((a0 >> s1) ^ a1) & m1, ((a2 >> s1) ^ a3) & m1, ((a4 >> s1) ^ a5) & m1, ((a6 >> s1) ^ a7) & m1
            d = 8 * j * dst_stride + i
            dst[d], dst[d + dst_stride] = a0 ^ (t0 << s1), a1 ^ t0
            dst[d + 2 * dst_stride], dst[d + 3 * dst_stride] = a2 ^ (t1 << s1), a3 ^ t1
            d += 4 * dst_stride
            dst[d], dst[d + dst_stride] = a4 ^ (t2 << s1), a5 ^ t2
            dst[d + 2 * dst_stride], dst[d + 3 * dst_stride] = a6 ^ (t3 << s1), a7 ^ t3


@njit(nogil=True, cache=True)
def resize_plane(planes, plane, x, y, w, h, res, bicubic, flip, dst, scratch):
    """Resizes the box (full-size pixels) of one plane to res x res in dst, whose row stride is scratch.a's: 8-aligned."""
    offset, stride, x0, y0, step_x, step_y, denom = plane[0], plane[1], plane[2], plane[3], plane[4], plane[5], plane[6]
    left, right, top, bottom = (x - x0) / denom, (x + w - x0) / denom, (y - y0) / denom, (y + h - y0) / denom
    col0, col1 = int(math.floor(left / step_x)), int(math.ceil(right / step_x))
    row0, row1 = int(math.floor(top / step_y)), int(math.ceil(bottom / step_y))
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
    a, b, z, top = np.float32(0.5), np.float32(128), np.float32(0), np.float32(255)
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
            luma, cb, cr = np.float32(p0[x]) + a, np.float32(p1[x]) - b, np.float32(p2[x]) - b
            red = luma + np.float32(1.402) * cr
            green = luma - np.float32(0.344136) * cb - np.float32(0.714136) * cr
            blue = luma + np.float32(1.772) * cb
            o[3 * x] = np.uint8(np.int32(min(max(red, z), top)))
            o[3 * x + 1] = np.uint8(np.int32(min(max(green, z), top)))
            o[3 * x + 2] = np.uint8(np.int32(min(max(blue, z), top)))


# --- kernels: one sample, and the loop that every thread runs
Scratch = namedtuple("Scratch", "tj info starts raw jpeg planes split plane addresses strides first weights acc a b "
                                "resized")
Job = namedtuple("Job", "fd modes widths heights ptrs sizes ids draws control done addresses status "
                        "train res batch_size bicubic seed epoch scale ratio hflip crop_ratio")
NEXT, LIMIT = 0, 1  # control: the next ticket (position in the epoch) to hand out, and the first that must wait


def make_scratch(max_bytes, max_width, max_height, res):
    """One thread's memory, sized once for the file's largest sample; tj = (decoder handle, library can crop)."""
    wide, tall, out8 = max_width + 128, max_height + 32, (res + 7) // 8 * 8
    side = (max(wide, tall) + 7) // 8 * 8

    def empty(*shape):
        return np.empty(shape, np.uint8)
    return Scratch(np.array([create_decoder(), _bound[0][1]]), np.zeros(16, np.int64),
                   np.empty((wide // 8) * (tall // 8) + 2, np.int64), empty(max_bytes + 64), empty(max_bytes + 64),
                   empty(3 * wide * tall), empty(3 * wide * tall), np.zeros((3, 7), np.int64), np.zeros(3, np.int64),
                   np.zeros(3, np.int32), np.empty(res, np.int64), np.empty(4 * side + 8 * res, np.float32),
                   np.empty(side + out8, np.float32), empty((side + out8) * out8), empty((side + out8) * out8),
                   empty(3, out8 * out8))


@njit(cache=True)
def create_decoder():
    return tj_init()


@njit(cache=True)
def destroy_decoder(handle):
    tj_destroy(handle)


SCALED_FROM = 8  # from this many times the output on, libjpeg-turbo's scaled decode leaves the filter a factor of 4


@njit(nogil=True, cache=True)
def resized_crop(src, size, mode, width, height, x, y, w, h, res, bicubic, flip, out, scratch):
    """Decodes, crops, resizes and flips one stored sample into out, res * res * 3 bytes of interleaved RGB.

    Reference: Pillow's decode, crop, resize. Returns a code of REASONS.
    """
    planes, code, ycc = scratch.planes, -1, True
    if mode == 0:
        denom = 1
        while denom < 8 and min(w, h) >= SCALED_FROM * denom * res:  # libjpeg-turbo's scaled decode antialiases by itself
            denom *= 2
        code = decode_planes(src, size, width, height, x, y, w, h, denom, scratch)
    if code > OK:
        return code
    n = 1 if mode == 0 and scratch.info[SUBSAMP] == GRAY else 3
    if code < 0:  # interleaved RGB, stored so or decoded so: take it apart
        ycc, offset, stride = False, 3 * (y * width + x), 3 * width
        rgb, wide = src, (w + 63) // 64 * 64
        if mode == 0:
            code, offset, stride = decode_rgb(src, size, width, height, x, y, w, h, scratch)
            if code != OK:
                return code
            rgb = scratch.planes
        elif size != 3 * width * height:
            return OTHER_SIZE
        planes = scratch.split
        for c in range(3):
            at = c * wide * h
            for row in range(h):
                line, to = rgb[offset + row * stride + c:][:3 * w], planes[at + row * wide:][:w]
                for i in range(w):
                    to[i] = line[3 * i]
            plane = scratch.plane[c]
            plane[0], plane[1], plane[2], plane[3], plane[4], plane[5], plane[6] = at, wide, x, y, 1, 1, 1
    for c in range(n):
        resize_plane(planes, scratch.plane[c], x, y, w, h, res, bicubic, flip, scratch.resized[c], scratch)
    write_rgb(scratch.resized, n, (res + 7) // 8 * 8, res, ycc, out)
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
def fill(job, scratch):
    """Fills batches until the limit (returns -1) or until this thread completes a batch (returns its number)."""
    n, slots, raw = len(job.ids), len(job.done), scratch.raw
    while True:
        ticket = take_ticket(job.control)
        if ticket < 0:
            return -1
        batch, row = ticket // job.batch_size, ticket % job.batch_size
        slot, i, draw = batch % slots, job.ids[ticket], job.draws[ticket]
        width, height, flip = job.widths[i], job.heights[i], False
        if job.train:
            x, y, w, h = random_box(width, height, job.scale, job.ratio, job.seed, job.epoch, draw)
            flip = uniform(job.seed, job.epoch, draw, FLIP_DRAW) < job.hflip
        else:
            x, y, w, h = center_box(width, height, job.crop_ratio)
        pixels = 3 * job.res * job.res
        out = carray(as_pointer(job.addresses[slot] + row * pixels), (pixels,), np.uint8)
        code = SHORT_READ
        if pread(job.fd, raw.ctypes.data, job.sizes[i], job.ptrs[i]) == job.sizes[i]:
            code = resized_crop(raw, job.sizes[i], job.modes[i], width, height, x, y, w, h, job.res, job.bicubic, flip,
                                out, scratch)
        job.status[slot, row] = code
        size = min(job.batch_size, n - batch * job.batch_size)
        if atomic_add(job.done.ctypes.data + 8 * slot, 1) + 1 == size:
            return batch


@njit(nogil=True, cache=True)
def read_rgb(src, size, mode, width, height, x, y, w, h, out, scratch):
    """Copies the box of a stored sample, unresized, into out (h, w, 3); returns a code of REASONS."""
    offset, stride, rgb = 3 * (y * width + x), 3 * width, src
    if mode == 0:
        code, offset, stride = decode_rgb(src, size, width, height, x, y, w, h, scratch)
        if code != OK:
            return code
        rgb = scratch.planes
    elif size != 3 * width * height:
        return OTHER_SIZE
    for row in range(h):
        out[row] = rgb[offset + row * stride:][:3 * w].reshape((w, 3))
    return OK


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
        version, fields, n = (int(header[k]) for k in ("version", "num_fields", "num_samples"))
        end = int(header["alloc_table_ptr"])
        if version != 2:
            raise self._wrong(f"its version is {version}")
        if not 1 <= fields <= 64 or n == 0 or n > self.size or end > self.size or (self.size - end) % ALLOC.itemsize:
            raise self._wrong(f"its header names {fields} fields, {n:,} samples and an allocation table at byte {end:,} "
                              f"of {self.size:,}")
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
        if self.settings and self.settings.get("checksum") != tables_checksum(samples, alloc):
            raise self._wrong("the checksum over its tables does not match")
        self._check_samples(samples[f"f{image}"], alloc, HEADER.itemsize + descriptors.nbytes + samples.nbytes, end)
        self.labels = (samples[f"f{kinds.index(1)}"] if 1 in kinds else np.zeros(n)).astype(np.int64)
        self.num_samples = n

    def _check_samples(self, images, alloc, start, end):
        """Gives every sample its size and refuses any that points outside the data (format notes: recipes, section 7)."""
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
        if not known.all():
            i = int(np.argmin(known))
            raise self._wrong(f"sample {i} ({self.widths[i]}x{self.heights[i]}, mode {self.modes[i]}) has no valid place "
                              "in it")
        self.ptrs, self.sizes = ptrs.astype(np.int64), sizes.astype(np.int64)

    def read(self, i):
        """The stored bytes of sample i."""
        data = os.pread(self.file.fileno(), int(self.sizes[i]), int(self.ptrs[i]))
        if len(data) != self.sizes[i]:
            raise DataError(f"{self.path}: sample {i}: {REASONS[SHORT_READ]}")
        return data

    def image(self, i, box=None):
        """Sample i, or its box (x, y, w, h), as uint8 (h, w, 3). DataError names the sample when it is damaged."""
        width, height = int(self.widths[i]), int(self.heights[i])
        x, y, w, h = box or (0, 0, width, height)
        if not (0 <= x and 0 <= y and 0 < w <= width - x and 0 < h <= height - y):
            raise ValueError(f"{self.path}: box {box} is not inside sample {i}, {width}x{height}")
        src, out = np.frombuffer(bytearray(self.read(i)), np.uint8), np.empty((h, w, 3), np.uint8)
        scratch = make_scratch(len(src), width, height, 8)
        code = read_rgb(src, len(src), self.modes[i], width, height, x, y, w, h, out, scratch)
        destroy_decoder(scratch.tj[0])
        if code != OK:
            raise DataError(f"{self.path}: sample {i}: {REASONS[code]}")
        return out

    def close(self):
        self.file.close()


# --- order, epochs and stages: what both loaders share
def usable_cores():
    """The cores that this process may use, shared out among torchrun's processes on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Loader:
    """Epochs of batches: which sample comes when, as a pure function of (seed, epoch), and where to resume."""

    def __init__(self, batch_size, train=True, res=224, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5,
                 crop_ratio=224 / 256, interpolation="bicubic", num_workers=0, seed=0, rank=0, world_size=1,
                 drop_last=None, device="cpu", indices=None, ahead=3):
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
        self._started, self.res, self.scale = False, None, None
        self.set_stage(res, scale)
        if len(self) == 0:
            raise DataError(f"{self.num_samples} samples on {world_size} rank(s) do not fill one batch of {batch_size}; "
                             "take a smaller batch or drop_last=False")

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
                "num_samples": self.num_samples, "res": self.res, "scale": list(self.scale)}

    def load_state_dict(self, state):
        """Makes the next iteration go on with the exact next batch. ValueError if the data or the batching differ."""
        total = self.batch_size * self.world_size
        if state["num_samples"] != self.num_samples or state["seed"] != self.seed:
            raise ValueError(f"the loader's state is of {state['num_samples']} samples with seed {state['seed']}, this "
                             f"loader has {self.num_samples} with seed {self.seed}")
        if state["samples"] % total:
            raise ValueError(f"the state is {state['samples']} samples into its epoch, which {self.world_size} rank(s) x "
                             f"batch {self.batch_size} cannot continue; take a total batch that divides it")
        self.epoch, self.batch, self._started = state["epoch"], state["samples"] // total, False
        self.set_stage(state["res"], state["scale"])

    def _positions(self):
        """This rank's positions in `indices` for self.epoch, in order; the ranks' lists interleave to the whole order."""
        if not self.train:
            return np.arange(self.rank, self.num_samples, self.world_size)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        order = order[:len(order) // self.world_size * self.world_size]  # as many for each rank
        return np.ascontiguousarray(order[self.rank::self.world_size])

    def __len__(self):
        n = self.num_samples // self.world_size
        if not self.train:
            n = len(range(self.rank, self.num_samples, self.world_size))
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self):
        if self.closed:
            raise RuntimeError("this loader is closed")
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
        self.slots, self.pinned = loader.ahead + 1, loader.device.type == "cuda"
        self.bytes = self.size * 3 * loader.res ** 2
        self.reader, self.res, self.total = reader, loader.res, len(positions)
        self.batches = len(loader)
        self.buffers, self.holders, self.views, self.granted = [], [], {}, start
        self.failure, self.wake = None, threading.Condition()
        control = np.array([start * self.size, start * self.size])
        self.job = Job(reader.file.fileno(), reader.modes, reader.widths, reader.heights, reader.ptrs, reader.sizes,
                       loader.indices[positions], positions, control, np.zeros(self.slots, np.int64),
                       np.zeros(self.slots, np.int64), np.zeros((self.slots, self.size), np.uint8), loader.train,
                       loader.res, self.size, loader.interpolation == "bicubic", loader.seed, loader.epoch,
                       loader.scale, tuple(map(float, loader.ratio)), float(loader.hflip), float(loader.crop_ratio))
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(loader.num_workers)]
        for thread in self.threads:
            thread.start()

    def _work(self):
        scratch, control = None, self.job.control
        try:
            scratch = make_scratch(int(self.reader.sizes.max()), int(self.reader.widths.max()),
                                   int(self.reader.heights.max()), self.res)
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
        slot, size = batch % self.slots, min(self.size, self.total - batch * self.size)
        with self.wake:
            while self.granted < min(self.batches, batch + self.slots):
                self._grant(self.granted)
                self.granted += 1
            self.wake.notify_all()
            while self.job.done[slot] < size and self.failure is None and self.job.control[LIMIT] >= 0:
                self.wake.wait()
        if self.failure is not None:
            raise RuntimeError(f"a loader thread on {self.reader.path} failed: {self.failure!r}") from self.failure
        if self.job.control[LIMIT] < 0:
            raise RuntimeError("the loader was closed while it was being read")
        bad = np.flatnonzero(self.job.status[slot, :size])
        if len(bad):
            sample = int(self.job.ids[batch * self.size + bad[0]])
            raise DataError(f"{self.reader.path}: sample {sample}: {REASONS[int(self.job.status[slot, bad[0]])]}. "
                             f"`python build_beton.py --verify {self.reader.path}` lists all that is wrong.")
        return torch.from_numpy(self.views.pop(batch)).view(self.size, self.res, self.res, 3)[:size].permute(0, 3, 1, 2)

    def stop(self):
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
    Raises ValueError for the arguments and DataError for the file, naming the sample where one is damaged.
    """

    def __init__(self, path, batch_size, train=True, **kwargs):
        self.reader = BetonReader(path)
        self.total, self.classes, self._runs = self.reader.num_samples, self.reader.classes, set()
        super().__init__(batch_size, train, **kwargs)

    def _host_batches(self, positions, start):
        run = _Run(self, positions, start)
        self._runs.add(run)
        try:
            labels = self.reader.labels[run.job.ids]
            for b in range(start, len(self)):
                yield run.take(b), torch.from_numpy(labels[b * run.size:(b + 1) * run.size].copy())
        finally:
            run.stop()
            self._runs.discard(run)

    def close(self):
        """Stops the threads, also of an iteration under way, and closes the file. Safe to call twice."""
        for run in list(self._runs):
            run.stop()
        self.reader.close()
        super().close()


# --- loader over a folder of pictures
class _Pictures(torch.utils.data.Dataset):
    """One epoch of an image folder: Pillow decodes the whole picture, then the same box, resize and flip as ESSLLoader."""

    def __init__(self, loader):
        self.samples, self.indices, self.train, self.res = loader.samples, loader.indices, loader.train, loader.res
        self.scale, self.ratio, self.hflip, self.crop_ratio = loader.scale, loader.ratio, loader.hflip, loader.crop_ratio
        self.seed, self.epoch, self.interpolation = loader.seed, loader.epoch, loader.interpolation
        self.transform = loader.transform

    def __getitem__(self, position):
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F
        path, label = self.samples[self.indices[position]]
        try:
            picture = default_loader(path)
        except (OSError, ValueError, SyntaxError) as e:
            raise DataError(f"{path}: cannot be decoded ({e}); remove it") from None
        if self.train:
            x, y, w, h = random_box(*picture.size, self.scale, self.ratio, self.seed, self.epoch, position)
        else:
            x, y, w, h = center_box(*picture.size, self.crop_ratio)
        picture = F.resized_crop(picture, y, x, h, w, [self.res, self.res], InterpolationMode(self.interpolation))
        if self.train and uniform(self.seed, self.epoch, position, FLIP_DRAW) < self.hflip:
            picture = F.hflip(picture)
        if self.train and self.transform:  # timm's RandAug draws from these two generators, of this worker process alone
            number = int(uniform(self.seed, self.epoch, position, FLIP_DRAW + 1) * 2 ** 32)
            random.seed(number)
            np.random.seed(number)
            picture = self.transform(picture)
        return torch.from_numpy(np.array(picture)), label


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
        super().__init__(batch_size, train, **kwargs)

    def _host_batches(self, positions, start):
        size = self.batch_size
        batches = [positions[b * size:(b + 1) * size].tolist() for b in range(start, len(self))]
        loader = torch.utils.data.DataLoader(_Pictures(self), batch_sampler=batches, num_workers=self.num_workers,
                                             pin_memory=self.device.type == "cuda", prefetch_factor=self.ahead)
        for pixels, labels in loader:
            yield pixels.permute(0, 3, 1, 2), labels
