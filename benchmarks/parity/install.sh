#!/usr/bin/env bash
# Installs TRL into a virtual environment of its own, for trl_parity.py. grpoforge does not depend on TRL.
#
#   benchmarks/parity/install.sh [FOLDER]     a new temporary folder by default; prints the environment's python
#
# PARITY_PYTHON names the interpreter (python3), PARITY_TRL and PARITY_TORCH the versions (newest TRL; torch 2.13).
# The CPU build of torch is enough: `PIP_INDEX_URL` and `PIP_FIND_LINKS` choose where pip finds it.
set -euo pipefail

FOLDER=${1:-$(mktemp -d)/trl}
"${PARITY_PYTHON:-python3}" -m venv "$FOLDER"
"$FOLDER/bin/python" -m pip install --quiet --upgrade pip
"$FOLDER/bin/python" -m pip install --quiet "torch${PARITY_TORCH:-==2.13.*}" "trl${PARITY_TRL:-}" "transformers>=5.10.4,<6"
"$FOLDER/bin/python" -m pip list 2>/dev/null | grep -iE '^(trl|torch|transformers|accelerate) ' >&2
echo "$FOLDER/bin/python"
