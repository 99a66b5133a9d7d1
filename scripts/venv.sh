# Sourced by the other scripts: makes or reuses .venv with exactly the packages of a constraints file.

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "rlhf-jax needs Python 3.11 or newer; python3 here is $(python3 --version 2>&1 || echo missing)" >&2
  return 1
}

# pip_install ARGUMENTS: byte code is not made here, which would take longer than all the rest.
pip_install() {
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile "$@"
}

# warm_up MODULE...: proves that the modules can be imported, and leaves their byte code behind for the next start.
warm_up() {
  local names
  names=$(IFS=,; echo "$*")
  env -u PYTHONDONTWRITEBYTECODE TRANSFORMERS_VERBOSITY=error .venv/bin/python -W ignore -c "import $names"
}

# make_venv constraints.txt|constraints-dev.txt: nothing is done where a stamp says that the same file was installed here.
make_venv() {
  local file=$1 stamp=.venv/.installed-$1 python wanted
  wanted="$(cat "$file" pyproject.toml | cksum) in $PWD"
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
      return
    fi
  else
    python=$(find_python) || return 1
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || {
      echo "$python could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    }
  fi
  echo "Installing the packages of $file (a minute or two the first time)"
  pip_install --require-hashes -r "$file" &&
    pip_install --no-deps --no-build-isolation --editable . &&
    warm_up rlhf_jax.online rlhf_jax.offline &&
    echo "$wanted" >"$stamp"
}
