"""Shows that all of it holds: `pytest test_all.py`, some minutes on two cores, no GPU, no download.

Tests draw their own pictures; with DAILYMAE_PHOTOS naming a folder of class folders they use real
photos as well. Everything is compared with something independent: Pillow, stock ffcv, torch in
float64, the paper's tables. `-m soak` runs the long ones (kills, damaged files) and `-m cuda` those
that need a GPU.
"""
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pyarrow
import pytest
import torch
import turbojpeg
from numba import typeof, types
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pyarrow import parquet
from timm.optim import muon
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench_loader
import build_beton
import essl_loader
import finetune
import linprobe
import models_mae
import pretrain
import schedules
from essl_loader import (BetonReader, DataError, ESSLLoader, FolderLoader, center_box,
                         check_batches, open_loader, random_box, uniform)
from models_mae import ViT, WeightsError, load_into, load_mae, read_weights, size_of, vit_settings

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
essl_loader.bind()  # for kernels that tests call without a reader
HERE = Path(__file__).resolve().parent
PHOTOS = os.environ.get("DAILYMAE_PHOTOS")
soak = functools.partial(pytest.param, marks=pytest.mark.soak)  # a case for -m soak only


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """Skips what is marked soak or cuda unless -m asks for it; gives signals back after a test."""
    for mark in ("soak", "cuda"):
        if request.node.get_closest_marker(mark) and mark not in request.config.option.markexpr:
            pytest.skip(f"only with -m {mark}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))


def run(name, *words, ranks=1, code=0, **env):
    """Runs a script as a user would, one thread a process, to an exit code, without a traceback;
    under torchrun --standalone for several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else ()), HERE / name, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == code, done.stdout + done.stderr
    assert ranks > 1 or "Traceback" not in done.stderr, done.stderr
    return done


def train(script, *words):
    """A script's main in this process -> its exit code."""
    try:
        script.main(script.get_args([str(word) for word in words]))
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return int(e.code or 0)
    return 0


def built(*words, code=0):
    """What build_beton.py prints, run in this process to an exit code."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert train(build_beton, *words) == code, out.getvalue()
    return out.getvalue()


# --- pictures and files to test on
def draw(rng, width, height):
    """A smooth picture with an edge in it: what a photo is to a JPEG codec."""
    shape = (height // 40 + 2, width // 40 + 2, 3)
    coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    box = (width // 3, height // 4, width // 2 + 1, height // 2 + 1)
    picture.paste(tuple(rng.integers(60, 200, 3).tolist()), box)
    return picture.filter(ImageFilter.GaussianBlur(1.5))


def jpeg_of(picture, **options):
    """JPEG bytes from Pillow, of any of its options."""
    out = io.BytesIO()
    picture.save(out, "JPEG", **{"quality": 95} | options)
    return out.getvalue()


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def write_beton(path, items):
    """A .beton of (mode, width, height, bytes), from the format notes alone; sample i: label i."""
    page = 8 << 20
    sizes = [len(data) for *_, data in items]
    starts = np.cumsum([page, *sizes])
    samples = [(*item[:3], starts[i], i) for i, item in enumerate(items)]
    alloc = [(i, starts[i], size) for i, size in enumerate(sizes)]
    head = [np.array((2, 2, page, len(items), starts[-1]), essl_loader.HEADER),
            np.array([(2, b"image", b""), (1, b"label", b"")], essl_loader.FIELD),
            np.array(samples, essl_loader.SAMPLE)]
    head = b"".join(part.tobytes() for part in head).ljust(page, b"\0")
    pictures = b"".join(data for *_, data in items)
    path.write_bytes(head + pictures + np.array(alloc, essl_loader.ALLOC).tobytes())
    return path


@pytest.fixture(scope="session")
def beton(tmp_path_factory):
    """40 pictures of many sizes: 4:2:0, 4:4:4 and gray, with and without an index, two raw."""
    rng = np.random.default_rng(1)
    items = []
    for i in range(40):
        picture = draw(rng, *rng.integers(50, 400, 2).tolist())
        data = jpeg_of(picture.convert("L") if i % 10 == 9 else picture,
                       subsampling=0 if i % 4 == 3 else 2,
                       progressive=i == 14,  # these two are decoded whole, by libjpeg-turbo
                       restart_marker_blocks=3 if i == 15 else 0)
        if i % 3:
            data, has_index = essl_loader.add_index(data, *picture.size)
            assert has_index == (i != 14)
        raw = i % 20 == 5
        items.append((int(raw), *picture.size, np.asarray(picture).tobytes() if raw else data))
    return write_beton(tmp_path_factory.mktemp("beton") / "mixed.beton", items)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 64 drawn pictures to train on and 13 to hold out, and .beton files."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(2)
    for part, count in (("train", 64), ("val", 13)):
        for i in range(count):
            path = root / part / ("dark", "light")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = draw(rng, int(rng.integers(40, 90)), int(rng.integers(40, 90)))
            picture.point(lambda v: v // 2 + 127 * (i % 2)).save(path)
        built("--data-dir", root / part, "--out", root / f"{part}.beton")
    return root


def spoil(source, out, i):
    """A copy of a .beton in which most of sample i's JPEG is zeros."""
    jpeg = BetonReader(source).read(i)
    zeros = jpeg[:200].ljust(len(jpeg), b"\0")
    out.write_bytes(source.read_bytes().replace(jpeg, zeros))
    return out


# --- build_beton
def tar_of(members):
    """The bytes of a tar of (name, bytes) pairs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def parquet_of(members, label):
    """The bytes of a parquet file as Hugging Face writes it."""
    table = pyarrow.table({"image": [{"bytes": data, "path": name} for name, data in members],
                           "label": [label] * len(members)})
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=3)
    return out.getvalue()


def items_of(folder):
    """(name, bytes) of the held-out pictures, as a list for each class."""
    return [[(path.name, path.read_bytes()) for path in sorted((folder / "val" / name).iterdir())]
            for name in ("dark", "light")]


@pytest.mark.parametrize("kind", ["tar of tars", "class tars", "class folders in a tar", "shards",
                                  "parquet"])
def test_build_sources_give_the_same_file(folder, tmp_path, kind):
    """Each source gives the class folders' file, byte for byte, with any number of workers."""
    dark, light = items_of(folder)
    files = {}
    if kind == "tar of tars":
        files["0.tar"] = tar_of([("light.tar", tar_of(light[::-1])), ("dark.tar", tar_of(dark))])
    elif kind == "class tars":
        files = {f"{name}.tar": tar_of((f"{name}_{file}", data) for file, data in items)
                 for name, items in (("dark", dark), ("light", light))}
    elif kind == "class folders in a tar":
        files["0.tar"] = tar_of([(f"./top/{c}/{name}", data) for c, items in
                                 (("light", light), ("dark", dark)) for name, data in items])
    for i, items in enumerate((dark, light) if not files else ()):
        labels = [(name.replace("png", "cls"), b"%d" % i) for name, _ in items]
        pack = parquet_of(items, i) if kind == "parquet" else tar_of(items + labels)
        files[f"{i}.{'parquet' if kind == 'parquet' else 'tar'}"] = pack
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    words = ["--classes", folder / "val.beton"] if kind in ("shards", "parquet") else []
    built("--data-dir", tmp_path, "--out", tmp_path / "x.beton", "--num_workers", 3, *words)
    assert (tmp_path / "x.beton").read_bytes() == (folder / "val.beton").read_bytes()
    assert BetonReader(tmp_path / "x.beton").classes == ["dark", "light"]


@pytest.mark.parametrize("kind", ["names", "numbers", "devkit"])
def test_build_labels_of_flat_sources(folder, tmp_path, kind, monkeypatch):
    """--labels of names (as Kaggle's csv), of numbers, or from README's code for the devkit, whose
    numbers are those of its meta.mat, give the pictures of a flat tar their labels."""
    monkeypatch.chdir(tmp_path)
    expected = {f"ILSVRC2012_val_{i:08}": label for i, label in enumerate((1, 0, 0, 1, 1), 1)}
    Path("val.tar").write_bytes(tar_of((f"{name}.JPEG", b"") for name in expected))
    labels = Path("val_labels.txt")
    if kind == "devkit":
        synsets = np.zeros(3, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
        synsets[:] = [(1, "light", 0), (2, "dark", 0), (3, "all", 2)]
        meta = io.BytesIO()
        pytest.importorskip("scipy.io").savemat(meta, {"synsets": synsets})
        truth = ("a/data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n2\n1\n1\n")
        archive = gzip.compress(tar_of([truth, ("a/data/meta.mat", meta.getvalue())]))
        Path("ILSVRC2012_devkit_t12.tar.gz").write_bytes(archive)
        exec((HERE / "README.md").read_text().split("```python devkit\n")[1].split("```")[0], {})
    elif kind == "names":
        labels.write_text("".join(f"{name},{('dark', 'light')[label]} 1 2 3 4 dark 5 6 7 8\n"
                                  for name, label in sorted(expected.items(), reverse=True)))
    else:
        labels.write_text("".join(f"{name}.JPEG {label}\n" for name, label in expected.items()))
    numbered = None if kind == "devkit" else folder / "val.beton"
    pictures, classes = build_beton.find_data(Path("val.tar"), labels, numbered)
    assert [picture.label for picture in pictures] == list(expected.values())
    assert classes == ["dark", "light"]


def test_build_numbers_that_name_classes(folder, tmp_path):
    """Folders 0, 1, 10, 2 are classes in ImageFolder's order; a label 2 is the folder 2."""
    (dark, *_), _ = items_of(folder)
    for name in ("0", "1", "10", "2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.png").write_bytes(dark[1])
    built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton")
    (tmp_path / "val.tar").write_bytes(tar_of([("v.png", dark[1]), ("w.png", dark[1])]))
    (tmp_path / "labels.txt").write_text("v.png\t2\nw.png, 10\n")
    pictures, classes = build_beton.find_data(
        tmp_path / "val.tar", tmp_path / "labels.txt", tmp_path / "x.beton")
    assert [classes[picture.label] for picture in pictures] == ["2", "10"]


def test_build_refuses_in_words(folder, tmp_path):
    """Bad input of any kind ends with code 2, one paragraph that names it, and no new file."""
    (tmp_path / "flat.tar").write_bytes(tar_of(items_of(folder)[0]))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "flat.tar").read_bytes()[:9000])
    (tmp_path / "cut.parquet").write_bytes(parquet_of(items_of(folder)[0], 0)[:-9])
    (tmp_path / "two.txt").write_text("0.png,dog\n1.png,cat\n")
    (tmp_path / "twice.txt").write_text("a/0.png 1\nb/0.png 2\n")
    (tmp_path / "empty/dog").mkdir(parents=True)
    (tmp_path / "unnamed.beton").write_bytes((folder / "val.beton").read_bytes())  # no .json
    before = sorted(tmp_path.iterdir())
    for source, words, named in (
            ("cut.tar", [], "cut.tar"), ("cut.parquet", [], "cut.parquet"),
            ("empty", [], "empty holds no picture"), ("missing", [], "missing"),
            ("flat.tar", ["--labels", tmp_path / "two.txt"], "two.txt"),
            ("flat.tar", ["--labels", tmp_path / "twice.txt"], "two labels"),
            (folder / "val", ["--classes", tmp_path / "two.txt"], "two.beton"),
            (folder / "val", ["--classes", tmp_path / "unnamed.beton"], "none of the 0 classes")):
        words = ["--data-dir", tmp_path / source, "--out", tmp_path / "x.beton", *words]
        errors = built(*words, code=2)
        assert named in errors and errors.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [[], ["--lossless"]])
def test_build_names_every_bad_picture(tmp_path, words):
    """All bad pictures are named at once, nothing is written; --skip-bad leaves them out."""
    good = jpeg_of(draw(np.random.default_rng(4), 90, 60))
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(tmp_path / "in/deep.png")
    for name, data in {"empty": b"", "text": b"hello", "cut": good[:-200], "ok": good}.items():
        (tmp_path / "in" / f"{name}.jpg").write_bytes(data)
    words = ["--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", *words]
    errors = built(*words, code=2)
    bad = ["cut.jpg", "deep.png", "empty.jpg", "text.jpg"]
    assert "4 of 5" in errors and all(f"/{name}: " in errors for name in bad)
    assert os.listdir(tmp_path) == ["in"]
    built(*words, "--skip-bad")
    left_out = json.loads((tmp_path / "x.json").read_text())["left_out"]
    assert [Path(entry["file"]).name for entry in left_out] == bad
    assert BetonReader(tmp_path / "x.beton").num_samples == 1
    (tmp_path / "in/gone.jpg").symlink_to("nowhere")  # what a disk or a network does
    errors = built(*words, "--skip-bad", "--limit", 6, code=1)
    assert "gone.jpg: [Errno 2]" in errors and "Traceback" not in errors


