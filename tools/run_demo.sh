#!/usr/bin/env bash
# The product's job in small: fine-tunes the tiny PaliGemma that the repository carries on a task it does not know, answers
# about a new image, and writes a report. Minutes on two cores, after the packages are installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/venv.sh
source tools/venv.sh

venv=${PGDIST_VENV:-.venv}
ensure_venv "$venv"
python=$venv/bin/python
export JAX_PLATFORMS=cpu
run=runs/demo

step() {
  printf '\n$ %s\n' "$*" >&2
  "$@"
}

# Waits until the run has logged a step, or has ended.
wait_for_step() {
  until grep -q "\"step\": $1," "$run/metrics.jsonl" 2>/dev/null || ! kill -0 "$training" 2>/dev/null; do
    sleep 0.2
  done
}

step "$python" tools/make_demo_data.py --task=relations --out=runs/demo_data --train=2048 --validation=96 >/dev/null
# The demo starts anew each time; a run of your own goes on where it stopped when you start it again.
rm -rf "$run"
train=("$python" -m launch.train --config=configs/demo.py --workdir="$run" --fake_devices=2)

printf '\n$ %s\n' "${train[*]}" >&2
"${train[@]}" &
training=$!
wait_for_step 70
printf '\n$ kill -TERM %d   # as a cluster does that wants its machine back\n' "$training" >&2
kill -TERM "$training"
code=0
wait "$training" || code=$?
if [ "$code" -ne 42 ]; then
  echo "error: expected exit code 42 (stopped, state saved), found $code" >&2
  exit 1
fi

step "${train[@]}"
step "$python" -m launch.predict --workdir="$run" --prompt="describe en" --images runs/demo_data/new.png
"$python" - "$run" <<'END'
import json, sys
run = sys.argv[1]
scores = {}
for line in open(f"{run}/metrics.jsonl"):
    row = json.loads(line)
    if "validation/exact_match" in row:
        scores[row["step"]] = row["validation/exact_match"]
(before, *_, after) = [scores[step] for step in sorted(scores)]
print(f"\nHeld-out scenes described exactly: {before:.1%} before, {after:.1%} after {max(scores)} steps.")
print(f"Report: {run}/report.html   trained model: {run}/model.npz")
END
