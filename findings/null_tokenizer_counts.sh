#!/usr/bin/env bash
# megatron-core 0.17.1 and 0.18.2: the same `--tokenizer-type NullTokenizer --vocab-size 131` is a
# tokenizer of 132 tokens whose end of document (EOD) is 131, or of 131 tokens whose EOD is 130.
#
# A checkpoint stores these arguments and no count of tokens, so the release that wrote it decides
# whether row 131 of its embedding is a token or padding. What tells the releases apart is that the
# later ones store `null_tokenizer_eod_id`.
#
# Seen:   0.17.1: vocab_size 132, eod 131
#         0.18.2: vocab_size 131, eod 130
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for version in 0.17.1 0.18.2; do
    python3 -m pip install --quiet --no-deps --ignore-requires-python --target "$place/$version" "megatron-core==$version"
done
cat >"$place/count.py" <<'PY'
import runpy
import sys

module = runpy.run_path(f"{sys.argv[1]}/megatron/core/tokenizers/text/libraries/null_tokenizer.py")
tokenizer = module["NullTokenizer"](131)
print(f"vocab_size {tokenizer.vocab_size}, eod {tokenizer.eod}")
PY
status=0
check() { # VERSION EXPECTED
    local seen
    seen=$(python3 "$place/count.py" "$place/$1")
    echo "$1: $seen"
    [ "$seen" = "$2" ] || { echo "changed: expected $2" >&2; status=1; }
}
check 0.17.1 "vocab_size 132, eod 131"
check 0.18.2 "vocab_size 131, eod 130"
exit $status
