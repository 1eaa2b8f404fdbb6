#!/usr/bin/env bash
# What a GPU is needed for, each command in at most 9 minutes: the speed tables of both families, memory with large
# attention, what loading adds, a short training of each, and compiled networks, which take longest to begin. Needs
# torch, torchvision, numpy, pillow, tqdm and, for the tests, pytest, and no network.
#
#   bash benchmarks/gpu.sh OUT_DIR          PYTHON=python3.12 names another Python
#   bash benchmarks/gpu.sh OUT_DIR tests    the tests marked gpu
#   bash benchmarks/gpu.sh OUT_DIR speed    how full the GPU gets: growing batches, FastGAN's variants, --arch resnet
#
# Leaves OUT_DIR/report.md (what was run, how long it took, how it ended, the tables), which it prints, too, and
# OUT_DIR/outputs.txt, all outputs; both, and tables.md, as far as it came if it is killed. The exit code is 0 if everything ended well.
#
# Trainings, one command a call, each ending within 9 minutes, and the same command again goes on; what they need is
# packed before, where the data is. More in benchmarks/gpu_runs.py, or with --help.
#
#   bash benchmarks/gpu.sh pack FOLDER --celeba ZIP --paintings DIR --classes ZIP --vgg_weights PATH
#   bash benchmarks/gpu.sh OUT_DIR celeb|few|few100|small|classes|large
set -uo pipefail
if [[ $# -gt 1 && ! ${2-} =~ ^(speed|tests)$ ]] || [[ ${1-} == pack || ${1-} == -* ]]; then
    exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_runs.py" "$@"
fi
[[ ( $# = 1 && -n $1 && ! $1 =~ ^(tests|speed|celeb|few|few100|small|classes|large)$ ) || $# = 2 ]] || {
    echo "usage: bash benchmarks/gpu.sh OUT_DIR [tests|speed|celeb|few|few100|small|classes|large], or --help" >&2
    exit 2
}
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 5
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} failed=0
report=$out/report.md work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$out/outputs.txt"

step() {  # step NAME LIMIT_IN_SECONDS COMMAND...
    local name=$1 limit=$2 code=0 began=$SECONDS
    shift 2
    echo "$name: $*"
    echo "==== $name" >>"$out/outputs.txt"
    timeout --kill-after=10 "$limit" "$@" >>"$out/outputs.txt" 2>&1 || code=$?
    [ "$code" = 0 ] || { failed=1; tail -n 5 "$out/outputs.txt"; }
    echo "| $name | \`$*\` | $((SECONDS - began)) s | $code |" >>"$report"
}

{
    echo "# Report of $(date +%F)"
    "$python" -c 'import platform, torch; print(f"\n{torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"}, torch {torch.__version__}, Python {platform.python_version()}\n")'
    printf '| step | command | time | exit code |\n|---|---|---|---|\n'
} >"$report" || exit 1
finish() {
    { echo; cat "$out/tables.md" 2>/dev/null; } >>"$report"
    cat "$report"
    echo "report: $report"
    exit "$failed"
}
speed=("$python" benchmarks/speed.py --seconds 1 --results "$out/tables.md")
train=("$python" main.py --dataset toy --sample_step 500 --log_path "$work/logs" --model_save_path "$work/models"
    --sample_path "$work/samples" --cache_path "$work/cache")
if [ "${2-}" = tests ]; then
    step tests 520 "$python" -m pytest -v -m gpu -p no:cacheprovider --continue-on-collection-errors
    finish
fi
if [ "${2-}" = speed ]; then
    # the row of sizes changed the other way decides whether `Resampling` merges on GPUs
    step fastgan 110 "${speed[@]}" --model fastgan --imsize 256 --batch_size 8 --variant "" --variant "--precision tf32" \
        --variant "--checkpointing true"
    step resnet 45 "${speed[@]}" --arch resnet --imsize 64 --batch_size 64 --variant ""
    step sagan 75 "${speed[@]}" --imsize 64 --batch_size 64
    step sagan_batches 90 "${speed[@]}" --growth --batches 64,128,256,512,1024,2048 --imsize 64
    step fastgan_batches 75 "${speed[@]}" --growth --batches 8,16,32,64 --model fastgan --imsize 256
    step resnet_batches 60 "${speed[@]}" --growth --batches 64,256,1024 --arch resnet --imsize 64
    step sagan_compiled 80 "${speed[@]}" --imsize 64 --batch_size 256 --variant "" --variant "--compile true"
    finish
fi
step speed_sagan 110 "${speed[@]}" --imsize 64 --batch_size 64
step speed_fastgan 130 "${speed[@]}" --model fastgan --imsize 256 --batch_size 8
step memory 25 "${speed[@]}" --imsize 128 --batch_size 8 --g_attn 64 --d_attn 64 --variant "--precision auto"
step loading 95 "${speed[@]}" --loading --imsize 64 --batch_size 64
step train_sagan 25 "${train[@]}" --version sagan --imsize 64 --total_step 1000
step train_fastgan 30 "${train[@]}" --version fastgan --model fastgan --imsize 128 --metadata false --total_step 500
step speed_compiled 80 "${speed[@]}" --imsize 64 --batch_size 64 --variant "--compile auto"
finish
