"""Shows that all of it holds: `pytest test_all.py`, some minutes on two cores, no GPU and no download.

Tests draw their own pictures; with DAILYMAE_PHOTOS naming a folder of class folders they use real photos as well.
Everything is compared with something independent: Pillow, stock ffcv, torch in float64, the paper's tables.
`pytest test_all.py -m soak` runs the long ones instead: dozens of kills, thousands of damaged files, full disks.
"""
import ctypes
import gc
import io
import itertools
import json
import math
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

import numba
import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import essl_loader
import finetune
import linprobe
import models_mae
import pretrain
import schedules
from essl_loader import HEADER, BetonReader, DataError, ESSLLoader, FolderLoader, center_box, random_box, uniform
from models_mae import ViT, WeightsError, load_encoder, read_weights, size_of, vit_settings
from schedules import lr_at

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
HERE = Path(__file__).resolve().parent
PHOTOS = os.environ.get("DAILYMAE_PHOTOS")


@pytest.fixture(autouse=True)
def soak_when_asked(request):
    """Skips what is marked soak unless -m asks for it."""
    if request.node.get_closest_marker("soak") and "soak" not in request.config.option.markexpr:
        pytest.skip("long: pytest test_all.py -m soak")


# --- pictures and files to test on
def draw(rng, width, height):
    """A smooth picture with an edge in it: what a photo is to a JPEG codec."""
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture.paste(tuple(rng.integers(60, 200, 3).tolist()), (width // 3, height // 4, width // 2 + 1, height // 2 + 1))
    return picture.filter(ImageFilter.GaussianBlur(1.5))


def encode(picture, subsampling=2, restart=True, quality=95):
    """JPEG bytes from Pillow; restart: none, one that divides the row as build_beton.py's, or one of so many MCUs."""
    out, across = io.BytesIO(), -(-picture.width // (16 if subsampling else 8))
    k = min((d for d in range(1, across + 1) if across % d == 0), key=lambda d: min(abs(d - 3), abs(d - 4)))
    k = k if restart is True else restart
    picture.save(out, "JPEG", quality=quality, subsampling=subsampling, optimize=True,
                 **({"restart_marker_blocks": k} if restart else {}))
    return out.getvalue()


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def write_beton(path, items):
    """A .beton of (mode, width, height, bytes), written from the format notes alone; sample i has label i."""
    page, n = 8 << 20, len(items)
    header, fields = np.zeros(1, essl_loader.HEADER), np.zeros(2, essl_loader.FIELD)
    samples, alloc = np.zeros(n, essl_loader.SAMPLE), np.zeros(n, essl_loader.ALLOC)
    fields["type_id"], fields["name"] = [2, 1], [b"image", b"label"]
    at, data = page, bytearray()
    for i, (mode, width, height, blob) in enumerate(items):
        if at // page != (at + len(blob) - 1) // page:
            data += bytes(page - at % page)
            at += page - at % page
        samples[i], alloc[i] = (mode, width, height, at, i), (i, at, len(blob))
        data += blob
        at += len(blob)
    end = -(-at // page) * page
    header[0] = (2, 2, page, n, end)
    with open(path, "wb") as f:
        f.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        f.seek(page)
        f.write(data)
        f.seek(end)
        f.write(alloc.tobytes())
    return path


@pytest.fixture
def stock_ffcv():
    """For tests with stock FFCV in this process, which alters numba's shared type of byte arrays in place (os_cache.py,
    `t1.mutable = False`): nothing of ours that takes such an array could be called afterwards. Takes that back."""
    before = [t for t in gc.get_objects() if isinstance(t, numba.types.Array) and t.mutable]
    yield
    for t in before:
        t.mutable = True


@pytest.fixture(scope="session")
def beton(tmp_path_factory):
    """40 pictures of many sizes: 4:2:0, 4:4:4 and gray, with and without restart markers, two raw."""
    rng, items = np.random.default_rng(1), []
    for i in range(40):
        picture = draw(rng, int(rng.integers(50, 400)), int(rng.integers(50, 400)))
        jpeg = encode(picture.convert("L") if i % 10 == 9 else picture, 0 if i % 4 == 3 else 2, i % 3 > 0)
        if i == 14:  # not baseline: decoded whole, by libjpeg-turbo
            picture.save(progressive := io.BytesIO(), "JPEG", quality=95, progressive=True)
            jpeg = progressive.getvalue()
        items.append((0, *picture.size, jpeg) if i % 20 != 5 else (1, *picture.size, np.asarray(picture).tobytes()))
    path = write_beton(tmp_path_factory.mktemp("beton") / "mixed.beton", items)
    return path, items


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 2 x 32 drawn pictures for training and 2 x 8 to hold out, as folders and as .beton files."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(2)
    for part, count in (("train", 32), ("val", 8)):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = draw(rng, int(rng.integers(40, 90)), int(rng.integers(40, 90)))
                picture.point(lambda v: v // 2 + 127 * c).save(root / part / name / f"{i}.png")
        done = script("build_beton.py", "--data-dir", root / part, "--out", root / f"{part}.beton")
        assert done.returncode == 0, done.stderr
    return root


def script(name, *words, env=(), **kwargs):
    """Runs a script as a user would, one thread a process; its errors are never a traceback."""
    done = subprocess.run([sys.executable, HERE / name, *map(str, words)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}, **kwargs)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refused(done, *words):
    """A refusal: exit code 1 or 2 and one paragraph that has the words in it."""
    assert done.returncode in (1, 2), done.stdout + done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr


# --- build_beton
def build(folder, out, *words, code=0):
    """build_beton.py from a folder into a file, with the exit code that is expected."""
    done = script("build_beton.py", "--data-dir", folder, "--out", out, *words)
    assert done.returncode == code, done.stderr
    return done


def texture(w, h, seed=0):
    """(h, w, 3) smooth colours with some detail, the like of a photo."""
    rng, y, x = np.random.default_rng(seed), np.arange(h)[:, None], np.arange(w)
    waves = [128 + 60 * np.sin(x / a + y / b) + 30 * np.sin(x / 3 + y * c) for a, b, c in rng.uniform(0.3, 40, (3, 3))]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def every_mode(tmp_path_factory):
    """Two classes of pictures in every mode, of odd sizes, one of them in a folder of its own."""
    root = tmp_path_factory.mktemp("pictures")
    for name in "b/deep", "a":
        (root / name).mkdir(parents=True)
    picture = Image.fromarray(texture(301, 203))
    picture.save(root / "a/1.png")
    picture.convert("L").save(root / "a/2.jpg", quality=95)
    picture.convert("CMYK").save(root / "a/3.JPEG", quality=95)
    picture.quantize(64).save(root / "a/4.png", transparency=0)
    picture.convert("RGBA").save(root / "a/5.webp", lossless=True)
    Image.fromarray(texture(301, 203)[..., 0].astype(np.uint16) * 257).save(root / "a/6.png")
    Image.fromarray(texture(1, 1)).save(root / "b/7.bmp")
    Image.fromarray(texture(17, 900)).save(root / "b/8.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "b/deep/9.png", exif=exif)
    (root / "b/notes.txt").write_text("not a picture, and not named like one")
    os.symlink(root, root / "b/deep/loop")
    return root


def scan(jpeg):
    """{marker: payload} of a JPEG's header segments, read from the specification's layout (T.81, annex B)."""
    at, segments = 2, {}
    while jpeg[at + 1] != 0xDA:
        size = int.from_bytes(jpeg[at + 2:at + 4], "big")
        segments.setdefault(jpeg[at + 1], b"")
        segments[jpeg[at + 1]] += jpeg[at + 4:at + 2 + size]
        at += 2 + size
    return segments


def test_build_reads_every_mode_as_pillow(every_mode, tmp_path):
    """Labels follow ImageFolder, and each picture is Pillow's conversion, upright, to within JPEG's own loss."""
    build(every_mode, tmp_path / "x.beton", "--quality", 100, "--chroma", "444")
    reader = BetonReader(tmp_path / "x.beton")
    assert reader.classes == ["a", "b"] and list(reader.labels) == [0] * 6 + [1] * 3 and reader.num_samples == 9
    rgb = texture(301, 203)
    grey16 = np.repeat(rgb[..., :1], 3, -1)
    for i, (name, expected) in enumerate({"a/1.png": rgb, "a/2.jpg": None, "a/3.JPEG": None, "a/4.png": None,
                                          "a/5.webp": rgb, "a/6.png": grey16, "b/7.bmp": None, "b/8.png": None,
                                          "b/deep/9.png": np.rot90(rgb, -1)}.items()):
        if expected is None:
            picture = Image.open(every_mode / name).convert("RGB")
            if max(picture.size) > 500:
                picture = picture.resize((9, 500), Image.Resampling.BOX)
            expected = np.asarray(picture)
        got = reader.image(i)
        assert got.shape == expected.shape and abs(got.astype(int) - expected).mean() < 1.5, name


@pytest.mark.parametrize("codec", ["turbojpeg", "pil"])
@pytest.mark.parametrize("chroma", ["420", "444"])
def test_build_jpeg_is_as_designed(every_mode, tmp_path, codec, chroma):
    """Baseline, Pillow's tables and pixels, the chroma and restart interval asked for, optimised Huffman tables."""
    build(every_mode, tmp_path / "x.beton", "--codec", codec, "--chroma", chroma, "--max-resolution", 300, "--quality", 90)
    reader = BetonReader(tmp_path / "x.beton")
    assert (reader.widths[0], reader.heights[0]) == (300, 202)
    stored, plain = reader.read(0), io.BytesIO()
    filters = {"turbojpeg": Image.Resampling.BOX, "pil": Image.Resampling.BICUBIC}
    Image.fromarray(texture(301, 203)).resize((300, 202), filters[codec]).save(
        plain, "JPEG", quality=90, subsampling={"420": "4:2:0", "444": "4:4:4"}[chroma])
    ours, theirs = scan(stored), scan(plain.getvalue())
    assert ours[0xC0] == theirs[0xC0] and ours[0xDB] == theirs[0xDB] and ours[0xC4] != theirs[0xC4]
    interval = {"420": 1, "444": 2}[chroma]  # 19 MCUs a row have the divisors 1 and 19; 38 also 2
    assert int.from_bytes(ours[0xDD], "big") == interval and ours[0xFE][:4] == b"ESSL"
    assert np.array_equal(Image.open(io.BytesIO(stored)), Image.open(io.BytesIO(plain.getvalue())))


def test_build_bytes_do_not_depend_on_workers(every_mode, tmp_path):
    """One worker and three write the same file, and underscores in flags are as good as hyphens."""
    for n in 1, 3:
        build(every_mode, tmp_path / f"{n}.beton", "--num_workers", n)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()


@pytest.mark.parametrize("os_cache", [True, False])
def test_build_opens_in_ffcv(tmp_path, os_cache, stock_ffcv):
    """FFCV's Loader reads our file as BetonReader does, with samples of more than a page and a left-out one."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    source, out, side = tmp_path / "pictures", tmp_path / "x.beton", 2100
    for i in range(4):  # smooth, noise, smooth, noise: noise takes 10 MB, so that pages grow to 16 MiB on the way
        (source / str(i)).mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(noise if i % 2 else texture(side, side, i)).save(source / f"{i}/x.bmp")
    (source / "1/bad.jpg").write_text("text")
    build(source, out, "--chroma", "444", "--max-resolution", 4000, "--skip-bad")
    loader = Loader(str(out), batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache,
                    pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
    got = [(image.copy(), int(label)) for images, labels in loader for image, label in zip(images, labels.ravel())]
    assert loader.reader.page_size == 16 << 20 and [label for _, label in got] == [0, 1, 2, 3]
    reader = BetonReader(out)  # FFCV decodes with the fast DCT, hence the tolerance
    assert all(abs(reader.image(i).astype(np.int16) - image).mean() < 2 for i, (image, _) in enumerate(got))


def test_build_names_every_bad_picture(every_mode, tmp_path):
    """All bad pictures are named at once and nothing is written; --skip-bad leaves them out and says so."""
    source = tmp_path / "pictures"
    source.mkdir()
    data = (every_mode / "a/2.jpg").read_bytes()
    bad = {"empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": data[:len(data) // 2],
           "cut.png": (every_mode / "a/1.png").read_bytes()[:2000]}
    for name, content in bad.items():
        (source / name).write_bytes(content)
    os.symlink("nowhere", source / "link.jpg")
    os.mkfifo(source / "pipe.jpg")
    (source / "good.jpg").write_bytes(data)
    names = {*bad, "link.jpg", "pipe.jpg"}
    done = build(source, tmp_path / "x.beton", code=1)
    assert all(f"{source / name}: " in done.stderr for name in names) and "--skip-bad" in done.stderr
    assert os.listdir(tmp_path) == ["pictures"]
    assert "6 left out" in build(source, tmp_path / "x.beton", "--skip-bad").stdout
    sidecar = json.loads((tmp_path / "x.json").read_text())
    assert {Path(entry["file"]).name for entry in sidecar["left_out"]} == names and sidecar["num_samples"] == 1


def test_build_refuses_in_words(tmp_path):
    """A missing or empty folder and an output that cannot be written end with one paragraph and code 1."""
    (tmp_path / "none").mkdir()
    assert "holds no picture" in build(tmp_path / "none", tmp_path / "x.beton", code=1).stderr
    assert "No such file" in build(tmp_path / "missing", tmp_path / "x.beton", code=1).stderr
    Image.fromarray(texture(8, 8)).save(tmp_path / "none/1.png")
    assert "permissions" in build(tmp_path / "none", tmp_path / "none/1.png/x.beton", code=1).stderr
    assert os.listdir(tmp_path) == ["none"]
    build(tmp_path / "none", tmp_path / "x.beton", "--quality", 101, code=2)


@pytest.mark.parametrize("who, number", [("worker", signal.SIGKILL), ("parent", signal.SIGTERM),
                                         ("parent", signal.SIGINT)])
def test_build_killed_leaves_nothing(tmp_path, who, number):
    """A killed worker or a stopped build ends with code 1 and leaves no file and no process."""
    source = tmp_path / "pictures"
    source.mkdir()
    Image.fromarray(texture(1500, 1500)).save(source / "0.png")
    for i in range(1, 400):
        os.link(source / "0.png", source / f"{i}.png")
    build = subprocess.Popen([sys.executable, HERE / "build_beton.py", "--data-dir", source, "--out", tmp_path / "x.beton", "--num-workers", "2"],
                             stderr=subprocess.PIPE, text=True, start_new_session=True)

    def family(pid):
        """The process ids below one that run."""
        below = [int(p) for t in Path(f"/proc/{pid}/task").glob("*") for p in (t / "children").read_text().split()]
        return below + [q for p in below for q in family(p)]
    while not any(p.stat().st_size > 200_000 for p in tmp_path.glob(".x.beton.tmp-*")):
        time.sleep(0.05)
        assert build.poll() is None, build.stderr.read()
    processes = family(build.pid)
    os.kill(processes[-1] if who == "worker" else build.pid, number)
    errors = build.communicate(timeout=60)[1]
    assert build.returncode == 1 and ("died" if who == "worker" else number.name) in errors and "Trace" not in errors
    assert os.listdir(tmp_path) == ["pictures"]
    for _ in range(100):
        if not any(Path(f"/proc/{p}").exists() for p in processes):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in processes)


def test_build_verify_finds_one_flipped_bit(every_mode, tmp_path):
    """--verify passes a good file, and names the sample of any flipped bit and any damage to the tables."""
    out = tmp_path / "x.beton"
    build(every_mode, out)
    assert "9 samples verified" in script("build_beton.py", "--verify", out).stdout
    reader, whole = BetonReader(out), out.read_bytes()
    damaged = bytearray(whole)
    for i, at in (1, 9), (4, 40), (8, -1):  # in the checksum itself, in the header, in the last byte
        damaged[reader.ptrs[i] + at % reader.sizes[i]] ^= 1
    out.write_bytes(damaged)
    done = script("build_beton.py", "--verify", out)
    assert done.returncode == 1 and "3 of 9" in done.stderr
    assert all(f"sample {i}: " in done.stderr for i in (1, 4, 8))
    out.write_bytes(whole[:2110] + bytes([whole[2110] ^ 1]) + whole[2111:])
    done = script("build_beton.py", "--verify", out)
    assert done.returncode == 1 and "checksum" in done.stderr
    settings, samples = 24 + 17, 24 + 2 * 1041  # offsets of the build settings and of the samples' table
    text = len(whole[settings:settings + 1024].rstrip(b"\0"))
    for at in (*range(24), *range(settings, settings + text), *range(samples, samples + 9 * 24), *range(-9 * 24, 0)):
        at %= len(whole)
        out.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(DataError, match="x.beton"):  # any bit of header, settings and tables
            BetonReader(out)


def test_build_demo_draws_the_same_again(tmp_path):
    """--demo writes ten balanced classes, byte for byte the same each time, and other pictures for validation."""
    for name in "one", "two":
        assert script("build_beton.py", "--demo", "--out-dir", tmp_path / name, "--limit", 20).returncode == 0
    train, val = ((tmp_path / "one" / f"demo_{split}.beton") for split in ("train", "val"))
    assert train.read_bytes() == (tmp_path / "two/demo_train.beton").read_bytes() != val.read_bytes()
    reader = BetonReader(val)
    assert np.bincount(reader.labels).tolist() == [2] * 10 and len(set(reader.classes)) == 10


# --- essl_loader
def planes_of(jpeg, width, height, subsampling):
    """Y, Cb, Cr of the whole picture by libjpeg-turbo's tjDecompressToYUVPlanes, called with plain ctypes."""
    lib = essl_loader.load_turbojpeg()
    lib.tjInitDecompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(lib.tjInitDecompress())
    h, v = {2: (2, 2), 1: (2, 1), 0: (1, 1), "gray": (1, 1)}[subsampling]
    shapes = [(-(-height // v) * v, -(-width // h) * h)] + [(-(-height // v), -(-width // h))] * (subsampling != "gray") * 2
    planes = [np.zeros(shape, np.uint8) for shape in shapes]
    pointers = (ctypes.c_void_p * 3)(*[p.ctypes.data for p in planes])
    assert lib.tjDecompressToYUVPlanes(handle, jpeg, ctypes.c_ulong(len(jpeg)), pointers, 0, None, 0, 0) == 0
    lib.tjDestroy(handle)
    return planes


@pytest.mark.parametrize("subsampling", [2, 0, 1, "gray"])
@pytest.mark.parametrize("restart", [True, False, 7])
def test_loader_crop_decode_equals_crop_of_full_decode(tmp_path, subsampling, restart):
    """Random boxes, odd sizes, every sampling: at most one level from libjpeg-turbo's full decode, edges included."""
    rng, items = np.random.default_rng(3), []
    for width, height in [(1, 1), (1000, 3), (3, 1000), (17, 16), (33, 31), (368, 200), (333, 250), (65, 129), (1100, 40)]:
        noise = Image.fromarray(rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8))
        picture = noise.resize((width, height), Image.Resampling.BICUBIC)
        jpeg = encode(*((picture.convert("L"), 0) if subsampling == "gray" else (picture, subsampling)), restart,
                      quality=(95, 30, 100)[len(items) % 3])
        items.append((0, width, height, jpeg))
    reader = BetonReader(write_beton(tmp_path / "sizes.beton", items))
    for i, (_, width, height, jpeg) in enumerate(items):
        scratch = essl_loader.make_scratch(*np.array([[len(jpeg)], [width], [height]]), 8)
        stored, full = np.frombuffer(bytearray(jpeg), np.uint8), planes_of(jpeg, width, height, subsampling)
        for trial in range(15):
            x, y = (int(rng.integers(width)), int(rng.integers(height))) if trial else (0, 0)
            w, h = (int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))) if trial else (width, height)
            assert essl_loader.decode_planes(stored, len(jpeg), width, height, x, y, w, h, scratch) == essl_loader.OK
            for (at, stride, x0, y0, sx, sy), expected in zip(scratch.plane, full):
                top, bottom, left, right = y // sy, -(-(y + h) // sy), x // sx, -(-(x + w) // sx)
                rows = (np.arange(top, bottom) - y0 // sy)[:, None]
                got = scratch.planes[at + rows * stride + np.arange(left, right) - x0 // sx]
                worst = np.abs(got.astype(int) - expected[top:bottom, left:right]).max()
                assert worst <= 1, ((width, height), (x, y, w, h), worst)
            assert np.abs(reader.image(i, (x, y, w, h)) - pixels(jpeg).astype(int)[y:y + h, x:x + w]).max() <= 1


def compare_with_pillow(loader, picture_of, res, seed):
    """Mean and signed difference in levels, and the shift in pixels that would explain it, over one epoch."""
    interpolation = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[loader.interpolation]
    positions, images = loader._positions(), torch.cat([images for images, _ in loader])
    means, shifts = [], []
    for row, p in zip(images.permute(0, 2, 3, 1).numpy(), positions):
        picture = picture_of(p)
        if loader.train:
            x, y, w, h = random_box(*picture.size, loader.scale, loader.ratio, seed, 0, p)
        else:
            x, y, w, h = center_box(*picture.size, loader.crop_ratio)
        expected = picture.crop((x, y, x + w, y + h)).resize((res, res), interpolation)
        if loader.train and uniform(seed, 0, p, essl_loader.FLIP_DRAW) < loader.hflip:
            expected = ImageOps.mirror(expected)
        expected = np.asarray(expected).astype(float)
        means.append(np.abs(row - expected).mean())
        slopes = np.gradient(expected, axis=1), np.gradient(expected, axis=0)
        shifts += [((row - expected) * s).sum() / max(1.0, (s * s).sum()) for s in slopes]
    return np.array(means), np.array(shifts)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_loader_sample_path_equals_pillow(beton, interpolation, train):
    """Decode, crop, resize, flip: mean difference under one level and no shift, at several resolutions."""
    path, items = beton
    for res in (224, 160, 65):
        loader = ESSLLoader(path, 16, train, res=res, interpolation=interpolation, seed=4, drop_last=False)
        means, shifts = compare_with_pillow(loader, lambda p: Image.fromarray(np.frombuffer(items[p][3], np.uint8).reshape(
            items[p][2], items[p][1], 3) if items[p][0] else pixels(items[p][3])), res, 4)
        assert len(means) == 40 and means.max() < 1 and np.abs(shifts).max() < 0.1, (means.max(), np.abs(shifts).max())


@pytest.mark.skipif(not PHOTOS, reason="DAILYMAE_PHOTOS names no folder of photos")
def test_loader_equals_pillow_on_photos(tmp_path):
    """The same on real photos built with build_beton.py: mean difference under one level over all of them."""
    done = script("build_beton.py", "--data-dir", PHOTOS, "--out", tmp_path / "photos.beton", "--limit", 40)
    assert done.returncode == 0, done.stderr
    for interpolation in ("bicubic", "bilinear"):
        loader = ESSLLoader(tmp_path / "photos.beton", 16, interpolation=interpolation, seed=4, drop_last=False)
        means, shifts = compare_with_pillow(loader, lambda p: Image.fromarray(pixels(loader.reader.read(p))), 224, 4)
        assert means.mean() < 1 and np.abs(np.mean(shifts)) < 0.01, (means.mean(), np.mean(shifts))


def epochs_of(loader, count=2):
    return [(images.clone(), labels) for _ in range(count) for images, labels in loader]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, theirs))


def test_loader_same_bytes_for_any_threads_and_after_resume(beton):
    """1, 2 and 4 threads, and a state loaded in mid-epoch, give the same batches byte for byte; epochs differ."""
    def loader(threads):
        return ESSLLoader(beton[0], 8, num_workers=threads, res=96, seed=5)
    expected = epochs_of(loader(1))
    assert same(epochs_of(loader(2)), expected) and same(epochs_of(loader(4)), expected)
    assert not same(expected[:5], expected[5:])
    first, resumed = loader(2), loader(3)
    for i, _ in enumerate(first):
        if i == 2:
            break
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(ValueError, match="order"):
        ESSLLoader(beton[0], 8, seed=5, order="pages").load_state_dict(first.state_dict())
    assert same(epochs_of(resumed), expected[3:])
    halves = [ESSLLoader(beton[0], 4, res=96, seed=5, rank=r, world_size=2) for r in range(2)]  # other world, same total
    for half in halves:
        half.load_state_dict(first.state_dict())
    both = [next(iter(half)) for half in halves]
    assert torch.equal(torch.stack([both[0][0], both[1][0]], 1).flatten(0, 1), expected[3][0])


def test_loader_ranks_partition_an_epoch(beton):
    """Two ranks share an epoch without overlap, in another order each epoch; evaluation visits each sample once."""
    seen = [[torch.cat([labels for _, labels in ESSLLoader(beton[0], 5, train, res=32, rank=r, world_size=w)]).tolist()
             for r in range(w)] for train, w in ((True, 2), (False, 3))]
    assert sorted(sum(seen[0], [])) == list(range(40)) == sorted(sum(seen[1], []))
    assert [len(s) for s in seen[1]] == [14, 13, 13]
    loader = ESSLLoader(beton[0], 40, res=32)
    orders = [labels.tolist() for _ in range(3) for _, labels in loader]
    assert len({tuple(o) for o in orders}) == 3 and all(sorted(o) == list(range(40)) for o in orders)


def test_loader_stage_change_compiles_nothing(beton):
    """set_stage takes effect at the next epoch, at run time: the kernel keeps its one compiled signature."""
    loader = ESSLLoader(beton[0], 8, res=64)
    shapes = [next(iter(loader))[0].shape]
    compiled = len(essl_loader.fill.signatures)
    loader.set_stage(res=96, scale=(0.5, 1.0))
    shapes.append(next(iter(loader))[0].shape)
    assert shapes == [(8, 3, 64, 64), (8, 3, 96, 96)] and len(essl_loader.fill.signatures) == compiled


def test_loader_batches_are_channels_last_and_stay(beton):
    """uint8 in channels_last memory, int64 labels; a batch that is kept is not overwritten by later ones."""
    kept = list(ESSLLoader(beton[0], 4, res=48, num_workers=2))
    again = epochs_of(ESSLLoader(beton[0], 4, res=48, num_workers=2), 1)
    assert kept[0][0].dtype == torch.uint8 and kept[0][1].dtype == torch.int64
    assert kept[0][0].is_contiguous(memory_format=torch.channels_last) and same(kept, again)


def test_loader_leaving_early_frees_threads(beton):
    """Breaking out of an epoch, closing and dropping a loader leave no thread behind; a closed loader says so."""
    before = threading.active_count()
    for _ in range(20):
        loader = ESSLLoader(beton[0], 4, res=48, num_workers=3)
        for _ in loader:
            break
        loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


def test_loader_closed_under_way_says_so(beton):
    """The next batch of a loader that was closed in mid-epoch is an error, not a wait for threads that are gone."""
    loader, raised = ESSLLoader(beton[0], 4, res=48, num_workers=2), []
    batches = iter(loader)
    next(batches)
    loader.close()

    def read_on():
        try:
            next(batches)
        except RuntimeError as e:
            raised.append(str(e))
    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    reader.join(20)
    assert raised and "closed" in raised[0]


def test_loader_refuses_a_fork(beton):
    """A loader, and an iteration under way, say in a forked child that they belong to the parent, who goes on."""
    loader = ESSLLoader(beton[0], 4, res=48, num_workers=2)
    batches = iter(loader)
    next(batches)
    if (child := os.fork()) == 0:
        told = 0
        for read in (lambda: next(batches), lambda: next(iter(loader))):
            try:
                read()
            except RuntimeError as e:
                told += "its fork" in str(e)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert len(list(batches)) == 9


def test_loader_takes_the_next_good_sample_when_asked(beton, folder, tmp_path):
    """skip_bad: the row of a damaged sample is the next good one's of the order, counted and named; without it, an error."""
    items = list(beton[1])
    for i, mend in ((7, False), (8, False), (20, False), (7, True), (8, True), (20, True)):
        mode, w, h, blob = beton[1][i]
        items[i] = items[9 if i < 9 else 21] if mend else (mode, w, h, blob[:len(blob) // 2])
        if i == 20:
            write_beton(tmp_path / ("mended.beton" if mend else "bad.beton"), items)
    batches = list(loader := ESSLLoader(tmp_path / "bad.beton", 16, train=False, res=64, skip_bad=True, num_workers=2))
    mended = list(ESSLLoader(tmp_path / "mended.beton", 16, train=False, res=64))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, mended))
    assert torch.cat([y for _, y in batches]).tolist() == [9 if i in (7, 8) else 21 if i == 20 else i for i in range(40)]
    assert loader.num_replaced == 3 and loader.bad_samples.keys() == {7, 8, 20}
    assert set(loader.new_bad_samples()) == {f"{tmp_path / 'bad.beton'}: sample {i}" for i in (7, 8, 20)}
    assert not loader.new_bad_samples() and all("damaged" in reason for reason in loader.bad_samples.values())
    with pytest.raises(DataError, match="sample 7.*skip"):
        list(ESSLLoader(tmp_path / "bad.beton", 16, train=False, res=64))
    with pytest.raises(DataError, match="skip"):  # no good one at all
        list(ESSLLoader(tmp_path / "bad.beton", 2, train=False, res=64, skip_bad=True, indices=[7, 8]))
    for name in "dark", "light":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            os.link(folder / "train" / name / f"{i}.png", tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures/dark/1.png").unlink()
    (tmp_path / "pictures/dark/1.png").write_bytes(b"no picture")
    loader = FolderLoader(tmp_path / "pictures", 2, train=False, res=32, skip_bad=True, num_workers=1)
    batches = list(loader)
    assert torch.equal(batches[0][0][1], batches[1][0][0]) and list(loader.bad_samples) == [1] and loader.num_replaced == 1
    with pytest.raises(DataError, match="1.png"):
        list(FolderLoader(tmp_path / "pictures", 2, train=False, res=32, num_workers=1))


def test_loader_hundreds_of_loaders_leave_nothing(beton):
    """Loaders made, left in mid-epoch, interrupted or forgotten by the hundred: no thread, file or memory stays."""
    def state():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return threading.active_count(), len(os.listdir("/proc/self/fd")), resident

    def use(i):
        loader = ESSLLoader(beton[0], 8, res=64, num_workers=2, seed=i)
        batches = iter(loader)
        next(batches)
        if i % 3 == 0:
            loader.close()
        elif i % 3 == 1:
            with pytest.raises(KeyboardInterrupt):
                batches.throw(KeyboardInterrupt)
            assert len(list(loader)) == 5
    for i in range(30):
        use(i)
    before = state()
    for i in range(300):
        use(i)
    after = state()
    assert after[0] <= before[0] and after[1] <= before[1] and after[2] - before[2] < 30e6, (before, after)


@pytest.mark.soak
def test_loader_renews_kernels_of_another_version(tmp_path):
    """A process killed while it renews numba's cache does not leave the old kernel to the new source."""
    source = (HERE / "essl_loader.py").read_text()
    shown = "import essl_loader as e; e.bind(); print(e.uniform(0, 0, 0, 0))"
    killed = ("import os, numba.core.caching as c; c.IndexDataCacheFile._save_data = lambda *_: os._exit(7); " + shown)

    def run(code):
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / "essl_loader.py").write_text(source)
    first = float(run(shown).stdout)
    (tmp_path / "essl_loader.py").write_text(source.replace("2.0 ** -53", "2.0 ** -54"))
    assert run(killed).returncode == 7
    assert float(run(shown).stdout) == first / 2 == float(run(shown).stdout)


def test_loader_random_box_is_torchvisions():
    """Boxes follow RandomResizedCrop: area and aspect as torchvision's get_params, over 4,000 draws; flips are halves."""
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    picture = Image.new("RGB", (500, 375))
    ours = np.array([random_box(500, 375, (0.2, 1.0), (3 / 4, 4 / 3), 0, 0, i) for i in range(4000)])
    crop = [RandomResizedCrop.get_params(picture, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array([(x, y, w, h) for y, x, h, w in crop])
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= 500).all() and (ours[:, 1] + ours[:, 3] <= 375).all()
    for q in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(ours, q, axis=0) - np.quantile(theirs, q, axis=0)).max() < 15
    assert abs(np.mean([uniform(0, 0, i, essl_loader.FLIP_DRAW) < 0.5 for i in range(4000)]) - 0.5) < 0.03


@pytest.mark.parametrize("damage", ["cut", "version", "empty", "jpeg", "size", "pointer", "huge"])
def test_loader_names_what_is_wrong(beton, tmp_path, damage):
    """A file cut short, of another version, empty, with a damaged JPEG, a false size or a false pointer: a DataError."""
    data, bad = bytearray(beton[0].read_bytes()), tmp_path / "bad.beton"
    table = essl_loader.HEADER.itemsize + 2 * essl_loader.FIELD.itemsize
    record = np.frombuffer(data, essl_loader.SAMPLE, 1, table + 24 * 7)[0]
    at = int(record["data_ptr"])
    if damage == "cut":
        data = data[:len(data) // 2]
    elif damage == "version":
        data[0] = 3
    elif damage == "empty":
        data = data[:0]
    elif damage == "jpeg":
        data[at + 700:at + 1100] = bytes(400)
    elif damage == "huge":
        data[table + 24 * 7 + 1:table + 24 * 7 + 5] = b"\xff\xff\xff\xff"
    elif damage == "size":
        data[table + 24 * 7 + 1] ^= 1
    else:
        data[table + 24 * 7 + 9] ^= 0x40
    bad.write_bytes(data)
    with pytest.raises(DataError, match="bad.beton.*sample 7" if damage in ("jpeg", "size", "pointer", "huge") else "bad.beton"):
        for _ in ESSLLoader(bad, 8, train=False, crop_ratio=1.0, res=64):
            pass


def test_loader_folder_loader_has_the_same_surface(folder):
    """FolderLoader and ESSLLoader give the same order and labels and nearly the same pictures for the same seed."""
    loaders = (FolderLoader(folder / "train", 16, res=64, seed=6, num_workers=2),
               ESSLLoader(folder / "train.beton", 16, res=64, seed=6))
    theirs, ours = (epochs_of(loader, 2) for loader in loaders)
    assert loaders[0].classes == loaders[1].classes == ["dark", "light"] and len(theirs) == len(ours) == 8
    for (a, b), (c, d) in zip(theirs, ours):
        assert torch.equal(b, d) and (a.int() - c.int()).abs().float().mean() < 4  # levels; JPEG at quality 95 makes 1 to 3


def test_loader_stock_ffcv_reads_ours(folder, stock_ffcv):
    """A file of build_beton.py in ffcv's own Loader: the same pictures and labels as Pillow finds in it."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    path = folder / "val.beton"
    batches = Loader(str(path), 8, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                     pipelines={"image": [CenterCropRGBImageDecoder((40, 40), 1.0)], "label": [IntDecoder()]})
    images, labels = (np.concatenate(x) for x in zip(*[(a.copy(), b.copy()) for a, b in batches]))
    reader = BetonReader(path)
    assert labels[:, 0].tolist() == reader.labels.tolist() == [0] * 8 + [1] * 8
    for i, image in enumerate(images):
        full = Image.fromarray(pixels(reader.read(i)))
        side = min(full.size)
        x, y = (full.width - side) // 2, (full.height - side) // 2
        expected = np.asarray(full.crop((x, y, x + side, y + side)).resize((40, 40), Image.Resampling.BOX)).astype(int)
        assert np.abs(image - expected).mean() < 6  # levels; its INTER_AREA is no Pillow filter


def test_loader_reads_files_of_ffcvs_writer(tmp_path, stock_ffcv):
    """Files of ffcv's DatasetWriter (jpg, raw, smart) load in ours: labels, classes None, pictures as in Pillow."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    rng = np.random.default_rng(7)
    pictures = [np.asarray(draw(rng, 60 + 9 * i, 150 - 9 * i)) for i in range(10)]

    class Pictures:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return pictures[i], 3 * i
    for mode in ("jpg", "raw", "smart"):
        path = tmp_path / f"{mode}.beton"
        DatasetWriter(str(path), {"image": RGBImageField(write_mode=mode, jpeg_quality=95, smart_threshold=30000),
                                  "label": IntField()}, num_workers=1).from_indexed_dataset(Pictures())
        reader = BetonReader(path)
        assert reader.labels.tolist() == list(range(0, 30, 3)) and reader.classes is None
        assert set(reader.modes.tolist()) == {"jpg": {0}, "raw": {1}, "smart": {0, 1}}[mode]
        for i, picture in enumerate(pictures):
            exact = pixels(reader.read(i)) if reader.modes[i] == 0 else picture
            assert np.abs(reader.image(i).astype(int) - exact).max() <= 1
        loader = ESSLLoader(path, 10, res=64, seed=8)
        means, _ = compare_with_pillow(loader, lambda p: Image.fromarray(reader.image(p)), 64, 8)
        assert means.max() < 1


IN_FFCV = """
import sys, numpy as np
from essl_loader import ffcv_decoder
from ffcv.fields.basics import IntDecoder
from ffcv.loader import Loader, OrderOption
decoder = ffcv_decoder((48, 48), scale=(0.3, 1.0), seed=3)
batches = Loader(sys.argv[1], 16, num_workers=int(sys.argv[3]), order=OrderOption.SEQUENTIAL,
                 pipelines={"image": [decoder], "label": [IntDecoder()]})
np.savez(sys.argv[2], *[array.copy() for batch in batches for array in batch])
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_loader_in_ffcv_decodes_the_same(folder, tmp_path, threads):
    """ffcv_decoder in stock ffcv's Loader gives what Pillow makes of its boxes; order and labels are FFCV's."""
    # In a process of its own: an error in one of FFCV's threads would leave us waiting for ever
    subprocess.run([sys.executable, "-c", IN_FFCV, folder / "train.beton", tmp_path / "out.npz", str(threads)], check=True,
                   timeout=240, cwd=HERE)
    reader, out = BetonReader(folder / "train.beton"), np.load(tmp_path / "out.npz")
    assert len(out.files) == 8
    for number in range(4):
        images, labels = out[f"arr_{2 * number}"], out[f"arr_{2 * number + 1}"]
        for row, (image, label) in enumerate(zip(images, labels[:, 0])):
            i = 16 * number + row
            full = Image.fromarray(pixels(reader.read(i)))
            x, y, w, h = random_box(*full.size, (0.3, 1.0), (3 / 4, 4 / 3), 3, number, i)
            expected = full.crop((x, y, x + w, y + h)).resize((48, 48), Image.Resampling.BICUBIC)
            assert np.abs(image.astype(int) - np.asarray(expected)).mean() < 1.5 and label == reader.labels[i]


@pytest.mark.soak
def test_loader_in_ffcv_does_not_hang_on_damage(folder, tmp_path):
    """A damaged sample is named and ends the program, which would wait for ever for FFCV's thread."""
    reader, data = BetonReader(folder / "train.beton"), bytearray((folder / "train.beton").read_bytes())
    data[reader.ptrs[5] + 200:reader.ptrs[5] + reader.sizes[5]] = bytes(reader.sizes[5] - 200)
    (tmp_path / "bad.beton").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", IN_FFCV, tmp_path / "bad.beton", tmp_path / "bad.npz", "2"], timeout=240,
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode != 0 and "sample 5 is damaged" in done.stderr and "KeyboardInterrupt" in done.stderr


def test_loader_pages_order_reads_windows(tmp_path, monkeypatch):
    """order="pages": each sample once, ranks partition, epochs differ, and file offsets come in sequential windows."""
    blob = encode(draw(np.random.default_rng(0), 40, 40))
    path = write_beton(tmp_path / "many.beton", [(0, 40, 40, blob + bytes(300_000)) for _ in range(400)])  # 15 pages
    monkeypatch.setattr(essl_loader, "WINDOW", 3 * (8 << 20))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: asked.append(at))
    loaders = [ESSLLoader(path, 10, res=16, order="pages", rank=rank, world_size=2) for rank in range(2)]
    epochs = [[torch.cat([labels for _, labels in loader]) for loader in loaders] for _ in range(2)]
    for ranks in epochs:
        assert sorted(torch.cat(ranks).tolist()) == list(range(400))
        pages = BetonReader(path).ptrs[torch.stack(ranks, 1).flatten().numpy()] // (8 << 20)
        windows = [(pages + shift) // 3 for shift in range(3)]  # one of the shifts leaves no window once it is entered
        assert any((np.diff(w) != 0).sum() == len(np.unique(w)) - 1 for w in windows) and len(np.unique(pages[:40])) > 1
    assert epochs[0][0].tolist() != epochs[1][0].tolist() and set(asked) == set(range(0, 16 * (8 << 20), 3 * (8 << 20)))


# --- schedules
def test_schedules_are_the_papers_tables():
    """Table 10, Table 8 and the stage boundaries, typed from the paper; kept tokens as recipes list them."""
    rows = {"s1": "160 .50 192 .66 224 .75", "s2": "160 .75 192 .75 224 .75", "s3": "224 .75 192 .75 160 .75",
            "s4": "160 .75 192 .80 224 .85", "s5": "224 .75 192 .75 224 .75", "s6": "224 .75 192 .75 224 .85",
            "fixed": "224 .75 224 .75 224 .75"}
    ours = {k: [float(x) for stage in v for x in stage] for k, v in schedules.PRETRAIN_SCHEMES.items()}
    assert ours == {k: [float(x) for x in v.split()] for k, v in rows.items()}
    tune = schedules.FINETUNE_SCHEMES
    assert [[s[0] for s in tune[k]] for k in ("s1", "s1-", "s1+", "s3")] == [[160, 192, 224]] * 4
    assert [[s[1] for s in tune[k]] for k in ("s1", "s1-", "s1+", "s3")] == [
        ["3aug", "3aug", "3aug+"], ["3aug"] * 3, ["3aug+"] * 3, ["3aug", "3aug", "3aug+"]]
    assert [s[3] for s in tune["s3"]] == [0.68, 0.84, 1.0] and all(round(s[2], 2) == 0.28 for s in sum(tune.values(), ()))
    assert schedules.stage_starts(800, schedules.PRETRAIN_STAGES) == [0, 200, 400]
    assert schedules.stage_starts(100, schedules.FINETUNE_STAGES) == [0, 30, 60]
    s5 = schedules.PRETRAIN_SCHEMES["s5"]
    assert [schedules.stage_at(s5, e, 800, schedules.PRETRAIN_STAGES) for e in (0, 199, 200, 399, 400, 799)] == [
        (0, (224, 0.75))] * 2 + [(1, (192, 0.75))] * 2 + [(2, (224, 0.75))] * 2
    assert [schedules.stage_at(schedules.PRETRAIN_SCHEMES["s2"], e, 4, (0.25, 0.25, 0.5), 64, 8)[1][0] for e in range(4)] == [
        48, 56, 64, 64]
    kept = {(224, .75): 49, (192, .75): 36, (160, .75): 25, (160, .5): 50, (192, .66): 48, (192, .8): 28, (224, .85): 29}
    assert all(models_mae.num_kept((r // 16) ** 2, m) == k for (r, m), k in kept.items())
    assert models_mae.num_kept(100, 0.9) == 10


def test_schedules_equations_hold_under_sampling():
    """Equations 1 to 3 against a million draws of what they are expectations of."""
    rng = np.random.default_rng(9)
    for low, high, resolution in ((0.28, 1.0, 224), (0.28, 0.68, 160), (0.45, 1.0, 192)):
        sigma = np.sqrt(rng.uniform(low ** 2, high ** 2, 1_000_000))
        assert abs(schedules.perceptual_ratio(low, high) - sigma.mean()) < 1e-3
        assert abs(schedules.apparent_size(resolution, low, high) - resolution / sigma.mean()) < 0.5
    noise = torch.rand(2000, 144, generator=torch.Generator().manual_seed(0))
    visible = (noise.argsort(1).argsort(1) < 48).view(-1, 12, 12).sum(2).float()  # m: visible patches in each row
    assert abs(schedules.masked_perceptual_ratio(192, 0.66) - (visible * 16 / 192).mean().item()) < 1e-3


def test_schedules_learning_rate():
    """Linear from 0 to the peak over the warm-up, then half a cosine to the floor: four points and monotony."""
    rates = [schedules.lr_at(s, 1000, 100, 2.0, 0.5) for s in range(1001)]
    assert rates[0] == 0 and rates[50] == 1.0 and rates[100] == 2.0 and abs(rates[1000] - 0.5) < 1e-12
    assert abs(rates[550] - 1.25) < 1e-12 and rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:])[::-1]


def test_schedules_prints_costs():
    """`python schedules.py` lists every scheme with its cost; the fixed recipe is 1.00."""
    lines = script("schedules.py").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(schedules.PRETRAIN_SCHEMES) and "1.00 x fixed" in lines[1]


# --- models_mae
def reference_mae(p, imgs, noise, mask_ratio, settings):
    """MAE in plain loops and explicit formulas: (loss, pred, mask) for one batch, parameters by official name."""
    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def block(x, name, heads):
        qkv, width = linear(norm(x, name + ".norm1"), name + ".attn.qkv"), x.shape[1]
        d, outs = width // heads, []
        for h in range(heads):
            q, k, v = (qkv[:, i * width + h * d:i * width + (h + 1) * d] for i in range(3))
            weights = (q @ k.T / math.sqrt(d)).exp()
            outs.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + linear(torch.cat(outs, 1), name + ".attn.proj")
        hidden = linear(norm(x, name + ".norm2"), name + ".mlp.fc1")
        return x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), name + ".mlp.fc2")
    s, preds, masks, losses, removed = settings["patch_size"], [], [], 0, 0
    for image, u in zip(imgs, noise):
        grid = image.shape[1] // s
        patches = torch.stack([image[:, s * r:s * r + s, s * c:s * c + s].permute(1, 2, 0).reshape(-1)
                               for r in range(grid) for c in range(grid)])
        kept = sorted(range(grid ** 2), key=lambda i: u[i])[:int(round(grid ** 2 * (1 - mask_ratio), 6))]
        weight = p["patch_embed.proj.weight"]
        tokens = [p["cls_token"][0, 0] + p["pos_embed"][0, 0]]
        for i in kept:
            pixels = patches[i].reshape(s, s, 3).permute(2, 0, 1)
            tokens.append((weight * pixels).sum((1, 2, 3)) + p["patch_embed.proj.bias"] + p["pos_embed"][0, 1 + i])
        x = torch.stack(tokens)
        for d in range(settings["depth"]):
            x = block(x, f"blocks.{d}", settings["num_heads"])
        x = linear(norm(x, "norm"), "decoder_embed")
        rows = [p["mask_token"][0, 0]] * grid ** 2
        for i, token in zip(kept, x[1:]):
            rows[i] = token
        x = torch.stack([x[0], *rows]) + p["decoder_pos_embed"][0]
        for d in range(settings["decoder_depth"]):
            x = block(x, f"decoder_blocks.{d}", settings["decoder_num_heads"])
        pred = linear(norm(x, "decoder_norm"), "decoder_pred")[1:]
        for i in set(range(grid ** 2)) - set(kept):
            target = patches[i]
            if settings["norm_pix_loss"]:
                target = (target - target.mean()) / (((target - target.mean()) ** 2).sum() / (len(target) - 1) + 1e-6).sqrt()
            losses, removed = losses + ((pred[i] - target) ** 2).mean(), removed + 1
        preds.append(pred)
        masks.append([0.0 if i in kept else 1.0 for i in range(grid ** 2)])
    return losses / removed, torch.stack(preds), torch.tensor(masks)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_models_forward_loss_and_gradients_equal_a_plain_reference(norm_pix_loss):
    """Loss, prediction, mask and every gradient agree with explicit float64 formulas to 1e-5."""
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(32, 8, 24, 2, 3, 16, 2, 2, norm_pix_loss=norm_pix_loss).double()
    imgs, noise = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16)
    loss, pred, mask = model(imgs, 0.7, noise)
    loss.backward()
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in model.named_parameters()}
    expected, expected_pred, expected_mask = reference_mae(leaves, imgs, noise, 0.7, model.settings)
    expected.backward()
    assert torch.equal(mask, expected_mask.double()) and mask.sum(1).tolist() == [12] * 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-5, atol=1e-9)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-5, atol=1e-9, msg=name)


def test_models_normalise_uint8_inside():
    """A uint8 batch gives what torchvision's ToTensor and Normalize would have fed."""
    torch.manual_seed(0)
    model, noise = models_mae.mae_vit_nano_patch8(img_size=32), torch.rand(2, 16)
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    floats = (imgs / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model(imgs, noise=noise)[0], model(floats, noise=noise)[0])
    torch.testing.assert_close(models_mae.unpatchify(models_mae.patchify(floats, 8), 8), floats)


def test_models_position_tables():
    """The native grid is the published formula to the bit; at 160 and 192 it is resampled smoothly, class row kept."""
    model = models_mae.mae_vit_tiny_patch16()
    table = model.pos_embed[0]
    for row, column in ((0, 0), (3, 11), (13, 13)):
        omega = 1 / 10000 ** (np.arange(48) / 48)
        expected = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
        assert np.allclose(table[1 + 14 * row + column], expected, atol=1e-6)
    assert torch.equal(table[0], torch.zeros(192)) and not model.pos_embed.requires_grad
    assert models_mae.resample_table(model.pos_embed, 14) is model.pos_embed
    for resolution in (160, 192):
        grid = resolution // 16
        smaller = models_mae.resample_table(model.pos_embed, grid)
        channel = Image.fromarray(table[1:, 5].reshape(14, 14).numpy())
        expected = np.asarray(channel.resize((grid, grid), Image.Resampling.BICUBIC))
        assert smaller.shape == (1, 1 + grid ** 2, 192) and np.abs(smaller[0, 1:, 5].numpy().reshape(grid, grid) - expected).max() < 2e-3
        assert math.isfinite(model(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))[0].item())


def test_models_state_dict_is_the_official_one():
    """Official key names and shapes for B; parameter counts of B, L and H as published (111.9, 329.5, 657 M)."""
    with torch.device("meta"):
        model = models_mae.mae_vit_base_patch16()
        counts = [sum(p.numel() for p in build().parameters()) / 1e6 for build in
                  (models_mae.mae_vit_base_patch16, models_mae.mae_vit_large_patch16, models_mae.mae_vit_huge_patch14)]
    expected = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
                "patch_embed.proj.bias": (768,), "norm.weight": (768,), "norm.bias": (768,), "mask_token": (1, 1, 512),
                "decoder_embed.weight": (512, 768), "decoder_embed.bias": (512,), "decoder_pos_embed": (1, 197, 512),
                "decoder_norm.weight": (512,), "decoder_norm.bias": (512,), "decoder_pred.weight": (768, 512),
                "decoder_pred.bias": (768,)}
    for prefix, width, depth in (("blocks", 768, 12), ("decoder_blocks", 512, 8)):
        for i in range(depth):
            for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
                expected[f"{prefix}.{i}.{name}.weight"] = (rows * width, columns * width)
                expected[f"{prefix}.{i}.{name}.bias"] = (rows * width,)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                expected[f"{prefix}.{i}.{name}"] = (width,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert [round(c, 1) for c in counts] == [111.9, 329.5, 657.1]


def test_models_decoder_keep_is_the_full_decoder_on_a_share():
    """At 1.0 the model without it; at 0.5 what the decoder makes of those tokens alone, and the full loss on average."""
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(32, 8, 24, 2, 3, 16, 2, 2).double()
    imgs, noise = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16)
    for ours, expected in zip(model(imgs, 0.7, noise, decoder_keep=1.0), model(imgs, 0.7, noise)):
        assert torch.equal(ours, expected)
    loss, pred, mask = model(imgs, 0.7, noise, decoder_keep=0.5)
    latent, removed, restore = model.forward_encoder(model.patches(imgs), 0.7, noise)
    assert mask.sum(1).tolist() == [6] * 3 and (mask <= removed).all() and not pred[mask == 0].any()
    for b, order in enumerate(noise.argsort(1).tolist()):
        x = model.decoder_embed(latent[b])
        rows = {**dict(zip(order[:4], x[1:])), **{i: model.mask_token[0, 0] for i in order[4:10]}}  # 4 kept, 6 of 12
        tokens = torch.stack([x[0]] + [rows[i] for i in sorted(rows)])
        x = (tokens + model.decoder_pos_embed[0, [0] + [1 + i for i in sorted(rows)]])[None]
        for block in model.decoder_blocks:
            x = block(x)
        expected = dict(zip(sorted(rows), model.decoder_pred(model.decoder_norm(x))[0, 1:]))
        for i in order[4:10]:
            torch.testing.assert_close(pred[b, i], expected[i])
    model.decoder_blocks = model.decoder_blocks[:0]  # no attention between mask tokens: the expectation is exact
    full, draws = model(imgs, 0.7, noise)[0], []
    for _ in range(400):  # the same patches seen, another half of the removed
        other = torch.where(removed.bool(), 1 + torch.rand(3, 16), noise)
        draws.append(model(imgs, 0.7, other, decoder_keep=0.5)[0].item())
    assert np.std(draws) > 0 and abs(np.mean(draws) - full.item()) < 4 * np.std(draws) / 20


