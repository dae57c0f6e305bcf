"""The unified pool: its arithmetic (``layout``), its host accounting (``pages``) and its device array (``pool``).

``layout`` and ``pages`` import no JAX.
"""
