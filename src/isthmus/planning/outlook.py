"""What decoupling a plain model would bring to a request, on the devices and links that its plans are made for.

The same planner is asked about the decoupled forms of the same model, which do not exist yet. Bytes, exchanges and
original layers are as certain as in any plan; what a sub-block takes was not measured, and is derived from the model's
own layers (``DeviceCosts``). How close a decoupled copy comes to the original is not known before it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from isthmus.planning.inference import GAIN, Candidate, Choice, choose
from isthmus.planning.plans import Question
from isthmus.spec.decoupling import default_num_groups, original_layers_of
from isthmus.spec.errors import IsthmusError
from isthmus.spec.transformer import TransformerSpec


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The fastest plan of a decoupled form, and how it compares with what was chosen for the plain model."""

    spec: TransformerSpec
    candidate: Candidate
    times_as_fast: float

    @property
    def is_gain(self) -> bool:
        """Whether it is faster by more than several devices must be than one."""
        return self.times_as_fast * (1 - GAIN) > 1


def outlook(question: Question, choice: Choice) -> Outlook | None:
    """What the fastest of ``decoupled_forms`` would gain over ``choice``, which was made for ``question``. None where
    there is no such form, or none whose plans fit the devices' memory."""
    found = []
    for form in decoupled_forms(question.spec, len(question.profile.devices)):
        try:
            chosen = choose(replace(question, spec=form, strategies=("block",))).chosen
        except IsthmusError:  # nothing fits
            continue
        gain = choice.chosen.latency_s / chosen.latency_s
        found.append(Outlook(spec=form, candidate=chosen, times_as_fast=gain))
    return max(found, key=lambda each: each.times_as_fast, default=None)


def decoupled_forms(spec: TransformerSpec, num_devices: int) -> list[TransformerSpec]:
    """``spec`` with a sub-block for each device, and with two, as far as they divide its hidden units; every third
    layer is left original. None for one device, for a single layer, and for what is decoupled already."""
    if spec.decoupling is not None or spec.num_layers < 2 or num_devices < 2:
        return []
    originals = original_layers_of(spec.num_layers, default_num_groups(spec.num_layers))
    return [spec.decoupled(num, originals) for num in dict.fromkeys((num_devices, 2)) if not spec.hidden_size % num]
