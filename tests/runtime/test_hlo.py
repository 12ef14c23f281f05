"""What small programs do, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cf_jax.runtime import hlo

PROGRAM = """HloModule example

%fused (param_0: f32[8,128], param_1: f32[8]) -> f32[6,128] {
  %param_0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[8]{0:T(128)} parameter(1)
  %slice.1 = f32[6,128]{1,0:T(8,128)} slice(%param_0), slice={[0:6], [0:128]}
  %slice.2 = f32[6,128]{1,0:T(8,128)} slice(%param_0), slice={[2:8], [0:128]}
  %slice.3 = f32[6,128]{1,0:T(8,128)} slice(%param_0), slice={[2:8], [0:128]}
  ROOT %sum = f32[6,128]{1,0:T(8,128)S(1)} add(%slice.1, %slice.2)
}

%again (state: (s32[], f32[6,128])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %state = (s32[]{:T(128)}, f32[6,128]{1,0:T(8,128)S(1)}) parameter(0)
  %turn = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %three), direction=LT
}

%body (state.1: (s32[], f32[6,128])) -> (s32[], f32[6,128]) {
  %state.1 = (s32[]{:T(128)}, f32[6,128]{1,0:T(8,128)S(1)}) parameter(0)
  %own = f32[6,128]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=1
  %out = f32[6,128]{1,0:T(8,128)} copy(%own)
  ROOT %next = (s32[]{:T(128)}, f32[6,128]{1,0:T(8,128)}) tuple(%state.1, %out)
}

ENTRY %main (x: f32[8,128], y: f32[8]) -> f32[6,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[8]{0:T(128)} parameter(1)
  %made = f32[6,128]{1,0:T(8,128)S(1)} fusion(%x, %y), kind=kLoop, calls=%fused
  %start = (s32[]{:T(128)}, f32[6,128]{1,0:T(8,128)S(1)}) tuple(%y, %made)
  ROOT %end = (s32[], f32[6,128]) while(%start), condition=%again, body=%body
}
"""

IN_PIECES = """HloModule in_pieces

%first (p0: s8[4096]) -> s8[1024] {
  %p0 = s8[4096]{0:T(1024)} parameter(0)
  ROOT %slice.1 = s8[1024]{0:T(1024)S(1)} slice(%p0), slice={[0:1024]}
}

%second (p1: s8[4096]) -> s8[1024] {
  %p1 = s8[4096]{0:T(1024)} parameter(0)
  ROOT %slice.2 = s8[1024]{0:T(1024)} slice(%p1), slice={[1024:2048]}
}

