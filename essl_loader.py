"""Turns a .beton file into batches on the device, decoding only what each crop keeps of its JPEG.

    from essl_loader import ESSLLoader
    loader = ESSLLoader("data/train_500_95.beton", batch_size=256)
    for images, labels in loader:   # uint8 (B, 3, 224, 224) in channels_last, int64 (B,)
        ...

    python essl_loader.py data/train_500_95.beton   # prints what is in a file

Needs numpy, numba, torch and libturbojpeg (`pip install turbojpeg`, or Debian's libturbojpeg0).
The kernels compile once, half a minute, into numba's cache beside this file. Reads top to bottom:
format, C library, kernels (draws, JPEG, resize, sample), reader, order, loaders, FFCV's operation.
"""
import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import operator
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
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from numba.np import arrayobj

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
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # type ids that this reader knows
MAX_PIXELS_PER_BYTE = 1024  # of a JPEG: each 8x8 block takes a bit or more


def tables_checksum(header, settings, samples, alloc):
    """crc32 over header, settings (sorted JSON, without their checksum), samples, allocations."""
    settings = {key: value for key, value in settings.items() if key != "checksum"}
    text = json.dumps(settings, sort_keys=True).encode()
    checksum = 0
    for part in (np.ravel(header), np.frombuffer(text, np.uint8), samples, alloc):
        checksum = zlib.crc32(np.ascontiguousarray(part).view(np.uint8), checksum)
    return checksum


class DataError(ValueError):
    """What is wrong with a data file or folder, where, and what to do about it, in words."""


# --- C library: libjpeg-turbo, called from the kernels without the GIL
def load_turbojpeg():
    """libjpeg-turbo as a ctypes.CDLL: the turbojpeg wheel's (version 3), else the system's (2.1).

    Raises ImportError that names both ways to get it. PyTurboJPEG, another package of the same
    import name, brings no library.
    """
    try:
        files = metadata.files("turbojpeg") or ()
    except metadata.PackageNotFoundError:
        files = ()
    wheel = [str(f.locate()) for f in files if "turbojpeg.libs/libturbojpeg" in str(f)]
    for path in wheel + ["libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib"]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise ImportError("libturbojpeg was not found: `pip install turbojpeg` brings version 3 "
                      "(preferred), `apt-get install libturbojpeg0` version 2.1; either will do.")


_bound = []


def bind():
    """Makes libjpeg-turbo's functions known to the kernels; returns the library.

    Every public entry does it; importing the file does nothing.
    """
    if not _bound:
        lib = load_turbojpeg()
        lib.tjInitDecompress.restype = ctypes.c_void_p
        for name in ("tjInitDecompress", "tjDecompress2", "tjDestroy"):
            # Under a name of our own: ffcv brings the system's copy into the process.
            address = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value
            llvmlite.binding.add_symbol("essl_" + name, address)
        _bound.append(lib)
    return _bound[0]


@contextlib.contextmanager
def kernel_cache(kernel, notice=""):
    """Holds a lock on numba's cache while `kernel` is called for the first time in this process.

    torchrun's ranks start at once, and numba's cache is not made for several that write. Numba
    renews a kernel's index before its code: a process killed in between would leave old code under
    the new index, so the code of another version of this file is removed first. The lock file
    holds the version. `notice` goes to stderr if the kernel has to be compiled.
    """
    source = Path(__file__)
    cache = Path(kernel.stats.cache_path)
    version = f"{source.stat().st_mtime_ns} {source.stat().st_size} {numba.__version__}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written is not used either
            cache.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(cache / f"{source.stem}.lock", "a+"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if lock.read() != version:
                for old in cache.glob(f"{source.stem}.*.nb[ic]"):
                    old.unlink(missing_ok=True)
                lock.truncate(0)
                lock.write(version)
                lock.flush()
        if notice and not any(cache.glob(f"{source.stem}.{kernel.__name__}-*.nbc")):
            print(notice, file=sys.stderr, flush=True)
        yield


def _c(name, restype, *argtypes):
    return types.ExternalFunction(name, restype(*argtypes))


_i32 = types.int32
_word = types.intp
pread = _c("pread", _word, _i32, _word, _word, _word)  # fd, to, size, offset
memchr = _c("memchr", _word, _word, _i32, _word)  # start, byte, size
memset = _c("memset", _word, _word, _i32, _word)  # to, byte, size
memcpy = _c("memcpy", _word, _word, _word, _word)  # to, from, size
tj_init = _c("essl_tjInitDecompress", _word)
tj_destroy = _c("essl_tjDestroy", _i32, _word)
tj_rgb = _c(  # handle, jpeg, size, to, width, pitch, height, format, flags
    "essl_tjDecompress2", _i32, _word, _word, _word, _word, _i32, _i32, _i32, _i32, _i32)
STOP_ON_WARNING = 8192  # libjpeg-turbo then fails where it would paint damaged blocks grey
COMPILING = ("essl_loader: compiling the loader's kernels, once, about 30 s; later processes load "
             "them from numba's cache.")


F = np.float32
U = np.uint64


# --- kernels: memory. Kernels take addresses, not arrays: FFCV alters numba's shared type of byte
# arrays (os_cache.py, `t1.mutable = False`), and a kernel that uses it is not found afterwards.
# Those that Python calls are marked cache=True; the cache holds them with all that they call.
def memory_access(bits):
    """Two intrinsics: load the integer of so many bits at an address, and store it there."""
    integer = ir.IntType(bits)

    @intrinsic
    def load_integer(typing_context, address):
        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[0], integer.as_pointer()), align=1)
            if bits == 64:
                return value
            return builder.sext(value, ir.IntType(64))
        return types.int64(types.intp), codegen

    @intrinsic
    def store_integer(typing_context, address, value):
        def codegen(context, builder, sig, args):
            value = args[1] if bits == 64 else builder.trunc(args[1], integer)
            builder.store(value, builder.inttoptr(args[0], integer.as_pointer()), align=1)
            return context.get_dummy_value()
        return types.none(types.intp, types.int64), codegen
    return load_integer, store_integer


load_int16, store_int16 = memory_access(16)
load_int32, store_int32 = memory_access(32)
load_int64, store_int64 = memory_access(64)


@intrinsic
def bytes_at(typing_context, address, n):
    """n bytes at an address, as an array of a type that is not the one that FFCV alters."""
    array_type = types.Array(types.uint8, 1, "C", aligned=False)

    def codegen(context, builder, signature, args):
        array = context.make_array(array_type)(context, builder)
        data = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        one = context.get_constant(types.intp, 1)
        arrayobj.populate_array(array, data, [args[1]], [one], one, None)
        return array._getvalue()
    return array_type(types.intp, types.intp), codegen


@intrinsic
def as_pointer(typing_context, address):
    """An address as the pointer that carray() wants."""
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))
    return types.voidptr(types.intp), codegen


@njit
def int64s_at(address, n):
    return carray(as_pointer(address), (n,), np.int64)


@intrinsic
def load_big_endian(typing_context, address):
    """The eight bytes at an address, aligned or not, as a big-endian number."""
    def codegen(context, builder, sig, args):
        word = builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1)
        return word if sys.byteorder == "big" else builder.bswap(word)
    return types.uint64(types.intp), codegen


@intrinsic
def load_float(typing_context, address):
    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()), align=4)
    return types.float32(types.intp), codegen


@intrinsic
def store_float(typing_context, address, value):
    def codegen(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], ir.FloatType().as_pointer()), align=4)
        return context.get_dummy_value()
    return types.none(types.intp, types.float32), codegen


@intrinsic
def atomic_add(typing_context, address, value):
    """Adds to the int64 at an address; returns what was there."""
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")
    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_swap_if(typing_context, address, expected, value):
    """Stores value in the int64 at an address if expected is there; returns what was there."""
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        pair = builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 0)
    return types.int64(types.intp, types.int64, types.int64), codegen


@njit(nogil=True, cache=True)
def atomic_load(address):
    """The int64 at an address, with all that was stored before it; for Python."""
    return atomic_add(address, 0)


@njit(nogil=True, cache=True)
def atomic_store(address, value):
    """Publishes an int64 at an address after all that was stored before it; for Python."""
    before = atomic_add(address, 0)
    while atomic_swap_if(address, before, value) != before:
        before = atomic_add(address, 0)


