#!/usr/bin/env bash
# ray 2.60.0: a program that has used Ray and shut it down no longer ends as it did when it is told to end.
#
# ray.init() puts a handler of its own, a sys.exit(15), in the place of the driver's for SIGTERM, also of one that the program had chosen; ray.shutdown()
# does not put the old one back. So a program's own clean-up on SIGTERM is called neither while Ray is up nor ever after.
#
# Seen on 28 November 2026:   own handler before True, while Ray is up False, after shutdown False
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet ray==2.60.0
TMPDIR="$place" "$place/env/bin/python" - <<'PY'
import signal

import ray


def own(number, frame):
    print("cleaned up")


signal.signal(signal.SIGTERM, own)
seen = [signal.getsignal(signal.SIGTERM) is own]
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
seen.append(signal.getsignal(signal.SIGTERM) is own)
ray.shutdown()
seen.append(signal.getsignal(signal.SIGTERM) is own)
print(f"ray {ray.__version__}: own handler before {seen[0]}, while Ray is up {seen[1]}, after shutdown {seen[2]}")
assert seen == [True, False, False], "the behaviour has changed"
PY