ENTRY %main (x: s8[4096]) -> s8[1024] {
  %x = s8[4096]{0:T(1024)} parameter(0)
  %a = ((s8[4096]{0:T(1024)}), s8[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) \
async-start(%x), calls=%first
  %b = ((s8[4096]{0:T(1024)}), s8[1024]{0:T(1024)}, s32[]{:S(2)}) \
async-start(%x), calls=%second
  %c = s8[1024]{0:T(1024)S(1)} async-done(%a)
  ROOT %d = s8[1024]{0:T(1024)} async-done(%b)
}
"""

BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.19 @0> (size=512,offset=0): bf16[]{:T(256)}
allocation 1: size 4096, output shape is |bf16[6,8]|, maybe-live-out:
allocation 2: size 1024, parameter 0, shape |bf16[6]| at ShapeIndex {}:
allocation 3: size 2048, parameter 1, shape |bf16[6]| at \
ShapeIndex {}, maybe-live-out:
allocation 4: size 512, constant:
allocation 16: size 8192, preallocated-temp:
allocation 17: size 4, color 2, preallocated-temp:
"""

IN_PLACE = """HloModule in_place

%fused (p0: f32[64,8], p1: f32[1,8], p2: s32[]) -> f32[64,8] {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[64,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

ENTRY %main (x: f32[64,8], y: f32[1,8], i: s32[]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %y = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %made = f32[64,8]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%fused
}
"""

SENT = """HloModule sent

ENTRY %main (x: bf16[16,128]) -> bf16[16,128] {
  %x = bf16[16,128] parameter(0)
  %a = bf16[64,128] all-gather(%x), replica_groups=[2,4]<=[8]
  %b = bf16[16,128] all-reduce(%x), replica_groups={{0,1},{2,3}}
  %c = bf16[16,128] all-reduce(%x), replica_groups=mesh['a'=8,'b'=2] {'a'}
  ROOT %d = bf16[16,128] collective-permute(%x), source_target_pairs={{0,1}}
}
"""


def test_traffic_by_hand():
  """Two slices of 6 rows and a vector come in; a loop writes three times."""
  found = hlo.count(PROGRAM)
  assert found.read == 2 * 6 * 128 * 4 + 8 * 4
  assert found.written == 3 * 6 * 128 * 4
  assert found.open_loops == 0


def test_a_loop_without_a_known_end_runs_as_often_as_said():
  text = PROGRAM.replace("constant(3)", "add(%turn, %turn)")
  for rounds in (1, 5):
    found = hlo.count(text, open_rounds=rounds)
    assert (found.written, found.open_loops) == (rounds * 6 * 128 * 4, 1)


def test_a_slice_updated_in_place_is_all_that_moves():
  found = hlo.count(IN_PLACE)
  assert (found.read, found.written) == (8 * 4 + 4, 8 * 4)


def test_collectives_by_kind_and_group():
  size = 16 * 128 * 2
  assert hlo.count(SENT).transfers == {
    hlo.Transfer("all-gather", 4): (1, 4 * size),
    hlo.Transfer("all-reduce", 2): (1, size),
    hlo.Transfer("all-reduce", 8): (1, size),
    hlo.Transfer("collective-permute", 2): (1, size),
  }


def test_matmuls_of_a_loop_count_each_time():
  """Seven layers of [16, 32] by [32, 32], where XLA counts one."""

  def layers(x, stacked):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0]

  compiled = (
    jax.jit(layers).lower(jnp.ones((16, 32)), jnp.ones((7, 32, 32))).compile()
  )
  found = hlo.count(compiled.as_text())
  assert found.flops == 7 * 2 * 16 * 32 * 32
  largest = hlo.largest_arrays(compiled.as_text(), 3)
  assert largest[0][0] >= 16 * 32 * 4


CONVOLUTION = """HloModule convolution

ENTRY %main (x: f32[3,{size},5], w: f32[{kernel},5,7]) -> f32[3,{out},7] {
  %x = f32[3,{size},5]{2,1,0} parameter(0)
  %w = f32[{kernel},5,7]{2,1,0} parameter(1)
  ROOT %y = f32[3,{out},7] convolution(%x, %w), {window}dim_labels=b0f_0io->b0f
}
"""


@pytest.mark.parametrize(
  ("stride", "low", "high", "lhs", "rhs"),
  [
    (1, 0, 0, 1, 1),
    (2, 1, 2, 1, 1),
    (1, 2, 2, 3, 1),
    (2, 1, 3, 2, 2),
    (1, -1, 0, 1, 1),
  ],
)
def test_places_without_data_are_no_work(stride, low, high, lhs, rhs):
  """Against a walk over all places of the window."""
  size, kernel = 9, 3
  holds = np.zeros(low + high + (size - 1) * lhs + 1 + 9, bool)
  places = np.arange(size) * lhs + low
  holds[places[places >= 0]] = True
  reach = (kernel - 1) * rhs + 1
  length = low + (size - 1) * lhs + 1 + high
  out = (length - reach) // stride + 1
  hits = sum(
    holds[o * stride + k * rhs] for o in range(out) for k in range(kernel)
  )
  window = (
    f"window={{size={kernel} stride={stride} pad={low}_{high}"
    f" lhs_dilate={lhs} rhs_dilate={rhs}}}, "
  )
  text = (
    CONVOLUTION.replace("{size}", str(size))
    .replace("{kernel}", str(kernel))
    .replace("{out}", str(out))
    .replace("{window}", window)
  )
  assert hlo.count(text).flops == 2 * 3 * 7 * 5 * hits


def test_time_is_the_longer_of_computing_and_moving():
  found = hlo.count(IN_PLACE, bytes_per_s=2.0)
  assert found.busy_s == (found.read + found.written) / 2


def test_what_comes_in_pieces_is_read_once():
  cost = hlo.count(IN_PIECES)
  assert cost.read == 2 * 1024
  assert cost.written == 1024  # the first lies on the chip


