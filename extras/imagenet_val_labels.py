"""Writes the labels of ImageNet's validation pictures as class names, from the official devkit.

    pip install scipy
    python extras/imagenet_val_labels.py ILSVRC2012_devkit_t12.tar.gz

The devkit gives each picture a number, in another order than that of the class folders; its
meta.mat says which class a number means. Each line of the new file holds a picture's name and its
class, as build_beton.py --labels takes them. Last line:
    written: val_labels.txt, 50,000 pictures in 1,000 classes
"""
import argparse
import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

try:
    from scipy.io import loadmat
except ImportError:
    raise SystemExit("imagenet_val_labels.py reads meta.mat with scipy: pip install scipy")

META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def read_devkit(path):
    """ILSVRC2012_devkit_t12.tar.gz -> the class name of each validation picture, in order"""
    files = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.split("/")[-1]
                if name in (META, TRUTH):
                    files[name] = tar.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise SystemExit(f"{path} is no whole archive ({e}). Download it again.")
    missing = [name for name in (META, TRUTH) if name not in files]
    if missing:
        raise SystemExit(f"{path} holds no {' and no '.join(missing)}. Give the file "
                         "ILSVRC2012_devkit_t12.tar.gz, as it was downloaded.")
    try:
        synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
    except (ValueError, KeyError) as e:
        raise SystemExit(f"{path}: {META} cannot be read ({e}). Download the devkit again.")
    classes = {}
    for row in synsets:
        if row["num_children"] == 0:  # the 1,000 classes; the rest are groups of them
            classes[int(row["ILSVRC2012_ID"])] = str(row["WNID"])
    labels = []
    for line, number in enumerate(files[TRUTH].decode().split(), start=1):
        if int(number) not in classes:
            raise SystemExit(f"{path}: picture {line} of {TRUTH} has the number {number}, and "
                             f"{META} has no such class. Download the devkit again.")
        labels.append(classes[int(number)])
    return labels


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("devkit", help="ILSVRC2012_devkit_t12.tar.gz")
    p.add_argument("--out", type=Path, default="val_labels.txt",
                   help="the file to write (default: val_labels.txt)")
    args = p.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} is already there. Remove it, or give another --out.")
    labels = read_devkit(args.devkit)
    tmp_path = args.out.with_name(f"{args.out.name}.tmp-{os.getpid()}")
    with open(tmp_path, "w") as file:
        for i, label in enumerate(labels, start=1):
            print(f"ILSVRC2012_val_{i:08} {label}", file=file)
    os.replace(tmp_path, args.out)
    print(f"written: {args.out}, {len(labels):,} pictures in {len(set(labels)):,} classes")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        raise SystemExit(f"imagenet_val_labels: {e}")
