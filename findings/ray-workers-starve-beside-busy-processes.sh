#!/usr/bin/env bash
# ray 2.60.0: every worker runs at nice 15, and its driver at 0; on a machine whose cores are busy, actors can take minutes to come up.
#
# Tasks and actors are processes of low priority wherever Ray runs, and no message, table or state says so. A process of nice 15 has 36
# shares where one of nice 0 has 1024, so beside one busy process a core an actor that needs 4 s of a processor to import its libraries gets
# 3% of one: start-up and readiness timeouts that are generous on an idle machine fail on a shared one (a test suite with a worker a core, a
# driver that computes, a notebook beside). Logical CPUs show as free all the while. RAY_worker_niceness=0, where Ray is started, ends it.
#
# Seen on 28 November 2026:   driver 0, task 15, actor 15; with RAY_worker_niceness=0: driver 0, task 0, actor 0
set -euo pipefail
place=$(mktemp -d /tmp/find-XXXXXX)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet ray==2.60.0
cat > "$place/nice.py" <<'PY'
import logging
import os
import sys

import ray

ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, _temp_dir=sys.argv[1])


@ray.remote
def task():
    return os.nice(0)


@ray.remote
class Actor:
    def nice(self):
        return os.nice(0)


print(f"driver {os.nice(0)}, task {ray.get(task.remote())}, actor {ray.get(Actor.remote().nice.remote())}")
ray.shutdown()
PY
plain=$(env -u RAY_worker_niceness "$place/env/bin/python" "$place/nice.py" "$place/a" 2>/dev/null | tail -1)
raised=$(RAY_worker_niceness=0 "$place/env/bin/python" "$place/nice.py" "$place/b" 2>/dev/null | tail -1)
echo "$plain; with RAY_worker_niceness=0: $raised"
test "$plain" = "driver 0, task 15, actor 15" && test "$raised" = "driver 0, task 0, actor 0" || { echo "the behaviour has changed"; exit 1; }
