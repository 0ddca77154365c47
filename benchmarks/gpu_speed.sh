#!/usr/bin/env bash
# Speed on one GPU, in the order of value; most steps below two minutes, JSON into $OUT.
#   OUT=results bash benchmarks/gpu_speed.sh check            one step
#   OUT=results bash benchmarks/gpu_speed.sh                  all of them
# Where the package is not installed, `refrag` is reached through a link: ln -sfn "$PWD" /tmp/site/refrag, and
# PYTHONPATH=/tmp/site:$PWD. A step that fails does not stop the next one.
set -u
OUT=${OUT:?folder for the JSON}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

refrag() { timeout 300 "$PYTHON" -m refrag.cli bench "$@" > /dev/null; }
ttft() { refrag ttft --decoder llama-2-7b --device cuda --json "$@"; }

step() {
  echo "== $1 $(date +%T)"
  case $1 in
    # 1. is it right? float32 tokens equal, bfloat16 within the eager noise, every form of attention
    check) timeout 300 "$PYTHON" -m benchmarks.fast_path_check --families llama,qwen3,gpt2 --output "$OUT/check.json" > /dev/null ;;
    # 2. the headline row, then the others; full context once a length
    ttft-16k) ttft --context 16384 --chunk-size 32,16 --expansion-fraction 0,.1 --batch 1 -o "$OUT/ttft-16k.json" ;;
    # 3. which form of attention and which batch the encoder should take by default
    sweep-minilm) refrag encode --body minilm --sweep --chunks 500000 --device cuda --json -o "$OUT/sweep-minilm.json" ;;
    sweep-roberta) refrag encode --body roberta-base --sweep --chunks 200000 --device cuda --json -o "$OUT/sweep-roberta.json" ;;
    # 4. encode with its baselines
    encode-minilm) refrag encode --body minilm --device cuda --json -o "$OUT/encode-minilm.json" --plot "$OUT/encode.png" ;;
    encode-roberta) refrag encode --body roberta-base --chunks 500000 --device cuda --json -o "$OUT/encode-roberta.json" ;;
    # 5. the rest of the table, in pieces
    ttft-2k) ttft --context 2048,4096 --expansion-fraction 0,.1 -o "$OUT/ttft-2k.json" ;;
    ttft-8k) ttft --context 8192 --expansion-fraction 0,.1 --batch 1 -o "$OUT/ttft-8k.json" ;;
    ttft-25) ttft --context 2048,4096,8192 --expansion-fraction .25 --no-full --batch 1 -o "$OUT/ttft-25.json" ;;
    # 6. a whole build (needs faiss)
    build-100) refrag build --megabytes 100 --device cuda --json -o "$OUT/build-100.json" ;;
    build-1000) timeout 580 "$PYTHON" -m refrag.cli bench build --megabytes 1000 --device cuda --json -o "$OUT/build-1000.json" > /dev/null ;;
    *) echo "unknown step $1"; return 2 ;;
  esac
  echo "== $1 ended with $? at $(date +%T)"
}

STEPS=${*:-check ttft-16k sweep-minilm sweep-roberta encode-minilm encode-roberta ttft-2k ttft-8k ttft-25 build-100 build-1000}
for name in $STEPS; do step "$name"; done
