"""Turns pictures into a .beton file that ESSL, and FFCV, load.

    python build_beton.py --data-dir imagenet/train --out data/train_500_95.beton
    python build_beton.py --data-dir imagenet/val --out data/val_500_100.beton --quality 100
    python build_beton.py --demo          # draws data/demo_train.beton and data/demo_val.beton
    python build_beton.py --verify data/train_500_95.beton

Pictures lie in class folders (labels as in torchvision's ImageFolder) or all in one folder (label 0). The codecs write
the same JPEG from the same pixels but, as in the paper's Table 5, shrink differently: `turbojpeg` averages areas, as
FFCV does, `pil` is Pillow's bicubic. On two EPYC cores --demo takes 10 s, and 3,200 photos of 500 x 333 pixels 9 s.
Last line: `data/train_500_95.beton: 320 images, 5 classes, 23.8 MB, 0 left out, 3.4 s (95 images/s)`
"""
import argparse
import contextlib
import ctypes
import functools
import io
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from essl_loader import ALLOC, FIELD, HEADER, SAMPLE, BetonReader, load_turbojpeg, tables_checksum

PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # what ImageFolder takes


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-dir", type=Path, help="folder of class folders, or of pictures")
    what.add_argument("--demo", action="store_true", help="draw a small labelled train and val set instead")
    what.add_argument("--verify", type=Path, metavar="FILE", help="check header, tables and every sample of a .beton")
    p.add_argument("--out", type=Path, help="the .beton to write, with --data-dir; a .json goes beside it")
    p.add_argument("--out-dir", type=Path, default=Path("data"), help="folder for --demo's files (default: data)")
    p.add_argument("--max-resolution", type=int, default=500, help="longest side, never enlarged (default: 500)")
    p.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100 (default: 95)")
    p.add_argument("--chroma", choices=("420", "444"), default="420", help="chroma sampling (default: 420)")
    p.add_argument("--codec", choices=("turbojpeg", "pil"), default="turbojpeg",
                   help="turbojpeg: shrinks by area; pil: by bicubic, needs no libjpeg-turbo 3 (default: turbojpeg)")
    p.add_argument("--num-workers", type=int, default=0, help="processes; 0: all usable cores (default: 0)")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable pictures out instead of failing")
    p.add_argument("--limit", type=int, default=0, help="only so many pictures, evenly spread; 0: all (default: 0)")
    words = [word.partition("=") for word in (sys.argv[1:] if argv is None else argv)]
    args = p.parse_args([(w.replace("_", "-") if w.startswith("--") else w) + eq + value for w, eq, value in words])
    if args.data_dir and (args.out is None or args.out.suffix != ".beton"):
        p.error(f"--data-dir needs --out FILE.beton, found --out {args.out}")
    if not (1 <= args.quality <= 100 and 1 <= args.max_resolution <= 65500 and args.num_workers >= 0 <= args.limit):
        p.error("--quality goes from 1 to 100, --max-resolution from 1 to 65500, --num-workers and --limit from 0")
    return args


# --- pictures: found, read, or drawn
def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def find_pictures(folder, seen):
    """Picture files below a folder. Folders in the set `seen` are passed over, so that a loop of links ends."""
    if os.path.realpath(folder) in seen:
        return []
    seen.add(os.path.realpath(folder))
    entries = list(os.scandir(folder))
    found = [entry.path for entry in entries if entry.name.lower().endswith(PICTURES) and not is_folder(entry)]
    return sum((find_pictures(entry.path, seen) for entry in entries if is_folder(entry)), found)