def test_models_prepared_tables_change_nothing():
    """Tables resampled ahead give the same bits, stay out of the state dict and follow newly loaded weights."""
    torch.manual_seed(0)
    model, imgs, noise = models_mae.mae_vit_nano_patch8(img_size=64), torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    keys, expected = list(model.state_dict()), model(imgs, noise=noise)[1]
    model.prepare(6, 8)
    assert torch.equal(model(imgs, noise=noise)[1], expected) and list(model.state_dict()) == keys
    other = {k: v * 2 if "pos_embed" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(other)
    assert torch.equal(model.table("pos_embed", 6), models_mae.resample_table(other["pos_embed"], 6))


def test_models_recompute_keeps_less_and_changes_nothing():
    """With activation checkpointing loss and gradients are the same bits; autograd keeps a fraction of the numbers."""
    imgs, noise, found = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.rand(4, 16), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, kept = models_mae.mae_vit_nano_patch8(img_size=32), []
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model(imgs, 0.5, noise)[0]
        loss.backward()
        found.append((sum(kept), loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert found[1][0] < found[0][0] / 3 and torch.equal(found[0][1], found[1][1])
    assert all(map(torch.equal, found[0][2], found[1][2]))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_models_flops_equal_torchs_counter(size):
    """To the last operation, at all stages of all schemes; the masked probe adds less than 2 %."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}_patch16")()
        step = pretrain.PretrainStep(model, 1000, "masked")

    def count(run):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run().backward()
        return counter.get_total_flops()
    for res, mask_ratio in sorted({stage for scheme in schedules.PRETRAIN_SCHEMES.values() for stage in scheme}):
        imgs, noise = torch.zeros(2, 3, res, res, device="meta"), torch.zeros(2, (res // 16) ** 2, device="meta")
        for keep in (1.0, 0.5) if res == 160 else (1.0,):
            ours = 2 * models_mae.flops_per_image(res, mask_ratio, keep, **model.settings)
            assert ours == count(lambda: model(imgs, mask_ratio, noise, keep)[0])
    probed = count(lambda: sum(step(imgs, torch.zeros(2, device="meta").long(), mask_ratio, noise)))
    assert ours < probed < 1.02 * ours


# --- pretrain
TINY = ("--model", "mae_vit_nano_patch8", "--input-size", "32", "--total-batch", "16", "--batch-size", "8", "--epochs", "4",
        "--warmup-epochs", "1", "--blr", "4e-3", "--num-workers", "2", "--viz-every", "2")


def tiny_run(folder, out, *words, **kwargs):
    return script("pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir", out,
                  *TINY, *words, **kwargs)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out):
    return torch.load(out / "last.pt", weights_only=True)["modules"]


def test_pretrain_defaults_are_table_1():
    """The flags' defaults are the paper's pretraining column, and the palindrome."""
    args = pretrain.get_args([])
    assert (args.total_batch, args.epochs, args.warmup_epochs, args.weight_decay, args.scheme, args.model, args.input_size) \
        == (4096, 800, 40, 0.05, "s5", "mae_vit_base_patch16", 224)
    assert abs(args.blr * args.total_batch / 256 - 2.4e-3) < 1e-12 and schedules.PRETRAIN["betas"] == (0.9, 0.95)
    assert args.stages == (0.25, 0.25, 0.5) and schedules.PRETRAIN["scale"] == (0.2, 1.0) and args.probe == "masked"
    assert models_mae.mae_vit_nano_patch8(img_size=16).norm_pix_loss and pretrain.get_args(["--weight_decay=0.1"]).weight_decay == 0.1


@pytest.fixture(scope="session")
def unbroken(folder, tmp_path_factory):
    """The tiny run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = tiny_run(folder, out, "--preload")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_pretrain_runs_all_stages(unbroken):
    """Three stages with their resolution and mask ratio in log.jsonl, loss falling, probe, pictures, checkpoints."""
    out, text = unbroken
    log = log_of(out)
    assert [(line["epoch"], line["res"], line["mask_ratio"]) for line in log if "probe_top1" in line] == [
        (0, 32, 0.75), (1, 24, 0.75), (2, 32, 0.75), (3, 32, 0.75)]
    assert log[-1]["loss"] < log[0]["loss"] and all(line["img_s"] > 0 <= line["data_wait"] <= 1 for line in log)
    assert [line["step"] for line in log] == [4, 8, 12, 16] and 0 <= log[-1]["probe_top1"] <= 100
    names = {p.name for p in out.iterdir()}
    assert {"args.json", "last.pt", "stage1.pt", "stage2.pt", "recon_0002.png", "recon_0004.png"} <= names
    assert any(n.startswith("events.out") for n in names) and not any("tmp" in n for n in names)
    assert Image.open(out / "recon_0004.png").size[0] > 12 * 32 and "done: 4 epochs" in text.splitlines()[-1]


def test_pretrain_killed_and_resumed_is_bit_identical(folder, unbroken, tmp_path):
    """SIGKILL in the middle of an epoch, then SIGTERM, then the same command: the unbroken run's weights, bit for bit."""
    command = [sys.executable, HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton",
               "--output-dir", tmp_path, *TINY]
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if re.match(r"epoch [01] loss", line):
                run.send_signal(number)
                break
        run.stdout.read()
        assert run.wait() == (-number if number == signal.SIGKILL else 1)
    done = tiny_run(folder, tmp_path)
    assert done.returncode == 0 and "; from " in done.stdout, done.stderr
    expected, ours = weights_of(unbroken[0]), weights_of(tmp_path)
    assert expected.keys() == ours.keys() and all(torch.equal(expected[k], ours[k]) for k in expected)
    assert [line["loss"] for line in log_of(tmp_path)][-1] == [line["loss"] for line in log_of(unbroken[0])][-1]


def train_here(folder, out, *words):
    """pretrain.py's main in this process."""
    words = ["--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir", out, *TINY, *words]
    with redirect_stderr(io.StringIO()):
        pretrain.main(pretrain.get_args([str(w) for w in words]))


def equal_weights(ours, theirs):
    ours, theirs = weights_of(ours), weights_of(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_pretrain_survives_a_full_disk_and_a_damaged_checkpoint(folder, unbroken, tmp_path):
    """Stopped by SIGUSR1; then no checkpoint can be written: the run ends, with code 1, its log whole and last.pt as it
    was; then last.pt is damaged: it goes on from previous.pt. The end is the unbroken run's, bit for bit."""
    command = [sys.executable, HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton",
               "--output-dir", tmp_path, *TINY]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.DEVNULL)
    for line in run.stdout:
        if line.startswith("epoch 1 loss"):
            run.send_signal(signal.SIGUSR1)
    assert run.wait() == 1 and (tmp_path / "previous.pt").is_file()
    before = (tmp_path / "last.pt").read_bytes()
    limit = resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)
    done = tiny_run(folder, tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    refused(done, "last.pt could not be written", "the training goes on", "times this run could not write", "last.pt")
    assert "done: 4 epochs" in done.stdout and (tmp_path / "last.pt").read_bytes() == before
    assert [line["step"] for line in log_of(tmp_path)][-2:] == [12, 16] and not list(tmp_path.glob(".*tmp"))
    damaged = bytearray(before)
    damaged[len(before) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(damaged)
    done = tiny_run(folder, tmp_path)
    assert done.returncode == 0 and "last.pt is damaged" in done.stdout and "previous.pt, step " in done.stdout
    assert equal_weights(tmp_path, unbroken[0])
    assert (tmp_path / "last.old.pt").read_bytes() == damaged
    for name in "last.pt", "previous.pt":
        (tmp_path / name).write_bytes(damaged)
    refused(tiny_run(folder, tmp_path), "last.pt is damaged", "previous.pt is damaged", "--resume none")
    refused(tiny_run(folder, tmp_path, "--resume", tmp_path / "last.pt"), "last.pt is damaged")
    done = tiny_run(folder, tmp_path, "--resume", "none", "--epochs", 1)
    assert done.returncode == 0 and (tmp_path / "last.old.pt").read_bytes() == damaged and not (tmp_path / "previous.pt").exists()


@pytest.mark.soak
def test_pretrain_outlives_a_full_disk_under_its_output(folder, tmp_path):
    """Where the run's words cannot be written, the training goes on all the same."""
    with open("/dev/full", "w") as full:
        subprocess.run([*map(str, [
            sys.executable, HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton",
            "--output-dir", tmp_path, *TINY, "--epochs", 1])], stdout=full, stderr=full, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert weights_of(tmp_path) and len(log_of(tmp_path)) == 1


def test_pretrain_goes_back_once_from_bad_steps(folder, unbroken, tmp_path, monkeypatch):
    """Three steps in a row that are not finite lead back to the last good checkpoint, and from there to the unbroken
    run's end; if they come again the run stops, and its checkpoint is of before them."""
    forward, calls = pretrain.PretrainStep.forward, itertools.count()

    def poisoned(bad):
        def step(self, *inputs):
            loss, probe_loss = forward(self, *inputs)
            return loss * (math.inf if next(calls) in bad else 1), probe_loss
        return step
    monkeypatch.setattr(pretrain.PretrainStep, "forward", poisoned(range(18, 24)))  # two micro-batches a step
    train_here(folder, tmp_path / "once", "--max-bad-steps", 3)
    lines = log_of(tmp_path / "once")
    assert [line["step"] for line in lines] == [4, 8, 12, 8, 12, 16] and "3 steps in a row" in lines[3]["went_back"]
    assert equal_weights(tmp_path / "once", unbroken[0])
    calls = itertools.count()
    monkeypatch.setattr(pretrain.PretrainStep, "forward", poisoned(range(18, 10 ** 6)))
    with pytest.raises(SystemExit, match="not finite.*again; .*last.pt"):
        train_here(folder, tmp_path / "twice", "--max-bad-steps", 3)
    state = torch.load(tmp_path / "twice" / "last.pt", weights_only=True)
    assert state["step"] == 8 and all(v.isfinite().all() for v in state["modules"].values())


def test_pretrain_leaves_out_a_step_that_is_not_finite(folder, tmp_path, monkeypatch):
    """A gradient of NaN at step 6 changes nothing: weights, moments and statistics of a run that passes over the step."""
    forward, take_step, calls, steps = pretrain.PretrainStep.forward, pretrain.take_step, itertools.count(), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.PretrainStep, "forward", lambda self, *inputs: tuple(
            loss * factor for loss, factor in zip(forward(self, *inputs), (math.nan if next(calls) == 10 else 1, 1))))
        train_here(folder, tmp_path / "nan")

    def passes_over(*inputs):
        if next(steps) != 5:
            return take_step(*inputs)
        next(inputs[5]), next(inputs[5])
        return torch.zeros(()), torch.ones(()), 0.0
    monkeypatch.setattr(pretrain, "take_step", passes_over)
    train_here(folder, tmp_path / "left_out")
    assert equal_weights(tmp_path / "nan", tmp_path / "left_out")
    assert [line["bad_steps"] for line in log_of(tmp_path / "nan")] == [0, 1, 1, 1]


DRIVER = """
import os, sys
sys.path.insert(0, {here!r})
import pretrain, torch
how, rank, calls, steps = {how!r}, int(os.environ["RANK"]), [0], [0]
forward, take_step = pretrain.PretrainStep.forward, pretrain.take_step
def poisoned(self, *inputs):
    calls[0] += 1
    loss, probe_loss = forward(self, *inputs)
    return loss * (float("nan") if how == "nan" and rank == 1 and calls[0] == 6 else 1), probe_loss
def left_out(*inputs):
    steps[0] += 1
    if how == "left out" and steps[0] == 6:
        next(inputs[5])
        return torch.zeros(()), torch.ones(()), 0.0
    return take_step(*inputs)
pretrain.PretrainStep.forward, pretrain.take_step = poisoned, left_out
pretrain.main(pretrain.get_args(sys.argv[1:]))
"""


@pytest.mark.soak
def test_pretrain_nan_on_one_rank_is_a_step_left_out(folder, tmp_path):
    """NaN on one of two ranks at one step: both leave it out, and end with the weights of a run without that step."""
    for i, how in enumerate(("nan", "left out")):
        (tmp_path / f"{i}.py").write_text(DRIVER.format(here=str(HERE), how=how))
        done = subprocess.run([*map(str, [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
            22000 + i + os.getpid() % 20000, tmp_path / f"{i}.py", "--data", folder / "train.beton", "--val-data",
            folder / "val.beton", "--output-dir", tmp_path / str(i), *TINY])], capture_output=True, text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "1 steps left out" in done.stdout, done.stderr
        assert [line["bad_steps"] for line in log_of(tmp_path / str(i))] == [0, 1, 1, 1]
    assert equal_weights(tmp_path / "0", tmp_path / "1")


@pytest.mark.soak
def test_pretrain_resumes_on_another_number_of_ranks(folder, unbroken, tmp_path, monkeypatch):
    """Stopped in mid-epoch on one process and gone on with on two: the same data in the same steps, the same losses."""
    calls = itertools.count(1)
    monkeypatch.setattr(pretrain, "any_rank", lambda flag: next(calls) == 6)
    with pytest.raises(SystemExit, match="stopped by a signal at step 6"):
        train_here(folder, tmp_path, "--probe", "off")
    done = subprocess.run([*map(str, [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 24000 + os.getpid() % 20000,
        HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir", tmp_path,
        *TINY, "--probe", "off"])], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "last.pt, step 6" in done.stdout, done.stderr
    ours, expected = log_of(tmp_path), log_of(unbroken[0])
    assert [line["loss"] for line in ours][-2:] == pytest.approx([line["loss"] for line in expected][-2:], rel=1e-4)


def test_pretrain_two_ranks_match_one(folder, unbroken, tmp_path):
    """torchrun with two gloo ranks of 8 pictures does what one process with two times 8 does, to rounding."""
    port = 20000 + os.getpid() % 20000
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                           HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton",
                           "--output-dir", tmp_path, *TINY, "--probe", "off"], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, expected = log_of(tmp_path), log_of(unbroken[0])
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def train_20(how="float32"):
    """Losses of 20 steps of the real step on 2 x 8 random pictures, in one of the ways to compute them."""
    torch.manual_seed(0)
    step, rng = pretrain.PretrainStep(models_mae.mae_vit_nano_patch8(img_size=32), 4, "masked"), torch.Generator()
    run = torch.compile(step, dynamic=False, backend="aot_eager") if how == "compiled" else step
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16")
    if how != "float32":
        state, random = {k: v.clone() for k, v in step.state_dict().items()}, torch.get_rng_state()
        pretrain.warm_up(run, [(32, 0.75), (24, 0.5)], 8, 8, 1, autocast, torch.device("cpu"))
        assert all(torch.equal(v, state[k]) for k, v in step.state_dict().items())  # warming up left no trace
        assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in step.parameters())
    ours = run, pretrain.adamw(step, 0.05, fused=True), None, autocast, list(step.head.buffers())
    data = [(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4) for _ in range(2)]
    return [pretrain.take_step(*ours, itertools.cycle(data), pretrain.mask_noise(rng, 0, i, (2, 8, 1, 16), 0), 0.75)[0].item()
            for i in range(20)]


def test_pretrain_compiled_and_bf16_agree_with_eager_float32():
    """20 steps from one seed: compiled to float32's rounding, bf16 within its own (2 ** -8); warming up is traceless."""
    expected = train_20()
    assert expected[-1] < 0.9 * expected[0]
    assert train_20("compiled") == pytest.approx(expected, rel=1e-4) and train_20("bf16") == pytest.approx(expected, rel=1e-2)


def test_pretrain_same_update_however_it_is_cut(folder, tmp_path):
    """64 pictures at once, 4 x 16, two ranks of 32 or of 2 x 16: the gradient within 1e-6, and so the update.

    Adam's first moment after one step is 0.1 gradient; its update is a sign where the gradient is only rounding, as for
    the keys' biases, so weights are compared where the gradient is more.
    """
    def one_step(name, batch, ranks=()):
        words = ["--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir", tmp_path / name, *TINY,
                 "--probe", "off", "--epochs", 1, "--warmup-epochs", 0, "--total-batch", 64, "--batch-size", batch]
        done = subprocess.run([sys.executable, *ranks, HERE / "pretrain.py", *map(str, words)], capture_output=True,
                              text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)
        names = [k for k in state["modules"] if not k.endswith("pos_embed")]
        matrices = [k for k in names if state["modules"][k].ndim > 1]
        order = matrices + [k for k in names if k not in matrices]
        moments = state["optimizer"]["state"]
        return {k: (moments[i]["exp_avg"] * 10, state["modules"][k]) for i, k in enumerate(order)}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(21000 + os.getpid() % 20000)]
    expected = one_step("whole", 64)
    assert len(expected) > 90 and all(g.shape == w.shape for g, w in expected.values())
    for name, batch, ranks in (("cut", 16, ()), ("ranks", 32, torchrun), ("both", 16, torchrun)):
        for key, (gradient, weight) in one_step(name, batch, ranks).items():
            assert (gradient - expected[key][0]).abs().max() < 1e-6, (name, key)
            clear = expected[key][0].abs() > 1e-4
            assert (weight - expected[key][1])[clear].abs().max() < 1e-6 if clear.any() else True, (name, key)


def test_pretrain_bench_and_plan_write_what_they_measured(folder, tmp_path):
    """Rows for every stage and way, figures that follow from one another, and a run in the same folder goes untouched."""
    assert tiny_run(folder, tmp_path, "--epochs", 1, "--decoder-keep", 0.5, "--peak-tflops", 0.01).returncode == 0
    line, before = log_of(tmp_path)[-1], (tmp_path / "last.pt").read_bytes()
    cost = models_mae.flops_per_image(32, 0.75, 0.5, **models_mae.mae_vit_nano_patch8(img_size=32).settings)
    assert line["tflops"] == pytest.approx(line["img_s"] * cost / 1e12) and line["mfu"] == line["tflops"] / 0.01
    done = tiny_run(folder, tmp_path, "--bench", "--steps", 1, "--peak-tflops", 0.01)
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert done.returncode == 0 and [(r["res"], r["mask_ratio"]) for r in bench["stages"]] == [(32, 0.75), (24, 0.75)]
    for row in bench["stages"]:
        cost = models_mae.flops_per_image(row["res"], row["mask_ratio"], **models_mae.mae_vit_nano_patch8(img_size=32).settings)
        for way in ("loader", "model", "plain"):
            assert row[way]["img_s"] == pytest.approx(16 / row[way]["seconds"]) and 0 <= row[way]["data_wait"] < 1
            assert row[way]["mfu"] == pytest.approx(row[way]["img_s"] * cost / 1e12 / 0.01)
    done = tiny_run(folder, tmp_path, "--plan", "--steps", 1, "--hours", 1e-9, "--gpus", 2)
    plan = json.loads((tmp_path / "plan.json").read_text())
    seconds = {(r["res"], r["mask_ratio"]): r["loader"]["seconds"] for r in plan["stages"]}
    s5, s2 = (4 * sum(share * 4 * seconds[s] for s, share in zip(scheme, (0.25, 0.25, 0.5))) for scheme in (
        ((32, .75), (24, .75), (32, .75)), ((24, .75), (24, .75), (32, .75))))
    assert (plan["hours"]["s5"] - plan["hours"]["s2"]) * 3600 == pytest.approx(s5 - s2) and plan["hours"]["s5"] * 3600 > s5
    assert "over 1e-09 h" in done.stdout and "2 such GPU(s)" in done.stdout
    assert (tmp_path / "last.pt").read_bytes() == before and log_of(tmp_path)[-1] == line
    with pytest.raises(SystemExit):
        pretrain.get_args(["--decoder-keep", "0"])


@pytest.mark.parametrize("probe", ["full", "off"])
def test_pretrain_from_a_folder_with_other_probes(folder, tmp_path, probe):
    """--data may name the picture folder itself; the paper's full probe and no probe train too."""
    done = script("pretrain.py", "--data", folder / "train", "--val-data", folder / "val", "--output-dir", tmp_path, *TINY,
                  "--epochs", 1, "--scheme", "fixed", "--probe", probe, "--mask-ratio", 0.5)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path)[-1]["mask_ratio"] == 0.5 and ("probe_top1" in log_of(tmp_path)[-1]) == (probe == "full")


def test_pretrain_stops_at_a_loss_that_is_not_finite(folder, tmp_path):
    """An absurd learning rate ends with a message that names the step; no checkpoint of broken weights is left."""
    done = tiny_run(folder, tmp_path, "--blr", "1e12", "--epochs", 8)
    refused(done, "not finite", "--blr")
    if (tmp_path / "last.pt").exists():
        assert all(v.isfinite().all() for v in weights_of(tmp_path).values() if v.is_floating_point())


def test_pretrain_refuses_bad_input(folder, unbroken, tmp_path):
    """Missing file, cut file, unwritable folder, indivisible batch, other settings: a paragraph and exit code 1 or 2."""
    refused(script("pretrain.py", "--output-dir", tmp_path / "a", cwd=tmp_path), "data/train_500_95.beton", "--demo")
    cut = tmp_path / "cut.beton"
    cut.write_bytes((folder / "train.beton").read_bytes()[:-100])
    refused(script("pretrain.py", "--data", cut, "--output-dir", tmp_path / "b", *TINY), "cut.beton")
    (tmp_path / "file").write_text("")
    refused(tiny_run(folder, tmp_path / "file" / "run"), "cannot be written")
    refused(tiny_run(folder, tmp_path / "c", "--total-batch", 20), "--total-batch 20", "--batch-size 4")
    refused(tiny_run(folder, unbroken[0], "--blr", "1e-3"), "blr: 0.004 there, 0.001 here", "--resume none")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "last.pt").write_bytes(b"not a checkpoint")
    refused(tiny_run(folder, tmp_path / "d"), "last.pt", "--resume none")


# --- bench_loader
BENCH = ("--images", 48, "--batch-size", 16, "--passes", 1, "--res", 48)


@pytest.fixture(scope="session")
def bench(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    done = script("bench_loader.py", "--data_dir", folder / "train", "--json", root / "b.json", "--plot",
                  root / "b.png", *BENCH)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "b.json").read_text()), done.stdout


