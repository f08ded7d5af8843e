"""Plans for hardware that nobody here has: devices by their published figures, under the planner's own cost model."""
