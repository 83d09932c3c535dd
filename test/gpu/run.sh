#!/usr/bin/env bash
# Runs hardmine's GPU tests and benchmarks on a host without Node or network, out of the kit that
# `npm run gpu:kit` packed beside this file, and writes result.json into $OUT, or beside this file.
#
#   run.sh [--device cuda|cuda:N|cpu] [--only PART,PART...] [--seconds N]
#
# Parts: doctor, tests, agree, step, head, data, peers, compiled, sanitizer. --device cpu tries the kit
# out with small shapes; --seconds is what all of it may take. Progress goes to stderr; the exit code is
# 0 when nothing failed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kit=$here/kit
say() { printf 'run.sh: %s\n' "$*" >&2; }

# Unpacks the archive, once: what is unpacked is remembered by the archive's checksum.
unpack() {
  local sum fresh=$kit.new
  # A later call on the same host may have been carried without it.
  [[ -f $kit/.unpacked && ! -f $here/kit.tar.xz ]] && return
  sum=$(cksum <"$here/kit.tar.xz")
  [[ -f $kit/.unpacked && $(<"$kit/.unpacked") == "$sum" ]] && return
  say 'unpacking'
  rm -rf "$fresh" "$kit"
  mkdir "$fresh"
  if command -v xz >/dev/null; then
    tar -xJf "$here/kit.tar.xz" -C "$fresh"
  else
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2])' \
      "$here/kit.tar.xz" "$fresh"
  fi
  printf '%s' "$sum" >"$fresh/.unpacked"
  mv "$fresh" "$kit"
}

# Joins the shards of a data set into data/; incomplete ones are left for when the rest has come.
join_data() {
  local shards=("$here"/data-*/) fresh=$here/data.new part name
  [[ -d ${shards[0]} ]] || return 0
  local sums=${shards[0]}SHA256SUMS
  if [[ -d $here/data ]] && cmp -s "$sums" "$here/data/SHA256SUMS"; then return 0; fi
  rm -rf "$fresh"
  mkdir "$fresh"
  cp "$sums" "$fresh/SHA256SUMS"
  for part in "$here"/data-*/*.part-*; do
    name=${part##*/}
    cat "$part" >>"$fresh/${name%.part-*}"
  done
  if (cd "$fresh" && sha256sum --quiet -c SHA256SUMS >&2); then
    rm -rf "$here/data"
    mv "$fresh" "$here/data"
    say "joined ${#shards[@]} shards"
  else
    rm -rf "$fresh"
    say "of the data set only ${#shards[@]} shards are here and they are not the whole: carry the others"
  fi
}

unpack
join_data

# The kit's libraries serve the kit's programs alone. Its libstdc++ is used only where the host has
# none or an older one: the host's CUDA libraries may need the newer.
loads() {
  LD_LIBRARY_PATH=$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$kit/bin/node" -e \
    'process.dlopen({ exports: {} }, process.argv[1])' "$kit/build/Release/hardmine_cpu.node" 2>&1
}
libraries=$kit/lib
if ! loads "$libraries" >/dev/null; then
  libraries=$kit/lib:$kit/lib-fallback
  why=$(loads "$libraries") || say "the CPU addon cannot be loaded here: $why"
fi
export HARDMINE_KIT_LIBRARIES=$libraries
export HARDMINE_KIT_HOST_LIBRARIES=${LD_LIBRARY_PATH-}
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if ! why=$("$kit/bin/node" --version 2>&1); then
  say "Node cannot be started here: $why"
  printf '{ "error": "Node cannot be started on this host" }\n' >"${OUT:-$here}/result.json"
  exit 1
fi
exec "$kit/bin/node" "$kit/run.mjs" "$here" "$@"