def test_build_reads_every_mode_as_pillow(tmp_path):
    """Labels are ImageFolder's, each picture Pillow's conversion, upright, up to JPEG's loss."""
    rgb = draw(np.random.default_rng(0), 301, 203)
    tall = draw(np.random.default_rng(1), 17, 900)
    gray = rgb.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    pictures = {"a/2.jpg": (gray, gray), "a/3.JPEG": (rgb.convert("CMYK"), rgb),
                "b/4.webp": (rgb.convert("RGBA"), rgb), "b/7.bmp": (rgb.crop((0, 0, 1, 1)),) * 2,
                "b/8.png": (tall, tall.resize((9, 500), Image.Resampling.BOX)),
                "b/9.png": (rgb, rgb.transpose(Image.Transpose.ROTATE_270))}
    for name, (picture, _) in pictures.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "in" / name, quality=97, exif=exif if "9" in name else b"")
    built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", "--quality", 100,
          "--chroma", "444")
    reader = BetonReader(tmp_path / "x.beton")
    assert reader.classes == ["a", "b"] and list(reader.labels) == [0] * 2 + [1] * 4
    for i, (name, (_, expected)) in enumerate(pictures.items()):
        got = reader.image(i).astype(int)
        assert got.shape[1::-1] == expected.size, name
        assert abs(got - expected.convert("RGB")).mean() < 2, name


@pytest.mark.parametrize("codec, chroma", [("turbojpeg", "420"), ("pil", "444")])
def test_build_jpeg_is_pillows(tmp_path, codec, chroma):
    """A stored picture begins with the JPEG that Pillow writes with the same settings."""
    (tmp_path / "in").mkdir()
    draw(np.random.default_rng(0), 301, 203).save(tmp_path / "in/x.png")
    built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", "--codec", codec,
          "--chroma", chroma, "--max-resolution", 300, "--quality", 90)
    stored = BetonReader(tmp_path / "x.beton").read(0)
    resampling = {"turbojpeg": Image.Resampling.BOX, "pil": Image.Resampling.BICUBIC}[codec]
    small = Image.open(tmp_path / "in/x.png").resize((300, 202), resampling)
    small.info.clear()
    assert stored.startswith(jpeg_of(small, quality=90, subsampling=":".join(chroma),
                                     optimize=True))


def test_build_encodes_noise(tmp_path):
    """The largest JPEG that a picture can become: noise at quality 100, in 4:4:4."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "in/a").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "in/a/x.png")
    out = built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", "--quality", 100,
                "--chroma", "444")
    assert "1 re-encoded, 0 left out" in out
    assert np.abs(BetonReader(tmp_path / "x.beton").image(0).astype(int) - noise).max() < 9


@functools.cache
def jpegs_of_every_kind():
    """{name: JPEG bytes}. What --lossless does with them: names that begin with z are encoded
    anew, those with y are made baseline, those with x are kept without an index."""
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
               "gray": {}, "yprogressive": {"progressive": True}, "zcmyk": {},
               "zturned": {"exif": exif}, "xrestarts": {"restart_marker_blocks": 5},
               "fine": {"quality": 100, "subsampling": 0}, "xrgb": {"keep_rgb": True},
               "comment": {"comment": b"hi", "icc_profile": bytes(200)},
               "optimised": {"optimize": True}}
    kinds = {"zlarge": jpeg_of(draw(rng, 90, 501))}
    for name, kind in options.items():
        mode = {"gray": "L", "zcmyk": "CMYK"}.get(name, "RGB")
        kinds[name] = jpeg_of(draw(rng, *rng.integers(60, 400, 2).tolist()).convert(mode), **kind)
    whole = kinds["yprogressive"]
    kinds["zunfinished"] = whole[:whole.rindex(b"\xff\xda")] + b"\xff\xd9"  # decoders smooth it
    kinds["zbytes"] = kinds["420"][:-2] + bytes(9) + b"\xff\xd9"  # libjpeg-turbo warns of these
    kinds["xadobe"] = kinds["444"][:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\1" + kinds["444"][20:]
    kinds["tail"] = kinds["422"] + b"what a camera left behind the picture"
    return kinds


def test_build_lossless_keeps_bytes(tmp_path):
    """Kept JPEGs are their sources' bytes, progressive ones their pixels; the rest is re-encoded;
    the last line counts each kind."""
    kinds = dict(jpegs_of_every_kind())
    photos = sorted(Path(PHOTOS).glob("*/*.jp*g"))[:100] if PHOTOS else []
    kinds |= {path.stem: path.read_bytes() for path in photos}
    (tmp_path / "all.tar").write_bytes(tar_of((f"{name}.jpg", kinds[name]) for name in kinds))
    out = built("--data-dir", tmp_path / "all.tar", "--out", tmp_path / "x.beton", "--lossless")
    reader = BetonReader(tmp_path / "x.beton")
    for i, name in enumerate(sorted(kinds)):
        stored = reader.read(i)
        if name[0] != "z":
            assert np.array_equal(reader.image(i), pixels(kinds[name])), name
            assert stored.startswith(kinds[name]) == (name[0] != "y"), name
    for letter, how in (("z", "re-encoded"), ("y", "made baseline")):
        assert f" {sum(name[0] == letter for name in kinds)} {how}," in out
    kept = [int(number) for number in re.findall(r"(\d+) kept", out)]  # with and without index
    assert sum(kept) == sum(name[0] not in "yz" for name in kinds) and kept[1] >= 3
    loader = ESSLLoader(tmp_path / "x.beton", 8, res=64, drop_last=False)
    assert compare_with_pillow(loader, tmp_path)[0].max() < 2


def test_build_copies_a_beton(tmp_path, beton):
    """A .beton as the source: the same samples, labels and order, raw ones too, and an index, which
    makes no difference to a batch; a damaged sample is named."""
    out = built("--data-dir", beton, "--out", tmp_path / "x.beton")
    assert "36 copied, 2 copied without index, 2 raw copied, 0 left out" in out
    theirs, ours = BetonReader(beton), BetonReader(tmp_path / "x.beton")
    for i in range(40):
        assert ours.read(i).startswith(theirs.read(i)[:-essl_loader.TRAILER_SIZE]), i
    for name in ("labels", "modes", "widths", "heights"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    for train in (True, False):
        first, second = (ESSLLoader(path, 8, train, res=64, drop_last=False)
                         for path in (beton, tmp_path / "x.beton"))
        assert epochs_of(first) == epochs_of(second)
    built("--verify", tmp_path / "x.beton")
    built("--data-dir", tmp_path / "x.beton", "--out", tmp_path / "again.beton")
    assert all(BetonReader(tmp_path / "again.beton").read(i) == ours.read(i) for i in range(40))
    bad = spoil(beton, tmp_path / "bad.beton", 7)
    assert "sample 7: its JPEG" in built("--data-dir", bad, "--out", tmp_path / "y.beton", code=2)
    with pytest.raises(SystemExit):
        build_beton.get_args(["--data-dir", "a.beton", "--out", "b.beton", "--quality", "90"])


@pytest.mark.parametrize("who, number, word", [("worker", signal.SIGKILL, "died"),
                                               ("parent", signal.SIGTERM, "stopped")])
def test_build_killed_leaves_nothing(folder, tmp_path, monkeypatch, who, number, word):
    """A killed worker or a stopped build ends with code 1 and leaves no file and no process."""
    encode_sample = build_beton.encode_sample

    def encode(settings, picture):
        if picture.name.endswith("/50.png"):
            os.kill(os.getpid() if who == "worker" else os.getppid(), number)
        return encode_sample(settings, picture)
    monkeypatch.setattr(build_beton, "encode_sample", encode)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for a build that would not take it
    words = ["--data-dir", folder / "train", "--out", tmp_path / "x.beton", "--num-workers", 2]
    assert word in built(*words, code=1)
    assert not os.listdir(tmp_path) and not multiprocessing.active_children()


def test_build_verify_finds_one_flipped_bit(folder, tmp_path):
    """--verify names the sample of any flipped bit; the reader refuses any in header and tables."""
    out = tmp_path / "x.beton"
    whole = (folder / "train.beton").read_bytes()
    reader = BetonReader(folder / "train.beton")
    data = bytearray(whole)
    for i, at in ((1, 9), (4, 40), (8, -1)):  # in the checksum itself, the header, the last byte
        data[reader.ptrs[i] + at % reader.sizes[i]] ^= 1
    out.write_bytes(data)
    errors = built("--verify", out, code=1)
    assert "3 of 64" in errors and all(f"sample {i}: " in errors for i in (1, 4, 8))
    settings, tables = 24 + 17, 24 + 2 * 1041  # where the build settings and the samples begin
    for at in (*range(24), *range(settings, settings + 99, 7), *range(tables, tables + 480, 11),
               *range(len(whole) - 480, len(whole), 11)):
        out.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(DataError, match="x.beton"):
            BetonReader(out)
    out.write_bytes(whole)
    sidecar = (folder / "val.json").read_text()  # of another build: one was killed in between
    out.with_suffix(".json").write_text(sidecar)
    with pytest.raises(DataError, match="x.json.*another build"):
        BetonReader(out)


# --- essl_loader
@pytest.mark.parametrize("subsampling", [2, 0, 1, "gray"])
def test_loader_crop_decode_equals_crop_of_full_decode(subsampling):
    """Random boxes, odd sizes, every sampling: within one level of libjpeg-turbo's full decode, and
    the same with an index as without."""
    rng = np.random.default_rng(3)
    lib = essl_loader.bind()
    lib.tj3Init.restype = ctypes.c_void_p
    decoder = ctypes.c_void_p(lib.tj3Init(1))
    gray = subsampling == "gray"
    hs, vs = {2: (2, 2), 1: (2, 1)}.get(subsampling, (1, 1))
    for number, (width, height) in enumerate([(1, 1), (1000, 3), (3, 1000), (17, 16), (33, 31),
                                              (368, 200), (333, 250), (65, 129), (1100, 40)]):
        noise = rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        jpeg = jpeg_of(picture.convert("L") if gray else picture,
                       subsampling=0 if gray else subsampling, quality=(95, 30, 100)[number % 3])
        chroma = (-(-height // vs), -(-width // hs))
        full = [np.zeros(shape, np.uint8) for shape in ((chroma[0] * vs, chroma[1] * hs), chroma,
                                                        chroma)]
        pointers = (ctypes.c_void_p * 3)(*[plane.ctypes.data for plane in full])
        size = ctypes.c_size_t(len(jpeg))
        assert not lib.tj3DecompressToYUVPlanes8(decoder, jpeg, size, pointers, None)
        if number % 2:  # fill bytes (T.81, B.1.1.2) change nothing; libjpeg-turbo's reading varies
            scan = jpeg.index(b"\xff\xda") + 2
            jpeg = jpeg[:scan] + jpeg[scan:].replace(b"\xff", b"\xff\xff")
        sample, has_index = essl_loader.add_index(jpeg, width, height)
        assert has_index
        memory, scratch = essl_loader.make_scratch(*np.array([[len(sample)], [width], [height]]), 8)
        corners = rng.integers((width, height), size=(15, 2))
        ends = rng.integers(corners, (width, height)) + 1
        corners[0] = 0
        ends[0] = (width, height)
        for (x, y), (right, bottom) in zip(corners.tolist(), ends.tolist()):
            kept = []
            for data in (sample, jpeg):
                stored = np.frombuffer(data, np.uint8)
                code = essl_loader.decode_planes(stored.ctypes.data, len(data), width, height, x, y,
                                                 right - x, bottom - y, scratch)
                assert code == essl_loader.OK
                planes = essl_loader.int64s_at(scratch.plane, (3, essl_loader.PLANE_SIZE))
                for row, expected in zip(planes.tolist(), full[:1 if gray else 3]):
                    address, stride, x0, y0, sx, sy, *_ = row
                    start = address - memory.ctypes.data
                    expected = expected[y // sy:-(-bottom // sy), x // sx:-(-right // sx)]
                    rows = y // sy - y0 // sy + np.arange(expected.shape[0])
                    columns = x // sx - x0 // sx + np.arange(expected.shape[1])
                    columns = columns // 64 * 64 + columns % 8 * 8 + columns // 8 % 8  # as they lie
                    ours = memory.view(np.uint8)[start + stride * rows[:, None] + columns] ^ 128
                    off = np.abs(ours.astype(int) - expected).max()
                    assert off <= 1, ((width, height), (x, y, right, bottom), off)
                    kept.append(ours.tobytes())
            assert kept[:len(kept) // 2] == kept[len(kept) // 2:]


@pytest.mark.parametrize("where", ["entries", "trailer", "another picture's"])
def test_loader_damaged_index_never_gives_other_pixels(where):
    """Any flipped bit in an index, or the index of another picture of the same size: an error, or
    the pixels without it where its mark is gone; --verify's checksum finds all of them."""
    rng = np.random.default_rng(2)
    width, height = 300, 90
    jpegs = [jpeg_of(draw(rng, width, height)) for _ in range(2)]
    samples = [essl_loader.add_index(jpeg, width, height)[0] for jpeg in jpegs]
    start = len(jpegs[0])
    trailer = len(samples[0]) - essl_loader.TRAILER_SIZE
    places = {"entries": range(start, trailer), "trailer": range(trailer, len(samples[0]))}
    changed = []
    if where == "another picture's":
        changed.append(jpegs[0] + samples[1][len(jpegs[1]):])
    for at in places.get(where, ()):
        data = bytearray(samples[0])
        data[at] ^= 1 << int(rng.integers(8))
        changed.append(bytes(data))
    assert essl_loader.is_intact(samples[0])
    for box in ((100, 20, 110, 40), (70, 20, 20, 20)):  # several units of a row, and part of one
        _, expected = guarded_crop(jpegs[0], width, height, box)
        refused = 0
        for data in changed:
            assert not essl_loader.is_intact(data)
            code, got = guarded_crop(data, width, height, box)
            refused += code == essl_loader.BROKEN
            assert code == essl_loader.BROKEN or got == expected
        size_and_sum = 4 + 8  # bytes of the trailer without which there is no reading the index
        assert refused >= {"trailer": size_and_sum}.get(where, len(changed))


