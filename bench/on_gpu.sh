#!/usr/bin/env bash
# Measures everything that needs a GPU, on a machine without a network. The most valuable stages come first, in case the
# machine's time runs out; a stage that fails stops no other.
#   OUT=FOLDER bench/on_gpu.sh        writes to FOLDER and skips the stages whose results are there already
#   DRY_RUN=1 bench/on_gpu.sh         runs every stage at tiny sizes on a CPU
# PYTHON is the interpreter (default: python3), LIMIT the most seconds of a stage (default: 170), ONLY a regular
# expression that names the stages to run (default: all).
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-bench/records/gpu} PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-99}
python=${PYTHON:-python3} limit=${LIMIT:-170}
mkdir -p "$OUT"
size=full device=cuda quick=() kernels=() compiler=(--compile --rounds 9)
# with TRL's 50 denoising steps a case takes minutes; with these, two rounds or more fit into a stage
example=lora-fp16 few=(--steps 10) fewer=(--steps 4) seeds=2
if [[ ${DRY_RUN:-} ]]; then
    size=tiny device=cpu quick=(-k "determin or last_bit or refuse or unknown_names or replays or buckets or unfused") compiler=()
    kernels=(--only geglu --architectures 90)
    example=lora few=() fewer=() seeds=1
fi
# Kernels that Triton interprets can be neither timed nor compiled. Tests set this variable themselves where they find no
# GPU.
unset TRITON_INTERPRET
# Without its compiler the CUDA of group norms is left out, and the rest of their tests need not fail for it.
cuda=()
[[ ${DRY_RUN:-} || -x /usr/local/cuda/bin/nvcc ]] || command -v nvcc >/dev/null || cuda=(-k "not csrc and not cpp")
failed=0 summary=""

# stage NAME RESULT COMMAND...: the command writes RESULT.part, which is renamed to RESULT if the command succeeds
stage() {
    local name=$1 result=$OUT/$2 begun=$SECONDS
    shift 2
    [[ $name =~ ${ONLY:-.} ]] || return
    if [[ -e $result ]]; then report "$name" "done before"; return; fi
    rm -f "$result.part"
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 && [[ -e $result.part ]]; then
        mv "$result.part" "$result"
        report "$name" "$((SECONDS - begun)) s"
    else
        failed=1
        report "$name" "FAILED after $((SECONDS - begun)) s"
        tail -n 15 "$OUT/$name.log"
    fi
}
report() {
    echo "$1: $2"
    summary+=$(printf '%-24s%s' "$1" "$2")$'\n'
}
# tests NAME FILE...: runs files of tests and keeps their report, which lets `times` measure the ops that passed
tests() { stage "tests-$1" "tests-$1.xml" "$python" -m pytest -q "${quick[@]}" "--junitxml=$OUT/tests-$1.xml.part" "${@:2}"; }

# times NAME TESTS OPTION...: times ops, if the stage of tests of that name has passed. A dry run runs only a few of the
# tests, so its records say that the ops are unverified.
times() {
    local name=ops-$1 tests=$OUT/tests-$2.xml gate=(--tested "$OUT/tests-$2.xml")
    [[ $name =~ ${ONLY:-.} ]] || return
    [[ -e $tests ]] || { failed=1; report "$name" "skipped, its tests have not passed"; return; }
    [[ -z ${DRY_RUN:-} ]] || gate=(--skip-tests)
    stage "$name" "$name.jsonl" "$python" bench/ops.py --device $device --size $size "${gate[@]}" \
        --output "$OUT/$name.jsonl.part" --plot "$OUT/$name.png" "${@:3}"
}

# speeds NAME OPTION...: our trainer's speed and TRL's
speeds() {
    stage "throughput-$1" "throughput-$1.jsonl" "$python" bench/throughput.py --device $device --size $size \
        --budget $((limit - 20)) --output "$OUT/throughput-$1.jsonl.part" "${@:2}"
}
# bars NUMBER TECHNIQUE...: a part of the waterfall, which as a whole takes longer than a stage may. Each part begins with
# the last bar of the part before, so that every bar is compared with its neighbour in the same rounds.
bars() { speeds "waterfall-$1" --waterfall --case $example "${few[@]}" --technique "${@:2}"; }
# capped KIND GB: memory and time with the settings that the plan chooses for so many GB, and for the whole GPU
capped() {
    stage "memory-$1-$2" "memory-$1-$2.jsonl" "$python" bench/memory.py --device $device --size $size \
        --kinds "$1" --cap "$2" --output "$OUT/memory-$1-$2.jsonl.part"
}

