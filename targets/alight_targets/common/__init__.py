"""What targets share whose engine computes logits and nothing else: tokenizer, sampling, batching."""