def compare_with_pillow(loader, folder):
    """Mean difference in levels for each crop of an epoch, and the shifts that explain it, from
    FolderLoader on the decoded pictures: Pillow's crop, resize and flip."""
    (folder / "decoded").mkdir(exist_ok=True)
    for i in range(loader.num_samples):
        Image.fromarray(loader.reader.image(i)).save(folder / f"decoded/{i:03}.bmp")
    names = ("batch_size", "train", "res", "interpolation", "seed", "drop_last", "views")
    plain = FolderLoader(folder / "decoded", **{name: getattr(loader, name) for name in names})
    ours, expected = (torch.cat([images.flatten(0, -4) for images, _ in each]).float()
                      for each in (loader, plain))  # (crops, 3, res, res)
    off = ours - expected
    shifts = [(off * slope).sum((1, 2, 3)) / slope.square().sum((1, 2, 3)).clamp(min=1)
              for slope in torch.gradient(expected, dim=(2, 3))]
    return off.abs().mean((1, 2, 3)), torch.stack(shifts)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_loader_sample_path_equals_pillow(beton, tmp_path, interpolation, train):
    """Decode, crop, resize, flip: mean difference under one level and no shift, at any size, and
    for each of one, two and three views."""
    for views, res in enumerate((224, 160, 65), start=1):
        views = views if train else 1
        loader = ESSLLoader(beton, 16, train, res=res, interpolation=interpolation, seed=4,
                            drop_last=False, views=views)
        means, shifts = compare_with_pillow(loader, tmp_path)
        assert len(means) == 40 * views and means.max() < 1 and shifts.abs().max() < 0.1


def epochs_of(loader, count=2):
    """The batches of the next epochs, as bytes and lists, which can be compared."""
    return [(images.numpy().tobytes(), labels.tolist())
            for _ in range(count) for images, labels in loader]


def test_loader_same_bytes_for_any_threads_and_after_resume(beton):
    """1, 2, 4 threads, and a state loaded in mid-epoch, give the same batches; epochs differ."""
    def loader(threads, batch_size=8, **kwargs):
        return ESSLLoader(beton, batch_size, num_workers=threads, res=96, seed=5, **kwargs)
    expected = epochs_of(loader(1))
    assert epochs_of(loader(2)) == epochs_of(loader(4)) == expected
    assert expected[:5] != expected[5:]
    first = loader(2)
    for _ in itertools.islice(first, 3):
        state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(3)
    resumed.load_state_dict(state)
    assert epochs_of(resumed) == expected[3:]
    with pytest.raises(ValueError, match="order"):
        loader(1, order="pages").load_state_dict(state)
    with pytest.raises(ValueError, match="crop_ratio"):  # larger than the picture
        loader(1, train=False, crop_ratio=1.02)
    halves = [loader(1, 4, rank=rank, world_size=2) for rank in range(2)]  # the same total batch
    for half in halves:
        half.load_state_dict(state)
    both = torch.stack([next(iter(half))[0] for half in halves], 1)
    assert both.flatten(0, 1).numpy().tobytes() == expected[3][0]


def test_loader_keeps_its_memory_and_its_kernel(beton):
    """A later epoch fills the memory of an earlier one, but never that of a batch that is held;
    set_stage takes effect at the next epoch and compiles nothing."""
    loader = ESSLLoader(beton, 4, res=48)
    held, labels = next(iter(loader))
    assert held.dtype == torch.uint8 and labels.dtype == torch.int64
    assert held.is_contiguous(memory_format=torch.channels_last)
    before = held.clone()
    places = [{images.data_ptr() for images, _ in loader} for _ in range(2)]
    assert places[1] <= places[0] and held.data_ptr() not in places[0]
    assert torch.equal(held, before)
    compiled = len(essl_loader.fill.signatures)
    batches = iter(loader)
    next(batches)
    loader.set_stage(res=96, scale=(0.5, 1.0))
    assert next(batches)[0].shape == (4, 3, 48, 48)
    assert next(iter(loader))[0].shape == (4, 3, 96, 96)
    assert len(essl_loader.fill.signatures) == compiled


def test_loader_kernels_compile_for_arm():
    """LLVM makes aarch64 code, with that machine's vector instructions, of a sample's kernel."""
    _, scratch = essl_loader.make_scratch(*np.array([[100], [10], [10]]), 32)
    signature = (types.int64,) * 10 + (types.boolean, types.boolean, types.int64, typeof(scratch))
    kernel = numba.njit(essl_loader.resized_crop.py_func)  # one from the cache has no LLVM code
    kernel.compile(signature)
    text = re.sub('"target-(cpu|features)"="[^"]*"|target (datalayout|triple) = .*', "",
                  kernel.inspect_llvm(signature))
    text = re.sub("= tail call i8 @llvm.x86.*", "= add i8 0, 0", text)  # numba's reference counts
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu="neoverse-n1")
    words = machine.emit_assembly(llvm.parse_assembly(text)).split()
    assert {"smull2", "zip1", "tbl", "fmla", "frintx", "smax"} <= set(words)


@pytest.mark.parametrize("count", [20, soak(1000)])
def test_loader_closes_and_leaves_nothing(beton, count):
    """A loader per epoch, left early: no thread, file or memory stays; a closed one says so."""
    states = []
    for epoch in range(count):
        with ESSLLoader(beton, 4, res=48, num_workers=3) as loader:
            loader.set_epoch(epoch)
            batches = iter(loader)
            next(batches)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
        states.append((threading.active_count(), len(os.listdir("/proc/self/fd")), resident))
    assert states[-1][:2] == states[10][:2] and states[-1][2] - states[10][2] < 30e6
    for closed in (batches, iter(loader)):
        with pytest.raises(RuntimeError, match="closed"):
            next(closed)


def test_loader_leaves_out_what_verify_excludes(beton, tmp_path):
    """A damaged sample is named with the remedy; after that, all else stays as it was."""
    path = spoil(beton, tmp_path / "bad.beton", 7)
    loader = ESSLLoader(path, 4, res=48, drop_last=False)
    state = loader.state_dict()
    with pytest.raises(DataError, match="bad.beton: sample 7: .*--exclude-bad"):
        list(loader)
    assert "sample 7" in built("--verify", path, "--exclude-bad")
    loader = ESSLLoader(path, 4, res=48, drop_last=False)
    loader.load_state_dict(state)
    whole = ESSLLoader(beton, 4, res=48, drop_last=False)
    kept = whole._positions() != 7
    images, expected = (torch.cat([images for images, _ in each]) for each in (loader, whole))
    assert loader.num_samples == 39 and torch.equal(images, expected[kept])
    built("--verify", path)  # not a fault any more


def test_loader_random_box_is_torchvisions():
    """Boxes follow torchvision's RandomResizedCrop over 4,000 draws; flips are halves."""
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    picture = Image.new("RGB", (500, 375))
    limits = ((0.2, 1.0), (3 / 4, 4 / 3))
    ours = np.array([random_box(500, 375, *limits, 0, 0, i) for i in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(picture, *limits) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (500, 375)).all()
    for q in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(ours, q, axis=0) - np.quantile(theirs, q, axis=0)).max() < 15
    flips = [uniform(0, 0, i, essl_loader.FLIP_DRAW) < 0.5 for i in range(4000)]
    assert abs(np.mean(flips) - 0.5) < 0.03


@pytest.mark.parametrize("at, value", [(0, b"\3"), (1, b"\xfe"), (9, b"\xff" * 7),
                                       (1, b"\xff" * 4)])
def test_loader_names_what_is_wrong(beton, tmp_path, at, value):
    """A file of another version, or with false sizes or pointers: a DataError."""
    data = bytearray(beton.read_bytes())
    row = essl_loader.HEADER.itemsize + 2 * essl_loader.FIELD.itemsize + 24 * 7
    place = at + row if at else 0
    data[place:place + len(value)] = value
    (tmp_path / "bad.beton").write_bytes(data)
    with pytest.raises(DataError, match="bad.beton.*sample 7" if at else "bad.beton"):
        list(ESSLLoader(tmp_path / "bad.beton", 8, train=False, res=64))


def test_loader_folder_loader_has_the_same_surface(folder):
    """FolderLoader gives ESSLLoader's labels, in its order; signals do not end its epoch."""
    theirs, ours = (open_loader(folder / name, 16, res=64, seed=6, views=2, num_workers=2)
                    for name in ("train", "train.beton"))
    assert theirs.classes == ours.classes == ["dark", "light"]
    for (_, a), (_, b) in [*zip(theirs, ours, strict=True), *zip(theirs, ours, strict=True)]:
        assert torch.equal(a, b)
    state = torch.get_rng_state()
    batches = iter(theirs)
    next(batches)
    for child in multiprocessing.active_children():  # as torchrun does: the run ends its step
        child.terminate()
    assert len(list(batches)) == 3 and torch.equal(torch.get_rng_state(), state)


