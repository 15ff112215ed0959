#!/usr/bin/env bash
# Does a plan still hold? For CI: 0 if it does, 3 if a gate fails, 1 if something could not be measured.
#
#     examples/gate.sh profiles/builtin--tiny/plans/ilp-stored-2.75.yaml
#
# Leaves results/ (every sample; a job that was killed goes on from there), results.json and report.html.
set -euo pipefail

plan=${1:?usage: gate.sh PLAN}
samples=${SAMPLES:-10}

kvmix inspect "$plan" > /dev/null

status=0
kvmix eval --quiet --json --resume --limit "$samples" \
    --plan "$plan" --baseline uniform-4 \
    --task perplexity,recall,memory \
    --fail-if 'perplexity_increase_percent > 3' \
    --fail-if 'recall < -10%' \
    --fail-if 'prediction_error_percent > 1' \
    > results.json || status=$?

kvmix report results --quiet --html report.html --markdown report.md > /dev/null
exit "$status"
