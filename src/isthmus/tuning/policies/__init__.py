"""The policies by name."""

from __future__ import annotations

from isthmus.tuning.policies.affinity import Affinity
from isthmus.tuning.policies.base import PolicySetup, StagedPolicy
from isthmus.tuning.policies.in_place import InPlace
from isthmus.tuning.policies.paper import Paper
from isthmus.tuning.policies.seat import PolicySeat
from isthmus.tuning.policies.whole_stages import CpuExperts, GPipeOffload, Mobius, Resident

POLICIES: dict[str, type[StagedPolicy]] = {
    policy.name: policy for policy in (Affinity, Paper, Mobius, GPipeOffload, CpuExperts, Resident)
}
PREDICTING = frozenset({Affinity.name, Paper.name})
"""Policies that look one layer ahead with the predictor."""

__all__ = ["POLICIES", "PREDICTING", "InPlace", "PolicySeat", "PolicySetup", "StagedPolicy"]
