# Sourced by the other scripts: makes or reuses .venv with exactly the packages of a constraints file.
# make_venv constraints.txt | constraints-dev.txt

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

make_venv() {
  local file=$1 stamp=.venv/.rlhf-jax-$1 python wanted
  # The development file holds everything that the other one does, in the same versions.
  wanted=$(cat "$file" pyproject.toml | cksum)
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted $PWD" ]; then
      return
    fi
  else
    python=$(find_python)
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || {
      echo "python3 could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    }
  fi
  echo "Installing the packages of $file (some 250 MB to download the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$file"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$wanted $PWD" >"$stamp"
}
