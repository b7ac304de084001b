"""What must hold for every composition, measured on one model: its own weights, dtype and device.

Each check compares two ways to compute the same logits. It also measures its twin: the same comparison after a change
that it must notice, so that no check passes because it cannot fail. If a comparison fails, it runs again on text alone,
with the bare language model; if that fails as badly, the language model is the reason.

    check.py    the registry          subject.py  the whole model, and its bare language model
    checks/     the checks by theme   judge.py    the verdict, and who is to blame
    run.py      all of it             finding.py  the results
"""

from vlm_cli.doctor.check import CHECKS
from vlm_cli.doctor.finding import Finding, Verdict
from vlm_cli.doctor.run import QUICK, check_invariants
from vlm_cli.doctor.tf32 import uses_of_tf32, without_tf32

__all__ = ["CHECKS", "QUICK", "Finding", "Verdict", "check_invariants", "uses_of_tf32", "without_tf32"]
