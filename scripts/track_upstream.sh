#!/usr/bin/env bash
# Tries the patches on a newer commit of slime, by default the newest of its main branch, and prints one report:
#   scripts/track_upstream.sh [--commit COMMIT] [--pin PIN] [--without-tests] [--folder DIR]
# Fetches slime whole (into DIR, which is the script's own and is kept; default: a temporary folder), ports the patches of
# PIN (default: the nearest pin), looks up the names of slime that the overlay uses, and runs the fast tests with real
# slime, on CPUs. The report is also in DIR/report.
# Exit status: 0 all of it fits, 1 something does not, 2 it could not be tried.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
commit="" pin=() tests=yes folder=""

die() {
    echo "error: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --commit | --pin | --folder)
        [ $# -gt 1 ] || die "$1 wants a value"
        case $1 in
        --commit) commit=$2 ;;
        --pin) pin=(--pin "$2") ;;
        --folder) folder=$(realpath -m "$2") ;;
        esac
        shift 2
        ;;
    --without-tests) tests="" && shift ;;
    *) die "what is $1? See the head of $0" ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder" || exit 2
slime=$folder/slime
report=$folder/report
own=$slime/.git/track-upstream # the checkout is reset at will: it must be the script's own
: >"$report"

told() { printf '%s\n' "$*" | tee -a "$report"; }

if [ -e "$slime" ]; then
    [ -f "$own" ] || die "$slime is there, and not of this script's making: name another --folder"
    git -C "$slime" fetch -q --tags origin || die "slime could not be fetched"
    git -C "$slime" reset -q --hard || exit 2 # markers of a conflict
    if [ -f "$slime/.git/slime-cross-job.json" ]; then scripts/apply.sh "$slime" --reverse >/dev/null || exit 2; fi
else
    scripts/fetch_slime.sh "$slime" --full >"$folder/fetch.log" 2>&1 || die "$(cat "$folder/fetch.log")"
    touch "$own"
fi
found=$(git -C "$slime" rev-parse -q --verify "origin/${commit:-main}^{commit}" ||
    git -C "$slime" rev-parse -q --verify "$commit^{commit}") || die "slime has no commit, branch or tag $commit"
git -C "$slime" checkout -q --detach "$found" || exit 2
told "== slime at $(git -C "$slime" log -1 --format='%h of %cs: %s')"

said=0
scripts/apply.sh "$slime" "${pin[@]}" --port >"$folder/port.log" 2>&1 || said=$?
told "$(<"$folder/port.log")"
[ "$said" -lt 2 ] || die "it could not be tried"
if [ "$said" = 1 ]; then
    told "== it does not fit: mend what is named, or make the commit a pin (patches/README.md)"
    exit 1
fi
if [ "$tests" ]; then
    files=(tests/slime/test_{off,source,tracking,equal_data,same_training}.py)
    (ENVIRONMENT=slime . scripts/env.sh) >"$folder/tests.log" 2>&1 || die "no environment for tests: $(tail -1 "$folder/tests.log")"
    SLIME_AT_MAIN=$slime scripts/test.sh "${files[@]}" -q -k 'main and not async' >"$folder/tests.log" 2>&1 || said=$?
    told "== fast tests with this slime"
    told "$(grep -E '^[0-9]+ (passed|failed)|^(FAILED|ERROR|E  |error:)' "$folder/tests.log" | tail -20)"
fi
told "== it $([ "$said" = 0 ] && echo fits || echo 'does not fit')"
exit $((said != 0))
