"""The page at /: what the server does now, for people, and a box for an input of their own.

    GET  /              the page; its files are below /page/
    GET  /page/stream   server-sent events: "about" when a model answers, and "now" every second (``snapshot``)
    POST /page/compare  one input, in the protocol's form for requests: the answer, the scores on the way, the base's

Of several models, all three take ``?model=NAME``; without it, they are of the first one.

It stands at the port of HTTP, not at --admin-port: its box asks for inference, which goes the way of every request,
through the door and the engine, and is counted apart (``Job.is_traffic``). The page's files hold nothing of the server
and need no token; the other two need it. ``feed`` computes a model's snapshot once for all its viewers, from the
counters of /metrics, and nothing without them.
All that the browser loads is here: ``static`` has uPlot 1.6.32 (MIT), unchanged, with its licence.
"""

from .routes import add_page as add_page
