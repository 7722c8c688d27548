"""Time, memory and FLOPs of models on this machine, and how they were measured."""
