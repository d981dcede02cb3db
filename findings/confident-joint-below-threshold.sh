#!/usr/bin/env bash
# cleanlab 2.9.0: a sample confident of two classes is counted for a third one that it is not confident of.
#
# Confident learning (Northcutt, Jiang, Chuang; JAIR 2021, Eq. 1) counts sample i for the class of largest probability AMONG
# those whose threshold (mean own probability of that class's samples) it reaches. compute_confident_joint does so where one class
# is reached. Where two or more are, it takes the largest probability of all classes, also of one far below its threshold.
# Here the second sample reaches classes 0 and 1 (0.28 >= 0.24, 0.30 >= 0.26) and not class 2 (0.42 < 0.925), and is counted
# as (given 0, true 2): as a label issue of a class of which nothing is confident. The paper's rule says (0, 1).
# Small classes of low confidence beside one of high confidence are all that it takes.
#
# Seen on 28 November 2026:   thresholds 0.240 0.260 0.925; reached by sample 1: [0, 1]; counted for class 2, by the paper 1
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet cleanlab==2.9.0 numpy==2.4.6 scikit-learn==1.9.1
"$place/env/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
from cleanlab.count import compute_confident_joint, get_confident_thresholds

probabilities = np.array(
    [[0.20, 0.10, 0.70], [0.28, 0.30, 0.42], [0.10, 0.20, 0.70], [0.10, 0.32, 0.58], [0.02, 0.03, 0.95], [0.05, 0.05, 0.90]]
)
labels = np.array([0, 0, 1, 1, 2, 2])
thresholds = get_confident_thresholds(labels, probabilities)
assert np.allclose(thresholds, [probabilities[labels == k, k].mean() for k in range(3)])
reached = np.flatnonzero(probabilities[1] >= thresholds).tolist()
joint, issues = compute_confident_joint(
    labels, probabilities, calibrate=False, return_indices_of_off_diagonals=True
)
joint = np.asarray(joint)
counted = [int(k) for k in np.flatnonzero(joint[0]) if k != 0]
by_the_paper = max(reached, key=lambda k: probabilities[1, k])
print(f"cleanlab {version('cleanlab')}: thresholds {' '.join(f'{t:.3f}' for t in thresholds)}; "
      f"reached by sample 1: {reached}; counted for class {counted[0]}, by the paper {by_the_paper}")
assert list(issues) == [1] and reached == [0, 1] and by_the_paper == 1, "the behaviour has changed"
assert counted == [2], "the behaviour has changed"
PY
