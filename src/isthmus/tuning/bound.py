"""The bound of a training step as it really was routed: no placement and no order of loading could have been faster."""

from __future__ import annotations

from isthmus.planning.bound import StepBound, step_bound
from isthmus.planning.problem import CostModel
from isthmus.tuning.session import Session, StepOutcome


class StepBounds:
    """Bounds of one session's steps, by its profile. A resource that does not exist (no separate memory) costs
    nothing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        dense = [key for key in session.store.keys if not key.is_expert]
        self._dense_bytes = sum(session.store.gradient(key).nbytes for key in dense)
        self._num_parameters = sum(session.store.numel(key) for key in session.store.keys)

    def bound(self, outcome: StepOutcome) -> StepBound:
        """Lower bound for a step with these counts; what was measured once in the profile is taken as given."""
        session = self.session
        is_separate = session.accelerator.is_separate
        return step_bound(
            session.profile,
            session.model.spec,
            outcome.counts.counts_LE,
            num_tokens=outcome.num_tokens,
            num_slots=session.plan.num_slots,
            num_optimizer_parameters=self._num_parameters,
            dense_h2d_bytes=session.dense.h2d_bytes(is_backward=False),
            dense_backward_h2d_bytes=session.dense.h2d_bytes(is_backward=True),
            dense_d2h_bytes=self._dense_bytes if is_separate else 0,
        )

    def bound_s(self, outcome: StepOutcome) -> float:
        """Seconds. Without a separate memory experts, dense part and optimizer share the same cores, one after the
        other."""
        return self.bound(outcome).seconds if self.session.accelerator.is_separate else self._in_place_s(outcome)

    def _in_place_s(self, outcome: StepOutcome) -> float:
        """Everything runs one after the other on the same cores: the sum of all that has to be computed."""
        session = self.session
        costs = CostModel(session.profile, session.model.spec)
        seconds = (
            outcome.num_tokens
            * session.model.spec.num_held_layers
            * (session.profile.dense_forward_s_per_token + session.profile.dense_backward_s_per_token)
        )
        for layer, counts in outcome.counts.counts_LE.items():
            for is_backward in (False, True):
                seconds += sum(costs.problem(layer, counts, is_backward=is_backward).accelerator_s)
        return seconds + self._num_parameters * session.profile.optimizer_s_per_parameter