def test_loader_pages_order_reads_windows(tmp_path, monkeypatch):
    """order="pages": each sample once, ranks partition, files are read in sequential windows."""
    blob = jpeg_of(draw(np.random.default_rng(0), 40, 40)) + bytes(300_000)
    path = write_beton(tmp_path / "many.beton", [(0, 40, 40, blob)] * 400)  # 15 pages
    page = 8 << 20
    monkeypatch.setattr(essl_loader, "WINDOW", 3 * page)
    asked = set()
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, how: asked.add(at // page))
    loaders = [ESSLLoader(path, 10, res=16, order="pages", rank=rank, world_size=2)
               for rank in range(2)]
    epochs = [[torch.cat([y for _, y in loader]) for loader in loaders] for _ in range(2)]
    for ranks in epochs:
        assert sorted(torch.cat(ranks).tolist()) == list(range(400))
        pages = loaders[0].reader.ptrs[torch.stack(ranks, 1).flatten().numpy()] // page
        windows = [(pages + shift) // 3 for shift in range(3)]
        assert any((np.diff(w) != 0).sum() == len(np.unique(w)) - 1 for w in windows)
    assert epochs[0][0].tolist() != epochs[1][0].tolist() and asked >= set(range(1, 16))


def test_loader_reads_files_of_ffcvs_writer(tmp_path):
    """A file of ffcv's DatasetWriter, JPEG and raw samples, loads in ours, as by Pillow."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    rng = np.random.default_rng(7)
    pairs = [(np.asarray(draw(rng, 60 + 9 * i, 150 - 9 * i)), 3 * i) for i in range(10)]
    path = tmp_path / "ffcv.beton"
    image = RGBImageField(write_mode="smart", jpeg_quality=95, smart_threshold=30000)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(pairs)
    loader = ESSLLoader(path, 10, res=64, seed=8)
    reader = loader.reader
    assert reader.labels.tolist() == list(range(0, 30, 3)) and set(reader.modes.tolist()) == {0, 1}
    for i, (picture, _) in enumerate(pairs):
        expected = picture if reader.modes[i] else pixels(reader.read(i))
        assert np.array_equal(reader.image(i), expected)
    assert compare_with_pillow(loader, tmp_path)[0].max() < 1


IN_FFCV = """
import os, sys, numpy as np
from essl_loader import ESSLLoader, ffcv_decoder
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
path, out, first = sys.argv[1:]

def ours():
    return [x.numpy() for x, _ in ESSLLoader(path, 16, res=48)]

def theirs(decoder):
    pipelines = {"image": [decoder], "label": [IntDecoder()]}
    loader = Loader(path, 16, num_workers=min(2, len(os.sched_getaffinity(0))),
                    order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    images, labels = zip(*[(images.copy(), labels.copy()) for images, labels in loader])
    return np.concatenate(images), np.concatenate(labels)[:, 0]

before = ours() if first == "ours" else None
stock = theirs(CenterCropRGBImageDecoder((48, 48), 1.0)) if first != "damage" else ()
inside = theirs(ffcv_decoder((48, 48), scale=(0.3, 1.0), seed=3)) if first != "ffcv" else ()
after = ours() if first != "damage" else None
assert before is None or np.array_equal(before, after)
np.savez(out, *stock, *inside)
"""


@pytest.mark.parametrize("first", ["ours", "ffcv", soak("damage")])
def test_loader_and_ffcv_in_one_process(folder, tmp_path, first):
    """ESSL, FFCV's Loader and ffcv_decoder read our file in any order; the crops are Pillow's."""
    pytest.importorskip("ffcv")  # in a process of its own: FFCV waits for ever for a failed thread
    path = folder / "train.beton"
    if first == "damage":
        path = spoil(path, tmp_path / "bad.beton", 5)
    done = subprocess.run([sys.executable, "-c", IN_FFCV, path, tmp_path / "out.npz", first],
                          timeout=400, cwd=HERE, capture_output=True, text=True)
    assert ("sample 5 is damaged" in done.stderr) == (first == "damage"), done.stderr
    if first == "damage":
        return
    reader = BetonReader(path)
    stock, labels, *inside = np.load(tmp_path / "out.npz").values()
    assert labels.tolist() == reader.labels.tolist()
    if first == "ffcv":  # then ESSL ran after it, without an error
        return
    inside, again = inside
    assert again.tolist() == reader.labels.tolist()
    for i in range(64):
        full = Image.fromarray(reader.image(i))
        box = random_box(*full.size, (0.3, 1.0), (3 / 4, 4 / 3), 3, i // 16, i)
        for ours, (x, y, w, h), resample, most in (
                (stock[i], center_box(*full.size, 1.0), Image.Resampling.BOX, 6),  # INTER_AREA
                (inside[i], box, Image.Resampling.BICUBIC, 1.5)):
            expected = full.crop((x, y, x + w, y + h)).resize((48, 48), resample)
            assert np.abs(ours.astype(int) - expected).mean() < most


# --- damaged bytes, for the builder and the loader
def damaged(rng, data):
    """Bytes that are cut, or have flipped bits, or a hostile number in them, often at the start."""
    data = bytearray(data)
    places = rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 3000), size=20)
    kind = rng.integers(3)
    if kind == 0:
        del data[places[0]:]
    for place in places if kind == 1 else ():
        data[place] ^= 1 << int(rng.integers(8))
    if kind == 2:
        value = int(rng.choice([0, 255, 65535, 2 ** 31, 2 ** 63 - 1]))
        data[places[0]:places[0] + 8] = value.to_bytes(8, "little")
    return bytes(data)


def guarded(n):
    """n bytes whose end is the end of readable memory: SIGSEGV for whoever touches the next."""
    room = -(-n // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(4096), 0) == 0
    return np.frombuffer(memory, np.uint8, n, room - n)


def guarded_crop(data, width, height, box):
    """Code and bytes of resizing a JPEG's box; every part of the memory ends at a guard page."""
    _, scratch = essl_loader.make_scratch(*np.array([[len(data)], [width], [height]]), 48)
    names = scratch._fields[:scratch._fields.index("end") + 1]  # addresses in order
    parts = {name: guarded(getattr(scratch, after) - getattr(scratch, name))
             for name, after in itertools.pairwise(names)}
    scratch = scratch._replace(**{name: part.ctypes.data for name, part in parts.items()})
    stored = guarded(len(data))
    stored[:] = np.frombuffer(data, np.uint8)
    out = guarded(48 * 48 * 3)
    code = essl_loader.resized_crop(stored.ctypes.data, len(data), 0, width, height, *box, 48, True,
                                    False, out.ctypes.data, scratch)
    return code, out.tobytes()


def fuzz(number, folder):
    """Builds and reads one damaged JPEG, with and without an index, and reads one damaged .beton ->
    outcomes."""
    signal.alarm(300 if number < 10 else 10)  # the first ones compile
    rng = np.random.default_rng(number)
    kinds = sorted(jpegs_of_every_kind().items())
    whole = kinds[number % len(kinds)][1]
    size = Image.open(io.BytesIO(whole)).size
    jpeg = damaged(rng, whole)
    box = random_box(*size, (0.2, 1.0), (3 / 4, 4 / 3), number, 0, 0)
    code, got = guarded_crop(jpeg, *size, box)
    outcomes = ["bad crop" if code else "good crop"]
    if rng.random() < 0.5:  # damage in the JPEG that has the index of the whole one
        index = essl_loader.add_index(whole, *size)[0][len(whole):]
        sample = damaged(rng, whole)[:len(whole)].ljust(len(whole), b"\0") + index
    else:  # damage anywhere
        sample = damaged(rng, essl_loader.add_index(whole, *size)[0])
    code, got = guarded_crop(sample, *size, box)
    outcomes.append("bad sample" if code else "good sample")
    if not code:
        # The pixels of the undamaged picture, or of one with damage that libjpeg-turbo reads too
        fine = [guarded_crop(whole, *size, box)]
        fine.append(guarded_crop(sample[:len(whole)], *size, box))
        assert (0, got) in fine, number
    (folder / "x.jpg").write_bytes(jpeg)
    settings = vars(build_beton.get_args(["--data-dir=.", "--out=x.beton", "--lossless"]))
    picture = build_beton.Picture(str(folder), "x.jpg", 0, -1, 0)
    result = build_beton.encode_sample(settings, picture)
    outcomes.append("bad picture" if isinstance(result, str) else "good picture")
    if outcomes[-1] == "good picture" and result.how.startswith("kept"):
        expected = np.asarray(turbojpeg.decompress(jpeg, raise_on_warnings=True))
        assert np.array_equal(turbojpeg.decompress(result.data), expected)
    path = folder / "x.beton"
    items = [(0, *Image.open(io.BytesIO(data)).size, data) for _, data in kinds[:5]]
    write_beton(path, [(*item[:3], essl_loader.add_index(item[3], *item[1:3])[0]) for item in items])
    path.write_bytes(damaged(rng, path.read_bytes()))
    try:
        list(ESSLLoader(path, 4, train=False, res=48))
    except ValueError:
        outcomes.append("refused")
    return outcomes


@pytest.mark.parametrize("has_index", [False, True])
def test_loader_refuses_what_libjpeg_turbo_refuses(has_index):
    """A flipped bit in a JPEG's data, with and without an index, the whole picture read."""
    rng = np.random.default_rng(0)
    jpeg = jpeg_of(draw(rng, 90, 70))
    index = essl_loader.add_index(jpeg, 90, 70)[0][len(jpeg):] if has_index else b""
    start = jpeg.index(b"\xff\xda") + 14
    refused = 0
    for _ in range(200):
        data = bytearray(jpeg)
        data[rng.integers(start, len(data) - 2)] ^= 1 << int(rng.integers(8))
        code, _ = guarded_crop(bytes(data) + index, 90, 70, (0, 0, 90, 70))
        try:
            turbojpeg.decompress(bytes(data), raise_on_warnings=True)
            assert code == essl_loader.OK or has_index  # the index sees more
        except RuntimeError:
            assert code == essl_loader.BROKEN
            refused += 1
    assert 10 < refused < 190
    frame = jpeg.index(b"\xff\xc0")
    for at, value in ((frame + 12, 17), (start - 3, 1), (start - 1, 1)):  # a table, which bits
        data = bytearray(jpeg)
        data[at] = value
        with pytest.raises(RuntimeError):
            turbojpeg.decompress(bytes(data), raise_on_warnings=True)
        code, _ = guarded_crop(bytes(data) + index, 90, 70, (0, 0, 90, 70))
        assert code == essl_loader.BROKEN


@pytest.mark.parametrize("count", [30, soak(3000)])
def test_damaged_bytes_are_refused_named_or_right(tmp_path, count):
    """No crash, hang or byte past an end: a clear error, or libjpeg-turbo's pixels."""
    code = (f"import {__name__} as tests\nfor number in range({count}):\n"
            f"    print(number, *tests.fuzz(number, tests.Path({str(tmp_path)!r})), flush=True)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    for kind in ("good crop", "bad crop", "good sample", "bad sample", "good picture",
                 "bad picture", "refused"):
        assert done.stdout.count(kind) > count / 50, kind


# --- schedules
def test_schedules_are_the_papers_tables():
    """Table 10, Table 8 and the stage boundaries, typed from the paper; kept tokens as listed."""
    rows = {"s1": "160 .50 192 .66 224 .75", "s2": "160 .75 192 .75 224 .75",
            "s3": "224 .75 192 .75 160 .75", "s4": "160 .75 192 .80 224 .85",
            "s5": "224 .75 192 .75 224 .75", "s6": "224 .75 192 .75 224 .85",
            "fixed": "224 .75 224 .75 224 .75"}
    for name, row in rows.items():
        ours = [x for stage in schedules.PRETRAIN_SCHEMES[name] for x in stage]
        assert ours == [float(x) for x in row.split()], name
    tune = schedules.FINETUNE_SCHEMES
    augment = {"s1": "3aug 3aug 3aug+", "s1-": "3aug 3aug 3aug", "s1+": "3aug+ 3aug+ 3aug+",
               "s3": "3aug 3aug 3aug+"}
    for name, row in augment.items():
        assert [stage[:2] for stage in tune[name]] == list(zip((160, 192, 224), row.split()))
    assert [s[3] for s in tune["s3"]] == [0.68, 0.84, 1.0]
    assert all(round(s[2], 2) == 0.28 for s in sum(tune.values(), ()))
    assert schedules.stage_starts(800, schedules.PRETRAIN_STAGES) == [0, 200, 400]
    assert schedules.stage_starts(100, schedules.FINETUNE_STAGES) == [0, 30, 60]
    kept = {(224, .75): 49, (192, .75): 36, (160, .75): 25, (160, .5): 50, (192, .66): 48,
            (192, .8): 28, (224, .85): 29, (160, .9): 10}
    for (resolution, mask_ratio), k in kept.items():
        assert models_mae.num_kept((resolution // 16) ** 2, mask_ratio) == k


def test_schedules_equations_hold_under_sampling():
    """Equations 1 and 2 against a million draws of what they are expectations of; equation 3."""
    rng = np.random.default_rng(9)
    for low, high, resolution in ((0.28, 1.0, 224), (0.28, 0.68, 160), (0.45, 1.0, 192)):
        sigma = np.sqrt(rng.uniform(low ** 2, high ** 2, 1_000_000)).mean()
        assert abs(schedules.perceptual_ratio(low, high) - sigma) < 1e-3
        assert abs(schedules.apparent_size(resolution, low, high) - resolution / sigma) < 0.5
    assert schedules.masked_perceptual_ratio(192, 0.66) == 4 * 16 / 192  # 48 of 144: 4 in a row


def test_schedules_learning_rate():
    """Linear from 0 to the peak over the warm-up, then half a cosine to the floor."""
    rates = [schedules.lr_at(step, 1000, 100, 2.0, 0.5) for step in range(1001)]
    warm_up = np.linspace(0, 2, 101)
    cosine = 0.5 + 1.5 * (1 + np.cos(np.pi * np.arange(1, 901) / 900)) / 2
    assert rates == pytest.approx([*warm_up, *cosine])


# --- models_mae
def reference_mae(model, image, noise, mask_ratio, keep):
    """MAE of one picture, its patches in order, by the model's layers: loss, pred, mask."""
    s = model.settings["patch_size"]
    patches = F.unfold(image[None], s, stride=s)[0].T  # (L, 3 * s * s)
    patches = patches.unflatten(1, (3, -1)).mT.flatten(1)  # (L, s * s * 3)
    kept = int(len(noise) * (1 - mask_ratio) + 1e-6)
    visible = noise.argsort()[:kept].sort().values
    tokens = model.patch_embed.proj(image[None])[0].flatten(1).T + model.pos_embed[0, 1:]
    x = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], tokens[visible]])
    x = model.norm(torch.nn.Sequential(*model.blocks)(x[None]))
    x = model.decoder_embed(x)[0]
    rows = model.mask_token[0].repeat(len(noise), 1).index_put((visible,), x[1:])
    x = torch.cat([x[:1], rows]) + model.decoder_pos_embed[0]
    decoded = noise.argsort()[:kept + int(keep * (len(noise) - kept))].sort().values
    x = x[F.pad(decoded + 1, (1, 0))]
    x = model.decoder_norm(torch.nn.Sequential(*model.decoder_blocks)(x[None]))
    x = model.decoder_pred(x)[0, 1:]
    pred = torch.zeros_like(patches).index_put((decoded,), x)
    mask = torch.zeros(len(noise), dtype=torch.float64).index_fill(0, decoded, 1)
    mask = mask.index_fill(0, visible, 0)
    if model.norm_pix_loss:
        patches = patches - patches.mean(1, keepdim=True)
        patches = patches / (patches.var(1, keepdim=True) + 1e-6).sqrt()
    return (pred - patches)[mask > 0].square().mean(), pred, mask


@pytest.mark.parametrize("norm_pix_loss, keep", [(True, 1.0), (False, 1.0), (True, 0.5)])
def test_models_forward_and_gradients_equal_a_plain_reference(norm_pix_loss, keep):
    """Loss, prediction, mask and every gradient agree with the reference in float64 to 1e-5, also
    where the decoder gets half of the removed patches."""
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(32, 8, 24, 2, 3, 16, 2, 2, norm_pix_loss=norm_pix_loss)
    model.double()
    plain = copy.deepcopy(model)
    imgs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16)
    loss, pred, mask = model(imgs, 0.7, noise, keep)
    loss.backward()
    rows = [reference_mae(plain, *pair, 0.7, keep) for pair in zip(imgs, noise)]
    losses, preds, masks = (torch.stack(parts) for parts in zip(*rows))
    losses.mean().backward()
    assert torch.equal(mask, masks) and mask.sum(1).tolist() == [12 * keep] * 3
    shown = mask[..., None]
    ours, expected = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain))
    torch.testing.assert_close([loss, pred * shown, *ours],
                               [losses.mean(), preds * shown, *expected], rtol=1e-5, atol=1e-9)


