"""LoRA adapters on the host: PEFT folders (``peft``), and the registry of what is known and loaded (``store``).

No JAX and no torch here: adapters reach the device only as arrays that the engine copies into the pool.
"""
