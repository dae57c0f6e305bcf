"""The unified pool: its arithmetic (``layout``), its host accounting (``pages``, with ``costs``) and its device array
(``pool``).

``layout``, ``pages`` and ``costs`` import no JAX.
"""
