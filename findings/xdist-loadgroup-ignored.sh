#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist loadgroup does not keep a group on one worker, and says nothing.
#
# xdist marks a test's group by writing "@group" into the private attribute _nodeid of the collected item, and the scheduler reads it
# off the node id. pytest 9.2 no longer takes nodeid from that attribute, so the suffix never arrives and the tests of one xdist_group
# are dealt out like any others: a shared server, GPU or cluster that the group was meant to protect is used by all workers at once.
# --dist loadfile is not affected.
#
# Seen on 28 November 2026:   loadgroup: one group of 12 tests ran on 2 workers; loadfile: on 1
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet pytest==9.2.0 pytest-xdist==3.8.0
cat > "$place/test_one_group.py" <<'PY'
import pathlib
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("k", range(12))
def test_where(k, worker_id):
    time.sleep(0.2)
    (pathlib.Path(__file__).parent / f"{k}.worker").write_text(worker_id)
PY
workers() {
    rm -f "$place"/*.worker
    (cd "$place" && "$place/env/bin/python" -m pytest -q -n 2 --dist "$1" -p no:cacheprovider >/dev/null)
    cat "$place"/*.worker | grep -o 'gw[0-9]*' | sort -u | wc -l
}
group=$(workers loadgroup)
file=$(workers loadfile)
echo "loadgroup: one group of 12 tests ran on $group workers; loadfile: on $file"
test "$group" -eq 2 && test "$file" -eq 1 || { echo "the behaviour has changed"; exit 1; }
