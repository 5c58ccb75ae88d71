#!/usr/bin/env bash
# Installs MetaLM, all that runs need of it, and what DeepSpeed compiles for CPUs, into an environment of its own:
# install.sh FOLDER [TORCH]. TORCH is a requirement of pip: torch==2.13.0 has a build without CUDA where pip finds one.
set -euo pipefail
(($# >= 1)) || { echo "usage: install.sh FOLDER [TORCH]" >&2 && exit 64; }
source=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$1"
pip=("$1/bin/pip" install --quiet --no-cache-dir --constraint "$source/constraints.txt")
"${pip[@]}" "${2:-torch}"
"${pip[@]}" "${source}[triton,zstd,fast,audio,m4a,parquet,sentencepiece,plot,tasks,drawings,finetuning,evaluation,wandb,prometheus]"
"$1/bin/python" -m metalm.training.extensions
"$1/bin/metalm" --version