# calls NAME WAY...: calls of the UNet by their rows, launched in each way; a CPU has only the plain one
calls() {
    local ways=("${@:2}")
    [[ -z ${DRY_RUN:-} ]] || ways=(plain)
    stage "calls-$1" "calls-$1.jsonl" "$python" bench/unet_calls.py --device $device --size $size \
        --way "${ways[@]}" --output "$OUT/calls-$1.jsonl.part"
}

tests steps tests/test_step_logprob.py tests/test_ppo_loss.py
stage model model.json "$python" bench/model.py --device $device --size $size --output "$OUT/model.json.part"
speeds $example --case $example "${few[@]}"
# eager, with timed convolutions and as a graph; then compiled, which takes longer to begin with
calls plain plain timed graph
speeds full-bf16 --case full-bf16 "${fewer[@]}"
for gb in 24 8 16 12; do capped full $gb; done
if [[ -z ${DRY_RUN:-} ]]; then
    calls compiled compiled
    calls compiled_graph "compiled graph"
fi
tests compiled tests/test_compiled_blocks.py
speeds no-guidance --case no-guidance "${few[@]}"
speeds full-fp32 --case full-fp32 "${fewer[@]}"
bars 1 trl plain merged cached
bars 2 cached packed fused
bars 3 fused skipped overlapped
if [[ -z ${DRY_RUN:-} ]]; then
    bars 4 overlapped compiled
    bars 5 compiled graphs
fi
speeds profile --profile $example
# a few runs at a time, as the bundled model leaves most of a GPU idle; repeated after a timeout, it goes on
stage learning learning.json "$python" bench/learning.py --device $device --size $size --jobs 4 --seeds $seeds \
    --contenders trl recipe --records "$OUT/learning" --output "$OUT/learning.json.part" --plot "$OUT/learning.png"
times step_logprob steps --op step_logprob
times ppo_loss steps --op ppo_loss
tests norms tests/test_groupnorm_silu.py tests/test_add_layernorm.py "${cuda[@]}"
times groupnorm_silu norms --op groupnorm_silu
times add_layernorm norms --op add_layernorm
tests gates tests/test_geglu.py
times geglu gates --op geglu
tests layers tests/test_lora_linear.py tests/test_qkv_linear.py tests/test_frozen.py
times lora_linear layers --op lora_linear
times qkv_linear layers --op qkv_linear
times frozen layers --op frozen
tests unet tests/test_fused_layers.py tests/test_modulated_blocks.py tests/test_attention.py
tests trainer tests/test_cuda_graphs.py tests/test_master_weights.py tests/test_batch_sizes.py
tests engine tests/test_engine.py
for gb in 8 12 24 16 40; do capped lora $gb; done
capped full 40
times compiled_steps steps --op step_logprob ppo_loss "${compiler[@]}"
times compiled_norms norms --op groupnorm_silu "${compiler[@]}"
times compiled_gates gates --op geglu "${compiler[@]}"
# the attention that would be chosen for each size of heads, with the reasons against the others
stage attention attention.txt bash -c "\"$python\" -m ddpo_fast.cli info >\"$OUT/attention.txt.part\""
stage sources sources.jsonl "$python" bench/compile_cuda.py --torch installed --output "$OUT/sources.jsonl.part"
stage kernels kernels.jsonl "$python" bench/compile_kernels.py "${kernels[@]}" --output "$OUT/kernels.jsonl.part"

# a pattern without a match stays as it is, and then names no file
records=("$OUT"/ops-*.jsonl)
[[ ! -e ${records[0]} ]] || "$python" bench/ops.py --show "${records[@]}"
records=("$OUT"/throughput-*.jsonl)
[[ ! -e ${records[0]} ]] || "$python" bench/throughput.py --show "${records[@]}" --output "$OUT/throughput.jsonl"
records=("$OUT"/memory-*.jsonl)
[[ ! -e ${records[0]} ]] || "$python" bench/memory.py --show "${records[@]}"
echo "$summary"
exit $failed
