"""`linvit bench`: models side by side in one process, correctness checked before anything is timed.

options and presets say what is measured; plan builds every model once without memory; timing, memory, flops and peak
measure; rows puts the numbers together; table, plot and results show them.
"""
