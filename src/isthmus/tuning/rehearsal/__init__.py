"""The runtime played through on a clock: its own policies, loader, optimizer's order and dense units, with measured
seconds in the place of arithmetic. For predictions of machines that were measured."""
