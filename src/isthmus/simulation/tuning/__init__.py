"""Fine-tuning on several accelerators that are described instead of measured, event by event; no torch."""
