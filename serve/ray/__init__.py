"""The server on the machines of a Ray cluster: one address, an engine in each replica. Needs the extra ``ray``.

Ray Serve's proxy takes HTTP and passes each request to a replica, which answers it by the same application as
``python -m serve`` does, behind the same door. Nothing else of this library imports this package.
"""
