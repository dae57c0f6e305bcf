"""Several replicas of one server: which of them answers a request, and a Ray Serve application that runs them.

Importing this package, or its module ``routing``, imports neither Ray nor JAX.
"""
