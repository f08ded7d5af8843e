"""Several processes train one model, each its own stages (APTMoE, section 3)."""
