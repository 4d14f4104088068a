#!/usr/bin/env bash
# The road in small: text of the Python installation -> a base model -> a deeper child specialised on code -> one page.
# Everything lands in runs/. Run it again: finished stages are skipped, an interrupted one goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt requirements-eval.txt

base=configs/quickstart.py
child=configs/quickstart.py:child
n=0
walk() { # title, script, arguments: one stage
    n=$((n + 1))
    printf '\n[%d/12] %s\n' "$n" "$1"
    .venv/bin/python "scripts/$2.py" "${@:3}"
}
heldout() { echo "$1=parquet:runs/base/corpus/heldout/$1-*.parquet#text"; }

walk "prepare: the text of this Python installation"     prepare         --config $base --workdir runs/base
walk "tokenizer: learn 4,096 pieces"                      train_tokenizer --config $base --workdir runs/base
walk "pack: documents into rows of 256 tokens"            pack            --config $base --workdir runs/base
walk "train the base on prose"                            train           --config $base --workdir runs/base
walk "grow it from 4 to 6 layers, the SOLAR way"          initialize      --from runs/base --grow 'depth_upscale(m=1)' --probe 0 --to runs/grown  # no probe: the child is trained next
walk "train the child on code, prose replayed"            train           --config $child --workdir runs/child
for model in base child; do
    walk "export the $model to Hugging Face"              export_hf       --from runs/$model --to runs/$model/hf
    for backend in jax hf; do
        walk "evaluate the $model by $backend"            evaluate        --model runs/$model/hf --tasks "bits_per_byte/$(heldout prose)" "bits_per_byte/$(heldout code)" --backend $backend --to runs/$model/eval/$backend.json
    done
done
printf '\n[compare] the same prompts, base beside child\n'
.venv/bin/python scripts/compare.py --models runs/base runs/child --prompts configs/prompts.txt --max-new 64 --repetition-penalty 1.1 --to runs/child/eval/samples.json
printf '\n[compare] the held-out documents on which they differ most\n'
.venv/bin/python scripts/compare.py --models runs/base runs/child --differ "$(heldout prose)" "$(heldout code)" --to runs/child/eval/differences.json
printf '\n[report]\n'
.venv/bin/python scripts/report.py --workdir runs/base runs/child --to runs/report.html