def test_a_buffer_assignment_in_unknown_words_is_no_zero():
  with pytest.raises(ValueError, match="machine_code=True"):
    hlo.assigned("Buffers: 3 of 512 bytes")


def test_memory_of_a_buffer_assignment():
  assert hlo.assigned(BUFFERS) == {
    "arguments": 1024 + 2048,
    "results": 4096,
    "temporary": 512 + 8192,
    "code": 0,
    "peak": 1024 + 2048 + 4096 + 512 + 8192,
  }


def test_rounds_of_a_loop_that_goes_in_steps():
  """7 rounds of a loop up to 13 that adds 2."""
  text = """HloModule steps

%again (state: (u32[], f32[6,128])) -> pred[] {
  %last = u32[]{:T(128)} constant(13)
  %state = (u32[]{:T(128)}, f32[6,128]{1,0:T(8,128)}) parameter(0)
  %turn = u32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %last), direction=LT
}

%body (state.1: (u32[], f32[6,128])) -> (u32[], f32[6,128]) {
  %two = u32[]{:T(128)} constant(2)
  %state.1 = (u32[]{:T(128)}, f32[6,128]{1,0:T(8,128)}) parameter(0)
  %turn.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  %own = f32[6,128]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=1
  %out = f32[6,128]{1,0:T(8,128)} copy(%own)
  %next = u32[]{:T(128)S(6)} add(%turn.1, %two)
  ROOT %new = (u32[]{:T(128)}, f32[6,128]{1,0:T(8,128)}) tuple(%next, %out)
}

ENTRY %main (start: (u32[], f32[6,128])) -> (u32[], f32[6,128]) {
  %start = (u32[]{:T(128)}, f32[6,128]{1,0:T(8,128)}) parameter(0)
  ROOT %end = (u32[], f32[6,128]) while(%start), condition=%again, body=%body
}
"""
  assert hlo.count(text).written == 7 * 6 * 128 * 4


# As the compiler said it: jax 0.10.2 for v5e, an older one for v4 (cut), and
# again 0.10.2.
_TEMPORARIES = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for"
  " HLO temporaries (19.53G) exceeds available HBM (15.75G)."
)
_LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of \
memory in memory space hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity \
by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B

Program hbm requirement 63.80G:
    global            1.14M
    scoped            4.56M
    HLO temp         63.79G (100.0% utilization)

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(train_step)/jvp(Model)/dot_general" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: bf16[32,4096,2048]{2,1,0}
     Unpadded size: 512.0M
     Allocation type: scoped
     ==========================

  Largest program allocations in vmem:

  1. Size: 3.00M
     Shape: f32[1024,768]{1,0}
"""
_VMEM = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:
Ran out of memory in memory space vmem while allocating on stack for %g.1 = \
f32[4096,2048]{1,0:T(8,128)} custom-call(%x.1), \
custom_call_target="tpu_custom_call". Scoped allocation with size 64.00M and \
limit 16.00M exceeded scoped vmem limit by 48.00M."""


def test_what_a_refused_program_needs():
  found = hlo.refusal(_TEMPORARIES)
  assert (found.space, found.largest) == ("hbm", [])
  assert found.peak == 19.53 * 2**30 and found.beside_arguments is None
  assert found.said == _TEMPORARIES
  found = hlo.refusal(_LISTED)
  assert (found.space, found.peak) == ("hbm", None)
  assert found.beside_arguments == 63.80 * 2**30
  assert found.largest == [
    (2 << 30, "f32[32,4096,4096]", "jit(train_step)/jvp(Model)/dot_general"),
    (512 << 20, "bf16[32,4096,2048]", "scoped"),
  ]
  assert found.said.endswith("by 33.05G.") and len(found.said) < 200


@pytest.mark.parametrize(
  ("message", "space"),
  [
    (_VMEM, "vmem"),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.82M"
      " of 16.00M vmem. Exceeded vmem capacity by 1.82M.",
      "vmem",
    ),
    ("RESOURCE_EXHAUSTED: " + 1000 * "long ", ""),
  ],
)
def test_other_memory_is_no_main_memory(message, space):
  found = hlo.refusal(message)
  assert found.space == space and len(found.said) <= 404
  assert (found.peak, found.beside_arguments, found.largest) == (None, None, [])
