"""The policies by name."""

from __future__ import annotations

from isthmus.tuning.policies.affinity import Affinity
from isthmus.tuning.policies.base import PolicySetup, StagedPolicy
from isthmus.tuning.policies.in_place import InPlace
from isthmus.tuning.policies.paper import Paper
from isthmus.tuning.policies.whole_stages import CpuExperts, GPipeOffload, Mobius, Resident

POLICIES: dict[str, type[StagedPolicy]] = {
    policy.name: policy for policy in (Affinity, Paper, Mobius, GPipeOffload, CpuExperts, Resident)
}

__all__ = ["POLICIES", "InPlace", "PolicySetup", "StagedPolicy"]