def test_models_inputs():
    """uint8 is normalised as by torchvision; float in [0, 1] is warned of."""
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    noise = torch.rand(2, 16)
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    floats = (imgs / 255 - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model(imgs, noise=noise)[0], model(floats, noise=noise)[0])
    with pytest.warns(UserWarning, match="normalise"):
        model(imgs / 255)
    with pytest.raises(RuntimeError, match="shape"):  # not square
        model(imgs[..., :16])
    half = floats.half().repeat(3000, 1, 1, 1)  # float16 ends at 65,504
    pred = torch.zeros(6000, 16, 192)
    loss, expected = (model.forward_loss(kind(half), pred, kind(torch.ones(6000, 16)))
                      for kind in (torch.Tensor.half, torch.Tensor.float))
    torch.testing.assert_close(loss, expected)


def test_models_position_table_is_the_published_formula():
    """Sines and cosines of column and row; zeros for the class token; not trained."""
    pos_embed = models_mae.mae_vit_tiny_patch16().pos_embed
    omega = 1 / 10000 ** (np.arange(48) / 48)
    for row, column in ((0, 0), (3, 11), (13, 13)):
        expected = [f(at * omega) for at in (column, row) for f in (np.sin, np.cos)]
        found = pos_embed[0, 1 + 14 * row + column]
        assert np.allclose(found, np.concatenate(expected), atol=1e-6)
    assert torch.equal(pos_embed[0, 0], torch.zeros(192)) and not pos_embed.requires_grad


def test_models_state_dict_is_the_official_one():
    """Official names (the encoder's are timm's, as the export shows), heads and epsilon for B;
    parameters of B, L, H as published (111.9, 329.5, 657 M)."""
    with torch.device("meta"):
        base, large, huge = (getattr(models_mae, f"mae_vit_{name}")() for name in (
            "base_patch16", "large_patch16", "huge_patch14"))
    encoder = {k for k in base.state_dict() if "decoder" not in k and k != "mask_token"}
    decoder = {f"decoder_{k}" for k in encoder if re.match(r"pos_embed|norm|blocks\.[0-7]\.", k)}
    decoder |= {"mask_token", "decoder_embed.weight", "decoder_embed.bias", "decoder_pred.weight",
                "decoder_pred.bias"}
    assert set(base.state_dict()) == encoder | decoder
    heads = [block.attn.num_heads for block in (*base.blocks, *base.decoder_blocks)]
    assert heads == [12] * 12 + [16] * 8
    assert {m.eps for m in base.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (base, large, huge)]
    assert [round(count, 1) for count in counts] == [111.9, 329.5, 657.1]


@pytest.mark.parametrize("size, depth", [("tiny", 2), ("base", 8)])
def test_models_flops_equal_torchs_counter(size, depth):
    """To the last operation, at all stages, depths and with half of the removed patches decoded."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}_patch16")(decoder_depth=depth)
    stages = {stage for scheme in schedules.PRETRAIN_SCHEMES.values() for stage in scheme}
    for res, mask_ratio in sorted(stages) if size == "tiny" else [(160, 0.9), (224, 0.75)]:
        imgs = torch.zeros(2, 3, res, res, dtype=torch.uint8, device="meta")
        noise = torch.zeros(2, (res // 16) ** 2, device="meta")
        for keep in (1.0, 0.5) if res == 160 else (1.0,):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(imgs, mask_ratio, noise, keep)[0].backward()
            ours = models_mae.flops_per_image(res, mask_ratio, keep, **model.settings)
            assert 2 * ours == counter.get_total_flops()


def test_models_reconstruct_shows_what_the_encoder_saw(monkeypatch):
    """Original pixels, kept patches alone, a reconstruction that has them, in true colours; and
    replacing masking_noise is enough for another mask."""
    torch.manual_seed(0)
    monkeypatch.setattr(models_mae, "masking_noise", lambda shape, *args, **kwargs: (
        torch.arange(float(shape[-1])).expand(shape)))  # the first four patches stay: the top row
    model = models_mae.mae_vit_nano_patch8(img_size=32).eval()
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    original, visible, reconstruction = model.reconstruct(imgs, 0.75)
    gray = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(2, 3, 24, 32)
    top = imgs[..., :8, :] / 255
    for ours, expected in ((original, imgs / 255), (visible[..., :8, :], top),
                           (visible[..., 8:, :], gray), (reconstruction[..., :8, :], top)):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    lower = reconstruction[..., 8:, :]  # of an untrained model: about each patch's own colours
    assert (lower.mean() - (imgs[..., 8:, :] / 255).mean()).abs() < 0.05 and lower.std() > 0.1


def test_models_encoder_loads_from_every_source(folder, mae, tmp_path):
    """Ours, official and timm's files, also .safetensors, give the features of their model."""
    from safetensors.torch import save_file
    state = mae.state_dict()
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    torch.save({"model": state}, tmp_path / "official.pth")
    torch.save(encoder, tmp_path / "timm.pth")
    save_file(encoder, tmp_path / "timm.safetensors")
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for path in (folder / "mae.pt", *tmp_path.iterdir()):
        weights, ckpt_settings, _ = read_weights(path)
        ckpt_settings.setdefault("num_heads", 4)
        vit = ViT(vit_settings(None, ckpt_settings, path), 32, 0, pool="mean").eval()
        load_into(vit, weights, path)
        for pictures in (imgs, imgs.repeat(1, 1, 2, 2)[..., :48, :48]):
            assert torch.allclose(vit(pictures), mae.features(pictures), atol=1e-5), path
    noise = torch.rand(2, 16)
    assert torch.equal(load_mae(folder / "mae.pt")(imgs, noise=noise)[1], mae(imgs, noise=noise)[1])
    with pytest.raises(WeightsError, match="decoder"):
        load_mae(tmp_path / "timm.pth")


def test_models_say_what_does_not_fit(folder, mae, tmp_path, monkeypatch):
    """A missing, unknown or misshaped tensor is named, another head count, an unreadable file."""
    path = folder / "mae.pt"
    weights, ckpt_settings, _ = read_weights(path)
    vit = ViT(vit_settings(None, ckpt_settings, ""), 32, 3)
    missing = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"}
    for changed, word in ((missing, "blocks.1.mlp.fc2.bias"),
                          (weights | {"blocks.0.gamma": weights["cls_token"]}, "gamma"),
                          (weights | {"cls_token": torch.zeros(1, 1, 64)}, "cls_token"),
                          (weights | {"pos_embed": weights["pos_embed"][:, 1:]}, "not fit")):
        with pytest.raises(WeightsError, match=word):
            load_into(vit, changed, "x", ("fc_norm.", "head."))
    other = models_mae.mae_vit_nano_patch8(img_size=32, depth=2, decoder_depth=1)
    monkeypatch.setattr(models_mae, "vit_settings", lambda *args: None)  # of the nano of tests
    assert not models_mae.init_from(other, "vit_nano_patch8", path)  # its decoder has two
    with pytest.raises(WeightsError, match="num_heads 2 there"):
        vit_settings("vit_nano_patch8", ckpt_settings | dict(depth=6, num_heads=2), "x")
    (tmp_path / "y.pth").write_bytes(b"no")
    with pytest.raises(WeightsError, match="y.pth"):
        read_weights(tmp_path / "y.pth")


@pytest.mark.parametrize("num_classes", [0, 7])
def test_models_export_is_timms(tmp_path, num_classes):
    """timm loads the export strictly for any number of classes and computes the same features."""
    import timm
    mae = models_mae.mae_vit_tiny_patch16().eval()
    torch.save({"model": mae.state_dict()}, tmp_path / "a.pt")
    run("models_mae.py", "--export-timm", tmp_path / "a.pt", tmp_path / "b.pth", "--num-classes",
        num_classes)
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "b.pth"),
                            num_classes=num_classes).eval()
    x = torch.randn(2, 3, 224, 224)
    features = vit.forward_features(x)[:, 1:].mean(1)
    assert torch.allclose(features, mae.features(x), atol=1e-5)


# --- bench_loader
def bench(tmp_path, *words):
    """The JSON of a run of bench_loader.py with tiny passes."""
    run("bench_loader.py", *words, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png",
        "--img-s", 1000, "--images", 48, "--batch-size", 16, "--passes", 2, "--res", 48)
    return json.loads((tmp_path / "b.json").read_text())


def test_bench_measures_each_alternative_or_names_it(folder, tmp_path):
    """Each alternative is a row or is left out by name; rates are of all rounds."""
    data = bench(tmp_path, "--data", folder / "train.beton", "--data_dir", folder / "train",
                 "--only", "alternatives")
    rows = {row["name"]: row for row in data["alternatives"]}
    left_out = " ".join(data["left_out"])
    for alternative in bench_loader.ALTERNATIVES:
        assert (alternative.name in rows) != (f"{alternative.name}: left out" in left_out)
        assert not alternative.name.startswith("ESSL b") or alternative.name in rows
    assert {"image folder (Pillow)", "ESSL", "ESSL 4:4:4", "ESSL lossless"} <= set(rows)
    assert [method["name"] for method in data["methods"]] == list(rows)
    for row in rows.values():
        assert len(row["passes"]) == 2 and row["images_s"] == np.median(row["passes"]), row
        assert [row["min"], row["max"]] == sorted(row["passes"]) and row["memory_MB"] >= 0, row
        assert row["cores_for_1000"] == pytest.approx(1000 / row["per_core"])
        if "FFCV" in rows:
            ratios = np.divide(row["passes"], rows["FFCV"]["passes"])
            assert row["x FFCV"] == pytest.approx(np.median(ratios))
    assert data["hardware"]["cpu"] and data["hardware"]["cpu_flags"]
    assert torch.__version__.startswith(data["versions"]["torch"]) and data["date"]
    assert (tmp_path / "b.png").exists()


def test_bench_measures_the_other_sections(folder, tmp_path):
    """Steps, compression, pixels: better quality is larger, and pictures differ little."""
    data = bench(tmp_path, "--data", folder / "train.beton", "--data_dir", folder / "train",
                 "--only", "decomposition", "compression", "pixels")
    steps = [row["step"] for row in data["decomposition"] if row["loader"] == "ESSL"]
    assert steps == list(bench_loader.STEPS)
    size = {row["name"]: row["bytes_an_image"] for row in data["compression"]}
    assert size["500_100"] > size["500_95"] > size["500_90"]
    assert all(0 < row["mean_difference"] < 0.05 for row in data["pixels"])
    assert (tmp_path / "b_pixels.png").exists()