def test_bench_sections(bench):
    """Each section is measured, printed and drawn; speeds are positive, within their spread, FFCV to itself is 1."""
    root, data, out = bench
    assert list(data["tables"]) == ["alternatives", "decomposition", "compression", "augmentation", "epoch", "pixels"]
    for section, rows in data["tables"].items():
        for row in rows:
            assert row["name"] in out
            if "passes" in row:
                assert len(row["passes"]) == 1 and 0 < row["min"] <= row["images_s"] <= row["max"], (section, row)
    assert out.count(data["command"]) == 6 and out.count(data["cpu"]) == 6
    alternatives = {row["name"]: row for row in data["tables"]["alternatives"]}
    assert {"image folder", "FFCV", "FFCV + ffcv_decoder", "ESSL bilinear", "ESSL"} <= set(alternatives)
    assert {row["images"] for row in alternatives.values()} == {48} and alternatives["FFCV"]["x FFCV"] == 1
    assert len(data["tables"]["decomposition"]) == 10
    size = {row["name"]: row["bytes_per_image"] for row in data["tables"]["compression"]}
    assert size["(500, 100)"] > size["(500, 95)"] > size["(500, 90)"]
    assert all(0 < row["mean_difference"] < 0.05 and row["images"] == 48 for row in data["tables"]["pixels"])
    assert (root / "b.png").stat().st_size > 0 and (root / "b_difference.png").stat().st_size > 0


