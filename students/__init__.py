"""The student: a Hugging Face causal LM that writes rollouts and learns from a signal."""
