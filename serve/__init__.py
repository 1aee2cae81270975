"""A prediction server whose requests leave at their own exits.

The life of a request, with its files and threads:

 1. A transport (``protocol.http`` behind ``protocol.connections``, or ``protocol.grpc``, in the event loop) asks
    ``protocol.admission`` for places before it reads a body: beyond the bounds of images or bytes on the way, or
    where the head has a deadline that is not expected to be met, the request is refused at once (``OverloadedError``)
    with an estimate of when to try again; over HTTP, before it has a task. Then it decodes the body:
    ``protocol.codec`` turns its bytes, or numbers, into images, and ``protocol.service`` checks them against the
    ``protocol.model``; a request that is not expected to be answered by its deadline is refused here.
 2. ``engine.routes.choose_route`` turns the request's ``epsilon`` and ``deadline_ms`` into one of the bundle's routes:
    a certified plan, or the base without caches.
 3. ``Engine.submit`` (the same thread, under the engine's lock) makes a ``Job`` of each image. ``Scheduler.admit``
    gives all of them slots, or none. The service gets a future for each image and waits without polling.
 4. The engine's thread (``engine.loop``), woken or back from the last step, asks the ``engine.scheduler`` under the
    lock. Jobs that are not worth a step are dropped first: too little is left until their deadline
    (``DeadlineError``), or their client has left. Then ``next_step`` selects the best queue, of a route and a stage,
    and the bucket that gains most (``engine.policy``), whatever requests its jobs belong to.
 5. ``JaxRunner.dispatch`` (the engine's thread, without the lock) starts the program (``engine.programs``) of that
    route, stage and bucket: it gathers the jobs' rows from the slab of the previous site (the first stage takes the
    images), runs the blocks up to the next site, looks up its cache, and scatters the activations into that site's
    slab. Rows that pad the bucket have slots out of bounds: what they read is not used, and they write nothing.
 6. The engine's thread waits for one small array: scores and logits. Meanwhile arrivals gather in the first queues.
 7. ``Scheduler.finish`` (under the lock) frees the slots of jobs that leave; the others wait for the next stage, with
    all jobs that have come as far. Futures are completed outside the lock, and the service turns answers into tensors.
    With ``--overlap``, and if no other job waits, step 5 has by then been repeated for the next stage, with all rows:
    the device does not wait for the host, and what it computed for jobs that left is discarded.
 8. Steps 4 to 7 repeat until a hit or the last stage, where every job leaves.
 9. A job that has hit may continue as a shadow job, if ``shadow`` wants the base's answer as well: its client is
    answered, its slot stays taken, and only the last stage answers it. Clients go first, see ``engine.scheduler``.

Parameters may change: ``Engine.between_steps`` has them swapped in the engine's thread. Jobs in flight continue from
the slabs, because the base never changes; steps after a swap use the new caches. With ``--adapt``, ``adaptive`` stands
between the service and the engine, and has a thread of its own; without it, nothing of it is imported.

There may be several models: each has an engine, and they take turns on the device (``engine.turns``).
``protocol.repository`` finds a request's model, and has models loaded and replaced in other threads. Compiled programs
are kept for the next start by ``engine.program_cache``.

Failures:

 - A step (out of memory, a broken device): its own jobs fail (``StepError``), and it is counted. Slabs are donated to
    the programs that write them; if one is lost with a step, the jobs whose rows were in it fail at their next step,
    and the slab starts anew. The server continues.
 - A client that leaves: its futures are cancelled. Jobs that wait are dropped before the next step, jobs in a step
    after it. Until then the slot counts, because its row may still be written.
 - The engine itself (a bug): its thread logs the error, fails all jobs in flight and admits nothing more;
    ``Statistics.running`` turns false, and with it readiness and liveness.
 - Stopping (``lifecycle``): nothing more is admitted (``StoppingError``); what was admitted is finished, except for
    shadow jobs, which are reported to the observer as lost; then the thread ends.

So there are two kinds of threads: any number that submit, and one for each engine, which owns the device for a step.
They share an engine's scheduler and some counters behind one lock, which is held for microseconds. A further thread
answers health and metrics on a port of their own, whatever the event loop is busy with. ``page`` shows the same numbers
to people, in the event loop, from snapshots that a thread of its pool makes while it has viewers. Another one writes
the log's lines (``logs``), so that a slow reader of the log never stalls a request. ``assemble`` puts the parts
together from the ``settings``. Importing the engine, the scheduler, its policy and the records needs no JAX.
"""