def test_bench_leaves_out_by_name(beton, folder, tmp_path, monkeypatch):
    """What needs pictures, JPEGs or a package that is missing is left out, with a remedy."""
    def left_out_of(data):
        report = {"left_out": []}
        args = bench_loader.get_args(["--data", str(data), "--images", "32"])
        found = bench_loader.find_alternatives(bench_loader.Sources(args, tmp_path), report)
        names = {alternative.name for alternative, _ in found}
        assert len(names) + len(report["left_out"]) == len(bench_loader.ALTERNATIVES)
        return dict(text.split(": left out: ") for text in report["left_out"]), names

    missing, names = left_out_of(folder / "val.beton")
    needs_pictures = {name for name, reason in missing.items() if "--data-dir" in reason}
    assert needs_pictures == {"ESSL 4:4:4", "ESSL lossless"} and "image folder (Pillow)" in names
    monkeypatch.setattr(bench_loader, "installed_version", lambda packages: None)
    shutil.rmtree(tmp_path / "jpegs")
    missing, names = left_out_of(beton)
    assert "pip install ffcv" in missing["FFCV"] and "ESSL" in names
    no_jpegs = missing["image folder (Pillow)"]
    assert str(beton) in no_jpegs and "raw" in no_jpegs
    assert "pip install ffcv" in missing["ESSL, FFCV's file converted"]


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_bench_counts_the_cpu_time_of_workers():
    """CPU time is that of a process, its threads, living workers and those that have ended."""
    context = multiprocessing.get_context("fork")
    stopwatch = bench_loader.Stopwatch()
    ended = context.Process(target=burn, args=(0.2,))
    ended.start()
    ended.join()
    living = concurrent.futures.ProcessPoolExecutor(1, context)
    living.submit(burn, 0.2).result()
    thread = threading.Thread(target=burn, args=(0.1,))  # burns 0.1 s of the process's time
    thread.start()
    thread.join()
    seconds = stopwatch.rates(1000)["cpu_us"] * 1000 / 1e6
    assert 0.45 < seconds < 1.5
    living.shutdown()


def open_counter(fails_at):
    """For a Row: passes of 0, 1, 2 ... images/s, one of which ends its process."""
    passes = itertools.count()

    def run(with_memory):
        number = next(passes)
        if number == fails_at:
            os._exit(1)
        return {"memory_MB": 5.0} if with_memory else {"images_s": float(number), "cpu_us": 7.0}
    if fails_at == "opening":
        raise ValueError("it does not open")
    return run


def test_bench_goes_on_without_a_row_that_fails(capsys):
    """A row that fails while opening or in any pass is left out by name; the others go on."""
    base = bench_loader.Row({"name": "base"}, (open_counter, None))
    failing = [bench_loader.Row({"name": f"fails at {place}"}, (open_counter, place), base, "base")
               for place in ("opening", 0, 1, 3)]
    good = bench_loader.Row({"name": "good"}, (open_counter, None), base, "base")
    report = {"left_out": []}
    args = bench_loader.get_args(["--passes", "3"])
    rows = bench_loader.measure(args, report, [base, *failing, good], with_memory=True)
    assert [row["name"] for row in rows] == ["base", "good"]
    assert [text.split(":")[0] for text in report["left_out"]] == [row.name for row in failing]
    assert rows[1] == {"name": "good", "images_s": 3.0, "min": 2.0, "max": 4.0, "x base": 1.0,
                       "cpu_us": 7.0, "x base by CPU time": 1.0, "memory_MB": 5.0,
                       "passes": [2.0, 3.0, 4.0], "cpu_us_passes": [7.0, 7.0, 7.0]}


@pytest.mark.parametrize("name, module", [
    ("image folder (Pillow)", "torchvision"), ("torchvision decode_jpeg", "torchvision"),
    ("DALI on the CPU", "nvidia.dali"), soak("FFCV", "ffcv"), ("ESSL", "essl_loader")])
def test_bench_loaders_take_the_same_pictures_and_crops(tmp_path, name, module):
    """Each loader gives every sample as often as asked, in crops of the same distribution; after a
    pass it rests: what it did then would slow the others and speed up its next pass.

    Read from the pixels: red and green rise along x and y, blue is the picture's number.
    """
    pytest.importorskip(module)
    width, height, count, repeats = 240, 160, 4, 60
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        ramps = np.stack([40 + 160 * x / width, 40 + 160 * y / height, 0 * x + 40 + 50 * i], 2)
        path = tmp_path / "pictures" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramps.round().astype(np.uint8)).save(path)
    built("--data-dir", tmp_path / "pictures", "--out", tmp_path / "a.beton", "--quality", 100,
          "--chroma", "444")
    program = """
import sys, time, numpy as np, bench_loader
from essl_loader import BetonReader
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
alternative = next(row for row in bench_loader.ALTERNATIVES if row.name == name)
path = folder / "a.beton"
if alternative.source != "500_95" and name != "FFCV":
    bench_loader.write_jpegs(BetonReader(path), range(4), folder / "jpegs")
    path = folder / "jpegs"
load = bench_loader.Load(path, np.resize(np.arange(4), 240), 32, 48, 2)
start_pass = alternative.open(load, **alternative.settings)
for _ in range(2):
    batches = [np.array(images) for images, _ in start_pass()]
    before = bench_loader.cpu_seconds()
    time.sleep(0.3)
    print(bench_loader.cpu_seconds() - before)
np.save(folder / "out.npy", np.concatenate(batches))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path, name], cwd=HERE,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(map(float, done.stdout.split())) < 0.02  # seconds of CPU
    images = np.load(tmp_path / "out.npy").astype(float)
    if images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    assert images.shape == (count * repeats, 32, 32, 3)
    numbers = np.round((images[..., 2].mean((1, 2)) - 40) / 50).astype(int)
    assert np.bincount(numbers).tolist() == [repeats] * count
    # From the first to the last of 32 pixels it is 31/32 of the crop
    w = np.abs(images[:, :, -1, 0] - images[:, :, 0, 0]).mean(1) / 160 * width * 32 / 31
    h = np.abs(images[:, -1, :, 1] - images[:, 0, :, 1]).mean(1) / 160 * height * 32 / 31
    share = w * h / (width * height)
    ratio = w / h
    boxes = np.array([random_box(width, height, (0.2, 1.0), (3 / 4, 4 / 3), 0, 0, i)
                      for i in range(20_000)])
    expected = boxes[:, 2] * boxes[:, 3] / (width * height)
    assert 0.17 < share.min() < 0.3 and share.max() < 1.03
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.43
    # Four standard errors of the mean of as many crops
    assert abs(share.mean() - expected.mean()) < 4 * expected.std() / len(share) ** 0.5


def test_bench_scaling_compares_the_same_pictures(folder, tmp_path):
    """The two files of a point hold the same pictures; only one has an index; both are right."""
    args = bench_loader.get_args(["--data", str(folder / "train.beton"), "--images", "64"])
    sources = bench_loader.Sources(args, tmp_path)
    files = bench_loader.make_scaling_files(sources, 120, 95)
    readers = [BetonReader(path) for path in files]
    assert readers[0].num_samples == bench_loader.SCALING_PICTURES
    has_index = []
    for i in range(0, readers[0].num_samples, 9):
        ours, whole = [reader.image(i) for reader in readers]
        assert ours.shape == (80, 120, 3) and (ours == whole).all()
        assert ours.min(2).std() > 1  # nothing is left empty
        has_index.append([essl_loader.remove_index(reader.read(i)) + reader.read(i)[-24:]
                          != reader.read(i) for reader in readers])
    assert set(map(tuple, has_index)) == {(True, False)}
    crops = []
    for path in files:
        load = bench_loader.Load(path, np.arange(16), 48, 16, 1)
        images, _ = next(iter(bench_loader.open_essl(load)()))
        crops.append(images.float())
    assert (crops[0] - crops[1]).abs().mean() < 2


def test_bench_scaling_varies_one_thing_at_a_time(folder, tmp_path, monkeypatch):
    """A row for each value of each axis and both decoders; the plot is drawn."""
    measured = []

    def measure(args, report, rows):
        loads = [row.open[2] for row in rows]
        measured.append(loads)
        assert loads[0].path != loads[1].path
        assert dataclasses.replace(loads[0], path=0, ids=0) == dataclasses.replace(
            loads[1], path=0, ids=0)
        for row in rows:
            row.passes = [2.0, 1.0]
            row.cpu_us = [3.0, 3.0]
        return [row.values() for row in rows]
    monkeypatch.setattr(bench_loader, "measure", measure)
    monkeypatch.setattr(bench_loader, "make_scaling_files", lambda _, side, quality: (
        f"{side}_{quality}", f"{side}_{quality}_whole"))
    monkeypatch.setattr(bench_loader, "AXES", {
        "picture": ("side", (60, 120)), "quality": ("quality", (80, 90)), "output": ("o", (32,)),
        "crop": ("share", (0.5, 1.0)), "threads": ("threads", None)})
    monkeypatch.setitem(bench_loader.USUAL, "picture", 60)
    args = bench_loader.get_args(["--data", str(folder / "train.beton"), "--images", "64",
                                  "--plot", str(tmp_path / "p.png"), "--num-workers", "1"])
    report = {"hardware": {"cpu": "a CPU"}, "plots": []}
    bench_loader.bench_scaling(args, None, report)
    values = {}
    for row in report["scaling"][::2]:
        values.setdefault(row["axis"], []).append(row["value"])
    assert values["picture"] == [60, 120] and values["threads"][-1] == essl_loader.usable_cores()
    assert [loads[0].res for loads in measured].count(32) == 1
    paths = [loads[0].path for loads in measured]
    assert [paths.count(name) for name in ("60_80", "60_90", "120_95")] == [1, 1, 1]
    assert [loads[0].scale for loads in measured].count((0.5, 0.5)) == 1
    assert (tmp_path / "p_scaling.png").exists()
    assert report["plots"] == [str(tmp_path / "p_scaling.png")]


# --- the training scripts
TINY = ["--model", "mae_vit_nano_patch8", "--input-size", "32", "--blr", "4e-3", "--viz-every", "2"]


@pytest.fixture(scope="session")
def mae(folder):
    """An untrained model, which lies in the folder as mae.pt."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_nano_patch8(img_size=32, depth=2)
    torch.save({"modules": {f"model.{k}": v for k, v in model.state_dict().items()},
                "model": model.settings, "classes": ["dark", "light"]}, folder / "mae.pt")
    return model.eval()


def flags(script, folder, out, *words):
    """The command line of a tiny run of a script: 4 epochs of 4 steps of 2 micro-batches."""
    own = {pretrain: TINY, finetune: ["--finetune", folder / "mae.pt"],
           linprobe: ["--checkpoint", folder / "mae.pt"]}[script]
    return ["--data", folder / "train.beton", "--val-data", folder / "val.beton", "--output-dir",
            out, *own, "--total-batch", 16, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1,
            "--num-workers", 2, *words]


def pretrain_here(folder, out, *words):
    return train(pretrain, *flags(pretrain, folder, out, *words))


def train_to_signal(call, script, *words):
    """Trains until a signal, which arrives while the learning rate of this step is computed."""
    counter = itertools.count()

    def signalled(*args):
        if next(counter) == call:
            signal.raise_signal(signal.SIGUSR1)
        return schedules.lr_at(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "lr_at", signalled)
        assert train(script, *words) == 1


def log_of(out):
    """The lines of log.jsonl, the last one of a step, as {step: values}."""
    return {line["step"]: line for line in map(json.loads, (out / "log.jsonl").open())}


def check_same_end(a, b):
    """Two runs ended with the same weights and moments, bit for bit."""
    states = [torch.load(out / "last.pt", weights_only=True) for out in (a, b)]
    ends = [(state["step"], state.get("modules") or state["head"], state["optimizer"]["state"])
            for state in states]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.fixture(scope="session")
