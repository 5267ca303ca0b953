"""What a model is worth on a text: its perplexity, and how its predictions differ from another's."""
