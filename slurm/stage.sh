#!/usr/bin/env bash
# One node: copies folders to its own disk, as METALM_STAGE says: FROM:TO[,FROM:TO...].
#
# A file that is there with its size is left; each other is copied under another name first, so that a copy that
# was cut short is made again. Links are followed.
set -euo pipefail

IFS=, read -ra pairs <<<"$METALM_STAGE"
for pair in "${pairs[@]}"; do
    if [[ $pair != *:?* || ! -d ${pair%%:*} ]]; then
        echo "error: METALM_STAGE: $pair is not of the form FROM:TO with a folder FROM" >&2
        exit 64
    fi
done
listing=$(mktemp)
trap 'rm -f "$listing"' EXIT
for pair in "${pairs[@]}"; do
    from=${pair%%:*} to=${pair#*:}
    find -L "$from/" -type f -printf '%s\t%P\0' >"$listing" # of a link, what it leads to
    dangling=$(find -L "$from/" -type l -print -quit)
    if [[ -n $dangling ]]; then
        echo "error: METALM_STAGE: $dangling is a link that leads nowhere" >&2
        exit 65
    fi
    while IFS=$'\t' read -r -d '' size name; do
        [[ $(stat --format=%s "$to/$name" 2>/dev/null) != "$size" ]] || continue
        mkdir -p "$(dirname "$to/$name")"
        partial=$to/$name.${SLURM_JOB_ID:-$$}.partial
        cp --preserve=timestamps "$from/$name" "$partial"
        mv "$partial" "$to/$name"
    done <"$listing"
done