def test_bench_says_what_is_missing(folder, tmp_path):
    """Without a folder and without ffcv, a line names each thing left out and why, and the rest is measured."""
    (tmp_path / "ffcv.py").write_text("raise ImportError('no ffcv here')")
    done = script("bench_loader.py", "--data", folder / "train.beton", "--json", tmp_path / "b.json", "--plot",
                  tmp_path / "b.png", *BENCH, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in data["tables"]["alternatives"]] == ["ESSL bilinear", "ESSL"]
    for what in ("image folder", "FFCV, 48", "FFCV + ffcv_decoder", "decomposition: FFCV", "compression", "pixels"):
        assert any(line.startswith(what) and "left out: " in line for line in data["left_out"]), what


# --- finetune and linprobe
@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """train and val (3 classes, 48 and 13 pictures) as .beton and folders, other (4 classes), an untrained mae.pt."""
    root = tmp_path_factory.mktemp("tune")
    rng = np.random.default_rng(0)
    for name, classes, count in ("train", "abc", 48), ("val", "abc", 13), ("other", "abcd", 8):
        for i in range(count):
            path = root / name / classes[i % len(classes)] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            noise.resize((48, 40), Image.BICUBIC).save(path)
        subprocess.run([sys.executable, HERE / "build_beton.py", "--data-dir", root / name, "--out",
                        root / f"{name}.beton"], check=True, capture_output=True)
    torch.manual_seed(0)
    mae = models_mae.mae_vit_nano_patch8(img_size=32, depth=2)
    torch.save({"modules": {f"model.{k}": v for k, v in mae.state_dict().items()}, "model": mae.settings,
                "classes": list("abc")}, root / "mae.pt")
    return root, mae.eval()


