#!/bin/sh
# The steps of both container files, and of a trial of them without either: installs the bundle with its small models.
#
#   install.sh SOURCE PREFIX [cpu|cuda]
#
# SOURCE is a clone of the repository, PREFIX becomes a virtual environment; PYTHON makes it. pip's own variables are
# heeded, and TORCH_INDEX names an index for PyTorch alone, such as that of its builds for CPUs. Only PREFIX is written.
set -eu
source=$1 prefix=$2 device=${3:-cpu}
python=${PYTHON:-python3}

"$python" -m venv "$prefix"
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$device" = cpu ]; then
    "$prefix/bin/pip" install --quiet --constraint "$source/requirements.lock" \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
fi
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -R "$source/." "$build/bundle"
"$prefix/bin/pip" install --quiet --constraint "$source/requirements.lock" "$build/bundle[preparation]"
chmod -R a+rX "$prefix"
