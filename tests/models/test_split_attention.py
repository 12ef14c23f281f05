"""Splash over a mesh of four devices against one, in its interpreter."""

import pathlib
import subprocess
import sys

SCRIPT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from cf_jax.models import kernels
from cf_jax.runtime import sharding

splash_attention.make_splash_mha = functools.partial(
  splash_attention.make_splash_mha, interpret=True)
kernels._on_its_platform = lambda name, x: x
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, context=1)
rng = np.random.default_rng(0)
query, key, value, weigh = (
  jnp.asarray(rng.normal(size=(2, 48 + 2 * 40, n, 16)), jnp.float32)
  for n in (4, 2, 2, 4))
prompt = np.arange(48) < np.array([[48], [30]])
own = np.arange(40) < np.array([[[40], [7]], [[1], [33]]])
real = jnp.asarray(np.concatenate([prompt, own.reshape(2, -1)], axis=1))

def value_and_grads(mesh):
  def loss(*qkv):
    out = kernels.splash_packed(
      *qkv, jnp.asarray(prompt), jnp.asarray(own), mesh=mesh)
    return jnp.sum(jnp.where(real[..., None, None], out * weigh, 0))
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

assert kernels._axis_of_heads(mesh, 2, 2) == "tensor"
assert kernels._axis_of_heads(mesh, 3, 2) is None
jax.tree.map(
  functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
  value_and_grads(mesh), value_and_grads(None))
print("equal")
"""


def test_rows_and_heads_are_divided():
  ran = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    env={
      "PATH": "",
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4"
      " --xla_backend_optimization_level=0",
    },
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert ran.stdout.endswith("equal\n"), ran.stderr[-2000:]
