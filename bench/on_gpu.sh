#!/usr/bin/env bash
# Every figure that needs a GPU, in one command for an offline machine, most valuable first.
#   OUT=FOLDER bench/on_gpu.sh        stages that are in FOLDER already are skipped
#   DRY_RUN=1 bench/on_gpu.sh         every stage at tiny sizes on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-bench/records/gpu} PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}"
python=${PYTHON:-python3}
mkdir -p "$OUT"
size=full device=cuda quick=()
if [[ ${DRY_RUN:-} ]]; then size=tiny device=cpu quick=(-k "determin or opcheck or custom_op or library"); else unset TRITON_INTERPRET; fi
failed=0

# stage NAME RESULT COMMAND...: the command writes RESULT.part, which takes its name when the stage has passed
stage() {
    local name=$1 result=$OUT/$2 begun=$SECONDS
    shift 2
    if [[ -e $result ]]; then echo "$name: done before"; return; fi
    rm -f "$result.part"
    if timeout 170 "$@" >"$OUT/$name.log" 2>&1 && [[ -e $result.part ]]; then
        mv "$result.part" "$result"
        echo "$name: $((SECONDS - begun)) s"
    else
        failed=1
        echo "$name: FAILED after $((SECONDS - begun)) s"
        tail -n 15 "$OUT/$name.log"
    fi
}
tests() { stage "tests-$1" "tests-$1.xml" "$python" -m pytest -q "${quick[@]}" "--junitxml=$OUT/tests-$1.xml.part" "${@:2}"; }
times() {
    [[ -e $OUT/tests-$1.xml ]] || { echo "ops-$2: skipped, its tests have not passed"; failed=1; return; }
    stage "ops-$2" "ops-$2.jsonl" "$python" bench/ops.py --op "$2" --device $device --size $size --skip-tests \
        --output "$OUT/ops-$2.jsonl.part"
}

tests steps tests/test_step_logprob.py tests/test_ppo_loss.py
times steps step_logprob
times steps ppo_loss
tests norms tests/test_groupnorm_silu.py
times norms groupnorm_silu
tests gates tests/test_geglu.py
times gates geglu
quick=()
tests layers tests/test_lora_linear.py tests/test_frozen.py
times layers lora_linear
times layers frozen
[[ ${DRY_RUN:-} ]] || tests unet tests/test_fuse_unet.py tests/test_attention.py
[[ ${DRY_RUN:-} ]] || stage kernels kernels.jsonl "$python" bench/compile_kernels.py --output "$OUT/kernels.jsonl.part"

"$python" - "$OUT" <<'PY'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("ops-*.jsonl")):
    for row in map(json.loads, path.read_text().splitlines()):
        print(f"{row['op']:<15}{row['direction']:<8}{row['dtype']:<9}{row['shape']:<38}{row['contender']:<14}"
              f"{row['us_p50']:>10.1f} us{row['share_of_copy']:>7.0%} of copy"
              f"{row['speed_up']:>7.2f}x{row['launches']:>5} {row['launches_are']}")
PY
exit $failed
