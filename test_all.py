"""Shows that all of it holds: `pytest test_all.py`, some minutes on two cores, no GPU, no download.

Tests draw their own pictures; with DAILYMAE_PHOTOS naming a folder of class folders they use real
photos as well. Everything is compared with something independent: Pillow, stock ffcv, torch in
float64, the paper's tables. `-m soak` runs the long ones (kills, damaged files, full disks) and
`-m cuda` those that need a GPU.
"""
import contextlib
import ctypes
import gzip
import io
import itertools
import json
import math
import mmap
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

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pyarrow import parquet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import build_beton
import essl_loader
import finetune
import linprobe
import models_mae
import pretrain
import schedules
from essl_loader import (BetonReader, DataError, ESSLLoader, FolderLoader, center_box, open_loader,
                         random_box, uniform)
from models_mae import ViT, WeightsError, load_into, load_mae, read_weights, size_of, vit_settings

warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
HERE = Path(__file__).resolve().parent
PHOTOS = os.environ.get("DAILYMAE_PHOTOS")


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """Skips what is marked soak or cuda unless -m asks for it; gives signals back after a test."""
    for mark in ("soak", "cuda"):
        if request.node.get_closest_marker(mark) and mark not in request.config.option.markexpr:
            pytest.skip(f"only with -m {mark}")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def command(name, *words, ranks=1, restarts=0):
    """A script's command line, under torchrun --standalone for several ranks."""
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                  f"--max-restarts={restarts}"]
    return [str(word) for word in [sys.executable, *launch, HERE / name, *words]]


def run(name, *words, ranks=1, code=0, env=(), **kwargs):
    """Runs a script as a user would, one thread a process, to an exit code, without a traceback."""
    done = subprocess.run(command(name, *words, ranks=ranks), capture_output=True, text=True,
                          timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)},
                          **kwargs)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    if ranks == 1:
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


