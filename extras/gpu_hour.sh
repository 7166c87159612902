#!/usr/bin/env bash
# What the first machine with a GPU should run, in order, in at most 25 minutes on one H100.
#
#   extras/gpu_hour.sh OUT [PHOTOS]        PHOTOS: class folders of photos; without: drawn pictures
#   ONLY='card|bench_s5.*' extras/gpu_hour.sh OUT     these steps alone; OUT is added to
#   TINY=1 extras/gpu_hour.sh OUT          tiny sizes, on the CPU too: whether this script works
#
# OUT gets log.txt (all that was printed), steps.jsonl (a line a step: passed, seconds), rows.jsonl
# (all rows of results) and summary.json. Checkpoints and .beton files lie in WORK (runs/gpu_hour).
# A step that fails, or takes more than 400 s, is reported and the next one runs; MINUTES (25) after
# the start the rest is reported as not run. Exit code 0: all passed. No network. Packages that
# python lacks can lie in .venv/packages (pip install --target .venv/packages NAME, where there is a
# network, for the same python).
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
photos=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
work=${WORK:-runs/gpu_hour}
mkdir -p "$work"
export PYTHONPATH=.venv/packages${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}
tiny=${TINY:-0}
python=$(command -v python || command -v python3)
deadline=$((SECONDS + 60 * ${MINUTES:-25}))
failed=()

# step NAME EXPECTED COMMAND...: runs it unless ONLY leaves it out. Lines of JSON are results.
step() {
  local name=$1 expected=$2 begin=$SECONDS passed=true
  shift 2
  [[ $name =~ ^(${ONLY:-.*})$ ]] || return 0
  printf '\n== %s\n   should show: %s\n' "$name" "$expected" | tee -a "$out/log.txt"
  if ((SECONDS >= deadline)); then
    passed=false
    echo "   not run: the time is up" | tee -a "$out/log.txt"
  else
    timeout $((deadline - SECONDS < 400 ? deadline - SECONDS : 400)) "$@" 2>&1 | tee "$work/step.txt" | tee -a "$out/log.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || passed=false
    sed -n "s/^{/{\"step\": \"$name\", /p" "$work/step.txt" >> "$out/rows.jsonl"
  fi
  $passed || { failed+=("$name"); echo "   FAILED: $name" | tee -a "$out/log.txt"; }
  echo "{\"step\": \"$name\", \"passed\": $passed, \"seconds\": $((SECONDS - begin))}" \
    >> "$out/steps.jsonl"
}

# --- what is here
step packages "each package with 'is here'" "$python" - <<'PY'
import importlib.util
needed = dict(torch="everything", torchvision="everything", timm="everything", numba="everything",
              numpy="everything", turbojpeg="everything", tqdm="everything", PIL="everything",
              tensorboard="the training scripts", pyarrow="build_beton.py, the tests",
              matplotlib="bench_loader.py, the tests", pytest="the tests")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
for name, purpose in needed.items():
    print(f"{name} is {'MISSING' if name in missing else 'here'}: for {purpose}")
raise SystemExit(bool(missing))
PY
step card "the GPU's name, its memory, the cores and the versions" "$python" - <<'PY'
import json
import os
import platform
import torch
row = dict(cores=len(os.sched_getaffinity(0)), python=platform.python_version(),
           torch=torch.__version__, gpus=torch.cuda.device_count())
if row["gpus"]:
    properties = torch.cuda.get_device_properties(0)
    row |= dict(card=properties.name, memory_gib=round(properties.total_memory / 2 ** 30, 1),
                cuda=torch.version.cuda, nccl=".".join(map(str, torch.cuda.nccl.version())))
print(json.dumps(row))
PY
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())" 2>/dev/null || echo 0)
if [ "$gpus" = 0 ] && [ "$tiny" = 0 ]; then
  echo "torch finds no GPU here. TINY=1 tries this script on the CPU." | tee -a "$out/log.txt"
  exit 1
fi

# --- sizes
data=$work/demo_train.beton
val=$work/demo_val.beton
if [ "$tiny" = 1 ]; then
  compile=--no-compile
  tests=(-k schedules_learning_rate)
  size=32
  epochs=1
  bench_flags=(--model mae_vit_nano_patch8 --input-size 32 --benchmark 1)
  schemes=s3
  batch=8
  other_batches=
else
  compile=--compile
  tests=(-m cuda)
  size=64
  epochs=12
  bench_flags=(--benchmark 10)
  schemes="s3 s4 s5 lean"
  batch=512
  other_batches="256 1024"
