r"""GATI-JAX: learned caches on a frozen classifier's activations, and a certificate of how often answers may differ.

A worked example, with a network of five blocks of your own, and arrays of inputs that share no row::

    import gati_jax, jax

    spec = jax.ShapeDtypeStruct((64,), "float32")  # one input
    chain = gati_jax.Chain((block,) * 5, classifier, params, spec)  # block(params, x[batch, ...]) -> y[batch, ...]
    candidates = gati_jax.fit(chain, fit_images, select=select_images)
    costs = gati_jax.measure_costs(chain, candidates)
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, select_images), costs, epsilon=0.05)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, candidates, certify_images), epsilon=0.05)
    print(plan.summary(certificate.step), certificate.summary(), sep="\n")
    gati_jax.save_bundle("my_bundle", chain, candidates, plan, certificate, costs=[costs])

    bundle = gati_jax.load_bundle("my_bundle", chain=chain)
    print(gati_jax.evaluate(bundle, test_images).summary())
    gati_jax.infer(bundle, image).class_index

Names by purpose:

- the base: ``Chain``, ``Normalization``, ``resnet``; from weights ``load_network``, ``from_pretrained``,
  ``save_pretrained``; from modules ``from_linen``, ``from_nnx``, ``from_equinox``
- fit caches: ``fit``, ``Head``, ``FitConfig``, ``Augment``, ``network_head``, ``register_head``, ``Candidate``;
  ``fit_freeze``, ``FreezeConfig``
- choose among them: ``replay``, ``ReplayTable``, ``measure_costs``, ``CostTable``, ``plan``, ``Plan``
- certify: ``certify``, ``certify_together``, ``certify_numerics``, ``certify_conditional``, ``Certificate``, ``Ledger``
- keep and use: ``save_bundle``, ``load_bundle``, ``Bundle``, ``infer``, ``infer_batch``, ``Prediction``
- measure: ``evaluate``, ``Evaluation``
- tune for a device: ``tune``, ``check_tuning``, ``save_tuning``
- errors: ``InputError``, of which ``BundleError`` and ``WeightsError`` are kinds

Further parts are in the packages ``adaptation``, ``bundle``, ``caches``, ``certification``, ``data``, ``evaluation``,
``fitting``, ``models``, ``planning``, ``profiling`` and ``runtime``. The command ``gati-jax`` fits, evaluates and
serves without a line of Python.

The public names stand in ``__init__.pyi``, where type checkers read them; each is imported when it is first used, so
that ``import gati_jax`` loads neither JAX nor anything else of size.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
