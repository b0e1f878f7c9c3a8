#!/bin/sh
# The native runtime under sanitizers, an emulator for Arm, and fuzzers. Usage: scripts/check_native.sh PACKED_DIRECTORY [FUZZ_RUNS]
# Needs clang (libFuzzer) for the last part; what is not installed is skipped by the tests.
set -eu
model=$(realpath "$1")
runs=${2:-1000000}
root=$(dirname "$(dirname "$(realpath "$0")")")
python -m pytest "$root/tests/test_runtime_native.py" -m slow

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/rnn2bin/runtime/native" "$work/native"
cd "$work/native"
make -s clean
make -s CC=clang CFLAGS="-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all" librnn2bin.a
clang -DLIBFUZZER -std=c11 -O1 -g -fsanitize=fuzzer,address,undefined -I. "$root/tests/native/fuzz.c" librnn2bin.a -lm -o "$work/fuzz"
mkdir "$work/corpus" "$work/scratch"
python - "$model" "$work/corpus/model" <<'EOF'
import struct, sys
from pathlib import Path
folder, target = map(Path, sys.argv[1:])
config, weights = (folder / name for name in ("config.json", "model.safetensors"))
target.write_bytes(struct.pack("<I", config.stat().st_size) + config.read_bytes() + weights.read_bytes())
EOF
SCRATCH="$work/scratch" "$work/fuzz" "$work/corpus" -max_len=200000 -runs="$runs" -seed=1 -print_final_stats=1