def unbroken(folder, tmp_path_factory):
    """The tiny pretraining that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert pretrain_here(folder, out) == 0
    return out


@pytest.mark.parametrize("script, words", [
    (pretrain, ["--repeat", 2, "--optimizer", "muon"]), (finetune, []), (linprobe, []),
    (linprobe, ["--cached"])])
def test_runs_resume_bit_identical(folder, mae, tmp_path, monkeypatch, script, words):
    """Stopped in and at the end of an epoch, through all stages: the bits of the unbroken run."""
    in_float32 = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", in_float32)  # bfloat16 takes minutes
    whole = flags(script, folder, tmp_path / "whole", *words)
    cut = flags(script, folder, tmp_path / "cut", *words)
    assert train(script, *whole) == 0
    for call in (5, 1):
        train_to_signal(call, script, *cut)
    assert train(script, *cut) == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")
    assert train(script, *cut) == 0  # finished already
    with pytest.raises(WeightsError, match="blr: .* there, 1.0 here"):
        train(script, *cut, "--blr", 1)


# --- pretrain
def test_pretrain_defaults_are_table_1():
    """The flags' defaults are the paper's pretraining column and the palindrome; a warm-up longer
    than a quarter of the run is shortened; underscores are as good as hyphens."""
    args = pretrain.get_args([])
    assert (args.total_batch, args.epochs, args.warmup_epochs, args.weight_decay, args.scheme,
            args.model, args.input_size) == (4096, 800, 40, 0.05, "s5", "mae_vit_base_patch16", 224)
    assert args.blr * args.total_batch / 256 == pytest.approx(2.4e-3)
    assert schedules.PRETRAIN["betas"] == (0.9, 0.95) and schedules.PRETRAIN["scale"] == (0.2, 1.0)
    assert args.probe == "masked" and args.norm_pix_loss and args.stages == [0.25, 0.25, 0.5]
    args = pretrain.get_args(["--epochs=6", "--weight_decay=0.1"])
    assert args.warmup_epochs == 1.5 and args.weight_decay == 0.1


def test_pretrain_runs_all_stages(unbroken):
    """Stages, falling loss, probe and rates in log.jsonl; TensorBoard, pictures and checkpoints."""
    log = log_of(unbroken)
    stages = [(line["epoch"], line["res"], line["mask_ratio"]) for line in log.values()]
    assert stages == [(1, 32, 0.75), (2, 24, 0.75), (3, 32, 0.75), (4, 32, 0.75)]
    assert list(log) == [4, 8, 12, 16] and log[16]["loss"] < log[4]["loss"]
    assert all(0 <= line["probe_top1"] <= 100 and line["img_s"] > 0 for line in log.values())
    names = {path.name for path in unbroken.iterdir() if not path.name.startswith("events.out")}
    assert names == {"args.json", "log.jsonl", "last.pt", "stage1.pt", "stage2.pt",
                     "recon_0002.png", "recon_0004.png"}


def test_pretrain_same_update_however_it_is_cut(folder, tmp_path):
    """64 masked pictures of --repeat 2 at once, 4 x 16, or two ranks of 2 x 16: the gradient within
    1e-6, as Adam's first moment after one step shows it, which is 0.1 gradient."""
    gradients = []
    for batch_size, ranks in ((64, 1), (16, 1), (16, 2)):
        out = tmp_path / f"{batch_size}-{ranks}"
        words = flags(pretrain, folder, out, "--probe", "off", "--max-steps", 1, "--repeat", 2,
                      "--total-batch", 64, "--batch-size", batch_size, "--warmup-epochs", 0)
        if ranks == 1:
            assert train(pretrain, *words) == 0
        else:
            run("pretrain.py", *words, ranks=ranks)
        moments = torch.load(out / "last.pt", weights_only=True)["optimizer"]["state"]
        gradients.append({i: moment["exp_avg"] * 10 for i, moment in moments.items()})
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=1e-6)
    assert len(gradients[0]) > 90


def test_pretrain_muon_is_for_the_matrices_of_the_blocks(folder, tmp_path):
    """One step moves each of them by an orthogonal matrix times 0.2 sqrt(max(out, in)) of its rate,
    as published (the gradient's few large directions), all else by its rate, as AdamW does."""
    words = flags(pretrain, folder, tmp_path, "--optimizer", "muon", "--weight-decay", 0)
    assert train(pretrain, *words, "--max-steps", 2, "--warmup-epochs", 0.25, "--probe", "off") == 0
    ours = torch.load(tmp_path / "last.pt", weights_only=True)["modules"]
    torch.manual_seed(0)
    lr = 4e-3 * 16 / 256  # of the second step; that of the first is 0
    for name, before in models_mae.mae_vit_nano_patch8(img_size=32).named_parameters():
        step = before.detach() - ours["model." + name]
        if "blocks." in name and before.ndim == 2:
            scales = torch.linalg.svdvals(step / (4 * lr * 0.2 * max(step.shape) ** 0.5))
            assert 0.7 < scales[1] <= scales[0] < 1.3, name  # in decreasing order
        elif before.requires_grad:
            assert 0.5 * lr < step.abs().median() < 1.01 * lr, name


def test_pretrain_skips_a_step_that_is_not_finite(folder, tmp_path):
    """A NaN gradient at one step changes nothing: the bits of a run that leaves that step out."""
    forward, step = pretrain.ModelWithProbe.forward, torch.optim.AdamW.step
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.ModelWithProbe, "forward", lambda self, *args: tuple(
            loss * (math.nan if next(calls) == 20 else 1) for loss in forward(self, *args)))
        assert pretrain_here(folder, tmp_path / "nan") == 0
    assert [line["skipped_steps"] for line in log_of(tmp_path / "nan").values()] == [0, 1, 1, 1]
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (
            step(*args, **kwargs) if next(calls) != 5 else None))
        assert pretrain_here(folder, tmp_path / "left_out") == 0
    check_same_end(tmp_path / "nan", tmp_path / "left_out")


def test_pretrain_ends_where_the_loss_stays_not_finite(folder, tmp_path):
    """An absurd rate ends with the advice; no checkpoint holds weights that are not finite."""
    with pytest.raises(DataError, match="finite.*--blr"):
        pretrain_here(folder, tmp_path, "--blr", "1e30", "--epochs", 8, "--save-minutes", 0)
    modules = torch.load(tmp_path / "last.pt", weights_only=True)["modules"]
    assert all(v.isfinite().all() for v in modules.values())


