#!/usr/bin/env bash
# torch 2.13.0 (CPU): two switches that are said to do the same: one imports the compiler and tells it, the other does neither.
#
# torch.set_deterministic_debug_mode("error") is documented as an alternative to torch.use_deterministic_algorithms(True). The latter
# imports torch._inductor (and torch._dynamo, sympy: hundreds of modules, seconds of a process that compiles nothing) to set
# torch._inductor.config.deterministic; the former leaves that False. So with the debug mode what is compiled is not asked
# to be deterministic, though torch.are_deterministic_algorithms_enabled() says True after either.
#
# Seen on 28 November 2026:   debug mode: enabled True, compiler imported False, compiler told False
#                             use_deterministic_algorithms: enabled True, compiler imported True, compiler told True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
look() {
  "$place/env/bin/python" - "$1" <<'PY'
import sys

import torch

if sys.argv[1] == "debug mode":
    torch.set_deterministic_debug_mode("error")
else:
    torch.use_deterministic_algorithms(True)
enabled, imported = torch.are_deterministic_algorithms_enabled(), "torch._inductor" in sys.modules
import torch._inductor.config as config

print(f"{sys.argv[1]}: enabled {enabled}, compiler imported {imported}, compiler told {config.deterministic}")
PY
}
found="$(look "debug mode"; look use_deterministic_algorithms)"
echo "$found"
[ "$found" = "debug mode: enabled True, compiler imported False, compiler told False
use_deterministic_algorithms: enabled True, compiler imported True, compiler told True" ] || { echo "the behaviour has changed"; exit 1; }
