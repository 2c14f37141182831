#!/usr/bin/env bash
# Checks and measures training on one NVIDIA GPU, in at most ten minutes.
#
#     bash benchmarks/device.sh [--data_dir DIR] [--seconds N] [--tiny]
#
# In this order: views as on a CPU, replayed steps as issued ones, what a step costs, of both recipes, the network
# compiled or not -> speed.csv; then trainings of the paper's 3-way recipe, 10,000 steps, of as many categories as fit
# -> paper.csv, while tests that need a GPU run beside them. A part that fails or takes too long stops no other; only
# where replayed steps are not the issued ones nothing is trained.
#
# --data_dir   folder of the categories; relative to the project's folder (default: Data)
# --seconds    in all (default: 560)
# --tiny       on a CPU, with tiny images and some steps, to try the script
#
# The CSV files and a log go to the folder $OUT (default: results). The interpreter is $PYTHON (default: python3).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data_dir=Data seconds=560 tiny=""
while (($#)); do
  case $1 in
    -h | --help)
      sed -n "2,/^set /s/^# \{0,1\}//p" benchmarks/device.sh
      exit
      ;;
    --tiny) tiny=1 ;;
    --data_dir | --seconds)
      (($# > 1)) || { echo "device.sh: error: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift
      ;;
    *)
      echo "device.sh: error: unknown flag $1" >&2
      exit 2
      ;;
  esac
  shift
done
python=${PYTHON:-python3} out=${OUT:-results} cuda=1
speed=(--repeats 3) run=(--epochs 10000 --replay 1)
if [[ -n $tiny ]]; then
  cuda=0 speed=(--repeats 1 --size 64 --batch_size 4 --amp off) run=(--epochs 3 --size 32 --batch_size 4 --amp off)
fi
models=reproduce/device categories=bottle,screw,grid
mkdir -p "$out" "$models"
export PYTHONUNBUFFERED=1

left() { echo $((seconds - SECONDS)); }

# part NAME SECONDS COMMAND...: run it, told and timed, at most that long and within the time that is left
part() {
  local name=$1 limit=$2 began=$SECONDS code=0
  ((limit < $(left))) || limit=$(left)
  ((limit > 0)) || { echo "== $name: no time left"; return 1; }
  echo "== $name (at $began s, $limit s at most)"
  timeout -k 10 "$limit" "${@:3}" || code=$?
  echo "== $name: exit code $code after $((SECONDS - began)) s"
  return "$code"
}

# From the newest rows: "right", whether replayed steps are the issued ones, or those differ from run to run; "compile",
# 1 if 10,000 steps are done sooner with the network compiled, else 0
judge() {
  "$python" - "$out/speed.csv" "$1" <<'END'
import csv, sys
rows = {row["compile"]: row for row in csv.DictReader(open(sys.argv[1])) if row["recipe"] == "paper" and row["gpu"]}
plain, compiled = (rows.get(name, {}) for name in ("False", "True"))
right = [row.get("replayed_equal") == "True" or row.get("issued_equal") == "False" for row in (plain, compiled)]
if sys.argv[2] == "right":
    sys.exit(not right[0])
seconds = [
    float(row.get("settling_seconds") or "inf") + 10_000 * float(row.get("step_seconds") or "inf")
    for row in (plain, compiled)
]
print(int(right[1] and seconds[1] < seconds[0]))
END
}

everything() {
  speed+=(--cuda "$cuda" --results "$out/speed.csv")
  part "what a step costs" 140 "$python" benchmarks/speed.py "${speed[@]}" --recipe paper fast \
    --only views replay step launches
  [[ -n $tiny ]] || part "the same, compiled" 120 "$python" benchmarks/speed.py "${speed[@]}" --compile 1 \
    --only replay step
  local compile=0 reserve=60 name present=""
  if [[ -z $tiny ]]; then
    judge right || { echo "== nothing is trained: replayed steps are not the issued ones, or unknown"; return 1; }
    compile=$(judge compile)
    (part "tests that need a GPU" 150 "$python" -m pytest -q -n 0 -p no:cacheprovider tests/training/test_replay.py \
      -k "replayed and bf16 and (flags1 or flags2)" >"$out/device_tests.log" 2>&1) &
  fi
  for name in ${categories//,/ }; do
    [[ ! -d $data_dir/$name ]] || present+=${present:+,}$name
  done
  [[ -n $present ]] || { echo "== $data_dir has none of $categories"; return 1; }
  part "training of $present" "$(($(left) - reserve))" "$python" run_training.py --type "$present" \
    --data_dir "$data_dir" --model_dir "$models" --logdir "$models/logs" --cuda "$cuda" --no-pretrained \
    --variant 3way --test_epochs -1 --compile "$compile" --cache_dir none "${run[@]}"
  present=""
  for name in ${categories//,/ }; do
    [[ ! -f $models/$name.pt ]] || present+=${present:+,}$name
  done
  [[ -n $present ]] || { echo "== no detector is finished"; return 1; }
  part "evaluation of $present" "$(left)" "$python" eval.py --type "$present" --data_dir "$data_dir" \
    --model_dir "$models" --eval_dir "$models/eval" --cuda "$cuda" --control 1 --save_plots 0 --cache_dir none &&
    part "rows" "$(left)" "$python" benchmarks/tables.py add "$models/eval/device/results.csv" "$out/paper.csv"
  wait
  [[ ! -f $out/device_tests.log ]] || tail -5 "$out/device_tests.log"
}

everything 2>&1 | tee "$out/device.log"
