#!/bin/sh
# The native runtime built by gcc and clang without a warning, under sanitizers, on an emulated Arm, and its reader under fuzzers, with networks of
# every kernel. Usage: scripts/check_native.sh [FUZZ_RUNS] [PACKED_DIRECTORY...]      directories: more files for the fuzzer to start from
# Needs: apt-get install clang gcc-aarch64-linux-gnu qemu-user-static. Tests skip what is not installed and say so; without clang the last part stops.
set -eu
runs=${1:-1000000}
[ $# -eq 0 ] || shift
root=$(dirname "$(dirname "$(realpath "$0")")")
python=${PYTHON:-python}
"$python" -m pytest "$root/tests/test_runtime_native.py" -m "slow or not slow" -p no:cacheprovider -q -rs

memory=/dev/shm # files of a fuzzed input are written and read at each execution
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
work=$(mktemp -d "$memory/rnn2bin.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp -r "$root/rnn2bin/runtime/native" "$work/native"
mkdir "$work/corpus" "$work/scratch"
PYTHONPATH="$root/tests" "$python" - "$work/corpus" "$@" <<'EOF'
import struct, sys, tempfile
from pathlib import Path
from test_runtime_native import fuzzed, packed
target, *folders = map(Path, sys.argv[1:])
with tempfile.TemporaryDirectory() as place:
    made = [packed(network, Path(place) / str(k)) for k, network in enumerate(fuzzed())]
    for k, folder in enumerate([*made, *folders]):
        config, weights = ((folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
        (target / str(k)).write_bytes(struct.pack("<I", len(config)) + config + weights)
EOF
longest=$(find "$work/corpus" -type f -printf '%s\n' | sort -n | tail -1)
cd "$work/native"
make -s clean
make -s CC=clang CFLAGS="-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all" librnn2bin.a
clang -DLIBFUZZER -std=c11 -O1 -g -fsanitize=fuzzer,address,undefined -I. "$root/tests/native/fuzz.c" librnn2bin.a -lm -o "$work/fuzz"
SCRATCH="$work/scratch" "$work/fuzz" "$work/corpus" -max_len="$((longest + 512))" -runs="$runs" -seed=1 -print_final_stats=1
