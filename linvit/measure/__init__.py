"""Time, memory and FLOPs of models on this machine, and the record of how they were measured."""