# --- vectors: a numba type over LLVM's, so that one expression works on 8 to 32 numbers at once
# LLVM does not vectorise these loops well by itself (16-bit products, transposes, packing). Written
# as LLVM's generic operations, the same source compiles for x86 and ARM.
class Vector(types.Type):
    """`lanes` numbers of one LLVM type."""

    def __init__(self, element, lanes):
        self.ir_type = ir.VectorType(element, lanes)
        super().__init__(f"Vector({self.ir_type})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.ir_type)


I8x32 = Vector(ir.IntType(8), 32)
I16x8 = Vector(ir.IntType(16), 8)
I16x16 = Vector(ir.IntType(16), 16)
I32x8 = Vector(ir.IntType(32), 8)
F32x8 = Vector(ir.FloatType(), 8)


@infer_global(operator.add)
@infer_global(operator.iadd)
@infer_global(operator.sub)
@infer_global(operator.mul)
@infer_global(operator.and_)
@infer_global(operator.or_)
@infer_global(operator.xor)
@infer_global(operator.lshift)
@infer_global(operator.rshift)
class VectorOperator(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
            return signature(args[0], *args)


def lower_operator(operation, integer, floating=None):
    """Tells numba which of llvmlite's instructions an operator of two vectors is."""
    @lower_builtin(operation, Vector, Vector)
    def lower(context, builder, sig, args):
        if sig.return_type == F32x8:
            return getattr(builder, floating)(*args, flags=("contract",))  # may become an FMA
        return getattr(builder, integer)(*args)


lower_operator(operator.add, "add", "fadd")
lower_operator(operator.iadd, "add", "fadd")
lower_operator(operator.sub, "sub", "fsub")
lower_operator(operator.mul, "mul", "fmul")
lower_operator(operator.and_, "and_")
lower_operator(operator.or_, "or_")
lower_operator(operator.xor, "xor")
lower_operator(operator.lshift, "shl")
lower_operator(operator.rshift, "ashr")


def shuffle(builder, a, b, lanes):
    """LLVM's shufflevector: lanes of a followed by b."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(a, b, mask)


def splat_value(builder, scalar, ir_type):
    vector = builder.insert_element(ir.Constant(ir_type, ir.Undefined), scalar,
                                    ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, vector, vector, [0] * ir_type.count)


@intrinsic
def load(typing_context, kind, address):
    """The vector of a kind at an address, aligned or not."""
    vector = kind.instance_type

    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[1], vector.ir_type.as_pointer()), align=1)
    return vector(kind, types.intp), codegen


@intrinsic
def store(typing_context, address, vector):
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], vector.ir_type.as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()
    return types.none(types.intp, vector), codegen


@intrinsic
def splat(typing_context, kind, number):
    """A vector of a kind with a number, int64 or float32, in every lane."""
    vector = kind.instance_type
    scalar = types.float32 if vector == F32x8 else types.int64

    def codegen(context, builder, sig, args):
        value = args[1]
        if vector != F32x8:
            value = builder.trunc(value, vector.ir_type.element)
        return splat_value(builder, value, vector.ir_type)
    return vector(kind, scalar), codegen


@intrinsic
def reinterpret(typing_context, kind, vector):
    """The same bits as a vector of another kind."""
    def codegen(context, builder, sig, args):
        return builder.bitcast(args[1], kind.instance_type.ir_type)
    return kind.instance_type(kind, vector), codegen


@intrinsic
def to_floats(typing_context, vector):
    """Eight int16 as float32."""
    def codegen(context, builder, sig, args):
        return builder.sitofp(builder.sext(args[0], I32x8.ir_type), F32x8.ir_type)
    return F32x8(vector), codegen


@intrinsic
def multiply_high(typing_context, a, b):
    """(a * b) >> 16 of int16: one instruction on x86."""
    def codegen(context, builder, sig, args):
        wide = ir.VectorType(ir.IntType(32), a.ir_type.count)
        product = builder.mul(builder.sext(args[0], wide), builder.sext(args[1], wide))
        sixteen = ir.Constant(wide, [16] * wide.count)
        return builder.trunc(builder.ashr(product, sixteen), a.ir_type)
    return a(a, b), codegen


def call_llvm(builder, name, return_type, *args):
    function_type = ir.FunctionType(return_type, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, (), function_type), args)


def clamp_value(builder, value):
    """Integers within -128 and 127: before a truncation LLVM makes it a saturating pack."""
    suffix = f"v{value.type.count}i{value.type.element.width}"
    for name, bound in (("smax", -128), ("smin", 127)):
        bounds = ir.Constant(value.type, [bound] * value.type.count)
        value = call_llvm(builder, f"llvm.{name}.{suffix}", value.type, value, bounds)
    return value


@intrinsic
def clamp_to_byte(typing_context, vector):
    """Each lane of int16 within -128 and 127."""
    def codegen(context, builder, sig, args):
        return clamp_value(builder, args[0])
    return vector(vector), codegen


@intrinsic
def zip_low(typing_context, a, b):
    """Of each 16 bytes of a and b: the first eight, alternating."""
    lanes = [half + i // 2 + 32 * (i % 2) for half in (0, 16) for i in range(16)]

    def codegen(context, builder, sig, args):
        return shuffle(builder, *args, lanes)
    return a(a, b), codegen


@intrinsic
def zip_high(typing_context, a, b):
    """Of each 16 bytes of a and b: the last eight, alternating."""
    lanes = [half + 8 + i // 2 + 32 * (i % 2) for half in (0, 16) for i in range(16)]

    def codegen(context, builder, sig, args):
        return shuffle(builder, *args, lanes)
    return a(a, b), codegen


@intrinsic
def store_halves(typing_context, address, distance, vector):
    """Stores 16 of 32 bytes at an address, and the others at a distance from it."""
    def codegen(context, builder, sig, args):
        for half, at in ((0, args[0]), (1, builder.add(args[0], args[1]))):
            value = shuffle(builder, args[2], args[2], range(16 * half, 16 * half + 16))
            builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=1)
        return context.get_dummy_value()
    return types.none(types.intp, types.intp, vector), codegen


@intrinsic
def store_rounded(typing_context, address, a, b, c, d):
    """Stores four vectors of eight float32 as 32 int8, rounded and saturated."""
    def codegen(context, builder, sig, args):
        ab = shuffle(builder, args[1], args[2], range(16))
        cd = shuffle(builder, args[3], args[4], range(16))
        floats = shuffle(builder, ab, cd, range(32))
        wide = ir.VectorType(ir.IntType(32), 32)
        numbers = call_llvm(builder, "llvm.lrint.v32i32.v32f32", wide, floats)
        numbers = builder.trunc(clamp_value(builder, numbers), I8x32.ir_type)
        pointer = builder.inttoptr(args[0], I8x32.ir_type.as_pointer())
        builder.store(numbers, pointer, align=1)
        return context.get_dummy_value()
    return types.none(types.intp, a, b, c, d), codegen


@intrinsic
def store_interleaved(typing_context, address, r, g, b):
    """Stores three vectors of 32 bytes as 32 pixels of three bytes."""
    def codegen(context, builder, sig, args):
        for half in range(2):
            parts = [shuffle(builder, v, v, range(16 * half, 16 * half + 16)) for v in args[1:]]
            for i in range(3):  # 16 bytes each: two of the three at a time, for byte shuffles
                places = range(16 * i, 16 * i + 16)
                rg = shuffle(builder, *parts[:2], [k // 3 + 16 * (k % 3 == 1) for k in places])
                lanes = [k // 3 + 16 if k % 3 == 2 else k - 16 * i for k in places]
                rgb = shuffle(builder, rg, parts[2], lanes)
                at = builder.add(args[0], ir.Constant(ir.IntType(64), 48 * half + 16 * i))
                builder.store(rgb, builder.inttoptr(at, rgb.type.as_pointer()), align=1)
        return context.get_dummy_value()
    return types.none(types.intp, r, g, b), codegen


# --- kernels: random draws. Reference: torchvision's RandomResizedCrop.get_params, in distribution
@njit(nogil=True, cache=True)
def uniform(seed, epoch, index, draw):
    """The draw-th number in [0, 1) of sample `index` in `epoch`: splitmix64 over the four."""
    z = np.uint64(seed)
    for word in (np.uint64(epoch), np.uint64(index), np.uint64(draw)):
        z = (z ^ word) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0 ** -53


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
OK, SHORT_READ, BROKEN, OTHER_SIZE, UNKNOWN = range(5)
REASONS = {
    SHORT_READ: "the file ends inside it",
    BROKEN: "its JPEG data are damaged",
    OTHER_SIZE: "its JPEG header and the file's table give different sizes",
    UNKNOWN: "its kind of JPEG cannot be decoded to RGB"}
# What parse_jpeg finds. MCU = the 8x8 to 16x16 pixels whose blocks of all components JPEG stores
# together. QUANT, DC, AC: the table of each of three components. TABLES: a bit for each table
# that the file defines.
HEIGHT, WIDTH, COMPONENTS, H_SAMP, V_SAMP, INTERVAL, SCAN, TABLES = range(8)
QUANT = 8
DC = 11
AC = 14
BIT_END_NOW = 17  # of the interval that is being decoded
CLEAN_END = 18  # of what was unstuffed
INFO_SIZE = 19
PREFIX = 11  # bits that one look-up decodes: larger tables take longer to build than they save
PREFIXES = 1 << PREFIX
TABLE = 4 * (PREFIXES + 320)  # bytes of a Huffman table: entries, 20 limits, 20 offsets, symbols
LIMITS = 4 * PREFIXES
OFFSETS = LIMITS + 80
SYMBOLS = OFFSETS + 80
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
def signed(v, size):
    """The value of `size` magnitude bits: ITU-T T.81, F.2.2.1 (EXTEND)."""
    if size == 0 or v >> (size - 1):
        return v
    return v - (1 << size) + 1


@njit
def fill_entries(table, first, count, entry):
    for i in range(first, first + count):
        store_int32(table + 4 * i, entry)


@njit
def build_table(src, at, dc, table):
    """Huffman table (ITU-T T.81, annex C) from its 16 counts and symbols at src[at].

    An entry of 32 bits for the next PREFIX bits: value << 16 | (zeros before it + 1) << 8 | bits of
    code and value. Where they are more than PREFIX, symbol << 24 | bits of the code << 16 |
    ESCAPE << 8; and those bits are 0 where even the code is longer: then limits, offsets and
    symbols tell. All entries of a DC table are of the second kind. Returns False if it is not one.
    """
    fill_entries(table, 0, PREFIXES, ESCAPE << 8)
    code = 0
    n = 0
    for length in range(1, 17):
        count = np.int64(src[at + length - 1])
        store_int32(table + OFFSETS + 4 * length, n - code)
        if code + count > 1 << length or n + count > 256:
            return False
        for _ in range(count):
            symbol = np.int64(src[at + 16 + n])
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
                    entry = signed(v, size) << 16 | zeros << 8 | (length + size)
                    first = (code << free) + (v << (free - size))
                    fill_entries(table, first, 1 << (free - size), entry)
            n += 1
            code += 1
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
def parse_jpeg(src, size, info, tables, quants):
    """Reads a baseline JPEG's header and tables; returns a code of REASONS.

    UNKNOWN: it takes libjpeg-turbo (progressive, CMYK, ...). tables, quants: addresses of four
    each. A quantisation step is stored with the inverse DCT's scale factors, float32, in natural
    order.
    """
    info[:] = 0
    rgb = False
    names = 0
    i = 2
    if size < 4 or src[0] != 0xFF or src[1] != 0xD8:
        return BROKEN
    while i + 4 <= size:
        marker = src[i + 1]
        length = (src[i + 2] << 8) + src[i + 3]
        p = i + 4
        end = i + 2 + length
        if src[i] != 0xFF or length < 2 or end > size:
            return BROKEN
        if marker == 0xDB:  # quantisation tables, of bytes or words
            while p < end:
                wide = src[p] >> 4
                t = src[p] & 3
                if wide > 1 or p + 65 + 64 * wide > end:
                    return BROKEN
                for k in range(64):
                    q = p + 1 + k + wide * k
                    step = src[q] if wide == 0 else (src[q] << 8) + src[q + 1]
                    natural = ZIGZAG[k]
                    scale = AAN[natural >> 3] * AAN[natural & 7] / 8
                    store_float(quants + 256 * t + 4 * natural, F(step * scale))
                info[TABLES] |= 16 << t
                p += 65 + 64 * wide
        elif marker == 0xC4:  # Huffman tables
            while p + 17 <= end:
                t = (src[p] >> 4 << 1) + (src[p] & 1)
                n = 0
                for k in range(16):
                    n += src[p + 1 + k]
                if src[p] & 0xEE:
                    return UNKNOWN
                if p + 17 + n > end or not build_table(src, p + 1, t < 2, tables + TABLE * t):
                    return BROKEN
                info[TABLES] |= 1 << t
                p += 17 + n
        elif 0xC0 <= marker <= 0xCF and marker != 0xC8 and marker != 0xCC:  # SOF: size, sampling
            n = np.int64(src[i + 9]) if length >= 8 else 0
            if n == 0 or length < 8 + 3 * n:
                return BROKEN
            info[HEIGHT] = (src[i + 5] << 8) + src[i + 6]
            info[WIDTH] = (src[i + 7] << 8) + src[i + 8]
            if marker > 0xC1 or src[p] != 8 or (n != 1 and n != 3):
                return UNKNOWN
            info[COMPONENTS] = n
            info[H_SAMP] = src[i + 11] >> 4
            info[V_SAMP] = src[i + 11] & 15
            if n == 1:
                info[H_SAMP] = 1
                info[V_SAMP] = 1
            elif src[i + 14] != 0x11 or src[i + 17] != 0x11:
                return UNKNOWN
            if not (1 <= info[H_SAMP] <= 2 and 1 <= info[V_SAMP] <= 2):
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
            info[SCAN] = end
            n = info[COMPONENTS]
            scan_names = 0
            if n == 0 or length < 6 + 2 * n or src[p] != n or (rgb and n == 3):
                return UNKNOWN
            for c in range(n):
                scan_names = scan_names << 8 | src[p + 1 + 2 * c]
                info[DC + c] = src[p + 2 + 2 * c] >> 4
                info[AC + c] = 2 + (src[p + 2 + 2 * c] & 15)
                needed = 16 << info[QUANT + c] | 1 << info[DC + c] | 1 << info[AC + c]
                if info[DC + c] > 1 or info[AC + c] > 3 or info[TABLES] & needed != needed:
                    return BROKEN
            return OK if names == scan_names else UNKNOWN
        i = end
    return BROKEN


@njit
def find_intervals(src, size, info, starts, needed):
    """Offsets of the first `needed` restart intervals, and of what follows the last one's marker.

    Returns how many there are up to there, -1 where the markers are not in sequence.
    """
    base = src.ctypes.data
    i = info[SCAN]
    n = 0
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


@njit
def unstuff(src, start, end, clean):
    """Copies entropy-coded data without the zero that JPEG puts behind each 0xFF; the size."""
    base = src.ctypes.data
    o = 0
    while start < end:
        found = memchr(base + start, 0xFF, end - start)
        n = end - start if found == 0 else found - base - start + 1
        memcpy(clean + o, base + start, n)
        o += n
        start += n + 1
    return o


@intrinsic
def unlikely(typing_context, condition):
    """A condition that LLVM should keep out of the way: what it leads to spills the registers."""
    def codegen(context, builder, sig, args):
        bit = ir.IntType(1)
        return call_llvm(builder, "llvm.expect.i1", bit, args[0], ir.Constant(bit, 0))
    return types.boolean(types.boolean), codegen


# A stream decodes one interval after the other. Its state between calls, in 64-bit words: DC
# predictors of three components, bit position, coefficient's number << 8, place, end of its places,
# end of its bits, bits that may be left there, where its coefficients begin.
DC_PREDICTOR = 0
POSITION, COUNT, PLACE, PLACE_END, BIT_END, SLACK, ORIGIN = range(24, 80, 8)
STREAM_SIZE = 128
# A place is where a block of the row goes, in 64-bit words: offset of its coefficients, addresses
# of its tables, offset of its DC predictor.
PLACE_SIZE = 32
# A unit is what a stream takes next, in 64-bit words: first bit, end of the bits, first place, end
# of the places, origin of the coefficients, bits that may be left. One that is CONTINUED goes on
# where its stream stands.
UNIT_SIZE = 48
CONTINUED = -1
BLOCK_DONE = 63 << 8  # a count from here on is the end of a block, an escape, or damage
NO_MORE = 0
DAMAGED = -1


@njit(forceinline=True)
def bits_at(position):
    """The next 57 bits or more, from an absolute bit position, at the top of a word."""
    return load_big_endian(position >> 3) << U(position & 7)


@njit(forceinline=True)
def next_unit(stream, units):
    """Takes a unit from the list (its first word: next, its second: end); False if none is left."""
    unit = load_int64(units)
    if unit == load_int64(units + 8):
        return False
    store_int64(units, unit + UNIT_SIZE)
    if load_int64(unit) != CONTINUED:
        store_int64(stream + POSITION, load_int64(unit))
        for component in range(3):
            store_int64(stream + DC_PREDICTOR + 8 * component, 0)
    store_int64(stream + BIT_END, load_int64(unit + 8))
    store_int64(stream + PLACE, load_int64(unit + 16))
    store_int64(stream + PLACE_END, load_int64(unit + 24))
    store_int64(stream + ORIGIN, load_int64(unit + 32))
    store_int64(stream + SLACK, load_int64(unit + 40))
    return True


@njit(forceinline=True)
def long_symbol(entry, word, table):
    """(bits, symbol) of an ESCAPE entry; 0 bits if there is no such code."""
    length = (entry >> 16) & 255
    if length:
        return length, (entry >> 24) & 255
    return long_code(word, table)


@njit(forceinline=True)
def start_block(stream, position, place):
    """Decodes the DC coefficient of the block of a place: ITU-T T.81, F.2.2.1.

    Returns (word, position, count, AC table, coefficients, place); count is -1 for damage.
    """
    table = load_int64(place + 8)
    word = bits_at(position)
    entry = load_int32(table + (np.int64(word >> U(64 - PREFIX)) << 2))
    length, size = long_symbol(entry, word, table)
    word <<= U(length)
    value = signed(np.int64((word >> U(1)) >> U(63 - size)), size)
    predictor = stream + DC_PREDICTOR + load_int64(place + 24)
    value += load_int64(predictor)
    store_int64(predictor, value)
    coefs = load_int64(stream + ORIGIN) + load_int64(place)
    store_int16(coefs, value)
    position += length + size
    return bits_at(position), position, 0 if length else -1, load_int64(place + 16), coefs, place


@njit(forceinline=True)
def after_symbol(stream, units, zigzag, entry, position, count, table, coefs, place):
    """What follows a symbol that is an escape or ends its block; returns as start_block does.

    place is NO_MORE when no unit is left and DAMAGED when the data are wrong.
    """
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
            value = signed(np.int64((word << U(length)) >> U(64 - size)), size)
            store_int16(coefs + load_int64(zigzag + 8 * k), value)
        if length == 0:
            k = 64
        if k < 63:
            return bits_at(position), position, k << 8, table, coefs, place
    over = position - load_int64(stream + BIT_END)
    if 63 < k < END_OF_BLOCK or over > 0:
        return U(0), position, 0, table, coefs, DAMAGED
    place += PLACE_SIZE
    if place == load_int64(stream + PLACE_END):
        if over < -load_int64(stream + SLACK):
            return U(0), position, 0, table, coefs, DAMAGED
        if not next_unit(stream, units):
            return U(0), position, 0, table, coefs, NO_MORE
        position = load_int64(stream + POSITION)
        place = load_int64(stream + PLACE)
    word, position, count, table, coefs, place = start_block(stream, position, place)
    if count < 0:
        place = DAMAGED
    return word, position, 0, table, coefs, place


@njit
def decode_single(stream, units, zigzag):
    """Decodes what a stream is at, and all units left, on its own; OK or BROKEN."""
    position = load_int64(stream + POSITION)
    place = load_int64(stream + PLACE)
    count = load_int64(stream + COUNT)
    table = load_int64(place + 16)
    coefs = load_int64(stream + ORIGIN) + load_int64(place)
    word = bits_at(position)
    while True:
        for _ in range(5):
            entry = load_int32(table + (np.int64(word >> U(64 - PREFIX)) << 2))
            word <<= U(entry & 63)
            count += entry & 0xFFFF
            store_int16(coefs + load_int64(zigzag + (count >> 8 << 3)), entry >> 16)
            if unlikely(count >= BLOCK_DONE):
                word, position, count, table, coefs, place = after_symbol(
                    stream, units, zigzag, entry, position, count, table, coefs, place)
                if place <= NO_MORE:
                    store_int64(stream + POSITION, position)
                    return OK if place == NO_MORE else BROKEN
        position += count & 255
        count &= -256
        word = bits_at(position)


@njit
def save_stream(stream, position, count, place):
    store_int64(stream + POSITION, position + (count & 255))
    store_int64(stream + COUNT, count & -256)
    store_int64(stream + PLACE, place)


@njit
def decode_units(streams, units, zigzag, parallel):
    """Decodes all units of a list to coefficients: ITU-T T.81, annex F; OK or BROKEN.

    Two streams take turns symbol by symbol, so that the latency of one's look-up hides behind the
    other's; not parallel where units continue one another. A refill lasts for five symbols. The
    zigzag table has 256 rows: those that are no coefficient lead to a place for trash, so that the
    store comes before the test. Reads at most 250 bytes behind an interval. Reference:
    libjpeg-turbo; about 180 us for a crop of 278 x 278.
    """
    one = streams
    two = streams + STREAM_SIZE
    if not next_unit(one, units):
        return OK
    word1, position1, count1, table1, coefs1, place1 = start_block(
        one, load_int64(one + POSITION), load_int64(one + PLACE))
    if count1 < 0:
        return BROKEN
    if not parallel or not next_unit(two, units):
        save_stream(one, position1, count1, place1)
        return decode_single(one, units, zigzag)
    word2, position2, count2, table2, coefs2, place2 = start_block(
        two, load_int64(two + POSITION), load_int64(two + PLACE))
    if count2 < 0:
        return BROKEN
    while True:
        for _ in range(5):
            entry = load_int32(table1 + (np.int64(word1 >> U(64 - PREFIX)) << 2))
            word1 <<= U(entry & 63)
            count1 += entry & 0xFFFF
            store_int16(coefs1 + load_int64(zigzag + (count1 >> 8 << 3)), entry >> 16)
            if unlikely(count1 >= BLOCK_DONE):
                word1, position1, count1, table1, coefs1, place1 = after_symbol(
                    one, units, zigzag, entry, position1, count1, table1, coefs1, place1)
                if place1 <= NO_MORE:
                    if place1 == DAMAGED:
                        return BROKEN
                    save_stream(two, position2, count2, place2)
                    return decode_single(two, units, zigzag)
            entry = load_int32(table2 + (np.int64(word2 >> U(64 - PREFIX)) << 2))
            word2 <<= U(entry & 63)
            count2 += entry & 0xFFFF
            store_int16(coefs2 + load_int64(zigzag + (count2 >> 8 << 3)), entry >> 16)
            if unlikely(count2 >= BLOCK_DONE):
                word2, position2, count2, table2, coefs2, place2 = after_symbol(
                    two, units, zigzag, entry, position2, count2, table2, coefs2, place2)
                if place2 <= NO_MORE:
                    if place2 == DAMAGED:
                        return BROKEN
                    save_stream(one, position1, count1, place1)
                    return decode_single(one, units, zigzag)
        position1 += count1 & 255
        count1 &= -256
        word1 = bits_at(position1)
        position2 += count2 & 255
        count2 &= -256
        word2 = bits_at(position2)


@njit(forceinline=True)
def inverse_dct_8(a0, a1, a2, a3, a4, a5, a6, a7):
    """Inverse DCT of eight scaled values: Arai, Agui and Nakajima (Pennebaker, Mitchell, 4.4.3)."""
    root2 = splat(F32x8, F(1.414213562))
    e0 = a0 + a4
    e1 = a0 - a4
    e3 = a2 + a6
    e2 = (a2 - a6) * root2 - e3
    b0 = e0 + e3
    b3 = e0 - e3
    b1 = e1 + e2
    b2 = e1 - e2
    z13 = a5 + a3
    z10 = a5 - a3
    z11 = a1 + a7
    z12 = a1 - a7
    c7 = z11 + z13
    z5 = (z10 + z12) * splat(F32x8, F(1.847759065))
    c6 = z5 - z10 * splat(F32x8, F(2.613125930)) - c7
    c5 = (z11 - z13) * root2 - c6
    c4 = z5 - z12 * splat(F32x8, F(1.082392200)) - c5
    return b0 + c7, b1 + c6, b2 + c5, b3 + c4, b3 - c4, b2 - c5, b1 - c6, b0 - c7


@njit(forceinline=True)
def dequantised(coefs, quants, k):
    """Coefficient k of eight blocks, as float32."""
    return to_floats(load(I16x8, coefs + 16 * k)) * splat(F32x8, load_float(quants + 4 * k))


@njit
def inverse_dct(coefs, quants, work, to, stride):
    """Eight blocks' coefficients to 8 rows of 64 samples, int8 (level - 128).

    Each vector holds one coefficient of the eight blocks, so nothing is transposed: column c of
    block b lands at 8 * c + b of its row. Reference: libjpeg-turbo's accurate integer transform, to
    one level; 0.13 us.
    """
    for c in range(8):
        v = inverse_dct_8(
            dequantised(coefs, quants, c), dequantised(coefs, quants, c + 8),
            dequantised(coefs, quants, c + 16), dequantised(coefs, quants, c + 24),
            dequantised(coefs, quants, c + 32), dequantised(coefs, quants, c + 40),
            dequantised(coefs, quants, c + 48), dequantised(coefs, quants, c + 56))
        at = work + 32 * c
        store(at, v[0])
        store(at + 256, v[1])
        store(at + 512, v[2])
        store(at + 768, v[3])
        store(at + 1024, v[4])
        store(at + 1280, v[5])
        store(at + 1536, v[6])
        store(at + 1792, v[7])
    for r in range(8):
        at = work + 256 * r
        v = inverse_dct_8(
            load(F32x8, at), load(F32x8, at + 32), load(F32x8, at + 64), load(F32x8, at + 96),
            load(F32x8, at + 128), load(F32x8, at + 160), load(F32x8, at + 192),
            load(F32x8, at + 224))
        store_rounded(to + r * stride, v[0], v[1], v[2], v[3])
        store_rounded(to + r * stride + 32, v[4], v[5], v[6], v[7])


# One thread's memory: addresses, and how many interval starts fit. A plane's row in `plane`: its
# address, stride, first column and row, pixels that a sample is wide and high, whether its columns
# lie as inverse_dct leaves them.
Scratch = namedtuple("Scratch", (
    "raw clean starts info plane tables quants zigzag streams units places coefs work planes split "
    "rows filters_x filters_y first_x first_y a b resized end num_starts"))
ADDRESS, STRIDE, LEFT, TOP, STEP_X, STEP_Y, BY_GROUPS = range(7)
PLANE_SIZE = 7


@njit
def planes_at(address):
    return carray(as_pointer(address), (3, PLANE_SIZE), np.int64)




@njit(nogil=True, cache=True)
def lay_out_scratch(memory, max_bytes, max_width, max_height, max_area, res):
    """Scratch at an address, for samples of at most these bytes, sides and pixels; end: its end."""
    out = (res + 31) // 32 * 32
    wide = (max_width + 16 + 63) // 64 * 64 + 64
    tall = max_height + 64
    side = max(wide, tall)
    area = max_area + 144 * max_height + 64 * max_width + 16384  # MCUs and groups that stick out
    num_starts = max_area // 64 + max_width + max_height + 64
    mcus = max_width // 8 + 16
    filters = 4 * (4 * side + 16 * res + 64)
    sizes = (max_bytes + 64, max_bytes + 8192, 8 * num_starts, 8 * INFO_SIZE, 24 * PLANE_SIZE,
             4 * TABLE, 4 * 256, 8 * 256, 2 * STREAM_SIZE, UNIT_SIZE * (2 * mcus + 64),
             PLACE_SIZE * 6 * mcus, GROUP * (6 * (mcus // 8 + 2) + 2), 2048, 3 * area, 3 * area,
             8 * side, filters, filters, 8 * res, 8 * res, out * side + 4096, out * side + 4096,
             3 * out * out + 4096)
    at = np.zeros(24, np.int64)
    at[0] = memory
    for i in range(23):
        at[i + 1] = at[i] + (sizes[i] + 63) // 64 * 64
    return Scratch(at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10],
                   at[11], at[12], at[13], at[14], at[15], at[16], at[17], at[18], at[19], at[20],
                   at[21], at[22], at[23], num_starts)


def make_scratch(sizes, widths, heights, res):
    """(memory, Scratch in it) for samples of these bytes, widths and heights; binds the library."""
    bind()
    largest = [int(a.max()) for a in (sizes, widths, heights, widths * heights)]
    nbytes = lay_out_scratch(0, *largest, res).end
    memory = np.empty(nbytes // 8 + 8, np.int64)
    return memory, lay_out_scratch((memory.ctypes.data + 63) // 64 * 64, *largest, res)


@njit
def list_places(info, first, last, col0, col1, scratch):
    """Where the blocks of a row's MCUs first to last go; those outside col0 to col1 into the trash.

    Returns the bytes of a row's coefficients: the groups of luma, of Cb, of Cr, and of trash.
    """
    across = info[H_SAMP]
    down = info[V_SAMP]
    luma_groups = ((col1 - col0) * across + 7) // 8
    chroma_groups = (col1 - col0 + 7) // 8
    trash = (luma_groups * down + 2 * chroma_groups) * GROUP
    place = scratch.places
    for column in range(first, last):
        seen = col0 <= column < col1
        for c in range(info[COMPONENTS]):
            for v in range(down if c == 0 else 1):
                for h in range(across if c == 0 else 1):
                    block = column - col0
                    group = luma_groups * down + (c - 1) * chroma_groups
                    if c == 0:
                        block = block * across + h
                        group = luma_groups * v
                    offset = (group + (block >> 3)) * GROUP + 2 * (block & 7)
                    store_int64(place, offset if seen else trash)
                    store_int64(place + 8, scratch.tables + TABLE * info[DC + c])
                    store_int64(place + 16, scratch.tables + TABLE * info[AC + c])
                    store_int64(place + 24, 8 * c)
                    place += PLACE_SIZE
    return trash + GROUP


@njit
def list_units(src, info, scratch, row, across, total, first, last, parallel):
    """The units of a row's MCUs first to last, and their intervals' data without stuffing."""
    starts = int64s_at(scratch.starts, scratch.num_starts)
    k = info[INTERVAL] if info[INTERVAL] > 0 else total
    blocks = info[H_SAMP] * info[V_SAMP] + info[COMPONENTS] - 1
    unit = scratch.units + 16
    clean = scratch.clean if parallel else info[CLEAN_END]  # a long interval is still needed
    column = first
    while column < last:
        mcu = row * across + column
        number = mcu // k
        stop = min(column + k - mcu % k, last)  # the row's end or the interval's
        ends = mcu + stop - column == min((number + 1) * k, total)
        store_int64(unit, CONTINUED)
        if mcu % k == 0:
            start = starts[number]
            n = unstuff(src, start, starts[number + 1] - 2, clean)
            store_int64(unit, 8 * clean)
            clean += n
            info[BIT_END_NOW] = 8 * clean
        store_int64(unit + 8, info[BIT_END_NOW])
        store_int64(unit + 16, scratch.places + PLACE_SIZE * blocks * (column - first))
        store_int64(unit + 24, scratch.places + PLACE_SIZE * blocks * (stop - first))
        store_int64(unit + 32, scratch.coefs)
        store_int64(unit + 40, 7 if ends else 1 << 60)  # an interval ends within a byte
        unit += UNIT_SIZE
        column = stop
    info[CLEAN_END] = clean
    store_int64(scratch.units, scratch.units + 16)
    store_int64(scratch.units + 8, unit)


@njit
def row_to_planes(info, plane, row, scratch):
    """One MCU row's coefficients become samples of the planes."""
    coefs = scratch.coefs
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
def parse_sample(address, size, width, height, scratch):
    """Reads a JPEG's header, which should give this size; a code of REASONS."""
    info = int64s_at(scratch.info, INFO_SIZE)
    code = parse_jpeg(bytes_at(address, size), size, info, scratch.tables, scratch.quants)
    for k in range(256):
        store_int64(scratch.zigzag + 8 * k, 16 * ZIGZAG[k] if k < 64 else GROUP - 16)
    if code != BROKEN and (info[WIDTH] != width or info[HEIGHT] != height):
        return OTHER_SIZE if info[HEIGHT] > 0 else BROKEN
    return code


@njit
def decode_box(address, size, width, height, x, y, w, h, scratch):
    """Decodes the MCUs that the box touches to Y, Cb, Cr planes; the header was read.

    Fills the rows of scratch.plane. Where restart intervals divide the rows, only the intervals
    that the box touches are decoded; else all that lies before its end. Returns a code of REASONS.
    Reference: libjpeg-turbo's planes of the whole picture.
    """
    src = bytes_at(address, size)
    info = int64s_at(scratch.info, INFO_SIZE)
    plane = planes_at(scratch.plane)
    mcu_w = 8 * info[H_SAMP]
    mcu_h = 8 * info[V_SAMP]
    across = (width + mcu_w - 1) // mcu_w
    total = across * ((height + mcu_h - 1) // mcu_h)
    row0 = y // mcu_h
    row1 = (y + h + mcu_h - 1) // mcu_h
    col0 = x // mcu_w
    col1 = (x + w + mcu_w - 1) // mcu_w
    k = info[INTERVAL]
    parallel = k > 0 and across % k == 0
    first_row = row0 if parallel else 0
    first = col0 // k * k if parallel else 0
    last = col1 if parallel else across
    k = k if k > 0 else total
    needed = ((row1 - 1) * across + last + k - 1) // k
    if needed >= scratch.num_starts:
        return OTHER_SIZE
    starts = int64s_at(scratch.starts, scratch.num_starts)
    if find_intervals(src, size, info, starts, needed) != needed:
        return BROKEN
    at = scratch.planes
    for c in range(info[COMPONENTS]):
        p = plane[c]
        p[STEP_X] = 1 if c == 0 else info[H_SAMP]
        p[STEP_Y] = 1 if c == 0 else info[V_SAMP]
        p[ADDRESS] = at
        p[STRIDE] = ((col1 - col0) * mcu_w // p[STEP_X] + 63) // 64 * 64
        p[LEFT] = col0 * mcu_w
        p[TOP] = row0 * mcu_h
        p[BY_GROUPS] = 1
        at += p[STRIDE] * (row1 - row0) * mcu_h // p[STEP_Y]
    info[CLEAN_END] = scratch.clean
    row_bytes = list_places(info, first, last, col0, col1, scratch)
    for row in range(first_row, row1):
        memset(scratch.coefs, 0, row_bytes)
        list_units(src, info, scratch, row, across, total, first, last, parallel)
        code = decode_units(scratch.streams, scratch.units, scratch.zigzag, parallel)
        if code != OK:
            return code
        if row >= row0:
            row_to_planes(info, plane, row - row0, scratch)
    return OK


@njit(nogil=True, cache=True)
def decode_planes(address, size, width, height, x, y, w, h, scratch):
    """A JPEG's header and the box's planes: see decode_box. For tests."""
    code = parse_sample(address, size, width, height, scratch)
    if code != OK:
        return code
    return decode_box(address, size, width, height, x, y, w, h, scratch)


# --- kernels: antialiased resize. Reference: Pillow's resize of the crop, plane by plane
@njit(forceinline=True)
def filter_value(d, bicubic):
    """The triangle, or Keys' cubic with a = -0.5, at distance d >= 0; without branches."""
    if not bicubic:
        return max(F(0), F(1) - d)
    near = (F(1.5) * d - F(2.5)) * d * d + F(1)
    far = ((F(2.5) - F(0.5) * d) * d - F(4)) * d + F(2)
    far = far if d < F(2) else F(0)
    return near if d < F(1) else far


@njit
def count_pixels(size, out, bicubic):
    """The most pixels that one output pixel is made of."""
    return int(math.ceil((4.0 if bicubic else 2.0) * max(size / out, 1.0))) + 1


@njit
def count_taps(size, out, bicubic, step):
    """The most samples that filter_weights asks for."""
    pixels = count_pixels(size, out, bicubic)
    return pixels if step == 1 else pixels // 2 + 3


@njit
def filter_weights(box0, box1, out, bicubic, step, low, high, first, taps, filters):
    """Filter coefficients for one axis, in 1/16384, for filter_rows.

    Output i sums `taps` samples from first[i] on: Pillow's coefficients for the box in pixels. At
    step 2 the samples are half-size chroma, and the weights are those of libjpeg-turbo's triangle
    upsampling and then the resize, in one. Samples outside low..high are not used. filters[i]: a
    bias, and the weights, each int16 twice in an int32. Reference: Pillow's resize; 5 us.
    """
    scale = (box1 - box0) / out
    narrower = min(1.0 / scale, 1.0)
    support = (2.0 if bicubic else 1.0) / narrower
    pixels = count_pixels(box1 - box0, out, bicubic)
    for i in range(out):
        row = filters + 4 * i * (taps + 1)
        weights = row + 4
        if step == 2:
            for t in range(taps):
                store_float(weights + 4 * t, F(0))
        center = box0 + (i + 0.5) * scale
        start = max(box0, int(center - support + 0.5))
        stop = min(box1, int(center + support + 0.5))
        f = start if step == 1 else max(low, (start - 1) >> 1)
        store_int64(first + 8 * i, f)
        total = F(0)
        distance = F((start - center + 0.5) * narrower)
        for t in range(pixels):  # as many for each output: their branches can be predicted
            p = start + t
            v = filter_value(abs(distance + F(narrower) * F(t)), bicubic)
            v = v if p < stop else F(0)
            total += v
            if step == 1:
                store_float(weights + 4 * t, v)
            else:  # pixel p lies a quarter of a sample off sample p // 2, towards its neighbour
                other = min(max((p >> 1) + (p & 1) * 2 - 1, low), high - 1)
                near = weights + 4 * (min(p >> 1, high - 1) - f)
                far = weights + 4 * (other - f)
                store_float(near, load_float(near) + F(0.75) * v)
                store_float(far, load_float(far) + F(0.25) * v)
        norm = F(16384) / total
        reached = F(8192.5)  # rounding the sum so far, kept positive, makes them add up to one
        before = 8192
        used = 0
        for t in range(taps):
            at = weights + 4 * t
            reached += load_float(at) * norm
            weight = int(reached) - before
            before += weight
            used += weight != 0
            store_int32(at, (weight & 0xFFFF) * 0x10001)
        # filter_rows works in 1/64 level; each product is rounded down, by half of that on average
        store_int32(row, (32 + used // 2) * 0x10001)


@njit(forceinline=True)
def splat_pair(address):
    """The int16 that stands twice in an int32, in all lanes."""
    return reinterpret(I16x16, splat(I32x8, load_int32(address)))


@njit(forceinline=True)
def pack_bytes(even, odd):
    """Even and odd samples, int16 in 1/64 level, as 32 int8."""
    six = splat(I16x16, 6)
    low = clamp_to_byte(even >> six) & splat(I16x16, 255)
    high = clamp_to_byte(odd >> six) << splat(I16x16, 8)
    return reinterpret(I8x32, low | high)


@njit
def filter_rows(rows, last, width, out, first, taps, filters, flip, dst, dst_stride):
    """Row i of dst = sum over t of filters[i, t] * the row at address rows[first[i] + t].

    int8 samples, 64 at a time: width is rounded up to 32. Bytes above a zero byte are samples << 8,
    so the high half of their product with a weight of 1/16384 is in 1/64 level. rows[last] is the
    last. Reference: the same sum in float; 6 us for 224 rows of 256 samples and four taps.
    """
    eight = splat(I16x16, 8)
    upper = splat(I16x16, -256)
    for i in range(out):
        to = dst + (out - 1 - i if flip else i) * dst_stride
        f = load_int64(first + 8 * i)
        weights = filters + 4 * i * (taps + 1)
        n = min(taps, last + 1 - f)
        for x in range(0, width, 64):
            even1 = splat_pair(weights)
            odd1 = even1
            even2 = even1
            odd2 = even1
            for t in range(n):
                at = load_int64(rows + 8 * (f + t)) + x
                weight = splat_pair(weights + 4 + 4 * t)
                v = load(I16x16, at)
                even1 += multiply_high(v << eight, weight)
                odd1 += multiply_high(v & upper, weight)
                v = load(I16x16, at + 32)
                even2 += multiply_high(v << eight, weight)
                odd2 += multiply_high(v & upper, weight)
            store(to + x, pack_bytes(even1, odd1))
            if x + 32 < width:
                store(to + x + 32, pack_bytes(even2, odd2))


@njit(forceinline=True)
def zip_rows(r):
    """Of 16 rows: a quarter of the way to the transpose of each 16 x 16 bytes."""
    return (
        zip_low(r[0], r[8]), zip_high(r[0], r[8]), zip_low(r[1], r[9]), zip_high(r[1], r[9]),
        zip_low(r[2], r[10]), zip_high(r[2], r[10]), zip_low(r[3], r[11]), zip_high(r[3], r[11]),
        zip_low(r[4], r[12]), zip_high(r[4], r[12]), zip_low(r[5], r[13]), zip_high(r[5], r[13]),
        zip_low(r[6], r[14]), zip_high(r[6], r[14]), zip_low(r[7], r[15]), zip_high(r[7], r[15]))


@njit
def transpose(src, src_stride, rows, cols, dst, dst_stride):
    """dst[x, y] = src[y, x] for bytes, 16 x 32 at a time; rows and cols are rounded up."""
    for i in range(0, rows, 16):
        for j in range(0, cols, 32):
            s = src + i * src_stride + j
            t = s + 8 * src_stride
            r = (load(I8x32, s), load(I8x32, s + src_stride), load(I8x32, s + 2 * src_stride),
                 load(I8x32, s + 3 * src_stride), load(I8x32, s + 4 * src_stride),
                 load(I8x32, s + 5 * src_stride), load(I8x32, s + 6 * src_stride),
                 load(I8x32, s + 7 * src_stride), load(I8x32, t), load(I8x32, t + src_stride),
                 load(I8x32, t + 2 * src_stride), load(I8x32, t + 3 * src_stride),
                 load(I8x32, t + 4 * src_stride), load(I8x32, t + 5 * src_stride),
                 load(I8x32, t + 6 * src_stride), load(I8x32, t + 7 * src_stride))
            r = zip_rows(zip_rows(zip_rows(zip_rows(r))))
            d = dst + j * dst_stride + i
            half = 16 * dst_stride
            store_halves(d, half, r[0])
            store_halves(d + dst_stride, half, r[1])
            store_halves(d + 2 * dst_stride, half, r[2])
            store_halves(d + 3 * dst_stride, half, r[3])
            store_halves(d + 4 * dst_stride, half, r[4])
            store_halves(d + 5 * dst_stride, half, r[5])
            store_halves(d + 6 * dst_stride, half, r[6])
            store_halves(d + 7 * dst_stride, half, r[7])
            store_halves(d + 8 * dst_stride, half, r[8])
            store_halves(d + 9 * dst_stride, half, r[9])
            store_halves(d + 10 * dst_stride, half, r[10])
            store_halves(d + 11 * dst_stride, half, r[11])
            store_halves(d + 12 * dst_stride, half, r[12])
            store_halves(d + 13 * dst_stride, half, r[13])
            store_halves(d + 14 * dst_stride, half, r[14])
            store_halves(d + 15 * dst_stride, half, r[15])


@njit
def resize_plane(plane, x, y, w, h, res, bicubic, flip, same, dst, scratch):
    """Resizes the box (full-size pixels) of one plane to res x res int8 samples at dst.

    dst's stride is res rounded up to 32. Columns are filtered first, then rows, as columns of a
    transpose. The order of a plane's columns is undone where their addresses are listed. same: the
    plane lies as the one before, whose weights are still there.
    """
    step_x = plane[STEP_X]
    step_y = plane[STEP_Y]
    stride = plane[STRIDE]
    left = x - plane[LEFT]
    top = y - plane[TOP]
    right = left + w
    bottom = top + h
    col0 = left // step_x
    col1 = (right + step_x - 1) // step_x
    row0 = top // step_y
    row1 = (bottom + step_y - 1) // step_y
    start = col0 // 64 * 64  # of a group
    width = (col1 + 63) // 64 * 64 - start
    out = (res + 31) // 32 * 32
    rows = scratch.rows
    taps_x = count_taps(w, res, bicubic, step_x)
    taps_y = count_taps(h, res, bicubic, step_y)
    if not same:
        filter_weights(left, right, res, bicubic, step_x, col0, col1, scratch.first_x, taps_x,
                       scratch.filters_x)
        filter_weights(top, bottom, res, bicubic, step_y, row0, row1, scratch.first_y, taps_y,
                       scratch.filters_y)
    for i in range(row0, row1):
        store_int64(rows + 8 * i, plane[ADDRESS] + i * stride + start)
    filter_rows(rows, row1 - 1, width, res, scratch.first_y, taps_y, scratch.filters_y, False,
                scratch.a, width)
    transpose(scratch.a, width, res, width, scratch.b, out)
    for i in range(col0, col1):
        position = i - start
        if plane[BY_GROUPS]:  # column c of block b at 8 * c + b
            position = (position & ~63) + 8 * (position & 7) + (position >> 3 & 7)
        store_int64(rows + 8 * i, scratch.b + position * out)
    filter_rows(rows, col1 - 1, out, res, scratch.first_x, taps_x, scratch.filters_x, flip,
                scratch.a, out)
    transpose(scratch.a, out, res, out, dst, out)


@njit(forceinline=True)
def rgb_parts(luma, cb, cr):
    """R, G, B in 1/64 level of int16 samples << 8: ITU-T T.871, section 7."""
    luma = (luma >> splat(I16x16, 2)) + splat(I16x16, 32)  # half a level, to round
    r = luma + multiply_high(cr, splat(I16x16, 22970))  # 1.402 * 16384
    g = (luma - multiply_high(cb, splat(I16x16, 5638))  # 0.344136
         - multiply_high(cr, splat(I16x16, 11700)))  # 0.714136
    b = luma + multiply_high(cb, splat(I16x16, 29032))  # 1.772
    return r, g, b


@njit
def write_rgb(resized, res, ycc, to, spare):
    """Writes three resized planes as interleaved RGB. ycc: from YCbCr; reference: T.871; 15 us."""
    stride = (res + 31) // 32 * 32
    size = stride * stride
    eight = splat(I16x16, 8)
    upper = splat(I16x16, -256)
    sign = splat(I16x16, -32640)  # 0x8080: from int8 to a byte
    for y in range(res):
        for x in range(0, res, 32):
            p0 = load(I16x16, resized + y * stride + x)
            p1 = load(I16x16, resized + size + y * stride + x)
            p2 = load(I16x16, resized + 2 * size + y * stride + x)
            if ycc:
                even = rgb_parts(p0 << eight, p1 << eight, p2 << eight)
                odd = rgb_parts(p0 & upper, p1 & upper, p2 & upper)
                p0 = reinterpret(I16x16, pack_bytes(even[0], odd[0]))
                p1 = reinterpret(I16x16, pack_bytes(even[1], odd[1]))
                p2 = reinterpret(I16x16, pack_bytes(even[2], odd[2]))
            pixels = to + 3 * (y * res + x)
            whole = x + 32 <= res
            store_interleaved(pixels if whole else spare, reinterpret(I8x32, p0 ^ sign),
                              reinterpret(I8x32, p1 ^ sign), reinterpret(I8x32, p2 ^ sign))
            if not whole:
                memcpy(pixels, spare, 3 * (res - x))


# --- kernels: one sample, and the loop that every thread runs
@njit
def split_rgb(rgb, width, x, y, w, h, scratch):
    """Takes the box of an interleaved RGB picture apart into three planes of int8."""
    stride = (w + 63) // 64 * 64
    plane = planes_at(scratch.plane)
    for c in range(3):
        p = plane[c]
        p[ADDRESS] = scratch.split + c * h * stride
        p[STRIDE] = stride
        p[LEFT] = x
        p[TOP] = y
        p[STEP_X] = 1
        p[STEP_Y] = 1
        p[BY_GROUPS] = 0
        for row in range(h):
            line = bytes_at(rgb + 3 * ((y + row) * width + x) + c, 3 * w)
            to = bytes_at(p[ADDRESS] + row * stride, w)
            for i in range(U(w)):
                to[i] = line[U(3) * i] ^ 128


@njit
def decode_rgb(address, size, width, height, scratch):
    """Decodes a whole JPEG of any kind by libjpeg-turbo to RGB in scratch.planes: REASONS."""
    info = int64s_at(scratch.info, INFO_SIZE)  # of parse_jpeg
    if info[WIDTH] != width or info[HEIGHT] != height:  # the size that scratch was made for
        return OTHER_SIZE if info[HEIGHT] > 0 else BROKEN
    handle = tj_init()
    failed = tj_rgb(handle, address, size, scratch.planes, width, 3 * width, height, 0,
                    STOP_ON_WARNING)
    tj_destroy(handle)
    return BROKEN if failed else OK


@njit
def open_sample(address, size, mode, width, height, scratch):
    """(code of REASONS, whether it is a JPEG for decode_box, address of RGB if not)."""
    if mode == 1:
        return OK if size == 3 * width * height else OTHER_SIZE, False, address
    code = parse_sample(address, size, width, height, scratch)
    if code != UNKNOWN:
        return code, True, address
    return decode_rgb(address, size, width, height, scratch), False, scratch.planes


@njit
def crop_opened(opened, size, width, height, x, y, w, h, res, bicubic, flip, to, scratch):
    """One crop of what open_sample found, resized and flipped, to res * res * 3 bytes of RGB."""
    code, is_jpeg, address = opened
    info = int64s_at(scratch.info, INFO_SIZE)
    plane = planes_at(scratch.plane)
    components = 3
    if code == OK and is_jpeg:
        code = decode_box(address, size, width, height, x, y, w, h, scratch)
        components = info[COMPONENTS]
    elif code == OK:
        split_rgb(address, width, x, y, w, h, scratch)
    if code != OK:
        return code
    out = (res + 31) // 32 * 32
    for c in range(components):
        same = c > 0 and plane[c, STEP_X] == plane[c - 1, STEP_X]
        same = same and plane[c, STEP_Y] == plane[c - 1, STEP_Y]
        resize_plane(plane[c], x, y, w, h, res, bicubic, flip, same,
                     scratch.resized + c * out * out, scratch)
    if components == 1:
        memcpy(scratch.resized + out * out, scratch.resized, out * out)
        memcpy(scratch.resized + 2 * out * out, scratch.resized, out * out)
    write_rgb(scratch.resized, res, is_jpeg and components == 3, to, scratch.a)
    return OK


@njit(nogil=True, cache=True)
def resized_crop(address, size, mode, width, height, x, y, w, h, res, bicubic, flip, to, scratch):
    """Decodes, crops, resizes and flips one stored sample to res * res * 3 bytes of RGB at `to`.

    Returns a code of REASONS. Reference: Pillow's decode, crop, resize.
    """
    opened = open_sample(address, size, mode, width, height, scratch)
    return crop_opened(opened, size, width, height, x, y, w, h, res, bicubic, flip, to, scratch)


Job = namedtuple("Job", (
    "fd modes widths heights ptrs sizes samples draws control addresses done status train res "
    "batch_size views bicubic seed epoch scale ratio hflip crop_ratio"))
NEXT, LIMIT = range(2)  # control: the next ticket (position in the epoch), the first that must wait
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
def take_ticket(control):
    """The next position in the epoch, -1 if it may not be started yet."""
    at = control.ctypes.data
    while True:
        ticket = atomic_add(at + 8 * NEXT, 0)
        if ticket >= atomic_add(at + 8 * LIMIT, 0):
            return -1
        if atomic_swap_if(at + 8 * NEXT, ticket, ticket + 1) == ticket:
            return ticket


@njit
def fill_row(job, scratch, i, draw, address, view_stride):
    """Sample i, with the crops and flips of a draw, to addresses in a batch: REASONS."""
    size = job.sizes[i]
    width = job.widths[i]
    height = job.heights[i]
    if not read_sample(job.fd, scratch.raw, size, job.ptrs[i]):
        return SHORT_READ
    opened = open_sample(scratch.raw, size, job.modes[i], width, height, scratch)
    for view in range(job.views):
        x, y, w, h = center_box(width, height, job.crop_ratio)
        flip = False
        if job.train:
            x, y, w, h = random_box(width, height, job.scale, job.ratio, job.seed, job.epoch, draw,
                                    view)
            flip_draw = VIEW_DRAWS * view + FLIP_DRAW
            flip = uniform(job.seed, job.epoch, draw, flip_draw) < job.hflip
        code = crop_opened(opened, size, width, height, x, y, w, h, job.res, job.bicubic, flip,
                           address + view * view_stride, scratch)
        if code != OK:
            return code
    return OK


@njit(nogil=True, cache=True)
def fill(job, scratch):
    """Fills batches until the limit (returns -1) or one is complete (returns its number)."""
    n = len(job.samples)
    row_bytes = 3 * job.res * job.res
    while True:
        ticket = take_ticket(job.control)
        if ticket < 0:
            return -1
        batch = ticket // job.batch_size
        row = ticket % job.batch_size
        slot = batch % len(job.done)
        size = min(job.batch_size, n - batch * job.batch_size)
        address = job.addresses[slot] + row * row_bytes
        job.status[slot, row] = fill_row(job, scratch, job.samples[ticket], job.draws[ticket],
                                         address, size * row_bytes)
        if atomic_add(job.done.ctypes.data + 8 * slot, 1) + 1 == size:
            return batch


@njit(nogil=True, cache=True)
def fill_share(table, scale, ratio, seed, epoch, res, bicubic, codes):
    """One thread's share of one of FFCV's batches.

    A row of table: address, size, mode, width, height, number of the sample, where to.
    """
    if len(table) == 0:
        return
    most = (table[:, 1].max(), table[:, 3].max(), table[:, 4].max(),
            (table[:, 3] * table[:, 4]).max(), res)
    memory = np.empty(lay_out_scratch(0, *most).end // 8 + 8, np.int64)
    scratch = lay_out_scratch((memory.ctypes.data + 63) // 64 * 64, *most)
    for i in range(len(table)):
        address, size, mode, width, height, draw, to = table[i]
        x, y, w, h = random_box(width, height, scale, ratio, seed, epoch, draw, 0)
        codes[i] = resized_crop(address, size, mode, width, height, x, y, w, h, res, bicubic, False,
                                to, scratch)
    memory[0] = 0  # numba frees an array after its last use, and scratch lies in this one


# --- reader
class BetonReader:
    """A .beton file's tables, checked against the file, and its single samples.

    Attributes: num_samples; labels, widths, heights, modes, ptrs, sizes (int64, one entry a
    sample); settings (build_beton.py's, empty for FFCV's own files); classes (names or None);
    excluded (sorted int64: samples that `build_beton.py --verify FILE --exclude-bad` found damaged,
    which loaders leave out). Raises DataError that says what is wrong, where, and what to do.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file. Build it: python build_beton.py --data-dir "
                            f"PICTURES --out {path}, or draw a small one: "
                            "python build_beton.py --demo.")
        self.file = open(self.path, "rb", buffering=0)
        try:
            self._read_tables()
            self._read_sidecar()
        except BaseException:
            self.file.close()
            raise

    def _error(self, found):
        return DataError(f"{self.path}: {found}. The file is not a complete .beton of version 2; "
                         "build it again.")

    def sample_error(self, i, reason):
        """A DataError for sample i that says how to go on without it."""
        return DataError(f"{self.path}: sample {i}: {reason}. `python build_beton.py --verify "
                         f"{self.path} --exclude-bad` records every damaged sample, so that "
                         "loaders leave it out.")

    def _bytes(self, size, offset):
        """`size` bytes at an offset, less where the file ends: a read may return a part of them."""
        data = b""
        while len(data) < size:
            part = os.pread(self.file.fileno(), size - len(data), offset + len(data))
            if not part:
                break
            data += part
        return data

    def _table(self, dtype, count, offset, name):
        size = count * dtype.itemsize
        if offset + size > self.size:
            raise self._error(f"{name} should end at byte {offset + size:,}, the file ends at "
                              f"{self.size:,}")
        return np.frombuffer(self._bytes(size, offset), dtype)

    def _read_tables(self):
        self.size = os.fstat(self.file.fileno()).st_size
        header = self._table(HEADER, 1, 0, "the header")[0]
        version, num_fields, self.page_size, n, alloc_ptr = (int(value) for value in header)
        if version != 2:
            raise self._error(f"its version is {version}")
        sane = 1 <= num_fields <= 64 and 0 < n <= self.size and self.page_size > 0
        if not sane or alloc_ptr > self.size or (self.size - alloc_ptr) % ALLOC.itemsize:
            raise self._error(f"its header names {num_fields} fields, {n:,} samples, pages of "
                              f"{self.page_size:,} and an allocation table at byte {alloc_ptr:,} "
                              f"of {self.size:,}")
        fields = self._table(FIELD, num_fields, HEADER.itemsize, "the list of fields")
        kinds = [int(kind) for kind in fields["type_id"]]
        if kinds.count(2) != 1 or any(kind not in FIELD_TYPES for kind in kinds):
            raise self._error(f"its fields have the types {kinds}, where one picture (2) and "
                              "integers (1) are expected")
        columns = [(f"f{i}", FIELD_TYPES[kind]) for i, kind in enumerate(kinds)]
        start = HEADER.itemsize + fields.nbytes
        samples = self._table(np.dtype(columns, align=True), n, start, "the table of samples")
        count = (self.size - alloc_ptr) // ALLOC.itemsize
        alloc = self._table(ALLOC, count, alloc_ptr, "the allocation table")
        image = kinds.index(2)
        try:
            text = bytes(fields["arguments"][image]).rstrip(b"\0")
            self.settings = dict(json.loads(text)) if text else {}  # FFCV leaves these bytes 0
        except (ValueError, TypeError):
            raise self._error("its build settings are garbled") from None
        if self.settings:
            checksum = tables_checksum(header, self.settings, samples, alloc)
            if self.settings.get("checksum") != checksum:
                raise self._error("the checksum over its header and tables does not match, or an "
                                  "earlier build_beton.py made it")
        self._locate_samples(samples[f"f{image}"], alloc, start + samples.nbytes, alloc_ptr)
        labels = samples[f"f{kinds.index(1)}"] if 1 in kinds else np.zeros(n)
        self.labels = labels.astype(np.int64)
        self.num_samples = n

    def _locate_samples(self, images, alloc, start, end):
        """Gives every sample its size, which only the allocation table has, and checks its place.

        No memory is taken on the word of a table: pictures larger than their bytes are refused.
        """
        self.modes = images["mode"].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        ptrs = images["data_ptr"]
        order = np.argsort(alloc["ptr"], kind="stable")
        at = np.searchsorted(alloc["ptr"], ptrs, sorter=order)
        valid = at < len(alloc)
        rows = np.zeros(len(images), ALLOC)
        if len(alloc):
            rows = alloc[order[np.minimum(at, len(alloc) - 1)]]
        sizes = rows["size"]
        valid &= rows["ptr"] == ptrs
        valid &= (ptrs >= start) & (ptrs <= end) & (sizes <= end - np.minimum(ptrs, end))
        valid &= (sizes > 0) & (self.widths > 0) & (self.heights > 0) & (self.modes <= 1)
        most_pixels = np.minimum(sizes, self.size).astype(np.int64) * MAX_PIXELS_PER_BYTE
        valid &= self.widths * self.heights <= most_pixels
        if not valid.all():
            i = int(np.argmin(valid))
            raise self._error(f"sample {i} ({self.widths[i]}x{self.heights[i]}, mode "
                              f"{self.modes[i]}) has no valid place in it")
        self.ptrs = ptrs.astype(np.int64)
        self.sizes = sizes.astype(np.int64)

    def _read_sidecar(self):
        """Class names and excluded samples from <name>.json, which a file of FFCV's has not."""
        sidecar = self.path.with_suffix(".json")
        self.classes = None
        self.excluded = np.zeros(0, np.int64)
        if not sidecar.is_file():
            return
        try:
            content = json.loads(sidecar.read_text())
            self.classes = content.get("classes")
            excluded = sorted(int(number) for number in content.get("excluded") or {})
            self.excluded = np.array(excluded, np.int64)
        except (ValueError, TypeError, AttributeError, OverflowError):
            raise DataError(f"{sidecar}: not the sidecar that build_beton.py writes. Rebuild "
                            f"{self.path}, or remove the sidecar to go on without class names "
                            "and with all samples.") from None
        if excluded and not 0 <= excluded[0] <= excluded[-1] < self.num_samples:
            raise DataError(f"{sidecar}: excludes samples {excluded[0]} to {excluded[-1]}, "
                            f"{self.path} has 0 to {self.num_samples - 1}. The sidecar is of "
                            "another file; remove it or rebuild both.")

    def read(self, i: int) -> bytes:
        """The stored bytes of sample i."""
        data = self._bytes(int(self.sizes[i]), int(self.ptrs[i]))
        if len(data) != self.sizes[i]:
            raise self.sample_error(i, REASONS[SHORT_READ])
        return data

    def image(self, i: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
        """Sample i, or its box (x, y, w, h), as uint8 (h, w, 3), decoded by libjpeg-turbo."""
        width = int(self.widths[i])
        height = int(self.heights[i])
        x, y, w, h = box or (0, 0, width, height)
        if not (0 <= x and 0 <= y and 0 < w <= width - x and 0 < h <= height - y):
            raise ValueError(f"{self.path}: box {box} is not inside sample {i}, {width}x{height}.")
        data = self.read(i)
        if self.modes[i] == 0:
            pixels, code = decode_whole(data, width, height)
        else:
            pixels = np.frombuffer(data, np.uint8)
            code = OK if len(data) == 3 * width * height else OTHER_SIZE
        if code != OK:
            raise self.sample_error(i, REASONS[code])
        return pixels.reshape(height, width, 3)[y:y + h, x:x + w].copy()

    def close(self):
        self.file.close()


def decode_whole(data, width, height):
    """(RGB bytes, code of REASONS) of a JPEG that should be of this size, by libjpeg-turbo."""
    lib = bind()
    handle = ctypes.c_void_p(lib.tjInitDecompress())
    size = ctypes.c_ulong(len(data))
    found = [ctypes.c_int() for _ in range(4)]  # width, height, subsampling, colour space
    pixels = np.empty(3 * width * height, np.uint8)
    code = BROKEN
    try:
        if lib.tjDecompressHeader3(handle, data, size, *map(ctypes.byref, found)) == 0:
            code = OTHER_SIZE
        if (found[0].value, found[1].value) == (width, height):
            to = ctypes.c_void_p(pixels.ctypes.data)
            failed = lib.tjDecompress2(handle, data, size, to, width, 0, height, 0,
                                       STOP_ON_WARNING)
            code = BROKEN if failed else OK
    finally:
        lib.tjDestroy(handle)
    return pixels, code


# --- order, epochs and stages: what both loaders share
def usable_cores() -> int:
    """Cores for this process: affinity and cgroup quota, shared among torchrun's local ranks."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, IndexError):  # no cgroup v2 here: no quota
        entries = Path("/proc/self/cgroup").read_text().splitlines()
        name = [entry for entry in entries if entry.startswith("0::")][0][4:]
        folder = Path("/sys/fs/cgroup") / name
        while folder != folder.parent and folder.name != "fs":
            with contextlib.suppress(OSError, ValueError):  # "max 100000" is no quota
                quota, period = (folder / "cpu.max").read_text().split()
                cores = min(cores, math.ceil(int(quota) / int(period)))
            folder = folder.parent
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class EpochLoader:
    """What both loaders share: which sample comes when, a pure function of (seed, epoch)."""

    def __init__(self, path, batch_size, train, res, scale, ratio, hflip, crop_ratio, interpolation,
                 num_workers, seed, rank, world_size, drop_last, device, indices, order, views):
        if order not in ("random", "pages"):
            raise ValueError(f"order={order!r}: expected 'random' or 'pages'.")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation={interpolation!r}: expected 'bicubic' or 'bilinear'.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to world_size - 1, {world_size - 1}.")
        if batch_size < 1 or views < 1 or num_workers < 0:
            raise ValueError(f"batch_size={batch_size}, views={views}, num_workers={num_workers}: "
                             "expected at least 1, 1 and 0.")
        if views > 1 and not train:
            raise ValueError(f"views={views}: evaluation has one view, the centre.")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: torch finds no usable CUDA device. Install "
                             "a driver that fits this torch, or take device='cpu'.")
        self.path = str(path)
        self.batch_size = int(batch_size)
        self.train = bool(train)
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.hflip = float(hflip)
        self.crop_ratio = float(crop_ratio)
        self.interpolation = interpolation
        self.num_workers = num_workers or usable_cores()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = self.train if drop_last is None else bool(drop_last)
        self.order = order
        self.views = int(views)
        total = len(self.labels)
        self.indices = np.arange(total) if indices is None else np.asarray(indices, np.int64)
        if len(self.indices) == 0 or self.indices.min() < 0 or self.indices.max() >= total:
            raise ValueError(f"indices must name samples 0 to {total - 1} of {path}, at least one.")
        # Orders are drawn with the excluded samples and leave them out afterwards, so that a run
        # that a damaged sample ended goes on with the same order and crops of the others.
        self._kept = ~np.isin(self.indices, self.excluded)
        self.num_samples = int(self._kept.sum())
        self.epoch = 0
        self.batch = 0
        self.closed = False
        self._started = False
        self._process = os.getpid()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.res = None
        self.scale = None
        self.set_stage(res, scale)
        if len(self) == 0:
            raise DataError(f"{path}: {self.num_samples} samples on {world_size} rank(s) do not "
                            f"fill one batch of {batch_size}. Take a smaller batch or "
                            "drop_last=False.")

    def set_stage(self, res: int | None = None, scale: tuple[float, float] | None = None):
        """Output side in pixels and crop area from the next epoch on; None keeps what is."""
        if res is not None and res < 1:
            raise ValueError(f"res={res}: expected at least 1 pixel.")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale}: expected 0 < low <= high <= 1.")
        if res is not None:
            self.res = int(res)
        if scale is not None:
            self.scale = (float(scale[0]), float(scale[1]))

    def set_epoch(self, epoch: int):
        """The next iteration is this epoch from its start; otherwise iterations count up from 0."""
        self.epoch = int(epoch)
        self.batch = 0
        self._started = False

    def state_dict(self) -> dict:
        """Where the iteration stands, in samples of all ranks: another number may go on from it."""
        return {"epoch": self.epoch, "samples": self.batch * self.batch_size * self.world_size,
                "seed": self.seed, "num_samples": len(self.indices), "order": self.order,
                "res": self.res, "scale": list(self.scale)}

    def load_state_dict(self, state: dict):
        """Makes the next iteration go on with the exact next batch.

        Raises ValueError if the data or the batches differ. Samples that were excluded since then
        are no difference.
        """
        ours = self.state_dict()
        mismatches = [f"{key}: {state[key]} there, {ours[key]} here"
                      for key in ("num_samples", "seed", "order") if state[key] != ours[key]]
        if mismatches:
            raise ValueError(f"{self.path}: the state is of another loader "
                             f"({'; '.join(mismatches)}).")
        total_batch = self.batch_size * self.world_size
        if state["samples"] % total_batch:
            raise ValueError(f"{self.path}: the state is {state['samples']} samples into its "
                             f"epoch, where {self.world_size} rank(s) x batch {self.batch_size} "
                             "cannot go on. Take a total batch that divides it.")
        self.set_epoch(state["epoch"])
        self.batch = state["samples"] // total_batch
        self.set_stage(state["res"], state["scale"])

    def _positions(self):
        """This rank's positions in `indices` for self.epoch; the ranks' interleave to the whole."""
        if not self.train:
            order = np.flatnonzero(self._kept)
        else:
            order = self._shuffle(np.random.default_rng([self.seed, self.epoch]))
            order = order[self._kept[order]]
            order = order[:len(order) // self.world_size * self.world_size]  # as many for each rank
        return np.ascontiguousarray(order[self.rank::self.world_size])

    def _shuffle(self, rng):
        return rng.permutation(len(self.indices))

    def __len__(self):
        n = self.num_samples // self.world_size
        if not self.train:
            n = len(range(self.rank, self.num_samples, self.world_size))
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self):
        if self.closed:
            raise RuntimeError(f"{self.path}: this loader is closed.")
        self._refuse_fork()
        if self._started:  # an earlier iteration was left early: this is the next epoch
            self.set_epoch(self.epoch + 1)
        self._started = True
        batches = self._host_batches(self._positions(), self.batch)
        for batch in self._to_device(batches) if self._stream else batches:
            self.batch += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def _refuse_fork(self):
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.path}: this loader was made in process {self._process} and "
                               f"has no threads in its fork {os.getpid()}. Make one there.")

    def _to_device(self, batches):
        """Copies one batch ahead on the side stream: training never waits for a copy."""
        ready = None
        copied = None
        for images, labels in batches:
            if copied is not None:
                copied.synchronize()  # long done; until here `images` kept its pinned buffer
            with torch.cuda.stream(self._stream):
                images_there = images.to(self.device, non_blocking=True)
                labels_there = labels.to(self.device, non_blocking=True)
                copied = self._stream.record_event()
            if ready is not None:
                yield self._hand_over(*ready)
            ready = (images_there, labels_there, copied)
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
AHEAD = 3  # batches that the threads fill before they are asked for
WINDOW = 512 << 20  # bytes that order="pages" shuffles in
READ_PIECE = 1 << 20  # bytes that one request to read ahead names: of a larger one Linux reads 8 MB


class Epoch:
    """The threads that fill one epoch's batches.

    An image costs no lock, no Python and no allocation; a batch costs a lock and a wake-up.
    """

    def __init__(self, loader, positions, start):
        self.loader = loader
        self.reader = loader.reader
        self.process = os.getpid()
        self.total = len(positions)
        self.samples = loader.indices[positions]
        self.granted = start  # batches up to here may be filled
        self.end = len(loader)
        self.pixels = 3 * loader.res ** 2
        self.buffers = []
        self.holders = []  # for each buffer a weak reference to the view of it that went out
        self.filling = {}  # batch: view of its buffer
        self.failure = None
        self.wake = threading.Condition()
        self.stopped = False
        size = loader.batch_size
        self.control = np.array([start * size, start * size])
        self.addresses = np.zeros(AHEAD, np.int64)
        self.done = np.zeros(AHEAD, np.int64)
        self.status = np.zeros((AHEAD, size), np.int64)
        reader = self.reader
        self.job = Job(
            reader.file.fileno(), reader.modes, reader.widths, reader.heights, reader.ptrs,
            reader.sizes, self.samples, positions, self.control, self.addresses, self.done,
            self.status, loader.train, loader.res, size, loader.views,
            loader.interpolation == "bicubic", loader.seed, loader.epoch, loader.scale,
            loader.ratio, loader.hflip, loader.crop_ratio)
        self._load_kernels()
        targets = [self._fill_batches] * loader.num_workers
        if loader.order == "pages":
            targets.append(self._read_ahead)
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self.threads:
            thread.start()

    def _make_scratch(self):
        widths = self.reader.widths[self.samples]
        heights = self.reader.heights[self.samples]
        return make_scratch(self.reader.sizes[self.samples], widths, heights, self.loader.res)

    def _load_kernels(self):
        bind()
        if not fill.signatures:
            with kernel_cache(fill, COMPILING):
                memory, scratch = self._make_scratch()
                fill(self.job, scratch)  # nothing is granted yet: returns at once
                atomic_store(self.control.ctypes.data + 8 * LIMIT, int(self.control[LIMIT]))
                atomic_load(self.control.ctypes.data)

    def _fill_batches(self):
        control = self.control
        limit = control.ctypes.data + 8 * LIMIT
        try:
            memory, scratch = self._make_scratch()  # memory lives as long as this thread
            while atomic_load(limit) >= 0:
                completed = fill(self.job, scratch)
                with self.wake:
                    if completed >= 0:
                        self.wake.notify_all()
                    while 0 <= atomic_load(limit) <= control[NEXT]:
                        self.wake.wait()
        except BaseException as error:  # a thread that just ended would leave the caller waiting
            with self.wake:
                self.failure = error
                self.wake.notify_all()

    def _read_ahead(self):
        """Asks the system for the windows that the coming batches lie in, front to back."""
        window = max(WINDOW, self.reader.page_size)
        size = self.loader.batch_size
        asked = set()
        for batch in range(self.granted, self.end):
            with self.wake:
                while not self.stopped and batch >= self.granted + AHEAD:
                    self.wake.wait()
            samples = self.samples[batch * size:(batch + 1) * size]
            for number in np.unique(self.reader.ptrs[samples] // window).tolist():
                if number in asked:
                    continue
                asked.add(number)
                for at in range(number * window, (number + 1) * window, READ_PIECE):
                    if self.stopped or at >= self.reader.size:
                        break
                    os.posix_fadvise(self.reader.file.fileno(), at, READ_PIECE,
                                     os.POSIX_FADV_WILLNEED)

    def _grant(self):
        """Lets the threads fill one batch more, into a buffer that nobody outside holds."""
        free = [i for i, holder in enumerate(self.holders) if holder() is None]
        if not free:
            free = [len(self.buffers)]
            loader = self.loader
            nbytes = loader.views * loader.batch_size * self.pixels
            pinned = loader.device.type == "cuda"
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            self.buffers.append(buffer.numpy())
            self.holders.append(None)
        buffer = self.buffers[free[0]]
        view = buffer[:]  # lives as long as a tensor made from it; then the buffer is free again
        self.holders[free[0]] = weakref.ref(view)
        self.filling[self.granted] = view
        slot = self.granted % AHEAD
        self.addresses[slot] = buffer.ctypes.data
        self.done[slot] = 0
        self.granted += 1
        limit = min(self.total, self.granted * self.loader.batch_size)
        atomic_store(self.control.ctypes.data + 8 * LIMIT, limit)

    def take(self, batch):
        """Waits for a batch: its pictures, uint8 ([views,] B, 3, res, res), and its samples."""
        self.loader._refuse_fork()
        size = self.loader.batch_size
        slot = batch % AHEAD
        samples = self.samples[batch * size:(batch + 1) * size]
        done = self.done.ctypes.data + 8 * slot
        with self.wake:
            while self.granted < min(self.end, batch + AHEAD) and not self.stopped:
                self._grant()
            self.wake.notify_all()
            while not (atomic_load(done) == len(samples) or self.failure or self.stopped):
                self.wake.wait()
        if self.failure is not None:
            raise RuntimeError(f"{self.reader.path}: a loader thread failed: "
                               f"{self.failure!r}.") from self.failure
        if self.stopped:
            raise RuntimeError(f"{self.reader.path}: the loader was closed while it was read.")
        status = self.status[slot, :len(samples)]
        if status.any():
            row = int(np.flatnonzero(status)[0])
            raise self.reader.sample_error(samples[row], REASONS[int(status[row])])
        views = self.loader.views
        res = self.loader.res
        images = torch.from_numpy(self.filling.pop(batch))[:views * len(samples) * self.pixels]
        images = images.view(views, len(samples), res, res, 3).permute(0, 1, 4, 2, 3)
        return images if views > 1 else images[0], samples

    def stop(self):
        if os.getpid() != self.process or sys.is_finalizing():
            return  # in a fork the threads are missing, and one may hold the lock for ever
        with self.wake:
            self.stopped = True
            atomic_store(self.control.ctypes.data + 8 * LIMIT, -1)
            self.wake.notify_all()
        for thread in self.threads:
            thread.join()


class ESSLLoader(EpochLoader):
    """Batches of a .beton file: uint8 (B, 3, res, res) in channels_last memory and int64 (B,).

    Training takes RandomResizedCrop(scale, ratio) and a flip with probability hflip; evaluation the
    centre square of crop_ratio of the short side. With views=V a batch is (V, B, 3, res, res): V
    crops of each sample, the first as with views=1. Bytes depend on (seed, epoch, indices) and the
    stage alone, not on num_workers (0: all cores this process may use). Training leaves out the
    last samples of an order that do not fill all ranks, and the last partial batch if drop_last
    (None: in training); evaluation visits each sample once over all ranks. order="pages" reads a
    file that is larger than memory in large sequential pieces. Samples that the file's sidecar
    excludes are left out.

    On a CUDA device batches are copied ahead from pinned memory: about five batches of it,
    5 * views * batch_size * 3 * res * res bytes (193 MB at 256 x 224 x 224), as without a GPU
    ordinary memory.
    Raises ValueError for an argument and DataError for the file; both say what to do.
    """

    def __init__(self, path: str | Path, batch_size: int, train: bool = True, res: int = 224,
                 scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3), hflip: float = 0.5,
                 crop_ratio: float = 224 / 256, interpolation: str = "bicubic",
                 num_workers: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1,
                 drop_last: bool | None = None, device: str | torch.device = "cpu",
                 indices: np.ndarray | list[int] | None = None, order: str = "random",
                 views: int = 1):
        self.reader = BetonReader(path)
        self.labels = self.reader.labels
        self.classes = self.reader.classes
        self.excluded = self.reader.excluded
        self._epochs = set()
        super().__init__(path, batch_size, train, res, scale, ratio, hflip, crop_ratio,
                         interpolation, num_workers, seed, rank, world_size, drop_last, device,
                         indices, order, views)

    def _shuffle(self, rng):
        """order="pages": windows of pages in random order, samples shuffled within a window.

        A window is WINDOW bytes long and starts elsewhere in each epoch. All ranks are in the same
        window at a time.
        """
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
            for batch in range(start, len(self)):
                images, samples = epoch.take(batch)
                yield images, torch.from_numpy(self.labels[samples])
        finally:
            epoch.stop()
            self._epochs.discard(epoch)

    def close(self):
        """Stops the threads, also of an iteration under way, and closes the file."""
        for epoch in list(self._epochs):
            epoch.stop()
        self.reader.close()
        super().close()


# --- loader over a folder of pictures
class FolderEpoch(torch.utils.data.Dataset):
    """One epoch of a folder: Pillow decodes the whole picture; boxes as in ESSLLoader."""

    def __init__(self, loader):
        names = ("paths labels indices train res scale ratio hflip crop_ratio interpolation seed "
                 "epoch views transform")
        self.settings = argparse.Namespace(**{k: getattr(loader, k) for k in names.split()})

    def __getitem__(self, position):
        """(views, res, res, 3) uint8, label, and what is wrong or ""."""
        from PIL import Image, ImageOps
        s = self.settings
        sample = s.indices[position]
        try:
            with Image.open(s.paths[sample]) as picture:
                picture.load()
                with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF
                    ImageOps.exif_transpose(picture, in_place=True)
                picture = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            empty = torch.zeros((s.views, s.res, s.res, 3), dtype=torch.uint8)
            return empty, 0, f"{s.paths[sample]}: cannot be decoded ({error})"
        crops = [np.asarray(self._crop(picture, position, view)) for view in range(s.views)]
        return torch.from_numpy(np.stack(crops)), s.labels[sample], ""

    def _crop(self, picture, position, view):
        from PIL import Image, ImageOps
        s = self.settings
        if s.train:
            x, y, w, h = random_box(*picture.size, s.scale, s.ratio, s.seed, s.epoch, position,
                                    view)
        else:
            x, y, w, h = center_box(*picture.size, s.crop_ratio)
        resample = Image.Resampling[s.interpolation.upper()]
        picture = picture.crop((x, y, x + w, y + h)).resize((s.res, s.res), resample)
        first_draw = VIEW_DRAWS * view
        if s.train and uniform(s.seed, s.epoch, position, first_draw + FLIP_DRAW) < s.hflip:
            picture = ImageOps.mirror(picture)
        if s.train and s.transform:
            # timm's RandAug draws from these two generators, this worker process's own.
            draw = uniform(s.seed, s.epoch, position, first_draw + FLIP_DRAW + 1)
            random.seed(int(draw * 2 ** 32))
            np.random.seed(int(draw * 2 ** 32))
            picture = s.transform(picture)
        return picture


class FolderLoader(EpochLoader):
    """ESSLLoader's surface over a folder of pictures, by Pillow and torch's DataLoader.

    Takes class folders, as torchvision's ImageFolder, or a flat folder of pictures: one class with
    the folder's name. Same order and same relative boxes as ESSLLoader for the same seed: for
    comparison, and for the paper's Table 12. transform: a function of the cropped and flipped
    Pillow picture, in training (RandAug for Table 6). order changes nothing here.
    Raises ValueError for an argument and DataError for the folder or a picture.
    """

    def __init__(self, folder: str | Path, batch_size: int, train: bool = True, res: int = 224,
                 scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3), hflip: float = 0.5,
                 crop_ratio: float = 224 / 256, interpolation: str = "bicubic",
                 num_workers: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1,
                 drop_last: bool | None = None, device: str | torch.device = "cpu",
                 indices: np.ndarray | list[int] | None = None, order: str = "random",
                 views: int = 1, transform=None):
        self.paths, labels, self.classes = find_pictures(Path(folder))
        self.labels = np.array(labels, np.int64)
        self.excluded = np.zeros(0, np.int64)
        self.transform = transform
        super().__init__(folder, batch_size, train, res, scale, ratio, hflip, crop_ratio,
                         interpolation, num_workers, seed, rank, world_size, drop_last, device,
                         indices, order, views)

    def _host_batches(self, positions, start):
        self._check_shared_memory()
        with kernel_cache(random_box):  # here, before the worker processes start
            random_box(8, 8, self.scale, self.ratio, self.seed, 0, 0, 0)
            center_box(8, 8, self.crop_ratio)
            uniform(self.seed, 0, 0, 0)
        size = self.batch_size
        batches = [positions[b * size:(b + 1) * size].tolist() for b in range(start, len(self))]
        loader = torch.utils.data.DataLoader(
            FolderEpoch(self), batch_sampler=batches, num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda", prefetch_factor=AHEAD)
        for images, labels, errors in loader:
            error = max(errors)
            if error:
                raise DataError(f"{error}. Remove it, or build a file without it: python "
                                f"build_beton.py --skip-bad --data-dir {self.path} --out FILE.")
            images = images.permute(1, 0, 4, 2, 3)  # (views, B, 3, res, res)
            yield images if self.views > 1 else images[0], labels

    def _check_shared_memory(self):
        """Worker processes hand batches over in /dev/shm: one that is full ends in a bus error."""
        batch = self.views * self.batch_size * 3 * self.res ** 2
        needed = (self.num_workers * AHEAD + 1) * batch
        with contextlib.suppress(FileNotFoundError):  # not every system has it
            shm = os.statvfs("/dev/shm")
            free = shm.f_bavail * shm.f_frsize
            if free < needed:
                raise DataError(f"{self.path}: {self.num_workers} worker(s) need "
                                f"{needed / 1e6:,.0f} MB in /dev/shm, {free / 1e6:,.0f} MB are "
                                "free. Start the "
                                "container with a larger --shm-size (or --ipc=host), or take fewer "
                                "num_workers or a smaller batch.")


def find_pictures(folder):
    """(paths, labels, classes) of class folders of pictures, or of a flat folder of pictures."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
    try:
        try:
            classes, class_to_idx = find_classes(folder)
        except FileNotFoundError:
            classes = []
        if classes:
            pairs = make_dataset(str(folder), class_to_idx, IMG_EXTENSIONS)
            return [path for path, _ in pairs], [label for _, label in pairs], classes
        paths = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    except OSError as error:
        raise DataError(f"{folder}: expected class folders of pictures, or pictures "
                        f"({error}).") from None
    if not paths:
        raise DataError(f"{folder}: holds neither class folders nor pictures "
                        f"({', '.join(IMG_EXTENSIONS)}).")
    return paths, [0] * len(paths), [folder.resolve().name]


# --- what a run checks before it begins
def check_batches(num_samples, total_batch, batch_size, world_size, repeat=1):
    """Raises DataError, with flags that work, where steps are not whole batches of each rank.

    repeat: the times that a picture is used in a step.
    """
    most = num_samples * repeat
    whole = total_batch % (batch_size * world_size) == 0 and batch_size % repeat == 0
    if whole and total_batch <= most:
        return
    if int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(1)  # rank 0 says it
    batch = min(batch_size, total_batch // world_size, most // world_size)
    batch = max(1, batch // repeat) * repeat
    total = max(1, min(total_batch, most) // (batch * world_size)) * batch * world_size
    raise DataError(
        f"--total-batch {total_batch} should be a multiple of --batch-size {batch_size} x "
        f"{world_size} process(es), and at most {most:,}, the number of pictures (x --repeat). "
        f"This works: --total-batch {total} --batch-size {batch}")


def check_classes(train, val):
    """Raises DataError where a held-out set's labels do not mean what the training set's do."""
    if train.classes and val.classes and list(train.classes) != list(val.classes):
        differ = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise DataError(f"{val.path} has other classes than {train.path}: they differ in "
                        f"{', '.join(differ[:4])}.")
    if val.labels.min() < 0 or val.labels.max() > train.labels.max():
        raise DataError(f"{val.path} has labels {val.labels.min()} to {val.labels.max()}, "
                        f"{train.path} {train.labels.min()} to {train.labels.max()}.")


def open_loader(path: str | Path, batch_size: int, train: bool = True, **kwargs):
    """ESSLLoader for a file, FolderLoader for a folder, with the same arguments."""
    loader = FolderLoader if Path(path).is_dir() else ESSLLoader
    return loader(path, batch_size, train, **kwargs)


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
    from dataclasses import replace

    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    if output_size[0] != output_size[1] or interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"output_size={output_size}, interpolation={interpolation!r}: expected a "
                         "square, and 'bicubic' or 'bilinear'.")
    res = int(output_size[0])
    bicubic = interpolation == "bicubic"
    scale = (float(scale[0]), float(scale[1]))
    ratio = (float(ratio[0]), float(ratio[1]))
    bind()
    pair = types.UniTuple(types.float64, 2)
    number = types.int64
    with kernel_cache(fill_share, COMPILING):  # here, not in the middle of FFCV's compiling
        fill_share.compile((number[:, :], pair, pair, number, number, number, types.boolean,
                            number[:]))

    class CropDecoder(SimpleRGBImageDecoder):  # FFCV takes only its own class for a decoder
        def declare_state_and_memory(self, previous_state):
            shape = (res, res, 3)
            state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
            return state, AllocationQuery(shape, np.dtype("u1"))

        def generate_code(self):
            read = self.memory_read
            parallel = Compiler.get_iterator()
            threads = Compiler.num_threads
            self.batches = np.zeros(1, np.int64)
            counter = self.batches.ctypes.data

            def decode(batch_indices, destination, metadata, storage_state):
                n = len(batch_indices)
                number = atomic_add(counter, 1)
                table = np.empty((n, 7), np.int64)
                codes = np.empty(n, np.int64)
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
                    fill_share(table[thread::threads], scale, ratio, seed, number, res, bicubic,
                               codes[thread::threads])
                if codes.max() != 0:
                    sample = batch_indices[np.argmax(codes)]
                    with objmode():
                        interrupt_ffcv(sample)
                    raise ValueError("a sample of the .beton file is damaged")
                return destination[:n]
            decode.is_parallel = True
            return decode
    return CropDecoder()


# --- what is in a file
def describe(path):
    """Prints the samples, classes, sizes, modes and settings of a .beton file."""
    with contextlib.closing(BetonReader(path)) as reader:
        jpegs = int((reader.modes == 0).sum())
        names = reader.classes or []
        kind = "build_beton.py" if reader.settings else "FFCV's DatasetWriter"
        print(f"{path}: {reader.size / 1e6:,.1f} MB, written by {kind}")
        print(f"samples   {reader.num_samples:,}: {jpegs:,} JPEG, {reader.num_samples - jpegs:,} "
              f"raw; {len(reader.excluded):,} excluded as damaged")
        print(f"classes   {len(names) or 'no names'}{': ' * bool(names)}{', '.join(names[:10])}"
              f"{', ...' * (len(names) > 10)}; labels {reader.labels.min()} to "
              f"{reader.labels.max()}")
        for name, values, unit in (("width", reader.widths, "pixels"),
                                   ("height", reader.heights, "pixels"),
                                   ("size", reader.sizes, "bytes")):
            low, middle, high = np.quantile(values, (0, 0.5, 1)).astype(int)
            print(f"{name:9} {low:,} to {high:,} {unit}, median {middle:,}")
        print(f"pages     {reader.page_size:,} bytes")
        for key, value in reader.settings.items():
            print(f"setting   {key} = {value}")
        for sample in reader.excluded[:20]:
            print(f"excluded  sample {sample}")


def main():
    parser = argparse.ArgumentParser(description="Prints what is in a .beton file.")
    parser.add_argument("file", help="the .beton file")
    try:
        describe(parser.parse_args().file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"essl_loader: {error}") from error


if __name__ == "__main__":
    main()
