"""``isthmus plan tune``: whether a model fits, how fast a step is and what would help, before a weight is read."""
