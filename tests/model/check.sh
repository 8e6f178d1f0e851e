#!/bin/sh
# Searches every run of the ring model, then of each broken variant, which it must refute. Needs spin and a C compiler.
set -eu
cd "$(dirname "$0")"
for tool in spin "${CC:-cc}"; do
    command -v "$tool" >/dev/null || { echo "skipped: needs the program $tool (Debian package spin)"; exit 0; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=$PWD/byte_ring.pml

search() { # variant -> the line "State-vector ... errors: N" and what was violated
    (cd "$work" && rm -f pan* ./*.trail && spin "-D$1" -a "$model" >/dev/null &&
        "${CC:-cc}" -O2 -w -DSAFETY -DMEMLIM=4096 -o pan pan.c && ./pan -m100000) >"$work/$1.txt" 2>&1 || true
}

search SOUND
if ! grep -q "errors: 0" "$work/SOUND.txt" || grep -q "Search not completed" "$work/SOUND.txt"; then
    cat "$work/SOUND.txt"
    exit 1
fi
echo "byte ring: no error in $(awk '/states, stored/ { print $1 }' "$work/SOUND.txt") states"
for variant in RELEASE_BEFORE_READ MARK_BEFORE_BYTES KEEP_MARKS NO_TAIL_CHECK LOSE_ABANDONED; do
    search "$variant"
    if ! grep -q "errors: 1" "$work/$variant.txt"; then
        echo "$variant is broken, and the model does not show it"
        cat "$work/$variant.txt"
        exit 1
    fi
    echo "$variant: refuted ($(sed -n 's/^pan:1: \(.*\) (at depth .*/\1/p' "$work/$variant.txt"))"
done
