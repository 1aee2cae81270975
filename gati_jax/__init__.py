"""GATI-JAX: learned caches on a frozen classifier's activations, and a certificate of how often answers may differ.

The public names stand in ``__init__.pyi``, where type checkers read them; each is imported when it is first used, so
that ``import gati_jax`` loads neither JAX nor anything else of size.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
