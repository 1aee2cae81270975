"""A prediction server whose requests leave at their own exits.

The life of a request, with the threads it is in:

 1. A front (any thread) has decoded and checked its images. ``routes.choose`` turns what it wishes (``epsilon``,
    ``deadline_ms``) into one of the bundle's routes: a certified plan, or the base alone.
 2. ``Engine.submit`` (the same thread, under the engine's lock) makes a ``Job`` of each image. ``Scheduler.admit``
    gives all of them slots, or none: beyond the bound the request is refused at once (``OverloadedError``) with an
    estimate of when to come again. The front gets a future for each, and waits, or awaits, without polling.
 3. The engine's thread, woken, or back from the last step, asks the scheduler (under the lock). Who waits in vain is
    dropped first: the deadline has passed (``DeadlineError``), or the client has left. Then ``next_step`` takes the
    best queue, of a route and a stage, and the bucket that gains most, whoever is in it and whenever they came.
 4. ``JaxRunner.dispatch`` (the engine's thread, without the lock) starts the program of that route, stage and bucket:
    it gathers the rows of these slots from the slab of the site before (the first stage takes the images), runs the
    span, looks up, and scatters the activations of misses into the slab of the site reached. Rows that fill the bucket
    up have slots out of bounds: nothing is read of them, nothing is written.
 5. The engine's thread waits for one small array: hits, scores, logits. Meanwhile arrivals gather in the first queue.
 6. ``Scheduler.finish`` (under the lock) frees the slots of those who leave; the others wait for the next stage, with
    everyone who has come as far. Futures are completed outside the lock.
    With ``overlap``, and where nobody else waits, step 4 has by then been repeated for the next stage, with all rows:
    the device need not wait for the host, and what it computed for who left is dropped.
 7. Steps 3 to 6 repeat, until a hit or the last stage, where everyone leaves.
 8. A job that has hit may go on as a ghost, if ``shadow`` wants to know what the base says: its client has the answer,
    its slot stays taken, and the last stage alone answers it. Clients go first, see ``waiting``.

What is served may change: ``Engine.between_steps`` has parameters swapped in the engine's thread. Requests on their way
keep what stands in the slabs, for the base never changes; the steps behind a swap look up by the new caches.

Under ``--adapt``, ``serve.adaptive`` stands between the front and the engine, and has a thread of its own.

What may fail, and who notices:

 - A step (out of memory, a broken device): its own jobs fail (``StepError``), and it is counted. Slabs are donated to
    the programs that write them; if one is lost with a step, the jobs whose rows were in it fail when they come up, and
    the slab starts anew. The server goes on.
 - A client that leaves: its futures are cancelled. Who waits is dropped before the next step; who is in a step is let
    go after it. Until then the slot counts, because its row may still be written.
 - The engine itself (a bug): the thread says so in the log, fails everyone on their way, admits nothing more, and
    ``Statistics.running`` turns false, by which readiness turns false.
 - Stopping: nothing more is admitted (``StoppingError``); what was admitted is finished, but for ghosts, of which the
   observer hears that they are lost; then the thread ends.

Two kinds of threads, then: any number that submit, and one that owns the device. They share the scheduler and some
counters, behind one lock that is held for microseconds. Importing ``serve.engine.records``, ``serve.engine.policy``,
``serve.engine.scheduler`` and ``serve.engine`` (with ``serve.engine.loop``, its thread) needs no JAX.
"""