def test_pretrain_full_disk_ends_and_goes_on(folder, unbroken, tmp_path, request, capsys):
    """Where a checkpoint cannot be written the run ends in words, last.pt stays whole, and with
    room again the same command ends with the unbroken bits."""
    train_to_signal(5, pretrain, *flags(pretrain, folder, tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    assert pretrain_here(folder, tmp_path) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".pt: [Errno 27] File too large" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    assert pretrain_here(folder, tmp_path) == 0
    check_same_end(tmp_path, unbroken)


KILLED = """
import os, signal, sys, pretrain, schedules

def lr_at(step, *args):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < {kills} and step == 7 + 3 * attempt and int(os.environ["RANK"]) == attempt % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return schedules.lr_at(step, *args)

pretrain.lr_at = lr_at
pretrain.main(pretrain.get_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("kills", [1, soak(3)])
def test_pretrain_torchrun_restarts_after_a_killed_rank(folder, unbroken, tmp_path, kills):
    """Stopped in mid-epoch on one process, finished on two: the losses agree to rounding. The same
    with torchrun --max-restarts: a rank dies, the other one ends, both go on from last.pt, and the
    end is the unbroken two ranks', bit for bit."""
    (tmp_path / "killed.py").write_text(KILLED.format(kills=kills))
    env = {"PYTHONPATH": str(HERE), "PET_MAX_RESTARTS": str(kills)}  # --max-restarts
    train_to_signal(5, pretrain, *flags(pretrain, folder, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for script, name in ((tmp_path / "killed.py", "cut"), (HERE / "pretrain.py", "whole")):
        words = flags(pretrain, folder, tmp_path / name, "--save-minutes", 0)
        errors = run(script, *words, ranks=2, **env).stderr
        assert errors.count("exitcode: -9") == (kills if name == "cut" else 0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/log.jsonl").open()]
    assert steps == [4, 6, 8, 12, 16]  # none was done again
    check_same_end(tmp_path / "cut", tmp_path / "whole")
    for step in (12, 16):
        loss = log_of(unbroken)[step]["loss"]
        assert log_of(tmp_path / "whole")[step]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pretrain_compiled_and_bf16_agree_with_eager_float32(device):
    """20 steps from one seed: compiled to float32's rounding, bf16 to its own (2 ** -8)."""
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8).to(device)
    labels = (torch.arange(16) % 4).to(device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    losses = {}
    for how in ("eager", "compiled", "bf16"):
        torch.manual_seed(0)
        model = models_mae.mae_vit_nano_patch8(img_size=32, depth=2)
        module = pretrain.ModelWithProbe(model, 4, "masked", 1.0).to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
        step = torch.compile(module, dynamic=False, backend=backend) if losses else module
        losses[how] = []
        for i in range(20):
            noise = torch.rand(16, 16, generator=torch.Generator().manual_seed(i)).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=how == "bf16"):
                loss, mae_loss = step(images, labels, 0.75, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[how].append(mae_loss.item())
    expected = losses["eager"]
    assert expected[-1] < 0.9 * expected[0]
    assert losses["compiled"] == pytest.approx(expected, rel=1e-3)
    assert losses["bf16"] == pytest.approx(expected, rel=2e-2)


@pytest.mark.cuda
def test_pretrain_on_cuda_keeps_its_memory_and_resumes(folder, tmp_path):
    """40 short epochs reserve no more memory at the end; stopped and resumed, the loss is close."""
    whole, cut = (flags(pretrain, folder, tmp_path / name, "--epochs", 40, "--no-compile")
                  for name in ("whole", "cut"))
    assert train(pretrain, *whole) == 0
    log = list(log_of(tmp_path / "whole").values())
    assert log[-1]["mem"] == log[len(log) // 2]["mem"]
    train_to_signal(90, pretrain, *cut)
    assert train(pretrain, *cut) == 0
    assert log_of(tmp_path / "cut")[160]["loss"] == pytest.approx(log[-1]["loss"], abs=1e-3)


def test_training_steps_keep_to_one_device():
    """On a CUDA device that is not there: a tensor left on the CPU would be an error."""
    vit = ViT(size_of("vit_nano_patch8"), 32, 5)
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8)
        labels = torch.zeros(4, dtype=torch.int64)
        model = models_mae.mae_vit_nano_patch8(img_size=32)
        module = pretrain.ModelWithProbe(model, 5, "masked", 0.5)
        noise = models_mae.masking_noise((4, 16))
        augmented = finetune.gaussian_blur(images, torch.ones(4)).to(torch.uint8)
        tensors = dict(vit.named_parameters()) | dict(vit.named_buffers())
        tensors = {k: torch.empty(v.shape) for k, v in tensors.items()}
        scores = torch.func.functional_call(vit, tensors, (finetune.color_jitter(augmented),))
        for out in (module(images, labels, 0.75, noise)[0], model.reconstruct(images), scores,
                    linprobe.knn_score(scores, scores, labels, 5), finetune.luma(images)):
            assert out.device.type == "cuda"


def test_pretrain_takes_what_users_have(folder, unbroken, tmp_path, monkeypatch):
    """A flat folder without a probe, the paper's probe, weights to start from, a checkpoint that
    does not know a setting, which is its default, and a scheme of four stages."""
    state = torch.load(unbroken / "last.pt", weights_only=True)
    del state["settings"]["repeat"]
    torch.save(state, tmp_path / "old.pt")
    assert pretrain_here(folder, tmp_path, "--resume", tmp_path / "old.pt") == 0
    four = ((224, 0.75), (192, 0.5), (160, 0.0), (224, 0.9))
    monkeypatch.setitem(schedules.PRETRAIN_SCHEMES, "four", four)
    monkeypatch.setitem(schedules.PRETRAIN_SHARES, "four", (0.25, 0.25, 0.25, 0.25))
    runs = {"flat": ["--data", folder / "train/dark", "--epochs", 1],
            "full": ["--probe", "full", "--epochs", 1], "four": ["--scheme", "four"],
            "init": ["--init", unbroken / "last.pt", "--input-size", 48, "--blr", 1e-9,
                     "--epochs", 1]}
    logs = {}
    for name, words in runs.items():
        assert pretrain_here(folder, tmp_path / name, *words) == 0
        logs[name] = list(log_of(tmp_path / name).values())
    assert "probe_top1" not in logs["flat"][-1] and "probe_top1" in logs["full"][-1]
    assert logs["init"][0]["loss"] < logs["full"][0]["loss"]
    assert all(math.isfinite(line["loss"]) for line in logs["four"])
    assert [(line["stage"], line["mask_ratio"]) for line in logs["four"]] == [
        (1, 0.75), (2, 0.5), (3, 0.0), (4, 0.9)]


def test_pretrain_benchmark_reports_each_stage(folder, tmp_path, capsys):
    """Rows that follow from one another, without and with the loader; few pictures are repeated."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert pretrain_here(folder, tmp_path, "--benchmark", 1, "--batch-size", 80, "--repeat", 2) == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # Ctrl-C ends it at once
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines() if row.startswith("{")]
    assert [(row["res"], row["source"]) for row in rows] == [
        (32, "random"), (32, "loader"), (24, "random"), (24, "loader")]
    settings = models_mae.mae_vit_nano_patch8(img_size=32).settings
    for row in rows:
        flops = models_mae.flops_per_image(row["res"], row["mask_ratio"], **settings)
        assert row["tflops"] == pytest.approx(row["img_s"] * flops / 1e12)
        assert 0 <= row["data_wait"] < 1


def test_pretrain_has_a_backend_for_each_device(monkeypatch):
    """On GPUs the ranks exchange tensors of the CPU by gloo, those of the GPU by nccl."""
    made = []
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *args: torch.distributed.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args: made.append(args))
    pretrain.setup(0, training=False)
    backends = torch.distributed.distributed_c10d.BackendConfig(made[0][0]).device_backend_map
    assert backends == {"cpu": "gloo", "cuda": "nccl"}


def test_pretrain_signal_counts_amid_compiling():
    """A signal may arrive while torch.compile traces, where tensors are not what they seem."""
    *_, stop = pretrain.setup(0, training=True)
    with FakeTensorMode():
        signal.raise_signal(signal.SIGTERM)
    assert stop == 1


def test_pretrain_refuses_in_words(folder, tmp_path, capsys):
    """Missing or cut data, a damaged sample, a bad flag, an unwritable folder, no checkpoint: the
    file and the remedy are named, once for all ranks and without a traceback."""
    cut = tmp_path / "cut.beton"
    cut.write_bytes((folder / "train.beton").read_bytes()[:-100])
    bad = spoil(folder / "train.beton", tmp_path / "bad.beton", 5)
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    for words, expected in (
            (["--data", "data/train_500_95.beton"], "--demo"), (["--data", cut], "cut.beton"),
            (["--data", bad], "bad.beton: sample 5"), (["--output-dir", cut / "run"], "cut.beton"),
            (["--input-size", 60], "60 pixels"), (["--stages", .5, .5, .5], "sum to 1"),
            (["--mask-ratio", 1.0], "mask ratio 1.0"), (["--mask-ratio", -0.1], "mask ratio -0.1"),
            (["--stages", .5, .5], "as many"),
            (["--output-dir", tmp_path], "--resume none")):
        words = flags(pretrain, folder, tmp_path / "x", *words)
        with pytest.raises((ValueError, OSError, SystemExit)) as raised:
            pretrain.main(pretrain.get_args(list(map(str, words))))
        assert expected in f"{raised.value} {capsys.readouterr().err}"
    words = flags(pretrain, folder, tmp_path / "x", "--total-batch", 200)
    done = run("pretrain.py", *words, ranks=2, code=1)
    assert (done.stdout + done.stderr).count("This works: --total-batch 64") == 1
    with pytest.raises(DataError, match="This works: --total-batch 992 --batch-size 124"):
        check_batches(1000, 4096, 128, 8, multiple=2)  # pairs for mixup


# --- finetune
def test_finetune_defaults_are_table_1():
    """The paper's finetuning column, the lowest rate and the head's initial weights."""
    args = finetune.get_args(["--finetune", "none"])
    assert (args.total_batch, args.epochs, args.warmup_epochs, args.blr, args.weight_decay,
            args.layer_decay, args.scheme) == (1024, 100, 5, 5e-4, 0.05, 0.65, "s1")
    head = ViT(size_of("vit_nano_patch8"), 32, 10).head
    assert 1.5e-5 < head.weight.std().item() < 2.5e-5 and finetune.MIN_LR == 1e-6


def test_finetune_three_augment_is_pillows():
    """One of the three per picture, as Pillow does it, a third each."""
    pictures = np.random.default_rng(0).integers(0, 256, (3000, 24, 20, 3), dtype=np.uint8)
    pictures[::2] = np.where(pictures[::2] > 127, 255, 0)  # hard edges, where a blur shows most
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    out = finetune.three_augment(images, torch.Generator().manual_seed(3)).permute(0, 2, 3, 1)
    draws = torch.Generator().manual_seed(3)
    choice = torch.randint(3, (3000,), generator=draws)
    radius = (0.1 + 1.9 * torch.rand(3000, generator=draws)).tolist()
    assert (choice.bincount() / 3000 - 1 / 3).abs().max() < 0.03
    for i, picture in enumerate(map(Image.fromarray, pictures[:300])):
        expected = (ImageOps.grayscale(picture).convert("RGB"), ImageOps.solarize(picture, 128),
                    picture.filter(ImageFilter.GaussianBlur(radius[i])))[choice[i]]
        off = np.abs(out[i].numpy().astype(int) - expected).max()
        assert off <= (2, 0, 3)[choice[i]], (i, choice[i])


def test_finetune_color_jitter_is_pillows():
    """Brightness, contrast, saturation by factors in (0.7, 1.3) equal Pillow's within 2 levels."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    out = finetune.color_jitter(images, torch.Generator().manual_seed(1)).permute(0, 2, 3, 1)
    factors = 0.7 + 0.6 * torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    for i, picture in enumerate(map(Image.fromarray, pictures)):
        for name, factor in zip(("Brightness", "Contrast", "Color"), factors[:, i].tolist()):
            picture = getattr(ImageEnhance, name)(picture).enhance(factor)
        assert np.abs(out[i].numpy().astype(int) - picture).max() <= 2


def test_finetune_eval_counts_each_picture_once(folder, mae, tmp_path, capsys):
    """13 pictures on two processes and on one give the same row for each set; a checkpoint of
    finetuning can be probed, its groups are as asked; --benchmark times both augmentations."""
    words = flags(finetune, folder, tmp_path, "--epochs", 1, "--mixup", 0, "--cutmix", 0,
                  "--layer-decay", 0.5, "--weight-decay", 0.2)
    assert train(finetune, *words) == 0
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    found = sorted((group["lr_scale"], group["weight_decay"], len(group["params"]))
                   for group in groups)  # of the embedding (its weight decays), blocks, the head
    assert found == [(0.125, 0, 3), (0.125, 0.2, 1), (0.25, 0, 8), (0.25, 0.2, 4), (0.5, 0, 8),
                     (0.5, 0.2, 4), (1, 0, 3), (1, 0.2, 1)]
    words = ["--eval", "--resume", tmp_path / "best.pt", "--batch-size", 4, "--num-workers", 1]
    words += ["--val-data", folder / "val.beton", folder / "train", "--output-dir"]
    assert train(finetune, *words, tmp_path / "1") == 0
    run("finetune.py", *words, tmp_path / "2", ranks=2)
    rows = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert rows[0] == rows[1]
    first, second = map(json.loads, rows[0].splitlines())
    assert (first["n"], second["n"]) == (13, 64) and first["data"].endswith("val.beton")
    words = flags(linprobe, folder, tmp_path / "knn", "--checkpoint", tmp_path / "best.pt", "--knn")
    assert train(linprobe, *words) == 0
    capsys.readouterr()
    words = ["--benchmark", 1, "--data", folder / "train.beton", "--batch-size", 16]
    assert train(finetune, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["RandAug", "3 Aug", "3 Aug"]


def test_finetune_evaluates_an_epoch_that_died_in_evaluation(folder, mae, tmp_path, monkeypatch):
    """A checkpoint by the clock does not come between an epoch's last step and its evaluation."""
    words = flags(finetune, folder, tmp_path, "--epochs", 1, "--save-minutes", 0)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(finetune, "evaluate", None)
        train(finetune, *words)
    assert train(finetune, *words) == 0
    assert log_of(tmp_path)[4]["n"] == 13 and (tmp_path / "best.pt").exists()


def test_finetune_refuses_other_data(folder, mae, unbroken, beton, tmp_path):
    """Labels beyond the head, other class names, one class, a checkpoint without a head or of
    another script: said in words."""
    for words, word in ((["--val-data", beton], "labels 0 to 39"),
                        (["--val-data", folder / "train/dark"], "differ in light"),
                        (["--data", folder / "train/dark"], "one class"),
                        (["--resume", unbroken / "last.pt"], "other settings")):
        with pytest.raises(ValueError, match=word):
            train(finetune, *flags(finetune, folder, tmp_path, *words))
    with pytest.raises(WeightsError, match="no classifier"):
        train(finetune, "--eval", "--resume", folder / "mae.pt", "--output-dir", tmp_path)


def test_finetune_rand_augment_repeats(folder):
    """RandAug through the folder loader changes the pictures, by (seed, epoch, sample) alone."""
    rand_augment = finetune.rand_augment_transform(*finetune.RAND_AUG)
    for _ in range(3000):  # the rarest draw is the one that fails
        rand_augment(Image.new("RGB", (8, 8)))
    one, two, plain = (epochs_of(FolderLoader(folder / "train", 16, res=32, num_workers=workers,
                                              transform=transform))
                       for workers, transform in ((1, rand_augment), (2, rand_augment), (1, None)))
    assert one == two != plain


# --- linprobe
def test_linprobe_lars_is_the_formula():
    """SGD with momentum 0.9 after the matrix's gradient, alone, was scaled to 0.001 of the matrix's
    norm; at weight decay 0 as published."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    plain = copy.deepcopy(ours)
    optimizers = (linprobe.make_optimizer(*ours, 0.0), torch.optim.SGD(plain, 1.0, momentum=0.9))
    for _ in range(10):
        for a, b in zip(ours, plain):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        plain[0].grad *= 0.001 * plain[0].norm().item() / plain[0].grad.norm()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_linprobe_knn_is_brute_force():
    """The vote equals a loop over all neighbours: cosine, k 20, exp(similarity / 0.07)."""
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(60, 8), torch.randint(5, (60,)), torch.randn(7, 8)
    normalised = torch.nn.functional.normalize(bank, dim=1)
    scores = linprobe.knn_score(queries, normalised, labels, 5)
    for query, score in zip(queries, scores):
        near = sorted((torch.cosine_similarity(query, b, 0).item(), int(y))
                      for b, y in zip(bank, labels))[-20:]
        votes = [sum(math.exp((s - 1) / 0.07) for s, y in near if y == c) for c in range(5)]
        assert score.tolist() == pytest.approx(votes, rel=1e-3)


def test_linprobe_stores_the_models_features(folder, mae, tmp_path):
    """On one rank and on two, all 13 pictures in order; kNN's result is the same."""
    loader = ESSLLoader(folder / "val.beton", 4, train=False, res=32)
    model = torch.nn.Flatten()  # features are the pixels, which float16 holds exactly
    model.embed_dim = 3 * 32 * 32
    features, labels = linprobe.store_features(model, loader, contextlib.nullcontext(), None)
    assert torch.equal(features, torch.cat([images.flatten(1) for images, _ in loader]).half())
    assert labels.tolist() == loader.labels.tolist()
    assert train(linprobe, *flags(linprobe, folder, tmp_path / "1", "--knn")) == 0
    run("linprobe.py", *flags(linprobe, folder, tmp_path / "2", "--knn"), ranks=2)
    results = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert results[0] == results[1] and json.loads(results[0])["n"] == 13


def test_linprobe_measures_what_it_is_given(folder, mae, tmp_path):
    """A finished probe measures another held-out set; other weights under its path are refused."""
    path = shutil.copy(folder / "mae.pt", tmp_path)
    words = flags(linprobe, folder, tmp_path / "run", "--cached", "--checkpoint", path)
    assert train(linprobe, *words) == 0
    assert train(linprobe, *words, "--val-data", folder / "train") == 0
    rows = [json.loads(row) for row in (tmp_path / "run/results.jsonl").open()]
    assert [row["n"] for row in rows] == [13, 64]
    state = torch.load(path, weights_only=True)
    state["modules"]["model.norm.weight"] *= 1.01
    torch.save(state, path)
    with pytest.raises(WeightsError, match="weights: .* there"):
        train(linprobe, *words)


# --- all files
def test_scripts_share_the_setup_block_and_fit_their_limits():
    """One set-up block of at most 45 lines; nothing over 100 columns; no script imports another."""
    blocks = set()
    for name in ("pretrain", "finetune", "linprobe"):
        text = (HERE / f"{name}.py").read_text()
        blocks.add(text.split("# --- setup")[1].split("# --- end setup")[0])
    assert len(blocks) == 1 and blocks.pop().count("\n") <= 46
    scripts = ("build_beton", "pretrain", "finetune", "linprobe", "bench_loader")
    for path in HERE.glob("*.py"):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100, path
        if path.name != "test_all.py":
            assert not re.search(rf"^\s*(import|from) ({'|'.join(scripts)})\b", text, re.M), path


def test_readme_names_only_flags_that_exist():
    """Every flag that the README gives a script is one that the script has."""
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"^\| `(\w+\.py)`", text, re.M):
        used = set(re.findall(r"--(?:no-)?([a-z][a-z-]+)",
                              " ".join(re.findall(rf"{name}([^\n`]*)", text))))
        known = set(re.findall(r"""["'/]--([a-z][a-z-]+)""", (HERE / name).read_text()))
        assert name == "test_all.py" or used <= known, (name, used - known)