def tune(root, out, *words):
    """finetune.py's main in this process on the fixture's data."""
    base = ["--finetune", root / "mae.pt", "--data", root / "train.beton", "--val-data", root / "val.beton",
            "--epochs", 4, "--output-dir", out,
            "--warmup-epochs", 1, "--total-batch", 16, "--batch-size", 8, "--num-workers", 2]
    with redirect_stderr(io.StringIO()):
        finetune.main(finetune.get_args([str(w) for w in base + list(words)]))


def hugging_face(state):
    """Official names -> ViTMAEForPreTraining's, written down from its published checkpoints."""
    out = {"vit.embeddings.cls_token": state["cls_token"], "vit.embeddings.position_embeddings": state["pos_embed"],
           "decoder.mask_token": state["mask_token"], "decoder.decoder_layers.0.output.dense.weight": torch.ones(2, 2)}
    for kind in "weight", "bias":
        out[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        out[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        for i in range(2):
            ours, theirs = f"blocks.{i}.", f"vit.encoder.layer.{i}."
            for part, rows in zip(("query", "key", "value"), state[f"{ours}attn.qkv.{kind}"].chunk(3)):
                out[f"{theirs}attention.attention.{part}.{kind}"] = rows
            for a, b in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                         ("mlp.fc2", "output.dense"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
                out[f"{theirs}{b}.{kind}"] = state[f"{ours}{a}.{kind}"]
    return out


def test_models_encoder_loads_from_every_source(tuned, tmp_path):
    """Ours, official, timm's and Hugging Face's files give the features of the model they came from, at any size."""
    root, mae = tuned
    state, x = mae.state_dict(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    files = {"official": {"model": state}, "timm": encoder, "hugging": hugging_face(state)}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    for path in [root / "mae.pt", *(tmp_path / f"{name}.pth" for name in files)]:
        weights, found, _ = read_weights(path)
        vit = ViT(vit_settings(None, found, path), 32, 0, pool="mean").eval()
        load_encoder(vit, weights, path)
        for size in 32, 48:
            pictures = torch.nn.functional.interpolate(x.float(), size).to(torch.uint8)
            assert torch.allclose(vit(pictures), mae.features(pictures), atol=1e-5), (path, size)


def test_models_say_what_does_not_fit(tuned, tmp_path):
    """A missing or left-over tensor is named; another head count or patch size, or no encoder at all, is an error."""
    root, _ = tuned
    weights, found, _ = read_weights(root / "mae.pt")
    vit = ViT(vit_settings(None, found, ""), 32, 3)
    for change, word in (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "missing: blocks.1.mlp.fc2.bias"), \
            (lambda w: w.update({"blocks.0.gamma": w["cls_token"]}), "left over: blocks.0.gamma"), \
            (lambda w: w.update({"cls_token": torch.zeros(1, 1, 64)}), "another shape: cls_token"):
        changed = dict(weights)
        change(changed)
        with pytest.raises(WeightsError, match=word):
            load_encoder(vit, changed, "x")
    with pytest.raises(WeightsError, match="num_heads 2 there, 4"):
        vit_settings("vit_nano_patch8", dict(found, depth=6, num_heads=2), "x")
    with pytest.raises(WeightsError, match="patch_size 8 there, 16"):
        vit_settings("vit_tiny_patch16", found, "x")
    torch.save({"model": {"head.weight": torch.zeros(3, 3)}}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"no")
    for name, word in ("x", "no encoder weights"), ("y", "cannot|can be read"):
        with pytest.raises(WeightsError, match=word):
            read_weights(tmp_path / f"{name}.pth")


def test_models_export_is_timms(tmp_path):
    """timm loads the export strictly, gets no mask token or decoder, and computes the same features."""
    torch.manual_seed(0)
    mae = models_mae.mae_vit_tiny_patch16().eval()
    torch.save({"model": mae.state_dict()}, tmp_path / "a.pt")
    subprocess.run([sys.executable, HERE / "models_mae.py", "--export-timm", tmp_path / "a.pt", tmp_path / "b.pth"],
                   check=True)
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "b.pth")).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(vit.forward_features(x)[:, 1:].mean(1), mae.features(x), atol=1e-5)


def test_models_stages_train_one_table():
    """At another resolution the gradient reaches the table of the full one, which keeps its shape and values."""
    vit = ViT(dict(size_of("vit_nano_patch8"), depth=1), 64, 3)
    before = vit.pos_embed.clone()
    torch.nn.init.normal_(vit.head.weight)
    vit(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert torch.equal(vit.pos_embed, before) and (vit.pos_embed.grad[0].abs().sum(1) > 0).all()


def test_finetune_groups_follow_the_formula():
    """For ViT-B each parameter has lr 0.65^(13 - id) and decay as published; the floor of the rate scales with it."""
    model = ViT(size_of("vit_base_patch16"), 224, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = finetune.parameter_groups(model, 0.05, 0.65)
    got = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {"cls_token": (0.65 ** 13, 0), "pos_embed": (0.65 ** 13, 0),
                "fc_norm.weight": (1, 0), "fc_norm.bias": (1, 0),
                "patch_embed.proj.weight": (0.65 ** 13, 0.05), "patch_embed.proj.bias": (0.65 ** 13, 0),
                "head.weight": (1, 0.05), "head.bias": (1, 0)}
    for i in range(12):
        for layer in "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2":
            expected[f"blocks.{i}.{layer}.weight"] = (0.65 ** (12 - i), 0 if "norm" in layer else 0.05)
            expected[f"blocks.{i}.{layer}.bias"] = (0.65 ** (12 - i), 0)
    assert got.keys() == expected.keys() == set(names.values())
    assert all(got[k] == pytest.approx(v) for k, v in expected.items())
    assert lr_at(100, 100, 5, 2e-3, finetune.MIN_LR) == pytest.approx(1e-6)
    assert 1.5e-5 < model.head.weight.std().item() < 2.5e-5


def test_finetune_three_augment_is_pillows():
    """Exactly one of the three per picture, as Pillow does it, a third each over 10,000, the same for the same seed."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (300, 24, 20, 3), dtype=np.uint8)
    pictures[::2] = np.where(pictures[::2] > 127, 255, 0)  # hard edges, where a blur shows most
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    out = finetune.three_augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(out, finetune.three_augment(images, torch.Generator().manual_seed(3)))
    draws = torch.Generator().manual_seed(3)
    choice, radius = torch.randint(3, (300,), generator=draws), 0.1 + 1.9 * torch.rand(300, generator=draws)
    for i, picture in enumerate(map(Image.fromarray, pictures)):
        reference = (lambda: ImageOps.grayscale(picture).convert("RGB"), lambda: ImageOps.solarize(picture, 128),
                     lambda: picture.filter(ImageFilter.GaussianBlur(float(radius[i]))))[choice[i]]()
        difference = np.abs(out[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference))
        assert difference.max() <= (2, 0, 3)[choice[i]], (i, int(choice[i]))
    white = torch.zeros(10_000, 3, 4, 4, dtype=torch.uint8)
    white[:, 0, :, :2] = 200  # grayscale makes the planes equal, solarize brings 255 - 200 = 55 in, the blur neither
    kinds = finetune.three_augment(white, torch.Generator().manual_seed(0))
    grey = (kinds[:, 0] == kinds[:, 1]).flatten(1).all(1)
    solar = (kinds[:, 0, :, 0] == 55).all(1)
    shares = [k.float().mean().item() for k in (grey, solar, ~grey & ~solar)]
    assert not (grey & solar).any() and all(abs(s - 1 / 3) < 0.02 for s in shares), shares


def test_finetune_color_jitter_is_pillows():
    """Brightness, contrast and saturation by factors in (0.7, 1.3) equal Pillow's in that order, to within 2 levels."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    out = finetune.color_jitter(torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.Generator().manual_seed(1))
    factors = 0.7 + 0.6 * torch.rand(3, 20, 1, 1, 1, generator=torch.Generator().manual_seed(1)).flatten(1)
    assert factors.std() > 0.1
    for i, picture in enumerate(map(Image.fromarray, pictures)):
        for name, factor in zip(("Brightness", "Contrast", "Color"), factors[:, i].tolist()):
            picture = getattr(ImageEnhance, name)(picture).enhance(factor)
        assert np.abs(out[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)).max() <= 2


def test_finetune_resumes_bit_identical(tuned, tmp_path, monkeypatch):
    """Stopped in each of the three stages, in and between epochs, a run ends with the bits of one that was not."""
    root, _ = tuned
    tune(root, tmp_path / "whole")
    calls = iter(range(10 ** 6))
    monkeypatch.setattr(finetune, "any_rank", lambda flag: next(calls) in (1, 5, 7))
    for _ in range(3):
        with pytest.raises(SystemExit, match="the same command goes on"):
            tune(root, tmp_path / "cut")
    tune(root, tmp_path / "cut")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 12 and a["best"] == b["best"]
    assert all(torch.equal(v, b["modules"][k]) for k, v in a["modules"].items())
    lines = [[(r["step"], r["top1"]) for r in map(json.loads, open(tmp_path / n / "log.jsonl")) if "top1" in r]
             for n in ("whole", "cut")]
    assert lines[0] == lines[1] and [s for s, _ in lines[0]] == [3, 6, 9, 12]
    with pytest.raises(SystemExit, match="drop_path: 0.1 there, 0.2 here"):
        tune(root, tmp_path / "cut", "--drop-path", 0.2)


def test_linprobe_resumes_bit_identical(tuned, tmp_path, monkeypatch):
    """Stopped within and at the end of an epoch, from pictures and from stored features: the unbroken probe's bits."""
    root, _ = tuned
    for words in (), ("--cached",):
        base = ["--checkpoint", root / "mae.pt", "--data", root / "train.beton", "--val-data", root / "val.beton", "--epochs",
                3, "--warmup-epochs", 1, "--total-batch", 16, "--batch-size", 8, "--num-workers", 2, *words]

        def probe(name):
            linprobe.main(linprobe.get_args([str(w) for w in [*base, "--output-dir", tmp_path / (name + "".join(words))]]))
        probe("whole")
        with monkeypatch.context() as patch:
            calls, step = itertools.count(), linprobe.guarded_step
            patch.setattr(linprobe, "guarded_step", lambda *inputs: (
                signal.raise_signal(signal.SIGUSR1) if next(calls) in (1, 5) else None, step(*inputs))[1])
            for _ in range(2):
                with pytest.raises(SystemExit, match="the same command goes on"):
                    probe("cut")
        probe("cut")
        a, b = (torch.load(tmp_path / (name + "".join(words)) / "last.pt", weights_only=True) for name in ("whole", "cut"))
        assert a["step"] == b["step"] == 9 and a["result"] == b["result"]
        assert all(torch.equal(v, b["head"][k]) for k, v in a["head"].items())


def test_finetune_counts_each_picture_once(tuned, tmp_path):
    """13 pictures on two processes and on one give the same table, one row for each set."""
    root, _ = tuned
    tune(root, tmp_path, "--epochs", 1, "--mixup", 0, "--cutmix", 0)
    words = [HERE / "finetune.py", "--eval", "--resume", tmp_path / "best.pt", "--batch-size", 4, "--num-workers", 1,
             "--val-data", root / "val.beton", root / "train"]
    tables = [subprocess.run([str(w) for w in [sys.executable, *launch, *words]], capture_output=True, text=True)
              for launch in ((), ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29611))]
    rows = [[line for line in t.stdout.splitlines() if line.startswith("|")] for t in tables]
    assert rows[0] == rows[1] and len(rows[0]) == 4, tables
    assert [row.split("|")[4].strip() for row in rows[0][2:]] == ["13", "48"]


def test_finetune_refuses_other_data(tuned, tmp_path):
    """Labels beyond the head, other classes, an empty file, a checkpoint without a head: each is said in words."""
    root, _ = tuned
    bare = tmp_path / "bare.beton"  # no sidecar: only the labels can tell
    bare.write_bytes((root / "other.beton").read_bytes())
    empty = np.fromfile(root / "val.beton", np.uint8)
    empty[:HEADER.itemsize].view(HEADER)["num_samples"] = 0
    empty.tofile(tmp_path / "empty.beton")
    for val, error, word in ((bare, SystemExit, "labels from 0 to 3, the head is for 0 to 2"),
                             (root / "other", SystemExit, "labels from"),
                             (tmp_path / "empty.beton", DataError, "0 samples")):
        with pytest.raises(error, match=word):
            tune(root, tmp_path, "--val-data", val)
    renamed = json.loads((root / "val.json").read_text())
    (tmp_path / "val.beton").write_bytes((root / "val.beton").read_bytes())
    (tmp_path / "val.json").write_text(json.dumps(dict(renamed, classes=["a", "b", "z"])))
    with pytest.raises(SystemExit, match="other classes than the model; they differ in c, z"):
        tune(root, tmp_path, "--val-data", tmp_path / "val.beton")
    with pytest.raises(SystemExit, match="holds no classifier"):
        tune(root, tmp_path, "--resume", root / "mae.pt")


def test_finetune_rand_augment_repeats(tuned):
    """RandAug through the folder loader changes the pictures, by (seed, epoch, sample) alone."""
    def pixels(workers, **kwargs):
        with FolderLoader(tuned[0] / "train", 16, res=32, num_workers=workers, **kwargs) as loader:
            return torch.cat([images for images, _ in loader])
    rand = finetune.rand_augment_transform(*finetune.RAND_AUG)
    for _ in range(3000):  # the rarest draw is the one that fails
        rand(Image.new("RGB", (8, 8)))
    assert torch.equal(pixels(1, transform=rand), pixels(2, transform=rand))
    assert not torch.equal(pixels(1, transform=rand), pixels(1))


def test_linprobe_lars_is_the_formula():
    """Ten steps on a matrix and a vector equal LARS written out in plain Python lists."""
    torch.manual_seed(0)
    matrix, vector, gradients = torch.randn(4, 3), torch.randn(3), torch.randn(10, 15)
    p, q = torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(vector.clone())
    optimizer = linprobe.LARS([p, q], lr=0.5, weight_decay=0.1)
    w, v, mw, mv = matrix.flatten().tolist(), vector.tolist(), [0.0] * 12, [0.0] * 3
    for g in gradients:
        p.grad, q.grad = g[:12].view(4, 3), g[12:]
        optimizer.step()
        u = [a + 0.1 * b for a, b in zip(g[:12].tolist(), w)]
        trust = 0.001 * math.sqrt(sum(a * a for a in w)) / math.sqrt(sum(a * a for a in u))
        mw = [0.9 * m + trust * a for m, a in zip(mw, u)]
        mv = [0.9 * m + a for m, a in zip(mv, g[12:].tolist())]
        w, v = [a - 0.5 * m for a, m in zip(w, mw)], [a - 0.5 * m for a, m in zip(v, mv)]
    assert p.flatten().tolist() == pytest.approx(w, rel=1e-5) and q.tolist() == pytest.approx(v, rel=1e-5)


def test_linprobe_knn_is_brute_force():
    """The vote equals a loop over all neighbours: cosine, k 20, exp(similarity / 0.07)."""
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(60, 8), torch.randint(5, (60,)), torch.randn(7, 8)
    scores = linprobe.knn_scores(bank, labels, 5)(queries)
    for query, score in zip(queries, scores):
        near = sorted(((torch.cosine_similarity(query, b, 0).item(), int(y)) for b, y in zip(bank, labels)))[-20:]
        votes = [sum(math.exp((s - 1) / 0.07) for s, y in near if y == c) for c in range(5)]
        assert score.tolist() == pytest.approx(votes, rel=1e-3)


def test_linprobe_runs_every_way(tuned, tmp_path, capsys):
    """Images, stored features and kNN end in a result over all 13 pictures; stored rows are the model's features."""
    root, mae = tuned
    base = ["--checkpoint", root / "mae.pt", "--data", root / "train.beton", "--val-data", root / "val.beton", "--pool",
            "mean", "--epochs", 2, "--warmup-epochs", 1, "--total-batch", 16, "--batch-size", 8, "--num-workers", 2]
    scratch = ("--checkpoint", "none", "--model", "vit_nano_patch8", "--input-size", 32)
    for name, *words in ("images",), ("stored", "--cached"), ("stored", "--knn"), ("random", *scratch, "--knn"):
        linprobe.main(linprobe.get_args([str(w) for w in [*base, "--output-dir", tmp_path / name, *words]]))
        assert "of 13 pictures" in capsys.readouterr().out.splitlines()[-1]
    picture = Image.fromarray(BetonReader(root / "val.beton").image(5, (6, 2, 35, 35))).resize((32, 32), Image.BICUBIC)
    expected = mae.features(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]
    row = torch.from_numpy(np.load(tmp_path / "stored/features_val.npy")[5]).float()
    assert torch.cosine_similarity(row, expected, 0) > 0.999
    torch.save(torch.zeros(1), tmp_path / "images/last.pt")
    with pytest.raises(SystemExit, match="not a checkpoint of linprobe.py"):
        linprobe.main(linprobe.get_args([str(w) for w in [*base, "--output-dir", tmp_path / "images"]]))


def test_finetune_and_linprobe_share_the_setup_block():
    """The text between the marks is the same in all three scripts."""
    blocks = {(HERE / f"{name}.py").read_text().split("# --- setup\n")[1].split("# --- end setup")[0]
              for name in ("pretrain", "finetune", "linprobe")}
    assert len(blocks) == 1


# --- soak: pytest test_all.py -m soak
def killed_until_done(command, times, rng, out):
    """Runs a command again and again, killing it at random moments, and at last lets it end; returns the kills."""
    kills = 0
    while True:
        run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        try:
            run.wait(timeout=rng.uniform(3, 9) if kills < times else 600)
            assert run.returncode == 0
            if kills >= times:
                return kills
            for old in out.glob("*.pt"):  # it ended before its time: from the start again
                old.unlink()
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1


LONG = ("--epochs", 150, "--save-minutes", 0.002, "--save-every", 1000, "--viz-every", 1000)


@pytest.mark.soak
def test_soak_pretrain_30_kills(folder, tmp_path):
    """SIGKILL at 30 random moments of a run through all three stages: the unbroken run's weights, bit for bit."""
    train_here(folder, tmp_path / "whole", *LONG)
    command = [*map(str, [sys.executable, HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data",
                          folder / "val.beton", "--output-dir", tmp_path / "cut", *TINY, *LONG])]
    assert killed_until_done(command, 30, np.random.default_rng(0), tmp_path / "cut") == 30
    assert equal_weights(tmp_path / "cut", tmp_path / "whole")
    steps = [line["step"] for line in log_of(tmp_path / "cut")]
    assert steps == sorted(set(steps)) and steps[-1] == 600


@pytest.mark.soak
def test_soak_finetune_10_kills(tuned, tmp_path):
    """The same for finetuning, ten times."""
    long = ("--epochs", 150, "--save-minutes", 0.002, "--save-every", 1000)
    tune(tuned[0], tmp_path / "whole", *long)
    command = [*map(str, [sys.executable, HERE / "finetune.py", "--finetune", tuned[0] / "mae.pt", "--data",
                          tuned[0] / "train.beton", "--val-data", tuned[0] / "val.beton", "--warmup-epochs", 1,
                          "--total-batch", 16, "--batch-size", 8, "--num-workers", 2, "--output-dir", tmp_path / "cut",
                          *long])]
    assert killed_until_done(command, 10, np.random.default_rng(1), tmp_path / "cut") == 10
    assert equal_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.soak
def test_soak_torchrun_restarts_after_a_rank_is_killed(folder, tmp_path):
    """torchrun --max-restarts over two ranks, one of them killed eight times: the unbroken two ranks' weights."""
    def launch(out, port):
        return subprocess.Popen([*map(str, [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 20, "--master_port", port,
            HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir", out,
            *TINY, *LONG, "--batch-size", 8])], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True)
    run = launch(tmp_path / "whole", 25000 + os.getpid() % 20000)
    assert run.communicate(timeout=600) and run.returncode == 0
    run, rng, kills, seen = launch(tmp_path / "cut", 26000 + os.getpid() % 20000), np.random.default_rng(2), 0, None
    while run.poll() is None and kills < 8:
        time.sleep(rng.uniform(6, 14))
        ranks = [int(p) for t in Path(f"/proc/{run.pid}/task").glob("*") for p in (t / "children").read_text().split()]
        ranks = [p for p in ranks if b"pretrain.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        if len(ranks) == 2 and ranks != seen:
            os.kill(ranks[rng.integers(2)], signal.SIGKILL)
            seen, kills = ranks, kills + 1
    text = run.communicate(timeout=600)[0]
    assert run.returncode == 0 and kills >= 5 and "done: 150 epochs" in text, (kills, text)
    assert equal_weights(tmp_path / "cut", tmp_path / "whole")


def damage(rng, whole, reader, i, kind):
    """A .beton file, wrong in one of seven ways: 0 to 3 anywhere or in its tables, 4 to 6 in the JPEG of sample i."""
    data, table = bytearray(whole), 24 + 2 * 1041
    row = table + 24 * int(rng.integers(reader.num_samples))
    at, size = int(reader.ptrs[i]), int(reader.sizes[i])
    if kind == 0:  # bits anywhere
        for at in rng.integers(len(data), size=int(rng.integers(1, 40))):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[int(rng.integers(len(data))):]
    elif kind == 2:  # fields swapped
        other = table + 24 * int(rng.integers(reader.num_samples))
        data[row:row + 13], data[other:other + 13] = data[other:other + 13], data[row:row + 13]
    elif kind == 3:  # hostile numbers in header, samples and allocation table
        end = int.from_bytes(data[16:24], "little")
        at = int(rng.choice([rng.integers(24), row + rng.integers(24), end + rng.integers(len(data) - end)]))
        value = int(rng.choice([0, 1, 255, 65535, 2 ** 31, 2 ** 63 - 1, len(data)])) + int(rng.integers(-2, 3))
        data[at:at + 8] = (value % 2 ** 64).to_bytes(8, "little")
        del data[len(whole):]
    elif kind == 4:  # valid tables, bits of one JPEG
        for b in rng.integers(size, size=int(rng.integers(1, 30))):
            data[at + b] ^= 1 << int(rng.integers(8))
    elif kind == 5:  # its header
        for b in rng.integers(min(size, 700), size=int(rng.integers(1, 6))):
            data[at + b] = int(rng.integers(256))
    else:  # its end, or a part, missing
        b = int(rng.integers(size))
        data[at + b:at + size] = bytes(size - b) if rng.random() < 0.5 else rng.bytes(size - b)
    return data


def fuzz(whole_path, out, first, count):
    """In a process of its own: opens and reads `count` damaged copies; SIGALRM ends one that takes 10 s."""
    reader, whole, tally = BetonReader(whole_path), Path(whole_path).read_bytes(), {"refused": 0, "read": 0, "unlike": 0}
    good = torch.cat([x for x, _ in ESSLLoader(whole_path, 4, train=False, res=48, drop_last=False)])
    for number in range(first, first + count):
        path = Path(out) / f"{number}.beton"
        path.write_bytes(damage(np.random.default_rng(number), whole, reader, number // 7 % reader.num_samples, number % 7))
        signal.alarm(10)
        try:
            loader = ESSLLoader(path, 4, train=False, res=48, num_workers=1, skip_bad=True)
            found = torch.cat([x for x, _ in loader])
            tally["read"] += 1
            for i in range(loader.num_samples):  # what is not reported is as libjpeg-turbo has it from the same bytes
                if i in loader.bad_samples or (found.shape == good.shape and torch.equal(found[i], good[i])):
                    continue
                try:
                    box = center_box(int(loader.reader.widths[i]), int(loader.reader.heights[i]), 224 / 256)
                    exact = Image.fromarray(loader.reader.image(i, box)).resize((48, 48), Image.Resampling.BICUBIC)
                except DataError:
                    continue  # damaged outside of the crop
                off = np.abs(np.asarray(exact).astype(int) - found[i].permute(1, 2, 0).numpy()).mean()
                tally["unlike"] += int(off > 6)  # noise has sharp chroma, whose upsampling differs
            loader.close()
        except (DataError, ValueError):
            tally["refused"] += 1
        signal.alarm(0)
        path.unlink()
    print(json.dumps(tally))


@pytest.mark.soak
def test_soak_5000_damaged_files(beton, tmp_path):
    """No crash by signal, no hang over 10 s: each ends in a clear error or in pictures, those of libjpeg-turbo."""
    tally = {}
    for first in range(0, 5000, 250):
        done = subprocess.run([sys.executable, "-c", f"import test_all; test_all.fuzz({str(beton[0])!r}, {str(tmp_path)!r}, "
                               f"{first}, 250)"], cwd=HERE, capture_output=True, text=True, timeout=2600)
        assert done.returncode == 0, (sorted(tmp_path.iterdir()), done.stderr[-2000:])
        tally = {k: v + tally.get(k, 0) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    print(tally)
    assert tally["refused"] + tally["read"] == 5000 and tally["refused"] > 500 and tally["read"] > 500
    assert tally["unlike"] <= 0.002 * 40 * tally["read"]


def guarded(n, dtype):
    """An array whose end is the end of readable memory: whoever touches what follows is killed by SIGSEGV."""
    page, size = mmap.PAGESIZE, n * np.dtype(dtype).itemsize
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    libc = ctypes.CDLL(None, use_errno=True)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0) == 0
    return np.frombuffer(memory, np.uint8, size, room - size).view(dtype)


def fuzz_guarded(whole_path, first, count):
    """In a process of its own: damaged JPEGs of a good file, decoded where all memory of the kernels ends at a guard."""
    reader, whole, codes = BetonReader(whole_path), Path(whole_path).read_bytes(), []
    for number in range(first, first + count):
        rng, i = np.random.default_rng(number), number // 3 % reader.num_samples
        data = damage(rng, whole, reader, i, 4 + number % 3)
        blob, w, h = bytes(data[reader.ptrs[i]:reader.ptrs[i] + reader.sizes[i]]), reader.widths[i], reader.heights[i]
        if not blob:
            continue
        scratch = essl_loader.make_scratch(np.array([len(blob)]), np.array([w]), np.array([h]), 48)
        scratch = scratch._replace(**{k: guarded(getattr(scratch, k).size, getattr(scratch, k).dtype) for k in (
            "starts", "clean", "planes", "split", "weights", "acc", "a", "b")})
        src = guarded(len(blob), np.uint8)
        src[:] = np.frombuffer(blob, np.uint8)
        out = guarded(48 * 48 * 3, np.uint8)
        box = random_box(int(w), int(h), (0.2, 1.0), (3 / 4, 4 / 3), number, 0, 0)
        codes.append(essl_loader.resized_crop(src, len(src), int(reader.modes[i]), int(w), int(h), *box, 48, True, False, out,
                                              scratch))
        essl_loader.destroy_decoder(scratch.tj[0])
    print(json.dumps([codes.count(c) for c in range(5)]))


@pytest.mark.soak
def test_soak_kernels_stay_in_their_memory(beton):
    """2,000 damaged samples with every buffer of the kernels against a page that may not be touched."""
    for first in range(0, 2000, 500):
        done = subprocess.run([sys.executable, "-c", f"import test_all; test_all.fuzz_guarded({str(beton[0])!r}, {first}, "
                               "500)"], cwd=HERE, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        codes = json.loads(done.stdout.splitlines()[-1])
        assert codes[0] > 50 and sum(codes[1:]) > 20, codes


@pytest.mark.soak
def test_soak_300_hostile_pictures(tmp_path):
    """Good pictures in, bad ones named, of 300 of every kind; nothing hangs, memory stays bounded."""
    root, rng = tmp_path / "in" / "class", np.random.default_rng(0)
    root.mkdir(parents=True)
    good = draw(rng, 200, 150)
    for fmt in "JPEG", "PNG", "WEBP", "TIFF", "BMP":
        good.save(whole := io.BytesIO(), fmt)
        whole = whole.getvalue()
        for tenth in range(10):  # truncated at every tenth
            (root / f"cut_{fmt}_{tenth}.{fmt.lower()}").write_bytes(whole[:len(whole) * tenth // 10])
        for other in "jpg", "png", "webp", "bmp", "tif":  # wrong extensions: Pillow goes by content
            (root / f"as_{fmt}.{other}").write_bytes(whole)
        for k in range(20):  # bits of its header
            data = bytearray(whole)
            for at in rng.integers(60, size=4):
                data[at] = int(rng.integers(256))
            (root / f"bits_{fmt}_{k}.{fmt.lower()}").write_bytes(data)
    for k in range(120):
        (root / f"noise_{k}.jpg").write_bytes((b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"")[k % 4]
                                              + rng.bytes(k * 40 if k % 4 < 3 else 0))
    bomb = b"P6 60000 60000 255\n" + bytes(1000)
    (root / "bomb.ppm").write_bytes(bomb)
    Image.new("L", (30000, 30000)).save(root / "bomb.png")
    good.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray((np.asarray(good.convert("L")).astype(np.uint16) * 257)).save(root / "deep.png")
    good.save(root / "moving.webp", save_all=True, append_images=[good.rotate(90)] * 3)
    Image.new("RGB", (1, 1)).save(root / "one.png")
    Image.new("RGB", (65500, 3)).save(root / "wide.jpg")
    good.save(whole := io.BytesIO(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(40))
    (root / "exif.jpg").write_bytes(whole.getvalue())
    good.save(root / "secret.png")
    (root / "secret.png").chmod(0)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "nowhere.png").symlink_to(root / "absent.png")
    (root / "around").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    names = [p for p in root.iterdir() if p.name != "around"]
    assert len(names) >= 300
    expected = {}
    for path in names:  # Pillow's word on each
        try:
            assert path.is_file()
            with Image.open(path) as picture, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture.load()
                expected[path.name] = picture.size
        except Exception:
            expected[path.name] = None
    done = script("build_beton.py", "--data-dir", root.parent, "--out", tmp_path / "x.beton", "--skip-bad")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "x.json").read_text())
    bad = {Path(entry["file"]).name for entry in told["left_out"]}
    assert bad == {name for name, size in expected.items() if size is None} and all(e["reason"] for e in told["left_out"])
    assert told["num_samples"] + len(bad) == len(names) and {"bomb.ppm", "bomb.png", "loop.png", "pipe.png"} <= bad
    assert not {"cmyk.jpg", "deep.png", "moving.webp", "one.png", "wide.jpg", "exif.jpg", "as_PNG.jpg"} & bad
    assert script("build_beton.py", "--verify", tmp_path / "x.beton").returncode == 0


@pytest.mark.soak
def test_soak_full_disk(folder, tmp_path):
    """A tmpfs that fills: a build leaves nothing, a run goes on, says so and ends with code 1, its checkpoint loads."""
    small = tmp_path / "small"
    small.mkdir()
    with ExitStack() as stack:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140m", "tmpfs", small], capture_output=True).returncode:
            pytest.skip("mounting takes rights")
        stack.callback(subprocess.run, ["umount", "-l", small])
        fill = small / "fill"
        fill.write_bytes(bytes((140 << 20) - (64 << 10)))
        done = script("build_beton.py", "--data-dir", folder / "train", "--out", small / "x.beton")
        refused(done, "No space left", "nothing was written")
        assert os.listdir(small) == ["fill"]
        fill.unlink()
        run = subprocess.Popen([*map(str, [
            sys.executable, HERE / "pretrain.py", "--data", folder / "train.beton", "--val-data", folder / "val.beton",
            "--output-dir", small / "run", *TINY, "--epochs", 60])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        for line in run.stdout:
            if line.startswith("epoch 3 loss"):
                free = os.statvfs(small)
                with open(fill, "wb", buffering=0) as f:
                    try:
                        while f.write(bytes(4096)):
                            pass
                    except OSError:
                        pass
                assert free.f_bavail > 0
        errors = run.stderr.read()
        assert run.wait() == 1 and "last.pt could not be written" in errors and "log.jsonl could not be written" in errors
        assert "times this run could not write" in errors.splitlines()[-1], errors  # TensorBoard's thread says more
        names = [name for name in ("last.pt", "previous.pt") if (small / "run" / name).exists()]
        assert torch.load(small / "run" / names[0], weights_only=True)["step"] >= 8
        assert all(line["step"] for line in log_of(small / "run"))
        fill.unlink()
        (small / "run" / "previous.pt").unlink(missing_ok=True)
        done = tiny_run(folder, small / "run", "--epochs", 60)
        assert done.returncode == 0 and "; from " in done.stdout, done.stderr
        assert [line["step"] for line in log_of(small / "run")] == list(range(4, 241, 4))
        done = script("linprobe.py", "--checkpoint", small / "run/last.pt", "--data", folder / "train.beton", "--val-data",
                      folder / "val.beton", "--cached", "--output-dir", small / "probe", "--batch-size", 16, "--total-batch",
                      16, "--epochs", 2)
        assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_soak_thousand_epochs_of_loaders(beton):
    """A loader per epoch for a thousand epochs, two at a time: no thread, file or memory stays."""
    before = None
    for epoch in range(1000):
        with ESSLLoader(beton[0], 8, res=48, num_workers=2) as a, ESSLLoader(beton[0], 8, res=32, num_workers=2) as b:
            a.set_epoch(epoch)
            assert sum(len(x) for (x, _), (y, _) in zip(a, b)) == 40
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        now = threading.active_count(), len(os.listdir("/proc/self/fd")), resident
        before = now if epoch == 50 else before
    assert now[:2] == before[:2] and now[2] - before[2] < 30e6, (before, now)

# --- README
def test_readme_names_only_flags_that_exist():
    """Every flag that the README gives a script is one that the script documents."""
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"^\| `(\w+\.py)`", text, re.M):
        used = set(re.findall(r"--[a-z][a-z-]+", " ".join(re.findall(rf"{name}([^\n`]*)", text))))
        if used:
            known = set(re.findall(r"--[a-z][a-z-]+", script(name, "--help").stdout))
            assert used <= known, (name, used - known)
