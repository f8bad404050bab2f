# Where the private FEniCSx environment lies, and how to enter it. Sourced by container/run and container/build.
#
# An environment has two layers, each a folder in the cache whose name carries a hash of all that defines it:
#   root-<suite>-<hash>    a Debian root file system, made by build with the packages of packages.txt
#   python-<suite>-<hash>  a virtual environment over it, made from pyproject.toml by install-python, seen as /opt/fem_vi
# shellcheck shell=bash

container=${checkout:?}/container
readonly layer_path=/opt/fem_vi

die() {
  printf 'fem_vi: %s\n' "$@" >&2
  exit "${exit_code:-1}"
}

readonly other_ways="Other ways to get FEniCSx, after which the same commands use the Python that has it:
  conda-forge:     conda env create -f environment.yml && conda activate fem_vi
  Debian, Ubuntu:  apt-get install the packages of container/packages.txt, then container/install-python DIR pyproject.toml
  Docker:          docker build -t fem_vi . && docker run -it fem_vi
  Spack:           spack install py-fenics-dolfinx, then pip install the rest of pyproject.toml"

case ${FENICSX:-0.9} in
  0.9) suite=trixie ;;
  0.11) suite=sid ;;
  *) die "FENICSX is \"$FENICSX\"; the environments are 0.9 (the default, Debian trixie) and 0.11 (Debian sid)." ;;
esac

cache=${XDG_CACHE_HOME:-$HOME/.cache}/fem_vi

hash_of() {
  local sum
  sum=$(sha256sum)
  echo "${sum:0:12}"
}

# All that defines the root file system: mmdebstrap's options, a line each.
recipe() {
  local line packages=
  while read -r line; do
    line=${line%%#*}
    if [[ $line ]]; then packages+=,${line%% *}; fi
  done <"$container/packages.txt"
  echo "--variant=minbase"
  echo "--include=${packages#,}"
  echo "--dpkgopt=force-unsafe-io"
  # Not as --dpkgopt: mmdebstrap would look for mmtarfilter in the PATH, and for Python.
  echo '--setup-hook=printf "path-exclude=/usr/share/%s/*\n" man locale >"$1/etc/dpkg/dpkg.cfg.d/01no-manuals"'
  # Debian sid's index says that it expires within days, and mirrors and caches lag.
  if [[ $suite == sid ]]; then echo '--aptopt=Acquire::Check-Valid-Until "false"'; fi
}

root_key=$({ echo "$suite $HOSTTYPE"; recipe; } | hash_of)
python_key=$({ echo "$root_key"; cat "$container/install-python"
  sed -n '/^dependencies/,/^\[tool/p' "$checkout/pyproject.toml"; } | hash_of)
# shellcheck disable=SC2034
root=$cache/root-$suite-$root_key python=$cache/python-$suite-$python_key
tools=$cache/tools-$HOSTTYPE

# The paths seen inside, at the places that they have outside: pairs of mode (rw, ro) and path, in `binds`.
binds=()

bind() {
  local mode=$1 path i
  for path in "${@:2}"; do
    [[ $path == /* && -e $path ]] || continue
    path=${path%/}
    case $path in
      "" | /usr | /etc | /bin | /sbin | /lib | /lib64 | /opt | /var | /dev | /proc | /sys | /run) continue ;;
    esac
    for ((i = 0; i < ${#binds[@]}; i += 2)); do
      [[ $path/ != "${binds[i + 1]}"/* ]] || continue 2
    done
    binds+=("$mode" "$path")
  done
}

bind_checkout() {
  local dir=$1 gitdir
  while [[ $dir && ! -e $dir/.git ]]; do dir=${dir%/*}; done
  bind rw "${dir:-$1}"
  if [[ -f $dir/.git ]] && read -r _ gitdir <"$dir/.git"; then bind rw "${gitdir%/worktrees/*}"; fi
}

# What pip needs to work as it does on the host: its configuration, certificates, and local folders that either names.
bind_pip() {
  local file line word words=()
  local files=(/etc/pip.conf "${PIP_CONFIG_FILE:-}" "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$HOME/.pip/pip.conf")
  for file in "${files[@]}"; do
    [[ -f $file ]] || continue
    bind ro "$file"
    while read -r line || [[ $line ]]; do read -r -a more <<<"${line#*=}"; words+=("${more[@]}"); done <"$file"
  done
  for word in "${!PIP_@}" SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO; do
    read -r -a more <<<"${!word:-}"
    words+=("${more[@]}")
  done
  for word in "${words[@]}"; do
    word=${word#file://}
    word=${word%/simple}
    bind ro "$word"
  done
}

bind_host() {
  local more
  bind rw "$HOME" /tmp "${TMPDIR:-}" "${XDG_CACHE_HOME:-}"
  bind_checkout "$checkout"
  bind_checkout "$PWD"
  IFS=: read -r -a more <<<"${FEM_VI_BIND:-}"
  bind rw "${more[@]}"
  bind ro /etc/resolv.conf /etc/hosts /etc/ssl/certs /usr/local/share/ca-certificates
  if ((EUID != 0)); then bind ro /etc/passwd /etc/group; fi
  bind_pip
}

clean_variables() {
  unset "${!PYENV_@}" "${!CONDA_@}" VIRTUAL_ENV PYTHONHOME PYTHONPATH LD_LIBRARY_PATH LD_PRELOAD CC CXX PERL5LIB LANGUAGE
  export PATH=$layer_path/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C.UTF-8 PYTHONNOUSERSITE=1
}

find_bwrap() {
  local candidate
  [[ ${FEM_VI_ENTER:-bwrap} == bwrap ]] || return 1
  for candidate in "$(type -P bwrap)" "$tools/usr/bin/bwrap"; do
    if [[ -x $candidate ]] && "$candidate" --dev-bind / / true 2>/dev/null; then
      bwrap=$candidate
      return
    fi
  done
  return 1
}

# enter ROOT LAYER CMD...: become CMD inside. The root file system is read-only there, so that it stays what its hash says.
enter() {
  local root=$1 layer=$2 i args=()
  shift 2
  if find_bwrap; then
    args=(--bind "$root" / --dev-bind /dev /dev --bind /proc /proc --ro-bind /sys /sys --tmpfs /run --tmpfs /var/tmp)
    args+=(--bind "$layer" "$layer_path")
    for ((i = 0; i < ${#binds[@]}; i += 2)); do
      if [[ ${binds[i]} == rw ]]; then args+=(--bind); else args+=(--ro-bind); fi
      args+=("${binds[i + 1]}" "${binds[i + 1]}")
    done
    exec "$bwrap" "${args[@]}" --remount-ro / --chdir "$PWD" "$@"
  fi
  ((EUID == 0)) || die "bubblewrap may not make a user namespace here, and chroot needs root." "$other_ways"
  # In a mount namespace of its own, so that no mount outlives the command.
  exec unshare --mount --propagation private "$BASH" "$container/enter-chroot" "$root" "$layer" "${binds[@]}" -- "$@"
}
