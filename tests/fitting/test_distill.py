import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from gati_jax.fitting import distillation_loss


def by_scipy(logits, base_logits, alpha, temperature):
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(student, the base's answer), in float64."""
    logits, base_logits = logits.astype(np.float64), base_logits.astype(np.float64)
    teacher, student = softmax(base_logits / temperature, axis=-1), softmax(logits / temperature, axis=-1)
    soft = rel_entr(teacher, student).sum(-1)
    hard = -log_softmax(logits, axis=-1)[np.arange(len(logits)), base_logits.argmax(-1)]
    return (alpha * temperature**2 * soft + (1 - alpha) * hard).mean()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([1.0, 2.5, 6.0]))
def test_loss_is_the_papers(seed, alpha, temperature):
    logits, base_logits = 4 * np.random.default_rng(seed).standard_normal((2, 7, 5)).astype(np.float32)
    loss = distillation_loss(jnp.asarray(logits), jnp.asarray(base_logits), alpha=alpha, temperature=temperature)
    assert float(loss) == pytest.approx(by_scipy(logits, base_logits, alpha, temperature), rel=2e-4, abs=1e-5)


def test_defaults_are_the_released_codes():
    logits, base_logits = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    loss = distillation_loss(jnp.asarray(logits), jnp.asarray(base_logits))
    assert float(loss) == pytest.approx(by_scipy(logits, base_logits, 0.5, 6.0), rel=1e-4)


def test_the_soft_term_vanishes_for_the_bases_own_logits_only():
    base_logits = jnp.asarray([[3.0, 1.0, -2.0]])
    assert float(distillation_loss(base_logits, base_logits, alpha=1.0)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(base_logits[:, ::-1], base_logits, alpha=1.0)) > 0.1
