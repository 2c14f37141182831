#!/usr/bin/env bash
# Measures detectors on MVTec AD next to the published figures, and fills the tables of docs/results.md with them.
#
#     bash benchmarks/reproduce.sh [--dry_run] [--gpus N] [--data_dir DIR] [SECTION...]
#
# Sections, the cheapest first; all of them, in this order, if none is named:
#
#     frozen       ImageNet's networks as they are: no training
#     patches      patch models of 64 px crops, 10,000 steps, five seeds
#     ensemble     3-way, 10,000 steps, five folds
#     finetune     EfficientNet-B4, 18,944 steps, five seeds
#     steps10000   normal, scar and 3-way from scratch, 10,000 steps, five seeds
#     steps65536   3-way from scratch, 65,536 steps, five seeds
#
# --dry_run    print every command, one a line, and run nothing
# --gpus N     processes, each on a GPU of its own; 0: on the CPU (default: 1)
# --data_dir   folder of the categories; relative to the project's folder (default: Data)
#
# What results/paper.csv has of every category is not measured again, an interrupted training continues. Detectors go to
# reproduce/, plots and tables of single runs to Eval/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sections=(frozen patches ensemble finetune steps10000 steps65536)
seeds=0,1,2,3,4
results=results/paper.csv

frozen() {
  measure frozen_resnet18 "--recipe finetune --epochs 0 --backbone resnet18 --features pool"
  measure frozen_b4 "--recipe finetune --epochs 0 --backbone efficientnet_b4 --features level" \
    "--features pool" "--features all"
}

patches() {
  measure patches "--no-pretrained --variant 3way --patch_size 64 --epochs 10000 --seed $seeds"
}

ensemble() {
  measure ensemble "--no-pretrained --variant 3way --epochs 10000 --folds 5"
}

finetune() { # A.4: 10 and 64 times 256 steps
  measure finetune_b4 "--recipe finetune --variant 3way --backbone efficientnet_b4 --features level --batch_size 24 \
--epochs 18944 --freeze_resnet 2560 --optim sgd --lr 0.03 --lr_unfrozen 0.0001 --seed $seeds" "--features pool"
}

steps10000() {
  local variant
  for variant in normal scar 3way; do
    measure "10000_$variant" "--no-pretrained --variant $variant --epochs 10000 --seed $seeds"
  done
}

steps65536() { # A.1: 256 times 256 steps
  measure 65536_3way "--no-pretrained --variant 3way --epochs 65536 --seed $seeds"
}

# measure NAME TRAINING [EVALUATION...]: train reproduce/NAME and evaluate it, as it is and under each of the flags of
# EVALUATION. The words of TRAINING and EVALUATION are flags without spaces in them.
measure() {
  local name=$1 training=$2 flags missing=()
  for flags in "" "${@:3}"; do
    measured "$name${flags:+ $flags}" || missing+=("$flags")
  done
  if ((${#missing[@]} == 0)); then
    echo "$name: $results has it; skipped" >&2
    return
  fi
  run "${start[@]}" run_training.py --model_dir "reproduce/$name" "${where[@]}" --test_epochs -1 $training
  for flags in "${missing[@]}"; do
    run "${start[@]}" eval.py --model_dir "reproduce/$name" $flags "${where[@]}" --control 1 --save_plots 0
    run python benchmarks/tables.py add "Eval/$name/results.csv" "$results"
  done
}

measured() { # whether there is a row of each category
  local folder
  [[ -z $dry_run && -f $results ]] || return 1
  for folder in "$data_dir"/*/train/good; do
    folder=${folder%/train/good}
    grep -q "^${folder##*/},.*eval\.py --model_dir reproduce/$1 --cuda " "$results" || return 1
  done
}

run() {
  local word line=""
  for word in "$@"; do
    [[ $word != *[^[:alnum:]_./,=-]* ]] || printf -v word %q "$word"
    line+=" $word"
  done
  if [[ -n $dry_run ]]; then
    echo "${line# }"
  else
    echo "+$line" >&2
    "$@"
  fi
}

wrong() {
  echo "reproduce.sh: error: $1" >&2
  exit 2
}

dry_run="" gpus=1 data_dir=Data chosen=()
while (($#)); do
  case $1 in
    -h | --help)
      sed -n "2,/^set /s/^# \{0,1\}//p" benchmarks/reproduce.sh
      exit
      ;;
    --dry_run) dry_run=1 ;;
    --gpus | --data_dir)
      (($# > 1)) || wrong "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    *)
      [[ " ${sections[*]} " == *" $1 "* ]] || wrong "no section $1: it is one of ${sections[*]}"
      chosen+=("$1")
      ;;
  esac
  shift
done
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || wrong "--gpus $gpus: a whole number is needed"
((${#chosen[@]})) || chosen=("${sections[@]}")
start=(python)
((gpus < 2)) || start=(torchrun --nproc_per_node "$gpus")
where=(--cuda "$((gpus > 0))")
[[ $data_dir == Data ]] || where+=(--data_dir "$data_dir")

for section in "${chosen[@]}"; do
  [[ -z $dry_run ]] || echo "# $section"
  "$section"
done
run python benchmarks/tables.py write
