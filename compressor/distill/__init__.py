"""Fine-tuning: trains kept blocks of a packed file to follow the original network.

finetune.py is the entry, trainer.py the loop, trajectories.py the original's recorded sampling
trajectories. May import: runtime, packing.
"""
