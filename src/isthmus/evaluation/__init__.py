"""How good a model is, and how like another: fidelity of embeddings, classification, questions, perplexity."""
