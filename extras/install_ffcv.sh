#!/bin/sh
# Installs FFCV into the active environment: the tests and bench_loader.py compare with it.
#
#   . .venv/bin/activate && sh extras/install_ffcv.sh
#
# FFCV is compiled, so Debian's or Ubuntu's packages come first, as root or by sudo. Training needs
# none of this. Last line: that of python, e.g. `FFCV 1.0.2 is installed`
set -eu
root=
[ "$(id -u)" = 0 ] || root=sudo
$root apt-get update -qq
$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
  python3-dev g++ pkg-config libopencv-dev libturbojpeg0-dev
pip install -q ffcv
python -c "from importlib.metadata import version; print('FFCV', version('ffcv'), 'is installed')"
