"""Shows that all of it holds: `pytest test_all.py`, some minutes on two cores, no GPU, no download.

Tests draw their own pictures; with DAILYMAE_PHOTOS naming a folder of class folders they use real
photos as well. Everything is compared with something independent: Pillow, stock ffcv, torch in
float64, the paper's tables. `-m soak` runs the long ones (kills, damaged files) and `-m cuda` those
that need a GPU.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import fcntl
import functools
import gzip
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numba
import numpy as np
import pyarrow
import pytest
import timm.optim
import torch
import turbojpeg
from matplotlib.axes import Axes
from numba import typeof, types
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pyarrow import parquet
from timm.optim import muon
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
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
                         open_loader, random_box, uniform)
from models_mae import ViT, WeightsError, load_into, load_mae, read_weights, vit_settings, vit_size

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


def run(name, *words, ranks=1, code=0, cwd=None, **env):
    """Runs a script as a user would, one thread a process, to an exit code, without a traceback;
    under torchrun --standalone for several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else ()), HERE / name, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd,
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


def run_extra(name, *words):
    """A script of extras/ in this process -> what it prints; it may end by SystemExit."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(HERE / "extras" / name, run_name="__main__")
    return out.getvalue()


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


# --- runs of the training scripts to test on
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


def fit(script, folder, out, *words, ranks=1):
    """A tiny run of a script in this process -> its exit code; of several ranks under torchrun."""
    words = flags(script, folder, out, *words)
    if ranks == 1:
        return train(script, *words)
    return run(f"{script.__name__}.py", *words, ranks=ranks).returncode


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
    assert fit(pretrain, folder, out) == 0
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


def devkit(truth):
    """ILSVRC2012_devkit_t12.tar.gz for two classes and a group of them."""
    synsets = np.zeros(3, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    synsets[:] = [(1, "light", 0), (2, "dark", 0), (3, "all", 2)]
    meta = io.BytesIO()
    pytest.importorskip("scipy.io").savemat(meta, {"synsets": synsets})
    return gzip.compress(tar_of([("a/data/ILSVRC2012_validation_ground_truth.txt", truth),
                                 ("a/data/meta.mat", meta.getvalue())]))


@pytest.mark.parametrize("kind", ["names", "numbers", "devkit"])
def test_build_labels_of_flat_sources(folder, tmp_path, kind, monkeypatch):
    """--labels of names (as Kaggle's csv), of numbers, or of imagenet_val_labels.py for the devkit,
    whose numbers are those of its meta.mat, give the pictures of a flat tar their labels."""
    monkeypatch.chdir(tmp_path)
    expected = {f"ILSVRC2012_val_{i:08}": label for i, label in enumerate((1, 0, 0, 1, 1), 1)}
    Path("val.tar").write_bytes(tar_of((f"{name}.JPEG", b"") for name in expected))
    labels = Path("val_labels.txt")
    if kind == "devkit":
        Path("devkit.tar.gz").write_bytes(devkit(b"1\n2\n2\n1\n1\n"))
        last_line = run_extra("imagenet_val_labels.py", "devkit.tar.gz").splitlines()[-1]
        assert last_line == "written: val_labels.txt, 5 pictures in 2 classes"
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


X = b"a picture, which is not opened here"


def put(root, files):
    """Writes {path below root: bytes, or a str for a link}."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(data) if isinstance(data, str) else path.write_bytes(data)


def table_of(features=None, **columns):
    """The bytes of a parquet file; features: Hugging Face's, in its metadata."""
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def linked_tar(*links):
    """A tar of d/0.jpg and of links (name, kind, target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("d/0.jpg")
        member.size = len(X)
        tar.addfile(member, io.BytesIO(X))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = target
            tar.addfile(member)
    return out.getvalue()


def csv_of(*lines, encoding="utf-8"):
    return "\n".join([*lines, ""]).encode(encoding)


def found(root, classes=None, labels=None, source="in", **options):
    """({name: class}, what is printed) of root's "in". classes: those of --classes."""
    out = io.StringIO()
    reader = type("Reader", (), {"classes": classes})
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(build_beton, "BetonReader", lambda path: reader)
        labels = labels and root / labels
        pictures, names = build_beton.find_data(root / source, labels, classes and root / "x.beton",
                                                **options)
    of = {p.name: None if names is None else names[p.label] for p in pictures}
    assert len(of) == len(pictures) and all((p.label == -1) == (names is None) for p in pictures)
    return of, out.getvalue()


PNGS = {"in/a b.png": X, "in/c.PNG": X}
TWO = {"a b.png": "tabby cat", "c.PNG": "lynx"}
AB = {"in/x/0.jpg": X, "in/y/0.jpg": X}
NUMBERS = sorted(map(str, range(12)))  # ImageFolder's order: 0, 1, 10, 11, 2, ...
TAKEN = {  # files, {name: class}, words of the two lines, options
    "hidden": ({"in/a.jpg": X, "in/.trash/b.jpg": X, "in/#recycle/deep/c.jpg": X, "in/._a.jpg": X,
                "in/desktop.ini": X, "in/Makefile": X},
               {"a.jpg": None}, ("2 hidden folders (#recycle, .trash) with 2 pictures",
                                 "1 hidden file (._a.jpg)", ".ini", "no ending"), {}),
    "a label alone beside keys": (
        {"in/0.tar": tar_of([("a.jpg", X), ("a.1.jpg", X), ("a.1.cls", b"fox"),
                             ("b.cls", b"owl")])},
        {"a.jpg": "fox", "a.1.jpg": "fox"}, ("1 label without a picture (b.cls)",), {}),
    "hidden beside classes": ({"in/rose/a.jpg": X, "in/__MACOSX/rose/._a.jpg": X},
                              {"rose/a.jpg": "rose"}, ("__MACOSX",), {}),
    "years": ({"in/2021/07/a.jpg": X, "in/2022/b.jpg": X},
              {"2021/07/a.jpg": "2021", "2022/b.jpg": "2022"},
              ("class folders", "2021, 2022", "2021/07", "--unlabelled"), {}),
    "years without labels": ({"in/2021/07/a.jpg": X, "in/2022/b.jpg": X, "in/c.jpg": X},
                             {"2021/07/a.jpg": None, "2022/b.jpg": None, "c.jpg": None},
                             ("3 pictures without labels",), dict(unlabelled=True)),
    "endings": ({"in/oak/a.jfif": X, "in/oak/b.JPE": X, "in/fir/c.GIF": X, "in/fir/d.Jp2": X,
                 "in/elm/e.cr2": X, "in/elm/notes": X, "in/film/f.mpg": X},
                {"oak/a.jfif": "oak", "oak/b.JPE": "oak", "fir/c.GIF": "fir", "fir/d.Jp2": "fir"},
                (".cr2", ".mpg", "no ending", "2 class folders without a picture (elm, film)"), {}),
    "a folder with an ending": ({"in/a.png/b.jpg": X}, {"a.png/b.jpg": "a.png"}, (), {}),
    "links": ({"in/ant/a.jpg": X, "in/bee": "ant", "in/ant/all": "..", "in/ant/gone.jpg": "nowhere",
               "in/ant/gone.txt": "nowhere"},
              {"ant/a.jpg": "ant", "ant/gone.jpg": "ant", "bee/a.jpg": "bee",
               "bee/gone.jpg": "bee"},
              ("2 links back", "ant/all", ".txt"), {}),
    "one name in two forms": ({"in/cafe\u0301/0.jpg": X, "in/caf\u00e9/1.jpg": X},
                              {"cafe\u0301/0.jpg": "caf\u00e9", "caf\u00e9/1.jpg": "caf\u00e9"},
                              ("1 classes",), {}),
    "semicolons and BOM": (PNGS | {"l": csv_of("photo;species", "a b.png;tabby cat", 'c;"lynx"',
                                               encoding="utf-8-sig")},
                           TWO, ("photo and species",), dict(labels="l")),
    "UTF-16 and tabs": (PNGS | {"l": csv_of("a b.png\ttabby cat", "c.PNG\tlynx",
                                            encoding="utf-16")},
                        TWO, (), dict(labels="l")),
    "an index": (PNGS | {"l": csv_of(",id,breed", "0,c,lynx", "1,a b,tabby cat")},
                 TWO, ("id and breed",), dict(labels="l")),
    "an index without header": (PNGS | {"l": csv_of("7,a b.png,tabby cat", "8,c.PNG,lynx")},
                                TWO, (), dict(labels="l")),
    "a picture called image": ({"in/image.png": X, "l": csv_of("image,label", "image,fox")},
                               {"image.png": "fox"}, ("columns image",), dict(labels="l")),
    "one-hot": (PNGS | {"l": csv_of("image,lynx,tabby cat,fox", "a b,0.0,1.0,0.0",
                                    "c,1.0,0.0,0.0")},
                TWO, ("one-hot",), dict(labels="l")),
    "boxes": (PNGS | {"l": csv_of("ImageId,PredictionString", "a b,n07 1 2 3 4 n07 5 6 7 8 ",
                                  "c,n02 0 0 9 9")},
              {"a b.png": "n07", "c.PNG": "n02"}, (), dict(labels="l")),
    "spaces": (PNGS | {"l": csv_of('"a b.png" cat', "sub/c.PNG  lynx", "gone.png fox")},
               {"a b.png": "cat", "c.PNG": "lynx"},
               ("1 label of a picture that is not there (gone)",), dict(labels="l")),
    "a name with spaces": (PNGS | {"l": csv_of("a b.png cat", "c.PNG lynx")},
                           {"a b.png": "cat", "c.PNG": "lynx"}, (), dict(labels="l")),
    "names with commas": (PNGS | {"l": csv_of('"a b.png","cat, tabby"', "c,lynx")},
                          {"a b.png": "cat, tabby", "c.PNG": "lynx"}, (), dict(labels="l")),
    "the same name in two folders": (AB | {"l": csv_of("z/x/0.jpg,fox", "z\\y\\0.jpg,owl")},
                                     {"x/0.jpg": "fox", "y/0.jpg": "owl"}, (), dict(labels="l")),
    "labels beside the pictures": (PNGS | {"in/l.csv": csv_of("a b.png,tabby cat", "c.PNG,lynx")},
                                   TWO, ("not taken: nothing",), dict(labels="in/l.csv")),
    "whole floats": (PNGS | {"l": csv_of("a b.png,1.0", "c.PNG,0.0")},
                     {"a b.png": "1", "c.PNG": "0"}, (), dict(labels="l")),
    "numbers that are names": ({"in/0.parquet": table_of(image=[X, X, X], label=[2, 10, 3])},
                               {"row 0": "2", "row 1": "10", "row 2": "3"}, ("names of classes",),
                               dict(classes=NUMBERS)),
    "numbers that are places": ({"in/0.parquet": table_of(image=[X, X], label=[1, 0])},
                                {"row 0": "owl", "row 1": "fox"}, ("places in",),
                                dict(classes=["fox", "owl"])),
    "no label at all": (PNGS | {"l": csv_of("a b.png,-1", "c.PNG,-1")},
                        {"a b.png": None, "c.PNG": None}, ("none were found",), dict(labels="l")),
    "keys": ({"in/0.tar": tar_of([("k.img.JPG", X), ("k.CLS", b"fox\n"), ("m.jpg", X),
                                  ("m.target.cls", b"owl"), ("n.1.jpg", X), ("n.1.cls", b"elk"),
                                  ("n.2.jpg", X), ("n.2.cls", b"fox"), ("o.cls", b"owl")])},
             {"k.img.JPG": "fox", "m.jpg": "owl", "n.1.jpg": "elk", "n.2.jpg": "fox"},
             ("1 label without a picture (o.cls)",), {}),
    "JSON": ({"in/0.tar": tar_of([("0.json", b'{"fine_label": 1, "caption": "x"}'), ("0.webp", X),
                                  ("1.json", b'{"cls": 0}'), ("1.webp", X), ("all.json", b"[1,")])},
             {"0.webp": "1", "1.webp": "0"}, (".json",), {}),
    "two tars joined": ({"in/0.tar": tar_of([("0.jpg", X), ("0.cls", b"0")])
                         + tar_of([("1/0.jpg", X), ("1/0.cls", b"1")])},
                        {"0.jpg": "0", "1/0.jpg": "1"}, (), {}),
    "links in a tar": ({"in.tar": linked_tar(("d/1.jpg", tarfile.LNKTYPE, "d/0.jpg"),
                                             ("e/2.jpg", tarfile.SYMTYPE, "../d/1.jpg"),
                                             ("e/3.jpg", tarfile.SYMTYPE, "gone.jpg"),
                                             ("e/d", tarfile.SYMTYPE, "../d"))},
                       {"d/0.jpg": "d", "d/1.jpg": "d", "e/2.jpg": "e", "e/3.jpg": "e"},
                       ("1 link,", "e/d"), dict(source="in.tar")),
    "absolute names": ({"in/0.tar": tar_of([("/s/ant/0.jpg", X), ("./s/bee/1.jpg", X),
                                            ("../s/ant/2.jpg", X), ("s/._bee.jpg", X)])},
                       {"s/ant/0.jpg": "ant", "s/bee/1.jpg": "bee", "s/ant/2.jpg": "ant"},
                       ("1 hidden file",), {}),
    "shards without labels": ({f"in/{i}.tar": tar_of([(f"{i}.jpg", X), (f"{i}.txt", b"a dog")])
                               for i in range(2)},
                              {"0.jpg": None, "1.jpg": None}, ("2 tars", ".txt"), {}),
    "shards in folders": ({f"in/{i}/0.tar": tar_of([(f"{i}.jpg", X), (f"{i}.cls", b"5")])
                           for i in range(2)}, {"0.jpg": "5", "1.jpg": "5"}, ("2 tars",), {}),
    "img2dataset": ({"in/0.tar": tar_of([("0.jpg", X), ("0.json", b'{"url": "u"}')]),
                     "in/0.parquet": table_of(url=["u"]), "in/0_stats.json": b"{}"},
                    {"0.jpg": None}, ("1 table without pictures (0.parquet)", ".json"), {}),
    "a table beside folders": (AB | {"in/metadata.parquet": table_of(file_name=["x/0.jpg"])},
                               {"x/0.jpg": "x", "y/0.jpg": "y"}, ("metadata.parquet",), {}),
    "other columns": ({"in/0.parquet": table_of(img=[{"bytes": X, "path": "p.png"}], fine_label=[3],
                                                coarse_label=[1], thumb=[X])},
                      {"row 0/p.png": "3"}, ("img and fine_label",), {}),
    "columns by type": ({"in/0.parquet": table_of({"kind": {"_type": "ClassLabel"}}, raw=[X],
                                                  id=[7], kind=[1])},
                        {"row 0": "1"}, ("raw and kind",), {}),
    "columns by flag": ({"in/0.parquet": table_of(a=[X], b=[X], label=[7], species=["elk"])},
                        {"row 0": "elk"}, ("b and species",), dict(columns=["b", "species"])),
    "a table without labels": ({"in/0.parquet": table_of(image=[X], width=[9])}, {"row 0": None},
                               ("column image",), {}),
    "labels of a table": ({"in/0.parquet": table_of(image=[{"bytes": X, "path": "d/k.png"}]),
                           "l": csv_of("k.png,elk")},
                          {"row 0/d/k.png": "elk"}, (), dict(labels="l")),
    "a pattern": ({f"in/{part}-{i}.parquet": table_of(image=[X], label=[i])
                   for part, i in (("train", 0), ("test", 1))},
                  {"row 0": "0"}, ("1 parquet file",), dict(source="in/train-*.parquet")),
}


@pytest.mark.parametrize("case", TAKEN)
def test_build_takes(tmp_path, case):
    """What is taken, with which class, and what the two lines say of it and of the rest."""
    files, expected, words, options = TAKEN[case]
    put(tmp_path, files)
    of, printed = found(tmp_path, **options)
    assert of == expected
    first, second = printed.splitlines()
    assert first.startswith("found: ") and second.startswith("not taken: ")
    assert not [word for word in words if word not in printed], printed


def labels_case(*lines, encoding="utf-8", files=PNGS):
    return files | {"l.csv": csv_of(*lines, encoding=encoding)}, dict(labels="l.csv")


REFUSED = {  # files and options, words
    "pictures above classes": (({"in/top.jpg": X} | AB, {}), ("top.jpg", "x/0.jpg", "--labels")),
    "a folder of others": (({"in/a.jpg": X, "in/b.jpg": X, "in/thumbs/a.jpg": X}, {}),
                           ("2 picture", "thumbs/a.jpg", "--unlabelled")),
    "a stray tar": ((AB | {"in/all.tar": tar_of([("0.jpg", X)])}, {}), ("2 pictures", "all.tar")),
    "a stray table": ((AB | {"in/0.parquet": table_of(image=[X])}, {}),
                      ("2 pictures", "0.parquet")),
    "tars and tables": (({"in/0.tar": tar_of([("0.jpg", X)]), "in/1.parquet": table_of(img=[X])},
                         {}), ("1 .tar", "1.parquet")),
    "flat and folders in tars": (({"in/0.tar": tar_of([("elk/0.jpg", X)]),
                                   "in/1.tar": tar_of([("1.jpg", X)])}, {}),
                                 ("1.jpg", "elk/0.jpg")),
    "a level too high": (({"in/Train/elk/0.jpg": X, "in/validation/elk/1.jpg": X}, {}),
                         ("Train, validation", "in/Train")),
    "a set alone": (({"in/test/0.jpg": X}, {}), ("in/test",)),
    "sets in a tar": (({"in/0.tar": tar_of([("s/train/elk/0.jpg", X), ("s/val/elk/1.jpg", X)])},
                       {}), ("train, val",)),
    "tables of two sets": (({f"in/{name}-0000{i}-of-00002.parquet": table_of(image=[X], label=[0])
                             for name in ("train", "validation") for i in range(2)}, {}),
                           ('in/train-*-of-*.parquet"', 'in/validation-*-of-*.parquet"')),
    "tars of two sets": (({f"in/s_{name}.tar": tar_of([("0.jpg", X)]) for name in ("train", "dev")},
                          {}), ("s_train.tar", "s_dev.tar")),
    "an archive that is compressed": (({"in.tar.gz": X}, dict(source="in.tar.gz")),
                                      (".gz", "Unpack")),
    "a pattern of nothing": (({"in/0.tar": X}, dict(source="in/1*.tar")), ("in/1*.tar",)),
    "only other endings": (({"in/a.heic2": X, "in/.b/c.jpg": X}, {}), (".heic2", ".b")),
    "two labels on a line": (labels_case("a b.png,cat", "c.PNG,lynx,fox"), ("l.csv", "line 2")),
    "two labels behind a space": (labels_case("a_b.png cat", "c.PNG lynx fox"),
                                  ("l.csv", "line 2")),
    "two numbers": (labels_case("a b.png,1", "c.PNG,2 5"), ("l.csv", "line 2", "2 5")),
    "a share": (labels_case("a b.png,0.5", "c.PNG,1"), ("l.csv", "line 1", "0.5")),
    "two marks": (labels_case("file,cat,fox", "a b.png,1,1", "c.PNG,0,1"), ("l.csv", "line 2")),
    "a label twice": (labels_case("a b.png,cat", "c.PNG,lynx", "a b.png,fox"), ("lines 1 and 3",)),
    "bytes of Latin-1": (labels_case("a b.png,caf\u00e9", "c.PNG,x", encoding="latin-1"),
                         ("l.csv", "line 1", "UTF-8")),
    "UTF-16 without a mark": (labels_case("a b.png,cat", encoding="utf-16-le"), ("l.csv", "UTF-8")),
    "an open quote": (labels_case('a b.png,"cat', "c.PNG,lynx"), ("l.csv", "quotes")),
    "a picture without a line": (labels_case("a b.png,cat"), ("in/c.PNG has no label", "1 of 2")),
    "an empty cell": (labels_case("file,label", "a b.png,", "c.PNG,lynx"), ("in/a b.png has no",)),
    "a header alone": (labels_case("file,label"), ("l.csv", "header")),
    "nothing": (labels_case(""), ("l.csv", "empty")),
    "other names": (labels_case("d.png,cat", "e.png,fox"), ("l.csv", "d.png", "a b.png")),
    "which column": (labels_case("image,dx,age", "a b.png,mel,50", "c.PNG,nv,60"),
                     ("dx, age", "label")),
    "a line for two": (labels_case("0.jpg,fox", files=AB), ("l.csv", "x/0.jpg", "y/0.jpg")),
    "numbers and names": (labels_case("a b.png,7", "c.PNG,lynx"),
                          ("a b.png", "7", "c.PNG", "lynx")),
    "no class of that name": ((PNGS | {"l.csv": csv_of("a b.png,cat", "c.PNG,fox")},
                               dict(labels="l.csv", classes=["cat"])),
                              ("c.PNG", "fox", "--classes")),
    "classes without labels": ((PNGS, dict(classes=["cat"])), ("--classes", "--labels")),
    "a picture without KEY.cls": (({"in/0.tar": tar_of([("0.jpg", X), ("0.cls", b"1"), ("1.jpg", X),
                                                        ("n.1.cls", b"1"), ("n.2.jpg", X)])}, {}),
                                  ("1.jpg has no label", "2 of 3")),
    "two KEY.cls": (({"in/0.tar": tar_of([("0.jpg", X), ("0.cls", b"1"), ("0.cls", b"2")])}, {}),
                    ("0.tar", "0.cls")),
    "a list in JSON": (({"in/0.tar": tar_of([("0.jpg", X), ("0.json", b'{"label": [1, 2]}')])}, {}),
                       ("0.json", "[1, 2]")),
    "bytes in KEY.cls": (({"in/0.tar": tar_of([("0.jpg", X), ("0.cls", b"\xe9")])}, {}),
                         ("0.cls", "UTF-8")),
    "something behind a tar": (({"in/0.tar": tar_of([("0.jpg", X)]) + b"x" * 600}, {}), ("0.tar",)),
    "lists in a column": (({"in/0.parquet": table_of(image=[X], label=[[1, 2]])}, {}),
                          ("0.parquet", "row 0", "label")),
    "labels for some": (({"in/0.parquet": table_of(image=[X, X], label=[-1, 4])}, {}),
                        ("row 0 has no label",)),
    "a large number": (({"in/0.parquet": table_of(image=[X], label=[10 ** 12])}, {}),
                       ("row 0", "1,000,000,000,000")),
    "a negative number": (({"in/0.parquet": table_of(image=[X], label=[-7])}, {}), ("row 0", "-7")),
    "two columns of pictures": (({"in/0.parquet": table_of(left=[X], right=[X])}, {}),
                                ("left, right", "--columns")),
    "no such column": (({"in/0.parquet": table_of(image=[X])}, dict(columns=["image", "y"])),
                       ("y", "--columns")),
    "a column of paths": (({"in/0.parquet": table_of(image=["a.jpg"], label=[0])}, {}),
                          ("0.parquet", "column of bytes")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses(tmp_path, case):
    """A source that fits no rule is refused, with both halves, or the picture, and a way on."""
    (files, options), words = REFUSED[case]
    put(tmp_path, files)
    with pytest.raises(DataError) as raised:
        found(tmp_path, **options)
    message = str(raised.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message and str(tmp_path) in message


def random_source(rng, root):
    """Writes a random source -> ({name: class, None for none} of the pictures that fit its rule,
    number of all pictures, options, whether something does not fit)."""
    letters = list("abcdefgh \u00e9._-,;'")
    truth = {}
    strange = False

    def word():
        return rng.choice(letters[:8]) + "".join(rng.choice(letters, rng.integers(0, 6))) + "z"
    classes = [f"{word()}{i}" for i in range(4)]
    kind = rng.choice(["tree", "flat", "csv", "shards", "tar", "table"])
    members = []
    for i in range(rng.integers(2, 12)):
        ending = rng.choice([".jpg", ".PNG", ".jfif", ".Gif"])
        label = classes[i] if i < 2 else str(rng.choice(classes))
        stem = f"{word()}{i}"
        if kind == "shards":
            stem = stem.replace(".", "")
        name = stem + ending
        if kind in ("tree", "tar"):
            name = f"{label}/{'deep/' * int(rng.integers(2))}{name}"
        members.append((name, label))
        truth[name] = None if kind == "flat" else label
    total = len(members)
    junk = {}
    for i in range(rng.integers(0, 5)):  # what is not taken
        place = rng.choice([".cache/", "@eaDir/x/", "._", ""])
        ending = rng.choice([".jpg", ".txt", ".cr2", ""]) if place else ".md"
        junk[f"{place}{word()}{i}{ending}"] = X
        total += ending == ".jpg"
    files = {}
    options = {}
    if kind in ("tree", "flat", "csv"):
        files = {f"in/{name}": X for name, _ in members} | {f"in/{k}": v for k, v in junk.items()}
        if kind == "tree" and rng.random() < 0.2:
            files["in/stray.jpg"] = X
            strange = True
        if kind == "csv":
            rows = [[name, label] for name, label in members]
            if rng.random() < 0.2 and len(rows) > 1:
                rows.pop(rng.integers(len(rows)))
                strange = True
            rng.shuffle(rows)
            out = io.StringIO()
            writer = csv.writer(out, delimiter=str(rng.choice(list(",;\t|"))))
            if rng.random() < 0.5:
                writer.writerow(["filename", "label"])
            writer.writerows(rows)
            files["labels"] = out.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]))
            options["labels"] = "labels"
    elif kind == "table":
        rows = [{"bytes": X, "path": name} for name, _ in members]
        truth = {f"row {i}/{name}": label for i, (name, label) in enumerate(members)}
        files["in/0.parquet"] = table_of(image=rows, label=[label for _, label in members])
        files |= {f"in/{k}": v for k, v in junk.items()}
    else:
        parts = [[] for _ in range(rng.integers(1, 3))]
        for name, label in members:
            part = parts[rng.integers(len(parts))]
            part.append((name, X))
            if kind == "shards":
                part.insert(rng.integers(len(part) + 1), (f"{name[:-len(Path(name).suffix)]}.cls",
                                                          label.encode()))
        parts[0] += junk.items()
        parts = [part for part in parts if part]
        if rng.random() < 0.5:
            files["in/0.tar"] = b"".join(map(tar_of, parts))
        else:
            files |= {f"in/{i}.tar": tar_of(part) for i, part in enumerate(parts)}
    put(root, files)
    return truth, total, options, strange


def test_build_accounts_for_every_picture(tmp_path):
    """Of 300 random trees, tars and tables: each picture is taken with its own class, or counted as
    not taken; what fits no rule is refused."""
    rng = np.random.default_rng(25)
    for number in range(300):
        root = tmp_path / str(number)
        truth, total, options, strange = random_source(rng, root)
        not_taken = essl_loader.NotTaken()
        if strange:
            with pytest.raises(DataError):
                found(root, not_taken=not_taken, **options)
            continue
        of, printed = found(root, not_taken=not_taken, **options)
        assert of == truth, (number, printed)
        assert len(of) + not_taken.pictures == total, (number, printed)
        if (root / "in/0.tar").exists() or (root / "in/0.parquet").exists() or options:
            continue
        loader = FolderLoader(root / "in", 1, num_workers=1)  # sees the same
        classes = loader.classes or [None]
        assert {name: classes[label] for name, label in zip(loader.names, loader.labels)} == of


def test_build_unlabelled_and_names(tmp_path):
    """Pictures without labels get -1 and classes null; each sample's name, also one that is not
    UTF-8, leads back to its picture, in messages too; what is not taken is in the last line."""
    rng = np.random.default_rng(8)
    names = ["a.png", "b \u00e9.png", os.fsdecode(b"c\xff.png"), "d.png"]
    pictures = {name: jpeg_of(draw(rng, 50, 40 + i)) for i, name in enumerate(names)}
    put(tmp_path / "in", pictures | {".thumbs/a.png": X})
    put(tmp_path / "tars", {f"{i}.tar": tar_of([(name, pictures[name])])
                            for i, name in enumerate(names)})
    out = built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", "--limit", 3)
    assert "3 images, no labels" in out and "0 left out, 2 not taken" in out.splitlines()[-1]
    built("--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton", "--max-resolution", 49)
    built("--data-dir", tmp_path / "tars", "--out", tmp_path / "y.beton", "--unlabelled")
    for path, expected in (("x.beton", names), ("y.beton", [f"{i}.tar/{name}" for i, name
                                                            in enumerate(names)])):
        loader = ESSLLoader(tmp_path / path, 4, res=32)
        assert json.loads((tmp_path / f"{path}.json").read_text())["classes"] is None
        assert loader.classes is None and (next(iter(loader))[1] == -1).all()
        assert list(loader.names) == expected and loader.names[-1] == expected[3]
        assert loader.names[1:3] == expected[1:3] and loader.names[::-2] == expected[::-2]
        assert [loader.reader.heights[i] for i in range(4)] == [40, 41, 42, 43] or path[0] == "x"
        with pytest.raises(IndexError):
            loader.names[4]
    bad = spoil(tmp_path / "x.beton", tmp_path / "z.beton", 1)
    for ending in (".json", ".names"):
        shutil.copy(tmp_path / f"x.beton{ending}", f"{bad}{ending}")
    with pytest.raises(DataError, match=r"z.beton: sample 1 \(b \u00e9.png\): "):
        list(ESSLLoader(bad, 4, res=32))
    assert "sample 1 (b \u00e9.png): " in built("--verify", bad, code=1)


def test_build_replaces_only_its_own_files(folder, tmp_path):
    """A user's file in the place of the .beton, its sidecar or names stops the build at once; an
    x.json is never touched, but one of an earlier version is to be renamed; names are checked."""
    words = ["--data-dir", folder / "val", "--out", tmp_path / "x.beton"]
    mine = b'{"lr": 0.1}'
    (tmp_path / "x.json").write_bytes(mine)
    for name in ("x.beton", "x.beton.json", "x.beton.names"):
        (tmp_path / name).write_bytes(mine)
        errors = built(*words, code=2)
        assert f"{name} is a file" in errors and "--out" in errors
        assert (tmp_path / name).read_bytes() == mine and len(os.listdir(tmp_path)) == 2
        (tmp_path / name).unlink()
    built(*words)
    built(*words)  # again: these are ours
    assert (tmp_path / "x.json").read_bytes() == mine and len(BetonReader(words[-1]).classes) == 2
    os.replace(tmp_path / "x.beton.json", tmp_path / "x.json")
    with pytest.raises(DataError, match="mv '.*x.json' '.*x.beton.json'"):
        BetonReader(words[-1])
    os.replace(tmp_path / "x.json", tmp_path / "x.beton.json")
    names = tmp_path / "x.beton.names"
    data = bytearray(names.read_bytes())
    data[-1] ^= 1
    names.write_bytes(data)
    assert "x.beton.names" in built("--verify", words[-1], code=1)
    for other in (shutil.copy(folder / "train.beton.names", tmp_path), data[:-1], b""):
        names.write_bytes(Path(other).read_bytes() if isinstance(other, Path | str) else other)
        with pytest.raises(DataError, match="x.beton.names: not the names"):
            BetonReader(words[-1])


def test_build_says_what_a_machine_lacks(folder, tmp_path, monkeypatch):
    """A small /dev/shm, an unreadable folder, pictures beyond the limit of pixels, a pattern that
    the shell expanded, a class that --skip-bad empties: each is named."""
    words = ["--data-dir", folder / "val", "--out", tmp_path / "x.beton"]
    small = os.statvfs_result((4096, 4096, 1, 1, 1, 0, 0, 0, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: small)
        assert "/dev/shm" in built(*words, code=2)
        with pytest.raises(DataError, match="/dev/shm"):
            list(FolderLoader(folder / "val", 2))
    with monkeypatch.context() as patch:
        scandir = os.scandir

        def refusing(path):
            if str(path).endswith("/light"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)
        patch.setattr(os, "scandir", refusing)
        assert "val/light: this folder cannot be read" in built(*words, code=2)
    put(tmp_path, {f"in/{name}/0.jpg": jpeg_of(Image.new("RGB", (side, side)))
                   for name, side in (("big", 60), ("small", 40))})
    words = ["--data-dir", tmp_path / "in", "--out", tmp_path / "x.beton"]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # given back at the end
        patch.setattr(build_beton, "MAX_PIXELS", 2000)
        assert "big/0.jpg: Image size (3600 pixels)" in built(*words, code=2)
        out = built(*words, "--skip-bad")
        assert "classes without a picture: 1 (big)" in out and "1 left out" in out
    several = built("--data-dir", "a.tar", "b.tar", "--out", tmp_path / "x.beton", code=2)
    assert "quotes" in several
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("words", [[], ["--lossless"]])
def test_build_names_every_bad_picture(tmp_path, monkeypatch, words):
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
    left_out = json.loads((tmp_path / "x.beton.json").read_text())["left_out"]
    assert [Path(entry["file"]).name for entry in left_out] == bad
    assert BetonReader(tmp_path / "x.beton").num_samples == 1
    (tmp_path / "in/gone.jpg").symlink_to("nowhere")
    assert "gone.jpg: a broken link, to nowhere" in built(*words, code=2)
    assert "5 left out" in built(*words, "--skip-bad")
    (tmp_path / "in/gone.jpg").unlink()
    monkeypatch.setattr(build_beton, "list_folder", lambda *_: (["gone.jpg"] * 6, []))
    errors = built(*words, "--skip-bad", code=1)  # what a disk or a network does
    assert "gone.jpg: [Errno 2]" in errors and "Traceback" not in errors


def test_build_proposes_skip_bad_only_where_it_helps(tmp_path):
    """With no good picture at all --skip-bad would write nothing: it is not proposed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"no picture")
    words = ["--data-dir", tmp_path, "--out", tmp_path / "x.beton"]
    assert "--skip-bad" not in built(*words, code=2) + built(*words, "--skip-bad", code=2)


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


def test_build_copies_labels_and_classes(tmp_path, folder):
    """A copy keeps class names, also those that are numbers, labels and samples' names; --classes
    names the numbers of a file without names."""
    jpeg = jpeg_of(draw(np.random.default_rng(0), 60, 40))
    for name in ("0", "2", "10"):  # in order: 0, 10, 2
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.jpg").write_bytes(jpeg)
    built("--data-dir", tmp_path / "in", "--out", tmp_path / "numbers.beton")
    for source in (tmp_path / "numbers.beton", folder / "train.beton"):
        built("--data-dir", source, "--out", tmp_path / "copy.beton")
        theirs, ours = BetonReader(source), BetonReader(tmp_path / "copy.beton")
        assert ours.classes == theirs.classes and list(ours.names) == list(theirs.names)
        assert np.array_equal(ours.labels, theirs.labels)
    plain = write_beton(tmp_path / "plain.beton", [(0, 60, 40, jpeg)] * 3)  # labels 0 to 2
    built("--data-dir", plain, "--out", tmp_path / "named.beton", "--classes",
          tmp_path / "numbers.beton")
    named = BetonReader(tmp_path / "named.beton")
    assert named.classes == ["0", "10", "2"] and named.labels.tolist() == [0, 1, 2]
    built("--data-dir", plain, "--out", tmp_path / "without.beton", "--unlabelled")
    assert BetonReader(tmp_path / "without.beton").labels.tolist() == [-1] * 3


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


KILLED_PARENT = """
import os, signal, sys
import build_beton, essl_loader

def encode(settings, job):
    if job.name.endswith("/30.png"):
        os.kill(os.getppid(), signal.SIGKILL)
    return bytes(100_000), 8, 8, False  # more than a pipe holds
build_beton.encode_sample = encode

def transform(picture):
    os.kill(os.getppid(), signal.SIGKILL)
    return picture
if sys.argv[1] == "folder":
    list(essl_loader.FolderLoader(sys.argv[2], 8, res=300, num_workers=2, transform=transform))
build_beton.main(build_beton.get_args(sys.argv[1:]))
"""


def run_killed(*words):
    """Runs KILLED_PARENT. Its workers hold its stdout: this returns when they have ended too."""
    command = [sys.executable, "-c", KILLED_PARENT, *map(str, words)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_build_sigkill_leaves_nothing_for_long(folder, tmp_path):
    """Workers of a builder that SIGKILL ended end too, though their results are not taken; the next
    build removes its hidden file, but none of a living process, a locked one or another file's."""
    words = ["--data-dir", folder / "train", "--out", tmp_path / "x.beton", "--num-workers", 2]
    run_killed(*words)
    left, = tmp_path.iterdir()
    assert re.fullmatch(r"\.x\.beton\.tmp-[0-9]+", left.name)
    dead = left.name.rpartition("-")[2]
    stay = [f".x.beton.tmp-{os.getppid()}", f".y.beton.tmp-{dead}", f"x.beton.tmp-{dead}",
            ".x.beton.tmp-", f".x.beton.tmp-0{dead}"]
    for name in stay:
        (tmp_path / name).write_bytes(b"")
    with open(tmp_path / stay[-1]) as file:  # as if a build in another container wrote it
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"removed: {left}" in built(*words)
    assert set(stay) < set(os.listdir(tmp_path)) and not left.exists()
    assert "removed" in built(*words)  # the one that is not locked any more
    assert BetonReader(tmp_path / "x.beton").num_samples == 64


def test_build_never_writes_into_a_living_builds_file(folder, tmp_path):
    """Another container's build has the same process number: the second build is refused."""
    tmp = tmp_path / f".x.beton.tmp-{os.getpid()}"
    with open(tmp, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"theirs")
        file.flush()
        words = ["--data-dir", folder / "val", "--out", tmp_path / "x.beton"]
        assert tmp.name in built(*words, code=1)
        assert tmp.read_bytes() == b"theirs"


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
    sidecar = (folder / "val.beton.json").read_text()  # of another build: one was killed in between
    out.with_suffix(".beton.json").write_text(sidecar)
    with pytest.raises(DataError, match="x.beton.json.*another build"):
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
        if number % 2:  # fill bytes before a marker (T.81, B.1.1.2) change nothing
            jpeg = jpeg[:-2] + b"\xff\xff" + jpeg[-2:]
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
                code = essl_loader.decode_planes(
                    essl_loader.Stored(stored.ctypes.data, len(data), 0, width, height),
                    essl_loader.Box(x, y, right - x, bottom - y), scratch)
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
    first = loader(2)
    batches = iter(first)
    list(itertools.islice(batches, 3))
    first.set_stage(res=48, scale=(0.5, 1.0))  # for the next epoch: the state is of this one
    assert first.state_dict() == state
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
    signature = (typeof(essl_loader.Stored(0, 0, 0, 0, 0)), typeof(essl_loader.Box(0, 0, 0, 0)),
                 typeof(essl_loader.Output(32, True, False)), types.int64, typeof(scratch))
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


NO_CACHE = """
import os, sys
import essl_loader
if sys.argv[2] == "an index that cannot be read":
    for kernel in (essl_loader.random_box, essl_loader.center_box, essl_loader.uniform):
        os.mkdir(kernel._cache._cache_file._index_path)
for _ in range(2):
    loader = essl_loader.FolderLoader(sys.argv[1], 8, res=32, num_workers=1)
    print(sum(int(images.sum()) for images, _ in loader))
"""


@pytest.mark.parametrize("case", ["no folder", soak("an index that cannot be read")])
def test_loader_kernels_without_a_cache(folder, tmp_path, case):
    """Read-only code without a home, a cache of another user's: the same bytes, and one line that
    names NUMBA_CACHE_DIR. So does the builder, whose workers compile nothing again."""
    for name in ("essl_loader.py", "build_beton.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "__pycache__").write_bytes(b"")  # root, too, can make no folder of this name
    env = {**os.environ, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": ""}
    if case != "no folder":
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")

    def run_there(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done
    done = run_there("-c", NO_CACHE, folder / "val", case)
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1 and done.stderr.count("\n") == 1, done.stderr
    loader = FolderLoader(folder / "val", 8, res=32, num_workers=1)
    expected = sum(int(images.sum()) for images, _ in loader)
    assert done.stdout.split() == [str(expected)] * 2
    built = run_there("build_beton.py", "--data-dir", folder / "val", "--out", "x.beton")
    assert built.stderr.count("\n") <= 1 and (tmp_path / "x.beton").exists(), built.stderr


def test_loader_folder_workers_end_with_a_killed_parent(folder):
    """SIGKILL of the process that reads a folder ends its workers too."""
    run_killed("folder", folder / "train")


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


def test_loader_proposes_commands_that_work(folder, tmp_path, monkeypatch):
    """What an error proposes is run, as it stands, with paths that a shell would split."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "my pictures"
    shutil.copytree(folder / "val", pictures)
    path = tmp_path / "it's.beton"

    def propose(data, **options):
        with pytest.raises(DataError) as raised:
            list(open_loader(data, 4, res=32, **options))
        return re.findall("`python build_beton.py (.*?)`", str(raised.value))

    def follow(command):
        built(*shlex.split(command.replace("PICTURES", shlex.quote(str(pictures)))))
    build, demo = propose(path)
    follow(build)
    follow(demo + " --limit 20")
    assert open_loader("data/demo_train.beton", 4).num_samples == 20
    bad = spoil(path, tmp_path / "bad 1.beton", 5)
    verify, = propose(bad)
    follow(verify)
    assert sum(len(labels) for _, labels in open_loader(bad, 4, drop_last=False)) == 12
    (pictures / "dark/0.png").write_bytes(b"no picture")
    skip_bad, = propose(pictures, num_workers=1)
    follow(skip_bad)
    assert open_loader("FILE.beton", 4).num_samples == 12


def test_loader_says_how_many_ranks_a_set_fills(beton):
    """Fewer pictures than ranks: a smaller batch would not help, fewer ranks do."""
    for train_set in (True, False):
        settings = dict(train=train_set, res=32, indices=[3])
        with pytest.raises(DataError, match="at most 1 rank") as raised:
            ESSLLoader(beton, 1, rank=1, world_size=2, **settings)
        assert "drop_last" not in str(raised.value)
        ESSLLoader(beton, 1, world_size=1, **settings)
    with pytest.raises(DataError, match="batch of at most 20, or drop_last=False"):
        ESSLLoader(beton, 21, world_size=2)
    ESSLLoader(beton, 20, world_size=2)
    ESSLLoader(beton, 21, world_size=2, drop_last=False)


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


def test_loader_copies_ahead_and_keeps_what_is_copied(folder, monkeypatch):
    """With a stream that copies as late as it may: no batch's memory is filled again before, each
    batch waits for its own copy alone and is recorded on the stream that uses it."""
    expected = epochs_of(ESSLLoader(folder / "train.beton", 8, res=24, num_workers=2))
    under_way, recorded = [], []

    class Copied:
        def __init__(self, source):  # which it does not keep, as a copy on a GPU does not
            self.address, self.size, self.stride = source.data_ptr(), source.shape, source.stride()
            self.nbytes, self.dtype = source.nbytes, source.dtype
            under_way.append(self)

        def record_stream(self, stream):
            assert self not in under_way
            recorded.append(stream)

    class Event:
        def __init__(self):
            self.copies = list(under_way)

        def synchronize(self):
            for copied in [copied for copied in self.copies if copied in under_way]:
                memory = bytearray(ctypes.string_at(copied.address, copied.nbytes))
                flat = torch.frombuffer(memory, dtype=copied.dtype)
                copied.values = flat.as_strided(copied.size, copied.stride)
                under_way.remove(copied)
    stream = SimpleNamespace(record_event=Event)
    empty, moved = torch.empty, torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "training's")
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kw: empty(*args, **kw))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kw: (
        Copied(self) if kw.get("non_blocking") else moved(self, *args, **kw)))
    loader = ESSLLoader(folder / "train.beton", 8, res=24, num_workers=2, device="cuda")
    found = []
    for _ in range(2):
        for images, labels in loader:
            assert len(under_way) <= 2  # the next batch's pictures and labels
            found.append((images.values, labels.values))
    assert set(recorded) == {"training's"} and len(recorded) == 2 * len(found) and not under_way
    assert [(a.numpy().tobytes(), b.tolist()) for a, b in found] == expected


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
        subprocess.run(["kill", str(child.pid)], check=True)
    assert len(list(batches)) == 3 and torch.equal(torch.get_rng_state(), state)


def raising(picture):
    raise KeyError("no such colour")


FOLDER_AT_EXIT = """
import sys
from essl_loader import FolderLoader
batches = iter(FolderLoader(sys.argv[1], 4, res=16, num_workers=2))
next(batches)
print("the last line")
if sys.argv[2] == "raises":
    raise ValueError("mine")
"""


@pytest.mark.parametrize("how", ["ends", "raises"])
def test_loader_folder_loader_lets_a_program_end(folder, how):
    """A program that ends in the middle of an epoch, with or without an error, ends its workers."""
    done = subprocess.run([sys.executable, "-c", FOLDER_AT_EXIT, folder / "train", how], cwd=HERE,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == int(how == "raises") and done.stdout == "the last line\n", done.stderr


@pytest.mark.parametrize("transform, word", [
    (raising, "KeyError.*no such colour.*test_all.py, line"),
    (lambda picture: picture.resize((9, 9)), "shape"),
    (lambda picture: np.asarray(picture) / 255, "uint8.*float64"),
    (lambda picture: None, "uint8")])
def test_loader_folder_loader_names_what_a_transform_fails_on(folder, transform, word):
    """A transform that raises, or returns what is no picture of the size, ends the epoch with an
    error that names the picture and the place; the pictures are not called damaged."""
    loader = FolderLoader(folder / "val", 4, res=16, num_workers=1, transform=transform)
    with pytest.raises(DataError, match=rf"(?s)\d.png: transform failed.*{word}") as raised:
        list(loader)
    assert "skip-bad" not in str(raised.value)


@pytest.mark.parametrize("name", ["train", "train.beton"])
@pytest.mark.parametrize("options", [{}, {"views": 2}, {"train": False}])
def test_loader_return_index_tells_the_samples(folder, name, options):
    """The numbers are those of `indices`, labels and pictures; pictures and labels do not change
    by asking for them."""
    settings = dict(res=16, seed=2, num_workers=1, indices=[9, 4, 9, 60, 2, 11]) | options
    plain = open_loader(folder / name, 4, drop_last=False, **settings)
    asked = open_loader(folder / name, 4, drop_last=False, return_index=True, **settings)
    found = []
    for (images, labels), (same, also, samples) in zip(plain, asked, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, also)
        assert samples.dtype == torch.int64 and samples.shape == labels.shape
        assert labels.tolist() == asked.labels[samples].tolist()
        found += samples.tolist()
    assert sorted(found) == [2, 4, 9, 9, 11, 60]
    if options == {"train": False}:
        assert found == [9, 4, 9, 60, 2, 11]


def half_batch(images):
    return images.float().flip(-1) / 2


def test_loader_transform_takes_whole_batches(beton):
    """Called once a batch, on uint8 images in channels_last, with all views; its result takes
    their place, the loader's own bytes do not change; an error of it leaves no thread, and the
    batch counts as not given out."""
    seen = []

    def transform(images):
        seen.append((images.dtype, images.shape))
        return half_batch(images)
    for options in ({"views": 2}, {}, {"train": False}):
        settings = dict(res=24, drop_last=False) | options
        plain = list(ESSLLoader(beton, 16, **settings))
        seen.clear()
        found = list(ESSLLoader(beton, 16, transform=transform, **settings))
        assert seen == [(torch.uint8, images.shape) for images, _ in plain]
        for (images, labels), (changed, also) in zip(plain, found, strict=True):
            assert torch.equal(labels, also) and torch.equal(changed, half_batch(images))
    threads = threading.active_count()
    loader = ESSLLoader(beton, 16, res=24, transform=raising)
    with pytest.raises(KeyError, match="no such colour"):
        list(loader)
    assert threading.active_count() == threads and loader.state_dict()["samples"] == 0


@pytest.mark.parametrize("name", ["train", "train.beton"])
def test_loader_is_pickled_with_its_place(folder, tmp_path, name):
    """In the middle of an epoch, after set_stage and set_indices: the copy gives the rest of the
    epoch and the next one; what has changed since, or is closed, is refused."""
    path = tmp_path / name
    shutil.copytree(folder / name, path) if name == "train" else shutil.copy(folder / name, path)
    loader = open_loader(path, 8, seed=3, res=16, num_workers=1, rank=1, world_size=2,
                         return_index=True)
    loader.set_epoch(2)
    loader.set_indices(np.arange(63, -1, -1).repeat(2))
    loader.set_stage(res=24, scale=(0.5, 1.0))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    stored = pickle.dumps(loader)
    assert len(stored) < 10_000

    def rest_of(batches):
        return [(images.numpy().tobytes(), labels.tolist(), samples.tolist())
                for images, labels, samples in batches]
    expected = rest_of(batches) + rest_of(loader)
    again = pickle.loads(stored)
    assert rest_of(again) + rest_of(again) == expected and len(expected) == 13
    loader.set_epoch(0)
    batches = iter(loader)
    next(batches)
    loader.set_stage(res=16)  # for the next epoch: a copy cannot be of both
    with pytest.raises(RuntimeError, match="set_stage"):
        pickle.dumps(loader)
    loader.set_stage(res=24)
    loader.set_indices([1, 2] * 30)
    with pytest.raises(RuntimeError, match="set_indices"):
        pickle.dumps(loader)
    batches.close()
    again.close()
    with pytest.raises(RuntimeError, match="closed"):
        pickle.dumps(again)
    if name == "train":
        (path / "light/1.png").rename(path / "dark/1.png")
    else:
        shutil.copy(folder / "val.beton", path)
    with pytest.raises(ValueError, match=f"{name}: (its labels|.*expected a list of samples)"):
        pickle.loads(stored)


def test_loader_reader_is_pickled_by_its_path(folder, tmp_path):
    """The copy reads the file anew, with its names and classes; another file there is refused."""
    for ending in ("beton", "beton.json", "beton.names"):
        shutil.copy(folder / f"train.{ending}", tmp_path / f"x.{ending}")
    reader = BetonReader(tmp_path / "x.beton")
    stored = pickle.dumps(reader)
    again = pickle.loads(stored)
    reader.close()
    assert len(stored) < 2_000 and again.names[5] == reader.names[5]
    assert again.classes == reader.classes and again.image(3).shape[2] == 3
    for ending in ("beton", "beton.json", "beton.names"):
        shutil.copy(folder / f"val.{ending}", tmp_path / f"x.{ending}")
    with pytest.raises(DataError, match="x.beton.*Open it anew"):
        pickle.loads(stored)


SPAWN = """
import hashlib, sys
import torch
from essl_loader import ESSLLoader

def digest(loader):
    whole = hashlib.sha1()
    for images, labels in loader:
        whole.update(images.numpy().tobytes())
    return whole.hexdigest()

def work(rank, loaders, reader, out):
    reader.image(0)
    with open(f"{out}/{rank}", "w") as file:
        file.write(digest(loaders[rank]))

if __name__ == "__main__":
    path, out = sys.argv[1:]
    loaders = [ESSLLoader(path, 8, res=24, rank=rank, world_size=2) for rank in range(2)]
    torch.multiprocessing.spawn(work, (loaders, loaders[0].reader, out), nprocs=2)
    for rank in range(2):
        assert open(f"{out}/{rank}").read() == digest(loaders[rank])
"""


def test_loader_works_in_spawned_processes(folder, tmp_path):
    """torch.multiprocessing.spawn: each process gets its loader and gives the parent's bytes."""
    (tmp_path / "spawn.py").write_text(SPAWN)
    done = subprocess.run([sys.executable, tmp_path / "spawn.py", folder / "train.beton", tmp_path],
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_loader_folder_loader_refuses_what_the_builder_refuses(tmp_path):
    """16-bit grey and float pictures, which a conversion would clip; pictures without folders have
    no label."""
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "float.tiff")
    loader = FolderLoader(tmp_path, 1, train=False, res=8, num_workers=1)
    assert loader.labels.tolist() == [-1, -1] and loader.classes is None
    for i, name in enumerate(("deep.png", "float.tiff")):
        loader.indices = [i]
        with pytest.raises(DataError, match=f"{name}: .*8 bits"):
            list(loader)


def test_loader_indices_are_checked_when_set(beton):
    """Another length works from the next epoch on; what is no list of samples is refused."""
    loader = ESSLLoader(beton, 4, train=False, res=16, indices=[3, 1])
    assert [labels.tolist() for _, labels in loader] == [[3, 1]]
    loader.indices = np.arange(30, 39)
    assert len(loader) == 3 and torch.cat([y for _, y in loader]).tolist() == list(range(30, 39))
    for wrong in (np.ones(40, bool), [True, False], [0.0, 1.0], [40], [-1], [], [[1, 2]], 3,
                  [2 ** 63], ["1"], None, {1, 2}, torch.ones(40, dtype=torch.bool)):
        with pytest.raises(ValueError, match="indices of .*0 to 39.*flatnonzero"):
            loader.set_indices(wrong)
        if wrong is not None:
            with pytest.raises(ValueError, match="indices of"):
                ESSLLoader(beton, 4, indices=wrong)
    with pytest.raises(ValueError):
        loader.indices[0] = 99
    assert loader.num_samples == 9
    train = ESSLLoader(beton, 4, res=16)
    train.indices = [5]
    with pytest.raises(DataError, match="do not fill one batch"):
        list(train)


@pytest.mark.parametrize("argument, remedy", [
    (dict(ratio=(0, 1)), "0 < low"), (dict(ratio=(2, 1)), "0 < low"), (dict(hflip=7), "0 to 1"),
    (dict(seed=-1), "at least 0"), (dict(views=0), "at least 1"), (dict(rank=1), "world_size is 1"),
    (dict(views=2, train=False), "train=False"), (dict(scale=(0.5, 2)), "high <= 1")])
def test_loader_names_an_argument_that_is_wrong(beton, argument, remedy):
    """When the loader is made, not in its first epoch."""
    with pytest.raises(ValueError, match=f"{next(iter(argument))}=.*{remedy}"):
        ESSLLoader(beton, 4, **argument)


@pytest.mark.parametrize("name", ["train", "train.beton"])
def test_loader_set_indices_for_the_next_epoch(folder, name):
    """Samples that stand there several times come as often, with a crop each; set in the middle
    of an epoch they count from the next one; a state in the middle of an epoch belongs to the
    indices of that epoch, and is refused with others of the same number, and in their order."""
    def loader(indices=None):
        return open_loader(folder / name, 4, res=16, seed=3, num_workers=1, indices=indices)
    balanced = [5] * 6 + [7, 8] * 3
    changing = loader(range(8))
    batches = iter(changing)
    first = [next(batches)[1]]
    state_before = changing.state_dict()
    changing.set_indices(balanced)
    assert changing.state_dict() == state_before
    first += [labels for _, labels in batches]
    assert sorted(torch.cat(first).tolist()) == sorted(changing.labels[:8].tolist())
    images, labels = (torch.cat(parts) for parts in zip(*changing))
    assert sorted(labels.tolist()) == sorted(changing.labels[balanced].tolist())
    assert len(images.flatten(1).unique(dim=0)) == 12

    one = loader(balanced)
    batches = iter(one)
    next(batches)
    state = json.loads(json.dumps(one.state_dict()))
    rest = [(images.numpy().tobytes(), labels.tolist()) for images, labels in batches]
    for other in (None, range(12), balanced[::-1], balanced[:-1]):
        with pytest.raises(ValueError, match=f"{name}.*set_indices"):
            loader(other).load_state_dict(state)
    other = loader()
    other.set_indices(torch.tensor(balanced))
    other.load_state_dict(state)
    assert epochs_of(other, 1) == rest
    del state["indices"]  # a state of earlier versions
    other.load_state_dict(state)
    assert epochs_of(other, 1) == rest


@pytest.mark.parametrize("name", ["val", "val.beton"])
@pytest.mark.parametrize("launch", ["torchrun", "a group", "alone"])
def test_loader_warns_of_ranks_that_it_does_not_know(folder, monkeypatch, name, launch):
    """In one of several processes a loader that was not told its rank warns once, when it is
    iterated, with the remedy; one that was told does not, nor does any in a process of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2" if launch == "torchrun" else "")
    if launch == "a group":  # as torch.multiprocessing.spawn starts it, without the variable
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    found = []
    for shard in ({}, {"world_size": 1}, {"rank": 1, "world_size": 2}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_loader(folder / name, 4, res=8, num_workers=1, **shard) as loader:
                assert loader.num_samples == 13 and not caught  # its tables may be read by all
                for _ in range(2):
                    next(iter(loader))
        found.append([str(warning.message) for warning in caught
                      if "world_size" in str(warning.message)])
    assert [len(messages) for messages in found] == [int(launch != "alone"), 0, 0]
    for message in found[0]:
        assert name in message and "2 processes" in message and "Give the loader rank" in message


def test_loader_says_what_is_wrong_with_labels(tmp_path):
    """Labels of -1, of 10 ** 12 and of one class in FFCV's files are named before training, for
    both sets; a file without a label field has none."""
    picture = (0, 16, 16, jpeg_of(Image.new("RGB", (16, 16))))

    def labelled(name, *labels):
        path = write_beton(tmp_path / name, [picture] * len(labels))
        data = bytearray(path.read_bytes())
        start = essl_loader.HEADER.itemsize + 2 * essl_loader.FIELD.itemsize
        samples = np.frombuffer(data, essl_loader.SAMPLE, len(labels), start)
        samples["label"] = labels
        path.write_bytes(data)
        return open_loader(path, 1)
    good = labelled("good.beton", 0, 1, 2)
    essl_loader.check_classes(good, labelled("val.beton", 1, 0))
    for labels, words in (((-1, -1), "no labels"), ((0, -1, 1), "sample 1"),
                          ((0, 10 ** 12), "up to"), ((5, 5), "one class")):
        bad = labelled("bad.beton", *labels)
        with pytest.raises(DataError, match=f"bad.beton.*{words}.*--labels"):
            essl_loader.check_classes(bad, good)
    for labels, words in (((0, -1), "sample 1"), ((0, 3), "0 to 3")):
        with pytest.raises(DataError, match=f"bad.beton.*{words}"):
            essl_loader.check_classes(good, labelled("bad.beton", *labels))
    data = bytearray((tmp_path / "good.beton").read_bytes())
    second = essl_loader.HEADER.itemsize + essl_loader.FIELD.itemsize
    data[second] = 0  # the field's type: float64
    (tmp_path / "float.beton").write_bytes(data)
    assert BetonReader(tmp_path / "float.beton").labels.tolist() == [-1] * 3
    data[second] = 4  # FFCV's NDArray
    (tmp_path / "array.beton").write_bytes(data)
    with pytest.raises(DataError, match=r"array.beton.*\[2, 4\].*without the other fields"):
        BetonReader(tmp_path / "array.beton")
    other = labelled("other.beton", 0, 1)
    good.classes, other.classes = ["cat", "dog"], ["cat", "cow"]
    with pytest.raises(DataError, match="other.beton.*cow, dog.*--classes"):
        essl_loader.check_classes(good, other)


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
# The kernels read and write by address, so a damaged file could make them touch memory that is not
# theirs: Python would not notice, and the pixels might even be right. Two things show it.
# Guard pages: each part of a kernel's memory (input, scratch, output) ends exactly where a page
# begins that nobody may touch. One byte beyond the end kills the process at once (SIGSEGV).
# Fuzzing: files of every kind are damaged by cuts, flipped bits and hostile numbers, and go through
# the kernels, the builder and the loader. Each must be refused in words, or give the pixels that
# libjpeg-turbo gives for the same bytes; it must not crash, hang (an alarm ends it), or give other
# pixels. The rounds run in a process of their own, so that a crash fails one test; a round depends
# on its number alone, so that a failure can be repeated. `-m soak` runs thousands of them.
def damaged(rng, data, flips=20):
    """Bytes that are cut, or have flipped bits, or a hostile number in them, often at the start."""
    data = bytearray(data)
    places = rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 3000), size=flips)
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
    code = essl_loader.resized_crop(
        essl_loader.Stored(stored.ctypes.data, len(data), 0, width, height), essl_loader.Box(*box),
        essl_loader.Output(48, True, False), out.ctypes.data, scratch)
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
        sample = damaged(rng, whole, 1)[:len(whole)].ljust(len(whole), b"\0") + index
    else:  # damage anywhere
        sample = damaged(rng, essl_loader.add_index(whole, *size)[0], 1)
    code, got = guarded_crop(sample, *size, box)
    outcomes.append("bad sample" if code else "good sample")
    if not code:
        # The pixels of the undamaged picture, or of one with damage that libjpeg-turbo reads too;
        # one flipped bit, for of two each may be read by another decoder only
        fine = [guarded_crop(whole, *size, box)]
        fine.append(guarded_crop(sample[:len(whole)], *size, box))
        assert (0, got) in fine, number
    (folder / "x.jpg").write_bytes(jpeg)
    settings = vars(build_beton.get_args(["--data-dir=.", "--out=x.beton", "--lossless"]))
    picture = build_beton.FilePicture(str(folder), "x.jpg", 0)
    result = build_beton.encode_sample(settings, picture)
    outcomes.append("bad picture" if isinstance(result, str) else "good picture")
    if outcomes[-1] == "good picture" and result.how.startswith("kept"):
        expected = np.asarray(turbojpeg.decompress(jpeg, raise_on_warnings=True))
        assert np.array_equal(turbojpeg.decompress(result.data), expected)
    path = folder / "x.beton"
    items = [(0, *Image.open(io.BytesIO(data)).size, data) for _, data in kinds[:5]]
    write_beton(path, [(mode, width, height, essl_loader.add_index(data, width, height)[0])
                       for mode, width, height, data in items])
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
    """uint8 is normalised as by torchvision."""
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    noise = torch.rand(2, 16)
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    floats = (imgs / 255 - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model(imgs, noise=noise)[0], model(floats, noise=noise)[0])
    half = floats.half().repeat(3000, 1, 1, 1)  # float16 ends at 65,504
    pred = torch.zeros(6000, 16, 192)
    loss, expected = (model.forward_loss(kind(half), pred, kind(torch.ones(6000, 16)))
                      for kind in (torch.Tensor.half, torch.Tensor.float))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("height, width", [(32, 48), (64, 16), (24, 8), (16, 64), (32, 32)])
def test_models_rectangles_equal_plain_references(height, width):
    """tokens are those of timm's ViT, and features their mean; loss, prediction and gradients are
    the reference's with timm's tables of that size; 16 x 64 has as many patches as the table."""
    from timm.layers import resample_abs_pos_embed
    torch.manual_seed(0)
    model = models_mae.MaskedAutoencoderViT(32, 8, 24, 2, 3, 16, 2, 2).double()
    grid = (height // 8, width // 8)
    imgs = torch.randn(3, 3, height, width, dtype=torch.float64)
    vit = ViT(dict(patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=4.0), 32, 0, "mean")
    load_into(vit.double(), model.state_dict(), "x")
    expected = vit.forward_features(imgs)[:, 1:]  # (B, L, D)
    tokens = model.tokens(imgs)
    assert tokens.shape == (3, 24, *grid)
    for row, column in itertools.product(*map(range, grid)):
        ours, theirs = tokens[:, :, row, column], expected[:, row * grid[1] + column]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # timm's table: float32
    torch.testing.assert_close(model.features(imgs), expected.mean(1), rtol=0, atol=1e-6)
    tokens.sum().backward()
    assert model.cls_token.grad.abs().sum() > 0
    patches = F.unfold(imgs, 8, stride=8).mT.unflatten(2, (3, -1)).mT.flatten(2)
    assert torch.equal(model.patchify(imgs), patches)
    assert torch.equal(model.unpatchify(patches, grid), imgs)

    plain = copy.deepcopy(model)
    for name in ("pos_embed", "decoder_pos_embed"):
        table = resample_abs_pos_embed(getattr(model, name), list(grid), [4, 4])
        setattr(plain, name, torch.nn.Parameter(table, requires_grad=False))
    noise = torch.rand(3, grid[0] * grid[1])
    model.zero_grad()
    loss, pred, mask = model(imgs, 0.5, noise)
    loss.backward()
    rows = [reference_mae(plain, *pair, 0.5, 1.0) for pair in zip(imgs, noise)]
    losses, preds, masks = (torch.stack(parts) for parts in zip(*rows))
    plain.zero_grad()
    losses.mean().backward()
    ours, theirs = ([p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain))
    torch.testing.assert_close([loss, pred, mask, *ours], [losses.mean(), preds, masks, *theirs],
                               rtol=1e-5, atol=1e-9)
    parts = model.reconstruct(imgs, 0.5, noise)
    shown = (imgs * model.std + model.mean).clamp(0, 1)
    torch.testing.assert_close(parts[0], shown)


def test_models_say_what_is_no_whole_grid():
    """A side that is no multiple of the patch, in either direction; patches of a rectangle without
    its grid; a grid of another number of patches."""
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    for shape in ((2, 3, 32, 36), (2, 3, 36, 32), (2, 3, 32, 4)):
        for way in (model, model.patchify, model.features, model.tokens):
            with pytest.raises(WeightsError, match="multiple of 8"):
                way(torch.zeros(shape, dtype=torch.uint8))
    imgs = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    latent, _, ids_restore = model.forward_encoder(imgs, 0.5)
    patches = model.patchify(imgs)
    for wrong in (lambda: model.unpatchify(patches), lambda: model.unpatchify(patches, (4, 5)),
                  lambda: model.forward_decoder(latent, ids_restore)):
        with pytest.raises(WeightsError, match="24 patches.*grid_of"):
            wrong()
    assert model.forward_decoder(latent, ids_restore, grid=(4, 6)).shape == (2, 24, 192)


def test_models_warn_of_float_pictures_that_are_not_normalised(folder, mae):
    """Floats of 0 to 1 and of 0 to 255, in training and evaluation, in each way into a model; not
    of uint8 or normalised pictures, and in a training step of the ViT nothing is looked at."""
    vit = ViT(vit_size("vit_nano_patch8"), 32, 3)
    loaded = load_mae(folder / "mae.pt")
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalised = (imgs / 255 - loaded.mean) / loaded.std
    training = copy.deepcopy(loaded).train()
    ways = (loaded, training, loaded.features, training.features, loaded.reconstruct,
            lambda x: loaded.forward_encoder(x, 0.75), vit.eval())
    for way in ways:
        for floats in (imgs / 255, imgs.float(), (imgs / 255).half().float()):
            with pytest.warns(UserWarning, match="uint8"):
                way(floats)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            way(imgs)
            way(normalised)
            way(normalised[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.train()(imgs / 255)
        assert loaded.features(normalised[:0]).shape == (0, 128)


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
    stages = {stage[:2] for scheme in schedules.PRETRAIN_SCHEMES.values() for stage in scheme}
    for res, mask_ratio in sorted(stages) if size == "tiny" else [(160, 0.9), (224, 0.75)]:
        imgs = torch.zeros(2, 3, res, res, dtype=torch.uint8, device="meta")
        noise = torch.zeros(2, (res // 16) ** 2, device="meta")
        for keep in (1.0, 0.5) if res == 160 else (1.0,):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(imgs, mask_ratio, noise, keep)[0].backward()
            ours = model.flops_per_image(res, mask_ratio, keep)
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
    *same, zero = model.reconstruct(imgs, 0.75, with_zero=True)
    torch.testing.assert_close(torch.stack(same), torch.stack([original, visible, reconstruction]))
    torch.testing.assert_close(zero[..., :8, :], top, atol=1e-5, rtol=0)
    patches = model.patchify(model.normalize(imgs))  # one mean for all three colours
    expected = model.unpatchify(patches.mean(2, keepdim=True).expand_as(patches))
    expected = (expected * model.std + model.mean).clamp(0, 1)[..., 8:, :]
    torch.testing.assert_close(zero[..., 8:, :], expected, atol=1e-5, rtol=0)
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


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


CHECKPOINTS = {  # as other code writes them: weights of the encoder -> what torch.save is given
    "compiled": lambda w: {"model": prefixed(w, "_orig_mod.module.")},
    "parts compiled": lambda w: {k.replace("blocks.1.", "blocks.1._orig_mod."): w[k] for k in w},
    "DINO": lambda w: {"student": prefixed(w, "module.backbone."), "epoch": 3,
                       "teacher": prefixed(w, "backbone.") | {"head.mlp.0.weight": torch.ones(2)}},
    "MoCo v3": lambda w: {"arch": "vit_base", "state_dict": prefixed(w, "module.base_encoder.") |
                          {f"module.momentum_encoder.{k}": v + 1 for k, v in w.items()}},
    "SimMIM": lambda w: {"model": prefixed(w, "encoder.") | {"decoder.0.weight": torch.ones(2)}},
    "average": lambda w: {"model": "vit_base", "model_ema": prefixed(w, "module.")},
    "Lightning": lambda w: {"state_dict": prefixed(w, "net.model.")},
    "NumPy": lambda w: {"model": w, "best": np.float32(1.5), "epoch": np.int64(3),
                        "args": argparse.Namespace(lr=np.float64(0.1), ok=np.bool_(True))}}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_models_read_checkpoints_as_they_come(mae, tmp_path, kind):
    """Containers and prefixes of other code, numbers of NumPy: the encoder's weights and sizes."""
    encoder = {k: v for k, v in mae.state_dict().items()
               if not k.startswith(("mask_token", "decoder"))}
    torch.save(CHECKPOINTS[kind](encoder), tmp_path / "x.pth")
    weights, settings, _ = read_weights(tmp_path / "x.pth")
    torch.testing.assert_close(weights, encoder, rtol=0, atol=0)
    assert settings == {k: mae.settings[k] for k in settings} and settings["depth"] == 2


def test_models_read_numbers_of_numpy_1(mae, tmp_path):
    """NumPy 1 wrote another module's name into the file."""
    torch.save({"model": mae.state_dict(), "best": np.float64(1)}, tmp_path / "x.pth",
               _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pth").read_bytes()
    assert data.count(b"numpy._core.multiarray") == 1
    (tmp_path / "x.pth").write_bytes(data.replace(b"numpy._core.", b"numpy.core."))
    check_same_model(load_mae(tmp_path / "x.pth", num_heads=4), mae)


def test_models_say_which_of_several_weights_they_take(mae, tmp_path):
    """Of two containers one is taken, with a warning; of two encoders none, and both are named."""
    weights = mae.state_dict()
    torch.save({"model": weights, "model_ema": prefixed(weights, "module.")}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="x.pth holds model and model_ema: model"):
        read_weights(tmp_path / "x.pth")
    torch.save(prefixed(weights, "left.") | prefixed(weights, "right."), tmp_path / "y.pth")
    with pytest.raises(WeightsError, match="y.pth.*left., right."):
        read_weights(tmp_path / "y.pth")


def export(*words):
    """models_mae.py, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["models_mae.py", *map(str, words)])
        models_mae.main()


@pytest.fixture
def exported(tmp_path, capsys):
    """A model whose tensors all differ from what they begin with, and its --export-hf."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_nano_patch8(img_size=40, depth=2, norm_pix_loss=False).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"modules": prefixed(model.state_dict(), "model."), "model": model.settings},
               tmp_path / "mae.pt")
    export("--export-hf", tmp_path / "mae.pt", tmp_path / "hf")
    assert f"from_pretrained('{tmp_path / 'hf'}')" in capsys.readouterr().out
    return model, tmp_path / "hf"


def check_same_model(a, b):
    assert a.settings == b.settings
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_models_hugging_face_names_both_ways(exported, tmp_path):
    """The export has the names of Hugging Face's published files, its table the export's
    resolution; the folder, its weights alone and transformers 5's spelling give the model back."""
    from safetensors.torch import load_file
    model, out = exported
    weights = model.state_dict()
    tensors = load_file(out / "model.safetensors")
    layer = "vit.encoder.layer.1."
    for i, part in enumerate(("query", "key", "value")):
        rows = weights["blocks.1.attn.qkv.bias"][128 * i:128 * (i + 1)]
        assert torch.equal(tensors[f"{layer}attention.attention.{part}.bias"], rows)
    for theirs, ours in (
            (f"{layer}attention.output.dense.weight", "blocks.1.attn.proj.weight"),
            (f"{layer}layernorm_before.bias", "blocks.1.norm1.bias"),
            (f"{layer}intermediate.dense.weight", "blocks.1.mlp.fc1.weight"),
            ("decoder.decoder_layers.0.output.dense.bias", "decoder_blocks.0.mlp.fc2.bias"),
            ("vit.embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"),
            ("vit.embeddings.position_embeddings", "pos_embed"),
            ("vit.layernorm.bias", "norm.bias"), ("decoder.mask_token", "mask_token"),
            ("decoder.decoder_pos_embed", "decoder_pos_embed")):
        assert torch.equal(tensors[theirs], weights[ours]), theirs
    config = json.loads((out / "config.json").read_text())
    assert config["image_size"] == 40 and weights["pos_embed"].shape[1] == 1 + 5 * 5
    check_same_model(load_mae(out), model)

    torch.save(tensors, tmp_path / "x.bin")  # without the config: sizes are guessed from widths
    check_same_model(load_mae(tmp_path / "x.bin", norm_pix_loss=False, num_heads=4), model)
    new = {}
    for name, tensor in tensors.items():
        for old_part, new_part in (
                ("vit.encoder.layer.", "vit.layers."),
                ("attention.attention.query", "attention.q_proj"),
                ("attention.attention.key", "attention.k_proj"),
                ("attention.attention.value", "attention.v_proj"),
                ("attention.output.dense", "attention.o_proj"),
                ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")):
            name = name.replace(old_part, new_part)
        new[name] = tensor
    torch.save(new, out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    check_same_model(load_mae(out), model)
    for key, value, word in (("hidden_size", 64, "config.json"), ("hidden_act", "relu", "gelu")):
        (out / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(WeightsError, match=word):
            load_mae(out)


def test_models_hugging_face_computes_the_same(exported, tmp_path, monkeypatch):
    """transformers opens the export without a network: same loss, predictions and normalisation;
    what it saves gives the same weights back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    model, out = exported
    theirs, info = transformers.ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    imgs = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    noise = torch.rand(3, 25)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    pixels = processor(list(imgs), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        loss, pred, mask = model(imgs, 0.75, noise)
        output = theirs.eval()(pixels, noise=noise)
    torch.testing.assert_close((output.loss, output.logits, output.mask), (loss, pred, mask),
                               rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "back")
    check_same_model(load_mae(tmp_path / "back"), model)


def test_models_checkpoints_tell_the_decoder_blocks_in_use(folder, tmp_path, monkeypatch):
    """A run whose last stage uses one of two decoder blocks: load_mae and Hugging Face's folder do
    too, and timm's file has nothing that a user added to the model."""
    s5 = list(schedules.PRETRAIN_SCHEMES["s5"])
    monkeypatch.setitem(schedules.PRETRAIN_SCHEMES, "s5",
                        s5[:2] + [s5[2]._replace(decoder_depth=1)])
    assert fit(pretrain, folder, tmp_path, "--epochs", 2) == 0
    mae = load_mae(tmp_path / "last.pt")
    assert mae.active_decoder_blocks == 1 and len(mae.decoder_blocks) == 2
    models_mae.export_hf(tmp_path / "last.pt", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["decoder_num_hidden_layers"] == 1
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["modules"]["model.extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "x.pt")
    models_mae.export_timm(tmp_path / "x.pt", tmp_path / "timm.pt", 0)
    assert "extra.weight" not in torch.load(tmp_path / "timm.pt", weights_only=True)
    with pytest.raises(WeightsError, match="extra.weight.*YourClass"):
        load_mae(tmp_path / "x.pt")


def test_models_exports_overwrite_nothing(exported, tmp_path):
    """A folder that is there, and the checkpoint itself, are refused by name."""
    for words in (["--export-hf", tmp_path / "mae.pt", exported[1]],
                  ["--export-timm", tmp_path / "mae.pt", tmp_path / "mae.pt"]):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=str(words[-1])):
            export(*words)
        assert sorted(tmp_path.rglob("*")) == before
    load_mae(tmp_path / "mae.pt")


class Net(torch.nn.Linear):
    """A module that is pickled whole."""


def spoiled(weights):
    return {"model": weights | {"blocks.1.norm1.bias": torch.tensor([0.0, float("inf")])}}


NOT_WEIGHTS = {  # what lies under the name: a function of the weights, and a word of the remedy
    "pointer": (lambda w: b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "git lfs pull"),
    "page": (lambda w: b"\n<!doctype html><html>Sign in</html>", "download"),
    "error": (lambda w: b"<?xml version='1.0'?><Code>AccessDenied</Code>", "download"),
    "empty": (lambda w: b"", "again"), "text": (lambda w: b"epoch 1, loss 0.3", "Copy it again"),
    "zeros": (lambda w: bytes(5000), "Copy it again"),
    "pickle": (lambda w: pickle.dumps({"epoch": 3}), "another file"),
    "module": (lambda w: Net(2, 2), "state_dict"), "list": (lambda w: [torch.ones(2)], "dict"),
    "script": (lambda w: torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), "torch.jit.load"),
    "run": (lambda w: {"head": prefixed(w, "1."), "model": {"depth": 2}}, "no encoder"),
    "not finite": (spoiled, "blocks.1.norm1.bias holds NaN or infinity")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_models_say_what_is_no_checkpoint(mae, tmp_path, kind):
    """The file, what it is and a remedy in one line; never to read it without torch's safety."""
    make, word = NOT_WEIGHTS[kind]
    path = tmp_path / "x.pth"
    content = make(mae.state_dict())
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif kind == "script":
        content.save(path)
    else:
        torch.save(content, path)
    for resuming in (False, True):
        with pytest.raises(WeightsError, match="x.pth") as raised:
            if resuming:
                models_mae.resume(path, {}, {}, model=mae)
            else:
                read_weights(path)
        message = str(raised.value)
        assert "weights_only" not in message and "\n" not in message
        assert "--resume none" in message if resuming else word in message, message


def test_models_refuse_what_is_cut(folder, mae, tmp_path):
    """Every length of a checkpoint but the whole, a missing file and a folder of a run: named."""
    data = (folder / "mae.pt").read_bytes()
    path = tmp_path / "last.pt"
    for length in (3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="last.pt.*again"):
            read_weights(path)
    with pytest.raises(WeightsError, match="none.pt"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match=f"{tmp_path}.*such as .*last.pt"):
        read_weights(tmp_path)


def test_models_resume_refuses_weights_that_are_not_finite(folder, mae, tmp_path):
    """A run does not go on from weights with NaN: the tensor and the remedy are named."""
    state = {"model": {k: v.clone() for k, v in mae.state_dict().items()}, "settings": {}}
    state["model"]["decoder_pred.bias"][1] = float("nan")
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(WeightsError, match="last.pt: decoder_pred.bias.*earlier checkpoint"):
        models_mae.resume(tmp_path / "last.pt", {}, {}, model=copy.deepcopy(mae))


# --- schedules
def test_schedules_are_the_papers_tables():
    """Table 10, Table 8 and the stage boundaries, typed from the paper; kept tokens as listed."""
    rows = {"s1": "160 .50 192 .66 224 .75", "s2": "160 .75 192 .75 224 .75",
            "s3": "224 .75 192 .75 160 .75", "s4": "160 .75 192 .80 224 .85",
            "s5": "224 .75 192 .75 224 .75", "s6": "224 .75 192 .75 224 .85",
            "fixed": "224 .75 224 .75 224 .75"}
    for name, row in rows.items():
        ours = [x for stage in schedules.PRETRAIN_SCHEMES[name] for x in stage[:2]]
        assert ours == [float(x) for x in row.split()], name
    tune = schedules.FINETUNE_SCHEMES
    augment = {"s1": "3aug 3aug 3aug+", "s1-": "3aug 3aug 3aug", "s1+": "3aug+ 3aug+ 3aug+",
               "s3": "3aug 3aug 3aug+"}
    for name, row in augment.items():
        assert [(stage.res, stage.aug) for stage in tune[name]] == list(
            zip((160, 192, 224), row.split()))
    assert [stage.sigma_max for stage in tune["s3"]] == [0.68, 0.84, 1.0]
    assert all(round(stage.sigma_min, 2) == 0.28 for stage in sum(tune.values(), ()))
    for scheme in schedules.PRETRAIN_SCHEMES.values():
        assert schedules.stage_starts(800, scheme) == [0, 200, 400]
    for scheme in tune.values():
        assert schedules.stage_starts(100, scheme) == [0, 30, 60]
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
    assert round(schedules.masked_perceptual_ratio(224, 0.75), 4) == 0.0536  # as printed


def test_schedules_learning_rate():
    """Linear from 0 to the peak over the warm-up, then half a cosine to the floor."""
    rates = [schedules.lr_at(step, 1000, 100, 2.0, 0.5) for step in range(1001)]
    warm_up = np.linspace(0, 2, 101)
    cosine = 0.5 + 1.5 * (1 + np.cos(np.pi * np.arange(1, 901) / 900)) / 2
    assert rates == pytest.approx([*warm_up, *cosine])


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
                     "recon_0002.png", "recon_0004.png", ".lock", "scripts"}
    assert Image.open(unbroken / "recon_0002.png").width == 12 * (32 + 2) + 2  # 3 groups of 4
    for name in ("pretrain.py", "models_mae.py", "schedules.py"):
        copy = unbroken / "scripts/from_step_0" / name
        assert copy.read_bytes() == (HERE / name).read_bytes()


class WithContrast(pretrain.ModelWithProbe):
    """A user's own: one more layer, a second loss, an average of weights, a frozen teacher."""

    def __init__(self, model, *args):
        super().__init__(model, *args)
        width = model.settings["embed_dim"]
        self.projector = torch.nn.Linear(width, 8)
        self.average = copy.deepcopy(self.projector).requires_grad_(False)
        self.teacher = torch.nn.Linear(width, 8).requires_grad_(False)
        self.teacher.persistent = False
        self.steps = []

    def forward(self, images, labels, mask_ratio, noise):
        scalars = super().forward(images, labels, mask_ratio, noise)
        latent, _, _ = self.model.forward_encoder(images, mask_ratio, noise)
        features = latent[:, 0]
        contrast = F.mse_loss(self.projector(features), self.teacher(features).detach())
        scalars["contrast"] = contrast.detach()
        return scalars | {"loss": scalars["loss"] + contrast}

    def after_step(self, step):
        self.steps.append(step)
        with torch.no_grad():
            for average, p in zip(self.average.parameters(), self.projector.parameters()):
                average.lerp_(p, 0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pretrain_trains_what_a_user_adds(folder, tmp_path, monkeypatch, capsys, optimizer):
    """Modules beside the model are trained, averages follow each step, and a frozen teacher is in
    no checkpoint; a new scalar reaches log, bar and TensorBoard; killed, the bits are the same."""
    made = []

    def make(*args):
        torch.manual_seed(3)  # the teacher's weights come from somewhere else than the seed
        made.append(WithContrast(*args))
        made[-1].first = copy.deepcopy(made[-1].projector.state_dict())
        return made[-1]
    monkeypatch.setattr(pretrain, "ModelWithProbe", make)
    words = ("--optimizer", optimizer)
    assert fit(pretrain, folder, tmp_path / "whole", *words) == 0
    module = made[-1]
    assert module.steps == list(range(1, 17))
    for name, before in module.first.items():
        assert not torch.equal(before, module.projector.state_dict()[name]), name
        assert not torch.equal(before, module.average.state_dict()[name]), name
    log = log_of(tmp_path / "whole")
    assert all(line["contrast"] > 0 and line["probe_loss"] > 0 for line in log.values())
    assert "contrast" in capsys.readouterr().out
    saved = torch.load(tmp_path / "whole/last.pt", weights_only=True)["modules"]
    assert "average.weight" in saved and not any(name.startswith("teacher") for name in saved)
    for call in (5, 1):
        train_to_signal(call, pretrain, *flags(pretrain, folder, tmp_path / "cut", *words))
    assert fit(pretrain, folder, tmp_path / "cut", *words) == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")


class WithRandomness(pretrain.ModelWithProbe):
    """A user's own: a loss that draws random numbers."""

    def forward(self, images, labels, mask_ratio, noise):
        scalars = super().forward(images, labels, mask_ratio, noise)
        return scalars | {"loss": scalars["loss"] * (1 + 0.1 * torch.rand(()))}


def test_pretrain_random_numbers_in_the_loss_resume(folder, tmp_path, monkeypatch):
    """Numbers that a loss draws without a generator, as dropout does, are the same after a kill."""
    monkeypatch.setattr(pretrain, "ModelWithProbe", WithRandomness)
    assert fit(pretrain, folder, tmp_path / "whole") == 0
    train_to_signal(5, pretrain, *flags(pretrain, folder, tmp_path / "cut"))
    assert fit(pretrain, folder, tmp_path / "cut") == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("scalars, message", [
    ({"lr": torch.tensor(1.0)}, "'lr', which is a name of the log"),
    ({"weight": 0.5}, "'weight' as float: expected a tensor"),
    ({"each": torch.zeros(3)}, r"'each' as \(3,\)")])
def test_pretrain_refuses_what_is_no_scalar(folder, tmp_path, monkeypatch, scalars, message):
    """What forward() must not return is named at the first step."""
    class Wrong(pretrain.ModelWithProbe):
        def forward(self, *args):
            return super().forward(*args) | scalars
    monkeypatch.setattr(pretrain, "ModelWithProbe", Wrong)
    with pytest.raises(WeightsError, match=message):
        fit(pretrain, folder, tmp_path)


@pytest.mark.parametrize("name, function, message", [
    ("masking_noise", lambda shape, *args, **kwargs: torch.rand(shape) < 0.5, "torch.bool"),
    ("masking_noise", lambda shape, *args, **kwargs: torch.rand(shape[-1]), "expected floats"),
    ("targets", lambda model, imgs, _: imgs.flatten(1), "for a picture of 16 patches"),
    ("targets", lambda model, imgs, _: model.patchify(imgs).mean(2, keepdim=True),
     "--no-norm-pix-loss")])
def test_pretrain_refuses_masks_and_targets_of_another_shape(folder, tmp_path, monkeypatch, name,
                                                             function, message):
    """What was found and what is expected is said before a step."""
    monkeypatch.setattr(models_mae, name, function)
    with pytest.raises(WeightsError, match=message):
        fit(pretrain, folder, tmp_path)


def test_pretrain_frozen_weights_stay(folder, tmp_path, monkeypatch):
    """A frozen encoder trains the decoder, with Muon too; what gets no gradient is warned of; what
    is trained must be saved."""
    def freeze(model, *args):
        for part in (model.cls_token, model.blocks, model.norm, model.patch_embed):
            part.requires_grad_(False)
        module = pretrain_module(model, *args)
        module.unused = torch.nn.Linear(2, 2)
        return module

    pretrain_module = pretrain.ModelWithProbe
    monkeypatch.setattr(pretrain, "ModelWithProbe", freeze)
    for optimizer in ("adamw", "muon"):
        out = tmp_path / optimizer
        with pytest.warns(UserWarning, match="no gradient reaches unused.weight, unused.bias"):
            assert fit(pretrain, folder, out, "--optimizer", optimizer, "--epochs", 1) == 0
        assert log_of(out)[4]["skipped_steps"] == 0
        weights = torch.load(out / "last.pt", weights_only=True)["modules"]
        torch.manual_seed(0)
        before = models_mae.mae_vit_nano_patch8(img_size=32).state_dict()
        for part, changes in (("blocks.0.mlp.fc1.weight", False), ("decoder_pred.weight", True)):
            assert torch.equal(weights["model." + part], before[part]) != changes

    def forget(*args):
        module = pretrain_module(*args)
        module.head.persistent = False
        return module

    monkeypatch.setattr(pretrain, "ModelWithProbe", forget)
    with pytest.raises(WeightsError, match="head.1.weight.*not saved"):
        fit(pretrain, folder, tmp_path / "x")


def test_pretrain_checkpoint_without_an_added_module_is_named(folder, tmp_path, monkeypatch):
    """Only what is not persistent may be missing from a checkpoint."""
    assert fit(pretrain, folder, tmp_path, "--max-steps", 1) == 0
    monkeypatch.setattr(pretrain, "ModelWithProbe", WithContrast)
    with pytest.raises(WeightsError, match="(?s)last.pt, modules: .*projector.*--resume none"):
        fit(pretrain, folder, tmp_path)


def test_pretrain_a_gradient_in_no_group_ends_the_run(folder, tmp_path, monkeypatch):
    """What takes gradients after the optimizer was made would never change: it is named."""
    class Thaws(WithContrast):
        def after_step(self, step):
            self.projector.requires_grad_(True)

    def make(*args):
        module = Thaws(*args)
        module.projector.requires_grad_(False)
        return module
    monkeypatch.setattr(pretrain, "ModelWithProbe", make)
    with pytest.raises(WeightsError, match="projector.weight, projector.bias: .*requires_grad"):
        fit(pretrain, folder, tmp_path)


def test_pretrain_progress_reaches_masks_and_targets(folder, tmp_path, monkeypatch):
    """0 at the first step, just below 1 at the last, the same for masks and targets; pictures use
    that of the step before them; killed, the bits are the same."""
    seen = {"masks": [], "targets": [], "shown": []}
    patchify = models_mae.MaskedAutoencoderViT.patchify

    def masking_noise(shape, generator=None, device=None, progress=0.0):
        kind = "masks" if len(shape) == 5 else "shown"
        seen[kind].append(progress)
        noise = torch.rand(shape, generator=generator, device=device)
        return noise if progress < 0.5 else noise.sort().values

    def targets(model, imgs, progress):
        if len(imgs) == 8:  # not the model's own call, to know the width
            seen["targets"].append(progress.item())
        return patchify(model, imgs * (1 - progress / 2))
    monkeypatch.setattr(models_mae, "masking_noise", masking_noise)
    monkeypatch.setattr(models_mae, "targets", targets)
    whole = flags(pretrain, folder, tmp_path / "whole")
    assert train(pretrain, *whole) == 0
    assert seen["masks"] == [step / 16 for step in range(16)]
    assert sorted(set(seen["targets"])) == pytest.approx(seen["masks"])
    assert seen["shown"] == [7 / 16, 15 / 16]
    cut = flags(pretrain, folder, tmp_path / "cut")
    for call in (5, 1):
        train_to_signal(call, pretrain, *cut)
    assert train(pretrain, *cut) == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")


def test_pretrain_features_as_targets_need_one_function(folder, tmp_path, monkeypatch, capsys):
    """A replaced targets() of any width trains without pictures, which a line says, and load_mae
    reads it where targets() is another; 0 means no pictures."""
    with monkeypatch.context() as patch:
        patch.setattr(models_mae, "targets", lambda model, imgs, progress: (
            model.patchify(imgs).unflatten(2, (-1, 3)).std(dim=2)))  # (B, L, 3)
        assert fit(pretrain, folder, tmp_path / "std", "--epochs", 1) == 0
    assert "no pictures" in capsys.readouterr().out
    assert not list((tmp_path / "std").glob("*.png"))
    model = load_mae(tmp_path / "std/last.pt")
    with pytest.raises(WeightsError, match="no pixels"):
        model.reconstruct(torch.zeros(1, 3, 32, 32))
    with monkeypatch.context() as patch:  # as many numbers as pixels, but features
        patch.setattr(models_mae, "TARGETS_ARE_PIXELS", False)
        patch.setattr(models_mae, "targets", lambda model, imgs, _: model.patchify(imgs).sin())
        assert fit(pretrain, folder, tmp_path / "sin", "--epochs", 1) == 0
    assert not load_mae(tmp_path / "sin/last.pt").predicts_pixels  # the checkpoint tells it
    assert fit(pretrain, folder, tmp_path / "never", "--epochs", 1, "--viz-every", 0) == 0
    assert not list(tmp_path.glob("*/*.png"))


@pytest.fixture
def begun(folder, unbroken, tmp_path):
    """A copy of the unbroken run as it was after the first of its stages."""
    shutil.copytree(unbroken, tmp_path / "begun")
    shutil.copy(unbroken / "stage1.pt", tmp_path / "begun/last.pt")
    return tmp_path / "begun"


def test_pretrain_refuses_what_would_change_the_result(folder, begun, tmp_path, monkeypatch):
    """As many other pictures, other stages, crops, targets or masks are named when a run resumes;
    a comment in a function is not. Loaders of FFCV's files and of folders tell theirs apart."""
    built("--data-dir", folder / "train", "--out", tmp_path / "other.beton", "--quality", 60)

    def masking_noise(shape, generator=None, device=None, progress=0.0):
        """Another docstring."""
        return torch.rand(shape, generator=generator, device=device)  # and a comment
    monkeypatch.setattr(models_mae, "masking_noise", masking_noise)
    assert fit(pretrain, folder, begun, "--max-steps", 5) == 0
    s5 = list(schedules.PRETRAIN_SCHEMES["s5"])
    for change, named in (
            ((schedules.PRETRAIN_SCHEMES, "s5", s5[:2] + [s5[2]._replace(mask_ratio=0.8)]),
             "scheme_stages"),
            ((schedules.PRETRAIN_SCHEMES, "s5", [s5[0]._replace(scale=(0.3, 1))] + s5[1:]),
             "scheme_stages.*0.3"),
            ((schedules.PRETRAIN, "betas", (0.9, 0.99)), "betas")):
        with monkeypatch.context() as patch, pytest.raises(WeightsError, match=f"{named}.*none"):
            patch.setitem(*change)
            fit(pretrain, folder, begun)
    for name in ("targets", "masking_noise"):
        with monkeypatch.context() as patch, pytest.raises(WeightsError, match=f"{name}: .*none"):
            patch.setattr(models_mae, name, lambda *args, **kwargs: None)
            patch.setattr(models_mae.MaskedAutoencoderViT, "__init__",
                          functools.partialmethod(models_mae.MaskedAutoencoderViT.__init__,
                                                  target_dim=192))
            fit(pretrain, folder, begun)
    with pytest.raises(WeightsError, match="data_checksum"):
        fit(pretrain, folder, begun, "--data", tmp_path / "other.beton")

    shutil.copytree(folder / "train", tmp_path / "train")
    checksums = []
    for change in ("none", "a name", "a label"):
        path = next((tmp_path / "train/dark").iterdir())
        if change == "a name":
            path.rename(path.with_name("zzz.png"))
        if change == "a label":
            path.rename(tmp_path / "train/light" / path.name)
        checksums.append(open_loader(tmp_path / "train", 8).checksum)
    items = [(0, 40, 30, jpeg_of(draw(np.random.default_rng(i), 40, 30))) for i in range(3)]
    for number, part in enumerate((items, items[::-1])):
        path = write_beton(tmp_path / f"{number}.beton", part)
        checksums.append(open_loader(path, 1).checksum)
    assert len(set(checksums)) == 5


def test_pretrain_refuses_other_constants(folder, begun, monkeypatch):
    """The probe's rate, and the steps of an epoch, which excluded pictures may lower, are compared;
    the message also says what to do where --resume none began the run."""
    monkeypatch.setattr(pretrain, "PROBE_LR", 2e-3)
    with pytest.raises(WeightsError, match="probe_lr: 0.001 there, 0.002 here.*delete"):
        fit(pretrain, folder, begun)
    monkeypatch.undo()
    state = torch.load(begun / "last.pt", weights_only=True)
    state["settings"]["steps_per_epoch"] = 5
    torch.save(state, begun / "last.pt")
    with pytest.raises(WeightsError, match="steps_per_epoch: 5 there, 4 here"):
        fit(pretrain, folder, begun)


def test_pretrain_old_checkpoints_resume(folder, begun, unbroken):
    """One that an older version wrote, without what is compared now, goes on."""
    state = torch.load(begun / "last.pt", weights_only=True)
    for key in ("data_checksum", "scheme_stages", "betas", "targets", "masking_noise", "mean",
                "std", "target_dim"):
        del state["settings"][key]
    for key in ("sources", "model_class"):
        state.pop(key)
    for key in ("mean", "std", "target_dim"):
        state["model"].pop(key)
    torch.save(state, begun / "last.pt")
    load_mae(begun / "last.pt")
    assert fit(pretrain, folder, begun) == 0
    check_same_end(begun, unbroken)


def test_pretrain_changed_scripts_are_said_and_kept(folder, begun, capsys):
    """A checkpoint of other code is warned of in one line; both versions are kept, by step."""
    state = torch.load(begun / "last.pt", weights_only=True)
    state["sources"]["models_mae.py"] = "0" * 40
    torch.save(state, begun / "last.pt")
    old = begun / "scripts/from_step_0/models_mae.py"
    old.write_text("# older")
    assert fit(pretrain, folder, begun, "--max-steps", 5) == 0
    assert capsys.readouterr().out.count("Warning: models_mae.py changed since") == 1
    assert old.read_text() == "# older"
    new = begun / "scripts/from_step_4/models_mae.py"
    assert new.read_bytes() == (HERE / "models_mae.py").read_bytes()


@pytest.mark.parametrize("script", [pretrain, finetune, linprobe])
def test_runs_resume_none_puts_the_old_run_aside(folder, mae, tmp_path, script):
    """All files of the earlier run are in old_1/, then old_2/, and others stay; the same command
    goes on with the run that it began, with the bits of an unbroken one."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert fit(script, folder, whole) == 0
    assert fit(script, folder, out, "--epochs", 1) == 0
    (out / "notes.txt").write_text("mine")
    before = {path.name for path in out.iterdir()} - {".lock", "notes.txt"}
    new = flags(script, folder, out, "--resume", "none")
    train_to_signal(5, script, *new)
    assert {path.name for path in (out / "old_1").iterdir()} == before
    train_to_signal(1, script, *new)
    assert train(script, *new) == 0
    assert not (out / "old_2").exists()
    check_same_end(out, whole)
    assert set(log_of(out)) >= set(log_of(whole))
    assert len((out / "log.jsonl").read_text().splitlines()) < 6  # none of the earlier run's
    train_to_signal(5, script, *new)  # it was finished: begun anew
    assert {path.name for path in (out / "old_2").iterdir()} >= {"last.pt", "log.jsonl"}
    assert (out / "notes.txt").exists()


def test_pretrain_resume_path_counts_once(folder, unbroken, tmp_path):
    """The run begins from the file, and the same command goes on from the run's own last.pt."""
    words = flags(pretrain, folder, tmp_path, "--resume", unbroken / "stage1.pt")
    train_to_signal(5, pretrain, *words)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 10
    train_to_signal(1, pretrain, *words)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 12
    assert train(pretrain, *words) == 0
    check_same_end(tmp_path, unbroken)
    back = flags(pretrain, folder, tmp_path, "--resume", tmp_path / "stage2.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "lr_at", lambda *args: 1 / 0)  # killed before it saved anything
        with pytest.raises(ZeroDivisionError):
            train(pretrain, *back)
    assert torch.load(tmp_path / "old_1/last.pt", weights_only=True)["step"] == 16
    train_to_signal(1, pretrain, *back)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 10
    assert list(log_of(tmp_path)) == [10]
    # Its own last.pt by name is what auto takes
    words = flags(pretrain, folder, tmp_path, "--resume", tmp_path / "last.pt")
    assert train(pretrain, *words) == 0
    assert not (tmp_path / "old_2").exists()
    check_same_end(tmp_path, unbroken)


def test_pretrain_extends_a_run_when_asked(folder, tmp_path, capsys):
    """More epochs and another rate are refused with the remedy, and taken with --extend: weights
    and moments are kept, the rate is that of the new schedule; killed, the bits are the same."""
    for name in ("whole", "cut"):
        assert fit(pretrain, folder, tmp_path / name, "--epochs", 2) == 0
    longer = ("--epochs", 4, "--blr", 2e-3)
    with pytest.raises(WeightsError, match="epochs: 2 there, 4 here.*--extend"):
        fit(pretrain, folder, tmp_path / "whole", *longer)
    with pytest.raises(WeightsError, match="seed: 0 there, 1 here") as raised:
        fit(pretrain, folder, tmp_path / "whole", *longer, "--extend", "--seed", 1)
    assert "--extend" not in str(raised.value)
    assert fit(pretrain, folder, tmp_path / "whole", *longer, "--extend") == 0
    assert "epochs 2 -> 4, warmup_epochs 0.5 -> 1" in capsys.readouterr().out
    for step, line in log_of(tmp_path / "whole").items():
        peak, epochs, warm_up = (4e-3, 2, 2) if step <= 8 else (2e-3, 4, 4)
        rate = schedules.lr_at(step - 1, 4 * epochs, warm_up, peak * 16 / 256)
        assert line["lr"] == pytest.approx(rate)
    train_to_signal(3, pretrain, *flags(pretrain, folder, tmp_path / "cut", *longer, "--extend"))
    assert fit(pretrain, folder, tmp_path / "cut", *longer) == 0  # its own settings by now
    check_same_end(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(WeightsError, match="16 steps.*--epochs 4 or more"):
        fit(pretrain, folder, tmp_path / "cut", "--epochs", 3, "--extend")


def test_pretrain_says_which_stages_get_no_epoch(folder, tmp_path, capsys):
    """Those with a share alone; so does finetuning."""
    assert fit(pretrain, folder, tmp_path, "--epochs", 2, "--max-steps", 1) == 0
    said = capsys.readouterr().out
    assert re.findall("Stage ([0-9]) gets no epoch.*--epochs 2", said) == ["1"]
    s5 = schedules.PRETRAIN_SCHEMES["s5"]
    assert schedules.unused_stages(1, s5) == [1, 2]
    assert schedules.unused_stages(800, s5) == []
    only_second = [stage._replace(share=share) for stage, share in zip(s5, (0, 1.0, 0))]
    assert schedules.unused_stages(1, only_second) == []


def test_pretrain_own_mean_and_deviation_stay_with_the_weights(folder, tmp_path, monkeypatch):
    """--mean and --std reach the model, load_mae, finetuning, its evaluation, the linear probe and
    the exports; other pictures' weights are refused by --init; 0 to 255 is refused."""
    mean, std = [0.5, 0.25, 0.125], [0.5, 0.5, 0.25]
    words = ("--mean", *mean, "--std", *std)
    with pytest.raises(WeightsError, match="divided by 255"):
        fit(pretrain, folder, tmp_path / "x", "--mean", 123, 117, 104)
    out = tmp_path / "run"
    assert fit(pretrain, folder, out, *words, "--epochs", 1) == 0
    model = load_mae(out / "last.pt")
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert model.normalize(image)[0, :, 0, 0].tolist() == [1.0, 1.5, 3.5]
    with pytest.raises(WeightsError, match="give these numbers to --mean"):
        fit(pretrain, folder, tmp_path / "x", "--init", out / "last.pt")
    assert fit(pretrain, folder, tmp_path / "x", "--init", out / "last.pt", *words,
               "--max-steps", 1) == 0
    seen = []
    normalize = ViT.normalize
    monkeypatch.setattr(ViT, "normalize", lambda self, imgs: (
        seen.append((self.mean.flatten().tolist(), self.std.flatten().tolist())),
        normalize(self, imgs))[1])
    tuned = flags(finetune, folder, tmp_path / "ft", "--finetune", out / "last.pt", "--epochs", 1)
    assert train(finetune, *tuned) == 0
    assert train(finetune, "--eval", "--resume", tmp_path / "ft/best.pt", "--val-data",
                 folder / "val.beton", "--output-dir", tmp_path / "ft") == 0
    assert fit(linprobe, folder, tmp_path / "lp", "--checkpoint",
               out / "last.pt", "--epochs", 1) == 0
    assert len(seen) > 10 and all(pair == (mean, std) for pair in seen)
    models_mae.export_hf(out / "last.pt", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (config["image_mean"], config["image_std"]) == (mean, std)
    assert f"{mean}" in models_mae.export_timm(out / "last.pt", tmp_path / "timm.pt", 0)


def test_models_another_class_is_refused_by_name(mae, tmp_path):
    """load_mae takes a checkpoint by the class that made it alone, and a class measures itself."""
    class Other(models_mae.MaskedAutoencoderViT):
        def flops_per_image(self, *args, **changed):
            return 7
    state = {"modules": prefixed(mae.state_dict(), "model."), "model": mae.settings,
             "model_class": "Other"}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="x.pt is of the class Other.*load_mae"):
        load_mae(tmp_path / "x.pt")
    model = load_mae(tmp_path / "x.pt", Other)
    assert isinstance(model, Other) and model.flops_per_image(32, 0.75) == 7
    torch.save(state | {"model_class": "MaskedAutoencoderViT"}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="class MaskedAutoencoderViT"):
        load_mae(tmp_path / "x.pt", Other)


@pytest.mark.parametrize("name, own", [
    ("simmim", "SimMIM"), ("mae_ema_teacher", "MAEWithTeacher"),
    ("two_views", "MaskedAutoencoderViT")])
def test_extras_train_by_import(folder, tmp_path, name, own):
    """Each trains; its script is in the run's folder; its class alone loads it; finetuning takes
    its encoder. The one with a teacher stops and goes on with the unbroken bits."""
    path = HERE / f"extras/{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    done = run(path, *flags(pretrain, folder, tmp_path / "whole", "--epochs", 3))
    assert "done: 3 epochs" in done.stdout
    if name == "mae_ema_teacher":
        words = flags(pretrain, folder, tmp_path / "cut", "--epochs", 3)
        run(path, *words, "--max-steps", 6)
        assert "from step 6 of 12" in run(path, *words).stdout
        check_same_end(tmp_path / "cut", tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert log[12]["loss"] < log[4]["loss"]
    assert (tmp_path / "whole/scripts/from_step_0" / path.name).read_bytes() == path.read_bytes()
    has_pictures = name != "mae_ema_teacher"
    assert len(list((tmp_path / "whole").glob("*.png"))) == (2 if has_pictures else 0)
    last = tmp_path / "whole/last.pt"
    model_class = runpy.run_path(path).get(own, models_mae.MaskedAutoencoderViT)
    if model_class is not models_mae.MaskedAutoencoderViT:
        with pytest.raises(WeightsError, match=f"class {own}"):
            load_mae(last)
    model = load_mae(last, model_class)
    assert model.predicts_pixels == has_pictures  # as the checkpoint tells
    assert model.features(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert fit(finetune, folder, tmp_path / "ft", "--finetune", last, "--epochs", 1) == 0


def test_extras_spectra_are_numpys(folder, mae, tmp_path, capsys):
    """Stable rank and top share are those of numpy's singular values; dead units are counted."""
    spectra = runpy.run_path(HERE / "extras/spectra.py")
    state = torch.load(folder / "mae.pt", weights_only=True)
    state["modules"]["model.blocks.0.mlp.fc1.bias"][:128] = -100  # of 2 x 512 units
    torch.save(state, tmp_path / "x.pt")
    spectra["main"]([str(tmp_path / "x.pt"), "--data", str(folder / "val.beton"), "--plot",
                     str(tmp_path / "ranks.png")])
    assert Image.open(tmp_path / "ranks.png").width > 800
    row = json.loads(capsys.readouterr().out)
    expected = []
    for block in mae.blocks:
        values = np.linalg.svd(block.mlp.fc2.weight.detach().numpy(), compute_uv=False)
        expected.append(((values ** 2).sum() / values[0] ** 2, values[0] / values.sum()))
    assert row["encoder fc2"] == pytest.approx(np.mean(expected, axis=0), abs=0.01)
    assert row["encoder dead"] == 128 / 1024 and row["decoder dead"] == 0


def test_extras_measure_themselves(monkeypatch):
    """SimMIM's and the EMA teacher's FLOPs are those that torch counts."""
    simmim = runpy.run_path(HERE / "extras/simmim.py")["SimMIM"]
    ema = runpy.run_path(HERE / "extras/mae_ema_teacher.py")
    with torch.device("meta"):
        tiny = models_mae.mae_vit_tiny_patch16.keywords
        modules = [pretrain.ModelWithProbe(simmim(**tiny), 2, "off", 1.0)]
        model = ema["MAEWithTeacher"](**tiny, target_dim=192)
        modules.append(ema["WithTeacher"](model, 2, "off", 1.0))
    for module in modules:
        if hasattr(module, "teacher"):
            monkeypatch.setattr(models_mae, "targets", lambda model, imgs, _: model.teach(imgs))
        imgs = torch.zeros(2, 3, 160, 160, dtype=torch.uint8, device="meta")
        noise = torch.zeros(2, 100, device="meta")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            labels = torch.zeros(2, dtype=torch.int64, device="meta")
            module(imgs, labels, 0.75, noise)["loss"].backward()
        assert counter.get_total_flops() == 2 * module.model.flops_per_image(160, 0.75)


def test_pretrain_stages_have_fields(folder, tmp_path, monkeypatch):
    """Five stages with their own crops and decoder depths: each trains the blocks that it uses, on
    its crops; killed, the bits are the same; too deep a decoder is refused."""
    scales = []
    set_stage = ESSLLoader.set_stage

    def spy(self, res=None, scale=None):
        scales.extend([scale] if scale else [])
        set_stage(self, res, scale)
    five = [schedules.Stage(224, 0.75, 0.2, scale=(0.5, 1.0), decoder_depth=1),
            schedules.Stage(192, 0.75, 0.2, decoder_depth=1), schedules.Stage(160, 0.5, 0.2),
            schedules.Stage(224, 0.75, 0.2, scale=(0.08, 1)), schedules.Stage(192, 0.5, 0.2)]
    monkeypatch.setitem(schedules.PRETRAIN_SCHEMES, "five", five)
    words = ("--scheme", "five", "--epochs", 5)
    with monkeypatch.context() as patch:
        patch.setattr(ESSLLoader, "set_stage", spy)
        assert fit(pretrain, folder, tmp_path / "whole", *words) == 0
    assert scales[-5:] == [(0.5, 1.0), (0.2, 1.0), (0.2, 1.0), (0.08, 1), (0.2, 1.0)]
    start = torch.load(tmp_path / "whole/stage1.pt", weights_only=True)["modules"]
    middle = torch.load(tmp_path / "whole/stage2.pt", weights_only=True)["modules"]
    end = torch.load(tmp_path / "whole/last.pt", weights_only=True)["modules"]
    for block, same in ((0, False), (1, True)):
        name = f"model.decoder_blocks.{block}.mlp.fc1.weight"
        assert torch.equal(start[name], middle[name]) == same
        assert not torch.equal(start[name], end[name])
    cut = flags(pretrain, folder, tmp_path / "cut", *words)
    for call in (5, 1):
        train_to_signal(call, pretrain, *cut)
    assert train(pretrain, *cut) == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(WeightsError, match="--optimizer adamw"):
        fit(pretrain, folder, tmp_path / "x", *words, "--optimizer", "muon")
    five[0] = five[0]._replace(decoder_depth=3)
    with pytest.raises(WeightsError, match="--decoder-depth 3"):
        fit(pretrain, folder, tmp_path / "x", *words)


def test_pretrain_same_update_however_it_is_cut(folder, tmp_path):
    """64 masked pictures of --repeat 2 at once, 4 x 16, or two ranks of 2 x 16: the gradient within
    1e-6, as Adam's first moment after one step shows it, which is 0.1 gradient."""
    gradients = []
    for batch_size, ranks in ((64, 1), (16, 1), (16, 2)):
        out = tmp_path / f"{batch_size}-{ranks}"
        words = ("--probe", "off", "--max-steps", 1, "--repeat", 2, "--total-batch", 64,
                 "--batch-size", batch_size, "--warmup-epochs", 0)
        assert fit(pretrain, folder, out, *words, ranks=ranks) == 0
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


class CountOps(TorchDispatchMode):
    """Counts the operations that reach a device, by name, and the numbers that are asked of it."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.split(".")[0]
        self.counts[name] += 1
        if name == "_local_scalar_dense" and args[0].shape == ():  # (1,): the flag of signals
            self.counts["asked"] += 1
        return op(*args, **(kwargs or {}))


def muon_groups(model, matrix_flags, other_flags):
    """The groups of pretrain.py's optimizer: the blocks' matrices, then the rest for AdamW."""
    groups = timm.optim.param_groups_weight_decay(model, 0.05)
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not m for m in matrices)]
        group |= other_flags
    return [{"params": matrices, "weight_decay": 0.05, **matrix_flags}, *groups]


def make_muons(model):
    """Ours and timm's, each with its own copy of a model."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-7}
    groups = muon_groups(ours, {"momentum": 0.95}, {})
    reference = muon_groups(theirs, {"nesterov": True}, {"use_fallback": True})
    return {ours: pretrain.Muon(groups, fused=True, **options),
            theirs: timm.optim.Muon(reference, **options)}


def draw_gradients(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrain_muon_equals_timms(monkeypatch, dtype):
    """Six steps with weight decay and a changing rate equal timm's to rounding; GradScaler skips
    two, for a bias and for a matrix, after which gradients are scaled by another number."""
    rounded = functools.partial(muon.zeropower_via_newtonschulz, dtype=dtype)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", rounded)
    monkeypatch.setattr(pretrain, "cpu_has_bfloat16", lambda: dtype is torch.bfloat16)
    torch.manual_seed(0)
    muons = make_muons(models_mae.mae_vit_nano_patch8(img_size=32, depth=2))
    for model, optimizer in muons.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2 ** 30)
        for step in range(6):
            draw_gradients(model, step)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad *= scaler.scale(torch.ones(()))
            if step == 2:
                model.norm.bias.grad[3] = math.nan
            if step == 4:
                model.blocks[1].attn.qkv.weight.grad[5, 7] = math.inf
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 0.25
    for (name, ours), (_, theirs) in zip(*(model.named_parameters() for model in muons)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)


def test_pretrain_muon_launches_do_not_grow_with_depth():
    """Twelve blocks take as many operations as two, a sixth of timm's or less, and none of them
    waits for a number."""
    counts = {}
    for depth in (2, 12):
        model = models_mae.mae_vit_nano_patch8(img_size=32, depth=depth)
        for copied, optimizer in make_muons(model).items():
            for seed in range(2):  # the first step makes the state
                draw_gradients(copied, seed)
                with CountOps() as counter:
                    optimizer.step()
            counts[type(optimizer), depth] = counter.counts
    ours = counts[pretrain.Muon, 12]
    assert ours == counts[pretrain.Muon, 2] and "_local_scalar_dense" not in ours
    assert 6 * ours.total() < counts[timm.optim.Muon, 12].total()


def test_pretrain_refuses_a_checkpoint_of_timms_muon(folder, tmp_path):
    """A run that older code began is named, with the remedy."""
    words = ("--optimizer", "muon", "--probe", "off")
    assert fit(pretrain, folder, tmp_path, *words, "--max-steps", 1) == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    _, (_, optimizer) = make_muons(model).items()
    state["optimizer"] = optimizer.state_dict()
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(WeightsError, match="last.pt, optimizer: .*timm's.*--resume none"):
        fit(pretrain, folder, tmp_path, *words)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pretrain_a_step_waits_for_no_number(folder, tmp_path, optimizer):
    """Twice as many steps between the same log lines ask the device for no number more. (The flag
    of signals is on the CPU always.)"""
    asked = []
    for total_batch in (16, 8):
        with CountOps() as counter:
            out = tmp_path / f"{total_batch}"
            assert fit(pretrain, folder, out, "--optimizer", optimizer, "--epochs", 2,
                       "--total-batch", total_batch, "--viz-every", 99) == 0
        asked.append(counter.counts["asked"])
    assert asked[0] == asked[1] > 0


def test_pretrain_skips_a_step_that_is_not_finite(folder, tmp_path):
    """A NaN gradient at one step changes nothing: the bits of a run that leaves that step out."""
    forward, step = pretrain.ModelWithProbe.forward, torch.optim.AdamW.step
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.ModelWithProbe, "forward", lambda self, *args: {
            name: loss * (math.nan if next(calls) == 20 else 1)
            for name, loss in forward(self, *args).items()})
        assert fit(pretrain, folder, tmp_path / "nan") == 0
    assert [line["skipped_steps"] for line in log_of(tmp_path / "nan").values()] == [0, 1, 1, 1]
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: (
            step(*args, **kwargs) if next(calls) != 5 else None))
        assert fit(pretrain, folder, tmp_path / "left_out") == 0
    check_same_end(tmp_path / "nan", tmp_path / "left_out")


def test_pretrain_ends_where_the_loss_stays_not_finite(folder, tmp_path):
    """An absurd rate ends with the advice; no checkpoint holds weights that are not finite."""
    with pytest.raises(DataError, match="finite.*--blr"):
        fit(pretrain, folder, tmp_path, "--blr", "1e30", "--epochs", 8, "--save-minutes", 0)
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
    assert fit(pretrain, folder, tmp_path) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"\.pt cannot be written: .*Make room", capsys.readouterr().err)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp*"))
    assert fit(pretrain, folder, tmp_path) == 0
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
                scalars = step(images, labels, 0.75, noise)
            pretrain.total_loss(scalars).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[how].append(scalars["loss"].item())
    expected = losses["eager"]
    assert expected[-1] < 0.9 * expected[0]
    assert losses["compiled"] == pytest.approx(expected, rel=1e-3)
    assert losses["bf16"] == pytest.approx(expected, rel=2e-2)


DDP = """
import json, torch, models_mae, pretrain
from torch._dynamo.backends.debugging import aot_eager
rank, world, *_ = pretrain.setup(0, training=False)
model = models_mae.mae_vit_nano_patch8(img_size=32, depth=1, decoder_depth=1)
module = pretrain.ModelWithProbe(model, 4, "masked", 1)
ddp_model = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
graphs = []

def count(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs)

compute_loss = torch.compile(ddp_model, dynamic=False, backend=count)
rng = torch.Generator().manual_seed(rank)  # other pictures on each rank
counts, agree = [], []
for res in (32, 24, 32):
    for micro in range(2):
        images = torch.randint(256, (4, 3, res, res), dtype=torch.uint8, generator=rng)
        noise = torch.rand(4, (res // 8) ** 2, generator=rng)
        ddp_model.require_backward_grad_sync = micro == 1
        pretrain.total_loss(compute_loss(images, torch.arange(4), 0.75, noise)).backward()
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        every = [torch.empty_like(grads) for _ in range(world)]
        torch.distributed.all_gather(every, grads)
        agree.append(torch.equal(*every))
    ddp_model.zero_grad()
    counts.append(len(graphs))
if rank == 0:
    print(json.dumps([counts, agree]))
torch.distributed.barrier()
"""


def test_pretrain_ddp_compiles_once_for_a_shape(tmp_path):
    """Over s5's stages with accumulation: graphs for two shapes, none for the third stage, and the
    ranks' gradients are equal after the last micro-batch alone."""
    (tmp_path / "ddp.py").write_text(DDP)
    done = run(tmp_path / "ddp.py", ranks=2, PYTHONPATH=str(HERE))
    counts, agree = json.loads(done.stdout.splitlines()[-1])
    assert counts == [counts[0], 2 * counts[0], 2 * counts[0]] and counts[0] > 0
    assert agree == [False, True] * 3


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


def test_training_steps_keep_to_one_device(monkeypatch):
    """On a CUDA device that is not there: a tensor left on the CPU would be an error. The step
    before reconstruct() looks at no value, for there are none."""
    vit = ViT(vit_size("vit_nano_patch8"), 32, 5)
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
        loss = module(images, labels, 0.75, noise)["loss"]
        monkeypatch.setattr(models_mae, "warn_of_range", lambda imgs: None)
        for out in (loss, model.reconstruct(images), scores,
                    linprobe.knn_score(scores, scores, labels, 5), finetune.luma(images)):
            assert out.device.type == "cuda"


def test_pretrain_an_unknown_setting_counts_as_its_default(folder, unbroken, tmp_path):
    """A checkpoint from before a flag existed goes on under the flag's default."""
    state = torch.load(unbroken / "last.pt", weights_only=True)
    del state["settings"]["repeat"]
    torch.save(state, tmp_path / "old.pt")
    assert fit(pretrain, folder, tmp_path, "--resume", tmp_path / "old.pt") == 0


def test_pretrain_a_flat_folder_has_no_probe(folder, tmp_path, capsys):
    """Pictures without classes are trained on, and it is said that there is no probe."""
    assert fit(pretrain, folder, tmp_path, "--data", folder / "train/dark", "--epochs", 1) == 0
    assert "dark has no labels: there is no online probe" in capsys.readouterr().out
    assert all("probe_top1" not in line for line in log_of(tmp_path).values())


def test_pretrain_init_starts_from_weights(folder, unbroken, tmp_path):
    """At a rate of almost 0 a run from trained weights, at another size too, has a lower loss than
    one from random weights; the paper's probe, --probe full, is measured."""
    words = ["--probe", "full", "--epochs", 1, "--blr", 1e-9]
    assert fit(pretrain, folder, tmp_path / "random", *words) == 0
    words += ["--init", unbroken / "last.pt", "--input-size", 48]
    assert fit(pretrain, folder, tmp_path / "init", *words) == 0
    random, trained = (log_of(tmp_path / name)[4] for name in ("random", "init"))
    assert trained["loss"] < random["loss"] and "probe_top1" in trained


def test_pretrain_a_scheme_of_four_stages(folder, tmp_path, monkeypatch):
    """A row of PRETRAIN_SCHEMES is all that another scheme needs; nothing masked is a mask, too."""
    four = [schedules.Stage(res, mask_ratio, 0.25)
            for res, mask_ratio in ((224, 0.75), (192, 0.5), (160, 0.0), (224, 0.9))]
    monkeypatch.setitem(schedules.PRETRAIN_SCHEMES, "four", four)
    assert fit(pretrain, folder, tmp_path, "--scheme", "four") == 0
    log = log_of(tmp_path).values()
    assert all(math.isfinite(line["loss"]) for line in log)
    assert [(line["stage"], line["mask_ratio"]) for line in log] == [
        (1, 0.75), (2, 0.5), (3, 0.0), (4, 0.9)]


def test_pretrain_benchmark_reports_each_stage(folder, tmp_path, capsys):
    """Rows that follow from one another, without and with the loader; few pictures are repeated."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert fit(pretrain, folder, tmp_path, "--benchmark", 1, "--batch-size", 80, "--repeat", 2) == 0
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(pretrain, "connect", lambda *args: torch.distributed.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args: made.append(args))
    pretrain.setup(0, training=False)
    backends = torch.distributed.distributed_c10d.BackendConfig(made[0][0]).device_backend_map
    assert backends == {"cpu": "gloo", "cuda": "nccl"}


MEET = """
import os, signal, sys
from pathlib import Path
from unittest.mock import MagicMock
for name in ("models_mae", "essl_loader", "schedules", "timm.optim", "torch.utils.tensorboard"):
    sys.modules[name] = MagicMock()  # slow to import, and not needed to meet
import linprobe
import torch.distributed as dist

died = Path("died")
if "dies" in sys.argv and os.environ["RANK"] == "1" and not died.exists():
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)
rank, world, *_ = linprobe.setup(0, training=False)
ranks = [None] * world
dist.all_gather_object(ranks, rank)
dist.barrier()
print("met" + "".join(map(str, ranks)) + "\\n", end="", flush=True)  # one write for each rank
dist.destroy_process_group()  # else gloo's threads may abort the process at its end
"""


@pytest.mark.parametrize("how", ["agents of two machines", soak("a fixed port"),
                                 "no shared store", "by hand"])
def test_pretrain_ranks_meet_however_they_are_launched(tmp_path, how):
    """A rank that dies before it meets the others is started again, by its own machine's agent
    alone or by the one agent. Without an agent's store rank 0 serves one."""
    (tmp_path / "meet.py").write_text(MEET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    commands = {
        "agents of two machines": 2 * [[*torchrun, "--nnodes", "2", *rendezvous]],
        "a fixed port": [[*torchrun, "--nproc_per_node", "2", "--master-port", f"{port}"]],
        "no shared store": [[*torchrun, "--standalone", "--nproc_per_node", "2"]],
        "by hand": 2 * [[sys.executable]]}[how]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    if how == "no shared store":
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    started = []
    for number, command in enumerate(commands):
        if how == "by hand":
            env |= {"RANK": f"{1 - number}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": f"{port}"}  # the rank that waits comes first
        words = ["meet.py"] if how == "by hand" else ["meet.py", "dies"]
        started.append(subprocess.Popen([*command, *words], env=env, cwd=tmp_path, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.terminate()
    assert [process.returncode for process in started] == [0] * len(started), outputs
    assert "".join(outputs).count("met01") == 2
    assert (tmp_path / "died").exists() == (how != "by hand")


STRAY = """
import os, sys, pretrain
words = sys.argv[1:]
if os.environ["RANK"] == "1":
    words += ["--output-dir", "stray"]
pretrain.main(pretrain.get_args(words))
"""


def test_pretrain_ranks_that_disagree_end_in_words(folder, unbroken, tmp_path):
    """Only rank 0 sees last.pt: both end, and the steps are named with their ranks, once."""
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "stray.py").write_text(STRAY)
    words = flags(pretrain, folder, tmp_path / "run", "--epochs", 4)
    env = {"PYTHONPATH": str(HERE)}
    done = run(tmp_path / "stray.py", *words, ranks=2, code=1, cwd=tmp_path, **env)
    assert done.stderr.count("step: 16 on rank 0, 0 on rank 1") == 1
    assert "--output-dir" in done.stderr


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
    built("--data-dir", folder / "val", "--out", tmp_path / "1.beton", "--limit", 1)
    for words, expected in (
            (["--data", "data/train_500_95.beton"], "--demo"), (["--data", cut], "cut.beton"),
            (["--data", bad], "bad.beton: sample 5"), (["--output-dir", cut / "run"], "cut.beton"),
            (["--input-size", 60], "60 pixels"), (["--stages", .5, .5, .5], "sum to 1"),
            (["--mask-ratio", 1.0], "mask ratio 1.0"), (["--mask-ratio", -0.1], "mask ratio -0.1"),
            (["--stages", .5, .5], "as many"),
            (["--batch-size", 1], "This works"),
            (["--val-data", tmp_path / "1.beton"], "--probe off"),
            (["--val-data", folder / "val/dark"], "--labels"),
            (["--output-dir", tmp_path], "--resume none")):
        words = flags(pretrain, folder, tmp_path / "x", *words)
        with pytest.raises((ValueError, OSError, SystemExit)) as raised:
            pretrain.main(pretrain.get_args(list(map(str, words))))
        assert expected in f"{raised.value} {capsys.readouterr().err}"
    words = flags(pretrain, folder, tmp_path / "y", "--total-batch", 200)
    done = run("pretrain.py", *words, ranks=2, code=1)
    assert (done.stdout + done.stderr).count("This works: --total-batch 64") == 1
    with pytest.raises(SystemExit, match="This works: --total-batch 992 --batch-size 124"):
        schedules.check_batches(1000, 4096, 128, 8, multiple=2)  # pairs for mixup


def test_pretrain_counts_no_excluded_pictures(folder, tmp_path, capsys):
    """A step of all 64 pictures, of which one is excluded, is refused with flags that work."""
    bad = spoil(folder / "train.beton", tmp_path / "bad.beton", 5)
    built("--verify", bad, "--exclude-bad")
    words = flags(pretrain, folder, tmp_path / "x", "--data", bad, "--epochs", 1)
    assert train(pretrain, *words, "--total-batch", 64, "--batch-size", 64) == 1
    proposed = re.findall(r"--\S+ \d+", capsys.readouterr().err.split("This works: ")[1])
    assert train(pretrain, *words, *" ".join(proposed).split()) == 0


def test_scripts_propose_batches_that_work():
    """Whatever check_batches proposes, it takes, for few pictures and many processes too."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        low, high = (1, 0, 0, 1, 1, 1), (40, 50, 20, 9, 5, 4)
        n, total, batch, world, multiple, least = rng.integers(low, high).tolist()
        try:
            schedules.check_batches(n, total, batch, world, multiple, least)
        except SystemExit as error:
            message = str(error)
            if "too few" in message:
                assert not any(size % multiple == 0 for size in range(least, n + 1))
                continue
            found = re.search("This works: (?:.*nproc_per_node ([0-9]+), with )?"
                              "--total-batch ([0-9]+) --batch-size ([0-9]+)$", message)
            fewer, total, batch = (found[i] and int(found[i]) for i in (1, 2, 3))
            assert fewer is None or fewer < world
            schedules.check_batches(n, total, batch, fewer or world, multiple, least)
            assert batch >= least


@pytest.mark.parametrize("script", [pretrain, linprobe])
def test_scripts_propose_batches_that_a_batchnorm_takes(folder, mae, tmp_path, script, capsys):
    """A batch of one picture has no variance: two are proposed, and they train."""
    words = flags(script, folder, tmp_path, "--epochs", 1)
    assert train(script, *words, "--total-batch", 3, "--batch-size", 1) == 1
    assert "This works: --total-batch 2 --batch-size 2" in capsys.readouterr().err
    assert train(script, *words, "--total-batch", 2, "--batch-size", 2) == 0


# --- finetune
def test_finetune_defaults_are_table_1():
    """The paper's finetuning column, the lowest rate and the head's initial weights."""
    args = finetune.get_args(["--finetune", "none"])
    assert (args.total_batch, args.epochs, args.warmup_epochs, args.blr, args.weight_decay,
            args.layer_decay, args.scheme) == (1024, 100, 5, 5e-4, 0.05, 0.65, "s1")
    head = ViT(vit_size("vit_nano_patch8"), 32, 10).head
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


@pytest.fixture(scope="module")
def finetuned(folder, mae, tmp_path_factory):
    """An epoch of finetuning, with layer decay and weight decay of its own."""
    out = tmp_path_factory.mktemp("runs") / "finetuned"
    assert fit(finetune, folder, out, "--epochs", 1, "--mixup", 0, "--cutmix", 0,
               "--layer-decay", 0.5, "--weight-decay", 0.2) == 0
    return out


def test_finetune_best_is_no_checkpoint_to_resume_from(folder, finetuned, tmp_path):
    """best.pt holds the weights without optimizer, scaler and loader, and --resume says so."""
    best = set(torch.load(finetuned / "best.pt", weights_only=True))
    last = set(torch.load(finetuned / "last.pt", weights_only=True))
    assert "modules" in best and last - best == {"optimizer", "scaler", "loader"}
    with pytest.raises(WeightsError, match="best.pt .*optimizer.*--resume none"):
        fit(finetune, folder, tmp_path, "--resume", finetuned / "best.pt")


def test_finetune_rates_decay_by_layer(finetuned):
    """The groups of the embedding (its weight decays), of the two blocks, and of norm and head."""
    groups = torch.load(finetuned / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    found = sorted((group["lr_scale"], group["weight_decay"], len(group["params"]))
                   for group in groups)
    assert found == [(0.125, 0, 3), (0.125, 0.2, 1), (0.25, 0, 8), (0.25, 0.2, 4), (0.5, 0, 8),
                     (0.5, 0.2, 4), (1, 0, 3), (1, 0.2, 1)]


def test_finetune_eval_counts_each_picture_once(folder, finetuned, tmp_path):
    """13 pictures on two processes and on one give the same row for each set."""
    words = ["--eval", "--resume", finetuned / "best.pt", "--batch-size", 4, "--num-workers", 1]
    words += ["--val-data", folder / "val.beton", folder / "train", "--output-dir"]
    assert train(finetune, *words, tmp_path / "1") == 0
    run("finetune.py", *words, tmp_path / "2", ranks=2)
    rows = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert rows[0] == rows[1]
    first, second = map(json.loads, rows[0].splitlines())
    assert (first["n"], second["n"]) == (13, 64) and first["data"].endswith("val.beton")


def test_finetune_checkpoints_can_be_probed(folder, finetuned, tmp_path):
    """linprobe.py takes best.pt."""
    assert fit(linprobe, folder, tmp_path, "--checkpoint", finetuned / "best.pt", "--knn") == 0


def test_finetune_benchmark_times_both_augmentations(folder, capsys):
    """--benchmark prints a line for RandAug, and two for 3 Aug."""
    assert train(finetune, "--benchmark", 1, "--data", folder / "train.beton",
                 "--batch-size", 16) == 0
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
    """Labels beyond the head, other class names, one class, no labels, a checkpoint without a head
    or of another script: said in words."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one/dark").symlink_to(folder / "train/dark")
    for words, word in ((["--val-data", beton], "labels 0 to 39"),
                        (["--val-data", tmp_path / "one"], "differ in light"),
                        (["--val-data", folder / "train/dark"], "without a label"),
                        (["--data", folder / "train/dark"], "no labels"),
                        (["--data", tmp_path / "one"], "one class"),
                        (["--resume", unbroken / "last.pt"], "other settings")):
        with pytest.raises(ValueError, match=word):
            fit(finetune, folder, tmp_path, *words)
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
    assert fit(linprobe, folder, tmp_path / "1", "--knn") == 0
    fit(linprobe, folder, tmp_path / "2", "--knn", ranks=2)
    results = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert results[0] == results[1] and json.loads(results[0])["n"] == 13


def test_linprobe_features_lead_back_to_pictures(folder, mae, tmp_path):
    """--features writes each picture's features, label and name, also where there is no label."""
    for name, data, labels in (("a", folder / "val.beton", [0] * 7 + [1] * 6),
                               ("b", folder / "val/dark", [-1] * 7)):
        path = tmp_path / f"{name}.npz"
        words = flags(linprobe, folder, tmp_path / "run", "--data", data, "--features", path,
                      "--pool", "mean")
        assert train(linprobe, *words) == 0
        with pytest.raises(DataError, match=f"{name}.npz exists"):
            train(linprobe, *words)
        arrays = np.load(path)
        assert arrays["pool"] == "mean"
        pictures = [Path(data.parent / data.stem, name) for name in arrays["names"]]
        assert pictures == sorted((folder / "val").glob(f"{'*' if name == 'a' else 'dark'}/*.png"))
        assert arrays["labels"].tolist() == labels and arrays["samples"].tolist() == [
            *range(len(labels))]
        images, _ = next(iter(open_loader(data, 64, train=False, res=32)))
        expected = mae.features(images).detach().numpy()
        np.testing.assert_allclose(arrays["features"], expected, rtol=0.01, atol=0.01)
    assert not list(tmp_path.glob(".*"))


def test_linprobe_compiles_once(folder, mae, tmp_path, monkeypatch):
    """One graph for both sets, though the last batch of each is short; the result is eager's."""
    compile_module = torch.nn.Module.compile
    compiled = []

    def count(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(
        self, backend=count, **options))
    rows = []
    for word in ("--no-compile", "--compile"):
        words = flags(linprobe, folder, tmp_path / word, "--knn", word, "--batch-size", 10)
        assert train(linprobe, *words) == 0
        rows.append((tmp_path / word / "results.jsonl").read_text())
    assert len(compiled) == 1 and rows[0] == rows[1]


def test_linprobe_measures_what_it_is_given(folder, mae, tmp_path, capsys):
    """A finished probe measures another held-out set; other weights under its path are refused."""
    path = shutil.copy(folder / "mae.pt", tmp_path)
    words = flags(linprobe, folder, tmp_path / "run", "--cached", "--checkpoint", path)
    assert train(linprobe, *words) == 0
    assert train(linprobe, *words, "--val-data", folder / "train") == 0
    rows = [json.loads(row) for row in (tmp_path / "run/results.jsonl").open()]
    assert [row["n"] for row in rows] == [13, 64]
    assert train(linprobe, *words, "--batch-size", 1, "--total-batch", 1) == 1
    assert "at least 2" in capsys.readouterr().err
    with pytest.raises(DataError, match="no labels"):
        train(linprobe, *words, "--data", folder / "train/dark")
    state = torch.load(path, weights_only=True)
    state["modules"]["model.norm.weight"] *= 1.01
    torch.save(state, path)
    with pytest.raises(WeightsError, match="weights: .* there"):
        train(linprobe, *words)


# --- bench_loader
@pytest.fixture(scope="module")
def bench_folder(folder, tmp_path_factory):
    """b.json and the plots of a run of bench_loader.py with tiny passes, without scaling."""
    root = tmp_path_factory.mktemp("bench")
    run("bench_loader.py", "--data", folder / "train.beton", "--data_dir", folder / "train",
        "--only", "alternatives", "decomposition", "compression", "pixels",
        "--json", root / "b.json", "--plot", root / "b.png",
        "--img-s", 1000, "--images", 48, "--batch-size", 16, "--passes", 2, "--res", 48)
    return root


def test_bench_measures_each_alternative_or_names_it(bench_folder):
    """Each alternative is a row or is left out by name; rates are of all rounds."""
    data = json.loads((bench_folder / "b.json").read_text())
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
    assert (bench_folder / "b.png").exists()


def test_bench_measures_the_other_sections(bench_folder):
    """Steps, compression, pixels: better quality is larger, and pictures differ little."""
    data = json.loads((bench_folder / "b.json").read_text())
    steps = [row["step"] for row in data["decomposition"] if row["loader"] == "ESSL"]
    assert steps == list(bench_loader.STEPS)
    size = {row["name"]: row["bytes_an_image"] for row in data["compression"]}
    assert size["500_100"] > size["500_95"] > size["500_90"]
    assert all(0 < row["mean_difference"] < 0.05 for row in data["pixels"])
    assert (bench_folder / "b_pixels.png").exists()


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
    base = bench_loader.Row({"name": "base"}, open_counter, {"fails_at": None})
    failing = [bench_loader.Row({"name": f"fails at {place}"}, open_counter, {"fails_at": place},
                                base, "base") for place in ("opening", 0, 1, 3)]
    good = bench_loader.Row({"name": "good"}, open_counter, {"fails_at": None}, base, "base")
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
        loads = [row.arguments["load"] for row in rows]
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


# --- all training scripts
@pytest.mark.parametrize("script, words", [
    (pretrain, ["--repeat", 2, "--optimizer", "muon"]), (finetune, []), (linprobe, []),
    (linprobe, ["--cached"])])
def test_runs_resume_bit_identical(folder, mae, tmp_path, script, words):
    """Stopped in and at the end of an epoch, through all stages: the bits of the unbroken run."""
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


HOLD = """
import sys
from pathlib import Path
import pretrain
pretrain.lock_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_runs_have_their_folder_alone(folder, mae, tmp_path, capsys):
    """A second run in a folder is refused, with the first one's process, and touches nothing; when
    the first one is killed, its half-written checkpoint goes and the next run starts."""
    (tmp_path / "stage1.pt.tmp-1").write_text("of a run that is killed")
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=HERE, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == "held\n"
        (tmp_path / "last.pt.tmp-2").write_text("of the run that holds the folder")
        for script in (pretrain, finetune, linprobe):
            assert fit(script, folder, tmp_path) == 1
            error = capsys.readouterr().err
            assert f"{tmp_path} is in use by process {first.pid} on" in error
            assert "--output-dir" in error
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "last.pt.tmp-2"}
        assert fit(linprobe, folder, tmp_path, "--knn") == 0  # only reads
        first.kill()
    assert fit(linprobe, folder, tmp_path, "--epochs", 1) == 0
    assert (tmp_path / "last.pt").exists() and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("script, needed", [
    (pretrain, []), (finetune, ["--finetune=none"]), (linprobe, ["--checkpoint=none"])])
def test_runs_refuse_shortened_flags(script, needed, capsys):
    """--dem would set --demo without its defaults, in silence."""
    with pytest.raises(SystemExit):
        script.get_args([*needed, "--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


@pytest.mark.parametrize("tasks, nodes, command", [
    (8, 1, "srun --ntasks 1 .* torchrun --nnodes 1 --nproc_per_node 8 "),
    (8, 2, "srun --ntasks 2 .* torchrun --nnodes 2 --nproc_per_node 4 "), (1, 1, None)])
def test_runs_of_slurm_need_ranks(monkeypatch, tasks, nodes, command):
    """Several Slurm tasks without RANK would be runs of their own; torchrun's workers are fine."""
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    monkeypatch.setenv("SLURM_NNODES", str(nodes))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "a b.beton"])
    if command:
        with pytest.raises(SystemExit, match=command + ".*pretrain.py --data 'a b.beton'"):
            pretrain.setup(0, training=False)
        monkeypatch.setenv("RANK", "0")
    assert pretrain.setup(0, training=False)[:2] == (0, 1)


@pytest.mark.parametrize("variables, word", [
    (dict(WORLD_SIZE=2, RANK=0, MASTER_ADDR="127.0.0.1"), "MASTER_PORT not set"),
    (dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), "RANK not set"),
    (dict(RANK=1), "RANK 1"),
    (dict(WORLD_SIZE=2, RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), "rank 0 at 127.0.0.1:1")])
def test_runs_say_what_a_rank_misses(monkeypatch, variables, word):
    """What is set by hand and does not suffice is named; nothing waits for ever."""
    connect = functools.partial(pretrain.connect, minutes=0.01)
    monkeypatch.setattr(pretrain, "connect", connect)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit, match=word):
        pretrain.setup(0, training=False)


def test_runs_wait_for_a_rank_a_limited_time():
    """Rank 0 ends, with the number of ranks that came, where another one never does."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="1 of 2 ranks"):
        for name, value in dict(RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
            patch.setenv(name, str(value))
        pretrain.connect(0, 2, minutes=0.01)


@pytest.mark.parametrize("script, words", [(pretrain, ["--viz-every", 1]), (finetune, [])])
def test_runs_rates_leave_out_what_is_not_training(folder, mae, tmp_path, monkeypatch, script,
                                                   words):
    """By a clock that only these move: a micro-batch takes 1 s, so 16 pictures 2 s; the first of a
    stage 100 s more, as if it compiled; checkpoints, pictures and evaluations take 1000 s."""
    now = [0.0]
    seen = set()

    def moves_clock(seconds, call):
        def timed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)
        return timed

    def batch_moves_clock(call):
        def timed(*args):
            images = next(arg for arg in args if getattr(arg, "ndim", 0) == 4)
            now[0] += 1 if images.shape in seen else 101
            seen.add(images.shape)
            return call(*args)
        return timed
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for name in ("save_checkpoint", "save_reconstructions", "probe_accuracy", "evaluate"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, moves_clock(1000, getattr(script, name)))
    owner, name = ((pretrain.ModelWithProbe, "forward") if script is pretrain else
                   (finetune, "three_augment"))
    monkeypatch.setattr(owner, name, batch_moves_clock(getattr(owner, name)))
    for save_minutes in (10, 0):  # 0: after each step
        out = tmp_path / f"{save_minutes}"
        now[0] = 0.0
        seen.clear()
        words = [*words, "--save-minutes", save_minutes]
        assert fit(script, folder, out, *words) == 0
        assert [line["img_s"] for line in log_of(out).values()] == pytest.approx([8] * 4)


@pytest.mark.parametrize("script", [pretrain, finetune, linprobe])
def test_runs_save_by_the_clock_within_an_epoch(folder, mae, tmp_path, monkeypatch, script):
    """Killed in an epoch, a run goes on from a checkpoint of that epoch to the unbroken end, though
    the machine's time of day is set back again and again."""
    days = itertools.count(1_000_000, -1)
    monkeypatch.setattr(time, "time", lambda: 86400.0 * next(days))
    monkeypatch.setattr(script, "lr_at", schedules.lr_at)
    whole, cut = (flags(script, folder, tmp_path / name, "--epochs", 2, "--save-minutes", 0)
                  for name in ("whole", "cut"))
    assert train(script, *whole) == 0
    calls = itertools.count()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "lr_at", lambda *args: (
            schedules.lr_at(*args) if next(calls) < 6 else signal.default_int_handler(2, None)))
        train(script, *cut)
    assert torch.load(tmp_path / "cut/last.pt", weights_only=True)["step"] in (5, 6)
    assert train(script, *cut) == 0
    check_same_end(tmp_path / "cut", tmp_path / "whole")
    rates = [line["img_s"] for line in log_of(tmp_path / "whole").values() if "img_s" in line]
    assert all(rate > 0 for rate in rates) and (rates or script is linprobe)


# --- all files
@pytest.mark.parametrize("script", [pretrain, finetune, linprobe])
def test_scripts_help_names_each_default_once(script, capsys):
    """A flag whose text tells its default has no second one beside it; None is no default."""
    with pytest.raises(SystemExit):
        script.get_args(["--help"])
    flags = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("\noptions:\n")[2])
    assert "(default: 0)" in next(flag for flag in flags if flag.startswith("--seed"))
    assert not [flag for flag in flags if "default: None" in flag or flag.count("default") > 1]


def test_scripts_share_the_setup_block():
    """One set-up block in three scripts; nothing over 100 columns; no script imports another."""
    blocks = set()
    for name in ("pretrain", "finetune", "linprobe"):
        text = (HERE / f"{name}.py").read_text()
        blocks.add(text.split("# --- setup")[1].split("# --- end setup")[0])
    assert len(blocks) == 1
    scripts = ("build_beton", "pretrain", "finetune", "linprobe", "bench_loader")
    for path in HERE.glob("*.py"):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100, path
        if path.name != "test_all.py":
            assert not re.search(rf"^\s*(import|from) ({'|'.join(scripts)})\b", text, re.M), path


@pytest.mark.parametrize("only, failed", [("card|demo_data|waits|knn|stop", ["knn"]),
                                          soak(".*", [])])
def test_gpu_hour_runs_on_the_cpu(tmp_path, only, failed):
    """With tiny sizes: every step leaves a line, results are rows; a step that fails (kNN without a
    checkpoint) is named and the next ones run."""
    env = {**os.environ, "TINY": "1", "ONLY": only, "OMP_NUM_THREADS": "1",
           "WORK": str(tmp_path / "work"),
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([HERE / "extras/gpu_hour.sh", tmp_path], capture_output=True, text=True,
                          env=env, timeout=600)
    assert done.returncode == bool(failed), done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [name for name, row in summary["steps"].items() if not row["passed"]] == failed
    assert {"card", "demo_data", "waits", "knn", "stop"} <= set(summary["steps"])
    rows = {row["step"]: row for row in summary["rows"]}
    assert rows["card"]["cores"] >= 1 and rows["waits"]["waits_a_step"] == 0
    last_line = done.stdout.splitlines()[-1]
    assert last_line.startswith("failed: knn" if failed else "all passed")


EXTRAS = HERE / "extras"
SCRIPTS = [path.name for path in HERE.glob("*.py") if path.name != "test_all.py"]
DOCUMENTS = ["README.md", "RESULTS.md"]


@pytest.mark.parametrize("archive, words", [
    (b"no archive", ["devkit.tar.gz", "again"]),
    (tar_of([("a/meta.mat", b"")]), ["devkit.tar.gz", "ground_truth.txt"]),
    (tar_of([("a/meta.mat", b"x" * 600), ("a/ILSVRC2012_validation_ground_truth.txt", b"1")]),
     ["devkit.tar.gz", "meta.mat", "again"]),
    (lambda: devkit(b"1\n2\n")[:200], ["devkit.tar.gz", "again"]),
    (lambda: devkit(b"1\n7\n"), ["devkit.tar.gz", "picture 2", "number 7"]),
    (lambda: devkit(b"1\n3\n"), ["devkit.tar.gz", "picture 2", "number 3"]),  # 3 is a group
    (None, ["devkit.tar.gz"]),  # there is no such file
    ("val_labels.txt", ["val_labels.txt", "--out"])])  # it is there already
def test_extras_labels_of_a_bad_devkit(tmp_path, monkeypatch, archive, words):
    """It is named with the remedy, and no file of labels is written or replaced."""
    pytest.importorskip("scipy.io")
    monkeypatch.chdir(tmp_path)
    if archive == "val_labels.txt":
        Path(archive).write_text("mine")
    elif archive is not None:
        Path("devkit.tar.gz").write_bytes(archive() if callable(archive) else archive)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as e:
        run_extra("imagenet_val_labels.py", "devkit.tar.gz")
    assert all(word in str(e.value) for word in words), e.value
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before


def write_run(folder, probes, losses=(3.0, 2.0, 1.0), **settings):
    """A run's folder as pretrain.py leaves it: two epochs of 4 steps of 10 pictures; each costs 2
    TFLOP in the first epoch, 1 TFLOP in the second. Step 4 was logged twice, by a restart."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(dict(total_batch=10) | settings))
    rows = [dict(step=2, epoch=1, tflops=200, img_s=100, loss=losses[0]),
            dict(step=4, epoch=1, tflops=200, img_s=100, loss=99.0, probe_top1=1.0),
            dict(step=4, epoch=1, tflops=200, img_s=100, loss=losses[1], probe_top1=probes[0]),
            dict(step=8, epoch=2, tflops=100, img_s=100, loss=losses[2], probe_top1=probes[1])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text)
    return folder


def test_extras_plot_runs_means_over_seeds(tmp_path, monkeypatch):
    """Mean and deviation of two seeds, the last line of a step, epochs and TFLOP counted by hand;
    a folder alone has no deviation; a shorter run is named and ends the mean."""
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a_0"), [20.0, 30.0], seed=0, output_dir="runs/a_0")
    write_run(Path("runs/a_1"), [20.0, 34.0], losses=(3, 2, 2), seed=1, output_dir="runs/a_1")
    drawn = {}
    for x in ("epoch", "tflop"):
        with monkeypatch.context() as patch:
            plot = Axes.plot
            patch.setattr(Axes, "plot", lambda self, *xy, **more: (
                drawn.setdefault((x, more["label"]), []).append(xy) or plot(self, *xy, **more)))
            out = run_extra("plot_runs.py", "runs/a_[01]", "runs/a_0", "--x", x)
        end = "epoch 2" if x == "epoch" else "tflop 120"  # 4 x 10 x 2 + 4 x 10 x 1
        assert f"runs/a_[01]: 2 run(s), loss 1.500 ± 0.707 at {end}" in out
        assert f"probe_top1 32.000 ± 2.828 at {end}" in out
        assert f"runs/a_0: 1 run(s), loss 1.000 at {end}, probe_top1 30.000 at {end}" in out
        assert out.splitlines()[-1] == "written: runs.png"
        assert Image.open("runs.png").size == (800, 320)
    loss, probe = drawn["epoch", "runs/a_[01]"]
    np.testing.assert_allclose(loss, [[0.5, 1, 2], [3, 2, 1.5]])
    np.testing.assert_allclose(probe, [[1, 2], [20, 32]])
    np.testing.assert_allclose(drawn["tflop", "runs/a_0"][0][0], [40, 80, 120])
    log = Path("runs/a_1/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    out = run_extra("plot_runs.py", "runs/a_[01]", "--out", "x.png")
    assert "runs/a_1 ends at step 4" in out and "probe_top1 20.000 ± 0.000 at epoch 1" in out


@pytest.mark.parametrize("spoil, words, expected", [
    (None, ["runs/none"], ["runs/none", "--output-dir"]),
    (None, ["runs/*"], ["runs/a", "runs/b", "blr"]),  # two recipes
    (None, ["runs/a", "--keys", "accuracy"], ["accuracy", "--keys"]),
    (("log.jsonl", ""), ["runs/a"], ["runs/a/log.jsonl", "empty"]),
    (("log.jsonl", '{"step": 1, "epo'), ["runs/a"], ["runs/a/log.jsonl", "line 1", "Remove"]),
    (("log.jsonl", None), ["runs/[a]"], ["runs/a", "log.jsonl", "pattern"]),
    (("args.json", None), ["runs/a", "--x", "tflop"], ["runs/a/args.json", "--x epoch"]),
    (("log.jsonl", '{"step": 1, "epoch": 1, "loss": 1}'), ["runs/a", "--x", "tflop"],
     ["runs/a/log.jsonl", "tflops", "--x epoch"])])
def test_extras_plot_runs_refuses_in_words(tmp_path, monkeypatch, spoil, words, expected):
    """What cannot be drawn is named with a remedy, and no picture is written."""
    monkeypatch.chdir(tmp_path)
    for name, blr in (("a", 1), ("b", 2)):
        write_run(Path("runs", name), [20.0, 30.0], blr=blr)
    if spoil:
        name, text = spoil
        Path("runs/a", name).unlink()
        if text is not None:
            Path("runs/a", name).write_text(text)
    with pytest.raises(SystemExit) as e:
        run_extra("plot_runs.py", *words)
    assert all(word in str(e.value) for word in expected), e.value
    assert not Path("runs.png").exists()


def test_extras_plot_runs_takes_a_real_log(unbroken, tmp_path):
    """The log that pretrain.py writes has what both axes need."""
    for x in ("epoch", "tflop"):
        out = run_extra("plot_runs.py", unbroken, "--x", x, "--out", tmp_path / "runs.png")
        assert "probe_top1" in out and (x == "tflop" or "at epoch 4" in out)


def test_extras_attention_maps_are_timms(folder, unbroken, tmp_path):
    """The maps are the weights that timm's attention multiplies by when it is not fused; a row of
    the picture is the picture and its heads."""
    mae = load_mae(unbroken / "last.pt")
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    maps = runpy.run_path(EXTRAS / "attention_maps.py")["attention_maps"](mae, images)
    attn = mae.blocks[-1].attn
    attn.fused_attn = False
    weights = []
    attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    mae.tokens(images)
    expected = weights[0][:, :, 0, 1:].reshape(2, attn.num_heads, 4, 6)
    torch.testing.assert_close(maps, expected.detach())
    out = run_extra("attention_maps.py", unbroken / "last.pt", folder / "val.beton", "--out",
                    tmp_path / "x.png", "--pictures", 3)
    assert out == f"written: {tmp_path / 'x.png'}, 3 pictures, {attn.num_heads} heads\n"
    assert Image.open(tmp_path / "x.png").size == (32 * (1 + attn.num_heads), 32 * 3)
    with pytest.raises(SystemExit, match="x.png"):
        run_extra("attention_maps.py", tmp_path / "x.png", folder / "val.beton")


def test_extras_dense_knn_scores_patches(unbroken, monkeypatch):
    """Shapes fill the areas of geometry. Tokens that tell the classes score 100, tokens that tell
    nothing score ground's share and 0, and those of random weights are between."""
    dense = runpy.run_path(EXTRAS / "dense_knn.py")
    masks = torch.stack([dense["draw_scene"](seed, 64)[1] for seed in range(400)])
    areas = [(masks == 1).sum().item(), (masks == 2).sum().item()]
    mean_area = math.pi * (64 ** 2) * (0.155 ** 3 - 0.09 ** 3) / (3 * (0.155 - 0.09))  # of r^2
    assert areas == pytest.approx([600 * mean_area] * 2, rel=0.06)

    def draw_classes(seed, size, draw=dense["draw_scene"]):
        mask = draw(seed, size)[1]
        return 255 * F.one_hot(mask, 3).movedim(2, 0), mask

    class_ious = dense["class_ious"]
    monkeypatch.setitem(class_ious.__globals__, "draw_scene", draw_classes)
    model = SimpleNamespace(settings={"img_size": 64}, patch_size=8)
    model.tokens = lambda images: F.avg_pool2d(images.float(), 8)
    assert class_ious(model, 50).min() > 0.97
    model.tokens = lambda images: torch.ones(len(images), 3, 8, 8)
    shares = F.avg_pool2d(F.one_hot(masks[50:100], 3).movedim(3, 1).float(), 8).numpy()
    ground = (shares.argmax(axis=1) == 0).mean()
    assert class_ious(model, 50).tolist() == pytest.approx([ground, 0, 0])
    torch.manual_seed(0)
    random_mae = models_mae.mae_vit_nano_patch8(img_size=64).eval()
    ground, triangle, disc = class_ious(random_mae, 50).tolist()
    assert 1 > ground > disc > 0.05 and ground > triangle > 0.05
    # At 32 pixels no patch of 8 pixels is mostly of a shape
    assert "ground 100.0, triangle nan, disc nan" in run_extra("dense_knn.py", unbroken / "last.pt")
    with pytest.raises(SystemExit, match="absent.pt"):
        run_extra("dense_knn.py", "absent.pt")


def command_line(tmp_path, name, text):
    """A stand-in for a program: it records its words as a line of JSON in NAME.jsonl."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    record = f"open({str(tmp_path / f'{name}.jsonl')!r}, 'a')"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                    f"print(json.dumps(sys.argv[1:]), file={record})\n{text}\n")
    path.chmod(0o755)


def recorded(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_extras_evidence_gives_scripts_what_they_take(folder, tmp_path):
    """Every command parses; each run has a folder of its own; probes and finetuning get a run that
    was pretrained before. The same command again runs nothing that is finished."""
    command_line(tmp_path, "python", "")
    env = {**os.environ, "RUNS": str(tmp_path / "runs"),
           "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run([EXTRAS / "evidence.sh", folder], env=env, check=True, capture_output=True)
    commands = [words for words in recorded(tmp_path, "python") if words[0] != "-"]
    counts = collections.Counter(words[0] for words in commands)
    assert counts == {"build_beton.py": 2, "pretrain.py": 33, "linprobe.py": 99, "finetune.py": 12}
    outs = set()
    for name, *words in commands:
        if name == "build_beton.py":
            continue
        args = runpy.run_path(HERE / name)["get_args"](words)
        source = getattr(args, "checkpoint", getattr(args, "finetune", None))
        assert source is None or Path(source).name == "last.pt" and str(Path(source).parent) in outs
        assert args.output_dir not in outs
        outs.add(args.output_dir)


@pytest.mark.parametrize("only, results", [("train|val|muon_0(-knn)?", 2), soak(".*", 48)])
def test_extras_evidence_runs(folder, tmp_path, only, results):
    """With TINY=1: it trains, measures, and ends with the table's row for each recipe."""
    env = {**os.environ, "TINY": "1", "ONLY": only, "SEEDS": "0", "OMP_NUM_THREADS": "1",
           "RUNS": str(tmp_path / "runs"),
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([EXTRAS / "evidence.sh", folder], env=env, capture_output=True, text=True,
                          timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"done: {results} results"
    row, = [line for line in lines if line.startswith("muon |")]
    probe = list(log_of(tmp_path / "runs/muon_0").values())[-1]["probe_top1"]
    knn = json.loads((tmp_path / "runs/muon_0-knn/results.jsonl").read_text())["top1"]
    assert f"muon | {probe:.1f} (n=1) |" in row and f"| {knn:.1f} (n=1) |" in row


@pytest.mark.parametrize("user, sudo", [(0, False), (0, True), (1000, True)])
def test_extras_install_ffcv_as_root_and_by_sudo(tmp_path, user, sudo):
    """Root needs no sudo, installed or not; others call the system's packages by it; pip never."""
    command_line(tmp_path, "apt-get", "")
    command_line(tmp_path, "pip", "")
    command_line(tmp_path, "python", "")
    if sudo:
        command_line(tmp_path, "sudo", "os.execvp(sys.argv[1], sys.argv[1:])")
    (tmp_path / "bin/id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "bin/id").chmod(0o755)
    for name in ("sh", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    subprocess.run([tmp_path / "bin/sh", EXTRAS / "install_ffcv.sh"], check=True,
                   env={"PATH": str(tmp_path / "bin")})
    update, install = recorded(tmp_path, "apt-get")
    assert update[0] == "update" and {"install", "-y", "g++", "libopencv-dev"} <= set(install)
    assert recorded(tmp_path, "pip") == [["install", "-q", "ffcv"]]
    assert len(recorded(tmp_path, "sudo")) == (2 if user else 0)


# --- README.md and RESULTS.md
@pytest.mark.parametrize("document", [*DOCUMENTS, "extras/evidence.sh", "extras/gpu_hour.sh"])
def test_readme_names_only_flags_that_exist(document):
    """Every flag that a document gives a script is one that the script has."""
    text = (HERE / document).read_text().replace("\\\n", " ")
    for name in [*SCRIPTS, *(f"extras/{path.name}" for path in EXTRAS.glob("*.py"))]:
        used = set(re.findall(r"(?<!\S)--(?:no-)?([a-z][a-z-]+)",
                              " ".join(re.findall(rf"\b{name}([^\n`;|#&]*)", text))))
        known = set(re.findall(r"""["'/]--([a-z][a-z-]+)""", (HERE / name).read_text()))
        assert used <= known, (name, used - known)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_readme_links_lead_somewhere(document):
    """Each link that names no other site is a file here, and its anchor a heading of that file."""
    for link in re.findall(r"\]\(([^)]+)\)", (HERE / document).read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = HERE / (name or document)
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, link


def test_readme_is_short():
    """At most 2,300 words; what is longer than ten lines of code is a file in extras/."""
    text = (HERE / "README.md").read_text()
    assert len(text.split()) <= 2300
    for block in re.findall(r"^```\w.*?\n(.*?)^```", text, re.M | re.S):
        assert block.count("\n") <= 10, block


def test_readme_code_runs(folder, unbroken, tmp_path, monkeypatch):
    """The blocks of Python run one after the other, on files of the tests in the place of those
    that they name."""
    files = {"runs/demo/last.pt": unbroken / "last.pt", "data/demo_val.beton": folder / "val.beton",
             "data/train_500_95.beton": folder / "train.beton", "batch_size=256": "batch_size=8",
             "data/val_500_100.beton": folder / "val.beton", 'device="cuda"': 'device="cpu"'}
    blocks = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    names = {"torch": torch}
    for block in blocks:
        for name, file in files.items():
            block = block.replace(name, str(file))
        exec(block, names)
    noise = names["masking_noise"]((2, 16))
    assert noise[:, [5, 6, 9, 10]].max() < noise[:, [0, 3, 12, 15]].min()  # the middle stays
    assert names["features"].shape == (13, 128) and names["original"].shape[1:] == (3, 32, 32)
    assert names["loader"].res == 160
