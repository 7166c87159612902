#!/usr/bin/env bash
# The experiments of RESULTS.md on a small model: pretraining with other recipes, then probes, kNN
# and finetuning, three seeds each.
#
#   extras/evidence.sh imagenette             a folder with train/ and val/, class folders in each
#   ONLY='muon_.*' SEEDS=0 extras/evidence.sh imagenette      these steps and seeds alone
#   TINY=1 extras/evidence.sh imagenette      a few pictures, one epoch: whether this script works
#
# Runs lie in RUNS (runs/evidence; runs/evidence_tiny), the two .beton files in its folder data.
# All of it takes many hours on two CPU cores. Stop it when you like: the same command goes on where
# it stopped. A step that fails ends it. The last lines are the table of RESULTS.md, mean and
# standard deviation over the seeds, and `done: 144 results`.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
pictures=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1 2}
short=()
runs=${RUNS:-runs/evidence}
if [ "${TINY:-0}" = 1 ]; then
  runs=${RUNS:-runs/evidence_tiny}
  short=(--epochs 1 --total-batch 4 --batch-size 4)  # of two equal flags the last one counts
  mkdir -p "$runs"
  for class in "$pictures"/{train,val}/*/; do  # eight pictures of each
    part=$(basename "$(dirname "$class")")
    files=("$class"*)
    mkdir -p "$runs/pictures/$part/$(basename "$class")"
    cp "${files[@]:0:8}" "$runs/pictures/$part/$(basename "$class")"
  done
  pictures=$runs/pictures
fi
train=$runs/data/train.beton
val=$runs/data/val.beton
data=(--data "$train" --val-data "$val")
small=(--model mae_vit_nano_patch8 --input-size 64 --blr 4e-3 --total-batch 64 --batch-size 64)
probes=(--total-batch 256 --batch-size 256 --blr 30)
finetuning=(--blr 4e-3 --layer-decay 0.75 --drop-path 0 --mixup 0 --cutmix 0 --reprob 0
            --total-batch 64 --batch-size 64)

# step NAME COMMAND...: runs it, unless ONLY leaves it out or it is finished
step() {
  local name=$1
  shift
  [[ $name =~ ^(${ONLY:-.*})$ ]] || return 0
  [ ! -e "$runs/finished/$name" ] || return 0
  echo "== $name"
  "$@"
  touch "$runs/finished/$name"
}
# pretrain RECIPE SEED FLAG...
pretrain() {
  step "$1_$2" python pretrain.py "${data[@]}" "${small[@]}" --output-dir "$runs/$1_$2" \
    --seed "$2" "${@:3}" "${short[@]}"
}
# probe RECIPE_SEED NAME FLAG...: features of the run, of centre crops
probe() {
  step "$1-$2" python linprobe.py "${data[@]}" "${probes[@]}" --checkpoint "$runs/$1/last.pt" \
    --output-dir "$runs/$1-$2" "${@:3}" "${short[@]}"
}

mkdir -p "$runs/finished"
step train python build_beton.py --data-dir "$pictures/train" --out "$train"
step val python build_beton.py --data-dir "$pictures/val" --out "$val" --classes "$train"
for seed in $seeds; do
  pretrain fixed "$seed" --scheme fixed --epochs 20 --warmup-epochs 2
  pretrain muon "$seed" --scheme fixed --optimizer muon --epochs 20 --warmup-epochs 2
  pretrain muon_s3 "$seed" --scheme s3 --optimizer muon --epochs 20 --warmup-epochs 2
  pretrain lean "$seed" --scheme lean --epochs 32 --warmup-epochs 2
  pretrain lean1 "$seed" --scheme lean --decoder-depth 1 --epochs 46 --warmup-epochs 2.9
  pretrain lean20 "$seed" --scheme lean --epochs 20 --warmup-epochs 2
  for scheme in s3 s4 s5; do
    pretrain $scheme "$seed" --scheme $scheme --epochs 20 --warmup-epochs 2
  done
  pretrain repeat2 "$seed" --scheme fixed --repeat 2 --epochs 10 --warmup-epochs 1
  pretrain repeat4 "$seed" --scheme fixed --repeat 4 --epochs 5 --warmup-epochs 0.5
  for recipe in fixed muon muon_s3 lean lean1 lean20 s3 s4 s5 repeat2 repeat4; do
    probe "${recipe}_$seed" cls --cached --pool cls
    probe "${recipe}_$seed" mean --cached --pool mean
    probe "${recipe}_$seed" knn --knn
  done
  for recipe in fixed muon muon_s3 lean20; do
    step "${recipe}_$seed-finetuned" python finetune.py "${data[@]}" "${finetuning[@]}" \
      --finetune "$runs/${recipe}_$seed/last.pt" --output-dir "$runs/${recipe}_$seed-finetuned" \
      --seed "$seed" --epochs 20 --warmup-epochs 2 "${short[@]}"
  done
done

# --- the table
python - "$runs" <<'PY'
import json
import statistics
import sys
from pathlib import Path
results = {}  # (recipe, column): values of the seeds
for path in sorted(Path(sys.argv[1], "finished").iterdir()):
    run, _, column = path.name.partition("-")
    recipe, _, seed = run.rpartition("_")
    if not seed.isdigit():
        continue  # a .beton file
    file = "results.jsonl" if column in ("cls", "mean", "knn") else "log.jsonl"
    last = json.loads((path.parents[1] / path.name / file).read_text().splitlines()[-1])
    value = last["top1"] if column else last["probe_top1"]
    results.setdefault((recipe, column or "online probe"), []).append(value)
columns = ["online probe", "cls", "mean", "knn", "finetuned"]
print(" | ".join(["recipe", *columns]))
for recipe in dict.fromkeys(recipe for recipe, _ in results):
    row = [recipe]
    for column in columns:
        values = results.get((recipe, column), [])
        text = f"{statistics.mean(values):.1f}" if values else "-"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.1f}"
        row.append(f"{text} (n={len(values)})")
    print(" | ".join(row))
print(f"done: {sum(map(len, results.values()))} results")
PY
