#!/usr/bin/env bash
# The whole pipeline in small: text of this Python installation -> a base model -> a deeper one that
# continues on code -> one HTML page. Everything is written to runs/. Started again, finished stages
# are skipped and an interrupted one resumes.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt requirements-eval.txt

base=configs/quickstart.py
child=configs/quickstart.py:child
n=0
stage() { # title, command, flags
    n=$((n + 1))
    printf '\n[%d/15] %s\n' "$n" "$1"
    .venv/bin/jaxpt "$2" "${@:3}"
}
heldout() { echo "$1=parquet:runs/base/corpus/heldout/$1-*.parquet#text"; }
prose=$(heldout prose)
code=$(heldout code)

stage "prepare: text of this Python installation" prepare --config $base --workdir runs/base
stage "train a tokenizer of 4,096 tokens" train_tokenizer --config $base --workdir runs/base
stage "pack documents into sequences of 256 tokens" pack --config $base --workdir runs/base
stage "train the base on prose" train --config $base --workdir runs/base
# no probe: the grown model is trained next
stage "grow it from 4 to 6 layers, as SOLAR does" initialize \
    --from runs/base --grow 'depth_upscale(m=1)' --probe 0 --to runs/grown
stage "train the child on code, with prose replayed" train --config $child --workdir runs/child
for model in base child; do
    stage "export the $model to Hugging Face" export_hf --from runs/$model --to runs/$model/hf
    for backend in jax hf; do
        stage "evaluate the $model with $backend" evaluate --model runs/$model/hf \
            --tasks "bits_per_byte/$prose" "bits_per_byte/$code" \
            --backend $backend --to runs/$model/eval/$backend.json
    done
done
stage "compare: the same prompts, base beside child" compare --models runs/base runs/child \
    --prompts configs/prompts.txt --max-new 64 --repetition-penalty 1.1 \
    --to runs/child/eval/samples.json
stage "compare: the held-out documents on which they differ most" compare \
    --models runs/base runs/child --differ "$prose" "$code" --to runs/child/eval/differences.json
stage "report" report --workdir runs/base runs/child --to runs/report.html