# --- pictures and files to test on
def draw(rng, width, height):
    """A smooth picture with an edge in it: what a photo is to a JPEG codec."""
    shape = (height // 40 + 2, width // 40 + 2, 3)
    coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    box = (width // 3, height // 4, width // 2 + 1, height // 2 + 1)
    picture.paste(tuple(rng.integers(60, 200, 3).tolist()), box)
    return picture.filter(ImageFilter.GaussianBlur(1.5))


def encode(picture, subsampling=2, restart=True, quality=95):
    """JPEG bytes from Pillow; restart: none, one that divides the rows, or one of so many MCUs."""
    out = io.BytesIO()
    across = -(-picture.width // (16 if subsampling else 8))
    divisors = [d for d in range(1, across + 1) if across % d == 0]
    if restart is True:
        restart = min(divisors, key=lambda d: min(abs(d - 3), abs(d - 4)))
    markers = {"restart_marker_blocks": restart} if restart else {}
    picture.save(out, "JPEG", quality=quality, subsampling=subsampling, optimize=True, **markers)
    return out.getvalue()


def pixels(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def write_beton(path, items):
    """A .beton of (mode, width, height, bytes), from the format notes alone; sample i: label i."""
    page = 8 << 20
    n = len(items)
    header = np.zeros(1, essl_loader.HEADER)
    fields = np.zeros(2, essl_loader.FIELD)
    samples = np.zeros(n, essl_loader.SAMPLE)
    alloc = np.zeros(n, essl_loader.ALLOC)
    fields["type_id"] = [2, 1]
    fields["name"] = [b"image", b"label"]
    at = page
    with open(path, "wb") as file:
        for i, (mode, width, height, blob) in enumerate(items):
            if at // page != (at + len(blob) - 1) // page:
                at += page - at % page
            samples[i] = (mode, width, height, at, i)
            alloc[i] = (i, at, len(blob))
            file.seek(at)
            file.write(blob)
            at += len(blob)
        end = -(-at // page) * page
        header[0] = (2, 2, page, n, end)
        file.seek(end)
        file.write(alloc.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
    return path


@pytest.fixture(scope="session")
def beton(tmp_path_factory):
    """40 pictures of many sizes: 4:2:0, 4:4:4 and gray, with and without restarts, two raw."""
    rng = np.random.default_rng(1)
    items = []
    for i in range(40):
        picture = draw(rng, int(rng.integers(50, 400)), int(rng.integers(50, 400)))
        data = encode(picture.convert("L") if i % 10 == 9 else picture, 0 if i % 4 == 3 else 2,
                      i % 3 > 0)
        if i == 14:  # not baseline: decoded whole, by libjpeg-turbo
            progressive = io.BytesIO()
            picture.save(progressive, "JPEG", quality=95, progressive=True)
            data = progressive.getvalue()
        if i % 20 == 5:
            data = np.asarray(picture).tobytes()
        items.append((int(i % 20 == 5), *picture.size, data))
    return write_beton(tmp_path_factory.mktemp("beton") / "mixed.beton", items), items


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 2 x 32 drawn pictures to train on and 2 x 8 to hold out, and .beton files."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(2)
    for part, count in (("train", 32), ("val", 8)):
        for c, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = draw(rng, int(rng.integers(40, 90)), int(rng.integers(40, 90)))
                picture = picture.point(lambda v: v // 2 + 127 * c)
                picture.save(root / part / name / f"{i}.png")
        out = root / f"{part}.beton"
        run("build_beton.py", "--data-dir", root / part, "--out", out)
    return root




# --- build_beton
def build(source, out, *words, code=0):
    """build_beton.py from a source into a file, with the exit code that is expected."""
    return run("build_beton.py", "--data-dir", source, "--out", out, *words, code=code)


def jpeg_of(picture, **options):
    picture.save(out := io.BytesIO(), "JPEG", **{"quality": 92} | options)
    return out.getvalue()


def tar_of(members):
    """The bytes of a tar of (name, bytes) pairs."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def parquet_of(members, labels=None):
    """The bytes of a parquet file as Hugging Face writes it, of classes dog and eel."""
    features = {"info": {"features": {"label": {"names": ["dog", "eel"]}}}}
    table = pyarrow.table({"image": [{"bytes": data, "path": name} for name, data in members],
                           "label": labels or [0] * len(members)})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, out := io.BytesIO(), row_group_size=3)
    return out.getvalue()


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """(root of class folders of 10 JPEGs each and of their .beton, [(class, name, bytes)])."""
    root, rng = tmp_path_factory.mktemp("animals"), np.random.default_rng(3)
    photos = sorted(Path(PHOTOS).glob("*/*.jp*g"))[::7] if PHOTOS else []
    items = []
    for i in range(20):
        data = jpeg_of(draw(rng, *rng.integers(40, 200, 2).tolist()), subsampling=0)
        data = photos[i].read_bytes() if i < len(photos) else data
        path = root / "folders" / ("dog", "eel")[i // 10] / f"{37 * i % 100:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        items.append((path.parent.name, path.name, data))
    build(root / "folders", root / "folders.beton", "--num-workers", 1)
    return root, sorted(items)


@pytest.mark.parametrize("kind", ["tar of tars", "class folders in a tar", "shards", "parquet"])
def test_build_sources_give_the_same_file(animals, tmp_path, kind):
    """Each source gives the class folders' file, byte for byte, with any number of workers."""
    (root, items), source = animals, tmp_path / "source.tar"
    if kind == "tar of tars":
        tars = [(f"{c}.tar", tar_of([item[1:] for item in items[::-1] if item[0] == c]))
                for c in ("eel", "dog")]
        source.write_bytes(tar_of(tars))
    elif kind == "class folders in a tar":
        source.write_bytes(tar_of([(f"./ILSVRC/{c}/{name}", d) for c, name, d in items[::-1]]))
    else:
        source = tmp_path / "parts"
        source.mkdir()
        for part, suffix, label in (0, "cls", b"0\n"), (1, "json", b'{"label": 1}'):
            these = [item[1:] for item in items[10 * part:10 * part + 10]]
            labels = [(name.replace("jpg", suffix), label) for name, _ in these]
            packed = parquet_of(these, [part] * 10) if kind == "parquet" else tar_of(these + labels)
            (source / f"{part}.{'parquet' if kind == 'parquet' else 'tar'}").write_bytes(packed)
    words = ["--classes", root / "folders.beton"] if kind == "shards" else []
    done = build(source, tmp_path / "x.beton", "--num_workers", 3, *words)
    assert "found: 20 pictures in 2 classes" in done.stdout
    assert (tmp_path / "x.beton").read_bytes() == (root / "folders.beton").read_bytes()
    assert BetonReader(tmp_path / "x.beton").classes == ["dog", "eel"]


@pytest.mark.parametrize("kind", ["csv", "names", "numbers", "devkit"])
def test_build_labels_of_flat_sources(animals, tmp_path, kind):
    """Each kind of --labels gives the pictures of a flat tar their labels."""
    (root, items), labels = animals, tmp_path / f"labels.{'csv' if kind == 'csv' else 'txt'}"
    (tmp_path / "val.tar").write_bytes(tar_of([item[1:] for item in items]))
    expected = ["dog eel".split().index(c) for c, _, _ in sorted(items, key=lambda item: item[1])]
    lines = {"csv": [f"{name[:-4]},{c} 1 2 3 4 {c} 5 6 7 8" for c, name, _ in items],
             "names": [("dog", "eel")[n] for n in expected], "numbers": map(str, expected)}
    labels.write_text("\n".join(lines.get(kind, [])))
    if kind == "devkit":  # ids that do not follow the names, and a class that is no leaf
        fields = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
        synsets = np.array([[(2, "dog", 0)], [(1, "eel", 0)], [(3, "animal", 2)]], fields)
        pytest.importorskip("scipy.io").savemat(matrix := io.BytesIO(), {"synsets": synsets})
        ids = "\n".join(str(2 - n) for n in expected).encode()
        labels = tmp_path / "devkit.tar.gz"
        labels.write_bytes(gzip.compress(tar_of([
            ("d/meta.mat", matrix.getvalue()), ("d/ILSVRC2012_validation_ground_truth.txt", ids)])))
    pictures, classes = build_beton.find_data(tmp_path / "val.tar", labels, root / "folders.json")
    assert [picture.label for picture in pictures] == expected and classes == ["dog", "eel"]


def test_build_refuses_in_words(animals, tmp_path, capsys):
    """Bad input of any kind ends with code 2, one paragraph that names it, and no new file."""
    (root, items), folders = animals, animals[0] / "folders"
    members = [item[1:] for item in items]
    nested = tar_of([("dog.tar", tar_of(members)), ("eel.tar", tar_of(members))])
    parquet.write_table(pyarrow.table({"picture": [1.5]}), columns := io.BytesIO())
    for name, data in {
            "unlabelled.tar": tar_of([*members, ("00.cls", b"1")]), "flat.tar": tar_of(members),
            "cls.tar": tar_of([*members, ("00.cls", b"dog")]), "cut.tar": nested[:len(nested) // 3],
            "half.tar": nested[:512 + len(tar_of(members))], "columns.parquet": columns.getvalue(),
            "two.txt": b"0\n1\n", "cats.json": b'{"classes": ["cat", "dog"]}'}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty/dog").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    for source, words, named in [
            ("unlabelled.tar", [], "unlabelled.tar"), ("cls.tar", [], "00.cls"),
            ("cut.tar", [], "cut.tar"), ("half.tar", [], "half.tar"), ("empty", [], "empty/dog"),
            ("columns.parquet", [], "picture"), ("missing", [], "missing"),
            ("flat.tar", ["--labels", tmp_path / "two.txt"], "two.txt"),
            (folders, ["--classes", tmp_path / "cats.json"], "eel"),
            (folders, ["--classes", tmp_path / "two.txt"], "two"),
            (folders, ["--labels", tmp_path / "two.txt"], "--labels")]:
        words = ["--data-dir", tmp_path / source, "--out", tmp_path / "x.beton", *words]
        with pytest.raises(SystemExit, match="2"):
            build_beton.main(build_beton.get_args(list(map(str, words))))
        errors = capsys.readouterr().err
        assert named in errors and errors.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_build_warns_of_one_level_too_high(animals, tmp_path, capsys):
    """Classes called train and val get a warning; --help shows the docstring's commands."""
    os.symlink(animals[0] / "folders/dog", tmp_path / "train")
    os.symlink(animals[0] / "folders/eel", tmp_path / "val")
    build_beton.find_data(tmp_path, None, None)
    assert "one level too high" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        build_beton.get_args(["--help"])
    assert "--verify data/train.beton --exclude-bad" in capsys.readouterr().out


def test_build_names_every_bad_picture(tmp_path):
    """All bad pictures are named at once, nothing is written; --skip-bad leaves them out."""
    source, good = tmp_path / "pictures", jpeg_of(draw(np.random.default_rng(4), 90, 60))
    contents = {"empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": good[:-200], "ok.jpg": good}
    source.mkdir()
    for name, data in contents.items():
        (source / name).write_bytes(data)
    (tmp_path / "flat.tar").write_bytes(tar_of(contents.items()))
    os.symlink("nowhere", source / "link.jpg")
    os.mkfifo(source / "pipe.jpg")
    errors = build(source, tmp_path / "x.beton", code=2).stderr
    assert "5 of 6" in errors and all(f"/{name}.jpg: " in errors for name in
                                      ("empty", "text", "cut", "link", "pipe"))
    assert not (tmp_path / "x.beton").exists() and not (tmp_path / "x.json").exists()
    assert " 1 images" in build(tmp_path / "flat.tar", tmp_path / "y.beton", "--skip-bad").stdout
    left_out = json.loads((tmp_path / "y.json").read_text())["left_out"]
    assert [Path(entry["file"]).name for entry in left_out] == ["cut.jpg", "empty.jpg", "text.jpg"]


def test_build_reads_every_mode_as_pillow(tmp_path):
    """Labels are ImageFolder's, each picture Pillow's conversion, upright, up to JPEG's loss."""
    rgb, tall = draw(np.random.default_rng(0), 301, 203), draw(np.random.default_rng(1), 17, 900)
    (tmp_path / "in/b/deep").mkdir(parents=True)
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/notes.txt").write_text("not a picture, and not named like one")
    os.symlink(tmp_path, tmp_path / "in/b/deep/loop")
    gray16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    turned, gray = rgb.transpose(Image.Transpose.ROTATE_270), rgb.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {"a/2.jpg": (gray, gray), "a/3.JPEG": (rgb.convert("CMYK"), rgb),
                "a/6.png": (gray16, gray), "b/4.webp": (rgb.convert("RGBA"), rgb),
                "b/7.bmp": (rgb.crop((0, 0, 1, 1)),) * 2,
                "b/8.png": (tall, tall.resize((9, 500), Image.Resampling.BOX)),
                "b/deep/9.png": (rgb, turned)}
    for name, (picture, _) in pictures.items():
        picture.save(tmp_path / "in" / name, quality=97, exif=exif if "9" in name else b"")
    build(tmp_path / "in", tmp_path / "x.beton", "--quality", 100, "--chroma", "444")
    reader = BetonReader(tmp_path / "x.beton")
    assert reader.classes == ["a", "b"] and list(reader.labels) == [0] * 3 + [1] * 4
    for i, (name, (_, expected)) in enumerate(pictures.items()):
        got = reader.image(i).astype(int)
        assert got.shape[1::-1] == expected.size, name
        assert abs(got - expected.convert("RGB")).mean() < 2, name


@pytest.mark.parametrize("codec, chroma, interval", [("turbojpeg", "420", 1), ("pil", "444", 2)])
def test_build_jpeg_is_as_designed(tmp_path, codec, chroma, interval):
    """Pillow's pixels of the same settings, markers at a divisor of 19 or 38 MCUs, a checksum."""
    (tmp_path / "in").mkdir()
    draw(np.random.default_rng(0), 301, 203).save(tmp_path / "in/x.png")
    build(tmp_path / "in", tmp_path / "x.beton", "--codec", codec, "--chroma", chroma,
          "--max-resolution", 300, "--quality", 90)
    stored = BetonReader(tmp_path / "x.beton").read(0)
    resampling = {"turbojpeg": Image.Resampling.BOX, "pil": Image.Resampling.BICUBIC}[codec]
    small = Image.open(tmp_path / "in/x.png").resize((300, 202), resampling)
    plain = Image.open(io.BytesIO(jpeg_of(small, quality=90, subsampling=":".join(chroma))))
    ours = Image.open(io.BytesIO(stored))
    assert np.array_equal(ours, plain) and ours.layer == plain.layer
    assert ours.quantization == plain.quantization and stored[2:10] == b"\xff\xfe\0\x0cESSL"
    assert b"\xff\xdd\0\4" + interval.to_bytes(2, "big") in stored


def turbo_pixels(jpeg):
    """libjpeg-turbo's RGB decode by plain ctypes, None where it fails or warns of anything."""
    lib = essl_loader.load_turbojpeg()
    lib.tj3Init.restype = ctypes.c_void_p
    handle, size = ctypes.c_void_p(lib.tj3Init(1)), ctypes.c_size_t(len(jpeg))
    lib.tj3Set(handle, 0, 1)  # TJPARAM_STOPONWARNING
    failed = lib.tj3DecompressHeader(handle, jpeg, size)
    bands, pixel_format = (4, 11) if lib.tj3Get(handle, 8) > 2 else (3, 0)  # TJPF_CMYK, TJPF_RGB
    shape = (lib.tj3Get(handle, 6), lib.tj3Get(handle, 5), bands)  # TJPARAM_JPEGHEIGHT, _JPEGWIDTH
    out = np.zeros((1, 1, 3) if failed else shape, np.uint8)
    failed = failed or lib.tj3Decompress8(handle, jpeg, size, ctypes.c_void_p(out.ctypes.data), 0,
                                          pixel_format)
    lib.tj3Destroy(handle)
    return None if failed else out


def jpegs_of_every_kind():
    """{name: JPEG bytes}; the names of those that --lossless cannot keep begin with z."""
    rng, exif, kinds = np.random.default_rng(5), Image.Exif(), {}
    exif[0x0112] = 6
    options = {"444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
               "gray": {}, "progressive": {"progressive": True}, "zcmyk": {},
               "zturned": {"exif": exif},
               "restarts": {"restart_marker_blocks": 5}, "fine": {"quality": 100, "subsampling": 0},
               "comment": {"comment": b"hi", "icc_profile": bytes(200)}, "zrgb": {"keep_rgb": True}}
    for name, kind in options.items():
        mode = {"gray": "L", "zcmyk": "CMYK"}.get(name, "RGB")
        kinds[name] = jpeg_of(draw(rng, *rng.integers(60, 400, 2).tolist()).convert(mode), **kind)
    kinds["zlarge"] = jpeg_of(draw(rng, 90, 501))
    whole = kinds["progressive"]
    kinds["zunfinished"] = whole[:whole.rindex(b"\xff\xda")] + b"\xff\xd9"  # decoders smooth it
    kinds["adobe"] = kinds["444"][:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\1" + kinds["444"][20:]
    lib = essl_loader.load_turbojpeg()
    lib.tj3Init.restype = ctypes.c_void_p
    handle, jpeg, size = ctypes.c_void_p(lib.tj3Init(0)), ctypes.c_void_p(), ctypes.c_size_t()
    lib.tj3Set(handle, 3, 90)  # TJPARAM_QUALITY
    lib.tj3Set(handle, 4, 4)  # TJPARAM_SUBSAMP: TJSAMP_440, which Pillow does not write
    lib.tj3Compress8(handle, draw(rng, 99, 77).tobytes(), 99, 0, 77, 0, ctypes.byref(jpeg),
                     ctypes.byref(size))
    kinds["440"] = ctypes.string_at(jpeg, size.value)
    return kinds


def test_build_lossless_keeps_pixels(tmp_path):
    """Kept JPEGs decode to their sources' pixels, whole and in crops; the rest is re-encoded."""
    kinds = jpegs_of_every_kind()
    photos = sorted(Path(PHOTOS).glob("*/*.jp*g"))[:100] if PHOTOS else []
    kinds |= {path.stem: path.read_bytes() for path in photos}
    (tmp_path / "all.tar").write_bytes(tar_of((f"{name}.jpg", kinds[name]) for name in kinds))
    done, kept = build(tmp_path / "all.tar", tmp_path / "x.beton", "--lossless"), []
    reader = BetonReader(tmp_path / "x.beton")
    for i, name in enumerate(sorted(kinds)):
        stored = reader.read(i)
        if name[0] != "z":
            kept.append((0, int(reader.widths[i]), int(reader.heights[i]), kinds[name]))
            assert np.array_equal(turbo_pixels(stored), turbo_pixels(kinds[name])), name
            assert np.array_equal(reader.image(i), turbo_pixels(kinds[name])), name
            assert b"\xff\xdd\0\4" in stored, name
        elif name != "zlarge":
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(kinds[name]))).convert("RGB")
            assert abs(reader.image(i).astype(int) - upright).mean() < 3, name
    assert f"{len(kept)} kept, {len(kinds) - len(kept)} re-encoded" in done.stdout
    sidecar = json.loads((tmp_path / "x.json").read_text())
    assert (sidecar["kept"], sidecar["re_encoded"]) == (len(kept), len(kinds) - len(kept))
    run("build_beton.py", "--verify", tmp_path / "x.beton")
    source = write_beton(tmp_path / "sources.beton", kept)  # crops without and with markers
    batches = [next(iter(ESSLLoader(path, len(kept), res=64, seed=1, indices=range(len(kept)))))
               for path in (source, tmp_path / "x.beton")]
    for i, theirs, ours in zip(batches[0][1].tolist(), batches[0][0], batches[1][0]):
        if sorted(kinds)[i] != "progressive":  # libjpeg-turbo decodes that one
            assert torch.equal(ours, theirs), sorted(kinds)[i]


def test_build_lossless_lists_damage(tmp_path):
    """What libjpeg-turbo warns of is a bad picture, whether it would be kept or re-encoded."""
    for name in "444", "zlarge":
        data = jpegs_of_every_kind()[name]
        (tmp_path / f"cut{name}.jpg").write_bytes(data[:-200])
        (tmp_path / f"bits{name}.jpg").write_bytes(data[:-300] + b"\xff\x01" + data[-298:])
    errors = build(tmp_path, tmp_path / "x.beton", "--lossless", code=2).stderr
    assert "4 of 4" in errors and "remature end" in errors


@pytest.mark.parametrize("who, number", [("worker", signal.SIGKILL), ("parent", signal.SIGTERM)])
def test_build_killed_leaves_nothing(tmp_path, who, number):
    """A killed worker or a stopped build ends with code 1 and leaves no file and no process."""
    source = tmp_path / "pictures"
    source.mkdir()
    draw(np.random.default_rng(6), 1500, 1500).save(source / "0.png")
    for i in range(1, 400):
        os.link(source / "0.png", source / f"{i}.png")
    command = ["--data-dir", source, "--out", tmp_path / "x.beton", "--num-workers", "2"]
    parent = subprocess.Popen([sys.executable, HERE / "build_beton.py", *command],
                              stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(p.stat().st_size > 100_000 for p in tmp_path.glob(".x.beton.tmp-*")):
        time.sleep(0.05)
        assert parent.poll() is None, parent.stderr.read()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(children[-1]) if who == "worker" else parent.pid, number)
    errors = parent.communicate(timeout=60)[1]
    assert parent.returncode == 1 and "Traceback" not in errors
    assert ("died" if who == "worker" else "stopped") in errors
    assert os.listdir(tmp_path) == ["pictures"]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_build_verify_finds_one_flipped_bit(animals, tmp_path):
    """--verify names the sample of any flipped bit; the reader refuses any in header and tables."""
    out, whole = tmp_path / "x.beton", (animals[0] / "folders.beton").read_bytes()
    out.write_bytes(whole)
    assert "20 samples verified" in run("build_beton.py", "--verify", out).stdout
    reader, damaged = BetonReader(out), bytearray(whole)
    for i, at in (1, 9), (4, 40), (8, -1):  # in the checksum itself, the header, the last byte
        damaged[reader.ptrs[i] + at % reader.sizes[i]] ^= 1
    out.write_bytes(damaged)
    done = run("build_beton.py", "--verify", out, code=1)
    assert done.returncode == 1 and "3 of 20" in done.stderr and "--exclude-bad" in done.stderr
    assert all(f"sample {i}: " in done.stderr for i in (1, 4, 8))
    settings, tables = 24 + 17, 24 + 2 * 1041  # where the build settings and the samples begin
    text = len(whole[settings:settings + 1024].rstrip(b"\0"))
    for at in (*range(24), *range(settings, settings + text, 7), *range(tables, tables + 480, 11),
               *range(-480, 0, 11)):
        at %= len(whole)
        out.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(DataError, match="x.beton"):
            BetonReader(out)


def test_build_exclude_bad_notes_samples(animals, tmp_path):
    """--exclude-bad lists damaged samples in the .json, of FFCV's files too; the last counts."""
    root, items = animals
    write_beton(tmp_path / "ffcv.beton", [(0, *Image.open(io.BytesIO(data)).size, data)
                                          for _, _, data in items])
    shutil.copy(root / "folders.beton", tmp_path / "ours.beton")
    before = json.loads(shutil.copy(root / "folders.json", tmp_path / "ours.json").read_text())
    for name, i in ("ffcv", 3), ("ours", 3), ("ours", 5):
        out = tmp_path / f"{name}.beton"
        whole = (root / "folders.beton" if name == "ours" else out).read_bytes()
        at = BetonReader(out).ptrs[i]
        out.write_bytes(whole[:at] + bytes(30) + whole[at + 30:])
        done = run("build_beton.py", "--verify", out, "--exclude-bad")
        assert done.returncode == 0 and "1 excluded" in done.stdout, done.stderr
        sidecar = json.loads(out.with_suffix(".json").read_text())
        assert list(sidecar.pop("excluded")) == [str(i)]
        assert sidecar == (before if name == "ours" else {"classes": None})
    run("build_beton.py", "--verify", out)  # not a fault any more


def test_build_opens_in_ffcv(tmp_path):
    """FFCV's Loader reads our lossless file as BetonReader does, samples larger than a page too."""
    pytest.importorskip("ffcv")
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    out, rng = tmp_path / "x.beton", np.random.default_rng(7)
    for i in range(4):  # smooth, noise, smooth, noise; noise takes 10 MB: pages grow to 16 MiB
        (tmp_path / "pictures" / str(i)).mkdir(parents=True)
        noise = Image.fromarray(rng.integers(0, 256, (2100, 2100, 3), np.uint8))
        picture = noise if i % 2 else draw(rng, 2100, 2100)
        picture.save(tmp_path / f"pictures/{i}/x.jpg", quality=95, subsampling=0)
    build(tmp_path / "pictures", out, "--lossless", "--max-resolution", 4000)
    loader = Loader(str(out), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False,
                    pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
    images, labels = next(iter(loader))
    assert loader.reader.page_size == 16 << 20 and labels.ravel().tolist() == [0, 1, 2, 3]
    for i in range(4):  # FFCV decodes with the fast DCT, hence the tolerance
        assert abs(BetonReader(out).image(i).astype(np.int16) - images[i]).mean() < 2


def test_build_demo_draws_the_same_again(tmp_path):
    """--demo writes ten balanced classes, the same bytes each time, other pictures in val."""
    for name in "one", "two":
        done = run("build_beton.py", "--demo", "--out-dir", tmp_path / name, "--limit", 20)
        assert done.returncode == 0, done.stderr
    train, val = tmp_path / "one/demo_train.beton", tmp_path / "one/demo_val.beton"
    again = (tmp_path / "two/demo_train.beton").read_bytes()
    assert train.read_bytes() == again != val.read_bytes()
    assert np.bincount(BetonReader(val).labels).tolist() == [2] * 10


def damage(rng, data):
    """Bytes that are cut, or have flipped bits, or other bytes in the header or anywhere."""
    data, at, kind = bytearray(data), int(rng.integers(len(data))), rng.integers(4)
    if kind == 0:
        return bytes(data[:at])
    for place in rng.integers(0, len(data), 20) if kind == 1 else []:
        data[place] ^= 1 << int(rng.integers(8))
    if kind > 1:
        at = at % 700 if kind == 2 else at
        data[at:at + 4] = rng.bytes(4)
    return bytes(data)


def build_damaged(folder, first, count):
    """Builds damaged sources in this process; fails where one is built that should be listed."""
    settings = {"codec": "turbojpeg", "quality": 95, "chroma": "420", "max_resolution": 300,
                "lossless": True}
    whole = [data for _, data in sorted(jpegs_of_every_kind().items())]
    for number in range(first, first + count):
        rng, path = np.random.default_rng(number), Path(folder) / f"{number}.jpg"
        path.write_bytes(damage(rng, whole[number % len(whole)]))
        pictures = [build_beton.Picture(str(folder), path.name, 0, -1, 0)]
        if number % 5 > 2:
            pack, path = (tar_of, path.with_suffix(".tar")) if number % 5 == 3 else (
                parquet_of, path.with_suffix(".parquet"))
            path.write_bytes(damage(rng, pack([(f"{i}.jpg", whole[i]) for i in range(5)])))
            try:
                pictures, _ = build_beton.find_data(path, None, None)
            except ValueError:
                continue
        for picture in pictures:
            result = build_beton.encode_sample(settings, picture)
            if isinstance(result, str):
                continue
            source = build_beton.read_source(picture)
            expected = turbo_pixels(source)
            assert expected is not None or source[:2] != b"\xff\xd8", f"{number}: not listed"
            assert not result[3] or np.array_equal(turbo_pixels(result[0]), expected), number


@pytest.mark.soak
def test_build_2000_damaged_sources(tmp_path):
    """Damaged JPEGs, tars, parquet files are listed, refused, or give libjpeg-turbo's pixels."""
    for first in range(0, 2000, 250):
        code = f"import test_all; test_all.build_damaged({str(tmp_path)!r}, {first}, 250)"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0, done.stderr


# --- essl_loader
def planes_of(jpeg, width, height, subsampling):
    """Y, Cb, Cr of the whole picture by libjpeg-turbo, called with plain ctypes."""
    lib = essl_loader.load_turbojpeg()
    lib.tjInitDecompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(lib.tjInitDecompress())
    h, v = {2: (2, 2), 1: (2, 1), 0: (1, 1), "gray": (1, 1)}[subsampling]
    shapes = [(-(-height // v) * v, -(-width // h) * h)]
    shapes += [(-(-height // v), -(-width // h))] * (subsampling != "gray") * 2
    planes = [np.zeros(shape, np.uint8) for shape in shapes]
    pointers = (ctypes.c_void_p * 3)(*[p.ctypes.data for p in planes])
    assert lib.tjDecompressToYUVPlanes(handle, jpeg, ctypes.c_ulong(len(jpeg)), pointers, 0, None,
                                       0, 0) == 0
    lib.tjDestroy(handle)
    return planes


def memory_at(address, shape, dtype=np.uint8):
    """A NumPy view of memory that a kernel filled."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype).reshape(shape)


@pytest.mark.parametrize("subsampling", [2, 0, 1, "gray"])
@pytest.mark.parametrize("restart", [True, False, 7])
def test_loader_crop_decode_equals_crop_of_full_decode(tmp_path, subsampling, restart):
    """Random boxes, odd sizes, every sampling: within one level of libjpeg-turbo's full decode."""
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate([(1, 1), (1000, 3), (3, 1000), (17, 16), (33, 31),
                                              (368, 200), (333, 250), (65, 129), (1100, 40)]):
        shape = (height // 7 + 2, width // 7 + 2, 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture = noise.resize((width, height), Image.Resampling.BICUBIC)
        gray = subsampling == "gray"
        jpeg = encode(picture.convert("L") if gray else picture, 0 if gray else subsampling,
                      restart, quality=(95, 30, 100)[number % 3])
        full = planes_of(jpeg, width, height, subsampling)
        sizes = np.array([[len(jpeg)], [width], [height]])
        memory, scratch = essl_loader.make_scratch(*sizes, 8)
        stored = ctypes.create_string_buffer(jpeg, len(jpeg))
        for trial in range(15):
            x = int(rng.integers(width)) if trial else 0
            y = int(rng.integers(height)) if trial else 0
            w = int(rng.integers(1, width - x + 1)) if trial else width
            h = int(rng.integers(1, height - y + 1)) if trial else height
            code = essl_loader.decode_planes(ctypes.addressof(stored), len(jpeg), width, height,
                                             x, y, w, h, scratch)
            assert code == essl_loader.OK
            for row, expected in zip(memory_at(scratch.plane, (3, 7), np.int64), full):
                address, stride, x0, y0, sx, sy, _ = row.tolist()
                right = -(-(x + w) // sx)
                bottom = -(-(y + h) // sy)
                rows = memory_at(address, (bottom - y0 // sy, stride)) ^ 128
                columns = np.arange(x // sx, right) - x0 // sx
                columns = columns // 64 * 64 + columns % 8 * 8 + columns // 8 % 8  # as they lie
                off = rows[y // sy - y0 // sy:, columns].astype(int)
                off -= expected[y // sy:bottom, x // sx:right]
                assert np.abs(off).max() <= 1, ((width, height), (x, y, w, h), np.abs(off).max())


def compare_with_pillow(loader, picture_of):
    """Mean difference in levels for each picture of an epoch, and the shift that explains it."""
    resample = Image.Resampling[loader.interpolation.upper()]
    positions = loader._positions()
    images = torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()
    means = []
    shifts = []
    for row, p in zip(images, positions):
        picture = picture_of(p)
        if loader.train:
            x, y, w, h = random_box(*picture.size, loader.scale, loader.ratio, loader.seed, 0, p)
        else:
            x, y, w, h = center_box(*picture.size, loader.crop_ratio)
        expected = picture.crop((x, y, x + w, y + h)).resize((loader.res, loader.res), resample)
        flip = uniform(loader.seed, 0, p, essl_loader.FLIP_DRAW) < loader.hflip
        if loader.train and flip:
            expected = ImageOps.mirror(expected)
        expected = np.asarray(expected).astype(float)
        means.append(np.abs(row - expected).mean())
        for slope in np.gradient(expected, axis=(0, 1)):
            shifts.append(((row - expected) * slope).sum() / max(1.0, (slope * slope).sum()))
    return np.array(means), np.array(shifts)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_loader_sample_path_equals_pillow(beton, interpolation, train):
    """Decode, crop, resize, flip: mean difference under one level and no shift, at any size."""
    path, items = beton

    def picture_of(p):
        mode, width, height, data = items[p]
        raw = np.frombuffer(data, np.uint8).reshape(height, width, 3) if mode else pixels(data)
        return Image.fromarray(raw)
    for res in (224, 160, 65):
        loader = ESSLLoader(path, 16, train, res=res, interpolation=interpolation, seed=4,
                            drop_last=False)
        means, shifts = compare_with_pillow(loader, picture_of)
        assert len(means) == 40 and means.max() < 1 and np.abs(shifts).max() < 0.1


def epochs_of(loader, count=2):
    return [(images.clone(), labels) for _ in range(count) for images, labels in loader]


def same(ours, theirs):
    pairs = zip(ours, theirs)
    return len(ours) == len(theirs) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_loader_same_bytes_for_any_threads_and_after_resume(beton):
    """1, 2, 4 threads, and a state loaded in mid-epoch, give the same batches; epochs differ."""
    def loader(threads, batch_size=8, **kwargs):
        return ESSLLoader(beton[0], batch_size, num_workers=threads, res=96, seed=5, **kwargs)
    expected = epochs_of(loader(1))
    assert same(epochs_of(loader(2)), expected) and same(epochs_of(loader(4)), expected)
    assert not same(expected[:5], expected[5:])
    first = loader(2)
    for i, _ in enumerate(first):
        if i == 2:
            break
    resumed = loader(3)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(ValueError, match="order"):
        loader(1, order="pages").load_state_dict(first.state_dict())
    assert same(epochs_of(resumed), expected[3:])
    halves = [loader(1, 4, rank=rank, world_size=2) for rank in range(2)]  # the same total batch
    for half in halves:
        half.load_state_dict(first.state_dict())
    both = torch.stack([next(iter(half))[0] for half in halves], 1)
    assert torch.equal(both.flatten(0, 1), expected[3][0])


def test_loader_ranks_partition_an_epoch(beton):
    """Ranks share an epoch without overlap; evaluation visits each sample once."""
    for train, world in ((True, 2), (False, 3)):
        seen = []
        for rank in range(world):
            loader = ESSLLoader(beton[0], 5, train, res=32, rank=rank, world_size=world)
            seen += torch.cat([labels for _, labels in loader]).tolist()
        assert sorted(seen) == list(range(40))


def test_loader_stage_change_compiles_nothing(beton):
    """set_stage takes effect at the next epoch; the kernel keeps its one compiled signature."""
    loader = ESSLLoader(beton[0], 8, res=64)
    first = next(iter(loader))[0]
    compiled = len(essl_loader.fill.signatures)
    loader.set_stage(res=96, scale=(0.5, 1.0))
    assert first.shape == (8, 3, 64, 64) and next(iter(loader))[0].shape == (8, 3, 96, 96)
    assert len(essl_loader.fill.signatures) == compiled


def test_loader_batches_are_channels_last_and_stay(beton):
    """uint8 in channels_last memory, int64 labels; a batch that is kept is not overwritten."""
    kept = list(ESSLLoader(beton[0], 4, res=48, num_workers=2))
    assert kept[0][0].dtype == torch.uint8 and kept[0][1].dtype == torch.int64
    assert kept[0][0].is_contiguous(memory_format=torch.channels_last)
    assert same(kept, epochs_of(ESSLLoader(beton[0], 4, res=48, num_workers=2), 1))


def test_loader_views_are_crops_of_one_sample(folder, beton):
    """views=2: (2, B, 3, res, res), the first as with one view, the second another crop."""
    for path, make in ((beton[0], ESSLLoader), (folder / "train", FolderLoader)):
        one = epochs_of(make(path, 16, res=48, drop_last=False, num_workers=1), 1)
        two = epochs_of(make(path, 16, res=48, drop_last=False, num_workers=1, views=2), 1)
        assert all(images.shape == (2, len(y), 3, 48, 48) for images, y in two)
        assert same([(images[0], y) for images, y in two], one)
        assert not any(torch.equal(images[0], images[1]) for images, _ in two)


def test_loader_closes_and_leaves_no_thread(beton):
    """Leaving an epoch early leaves no thread; a closed loader, also under way, says so."""
    before = threading.active_count()
    for _ in range(20):
        with ESSLLoader(beton[0], 4, res=48, num_workers=3) as loader:
            batches = iter(loader)
            next(batches)
    assert threading.active_count() == before
    for closed in (batches, iter(loader)):
        with pytest.raises(RuntimeError, match="closed"):
            next(closed)


def test_loader_refuses_a_fork(beton):
    """A loader and an iteration under way say in a fork that they are the parent's."""
    loader = ESSLLoader(beton[0], 4, res=48, num_workers=2)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if child == 0:
        told = 0
        for iterator in (batches, iter(loader)):
            try:
                next(iterator)
            except RuntimeError as error:
                told += "its fork" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2 and len(list(batches)) == 9


def test_loader_leaves_out_what_the_sidecar_excludes(beton, tmp_path):
    """A damaged sample is named with the remedy; excluded, all else stays as it was."""
    items = list(beton[1])
    mode, width, height, data = items[7]
    items[7] = (mode, width, height, data[:len(data) // 2])
    path = write_beton(tmp_path / "bad.beton", items)
    loader = ESSLLoader(path, 4, res=48, drop_last=False)
    state = loader.state_dict()
    with pytest.raises(DataError, match="bad.beton: sample 7: .*--exclude-bad"):
        list(loader)
    (tmp_path / "bad.json").write_text('{"classes": null, "excluded": {"7": "damaged"}}')
    loader = ESSLLoader(path, 4, res=48, drop_last=False)
    loader.load_state_dict(state)
    order = loader._positions()
    images = torch.cat([images for images, _ in loader])
    whole = ESSLLoader(beton[0], 4, res=48, drop_last=False)
    kept = whole._positions() != 7
    assert loader.num_samples == 39 and loader.reader.excluded.tolist() == [7]
    assert order.tolist() == whole._positions()[kept].tolist()
    assert torch.equal(images, torch.cat([images for images, _ in whole])[kept])
    some = ESSLLoader(path, 2, train=False, indices=[3, 7, 9], res=32)
    assert torch.cat([labels for _, labels in some]).tolist() == [3, 9]


def test_loader_random_box_is_torchvisions():
    """Boxes follow torchvision's RandomResizedCrop over 4,000 draws; flips are halves."""
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    picture = Image.new("RGB", (500, 375))
    scale = (0.2, 1.0)
    ratio = (3 / 4, 4 / 3)
    ours = np.array([random_box(500, 375, scale, ratio, 0, 0, i) for i in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (500, 375)).all()
    for q in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(ours, q, axis=0) - np.quantile(theirs, q, axis=0)).max() < 15
    flips = [uniform(0, 0, i, essl_loader.FLIP_DRAW) < 0.5 for i in range(4000)]
    assert abs(np.mean(flips) - 0.5) < 0.03


@pytest.mark.parametrize("damage", ["cut", "version", "empty", "size", "pointer", "huge"])
def test_loader_names_what_is_wrong(beton, tmp_path, damage):
    """A file cut short, of another version, empty, with false sizes or pointers: a DataError."""
    data = bytearray(beton[0].read_bytes())
    row = essl_loader.HEADER.itemsize + 2 * essl_loader.FIELD.itemsize + 24 * 7
    if damage == "cut":
        del data[len(data) // 2:]
    elif damage == "version":
        data[0] = 3
    elif damage == "empty":
        data.clear()
    elif damage == "size":
        data[row + 1] ^= 1
    elif damage == "pointer":
        data[row + 9] ^= 0x40
    else:
        data[row + 1:row + 5] = b"\xff\xff\xff\xff"
    (tmp_path / "bad.beton").write_bytes(data)
    in_sample = damage in ("size", "pointer", "huge")
    with pytest.raises(DataError, match="bad.beton.*sample 7" if in_sample else "bad.beton"):
        list(ESSLLoader(tmp_path / "bad.beton", 8, train=False, res=64))


def test_loader_folder_loader_has_the_same_surface(folder):
    """FolderLoader gives ESSLLoader's order and labels and nearly its pictures."""
    theirs = FolderLoader(folder / "train", 16, res=64, seed=6, num_workers=2)
    ours = open_loader(folder / "train.beton", 16, res=64, seed=6)
    assert theirs.classes == ours.classes == ["dark", "light"]
    assert theirs.labels.tolist() == ours.labels.tolist() == [0] * 32 + [1] * 32
    for (a, b), (c, d) in zip(epochs_of(theirs), epochs_of(ours)):
        assert torch.equal(b, d)
        assert (a.int() - c.int()).abs().float().mean() < 4  # JPEG at quality 95 makes 1 to 3


def test_loader_folder_may_be_flat(tmp_path, monkeypatch):
    """Pictures without class folders are one class, upright; little shared memory is an error."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    picture = draw(np.random.default_rng(0), 90, 60)
    for name in "ab":
        picture.save(tmp_path / f"{name}.png", exif=exif)
    with open_loader(tmp_path, 2, train=False, res=60, crop_ratio=1.0, num_workers=1) as loader:
        images, labels = next(iter(loader))
        turned = picture.rotate(-90, expand=True).crop((0, 15, 60, 75))
        assert np.array_equal(images[0].permute(1, 2, 0), turned)
        assert labels.tolist() == [0, 0] and loader.classes == [tmp_path.name]
        (tmp_path / "b.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match="b.png"):
            list(loader)
        small = os.statvfs_result((4096, 4096, 16, 16, 16, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: small)
        with pytest.raises(DataError, match="/dev/shm"):
            list(loader)


def test_loader_says_what_is_wrong_with_an_argument(beton, tmp_path):
    """Arguments out of range and a device that is not there are errors at once."""
    for wrong in ({"interpolation": "lanczos"}, {"order": "sorted"}, {"rank": 1}, {"res": 0},
                  {"indices": [40]}, {"views": 2, "train": False}, {"scale": (0.5, 0.2)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ESSLLoader(beton[0], 4, **wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            ESSLLoader(beton[0], 4, device="cuda")
    with pytest.raises(DataError, match="build_beton.py"):
        ESSLLoader(tmp_path / "none.beton", 4)


def test_loader_describes_a_file(folder):
    """python essl_loader.py FILE prints samples, classes and build settings."""
    done = run("essl_loader.py", folder / "train.beton")
    for words in ("samples   64: 64 JPEG", "classes   2: dark, light", "quality = 95"):
        assert words in done.stdout


def test_loader_pages_order_reads_windows(tmp_path, monkeypatch):
    """order="pages": each sample once, ranks partition, files are read in sequential windows."""
    blob = encode(draw(np.random.default_rng(0), 40, 40)) + bytes(300_000)
    path = write_beton(tmp_path / "many.beton", [(0, 40, 40, blob)] * 400)  # 15 pages
    page = 8 << 20
    monkeypatch.setattr(essl_loader, "WINDOW", 3 * page)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, how: asked.append((at, size)))
    loaders = [ESSLLoader(path, 10, res=16, order="pages", rank=rank, world_size=2)
               for rank in range(2)]
    epochs = [[torch.cat([y for _, y in loader]) for loader in loaders] for _ in range(2)]
    for ranks in epochs:
        assert sorted(torch.cat(ranks).tolist()) == list(range(400))
        pages = loaders[0].reader.ptrs[torch.stack(ranks, 1).flatten().numpy()] // page
        changes = [(np.diff((pages + shift) // 3) != 0).sum() for shift in range(3)]
        counts = [len(np.unique((pages + shift) // 3)) - 1 for shift in range(3)]
        assert any(change == count for change, count in zip(changes, counts))
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    assert {at // page for at, _ in asked} >= set(range(1, 16))
    assert {n for _, n in asked} == {1 << 20}


def test_loader_stock_ffcv_reads_ours(folder):
    """A file of build_beton.py in ffcv's own Loader: the pictures and labels that Pillow finds."""
    pytest.importorskip("ffcv")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    path = folder / "val.beton"
    pipelines = {"image": [CenterCropRGBImageDecoder((40, 40), 1.0)], "label": [IntDecoder()]}
    reader = BetonReader(path)
    seen = []
    for images, labels in Loader(str(path), 8, num_workers=1, order=OrderOption.SEQUENTIAL,
                                 drop_last=False, pipelines=pipelines):
        for image, label in zip(images, labels[:, 0]):
            full = Image.fromarray(pixels(reader.read(len(seen))))
            x, y, side, _ = center_box(*full.size, 1.0)
            crop = full.crop((x, y, x + side, y + side)).resize((40, 40), Image.Resampling.BOX)
            seen.append(int(label))
            assert np.abs(image - np.asarray(crop).astype(int)).mean() < 6  # INTER_AREA
    assert seen == reader.labels.tolist() == [0] * 8 + [1] * 8


def test_loader_reads_files_of_ffcvs_writer(tmp_path):
    """Files of ffcv's DatasetWriter (jpg, raw, smart) load in ours, pictures as in Pillow."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    rng = np.random.default_rng(7)
    pairs = [(np.asarray(draw(rng, 60 + 9 * i, 150 - 9 * i)), 3 * i) for i in range(10)]
    for mode, modes in (("jpg", {0}), ("raw", {1}), ("smart", {0, 1})):
        path = tmp_path / f"{mode}.beton"
        image = RGBImageField(write_mode=mode, jpeg_quality=95, smart_threshold=30000)
        writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(pairs)
        loader = ESSLLoader(path, 10, res=64, seed=8)
        reader = loader.reader
        assert reader.labels.tolist() == list(range(0, 30, 3)) and reader.classes is None
        assert set(reader.modes.tolist()) == modes
        for i, (picture, _) in enumerate(pairs):
            exact = pixels(reader.read(i)) if reader.modes[i] == 0 else picture
            assert np.abs(reader.image(i).astype(int) - exact).max() <= 1
        means, _ = compare_with_pillow(loader, lambda p: Image.fromarray(reader.image(p)))
        assert means.max() < 1


IN_FFCV = """
import sys, numpy as np
from essl_loader import ESSLLoader, ffcv_decoder
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
path, out, threads, first = sys.argv[1:]

def ours():
    return [x.numpy() for x, _ in ESSLLoader(path, 16, res=48)]

def stock(decoder, os_cache):
    return [array.copy() for batch in Loader(
        path, 16, num_workers=int(threads), os_cache=os_cache, order=OrderOption.SEQUENTIAL,
        pipelines={"image": [decoder], "label": [IntDecoder()]}) for array in batch]

before = ours() if first == "ours" else None
plain = [stock(CenterCropRGBImageDecoder((48, 48), 1.0), cache) for cache in (True, False)]
inside = stock(ffcv_decoder((48, 48), scale=(0.3, 1.0), seed=3), True)
again = ours()
assert before is None or np.array_equal(before, again)
assert len(plain[0]) == len(plain[1]) == len(inside) == 8
np.savez(out, *inside)
"""


@pytest.mark.parametrize("threads, first", [(1, "ours"), (min(2, essl_loader.usable_cores()), "ffcv")])
def test_loader_and_ffcv_in_one_process(folder, tmp_path, threads, first):
    """ESSL, FFCV's Loader and ffcv_decoder work in any order; the crops are Pillow's."""
    pytest.importorskip("ffcv")  # in a process of its own: FFCV waits for ever for a failed thread
    words = [folder / "train.beton", tmp_path / "out.npz", str(threads), first]
    subprocess.run([sys.executable, "-c", IN_FFCV, *words], check=True, timeout=400, cwd=HERE)
    reader = BetonReader(folder / "train.beton")
    out = np.load(tmp_path / "out.npz")
    for i in range(64):
        image = out[f"arr_{i // 16 * 2}"][i % 16]
        full = Image.fromarray(pixels(reader.read(i)))
        x, y, w, h = random_box(*full.size, (0.3, 1.0), (3 / 4, 4 / 3), 3, i // 16, i)
        expected = full.crop((x, y, x + w, y + h)).resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(image.astype(int) - np.asarray(expected)).mean() < 1.5
        assert out[f"arr_{i // 16 * 2 + 1}"][i % 16, 0] == reader.labels[i]


@pytest.mark.soak
def test_loader_in_ffcv_does_not_hang_on_damage(folder, tmp_path):
    """A damaged sample is named and ends the program, which would wait for FFCV's thread."""
    reader = BetonReader(folder / "train.beton")
    data = bytearray((folder / "train.beton").read_bytes())
    start = reader.ptrs[5] + 200
    end = reader.ptrs[5] + reader.sizes[5]
    data[start:end] = bytes(end - start)
    (tmp_path / "bad.beton").write_bytes(data)
    code = IN_FFCV.replace("plain = ", "plain = [range(8)] * 2 #")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bad.beton", tmp_path / "x.npz",
                           "2", "ffcv"], timeout=240, cwd=HERE, capture_output=True, text=True)
    assert done.returncode != 0 and "sample 5 is damaged" in done.stderr


@pytest.mark.soak
def test_loader_renews_kernels_of_another_version(tmp_path):
    """A process killed while it renews numba's cache leaves no old kernel to the new source."""
    source = (HERE / "essl_loader.py").read_text()
    shown = ("import essl_loader as e; "
             "exec('with e.kernel_cache(e.uniform): print(e.uniform(0, 0, 0, 0))')")
    killed = ("import os, numba.core.caching as c; "
              "c.IndexDataCacheFile._save_data = lambda *_: os._exit(7); " + shown)

    def run(code):
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                              text=True)
    (tmp_path / "essl_loader.py").write_text(source)
    first = float(run(shown).stdout)
    (tmp_path / "essl_loader.py").write_text(source.replace("2.0 ** -53", "2.0 ** -54"))
    assert run(killed).returncode == 7
    assert float(run(shown).stdout) == first / 2 == float(run(shown).stdout)


@pytest.mark.soak
def test_soak_thousand_epochs_of_loaders(beton):
    """A loader per epoch for 1,000 epochs, two at a time: no thread, file or memory stays."""
    states = []
    for epoch in range(1000):
        with (ESSLLoader(beton[0], 8, res=48, num_workers=2) as a,
              ESSLLoader(beton[0], 8, res=32, num_workers=2) as b):
            a.set_epoch(epoch)
            assert sum(len(x) for (x, _), _ in zip(a, b)) == 40
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
        states.append((threading.active_count(), len(os.listdir("/proc/self/fd")), resident))
    assert states[-1][:2] == states[50][:2] and states[-1][2] - states[50][2] < 30e6


def damage(rng, whole, reader, i, kind):
    """A .beton file, wrong in one of seven ways: 0 to 3 anywhere, 4 to 6 in sample i's JPEG."""
    data = bytearray(whole)
    row = 24 + 2 * 1041 + 24 * int(rng.integers(reader.num_samples))
    other = 24 + 2 * 1041 + 24 * int(rng.integers(reader.num_samples))
    at = int(reader.ptrs[i])
    size = int(reader.sizes[i])
    if kind == 0:  # bits anywhere
        for byte in rng.integers(len(data), size=int(rng.integers(1, 40))):
            data[byte] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[int(rng.integers(len(data))):]
    elif kind == 2:  # fields swapped
        data[row:row + 13], data[other:other + 13] = data[other:other + 13], data[row:row + 13]
    elif kind == 3:  # hostile numbers in header, samples and allocation table
        end = int.from_bytes(data[16:24], "little")
        places = [rng.integers(24), row + rng.integers(24), rng.integers(end, len(data))]
        place = int(rng.choice(places))
        value = int(rng.choice([0, 1, 255, 65535, 2 ** 31, 2 ** 63 - 1, len(data)]))
        value += int(rng.integers(-2, 3))
        data[place:place + 8] = (value % 2 ** 64).to_bytes(8, "little")
        del data[len(whole):]
    elif kind == 4:  # valid tables, bits of one JPEG
        for byte in rng.integers(size, size=int(rng.integers(1, 30))):
            data[at + byte] ^= 1 << int(rng.integers(8))
    elif kind == 5:  # its header
        for byte in rng.integers(min(size, 700), size=int(rng.integers(1, 6))):
            data[at + byte] = int(rng.integers(256))
    else:  # its end, or a part, missing
        byte = int(rng.integers(size))
        tail = bytes(size - byte) if rng.random() < 0.5 else rng.bytes(size - byte)
        data[at + byte:at + size] = tail
    return data


def crop_of(reader, i, box, guard=None):
    """(code, 48 x 48 pixels) of a box of sample i; guard: a function that makes the memory."""
    make = guard or (lambda n: np.zeros(n, np.uint8))
    data = reader.read(i)
    sizes = np.array([[len(data)], [reader.widths[i]], [reader.heights[i]]])
    memory, scratch = essl_loader.make_scratch(*sizes, 48)
    parts = {}
    if guard:  # each part ends where memory does: fields are addresses in order
        names = scratch._fields[:scratch._fields.index("end")]
        ends = [getattr(scratch, name) for name in (*names[1:], "end")]
        parts = {name: make(end - getattr(scratch, name)) for name, end in zip(names, ends)}
        scratch = scratch._replace(**{name: part.ctypes.data for name, part in parts.items()})
    stored = make(len(data))
    stored[:] = np.frombuffer(data, np.uint8)
    out = make(48 * 48 * 3)
    code = essl_loader.resized_crop(
        stored.ctypes.data, len(data), int(reader.modes[i]), int(reader.widths[i]),
        int(reader.heights[i]), *box, 48, True, False, out.ctypes.data, scratch)
    return code, out.reshape(48, 48, 3).astype(int)


def guarded(n):
    """n bytes whose end is the end of readable memory: SIGSEGV for whoever touches the next."""
    room = -(-n // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(4096), 0) == 0
    return np.frombuffer(memory, np.uint8, n, room - n)


def fuzz(whole_path, out, first, count, guard):
    """In a process of its own: opens and reads damaged copies; SIGALRM ends one after 10 s."""
    whole = BetonReader(whole_path)
    tally = {"refused": 0, "read": 0, "bad": 0, "good": 0, "unlike": []}
    for number in range(first, first + count):
        path = Path(out) / f"{number}.beton"
        rng = np.random.default_rng(number)
        kind = number % 7
        path.write_bytes(damage(rng, Path(whole_path).read_bytes(), whole, number // 7 % 40, kind))
        signal.alarm(10)
        with contextlib.suppress(DataError):
            reader = BetonReader(path)
            tally["read"] += 1
            for i in range(reader.num_samples):
                if kind > 3 and i != number // 7 % 40:
                    continue
                box = random_box(int(reader.widths[i]), int(reader.heights[i]), (0.2, 1.0),
                                 (3 / 4, 4 / 3), number, 0, i)
                code, found = crop_of(reader, i, box, guarded if guard else None)
                tally["good" if code == 0 else "bad"] += 1
                with contextlib.suppress(DataError):  # damaged, perhaps outside of the crop
                    exact = Image.fromarray(reader.image(i, box))
                    exact = exact.resize((48, 48), Image.Resampling.BICUBIC)
                    off = np.abs(np.asarray(exact).astype(int) - found).mean()
                    if code == 0 and off > 6:  # noise has sharp chroma, upsampled in another way
                        tally["unlike"].append((number, i, off))
            with contextlib.suppress(DataError), ESSLLoader(path, 4, train=False, res=48) as loader:
                list(loader)
        tally["refused"] = number + 1 - first - tally["read"]
        signal.alarm(0)
        path.unlink()
    print(json.dumps(tally))


@pytest.mark.soak
@pytest.mark.parametrize("guard, count", [(False, 5000), (True, 2000)])
def test_soak_damaged_files(beton, tmp_path, guard, count):
    """No crash, no hang, all memory kept: a clear error, or the pictures of libjpeg-turbo."""
    total = {"refused": 0, "read": 0, "bad": 0, "good": 0, "unlike": []}
    for first in range(0, count, 250):
        code = f"import {__name__} as t; t.fuzz({str(beton[0])!r}, {str(tmp_path)!r}, {first}, 250, {guard})"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              text=True, timeout=2600)
        assert done.returncode == 0, (sorted(tmp_path.iterdir()), done.stderr[-2000:])
        tally = json.loads(done.stdout.splitlines()[-1])
        total = {key: value + tally[key] for key, value in total.items()}
    print(total)
    assert total["refused"] > count // 10 and total["read"] > count // 10 and total["bad"] > 50
    assert len(total["unlike"]) <= 2e-4 * total["good"], total["unlike"]


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
    assert [[s[0] for s in tune[k]] for k in ("s1", "s1-", "s1+", "s3")] == [[160, 192, 224]] * 4
    assert [[s[1] for s in tune[k]] for k in ("s1", "s1-", "s1+", "s3")] == [
        ["3aug", "3aug", "3aug+"], ["3aug"] * 3, ["3aug+"] * 3, ["3aug", "3aug", "3aug+"]]
    assert [s[3] for s in tune["s3"]] == [0.68, 0.84, 1.0]
    assert all(round(s[2], 2) == 0.28 for s in sum(tune.values(), ()))
    assert schedules.stage_starts(800, schedules.PRETRAIN_STAGES) == [0, 200, 400]
    assert schedules.stage_starts(100, schedules.FINETUNE_STAGES) == [0, 30, 60]
    kept = {(224, .75): 49, (192, .75): 36, (160, .75): 25, (160, .5): 50, (192, .66): 48,
            (192, .8): 28, (224, .85): 29, (160, .9): 10}
    for (resolution, mask_ratio), k in kept.items():
        assert models_mae.num_kept((resolution // 16) ** 2, mask_ratio) == k


def test_schedules_stage_at_is_pure_and_takes_any_number_of_stages():
    """Epochs land in their stage; resolutions scale to whole patches; other counts are refused."""
    shares = schedules.PRETRAIN_STAGES
    found = [schedules.stage_at(schedules.PRETRAIN_SCHEMES["s5"], e, 800, shares)
             for e in (0, 199, 200, 399, 400, 799)]
    assert found == [(0, (224, 0.75))] * 2 + [(1, (192, 0.75))] * 2 + [(2, (224, 0.75))] * 2
    small = [schedules.stage_at(schedules.PRETRAIN_SCHEMES["s2"], e, 4, shares, 64, 8)[1][0]
             for e in range(4)]
    assert small == [48, 56, 64, 64]
    four = ((224, 0.75),) * 4
    found = [schedules.stage_at(four, e, 8, (0.25,) * 4)[0] for e in range(8)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]
    for bad in (shares, (0.5, 0.5, 0.5, 0.5)):
        with pytest.raises(ValueError, match="stage"):
            schedules.stage_at(four, 0, 8, bad)


def test_schedules_equations_hold_under_sampling():
    """Equations 1 to 3 against a million draws of what they are expectations of."""
    rng = np.random.default_rng(9)
    for low, high, resolution in ((0.28, 1.0, 224), (0.28, 0.68, 160), (0.45, 1.0, 192)):
        sigma = np.sqrt(rng.uniform(low ** 2, high ** 2, 1_000_000))
        assert abs(schedules.perceptual_ratio(low, high) - sigma.mean()) < 1e-3
        apparent = schedules.apparent_size(resolution, low, high)
        assert abs(apparent - resolution / sigma.mean()) < 0.5
    noise = torch.rand(2000, 144, generator=torch.Generator().manual_seed(0))
    visible = (noise.argsort(1).argsort(1) < 48).view(-1, 12, 12).sum(2).float()  # in each row
    expected = (visible * 16 / 192).mean().item()
    assert abs(schedules.masked_perceptual_ratio(192, 0.66) - expected) < 1e-3


def test_schedules_learning_rate():
    """Linear from 0 to the peak over the warm-up, then half a cosine to the floor."""
    rates = [schedules.lr_at(s, 1000, 100, 2.0, 0.5) for s in range(1001)]
    assert (rates[0], rates[50], rates[100]) == (0, 1.0, 2.0)
    assert rates[550] == pytest.approx(1.25) and rates[1000] == pytest.approx(0.5)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_schedules_prints_flops_and_hours():
    """A line for each scheme; hours are epochs x pictures x FLOPs over FLOP/s, for any depth."""
    done = run("schedules.py", "--tflops", 400, "--gpus", 2, "--epochs", 100, "--hours", 3,
               "--decoder-depth", 2, "--repeat", 2)
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(schedules.PRETRAIN_SCHEMES)
    flops = models_mae.flops_per_image(224, 0.75, decoder_depth=2)
    hours = 100 * 1_281_167 * 2 * flops / 400e12 / 2 / 3600
    assert f"{hours:.2f} h" in lines[0] and "1.00 x fixed" in lines[0] and "3 h" in lines[0]


# --- models_mae
def reference_mae(p, imgs, noise, mask_ratio, settings):
    """MAE in plain loops: (loss, pred, mask) of one batch, parameters by official name."""
    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()
        return x * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def block(x, name, heads):
        qkv = linear(norm(x, name + ".norm1"), name + ".attn.qkv")
        outs = []
        for h in range(heads):
            d = x.shape[1] // heads
            q, k, v = (qkv[:, i * x.shape[1] + h * d:][:, :d] for i in range(3))
            weights = (q @ k.T / math.sqrt(d)).exp()
            outs.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + linear(torch.cat(outs, 1), name + ".attn.proj")
        hidden = linear(norm(x, name + ".norm2"), name + ".mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + linear(hidden, name + ".mlp.fc2")
    s = settings["patch_size"]
    preds, masks, losses = [], [], []
    for image, u in zip(imgs, noise):
        grid = image.shape[1] // s
        corners = itertools.product(range(0, s * grid, s), repeat=2)
        patches = torch.stack([image[:, y:y + s, x:x + s].permute(1, 2, 0).reshape(-1)
                               for y, x in corners])
        L = grid ** 2
        kept = sorted(range(L), key=lambda i: u[i])[:int(round(L * (1 - mask_ratio), 6))]
        tokens = [p["cls_token"][0, 0] + p["pos_embed"][0, 0]]
        for i in kept:
            pixels = patches[i].reshape(s, s, 3).permute(2, 0, 1)
            token = (p["patch_embed.proj.weight"] * pixels).sum((1, 2, 3))
            tokens.append(token + p["patch_embed.proj.bias"] + p["pos_embed"][0, 1 + i])
        x = torch.stack(tokens)
        for d in range(settings["depth"]):
            x = block(x, f"blocks.{d}", settings["num_heads"])
        x = linear(norm(x, "norm"), "decoder_embed")
        rows = [p["mask_token"][0, 0]] * L
        for i, token in zip(kept, x[1:]):
            rows[i] = token
        x = torch.stack([x[0], *rows]) + p["decoder_pos_embed"][0]
        for d in range(settings["decoder_depth"]):
            x = block(x, f"decoder_blocks.{d}", settings["decoder_num_heads"])
        pred = linear(norm(x, "decoder_norm"), "decoder_pred")[1:]
        for i in set(range(L)) - set(kept):
            target = patches[i]
            if settings["norm_pix_loss"]:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            losses.append(((pred[i] - target) ** 2).mean())
        preds.append(pred)
        masks.append([0.0 if i in kept else 1.0 for i in range(L)])
    return sum(losses) / len(losses), torch.stack(preds), torch.tensor(masks)


def small_mae(**settings):
    torch.manual_seed(0)
    return models_mae.MaskedAutoencoderViT(32, 8, 24, 2, 3, 16, 2, 2, **settings).double()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_models_forward_and_gradients_equal_a_plain_reference(norm_pix_loss):
    """Loss, prediction, mask and every gradient agree with float64 formulas to 1e-5."""
    model = small_mae(norm_pix_loss=norm_pix_loss)
    imgs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16)
    loss, pred, mask = model(imgs, 0.7, noise)
    loss.backward()
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad)
              for k, v in model.named_parameters()}
    expected = reference_mae(leaves, imgs, noise, 0.7, model.settings)
    expected[0].backward()
    assert torch.equal(mask, expected[2].double()) and mask.sum(1).tolist() == [12] * 3
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(pred, expected[1], rtol=1e-5, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-9)


def test_models_inputs():
    """uint8 is normalised as by torchvision; float within [0, 1] is warned of; mask ratio 0 is a
    loss over all patches; ratios outside of [0, 1) and odd sizes are refused."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    noise = torch.rand(2, 16)
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    floats = (imgs / 255 - mean) / std
    torch.testing.assert_close(model(imgs, noise=noise)[0], model(floats, noise=noise)[0])
    torch.testing.assert_close(model.unpatchify(model.patchify(floats)), floats)
    with pytest.warns(UserWarning, match="normalise"):
        model(imgs / 255)
    loss, pred, mask = model(floats, 0.0, noise)
    target = model.patchify(floats)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, ((pred - target) ** 2).mean())
    for bad in (dict(mask_ratio=1.0), dict(mask_ratio=-0.1), dict(imgs=floats[..., :30, :30])):
        with pytest.raises(ValueError, match="mask ratio|patches"):
            model(**{"imgs": floats, **bad})


def test_models_position_tables():
    """The native grid is the published formula; at 160 it is resampled smoothly as by Pillow."""
    model = models_mae.mae_vit_tiny_patch16()
    table = model.pos_embed[0]
    omega = 1 / 10000 ** (np.arange(48) / 48)
    for row, column in ((0, 0), (3, 11), (13, 13)):
        expected = np.concatenate([np.sin(column * omega), np.cos(column * omega),
                                   np.sin(row * omega), np.cos(row * omega)])
        assert np.allclose(table[1 + 14 * row + column], expected, atol=1e-6)
    assert torch.equal(table[0], torch.zeros(192)) and not model.pos_embed.requires_grad
    smaller = models_mae.resample_abs_pos_embed(model.pos_embed, [10, 10])
    channel = Image.fromarray(table[1:, 5].reshape(14, 14).numpy())
    expected = np.asarray(channel.resize((10, 10), Image.Resampling.BICUBIC))
    assert np.abs(smaller[0, 1:, 5].numpy().reshape(10, 10) - expected).max() < 2e-3
    assert model(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))[0].isfinite()


def test_models_state_dict_is_the_official_one():
    """Official names and shapes for B; parameters of B, L, H as published (111.9, 329.5, 657 M)."""
    with torch.device("meta"):
        model = models_mae.mae_vit_base_patch16()
        counts = [sum(p.numel() for p in build().parameters()) / 1e6 for build in (
            models_mae.mae_vit_base_patch16, models_mae.mae_vit_large_patch16,
            models_mae.mae_vit_huge_patch14)]
    expected = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "mask_token": (1, 1, 512),
                "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
                "norm.weight": (768,), "norm.bias": (768,), "decoder_embed.weight": (512, 768),
                "decoder_embed.bias": (512,), "decoder_pos_embed": (1, 197, 512),
                "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
                "decoder_pred.weight": (768, 512), "decoder_pred.bias": (768,)}
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for prefix, width, depth in (("blocks", 768, 12), ("decoder_blocks", 512, 8)):
        for i in range(depth):
            for name, (rows, columns) in layers.items():
                expected[f"{prefix}.{i}.{name}.weight"] = (rows * width, columns * width)
                expected[f"{prefix}.{i}.{name}.bias"] = (rows * width,)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                expected[f"{prefix}.{i}.{name}"] = (width,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert [round(count, 1) for count in counts] == [111.9, 329.5, 657.1]


def test_models_decoder_keep_is_the_full_decoder_on_a_share():
    """At 0.5 half of the removed patches, as the decoder reconstructs those tokens alone."""
    model = small_mae()
    imgs = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16)
    loss, pred, mask = model(imgs, 0.7, noise, decoder_keep=0.5)
    latent, removed, _ = model.forward_encoder(imgs, 0.7, noise)
    assert mask.sum(1).tolist() == [6] * 3 and (mask <= removed).all()
    for b, order in enumerate(noise.argsort(1).tolist()):
        x = model.decoder_embed(latent[b])
        rows = dict(zip(order[:4], x[1:])) | {i: model.mask_token[0, 0] for i in order[4:10]}
        tokens = torch.stack([x[0]] + [rows[i] for i in sorted(rows)])
        x = (tokens + model.decoder_pos_embed[0, [0] + [1 + i for i in sorted(rows)]])[None]
        for block in model.decoder_blocks:
            x = block(x)
        decoded = dict(zip(sorted(rows), model.decoder_pred(model.decoder_norm(x))[0, 1:]))
        for i in order[4:10]:  # 4 kept, 6 of the 12 removed
            torch.testing.assert_close(pred[b, i], decoded[i])


@pytest.mark.parametrize("size, depth", [("tiny", 4), ("base", 8), ("base", 2)])
def test_models_flops_equal_torchs_counter(size, depth):
    """To the last operation, at all stages, depths and with half of the removed patches decoded."""
    with torch.device("meta"):
        model = getattr(models_mae, f"mae_vit_{size}_patch16")(decoder_depth=depth)
    stages = {stage for scheme in schedules.PRETRAIN_SCHEMES.values() for stage in scheme}
    for res, mask_ratio in sorted(stages):
        imgs = torch.zeros(2, 3, res, res, dtype=torch.uint8, device="meta")
        noise = torch.zeros(2, (res // 16) ** 2, device="meta")
        for keep in (1.0, 0.5) if res == 160 else (1.0,):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(imgs, mask_ratio, noise, keep)[0].backward()
            ours = models_mae.flops_per_image(res, mask_ratio, keep, **model.settings)
            assert 2 * ours == counter.get_total_flops()


def test_models_reconstruct_shows_what_the_encoder_saw():
    """Original pixels, kept patches alone, and a reconstruction that has them; in true colours."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_nano_patch8(img_size=32).eval()
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    noise = torch.arange(16.0).expand(2, 16)  # the first four patches stay: the top row
    original, visible, reconstruction = model.reconstruct(imgs, 0.75, noise)
    torch.testing.assert_close(original, imgs / 255, atol=1e-5, rtol=0)
    torch.testing.assert_close(visible[..., :8, :], original[..., :8, :])
    gray = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(2, 3, 24, 32)
    torch.testing.assert_close(visible[..., 8:, :], gray, atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction[..., :8, :], original[..., :8, :])
    lower = reconstruction[..., 8:, :]  # of an untrained model: about each patch's own colours
    assert (lower.mean() - (imgs[..., 8:, :] / 255).mean()).abs() < 0.05 and lower.std() > 0.1


def test_models_encoder_loads_from_every_source(tuned, tmp_path):
    """Ours, official and timm's files, also .safetensors, give the features of their model."""
    from safetensors.torch import save_file
    root, mae = tuned
    state = mae.state_dict()
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    torch.save({"model": state}, tmp_path / "official.pth")
    torch.save(encoder, tmp_path / "timm.pth")
    save_file(encoder, tmp_path / "timm.safetensors")
    imgs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    large = imgs.repeat(1, 1, 2, 2)[..., :48, :48]
    for path in (root / "mae.pt", *tmp_path.iterdir()):
        weights, ckpt_settings, _ = read_weights(path)
        ckpt_settings.setdefault("num_heads", 4)
        vit = ViT(vit_settings(None, ckpt_settings, path), 32, 0, pool="mean").eval()
        load_into(vit, weights, path)
        for pictures in (imgs, large):
            assert torch.allclose(vit(pictures), mae.features(pictures), atol=1e-5), path
    noise = torch.rand(2, 16)
    assert torch.equal(load_mae(root / "mae.pt")(imgs, noise=noise)[1], mae(imgs, noise=noise)[1])
    torch.manual_seed(1)
    official = models_mae.mae_vit_tiny_patch16()  # head counts are not in the file
    torch.save({"model": official.state_dict()}, tmp_path / "tiny.pth")
    with pytest.raises(WeightsError, match="decoder"):
        load_mae(tmp_path / "timm.pth")
    assert load_mae(tmp_path / "tiny.pth", decoder_num_heads=4).settings == official.settings


def test_models_say_what_does_not_fit(tuned, tmp_path):
    """A missing, unknown or misshaped tensor is named; another head count or patch size too."""
    root, _ = tuned
    weights, ckpt_settings, _ = read_weights(root / "mae.pt")
    vit = ViT(vit_settings(None, ckpt_settings, ""), 32, 3)
    fresh = ("fc_norm.", "head.")
    missing = {k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"}
    unknown = weights | {"blocks.0.gamma": weights["cls_token"]}
    misshaped = weights | {"cls_token": torch.zeros(1, 1, 64)}
    for changed, word in ((missing, "Missing key.*blocks.1.mlp.fc2.bias"),
                          (unknown, "Unexpected key.*gamma"), (misshaped, "size mismatch.*cls_token")):
        with pytest.raises(WeightsError, match=word):
            load_into(vit, changed, "x", fresh)
    for change, name, word in ((dict(depth=6, num_heads=2), "vit_nano_patch8", "num_heads 2 there"),
                               ({}, "vit_tiny_patch16", "patch_size 8 there, 16")):
        with pytest.raises(WeightsError, match=word):
            vit_settings(name, ckpt_settings | change, "x")
    torch.save({"model": {"head.weight": torch.zeros(3, 3)}}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"no")
    for name, word in (("x.pth", "no encoder"), ("y.pth", "y.pth"), ("z.pth", "No such file")):
        with pytest.raises(WeightsError, match=word):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("num_classes", [1000, 0, 7])
def test_models_export_is_timms(tmp_path, num_classes):
    """timm loads the export strictly for any number of classes and computes the same features."""
    import timm
    torch.manual_seed(0)
    mae = models_mae.mae_vit_tiny_patch16().eval()
    torch.save({"model": mae.state_dict()}, tmp_path / "a.pt")
    run("models_mae.py", "--export-timm", tmp_path / "a.pt", tmp_path / "b.pth", "--num-classes",
        num_classes)
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "b.pth"),
                            num_classes=num_classes).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = vit.forward_features(x)[:, 1:].mean(1)
    assert torch.allclose(features, mae.features(x), atol=1e-5)


# --- bench_loader
BENCH = ("--images", 48, "--batch-size", 16, "--passes", 1, "--res", 48)


@pytest.fixture(scope="session")
def bench(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    done = run("bench_loader.py", "--data", folder / "train.beton", "--data_dir", folder / "train",
               "--json", root / "b.json", "--plot", root / "b.png", "--img-s", 1000, *BENCH)
    return root, json.loads((root / "b.json").read_text()), done.stdout


def test_bench_sections(bench):
    """Each section is measured and drawn; rates are consistent, pixel differences are small."""
    root, data, out = bench
    assert out.startswith(data["hardware"]) and out.rstrip().endswith("b.png")
    rows = {row["name"]: row for row in data["alternatives"]}
    assert {"image folder", "ESSL bilinear", "ESSL", "ESSL views=2", "ESSL 4:4:4"} <= set(rows)
    for row in rows.values():
        assert row["passes"] == [row["images_s"]] and row["memory_MB"] > 0, row
        assert row["cores_for_1000"] == pytest.approx(1000 / row["per_core"])
    size = {row["name"]: row["bytes_an_image"] for row in data["compression"]}
    assert size["500_100"] > size["500_95"] > size["500_90"]
    assert all(0 < row["mean_difference"] < 0.05 for row in data["pixels"])
    assert (root / "b.png").exists() and (root / "b_pixels.png").exists()


def test_bench_ffcv(bench):
    """FFCV to itself is 1, and the five steps are measured for both."""
    pytest.importorskip("ffcv")
    ratios = {row["name"]: row["x FFCV"] for row in bench[1]["alternatives"]}
    assert ratios["FFCV"] == 1 and len(bench[1]["decomposition"]) == 10


def test_bench_says_what_is_missing(folder, tmp_path):
    """Without a folder and ffcv, a line names each thing left out; the rest is measured."""
    (tmp_path / "ffcv.py").write_text("raise ImportError('no ffcv here')")
    run("bench_loader.py", "--data", folder / "train.beton", "--json", tmp_path / "b.json",
        "--plot", tmp_path / "b.png", *BENCH, env={"PYTHONPATH": str(tmp_path)})
    data = json.loads((tmp_path / "b.json").read_text())
    assert len(data["alternatives"]) == 3  # ESSL, bilinear, two views
    for what in ("image folder", "FFCV", "ESSL 4:4:4", "decode: FFCV", "pixels", "500_90"):
        assert any(line.startswith(what) for line in data["left_out"]), what


# --- pretrain
TINY = ["--model", "mae_vit_nano_patch8", "--input-size", "32", "--total-batch", "16",
        "--batch-size", "8", "--epochs", "4", "--warmup-epochs", "1", "--blr", "4e-3",
        "--num-workers", "2", "--viz-every", "2"]


def data_flags(folder):
    return ["--data", folder / "train.beton", "--val-data", folder / "val.beton"]


def train(script, *words):
    """A script's main in this process -> its exit code."""
    try:
        script.main(script.get_args([str(word) for word in words]))
    except SystemExit as e:
        assert isinstance(e.code, int), e.code
        return e.code
    return 0


def pretrain_here(folder, out, *words):
    return train(pretrain, *data_flags(folder), "--output-dir", out, *TINY, *words)


def stop_at(patch, script, *calls):
    """A signal arrives while the script computes the learning rate of these steps."""
    counter = itertools.count()
    lr_at = schedules.lr_at

    def signalled(*args):
        if next(counter) in calls:
            signal.raise_signal(signal.SIGUSR1)
        return lr_at(*args)
    patch.setattr(script, "lr_at", signalled)


def log_of(out):
    """The lines of log.jsonl, the last one of a step, as {step: values}."""
    return {line["step"]: line for line in map(json.loads, (out / "log.jsonl").open())}


def same_end(a, b):
    """Whether two runs ended with the same weights and moments, bit for bit."""
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    moments = [s["optimizer"]["state"] for s in (a, b)]
    same_moments = all(torch.equal(v, moments[1][i][k]) for i in moments[0]
                       for k, v in moments[0][i].items() if torch.is_tensor(v))
    weights = [s.get("modules") or s["head"] for s in (a, b)]
    return a["step"] == b["step"] and same_moments and all(
        torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.fixture(scope="session")
def unbroken(folder, tmp_path_factory):
    """The tiny run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert pretrain_here(folder, out) == 0
    return out


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
    names = {path.name for path in unbroken.iterdir()}
    assert {"args.json", "last.pt", "stage1.pt", "stage2.pt", "recon_0002.png",
            "recon_0004.png"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.parametrize("words", [[], ["--repeat", 2]])
def test_pretrain_killed_and_resumed_is_bit_identical(folder, unbroken, tmp_path, words):
    """Stopped in the middle of an epoch, killed, stopped at an epoch's end: the unbroken bits."""
    whole = unbroken
    if words:
        whole = tmp_path / "whole"
        assert pretrain_here(folder, whole, *words) == 0
    for calls in ((5,), (1,)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, pretrain, *calls)
            assert pretrain_here(folder, tmp_path / "cut", *words) == 1
    words += [*data_flags(folder), "--output-dir", tmp_path / "cut", *TINY]
    killed = subprocess.Popen(command("pretrain.py", *words), stdout=subprocess.PIPE, text=True)
    next(line for line in killed.stdout if line.startswith("epoch 3"))
    killed.kill()
    killed.wait()
    run("pretrain.py", *words)
    assert same_end(tmp_path / "cut", whole)
    ours, expected = log_of(tmp_path / "cut"), log_of(whole)
    assert ours[16]["loss"] == expected[16]["loss"]
    assert ours[16]["probe_top1"] == expected[16]["probe_top1"]


@pytest.mark.parametrize("repeat", [1, 2])
def test_pretrain_same_update_however_it_is_cut(folder, tmp_path, repeat):
    """64 masked pictures at once, 4 x 16, or two ranks of 2 x 16: the gradient within 1e-6.

    Adam's first moment after a step is 0.1 gradient; its update is a sign where the gradient is
    only rounding, so weights are compared where it is more.
    """
    def first_step(batch_size, ranks):
        out = tmp_path / f"{batch_size}-{ranks}"
        words = ["--probe", "off", "--max-steps", 1, "--total-batch", 64, "--batch-size", batch_size,
                 "--repeat", repeat, "--warmup-epochs", 0]
        if ranks == 1:
            assert pretrain_here(folder, out, *words) == 0
        else:
            words = [*data_flags(folder), "--output-dir", out, *TINY, *words]
            run("pretrain.py", *words, ranks=ranks)
        state = torch.load(out / "last.pt", weights_only=True)
        names = [k for k in state["modules"] if not k.endswith("pos_embed")]
        order = sorted(names, key=lambda k: state["modules"][k].ndim > 1)  # as timm: vectors first
        moments = state["optimizer"]["state"]
        return {k: (moments[i]["exp_avg"] * 10, state["modules"][k]) for i, k in enumerate(order)}
    expected = first_step(64, 1)
    assert len(expected) > 90
    for batch_size, ranks in ((16, 1), (16, 2)):
        for k, (gradient, weight) in first_step(batch_size, ranks).items():
            assert (gradient - expected[k][0]).abs().max() < 1e-6, (batch_size, ranks, k)
            clear = expected[k][0].abs() > 1e-4
            assert not clear.any() or (weight - expected[k][1])[clear].abs().max() < 1e-6


def test_pretrain_skips_a_step_that_is_not_finite(folder, tmp_path, monkeypatch):
    """A NaN gradient at one step changes nothing: the bits of a run that leaves that step out."""
    forward = pretrain.ModelWithProbe.forward
    for name, factor in (("nan", math.nan), ("inf", math.inf)):
        calls = itertools.count()
        monkeypatch.setattr(pretrain.ModelWithProbe, "forward", lambda self, *args: tuple(
            loss * (factor if next(calls) == 20 else 1) for loss in forward(self, *args)))
        assert pretrain_here(folder, tmp_path / name) == 0
        assert [line["skipped_steps"] for line in log_of(tmp_path / name).values()] == [0, 1, 1, 1]
    monkeypatch.setattr(pretrain.ModelWithProbe, "forward", forward)
    step = torch.optim.AdamW.step
    calls = itertools.count()

    def left_out(self, *args, **kwargs):
        return step(self, *args, **kwargs) if next(calls) != 5 else None
    monkeypatch.setattr(torch.optim.AdamW, "step", left_out)
    assert pretrain_here(folder, tmp_path / "left_out") == 0
    assert same_end(tmp_path / "nan", tmp_path / "left_out")
    assert same_end(tmp_path / "inf", tmp_path / "left_out")


def test_pretrain_ends_where_the_loss_stays_not_finite(folder, tmp_path):
    """An absurd rate ends with a message and code 1; no checkpoint holds weights of no number."""
    done = run("pretrain.py", *data_flags(folder), "--output-dir", tmp_path, *TINY, "--blr", "1e30",
               "--epochs", 8, code=1)
    assert "--blr" in done.stderr and "finite" in done.stderr
    for path in tmp_path.glob("*.pt"):
        modules = torch.load(path, weights_only=True)["modules"]
        assert all(v.isfinite().all() for v in modules.values())


def test_pretrain_full_disk_ends_and_goes_on(folder, unbroken, tmp_path):
    """Where a checkpoint cannot be written the run ends in words, last.pt stays whole, and with
    room again the same command ends with the unbroken bits."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, pretrain, 5)
        assert pretrain_here(folder, tmp_path) == 1
    before = (tmp_path / "last.pt").read_bytes()
    words = [*data_flags(folder), "--output-dir", tmp_path, *TINY]
    limit = resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2)
    done = run("pretrain.py", *words, code=1, preexec_fn=lambda: resource.setrlimit(*limit))
    assert "cannot be written: [Errno 27] File too large" in done.stderr
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run("pretrain.py", *words)
    assert same_end(tmp_path, unbroken)


def kill_a_rank(words, out, kills):
    """Two ranks under torchrun --standalone, one of them killed `kills` times -> exit code."""
    log = open(out.with_suffix(".txt"), "w")
    torchrun = subprocess.Popen(command("pretrain.py", *words, "--output-dir", out, ranks=2,
                                        restarts=kills), stdout=log, stderr=log)
    killed = []
    deadline = time.time() + 120 * (1 + kills)
    while torchrun.poll() is None and time.time() < deadline:
        time.sleep(0.3)
        tasks = Path(f"/proc/{torchrun.pid}/task").glob("*/children")
        pids = [int(pid) for task in tasks for pid in task.read_text().split()]
        ranks = [pid for pid in pids if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        training = (out / "last.pt").exists() and time.time() - os.stat(out / "log.jsonl").st_mtime < 1
        if len(killed) < kills and training and len(ranks) == 2 and ranks[0] not in killed:
            os.kill(ranks[len(killed) % 2], signal.SIGKILL)
            killed += ranks[:1]
    torchrun.kill()
    return torchrun.wait(), len(killed)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_pretrain_torchrun_restarts_after_a_killed_rank(folder, tmp_path, kills):
    """torchrun --standalone --max-restarts: the other rank ends, all go on from last.pt, and the
    end is the unbroken two ranks', bit for bit."""
    words = [*data_flags(folder), *TINY, "--epochs", 50 * (1 + kills), "--save-minutes", 0.002,
             "--viz-every", 1000, "--batch-size", 8]
    assert kill_a_rank(words, tmp_path / "cut", kills) == (0, kills)
    run("pretrain.py", *words, "--output-dir", tmp_path / "whole", ranks=2)
    assert same_end(tmp_path / "cut", tmp_path / "whole")


def test_pretrain_goes_on_on_another_number_of_ranks(folder, unbroken, tmp_path):
    """Stopped in mid-epoch on one process, finished on two: the same data and losses to rounding."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, pretrain, 5)
        assert pretrain_here(folder, tmp_path, "--probe", "off") == 1
    words = [*data_flags(folder), "--output-dir", tmp_path, *TINY, "--probe", "off"]
    run("pretrain.py", *words, ranks=2)
    ours, expected = log_of(tmp_path), log_of(unbroken)
    for step in (12, 16):
        assert ours[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)


def losses_of_20_steps(device, how):
    """Losses of 20 steps on random pictures: eager float32, compiled, or in bf16."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_nano_patch8(img_size=32)
    module = pretrain.ModelWithProbe(model, 4, "masked", 1.0).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    backend = "inductor" if device == "cuda" else "aot_eager"
    step = torch.compile(module, dynamic=False, backend=backend) if "compiled" in how else module
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8).to(device)
    labels = (torch.arange(16) % 4).to(device)
    losses = []
    for i in range(20):
        noise = torch.rand(16, 16, generator=torch.Generator().manual_seed(i)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in how):
            loss, mae_loss = step(images, labels, 0.75, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mae_loss.item())
    return losses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pretrain_compiled_and_bf16_agree_with_eager_float32(device):
    """20 steps from one seed: compiled to float32's rounding, bf16 to its own (2 ** -8)."""
    expected = losses_of_20_steps(device, "eager")
    assert expected[-1] < 0.9 * expected[0]
    assert losses_of_20_steps(device, "compiled") == pytest.approx(expected, rel=1e-3)
    assert losses_of_20_steps(device, "compiled bf16") == pytest.approx(expected, rel=2e-2)


@pytest.mark.cuda
def test_pretrain_on_cuda_keeps_its_memory_and_resumes(folder, tmp_path):
    """40 short epochs reserve no more memory at the end; stopped and resumed, the loss is close."""
    assert pretrain_here(folder, tmp_path / "whole", "--epochs", 40, "--no-compile") == 0
    log = list(log_of(tmp_path / "whole").values())
    assert log[-1]["mem"] == log[len(log) // 2]["mem"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, pretrain, 90)
        assert pretrain_here(folder, tmp_path / "cut", "--epochs", 40, "--no-compile") == 1
    assert pretrain_here(folder, tmp_path / "cut", "--epochs", 40, "--no-compile") == 0
    assert log_of(tmp_path / "cut")[160]["loss"] == pytest.approx(log[-1]["loss"], abs=1e-3)


def test_training_steps_keep_to_one_device():
    """A step of pretraining and finetuning and both augmentations on a CUDA device that is not
    there: a tensor left on the CPU is an error."""
    vit = ViT(size_of("vit_nano_patch8"), 32, 5)
    with FakeTensorMode():
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        with torch.device("cuda"):
            model = models_mae.mae_vit_nano_patch8(img_size=32)
            module = pretrain.ModelWithProbe(model, 5, "masked", 0.5)
            noise = models_mae.masking_noise((4, 16))
        assert module(images, labels, 0.75, noise)[0].device.type == "cuda"
        assert model.reconstruct(images).device.type == "cuda"
        augmented = finetune.gaussian_blur(images, torch.ones(4)).to(torch.uint8)
        tensors = dict(vit.named_parameters()) | dict(vit.named_buffers())
        tensors = {k: torch.empty(v.shape, device="cuda") for k, v in tensors.items()}
        scores = torch.func.functional_call(vit, tensors, (finetune.color_jitter(augmented),))
        votes = linprobe.knn_score(scores, scores, labels, 5)
        assert votes.device.type == finetune.luma(images).device.type == "cuda"


def test_pretrain_shows_a_changed_mask(folder, tmp_path, monkeypatch):
    """Replacing models_mae's masking changes the training and the pictures, in one place."""
    def top_half_stays(shape, generator=None, device=None):
        return torch.arange(float(shape[-1]), device=device).expand(shape)
    monkeypatch.setattr(models_mae, "masking_noise", top_half_stays)
    words = ["--epochs", 1, "--mask-ratio", 0.5, "--stages", 1, 0, 0]
    assert pretrain_here(folder, tmp_path, *words) == 0
    picture = np.asarray(Image.open(tmp_path / "recon_0001.png")).astype(int)
    upper, lower = picture[2:16, 36:66], picture[20:32, 36:66]  # as the encoder saw the first one
    assert np.ptp(lower, axis=(0, 1)).max() == 0 and np.ptp(upper, axis=(0, 1)).max() > 0


def test_pretrain_takes_what_users_have(folder, unbroken, tmp_path, monkeypatch):
    """A flat folder without a probe, the paper's probe, weights to start from, four stages, and a
    checkpoint from before a setting existed."""
    flat = ["--data", folder / "train/dark", "--epochs", 1]
    assert pretrain_here(folder, tmp_path / "flat", *flat) == 0
    assert "probe_top1" not in log_of(tmp_path / "flat")[2]
    assert pretrain_here(folder, tmp_path / "full", "--epochs", 1, "--probe", "full") == 0
    assert "probe_top1" in log_of(tmp_path / "full")[4]
    assert pretrain_here(folder, tmp_path / "init", "--init", unbroken / "last.pt", "--input-size",
                         48, "--epochs", 1, "--warmup-epochs", 0.01, "--blr", "1e-9") == 0
    assert log_of(tmp_path / "init")[4]["loss"] < log_of(tmp_path / "full")[4]["loss"]
    four = ((224, 0.75), (192, 0.5), (160, 0.5), (224, 0.9))
    monkeypatch.setitem(schedules.PRETRAIN_SCHEMES, "four", four)
    monkeypatch.setitem(schedules.PRETRAIN_SHARES, "four", (0.25, 0.25, 0.25, 0.25))
    assert pretrain_here(folder, tmp_path / "four", "--scheme", "four") == 0
    assert [line["stage"] for line in log_of(tmp_path / "four").values()] == [1, 2, 3, 4]
    state = torch.load(unbroken / "last.pt", weights_only=True)
    del state["settings"]["repeat"]
    old = tmp_path / "old"
    old.mkdir()
    torch.save(state, old / "last.pt")
    assert pretrain_here(folder, old) == 0


def test_pretrain_benchmark_reports_each_stage(folder, tmp_path):
    """Rows that follow from one another, without and with the loader; few pictures are repeated."""
    assert pretrain_here(folder, tmp_path, "--benchmark", 1, "--batch-size", 80, "--repeat", 2) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["res"], row["source"]) for row in rows] == [
        (32, "random"), (32, "loader"), (24, "random"), (24, "loader")]
    settings = models_mae.mae_vit_nano_patch8(img_size=32).settings
    for row in rows:
        flops = models_mae.flops_per_image(row["res"], row["mask_ratio"], **settings)
        assert row["tflops"] == pytest.approx(row["img_s"] * flops / 1e12)
        assert 0 <= row["data_wait"] < 1


def test_pretrain_refuses_in_words(folder, unbroken, tmp_path):
    """Missing or cut data, a bad flag, an unwritable folder, other settings, a damaged sample: one
    paragraph with the file and the remedy, one line of it for all ranks."""
    cut = tmp_path / "cut.beton"
    cut.write_bytes((folder / "train.beton").read_bytes()[:-100])
    data = bytearray((folder / "train.beton").read_bytes())
    reader = BetonReader(folder / "train.beton")
    data[reader.ptrs[5] + 200:reader.ptrs[5] + reader.sizes[5]] = bytes(reader.sizes[5] - 200)
    (tmp_path / "bad.beton").write_bytes(data)
    (tmp_path / "file").write_text("")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/last.pt").write_bytes(b"not a checkpoint")
    flags = [*data_flags(folder), *TINY, "--output-dir"]
    for words, code, expected in (
            (["--output-dir", tmp_path / "a"], 1, ["train_500_95.beton", "--demo"]),
            ([*flags, tmp_path / "b", "--data", cut], 1, ["cut.beton"]),
            ([*flags, tmp_path / "b", "--data", tmp_path / "bad.beton"], 1,
             ["bad.beton: sample 5", "--exclude-bad"]),
            ([*flags, tmp_path / "file/run"], 1, ["file"]),
            ([*flags, tmp_path / "b", "--total-batch", 200], 1, ["--total-batch 64"]),
            ([*flags, tmp_path / "b", "--input-size", 60], 2, ["60 pixels"]),
            ([*flags, tmp_path / "b", "--stages", .5, .5, .5], 2, ["--stages"]),
            ([*flags, tmp_path / "b", "--mask-ratio", 1.5], 2, ["--mask-ratio"]),
            ([*flags, unbroken, "--blr", "1e-3"], 1, ["blr: 0.004 there, 0.001 here"]),
            ([*flags, tmp_path / "d"], 1, ["d/last.pt", "--resume none"])):
        done = run("pretrain.py", *words, code=code, cwd=tmp_path)
        assert all(word in done.stderr for word in expected), done.stderr
    done = run("pretrain.py", *flags, tmp_path / "b", "--total-batch", 200, ranks=2, code=1)
    assert (done.stdout + done.stderr).count("This works") == 1


# --- finetune and linprobe
@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """train and val (3 classes, 48 and 13 pictures), other (4 classes), an untrained mae.pt."""
    root = tmp_path_factory.mktemp("tune")
    rng = np.random.default_rng(0)
    for name, classes, count in (("train", "abc", 48), ("val", "abc", 13), ("other", "abcd", 8)):
        for i in range(count):
            path = root / name / classes[i % len(classes)] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            noise.resize((48, 40), Image.Resampling.BICUBIC).save(path)
        run("build_beton.py", "--data-dir", root / name, "--out", root / f"{name}.beton")
    torch.manual_seed(0)
    mae = models_mae.mae_vit_nano_patch8(img_size=32, depth=2)
    torch.save({"modules": {f"model.{k}": v for k, v in mae.state_dict().items()},
                "model": mae.settings, "classes": list("abc")}, root / "mae.pt")
    return root, mae.eval()


def tune_flags(root):
    return ["--finetune", root / "mae.pt", *data_flags(root), "--epochs", 4, "--warmup-epochs", 1,
            "--total-batch", 16, "--batch-size", 8, "--num-workers", 2]


def probe_flags(root):
    return ["--checkpoint", root / "mae.pt", *data_flags(root), "--epochs", 4, "--warmup-epochs", 1,
            "--total-batch", 16, "--batch-size", 8, "--num-workers", 2]


@pytest.mark.parametrize("script, words", [(finetune, []), (linprobe, []),
                                           (linprobe, ["--cached"])])
def test_finetune_and_linprobe_resume_bit_identical(tuned, tmp_path, script, words):
    """Stopped in and at the end of an epoch, through all stages: the bits of the unbroken run."""
    flags = (tune_flags if script is finetune else probe_flags)(tuned[0]) + words
    assert train(script, *flags, "--output-dir", tmp_path / "whole") == 0
    for calls in ((1,), (3,), (2,)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, script, *calls)
            assert train(script, *flags, "--output-dir", tmp_path / "cut") == 1
    assert train(script, *flags, "--output-dir", tmp_path / "cut") == 0
    assert same_end(tmp_path / "cut", tmp_path / "whole")
    assert log_of(tmp_path / "cut")[12]["top1"] == log_of(tmp_path / "whole")[12]["top1"]
    assert train(script, *flags, "--output-dir", tmp_path / "cut") == 0  # finished already
    with pytest.raises(WeightsError, match="blr: .* there, 1.0 here"):
        train(script, *flags, "--output-dir", tmp_path / "cut", "--blr", 1)


def test_finetune_groups_follow_the_formula():
    """For ViT-B each parameter has lr 0.65^(13 - id) and decay as published; the head's init too."""
    model = ViT(size_of("vit_base_patch16"), 224, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = finetune.param_groups_layer_decay(model, 0.05, model.no_weight_decay(),
                                               layer_decay=0.65)
    ours = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {"cls_token": (0.65 ** 13, 0), "pos_embed": (0.65 ** 13, 0),
                "patch_embed.proj.weight": (0.65 ** 13, 0.05), "head.weight": (1, 0.05),
                "patch_embed.proj.bias": (0.65 ** 13, 0), "head.bias": (1, 0),
                "fc_norm.weight": (1, 0), "fc_norm.bias": (1, 0)}
    for i in range(12):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            decay = 0 if "norm" in layer else 0.05
            expected[f"blocks.{i}.{layer}.weight"] = (0.65 ** (12 - i), decay)
            expected[f"blocks.{i}.{layer}.bias"] = (0.65 ** (12 - i), 0)
    assert ours.keys() == expected.keys()
    assert all(ours[k] == pytest.approx(v) for k, v in expected.items())
    assert schedules.lr_at(100, 100, 5, 2e-3, finetune.MIN_LR) == pytest.approx(1e-6)
    assert 1.5e-5 < model.head.weight.std().item() < 2.5e-5


def test_finetune_stages_train_one_position_table():
    """At another resolution the gradient reaches the whole table, which keeps its shape."""
    vit = ViT(size_of("vit_nano_patch8"), 64, 3)
    before = vit.pos_embed.clone()
    torch.nn.init.normal_(vit.head.weight)
    vit(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert torch.equal(vit.pos_embed, before)
    assert (vit.pos_embed.grad[0].abs().sum(1) > 0).all()


def test_finetune_three_augment_is_pillows():
    """One of the three per picture, as Pillow does it, a third each over 10,000 draws."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (300, 24, 20, 3), dtype=np.uint8)
    pictures[::2] = np.where(pictures[::2] > 127, 255, 0)  # hard edges, where a blur shows most
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    out = finetune.three_augment(images, torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    choice = torch.randint(3, (300,), generator=draws).tolist()
    radius = (0.1 + 1.9 * torch.rand(300, generator=draws)).tolist()
    for i, picture in enumerate(map(Image.fromarray, pictures)):
        if choice[i] == 0:
            expected = ImageOps.grayscale(picture).convert("RGB")
        elif choice[i] == 1:
            expected = ImageOps.solarize(picture, 128)
        else:
            expected = picture.filter(ImageFilter.GaussianBlur(radius[i]))
        difference = out[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= (2, 0, 3)[choice[i]], (i, choice[i])
    white = torch.zeros(10_000, 3, 4, 4, dtype=torch.uint8)
    white[:, 0, :, :2] = 200  # grayscale: equal planes; solarize: 255 - 200 = 55; the blur neither
    kinds = finetune.three_augment(white, torch.Generator().manual_seed(0))
    grey = (kinds[:, 0] == kinds[:, 1]).flatten(1).all(1)
    solar = (kinds[:, 0, :, 0] == 55).all(1)
    shares = [kind.float().mean().item() for kind in (grey, solar, ~grey & ~solar)]
    assert not (grey & solar).any() and all(abs(share - 1 / 3) < 0.02 for share in shares)


def test_finetune_color_jitter_is_pillows():
    """Brightness, contrast, saturation by factors in (0.7, 1.3) equal Pillow's within 2 levels."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    out = finetune.color_jitter(images, torch.Generator().manual_seed(1))
    factors = 0.7 + 0.6 * torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    for i, picture in enumerate(map(Image.fromarray, pictures)):
        for name, factor in zip(("Brightness", "Contrast", "Color"), factors[:, i].tolist()):
            picture = getattr(ImageEnhance, name)(picture).enhance(factor)
        difference = out[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)
        assert np.abs(difference).max() <= 2


def test_finetune_eval_counts_each_picture_once(tuned, tmp_path, capsys):
    """13 pictures on two processes and on one give the same row for each set; a checkpoint of
    finetuning can be probed, and --benchmark times both augmentations."""
    root, _ = tuned
    assert train(finetune, *tune_flags(root), "--output-dir", tmp_path, "--epochs", 1, "--mixup", 0,
                 "--cutmix", 0) == 0
    words = ["--eval", "--resume", tmp_path / "best.pt", "--batch-size", 4, "--num-workers", 1]
    words += ["--val-data", root / "val.beton", root / "train", "--output-dir"]
    assert train(finetune, *words, tmp_path / "1") == 0
    run("finetune.py", *words, tmp_path / "2", ranks=2)
    rows = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert rows[0] == rows[1]
    first, second = map(json.loads, rows[0].splitlines())
    assert (first["n"], second["n"]) == (13, 48) and first["data"].endswith("val.beton")
    assert "top5" not in first and 0 <= first["top1"] <= 100
    assert train(linprobe, *probe_flags(root), "--checkpoint", tmp_path / "best.pt", "--knn",
                 "--output-dir", tmp_path / "knn") == 0
    words = ["--benchmark", 1, "--data", root / "train.beton", "--batch-size", 16]
    capsys.readouterr()
    assert train(finetune, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["RandAug", "3 Aug", "3 Aug"]


def test_finetune_refuses_other_data(tuned, tmp_path):
    """Labels beyond the head, other class names, a checkpoint without a head: said in words."""
    root, _ = tuned
    bare = tmp_path / "bare.beton"  # no sidecar: only the labels can tell
    bare.write_bytes((root / "other.beton").read_bytes())
    for val, word in ((bare, "labels 0 to 3"), (root / "other", "differ in d")):
        with pytest.raises(DataError, match=word):
            train(finetune, *tune_flags(root), "--output-dir", tmp_path, "--val-data", val)
    with pytest.raises(WeightsError, match="no classifier"):
        train(finetune, "--eval", "--resume", root / "mae.pt", "--output-dir", tmp_path)


def test_finetune_rand_augment_repeats(tuned):
    """RandAug through the folder loader changes the pictures, by (seed, epoch, sample) alone."""
    rand_augment = finetune.rand_augment_transform(*finetune.RAND_AUG)

    def pixels(workers, **kwargs):
        with FolderLoader(tuned[0] / "train", 16, res=32, num_workers=workers, **kwargs) as loader:
            return torch.cat([images for images, _ in loader])
    for _ in range(3000):  # the rarest draw is the one that fails
        rand_augment(Image.new("RGB", (8, 8)))
    assert torch.equal(pixels(1, transform=rand_augment), pixels(2, transform=rand_augment))
    assert not torch.equal(pixels(1, transform=rand_augment), pixels(1))


def test_linprobe_lars_is_the_formula():
    """Ten steps of the script's optimizer on a matrix and a vector equal LARS in plain lists,
    at weight decay 0 as published."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(4, 3))
    vector = torch.nn.Parameter(torch.randn(3))
    optimizer = linprobe.make_optimizer(matrix, vector, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    w, v = matrix.flatten().tolist(), vector.tolist()
    mw, mv = [0.0] * 12, [0.0] * 3
    for gradient in torch.randn(10, 15):
        matrix.grad = gradient[:12].view(4, 3).clone()
        vector.grad = gradient[12:].clone()
        optimizer.step()
        u = gradient[:12].tolist()
        trust = 0.001 * math.dist(w, [0] * 12) / math.dist(u, [0] * 12)
        mw = [0.9 * m + trust * a for m, a in zip(mw, u)]
        mv = [0.9 * m + a for m, a in zip(mv, gradient[12:].tolist())]
        w = [a - 0.5 * m for a, m in zip(w, mw)]
        v = [a - 0.5 * m for a, m in zip(v, mv)]
    assert matrix.flatten().tolist() == pytest.approx(w, rel=1e-5)
    assert vector.tolist() == pytest.approx(v, rel=1e-5)


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


def test_linprobe_stores_the_models_features(tuned, tmp_path):
    """On one rank and on two, all 13 pictures in order; kNN's result is the same."""
    root, mae = tuned
    loader = ESSLLoader(root / "val.beton", 4, train=False, res=32)
    vit = ViT(vit_settings(None, mae.settings, ""), 32, 0, pool="mean").eval()
    load_into(vit, mae.state_dict(), "")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
    features, labels = linprobe.store_features(vit, loader, autocast)
    expected = mae.features(torch.cat([images for images, _ in loader]))
    assert torch.allclose(features.float(), expected, atol=2e-3)
    assert labels.tolist() == loader.labels.tolist()
    words = [*probe_flags(root), "--knn", "--output-dir"]
    assert train(linprobe, *words, tmp_path / "1") == 0
    run("linprobe.py", *words, tmp_path / "2", ranks=2)
    results = [(tmp_path / name / "results.jsonl").read_text() for name in "12"]
    assert results[0] == results[1] and json.loads(results[0])["n"] == 13


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


# --- README
def test_readme_names_only_flags_that_exist():
    """Every flag that the README gives a script is one that the script documents."""
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"^\| `(\w+\.py)`", text, re.M):
        used = set(re.findall(r"--[a-z][a-z-]+", " ".join(re.findall(rf"{name}([^\n`]*)", text))))
        if used:
            known = set(re.findall(r"--[a-z][a-z-]+", run(name, "--help").stdout))
            assert used <= known, (name, used - known)
