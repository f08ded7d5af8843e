"""A checkpoint becomes a decoupled one: slices of its weights, fitted and distilled on text."""
