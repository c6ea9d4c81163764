#!/usr/bin/env bash
# Trains `base`, then `nano`, or students of both, on a GPU machine that has no network, in a given time.
#
#   bench/gpu_training.sh pack SHARED      # here: what is needed there, as .gpu/ in the checkout (60 MB)
#   bench/gpu_training.sh prepare          # there, with .gpu/ and without nbs/, book/ and the weights: the store, in /tmp
#   bench/gpu_training.sh train OUT 540    # there: models, logs and settings of 540 seconds, in files of at most 15 MiB
#   bench/gpu_training.sh students OUT 540 # or there: the same of students that take four steps a block
#
# SHARED holds data/ with the MIDI, FluidR3's piano and Salamander's samples, and gpu/pack-fluidsynth. There, Python 3.12
# with PyTorch, accelerate and tensorboard is expected; wheels of the other packages travel along. Three of four
# recordings are played by FluidR3's piano and one by Salamander's, five of nine without a room. Both networks start from
# the weights that ship. Where no more than 64 MiB travel at once, the first call leaves the weights behind, and the
# second .gpu/.
set -euo pipefail
cd "$(dirname "$0")/.."
packed=.gpu data=${TMPDIR:-/tmp}/pianodiff
export PYTHONPATH=$PWD:$data/site PATH=$data/fluidsynth/bin:$PATH PYTHONUNBUFFERED=1

pack() {
    mkdir -p "$packed/wheels"
    cp "$1/data/asap-maestro-midi.zip" "$1/data/fluidr3-piano.sf2" "$packed"
    .venv/bin/python "$1/data/make-salamander-sf2.py" "$1/data/salamander" "$packed/salamander.sf2" 8000
    xz -f "$packed/salamander.sf2"
    "$1/gpu/pack-fluidsynth" "$packed/fluidsynth.tar.xz"
    .venv/bin/pip freeze --exclude-editable | grep -iE \
        '^(zarr|numcodecs|donfig|google-crc32c|soundfile|soxr|cffi|pycparser|tyro|docstring_parser|typeguard)==' \
        > "$packed/wheels.txt"
    .venv/bin/pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        $(printf -- '--platform manylinux_2_%s_x86_64 ' 17 24 27 28 31 34) --platform manylinux2014_x86_64 \
        -d "$packed/wheels" -r "$packed/wheels.txt"
    du -sh "$packed"
}

prepare() {
    mkdir -p "$data"
    python3 -m pip install -q --no-index --no-deps --target "$data/site" "$packed"/wheels/*.whl
    tar -C "$data" -xJf "$packed/fluidsynth.tar.xz"
    xz -dc "$packed/salamander.sf2.xz" > "$data/salamander.sf2"
    LD_LIBRARY_PATH=$data/fluidsynth/lib python3 -m pianodiff prepare "$packed/asap-maestro-midi.zip" "$data/store" \
        --soundfont "$packed"/fluidr3-piano.sf2{,,} "$data/salamander.sf2" --preset base --jobs 16 \
        --rooms dry dry dry dry dry studio chamber hall church
}

train() {
    local left=$(($2 - 20))
    model base 0.65 "$left" 2100 train --init base --lr 1e-3 --warmup-images 50000 --P-mean -0.2 --P-std 1.8
    model nano 0.35 "$left" 5200 train --init nano --lr 1e-3 --warmup-images 50000 --P-mean -0.2 --P-std 1.8
    hand_over "$1"
}

# `base` leaves the levels above 1.5 to its expert, which costs less
students() {
    local left=$(($2 - 20))
    model base 0.65 "$left" 500 distill --teacher base --levels 400 10 1.5 0.3 --lr 5e-4 --warmup-images 10000
    model nano 0.35 "$left" 1300 distill --teacher nano --levels 400 10 2 0.4 --lr 5e-4 --warmup-images 10000
    hand_over "$1"
}

# model NAME SHARE SECONDS RATE COMMAND OPTIONS...: as many blocks as it sees in its share, at RATE blocks a second
model() {
    local run=$data/$1 preset=$1 command=$5 images
    images=$(python3 -c "print(int($2 * $3 * $4))")
    timeout --signal=INT --kill-after=20 "$(python3 -c "print(int($2 * $3 + 15))")" \
        python3 -m pianodiff "$command" "$data/store" "$run" --preset "$preset" "${@:6}" --images "$images" \
        --batch-size 256 --decay-fraction 0.5 --recolour 0.3 --compile --workers 12 --eval-blocks 256 \
        --eval-images "$((images / 4))" --log-images 20000 --snapshot-images 1000000000 || echo "$1 was stopped"
}

hand_over() {
    mkdir -p "$1"
    for name in base nano; do
        split -b 15M "$data/$name/model/model.safetensors" "$1/$name.safetensors."
        cp "$data/$name/model/config.json" "$1/$name.json"
        cp "$data/$name/log.csv" "$1/$name.csv"
    done
}

case ${1-} in
    pack) pack "$2" ;;
    prepare) prepare ;;
    train | students) "$1" "$2" "$3" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
