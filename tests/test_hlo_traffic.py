"""Bytes counted by hand in a small program."""

from benchmarks import hlo_traffic

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


def test_traffic_by_hand():
  """Two slices of 6 rows and a vector come in; a loop writes three times."""
  found = hlo_traffic.count(PROGRAM)
  assert found.read == 2 * 6 * 128 * 4 + 8 * 4
  assert found.written == 3 * 6 * 128 * 4
  assert found.open_loops == 0


def test_a_loop_without_a_known_end_counts_once():
  text = PROGRAM.replace("constant(3)", "add(%turn, %turn)")
  found = hlo_traffic.count(text)
  assert (found.written, found.open_loops) == (6 * 128 * 4, 1)