def find_data(folder, limit):
    """(paths, labels, class names) of a folder of class folders, or of pictures. Raises ValueError if one is empty."""
    classes, pairs = sorted(entry.name for entry in os.scandir(folder) if is_folder(entry)), []
    for label, group in enumerate([folder / name for name in classes] or [folder]):
        seen = {os.path.realpath(folder.parent if group == folder else folder)}  # a link back up is a loop
        paths = sorted(find_pictures(group, seen), key=os.path.split)  # ImageFolder's order: by folder, then by name
        if not paths:
            raise ValueError(f"{group} holds no picture ({' '.join(PICTURES)}): remove it, or name another --data-dir")
        pairs += [(path, label) for path in paths]
    limit = min(limit or len(pairs), len(pairs))
    paths, labels = zip(*(pairs[i * len(pairs) // limit] for i in range(limit)))
    return paths, labels, classes or [folder.resolve().name]


def read_picture(path):
    """A picture file as an upright RGB image; drops alpha and frames after the first, as ImageFolder does."""
    if not os.path.isfile(path):
        raise ValueError("not a file")  # a link to nothing, or a named pipe: reading that would hang
    with Image.open(path) as picture:
        picture.load()
        with contextlib.suppress(Exception):  # Pillow raises anything on broken EXIF; the pixels are good all the same
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
    "cross": lambda z: (np.minimum(abs(z.real), abs(z.imag)) < 0.3) & (np.maximum(abs(z.real), abs(z.imag)) < 1),
    "triangle": lambda z: np.max([(z * np.exp(2j * np.pi * k / 3)).imag for k in range(3)], axis=0) < 0.55}
COLOURS = {"red": (220, 50, 40), "yellow": (230, 200, 50), "green": (60, 180, 70), "blue": (50, 100, 225),
           "purple": (170, 70, 200)}
# Five plain and five striped classes: each shape and each colour occurs once among either.
DEMO_CLASSES = [f"{list(COLOURS)[(k + 2 * (k // 5)) % 5]}_{list(SHAPES)[k % 5]}" for k in range(10)]


def draw_picture(job):
    """Picture `index` of set `split`, 96 to 160 pixels a side: a large shape of class index % 10 on shaded ground."""
    rng = np.random.default_rng(job)
    label = job[1] % len(DEMO_CLASSES)
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
@functools.cache
def load_compressor():
    """(library, compressor handle). Raises ImportError if libjpeg-turbo is older than 3 or absent."""
    lib = load_turbojpeg()
    if not hasattr(lib, "tj3Compress8"):
        raise ImportError("libjpeg-turbo 2 cannot write restart intervals: `pip install turbojpeg` brings version 3, "
                          "or use --codec pil")
    lib.tj3Init.restype, lib.tj3GetErrorStr.restype = ctypes.c_void_p, ctypes.c_char_p
    return lib, ctypes.c_void_p(lib.tj3Init(0))  # TJINIT_COMPRESS


def compress(picture, codec, quality, chroma):
    """An RGB image as baseline JPEG bytes with optimised Huffman tables and restart markers."""
    mcus = -(-picture.width // (16 if chroma == "420" else 8))  # in a row
    # A divisor, so that intervals line up in columns; nearest to 3 or 4: file size against what a crop can skip.
    interval = min((k for k in range(1, mcus + 1) if mcus % k == 0), key=lambda k: (max(3 - k, k - 4, 0), -k))
    if codec == "pil":
        buffer = io.BytesIO()
        picture.info.clear()  # save() would copy the comment of the file that was read
        picture.save(buffer, "JPEG", quality=quality, subsampling={"420": "4:2:0", "444": "4:4:4"}[chroma],
                     optimize=True, restart_marker_blocks=interval)
        return buffer.getvalue()
    lib, handle = load_compressor()
    for parameter, value in (3, quality), (4, 2 if chroma == "420" else 0), (11, 1), (18, interval):
        lib.tj3Set(handle, parameter, value)  # TJPARAM_QUALITY, _SUBSAMP (TJSAMP_420, _444), _OPTIMIZE, _RESTARTBLOCKS
    buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
    if lib.tj3Compress8(handle, picture.tobytes(), picture.width, 0, picture.height, 0,  # pitch 0: packed; TJPF_RGB
                        ctypes.byref(buffer), ctypes.byref(size)):
        raise ValueError(lib.tj3GetErrorStr(handle).decode())
    jpeg = ctypes.string_at(buffer, size.value)
    lib.tj3Free(buffer)
    return jpeg


def checksum_segment(rest):
    """The JPEG comment that follows SOI in our files: the crc32 of all that comes after it, 14 bytes in all."""
    return b"\xff\xfe\x00\x0cESSL" + zlib.crc32(rest).to_bytes(4, "big") + b"\0\0"


def encode_sample(get_picture, settings, job):
    """(JPEG bytes, width, height) of the picture get_picture(job), or the reason why there is none, as a string."""
    codec, quality, chroma, longest = (settings[key] for key in ("codec", "quality", "chroma", "max_resolution"))
    try:
        picture = get_picture(job)
        if max(picture.size) > longest:
            size = [max(1, round(side * longest / max(picture.size))) for side in picture.size]
            picture = picture.resize(size, Image.Resampling.BOX if codec == "turbojpeg" else Image.Resampling.BICUBIC)
        jpeg = compress(picture, codec, quality, chroma)
    except Exception as error:  # Pillow raises anything on a damaged file; whatever it is, it is listed
        return str(error) or type(error).__name__
    return jpeg[:2] + checksum_segment(jpeg[2:]) + jpeg[2:], *picture.size


# --- worker processes
def serve(work, jobs, pipe):
    """A worker process: sends work(job) for its jobs, up to 32 results ahead of what the parent has taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    warnings.simplefilter("ignore")  # Pillow's, on EXIF and palettes that it can live with
    ahead = queue.Queue(32)  # so that a slow picture in one worker does not idle the others

    def send():
        try:
            for _ in jobs:
                pipe.send(ahead.get())
        except OSError:
            os._exit(1)  # the parent has gone
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for job in jobs:
        ahead.put(work(job))
    sender.join()


def in_order(work, jobs, num_workers):
    """Yields work(job) for every job, in order, from num_workers processes (0: one per usable core).

    Each has a pipe of its own, so that a killed one shows as an end of file even in the middle of a result, where
    concurrent.futures, which shares one pipe, would wait for ever. Raises RuntimeError then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numba", "PIL.Image"])  # imported once, not in each worker
    n, workers, pipes = min(num_workers or len(os.sched_getaffinity(0)), len(jobs)), [], []
    try:
        for rank in range(n):
            pipe, end = context.Pipe(duplex=False)
            workers.append(context.Process(target=serve, args=(work, jobs[rank::n], end), daemon=True))
            workers[-1].start()
            pipes.append(pipe)
            end.close()
        for i in tqdm(range(len(jobs)), unit=" images", disable=None):  # None: a bar on a terminal only
            try:
                result = pipes[i % n].recv()
            except (EOFError, OSError):
                raise RuntimeError(f"a worker process died at or soon after {jobs[i]}; if memory ran out, use fewer "
                                   f"--num-workers") from None
            yield result
    finally:
        for worker in workers:
            worker.kill()


# --- file
@contextlib.contextmanager
def write_aside(path):
    """A file that takes its name only when it is complete and on the disk, and otherwise leaves nothing behind."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_beton(out, get_picture, jobs, labels, classes, settings, skip_bad, num_workers):
    """Encodes jobs into `out` and its sidecar. Raises ValueError if one is bad, or with skip_bad if all are."""
    start, page, bad = time.monotonic(), 8 << 20, []  # FFCV's default page
    samples, alloc = np.zeros(len(jobs), SAMPLE), np.zeros(len(jobs), ALLOC)
    n, end = 0, HEADER.itemsize + 2 * FIELD.itemsize + samples.nbytes
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(out) as file:
        results = in_order(functools.partial(encode_sample, get_picture, settings), jobs, num_workers)
        for job, label, result in zip(jobs, labels, results):
            if isinstance(result, str):
                bad.append((str(job), result))
            elif skip_bad or not bad:  # else nothing will come of the file, but the other bad pictures are to be named
                jpeg, width, height = result
                while len(jpeg) > page:
                    page *= 2  # what is placed crosses no boundary of the larger pages either
                if end // page != (end + len(jpeg) - 1) // page:
                    end = -(-end // page) * page
                samples[n], alloc[n] = (0, width, height, end, label), (n, end, len(jpeg))
                file.seek(end)
                file.write(jpeg)
                n, end = n + 1, end + len(jpeg)
        print_faults(bad)
        if bad and not (skip_bad and n):
            raise ValueError(f"{len(bad):,} of {len(jobs):,} pictures cannot be read, as listed above; {out} was not "
                             f"written: repair or remove them{', or leave them out with --skip-bad' * (not skip_bad)}")
        samples, alloc = samples[:n], alloc[:n]
        header = np.array((2, 2, page, n, end), HEADER)
        settings = settings | {"checksum": tables_checksum(header, settings, samples, alloc)}
        fields = np.array([(2, b"image", json.dumps(settings).encode()), (1, b"label", b"")], FIELD)
        file.seek(end)
        file.write(alloc.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        with write_aside(out.with_suffix(".json")) as sidecar:
            left_out = [{"file": name, "reason": reason} for name, reason in bad]
            sidecar.write(json.dumps({"classes": classes, "num_samples": n, "settings": settings,
                                      "left_out": left_out}, indent=1).encode())
    seconds, size = time.monotonic() - start, out.stat().st_size / 1e6
    print(f"{out}: {n:,} images, {len(classes)} classes, {size:,.1f} MB, {len(bad):,} left out, {seconds:.1f} s "
          f"({len(jobs) / seconds:,.0f} images/s)")


def print_faults(faults):
    for name, reason in faults[:20]:
        print(f"{name}: {reason}", file=sys.stderr)
    if len(faults) > 20:
        print(f"... and {len(faults) - 20:,} more", file=sys.stderr)


# --- verification
open_reader = functools.cache(BetonReader)  # once per worker process


def find_fault(path, i):
    """What is wrong with sample i of a .beton, or None."""
    try:
        reader = open_reader(path)
        jpeg = reader.read(i)
        if reader.settings and jpeg[2:16] != checksum_segment(jpeg[16:]):
            return "its bytes do not match their checksum"
        reader.image(i)
    except (OSError, ValueError) as error:
        return str(error)


def verify(path, num_workers):
    """Checks header, tables, checksums and every sample of a .beton. Raises ValueError that says what is wrong."""
    start, reader = time.monotonic(), BetonReader(path)
    found = in_order(functools.partial(find_fault, path), range(reader.num_samples), num_workers)
    faults = [(f"sample {i}", fault) for i, fault in enumerate(found) if fault]
    print_faults(faults)
    if faults:
        raise ValueError(f"{path}: {len(faults):,} of {reader.num_samples:,} samples are damaged, as listed above: "
                         f"copy it again from where it is whole, or build it again")
    print(f"{path}: {reader.num_samples:,} samples verified, {time.monotonic() - start:.1f} s"
          f"{'' if reader.settings else ' (a file of FFCV: decoded only, it has no checksums)'}")


def main(args):
    def stop(number, frame):
        raise SystemExit(f"build_beton: stopped by {signal.Signals(number).name}, nothing was written")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, stop)
    settings = {"essl": 1, "max_resolution": args.max_resolution, "quality": args.quality, "chroma": args.chroma,
                "codec": args.codec, "restart": 1}
    try:
        if args.verify:
            return verify(args.verify, args.num_workers)
        if args.codec == "turbojpeg":
            load_compressor()  # if it is missing, one error here instead of one per picture
        if args.data_dir:
            return write_beton(args.out, read_picture, *find_data(args.data_dir, args.limit), settings, args.skip_bad,
                               args.num_workers)
        for split, (name, size) in enumerate((("train", 1000), ("val", 200))):
            jobs = [(split, i) for i in range(min(size, args.limit or size))]
            write_beton(args.out_dir / f"demo_{name}.beton", draw_picture, jobs, [i % 10 for _, i in jobs],
                        DEMO_CLASSES, settings, args.skip_bad, args.num_workers)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        advice = "; nothing was written: check that path, its permissions and the space left there"
        raise SystemExit(f"build_beton: {error}{advice * bool(getattr(error, 'errno', 0))}") from error


if __name__ == "__main__":
    main(get_args())