fi
nano=(--data "$data" --val-data "$val" --model mae_vit_nano_patch8 --input-size $size --blr 4e-3
      --total-batch 64 --batch-size 64)
sets=(--data "$data" --val-data "$val")
bench_data=$data
[ -z "$photos" ] || bench_data=$work/photos.beton

# --- does it work
step tests "only passed" "$python" -m pytest -q "${tests[@]}" test_all.py
step demo_data "1,000 images" "$python" build_beton.py --demo --out-dir "$work"
[ -z "$photos" ] || step photos "all photos, 0 left out" \
  "$python" build_beton.py --data-dir "$photos" --out "$bench_data"
step demo "done, a probe above 60 % after 12 epochs; mem is the same in all epochs of a stage" \
  "$python" pretrain.py "${nano[@]}" $compile --epochs $epochs --resume none \
  --output-dir "$work/demo"

# --- how fast is it
benchmark() {  # SCHEME BATCH compile|no-compile OPTIMIZER
  local depth=()
  [ "$1" != lean ] || depth=(--decoder-depth 2)
  step "bench_$1_$2_$3_$4" "a row a stage, of random pictures and with the loader: img_s, mfu" \
    "$python" pretrain.py --data "$bench_data" --val-data "$bench_data" "${bench_flags[@]}" \
    --scheme "$1" --batch-size "$2" "--$3" --optimizer "$4" "${depth[@]}" \
    --output-dir "$work/bench"
}
for scheme in $schemes; do
  benchmark "$scheme" $batch "${compile#--}" adamw
done
benchmark s3 $batch "${compile#--}" muon

# --- does a step wait for the GPU, do the other scripts work
step waits "waits_a_step 0: as many in 10 steps as in 40" \
  "$python" - "${nano[@]}" --total-batch 16 --batch-size 8 --no-compile --resume none \
  --output-dir "$work/waits" <<'PY'
import json
import sys
import warnings
import torch
import pretrain
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
counts = []
for steps in (10, 10, 40):  # the first time counts what is made once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            folder = f"{sys.argv[-1]}/{len(counts)}"
            words = [*sys.argv[1:], "--max-steps", str(steps), "--output-dir", folder]
            pretrain.main(pretrain.get_args(words))
        except SystemExit as e:
            assert not e.code, e
    counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
print(json.dumps(dict(waits_in_10_steps=counts[1], waits_in_40_steps=counts[2],
                      waits_a_step=(counts[2] - counts[1]) / 30)))
raise SystemExit(counts[1] != counts[2])
PY
step finetune "done, top-1 well above 10 %" \
  "$python" finetune.py --finetune "$work/demo/last.pt" "${sets[@]}" --total-batch 64 \
  --batch-size 64 --epochs $((epochs / 4 + 1)) $compile --resume none --output-dir "$work/finetune"
step knn "done, top-1 well above 10 %" \
  "$python" linprobe.py --checkpoint "$work/demo/last.pt" "${sets[@]}" --knn --batch-size 128 \
  $compile --output-dir "$work/knn"
launch=("$python")  # on one GPU without torchrun
[ "$gpus" -lt 2 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node 2)
resumed=("${launch[@]}" pretrain.py "${nano[@]}" --batch-size 32 --epochs 1 --no-compile
         --output-dir "$work/resumed")
step stop "stopped at step 3" "${resumed[@]}" --resume none --max-steps 3
step resume "from step 3 of 15, then done" "${resumed[@]}"

# --- how fast is it otherwise
for scheme in $schemes; do
  for other in $other_batches; do
    benchmark "$scheme" "$other" compile adamw
  done
done
for scheme in $schemes; do
  [ "$tiny" = 1 ] || benchmark "$scheme" $batch no-compile adamw
done
[ "$tiny" = 1 ] || benchmark s3 $batch no-compile muon
for other in $other_batches; do
  benchmark s3 "$other" compile muon
  benchmark s3 "$other" no-compile adamw
done

# --- summary
"$python" - "$out" <<'PY'
import json
import sys
from pathlib import Path
out = Path(sys.argv[1])
read = lambda name: [json.loads(line) for line in (out / name).read_text().splitlines()]
steps = {row["step"]: row for row in read("steps.jsonl")}  # the last time of each
(out / "summary.json").write_text(json.dumps(dict(steps=steps, rows=read("rows.jsonl")), indent=1))
PY
echo
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; see $out/log.txt" | tee -a "$out/log.txt"
  exit 1
fi
echo "all passed: $out/summary.json" | tee -a "$out/log.txt"
